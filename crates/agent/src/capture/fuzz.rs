//! Fuzz target of the dirty maps' file. Compiled for tests and fuzzers only.

use replication::{DiskGeometry, DiskId, DiskIdentity, MachineId};

use super::recovery_set::{Attach, adopt, reseal};
use super::{Continuity, LostReason};

const MACHINE: MachineId = MachineId([9; 16]);
const BOOT: [u8; 16] = [1; 16];

fn geometry(disk: u16, size_bytes: u64) -> DiskGeometry {
    DiskGeometry {
        disk: DiskId(disk),
        path: format!("/dev/test{disk}"),
        identity: DiskIdentity { serial: format!("serial-{disk}"), fingerprint: [0; 16] },
        size_bytes,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

/// The image of the maps that an earlier run left, raw and under a right checksum of its head. Whatever it is, the next
/// start has an image of its own that the one after it accepts.
pub fn map_file(data: &[u8]) -> bool {
    let disks = [geometry(0, 1 << 20), geometry(1, (3 << 16) + 512)];
    let now = Attach { machine: MACHINE, boot: BOOT, disks: &disks, fingerprint: &|_, _| Some([4; 16]) };
    let mut accepted = false;
    for image in [data.to_vec(), reseal(data.to_vec())] {
        let adopted = adopt(Some(Ok(image)), &now);
        accepted |= !matches!(adopted.continuity, Continuity::Lost(LostReason::Unreadable(_)));
        let again = adopt(Some(Ok(adopted.image.clone())), &now);
        assert!(!matches!(again.continuity, Continuity::Lost(LostReason::Unreadable(_))), "{:?}", again.continuity);
        assert_eq!(again.changed, [], "the second start finds the disks as the first described them");
        assert_eq!(again.image.len(), adopted.image.len());
    }
    accepted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::replay::replay;

    #[test]
    fn map_files() {
        let fresh = |disks: &[DiskGeometry]| {
            adopt(None, &Attach { machine: MACHINE, boot: BOOT, disks, fingerprint: &|_, _| None }).image
        };
        let same = fresh(&[geometry(0, 1 << 20), geometry(1, (3 << 16) + 512)]);
        let smaller = fresh(&[geometry(0, 1 << 19)]);
        let replaced = fresh(&[geometry(1, 1 << 20)]);
        replay("map_file", map_file, &[("same", same), ("smaller", smaller), ("replaced", replaced)]);
    }
}
