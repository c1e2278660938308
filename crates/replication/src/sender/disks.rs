//! Disks that come, grow and go while the stream goes on.
//!
//! A disk that joins is described in the stream and lacking until a heal behind that has ended. One that leaves is lacking
//! at once, and announced until the receiver has everything that was captured of it: then nothing that names it is under
//! way, and the next greeting can do without it, which ends it at the receiver.

use super::{Heal, Sender, StreamState};
use crate::change::ChangeKind;
use crate::geometry::DiskGeometry;
use crate::position::{DiskId, SequenceNumber};
use crate::reach::Ranges;

impl Sender {
    pub(super) fn joined(&mut self, geometry: DiskGeometry, ranges: Ranges, cause: &str, producer: u64) {
        self.describe(geometry);
        self.lacking_until = self.lacking_until.max(producer);
        self.lack(self.assigned, ranges, cause);
    }

    pub(super) fn left(&mut self, geometry: DiskGeometry, cause: &str) {
        let disk = geometry.disk;
        let whole = Ranges::of(geometry.range().map(|range| (disk, range)));
        self.lacking.leave(self.assigned, disk, whole, cause);
        // Whoever has this has been told of the break before it.
        self.describe(geometry);
        self.leaving.retain(|(known, _)| *known != disk);
        self.leaving.push((disk, self.assigned));
        self.want_no_needless_heal();
    }

    pub(super) fn gone(&mut self, disk: DiskId) {
        self.leaving.retain(|(known, _)| *known != disk);
        self.lacking.forget(disk);
        self.want_no_needless_heal();
    }

    /// What a heal was wanted for may have left.
    pub(super) fn want_no_needless_heal(&mut self) {
        if matches!((&self.stream, &self.heal), (StreamState::Whole, Heal::Wanted)) && !self.lacking.wants_heal() {
            self.heal = Heal::Idle;
        }
    }

    /// Disks that left and of which nothing is under way any more: they need not be announced.
    pub fn left_disks(&self) -> Vec<DiskId> {
        self.leaving.iter().filter(|(_, until)| self.released >= *until).map(|(disk, _)| *disk).collect()
    }

    /// Nothing of the stream is under way any more.
    pub(super) fn lose_leaving(&mut self) {
        self.leaving.iter_mut().for_each(|(_, until)| *until = SequenceNumber(0));
    }

    fn describe(&mut self, geometry: DiskGeometry) {
        let disk = geometry.disk;
        self.append(ChangeKind::Geometry(geometry), disk, self.now, false, None);
    }
}
