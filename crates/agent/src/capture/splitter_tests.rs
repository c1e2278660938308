//! The splitter as a whole: a replica built from its ring and its heal sets must equal the disk, whatever happens.

use super::recovery_set::{MapKind, Slot};
use super::ring::cost;
use super::*;
use proptest::prelude::*;
use replication::geometry::GRANULE_BYTES;
use replication::{DiskIdentity, MachineId};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};
use std::time::Duration;
use world::{Access, BlockDevice, Clock, FileDevice, Monotonic, SystemClock, WallTime};

const SECTOR: u64 = 512;
const BOOT: [u8; 16] = [1; 16];
const LIMIT: Duration = Duration::from_secs(20);

/// A clock that moves when it is told to.
#[derive(Default)]
struct ManualClock(AtomicU64);

impl Clock for ManualClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> WallTime {
        WallTime(0)
    }
}

type Hook = Box<dyn Fn(Range<u64>) -> bool + Send + Sync>;

/// A disk in memory. A hook sees every change just before it is applied and decides whether it fails.
struct MemoryDisk {
    bytes: RwLock<Vec<u8>>,
    hook: OnceLock<Hook>,
    flushes: AtomicU64,
}

impl MemoryDisk {
    fn new(size: u64) -> Arc<MemoryDisk> {
        MemoryDisk::holding(vec![0; size as usize])
    }

    fn holding(bytes: Vec<u8>) -> Arc<MemoryDisk> {
        Arc::new(MemoryDisk { bytes: RwLock::new(bytes), hook: OnceLock::new(), flushes: AtomicU64::new(0) })
    }

    fn on_change(&self, hook: impl Fn(Range<u64>) -> bool + Send + Sync + 'static) {
        assert!(self.hook.set(Box::new(hook)).is_ok(), "one hook");
    }

    fn contents(&self) -> Vec<u8> {
        self.bytes.read().expect("not poisoned").clone()
    }

    fn change(&self, range: Range<u64>, value: impl FnOnce(&mut [u8])) -> Result<(), BlockError> {
        self.check_range(&range)?;
        let fails = self.hook.get().is_some_and(|hook| hook(range.clone()));
        let mut bytes = self.bytes.write().expect("not poisoned");
        let target = &mut bytes[range.start as usize..range.end as usize];
        if fails {
            // The worst a failed write may do: something of its own, neither old nor new.
            target.fill(0xEE);
            return Err(BlockError::Failed(std::io::Error::other("planted")));
        }
        value(target);
        Ok(())
    }
}

