//! The whole agent in this process: real NBD clients, real disks, real TLS, a receiver that keeps everything in memory.

mod site;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::config::{AgentConfig, DiskConfig};
use agent::heal_pace::HealLimits;
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::ProblemKind;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use agent::status::{AgentStatus, ProtectionState};
use replication::DiskId;
use replication::wire::HealNeed;
use site::Server;
use world::{BlockDevice, Entropy, SystemClock, SystemEntropy};

/// Nothing here takes a tenth of this unless it hangs.
const SOON: Duration = Duration::from_secs(20);

/// A protected machine: two image files and an agent's state.
struct Machine {
    config: AgentConfig,
}

impl Machine {
    /// Joined to `server`, its images filled with something.
    fn new(server: &Server, name: &str, sizes: &[u64]) -> Machine {
        let folder = server.folder(name);
        std::fs::create_dir_all(&folder).expect("created");
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        for (index, size) in sizes.iter().enumerate() {
            let path = folder.join(format!("disk{index}.img"));
            let file = std::fs::File::create(&path).expect("created");
            file.set_len(*size).expect("sized");
            // Data in the first half, holes behind.
            let mut data = vec![0; (*size / 2) as usize];
            SystemEntropy.fill(&mut data);
            std::os::unix::fs::FileExt::write_all_at(&file, &data, 0).expect("written");
            config.disks.push(DiskConfig::new(&format!("disk{index}"), &path));
        }
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), name, &[]).expect("joins");
        Machine { config }
    }

    fn start(&self) -> Service {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        Service::start(&self.config, options).unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    fn client(&self, disk: &str) -> nbd::Client {
        nbd::Client::connect_unix(self.config.nbd_socket(), disk).expect("the disk is served")
    }

    fn ask(&self, request: &Request) -> Answer {
        ask(&self.config.control_socket(), request).unwrap_or_else(|problem| panic!("{problem}"))
    }

    fn image(&self, disk: usize) -> PathBuf {
        self.config.disks[disk].path.clone()
    }

    /// Whether the server holds exactly what is in the images.
    fn assert_replicated(&self, server: &Server) {
        let store = server.store();
        for (index, disk) in self.config.disks.iter().enumerate() {
            let image = std::fs::read(&disk.path).expect("readable");
            let replica = &store.replicas[&DiskId(index as u16)].bytes;
            let differs = image.chunks(512).zip(replica.chunks(512)).filter(|(a, b)| a != b).count();
            assert!(image.len() == replica.len() && differs == 0, "{} differs in {differs} sectors", disk.name);
        }
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < SOON, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until everything written so far is with the server; the status then.
fn settle(service: &Service) -> AgentStatus {
    // The status is taken ten times a second: two of them after this moment tell of it.
    let uptime = Instant::now();
    wait_for("the machine is protected", || {
        let status = service.status();
        uptime.elapsed() > Duration::from_millis(250)
            && status.state == ProtectionState::Protected
            && status.ring.used_bytes == 0
            && status.watermarks.captured == status.watermarks.journaled
    });
    service.status()
}

/// Writes to a disk until told to stop: data, zeroes, discards, flushes. Returns how many requests that were.
fn work(client: &nbd::Client, stop: &AtomicBool, bytes_max: usize) -> u64 {
    let entropy: &dyn Entropy = &SystemEntropy;
    let mut requests = 0;
    while !stop.load(Ordering::SeqCst) {
        let [a, b, c, d, kind, e, f, _] = entropy.bytes::<8>();
        let sectors = client.size() / 512;
        let start = u64::from(u32::from_le_bytes([a, b, c, d])) % sectors;
        let len = (1 + u64::from(u16::from_le_bytes([e, f]))).min(bytes_max as u64 / 512).min(sectors - start);
        let range = start * 512..(start + len) * 512;
        let result = match kind {
            0..20 => client.write_zeroes(range),
            20..30 => client.discard(range),
            30..35 => client.flush(),
            _ => {
                let mut data = vec![0; (len * 512) as usize];
                entropy.fill(&mut data);
                client.write_at(range.start, &data)
            }
        };
        match result {
            Ok(()) => requests += 1,
            // The agent was killed.
            Err(_) => break,
        }
    }
    requests
}

/// Runs `body` while both disks are written to; how many requests went through.
fn while_writing(machine: &Machine, bytes_max: usize, body: impl FnOnce()) -> u64 {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = machine
            .config
            .disks
            .iter()
            .map(|disk| {
                let client = machine.client(&disk.name);
                scope.spawn({
                    let stop = &stop;
                    move || work(&client, stop, bytes_max)
                })
            })
            .collect();
        body();
        stop.store(true, Ordering::SeqCst);
        writers.into_iter().map(|writer| writer.join().expect("no panic")).sum()
    })
}

