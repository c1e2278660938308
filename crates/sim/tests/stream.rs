//! Sender, engine, splitter and receiver against the plainest server imaginable: it keeps every change and every heal
//! in memory and loses its journal on command. Finds what is wrong with the protocol before storage is involved.

use agent::engine::Wire;
use replication::cut::{Cut, CutPlanner, PointTime};
use replication::geometry::LEAF_BYTES;
use replication::receiver::{self, Action, Event, Greeting, Receiver, Remembered, SessionStart};
use replication::wire::{HealContent, Message, OfferedLeaf};
use replication::{
    ChainId, Change, ChangeKind, DiskId, Generation, HealId, InstanceId, PlainLeafHash, Ranges, SequenceNumber,
    StreamHash,
};
use sim::clock::{START_WALL_NS, TrueTime};
use sim::link::{LinkEnd, connect};
use sim::model::digest;
use sim::rng::Rng;
use sim::source::{Source, SourceShape};

/// Something that overwrites a range, at its place in the chain.
#[derive(Clone)]
struct Layer {
    sequence: SequenceNumber,
    disk: DiskId,
    start: u64,
    data: Vec<u8>,
}

struct Session {
    link: LinkEnd,
    receiver: Option<Receiver>,
    instance: Option<InstanceId>,
}

struct PlainServer {
    time: TrueTime,
    sizes: Vec<u64>,
    chain: ChainId,
    generation: Generation,
    layers: Vec<Layer>,
    cuts: Vec<Cut>,
    journaled: SequenceNumber,
    committed: SequenceNumber,
    hash: StreamHash,
    past: Option<(SequenceNumber, StreamHash)>,
    journal_lost: bool,
    last_point: PointTime,
    planner: CutPlanner,
    in_gap: bool,
    empty: bool,
    last_boot: Option<([u8; 16], [u8; 16])>,
    session: Option<Session>,
    heal: Option<(HealId, SequenceNumber, u64)>,
    waiting: Vec<(HealId, u32, DiskId, u64, Vec<OfferedLeaf>)>,
    heal_bytes: u64,
    refused: u32,
    disconnects: Vec<String>,
}

impl PlainServer {
    fn new(time: &TrueTime, sizes: Vec<u64>) -> PlainServer {
        PlainServer {
            time: time.clone(),
            sizes,
            chain: ChainId([9; 16]),
            generation: Generation(0),
            layers: Vec::new(),
            cuts: Vec::new(),
            journaled: SequenceNumber(0),
            committed: SequenceNumber(0),
            hash: StreamHash::default(),
            past: None,
            journal_lost: false,
            last_point: PointTime(0),
            planner: CutPlanner::default(),
            in_gap: true,
            empty: true,
            last_boot: None,
            session: None,
            heal: None,
            waiting: Vec::new(),
            heal_bytes: 0,
            refused: 0,
            disconnects: Vec::new(),
        }
    }

    fn accept(&mut self, link: LinkEnd) {
        self.save_session();
        self.session = Some(Session { link, receiver: None, instance: None });
    }

    fn save_session(&mut self) {
        if let Some(session) = self.session.take() {
            session.link.sever();
            if let Some(receiver) = session.receiver {
                self.planner = receiver.planner().clone();
                self.in_gap = receiver.in_gap();
                self.last_point = receiver.position().2;
            }
        }
        self.heal = None;
        self.waiting.clear();
    }

    /// Forgets every change that is not committed.
    fn lose_journal(&mut self) {
        self.save_session();
        let committed = self.committed;
        self.layers.retain(|layer| layer.sequence <= committed);
        self.cuts.retain(|cut| cut.sequence <= committed);
        self.journaled = committed;
        self.journal_lost = true;
    }

    fn wall(&self) -> PointTime {
        PointTime(START_WALL_NS + self.time.now())
    }

    fn contents(&self, disk: DiskId, through: SequenceNumber) -> Vec<u8> {
        let mut bytes = vec![0; self.sizes[disk.0 as usize] as usize];
        let mut layers: Vec<&Layer> =
            self.layers.iter().filter(|layer| layer.disk == disk && layer.sequence <= through).collect();
        layers.sort_by_key(|layer| layer.sequence);
        for layer in layers {
            bytes[layer.start as usize..][..layer.data.len()].copy_from_slice(&layer.data);
        }
        bytes
    }

    fn step(&mut self, rng: &mut Rng) {
        for _ in 0..64 {
            let Some(session) = &mut self.session else { return };
            let message = match session.link.try_receive() {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => return self.save_session(),
            };
            if let Message::Hello(hello) = &message {
                let hello = hello.clone();
                self.greet(&hello);
                continue;
            }
            let wall = self.wall();
            self.feed(Event::Received { message, wall });
        }
        if self.journaled > self.committed && rng.one_in(4) {
            self.committed = self.journaled;
            self.past = Some((self.committed, self.hash));
            self.feed(Event::Committed(self.committed));
        }
        self.compare();
    }

