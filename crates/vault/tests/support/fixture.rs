//! One chain on a store that tests can damage, its writers, and what two readings of it must have in common.

use std::sync::Arc;

use replication::{CutKind, SequenceNumber};
use vault::keys::{NameEpoch, WriterSession};
use vault::numbered::NumberedNames;
use vault::{
    ChainHistory, ChainWriter, CheckpointWish, Delta, ObjectName, OpenKeys, PreparedManifest, Store, VaultError,
};

use super::history::{CHAIN, MACHINE, cut, second};
use super::{Fragile, World};

pub struct Fixture {
    pub world: World,
    pub fragile: Arc<Fragile>,
    pub store: Arc<dyn Store>,
    /// Of the first epoch.
    pub names: NumberedNames,
}

impl Fixture {
    pub fn new() -> Fixture {
        let fragile = Fragile::new();
        let store: Arc<dyn Store> = Arc::clone(&fragile) as Arc<dyn Store>;
        let world = World::over(Arc::clone(&store), 11);
        let names = NumberedNames::of_chain(world.unlocked.keys(), CHAIN);
        Fixture { world, fragile, store, names }
    }

    /// The name of manifest `number` before anybody was revoked.
    pub fn name(&self, number: u64) -> ObjectName {
        self.names.name(number, NameEpoch::FIRST).expect("the first key is at hand")
    }

    pub fn load(&self) -> ChainHistory {
        ChainHistory::load(&self.store, self.world.unlocked.keys(), CHAIN).expect("load")
    }

    pub fn create(&self, (session, keys): &(Arc<WriterSession>, Arc<OpenKeys>)) -> ChainWriter {
        ChainWriter::create(&self.store, session, keys, CHAIN, (MACHINE, None), Delta::default()).expect("create")
    }

    pub fn open(&self, (session, keys): &(Arc<WriterSession>, Arc<OpenKeys>)) -> Result<ChainWriter, VaultError> {
        ChainWriter::open_generation(&self.store, session, keys, &self.load(), "test", Delta::default())
    }
}

/// The next delta: one change, one cut.
pub fn delta(writer: &ChainWriter) -> Delta {
    let through = SequenceNumber(writer.through().0.max(writer.generation().base().0) + 1);
    let seconds = writer.proven_through().0.saturating_sub(second(0).0) / 1_000_000_000 + 1;
    Delta {
        through,
        proven_through: second(seconds),
        cuts: vec![cut(through, seconds, CutKind::Second)],
        ..Delta::default()
    }
}

pub fn prepare(writer: &ChainWriter) -> PreparedManifest {
    writer.prepare(writer.begin(), delta(writer), CheckpointWish::WhenDue).expect("prepare")
}

pub fn same(a: &ChainHistory, b: &ChainHistory) {
    assert_eq!(
        (a.head, a.next_number, a.name_epoch, a.through, a.stream(), a.proven_through),
        (b.head, b.next_number, b.name_epoch, b.through, b.stream(), b.proven_through)
    );
    assert_eq!((a.machine, a.parent), (b.machine, b.parent));
    assert_eq!(a.layers(), b.layers());
    assert_eq!(a.gaps(), b.gaps());
    assert_eq!(a.generations.len(), b.generations.len());
    for (a, b) in a.generations.iter().zip(&b.generations) {
        assert_eq!((a.generation, a.writer, a.opened, a.last), (b.generation, b.writer, b.opened, b.last));
        assert_eq!(a.state, b.state);
    }
}
