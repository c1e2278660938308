//! Commands to the running agent, through its control socket.

use std::fmt::Write;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use agent::config::AgentConfig;
use agent::consistency::left_over;
use agent::scrub::ScrubProgress;
use agent::service::control::{Answer, FREEZE_MS_MAX, MARK_WAIT_MS_MAX, Request, ask};
use agent::service::problem::Problem;
use agent::state::StateDir;
use agent::status::AgentStatus;
use world::{SystemClock, WallTime};

use crate::Target;
use crate::metrics::text;
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

pub(crate) fn metrics(target: &Target) -> Result<(), Problem> {
    let answer = ask(&target.config()?.control_socket(), &Request::Status);
    let status = match &answer {
        Ok(Answer::Status(status)) => Some(&**status),
        _ => None,
    };
    // Whoever reads may stop reading early. That nobody answers is a metric, too.
    let _ = std::io::stdout().write_all(text(status).as_bytes());
    Ok(())
}

pub(crate) fn mark(target: &Target, name: &str, wait_s: u64, output: &Output) -> Result<(), Problem> {
    let wait_ms = wait_s.saturating_mul(1000).min(MARK_WAIT_MS_MAX);
    let answer = ask(&target.config()?.control_socket(), &Request::Mark { name: name.to_owned(), wait_ms })?;
    let said = match &answer {
        Answer::Marked { name, durable: true, .. } => format!("marked `{name}`; the process server has it durably"),
        Answer::Marked { name, connected: true, .. } => {
            format!(
                "noted `{name}`; it becomes a point when the process server has it (--wait-s SECONDS waits for that)"
            )
        }
        Answer::Marked { name, .. } => format!(
            "noted `{name}`; no process server is connected: it becomes a point when one has it, unless the send buffer \
             overflows or the agent ends before"
        ),
        other => return Err(unexpected(other)),
    };
    output.data(&answer, said);
    Ok(())
}

