//! Files below a folder of other files.

use std::io;
use std::sync::Arc;

use crate::files::{AppendFile, Files};

/// A folder of other files, as if it were all there is.
pub struct Subfolder {
    files: Arc<dyn Files>,
    folder: String,
}

impl Subfolder {
    /// The files below `folder`, which exists.
    pub fn new(files: Arc<dyn Files>, folder: impl Into<String>) -> Subfolder {
        Subfolder { files, folder: folder.into() }
    }

    fn at(&self, path: &str) -> String {
        if path.is_empty() { self.folder.clone() } else { format!("{}/{path}", self.folder) }
    }
}

impl Files for Subfolder {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        self.files.create_new(&self.at(path))
    }

    fn create_new_private(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        self.files.create_new_private(&self.at(path))
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.files.read(&self.at(path))
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.files.read_at(&self.at(path), offset, len)
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        self.files.len(&self.at(path))
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.link(&self.at(from), &self.at(to))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.rename(&self.at(from), &self.at(to))
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.files.remove(&self.at(path))
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        self.files.create_directory(&self.at(path))
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        self.files.sync_directory(&self.at(path))
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_files(&self.at(path))
    }

    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_directories(&self.at(path))
    }
}
