//! Databases on a protected disk, and the hooks that bring them to rest: PostgreSQL and MariaDB themselves, captured by eBPF on
//! the running kernel. Needs root and BTF; says SKIPPED otherwise.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/at_rest.rs"]
mod at_rest;
#[path = "site/loops.rs"]
mod loops;
#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use agent::consistency::settings::{HookConfig, HookKind};
use agent::service::control::{Answer, Request};
use at_rest::{Machine, at_marker, begin_log};
use loops::{Loop, output_of, skip, succeeds};
use site::Server;
use waits::wait_for;

/// A PostgreSQL with its data on the protected disk. Ended when dropped.
struct Postgres {
    programs: PathBuf,
    data: PathBuf,
    socket: PathBuf,
}

impl Postgres {
    fn as_owner(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]);
        command.arg(self.programs.join(program)).args(arguments).current_dir("/").stdin(Stdio::null());
        command
    }

    fn new(test: &str, mount: &Path, socket: &Path) -> Option<Postgres> {
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok().and_then(|mut versions| versions.next()?.ok());
        let Some(programs) = versions.map(|version| version.path().join("bin")) else {
            skip(test, "there is no PostgreSQL");
            return None;
        };
        Some(Postgres { programs, data: mount.join("pgdata"), socket: socket.to_owned() })
    }

    fn give_folders(&self) {
        for folder in [&self.data, &self.socket] {
            std::fs::create_dir_all(folder).expect("created");
            assert!(succeeds("chown", &["postgres:postgres", &folder.display().to_string()]));
        }
    }

    fn start(&self) {
        let (data, socket) = (self.data.display().to_string(), self.socket.display().to_string());
        let log = self.socket.join("log").display().to_string();
        let options = format!("-c listen_addresses= -c unix_socket_directories={socket} -c shared_buffers=16MB");
        let started = self
            .as_owner("pg_ctl", &["start", "-w", "-s", "-D", &data, "-l", &log, "-o", &options])
            .stdout(Stdio::null())
            .status();
        assert!(started.is_ok_and(|status| status.success()), "{}", std::fs::read_to_string(log).unwrap_or_default());
    }

    fn stop(&self) {
        let _ = self
            .as_owner("pg_ctl", &["stop", "-w", "-s", "-m", "immediate", "-D", &self.data.display().to_string()])
            .stderr(Stdio::null())
            .status();
    }

    fn query(&self, query: &str) -> String {
        let socket = self.socket.display().to_string();
        let run = self.as_owner("psql", &["-X", "-A", "-t", "-h", &socket, "-d", "postgres", "-c", query]).output();
        let run = run.expect("it runs");
        assert!(run.status.success(), "{query}: {}", String::from_utf8_lossy(&run.stderr));
        String::from_utf8_lossy(&run.stdout).trim().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn postgresql_comes_back_with_every_row_that_was_committed_before_the_point() {
    let test = "postgresql_comes_back";
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, test) else { return };
    // Its socket and the folders above are reached as another user.
    let place = tempfile::tempdir().expect("a temporary folder");
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).expect("set");
    for folder in machine.disk.mount.ancestors().take_while(|folder| *folder != std::env::temp_dir()) {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).expect("set");
    }
    let Some(postgres) = Postgres::new(test, &machine.disk.mount, &place.path().join("run")) else { return };
    postgres.give_folders();
    let data = postgres.data.display().to_string();
    let made =
        postgres.as_owner("initdb", &["-D", &data, "-A", "trust", "-N", "--locale=C"]).stdout(Stdio::null()).status();
    assert!(made.is_ok_and(|status| status.success()));
    postgres.start();
    postgres.query("create table t (n int)");
    let arguments = vec![format!("--host={}", postgres.socket.display()), "--dbname=postgres".to_owned()];
    let program = Some(postgres.programs.join("psql"));
    machine.config.consistency.hooks.push(HookConfig { kind: HookKind::Postgresql, program, user: None, arguments });
    let service = machine.start();
    let base = begin_log(&server);
    let before = postgres.query("select checkpoint_lsn from pg_control_checkpoint()");
    for n in 1..=5 {
        postgres.query(&format!("insert into t values ({n})"));
    }
    assert_eq!(machine.point("consistent"), (None, vec![]));
    assert_ne!(
        postgres.query("select checkpoint_lsn from pg_control_checkpoint()"),
        before,
        "the hook had its checkpoint"
    );
    postgres.query("insert into t values (6)");
    postgres.stop();
    let (failed, _) = machine.point("its server is down");
    assert!(failed.expect("no claim").contains("the PostgreSQL hook exited with"));
    service.stop().expect("stops");

    let image = machine.folder.join("point.img");
    std::fs::write(&image, at_marker(&server, &base, "consistent")).expect("written");
    let mut point = Loop::attach(&image, "ext4", &machine.folder.join("point")).expect("a loop device");
    assert!(point.mount("defaults"));
    let recovered = Postgres {
        programs: postgres.programs.clone(),
        data: point.mount.join("pgdata"),
        socket: postgres.socket.clone(),
    };
    // It believes that its predecessor still runs: the machine was never shut down.
    std::fs::remove_file(recovered.data.join("postmaster.pid")).expect("it ran");
    recovered.start();
    assert_eq!(recovered.query("select string_agg(n::text, ' ' order by n) from t"), "1 2 3 4 5");
    recovered.stop();
    point.unmount();
}

