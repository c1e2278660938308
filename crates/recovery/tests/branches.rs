//! Branches through their public API: open, write, kill, reopen, branch again, discard, read-only stores.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use history::{CHAIN, DISK, EPOCH, MACHINE, World, noise};
use proptest::prelude::*;
use recovery::{Branch, BranchError, BranchRunner, SealWish};
use replication::{CutKind, DiskId, MarkerKind, PointTime};
use vault::{Catalog, ChainHistory, Moment, ObjectName, Points, Store, StoreError, UnlockedVault};
use world::BlockDevice;

const SIZE: u64 = 1 << 20;

fn contents(branch: &Branch, disk: DiskId) -> Vec<u8> {
    let device = branch.disk(disk).unwrap();
    let mut bytes = vec![0; device.size() as usize];
    device.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn every_second_opens_as_it_was_and_branches_do_not_see_each_other() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    let mut disk = vec![0; SIZE as usize];
    let mut seconds = Vec::new();
    for second in 0..4u64 {
        let data = noise(second, 70_000);
        let start = second * 50_000;
        disk[start as usize..][..data.len()].copy_from_slice(&data);
        history.write(DISK, start, data);
        seconds.push((history.second(), disk.clone()));
    }
    let host = world.host();
    assert_eq!(host.chain_of(MACHINE).unwrap(), CHAIN);
    let branches: Vec<Branch> =
        seconds.iter().map(|(time, _)| host.open(CHAIN, &Moment::At(*time), "test").unwrap()).collect();
    for (index, (branch, (_, expected))) in branches.iter().zip(&seconds).enumerate() {
        assert!(contents(branch, DISK) == *expected, "second {index}");
        branch.disk(DISK).unwrap().write_at(10, &[index as u8; 20]).unwrap();
    }
    for (index, (branch, (_, expected))) in branches.iter().zip(&seconds).enumerate() {
        let mut expected = expected.clone();
        expected[10..30].fill(index as u8);
        assert!(contents(branch, DISK) == expected, "second {index} after the writes");
        branch.core().seal_all(SealWish::Now).unwrap();
        assert!(contents(branch, DISK) == expected, "second {index} read from the vault");
    }
    assert!(branches[0].info().sentence().contains("exactly"), "{}", branches[0].info().sentence());
    let catalog = Catalog::load(world.store(), world.vault.keys()).unwrap();
    assert_eq!(catalog.branches.len(), 4);
    assert!(catalog.branches.values().all(|branch| branch.pinned && !branch.discarded));
    // Branches claim nothing on their parent: its writer goes on.
    history.write(DISK, 0, vec![1; 512]);
    history.second();
    let error = host.open(CHAIN, &Moment::At(PointTime((EPOCH - 5) * 1_000_000_000)), "x").err().unwrap();
    assert!(matches!(error, BranchError::Point(_)), "{error}");
}

