//! The whole agent scanning: an image file and a loop device under bursts of writes and pauses, a mounted ext4 that never
//! rests, real TLS, a receiver that keeps everything in memory. Every point is held against a ledger of what the disk
//! held when.
#![cfg(target_os = "linux")]

#[path = "site/loops.rs"]
mod loops;
mod site;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::service::control::{Answer, Request, ask};
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use agent::status::ProtectionState;
use loops::{Loop, output_of, skip, succeeds};
use replication::MarkerKind;
use replication::cut::CutKind;
use site::Server;
use world::{Clock, Entropy, SystemClock, SystemEntropy};

const SOON: Duration = Duration::from_secs(60);
const DISK_BYTES: usize = 4 << 20;
/// How far the receiver's idea of the source's clock, and the ledger's of a write's beginning, may be off.
const TOLERANCE_NS: u64 = 80_000_000;

fn number() -> u64 {
    u64::from_le_bytes((&SystemEntropy as &dyn Entropy).bytes())
}

fn configuration(server: &Server, name: &str, disk: &Path) -> AgentConfig {
    let mut config = AgentConfig::new(server.folder(name).join("state"));
    config.rotate_every_ms = 200;
    config.proof_every_ms = 50;
    config.scan.quiet_ms = 150;
    config.scan.every_s = 1;
    config.disks.push(DiskConfig { capture: CaptureChoice::Scan, ..DiskConfig::new("disk", disk) });
    std::fs::create_dir_all(server.folder(name)).expect("created");
    let state = StateDir::open(&config.state_dir).expect("opens");
    state.join(&server.runtime, Arc::new(SystemClock), &server.token(), name, &[]).expect("joins");
    config
}

fn start(config: &AgentConfig) -> Service {
    let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
    Service::start(config, options).unwrap_or_else(|problems| panic!("{problems:?}"))
}

fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !so() {
        assert!(Instant::now() < until, "{what} did not come about");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What a disk held and from when on.
struct Ledger {
    content: Vec<u8>,
    states: Vec<(u64, blake3::Hash)>,
}

impl Ledger {
    fn new(content: Vec<u8>) -> Ledger {
        let hash = blake3::hash(&content);
        Ledger { content, states: vec![(0, hash)] }
    }

    /// Bursts of writes at random places, random pauses between them.
    fn bursts(&mut self, count: usize, mut write: impl FnMut(u64, &[u8])) {
        for _ in 0..count {
            for _ in 0..1 + number() % 12 {
                let len = 4096 * (1 + number() % 24);
                let at = number() % (DISK_BYTES as u64 - len) / 4096 * 4096;
                let data = vec![(number() % 256) as u8; len as usize];
                let began = SystemClock.wall().0;
                write(at, &data);
                self.content[at as usize..][..data.len()].copy_from_slice(&data);
                self.states.push((began, blake3::hash(&self.content)));
                thread::sleep(Duration::from_millis(number() % 8));
            }
            thread::sleep(Duration::from_millis(50 + number() % 700));
        }
    }

    /// Every point is what the disk held at its time.
    fn check(&self, server: &Server) -> usize {
        let store = server.store();
        let points = store.points.as_ref().expect("they are noted");
        for (cut, content) in points {
            let hash = blake3::hash(content);
            let known = |index: &usize| {
                let until = self.states.get(index + 1).map_or(u64::MAX, |(next, _)| next.saturating_add(TOLERANCE_NS));
                self.states[*index].1 == hash
                    && self.states[*index].0 <= cut.time.0.saturating_add(TOLERANCE_NS)
                    && cut.time.0 <= until
            };
            assert!((0..self.states.len()).any(|index| known(&index)), "{cut:?} is no state that the disk had then");
            assert!(matches!(&cut.kind, CutKind::Marker { kind: MarkerKind::Crash, .. }), "{cut:?}");
        }
        points.len()
    }
}

fn bursts_and_pauses(server: &Server, config: &AgentConfig, content: Vec<u8>, write: impl FnMut(u64, &[u8])) {
    let mut ledger = Ledger::new(content);
    server.store().points = Some(Vec::new());
    let service = start(config);
    eventually("a first point", || service.status().state == ProtectionState::Protected);
    ledger.bursts(12, write);
    let newest = |server: &Server| server.store().points.as_ref().and_then(|points| Some(points.last()?.1.clone()));
    eventually("a point of the disk at rest", || newest(server).as_ref() == Some(&ledger.content));
    // It is published a moment later.
    eventually("protection", || service.status().state == ProtectionState::Protected);
    let status = service.status();
    let scan = status.scan.expect("it scans");
    assert_eq!((status.capture.as_str(), status.reason.as_str()), ("scan", ""), "{scan:?}");
    assert!(scan.points > 0 && scan.last_point_ns > 0 && scan.blind.is_empty(), "{scan:?}");
    // A mark while it rests is a point of its own; the link may break at any time.
    let marked = ask(&config.control_socket(), &Request::Mark { name: "rest".to_owned(), wait_ms: 20_000 });
    assert!(matches!(marked, Ok(Answer::Marked { durable: true, .. })), "{marked:?}");
    assert!(server.store().markers.iter().any(|name| name == "rest"));
    service.stop().expect("stops");
    let points = ledger.check(server);
    assert!(points >= 3, "{points} points after 12 pauses");
    println!("{points} points, {} states, {scan:?}", ledger.states.len());
}

#[test]
fn every_point_of_a_scanned_image_is_a_state_it_had() {
    let mut server = Server::start(false);
    let path = server.folder("image.img");
    let file = File::create(&path).expect("an image");
    file.write_all_at(&vec![7; DISK_BYTES], 0).expect("written");
    let config = configuration(&server, "image", &path);
    bursts_and_pauses(&server, &config, vec![7; DISK_BYTES], |at, data| file.write_all_at(data, at).expect("written"));
    // A new agent knows nothing, sends only what differs, and has points again; so has one whose server was away.
    let before = server.store().heal_bytes;
    file.write_all_at(&[1; 4096], 65536).expect("written");
    let service = start(&config);
    eventually("a point", || service.status().state == ProtectionState::Protected);
    assert!(server.store().heal_bytes - before <= 4096, "only what differs was sent");
    server.crash();
    file.write_all_at(&[2; 4096], 1 << 20).expect("written");
    server.open();
    let mut content = vec![0; DISK_BYTES];
    std::os::unix::fs::FileExt::read_exact_at(&File::open(&path).expect("opens"), &mut content, 0).expect("read");
    eventually("a point of what was written without a server", || {
        server.store().points.as_ref().is_some_and(|points| points.last().expect("some").1 == content)
    });
    service.stop().expect("stops");
}

/// Direct writes in aligned memory.
struct Direct(File);

impl Direct {
    fn open(path: &Path) -> Direct {
        const O_DIRECT: i32 = 0o40000;
        Direct(OpenOptions::new().write(true).custom_flags(O_DIRECT).open(path).expect("opens"))
    }

    fn write(&self, at: u64, data: &[u8]) {
        let mut room = vec![0; data.len() + 4096];
        let shift = room.as_ptr().align_offset(4096);
        room[shift..shift + data.len()].copy_from_slice(data);
        self.0.write_all_at(&room[shift..shift + data.len()], at).expect("written");
    }
}

#[test]
fn every_point_of_a_scanned_device_is_a_state_it_had() {
    let test = "every_point_of_a_scanned_device_is_a_state_it_had";
    let server = Server::start(false);
    let path = server.folder("device.img");
    File::create(&path).and_then(|file| file.write_all_at(&vec![7; DISK_BYTES], 0)).expect("an image");
    let Some(disk) = Loop::attach(&path, "ext4", &server.folder("mnt")) else {
        return skip(test, "no loop device can be made");
    };
    let config = configuration(&server, "device", &disk.device);
    let device = Direct::open(&disk.device);
    bursts_and_pauses(&server, &config, vec![7; DISK_BYTES], |at, data| device.write(at, data));
}

/// Writes numbers and syncs them, without a pause.
#[allow(clippy::disallowed_methods, reason = "this is the load, which syncs as a database would")]
fn acknowledged_load(mount: PathBuf, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut file = File::create(mount.join("numbers")).expect("created");
        for next in 1u64.. {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            file.write_all(&next.to_le_bytes()).and_then(|()| file.sync_data()).expect("written");
            acknowledged.store(next, Ordering::SeqCst);
        }
    })
}

