//! Tables against a sorted list, and pages against mutation.

use std::collections::BTreeMap;

use proptest::prelude::*;
use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use replication::{DiskId, LeafHash, SequenceNumber};

use crate::layer::{LayerKind, LayerRef};
use crate::object::{FrameClass, FrameRef, ObjectKind};
use crate::store::ObjectName;
use crate::table::{Content, Entry, Place, SourceIndex, Tree, WIDE_BYTES_MIN};
use crate::table_build::TableBuilder;
use crate::table_page::{Child, InnerPage, LeafWriter, Page};
use crate::table_sink::RollingSink;
use crate::view_fixture::{Fixture, GENERATION};

fn hash(seed: u64) -> LeafHash {
    LeafHash(*blake3::hash(&seed.to_le_bytes()).as_bytes().first_chunk().expect("32 bytes"))
}

fn hashes(entry: &Entry) -> Vec<LeafHash> {
    (0..entry.leaf_count() as u64).map(|leaf| hash(entry.sequence.0 << 8 | leaf)).collect()
}

#[derive(Debug, Clone)]
struct Spec {
    disk: u16,
    sector: u64,
    sectors: u64,
    sequence: u64,
    kind: u8,
    frame: u32,
}

fn spec() -> impl Strategy<Value = Spec> {
    (0..3u16, 0..2000u64, 1..140u64, 0..50u64, 0..8u8, 0..4u32).prop_map(
        |(disk, sector, sectors, sequence, kind, frame)| Spec { disk, sector, sectors, sequence, kind, frame },
    )
}

fn entry(spec: &Spec) -> Entry {
    let start = spec.sector * 512;
    let room = GRANULE_BYTES - start % GRANULE_BYTES;
    let len = (spec.sectors * 512).min(room);
    let (range, content) = match spec.kind {
        0 => (ByteRange::new(start, len), Content::Zero),
        1 => (ByteRange::new(start, len), Content::Discarded),
        2 => (ByteRange::new(start, len), Content::Unreadable),
        3 => (ByteRange::new(start, WIDE_BYTES_MIN + spec.sectors * 7919 * 512), Content::Zero),
        4 => (ByteRange::new(start, WIDE_BYTES_MIN << spec.frame), Content::Discarded),
        _ => {
            let frame = FrameRef {
                offset: u64::from(spec.frame) * 1000,
                sealed_len: 1000,
                plain_len: 65_536,
                ordinal: spec.frame,
                class: FrameClass::Data,
            };
            let at = (65_536 - len) as u32 / 512 * 512;
            let source = SourceIndex(spec.frame);
            (ByteRange::new(start, len), Content::Data(Place { source, frame, at }))
        }
    };
    Entry { disk: DiskId(spec.disk), range, sequence: SequenceNumber(spec.sequence), content }
}

