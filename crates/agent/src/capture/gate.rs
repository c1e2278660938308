//! The gate that every write passes: the (epoch, mode) word, who is in flight under which epoch, and freezing.
//!
//! A write registers under the epoch it read and then reads the word again. If it is unchanged, whoever changes it
//! later is sure to see the registration (both sides use sequentially consistent operations, so at least one of them
//! sees the other); if not, the write steps back and starts over. It acts under the epoch of that one reading.
//!
//! ```text
//! open ──freeze──► frozen (new writes wait) ──drained, flushed──► Frozen guard ──drop or time-out──► open
//!   └────close───► closed (new writes fail), for good
//! ```
//!
//! A freeze ends at its time-out whatever happens: each waiting write watches the clock and thaws by itself, so a
//! flush or an owner that hangs cannot stop the machine for longer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use replication::{Epoch, MarkerKind};
use world::{BlockError, Clock, Monotonic};

use super::Mode;
use super::recovery_set::{EPOCH_SHIFT, Slot};
use super::splitter::Shared;

/// How long a waiter sleeps at most before it looks at the clock again.
const WAIT_SLICE: Duration = Duration::from_millis(5);

const TRACK: u64 = 1;
const FROZEN: u64 = 2;
const CLOSED: u64 = 4;

/// One reading of the (epoch, mode) word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(pub(crate) u64);

impl Word {
    /// The word of a capture that was just opened: nothing streams until its owner rotates.
    pub(crate) fn opening(epoch: Epoch) -> Word {
        Word(u64::from(epoch.0) << EPOCH_SHIFT | TRACK)
    }

    pub(crate) fn epoch(self) -> Epoch {
        Epoch((self.0 >> EPOCH_SHIFT) as u32)
    }

    pub(crate) fn mode(self) -> Mode {
        if self.0 & TRACK == 0 { Mode::Stream } else { Mode::Track }
    }

    fn is_frozen(self) -> bool {
        self.0 & FROZEN != 0
    }

    fn is_closed(self) -> bool {
        self.0 & CLOSED != 0
    }
}

/// Why a freeze did not come about. Writes go on.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Another freeze is under way.
    #[error("the disks are already frozen")]
    AlreadyFrozen,
    /// The capture was closed.
    #[error("the capture is closed")]
    Closed,
    /// Writes in flight did not end, or the flush took longer than allowed. Try again with more time.
    #[error("the disks did not come to rest within {0:?}")]
    TimedOut(Duration),
    /// A disk could not be flushed: its writes may not be durable.
    #[error("a disk could not be flushed")]
    Flush(#[source] BlockError),
}

#[derive(Debug, Default)]
struct FreezeState {
    /// Counts freezes, so that a guard knows its own.
    ticket: u64,
    /// When the freeze ends by itself.
    until: Option<Monotonic>,
}

/// The gate. The word itself lives in the recovery set and is passed in.
#[derive(Default)]
pub(crate) struct Gate {
    in_flight: [InFlight; 2],
    state: Mutex<FreezeState>,
    changed: Condvar,
}

/// A counter on a cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct InFlight(AtomicU64);

impl Gate {
    /// Registers one write; returns the word it acts under. Waits while frozen.
    ///
    /// # Errors
    /// The capture was closed.
    pub(crate) fn enter(&self, word: &AtomicU64, clock: &dyn Clock) -> Result<Word, BlockError> {
        loop {
            let seen = Word(word.load(Ordering::SeqCst));
            let slot = Slot::of(seen.epoch());
            self.in_flight[slot.index()].0.fetch_add(1, Ordering::SeqCst);
            let now = Word(word.load(Ordering::SeqCst));
            if now == seen && !now.is_frozen() && !now.is_closed() {
                return Ok(now);
            }
            self.leave(word, slot);
            if now.is_closed() {
                return Err(BlockError::Failed(std::io::Error::other("the agent no longer serves this disk")));
            }
            if now.is_frozen() {
                self.wait_until_open(word, clock);
            }
        }
    }

    /// Ends a registration.
    pub(crate) fn leave(&self, word: &AtomicU64, slot: Slot) {
        let before = self.in_flight[slot.index()].0.fetch_sub(1, Ordering::SeqCst);
        let now = Word(word.load(Ordering::SeqCst));
        if before == 1 && (now.is_frozen() || now.is_closed()) {
            let _state = self.lock();
            self.changed.notify_all();
        }
    }

    /// Whether nobody is registered in `slot`. May be `false` for a moment while someone steps back.
    pub(crate) fn is_idle(&self, slot: Slot) -> bool {
        self.in_flight[slot.index()].0.load(Ordering::SeqCst) == 0
    }

    fn drained(&self) -> bool {
        Slot::ALL.into_iter().all(|slot| self.is_idle(slot))
    }

