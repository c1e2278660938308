//! The file primitives, with the durability that POSIX promises and no more: a file's bytes are durable after
//! [`AppendFile::sync`], a name (created, linked, renamed, removed) only after [`Files::sync_directory`].
//!
//! The simulation implements the same trait and forgets at a power cut whatever was not synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that grows at its end.
pub trait AppendFile: Send {
    /// Appends `bytes`. Not durable, and after a power cut any part of it may be missing or torn.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Returns once everything appended is durable. After an error nothing may be assumed about any byte appended
    /// since the last success: the kernel drops the dirty pages and a second call would lie.
    fn sync(&mut self) -> io::Result<()>;
}

/// Primitive operations on files below one root. Paths are relative, with `/` between components.
pub trait Files: Send + Sync {
    /// Creates a new, empty file; fails with [`io::ErrorKind::AlreadyExists`] if the name is taken.
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>>;

    /// As [`Files::create_new`], for a file that holds a secret: where the world has users, only its owner may read
    /// it. The default knows no users.
    fn create_new_private(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        self.create_new(path)
    }

    /// The whole file.
    fn read(&self, path: &str) -> io::Result<Vec<u8>>;

    /// `len` bytes from `offset`; [`io::ErrorKind::UnexpectedEof`] if the file ends before.
    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;

    /// Size in bytes.
    fn len(&self, path: &str) -> io::Result<u64>;

    /// Gives the file at `from` the second name `to`, atomically; fails with
    /// [`io::ErrorKind::AlreadyExists`] if `to` is taken.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;

    /// Moves `from` to `to`, replacing what was there, atomically.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file's name.
    fn remove(&self, path: &str) -> io::Result<()>;

    /// Creates a directory and its parents, and makes each new name durable.
    fn create_directory(&self, path: &str) -> io::Result<()>;

    /// Makes the names in directory `path` durable; `""` is the root.
    fn sync_directory(&self, path: &str) -> io::Result<()>;

    /// Names of the files (not directories) directly in `path`, sorted. A directory that does not exist is empty.
    fn list_files(&self, path: &str) -> io::Result<Vec<String>>;

    /// Names of the directories directly in `path`, sorted. A directory that does not exist is empty.
    fn list_directories(&self, path: &str) -> io::Result<Vec<String>>;
}

/// Files of the real machine below one root directory.
#[derive(Debug, Clone)]
pub struct RealFiles {
    root: PathBuf,
}

impl RealFiles {
    /// Files below `root`, which must exist.
    pub fn new(root: impl Into<PathBuf>) -> RealFiles {
        RealFiles { root: root.into() }
    }

    /// The directory that all paths are relative to.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn list(&self, path: &str, directories: bool) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.root.join(path)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() == directories
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

impl Files for RealFiles {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let file = OpenOptions::new().append(true).create_new(true).open(self.root.join(path))?;
        Ok(Box::new(RealAppendFile { file }))
    }

    fn create_new_private(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(self.root.join(path))?;
        Ok(Box::new(RealAppendFile { file }))
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        fs::read(self.root.join(path))
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut file = File::open(self.root.join(path))?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = vec![0; len];
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        Ok(fs::metadata(self.root.join(path))?.len())
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.root.join(from), self.root.join(to))
    }

    #[allow(clippy::disallowed_methods)]
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.root.join(from), self.root.join(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        fs::remove_file(self.root.join(path))
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        let mut parent = String::new();
        for component in path.split('/').filter(|component| !component.is_empty()) {
            let child = if parent.is_empty() { component.to_owned() } else { format!("{parent}/{component}") };
            match fs::create_dir(self.root.join(&child)) {
                Ok(()) => self.sync_directory(&parent)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            parent = child;
        }
        Ok(())
    }

    #[allow(clippy::disallowed_methods)]
    fn sync_directory(&self, path: &str) -> io::Result<()> {
        File::open(self.root.join(path))?.sync_all()
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        self.list(path, false)
    }

    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        self.list(path, true)
    }
}

struct RealAppendFile {
    file: File,
}

impl AppendFile for RealAppendFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    #[allow(clippy::disallowed_methods)]
    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}
