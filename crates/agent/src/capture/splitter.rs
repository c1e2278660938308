//! The splitter: a capture that needs no privileges. Whoever uses a protected disk uses it through a
//! [`SplitterDisk`], which marks, captures and then passes on every change.
//!
//! A write's way, in this order:
//!
//! 1. wait for overlapping writes in flight ([`super::overlap`]);
//! 2. read the (epoch, mode) word once and register under that epoch ([`super::gate`]);
//! 3. mark *uncommitted*;
//! 4. copy it into the ring, or mark *unstreamed* (a full ring breaks the stream for everyone after it);
//! 5. write to the disk behind; if that fails, mark *unstreamed*;
//! 6. end the registration and the turn.
//!
//! A kill between any two steps leaves a mark for every byte that may have reached the disk. The ring may be ahead of
//! the disk, never behind it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use replication::limits::{CHANGE_DATA_BYTES_MAX, CHANGE_RANGE_BYTES_MAX, DISKS_MAX, NAME_BYTES_MAX};
use replication::{ByteRange, ChangeKind, DiskGeometry, DiskId, MachineId, MarkerKind, SourceTime};
use world::{BlockDevice, BlockError, Clock, Extent};

use super::fingerprint::fingerprint;
use super::gate::{self, FreezeError, Frozen, Gate, Word};
use super::mapfile::MapStore;
use super::overlap::Overlaps;
use super::pieces::{range_pieces, write_pieces};
use super::recovery_set::{self, Attach, RecoverySet, Slot};
use super::ring::{Push, Ring, cost};
use super::slabs::Slabs;
use super::splitter_capture::SplitterCapture;
use super::{Continuity, GapCause, Mode, Unbroken, WriteCounts};

/// A disk to protect and the device that holds it.
pub struct ProtectedDisk {
    /// Its description; the size must be the device's. The identity's serial tells it from another disk.
    pub geometry: DiskGeometry,
    /// Where its bytes are. Nobody else may write to it from here on.
    pub device: Arc<dyn BlockDevice>,
}

/// What a splitter needs to know.
#[derive(Debug, Clone)]
pub struct SplitterConfig {
    /// The protected machine.
    pub machine: MachineId,
    /// Identity of this boot (`/proc/sys/kernel/random/boot_id`, or anything that is new after each start).
    pub boot: [u8; 16],
    /// Size of the ring in bytes, overheads included.
    pub ring_bytes_max: u64,
}

/// Why a splitter did not open. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenSplitterError {
    /// A machine has at most `DISKS_MAX` disks.
    #[error("{0} disks are more than a machine can have ({DISKS_MAX})")]
    TooManyDisks(usize),
    /// Two disks have one number.
    #[error("{0} is named twice")]
    DuplicateDisk(DiskId),
    /// A description does not fit its device.
    #[error("{disk} is described with {described} bytes, but its device has {actual}")]
    SizeDiffers {
        /// The disk.
        disk: DiskId,
        /// Bytes in the description.
        described: u64,
        /// Bytes of the device.
        actual: u64,
    },
    /// Disks consist of whole sectors.
    #[error("{disk} has {size} bytes, which is not a whole number of 512-byte sectors")]
    OddSize {
        /// The disk.
        disk: DiskId,
        /// Its size in bytes.
        size: u64,
    },
    /// The dirty maps cannot be stored, so writes could not be marked.
    #[error("the dirty maps cannot be stored")]
    Maps(#[source] std::io::Error),
}

