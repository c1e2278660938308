//! A disk: a fixed number of bytes that can be read, written, zeroed, discarded and flushed.

use std::io;
use std::ops::Range;

/// Why a block operation failed.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The range reaches beyond the end of the device. A mistake of the caller.
    #[error("bytes {start}..{end} reach beyond the device's {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
        /// Size of the device in bytes.
        size: u64,
    },
    /// The device does not accept writes.
    #[error("the device is read-only")]
    ReadOnly,
    /// The medium cannot return these bytes. Other ranges may still be fine.
    #[error("bytes {start}..{end} cannot be read")]
    Unreadable {
        /// First byte that cannot be read.
        start: u64,
        /// One past the last byte that cannot be read.
        end: u64,
        /// What the device said.
        #[source]
        source: io::Error,
    },
    /// No space is left where the device keeps its writes.
    #[error("no space left for writes")]
    NoSpace,
    /// The device is gone or answers with errors; retrying the same request will not help.
    #[error("the device failed")]
    Failed(#[source] io::Error),
    /// Stored bytes did not authenticate. They are never returned as data.
    #[error("stored data is damaged: {0}")]
    Corrupt(String),
}

/// What a range of a device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that someone wrote.
    Data,
    /// Allocated, reads as zeroes.
    Zero,
    /// Never written or discarded; reads as zeroes.
    Hole,
}

/// One piece of a device's allocation map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Half-open range of bytes.
    pub range: Range<u64>,
    /// What the range holds.
    pub kind: ExtentKind,
}

/// A disk. Offsets and lengths are bytes and may have any alignment unless an implementation says otherwise.
///
/// All methods may be called from several threads at once. Requests that overlap while in flight have no promised
/// order. A write is durable once a later [`BlockDevice::flush`] returned.
pub trait BlockDevice: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// [`BlockError::Unreadable`] names the range that is lost; the caller may read around it.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError>;

    /// Writes `data` at `offset`.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError>;

    /// Makes `range` read as zeroes.
    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError>;

    /// Tells the device that `range` is no longer needed. Afterwards it reads as zeroes.
    fn discard(&self, range: Range<u64>) -> Result<(), BlockError>;

    /// Returns once every write that completed before the call is durable.
    fn flush(&self) -> Result<(), BlockError>;

    /// What `range` holds, in order and without gaps. The default knows nothing and says data.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        Ok(vec![Extent { range, kind: ExtentKind::Data }])
    }

    /// `Ok` if `range` lies inside the device.
    fn check_range(&self, range: &Range<u64>) -> Result<(), BlockError> {
        if range.start <= range.end && range.end <= self.size() {
            Ok(())
        } else {
            Err(BlockError::OutOfRange { start: range.start, end: range.end, size: self.size() })
        }
    }
}
