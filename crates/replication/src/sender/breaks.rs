//! Breaks: how the sender notices that the stream is not whole, what it tells of it and where, and what is to be healed.

use super::{Action, CaptureReport, ClosingEpoch, HEAL_PAUSE_NS, HEAL_PAUSE_NS_MAX, Heal, Link, Sender, StreamState};
use crate::change::SourceTime;
use crate::geometry::ByteRange;
use crate::position::{DiskId, Epoch, SequenceNumber};
use crate::reach::{Ranges, Reach};
use crate::wire::Message;

impl Sender {
    /// Whether the whole machine waits for a heal, or for the commit of one.
    pub(super) fn lacks_machine(&self) -> bool {
        match (&self.stream, &self.heal) {
            (StreamState::Broken { .. }, _) => true,
            (_, Heal::Idle) => false,
            (StreamState::Draining { .. }, _) => true,
            (StreamState::Whole, Heal::Wanted | Heal::Rotating) => false,
            (StreamState::Whole, _) => matches!(self.reach, Reach::Machine),
        }
    }

    /// Has ranges healed that the stream lacks behind `at`. `false` if that is too much for single ranges: then the stream
    /// is broken there as a whole, which no heal mends that has a `p0` already.
    pub(super) fn lack(&mut self, at: SequenceNumber, ranges: Ranges, cause: &str) -> bool {
        let since = match self.heal {
            Heal::Idle | Heal::Wanted | Heal::Rotating => SequenceNumber(0),
            _ => self.p0,
        };
        let at = at.max(since);
        let fits = self.lacking.note(at, ranges, cause, since);
        if !fits {
            if !matches!(self.stream, StreamState::Broken { .. }) {
                self.stream = StreamState::Broken { at, cause: format!("{cause}, too often for single ranges") };
                self.break_announced = false;
            }
            self.lacking.clear();
        }
        if matches!(self.heal, Heal::Idle) {
            self.heal = Heal::Wanted;
        }
        fits
    }

    /// An unfinished heal starts over; a break's pause grows, a lost link costs none.
    pub(super) fn want_heal_again(&mut self, pause: bool) {
        if matches!(self.heal, Heal::Idle) {
            return;
        }
        let of_machine = self.lacks_machine();
        self.heal = Heal::Wanted;
        if pause {
            self.heal_attempts = (self.heal_attempts + 1).min(16);
            let wait = (HEAL_PAUSE_NS << self.heal_attempts.min(8)).min(HEAL_PAUSE_NS_MAX);
            self.heal_not_before = SourceTime(self.now.0.saturating_add(wait));
        }
        // The link may be gone before the rotation's older requests were ever consumed: the stream they belong to
        // is judged again at the next handshake.
        if of_machine && matches!(self.stream, StreamState::Whole) {
            self.stream = StreamState::Broken { at: self.assigned, cause: "the heal was interrupted".into() };
        }
        self.want_no_needless_heal();
    }

    /// Forgets what was not journaled: the maps name it.
    pub(super) fn lose_stream(&mut self, cause: &str, out: &mut Vec<Action>) {
        self.unreleased.clear();
        self.past.forget();
        self.sent = 0;
        self.sent_bytes = 0;
        self.chain = None;
        self.closing = ClosingEpoch::None;
        // The maps name these ranges, too.
        self.lacking.clear();
        self.lose_leaving();
        self.inherited = None;
        self.break_stream(cause.into());
        // What the ring still holds belongs to the lost stream too; the coming rotation's epoch is the new start.
        self.drop_older_than = Epoch(u32::MAX);
        if matches!(self.heal, Heal::Idle) {
            self.heal = Heal::Wanted;
        }
        out.push(Action::Release(self.consumed));
    }

    pub(super) fn break_stream(&mut self, cause: String) {
        if !matches!(self.stream, StreamState::Broken { .. }) {
            self.stream = StreamState::Broken { at: self.assigned, cause };
        }
    }

    /// Where the whole machine broke, if the receiver has not been told.
    pub(super) fn untold_break(&self) -> Option<SequenceNumber> {
        match &self.stream {
            StreamState::Broken { at, .. } if !self.break_announced => Some(*at),
            _ => None,
        }
    }

    /// How many unreleased changes come before the first break that the receiver has not been told of.
    pub(super) fn changes_before_break(&self) -> usize {
        match self.untold_break().into_iter().chain(self.lacking.next_untold()).min() {
            Some(at) => self.unreleased.partition_point(|entry| entry.change.sequence <= at),
            None => self.unreleased.len(),
        }
    }