impl BlockDevice for MemoryDisk {
    fn size(&self) -> u64 {
        self.bytes.read().expect("not poisoned").len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let bytes = self.bytes.read().expect("not poisoned");
        buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.change(offset..offset + data.len() as u64, |target| target.copy_from_slice(data))
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.change(range, |target| target.fill(0))
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.change(range, |target| target.fill(0))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

fn geometry(disk: u16, size_bytes: u64) -> DiskGeometry {
    let identity = DiskIdentity { serial: format!("serial-{disk}"), fingerprint: [0; 16] };
    let path = format!("/dev/test{disk}");
    let disk = DiskId(disk);
    DiskGeometry { disk, identity, path, size_bytes, logical_sector_bytes: 512, physical_sector_bytes: 4096 }
}

fn protect(disks: &[Arc<MemoryDisk>]) -> Vec<ProtectedDisk> {
    let protect = |(index, disk): (usize, &Arc<MemoryDisk>)| ProtectedDisk {
        geometry: geometry(index as u16, disk.size()),
        device: disk.clone(),
    };
    disks.iter().enumerate().map(protect).collect()
}

fn config(ring_bytes_max: u64) -> SplitterConfig {
    SplitterConfig { machine: MachineId([9; 16]), boot: BOOT, ring_bytes_max }
}

fn open(disks: &[Arc<MemoryDisk>], store: &MemoryMapStore, ring_bytes_max: u64) -> (Splitter, SplitterCapture) {
    let clock = Arc::new(SystemClock);
    Splitter::open(protect(disks), store, clock, config(ring_bytes_max)).expect("nothing prevents opening")
}

/// Everything that a kill at this moment would leave for the next start to heal, by disk.
fn left_by_a_kill(disks: &[Arc<MemoryDisk>], store: &MemoryMapStore) -> Vec<Vec<ByteRange>> {
    let image = store.load().expect("memory is readable").expect("installed");
    let (_, capture) = open(disks, &MemoryMapStore::holding(&image), 1000);
    assert_eq!(capture.continuity(), Continuity::SameBoot);
    (0..disks.len()).map(|disk| capture.heal_set(DiskId(disk as u16))).collect()
}

fn names(ranges: &[ByteRange], sector: u64) -> bool {
    ranges.iter().any(|range| range.overlaps(ByteRange::new(sector * SECTOR, SECTOR)))
}

/// What the other side holds: each sector with the number of the change that wrote it, so that a heal read lies below
/// every stream change after its `p0`, whenever it is applied.
struct Replica {
    disks: Vec<(Vec<u8>, Vec<u64>)>,
    number: u64,
}

impl Replica {
    fn new(disks: &[Arc<MemoryDisk>]) -> Replica {
        let empty =
            |disk: &Arc<MemoryDisk>| (vec![0xAA; disk.size() as usize], vec![0; (disk.size() / SECTOR) as usize]);
        Replica { disks: disks.iter().map(empty).collect(), number: 0 }
    }

    fn put(&mut self, disk: DiskId, number: u64, start: u64, data: &[u8]) {
        let (bytes, numbers) = &mut self.disks[usize::from(disk.0)];
        for (index, sector) in data.chunks(SECTOR as usize).enumerate() {
            let at = start as usize + index * SECTOR as usize;
            let last = &mut numbers[at / SECTOR as usize];
            if *last <= number {
                *last = number;
                bytes[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }

    fn apply(&mut self, record: &Captured) {
        self.number += 1;
        for kind in &record.kinds {
            match kind {
                ChangeKind::Write { range, data } => self.put(record.disk, self.number, range.start, data),
                ChangeKind::Zero { range } | ChangeKind::Discard { range } => {
                    self.put(record.disk, self.number, range.start, &vec![0; range.len as usize]);
                }
                _ => {}
            }
        }
    }
}

/// The least that an engine does. One call of `heal` is one attempt.
struct Engine {
    capture: SplitterCapture,
    replica: Replica,
    attempts: u64,
}

impl Engine {
    fn consume(&mut self, most: usize) {
        for _ in 0..most {
            let Some(record) = self.capture.next() else { return };
            self.replica.apply(&record);
            self.capture.release(record.end);
        }
    }

    fn consume_through_producer(&mut self) {
        let end = self.capture.status().producer;
        while let Some(record) = self.capture.next() {
            self.replica.apply(&record);
            self.capture.release(record.end);
            if record.end >= end {
                return;
            }
        }
    }

    fn rotate(&mut self) -> Epoch {
        loop {
            match self.capture.rotate(Mode::Stream) {
                Some(epoch) => return epoch,
                None => self.fold_older(),
            }
        }
    }

    fn fold_older(&mut self) {
        let epoch = self.capture.status().epoch;
        while !self.capture.settled(epoch) {
            std::thread::yield_now();
        }
        self.capture.fold(epoch);
    }

    /// One heal; whether it covered everything.
    fn heal(&mut self) -> bool {
        self.attempts += 1;
        let epoch = self.rotate();
        self.fold_older();
        // A failed write's record holds what the disk does not: it must lie below `p0`, where the heal overrules it.
        self.consume_through_producer();
        let gaps = self.capture.status().gap_count;
        self.replica.number += 1;
        let p0 = self.replica.number;
        for geometry in self.capture.disks() {
            for range in self.capture.heal_set(geometry.disk) {
                for piece in range.split_at_multiples(32 * 1024) {
                    let mut buffer = vec![0; piece.len as usize];
                    self.capture.read(geometry.disk, piece.start, &mut buffer).expect("memory is readable");
                    self.replica.put(geometry.disk, p0, piece.start, &buffer);
                    self.consume(8);
                }
            }
        }
        self.consume_through_producer();
        let whole = self.capture.status().gap_count == gaps && !self.capture.has_unstreamed(epoch);
        if whole {
            self.capture.clear_heal_set();
        }
        whole
    }

    fn assert_equal(&self, disks: &[Arc<MemoryDisk>]) {
        for (index, disk) in disks.iter().enumerate() {
            let (there, here) = (&self.replica.disks[index].0, disk.contents());
            let differs = there.chunks(512).zip(here.chunks(512)).position(|(there, here)| there != here);
            assert_eq!(differs, None, "disk {index}: first sector that differs");
        }
    }
}

/// A small generator, so that every thread's writes follow from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

fn scribble(disk: &SplitterDisk, random: &mut Random) -> Result<(), BlockError> {
    let sectors = disk.size() / SECTOR;
    let start = random.below(sectors);
    let len = (1 + random.below(24)).min(sectors - start);
    let range = start * SECTOR..(start + len) * SECTOR;
    match random.below(8) {
        0 => disk.write_zeroes(range),
        1 => disk.discard(range),
        _ => disk.write_at(range.start, &vec![random.below(256) as u8; (range.end - range.start) as usize]),
    }
}

#[test]
fn a_replica_follows_through_overflows_failed_writes_and_freezes() {
    let mut attempts = 0;
    for seed in 0..6u64 {
        let disks = [MemoryDisk::new(40 * GRANULE_BYTES), MemoryDisk::new(3 * GRANULE_BYTES + SECTOR)];
        let failing = Mutex::new(Random(seed));
        disks[0].on_change(move |_| failing.lock().expect("not poisoned").below(400) == 0);
        let (splitter, capture) = open(&disks, &MemoryMapStore::new(), 60_000);
        assert_eq!(capture.continuity(), Continuity::Fresh);
        let mut engine = Engine { capture, replica: Replica::new(&disks), attempts: 0 };
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let (splitter, done) = (&splitter, &done);
                scope.spawn(move || {
                    let mut random = Random(seed << 8 | writer);
                    for round in 0..600 {
                        let disk = splitter.disk(DiskId((random.below(4) == 0).into())).expect("known");
                        // A planted failure is the writer's to live with.
                        let _ = scribble(&disk, &mut random);
                        if round % 16 == 0 {
                            std::thread::yield_now();
                        }
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
            while done.load(Ordering::SeqCst) < 4 {
                if engine.attempts % 3 == 2 {
                    drop(splitter.freeze(LIMIT).expect("writes end"));
                }
                engine.heal();
                engine.consume(100);
            }
        });
        while !engine.heal() {}
        engine.assert_equal(&disks);
        attempts += engine.attempts;
        let statistics = splitter.statistics();
        assert_eq!(statistics.changes, 4 * 600, "seed {seed}");
        assert!(statistics.streamed > 0 && statistics.tracked > 0 && statistics.failed > 0, "{statistics:?}");
    }
    assert!(attempts > 12, "heals while writing: {attempts}");
}

#[derive(Debug, Clone)]
enum Step {
    Change { disk: u16, sector: u64, sectors: u64, fill: u8, fails: bool },
    Consume(usize),
    Commit,
    Rotate(bool),
    Clear,
    Fold,
    Heal,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0u16..2, 0u64..1024, 1u64..40, any::<u8>(), prop::bool::weighted(0.05)).prop_map(
            |(disk, sector, sectors, fill, fails)| Step::Change { disk, sector, sectors, fill, fails }
        ),
        3 => (1usize..20).prop_map(Step::Consume),
        2 => Just(Step::Commit),
        2 => prop::bool::weighted(0.8).prop_map(Step::Rotate),
        1 => Just(Step::Clear),
        1 => Just(Step::Fold),
        1 => Just(Step::Heal),
        1 => Just(Step::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// The one promise of the recovery set: whatever the vault does not hold is named, at every moment.
    #[test]
    fn a_kill_at_any_moment_leaves_every_uncommitted_range_named(steps in prop::collection::vec(step(), 1..120)) {
        const SECTORS: u64 = 1024;
        let disks = [MemoryDisk::new(SECTORS * SECTOR), MemoryDisk::new(SECTORS * SECTOR)];
        let fails = Arc::new(AtomicBool::new(false));
        for disk in &disks {
            let fails = fails.clone();
            disk.on_change(move |_| fails.swap(false, Ordering::SeqCst));
        }
        let store = MemoryMapStore::new();
        let (mut splitter, capture) = open(&disks, &store, 60_000);
        let mut engine = Engine { capture, replica: Replica::new(&disks), attempts: 0 };
        prop_assert!(engine.heal());
        // What the vault holds, and through which ring position and epoch.
        let mut committed: Vec<Vec<u8>> = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
        let mut consumed: Vec<Captured> = Vec::new();
        for step in steps {
            match step.clone() {
                Step::Change { disk, sector, sectors, fill, fails: planted } => {
                    fails.store(planted, Ordering::SeqCst);
                    let disk = splitter.disk(DiskId(disk)).expect("known");
                    let range = sector * SECTOR..(sector + sectors).min(SECTORS) * SECTOR;
                    let result = match fill {
                        0..20 => disk.write_zeroes(range),
                        20..40 => disk.discard(range),
                        _ => disk.write_at(range.start, &vec![fill; (range.end - range.start) as usize]),
                    };
                    prop_assert_eq!(result.is_err(), planted);
                }
                Step::Consume(most) => {
                    for _ in 0..most {
                        let Some(record) = engine.capture.next() else { break };
                        engine.replica.apply(&record);
                        engine.capture.release(record.end);
                        consumed.push(record);
                    }
                }
                Step::Commit => {
                    committed = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
                    consumed.clear();
                }
                Step::Rotate(streaming) => {
                    engine.capture.rotate(if streaming { Mode::Stream } else { Mode::Track });
                }
                Step::Clear => {
                    // Legal for the older epoch when all of it was streamed and committed.
                    let status = engine.capture.status();
                    let older = Epoch(status.epoch.0 - 1);
                    let in_ring = {
                        let mut rest = Vec::new();
                        while let Some(record) = engine.capture.next() {
                            engine.replica.apply(&record);
                            engine.capture.release(record.end);
                            rest.push(record);
                        }
                        consumed.extend(rest);
                        consumed.iter().any(|record| record.epoch <= older)
                    };
                    let slot = Slot::of(older);
                    if !in_ring && !splitter.shared.set.has_unstreamed(slot) && engine.capture.settled(status.epoch) {
                        engine.capture.clear(older);
                    }
                }
                Step::Fold => {
                    let epoch = engine.capture.status().epoch;
                    prop_assert!(engine.capture.settled(epoch));
                    engine.capture.fold(epoch);
                }
                Step::Heal => {
                    prop_assert!(engine.heal());
                    committed = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
                    consumed.clear();
                    engine.assert_equal(&disks);
                }
                Step::Kill => {
                    // The ring is gone, and with it what was not committed: heals compare with the vault.
                    let (again, capture) = open(&disks, &store, 60_000);
                    prop_assert_eq!(capture.continuity(), Continuity::SameBoot);
                    splitter = again;
                    engine.capture = capture;
                    for (disk, bytes) in engine.replica.disks.iter_mut().zip(&committed) {
                        disk.0.clone_from(bytes);
                    }
                    consumed.clear();
                }
            }
            for (index, ranges) in left_by_a_kill(&disks, &store).iter().enumerate() {
                let here = disks[index].contents();
                for sector in 0..SECTORS {
                    let bytes = sector as usize * 512..(sector as usize + 1) * 512;
                    if here[bytes.clone()] != committed[index][bytes] {
                        prop_assert!(names(ranges, sector), "after {:?}: sector {} of disk {}", step, sector, index);
                    }
                }
            }
        }
        prop_assert!(engine.heal());
        engine.assert_equal(&disks);
    }

    /// Bytes from outside: any image is answered, and what cannot be trusted costs a comparison.
    #[test]
    fn any_image_is_answered(
        at in any::<prop::sample::Index>(), value: u8, cut in any::<prop::sample::Index>(), noise: Vec<u8>
    ) {
        let disks = [MemoryDisk::new(4 * GRANULE_BYTES)];
        let store = MemoryMapStore::new();
        let (_, mut capture) = open(&disks, &store, 1000);
        capture.clear_heal_set();
        let image = store.load().expect("readable").expect("installed");
        let mut head_damaged = image.clone();
        let head = 4096 + 8..4096 + 32 + 60;
        let position = head.start + at.index(head.len());
        head_damaged[position] = head_damaged[position].wrapping_add(value.max(1));
        for damaged in [noise, image[..cut.index(image.len())].to_vec(), head_damaged] {
            let (_, capture) = open(&disks, &MemoryMapStore::holding(&damaged), 1000);
            prop_assert!(matches!(capture.continuity(), Continuity::Lost(LostReason::Unreadable(_))));
            prop_assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, 4 * GRANULE_BYTES)]);
        }
    }
}

#[test]
fn marks_are_there_when_the_write_reaches_the_disk() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let shared: Weak<_> = Arc::downgrade(&splitter.shared);
    let checked = Arc::new(AtomicU64::new(0));
    let seen = checked.clone();
    disks[0].on_change(move |range| {
        let shared = shared.upgrade().expect("open");
        let range = ByteRange::new(range.start, range.end - range.start);
        let word = shared.read_word();
        let slot = Slot::of(word.epoch());
        assert!(shared.set.map(MapKind::Uncommitted(slot), 0).covers(range));
        if word.mode() == Mode::Track {
            assert!(shared.set.map(MapKind::Unstreamed(slot), 0).covers(range));
        }
        seen.fetch_add(1, Ordering::SeqCst);
        false
    });
    let disk = splitter.disk(DiskId(0)).expect("known");
    let mut random = Random(5);
    for mode in [Mode::Track, Mode::Stream, Mode::Track, Mode::Stream] {
        capture.fold(capture.status().epoch);
        capture.rotate(mode).expect("the older slot is free");
        capture.fold(capture.status().epoch);
        capture.clear_heal_set();
        for _ in 0..40 {
            scribble(&disk, &mut random).expect("nothing fails");
        }
    }
    assert_eq!(checked.load(Ordering::SeqCst), 160);
}

#[test]
fn writes_that_overlap_in_flight_are_in_the_ring_as_on_the_disk() {
    let disks = [MemoryDisk::new(8 * SECTOR)];
    // Whoever is first here would often be second on the disk.
    let calls = AtomicU64::new(0);
    disks[0].on_change(move |_| {
        (0..calls.fetch_add(1, Ordering::SeqCst) % 2 * 20).for_each(|_| std::thread::yield_now());
        false
    });
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 64 << 20);
    capture.rotate(Mode::Stream).expect("free");
    let mut replica = Replica::new(&disks);
    replica.disks[0].0.fill(0);
    for round in 0..500u64 {
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let disk = splitter.disk(DiskId(0)).expect("known");
                scope.spawn(move || {
                    let mut random = Random(round << 8 | writer);
                    (0..3).for_each(|_| scribble(&disk, &mut random).expect("written"));
                });
            }
        });
        while let Some(record) = capture.next() {
            replica.apply(&record);
            capture.release(record.end);
        }
        assert!(replica.disks[0].0 == disks[0].contents(), "round {round}");
    }
}

