//! What home is known to hold: for each part of a disk the sum over the hashes of its leaves, each as it was last read.
//!
//! ```text
//! comparison reads a leaf ─► counted ──about to be written: read, taken off──► unknown ──read again──► counted
//! ```
//!
//! Home is held exclusively, so what was read and not written since is still there, and the proof reads only what is unknown.
//! Sums can be added to and subtracted from in any order, so that one sum a part suffices: memory does not grow with the
//! number of leaves. A term is a keyed hash of place and content; a leaf of zeroes adds nothing, so that empty disks cost
//! nothing. Two disks with equal sums are equal unless 256-bit hashes collide; a leaf counts only once it was read.
//!
//! Lives in memory only: after a crash of either side everything is read again.

use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::{LeafHash, LeafKey, PlainLeafHash};
use serde::{Deserialize, Serialize};
use world::{BlockDevice, BlockError, ExtentKind};

use crate::limits;

/// What home reads again for the proof that it equals the branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProofScope {
    /// What was written since it was last read. The rest counts by the hash it was read with, while the disks were held.
    #[default]
    WrittenSince,
    /// Everything, while the branch is at rest.
    Whole,
}

/// Leaves of one part.
const PART_LEAVES: u64 = limits::PROOF_RANGE_BYTES / LEAF_BYTES;
const WORDS: usize = (PART_LEAVES / 64) as usize;
/// What terms are hashed for, so that no other use of the leaf key gives the same.
const CONTEXT: &str = "farshore 2026-11-22 terms of the proof that home equals a branch";
/// Bytes read from a home disk at once.
const READ_BYTES: u64 = 1 << 20;

/// A sum of terms, in four lanes that wrap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LeafSum([u64; 4]);

impl LeafSum {
    fn add(&mut self, term: LeafSum) {
        self.0.iter_mut().zip(term.0).for_each(|(lane, other)| *lane = lane.wrapping_add(other));
    }

    fn subtract(&mut self, term: LeafSum) {
        self.0.iter_mut().zip(term.0).for_each(|(lane, other)| *lane = lane.wrapping_sub(other));
    }

