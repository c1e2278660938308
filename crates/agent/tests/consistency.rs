//! Application-consistent points of the whole agent: disks captured by eBPF on the running kernel, file systems on loop
//! devices, real scripts, a real PostgreSQL. Needs root and BTF; says SKIPPED otherwise.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/loops.rs"]
mod loops;
#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::capture::ebpf;
use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::consistency::settings::{HookConfig, HookKind};
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::Problem;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use loops::{Loop, output_of, skip, succeeds};
use process::Agent;
use replication::{Change, ChangeKind, DiskId, MarkerKind};
use site::Server;
use waits::{status_of, wait_for, wait_protected};
use world::SystemClock;

const DISK_BYTES: u64 = 192 << 20;
struct Machine {
    config: AgentConfig,
    folder: PathBuf,
    disk: Loop,
}

impl Machine {
    fn new(server: &Server, test: &str) -> Option<Machine> {
        if let Err(why) = ebpf::support::check_machine() {
            skip(test, &why);
            return None;
        }
        let folder = server.folder(test);
        std::fs::create_dir_all(&folder).expect("created");
        let disk = Loop::make(test, &folder.join("disk.img"), DISK_BYTES, "ext4", &folder.join("mnt"))?;
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        config.ebpf_pins = Some(PathBuf::from(format!("/sys/fs/bpf/farshore-{test}-{}", std::process::id())));
        config.disks.push(DiskConfig { capture: CaptureChoice::Ebpf, ..DiskConfig::new("disk", &disk.device) });
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), test, &[]).expect("joins");
        Some(Machine { config, folder, disk })
    }

    fn start(&self) -> Service {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        let service = Service::start(&self.config, options).unwrap_or_else(|problems| panic!("{problems:?}"));
        wait_protected(|| Some(service.status()));
        service
    }

    fn spawn(&self) -> Agent {
        self.spawn_by(&[])
    }

    /// Starts the agent as a process of its own, by a program that starts others.
    fn spawn_by(&self, starter: &[String]) -> Agent {
        let agent = Agent::spawn(&self.config, &self.folder, starter);
        wait_protected(|| status_of(&self.config));
        agent
    }

    fn ask(&self, request: &Request) -> Result<Answer, Problem> {
        ask(&self.config.control_socket(), request)
    }

    /// Takes a point at rest; why it is not application-consistent, and the remarks.
    fn point(&self, name: &str) -> (Option<String>, Vec<String>) {
        match self.ask(&Request::Point { name: name.to_owned(), wait_ms: 20_000 }) {
            Ok(Answer::PointTaken { failed, remarks, durable: true, connected: true, .. }) => (failed, remarks),
            other => panic!("{other:?}"),
        }
    }

    /// A script of root's own.
    fn script(&self, name: &str, body: &str) -> Option<PathBuf> {
        let path = self.folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("set");
        Some(path)
    }

    /// That somebody can write to the disk's file system.
    fn assert_writable(&self) {
        let (path, since) = (self.disk.mount.join("writable"), Instant::now());
        let mut file = File::create(path).expect("created");
        file.write_all(b"x").and_then(|()| Ok(rustix::fs::fsync(&file)?)).expect("written");
        assert!(since.elapsed() < Duration::from_secs(5), "after {:?}", since.elapsed());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        process::take_down(&self.config);
    }
}

/// Not a test of its own: what [`Machine::spawn`] runs.
#[test]
fn an_agent_of_its_own() {
    process::be_one();
}

/// From now on the server keeps the order of changes; the disk as it is there now.
fn begin_log(server: &Server) -> Vec<u8> {
    let mut store = server.store();
    store.log = Some(Vec::new());
    store.replicas[&DiskId(0)].bytes.clone()
}

/// The markers that the server has, in order.
fn markers(server: &Server) -> Vec<(MarkerKind, String)> {
    let store = server.store();
    let log = store.log.as_ref().expect("it is kept");
    let marker = |change: &Change| match &change.kind {
        ChangeKind::Marker { kind, name } => Some((kind.clone(), name.clone())),
        _ => None,
    };
    log.iter().filter_map(marker).collect()
}

