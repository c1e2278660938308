//! Disks that come, grow, go and vanish while the agent captures by eBPF: loop devices under load on the running kernel, real
//! TLS, a receiver that keeps everything in memory. Needs root and BTF; says SKIPPED otherwise.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/loops.rs"]
mod loops;
#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::capture::ebpf;
use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::{Problem, ProblemKind};
use agent::state::StateDir;
use agent::status::{AgentStatus, ProtectionState};
use loops::{Loop, skip, succeeds};
use process::Agent;
use replication::DiskId;
use replication::geometry::LEAF_BYTES;
use replication::wire::HealNeed;
use site::Server;
use waits::{settle, status_of, wait_for, wait_protected};
use world::{BlockDevice, Entropy, FileDevice, SystemClock, SystemEntropy};

const MIB: u64 = 1 << 20;
const PIECE_BYTES_MAX: u64 = 64 << 10;

/// A disk: a loop device behind a link, as udev has them below `/dev/disk/by-id`.
struct Disk {
    path: PathBuf,
    image: PathBuf,
    backing: Option<Loop>,
}

impl Disk {
    fn device(&self) -> &Path {
        &self.backing.as_ref().expect("it is plugged in").device
    }

    fn plug_in(&mut self) {
        let made = Loop::attach(&self.image, "ext4", &self.image.with_extension("mnt")).expect("a loop device");
        symlink(&made.device, &self.path).expect("linked");
        self.backing = Some(made);
    }

    fn pull(&mut self) {
        std::fs::remove_file(&self.path).expect("linked");
        self.backing = None;
    }

    fn resize(&self, bytes: u64) {
        OpenOptions::new().write(true).open(&self.image).and_then(|file| file.set_len(bytes)).expect("resized");
        assert!(succeeds("losetup", &["-c", &self.device().display().to_string()]));
    }
}

struct Machine {
    config: AgentConfig,
    folder: PathBuf,
    disks: Vec<Disk>,
}

impl Machine {
    /// A machine with disks of these sizes, of which the first is configured.
    fn new(server: &Server, test: &str, sizes: &[u64]) -> Option<Machine> {
        if let Err(why) = ebpf::support::check_machine() {
            skip(test, &why);
            return None;
        }
        let folder = server.folder(test);
        std::fs::create_dir_all(&folder).expect("created");
        let mut disks = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let image = folder.join(format!("disk{index}.img"));
            File::create(&image).and_then(|file| file.set_len(*size)).expect("an image");
            let Some(made) = Loop::attach(&image, "ext4", &folder.join("mnt")) else {
                skip(test, "no loop device can be made");
                return None;
            };
            drop(made);
            let mut disk = Disk { path: folder.join(format!("by-id-{index}")), image, backing: None };
            disk.plug_in();
            disks.push(disk);
        }
        let mut config = AgentConfig::new(folder.join("state"));
        config.rotate_every_ms = 200;
        config.proof_every_ms = 50;
        config.ring_bytes_max = 64 << 20;
        config.ebpf_pins = Some(PathBuf::from(format!("/sys/fs/bpf/farshore-{test}-{}", std::process::id())));
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), test, &[]).expect("joins");
        let mut machine = Machine { config, folder, disks };
        machine.configure(&[0]);
        Some(machine)
    }

    /// Names these disks in the configuration file.
    fn configure(&mut self, disks: &[usize]) {
        let named = |index: &usize| DiskConfig {
            capture: CaptureChoice::Ebpf,
            ..DiskConfig::new(&format!("disk{index}"), &self.disks[*index].path)
        };
        self.config.disks = disks.iter().map(named).collect();
        self.write_config(&toml::to_string(&self.config).expect("a configuration"));
    }

    fn write_config(&self, text: &str) {
        std::fs::write(self.folder.join("agent.toml"), text).expect("written");
    }

    fn reload(&self) -> Result<Vec<String>, Problem> {
        let request = Request::Reload { config: self.folder.join("agent.toml") };
        match ask(&self.config.control_socket(), &request)? {
            Answer::Reloaded { changes, .. } => Ok(changes),
            other => panic!("{other:?}"),
        }
    }

    fn spawn(&self) -> Agent {
        Agent::spawn(&self.config, &self.folder, &[])
    }

    fn status(&self) -> Option<AgentStatus> {
        status_of(&self.config)
    }

    fn wait_protected(&self) {
        wait_protected(|| self.status());
    }

    fn settle(&self) {
        settle(|| self.status());
    }

    fn assert_replicated(&self, server: &Server, disk: usize) {
        let device = FileDevice::open_direct(self.disks[disk].device()).expect("opens");
        let mut content = vec![0; device.size() as usize];
        device.read_at(0, &mut content).expect("readable");
        let store = server.store();
        let replica = &store.replicas[&DiskId(disk as u16)].bytes;
        assert_eq!(content.len(), replica.len(), "disk {disk}");
        let differs = content.chunks(512).zip(replica.chunks(512)).filter(|(a, b)| a != b).count();
        assert_eq!(differs, 0, "sectors of disk {disk} differ");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        process::take_down(&self.config);
    }
}

