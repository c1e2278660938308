//! A small history that holds one of everything, and what reading it must give.

use std::sync::Arc;

use replication::{
    ByteRange, ChainId, Cut, CutKind, DiskGeometry, DiskId, DiskIdentity, Generation, MachineId, MarkerKind, PointTime,
    Position, SequenceNumber, StreamHash,
};
use vault::chain::{Alarm, ChainControl, Phase};
use vault::keys::{NameEpoch, WriterRole};
use vault::manifest::{Defect, GapClosed};
use vault::numbered::NumberedNames;
use vault::revoke::revoke_writer;
use vault::{
    Catalog, CatalogEntry, ChainHistory, ChainWriter, CheckpointWish, Delta, Gap, GapScope, GeometryChange, Moment,
    OpenKeys, Points, Store,
};

use super::World;

pub const CHAIN: ChainId = ChainId([0xc1; 16]);
pub const BRANCH: ChainId = ChainId([0xb1; 16]);
pub const MACHINE: MachineId = MachineId([0xa1; 16]);

pub fn seq(generation: u32, counter: u64) -> SequenceNumber {
    SequenceNumber(Generation(generation).base().0 + counter)
}

pub fn second(seconds: u64) -> PointTime {
    PointTime(1_795_356_000_000_000_000 + seconds * 1_000_000_000)
}

