//! What is planned, in quiet hours as well as in the storm: a move to the other server, for which the agent holds its
//! stream until the old server has committed everything; and a restart of the agent in order. Nothing is lost and no gap
//! opens, unless something else goes wrong meanwhile.

use replication::SequenceNumber;

use super::{Fault, SECOND, World};
use crate::source::Maintenance;

/// How long a move may wait for the old server's last commit.
const PATIENCE_NS: u64 = 20 * SECOND;
/// What is planned is judged by itself if nothing else happened this long before it: what a link that stalls may cause is
/// in the vault by then.
const QUIET_BEFORE_NS: u64 = 15 * SECOND;
/// And this long after it.
const QUIET_AFTER_NS: u64 = 5 * SECOND;

/// A move under way.
pub(super) struct Moving {
    since: u64,
}

/// What is planned for a quiet hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    Move,
    Restart,
}

/// An hour in which nothing happens by itself.
pub(super) struct Quiet {
    until: u64,
    begins: u64,
    plan: Option<Plan>,
}

/// Something planned that nothing else may have disturbed so far.
pub(super) struct Planned {
    what: Plan,
    at: u64,
    /// What the stream had reached. A gap that begins before it opened earlier, and came to light late.
    through: SequenceNumber,
    misfortunes: usize,
}

impl World {
    /// Whether a move is under way: who plans one does not do it under full load.
    pub(super) fn is_moving(&self) -> bool {
        self.moving.is_some()
    }

    /// Whether nothing happens by itself now.
    pub(super) fn is_quiet(&self) -> bool {
        self.quiet.as_ref().is_some_and(|quiet| self.time.now() < quiet.until)
    }

    /// A quiet hour, with something in its middle.
    pub(super) fn plan(&mut self, plan: Plan) {
        let now = self.time.now();
        if !self.is_away() && self.decision.is_none() && self.closed.is_none() {
            let begins = now + QUIET_BEFORE_NS + SECOND;
            self.quiet = Some(Quiet { until: begins + PATIENCE_NS, begins, plan: Some(plan) });
        }
    }

    pub(super) fn begin_move(&mut self) {
        if self.moving.is_none() && self.source.is_plugged() && self.source.is_in_service() && !self.is_away() {
            self.source.hold(true);
            self.moving = Some(Moving { since: self.time.now() });
        }
    }

    pub(super) fn step_planned(&mut self) {
        let now = self.time.now();
        if let Some(quiet) = self.quiet.as_mut().filter(|quiet| now >= quiet.begins)
            && let Some(plan) = quiet.plan.take()
        {
            match plan {
                Plan::Move => self.begin_move(),
                Plan::Restart => drop(self.restart_agent(Maintenance::Nothing)),
            }
        }
        let Some(moving) = &self.moving else { return };
        if self.source.is_plugged() && !self.source.is_drained() && now < moving.since + PATIENCE_NS {
            return;
        }
        self.moving = None;
        if self.source.is_plugged() && self.source.is_drained() {
            self.count(Fault::MovedDrained);
            let through = self.source.journaled();
            self.source.unplug();
            self.assigned = 1 - self.assigned;
            self.talked_to[self.assigned] = true;
            self.done_as_planned(Plan::Move, through);
        }
        self.source.hold(false);
    }

    /// Something planned was done, with the stream at `through` and nothing to heal.
    pub(super) fn done_as_planned(&mut self, what: Plan, through: SequenceNumber) {
        let now = self.time.now();
        // The first replication is a gap of its own.
        let begun = now > QUIET_BEFORE_NS && !self.gaps_seen.is_empty();
        let quiet = begun && self.misfortunes.last().is_none_or(|last| last.at_ns + QUIET_BEFORE_NS < now);
        self.planned = quiet.then_some(Planned { what, at: now, through, misfortunes: self.misfortunes.len() });
        if let Some(quiet) = &mut self.quiet {
            quiet.until = quiet.until.min(now + QUIET_AFTER_NS + 8 * SECOND);
        }
    }

    /// Judges what was planned last, given where the gaps begin that were recorded since.
    pub(super) fn judge_planned(&mut self, new_gaps: &[SequenceNumber]) -> Result<(), String> {
        let Some(planned) = &self.planned else { return Ok(()) };
        let what = planned.what;
        if planned.misfortunes < self.misfortunes.len() {
            self.planned = None;
        } else if new_gaps.iter().any(|after| *after >= planned.through) {
            return Err(format!("a {what:?} in order opened a gap although nothing else happened"));
        } else if planned.at + QUIET_AFTER_NS < self.time.now() {
            self.planned = None;
            *match what {
                Plan::Move => &mut self.undisturbed.moves,
                Plan::Restart => &mut self.undisturbed.restarts,
            } += 1;
        }
        Ok(())
    }
}
