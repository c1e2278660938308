//! The engine's side of the splitter: consumption of the ring and the rotation protocol.
//!
//! One owner calls it from one thread, so rotations, folds and clears never race with each other; they race with
//! writers only, and [`super::gate`] settles that.

use std::collections::VecDeque;
use std::sync::Arc;

use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MarkerKind};
use world::{BlockError, ExtentKind};

use super::gate;
use super::recovery_set::{MapKind, Slot};
use super::splitter::{Disk, Shared};
use super::{Capture, CaptureStatus, Captured, Continuity, Mode, RingPosition, Unbroken};

/// The capture of a [`super::Splitter`]. There is exactly one for each.
pub struct SplitterCapture {
    shared: Arc<Shared>,
    /// Records taken from the ring but not handed out yet.
    ahead: VecDeque<Captured>,
}

/// Records taken from the ring under one lock.
const READ_AHEAD_RECORDS_MAX: usize = 64;

impl SplitterCapture {
    pub(crate) fn new(shared: Arc<Shared>) -> SplitterCapture {
        SplitterCapture { shared, ahead: VecDeque::new() }
    }

    fn index(&self, disk: DiskId) -> usize {
        *self.shared.index.get(&disk).expect("the engine names only disks that this capture told it of")
    }
}

impl Capture for SplitterCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.shared.disks.iter().map(|disk| disk.geometry.clone()).collect()
    }

    fn next(&mut self) -> Option<Captured> {
        if self.ahead.is_empty() {
            self.shared.ring.lock().read_into(&mut self.ahead, READ_AHEAD_RECORDS_MAX);
        }
        self.ahead.pop_front()
    }

    fn rewind(&mut self, to: RingPosition) {
        self.ahead.clear();
        self.shared.ring.lock().rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        // After a rewind, what the other side turns out to have is released unread.
        while self.ahead.front().is_some_and(|record| record.end <= through) {
            self.ahead.pop_front();
        }
        self.shared.ring.release(through);
    }

    fn status(&self) -> CaptureStatus {
        let ring = self.shared.ring.lock();
        let (gap_count, gap_cause) = ring.gap();
        let word = self.shared.read_word();
        CaptureStatus {
            gap_count,
            gap_cause,
            producer: ring.producer(),
            ring_bytes_used: ring.used(),
            ring_bytes_max: self.shared.ring.bytes_max(),
            epoch: word.epoch(),
            mode: word.mode(),
            unstreamed_count: self.shared.set.unstreamed_count(),
        }
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        let shared = &*self.shared;
        let mut ring = shared.ring.lock();
        let word = shared.read_word();
        let epoch = word.epoch().next();
        if shared.set.occupant(Slot::of(epoch)).is_some() || !shared.gate.is_idle(Slot::of(epoch)) {
            return None;
        }
        shared.set.occupy(epoch);
        // Only where the stream runs on unbroken may stragglers of the old epoch still enter the ring.
        if ring.is_broken() || word.mode() == Mode::Track || mode == Mode::Track {
            ring.resume(epoch);
        }
        gate::open_epoch(shared.word(), epoch, mode);
        Some(epoch)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        let current = self.shared.read_word().epoch();
        if epoch > current {
            return false;
        }
        // Before the current epoch opened, everyone had left the one whose slot it took.
        let older = Slot::ALL.into_iter().filter(|slot| self.shared.set.occupant(*slot).is_some_and(|it| it < epoch));
        older.into_iter().all(|slot| self.shared.gate.is_idle(slot))
    }

    fn fold(&mut self, epoch: Epoch) {
        assert!(self.settled(epoch), "maps are folded only when nobody can mark in them any more");
        for slot in Slot::ALL {
            if self.shared.set.occupant(slot).is_some_and(|occupant| occupant < epoch) {
                self.shared.set.fold(slot, || ());
            }
        }
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        self.shared.set.heal_set(self.index(disk))
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.shared.set.require_whole(self.index(disk));
    }

    fn require(&mut self, disk: DiskId, range: ByteRange) {
        self.shared.set.map(MapKind::Heal, self.index(disk)).mark(range);
    }

    fn knows_writes(&self) -> bool {
        true
    }

    fn written_since(&self, epoch: Epoch, disk: DiskId, range: ByteRange) -> Vec<ByteRange> {
        let (set, index) = (&self.shared.set, self.index(disk));
        if set.occupant(Slot::of(epoch)) != Some(epoch) {
            return vec![range];
        }
        let newer = Slot::ALL.into_iter().filter(|slot| set.occupant(*slot).is_some_and(|it| it >= epoch));
        let maps = newer.flat_map(|slot| [MapKind::Uncommitted(slot), MapKind::Unstreamed(slot)]);
        maps.flat_map(|kind| set.map(kind, index).marked_within(range)).collect()
    }

    fn clear_heal_set(&mut self) {
        self.shared.set.clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        let slot = Slot::of(epoch);
        if self.shared.set.occupant(slot) != Some(epoch) {
            return;
        }
        assert!(self.settled(epoch.next()), "maps are cleared only when nobody can mark in them any more");
        assert!(!self.shared.set.has_unstreamed(slot), "an epoch with unstreamed writes is folded, never cleared");
        self.shared.set.empty(slot, || ());
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        let set = &self.shared.set;
        let recent = Slot::ALL.into_iter().filter(|slot| set.occupant(*slot).is_some_and(|it| it >= epoch));
        recent.into_iter().any(|slot| set.has_unstreamed(slot))
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        let set = &self.shared.set;
        let recent = Slot::ALL.into_iter().filter(|slot| set.occupant(*slot).is_some_and(|it| it >= epoch));
        let recent: Vec<Slot> = recent.filter(|slot| set.has_unstreamed(*slot)).collect();
        let of_disk = |(index, disk): (usize, &Disk)| -> Vec<(DiskId, ByteRange)> {
            let ranges = recent.iter().flat_map(|slot| set.map(MapKind::Unstreamed(*slot), index).ranges());
            ranges.map(|range| (disk.geometry.disk, range)).collect()
        };
        self.shared.disks.iter().enumerate().flat_map(of_disk).collect()
    }

    fn unbroken(&self) -> Option<Unbroken> {
        self.shared.unbroken.clone()
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        self.shared.mark(kind, name)
    }

    fn continuity(&self) -> Continuity {
        self.shared.continuity.clone()
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.shared.disks[self.index(disk)].device.read_at(offset, buffer)
    }

    fn is_hole(&self, disk: DiskId, range: ByteRange) -> bool {
        let extents = self.shared.disks[self.index(disk)].device.extents(range.start..range.end());
        extents.is_ok_and(|extents| extents.iter().all(|extent| extent.kind != ExtentKind::Data))
    }
}
