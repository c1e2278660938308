//! Failover, hand-over and revocation as a chain's readers and writers meet them; and a store that was rolled back.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use replication::{ChainId, Position};
use support::World;
use support::fixture::{Fixture, delta, same};
use support::history::{BRANCH, CHAIN, MACHINE, seq};
use vault::chain::{Alarm, ChainControl, Holder, Phase};
use vault::keys::{WriterRole, WriterSession};
use vault::revoke::revoke_writer;
use vault::{
    Catalog, CatalogEntry, ChainHistory, ChainWriter, CheckpointWish, Delta, Moment, ObjectName, OpenKeys, Points,
    RolledBack, SeenHeads, Store, StoreError, VaultError,
};

/// A writer's session and what it reads with.
type Writer = (Arc<WriterSession>, Arc<OpenKeys>);

/// The machine's chain with one second of history, and an operator.
fn failing_over(fixture: &Fixture) -> (ChainWriter, Writer) {
    let mut writer = fixture.create(&fixture.world.writer("ps"));
    let first = delta(&writer);
    writer.commit(CheckpointWish::WhenDue, |_| Ok(first.clone())).expect("commit");
    (writer, fixture.world.writer_as(WriterRole::Operator, "operator"))
}

#[test]
fn a_close_fences_and_a_cancel_lets_the_next_generation_go_on() {
    let fixture = Fixture::new();
    let (mut writer, (session, keys)) = failing_over(&fixture);
    let control = ChainControl::new(&fixture.store, &session, &keys);
    let through = writer.through();
    assert!(matches!(control.cancel(CHAIN, "of what?"), Err(VaultError::WrongChainState { .. })));
    let closed = control.close(CHAIN, BRANCH, "the site is lost").expect("close");
    assert_eq!(closed.standing.closed().map(|closed| closed.successor), Some(BRANCH));
    assert_eq!(closed.through, through, "a close takes nothing away and adds nothing");
    let stale = writer.commit(CheckpointWish::WhenDue, |_| Ok(Delta { through, ..Delta::default() }));
    assert!(matches!(stale, Err(VaultError::Fenced { .. })));
    let successor = fixture.world.writer("ps two");
    assert!(matches!(
        fixture.open(&successor).err().expect("refused"),
        VaultError::ChainClosed { successor: BRANCH, ended: false, .. }
    ));
    // The same failover again is no second one; another is refused.
    let again = control.close(CHAIN, BRANCH, "again").expect("it is closed already");
    assert_eq!(again.head, closed.head);
    let other = control.close(CHAIN, ChainId([9; 16]), "another");
    assert!(matches!(other, Err(VaultError::ChainClosed { .. })));
    let points = Points::new(&fixture.store, &keys, &closed);
    assert_eq!(points.resolve(&Moment::Latest).expect("points stay").cut.sequence, through);

    let cancelled = control.cancel(CHAIN, "it was not lost").expect("cancel");
    assert_eq!(cancelled.standing.phase, Phase::Open);
    let again = control.cancel(CHAIN, "its answer was lost").expect("done already is done");
    assert_eq!(again.head, cancelled.head);
    let mut reopened = fixture.open(&successor).expect("the next generation");
    let next = delta(&reopened);
    reopened.commit(CheckpointWish::WhenDue, |_| Ok(next.clone())).expect("commit");
    let history = fixture.load();
    assert_eq!((history.through, history.generations.len()), (next.through, 4));
    same(&history, &ChainHistory::load_all(&fixture.store, &keys, CHAIN).expect("load all"));
}

#[test]
fn a_committed_failover_ends_the_chain() {
    let fixture = Fixture::new();
    let (_, (session, keys)) = failing_over(&fixture);
    let control = ChainControl::new(&fixture.store, &session, &keys);
    assert!(matches!(control.commit(CHAIN), Err(VaultError::WrongChainState { .. })), "nothing is closed");
    control.close(CHAIN, BRANCH, "lost").expect("close");
    let ended = control.commit(CHAIN).expect("commit");
    assert!(matches!(ended.standing.phase, Phase::Ended(_)));
    assert_eq!(control.commit(CHAIN).expect("done already").head, ended.head);
    assert!(matches!(control.cancel(CHAIN, "no"), Err(VaultError::ChainClosed { ended: true, .. })));
    let late = fixture.open(&fixture.world.writer("late"));
    assert!(matches!(late.err().expect("refused"), VaultError::ChainClosed { ended: true, .. }));
}

