//! What an image has received since its last cut: where each leaf's bytes are, or why there are none.

use std::collections::{BTreeMap, HashMap};

use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use replication::{DiskId, LeafHash, SequenceNumber};

use crate::image::{Absence, runs};
use crate::object::FrameRef;
use crate::pack::ChunkPlace;
use crate::segment_absorb::Covered;
use crate::store::ObjectName;
use crate::table::{Content, Entry, Place, SourceIndex, WIDE_BYTES_MIN};
use crate::table_build::{PageSink, TableBuilder};

/// A map from disk ranges to chunks, in the order of arrival.
#[derive(Debug, Default)]
pub(crate) struct ImageMap {
    packs: Vec<ObjectName>,
    pack_numbers: HashMap<ObjectName, u32>,
    items: Vec<Item>,
    hashes: Vec<LeafHash>,
}

/// A run of leaves.
#[derive(Debug, Clone, Copy)]
struct Item {
    disk: DiskId,
    range: ByteRange,
    /// Larger came later.
    arrival: u64,
    content: ItemContent,
}

/// Leaves of a granule that were stored as a chunk.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(crate) pack: ObjectName,
    pub(crate) place: ChunkPlace,
    pub(crate) leaves: u16,
}

#[derive(Debug, Clone, Copy)]
enum ItemContent {
    /// A pack of the map, a frame in it, the run's place in the frame, and where its hashes begin.
    Data {
        pack: u32,
        frame: FrameRef,
        at: u32,
        hashes: u32,
    },
    Absent(Absence),
}

impl ImageMap {
    /// Whether nothing was received.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Bytes of memory in use.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of_val(&self.items[..]) + size_of_val(&self.hashes[..])
    }

    /// Leaves of a granule are a chunk, and hash to `hashes`.
    pub(crate) fn add_data(&mut self, disk: DiskId, granule: u64, chunk: Chunk, hashes: &[LeafHash], arrival: u64) {
        let Chunk { pack, place: ChunkPlace { frame, mut at }, leaves } = chunk;
        let next = self.packs.len() as u32;
        let packs = &mut self.packs;
        let pack = *self.pack_numbers.entry(pack).or_insert_with_key(|pack| {
            packs.push(pack.clone());
            next
        });
        let mut first_hash = self.hashes.len() as u32;
        for run in runs(leaves) {
            let range = run.range(granule * GRANULE_BYTES);
            let content = ItemContent::Data { pack, frame, at, hashes: first_hash };
            self.items.push(Item { disk, range, arrival, content });
            at += range.len as u32;
            first_hash += run.count;
        }
        self.hashes.extend_from_slice(hashes);
    }

    /// `range` holds no bytes.
    pub(crate) fn add_absent(&mut self, disk: DiskId, range: ByteRange, absence: Absence, arrival: u64) {
        if let Some(last) = self.items.last_mut()
            && last.disk == disk
            && last.range.end() == range.start
            && (last.arrival..=last.arrival + 1).contains(&arrival)
            && matches!(last.content, ItemContent::Absent(known) if known == absence)
        {
            // Nothing was received between the two, so nothing can lie over one and under the other.
            last.range = ByteRange::new(last.range.start, last.range.len + range.len);
            last.arrival = arrival;
            return;
        }
        self.items.push(Item { disk, range, arrival, content: ItemContent::Absent(absence) });
    }

    /// Enters everything into `table` at `p0`. Where ranges overlap, the one that came last shows.
    pub(crate) fn write<S: PageSink>(
        &self,
        p0: SequenceNumber,
        table: &mut TableBuilder,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        let sources: Vec<SourceIndex> = self.packs.iter().map(|pack| table.source(pack)).collect();
        let mut absent: Option<Item> = None;
        for item in self.visible() {
            match item.content {
                ItemContent::Absent(kind) => match &mut absent {
                    Some(last) if continues(last, &item, kind) => {
                        last.range = ByteRange::new(last.range.start, last.range.len + item.range.len);
                    }
                    _ => {
                        self.write_absent(absent.replace(item), p0, table, sink)?;
                    }
                },
                ItemContent::Data { pack, frame, at, hashes } => {
                    self.write_absent(absent.take(), p0, table, sink)?;
                    let place = Place { source: sources[pack as usize], frame, at };
                    let content = Content::Data(place);
                    let entry = Entry { disk: item.disk, range: item.range, sequence: p0, content };
                    let hashes = &self.hashes[hashes as usize..hashes as usize + entry.leaf_count()];
                    table.push(&entry, hashes, sink)?;
                }
            }
        }
        self.write_absent(absent, p0, table, sink)
    }

    fn write_absent<S: PageSink>(
        &self,
        item: Option<Item>,
        p0: SequenceNumber,
        table: &mut TableBuilder,
        sink: &mut S,
    ) -> Result<(), S::Error> {
        let Some(Item { disk, range, content: ItemContent::Absent(kind), .. }) = item else { return Ok(()) };
        let content = match kind {
            Absence::Zero => Content::Zero,
            Absence::Discarded => Content::Discarded,
            Absence::Unreadable => Content::Unreadable,
        };
        let wide = range.len >= WIDE_BYTES_MIN && kind != Absence::Unreadable;
        let unit = if wide { u64::MAX } else { GRANULE_BYTES };
        range
            .split_at_multiples(unit)
            .try_for_each(|range| table.push(&Entry { disk, range, sequence: p0, content }, &[], sink))
    }

    /// The items sorted by disk and start, without what later ones replaced.
    fn visible(&self) -> Vec<Item> {
        let mut sorted = self.items.clone();
        sorted.sort_by_key(|item| (item.disk, item.range.start));
        let overlaps = |pair: &[Item]| pair[0].disk == pair[1].disk && pair[0].range.end() > pair[1].range.start;
        if !sorted.windows(2).any(overlaps) {
            return sorted;
        }
        // Rare: a link broke and what was under way came again.
        let mut covered: BTreeMap<DiskId, Covered> = BTreeMap::new();
        let mut visible = Vec::with_capacity(self.items.len());
        let mut newest_first: Vec<&Item> = self.items.iter().collect();
        newest_first.sort_by_key(|item| std::cmp::Reverse(item.arrival));
        for item in newest_first {
            let covered = covered.entry(item.disk).or_default();
            covered.add(item.range, |part| visible.push(part_of(item, part)));
        }
        visible.sort_by_key(|item| (item.disk, item.range.start));
        visible
    }
}

fn continues(last: &Item, item: &Item, kind: Absence) -> bool {
    last.disk == item.disk
        && last.range.end() == item.range.start
        && matches!(last.content, ItemContent::Absent(known) if known == kind)
}

fn part_of(item: &Item, part: ByteRange) -> Item {
    let skipped = part.start - item.range.start;
    let content = match item.content {
        ItemContent::Data { pack, frame, at, hashes } => {
            // Ranges are made of whole leaves, so parts are too.
            ItemContent::Data { pack, frame, at: at + skipped as u32, hashes: hashes + (skipped / LEAF_BYTES) as u32 }
        }
        absent => absent,
    };
    Item { range: part, content, ..*item }
}
