//! The sending half of replication, out and home: numbers requests, keeps them until they are journaled, and runs heals.
//!
//! Pure: [`Sender::apply`] takes what happened, [`Sender::pump`] says what to do next; the owner moves the bytes. The
//! owner feeds captured requests in ring order and answers the actions that ask for something.
//!
//! ```text
//! stream:  Whole ──drop seen──► Draining ──ring consumed up to the drop──► Broken ──heal committed──► Whole
//! heal:    Idle ► Wanted ► Rotating ► Settling ► Running ► Ending ► Ended ──committed──► Idle
//!                   ▲                                 │        │       │
//!                   └────────── link lost, stream broke again ─┴───────┘
//! scrub:   see [`ScrubOutcome`]: only while the stream is whole and no heal is wanted
//! ```
//!
//! While the stream is whole, ranges of it may be lacking (`lacking`): they are healed in the same way, but nothing older is
//! dropped, and the heal covers exactly these ranges, since points of everything else are offered meanwhile.
//!
//! Invariants: sequence numbers are assigned in ring order and never reused; a change leaves `unreleased` only when the
//! receiver has journaled it; a map epoch is cleared only when everything it names is committed; what a heal covers is
//! forgotten only when that heal, and no later one, is committed.

mod breaks;
mod disks;
mod events;
mod greeting;
mod healing;
mod lacking;
mod past;
mod resumption;
mod scrub;

use std::collections::VecDeque;

use crate::change::{Change, ChangeKind, HealId, SourceTime, StreamHash};
use crate::heal::{HealRun, HealStep};
use crate::limits;
use crate::position::{ChainId, DiskId, Epoch, Generation, SequenceNumber};
use crate::reach::{Ranges, Reach};
use crate::wire::{HealNeed, Message};

pub use events::{
    Action, CaptureReport, Event, HealProgress, KeptStream, Request, Resumption, SenderConfig, StreamState,
};
use lacking::Lacking;
use past::Past;
pub use scrub::{SUSPICIONS_MAX, ScrubFinding, ScrubOutcome, Suspicion};
use scrub::{Scrub, Suspicions};

#[derive(Debug)]
enum Link {
    Down,
    Greeting,
    Up { window_bytes: u64 },
}

#[derive(Debug)]
enum Heal {
    Idle,
    Wanted,
    Rotating,
    Settling { heal: HealId, p0: SequenceNumber, epoch: Epoch },
    Collecting { heal: HealId, p0: SequenceNumber },
    Running(Box<HealRun>),
    Sampling(HealId),
    Ending { heal: HealId, target: u64 },
    Ended { heal: HealId, end: SequenceNumber },
}

#[derive(Debug)]
struct Unreleased {
    change: Change,
    hash: StreamHash,
    /// Set on the last change of a request.
    ring_end: Option<u64>,
}

/// A closed epoch whose maps can go once `through` is committed.
#[derive(Debug)]
enum ClosingEpoch {
    None,
    Settling { epoch: Epoch },
    Consuming { epoch: Epoch, until: u64 },
    Committing { epoch: Epoch, through: SequenceNumber },
}

