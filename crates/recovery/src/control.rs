//! The control socket of a branch: another process asks the one that serves it.
//!
//! A unix socket in the branch's directory, for this user only. One JSON object a line, one answer a line:
//! `{"command":"status"}`, `{"command":"failback","home":…,"disks":[…]}`, `{"command":"cut-over"}`,
//! `{"command":"cancel"}`, `{"command":"discard"}`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use replication::DiskGeometry;
use serde::{Deserialize, Serialize};

use crate::branch::Branch;
use crate::failback::{Failback, FailbackConfig, FailbackStatus, HomeLine};
use crate::home_disk::{HomeOrder, Refusal};
use crate::home_proof::ProofScope;
use crate::limits;
use crate::succession::Succession;

/// Where a master target is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HomeAddress {
    /// In the process that serves the branch: the home disks are this host's.
    Here,
    /// At this address.
    At(String),
}

/// Makes lines to master targets; the program that serves the branch knows its certificates.
pub trait HomeConnector: Send + Sync {
    /// A line to the master target at `address`.
    ///
    /// # Errors
    /// Why there can be none.
    fn line(&self, address: &HomeAddress) -> Result<Box<dyn HomeLine>, Refusal>;
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// How is it?
    Status,
    /// Begin to bring the branch home.
    Failback {
        /// Where to.
        home: HomeAddress,
        /// Which disks.
        disks: Vec<HomeOrder>,
        /// What home reads again for the proof.
        #[serde(default)]
        proof: ProofScope,
        /// What becomes of the machine's own chain.
        #[serde(default)]
        succession: Succession,
    },
    /// Cut over as soon as home follows.
    CutOver,
    /// Stop bringing it home. The home disks are not usable then.
    Cancel,
    /// End the branch.
    Discard,
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// It was done, or begun.
    pub ok: bool,
    /// If not: why.
    pub problem: Option<Refusal>,
    /// The branch, as 32 hexadecimal digits.
    pub branch: String,
    /// The process that serves it.
    pub process: u32,
    /// Its disks.
    pub disks: Vec<ServedDisk>,
    /// What was opened.
    pub opened: String,
    /// Newest change.
    pub written: String,
    /// Everything up to here is in the vault.
    pub committed: String,
    /// Bytes of changes that are not in the vault yet.
    pub unsealed_bytes: u64,
    /// The failback, if one was begun.
    pub failback: Option<FailbackStatus>,
    /// Where it goes, while it runs.
    #[serde(default)]
    pub destination: Option<Destination>,
}

/// Where a failback goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// The master target.
    pub home: HomeAddress,
    /// Its disks.
    pub disks: Vec<HomeOrder>,
}

/// A disk of a branch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedDisk {
    /// Its number.
    pub disk: u16,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it was called on its machine.
    pub path: String,
}

impl ServedDisk {
    fn of(geometry: &DiskGeometry) -> ServedDisk {
        ServedDisk { disk: geometry.disk.0, size_bytes: geometry.size_bytes, path: geometry.path.clone() }
    }
}

/// The path of a branch's control socket.
pub fn control_path(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

struct Running {
    failback: Failback,
    destination: Destination,
}

struct Shared {
    branch: Arc<Branch>,
    connector: Arc<dyn HomeConnector>,
    config: FailbackConfig,
    failback: Mutex<Option<Running>>,
    discarded: AtomicBool,
    stop: AtomicBool,
}

/// Listens on the control socket of a branch. Dropping it stops listening and ends a failback where it is.
pub struct ControlServer {
    shared: Arc<Shared>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

/// How long a connection may be silent.
const CLIENT_SILENCE: Duration = Duration::from_secs(30);

impl ControlServer {
    /// Begins to listen. The branch must be open, so no other process listens; a socket that a killed one left is
    /// replaced.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start(
        branch: Arc<Branch>,
        connector: Arc<dyn HomeConnector>,
        config: FailbackConfig,
    ) -> std::io::Result<ControlServer> {
        let path = control_path(branch.directory());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let shared = Arc::new(Shared {
            branch,
            connector,
            config,
            failback: Mutex::new(None),
            discarded: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if serving.stop.load(Ordering::SeqCst) {
                    break;
                }
                // One client at a time: each asks a question and leaves, and none may hold the others up for long.
                if let Err(error) = serve(&serving, &stream) {
                    tracing::debug!(%error, "a control connection ended");
                }
            }
        })?;
        Ok(ControlServer { shared, path, thread: Some(thread) })
    }

    /// Whether the branch was asked to end, or a failback brought it home: the process that serves it may leave.
    pub fn is_over(&self) -> bool {
        self.shared.discarded.load(Ordering::SeqCst)
            || self.failback().is_some_and(|status| status.phase == crate::failback::Phase::Done)
    }

    /// The failback, if one was begun.
    pub fn failback(&self) -> Option<FailbackStatus> {
        let running = self.shared.failback.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|running| running.failback.status())
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        drop(UnixStream::connect(&self.path));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        drop(std::fs::remove_file(&self.path));
    }
}

