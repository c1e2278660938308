//! How a process server opens a generation: behind its own, after an answer that was lost or a kill in between, without
//! letting go of what its journal holds; and behind another server's, if the sender knows the same past of the stream.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use bytes::Bytes;
use process_server::ingest::{Ingest, Work};
use process_server::journal::{ChainState, HostKey, Journal, JournalConfig, JournalThread, QueueConfig};
use process_server::pipeline::{Greeted, Pace, Pipeline, PipelineError, Services};
use replication::receiver::{Event, Receiver, ScrubbedLeaf};
use replication::wire::{HealNeed, Hello, Message, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, Resume, Welcome};
use replication::{
    ByteRange, ChainId, Change, ChangeKind, DiskGeometry, DiskId, DiskIdentity, Generation, HealId, InstanceId,
    MachineId, PlainLeafHash, PointTime, Ranges, Reach, SequenceNumber, SourceTime, StreamHash,
};
use vault::keys::{PassphraseCost, WriterRole, WriterSession};
use vault::pack::load_dedup;
use vault::points::Which;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{
    ChainHistory, FolderStore, ObjectName, OpenKeys, Points, Store, StoreError, UnlockedVault, Vault, WriterKeys,
};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

const MACHINE: MachineId = MachineId([7; 16]);

fn hello(instance: u8, resume: Option<Resume>, need: HealNeed) -> Hello {
    let disk = DiskGeometry {
        disk: DiskId(0),
        identity: DiskIdentity { serial: "disk-0".into(), fingerprint: [0; 16] },
        path: "/dev/disk0".into(),
        size_bytes: 1 << 20,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    };
    Hello {
        version: PROTOCOL_VERSION,
        machine: MACHINE,
        instance: InstanceId([instance; 16]),
        boot: [1; 16],
        vm_generation: [0; 16],
        name: "test".into(),
        disks: vec![disk],
        resume,
        need,
        cleared: None,
        now: SourceTime(0),
        started: PointTime(1),
        lacking: Ranges::default(),
        followed: None,
    }
}

/// A store that keeps the next manifest, or does not, and says nothing about it.
struct Unanswered {
    inner: FolderStore,
    silent: AtomicU32,
}

