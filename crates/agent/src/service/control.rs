//! The control socket: one request a line, one answer a line, both JSON. Only the socket's owner may connect.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use replication::DiskId;
use serde::{Deserialize, Serialize};

use super::Shared;
use super::drive::Command;
use super::marks::{ENGINE_LIMIT, answer_freeze, answer_mark, answer_point};
use super::problem::Problem;
use crate::engine::ScrubRefusal;
use crate::status::AgentStatus;

/// Longest request in bytes.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Longest answer in bytes that a client takes.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// Connections at a time; further ones are closed at once.
const CONNECTIONS_MAX: usize = 8;
/// How long a connection may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Longest freeze in milliseconds.
pub const FREEZE_MS_MAX: u64 = 60_000;
/// Longest wait for a durable mark in milliseconds.
pub const MARK_WAIT_MS_MAX: u64 = 600_000;

/// What can be asked of a running agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What it says about itself.
    Status,
    /// Mark this moment; it becomes a crash-consistent recovery point of that name.
    Mark {
        /// The point's name.
        name: String,
        /// Milliseconds to wait until the process server has it durably; 0 does not wait.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Bring applications and file systems to rest, mark that moment as an application-consistent recovery point, let them
    /// go on. If a part fails, the point is crash-consistent and says why.
    Point {
        /// The point's name.
        name: String,
        /// Milliseconds to wait until the process server has it durably; 0 does not wait.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Bring all disks to rest. Writes wait until `thaw`, or until the limit is over.
    Freeze {
        /// Milliseconds after which writes go on in any case.
        limit_ms: u64,
        /// Mark the moment of rest as an application-consistent recovery point of that name.
        #[serde(default)]
        mark: Option<String>,
    },
    /// Let writes go on.
    Thaw,
    /// Go on at the server that the state directory names now. With an old server that still answers, what it has is
    /// committed first, so that there is no gap.
    Move {
        /// Milliseconds to wait for that; then there is a gap, healed from the maps.
        within_ms: u64,
    },
    /// Take the disks of this configuration file, which is the agent's own. Other settings are taken by the next start.
    Reload {
        /// Its absolute path.
        config: PathBuf,
    },
    /// Compare a disk, or all of them, with the vault, beginning now. What differs is healed.
    Scrub {
        /// The disk's name; all of them if none is given.
        #[serde(default)]
        disk: Option<String>,
    },
    /// End in order.
    Stop,
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// To `status`.
    Status(Box<AgentStatus>),
    /// To `mark`.
    Marked {
        /// The point's name.
        name: String,
        /// Known to be durable on the process server. Otherwise it is only noted: it becomes a point when the server has it,
        /// unless the stream breaks before.
        durable: bool,
        /// A process server is connected.
        #[serde(default)]
        connected: bool,
    },
    /// To `point`.
    PointTaken {
        /// The point's name.
        name: String,
        /// Why it is crash-consistent only; none if it is application-consistent.
        failed: Option<String>,
        /// What else a person should know.
        remarks: Vec<String>,
        /// As in `marked`.
        durable: bool,
        /// As in `marked`.
        connected: bool,
    },
    /// To `freeze`: the disks are at rest.
    Frozen {
        /// Milliseconds after which writes go on in any case.
        limit_ms: u64,
        /// The moment of rest is marked.
        marked: bool,
    },
    /// To `thaw`.
    Thawed {
        /// No write went on before: the marker holds what it promises.
        held: bool,
    },
    /// To `move`: the old server is left.
    Moved {
        /// Everything was committed before: the stream goes on without a gap.
        drained: bool,
    },
    /// To `reload`.
    Reloaded {
        /// What was done, a line each; empty if nothing had changed.
        changes: Vec<String>,
        /// Other settings have changed as well: the next start takes them.
        restart: bool,
    },
    /// To `scrub`: it has begun; `status` says how it goes.
    Scrubbing {
        /// Bytes of disk that it goes through.
        bytes: u64,
    },
    /// To `stop`.
    Stopping,
    /// It was not done.
    Problem(Problem),
}

/// Asks the agent that listens at `socket`.
///
/// # Errors
/// It is not running, or what it answered as a problem.
pub fn ask(socket: &Path, request: &Request) -> Result<Answer, Problem> {
    let what = "the agent cannot be asked";
    let absent = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Problem::failed(
            "the agent is not running",
            format!("nobody listens at {}", socket.display()),
            "start it with `farshore-agent run --config FILE`, or name its state directory",
        ),
        _ => Problem::caused(what, &error, "run as the user that the agent runs as"),
    };
    let broken = |error: io::Error| Problem::caused(what, &error, "try again; look at the agent's log");
    let mut stream = UnixStream::connect(socket).map_err(absent)?;
    let wait = match request {
        // Scripts, hooks and flushes have limits of their own, which only the agent knows.
        Request::Point { .. } => Duration::from_secs(24 * 3600),
        Request::Mark { wait_ms, .. } => Duration::from_millis(*wait_ms),
        Request::Freeze { limit_ms, .. } => Duration::from_millis(*limit_ms),
        Request::Move { within_ms } => Duration::from_millis(*within_ms),
        Request::Reload { .. } => Duration::from_secs(60),
        _ => Duration::ZERO,
    };
    stream.set_read_timeout(Some(wait + 2 * ENGINE_LIMIT)).map_err(broken)?;
    let line = serde_json::to_string(request).expect("a request is plain data") + "\n";
    stream.write_all(line.as_bytes()).map_err(broken)?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut answer).map_err(broken)?;
    match serde_json::from_str(&answer) {
        Ok(Answer::Problem(problem)) => Err(problem),
        Ok(answer) => Ok(answer),
        Err(error) => Err(Problem::caused(what, &error, "use the program that the agent was started with")),
    }
}

