//! What goes wrong, and how often.

use vault::Store;

use crate::files::PowerCut;

use super::drain::Plan;
use super::{Fault, SECOND, World};

impl World {
    /// Perhaps something goes wrong.
    pub(super) fn misfortune(&mut self) {
        let draw = self.rng.below(6000);
        // What befalls the machine needs a machine.
        if self.is_quiet() || self.is_away() && matches!(draw, 0..=52 | 77..=79 | 84..=90) {
            return;
        }
        match draw {
            0..=19 => {
                self.strike(Fault::LinkLost);
                self.source.unplug();
            }
            20..=39 => {
                self.strike(Fault::LinkStalled);
                let stall = self.rng.below(4 * SECOND);
                if let Some(link) = self.source.link() {
                    link.stall(stall);
                }
            }
            40..=43 => {
                self.strike(Fault::AgentKilled);
                self.source.kill_agent();
            }
            44..=46 => {
                self.strike(Fault::SourcePowerCut);
                self.source.power_cut();
            }
            47..=48 => self.revert_source(),
            49..=51 if self.source.is_in_service() => {
                self.strike(Fault::WriteFailed);
                self.source.fail_a_write();
                // What a failed write left is for nobody to say, so no other write may follow before the agent has seen
                // it: the model knows one answer only.
                self.source.step();
            }
            52 if self.source.is_in_service() => {
                self.count(Fault::SectorUnreadable);
                self.source.break_sector();
            }
            53..=57 => {
                self.strike(Fault::ServerKilled);
                self.servers[self.assigned].kill();
            }
            58..=60 => {
                self.strike(Fault::ServerPowerCut);
                self.servers[self.assigned].power_cut();
            }
            61..=62 => {
                self.strike(Fault::ServerLost);
                self.servers[self.assigned].lose();
            }
            63..=65 => {
                self.strike(Fault::ServerSuspended);
                let until = self.time.now() + self.rng.below(40 * SECOND);
                self.suspended_until[self.assigned] = until;
            }
            66..=69 => {
                // The old server is alive, or asleep with work in its hands, and does not know.
                self.strike(Fault::MovedByForce);
                self.source.unplug();
                if self.rng.one_in(2) {
                    self.suspended_until[self.assigned] = self.time.now() + self.rng.below(30 * SECOND);
                }
                self.assigned = 1 - self.assigned;
                self.talked_to[self.assigned] = true;
            }
            70..=71 => {
                self.count(Fault::VaultPowerCut);
                self.vault_files.power_cycle(PowerCut::LoseAll);
            }
            72..=73 => self.garbage(),
            74..=76 => {
                self.count(Fault::ServerClockJump);
                self.wall_errors = true;
                let error = self.rng.below(120 * SECOND) as i64 - 60 * SECOND as i64;
                self.servers[self.assigned].clock().set_wall_error(error);
            }
            77 => {
                self.count(Fault::SourceClockJump);
                let error = self.rng.below(3600 * SECOND) as i64;
                self.source.clock.set_wall_error(error);
            }
            80..=83 => self.begin_move(),
            84 => self.plan(Plan::Move),
            85 => self.plan(Plan::Restart),
            86..=90 => self.begin_maintenance(),
            78..=79 => self.snapshot = Some(self.source.snapshot()),
            _ => {}
        }
    }

    /// Counts a fault that may cost continuity.
    pub(super) fn strike(&mut self, fault: Fault) {
        self.count(fault);
        self.may_open_gap(fault);
    }

    fn revert_source(&mut self) {
        if let Some(images) = self.snapshot.take() {
            self.strike(Fault::SourceReverted);
            self.source.revert(&images);
        }
    }

    /// Somebody without keys puts objects into the vault, some where the next manifest would go.
    fn garbage(&mut self) {
        self.count(Fault::Garbage);
        let Some(chain) = self.chain() else { return };
        let number = u64::MAX - self.rng.below(2000);
        let name = format!("chains/{chain}/m/{number:016x}-{:032x}", u128::from(self.rng.draw()));
        let mut bytes = vec![0; self.rng.below(2000) as usize];
        self.rng.fill(&mut bytes);
        if let Ok(name) = vault::ObjectName::new(&name) {
            let _ = self.store.create(&name, &[bytes.into()]);
        }
    }
}