/// Why a splitter did not close in order. The next start compares the disks by hash, unless it is in the same boot.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// Writes are still in flight.
    #[error("writes did not end within {0:?}")]
    TimedOut(Duration),
    /// A disk could not be flushed or read.
    #[error("a disk failed while it was being closed")]
    Disk(#[source] BlockError),
    /// The dirty maps could not be made durable.
    #[error("the dirty maps could not be saved")]
    Maps(#[source] std::io::Error),
}

#[derive(Default)]
struct Counters {
    written_bytes: AtomicU64,
    streamed: AtomicU64,
    tracked: AtomicU64,
    failed: AtomicU64,
}

/// One protected disk, inside.
pub(crate) struct Disk {
    pub(crate) geometry: DiskGeometry,
    pub(crate) device: Arc<dyn BlockDevice>,
    overlaps: Overlaps,
}

/// What all handles share.
pub(crate) struct Shared {
    pub(crate) disks: Vec<Disk>,
    pub(crate) index: BTreeMap<DiskId, usize>,
    pub(crate) set: RecoverySet,
    pub(crate) ring: Ring,
    /// Memory for what the ring holds.
    slabs: Slabs,
    pub(crate) gate: Gate,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) continuity: Continuity,
    pub(crate) unbroken: Option<Unbroken>,
    counters: Counters,
}

/// Handle on the splitter of one machine's disks. Clones are the same splitter.
#[derive(Clone)]
pub struct Splitter {
    pub(super) shared: Arc<Shared>,
}

impl Splitter {
    /// Takes the disks under protection, in track mode: nothing streams until the capture's owner rotates.
    ///
    /// On return the dirty maps are durable. New, grown and replaced disks are announced in the ring.
    pub fn open(
        disks: Vec<ProtectedDisk>,
        store: &dyn MapStore,
        clock: Arc<dyn Clock>,
        config: SplitterConfig,
    ) -> Result<(Splitter, SplitterCapture), OpenSplitterError> {
        let index = check(&disks)?;
        let geometries: Vec<DiskGeometry> = disks.iter().map(|disk| disk.geometry.clone()).collect();
        let observe = |disk: DiskId, size| fingerprint(&*disks[index[&disk]].device, size).ok();
        let attach = Attach { machine: config.machine, boot: config.boot, disks: &geometries, fingerprint: &observe };
        let adopted = recovery_set::adopt(store.load().transpose(), &attach);
        let set = RecoverySet::install(store, &adopted.image).map_err(OpenSplitterError::Maps)?;
        tracing::info!(continuity = ?adopted.continuity, disks = disks.len(), "capture opened");
        let disks = disks
            .into_iter()
            .map(|disk| Disk { geometry: disk.geometry, device: disk.device, overlaps: Overlaps::default() })
            .collect();
        let shared = Arc::new(Shared {
            disks,
            index,
            set,
            ring: Ring::new(config.ring_bytes_max),
            slabs: Slabs::keeping(config.ring_bytes_max),
            gate: Gate::default(),
            clock,
            continuity: adopted.continuity,
            unbroken: adopted.unbroken,
            counters: Counters::default(),
        });
        shared.announce(&adopted.changed);
        Ok((Splitter { shared: shared.clone() }, SplitterCapture::new(shared)))
    }

    /// The disk as its users see it; `None` if there is no such disk.
    pub fn disk(&self, disk: DiskId) -> Option<SplitterDisk> {
        let index = *self.shared.index.get(&disk)?;
        Some(SplitterDisk { shared: self.shared.clone(), index })
    }

    /// Brings all disks to rest: new writes wait, those in flight end, everything is flushed. Writes go on when the
    /// guard is dropped, and `limit` after the call at the latest.
    pub fn freeze(&self, limit: Duration) -> Result<Frozen, FreezeError> {
        Frozen::new(&self.shared, limit)
    }