#[test]
fn a_write_in_flight_keeps_its_epoch_unsettled() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let first = capture.rotate(Mode::Stream).expect("free");
    capture.fold(first);
    capture.clear_heal_set();
    let (entered, wait_entered) = std::sync::mpsc::channel();
    let (go, wait_go) = std::sync::mpsc::channel();
    let wait_go = Mutex::new(wait_go);
    disks[0].on_change(move |range| {
        if range.start == 0 {
            entered.send(()).expect("the test listens");
            wait_go.lock().expect("not poisoned").recv_timeout(LIMIT).expect("the test speaks");
        }
        false
    });
    std::thread::scope(|scope| {
        let disk = splitter.disk(DiskId(0)).expect("known");
        scope.spawn(move || disk.write_at(0, &[7; 512]).expect("written"));
        wait_entered.recv().expect("the write reaches the disk");
        let second = capture.rotate(Mode::Stream).expect("free");
        assert!(!capture.settled(second));
        assert!(capture.settled(first), "nobody is left under what came before the first");
        assert_eq!(capture.rotate(Mode::Stream), None, "the first epoch's slot is in use");
        // A write under the new epoch does not wait for the old one and does not settle it.
        splitter.disk(DiskId(0)).expect("known").write_at(GRANULE_BYTES, &[8; 512]).expect("written");
        assert!(!capture.settled(second));
        go.send(()).expect("the disk listens");
        while !capture.settled(second) {
            std::thread::yield_now();
        }
        capture.fold(second);
        assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, GRANULE_BYTES)]);
        assert!(!capture.has_unstreamed(first));
        assert!(!capture.settled(second.next()), "writes may begin under the current epoch at any time");
    });
    let epochs: Vec<Epoch> = std::iter::from_fn(|| capture.next())
        .filter(|record| record.kinds[0].range().is_some())
        .map(|r| r.epoch)
        .collect();
    assert_eq!(epochs, [first, first.next()]);
}

