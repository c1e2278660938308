//! Serialises writes that overlap while in flight, so that the ring's order is the disk's order.
//!
//! Nobody promises an order for such writes, but the replica must not end up with the loser when the disk holds the
//! winner. First come, first served: a request waits for every overlapping one that came before it, so none starves
//! and, as waiting follows arrival, none deadlocks.

use std::sync::{Condvar, Mutex, PoisonError};

use replication::ByteRange;

/// The ranges of one disk that are being written.
#[derive(Default)]
pub(crate) struct Overlaps {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    next_ticket: u64,
    /// In order of arrival. Short: as many as the device has requests in flight.
    present: Vec<(u64, ByteRange)>,
    waiting: usize,
}

/// The right to write a range, until dropped.
pub(crate) struct Turn<'a> {
    overlaps: &'a Overlaps,
    ticket: u64,
}

impl Overlaps {
    /// Waits until no earlier request overlaps `range`.
    pub(crate) fn enter(&self, range: ByteRange) -> Turn<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.present.push((ticket, range));
        while state.present.iter().any(|&(other, held)| other < ticket && held.overlaps(range)) {
            state.waiting += 1;
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        Turn { overlaps: self, ticket }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.overlaps.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.present.retain(|&(ticket, _)| ticket != self.ticket);
        let wake = state.waiting > 0;
        drop(state);
        if wake {
            self.overlaps.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn no_two_overlapping_requests_are_inside_together() {
        let overlaps = Overlaps::default();
        let inside: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let (overlaps, inside) = (&overlaps, &inside);
                scope.spawn(move || {
                    for round in 0..2000u64 {
                        let start = (round * 7 + thread * 13) % 56;
                        let range = ByteRange::new(start, 1 + round % 8);
                        let turn = overlaps.enter(range);
                        for cell in range.start..range.end() {
                            assert_eq!(inside[cell as usize].fetch_add(1, Ordering::SeqCst), 0);
                        }
                        std::thread::yield_now();
                        for cell in range.start..range.end() {
                            inside[cell as usize].fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(turn);
                    }
                });
            }
        });
        assert!(overlaps.state.lock().expect("not poisoned").present.is_empty());
    }
}