#[test]
fn a_disk_that_never_rests_has_points_when_its_file_system_is_frozen() {
    let test = "a_disk_that_never_rests_has_points_when_its_file_system_is_frozen";
    let server = Server::start(false);
    let (image, mount) = (server.folder("busy.img"), server.folder("mnt"));
    let Some(disk) = Loop::make(test, &image, 32 << 20, "ext4", &mount) else { return };
    let config = configuration(&server, "busy", &disk.device);
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let load = acknowledged_load(mount, stop.clone(), acknowledged.clone());
    server.store().points = Some(Vec::new());
    let service = start(&config);
    eventually("some passes", || service.status().scan.is_some_and(|scan| scan.passes > 3));
    let status = service.status();
    let scan = status.scan.clone().expect("it scans");
    assert_eq!((scan.points, scan.disturbed), (0, scan.passes), "{scan:?}");
    assert_eq!(status.state, ProtectionState::Healing);
    assert!(status.reason.contains("scanned") || status.reason.contains("started"), "{status:?}");
    let refused = ask(&config.control_socket(), &Request::Mark { name: "now".to_owned(), wait_ms: 0 });
    assert!(refused.is_err(), "{refused:?}");

    let mut ends = Vec::new();
    for round in 0..3 {
        let before = acknowledged.load(Ordering::SeqCst);
        let name = format!("frozen {round}");
        let answer = ask(&config.control_socket(), &Request::Point { name: name.clone(), wait_ms: 20_000 });
        assert!(matches!(answer, Ok(Answer::PointTaken { failed: None, durable: true, .. })), "{answer:?}");
        let after = acknowledged.load(Ordering::SeqCst);
        assert!(after > before, "the load goes on");
        ends.push((name, before, after));
    }
    stop.store(true, Ordering::SeqCst);
    load.join().expect("the load does not panic");
    service.stop().expect("stops");

    for (name, before, after) in ends {
        let store = server.store();
        let points = store.points.as_ref().expect("they are noted");
        let named =
            |kind: &CutKind| matches!(kind, CutKind::Marker { kind: MarkerKind::Application, name: it } if *it == name);
        let (_, content) = points.iter().find(|(cut, _)| named(&cut.kind)).expect("the point is there");
        let copy = server.folder("copy.img");
        std::fs::write(&copy, content).expect("written");
        drop(store);
        assert!(
            succeeds("e2fsck", &["-fn", &copy.display().to_string()]),
            "{}",
            output_of("e2fsck", &["-fn", &copy.display().to_string()])
        );
        let place = server.folder("recovered");
        let mut recovered = Loop::attach(&copy, "ext4", &place).expect("a loop device");
        assert!(recovered.mount("ro"), "the point mounts");
        let numbers = std::fs::read(place.join("numbers")).expect("readable");
        let last =
            numbers.chunks_exact(8).last().map_or(0, |bytes| u64::from_le_bytes(*bytes.first_chunk().expect("8")));
        assert!((before..=after + 1).contains(&last), "{name}: {last} is not from {before} to {after}");
        recovered.unmount();
    }
}
