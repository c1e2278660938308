//! Is a disk a legal state of the ledger? It must hold the first *k* writes completely and nothing after them, and *k*
//! must lie between what was acknowledged before the point and what was submitted by then.

use std::ops::RangeInclusive;

use world::{BlockDevice, BlockError};

use super::ledger::{BLOCK_BYTES, Ledger, block, number_in};

/// What is compared at once.
const PIECE_BYTES: usize = 1 << 20;

/// A mismatch, for people.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mismatch(pub(crate) String);

impl From<BlockError> for Mismatch {
    fn from(error: BlockError) -> Mismatch {
        Mismatch(crate::failure::chain(&error))
    }
}

/// The writes that a point of time `ns` may hold, if its clock is known to within `tolerance_ns`.
pub(crate) fn bounds(ledger: &Ledger, ns: u64, tolerance_ns: u64) -> RangeInclusive<u64> {
    let least = ledger.acknowledged_before(ns.saturating_sub(tolerance_ns));
    least..=ledger.submitted_before(ns.saturating_add(tolerance_ns))
}

/// The number *k* such that `device` holds the first *k* writes of the ledger and nothing after them.
///
/// # Errors
/// The first slot that holds something else.
pub(crate) fn prefix_held(device: &dyn BlockDevice, ledger: &Ledger) -> Result<u64, Mismatch> {
    let mut found = vec![0; ledger.slots.len()];
    let mut buffer = vec![0; BLOCK_BYTES];
    let written = ledger.last_in_slots(u64::MAX);
    for (slot, offset) in ledger.slots.iter().enumerate() {
        // A slot that was never written to is compared with the rest of the disk.
        if written[slot] == 0 {
            continue;
        }
        device.read_at(*offset, &mut buffer)?;
        found[slot] = match number_in(&buffer, ledger.seed, *offset) {
            Some(number) if ledger.writes.get(number as usize - 1).is_some_and(|it| it.slot == slot) => number,
            Some(number) => return Err(Mismatch(format!("slot {slot} holds write {number}, which went elsewhere"))),
            // What slots hold before their first write.
            None if buffer.iter().all(|byte| *byte == buffer[0]) => 0,
            None => return Err(Mismatch(format!("slot {slot} (byte {offset}) holds no write of the ledger"))),
        };
    }
    let k = found.iter().copied().max().unwrap_or(0);
    let expected = ledger.last_in_slots(k);
    match (0..found.len()).find(|slot| found[*slot] != expected[*slot]) {
        None => Ok(k),
        Some(slot) => Err(Mismatch(format!(
            "the disk holds write {k}, but slot {slot} holds write {} instead of {}: no prefix",
            found[slot], expected[slot]
        ))),
    }
}

