//! Where a heal may end, with real writes: at the producer's position when all of it was read, and nowhere before. The
//! engine and the capture by eBPF on the running kernel, real TLS, a receiver that keeps everything in memory; a reader of
//! the ring that lags, and, planted, one that ends heals where it has come to itself. Needs root and BTF.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

#[path = "site/loops.rs"]
mod loops;
mod site;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use agent::capture::ebpf::{self, EbpfCapture, EbpfConfig, EbpfDisk, Variant};
use agent::capture::{Capture, CaptureStatus, Captured, Continuity, Mode, Phase, RingPosition};
use agent::engine::{ClearedMark, Engine, Step};
use agent::state::StateDir;
use agent::wire::LinkWire;
use link::{Connector, DenyList, Expected, Role, Trust};
use loops::{Loop, skip};
use replication::limits::HEAL_WINDOW_BYTES;
use replication::sender::{Resumption, SenderConfig};
use replication::wire::OfferHashes;
use replication::{
    ByteRange, ChainId, DiskGeometry, DiskId, DiskIdentity, Epoch, InstanceId, MachineId, MarkerKind, PointTime,
    SequenceNumber,
};
use site::Server;
use world::{BlockError, Clock, FileDevice, Monotonic, SystemClock};

const DISK_BYTES: u64 = 32 << 20;
const CHUNK_BYTES: u64 = 64 << 10;
/// Blocks that each round of the writer goes through, from the beginning of the disk to its end, and its pause after each: a
/// round takes longer than it takes from the heal's start to its first read.
const BLOCKS: u64 = 512;
const PAUSE: Duration = Duration::from_micros(900);
/// How long the heal takes for a chunk, so that the writer comes through rounds meanwhile.
const READ_TAKES: Duration = Duration::from_millis(2);
/// So often may the mistake do no harm by luck.
const RUNS: usize = 4;
const BLOCK_BYTES: usize = 4096;

/// Where the end of a heal is taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Where the kernel had come to when everything was read.
    Producer,
    /// The mistake: where this reader has come to.
    Consumer,
}

/// The capture, read by somebody who comes to nothing while a heal reads: the ring holds what was written meanwhile.
struct Lagging {
    inner: EbpfCapture,
    end: End,
    /// The heal has been told what to read, and this reader stops: what it hands out later lies above what the heal reads.
    collected: AtomicBool,
    /// It reads again, for good.
    goes_on: bool,
    consumed: RingPosition,
    /// Bytes of the ring that were not read when the heal's end was asked for.
    lag: Arc<AtomicU64>,
}

impl Lagging {
    fn lags(&self) -> bool {
        self.collected.load(Ordering::SeqCst) && !self.goes_on
    }
}

impl Capture for Lagging {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.inner.disks()
    }

    fn next(&mut self) -> Option<Captured> {
        let captured = self.inner.next();
        if let Some(captured) = &captured {
            self.consumed = captured.end;
        }
        captured
    }

    fn rewind(&mut self, to: RingPosition) {
        self.inner.rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        self.inner.release(through);
    }

    fn status(&self) -> CaptureStatus {
        self.inner.status()
    }

    fn ahead_bytes_max(&self) -> u64 {
        if self.lags() { 0 } else { self.inner.ahead_bytes_max() }
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        self.inner.rotate(mode)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        self.inner.settled(epoch)
    }

    fn fold(&mut self, epoch: Epoch) {
        self.inner.fold(epoch);
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        self.collected.store(true, Ordering::SeqCst);
        self.inner.heal_set(disk)
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.inner.require_whole(disk);
    }

    fn clear_heal_set(&mut self) {
        self.inner.clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        self.inner.clear(epoch);
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        self.inner.has_unstreamed(epoch)
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        self.inner.unstreamed(epoch)
    }

    fn passed(&self) -> RingPosition {
        self.inner.passed()
    }

    fn keep(&mut self, resumption: Option<Resumption>) {
        self.inner.keep(resumption);
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        self.inner.mark(kind, name)
    }

    fn continuity(&self) -> Continuity {
        self.inner.continuity()
    }

    fn follow(&mut self, phase: Phase) {
        self.goes_on |= self.lags() && !phase.healing;
        self.inner.follow(phase);
    }

    fn heal_end(&mut self) -> Option<RingPosition> {
        let producer = self.inner.heal_end()?;
        self.lag.fetch_max(producer.0 - self.consumed.0, Ordering::SeqCst);
        // The heal ends only when everything up to that position was read; with the mistake it ends here and now.
        self.goes_on |= self.end == End::Producer;
        Some(if self.end == End::Producer { producer } else { self.consumed })
    }

    fn known_until(&self, now: Monotonic) -> Option<Monotonic> {
        self.inner.known_until(now).filter(|_| !self.lags())
    }

    /// Slowly: the writer goes through many rounds between the first block and the last.
    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        thread::sleep(READ_TAKES);
        Capture::read(&self.inner, disk, offset, buffer)
    }
}