/// The sending half of a replication session. See the module's documentation.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    link: Link,
    stream: StreamState,
    /// Only whole-disk comparison will do.
    whole_needed: bool,
    heal: Heal,
    scrub: Scrub,
    suspicions: Suspicions,
    /// Numbers of what is compared by scrubs, never used twice.
    next_ask: u64,
    /// Offers of scrubs on this link whose verdict is out.
    scrub_unanswered: usize,
    /// What the heal that has a `p0` covers, and its `p0`.
    reach: Reach,
    p0: SequenceNumber,
    /// Ranges that are lacking although the stream is whole.
    lacking: Lacking,
    /// Disks that are not captured any more, each with the number up to which it has to be announced: journaled, nothing of
    /// it is under way.
    leaving: Vec<(DiskId, SequenceNumber)>,
    /// The ring position that must have been consumed before these ranges can be healed.
    lacking_until: u64,
    /// The newest change when the capture was last looked at.
    reported: SequenceNumber,
    /// The maps name changes of an earlier run up to here, and only those.
    inherited: Option<SequenceNumber>,
    /// Nothing more is sent: the machine is about to move to another receiver.
    held: bool,
    /// The receiver holds nothing of our disks: zeroes need not be mentioned.
    base_empty: bool,
    /// Requests of older epochs are covered by the heal and dropped: their order against dropped ones is lost.
    drop_older_than: Epoch,
    chain: Option<ChainId>,
    /// The chain of this run's newest session.
    followed: Option<ChainId>,
    generation: Generation,
    /// Newest assigned number; its hash is the last of `unreleased` or `released_hash`.
    assigned: SequenceNumber,
    released: SequenceNumber,
    released_hash: StreamHash,
    committed: SequenceNumber,
    cleared: Option<(ChainId, SequenceNumber)>,
    past: Past,
    unreleased: VecDeque<Unreleased>,
    /// How many of `unreleased` were sent in this link session, and their bytes.
    sent: usize,
    sent_bytes: u64,
    consumed: u64,
    gap_count: u64,
    break_announced: bool,
    closing: ClosingEpoch,
    next_rotation: SourceTime,
    next_proof: SourceTime,
    heal_not_before: SourceTime,
    heals_started: u64,
    heal_attempts: u32,
    now: SourceTime,
    progress: HealProgress,
    /// Newest number that a sender which begins with the ring alone could not give again: a heal's start is not in
    /// the ring.
    steady_from: SequenceNumber,
    /// The newest end of a request that is journaled: ring position, number, hash.
    journaled_end: Option<(u64, SequenceNumber, StreamHash)>,
}

/// Bytes that a change without data counts against the receiver's window.
const CHANGE_OVERHEAD_BYTES: u64 = 64;
/// Longest pause between two attempts to heal, in nanoseconds.
const HEAL_PAUSE_NS_MAX: u64 = 30_000_000_000;
/// Pause after the first failed attempt, in nanoseconds; doubles with each.
const HEAL_PAUSE_NS: u64 = 500_000_000;

impl Sender {
    /// A sender at its start. `need` is what the capture's continuity demands; `cleared` what the maps remember.
    pub fn new(
        config: SenderConfig,
        need: HealNeed,
        gap_count: u64,
        cleared: Option<(ChainId, SequenceNumber)>,
    ) -> Sender {
        assert!(config.heal_chunk_bytes.is_multiple_of(crate::geometry::GRANULE_BYTES), "chunks are whole granules");
        let stream = match need {
            HealNeed::Nothing => StreamState::Whole,
            _ => StreamState::Broken { at: SequenceNumber(0), cause: "the agent started".into() },
        };
        // An answer to another run's question, late on its way, is none to this one's.
        let run = config.instance.0.first_chunk().map_or(0, |first| u32::from_le_bytes(*first));
        Sender {
            config,
            link: Link::Down,
            stream,
            whole_needed: need == HealNeed::Whole,
            heal: if need == HealNeed::Nothing { Heal::Idle } else { Heal::Wanted },
            scrub: Scrub::Idle,
            suspicions: Suspicions::NONE,
            next_ask: u64::from(run) << 32,
            scrub_unanswered: 0,
            reach: Reach::Machine,
            p0: SequenceNumber(0),
            lacking: Lacking::default(),
            leaving: Vec::new(),
            lacking_until: 0,
            reported: SequenceNumber(0),
            inherited: None,
            held: false,
            base_empty: false,
            // Until a heal has rotated the maps, nothing that the ring holds belongs to a stream.
            drop_older_than: Epoch(if need == HealNeed::Nothing { 0 } else { u32::MAX }),
            chain: None,
            followed: None,
            generation: Generation(0),
            assigned: SequenceNumber(0),
            released: SequenceNumber(0),
            released_hash: StreamHash::default(),
            committed: SequenceNumber(0),
            cleared,
            past: Past::default(),
            unreleased: VecDeque::new(),
            sent: 0,
            sent_bytes: 0,
            consumed: 0,
            gap_count,
            break_announced: false,
            closing: ClosingEpoch::None,
            next_rotation: SourceTime(0),
            next_proof: SourceTime(0),
            heal_not_before: SourceTime(0),
            heals_started: 0,
            heal_attempts: 0,
            now: SourceTime(0),
            progress: HealProgress::default(),
            steady_from: SequenceNumber(0),
            journaled_end: None,
        }
    }