#[test]
fn a_full_ring_breaks_the_stream_until_the_next_rotation() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 3 * cost(1, 4096) + cost(1, 0));
    let disk = splitter.disk(DiskId(0)).expect("known");
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    for granule in 0..3 {
        disk.write_at(granule * GRANULE_BYTES, &[1; 4096]).expect("written");
    }
    assert_eq!((capture.status().gap_count, capture.status().mode), (0, Mode::Stream));
    assert!(!capture.has_unstreamed(epoch));
    disk.write_at(3 * GRANULE_BYTES, &[2; 4096]).expect("a full ring stops no one");
    let status = capture.status();
    assert_eq!((status.gap_count, status.gap_cause, status.mode), (1, Some(GapCause::Overflow), Mode::Track));
    assert_eq!(status.ring_bytes_used, status.ring_bytes_max);
    assert!(capture.has_unstreamed(epoch));
    // Room again, but the one before is missing: nothing may enter, not even a marker.
    let records: Vec<Captured> = std::iter::from_fn(|| capture.next()).collect();
    capture.release(records.last().expect("some").end);
    disk.write_at(4 * GRANULE_BYTES, &[3; 4096]).expect("written");
    assert!(!capture.mark(MarkerKind::Crash, "not here"));
    assert_eq!(capture.next(), None);
    assert_eq!(capture.status().gap_count, 1);
    // Writes before the break are in the ring, in order; those after it are in the heal set.
    let starts: Vec<u64> =
        records.iter().filter_map(|record| record.kinds[0].range()).map(|range| range.start).collect();
    assert_eq!(starts, [0, GRANULE_BYTES, 2 * GRANULE_BYTES]);
    let next = capture.rotate(Mode::Stream).expect("free");
    assert!(capture.mark(MarkerKind::Crash, "here"));
    capture.fold(next);
    assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, 5 * GRANULE_BYTES)]);
    disk.write_at(5 * GRANULE_BYTES, &[4; 4096]).expect("written");
    let kinds: Vec<ChangeKind> = std::iter::from_fn(|| capture.next()).flat_map(|record| record.kinds).collect();
    assert_eq!(kinds[0], ChangeKind::Marker { kind: MarkerKind::Crash, name: "here".to_owned() });
    assert_eq!(kinds[1].range(), Some(ByteRange::new(5 * GRANULE_BYTES, 4096)));
}