/// The disk as it was at the marker `name`.
fn at_marker(server: &Server, base: &[u8], name: &str) -> Vec<u8> {
    let store = server.store();
    let mut content = base.to_vec();
    for change in store.log.as_ref().expect("it is kept") {
        match &change.kind {
            ChangeKind::Write { range, data } => content[range.within(0)].copy_from_slice(data),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => content[range.within(0)].fill(0),
            ChangeKind::Marker { name: found, .. } if found == name => return content,
            _ => {}
        }
    }
    panic!("there is no marker {name}");
}

/// Files written, overwritten, renamed and synced until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Load {
    fn start(folder: &Path) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let run = |worker: u64| {
            let (stop, folder) = (stop.clone(), folder.to_owned());
            thread::spawn(move || {
                for round in 0u64.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let path = folder.join(format!("file-{worker}-{}", round * 7 % 23));
                    let mut options = OpenOptions::new();
                    let file = options.create(true).truncate(round % 3 == 0).write(true).open(&path);
                    let Ok(mut file) = file else { continue };
                    let _ = file.write_all(&vec![round as u8; 1 + (round * 7919 % 150_000) as usize]);
                    if round % 4 == 0 {
                        let _ = rustix::fs::fsync(&file);
                    }
                    if round % 11 == 0 {
                        let _ = std::fs::remove_file(&path);
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            })
        };
        let threads = (0..2).map(run).collect();
        Load { stop, threads }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

#[test]
fn a_point_at_rest_has_a_clean_file_system() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "a_point_at_rest_has_a_clean_file_system") else { return };
    let log = machine.folder.join("phases");
    let body = format!("echo \"$FARSHORE_PHASE $FARSHORE_POINT $FARSHORE_OUTCOME\" >> {}", log.display());
    machine.config.consistency.pre_script = machine.script("pre", &body);
    machine.config.consistency.post_script = machine.script("post", &body);
    let service = machine.start();
    let load = Load::start(&machine.disk.mount);
    let base = begin_log(&server);
    thread::sleep(Duration::from_millis(300));
    for round in 0..5 {
        // The promise "this was written before": a file that nobody synced.
        std::fs::write(machine.disk.mount.join(format!("before-{round}")), [round; 5000]).expect("written");
        let (failed, remarks) = machine.point(&format!("rest-{round}"));
        assert_eq!((failed, remarks), (None, vec![]));
        thread::sleep(Duration::from_millis(100));
        let crash = Request::Mark { name: format!("crash-{round}"), wait_ms: 20_000 };
        assert!(matches!(machine.ask(&crash), Ok(Answer::Marked { .. })));
    }
    drop(load);
    let phases = std::fs::read_to_string(&log).expect("the scripts ran");
    assert_eq!(phases.lines().take(2).collect::<Vec<_>>(), ["pre rest-0 ", "post rest-0 consistent"]);
    assert_eq!(phases.lines().count(), 10);
    let status = service.status().consistency;
    assert_eq!((status.application_points, status.failures), (5, 0));
    assert!(status.last_rest_ms < 5000 && status.last_application_ns > 0, "{status:?}");

    let mut unclean = 0;
    for (kind, name) in markers(&server) {
        let image = machine.folder.join("point.img");
        std::fs::write(&image, at_marker(&server, &base, &name)).expect("written");
        let text = image.display().to_string();
        let header = output_of("dumpe2fs", &["-h", &text]);
        assert!(header.contains("Filesystem features:"), "{header}");
        let clean = !header.contains("needs_recovery");
        match kind {
            MarkerKind::Application => {
                assert!(clean, "{name}: the journal is empty: {header}");
                assert!(succeeds("e2fsck", &["-fn", &text]), "{name}: {}", output_of("e2fsck", &["-fn", &text]));
                let mut point = Loop::attach(&image, "ext4", &machine.folder.join("point")).expect("a loop device");
                assert!(point.mount("ro,noload"), "{name} is mounted without its journal");
                let round: u8 = name.trim_start_matches("rest-").parse().expect("a number");
                let before = std::fs::read(point.mount.join(format!("before-{round}"))).expect("it is there");
                assert_eq!(before, [round; 5000], "what was written before the point is in it, synced or not");
                point.unmount();
            }
            MarkerKind::Crash => unclean += u32::from(!clean),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(markers(&server).len(), 10);
    // The check can fail: a moment without rest has a journal to replay.
    assert!(unclean > 0, "no crash-consistent point shows the difference");
    service.stop().expect("stops");
}

#[test]
fn whatever_fails_costs_the_claim_and_nothing_else() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "whatever_fails_costs_the_claim") else { return };
    let log = machine.folder.join("posts");
    let post = machine.script("post", &format!("echo \"$FARSHORE_OUTCOME\" >> {}", log.display()));
    machine.config.consistency.post_script = post;
    machine.config.consistency.script_limit_ms = 500;
    let pre = |machine: &Machine, body: &str| machine.script("pre", body);
    machine.config.consistency.pre_script = pre(&machine, "true");
    let service = machine.start();
    begin_log(&server);
    let _load = Load::start(&machine.disk.mount);
    let point = |name: &str| {
        let since = Instant::now();
        let (failed, remarks) = machine.point(name);
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
        machine.assert_writable();
        (failed, remarks)
    };

    pre(&machine, "echo 'the queue is not empty' >&2; exit 7");
    let (failed, _) = point("fails");
    let failed = failed.expect("no claim");
    assert!(failed.contains("exited with 7: the queue is not empty"), "{failed}");
    pre(&machine, "sleep 1000");
    assert!(point("hangs").0.expect("no claim").contains("did not end within 500 ms and was killed"));
    let script = pre(&machine, "true").expect("a path");
    chown(&script, Some(12345), None).expect("given away");
    assert!(point("not root's").0.expect("no claim").contains("does not belong to root"));
    chown(&script, Some(0), None).expect("taken back");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o777)).expect("set");
    assert!(point("open to all").0.expect("no claim").contains("written to by others"));
    std::fs::remove_file(&script).expect("removed");
    assert!(point("gone").0.expect("no claim").contains("No such file"));
    // Somebody else holds the file system frozen.
    pre(&machine, &format!("fsfreeze --freeze {}", machine.disk.mount.display()));
    let thaw = format!(
        "fsfreeze --unfreeze {}; echo \"$FARSHORE_OUTCOME\" >> {}",
        machine.disk.mount.display(),
        log.display()
    );
    machine.script("post", &thaw);
    let (failed, _) = point("frozen by others");
    let failed = failed.expect("no claim");
    assert!(failed.contains("written out within") || failed.contains("somebody else has frozen"), "{failed}");
    // The post-script's failure is told, but what was claimed was so.
    pre(&machine, "true");
    machine.script("post", "exit 9");
    let (failed, remarks) = point("post fails");
    assert_eq!(failed, None);
    assert!(remarks[0].contains("exited with 9"), "{remarks:?}");

    let outcomes = std::fs::read_to_string(&log).expect("the post-script ran each time");
    assert_eq!(outcomes.lines().collect::<Vec<_>>(), ["failed"; 6]);
    let found = markers(&server);
    assert_eq!(found.len(), 7, "{found:?}");
    for (kind, name) in &found[..6] {
        let MarkerKind::Attempted { failed } = kind else { panic!("{name}: {kind:?}") };
        assert!(!failed.is_empty());
    }
    assert_eq!(found[6], (MarkerKind::Application, "post fails".to_owned()));
    let status = service.status().consistency;
    assert_eq!((status.application_points, status.failures), (1, 6));
    service.stop().expect("stops");
}

