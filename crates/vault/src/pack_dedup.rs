//! Which chunks a server has stored already, and where.
//!
//! Holds only chunks that this server wrote itself into packs that are durable: a chunk whose pack might still fail,
//! or that somebody else could have forged, is never referred to. Loaded at start from the server's own pack indexes.

use replication::LeafHash;
use replication::geometry::LEAF_BYTES;

use crate::object::{FrameClass, FrameRef};
use crate::pack::ChunkPlace;
use crate::store::ObjectName;

/// Longest sealed frame that a record can name, in bytes.
const SEALED_LEN_MAX: u32 = (1 << 19) - 1;
/// Records allocated at once, so that growth never copies them.
const BLOCK: usize = 1 << 16;

/// Where a chunk is: 32 bytes.
#[derive(Debug, Clone, Copy)]
struct Record {
    name: [u8; 16],
    pack: u32,
    offset: u32,
    ordinal: u32,
    /// Sealed length of the frame in the low 19 bits; above, in leaves: 7 bits of the frame's length, 6 bits of the place
    /// within it. The chunk's own length is known to whoever looks it up.
    lens: u32,
}

/// Chunk name to place: 32 bytes a chunk and 4 to 8 for finding it.
#[derive(Debug)]
pub struct DedupIndex {
    packs: Vec<ObjectName>,
    blocks: Vec<Vec<Record>>,
    /// Open addressing with linear probing; 0 is empty, otherwise one more than a record's number.
    slots: Vec<u32>,
    len: usize,
    chunks_max: usize,
}

impl DedupIndex {
    /// An empty index that will hold at most `chunks_max` chunks. Beyond that, new chunks are stored again when they
    /// come again: space is lost, never data.
    pub fn new(chunks_max: usize) -> DedupIndex {
        let chunks_max = chunks_max.min(u32::MAX as usize - 1);
        DedupIndex { packs: Vec::new(), blocks: Vec::new(), slots: vec![0; 1024], len: 0, chunks_max }
    }

    /// Number of chunks.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no chunk.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory in use.
    pub fn memory_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.capacity() * size_of::<Record>()).sum::<usize>()
            + self.slots.capacity() * size_of::<u32>()
            + self.packs.iter().map(|pack| size_of::<ObjectName>() + pack.as_str().len()).sum::<usize>()
    }

    /// Where the chunk `name` is.
    pub fn find(&self, name: &LeafHash) -> Option<(&ObjectName, ChunkPlace)> {
        let record = self.record(self.slots[self.slot_of(&name.0)].checked_sub(1)?);
        let frame = FrameRef {
            offset: record.offset.into(),
            sealed_len: record.lens & SEALED_LEN_MAX,
            plain_len: (record.lens >> 19 & 0x7f) * LEAF_BYTES as u32,
            ordinal: record.ordinal,
            class: FrameClass::Data,
        };
        let place = ChunkPlace { frame, at: (record.lens >> 26) * LEAF_BYTES as u32 };
        Some((&self.packs[record.pack as usize], place))
    }

    /// Adds the chunks of a pack that is durable. Names already known keep their place.
    pub fn add_pack(&mut self, pack: &ObjectName, chunks: impl IntoIterator<Item = (LeafHash, ChunkPlace)>) {
        let number = self.packs.len() as u32;
        let before = self.len;
        for (name, ChunkPlace { frame, at }) in chunks {
            let [leaves, at] = [frame.plain_len, at].map(|bytes| bytes / LEAF_BYTES as u32);
            let fits = frame.offset <= u32::MAX.into() && frame.sealed_len <= SEALED_LEN_MAX && leaves < 128 && at < 64;
            if self.len == self.chunks_max || !fits {
                continue;
            }
            let lens = frame.sealed_len | leaves << 19 | at << 26;
            let offset = frame.offset as u32;
            self.insert(Record { name: name.0, pack: number, offset, ordinal: frame.ordinal, lens });
        }
        if self.len > before {
            self.packs.push(pack.clone());
        }
    }

    fn insert(&mut self, record: Record) {
        if (self.len + 1) * 10 > self.slots.len() * 9 {
            self.grow();
        }
        let slot = self.slot_of(&record.name);
        if self.slots[slot] != 0 {
            return;
        }
        if self.blocks.last().is_none_or(|block| block.len() == BLOCK) {
            self.blocks.push(Vec::with_capacity(if self.blocks.is_empty() { 0 } else { BLOCK }));
        }
        self.blocks.last_mut().expect("one was just added").push(record);
        self.len += 1;
        self.slots[slot] = self.len as u32;
    }

    fn record(&self, number: u32) -> &Record {
        &self.blocks[number as usize / BLOCK][number as usize % BLOCK]
    }

    /// The slot that holds `name`, or the empty one where it belongs.
    fn slot_of(&self, name: &[u8; 16]) -> usize {
        // Names are keyed hashes, so any eight bytes of them are as good as a hash.
        let hash = u64::from_le_bytes(*name.first_chunk().expect("a name has 16 bytes"));
        let mut slot = ((u128::from(hash) * self.slots.len() as u128) >> 64) as usize;
        loop {
            match self.slots[slot].checked_sub(1) {
                Some(number) if self.record(number).name != *name => {
                    slot = if slot + 1 == self.slots.len() { 0 } else { slot + 1 };
                }
                _ => return slot,
            }
        }
    }

    fn grow(&mut self) {
        // By a half: at worst 60 % full, 6.7 bytes a chunk.
        self.slots = vec![0; self.slots.len() * 3 / 2];
        for number in 0..self.len as u32 {
            let slot = self.slot_of(&self.record(number).name.clone());
            self.slots[slot] = number + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(number: u64) -> (LeafHash, ChunkPlace) {
        let hash = blake3::hash(&number.to_le_bytes());
        let name = LeafHash(*hash.as_bytes().first_chunk().expect("32 bytes"));
        let frame = FrameRef {
            offset: number * 100,
            sealed_len: 99,
            plain_len: 4096 * (1 + number as u32 % 64),
            ordinal: number as u32,
            class: FrameClass::Data,
        };
        (name, ChunkPlace { frame, at: 4096 * (number as u32 % 64) })
    }

    #[test]
    fn everything_added_is_found_within_the_memory_promised() {
        let mut index = DedupIndex::new(1 << 20);
        for pack in 0..100u64 {
            let name = ObjectName::new(format!("packs/{pack}")).expect("valid");
            index.add_pack(&name, (pack * 5000..(pack + 1) * 5000).map(chunk));
        }
        assert_eq!(index.len(), 500_000);
        for number in 0..500_000 {
            let (name, place) = chunk(number);
            let (pack, found) = index.find(&name).expect("was added");
            assert_eq!((pack.as_str(), found), (format!("packs/{}", number / 5000).as_str(), place));
        }
        assert!(index.find(&chunk(500_000).0).is_none());
        assert!(index.memory_bytes() <= 42 * index.len(), "{} bytes a chunk", index.memory_bytes() / index.len());
    }

    #[test]
    fn a_full_index_forgets_nothing_and_takes_nothing() {
        let mut index = DedupIndex::new(10);
        let name = ObjectName::new("packs/a").expect("valid");
        index.add_pack(&name, (0..20).map(chunk));
        assert_eq!(index.len(), 10);
        assert!(index.find(&chunk(9).0).is_some() && index.find(&chunk(10).0).is_none());
    }
}