#[test]
fn a_reader_goes_back_to_what_is_not_released() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 1 << 20);
    capture.rotate(Mode::Stream).expect("free");
    for sector in 0..200 {
        splitter.disk(DiskId(0)).expect("known").write_at(sector * SECTOR, &[1; 512]).expect("written");
    }
    let all: Vec<Captured> = std::iter::from_fn(|| capture.next()).collect();
    assert_eq!(all.len(), 201, "with the disk's description");
    capture.release(all[49].end);
    capture.rewind(all[49].end);
    assert_eq!(capture.next().as_ref(), Some(&all[50]));
    capture.rewind(all[49].end);
    assert_eq!(capture.next().as_ref(), Some(&all[50]));
    // After a reconnect the other side turns out to have more than was read again.
    capture.release(all[80].end);
    assert_eq!(capture.next().as_ref(), Some(&all[81]));
    capture.release(all[200].end);
    assert_eq!(capture.next(), None);
    assert_eq!(capture.status().ring_bytes_used, 0);
    capture.rewind(all[200].end);
    assert_eq!(capture.status().producer, all[200].end);
}

#[test]
fn a_failed_write_is_named_for_a_heal() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    disks[0].on_change(|range| range.start == 2 * GRANULE_BYTES);
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    let disk = splitter.disk(DiskId(0)).expect("known");
    disk.write_at(0, &[1; 512]).expect("written");
    assert!(!capture.has_unstreamed(epoch));
    disk.write_at(2 * GRANULE_BYTES, &[1; 512]).expect_err("planted");
    assert!(capture.has_unstreamed(epoch));
    assert_eq!(capture.status().gap_count, 0, "the order of the stream is whole");
    assert_eq!(splitter.statistics().failed, 1);
    disk.write_at(8 * GRANULE_BYTES - 512, &[1; 1024]).expect_err("beyond the end");
    assert_eq!(splitter.statistics().changes, 2, "what cannot reach the disk is not captured");
}

