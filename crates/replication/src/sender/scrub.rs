//! Scrub: a stretch of the source is compared with the vault, and no data is sent. What differs for certain is for a heal.
//!
//! ```text
//! Idle ──stretch──► Wanted ──rotated──► Waiting ──all older writes committed──► Running ──all answered──► Idle
//!                      └───────────────────┴── link lost, break, heal, disk changed, too long ──┴──► Idle
//! each chunk: read ──► offered ──► answered ──► sorted by the marks of the stretch's epoch and later ones
//! ```
//!
//! A stretch has a map epoch of its own. Whatever was written in older ones is in the vault before anything is read, and
//! whatever is written since is marked before it reaches the disk. So if the source differs from the vault where nothing is
//! marked, and the marks are looked at after the answer has come, then no write explains it.
//!
//! Invariant: the epoch is not closed while the stretch runs, or marks would be forgotten that explain a difference.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::{Action, ClosingEpoch, Heal, Link, Sender, StreamState};
use crate::geometry::{ByteRange, LEAF_BYTES};
use crate::position::{ChainId, DiskId, Epoch, SequenceNumber};
use crate::reach::Ranges;
use crate::wire::{Message, OfferHashes, OfferedLeaf, is_wanted};

/// Chunks being read or waiting for their verdict.
const CHUNKS_IN_FLIGHT_MAX: usize = 8;
/// A stretch that takes longer is given up, in nanoseconds: the maps are not rotated meanwhile.
const STRETCH_NS_MAX: u64 = 120_000_000_000;
/// Suspicions that wait to be noted; beyond, no scrub begins.
pub const SUSPICIONS_MAX: usize = 64;

/// What a scrub found of some leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScrubFinding {
    /// Source and vault agree.
    Same,
    /// They do not, and nothing was written meanwhile.
    Differs,
    /// Something was written there meanwhile: nobody knows.
    Busy,
    /// The vault knows no hash of it, or it was discarded.
    Untold,
    /// The source cannot be read.
    Unreadable,
}

/// A stretch that was compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrubOutcome {
    /// The chain it was compared with.
    pub chain: ChainId,
    /// Where nothing but the same was found, the vault holds at this position what the source held.
    pub behind: SequenceNumber,
    /// What was found, in order; neighbours of one kind are joined.
    pub findings: Vec<(DiskId, ByteRange, ScrubFinding)>,
}

impl ScrubOutcome {
    /// Where this was found.
    pub fn of(&self, wanted: ScrubFinding) -> impl Iterator<Item = (DiskId, ByteRange)> + '_ {
        let chosen = self.findings.iter().filter(move |(_, _, finding)| *finding == wanted);
        chosen.map(|(disk, range, _)| (*disk, *range))
    }

    /// How many bytes this was found of.
    pub fn bytes_of(&self, wanted: ScrubFinding) -> u64 {
        self.of(wanted).map(|(_, range)| range.len).sum()
    }
}

/// Points that are not known to hold what the disks held, since a scrub found ranges to differ. Told until it is noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspicion {
    /// Unique among those of this machine.
    pub id: u64,
    /// The chain whose points they are.
    pub chain: ChainId,
    /// The last position at which the ranges are known to have been right.
    pub after: SequenceNumber,
    /// Behind the last position in question.
    pub until: SequenceNumber,
    /// What differs.
    pub ranges: Ranges,
    /// In words.
    pub cause: String,
}

#[derive(Debug)]
pub(super) enum Scrub {
    Idle,
    Wanted(VecDeque<(DiskId, ByteRange)>),
    Waiting { since: Epoch, planned: VecDeque<(DiskId, ByteRange)> },
    Running(Box<Run>),
}

#[derive(Debug)]
pub(super) struct Run {
    since: Epoch,
    chain: ChainId,
    behind: SequenceNumber,
    /// Given up at this time.
    until: u64,
    chunk_bytes: u64,
    planned: VecDeque<(DiskId, ByteRange)>,
    chunks: BTreeMap<u64, Chunk>,
    ready: VecDeque<Message>,
    findings: Vec<(DiskId, ByteRange, ScrubFinding)>,
}

#[derive(Debug)]
struct Chunk {
    disk: DiskId,
    range: ByteRange,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    Reading,
    Offered(Vec<OfferedLeaf>),
    Answered { leaves: Vec<OfferedLeaf>, differing: Bytes, untold: Bytes },
}

impl Scrub {
    /// Whether the maps have to be rotated for it.
    pub(super) fn wants_epoch(&self) -> bool {
        matches!(self, Scrub::Wanted(_))
    }

    /// Whether its epoch must not be closed.
    pub(super) fn holds_epoch(&self) -> bool {
        matches!(self, Scrub::Running(_))
    }
}

#[derive(Debug)]
pub(super) struct Suspicions {
    waiting: Vec<(Suspicion, bool)>,
}

impl Suspicions {
    pub(super) const NONE: Suspicions = Suspicions { waiting: Vec::new() };

    pub(super) fn link_down(&mut self) {
        self.waiting.iter_mut().for_each(|(_, told)| *told = false);
    }
}

