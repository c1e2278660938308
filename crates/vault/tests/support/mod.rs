//! A small deterministic world for the vault's tests.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::new_ret_no_self)]

pub mod fixture;
pub mod history;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use vault::keys::{PassphraseCost, WriterRole};
use vault::{ObjectName, ObjectStoreAdapter, OpenKeys, Store, StoreError, UnlockedVault, Vault, WriterSession};
use world::{AppendFile, Clock, Entropy, Files, Monotonic, WallTime};

/// A seeded generator.
pub struct Seeded(Mutex<blake3::OutputReader>);

impl Seeded {
    pub fn new(seed: u64) -> Arc<dyn Entropy> {
        Arc::new(Seeded(Mutex::new(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())))
    }
}

impl Entropy for Seeded {
    fn fill(&self, buffer: &mut [u8]) {
        self.0.lock().unwrap().fill(buffer);
    }
}

/// A clock that stands still until it is moved.
pub struct ManualClock(pub AtomicU64);

impl ManualClock {
    pub fn at(seconds: u64) -> Arc<dyn Clock> {
        Arc::new(ManualClock(AtomicU64::new(seconds)))
    }
}

impl Clock for ManualClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::Relaxed) * 1_000_000_000)
    }

    fn wall(&self) -> WallTime {
        WallTime::from_seconds(self.0.load(Ordering::Relaxed))
    }
}

pub struct World {
    pub store: Arc<dyn Store>,
    pub entropy: Arc<dyn Entropy>,
    pub clock: Arc<dyn Clock>,
    pub unlocked: UnlockedVault,
    pub recovery: vault::RecoveryKey,
}

pub const PASSPHRASE: &str = "correct horse";

impl World {
    pub fn new(seed: u64) -> World {
        World::over(Arc::new(ObjectStoreAdapter::in_memory()), seed)
    }

    pub fn over(store: Arc<dyn Store>, seed: u64) -> World {
        let entropy = Seeded::new(seed);
        let clock = ManualClock::at(1_795_356_187);
        let (unlocked, recovery) =
            Vault::create(Arc::clone(&store), PASSPHRASE, PassphraseCost::TRIVIAL, &entropy, &clock).expect("create");
        World { store, entropy, clock, unlocked, recovery }
    }

    pub fn writer(&self, label: &str) -> (Arc<WriterSession>, Arc<OpenKeys>) {
        self.writer_as(WriterRole::ProcessServer, label)
    }

    pub fn writer_as(&self, role: WriterRole, label: &str) -> (Arc<WriterSession>, Arc<OpenKeys>) {
        let keys = self.unlocked.grant_writer(role, label, &self.entropy, &self.clock).expect("grant");
        self.session_of(keys)
    }

    pub fn session_of(&self, keys: vault::WriterKeys) -> (Arc<WriterSession>, Arc<OpenKeys>) {
        let open = Arc::new(OpenKeys::of_writer(&keys));
        let session = WriterSession::new(keys, Arc::clone(&self.entropy), Arc::clone(&self.clock)).expect("session");
        (Arc::new(session), open)
    }

    pub fn all_names(&self) -> Vec<ObjectName> {
        self.store.list("", None, usize::MAX).expect("list")
    }
}

/// Overwrites: what no vault may be put on.
pub struct Overwriting(Mutex<BTreeMap<ObjectName, Bytes>>);

impl Overwriting {
    pub fn new() -> Overwriting {
        Overwriting(Mutex::new(BTreeMap::new()))
    }
}

