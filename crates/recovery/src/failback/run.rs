//! A failback without threads: [`FailbackRun::step`] does one bounded piece of it and does not wait for anybody.
//!
//! ```text
//! Pausing ─► Ordering ─► Streaming ─cut over─► Settling ─► Proving ─► Completing ─► Recording ─► Over
//!    ▲           └───────────┴── link lost ───────┴───────────┴───────────┘
//! ```
//!
//! From *Settling* on the branch is at rest, by the guard in [`Rest`]: leaving these states in any way lets it go on.

mod prove;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agent::capture::Frozen;
use agent::engine::{ClearedMark, Engine, HashIndex, Step, WireClosed};
use replication::geometry::ByteRange;
use replication::limits::HEAL_WINDOW_BYTES;
use replication::sender::SenderConfig;
use replication::wire::{OfferHashes, OfferedLeaf};
use replication::{ChainId, DiskId, InstanceId, MarkerKind, PointTime, SequenceNumber};
use vault::VaultError;
use world::Monotonic;

use self::prove::Proof;
use super::{FailbackConfig, FailbackStatus, HomeLine, LineError, Phase, Shared, lock};
use crate::branch::Branch;
use crate::core::{BranchCore, SealWish};
use crate::home_disk::{HomeOrder, Refusal};
use crate::home_wire::{HOME_VERSION, HomeMessage, HomeWire};
use crate::lent_capture::LentCapture;
use crate::limits;
use crate::succession::NoSuccession;

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

/// What a step achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Something moved; step again at once.
    Busy,
    /// Nothing to do until the branch, the link or a timer has something.
    Idle,
    /// The failback has ended, well or not: see its status.
    Over,
}

/// Why a link session ended.
enum SessionEnd {
    Lost(String),
    Refused(Refusal),
    Stopped,
}

impl From<WireClosed> for SessionEnd {
    fn from(closed: WireClosed) -> SessionEnd {
        SessionEnd::Lost(closed.to_string())
    }
}

/// The branch at rest, and since when.
struct Rest {
    frozen: Frozen,
    since: Monotonic,
}

enum State {
    /// No link; the next one is tried at this moment.
    Pausing {
        until: Monotonic,
    },
    /// The order was said; the answer is awaited.
    Ordering {
        since: Monotonic,
    },
    /// Home is compared, then follows.
    Streaming,
    /// The branch is at rest and its last changes are on their way.
    Settling(Rest),
    /// Home has everything, and is compared with the branch's head.
    Proving {
        rest: Rest,
        proof: Proof,
        since: Monotonic,
    },
    /// The branch's chain has ended and home was told.
    Completing {
        rest: Rest,
        rested: Duration,
        since: Monotonic,
    },
    /// Home is usable; the vault must hear of it.
    Recording {
        rest: Rest,
        rested: Duration,
        since: Monotonic,
        retry_at: Monotonic,
    },
    Over,
}

/// See the module's documentation.
pub struct FailbackRun {
    branch: Arc<Branch>,
    disks: Vec<HomeOrder>,
    line: Box<dyn HomeLine>,
    config: FailbackConfig,
    pub(super) shared: Arc<Shared>,
    engine: Engine<LentCapture>,
    wire: Option<HomeWire>,
    state: State,
    begun: Monotonic,
    /// The branch's chain has been ended; only the master target has to hear of it.
    finished: bool,
    /// The vault was asked whether the branch may become the machine's history.
    admitted: bool,
    /// A proof failed: home is compared again before the next one.
    distrusted: bool,
    /// The comparison with which every session begins has begun. Before that the sender looks as if nothing were left to do.
    begun_comparing: bool,
    next_proof: u64,
    /// Bytes of the sessions that ended.
    wire_bytes: u64,
}

/// Pause between attempts to record in the vault that the machine came home.
const RECORD_PAUSE: Duration = Duration::from_secs(1);
/// How long that is tried.
const RECORD_PATIENCE: Duration = Duration::from_secs(600);

fn goes_on(what: String) -> Refusal {
    Refusal::new(what, "the branch goes on and home follows it", "cut over again")
}

fn unequal(what: String) -> Refusal {
    Refusal::new(
        what,
        "home is not what the branch is, so it must not be used",
        "check the disks for errors and cut over again: home is compared anew first; the branch goes on",
    )
}

/// What comes next, or why the session is over.
type Next = Result<(State, Turn), SessionEnd>;

