//! The receiver under any events: a sender that says anything, an owner that keeps its side of the contract.

use bytes::Bytes;

use super::script::{Script, over_the_wire, raw};
use crate::geometry::{GRANULE_BYTES, LEAF_BYTES};
use crate::receiver::{Action, Event, Greeting, Receiver, Remembered, ScrubbedLeaf, SessionStart, greet};
use crate::wire::{HealContent, HealNeed, Hello, Message, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, Resume};
use crate::{
    ByteRange, ChainId, Change, ChangeKind, Cut, CutKind, DiskGeometry, DiskId, DiskIdentity, Generation, HealId,
    InstanceId, LeafKey, MachineId, MarkerKind, PointTime, Ranges, Reach, SequenceNumber, SourceTime, StreamHash,
};

/// Bytes of the one disk.
const DISK_BYTES: u64 = 24 * GRANULE_BYTES + 512;
/// Events of one script.
const EVENTS_MAX: usize = 2000;

/// A script of events for a receiver: it never panics, hands changes on in order and without holes and the stream's hash
/// with them, acknowledges nothing before it is durable and never less than before, sets no cut inside a gap of the
/// machine, proves no time twice, and the same script does the same twice. Valid if changes were handed on.
pub fn receiver_events(data: &[u8]) -> bool {
    let first = Owner::live(data);
    assert_eq!(first, Owner::live(data), "the same events led to something else");
    first.1
}

struct Owner<'a> {
    script: Script<'a>,
    receiver: Receiver,
    trace: blake3::Hasher,
    wall: u64,
    received: SequenceNumber,
    hash: StreamHash,
    /// Newest journaled and committed change that was acknowledged.
    acknowledged: (SequenceNumber, SequenceNumber),
    journaled: SequenceNumber,
    last_cut: SequenceNumber,
    stamped: SourceTime,
    proven: PointTime,
    in_gap: bool,
    heal: HealId,
    p0: SequenceNumber,
    of_machine: bool,
    offers: Vec<(u32, usize)>,
    scrubbed: Vec<(u64, usize)>,
    over: bool,
    any: bool,
}

fn hello(script: &mut Script<'_>, chain: ChainId, last: SequenceNumber) -> Hello {
    let flags = script.u8();
    let resume = (flags & 1 == 0).then(|| Resume {
        chain: if flags & 2 == 2 { ChainId([8; 16]) } else { chain },
        generation: last.generation(),
        released: SequenceNumber(script.position(last.0)),
        sent: SequenceNumber(script.position(last.0)),
        hash: StreamHash::default(),
    });
    let lacking = (flags & 4 == 4).then(|| (DiskId(0), ByteRange::new(0, GRANULE_BYTES)));
    Hello {
        version: if flags & 0xc0 == 0xc0 { 0 } else { PROTOCOL_VERSION },
        machine: MachineId([1; 16]),
        instance: InstanceId([2; 16]),
        boot: [3 + (flags >> 3 & 1); 16],
        vm_generation: [0; 16],
        name: "fuzzed".into(),
        disks: vec![DiskGeometry {
            disk: DiskId(0),
            path: "/dev/vda".into(),
            identity: DiskIdentity { serial: "serial".into(), fingerprint: [0; 16] },
            size_bytes: DISK_BYTES,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        }],
        resume,
        need: [HealNeed::Nothing, HealNeed::Maps, HealNeed::Whole, HealNeed::Nothing][usize::from(flags >> 4 & 3)],
        cleared: (flags & 8 == 8).then_some((chain, SequenceNumber(last.0 / 2))),
        now: SourceTime(script.position(1 << 40)),
        started: PointTime(5),
        lacking: Ranges::of(lacking),
        followed: None,
    }
}