#[test]
fn a_killed_branch_goes_on_where_it_was_flushed() {
    let world = World::new();
    let mut history = world.protect(&[SIZE, SIZE]);
    history.write(DISK, 0, noise(1, 4096));
    history.second();
    let host = world.host();
    let branch = host.open(CHAIN, &Moment::Latest, "killed").unwrap();
    let id = branch.id();
    assert!(matches!(host.reopen(id), Err(BranchError::InUse(_))));
    let (first, second) = (branch.disk(DISK).unwrap(), branch.disk(DiskId(1)).unwrap());
    let mut expected = [contents(&branch, DISK), contents(&branch, DiskId(1))];
    let mut write = |device: &agent_disk::Disk, index: usize, start: usize, data: Vec<u8>| {
        device.write_at(start as u64, &data).unwrap();
        expected[index][start..start + data.len()].copy_from_slice(&data);
    };
    write(&first, 0, 1000, noise(2, 100_000));
    write(&second, 1, 0, noise(3, 5_000));
    branch.core().seal_all(SealWish::Now).unwrap();
    world.test_clock.advance(2);
    write(&first, 0, 50_000, noise(4, 300_000));
    write(&second, 1, 2_500, noise(5, 5_000));
    first.flush().unwrap();
    // Killed: nothing is closed, nothing more is written. The lock ends with the process.
    drop((first, second));
    drop(branch);
    let branch = host.reopen(id).unwrap();
    assert!(contents(&branch, DISK) == expected[0] && contents(&branch, DiskId(1)) == expected[1]);
    assert_eq!(branch.figures().written.generation().0, 2);
    branch.disk(DISK).unwrap().write_at(0, &[9; 100]).unwrap();
    expected[0][..100].fill(9);
    branch.core().seal_all(SealWish::Final).unwrap();
    assert_eq!(branch.figures().unsealed_bytes, 0);
    // Everything is in the vault now: a branch of the branch has it, and so has every point before.
    let nested = host.open(id, &Moment::Latest, "nested").unwrap();
    assert!(contents(&nested, DISK) == expected[0] && contents(&nested, DiskId(1)) == expected[1]);
    let opened = host.open(id, &Moment::Marker("branch opened".into()), "before any write").unwrap();
    let mut start = vec![0; SIZE as usize];
    start[..4096].copy_from_slice(&noise(1, 4096));
    assert!(contents(&opened, DISK) == start);
    let loaded = ChainHistory::load(world.store(), world.vault.keys(), id).unwrap();
    let cuts = Points::new(world.store(), world.vault.keys(), &loaded);
    let cuts = cuts.between(PointTime(0), PointTime(u64::MAX), 99, vault::points::Which::All).unwrap();
    assert!(cuts.iter().filter(|cut| cut.kind == CutKind::GenerationEnd).count() >= 2, "{cuts:?}");
    assert!(cuts.is_sorted_by_key(|cut| (cut.sequence, cut.time)), "{cuts:?}");
}

/// The device type of a branch's disks.
mod agent_disk {
    pub(crate) type Disk = agent::capture::SplitterDisk;
}

#[test]
fn a_branch_opens_at_each_of_its_own_seconds() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    history.write(DISK, 0, noise(1, 4096));
    history.second();
    let host = world.host();
    let branch = host.open(CHAIN, &Moment::Latest, "b").unwrap();
    let device = branch.disk(DISK).unwrap();
    let mut states = vec![contents(&branch, DISK)];
    for second in 0..5u64 {
        device.write_at(second * 3000, &noise(100 + second, 4000)).unwrap();
        if second == 2 {
            device.discard(0..8192).unwrap();
            branch.core().mark(MarkerKind::Crash, "named").unwrap();
        }
        states.push(contents(&branch, DISK));
        world.test_clock.advance(1);
        branch.core().seal_step(SealWish::WhenDue).unwrap();
    }
    branch.core().seal_all(SealWish::Final).unwrap();
    let loaded = ChainHistory::load(world.store(), world.vault.keys(), branch.id()).unwrap();
    let points = Points::new(world.store(), world.vault.keys(), &loaded);
    let cuts = points.between(PointTime(0), PointTime(u64::MAX), 99, vault::points::Which::All).unwrap();
    let seconds: Vec<_> = cuts.iter().filter(|cut| !matches!(cut.kind, CutKind::Marker { .. })).collect();
    assert!(seconds.len() >= 4, "{cuts:?}");
    for (index, cut) in seconds.iter().enumerate() {
        let nested = host.open(branch.id(), &Moment::Sequence(cut.sequence), "n").unwrap();
        let found = contents(&nested, DISK);
        assert!(states.contains(&found), "cut {index} is a state that was");
    }
    let named = host.open(branch.id(), &Moment::Marker("named".into()), "n").unwrap();
    assert!(contents(&named, DISK) == states[3]);
}

/// Passes reads on and refuses to create anything.
struct ReadOnlyStore(Arc<dyn Store>);

