//! Painting: which entry shows at each byte. Entries are laid down newest first; each takes what is still bare.

use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::{LeafHash, LeafKey};

use crate::object::FrameRef;
use crate::view_source::ObjectId;

/// What a byte range of a view shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Bytes in a frame, from `at` on.
    Data {
        object: ObjectId,
        frame: FrameRef,
        at: u32,
    },
    Zero,
    Discarded,
    Unreadable,
    /// Nothing was ever written.
    Hole,
}

/// A stretch of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) range: ByteRange,
    pub(crate) shown: Shown,
}

/// Bytes of a window that nothing covers yet: disjoint, in order.
#[derive(Debug, Clone)]
pub(crate) struct Bare {
    parts: Vec<ByteRange>,
}

impl Bare {
    /// All of `window`.
    pub(crate) fn all(window: ByteRange) -> Bare {
        Bare { parts: vec![window] }
    }

    /// Whether everything is covered.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The smallest range that holds every bare byte.
    pub(crate) fn span(&self) -> Option<ByteRange> {
        ByteRange::between(self.parts.first()?.start, self.parts.last()?.end())
    }

    /// The bare parts.
    pub(crate) fn parts(&self) -> &[ByteRange] {
        &self.parts
    }

    /// Covers `range` and reports each part of it that was bare, in order.
    pub(crate) fn cover(&mut self, range: ByteRange, mut taken: impl FnMut(ByteRange)) {
        let from = self.parts.partition_point(|part| part.end() <= range.start);
        let to = from + self.parts[from..].partition_point(|part| part.start < range.end());
        let Some(touched) = self.parts.get(from..to).filter(|touched| !touched.is_empty()) else { return };
        let before = ByteRange::between(touched[0].start, range.start);
        let after = ByteRange::between(range.end(), touched[touched.len() - 1].end());
        touched.iter().filter_map(|part| part.intersection(range)).for_each(&mut taken);
        self.parts.splice(from..to, before.into_iter().chain(after));
    }
}

/// Leaf hashes of a window, as far as entries tell them.
#[derive(Debug)]
pub(crate) struct LeafPaint {
    /// Start of the window, a multiple of the leaf size.
    origin: u64,
    hashes: Vec<Option<LeafHash>>,
    /// Bytes of each leaf that read as zeroes because an entry, or the lack of any, says so.
    zero_bytes: Vec<u16>,
}

impl LeafPaint {
    /// Nothing known about `window`, which is made of whole leaves.
    pub(crate) fn new(window: ByteRange) -> LeafPaint {
        assert_eq!(window, window.widen_to(LEAF_BYTES), "a window is made of whole leaves");
        let leaves = (window.len / LEAF_BYTES) as usize;
        LeafPaint { origin: window.start, hashes: vec![None; leaves], zero_bytes: vec![0; leaves] }
    }

    /// `part` of an entry over `entry` shows, whose whole leaves have `hashes`.
    pub(crate) fn data(&mut self, part: ByteRange, entry: ByteRange, hashes: &[LeafHash]) {
        let (Some(shown), Some(hashed)) = (part.whole_units(LEAF_BYTES), entry.whole_units(LEAF_BYTES)) else { return };
        let from = ((shown.start - hashed.start) / LEAF_BYTES) as usize;
        let to = ((shown.start - self.origin) / LEAF_BYTES) as usize;
        for index in 0..(shown.len / LEAF_BYTES) as usize {
            self.hashes[to + index] = hashes.get(from + index).copied();
        }
    }

    /// `part` reads as zeroes.
    pub(crate) fn zero(&mut self, part: ByteRange) {
        for piece in part.split_at_multiples(LEAF_BYTES) {
            self.zero_bytes[((piece.start - self.origin) / LEAF_BYTES) as usize] += piece.len as u16;
        }
    }

    /// One element a leaf; `None` where only the bytes themselves can tell.
    pub(crate) fn finish(self, key: &LeafKey) -> Vec<Option<LeafHash>> {
        let zero = key.zero_leaf();
        let known = self.hashes.into_iter().zip(self.zero_bytes);
        known.map(|(hash, zeroes)| if u64::from(zeroes) == LEAF_BYTES { Some(zero) } else { hash }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn each_byte_is_taken_by_the_first_that_covers_it(
            ranges in prop::collection::vec((0..100u64, 1..40u64), 0..20),
        ) {
            let window = ByteRange::new(10, 80);
            let mut bare = Bare::all(window);
            let mut found = [None; 140];
            let mut expected = [None; 140];
            for (index, (start, len)) in ranges.into_iter().enumerate() {
                let range = ByteRange::new(start, len);
                bare.cover(range, |part| part.within(0).for_each(|byte| {
                    assert!(found[byte].is_none(), "taken twice");
                    found[byte] = Some(index);
                }));
                for byte in range.within(0) {
                    if window.within(0).contains(&byte) && expected[byte].is_none() {
                        expected[byte] = Some(index);
                    }
                }
            }
            prop_assert_eq!(found, expected);
            for byte in window.within(0) {
                let is_bare = bare.parts().iter().any(|part| part.within(0).contains(&byte));
                prop_assert_eq!(is_bare, expected[byte].is_none());
            }
        }
    }
}