/// The listening socket and its threads.
pub(super) struct ControlServer {
    path: PathBuf,
    listener: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens at `path`. Whoever holds the state directory's lock may take over what a killed agent left there.
    pub(super) fn start(path: &Path, shared: Arc<Shared>) -> Result<ControlServer, Problem> {
        let cannot = |error: io::Error| {
            Problem::caused(
                format!("the control socket {} cannot be opened", path.display()),
                &error,
                "use a state directory on a local file system",
            )
        };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(cannot(error)),
            _ => {}
        }
        let listener = Arc::new(UnixListener::bind(path).map_err(cannot)?);
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(cannot)?;
        let accepting = listener.clone();
        let thread = thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&accepting, &shared))
            .map_err(cannot)?;
        Ok(ControlServer { path: path.to_owned(), listener, thread: Some(thread) })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(%error, "the control socket was removed before");
        }
        // Wakes the accepting thread, whose next call fails.
        if let Err(error) = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "the control socket was closed before");
        }
        if let Some(thread) = self.thread.take() {
            // A panic was logged when it happened.
            let _ = thread.join();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let open = Arc::new(AtomicUsize::new(0));
    // Fails for good when the socket is shut down.
    while let Ok((stream, _)) = listener.accept() {
        if open.load(Ordering::SeqCst) >= CONNECTIONS_MAX {
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (shared, done) = (shared.clone(), open.clone());
        let serve = move || {
            if let Err(error) = serve(&stream, &shared) {
                tracing::debug!(%error, "a control connection ended early");
            }
            done.fetch_sub(1, Ordering::SeqCst);
        };
        if let Err(error) = thread::Builder::new().name("control".to_owned()).spawn(serve) {
            open.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!(%error, "a control connection was not served");
        }
    }
}

fn serve(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.by_ref().take(REQUEST_BYTES_MAX).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = match serde_json::from_str(&line) {
            Ok(request) => answer(request, shared),
            Err(error) => Err(Problem::usage("the request cannot be read", error.to_string(), "see the documentation")),
        };
        let answer = answer.unwrap_or_else(Answer::Problem);
        let line = serde_json::to_string(&answer).map_err(io::Error::other)? + "\n";
        (&mut &*stream).write_all(line.as_bytes())?;
    }
}

