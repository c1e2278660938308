//! What a revoked writer still can do with the name keys it has, and that everybody else finds the next one.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use replication::ChainId;
use support::fixture::{Fixture, delta, same};
use support::history::{CHAIN, MACHINE};
use support::{PASSPHRASE, World};
use vault::chain::Alarm;
use vault::keys::{NameEpoch, WriterId, WriterRole, WriterSession};
use vault::numbered::NumberedNames;
use vault::revoke::{Revoked, revoke_writer};
use vault::{
    Catalog, CatalogEntry, ChainHistory, ChainWriter, CheckpointWish, Credential, Delta, ObjectName, OpenKeys, Store,
    StoreError, Vault, VaultError, WriterKeys,
};

type Writer = (Arc<WriterSession>, Arc<OpenKeys>);

fn revoke(world: &World, writer: &Writer) -> Result<Revoked, VaultError> {
    let id = writer.0.keys().writer();
    revoke_writer(&world.unlocked, id, "its host was stolen", &world.entropy, &world.clock)
}

fn note(text: &str) -> CatalogEntry {
    CatalogEntry::Note { text: text.into() }
}

fn commit(writer: &mut ChainWriter) {
    let next = delta(writer);
    writer.commit(CheckpointWish::WhenDue, |_| Ok(next.clone())).expect("commit");
}

/// Whoever opens the vault anew, with the read key alone.
fn reader(fixture: &Fixture) -> Arc<OpenKeys> {
    let vault = Vault::open(Arc::clone(&fixture.store)).expect("open");
    let unlocked = vault.unlock(Credential::Passphrase(PASSPHRASE)).expect("unlock").without_owner();
    Arc::clone(vault.unlock_reading(unlocked.read_secret().clone()).expect("unlock").keys())
}

#[test]
fn a_revoked_writer_burns_numbers_until_the_next_generation_and_none_after() {
    let fixture = Fixture::new();
    let [stolen, running, next] = ["stolen", "running", "next"].map(|label| fixture.world.writer(label));
    // Granted long ago and switched off ever since.
    let offline = fixture.world.unlocked.grant_writer(
        WriterRole::ProcessServer,
        "offline",
        &fixture.world.entropy,
        &fixture.world.clock,
    );
    let offline = offline.expect("grant").to_bytes();
    let mut writer = fixture.create(&running);
    let knows = NumberedNames::of_chain(&stolen.1, CHAIN);
    let burn = |number| {
        let name = knows.name(number, NameEpoch::FIRST).expect("it has the key");
        fixture.store.create(&name, &[Bytes::from_static(b"revenge")]).expect("the name is free");
    };
    let revoked = revoke(&fixture.world, &stolen).expect("revoke");
    assert!(revoked.fenced.is_empty(), "others go on");
    assert_eq!(revoked.remaining.len(), 3);

    // The generation that runs goes on in its epoch: there the key still counts.
    burn(2);
    commit(&mut writer);
    let history = fixture.load();
    assert_eq!((history.head.number, history.name_epoch), (3, NameEpoch::FIRST));
    burn(4);
    let mut successor = fixture.open(&next).expect("open");
    assert_eq!((successor.head().number, successor.head().epoch), (5, NameEpoch::FIRST), "it fences by the old name");
    // From here on it burns nothing.
    (6..40).for_each(burn);
    burn(9999);
    let before = fixture.fragile.requests.load(Ordering::Relaxed);
    let history = fixture.load();
    assert!(fixture.fragile.requests.load(Ordering::Relaxed) - before < 40, "its objects are not even read");
    assert_eq!((history.next_number, history.name_epoch), (6, NameEpoch(1)));
    commit(&mut successor);
    assert_eq!((successor.head().number, successor.head().epoch), (6, NameEpoch(1)));
    let more = delta(&writer);
    let stale = writer.commit(CheckpointWish::WhenDue, |_| Ok(more.clone()));
    assert!(matches!(stale, Err(VaultError::Fenced { .. })), "the fence is the old name");
    let all = ChainHistory::load_all(&fixture.store, &reader(&fixture), CHAIN).expect("load all");
    same(&all, &fixture.load());
    for number in (6..40).chain([9999]) {
        assert!(all.alarms.contains(&Alarm::WrongEpoch { number, epoch: NameEpoch::FIRST }), "{:?}", all.alarms);
    }
    assert!(!all.alarms.iter().any(|alarm| matches!(alarm, Alarm::LostParent { .. })));
    // More of them than one look at the folder shows.
    (100..1300).for_each(burn);
    same(&fixture.load(), &all);

    // Somebody who heard of nothing finds the key, and goes on.
    let offline = fixture.world.session_of(WriterKeys::from_bytes(&offline).expect("a key file"));
    let mut heir = ChainWriter::open_generation(
        &fixture.store,
        &offline.0,
        &offline.1,
        &ChainHistory::load(&fixture.store, &offline.1, CHAIN).expect("load"),
        "back again",
        Delta::default(),
    )
    .expect("open");
    commit(&mut heir);
    assert_eq!(fixture.load().head, heir.head());
    assert_eq!(heir.head(), ChainHistory::load(&fixture.store, &reader(&fixture), CHAIN).expect("load").head);
    // A chain that begins now: its first name is of the first epoch, like every chain's, and the next one is not.
    let other = ChainId([9; 16]);
    let (session, keys) = &next;
    let mut young =
        ChainWriter::create(&fixture.store, session, keys, other, (MACHINE, None), Delta::default()).expect("create");
    commit(&mut young);
    let history = ChainHistory::load(&fixture.store, &reader(&fixture), other).expect("load");
    assert_eq!((history.head, history.name_epoch), (young.head(), NameEpoch(1)));
}

