//! The receiving half of replication: greets a sender, checks that its stream has no hole, turns source time into point
//! time, decides where cuts lie, and tells its owner what to make durable.
//!
//! Pure. The owner is a process server (changes go to its journal, heals to the vault) or a master target (both go to a
//! disk).
//!
//! Invariants: changes are handed on in sequence order without holes; nothing is acknowledged before the owner said
//! that it is durable; no cut lies inside a gap, that is, between the last change before a break and the heal's end.

mod greeting;
mod scrub;

use std::collections::BTreeMap;

use crate::change::{Change, HealId, SourceTime, StreamHash};
use crate::cut::{Cut, CutKind, CutPlanner, PointClock, PointTime};
use crate::geometry::{ByteRange, DiskGeometry, LEAF_BYTES};
use crate::offers::GranuleOffers;
use crate::position::{ChainId, DiskId, Generation, SequenceNumber};
use crate::reach::{Ranges, Reach};
use crate::wire::{HealContent, HealNeed, Hello, Message, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, Welcome};

pub use greeting::{Greeting, Remembered, greet};
pub use scrub::ScrubbedLeaf;

/// What a session starts with, after [`greet`] and, for a renewal, after the generation was opened.
#[derive(Debug, Clone)]
pub struct SessionStart {
    /// The chain that is written.
    pub chain: ChainId,
    /// The generation that new changes are numbered in.
    pub generation: Generation,
    /// Newest change held here.
    pub journaled: SequenceNumber,
    /// Stream hash there.
    pub hash: StreamHash,
    /// Newest position in the vault.
    pub committed: SequenceNumber,
    /// Newest position in the vault at which the stream's hash is known, and the hash.
    pub past: Option<(SequenceNumber, StreamHash)>,
    /// Newest point time on the chain.
    pub last_point: PointTime,
    /// The cut planner as the last session left it (default for a new generation).
    pub planner: CutPlanner,
    /// The stream goes on.
    pub continues: bool,
    /// What the sender will have to heal.
    pub need: HealNeed,
    /// A gap is open.
    pub in_gap: bool,
    /// Nothing is held of the disks.
    pub base_empty: bool,
    /// Stream bytes that may be under way beyond *journaled*.
    pub window_bytes: u64,
    /// This side's wall clock.
    pub wall: PointTime,
}

