//! Dirty maps: one byte for each granule of a disk, set before a write reaches it.
//!
//! Bytes and not bits, so that marking is a plain store from any thread (and, in another capture, from the kernel)
//! without a read-modify-write. Granules may be large: what a map names is compared by leaf hash before it is sent,
//! so a coarse map costs local reads only.
//!
//! The bytes live wherever their owner keeps them (a mapped file, plain memory); a crash leaves each of them either
//! set or not. Any value but zero counts as set, so damage can only name too much.
//!
//! Ordering: [`DirtyMap::mark`] ends with a release fence, [`DirtyMap::merge`] and [`DirtyMap::ranges`] begin with an
//! acquire fence. Whoever learns through an atomic variable that a writer has ended therefore sees its marks.

use std::sync::atomic::{AtomicU8, Ordering, fence};

use crate::geometry::{ByteRange, GRANULE_BYTES};

/// Most bytes that all maps of one machine take together.
pub const MAPS_BYTES_MAX: u64 = 16 << 20;

/// How many bytes of disk one byte of map stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapScale {
    granule_shift: u32,
}

impl MapScale {
    /// The finest scale, at least [`GRANULE_BYTES`], at which `maps_per_disk` maps of every disk take at most
    /// `maps_bytes_max` bytes together. `disk_sizes` are bytes.
    pub fn fitting(disk_sizes: &[u64], maps_per_disk: u64, maps_bytes_max: u64) -> MapScale {
        let mut scale = MapScale { granule_shift: GRANULE_BYTES.trailing_zeros() };
        let total = |scale: MapScale| -> u128 {
            disk_sizes.iter().map(|&size| scale.cells(size) as u128 * u128::from(maps_per_disk)).sum()
        };
        while total(scale) > u128::from(maps_bytes_max) && scale.granule_shift < 62 {
            scale.granule_shift += 1;
        }
        scale
    }

    /// The scale with this granule, if it is a power of two of at least [`GRANULE_BYTES`] and at most 4 EiB.
    pub fn with_granule(granule_bytes: u64) -> Option<MapScale> {
        let valid = granule_bytes.is_power_of_two() && (GRANULE_BYTES..=1 << 62).contains(&granule_bytes);
        valid.then(|| MapScale { granule_shift: granule_bytes.trailing_zeros() })
    }

    /// Bytes of disk that one byte of map stands for: a power of two.
    pub fn granule_bytes(self) -> u64 {
        1 << self.granule_shift
    }

    /// Bytes that the map of a disk of `disk_bytes` takes.
    pub fn cells(self, disk_bytes: u64) -> usize {
        disk_bytes.div_ceil(self.granule_bytes()) as usize
    }

    /// Indices of the cells that `range` touches.
    fn cells_of(self, range: ByteRange) -> std::ops::Range<usize> {
        (range.start >> self.granule_shift) as usize..((range.end() - 1) >> self.granule_shift) as usize + 1
    }
}

/// One map of one disk, over bytes that someone else owns.
#[derive(Debug, Clone, Copy)]
pub struct DirtyMap<'a> {
    cells: &'a [AtomicU8],
    scale: MapScale,
    disk_bytes: u64,
}

