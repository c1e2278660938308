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

mod continuity;
mod freeze;
mod named;
mod stream;

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
