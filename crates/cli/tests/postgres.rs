//! A database on a protected disk: PostgreSQL under load on ext4 on a loop device, captured by eBPF. Whatever it acknowledged
//! before a point is in that point, its own checks find nothing, and the books balance.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "field/site.rs"]
mod site;
#[path = "field/skip.rs"]
mod skip;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use agent::capture::ebpf;
use serde_json::Value;
use site::{AGENT, Running, Site, done};
use skip::skip;

const TEST: &str = "what_postgresql_acknowledged_is_in_every_later_point";
const DISK_BYTES: u64 = 512 << 20;
/// A user that owns nothing: the database does not run as root.
const NOBODY: u32 = 65534;
const SOON: Duration = Duration::from_secs(60);
const POINTS: usize = 6;

/// Where the database's programs are: in the path, or where Debian keeps them.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = versions.map(|path| path.join("bin")).collect();
    folders.sort();
    folders.extend(std::env::split_paths(&std::env::var_os("PATH")?));
    let all = ["initdb", "postgres", "psql", "pgbench"];
    folders.into_iter().find(|folder| all.iter().all(|program| folder.join(program).is_file()))
}

/// An image on a loop device, mounted.
struct Mounted {
    device: String,
    folder: PathBuf,
}

impl Mounted {
    fn new(image: &Path, folder: PathBuf, options: &str) -> Result<Mounted, String> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(image).output();
        let made = made.ok().filter(|made| made.status.success()).ok_or("no loop device can be made")?;
        let device = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        fs::create_dir_all(&folder).unwrap();
        let mounted = Mounted { device, folder };
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", options, &mounted.device]).arg(&mounted.folder);
        let status = mount.status().map_err(|error| error.to_string())?;
        if status.success() { Ok(mounted) } else { Err("ext4 cannot be mounted".to_owned()) }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.folder).stderr(Stdio::null()).status();
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// A database server in `folder`, reachable through a socket there.
struct Database {
    programs: PathBuf,
    folder: PathBuf,
    server: Child,
}

impl Database {
    fn command(programs: &Path, name: &str) -> Command {
        let mut command = Command::new(programs.join(name));
        command.uid(NOBODY).gid(NOBODY).current_dir("/").stdin(Stdio::null());
        command
    }

    fn make(programs: &Path, folder: &Path) {
        fs::create_dir(folder).unwrap();
        std::os::unix::fs::chown(folder, Some(NOBODY), Some(NOBODY)).unwrap();
        let mut make = Database::command(programs, "initdb");
        done(make.args(["-U", "test", "-A", "trust", "--no-instructions", "-D"]).arg(folder.join("data")));
    }

