//! Markers and rest, as other threads ask the engine's thread for them; points on schedule.

use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use replication::MarkerKind;
use replication::limits::NAME_BYTES_MAX;
use world::Monotonic;

use super::control::{Answer, FREEZE_MS_MAX, MARK_WAIT_MS_MAX};
use super::drive::Command;
use super::problem::Problem;
use super::{Held, HeldFreeze, Shared, lock};
use crate::capture::Frozen;
use crate::consistency::frozen::AtRest;
use crate::consistency::schedule::{Due, Schedule};
use crate::consistency::{Taken, scheduled_name};
use crate::status::ProtectionState;

/// How long the engine's thread may take to answer.
pub(super) const ENGINE_LIMIT: Duration = Duration::from_secs(10);

/// A marker that is in the stream.
pub(crate) struct Placed {
    /// A process server is connected.
    pub(crate) connected: bool,
    name: String,
    durable: Option<Receiver<Result<(), Problem>>>,
}

impl Placed {
    /// Waits until it is durable with the process server. Whether one is connected.
    pub(crate) fn await_durable(self, wait_ms: u64) -> Result<bool, Problem> {
        let Some(durable) = self.durable else { return Ok(self.connected) };
        let late = |_| {
            Problem::failed(
                format!("the mark `{}` is not durable yet", self.name),
                "the process server has not taken it in time",
                "it stays in the stream; look at `farshore-agent status`",
            )
        };
        durable.recv_timeout(Duration::from_millis(wait_ms)).map_err(late)??;
        Ok(true)
    }
}

/// What a marker that claims rest is written under: it is written while that holds, or not at all.
pub(crate) enum Claim {
    /// File systems are frozen.
    FileSystems(AtRest),
    /// Writes wait at the agent's gate.
    Gate(Arc<Frozen>),
}

/// Whether anybody will wait until the mark is durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    No,
    Yes,
}

impl Waits {
    fn until(wait_ms: u64) -> Waits {
        if wait_ms == 0 { Waits::No } else { Waits::Yes }
    }
}

fn order<T>(shared: &Shared, name: &str, command: impl FnOnce(SyncSender<T>) -> Command) -> Result<T, Problem> {
    let (reply, answer) = mpsc::sync_channel(1);
    let deaf = |why: &str| Problem::failed(format!("the moment `{name}` was not marked"), why, "restart the agent");
    shared.commands.try_send(command(reply)).map_err(|_| deaf("the replication thread does not take commands"))?;
    answer.recv_timeout(ENGINE_LIMIT).map_err(|_| deaf("the replication thread does not answer"))
}

/// Puts a marker into the stream, under `at_rest` if it claims that.
pub(crate) fn mark(
    shared: &Shared,
    kind: MarkerKind,
    name: &str,
    at_rest: Option<Claim>,
    waits: Waits,
) -> Result<Placed, Problem> {
    let (told, durable) = match waits {
        Waits::Yes => Some(mpsc::sync_channel(1)).unzip(),
        Waits::No => (None, None),
    };
    let command = |reply| Command::Mark { kind, name: name.to_owned(), at_rest, reply, durable: told };
    let connected = order(shared, name, command)??;
    Ok(Placed { connected, name: name.to_owned(), durable })
}

/// Whether the stream would take the mark `name`.
pub(crate) fn check_whole(shared: &Shared, name: &str) -> Result<(), Problem> {
    order(shared, name, |reply| Command::Ready { name: name.to_owned(), reply })?
}

/// Has scanned disks read at once, and waits until the moment could be marked.
pub(crate) fn settle(shared: &Shared, name: &str, limit: Duration) -> Result<(), Problem> {
    shared.source.hurry();
    let (reply, answer) = mpsc::sync_channel(1);
    let late = |why: &str| Problem::failed(format!("the moment `{name}` was not marked"), why, "try again");
    let until = shared.clock.monotonic().plus(limit);
    let taken = shared.commands.try_send(Command::Settle { until, reply });
    taken.map_err(|_| late("the replication thread does not take commands"))?;
    answer.recv_timeout(limit + ENGINE_LIMIT).map_err(|_| late("the replication thread does not answer"))?
}

/// The engine's thread touches nothing but markers. Dropping it lets it go on; so does its limit.
pub(crate) struct Pause<'a>(&'a Shared);

impl Pause<'_> {
    pub(crate) fn begin(shared: &Shared, until: Monotonic) -> Result<Pause<'_>, Problem> {
        order(shared, "", |reply| Command::Rest { until, reply })?;
        Ok(Pause(shared))
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        // If it does not take it now, it goes on by itself when the limit is over.
        let _ = self.0.commands.try_send(Command::Wake);
    }
}

pub(super) fn check_name(name: &str) -> Result<(), Problem> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX / 2 || name.chars().any(char::is_control) {
        return Err(Problem::usage(
            "the mark's name cannot be used",
            "it is empty, too long or holds control characters",
            format!("use 1 to {} bytes of text", NAME_BYTES_MAX / 2),
        ));
    }
    Ok(())
}