#[test]
fn initial_replication_while_the_disks_are_written_to() {
    let server = Server::start(false);
    let machine = Machine::new(&server, "m", &[8 << 20, 1 << 20]);
    let service = machine.start();
    let requests = while_writing(&machine, 32 << 10, || {
        wait_for("the first heal ends", || service.status().state == ProtectionState::Protected);
        thread::sleep(Duration::from_millis(300));
    });
    assert!(requests > 100, "{requests} requests are no load");
    let status = settle(&service);
    machine.assert_replicated(&server);
    assert_eq!(server.store().needs, [HealNeed::Whole]);
    assert!(server.store().stream_bytes > 0, "what came after the first heal was streamed");
    assert_eq!(status.machine_name, "m");
    assert!(status.writes.changes > 0 && status.link.connected && status.link.sessions == 1, "{status:?}");
    // Maps are cleared only when the mark is durable.
    wait_for("the maps were cleared", || {
        agent::engine::ClearedMark::load(&StateDir::open(&machine.config.state_dir).expect("opens").cleared_mark())
            .is_some()
    });
    service.stop().expect("stops in order");
    assert_eq!(server.store().farewells, 1);
    assert!(!machine.config.control_socket().exists() && !machine.config.nbd_socket().exists());
}

#[test]
fn an_overflow_is_healed() {
    let server = Server::start(false);
    let mut machine = Machine::new(&server, "m", &[4 << 20]);
    machine.config.ring_bytes_max = 256 << 10;
    let service = machine.start();
    settle(&service);
    let before = server.store().heals;
    let client = machine.client("disk0");
    server.store().stalled = true;
    // Far more than the ring holds.
    let mut data = vec![0; 64 << 10];
    for at in 0..32 {
        SystemEntropy.fill(&mut data);
        client.write_at(at * (128 << 10), &data).expect("the disk takes writes whatever the server does");
    }
    assert!(service.status().writes.tracked > 0, "the ring cannot hold this");
    server.store().stalled = false;
    settle(&service);
    machine.assert_replicated(&server);
    let store = server.store();
    assert!(store.heals > before && store.whole_heals == 1, "a heal by maps follows the initial one");
    assert!(store.gaps.iter().any(|cause| cause.contains("send buffer was full")), "{:?}", store.gaps);
    drop(store);
    service.stop().expect("stops in order");
}

#[test]
fn a_heal_keeps_to_its_limits() {
    let server = Server::start(false);
    let mut machine = Machine::new(&server, "m", &[16 << 20]);
    machine.config.limits = HealLimits { heal_read_mb_per_s_max: Some(8), heal_busy_percent_max: Some(90) };
    let began = Instant::now();
    let service = machine.start();
    settle(&service);
    // 8 MiB at 8 MB/s, less what may be read at once.
    assert!(began.elapsed() > Duration::from_millis(800), "{:?}", began.elapsed());
    machine.assert_replicated(&server);
    service.stop().expect("stops in order");
}