impl Store for Overwriting {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        self.0.lock().unwrap().insert(name.clone(), parts.concat().into());
        Ok(())
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        let objects = self.0.lock().unwrap();
        let bytes = objects.get(name).ok_or_else(|| StoreError::NotFound(name.clone()))?;
        let end = (range.end as usize).min(bytes.len());
        Ok(bytes.slice((range.start as usize).min(end)..end))
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        let objects = self.0.lock().unwrap();
        Ok(objects.get(name).ok_or_else(|| StoreError::NotFound(name.clone()))?.len() as u64)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        let objects = self.0.lock().unwrap();
        let fits = |name: &&ObjectName| name.as_str().starts_with(prefix) && after.is_none_or(|after| *name > after);
        Ok(objects.keys().filter(fits).take(limit).cloned().collect())
    }

    fn describe(&self) -> String {
        "a store that overwrites".into()
    }
}

/// Honours create-only as long as nobody races: checks, waits for the others to have checked too, writes.
pub struct ChecksThenWrites(pub Overwriting);

impl Store for ChecksThenWrites {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        if self.0.size(name).is_ok() {
            return Err(StoreError::AlreadyExists(name.clone()));
        }
        for _ in 0..2000 {
            std::thread::yield_now();
        }
        self.0.create(name, parts)
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.0.read(name, range)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.0.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.0.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        "a store that checks, then writes".into()
    }
}

/// A store of which a test can damage objects behind everyone's back, and that can lose answers.
pub struct Fragile {
    pub inner: Overwriting,
    /// The next create succeeds and reports failure.
    pub lose_next_answer: Mutex<bool>,
    pub requests: AtomicU64,
}

impl Fragile {
    pub fn new() -> Arc<Fragile> {
        Arc::new(Fragile {
            inner: Overwriting::new(),
            lose_next_answer: Mutex::new(false),
            requests: AtomicU64::new(0),
        })
    }

    pub fn set(&self, name: &ObjectName, bytes: Bytes) {
        self.inner.create(name, &[bytes]).expect("memory takes everything");
    }

    pub fn remove(&self, name: &ObjectName) {
        self.inner.0.lock().unwrap().remove(name);
    }
}

impl Store for Fragile {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if self.inner.size(name).is_ok() {
            return Err(StoreError::AlreadyExists(name.clone()));
        }
        self.inner.create(name, parts)?;
        match std::mem::take(&mut *self.lose_next_answer.lock().unwrap()) {
            true => Err(StoreError::Unavailable { at: name.to_string(), source: "the answer was lost".into() }),
            false => Ok(()),
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.inner.read(name, range)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        "fragile memory".into()
    }
}

/// Files that forget at a power cut whatever was not synced, and that can be told to skip a kind of sync.
#[derive(Clone, Default)]
pub struct ForgetfulFiles(Arc<Mutex<Disk>>);

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Skip {
    #[default]
    Nothing,
    FileSync,
    DirectorySync,
    ParentOfDirectorySync,
}

#[derive(Default)]
struct Disk {
    skip: Skip,
    /// Inode contents: (all bytes, durable bytes).
    inodes: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names as running programs see them, and as they are on the medium. Directories end in '/'.
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    directories: BTreeSet<String>,
    durable_directories: BTreeSet<String>,
}

impl ForgetfulFiles {
    pub fn skipping(skip: Skip) -> ForgetfulFiles {
        let files = ForgetfulFiles::default();
        files.0.lock().unwrap().skip = skip;
        files
    }

    pub fn set_skip(&self, skip: Skip) {
        self.0.lock().unwrap().skip = skip;
    }

    pub fn cut_power(&self) {
        let mut disk = self.0.lock().unwrap();
        for (all, durable) in &mut disk.inodes {
            all.clone_from(durable);
        }
        disk.directories = disk.durable_directories.clone();
        // A name is reachable only if every directory above it survived.
        let reachable = |path: &str, directories: &BTreeSet<String>| {
            path.match_indices('/').all(|(end, _)| directories.contains(&path[..end]))
        };
        let directories: BTreeSet<String> =
            disk.directories.iter().filter(|path| reachable(path, &disk.directories)).cloned().collect();
        disk.names = disk
            .durable_names
            .iter()
            .filter(|(path, _)| reachable(path, &directories))
            .map(|(k, v)| (k.clone(), *v))
            .collect();
        disk.directories = directories;
    }