pub fn geometry(disk: u16) -> DiskGeometry {
    DiskGeometry {
        disk: DiskId(disk),
        identity: DiskIdentity { serial: format!("disk-{disk}"), fingerprint: [disk as u8; 16] },
        path: format!("/dev/vd{disk}"),
        size_bytes: 1 << 30,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

pub fn cut(sequence: SequenceNumber, seconds: u64, kind: CutKind) -> Cut {
    Cut { sequence, time: second(seconds), kind }
}

pub fn write(world: &World) {
    let (session, keys) = world.writer("ps one");
    let first = Delta {
        geometries: vec![GeometryChange { sequence: seq(1, 0), geometry: geometry(0) }],
        gaps_opened: vec![Gap {
            after: seq(1, 0),
            scope: GapScope::Machine,
            time: second(0),
            cause: "initial replication".into(),
            until: None,
        }],
        ..Delta::default()
    };
    let mut writer = ChainWriter::create(&world.store, &session, &keys, CHAIN, (MACHINE, None), first).expect("create");
    let heal_end = seq(1, 10);
    writer
        .commit(CheckpointWish::WhenDue, |_| {
            Ok(Delta {
                through: seq(1, 12),
                proven_through: second(12),
                skew_ns: -5,
                cuts: vec![
                    cut(seq(1, 4), 4, CutKind::Second),
                    cut(heal_end, 10, CutKind::HealEnd),
                    cut(
                        seq(1, 12),
                        12,
                        CutKind::Marker { kind: MarkerKind::Application, name: "before update".into() },
                    ),
                ],
                gaps_closed: vec![GapClosed {
                    after: seq(1, 0),
                    scope: GapScope::Machine,
                    until: heal_end,
                    time: second(10),
                }],
                defects: vec![Defect {
                    sequence: seq(1, 5),
                    disk: DiskId(0),
                    range: ByteRange::new(4096, 512),
                    cause: "medium error".into(),
                }],
                ..Delta::default()
            })
        })
        .expect("commit");
    writer
        .commit(CheckpointWish::Now, |_| {
            Ok(Delta {
                through: seq(1, 20),
                proven_through: second(20),
                cuts: vec![cut(seq(1, 20), 20, CutKind::GenerationEnd)],
                ..Delta::default()
            })
        })
        .expect("commit");
    let (successor, keys) = world.writer("ps two");
    let history = ChainHistory::load(&world.store, &keys, CHAIN).expect("load");
    let gap = Gap {
        after: seq(1, 20),
        scope: GapScope::Disks(vec![DiskId(0)]),
        time: second(20),
        cause: "process server lost".into(),
        until: None,
    };
    let opening = Delta { gaps_opened: vec![gap], ..Delta::default() };
    ChainWriter::open_generation(&world.store, &successor, &keys, &history, "take-over", opening).expect("open");
    let (operator, operators_keys) = world.writer_as(WriterRole::Operator, "operator");
    let control = ChainControl::new(&world.store, &operator, &operators_keys);
    control.close(CHAIN, BRANCH, "the site is lost").expect("close");
    control.cancel(CHAIN, "it was not").expect("cancel");
    let (host, _) = world.writer_as(WriterRole::BranchHost, "branch host");
    let owner = world.unlocked.owner_session(&world.entropy, &world.clock).expect("the owner");
    let mut catalog = Catalog::load(&world.store, &keys).expect("load");
    let parent = Position { chain: CHAIN, sequence: heal_end };
    let first = session.keys().writer();
    let disks = vec![geometry(0)];
    for (signer, entry) in [
        (&*successor, CatalogEntry::MachineProtected { machine: MACHINE, name: "web".into(), chain: CHAIN, disks }),
        (&*host, CatalogEntry::BranchOpened { chain: BRANCH, parent, name: "drill".into(), pinned: true }),
        (&*host, CatalogEntry::BranchDiscarded { chain: BRANCH }),
        (&owner, CatalogEntry::WriterGranted { writer: first, label: "ps one".into() }),
        (&*session, CatalogEntry::Note { text: "quiet".into() }),
        (&*operator, CatalogEntry::MachineFollows { machine: MACHINE, chain: BRANCH }),
    ] {
        catalog.append(&world.store, &keys, signer, &entry).expect("append");
    }
    revoke_writer(&world.unlocked, first, "it was replaced", &world.entropy, &world.clock).expect("revoke");
    // The next generation leads into the next epoch of the name key, in which the revoked writer burns nothing.
    let history = ChainHistory::load(&world.store, &keys, CHAIN).expect("load");
    let mut writer =
        ChainWriter::open_generation(&world.store, &successor, &keys, &history, "on we go", Delta::default())
            .expect("open");
    let delta = Delta { through: seq(1, 20), stream: Some(StreamHash([5; 32])), ..Delta::default() };
    writer.commit(CheckpointWish::WhenDue, |_| Ok(delta.clone())).expect("commit");
    let names = NumberedNames::of_chain(&keys, CHAIN);
    let burnt = names.name(writer.head().number + 1, NameEpoch::FIRST).expect("the first key");
    world.store.create(&burnt, &[b"revenge".as_slice().into()]).expect("free");
    let entry = CatalogEntry::Note { text: "quiet again".into() };
    catalog.append(&world.store, &keys, &successor, &entry).expect("append");
}

pub fn check(store: &Arc<dyn Store>, keys: &OpenKeys) {
    let history = ChainHistory::load(store, keys, CHAIN).expect("load");
    assert_eq!(history.machine, MACHINE);
    assert_eq!((history.head.number, history.head.epoch), (8, NameEpoch(1)));
    assert_eq!((history.next_number, history.stream()), (9, Some((seq(1, 20), StreamHash([5; 32])))));
    assert_eq!(history.alarms, [Alarm::WrongEpoch { number: 9, epoch: NameEpoch::FIRST }]);
    assert_eq!(history.through, seq(1, 20));
    assert_eq!(history.generations.len(), 5);
    assert_eq!(history.generations[1].reason.as_deref(), Some("take-over"));
    assert_eq!(history.generations[2].reason.as_deref(), Some("closed: the site is lost"));
    assert_eq!(history.standing.phase, Phase::Open, "the failover was cancelled");
    assert_eq!(history.geometry_at(seq(1, 3)), [geometry(0)]);
    assert_eq!(history.defects().len(), 1);
    let gaps = history.gaps();
    assert_eq!(gaps.len(), 2);
    assert_eq!(gaps[0].until, Some((seq(1, 10), second(10))));
    let points = Points::new(store, keys, &history);
    let marker = points.resolve(&Moment::Marker("before update".into())).expect("marker");
    assert_eq!(marker.cut.sequence, seq(1, 12));
    let latest = points.resolve(&Moment::Latest).expect("latest");
    assert_eq!((latest.cut.sequence, latest.lacking.len()), (seq(1, 20), 0));
    let catalog = Catalog::load(store, keys).expect("catalog");
    assert_eq!((catalog.records.len(), catalog.alarms.len(), catalog.revoked.len()), (8, 0, 1));
    assert_eq!(catalog.name_epoch, NameEpoch(1));
    let fails: Vec<u64> = keys.revocations().values().map(|revocation| revocation.fails_from[&CHAIN]).collect();
    assert_eq!(fails, [7]);
    assert_eq!(catalog.machines[&MACHINE].chain, BRANCH);
    assert!(catalog.branches[&BRANCH].pinned && catalog.branches[&BRANCH].discarded);
}
