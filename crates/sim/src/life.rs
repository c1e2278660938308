//! One simulated life: a machine that is written to, two process servers, one vault, and everything that goes wrong.
//!
//! The checkers hold the product to its promises, with the model as the only authority:
//!
//! * every announced point is a state that the machine's disks had, in order, and no newer than its label;
//! * an announced point stays openable and keeps its bytes, whatever happens later;
//! * a gap appears only when something happened that may cause one, and each is recorded;
//! * once faults stop, everything becomes healthy and the newest point is the machine's present state.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use replication::cut::{Cut, PointTime};
use replication::{ChainId, SequenceNumber};
use vault::catalog::Catalog;
use vault::keys::{PassphraseCost, WriterRole};
use vault::points::Which;
use vault::view::ChainView;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, FolderStore, Points, Store, UnlockedVault, Vault};
use world::{Clock, Entropy};

use crate::clock::{START_WALL_NS, SimClock, TrueTime};
use crate::files::{PowerCut, SimFiles};
use crate::link::connect;
use crate::model::{StateDigest, digest};
use crate::planted::Bug;
use crate::rng::{Rng, SimEntropy};
use crate::server::SimServer;
use crate::source::{Source, SourceShape};
use crate::store::{SimStore, StoreFaults};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// Simulated time with faults.
const STORMY_NS: u64 = 600 * SECOND;
/// Simulated time in which everything must become healthy again.
const CALM_NS: u64 = 240 * SECOND;

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What can go wrong, and how often it did.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum Fault { $($(#[$doc])* $name),* }

        impl Fault {
            /// All faults.
            pub const ALL: &[Fault] = &[$(Fault::$name),*];
        }
    };
}

faults! {
    LinkLost, LinkStalled, AgentKilled, SourcePowerCut, SourceReverted, WriteFailed, SectorUnreadable, RingOverflow,
    ServerKilled, ServerPowerCut, ServerLost, ServerSuspended, MovedByForce, VaultPowerCut, StoreRefused, AnswerLost,
    Garbage, SourceClockJump, ServerClockJump, NameTaken,
}

/// What a run saw.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// How often each fault occurred.
    pub faults: BTreeMap<Fault, u64>,
    /// Points announced and judged.
    pub points: u64,
    /// Gaps recorded.
    pub gaps: u64,
    /// Manifests committed.
    pub manifests: u64,
    /// Digest of everything that happened: equal for equal seeds.
    pub trace: u64,
}

/// A broken promise, with the command that shows it again.
#[derive(Debug)]
pub struct Violation {
    /// The run.
    pub seed: u64,
    /// Simulated time in nanoseconds.
    pub at_ns: u64,
    /// What was promised and what was found.
    pub what: String,
    bug: Option<Bug>,
}

impl Violation {
    /// The code under test panicked.
    pub fn panicked(seed: u64, bug: Option<Bug>, what: String) -> Violation {
        Violation { seed, at_ns: 0, what: format!("panic: {what}"), bug }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.at_ns as f64 / 1e9;
        writeln!(f, "seed {} at {seconds:.3} s: {}", self.seed, self.what)?;
        let planted = self.bug.map(|bug| format!(" --plant {bug:?}")).unwrap_or_default();
        write!(f, "  replay: cargo run --release -p sim -- --seed {}{planted}", self.seed)
    }
}

struct Announced {
    cut: Cut,
    state: StateDigest,
}

struct World {
    seed: u64,
    rng: Rng,
    time: TrueTime,
    source: Source,
    servers: Vec<SimServer>,
    /// The server that the agent uses.
    assigned: usize,
    suspended_until: [u64; 2],
    store: Arc<SimStore>,
    vault_files: SimFiles,
    unlocked: UnlockedVault,
    frames: Arc<FrameSource>,
    announced: BTreeMap<SequenceNumber, Announced>,
    newest_label: PointTime,
    next_judgement: u64,
    gap_causes_allowed: u64,
    faults: BTreeMap<Fault, u64>,
    trace: blake3::Hasher,
    bug: Option<Bug>,
    snapshot: Option<Vec<Vec<u8>>>,
    /// The model can no longer say what the disks hold in these states: a write failed or a sector was lost.
    wall_errors: bool,
}