impl<'a> DirtyMap<'a> {
    /// The map of a disk of `disk_bytes` in `cells`, which are exactly as many as the scale says.
    pub fn new(cells: &'a [AtomicU8], scale: MapScale, disk_bytes: u64) -> DirtyMap<'a> {
        assert_eq!(cells.len(), scale.cells(disk_bytes), "a map has one byte for each granule of its disk");
        DirtyMap { cells, scale, disk_bytes }
    }

    /// Marks every granule that `range` touches. `range` must lie within the disk.
    pub fn mark(self, range: ByteRange) {
        for cell in &self.cells[self.scale.cells_of(range)] {
            set(cell);
        }
        fence(Ordering::Release);
    }

    /// Whether every granule that `range` touches is marked.
    pub fn covers(self, range: ByteRange) -> bool {
        self.cells[self.scale.cells_of(range)].iter().all(is_set)
    }

    /// Marks everything that `other`, a map of the same disk at the same scale, marks.
    pub fn merge(self, other: DirtyMap<'_>) {
        assert_eq!(self.cells.len(), other.cells.len(), "only maps of one disk and scale merge");
        fence(Ordering::Acquire);
        for (cell, _) in self.cells.iter().zip(other.cells).filter(|(_, other)| is_set(other)) {
            set(cell);
        }
        fence(Ordering::Release);
    }

    /// Unmarks everything. The caller must know that nobody marks meanwhile.
    pub fn clear(self) {
        // Storing only where something is marked keeps untouched pages of a sparse map untouched.
        for cell in self.cells.iter().filter(|cell| is_set(cell)) {
            cell.store(0, Ordering::Relaxed);
        }
        fence(Ordering::Release);
    }

    /// Whether nothing is marked.
    pub fn is_clear(self) -> bool {
        fence(Ordering::Acquire);
        !self.cells.iter().any(is_set)
    }

    /// Which granules that `range`, which lies within the disk, touches are marked, as ranges of the disk.
    pub fn marked_within(self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        fence(Ordering::Acquire);
        let granule = self.scale.granule_bytes();
        let touched = self.scale.cells_of(range).filter(move |index| is_set(&self.cells[*index]));
        touched.map(move |index| {
            let start = index as u64 * granule;
            ByteRange::new(start, granule.min(self.disk_bytes - start))
        })
    }

    /// What is marked, as ranges of the disk: sorted, disjoint, not adjacent, clipped to the disk.
    pub fn ranges(self) -> Vec<ByteRange> {
        fence(Ordering::Acquire);
        let granule = self.scale.granule_bytes();
        let mut ranges: Vec<ByteRange> = Vec::new();
        for (index, _) in self.cells.iter().enumerate().filter(|(_, cell)| is_set(cell)) {
            let start = index as u64 * granule;
            let len = granule.min(self.disk_bytes - start);
            match ranges.last_mut() {
                Some(last) if last.end() == start => last.len += len,
                _ => ranges.push(ByteRange::new(start, len)),
            }
        }
        ranges
    }
}

fn is_set(cell: &AtomicU8) -> bool {
    cell.load(Ordering::Relaxed) != 0
}

fn set(cell: &AtomicU8) {
    // A rewritten granule is the common case: reading first leaves its cache line shared between the writers.
    if !is_set(cell) {
        cell.store(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const DISK_BYTES: u64 = 100 * GRANULE_BYTES + 512;

    fn cells(scale: MapScale, disk_bytes: u64) -> Vec<AtomicU8> {
        (0..scale.cells(disk_bytes)).map(|_| AtomicU8::new(0)).collect()
    }

    fn granules(range: ByteRange, granule: u64) -> impl Iterator<Item = u64> {
        range.split_at_multiples(granule).map(move |piece| piece.start / granule)
    }

    /// Sorted disjoint ranges of the marked granules, one granule at a time.
    fn oracle_ranges(marked: &BTreeSet<u64>, granule: u64, disk_bytes: u64) -> BTreeSet<u64> {
        marked
            .iter()
            .flat_map(|&index| (index * granule..((index + 1) * granule).min(disk_bytes)).step_by(512))
            .collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Mark(usize, ByteRange),
        Merge(usize, usize),
        Clear(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..DISK_BYTES, 1..20 * GRANULE_BYTES)
            .prop_map(|(start, len)| ByteRange::new(start, len.min(DISK_BYTES - start)));
        prop_oneof![
            6 => (0usize..3, range).prop_map(|(map, range)| Step::Mark(map, range)),
            2 => (0usize..3, 0usize..3).prop_map(|(into, from)| Step::Merge(into, from)),
            1 => (0usize..3).prop_map(Step::Clear),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn maps_agree_with_sets_of_granules(shift in 0u32..4, steps in prop::collection::vec(step(), 1..40)) {
            let scale = MapScale::with_granule(GRANULE_BYTES << shift).expect("a power of two");
            let granule = scale.granule_bytes();
            let storage: Vec<_> = (0..3).map(|_| cells(scale, DISK_BYTES)).collect();
            let map = |index: usize| DirtyMap::new(&storage[index], scale, DISK_BYTES);
            let mut sets = vec![BTreeSet::new(); 3];
            for step in steps {
                match step {
                    Step::Mark(index, range) => {
                        map(index).mark(range);
                        sets[index].extend(granules(range, granule));
                        prop_assert!(map(index).covers(range));
                    }
                    Step::Merge(into, from) => {
                        map(into).merge(map(from));
                        let other = sets[from].clone();
                        sets[into].extend(other);
                    }
                    Step::Clear(index) => {
                        map(index).clear();
                        sets[index].clear();
                    }
                }
                for (index, set) in sets.iter().enumerate() {
                    let ranges = map(index).ranges();
                    prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].start));
                    prop_assert!(ranges.last().is_none_or(|last| last.end() <= DISK_BYTES));
                    let sectors: BTreeSet<u64> =
                        ranges.iter().flat_map(|range| (range.start..range.end()).step_by(512)).collect();
                    prop_assert_eq!(sectors, oracle_ranges(set, granule, DISK_BYTES));
                    prop_assert_eq!(map(index).is_clear(), set.is_empty());
                    let probe = ByteRange::new(7 * GRANULE_BYTES + 512, 30 * GRANULE_BYTES);
                    let within: Vec<u64> = map(index).marked_within(probe).map(|marked| marked.start / granule).collect();
                    let expected: Vec<u64> = granules(probe, granule).filter(|index| set.contains(index)).collect();
                    prop_assert_eq!(within, expected);
                    for probe in 0..101 {
                        let start = probe * GRANULE_BYTES;
                        let range = ByteRange::new(start, 512);
                        prop_assert_eq!(map(index).covers(range), set.contains(&(start / granule)));
                    }
                }
            }
        }

        #[test]
        fn the_finest_scale_that_fits_is_chosen(sizes in prop::collection::vec(0u64..1 << 47, 0..64)) {
            let total = |scale: MapScale| sizes.iter().map(|&size| 5 * scale.cells(size) as u64).sum::<u64>();
            let scale = MapScale::fitting(&sizes, 5, MAPS_BYTES_MAX);
            prop_assert!(total(scale) <= MAPS_BYTES_MAX);
            if scale.granule_bytes() > GRANULE_BYTES {
                let finer = MapScale::with_granule(scale.granule_bytes() / 2).expect("a power of two");
                prop_assert!(total(finer) > MAPS_BYTES_MAX);
            }
        }
    }

    #[test]
    fn the_largest_machine_fits() {
        let scale = MapScale::fitting(&[1 << 63; 64], 5, MAPS_BYTES_MAX);
        assert!(64 * 5 * scale.cells(1 << 63) as u64 <= MAPS_BYTES_MAX);
        assert_eq!(MapScale::fitting(&[16 << 30], 5, MAPS_BYTES_MAX).granule_bytes(), GRANULE_BYTES);
        assert_eq!(MapScale::with_granule(GRANULE_BYTES + 1), None);
        assert_eq!(MapScale::with_granule(GRANULE_BYTES / 2), None);
    }

    #[test]
    fn marks_of_writers_that_ended_are_seen() {
        let scale = MapScale::with_granule(GRANULE_BYTES).expect("a power of two");
        let storage = cells(scale, DISK_BYTES);
        let map = DirtyMap::new(&storage, scale, DISK_BYTES);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                scope.spawn(move || {
                    for index in (writer..101).step_by(4) {
                        map.mark(ByteRange::new(index * GRANULE_BYTES, 512));
                    }
                });
            }
        });
        assert_eq!(map.ranges(), [ByteRange::new(0, DISK_BYTES)]);
    }
}