#[test]
fn the_catalog_goes_on_under_the_next_key_and_the_revoked_writer_is_told() {
    let fixture = Fixture::new();
    let [stolen, other] = ["stolen", "other"].map(|label| fixture.world.writer(label));
    let mut late = Catalog::load(&fixture.store, &other.1).expect("load");
    let old_names = NumberedNames::of_catalog(&stolen.1);
    revoke(&fixture.world, &stolen).expect("revoke");
    for number in 2..9 {
        let name = old_names.name(number, NameEpoch::FIRST).expect("it has the key");
        fixture.store.create(&name, &[Bytes::from_static(b"revenge")]).expect("free");
    }
    assert_eq!(late.append(&fixture.store, &other.1, &other.0, &note("here")).expect("append"), 2);
    let catalog = Catalog::load(&fixture.store, &reader(&fixture)).expect("load");
    assert_eq!((catalog.name_epoch, catalog.next_number, catalog.alarms.len()), (NameEpoch(1), 3, 0));
    assert_eq!(catalog.records[1].entry, note("here"));
    assert!(matches!(Catalog::load(&fixture.store, &stolen.1), Err(VaultError::Revoked { .. })));
    let blind = ChainHistory::find(&fixture.store, &stolen.1, CHAIN);
    assert!(matches!(blind, Err(VaultError::Revoked { writer }) if writer == stolen.0.keys().writer()));
    // The next one goes the same way, and whoever is granted afterwards has every key.
    revoke(&fixture.world, &other).expect("revoke");
    let third = fixture.world.writer("third");
    let catalog = Catalog::load(&fixture.store, &third.1).expect("load");
    assert_eq!((catalog.name_epoch, catalog.revoked.len()), (NameEpoch(2), 2));
    let mut writer = fixture.create(&third);
    commit(&mut writer);
    assert_eq!(writer.head().epoch, NameEpoch(2));
    assert!(matches!(Catalog::load(&fixture.store, &other.1), Err(VaultError::Revoked { .. })));
}

/// What somebody does meanwhile.
type Act = Box<dyn FnOnce() + Send>;

