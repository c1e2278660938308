//! What a branch was given since its last seal, by place: the newest content of each byte, in memory.
//!
//! The journal holds the same changes durably; the overlay is rebuilt from it. Once a change is in the vault its pieces
//! are dropped and read back from there.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use replication::geometry::{ByteRange, GRANULE_BYTES};
use replication::{ChangeKind, SequenceNumber};

/// What a piece holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// These bytes.
    Data(Bytes),
    /// Zeroes.
    Zero,
    /// Nothing any more; reads as zeroes.
    Discarded,
}

impl Content {
    fn slice(&self, from: u64, to: u64) -> Content {
        match self {
            Content::Data(bytes) => Content::Data(bytes.slice(from as usize..to as usize)),
            other => other.clone(),
        }
    }
}

#[derive(Debug, Clone)]
struct Piece {
    len: u64,
    sequence: SequenceNumber,
    content: Content,
}

/// The unsealed content of one disk: pieces that do not overlap.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    pieces: BTreeMap<u64, Piece>,
}

impl Overlay {
    /// Takes a change of this disk; changes come in order.
    pub(crate) fn apply(&mut self, sequence: SequenceNumber, kind: &ChangeKind) {
        let (range, content) = match kind {
            ChangeKind::Write { range, data } => (*range, Content::Data(data.clone())),
            ChangeKind::Zero { range } => (*range, Content::Zero),
            ChangeKind::Discard { range } => (*range, Content::Discarded),
            ChangeKind::Marker { .. } | ChangeKind::Geometry(_) | ChangeKind::HealStart { .. } => return,
        };
        self.clear(range);
        self.pieces.insert(range.start, Piece { len: range.len, sequence, content });
    }

    /// Takes everything out of `range`, cutting pieces that reach beyond it.
    fn clear(&mut self, range: ByteRange) {
        let before = self.pieces.range(..range.start).next_back().map(|(start, piece)| (*start, piece.clone()));
        if let Some((start, piece)) = before
            && start + piece.len > range.start
        {
            let kept = range.start - start;
            self.insert_part(start, &piece, 0, kept);
            if start + piece.len > range.end() {
                self.insert_part(start, &piece, range.end() - start, piece.len);
            }
        }
        let inside: Vec<u64> = self.pieces.range(range.start..range.end()).map(|(start, _)| *start).collect();
        for start in inside {
            let piece = self.pieces.remove(&start).expect("it was just listed");
            if start + piece.len > range.end() {
                self.insert_part(start, &piece, range.end() - start, piece.len);
            }
        }
    }

    fn insert_part(&mut self, start: u64, piece: &Piece, from: u64, to: u64) {
        let part = Piece { len: to - from, sequence: piece.sequence, content: piece.content.slice(from, to) };
        self.pieces.insert(start + from, part);
    }

    /// Forgets what is in the vault.
    pub(crate) fn drop_through(&mut self, through: SequenceNumber) {
        self.pieces.retain(|_, piece| piece.sequence > through);
    }

    /// The pieces that overlap `range`, clipped to it, in order.
    pub(crate) fn within(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, Content)> {
        let before =
            self.pieces.range(..range.start).next_back().filter(|(start, piece)| **start + piece.len > range.start);
        before.into_iter().chain(self.pieces.range(range.start..range.end())).filter_map(move |(start, piece)| {
            let whole = ByteRange::new(*start, piece.len);
            let part = whole.intersection(range)?;
            Some((part, piece.content.slice(part.start - start, part.end() - start)))
        })
    }

    /// Fills what the overlay holds of `range` into `buffer`; the rest of the range, in order.
    pub(crate) fn read(&self, range: ByteRange, buffer: &mut [u8]) -> Vec<ByteRange> {
        let mut missing = Vec::new();
        let mut at = range.start;
        for (part, content) in self.within(range) {
            missing.extend(ByteRange::between(at, part.start));
            at = part.end();
            let out = &mut buffer[part.within(range.start)];
            match content {
                Content::Data(bytes) => out.copy_from_slice(&bytes),
                Content::Zero | Content::Discarded => out.fill(0),
            }
        }
        missing.extend(ByteRange::between(at, range.end()));
        missing
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }
}

/// Bits of a word of [`Touched`].
const WORD_BITS: u64 = 64;
/// Words of a page of [`Touched`].
const PAGE_WORDS: usize = 64;
const PAGE_GRANULES: u64 = WORD_BITS * PAGE_WORDS as u64;

