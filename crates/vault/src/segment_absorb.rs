//! Absorption: of several writes to one place between two barriers, only the last one's bytes are kept.
//!
//! Barriers are the cuts, and every heal's `p0`. Between two of them nobody can ask for the state in the middle, so the
//! pieces that remain, which do not overlap, may also carry the number of a later change of the same stretch: touching
//! pieces become one entry, and a leaf that several small writes filled has a known hash.

use std::collections::BTreeMap;

use bytes::Bytes;
use replication::geometry::{ByteRange, GRANULE_BYTES};
use replication::{Change, ChangeKind, DiskId, SequenceNumber};

use crate::table::{WIDE_BYTES_MIN, in_one_granule};

/// What remains of one or more changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) disk: DiskId,
    pub(crate) range: ByteRange,
    pub(crate) sequence: SequenceNumber,
    pub(crate) content: PieceContent,
}

/// What a piece holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PieceContent {
    /// Slices that fill the range, in order; together inside one granule.
    Data(Vec<Bytes>),
    Zero,
    Discarded,
}

/// What remains of `changes`, which are in the order of their sequence numbers, sorted by disk, start and sequence.
/// `barriers` are sorted; nothing at or below one is absorbed by anything above it.
pub(crate) fn absorb(changes: &[Change], barriers: &[SequenceNumber]) -> Vec<Piece> {
    assert!(changes.is_sorted_by_key(|change| change.sequence), "changes come in the order of the stream");
    assert!(barriers.is_sorted(), "barriers come in order");
    let mut pieces = Vec::with_capacity(changes.len());
    let mut rest = changes;
    for barrier in barriers {
        let (stretch, later) = rest.split_at(rest.partition_point(|change| change.sequence <= *barrier));
        absorb_stretch(stretch, &mut pieces);
        rest = later;
    }
    absorb_stretch(rest, &mut pieces);
    split_short(&mut pieces);
    pieces.sort_by_key(|piece| (piece.disk, piece.range.start, piece.sequence));
    pieces
}

fn absorb_stretch(changes: &[Change], out: &mut Vec<Piece>) {
    let mut covered: BTreeMap<DiskId, Covered> = BTreeMap::new();
    let mut kept = Vec::with_capacity(changes.len());
    for change in changes.iter().rev() {
        let Some(range) = change.kind.range() else { continue };
        covered.entry(change.disk).or_default().add(range, |visible| kept.push(cut_out(change, range, visible)));
    }
    kept.sort_by_key(|piece| (piece.disk, piece.range.start));
    join(kept, out);
}

/// The part `visible` of a change.
fn cut_out(change: &Change, range: ByteRange, visible: ByteRange) -> Piece {
    let content = match &change.kind {
        ChangeKind::Write { data, .. } => PieceContent::Data(vec![data.slice(visible.within(range.start))]),
        ChangeKind::Zero { .. } => PieceContent::Zero,
        _ => PieceContent::Discarded,
    };
    Piece { disk: change.disk, range: visible, sequence: change.sequence, content }
}

/// Joins touching pieces of one kind, then cuts data at the edges of granules.
fn join(kept: Vec<Piece>, out: &mut Vec<Piece>) {
    let first = out.len();
    for piece in kept.into_iter().flat_map(split_data) {
        match out[first..].last_mut() {
            Some(last) if last.disk == piece.disk && last.range.end() == piece.range.start => {
                match (&mut last.content, piece.content) {
                    (PieceContent::Data(slices), PieceContent::Data(more))
                        if last.range.start / GRANULE_BYTES == piece.range.start / GRANULE_BYTES =>
                    {
                        slices.extend(more);
                    }
                    (PieceContent::Zero, PieceContent::Zero) | (PieceContent::Discarded, PieceContent::Discarded) => {}
                    (_, content) => {
                        out.push(Piece { content, ..piece });
                        continue;
                    }
                }
                last.range = ByteRange::new(last.range.start, last.range.len + piece.range.len);
                last.sequence = last.sequence.max(piece.sequence);
            }
            _ => out.push(piece),
        }
    }
}

fn split_data(piece: Piece) -> Vec<Piece> {
    match &piece.content {
        PieceContent::Data(slices) if piece.range.start / GRANULE_BYTES != (piece.range.end() - 1) / GRANULE_BYTES => {
            let data = &slices[0];
            let cut = |part: ByteRange| Piece {
                range: part,
                content: PieceContent::Data(vec![data.slice(part.within(piece.range.start))]),
                ..piece.clone()
            };
            piece.range.split_at_multiples(GRANULE_BYTES).map(cut).collect()
        }
        _ => vec![piece],
    }
}

/// Cuts zero and discarded pieces that are not long enough for a wide entry at the edges of granules.
fn split_short(pieces: &mut Vec<Piece>) {
    let mut more = Vec::new();
    for piece in pieces.iter_mut() {
        let is_data = matches!(piece.content, PieceContent::Data(_));
        if is_data || piece.range.len >= WIDE_BYTES_MIN || in_one_granule(piece.range) {
            continue;
        }
        let mut parts = piece.range.split_at_multiples(GRANULE_BYTES);
        let first = parts.next().expect("a range is never empty");
        more.extend(parts.map(|range| Piece { range, ..piece.clone() }));
        piece.range = first;
    }
    pieces.append(&mut more);
}