fn serve(shared: &Shared, stream: &UnixStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_SILENCE))?;
    stream.set_write_timeout(Some(CLIENT_SILENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(limits::CONTROL_LINE_BYTES_MAX)).read_line(&mut line)?;
    let outcome = match serde_json::from_str(&line) {
        Ok(command) => shared.execute(command),
        Err(error) => Err(Refusal::new(format!("the request makes no sense: {error}"), "nothing was done", "")),
    };
    let mut answer = serde_json::to_vec(&shared.answer(outcome)).expect("texts and numbers serialize");
    answer.push(b'\n');
    let mut stream = stream;
    stream.write_all(&answer)
}

impl Shared {
    fn execute(&self, command: Command) -> Result<(), Refusal> {
        let mut failback = self.failback.lock().unwrap_or_else(PoisonError::into_inner);
        let none = || {
            Refusal::new(
                "this branch is not being brought home",
                "there is nothing to do it to",
                "begin a failback first",
            )
        };
        match command {
            Command::Status => Ok(()),
            Command::Failback { home, disks, proof, succession } => {
                let line = self.connector.line(&home)?;
                let config = FailbackConfig { proof, succession, ..self.config };
                let begun = Failback::start(Arc::clone(&self.branch), disks.clone(), line, config)?;
                *failback = Some(Running { failback: begun, destination: Destination { home, disks } });
                Ok(())
            }
            Command::CutOver => failback.as_ref().map(|running| running.failback.cut_over()).ok_or_else(none),
            Command::Cancel => failback.take().map(drop).ok_or_else(none),
            Command::Discard => {
                if failback.as_ref().is_some_and(|running| !running.failback.is_over()) {
                    return Err(Refusal::new(
                        "this branch is being brought home",
                        "the home disks would be left between two states",
                        "cancel the failback first",
                    ));
                }
                let failed = |error: crate::BranchError| {
                    Refusal::new(format!("the branch could not be discarded: {error}"), "it goes on", "try again")
                };
                self.branch.discard().map_err(failed)?;
                self.discarded.store(true, Ordering::SeqCst);
                Ok(())
            }
        }
    }

    fn answer(&self, outcome: Result<(), Refusal>) -> Answer {
        let figures = self.branch.figures();
        let running = self.failback.lock().unwrap_or_else(PoisonError::into_inner);
        let failback = running.as_ref().map(|running| running.failback.status());
        let destination = running.as_ref().filter(|running| !running.failback.is_over());
        let destination = destination.map(|running| running.destination.clone());
        drop(running);
        Answer {
            ok: outcome.is_ok(),
            problem: outcome.err(),
            branch: self.branch.id().to_string(),
            process: std::process::id(),
            disks: self.branch.disks().iter().map(ServedDisk::of).collect(),
            opened: self.branch.info().sentence(),
            written: figures.written.to_string(),
            committed: figures.committed.to_string(),
            unsealed_bytes: figures.unsealed_bytes,
            failback,
            destination,
        }
    }
}

/// Asks the process that serves a branch.
pub struct ControlClient {
    path: PathBuf,
}

impl ControlClient {
    /// A client of the branch whose state is in `directory`.
    pub fn new(directory: &Path) -> ControlClient {
        ControlClient { path: control_path(directory) }
    }

    /// Asks one question.
    ///
    /// # Errors
    /// If no process serves the branch, or what answers makes no sense.
    pub fn ask(&self, command: &Command) -> std::io::Result<Answer> {
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(2 * CLIENT_SILENCE))?;
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }
}
