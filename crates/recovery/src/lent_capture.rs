//! The capture of a branch, lent to one failback after another: whoever ends gives it back.

use std::sync::{Arc, PoisonError};

use agent::capture::{Capture, CaptureStatus, Captured, Continuity, Mode, RingPosition, SplitterCapture};
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MarkerKind};
use world::BlockError;

use crate::branch::Branch;

/// A [`SplitterCapture`] that returns to its branch when it is dropped.
pub(crate) struct LentCapture {
    capture: Option<SplitterCapture>,
    branch: Arc<Branch>,
    /// What the ring held up to here was for an earlier failback.
    passed: RingPosition,
}

impl LentCapture {
    /// The branch's capture, unless somebody has it.
    pub(crate) fn borrow(branch: &Arc<Branch>) -> Option<LentCapture> {
        let mut capture = branch.capture.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        // An earlier failback may have taken requests from the ring that home did not get any more. Nobody needs them:
        // this one begins with a comparison of everything.
        let passed = capture.status().producer;
        capture.release(passed);
        Some(LentCapture { capture: Some(capture), branch: Arc::clone(branch), passed })
    }

    fn inner(&self) -> &SplitterCapture {
        self.capture.as_ref().expect("taken only when dropped")
    }

    fn inner_mut(&mut self) -> &mut SplitterCapture {
        self.capture.as_mut().expect("taken only when dropped")
    }
}

impl Drop for LentCapture {
    fn drop(&mut self) {
        if let Some(mut capture) = self.capture.take() {
            // Nobody takes from the ring now. If no slot is free the ring fills up and tracks by itself.
            capture.rotate(Mode::Track);
            *self.branch.capture.lock().unwrap_or_else(PoisonError::into_inner) = Some(capture);
        }
    }
}

impl Capture for LentCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.inner().disks()
    }

    fn next(&mut self) -> Option<Captured> {
        self.inner_mut().next()
    }

    fn rewind(&mut self, to: RingPosition) {
        self.inner_mut().rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        self.inner_mut().release(through);
    }

    fn status(&self) -> CaptureStatus {
        self.inner().status()
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        self.inner_mut().rotate(mode)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        self.inner().settled(epoch)
    }

    fn fold(&mut self, epoch: Epoch) {
        self.inner_mut().fold(epoch);
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        self.inner().heal_set(disk)
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.inner_mut().require_whole(disk);
    }

    fn clear_heal_set(&mut self) {
        self.inner_mut().clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        self.inner_mut().clear(epoch);
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        self.inner().unstreamed(epoch)
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        self.inner().has_unstreamed(epoch)
    }

    /// Without it a sender would wait for ever for requests that were handed out before its time.
    fn passed(&self) -> RingPosition {
        self.passed
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        self.inner_mut().mark(kind, name)
    }

    /// Another failback may have forgotten what an earlier one named: each begins with everything.
    fn continuity(&self) -> Continuity {
        Continuity::Fresh
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.inner().read(disk, offset, buffer)
    }
}