pub(crate) fn point(target: &Target, name: &str, wait_s: u64, output: &Output) -> Result<(), Problem> {
    let wait_ms = wait_s.saturating_mul(1000).min(MARK_WAIT_MS_MAX);
    let answer = ask(&target.config()?.control_socket(), &Request::Point { name: name.to_owned(), wait_ms })?;
    let Answer::PointTaken { name, failed, remarks, durable, connected } = &answer else {
        return Err(unexpected(&answer));
    };
    let kind = if failed.is_some() { "crash-consistent only" } else { "application-consistent" };
    let place = match (durable, connected) {
        (true, _) => "the process server has it durably",
        (_, true) => "it becomes a point when the process server has it (--wait-s SECONDS waits for that)",
        _ => {
            "no process server is connected: it becomes a point when one has it, unless the send buffer overflows before"
        }
    };
    let text = remarks.iter().fold(format!("`{name}` is {kind}; {place}"), |text, remark| text + "\nnote: " + remark);
    output.data(&answer, text);
    match failed {
        None => Ok(()),
        Some(failed) => Err(Problem::failed(
            format!("`{name}` is not application-consistent"),
            failed,
            "mend that and take another point; this one can be recovered like any crash-consistent one",
        )),
    }
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
    let config = target.config()?;
    // Before anything else: with the state directory on a frozen file system nobody answers.
    let done = left_over::clear_up(&config.state_dir, Some(&config.consistency), &SystemClock);
    if !done.is_empty() {
        output.data(&serde_json::json!({ "answer": "thawed", "left_over": done }), done.join("\n"));
        return Ok(());
    }
    let answer = ask(&config.control_socket(), &Request::Thaw)?;
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

pub(crate) fn reload(config: &Path, output: &Output) -> Result<(), Problem> {
    let read = AgentConfig::load(config)?;
    let cannot =
        |error: std::io::Error| Problem::caused("the configuration cannot be named", &error, "name it by its path");
    let request = Request::Reload { config: std::path::absolute(config).map_err(cannot)? };
    let answer = ask(&read.control_socket(), &request)?;
    let Answer::Reloaded { changes, restart } = &answer else { return Err(unexpected(&answer)) };
    let mut lines = changes.clone();
    if lines.is_empty() {
        lines.push("the disks are those that it has".to_owned());
    }
    if *restart {
        lines.push("note: other settings than disks have changed; the next start takes them".to_owned());
    }
    output.data(&answer, lines.join("\n"));
    Ok(())
}

pub(crate) fn scrub(target: &Target, disk: Option<String>, output: &Output) -> Result<(), Problem> {
    let answer = ask(&target.config()?.control_socket(), &Request::Scrub { disk })?;
    let Answer::Scrubbing { bytes: planned } = &answer else { return Err(unexpected(&answer)) };
    output
        .data(&answer, format!("a scrub of {} has begun; `farshore-agent status` tells how it goes", bytes(*planned)));
    Ok(())
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

fn describe_scrub(scrub: &ScrubProgress, line: &mut impl FnMut(&str, String)) {
    let at = |time| if time == 0 { "never".to_owned() } else { WallTime(time).to_string() };
    let round = match scrub.running {
        true => format!("{} of {} done", bytes(scrub.round_done_bytes), bytes(scrub.round_bytes)),
        false => format!("the last one ended: {}", at(scrub.ended_ns)),
    };
    line("scrub", format!("{round}; all of it was last known to be equal: {}", at(scrub.oldest_ns)));
    if scrub.differing_bytes > 0 {
        line("DIFFERED", format!("{}, as scrubs since the start have found; healed", bytes(scrub.differing_bytes)));
    }
    let unknown = scrub.busy_bytes + scrub.untold_bytes + scrub.unreadable_bytes;
    if unknown > 0 {
        line(
            "not told",
            format!(
                "{} were written to each time, of {} the vault knows no hash, {} cannot be read",
                bytes(scrub.busy_bytes),
                bytes(scrub.untold_bytes),
                bytes(scrub.unreadable_bytes)
            ),
        );
    }
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
    let certificate = &status.certificate;
    if !certificate.problem.is_empty() {
        line("certificate", certificate.problem.clone());
    } else if !certificate.ends.is_empty() {
        line("certificate", format!("good until {}, renewed before", certificate.ends));
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
    if let Some(scan) = &status.scan {
        line(
            "scan",
            format!(
                "points exist only where a scan ends with the disks at rest; {} passes, {} of them disturbed by writes, {} \
                 points, {} found changed",
                scan.passes,
                scan.disturbed,
                scan.points,
                bytes(scan.changed_bytes)
            ),
        );
        let latest = match scan.last_point_ns {
            0 => "none yet: the disks have not rested while they were read".to_owned(),
            time => WallTime(time).to_string(),
        };
        line("latest", latest);
        if !scan.blind.is_empty() {
            line("blind", scan.blind.clone());
        }
    }
    if let Some(scrub) = &status.scrub {
        describe_scrub(scrub, &mut line);
    }
    let points = &status.consistency;
    if points.application_points + points.failures > 0 {
        line(
            "points",
            format!(
                "{} application-consistent, the latest {} after {} ms at rest; {} failed",
                points.application_points,
                WallTime(points.last_application_ns),
                points.last_rest_ms,
                points.failures
            ),
        );
        if !points.last_failure.is_empty() {
            line("failed", points.last_failure.clone());
        }
    }
    for disk in &status.disks {
        line("disk", format!("{} {}, {}, export {}", disk.name, disk.path, bytes(disk.size_bytes), disk.export));
        if !disk.problem.is_empty() {
            line("NOT all", format!("of {}: {}", disk.name, disk.problem));
        }
    }
    line("nbd", format!("{}, {} clients", status.nbd.socket, status.nbd.connections));
    line("agent", format!("pid {}, up {}, version {}", status.pid, seconds(status.uptime_s), status.version));
    text
}