#[test]
fn only_an_operator_fails_a_machine_over_and_only_its_own_kind_writes_a_chain() {
    let fixture = Fixture::new();
    let (mut writer, _) = failing_over(&fixture);
    let branch_host = fixture.world.writer_as(WriterRole::BranchHost, "branch host");
    for (session, keys) in [&branch_host, &fixture.world.writer("ps two")] {
        let refused = ChainControl::new(&fixture.store, session, keys).close(CHAIN, BRANCH, "mine now");
        assert!(matches!(refused, Err(VaultError::NotPermitted { .. })));
    }
    assert!(matches!(fixture.open(&branch_host).err().expect("refused"), VaultError::NotPermitted { .. }));
    assert_eq!(fixture.load().head, writer.head(), "nothing was burnt for it");
    // Somebody whose program believes to have another role: the vault's grant decides, not the program.
    let mut keys = branch_host.0.keys().clone();
    keys.grant.role = WriterRole::ProcessServer;
    let liar = fixture.world.session_of(keys);
    let mut lies = fixture.open(&liar).expect("it wins the name");
    let history = ChainHistory::load_all(&fixture.store, fixture.world.unlocked.keys(), CHAIN).expect("load");
    assert_eq!(history.head, writer.head());
    let (number, id) = (writer.head().number + 1, liar.0.keys().writer());
    assert_eq!(history.alarms, [Alarm::Unauthorised { number, writer: id }]);
    same(&fixture.load(), &history);
    // What it puts behind that continues something that was refused: no history is lost, and nobody has to stop for it.
    let more = delta(&lies);
    lies.commit(CheckpointWish::Now, |_| Ok(more.clone())).expect("it wins names");
    let history = ChainHistory::load_all(&fixture.store, fixture.world.unlocked.keys(), CHAIN).expect("load");
    let rejected = Alarm::Rejected { number: number + 1, writer: id };
    assert_eq!(history.alarms, [Alarm::Unauthorised { number, writer: id }, rejected]);
    same(&fixture.load(), &history);
    // And it fences nobody.
    let next = delta(&writer);
    writer.commit(CheckpointWish::WhenDue, |_| Ok(next.clone())).expect("it goes on");
    assert_eq!(fixture.load().head, writer.head());
}

#[test]
fn a_branch_is_written_by_its_host_until_it_comes_home() {
    let fixture = Fixture::new();
    let (ps, host) = (fixture.world.writer("ps"), fixture.world.writer_as(WriterRole::BranchHost, "host"));
    let genesis = (MACHINE, Some(Position { chain: CHAIN, sequence: seq(1, 1) }));
    let create = |(session, keys): &Writer| {
        ChainWriter::create(&fixture.store, session, keys, BRANCH, genesis, Delta::default())
    };
    assert!(matches!(create(&ps).err().expect("refused"), VaultError::NotPermitted { .. }));
    let mut writer = create(&host).expect("create");
    let load = || ChainHistory::load(&fixture.store, fixture.world.unlocked.keys(), BRANCH).expect("load");
    let open = |(session, keys): &Writer| {
        ChainWriter::open_generation(&fixture.store, session, keys, &load(), "test", Delta::default())
    };
    assert!(matches!(open(&ps).err().expect("refused"), VaultError::NotPermitted { .. }));
    let operator = fixture.world.writer_as(WriterRole::Operator, "op");
    let close = ChainControl::new(&fixture.store, &operator.0, &operator.1).close(BRANCH, CHAIN, "a branch");
    assert!(matches!(close, Err(VaultError::WrongChainState { .. })));
    assert_eq!(load().standing.holder, Holder::BranchHosts);

    let home = ChainControl::new(&fixture.store, &host.0, &host.1).hand_over(BRANCH).expect("hand over");
    assert_eq!(home.standing.holder, Holder::ProcessServers);
    let late = writer.commit(CheckpointWish::WhenDue, |_| Ok(Delta::default()));
    assert!(matches!(late, Err(VaultError::Fenced { .. })));
    assert!(matches!(open(&host).err().expect("refused"), VaultError::NotPermitted { .. }));
    open(&ps).expect("it is the machine's chain now");
    assert_eq!(load().generation().writer, ps.0.keys().writer());
}

