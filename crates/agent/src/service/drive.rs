//! The engine's thread: steps the engine, keeps the link, answers commands, publishes the status.
//!
//! It never blocks on the network for longer than an idle wait, so the ring is looked at whatever the server does. It waits
//! for its bell: commands, frames and, where the capture can, the first write after a rest end each wait at once.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use link::LinkIdentity;
use replication::sender::StreamState;
use replication::wire::Message;
use replication::{DiskId, Generation, MarkerKind};
use world::Monotonic;

use super::bell::Bell;
use super::disk_set::DiskStep;
use super::marks::Claim;
use super::problem::Problem;
use super::uplink::Uplink;
use super::{Shared, lock};
use crate::capture::{Capture, RingPosition};
use crate::engine::{Engine, ScrubRefusal, Step, Wire};
use crate::status::{LinkStatus, ProtectionState, gap_in_words};

/// Shortest and longest wait between two looks at a capture that does not ring. A lone write waits this long at most before
/// it is looked at.
const IDLE_MIN: Duration = Duration::from_micros(200);
const IDLE_MAX: Duration = Duration::from_millis(10);
/// Longest wait where a write rings. Everything else that only a look shows (a gap that nothing was written after, a proof
/// that is due) may come so late.
const SLEEP_MAX: Duration = Duration::from_millis(250);
/// Longest wait while the connection has no room: about the time in which it sends what it holds.
const CONGESTED_MAX: Duration = Duration::from_millis(1);
/// How long anybody waits for a marker to be durable, scripts after it included.
const DURABLE_WAIT_MAX: Duration = Duration::from_secs(2 * 3600);
/// How often the status is brought up to date.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// Time for the last good-bye.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// What other threads ask of the engine's thread.
pub(crate) enum Command {
    /// Put a marker into the stream; one that claims rest is written under `at_rest`, or not at all. The answer says whether
    /// a process server is connected; `durable` is told when the process server has it durably, or will not have it.
    Mark {
        kind: MarkerKind,
        name: String,
        at_rest: Option<Claim>,
        reply: SyncSender<Result<bool, Problem>>,
        durable: Option<MarkReply>,
    },
    /// Tell the process server what this machine is made of, now and with each session.
    Describe { document: String },
    /// Say whether a marker could be put into the stream now.
    Ready { name: String, reply: SyncSender<Result<(), Problem>> },
    /// Say as soon as a marker could be put into the stream, or that it could not until then.
    Settle { until: Monotonic, reply: SyncSender<Result<(), Problem>> },
    /// Do nothing but answer commands until `Wake`, or until then: what this thread writes to may be frozen.
    Rest { until: Monotonic, reply: SyncSender<()> },
    /// End of `Rest`.
    Wake,
    /// Have everything committed that was sent, then go on at the server that the state directory names; the answer says
    /// whether nothing was left to be committed.
    Move { within: Duration, reply: SyncSender<Result<bool, Problem>> },
    /// Change which disks are captured: all of it, or nothing if one cannot be added or followed as it grew. Removals come last.
    Disks { steps: Vec<DiskStep>, reply: SyncSender<Result<(), String>> },
    /// Show this identity, which has a new certificate, in the next session.
    Identity(Box<LinkIdentity>),
    /// Begin to compare this disk, or all of them, with the vault; the answer says how many bytes.
    Scrub { disk: Option<DiskId>, reply: SyncSender<Result<u64, ScrubRefusal>> },
    /// Send what is left, say good-bye, end.
    Finish { within: Duration },
}

/// The engine's thread takes no commands: it has too many, or has ended.
#[derive(Debug)]
pub(crate) struct Deaf;

/// The way to tell the engine's thread something.
#[derive(Clone)]
pub(crate) struct Orders {
    commands: SyncSender<Command>,
    bell: Arc<Bell>,
}

impl Orders {
    pub(super) fn new(commands: SyncSender<Command>, bell: Arc<Bell>) -> Orders {
        Orders { commands, bell }
    }

    /// Waits while it has too many commands.
    pub(crate) fn send(&self, command: Command) -> Result<(), Deaf> {
        self.commands.send(command).map_err(|_| Deaf).inspect(|()| self.bell.ring())
    }

    pub(crate) fn try_send(&self, command: Command) -> Result<(), Deaf> {
        self.commands.try_send(command).map_err(|_| Deaf).inspect(|()| self.bell.ring())
    }

