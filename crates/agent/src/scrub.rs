//! Scrub: the source is compared with the vault, part by part, again and again. What to compare next, what was found, and
//! what is remembered of it.
//!
//! A *round* goes through every disk; a *stretch* is what is compared at a time (`replication::sender`). What somebody wrote
//! to meanwhile is compared again with the next stretches, [`ATTEMPTS_MAX`] times in all, and then called busy.
//!
//! Invariant: what is remembered as equal was equal at the position remembered, and a finding is durable before anybody is
//! told of it, so that the points it puts in question are not forgotten with the agent.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use replication::geometry::LEAF_BYTES;
use replication::sender::{SUSPICIONS_MAX, ScrubFinding, ScrubOutcome, Suspicion};
use replication::{ByteRange, ChainId, DiskGeometry, DiskId, Ranges, Reach, SequenceNumber};
use serde::{Deserialize, Serialize};
use world::{Monotonic, WallTime};

use crate::heal_pace::{HealLimits, HealPace};

pub mod compared;
pub mod memory;

use compared::Known;
use memory::{Memory, Round};

/// How often a place is looked at that is written to meanwhile.
const ATTEMPTS_MAX: u8 = 3;
/// How much is read in a stretch: what the pace gives in so long.
const STRETCH_SECONDS: u64 = 10;
/// Smallest and largest stretch in bytes.
const STRETCH_BYTES_MIN: u64 = 1 << 20;
const STRETCH_BYTES_MAX: u64 = 1 << 30;
/// After so many stretches of a disk that differ, all of it is taken for different.
const DIVERGENT_STRETCHES_MAX: u32 = 16;
/// Pause after a stretch that was given up.
const PAUSE: Duration = Duration::from_secs(2);
/// What was compared is remembered durably so often.
const REMEMBER_EVERY: Duration = Duration::from_secs(60);
const DAY_NS: u64 = 86_400_000_000_000;

/// How often and how fast disks are scrubbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubSettings {
    /// A round begins so many days after the last one ended. 0: only when asked for.
    pub every_days: u32,
    /// Mebibytes of disk read a second, at most.
    pub read_mib_per_s: u32,
}

impl Default for ScrubSettings {
    fn default() -> ScrubSettings {
        ScrubSettings { every_days: 30, read_mib_per_s: 8 }
    }
}

/// Keeps what is known of comparisons across restarts.
pub trait ScrubRecord: Send {
    /// What was kept; `None` if nothing was, or it cannot be used.
    fn load(&self) -> Option<Memory>;

    /// Makes it durable.
    ///
    /// # Errors
    /// It is not.
    fn store(&mut self, memory: &Memory) -> io::Result<()>;
}

/// What scrubs have done since this agent started, and how the round under way goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScrubProgress {
    /// A round is under way.
    pub running: bool,
    /// Bytes of disk that it goes through, and how far it has come.
    pub round_bytes: u64,
    /// See `round_bytes`.
    pub round_done_bytes: u64,
    /// Bytes found equal.
    pub same_bytes: u64,
    /// Bytes found to differ.
    pub differing_bytes: u64,
    /// Bytes that were written to each time they were looked at.
    pub busy_bytes: u64,
    /// Bytes that the vault knows no hash of (written in parts of 4 KiB), or that were discarded.
    pub untold_bytes: u64,
    /// Bytes that the source could not return.
    pub unreadable_bytes: u64,
    /// Rounds that ended, since the record began.
    pub rounds: u64,
    /// When the latest round ended, in nanoseconds since 1970; 0 if none did.
    pub ended_ns: u64,
    /// When the part of the disks that was not compared for the longest time was last found equal, in nanoseconds since
    /// 1970; 0 if part of them never was.
    pub oldest_ns: u64,
}

/// What differs for certain, and when it was last known not to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub ranges: Ranges,
    /// `None` if it never was.
    pub since: Option<Known>,
}

/// See the module's documentation.
pub struct Scrubber {
    settings: ScrubSettings,
    memory: Memory,
    record: Box<dyn ScrubRecord>,
    /// The stretch under way, and how often each part was looked at before.
    current: Vec<(DiskId, ByteRange, u8)>,
    /// To be looked at before the round goes on.
    again: VecDeque<(DiskId, ByteRange, u8)>,
    stretch_bytes: u64,
    not_before: Monotonic,
    remembered: Monotonic,
    unremembered: bool,
    progress: ScrubProgress,
    pace: HealPace,
}