/// A MariaDB with its data on the protected disk. Killed when dropped.
struct MariaDb {
    socket: PathBuf,
    server: Child,
}

impl MariaDb {
    const SERVER: &str = "/usr/sbin/mariadbd";
    const CLIENT: &str = "/usr/bin/mariadb";

    fn make(data: &Path) {
        let data = format!("--datadir={}", data.display());
        let options =
            ["--no-defaults", &data, "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"];
        assert!(succeeds("mariadb-install-db", &options), "{}", output_of("mariadb-install-db", &options));
    }

    fn start(data: &Path, place: &Path) -> MariaDb {
        let (socket, log) = (place.join("socket"), place.join("log"));
        let mut command = Command::new(MariaDb::SERVER);
        command.args(["--no-defaults", "--user=root", "--skip-networking", "--innodb-buffer-pool-size=16M"]);
        // What was not closed is not mended behind the test's back.
        command.arg("--myisam-recover-options=OFF");
        command.arg(format!("--datadir={}", data.display())).arg(format!("--socket={}", socket.display()));
        command
            .arg(format!("--pid-file={}", place.join("pid").display()))
            .arg(format!("--log-error={}", log.display()));
        let _ = std::fs::remove_file(&socket);
        let server =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
        let mut database = MariaDb { socket, server };
        wait_for("MariaDB answers", || {
            let ended = database.server.try_wait().expect("a child");
            assert!(ended.is_none(), "{ended:?}: {}", std::fs::read_to_string(&log).unwrap_or_default());
            database.client().args(["-e", "select 1"]).output().is_ok_and(|asked| asked.status.success())
        });
        database
    }

    fn arguments(&self) -> Vec<String> {
        vec!["--no-defaults".to_owned(), format!("--socket={}", self.socket.display())]
    }

    fn client(&self) -> Command {
        let mut command = Command::new(MariaDb::CLIENT);
        command.args(self.arguments()).args(["-uroot", "--batch", "--skip-column-names"]).stdin(Stdio::null());
        command
    }