/// The answer to a request for a mark.
pub(super) fn answer_mark(shared: &Shared, name: String, wait_ms: u64) -> Result<Answer, Problem> {
    check(&name, wait_ms)?;
    let placed = mark(shared, MarkerKind::Crash, &name, None, Waits::until(wait_ms))?;
    let connected = placed.await_durable(wait_ms)?;
    Ok(Answer::Marked { name, durable: wait_ms > 0, connected })
}

/// The answer to a request for a point at rest.
pub(super) fn answer_point(shared: &Shared, name: String, wait_ms: u64) -> Result<Answer, Problem> {
    check(&name, wait_ms)?;
    let Taken { failed, remarks, placed } = shared.consistency.take(shared, &name, Waits::until(wait_ms))?;
    let connected = placed.await_durable(wait_ms)?;
    Ok(Answer::PointTaken { name, failed, remarks, durable: wait_ms > 0, connected })
}

fn check(name: &str, wait_ms: u64) -> Result<(), Problem> {
    check_name(name)?;
    if wait_ms > MARK_WAIT_MS_MAX {
        return Err(Problem::usage("the wait is too long", format!("{wait_ms} ms"), "wait for ten minutes at most"));
    }
    Ok(())
}

/// The answer to a request for rest without an end.
pub(super) fn answer_freeze(shared: &Shared, limit_ms: u64, name: Option<&str>) -> Result<Answer, Problem> {
    if !(1..=FREEZE_MS_MAX).contains(&limit_ms) {
        return Err(Problem::usage(
            "the freeze's limit cannot be used",
            format!("it is {limit_ms} ms"),
            format!("choose 1 to {FREEZE_MS_MAX} ms"),
        ));
    }
    name.map_or(Ok(()), check_name)?;
    let limit = Duration::from_millis(limit_ms);
    // A freeze at the gate ends by itself only when a write waits; one whose owner has gone must not stand in the way.
    let over = |held: &mut HeldFreeze| shared.clock.monotonic() >= held.until;
    drop(shared.frozen().take_if(over));
    let until = shared.clock.monotonic().plus(limit);
    let (held, marked) = if shared.source.used_past_the_agent() {
        let (frozen, note) = shared.consistency.freeze(shared, limit, name)?;
        (Held::FileSystems(frozen, note), name.is_some())
    } else {
        let frozen = shared.source.freeze(limit)?;
        let marked = name.is_some_and(|name| frozen.mark(MarkerKind::Application, name));
        (Held::Gate(frozen), marked)
    };
    tracing::info!(limit_ms, marked, "frozen");
    // Dropping an earlier guard changes nothing: it no longer holds, or this freeze would not have come about.
    *shared.frozen() = Some(HeldFreeze { held, until });
    Ok(Answer::Frozen { limit_ms, marked })
}

/// The thread that takes points on schedule. Dropping it waits for a point that is being taken.
pub(super) struct Points {
    told: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Points {
    /// Starts it, if anything is scheduled.
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Option<Points>, Problem> {
        let Some(mut schedule) = Schedule::new(&shared.consistency.config, shared.clock.monotonic()) else {
            return Ok(None);
        };
        let told = Arc::new((Mutex::new(false), Condvar::new()));
        let (shared, ending) = (shared.clone(), told.clone());
        let work = move || {
            loop {
                let (over, wake) = &*ending;
                let wait = schedule.wait(shared.clock.monotonic());
                let waited = wake.wait_timeout_while(lock(over), wait, |over| !*over);
                if waited.map_or_else(|poisoned| *poisoned.into_inner().0, |(over, _)| *over) {
                    return;
                }
                if let Some(due) = schedule.due(shared.clock.monotonic()) {
                    take(&shared, due);
                }
            }
        };
        let thread = thread::Builder::new().name("points".to_owned()).spawn(work);
        let thread =
            thread.map_err(|error| Problem::caused("the agent cannot start", &error, "raise the limit of threads"))?;
        Ok(Some(Points { told, thread: Some(thread) }))
    }
}

impl Drop for Points {
    fn drop(&mut self) {
        *lock(&self.told.0) = true;
        self.told.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic was logged when it happened.
            let _ = thread.join();
        }
    }
}

fn take(shared: &Shared, due: Due) {
    // Without a stream there is nothing to mark, and nobody's writers are stopped for it.
    if matches!(shared.status().state, ProtectionState::Healing | ProtectionState::Starting | ProtectionState::Failed) {
        tracing::debug!(?due, "a scheduled point is left out: the stream is not whole");
        return;
    }
    let name = scheduled_name(due, &*shared.clock);
    let done = match due {
        Due::Crash => {
            mark(shared, MarkerKind::Crash, &name, None, Waits::No).map(|_| shared.consistency.crash_marked())
        }
        Due::Application => shared.consistency.take(shared, &name, Waits::No).map(drop),
    };
    if let Err(problem) = done {
        tracing::warn!(name, %problem, "a scheduled point was not taken");
    }
}
