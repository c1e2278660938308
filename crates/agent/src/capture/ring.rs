//! The ring: captured requests with their data, in submission order, until they are durable elsewhere.
//!
//! Many producers, one consumer with two cursors: *read* (handed to the sender) and *release* (space freed). Records
//! are built before they are pushed, so a push is the reservation and the completion in one and no hole can appear.
//!
//! Invariant, the reason for `broken`: once a record found no room, no later one enters until a rotation opened a new
//! epoch, and none of an older epoch even then. So the ring never holds a write whose predecessor it dropped.
//!
//! The ring is memory: a kill of the agent loses it, and the maps name what it held.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use replication::{ChangeKind, Epoch, SourceTime};

use super::{Captured, GapCause, RingPosition};

/// Ring space that a record takes besides its data, in bytes: what the record itself costs in memory.
pub const RECORD_OVERHEAD_BYTES: u64 = 128;
/// Ring space that each piece of a record takes besides its data, in bytes.
pub const PIECE_OVERHEAD_BYTES: u64 = 192;

/// Ring space that a record of so many pieces with so much data together takes, in bytes.
pub(crate) fn cost(pieces: u64, data_bytes: u64) -> u64 {
    RECORD_OVERHEAD_BYTES + pieces * PIECE_OVERHEAD_BYTES + data_bytes
}

/// What became of a record that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Push {
    /// It is in the ring.
    Taken,
    /// The stream is broken, or was when the record's epoch ended.
    Refused,
    /// There is no room. The caller decides whether that breaks the stream.
    Full,
}

/// The ring.
pub(crate) struct Ring {
    state: Mutex<RingState>,
    bytes_max: u64,
    /// Copy of the state's, for a look without the lock.
    used: AtomicU64,
}

pub(crate) struct RingState {
    records: VecDeque<Captured>,
    /// Index into `records` of the next one to read.
    read: usize,
    released: RingPosition,
    producer: RingPosition,
    last_time: SourceTime,
    broken: bool,
    /// Records of older epochs are refused: the stream was broken or stopped when theirs ended.
    refuse_before: Epoch,
    gap_count: u64,
    gap_cause: Option<GapCause>,
}

impl Ring {
    pub(crate) fn new(bytes_max: u64) -> Ring {
        let state = RingState {
            records: VecDeque::new(),
            read: 0,
            released: RingPosition(0),
            producer: RingPosition(0),
            last_time: SourceTime(0),
            broken: false,
            refuse_before: Epoch(0),
            gap_count: 0,
            gap_cause: None,
        };
        Ring { state: Mutex::new(state), bytes_max, used: AtomicU64::new(0) }
    }

    pub(crate) fn lock(&self) -> RingGuard<'_> {
        RingGuard { ring: self, state: self.state.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Whether `bytes` more would not fit just now. Spares a producer the copy that would be thrown away.
    pub(crate) fn seems_full(&self, bytes: u64) -> bool {
        self.used.load(Ordering::Relaxed) + bytes > self.bytes_max
    }

    /// Frees everything up to `through`. Memory is given back outside the lock, so that writers do not wait for it.
    pub(crate) fn release(&self, through: RingPosition) {
        let mut guard = self.lock();
        let state = &mut *guard.state;
        assert!(through <= state.producer, "only what was in the ring can be released");
        let count = state.records.partition_point(|record| record.end <= through);
        let freed: Vec<Captured> = state.records.drain(..count).collect();
        if let Some(last) = freed.last() {
            state.released = last.end;
        }
        state.read = state.read.saturating_sub(count);
        self.used.store(state.used(), Ordering::Relaxed);
        drop(guard);
        drop(freed);
    }
}

/// The locked ring.
pub(crate) struct RingGuard<'a> {
    ring: &'a Ring,
    state: MutexGuard<'a, RingState>,
}

impl RingState {
    fn used(&self) -> u64 {
        self.producer.0 - self.released.0
    }
}