#[test]
fn a_large_write_is_one_record_in_pieces() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 8 << 20);
    capture.rotate(Mode::Stream).expect("free");
    let data: Vec<u8> = (0..(2 << 20) + 512 + 512).map(|index| (index / 512) as u8).collect();
    splitter.disk(DiskId(0)).expect("known").write_at(512, &data).expect("written");
    let record = std::iter::from_fn(|| capture.next()).last().expect("captured");
    let sizes: Vec<usize> = record.kinds.iter().map(ChangeKind::data_len).collect();
    assert_eq!(sizes, [1 << 20, 1 << 20, 1024]);
    let mut replica = Replica::new(&disks);
    replica.apply(&record);
    assert_eq!(replica.disks[0].0[512..512 + data.len()], data);
}

#[test]
fn a_kill_between_the_steps_of_a_fold_loses_nothing() {
    let disks = [MemoryDisk::new(16 * GRANULE_BYTES), MemoryDisk::new(16 * GRANULE_BYTES)];
    let store = MemoryMapStore::new();
    let (splitter, mut capture) = open(&disks, &store, 20_000);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    let mut random = Random(3);
    for _ in 0..6 {
        for disk in 0..2 {
            scribble(&splitter.disk(DiskId(disk)).expect("known"), &mut random).expect("written");
        }
    }
    let before = left_by_a_kill(&disks, &store);
    assert!(before.iter().all(|ranges| !ranges.is_empty()));
    capture.rotate(Mode::Stream).expect("free");
    let mut steps = 0;
    splitter.shared.set.fold(Slot::of(epoch), || {
        assert_eq!(left_by_a_kill(&disks, &store), before, "step {steps}");
        steps += 1;
    });
    assert_eq!(steps, 9, "two merges and two clears for each disk, then the slot");
    assert_eq!((0..2).map(|disk| capture.heal_set(DiskId(disk))).collect::<Vec<_>>(), before);
}

#[test]
fn a_freeze_holds_writes_back_and_its_marker_divides_them() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 64 << 20);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    let stop = AtomicBool::new(false);
    let mut at_rest = Vec::new();
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (disk, stop) = (splitter.disk(DiskId(0)).expect("known"), &stop);
            scope.spawn(move || {
                let mut random = Random(writer);
                while !stop.load(Ordering::SeqCst) {
                    scribble(&disk, &mut random).expect("written");
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
        }
        for round in 0..20 {
            let changes = splitter.statistics().changes;
            while splitter.statistics().changes < changes + 10 {
                std::thread::yield_now();
            }
            let frozen = splitter.freeze(LIMIT).expect("writes end");
            assert!(matches!(splitter.freeze(LIMIT), Err(FreezeError::AlreadyFrozen)));
            let flushed = disks[0].flushes.load(Ordering::SeqCst);
            assert!(flushed > round);
            at_rest.push(disks[0].contents());
            assert!(frozen.mark(MarkerKind::Final, "rest"));
            assert_eq!(disks[0].contents(), *at_rest.last().expect("pushed"), "nothing is written while frozen");
            assert!(frozen.holds());
        }
        stop.store(true, Ordering::SeqCst);
    });
    // The disk was zero at first, so the stream alone must give its contents at each marker.
    let mut replica = Replica::new(&disks);
    replica.disks[0].0.fill(0);
    let mut markers = at_rest.iter();
    while let Some(record) = capture.next() {
        replica.apply(&record);
        if let ChangeKind::Marker { .. } = record.kinds[0] {
            assert!(replica.disks[0].0 == *markers.next().expect("one state for each marker"));
        }
    }
    assert_eq!(markers.len(), 0);
}

#[test]
fn a_freeze_ends_at_its_time_out() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let clock = Arc::new(ManualClock::default());
    let (splitter, mut capture) =
        Splitter::open(protect(&disks), &MemoryMapStore::new(), clock.clone(), config(100_000)).expect("opens");
    capture.rotate(Mode::Stream).expect("free");
    let disk = splitter.disk(DiskId(0)).expect("known");
    let frozen = splitter.freeze(Duration::from_secs(10)).expect("nothing is in flight");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(0, &[1; 512]));
        clock.0.store(9_999_999_999, Ordering::SeqCst);
        assert!(frozen.holds() && !writer.is_finished());
        assert_eq!(disks[0].contents()[0], 0);
        // The owner of the guard hangs; the writer frees itself.
        clock.0.store(10_000_000_000, Ordering::SeqCst);
        writer.join().expect("no panic").expect("written");
    });
    assert!(!frozen.holds());
    assert!(!frozen.mark(MarkerKind::Final, "too late"));
    let again = splitter.freeze(Duration::from_secs(10)).expect("the first one is over");
    drop(frozen);
    assert!(again.holds(), "an expired guard thaws nobody else's freeze");
    drop(again);
    disk.write_at(0, &[2; 512]).expect("written");
}