fn build(fixture: &Fixture, entries: &[Entry], page_bytes: usize, children: usize, object_bytes: u64) -> LayerRef {
    let kind = ObjectKind::MergedIndex;
    let sink = RollingSink::new(&fixture.session, fixture.store.as_ref(), kind, fixture.chain, GENERATION);
    let mut sink = sink.with_object_bytes(object_bytes);
    let mut table = TableBuilder::with_pages(page_bytes, children);
    // So that small source numbers mean something.
    for number in 0..300 {
        table.source(&ObjectName::new(format!("packs/{number}")).expect("valid"));
    }
    for entry in entries {
        table.push(entry, &hashes(entry), &mut sink).expect("stores");
    }
    let (root, summary) = table.finish(&mut sink).expect("stores");
    sink.finish(LayerKind::Merged, 1, root, &summary).expect("stores")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn look_ups_agree_with_a_sorted_list(
        specs in prop::collection::vec(spec(), 0..300),
        questions in prop::collection::vec((0..4u16, 0..3000u64, 1..5000u64), 1..20),
        page_bytes in 100..2000usize,
        children in 3..8usize,
        object_bytes in prop::sample::select(vec![2000u64, 1 << 20]),
    ) {
        let mut entries: Vec<Entry> = specs.iter().map(entry).collect();
        entries.sort_by_key(|entry| entry.key());
        let fixture = Fixture::new();
        let layer = build(&fixture, &entries, page_bytes, children, object_bytes);
        let source = fixture.source();
        let table = source.table(&layer).expect("reads");
        prop_assert_eq!(table.entries, entries.len() as u64);
        for tree in [Tree::Narrow, Tree::Wide] {
            let mut stream = table.stream(tree, &source).expect("reads");
            for entry in entries.iter().filter(|entry| entry.tree() == tree) {
                let (found, found_hashes) = stream.current().expect("one more");
                prop_assert_eq!(found, entry);
                prop_assert_eq!(found_hashes, &hashes(entry)[..]);
                stream.advance().expect("reads");
            }
            prop_assert!(stream.current().is_none());
        }
        for (disk, sector, sectors) in questions {
            let (disk, range) = (DiskId(disk), ByteRange::new(sector * 512, sectors * 512));
            let mut found = Vec::new();
            table.visit(&source, disk, range, &mut |entry, _| found.push(*entry)).expect("reads");
            let mut expected: Vec<Entry> =
                entries.iter().filter(|e| e.disk == disk && e.range.overlaps(range)).copied().collect();
            let order = |e: &Entry| (e.key(), e.range.len, format!("{:?}", e.content));
            found.sort_by_key(order);
            expected.sort_by_key(order);
            prop_assert_eq!(&found, &expected);
            prop_assert!(expected.is_empty() || layer.may_cover(disk, range));
            let next = entries.iter().filter(|e| e.tree() == Tree::Narrow && e.disk == disk)
                .map(|e| e.range.start).filter(|start| *start >= range.start).min();
            prop_assert_eq!(table.next_narrow_start(&source, disk, range.start).expect("reads"), next);
        }
        for number in 0..300 {
            let object = table.source(SourceIndex(number + 1), &source).expect("reads");
            prop_assert_eq!(source.name(object).to_string(), format!("packs/{number}"));
        }
    }

    #[test]
    fn changed_pages_are_refused_or_understood_but_never_panic(
        specs in prop::collection::vec(spec(), 1..60),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut by_tree: BTreeMap<bool, Vec<Entry>> = BTreeMap::new();
        for entry in specs.iter().map(entry) {
            by_tree.entry(entry.tree() == Tree::Wide).or_default().push(entry);
        }
        for (wide, mut entries) in by_tree {
            let tree = if wide { Tree::Wide } else { Tree::Narrow };
            entries.sort_by_key(|entry| entry.key());
            let mut writer = LeafWriter::new(tree);
            entries.iter().for_each(|entry| writer.push(entry, &hashes(entry)));
            let inner = InnerPage {
                children: entries.iter().map(|entry| Child {
                    first: entry.key(),
                    end: entry.end(),
                    source: SourceIndex(9),
                    frame: FrameRef { offset: 5, sealed_len: 9, plain_len: 3, ordinal: 7, class: FrameClass::Index },
                }).collect(),
            };
            for page in [writer.finish(), inner.encode(tree)] {
                match Page::decode(page.clone().into(), tree).expect("our own page") {
                    Page::Leaf(leaf) => prop_assert_eq!(leaf.entries(), &entries[..]),
                    Page::Inner(found) => prop_assert_eq!(&found, &inner),
                }
                let mut changed = page.clone();
                for (place, value) in &changes {
                    let place = place.index(changed.len());
                    changed[place] = *value;
                }
                changed.truncate(cut.index(changed.len()) + 1);
                if let Ok(Page::Leaf(leaf)) = Page::decode(changed.into(), tree) {
                    (0..leaf.entries().len()).for_each(|index| { leaf.hashes(index); });
                }
                let shorter = page[..cut.index(page.len())].to_vec();
                prop_assert!(Page::decode(shorter.into(), tree).is_err());
            }
        }
    }
}

#[test]
fn random_4_kib_writes_cost_less_than_three_quarters_of_a_percent() {
    let fixture = Fixture::new();
    let mut state = 1u64;
    let mut starts: Vec<u64> = (0..20_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 20) % (1 << 22) * LEAF_BYTES
        })
        .collect();
    starts.sort_unstable();
    starts.dedup();
    let entry = |(index, start): (usize, &u64)| {
        let number = (index / 16) as u32;
        let offset = u64::from(number) * 65_553;
        let frame =
            FrameRef { offset, sealed_len: 65_553, plain_len: 65_536, ordinal: number, class: FrameClass::Data };
        let place = Place { source: SourceIndex::HOST, frame, at: (index % 16 * 4096) as u32 };
        let sequence = SequenceNumber(1 << 44 | (start * 7919 % 100_000));
        Entry { disk: DiskId(0), range: ByteRange::new(*start, 4096), sequence, content: Content::Data(place) }
    };
    let entries: Vec<Entry> = starts.iter().enumerate().map(entry).collect();
    let layer = build(&fixture, &entries, 32 << 10, 512, 1 << 30);
    let share = layer.index_bytes as f64 / layer.data_bytes as f64;
    assert!(share < 0.0075, "{:.3} %", share * 100.0);
}
