//! The table: an immutable sorted structure that maps `(disk, start, sequence)` to where bytes are and what they hash
//! to. Segments, merged indexes and images are all tables; `docs/formats/table.md` describes every byte.
//!
//! ```text
//! root frame ── narrow top page ──► inner pages ──► leaf pages     entries inside one 64 KiB granule
//!            ── wide top page   ──► …                              zero and discarded ranges of 1 MiB and more
//!            ── sources                                            the objects that hold the bytes
//! ```
//!
//! Two trees, because they are asked differently: a narrow entry lies inside one granule, so that whatever covers a
//! granule is found by one seek; a wide entry may span terabytes, so every child names the end of what is below it.
//!
//! * [`page`](crate::table_page): one page, encoded and decoded.
//! * [`build`](crate::table_build): sorted entries in, frames out.
//! * [`read`](crate::table_read): look-ups, ranges and streaming, fetching pages on demand.

use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use replication::{DiskId, SequenceNumber};

use crate::object::FrameRef;

/// Bytes after which a page is closed.
pub(crate) const PAGE_BYTES_TARGET: usize = 32 << 10;
/// Largest page, in bytes: the target and one entry.
pub(crate) const PAGE_BYTES_MAX: usize = 40 << 10;
/// Most levels of a tree. Each level multiplies by hundreds, so more means damage.
pub(crate) const LEVELS_MAX: usize = 8;
/// Names in one page of sources.
pub(crate) const SOURCES_PER_PAGE: usize = 256;
/// Most sources of one table.
pub(crate) const SOURCES_MAX: usize = 1 << 24;
/// Zero and discarded ranges from this length on, in bytes, are wide entries.
pub(crate) const WIDE_BYTES_MIN: u64 = 1 << 20;
/// Largest plaintext of a data frame, in bytes: four granules of an image compress into about 4 % less than one by one,
/// in the same time (`docs/design/0007-speed-and-size.md`).
pub const DATA_FRAME_BYTES_MAX: usize = 4 * GRANULE_BYTES as usize;

/// Which of a table's source objects. Zero is the object that hosts the table itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceIndex(pub u32);

impl SourceIndex {
    /// The object that hosts the table.
    pub const HOST: SourceIndex = SourceIndex(0);
}

/// Where bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The object.
    pub source: SourceIndex,
    /// The frame in it.
    pub frame: FrameRef,
    /// First byte within the frame's plaintext.
    pub at: u32,
}

/// What a range holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes at a place.
    Data(Place),
    /// Zeroes that someone wrote.
    Zero,
    /// Nothing: reads as zeroes.
    Discarded,
    /// The source disk could not return these bytes: a recorded defect.
    Unreadable,
}

/// One entry of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The disk.
    pub disk: DiskId,
    /// The bytes it is about. Within one granule unless the entry is wide.
    pub range: ByteRange,
    /// When it was written.
    pub sequence: SequenceNumber,
    /// What it holds.
    pub content: Content,
}

/// The order of entries in a table.
pub(crate) type Key = (DiskId, u64, SequenceNumber);
/// One past a byte of a disk.
pub(crate) type End = (DiskId, u64);

impl Entry {
    /// Place in the table's order.
    pub(crate) fn key(&self) -> Key {
        (self.disk, self.range.start, self.sequence)
    }

    /// One past the last byte.
    pub(crate) fn end(&self) -> End {
        (self.disk, self.range.end())
    }

    /// How many leaf hashes belong to it: one for each whole aligned leaf of data.
    pub fn leaf_count(&self) -> usize {
        match self.content {
            Content::Data(_) => whole_leaves(self.range),
            _ => 0,
        }
    }

    /// Which of the two trees holds it.
    pub(crate) fn tree(&self) -> Tree {
        let wide = self.range.len >= WIDE_BYTES_MIN && matches!(self.content, Content::Zero | Content::Discarded);
        if wide { Tree::Wide } else { Tree::Narrow }
    }
}

/// Whole aligned leaves inside `range`.
pub fn whole_leaves(range: ByteRange) -> usize {
    range.whole_units(LEAF_BYTES).map_or(0, |leaves| (leaves.len / LEAF_BYTES) as usize)
}

/// Whether `range` lies inside one granule.
pub(crate) fn in_one_granule(range: ByteRange) -> bool {
    range.start / GRANULE_BYTES == (range.end() - 1) / GRANULE_BYTES
}

/// The two trees of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Tree {
    /// Entries inside one granule.
    Narrow,
    /// Long zero and discarded ranges.
    Wide,
}
