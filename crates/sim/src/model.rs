//! The independent judge: every state that the machine's disks ever had, in submission order.
//!
//! A state is known by a digest that each write changes in constant time, so that remembering every state costs eight
//! bytes, and a recovered disk is judged by digesting it once. What each state changed is kept as well: so it can be told
//! whether a point that lacks some ranges is a state of the rest. The model sees only what its user did to the disks.

use std::collections::HashMap;

use replication::{ByteRange, DiskId, Ranges};

/// Unit of the digest, in bytes.
const CELL: usize = 512;

/// A range of a disk that reaches to its end, however long it is or comes to be.
pub const WHOLE_DISK: ByteRange = ByteRange { start: 0, len: 1 << 40 };

/// Digest of all disks of a machine in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StateDigest(u64);

/// Digest of disks given as bytes.
pub fn digest<'a>(disks: impl IntoIterator<Item = (DiskId, &'a [u8])>) -> StateDigest {
    digest_without(&Ranges::default(), disks)
}

/// Digest of disks given as bytes, as if what `lacking` names were not there. Its ranges consist of whole cells.
pub fn digest_without<'a>(lacking: &Ranges, disks: impl IntoIterator<Item = (DiskId, &'a [u8])>) -> StateDigest {
    let mut sum = 0;
    for (disk, bytes) in disks {
        for (index, cell) in bytes.chunks(CELL).enumerate() {
            if !names_cell(lacking, disk, index) {
                sum ^= cell_digest(disk, index, cell);
            }
        }
    }
    StateDigest(sum)
}

/// Whether `ranges` names a cell. Breaks of ranges begin and end at sectors, which are cells.
fn names_cell(ranges: &Ranges, disk: DiskId, index: usize) -> bool {
    let start = (index * CELL) as u64;
    ranges.iter().any(|(named, range)| named == disk && range.start <= start && start < range.end())
}

/// Digest of one cell at its place. No adversary chooses what is written here, so a multiplication per sixteen bytes
/// is enough, and judging a point costs no more than reading it.
fn cell_digest(disk: DiskId, index: usize, cell: &[u8]) -> u64 {
    if cell.iter().all(|byte| *byte == 0) {
        return 0;
    }
    let mut sum = fold((index as u64) << 16 | u64::from(disk.0), cell.len() as u64);
    for chunk in cell.chunks(16) {
        let mut words = [0; 16];
        words[..chunk.len()].copy_from_slice(chunk);
        let (low, high) = words.split_at(8);
        let word = |half: &[u8]| u64::from_le_bytes(*half.first_chunk().expect("a half has 8 bytes"));
        sum = fold(sum ^ word(low), word(high));
    }
    fold(sum, 0)
}

/// Both halves of a 64 × 64 bit product. The constants keep a factor of zero from swallowing the other.
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left ^ 0x9e37_79b9_7f4a_7c15) * u128::from(right ^ 0xd6e8_feb8_6659_fd93);
    product as u64 ^ (product >> 64) as u64
}

/// One state in the machine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownState {
    /// How many requests had been submitted, over all boots.
    pub requests: u64,
    /// True time, in nanoseconds, of the newest of them.
    pub time_ns: u64,
    /// How often the machine had lost its past (power cut, revert) before.
    pub incarnation: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Model {
    disks: Vec<(DiskId, Vec<u8>)>,
    now: StateDigest,
    requests: u64,
    incarnation: u32,
    states: HashMap<StateDigest, Vec<KnownState>>,
    /// Time of each request, by number; request n is at n − 1.
    times: Vec<u64>,
    /// What changed with each state: disk, cell, and by what its digest did.
    changed: Vec<(DiskId, u32, u64)>,
    /// The states in order, and where what each changed ends in `changed`.
    steps: Vec<(KnownState, usize)>,
    /// The states as seen by those who lack ranges, as far as somebody asked.
    partial: HashMap<Ranges, Partial>,
}

/// The states without some ranges.
#[derive(Debug, Default)]
struct Partial {
    /// How many of the model's steps are in.
    steps: usize,
    now: u64,
    /// The newest state of each digest.
    states: HashMap<StateDigest, KnownState>,
}

impl Model {
    /// A machine whose disks hold these bytes.
    pub fn new(disks: Vec<(DiskId, Vec<u8>)>) -> Model {
        let mut model = Model {
            now: StateDigest::default(),
            disks: Vec::new(),
            requests: 0,
            incarnation: 0,
            states: HashMap::new(),
            times: Vec::new(),
            changed: Vec::new(),
            steps: Vec::new(),
            partial: HashMap::new(),
        };
        model.replace(disks);
        model.remember(0);
        model
    }