/// What happened.
#[derive(Debug)]
#[allow(missing_docs)]
#[expect(clippy::large_enum_variant, reason = "lives for a moment; a box would cost an allocation a message")]
pub enum Event {
    Received {
        message: Message,
        wall: PointTime,
    },
    /// Everything up to here is durable here.
    Journaled(SequenceNumber),
    /// Everything up to here is in the vault.
    Committed(SequenceNumber),
    Window(u64),
    /// Verdict on an offer: of its leaves, of its granules, or of the leaves of the granules that were wanted.
    Compared {
        heal: HealId,
        offer: u32,
        wanted: Vec<bool>,
    },
    /// Heal data processed, in bytes, since the heal's begin.
    HealProcessed {
        heal: HealId,
        bytes: u64,
    },
    HealCommitted {
        heal: HealId,
    },
    /// Verdict on what a scrub offered, one entry a leaf.
    Scrubbed {
        offer: u64,
        leaves: Vec<ScrubbedLeaf>,
    },
    /// The vault holds what was said of these points.
    SuspicionNoted {
        id: u64,
    },
    /// The owner cannot finish this heal.
    HealFailed {
        heal: HealId,
        reason: String,
    },
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[expect(clippy::large_enum_variant, reason = "lives for a moment; a box would cost an allocation a message")]
pub enum Action {
    Send(Message),
    /// Make these durable, in order; their times are point times. `hash` is the stream's after the last of them.
    Append {
        changes: Vec<Change>,
        hash: StreamHash,
    },
    /// This position can be opened once it is committed.
    Cut(Cut),
    /// Nothing after `at` can be opened until a heal ends; of ranges: points after it lack them.
    GapOpened {
        at: SequenceNumber,
        reach: Reach,
        time: PointTime,
        cause: String,
    },
    /// Everything submitted before this moment is at or below `through`.
    Proven {
        through: SequenceNumber,
        time: PointTime,
        skew_ns: i64,
    },
    HealBegin {
        heal: HealId,
        p0: SequenceNumber,
        whole: bool,
        reach: Reach,
        hashes: OfferHashes,
        planned_bytes: u64,
    },
    /// Compare and answer with [`Event::Compared`], but not before everything up to `p0` is committed.
    Compare {
        heal: HealId,
        offer: u32,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    /// Compare and answer with [`Event::Compared`], one entry a granule; keep what was read of those that are wanted.
    CompareGranules {
        heal: HealId,
        offer: u32,
        disk: DiskId,
        start: u64,
        /// How many leaves the granules have together.
        leaves: u64,
        granules: Vec<OfferedLeaf>,
    },
    /// Compare with what was kept of this offer and answer with [`Event::Compared`], one entry a leaf.
    CompareLeaves {
        heal: HealId,
        offer: u32,
        leaves: Vec<OfferedLeaf>,
    },
    HealData {
        heal: HealId,
        disk: DiskId,
        range: ByteRange,
        content: HealContent,
    },
    /// All of the heal's data was handed on; commit it, then this cut, which closes the gap. The end of a heal of ranges
    /// is no cut of its own.
    HealEnd {
        heal: HealId,
        cut: Cut,
    },
    HealAborted {
        heal: HealId,
        cause: String,
    },
    /// Compare with what is held, and with no less than everything up to `behind`, and answer with [`Event::Scrubbed`].
    /// Plain hashes; nothing is to be kept.
    Scrub {
        offer: u64,
        behind: SequenceNumber,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    /// Cuts behind `after` and before `until` are not known to hold what these ranges held. Answer with
    /// [`Event::SuspicionNoted`] once that is recorded.
    Suspected {
        id: u64,
        after: SequenceNumber,
        until: SequenceNumber,
        time: PointTime,
        ranges: Ranges,
        cause: String,
    },
    /// The session is over; the reason is for the log and, as a refusal, for the sender.
    Disconnect {
        reason: String,
    },
}

#[derive(Debug, Clone, Copy)]
struct Healing {
    heal: HealId,
    p0: SequenceNumber,
    of_machine: bool,
}

/// The receiving half of a replication session. See the module's documentation.
#[derive(Debug)]
pub struct Receiver {
    chain: ChainId,
    generation: Generation,
    disks: Vec<DiskGeometry>,
    received: SequenceNumber,
    hash: StreamHash,
    journaled: SequenceNumber,
    committed: SequenceNumber,
    window_bytes: u64,
    clock: PointClock,
    planner: CutPlanner,
    in_gap: bool,
    /// The newest heal start seen in the stream.
    heal_started: Option<Healing>,
    healing: Option<Healing>,
    /// Whether the running heal's hashes are keyed.
    keyed: bool,
    granules: GranuleOffers,
    /// Offers of scrubs whose verdict is out, and how many leaves each has.
    scrubbed: BTreeMap<u64, usize>,
    ended: Option<(Healing, SequenceNumber)>,
}

impl Receiver {
    /// Begins a session and returns the welcome to send.
    pub fn start(hello: &Hello, start: SessionStart) -> (Receiver, Message) {
        let welcome = Message::Welcome(Welcome {
            version: PROTOCOL_VERSION,
            chain: start.chain,
            generation: start.generation,
            resume_after: start.journaled,
            continues: start.continues,
            hash: start.hash,
            committed: start.committed,
            past: start.past,
            need: start.need,
            base_empty: start.base_empty,
            window_bytes: start.window_bytes,
        });
        let receiver = Receiver {
            chain: start.chain,
            generation: start.generation,
            disks: hello.disks.clone(),
            received: start.journaled,
            hash: start.hash,
            journaled: start.journaled,
            committed: start.committed,
            window_bytes: start.window_bytes,
            clock: PointClock::new(hello.now, start.wall, start.last_point),
            planner: start.planner,
            in_gap: start.in_gap,
            heal_started: None,
            healing: None,
            keyed: false,
            granules: GranuleOffers::default(),
            scrubbed: BTreeMap::new(),
            ended: None,
        };
        (receiver, welcome)
    }

    /// The chain this session writes to.
    pub fn chain(&self) -> ChainId {
        self.chain
    }

    /// Newest change received, its stream hash, and the newest point time: what the next session continues from once
    /// they are durable.
    pub fn position(&self) -> (SequenceNumber, StreamHash, PointTime) {
        (self.received, self.hash, self.clock.last())
    }

    /// The cut planner's state, for the next session of the same generation.
    pub fn planner(&self) -> &CutPlanner {
        &self.planner
    }

    /// Whether points are being withheld until a heal ends.
    pub fn in_gap(&self) -> bool {
        self.in_gap
    }

    /// Takes one event.
    pub fn apply(&mut self, event: Event) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Received { message, wall } => {
                if let Err(reason) = self.received(message, wall, &mut out) {
                    out.push(Action::Disconnect { reason });
                }
            }
            Event::Journaled(through) => {
                assert!(through <= self.received, "only what was received can be durable");
                self.journaled = self.journaled.max(through);
                out.push(self.ack());
            }
            Event::Committed(through) => {
                self.committed = self.committed.max(through);
                out.push(self.ack());
            }
            Event::Window(bytes) => {
                self.window_bytes = bytes;
                out.push(self.ack());
            }
            Event::Compared { heal, offer, wanted } => {
                if self.is_current(heal) {
                    self.granules.judged(offer, &wanted);
                    let wanted = crate::wire::wanted_bitmap(&wanted);
                    out.push(Action::Send(Message::Wants { heal, offer, wanted }));
                }
            }
            Event::Scrubbed { offer, leaves } => {
                if self.scrubbed.remove(&offer) == Some(leaves.len()) {
                    out.push(Action::Send(scrub::verdict(offer, &leaves)));
                }
            }
            Event::SuspicionNoted { id } => out.push(Action::Send(Message::SuspectNoted { id })),
            Event::HealProcessed { heal, bytes } => {
                if self.is_current(heal) {
                    out.push(Action::Send(Message::HealCredit { heal, received_bytes: bytes }));
                }
            }
            Event::HealCommitted { heal } => {
                if let Some((ended, end)) = self.ended
                    && ended.heal == heal
                {
                    self.ended = None;
                    self.committed = self.committed.max(end);
                    out.push(Action::Send(Message::HealCommitted { heal }));
                }
            }
            Event::HealFailed { heal, reason } => {
                let known = self.healing.or(self.ended.map(|(ended, _)| ended));
                if let Some(failed) = known.filter(|known| known.heal == heal) {
                    self.healing = None;
                    self.ended = None;
                    self.in_gap |= failed.of_machine;
                    out.push(Action::Send(Message::HealRestart { heal, reason }));
                }
            }
        }
        out
    }

