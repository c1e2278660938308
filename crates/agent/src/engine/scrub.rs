//! Scrub as the engine runs it: begins stretches while nothing else goes on, reads for them slowly, and has healed what
//! differs.

use replication::sender::{Event, ScrubOutcome};
use replication::wire::OfferedLeaf;
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, Reach, SequenceNumber};

use super::{Engine, OUTBOX_MESSAGES_MAX, holes};
use crate::capture::Capture;
use crate::scrub::{Found, ScrubProgress, Scrubber};

/// The send buffer may be filled to this part of it while a scrub reads.
const RING_PART_MAX: u64 = 8;

/// Why a scrub that was asked for does not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubRefusal {
    /// The capture does not know what is written meanwhile.
    Unsupported,
    /// One is under way.
    UnderWay,
    /// No such disk.
    NoDisk,
}

impl<C: Capture> Engine<C> {
    /// Scrubs with `scrubber` from now on. What an earlier run found, and nobody is known to have noted, is told again.
    pub fn set_scrub(&mut self, scrubber: Scrubber) {
        if self.hashes.is_some() || !self.capture.knows_writes() {
            return;
        }
        let untold = scrubber.suspicions().to_vec();
        self.scrub = Some(scrubber);
        untold.into_iter().for_each(|suspicion| self.feed(Event::Suspected(suspicion)));
    }

    /// Begins a round now, through one disk or all of them. How many bytes it goes through.
    ///
    /// # Errors
    /// [`ScrubRefusal`].
    pub fn begin_scrub(&mut self, disk: Option<DiskId>) -> Result<u64, ScrubRefusal> {
        let disks: Vec<DiskGeometry> =
            self.capture.disks().into_iter().filter(|known| disk.is_none_or(|disk| known.disk == disk)).collect();
        let wall = self.clock.wall();
        let Some(scrub) = &mut self.scrub else { return Err(ScrubRefusal::Unsupported) };
        let begun = match (disk, &disks[..]) {
            (None, _) => scrub.begin(&disks, wall),
            (Some(_), [disk]) => scrub.begin_disk(disk, wall),
            (Some(_), _) => return Err(ScrubRefusal::NoDisk),
        };
        if begun { Ok(disks.iter().map(|disk| disk.size_bytes).sum()) } else { Err(ScrubRefusal::UnderWay) }
    }

    /// How scrubs go; `None` if the capture cannot be scrubbed.
    pub fn scrub_progress(&self) -> Option<ScrubProgress> {
        Some(self.scrub.as_ref()?.progress(&self.capture.disks()))
    }

    /// Keeps what is known of comparisons, before the agent ends.
    pub fn remember_scrub(&mut self) {
        if let Some(scrub) = &mut self.scrub {
            scrub.remember(None);
        }
    }

    /// Begins a stretch, or reads for one, if nothing else wants to be done.
    pub(super) fn scrub_step(&mut self) -> bool {
        let now = self.clock.monotonic();
        let Some(scrub) = &mut self.scrub else { return false };
        scrub.remember(Some(now));
        let may_read =
            scrub.pace().allows(now) && self.heal_pace.allows(now) && self.outbox.len() < OUTBOX_MESSAGES_MAX;
        if !self.scrub_reads.is_empty() {
            if may_read && self.is_ring_at_rest() {
                return self.scrub_read();
            }
            return false;
        }
        let wall = self.clock.wall();
        if self.sender.is_scrubbing() || !scrub.wants(now, wall) || !self.sender.may_scrub() || !self.is_ring_at_rest()
        {
            return false;
        }
        let (Some(chain), disks) = (self.sender.chain(), self.capture.disks()) else { return false };
        let stretch = self.scrub.as_mut().map(|scrub| scrub.next(chain, &disks, wall)).unwrap_or_default();
        if stretch.is_empty() {
            return false;
        }
        self.feed(Event::Scrub(stretch));
        true
    }

    fn is_ring_at_rest(&self) -> bool {
        let status = self.capture.status();
        status.ring_bytes_used <= status.ring_bytes_max / RING_PART_MAX
    }

    /// What is read is handed on at once: the marks that explain it are looked at later.
    fn scrub_read(&mut self) -> bool {
        let Some((ask, disk, range)) = self.scrub_reads.pop_front() else { return false };
        let began = self.clock.monotonic();
        let leaves: Vec<OfferedLeaf> =
            if self.capture.is_hole(disk, range) { holes(range) } else { self.read_leaves(disk, range, true).0 };
        let ended = self.clock.monotonic();
        self.heal_pace.spent(began, ended, range.len);
        if let Some(scrub) = &mut self.scrub {
            scrub.pace().spent(began, ended, range.len);
        }
        self.feed(Event::ScrubRead { ask, leaves });
        true
    }

    pub(super) fn look_for_marks(&mut self, ask: u64, since: Epoch, disk: DiskId, range: ByteRange) {
        let marked = self.capture.written_since(since, disk, range);
        self.feed(Event::Marked { ask, marked });
    }

    pub(super) fn scrub_over(&mut self, over: Result<ScrubOutcome, &'static str>) {
        self.scrub_reads.clear();
        let (now, wall, disks) = (self.clock.monotonic(), self.clock.wall(), self.capture.disks());
        let Some(scrub) = &mut self.scrub else { return };
        match over {
            Err(why) => scrub.given_up(now, why),
            Ok(outcome) => {
                if let Some(found) = scrub.compared(&outcome, &disks, wall) {
                    self.diverged(found);
                }
            }
        }
    }

    /// First it is written down, then the maps name it, then it is told: whatever ends this run in between, it is healed and
    /// its points are put in question.
    fn diverged(&mut self, found: Found) {
        let [assigned, ..] = self.sender.watermarks();
        let (Some(chain), Some(scrub)) = (self.sender.chain(), &mut self.scrub) else { return };
        let suspicion = scrub.suspect(found, chain, assigned.next(), self.clock.wall());
        for (disk, range) in suspicion.ranges.iter() {
            self.capture.require(disk, range);
        }
        self.feed(Event::Diverged(suspicion));
    }

    pub(super) fn healed(&mut self, behind: SequenceNumber, reach: &Reach) {
        let disks = self.capture.disks();
        if let (Some(chain), Some(scrub)) = (self.sender.chain(), &mut self.scrub) {
            scrub.healed(chain, reach, behind, &disks, self.clock.wall());
        }
    }

    pub(super) fn suspicion_noted(&mut self, id: u64) {
        if let Some(scrub) = &mut self.scrub {
            scrub.noted(id);
        }
    }
}
