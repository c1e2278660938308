//! A disk, its writers, a capture and a vault in small steps, in any order: what a scrub says of a leaf must be so.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::change::{Change, ChangeKind, SourceTime, StreamHash};
use crate::geometry::GRANULE_BYTES;
use crate::position::Generation;
use crate::sender::tests::config;
use crate::sender::{CaptureReport, Event, KeptStream, Request, SenderConfig};
use crate::wire::{HealNeed, PROTOCOL_VERSION, Welcome, wanted_bitmap};

const DISK: DiskId = DiskId(0);
const CHAIN: ChainId = ChainId([9; 16]);
const GRANULES: u64 = 4;
const LEAVES: u64 = GRANULES * 16;

/// A write on its way: marked and in the ring, then on the disk, then over.
struct Flight {
    epoch: u32,
    leaf: u64,
    /// What reaches the disk, which need not be what was captured.
    value: u8,
    reached: bool,
}

struct Bench {
    sender: Sender,
    now: u64,
    epoch: u32,
    /// What the disk holds, and what it would hold had every write reached it as captured, in order.
    disk: Vec<u8>,
    stream: Vec<u8>,
    vault: Vec<u8>,
    flights: Vec<Flight>,
    /// Granules written to, by epoch, until the epoch is cleared.
    marks: BTreeMap<u32, BTreeSet<u64>>,
    ring: VecDeque<Request>,
    producer: u64,
    settling: Option<Epoch>,
    /// Messages to the receiver, and from it.
    out: VecDeque<Message>,
    back: VecDeque<Message>,
    received: VecDeque<Change>,
    journaled: SequenceNumber,
    hash: StreamHash,
    committed: SequenceNumber,
    offers: VecDeque<Message>,
    /// Reads that are asked for, and those that were made and are not told yet.
    asked: VecDeque<(u64, ByteRange)>,
    made: VecDeque<(u64, Vec<OfferedLeaf>)>,
    looks: VecDeque<(u64, Epoch, ByteRange)>,
    /// What must be said of each leaf of the stretch.
    truth: BTreeMap<u64, ScrubFinding>,
    over: Option<Result<ScrubOutcome, &'static str>>,
    stretches: u32,
    differing: usize,
}

fn offered(value: u8) -> OfferedLeaf {
    if value == 0 { OfferedLeaf::Zero } else { OfferedLeaf::Hash([value; 16]) }
}

impl Bench {
    fn new() -> Bench {
        let config = SenderConfig { rotate_every_ns: 3_000_000_000, ..config() };
        let base = Generation(2).base();
        let kept = KeptStream {
            chain: CHAIN,
            generation: Generation(2),
            released: base,
            hash: StreamHash::default(),
            heals_started: 0,
            lacking: Ranges::default(),
        };
        let mut bench = Bench {
            sender: Sender::resume(config, 0, None, kept, Vec::new()),
            now: 1,
            epoch: 1,
            disk: vec![0; LEAVES as usize],
            stream: vec![0; LEAVES as usize],
            vault: vec![0; LEAVES as usize],
            flights: Vec::new(),
            marks: BTreeMap::from([(1, BTreeSet::new())]),
            ring: VecDeque::new(),
            producer: 0,
            settling: None,
            out: VecDeque::new(),
            back: VecDeque::new(),
            received: VecDeque::new(),
            journaled: base,
            hash: StreamHash::default(),
            committed: base,
            offers: VecDeque::new(),
            asked: VecDeque::new(),
            made: VecDeque::new(),
            looks: VecDeque::new(),
            truth: BTreeMap::new(),
            over: None,
            stretches: 0,
            differing: 0,
        };
        bench.new_link();
        bench
    }

    fn new_link(&mut self) {
        self.feed(Event::LinkDown);
        self.out.clear();
        self.back.clear();
        self.offers.clear();
        self.feed(Event::LinkUp { now: SourceTime(self.now), disks: Vec::new() });
        self.out.clear();
        self.feed(Event::Received(Message::Welcome(Welcome {
            version: PROTOCOL_VERSION,
            chain: CHAIN,
            generation: Generation(2),
            resume_after: self.journaled,
            continues: true,
            hash: self.hash,
            committed: self.committed,
            past: None,
            need: HealNeed::Nothing,
            base_empty: false,
            window_bytes: 1 << 20,
        })));
    }

