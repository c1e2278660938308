//! Application-consistent points of the whole agent: disks captured by eBPF on the running kernel, file systems on loop
//! devices, real scripts. Needs root and BTF; says SKIPPED otherwise.
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

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::service::control::{Answer, Request, ask};
use at_rest::{Machine, at_marker, begin_log, markers};
use loops::{Loop, output_of, succeeds};
use replication::MarkerKind;
use site::Server;
use waits::wait_for;

/// Not a test of its own: what [`Machine::spawn`] runs.
#[test]
fn an_agent_of_its_own() {
    process::be_one();
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
