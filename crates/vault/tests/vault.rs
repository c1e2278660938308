//! Keys, objects and the vault as a whole: what opens, what does not, and what is noticed.

mod support;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use support::{Fragile, ManualClock, PASSPHRASE, Seeded, World};
use vault::keys::{PassphraseCost, SlotKind, WriterKeysError, WriterRole};
use vault::object::verify_body_without_keys;
use vault::{
    Compression, Credential, Damage, FolderStore, FrameClass, ObjectBuilder, ObjectKind, ObjectName, ObjectReader,
    OpenKeys, Placement, RecoveryKey, SealedObject, Store, Vault, VaultError, WriterKeys, WriterSession,
};

#[test]
fn passphrase_and_recovery_key_open_it_and_nothing_else_does() {
    let world = World::new(1);
    let vault = Vault::open(Arc::clone(&world.store)).expect("open");
    for credential in [Credential::Passphrase(PASSPHRASE), Credential::Recovery(&world.recovery)] {
        let unlocked = vault.unlock(credential).expect("unlock");
        assert!(unlocked.keys().is_unlocked());
        vault.check_key(credential).expect("check");
    }
    let typed = RecoveryKey::parse(&world.recovery.to_words()).expect("words");
    vault.check_key(Credential::Recovery(&typed)).expect("typed from paper");

    assert!(matches!(vault.check_key(Credential::Passphrase("wrong")), Err(VaultError::WrongPassphrase)));
    let other = World::new(2).recovery;
    assert!(matches!(vault.check_key(Credential::Recovery(&other)), Err(VaultError::WrongRecoveryKey)));

    let World { unlocked, entropy, clock, .. } = &world;
    unlocked.add_passphrase("second", SlotKind::Passphrase(PassphraseCost::TRIVIAL), entropy, clock).expect("add");
    for passphrase in [PASSPHRASE, "second"] {
        vault.check_key(Credential::Passphrase(passphrase)).expect(passphrase);
    }
    assert_eq!(vault.fingerprint(), world.unlocked.vault().fingerprint());
    assert_ne!(vault.fingerprint(), World::new(2).unlocked.vault().fingerprint());
}

#[test]
fn a_changed_passphrase_opens_and_the_old_one_does_not() {
    let world = World::new(1);
    let World { unlocked, entropy, clock, .. } = &world;
    let vault = unlocked.vault();
    let change = |old: &str, new: &str| unlocked.change_passphrase(old, new, PassphraseCost::TRIVIAL, entropy, clock);
    assert!(matches!(change("no such one", "new"), Err(VaultError::WrongPassphrase)));
    change(PASSPHRASE, "new").expect("change");
    assert!(matches!(vault.check_key(Credential::Passphrase(PASSPHRASE)), Err(VaultError::WrongPassphrase)));
    vault.check_key(Credential::Passphrase("new")).expect("the new one opens");
    vault.check_key(Credential::Recovery(&world.recovery)).expect("paper still opens");
    assert!(matches!(change(PASSPHRASE, "third"), Err(VaultError::WrongPassphrase)));
    let slots: Vec<bool> = vault.slots().expect("slots").iter().map(|slot| slot.superseded).collect();
    assert_eq!((slots.len(), slots.iter().filter(|superseded| **superseded).count()), (3, 1));
}

#[test]
fn a_passphrase_for_reading_opens_the_read_key_only() {
    let world = World::new(1);
    let World { unlocked, entropy, clock, .. } = &world;
    let kind = SlotKind::ReadPassphrase(PassphraseCost::TRIVIAL);
    unlocked.add_passphrase("reader", kind, entropy, clock).expect("add");
    let reader = unlocked.vault().unlock(Credential::Passphrase("reader")).expect("unlock");
    assert!(reader.keys().is_unlocked() && !reader.is_owner());
    assert!(matches!(reader.add_passphrase("x", kind, entropy, clock), Err(VaultError::OwnerKeyNeeded)));
    assert!(matches!(reader.owner_session(entropy, clock), Err(VaultError::OwnerKeyNeeded)));
    let handed = unlocked.vault().unlock_reading(unlocked.read_secret().clone()).expect("the same key");
    assert!(handed.keys().is_unlocked() && !handed.is_owner());
    let other = World::new(2);
    let foreign = unlocked.vault().unlock_reading(other.unlocked.read_secret().clone());
    assert!(matches!(foreign.err().expect("refused"), VaultError::Foreign { .. }));
    // Changed by whoever has the owner's key, it stays one for reading.
    unlocked.change_passphrase("reader", "reader two", PassphraseCost::TRIVIAL, entropy, clock).expect("change");
    assert!(!unlocked.vault().unlock(Credential::Passphrase("reader two")).expect("unlock").is_owner());
}

