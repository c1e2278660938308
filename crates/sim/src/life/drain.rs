//! A planned move to the other server: the agent holds its stream until the old server has committed everything, then
//! goes on at the new one. Nothing is lost and no gap opens, unless something else goes wrong meanwhile.

use super::{Fault, SECOND, World};

/// How long a move may wait for the old server's last commit.
const PATIENCE_NS: u64 = 20 * SECOND;
/// A move is judged by itself if nothing else happened this long before it: what a link that stalls may cause is in the
/// vault by then.
const QUIET_BEFORE_NS: u64 = 15 * SECOND;
/// And this long after it.
const QUIET_AFTER_NS: u64 = 5 * SECOND;

/// A move under way.
pub(super) struct Moving {
    since: u64,
}

/// A move that nothing else may have disturbed so far.
pub(super) struct Moved {
    at: u64,
    misfortunes: usize,
}

impl World {
    /// Whether a move is under way: who plans one does not do it under full load.
    pub(super) fn is_moving(&self) -> bool {
        self.moving.is_some()
    }

    pub(super) fn begin_move(&mut self) {
        if self.moving.is_none() && self.source.is_plugged() && !self.is_away() {
            self.source.hold(true);
            self.moving = Some(Moving { since: self.time.now() });
        }
    }

    pub(super) fn step_move(&mut self) {
        let Some(moving) = &self.moving else { return };
        let now = self.time.now();
        if self.source.is_plugged() && !self.source.is_drained() && now < moving.since + PATIENCE_NS {
            return;
        }
        self.moving = None;
        if self.source.is_plugged() && self.source.is_drained() {
            self.count(Fault::MovedDrained);
            self.source.unplug();
            self.assigned = 1 - self.assigned;
            self.talked_to[self.assigned] = true;
            let quiet = self.misfortunes.last().is_none_or(|last| last.at_ns + QUIET_BEFORE_NS < now);
            self.moved = quiet.then_some(Moved { at: now, misfortunes: self.misfortunes.len() });
        }
        self.source.hold(false);
    }

    /// Judges the last move, given how many gaps were new.
    pub(super) fn judge_move(&mut self, new_gaps: usize) -> Result<(), String> {
        let Some(moved) = &self.moved else { return Ok(()) };
        if moved.misfortunes < self.misfortunes.len() {
            self.moved = None;
        } else if new_gaps > 0 {
            return Err("a drained move opened a gap although nothing else happened".into());
        } else if moved.at + QUIET_AFTER_NS < self.time.now() {
            self.moved = None;
            self.undisturbed_moves += 1;
        }
        Ok(())
    }
}
