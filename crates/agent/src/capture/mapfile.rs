//! Where the dirty maps live: a mapped file that survives the agent, or memory that survives a simulated one.
//!
//! A [`MapStore`] holds one image. [`MapStore::install`] replaces it atomically and durably and returns it as a
//! [`MapArea`], whose bytes every writer then marks in place. The marks live in the page cache: a `kill -9` of the
//! agent loses none, a power cut may lose any, and whoever opens the image knows the difference by the boot id in it
//! (see [`super::recovery_set`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::FlockOperation;
use world::{Files, RealFiles, durable};

/// Bytes at the start of an image that hold words instead of cells.
pub(crate) const WORDS_BYTES: usize = 4096;
/// Words at the start of an image.
const WORDS: usize = WORDS_BYTES / size_of::<u64>();
/// Largest image in bytes: the maps and a generous head.
pub(crate) const IMAGE_BYTES_MAX: u64 = replication::maps::MAPS_BYTES_MAX + (1 << 20);

/// A place that keeps one image of the dirty maps.
pub trait MapStore: Send + Sync {
    /// The image as it is now, with every mark made so far; `None` if there never was one.
    ///
    /// # Errors
    /// The image exists but cannot be read: continuity is lost, and the caller installs a new one.
    fn load(&self) -> io::Result<Option<Vec<u8>>>;

    /// Makes `image` the stored one, atomically and durably, and returns it for marking. Areas returned earlier no
    /// longer belong to the store.
    fn install(&self, image: &[u8]) -> io::Result<MapArea>;
}

/// Why a map file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MapStoreError {
    /// Another process has it.
    #[error("the dirty maps in {0} are in use by another agent")]
    InUse(PathBuf),
    /// The lock beside it cannot be taken.
    #[error("the lock file {path} cannot be used")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Dirty maps in a mapped file. Locked against a second agent for as long as the store or one of its areas lives.
#[derive(Debug)]
pub struct FileMapStore {
    files: RealFiles,
    directory: PathBuf,
    name: String,
    lock: Arc<File>,
}

impl FileMapStore {
    /// The map file `name` in `directory`, which must exist.
    pub fn open(directory: impl Into<PathBuf>, name: &str) -> Result<FileMapStore, MapStoreError> {
        let directory = directory.into();
        let path = directory.join(format!("{name}.lock"));
        let lock_error = |source| MapStoreError::Lock { path: path.clone(), source };
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(lock_error)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(MapStoreError::InUse(directory.join(name))),
            Err(error) => return Err(lock_error(error.into())),
        }
        let files = RealFiles::new(&directory);
        Ok(FileMapStore { files, directory, name: name.to_owned(), lock: Arc::new(lock) })
    }
}

impl MapStore for FileMapStore {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        match self.files.len(&self.name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
            Ok(len) if len > IMAGE_BYTES_MAX => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is larger than dirty maps can be"));
            }
            Ok(_) => {}
        }
        self.files.read(&self.name).map(Some)
    }

    fn install(&self, image: &[u8]) -> io::Result<MapArea> {
        durable::replace(&self.files, &self.name, image, "new")?;
        let file = OpenOptions::new().read(true).write(true).open(self.directory.join(&self.name))?;
        let map = MmapOptions::new().len(image.len()).map_raw(&file)?;
        Ok(MapArea(Backing::Mapped { map, _lock: self.lock.clone() }))
    }
}

/// Dirty maps in memory, for the simulation and for tests. Clones share the image, as processes share a file.
#[derive(Debug, Clone, Default)]
pub struct MemoryMapStore {
    image: Arc<Mutex<Option<Arc<MemoryImage>>>>,
}

#[derive(Debug)]
struct MemoryImage {
    words: Vec<AtomicU64>,
    cells: Vec<AtomicU8>,
}

impl MemoryMapStore {
    /// A store without an image.
    pub fn new() -> MemoryMapStore {
        MemoryMapStore::default()
    }

    /// A store of its own that holds `image`: what a reader would find at the moment [`MapStore::load`] returned it.
    pub fn holding(image: &[u8]) -> MemoryMapStore {
        let store = MemoryMapStore::new();
        store.put(image);
        store
    }

    fn put(&self, image: &[u8]) -> Arc<MemoryImage> {
        let (words, cells) = image.split_at(WORDS_BYTES.min(image.len()));
        let word = |bytes: &[u8]| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            AtomicU64::new(u64::from_ne_bytes(word))
        };
        let image = Arc::new(MemoryImage {
            words: words.chunks(8).map(word).collect(),
            cells: cells.iter().map(|&cell| AtomicU8::new(cell)).collect(),
        });
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = Some(image.clone());
        image
    }
}

