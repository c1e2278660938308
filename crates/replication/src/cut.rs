//! Cuts: the positions at which a chain can be opened, and the point time that labels them.
//!
//! The cut labelled T holds exactly the requests with point time before T. It is closed when a request with time ≥ T
//! arrives or when the source proves that it has none before T; until then nobody can know that it is complete.

use crate::change::{Change, ChangeKind, MarkerKind, SourceTime};
use crate::position::SequenceNumber;

/// Nanoseconds since 1970-01-01 UTC as the receiver assigned them: never decreasing along a chain, whatever the clocks
/// of source and receiver do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PointTime(pub u64);

const SECOND: u64 = 1_000_000_000;

impl PointTime {
    /// The next whole second after this moment.
    pub fn next_second(self) -> PointTime {
        PointTime((self.0 / SECOND + 1).saturating_mul(SECOND))
    }
}

/// Why a position can be opened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CutKind {
    /// The end of a second in which something was written.
    Second,
    /// A marker in the stream.
    Marker {
        /// What it promises.
        kind: MarkerKind,
        /// What people call it.
        name: String,
    },
    /// A heal ended here: the first openable position after a gap.
    HealEnd,
    /// The last position before the stream broke or its writer changed.
    GenerationEnd,
}

/// A position at which the chain can be opened.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Every change up to and including this one is part of the point.
    pub sequence: SequenceNumber,
    /// Its label. Everything submitted before this moment is included.
    pub time: PointTime,
    /// Why it exists.
    pub kind: CutKind,
}

/// Turns source time into point time: an offset measured at each handshake, and never backwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointClock {
    offset: i128,
    last: PointTime,
}

impl PointClock {
    /// A clock for a session in which the source's clock read `source` when the receiver's wall clock read `wall`,
    /// on a chain whose newest point time is `last`.
    pub fn new(source: SourceTime, wall: PointTime, last: PointTime) -> PointClock {
        PointClock { offset: i128::from(wall.0) - i128::from(source.0), last }
    }

    /// A later reading of both clocks. A message that was long on its way makes the offset too large, never too small,
    /// so the smallest seen is the best.
    pub fn observe(&mut self, source: SourceTime, wall: PointTime) {
        self.offset = self.offset.min(i128::from(wall.0) - i128::from(source.0));
    }

    /// The newest point time given out.
    pub fn last(&self) -> PointTime {
        self.last
    }

    /// The point time of a request submitted at `source`: the running maximum of all times so far.
    pub fn stamp(&mut self, source: SourceTime) -> PointTime {
        self.last = self.last.max(self.convert(source));
        self.last
    }

    /// How far the source's clock has moved against the receiver's since the offset was measured, in nanoseconds;
    /// positive if the source now seems behind.
    pub fn skew(&self, source: SourceTime, wall: PointTime) -> i64 {
        i64::try_from(i128::from(wall.0) - i128::from(self.convert(source).0)).unwrap_or(i64::MAX)
    }

    fn convert(&self, source: SourceTime) -> PointTime {
        PointTime(u64::try_from((i128::from(source.0) + self.offset).max(0)).unwrap_or(u64::MAX))
    }
}

/// Decides where the cuts of a stream lie. Feed every change in order, times already point times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CutPlanner {
    /// The last change of a complete request that no cut includes yet, with its time.
    open: Option<(SequenceNumber, PointTime)>,
    /// The newest change of a complete request, cut or not.
    newest: Option<(SequenceNumber, PointTime)>,
    /// What the newest change says of itself, if it is a marker.
    marked: Option<(MarkerKind, String)>,
    /// A change of the same request follows.
    inside_request: bool,
}

impl CutPlanner {
    /// Takes the next change; returns the cuts that are now known, oldest first. A cut *before* `change` (the end of
    /// an earlier second) may be followed by a cut *at* `change` (a marker).
    pub fn change(&mut self, change: &Change) -> Vec<Cut> {
        let time = PointTime(change.time.0);
        let mut cuts = Vec::new();
        if !self.inside_request {
            cuts.extend(self.close_before(time));
        }
        self.inside_request = change.continues;
        if !change.continues {
            self.newest = Some((change.sequence, time));
            self.marked = None;
            if let ChangeKind::Marker { kind, name } = &change.kind {
                self.open = None;
                self.marked = Some((kind.clone(), name.clone()));
                let kind = CutKind::Marker { kind: kind.clone(), name: name.clone() };
                cuts.push(Cut { sequence: change.sequence, time, kind });
            } else {
                self.open = Some((change.sequence, time));
            }
        }
        cuts
    }

