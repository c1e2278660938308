//! Gaps: what of the machine cannot be opened, from which position on, until which heal ends it.
//!
//! A gap of the whole machine withholds points. One of ranges lets them be offered, labelled as lacking these ranges: a
//! disk that joins, an area that was grown into, a write that failed. Both are noted in the journal in stream order and
//! closed by a heal whose `p0` lies behind them.

use replication::cut::{CutPlanner, PointTime};
use replication::{ByteRange, DiskGeometry, DiskId, Ranges, Reach, SequenceNumber};
use vault::manifest::{Gap, GapScope};

use super::Pipeline;
use crate::ingest::{GAP_NOTE, GapNote};
use crate::journal::Record;

/// A gap that no heal has ended yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenGap {
    /// The last change before it.
    pub(super) after: SequenceNumber,
    /// As the vault names it; with `after` its identity.
    pub(super) scope: GapScope,
}

impl OpenGap {
    pub(super) fn of_machine(after: SequenceNumber) -> OpenGap {
        OpenGap { after, scope: GapScope::Machine }
    }

    pub(super) fn of(gap: &Gap) -> OpenGap {
        OpenGap { after: gap.after, scope: gap.scope.clone() }
    }

    fn is_of_machine(&self) -> bool {
        self.scope == GapScope::Machine
    }

    /// Whether none of its disks is there any more: no heal reads them.
    fn is_of_removed(&self, disks: &[DiskGeometry]) -> bool {
        let is_there = |disk: &DiskId| disks.iter().any(|known| known.disk == *disk);
        matches!(&self.scope, GapScope::Disks(lacking) if !lacking.iter().any(is_there))
    }

    /// Whether a heal of `reach` from `p0` on ends it.
    pub(super) fn is_ended_by(&self, p0: SequenceNumber, reach: &Reach, disks: &[DiskGeometry]) -> bool {
        self.after < p0
            && !self.is_of_removed(disks)
            && match reach {
                Reach::Machine => true,
                Reach::Ranges(healed) => !self.is_of_machine() && healed.covers(&ranges_of(&self.scope, disks)),
            }
    }
}

/// What a scope names, as ranges; nothing for the whole machine.
pub(super) fn ranges_of(scope: &GapScope, disks: &[DiskGeometry]) -> Ranges {
    let whole = |disk: &DiskId| {
        let known = disks.iter().find(|known| known.disk == *disk)?;
        Some((*disk, ByteRange::between(0, known.size_bytes)?))
    };
    match scope {
        GapScope::Machine => Ranges::default(),
        GapScope::Disks(lacking) => Ranges::of(lacking.iter().filter_map(whole)),
        GapScope::Ranges(ranges) => Ranges::of(ranges.iter().copied()),
    }
}

/// How the vault names what a break reaches: whole disks by their number.
fn scope_of(reach: Reach, disks: &[DiskGeometry]) -> GapScope {
    let Reach::Ranges(ranges) = reach else { return GapScope::Machine };
    let is_whole = |(disk, range): (DiskId, ByteRange)| {
        disks.iter().any(|known| known.disk == disk && range.start == 0 && range.len == known.size_bytes)
    };
    if ranges.iter().all(is_whole) {
        return GapScope::Disks(ranges.iter().map(|(disk, _)| disk).collect());
    }
    GapScope::Ranges(ranges.iter().collect())
}

impl Pipeline {
    /// Whether points are withheld until a heal ends.
    pub(super) fn is_in_gap(&self) -> bool {
        self.open_gaps.iter().any(OpenGap::is_of_machine)
    }

    /// The ranges of the gaps that withhold no points.
    pub(super) fn lacking(&self) -> Ranges {
        self.ranges_of_gaps(|_| true)
    }

    fn ranges_of_gaps(&self, which: impl Fn(&OpenGap) -> bool) -> Ranges {
        let chosen = self.open_gaps.iter().filter(|gap| which(gap));
        Ranges::of(chosen.flat_map(|gap| ranges_of(&gap.scope, self.disks()).iter().collect::<Vec<_>>()))
    }

    /// The disks as the sender described them last, or as the vault knows them.
    pub(super) fn disks(&self) -> &[DiskGeometry] {
        if self.announced.is_empty() { &self.geometries } else { &self.announced }
    }

    pub(super) fn open_gap(&mut self, at: SequenceNumber, reach: Reach, time: PointTime, cause: String) {
        let scope = match &reach {
            Reach::Machine => {
                self.planner = CutPlanner::default();
                if self.is_in_gap() {
                    return;
                }
                GapScope::Machine
            }
            Reach::Ranges(ranges) => {
                // A sender tells of what it lacks on each new link.
                if self.ranges_of_gaps(|gap| gap.after <= at).covers(ranges) {
                    return;
                }
                scope_of(reach, self.disks())
            }
        };
        let after = match &scope {
            GapScope::Machine => at.max(self.pending.cuts.last().map_or(SequenceNumber(0), |cut| cut.sequence)),
            _ => at,
        };
        self.open_gaps.push(OpenGap { after, scope: scope.clone() });
        self.pending.gaps_opened.push(Gap { after, scope, time, cause, until: None });
        self.touch();
    }

    /// Disks that the sender does not name any more stay in the vault as they were; points from here on say so. One that
    /// comes back joins like a new one, and its heal ends the gap.
    pub(super) fn label_removed(&mut self, time: PointTime) {
        let at = self.journaled;
        let removed = self.geometries.iter().map(|known| known.disk);
        let removed = removed.filter(|disk| !self.announced.iter().any(|named| named.disk == *disk));
        for scope in removed.map(|disk| GapScope::Disks(vec![disk])).collect::<Vec<_>>() {
            if self.open_gaps.iter().any(|gap| gap.scope == scope) {
                continue;
            }
            self.open_gaps.push(OpenGap { after: at, scope: scope.clone() });
            let cause = "the disk is no longer protected: it holds what it held then".to_owned();
            self.pending.gaps_opened.push(Gap { after: at, scope, time, cause, until: None });
            self.touch();
        }
    }

    /// Point time may stand still for a while after a clock jumped back, so it alone identifies nothing.
    pub(super) fn knows_gap(&self, at: SequenceNumber, time: PointTime, reach: &Reach) -> bool {
        self.known_gaps.iter().any(|(after, opened, scope)| {
            let same = match reach {
                Reach::Machine => *scope == GapScope::Machine,
                Reach::Ranges(ranges) => ranges_of(scope, self.disks()).covers(ranges),
            };
            same && *opened == time && *after >= at
        })
    }

    pub(super) fn note_gap(&self, at: SequenceNumber, time: PointTime, cause: &str) {
        let bytes = GapNote { at, reach: Reach::Machine, time, cause: cause.to_owned() }.encode();
        let record = Record::Note { chain: self.chain, kind: GAP_NOTE, bytes };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, "a gap could not be noted in the journal");
        }
    }
}