/// Gaps of the machine, heals and compared leaves so far.
trait Counts {
    fn counts(&self) -> (usize, u32, u64);
}

impl Counts for Server {
    fn counts(&self) -> (usize, u32, u64) {
        let store = self.store();
        (store.gaps.len(), store.heals, store.offered_leaves)
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

/// Direct writes of random pieces anywhere on a device, several under way at a time.
struct Writer {
    stop: Arc<AtomicBool>,
    size: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Writer {
    fn start(device: &Path, bytes: u64) -> Writer {
        let (stop, size) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(bytes)));
        let work = |_| {
            let (stop, size, file) = (stop.clone(), size.clone(), open_direct(device));
            thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let len = 4096 * (1 + number() % (PIECE_BYTES_MAX / 4096));
                    let at = number() % ((size.load(Ordering::SeqCst) - len) / 4096) * 4096;
                    // One that runs against the end of a device that has just gone.
                    let _ = write_direct(&file, at, len);
                    thread::sleep(Duration::from_millis(3));
                }
            })
        };
        let threads = (0..3).map(work).collect();
        Writer { stop, size, threads }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("the load does not panic"));
    }
}

fn open_direct(device: &Path) -> File {
    let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().write(true).custom_flags(flags).open(device).expect("opens")
}

fn write_direct(file: &File, at: u64, len: u64) -> std::io::Result<()> {
    let mut data = vec![0; (len + 4096) as usize];
    SystemEntropy.fill(&mut data);
    let shift = data.as_ptr().align_offset(4096);
    file.write_all_at(&data[shift..shift + len as usize], at)
}

#[test]
fn a_disk_grows_under_load() {
    let server = Server::start(false);
    let (old, new) = (24 * MIB + 512 * 3, 40 * MIB);
    let Some(mut machine) = Machine::new(&server, "a_disk_grows", &[old, 8 * MIB]) else { return };
    machine.configure(&[0, 1]);
    let _agent = machine.spawn();
    machine.wait_protected();
    let writers = [Writer::start(machine.disks[0].device(), old), Writer::start(machine.disks[1].device(), 8 * MIB)];
    thread::sleep(Duration::from_millis(300));
    let (gaps, heals, offered) = server.counts();

    machine.disks[0].resize(new);
    // Into the new area, before the agent knows of it.
    let file = open_direct(machine.disks[0].device());
    for at in (old.next_multiple_of(4096)..new - PIECE_BYTES_MAX).step_by(3 * PIECE_BYTES_MAX as usize) {
        write_direct(&file, at, PIECE_BYTES_MAX).expect("written");
    }
    wait_for("the agent has noticed by itself", || machine.status().is_some_and(|now| now.disks[0].size_bytes == new));
    writers[0].size.store(new, Ordering::SeqCst);
    wait_for("it is announced", || server.store().replicas[&DiskId(0)].bytes.len() as u64 == new);
    machine.wait_protected();
    thread::sleep(Duration::from_millis(300));
    writers.into_iter().for_each(Writer::end);
    machine.settle();
    (0..2).for_each(|disk| machine.assert_replicated(&server, disk));
    let store = server.store();
    assert_eq!(store.gaps.len(), gaps, "the machine has no gap: {:?}", store.gaps);
    let lacked: Vec<_> = store.range_gaps.iter().flat_map(|ranges| ranges.iter()).collect();
    let floor = old / LEAF_BYTES * LEAF_BYTES;
    assert!(!lacked.is_empty());
    assert!(lacked.iter().all(|(disk, range)| *disk == DiskId(0) && range.start >= floor), "{lacked:?}");
    assert!(store.heals > heals);
    // What was under way when the agent noticed is healed once more.
    let offered = store.offered_leaves - offered;
    let leaves = (new - floor).div_ceil(LEAF_BYTES);
    assert!((leaves..2 * leaves).contains(&offered), "{offered} leaves were compared, the new area has {leaves}");
    assert_eq!(store.whole_heals, 1);
    assert!(store.needs[1..].iter().all(|need| *need == HealNeed::Nothing), "{:?}", store.needs);
}

