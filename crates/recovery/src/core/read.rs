//! What a branch's disks hold: the overlay first, then the branch's own layers, then the parent at the cut.
//!
//! The lock is held only to look at the overlay and to take the view; nothing is fetched under it. Ranges that the branch
//! never touched go straight to the parent.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::wire::OfferedLeaf;
use replication::{DiskId, LeafHash, PlainLeafHash, SequenceNumber};
use vault::view::ChainView;
use world::{Extent, ExtentKind};

use super::BranchCore;
use crate::error::BranchError;
use crate::limits;
use crate::overlay::Content;

/// Everything committed so far: views of a branch are always read at their end.
const HEAD: SequenceNumber = SequenceNumber(u64::MAX);

impl BranchCore {
    /// Fills `buffer` with what `disk` holds from byte `offset` on.
    ///
    /// # Errors
    /// [`BranchError::Read`] names what cannot be read.
    pub fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BranchError> {
        let Some(range) = self.check(disk, offset, buffer.len() as u64)? else { return Ok(()) };
        let (missing, views) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let overlay = &reading.overlays[&disk];
            let missing = if overlay.is_empty() { vec![range] } else { overlay.read(range, buffer) };
            let touched = &reading.touched[&disk];
            let views: Vec<Option<Arc<ChainView>>> =
                missing.iter().map(|part| touched.any(*part).then(|| Arc::clone(&reading.view))).collect();
            (missing, views)
        };
        for (part, view) in missing.into_iter().zip(views) {
            let out = &mut buffer[part.within(offset)];
            match view {
                Some(view) => view.read(HEAD, disk, part.start, out)?,
                None => self.below.view.read(self.below.at, disk, part.start, out)?,
            }
        }
        Ok(())
    }

    /// Fetches what reading `range` will need.
    ///
    /// # Errors
    /// As [`BranchCore::read`], of indexes only.
    pub fn prefetch(&self, disk: DiskId, range: ByteRange) -> Result<(), BranchError> {
        let size = self.geometry(disk)?.size_bytes;
        let Some(range) = ByteRange::between(range.start, range.end().min(size)) else { return Ok(()) };
        let view = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            reading.touched[&disk].any(range).then(|| Arc::clone(&reading.view))
        };
        match view {
            Some(view) => view.prefetch(HEAD, disk, range, self.config.workers)?,
            None => self.below.view.prefetch(self.below.at, disk, range, self.config.workers)?,
        }
        Ok(())
    }

    /// What `range` of `disk` holds, in order and without gaps. After [`limits::EXTENTS_MAX`] pieces the rest counts as
    /// data.
    ///
    /// # Errors
    /// As [`BranchCore::read`], of indexes only.
    pub fn extents(&self, disk: DiskId, range: Range<u64>) -> Result<Vec<Extent>, BranchError> {
        let len = range.end.checked_sub(range.start).ok_or(BranchError::OutOfRange(disk))?;
        let Some(range) = self.check(disk, range.start, len)? else { return Ok(Vec::new()) };
        let (overlaid, view) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let kinds = reading.overlays[&disk].within(range).map(|(part, content)| {
                let kind = match content {
                    Content::Data(_) => ExtentKind::Data,
                    Content::Zero => ExtentKind::Zero,
                    Content::Discarded => ExtentKind::Hole,
                };
                (part, kind)
            });
            let overlaid: Vec<(ByteRange, ExtentKind)> = kinds.take(limits::EXTENTS_MAX).collect();
            (overlaid, Arc::clone(&reading.view))
        };
        let mut map = ExtentMap { extents: Vec::new(), at: range.start };
        for (part, kind) in overlaid {
            map.fill_from(&view, disk, part.start)?;
            map.push(part.end(), kind);
        }
        map.fill_from(&view, disk, range.end())?;
        Ok(map.extents)
    }

    /// What the index says of each leaf of `range`, which begins at a multiple of 4 KiB: keyed hashes, zeroes, and
    /// *unknown* where only reading can tell. Nothing is read from the data of the vault.
    pub fn offered(&self, disk: DiskId, range: ByteRange) -> Vec<OfferedLeaf> {
        let whole = range.widen_to(LEAF_BYTES);
        let (overlaid, view) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let Some(overlay) = reading.overlays.get(&disk) else {
                return vec![OfferedLeaf::Unknown; (whole.len / LEAF_BYTES) as usize];
            };
            let overlaid: Vec<(ByteRange, bool)> =
                overlay.within(whole).map(|(part, content)| (part, matches!(content, Content::Data(_)))).collect();
            let view = reading.touched[&disk].any(whole).then(|| Arc::clone(&reading.view));
            (overlaid, view)
        };
        let hashes = match view {
            Some(view) => view.leaf_hashes(HEAD, disk, whole),
            None => self.below.view.leaf_hashes(self.below.at, disk, whole),
        };
        let zero = self.leaf_key().zero_leaf();
        let mut leaves: Vec<OfferedLeaf> = match hashes {
            Ok(hashes) => hashes
                .into_iter()
                .map(|hash| match hash {
                    Some(hash) if hash == zero => OfferedLeaf::Zero,
                    Some(hash) => OfferedLeaf::Hash(hash.0),
                    None => OfferedLeaf::Unknown,
                })
                .collect(),
            Err(error) => {
                tracing::warn!(%disk, range = %whole, %error, "an index cannot be read; its leaves are sent unseen");
                vec![OfferedLeaf::Unknown; (whole.len / LEAF_BYTES) as usize]
            }
        };
        for (part, is_data) in overlaid {
            let first = (part.start - whole.start) / LEAF_BYTES;
            let last = (part.end() - 1 - whole.start) / LEAF_BYTES;
            for index in first..=last {
                let leaf = ByteRange::new(whole.start + index * LEAF_BYTES, LEAF_BYTES);
                let all_zero = !is_data && part.start <= leaf.start && leaf.end() <= part.end();
                leaves[index as usize] = if all_zero { OfferedLeaf::Zero } else { OfferedLeaf::Unknown };
            }
        }
        leaves
    }

    /// The keyed hash of each leaf of `range`; leaves that the index does not know are read.
    ///
    /// # Errors
    /// As [`BranchCore::read`].
    pub fn leaf_hashes(&self, disk: DiskId, range: ByteRange) -> Result<Vec<LeafHash>, BranchError> {
        let size = self.geometry(disk)?.size_bytes;
        let key = self.leaf_key();
        let zero = key.zero_leaf();
        let mut at = range.start;
        let mut buffer = [0; LEAF_BYTES as usize];
        self.offered(disk, range)
            .into_iter()
            .map(|leaf| {
                let len = LEAF_BYTES.min(size - at) as usize;
                let start = at;
                at += LEAF_BYTES;
                match leaf {
                    OfferedLeaf::Zero => Ok(zero),
                    OfferedLeaf::Hash(hash) => Ok(LeafHash(hash)),
                    OfferedLeaf::Unknown | OfferedLeaf::Unreadable => {
                        self.read(disk, start, &mut buffer[..len])?;
                        Ok(key.leaf(PlainLeafHash::of(&buffer[..len])))
                    }
                }
            })
            .collect()
    }
}

/// Extents being put together from the overlay and the view below it.
struct ExtentMap {
    extents: Vec<Extent>,
    at: u64,
}

impl ExtentMap {
    fn push(&mut self, end: u64, kind: ExtentKind) {
        let full = self.extents.len() >= limits::EXTENTS_MAX;
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.range.end = end,
            Some(last) if full => {
                last.kind = ExtentKind::Data;
                last.range.end = end;
            }
            _ => self.extents.push(Extent { range: self.at..end, kind }),
        }
        self.at = end;
    }

    fn fill_from(&mut self, view: &ChainView, disk: DiskId, end: u64) -> Result<(), BranchError> {
        while let Some(rest) = ByteRange::between(self.at, end) {
            if self.extents.len() >= limits::EXTENTS_MAX {
                self.push(end, ExtentKind::Data);
                break;
            }
            let room = limits::EXTENTS_MAX - self.extents.len();
            for extent in view.extents(HEAD, disk, rest, room)? {
                self.push(extent.range.end, extent.kind);
            }
        }
        Ok(())
    }
}
