//! Where the cells of each disk lie in the maps, so that disks can come, grow and go while a capture runs.
//!
//! The maps have one size for the life of the pins, with room to spare. Each disk has a slot (its number in the kernel
//! programs) and cells side by side, at a granule of its own. The table is kept in the ledger: a successor goes on with it.
//!
//! Pure.

use replication::DiskId;
use replication::maps::{MAPS_BYTES_MAX, MapScale};

use super::layout::MAPS_PER_DISK;

/// Cells of one map that are to spare at least: 4 GiB of disk at the finest granule.
const SPARE_CELLS_MIN: u64 = 1 << 16;
/// The coarsest granule that a disk gets which comes later.
const GRANULE_SHIFT_MAX: u32 = 30;

/// Whose a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tenancy {
    /// A disk that is captured.
    Here,
    /// One that is not any more, of which bios may be under way.
    Leaving,
    /// Nobody's; the ring may still hold records of the one before.
    Gone,
}

/// A slot's entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) tenancy: Tenancy,
    pub(super) disk: DiskId,
    pub(super) granule_shift: u32,
    /// First cell of it within each map.
    pub(super) first_cell: u64,
    /// The whole disk's number, and where on it the protected one begins.
    pub(super) device: u64,
    pub(super) start_sector: u64,
    pub(super) bytes: u64,
    /// Of the serial number, hashed.
    pub(super) serial: u64,
    /// Of one that left: no record of it lies behind this position of the ring.
    pub(super) until: u64,
}

/// Words of an entry in the ledger.
pub(super) const PLACE_WORDS: usize = 6;

impl Place {
    pub(super) fn scale(&self) -> MapScale {
        MapScale::with_granule(1 << self.granule_shift.clamp(16, 40)).expect("a power of two between 64 KiB and 1 TiB")
    }

    pub(super) fn cells(&self) -> u64 {
        self.scale().cells(self.bytes) as u64
    }

    /// The end of its cells.
    pub(super) fn end(&self) -> u64 {
        self.first_cell + self.cells()
    }

    /// One past its last sector on the whole disk.
    pub(super) fn end_sector(&self) -> u64 {
        self.start_sector + self.bytes / 512
    }

    pub(super) fn encode(&self) -> [u64; PLACE_WORDS] {
        let tenancy = match self.tenancy {
            Tenancy::Here => 1,
            Tenancy::Leaving => 2,
            Tenancy::Gone => 3,
        };
        let head = tenancy << 62 | u64::from(self.granule_shift) << 56 | u64::from(self.disk.0) << 40 | self.first_cell;
        [head, self.device, self.start_sector, self.bytes, self.serial, self.until]
    }

    /// The entry of these words; none if the slot was never used.
    pub(super) fn decode(words: [u64; PLACE_WORDS]) -> Option<Place> {
        let [head, device, start_sector, bytes, serial, until] = words;
        let tenancy = match head >> 62 {
            1 => Tenancy::Here,
            2 => Tenancy::Leaving,
            3 => Tenancy::Gone,
            _ => return None,
        };
        Some(Place {
            tenancy,
            disk: DiskId((head >> 40) as u16),
            granule_shift: (head >> 56 & 63) as u32,
            first_cell: head & ((1 << 40) - 1),
            device,
            start_sector,
            bytes,
            serial,
            until,
        })
    }
}

/// The scale at which disks begin, and how many cells one map has: a multiple of eight.
pub(super) fn capacity(sizes: &[u64]) -> (MapScale, u64) {
    let scale = MapScale::fitting(sizes, MAPS_PER_DISK as u64, MAPS_BYTES_MAX / 2);
    let used: u64 = sizes.iter().map(|size| scale.cells(*size) as u64).sum();
    let most = MAPS_BYTES_MAX / MAPS_PER_DISK as u64;
    (scale, (3 * used).max(used + SPARE_CELLS_MIN).min(most) / 8 * 8)
}

