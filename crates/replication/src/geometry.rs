//! Disks as both ends see them: ranges in bytes, the three block sizes of the product, and a disk's identity.

use std::fmt;

use crate::codec::{DecodeError, Decoder, Encoder};
use crate::limits;
use crate::position::DiskId;

/// Smallest unit of change, in bytes.
pub const SECTOR_BYTES: u64 = 512;
/// Unit of comparison, in bytes: each aligned leaf has a hash of its own.
pub const LEAF_BYTES: u64 = 4096;
/// Unit of images and of index look-ups, in bytes. No index entry crosses a granule's edge.
pub const GRANULE_BYTES: u64 = 64 * 1024;
/// Leaves in a granule.
pub const LEAVES_PER_GRANULE: u64 = GRANULE_BYTES / LEAF_BYTES;

/// A half-open range of bytes of one disk, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Number of bytes, at least one.
    pub len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`.
    pub fn new(start: u64, len: u64) -> ByteRange {
        assert!(len > 0, "a range is never empty");
        assert!(start.checked_add(len).is_some(), "a range ends within 2^64 bytes");
        ByteRange { start, len }
    }

    /// The range `start..end`, or `None` if that is empty.
    pub fn between(start: u64, end: u64) -> Option<ByteRange> {
        (start < end).then(|| ByteRange::new(start, end - start))
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// The bytes in both ranges.
    pub fn intersection(self, other: ByteRange) -> Option<ByteRange> {
        ByteRange::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(self, other: ByteRange) -> bool {
        self.intersection(other).is_some()
    }

    /// The smallest range of whole `unit`s that holds this one.
    pub fn widen_to(self, unit: u64) -> ByteRange {
        let start = self.start / unit * unit;
        ByteRange::new(start, self.end().div_ceil(unit) * unit - start)
    }

    /// The largest range of whole `unit`s inside this one, if there is any.
    pub fn whole_units(self, unit: u64) -> Option<ByteRange> {
        // Ranges come from outside and may end at the last byte there is.
        ByteRange::between(self.start.div_ceil(unit).checked_mul(unit)?, self.end() / unit * unit)
    }

    /// This range cut at every multiple of `unit`, in order.
    pub fn split_at_multiples(self, unit: u64) -> impl Iterator<Item = ByteRange> {
        let mut start = self.start;
        std::iter::from_fn(move || {
            let edge = (start / unit).checked_add(1).and_then(|units| units.checked_mul(unit));
            let end = edge.unwrap_or(u64::MAX).min(self.end());
            let piece = ByteRange::between(start, end)?;
            start = end;
            Some(piece)
        })
    }

    /// The range as indices into a buffer that begins at byte `origin` of the disk.
    pub fn within(self, origin: u64) -> std::ops::Range<usize> {
        (self.start - origin) as usize..(self.end() - origin) as usize
    }

    /// Appends the range: varint start, varint length.
    pub fn encode(self, out: &mut Encoder) {
        out.varint(self.start).varint(self.len);
    }

    /// Reads a range of at most `limit` bytes.
    pub fn decode(input: &mut Decoder, limit: u64) -> Result<ByteRange, DecodeError> {
        let start = input.varint("range start")?;
        let len = input.varint_max("range length", limit)?;
        if len == 0 || start.checked_add(len).is_none() {
            return Err(DecodeError::Inconsistent("a range is empty or ends beyond 2^64"));
        }
        Ok(ByteRange { start, len })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end())
    }
}

/// What tells one physical or virtual disk from another, as observed on the machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DiskIdentity {
    /// Serial number, WWN or, for an image file, a name chosen at protection time. Never empty.
    pub serial: String,
    /// Bytes that were read from fixed places of the disk (partition table, superblocks), hashed; zero if unknown.
    pub fingerprint: [u8; 16],
}

/// A disk's description at some position of a chain. Sequenced like any other change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DiskGeometry {
    /// The number assigned at protection time.
    pub disk: DiskId,
    /// What distinguishes the disk itself.
    pub identity: DiskIdentity,
    /// Where the operating system shows it, for people.
    pub path: String,
    /// Size in bytes, a multiple of [`SECTOR_BYTES`].
    pub size_bytes: u64,
    /// Logical sector size in bytes, as the guest sees it.
    pub logical_sector_bytes: u32,
    /// Physical sector size in bytes.
    pub physical_sector_bytes: u32,
}

impl DiskGeometry {
    /// Whether this says that the disk is not protected any more: it has no bytes.
    pub fn is_removal(&self) -> bool {
        self.size_bytes == 0
    }

    /// What says that this disk is not protected any more.
    #[must_use]
    pub fn into_removal(self) -> DiskGeometry {
        DiskGeometry { size_bytes: 0, ..self }
    }

    /// The whole disk as a range; `None` for a disk of size zero.
    pub fn range(&self) -> Option<ByteRange> {
        ByteRange::between(0, self.size_bytes)
    }

    /// Appends the description.
    pub fn encode(&self, out: &mut Encoder) {
        out.u16(self.disk.0)
            .text(&self.identity.serial)
            .raw(&self.identity.fingerprint)
            .text(&self.path)
            .u64(self.size_bytes)
            .u32(self.logical_sector_bytes)
            .u32(self.physical_sector_bytes);
    }

    /// Reads a description.
    pub fn decode(input: &mut Decoder) -> Result<DiskGeometry, DecodeError> {
        let geometry = DiskGeometry {
            disk: DiskId(input.u16("disk id")?),
            identity: DiskIdentity {
                serial: input.text("disk serial", limits::NAME_BYTES_MAX)?,
                fingerprint: input.array("disk fingerprint")?,
            },
            path: input.text("disk path", limits::NAME_BYTES_MAX)?,
            size_bytes: input.u64("disk size")?,
            logical_sector_bytes: input.u32("logical sector size")?,
            physical_sector_bytes: input.u32("physical sector size")?,
        };
        if !geometry.size_bytes.is_multiple_of(SECTOR_BYTES) || geometry.size_bytes > limits::DISK_BYTES_MAX {
            return Err(DecodeError::Inconsistent("a disk's size is not a whole number of sectors up to 8 EiB"));
        }
        Ok(geometry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_the_range_and_cross_no_edge(start in 0u64..1 << 40, len in 1u64..1 << 20) {
            let range = ByteRange::new(start, len);
            let mut at = start;
            for piece in range.split_at_multiples(GRANULE_BYTES) {
                prop_assert_eq!(piece.start, at);
                prop_assert_eq!(piece.start / GRANULE_BYTES, (piece.end() - 1) / GRANULE_BYTES);
                at = piece.end();
            }
            prop_assert_eq!(at, range.end());
        }

        #[test]
        fn widening_and_narrowing_bracket_the_range(start in 0u64..1 << 40, len in 1u64..1 << 20) {
            let range = ByteRange::new(start, len);
            let wide = range.widen_to(LEAF_BYTES);
            prop_assert!(wide.start <= range.start && wide.end() >= range.end());
            prop_assert!(wide.len < range.len + 2 * LEAF_BYTES);
            if let Some(whole) = range.whole_units(LEAF_BYTES) {
                prop_assert_eq!(whole.intersection(range), Some(whole));
                prop_assert_eq!(whole.start % LEAF_BYTES + whole.end() % LEAF_BYTES, 0);
            }
        }
    }
}
