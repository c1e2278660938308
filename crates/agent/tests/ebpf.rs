//! The whole agent capturing by eBPF on the running kernel: a loop device with a mounted ext4 under load, real TLS, a
//! receiver that keeps everything in memory. Needs root and BTF; says SKIPPED otherwise.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/ledger.rs"]
mod ledger;
#[path = "site/loops.rs"]
mod loops;
#[path = "site/points.rs"]
mod points;
#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use agent::capture::ebpf;
use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::scrub::{ScrubProgress, ScrubSettings};
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::ProblemKind;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use agent::status::{AgentStatus, ProtectionState};
use ledger::{Ledger, Load, number};
use loops::{Loop, skip, succeeds};
use points::Image;
use process::Agent;
use replication::wire::HealNeed;
use replication::{ByteRange, ChangeKind, DiskId, Ranges};
use site::Server;
use waits::{settle, status_of, wait_for, wait_protected};
use world::{Access, BlockDevice, Entropy, FileDevice, SystemClock, SystemEntropy};

const DISK_BYTES: u64 = 96 << 20;
/// Points opened of ext4, and of each other file system, whose disks are larger: half of them marked, half anywhere.
const POINTS: usize = 24;
const POINTS_OF_OTHERS: usize = 14;

/// A protected machine with one disk: a file system on a loop device.
struct Machine {
    config: AgentConfig,
    folder: PathBuf,
    disk: Loop,
    bytes: u64,
}

impl Machine {
    fn new(server: &Server, test: &str, ring_bytes_max: u64) -> Option<Machine> {
        Machine::with(server, test, ring_bytes_max, "ext4", DISK_BYTES)
    }

    fn with(server: &Server, test: &str, ring_bytes_max: u64, fs_type: &'static str, bytes: u64) -> Option<Machine> {
        if let Err(why) = ebpf::support::check_machine() {
            skip(test, &why);
            return None;
        }
        let pins = test.replace('/', "-");
        let folder = server.folder(&pins);
        std::fs::create_dir_all(&folder).expect("created");
        let (image, mount) = (folder.join("disk.img"), folder.join("mnt"));
        let disk = Loop::make_with(test, &image, bytes, fs_type, &mount, "discard")?;
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        config.ring_bytes_max = ring_bytes_max;
        config.ebpf_pins = Some(PathBuf::from(format!("/sys/fs/bpf/farshore-{pins}-{}", std::process::id())));
        config.disks.push(DiskConfig { capture: CaptureChoice::Ebpf, ..DiskConfig::new("disk", &disk.device) });
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), test, &[]).expect("joins");
        Some(Machine { config, folder, disk, bytes })
    }

    fn start(&self) -> Service {
        let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
        Service::start(&self.config, options).unwrap_or_else(|problems| panic!("{problems:?}"))
    }

    /// The agent as a process of its own, which can be killed.
    fn spawn(&self) -> Agent {
        Agent::spawn(&self.config, &self.folder, &[])
    }

    fn status(&self) -> Option<AgentStatus> {
        status_of(&self.config)
    }

    fn assert_replicated(&self, server: &Server) {
        let device = FileDevice::open_direct(&self.disk.device).expect("opens");
        let mut content = vec![0; self.bytes as usize];
        device.read_at(0, &mut content).expect("readable");
        let store = server.store();
        let replica = &store.replicas[&DiskId(0)].bytes;
        let differs = content.chunks(512).zip(replica.chunks(512)).filter(|(a, b)| a != b).count();
        assert!(content.len() == replica.len() && differs == 0, "{differs} sectors differ");
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

#[test]
fn replication_under_load() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "replication_under_load", 64 << 20) else { return };
    let load = Load::start(&machine.disk.mount);
    thread::sleep(Duration::from_millis(300));
    let service = machine.start();
    wait_protected(|| Some(service.status()));
    let gaps = server.store().gaps.len();
    thread::sleep(Duration::from_secs(2));
    load.end();
    machine.disk.unmount();
    settle(|| Some(service.status()));
    machine.assert_replicated(&server);
    let store = server.store();
    assert_eq!(store.gaps.len(), gaps, "no gap after the first heal: {:?}", store.gaps);
    assert!(store.stream_bytes > 1 << 20, "the load went through the stream: {}", store.stream_bytes);
    drop(store);
    assert!(service.status().writes.changes > 100);
    service.stop().expect("stops");
}

