//! Commands to the running agent, through its control socket.

use std::fmt::Write;
use std::time::Duration;

use agent::service::control::{Answer, FREEZE_MS_MAX, MARK_WAIT_MS_MAX, Request, ask};
use agent::service::problem::Problem;
use agent::state::StateDir;
use agent::status::AgentStatus;

use crate::Target;
use crate::output::{Output, bytes, seconds};

/// How long `stop` waits for the agent to end, and how often it looks.
const STOP_LIMIT: Duration = Duration::from_secs(60);
const STOP_POLL: Duration = Duration::from_millis(50);

pub(crate) fn status(target: &Target, output: &Output) -> Result<(), Problem> {
    match ask(&target.config()?.control_socket(), &Request::Status)? {
        Answer::Status(status) => {
            output.data(&status, describe(&status));
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

pub(crate) fn mark(target: &Target, name: &str, wait_s: u64, output: &Output) -> Result<(), Problem> {
    let wait_ms = wait_s.saturating_mul(1000).min(MARK_WAIT_MS_MAX);
    let answer = ask(&target.config()?.control_socket(), &Request::Mark { name: name.to_owned(), wait_ms })?;
    match &answer {
        Answer::Marked { name, durable: true } => {
            output.data(&answer, format!("marked `{name}`; the process server has it durably"));
        }
        Answer::Marked { name, durable: false } => output.data(&answer, format!("marked `{name}`")),
        other => return Err(unexpected(other)),
    }
    Ok(())
}

pub(crate) fn freeze(target: &Target, limit_ms: u64, mark: Option<String>, output: &Output) -> Result<(), Problem> {
    let limit_ms = limit_ms.min(FREEZE_MS_MAX + 1);
    let wanted = mark.clone();
    let socket = target.config()?.control_socket();
    let answer = ask(&socket, &Request::Freeze { limit_ms, mark })?;
    match (&answer, wanted) {
        (Answer::Frozen { marked: false, .. }, Some(name)) => {
            // A moment that is not marked is not worth the standstill.
            ask(&socket, &Request::Thaw)?;
            Err(Problem::failed(
                format!("the moment `{name}` was not marked; the disks are thawed"),
                "the stream is not whole, or the send buffer is full",
                "wait until `farshore-agent status` says protected",
            ))
        }
        (Answer::Frozen { limit_ms, .. }, _) => {
            output.data(&answer, format!("frozen; writes go on after `thaw`, or in {limit_ms} ms"));
            Ok(())
        }
        (other, _) => Err(unexpected(other)),
    }
}

pub(crate) fn thaw(target: &Target, output: &Output) -> Result<(), Problem> {
    let answer = ask(&target.config()?.control_socket(), &Request::Thaw)?;
    match answer {
        Answer::Thawed { held: true } => {
            output.data(&answer, "thawed");
            Ok(())
        }
        Answer::Thawed { held: false } => Err(Problem::failed(
            "the freeze did not hold",
            "its limit was reached before `thaw`",
            "give it more time; the marker stands for the moment it was taken",
        )),
        other => Err(unexpected(&other)),
    }
}

pub(crate) fn stop(target: &Target, output: &Output) -> Result<(), Problem> {
    let config = target.config()?;
    let answer = ask(&config.control_socket(), &Request::Stop)?;
    let state = StateDir::open(&config.state_dir)?;
    // The lock is free when the process has let go of everything.
    for _ in 0..STOP_LIMIT.as_millis() / STOP_POLL.as_millis() {
        if state.lock().is_ok() {
            output.data(&answer, "stopped");
            return Ok(());
        }
        std::thread::sleep(STOP_POLL);
    }
    Err(Problem::failed(
        "the agent has not ended yet",
        format!("it was asked to {} s ago", STOP_LIMIT.as_secs()),
        "a disk that does not answer keeps it; look at its log",
    ))
}

fn unexpected(answer: &Answer) -> Problem {
    Problem::failed("the agent's answer is not understood", format!("{answer:?}"), "use programs of the same version")
}

fn describe(status: &AgentStatus) -> String {
    let mut text = format!("{} is {}, for {}", status.machine_name, status.state, seconds(status.state_for_s));
    let mut line = |name: &str, value: String| {
        // Writing to a String never fails.
        let _ = write!(text, "\n  {name:<10} {value}");
    };
    if !status.reason.is_empty() {
        line("because", status.reason.clone());
    }
    let link = &status.link;
    let session = if link.connected { "connected to" } else { "trying" };
    line("server", format!("{session} {}, {} sessions", link.server, link.sessions));
    if !link.connected && !link.last_error.is_empty() {
        line("last error", link.last_error.clone());
    }
    let marks = &status.watermarks;
    line(
        "watermarks",
        format!(
            "captured {}, sent {}, journaled {}, committed {}",
            marks.captured, marks.sent, marks.journaled, marks.committed
        ),
    );
    line("ring", format!("{} of {}", bytes(status.ring.used_bytes), bytes(status.ring.max_bytes)));
    let heal = &status.heal;
    if heal.active {
        line(
            "heal",
            format!(
                "{} of {} compared, {} sent",
                bytes(heal.compared_bytes),
                bytes(heal.planned_bytes),
                bytes(heal.sent_bytes)
            ),
        );
    }
    let writes = &status.writes;
    line(
        "writes",
        format!(
            "{} requests, {}, {} only remembered, {} failed",
            writes.changes,
            bytes(writes.written_bytes),
            writes.tracked,
            writes.failed
        ),
    );
    for disk in &status.disks {
        line("disk", format!("{} {}, {}, export {}", disk.name, disk.path, bytes(disk.size_bytes), disk.export));
    }
    line("nbd", format!("{}, {} clients", status.nbd.socket, status.nbd.connections));
    line("agent", format!("pid {}, up {}, version {}", status.pid, seconds(status.uptime_s), status.version));
    text
}
