//! A process server that keeps everything in memory, behind a real listener with mutual TLS: the real receiver, a plain
//! store. It can be stopped and started again with or without its journal.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::wire::{decode, frame_of};
use link::{Authority, Connection, FrameLink, LinkRuntime, Listener, Reception, Role, TokenOrder};
use replication::cut::{Cut, CutPlanner, PointTime};
use replication::geometry::{LEAF_BYTES, SECTOR_BYTES};
use replication::receiver::{self, Action, Event, Greeting, Receiver, Remembered, ScrubbedLeaf, SessionStart};
use replication::wire::{HealContent, HealNeed, Hello, Message, OfferedLeaf};
use replication::{
    ByteRange, ChainId, Change, ChangeKind, DiskId, Generation, HealId, MachineId, PlainLeafHash, Ranges, Reach,
    SequenceNumber, StreamHash,
};
use world::{Clock, RealFiles, SystemClock, SystemEntropy};

/// Stream bytes under way beyond what is journaled.
const WINDOW_BYTES: u64 = 16 << 20;

/// A disk as far as it was received: the bytes, and for each sector which position wrote it last.
#[derive(Default)]
pub struct Replica {
    pub bytes: Vec<u8>,
    written_at: Vec<SequenceNumber>,
}

impl Replica {
    fn put(&mut self, range: ByteRange, data: Option<&[u8]>, at: SequenceNumber) {
        for sector in range.split_at_multiples(SECTOR_BYTES) {
            // What a heal read lies below every later stream write, whenever it arrives.
            let newest = &mut self.written_at[(sector.start / SECTOR_BYTES) as usize];
            if *newest <= at {
                *newest = at;
                let target = &mut self.bytes[sector.within(0)];
                match data {
                    Some(data) => target.copy_from_slice(&data[sector.within(range.start)]),
                    None => target.fill(0),
                }
            }
        }
    }
}

/// What survives a restart of the server.
pub struct Store {
    discard: bool,
    /// What is journaled is in the vault at once, not only what a heal ends with.
    pub commits: bool,
    pub replicas: BTreeMap<DiskId, Replica>,
    pub generation: Generation,
    pub journaled: SequenceNumber,
    hash: StreamHash,
    planner: CutPlanner,
    last_point: PointTime,
    in_gap: bool,
    empty: bool,
    journal_lost: bool,
    last_boot: Option<([u8; 16], [u8; 16])>,
    /// The disks that the newest session announced.
    pub announced: Vec<DiskId>,
    /// The needs that sessions were greeted with.
    pub needs: Vec<HealNeed>,
    /// Positions at which gaps opened, with their cause.
    pub gaps: Vec<String>,
    /// What gaps of ranges were about.
    pub range_gaps: Vec<Ranges>,
    pub markers: Vec<String>,
    pub heals: u32,
    pub whole_heals: u32,
    pub heal_bytes: u64,
    pub stream_bytes: u64,
    pub offered_leaves: u64,
    /// What scrubs had compared, and what they said of points.
    pub scrubbed_bytes: u64,
    pub suspicions: Vec<(SequenceNumber, SequenceNumber, Ranges)>,
    pub farewells: u32,
    /// Turn everyone away, saying this.
    pub refuse: Option<String>,
    /// Take nothing from the link, so that it fills.
    pub stalled: bool,
    /// Every change from the moment on at which somebody put a list here.
    pub log: Option<Vec<Change>>,
    /// Every point from the moment on at which somebody put a list here: the cut, and what the first disk held.
    pub points: Option<Vec<(Cut, Vec<u8>)>>,
    /// What the first disk holds where heals of the machine end, from the moment on at which somebody put a list here.
    pub heal_ends: Option<Vec<Vec<u8>>>,
}

impl Store {
    /// Everything that was acknowledged but not committed is gone.
    pub fn lose_journal(&mut self) {
        self.journal_lost = true;
    }
}

/// A running process server.
pub struct Server {
    pub folder: tempfile::TempDir,
    pub authority: Arc<Authority>,
    pub runtime: LinkRuntime,
    pub store: Arc<Mutex<Store>>,
    pub address: String,
    /// Whether it takes joins and renews certificates, from the next opening on.
    pub admits: bool,
    /// Whether it accepts certificates that have ended.
    strict: bool,
    running: Option<(Arc<AtomicBool>, JoinHandle<()>)>,
}

impl Server {
    pub fn start(discard: bool) -> Server {
        Server::start_with(discard, None)
    }