#[test]
fn disks_are_added_and_removed_under_load_and_survive_a_kill() {
    let server = Server::start(false);
    let sizes = [16 * MIB, 24 * MIB, 8 * MIB];
    let Some(mut machine) = Machine::new(&server, "disks_are_added", &sizes) else { return };
    let mut agent = machine.spawn();
    machine.wait_protected();
    let start = |disk: usize| Writer::start(machine.disks[disk].device(), sizes[disk]);
    let writers = [start(0), start(1), start(2)];
    thread::sleep(Duration::from_millis(300));
    let gaps = server.store().gaps.len();

    machine.configure(&[0, 1]);
    let said = machine.reload().expect("taken");
    assert!(said.len() == 1 && said[0].contains("disk1"), "{said:?}");
    assert!(machine.reload().expect("nothing to do").is_empty());
    wait_for("it is announced", || server.store().announced == [DiskId(0), DiskId(1)]);
    machine.wait_protected();
    let heals = server.store().heals;
    assert_eq!(heals, 2, "one for the added disk");
    // A kill behind that costs nothing.
    thread::sleep(Duration::from_millis(300));
    agent.kill();
    thread::sleep(Duration::from_millis(100));
    agent = machine.spawn();
    machine.wait_protected();
    {
        let store = server.store();
        assert_eq!((store.gaps.len(), store.heals), (gaps, heals), "{:?}", store.gaps);
        assert!(store.needs[1..].iter().all(|need| *need == HealNeed::Nothing), "{:?}", store.needs);
    }

    // Killed while a disk joins, it heals what the maps name, and compares only the new one.
    machine.configure(&[0, 1, 2]);
    machine.reload().expect("taken");
    agent.kill();
    let offered = server.store().offered_leaves;
    agent = machine.spawn();
    machine.wait_protected();
    assert_eq!(server.store().whole_heals, 1, "only the first heal compares everything");
    let offered = server.store().offered_leaves - offered;
    let all: u64 = sizes.iter().sum::<u64>() / LEAF_BYTES;
    assert!(offered < all, "{offered} leaves of {all} were compared");

    // The second one leaves.
    let gaps = server.store().gaps.len();
    machine.configure(&[0, 2]);
    let said = machine.reload().expect("taken");
    assert!(said.len() == 1 && said[0].contains("not protected any more"), "{said:?}");
    wait_for("it is not announced any more", || server.store().announced == [DiskId(0), DiskId(2)]);
    server.store().log = Some(Vec::new());
    thread::sleep(Duration::from_millis(400));
    {
        let mut store = server.store();
        let log = store.log.take().expect("it was put there");
        assert!(log.iter().any(|change| change.disk == DiskId(2)) && log.iter().all(|change| change.disk != DiskId(1)));
        let left = store.range_gaps.last().expect("it lacks").iter().collect::<Vec<_>>();
        assert!(left.len() == 1 && left[0].0 == DiskId(1) && left[0].1.len == sizes[1], "{left:?}");
    }
    machine.wait_protected();
    // A kill behind that costs nothing either.
    let heals = server.store().heals;
    agent.kill();
    let _agent = machine.spawn();
    machine.wait_protected();
    let (gaps_now, heals_now, _) = server.counts();
    assert_eq!((gaps_now, heals_now), (gaps, heals));

    // It comes back, and joins anew.
    machine.configure(&[0, 1, 2]);
    wait_for("it is taken back", || machine.reload().is_ok());
    wait_for("it is announced", || server.store().announced.contains(&DiskId(1)));
    machine.wait_protected();
    writers.into_iter().for_each(Writer::end);
    machine.settle();
    (0..3).for_each(|disk| machine.assert_replicated(&server, disk));
    assert_eq!(server.counts().0, gaps);
}

