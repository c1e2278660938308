//! The journal: where changes become durable on this host before they are acknowledged, and wait until the vault has
//! them. One journal serves all machines of a process server; a branch keeps its own writes in one of its own.
//!
//! ```text
//! ingest ──► append ──► sync ──► acknowledge          read back ──► seal ──► upload
//!              │          │                                ▲                    │
//!              ▼          ▼                                │                    ▼
//!           files of encrypted, ordered records ───────────┘◄──────────── Committed
//! ```
//!
//! * **Order.** Records come back in the order in which they were appended, over all chains: whatever a crash leaves is
//!   a prefix that holds at least everything that was synced.
//! * **Space.** Never more than [`JournalConfig::bytes_max`]. A file is removed as soon as each change in it is
//!   committed or dropped and the record that says so is durable.
//! * **Sync errors are final** for their file. Nothing is retried on it; [`Journal::restart`] begins a new file, which
//!   declares how much of the old one counts, and the caller appends again what was not durable.
//! * **A crash** leaves at most a torn tail in the newest file, and possibly files whose removal or creation was
//!   not durable. [`Journal::open`] cuts the former and removes the latter.
//!
//! `catalog` decides, `writer` and `replay` act through [`world::Files`], so a simulation runs the same code;
//! [`thread`] adds a queue and group commit for the real process. The bytes are described in `docs/formats/journal.md`.

mod catalog;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod record;
mod replay;
pub mod thread;
mod writer;

use std::io;

use replication::codec::DecodeError;
use replication::{ChainId, SequenceNumber};

pub use format::{FileNumber, HostKey};
pub use record::{
    CHAINS_MAX, ChainState, Manifest, ManifestNonce, ManifestNumber, NOTE_BYTES_MAX, NOTES_MAX, NoteKind,
    RECORD_BYTES_MAX, Record, Session,
};
pub use replay::{ChangeReader, Replayed, TornTail};
pub use thread::{JournalStatus, JournalThread, QueueConfig};
pub use writer::{Journal, JournalCounters, JournalPosition, Recovered};

/// How large a journal and its files may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalConfig {
    /// Most bytes on the disk, over all files.
    pub bytes_max: u64,
    /// Most bytes of one file. Space is returned a file at a time.
    pub file_bytes_max: u64,
}

impl JournalConfig {
    /// Smallest file, in bytes.
    pub const FILE_BYTES_MIN: u64 = 64 << 10;
    /// Size at which a new file is begun unless configured otherwise, in bytes.
    pub const FILE_BYTES_DEFAULT: u64 = 64 << 20;

    /// A journal of at most `bytes_max` in files of the default size, or smaller ones if the journal is small.
    pub fn new(bytes_max: u64) -> JournalConfig {
        let file_bytes_max = (bytes_max / 8).clamp(JournalConfig::FILE_BYTES_MIN, JournalConfig::FILE_BYTES_DEFAULT);
        JournalConfig { bytes_max, file_bytes_max }
    }

    fn check(&self) -> Result<(), JournalError> {
        if self.file_bytes_max < JournalConfig::FILE_BYTES_MIN {
            return Err(JournalError::Invalid("a journal's files have at least 64 KiB"));
        }
        if self.bytes_max < 4 * self.file_bytes_max {
            return Err(JournalError::Invalid("a journal has room for at least four of its files"));
        }
        if self.bytes_max / self.file_bytes_max > (record::FILES_MAX / 2) as u64 {
            return Err(JournalError::Invalid("a journal has at most 32768 files; make them larger"));
        }
        Ok(())
    }
}

/// Why the journal did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// No room for more changes. Stop taking them in; try again when something was committed.
    #[error("the journal is full: {needed_bytes} bytes are needed, {free_bytes} are free")]
    Full {
        /// What the record would take, in bytes.
        needed_bytes: u64,
        /// What changes may still take, in bytes.
        free_bytes: u64,
    },
    /// A write or sync failed earlier. Call [`Journal::restart`].
    #[error("the journal's file is unusable since a write to it failed")]
    Poisoned,
    /// The journal's thread has ended; nothing more will be journaled by it.
    #[error("the journal has stopped")]
    Stopped,
    /// The record cannot be stored in any file.
    #[error("a record has {record_bytes} bytes, the limit is {limit_bytes}")]
    TooLarge {
        /// Its size, in bytes.
        record_bytes: u64,
        /// The largest size, in bytes.
        limit_bytes: u64,
    },
    /// Changes do not follow the ones before. A bug of the caller.
    #[error("chain {chain} was given change {given} after {last}")]
    OutOfOrder {
        /// The chain.
        chain: ChainId,
        /// First change of the refused record.
        given: SequenceNumber,
        /// Last change journaled or released.
        last: SequenceNumber,
    },
    /// The caller or the configuration asks for what the journal does not do.
    #[error("{0}")]
    Invalid(&'static str),
    /// The operating system refused. The writer is poisoned if this came from a write.
    #[error("could not {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// Bytes that had been durable are not what was written.
    #[error("journal file {number} is damaged at offset {offset}: {what}")]
    Damaged {
        /// The file.
        number: FileNumber,
        /// Where.
        offset: u64,
        /// How.
        what: &'static str,
    },
    /// An authentic record makes no sense: a newer program wrote it.
    #[error("a record of journal file {number}, ending at offset {before_offset}, cannot be understood")]
    Undefined {
        /// The file.
        number: FileNumber,
        /// Where the record ends.
        before_offset: u64,
        /// What is wrong.
        source: DecodeError,
    },
    /// A file that holds uncommitted changes is not there.
    #[error("journal file {number} is missing, and it held changes that are not committed")]
    FileMissing {
        /// The file.
        number: FileNumber,
    },
    /// The file was written by a newer program.
    #[error("journal file {number} has format version {version}, which this program does not know")]
    Version {
        /// The file.
        number: FileNumber,
        /// Its version.
        version: u16,
    },
    /// The file was written under another key.
    #[error("journal file {number} was written under another host key")]
    WrongKey {
        /// The file.
        number: FileNumber,
    },
    /// Journal files exist, but the key does not.
    #[error("there are journal files, but their key {path} is missing")]
    KeyMissing {
        /// Where it should be.
        path: String,
    },
    /// The key file is damaged.
    #[error("the journal's key file is damaged")]
    KeyDamaged,
}

impl JournalError {
    fn io(action: &'static str, path: &str, source: io::Error) -> JournalError {
        JournalError::Io { action, path: path.to_owned(), source }
    }

    /// Whether only a disk that is full of other things prevents the journal from going on.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, JournalError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}
