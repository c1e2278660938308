//! Bringing a branch home while it is in use: the sending side.
//!
//! ```text
//! Connecting ─► Comparing ─► Following ─cut over─► CuttingOver ─► Proving ─► Done
//!     ▲            │             │                                   │
//!     └────────────┴── link lost ┘          equality not proved ─────┴──► Following, with the reason
//! ```
//!
//! The engine of the mobility agent follows the branch's splitter; hashes come from the branch's index, so that what is
//! equal is not even read. The cut over brings the disks to rest, ends the stream with a marker, waits until the master
//! target has all of it, and has every granule at home hashed and compared with the branch's head.
//!
//! A crash of this side leaves the branch as it was: failing back again begins with a comparison.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use agent::capture::Frozen;
use agent::engine::{ClearedMark, Engine, HashIndex, Step, WireClosed};
use link::FrameLink;
use replication::geometry::ByteRange;
use replication::sender::SenderConfig;
use replication::wire::{OfferHashes, OfferedLeaf};
use replication::{ChainId, DiskId, InstanceId, MarkerKind, SequenceNumber};
use serde::{Deserialize, Serialize};

use crate::branch::Branch;
use crate::core::{BranchCore, SealWish};
use crate::home_disk::{HomeOrder, Refusal};
use crate::home_wire::{HOME_VERSION, HomeMessage, HomeWire};
use crate::lent_capture::LentCapture;
use crate::limits;
use crate::master_target::digest_of;

/// The way to a master target. Called again whenever a link ended.
pub trait HomeLine: Send {
    /// A new link.
    ///
    /// # Errors
    /// Why there is none now, for people.
    fn connect(&mut self) -> Result<Arc<dyn FrameLink>, String>;
}

/// Where a failback stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No link to the master target yet, or not any more.
    Connecting,
    /// Home is compared with the branch, and what differs is sent.
    Comparing,
    /// Home follows the branch.
    Following,
    /// The branch is at rest; its last changes are being sent.
    CuttingOver,
    /// Home is read and compared with the branch's head.
    Proving,
    /// Home equals the branch and is usable; the branch has ended.
    Done,
    /// It will not go on.
    Failed,
}

/// A snapshot of a failback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailbackStatus {
    /// Where it stands.
    pub phase: Phase,
    /// Bytes of disk that are compared in all.
    pub planned_bytes: u64,
    /// Bytes of disk compared so far.
    pub compared_bytes: u64,
    /// Bytes of data that the comparison sent.
    pub sent_bytes: u64,
    /// Bytes in the send buffer that home does not have yet.
    pub behind_bytes: u64,
    /// Bytes of home proved equal.
    pub proved_bytes: u64,
    /// Links that were made so far.
    pub connections: u64,
    /// Time since the beginning, in milliseconds.
    pub elapsed_ms: u64,
    /// How long the branch was at rest for the cut over, in milliseconds.
    pub rest_ms: u64,
    /// Why it failed, or why the last cut over or link did.
    pub problem: Option<Refusal>,
}

/// How a failback behaves.
#[derive(Debug, Clone, Copy)]
pub struct FailbackConfig {
    /// How long the branch may be at rest for a cut over.
    pub rest_limit: Duration,
    /// Pause before a new link after one ended.
    pub reconnect_pause: Duration,
    /// Bytes of disk compared at once; a multiple of 64 KiB.
    pub chunk_bytes: u64,
}

impl Default for FailbackConfig {
    fn default() -> FailbackConfig {
        FailbackConfig {
            rest_limit: Duration::from_secs(3600),
            reconnect_pause: Duration::from_secs(1),
            chunk_bytes: 1 << 20,
        }
    }
}