/// The largest room between `taken`, half-open and in order, within `cells`.
fn largest_room(taken: &[(u64, u64)], cells: u64) -> (u64, u64) {
    let mut rooms = Vec::with_capacity(taken.len() + 1);
    let mut from = 0;
    for (start, end) in taken.iter().copied().chain([(cells, cells)]) {
        rooms.push((from, start.max(from)));
        from = from.max(end);
    }
    // The first of equal ones.
    rooms.into_iter().rev().max_by_key(|(start, end)| end - start).expect("there is one behind the last")
}

/// Where `wanted` cells go: into the largest room, in its middle, so that both its neighbour and it can grow. `taken` is
/// in order.
pub(super) fn find_room(taken: &[(u64, u64)], cells: u64, wanted: u64) -> Option<u64> {
    let (start, end) = largest_room(taken, cells);
    let rest = (end - start).checked_sub(wanted)?;
    // Before the first one there is no neighbour that could grow.
    let at = if start == 0 { 0 } else { start + rest / 2 };
    Some(if at / 8 * 8 >= start { at / 8 * 8 } else { at })
}

/// Where the cells of a disk go that comes later, and at which granule: the finest that leaves half of the room to others.
pub(super) fn find_place(taken: &[(u64, u64)], cells: u64, bytes: u64) -> Option<(u32, u64)> {
    let (start, end) = largest_room(taken, cells);
    let fits = |part: u64| {
        let shifts = 16..=GRANULE_SHIFT_MAX;
        shifts.into_iter().find(|shift| bytes.div_ceil(1 << shift) <= (end - start) / part)
    };
    let shift = fits(2).or_else(|| fits(1))?;
    Some((shift, find_room(taken, cells, bytes.div_ceil(1 << shift))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn entries_come_back(disk: u16, shift in 16u32..41, first in 0u64..1 << 40, words in any::<[u64; 5]>()) {
            for tenancy in [Tenancy::Here, Tenancy::Leaving, Tenancy::Gone] {
                let [device, start_sector, bytes, serial, until] = words;
                let place = Place {
                    tenancy, disk: DiskId(disk), granule_shift: shift, first_cell: first, device, start_sector, bytes, serial, until,
                };
                prop_assert_eq!(Place::decode(place.encode()), Some(place));
            }
        }

        /// Disks of any sizes find room at the start, apart from each other, and others find some later.
        #[test]
        fn disks_lie_apart(sizes in prop::collection::vec(1u64..1 << 42, 1..40), later in prop::collection::vec(1u64..1 << 42, 0..4)) {
            let (scale, cells) = capacity(&sizes);
            prop_assert!(cells * MAPS_PER_DISK as u64 <= MAPS_BYTES_MAX);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            let mut put = |first: u64, count: u64| {
                let fits = first + count <= cells && taken.iter().all(|(start, end)| first + count <= *start || *end <= first);
                taken.push((first, first + count));
                taken.sort_unstable();
                (fits, taken.clone())
            };
            let mut now = Vec::new();
            let mut wanted: Vec<u64> = sizes.iter().map(|size| scale.cells(*size) as u64).collect();
            wanted.sort_unstable_by_key(|count| std::cmp::Reverse(*count));
            for count in wanted {
                let Some(first) = find_room(&now, cells, count) else { return Ok(()) };
                let (fits, after) = put(first, count);
                prop_assert!(fits);
                now = after;
            }
            for bytes in later {
                let (shift, first) = find_place(&now, cells, bytes).expect("a granule that is coarse enough");
                let (fits, after) = put(first, bytes.div_ceil(1 << shift));
                prop_assert!(fits);
                now = after;
            }
        }
    }

    #[test]
    fn one_disk_can_grow_to_all_of_the_maps() {
        let (scale, cells) = capacity(&[20 << 30]);
        assert_eq!((scale.granule_bytes(), cells), (1 << 16, 3 * (20 << 30 >> 16)));
        assert_eq!(find_room(&[], cells, 20 << 30 >> 16), Some(0));
        // A second one lies in the middle of what is left.
        let first = 20u64 << 30 >> 16;
        assert_eq!(find_place(&[(0, first)], cells, 10 << 30), Some((16, first + (2 * first - first / 2) / 2)));
        assert_eq!(find_place(&[(0, cells)], cells, 1 << 20), None);
    }
}
