//! The bounded queue between threads, which block, and the runtime's tasks, which wait asynchronously.
//!
//! Bounded by items and by weight (bytes). Any number of threads may use the blocking side; at most one task waits for
//! items and at most one for room, which is what one connection needs and what a stored wake-up is enough for.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

/// What a queue may hold. Whatever its weight, one item always fits an empty queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capacity {
    pub(crate) items: usize,
    pub(crate) weight: usize,
}

/// Why an item was not taken. It is given back.
pub(crate) enum PushError<T> {
    Full(T),
    Closed,
}

/// What waiting for an item gave.
#[derive(Debug)]
pub(crate) enum Popped<T> {
    Item(T),
    Nothing,
    /// Closed and empty: nothing will ever come.
    Closed,
}

/// Called whenever there is something to look at: an item, or the end. It must not block, nor use the queue.
pub(crate) type Bell = Arc<dyn Fn() + Send + Sync>;

pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    capacity: Capacity,
    thread_may_pop: Condvar,
    thread_may_push: Condvar,
    task_may_pop: Notify,
    task_may_push: Notify,
}

struct State<T> {
    items: VecDeque<(T, usize)>,
    weight: usize,
    closed: bool,
    /// Threads that are blocked. Waking nobody is a system call as well, which small frames would notice.
    popping: usize,
    pushing: usize,
    bell: Option<Bell>,
}

impl<T> Queue<T> {
    pub(crate) fn new(capacity: Capacity) -> Queue<T> {
        Queue {
            state: Mutex::new(State {
                items: VecDeque::new(),
                weight: 0,
                closed: false,
                popping: 0,
                pushing: 0,
                bell: None,
            }),
            capacity,
            thread_may_pop: Condvar::new(),
            thread_may_push: Condvar::new(),
            task_may_pop: Notify::new(),
            task_may_push: Notify::new(),
        }
    }

    /// Has `bell` rung for every item from now on and when the queue is closed; at once if there is something already.
    pub(crate) fn ring_with(&self, bell: Bell) {
        let mut state = self.lock();
        if !state.items.is_empty() || state.closed {
            bell();
        }
        state.bell = Some(bell);
    }

    /// Adds without waiting.
    pub(crate) fn try_push(&self, item: T, weight: usize) -> Result<(), PushError<T>> {
        self.push_locked(&mut self.lock(), item, weight)
    }

    /// Adds; blocks the thread while there is no room. `Err` when closed.
    pub(crate) fn push_blocking(&self, item: T, weight: usize) -> Result<(), ()> {
        let mut state = self.lock();
        let mut item = item;
        loop {
            match self.push_locked(&mut state, item, weight) {
                Ok(()) => return Ok(()),
                Err(PushError::Closed) => return Err(()),
                Err(PushError::Full(back)) => item = back,
            }
            state.pushing += 1;
            state = self.thread_may_push.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.pushing -= 1;
        }
    }

    /// Adds; waits while there is no room. `Err` when closed. Cancelling loses the item.
    pub(crate) async fn push(&self, item: T, weight: usize) -> Result<(), ()> {
        let mut item = item;
        loop {
            match self.try_push(item, weight) {
                Ok(()) => return Ok(()),
                Err(PushError::Closed) => return Err(()),
                Err(PushError::Full(back)) => item = back,
            }
            self.task_may_push.notified().await;
        }
    }

    /// Takes without waiting.
    pub(crate) fn try_pop(&self) -> Popped<T> {
        self.pop_locked(&mut self.lock())
    }

    /// Takes; blocks the thread for up to `timeout`.
    pub(crate) fn pop_blocking(&self, timeout: Duration) -> Popped<T> {
        let mut state = self.lock();
        state.popping += 1;
        let wait = |state: &mut State<T>| state.items.is_empty() && !state.closed;
        (state, _) =
            self.thread_may_pop.wait_timeout_while(state, timeout, wait).unwrap_or_else(PoisonError::into_inner);
        state.popping -= 1;
        self.pop_locked(&mut state)
    }

