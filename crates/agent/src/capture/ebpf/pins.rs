//! The directory in the BPF file system where a capture is kept: who has it, and how it is emptied.
//!
//! Whoever holds the directory's lock is the one agent of this capture. The lock ends with its process, the pins do not.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::support::is_bpf_file_system;

/// Why a capture could not be taken down.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Nothing is captured from there.
    #[error("there is no capture at {0}")]
    Nothing(PathBuf),
    /// Another agent has it.
    #[error("an agent uses the capture at {0}")]
    InUse(PathBuf),
    /// The directory belongs to something else, and is left alone.
    #[error("{0} is not in a BPF file system")]
    Elsewhere(PathBuf),
    /// The system refused.
    #[error("the capture at {path} cannot be taken down", path = path.display())]
    System {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Ends the capture that is kept in `directory`: the programs leave the kernel, and with them goes all that it remembered
/// of writes. The next agent compares whole disks.
///
/// # Errors
/// See [`DetachError`]. After [`DetachError::System`] a part may be gone: what is left is never adopted.
pub fn detach(directory: &Path) -> Result<(), DetachError> {
    let path = || directory.to_owned();
    let system = |source| DetachError::System { path: directory.to_owned(), source };
    match fs::symlink_metadata(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(DetachError::Nothing(path())),
        Err(error) => return Err(system(error)),
        Ok(_) if !is_bpf_file_system(directory).map_err(system)? => return Err(DetachError::Elsewhere(path())),
        Ok(_) => {}
    }
    let lock = lock(directory).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => DetachError::InUse(path()),
        _ => system(error),
    })?;
    remove(directory).map_err(system)?;
    drop(lock);
    Ok(())
}

/// Keeps other agents off `directory`, which is made if it is not there, for as long as the result lives.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`]: another one has it.
pub(super) fn lock(directory: &Path) -> io::Result<File> {
    fs::create_dir_all(directory)?;
    let held = File::open(directory)?;
    rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive)?;
    // Whoever had it before may have removed the directory just now.
    match fs::metadata(directory) {
        Ok(found) if found.ino() == held.metadata()?.ino() => Ok(held),
        _ => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Takes down what is pinned in `directory`: capture ends as soon as the kernel has let go of the links.
///
/// # Errors
/// A pin cannot be removed.
pub(super) fn empty(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    let mut names = entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<PathBuf>>>()?;
    // The ledger first: a directory that lost anything else must not be adopted.
    names.sort_by_key(|path| path.file_name().is_none_or(|name| name != "ledger"));
    names.iter().try_for_each(fs::remove_file)
}

/// As [`empty`], and the directory goes too.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    empty(directory)?;
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_capture_is_left_alone() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("precious");
        fs::write(&file, "x").expect("written");
        assert!(matches!(detach(folder.path()), Err(DetachError::Elsewhere(_))));
        assert!(file.exists());
        assert!(matches!(detach(&folder.path().join("none")), Err(DetachError::Nothing(_))));
    }

    #[test]
    fn one_at_a_time() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let pins = folder.path().join("pins");
        let first = lock(&pins).expect("free");
        assert_eq!(lock(&pins).expect_err("taken").kind(), io::ErrorKind::WouldBlock);
        drop(first);
        let second = lock(&pins).expect("free again");
        remove(&pins).expect("removed");
        drop(second);
        drop(lock(&pins).expect("made again"));
    }
}
