//! The whole agent capturing by eBPF on the running kernel: a loop device with a mounted ext4 under load, real TLS, a
//! receiver that keeps everything in memory. Needs root and BTF; says SKIPPED otherwise.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/loops.rs"]
mod loops;
#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use agent::capture::ebpf;
use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::scrub::{ScrubProgress, ScrubSettings};
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::ProblemKind;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use agent::status::{AgentStatus, ProtectionState};
use loops::{Loop, skip, succeeds};
use process::Agent;
use replication::wire::HealNeed;
use replication::{ByteRange, Change, ChangeKind, DiskId, Ranges};
use site::Server;
use waits::{settle, status_of, wait_for, wait_protected};
use world::{Access, BlockDevice, Entropy, FileDevice, SystemClock, SystemEntropy};

const DISK_BYTES: u64 = 96 << 20;
/// A protected machine with one disk: ext4 on a loop device.
struct Machine {
    config: AgentConfig,
    folder: PathBuf,
    disk: Loop,
}

impl Machine {
    fn new(server: &Server, test: &str, ring_bytes_max: u64) -> Option<Machine> {
        if let Err(why) = ebpf::support::check_machine() {
            skip(test, &why);
            return None;
        }
        let folder = server.folder(test);
        std::fs::create_dir_all(&folder).expect("created");
        let (image, mount) = (folder.join("disk.img"), folder.join("mnt"));
        let disk = Loop::make_with(test, &image, DISK_BYTES, "ext4", &mount, "discard")?;
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        config.ring_bytes_max = ring_bytes_max;
        config.ebpf_pins = Some(PathBuf::from(format!("/sys/fs/bpf/farshore-{test}-{}", std::process::id())));
        config.disks.push(DiskConfig { capture: CaptureChoice::Ebpf, ..DiskConfig::new("disk", &disk.device) });
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), test, &[]).expect("joins");
        Some(Machine { config, folder, disk })
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
        let mut content = vec![0; DISK_BYTES as usize];
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

fn number() -> u64 {
    u64::from_le_bytes((&SystemEntropy as &dyn Entropy).bytes())
}

/// File-system load: files written, overwritten, truncated, removed, synced, through the page cache and past it.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(folder: &Path) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2)
            .map(|worker| {
                let (stop, folder) = (stop.clone(), folder.to_owned());
                thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        storm(&folder, worker);
                        thread::sleep(Duration::from_millis(2));
                    }
                })
            })
            .collect();
        Load { stop, threads }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("the load does not panic"));
    }
}