    /// One whose certificates have this lifetime, and are not accepted after it.
    pub fn start_with(discard: bool, lifetime: Option<Duration>) -> Server {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let files = Arc::new(RealFiles::new(folder.path()));
        let authority = Authority::open(files, clock, Arc::new(SystemEntropy), "authority");
        let authority = authority.expect("the authority opens");
        let authority = Arc::new(match lifetime {
            Some(lifetime) => authority.with_lifetime(lifetime),
            None => authority,
        });
        let store = Store {
            discard,
            commits: false,
            replicas: BTreeMap::new(),
            generation: Generation(0),
            journaled: SequenceNumber(0),
            hash: StreamHash::default(),
            planner: CutPlanner::default(),
            last_point: PointTime(0),
            in_gap: true,
            empty: true,
            journal_lost: false,
            last_boot: None,
            announced: Vec::new(),
            needs: Vec::new(),
            gaps: Vec::new(),
            range_gaps: Vec::new(),
            markers: Vec::new(),
            heals: 0,
            whole_heals: 0,
            heal_bytes: 0,
            stream_bytes: 0,
            offered_leaves: 0,
            scrubbed_bytes: 0,
            suspicions: Vec::new(),
            farewells: 0,
            refuse: None,
            stalled: false,
            log: None,
            points: None,
            heal_ends: None,
        };
        let mut server = Server {
            folder,
            authority,
            runtime: LinkRuntime::new(1).expect("threads"),
            store: Arc::new(Mutex::new(store)),
            address: "127.0.0.1:0".to_owned(),
            admits: true,
            strict: lifetime.is_some(),
            running: None,
        };
        server.open();
        server
    }

    /// Opens the port again.
    pub fn open(&mut self) {
        let bind = || {
            let identity = self.authority.own_identity(Role::ProcessServer).expect("an identity");
            let admission = self.admits.then(|| self.authority.clone() as Arc<dyn link::Admission>);
            let trust = self.authority.trust();
            let trust = if self.strict { trust.with_grace_days(0) } else { trust };
            let reception = Reception::new(identity, trust, admission, Arc::new(SystemClock));
            Listener::bind(&self.runtime, &self.address, reception)
        };
        let listener = (0..200).find_map(|_| {
            let bound = bind().ok();
            if bound.is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            bound
        });
        let listener = listener.expect("the port is free again soon");
        self.address = listener.address().to_string();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (store, stop) = (self.store.clone(), stop.clone());
            move || serve(&listener, &store, &stop)
        });
        self.running = Some((stop, thread));
    }

    /// Closes the port and every connection, as a crash would.
    pub fn crash(&mut self) {
        let (stop, thread) = self.running.take().expect("it runs");
        stop.store(true, Ordering::SeqCst);
        thread.join().expect("the server does not panic");
    }

    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().expect("the server does not panic")
    }

    pub fn token(&self) -> link::JoinToken {
        self.token_of(None)
    }

    /// A token for a machine that is known already.
    pub fn token_of(&self, id: Option<[u8; 16]>) -> link::JoinToken {
        let order = TokenOrder {
            role: Role::Agent,
            id,
            valid_for: Duration::from_secs(3600),
            addresses: vec![self.address.clone()],
        };
        self.authority.order_token(&order).expect("a token")
    }

    /// A folder of the given name beside the server's files.
    pub fn folder(&self, name: &str) -> PathBuf {
        Path::new(self.folder.path()).join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            stop.store(true, Ordering::SeqCst);
            let _ = thread.join();
        }
    }
}

fn serve(listener: &Listener, store: &Mutex<Store>, stop: &AtomicBool) {
    let lock = || store.lock().expect("tests do not panic while holding the store");
    while !stop.load(Ordering::SeqCst) {
        let accepted = listener.accept(Duration::from_millis(5)).expect("listening");
        let Some((peer, connection)) = accepted else { continue };
        let mut session = Session {
            connection,
            machine: MachineId(peer.id),
            receiver: None,
            heal: None,
            committed: SequenceNumber(0),
            over: false,
        };
        while !stop.load(Ordering::SeqCst) && !session.over {
            if lock().stalled {
                thread::sleep(Duration::from_millis(2));
                continue;
            }
            match session.connection.recv(Duration::from_millis(2)) {
                Ok(Some(frame)) => {
                    let message = decode(frame).expect("the agent speaks the protocol");
                    session.take(&mut lock(), message);
                }
                Ok(None) => {}
                Err(_) => session.over = true,
            }
            session.commit(&mut lock());
        }
        if let Some(receiver) = session.receiver {
            let mut store = lock();
            store.planner = receiver.planner().clone();
            store.in_gap = receiver.in_gap();
            store.last_point = receiver.position().2;
        }
    }
}