struct NoMark;

impl ClearedMark for NoMark {
    fn load(&self) -> Option<(ChainId, SequenceNumber)> {
        None
    }

    fn store(&mut self, _chain: ChainId, _committed: SequenceNumber) -> std::io::Result<()> {
        Ok(())
    }
}

/// Memory that O_DIRECT takes.
struct Block(Vec<u8>, usize);

impl Block {
    fn new() -> Block {
        let bytes = vec![0; 2 * BLOCK_BYTES];
        let shift = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Block(bytes, shift)
    }

    fn holding(&mut self, round: u64) -> &[u8] {
        self.0[self.1..self.1 + 8].copy_from_slice(&round.to_le_bytes());
        &self.0[self.1..self.1 + BLOCK_BYTES]
    }
}

fn place(block: u64) -> u64 {
    block * ((DISK_BYTES - BLOCK_BYTES as u64) / (BLOCKS - 1) / BLOCK_BYTES as u64 * BLOCK_BYTES as u64)
}

/// Writes the number of its round to one block after the other, each when the one before is on the disk.
fn write_rounds(device: &Path, stop: &AtomicBool) {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().write(true).custom_flags(direct).open(device).expect("the device opens");
    let mut block = Block::new();
    for round in 1.. {
        for index in 0..BLOCKS {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            file.write_all_at(block.holding(round), place(index)).expect("written");
            thread::sleep(PAUSE);
        }
    }
}

/// Whether `disk` is one that existed: no block is ahead of one that was written before it, none a round behind.
fn judge(disk: &[u8]) -> Result<(), String> {
    let round = |block: u64| u64::from_le_bytes(*disk[place(block) as usize..].first_chunk().expect("8 bytes"));
    let rounds: Vec<u64> = (0..BLOCKS).map(round).collect();
    let ordered = rounds.windows(2).all(|pair| pair[0] >= pair[1]);
    let close = rounds[0] <= rounds[rounds.len() - 1] + 1;
    let few: Vec<u64> = rounds.iter().copied().step_by(32).collect();
    if ordered && close { Ok(()) } else { Err(format!("no disk was ever like this: every 32nd block has {few:?}")) }
}

struct Outcome {
    /// What the disk is said to have been where the heals of the machine ended.
    ends: Vec<Vec<u8>>,
    lag_bytes: u64,
    /// The copy is the disk when nobody writes any more.
    equal: bool,
}

