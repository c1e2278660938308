//! What people do to a machine: they restart its agent in order, add a disk, take one away, let one grow, or use one
//! meanwhile.
//!
//! The agent that comes goes on with the stream: no gap of the machine opens, and what joins is lacking until its own
//! heal has ended. Points are offered meanwhile, and the judge looks at what they do not lack. Points behind a removal do not
//! have the disk, and no gap opens for it.

use super::drain::Plan;
use super::{Fault, SECOND, World};
use crate::source::Maintenance;

/// How long an agent may take to send what it has.
const FINISH_LIMIT_NS: u64 = 5 * SECOND;

impl World {
    /// Perhaps somebody restarts the agent.
    pub(super) fn begin_maintenance(&mut self) {
        let wish = match self.rng.below(10) {
            0..=1 => Maintenance::Nothing,
            2..=4 => Maintenance::Add,
            5..=6 => Maintenance::Grow,
            7 => Maintenance::Use,
            _ => Maintenance::Remove,
        };
        if self.source.can(wish) {
            self.restart_agent(wish);
        }
    }

    /// Has the agent end in order; whether there was one that could.
    pub(super) fn restart_agent(&mut self, meanwhile: Maintenance) -> bool {
        !self.is_away() && !self.is_moving() && self.source.stop_in_order(FINISH_LIMIT_NS, meanwhile)
    }

    /// Notes how the agent ended, if it did. What has to be healed as a whole needs no gap for what joins.
    pub(super) fn note_restart(&mut self) {
        let Some(ended) = self.source.take_ended() else { return };
        self.count(Fault::AgentRestarted);
        let joins = match ended.then {
            Maintenance::Nothing => None,
            Maintenance::Remove => {
                self.count(Fault::DiskRemoved);
                None
            }
            Maintenance::Add => Some(Fault::DiskAdded),
            Maintenance::Grow => Some(Fault::DiskGrown),
            Maintenance::Use => Some(Fault::DiskUsedMeanwhile),
        };
        if matches!(ended.then, Maintenance::Add | Maintenance::Remove | Maintenance::Grow) {
            // Of other disks.
            self.snapshot = None;
        }
        if let Some(joins) = joins {
            self.count(joins);
        }
        match &ended.kept {
            Some(lacking) if lacking.is_empty() => joins.into_iter().for_each(|fault| self.may_open_gap(fault)),
            Some(_) => [Some(Fault::AgentRestarted), joins].into_iter().flatten().for_each(|fault| {
                self.may_open_gap(fault);
            }),
            None => self.may_open_gap(Fault::AgentRestarted),
        }
        if ended.kept.is_some_and(|lacking| lacking.is_empty()) && joins.is_none() {
            self.done_as_planned(Plan::Restart, ended.through);
        }
    }
}