/// Lives one life.
///
/// # Errors
/// The first broken promise.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Report, Violation> {
    let mut world = World::new(seed, bug);
    world.live().map_err(|what| Violation { seed, at_ns: world.time.now(), what, bug })
}

impl World {
    fn new(seed: u64, bug: Option<Bug>) -> World {
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
            disk_bytes: vec![320 * 1024, 100 * 1024 + 512],
            ring_bytes: 64 * 1024,
            write_bytes_max: 12 * 1024,
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
        let cache = CacheBytes { index: 1 << 20, data: 1 << 20, resolved: 1 << 20 };
        let frames = Arc::new(FrameSource::new(dyn_store, Arc::clone(unlocked.keys()), cache));
        World {
            seed,
            rng,
            time,
            source,
            servers,
            assigned: 0,
            suspended_until: [0; 2],
            store,
            vault_files,
            unlocked,
            frames,
            announced: BTreeMap::new(),
            newest_label: PointTime(0),
            next_judgement: 0,
            gap_causes_allowed: 1,
            faults: BTreeMap::new(),
            trace: blake3::Hasher::new(),
            bug,
            snapshot: None,
            wall_errors: false,
        }
    }

    fn live(&mut self) -> Result<Report, String> {
        self.servers.iter_mut().for_each(SimServer::start);
        self.source.start_agent();
        while self.time.now() < STORMY_NS {
            self.store.set_faults(StoreFaults { refused: 15, answer_lost: 15 });
            self.misfortune();
            self.tick(true)?;
        }
        self.store.set_faults(StoreFaults::default());
        self.suspended_until = [0; 2];
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
        if !self.source.is_running() {
            self.source.start_agent();
        }
        if !self.source.is_plugged() && self.rng.one_in(4) {
            let delay = 1 + self.rng.below(20 * MILLISECOND);
            let (near, far) = connect(&self.time, delay);
            self.servers[self.assigned].accept(far);
            self.source.plug(near);
        }
        if working {
            self.workload();
        }
        if self.rng.one_in(40) || !working {
            self.source.mend_sector();
        }
        for _ in 0..2 {
            self.source.step();
            for index in 0..self.servers.len() {
                if self.suspended_until[index] <= self.time.now() {
                    self.servers[index].step();
                }
            }
            self.time.advance(MILLISECOND);
        }
        self.note_end()?;
        if self.time.now() >= self.next_judgement {
            self.next_judgement = self.time.now() + 2 * SECOND + self.rng.below(6 * SECOND);
            self.judge()?;
        }
        Ok(())
    }

