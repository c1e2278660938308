//! The first word to a receiver, and what becomes of the stream by its answer.

use super::{Action, Heal, Link, Sender};
use crate::geometry::DiskGeometry;
use crate::wire::{HealNeed, Hello, PROTOCOL_VERSION, Resume, Welcome};

impl Sender {
    pub(super) fn hello(&self, disks: Vec<DiskGeometry>) -> Hello {
        let resume = self.chain.map(|chain| Resume {
            chain,
            generation: self.generation,
            released: self.released,
            sent: self.assigned,
            hash: self.released_hash,
        });
        let need = match self.whole_needed {
            true => HealNeed::Whole,
            false if self.lacks_machine() => HealNeed::Maps,
            false => HealNeed::Nothing,
        };
        Hello {
            version: PROTOCOL_VERSION,
            machine: self.config.machine,
            instance: self.config.instance,
            boot: self.config.boot,
            vm_generation: self.config.vm_generation,
            name: self.config.name.clone(),
            disks,
            resume,
            need,
            cleared: self.cleared,
            now: self.now,
            started: self.config.started,
            lacking: self.lacking.ranges(),
            followed: self.followed,
        }
    }

    pub(super) fn welcomed(&mut self, welcome: Welcome, out: &mut Vec<Action>) {
        if welcome.version != PROTOCOL_VERSION {
            out.push(Action::Refused(format!("the receiver speaks protocol version {}", welcome.version)));
            return;
        }
        if !is_consistent(&welcome) {
            out.push(Action::Disconnect("the receiver's positions contradict each other".into()));
            return;
        }
        let differs = self.disagrees_about_the_past(&welcome);
        if welcome.continues {
            if differs || !self.agrees_with(&welcome) {
                // Must 7: one of the two is not what it was. Nothing about the stream can be trusted any more.
                self.lose_stream("sender and receiver disagree about the stream's past", out);
                self.whole_needed = true;
                out.push(Action::Disconnect("the stream's history differs; a full comparison follows".into()));
                return;
            }
            self.release(welcome.resume_after, out);
        } else {
            self.lose_stream("the receiver cannot continue the stream", out);
            self.whole_needed |= differs;
            self.released = welcome.resume_after;
            self.released_hash = welcome.hash;
            self.assigned = welcome.resume_after;
        }
        self.whole_needed |= welcome.need == HealNeed::Whole;
        if welcome.need != HealNeed::Nothing && !self.lacks_machine() {
            self.break_stream("the receiver lacks part of the disks".into());
            self.heal = Heal::Wanted;
        }
        self.chain = Some(welcome.chain);
        self.followed = self.chain;
        self.generation = welcome.generation;
        self.assigned = self.assigned.max(welcome.generation.base());
        self.committed = welcome.committed;
        self.base_empty = welcome.base_empty;
        self.link = Link::Up { window_bytes: welcome.window_bytes };
        self.next_proof = self.now;
    }

    fn agrees_with(&self, welcome: &Welcome) -> bool {
        if Some(welcome.chain) != self.chain || welcome.committed < self.committed {
            return false;
        }
        let hash = if welcome.resume_after == self.released {
            Some(self.released_hash)
        } else {
            self.unreleased
                .binary_search_by_key(&welcome.resume_after, |entry| entry.change.sequence)
                .ok()
                .map(|index| self.unreleased[index].hash)
        };
        hash == Some(welcome.hash)
    }
}

/// Whether numbers can go on from what a welcome says.
fn is_consistent(welcome: &Welcome) -> bool {
    welcome.committed <= welcome.resume_after
        && welcome.resume_after.generation() <= welcome.generation
        && welcome.resume_after.has_room()
}