    /// Tells of the first break that the receiver was not told of, if there is one.
    pub(super) fn announce_break(&mut self, out: &mut Vec<Action>) -> bool {
        let of_machine = self.untold_break();
        if let Some(at) = of_machine
            && self.lacking.next_untold().is_none_or(|ranges| at <= ranges)
            && let StreamState::Broken { cause, .. } = &self.stream
        {
            self.break_announced = true;
            let (at, cause) = (at.max(self.released), cause.clone());
            out.push(Action::Send(Message::Break { at, reach: Reach::Machine, cause }));
            return true;
        }
        let told = self.lacking.tell_next(self.released);
        let any = told.is_some();
        out.extend(told.map(Action::Send));
        any
    }

    pub(super) fn report(&mut self, report: CaptureReport, out: &mut Vec<Action>) {
        let broke = report.gap_count != self.gap_count;
        self.gap_count = report.gap_count;
        if broke {
            let cause = report.gap_cause;
            if matches!(self.stream, StreamState::Whole)
                && matches!(self.heal, Heal::Idle | Heal::Wanted | Heal::Rotating)
            {
                self.stream = StreamState::Draining { until: report.producer, cause };
                self.break_announced = false;
                self.heal = Heal::Wanted;
            } else {
                self.abort_heal(cause, report.producer, out);
                if matches!(self.heal, Heal::Idle) {
                    self.heal = Heal::Wanted;
                }
            }
        }
        self.writes_failed(report.unstreamed, report.producer, out);
        if let StreamState::Draining { until, cause } = &self.stream
            && self.consumed >= *until
        {
            self.stream = StreamState::Broken { at: self.assigned, cause: cause.clone() };
            self.break_announced = false;
        }
        self.epoch_consumed(out);
        if let Heal::Ending { heal, target } = self.heal
            && self.consumed >= target
            && matches!(self.link, Link::Up { .. })
            && self.sent == self.unreleased.len()
            && self.lacking.next_untold().is_none()
        {
            // The gap count was read after everything up to the sampled position had been consumed. A range that failed
            // meanwhile is told first: the heal's end is a point, and must not be one without the gap that belongs to it.
            out.push(Action::Send(Message::HealEnd { heal, end: self.assigned }));
            self.heal = Heal::Ended { heal, end: self.assigned };
            self.stream = StreamState::Whole;
        }
        self.reported = self.assigned;
    }

    /// What the disk holds where a write failed, nobody knows: only a heal with a later `p0` can tell. Whatever was taken
    /// from the ring since the last look may have been written after the failure was seen.
    fn writes_failed(&mut self, ranges: Vec<(DiskId, ByteRange)>, producer: u64, out: &mut Vec<Action>) {
        let before_p0 = matches!(self.heal, Heal::Idle | Heal::Wanted | Heal::Rotating);
        let covered = before_p0 && !matches!(self.stream, StreamState::Whole);
        if ranges.is_empty() || covered {
            return;
        }
        self.lacking_until = producer;
        if !self.lack(self.reported, Ranges::of(ranges), "a write failed") {
            self.abort_heal("writes failed in too many places".into(), producer, out);
        }
    }

    fn abort_heal(&mut self, cause: String, producer: u64, out: &mut Vec<Action>) {
        let heal = match &self.heal {
            Heal::Running(run) => Some(run.heal()),
            Heal::Sampling(heal) | Heal::Ending { heal, .. } => Some(*heal),
            Heal::Collecting { .. } | Heal::Settling { .. } | Heal::Ended { .. } => None,
            Heal::Idle | Heal::Wanted | Heal::Rotating => return,
        };
        // A heal of ranges is over as well: what overlaps the new break belongs to the heal that follows.
        if let Some(heal) = heal {
            out.push(Action::Send(Message::HealAbort { heal, cause: cause.clone() }));
        }
        // Only a heal that had ended made the stream whole again. Otherwise the first break stands: the receiver may not
        // have heard of it yet, and must hear of that one.
        if matches!(self.stream, StreamState::Whole) {
            self.stream = StreamState::Draining { until: producer, cause };
            self.break_announced = false;
        }
        self.heal = Heal::Wanted;
        self.want_heal_again(true);
    }
}