    fn workload(&mut self) {
        let burst = match self.rng.below(400) {
            0 => {
                self.count(Fault::RingOverflow);
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
        for server in &mut self.servers {
            for end in server.ends.drain(..) {
                let legal = end.contains("Fenced") || end.contains("Unavailable");
                if !legal {
                    return Err(format!("server {}: its pipeline ended: {end}", server.name));
                }
            }
            for reason in server.closed.drain(..) {
                if !reason.contains("severed") && !reason.contains("Busy") {
                    return Err(format!("server {}: a session broke down: {reason}", server.name));
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, fault: Fault) {
        if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
            eprintln!("{:.3} {fault:?}", self.time.now() as f64 / 1e9);
        }
        *self.faults.entry(fault).or_default() += 1;
        self.trace.update(&[fault as u8]).update(&self.time.now().to_le_bytes());
    }

    /// Perhaps something goes wrong. Whatever may cost continuity allows one more gap.
    fn misfortune(&mut self) {
        let draw = self.rng.below(6000);
        match draw {
            0..=19 => {
                self.count(Fault::LinkLost);
                self.source.unplug();
            }
            20..=39 => {
                self.count(Fault::LinkStalled);
                let stall = self.rng.below(4 * SECOND);
                if let Some(link) = self.source.link() {
                    link.stall(stall);
                }
            }
            40..=43 => {
                self.count(Fault::AgentKilled);
                self.source.kill_agent();
            }
            44..=46 => {
                self.count(Fault::SourcePowerCut);
                self.source.power_cut();
            }
            47..=48 => self.revert_source(),
            49..=51 => {
                self.count(Fault::WriteFailed);
                self.source.fail_a_write();
                // What a failed write left is for nobody to say, so no other write may follow before the agent has seen
                // it: the model knows one answer only.
                self.source.step();
            }
            52 => {
                self.count(Fault::SectorUnreadable);
                self.source.break_sector();
            }
            53..=57 => {
                self.count(Fault::ServerKilled);
                self.servers[self.assigned].kill();
            }
            58..=60 => {
                self.count(Fault::ServerPowerCut);
                self.servers[self.assigned].power_cut();
            }
            61..=62 => {
                self.count(Fault::ServerLost);
                self.servers[self.assigned].lose();
            }
            63..=65 => {
                self.count(Fault::ServerSuspended);
                let until = self.time.now() + self.rng.below(40 * SECOND);
                self.suspended_until[self.assigned] = until;
            }
            66..=69 => {
                // The old server is alive, or asleep with work in its hands, and does not know.
                self.count(Fault::MovedByForce);
                self.source.unplug();
                if self.rng.one_in(2) {
                    self.suspended_until[self.assigned] = self.time.now() + self.rng.below(30 * SECOND);
                }
                self.assigned = 1 - self.assigned;
            }
            70..=71 => {
                self.count(Fault::VaultPowerCut);
                self.vault_files.power_cycle(PowerCut::LoseAll);
            }
            72..=73 => self.garbage(),
            74..=76 => {
                self.count(Fault::ServerClockJump);
                self.wall_errors = true;
                let error = self.rng.below(120 * SECOND) as i64 - 60 * SECOND as i64;
                self.servers[self.assigned].clock().set_wall_error(error);
            }
            77 => {
                self.count(Fault::SourceClockJump);
                let error = self.rng.below(3600 * SECOND) as i64;
                self.source.clock.set_wall_error(error);
            }
            78..=79 => self.snapshot = Some(self.source.snapshot()),
            _ => return,
        }
        self.gap_causes_allowed += 1;
    }

    fn revert_source(&mut self) {
        if let Some(images) = self.snapshot.take() {
            self.count(Fault::SourceReverted);
            self.source.revert(&images);
        }
    }

    /// Somebody without keys puts objects into the vault, some where the next manifest would go.
    fn garbage(&mut self) {
        self.count(Fault::Garbage);
        let Some(chain) = self.chain() else { return };
        let number = u64::MAX - self.rng.below(2000);
        let name = format!("chains/{chain}/m/{number:016x}-{:032x}", u128::from(self.rng.draw()));
        let mut bytes = vec![0; self.rng.below(2000) as usize];
        self.rng.fill(&mut bytes);
        if let Ok(name) = vault::ObjectName::new(&name) {
            let _ = self.store.create(&name, &[bytes.into()]);
        }
    }

    fn chain(&self) -> Option<ChainId> {
        let store: Arc<dyn Store> = self.store.clone();
        let catalog = Catalog::load(&store, self.unlocked.keys()).ok()?;
        catalog.machines.get(&self.source.machine).map(|machine| machine.chain)
    }

    fn history(&self) -> Result<Option<ChainHistory>, String> {
        let Some(chain) = self.chain() else { return Ok(None) };
        let store: Arc<dyn Store> = self.store.clone();
        match ChainHistory::load(&store, self.unlocked.keys(), chain) {
            Ok(history) => Ok(Some(history)),
            Err(vault::VaultError::WrongChainState { .. }) => Ok(None),
            Err(error) => Err(format!("the chain cannot be read: {error:?}")),
        }
    }

    /// Judges every point announced since the last time.
    fn judge(&mut self) -> Result<(), String> {
        let Some(history) = self.history()? else { return Ok(()) };
        let store: Arc<dyn Store> = self.store.clone();
        let keys = Arc::clone(self.unlocked.keys());
        let points = Points::new(&store, &keys, &history);
        let from = PointTime(self.newest_label.0.saturating_sub(SECOND));
        let cuts = points
            .between(from, PointTime(u64::MAX), 100_000, Which::All)
            .map_err(|error| format!("points cannot be listed: {error:?}"))?;
        let view = ChainView::new(Arc::clone(&self.frames), history.layers(), None);
        for cut in cuts {
            if self.announced.contains_key(&cut.sequence) || !points.is_openable(&cut) {
                continue;
            }
            // A point with an unreadable sector is labelled so; what it holds elsewhere is judged at the next one.
            let Some(state) = self.state_at(&view, cut.sequence)? else { continue };
            self.judge_point(&cut, state)?;
            self.newest_label = self.newest_label.max(cut.time);
            self.trace.update(&cut.sequence.0.to_le_bytes());
            self.announced.insert(cut.sequence, Announced { cut, state });
        }
        self.judge_old_points(&view, &points)
    }

    fn judge_point(&self, cut: &Cut, state: StateDigest) -> Result<(), String> {
        let known = self.source.model.when(state);
        if known.is_empty() {
            if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
                self.explain(cut.sequence);
            }
            return Err(format!("{cut:?} was never a state of the machine"));
        }
        // With honest clocks a label tells the truth: everything before it is included, nothing from after it.
        if !self.wall_errors {
            let label = cut.time.0.saturating_sub(START_WALL_NS);
            let newest = known.iter().map(|state| state.requests).max().unwrap_or(0);
            // A hello that waited for a sleeping server makes the offset too large until the first proof arrives.
            let slack = 45 * SECOND;
            let oldest_needed = self.source.model.requests_before(label.saturating_sub(slack));
            if self.source.model.incarnations() == 0 && newest < oldest_needed {
                return Err(format!("{cut:?} lacks requests made {slack} ns before its label"));
            }
        }
        Ok(())
    }

    /// Where a point differs from the disks as they are now: usually enough to see what went wrong.
    fn explain(&self, sequence: SequenceNumber) {
        let Ok(Some(history)) = self.history() else { return };
        let view = ChainView::new(Arc::clone(&self.frames), history.layers(), None);
        for ((disk, size), now) in self.source.sizes().zip(self.source.snapshot()) {
            let mut bytes = vec![0; size as usize];
            if view.read(sequence, disk, 0, &mut bytes).is_ok() {
                let differs: Vec<usize> =
                    (0..bytes.len() / 512).filter(|i| bytes[i * 512..][..512] != now[i * 512..][..512]).collect();
                eprintln!("{disk}: sectors that differ from now: {differs:?}");
            }
        }
        for gap in history.gaps() {
            eprintln!("gap {} .. {:?} {}", gap.after, gap.until.map(|(at, _)| at.to_string()), gap.cause);
        }
        for layer in history.layers() {
            eprintln!("layer {:?} {} ..= {} entries {}", layer.kind, layer.first, layer.last, layer.entries);
        }
        eprintln!("{}", self.describe());
    }

    /// Announced points are for ever: one of them, at random, each time.
    fn judge_old_points(&mut self, view: &ChainView, points: &Points<'_>) -> Result<(), String> {
        if self.announced.is_empty() {
            return Ok(());
        }
        let index = self.rng.below(self.announced.len() as u64) as usize;
        let (sequence, announced) = self.announced.iter().nth(index).expect("the index is in range");
        if !points.is_openable(&announced.cut) {
            let hiding: Vec<_> = points.gaps().iter().filter(|gap| gap.hides(announced.cut.sequence)).collect();
            return Err(format!("{:?} was announced and can no longer be opened: {hiding:?}", announced.cut));
        }
        let state = self.state_at(view, *sequence)?;
        if state != Some(announced.state) {
            return Err(format!("{:?} was announced and has changed", announced.cut));
        }
        Ok(())
    }

    fn state_at(&self, view: &ChainView, sequence: SequenceNumber) -> Result<Option<StateDigest>, String> {
        let mut disks = Vec::new();
        for (disk, size) in self.source.sizes() {
            let mut bytes = vec![0; size as usize];
            match view.read(sequence, disk, 0, &mut bytes) {
                Ok(()) => disks.push((disk, bytes)),
                Err(vault::view::ReadError::Unreadable { .. }) => return Ok(None),
                Err(error) => return Err(format!("{disk} at {sequence} cannot be read: {error:?}")),
            }
        }
        Ok(Some(digest(disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])))))
    }