    /// Takes; waits for an item. `None` when closed and empty. Cancelling loses nothing.
    pub(crate) async fn pop(&self) -> Option<T> {
        loop {
            match self.try_pop() {
                Popped::Item(item) => return Some(item),
                Popped::Closed => return None,
                Popped::Nothing => self.task_may_pop.notified().await,
            }
        }
    }

    /// Whether an item of no weight would fit now.
    pub(crate) fn has_room(&self) -> bool {
        let state = self.lock();
        !state.closed && state.items.len() < self.capacity.items
    }

    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().items.is_empty()
    }

    /// Takes nothing more; what is held can still be taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake_all();
    }

    /// Takes nothing more and forgets what is held.
    pub(crate) fn discard(&self) {
        let items = {
            let mut state = self.lock();
            state.closed = true;
            state.weight = 0;
            std::mem::take(&mut state.items)
        };
        drop(items);
        self.wake_all();
    }

    fn push_locked(&self, state: &mut State<T>, item: T, weight: usize) -> Result<(), PushError<T>> {
        if state.closed {
            return Err(PushError::Closed);
        }
        let full = state.items.len() >= self.capacity.items || state.weight + weight > self.capacity.weight;
        if full && !state.items.is_empty() {
            return Err(PushError::Full(item));
        }
        state.weight += weight;
        state.items.push_back((item, weight));
        if state.popping > 0 {
            self.thread_may_pop.notify_one();
        }
        if let Some(bell) = &state.bell {
            bell();
        }
        self.task_may_pop.notify_one();
        Ok(())
    }

    fn pop_locked(&self, state: &mut State<T>) -> Popped<T> {
        match state.items.pop_front() {
            Some((item, weight)) => {
                state.weight -= weight;
                // All: the first of several blocked threads may hold an item that still does not fit.
                if state.pushing > 0 {
                    self.thread_may_push.notify_all();
                }
                self.task_may_push.notify_one();
                Popped::Item(item)
            }
            None if state.closed => Popped::Closed,
            None => Popped::Nothing,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        if let Some(bell) = &self.lock().bell {
            bell();
        }
        self.thread_may_pop.notify_all();
        self.thread_may_push.notify_all();
        self.task_may_pop.notify_one();
        self.task_may_push.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_but_one_item_always_fits() {
        let queue = Queue::new(Capacity { items: 2, weight: 10 });
        assert!(queue.try_push("large", 99).is_ok());
        assert!(matches!(queue.try_push("more", 1), Err(PushError::Full("more"))));
        assert!(matches!(queue.try_pop(), Popped::Item("large")));
        assert!(queue.try_push("a", 5).is_ok() && queue.try_push("b", 5).is_ok());
        assert!(matches!(queue.try_push("c", 0), Err(PushError::Full("c"))), "two items at most");
        queue.close();
        assert!(matches!(queue.try_push("d", 0), Err(PushError::Closed)));
        assert!(matches!(queue.pop_blocking(Duration::ZERO), Popped::Item("a")), "what is held stays");
        queue.discard();
        assert!(matches!(queue.pop_blocking(Duration::from_secs(60)), Popped::Closed));
    }

    #[test]
    fn the_bell_rings_for_items_and_for_the_end() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let rung = Arc::new(AtomicU32::new(0));
        let queue = Queue::new(Capacity { items: 2, weight: 10 });
        assert!(queue.try_push(1, 1).is_ok());
        let counter = rung.clone();
        queue.ring_with(Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
        }));
        assert_eq!(rung.load(Ordering::SeqCst), 1, "something was there");
        assert!(queue.try_push(2, 1).is_ok());
        assert!(queue.try_push(3, 1).is_err(), "no room");
        assert_eq!(rung.load(Ordering::SeqCst), 2);
        queue.close();
        assert_eq!(rung.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn closing_wakes_blocked_threads() {
        let queue = Queue::new(Capacity { items: 1, weight: 1 });
        queue.push_blocking(1, 1).expect("room");
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| queue.push_blocking(2, 1));
            queue.close();
            assert_eq!(blocked.join().expect("no panic"), Err(()));
        });
    }
}
