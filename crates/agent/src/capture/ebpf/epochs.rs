//! Epoch slots: which maps are whose, and how what they name moves into the heal set.

use std::sync::atomic::{AtomicU8, Ordering, fence};

use replication::Epoch;
use replication::maps::DirtyMap;

use super::EbpfCapture;
use super::layout::{self, Control, Cpu, SLOTS};

impl EbpfCapture {
    pub(super) fn unstreamed_in(&self, slot: usize) -> u64 {
        self.sum(Cpu::UNSTREAMED + 8 * slot)
    }

    pub(super) fn map(&self, map: usize, slot: usize) -> DirtyMap<'_> {
        let place = &self.disks[&slot].place;
        let start = map * self.shape.map_cells as usize + place.first_cell as usize;
        let cells = self.installed.dirty.cells(start..start + place.cells() as usize);
        DirtyMap::new(cells, place.scale(), place.bytes)
    }

    pub(super) fn occupants(&self) -> impl Iterator<Item = (usize, Epoch)> + '_ {
        (0..SLOTS).filter_map(|slot| Some((slot, self.installed.ledger.occupant(slot)?)))
    }

    /// Whether nothing that was submitted in this slot's epoch is under way any more.
    pub(super) fn is_still(&self, slot: usize) -> bool {
        // Ends first: a bio that begins and ends between the two readings must not hide another.
        let completed = self.sum(Cpu::COMPLETED + 8 * slot);
        self.sum(Cpu::SUBMITTED + 8 * slot) == completed
    }

    /// Moves everything that `slot` names into the heal set and frees it. Nobody marks in it any more.
    pub(super) fn fold_slot(&self, slot: usize) {
        for &disk in self.disks.keys() {
            for map in [uncommitted(slot), unstreamed(slot)] {
                self.map(0, disk).merge(self.map(map, disk));
            }
            if self.whole_flag(slot, disk).load(Ordering::SeqCst) != 0 {
                self.require_whole_index(disk);
            }
        }
        // Set before clear: from here on the heal set names it all.
        fence(Ordering::SeqCst);
        self.empty_slot(slot);
    }

    pub(super) fn empty_slot(&self, slot: usize) {
        for &disk in self.disks.keys() {
            self.map(uncommitted(slot), disk).clear();
            self.map(unstreamed(slot), disk).clear();
            self.whole_flag(slot, disk).store(0, Ordering::SeqCst);
        }
        self.installed.ledger.set_marks_before(slot, self.unstreamed_in(slot));
        // Free only when empty: the next occupant must not inherit marks.
        self.installed.ledger.occupy(slot, None);
    }

    pub(super) fn whole_flag(&self, slot: usize, disk: usize) -> &AtomicU8 {
        let at = Control::WHOLE + slot * layout::DISKS_MAX + disk;
        &self.installed.control.cells(at..at + 1)[0]
    }

    pub(super) fn require_whole_index(&self, disk: usize) {
        let ledger = &self.installed.ledger;
        ledger.set_whole(ledger.whole() | 1 << disk);
    }

    pub(super) fn marked_unstreamed(&self, slot: usize) -> bool {
        self.unstreamed_in(slot) != self.installed.ledger.marks_before(slot)
    }
}

pub(super) fn uncommitted(slot: usize) -> usize {
    1 + 2 * slot
}

pub(super) fn unstreamed(slot: usize) -> usize {
    2 + 2 * slot
}

pub(super) fn slot_of(epoch: Epoch) -> usize {
    epoch.0 as usize % SLOTS
}
