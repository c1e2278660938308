//! Views against a slow oracle: random histories of changes, heals, merges and branches; every cut and byte compared.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use replication::{Change, ChangeKind, DiskId, PlainLeafHash, SequenceNumber};
use world::ExtentKind;

use crate::error::VaultError;
use crate::image::Absence;
use crate::layer::{LayerKind, LayerRef};
use crate::merge::{MERGE_WAYS, merge_layers, plan_merges};
use crate::pack::load_dedup;
use crate::store::{ObjectStoreAdapter, Store};
use crate::verify::{ChainToVerify, verify};
use crate::view::{ChainView, ReadError, ViewBelow};
use crate::view_fixture::{Fixture, GENERATION, ONE, change, noise, write};
use crate::view_source::{CacheBytes, FrameSource};

const DISK_BYTES: u64 = 5 * GRANULE_BYTES + 3 * LEAF_BYTES + 512;
const DISK_LEAVES: u64 = DISK_BYTES.div_ceil(LEAF_BYTES);
const PADDED_BYTES: u64 = DISK_LEAVES * LEAF_BYTES;

/// What the oracle remembers of one change of a range.
#[derive(Debug, Clone)]
struct Event {
    sequence: u64,
    disk: u16,
    range: ByteRange,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Data(Bytes),
    Zero,
    Discarded,
    Unreadable,
}

/// Kind and value of a byte: `None` if unreadable.
type Byte = (ExtentKind, Option<u8>);
const HOLE: Byte = (ExtentKind::Hole, Some(0));

struct Oracle {
    events: Vec<Event>,
    parent: Option<(Arc<Oracle>, u64)>,
}

impl Oracle {
    fn disk(&self, disk: u16, cut: u64) -> Vec<Byte> {
        let mut bytes = match &self.parent {
            Some((parent, at)) => parent.disk(disk, *at),
            None => vec![HOLE; PADDED_BYTES as usize],
        };
        let mut events: Vec<&Event> = self.events.iter().filter(|e| e.disk == disk && e.sequence <= cut).collect();
        events.sort_by_key(|event| event.sequence);
        for event in events {
            for (index, byte) in bytes[event.range.within(0)].iter_mut().enumerate() {
                *byte = match &event.what {
                    What::Data(data) => (ExtentKind::Data, Some(data[index])),
                    What::Zero => (ExtentKind::Zero, Some(0)),
                    What::Discarded => HOLE,
                    What::Unreadable => (ExtentKind::Data, None),
                };
            }
        }
        bytes
    }

