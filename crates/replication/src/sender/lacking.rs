//! Ranges that the stream lacks while it is whole for everything else: a disk that joins, an area that was grown into, a
//! write that failed. Each is told to the receiver in its place and forgotten when a heal with a later `p0` is committed.

use crate::position::{DiskId, SequenceNumber};
use crate::reach::{Ranges, Reach};
use crate::wire::Message;

/// Breaks of ranges that may be open at once. Beyond, the whole machine is broken.
const BREAKS_MAX: usize = 8;

#[derive(Debug)]
struct RangeBreak {
    /// The last change that cannot lie after the break.
    at: SequenceNumber,
    ranges: Ranges,
    cause: String,
    /// The receiver of this link was told.
    told: bool,
    /// The disk leaves: no heal could end this, its removal does.
    leaving: bool,
}

/// The open breaks of ranges, in the order of their positions.
#[derive(Debug, Default)]
pub(super) struct Lacking {
    breaks: Vec<RangeBreak>,
}

impl Lacking {
    pub(super) fn is_empty(&self) -> bool {
        self.breaks.is_empty()
    }

    /// Whether anything waits for a heal.
    pub(super) fn wants_heal(&self) -> bool {
        self.breaks.iter().any(|known| !known.leaving)
    }

    /// What a heal has to cover.
    pub(super) fn for_heal(&self) -> Ranges {
        Ranges::of(self.breaks.iter().filter(|known| !known.leaving).flat_map(|known| known.ranges.iter()))
    }

    /// Everything that is lacked.
    pub(super) fn ranges(&self) -> Ranges {
        Ranges::of(self.breaks.iter().flat_map(|known| known.ranges.iter()))
    }

    /// Notes a break behind `at`, unless breaks at or after `since` name all of it. `false` if there are too many.
    pub(super) fn note(&mut self, at: SequenceNumber, ranges: Ranges, cause: &str, since: SequenceNumber) -> bool {
        let recent = self.breaks.iter().filter(|known| known.at >= since);
        if Ranges::of(recent.flat_map(|known| known.ranges.iter())).covers(&ranges) {
            return true;
        }
        if self.breaks.len() >= BREAKS_MAX {
            return false;
        }
        self.breaks.push(RangeBreak { at, ranges, cause: cause.to_owned(), told: false, leaving: false });
        true
    }

    /// Notes that `ranges`, all of a disk, are lacking behind `at` until the disk is forgotten. Nobody heals it any more.
    pub(super) fn leave(&mut self, at: SequenceNumber, disk: DiskId, ranges: Ranges, cause: &str) {
        self.forget(disk);
        self.breaks.push(RangeBreak { at, ranges, cause: cause.to_owned(), told: false, leaving: true });
    }

    /// The disk is not announced any more: nothing of it is missed.
    pub(super) fn forget(&mut self, disk: DiskId) {
        for known in &mut self.breaks {
            known.ranges = Ranges::of(known.ranges.iter().filter(|(of, _)| *of != disk));
        }
        self.breaks.retain(|known| !known.ranges.is_empty());
    }

    /// The position of the first break that the receiver was not told of.
    pub(super) fn next_untold(&self) -> Option<SequenceNumber> {
        self.breaks.iter().find(|known| !known.told).map(|known| known.at)
    }

    /// What tells the receiver of that break.
    pub(super) fn tell_next(&mut self, released: SequenceNumber) -> Option<Message> {
        let next = self.breaks.iter_mut().find(|known| !known.told)?;
        next.told = true;
        let reach = Reach::Ranges(next.ranges.clone());
        Some(Message::Break { at: next.at.max(released), reach, cause: next.cause.clone() })
    }

    /// Another receiver, or one that may have forgotten.
    pub(super) fn link_down(&mut self) {
        self.breaks.iter_mut().for_each(|known| known.told = false);
    }

    /// A heal with this `p0` is committed.
    pub(super) fn healed(&mut self, p0: SequenceNumber) {
        self.breaks.retain(|known| known.at >= p0 || known.leaving);
    }

    /// The whole machine is to be healed from a stream that begins anew.
    pub(super) fn clear(&mut self) {
        self.breaks.clear();
    }
}