#[test]
fn a_copy_of_the_folder_is_the_vault() {
    let (original, copy) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let entropy = Seeded::new(5);
    let world = World::over(Arc::new(FolderStore::open(original.path(), entropy.as_ref()).expect("open")), 5);
    copy_folder(original.path(), copy.path());
    let store: Arc<dyn Store> = Arc::new(FolderStore::open(copy.path(), entropy.as_ref()).expect("open"));
    let vault = Vault::open(store).expect("open");
    assert_eq!(vault.id(), world.unlocked.vault().id());
    vault.check_key(Credential::Recovery(&world.recovery)).expect("opens");
}

fn copy_folder(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            std::fs::create_dir(&target).expect("mkdir");
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copy");
        }
    }
}

fn open_error(store: &Arc<Fragile>) -> String {
    Vault::open(Arc::clone(store) as Arc<dyn Store>).err().expect("refused").to_string()
}

#[test]
fn what_is_no_vault_says_what_it_is() {
    let name = ObjectName::new("vault").expect("a name");
    let empty = Fragile::new();
    assert!(open_error(&empty).contains("it is empty"));
    let files = Fragile::new();
    files.set(&ObjectName::new("photo.jpg").expect("a name"), Bytes::from_static(b"x"));
    assert!(open_error(&files).contains("no vault header"));
    let refused = Vault::create(files, "p", PassphraseCost::TRIVIAL, &Seeded::new(1), &ManualClock::at(1));
    assert!(refused.err().expect("refused").to_string().contains("photo.jpg"));
    let garbage = Fragile::new();
    garbage.set(&name, Bytes::from_static(b"garbage"));
    assert!(open_error(&garbage).contains("not a vault header"));

    let store = Fragile::new();
    let _world = World::over(Arc::clone(&store) as Arc<dyn Store>, 3);
    let header = store.read_all(&name).expect("header");
    let mut newer = header.to_vec();
    newer[8] = 2;
    store.set(&name, newer.into());
    assert!(open_error(&store).contains("format version 2"), "{}", open_error(&store));
    let mut feature = header.to_vec();
    feature[14 + 3] = 1;
    store.set(&name, feature.into());
    assert!(open_error(&store).contains("feature bits 0x1000000"), "{}", open_error(&store));
    store.set(&name, header.slice(..50));
    assert!(open_error(&store).contains("ends after 50"), "{}", open_error(&store));
    store.set(&name, header);
    let again = Vault::create(store, "p", PassphraseCost::TRIVIAL, &Seeded::new(1), &ManualClock::at(1));
    assert!(matches!(again, Err(VaultError::AlreadyAVault { .. })));
}

#[test]
fn every_flipped_byte_of_header_and_keys_is_noticed() {
    let store = Fragile::new();
    let world = World::over(Arc::clone(&store) as Arc<dyn Store>, 3);
    for name in world.all_names() {
        let bytes = store.read_all(&name).expect("read");
        for index in 0..bytes.len() {
            let mut changed = bytes.to_vec();
            changed[index] ^= 0x20;
            store.set(&name, changed.into());
            // The slot of the other credential may be damaged: then this one still opens.
            let unlocked = Vault::open(Arc::clone(&store) as Arc<dyn Store>).and_then(|vault| {
                vault.check_key(Credential::Passphrase(PASSPHRASE))?;
                vault.check_key(Credential::Recovery(&world.recovery))
            });
            assert!(unlocked.is_err(), "byte {index} of {name}");
        }
        store.set(&name, bytes);
    }
}

fn object(session: &WriterSession, name: &str, contents: &[&[u8]]) -> (SealedObject, Vec<vault::FrameRef>) {
    let name = ObjectName::new(name).expect("a name");
    let mut builder = ObjectBuilder::new(session, Placement::of_vault(ObjectKind::Pack), name);
    let frames: Vec<vault::FrameRef> = contents
        .iter()
        .enumerate()
        .map(|(index, content)| {
            let class = if index % 2 == 0 { FrameClass::Data } else { FrameClass::Index };
            builder.add(class, content, Compression::Fast).expect("add")
        })
        .collect();
    let root = frames.last().copied();
    (builder.finish(root), frames)
}