    /// Has it look at everything.
    pub(super) fn wake(&self) {
        self.bell.ring();
    }
}

/// Whoever waits for a marker to be durable.
type MarkReply = SyncSender<Result<(), Problem>>;

/// Makes the way to the server that the state directory names now.
pub(super) type FindServer = Box<dyn Fn() -> Result<Uplink, Problem> + Send>;

/// A marker that is not durable yet.
struct PendingMark {
    position: RingPosition,
    generation: Generation,
    until: Monotonic,
    reply: MarkReply,
}

/// See the module's documentation.
pub(super) struct Drive {
    engine: Engine<Box<dyn Capture>>,
    uplink: Uplink,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    pending: Vec<PendingMark>,
    bell: Arc<Bell>,
    idle: Duration,
    /// Longest wait while the capture rings; none if it does not.
    sleep_max: Option<Duration>,
    /// Something moved since the status was brought up to date.
    unpublished: bool,
    /// The session was accepted, and that was noted.
    welcomed: bool,
    /// The link was ended to announce other disks, and the next one is not accepted yet.
    renewing: bool,
    /// What this machine is made of, and whether this session's server was told.
    description: Option<String>,
    described: bool,
    finish_by: Option<Monotonic>,
    /// Whoever waits until a marker could be put into the stream.
    settling: Vec<(Monotonic, SyncSender<Result<(), Problem>>)>,
    /// A move under way: until when the old server may take, and who is told.
    moving: Option<(Monotonic, SyncSender<Result<bool, Problem>>)>,
    /// Makes the way to the server that the state directory names now.
    find_server: FindServer,
    published: Monotonic,
    state_since: Monotonic,
}

impl Drive {
    pub(super) fn new(
        mut engine: Engine<Box<dyn Capture>>,
        uplink: Uplink,
        find_server: FindServer,
        (commands, bell): (Receiver<Command>, Arc<Bell>),
        proof_every: Duration,
        shared: Arc<Shared>,
    ) -> Drive {
        let now = shared.clock.monotonic();
        let watched = engine.capture().bell().map(|source| bell.watch(source));
        let rings = match watched {
            Some(Err(error)) => {
                tracing::warn!(%error, "the send buffer is looked at again and again: it cannot ring");
                false
            }
            Some(Ok(())) => true,
            None => false,
        };
        Drive {
            engine,
            uplink,
            commands,
            shared,
            pending: Vec::new(),
            bell,
            idle: IDLE_MIN,
            sleep_max: rings.then(|| (proof_every / 4).clamp(IDLE_MAX, SLEEP_MAX)),
            unpublished: true,
            welcomed: false,
            renewing: false,
            description: None,
            described: false,
            finish_by: None,
            settling: Vec::new(),
            moving: None,
            find_server,
            published: now,
            state_since: now,
        }
    }

    /// Runs until told to finish, or aborted. A fault of the program ends replication and leaves the disks served.
    pub(super) fn run(mut self) {
        let shared = self.shared.clone();
        let machine = shared.status().machine.clone();
        let span = tracing::info_span!("agent", machine);
        let _entered = span.enter();
        if catch_unwind(AssertUnwindSafe(|| self.work())).is_err() {
            tracing::error!("replication ended by a fault of the program; disks are served on, restart the agent soon");
            let mut status = shared.status();
            status.state = ProtectionState::Failed;
            status.reason = "replication ended by a fault of the program; restart the agent".to_owned();
            status.link.connected = false;
        }
    }

    fn work(&mut self) {
        while !self.shared.is_aborted() {
            self.take_commands();
            if self.uplink.advance() {
                self.described = false;
                self.engine.link_up();
            }
            let step = self.engine.step(self.uplink.wire().map(|wire| wire as &mut dyn Wire));
            if self.uplink.is_welcomed() && !self.welcomed {
                self.welcomed = true;
                self.renewing = false;
                self.uplink.welcomed();
            }
            self.unpublished |= step != Step::Idle;
            match step {
                Step::Busy => self.idle = IDLE_MIN,
                Step::Idle => self.rest(),
                Step::Reconnect(reason) => {
                    self.engine.link_down();
                    self.uplink.ended(reason);
                    (self.welcomed, self.renewing) = (false, false);
                }
                Step::Refused(reason) => {
                    self.engine.link_down();
                    self.uplink.turned_away(reason);
                    self.welcomed = false;
                }
            }
            if !self.pending.is_empty() {
                self.confirm_marks();
            }
            if !self.settling.is_empty() {
                self.settle();
            }
            if self.engine.forget_left() {
                self.renew_link();
            }
            if self.welcomed && !self.described {
                self.describe();
            }
            let now = self.shared.clock.monotonic();
            self.move_on(now);
            if now.since(self.published) >= PUBLISH_EVERY {
                self.publish(now);
            }
            if self.finish_by.is_some_and(|by| self.is_finished(now, by)) {
                return self.say_goodbye();
            }
        }
    }