#[test]
fn a_disk_that_vanishes_or_shrinks_is_named_and_the_others_go_on() {
    let server = Server::start(false);
    let sizes = [16 * MIB, 8 * MIB];
    let Some(mut machine) = Machine::new(&server, "a_disk_vanishes", &sizes) else { return };
    machine.configure(&[0, 1]);
    let _agent = machine.spawn();
    machine.wait_protected();
    let gaps = server.store().gaps.len();
    let first = Writer::start(machine.disks[0].device(), sizes[0]);
    let second = Writer::start(machine.disks[1].device(), sizes[1]);
    thread::sleep(Duration::from_millis(200));
    second.end();
    machine.disks[1].pull();
    wait_for("it is named", || machine.status().is_some_and(|now| now.disks[1].problem.contains("not there any more")));
    wait_for("it is announced no more", || server.store().announced == [DiskId(0)]);
    machine.wait_protected();
    let status = machine.status().expect("it runs");
    assert!(status.reason.contains("disk1") && status.disks[0].problem.is_empty(), "{status:?}");
    let lacked = server.store().range_gaps.clone();
    let named = lacked.iter().any(|ranges| ranges.iter().any(|(disk, _)| disk == DiskId(1)));
    assert!(named, "points say what they lack: {lacked:?}");
    // A reload does not mind that it is missing.
    assert!(machine.reload().expect("nothing to do").is_empty());

    // Somebody wrote to it elsewhere meanwhile.
    let image = OpenOptions::new().write(true).open(&machine.disks[1].image).expect("opens");
    image.write_all_at(&[7; 100_000], 4096).expect("written");
    machine.disks[1].plug_in();
    wait_for("it is taken back", || machine.status().is_some_and(|now| now.disks[1].problem.is_empty()));
    wait_for("it is announced", || server.store().announced == [DiskId(0), DiskId(1)]);
    machine.settle_while(&first);
    machine.assert_replicated(&server, 1);

    machine.disks[1].resize(sizes[1] / 2);
    wait_for("it is refused", || machine.status().is_some_and(|now| now.disks[1].problem.contains("shrank")));
    wait_for("it is announced no more", || server.store().announced == [DiskId(0)]);
    first.end();
    machine.settle();
    machine.assert_replicated(&server, 0);
    let store = server.store();
    assert_eq!(store.gaps.len(), gaps, "the machine has no gap: {:?}", store.gaps);
    assert_eq!(store.whole_heals, 1);
}

impl Machine {
    /// Waits until nothing is lacking, whatever `writer` writes.
    fn settle_while(&self, writer: &Writer) {
        assert!(writer.threads.iter().all(|thread| !thread.is_finished()), "it writes on");
        self.wait_protected();
    }
}

#[test]
fn a_reload_with_a_mistake_changes_nothing() {
    let server = Server::start(false);
    let Some(mut machine) = Machine::new(&server, "a_reload_with_a_mistake", &[8 * MIB, 8 * MIB]) else { return };
    let _agent = machine.spawn();
    machine.wait_protected();
    let sessions = machine.status().expect("it runs").link.sessions;
    let refused = |machine: &Machine, part: &str| {
        let problem = machine.reload().expect_err("refused");
        assert_eq!(problem.kind, ProblemKind::WrongUsage, "{problem:?}");
        assert!(problem.to_string().contains(part) && problem.what.contains("goes on as before"), "{problem}");
    };
    machine.write_config("state_dir = 7");
    refused(&machine, "line 1");
    machine.configure(&[0, 1]);
    let mut wrong = machine.config.clone();
    wrong.disks[1].path = "/dev/no-such-disk".into();
    machine.write_config(&toml::to_string(&wrong).expect("a configuration"));
    refused(&machine, "no-such-disk");
    wrong.disks[1].path = machine.disks[0].device().to_owned();
    machine.write_config(&toml::to_string(&wrong).expect("a configuration"));
    refused(&machine, "lead to one disk");
    wrong.disks.remove(0);
    wrong.disks[0].name = "disk0".to_owned();
    wrong.disks[0].path.clone_from(&machine.disks[1].path);
    machine.write_config(&toml::to_string(&wrong).expect("a configuration"));
    refused(&machine, "another device");
    wrong = machine.config.clone();
    wrong.state_dir = "/elsewhere".into();
    machine.write_config(&toml::to_string(&wrong).expect("a configuration"));
    refused(&machine, "another agent");
    wrong = machine.config.clone();
    wrong.disks[1].capture = CaptureChoice::Splitter;
    machine.write_config(&toml::to_string(&wrong).expect("a configuration"));
    machine.reload().expect_err("two captures");
    let status = machine.status().expect("it runs");
    assert_eq!((status.state, status.disks.len()), (ProtectionState::Protected, 1));
    assert_eq!(status.link.sessions, sessions, "the stream was not touched");
    assert_eq!(server.store().heals, 1);
}
