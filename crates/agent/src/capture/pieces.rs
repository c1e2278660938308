//! Requests in pieces that each fit into one change. The same request gives the same pieces, whoever divides it: an agent
//! that goes on with a ring must number what it holds as its predecessor did.

use replication::limits::{CHANGE_DATA_BYTES_MAX, CHANGE_RANGE_BYTES_MAX};
use replication::{ByteRange, ChangeKind};

use super::slabs::Slabs;

/// A write's data, copied once.
pub(super) fn write_pieces(range: ByteRange, data: &[u8], slabs: &Slabs) -> Vec<ChangeKind> {
    let mut start = range.start;
    let piece = |data: &[u8]| {
        let range = ByteRange::new(start, data.len() as u64);
        start = range.end();
        ChangeKind::Write { range, data: slabs.copy(data) }
    };
    data.chunks(CHANGE_DATA_BYTES_MAX).map(piece).collect()
}

/// A range without data.
pub(super) fn range_pieces(range: ByteRange, kind: impl Fn(ByteRange) -> ChangeKind) -> Vec<ChangeKind> {
    let starts = (range.start..range.end()).step_by(CHANGE_RANGE_BYTES_MAX as usize);
    let piece = |start: u64| ByteRange::new(start, CHANGE_RANGE_BYTES_MAX.min(range.end() - start));
    starts.map(piece).map(kind).collect()
}
