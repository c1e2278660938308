//! A process server in the simulated world: the real ingest, journal and pipeline, stepped by hand.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use agent::engine::Wire;
use bytes::Bytes;
use process_server::ingest::{ChangeLog, Ingest, Outcome, ReadBack, Work, read_back};
use process_server::journal::thread::Completion;
use process_server::journal::{
    ChainState, HostKey, Journal, JournalConfig, JournalError, JournalPosition, Manifest, Record,
};
use process_server::pipeline::{Greeted, OpenError, Pace, Pipeline, Services};
use replication::geometry::GRANULE_BYTES;
use replication::receiver::Event;
use replication::wire::{Hello, Message};
use replication::{
    ByteRange, ChainId, ChangeKind, DiskId, InstanceId, MachineId, PointTime, Ranges, Reach, SequenceNumber,
};
use vault::catalog::Catalog;
use vault::chain::Phase;
use vault::keys::{WriterId, WriterSession};
use vault::manifest::{Delta, ManifestLink};
use vault::pack::load_dedup;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, ChainWriter, OpenKeys, Store, WriterKeys};
use world::{Clock, Entropy};

use crate::clock::{SimClock, TrueTime};
use crate::files::{PowerCut, SimFiles};
use crate::link::LinkEnd;
use crate::planted::Bug;
use crate::rng::{Rng, SimEntropy};

/// The journal, synced when the world says so.
struct SimLog {
    journal: Mutex<Journal>,
    waiting: Mutex<Vec<Completion>>,
    bug: Option<Bug>,
}

impl SimLog {
    fn sync(&self) {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let result = journal.sync();
        drop(journal);
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        match result {
            Ok(position) => waiting.into_iter().for_each(|done| done(Ok(position))),
            Err(error) => {
                let error = Arc::new(error);
                waiting.into_iter().for_each(|done| done(Err(Arc::clone(&error))));
            }
        }
    }
}

impl ChangeLog for SimLog {
    fn append(&self, record: Record, done: Completion) -> Result<(), JournalError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let position = match journal.append(&record) {
            Err(JournalError::Full { .. }) if self.bug == Some(Bug::FullJournalAcknowledges) => {
                done(journal.sync().map_err(Arc::new));
                return Ok(());
            }
            appended => appended?,
        };
        drop(journal);
        if self.bug == Some(Bug::AckBeforeSync) {
            done(Ok(position));
        } else {
            self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(done);
        }
        Ok(())
    }

    fn append_durably(&self, record: Record) -> Result<(), Arc<JournalError>> {
        let outcome = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&outcome);
        let done = move |result: Result<JournalPosition, _>| {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result.map(drop));
        };
        self.append(record, Box::new(done))?;
        self.sync();
        let outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
        outcome.expect("a sync answers everything that was appended before it")
    }

    fn intent(&self, chain: ChainId) -> Result<Option<Manifest>, JournalError> {
        Ok(self.journal.lock().unwrap_or_else(PoisonError::into_inner).changes_of(chain).intent())
    }

    fn free_bytes(&self) -> u64 {
        if self.bug == Some(Bug::FullJournalAcknowledges) {
            return JOURNAL_BYTES;
        }
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).free_bytes()
    }

    fn last(&self, chain: ChainId) -> Result<SequenceNumber, JournalError> {
        Ok(self.journal.lock().unwrap_or_else(PoisonError::into_inner).changes_of(chain).last())
    }

    fn read_back(&self, chain: ChainId, after: SequenceNumber, bytes_max: u64) -> Result<Vec<ReadBack>, JournalError> {
        let reader = self.journal.lock().unwrap_or_else(PoisonError::into_inner).changes_of(chain).after(after);
        read_back(&reader, bytes_max)
    }
}

struct Running {
    services: Services,
    entropy: Arc<SimEntropy>,
    log: Arc<SimLog>,
    recovered: BTreeMap<ChainId, ChainState>,
    node: Option<Node>,
}

/// What a journal may take on its disk: little, as a life is short.
pub const JOURNAL_BYTES: u64 = 2 << 20;
/// Uncommitted changes that a pipeline keeps in memory.
pub const MEMORY_BYTES: u64 = 160 << 10;
/// Collected changes that are sealed; a manifest holds at most twice as much.
pub const SEAL_BYTES: u64 = 96 << 10;
/// Stream bytes that a sender may have under way.
pub const WINDOW_BYTES: u64 = 64 << 10;

