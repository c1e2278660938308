//! What can go wrong with a branch, by what the caller should do.

use process_server::journal::JournalError;
use replication::{ChainId, DiskId, MachineId};
use vault::view::ReadError;
use vault::{PointError, VaultError};
use world::BlockError;

/// Why a branch operation failed.
#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    /// The vault refused or failed.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The moment asked for cannot be opened.
    #[error(transparent)]
    Point(#[from] PointError),
    /// The branch's own journal failed.
    #[error("the journal of the branch failed")]
    Journal(#[from] JournalError),
    /// Stored data cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The point was taken before any disk was described.
    #[error("chain {0} holds no disk at this point; choose a later one")]
    NoDisks(ChainId),
    /// The vault knows no such machine.
    #[error("the vault protects no machine {0}; list them with `farshore vault machines`")]
    NoMachine(MachineId),
    /// No state of such a branch is on this host.
    #[error("there is no branch {0} on this host; open it where its state is, or open its chain as a new branch")]
    NoBranch(ChainId),
    /// Another process serves the branch.
    #[error("branch {0} is in use by another process; stop that one first")]
    InUse(ChainId),
    /// The branch ended.
    #[error("branch {branch} has ended: {reason}")]
    Ended {
        /// Which.
        branch: ChainId,
        /// How.
        reason: String,
    },
    /// Someone else went on with the branch's chain, so what this host still holds of it is not its continuation.
    #[error(
        "the chain of branch {branch} was continued elsewhere; what this host had not committed stays in its journal \
         and is not part of the chain any more. Open the chain as a new branch to go on from its newest point"
    )]
    TakenOver {
        /// Which.
        branch: ChainId,
    },
    /// This host may not write branches to the vault, and what unlocked the vault cannot grant that.
    #[error("this host has no branch host's grant for the vault")]
    NotGranted,
    /// A file of keys cannot be used.
    #[error("the keys in {file} cannot be used")]
    Keys {
        /// Its name in the state directory.
        file: String,
        /// Why.
        #[source]
        source: vault::keys::WriterKeysError,
    },
    /// No such disk.
    #[error("the branch has no {0}")]
    NoDisk(DiskId),
    /// A write does not fit.
    #[error("a write reaches beyond the end of {0}")]
    OutOfRange(DiskId),
    /// No room for unsealed changes; seal first.
    #[error("changes wait to be committed and there is no room for more; is the vault reachable?")]
    NoRoom,
    /// The state on this host cannot be read or written.
    #[error("the state of the branch could not be {action}")]
    State {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The splitter in front of the branch did not open.
    #[error("the disks of the branch cannot be followed")]
    Splitter(#[from] agent::capture::OpenSplitterError),
}

impl BranchError {
    pub(crate) fn state(action: &'static str) -> impl Fn(std::io::Error) -> BranchError {
        move |source| BranchError::State { action, source }
    }

    /// Whether another writer holds the chain now.
    pub fn is_fenced(&self) -> bool {
        matches!(self, BranchError::TakenOver { .. } | BranchError::Vault(VaultError::Fenced { .. }))
    }
}

/// A branch's error as whoever uses its disk sees it.
pub(crate) fn block_error(error: BranchError) -> BlockError {
    match error {
        BranchError::Read(ReadError::Unreadable { range, .. }) => BlockError::Unreadable {
            start: range.start,
            end: range.end(),
            source: std::io::Error::other("the source disk could not be read here when it was replicated"),
        },
        BranchError::Read(ReadError::Vault { source, .. }) if source.condemns_object() => {
            BlockError::Corrupt(source.to_string())
        }
        BranchError::NoRoom => BlockError::NoSpace,
        other => BlockError::Failed(std::io::Error::other(other)),
    }
}