    /// Whether the newest event that touches a leaf covers it and has bytes: then its hash must be known.
    fn must_know(&self, disk: u16, cut: u64, leaf: ByteRange) -> bool {
        let touching = self.events.iter().filter(|e| e.disk == disk && e.sequence <= cut && e.range.overlaps(leaf));
        match touching.max_by_key(|event| event.sequence) {
            Some(event) => event.range.intersection(leaf) == Some(leaf) && !matches!(event.what, What::Unreadable),
            None => self.parent.as_ref().is_none_or(|(parent, at)| parent.must_know(disk, *at, leaf)),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Changes, with a cut after some of them, sealed together.
    Seal(Vec<(u16, u64, u64, u8, bool)>),
    /// Runs of leaves, and after which of them a partial image is cut.
    Heal(Vec<(u16, u64, u64, u8, bool)>),
    /// Merge those of the segments so far whose bit is set: neighbours or not.
    Merge(u32),
    /// Go on in a branch at this one of the cuts so far.
    Branch(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let change = (0..2u16, 0..DISK_BYTES, 1..150_000u64, 0..9u8, any::<bool>());
    let run = (0..2u16, 0..DISK_LEAVES, 1..40u64, 0..7u8, any::<bool>());
    prop_oneof![
        4 => prop::collection::vec(change, 1..10).prop_map(Step::Seal),
        2 => prop::collection::vec(run, 1..8).prop_map(Step::Heal),
        2 => any::<u32>().prop_map(Step::Merge),
        1 => any::<prop::sample::Index>().prop_map(Step::Branch),
    ]
}

/// A history that grows in the vault and in the oracle alike.
struct Run {
    fixture: Fixture,
    next: u64,
    layers: Vec<LayerRef>,
    events: Vec<Event>,
    cuts: Vec<u64>,
    below: Option<(ViewBelow, Arc<Oracle>)>,
    source: Arc<FrameSource>,
}

impl Run {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn seal(&mut self, specs: &[(u16, u64, u64, u8, bool)]) {
        let (mut changes, mut barriers) = (Vec::new(), Vec::new());
        for &(disk, start, len, kind, cut) in specs {
            // Writes are mostly of sectors; a few are not aligned at all.
            let unit = if kind == 8 { 1 } else { 512 };
            let start = start / unit * unit;
            let len = (len.min(DISK_BYTES - start) / unit * unit).max(unit.min(DISK_BYTES - start));
            let range = ByteRange::new(start, len);
            let sequence = self.number();
            let (what, kind) = match kind {
                0 => (What::Zero, ChangeKind::Zero { range }),
                1 => (What::Discarded, ChangeKind::Discard { range }),
                seed => {
                    let data = Bytes::from(noise(sequence * u64::from(seed), len as usize));
                    (What::Data(data.clone()), ChangeKind::Write { range, data })
                }
            };
            changes.push(change(sequence, disk, kind));
            self.events.push(Event { sequence, disk, range, what });
            if cut {
                barriers.push(SequenceNumber(sequence));
                self.cuts.push(sequence);
            }
        }
        self.cuts.push(self.next);
        self.layers.push(self.fixture.layer(&changes, &barriers));
    }

    fn heal(&mut self, specs: &[(u16, u64, u64, u8, bool)]) {
        let p0 = self.number();
        let mut image = self.fixture.image(p0);
        image.set_pack_bytes(100_000);
        // Within one heal what came later replaces what came before, but only until the image is cut.
        let mut fresh: Vec<(u16, u64)> = Vec::new();
        for &(disk, leaf, count, kind, cut) in specs {
            let leaves = leaf..(leaf + count).min(DISK_LEAVES);
            if leaves.clone().any(|leaf| fresh.contains(&(disk, leaf))) {
                continue;
            }
            fresh.extend(leaves.clone().map(|leaf| (disk, leaf)));
            let range = ByteRange::between(leaves.start * LEAF_BYTES, leaves.end * LEAF_BYTES).expect("not empty");
            let what = match kind {
                0 => Some((What::Zero, Absence::Zero)),
                1 => Some((What::Discarded, Absence::Discarded)),
                2 => Some((What::Unreadable, Absence::Unreadable)),
                _ => None,
            };
            let what = if let Some((what, absence)) = what {
                image.absent(DiskId(disk), range, absence);
                what
            } else {
                // Few different contents, so that chunks repeat; some leaves are zero without being named so.
                let mut data: Vec<u8> = leaves.clone().flat_map(|leaf| noise(leaf % 5, 4096)).collect();
                for (leaf, bytes) in leaves.clone().zip(data.chunks_exact_mut(4096)) {
                    if kind == 3 && leaf % 3 == 0 {
                        bytes.fill(0);
                    }
                }
                if range.end() > DISK_BYTES {
                    data.truncate((DISK_BYTES - range.start) as usize);
                }
                image.data(DiskId(disk), range.start, data.clone().into()).expect("stores");
                data.resize(range.len as usize, 0);
                What::Data(data.into())
            };
            for range in range.split_at_multiples(LEAF_BYTES) {
                let what = match &what {
                    What::Data(data) => {
                        let bytes = data.slice(range.within(leaves.start * LEAF_BYTES));
                        if bytes.iter().all(|byte| *byte == 0) { What::Zero } else { What::Data(bytes) }
                    }
                    other => other.clone(),
                };
                self.events.push(Event { sequence: p0, disk, range, what });
            }
            if cut {
                self.layers.extend(image.cut().expect("stores"));
            }
        }
        self.layers.extend(image.cut().expect("stores"));
        self.cuts.push(p0);
    }

    fn merge(&mut self, mask: u32) {
        let mut position = 0;
        let chosen = |layer: &LayerRef| {
            position += 1;
            layer.kind != LayerKind::Image && mask >> (position % 32) & 1 == 1
        };
        let (rest, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.layers).into_iter().partition(chosen);
        self.layers = kept;
        if rest.len() < 2 {
            self.layers.extend(rest);
            return;
        }
        let fixture = &self.fixture;
        let merged = merge_layers(&fixture.source(), &rest, &fixture.session, fixture.chain, GENERATION);
        let merged = merged.expect("merges");
        assert_eq!(merged.entries, rest.iter().map(|layer| layer.entries).sum::<u64>());
        self.layers.push(merged);
    }

    fn view(&self) -> (Arc<ChainView>, Arc<Oracle>) {
        let source = Arc::clone(&self.source);
        let below = self.below.as_ref();
        let view = ChainView::new(source, self.layers.clone(), below.map(|(view, _)| view.clone()));
        let parent = below.map(|(view, oracle)| (Arc::clone(oracle), view.at.0));
        (Arc::new(view), Arc::new(Oracle { events: self.events.clone(), parent }))
    }

    fn branch(&mut self, cut: u64) {
        let (view, oracle) = self.view();
        self.below = Some((ViewBelow { view, at: SequenceNumber(cut) }, oracle));
        // Numbers of a branch have nothing to do with its parent's.
        self.next = 1000 * (self.next % 7);
        (self.layers, self.events, self.cuts) = (Vec::new(), Vec::new(), vec![self.next]);
    }

    fn check(&self, reads: &[(u64, u64)]) {
        let (view, oracle) = self.view();
        let key = &self.fixture.reader.shared().leaf;
        for cut in self.cuts.iter().copied() {
            for disk in 0..2 {
                let expected = oracle.disk(disk, cut);
                let (at, id) = (SequenceNumber(cut), DiskId(disk));
                check_bytes(&view, at, id, ByteRange::new(0, PADDED_BYTES), &expected);
                for &(start, len) in reads {
                    check_bytes(&view, at, id, ByteRange::new(start, len.min(PADDED_BYTES - start)), &expected);
                }
                let whole = ByteRange::new(0, PADDED_BYTES);
                let hashes = view.leaf_hashes(at, id, whole).expect("indexes read");
                for (leaf, hash) in whole.split_at_multiples(LEAF_BYTES).zip(&hashes) {
                    let bytes: Option<Vec<u8>> = expected[leaf.within(0)].iter().map(|byte| byte.1).collect();
                    let right = bytes.map(|bytes| key.leaf(PlainLeafHash::of(&bytes)));
                    assert!(hash.is_none() || *hash == right, "hash of {leaf} of {id} at {cut}");
                    assert!(hash.is_some() || !oracle.must_know(disk, cut, leaf), "no hash of {leaf} at {cut}");
                }
                let mut end = 0;
                for extent in view.extents(at, id, whole, usize::MAX).expect("indexes read") {
                    assert_eq!(extent.range.start, end, "extents leave no gap");
                    end = extent.range.end;
                    let kinds = &expected[extent.range.start as usize..end as usize];
                    assert!(kinds.iter().all(|byte| byte.0 == extent.kind), "{extent:?} of {id} at {cut}");
                }
                assert_eq!(end, PADDED_BYTES);
            }
        }
    }
}

fn check_bytes(view: &ChainView, cut: SequenceNumber, disk: DiskId, range: ByteRange, expected: &[Byte]) {
    let expected: Option<Vec<u8>> = expected[range.within(0)].iter().map(|byte| byte.1).collect();
    let mut found = vec![0xee; range.len as usize];
    match (view.read(cut, disk, range.start, &mut found), expected) {
        (Ok(()), Some(expected)) => assert!(found == expected, "{range} of {disk} at {cut}"),
        (Err(ReadError::Unreadable { range: lost, .. }), None) => assert!(lost.overlaps(range)),
        (result, expected) => panic!("{range} of {disk} at {cut}: {result:?}, readable: {}", expected.is_some()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_byte_hash_and_extent_at_every_cut_is_what_the_history_says(
        steps in prop::collection::vec(step(), 1..12),
        reads in prop::collection::vec((0..PADDED_BYTES, 1..100_000u64), 0..8),
        tiny_cache: bool,
    ) {
        let cache = if tiny_cache { CacheBytes { index: 1, data: 1, resolved: 1 } } else { CacheBytes::default() };
        let fixture = Fixture::new();
        let source = fixture.source_with(Arc::clone(&fixture.reader), cache);
        let mut run =
            Run { fixture, next: 0, layers: Vec::new(), events: Vec::new(), cuts: vec![0], below: None, source };
        for step in &steps {
            match step {
                Step::Seal(changes) => run.seal(changes),
                Step::Heal(runs) => run.heal(runs),
                Step::Merge(mask) => run.merge(*mask),
                Step::Branch(cut) => {
                    let cut = run.cuts[cut.index(run.cuts.len())];
                    run.check(&[]);
                    run.branch(cut);
                }
            }
        }
        run.check(&reads);
        let chains = [ChainToVerify { chain: run.fixture.chain, layers: run.layers.clone(), superseded: Vec::new() }];
        let report = verify(&run.fixture.source(), &chains, ONE).expect("reads");
        prop_assert!(report.is_sound(), "{:?}", report.damaged);
    }
}

#[test]
fn what_comes_later_in_one_image_replaces_what_came_before() {
    let fixture = Fixture::new();
    let mut image = fixture.image(5);
    let disk = DiskId(0);
    image.data(disk, 0, noise(1, 3 * 65_536).into()).expect("stores");
    image.absent(disk, ByteRange::new(65_536, 8192), Absence::Zero);
    image.data(disk, 65_536 + 4096, noise(2, 4096).into()).expect("stores");
    let layer = image.cut().expect("stores").expect("something came");
    assert!(image.cut().expect("stores").is_none(), "nothing came since");
    let mut expected = noise(1, 3 * 65_536);
    expected[65_536..65_536 + 4096].fill(0);
    expected[65_536 + 4096..65_536 + 8192].copy_from_slice(&noise(2, 4096));
    let view = ChainView::new(fixture.source(), vec![layer], None);
    let mut found = vec![0; expected.len()];
    view.read(SequenceNumber(5), disk, 0, &mut found).expect("reads");
    assert!(found == expected);
    view.read(SequenceNumber(4), disk, 0, &mut found).expect("reads");
    assert!(found.iter().all(|byte| *byte == 0), "nothing shows below p0");
}

#[test]
fn neighbours_share_a_frame_and_noise_has_its_own() {
    let fixture = Fixture::new();
    let mut image = fixture.image(1);
    for granule in 0..8u64 {
        let text: Vec<u8> = format!("granule {granule} ").into_bytes().into_iter().cycle().take(65_536).collect();
        image.data(DiskId(0), granule * 65_536, text.into()).expect("stores");
        if granule == 1 {
            image.data(DiskId(0), 1 << 20, noise(5, 65_536).into()).expect("stores");
        }
    }
    image.cut().expect("stores");
    let keys = crate::keys::OpenKeys::of_writer(fixture.session.keys());
    let packs = fixture.store.list("packs/", None, 10).expect("lists");
    let chunks = crate::pack::read_pack_index(&fixture.store, &keys, &packs[0]).expect("reads");
    let places: Vec<(u32, u32, u32)> =
        chunks.iter().map(|(_, place)| (place.frame.ordinal, place.at, place.frame.plain_len)).collect();
    let four = |ordinal| (0..4).map(move |index| (ordinal, index * 65_536, 4 * 65_536));
    assert_eq!(places, [(0, 0, 65_536)].into_iter().chain(four(1)).chain(four(2)).collect::<Vec<_>>());
}

#[test]
fn the_same_disk_again_costs_its_table_only() {
    let fixture = Fixture::new();
    let data = Bytes::from(noise(9, 4 << 20));
    let stored = |p0: u64| {
        let mut image = fixture.image(p0);
        image.data(DiskId(0), 0, data.clone()).expect("stores");
        (image.cut().expect("stores").expect("a layer"), image.stats())
    };
    let (_, first) = stored(1);
    assert!(first.stored_bytes >= 4 << 20);
    let (layer, second) = stored(2);
    assert_eq!(second.stored_bytes, 0);
    assert_eq!(second.deduplicated_bytes, 4 << 20);
    assert!(layer.index_bytes * 100 < 4 << 20, "{} bytes of index", layer.index_bytes);
    // A later run of the same server finds them too, without the read key.
    let keys = crate::keys::OpenKeys::of_writer(fixture.session.keys());
    let loaded = load_dedup(&fixture.store, &keys, fixture.session.keys().writer(), 1 << 20).expect("lists");
    assert!(loaded.skipped.is_empty());
    assert_eq!(loaded.index.len(), 64);
    let mut image = Fixture { dedup: Arc::new(std::sync::RwLock::new(loaded.index)), ..fixture }.image(3);
    image.data(DiskId(0), 0, data.clone()).expect("stores");
    image.cut().expect("stores");
    assert_eq!(image.stats().stored_bytes, 0);
}

#[test]
fn threads_change_nothing() {
    let changes: Vec<Change> = (0..300).map(|i| write(i + 1, 0, i * 40_960, noise(i, 40_960))).collect();
    let two = std::num::NonZeroUsize::new(2).expect("two");
    let seal = |workers| {
        let fixture = Fixture::new();
        fixture.segment_with(&changes, &[], workers);
        let mut image = fixture.image_with(9999, workers, crate::object::Compression::Fast);
        image.data(DiskId(1), 0, noise(5, 9 << 20).into()).expect("stores");
        image.cut().expect("stores");
        let names = fixture.store.list("", None, 1000).expect("lists");
        names.into_iter().map(|name| (name.clone(), fixture.store.read_all(&name).expect("reads"))).collect::<Vec<_>>()
    };
    assert!(seal(ONE) == seal(two), "the same bytes, whatever the number of threads");
}

#[test]
fn block_status_of_64_tib_costs_what_its_entries_cost() {
    let fixture = Fixture::new();
    let tib = 1u64 << 40;
    let disk_bytes = 64 * tib;
    let mut changes: Vec<Change> = (0..1024)
        .map(|i| change(i + 1, 0, ChangeKind::Discard { range: ByteRange::new(i * (tib / 16), tib / 16) }))
        .collect();
    changes.push(change(2000, 0, ChangeKind::Zero { range: ByteRange::new(10 * tib + 512, 3 * tib) }));
    changes.push(write(2001, 0, 40 * tib, noise(1, 4096)));
    let layers = vec![
        fixture.layer(&changes, &[SequenceNumber(1500)]),
        fixture.layer(&[write(3000, 0, disk_bytes - 4096, noise(2, 4096))], &[]),
    ];
    assert!(layers[0].entries < 10, "{} entries", layers[0].entries);
    let view = ChainView::new(fixture.source(), layers, None);
    let whole = ByteRange::new(0, disk_bytes);
    let extents = view.extents(SequenceNumber(5000), DiskId(0), whole, 100).expect("reads");
    let starts: Vec<(u64, ExtentKind)> = extents.iter().map(|extent| (extent.range.start, extent.kind)).collect();
    let expected = [
        (0, ExtentKind::Hole),
        (10 * tib + 512, ExtentKind::Zero),
        (13 * tib + 512, ExtentKind::Hole),
        (40 * tib, ExtentKind::Data),
        (40 * tib + 4096, ExtentKind::Hole),
        (disk_bytes - 4096, ExtentKind::Data),
    ];
    assert_eq!(starts, expected);
    assert_eq!(view.extents(SequenceNumber(5000), DiskId(0), whole, 2).expect("reads").len(), 2);
}

#[test]
fn hashes_need_no_read_key_and_data_does() {
    let fixture = Fixture::new();
    let layer = fixture.layer(&[write(1, 0, 4096, noise(1, 8192))], &[]);
    let locked = Arc::new(crate::keys::OpenKeys::of_writer(fixture.session.keys()));
    let view = ChainView::new(fixture.source_with(locked, CacheBytes::default()), vec![layer], None);
    let cut = SequenceNumber(1);
    let hashes = view.leaf_hashes(cut, DiskId(0), ByteRange::new(0, 12_288)).expect("indexes read");
    let key = &fixture.reader.shared().leaf;
    let of = |bytes: &[u8]| Some(key.leaf(PlainLeafHash::of(bytes)));
    let data = noise(1, 8192);
    assert_eq!(hashes, [Some(key.zero_leaf()), of(&data[..4096]), of(&data[4096..])]);
    let error = view.read(cut, DiskId(0), 4096, &mut [0; 10]).expect_err("locked");
    assert!(matches!(error, ReadError::Vault { source: VaultError::Locked { .. }, .. }), "{error:?}");
}

#[test]
fn a_flipped_byte_is_found_named_and_never_returned() {
    let fixture = Fixture::new();
    let changes: Vec<Change> = (0..64).map(|i| write(i + 1, 0, i * 65_536, noise(i, 65_536))).collect();
    let segment = fixture.layer(&changes, &[]);
    let mut image = fixture.image(100);
    image.data(DiskId(0), 32 * 65_536, noise(77, 1 << 20).into()).expect("stores");
    let layers = vec![segment, image.cut().expect("stores").expect("a layer")];
    let good = |layers: Vec<LayerRef>, fixture: &Fixture| {
        let view = ChainView::new(fixture.source(), layers, None);
        let mut bytes = vec![0; 4 << 20];
        view.read(SequenceNumber(200), DiskId(0), 0, &mut bytes).map(|()| bytes)
    };
    let expected = good(layers.clone(), &fixture).expect("reads");
    let names = fixture.store.list("", None, 1000).expect("lists");
    assert_eq!(names.len(), 3, "a segment, a pack, an image");
    for victim in &names {
        let size = fixture.store.size(victim).expect("known");
        for place in [0, 100, size / 2, size - 1] {
            let damaged = ObjectStoreAdapter::in_memory();
            for name in &names {
                let mut bytes = fixture.store.read_all(name).expect("reads").to_vec();
                if name == victim {
                    bytes[place as usize] ^= 0x10;
                }
                damaged.create(name, &[bytes.into()]).expect("stores");
            }
            let copy = Fixture::on(Arc::new(damaged));
            match good(layers.clone(), &copy) {
                Ok(bytes) => assert!(bytes == expected),
                Err(ReadError::Vault { source: VaultError::Damaged { name, .. }, .. }) => assert_eq!(&name, victim),
                // Flips in the version or the vault's id make it look like somebody else's.
                Err(ReadError::Vault { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            let chains = [ChainToVerify { chain: fixture.chain, layers: layers.clone(), superseded: Vec::new() }];
            let report = verify(&copy.source(), &chains, ONE).expect("verifies");
            assert_eq!(report.damaged.keys().collect::<Vec<_>>(), [victim], "byte {place}");
            if place == size / 2 {
                let affects = &report.damaged[victim].affects;
                assert!(affects.iter().all(|a| a.disk == DiskId(0)) && !affects.is_empty(), "{affects:?}");
            }
        }
    }
}

#[test]
fn a_missing_object_is_damage_and_a_forgotten_one_is_reported() {
    let fixture = Fixture::new();
    let mut image = fixture.image(3);
    image.data(DiskId(0), 0, noise(1, 65_536).into()).expect("stores");
    let layer = image.cut().expect("stores").expect("a layer");
    let chains = |layers| [ChainToVerify { chain: fixture.chain, layers, superseded: Vec::new() }];
    let report = verify(&fixture.source(), &chains(vec![layer.clone()]), ONE).expect("verifies");
    assert!(report.is_sound() && report.unreferenced.is_empty(), "{report:?}");
    assert_eq!((report.entries, report.frames, report.data_bytes), (1, 1, 65_536));
    let report = verify(&fixture.source(), &chains(Vec::new()), ONE).expect("verifies");
    assert_eq!(report.unreferenced.len(), 2);
    assert!(report.is_sound() && report.foreign.is_empty());
    let other = Fixture::new();
    let name = layer.object().expect("resolved");
    other.store.create(name, &[fixture.store.read_all(name).expect("reads")]).expect("stores");
    let report = verify(&other.source(), &chains(vec![layer]), ONE).expect("verifies");
    assert!(report.damaged.keys().next().expect("the pack").as_str().starts_with("packs/"));
}

#[test]
fn merges_are_planned_by_level_generation_and_heal() {
    let fixture = Fixture::new();
    let segment = |n: u64| fixture.layer(&[write(n, 0, n * 4096, noise(n, 4096))], &[]);
    let mut layers: Vec<LayerRef> = (1..MERGE_WAYS as u64).map(segment).collect();
    assert_eq!(plan_merges(&layers), None);
    layers.insert(5, {
        let mut image = fixture.image(1000);
        image.data(DiskId(0), 0, noise(1, 4096).into()).expect("stores");
        image.cut().expect("stores").expect("a layer")
    });
    assert_eq!(plan_merges(&layers), None, "images are not segments");
    layers.push(segment(1 << 44 | 1));
    assert_eq!(plan_merges(&layers), None, "another generation");
    layers.insert(0, segment(500));
    let plan = plan_merges(&layers).expect("64 segments");
    assert_eq!(plan.len(), MERGE_WAYS);
    assert!(!plan.contains(&6) && plan.last() == Some(&0), "oldest first, no image: {plan:?}");
    layers[3].level = 1;
    assert_eq!(plan_merges(&layers), None);
}

#[test]
fn layers_whose_sequences_interleave_are_painted_newest_first() {
    let fixture = Fixture::new();
    let data = |n: u64| noise(n, 8192);
    let segments: Vec<LayerRef> = (1..=6).map(|n| fixture.layer(&[write(n, 0, n * 512, data(n))], &[])).collect();
    let merge = |members: [usize; 3]| {
        let chosen = members.map(|member| segments[member].clone());
        merge_layers(&fixture.source(), &chosen, &fixture.session, fixture.chain, GENERATION).expect("merges")
    };
    let view = ChainView::new(fixture.source(), vec![merge([0, 2, 4]), merge([1, 3, 5])], None);
    for cut in 0..=6 {
        let mut expected = vec![0; 16_384];
        (1..=cut).for_each(|n| expected[n as usize * 512..][..8192].copy_from_slice(&data(n)));
        let mut found = vec![0xee; expected.len()];
        view.read(SequenceNumber(cut), DiskId(0), 0, &mut found).expect("reads");
        assert!(found == expected, "at {cut}");
    }
}