/// One machine's ingest and pipeline.
struct Node {
    ingest: Ingest,
    inbox: VecDeque<Work>,
    pipeline: Option<Pipeline>,
    link: Option<LinkEnd>,
    instance: Option<InstanceId>,
    greeting: Option<Hello>,
}

/// See the module's documentation.
pub struct SimServer {
    /// For messages.
    pub name: &'static str,
    /// Whom its objects name as their writer.
    pub writer: WriterId,
    machine: MachineId,
    files: SimFiles,
    store: Arc<dyn Store>,
    keys: Vec<u8>,
    /// Outlives the process: all it holds between runs is which signatures were found good, which stays true, and
    /// finding that anew took most of a life's computing time.
    open: Arc<OpenKeys>,
    clock: SimClock,
    rng: Rng,
    running: Option<Running>,
    bug: Option<Bug>,
    /// Reasons for which pipelines ended, newest last.
    pub ends: Vec<String>,
    /// Reasons for which sessions were refused or closed by this side, newest last.
    pub closed: Vec<String>,
}

impl SimServer {
    /// A server with a right to write and an empty state directory, not running.
    pub fn new(
        name: &'static str,
        machine: MachineId,
        store: Arc<dyn Store>,
        keys: &WriterKeys,
        time: &TrueTime,
        mut rng: Rng,
        bug: Option<Bug>,
    ) -> SimServer {
        SimServer {
            name,
            writer: keys.writer(),
            machine,
            files: SimFiles::new(rng.draw()),
            store,
            keys: keys.to_bytes().to_vec(),
            open: Arc::new(OpenKeys::of_writer(keys)),
            clock: SimClock::booting_now(time),
            rng,
            running: None,
            bug,
            ends: Vec::new(),
            closed: Vec::new(),
        }
    }

    /// The server's clock, for skewing it.
    pub fn clock(&self) -> &SimClock {
        &self.clock
    }

    /// Whether its process runs.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Bytes that its journal takes on its disk.
    pub fn journal_bytes(&self) -> u64 {
        self.files.bytes_in("journal")
    }

    /// Bytes of changes that the process holds in memory.
    pub fn memory_bytes(&self) -> u64 {
        let Some(node) = self.running.as_ref().and_then(|running| running.node.as_ref()) else { return 0 };
        node.ingest.memory_bytes() + node.pipeline.as_ref().map_or(0, Pipeline::memory_bytes)
    }

    /// Starts the process on whatever its disk holds.
    pub fn start(&mut self) {
        assert!(self.running.is_none(), "one process at a time");
        // With this bug every run draws the same bytes: the same nonces under the same keys.
        let seed = if self.bug == Some(Bug::NonceReuse) { Rng::new(1) } else { self.rng.fork() };
        let entropy = Arc::new(SimEntropy::new(seed));
        let dyn_entropy: Arc<dyn Entropy> = entropy.clone();
        let clock: Arc<dyn Clock> = Arc::new(self.clock.clone());
        let files: Arc<dyn world::Files> = Arc::new(self.files.clone());
        let host = HostKey::load_or_create(&*files, "journal", &*dyn_entropy).expect("the state directory works");
        let room = if self.bug == Some(Bug::JournalUnbounded) { 16 * JOURNAL_BYTES } else { JOURNAL_BYTES };
        let config = JournalConfig { bytes_max: room, file_bytes_max: JOURNAL_BYTES / 8 };
        let (journal, recovered) =
            Journal::open(Arc::clone(&files), Arc::clone(&dyn_entropy), "journal", config, &host)
                .unwrap_or_else(|error| panic!("{}: the journal cannot be opened after a crash: {error}", self.name));
        let log = Arc::new(SimLog { journal: Mutex::new(journal), waiting: Mutex::default(), bug: self.bug });
        let keys = WriterKeys::from_bytes(&self.keys).expect("the keys were made by the vault");
        let open = Arc::clone(&self.open);
        let writer = keys.writer();
        let dedup = load_dedup(&self.store, &open, writer, 1 << 16).expect("reads do not fail in this world");
        let session =
            WriterSession::new(keys, Arc::clone(&dyn_entropy), Arc::clone(&clock)).expect("the read key is sound");
        let cache = CacheBytes { index: 1 << 20, data: 1 << 20, resolved: 1 << 20 };
        let source = Arc::new(FrameSource::new(Arc::clone(&self.store), Arc::clone(&open), cache));
        let pace = Pace {
            seal_interval: Duration::from_secs(2),
            seal_bytes: SEAL_BYTES,
            idle_interval: Duration::from_secs(5),
            inline_bytes_max: 64 << 10,
            image_cut_bytes: 128 << 10,
            window_bytes: WINDOW_BYTES,
            memory_bytes_max: if self.bug == Some(Bug::MemoryUnbounded) { u64::MAX } else { MEMORY_BYTES },
            workers: NonZeroUsize::MIN,
            retry_pause: Duration::from_millis(300),
        };
        let services = Services {
            store: Arc::clone(&self.store),
            session: Arc::new(session),
            keys: open,
            dedup: Arc::new(RwLock::new(dedup.index)),
            source,
            log: log.clone(),
            clock,
            pace,
        };
        self.running = Some(Running { services, entropy, log, recovered: recovered.chains, node: None });
    }