    fn rest(&mut self) {
        let congested = self.uplink.wire().is_some_and(|wire| wire.is_congested());
        let limit = if congested {
            self.idle.min(CONGESTED_MAX)
        } else if self.idle >= IDLE_MAX && self.may_sleep() && self.engine.capture().doze() {
            self.sleep()
        } else {
            self.idle
        };
        let rung = self.bell.wait(limit);
        self.unpublished |= rung;
        self.idle = if rung { IDLE_MIN } else { (self.idle * 2).min(IDLE_MAX) };
    }

    /// Whether nothing is under way that only a look shows.
    fn may_sleep(&mut self) -> bool {
        let awaited = self.finish_by.is_some() || self.moving.is_some();
        let asked = !self.pending.is_empty() || !self.settling.is_empty();
        let sender = self.engine.sender();
        let at_rest = self.welcomed && sender.is_whole() && !sender.is_healing() && !sender.is_scrubbing();
        self.sleep_max.is_some() && !awaited && !asked && (at_rest || self.uplink.wire().is_none())
    }

    /// How long to sleep. Before it, whoever asks for the status is told the newest.
    fn sleep(&mut self) -> Duration {
        if self.unpublished {
            self.publish(self.shared.clock.monotonic());
        }
        self.sleep_max.unwrap_or(IDLE_MAX).min(self.uplink.patience())
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
    }

    fn take(&mut self, command: Command) {
        let after = |within| self.shared.clock.monotonic().plus(within);
        match command {
            Command::Finish { within } => self.finish_by = Some(after(within)),
            Command::Move { within, reply } => {
                self.moving = Some((after(within), reply));
                self.engine.hold(true);
            }
            Command::Mark { kind, name, at_rest, reply, durable } => {
                let done = self.mark(kind, &name, at_rest.as_ref());
                if let (Ok(()), Some(durable)) = (&done, durable) {
                    self.await_durable(durable);
                }
                let taken = done.is_ok();
                // Whoever asked may have gone.
                let _ = reply.send(done.map(|()| self.welcomed));
                // Only then: the log may lie on a file system that waits for the answer.
                if taken {
                    tracing::info!(name, connected = self.welcomed, "a marker is in the stream");
                }
            }
            Command::Describe { document } => (self.description, self.described) = (Some(document), false),
            Command::Settle { until, reply } => self.settling.push((until, reply)),
            Command::Ready { name, reply } => drop(reply.send(self.check_whole(&name))),
            Command::Scrub { disk, reply } => drop(reply.send(self.engine.begin_scrub(disk))),
            Command::Disks { steps, reply } => drop(reply.send(self.change_disks(steps))),
            Command::Rest { until, reply } => {
                let _ = reply.send(());
                self.rest_until(until);
            }
            Command::Identity(identity) => self.uplink.set_identity(*identity),
            Command::Wake => {}
        }
    }

    fn change_disks(&mut self, steps: Vec<DiskStep>) -> Result<(), String> {
        let mut added = Vec::new();
        let mut outcome = Ok(());
        for step in steps {
            let done = match step {
                DiskStep::Add(new, cause) => {
                    let disk = new.geometry.disk;
                    self.engine.add_disk(new, &cause).map(|()| added.push(disk))
                }
                DiskStep::Grow(geometry, cause) => self.engine.grow_disk(geometry, &cause),
                DiskStep::Remove(disk, cause) => {
                    self.engine.remove_disk(disk, &cause);
                    Ok(())
                }
            };
            if done.is_err() {
                added.iter().for_each(|disk| {
                    self.engine.remove_disk(*disk, "it was added together with one that could not be")
                });
                outcome = done;
                break;
            }
        }
        if outcome.is_ok() || !added.is_empty() {
            self.renew_link();
            // Whoever asked may look at the status next.
            self.publish(self.shared.clock.monotonic());
        }
        outcome
    }