    /// A sender that goes on with what an earlier run left, whose maps name nothing but changes that this run's maps
    /// still hold. `joining` is what it finds lacking, and why: new disks, areas grown into, disks in doubt. Their
    /// descriptions come first in the ring.
    pub fn resume(
        config: SenderConfig,
        gap_count: u64,
        cleared: Option<(ChainId, SequenceNumber)>,
        kept: KeptStream,
        joining: Vec<(Ranges, String)>,
    ) -> Sender {
        let mut sender = Sender::new(config, HealNeed::Nothing, gap_count, cleared);
        sender.chain = Some(kept.chain);
        sender.generation = kept.generation;
        (sender.assigned, sender.released, sender.released_hash) = (kept.released, kept.released, kept.hash);
        (sender.reported, sender.inherited) = (kept.released, Some(kept.released));
        sender.heals_started = kept.heals_started;
        let kept = (kept.lacking, "a heal was not finished".to_owned());
        for (ranges, cause) in std::iter::once(kept).chain(joining) {
            if !ranges.is_empty() {
                sender.lack(sender.released, ranges, &cause);
            }
        }
        sender
    }

    /// What a later run could go on with: the stream is whole and everything assigned is journaled. The owner has to know
    /// that nothing is left in the ring.
    pub fn keep(&self) -> Option<KeptStream> {
        let chain = self.chain.filter(|_| self.is_whole() && self.unreleased.is_empty())?;
        Some(KeptStream {
            chain,
            generation: self.generation,
            released: self.released,
            hash: self.released_hash,
            heals_started: self.heals_started,
            lacking: self.lacking.ranges(),
        })
    }

    /// Sends nothing more (`true`), so that everything sent comes to be committed and the machine can go on at another
    /// receiver, or goes on.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether the vault holds everything that the receiver has, and the rest is here: another receiver can go on without
    /// a gap.
    pub fn is_drained(&self) -> bool {
        self.is_whole() && self.held && self.sent == 0 && self.committed >= self.released
    }

    /// Whether the receiver has everything, or will have once it was sent, but for [`Sender::lacking`].
    pub fn is_whole(&self) -> bool {
        matches!(self.stream, StreamState::Whole) && !self.lacks_machine()
    }

    /// Ranges that are lacking although the stream is whole.
    pub fn lacking(&self) -> Ranges {
        self.lacking.ranges()
    }

    /// Whether a heal is needed, under way, or not yet committed.
    pub fn is_healing(&self) -> bool {
        !matches!(self.heal, Heal::Idle)
    }

    /// Whether the receiver has everything.
    pub fn stream(&self) -> &StreamState {
        &self.stream
    }

    /// The current or last heal's progress.
    pub fn progress(&self) -> HealProgress {
        self.progress
    }

    /// The watermarks this side knows: captured (assigned), sent, journaled, committed.
    pub fn watermarks(&self) -> [SequenceNumber; 4] {
        let sent = match self.sent {
            0 => self.released,
            sent => self.unreleased[sent - 1].change.sequence,
        };
        [self.assigned, sent, self.released, self.committed]
    }

    /// Whether a heal has nothing left to read and to send, and waits for [`Event::Producer`].
    pub fn awaits_producer(&self) -> bool {
        matches!(self.heal, Heal::Sampling(_))
    }