    fn ask(&self, statement: &str) -> String {
        let asked = self.client().args(["-e", statement]).output().expect("it runs");
        assert!(asked.status.success(), "{statement}: {}", String::from_utf8_lossy(&asked.stderr));
        String::from_utf8_lossy(&asked.stdout).trim().to_owned()
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Rows of the same numbers, one after the other, in a table that has a log and in one that has none.
struct Rows {
    client: Child,
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Rows {
    fn start(database: &MariaDb) -> Rows {
        let mut client = database.client();
        client.args(["--unbuffered", "test"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = client.spawn().expect("it starts");
        let mut input = client.stdin.take().expect("a pipe");
        let output = BufReader::new(client.stdout.take().expect("a pipe"));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let known = Arc::clone(&acknowledged);
        let thread = thread::spawn(move || {
            let mut lines = output.lines();
            for n in 1u64.. {
                let order = format!("insert into logged values ({n}); insert into plain values ({n}); select {n};");
                if writeln!(input, "{order}").is_err() {
                    return;
                }
                let Some(Ok(line)) = lines.next() else { return };
                assert_eq!(line, n.to_string());
                known.store(n, Ordering::SeqCst);
            }
        });
        Rows { client, acknowledged, thread }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    fn finish(mut self) {
        self.client.kill().expect("it runs");
        self.client.wait().expect("it ends");
        self.thread.join().expect("no row was out of order");
    }
}

/// Starts a server on the point, and asks it what it finds when it checks the table without a log, and then more.
fn recovered<T>(machine: &Machine, image: &[u8], place: &Path, ask: impl FnOnce(&MariaDb) -> T) -> (String, T) {
    let path = machine.folder.join("point.img");
    std::fs::write(&path, image).expect("written");
    let mut point = Loop::attach(&path, "ext4", &machine.folder.join("point")).expect("a loop device");
    assert!(point.mount("defaults"));
    let database = MariaDb::start(&point.mount.join("data"), place);
    let answer = (database.ask("check table test.plain"), ask(&database));
    drop(database);
    point.unmount();
    answer
}

#[test]
fn mariadb_has_its_tables_closed_at_a_consistent_point() {
    let test = "mariadb_has_its_tables_closed";
    if ![MariaDb::SERVER, MariaDb::CLIENT].iter().all(|program| Path::new(program).exists()) {
        return skip(test, "there is no MariaDB");
    }
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, test) else { return };
    let place = tempfile::tempdir().expect("a temporary folder");
    let data = machine.disk.mount.join("data");
    MariaDb::make(&data);
    let database = MariaDb::start(&data, place.path());
    database.ask("create database if not exists test");
    database.ask("create table test.logged (n bigint primary key) engine=InnoDB");
    database.ask("create table test.plain (n bigint primary key) engine=MyISAM");
    let (program, arguments) = (Some(PathBuf::from(MariaDb::CLIENT)), database.arguments());
    machine.config.consistency.hooks.push(HookConfig { kind: HookKind::Mysql, program, user: None, arguments });
    let service = machine.start();
    let base = begin_log(&server);
    let rows = Rows::start(&database);
    wait_for("rows come", || rows.acknowledged() > 20);
    let before = rows.acknowledged();
    assert_eq!(machine.point("consistent"), (None, vec![]));
    let then = rows.acknowledged();
    wait_for("they come again", || rows.acknowledged() > then + 20);
    // The same without rest; what lies in memory is on the disk at least.
    rustix::fs::sync();
    let crash = Request::Mark { name: "crash".to_owned(), wait_ms: 20_000 };
    assert!(matches!(machine.ask(&crash), Ok(Answer::Marked { .. })));
    rows.finish();
    drop(database);
    service.stop().expect("stops");

    let count = |database: &MariaDb, table: &str| -> u64 {
        let counted = database.ask(&format!("select count(*), coalesce(max(n), 0) from test.{table}"));
        let (count, last) = counted.split_once('\t').expect("two columns");
        assert_eq!(count, last, "no row of {table} is left out");
        count.parse().expect("a number")
    };
    let consistent = at_marker(&server, &base, "consistent");
    let (found, (logged, plain)) = recovered(&machine, &consistent, place.path(), |database| {
        (count(database, "logged"), count(database, "plain"))
    });
    assert_eq!(found, "test.plain\tcheck\tstatus\tOK", "it was closed in order");
    assert!(logged >= before && (plain == logged || plain + 1 == logged), "{before}: {logged}, {plain}");
    // The check can fail: without rest the table is open.
    let (found, ()) = recovered(&machine, &at_marker(&server, &base, "crash"), place.path(), |_| ());
    assert!(found.contains("warning") || found.contains("error"), "{found}");
}
