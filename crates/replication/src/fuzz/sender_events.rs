//! The sender under any events: an owner that keeps its side of the contract, a receiver that says anything.

use std::collections::VecDeque;

use bytes::Bytes;

use super::script::{Script, over_the_wire, raw};
use crate::geometry::{GRANULE_BYTES, LEAF_BYTES};
use crate::sender::{Action, CaptureReport, Event, Request, Sender, SenderConfig, Suspicion};
use crate::wire::{HealNeed, Message, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, Welcome};
use crate::{
    ByteRange, ChainId, Change, ChangeKind, DiskGeometry, DiskId, DiskIdentity, Epoch, Generation, HealId, InstanceId,
    LeafKey, MachineId, PointTime, Ranges, SequenceNumber, SourceTime, StreamHash,
};

/// Bytes of the one disk.
const DISK_BYTES: u64 = 24 * GRANULE_BYTES + 512;
/// Events of one script.
const EVENTS_MAX: usize = 2000;

/// A script of events for a sender: it never panics, its watermarks are ordered and never go back while a stream goes on,
/// changes go out in order and without holes, the ring is released in order, a heal begins after its start went out, and the
/// same script does the same twice. Valid if changes were sent.
pub fn sender_events(data: &[u8]) -> bool {
    let first = Owner::live(data);
    assert_eq!(first, Owner::live(data), "the same events led to something else");
    first.1
}

/// What a heal asked its owner to read. Answered in time, or late: after the heal that asked was given up.
enum Question {
    Read(DiskId, ByteRange),
    Fetch(DiskId, ByteRange),
    /// The same of a scrub, and what is marked meanwhile.
    Scrub(u64, ByteRange),
    Marks(u64, ByteRange),
}

struct Owner<'a> {
    script: Script<'a>,
    sender: Sender,
    trace: blake3::Hasher,
    now: u64,
    producer: u64,
    consumed: u64,
    released: u64,
    epoch: u32,
    gap_count: u64,
    /// Something was captured since the last report.
    unreported: bool,
    linked: bool,
    settling: Option<Epoch>,
    questions: VecDeque<Question>,
    /// The stream as the sender described it in its last hello.
    resume: Option<(ChainId, SequenceNumber, StreamHash)>,
    marks: [SequenceNumber; 4],
    /// The newest change on this link, once one was sent.
    sent: Option<SequenceNumber>,
    starts: Vec<(HealId, SequenceNumber)>,
    heal: HealId,
    offer: u32,
    /// The newest offer of a scrub.
    scrubbed: u64,
    any: bool,
    /// A second disk, which comes and goes while the first one is captured.
    second: Second,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Second {
    Absent,
    Here,
    Leaving,
}

