//! One suite that every store passes, and the proof that it notices stores that should not.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proptest::prelude::*;
use support::{ChecksThenWrites, ForgetfulFiles, Overwriting, Seeded, Skip};
use vault::store::probe_create_only_sequentially;
use vault::{
    ChainWriter, CheckpointWish, Delta, FolderStore, ObjectName, ObjectStoreAdapter, Store, StoreError, VaultError,
    probe_create_only,
};
use world::Files;

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).expect("a name")
}

fn conforms(store: &dyn Store) {
    // Create, read, size, ranges.
    let a = name("a/b/one");
    store.create(&a, &[Bytes::from_static(b"hello "), Bytes::new(), Bytes::from_static(b"world")]).expect("create");
    assert_eq!(store.read_all(&a).expect("read"), "hello world");
    assert_eq!(store.size(&a).expect("size"), 11);
    for (range, bytes) in [(0..5, "hello"), (6..11, "world"), (6..100, "world"), (11..20, ""), (50..60, ""), (3..3, "")]
    {
        assert_eq!(store.read(&a, range.clone()).expect("range"), bytes, "{range:?}");
    }
    // Names stay taken, with the same bytes.
    let again = store.create(&a, &[Bytes::from_static(b"other")]);
    assert!(matches!(again, Err(StoreError::AlreadyExists(taken)) if taken == a));
    assert_eq!(store.read_all(&a).expect("read"), "hello world");
    // What is not there.
    let missing = name("a/b/two");
    assert!(matches!(store.read(&missing, 0..9), Err(StoreError::NotFound(_))));
    assert!(matches!(store.read_all(&missing), Err(StoreError::NotFound(_))));
    assert!(matches!(store.size(&missing), Err(StoreError::NotFound(_))));
    assert!(matches!(store.read_all(&name("a/b/one/below")), Err(StoreError::NotFound(_))));
    // An empty object is an object.
    store.create(&missing, &[]).expect("create empty");
    assert_eq!(store.size(&missing).expect("size"), 0);
    assert_eq!(store.read_all(&missing).expect("read"), "");
    // Listings: sorted by the bytes of the whole name, also where '/' meets '.' and '-'.
    for text in ["x", "a/b.c", "a/b-c", "a/b/c/d", "a/c", "ab/z", "chains/1/m/0", "chains/1/s/0", "chains/10/m/0"] {
        store.create(&name(text), &[Bytes::from_static(b"x")]).expect("create");
    }
    let all = store.list("", None, usize::MAX).expect("list");
    let mut sorted = all.clone();
    sorted.sort();
    assert_eq!(all, sorted);
    assert_eq!(all.len(), 11);
    for prefix in ["", "a/", "a/b/", "ab/", "chains/1/", "nothing/"] {
        let below: Vec<ObjectName> = all.iter().filter(|name| name.as_str().starts_with(prefix)).cloned().collect();
        assert_eq!(store.list(prefix, None, usize::MAX).expect("list"), below, "{prefix}");
        for limit in 0..4 {
            for after in all.iter().chain([&name("a/b"), &name("a/b/zz"), &name("zz")]) {
                let expected: Vec<ObjectName> =
                    below.iter().filter(|name| *name > after).take(limit).cloned().collect();
                assert_eq!(store.list(prefix, Some(after), limit).expect("list"), expected, "{prefix} {after}");
            }
        }
    }
    probe_create_only(store, Seeded::new(1).as_ref()).expect("honours create-only");
    assert!(!store.describe().is_empty());
}

#[test]
fn the_folder_store_conforms() {
    let folder = tempfile::tempdir().expect("a folder");
    // Things that other programs leave in folders are not objects.
    for stranger in [".hidden", "UPPER", "half.1.partial", "a b"] {
        std::fs::write(folder.path().join(stranger), b"x").expect("write");
    }
    conforms(&FolderStore::open(folder.path(), Seeded::new(1).as_ref()).expect("open"));
}

#[test]
fn the_folder_store_over_simulated_files_conforms() {
    conforms(&FolderStore::new(Arc::new(ForgetfulFiles::default()), Seeded::new(1).as_ref(), "simulated"));
}

#[test]
fn the_memory_store_conforms() {
    conforms(&ObjectStoreAdapter::in_memory());
}

#[test]
fn a_store_that_overwrites_is_refused() {
    let store = Overwriting::new();
    assert!(matches!(
        probe_create_only_sequentially(&store, Seeded::new(1).as_ref()),
        Err(StoreError::NotCreateOnly(_))
    ));
    let error = probe_create_only(&store, Seeded::new(1).as_ref()).expect_err("it overwrites");
    assert!(error.to_string().contains("does not honour create-only"), "{error}");
}

#[test]
fn a_store_that_overwrites_only_under_races_is_refused_too() {
    let store = ChecksThenWrites(Overwriting::new());
    probe_create_only_sequentially(&store, Seeded::new(1).as_ref()).expect("looks fine in sequence");
    assert!(matches!(probe_create_only(&store, Seeded::new(2).as_ref()), Err(StoreError::NotCreateOnly(_))));
}

