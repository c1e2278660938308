//! The memory that the large requests of all connections of a server take together.
//!
//! Held from before a request's data is received or read until its reply was sent. Whoever finds no room waits; waiters
//! are served in the order of their coming, so that a large request is not passed by small ones for ever. A connection
//! that waits here holds nothing that another one waits for.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Memory {
    bytes_max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: usize,
    /// The number of the next one that comes, and of the next one that is served.
    next: u64,
    served: u64,
}

/// Some of the memory; given back when dropped.
#[derive(Debug)]
pub(crate) struct Held {
    memory: Arc<Memory>,
    bytes: usize,
}

impl Memory {
    pub(crate) fn new(bytes_max: usize) -> Arc<Memory> {
        Arc::new(Memory { bytes_max, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Waits until `bytes` more fit. More than there is at all fit when nothing else is held.
    pub(crate) fn hold(self: &Arc<Memory>, bytes: usize) -> Held {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        let fits = |state: &State| state.held == 0 || state.held.saturating_add(bytes) <= self.bytes_max;
        while state.served != number || !fits(&state) {
            state = self.changed.wait(state).expect("nothing panics while holding the count");
        }
        state.served += 1;
        state.held += bytes;
        drop(state);
        self.changed.notify_all();
        Held { memory: Arc::clone(self), bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while holding the count")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.lock().held -= self.bytes;
        self.memory.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn no_more_is_held_than_there_is_and_everyone_is_served() {
        let memory = Memory::new(100);
        let (held, most, served) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (memory, held, most, served) = (&memory, &held, &most, &served);
                scope.spawn(move || {
                    for round in 0..200 {
                        let bytes = 1 + (thread * 37 + round * 11) % 100;
                        let _held = memory.hold(bytes);
                        let now = held.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        most.fetch_max(now, Ordering::SeqCst);
                        served.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        held.fetch_sub(bytes, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(served.into_inner(), 8 * 200);
        assert!((50..=100).contains(&most.into_inner()));
        // Larger than all there is, but alone.
        drop(memory.hold(1000));
        assert_eq!(memory.lock().held, 0);
    }
}
