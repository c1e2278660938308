//! The engine's thread: steps the engine, keeps the link, answers commands, publishes the status.
//!
//! It never blocks on the network for longer than an idle wait, so the ring is looked at whatever the server does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::thread;
use std::time::Duration;

use replication::sender::StreamState;
use replication::{Generation, MarkerKind};
use world::Monotonic;

use super::problem::Problem;
use super::uplink::Uplink;
use super::{Shared, lock};
use crate::capture::{Capture, RingPosition};
use crate::engine::{Engine, Step, Wire};
use crate::status::{LinkStatus, ProtectionState, gap_in_words};

/// Shortest and longest idle wait. A lone write waits this long at most before it is looked at.
const IDLE_MIN: Duration = Duration::from_micros(200);
const IDLE_MAX: Duration = Duration::from_millis(10);
/// Longest wait while the connection has no room: about the time in which it sends what it holds.
const CONGESTED_MAX: Duration = Duration::from_millis(1);
/// How often the status is brought up to date.
const PUBLISH_EVERY: Duration = Duration::from_millis(100);
/// Time for the last good-bye.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// What other threads ask of the engine's thread.
pub(crate) enum Command {
    /// Put a marker into the stream; answer when it is there or, if `durable_within` is not zero, when the process
    /// server has it durably.
    Mark { kind: MarkerKind, name: String, durable_within: Duration, reply: SyncSender<Result<(), Problem>> },
    /// Have everything committed that was sent, then go on at the server that the state directory names; the answer says
    /// whether nothing was left to be committed.
    Move { within: Duration, reply: SyncSender<Result<bool, Problem>> },
    /// Send what is left, say good-bye, end.
    Finish { within: Duration },
}

/// Makes the way to the server that the state directory names now.
pub(super) type FindServer = Box<dyn Fn() -> Result<Uplink, Problem> + Send>;

/// A marker that is not durable yet.
struct PendingMark {
    position: RingPosition,
    generation: Generation,
    until: Monotonic,
    reply: SyncSender<Result<(), Problem>>,
}

/// See the module's documentation.
pub(super) struct Drive {
    engine: Engine<Box<dyn Capture>>,
    uplink: Uplink,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    pending: Vec<PendingMark>,
    idle: Duration,
    /// The session was accepted, and that was noted.
    welcomed: bool,
    finish_by: Option<Monotonic>,
    /// A move under way: until when the old server may take, and who is told.
    moving: Option<(Monotonic, SyncSender<Result<bool, Problem>>)>,
    /// Makes the way to the server that the state directory names now.
    find_server: FindServer,
    published: Monotonic,
    state_since: Monotonic,
}

impl Drive {
    pub(super) fn new(
        engine: Engine<Box<dyn Capture>>,
        uplink: Uplink,
        find_server: FindServer,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Drive {
        let now = shared.clock.monotonic();
        Drive {
            engine,
            uplink,
            commands,
            shared,
            pending: Vec::new(),
            idle: IDLE_MIN,
            welcomed: false,
            finish_by: None,
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
                self.engine.link_up();
            }
            let step = self.engine.step(self.uplink.wire().map(|wire| wire as &mut dyn Wire));
            if self.uplink.is_welcomed() && !self.welcomed {
                self.welcomed = true;
                self.uplink.welcomed();
            }
            match step {
                Step::Busy => self.idle = IDLE_MIN,
                Step::Idle => self.rest(),
                Step::Reconnect(reason) => {
                    self.engine.link_down();
                    self.uplink.ended(reason);
                    self.welcomed = false;
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
        match self.uplink.wire() {
            Some(wire) if wire.is_congested() => wire.wait(self.idle.min(CONGESTED_MAX)),
            Some(wire) => wire.wait(self.idle),
            None => thread::sleep(self.idle),
        }
        self.idle = (self.idle * 2).min(IDLE_MAX);
    }

    fn take_commands(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Finish { within } => self.finish_by = Some(self.shared.clock.monotonic().plus(within)),
                Command::Move { within, reply } => {
                    self.engine.hold(true);
                    self.moving = Some((self.shared.clock.monotonic().plus(within), reply));
                }
                Command::Mark { kind, name, durable_within, reply } => self.mark(kind, &name, durable_within, reply),
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

    fn mark(&mut self, kind: MarkerKind, name: &str, durable_within: Duration, reply: SyncSender<Result<(), Problem>>) {
        if !self.welcomed && durable_within.is_zero() {
            tracing::debug!(name, "a marker waits in the ring for a session");
        }
        let status = self.engine.status();
        // The receiver keeps no point inside a gap: the marker would vanish.
        let why = match gap_in_words(&status.stream) {
            "" if !status.whole => "a heal is under way",
            why => why,
        };
        if !why.is_empty() {
            let advice = "wait until `farshore-agent status` says protected, then mark again";
            let _ = reply.send(Err(Problem::failed(format!("the moment `{name}` was not marked"), why, advice)));
            return;
        }
        if !self.engine.capture().mark(kind, name) {
            let problem = Problem::failed(
                format!("the moment `{name}` was not marked"),
                "the send buffer has no room or the stream has just broken",
                "mark again when writes have calmed down",
            );
            let _ = reply.send(Err(problem));
            return;
        }
        tracing::info!(name, "marked");
        if durable_within.is_zero() {
            let _ = reply.send(Ok(()));
            return;
        }
        let position = self.engine.capture().status().producer;
        let until = self.shared.clock.monotonic().plus(durable_within);
        self.pending.push(PendingMark { position, generation: status.captured.generation(), until, reply });
    }

    /// Answers for markers that are durable, or will not be.
    fn confirm_marks(&mut self) {
        let status = self.engine.status();
        let ring = self.engine.capture().status();
        let released = RingPosition(ring.producer.0 - ring.ring_bytes_used);
        let whole = matches!(status.stream, StreamState::Whole);
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
        self.published = now;
        let engine = self.engine.status();
        let gap = gap_in_words(&engine.stream);
        let lacking;
        let (state, reason) = if self.finish_by.is_some() {
            (ProtectionState::Stopping, "")
        } else if let Some(refusal) = self.uplink.refusal() {
            (ProtectionState::Refused, refusal)
        } else if !self.welcomed {
            let waiting =
                if self.uplink.was_attempted() { ProtectionState::Disconnected } else { ProtectionState::Starting };
            (waiting, self.uplink.last_error())
        } else if gap.is_empty() && !engine.healing {
            (ProtectionState::Protected, "")
        } else if engine.whole && !engine.lacking.is_empty() {
            lacking = format!("everything but {} is protected; that is healed on its own", engine.lacking);
            (ProtectionState::Healing, &*lacking)
        } else {
            (ProtectionState::Healing, gap)
        };
        let mut status = self.shared.status();
        if status.state != state {
            report_change(status.state, state, reason, self.uplink.server());
            self.state_since = now;
        }
        status.state = state;
        reason.clone_into(&mut status.reason);
        status.state_for_s = now.since(self.state_since).as_secs();
        status.take_engine(&engine);
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
