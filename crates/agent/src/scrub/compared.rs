//! Which parts of a disk were last found equal to the vault, and when.

use replication::{ByteRange, SequenceNumber};
use world::WallTime;

/// Parts of one disk that are told apart at most. Beyond, neighbours are taken for as old as the older one.
pub const SEGMENTS_MAX: usize = 96;

/// A comparison without a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// At this position the vault holds what the source held.
    pub behind: SequenceNumber,
    /// When that was found.
    pub wall: WallTime,
}

impl Known {
    fn older(self, other: Known) -> Known {
        Known { behind: self.behind.min(other.behind), wall: self.wall.min(other.wall) }
    }
}

/// One disk: parts that were found equal, in order, disjoint. What lies between them never was.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Compared {
    segments: Vec<(ByteRange, Known)>,
}

impl Compared {
    /// The parts as they were kept; `None` if they are not in order.
    pub fn of(segments: Vec<(ByteRange, Known)>) -> Option<Compared> {
        let ordered = segments.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start);
        (ordered && segments.len() <= SEGMENTS_MAX).then_some(Compared { segments })
    }

    /// The parts.
    pub fn segments(&self) -> &[(ByteRange, Known)] {
        &self.segments
    }

    /// `range` was found equal.
    pub fn set(&mut self, range: ByteRange, known: Known) {
        let mut kept = Vec::with_capacity(self.segments.len() + 2);
        for (part, old) in self.segments.drain(..) {
            kept.extend(ByteRange::between(part.start, part.end().min(range.start)).map(|before| (before, old)));
            kept.extend(ByteRange::between(part.start.max(range.end()), part.end()).map(|after| (after, old)));
        }
        let at = kept.partition_point(|(part, _)| part.start < range.start);
        kept.insert(at, (range, known));
        kept.dedup_by(|next, last| {
            let joins = last.0.end() == next.0.start && last.1 == next.1;
            last.0.len += if joins { next.0.len } else { 0 };
            joins
        });
        self.segments = kept;
        while self.segments.len() > SEGMENTS_MAX {
            self.shrink();
        }
    }

    /// Joins the neighbours whose difference costs least; where none touch, forgets the smallest part.
    fn shrink(&mut self) {
        let pairs = self.segments.windows(2).enumerate().filter(|(_, pair)| pair[0].0.end() == pair[1].0.start);
        let nearest = pairs.min_by_key(|(_, pair)| {
            let (newer, older) = if pair[0].1.behind > pair[1].1.behind { (0, 1) } else { (1, 0) };
            let behind = pair[newer].1.behind.0 - pair[older].1.behind.0;
            u128::from(behind.max(1)) * u128::from(pair[newer].0.len)
        });
        match nearest.map(|(index, _)| index) {
            Some(index) => {
                let (next, known) = self.segments.remove(index + 1);
                let (part, own) = &mut self.segments[index];
                part.len += next.len;
                *own = own.older(known);
            }
            None => {
                let smallest = self.segments.iter().enumerate().min_by_key(|(_, (part, _))| part.len);
                if let Some((index, _)) = smallest {
                    self.segments.remove(index);
                }
            }
        }
    }

    /// When all of `range` was last known to be equal; `None` if part of it never was.
    pub fn oldest(&self, range: ByteRange) -> Option<Known> {
        let mut at = range.start;
        let mut oldest: Option<Known> = None;
        for (part, known) in self.segments.iter().filter(|(part, _)| part.overlaps(range)) {
            if part.start > at {
                return None;
            }
            at = part.end();
            oldest = Some(oldest.map_or(*known, |oldest| oldest.older(*known)));
        }
        oldest.filter(|_| at >= range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UNITS: u64 = 1500;

    fn known(behind: u64) -> Known {
        Known { behind: SequenceNumber(behind), wall: WallTime(behind * 3) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Against one number for each unit: never later than it was, and exact while there is room.
        #[test]
        fn what_is_remembered_is_never_newer_than_what_was(
            steps in prop::collection::vec((0..UNITS, 1..40u64, any::<bool>()), 1..700),
            probes in prop::collection::vec((0..UNITS, 1..200u64), 20),
        ) {
            let mut compared = Compared::default();
            let mut oracle = vec![None; UNITS as usize];
            let mut overflowed = false;
            for (number, (start, len, wide)) in (1u64..).zip(steps) {
                let len = (if wide { len * 20 } else { len }).min(UNITS - start);
                compared.set(ByteRange::new(start * 4096, len * 4096), known(number));
                oracle[start as usize..(start + len) as usize].fill(Some(number));
                overflowed |= compared.segments().len() == SEGMENTS_MAX;
                prop_assert!(Compared::of(compared.segments().to_vec()).is_some());
            }
            for (start, len) in probes {
                let len = len.min(UNITS - start);
                let expected = oracle[start as usize..(start + len) as usize].iter().min().copied().flatten();
                let found = compared.oldest(ByteRange::new(start * 4096, len * 4096)).map(|known| known.behind.0);
                prop_assert!(found <= expected, "{found:?} of {expected:?}");
                prop_assert!(overflowed || found == expected, "{found:?} of {expected:?}");
            }
        }
    }

    #[test]
    fn many_parts_are_few_in_memory() {
        let mut compared = Compared::default();
        for number in 0..10_000u64 {
            compared.set(ByteRange::new(number * 4096, 4096), known(number + 1));
        }
        assert!(compared.segments().len() <= SEGMENTS_MAX);
        assert!(compared.oldest(ByteRange::new(0, 10_000 * 4096)).is_some());
        // A round later everything is as new as the round.
        (0..10u64).for_each(|part| compared.set(ByteRange::new(part * 4_096_000, 4_096_000), known(90_000 + part)));
        assert_eq!(compared.oldest(ByteRange::new(0, 40_960_000)), Some(known(90_000)));
    }
}
