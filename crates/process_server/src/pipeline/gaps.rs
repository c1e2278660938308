//! Gaps: what of the machine cannot be opened, from which position on, until which heal ends it.
//!
//! A gap of the whole machine withholds points. One of ranges lets them be offered, labelled as lacking these ranges: a
//! disk that joins, an area that was grown into, a write that failed. Both are noted in the journal in stream order and
//! closed by a heal whose `p0` lies behind them.

use bytes::Bytes;
use replication::cut::{CutPlanner, PointTime};
use replication::{ByteRange, DiskGeometry, DiskId, Ranges, Reach, SequenceNumber};
use vault::manifest::{Gap, GapClosed, GapScope, GeometryChange};

use super::Pipeline;
use crate::journal::{NoteKind, Record};
use crate::notes::{DISKS_NOTE, DisksNote, GAP_NOTE, GapNote};

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

    /// Whether a heal of `reach` from `p0` on ends it.
    pub(super) fn is_ended_by(&self, p0: SequenceNumber, reach: &Reach, disks: &[DiskGeometry]) -> bool {
        self.after < p0
            && match reach {
                Reach::Machine => true,
                Reach::Ranges(healed) => !self.is_of_machine() && healed.covers(&ranges_of(&self.scope, disks)),
            }
    }
}

/// What a scope names of these disks, as ranges; nothing for the whole machine.
pub(super) fn ranges_of(scope: &GapScope, disks: &[DiskGeometry]) -> Ranges {
    let whole = |disk: &DiskId| {
        let known = disks.iter().find(|known| known.disk == *disk)?;
        Some((*disk, ByteRange::between(0, known.size_bytes)?))
    };
    match scope {
        GapScope::Machine => Ranges::default(),
        GapScope::Disks(lacking) => Ranges::of(lacking.iter().filter_map(whole)),
        GapScope::Ranges(ranges) => {
            let is_there = |disk: DiskId| disks.iter().any(|known| known.disk == disk);
            Ranges::of(ranges.iter().copied().filter(|(disk, _)| is_there(*disk)))
        }
    }
}

/// How the vault names what a break reaches: whole disks by their number.
pub(super) fn scope_of(reach: Reach, disks: &[DiskGeometry]) -> GapScope {
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

    /// Whether a gap hides what lies at `at`. Where it begins is a point still.
    pub(super) fn is_hidden(&self, at: SequenceNumber) -> bool {
        self.open_gaps.iter().any(|gap| gap.is_of_machine() && gap.after < at)
    }

    /// What is lacking of the disks that a sender names: the ranges of gaps that withhold no points, and disks that are not
    /// known here, or not any more.
    pub fn lacking_of(&self, named: &[DiskGeometry]) -> Ranges {
        let gaps = self.open_gaps.iter().flat_map(|gap| ranges_of(&gap.scope, named).iter().collect::<Vec<_>>());
        let is_known = |disk: DiskId| self.geometries.iter().any(|known| known.disk == disk);
        let unknown = named.iter().filter(|disk| !is_known(disk.disk));
        let unknown = unknown.filter_map(|disk| Some((disk.disk, ByteRange::between(0, disk.size_bytes)?)));
        Ranges::of(gaps.chain(unknown))
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
                // A sender tells of what it lacks on each new link. What it lacks again behind the start of a heal is
                // another gap: that heal may have read before, and ends the earlier one.
                if self.ranges_of_gaps(|gap| gap.after <= at && gap.after >= self.heal_begun).covers(ranges) {
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

    /// Disks that the sender does not name any more end here: points behind this position do not have them, those before do.
    /// One that comes back joins like a new one.
    pub(super) fn note_removed(&mut self, at: SequenceNumber, time: PointTime) {
        let disks: Vec<DiskId> = self.announced.iter().map(|named| named.disk).collect();
        if self.geometries.iter().all(|known| disks.contains(&known.disk)) {
            // One may have come back at the very place where it left.
            if std::mem::take(&mut self.removal_noted) {
                self.journal_note(DISKS_NOTE, Bytes::new());
            }
            return;
        }
        let note = DisksNote { at, time, disks };
        self.journal_note(DISKS_NOTE, note.encode());
        self.removal_noted = true;
        self.remove_disks(&note);
    }

    /// Ends the disks that `note` does not name: as they leave, or as a restart finds it in the journal.
    pub(super) fn remove_disks(&mut self, note: &DisksNote) {
        let removed: Vec<_> = self.geometries.extract_if(.., |known| !note.disks.contains(&known.disk)).collect();
        if removed.is_empty() {
            return;
        }
        // What only they lacked, nobody misses behind here.
        let stay = self.disks();
        let is_over = |gap: &OpenGap| !gap.is_of_machine() && ranges_of(&gap.scope, stay).is_empty();
        let (over, open): (Vec<_>, Vec<_>) = self.open_gaps.iter().cloned().partition(is_over);
        self.open_gaps = open;
        let close =
            |OpenGap { after, scope }| GapClosed { after, scope, until: note.at.max(after).next(), time: note.time };
        self.pending.gaps_closed.extend(over.into_iter().map(close));
        for geometry in removed {
            tracing::info!(disk = %geometry.disk, position = %note.at, "the disk is not protected any more");
            self.pending.geometries.push(GeometryChange { sequence: note.at, geometry: geometry.into_removal() });
        }
        self.touch();
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
        self.journal_note(GAP_NOTE, bytes);
    }

    fn journal_note(&self, kind: NoteKind, bytes: Bytes) {
        let record = Record::Note { chain: self.chain, kind, bytes };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, ?kind, "what has to outlive a kill could not be noted in the journal");
        }
    }
}
