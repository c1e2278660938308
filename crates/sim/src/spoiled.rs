//! The splitter's capture with a planted bug in front of it, or none.

use std::sync::{Arc, Mutex, PoisonError};

use agent::capture::{
    Capture, CaptureStatus, Captured, Continuity, Mode, RingPosition, SplitterCapture, SplitterDisk, Unbroken,
};
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MarkerKind};
use world::{BlockDevice, BlockError};

use crate::planted::Bug;
use crate::rng::Rng;

/// A write that struck: the disk, the byte it begins at, the data.
pub type Strike = (DiskId, u64, Vec<u8>);

/// Those that the model does not know of yet.
pub type SharedStrikes = Arc<Mutex<Vec<Strike>>>;

/// Writes that happen while a heal reads, as other threads of a machine would do them.
pub struct Interference {
    /// The disks as their users see them.
    pub disks: Vec<(DiskId, SplitterDisk)>,
    /// Decides when and where.
    pub rng: Mutex<Rng>,
    /// What was written, for the model.
    pub done: SharedStrikes,
}

impl Interference {
    /// Perhaps writes something to `disk`: first anywhere, then into the range that is being read. A heal that shows the
    /// second without the first shows what never was.
    fn strike(&self, disk: DiskId, offset: u64, len: u64) {
        let mut rng = self.rng.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((_, device)) = self.disks.iter().find(|(id, _)| *id == disk) else { return };
        if len < 512 || !rng.one_in(12) {
            return;
        }
        for (start, len) in [(0, device.size()), (offset, len)] {
            let sectors = len / 512;
            let first = rng.below(sectors);
            let mut data = vec![0; ((1 + rng.below(8)).min(sectors - first) * 512) as usize];
            rng.fill(&mut data);
            let start = start + first * 512;
            // An agent that ends in order has taken its disks out of service.
            if device.write_at(start, &data).is_ok() {
                self.done.lock().unwrap_or_else(PoisonError::into_inner).push((disk, start, data));
            }
        }
    }
}

/// See the module's documentation.
pub struct SpoiledCapture {
    inner: SplitterCapture,
    bug: Option<Bug>,
    interference: Interference,
}

impl SpoiledCapture {
    /// Puts `bug` in front of `inner`, and lets `interference` write while it is read.
    pub fn new(inner: SplitterCapture, bug: Option<Bug>, interference: Interference) -> SpoiledCapture {
        SpoiledCapture { inner, bug, interference }
    }
}

impl Capture for SpoiledCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.inner.disks()
    }

    fn next(&mut self) -> Option<Captured> {
        self.inner.next()
    }

    fn rewind(&mut self, to: RingPosition) {
        self.inner.rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        self.inner.release(through);
    }

    fn status(&self) -> CaptureStatus {
        let mut status = self.inner.status();
        if self.bug == Some(Bug::GapNotCounted) {
            status.gap_count = 0;
        }
        status
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        let before = self.inner.status().epoch;
        let epoch = self.inner.rotate(mode)?;
        if self.bug == Some(Bug::MapClearedEarly) && self.inner.settled(epoch) && !self.inner.has_unstreamed(before) {
            self.inner.clear(before);
        }
        Some(epoch)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        self.inner.settled(epoch)
    }

    fn fold(&mut self, epoch: Epoch) {
        self.inner.fold(epoch);
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        self.inner.heal_set(disk)
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.inner.require_whole(disk);
    }

    fn require(&mut self, disk: DiskId, range: ByteRange) {
        self.inner.require(disk, range);
    }

    fn knows_writes(&self) -> bool {
        self.inner.knows_writes()
    }

    fn written_since(&self, epoch: Epoch, disk: DiskId, range: ByteRange) -> Vec<ByteRange> {
        match self.bug {
            Some(Bug::ScrubIgnoresWriters) => Vec::new(),
            _ => self.inner.written_since(epoch, disk, range),
        }
    }

    fn clear_heal_set(&mut self) {
        self.inner.clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        if self.bug != Some(Bug::MapClearedEarly) {
            self.inner.clear(epoch);
        }
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        if self.bug == Some(Bug::GapNotCounted) { Vec::new() } else { self.inner.unstreamed(epoch) }
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        self.bug != Some(Bug::GapNotCounted) && self.inner.has_unstreamed(epoch)
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        self.inner.mark(kind, name)
    }

    fn continuity(&self) -> Continuity {
        self.inner.continuity()
    }

    fn unbroken(&self) -> Option<Unbroken> {
        self.inner.unbroken()
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let len = buffer.len() as u64;
        self.interference.strike(disk, offset, len);
        self.inner.read(disk, offset, buffer)?;
        self.interference.strike(disk, offset, len);
        Ok(())
    }
}