    /// Counters since the splitter opened.
    pub fn counts(&self) -> WriteCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        let tracked = read(&counters.tracked);
        WriteCounts {
            changes: read(&counters.streamed) + tracked,
            written_bytes: read(&counters.written_bytes),
            tracked,
            failed: read(&counters.failed),
            untold: 0,
        }
    }

    /// Ends the service in order: later writes fail, everything is flushed, and the maps record that nothing was
    /// written since. After this even a reboot costs no comparison, if the disks are as they were.
    pub fn close(&self, limit: Duration) -> Result<(), CloseError> {
        let shared = &self.shared;
        if !shared.gate.close(shared.word(), &*shared.clock, limit) {
            return Err(CloseError::TimedOut(limit));
        }
        shared.flush_all().map_err(CloseError::Disk)?;
        let fingerprints = shared.disks.iter().map(|disk| fingerprint(&*disk.device, disk.geometry.size_bytes));
        let fingerprints = fingerprints.collect::<Result<Vec<_>, _>>().map_err(CloseError::Disk)?;
        shared.set.close(&fingerprints).map_err(CloseError::Maps)
    }
}

fn check(disks: &[ProtectedDisk]) -> Result<BTreeMap<DiskId, usize>, OpenSplitterError> {
    if disks.len() > DISKS_MAX {
        return Err(OpenSplitterError::TooManyDisks(disks.len()));
    }
    let mut index = BTreeMap::new();
    for (position, disk) in disks.iter().enumerate() {
        let DiskGeometry { disk: id, size_bytes: described, .. } = disk.geometry;
        let actual = disk.device.size();
        if described != actual {
            return Err(OpenSplitterError::SizeDiffers { disk: id, described, actual });
        }
        if actual % replication::geometry::SECTOR_BYTES != 0 {
            return Err(OpenSplitterError::OddSize { disk: id, size: actual });
        }
        if index.insert(id, position).is_some() {
            return Err(OpenSplitterError::DuplicateDisk(id));
        }
    }
    Ok(index)
}

impl Shared {
    pub(crate) fn word(&self) -> &AtomicU64 {
        self.set.word()
    }

    pub(crate) fn read_word(&self) -> Word {
        Word(self.word().load(Ordering::SeqCst))
    }

    pub(crate) fn flush_all(&self) -> Result<(), BlockError> {
        self.disks.iter().try_for_each(|disk| disk.device.flush())
    }

    fn now(&self) -> SourceTime {
        SourceTime(self.clock.monotonic().0)
    }

    /// Puts the descriptions of `changed` disks first into the ring.
    fn announce(&self, changed: &[DiskId]) {
        let epoch = self.read_word().epoch();
        for disk in changed {
            let geometry = self.disks[self.index[disk]].geometry.clone();
            let push =
                self.ring.lock().push(epoch, *disk, self.now(), cost(1, 0), || vec![ChangeKind::Geometry(geometry)]);
            if push != Push::Taken {
                // The handshake names the disks too; a ring this small streams nothing anyway.
                tracing::warn!(disk = disk.0, "the ring has no room for a disk's description");
            }
        }
    }

    /// Puts a marker into the ring unless the stream is broken or there is no room.
    pub(crate) fn mark(&self, kind: MarkerKind, name: &str) -> bool {
        if name.len() > NAME_BYTES_MAX {
            return false;
        }
        let mut ring = self.ring.lock();
        // Under the ring's lock, where the mode is changed: no marker may stand beyond a break.
        let word = self.read_word();
        word.mode() == Mode::Stream
            && ring.push(word.epoch(), DiskId(0), self.now(), cost(1, 0), || {
                vec![ChangeKind::Marker { kind, name: name.to_owned() }]
            }) == Push::Taken
    }

    /// Puts a change of `cost` bytes into the ring. `false` if it has to be marked *unstreamed* instead.
    fn stream(&self, flight: &InFlight<'_>, cost: u64, kinds: impl FnOnce() -> Vec<ChangeKind>) -> bool {
        let (epoch, disk) = (flight.word.epoch(), self.disks[flight.disk].geometry.disk);
        // Copied before the lock is taken, unless the copy is likely to be thrown away.
        let mut built = None;
        let mut kinds = Some(kinds);
        if !self.ring.seems_full(cost) {
            built = kinds.take().map(|kinds| kinds());
        }
        let mut ring = self.ring.lock();
        let take = || built.or_else(|| kinds.map(|kinds| kinds())).expect("either built or still to be built");
        match ring.push(epoch, disk, self.now(), cost, take) {
            Push::Taken => true,
            Push::Refused => false,
            Push::Full => {
                // Under the same lock: a smaller record must not slip in where this one had no room.
                ring.break_stream(GapCause::Overflow);
                gate::stop_streaming(self.word());
                drop(ring);
                tracing::warn!("the send buffer is full; changes are tracked until a heal");
                false
            }
        }
    }
}