#[test]
fn a_revoked_writer_commits_nothing_more_and_what_it_committed_stays() {
    let fixture = Fixture::new();
    let World { unlocked, entropy, clock, .. } = &fixture.world;
    let (one, two) = (fixture.world.writer("one"), fixture.world.writer("two"));
    let mut writer = fixture.create(&one);
    let first = delta(&writer);
    writer.commit(CheckpointWish::WhenDue, |_| Ok(first.clone())).expect("commit");
    let mut catalog = Catalog::load(&fixture.store, &one.1).expect("load");
    let note = |text: &str| CatalogEntry::Note { text: text.into() };
    catalog.append(&fixture.store, &one.1, &one.0, &note("before")).expect("append");
    // A program that does not look at the catalog.
    let deaf = fixture.world.session_of(one.0.keys().clone());

    let id = one.0.keys().writer();
    let revoked = revoke_writer(unlocked, id, "its host was stolen", entropy, clock).expect("revoke");
    assert_eq!((revoked.fenced.as_slice(), revoked.fails_from.get(&CHAIN)), ([CHAIN].as_slice(), Some(&4)));
    let more = delta(&writer);
    let late = writer.commit(CheckpointWish::WhenDue, |_| Ok(more.clone()));
    assert!(matches!(late, Err(VaultError::Fenced { .. })), "whoever wrote is fenced first");
    assert!(matches!(fixture.open(&one).err().expect("refused"), VaultError::Revoked { .. }));
    // It wins names, and none of them counts.
    let history = fixture.load();
    let store: Arc<dyn Store> = Arc::new(WithoutCatalog(Arc::clone(&fixture.store)));
    let open = ChainWriter::open_generation(&store, &deaf.0, &deaf.1, &history, "deaf", Delta::default());
    let mut stray = open.expect("it does not know");
    let more = delta(&stray);
    stray.commit(CheckpointWish::Now, |_| Ok(more.clone())).expect("it wins a name");
    assert_eq!(fixture.load().head, history.head);
    assert_eq!(fixture.load().through, first.through, "what was committed before stays");
    let fresh = ChainHistory::load_all(&fixture.store, &OpenKeys::of_writer(two.0.keys()), CHAIN).expect("load");
    same(&fresh, &fixture.load());
    assert!(!fresh.alarms.iter().any(|alarm| matches!(alarm, Alarm::LostParent { .. })), "{:?}", fresh.alarms);
    let successor = fixture.open(&two).expect("another writer goes on");
    assert_eq!(fixture.load().head, successor.head());
    // Chains it never wrote to are closed to it altogether, and so is the catalog.
    let other = ChainId([3; 16]);
    let other = ChainWriter::create(&fixture.store, &one.0, &one.1, other, (MACHINE, None), Delta::default());
    assert!(matches!(other, Err(VaultError::Revoked { .. })));
    // Of the catalog it does not even know the names any more.
    let after = catalog.append(&fixture.store, &deaf.1, &deaf.0, &note("after"));
    assert!(matches!(after, Err(VaultError::Revoked { writer }) if writer == id));
    let catalog = Catalog::load(&fixture.store, &two.1).expect("load");
    assert!(catalog.records.iter().any(|record| record.entry == note("before")));
    assert!(!catalog.records.iter().any(|record| record.entry == note("after")));
    assert_eq!(catalog.revoked.get(&id).map(String::as_str), Some("its host was stolen"));
    assert_eq!(unlocked.keys().revocations().len(), 1);
}

/// A store as a program sees it that reads no catalog.
struct WithoutCatalog(Arc<dyn Store>);

impl Store for WithoutCatalog {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        self.0.create(name, parts)
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        match name.as_str().starts_with("catalog/") {
            true => Err(StoreError::NotFound(name.clone())),
            false => self.0.read(name, range),
        }
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.0.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.0.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}

#[test]
fn only_the_owner_revokes() {
    let fixture = Fixture::new();
    let (one, two) = (fixture.world.writer("one"), fixture.world.writer("two"));
    fixture.create(&one);
    let entry = CatalogEntry::GrantRevoked {
        writer: one.0.keys().writer(),
        fails_from: Default::default(),
        reason: "envy".into(),
        names: None,
    };
    let mut catalog = Catalog::load(&fixture.store, &two.1).expect("load");
    catalog.append(&fixture.store, &two.1, &two.0, &entry).expect("the store takes it");
    assert!(Catalog::load(&fixture.store, &two.1).expect("load").revoked.is_empty());
    fixture.open(&one).expect("it still writes");
    let World { unlocked, entropy, clock, .. } = &fixture.world;
    let reader = unlocked.without_owner();
    let refused = revoke_writer(&reader, one.0.keys().writer(), "no", entropy, clock);
    assert!(matches!(refused, Err(VaultError::OwnerKeyNeeded)));
    assert!(matches!(reader.grant_writer(WriterRole::Operator, "no", entropy, clock), Err(VaultError::OwnerKeyNeeded)));
}

#[test]
fn a_store_that_was_rolled_back_is_noticed() {
    let fixture = Fixture::new();
    let (mut writer, _) = failing_over(&fixture);
    let keys = fixture.world.unlocked.keys();
    let files = support::ForgetfulFiles::default();
    let heads = || SeenHeads::new(Arc::new(files.clone()), "heads", Arc::clone(&fixture.world.entropy));
    let look = || {
        let (verdict, kept) = heads().observe(&fixture.store, keys, &fixture.load()).expect("reads");
        kept.expect("kept");
        verdict
    };
    assert_eq!(look(), None);
    let old = writer.head().number;
    let next = delta(&writer);
    writer.commit(CheckpointWish::WhenDue, |_| Ok(next.clone())).expect("commit");
    assert_eq!(look(), None);
    files.cut_power();
    fixture.fragile.remove(&fixture.name(writer.head().number));
    let rolled = look().expect("noticed");
    assert_eq!((rolled.seen, rolled.found), (old + 1, old));
    assert!(rolled.to_string().contains("rolled back"), "{rolled}");
    // Somebody goes on from the older copy: the number is there again, and is another manifest.
    fixture.open(&fixture.world.writer("two")).expect("open");
    assert_eq!(look(), Some(RolledBack { chain: CHAIN, seen: old + 1, found: old + 1 }));
    heads().forget(keys.vault(), CHAIN).expect("forgets");
    assert_eq!(look(), None);
}