    fn ack(&self) -> Action {
        Action::Send(Message::Ack {
            journaled: self.journaled,
            committed: self.committed.min(self.journaled),
            window_bytes: self.window_bytes,
        })
    }

    fn is_current(&self, heal: HealId) -> bool {
        self.healing.is_some_and(|healing| healing.heal == heal)
    }

    fn received(&mut self, message: Message, wall: PointTime, out: &mut Vec<Action>) -> Result<(), String> {
        match message {
            Message::Changes(changes) => self.changes(changes, out),
            Message::Proof { captured, time, now } => self.proof(captured, time, now, wall, out),
            Message::Break { at, reach: Reach::Machine, cause } => {
                self.break_stream(at, cause, out);
                Ok(())
            }
            Message::Break { at, reach, cause } => {
                out.push(Action::GapOpened { at: at.min(self.received), reach, time: self.clock.last(), cause });
                Ok(())
            }
            Message::Pong => Ok(()),
            Message::HealBegin { heal, p0, whole, reach, hashes, planned_bytes } => {
                let started = self.heal_started.is_some_and(|started| started.heal == heal && started.p0 == p0);
                if !started {
                    return Err(format!("heal {} begins at {p0}, where the stream has no heal start", heal.0));
                }
                let of_machine = reach == Reach::Machine;
                if of_machine {
                    // The sender has broken the stream before; if not, no cut may include p0.
                    self.break_stream(SequenceNumber(p0.0 - 1), "a heal began".into(), out);
                }
                self.healing = Some(Healing { heal, p0, of_machine });
                self.keyed = matches!(hashes, OfferHashes::Keyed(_));
                self.granules.clear();
                out.push(Action::HealBegin { heal, p0, whole, reach, hashes, planned_bytes });
                Ok(())
            }
            Message::Offer { heal, offer, disk, start, leaves } if self.is_current(heal) => {
                let len = leaves.len() as u64 * LEAF_BYTES;
                let size = self.disk_size(disk)?;
                // The last leaf of a disk may be shorter than 4 KiB.
                if start + len > size.next_multiple_of(LEAF_BYTES) {
                    return Err(format!("an offer reaches beyond {disk}"));
                }
                out.push(Action::Compare { heal, offer, disk, start, leaves });
                Ok(())
            }
            Message::OfferGranules { heal, offer, disk, start, leaves, granules } if self.is_current(heal) => {
                let leaves = u64::from(leaves);
                if !self.keyed || start + leaves * LEAF_BYTES > self.disk_size(disk)?.next_multiple_of(LEAF_BYTES) {
                    return Err(format!("an offer of granules without a key, or beyond {disk}"));
                }
                self.granules.offered(offer, start, leaves, granules.len())?;
                out.push(Action::CompareGranules { heal, offer, disk, start, leaves, granules });
                Ok(())
            }
            Message::OfferLeaves { heal, offer, leaves } if self.is_current(heal) => {
                self.granules.leaves(offer, leaves.len())?;
                out.push(Action::CompareLeaves { heal, offer, leaves });
                Ok(())
            }
            Message::HealData { heal, disk, range, content } if self.is_current(heal) => {
                if range.end() > self.disk_size(disk)? {
                    return Err(format!("heal data reaches beyond {disk}"));
                }
                out.push(Action::HealData { heal, disk, range, content });
                Ok(())
            }
            Message::HealEnd { heal, end } if self.is_current(heal) => {
                if end != self.received {
                    return Err(format!("heal ends at {end}, the stream is at {}", self.received));
                }
                let Some(healing) = self.healing.take() else { return Ok(()) };
                // Where only ranges were lacking, cuts are made as always; this one only says where their gap ends.
                let closed = if healing.of_machine { self.planner.close(CutKind::HealEnd) } else { None };
                let cut = closed.unwrap_or(Cut { sequence: end, time: self.clock.last(), kind: CutKind::HealEnd });
                self.in_gap &= !healing.of_machine;
                self.ended = Some((healing, end));
                out.push(Action::HealEnd { heal, cut });
                Ok(())
            }
            Message::ScrubOffer { offer, behind, disk, start, leaves } => {
                self.check_scrub(offer, behind, (disk, start), leaves.len())?;
                out.push(Action::Scrub { offer, behind, disk, start, leaves });
                Ok(())
            }
            Message::Suspect { id, after, until, ranges, cause } => {
                self.suspect(id, (after, until), (ranges, cause), out);
                Ok(())
            }
            Message::HealAbort { heal, cause } if self.is_current(heal) => {
                self.healing = None;
                out.push(Action::HealAborted { heal, cause });
                Ok(())
            }
            // Of a heal that this side has already given up.
            Message::Offer { .. }
            | Message::OfferGranules { .. }
            | Message::OfferLeaves { .. }
            | Message::HealData { .. }
            | Message::HealEnd { .. }
            | Message::HealAbort { .. } => Ok(()),
            // Kept by whoever has a place for it, beside the stream.
            Message::Describe { .. } => Ok(()),
            Message::Bye { reason } => Err(format!("the sender said good-bye: {reason}")),
            other => Err(format!("unexpected message {:?}", std::mem::discriminant(&other))),
        }
    }