/// Compares all of `device` with `start` after the first `k` writes. Returns the bytes compared.
///
/// # Errors
/// The first byte that differs.
pub(crate) fn equals_replay(
    device: &dyn BlockDevice,
    start: &dyn BlockDevice,
    ledger: &Ledger,
    k: u64,
) -> Result<u64, Mismatch> {
    if device.size() != start.size() {
        return Err(Mismatch(format!("the disk has {} bytes instead of {}", device.size(), start.size())));
    }
    let mut overlay: Vec<(u64, u64)> =
        ledger.slots.iter().copied().zip(ledger.last_in_slots(k)).filter(|(_, number)| *number > 0).collect();
    overlay.sort_unstable();
    let (mut got, mut expected) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut at = 0;
    while at < device.size() {
        let len = (device.size() - at).min(PIECE_BYTES as u64) as usize;
        let (got, expected) = (&mut got[..len], &mut expected[..len]);
        device.read_at(at, got)?;
        start.read_at(at, expected)?;
        let end = at + len as u64;
        let first = overlay.partition_point(|(offset, _)| *offset < at);
        for (offset, number) in overlay[first..].iter().take_while(|(offset, _)| *offset < end) {
            let bytes = block(ledger.seed, *number, *offset);
            let within = (offset - at) as usize;
            let fits = bytes.len().min(len - within);
            expected[within..within + fits].copy_from_slice(&bytes[..fits]);
        }
        if got != expected {
            let byte = got.iter().zip(expected.iter()).position(|(one, other)| one != other).unwrap_or_default();
            return Err(Mismatch(format!("byte {} differs from the source", at + byte as u64)));
        }
        at = end;
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::ledger::Written;
    use world::{Access, FileDevice};

    const SLOTS: [u64; 4] = [0, 1 << 20, (1 << 20) + 4096, 5 << 18];

    fn ledger() -> Ledger {
        let writes = (0..40).map(|n| Written { slot: (n * 7 % 4) as usize, submitted_ns: 1000 + n * 10 }).collect();
        let acknowledged = (1..=4).map(|batch| (batch * 10, 1000 + batch * 100)).collect();
        Ledger { seed: 5, slots: SLOTS.to_vec(), writes, acknowledged }
    }

    fn disk(folder: &tempfile::TempDir, name: &str) -> FileDevice {
        let path = folder.path().join(name);
        std::fs::write(&path, vec![0x11; 3 << 20]).expect("written");
        let device = FileDevice::open(&path, Access::ReadWrite).expect("opened");
        SLOTS.iter().for_each(|offset| device.write_at(*offset, &[0; BLOCK_BYTES]).expect("zeroed"));
        device
    }

    fn replay(device: &FileDevice, ledger: &Ledger, numbers: impl Iterator<Item = u64>) {
        for number in numbers {
            let offset = ledger.slots[ledger.writes[number as usize - 1].slot];
            device.write_at(offset, &block(ledger.seed, number, offset)).expect("written");
        }
    }

    #[test]
    fn every_prefix_is_recognised_and_equals_its_replay() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (ledger, start) = (ledger(), disk(&folder, "start"));
        for k in [0, 1, 2, 5, 17, 40] {
            let device = disk(&folder, "point");
            replay(&device, &ledger, 1..=k);
            assert_eq!(prefix_held(&device, &ledger), Ok(k));
            assert_eq!(equals_replay(&device, &start, &ledger, k), Ok(3 << 20));
            if k > 0 {
                assert!(equals_replay(&device, &start, &ledger, k - 1).is_err());
            }
        }
    }

    #[test]
    fn a_missing_a_late_and_a_torn_write_are_found() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ledger = ledger();
        let missing = disk(&folder, "missing");
        replay(&missing, &ledger, (1..=20).filter(|number| *number != 18));
        assert!(prefix_held(&missing, &ledger).expect_err("write 18 is missing").0.contains("no prefix"));
        let late = disk(&folder, "late");
        replay(&late, &ledger, (1..=20).chain([30]));
        assert!(prefix_held(&late, &ledger).is_err());
        let torn = disk(&folder, "torn");
        replay(&torn, &ledger, 1..=20);
        torn.write_at(SLOTS[1] + 2048, &[0; 2048]).expect("written");
        assert!(prefix_held(&torn, &ledger).expect_err("half a block").0.contains("no write of the ledger"));
        let stray = disk(&folder, "stray");
        replay(&stray, &ledger, 1..=20);
        stray.write_at(2 << 20, &[9]).expect("written");
        let start = disk(&folder, "start");
        assert_eq!(
            equals_replay(&stray, &start, &ledger, 20),
            Err(Mismatch("byte 2097152 differs from the source".into()))
        );
    }

    #[test]
    fn bounds_come_from_the_ledgers_times() {
        let ledger = ledger();
        assert_eq!(bounds(&ledger, 1205, 0), 20..=21);
        assert_eq!(bounds(&ledger, 1205, 10), 10..=22);
        assert_eq!(bounds(&ledger, 900, 0), 0..=0);
        assert_eq!(bounds(&ledger, 9000, 0), 40..=40);
    }
}
