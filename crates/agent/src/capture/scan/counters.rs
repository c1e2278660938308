//! What a scan says of itself while the engine owns it, and the wish that it begin at once.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use world::WallTime;

use crate::capture::WriteCounts;

/// How scanning goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanStatus {
    /// Passes over all disks.
    pub passes: u64,
    /// Passes during which the disks were written to: they ended without a point.
    pub disturbed: u64,
    /// Points: ends of scans, and marks while the disks were at rest.
    pub points: u64,
    /// When the latest of them was taken, in nanoseconds since 1970 by this machine's clock; 0 if there is none.
    pub last_point_ns: u64,
    /// Bytes of disk read by passes.
    pub read_bytes: u64,
    /// Bytes that a pass found changed, in pieces of 64 KiB.
    pub changed_bytes: u64,
    /// Why nothing can be proven; empty if nothing stands in the way.
    pub blind: String,
}

/// Counters of a [`super::ScanCapture`].
#[derive(Debug, Default)]
pub struct ScanCounters {
    status: Mutex<ScanStatus>,
    hurry: AtomicBool,
    changes: AtomicU64,
}

impl ScanCounters {
    /// How scanning goes.
    pub fn status(&self) -> ScanStatus {
        self.with(|status| status.clone())
    }

    /// Has the next pass begin at once.
    pub fn hurry(&self) {
        self.hurry.store(true, Ordering::SeqCst);
    }

    /// What was found changed.
    pub fn counts(&self) -> WriteCounts {
        let written_bytes = self.with(|status| status.changed_bytes);
        WriteCounts { changes: self.changes.load(Ordering::Relaxed), written_bytes, tracked: 0, failed: 0, untold: 0 }
    }

    pub(super) fn take_hurry(&self) -> bool {
        self.hurry.swap(false, Ordering::SeqCst)
    }

    pub(super) fn read(&self, bytes: u64) {
        self.with(|status| status.read_bytes += bytes);
    }

    pub(super) fn changed(&self, bytes: u64) {
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.with(|status| status.changed_bytes += bytes);
    }

    pub(super) fn pass_ended(&self, proven: bool, still: bool) {
        self.with(|status| {
            status.passes += 1;
            status.disturbed += u64::from(!still);
            if proven {
                status.blind.clear();
            }
        });
    }

    pub(super) fn point(&self, now: WallTime) {
        self.with(|status| (status.points, status.last_point_ns) = (status.points + 1, now.0));
    }

    pub(super) fn blind(&self, error: &io::Error) {
        self.with(|status| {
            if status.blind.is_empty() {
                tracing::warn!(%error, "the disks do not tell whether they were written to: no points until they do");
            }
            status.blind = format!("the disks do not tell whether they were written to: {error}");
        });
    }

    fn with<T>(&self, work: impl FnOnce(&mut ScanStatus) -> T) -> T {
        work(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