    /// The machine submitted a request that overwrites `disk` from `offset` on.
    pub fn wrote(&mut self, disk: DiskId, offset: u64, data: &[u8], time_ns: u64) {
        let bytes = &mut self.disks.iter_mut().find(|(id, _)| *id == disk).expect("a known disk").1;
        let (start, end) = (offset as usize, offset as usize + data.len());
        for index in start / CELL..end.div_ceil(CELL) {
            let cell = index * CELL..((index + 1) * CELL).min(bytes.len());
            let before = cell_digest(disk, index, &bytes[cell.clone()]);
            let overlap = start.max(cell.start)..end.min(cell.end);
            bytes[overlap.clone()].copy_from_slice(&data[overlap.start - start..overlap.end - start]);
            let change = before ^ cell_digest(disk, index, &bytes[cell]);
            self.now.0 ^= change;
            self.changed.push((disk, index as u32, change));
        }
        self.requests += 1;
        self.times.push(time_ns);
        self.remember(time_ns);
    }

    /// The machine lost part of its past: its disks now hold these bytes.
    pub fn reset(&mut self, disks: Vec<(DiskId, Vec<u8>)>, time_ns: u64) {
        self.replace(disks);
        self.incarnation += 1;
        self.remember(time_ns);
    }

    /// The disks now are these, and nothing of the past is lost: one was added, or has grown.
    pub fn reshape(&mut self, disks: Vec<(DiskId, Vec<u8>)>, time_ns: u64) {
        self.replace(disks);
        self.remember(time_ns);
    }

    fn replace(&mut self, disks: Vec<(DiskId, Vec<u8>)>) {
        let cells = |disks: &[(DiskId, Vec<u8>)], disk: DiskId| -> usize {
            disks.iter().find(|(id, _)| *id == disk).map_or(0, |(_, bytes)| bytes.len().div_ceil(CELL))
        };
        let cell = |disks: &[(DiskId, Vec<u8>)], disk: DiskId, index: usize| -> u64 {
            let bytes = disks.iter().find(|(id, _)| *id == disk).and_then(|(_, bytes)| bytes.chunks(CELL).nth(index));
            bytes.map_or(0, |bytes| cell_digest(disk, index, bytes))
        };
        let mut ids: Vec<DiskId> = self.disks.iter().chain(&disks).map(|(disk, _)| *disk).collect();
        ids.sort_unstable();
        ids.dedup();
        for disk in ids {
            for index in 0..cells(&self.disks, disk).max(cells(&disks, disk)) {
                let change = cell(&self.disks, disk, index) ^ cell(&disks, disk, index);
                if change != 0 {
                    self.now.0 ^= change;
                    self.changed.push((disk, index as u32, change));
                }
            }
        }
        self.disks = disks;
    }

    /// The machine goes on from where `other` is, with its past. Points that lack ranges are not asked of that past any
    /// more: they were judged while the branch was one.
    pub fn follow(&mut self, other: Model, time_ns: u64) {
        for (digest, states) in other.states {
            self.states.entry(digest).or_default().extend(states);
        }
        (self.now, self.disks) = (StateDigest::default(), Vec::new());
        self.changed.clear();
        self.steps.clear();
        self.partial.clear();
        self.reset(other.disks, time_ns);
    }

    /// The disks and their sizes.
    pub fn sizes(&self) -> Vec<(DiskId, u64)> {
        self.disks.iter().map(|(disk, bytes)| (*disk, bytes.len() as u64)).collect()
    }

    /// What the disks' user has written to them.
    pub fn contents(&self) -> &[(DiskId, Vec<u8>)] {
        &self.disks
    }

    /// All moments at which the disks had this digest.
    pub fn when(&self, digest: StateDigest) -> &[KnownState] {
        self.states.get(&digest).map_or(&[], Vec::as_slice)
    }

    /// The newest moment at which the disks had this digest without what `lacking` names.
    pub fn when_without(&mut self, lacking: &Ranges, digest: StateDigest) -> Option<KnownState> {
        if lacking.is_empty() {
            return self.when(digest).iter().max_by_key(|state| state.requests).copied();
        }
        let partial = self.partial.entry(lacking.clone()).or_default();
        for index in partial.steps..self.steps.len() {
            let from = index.checked_sub(1).map_or(0, |before| self.steps[before].1);
            let (state, to) = self.steps[index];
            for (disk, cell, change) in &self.changed[from..to] {
                if !names_cell(lacking, *disk, *cell as usize) {
                    partial.now ^= change;
                }
            }
            partial.states.insert(StateDigest(partial.now), state);
        }
        partial.steps = self.steps.len();
        partial.states.get(&digest).copied()
    }