    /// Unstreamed marks of this epoch and later ones break the stream; older ones belong to the heal or are cleared.
    pub fn watched_from(&self) -> Epoch {
        self.drop_older_than
    }

    /// Whether the link is up and everything assigned so far is journaled.
    pub fn is_quiet(&self) -> bool {
        matches!(self.link, Link::Up { .. }) && self.unreleased.is_empty()
    }

    /// Takes one event.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::LinkUp { now, disks } => {
                self.now = now;
                self.link = Link::Greeting;
                out.push(Action::Send(Message::Hello(self.hello(disks))));
            }
            Event::LinkDown => self.link_down(),
            Event::Received(message) => self.received(message, &mut out),
            Event::Captured(request) => self.captured(request, &mut out),
            Event::Passed(position) => self.consumed = self.consumed.max(position),
            Event::Report(report) => self.report(report, &mut out),
            Event::Tick { now, known } => self.tick(now, known, &mut out),
            Event::Rotated(epoch) => self.rotated(epoch, &mut out),
            Event::Settled { epoch, producer } => self.settled(epoch, producer, &mut out),
            Event::HealSet(set) => self.heal_set(set),
            Event::HealRead { disk, range, leaves, data } => {
                if let Heal::Running(run) = &mut self.heal {
                    run.read(disk, range, leaves, data);
                    self.progress = run.progress();
                }
            }
            Event::HealFetched { disk, range, data } => {
                if let Heal::Running(run) = &mut self.heal {
                    run.fetched(disk, range, data);
                }
            }
            Event::Scrub(ranges) => self.want_scrub(ranges, &mut out),
            Event::ScrubRead { ask, leaves } => self.scrub_read(ask, leaves),
            Event::Marked { ask, marked } => self.marked(ask, &marked, &mut out),
            Event::Diverged(suspicion) => self.diverged(suspicion),
            Event::Suspected(suspicion) => self.suspect(suspicion),
            Event::Joined { geometry, ranges, cause, producer } => self.joined(geometry, ranges, &cause, producer),
            Event::Leaving { geometry, cause } => self.left(geometry, &cause),
            Event::Gone(disk) => self.gone(disk),
            Event::Producer(target) => {
                if let Heal::Sampling(heal) = self.heal {
                    self.heal = Heal::Ending { heal, target };
                }
            }
        }
        self.check_scrub(&mut out);
        out
    }

    /// What can be sent or asked now. Call after feeding a round of events; stream changes come before heal work.
    pub fn pump(&mut self) -> Vec<Action> {
        let mut out = Vec::new();
        let Link::Up { window_bytes } = self.link else { return out };
        if self.held {
            return out;
        }
        // A break is told in its place: after the last change before it, before any other.
        loop {
            let end = self.changes_before_break();
            self.send_changes(window_bytes, end, &mut out);
            if self.sent < end || !self.announce_break(&mut out) {
                break;
            }
        }
        if self.sent < self.unreleased.len() {
            return out;
        }
        self.tell_suspicions(&mut out);
        self.pump_scrub(&mut out);
        let may_heal = match &self.stream {
            StreamState::Broken { .. } => true,
            StreamState::Whole => self.lacking.wants_heal() && self.consumed >= self.lacking_until,
            StreamState::Draining { .. } => false,
        };
        if let Heal::Wanted = self.heal
            && may_heal
            && self.now >= self.heal_not_before
            // Its end would close the gap of a disk that is leaving.
            && self.leaving.is_empty()
        {
            self.heal = Heal::Rotating;
            out.push(Action::Rotate { for_heal: true });
        }
        if let Heal::Running(run) = &mut self.heal {
            let mut finished = false;
            // Only now: the heal's start must have gone out with the changes before it.
            if let Some((heal, p0, planned_bytes)) = run.begin() {
                let (whole, reach, hashes) = (self.whole_needed, self.reach.clone(), self.config.hashes.clone());
                out.push(Action::Send(Message::HealBegin { heal, p0, whole, reach, hashes, planned_bytes }));
            }
            for step in run.pump() {
                match step {
                    HealStep::Read { disk, range, hash } => out.push(Action::ReadForHeal { disk, range, hash }),
                    HealStep::Fetch { disk, range } => out.push(Action::FetchForHeal { disk, range }),
                    HealStep::Send(message) => out.push(Action::Send(message)),
                    HealStep::Finished => finished = true,
                }
            }
            self.progress = run.progress();
            if finished {
                self.heal = Heal::Sampling(run.heal());
                out.push(Action::SampleProducer);
            }
        }
        out
    }

    fn link_down(&mut self) {
        self.link = Link::Down;
        self.sent = 0;
        self.sent_bytes = 0;
        self.break_announced = false;
        self.lacking.link_down();
        self.suspicions.link_down();
        self.scrub_unanswered = 0;
        self.want_heal_again(false);
    }

    fn received(&mut self, message: Message, out: &mut Vec<Action>) {
        match (message, &self.link) {
            (Message::Welcome(welcome), Link::Greeting) => self.welcomed(welcome, out),
            (Message::Refuse { reason, .. }, _) => out.push(Action::Refused(reason)),
            (Message::Ack { journaled, committed, window_bytes }, Link::Up { .. }) => {
                // What has not gone out on this link is nobody's to acknowledge: it would leave the ring and be nowhere.
                let [_, sent, ..] = self.watermarks();
                if journaled > sent || journaled < self.released || committed > journaled {
                    let reason =
                        format!("the receiver acknowledged {journaled}, committed {committed}: not what was sent");
                    out.push(Action::Disconnect(reason));
                    return;
                }
                self.link = Link::Up { window_bytes };
                self.release(journaled, out);
                self.committed = self.committed.max(committed);
                self.past.committed(self.committed);
                self.clear_closed_epoch(out);
                self.clear_inherited(out);
            }
            (Message::Ping, _) => out.push(Action::Send(Message::Pong)),
            (Message::Wants { heal, offer, wanted }, Link::Up { .. }) => {
                if let Heal::Running(run) = &mut self.heal
                    && run.heal() == heal
                    && let Err(problem) = run.wants(offer, &wanted)
                {
                    out.push(Action::Disconnect(problem.into()));
                }
            }
            (Message::HealCredit { heal, received_bytes }, Link::Up { .. }) => {
                if let Heal::Running(run) = &mut self.heal
                    && run.heal() == heal
                {
                    run.credit(received_bytes);
                }
            }
            (Message::HealCommitted { heal }, Link::Up { .. }) => self.heal_committed(heal, out),
            (Message::HealRestart { reason, .. }, Link::Up { .. }) => {
                if self.lacks_machine() {
                    self.break_stream(reason);
                }
                self.want_heal_again(true);
            }
            (Message::ScrubVerdict { offer, differing, untold }, Link::Up { .. }) => {
                self.scrub_verdict(offer, differing, untold, out);
            }
            (Message::SuspectNoted { id }, Link::Up { .. }) => self.suspicion_noted(id, out),
            (other, _) => {
                out.push(Action::Disconnect(format!("unexpected message {:?}", std::mem::discriminant(&other))))
            }
        }
    }

    fn captured(&mut self, request: Request, out: &mut Vec<Action>) {
        debug_assert!(request.ring_end > self.consumed || self.consumed == 0, "requests come in ring order");
        self.consumed = request.ring_end;
        if request.epoch < self.drop_older_than {
            // Its space is freed together with the newest change that still needs the ring, or now.
            match self.unreleased.back_mut() {
                Some(last) => last.ring_end = Some(request.ring_end),
                None => out.push(Action::Release(request.ring_end)),
            }
            return;
        }
        let pieces = request.kinds.len();
        assert!(pieces > 0, "a request has at least one piece");
        for (index, kind) in request.kinds.into_iter().enumerate() {
            let last = index + 1 == pieces;
            self.append(kind, request.disk, request.time, !last, last.then_some(request.ring_end));
        }
    }

    fn append(&mut self, kind: ChangeKind, disk: DiskId, time: SourceTime, continues: bool, ring_end: Option<u64>) {
        self.assigned = self.assigned.next();
        // What the ring does not hold, a sender that begins with the ring alone could not give again.
        if ring_end.is_none() && !continues {
            self.steady_from = self.assigned;
        }
        let change = Change { sequence: self.assigned, time, disk, continues, kind };
        let before = self.unreleased.back().map_or(self.released_hash, |entry| entry.hash);
        let hash = change.extend_hash(before);
        self.unreleased.push_back(Unreleased { change, hash, ring_end });
    }

    fn release(&mut self, through: SequenceNumber, out: &mut Vec<Action>) {
        let mut ring_end = None;
        while let Some(entry) = self.unreleased.front()
            && entry.change.sequence <= through
        {
            self.released = entry.change.sequence;
            self.released_hash = entry.hash;
            if let Some(end) = entry.ring_end {
                ring_end = Some(end);
                self.journaled_end = Some((end, self.released, self.released_hash));
            }
            if self.sent > 0 {
                self.sent -= 1;
                self.sent_bytes -= window_cost(&entry.change);
            }
            self.unreleased.pop_front();
        }
        if self.unreleased.is_empty() {
            // Includes requests that were dropped because a heal covers them.
            ring_end = Some(self.consumed);
            self.journaled_end = Some((self.consumed, self.released, self.released_hash));
        }
        out.extend(ring_end.map(Action::Release));
    }

    fn send_changes(&mut self, window_bytes: u64, end: usize, out: &mut Vec<Action>) {
        while self.sent < end && self.sent_bytes < window_bytes {
            let mut batch = Vec::new();
            let mut bytes = 0;
            while self.sent < end
                && let Some(entry) = self.unreleased.get(self.sent)
                && batch.len() < limits::BATCH_CHANGES_MAX
                && bytes < limits::BATCH_BYTES_TARGET
                && self.sent_bytes < window_bytes
            {
                bytes += entry.change.kind.data_len();
                self.sent_bytes += window_cost(&entry.change);
                batch.push(entry.change.clone());
                self.sent += 1;
            }
            if let Some(last) = self.sent.checked_sub(1).and_then(|index| self.unreleased.get(index)) {
                self.past.sent(last.change.sequence, last.hash);
            }
            out.push(Action::Send(Message::Changes(batch)));
        }
    }

    fn tick(&mut self, now: SourceTime, known: Option<SourceTime>, out: &mut Vec<Action>) {
        self.now = now;
        if !matches!(self.link, Link::Up { .. }) {
            return;
        }
        let everything_sent = self.sent == self.unreleased.len();
        if let Some(known) = known
            && everything_sent
            && now >= self.next_proof
        {
            self.next_proof = SourceTime(now.0 + self.config.proof_every_ns);
            let whole = matches!(self.stream, StreamState::Whole);
            // In a gap the message still tells the receiver that we live; it proves nothing.
            let time = if whole { known.min(now) } else { SourceTime(0) };
            out.push(Action::Send(Message::Proof { captured: self.assigned, time, now }));
        }
        if self.rotation_is_due() {
            self.next_rotation = SourceTime(now.0 + self.config.rotate_every_ns);
            out.push(Action::Rotate { for_heal: false });
        }
        if matches!(self.heal, Heal::Rotating) {
            out.push(Action::Rotate { for_heal: true });
        }
    }
}

fn window_cost(change: &Change) -> u64 {
    change.kind.data_len() as u64 + CHANGE_OVERHEAD_BYTES
}

#[cfg(test)]
mod tests;