    /// As it travels: 64 hexadecimal digits.
    pub(crate) fn digest(self) -> String {
        let mut hasher = blake3::Hasher::new();
        for lane in self.0 {
            hasher.update(&lane.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// Makes terms of leaves. Both sides derive it from the vault's leaf key.
pub(crate) struct Terms {
    key: [u8; 32],
    zero: LeafHash,
}

impl Terms {
    pub(crate) fn new(key: &LeafKey) -> Terms {
        Terms { key: blake3::derive_key(CONTEXT, key.expose()), zero: key.zero_leaf() }
    }

    fn of(&self, leaf: u64, hash: LeafHash) -> LeafSum {
        if hash == self.zero {
            return LeafSum::default();
        }
        let mut input = [0; 24];
        input[..8].copy_from_slice(&leaf.to_le_bytes());
        input[8..].copy_from_slice(&hash.0);
        let bytes = *blake3::keyed_hash(&self.key, &input).as_bytes();
        let lane = |lane: usize| *bytes[8 * lane..].first_chunk().expect("a hash has four lanes of 8 bytes");
        LeafSum(std::array::from_fn(|index| u64::from_le_bytes(lane(index))))
    }

    /// The sum over the leaves of a range that begins at byte `start`, a multiple of 4 KiB.
    pub(crate) fn sum(&self, start: u64, hashes: impl IntoIterator<Item = LeafHash>) -> LeafSum {
        let mut sum = LeafSum::default();
        let leaves = start / LEAF_BYTES..;
        leaves.zip(hashes).for_each(|(leaf, hash)| sum.add(self.of(leaf, hash)));
        sum
    }
}

/// Which leaves of a part are counted.
struct Counted {
    words: [u64; WORDS],
    count: u64,
}

impl Counted {
    fn first(leaves: u64) -> Counted {
        let mut counted = Counted { words: [0; WORDS], count: 0 };
        for place in 0..leaves {
            counted.insert(place);
        }
        counted
    }

    fn has(&self, place: u64) -> bool {
        self.words[(place / 64) as usize] >> (place % 64) & 1 == 1
    }

    /// Whether it was not there before.
    fn insert(&mut self, place: u64) -> bool {
        let new = !self.has(place);
        self.words[(place / 64) as usize] |= 1 << (place % 64);
        self.count += u64::from(new);
        new
    }

    fn remove(&mut self, place: u64) {
        self.count -= u64::from(self.has(place));
        self.words[(place / 64) as usize] &= !(1 << (place % 64));
    }
}

enum Known {
    Nothing,
    Leaves(Box<Counted>),
    Everything,
}

struct Part {
    sum: LeafSum,
    known: Known,
}

/// What a proof found in one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settled {
    /// `None` if some of it cannot be read.
    pub(crate) sum: Option<LeafSum>,
    /// Bytes of disk that were read for it.
    pub(crate) read_bytes: u64,
}

/// What is known of one disk. Parts begin at multiples of [`limits::PROOF_RANGE_BYTES`].
pub(crate) struct Established {
    size: u64,
    parts: Vec<Part>,
    /// Parts of which some leaves are counted.
    partly: usize,
}

impl Established {
    /// Nothing is known of the first `size` bytes of a disk.
    pub(crate) fn new(size: u64) -> Established {
        let parts = (0..size.div_ceil(limits::PROOF_RANGE_BYTES))
            .map(|_| Part { sum: LeafSum::default(), known: Known::Nothing });
        Established { size, parts: parts.collect(), partly: 0 }
    }

    /// The part that begins at byte `start`, if exactly `len` bytes from there are one.
    pub(crate) fn part_at(&self, start: u64, len: u64) -> Option<usize> {
        let index =
            usize::try_from(start / limits::PROOF_RANGE_BYTES).ok().filter(|index| *index < self.parts.len())?;
        (self.range(index) == ByteRange::between(start, start.checked_add(len)?)?).then_some(index)
    }

    /// The first part from `from` on of which something is unknown.
    pub(crate) fn next_unsettled(&self, from: usize) -> Option<usize> {
        (from..self.parts.len()).find(|index| !matches!(self.parts[*index].known, Known::Everything))
    }

    /// The bytes of a part.
    pub(crate) fn range(&self, index: usize) -> ByteRange {
        let start = index as u64 * limits::PROOF_RANGE_BYTES;
        ByteRange::new(start, limits::PROOF_RANGE_BYTES.min(self.size - start))
    }

    fn leaves(&self, index: usize) -> u64 {
        self.range(index).len.div_ceil(LEAF_BYTES)
    }

    /// The leaf was just read and nobody has written to it since.
    pub(crate) fn learn(&mut self, terms: &Terms, leaf: u64, hash: LeafHash) {
        let (index, place) = ((leaf / PART_LEAVES) as usize, leaf % PART_LEAVES);
        if index >= self.parts.len() || place >= self.leaves(index) {
            return;
        }
        let leaves = self.leaves(index);
        let part = &mut self.parts[index];
        if let Known::Nothing = part.known {
            // Beyond the bound the part stays unknown, and the proof reads all of it.
            if self.partly >= limits::PARTLY_KNOWN_MAX {
                return;
            }
            self.partly += 1;
            part.known = Known::Leaves(Box::new(Counted::first(0)));
        }
        // What is counted already keeps its hash: if it has changed behind our back, the sum will not fit.
        let Known::Leaves(counted) = &mut part.known else { return };
        if counted.insert(place) {
            part.sum.add(terms.of(leaf, hash));
        }
        if counted.count == leaves {
            part.known = Known::Everything;
            self.partly -= 1;
        }
    }

    /// Nothing of the part counts any more.
    pub(crate) fn forget_part(&mut self, index: usize) {
        let part = &mut self.parts[index];
        self.partly -= usize::from(matches!(part.known, Known::Leaves(_)));
        *part = Part { sum: LeafSum::default(), known: Known::Nothing };
    }

    /// `range` is about to be written: its leaves do not count any more. Those that do are read from `device` first, since
    /// a sum gives nothing away of what it was made from.
    pub(crate) fn forget(&mut self, terms: &Terms, key: &LeafKey, device: &dyn BlockDevice, range: ByteRange) {
        for piece in range.split_at_multiples(limits::PROOF_RANGE_BYTES) {
            let index = (piece.start / limits::PROOF_RANGE_BYTES) as usize;
            if index >= self.parts.len() || matches!(self.parts[index].known, Known::Nothing) {
                continue;
            }
            let part = self.range(index);
            let whole = piece.start <= part.start && piece.end() >= part.end();
            if whole || self.forget_leaves(terms, key, device, piece).is_err() {
                self.forget_part(index);
            }
        }
    }

    /// As [`Established::forget`], within one part. An error if what was counted cannot be told any more.
    fn forget_leaves(
        &mut self,
        terms: &Terms,
        key: &LeafKey,
        device: &dyn BlockDevice,
        piece: ByteRange,
    ) -> Result<(), Unknowable> {
        let index = (piece.start / limits::PROOF_RANGE_BYTES) as usize;
        let (part, leaves) = (self.range(index), self.leaves(index));
        if let Known::Everything = self.parts[index].known {
            if self.partly >= limits::PARTLY_KNOWN_MAX {
                return Err(Unknowable);
            }
            self.partly += 1;
            self.parts[index].known = Known::Leaves(Box::new(Counted::first(leaves)));
        }
        let Part { sum, known: Known::Leaves(counted) } = &mut self.parts[index] else { return Ok(()) };
        let places = (piece.start - part.start) / LEAF_BYTES..(piece.end() - part.start).div_ceil(LEAF_BYTES);
        for run in runs(places, |place| counted.has(place)) {
            let range = bytes_of(part, &run);
            let hashes = leaf_hashes(device, range, key).map_err(|_| Unknowable)?;
            for (place, hash) in run.zip(hashes) {
                sum.subtract(terms.of(part.start / LEAF_BYTES + place, hash.ok_or(Unknowable)?));
                counted.remove(place);
            }
        }
        Ok(())
    }

    /// Reads from `medium` what is unknown of a part; then all of it is known.
    ///
    /// # Errors
    /// The device failed. That some of it cannot be read is no error.
    pub(crate) fn settle(
        &mut self,
        terms: &Terms,
        key: &LeafKey,
        medium: &dyn BlockDevice,
        index: usize,
    ) -> Result<Settled, BlockError> {
        let (part, leaves) = (self.range(index), self.leaves(index));
        let mut read_bytes = 0;
        let unknown: Vec<std::ops::Range<u64>> = match &self.parts[index].known {
            Known::Everything => Vec::new(),
            Known::Nothing => runs(0..leaves, |_| true),
            Known::Leaves(counted) => runs(0..leaves, |place| !counted.has(place)),
        };
        let mut added = LeafSum::default();
        for run in unknown {
            let range = bytes_of(part, &run);
            read_bytes += range.len;
            let hashes = leaf_hashes(medium, range, key)?;
            let whole = hashes.iter().copied().collect::<Option<Vec<LeafHash>>>();
            match whole {
                Some(hashes) => added.add(terms.sum(range.start, hashes)),
                None => return Ok(Settled { sum: None, read_bytes }),
            }
        }
        let part = &mut self.parts[index];
        part.sum.add(added);
        self.partly -= usize::from(matches!(part.known, Known::Leaves(_)));
        part.known = Known::Everything;
        Ok(Settled { sum: Some(part.sum), read_bytes })
    }
}

/// What a part's sum was made from cannot be read any more.
struct Unknowable;

/// The runs of places in `places` for which `is` holds.
fn runs(places: std::ops::Range<u64>, is: impl Fn(u64) -> bool) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for place in places.filter(|place| is(*place)) {
        match runs.last_mut() {
            Some(last) if last.end == place => last.end += 1,
            _ => runs.push(place..place + 1),
        }
    }
    runs
}

/// Bytes of a run of leaves of `part`; the last leaf of a disk may be short.
fn bytes_of(part: ByteRange, run: &std::ops::Range<u64>) -> ByteRange {
    let start = part.start + run.start * LEAF_BYTES;
    ByteRange::new(start, (part.start + run.end * LEAF_BYTES).min(part.end()) - start)
}

/// The keyed hash of each leaf of `range` as the device holds it; `None` where it cannot be read. Holes are not read.
pub(crate) fn leaf_hashes(
    device: &dyn BlockDevice,
    range: ByteRange,
    key: &LeafKey,
) -> Result<Vec<Option<LeafHash>>, BlockError> {
    let zero = key.zero_leaf();
    let mut hashes = Vec::with_capacity((range.len / LEAF_BYTES) as usize + 1);
    let mut buffer = vec![0; READ_BYTES.min(range.len) as usize];
    for piece in range.split_at_multiples(READ_BYTES) {
        let extents = device.extents(piece.start..piece.end())?;
        if extents.iter().all(|extent| extent.kind != ExtentKind::Data) {
            hashes.extend((0..piece.len.div_ceil(LEAF_BYTES)).map(|_| Some(zero)));
            continue;
        }
        let bytes = &mut buffer[..piece.len as usize];
        match device.read_at(piece.start, bytes) {
            Ok(()) => {
                let whole = bytes.chunks_exact(LEAF_BYTES as usize);
                let rest = Some(whole.remainder()).filter(|rest| !rest.is_empty()).map(PlainLeafHash::of);
                let whole: Vec<&[u8]> = whole.collect();
                let plain = PlainLeafHash::of_each(&whole).into_iter().chain(rest);
                hashes.extend(plain.map(|hash| Some(key.leaf(hash))));
            }
            Err(BlockError::Unreadable { .. }) => {
                for leaf in piece.split_at_multiples(LEAF_BYTES) {
                    let bytes = &mut bytes[leaf.within(piece.start)];
                    let hash = device.read_at(leaf.start, bytes).ok().map(|()| key.leaf(PlainLeafHash::of(bytes)));
                    hashes.push(hash);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// A disk in memory that counts what is read.
    struct Disk(Mutex<(Vec<u8>, u64)>);

    impl Disk {
        fn new(size: usize) -> Disk {
            Disk(Mutex::new((vec![0; size], 0)))
        }

        fn take_read(&self) -> u64 {
            std::mem::take(&mut self.0.lock().expect("no panic").1)
        }
    }

    impl BlockDevice for Disk {
        fn size(&self) -> u64 {
            self.0.lock().expect("no panic").0.len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
            let mut disk = self.0.lock().expect("no panic");
            buffer.copy_from_slice(&disk.0[offset as usize..][..buffer.len()]);
            disk.1 += buffer.len() as u64;
            Ok(())
        }

        fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
            self.0.lock().expect("no panic").0[offset as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        }

        fn write_zeroes(&self, range: std::ops::Range<u64>) -> Result<(), BlockError> {
            self.0.lock().expect("no panic").0[range.start as usize..range.end as usize].fill(0);
            Ok(())
        }

        fn discard(&self, range: std::ops::Range<u64>) -> Result<(), BlockError> {
            self.write_zeroes(range)
        }

        fn flush(&self) -> Result<(), BlockError> {
            Ok(())
        }
    }

    fn key() -> LeafKey {
        LeafKey::new([7; 32])
    }

    /// What a reader of the whole part gets: the slow way.
    fn oracle(disk: &Disk, range: ByteRange) -> LeafSum {
        let hashes = leaf_hashes(disk, range, &key()).expect("reads").into_iter().map(|hash| hash.expect("readable"));
        Terms::new(&key()).sum(range.start, hashes)
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write { start: u64, len: u64, byte: u8 },
        Compare { first: u64, count: u64 },
        Settle(u64),
    }

    const SIZE: u64 = limits::PROOF_RANGE_BYTES + 41 * LEAF_BYTES + 600;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let leaves = SIZE.div_ceil(LEAF_BYTES);
        // Around the edge of the two parts, where the disk is small.
        let near = (limits::PROOF_RANGE_BYTES - 30 * LEAF_BYTES)..SIZE;
        let step = prop_oneof![
            (near, 1u64..40_000, 0u8..3).prop_map(|(start, len, byte)| Step::Write {
                start,
                len: len.min(SIZE - start),
                byte
            }),
            (leaves - 80..leaves, 1u64..50)
                .prop_map(move |(first, count)| Step::Compare { first, count: count.min(leaves - first) }),
            (0u64..2).prop_map(Step::Settle),
        ];
        prop::collection::vec(step, 1..25)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn a_sum_is_that_of_what_the_disk_holds(steps in steps()) {
            let (disk, key, terms) = (Disk::new(SIZE as usize), key(), Terms::new(&key()));
            let mut known = Established::new(SIZE);
            for step in steps {
                match step {
                    Step::Write { start, len, byte } => {
                        known.forget(&terms, &key, &disk, ByteRange::new(start, len));
                        disk.write_at(start, &vec![byte; len as usize]).expect("written");
                    }
                    Step::Compare { first, count } => {
                        let range = ByteRange::between(first * LEAF_BYTES, ((first + count) * LEAF_BYTES).min(SIZE));
                        let hashes = leaf_hashes(&disk, range.expect("not empty"), &key).expect("reads");
                        for (leaf, hash) in (first..).zip(hashes) {
                            known.learn(&terms, leaf, hash.expect("readable"));
                        }
                    }
                    Step::Settle(index) => {
                        let settled = known.settle(&terms, &key, &disk, index as usize).expect("reads");
                        prop_assert_eq!(settled.sum, Some(oracle(&disk, known.range(index as usize))));
                    }
                }
            }
            for index in 0..2 {
                let settled = known.settle(&terms, &key, &disk, index).expect("reads");
                prop_assert_eq!(settled.sum, Some(oracle(&disk, known.range(index))));
                prop_assert_eq!(known.settle(&terms, &key, &disk, index).expect("reads").read_bytes, 0);
            }
            prop_assert_eq!(known.partly, 0);
            prop_assert_eq!(known.next_unsettled(0), None);
        }
    }

    #[test]
    fn only_what_was_written_since_is_read_again_and_a_change_behind_our_back_is_seen_by_a_whole_proof_only() {
        let (disk, key, terms) = (Disk::new(SIZE as usize), key(), Terms::new(&key()));
        disk.write_at(0, &vec![9; 1 << 20]).expect("written");
        let mut known = Established::new(SIZE);
        for index in 0..2 {
            known.settle(&terms, &key, &disk, index).expect("reads");
        }
        disk.take_read();
        known.forget(&terms, &key, &disk, ByteRange::new(100_000, 5000));
        disk.write_at(100_000, &[4; 5000]).expect("written");
        assert_eq!(disk.take_read(), 2 * LEAF_BYTES, "the old content of two leaves");
        let settled = known.settle(&terms, &key, &disk, 0).expect("reads");
        assert_eq!((settled.sum, settled.read_bytes), (Some(oracle(&disk, known.range(0))), 2 * LEAF_BYTES));
        disk.write_at(900_000, &[1]).expect("written");
        assert_ne!(known.settle(&terms, &key, &disk, 0).expect("reads").sum, Some(oracle(&disk, known.range(0))));
        known.forget_part(0);
        assert_eq!(known.settle(&terms, &key, &disk, 0).expect("reads").sum, Some(oracle(&disk, known.range(0))));
        // A part that is written as a whole is not read before.
        disk.take_read();
        known.forget(&terms, &key, &disk, known.range(0));
        assert_eq!(disk.take_read(), 0);
        assert_eq!(known.next_unsettled(0), Some(0));
        assert_eq!(known.part_at(limits::PROOF_RANGE_BYTES, SIZE - limits::PROOF_RANGE_BYTES), Some(1));
        assert_eq!(known.part_at(limits::PROOF_RANGE_BYTES, LEAF_BYTES), None);
        assert_eq!(known.part_at(u64::MAX, 2), None);
    }

    #[test]
    fn places_and_contents_are_told_apart() {
        let terms = Terms::new(&key());
        let hash = |byte: u8| key().leaf(PlainLeafHash::of(&[byte; LEAF_BYTES as usize]));
        let sum = |hashes: &[LeafHash]| terms.sum(0, hashes.iter().copied());
        assert_ne!(sum(&[hash(1), hash(2)]), sum(&[hash(2), hash(1)]), "swapped leaves");
        assert_ne!(sum(&[hash(1), hash(1)]), sum(&[hash(0), hash(0)]));
        assert_eq!(sum(&[hash(0), hash(0)]), LeafSum::default(), "zeroes add nothing");
        assert_ne!(sum(&[hash(1)]).digest(), sum(&[hash(2)]).digest());
        assert_ne!(terms.sum(0, [hash(1)]), Terms::new(&LeafKey::new([8; 32])).sum(0, [hash(1)]));
    }
}