#[test]
fn a_killed_agent_leaves_no_frozen_file_system_and_no_waiting_application() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "a_killed_agent_leaves_nothing_frozen") else { return };
    let log = machine.folder.join("posts");
    let post = format!("echo \"$FARSHORE_OUTCOME\" >> {}", log.display());
    machine.config.consistency.post_script = machine.script("post", &post);
    let mut agent = machine.spawn();
    let frozen = machine.ask(&Request::Freeze { limit_ms: 60_000, mark: Some("held".to_owned()) });
    assert!(matches!(frozen, Ok(Answer::Frozen { marked: true, .. })), "{frozen:?}");
    let writer = {
        let path = machine.disk.mount.join("waits");
        thread::spawn(move || {
            std::fs::write(path, [1; 9000]).expect("written");
            Instant::now()
        })
    };
    thread::sleep(Duration::from_millis(400));
    assert!(!writer.is_finished(), "the disks are at rest");
    let killed = Instant::now();
    agent.kill();
    let after = writer.join().expect("the writer goes on") - killed;
    assert!(after < Duration::from_secs(2), "after {after:?}");

    // Killed between its scripts.
    let started = machine.folder.join("started");
    machine.config.consistency.pre_script = machine.script("pre", &format!("touch {}; sleep 1000", started.display()));
    agent = machine.spawn();
    assert!(!log.exists(), "no script was due after a freeze by hand");
    let socket = machine.config.control_socket();
    let asking = thread::spawn(move || ask(&socket, &Request::Point { name: "cut short".to_owned(), wait_ms: 0 }));
    wait_for("the pre-script runs", || started.exists());
    agent.kill();
    assert!(asking.join().expect("it is answered").is_err());
    machine.assert_writable();
    machine.config.consistency.pre_script = None;
    agent = machine.spawn();
    assert_eq!(std::fs::read_to_string(&log).expect("the post-script was made up for"), "interrupted\n");
    assert_eq!(machine.point("after").0, None);
    assert_eq!(std::fs::read_to_string(&log).expect("there"), "interrupted\nconsistent\n");
    agent.kill();
}