    fn feed(&mut self, event: Event) {
        for action in self.sender.apply(event) {
            self.execute(action);
        }
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.out.push_back(message),
            Action::Rotate { .. } if self.marks.len() > 1 => self.feed(Event::Rotated(None)),
            Action::Rotate { .. } => {
                self.epoch += 1;
                self.marks.insert(self.epoch, BTreeSet::new());
                self.feed(Event::Rotated(Some(Epoch(self.epoch))));
            }
            Action::AwaitSettled(epoch) => self.settling = Some(epoch),
            Action::ClearEpoch { epoch, .. } => drop(self.marks.remove(&epoch.0)),
            Action::ReadForScrub { ask, range, .. } => self.asked.push_back((ask, range)),
            Action::LookForMarks { ask, since, range, .. } => self.looks.push_back((ask, since, range)),
            Action::ScrubOver(over) => {
                // What was asked for is not wanted any more; what was read may still be told.
                self.asked.clear();
                if let Ok(outcome) = &over {
                    self.judge(outcome);
                }
                self.over = Some(over);
            }
            Action::Disconnect(reason) | Action::Refused(reason) => panic!("{reason}"),
            Action::Release(_) | Action::ClearHealSet { .. } => {}
            other => panic!("nothing is healed here: {other:?}"),
        }
    }

    fn judge(&mut self, outcome: &ScrubOutcome) {
        let mut said = BTreeMap::new();
        for (disk, range, finding) in &outcome.findings {
            assert_eq!(*disk, DISK);
            for leaf in range.split_at_multiples(LEAF_BYTES) {
                assert_eq!(said.insert(leaf.start / LEAF_BYTES, *finding), None, "a leaf has one finding");
            }
        }
        assert_eq!(said, self.truth);
        assert!(outcome.behind <= self.committed);
        self.stretches += 1;
        self.differing += said.values().filter(|finding| **finding == ScrubFinding::Differs).count();
    }

    fn begin(&mut self, what: u8) {
        let leaf = u64::from(what % 8) * 8;
        let value = what % 5;
        // One in a few reaches the disk as something else.
        let reaches = if what.is_multiple_of(7) { value + 10 } else { value };
        self.marks.get_mut(&self.epoch).expect("the current epoch").insert(leaf / 16);
        self.producer += 1;
        self.stream[leaf as usize] = value;
        let range = ByteRange::new(leaf * LEAF_BYTES, LEAF_BYTES);
        let kind = match value {
            0 => ChangeKind::Zero { range },
            value => ChangeKind::Write { range, data: vec![value; LEAF_BYTES as usize].into() },
        };
        self.ring.push_back(Request {
            ring_end: self.producer,
            epoch: Epoch(self.epoch),
            time: SourceTime(self.now),
            disk: DISK,
            kinds: vec![kind],
        });
        self.flights.push(Flight { epoch: self.epoch, leaf, value: reaches, reached: false });
    }

    fn deliver(&mut self) {
        match self.out.pop_front() {
            Some(Message::Changes(changes)) => {
                for change in changes {
                    self.hash = change.extend_hash(self.hash);
                    self.journaled = change.sequence;
                    self.received.push_back(change);
                }
                self.ack();
            }
            Some(offer @ Message::ScrubOffer { .. }) => self.offers.push_back(offer),
            Some(Message::Proof { .. }) | None => {}
            Some(other) => panic!("{other:?}"),
        }
    }

    fn ack(&mut self) {
        let (journaled, committed) = (self.journaled, self.committed);
        self.back.push_back(Message::Ack { journaled, committed, window_bytes: 1 << 20 });
    }

    fn commit(&mut self) {
        let Some(change) = self.received.pop_front() else { return };
        let range = change.kind.range().expect("only writes");
        self.vault[(range.start / LEAF_BYTES) as usize] = match &change.kind {
            ChangeKind::Write { data, .. } => data[0],
            _ => 0,
        };
        self.committed = change.sequence;
        self.ack();
    }

    fn compare(&mut self) {
        let Some(Message::ScrubOffer { offer, behind, start, leaves, .. }) = self.offers.pop_front() else { return };
        assert!(self.committed >= behind);
        let held = &self.vault[(start / LEAF_BYTES) as usize..];
        let differing: Vec<bool> = leaves.iter().zip(held).map(|(leaf, held)| *leaf != offered(*held)).collect();
        let untold = vec![false; leaves.len()];
        let (differing, untold) = (wanted_bitmap(&differing), wanted_bitmap(&untold));
        self.back.push_back(Message::ScrubVerdict { offer, differing, untold });
    }

    fn look(&mut self) {
        let Some((ask, since, range)) = self.looks.pop_front() else { return };
        let newer = self.marks.range(since.0..);
        let marked: BTreeSet<u64> = newer.flat_map(|(_, granules)| granules.iter().copied()).collect();
        for leaf in range.split_at_multiples(LEAF_BYTES).map(|leaf| leaf.start / LEAF_BYTES) {
            let finding = match self.disk[leaf as usize] == self.stream[leaf as usize] {
                _ if marked.contains(&(leaf / 16)) => ScrubFinding::Busy,
                true => ScrubFinding::Same,
                false => ScrubFinding::Differs,
            };
            self.truth.insert(leaf, finding);
        }
        let marked = marked.into_iter().map(|granule| ByteRange::new(granule * GRANULE_BYTES, GRANULE_BYTES));
        self.feed(Event::Marked { ask, marked: marked.collect() });
    }

    fn scrub(&mut self) {
        if self.sender.is_scrubbing() {
            return;
        }
        self.truth.clear();
        self.looks.clear();
        self.feed(Event::Scrub(vec![(DISK, ByteRange::new(0, LEAVES * LEAF_BYTES))]));
    }

    fn report(&mut self) {
        let (gap_cause, unstreamed, producer) = (String::new(), Vec::new(), self.producer);
        self.feed(Event::Report(CaptureReport { gap_count: 0, gap_cause, unstreamed, producer }));
    }

    fn step(&mut self, (op, what): (u8, u8)) {
        let pick = |count: usize| usize::from(what) % count.max(1);
        match op % 16 {
            0 => self.begin(what),
            1 => {
                let index = pick(self.flights.len());
                if let Some(flight) = self.flights.get_mut(index) {
                    flight.reached = true;
                    self.disk[flight.leaf as usize] = flight.value;
                }
            }
            2 => {
                let index = pick(self.flights.len());
                if self.flights.get(index).is_some_and(|flight| flight.reached) {
                    self.flights.remove(index);
                }
            }
            3 => {
                let taken = pick(4).min(self.ring.len());
                let requests: Vec<Request> = self.ring.drain(..taken).collect();
                requests.into_iter().for_each(|request| self.feed(Event::Captured(request)));
                self.report();
            }
            4 => {
                for action in self.sender.pump() {
                    self.execute(action);
                }
            }
            5 => {
                self.now += u64::from(what) * 2_000_000;
                self.feed(Event::Tick { now: SourceTime(self.now), known: None });
            }
            6 => self.deliver(),
            7 => (0..pick(4)).for_each(|_| self.commit()),
            8 => {
                let settled = |epoch: &mut Epoch| self.flights.iter().all(|flight| flight.epoch >= epoch.0);
                if let Some(epoch) = self.settling.take_if(settled) {
                    self.feed(Event::Settled { epoch, producer: self.producer });
                    self.report();
                }
            }
            9 => {
                if let Some((ask, range)) = self.asked.pop_front() {
                    let held = &self.disk[(range.start / LEAF_BYTES) as usize..(range.end() / LEAF_BYTES) as usize];
                    self.made.push_back((ask, held.iter().map(|value| offered(*value)).collect()));
                }
            }
            10 => {
                if let Some((ask, leaves)) = self.made.pop_front() {
                    self.feed(Event::ScrubRead { ask, leaves });
                }
            }
            11 => self.compare(),
            12 => {
                if let Some(message) = self.back.pop_front() {
                    self.feed(Event::Received(message));
                }
            }
            13 => self.look(),
            14 => self.scrub(),
            _ if what < 2 => self.new_link(),
            _ => {}
        }
    }

    /// Everything that is under way comes to its end, and one more stretch, into which nobody writes.
    fn settle(&mut self) {
        while self.flights.iter().any(|flight| !flight.reached) {
            let index = self.flights.iter().position(|flight| !flight.reached).expect("there is one");
            self.step((1, index as u8));
        }
        self.flights.clear();
        let round = |bench: &mut Bench| (3..14).for_each(|op| bench.step((op, 51)));
        (0..200).for_each(|_| round(self));
        assert!(self.ring.is_empty() && !self.sender.is_scrubbing() && self.committed == self.journaled);
        self.over = None;
        self.scrub();
        (0..200).for_each(|_| round(self));
        let over = self.over.take().expect("it is over");
        let outcome = over.expect("nothing was in the way");
        assert_eq!(outcome.bytes_of(ScrubFinding::Busy), 0);
        let differing: BTreeSet<u64> = outcome
            .of(ScrubFinding::Differs)
            .flat_map(|(_, range)| range.split_at_multiples(LEAF_BYTES).map(|leaf| leaf.start / LEAF_BYTES))
            .collect();
        let expected = (0..LEAVES).filter(|leaf| self.disk[*leaf as usize] != self.stream[*leaf as usize]);
        assert_eq!(differing, expected.collect());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn what_a_scrub_says_is_so_in_any_order_of_things(steps in prop::collection::vec(any::<(u8, u8)>(), 0..600)) {
        let mut bench = Bench::new();
        steps.into_iter().for_each(|step| bench.step(step));
        bench.settle();
    }
}