#[test]
fn overflow_heals() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "overflow_heals", ebpf::RING_BYTES_MIN) else { return };
    let service = machine.start();
    wait_protected(|| Some(service.status()));
    let gaps = server.store().gaps.len();
    let healed = server.store().heal_bytes;
    server.store().stalled = true;
    // Far more than the ring, the link and the window hold.
    let file = File::create(machine.disk.mount.join("large")).expect("created");
    let mut data = vec![0; 1 << 20];
    for at in 0..60 {
        SystemEntropy.fill(&mut data);
        file.write_all_at(&data, at << 20).expect("written");
        rustix::fs::fsync(&file).expect("synced");
    }
    drop(file);
    server.store().stalled = false;
    machine.disk.unmount();
    wait_for("the gap is known", || server.store().gaps.len() > gaps);
    settle(|| Some(service.status()));
    machine.assert_replicated(&server);
    let store = server.store();
    assert!(store.gaps.last().expect("a gap").contains("send buffer was full"), "{:?}", store.gaps);
    let healed = store.heal_bytes - healed;
    assert!(healed > 0 && healed < 70 << 20, "{healed} bytes were healed: what was written, not the disk");
    assert_eq!(store.whole_heals, 1, "only the first heal compares the whole disk");
    drop(store);
    service.stop().expect("stops");
}

#[test]
fn a_killed_agent_costs_no_gap() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "a_killed_agent_costs_no_gap", 64 << 20) else { return };
    let mut agent = machine.spawn();
    wait_protected(|| machine.status());
    let load = Load::start(&machine.disk.mount);
    let gaps = server.store().gaps.len();
    let heals = server.store().heals;
    for round in 0..4 {
        thread::sleep(Duration::from_millis(300 + 150 * round));
        agent.kill();
        // Without an agent, writes collect in the kernel.
        thread::sleep(Duration::from_millis(100));
        agent = machine.spawn();
        let since = Instant::now();
        wait_protected(|| machine.status());
        println!("protected again after {:?}", since.elapsed());
    }
    load.end();
    machine.disk.unmount();
    settle(|| machine.status());
    machine.assert_replicated(&server);
    let store = server.store();
    assert_eq!(store.gaps.len(), gaps, "no gap: {:?}", store.gaps);
    assert_eq!(store.heals, heals, "no heal");
    assert_eq!(store.needs.len(), 5);
    assert!(store.needs[1..].iter().all(|need| *need == HealNeed::Nothing), "{:?}", store.needs);
}

