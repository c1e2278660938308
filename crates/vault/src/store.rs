//! The one seam to storage: named, immutable objects that are created once and never overwritten.
//!
//! Everything above trusts three promises, which `tests/store_conformance.rs` checks for every implementation:
//! an object that [`Store::create`] reported is durable and complete, a name that is taken stays taken with the same
//! bytes, and a listing that starts after a create returned contains it.

mod adapter;
mod folder;
mod probe;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::limits;

pub use adapter::ObjectStoreAdapter;
pub use folder::FolderStore;
pub use probe::{probe_create_only, probe_create_only_sequentially};

/// The name of an object: components of `a-z 0-9 . _ -` separated by `/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<str>);

/// A text is no object name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not an object name: {rule}")]
pub struct ObjectNameError {
    name: String,
    rule: &'static str,
}

impl ObjectName {
    /// Checks `name`.
    ///
    /// # Errors
    /// Names that could escape a folder, clash with files being written, or that some store cannot represent.
    pub fn new(name: impl AsRef<str>) -> Result<ObjectName, ObjectNameError> {
        let name = name.as_ref();
        let broken = |rule| Err(ObjectNameError { name: name.chars().take(80).collect(), rule });
        if name.is_empty() || name.len() > limits::OBJECT_NAME_BYTES_MAX {
            return broken("it must have 1 to 512 bytes");
        }
        if !name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'/')) {
            return broken("only a-z, 0-9, '.', '_', '-' and '/' are allowed");
        }
        // A leading dot also rules out ".." and the hidden files that other programs leave in folders.
        if name.split('/').any(|component| component.is_empty() || component.starts_with('.')) {
            return broken("no component may be empty or begin with a dot");
        }
        if world::durable::is_temporary(name) {
            return broken("this suffix marks files that are still being written");
        }
        Ok(ObjectName(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a store said, kept for the chain of causes.
pub type StoreCause = Box<dyn std::error::Error + Send + Sync>;

/// Why a store operation failed. Each kind tells the caller what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The name is taken, durably. Read the object to learn whether it is one's own from a lost answer; never
    /// overwrite.
    #[error("the object {0} already exists")]
    AlreadyExists(ObjectName),
    /// Nothing has this name.
    #[error("there is no object {0}")]
    NotFound(ObjectName),
    /// The store overwrites existing objects. Use another store: no promise of the vault can be kept on this one.
    #[error("the store does not honour create-only: {0}. Farshore cannot keep a vault on it")]
    NotCreateOnly(String),
    /// No space is left. Free space or enlarge the store, then retry the same object under the same name.
    #[error("the store is full: {name} could not be stored")]
    Full {
        /// What was being created.
        name: ObjectName,
        /// What the store said.
        #[source]
        source: StoreCause,
    },
    /// The store takes no writes from this user. Fix permissions or mount it writable; reading still works.
    #[error("the store is read-only: {name} could not be stored")]
    ReadOnly {
        /// What was being created.
        name: ObjectName,
        /// What the store said.
        #[source]
        source: StoreCause,
    },
    /// The operation did not succeed, or its answer was lost: after a create the object may exist or not. Retry with
    /// the same bytes under the same name.
    #[error("the store failed at {at}")]
    Unavailable {
        /// The name or prefix it failed at.
        at: String,
        /// What the store said.
        #[source]
        source: StoreCause,
    },
    /// The place named is no store at all: a file, or missing. Name another one.
    #[error("{at} is not a place for a vault: {reason}")]
    NotAStore {
        /// What was named.
        at: String,
        /// What is there instead.
        reason: String,
    },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody's help.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable { .. } | StoreError::Full { .. })
    }
}

/// Where objects are. Blocking; may be called from several threads at once.
pub trait Store: Send + Sync {
    /// Creates `name` holding the concatenation of `parts`. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name is taken, in which case nothing changed and the object that is there
    /// is durable. After any other error the object exists completely or not at all, and nobody knows which.
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError>;

    /// The bytes of `name` in `range`, fewer if the object ends before `range.end`.
    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// All bytes of `name`.
    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        let size = self.size(name)?;
        self.read(name, 0..size)
    }

    /// Size of `name` in bytes.
    fn size(&self, name: &ObjectName) -> Result<u64, StoreError>;

    /// At most `limit` names below the folder `prefix` (empty, or ending in `/`), sorted by their bytes, strictly
    /// after `after`. Things that are no objects of ours (other programs' files, files being written) are left out.
    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError>;

    /// Where this is, for people.
    fn describe(&self) -> String;
}

impl<S: Store + ?Sized> Store for Arc<S> {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        (**self).create(name, parts)
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        (**self).read(name, range)
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        (**self).read_all(name)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        (**self).size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        (**self).list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        (**self).describe()
    }
}

impl dyn Store + '_ {
    /// Calls `visit` for every name below `prefix`, in order, until it returns `false`.
    ///
    /// # Errors
    /// The first error of a listing or of `visit`.
    pub fn for_each<E: From<StoreError>>(
        &self,
        prefix: &str,
        mut visit: impl FnMut(ObjectName) -> Result<bool, E>,
    ) -> Result<(), E> {
        let mut after: Option<ObjectName> = None;
        loop {
            let page = self.list(prefix, after.as_ref(), limits::LIST_PAGE)?;
            let complete = page.len() < limits::LIST_PAGE;
            after = page.last().cloned();
            for name in page {
                if !visit(name)? {
                    return Ok(());
                }
            }
            if complete {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_or_clash_are_refused() {
        for good in ["a", "vault", "chains/00ff/m/ff-ab_c.d", "a..b"] {
            assert_eq!(ObjectName::new(good).expect(good).as_str(), good);
        }
        let long = "a".repeat(513);
        for bad in ["", "/a", "a/", "a//b", "..", "a/../b", ".hidden", "A", "a b", "ä", "a.1.partial", &long] {
            assert!(ObjectName::new(bad).is_err(), "{bad:?}");
        }
    }
}