#[test]
fn frozen_state_does_not_keep_a_point_from_being_marked() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "frozen_state") else { return };
    // The agent's own state lies on the disk that it protects, as on a machine with one disk.
    let state = machine.disk.mount.join("state");
    assert!(succeeds("cp", &["-a", &machine.config.state_dir.display().to_string(), &state.display().to_string()]));
    machine.config.state_dir = state;
    machine.config.rotate_every_ms = 100;
    let service = machine.start();
    let load = Load::start(&machine.disk.mount);
    begin_log(&server);
    for round in 0..10 {
        assert_eq!(machine.point(&format!("rest-{round}")), (None, vec![]));
        thread::sleep(Duration::from_millis(130));
    }
    drop(load);
    assert!(markers(&server).iter().all(|(kind, _)| *kind == MarkerKind::Application));
    assert!(service.status().consistency.last_rest_ms < 5000);
    service.stop().expect("stops");
}

#[test]
fn points_are_taken_on_schedule() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "points_are_taken_on_schedule") else { return };
    machine.config.consistency.crash_every_s = 1;
    machine.config.consistency.application_every_s = 10;
    let service = machine.start();
    begin_log(&server);
    wait_for("a scheduled point at rest", || service.status().consistency.application_points > 0);
    wait_for("it has arrived", || markers(&server).iter().any(|(kind, _)| *kind == MarkerKind::Application));
    let found = markers(&server);
    let crash =
        found.iter().filter(|(kind, name)| *kind == MarkerKind::Crash && name.starts_with("scheduled 20")).count();
    assert!(crash >= 5, "{found:?}");
    assert!(service.status().consistency.crash_markers >= 5);
    service.stop().expect("stops");
}

/// What the packaged unit leaves to the agent: few capabilities, and nothing to write to but its state and its pins.
#[test]
fn the_confinement_of_the_unit_breaks_neither_capture_nor_freeze() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "confinement") else { return };
    let unit = include_str!("../../../packaging/farshore-agent.service");
    let capabilities = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).expect("it says so");
    let kept: Vec<String> =
        capabilities.split(' ').map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase())).collect();
    assert!(unit.contains("ProtectSystem=strict") && unit.contains("ReadWritePaths=/sys/fs/bpf"));
    let (state, mount) = (machine.config.state_dir.display(), machine.disk.mount.display());
    let confine = format!(
        "set -e; mount -n --bind {state} {state}; mount -n -o remount,bind,ro {mount}; mount -n -o remount,bind,ro /sys; \
         mount -n -o remount,bind,ro /; ! touch {mount}/x {0}/x /x 2>/dev/null; \
         exec setpriv --no-new-privs --bounding-set=-all,{1} -- \"$@\"",
        machine.folder.display(),
        kept.join(",")
    );
    machine.config.consistency.pre_script = machine.script("pre", "true");
    let starter = ["unshare", "-m", "--propagation", "slave", "sh", "-c", &confine, "sh"].map(str::to_owned);
    let mut agent = machine.spawn_by(&starter);
    begin_log(&server);
    let load = Load::start(&machine.disk.mount);
    assert_eq!(machine.point("confined"), (None, vec![]));
    drop(load);
    assert_eq!(markers(&server), [(MarkerKind::Application, "confined".to_owned())]);
    agent.kill();
    // Its pins are there for the next one, confined or not.
    let heals = server.store().heals;
    let mut agent = machine.spawn_by(&starter);
    assert_eq!(server.store().heals, heals, "the next one goes on");
    agent.kill();
}

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
