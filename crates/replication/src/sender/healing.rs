//! Heals and map epochs as the sender runs them: from the rotation that gives a heal its `p0` to the commit that clears the
//! maps.

use super::{Action, ClosingEpoch, Heal, Link, Sender, SenderConfig, StreamState};
use crate::change::{ChangeKind, HealId};
use crate::geometry::ByteRange;
use crate::heal::HealRun;
use crate::position::{DiskId, Epoch};
use crate::reach::Reach;
use crate::wire::OfferHashes;

impl Sender {
    pub(super) fn rotated(&mut self, epoch: Option<Epoch>, out: &mut Vec<Action>) {
        let Some(epoch) = epoch else { return };
        if let Heal::Rotating = self.heal {
            // p0 is assigned here, before any request of the new epoch was consumed: all of them lie above it.
            self.heals_started += 1;
            let heal = HealId(self.heals_started);
            self.append(ChangeKind::HealStart { heal }, DiskId(0), self.now, false, None);
            let p0 = self.assigned;
            self.p0 = p0;
            // A stream that is whole goes on: writes of older epochs keep their place in it, above p0 if need be. None
            // of them lies in the ranges of this heal, or it lies below what was consumed.
            if matches!(self.stream, StreamState::Whole) {
                self.reach = Reach::Ranges(self.lacking.for_heal());
            } else {
                self.reach = Reach::Machine;
                self.drop_older_than = epoch;
            }
            self.closing = ClosingEpoch::None;
            self.heal = Heal::Settling { heal, p0, epoch };
            if self.whole_needed {
                out.push(Action::RequireWhole);
            }
            out.push(Action::AwaitSettled(epoch));
        } else if matches!(self.closing, ClosingEpoch::None) {
            let closed = Epoch(epoch.0 - 1);
            self.closing = ClosingEpoch::Settling { epoch: closed };
            self.epoch_opened_for_scrub(epoch);
            out.push(Action::AwaitSettled(epoch));
        }
    }

    pub(super) fn settled(&mut self, epoch: Epoch, producer: u64, out: &mut Vec<Action>) {
        match self.heal {
            Heal::Settling { heal, p0, epoch: waiting } if waiting == epoch => {
                self.heal = Heal::Collecting { heal, p0 };
                out.push(Action::CollectHealSet(epoch));
            }
            _ => {
                if let ClosingEpoch::Settling { epoch: closed } = self.closing
                    && closed.next() == epoch
                {
                    self.closing = ClosingEpoch::Consuming { epoch: closed, until: producer };
                    self.epoch_consumed(out);
                }
            }
        }
    }

    pub(super) fn epoch_consumed(&mut self, out: &mut Vec<Action>) {
        if let ClosingEpoch::Consuming { epoch, until } = self.closing
            && self.consumed >= until
        {
            self.closing = ClosingEpoch::Committing { epoch, through: self.newest_change() };
            self.clear_closed_epoch(out);
        }
    }

    pub(super) fn clear_closed_epoch(&mut self, out: &mut Vec<Action>) {
        if let (ClosingEpoch::Committing { epoch, through }, Some(chain)) = (&self.closing, self.chain)
            && self.committed >= *through
            && matches!(self.stream, StreamState::Whole)
        {
            let (epoch, through, committed) = (*epoch, *through, self.committed);
            self.cleared = Some((chain, committed));
            out.push(Action::ClearEpoch { epoch, chain, committed });
            self.closing = ClosingEpoch::None;
            self.older_epochs_committed(epoch.next(), through, out);
        }
    }

    pub(super) fn heal_set(&mut self, set: Vec<(DiskId, Vec<ByteRange>)>) {
        let Heal::Collecting { heal, p0 } = self.heal else { return };
        if !matches!(self.link, Link::Up { .. }) {
            return;
        }
        // Points of everything else are offered meanwhile: a heal of ranges must not touch it.
        let set = match &self.reach {
            Reach::Machine => set,
            Reach::Ranges(ranges) => ranges.by_disk(),
        };
        let names = match &self.config.hashes {
            OfferHashes::Plain => None,
            OfferHashes::Keyed(key) => Some(key.clone()),
        };
        let SenderConfig { heal_chunk_bytes, heal_window_bytes, .. } = self.config;
        let run = HealRun::new(heal, p0, set, self.base_empty, names, heal_chunk_bytes, heal_window_bytes);
        self.progress = run.progress();
        self.heal = Heal::Running(Box::new(run));
        // From now on the receiver holds something, even if this heal does not end.
        self.base_empty = false;
    }

    pub(super) fn heal_committed(&mut self, heal: HealId, out: &mut Vec<Action>) {
        if let Heal::Ended { heal: ended, end } = self.heal
            && ended == heal
            && let Some(chain) = self.chain
        {
            self.committed = self.committed.max(end);
            self.heal = Heal::Idle;
            self.heal_attempts = 0;
            // A heal of the machine by its maps has looked at nothing else.
            if std::mem::take(&mut self.whole_needed) || self.reach != Reach::Machine {
                out.push(Action::Compared { behind: self.p0, reach: self.reach.clone() });
            }
            self.steady_from = self.steady_from.max(end);
            self.lacking.healed(self.p0);
            if self.lacking.wants_heal() {
                // The heal set may name what failed since: it is kept for the heal that follows, after a pause, since
                // what keeps failing would keep being healed.
                self.heal = Heal::Wanted;
                self.want_heal_again(true);
                return;
            }
            self.inherited = None;
            self.cleared = Some((chain, self.committed));
            out.push(Action::ClearHealSet { chain, committed: self.committed });
        }
    }

    /// What an earlier run's maps named is committed, and no heal is needed for it.
    pub(super) fn clear_inherited(&mut self, out: &mut Vec<Action>) {
        if let (Some(through), Some(chain)) = (self.inherited, self.chain)
            && self.committed >= through
            && matches!((&self.stream, &self.heal), (StreamState::Whole, Heal::Idle))
        {
            self.inherited = None;
            self.cleared = Some((chain, self.committed));
            out.push(Action::ClearHealSet { chain, committed: self.committed });
        }
    }
}