fn disk() -> DiskGeometry {
    DiskGeometry {
        disk: DiskId(0),
        path: "/dev/vda".into(),
        identity: DiskIdentity { serial: "serial".into(), fingerprint: [0; 16] },
        size_bytes: DISK_BYTES,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

impl Owner<'_> {
    fn live(data: &[u8]) -> ([u8; 32], bool) {
        let mut script = Script::new(data);
        let kind = script.u8();
        let need = [HealNeed::Whole, HealNeed::Maps, HealNeed::Nothing][usize::from(kind % 3)];
        let hashes = if kind & 0x80 == 0 { OfferHashes::Plain } else { OfferHashes::Keyed(LeafKey::new([7; 32])) };
        let config = SenderConfig {
            machine: MachineId([1; 16]),
            instance: InstanceId([2; 16]),
            boot: [3; 16],
            vm_generation: [0; 16],
            started: PointTime(1),
            name: "fuzzed".into(),
            hashes,
            rotate_every_ns: 3_000_000_000,
            proof_every_ns: 500_000_000,
            heal_chunk_bytes: GRANULE_BYTES,
            heal_window_bytes: 2 * GRANULE_BYTES,
        };
        let cleared = (kind & 0x40 != 0).then_some((ChainId([9; 16]), SequenceNumber(5)));
        let mut owner = Owner {
            script,
            sender: Sender::new(config, need, 0, cleared),
            trace: blake3::Hasher::new(),
            now: 0,
            producer: 0,
            consumed: 0,
            released: 0,
            epoch: 1,
            gap_count: 0,
            unreported: false,
            linked: false,
            settling: None,
            questions: VecDeque::new(),
            resume: None,
            marks: [SequenceNumber(0); 4],
            sent: None,
            starts: Vec::new(),
            heal: HealId(0),
            offer: 0,
            scrubbed: 0,
            any: false,
            second: Second::Absent,
        };
        let mut events = 0;
        while !owner.script.is_over() && events < EVENTS_MAX {
            events += 1;
            owner.event();
        }
        (*owner.trace.finalize().as_bytes(), owner.any)
    }

    fn event(&mut self) {
        let event = match self.script.u8() % 24 {
            0 => {
                self.link_down();
                self.linked = true;
                Event::LinkUp { now: SourceTime(self.now), disks: vec![disk()] }
            }
            1 => return self.link_down(),
            2 | 3 => {
                let welcome = self.welcome_message();
                return self.receive(welcome);
            }
            4 | 5 => {
                let [assigned, ..] = self.sender.watermarks();
                let journaled = SequenceNumber(self.script.position(assigned.0));
                let committed = SequenceNumber(self.script.position(journaled.0));
                let window_bytes = u64::from(self.script.u16()) << 6;
                return self.receive(Message::Ack { journaled, committed, window_bytes });
            }
            6..=8 => return self.capture(),
            9 => {
                self.consumed = self.producer;
                Event::Passed(self.producer)
            }
            10 | 11 => {
                let what = self.script.u8();
                return self.report(what);
            }
            12 | 13 => {
                self.now += u64::from(self.script.u16()) << 14;
                let drained = self.script.u8() & 1 == 0 && self.consumed == self.producer;
                Event::Tick { now: SourceTime(self.now), known: drained.then_some(SourceTime(self.now)) }
            }
            14..=17 => return self.answer(),
            18 => {
                let offer = self.script.position(u64::from(self.offer)) as u32;
                let wanted = Bytes::copy_from_slice(self.script.take(2));
                return self.receive(Message::Wants { heal: self.heal, offer, wanted });
            }
            19 => {
                let near = u64::from(self.script.u16()) << 8;
                let received_bytes = self.script.position(near);
                return self.receive(Message::HealCredit { heal: self.heal, received_bytes });
            }
            20 => return self.receive(Message::HealCommitted { heal: self.heal }),
            21 => {
                let said = match self.script.u8() % 3 {
                    0 => Some(Message::HealRestart { heal: self.heal, reason: "again".into() }),
                    1 => Some(Message::Ping),
                    _ => raw(&mut self.script),
                };
                return said.into_iter().for_each(|message| self.receive(message));
            }
            22 => {
                let what = self.script.u8();
                if what >= 192 {
                    return self.scrub(what);
                }
                if what >= 128 {
                    return self.change_disks();
                }
                return self.sender.hold(what & 1 == 1);
            }
            _ => {
                // The capture is looked at after every round of taking from the ring, and before anything is sent.
                if self.unreported {
                    self.report(0);
                }
                let actions = self.sender.pump();
                return self.execute(actions);
            }
        };
        self.feed(event, true);
    }

    /// A stretch is to be compared, an answer comes, something was found.
    fn scrub(&mut self, what: u8) {
        let suspicion = |id, until: SequenceNumber| Suspicion {
            id,
            chain: ChainId([9; 16]),
            after: SequenceNumber(until.0 / 2),
            until,
            ranges: Ranges::of([(DiskId(0), ByteRange::new(4096 * u64::from(what & 7), 8192))]),
            cause: "found to differ by a scrub".into(),
        };
        let [assigned, ..] = self.sender.watermarks();
        match what % 4 {
            0 => self.feed(Event::Scrub(vec![(DiskId(0), ByteRange::new(0, DISK_BYTES))]), true),
            1 => {
                let offer = self.script.position(self.scrubbed);
                let differing = Bytes::copy_from_slice(self.script.take(2));
                let untold = Bytes::copy_from_slice(self.script.take(2));
                self.receive(Message::ScrubVerdict { offer, differing, untold });
            }
            2 if self.sender.may_scrub() => {
                self.feed(Event::Diverged(suspicion(u64::from(what), assigned.next())), true);
                assert!(self.sender.is_healing() && !self.sender.lacking().is_empty(), "what differs is to be healed");
            }
            2 => self.feed(Event::Suspected(suspicion(u64::from(what), assigned.next())), true),
            _ => self.receive(Message::SuspectNoted { id: u64::from(what - 1) }),
        }
    }

    /// The second disk comes, leaves, or is forgotten once nothing of it is under way. Each ends the link.
    fn change_disks(&mut self) {
        let geometry = DiskGeometry { disk: DiskId(1), ..disk() };
        let event = match self.second {
            Second::Absent => {
                let ranges = Ranges::of(geometry.range().map(|range| (DiskId(1), range)));
                self.second = Second::Here;
                Event::Joined { geometry, ranges, cause: "the disk was added".into(), producer: self.producer }
            }
            Second::Here => {
                self.second = Second::Leaving;
                Event::Leaving { geometry, cause: "the disk vanished".into() }
            }
            Second::Leaving if self.sender.left_disks() == [DiskId(1)] => {
                self.second = Second::Absent;
                Event::Gone(DiskId(1))
            }
            Second::Leaving => return,
        };
        self.feed(event, true);
        self.link_down();
    }

    fn link_down(&mut self) {
        if std::mem::take(&mut self.linked) {
            self.questions.clear();
            self.sent = None;
            self.starts.clear();
            self.feed(Event::LinkDown, true);
        }
    }

    fn feed(&mut self, event: Event, goes_on: bool) {
        let actions = self.sender.apply(event);
        self.execute(actions);
        let marks = self.sender.watermarks();
        let [assigned, sent, journaled, committed] = marks;
        assert!(assigned >= sent && sent >= journaled && assigned >= committed, "out of order: {marks:?}");
        // What was handed to a link that is gone is not sent any more.
        let kept = |index: usize| index == 1 || marks[index] >= self.marks[index];
        assert!(!goes_on || (0..4).all(kept), "{:?} fell to {marks:?}", self.marks);
        self.marks = marks;
    }

    /// A message as it comes over the wire. A stream that is given up may begin again anywhere.
    fn receive(&mut self, message: Message) {
        if let Some(message) = over_the_wire(&message) {
            let goes_on = !matches!(message, Message::Welcome(_));
            self.feed(Event::Received(message), goes_on);
        }
    }

    fn welcome_message(&mut self) -> Message {
        let script = &mut self.script;
        let flags = script.u8();
        let (chain, released, hash) =
            self.resume.unwrap_or((ChainId([9; 16]), SequenceNumber(0), StreamHash::default()));
        let continues = flags & 1 == 1;
        let resume_after = SequenceNumber(script.position(released.0));
        let generation = match flags >> 6 {
            0 => resume_after.generation().0,
            1 => resume_after.generation().0.saturating_add(1),
            _ => u32::from(script.u8()),
        };
        Message::Welcome(Welcome {
            version: if flags & 2 == 2 && flags & 4 == 4 { PROTOCOL_VERSION + 1 } else { PROTOCOL_VERSION },
            chain: if flags & 8 == 8 { ChainId([8; 16]) } else { chain },
            generation: Generation(generation),
            resume_after,
            continues,
            hash,
            committed: SequenceNumber(script.position(resume_after.0)),
            need: [HealNeed::Nothing, HealNeed::Maps, HealNeed::Whole, HealNeed::Nothing][usize::from(flags >> 4 & 3)],
            base_empty: flags & 4 == 4,
            window_bytes: u64::from(script.u16()) << 6,
            past: (flags & 32 == 32).then_some((resume_after, hash)),
        })
    }

    fn capture(&mut self) {
        let script = &mut self.script;
        let what = script.u8();
        let range = |start: u8, len: u8| {
            let start = u64::from(start) * 4096;
            ByteRange::new(start, (1 + u64::from(len % 32)) * 512)
        };
        let kinds = (0..1 + usize::from(what >> 6)).map(|_| {
            let range = range(script.u8(), script.u8());
            match what & 3 {
                0 => ChangeKind::Zero { range },
                1 => ChangeKind::Discard { range },
                _ => ChangeKind::Write { range, data: Bytes::from(vec![what; range.len as usize]) },
            }
        });
        let kinds = kinds.collect();
        let older = u32::from(what & 16 != 0).min(self.epoch - 1);
        self.producer += 1 + u64::from(what);
        (self.consumed, self.unreported) = (self.producer, true);
        let request = Request {
            ring_end: self.producer,
            epoch: Epoch(self.epoch - older),
            time: SourceTime(self.now),
            disk: DiskId(0),
            kinds,
        };
        self.feed(Event::Captured(request), true);
    }

    fn report(&mut self, what: u8) {
        self.unreported = false;
        if what & 1 == 1 {
            self.gap_count += 1;
            self.producer += u64::from(what >> 4);
        }
        let failed = (what & 6 == 6).then(|| {
            let start = u64::from(self.script.u8() % 24) * GRANULE_BYTES;
            (DiskId(0), ByteRange::new(start, GRANULE_BYTES))
        });
        self.feed(
            Event::Report(CaptureReport {
                gap_count: self.gap_count,
                gap_cause: "the send buffer was full".into(),
                unstreamed: failed.into_iter().collect(),
                producer: self.producer,
            }),
            true,
        );
    }

    /// Answers a question, the oldest or another one.
    fn answer(&mut self) {
        let pick = usize::from(self.script.u8());
        if pick & 1 == 1
            && let Some(epoch) = self.settling.take()
        {
            return self.feed(Event::Settled { epoch, producer: self.producer }, true);
        }
        let index = if pick < 192 { 0 } else { pick % self.questions.len().max(1) };
        let event = match self.questions.remove(index) {
            None => return,
            Some(Question::Read(disk, range)) => {
                let what = self.script.u8();
                let leaves = (0..range.len.div_ceil(LEAF_BYTES)).map(|leaf| match u64::from(what) + leaf {
                    sum if sum % 5 == 0 => OfferedLeaf::Zero,
                    sum if sum % 7 == 0 => OfferedLeaf::Unreadable,
                    sum => OfferedLeaf::Hash([sum as u8; 16]),
                });
                let data = (what & 0x80 == 0).then(|| Bytes::from(vec![what; range.len as usize]));
                Event::HealRead { disk, range, leaves: leaves.collect(), data }
            }
            Some(Question::Scrub(ask, range)) => {
                let what = self.script.u8();
                let leaves = (0..range.len.div_ceil(LEAF_BYTES)).map(|leaf| match u64::from(what) + leaf {
                    sum if sum % 5 == 0 => OfferedLeaf::Zero,
                    sum if sum % 7 == 0 => OfferedLeaf::Unreadable,
                    sum => OfferedLeaf::Hash([sum as u8; 16]),
                });
                Event::ScrubRead { ask, leaves: leaves.collect() }
            }
            Some(Question::Marks(ask, range)) => {
                let marked = (self.script.u8() & 1 == 1).then_some(range);
                Event::Marked { ask, marked: marked.into_iter().collect() }
            }
            Some(Question::Fetch(disk, range)) => {
                let data = (self.script.u8() > 16).then(|| Bytes::from(vec![1; range.len as usize]));
                Event::HealFetched { disk, range, data }
            }
        };
        self.feed(event, true);
    }

    fn rotate(&mut self) {
        if self.script.u8() >= 224 {
            return self.feed(Event::Rotated(None), true);
        }
        self.epoch += 1;
        self.feed(Event::Rotated(Some(Epoch(self.epoch))), true);
    }

    fn collect(&mut self) {
        let named = self.script.u8();
        let range = |index| ByteRange::new((index * 4 + u64::from(named >> 5)) * GRANULE_BYTES, GRANULE_BYTES);
        let mut ranges: Vec<_> = (0..u64::from(named % 5)).map(range).collect();
        if named & 16 == 16 {
            ranges = vec![ByteRange::new(0, DISK_BYTES)];
        }
        self.feed(Event::HealSet(vec![(DiskId(0), ranges)]), true);
    }

    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            match &action {
                Action::Send(message) => self.trace.update(&message.encode().body()),
                other => self.trace.update(format!("{other:?}").as_bytes()),
            };
            match action {
                Action::Send(message) => self.look_at(message),
                Action::Release(through) => {
                    assert!(through <= self.consumed, "released {through}, consumed {}", self.consumed);
                    assert!(through >= self.released, "released {} after {through}", self.released);
                    self.released = through;
                }
                Action::Rotate { .. } => self.rotate(),
                Action::AwaitSettled(epoch) => self.settling = Some(epoch),
                Action::CollectHealSet(_) => self.collect(),
                Action::ReadForHeal { disk, range, .. } => self.questions.push_back(Question::Read(disk, range)),
                Action::FetchForHeal { disk, range } => self.questions.push_back(Question::Fetch(disk, range)),
                Action::SampleProducer => {
                    let producer = self.producer;
                    self.feed(Event::Producer(producer), true);
                }
                Action::ClearHealSet { committed, .. } | Action::ClearEpoch { committed, .. } => {
                    assert!(committed <= self.sender.watermarks()[0], "cleared on {committed}");
                }
                Action::ReadForScrub { ask, range, .. } => self.questions.push_back(Question::Scrub(ask, range)),
                Action::LookForMarks { ask, range, .. } => self.questions.push_back(Question::Marks(ask, range)),
                Action::ScrubOver(Ok(outcome)) => {
                    assert!(self.sender.may_scrub(), "a stretch is over although the stream is not at rest");
                    let named: u64 = outcome.findings.iter().map(|(_, range, _)| range.len).sum();
                    assert_eq!(named, DISK_BYTES, "every leaf has a finding");
                    assert!(outcome.behind <= self.sender.watermarks()[3], "compared before it was committed");
                }
                Action::Compared { behind, .. } => assert!(behind <= self.sender.watermarks()[3], "not committed"),
                Action::ScrubOver(Err(_)) | Action::SuspicionNoted(_) => {}
                Action::RequireWhole | Action::Disconnect(_) | Action::Refused(_) => {}
            }
        }
    }

    fn look_at(&mut self, message: Message) {
        let message = over_the_wire(&message).expect("what the sender says can be said");
        match message {
            Message::Hello(hello) => {
                self.resume = hello.resume.map(|resume| (resume.chain, resume.released, resume.hash));
            }
            Message::Changes(changes) => changes.iter().for_each(|change| self.went_out(change)),
            Message::HealBegin { heal, p0, .. } => {
                assert!(self.starts.contains(&(heal, p0)), "heal {} began before its start went out", heal.0);
                assert!(self.second != Second::Leaving, "a heal would close the gap of the disk that leaves");
                (self.heal, self.offer) = (heal, 0);
            }
            Message::Offer { offer, .. } | Message::OfferGranules { offer, .. } => self.offer = offer,
            Message::ScrubOffer { offer, behind, .. } => {
                assert!(behind <= self.sender.watermarks()[3], "offered before it was committed");
                self.scrubbed = offer;
            }
            Message::Suspect { after, until, .. } => assert!(after < until, "a suspicion of nothing"),
            Message::HealData { disk, range, .. } => {
                assert!(disk <= DiskId(1) && range.end() <= DISK_BYTES, "heal data of {range}");
                assert!(disk == DiskId(0) || self.second == Second::Here, "a disk that is not there is healed");
            }
            Message::HealEnd { end, .. } => assert_eq!(Some(end), self.sent, "a heal ends at the newest change"),
            Message::Break { at, .. } => assert!(self.sent.is_none_or(|sent| sent <= at), "a break at {at} came late"),
            _ => {}
        }
    }

    fn went_out(&mut self, change: &Change) {
        let now = change.sequence;
        let follows = |last: SequenceNumber| {
            let first_of_newer = last.generation() < now.generation() && now.0 == now.generation().base().0 + 1;
            now.0 == last.0 + 1 || first_of_newer
        };
        assert!(self.sent.is_none_or(follows), "change {now} went out after {:?}", self.sent);
        self.sent = Some(now);
        self.any = true;
        if let ChangeKind::HealStart { heal } = change.kind {
            self.starts.push((heal, now));
        }
    }
}