    fn start(programs: &Path, folder: &Path, log: &Path) -> Database {
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut server = Database::command(programs, "postgres");
        server.arg("-D").arg(folder.join("data")).arg("-k").arg(folder);
        server.args(["-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "checkpoint_timeout=30s"]);
        let server = server.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let database = Database { programs: programs.to_owned(), folder: folder.to_owned(), server };
        let began = Instant::now();
        while !database.psql("select 1").output().unwrap().status.success() {
            assert!(began.elapsed() < SOON, "PostgreSQL does not start");
            thread::sleep(Duration::from_millis(100));
        }
        database
    }

    fn client(&self, name: &str) -> Command {
        let mut client = Database::command(&self.programs, name);
        client.env("PGHOST", &self.folder).env("PGUSER", "test").env("PGDATABASE", "postgres");
        client
    }

    fn psql(&self, statement: &str) -> Command {
        let mut psql = self.client("psql");
        psql.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-c", statement]);
        psql
    }

    fn ask(&self, statement: &str) -> String {
        done(&mut self.psql(statement)).trim().to_owned()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // At once, without writing anything down.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.server),
            rustix::process::Signal::QUIT,
        );
        let _ = self.server.wait();
    }
}

/// One client after another transaction: numbers in a table, and the last one that was acknowledged.
struct Ledger {
    psql: Child,
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Ledger {
    fn start(database: &Database) -> Ledger {
        let mut psql = database.client("psql");
        psql.args(["-qAtX", "-v", "ON_ERROR_STOP=1"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut psql = psql.spawn().unwrap();
        let (mut input, output) = (psql.stdin.take().unwrap(), BufReader::new(psql.stdout.take().unwrap()));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let known = Arc::clone(&acknowledged);
        let thread = thread::spawn(move || {
            let mut lines = output.lines();
            for number in 1u64.. {
                if writeln!(input, "insert into ledger values ({number}) returning n;").is_err() {
                    return;
                }
                let Some(Ok(line)) = lines.next() else { return };
                // The line comes when the transaction is committed: `psql` shows nothing before the whole answer is there.
                assert_eq!(line, number.to_string());
                known.store(number, Ordering::SeqCst);
            }
        });
        Ledger { psql, acknowledged, thread }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    fn finish(mut self) {
        self.psql.kill().unwrap();
        self.psql.wait().unwrap();
        self.thread.join().unwrap();
    }
}

fn agent(site: &Site, words: &[&str]) -> Option<Value> {
    let output = Command::new(AGENT).arg("--json").args(words).args(["--config", &site.at("agent.toml")]).output();
    let output = output.unwrap();
    output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten()
}

/// Starts the database that the point holds and asks it.
fn prove(site: &Site, programs: &Path, name: &str, acknowledged: u64) -> u64 {
    let image = site.path("export.raw");
    let _ = fs::remove_file(&image);
    site.with_key(&["branch", "export", "--at", name, "--to", &image.display().to_string()]);
    // Mounting replays the journal, as after a power cut.
    let disk = Mounted::new(&image, site.path("recovered"), "defaults").unwrap();
    let database = Database::start(programs, &disk.folder.join("db"), &site.path("recovered.log"));
    let counted = database.ask("select count(*), coalesce(max(n), 0) from ledger");
    let (count, last) = counted.split_once('|').unwrap();
    assert_eq!(count, last, "{name}: no number is left out");
    let last: u64 = last.parse().unwrap();
    assert!(last >= acknowledged, "{name} holds {last}, but {acknowledged} was acknowledged before");
    let sums = database.ask(
        "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
         (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)",
    );
    let sums: Vec<&str> = sums.split('|').collect();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{name}: the books do not balance: {sums:?}");
    database.ask(
        "create extension if not exists amcheck; \
         select bt_index_check(i.indexrelid, true) from pg_index i join pg_class c on c.oid = i.indexrelid \
         join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relpersistence = 'p'",
    );
    let broken = database.ask("select count(*) from verify_heapam('pgbench_accounts')");
    assert_eq!(broken, "0", "{name}: the heap is damaged");
    drop(database);
    last
}

#[test]
fn what_postgresql_acknowledged_is_in_every_later_point() {
    if let Err(why) = ebpf::support::check_machine() {
        return skip(TEST, &why);
    }
    let Some(programs) = programs() else { return skip(TEST, "PostgreSQL is not installed") };
    let folder = tempfile::Builder::new().prefix("fs").tempdir().unwrap();
    // The database's user looks for its files below.
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let site = Site { folder: folder.path().to_owned() };
    let image = site.path("disk.raw");
    File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).unwrap();
    done(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&image));
    let disk = match Mounted::new(&image, site.path("mount"), "discard") {
        Ok(disk) => disk,
        Err(why) => return skip(TEST, &why),
    };
    Database::make(&programs, &disk.folder.join("db"));
    let database = Database::start(&programs, &disk.folder.join("db"), &site.path("postgres.log"));
    database.ask("create table ledger (n bigint primary key)");
    done(database.client("pgbench").args(["-i", "-q", "-s", "2"]));

    let (server, token) = site.make("127.0.0.1");
    fs::write(site.path("token"), token).unwrap();
    let pins = format!("/sys/fs/bpf/farshore-postgres-{}", std::process::id());
    let config = format!(
        "state_dir = {:?}\nmachine_name = \"database\"\nebpf_pins = {pins:?}\nrotate_every_ms = 1000\n\
         [[disk]]\nname = \"data\"\npath = {:?}\ncapture = \"ebpf\"\n",
        site.at("agent"),
        disk.device
    );
    fs::write(site.path("agent.toml"), config).unwrap();
    let join = ["join", "--token-file", &site.at("token"), "--state-dir", &site.at("agent"), "--name", "database"];
    done(Command::new(AGENT).args(join));

    // The load is there before protection begins, and goes on.
    let ledger = Ledger::start(&database);
    let mut load = database.client("pgbench");
    let load = Running(load.args(["-n", "-c", "4", "-T", "600"]).stdout(Stdio::null()).spawn().unwrap());
    let log = File::create(site.path("agent.log")).unwrap();
    let mut running = Command::new(AGENT);
    running.args(["run", "--config", &site.at("agent.toml")]).stdout(log.try_clone().unwrap()).stderr(log);
    let running = Running(running.spawn().unwrap());
    let began = Instant::now();
    while agent(&site, &["status"]).is_none_or(|status| status["state"] != "protected") {
        let said = || fs::read_to_string(site.path("agent.log")).unwrap();
        assert!(began.elapsed() < SOON, "not protected: {:?}\n{}", agent(&site, &["status"]), said());
        thread::sleep(Duration::from_millis(200));
    }
    let mut points = Vec::new();
    for number in 0..POINTS {
        thread::sleep(Duration::from_millis(400 + 170 * number as u64));
        let acknowledged = ledger.acknowledged();
        let name = format!("point-{number}");
        agent(&site, &["mark", &name, "--wait-s", "30"]).expect("it is marked");
        points.push((name, acknowledged));
    }
    assert!(points[POINTS - 1].1 > points[0].1, "the load goes on: {points:?}");
    ledger.finish();
    drop((load, database, running));
    ebpf::detach(Path::new(&pins)).expect("capture is taken down");
    drop(disk);
    let held: Vec<u64> =
        points.iter().map(|(name, acknowledged)| prove(&site, &programs, name, *acknowledged)).collect();
    assert!(held.is_sorted(), "{held:?}");
    drop(server);
}