impl FailbackRun {
    pub(super) fn new(
        branch: Arc<Branch>,
        disks: Vec<HomeOrder>,
        line: Box<dyn HomeLine>,
        config: FailbackConfig,
        shared: Arc<Shared>,
        capture: LentCapture,
    ) -> FailbackRun {
        let sender = SenderConfig {
            machine: branch.info().machine,
            instance: InstanceId(branch.entropy.bytes()),
            boot: branch.entropy.bytes(),
            vm_generation: [0; 16],
            started: PointTime(branch.clock.wall().0),
            name: branch.info().name.clone(),
            hashes: OfferHashes::Keyed(branch.core().leaf_key().clone()),
            rotate_every_ns: 1_000_000_000,
            proof_every_ns: 1_000_000_000,
            heal_chunk_bytes: config.chunk_bytes,
            heal_window_bytes: HEAL_WINDOW_BYTES,
        };
        let hashes = Box::new(BranchHashes(Arc::clone(branch.core())));
        let clock = Arc::clone(&branch.clock);
        let begun = clock.monotonic();
        let engine = Engine::new(capture, sender, clock, Some(hashes), Box::<ForgetfulMark>::default());
        let finished = branch.is_finished();
        let state = State::Pausing { until: begun };
        FailbackRun {
            branch,
            disks,
            line,
            config,
            shared,
            engine,
            wire: None,
            state,
            begun,
            finished,
            admitted: false,
            distrusted: false,
            begun_comparing: false,
            next_proof: 0,
            wire_bytes: 0,
        }
    }

    /// Where it stands.
    pub fn status(&self) -> FailbackStatus {
        lock(&self.shared.status).clone()
    }

    /// Asks for the cut over; see [`super::Failback::cut_over`].
    pub fn cut_over(&self) {
        self.shared.cut_over();
    }

    /// Whether the branch is held at rest, so that whoever writes to it waits.
    pub fn is_at_rest(&self) -> bool {
        matches!(
            self.state,
            State::Settling(_) | State::Proving { .. } | State::Completing { .. } | State::Recording { .. }
        )
    }

    fn now(&self) -> Monotonic {
        self.branch.clock.monotonic()
    }

    fn set(&self, change: impl FnOnce(&mut FailbackStatus)) {
        let mut status = lock(&self.shared.status);
        status.elapsed_ms = self.now().since(self.begun).as_millis() as u64;
        status.wire_bytes = self.wire_bytes + self.wire.as_ref().map_or(0, HomeWire::bytes);
        change(&mut status);
    }

    /// Does one bounded piece of work.
    pub fn step(&mut self) -> Turn {
        if matches!(self.state, State::Over) {
            return Turn::Over;
        }
        let next = if self.shared.stop.load(Ordering::SeqCst) {
            Err(SessionEnd::Stopped)
        } else {
            match std::mem::replace(&mut self.state, State::Over) {
                State::Pausing { until } => self.connect(until),
                State::Ordering { since } => self.order(since),
                State::Streaming => self.stream(),
                State::Settling(rest) => self.settle(rest),
                State::Proving { rest, proof, since } => self.prove(rest, proof, since),
                State::Completing { rest, rested, since } => self.complete(rest, rested, since),
                State::Recording { rest, rested, since, retry_at } => self.record(rest, rested, since, retry_at),
                State::Over => Ok((State::Over, Turn::Over)),
            }
        };
        let (state, turn) = next.unwrap_or_else(|end| self.end_session(end));
        self.state = state;
        turn
    }

    /// Waits until the link may have something, or a little.
    pub(super) fn wait(&mut self, patience: Duration) {
        match &mut self.wire {
            // An error comes again at the next step.
            Some(wire) => drop(wire.wait(patience)),
            None => std::thread::sleep(patience),
        }
    }

    fn hang_up(&mut self) {
        self.wire_bytes += self.wire.take().map_or(0, |wire| wire.bytes());
        self.engine.link_down();
    }