    /// Disks are announced at the beginning of a session.
    fn renew_link(&mut self) {
        if self.uplink.renew() {
            self.engine.link_down();
            (self.welcomed, self.renewing) = (false, true);
        }
    }

    fn rest_until(&mut self, until: Monotonic) {
        while !self.shared.is_aborted() && self.shared.clock.monotonic() < until {
            let left = until.since(self.shared.clock.monotonic()).min(IDLE_MAX);
            match self.commands.recv_timeout(left) {
                Ok(Command::Wake) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Leaves the old server once it has committed everything, or has had its time.
    fn move_on(&mut self, now: Monotonic) {
        let Some((until, _)) = &self.moving else { return };
        let drained = self.engine.sender().is_drained();
        if !drained && self.welcomed && now < *until {
            return;
        }
        let Some((_, reply)) = self.moving.take() else { return };
        let answer = (self.find_server)().map(|uplink| {
            if let Some(wire) = self.uplink.take_wire()
                && self.welcomed
                && let Err(error) = wire.farewell("the machine moves to another server", FAREWELL_LIMIT)
            {
                tracing::debug!(%error, "the good-bye may not have arrived");
            }
            self.engine.link_down();
            self.uplink = uplink;
            self.welcomed = false;
            tracing::info!(server = self.uplink.server(), drained, "moving to another server");
            drained
        });
        self.engine.hold(false);
        let _ = reply.send(answer);
    }

    /// A link that has just ended is noticed by the engine's next step.
    fn describe(&mut self) {
        if let (Some(document), Some(wire)) = (&self.description, self.uplink.wire()) {
            let message = Message::Describe { document: document.clone() };
            self.described = matches!(wire.try_send(message), Ok(None));
        }
    }

    /// Answers who waits for a moment to mark.
    fn settle(&mut self) {
        let ready = self.check_whole("");
        let now = self.shared.clock.monotonic();
        self.settling.retain(|(until, reply)| {
            if ready.is_err() && now < *until {
                return true;
            }
            let _ = reply.send(ready.clone());
            false
        });
    }

    /// Whether a marker could be put into the stream. The receiver keeps no point inside a gap, unless it ends it: it would
    /// vanish.
    fn check_whole(&mut self, name: &str) -> Result<(), Problem> {
        let taken = self.engine.capture().takes_markers();
        if taken == Some(true) {
            return Ok(());
        }
        let status = self.engine.status();
        let why = match gap_in_words(&status.stream) {
            "" if !status.whole => "a heal is under way",
            "" if taken.is_some() => "the disks are scanned, and were written to since the last scan",
            why => why,
        };
        if why.is_empty() {
            return Ok(());
        }
        let advice = "wait until `farshore-agent status` says protected, then mark again";
        Err(Problem::failed(format!("the moment `{name}` was not marked"), why, advice))
    }

    fn mark(&mut self, kind: MarkerKind, name: &str, at_rest: Option<&Claim>) -> Result<(), Problem> {
        self.check_whole(name)?;
        let unmarked = |why, advice| Problem::failed(format!("the moment `{name}` was not marked"), why, advice);
        let capture = self.engine.capture();
        let taken = match at_rest {
            None => capture.mark(kind, name),
            Some(Claim::Gate(frozen)) => frozen.mark(kind, name),
            Some(Claim::FileSystems(at_rest)) => match at_rest.claim(|| capture.mark(kind, name)) {
                Some((taken, true)) => taken,
                Some((taken, false)) => {
                    tracing::error!(name, taken, "writers went on while a marker was written: it claims too much");
                    return Err(unmarked("the file systems were thawed meanwhile", "take another point"));
                }
                None => return Err(unmarked("the file systems are not at rest any more", "allow a longer freeze")),
            },
        };
        if !taken {
            let why = "the send buffer has no room or the stream has just broken";
            return Err(unmarked(why, "mark again when writes have calmed down"));
        }
        Ok(())
    }

    /// Tells `reply` when everything that is in the stream now is durable.
    fn await_durable(&mut self, reply: MarkReply) {
        let generation = self.engine.status().captured.generation();
        let position = self.engine.capture().status().producer;
        let until = self.shared.clock.monotonic().plus(DURABLE_WAIT_MAX);
        self.pending.push(PendingMark { position, generation, until, reply });
    }

    /// Answers for markers that are durable, or will not be.
    fn confirm_marks(&mut self) {
        let status = self.engine.status();
        let ring = self.engine.capture().status();
        let released = RingPosition(ring.producer.0 - ring.ring_bytes_used);
        let ends_gap = self.engine.capture().ends_gap_with_marker();
        let whole = ends_gap || matches!(status.stream, StreamState::Whole);
        let now = self.shared.clock.monotonic();
        self.pending.retain(|mark| {
            let answer = if !whole || mark.generation != status.captured.generation() {
                Err(Problem::failed(
                    "the mark is not known to be durable",
                    "the stream broke before the process server had it",
                    "mark again when the machine is protected",
                ))
            } else if released >= mark.position {
                Ok(())
            } else if now >= mark.until {
                Err(Problem::failed(
                    "the mark is not durable yet",
                    "the process server has not taken it in time",
                    "it stays in the stream; look at `farshore-agent status`",
                ))
            } else {
                return true;
            };
            let _ = mark.reply.send(answer);
            false
        });
    }

    fn is_finished(&self, now: Monotonic, by: Monotonic) -> bool {
        // In a gap there is no point to complete: the maps carry everything over.
        now >= by || !self.welcomed || !self.engine.sender().is_whole() || self.engine.is_quiet()
    }

    fn say_goodbye(&mut self) {
        let settled = self.engine.is_quiet();
        self.engine.remember_scrub();
        *lock(&self.shared.kept) = self.engine.keep();
        if let Some(wire) = self.uplink.take_wire()
            && self.welcomed
            && let Err(error) = wire.farewell("the agent was stopped", FAREWELL_LIMIT)
        {
            tracing::debug!(%error, "the good-bye may not have arrived");
        }
        tracing::info!(settled, "replication ended");
    }

    fn publish(&mut self, now: Monotonic) {
        (self.published, self.unpublished) = (now, false);
        let engine = self.engine.status();
        let gap = gap_in_words(&engine.stream);
        let lacking;
        let (state, reason) = if self.finish_by.is_some() {
            (ProtectionState::Stopping, "")
        } else if let Some(refusal) = self.uplink.refusal() {
            (ProtectionState::Refused, refusal)
        } else if !self.welcomed && self.renewing {
            (ProtectionState::Healing, "the disks have changed")
        } else if !self.welcomed {
            let waiting =
                if self.uplink.was_attempted() { ProtectionState::Disconnected } else { ProtectionState::Starting };
            (waiting, self.uplink.last_error())
        } else if gap.is_empty() && !engine.healing {
            let missing = self
                .shared
                .status()
                .disks
                .iter()
                .find(|disk| !disk.problem.is_empty())
                .map(|disk| format!("disk `{}`: {}; everything else is protected", disk.name, disk.problem));
            lacking = missing.unwrap_or_default();
            (ProtectionState::Protected, &*lacking)
        } else if engine.whole && !engine.lacking.is_empty() {
            lacking = format!("everything but {} is protected; that is healed on its own", engine.lacking);
            (ProtectionState::Healing, &*lacking)
        } else {
            (ProtectionState::Healing, gap)
        };
        let mut status = self.shared.status();
        if status.state != state {
            if status.scan.is_some() || self.shared.source.scan().is_some() {
                tracing::debug!(?state, reason, "the scanned disks' state changed");
            } else {
                report_change(status.state, state, reason, self.uplink.server());
            }
            self.state_since = now;
        }
        status.state = state;
        reason.clone_into(&mut status.reason);
        status.state_for_s = now.since(self.state_since).as_secs();
        status.take_engine(&engine);
        status.scrub = self.engine.scrub_progress();
        status.link = LinkStatus {
            connected: self.welcomed,
            server: self.uplink.server().to_owned(),
            last_error: self.uplink.last_error().to_owned(),
            sessions: self.uplink.sessions(),
        };
    }
}

fn report_change(before: ProtectionState, state: ProtectionState, reason: &str, server: &str) {
    match state {
        ProtectionState::Protected => tracing::info!(server, "protected: every write is in the stream"),
        ProtectionState::Healing if before == ProtectionState::Protected => {
            tracing::warn!(reason, "a gap begins: points are incomplete until the heal has ended");
        }
        ProtectionState::Healing => tracing::info!(server, reason, "the disks are compared and healed"),
        ProtectionState::Disconnected => {
            tracing::warn!(server, reason, "no process server; writes are kept and remembered");
        }
        // Reported where it is noticed.
        ProtectionState::Refused | ProtectionState::Failed | ProtectionState::Starting => {}
        ProtectionState::Stopping => tracing::info!("stopping"),
    }
}
