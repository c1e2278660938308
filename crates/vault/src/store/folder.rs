//! A vault in a folder: object names are paths, and every create is on the medium before it is reported.
//!
//! A crash leaves complete objects and, at worst, temporary files that listings ignore.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use world::{Entropy, Files, RealFiles, durable};

use super::{ObjectName, Store, StoreError};

/// Objects as files below one folder.
pub struct FolderStore {
    files: Arc<dyn Files>,
    place: String,
    /// Tells this store's temporary files from those of other processes on the same folder.
    session: String,
    counter: AtomicU64,
    /// Directories whose names, up to the root, are known to be durable. A directory made by a process that was
    /// killed before it synced the parent exists without being durable, so existence alone proves nothing.
    durable_directories: Mutex<HashSet<String>>,
}

impl FolderStore {
    /// A store over `files`. `place` is what people call it.
    pub fn new(files: Arc<dyn Files>, entropy: &dyn Entropy, place: impl Into<String>) -> FolderStore {
        FolderStore {
            files,
            place: place.into(),
            session: format!("{:016x}", u64::from_le_bytes(entropy.bytes())),
            counter: AtomicU64::new(0),
            durable_directories: Mutex::new(HashSet::new()),
        }
    }

    /// A store in the folder `path` of this machine.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`] if `path` is missing or not a folder.
    pub fn open(path: &Path, entropy: &dyn Entropy) -> Result<FolderStore, StoreError> {
        let refused = |reason: String| StoreError::NotAStore { at: path.display().to_string(), reason };
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(refused("it is a file, not a folder".into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(refused("there is no such folder; create it first".into()));
            }
            Err(error) => return Err(refused(error.to_string())),
        }
        Ok(FolderStore::new(Arc::new(RealFiles::new(path)), entropy, path.display().to_string()))
    }

    /// Makes sure that `directory` exists and that it will after a power cut.
    fn ensure_directory(&self, directory: &str) -> io::Result<()> {
        if directory.is_empty() || self.durable_directories().contains(directory) {
            return Ok(());
        }
        self.files.create_directory(directory)?;
        let mut child = directory;
        while !child.is_empty() {
            let parent = parent_of(child);
            self.files.sync_directory(parent)?;
            child = parent;
        }
        self.durable_directories().insert(directory.to_owned());
        Ok(())
    }

    fn durable_directories(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.durable_directories.lock().expect("nothing panics while holding the set of directories")
    }

    /// Adds the names below `directory` (empty or ending in `/`) that lie after `after`, in order.
    fn collect(
        &self,
        directory: &str,
        after: Option<&str>,
        limit: usize,
        names: &mut Vec<ObjectName>,
    ) -> io::Result<()> {
        let path = directory.trim_end_matches('/');
        // A directory sorts as its name with the slash, which is how the full names inside it compare.
        let mut entries: Vec<String> = self.files.list_directories(path)?;
        entries.iter_mut().for_each(|name| name.push('/'));
        entries.extend(self.files.list_files(path)?);
        entries.sort_unstable();
        for entry in entries {
            if names.len() >= limit {
                break;
            }
            let full = format!("{directory}{entry}");
            if full.ends_with('/') {
                // Everything below sorts before `after` unless `after` lies below too or the folder sorts behind it.
                if after.is_none_or(|after| full.as_str() > after || after.starts_with(&full)) {
                    self.collect(&full, after, limit, names)?;
                }
            } else if after.is_none_or(|after| full.as_str() > after)
                && let Ok(name) = ObjectName::new(&full)
            {
                names.push(name);
            }
        }
        Ok(())
    }
}

impl Store for FolderStore {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::Full { name: name.clone(), source: error.into() }
            }
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => {
                StoreError::ReadOnly { name: name.clone(), source: error.into() }
            }
            _ => StoreError::Unavailable { at: name.to_string(), source: error.into() },
        };
        let directory = parent_of(name.as_str());
        self.ensure_directory(directory).map_err(failed)?;
        let unique = format!("{}-{}", self.session, self.counter.fetch_add(1, Ordering::Relaxed));
        let slices: Vec<&[u8]> = parts.iter().map(Bytes::as_ref).collect();
        match durable::publish(self.files.as_ref(), name.as_str(), &slices, &unique) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Whoever linked it may have been killed before syncing the directory. The caller may recognise
                // the object as its own and acknowledge it, so its name must be durable now.
                self.files.sync_directory(directory).map_err(failed)?;
                Err(StoreError::AlreadyExists(name.clone()))
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        let wanted = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        match self.files.read_at(name.as_str(), range.start, wanted) {
            Ok(bytes) => Ok(bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let size = self.size(name)?;
                if size >= range.end {
                    return Err(StoreError::Unavailable { at: name.to_string(), source: error.into() });
                }
                if size <= range.start {
                    return Ok(Bytes::new());
                }
                let present = usize::try_from(size - range.start).unwrap_or(usize::MAX);
                let bytes = self.files.read_at(name.as_str(), range.start, present);
                bytes.map(Bytes::from).map_err(|error| read_error(name, error))
            }
            Err(error) => Err(read_error(name, error)),
        }
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        self.files.read(name.as_str()).map(Bytes::from).map_err(|error| read_error(name, error))
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.files.len(name.as_str()).map_err(|error| read_error(name, error))
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        assert!(prefix.is_empty() || prefix.ends_with('/'), "a listing names a folder");
        let mut names = Vec::new();
        self.collect(prefix, after.map(ObjectName::as_str), limit, &mut names)
            .map_err(|error| StoreError::Unavailable { at: prefix.to_owned(), source: error.into() })?;
        Ok(names)
    }

    fn describe(&self) -> String {
        format!("folder {}", self.place)
    }
}

fn read_error(name: &ObjectName, error: io::Error) -> StoreError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => StoreError::NotFound(name.clone()),
        _ => StoreError::Unavailable { at: name.to_string(), source: error.into() },
    }
}

fn parent_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}