/// Points of a machine whose file system is `fs_type`: each is mounted, its ledger judged, its file system checked.
fn every_point_keeps_the_order(test: &str, fs_type: &'static str, bytes: u64, count: usize) {
    let server = Server::start(false);
    let Some(mut machine) = Machine::with(&server, test, 64 << 20, fs_type, bytes) else { return };
    let ledger = Ledger::start(&machine.disk.mount);
    let service = machine.start();
    wait_protected(|| Some(service.status()));
    let load = Load::start(&machine.disk.mount);
    let folder = machine.folder.clone();
    let base = {
        let mut store = server.store();
        store.log = Some(Vec::new());
        Image::make(&folder.join("base.img"), &store.replicas[&DiskId(0)].bytes)
    };
    let gaps = server.store().gaps.len();
    for _ in 0..count / 2 {
        // However slow the machine is: points are to differ.
        let rounds = ledger.synced();
        thread::sleep(Duration::from_millis(120));
        wait_for("the ledger goes on", || ledger.synced() > rounds + 2);
        let name = format!("{}", ledger.synced());
        let marked = ask(&machine.config.control_socket(), &Request::Mark { name, wait_ms: 0 });
        assert!(matches!(marked, Ok(Answer::Marked { .. })), "{marked:?}");
    }
    ledger.end();
    load.end();
    machine.disk.unmount();
    settle(|| Some(service.status()));
    assert_eq!(server.store().gaps.len(), gaps);
    service.stop().expect("stops");

    let log = server.store().log.take().expect("it was put there");
    let marks: Vec<usize> = (0..log.len()).filter(|at| matches!(log[*at].kind, ChangeKind::Marker { .. })).collect();
    assert_eq!(marks.len(), count / 2, "every marker arrived");
    let random = (0..count / 2).map(|_| (number() % log.len() as u64) as usize);
    // A cut never divides a bio.
    let whole = random.map(|at| (at..log.len()).find(|at| !log[*at].continues).expect("the last is whole"));
    let mut points: Vec<usize> = marks.into_iter().chain(whole).collect();
    points.sort_unstable();
    let mut found = Vec::new();
    let mut image = base.copy(&folder.join("good.img"));
    for &at in &points {
        image.advance(&log, at, |_| true);
        let outcome = image.open(fs_type, &folder);
        found
            .push(outcome.unwrap_or_else(|problem| panic!("{fs_type}, after change {at} of {}: {problem}", log.len())));
    }
    println!(
        "{} points of {fs_type} opened, with {} to {} synced rounds",
        found.len(),
        found[0],
        found[found.len() - 1]
    );
    assert!(found.is_sorted(), "later points have more: {found:?}");
    assert!(found[found.len() - 1] > found[0] + 20, "the points differ: {found:?}");

    if fs_type != "ext4" {
        return;
    }
    // The check itself can fail: the same points without one change in a hundred. Later writes mend much of that, so
    // not every point shows it.
    let noticed = [50, 10, 90].into_iter().any(|lost| {
        let mut spoiled = base.copy(&folder.join("spoiled.img"));
        points.iter().any(|at| {
            spoiled.advance(&log, *at, |index| index % 100 != lost);
            spoiled.open(fs_type, &folder).is_err()
        })
    });
    assert!(noticed, "losing one write in a hundred is noticed");
}

#[test]
fn every_point_keeps_the_order_of_syncs_on_ext4() {
    every_point_keeps_the_order("every_point_keeps_the_order_of_syncs/ext4", "ext4", DISK_BYTES, POINTS);
}

#[test]
fn every_point_keeps_the_order_of_syncs_on_xfs() {
    every_point_keeps_the_order("every_point_keeps_the_order_of_syncs/xfs", "xfs", 320 << 20, POINTS_OF_OTHERS);
}

#[test]
fn every_point_keeps_the_order_of_syncs_on_btrfs() {
    every_point_keeps_the_order("every_point_keeps_the_order_of_syncs/btrfs", "btrfs", 256 << 20, POINTS_OF_OTHERS);
}

#[test]
fn detach_takes_the_programs_down_when_no_agent_runs() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "detach", 16 << 20) else { return };
    let options = || ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
    let service = machine.start();
    settle(|| Some(service.status()));
    let refused = agent::service::detach(&machine.config).expect_err("an agent runs");
    assert!(refused.why.contains("another agent runs") && refused.advice.contains("stop"), "{refused}");
    // Another machine's agent with the same place would take this capture for its own, and down.
    let twin = AgentConfig { state_dir: machine.folder.join("twin"), ..machine.config.clone() };
    let state = StateDir::open(&twin.state_dir).expect("opens");
    state.join(&server.runtime, Arc::new(SystemClock), &server.token(), "twin", &[]).expect("joins");
    let refused = Service::start(&twin, options()).err().expect("the place is taken");
    assert!(refused[0].why.contains("another agent uses the capture"), "{refused:?}");
    let refused = agent::service::detach(&twin).expect_err("an agent uses it");
    assert!(refused.why.contains("an agent uses the capture"), "{refused}");
    assert_eq!(service.status().state, ProtectionState::Protected);

    service.stop().expect("stops in order");
    assert!(machine.config.ebpf_pins().exists(), "the programs stay");
    agent::service::detach(&machine.config).expect("taken down");
    assert!(!machine.config.ebpf_pins().exists());
    let again = agent::service::detach(&machine.config).expect_err("nothing is there");
    assert_eq!(again.kind, ProblemKind::AlreadySo);

    // What nobody saw is found by comparing.
    std::fs::write(machine.disk.mount.join("unseen"), vec![7; 200_000]).expect("written");
    machine.disk.unmount();
    let service = machine.start();
    settle(|| Some(service.status()));
    machine.assert_replicated(&server);
    assert_eq!(server.store().whole_heals, 2);
    service.stop().expect("stops in order");
}

