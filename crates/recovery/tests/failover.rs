//! On whose word branches are written, and what a branch's way home means for a machine that failed over to it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;

use std::sync::Arc;

use history::{CHAIN, DISK, MACHINE, World, noise};
use recovery::{BranchError, branch_host_keys};
use replication::ChainId;
use vault::chain::{Holder, Phase};
use vault::keys::WriterRole;
use vault::{Catalog, ChainControl, ChainHistory, ChainWriter, Delta, Moment, VaultError, WriterSession};

const SIZE: u64 = 1 << 20;

fn session(world: &World, role: WriterRole) -> Arc<WriterSession> {
    let keys = world.vault.grant_writer(role, "test", &world.entropy, &world.clock).unwrap();
    Arc::new(WriterSession::new(keys, Arc::clone(&world.entropy), Arc::clone(&world.clock)).unwrap())
}

#[test]
fn a_branch_host_writes_under_its_own_grant_and_needs_the_owner_once() {
    let world = World::new();
    let mut machine = world.protect(&[SIZE]);
    machine.write(DISK, 0, noise(1, 4096));
    machine.second();
    let reader = world.vault.without_owner();
    let refused = world.host_with(reader.clone(), World::config()).open(CHAIN, &Moment::Latest, "no grant");
    assert!(matches!(refused.err().unwrap(), BranchError::NotGranted));

    let owned = world.host().open(CHAIN, &Moment::Latest, "by the owner").unwrap();
    let file = world.host_directory().join(branch_host_keys(world.vault.vault().id()));
    assert!(file.exists());
    let read = world.host_with(reader, World::config()).open(CHAIN, &Moment::Latest, "by a reader").unwrap();
    let keys = world.vault.keys();
    for branch in [&owned, &read] {
        branch.disk(DISK).unwrap();
        let history = ChainHistory::load(world.store(), keys, branch.id()).unwrap();
        let grant = keys.grant(world.store(), history.generation().writer).unwrap();
        assert_eq!(grant.role, WriterRole::BranchHost);
        assert_eq!(history.standing.holder, Holder::BranchHosts);
    }
    let catalog = Catalog::load(world.store(), keys).unwrap();
    assert!(catalog.alarms.is_empty(), "{:?}", catalog.alarms);
    assert_eq!((catalog.branches.len(), catalog.writers.len()), (2, 1));
}

#[test]
fn a_failed_over_machine_comes_home_along_its_branch() {
    let world = World::new();
    let mut machine = world.protect(&[SIZE]);
    machine.write(DISK, 0, noise(1, 4096));
    machine.second();
    let operator = session(&world, WriterRole::Operator);
    let keys = world.vault.keys();
    let control = ChainControl::new(world.store(), &operator, keys);
    let id = ChainId([0x77; 16]);
    control.close(CHAIN, id, "the site is lost").unwrap();
    let reader = world.vault.without_owner();
    drop(world.host().writer().unwrap());
    let host = world.host_with(reader, World::config()).with_operator(Arc::clone(&operator));
    let branch = host.open_as(id, CHAIN, &Moment::Latest, "failover").unwrap();
    assert_eq!(branch.id(), id);
    branch.core().write(DISK, 0, &noise(2, 4096)).unwrap();

    let process_server = session(&world, WriterRole::ProcessServer);
    let open = |chain: ChainId| {
        let history = ChainHistory::load(world.store(), keys, chain).unwrap();
        ChainWriter::open_generation(world.store(), &process_server, keys, &history, "test", Delta::default())
    };
    assert!(matches!(open(CHAIN).err().unwrap(), VaultError::ChainClosed { ended: false, .. }));
    assert!(matches!(open(id).err().unwrap(), VaultError::NotPermitted { .. }));

    branch.finish("it was failed back").unwrap();
    branch.hand_over("it was failed back").unwrap();
    branch.hand_over("said again").unwrap();
    let before = ChainHistory::load(world.store(), keys, CHAIN).unwrap();
    assert!(matches!(before.standing.phase, Phase::Ended(closed) if closed.successor == id));
    assert_eq!(Catalog::load(world.store(), keys).unwrap().machines[&MACHINE].chain, id);
    open(id).expect("process servers go on along the branch's chain");
    assert!(matches!(control.cancel(CHAIN, "too late"), Err(VaultError::ChainClosed { ended: true, .. })));
}