    /// Kills the process. What the kernel was given stays.
    pub fn kill(&mut self) {
        self.hang_up();
        self.running = None;
        self.files.restart_process();
    }

    /// Cuts the power of the server's machine.
    pub fn power_cut(&mut self) {
        self.hang_up();
        self.running = None;
        let cut = match self.rng.below(3) {
            0 => PowerCut::LoseAll,
            1 => PowerCut::Prefix,
            _ => PowerCut::Torn,
        };
        self.files.power_cycle(cut);
    }

    /// The server's disk is lost with everything but its right to write.
    pub fn lose(&mut self) {
        self.hang_up();
        self.running = None;
        self.files = SimFiles::new(self.rng.draw());
    }

    fn hang_up(&mut self) {
        if let Some(link) = self.running.as_mut().and_then(|running| running.node.as_mut()?.link.take()) {
            link.sever();
        }
    }

    /// An agent connects.
    pub fn accept(&mut self, link: LinkEnd) {
        self.hang_up();
        let Some(running) = &mut self.running else { return link.sever() };
        let node = running.node.get_or_insert_with(|| Node {
            ingest: Ingest::new(
                ChainId::default(),
                running.log.clone(),
                running.services.pace.window_bytes,
                Arc::new(|| {}),
            ),
            inbox: VecDeque::new(),
            pipeline: None,
            link: None,
            instance: None,
            greeting: None,
        });
        let outcome = node.ingest.end();
        node.inbox.extend(outcome.work);
        node.greeting = None;
        node.instance = None;
        node.link = Some(link);
    }

    /// The newest manifest that this server believes it committed, and its chain.
    pub fn committed_head(&self) -> Option<(ChainId, ManifestLink)> {
        let pipeline = self.running.as_ref()?.node.as_ref()?.pipeline.as_ref()?;
        Some((pipeline.chain(), pipeline.writer().head()))
    }

    /// Lets the process work for a while.
    pub fn step(&mut self) {
        let bug = self.bug;
        let wall = PointTime(self.clock.wall().0);
        let Some(running) = &mut self.running else { return };
        if self.rng.one_in(3) {
            running.log.sync();
        }
        let Some(node) = &mut running.node else { return };
        node.receive(wall, bug, &mut self.closed);
        let outcome = node.ingest.poll();
        node.carry_out(outcome, &mut self.closed);
        if node.pipeline.is_none() && node.greeting.is_some() {
            let recovered = running.recovered.clone();
            let hello = node.greeting.as_ref().filter(|_| bug != Some(Bug::HandOverForgotten));
            let journal = |chain| recovered.get(&chain).cloned();
            let opened = Pipeline::open(running.services.clone(), &*running.entropy, self.machine, hello, journal);
            match opened {
                Ok(pipeline) => {
                    trace_opened(self.name, &pipeline);
                    node.pipeline = Some(pipeline);
                }
                Err(error) => {
                    if bug == Some(Bug::CloseIgnored) && matches!(error, OpenError::Closed { .. }) {
                        retry(&running.services, self.machine, bug);
                    }
                    self.ends.push(format!("open: {error:?}"));
                    node.drop_link();
                }
            }
        }
        if let Err(reason) = node.work(&running.services, self.machine, bug, &mut self.closed) {
            if bug == Some(Bug::RetryUnderLostGeneration) && reason.contains("Fenced") {
                retry(&running.services, self.machine, bug);
            }
            self.ends.push(reason);
            node.drop_link();
            running.node = None;
        }
    }
}

impl Node {
    fn drop_link(&mut self) {
        if let Some(link) = self.link.take() {
            link.sever();
        }
        self.greeting = None;
    }