    fn changes(&mut self, mut changes: Vec<Change>, out: &mut Vec<Action>) -> Result<(), String> {
        let mut cuts = Vec::new();
        for change in &mut changes {
            if !self.follows(change.sequence) {
                return Err(format!("change {} follows {}", change.sequence, self.received));
            }
            if let Some(range) = change.kind.range()
                && range.end() > self.disk_size(change.disk)?
            {
                return Err(format!("change {} reaches beyond {}", change.sequence, change.disk));
            }
            self.hash = change.extend_hash(self.hash);
            self.received = change.sequence;
            change.time = SourceTime(self.clock.stamp(change.time).0);
            cuts.extend(self.planner.change(change));
            match &change.kind {
                crate::ChangeKind::HealStart { heal } => {
                    self.heal_started = Some(Healing { heal: *heal, p0: change.sequence, of_machine: true });
                }
                crate::ChangeKind::Geometry(geometry) => self.resize(geometry),
                _ => {}
            }
        }
        if !changes.is_empty() {
            out.push(Action::Append { changes, hash: self.hash });
        }
        if !self.in_gap {
            out.extend(cuts.into_iter().map(Action::Cut));
        }
        Ok(())
    }

    /// The next number, or the first of a generation opened since: one that a server opened and lost again before it
    /// journaled anything leaves its numbers in the sender's hands.
    fn follows(&self, sequence: SequenceNumber) -> bool {
        let (last, now) = (self.received.generation(), sequence.generation());
        let first_of_newer = last < now && now <= self.generation && sequence.0 == now.base().0 + 1;
        sequence.0 == self.received.0 + 1 || first_of_newer
    }