impl Scrubber {
    /// A scrubber that goes on with what `record` holds.
    pub fn new(settings: ScrubSettings, record: Box<dyn ScrubRecord>, wall: WallTime) -> Scrubber {
        let memory = record.load().unwrap_or_else(|| Memory::new(wall));
        let bytes_per_s = u64::from(settings.read_mib_per_s) << 20;
        let limits = HealLimits {
            // The pace counts by another million.
            heal_read_mb_per_s_max: u32::try_from(bytes_per_s.div_ceil(1_000_000)).ok(),
            heal_busy_percent_max: None,
        };
        Scrubber {
            settings,
            memory,
            record,
            current: Vec::new(),
            again: VecDeque::new(),
            stretch_bytes: (bytes_per_s * STRETCH_SECONDS).clamp(STRETCH_BYTES_MIN, STRETCH_BYTES_MAX),
            not_before: Monotonic(0),
            remembered: Monotonic(0),
            unremembered: false,
            progress: ScrubProgress::default(),
            pace: HealPace::new(limits),
        }
    }

    /// What is not known to be noted in the vault.
    pub fn suspicions(&self) -> &[Suspicion] {
        &self.memory.suspicions
    }

    /// How fast disks are read.
    pub fn pace(&mut self) -> &mut HealPace {
        &mut self.pace
    }

    /// Whether a stretch should begin.
    pub fn wants(&self, now: Monotonic, wall: WallTime) -> bool {
        now >= self.not_before
            && self.current.is_empty()
            && self.memory.suspicions.len() < SUSPICIONS_MAX
            && (self.memory.round.is_some() || self.is_due(wall))
    }

    fn is_due(&self, wall: WallTime) -> bool {
        let every = u64::from(self.settings.every_days) * DAY_NS;
        every > 0 && wall.0 >= self.memory.ended.0.saturating_add(every)
    }

    /// Begins a round through `disks`. `false` if one is under way: that one goes on.
    pub fn begin(&mut self, disks: &[DiskGeometry], wall: WallTime) -> bool {
        if self.memory.round.is_some() {
            return false;
        }
        let disks: Vec<DiskId> = disks.iter().filter(|disk| disk.size_bytes > 0).map(|disk| disk.disk).collect();
        self.memory.round = Some(Round { began: wall, whole: true, disks, at: 0, divergent: 0 });
        (self.not_before, self.unremembered) = (Monotonic(0), true);
        true
    }

    /// Begins a round through one disk, after which the next round of all comes when it would have come.
    pub fn begin_disk(&mut self, disk: &DiskGeometry, wall: WallTime) -> bool {
        let begins = self.begin(std::slice::from_ref(disk), wall);
        if let Some(round) = self.memory.round.as_mut().filter(|_| begins) {
            round.whole = false;
        }
        begins
    }

    /// What to compare next of disks that have these sizes; nothing at the end of a round. A round begins if none is under way.
    pub fn next(&mut self, chain: ChainId, disks: &[DiskGeometry], wall: WallTime) -> Vec<(DiskId, ByteRange)> {
        self.memory.follow(chain);
        self.begin(disks, wall);
        let size = |id| disks.iter().find(|disk| disk.disk == id).map(|disk| disk.size_bytes);
        let mut left = self.stretch_bytes;
        while left >= LEAF_BYTES
            && let Some((disk, range, attempts)) = self.again.pop_front()
        {
            let end = size(disk).unwrap_or(0).min(range.end());
            let Some(range) = ByteRange::between(range.start, end) else { continue };
            let part = ByteRange::new(range.start, range.len.min(left / LEAF_BYTES * LEAF_BYTES));
            if let Some(rest) = ByteRange::between(part.end(), range.end()) {
                self.again.push_front((disk, rest, attempts));
            }
            left -= part.len;
            self.current.push((disk, part, attempts));
        }
        while left >= LEAF_BYTES
            && let Some(round) = &mut self.memory.round
            && let Some(disk) = round.disks.first().copied()
        {
            let end = size(disk).unwrap_or(0).min(round.at.saturating_add(left / LEAF_BYTES * LEAF_BYTES));
            match ByteRange::between(round.at, end) {
                Some(range) => {
                    // The last leaf of a disk may be shorter than the others.
                    round.at = range.end().next_multiple_of(LEAF_BYTES);
                    left -= range.len;
                    self.current.push((disk, range, 0));
                }
                None => round.next_disk(),
            }
        }
        if self.current.is_empty() {
            self.end_round(wall);
        }
        self.current.iter().map(|(disk, range, _)| (*disk, *range)).collect()
    }