impl Sender {
    /// Whether a stretch could be compared now: the receiver has everything, and nothing is lacking.
    pub fn may_scrub(&self) -> bool {
        matches!(self.link, Link::Up { .. })
            && matches!((&self.stream, &self.heal), (StreamState::Whole, Heal::Idle))
            && self.lacking.is_empty()
            && self.leaving.is_empty()
            && !self.held
            && self.suspicions.waiting.len() < SUSPICIONS_MAX
            && matches!(self.config.hashes, OfferHashes::Plain)
    }

    /// Whether a stretch is under way.
    pub fn is_scrubbing(&self) -> bool {
        !matches!(self.scrub, Scrub::Idle)
    }

    /// The chain that is written, if there is a session or was one.
    pub fn chain(&self) -> Option<ChainId> {
        self.chain
    }

    pub(super) fn want_scrub(&mut self, ranges: Vec<(DiskId, ByteRange)>, out: &mut Vec<Action>) {
        if self.is_scrubbing() {
            return;
        }
        if !self.may_scrub() {
            out.push(Action::ScrubOver(Err("the stream is not at rest")));
            return;
        }
        // The receiver holds no more offers than a stretch makes at a time.
        if self.scrub_unanswered > 0 {
            out.push(Action::ScrubOver(Err("answers to the stretch before are still to come")));
            return;
        }
        debug_assert!(ranges.iter().all(|(_, range)| range.start.is_multiple_of(LEAF_BYTES)), "leaves are compared");
        self.scrub = Scrub::Wanted(ranges.into());
    }

    /// Gives a stretch up that cannot be trusted any more, or takes too long.
    pub(super) fn check_scrub(&mut self, out: &mut Vec<Action>) {
        let why = match &self.scrub {
            Scrub::Idle => return,
            _ if !self.may_scrub() => "the stream did not stay at rest",
            Scrub::Running(run) if self.now.0 >= run.until => "the answers took too long",
            _ => return,
        };
        self.scrub = Scrub::Idle;
        out.push(Action::ScrubOver(Err(why)));
    }

    /// A new epoch is open, and the one before is being closed.
    pub(super) fn epoch_opened_for_scrub(&mut self, epoch: Epoch) {
        if let Scrub::Wanted(planned) = &mut self.scrub {
            self.scrub = Scrub::Waiting { since: epoch, planned: std::mem::take(planned) };
        }
    }

    /// Everything written before `since` is committed, all of it up to `behind`.
    pub(super) fn older_epochs_committed(&mut self, since: Epoch, behind: SequenceNumber, out: &mut Vec<Action>) {
        let (Scrub::Waiting { since: waiting, planned }, Some(chain)) = (&mut self.scrub, self.chain) else { return };
        if *waiting != since {
            return;
        }
        self.scrub = Scrub::Running(Box::new(Run {
            since,
            chain,
            behind,
            until: self.now.0.saturating_add(STRETCH_NS_MAX),
            chunk_bytes: self.config.heal_chunk_bytes,
            planned: std::mem::take(planned),
            chunks: BTreeMap::new(),
            ready: VecDeque::new(),
            findings: Vec::new(),
        }));
        self.end_scrub(out);
    }

    pub(super) fn pump_scrub(&mut self, out: &mut Vec<Action>) {
        let Scrub::Running(run) = &mut self.scrub else { return };
        self.scrub_unanswered += run.ready.len();
        out.extend(run.ready.drain(..).map(Action::Send));
        while run.chunks.len() < CHUNKS_IN_FLIGHT_MAX
            && let Some((disk, planned)) = run.planned.pop_front()
        {
            let end = ((planned.start / run.chunk_bytes + 1) * run.chunk_bytes).min(planned.end());
            if let Some(rest) = ByteRange::between(end, planned.end()) {
                run.planned.push_front((disk, rest));
            }
            let range = ByteRange::new(planned.start, end - planned.start);
            let ask = self.next_ask;
            self.next_ask = self.next_ask.wrapping_add(1);
            run.chunks.insert(ask, Chunk { disk, range, stage: Stage::Reading });
            out.push(Action::ReadForScrub { ask, disk, range });
        }
    }

    pub(super) fn scrub_read(&mut self, ask: u64, leaves: Vec<OfferedLeaf>) {
        let Scrub::Running(run) = &mut self.scrub else { return };
        let Some(chunk) = run.chunks.get_mut(&ask).filter(|chunk| matches!(chunk.stage, Stage::Reading)) else {
            return;
        };
        debug_assert_eq!(leaves.len() as u64, chunk.range.len.div_ceil(LEAF_BYTES), "one entry a leaf");
        let (disk, start) = (chunk.disk, chunk.range.start);
        let offer = Message::ScrubOffer { offer: ask, behind: run.behind, disk, start, leaves: leaves.clone() };
        run.ready.push_back(offer);
        chunk.stage = Stage::Offered(leaves);
    }