/// Processor time of a process so far.
fn processor_time(pid: u32) -> Duration {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    let of_one = |folder: PathBuf| {
        let text = std::fs::read_to_string(folder.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(threads.flatten().map(|thread| of_one(thread.path())).sum())
}

#[test]
fn an_idle_agent_costs_little_and_wakes_at_once() {
    const WATCHED: Duration = Duration::from_secs(6);
    let server = Server::start(false);
    let test = "an_idle_agent_costs_little_and_wakes_at_once";
    let Some(mut machine) = Machine::new(&server, test, 64 << 20) else { return };
    // The longest sleep.
    machine.config.proof_every_ms = 2000;
    machine.config.rotate_every_ms = 10_000;
    let agent = machine.spawn();
    settle(|| machine.status());
    // What the file system of a machine at rest writes by itself is over soon.
    thread::sleep(Duration::from_secs(2));
    // Others share the processors: what they cost it once in a while is not its own.
    let watch = || {
        let before = processor_time(agent.0.id());
        thread::sleep(WATCHED);
        let spent = processor_time(agent.0.id()) - before;
        println!("{:.3} % of a core", spent.as_secs_f64() / WATCHED.as_secs_f64() * 100.0);
        spent
    };
    assert!((0..3).any(|_| watch() < WATCHED / 200), "an idle agent takes more in {WATCHED:?}, three times");
    // A write after a rest arrives long before a sleep would have ended by itself.
    let file = File::create(machine.disk.mount.join("rare")).expect("created");
    let wake = |round: u64| {
        thread::sleep(Duration::from_millis(700));
        let before = server.store().stream_bytes;
        let since = Instant::now();
        file.write_all_at(&[round as u8; 4096], round << 12).expect("written");
        rustix::fs::fsync(&file).expect("synced");
        wait_for("the write arrives", || server.store().stream_bytes > before);
        since.elapsed()
    };
    let at_once = (0..3u64).any(|attempt| {
        let mut took: Vec<Duration> = (0..9).map(|round| wake(attempt * 9 + round)).collect();
        took.sort_unstable();
        println!("a write after a rest arrives after {took:?}");
        took[4] < Duration::from_millis(80)
    });
    assert!(at_once, "half of the writes arrive later, three times");
    drop(file);
    machine.disk.unmount();
    settle(|| machine.status());
    machine.assert_replicated(&server);
}

/// Begins a scrub, waits until it has ended and what it found is healed; what scrubs have found so far.
fn scrub(machine: &Machine, service: &Service, disk: Option<&str>) -> ScrubProgress {
    let answer = ask(&machine.config.control_socket(), &Request::Scrub { disk: disk.map(str::to_owned) });
    assert!(matches!(answer, Ok(Answer::Scrubbing { bytes: DISK_BYTES })), "{answer:?}");
    let progress = || service.status().scrub.expect("eBPF can be scrubbed");
    // The status is taken ten times a second.
    thread::sleep(Duration::from_millis(250));
    wait_for("the scrub has ended", || !progress().running && service.status().state == ProtectionState::Protected);
    progress()
}

#[test]
fn a_scrub_finds_what_nobody_captured_and_nothing_beside_a_workload() {
    let server = Server::start(false);
    server.store().commits = true;
    let Some(mut machine) = Machine::new(&server, "scrub", 64 << 20) else { return };
    machine.config.scrub = ScrubSettings { every_days: 0, read_mib_per_s: 1000 };
    let service = machine.start();
    wait_protected(|| Some(service.status()));
    let load = Load::start(&machine.disk.mount);
    for _ in 0..2 {
        scrub(&machine, &service, None);
    }
    let beside = scrub(&machine, &service, None);
    load.end();
    assert!(beside.same_bytes > DISK_BYTES && beside.differing_bytes == 0, "{beside:?}");
    assert!(server.store().range_gaps.is_empty(), "{:?}", server.store().range_gaps);

    let mut known = vec![0; 256 << 10];
    SystemEntropy.fill(&mut known);
    std::fs::write(machine.disk.mount.join("known"), &known).expect("written");
    machine.disk.unmount();
    settle(|| Some(service.status()));
    scrub(&machine, &service, Some("disk"));
    let before = server.store().journaled;
    // Behind the back of everybody above the image.
    let image = machine.folder.join("disk.img");
    let content = std::fs::read(&image).expect("readable");
    // A file system so small has blocks of 1 KiB: the next leaf behind the place is the file's as well.
    let at = content.chunks(1024).position(|block| block == &known[65_536..66_560]).expect("it is on the disk");
    let at = (at as u64 * 1024).next_multiple_of(4096);
    let file = OpenOptions::new().write(true).open(&image).expect("opens");
    file.write_all_at(&[0x5a; 8192], at).expect("written");
    let found = scrub(&machine, &service, Some("disk"));
    assert_eq!(found.differing_bytes, 8192, "{found:?}");
    settle(|| Some(service.status()));
    machine.assert_replicated(&server);
    let expected = Ranges::of([(DiskId(0), ByteRange::new(at, 8192))]);
    {
        let store = server.store();
        assert_eq!(store.range_gaps, std::slice::from_ref(&expected), "it lacked until it was healed");
        let [(after, until, ranges)] = &store.suspicions[..] else { panic!("{:?}", store.suspicions) };
        assert_eq!((ranges, *after <= before && after < until), (&expected, true), "{after} to {until} of {before}");
        assert!(after.0 > 0, "it had been compared before");
    }
    assert_eq!(scrub(&machine, &service, None).differing_bytes, 8192, "it differs no more");

    let unknown = ask(&machine.config.control_socket(), &Request::Scrub { disk: Some("other".into()) });
    assert!(unknown.as_ref().is_err_and(|problem| problem.why.contains("`other`")), "{unknown:?}");
    service.stop().expect("stops");
}

/// Anonymous memory of a process, in bytes: what it has besides programs, mapped files and the kernel's ring.
fn anonymous_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux says so");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn memory_besides_the_ring_is_bounded_while_the_server_takes_nothing() {
    let server = Server::start(false);
    let test = "memory_besides_the_ring";
    let Some(mut machine) = Machine::new(&server, test, 64 << 20) else { return };
    let agent = machine.spawn();
    settle(|| machine.status());
    server.store().stalled = true;
    let mut data = vec![0; 56 << 20];
    SystemEntropy.fill(&mut data);
    std::fs::write(machine.disk.mount.join("large"), &data).expect("written");
    assert!(succeeds("sync", &["-f", &machine.disk.mount.display().to_string()]));
    wait_for("the ring holds it", || machine.status().is_some_and(|now| now.ring.used_bytes > 52 << 20));
    // Long enough for the agent to take out of it what it will.
    thread::sleep(Duration::from_millis(500));
    let memory = anonymous_bytes(agent.0.id());
    assert!(memory < 40 << 20, "{} MiB besides the ring", memory >> 20);
    server.store().stalled = false;
    machine.disk.unmount();
    settle(|| machine.status());
    machine.assert_replicated(&server);
    assert!(server.store().gaps.is_empty(), "{:?}", server.store().gaps);
}

#[test]
fn an_image_file_is_not_captured_by_ebpf() {
    let server = Server::start(true);
    let folder = server.folder("image");
    std::fs::create_dir_all(&folder).expect("created");
    let image = folder.join("disk.img");
    File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let mut config = AgentConfig::new(folder.join("state"));
    config.disks.push(DiskConfig { capture: CaptureChoice::Ebpf, ..DiskConfig::new("disk", &image) });
    let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
    let problems = Service::start(&config, options).err().expect("refused");
    assert!(problems[0].why.contains("not a block device"), "{problems:?}");
    assert!(FileDevice::open(&image, Access::ReadWrite).is_ok());
}