/// The test above would prove nothing if stretches never came to an end while others wrote.
#[test]
fn stretches_end_beside_writers() {
    let mut bench = Bench::new();
    let mut seed = 1u64;
    for _ in 0..100_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let op = (seed >> 33) as u8;
        // Writers come and go: there are moments in which a granule rests.
        let op = if op.is_multiple_of(16) && (bench.now / 10_000_000_000).is_multiple_of(2) { 4 } else { op };
        bench.step((op, (seed >> 45) as u8));
    }
    assert!(bench.stretches > 8 && bench.differing > 4, "{} stretches, {}", bench.stretches, bench.differing);
    bench.settle();
}

fn suspicion(chain: ChainId, until: SequenceNumber) -> Suspicion {
    let ranges = Ranges::of([(DISK, ByteRange::new(0, LEAF_BYTES))]);
    Suspicion { id: 5, chain, after: SequenceNumber(7), until, ranges, cause: "differs".into() }
}

#[test]
fn what_differs_is_a_break_of_its_ranges_and_a_suspicion_that_is_told_until_it_is_noted() {
    let mut bench = Bench::new();
    let [assigned, ..] = bench.sender.watermarks();
    bench.feed(Event::Diverged(suspicion(CHAIN, assigned.next())));
    assert!(!bench.sender.may_scrub() && bench.sender.is_healing());
    for link in 0..2 {
        let said: Vec<Message> = bench
            .sender
            .pump()
            .into_iter()
            .filter_map(|action| if let Action::Send(message) = action { Some(message) } else { None })
            .collect();
        assert!(matches!(said[0], Message::Break { at, .. } if at == assigned), "{link}: {said:?}");
        assert!(matches!(said[1], Message::Suspect { id: 5, until, .. } if until == assigned.next()), "{said:?}");
        bench.new_link();
    }
    assert_eq!(bench.sender.apply(Event::Received(Message::SuspectNoted { id: 4 })), []);
    let noted = bench.sender.apply(Event::Received(Message::SuspectNoted { id: 5 }));
    assert_eq!(noted, [Action::SuspicionNoted(5)]);
    let again = bench.sender.pump();
    assert!(!again.iter().any(|action| matches!(action, Action::Send(Message::Suspect { .. }))), "{again:?}");
}

#[test]
fn a_suspicion_of_another_chain_is_nobodys() {
    let mut bench = Bench::new();
    bench.feed(Event::Suspected(suspicion(ChainId([8; 16]), SequenceNumber(9))));
    assert_eq!(bench.sender.pump(), [Action::SuspicionNoted(5)]);
    assert!(bench.sender.pump().is_empty());
}
