//! What the test writes, in which order, and what it was told: the truth that points are compared with.

use std::sync::{Mutex, MutexGuard, PoisonError};

use world::{Clock, SystemClock};

pub(crate) const BLOCK_BYTES: usize = 4096;
pub(crate) const DISKS: usize = 2;
pub(crate) const DISK_BYTES: u64 = 40 << 20;
/// Few, so that each is overwritten often: a write that is missing or too many is then seen by what it hides.
const SLOTS: u64 = 96;

pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Where a write goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) disk: usize,
    pub(crate) offset: u64,
}

/// One write.
#[derive(Debug, Clone, Copy)]
struct Write {
    slot: usize,
    submitted_ns: u64,
    /// `u64::MAX` until it was acknowledged.
    acknowledged_ns: u64,
}

/// A moment that was asked to be kept, by name.
#[derive(Debug, Clone)]
pub(crate) struct Mark {
    pub(crate) name: String,
    /// It was asked for after so many writes and before the next.
    pub(crate) k: u64,
    /// The answer was that the process server has it durably.
    pub(crate) durable: bool,
}

/// All writes so far.
pub(crate) struct Ledger {
    seed: u64,
    places: Vec<Place>,
    writes: Mutex<Vec<Write>>,
    marks: Mutex<Vec<Mark>>,
}

fn now_ns() -> u64 {
    SystemClock.wall().0
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    pub(crate) fn new(seed: u64) -> Ledger {
        let stretch = DISK_BYTES / BLOCK_BYTES as u64 / (SLOTS / DISKS as u64);
        let place = |slot: u64| Place {
            disk: (slot % DISKS as u64) as usize,
            offset: (slot / DISKS as u64 * stretch + mix(seed ^ slot) % stretch) * BLOCK_BYTES as u64,
        };
        Ledger { seed, places: (0..SLOTS).map(place).collect(), writes: Mutex::default(), marks: Mutex::default() }
    }

    /// What the block at `place` holds after write `number`; 0 is before the first. Every fourth is empty then.
    pub(crate) fn block(&self, place: Place, number: u64) -> Vec<u8> {
        let salt = mix(self.seed ^ mix(place.offset + place.disk as u64) ^ number.rotate_left(40));
        if number == 0 && salt.is_multiple_of(4) {
            return vec![0; BLOCK_BYTES];
        }
        let mut state = salt | 1;
        let mut words = vec![number, place.offset];
        words.resize_with(BLOCK_BYTES / 8, || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        });
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Number and place of the next write, noted as submitted now.
    pub(crate) fn submit(&self) -> (u64, Place) {
        let mut writes = locked(&self.writes);
        let number = writes.len() as u64 + 1;
        let slot = (mix(self.seed ^ mix(number)) % SLOTS) as usize;
        writes.push(Write { slot, submitted_ns: now_ns(), acknowledged_ns: u64::MAX });
        (number, self.places[slot])
    }

    pub(crate) fn acknowledge(&self, number: u64) {
        locked(&self.writes)[number as usize - 1].acknowledged_ns = now_ns();
    }

    pub(crate) fn mark(&self, mark: Mark) {
        locked(&self.marks).push(mark);
    }

    /// The server that had them is lost: only what was announced must still be there.
    pub(crate) fn forget_durable_marks(&self) {
        locked(&self.marks).iter_mut().for_each(|mark| mark.durable = false);
    }

    pub(crate) fn marks(&self) -> Vec<Mark> {
        locked(&self.marks).clone()
    }

    pub(crate) fn len(&self) -> u64 {
        locked(&self.writes).len() as u64
    }

    /// For each slot the number of the last of the first `k` writes to it; 0 if there is none.
    fn last_in_slots(&self, k: u64) -> Vec<u64> {
        let mut last = vec![0; self.places.len()];
        for (index, write) in locked(&self.writes).iter().take(k as usize).enumerate() {
            last[write.slot] = index as u64 + 1;
        }
        last
    }

    /// The number *k* such that the disks hold the first *k* writes and no other; a sentence if there is none.
    pub(crate) fn prefix(&self, mut read: impl FnMut(Place, &mut [u8])) -> Result<u64, String> {
        let mut buffer = vec![0; BLOCK_BYTES];
        let mut found = Vec::new();
        for place in &self.places {
            read(*place, &mut buffer);
            let told = u64::from_le_bytes(buffer[..8].try_into().expect("eight bytes"));
            let number = if told <= self.len() { told } else { 0 };
            if buffer != self.block(*place, number) {
                return Err(format!("{place:?} holds no write, it begins with {:02x?}", &buffer[..24]));
            }
            found.push(number);
        }
        let k = found.iter().copied().max().unwrap_or(0);
        let expected = self.last_in_slots(k);
        match (0..found.len()).find(|slot| found[*slot] != expected[*slot]) {
            None => Ok(k),
            Some(slot) => {
                let (place, holds, should) = (self.places[slot], found[slot], expected[slot]);
                Err(format!("it holds write {k}, but {place:?} holds write {holds} instead of {should}"))
            }
        }
    }

    /// The whole of `disk` after the first `k` writes.
    pub(crate) fn replay(&self, disk: usize, k: u64) -> Vec<u8> {
        let mut image = Vec::with_capacity(DISK_BYTES as usize);
        for offset in (0..DISK_BYTES).step_by(BLOCK_BYTES) {
            image.extend(self.block(Place { disk, offset }, 0));
        }
        for (place, number) in self.places.iter().zip(self.last_in_slots(k)) {
            if place.disk == disk {
                let at = place.offset as usize;
                image[at..at + BLOCK_BYTES].copy_from_slice(&self.block(*place, number));
            }
        }
        image
    }

    /// The least and the largest number of writes that a point of time `ns` may hold.
    pub(crate) fn allowed(&self, ns: u64, tolerance_ns: u64) -> (u64, u64) {
        let writes = locked(&self.writes);
        let (early, late) = (ns.saturating_sub(tolerance_ns), ns.saturating_add(tolerance_ns));
        let least = writes.partition_point(|write| write.acknowledged_ns < early);
        let most = writes.partition_point(|write| write.submitted_ns < late);
        (least as u64, most as u64)
    }
}