fn answer(request: Request, shared: &Shared) -> Result<Answer, Problem> {
    match request {
        Request::Status => Ok(Answer::Status(Box::new(shared.snapshot()))),
        Request::Mark { name, wait_ms } => answer_mark(shared, name, wait_ms),
        Request::Point { name, wait_ms } => answer_point(shared, name, wait_ms),
        Request::Freeze { limit_ms, mark } => answer_freeze(shared, limit_ms, mark.as_deref()),
        Request::Thaw => match shared.frozen().take() {
            Some(held) => {
                let held = held.held.end(&*shared.clock);
                tracing::info!(held, "thawed");
                Ok(Answer::Thawed { held })
            }
            None => Err(Problem::new(
                super::problem::ProblemKind::AlreadySo,
                "the disks are not frozen",
                "no freeze was asked for, or it ended before",
                "",
            )),
        },
        Request::Move { within_ms } => {
            if within_ms > MARK_WAIT_MS_MAX {
                return Err(Problem::usage(
                    "the wait is too long",
                    format!("{within_ms} ms"),
                    "wait for ten minutes at most",
                ));
            }
            let within = Duration::from_millis(within_ms);
            let (reply, answer) = mpsc::sync_channel(1);
            let deaf = |why: &str| Problem::failed("the agent did not move", why, "restart the agent");
            shared
                .commands
                .try_send(Command::Move { within, reply })
                .map_err(|_| deaf("the replication thread does not take commands"))?;
            let moved = answer.recv_timeout(within + ENGINE_LIMIT);
            let drained = moved.map_err(|_| deaf("the replication thread does not answer"))??;
            Ok(Answer::Moved { drained })
        }
        Request::Reload { config } => {
            let (changes, restart) = shared.reload(&config)?;
            Ok(Answer::Reloaded { changes, restart })
        }
        Request::Scrub { disk } => answer_scrub(shared, disk.as_deref()),
        Request::Stop => {
            shared.request_stop("the control socket");
            Ok(Answer::Stopping)
        }
    }
}

fn answer_scrub(shared: &Shared, name: Option<&str>) -> Result<Answer, Problem> {
    let what = "no scrub was begun";
    let disk = match name {
        None => None,
        Some(name) => {
            let status = shared.status();
            let found = status.disks.iter().find(|disk| disk.name == name).map(|disk| DiskId(disk.disk));
            let names: Vec<&str> = status.disks.iter().map(|disk| disk.name.as_str()).collect();
            let unknown =
                || Problem::usage(what, format!("no disk is named `{name}`"), format!("name one of {names:?}"));
            Some(found.ok_or_else(unknown)?)
        }
    };
    let (reply, answer) = mpsc::sync_channel(1);
    let deaf = |why: &str| Problem::failed(what, why, "restart the agent");
    let sent = shared.commands.try_send(Command::Scrub { disk, reply });
    sent.map_err(|_| deaf("the replication thread does not take commands"))?;
    match answer.recv_timeout(ENGINE_LIMIT).map_err(|_| deaf("the replication thread does not answer"))? {
        Ok(bytes) => Ok(Answer::Scrubbing { bytes }),
        Err(ScrubRefusal::Unsupported) => Err(Problem::failed(
            what,
            "with disks that are scanned nobody knows what is written while they are compared",
            "every scan looks at the whole disk; capture by eBPF can be scrubbed (`farshore-agent check`)",
        )),
        Err(ScrubRefusal::UnderWay) => Err(Problem::new(
            super::problem::ProblemKind::AlreadySo,
            what,
            "one is under way, and goes on",
            "`farshore-agent status` says how far it has come",
        )),
        Err(ScrubRefusal::NoDisk) => {
            Err(Problem::failed(what, "the disk is not captured at the moment", "look at `farshore-agent status`"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        for (line, request) in [
            (r#"{"command":"status"}"#, Request::Status),
            (r#"{"command":"mark","name":"x"}"#, Request::Mark { name: "x".into(), wait_ms: 0 }),
            (r#"{"command":"point","name":"x"}"#, Request::Point { name: "x".into(), wait_ms: 0 }),
            (r#"{"command":"freeze","limit_ms":5}"#, Request::Freeze { limit_ms: 5, mark: None }),
            (r#"{"command":"thaw"}"#, Request::Thaw),
            (r#"{"command":"reload","config":"/a"}"#, Request::Reload { config: "/a".into() }),
            (r#"{"command":"scrub"}"#, Request::Scrub { disk: None }),
            (r#"{"command":"scrub","disk":"a"}"#, Request::Scrub { disk: Some("a".into()) }),
            (r#"{"command":"stop"}"#, Request::Stop),
        ] {
            assert_eq!(serde_json::from_str::<Request>(line).expect(line), request);
        }
        serde_json::from_str::<Request>(r#"{"command":"mark","name":"x","wait":1}"#).expect_err("unknown field");
    }
}
