//! Sealing a segment: the changes of one seal interval become data frames and a table over them.
//!
//! Changes are absorbed between barriers, sorted by disk and place, and packed into frames of at most one granule of
//! plaintext, so that a random read decrypts little and neighbours on the disk share a frame. Frames are hashed,
//! compressed and encrypted in parallel. The segment's object, or the manifest that carries a small one inline, is the
//! caller's: nothing is stored here.

use std::num::NonZeroUsize;

use bytes::Bytes;
use replication::geometry::{GRANULE_BYTES, LEAF_BYTES};
use replication::{Change, LeafHash, LeafKey, PlainLeafHash, SequenceNumber};

use crate::error::VaultError;
use crate::layer::{Host, LayerKind, LayerRef};
use crate::object::{Compression, FrameClass, ObjectBuilder};
use crate::parallel;
use crate::segment_absorb::{Piece, PieceContent, absorb};
use crate::table::{Content, Entry, Place, SourceIndex};
use crate::table_build::TableBuilder;
use crate::table_sink::{HostSink, layer};

/// Largest plaintext of a segment's data frame, in bytes. Smaller than an image's: what a frame of scattered writes holds
/// is rarely read together.
const FRAME_BYTES_MAX: usize = GRANULE_BYTES as usize;

/// How segments are sealed.
#[derive(Debug, Clone)]
pub struct SealOptions<'a> {
    /// The vault's leaf key.
    pub leaf_key: &'a LeafKey,
    /// Whether frames are compressed.
    pub compression: Compression,
    /// Threads that hash, compress and encrypt.
    pub workers: NonZeroUsize,
}

/// A sealed segment.
#[derive(Debug, Clone)]
pub struct SealedSegment {
    /// Reference to its table; `None` if the changes touched no byte (markers only).
    pub layer: Option<LayerRef>,
    /// Figures about it.
    pub stats: SegmentStats,
}

/// Figures about a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SegmentStats {
    /// Bytes of data in the changes.
    pub changed_bytes: u64,
    /// Of these, bytes that were kept after absorption.
    pub kept_bytes: u64,
    /// Bytes of the sealed data frames.
    pub stored_bytes: u64,
    /// Entries of the table.
    pub entries: u64,
}

/// Seals `changes`, which are in the order of the stream, into `object`.
///
/// `barriers` are the sequence numbers, sorted, at which the state must stay exact: every cut, and the `p0` of every
/// heal. The layer's host is `host`: [`Host::ThisManifest`] if `object` is the manifest that will refer to it.
///
/// # Errors
/// [`VaultError::LimitExceeded`] if the object would grow beyond its bounds: seal earlier.
pub fn seal_segment(
    changes: &[Change],
    barriers: &[SequenceNumber],
    object: &mut ObjectBuilder<'_>,
    host: Host,
    options: &SealOptions<'_>,
) -> Result<SealedSegment, VaultError> {
    let changed_bytes = changes.iter().map(|change| change.kind.data_len() as u64).sum();
    let mut stats = SegmentStats { changed_bytes, ..SegmentStats::default() };
    let pieces = absorb(changes, barriers);
    if pieces.is_empty() {
        return Ok(SealedSegment { layer: None, stats });
    }
    let mut frames = seal_frames(&pieces, object, options)?.into_iter();
    let mut table = TableBuilder::new();
    let mut current: Option<StoredFrame> = None;
    for piece in &pieces {
        let empty = match piece.content {
            PieceContent::Data(_) => None,
            PieceContent::Zero => Some(Content::Zero),
            PieceContent::Discarded => Some(Content::Discarded),
        };
        if let Some(content) = empty {
            table.push(&entry(piece, content), &[], &mut HostSink(object))?;
            continue;
        }
        stats.kept_bytes += piece.range.len;
        if current.as_ref().is_none_or(|frame| frame.at == frame.place.plain_len) {
            current = frames.next();
            stats.stored_bytes += current.as_ref().map_or(0, |frame| u64::from(frame.place.sealed_len));
        }
        let frame = current.as_mut().expect("frames were made of the same pieces");
        let place = Place { source: SourceIndex::HOST, frame: frame.place, at: frame.at };
        let entry = entry(piece, Content::Data(place));
        frame.at += piece.range.len as u32;
        let hashes = frame.hashes.drain(..entry.leaf_count()).collect::<Vec<_>>();
        table.push(&entry, &hashes, &mut HostSink(object))?;
    }
    let (root, summary) = table.finish(&mut HostSink(object))?;
    stats.entries = summary.entries;
    Ok(SealedSegment { layer: Some(layer(LayerKind::Segment, 0, host, root, &summary)), stats })
}

/// A frame in the object, and how far its pieces were entered into the table.
struct StoredFrame {
    place: crate::object::FrameRef,
    at: u32,
    /// Leaf hashes of the pieces not entered yet.
    hashes: std::collections::VecDeque<LeafHash>,
}

/// Packs the data of `pieces`, in order, into frames and stores them.
fn seal_frames(
    pieces: &[Piece],
    object: &mut ObjectBuilder<'_>,
    options: &SealOptions<'_>,
) -> Result<Vec<StoredFrame>, VaultError> {
    let mut groups: Vec<(u32, Vec<&Piece>)> = Vec::new();
    let mut room = 0;
    for piece in pieces.iter().filter(|piece| matches!(piece.content, PieceContent::Data(_))) {
        if piece.range.len > room || groups.is_empty() {
            groups.push((object.reserve_ordinals(1).start, Vec::new()));
            room = FRAME_BYTES_MAX as u64;
        }
        room -= piece.range.len;
        groups.last_mut().expect("one was just added").1.push(piece);
    }
    let sealer = object.sealer();
    let sealed = parallel::map(options.workers, &groups, |(ordinal, pieces)| {
        let (plain, hashes) = fill_frame(pieces, options.leaf_key);
        (sealer.seal(FrameClass::Data, *ordinal, &plain, options.compression), plain.len(), hashes)
    });
    let stored = groups.iter().zip(sealed).map(|((ordinal, _), (bytes, plain_len, hashes))| {
        let place = object.append(FrameClass::Data, *ordinal, plain_len, bytes)?;
        Ok(StoredFrame { place, at: 0, hashes: hashes.into() })
    });
    stored.collect()
}

fn fill_frame(pieces: &[&Piece], leaf_key: &LeafKey) -> (Vec<u8>, Vec<LeafHash>) {
    let mut plain = Vec::with_capacity(FRAME_BYTES_MAX);
    let mut hashes = Vec::with_capacity(FRAME_BYTES_MAX / LEAF_BYTES as usize);
    for piece in pieces {
        let start = plain.len();
        if let PieceContent::Data(slices) = &piece.content {
            slices.iter().for_each(|slice: &Bytes| plain.extend_from_slice(slice));
        }
        if let Some(leaves) = piece.range.whole_units(LEAF_BYTES) {
            let whole = &plain[start..][leaves.within(piece.range.start)];
            let leaves: Vec<&[u8]> = whole.chunks_exact(LEAF_BYTES as usize).collect();
            hashes.extend(PlainLeafHash::of_each(&leaves).into_iter().map(|plain| leaf_key.leaf(plain)));
        }
    }
    (plain, hashes)
}

fn entry(piece: &Piece, content: Content) -> Entry {
    Entry { disk: piece.disk, range: piece.range, sequence: piece.sequence, content }
}
