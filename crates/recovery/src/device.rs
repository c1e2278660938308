//! A disk of a branch as a block device.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use replication::geometry::ByteRange;
use replication::{DiskGeometry, DiskId};
use world::{BlockDevice, BlockError, Clock, Extent};

use crate::core::BranchCore;
use crate::error::{BranchError, block_error};
use crate::limits;
use crate::read_ahead::{self, ReadAheadConfig, Readers, SharedReadAhead};

/// A disk of a branch: reads at the branch's head, writes into its own chain.
///
/// A write that finds too much waiting to be committed waits for room, by default [`limits::ROOM_WAIT`], and then fails
/// with [`BlockError::NoSpace`].
pub struct BranchDisk {
    core: Arc<BranchCore>,
    clock: Arc<dyn Clock>,
    disk: DiskId,
    size: u64,
    readers: Mutex<Readers>,
    ahead: SharedReadAhead,
    room_wait: Duration,
}

impl BranchDisk {
    pub(crate) fn new(
        core: Arc<BranchCore>,
        clock: Arc<dyn Clock>,
        geometry: &DiskGeometry,
        config: ReadAheadConfig,
        ahead: SharedReadAhead,
    ) -> BranchDisk {
        BranchDisk {
            core,
            clock,
            disk: geometry.disk,
            size: geometry.size_bytes,
            readers: Mutex::new(Readers::new(config)),
            ahead,
            room_wait: limits::ROOM_WAIT,
        }
    }

    /// Waits this long for room.
    pub(crate) fn with_room_wait(self, room_wait: Duration) -> BranchDisk {
        BranchDisk { room_wait, ..self }
    }

    fn patiently(&self, write: impl Fn() -> Result<(), BranchError>) -> Result<(), BlockError> {
        let mut until = None;
        loop {
            match write() {
                Err(BranchError::NoRoom) => {
                    let now = self.clock.monotonic();
                    let until = *until.get_or_insert(now.plus(self.room_wait));
                    if now >= until {
                        return Err(BlockError::NoSpace);
                    }
                    self.core.wait_for_room(until.since(now));
                }
                other => return other.map_err(block_error),
            }
        }
    }
}

impl BlockDevice for BranchDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.check_range(&(offset..offset.saturating_add(buffer.len() as u64)))?;
        if let Some(range) = ByteRange::between(offset, offset + buffer.len() as u64) {
            let ahead = self.readers.lock().unwrap_or_else(PoisonError::into_inner).read(range);
            if let Some(ahead) = ahead {
                read_ahead::ask(&self.ahead, self.disk, ahead);
            }
        }
        self.core.read(self.disk, offset, buffer).map_err(block_error)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check_range(&(offset..offset.saturating_add(data.len() as u64)))?;
        self.patiently(|| self.core.write(self.disk, offset, data))
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.check_range(&range)?;
        self.patiently(|| self.core.write_zeroes(self.disk, range.clone()))
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.check_range(&range)?;
        self.patiently(|| self.core.discard(self.disk, range.clone()))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.core.flush().map_err(block_error)
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>, BlockError> {
        self.check_range(&range)?;
        self.core.extents(self.disk, range).map_err(block_error)
    }
}