struct Shared {
    status: Mutex<FailbackStatus>,
    cut_over: AtomicBool,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A failback under way, on a thread of its own. Dropping it ends it where it is.
pub struct Failback {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Failback {
    /// Begins to bring `branch` home to `disks` over `line`. The branch stays in use.
    ///
    /// # Errors
    /// If the branch is being brought home already, the disks are not the branch's, or the system gives no thread.
    pub fn start(
        branch: Arc<Branch>,
        disks: Vec<HomeOrder>,
        line: Box<dyn HomeLine>,
        config: FailbackConfig,
    ) -> Result<Failback, Refusal> {
        for geometry in branch.disks() {
            let ordered = disks.iter().filter(|order| order.disk_id() == geometry.disk);
            if ordered.map(|order| order.size_bytes).collect::<Vec<_>>() != [geometry.size_bytes] {
                return Err(Refusal::new(
                    format!("{} of the branch has no home disk, or one of another size was ordered", geometry.disk),
                    "a machine comes home with all of its disks",
                    format!("name a home for it with --to {}=PATH", geometry.disk.0),
                ));
            }
        }
        if disks.len() != branch.disks().len() {
            return Err(Refusal::new(
                "a home was named for a disk that the branch does not have",
                "",
                "name the branch's disks only",
            ));
        }
        let Some(capture) = LentCapture::borrow(&branch) else {
            return Err(Refusal::new(
                "this branch is being brought home already",
                "two senders would contradict each other",
                "follow the one that runs, or cancel it first",
            ));
        };
        let status = FailbackStatus {
            phase: Phase::Connecting,
            planned_bytes: 0,
            compared_bytes: 0,
            sent_bytes: 0,
            behind_bytes: 0,
            proved_bytes: 0,
            connections: 0,
            elapsed_ms: 0,
            rest_ms: 0,
            problem: None,
        };
        let shared = Arc::new(Shared {
            status: Mutex::new(status),
            cut_over: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let state = Arc::clone(&shared);
        let spawned = std::thread::Builder::new().name("failback".into()).spawn(move || {
            let mut run = Run::new(&branch, disks, line, config, state, capture);
            run.run();
        });
        let refused =
            |error: std::io::Error| Refusal::new(format!("no thread: {error}"), "nothing can be sent", "try again");
        Ok(Failback { shared, thread: Some(spawned.map_err(refused)?) })
    }

    /// Where it stands.
    pub fn status(&self) -> FailbackStatus {
        lock(&self.shared.status).clone()
    }

    /// Asks for the cut over, as soon as home follows the branch. Stop whatever uses the branch first: from the
    /// moment the disks are at rest its writes wait, and they fail once home is proved equal.
    pub fn cut_over(&self) {
        lock(&self.shared.status).problem = None;
        self.shared.cut_over.store(true, Ordering::SeqCst);
    }

    /// Whether it has ended, well or not.
    pub fn is_over(&self) -> bool {
        matches!(self.status().phase, Phase::Done | Phase::Failed)
    }
}

impl Drop for Failback {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// The hashes of a branch, from its index.
struct BranchHashes(Arc<BranchCore>);

impl HashIndex for BranchHashes {
    fn offered(&self, disk: DiskId, range: ByteRange) -> Vec<OfferedLeaf> {
        self.0.offered(disk, range)
    }
}

/// A failback's maps live in memory only, and so does this.
#[derive(Default)]
struct ForgetfulMark(Option<(ChainId, SequenceNumber)>);

impl ClearedMark for ForgetfulMark {
    fn load(&self) -> Option<(ChainId, SequenceNumber)> {
        self.0
    }

    fn store(&mut self, chain: ChainId, committed: SequenceNumber) -> std::io::Result<()> {
        self.0 = Some((chain, committed));
        Ok(())
    }
}

/// Why a link session ended.
enum SessionEnd {
    Lost(String),
    Refused(Refusal),
    Done,
    Stopped,
}

impl From<WireClosed> for SessionEnd {
    fn from(closed: WireClosed) -> SessionEnd {
        SessionEnd::Lost(closed.to_string())
    }
}

struct Run<'a> {
    branch: &'a Branch,
    disks: Vec<HomeOrder>,
    line: Box<dyn HomeLine>,
    config: FailbackConfig,
    shared: Arc<Shared>,
    engine: Engine<LentCapture>,
    begun: world::Monotonic,
    /// The branch's chain has been ended; only the master target has to hear of it.
    finished: bool,
}

/// How long an idle loop waits for the link.
const IDLE_WAIT: Duration = Duration::from_millis(2);
/// Questions of the proof that are asked before the first is answered.
const PROOFS_IN_FLIGHT: usize = 4;

impl<'a> Run<'a> {
    fn new(
        branch: &'a Branch,
        disks: Vec<HomeOrder>,
        line: Box<dyn HomeLine>,
        config: FailbackConfig,
        shared: Arc<Shared>,
        capture: LentCapture,
    ) -> Run<'a> {
        let sender = SenderConfig {
            machine: branch.info().machine,
            instance: InstanceId(branch.entropy.bytes()),
            boot: branch.entropy.bytes(),
            vm_generation: [0; 16],
            name: branch.info().name.clone(),
            hashes: OfferHashes::Keyed(branch.core().leaf_key().clone()),
            rotate_every_ns: 1_000_000_000,
            proof_every_ns: 1_000_000_000,
            heal_chunk_bytes: config.chunk_bytes,
        };
        let hashes = Box::new(BranchHashes(Arc::clone(branch.core())));
        let clock = Arc::clone(&branch.clock);
        let begun = clock.monotonic();
        let engine = Engine::new(capture, sender, clock, Some(hashes), Box::<ForgetfulMark>::default());
        Run { branch, disks, line, config, shared, engine, begun, finished: false }
    }

    fn stopping(&self) -> bool {
        self.shared.stop.load(Ordering::SeqCst)
    }

    fn set(&self, change: impl FnOnce(&mut FailbackStatus)) {
        let mut status = lock(&self.shared.status);
        status.elapsed_ms = self.branch.clock.monotonic().since(self.begun).as_millis() as u64;
        change(&mut status);
    }

    fn run(&mut self) {
        loop {
            let end = self.session();
            self.engine.link_down();
            match end {
                SessionEnd::Done => return,
                SessionEnd::Stopped => {
                    return self.set(|status| {
                        status.phase = Phase::Failed;
                        status.problem = Some(Refusal::new(
                            "the failback was stopped",
                            "the home disks are between two states and not usable",
                            "start it again; only what differs is sent",
                        ));
                    });
                }
                SessionEnd::Refused(refusal) => {
                    return self.set(|status| {
                        status.phase = Phase::Failed;
                        status.problem = Some(refusal);
                    });
                }
                SessionEnd::Lost(reason) => {
                    if self.finished {
                        self.shared.cut_over.store(true, Ordering::SeqCst);
                    }
                    tracing::info!(reason, "the way home is interrupted");
                    self.set(|status| {
                        status.phase = Phase::Connecting;
                        status.problem = Some(Refusal::new(
                            format!("the link to the master target ended: {reason}"),
                            "home does not follow the branch now",
                            "nothing: it is tried again by itself",
                        ));
                    });
                    self.pause();
                }
            }
        }
    }

    fn pause(&mut self) {
        let until = self.branch.clock.monotonic().plus(self.config.reconnect_pause);
        while !self.stopping() && self.branch.clock.monotonic() < until {
            // The ring is looked after meanwhile; what does not fit is in the maps.
            self.engine.step(None);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn session(&mut self) -> SessionEnd {
        if self.stopping() {
            return SessionEnd::Stopped;
        }
        let link = match self.line.connect() {
            Ok(link) => link,
            Err(reason) => return SessionEnd::Lost(reason),
        };
        let mut wire = HomeWire::new(link);
        match self.talk(&mut wire) {
            Ok(end) | Err(end) => end,
        }
    }

    fn talk(&mut self, wire: &mut HomeWire) -> Result<SessionEnd, SessionEnd> {
        wire.say(&HomeMessage::Order {
            version: HOME_VERSION,
            machine: self.branch.info().machine.to_string(),
            chain: self.branch.id().to_string(),
            disks: self.disks.clone(),
        })?;
        match self.answer(wire)? {
            HomeMessage::Accepted => {}
            HomeMessage::Refused { refusal } => return Err(SessionEnd::Refused(refusal)),
            other => return Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
        }
        self.set(|status| {
            status.connections += 1;
            status.phase = Phase::Comparing;
            status.problem = None;
        });
        self.engine.link_up();
        loop {
            if self.stopping() {
                return Err(SessionEnd::Stopped);
            }
            let idle = self.step(wire)?;
            let status = self.engine.status();
            let following = self.engine.sender().is_quiet();
            let healing = status.healing;
            self.set(|shown| {
                shown.planned_bytes = status.heal.planned_bytes;
                shown.compared_bytes = status.heal.compared_bytes;
                shown.sent_bytes = status.heal.sent_bytes;
                shown.behind_bytes = status.ring_bytes_used;
                shown.phase = if healing { Phase::Comparing } else { Phase::Following };
            });
            if !healing && (following || idle) && self.shared.cut_over.swap(false, Ordering::SeqCst) {
                match self.cut_over(wire)? {
                    Ok(()) => return Ok(SessionEnd::Done),
                    Err(problem) => {
                        tracing::warn!(%problem, "the cut over did not come about; the branch goes on");
                        self.set(|status| status.problem = Some(problem));
                    }
                }
            }
            if idle {
                wire.wait(IDLE_WAIT)?;
            }
        }
    }

    fn answer(&mut self, wire: &mut HomeWire) -> Result<HomeMessage, SessionEnd> {
        let begun = self.branch.clock.monotonic();
        loop {
            if self.stopping() {
                return Err(SessionEnd::Stopped);
            }
            if let Some(message) = wire.hear(Duration::from_millis(50))? {
                return Ok(message);
            }
            if self.branch.clock.monotonic().since(begun) > limits::HOME_SILENCE {
                return Err(SessionEnd::Lost("the master target does not answer".into()));
            }
        }
    }

    /// One step of the engine; whether it was idle.
    fn step(&mut self, wire: &mut HomeWire) -> Result<bool, SessionEnd> {
        match self.engine.step(Some(wire)) {
            Step::Busy => Ok(false),
            Step::Idle => Ok(true),
            Step::Reconnect(reason) => Err(SessionEnd::Lost(reason)),
            Step::Refused(reason) => Err(SessionEnd::Refused(Refusal::new(
                format!("the master target refuses the branch: {reason}"),
                "nothing can be sent",
                "see the master target's log",
            ))),
        }
    }

    /// Outer error: the session is over. Inner error: the branch goes on.
    fn cut_over(&mut self, wire: &mut HomeWire) -> Result<Result<(), Refusal>, SessionEnd> {
        self.set(|status| status.phase = Phase::CuttingOver);
        let rest = self.branch.clock.monotonic();
        let name = format!("failback of {}", self.branch.id());
        let goes_on = |what: String| Refusal::new(what, "the branch goes on and home follows it", "cut over again");
        let frozen = match self.branch.splitter().freeze(self.config.rest_limit) {
            Ok(frozen) => frozen,
            Err(error) => return Ok(Err(goes_on(format!("the branch did not come to rest: {error}")))),
        };
        if !frozen.mark(MarkerKind::Final, &name) {
            return Ok(Err(goes_on("the stream broke before the last marker".into())));
        }
        while !self.engine.is_settled() {
            if self.stopping() {
                return Err(SessionEnd::Stopped);
            }
            if !frozen.holds() || self.engine.sender().is_healing() {
                return Ok(Err(goes_on("home did not receive the last changes in time".into())));
            }
            if self.step(wire)? {
                wire.wait(IDLE_WAIT)?;
            }
        }
        let core = Arc::clone(self.branch.core());
        // A link that was lost after the branch had ended brings us here again.
        let sealed = match self.finished {
            true => Ok(()),
            false => core.mark(MarkerKind::Final, &name).and_then(|()| core.seal_all(SealWish::Now)),
        };
        if let Err(error) = sealed {
            return Ok(Err(goes_on(format!("the branch's last changes could not be committed: {error}"))));
        }
        self.set(|status| {
            status.phase = Phase::Proving;
            status.proved_bytes = 0;
        });
        if let Err(problem) = self.prove(wire, &frozen)? {
            return Ok(Err(problem));
        }
        if !frozen.holds() {
            return Ok(Err(goes_on("the branch was at rest for too long".into())));
        }
        if let Err(error) = self.branch.finish("it was failed back") {
            return Ok(Err(goes_on(format!("the branch's chain could not be ended: {error}"))));
        }
        self.finished = true;
        let rested = self.branch.clock.monotonic().since(rest);
        wire.say(&HomeMessage::Complete)?;
        match self.answer(wire)? {
            HomeMessage::Completed => {}
            other => return Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
        }
        if let Err(error) = self.branch.hand_over("it was failed back") {
            return Err(SessionEnd::Refused(Refusal::new(
                format!("home equals the branch, but that could not be recorded: {error}"),
                "the machine's history would not go on from here",
                "make the vault writable and fail back again; nothing is sent a second time",
            )));
        }
        drop(frozen);
        self.set(|status| {
            status.phase = Phase::Done;
            status.problem = None;
            status.rest_ms = rested.as_millis() as u64;
        });
        Ok(Ok(()))
    }

    /// Has every granule at home read and hashed, and compares with the branch's head.
    fn prove(&mut self, wire: &mut HomeWire, frozen: &Frozen) -> Result<Result<(), Refusal>, SessionEnd> {
        let core = Arc::clone(self.branch.core());
        let ranges: Vec<(DiskId, ByteRange)> = core
            .disks()
            .iter()
            .filter_map(|geometry| Some((geometry.disk, geometry.range()?)))
            .flat_map(|(disk, range)| range.split_at_multiples(limits::PROOF_RANGE_BYTES).map(move |part| (disk, part)))
            .collect();
        let mut asked = 0;
        for (index, (disk, range)) in ranges.iter().enumerate() {
            while asked < ranges.len() && asked < index + PROOFS_IN_FLIGHT {
                let (disk, range) = ranges[asked];
                wire.say(&HomeMessage::Prove { id: asked as u64, disk: disk.0, start: range.start, len: range.len })?;
                asked += 1;
            }
            let unequal = |what: String| {
                Refusal::new(
                    what,
                    "home is not what the branch is, so it must not be used",
                    "check the disks for errors and fail back again; the branch goes on",
                )
            };
            let ours = match core.leaf_hashes(*disk, *range) {
                Ok(hashes) => digest_of(hashes.into_iter().map(Some)),
                Err(error) => {
                    return Ok(Err(unequal(format!("{range} of {disk} cannot be read from the branch: {error}"))));
                }
            };
            match self.answer(wire)? {
                HomeMessage::Digest { id, digest } if id == index as u64 => {
                    if digest.is_none() || digest != ours {
                        return Ok(Err(unequal(format!("{range} of {disk} at home differs from the branch"))));
                    }
                }
                other => return Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
            }
            self.set(|status| status.proved_bytes += range.len);
            if !frozen.holds() {
                return Ok(Err(unequal("the branch was at rest for too long".into())));
            }
        }
        Ok(Ok(()))
    }
}
