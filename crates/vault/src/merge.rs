//! Merging layers of one generation into one: fewer tables to look into, whatever the retention.
//!
//! All entries are kept, so every cut stays exact; only tables are rewritten, never data. Layers are merged 64 at a
//! time, and merged ones again, so that a chain of n seals is read through O(log n) tables and each entry is rewritten
//! once a level.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;

use replication::{ChainId, Generation};

use crate::error::VaultError;
use crate::keys::WriterSession;
use crate::layer::{LayerKind, LayerRef};
use crate::object::ObjectKind;
use crate::table::{Content, Entry, Key, Place, SourceIndex, Tree};
use crate::table_build::TableBuilder;
use crate::table_read::{Stream, Table};
use crate::table_sink::RollingSink;
use crate::view_source::FrameSource;

/// Layers merged at once.
pub const MERGE_WAYS: usize = 64;
/// Fewest layers worth merging when size keeps it from being [`MERGE_WAYS`].
const MERGE_WAYS_MIN: usize = 8;
/// Most bytes of tables merged at once: bounds how long one merge takes.
const MERGE_INDEX_BYTES_MAX: u64 = 512 << 20;
/// Merges of merges: 64⁴ seals are more than two years of one every four seconds.
const LEVEL_MAX: u8 = 4;

/// Which of `layers`, the live ones of a chain, should be merged now: their positions, oldest first. Only layers of
/// one generation and level are merged; segments with segments, images with images of the same heal.
pub fn plan_merges(layers: &[LayerRef]) -> Option<Vec<usize>> {
    let mut groups: BTreeMap<(u8, u64), Vec<usize>> = BTreeMap::new();
    for (index, layer) in layers.iter().enumerate().filter(|(_, layer)| layer.level < LEVEL_MAX) {
        let sort = match layer.kind {
            // A generation's base is no number of a heal, so the two never meet.
            LayerKind::Segment | LayerKind::Merged => layer.first.generation().base(),
            LayerKind::Image => layer.first,
        };
        groups.entry((layer.level, sort.0)).or_default().push(index);
    }
    groups.into_values().find_map(|mut group| {
        if group.len() < MERGE_WAYS {
            return None;
        }
        group.sort_by_key(|index| (layers[*index].first, *index));
        group.truncate(MERGE_WAYS);
        let mut bytes = 0;
        let fitting = group.iter().take_while(|index| {
            bytes += layers[**index].index_bytes;
            bytes <= MERGE_INDEX_BYTES_MAX
        });
        let fitting = fitting.count();
        group.truncate(fitting);
        (group.len() >= MERGE_WAYS_MIN).then_some(group)
    })
}

/// Merges `layers` into one new table of `chain`, durable on return. They are one generation's, and either all
/// images of one heal or none.
///
/// # Errors
/// Those of reading the layers and storing objects. Nothing refers to what was stored before the failure.
pub fn merge_layers(
    source: &FrameSource,
    layers: &[LayerRef],
    session: &WriterSession,
    chain: ChainId,
    generation: Generation,
) -> Result<LayerRef, VaultError> {
    let images = layers.iter().filter(|layer| layer.kind == LayerKind::Image).count();
    assert!(images == 0 || images == layers.len(), "images are merged with images");
    let (kind, object_kind) = match images {
        0 => (LayerKind::Merged, ObjectKind::MergedIndex),
        _ => (LayerKind::Image, ObjectKind::Image),
    };
    let level = layers.iter().map(|layer| layer.level).max().unwrap_or(0) + 1;
    let store = source.store().as_ref();
    let mut sink = RollingSink::new(session, store, object_kind, chain, generation);
    let (root, summary) = merge_tables(source, layers, &mut sink)?;
    sink.finish(kind, level, root, &summary)
}

/// Streams the entries of `layers` in order into one table.
pub(crate) fn merge_tables(
    source: &FrameSource,
    layers: &[LayerRef],
    sink: &mut RollingSink<'_>,
) -> Result<(crate::object::FrameRef, crate::table_build::TableSummary), VaultError> {
    let tables: Vec<Arc<Table>> = layers.iter().map(|layer| source.table(layer)).collect::<Result<_, _>>()?;
    let mut builder = TableBuilder::new();
    let mut renumbered: Vec<HashMap<SourceIndex, SourceIndex>> = vec![HashMap::new(); tables.len()];
    for tree in [Tree::Wide, Tree::Narrow] {
        let mut streams: Vec<Stream> = tables.iter().map(|t| t.stream(tree, source)).collect::<Result<_, _>>()?;
        let key = |stream: &Stream| -> Option<Key> { stream.current().map(|(entry, _)| entry.key()) };
        let mut heads: BinaryHeap<Reverse<(Key, usize)>> =
            streams.iter().enumerate().filter_map(|(i, stream)| Some(Reverse((key(stream)?, i)))).collect();
        while let Some(Reverse((_, index))) = heads.pop() {
            let stream = &mut streams[index];
            let (entry, hashes) = stream.current().expect("a stream in the heap is not at its end");
            let entry = renumber(entry, &tables[index], &mut renumbered[index], source, &mut builder)?;
            builder.push(&entry, hashes, sink)?;
            stream.advance()?;
            heads.extend(key(stream).map(|key| Reverse((key, index))));
        }
    }
    builder.finish(sink)
}

/// The entry as the merged table refers to it.
fn renumber(
    entry: &Entry,
    table: &Table,
    known: &mut HashMap<SourceIndex, SourceIndex>,
    source: &FrameSource,
    builder: &mut TableBuilder,
) -> Result<Entry, VaultError> {
    let Content::Data(place) = entry.content else { return Ok(*entry) };
    let index = match known.get(&place.source) {
        Some(index) => *index,
        None => {
            let index = builder.source(&source.name(table.source(place.source, source)?));
            known.insert(place.source, index);
            index
        }
    };
    Ok(Entry { content: Content::Data(Place { source: index, ..place }), ..*entry })
}
