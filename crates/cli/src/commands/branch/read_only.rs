//! A disk at a point, read straight from the vault: no branch is opened and nothing is written anywhere.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use replication::{ByteRange, DiskId, SequenceNumber};
use vault::view::{ChainView, ReadError};
use world::{BlockDevice, BlockError, Extent};

use crate::failure::chain;

/// Pieces of an allocation map that one look returns.
const EXTENTS_MAX: usize = 1 << 14;

/// A disk of a view at one cut.
pub(super) struct PointDevice {
    pub(super) view: Arc<ChainView>,
    pub(super) cut: SequenceNumber,
    pub(super) disk: DiskId,
    pub(super) size: u64,
}

impl PointDevice {
    /// Decodes what reads of `range` will need, on all cores.
    pub(super) fn prefetch(&self, range: &Range<u64>) -> Result<(), BlockError> {
        let workers = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        match ByteRange::between(range.start, range.end) {
            Some(range) => self.view.prefetch(self.cut, self.disk, range, workers).map_err(block_error),
            None => Ok(()),
        }
    }
}

fn block_error(error: ReadError) -> BlockError {
    match error {
        ReadError::Vault { .. } => BlockError::Corrupt(chain(&error)),
        ReadError::Unreadable { range, .. } => {
            let source = std::io::Error::other("it was unreadable at the source when it was replicated");
            BlockError::Unreadable { start: range.start, end: range.end(), source }
        }
    }
}

impl BlockDevice for PointDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.check_range(&(offset..offset.saturating_add(buffer.len() as u64)))?;
        self.view.read(self.cut, self.disk, offset, buffer).map_err(block_error)
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn write_zeroes(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn discard(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::ReadOnly)
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        self.check_range(&range)?;
        let Some(range) = ByteRange::between(range.start, range.end) else { return Ok(Vec::new()) };
        self.view.extents(self.cut, self.disk, range, EXTENTS_MAX).map_err(block_error)
    }
}
