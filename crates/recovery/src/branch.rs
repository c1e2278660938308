//! A branch that is open: its disks, its figures, and how it ends. [`BranchRunner`] gives it the threads that seal and
//! read ahead.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use agent::capture::{Splitter, SplitterCapture, SplitterDisk};
use replication::{ChainId, DiskGeometry, DiskId, MachineId, PointTime, Position};
use vault::chain::Phase;
use vault::{Catalog, CatalogEntry, ChainControl, ChainHistory, UnlockedVault, WriterSession};
use world::{Clock, Entropy, Files};

use crate::core::{BranchCore, BranchFigures, SealWish, Sealed};
use crate::error::BranchError;
use crate::host::{Claim, StateFile};
use crate::read_ahead::{ReadAhead, SharedReadAhead};

/// What a branch is, as its host remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BranchInfo {
    /// Its id, which is that of its chain.
    pub branch: ChainId,
    /// Its name for people.
    pub name: String,
    /// The machine whose disks it holds.
    pub machine: MachineId,
    /// Where it begins.
    pub parent: Position,
    /// Point time of the cut it begins at.
    pub point_time: PointTime,
    /// Which point was chosen and why.
    pub reason: String,
    /// Its chain is kept on this host only: the source is not fenced, the point not pinned.
    pub local: bool,
    /// How it ended, if it did.
    pub ended: Option<String>,
}

impl BranchInfo {
    /// What was opened, in one sentence.
    pub fn sentence(&self) -> String {
        let place = if self.local { "; its writes stay on this host: source not fenced, point not pinned" } else { "" };
        format!("opened {} at {} ({}){place}", self.branch, self.parent, self.reason)
    }
}

/// What is needed to end a branch.
pub(crate) struct Ending {
    pub(crate) files: Arc<dyn Files>,
    pub(crate) entropy: Arc<dyn Entropy>,
    pub(crate) vault: UnlockedVault,
    pub(crate) session: Arc<WriterSession>,
    pub(crate) operator: Option<Arc<WriterSession>>,
    pub(crate) state: Mutex<StateFile>,
}

/// A branch that is open. Writes are sealed only while a [`BranchRunner`] runs, or when the owner calls
/// [`BranchCore::seal_step`].
pub struct Branch {
    pub(crate) info: BranchInfo,
    pub(crate) core: Arc<BranchCore>,
    pub(crate) splitter: Splitter,
    pub(crate) capture: Mutex<Option<SplitterCapture>>,
    pub(crate) ahead: SharedReadAhead,
    pub(crate) ending: Ending,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) entropy: Arc<dyn Entropy>,
    pub(crate) directory: PathBuf,
    /// The chain was ended with everything in it, by [`Branch::finish`].
    pub(crate) finished: AtomicBool,
    /// Held for as long as the branch is open.
    pub(crate) _claim: Claim,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Branch {
    /// What it is.
    pub fn info(&self) -> &BranchInfo {
        &self.info
    }

    /// Its id, which is that of its chain.
    pub fn id(&self) -> ChainId {
        self.info.branch
    }

    /// The part without threads.
    pub fn core(&self) -> &Arc<BranchCore> {
        &self.core
    }

    /// Its disks.
    pub fn disks(&self) -> &[DiskGeometry] {
        self.core.disks()
    }

    /// A disk to use. Changes made through it can be followed home; there is no other way in.
    ///
    /// # Errors
    /// [`BranchError::NoDisk`].
    pub fn disk(&self, disk: DiskId) -> Result<SplitterDisk, BranchError> {
        self.splitter.disk(disk).ok_or(BranchError::NoDisk(disk))
    }

    /// The splitter in front of the disks.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Figures now.
    pub fn figures(&self) -> BranchFigures {
        self.core.figures()
    }

    /// Where its state and its sockets are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Ends the branch: later writes fail, and what was not sealed is dropped. What was sealed stays in the vault.
    ///
    /// # Errors
    /// If the catalog or the state cannot be written; call again.
    pub fn discard(&self) -> Result<(), BranchError> {
        self.core.close("it was discarded");
        if !self.info.local {
            let mut catalog = Catalog::load(self.ending.vault.store(), self.ending.vault.keys())?;
            if catalog.branches.get(&self.info.branch).is_none_or(|branch| !branch.discarded) {
                let entry = CatalogEntry::BranchDiscarded { chain: self.info.branch };
                self.append(&mut catalog, &entry)?;
            }
        }
        self.end("it was discarded")?;
        let folder = format!("{}/journal", self.info.branch);
        for name in self.ending.files.list_files(&folder).map_err(BranchError::state("removed"))? {
            self.ending.files.remove(&format!("{folder}/{name}")).map_err(BranchError::state("removed"))?;
        }
        Ok(())
    }

    /// Seals everything, ends the chain with a cut and a checkpoint, and takes no more writes. The next writer of the
    /// chain opens the next generation.
    ///
    /// # Errors
    /// Those of the store: the branch goes on; call again.
    pub fn finish(&self, reason: &str) -> Result<(), BranchError> {
        self.core.close(reason);
        match self.core.seal_all(SealWish::Final) {
            Ok(()) => {
                self.finished.store(true, Ordering::SeqCst);
                Ok(())
            }
            // Whoever finished it before left it closed.
            Err(error) if self.is_finished() => Err(error),
            Err(error) => {
                self.core.open_again();
                Err(error)
            }
        }
    }

    /// Whether [`Branch::finish`] has ended the chain.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::SeqCst)
    }

    /// The machine's history goes on along this branch's chain: process servers write it from here on, a failover that
    /// closed the machine's chain in favour of this branch is committed, the catalog says whom the machine follows, and
    /// the branch ends here.
    ///
    /// # Errors
    /// If the catalog or the state cannot be written; call again.
    pub fn hand_over(&self, reason: &str) -> Result<(), BranchError> {
        if !self.info.local {
            let (store, keys) = (self.ending.vault.store(), self.ending.vault.keys());
            ChainControl::new(store, &self.ending.session, keys).hand_over(self.info.branch)?;
            let mut catalog = Catalog::load(store, keys)?;
            let follows = catalog.machines.get(&self.info.machine).map(|machine| machine.chain);
            if let Some(before) = follows.filter(|chain| *chain != self.info.branch) {
                self.commit_failover(before)?;
            }
            if follows != Some(self.info.branch) {
                let entry = CatalogEntry::MachineFollows { machine: self.info.machine, chain: self.info.branch };
                self.append(&mut catalog, &entry)?;
            }
        }
        self.end(reason)
    }

    /// The failover to this branch stands now, whether or not an operator has said so.
    fn commit_failover(&self, chain: ChainId) -> Result<(), BranchError> {
        let (store, keys) = (self.ending.vault.store(), self.ending.vault.keys());
        let Phase::Closed(closed) = ChainHistory::load(store, keys, chain)?.standing.phase else { return Ok(()) };
        match &self.ending.operator {
            Some(operator) if closed.successor == self.info.branch => {
                ChainControl::new(store, operator, keys).commit(chain)?;
            }
            // The machine follows the branch's chain all the same; the old one stays closed.
            _ => tracing::warn!(%chain, "the failover is not committed: no operator's authority is at hand"),
        }
        Ok(())
    }

    fn append(&self, catalog: &mut Catalog, entry: &CatalogEntry) -> Result<(), BranchError> {
        catalog.append(self.ending.vault.store(), self.ending.vault.keys(), &self.ending.session, entry)?;
        Ok(())
    }

    fn end(&self, reason: &str) -> Result<(), BranchError> {
        let mut state = lock(&self.ending.state);
        state.ended = Some(reason.to_owned());
        state.store(&*self.ending.files, &*self.ending.entropy)
    }
}