    fn end_round(&mut self, wall: WallTime) {
        let Some(round) = self.memory.round.take() else { return };
        if round.whole {
            self.memory.ended = wall;
            self.memory.rounds += 1;
        }
        let ScrubProgress { same_bytes, differing_bytes, busy_bytes, untold_bytes, .. } = self.progress;
        tracing::info!(same_bytes, differing_bytes, busy_bytes, untold_bytes, "a scrub has come to its end");
        self.remember(None);
    }

    /// The stretch was given up: it is compared again, after a pause.
    pub fn given_up(&mut self, now: Monotonic, why: &str) {
        tracing::debug!(why, "a stretch was not compared to its end");
        for part in self.current.drain(..).rev() {
            self.again.push_front(part);
        }
        self.stretch_bytes = (self.stretch_bytes / 2).max(STRETCH_BYTES_MIN);
        self.not_before = now.plus(PAUSE);
    }

    /// The stretch was compared. What differs has to be healed.
    pub fn compared(&mut self, outcome: &ScrubOutcome, disks: &[DiskGeometry], wall: WallTime) -> Option<Found> {
        let stretch = std::mem::take(&mut self.current);
        let full = (u64::from(self.settings.read_mib_per_s) << 20) * STRETCH_SECONDS;
        self.stretch_bytes = (self.stretch_bytes * 2).min(full.clamp(STRETCH_BYTES_MIN, STRETCH_BYTES_MAX));
        self.memory.follow(outcome.chain);
        // Before this stretch's own results are remembered.
        let found = self.judge(outcome, disks);
        let known = Known { behind: outcome.behind, wall };
        for (disk, range) in outcome.of(ScrubFinding::Same) {
            self.memory.compared(disk).set(range, known);
        }
        for (disk, busy) in outcome.of(ScrubFinding::Busy) {
            let within = stretch.iter().filter(|(of, ..)| *of == disk);
            for (part, attempts) in within.filter_map(|(_, part, past)| Some((part.intersection(busy)?, past + 1))) {
                match attempts < ATTEMPTS_MAX {
                    true => self.again.push_back((disk, part, attempts)),
                    false => self.progress.busy_bytes += part.len,
                }
            }
        }
        self.progress.same_bytes += outcome.bytes_of(ScrubFinding::Same);
        self.progress.differing_bytes += outcome.bytes_of(ScrubFinding::Differs);
        self.progress.untold_bytes += outcome.bytes_of(ScrubFinding::Untold);
        self.progress.unreadable_bytes += outcome.bytes_of(ScrubFinding::Unreadable);
        self.unremembered = true;
        found
    }

    fn judge(&mut self, outcome: &ScrubOutcome, disks: &[DiskGeometry]) -> Option<Found> {
        let mut ranges = Ranges::of(outcome.of(ScrubFinding::Differs));
        let (first, _) = ranges.iter().next()?;
        let round = self.memory.round.as_mut();
        let often = round.is_some_and(|round| {
            round.divergent += 1;
            round.divergent > DIVERGENT_STRETCHES_MAX
        });
        if often && let Some(disk) = disks.iter().find(|disk| disk.disk == first) {
            // A stretch after the other would be healed, each with a gap of its own: this disk is another one.
            ranges = ranges.union(&Ranges::of(disk.range().map(|whole| (first, whole))));
            self.again.retain(|(of, ..)| *of != first);
            let is_next = |round: &&mut Round| round.disks.first() == Some(&first);
            if let Some(round) = self.memory.round.as_mut().filter(is_next) {
                round.next_disk();
            }
        }
        let known: Vec<_> = ranges.iter().map(|(disk, range)| self.memory.compared(disk).oldest(range)).collect();
        let since = known.into_iter().min_by_key(|known| known.map(|known| known.behind)).flatten();
        Some(Found { ranges, since })
    }