impl RingGuard<'_> {
    /// Appends a record of `epoch` that takes `cost` bytes, if the stream is whole and there is room.
    pub(crate) fn push(
        &mut self,
        epoch: Epoch,
        disk: replication::DiskId,
        time: SourceTime,
        cost: u64,
        kinds: impl FnOnce() -> Vec<ChangeKind>,
    ) -> Push {
        if self.state.broken || epoch < self.state.refuse_before {
            return Push::Refused;
        }
        if self.state.used() + cost > self.ring.bytes_max {
            return Push::Full;
        }
        // A producer may have taken its time reading before another one that was faster here.
        let time = time.max(self.state.last_time);
        self.state.last_time = time;
        let kinds = kinds();
        assert!(!kinds.is_empty(), "a record says what happened");
        self.state.producer.0 += cost;
        let end = self.state.producer;
        self.state.records.push_back(Captured { end, epoch, time, disk, kinds });
        self.ring.used.store(self.state.used(), Ordering::Relaxed);
        Push::Taken
    }

    /// Breaks the stream: nothing enters any more until [`RingGuard::resume`].
    pub(crate) fn break_stream(&mut self, cause: GapCause) {
        self.state.broken = true;
        self.state.gap_count += 1;
        self.state.gap_cause = Some(cause);
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.state.broken
    }

    /// Ends a break with the opening of `epoch`. Older epochs stay out.
    pub(crate) fn resume(&mut self, epoch: Epoch) {
        self.state.broken = false;
        self.state.refuse_before = epoch;
    }

    pub(crate) fn gap(&self) -> (u64, Option<GapCause>) {
        (self.state.gap_count, self.state.gap_cause)
    }

    pub(crate) fn producer(&self) -> RingPosition {
        self.state.producer
    }

    pub(crate) fn used(&self) -> u64 {
        self.state.used()
    }

    /// The next record to read.
    #[cfg(test)]
    pub(crate) fn next(&mut self) -> Option<Captured> {
        let mut batch = VecDeque::new();
        self.read_into(&mut batch, 1);
        batch.pop_front()
    }

    /// Appends the next records to read, at most `most`, to `batch`. One lock for many: the writers need it too.
    pub(crate) fn read_into(&mut self, batch: &mut VecDeque<Captured>, most: usize) {
        let end = (self.state.read + most).min(self.state.records.len());
        batch.extend(self.state.records.range(self.state.read..end).cloned());
        self.state.read = end;
    }

    /// Moves the read cursor back to the end of a record, or to the release cursor.
    pub(crate) fn rewind(&mut self, to: RingPosition) {
        let index = self.state.records.partition_point(|record| record.end <= to);
        let before = index.checked_sub(1).map_or(self.state.released, |last| self.state.records[last].end);
        assert_eq!(before, to, "a rewind goes to the end of a record that is still there");
        assert!(index <= self.state.read, "a rewind goes back");
        self.state.read = index;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use replication::{ByteRange, DiskId};

    fn write(len: usize) -> Vec<ChangeKind> {
        vec![ChangeKind::Write { range: ByteRange::new(0, len as u64), data: Bytes::from(vec![7; len]) }]
    }

    #[test]
    fn the_overhead_covers_what_a_record_takes() {
        assert!(size_of::<Captured>() as u64 <= RECORD_OVERHEAD_BYTES);
        // A piece, the data's shared header, and what the allocator keeps beside each.
        assert!(size_of::<ChangeKind>() as u64 + 64 <= PIECE_OVERHEAD_BYTES);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        /// Against a list that remembers everything ever pushed.
        #[test]
        fn cursors_agree_with_a_list(steps in prop::collection::vec((0u8..5, any::<prop::sample::Index>(), 1usize..3000), 1..80)) {
            let ring = Ring::new(20_000);
            let (mut all, mut read, mut released) = (Vec::<(RingPosition, usize)>::new(), 0, 0);
            for (step, at, len) in steps {
                let floor = if released == 0 { 0 } else { all[released - 1].0.0 };
                let top = all.last().map_or(0, |last| last.0.0);
                match step {
                    0 | 1 => {
                        let kinds = write(len);
                        let cost = cost(1, len as u64);
                        let push = ring.lock().push(Epoch(1), DiskId(0), SourceTime(9), cost, || kinds);
                        let fits = top - floor + cost <= 20_000;
                        prop_assert_eq!(push, if fits { Push::Taken } else { Push::Full });
                        if fits {
                            all.push((RingPosition(top + cost), len));
                        }
                    }
                    2 => {
                        let record = ring.lock().next();
                        prop_assert_eq!(record.as_ref().map(|r| (r.end, r.kinds[0].data_len())), all.get(read).copied());
                        read += usize::from(record.is_some());
                    }
                    3 if !all.is_empty() => {
                        released = released.max(at.index(all.len()) + 1);
                        ring.release(all[released - 1].0);
                        read = read.max(released);
                    }
                    4 => {
                        read = released + at.index(read - released + 1);
                        let to = if read == 0 { RingPosition(0) } else { all[read - 1].0 };
                        ring.lock().rewind(to);
                    }
                    _ => {}
                }
                let floor = if released == 0 { 0 } else { all[released - 1].0.0 };
                let top = all.last().map_or(0, |last| last.0.0);
                prop_assert_eq!(ring.lock().used(), top - floor);
                prop_assert_eq!(ring.seems_full(0), false);
            }
        }
    }

    #[test]
    fn after_a_drop_nothing_enters_until_a_new_epoch() {
        let ring = Ring::new(10_000);
        let push = |epoch, len| {
            let cost = cost(1, len as u64);
            ring.lock().push(Epoch(epoch), DiskId(0), SourceTime(1), cost, || write(len))
        };
        assert_eq!(push(1, 5000), Push::Taken);
        assert_eq!(push(1, 6000), Push::Full);
        ring.lock().break_stream(GapCause::Overflow);
        ring.release(RingPosition(cost(1, 5000)));
        assert_eq!(push(1, 10), Push::Refused, "there is room again, but the one before is missing");
        ring.lock().resume(Epoch(2));
        assert_eq!(push(1, 10), Push::Refused, "a straggler of the broken epoch");
        assert_eq!(push(2, 10), Push::Taken);
        assert_eq!(ring.lock().gap(), (1, Some(GapCause::Overflow)));
    }

    #[test]
    fn times_never_go_back_along_the_ring() {
        let ring = Ring::new(10_000);
        for time in [5, 9, 7] {
            ring.lock().push(Epoch(1), DiskId(0), SourceTime(time), cost(1, 1), || write(1));
        }
        let times: Vec<u64> = std::iter::from_fn(|| ring.lock().next()).map(|record| record.time.0).collect();
        assert_eq!(times, [5, 9, 9]);
    }
}