    /// The source has proved that it submitted nothing before `time` that did not arrive yet.
    pub fn proven(&mut self, time: PointTime) -> Option<Cut> {
        if self.inside_request { None } else { self.close_before(time) }
    }

    /// Closes the stream at its newest complete request: at a heal's end, a break, or the end of a generation. A heal that
    /// ends with a marker ends with that marker's point. Where a second or a marker ended, nothing else does: the label of
    /// a second lies behind its last request, so another cut there would go back in time.
    pub fn close(&mut self, kind: CutKind) -> Option<Cut> {
        let is_cut = self.open.take().is_none();
        let (sequence, time) = self.newest?;
        if is_cut && kind == CutKind::GenerationEnd {
            return None;
        }
        let kind = match (kind, &self.marked) {
            (CutKind::HealEnd, Some((kind, name))) => CutKind::Marker { kind: kind.clone(), name: name.clone() },
            (kind, _) => kind,
        };
        Some(Cut { sequence, time, kind })
    }

    fn close_before(&mut self, time: PointTime) -> Option<Cut> {
        let (sequence, newest) = self.open?;
        let label = newest.next_second();
        if time < label {
            return None;
        }
        self.open = None;
        Some(Cut { sequence, time: label, kind: CutKind::Second })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::ByteRange;
    use crate::position::DiskId;
    use proptest::prelude::*;

    fn zero(sequence: u64, time: u64, continues: bool) -> Change {
        Change {
            sequence: SequenceNumber(sequence),
            time: SourceTime(time),
            disk: DiskId(0),
            continues,
            kind: ChangeKind::Zero { range: ByteRange::new(0, 512) },
        }
    }

    proptest! {
        /// Whatever arrives, the cut labelled T includes a request exactly if its time is before T.
        #[test]
        fn a_cut_holds_exactly_what_came_before_its_label(
            steps in prop::collection::vec((0u64..3_000_000_000, any::<bool>(), any::<bool>()), 1..60)
        ) {
            let mut clock = PointClock::new(SourceTime(0), PointTime(7 * SECOND), PointTime(0));
            let mut planner = CutPlanner::default();
            let mut requests: Vec<(SequenceNumber, PointTime)> = Vec::new();
            let mut cuts = Vec::new();
            let mut source = 0u64;
            let mut sequence = 0;
            for (delta, backwards, long) in steps {
                source = if backwards { source.saturating_sub(delta / 4) } else { source + delta };
                let time = clock.stamp(SourceTime(source));
                if long {
                    sequence += 1;
                    cuts.extend(planner.change(&zero(sequence, time.0, true)));
                }
                sequence += 1;
                cuts.extend(planner.change(&zero(sequence, time.0, false)));
                requests.push((SequenceNumber(sequence), time));
            }
            cuts.extend(planner.proven(clock.last().next_second()));
            for cut in &cuts {
                for (last_change, time) in &requests {
                    prop_assert_eq!(*time < cut.time, *last_change <= cut.sequence, "{:?} {:?}", cut, requests);
                }
            }
            prop_assert_eq!(cuts.last().map(|cut| cut.sequence), Some(SequenceNumber(sequence)));
            prop_assert!(cuts.is_sorted_by(|a, b| a.sequence < b.sequence && a.time < b.time));
        }
    }

    /// A stream that breaks in silence breaks behind the point that its last second is: no second label, and none before it.
    #[test]
    fn a_break_behind_a_cut_makes_no_other() {
        let mut planner = CutPlanner::default();
        planner.change(&zero(1, SECOND + 7, false));
        let second = Cut { sequence: SequenceNumber(1), time: PointTime(2 * SECOND), kind: CutKind::Second };
        assert_eq!(planner.proven(PointTime(2 * SECOND + 1)), Some(second));
        assert_eq!(planner.close(CutKind::GenerationEnd), None);
        planner.change(&zero(2, 2 * SECOND + 9, false));
        let end = Cut { sequence: SequenceNumber(2), time: PointTime(2 * SECOND + 9), kind: CutKind::GenerationEnd };
        assert_eq!(planner.close(CutKind::GenerationEnd), Some(end));
        assert_eq!(planner.close(CutKind::GenerationEnd), None);
        // A heal ends where it ends, whatever was cut there inside its gap.
        assert!(planner.close(CutKind::HealEnd).is_some());
    }
}