    fn is_healthy(&mut self) -> Result<bool, String> {
        if !self.source.is_settled() {
            return Ok(false);
        }
        let Some(history) = self.history()? else { return Ok(false) };
        if history.gaps().iter().any(|gap| gap.until.is_none()) {
            return Ok(false);
        }
        let Some((last, _)) = history.last_cut() else { return Ok(false) };
        let view = ChainView::new(Arc::clone(&self.frames), history.layers(), None);
        Ok(self.state_at(&view, last)? == Some(self.source.model.digest()) && last == history.through)
    }

    fn final_checks(&mut self) -> Result<Report, String> {
        self.judge()?;
        let history = self.history()?.ok_or("there is no chain")?;
        let store: Arc<dyn Store> = self.store.clone();
        let complete = ChainHistory::load_all(&store, self.unlocked.keys(), history.chain)
            .map_err(|error| format!("the chain cannot be read in full: {error:?}"))?;
        if complete.head != history.head || complete.layers().len() != history.layers().len() {
            return Err("reading by checkpoints and reading everything differ".into());
        }
        let keys = Arc::clone(self.unlocked.keys());
        let points = Points::new(&store, &keys, &complete);
        let view = ChainView::new(Arc::clone(&self.frames), complete.layers(), None);
        for announced in self.announced.values() {
            let state = self.state_at(&view, announced.cut.sequence)?;
            if !points.is_openable(&announced.cut) || state != Some(announced.state) {
                return Err(format!("{:?} was announced and is not what it was", announced.cut));
            }
        }
        self.nonces_are_unique()?;
        let gaps = complete.gaps().len() as u64;
        let allowed = self.gap_causes_allowed + self.faults.get(&Fault::RingOverflow).copied().unwrap_or(0);
        if gaps > 2 * allowed {
            return Err(format!("{gaps} gaps for {allowed} things that may cause one"));
        }
        let tally = &self.store.tally;
        use std::sync::atomic::Ordering::Relaxed;
        self.faults.insert(Fault::StoreRefused, tally.refused.load(Relaxed));
        self.faults.insert(Fault::AnswerLost, tally.answers_lost.load(Relaxed));
        self.faults.insert(Fault::NameTaken, tally.taken.load(Relaxed));
        self.trace.update(&complete.head.digest).update(&self.time.now().to_le_bytes());
        let trace = self.trace.finalize();
        Ok(Report {
            faults: std::mem::take(&mut self.faults),
            points: self.announced.len() as u64,
            gaps,
            manifests: complete.head.number,
            trace: u64::from_le_bytes(*trace.as_bytes().first_chunk().expect("a hash has 32 bytes")),
        })
    }

    /// No two objects of one writer share a nonce.
    fn nonces_are_unique(&self) -> Result<(), String> {
        let store: Arc<dyn Store> = self.store.clone();
        let mut seen = std::collections::HashSet::new();
        let mut twice = None;
        for folder in ["chains/", "packs/"] {
            store
                .for_each::<vault::StoreError>(folder, |name| {
                    if let Ok(header) = vault::object::verify_body_without_keys(store.as_ref(), &name)
                        && !seen.insert((header.writer, header.nonce))
                    {
                        twice = Some(name);
                    }
                    Ok(true)
                })
                .map_err(|error| format!("the vault cannot be listed: {error:?}"))?;
        }
        twice.map_or(Ok(()), |name| Err(format!("{name} has the nonce of another object")))
    }

    fn describe(&self) -> String {
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