fn heal_under_writes(test: &str, end: End) -> Option<Outcome> {
    if let Err(why) = ebpf::support::check_machine() {
        skip(test, &why);
        return None;
    }
    let server = Server::start(false);
    server.store().heal_ends = Some(Vec::new());
    let image = server.folder("disk.img");
    File::create(&image).and_then(|file| file.set_len(DISK_BYTES)).expect("an image");
    let Some(disk) = Loop::attach(&image, "ext4", &server.folder("mnt")) else {
        skip(test, "no loop device can be made");
        return None;
    };
    let state = StateDir::open(&server.folder("state")).expect("opens");
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let identity = state.join(&server.runtime, clock.clone(), &server.token(), test, &[]).expect("joins");
    let machine = MachineId(identity.peer.id);
    let pins = PathBuf::from(format!("/sys/fs/bpf/farshore-{test}-{}", std::process::id()));
    let stop = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        scope.spawn(|| write_rounds(&disk.device, &stop));
        let over = Stop(&stop);
        let capture = open(machine, &pins, &disk.device, clock.clone());
        let lag = Arc::new(AtomicU64::new(0));
        let lagging = Lagging {
            inner: capture,
            end,
            collected: AtomicBool::new(false),
            goes_on: false,
            consumed: RingPosition(0),
            lag: lag.clone(),
        };
        let mut engine = Engine::new(lagging, sender(machine, test), clock.clone(), None, Box::new(NoMark));
        let trust = Trust::new(identity.authority.clone(), clock.clone(), DenyList::default());
        let connector = Connector::new(server.runtime.clone(), identity, trust, clock.clone());
        let expected = Expected { role: Role::ProcessServer, id: None };
        let mut wire = LinkWire::new(connector.connect(&server.address, &expected).expect("connects"));
        engine.link_up();
        let mut step_until = |what: &str, done: &dyn Fn(&Engine<Lagging>) -> bool| {
            let since = Instant::now();
            while !done(&engine) {
                assert!(since.elapsed() < Duration::from_secs(60), "waited in vain until {what}");
                match engine.step(Some(&mut wire)) {
                    Step::Busy => {}
                    Step::Idle => thread::sleep(Duration::from_micros(200)),
                    other => panic!("{other:?}"),
                }
            }
        };
        step_until("the heal has ended", &|_| server.store().heal_ends.as_ref().is_some_and(|ends| !ends.is_empty()));
        drop(over);
        // Whoever writes has ended when nothing is captured any more.
        thread::sleep(Duration::from_millis(100));
        step_until("everything has arrived", &|engine| engine.is_settled());
        let mut content = vec![0; DISK_BYTES as usize];
        let device = FileDevice::open_direct(&disk.device).expect("opens");
        world::BlockDevice::read_at(&device, 0, &mut content).expect("readable");
        let mut store = server.store();
        let equal = store.replicas[&DiskId(0)].bytes == content;
        Outcome {
            ends: store.heal_ends.take().expect("it was put there"),
            lag_bytes: lag.load(Ordering::SeqCst),
            equal,
        }
    });
    ebpf::detach(&pins).expect("taken down");
    Some(outcome)
}

/// Ends the writer, also when a check fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn open(machine: MachineId, pins: &Path, device: &Path, clock: Arc<dyn Clock>) -> EbpfCapture {
    let geometry = DiskGeometry {
        disk: DiskId(0),
        identity: DiskIdentity { serial: "loop".to_owned(), fingerprint: [0; 16] },
        path: device.display().to_string(),
        size_bytes: DISK_BYTES,
        logical_sector_bytes: 512,
        physical_sector_bytes: 512,
    };
    let config = EbpfConfig {
        machine,
        pins: pins.to_owned(),
        ring_bytes_max: 64 << 20,
        variants: vec![Variant::Dynptr, Variant::Bounded],
    };
    let disk = EbpfDisk { geometry, path: device.to_owned() };
    EbpfCapture::open(vec![disk], clock, &config).unwrap_or_else(|error| panic!("{error:?}"))
}

fn sender(machine: MachineId, name: &str) -> SenderConfig {
    SenderConfig {
        machine,
        instance: InstanceId([7; 16]),
        boot: [1; 16],
        vm_generation: [0; 16],
        started: PointTime(SystemClock.wall().0),
        name: name.to_owned(),
        hashes: OfferHashes::Plain,
        rotate_every_ns: 10_000_000_000,
        proof_every_ns: 50_000_000,
        heal_chunk_bytes: CHUNK_BYTES,
        heal_window_bytes: HEAL_WINDOW_BYTES,
    }
}

#[test]
fn a_heal_ends_where_the_kernel_had_come_to() {
    let Some(outcome) = heal_under_writes("a_heal_ends_where_the_kernel_had_come_to", End::Producer) else { return };
    assert!(outcome.lag_bytes > 100 * BLOCK_BYTES as u64, "the reader lagged: {}", outcome.lag_bytes);
    for end in &outcome.ends {
        judge(end).unwrap_or_else(|why| panic!("{why}"));
    }
    assert!(outcome.equal, "the copy is the disk");
}

#[test]
fn a_heal_that_ends_where_its_reader_has_come_to_is_noticed() {
    let test = "a_heal_that_ends_where_its_reader_has_come_to_is_noticed";
    for _ in 0..RUNS {
        let Some(outcome) = heal_under_writes(test, End::Consumer) else { return };
        assert!(outcome.lag_bytes > 100 * BLOCK_BYTES as u64, "the reader lagged: {}", outcome.lag_bytes);
        // Nothing else tells: in the end the copy is right.
        assert!(outcome.equal, "the copy is the disk");
        if let Err(problem) = judge(&outcome.ends[0]) {
            return println!("caught: {problem}");
        }
    }
    panic!("a point that never was is not noticed");
}