    fn receive(&mut self, wall: PointTime, bug: Option<Bug>, closed: &mut Vec<String>) {
        for _ in 0..64 {
            let Some(link) = &mut self.link else { return };
            match link.try_receive() {
                Ok(Some(Message::Hello(mut hello))) => {
                    if bug == Some(Bug::GapWithoutCause) {
                        hello.resume = None;
                    }
                    self.greeting = Some(hello);
                }
                Ok(Some(message)) => {
                    let outcome = self.ingest.message(message, wall);
                    self.carry_out(outcome, closed);
                }
                Ok(None) => return,
                Err(_) => {
                    self.link = None;
                    self.greeting = None;
                    let outcome = self.ingest.end();
                    self.carry_out(outcome, closed);
                }
            }
        }
    }

    fn carry_out(&mut self, outcome: Outcome, closed: &mut Vec<String>) {
        self.inbox.extend(outcome.work);
        if let Some(link) = &mut self.link {
            for message in outcome.send {
                let full = link.try_send(message);
                assert!(!matches!(full, Ok(Some(_))), "answers are fewer than what asks for them");
            }
        }
        if let Some(reason) = outcome.disconnect {
            closed.push(reason);
            self.drop_link();
            let outcome = self.ingest.end();
            self.inbox.extend(outcome.work);
        }
    }

    fn work(
        &mut self,
        services: &Services,
        machine: MachineId,
        bug: Option<Bug>,
        closed: &mut Vec<String>,
    ) -> Result<(), String> {
        let Some(mut pipeline) = self.pipeline.take() else { return Ok(()) };
        let mut events = Vec::new();
        if bug == Some(Bug::AbsorbedAcrossCut) {
            absorb_across_cuts(&mut self.inbox);
        }
        while let Some(work) = self.inbox.pop_front() {
            let Some(work) = spoil(work, bug, services, pipeline.committed(), &mut events) else { continue };
            trace(machine, &work);
            events.extend(pipeline.work(work).map_err(|error| format!("work: {error:?}"))?);
        }
        events.extend(pipeline.step().map_err(|error| format!("step: {error:?}"))?);
        if bug == Some(Bug::CreditNotPaid) {
            events.retain(|event| !matches!(event, Event::HealProcessed { .. }));
        }
        for event in events {
            let outcome = self.ingest.event(event);
            self.carry_out(outcome, closed);
        }
        if self.greeting.is_some()
            && self.ingest.is_idle()
            && self.inbox.is_empty()
            && pipeline.is_ready_to_greet()
            && let Some(hello) = self.greeting.take()
        {
            let followed = pipeline.followed().map_err(|error| format!("followed: {error:?}"))?;
            if followed != pipeline.chain() {
                // The machine came home on another chain. What is pending for the old one goes into the vault first.
                self.greeting = Some(hello);
                self.pipeline = (!pipeline.is_drained()).then_some(pipeline);
                return Ok(());
            }
            let greeted =
                pipeline.greet(&hello, machine, self.instance).map_err(|error| format!("greet: {error:?}"))?;
            match greeted {
                Greeted::Accepted(receiver, welcome) => {
                    if let Some(link) = &mut self.link {
                        let _ = link.try_send(welcome);
                        self.instance = Some(hello.instance);
                        self.ingest.begin(*receiver);
                    }
                }
                Greeted::Refused(refusal) => {
                    closed.push(format!("{refusal:?}"));
                    self.drop_link();
                }
                // What came before is committed first.
                Greeted::Later => self.greeting = Some(hello),
            }
        }
        self.pipeline = Some(pipeline);
        Ok(())
    }
}