    /// Answers to a stretch that was given up are not answers to the next: each has its number.
    pub(super) fn scrub_verdict(&mut self, ask: u64, differing: Bytes, untold: Bytes, out: &mut Vec<Action>) {
        self.scrub_unanswered = self.scrub_unanswered.saturating_sub(1);
        let Scrub::Running(run) = &mut self.scrub else { return };
        let Some(chunk) = run.chunks.get_mut(&ask) else { return };
        let Stage::Offered(leaves) = &mut chunk.stage else { return };
        chunk.stage = Stage::Answered { leaves: std::mem::take(leaves), differing, untold };
        out.push(Action::LookForMarks { ask, since: run.since, disk: chunk.disk, range: chunk.range });
    }

    pub(super) fn marked(&mut self, ask: u64, marked: &[ByteRange], out: &mut Vec<Action>) {
        let Scrub::Running(run) = &mut self.scrub else { return };
        if !run.chunks.get(&ask).is_some_and(|chunk| matches!(chunk.stage, Stage::Answered { .. })) {
            return;
        }
        let chunk = run.chunks.remove(&ask).expect("it was just there");
        let Stage::Answered { leaves, differing, untold } = chunk.stage else { unreachable!("it was just looked at") };
        for (index, (leaf, range)) in leaves.iter().zip(chunk.range.split_at_multiples(LEAF_BYTES)).enumerate() {
            let finding = match leaf {
                _ if marked.iter().any(|marked| marked.overlaps(range)) => ScrubFinding::Busy,
                OfferedLeaf::Unreadable => ScrubFinding::Unreadable,
                OfferedLeaf::Unknown => ScrubFinding::Untold,
                _ if is_wanted(&untold, index) => ScrubFinding::Untold,
                _ if is_wanted(&differing, index) => ScrubFinding::Differs,
                _ => ScrubFinding::Same,
            };
            note(&mut run.findings, (chunk.disk, range, finding));
        }
        self.end_scrub(out);
    }

    fn end_scrub(&mut self, out: &mut Vec<Action>) {
        let Scrub::Running(run) = &mut self.scrub else { return };
        if !run.planned.is_empty() || !run.chunks.is_empty() {
            return;
        }
        let mut found = std::mem::take(&mut run.findings);
        found.sort_by_key(|(disk, range, _)| (*disk, range.start));
        let mut findings = Vec::new();
        found.into_iter().for_each(|finding| note(&mut findings, finding));
        let (chain, behind) = (run.chain, run.behind);
        self.scrub = Scrub::Idle;
        out.push(Action::ScrubOver(Ok(ScrubOutcome { chain, behind, findings })));
    }

    /// What a scrub found to differ is lacking from here on, until a heal has read it.
    pub(super) fn diverged(&mut self, suspicion: Suspicion) {
        self.lack(self.assigned, suspicion.ranges.clone(), "differs from the source, as a scrub found");
        self.suspect(suspicion);
    }

    pub(super) fn suspect(&mut self, suspicion: Suspicion) {
        self.suspicions.waiting.push((suspicion, false));
    }

    /// Once everything was sent: a suspicion is about positions that the receiver has.
    pub(super) fn tell_suspicions(&mut self, out: &mut Vec<Action>) {
        let chain = self.chain;
        for (given_up, _) in self.suspicions.waiting.extract_if(.., |(known, _)| Some(known.chain) != chain) {
            out.push(Action::SuspicionNoted(given_up.id));
        }
        for (known, told) in self.suspicions.waiting.iter_mut().filter(|(_, told)| !told) {
            *told = true;
            let Suspicion { id, after, until, ranges, cause, .. } = known.clone();
            out.push(Action::Send(Message::Suspect { id, after, until, ranges, cause }));
        }
    }

    pub(super) fn suspicion_noted(&mut self, id: u64, out: &mut Vec<Action>) {
        let before = self.suspicions.waiting.len();
        self.suspicions.waiting.retain(|(known, _)| known.id != id);
        if self.suspicions.waiting.len() < before {
            out.push(Action::SuspicionNoted(id));
        }
    }

    /// A closing epoch's changes: everything up to here. What was assigned and lies beyond the newest change is nobody's.
    pub(super) fn newest_change(&self) -> SequenceNumber {
        if self.unreleased.is_empty() { self.released } else { self.assigned }
    }

    pub(super) fn rotation_is_due(&self) -> bool {
        let is_time = self.now >= self.next_rotation && !self.scrub.holds_epoch();
        (is_time || self.scrub.wants_epoch())
            && matches!(self.closing, ClosingEpoch::None)
            && matches!((&self.stream, &self.heal), (StreamState::Whole, Heal::Idle))
    }
}

/// Joins a finding with the one before.
fn note(
    findings: &mut Vec<(DiskId, ByteRange, ScrubFinding)>,
    (disk, range, finding): (DiskId, ByteRange, ScrubFinding),
) {
    match findings.last_mut() {
        Some((last_disk, last, known)) if *last_disk == disk && *known == finding && last.end() == range.start => {
            last.len += range.len;
        }
        _ => findings.push((disk, range, finding)),
    }
}

#[cfg(test)]
mod tests;