    fn sync_names(&self, path: &str) {
        let mut disk = self.0.lock().unwrap();
        let directly = |name: &str| name.rsplit_once('/').map_or("", |(parent, _)| parent) == path;
        let names: BTreeMap<String, usize> =
            disk.names.iter().filter(|(name, _)| directly(name)).map(|(k, v)| (k.clone(), *v)).collect();
        disk.durable_names.retain(|name, _| !directly(name));
        disk.durable_names.extend(names);
        let directories: Vec<String> = disk.directories.iter().filter(|name| directly(name)).cloned().collect();
        disk.durable_directories.extend(directories);
    }

    /// As a process that made a directory and was killed before it synced the parent.
    pub fn create_directory_and_die(&self, path: &str) {
        self.0.lock().unwrap().directories.insert(path.to_owned());
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

struct ForgetfulFile(Arc<Mutex<Disk>>, usize);

impl AppendFile for ForgetfulFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().inodes[self.1].0.extend_from_slice(bytes);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        if disk.skip != Skip::FileSync {
            let all = disk.inodes[self.1].0.clone();
            disk.inodes[self.1].1 = all;
        }
        Ok(())
    }
}

impl Files for ForgetfulFiles {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        let mut disk = self.0.lock().unwrap();
        if let Some((parent, _)) = path.rsplit_once('/')
            && !disk.directories.contains(parent)
        {
            return Err(not_found());
        }
        if disk.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        disk.inodes.push(Default::default());
        let inode = disk.inodes.len() - 1;
        disk.names.insert(path.to_owned(), inode);
        Ok(Box::new(ForgetfulFile(Arc::clone(&self.0), inode)))
    }

    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let disk = self.0.lock().unwrap();
        let inode = *disk.names.get(path).ok_or_else(not_found)?;
        Ok(disk.inodes[inode].0.clone())
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let all = self.read(path)?;
        let start = offset as usize;
        all.get(start..start + len).map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn len(&self, path: &str) -> io::Result<u64> {
        Ok(self.read(path)?.len() as u64)
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let inode = *disk.names.get(from).ok_or_else(not_found)?;
        if disk.names.contains_key(to) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        disk.names.insert(to.to_owned(), inode);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let inode = disk.names.remove(from).ok_or_else(not_found)?;
        disk.names.insert(to.to_owned(), inode);
        Ok(())
    }

    fn remove(&self, path: &str) -> io::Result<()> {
        self.0.lock().unwrap().names.remove(path).map(drop).ok_or_else(not_found)
    }

    fn create_directory(&self, path: &str) -> io::Result<()> {
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        for end in ends {
            let new = self.0.lock().unwrap().directories.insert(path[..end].to_owned());
            if new && self.0.lock().unwrap().skip != Skip::ParentOfDirectorySync {
                self.sync_names(path[..end].rsplit_once('/').map_or("", |(parent, _)| parent));
            }
        }
        Ok(())
    }

    fn sync_directory(&self, path: &str) -> io::Result<()> {
        let skip = self.0.lock().unwrap().skip;
        // A directory of objects, or one that only holds directories.
        let skipped = match skip {
            Skip::DirectorySync => path.contains("leaf"),
            Skip::ParentOfDirectorySync => !path.contains("leaf"),
            Skip::Nothing | Skip::FileSync => false,
        };
        if !skipped {
            self.sync_names(path);
        }
        Ok(())
    }

    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        let disk = self.0.lock().unwrap();
        Ok(children(disk.names.keys(), path))
    }

    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        let disk = self.0.lock().unwrap();
        Ok(children(disk.directories.iter(), path))
    }
}

fn children<'a>(all: impl Iterator<Item = &'a String>, path: &str) -> Vec<String> {
    let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
    all.filter_map(|name| name.strip_prefix(&prefix))
        .filter(|rest| !rest.is_empty() && !rest.contains('/'))
        .map(str::to_owned)
        .collect()
}