impl Store for ReadOnlyStore {
    fn create(&self, name: &ObjectName, _: &[Bytes]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly { name: name.clone(), source: "mounted read-only".into() })
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
        "a read-only store".into()
    }
}

#[test]
fn a_read_only_store_is_branched_on_the_host_and_says_so() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    history.write(DISK, 0, noise(1, 100_000));
    history.second();
    let store: Arc<dyn Store> = Arc::new(ReadOnlyStore(Arc::clone(world.store())));
    let vault: UnlockedVault =
        vault::Vault::open(store).unwrap().unlock(vault::Credential::Passphrase("passphrase")).unwrap();
    let host = world.host_with(vault, World::config());
    let branch = host.open(CHAIN, &Moment::Latest, "local").unwrap();
    assert!(branch.info().sentence().contains("source not fenced, point not pinned"), "{}", branch.info().sentence());
    let mut expected = contents(&branch, DISK);
    assert!(expected[..100_000] == noise(1, 100_000)[..]);
    for round in 0..4u64 {
        let data = noise(10 + round, 200_000);
        branch.disk(DISK).unwrap().write_at(round * 150_000, &data).unwrap();
        expected[round as usize * 150_000..][..200_000].copy_from_slice(&data);
        if round % 2 == 0 {
            branch.core().seal_all(SealWish::Now).unwrap();
        }
    }
    assert!(contents(&branch, DISK) == expected);
    branch.disk(DISK).unwrap().flush().unwrap();
    let id = branch.id();
    drop(branch);
    let branch = host.reopen(id).unwrap();
    assert!(contents(&branch, DISK) == expected);
    assert!(Catalog::load(world.store(), world.vault.keys()).unwrap().branches.is_empty());
}

#[test]
fn a_discarded_branch_stays_discarded() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    history.write(DISK, 0, noise(1, 4096));
    history.second();
    let host = world.host();
    let branch = host.open(CHAIN, &Moment::Latest, "b").unwrap();
    branch.discard().unwrap();
    assert!(branch.disk(DISK).unwrap().write_at(0, &[1]).is_err());
    let id = branch.id();
    drop(branch);
    assert!(matches!(host.reopen(id), Err(BranchError::Ended { .. })));
    assert!(host.list().unwrap().iter().any(|info| info.branch == id && info.ended.is_some()));
    assert!(Catalog::load(world.store(), world.vault.keys()).unwrap().branches[&id].discarded);
}

