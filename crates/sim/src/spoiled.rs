//! The splitter's capture with a planted bug in front of it, or none.

use agent::capture::{Capture, CaptureStatus, Captured, Continuity, Mode, RingPosition, SplitterCapture};
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MarkerKind};
use world::BlockError;

use crate::planted::Bug;

/// See the module's documentation.
pub struct SpoiledCapture {
    inner: SplitterCapture,
    bug: Option<Bug>,
    consumed: RingPosition,
    rotated_from: Option<Epoch>,
}

impl SpoiledCapture {
    /// Puts `bug` in front of `inner`.
    pub fn new(inner: SplitterCapture, bug: Option<Bug>) -> SpoiledCapture {
        SpoiledCapture { inner, bug, consumed: RingPosition(0), rotated_from: None }
    }
}

impl Capture for SpoiledCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.inner.disks()
    }

    fn next(&mut self) -> Option<Captured> {
        let captured = self.inner.next()?;
        self.consumed = captured.end;
        Some(captured)
    }

    fn rewind(&mut self, to: RingPosition) {
        self.inner.rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        self.inner.release(through);
    }

    fn status(&self) -> CaptureStatus {
        let mut status = self.inner.status();
        match self.bug {
            Some(Bug::ConsumerInsteadOfProducer) => status.producer = self.consumed,
            Some(Bug::GapNotCounted) => status.gap_count = 0,
            _ => {}
        }
        status
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        let before = self.inner.status().epoch;
        let epoch = self.inner.rotate(mode)?;
        self.rotated_from = Some(before);
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

    fn clear_heal_set(&mut self) {
        self.inner.clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        if self.bug != Some(Bug::MapClearedEarly) {
            self.inner.clear(epoch);
        }
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

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.inner.read(disk, offset, buffer)
    }
}