impl MapStore for MemoryMapStore {
    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        let image = self.image.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(image.as_ref().map(|image| {
            let words = image.words.iter().flat_map(|word| word.load(Ordering::SeqCst).to_ne_bytes());
            words.chain(image.cells.iter().map(|cell| cell.load(Ordering::SeqCst))).collect()
        }))
    }

    fn install(&self, image: &[u8]) -> io::Result<MapArea> {
        Ok(MapArea(Backing::Memory(self.put(image))))
    }
}

/// An installed image, open for marking from any thread.
#[derive(Debug)]
pub struct MapArea(Backing);

#[derive(Debug)]
enum Backing {
    Mapped { map: MmapRaw, _lock: Arc<File> },
    Memory(Arc<MemoryImage>),
}

impl MapArea {
    /// The word at `index` of the image's first page.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < WORDS, "the first page holds {WORDS} words");
        match &self.0 {
            Backing::Memory(image) => &image.words[index],
            Backing::Mapped { map, .. } => {
                assert!(map.len() >= WORDS_BYTES, "an image has at least its first page");
                // SAFETY: the mapping is page aligned, at least one page long (checked above), readable and writable,
                // and lives as long as `self`. All access to these bytes by this process is through atomics of this
                // width. The file is ours alone (locked) and never truncated: it is replaced by rename.
                #[allow(unsafe_code)]
                unsafe {
                    &*map.as_ptr().cast::<AtomicU64>().add(index)
                }
            }
        }
    }

    /// The cells at `range` of the image, in bytes from its start, all of them after its first page.
    pub(crate) fn cells(&self, range: Range<usize>) -> &[AtomicU8] {
        assert!(range.start >= WORDS_BYTES && range.start <= range.end, "the first page has no cells");
        match &self.0 {
            Backing::Memory(image) => &image.cells[range.start - WORDS_BYTES..range.end - WORDS_BYTES],
            Backing::Mapped { map, .. } => {
                assert!(range.end <= map.len(), "cells lie within the image");
                // SAFETY: the range lies within the mapping (checked above), which is readable and writable and lives
                // as long as `self`. `AtomicU8` has the size and alignment of a byte, and all access to these bytes
                // by this process is through it. The file is never truncated (see above).
                #[allow(unsafe_code)]
                unsafe {
                    std::slice::from_raw_parts(map.as_ptr().cast::<AtomicU8>().add(range.start), range.len())
                }
            }
        }
    }

    /// Returns once every mark made so far would survive a power cut.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match &self.0 {
            Backing::Mapped { map, .. } => map.flush(),
            Backing::Memory(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_seen_by_whoever_loads_the_file_next() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut image = vec![0; WORDS_BYTES + 100];
        image[8..16].copy_from_slice(&77u64.to_ne_bytes());
        {
            let store = FileMapStore::open(folder.path(), "maps").expect("open");
            assert!(store.load().expect("readable").is_none());
            let area = store.install(&image).expect("install");
            assert_eq!(area.word(1).load(Ordering::SeqCst), 77);
            area.word(2).store(5, Ordering::SeqCst);
            area.cells(WORDS_BYTES..WORDS_BYTES + 100)[99].store(1, Ordering::Relaxed);
            assert!(matches!(FileMapStore::open(folder.path(), "maps"), Err(MapStoreError::InUse(_))));
            drop(store);
            // The area still holds the lock: its owner may still be marking.
            assert!(matches!(FileMapStore::open(folder.path(), "maps"), Err(MapStoreError::InUse(_))));
        }
        let store = FileMapStore::open(folder.path(), "maps").expect("the lock ends with its holders");
        let found = store.load().expect("readable").expect("installed");
        image[16..24].copy_from_slice(&5u64.to_ne_bytes());
        image[WORDS_BYTES + 99] = 1;
        assert_eq!(found, image);
    }

    #[test]
    fn memory_behaves_as_a_file() {
        let store = MemoryMapStore::new();
        assert!(store.load().expect("readable").is_none());
        let area = store.install(&vec![0; WORDS_BYTES + 10]).expect("install");
        area.word(511).store(9, Ordering::SeqCst);
        area.cells(WORDS_BYTES + 3..WORDS_BYTES + 4)[0].store(1, Ordering::Relaxed);
        let found = store.clone().load().expect("readable").expect("installed");
        assert_eq!(found[511 * 8..WORDS_BYTES], 9u64.to_ne_bytes());
        assert_eq!(found[WORDS_BYTES + 3], 1);
        assert_eq!(MemoryMapStore::holding(&found).load().expect("readable"), Some(found));
    }
}
