//! Files with a planted bug in front of them: syncs that do nothing.

use std::io;

use world::{AppendFile, Files};

use crate::files::SimFiles;

/// See the module's documentation.
pub struct SpoiledFiles {
    files: SimFiles,
    /// Contents of files whose path holds this are not synced.
    contents: Option<&'static str>,
    /// Names are synced.
    names: bool,
}

impl SpoiledFiles {
    /// What is appended to journal files is never synced.
    pub fn without_journal_syncs(files: SimFiles) -> SpoiledFiles {
        SpoiledFiles { files, contents: Some("/journal/"), names: true }
    }

    /// Names that appear and disappear are never synced.
    pub fn without_name_syncs(files: SimFiles) -> SpoiledFiles {
        SpoiledFiles { files, contents: None, names: false }
    }
}

struct NeverSynced(Box<dyn AppendFile>);

impl AppendFile for NeverSynced {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Files for SpoiledFiles {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let file = self.files.create_new(path)?;
        // Keys are made by other code, which keeps its word.
        let forgets = self.contents.is_some_and(|part| path.contains(part) && !path.contains("key"));
        Ok(if forgets { Box::new(NeverSynced(file)) } else { file })
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.files.read(path)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.files.read_at(path, offset, len)
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        self.files.len(path)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.link(from, to)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.rename(from, to)
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.files.remove(path)
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        self.files.create_directory(path)
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        if self.names { self.files.sync_directory(path) } else { Ok(()) }
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_files(path)
    }

    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_directories(path)
    }
}