    /// A heal has compared, and made equal, what `reach` says: as it was at `behind`.
    pub fn healed(
        &mut self,
        chain: ChainId,
        reach: &Reach,
        behind: SequenceNumber,
        disks: &[DiskGeometry],
        wall: WallTime,
    ) {
        self.memory.follow(chain);
        let ranges = match reach {
            Reach::Ranges(ranges) => ranges.clone(),
            Reach::Machine => Ranges::of(disks.iter().filter_map(|disk| Some((disk.disk, disk.range()?)))),
        };
        for (disk, range) in ranges.iter() {
            self.memory.compared(disk).set(range, Known { behind, wall });
        }
        self.remember(None);
    }

    /// What was found, as it is told until the vault says so of its points. Durable on return, if it can be.
    pub fn suspect(&mut self, found: Found, chain: ChainId, until: SequenceNumber, wall: WallTime) -> Suspicion {
        let since = match found.since {
            Some(known) => format!("last known to be equal at {}", known.wall),
            None => "never compared before".to_owned(),
        };
        let suspicion = Suspicion {
            id: self.memory.next_id(wall),
            chain,
            after: found.since.map_or(SequenceNumber(0), |known| known.behind).min(SequenceNumber(until.0 - 1)),
            until,
            ranges: found.ranges,
            cause: format!("suspect: a scrub found it to differ from the source at {wall}; {since}"),
        };
        tracing::warn!(ranges = %suspicion.ranges, since, "a scrub has found source and vault to differ; it is healed");
        self.memory.suspicions.push(suspicion.clone());
        self.remember(None);
        suspicion
    }

    /// The vault says so, or nobody needs to.
    pub fn noted(&mut self, id: u64) {
        self.memory.suspicions.retain(|known| known.id != id);
        self.remember(None);
    }

    /// Keeps what is known, if it is time.
    pub fn remember(&mut self, now: Option<Monotonic>) {
        let is_time = now.is_none_or(|now| self.unremembered && now >= self.remembered.plus(REMEMBER_EVERY));
        if !is_time {
            return;
        }
        self.remembered = now.unwrap_or(self.remembered);
        self.unremembered = false;
        if let Err(error) = self.record.store(&self.to_remember()) {
            tracing::warn!(%error, "what scrubs have compared could not be recorded: a restart forgets it");
            self.unremembered = true;
        }
    }

    /// A round goes on with what was not looked at yet, as if the stretch under way had not begun.
    fn to_remember(&self) -> Memory {
        let mut memory = self.memory.clone();
        let waiting = self.current.iter().chain(&self.again).find(|(_, _, attempts)| *attempts == 0);
        if let (Some((disk, part, _)), Some(round)) = (waiting, &mut memory.round) {
            if round.disks.first() != Some(disk) {
                round.disks.insert(0, *disk);
                (round.at, round.divergent) = (part.start, 0);
            }
            round.at = round.at.min(part.start);
        }
        memory
    }

    /// For status and metrics.
    pub fn progress(&self, disks: &[DiskGeometry]) -> ScrubProgress {
        let (mut round_bytes, mut left) = (0, 0);
        if let Some(round) = &self.memory.round {
            let named = disks.iter().filter(|disk| round.whole || round.disks.contains(&disk.disk));
            round_bytes = named.map(|disk| disk.size_bytes).sum();
            left = round.left_bytes(disks)
                + self.again.iter().chain(&self.current).map(|(_, part, _)| part.len).sum::<u64>();
        }
        let oldest = disks.iter().filter_map(|disk| Some((disk.disk, disk.range()?)));
        let oldest = oldest.map(|(disk, range)| self.memory.oldest(disk, range).map_or(0, |known| known.wall.0)).min();
        ScrubProgress {
            running: self.memory.round.is_some(),
            round_bytes,
            round_done_bytes: round_bytes.saturating_sub(left),
            rounds: self.memory.rounds,
            ended_ns: if self.memory.rounds == 0 { 0 } else { self.memory.ended.0 },
            oldest_ns: oldest.unwrap_or(0),
            ..self.progress
        }
    }
}

#[cfg(test)]
mod tests;
