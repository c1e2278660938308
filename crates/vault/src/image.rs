//! Images: what a heal reads becomes chunks in packs and a table over them, every entry at the heal's `p0`.
//!
//! This is the path of initial replication. Granules are hashed, looked up, compressed and encrypted in batches on
//! several threads; packs are uploaded meanwhile. An image can be cut at any time: what came so far becomes a *partial
//! image*, durable before its reference is returned, and the next one begins.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;

use bytes::Bytes;
use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES, LEAVES_PER_GRANULE};
use replication::{ChainId, DiskId, Generation, LeafHash, LeafKey, PlainLeafHash, SequenceNumber};

use crate::error::VaultError;
use crate::image_map::{Chunk, ImageMap};
use crate::keys::WriterSession;
use crate::layer::{LayerKind, LayerRef};
use crate::object::{Compression, FrameClass, ObjectKind, leaves_look_incompressible};
use crate::pack::{ChunkPlace, PackWriter, SharedDedup};
use crate::parallel;
use crate::store::{ObjectName, Store};
use crate::table::DATA_FRAME_BYTES_MAX;
use crate::table_build::TableBuilder;
use crate::table_sink::RollingSink;

/// Bytes of granules that are worked on at once. Large enough that starting threads costs nothing and that few frames are
/// left half empty at its end.
const BATCH_BYTES: usize = 8 << 20;
const LEAF: usize = LEAF_BYTES as usize;

/// What a table entry of a range without bytes says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// It was read and is zero.
    Zero,
    /// The disk said it is not in use.
    Discarded,
    /// The disk could not return it.
    Unreadable,
}

/// How images are made.
#[derive(Debug, Clone, Copy)]
pub struct ImageOptions {
    /// Whether chunks are compressed.
    pub compression: Compression,
    /// Threads that hash, compress and encrypt. With one, uploads happen inline too.
    pub workers: NonZeroUsize,
}

/// Figures about an image since it was begun.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageStats {
    /// Bytes of data received.
    pub received_bytes: u64,
    /// Of these, bytes in leaves that were zero.
    pub zero_bytes: u64,
    /// Of these, bytes in chunks that were stored before.
    pub deduplicated_bytes: u64,
    /// Bytes of sealed chunks that were added to packs.
    pub stored_bytes: u64,
}

/// An image that is being received.
pub struct ImageBuilder {
    packs: PackWriter,
    leaf_key: LeafKey,
    zero_leaf: [u8; LEAF],
    chain: ChainId,
    generation: Generation,
    p0: SequenceNumber,
    options: ImageOptions,
    queue: Vec<Queued>,
    queued_bytes: usize,
    /// Counts what was received: where ranges overlap, order matters.
    arrivals: u64,
    map: ImageMap,
    stats: ImageStats,
}

/// Leaves of one granule, not yet worked on.
struct Queued {
    disk: DiskId,
    granule: u64,
    /// Number of its last part.
    arrival: u64,
    /// First leaf and whole leaves; disjoint and in order.
    parts: Vec<(u8, Bytes)>,
}

/// What looking at a granule gave.
struct Prepared {
    /// Leaves that hold data.
    data: u16,
    /// Leaves that are zero.
    zero: u16,
    hashes: Vec<LeafHash>,
    chunk: PreparedChunk,
}

enum PreparedChunk {
    /// All leaves are zero.
    None,
    Known(ObjectName, ChunkPlace),
    New {
        name: LeafHash,
        /// Not worth compressing: it gets a frame of its own, which random reads are thankful for.
        is_noise: bool,
    },
}

/// Granules of a batch whose chunks share a frame.
#[derive(Default)]
struct Group {
    granules: Vec<usize>,
    leaves: u32,
}