#[test]
fn a_place_that_is_no_folder_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, b"x").expect("write");
    for (path, reason) in [(file, "not a folder"), (folder.path().join("missing"), "no such folder")] {
        let error = FolderStore::open(&path, Seeded::new(1).as_ref()).err().expect("refused");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

/// Creates objects, cuts the power, and tells whether every created object is still there.
fn survives(files: &ForgetfulFiles, names: &[&str]) -> bool {
    let store = FolderStore::new(Arc::new(files.clone()), Seeded::new(7).as_ref(), "x");
    for text in names {
        store.create(&name(text), &[Bytes::from(text.to_string())]).expect("create");
    }
    files.cut_power();
    names.iter().all(|text| store.read_all(&name(text)).is_ok_and(|bytes| bytes == text.as_bytes()))
}

const NAMES: [&str; 3] = ["leaf", "a/leaf/one", "a/b/leaf/two"];

#[test]
fn what_create_reported_survives_a_power_cut() {
    assert!(survives(&ForgetfulFiles::default(), &NAMES));
    // A directory left by a process that was killed between mkdir and fsync.
    let files = ForgetfulFiles::default();
    files.create_directory_and_die("a");
    files.create_directory_and_die("a/leaf");
    assert!(survives(&files, &["a/leaf/one"]));
}

#[test]
fn every_forgotten_sync_is_noticed() {
    for skip in [Skip::FileSync, Skip::DirectorySync, Skip::ParentOfDirectorySync] {
        assert!(!survives(&ForgetfulFiles::skipping(skip), &NAMES), "{skip:?} was not noticed");
    }
}

#[test]
fn a_name_reported_as_taken_survives_a_power_cut() {
    // Linked by a process that was killed before it synced the directory; the retry finds the name taken, and its
    // caller will recognise the object as its own and acknowledge it.
    let files = ForgetfulFiles::skipping(Skip::DirectorySync);
    let store = FolderStore::new(Arc::new(files.clone()), Seeded::new(7).as_ref(), "x");
    store.create(&name("a/leaf/one"), &[Bytes::from_static(b"x")]).expect("create");
    files.set_skip(Skip::Nothing);
    let again = FolderStore::new(Arc::new(files.clone()), Seeded::new(8).as_ref(), "x");
    assert!(matches!(again.create(&name("a/leaf/one"), &[]), Err(StoreError::AlreadyExists(_))));
    files.cut_power();
    assert_eq!(again.read_all(&name("a/leaf/one")).expect("still there"), "x");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn folder_listings_equal_a_sorted_set(
        texts in prop::collection::btree_set("[a-c]{1,2}(/[a-c.-]{1,2}){0,3}", 1..12), after in "[a-c]{1,2}(/[a-c]{1,2}){0,2}", limit in 0usize..8,
    ) {
        let store = FolderStore::new(Arc::new(ForgetfulFiles::default()), Seeded::new(1).as_ref(), "x");
        let mut expected = std::collections::BTreeSet::new();
        for text in texts {
            // A name below an object's name needs the same path as file and folder, which no folder can hold.
            let clash = expected.iter().any(|other: &ObjectName| {
                other.as_str().starts_with(&format!("{text}/")) || text.starts_with(&format!("{other}/"))
            });
            if let Ok(name) = ObjectName::new(&text) && !clash {
                store.create(&name, &[]).expect("create");
                expected.insert(name);
            }
        }
        let after = name(&after);
        let listed = store.list("", Some(&after), limit).expect("list");
        prop_assert_eq!(listed, expected.into_iter().filter(|name| *name > after).take(limit).collect::<Vec<_>>());
    }
}

/// Files on a disk that is full, until somebody makes room.
#[derive(Clone)]
struct FullDisk(ForgetfulFiles, Arc<AtomicBool>);

impl FullDisk {
    fn check(&self) -> std::io::Result<()> {
        match self.1.load(Ordering::Relaxed) {
            true => Err(std::io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl Files for FullDisk {
    fn create_new(&self, path: &str) -> std::io::Result<Box<dyn world::AppendFile>> {
        self.check()?;
        self.0.create_new(path)
    }

    fn read(&self, path: &str) -> std::io::Result<Vec<u8>> {
        self.0.read(path)
    }

    fn read_at(&self, path: &str, offset: u64, len: usize) -> std::io::Result<Vec<u8>> {
        self.0.read_at(path, offset, len)
    }

    fn len(&self, path: &str) -> std::io::Result<u64> {
        self.0.len(path)
    }

    fn link(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.0.link(from, to)
    }

    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, path: &str) -> std::io::Result<()> {
        self.0.remove(path)
    }

    fn create_directory(&self, path: &str) -> std::io::Result<()> {
        self.0.create_directory(path)
    }

    fn sync_directory(&self, path: &str) -> std::io::Result<()> {
        self.0.sync_directory(path)
    }

    fn list_files(&self, path: &str) -> std::io::Result<Vec<String>> {
        self.0.list_files(path)
    }

    fn list_directories(&self, path: &str) -> std::io::Result<Vec<String>> {
        self.0.list_directories(path)
    }
}

#[test]
fn a_full_disk_is_said_and_retried_and_the_commit_is_the_same() {
    let full = Arc::new(AtomicBool::new(false));
    let files = FullDisk(ForgetfulFiles::default(), Arc::clone(&full));
    let store: Arc<dyn Store> = Arc::new(FolderStore::new(Arc::new(files), Seeded::new(1).as_ref(), "full"));
    let world = support::World::over(Arc::clone(&store), 3);
    let (session, keys) = world.writer("ps");
    let genesis = (support::history::MACHINE, None);
    let chain = support::history::CHAIN;
    let mut writer = ChainWriter::create(&store, &session, &keys, chain, genesis, Delta::default()).expect("create");
    let prepared = writer.prepare(writer.begin(), Delta::default(), CheckpointWish::WhenDue).expect("prepare");
    full.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        let refused = writer.put(&prepared).expect_err("full");
        let VaultError::Store(error @ StoreError::Full { .. }) = &refused else { panic!("{refused}") };
        assert!(error.is_retryable() && refused.to_string().contains("the store is full"), "{refused}");
    }
    assert!(!writer.is_fenced());
    full.store(false, Ordering::Relaxed);
    writer.put(&prepared).expect("the same bytes, once there is room");
    assert_eq!(writer.head().nonce, prepared.nonce);
}