struct Session {
    connection: Connection,
    machine: MachineId,
    receiver: Option<Receiver>,
    heal: Option<(SequenceNumber, u64)>,
    /// What the agent was last told to be in the vault.
    committed: SequenceNumber,
    over: bool,
}

impl Session {
    fn take(&mut self, store: &mut Store, message: Message) {
        match message {
            Message::Hello(hello) => self.greet(store, &hello),
            Message::Bye { .. } => {
                store.farewells += 1;
                self.over = true;
            }
            message => self.feed(store, Event::Received { message, wall: wall() }),
        }
    }

    /// Everything journaled counts as committed a moment later.
    fn commit(&mut self, store: &mut Store) {
        if self.receiver.is_some() && store.journaled > self.committed {
            self.committed = store.journaled;
            self.feed(store, Event::Committed(self.committed));
        }
    }

    fn send(&mut self, message: &Message) {
        self.over |= self.connection.send(frame_of(message)).is_err();
    }

    fn greet(&mut self, store: &mut Store, hello: &Hello) {
        if let Some(reason) = store.refuse.clone() {
            self.send(&Message::Refuse { code: replication::wire::RefusalCode::NotAuthorised, reason });
            let _ = self.connection.close(Duration::from_secs(5));
            self.over = true;
            return;
        }
        let chain = ChainId([9; 16]);
        let known = Remembered {
            machine: self.machine,
            chain,
            stream: (!store.journal_lost && store.generation > Generation(0)).then_some((store.journaled, store.hash)),
            committed: store.journaled,
            past: None,
            incomplete: store.in_gap,
            lacking: Ranges::default(),
            last_boot: store.last_boot,
            live: None,
            empty: store.empty,
        };
        let (continues, need) = match receiver::greet(hello, &known) {
            Greeting::Refuse { reason, .. } => panic!("refused: {reason}"),
            Greeting::Continue { need } => (true, need),
            Greeting::Renew { need, .. } => {
                store.generation = store.generation.next();
                store.journal_lost = false;
                store.in_gap = true;
                store.planner = CutPlanner::default();
                (false, need)
            }
        };
        store.needs.push(need);
        store.announced = hello.disks.iter().map(|disk| disk.disk).collect();
        store.last_boot = Some((hello.boot, hello.vm_generation));
        for disk in &hello.disks {
            let replica = store.replicas.entry(disk.disk).or_default();
            let sectors = if store.discard { 0 } else { disk.size_bytes / SECTOR_BYTES };
            replica.bytes.resize((sectors * SECTOR_BYTES) as usize, 0);
            replica.written_at.resize(sectors as usize, SequenceNumber(0));
        }
        let (receiver, welcome) = Receiver::start(
            hello,
            SessionStart {
                chain,
                generation: store.generation,
                journaled: store.journaled,
                hash: store.hash,
                committed: store.journaled,
                past: None,
                last_point: store.last_point,
                planner: store.planner.clone(),
                continues,
                need,
                in_gap: store.in_gap || need != HealNeed::Nothing,
                base_empty: store.empty,
                window_bytes: WINDOW_BYTES,
                wall: wall(),
            },
        );
        self.receiver = Some(receiver);
        self.send(&welcome);
    }

    fn feed(&mut self, store: &mut Store, event: Event) {
        let actions = self.receiver.as_mut().expect("the agent greets first").apply(event);
        for action in actions {
            self.act(store, action);
        }
    }