#[test]
fn a_writer_cannot_read_data_and_a_reader_can() {
    let world = World::new(1);
    let (session, writer_keys) = world.writer("ps");
    let (sealed, frames) = object(&session, "packs/x", &[b"disk data", b"index"]);
    sealed.put(world.store.as_ref()).expect("put");
    sealed.put(world.store.as_ref()).expect("a lost answer is recognised");
    let (other, _) = object(&session, "packs/x", &[b"disk data", b"index"]);
    assert!(other.put(world.store.as_ref()).is_err(), "the same content sealed again is another object");

    let name = ObjectName::new("packs/x").expect("a name");
    let reader = ObjectReader::open(&world.store, world.unlocked.keys(), &name).expect("open");
    assert_eq!(reader.frame(&frames[0]).expect("data"), "disk data");
    assert_eq!(reader.root().expect("root"), "index");
    reader.verify_body().expect("body");
    let locked = ObjectReader::open(&world.store, &writer_keys, &name).expect("open");
    assert_eq!(locked.root().expect("root"), "index");
    assert!(matches!(locked.frame(&frames[0]), Err(VaultError::Locked { .. })));
    verify_body_without_keys(world.store.as_ref(), &name).expect("keyless");
}

#[test]
fn a_data_key_lives_for_an_hour() {
    let world = World::new(1);
    let clock = Arc::new(support::ManualClock(std::sync::atomic::AtomicU64::new(3599)));
    let keys = world.unlocked.grant_writer(WriterRole::BranchHost, "b", &world.entropy, &world.clock).expect("grant");
    let session = WriterSession::new(keys, Arc::clone(&world.entropy), Arc::clone(&clock) as _).expect("session");
    let mut recipients = Vec::new();
    for (index, seconds) in [3599, 3599, 3600].into_iter().enumerate() {
        clock.0.store(seconds, std::sync::atomic::Ordering::Relaxed);
        let (sealed, frames) = object(&session, &format!("packs/{index}"), &[b"data"]);
        sealed.put(world.store.as_ref()).expect("put");
        let reader = ObjectReader::open(&world.store, world.unlocked.keys(), &sealed.name).expect("open");
        assert_eq!(reader.frame(&frames[0]).expect("data"), "data");
        recipients.push(reader.header().recipients.clone());
    }
    assert_eq!(recipients[0], recipients[1]);
    assert_ne!(recipients[1], recipients[2]);
}

#[test]
fn objects_of_strangers_and_moved_objects_are_not_accepted() {
    let store = Fragile::new();
    let world = World::over(Arc::clone(&store) as Arc<dyn Store>, 1);
    let dynamic: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
    let (session, _) = world.writer("ps");
    let (sealed, _) = object(&session, "packs/x", &[b"a", b"b"]);
    sealed.put(store.as_ref()).expect("put");
    let moved = ObjectName::new("packs/y").expect("a name");
    store.set(&moved, store.read_all(&sealed.name).expect("read"));
    let error = ObjectReader::open(&dynamic, world.unlocked.keys(), &moved).err().expect("refused");
    assert!(matches!(error, VaultError::Damaged { damage: Damage::Signature, .. }), "{error}");

    // A writer of another vault, and one whose grant is not in this vault.
    let other = World::new(2);
    let (stranger, _) = other.writer("stranger");
    let (foreign, _) = object(&stranger, "packs/z", &[b"a"]);
    foreign.put(store.as_ref()).expect("put");
    let error = ObjectReader::open(&dynamic, world.unlocked.keys(), &foreign.name).err().expect("refused");
    assert!(matches!(error, VaultError::Foreign { .. }), "{error}");
    store.remove(&vault::layout::grant(session.keys().writer()));
    let keys = OpenKeys::of_writer(session.keys());
    let error = ObjectReader::open(&dynamic, &keys, &sealed.name).err().expect("refused");
    assert!(error.to_string().contains("no grant"), "{error}");
}