    /// The state, of those that are remembered in order, from which `disks` differ in the fewest cells, and these cells. For people
    /// who look for what went wrong.
    pub fn nearest(&self, disks: &[(DiskId, Vec<u8>)]) -> Option<(KnownState, Vec<(DiskId, u32)>)> {
        let mut cells: HashMap<(DiskId, u32), u64> = HashMap::new();
        for (disk, bytes) in disks.iter().chain(&self.disks) {
            for (index, cell) in bytes.chunks(CELL).enumerate() {
                *cells.entry((*disk, index as u32)).or_default() ^= cell_digest(*disk, index, cell);
            }
        }
        let mut differing = cells.values().filter(|difference| **difference != 0).count();
        let mut best = None;
        for index in (0..self.steps.len()).rev() {
            let (state, to) = self.steps[index];
            if best.as_ref().is_none_or(|(_, fewest, _)| differing < *fewest) {
                let mut places: Vec<_> =
                    cells.iter().filter(|(_, difference)| **difference != 0).map(|(cell, _)| *cell).collect();
                places.sort_unstable();
                best = Some((state, differing, places));
            }
            let from = index.checked_sub(1).map_or(0, |before| self.steps[before].1);
            for (disk, cell, change) in &self.changed[from..to] {
                let difference = cells.entry((*disk, *cell)).or_default();
                differing -= usize::from(*difference != 0);
                *difference ^= change;
                differing += usize::from(*difference != 0);
            }
        }
        best.map(|(state, _, cells)| (state, cells))
    }

    /// The digest of the disks now.
    pub fn digest(&self) -> StateDigest {
        self.now
    }

    /// How often the machine has lost its past.
    pub fn incarnations(&self) -> u32 {
        self.incarnation
    }

    /// Requests submitted so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// How many requests were submitted before true time `time_ns`.
    pub fn requests_before(&self, time_ns: u64) -> u64 {
        self.times.partition_point(|time| *time < time_ns) as u64
    }

    fn remember(&mut self, time_ns: u64) {
        let state = KnownState { requests: self.requests, time_ns, incarnation: self.incarnation };
        self.states.entry(self.now).or_default().push(state);
        self.steps.push((state, self.changed.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn the_running_digest_is_the_digest_of_the_bytes() {
        let mut rng = Rng::new(7);
        let mut bytes = vec![0; 8192];
        let mut model = Model::new(vec![(DiskId(3), bytes.clone())]);
        for time in 1..200 {
            let offset = rng.below(8000);
            let mut data = vec![0; 1 + rng.below(8192 - offset) as usize];
            if !rng.one_in(4) {
                rng.fill(&mut data);
            }
            bytes[offset as usize..][..data.len()].copy_from_slice(&data);
            model.wrote(DiskId(3), offset, &data, time);
            let digest = digest([(DiskId(3), &bytes[..])]);
            assert_eq!(model.digest(), digest);
            assert_eq!(model.when(digest).last().expect("known").requests, time);
        }
    }

    #[test]
    fn what_is_lacking_does_not_matter_and_the_rest_does() {
        let mut rng = Rng::new(8);
        let (disk, other) = (DiskId(0), DiskId(1));
        let mut bytes = vec![7; 8192];
        let mut model = Model::new(vec![(disk, bytes.clone())]);
        let lacking = Ranges::of([(disk, ByteRange::new(1024, 2048)), (other, WHOLE_DISK)]);
        let mut past = Vec::new();
        for time in 1..100 {
            let offset = rng.below(16) * 512;
            let mut data = vec![0; 512];
            rng.fill(&mut data);
            bytes[offset as usize..][..512].copy_from_slice(&data);
            model.wrote(disk, offset, &data, time);
            if time == 50 {
                model.reshape(vec![(disk, bytes.clone()), (other, vec![9; 4096])], time);
            }
            past.push(bytes.clone());
        }
        for (before, requests) in past.iter().zip(1..) {
            let mut garbled = before.clone();
            garbled[1024..3072].fill(0xee);
            let seen = digest_without(&lacking, [(disk, &garbled[..]), (other, &[1; 4096][..])]);
            let found = model.when_without(&lacking, seen).expect("a state of the rest");
            assert!(found.requests >= requests, "{found:?} is older than {requests}");
            garbled[4096] ^= 1;
            let seen = digest_without(&lacking, [(disk, &garbled[..])]);
            assert_eq!(model.when_without(&lacking, seen), None);
        }
    }
}