#[test]
fn a_freeze_gives_up_on_a_write_that_hangs() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, _capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let (entered, wait_entered) = std::sync::mpsc::channel();
    let (go, wait_go) = std::sync::mpsc::channel::<()>();
    let wait_go = Mutex::new(wait_go);
    disks[0].on_change(move |range| {
        if range.start == 0 {
            entered.send(()).expect("the test listens");
            wait_go.lock().expect("not poisoned").recv_timeout(LIMIT).expect("the test speaks");
        }
        false
    });
    std::thread::scope(|scope| {
        let disk = splitter.disk(DiskId(0)).expect("known");
        scope.spawn(move || disk.write_at(0, &[1; 512]).expect("written"));
        wait_entered.recv().expect("the write reaches the disk");
        assert!(matches!(splitter.freeze(Duration::from_millis(20)), Err(FreezeError::TimedOut(_))));
        splitter.disk(DiskId(0)).expect("known").write_at(4096, &[2; 512]).expect("writes go on");
        go.send(()).expect("the disk listens");
    });
    drop(splitter.freeze(LIMIT).expect("nothing hangs any more"));
}

/// Opens, heals once and ends, as an earlier run of the agent did. Writes `dirty` at granule 1 afterwards.
fn earlier_run(disks: &[Arc<MemoryDisk>], store: &MemoryMapStore) -> Splitter {
    let (splitter, capture) = open(disks, store, 100_000);
    let mut engine = Engine { capture, replica: Replica::new(disks), attempts: 0 };
    assert!(engine.heal());
    splitter.disk(DiskId(0)).expect("known").write_at(GRANULE_BYTES, &[9; 512]).expect("written");
    splitter
}

#[test]
fn continuity_is_what_was_lived_through() {
    const SIZE: u64 = 8 * GRANULE_BYTES;
    let whole = [ByteRange::new(0, SIZE)];
    let dirty = [ByteRange::new(GRANULE_BYTES, GRANULE_BYTES)];
    let start = |disks: Vec<ProtectedDisk>, store: &MemoryMapStore, machine: u8, boot: u8| {
        let config = SplitterConfig { machine: MachineId([machine; 16]), boot: [boot; 16], ring_bytes_max: 10_000 };
        let (splitter, capture) = Splitter::open(disks, store, Arc::new(SystemClock), config).expect("opens");
        (splitter, capture.continuity(), capture.heal_set(DiskId(0)), capture)
    };
    let lost = |reason| Continuity::Lost(reason);

    // Killed, started again.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let _ = earlier_run(&disks, &store);
    let (_, continuity, heal, mut capture) = start(protect(&disks), &store, 9, 1);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    assert_eq!(capture.next(), None, "nothing about the disk changed");
    let second = capture.rotate(Mode::Stream).expect("free");
    assert!(second > Epoch(3), "epochs go on counting: {second:?}");

    // Killed, machine restarted; and the doubt survives a further kill in the new boot.
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::Rebooted), &whole[..]));
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &whole[..]));

    // Another machine's maps.
    let (_, continuity, heal, _) = start(protect(&disks), &store, 8, 2);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::OtherMachine), &whole[..]));

    // Closed in order: even a restart of the machine costs nothing, unless the disk was used elsewhere in between.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let splitter = earlier_run(&disks, &store);
    splitter.close(LIMIT).expect("closes");
    splitter.disk(DiskId(0)).expect("known").write_at(0, &[1; 512]).expect_err("closed");
    let saved = store.load().expect("readable").expect("installed");
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 3);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::Rebooted), &whole[..]), "this run was not closed");
    disks[0].write_at(512, &[1; 512]).expect("someone else writes");
    for boot in [1, 2] {
        let (_, continuity, heal, _) = start(protect(&disks), &MemoryMapStore::holding(&saved), 9, boot);
        assert_eq!((continuity, heal.as_slice()), (lost(LostReason::ChangedMeanwhile(DiskId(0))), &whole[..]));
    }

    // Another disk under the same number; a smaller one; a larger one; one more.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let _ = earlier_run(&disks, &store);
    let image = store.load().expect("readable").expect("installed");
    let with = |change: &dyn Fn(&mut ProtectedDisk)| {
        let mut disks = protect(&disks);
        change(&mut disks[0]);
        start(disks, &MemoryMapStore::holding(&image), 9, 1)
    };
    let (_, continuity, heal, _) = with(&|disk| disk.geometry.identity.serial = "other".to_owned());
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::DiskReplaced(DiskId(0))), &whole[..]));
    let resize = |size: u64| {
        move |disk: &mut ProtectedDisk| {
            *disk = ProtectedDisk { geometry: geometry(0, size), device: MemoryDisk::new(size) };
        }
    };
    let (_, continuity, heal, _) = with(&resize(SIZE - SECTOR));
    assert_eq!(continuity, lost(LostReason::DiskShrunk(DiskId(0))));
    assert_eq!(heal, [ByteRange::new(0, SIZE - SECTOR)]);
    let (_, continuity, heal, mut capture) = with(&resize(SIZE + GRANULE_BYTES + SECTOR));
    assert_eq!(continuity, Continuity::SameBoot);
    assert_eq!(heal, [dirty[0], ByteRange::new(SIZE, GRANULE_BYTES + SECTOR)]);
    let announced = capture.next().expect("the growth is announced");
    assert_eq!(announced.kinds, [ChangeKind::Geometry(geometry(0, SIZE + GRANULE_BYTES + SECTOR))]);
    let two = [disks[0].clone(), MemoryDisk::new(SIZE)];
    let (_, continuity, heal, mut capture) = start(protect(&two), &MemoryMapStore::holding(&image), 9, 1);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    assert_eq!(capture.heal_set(DiskId(1)), whole);
    assert_eq!(capture.next().map(|record| record.disk), Some(DiskId(1)));
    capture.clear_heal_set();
    capture.require_whole(DiskId(0));
    assert_eq!((capture.heal_set(DiskId(0)).as_slice(), capture.heal_set(DiskId(1)).len()), (&whole[..], 0));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let disk = |geometry| ProtectedDisk { geometry, device: MemoryDisk::new(4096) };
    let open = |disks| {
        let clock = Arc::new(SystemClock);
        Splitter::open(disks, &MemoryMapStore::new(), clock, config(1000)).err().map(|error| error.to_string())
    };
    assert_eq!(
        open(vec![disk(geometry(0, 8192))]).as_deref(),
        Some("disk 0 is described with 8192 bytes, but its device has 4096")
    );
    let twice = vec![disk(geometry(3, 4096)), disk(geometry(3, 4096))];
    assert_eq!(open(twice).as_deref(), Some("disk 3 is named twice"));
    let odd = ProtectedDisk { geometry: geometry(0, 1000), device: MemoryDisk::new(1000) };
    assert_eq!(
        open(vec![odd]).as_deref(),
        Some("disk 0 has 1000 bytes, which is not a whole number of 512-byte sectors")
    );
    let many = (0..65).map(|index| disk(geometry(index, 4096))).collect();
    assert_eq!(open(many).as_deref(), Some("65 disks are more than a machine can have (64)"));
}