fn storm(folder: &Path, worker: u64) {
    let path = folder.join(format!("file-{worker}-{}", number() % 12));
    match number() % 10 {
        0 => drop(std::fs::remove_file(&path)),
        1 => {
            if let Ok(file) = OpenOptions::new().write(true).open(&path) {
                let _ = file.set_len(number() % 500_000);
            }
        }
        kind => {
            let direct = kind == 2;
            let flags = if direct { rustix::fs::OFlags::DIRECT.bits().cast_signed() } else { 0 };
            let Ok(file) = OpenOptions::new().create(true).truncate(false).write(true).custom_flags(flags).open(&path)
            else {
                return;
            };
            let len = if direct { 8192 } else { 1 + (number() % 200_000) as usize };
            let mut data = vec![0; len + 4096];
            SystemEntropy.fill(&mut data);
            let shift = data.as_ptr().align_offset(4096);
            let at = if direct { number() % 64 * 4096 } else { number() % 300_000 };
            // A full file system is no matter here.
            let _ = file.write_all_at(&data[shift..shift + len], at);
            if kind < 5 {
                let _ = rustix::fs::fsync(&file);
            }
        }
    }
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

/// Writes in an order that a crash must keep: A, synced; then B, synced; then a line to a log, synced.
struct Ledger {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Ledger {
    fn start(folder: &Path) -> Ledger {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let flags = (rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC).bits().cast_signed();
        let open = |name: &str, flags: i32| {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true).custom_flags(flags);
            options.open(folder.join(name)).expect("created")
        };
        let (a, b, log) = (open("A", flags), open("B", 0), open("log", 0));
        let mut memory = vec![0u8; 8192];
        let shift = memory.as_ptr().align_offset(4096);
        let block = shift..shift + 4096;
        a.write_all_at(&memory[block.clone()], 0).expect("written");
        b.write_all_at(&[0; 8], 0).expect("written");
        rustix::fs::fsync(&b).expect("synced");
        rustix::fs::fsync(&a).expect("synced");
        rustix::fs::fsync(&log).expect("synced");
        let thread = thread::spawn({
            let (stop, synced) = (stop.clone(), synced.clone());
            move || {
                for round in 1u64.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    memory[shift..shift + 8].copy_from_slice(&round.to_le_bytes());
                    memory[shift + 4088..shift + 4096].copy_from_slice(&round.to_le_bytes());
                    a.write_all_at(&memory[block.clone()], 0).expect("written");
                    b.write_all_at(&round.to_le_bytes(), 0).expect("written");
                    rustix::fs::fsync(&b).expect("synced");
                    log.write_all_at(&round.to_le_bytes(), (round - 1) * 8).expect("written");
                    rustix::fs::fsync(&log).expect("synced");
                    synced.store(round, Ordering::SeqCst);
                    // Slow enough that the points differ in what was synced and not only in what was in flight.
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Ledger { stop, synced, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the ledger does not panic");
    }

    /// What is wrong with the ledger in `folder`, in which at least `promised` rounds must be.
    fn judge(folder: &Path, promised: u64) -> Result<u64, String> {
        let read = |name: &str| std::fs::read(folder.join(name)).map_err(|error| format!("{name}: {error}"));
        let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let (a, b, log) = (read("A")?, word(&read("B")?), read("log")?);
        let (first, last) = (word(&a), word(&a[4088.min(a.len())..]));
        if first != last {
            return Err(format!("A is torn: {first} and {last}"));
        }
        if first != b && first != b + 1 {
            return Err(format!("A is {first} and B is {b}"));
        }
        let lines: Vec<u64> = log.chunks_exact(8).map(word).collect();
        // The last write may be there before its size is, or the other way round it may be cut off; never a hole.
        let whole = lines.iter().enumerate().take_while(|(index, line)| **line == *index as u64 + 1).count() as u64;
        if whole + 1 < b || whole > b {
            return Err(format!("the log has {whole} lines and B is {b}"));
        }
        if whole < promised {
            return Err(format!("{promised} rounds were synced before the point, the log has {whole}"));
        }
        Ok(whole)
    }
}

#[test]
fn every_point_keeps_the_order_of_syncs() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "every_point_keeps_the_order_of_syncs", 64 << 20) else { return };
    let ledger = Ledger::start(&machine.disk.mount);
    let load = Load::start(&machine.disk.mount);
    let service = machine.start();
    wait_protected(|| Some(service.status()));
    let base = {
        let mut store = server.store();
        store.log = Some(Vec::new());
        store.replicas[&DiskId(0)].bytes.clone()
    };
    let gaps = server.store().gaps.len();
    for _ in 0..12 {
        thread::sleep(Duration::from_millis(120));
        let name = format!("{}", ledger.synced.load(Ordering::SeqCst));
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
    assert_eq!(marks.len(), 12, "every marker arrived");
    let random = (0..12).map(|_| (number() % log.len() as u64) as usize);
    // A cut never divides a bio.
    let whole = random.map(|at| (at..log.len()).find(|at| !log[*at].continues).expect("the last is whole"));
    let mut points: Vec<usize> = marks.into_iter().chain(whole).collect();
    points.sort_unstable();
    let mut found = Vec::new();
    for &at in &points {
        let outcome = open_point(&machine.folder, &base, &log[..=at]);
        found.push(outcome.unwrap_or_else(|problem| panic!("after change {at} of {}: {problem}", log.len())));
    }
    assert!(found.is_sorted(), "later points have more: {found:?}");
    assert!(found[found.len() - 1] > found[0] + 20, "the points differ: {found:?}");

    // The check itself can fail: the same points without one change in a hundred. Later writes mend much of that, so
    // not every point shows it.
    let noticed = points.iter().any(|at| {
        let holes = log[..=*at].iter().enumerate().filter(|(at, _)| at % 100 != 50).map(|(_, change)| change.clone());
        open_point(&machine.folder, &base, &holes.collect::<Vec<Change>>()).is_err()
    });
    assert!(noticed, "losing one write in a hundred is noticed");
}

/// Mounts the disk as it was after `changes`, judges the ledger in it, and has the file system checked.
fn open_point(folder: &Path, base: &[u8], changes: &[Change]) -> Result<u64, String> {
    let image = folder.join("point.img");
    let mut content = base.to_vec();
    let mut promised = 0;
    for change in changes {
        match &change.kind {
            ChangeKind::Write { range, data } => content[range.within(0)].copy_from_slice(data),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => content[range.within(0)].fill(0),
            ChangeKind::Marker { name, .. } => promised = name.parse().expect("a number"),
            _ => {}
        }
    }
    std::fs::write(&image, content).map_err(|error| error.to_string())?;
    let mut point = Loop::attach(&image, "ext4", &folder.join("point")).ok_or("no loop device")?;
    if !point.mount("ro") {
        // A journal that has to be replayed wants a writable device, which it is; anything else is damage.
        return Err("it cannot be mounted".to_owned());
    }
    let judged = Ledger::judge(&point.mount, promised);
    point.unmount();
    let judged = judged?;
    if !succeeds("e2fsck", &["-fn", &point.device.display().to_string()]) {
        return Err("the file system is damaged".to_owned());
    }
    Ok(judged)
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