    fn resize(&mut self, geometry: &DiskGeometry) {
        match self.disks.iter_mut().find(|disk| disk.disk == geometry.disk) {
            Some(disk) => *disk = geometry.clone(),
            None => self.disks.push(geometry.clone()),
        }
    }

    fn disk_size(&self, disk: DiskId) -> Result<u64, String> {
        let found = self.disks.iter().find(|geometry| geometry.disk == disk);
        found.map(|geometry| geometry.size_bytes).ok_or_else(|| format!("{disk} was never announced"))
    }

    fn proof(
        &mut self,
        captured: SequenceNumber,
        time: SourceTime,
        now: SourceTime,
        wall: PointTime,
        out: &mut Vec<Action>,
    ) -> Result<(), String> {
        if captured > self.received {
            // A generation's first number is not taken yet: nothing was captured in it.
            if captured != self.generation.base() {
                return Err(format!("the sender proves {captured}, the stream is at {}", self.received));
            }
        }
        self.clock.observe(now, wall);
        if self.in_gap || time == SourceTime(0) {
            return Ok(());
        }
        let skew_ns = self.clock.skew(now, wall);
        let time = self.clock.stamp(time);
        out.extend(self.planner.proven(time).map(Action::Cut));
        out.push(Action::Proven { through: self.received, time, skew_ns });
        Ok(())
    }

    fn break_stream(&mut self, at: SequenceNumber, cause: String, out: &mut Vec<Action>) {
        self.ended = None;
        if self.in_gap {
            return;
        }
        self.in_gap = true;
        // Everything received so far is a legal prefix: its end is the last point before the gap, if it is not one already.
        if let Some(cut) = self.planner.close(CutKind::GenerationEnd)
            && cut.sequence <= at
        {
            out.push(Action::Cut(cut));
        }
        let at = at.min(self.received);
        out.push(Action::GapOpened { at, reach: Reach::Machine, time: self.clock.last(), cause });
    }
}