#[test]
fn every_flipped_byte_of_an_object_is_noticed_with_and_without_keys() {
    let store = Fragile::new();
    let world = World::over(Arc::clone(&store) as Arc<dyn Store>, 1);
    let dynamic: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
    let (session, _) = world.writer("ps");
    let (sealed, frames) = object(&session, "packs/x", &[&[7; 300], b"index"]);
    sealed.put(store.as_ref()).expect("put");
    let bytes = store.read_all(&sealed.name).expect("read");
    let body_start = sealed.parts[0].len();
    for index in 0..bytes.len() {
        let mut changed = bytes.to_vec();
        changed[index] ^= 1;
        store.set(&sealed.name, changed.into());
        let read = ObjectReader::open(&dynamic, world.unlocked.keys(), &sealed.name)
            .and_then(|reader| frames.iter().try_for_each(|frame| reader.frame(frame).map(drop)));
        assert!(read.is_err(), "byte {index}");
        if index >= body_start {
            assert!(verify_body_without_keys(store.as_ref(), &sealed.name).is_err(), "byte {index}");
        }
    }
    for length in 0..bytes.len() {
        store.set(&sealed.name, bytes.slice(..length));
        assert!(verify_body_without_keys(store.as_ref(), &sealed.name).is_err(), "cut to {length}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_object_bytes_are_answered(
        garbage in prop::collection::vec(any::<u8>(), 0..400), keep in 0usize..300, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let store = Fragile::new();
        let world = World::over(Arc::clone(&store) as Arc<dyn Store>, 1);
        let dynamic: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
        let (session, _) = world.writer("ps");
        let (sealed, _) = object(&session, "packs/x", &[b"data", b"index"]);
        let mut bytes = sealed.parts.concat();
        for (index, value) in flips {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        let spliced = [&bytes[..keep.min(bytes.len())], &garbage].concat();
        for bytes in [garbage, spliced, bytes] {
            store.set(&sealed.name, bytes.clone().into());
            let _ = ObjectReader::open(&dynamic, world.unlocked.keys(), &sealed.name).map(|reader| reader.root());
            let _ = verify_body_without_keys(store.as_ref(), &sealed.name);
            store.set(&vault::layout::vault_header(), bytes.clone().into());
            let _ = Vault::open(Arc::clone(&dynamic));
            let _ = WriterKeys::from_bytes(&bytes);
        }
    }
}

#[test]
fn key_files_read_back_and_damage_is_noticed() {
    let world = World::new(1);
    let keys =
        world.unlocked.grant_writer(WriterRole::ProcessServer, "ps", &world.entropy, &world.clock).expect("grant");
    let bytes = keys.to_bytes();
    let read = WriterKeys::from_bytes(&bytes).expect("reads");
    assert_eq!(read.to_bytes().as_slice(), bytes.as_slice());
    assert!(matches!(
        WriterKeys::from_bytes(b"something else entirely, and long enough too"),
        Err(WriterKeysError::NotAKeyFile)
    ));
    for index in 0..bytes.len() {
        let mut changed = bytes.to_vec();
        changed[index] ^= 4;
        assert!(WriterKeys::from_bytes(&changed).is_err(), "byte {index}");
    }
    assert!(!format!("{keys:?}").contains(&format!("{:?}", keys.signing.expose())), "secrets are not printed");
}

/// A small vault of format version 1, as it was written when the format was settled. It must stay readable for ever.
/// `FARSHORE_WRITE_FIXTURES=1` writes it anew, which is right only while the version is not released.
#[test]
fn the_fixture_of_version_1_reads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vault-v1");
    if std::env::var_os("FARSHORE_WRITE_FIXTURES").is_some() {
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("mkdir");
        let store = FolderStore::open(&folder, Seeded::new(9).as_ref()).expect("open");
        let world = World::over(Arc::new(store), 42);
        support::history::write(&world);
    }
    let store: Arc<dyn Store> = Arc::new(FolderStore::open(&folder, Seeded::new(9).as_ref()).expect("open"));
    let vault = Vault::open(Arc::clone(&store)).expect("open");
    let unlocked = vault.unlock(Credential::Passphrase(PASSPHRASE)).expect("unlock");
    support::history::check(&store, unlocked.keys());
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    // What the simulation relies on: nothing depends on the machine, the hour, or what was compressed before.
    let worlds = [World::new(42), World::new(42)];
    worlds.iter().for_each(support::history::write);
    assert_eq!(worlds[0].all_names(), worlds[1].all_names());
    for name in worlds[0].all_names() {
        let [one, two] = worlds.each_ref().map(|world| world.store.read_all(&name).expect("read"));
        assert_eq!(one, two, "{name}");
    }
}