/// Ranges that later changes overwrote: disjoint, start to end.
#[derive(Debug, Default)]
pub(crate) struct Covered(BTreeMap<u64, u64>);

impl Covered {
    /// Adds `range` and reports the parts that were not covered yet, in order.
    pub(crate) fn add(&mut self, range: ByteRange, mut visible: impl FnMut(ByteRange)) {
        let (mut start, mut end) = (range.start, range.end());
        let mut position = range.start;
        // The one range that begins before `range` and may reach into it, then those that begin inside it.
        let from = self.0.range(..=start).next_back().filter(|(_, e)| **e >= start).map_or(start, |(s, _)| *s);
        let touching: Vec<(u64, u64)> = self.0.range(from..=end).map(|(s, e)| (*s, *e)).collect();
        for (s, e) in touching {
            if let Some(gap) = ByteRange::between(position, s.min(range.end())) {
                visible(gap);
            }
            position = position.max(e);
            self.0.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        if let Some(gap) = ByteRange::between(position, range.end()) {
            visible(gap);
        }
        self.0.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use replication::SourceTime;

    const DISK_BYTES: u64 = 3 * GRANULE_BYTES;

    fn change(sequence: u64, start: u64, len: u64, kind: u8) -> Change {
        let range = ByteRange::new(start, len);
        let kind = match kind {
            0 => ChangeKind::Zero { range },
            1 => ChangeKind::Discard { range },
            fill => ChangeKind::Write { range, data: vec![fill; len as usize].into() },
        };
        let sequence = SequenceNumber(sequence);
        Change { sequence, time: SourceTime(0), disk: DiskId(0), continues: false, kind }
    }

    /// One number a byte: 256 for never written, 257 for discarded.
    fn replay(disk: &mut [u16], range: ByteRange, value: impl Fn(usize) -> u16) {
        for (index, byte) in disk[range.within(0)].iter_mut().enumerate() {
            *byte = value(index);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_remains_shows_the_same_bytes_at_every_barrier(
            writes in prop::collection::vec((0..DISK_BYTES - 1, 1..80_000u64, 0..6u8), 1..40),
            barriers in prop::collection::btree_set(0..42u64, 0..6),
        ) {
            let changes: Vec<Change> = writes.iter().enumerate()
                .map(|(i, &(start, len, kind))| change(i as u64 + 1, start, len.min(DISK_BYTES - start), kind)).collect();
            let barriers: Vec<SequenceNumber> = barriers.into_iter().map(SequenceNumber).collect();
            let pieces = absorb(&changes, &barriers);
            prop_assert!(pieces.is_sorted_by_key(|p| (p.disk, p.range.start, p.sequence)));
            for cut in barriers.iter().copied().chain([SequenceNumber(100)]) {
                let mut expected = vec![256u16; DISK_BYTES as usize];
                for change in changes.iter().filter(|c| c.sequence <= cut) {
                    let range = change.kind.range().expect("has one");
                    match &change.kind {
                        ChangeKind::Write { data, .. } => replay(&mut expected, range, |i| data[i].into()),
                        ChangeKind::Zero { .. } => replay(&mut expected, range, |_| 0),
                        _ => replay(&mut expected, range, |_| 257),
                    }
                }
                let mut found = vec![256u16; DISK_BYTES as usize];
                let mut sorted: Vec<&Piece> = pieces.iter().filter(|p| p.sequence <= cut).collect();
                sorted.sort_by_key(|p| p.sequence);
                for piece in sorted {
                    match &piece.content {
                        PieceContent::Data(slices) => {
                            let data = slices.concat();
                            prop_assert_eq!(data.len() as u64, piece.range.len);
                            prop_assert!(crate::table::in_one_granule(piece.range));
                            replay(&mut found, piece.range, |i| data[i].into());
                        }
                        PieceContent::Zero => replay(&mut found, piece.range, |_| 0),
                        PieceContent::Discarded => replay(&mut found, piece.range, |_| 257),
                    }
                }
                prop_assert!(found == expected, "at {cut}");
            }
        }
    }

    #[test]
    fn without_barriers_a_hot_block_is_kept_once_and_with_them_once_between_two() {
        let changes: Vec<Change> = (1..=100).map(|i| change(i, 8192, 4096, 7)).collect();
        assert_eq!(absorb(&changes, &[]).len(), 1);
        let barriers = [SequenceNumber(10), SequenceNumber(50)];
        let sequences: Vec<u64> = absorb(&changes, &barriers).iter().map(|p| p.sequence.0).collect();
        assert_eq!(sequences, [10, 50, 100]);
    }

    #[test]
    fn small_writes_that_touch_become_one_piece_and_huge_discards_stay_one() {
        let mut changes: Vec<Change> = (0..8).map(|i| change(i + 1, 4096 + i * 512, 512, 9)).collect();
        changes.extend((0..64).map(|i| change(100 + i, (i + 1) << 40, 1 << 40, 1)));
        let pieces = absorb(&changes, &[]);
        assert_eq!(pieces.len(), 2);
        assert_eq!(pieces[0].range, ByteRange::new(4096, 4096));
        assert_eq!(pieces[1].range, ByteRange::new(1 << 40, 64 << 40));
    }
}