#[test]
fn a_restarted_server_continues_the_stream_or_has_it_healed() {
    let mut server = Server::start(false);
    let machine = Machine::new(&server, "m", &[4 << 20, 512 << 10]);
    let service = machine.start();
    settle(&service);
    while_writing(&machine, 8 << 10, || {
        server.crash();
        wait_for("the loss is noticed", || service.status().state == ProtectionState::Disconnected);
        server.open();
        wait_for("it is back", || service.status().link.connected);
    });
    settle(&service);
    machine.assert_replicated(&server);
    assert_eq!(server.store().needs[1..], [HealNeed::Nothing], "what the ring kept needs no heal");

    server.crash();
    server.store().lose_journal();
    machine.client("disk0").write_at(4096, &[7; 8192]).expect("written meanwhile");
    server.open();
    wait_for("it is back", || service.status().link.connected);
    settle(&service);
    machine.assert_replicated(&server);
    assert_eq!(server.store().needs[2..], [HealNeed::Maps]);
    assert_eq!(service.status().link.sessions, 3);
    service.stop().expect("stops in order");
}

#[test]
fn a_killed_agent_is_healed_from_its_maps_and_a_stopped_one_compares_nothing() {
    let server = Server::start(false);
    let machine = Machine::new(&server, "m", &[64 << 20]);
    let service = machine.start();
    settle(&service);
    server.store().stalled = true;
    machine.client("disk0").write_at(1 << 20, &[3; 20 << 10]).expect("written");
    service.abort();
    server.store().stalled = false;
    let offered = server.store().offered_leaves;

    let service = machine.start();
    settle(&service);
    machine.assert_replicated(&server);
    let compared = (server.store().offered_leaves - offered) * 4096;
    assert!((1..=2 << 20).contains(&compared), "the maps name little; {compared} bytes were compared");
    assert_eq!(server.store().needs[1..], [HealNeed::Maps]);
    service.stop().expect("stops in order");

    let offered = server.store().offered_leaves;
    let service = machine.start();
    settle(&service);
    let compared = (server.store().offered_leaves - offered) * 4096;
    assert!(compared <= 1 << 20, "{compared} bytes were compared after an orderly stop");
    service.stop().expect("stops in order");

    // A disk that changed behind the agent's back is compared as a whole.
    let mut image = std::fs::read(machine.image(0)).expect("readable");
    image[40 << 20..(40 << 20) + 5000].fill(9);
    std::fs::write(machine.image(0), &image).expect("written");
    let service = machine.start();
    settle(&service);
    machine.assert_replicated(&server);
    service.stop().expect("stops in order");
}

#[test]
fn the_control_socket_marks_freezes_and_stops() {
    let server = Server::start(false);
    let machine = Machine::new(&server, "m", &[1 << 20]);
    let service = machine.start();
    settle(&service);
    let answer = machine.ask(&Request::Mark { name: "before the upgrade".to_owned(), wait_ms: 5000 });
    assert_eq!(answer, Answer::Marked { name: "before the upgrade".to_owned(), durable: true, connected: true });
    assert_eq!(server.store().markers, ["before the upgrade"]);

    let frozen = machine.ask(&Request::Freeze { limit_ms: 10_000, mark: Some("quiet".to_owned()) });
    assert_eq!(frozen, Answer::Frozen { limit_ms: 10_000, marked: true });
    let client = machine.client("disk0");
    let written = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let written = written.clone();
        move || {
            client.write_at(0, &[1; 512]).expect("written after the thaw");
            written.store(true, Ordering::SeqCst);
        }
    });
    wait_for("the marker is there", || server.store().markers.len() == 2);
    assert!(!written.load(Ordering::SeqCst), "a write passed a freeze");
    assert_eq!(machine.ask(&Request::Thaw), Answer::Thawed { held: true });
    writer.join().expect("the write went through");
    // Whoever froze may be gone; after its limit another freeze is possible although no write came.
    for _ in 0..2 {
        wait_for("a freeze is possible", || {
            let freeze = Request::Freeze { limit_ms: 300, mark: None };
            ask(&machine.config.control_socket(), &freeze).is_ok()
        });
    }
    machine.ask(&Request::Thaw);
    let again = ask(&machine.config.control_socket(), &Request::Thaw).expect_err("nothing is frozen");
    assert_eq!(again.kind, ProblemKind::AlreadySo);

    let Answer::Status(status) = machine.ask(&Request::Status) else { panic!("a status") };
    assert_eq!((status.disks[0].name.as_str(), status.disks[0].size_bytes), ("disk0", 1 << 20));
    let long = ask(&machine.config.control_socket(), &Request::Mark { name: "x".repeat(2000), wait_ms: 0 });
    assert_eq!(long.expect_err("too long").kind, ProblemKind::WrongUsage);

    let second =
        Service::start(&machine.config, ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) });
    assert!(second.err().expect("refused")[0].why.contains("another agent runs"));
    assert_eq!(machine.ask(&Request::Stop), Answer::Stopping);
    assert_eq!(service.wait(), "the control socket");
    service.stop().expect("stops in order");
    machine.assert_replicated(&server);
    let gone = ask(&machine.config.control_socket(), &Request::Status).expect_err("it has ended");
    assert!(gone.what.contains("not running"), "{gone:?}");
}