impl ImageBuilder {
    /// Begins an image of a heal of `chain` that starts at `p0`.
    pub fn new(
        session: Arc<WriterSession>,
        store: Arc<dyn Store>,
        dedup: SharedDedup,
        chain: ChainId,
        generation: Generation,
        p0: SequenceNumber,
        options: ImageOptions,
    ) -> ImageBuilder {
        let leaf_key = session.keys().shared.leaf.clone();
        ImageBuilder {
            packs: PackWriter::new(session, store, dedup, options.workers),
            leaf_key,
            zero_leaf: [0; LEAF],
            chain,
            generation,
            p0,
            options,
            queue: Vec::new(),
            queued_bytes: 0,
            arrivals: 0,
            map: ImageMap::default(),
            stats: ImageStats::default(),
        }
    }

    /// With smaller packs, for tests.
    #[cfg(test)]
    pub(crate) fn set_pack_bytes(&mut self, target: u64) {
        self.packs.set_pack_bytes(target);
    }

    /// Figures so far.
    pub fn stats(&self) -> ImageStats {
        self.stats
    }

    /// About how many bytes the table would take if the image were cut now. Cut well before this reaches memory's
    /// bounds: a table costs about 0.4 % of the data.
    pub fn pending_index_bytes(&self) -> usize {
        self.map.memory_bytes()
    }

    /// `disk` held `data` from byte `start`, a multiple of the leaf size, when it was read. If `data` is not made of
    /// whole leaves it ends the disk, and zeroes follow. What comes later replaces what came before.
    ///
    /// # Errors
    /// Those of storing packs. The builder stays usable: give it the same data again once the store is back.
    pub fn data(&mut self, disk: DiskId, start: u64, data: Bytes) -> Result<(), VaultError> {
        assert_eq!(start % LEAF_BYTES, 0, "heals move whole leaves");
        self.stats.received_bytes += data.len() as u64;
        let data = whole_leaves(data);
        let Some(range) = ByteRange::between(start, start + data.len() as u64) else { return Ok(()) };
        for part in range.split_at_multiples(GRANULE_BYTES) {
            let bytes = data.slice(part.within(start));
            self.queued_bytes += bytes.len();
            let granule = part.start / GRANULE_BYTES;
            let leaf = (part.start % GRANULE_BYTES / LEAF_BYTES) as u8;
            let before = self.arrivals;
            self.arrivals += 1;
            let arrival = self.arrivals;
            match self.queue.last_mut() {
                Some(last) if last.is_continued_by(disk, granule, leaf, before) => {
                    last.parts.push((leaf, bytes));
                    last.arrival = arrival;
                }
                _ => self.queue.push(Queued { disk, granule, arrival, parts: vec![(leaf, bytes)] }),
            }
            if self.queued_bytes >= BATCH_BYTES {
                self.work()?;
            }
        }
        Ok(())
    }

    /// `range` of `disk`, made of whole leaves, held no bytes for the reason `absence`.
    pub fn absent(&mut self, disk: DiskId, range: ByteRange, absence: Absence) {
        self.arrivals += 1;
        self.map.add_absent(disk, range.widen_to(LEAF_BYTES), absence, self.arrivals);
    }

    /// Makes everything received since the last cut durable and returns the layer that holds it; `None` if nothing
    /// was received.
    ///
    /// # Errors
    /// Those of the store; call again to retry. Nothing received is lost.
    pub fn cut(&mut self) -> Result<Option<LayerRef>, VaultError> {
        self.work()?;
        self.packs.flush()?;
        if self.map.is_empty() {
            return Ok(None);
        }
        let session = self.packs.session();
        let mut sink = RollingSink::new(session, self.packs.store(), ObjectKind::Image, self.chain, self.generation);
        let mut table = TableBuilder::new();
        self.map.write(self.p0, &mut table, &mut sink)?;
        let (root, summary) = table.finish(&mut sink)?;
        let layer = sink.finish(LayerKind::Image, 0, root, &summary)?;
        self.map = ImageMap::default();
        Ok(Some(layer))
    }