#[test]
fn a_branch_that_was_continued_elsewhere_writes_nothing_more() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    history.write(DISK, 0, noise(1, 4096));
    history.second();
    let host = world.host();
    let branch = host.open(CHAIN, &Moment::Latest, "b").unwrap();
    branch.disk(DISK).unwrap().write_at(0, &[1; 10]).unwrap();
    let session = Arc::new(world.vault.owner_session(&world.entropy, &world.clock).unwrap());
    let loaded = ChainHistory::load(world.store(), world.vault.keys(), branch.id()).unwrap();
    let other = vault::ChainWriter::open_generation(
        world.store(),
        &session,
        world.vault.keys(),
        &loaded,
        "a process server took over",
        vault::Delta::default(),
    );
    let _other = other.unwrap();
    assert!(branch.core().seal_step(SealWish::Now).unwrap_err().is_fenced());
    assert!(branch.disk(DISK).unwrap().write_at(0, &[2; 10]).is_err());
    let id = branch.id();
    drop(branch);
    assert!(matches!(host.reopen(id), Err(BranchError::TakenOver { .. })));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
    Seal,
    Second,
    Kill,
    Check(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE, 1..150_000u64).prop_map(|(start, len)| (start, len.min(SIZE - start)));
    prop_oneof![
        6 => (range.clone(), any::<u64>()).prop_map(|((start, len), seed)| Step::Write(start, len, seed)),
        1 => range.clone().prop_map(|(start, len)| Step::Zero(start, len)),
        1 => range.clone().prop_map(|(start, len)| Step::Discard(start, len)),
        1 => Just(Step::Flush),
        2 => Just(Step::Seal),
        1 => Just(Step::Second),
        1 => Just(Step::Kill),
        3 => range.prop_map(|(start, len)| Step::Check(start, len)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_branch_behaves_as_an_array_of_bytes(steps in prop::collection::vec(step(), 1..50)) {
        let world = World::new();
        let mut history = world.protect(&[SIZE]);
        history.write(DISK, 4096, noise(1, 300_000));
        history.second();
        let host = world.host();
        let mut branch = host.open(CHAIN, &Moment::Latest, "b").unwrap();
        let mut expected = contents(&branch, DISK);
        for step in steps {
            let device = branch.disk(DISK).unwrap();
            match step {
                Step::Write(start, len, seed) => {
                    let data = noise(seed, len as usize);
                    device.write_at(start, &data).unwrap();
                    expected[start as usize..][..data.len()].copy_from_slice(&data);
                }
                Step::Zero(start, len) => {
                    device.write_zeroes(start..start + len).unwrap();
                    expected[start as usize..(start + len) as usize].fill(0);
                }
                Step::Discard(start, len) => {
                    device.discard(start..start + len).unwrap();
                    expected[start as usize..(start + len) as usize].fill(0);
                }
                Step::Flush => device.flush().unwrap(),
                Step::Seal => branch.core().seal_all(SealWish::Now).unwrap(),
                Step::Second => world.test_clock.advance(1),
                Step::Kill => {
                    device.flush().unwrap();
                    let id = branch.id();
                    drop(device);
                    drop(branch);
                    branch = host.reopen(id).unwrap();
                }
                Step::Check(start, len) => {
                    let mut found = vec![0xaa; len as usize];
                    device.read_at(start, &mut found).unwrap();
                    prop_assert!(found[..] == expected[start as usize..(start + len) as usize]);
                    let extents = device.extents(start..start + len).unwrap();
                    let mut at = start;
                    for extent in extents {
                        prop_assert_eq!(extent.range.start, at);
                        at = extent.range.end;
                        if extent.kind != world::ExtentKind::Data {
                            let range = extent.range.start as usize..extent.range.end as usize;
                            prop_assert!(expected[range].iter().all(|byte| *byte == 0));
                        }
                    }
                    prop_assert_eq!(at, start + len);
                    let leaves = replication::ByteRange::new(start / 4096 * 4096, 4096);
                    let hashes = branch.core().leaf_hashes(DISK, leaves).unwrap();
                    let plain = replication::PlainLeafHash::of(&expected[leaves.within(0)]);
                    prop_assert_eq!(hashes[0], branch.core().leaf_key().leaf(plain));
                }
            }
        }
        prop_assert!(contents(&branch, DISK) == expected);
        branch.core().seal_all(SealWish::Final).unwrap();
        let nested = host.open(branch.id(), &Moment::Latest, "n").unwrap();
        prop_assert!(contents(&nested, DISK) == expected);
    }
}

#[test]
fn the_runner_seals_by_itself() {
    let world = World::new();
    let mut history = world.protect(&[SIZE]);
    history.write(DISK, 0, noise(1, 4096));
    history.second();
    let branch = Arc::new(world.host().open(CHAIN, &Moment::Latest, "b").unwrap());
    let runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    branch.disk(DISK).unwrap().write_at(0, &noise(7, 10_000)).unwrap();
    assert!(branch.figures().unsealed_bytes > 0);
    world.test_clock.advance(6);
    let begun = std::time::Instant::now();
    while branch.figures().unsealed_bytes > 0 {
        assert!(begun.elapsed().as_secs() < 20, "the runner seals what is due");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut found = vec![0; 10_000];
    branch.disk(DISK).unwrap().read_at(0, &mut found).unwrap();
    assert!(found == noise(7, 10_000));
    drop(runner);
}
