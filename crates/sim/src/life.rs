//! One simulated life: a machine that is written to, two process servers, one vault, and everything that goes wrong.
//!
//! The checkers hold the product to its promises, with the model as the only authority:
//!
//! * every announced point is a state that the machine's disks had, in order, and no newer than its label;
//! * an announced point stays openable and keeps its bytes, whatever happens later;
//! * a gap appears only when something happened that may cause one, and each is recorded;
//! * once faults stop, everything becomes healthy and the newest point is the machine's present state.

mod branches;
mod decision;
mod drain;
mod failover;
mod final_checks;
mod gaps;
mod judge;
mod maintenance;
mod misfortune;
mod report;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use replication::cut::PointTime;
use replication::{ChainId, SequenceNumber};
use vault::catalog::Catalog;
use vault::keys::{PassphraseCost, WriterRole, WriterSession};
use vault::manifest::GapScope;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, ChainTail, FolderStore, Store, UnlockedVault, Vault};
use world::{Clock, Entropy};

use crate::branch_site::BranchSite;
use crate::clock::{SimClock, TrueTime};
use crate::files::SimFiles;
use crate::link::connect;
use crate::planted::Bug;
use crate::rng::{Rng, SimEntropy};
use crate::server::SimServer;
use crate::source::{Source, SourceShape};
use crate::store::{SimStore, StoreFaults};
use crate::tenant::{Announced, AnnouncedPoints};

use branches::Branches;

pub use report::{Fault, Report, Undisturbed, Violation, Width};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// Simulated time with faults.
const STORMY_NS: u64 = 600 * SECOND;
/// Simulated time in which everything must become healthy again.
const CALM_NS: u64 = 240 * SECOND;

struct World {
    seed: u64,
    rng: Rng,
    time: TrueTime,
    source: Source,
    servers: Vec<SimServer>,
    /// The server that the agent uses.
    assigned: usize,
    suspended_until: [u64; 2],
    /// Whom the agent used since the last judgement.
    talked_to: [bool; 2],
    generations_seen: usize,
    store: Arc<SimStore>,
    vault_files: SimFiles,
    unlocked: UnlockedVault,
    frames: Arc<FrameSource>,
    tail: Option<ChainTail>,
    announced: AnnouncedPoints,
    newest_label: PointTime,
    next_judgement: u64,
    misfortunes: Vec<gaps::Misfortune>,
    gaps_seen: BTreeSet<(SequenceNumber, PointTime, GapScope)>,
    faults: BTreeMap<Fault, u64>,
    /// When each fault occurred last.
    last_of: BTreeMap<Fault, u64>,
    trace: blake3::Hasher,
    branches: Branches,
    partial_points: u64,
    moving: Option<drain::Moving>,
    quiet: Option<drain::Quiet>,
    planned: Option<drain::Planned>,
    undisturbed: Undisturbed,
    /// Who decides about failovers.
    operator: Arc<WriterSession>,
    decision: Option<decision::Decision>,
    /// The machine's chain is closed.
    closed: Option<decision::Closed>,
    /// Ring overflows that were seen, and of which run of the agent.
    breaks_seen: (u64, u64),
    /// When the way from the ring to the vault was disturbed last, and when more was written at once than the ring holds.
    disturbed_at: u64,
    burst_at: u64,
    bug: Option<Bug>,
    snapshot: Option<Vec<Vec<u8>>>,
    /// Bytes that scrubs found equal, and as many of them as this run of the agent had found when it was looked at.
    scrubbed_bytes: u64,
    scrubbed_seen: u64,
    /// The model can no longer say what the disks hold in these states: a write failed or a sector was lost.
    wall_errors: bool,
}

/// Lives one life.
///
/// # Errors
/// The first broken promise.
pub fn run((seed, width): (u64, Width), bug: Option<Bug>) -> Result<Report, Violation> {
    let mut world = World::new(seed, width, bug);
    world.live().map_err(|what| Violation { seed, width, at_ns: world.time.now(), what, bug })
}