/// Which granules of a disk a branch ever wrote to. The others are read from the parent directly, whose cache of
/// resolved granules survives seals. May name too much, never too little.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    all: bool,
    pages: HashMap<u64, Box<[u64; PAGE_WORDS]>>,
}

impl Touched {
    /// Everything counts as touched: what the branch wrote is in the vault, and looking it up is not worth it.
    pub(crate) fn everything() -> Touched {
        Touched { all: true, pages: HashMap::new() }
    }

    pub(crate) fn mark(&mut self, range: ByteRange) {
        if self.all {
            return;
        }
        for page in range.split_at_multiples(PAGE_GRANULES * GRANULE_BYTES) {
            let first = page.start / GRANULE_BYTES;
            let last = (page.end() - 1) / GRANULE_BYTES;
            let words = self.pages.entry(first / PAGE_GRANULES).or_insert_with(|| Box::new([0; PAGE_WORDS]));
            for granule in first..=last {
                let bit = granule % PAGE_GRANULES;
                words[(bit / WORD_BITS) as usize] |= 1 << (bit % WORD_BITS);
            }
        }
    }

    /// Whether any granule of `range` is marked.
    pub(crate) fn any(&self, range: ByteRange) -> bool {
        if self.all || self.pages.is_empty() {
            return self.all;
        }
        (range.start / GRANULE_BYTES..=(range.end() - 1) / GRANULE_BYTES).any(|granule| {
            let bit = granule % PAGE_GRANULES;
            let page = self.pages.get(&(granule / PAGE_GRANULES));
            page.is_some_and(|words| words[(bit / WORD_BITS) as usize] >> (bit % WORD_BITS) & 1 == 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 4096;

    fn step() -> impl Strategy<Value = (u64, u64, u8)> {
        (0..SIZE, 1..700u64, 0u8..4).prop_map(|(start, len, kind)| (start, len.min(SIZE - start), kind))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_newest_content_of_each_byte_is_read(
            steps in prop::collection::vec(step(), 1..60), drop_at in 0usize..60, probes in prop::collection::vec(step(), 8)
        ) {
            let mut overlay = Overlay::default();
            let mut oracle: Vec<Option<(u64, u8)>> = vec![None; SIZE as usize];
            for (index, (start, len, kind)) in steps.iter().enumerate() {
                let (sequence, range) = (index as u64 + 1, ByteRange::new(*start, *len));
                let fill = index as u8 | 1;
                let kind = match kind {
                    0 => ChangeKind::Zero { range },
                    1 => ChangeKind::Discard { range },
                    _ => ChangeKind::Write { range, data: vec![fill; *len as usize].into() },
                };
                let value = if kind.data_len() > 0 { fill } else { 0 };
                overlay.apply(SequenceNumber(sequence), &kind);
                oracle[range.within(0)].fill(Some((sequence, value)));
                if index == drop_at {
                    let through = sequence / 2;
                    overlay.drop_through(SequenceNumber(through));
                    oracle.iter_mut().for_each(|byte| *byte = byte.filter(|(at, _)| *at > through));
                }
            }
            for (start, len, _) in probes.into_iter().chain([(0, SIZE, 0)]) {
                let range = ByteRange::new(start, len);
                let mut buffer = vec![0xee; len as usize];
                let missing = overlay.read(range, &mut buffer);
                for at in range.start..range.end() {
                    let is_missing = missing.iter().any(|gap| gap.start <= at && at < gap.end());
                    let expected = oracle[at as usize];
                    prop_assert_eq!(is_missing, expected.is_none());
                    if let Some((_, value)) = expected {
                        prop_assert_eq!(buffer[(at - start) as usize], value);
                    }
                }
            }
        }

        #[test]
        fn touched_granules_are_remembered(
            marks in prop::collection::vec((0u64..20_000, 1u64..300), 1..10), probe in 0u64..20_000
        ) {
            let mut touched = Touched::default();
            for (start, count) in &marks {
                touched.mark(ByteRange::new(start * GRANULE_BYTES + 1, count * GRANULE_BYTES - 2));
            }
            let expected = marks.iter().any(|(start, count)| (*start..start + count).contains(&probe));
            prop_assert_eq!(touched.any(ByteRange::new(probe * GRANULE_BYTES + 5, 1)), expected);
        }
    }
}