/// Applies the planted bugs that sit between ingest and pipeline.
fn spoil(
    work: Work,
    bug: Option<Bug>,
    services: &Services,
    committed: SequenceNumber,
    events: &mut Vec<Event>,
) -> Option<Work> {
    Some(match (work, bug) {
        (Work::HealBegin { heal, p0, reach, hashes, planned_bytes }, Some(Bug::HealBelowOlderWrites)) => {
            Work::HealBegin { heal, p0: SequenceNumber(p0.0 - 40), reach, hashes, planned_bytes }
        }
        (Work::HealBegin { heal, p0, reach, hashes, planned_bytes }, Some(Bug::HealAboveStream)) => {
            Work::HealBegin { heal, p0: SequenceNumber(p0.0 + 40), reach, hashes, planned_bytes }
        }
        (Work::Cut(mut cut), Some(Bug::CutOneTooFar)) => {
            cut.sequence = SequenceNumber(cut.sequence.0 - 1);
            Work::Cut(cut)
        }
        (Work::HealEnd { heal, mut cut }, Some(Bug::ConsumerInsteadOfProducer)) => {
            cut.sequence = cut.sequence.min(committed);
            Work::HealEnd { heal, cut }
        }
        (Work::GapOpened { .. }, Some(Bug::GapNotRecorded)) => return None,
        (Work::GapOpened { reach: Reach::Ranges(_), .. }, Some(Bug::LackingNotSaid)) => return None,
        (Work::GapOpened { at, reach: Reach::Ranges(ranges), time, cause }, Some(Bug::LackingTooMuchSaid)) => {
            let more = |(disk, range): (DiskId, ByteRange)| {
                (disk, ByteRange::new(range.start.saturating_sub(GRANULE_BYTES), range.len + GRANULE_BYTES))
            };
            Work::GapOpened { at, reach: Reach::Ranges(Ranges::of(ranges.iter().map(more))), time, cause }
        }
        (Work::Compare { heal, offer, leaves, .. }, Some(Bug::EverythingEqual)) => {
            events.push(Event::Compared { heal, offer, wanted: vec![false; leaves.len()] });
            return None;
        }
        (Work::Compare { heal, offer, leaves, .. }, Some(Bug::ComparedWithoutVault))
            if services.store.list("", None, 1).is_err() =>
        {
            events.push(Event::Compared { heal, offer, wanted: vec![true; leaves.len()] });
            return None;
        }
        (work, _) => work,
    })
}

/// Every write keeps its place, but what a later write in the queue puts there is in it already.
fn absorb_across_cuts(inbox: &mut VecDeque<Work>) {
    let batches = inbox.iter_mut().filter_map(|work| match work {
        Work::Changes { changes, .. } => Some(changes),
        _ => None,
    });
    let mut later: Vec<(DiskId, ByteRange, Bytes)> = Vec::new();
    for change in batches.flatten().collect::<Vec<_>>().into_iter().rev() {
        let ChangeKind::Write { range, data } = &mut change.kind else { continue };
        let own = data.clone();
        let mut bytes = data.to_vec();
        for (_, over, newer) in later.iter().rev().filter(|(disk, ..)| *disk == change.disk) {
            let (start, end) = (range.start.max(over.start), range.end().min(over.end()));
            if start < end {
                let [from, to] = [start - over.start, end - over.start].map(|at| at as usize);
                bytes[(start - range.start) as usize..(end - range.start) as usize].copy_from_slice(&newer[from..to]);
            }
        }
        later.push((change.disk, *range, own));
        *data = bytes.into();
    }
}

/// Takes the chain back from whoever won it, or from a failover that closed it.
fn retry(services: &Services, machine: MachineId, bug: Option<Bug>) {
    let Services { store, session, keys, .. } = services;
    let Ok(catalog) = Catalog::load(store, keys) else { return };
    let Some(chain) = catalog.machines.get(&machine).map(|known| known.chain) else { return };
    let Ok(mut history) = ChainHistory::load(store, keys, chain) else { return };
    if bug == Some(Bug::CloseIgnored) {
        history.standing.phase = Phase::Open;
    }
    drop(ChainWriter::open_generation(store, session, keys, &history, "retry", Delta::default()));
}

/// Shows under which generation a server goes on, for people who look for a bug.
fn trace_opened(server: &str, pipeline: &Pipeline) {
    if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
        let writer = pipeline.writer();
        let (chain, generation, number) = (writer.chain(), writer.generation(), writer.head().number);
        eprintln!(
            "  {server} opened {chain} under {generation:?} with manifest {number}, through {}",
            writer.through()
        );
    }
}

/// Shows what the pipeline is given, for people who look for a bug.
fn trace(_machine: MachineId, work: &Work) {
    if std::env::var_os("FARSHORE_SIM_WORK").is_none() {
        return;
    }
    match work {
        Work::Changes { changes, .. } => {
            for change in changes {
                let kind = match change.kind.range() {
                    Some(range) => format!("{range} of {}", change.disk),
                    None => format!("{:?}", change.kind),
                };
                eprintln!("  change {} continues {} {kind}", change.sequence, change.continues);
            }
        }
        Work::Compare { .. } | Work::HealData { .. } => {}
        other => eprintln!("  {other:?}"),
    }
}