    fn end_session(&mut self, end: SessionEnd) -> (State, Turn) {
        self.hang_up();
        let problem = match end {
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
                return (State::Pausing { until: self.now().plus(self.config.reconnect_pause) }, Turn::Busy);
            }
            SessionEnd::Refused(refusal) => refusal,
            SessionEnd::Stopped if matches!(self.state, State::Recording { .. }) => Refusal::new(
                "the failback was stopped",
                "home equals the branch and is usable, but the vault does not know that the machine came home",
                "start it again; nothing is sent a second time",
            ),
            SessionEnd::Stopped => Refusal::new(
                "the failback was stopped",
                "the home disks are between two states and not usable",
                "start it again; only what differs is sent",
            ),
        };
        self.set(|status| {
            status.phase = Phase::Failed;
            status.problem = Some(problem);
        });
        (State::Over, Turn::Over)
    }

    fn connect(&mut self, until: Monotonic) -> Next {
        if self.now() < until {
            // The ring is looked after meanwhile; what does not fit is in the maps.
            self.engine.step(None);
            return Ok((State::Pausing { until }, Turn::Idle));
        }
        if !self.admitted && !self.admit()? {
            return Ok((State::Pausing { until: self.now().plus(self.config.reconnect_pause) }, Turn::Idle));
        }
        let first = lock(&self.shared.status).connections == 0;
        let link = self.line.connect().map_err(|error| match error {
            LineError::NotNow(reason) if !first => SessionEnd::Lost(format!("{}: {}", reason.what, reason.why)),
            LineError::NotNow(reason) | LineError::Never(reason) => SessionEnd::Refused(reason),
        })?;
        let mut wire = HomeWire::new(link);
        wire.say(&HomeMessage::Order {
            version: HOME_VERSION,
            machine: self.branch.info().machine.to_string(),
            chain: self.branch.id().to_string(),
            disks: self.disks.clone(),
        })?;
        self.wire = Some(wire);
        Ok((State::Ordering { since: self.now() }, Turn::Busy))
    }

    /// Whether the branch may become the machine's history, before anything at home is touched. `false` if the vault cannot
    /// be asked now.
    fn admit(&mut self) -> Result<bool, SessionEnd> {
        let refusal = match self.branch.judge_succession(self.config.succession) {
            Ok(_) => {
                self.admitted = true;
                return Ok(true);
            }
            Err(NoSuccession::Vault(VaultError::Store(error))) => {
                let problem = Refusal::new(
                    format!("the vault does not say now whether the branch may become the machine's history: {error}"),
                    "nothing at home is touched before that is known",
                    "nothing: it is asked again by itself",
                );
                self.set(|status| status.problem = Some(problem));
                return Ok(false);
            }
            Err(NoSuccession::Vault(error)) => Refusal::new(
                format!("it cannot be told whether the branch may become the machine's history: {error}"),
                "the vault's catalog, or the machine's chain, cannot be read",
                "see `farshore vault verify`",
            ),
            Err(NoSuccession::Refused(refusal)) => refusal,
        };
        self.set(|status| status.refused = true);
        Err(SessionEnd::Refused(refusal))
    }

    fn wire(&mut self) -> Result<&mut HomeWire, SessionEnd> {
        self.wire.as_mut().ok_or_else(|| SessionEnd::Lost("there is no link".into()))
    }

    /// What the master target said, if it did; an error if it has been silent for too long.
    fn hear(&mut self, since: Monotonic) -> Result<Option<HomeMessage>, SessionEnd> {
        if let Some(message) = self.wire()?.hear(Duration::ZERO)? {
            return Ok(Some(message));
        }
        if self.now().since(since) > limits::HOME_SILENCE {
            return Err(SessionEnd::Lost("the master target does not answer".into()));
        }
        Ok(None)
    }

    fn order(&mut self, since: Monotonic) -> Next {
        match self.hear(since)? {
            None => return Ok((State::Ordering { since }, Turn::Idle)),
            Some(HomeMessage::Accepted) => {}
            Some(HomeMessage::Refused { refusal }) => {
                self.set(|status| status.refused = true);
                return Err(SessionEnd::Refused(refusal));
            }
            Some(other) => return Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
        }
        self.set(|status| {
            status.connections += 1;
            status.phase = Phase::Comparing;
            status.problem = None;
        });
        self.begun_comparing = false;
        self.engine.link_up();
        Ok((State::Streaming, Turn::Busy))
    }

    /// One step of the engine.
    fn step_engine(&mut self) -> Result<Turn, SessionEnd> {
        let wire = self.wire.as_mut().map(|wire| wire as &mut dyn agent::engine::Wire);
        match self.engine.step(wire) {
            Step::Busy => Ok(Turn::Busy),
            Step::Idle => Ok(Turn::Idle),
            Step::Reconnect(reason) => Err(SessionEnd::Lost(reason)),
            Step::Refused(reason) => Err(SessionEnd::Refused(Refusal::new(
                format!("the master target refuses the branch: {reason}"),
                "nothing can be sent",
                "see the master target's log",
            ))),
        }
    }

    fn stream(&mut self) -> Next {
        let turn = self.step_engine()?;
        let status = self.engine.status();
        let following = self.engine.sender().is_quiet();
        self.begun_comparing |= status.healing;
        let healing = status.healing || !self.begun_comparing;
        self.set(|shown| {
            shown.planned_bytes = status.heal.planned_bytes;
            shown.compared_bytes = status.heal.compared_bytes;
            shown.sent_bytes = status.heal.sent_bytes;
            shown.behind_bytes = status.ring_bytes_used;
            shown.phase = if healing { Phase::Comparing } else { Phase::Following };
        });
        if !healing && (following || turn == Turn::Idle) && self.shared.cut_over.swap(false, Ordering::SeqCst) {
            if std::mem::take(&mut self.distrusted) {
                // Home forgets what it knew, and everything is compared again; then the cut over follows.
                self.hang_up();
                self.shared.cut_over();
                return Ok((State::Pausing { until: self.now() }, Turn::Busy));
            }
            return Ok((self.come_to_rest(), Turn::Busy));
        }
        Ok((State::Streaming, turn))
    }

    /// The cut over did not come about; the branch and the link go on.
    fn resume(&self, problem: Refusal) -> State {
        tracing::warn!(%problem, "the cut over did not come about; the branch goes on");
        self.set(|status| status.problem = Some(problem));
        State::Streaming
    }

    fn marker_name(&self) -> String {
        format!("failback of {}", self.branch.id())
    }

    fn come_to_rest(&mut self) -> State {
        self.set(|status| status.phase = Phase::CuttingOver);
        let since = self.now();
        let frozen = match self.branch.splitter().freeze(self.config.rest_limit) {
            Ok(frozen) => frozen,
            Err(error) => return self.resume(goes_on(format!("the branch did not come to rest: {error}"))),
        };
        if !frozen.mark(MarkerKind::Final, &self.marker_name()) {
            return self.resume(goes_on("the stream broke before the last marker".into()));
        }
        State::Settling(Rest { frozen, since })
    }

    fn settle(&mut self, rest: Rest) -> Next {
        if !self.engine.is_settled() {
            if !rest.frozen.holds() || self.engine.sender().is_healing() {
                let problem = goes_on("home did not receive the last changes in time".into());
                return Ok((self.resume(problem), Turn::Busy));
            }
            let turn = self.step_engine()?;
            return Ok((State::Settling(rest), turn));
        }
        let core = self.branch.core();
        // A link that was lost after the branch had ended brings us here again.
        let sealed = match self.finished {
            true => Ok(()),
            false => core.mark(MarkerKind::Final, &self.marker_name()).and_then(|()| core.seal_all(SealWish::Now)),
        };
        if let Err(error) = sealed {
            let problem = goes_on(format!("the branch's last changes could not be committed: {error}"));
            return Ok((self.resume(problem), Turn::Busy));
        }
        Ok(self.begin_proof(rest))
    }

    /// Home is equal: makes sure that the branch is the machine's history, ends its chain and tells home.
    fn finish(&mut self, rest: Rest) -> Next {
        match self.branch.take_succession(self.config.succession) {
            Ok(()) => {}
            Err(NoSuccession::Refused(refusal)) => return Ok((self.resume(refusal), Turn::Busy)),
            Err(NoSuccession::Vault(error)) => {
                let problem = goes_on(format!("the machine's own history could not be closed: {error}"));
                return Ok((self.resume(problem), Turn::Busy));
            }
        }
        if let Err(error) = self.branch.finish("it was failed back") {
            let problem = goes_on(format!("the branch's chain could not be ended: {error}"));
            return Ok((self.resume(problem), Turn::Busy));
        }
        self.finished = true;
        let rested = self.now().since(rest.since);
        self.wire()?.say(&HomeMessage::Complete)?;
        Ok((State::Completing { rest, rested, since: self.now() }, Turn::Busy))
    }

    fn complete(&mut self, rest: Rest, rested: Duration, since: Monotonic) -> Next {
        match self.hear(since)? {
            None => Ok((State::Completing { rest, rested, since }, Turn::Idle)),
            Some(HomeMessage::Completed) => {
                self.hang_up();
                let now = self.now();
                Ok((State::Recording { rest, rested, since: now, retry_at: now }, Turn::Busy))
            }
            Some(other) => Err(SessionEnd::Lost(format!("unexpected {other:?}"))),
        }
    }

    fn record(&mut self, rest: Rest, rested: Duration, since: Monotonic, retry_at: Monotonic) -> Next {
        let now = self.now();
        if now < retry_at {
            return Ok((State::Recording { rest, rested, since, retry_at }, Turn::Idle));
        }
        if let Err(error) = self.branch.hand_over("it was failed back") {
            let problem = |advice| {
                Refusal::new(
                    format!("home equals the branch, but that could not be recorded: {error}"),
                    "the machine's history would not go on from here",
                    advice,
                )
            };
            if now.since(since) >= RECORD_PATIENCE {
                let advice = "make the vault writable and fail back again; nothing is sent a second time";
                return Err(SessionEnd::Refused(problem(advice)));
            }
            self.set(|status| status.problem = Some(problem("nothing: it is tried again by itself")));
            let retry_at = now.plus(RECORD_PAUSE);
            return Ok((State::Recording { rest, rested, since, retry_at }, Turn::Idle));
        }
        self.set(|status| {
            status.phase = Phase::Done;
            status.problem = None;
            status.rest_ms = rested.as_millis() as u64;
        });
        Ok((State::Over, Turn::Over))
    }
}