    fn act(&mut self, store: &mut Store, action: Action) {
        match action {
            Action::Send(message) => self.send(&message),
            Action::Append { changes, hash } => {
                changes.iter().for_each(|change| store.append(change));
                store.hash = hash;
                store.journaled = changes.last().expect("never empty").sequence;
                let journaled = store.journaled;
                self.feed(store, Event::Journaled(journaled));
                if store.commits {
                    self.feed(store, Event::Committed(journaled));
                }
            }
            Action::Cut(cut) => store.note_point(cut),
            Action::Proven { .. } => {}
            Action::GapOpened { reach: Reach::Ranges(ranges), .. } => store.range_gaps.push(ranges),
            Action::GapOpened { cause, .. } => store.gaps.push(cause),
            Action::HealBegin { p0, whole, .. } => {
                store.empty = false;
                store.heals += 1;
                store.whole_heals += u32::from(whole);
                self.heal = Some((p0, 0));
            }
            Action::Compare { heal, offer, disk, start, leaves } => {
                let wanted = store.compare(disk, start, &leaves);
                self.feed(store, Event::Compared { heal, offer, wanted });
            }
            Action::CompareGranules { .. } | Action::CompareLeaves { .. } => {
                unreachable!("plain hashes are offered by leaf")
            }
            Action::Scrub { offer, disk, start, leaves, .. } => {
                store.scrubbed_bytes += leaves.len() as u64 * 4096;
                let verdict = |differs| if differs { ScrubbedLeaf::Differs } else { ScrubbedLeaf::Same };
                let leaves = store.compare(disk, start, &leaves).into_iter().map(verdict).collect();
                self.feed(store, Event::Scrubbed { offer, leaves });
            }
            Action::Suspected { id, after, until, ranges, .. } => {
                store.suspicions.push((after, until, ranges));
                self.feed(store, Event::SuspicionNoted { id });
            }
            Action::HealData { heal, disk, range, content } => self.heal_data(store, heal, disk, range, &content),
            Action::HealEnd { heal, cut } => {
                self.heal = None;
                if let Some(ends) = &mut store.heal_ends {
                    assert_eq!(cut.sequence, store.journaled, "a heal ends with the newest change that has arrived");
                    ends.push(store.replicas[&DiskId(0)].bytes.clone());
                }
                store.note_point(cut);
                let journaled = store.journaled;
                self.feed(store, Event::Committed(journaled));
                self.feed(store, Event::HealCommitted { heal });
            }
            Action::HealAborted { .. } => self.heal = None,
            Action::Disconnect { reason } => panic!("the agent broke the protocol: {reason}"),
        }
    }

    fn heal_data(&mut self, store: &mut Store, heal: HealId, disk: DiskId, range: ByteRange, content: &HealContent) {
        let (p0, bytes) = self.heal.as_mut().expect("a heal began");
        let data = match content {
            HealContent::Data(data) => Some(&data[..]),
            HealContent::Zero => None,
            HealContent::Unreadable => panic!("the image is readable"),
        };
        let len = data.map_or(0, <[u8]>::len) as u64;
        *bytes += len;
        store.heal_bytes += len;
        if !store.discard {
            store.replicas.get_mut(&disk).expect("announced").put(range, data, *p0);
        }
        let bytes = *bytes;
        self.feed(store, Event::HealProcessed { heal, bytes });
    }
}

impl Store {
    /// Right only where nothing has come after the cut.
    fn note_point(&mut self, cut: Cut) {
        if let Some(points) = &mut self.points {
            assert_eq!(cut.sequence, self.journaled, "no change lies behind a scan's end when it is told");
            points.push((cut, self.replicas[&DiskId(0)].bytes.clone()));
        }
    }

    fn append(&mut self, change: &Change) {
        if let Some(log) = &mut self.log {
            log.push(change.clone());
        }
        let (range, data) = match &change.kind {
            ChangeKind::Write { range, data } => (*range, Some(&data[..])),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => (*range, None),
            ChangeKind::Marker { name, .. } => return self.markers.push(name.clone()),
            _ => return,
        };
        self.stream_bytes += data.map_or(0, <[u8]>::len) as u64;
        if !self.discard {
            self.replicas.get_mut(&change.disk).expect("announced").put(range, data, change.sequence);
        }
    }

    fn compare(&mut self, disk: DiskId, start: u64, leaves: &[OfferedLeaf]) -> Vec<bool> {
        self.offered_leaves += leaves.len() as u64;
        if self.discard {
            return vec![true; leaves.len()];
        }
        let replica = &self.replicas[&disk].bytes;
        let wanted = |(index, leaf): (usize, &OfferedLeaf)| {
            let at = start as usize + index * LEAF_BYTES as usize;
            let mine = &replica[at..(at + LEAF_BYTES as usize).min(replica.len())];
            match leaf {
                OfferedLeaf::Zero => mine.iter().any(|byte| *byte != 0),
                OfferedLeaf::Hash(hash) => PlainLeafHash::of(mine).0 != *hash,
                OfferedLeaf::Unknown | OfferedLeaf::Unreadable => true,
            }
        };
        leaves.iter().enumerate().map(wanted).collect()
    }
}

fn wall() -> PointTime {
    PointTime(SystemClock.wall().0)
}