impl World {
    fn new(seed: u64, width: Width, bug: Option<Bug>) -> World {
        let mut rng = Rng::new(seed);
        let time = TrueTime::default();
        let vault_files = SimFiles::new(rng.draw());
        let entropy: Arc<dyn Entropy> = Arc::new(SimEntropy::new(rng.fork()));
        let clock: Arc<dyn Clock> = Arc::new(SimClock::booting_now(&time));
        let folder = FolderStore::new(Arc::new(vault_files.clone()), &*entropy, "the simulated vault");
        let store = Arc::new(SimStore::new(Arc::new(folder), rng.fork(), bug));
        let dyn_store: Arc<dyn Store> = store.clone();
        let (unlocked, _) = Vault::create(dyn_store.clone(), "simulated", PassphraseCost::TRIVIAL, &entropy, &clock)
            .expect("a vault is made in an empty store");
        let shape = SourceShape {
            disk_bytes: vec![288 * 1024, 100 * 1024 + 512],
            ring_bytes: 96 * 1024,
            write_bytes_max: 12 * 1024,
            write_unit_bytes: 512,
            // With more, nobody waits for credit.
            heal_window_bytes: if bug == Some(Bug::CreditNotPaid) { Width::Narrow } else { width }.heal_window_bytes(),
        };
        let source = Source::new(shape, &time, rng.fork(), bug);
        let servers = ["A", "B"]
            .into_iter()
            .map(|name| {
                let keys =
                    unlocked.grant_writer(WriterRole::ProcessServer, name, &entropy, &clock).expect("the owner grants");
                let rng = rng.fork();
                SimServer::new(name, source.machine, dyn_store.clone(), &keys, &time, rng, bug)
            })
            .collect();
        let frames = Arc::new(FrameSource::new(dyn_store, Arc::clone(unlocked.keys()), CacheBytes::default()));
        let operator = unlocked.grant_writer(WriterRole::Operator, "operator", &entropy, &clock);
        let operator = operator.expect("the owner grants");
        let operator = WriterSession::new(operator, entropy, clock).expect("the read key is sound");
        let site = BranchSite::new(unlocked.clone(), &time, rng.fork(), bug);
        let branches = Branches::new(site, rng.fork());
        World {
            seed,
            rng,
            time,
            source,
            servers,
            assigned: 0,
            suspended_until: [0; 2],
            talked_to: [true, false],
            generations_seen: 0,
            store,
            vault_files,
            unlocked,
            frames,
            tail: None,
            announced: AnnouncedPoints::new(),
            newest_label: PointTime(0),
            next_judgement: 0,
            misfortunes: Vec::new(),
            gaps_seen: BTreeSet::new(),
            faults: BTreeMap::new(),
            last_of: BTreeMap::new(),
            trace: blake3::Hasher::new(),
            branches,
            partial_points: 0,
            moving: None,
            quiet: None,
            planned: None,
            undisturbed: Undisturbed::default(),
            operator: Arc::new(operator),
            decision: None,
            closed: None,
            breaks_seen: (0, 0),
            disturbed_at: 0,
            burst_at: 0,
            bug,
            snapshot: None,
            scrubbed_bytes: 0,
            scrubbed_seen: 0,
            wall_errors: false,
        }
    }

    fn live(&mut self) -> Result<Report, String> {
        self.servers.iter_mut().for_each(SimServer::start);
        self.source.start_agent();
        while self.time.now() < STORMY_NS {
            let faults = StoreFaults { refused: 15, answer_lost: 15 };
            self.store.set_faults(if self.is_quiet() { StoreFaults::default() } else { faults });
            self.misfortune();
            self.branch_misfortune()?;
            self.tick(true)?;
        }
        self.store.set_faults(StoreFaults::default());
        self.suspended_until = [0; 2];
        self.quiet = None;
        let deadline = self.time.now() + CALM_NS;
        // The machine goes on working for a while, then rests, so that its last state can become a point.
        let rest_at = self.time.now() + CALM_NS / 4;
        loop {
            let working = self.time.now() < rest_at;
            self.tick(working)?;
            if !working && self.is_healthy()? {
                break;
            }
            if self.time.now() > deadline {
                return Err(format!("not healthy again: {}", self.describe()));
            }
        }
        self.final_checks()
    }

    fn tick(&mut self, working: bool) -> Result<(), String> {
        self.time.advance(20 * MILLISECOND + self.rng.below(80 * MILLISECOND));
        for index in 0..self.servers.len() {
            if !self.servers[index].is_running() && self.suspended_until[index] <= self.time.now() {
                self.servers[index].start();
            }
        }
        if !self.source.is_running() && !self.is_away() {
            self.source.start_agent();
        }
        // Who is refused does not ask again so soon.
        let patience = if self.closed.is_some() { 40 } else { 4 };
        if self.source.is_running() && !self.source.is_plugged() && self.rng.one_in(patience) {
            let delay = 1 + self.rng.below(20 * MILLISECOND);
            let (near, far) = connect(&self.time, delay);
            self.servers[self.assigned].accept(far);
            self.source.plug(near);
        }
        if working && !self.is_away() && (!self.is_moving() || self.rng.one_in(40)) {
            self.workload();
        }
        if self.source.is_in_service() && (self.rng.one_in(40) || !working) {
            self.source.mend_sector();
        }
        // In every second life source and vault are compared all the time: nothing differs, so nothing may be found to.
        if self.seed.is_multiple_of(2) && self.rng.one_in(10) {
            self.source.scrub();
        }
        let same = self.source.scrub_progress().map_or(0, |progress| progress.same_bytes);
        self.scrubbed_bytes += same.saturating_sub(std::mem::replace(&mut self.scrubbed_seen, same));
        for _ in 0..2 {
            self.source.step();
            for index in 0..self.servers.len() {
                if self.suspended_until[index] <= self.time.now() {
                    self.servers[index].step();
                }
            }
            self.time.advance(MILLISECOND);
        }
        self.watch_the_ring()?;
        self.note_restart();
        self.step_planned();
        self.step_decision()?;
        self.note_store_faults();
        self.note_end()?;
        self.live_branches(working)?;
        self.judge_return()?;
        if self.time.now() >= self.next_judgement {
            self.next_judgement = self.time.now() + 2 * SECOND + self.rng.below(6 * SECOND);
            self.judge()?;
        }
        Ok(())
    }