    /// Hashes, looks up, compresses and encrypts what is queued.
    fn work(&mut self) -> Result<(), VaultError> {
        if self.queue.is_empty() {
            return Ok(());
        }
        let this = &*self;
        let prepared = parallel::map(self.options.workers, &self.queue, |queued| this.prepare(queued));
        let groups = group(&prepared);
        let batch = self.packs.begin_batch(self.queue.len(), groups.len() as u32)?;
        let numbered: Vec<(u32, &Group)> = (batch.first_ordinal..).zip(&groups).collect();
        let (queue, compression) = (&self.queue, self.options.compression);
        let sealed = parallel::map(self.options.workers, &numbered, |(ordinal, group)| {
            let plain = gather(queue, &prepared, group);
            batch.sealer.seal(FrameClass::Data, *ordinal, &plain, compression)
        });
        for ((ordinal, group), sealed) in numbered.into_iter().zip(sealed) {
            self.stats.stored_bytes += sealed.len() as u64;
            let chunks = group.granules.iter().filter_map(|&index| prepared[index].new_chunk());
            self.packs.append(ordinal, sealed, chunks)?;
        }
        let queue = std::mem::take(&mut self.queue);
        self.queued_bytes = 0;
        let fresh: HashSet<usize> = groups.into_iter().flat_map(|group| group.granules).collect();
        for (index, (queued, prepared)) in queue.into_iter().zip(prepared).enumerate() {
            self.enter(&queued, prepared, fresh.contains(&index));
        }
        Ok(())
    }

    fn prepare(&self, queued: &Queued) -> Prepared {
        let mut prepared = Prepared { data: 0, zero: 0, hashes: Vec::new(), chunk: PreparedChunk::None };
        let mut leaves = Vec::with_capacity(LEAVES_PER_GRANULE as usize);
        for (index, leaf) in queued.leaves() {
            if leaf == self.zero_leaf {
                prepared.zero |= 1 << index;
            } else {
                prepared.data |= 1 << index;
                leaves.push(leaf);
            }
        }
        if leaves.is_empty() {
            return prepared;
        }
        prepared.hashes = PlainLeafHash::of_each(&leaves).into_iter().map(|plain| self.leaf_key.leaf(plain)).collect();
        let name = self.leaf_key.granule(&prepared.hashes);
        prepared.chunk = match self.packs.find(&name) {
            Some((pack, place)) => PreparedChunk::Known(pack, place),
            None => {
                let compressed = self.options.compression != Compression::None;
                PreparedChunk::New { name, is_noise: compressed && leaves_look_incompressible(&leaves) }
            }
        };
        prepared
    }

    /// Enters a granule into the map. `is_fresh`: its chunk was stored for it and not for an equal granule.
    fn enter(&mut self, queued: &Queued, prepared: Prepared, is_fresh: bool) {
        let data_bytes = u64::from(prepared.data.count_ones()) * LEAF_BYTES;
        let place = match prepared.chunk {
            PreparedChunk::None => None,
            PreparedChunk::Known(pack, place) => Some((pack, place)),
            PreparedChunk::New { name, .. } => {
                Some(self.packs.find(&name).expect("every new chunk of the batch was just added"))
            }
        };
        if let Some((pack, place)) = place {
            self.stats.deduplicated_bytes += if is_fresh { 0 } else { data_bytes };
            let chunk = Chunk { pack, place, leaves: prepared.data };
            self.map.add_data(queued.disk, queued.granule, chunk, &prepared.hashes, queued.arrival);
        }
        self.stats.zero_bytes += u64::from(prepared.zero.count_ones()) * LEAF_BYTES;
        let start = queued.granule * GRANULE_BYTES;
        for run in runs(prepared.zero) {
            self.map.add_absent(queued.disk, run.range(start), Absence::Zero, queued.arrival);
        }
    }
}