/// A real process is killed with SIGKILL while it writes to a real file; the map file it leaves must name everything
/// that differs from what the other side held.
#[test]
fn a_killed_process_leaves_a_map_of_all_it_wrote() {
    const SIZE: u64 = 64 * GRANULE_BYTES;
    const FOLDER: &str = "FARSHORE_TEST_KILLED_WRITER";
    let open = |folder: &std::path::Path| {
        let device = Arc::new(FileDevice::open(folder.join("disk"), Access::ReadWrite).expect("the disk opens"));
        let store = FileMapStore::open(folder, "maps").expect("nobody else has the maps");
        let disks = vec![ProtectedDisk { geometry: geometry(0, SIZE), device }];
        Splitter::open(disks, &store, Arc::new(SystemClock), config(1 << 20)).expect("opens")
    };
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = std::path::PathBuf::from(folder);
        let (splitter, mut capture) = open(&folder);
        let epoch = capture.rotate(Mode::Stream).expect("free");
        capture.fold(epoch);
        capture.clear_heal_set();
        let disk = splitter.disk(DiskId(0)).expect("known");
        let mut random = Random(std::process::id().into());
        loop {
            // One granule in eight, so that most of the disk must stay unnamed.
            let start = random.below(8) * 8 * GRANULE_BYTES + random.below(100) * SECTOR;
            disk.write_at(start, &[1 + random.below(255) as u8; 1024]).expect("written");
        }
    }
    for _ in 0..3 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("disk"), vec![0; SIZE as usize]).expect("a disk");
        let mut child = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "capture::splitter_tests::a_killed_process_leaves_a_map_of_all_it_wrote"])
            .env(FOLDER, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("the child starts");
        let written = || std::fs::read(folder.path().join("disk")).expect("the disk is there");
        while written().iter().filter(|&&byte| byte != 0).count() < 20_000 {
            assert!(child.try_wait().expect("a child").is_none(), "the child ended by itself");
        }
        child.kill().expect("the child is alive");
        child.wait().expect("the child is gone");
        let (_, capture) = open(folder.path());
        assert_eq!(capture.continuity(), Continuity::SameBoot);
        let (named, bytes) = (capture.heal_set(DiskId(0)), written());
        for sector in 0..SIZE / SECTOR {
            let dirty = bytes[sector as usize * 512..(sector as usize + 1) * 512].iter().any(|&byte| byte != 0);
            assert!(!dirty || names(&named, sector), "sector {sector} was written and is not named");
        }
        assert!(named.iter().map(|range| range.len).sum::<u64>() <= SIZE / 8 + 8 * GRANULE_BYTES, "{named:?}");
    }
}