/// A registered write. Unless it is told that the disk took it, dropping it marks its range *unstreamed*.
struct InFlight<'a> {
    shared: &'a Shared,
    word: Word,
    disk: usize,
    range: ByteRange,
    applied: bool,
}

impl InFlight<'_> {
    fn slot(&self) -> Slot {
        Slot::of(self.word.epoch())
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let slot = self.slot();
        if !self.applied {
            // The stream carries what the disk may not hold.
            self.shared.set.mark_unstreamed(slot, self.disk, self.range);
            self.shared.counters.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.shared.gate.leave(self.shared.word(), slot);
    }
}

/// A protected disk as its users see it. Every change made through it is marked and captured.
#[derive(Clone)]
pub struct SplitterDisk {
    shared: Arc<Shared>,
    index: usize,
}

impl SplitterDisk {
    fn disk(&self) -> &Disk {
        &self.shared.disks[self.index]
    }

    fn change(
        &self,
        range: Range<u64>,
        pieces: u64,
        data_bytes: u64,
        kinds: impl FnOnce(ByteRange) -> Vec<ChangeKind>,
        apply: impl FnOnce(&dyn BlockDevice) -> Result<(), BlockError>,
    ) -> Result<(), BlockError> {
        self.check_range(&range)?;
        let (shared, disk) = (&*self.shared, self.disk());
        let Some(range) = ByteRange::between(range.start, range.end) else {
            return Ok(());
        };
        let _turn = disk.overlaps.enter(range);
        let word = shared.gate.enter(shared.word(), &*shared.clock)?;
        let mut flight = InFlight { shared, word, disk: self.index, range, applied: false };
        shared.set.mark_uncommitted(flight.slot(), self.index, range);
        if word.mode() == Mode::Stream && shared.stream(&flight, cost(pieces, data_bytes), || kinds(range)) {
            shared.counters.streamed.fetch_add(1, Ordering::Relaxed);
        } else {
            shared.set.mark_unstreamed(flight.slot(), self.index, range);
            shared.counters.tracked.fetch_add(1, Ordering::Relaxed);
        }
        apply(&*disk.device)?;
        flight.applied = true;
        shared.counters.written_bytes.fetch_add(data_bytes, Ordering::Relaxed);
        Ok(())
    }
}

impl BlockDevice for SplitterDisk {
    fn size(&self) -> u64 {
        self.disk().geometry.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.disk().device.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        let range = offset..offset.saturating_add(data.len() as u64);
        let pieces = data.len().div_ceil(CHANGE_DATA_BYTES_MAX) as u64;
        let kinds = |range| write_pieces(range, data, &self.shared.slabs);
        self.change(range, pieces, data.len() as u64, kinds, |device| device.write_at(offset, data))
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        let pieces = (range.end.saturating_sub(range.start)).div_ceil(CHANGE_RANGE_BYTES_MAX);
        let kinds = |range| range_pieces(range, |range| ChangeKind::Zero { range });
        self.change(range.clone(), pieces, 0, kinds, |device| device.write_zeroes(range))
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        let pieces = (range.end.saturating_sub(range.start)).div_ceil(CHANGE_RANGE_BYTES_MAX);
        let kinds = |range| range_pieces(range, |range| ChangeKind::Discard { range });
        self.change(range.clone(), pieces, 0, kinds, |device| device.discard(range))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.disk().device.flush()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        self.disk().device.extents(range)
    }
}
