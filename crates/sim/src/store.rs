//! The vault's store in the simulated world: refuses, loses answers, and holds garbage that somebody put there.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use vault::{ObjectName, Store, StoreError};

use crate::planted::Bug;
use crate::rng::Rng;

/// How often the store misbehaves, in a thousand creates.
#[derive(Debug, Clone, Copy, Default)]
pub struct StoreFaults {
    /// Nothing is stored.
    pub refused: u64,
    /// It is stored, and the answer is an error.
    pub answer_lost: u64,
}

/// What happened so far.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Creates refused.
    pub refused: u64,
    /// Answers lost.
    pub answers_lost: u64,
    /// Names found taken.
    pub taken: u64,
}

#[derive(Debug, Default)]
struct StoreTally {
    refused: AtomicU64,
    answers_lost: AtomicU64,
    taken: AtomicU64,
}

/// See the module's documentation.
pub struct SimStore {
    inner: Arc<dyn Store>,
    state: Mutex<(Rng, StoreFaults)>,
    tally: StoreTally,
    bug: Option<Bug>,
}

impl SimStore {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Store>, rng: Rng, bug: Option<Bug>) -> SimStore {
        SimStore { inner, state: Mutex::new((rng, StoreFaults::default())), tally: StoreTally::default(), bug }
    }

    /// Sets how often it misbehaves from now on.
    pub fn set_faults(&self, faults: StoreFaults) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = faults;
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let StoreTally { refused, answers_lost, taken } = &self.tally;
        Counts { refused: read(refused), answers_lost: read(answers_lost), taken: read(taken) }
    }

    fn unavailable(name: &ObjectName) -> StoreError {
        StoreError::Unavailable { at: name.to_string(), source: "injected".into() }
    }
}

impl Store for SimStore {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        let (refused, lost) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let faults = state.1;
            let draw = state.0.below(1000);
            (draw < faults.refused, draw >= faults.refused && draw < faults.refused + faults.answer_lost)
        };
        if refused {
            self.tally.refused.fetch_add(1, Ordering::Relaxed);
            return Err(SimStore::unavailable(name));
        }
        let result = self.inner.create(name, parts);
        if let Err(StoreError::AlreadyExists(_)) = &result {
            self.tally.taken.fetch_add(1, Ordering::Relaxed);
            if self.bug == Some(Bug::LostNameTakenForWon) {
                return Ok(());
            }
        }
        if lost && result.is_ok() {
            self.tally.answers_lost.fetch_add(1, Ordering::Relaxed);
            return Err(SimStore::unavailable(name));
        }
        result
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.read(name, range)
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        self.inner.read_all(name)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