impl Store for Unanswered {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        let manifest = name.as_str().contains("/m/");
        let silent = manifest
            && self.silent.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok();
        let created = self.inner.create(name, parts);
        match silent {
            true => Err(StoreError::Unavailable { at: name.to_string(), source: "the answer was lost".into() }),
            false => created,
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.read(name, range)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Site {
    folder: tempfile::TempDir,
    store: Arc<Unanswered>,
    unlocked: UnlockedVault,
}

impl Site {
    fn new() -> Site {
        let folder = tempfile::tempdir().expect("a folder");
        let vault = folder.path().join("vault");
        fs::create_dir(&vault).expect("a folder");
        let (entropy, clock): (Arc<dyn Entropy>, Arc<dyn Clock>) = (Arc::new(SystemEntropy), Arc::new(SystemClock));
        let inner = FolderStore::open(&vault, &SystemEntropy).expect("a store");
        let store = Arc::new(Unanswered { inner, silent: AtomicU32::new(0) });
        let dynamic: Arc<dyn Store> = store.clone();
        let (unlocked, _) =
            Vault::create(dynamic, "passphrase", PassphraseCost::TRIVIAL, &entropy, &clock).expect("made");
        Site { folder, store, unlocked }
    }

    fn server(&self, name: &str) -> Server {
        let state = self.folder.path().join(name);
        fs::create_dir(&state).expect("a folder");
        let (entropy, clock): (Arc<dyn Entropy>, Arc<dyn Clock>) = (Arc::new(SystemEntropy), Arc::new(SystemClock));
        let keys = self.unlocked.grant_writer(WriterRole::ProcessServer, name, &entropy, &clock).expect("a grant");
        Server { state, keys, store: self.store.clone() }
    }

    fn history(&self, chain: ChainId) -> ChainHistory {
        ChainHistory::load(self.unlocked.store(), self.unlocked.keys(), chain).expect("readable")
    }
}

/// What of a server outlives its process.
struct Server {
    state: PathBuf,
    keys: WriterKeys,
    store: Arc<Unanswered>,
}

/// A process of it.
struct Process {
    services: Services,
    recovered: BTreeMap<ChainId, ChainState>,
}

fn journal(state: &Path) -> (JournalThread, BTreeMap<ChainId, ChainState>) {
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(state));
    let host = HostKey::load_or_create(&*files, "journal", &SystemEntropy).expect("a key");
    let config = JournalConfig::new(64 << 20);
    let (journal, recovered) = Journal::open(files, Arc::new(SystemEntropy), "journal", config, &host).expect("opens");
    (JournalThread::start(journal, config, QueueConfig::default()).expect("starts"), recovered.chains)
}

impl Server {
    fn start(&self) -> Process {
        let (log, recovered) = journal(&self.state);
        let store: Arc<dyn Store> = self.store.clone();
        let keys = Arc::new(OpenKeys::of_writer(&self.keys));
        let dedup = load_dedup(&store, &keys, self.keys.writer(), 1 << 10).expect("readable").index;
        let session = WriterSession::new(self.keys.clone(), Arc::new(SystemEntropy), Arc::new(SystemClock));
        let source = FrameSource::new(Arc::clone(&store), Arc::clone(&keys), CacheBytes::default());
        let services = Services {
            store,
            session: Arc::new(session.expect("sound keys")),
            keys,
            dedup: Arc::new(RwLock::new(dedup)),
            source: Arc::new(source),
            log: Arc::new(log),
            clock: Arc::new(SystemClock),
            pace: Pace { seal_interval: Duration::ZERO, workers: NonZeroUsize::MIN, ..Pace::default() },
        };
        Process { services, recovered }
    }
}

impl Process {
    fn open(&self, hello: Option<&Hello>) -> Result<Pipeline, process_server::pipeline::OpenError> {
        let recovered = |chain: ChainId| self.recovered.get(&chain).cloned();
        Pipeline::open(self.services.clone(), &SystemEntropy, MACHINE, hello, recovered)
    }
}

fn settle(pipeline: &mut Pipeline) {
    for _ in 0..5000 {
        pipeline.step().expect("works");
        if pipeline.is_drained() && pipeline.is_ready_to_greet() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it never comes to rest");
}

fn greet(pipeline: &mut Pipeline, hello: &Hello) -> (Box<Receiver>, Welcome) {
    for _ in 0..5000 {
        settle(pipeline);
        match pipeline.greet(hello, MACHINE, None).expect("works") {
            Greeted::Accepted(receiver, Message::Welcome(welcome)) => return (receiver, welcome),
            Greeted::Later => {}
            Greeted::Accepted(_, other) | Greeted::Refused(other) => panic!("{other:?}"),
        }
    }
    panic!("never accepted");
}

/// The sender's side of a stream, as far as these tests need one.
struct Sending {
    ingest: Ingest,
    next: SequenceNumber,
    hash: StreamHash,
    /// The sender's clock.
    now: SourceTime,
}

impl Sending {
    /// Begins a session, and heals what is empty: the stream is whole from then on.
    fn whole(process: &Process, pipeline: &mut Pipeline) -> Sending {
        Sending::whole_of(process, pipeline, &hello(1, None, HealNeed::Maps))
    }

    fn whole_of(process: &Process, pipeline: &mut Pipeline, hello: &Hello) -> Sending {
        let mut sending = Sending::begun(process, pipeline, hello);
        let heal = HealId(1);
        let p0 = sending.change(Some(&mut *pipeline), ChangeKind::HealStart { heal });
        let (reach, hashes) = (Reach::Machine, OfferHashes::Plain);
        sending
            .tell(Some(&mut *pipeline), Message::HealBegin { heal, p0, whole: true, reach, hashes, planned_bytes: 0 });
        sending.tell(Some(&mut *pipeline), Message::HealEnd { heal, end: p0 });
        sending.write(Some(&mut *pipeline), 1);
        settle(pipeline);
        sending
    }

    /// Begins a session.
    fn begun(process: &Process, pipeline: &mut Pipeline, hello: &Hello) -> Sending {
        let (receiver, welcome) = greet(pipeline, hello);
        let log = Arc::clone(&process.services.log);
        let mut ingest = Ingest::new(welcome.chain, log, 1 << 20, Arc::new(|| {}));
        ingest.begin(*receiver);
        let next = SequenceNumber(welcome.generation.base().0 + 1);
        Sending { ingest, next, hash: welcome.hash, now: SourceTime(1) }
    }

    fn tell(&mut self, pipeline: Option<&mut Pipeline>, message: Message) {
        let mut work = self.ingest.message(message, PointTime(1_800_000_000_000_000_000)).work;
        while !self.ingest.is_idle() {
            std::thread::sleep(Duration::from_millis(1));
            work.extend(self.ingest.poll().work);
        }
        // A server that is killed now has it in its journal alone.
        if let Some(pipeline) = pipeline {
            work.into_iter().for_each(|work| drop(pipeline.work(work).expect("works")));
        }
    }

    fn change(&mut self, pipeline: Option<&mut Pipeline>, kind: ChangeKind) -> SequenceNumber {
        let sequence = self.next;
        let change = Change { sequence, time: self.now, disk: DiskId(0), continues: false, kind };
        self.hash = change.extend_hash(self.hash);
        self.next = sequence.next();
        self.tell(pipeline, Message::Changes(vec![change]));
        sequence
    }

    fn write(&mut self, pipeline: Option<&mut Pipeline>, fill: u8) -> SequenceNumber {
        let range = ByteRange::new(4096, 4096);
        self.change(pipeline, ChangeKind::Write { range, data: vec![fill; 4096].into() })
    }

    /// How it would go on, having been told that everything is journaled.
    fn resume(&self, pipeline: &Pipeline) -> Resume {
        let released = SequenceNumber(self.next.0 - 1);
        let (chain, generation) = (pipeline.chain(), pipeline.writer().generation());
        Resume { chain, generation, released, sent: released, hash: self.hash }
    }
}

#[test]
fn a_lost_answer_to_an_opening_costs_a_generation_and_no_gap() {
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Then {
        /// The server tries again.
        Again,
        /// It is killed, and does not even know that it tried, but for what it had written down.
        Killed,
        /// Another one takes over first: then the tail is nobody's.
        Overtaken,
    }
    for then in [Then::Again, Then::Killed, Then::Overtaken] {
        let site = Site::new();
        let server = site.server("server");
        let process = server.start();
        let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
        let mut sending = Sending::whole(&process, &mut pipeline);
        let last = sending.write(None, 2);
        let (chain, before) = (pipeline.chain(), site.history(pipeline.chain()));
        assert!(before.through < last && before.gaps().iter().all(|gap| gap.until.is_some()), "{:?}", before.gaps());
        drop((pipeline, sending, process));

        let mut process = server.start();
        site.store.silent.store(1, Ordering::Release);
        assert!(process.open(None).is_err(), "the store did not answer");
        assert_eq!(site.history(chain).generations.len(), before.generations.len() + 1, "but it was won");
        match then {
            Then::Again => {}
            Then::Killed => {
                drop(process);
                process = server.start();
            }
            Then::Overtaken => {
                let other = site.server("other").start();
                drop(other.open(Some(&hello(9, None, HealNeed::Maps))).expect("it takes over"));
            }
        }
        let mut pipeline = process.open(None).expect("the store answers");
        settle(&mut pipeline);
        let history = site.history(chain);
        let (through, gaps) = if then == Then::Overtaken { (before.through, 1) } else { (last, 0) };
        assert_eq!(history.through, through, "what the journal held, if it is to be committed: {then:?}");
        assert_eq!(history.gaps().len(), before.gaps().len() + gaps, "{then:?}: {:?}", history.gaps());
    }
}

#[test]
fn a_successor_goes_on_only_with_the_stream_that_the_vault_holds() {
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Sender {
        /// It is the one that was there.
        Same,
        /// It was reverted, and wrote as many other changes since.
        Diverged,
        /// It was reverted, and wrote less.
        Behind,
        /// Some of what it had sent was lost with the first server.
        Ahead,
    }
    for sender in [Sender::Same, Sender::Diverged, Sender::Behind, Sender::Ahead] {
        let site = Site::new();
        let first = site.server("first").start();
        let mut pipeline = first.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
        let mut sending = Sending::whole(&first, &mut pipeline);
        sending.write(Some(&mut pipeline), 2);
        settle(&mut pipeline);
        let mut resume = sending.resume(&pipeline);
        let history = site.history(pipeline.chain());
        assert_eq!(history.stream(), Some((resume.released, sending.hash)), "the vault states the stream's hash");
        match sender {
            Sender::Same => {}
            Sender::Diverged => resume.hash = StreamHash([8; 32]),
            Sender::Behind => {
                let before = SequenceNumber(resume.released.0 - 1);
                (resume.released, resume.sent) = (before, before);
            }
            Sender::Ahead => {
                let after = sending.write(None, 3);
                resume = Resume { released: after, sent: after, hash: sending.hash, ..resume };
            }
        }
        let hello = hello(1, Some(resume.clone()), HealNeed::Nothing);
        let second = site.server("second").start();
        let mut pipeline = second.open(Some(&hello)).expect("opens");
        let (_, welcome) = greet(&mut pipeline, &hello);
        let need = match sender {
            Sender::Same => HealNeed::Nothing,
            Sender::Diverged | Sender::Behind => HealNeed::Whole,
            Sender::Ahead => HealNeed::Maps,
        };
        assert_eq!((welcome.continues, welcome.need), (sender == Sender::Same, need), "{sender:?}");
        assert_eq!(welcome.past, history.stream(), "the sender can compare, too: {sender:?}");
        let gaps = site.history(pipeline.chain()).gaps().len();
        assert_eq!(gaps, 1 + usize::from(sender != Sender::Same), "{sender:?}");
    }
}

#[test]
fn a_server_that_was_fenced_in_its_sleep_learns_it_from_the_sender() {
    let site = Site::new();
    let (first, second) = (site.server("first").start(), site.server("second").start());
    let mut asleep = first.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let sending = Sending::whole(&first, &mut asleep);
    let resume = sending.resume(&asleep);
    let moved = hello(1, Some(resume.clone()), HealNeed::Nothing);
    let mut awake = second.open(Some(&moved)).expect("the second takes over");
    let (_, welcome) = greet(&mut awake, &moved);
    assert!(welcome.continues);

    // The sender comes back before it sent anything to the second: everything matches what the first one remembers.
    let back = hello(1, Some(Resume { generation: welcome.generation, ..resume.clone() }), HealNeed::Nothing);
    let fenced = asleep.greet(&back, MACHINE, None).err().expect("it is not the first one's chain any more");
    assert!(matches!(fenced, PipelineError::Fenced { .. }), "{fenced}");

    // A generation that the vault does not know either, because it is an older copy, ends nobody's.
    let unheard = hello(1, Some(Resume { generation: Generation(77), ..resume }), HealNeed::Nothing);
    greet(&mut awake, &unheard);
}

#[test]
fn a_tail_that_was_dropped_is_not_looked_for_again() {
    let site = Site::new();
    let server = site.server("server");
    let process = server.start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    sending.write(None, 2);
    drop((pipeline, sending, process));
    drop(site.server("other").start().open(Some(&hello(9, None, HealNeed::Maps))).expect("it takes over"));
    // The first time it is dropped; the second time the session is the journal's own, and holds nothing.
    for _ in 0..2 {
        let mut pipeline = server.start().open(None).expect("opens");
        settle(&mut pipeline);
    }
}

/// Point time never goes back along a chain, whatever the clocks do while the server is down.
#[test]
fn what_a_restart_finds_in_the_journal_has_told_the_time() {
    const SECOND: u64 = 1_000_000_000;
    let site = Site::new();
    let server = site.server("server");
    let process = server.start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    for seconds in [3600, 3602] {
        sending.now = SourceTime(seconds * SECOND);
        sending.write(None, 2);
    }
    let (chain, resume) = (pipeline.chain(), sending.resume(&pipeline));
    drop((pipeline, sending, process));

    // By the server's clock it is an hour earlier.
    let process = server.start();
    let mut pipeline = process.open(None).expect("opens");
    let mut sending = Sending::begun(&process, &mut pipeline, &hello(1, Some(resume), HealNeed::Nothing));
    let at = sending.write(Some(&mut pipeline), 3);
    let cause = "the send buffer was full".into();
    sending.tell(Some(&mut pipeline), Message::Break { at, reach: Reach::Machine, cause });
    settle(&mut pipeline);
    let history = site.history(chain);
    let points = Points::new(site.unlocked.store(), site.unlocked.keys(), &history);
    let cuts = points.between(PointTime(0), PointTime(u64::MAX), 10, Which::All).expect("readable");
    assert_eq!(cuts.last().map(|cut| cut.sequence), Some(at), "{cuts:?}");
    assert!(cuts.len() >= 3 && cuts.is_sorted_by_key(|cut| cut.time), "{cuts:?}");
}

/// What a greeting says of disks is in no journal.
#[test]
fn a_disk_that_grew_before_a_kill_is_as_large_in_points() {
    let site = Site::new();
    let server = site.server("server");
    let process = server.start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    drop(Sending::whole(&process, &mut pipeline));
    let grown = |resume| {
        let mut hello = hello(2, resume, HealNeed::Maps);
        hello.disks[0].size_bytes += 64 << 10;
        hello
    };
    let mut sending = Sending::begun(&process, &mut pipeline, &grown(None));
    sending.write(None, 2);
    let (chain, resume) = (pipeline.chain(), sending.resume(&pipeline));
    drop((pipeline, sending, process));

    let process = server.start();
    let mut pipeline = process.open(None).expect("opens");
    let mut sending = Sending::begun(&process, &mut pipeline, &grown(Some(resume)));
    sending.write(Some(&mut pipeline), 3);
    settle(&mut pipeline);
    let disks = site.history(chain).geometry_at(SequenceNumber(u64::MAX));
    assert_eq!(disks.iter().map(|disk| disk.size_bytes).collect::<Vec<_>>(), [(1 << 20) + (64 << 10)]);
}

/// The place at which a gap begins is a point: it has the disks that it had, whatever a greeting says in the gap.
#[test]
fn a_disk_that_grows_in_a_gap_is_no_larger_before_it() {
    let site = Site::new();
    let process = site.server("server").start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    let at = sending.write(Some(&mut pipeline), 2);
    let cause = "the send buffer was full".into();
    sending.tell(Some(&mut pipeline), Message::Break { at, reach: Reach::Machine, cause });
    let mut again = hello(1, Some(sending.resume(&pipeline)), HealNeed::Maps);
    again.disks[0].size_bytes += 64 << 10;
    let (next, grown) = (sending.next, again.disks[0].clone());
    let mut sending = Sending::begun(&process, &mut pipeline, &again);
    sending.next = next;
    sending.change(Some(&mut pipeline), ChangeKind::Geometry(grown));
    sending.write(Some(&mut pipeline), 3);
    settle(&mut pipeline);
    let history = site.history(pipeline.chain());
    let size = |at| history.geometry_at(at)[0].size_bytes;
    assert_eq!((size(at), size(SequenceNumber(u64::MAX))), (1 << 20, (1 << 20) + (64 << 10)));
}

/// A server that is killed before the removal is committed still knows from where on points do not have the disk.
#[test]
fn a_disk_that_left_is_in_no_point_behind_whatever_happens_to_the_server() {
    let site = Site::new();
    let server = site.server("server");
    let process = server.start();
    let mut both = hello(1, None, HealNeed::Maps);
    both.disks.push(DiskGeometry { disk: DiskId(1), path: "/dev/disk1".into(), ..both.disks[0].clone() });
    let mut pipeline = process.open(Some(&both)).expect("a new chain");
    let before = Sending::whole_of(&process, &mut pipeline, &both);
    let one = hello(1, Some(before.resume(&pipeline)), HealNeed::Maps);
    let mut sending = Sending::begun(&process, &mut pipeline, &one);
    sending.next = before.next;
    let (chain, last) = (pipeline.chain(), SequenceNumber(before.next.0 - 1));
    let first = sending.write(None, 2);
    sending.write(None, 3);
    let disks = |at| site.history(chain).geometry_at(at).len();
    assert_eq!((site.history(chain).through, disks(SequenceNumber(u64::MAX))), (last, 2), "nothing is committed");
    drop((pipeline, sending, process));

    let process = server.start();
    let mut pipeline = process.open(None).expect("its own chain");
    settle(&mut pipeline);
    assert_eq!((disks(last), disks(first)), (2, 1));
    assert!(site.history(chain).gaps().iter().all(|gap| gap.until.is_some()));

    // It comes back, and the note that it left is not taken for one of now.
    let mut again = both.clone();
    again.instance = InstanceId([2; 16]);
    let mut sending = Sending::begun(&process, &mut pipeline, &again);
    settle(&mut pipeline);
    sending.write(None, 4);
    drop((pipeline, sending, process));
    let process = server.start();
    let mut pipeline = process.open(None).expect("its own chain");
    settle(&mut pipeline);
    assert_eq!(disks(SequenceNumber(u64::MAX)), 2);
}

#[test]
fn what_fails_again_behind_the_start_of_a_heal_is_another_gap() {
    let site = Site::new();
    let process = site.server("server").start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    let reach = Reach::Ranges(Ranges::of([(DiskId(0), ByteRange::new(4096, 4096))]));
    let failed = |at| Message::Break { at, reach: reach.clone(), cause: "a write failed".into() };
    sending.tell(Some(&mut pipeline), failed(SequenceNumber(sending.next.0 - 1)));
    let heal = HealId(2);
    let p0 = sending.change(Some(&mut pipeline), ChangeKind::HealStart { heal });
    // The heal may have read that place before.
    sending.tell(Some(&mut pipeline), failed(p0));
    let (whole, hashes, planned_bytes) = (false, OfferHashes::Plain, 4096);
    let begin = Message::HealBegin { heal, p0, whole, reach: reach.clone(), hashes, planned_bytes };
    sending.tell(Some(&mut pipeline), begin);
    sending.tell(Some(&mut pipeline), Message::HealEnd { heal, end: p0 });
    sending.write(Some(&mut pipeline), 3);
    settle(&mut pipeline);
    let gaps = site.history(pipeline.chain()).gaps();
    let of_ranges: Vec<_> = gaps.iter().skip(1).map(|gap| (gap.after, gap.until.is_some())).collect();
    assert_eq!(of_ranges, [(SequenceNumber(p0.0 - 1), true), (p0, false)], "{gaps:?}");
}

/// Steps until the pipeline says what `wanted` takes.
fn until<T>(pipeline: &mut Pipeline, wanted: impl Fn(&Event) -> Option<T>) -> T {
    for _ in 0..5000 {
        if let Some(found) = pipeline.step().expect("works").iter().find_map(&wanted) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it never says so");
}

/// With everything up to where the sender wants it, and with nothing that nobody promised.
#[test]
fn a_scrub_is_compared_with_what_is_committed_and_told_what_cannot_be() {
    let site = Site::new();
    let process = site.server("server").start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    let leaf = |index: u64| ByteRange::new(index * 4096, 4096);
    let part = ChangeKind::Write { range: ByteRange::new(8192, 512), data: vec![4; 512].into() };
    let third = ChangeKind::Write { range: leaf(3), data: vec![5; 4096].into() };
    for kind in [part, third, ChangeKind::Discard { range: leaf(3) }] {
        sending.change(Some(&mut pipeline), kind);
    }
    let behind = sending.write(Some(&mut pipeline), 2);
    assert!(pipeline.committed() < behind, "it is not committed yet");
    let hash = |fill: u8| OfferedLeaf::Hash(PlainLeafHash::of(&[fill; 4096]).0);
    let leaves =
        vec![OfferedLeaf::Zero, hash(2), hash(4), hash(5), hash(6), OfferedLeaf::Unreadable, OfferedLeaf::Zero];
    let expected = [
        ScrubbedLeaf::Same,
        ScrubbedLeaf::Same,
        // Nobody knows a hash of what was written in part, nor what a disk returns of discarded blocks.
        ScrubbedLeaf::Untold,
        ScrubbedLeaf::Untold,
        ScrubbedLeaf::Differs,
        ScrubbedLeaf::Untold,
        ScrubbedLeaf::Same,
    ];
    pipeline.work(Work::Scrub { offer: 7, behind, disk: DiskId(0), start: 0, leaves }).expect("works");
    let said = until(&mut pipeline, |event| match event {
        Event::Scrubbed { offer: 7, leaves } => Some(leaves.clone()),
        _ => None,
    });
    assert!(pipeline.committed() >= behind);
    assert_eq!(said, expected);
}

#[test]
fn a_suspicion_is_a_gap_of_the_past_however_often_it_is_told() {
    let site = Site::new();
    let server = site.server("server");
    let process = server.start();
    let mut pipeline = process.open(Some(&hello(1, None, HealNeed::Maps))).expect("a new chain");
    let mut sending = Sending::whole(&process, &mut pipeline);
    let after = SequenceNumber(sending.next.0 - 1);
    sending.now = SourceTime(2_000_000_000);
    let last = sending.write(Some(&mut pipeline), 2);
    settle(&mut pipeline);
    let ranges = Ranges::of([(DiskId(0), ByteRange::new(4096, 8192))]);
    let suspected = || Work::Suspected {
        id: 9,
        after,
        until: last.next(),
        time: PointTime(5),
        ranges: ranges.clone(),
        cause: "suspect: it differs".into(),
    };
    let noted = |event: &Event| matches!(event, Event::SuspicionNoted { id: 9 }).then_some(());
    assert!(pipeline.work(suspected()).expect("works").is_empty(), "not before it is in the vault");
    assert!(pipeline.work(suspected()).expect("works").is_empty());
    until(&mut pipeline, noted);
    assert!(pipeline.work(suspected()).expect("works").iter().any(|event| noted(event).is_some()), "it is known");
    let chain = pipeline.chain();
    drop((pipeline, sending, process));
    // Told to a process that does not know of it.
    let process = server.start();
    let mut pipeline = process.open(None).expect("opens");
    pipeline.work(suspected()).expect("works");
    until(&mut pipeline, noted);
    settle(&mut pipeline);
    let history = site.history(chain);
    let [_, suspicion] = &history.gaps()[..] else { panic!("{:?}", history.gaps()) };
    assert!(suspicion.hides(last) && !suspicion.hides(after) && !suspicion.hides(last.next()), "{suspicion:?}");
    assert!(suspicion.to_string().contains("suspect: it differs"), "{suspicion}");
    let all = ChainHistory::load_all(site.unlocked.store(), site.unlocked.keys(), chain).expect("readable");
    assert_eq!(all.gaps(), history.gaps());
}