    fn greet(&mut self, hello: &replication::wire::Hello) {
        let known = Remembered {
            machine: hello.machine,
            chain: self.chain,
            stream: (!self.journal_lost && self.generation > Generation(0)).then_some((self.journaled, self.hash)),
            committed: self.committed,
            past: self.past,
            incomplete: self.in_gap,
            lacking: Ranges::default(),
            last_boot: self.last_boot,
            live: None,
            empty: self.empty,
        };
        let (continues, need) = match receiver::greet(hello, &known) {
            Greeting::Refuse { .. } => {
                self.refused += 1;
                return self.save_session();
            }
            Greeting::Continue { need } => (true, need),
            Greeting::Renew { need, .. } => {
                // What is journaled of the old generation stays: here, journal and vault are one.
                self.committed = self.journaled;
                self.generation = self.generation.next();
                self.journal_lost = false;
                self.in_gap = true;
                self.hash = StreamHash::default();
                self.planner = CutPlanner::default();
                (false, need)
            }
        };
        self.last_boot = Some((hello.boot, hello.vm_generation));
        let (receiver, welcome) = Receiver::start(
            hello,
            SessionStart {
                chain: self.chain,
                generation: self.generation,
                journaled: self.journaled,
                hash: self.hash,
                committed: self.committed,
                past: self.past,
                last_point: self.last_point,
                planner: self.planner.clone(),
                continues,
                need,
                in_gap: self.in_gap,
                base_empty: self.empty,
                window_bytes: 1 << 20,
                wall: self.wall(),
            },
        );
        let session = self.session.as_mut().expect("a session greets");
        session.receiver = Some(receiver);
        session.instance = Some(hello.instance);
        let _ = session.link.try_send(welcome);
    }

    fn feed(&mut self, event: Event) {
        let Some(session) = &mut self.session else { return };
        let Some(receiver) = &mut session.receiver else { return };
        for action in receiver.apply(event) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                if let Some(session) = &mut self.session {
                    let full = session.link.try_send(message);
                    assert!(!matches!(full, Ok(Some(_))), "answers are fewer than what asks for them");
                }
            }
            Action::Append { changes, hash } => {
                for change in &changes {
                    self.store(change);
                }
                self.hash = hash;
                self.journaled = changes.last().expect("never empty").sequence;
                self.feed(Event::Journaled(self.journaled));
            }
            Action::Cut(cut) => self.cuts.push(cut),
            Action::GapOpened { .. } | Action::Proven { .. } => {}
            Action::HealBegin { heal, p0, .. } => {
                self.empty = false;
                self.heal = Some((heal, p0, 0));
            }
            Action::Compare { heal, offer, disk, start, leaves } => {
                self.waiting.push((heal, offer, disk, start, leaves));
            }
            Action::CompareGranules { .. } | Action::CompareLeaves { .. } => {
                unreachable!("plain hashes are offered by leaf")
            }
            Action::Scrub { .. } | Action::Suspected { .. } => unreachable!("no scrub is switched on"),
            Action::HealData { heal, disk, range, content } => {
                let (current, p0, bytes) = self.heal.as_mut().expect("a heal began");
                assert_eq!(*current, heal);
                let data = match content {
                    HealContent::Data(data) => {
                        *bytes += data.len() as u64;
                        self.heal_bytes += data.len() as u64;
                        data.to_vec()
                    }
                    HealContent::Zero => vec![0; range.len as usize],
                    HealContent::Unreadable => return,
                };
                self.layers.push(Layer { sequence: *p0, disk, start: range.start, data });
                let bytes = *bytes;
                self.feed(Event::HealProcessed { heal, bytes });
            }
            Action::HealEnd { heal, cut } => {
                self.heal = None;
                self.committed = self.journaled;
                self.cuts.push(cut);
                self.feed(Event::Committed(self.committed));
                self.feed(Event::HealCommitted { heal });
            }
            Action::HealAborted { .. } => self.heal = None,
            Action::Disconnect { reason } => {
                self.disconnects.push(reason);
                self.save_session();
            }
        }
    }

    fn store(&mut self, change: &Change) {
        let (start, data) = match &change.kind {
            ChangeKind::Write { range, data } => (range.start, data.to_vec()),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => (range.start, vec![0; range.len as usize]),
            _ => return,
        };
        self.layers.push(Layer { sequence: change.sequence, disk: change.disk, start, data });
    }

    fn compare(&mut self) {
        let Some((_, p0, _)) = self.heal else { return };
        if self.committed < p0 {
            return;
        }
        for (heal, offer, disk, start, leaves) in std::mem::take(&mut self.waiting) {
            let head = self.contents(disk, SequenceNumber(u64::MAX));
            let wanted = leaves
                .iter()
                .enumerate()
                .map(|(index, leaf)| {
                    let at = start as usize + index * LEAF_BYTES as usize;
                    let mine = &head[at..(at + LEAF_BYTES as usize).min(head.len())];
                    match leaf {
                        OfferedLeaf::Zero => mine.iter().any(|byte| *byte != 0),
                        OfferedLeaf::Hash(hash) => PlainLeafHash::of(mine).0 != *hash,
                        OfferedLeaf::Unknown | OfferedLeaf::Unreadable => true,
                    }
                })
                .collect();
            self.feed(Event::Compared { heal, offer, wanted });
        }
    }
}