    fn lock(&self) -> MutexGuard<'_, FreezeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until something may have changed, but never long.
    fn doze<'a>(&self, state: MutexGuard<'a, FreezeState>) -> MutexGuard<'a, FreezeState> {
        self.changed.wait_timeout(state, WAIT_SLICE).unwrap_or_else(PoisonError::into_inner).0
    }

    fn wait_until_open(&self, word: &AtomicU64, clock: &dyn Clock) {
        let mut state = self.lock();
        while Word(word.load(Ordering::SeqCst)).is_frozen() {
            if state.until.is_none_or(|until| clock.monotonic() >= until) {
                tracing::warn!("a freeze reached its time-out; writes go on");
                self.thaw(word, &mut state);
                return;
            }
            state = self.doze(state);
        }
    }

    fn thaw(&self, word: &AtomicU64, state: &mut FreezeState) {
        state.until = None;
        word.fetch_and(!FROZEN, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Lets no write in any more and waits until none is in flight. `false` if that takes longer than `limit`; the
    /// gate stays closed.
    pub(crate) fn close(&self, word: &AtomicU64, clock: &dyn Clock, limit: Duration) -> bool {
        let until = clock.monotonic().plus(limit);
        word.fetch_or(CLOSED, Ordering::SeqCst);
        let mut state = self.lock();
        while !self.drained() {
            if clock.monotonic() >= until {
                return false;
            }
            state = self.doze(state);
        }
        true
    }

    /// Stops new writes and waits until none is in flight; the ticket of this freeze.
    fn freeze(&self, word: &AtomicU64, clock: &dyn Clock, limit: Duration) -> Result<u64, FreezeError> {
        let mut state = self.lock();
        let now = Word(word.load(Ordering::SeqCst));
        if now.is_closed() {
            return Err(FreezeError::Closed);
        }
        if now.is_frozen() {
            return Err(FreezeError::AlreadyFrozen);
        }
        let until = clock.monotonic().plus(limit);
        state.ticket += 1;
        state.until = Some(until);
        word.fetch_or(FROZEN, Ordering::SeqCst);
        let ticket = state.ticket;
        while !self.drained() {
            let expired = clock.monotonic() >= until;
            if expired {
                self.end(word, &mut state, ticket);
            }
            if expired || !Self::holds(word, &state, ticket) {
                return Err(FreezeError::TimedOut(limit));
            }
            state = self.doze(state);
        }
        Ok(ticket)
    }

    fn holds(word: &AtomicU64, state: &FreezeState, ticket: u64) -> bool {
        state.ticket == ticket && state.until.is_some() && Word(word.load(Ordering::SeqCst)).is_frozen()
    }

    fn end(&self, word: &AtomicU64, state: &mut FreezeState, ticket: u64) {
        if Self::holds(word, state, ticket) {
            self.thaw(word, state);
        }
    }
}

/// Rewrites epoch and mode of the word and nothing else.
pub(crate) fn open_epoch(word: &AtomicU64, epoch: Epoch, mode: Mode) {
    let track = if mode == Mode::Track { TRACK } else { 0 };
    let kept = FROZEN | CLOSED;
    let change = |old| Some(old & kept | u64::from(epoch.0) << EPOCH_SHIFT | track);
    word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, change).expect("the change is never refused");
}

/// Switches the current epoch to track mode.
pub(crate) fn stop_streaming(word: &AtomicU64) {
    word.fetch_or(TRACK, Ordering::SeqCst);
}

/// All disks at rest: no write in flight, everything flushed, new writes waiting. Dropping it lets them go on; so does
/// the time-out, after which [`Frozen::holds`] is `false`.
pub struct Frozen {
    shared: Arc<Shared>,
    ticket: u64,
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frozen").field("holds", &self.holds()).finish()
    }
}

impl Frozen {
    pub(crate) fn new(shared: &Arc<Shared>, limit: Duration) -> Result<Frozen, FreezeError> {
        // Most of the flushing is done while writes go on, so that they wait for little.
        shared.flush_all().map_err(FreezeError::Flush)?;
        let ticket = shared.gate.freeze(shared.word(), &*shared.clock, limit)?;
        let frozen = Frozen { shared: shared.clone(), ticket };
        shared.flush_all().map_err(FreezeError::Flush)?;
        if frozen.holds() { Ok(frozen) } else { Err(FreezeError::TimedOut(limit)) }
    }

    /// Whether no write was let through since the disks came to rest.
    pub fn holds(&self) -> bool {
        Gate::holds(self.shared.word(), &self.shared.gate.lock(), self.ticket)
    }

    /// Puts a marker into the ring at the position of rest. `false` if the freeze has timed out, the stream is
    /// broken, or the ring has no room: then the marker would promise what is not so.
    pub fn mark(&self, kind: MarkerKind, name: &str) -> bool {
        // The lock is held across: a waiter that finds the time-out passed thaws only after the marker is in.
        let state = self.shared.gate.lock();
        Gate::holds(self.shared.word(), &state, self.ticket) && self.shared.mark(kind, name)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut state = self.shared.gate.lock();
        self.shared.gate.end(self.shared.word(), &mut state, self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32};
    use world::SystemClock;

    #[test]
    fn nobody_enters_under_an_epoch_that_was_seen_idle() {
        let (gate, word) = (Gate::default(), AtomicU64::new(Word::opening(Epoch(1)).0));
        // Epochs below this one were seen idle after a newer one had opened.
        let settled = AtomicU32::new(1);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        let entered = gate.enter(&word, &SystemClock).expect("never closed");
                        let stale = entered.epoch().0 < settled.load(Ordering::SeqCst);
                        gate.leave(&word, Slot::of(entered.epoch()));
                        if stale {
                            stop.store(true, Ordering::SeqCst);
                            panic!("entered under a settled epoch");
                        }
                    }
                });
            }
            let mut epoch = Epoch(1);
            for _ in 0..200_000 {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let older = Slot::of(epoch);
                epoch = epoch.next();
                open_epoch(&word, epoch, Mode::Stream);
                while !gate.is_idle(older) {
                    std::hint::spin_loop();
                }
                settled.store(epoch.0, Ordering::SeqCst);
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}
