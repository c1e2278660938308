//! What the running system says of itself in `/proc`, `/sys`, `/dev` and `/etc`, below a root that tests choose.
//!
//! Nothing here writes, and nothing trusts what it reads: every file has a limit, and what cannot be understood is left
//! out.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

mod block;
mod mounts;

pub use block::{BlockDevices, BlockNode, DeviceNumber};
pub use mounts::{Mount, parse_mounts};

/// Bytes of a small file that are read at most.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Entries of a directory that are looked at.
pub const ENTRIES_MAX: usize = 16_384;

/// The root of a system: `/`, or a copy of parts of one.
#[derive(Debug, Clone)]
pub struct SystemRoot(PathBuf);

impl SystemRoot {
    /// The system that this program runs on.
    pub fn running() -> SystemRoot {
        SystemRoot(PathBuf::from("/"))
    }

    /// A copy of parts of a system.
    pub fn at(root: impl Into<PathBuf>) -> SystemRoot {
        SystemRoot(root.into())
    }

    /// Where an absolute path lies below this root.
    pub fn path(&self, absolute: impl AsRef<Path>) -> PathBuf {
        let relative = absolute.as_ref().strip_prefix("/").unwrap_or(absolute.as_ref());
        self.0.join(relative)
    }

    /// The first `limit` bytes of a file, if it can be read.
    pub fn bytes(&self, absolute: impl AsRef<Path>, limit: u64) -> Option<Vec<u8>> {
        let path = self.path(absolute);
        // A device or a pipe in its place could block for ever.
        if !fs::metadata(&path).ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        fs::File::open(&path).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    }

    /// A small file's text; what is no UTF-8 is replaced.
    pub fn text(&self, absolute: impl AsRef<Path>) -> Option<String> {
        self.bytes(absolute, TEXT_BYTES_MAX).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file that holds one value: without the space around it, `None` if nothing is left.
    pub fn value(&self, absolute: impl AsRef<Path>) -> Option<String> {
        let text = self.text(absolute)?;
        let text = text.trim_matches(|character: char| character.is_whitespace() || character == '\0');
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// A file that holds one decimal number.
    pub fn number(&self, absolute: impl AsRef<Path>) -> Option<u64> {
        self.value(absolute)?.parse().ok()
    }

    /// The names in a directory, in order; empty if it cannot be read.
    pub fn names(&self, absolute: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(absolute)) else { return Vec::new() };
        let entries = entries.take(ENTRIES_MAX).filter_map(Result::ok);
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    /// The last part of what a symbolic link points at.
    pub fn link_name(&self, absolute: impl AsRef<Path>) -> Option<String> {
        let target = fs::read_link(self.path(absolute)).ok()?;
        target.file_name()?.to_str().map(str::to_owned)
    }

    /// Where a path leads when every symbolic link is followed.
    pub fn resolve(&self, absolute: impl AsRef<Path>) -> Option<PathBuf> {
        fs::canonicalize(self.path(absolute)).ok()
    }

    /// Whether there is something of that name.
    pub fn exists(&self, absolute: impl AsRef<Path>) -> bool {
        self.path(absolute).symlink_metadata().is_ok()
    }

    /// The mounts that this process sees.
    pub fn mounts(&self) -> Vec<Mount> {
        // Paths need not be UTF-8.
        self.bytes("/proc/self/mountinfo", 16 * TEXT_BYTES_MAX).map(|bytes| parse_mounts(&bytes)).unwrap_or_default()
    }
}
