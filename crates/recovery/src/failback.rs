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
//! target has all of it, and compares the hash of every leaf at home with the branch's head: as home read it for the
//! comparison, or again since it was written ([`ProofScope`]).
//!
//! A crash of this side leaves the branch as it was: failing back again begins with a comparison.
//!
//! [`FailbackRun`] decides and never waits; [`Failback`] is a thread around it. The simulation steps the former.

mod run;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use link::FrameLink;
use serde::{Deserialize, Serialize};

pub use self::run::{FailbackRun, Turn};
use crate::branch::Branch;
use crate::home_disk::{HomeOrder, Refusal};
use crate::home_proof::ProofScope;
use crate::lent_capture::LentCapture;
use crate::succession::Succession;

/// The way to a master target. Called again whenever a link ended.
pub trait HomeLine: Send {
    /// A new link.
    ///
    /// # Errors
    /// Why there is none, and whether another attempt may succeed.
    fn connect(&mut self) -> Result<Arc<dyn FrameLink>, LineError>;
}

/// Why there is no line to a master target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// Not now. Before the first link that ends the failback too: nobody waits for an address that was mistyped.
    #[error("{0}")]
    NotNow(Refusal),
    /// Not before somebody changes something.
    #[error("{0}")]
    Never(Refusal),
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
    /// Bytes of home that were read for the proof, while the branch was at rest.
    #[serde(default)]
    pub proof_read_bytes: u64,
    /// Bytes of messages to and from the master target in all, hashes and proofs included; without what TLS adds.
    pub wire_bytes: u64,
    /// Links that were made so far.
    pub connections: u64,
    /// Time since the beginning, in milliseconds.
    pub elapsed_ms: u64,
    /// How long the branch was at rest for the cut over, in milliseconds.
    pub rest_ms: u64,
    /// Why it failed, or why the last cut over or link did.
    pub problem: Option<Refusal>,
    /// The master target refused the order: home was not touched.
    pub refused: bool,
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
    /// What home reads again for the proof.
    pub proof: ProofScope,
    /// What becomes of the machine's own chain.
    pub succession: Succession,
}

impl Default for FailbackConfig {
    fn default() -> FailbackConfig {
        FailbackConfig {
            rest_limit: Duration::from_secs(3600),
            reconnect_pause: Duration::from_secs(1),
            chunk_bytes: 1 << 20,
            proof: ProofScope::default(),
            succession: Succession::default(),
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

impl Shared {
    fn cut_over(&self) {
        lock(&self.status).problem = None;
        self.cut_over.store(true, Ordering::SeqCst);
    }
}

impl FailbackRun {
    /// Begins to bring `branch` home to `disks` over `line`. The branch stays in use. Nothing happens until
    /// [`FailbackRun::step`] is called.
    ///
    /// # Errors
    /// If the branch is being brought home already, or the disks are not the branch's.
    pub fn begin(
        branch: Arc<Branch>,
        disks: Vec<HomeOrder>,
        line: Box<dyn HomeLine>,
        config: FailbackConfig,
    ) -> Result<FailbackRun, Refusal> {
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
            proof_read_bytes: 0,
            wire_bytes: 0,
            connections: 0,
            elapsed_ms: 0,
            rest_ms: 0,
            problem: None,
            refused: false,
        };
        let shared = Arc::new(Shared {
            status: Mutex::new(status),
            cut_over: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        Ok(FailbackRun::new(branch, disks, line, config, shared, capture))
    }
}

/// How long an idle failback waits for the link.
const IDLE_WAIT: Duration = Duration::from_millis(2);

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
        let mut run = FailbackRun::begin(branch, disks, line, config)?;
        let shared = Arc::clone(&run.shared);
        let spawned = std::thread::Builder::new().name("failback".into()).spawn(move || {
            loop {
                match run.step() {
                    Turn::Busy => {}
                    Turn::Idle => run.wait(IDLE_WAIT),
                    Turn::Over => return,
                }
            }
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
        self.shared.cut_over();
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