struct Tally {
    faults: [u32; 5],
    points: u64,
    heal_bytes: u64,
}

fn run(seed: u64) -> Tally {
    let mut rng = Rng::new(seed);
    let time = TrueTime::default();
    let shape = SourceShape {
        disk_bytes: vec![256 * 1024, 96 * 1024 + 512],
        ring_bytes: 48 * 1024,
        write_bytes_max: 12 * 1024,
        write_unit_bytes: 512,
        heal_window_bytes: replication::limits::HEAL_WINDOW_BYTES,
    };
    let mut source = Source::new(shape.clone(), &time, rng.fork(), None);
    let mut server = PlainServer::new(&time, shape.disk_bytes.clone());
    source.start_agent();
    let mut faults = [0; 5];
    let mut judged = 0;
    for round in 0..8000 {
        if round > 4000 && source.is_settled() {
            break;
        }
        let calm = round > 3300;
        time.advance(5_000_000 + rng.below(40_000_000));
        if !source.is_running() {
            source.start_agent();
        }
        if !source.is_plugged() && (calm || rng.one_in(8)) {
            let (near, far) = connect(&time, 1_000_000);
            server.accept(far);
            source.plug(near);
        }
        // The workload pauses at the end, so that everything can settle.
        if round < 3500 {
            let burst = if !calm && rng.one_in(60) { 24 } else { rng.below(3) };
            (0..burst).for_each(|_| source.write_something());
        }
        if !calm {
            match rng.below(900) {
                0..=3 => {
                    faults[0] += 1;
                    source.unplug();
                }
                4 => {
                    faults[1] += 1;
                    source.kill_agent();
                }
                5 => {
                    faults[2] += 1;
                    source.power_cut();
                }
                6 => {
                    faults[3] += 1;
                    source.unplug();
                    server.lose_journal();
                }
                7..=9 => {
                    faults[4] += 1;
                    if let Some(link) = source.link() {
                        link.stall(400_000_000);
                    }
                }
                _ => {}
            }
        }
        source.step();
        server.step(&mut rng);
        source.step();
        // Every point is judged when it is announced.
        while judged < server.cuts.len() {
            judge(seed, &source, &server, &server.cuts[judged]);
            judged += 1;
        }
        judged = judged.min(server.cuts.len());
    }
    assert!(source.is_settled(), "seed {seed}: not healthy again: {:?}", source.engine().map(|engine| engine.status()));
    let end: Vec<_> = (0..shape.disk_bytes.len())
        .map(|disk| server.contents(DiskId(disk as u16), SequenceNumber(u64::MAX)))
        .collect();
    assert!(end == source.snapshot(), "seed {seed}: the replica differs from the source at the end");
    assert_eq!((server.refused, &server.disconnects[..]), (0, &[][..]), "seed {seed}: the protocol broke down");
    Tally { faults, points: server.cuts.len() as u64, heal_bytes: server.heal_bytes }
}

fn judge(seed: u64, source: &Source, server: &PlainServer, cut: &Cut) {
    let disks: Vec<_> = (0..server.sizes.len())
        .map(|disk| (DiskId(disk as u16), server.contents(DiskId(disk as u16), cut.sequence)))
        .collect();
    let found = digest(disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])));
    assert!(!source.model.when(found).is_empty(), "seed {seed}: {cut:?} was never a state of the source");
}

#[test]
fn every_point_was_a_state_of_the_source() {
    let seeds: u64 = std::env::var("FARSHORE_STREAM_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(3);
    let first: u64 = std::env::var("FARSHORE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let count = if std::env::var_os("FARSHORE_SEED").is_some() { 1 } else { seeds };
    let mut totals = [0; 5];
    let (mut points, mut heal_bytes) = (0, 0);
    for seed in first..first + count {
        let tally = run(seed);
        for (total, faults) in totals.iter_mut().zip(tally.faults) {
            *total += faults;
        }
        points += tally.points;
        heal_bytes += tally.heal_bytes;
    }
    println!(
        "links lost, agents killed, power cuts, journals lost, stalls: {totals:?}; {points} points, {heal_bytes} bytes healed"
    );
    if count > 1 {
        assert!(totals.iter().all(|&total| total > 0), "some fault never occurred: {totals:?}");
    }
}