impl Owner<'_> {
    fn live(data: &[u8]) -> ([u8; 32], bool) {
        let mut script = Script::new(data);
        let chain = ChainId([9; 16]);
        let generation = Generation(1 + u32::from(script.u8() & 3));
        let last = SequenceNumber(generation.base().0 + u64::from(script.u8()));
        let hello = hello(&mut script, chain, last);
        let Some(Message::Hello(hello)) = over_the_wire(&Message::Hello(hello)) else { return ([0; 32], false) };
        let known = Remembered {
            machine: MachineId([1; 16]),
            chain,
            stream: (script.u8() & 3 != 0).then_some((last, StreamHash::default())),
            committed: SequenceNumber(last.0.saturating_sub(u64::from(script.u8() & 15))),
            past: (script.u8() & 3 == 0).then_some((last, StreamHash([script.u8() & 1; 32]))),
            incomplete: script.u8() & 7 == 7,
            lacking: Ranges::default(),
            last_boot: Some(([3; 16], [0; 16])),
            live: None,
            empty: script.u8() & 15 == 15,
        };
        let (continues, need) = match greet(&hello, &known) {
            Greeting::Refuse { .. } => return ([1; 32], false),
            Greeting::Continue { need } => (true, need),
            Greeting::Renew { need, .. } => (false, need),
        };
        let generation = if continues { generation } else { generation.next() };
        let wall = script.position(1 << 60);
        let in_gap = !continues || known.incomplete;
        let start = SessionStart {
            chain,
            generation,
            journaled: last,
            hash: StreamHash::default(),
            committed: known.committed,
            past: known.past,
            last_point: PointTime(script.position(wall)),
            planner: crate::cut::CutPlanner::default(),
            continues,
            need,
            in_gap,
            base_empty: known.empty,
            window_bytes: 1 << 20,
            wall: PointTime(wall),
        };
        let (receiver, welcome) = Receiver::start(&hello, start);
        assert!(over_the_wire(&welcome).is_some(), "a welcome can be sent");
        let mut owner = Owner {
            script,
            receiver,
            trace: blake3::Hasher::new(),
            wall,
            received: last,
            hash: StreamHash::default(),
            acknowledged: (SequenceNumber(0), SequenceNumber(0)),
            journaled: last,
            last_cut: SequenceNumber(0),
            stamped: SourceTime(0),
            proven: PointTime(0),
            in_gap,
            heal: HealId(0),
            p0: SequenceNumber(0),
            of_machine: true,
            offers: Vec::new(),
            scrubbed: Vec::new(),
            over: false,
            any: false,
        };
        let mut events = 0;
        while !owner.script.is_over() && !owner.over && events < EVENTS_MAX {
            events += 1;
            owner.event();
        }
        (*owner.trace.finalize().as_bytes(), owner.any)
    }

    fn event(&mut self) {
        let message = match self.script.u8() % 24 {
            0..=4 => self.changes(),
            5 | 6 => Message::Proof {
                captured: SequenceNumber(self.script.position(self.received.0)),
                time: SourceTime(self.script.position(1 << 40)),
                now: SourceTime(self.script.position(1 << 40)),
            },
            7 => {
                let (at, reach) = (self.near(), self.reach());
                Message::Break { at, reach, cause: "the send buffer was full".into() }
            }
            8 | 9 => {
                let hashes = match self.script.u8() & 1 {
                    0 => OfferHashes::Plain,
                    _ => OfferHashes::Keyed(LeafKey::new([7; 32])),
                };
                let (heal, p0, reach) =
                    (self.some_heal(), SequenceNumber(self.script.position(self.p0.0)), self.reach());
                Message::HealBegin { heal, p0, whole: false, reach, hashes, planned_bytes: 1 << 20 }
            }
            10 => {
                let (heal, offer, disk, start) =
                    (self.some_heal(), u32::from(self.script.u8()), self.disk(), self.leaf());
                let leaves = vec![OfferedLeaf::Unknown; usize::from(self.script.u8())];
                Message::Offer { heal, offer, disk, start, leaves }
            }
            11 => {
                let (heal, offer, disk, start) =
                    (self.some_heal(), u32::from(self.script.u8()), self.disk(), self.leaf());
                let leaves = u32::from(self.script.u8());
                let honest = crate::offers::granule_leaves(start, u64::from(leaves)).count();
                let count = if self.script.u8() < 224 { honest } else { usize::from(self.script.u8()) };
                let granules = vec![OfferedLeaf::Zero; count];
                Message::OfferGranules { heal, offer, disk, start, leaves, granules }
            }
            12 => {
                let heal = self.some_heal();
                let index = usize::from(self.script.u8()) % self.offers.len().max(1);
                let (offer, leaves) = self.offers.get(index).copied().unwrap_or((3, 4));
                Message::OfferLeaves { heal, offer, leaves: vec![OfferedLeaf::Zero; leaves] }
            }
            13 => {
                let (heal, disk, range) = (self.some_heal(), self.disk(), self.range());
                let content = match self.script.u8() % 3 {
                    0 => HealContent::Data(Bytes::from(vec![1; range.len as usize])),
                    1 => HealContent::Zero,
                    _ => HealContent::Unreadable,
                };
                Message::HealData { heal, disk, range, content }
            }
            14 => {
                let (heal, end) = (self.some_heal(), self.near());
                Message::HealEnd { heal, end }
            }
            15 => Message::HealAbort { heal: self.some_heal(), cause: "a break".into() },
            16 => match raw(&mut self.script) {
                Some(message) => message,
                None => return,
            },
            17 => {
                let through = SequenceNumber(self.script.position(self.received.0)).min(self.received);
                self.journaled = self.journaled.max(through);
                return self.feed(Event::Journaled(through));
            }
            18 => {
                let through = SequenceNumber(self.script.position(self.journaled.0)).min(self.journaled);
                return self.feed(Event::Committed(through));
            }
            19 => {
                let Some((offer, leaves)) = self.offers.pop() else { return };
                let wanted: Vec<bool> = (0..leaves).map(|_| self.script.u8() & 1 == 1).collect();
                let left = wanted.iter().filter(|wanted| **wanted).count();
                if left > 0 {
                    self.offers.insert(0, (offer, left));
                }
                return self.feed(Event::Compared { heal: self.heal, offer, wanted });
            }
            20 => return self.feed(Event::HealProcessed { heal: self.heal, bytes: 4096 }),
            21 => return self.feed(Event::HealCommitted { heal: self.heal }),
            22 => return self.feed(Event::HealFailed { heal: self.heal, reason: "no room".into() }),
            _ => match self.script.u8() {
                0..=63 => return self.feed(Event::Window(1 << 16)),
                what @ 64..=127 => {
                    let (offer, behind, disk, start) = (u64::from(what % 40), self.near(), self.disk(), self.leaf());
                    let leaves = vec![OfferedLeaf::Unknown; usize::from(self.script.u8())];
                    Message::ScrubOffer { offer, behind, disk, start, leaves }
                }
                what @ 128..=191 => {
                    let Some((offer, leaves)) = self.scrubbed.pop() else { return };
                    let of = [ScrubbedLeaf::Same, ScrubbedLeaf::Differs, ScrubbedLeaf::Untold];
                    let leaves = (0..leaves).map(|leaf| of[(leaf + usize::from(what)) % 3]).collect();
                    return self.feed(Event::Scrubbed { offer, leaves });
                }
                what @ 192..=223 => {
                    let (after, until) = (self.near(), self.near());
                    let ranges = Ranges::of([(DiskId(0), self.range())]);
                    Message::Suspect { id: u64::from(what), after, until, ranges, cause: "differs".into() }
                }
                what => return self.feed(Event::SuspicionNoted { id: u64::from(what) }),
            },
        };
        if let Some(message) = over_the_wire(&message) {
            self.wall = self.wall.saturating_add(u64::from(self.script.u16()) << 12);
            self.feed(Event::Received { message, wall: PointTime(self.wall) });
        }
    }

    fn near(&mut self) -> SequenceNumber {
        SequenceNumber(self.script.position(self.received.0))
    }

    fn some_heal(&mut self) -> HealId {
        if self.script.u8() < 240 { self.heal } else { HealId(u64::from(self.script.u8())) }
    }

    fn disk(&mut self) -> DiskId {
        DiskId(u16::from(self.script.u8() >= 250))
    }

    fn leaf(&mut self) -> u64 {
        let near = u64::from(self.script.u16() % 400) * LEAF_BYTES;
        self.script.position(near) / LEAF_BYTES * LEAF_BYTES
    }

    fn range(&mut self) -> ByteRange {
        let start = u64::from(self.script.u16() % 4096) * 512;
        ByteRange::new(start, 512 * (1 + u64::from(self.script.u8() % 32)))
    }

    fn reach(&mut self) -> Reach {
        match self.script.u8() & 3 {
            0 => {
                let ranges = [(DiskId(0), self.range()), (DiskId(0), self.range())];
                Reach::Ranges(Ranges::of(ranges))
            }
            _ => Reach::Machine,
        }
    }

    fn changes(&mut self) -> Message {
        let mut last = self.received;
        let count = 1 + self.script.u8() % 8;
        let mut changes = Vec::new();
        for _ in 0..count {
            let sequence = SequenceNumber(match self.script.u8() {
                0..=243 => last.0.saturating_add(1),
                244..=247 => (((last.0 >> 44) + 1) << 44).saturating_add(1),
                _ => self.script.position(last.0),
            });
            last = sequence;
            let what = self.script.u8();
            let kind = match what % 8 {
                0 => ChangeKind::Marker { kind: MarkerKind::Crash, name: "now".into() },
                1 => ChangeKind::HealStart { heal: HealId(self.heal.0.saturating_add(1)) },
                2 => {
                    let mut changed = self.geometry();
                    changed.size_bytes = u64::from(self.script.u16()) * 512;
                    ChangeKind::Geometry(changed)
                }
                3 => ChangeKind::Zero { range: self.range() },
                _ => {
                    let range = self.range();
                    ChangeKind::Write { range, data: Bytes::from(vec![what; range.len as usize]) }
                }
            };
            if let ChangeKind::HealStart { heal } = kind {
                (self.heal, self.p0) = (heal, sequence);
            }
            let near = (1 << 40) + (u64::from(self.script.u16()) << 22);
            let time = SourceTime(self.script.position(near));
            changes.push(Change { sequence, time, disk: self.disk(), continues: what & 0x80 != 0, kind });
        }
        Message::Changes(changes)
    }

    fn geometry(&mut self) -> DiskGeometry {
        DiskGeometry {
            disk: self.disk(),
            path: "/dev/vda".into(),
            identity: DiskIdentity { serial: "serial".into(), fingerprint: [0; 16] },
            size_bytes: DISK_BYTES,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        }
    }

    fn feed(&mut self, event: Event) {
        for action in self.receiver.apply(event) {
            match &action {
                Action::Send(message) => self.trace.update(&message.encode().body()),
                other => self.trace.update(format!("{other:?}").as_bytes()),
            };
            self.look_at(action);
        }
        let (received, hash, _) = self.receiver.position();
        assert!(self.over || (received, hash) == (self.received, self.hash), "it is at {received}, {}", self.received);
    }

    fn look_at(&mut self, action: Action) {
        assert!(!self.over, "{action:?} after the end");
        match action {
            Action::Send(message) => {
                let message = over_the_wire(&message).expect("what the receiver says can be said");
                if let Message::Ack { journaled, committed, .. } = message {
                    let before = std::mem::replace(&mut self.acknowledged, (journaled, committed));
                    assert!(journaled >= before.0 && committed >= before.1, "{journaled} after {before:?}");
                    assert!(journaled <= self.journaled && committed <= journaled, "{journaled} is not durable");
                }
            }
            Action::Append { changes, hash } => {
                self.any = true;
                for change in changes {
                    let (last, now) = (self.received, change.sequence);
                    let first_of_newer = last.generation() < now.generation() && now.0 == now.generation().base().0 + 1;
                    assert!(now.0 == last.0 + 1 || first_of_newer, "{now} follows {last}");
                    assert!(change.time >= self.stamped, "point time goes back at {now}");
                    (self.received, self.stamped) = (now, change.time);
                }
                self.hash = hash;
            }
            Action::Cut(cut) => self.judge_cut(&cut),
            Action::GapOpened { at, reach, .. } => {
                assert!(at <= self.received, "a gap opens at {at}, nothing is known after {}", self.received);
                self.in_gap |= reach == Reach::Machine;
            }
            Action::Proven { through, time, .. } => {
                assert!(through == self.received && time >= self.proven && !self.in_gap, "{time:?} of {through}");
                self.proven = time;
            }
            Action::HealBegin { heal, p0, reach, .. } => {
                assert!(p0 <= self.received, "a heal begins where the stream is not yet");
                (self.heal, self.of_machine) = (heal, reach == Reach::Machine);
                assert!(self.in_gap || !self.of_machine, "a heal of the machine without a gap");
                self.offers.clear();
            }
            Action::Compare { start, leaves, .. } => {
                let end = start + leaves.len() as u64 * LEAF_BYTES;
                assert!(end <= (u64::from(u16::MAX) * 512).max(DISK_BYTES).next_multiple_of(LEAF_BYTES));
            }
            Action::CompareGranules { offer, granules, .. } => self.offers.push((offer, granules.len())),
            Action::HealEnd { cut, .. } => {
                assert!(cut.sequence <= self.received && matches!(cut.kind, CutKind::HealEnd | CutKind::Marker { .. }));
                self.in_gap &= !self.of_machine;
            }
            Action::Scrub { offer, behind, start, leaves, .. } => {
                assert!(behind <= self.received, "compared behind {behind}, nothing is known after {}", self.received);
                let end = start + leaves.len() as u64 * LEAF_BYTES;
                assert!(end <= (u64::from(u16::MAX) * 512).max(DISK_BYTES).next_multiple_of(LEAF_BYTES));
                assert!(!self.scrubbed.iter().any(|(known, _)| *known == offer), "{offer} is compared twice at a time");
                self.scrubbed.push((offer, leaves.len()));
                assert!(self.scrubbed.len() <= crate::limits::OFFERS_IN_FLIGHT_MAX);
            }
            Action::Suspected { after, until, .. } => {
                assert!(
                    after < until && until.0 <= self.received.0.saturating_add(1),
                    "{after} to {until} of {}",
                    self.received
                );
            }
            Action::Disconnect { .. } => self.over = true,
            Action::CompareLeaves { .. } | Action::HealData { .. } | Action::HealAborted { .. } => {}
        }
    }

    fn judge_cut(&mut self, cut: &Cut) {
        assert!(!self.in_gap, "{cut:?} lies inside a gap");
        assert!(cut.sequence <= self.received && cut.sequence >= self.last_cut, "{cut:?} after {}", self.last_cut);
        self.last_cut = cut.sequence;
    }
}