#[test]
fn a_mark_without_a_server_is_noted_and_becomes_a_point_later() {
    let mut server = Server::start(false);
    let machine = Machine::new(&server, "m", &[1 << 20]);
    let service = machine.start();
    settle(&service);
    server.crash();
    wait_for("the loss is noticed", || service.status().state == ProtectionState::Disconnected);
    let noted = |name: &str| Answer::Marked { name: name.to_owned(), durable: false, connected: false };
    assert_eq!(machine.ask(&Request::Mark { name: "alone".to_owned(), wait_ms: 0 }), noted("alone"));
    let waited = Request::Mark { name: "waited for".to_owned(), wait_ms: 50 };
    let late = ask(&machine.config.control_socket(), &waited).expect_err("nobody took it");
    assert!(late.what.contains("not durable yet") && late.advice.contains("stays in the stream"), "{late}");
    assert!(server.store().markers.is_empty());
    server.open();
    wait_for("it has both", || server.store().markers == ["alone", "waited for"]);
    settle(&service);
    assert!(server.store().gaps.is_empty(), "{:?}", server.store().gaps);
    service.stop().expect("stops in order");
}

#[test]
fn a_refusal_is_shown_and_the_disks_are_served_all_the_same() {
    let server = Server::start(false);
    server.store().refuse = Some("this machine was moved".to_owned());
    let machine = Machine::new(&server, "m", &[1 << 20]);
    let service = machine.start();
    wait_for("the refusal is shown", || service.status().state == ProtectionState::Refused);
    assert_eq!(service.status().reason, "this machine was moved");
    machine.client("disk0").write_at(0, &[5; 4096]).expect("written");
    let mark = ask(&machine.config.control_socket(), &Request::Mark { name: "x".to_owned(), wait_ms: 0 });
    assert!(mark.expect_err("no stream to mark").what.contains("not marked"));
    server.store().refuse = None;
    settle(&service);
    machine.assert_replicated(&server);
    service.stop().expect("stops in order");
}

#[test]
fn a_start_that_cannot_be_is_refused_with_advice() {
    let server = Server::start(false);
    let machine = Machine::new(&server, "m", &[1 << 20]);
    let start = |config: &AgentConfig| {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        Service::start(config, options).err().expect("refused")
    };
    let mut elsewhere = machine.config.clone();
    elsewhere.state_dir = server.folder("nobody");
    assert!(start(&elsewhere)[0].what.contains("has not joined"));
    let mut missing = machine.config.clone();
    missing.disks[0].path = Path::new("/nowhere/at/all").to_owned();
    assert!(start(&missing)[0].why.contains("there is no disk at"));
    let mut taken = machine.config.clone();
    taken.nbd_socket = Some(machine.image(0));
    assert!(start(&taken)[0].why.contains("not a socket"));
    // None of this left anything behind that stands in the way.
    machine.start().stop().expect("stops in order");
}