/// The threads of an open branch. Dropping it stops them and flushes: everything written is in the journal then.
pub struct BranchRunner {
    branch: Arc<Branch>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// How often the sealing thread looks whether something is due.
const SEAL_LOOK: Duration = Duration::from_millis(50);
/// Pause after a failed attempt to seal.
const SEAL_PAUSE: Duration = Duration::from_secs(1);

impl BranchRunner {
    /// Starts sealing and reading ahead.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(branch: Arc<Branch>) -> std::io::Result<BranchRunner> {
        let stop = Arc::new(AtomicBool::new(false));
        *lock(&branch.ahead) = Some(ReadAhead::start(&branch.core)?);
        let (core, stopping) = (Arc::clone(&branch.core), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("seal".into()).spawn(move || run(&core, &stopping))?;
        Ok(BranchRunner { branch, stop, thread: Some(thread) })
    }

    /// The branch.
    pub fn branch(&self) -> &Arc<Branch> {
        &self.branch
    }
}

impl Drop for BranchRunner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Taken out first: its threads must not be waited for under the lock that readers take.
        let ahead = lock(&self.branch.ahead).take();
        drop(ahead);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            drop(thread.join());
        }
        if let Err(error) = self.branch.core.flush() {
            tracing::warn!(branch = %self.branch.id(), %error, "the last writes could not be flushed");
        }
    }
}

fn run(core: &BranchCore, stop: &AtomicBool) {
    let mut reported = false;
    while !stop.load(Ordering::Relaxed) {
        let pause = match core.seal_step(SealWish::WhenDue) {
            Ok(Sealed::Committed(_)) => {
                if std::mem::take(&mut reported) {
                    tracing::info!(branch = %core.chain(), "the branch is sealed again");
                }
                continue;
            }
            Ok(Sealed::Nothing) => SEAL_LOOK,
            Err(error) => {
                if !std::mem::replace(&mut reported, true) {
                    tracing::warn!(branch = %core.chain(), %error, "the branch cannot be sealed; its writes stay in the journal");
                }
                SEAL_PAUSE
            }
        };
        std::thread::park_timeout(pause);
    }
}
