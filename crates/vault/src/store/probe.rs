//! Does the store really refuse to overwrite? Asked at every start, because a gateway or a mount option can change
//! the answer behind our back, and every fence of the product rests on it.
//!
//! Leaves a few tiny objects under `probe/`: there is no way to delete.

use std::sync::Barrier;

use bytes::Bytes;
use world::Entropy;

use super::{ObjectName, Store, StoreError};
use crate::limits;

/// Tries to overwrite, first in sequence, then with several threads racing for the same name.
///
/// # Errors
/// [`StoreError::NotCreateOnly`] if anything was overwritten or two racers both won; other errors as they came.
pub fn probe_create_only(store: &dyn Store, entropy: &dyn Entropy) -> Result<(), StoreError> {
    probe_create_only_sequentially(store, entropy)?;
    for race in 0..limits::PROBE_RACES {
        let name = probe_name(entropy, race);
        let barrier = Barrier::new(limits::PROBE_RACERS);
        let results: Vec<Result<(), StoreError>> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..limits::PROBE_RACERS)
                .map(|racer| {
                    let (name, barrier) = (&name, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        store.create(name, &[content(racer)])
                    })
                })
                .collect();
            racers.into_iter().map(|racer| racer.join().expect("a create does not panic")).collect()
        });
        let mut winner = None;
        for (racer, result) in results.into_iter().enumerate() {
            match result {
                Ok(()) if winner.is_some() => {
                    return Err(StoreError::NotCreateOnly(format!("two racing creates of {name} both succeeded")));
                }
                Ok(()) => winner = Some(racer),
                Err(StoreError::AlreadyExists(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let winner =
            winner.ok_or_else(|| StoreError::NotCreateOnly(format!("every racing create of {name} was refused")))?;
        if store.read_all(&name)? != content(winner) {
            return Err(StoreError::NotCreateOnly(format!("{name} does not hold what its creator wrote")));
        }
    }
    Ok(())
}

/// The sequential half of [`probe_create_only`], for worlds without threads.
///
/// # Errors
/// As [`probe_create_only`].
pub fn probe_create_only_sequentially(store: &dyn Store, entropy: &dyn Entropy) -> Result<(), StoreError> {
    let name = probe_name(entropy, 0);
    store.create(&name, &[content(0)])?;
    match store.create(&name, &[content(1)]) {
        Err(StoreError::AlreadyExists(_)) => {}
        Ok(()) => return Err(StoreError::NotCreateOnly(format!("{name} was created twice"))),
        Err(error) => return Err(error),
    }
    if store.read_all(&name)? != content(0) {
        return Err(StoreError::NotCreateOnly(format!("{name} was overwritten although the store refused")));
    }
    Ok(())
}

fn probe_name(entropy: &dyn Entropy, race: usize) -> ObjectName {
    let unique = u128::from_le_bytes(entropy.bytes());
    ObjectName::new(format!("probe/{unique:032x}-{race}")).expect("hexadecimal digits make a name")
}

fn content(racer: usize) -> Bytes {
    Bytes::from(format!("Farshore create-only probe {racer}\n"))
}