/// A store that refuses to create anything after a while, and that somebody else can act on before a name is created.
struct Interrupted {
    inner: Arc<dyn Store>,
    creates_left: AtomicU64,
    before: Mutex<Option<(&'static str, Act)>>,
}

impl Interrupted {
    fn after(inner: &Arc<dyn Store>, creates: u64) -> Arc<Interrupted> {
        Arc::new(Interrupted {
            inner: Arc::clone(inner),
            creates_left: AtomicU64::new(creates),
            before: Mutex::new(None),
        })
    }
}

impl Store for Interrupted {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        let due = self.before.lock().unwrap().take_if(|(prefix, _)| name.as_str().starts_with(*prefix));
        if let Some((_, act)) = due {
            act();
        }
        let left = self.creates_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        match left {
            Ok(_) => self.inner.create(name, parts),
            Err(_) => Err(StoreError::Unavailable { at: name.to_string(), source: "the process was killed".into() }),
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.read(name, range)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// The owner at a store of his own.
fn owner_at(store: Arc<dyn Store>) -> vault::UnlockedVault {
    Vault::open(store).expect("open").unlock(Credential::Passphrase(PASSPHRASE)).expect("unlock")
}

#[test]
fn a_revocation_that_was_interrupted_anywhere_is_repeated_and_gives_nobody_a_key_too_many() {
    // Another one is revoked before the first attempt is repeated: it holds a copy of the key that was made then.
    for other_first in [false, true] {
        for creates in 0.. {
            let fixture = Fixture::new();
            let World { entropy, clock, .. } = &fixture.world;
            let [stolen, other, third] = ["stolen", "other", "third"].map(|label| fixture.world.writer(label));
            let mut writer = fixture.create(&stolen);
            commit(&mut writer);
            let committed = writer.head();
            let id = stolen.0.keys().writer();
            let interrupted = owner_at(Interrupted::after(&fixture.store, creates));
            let complete = revoke_writer(&interrupted, id, "taken over", entropy, clock).is_ok();
            // Whatever is there reads, and others can write.
            ChainHistory::load(&fixture.store, &third.1, CHAIN).expect("load");
            fixture.open(&third).expect("open");
            if other_first {
                revoke(&fixture.world, &other).expect("revoke");
            }
            revoke(&fixture.world, &stolen).expect("revoke again");
            let mut successor = fixture.open(&third).expect("open");
            commit(&mut successor);
            let keys = reader(&fixture);
            let history = ChainHistory::load_all(&fixture.store, &keys, CHAIN).expect("load");
            assert_eq!(history.head, successor.head());
            assert!(history.contains(&fixture.store, &keys, committed.number, committed.nonce).expect("reads"));
            let catalog = Catalog::load(&fixture.store, &keys).expect("load");
            assert_eq!((catalog.revoked.contains_key(&id), catalog.alarms.len()), (true, 0));
            // Neither knows the names that are made now, whichever copies lie about.
            assert!(matches!(Catalog::load(&fixture.store, &stolen.1), Err(VaultError::Revoked { .. })));
            let others = Catalog::load(&fixture.store, &other.1);
            assert_eq!(matches!(others, Err(VaultError::Revoked { .. })), other_first, "{:?}", others.err());
            if complete {
                break;
            }
            assert!(creates < 50, "it never comes to an end");
        }
    }
}

#[test]
fn a_writer_that_is_granted_while_another_is_revoked_gets_the_key() {
    for moment in ["keys/", "catalog/"] {
        let fixture = Fixture::new();
        let [stolen, other] = ["stolen", "other"].map(|label| fixture.world.writer(label));
        let slow = Interrupted::after(&fixture.store, u64::MAX);
        let (store, entropy, clock) =
            (Arc::clone(&fixture.store), Arc::clone(&fixture.world.entropy), Arc::clone(&fixture.world.clock));
        let granted: Arc<Mutex<Option<WriterKeys>>> = Arc::default();
        let slot = Arc::clone(&granted);
        let grant = move || {
            let keys = owner_at(store).grant_writer(WriterRole::ProcessServer, "new", &entropy, &clock);
            *slot.lock().unwrap() = Some(keys.expect("grant"));
        };
        *slow.before.lock().unwrap() = Some((moment, Box::new(grant)));
        let id = stolen.0.keys().writer();
        revoke_writer(&owner_at(slow), id, "taken over", &fixture.world.entropy, &fixture.world.clock).expect("revoke");
        let new = fixture.world.session_of(granted.lock().unwrap().take().expect("it was granted"));
        let mut writer = fixture.create(&new);
        commit(&mut writer);
        assert_eq!((writer.head().epoch, fixture.load().head), (NameEpoch(1), writer.head()));
        fixture.open(&other).expect("and so did everybody else");
    }
}

#[test]
fn two_revocations_at_once_begin_epochs_of_which_neither_writer_holds_the_last_key() {
    let fixture = Fixture::new();
    let [one, two, third] = ["one", "two", "third"].map(|label| fixture.world.writer(label));
    let slow = Interrupted::after(&fixture.store, u64::MAX);
    let (store, entropy, clock) =
        (Arc::clone(&fixture.store), Arc::clone(&fixture.world.entropy), Arc::clone(&fixture.world.clock));
    let second = two.0.keys().writer();
    let meanwhile = move || {
        revoke_writer(&owner_at(store), second, "both were stolen", &entropy, &clock).expect("revoke");
    };
    *slow.before.lock().unwrap() = Some(("catalog/", Box::new(meanwhile)));
    let first = one.0.keys().writer();
    revoke_writer(&owner_at(slow), first, "both were stolen", &fixture.world.entropy, &fixture.world.clock)
        .expect("revoke");
    let catalog = Catalog::load(&fixture.store, &third.1).expect("load");
    assert_eq!(catalog.revoked.len(), 2);
    for revoked in [&one, &two] {
        assert!(matches!(Catalog::load(&fixture.store, &revoked.1), Err(VaultError::Revoked { .. })));
    }
    let mut writer = fixture.create(&third);
    commit(&mut writer);
    assert_eq!(writer.head().epoch, catalog.name_epoch);
    assert_eq!(ChainHistory::load(&fixture.store, &reader(&fixture), CHAIN).expect("load").head, writer.head());
}

#[test]
fn names_go_on_even_if_the_entry_that_began_their_epoch_is_damaged() {
    let fixture = Fixture::new();
    let [stolen, other] = ["stolen", "other"].map(|label| fixture.world.writer(label));
    fixture.create(&other);
    revoke(&fixture.world, &stolen).expect("revoke");
    let mut writer = fixture.open(&other).expect("open");
    commit(&mut writer);
    let mut catalog = Catalog::load(&fixture.store, &other.1).expect("load");
    catalog.append(&fixture.store, &other.1, &other.0, &note("after")).expect("append");
    let entry = NumberedNames::of_catalog(&other.1).name(1, NameEpoch::FIRST).expect("the first key");
    let bytes = fixture.store.read_all(&entry).expect("read");
    fixture.fragile.set(&entry, Bytes::from([&bytes[..90], b"?", &bytes[91..]].concat()));
    for keys in [reader(&fixture), Arc::new(OpenKeys::of_writer(other.0.keys()))] {
        let history = ChainHistory::load(&fixture.store, &keys, CHAIN).expect("load");
        assert_eq!((history.head, history.name_epoch), (writer.head(), NameEpoch(1)));
        let catalog = Catalog::load(&fixture.store, &keys).expect("load");
        assert_eq!(
            (catalog.records.last().map(|record| &record.entry), catalog.alarms.len()),
            (Some(&note("after")), 1)
        );
    }
}

#[test]
fn a_lost_key_stops_whoever_needs_it_with_a_reason_and_strangers_copies_do_no_harm() {
    let fixture = Fixture::new();
    let [stolen, other] = ["stolen", "other"].map(|label| fixture.world.writer(label));
    revoke(&fixture.world, &stolen).expect("revoke");
    let copies = |to: &str| {
        let mut names = fixture.world.all_names();
        names.retain(|name| name.as_str().contains(&format!("/name-1-{to}-")));
        names
    };
    let id = other.0.keys().writer();
    let [copy] = &copies(&id.to_string())[..] else { panic!("one copy for each") };
    assert_eq!((copies("read").len(), copies(&stolen.0.keys().writer().to_string()).len()), (1, 0));
    // Names of copies are easy to guess but for their end. Whatever is put there is passed over.
    let own = fixture.store.read_all(copy).expect("read");
    for (index, bytes) in [Bytes::from_static(b"junk"), own.clone(), own.slice(..70)].into_iter().enumerate() {
        let folder = copy.as_str().rsplit_once('-').expect("an end").0;
        let name = ObjectName::new(format!("{folder}-{index:016x}")).expect("a name");
        fixture.store.create(&name, &[bytes]).expect("free");
    }
    let fresh = || OpenKeys::of_writer(other.0.keys());
    Catalog::load(&fixture.store, &fresh()).expect("it finds its own");
    fixture.fragile.remove(copy);
    let blind = Catalog::load(&fixture.store, &fresh()).expect_err("its only copy is gone");
    assert!(matches!(blind, VaultError::NameKeyMissing { epoch: NameEpoch(1) }), "{blind}");
    assert!(blind.to_string().contains("epoch 1"), "{blind}");
    assert_ne!(id, WriterId::OWNER);
}