impl Prepared {
    /// Name and leaves of the chunk, if it is not stored yet.
    fn new_chunk(&self) -> Option<(LeafHash, u8)> {
        match self.chunk {
            PreparedChunk::New { name, .. } => Some((name, self.hashes.len() as u8)),
            PreparedChunk::None | PreparedChunk::Known(..) => None,
        }
    }
}

/// Which new chunks share a frame: neighbours in the order of arrival, each chunk once.
fn group(prepared: &[Prepared]) -> Vec<Group> {
    let mut names = HashSet::new();
    let mut groups = Vec::new();
    let mut open = Group::default();
    for (index, granule) in prepared.iter().enumerate() {
        let PreparedChunk::New { name, is_noise } = granule.chunk else { continue };
        if !names.insert(name) {
            continue;
        }
        let leaves = granule.hashes.len() as u32;
        if is_noise {
            groups.push(Group { granules: vec![index], leaves });
            continue;
        }
        if open.leaves + leaves > (DATA_FRAME_BYTES_MAX / LEAF) as u32 {
            groups.push(std::mem::take(&mut open));
        }
        open.granules.push(index);
        open.leaves += leaves;
    }
    groups.extend(Some(open).filter(|open| open.leaves > 0));
    groups
}

/// The plaintext of a frame: the leaves of its granules that hold data.
fn gather(queue: &[Queued], prepared: &[Prepared], group: &Group) -> Vec<u8> {
    let mut plain = Vec::with_capacity(group.leaves as usize * LEAF);
    for &index in &group.granules {
        let data = queue[index].leaves().filter(|(leaf, _)| prepared[index].data & 1 << leaf != 0);
        data.for_each(|(_, leaf)| plain.extend_from_slice(leaf));
    }
    plain
}

impl Queued {
    /// Whether leaf `leaf` can join this chunk: the same granule, behind what it holds, and received right after.
    fn is_continued_by(&self, disk: DiskId, granule: u64, leaf: u8, before: u64) -> bool {
        self.disk == disk && self.granule == granule && self.arrival == before && self.end() <= leaf
    }

    /// One past the last leaf.
    fn end(&self) -> u8 {
        self.parts.last().map_or(0, |(first, bytes)| first + (bytes.len() / LEAF) as u8)
    }

    fn leaves(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.parts.iter().flat_map(|(first, bytes)| (u32::from(*first)..).zip(bytes.chunks_exact(LEAF)))
    }
}

/// Pads the end of a disk to a whole leaf.
fn whole_leaves(data: Bytes) -> Bytes {
    if data.len().is_multiple_of(LEAF) {
        return data;
    }
    let mut padded = data.to_vec();
    padded.resize(data.len().next_multiple_of(LEAF), 0);
    padded.into()
}

/// A run of leaves within a granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Run {
    /// The run in the granule that begins at byte `start`.
    pub(crate) fn range(self, start: u64) -> ByteRange {
        ByteRange::new(start + u64::from(self.first) * LEAF_BYTES, u64::from(self.count) * LEAF_BYTES)
    }
}

/// The runs of set bits of a granule's leaf bitmap, in order.
pub(crate) fn runs(mut bitmap: u16) -> impl Iterator<Item = Run> {
    std::iter::from_fn(move || {
        let first = bitmap.trailing_zeros();
        if u64::from(first) >= LEAVES_PER_GRANULE {
            return None;
        }
        let count = (bitmap >> first).trailing_ones();
        bitmap &= !((((1u32 << count) - 1) << first) as u16);
        Some(Run { first, count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_exactly_the_bits_that_are_set() {
        for bitmap in 0..=u16::MAX {
            let mut rebuilt = 0u16;
            let mut end = None;
            for run in runs(bitmap) {
                assert!(end.is_none_or(|end| run.first > end), "runs are in order and do not touch");
                (run.first..run.first + run.count).for_each(|bit| rebuilt |= 1 << bit);
                end = Some(run.first + run.count);
            }
            assert_eq!(rebuilt, bitmap);
        }
    }
}