    fn workload(&mut self) {
        let burst = match self.rng.below(400) {
            0 if !self.is_quiet() && self.source.is_in_service() => {
                self.count(Fault::RingOverflow);
                self.burst_at = self.time.now();
                40
            }
            draw => draw % 3 / 2 * 2,
        };
        (0..burst).for_each(|_| self.source.write_something());
        if self.rng.one_in(500) {
            let name = format!("mark-{}", self.rng.below(1000));
            self.source.mark(&name);
        }
    }

    /// A pipeline may end only because somebody else took the chain over.
    fn note_end(&mut self) -> Result<(), String> {
        let mut stale = 0;
        let mut failed = 0;
        let mut broken_down = Vec::new();
        // Closed, or about to learn that it is, or not yet on the way to where the machine went.
        let may_be_closed = self.closed.is_some()
            || self.is_deciding()
            || !self.branches.left_behind.is_empty()
            // Cancelled a moment ago: it had looked before.
            || self.last_of.get(&Fault::FailoverCancelled) == Some(&self.time.now());
        for (index, server) in self.servers.iter_mut().enumerate() {
            for end in server.ends.drain(..) {
                let (fenced, unavailable) = (end.contains("Fenced"), end.contains("Unavailable"));
                let closed = may_be_closed && (end.contains("Closed {") || end.contains("ChainClosed"));
                if !fenced && !unavailable && !closed {
                    return Err(format!("server {}: its pipeline ended: {end}", server.name));
                }
                stale += u64::from(fenced && index != self.assigned);
                failed += u64::from(unavailable);
            }
            for reason in server.closed.drain(..) {
                if !["severed", "Busy", "good-bye"].iter().any(|known| reason.contains(known)) {
                    broken_down.push((index, reason));
                }
            }
        }
        for (index, reason) in broken_down {
            // Who lost its generation and does not know it yet cannot follow numbers of the next one.
            let newest = self.history()?.map(|history| history.generation().opened);
            let server = &self.servers[index];
            let is_stale = server.committed_head().is_none_or(|(_, head)| newest > Some(head.number));
            if !(is_stale && reason.contains(" follows ")) {
                return Err(format!("server {}: a session broke down: {reason}", server.name));
            }
        }
        (0..stale).for_each(|_| self.count(Fault::StaleWriterFenced));
        (0..failed).for_each(|_| self.strike(Fault::OpeningFailed));
        Ok(())
    }

    fn count(&mut self, fault: Fault) {
        if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
            eprintln!("{:.3} {fault:?}", self.time.now() as f64 / 1e9);
        }
        *self.faults.entry(fault).or_default() += 1;
        self.last_of.insert(fault, self.time.now());
        self.trace.update(&[fault as u8]).update(&self.time.now().to_le_bytes());
    }

    fn chain(&self) -> Option<ChainId> {
        let store: Arc<dyn Store> = self.store.clone();
        let catalog = Catalog::load(&store, self.unlocked.keys()).ok()?;
        catalog.machines.get(&self.source.machine).map(|machine| machine.chain)
    }

    fn history(&mut self) -> Result<Option<ChainHistory>, String> {
        if self.tail.is_none() {
            self.tail = self.chain().map(ChainTail::new);
        }
        let Some(tail) = &mut self.tail else { return Ok(None) };
        let store: Arc<dyn Store> = self.store.clone();
        tail.read_on(&store, self.unlocked.keys()).map_err(|error| format!("the chain cannot be read: {error:?}"))
    }

    fn describe(&mut self) -> String {
        let gaps = self.history().ok().flatten().map(|history| {
            let open = history.gaps().into_iter().filter(|gap| gap.until.is_none()).collect::<Vec<_>>();
            (history.through, history.last_cut(), open)
        });
        format!(
            "seed {} bug {:?} assigned {} engine {:?} vault {gaps:?}",
            self.seed,
            self.bug,
            self.assigned,
            self.source.engine().map(|engine| engine.status())
        )
    }
}
