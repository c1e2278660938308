//! One failback a machine: who brings it home now, and how a newer link of the same one takes over.
//!
//! A recovery host that lost its power leaves a link that looks alive for a while. When it comes again, its old session
//! must let go of the disks at once instead of having the new one refused.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use replication::{ChainId, MachineId};

use crate::home_disk::Refusal;

type Taken = BTreeMap<MachineId, (ChainId, Arc<AtomicBool>)>;

/// The sessions of a master target, by machine. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Seats(Arc<Mutex<Taken>>);

/// A session's place. Given up when dropped.
pub(crate) struct Seat {
    seats: Seats,
    machine: MachineId,
    leave: Arc<AtomicBool>,
}

impl Seats {
    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for the failback of `chain`. `None` while an earlier session of the same failback has it, which is told to
    /// leave.
    ///
    /// # Errors
    /// Another branch of the machine comes home.
    pub(crate) fn take(&self, machine: MachineId, chain: ChainId) -> Result<Option<Seat>, Refusal> {
        let mut taken = self.taken();
        if let Some((other, leave)) = taken.get(&machine) {
            if *other != chain {
                return Err(Refusal::new(
                    format!("another branch of this machine is being brought home already: chain {other}"),
                    "two senders would contradict each other",
                    "let that failback end, or cancel it first",
                ));
            }
            leave.store(true, Ordering::SeqCst);
            return Ok(None);
        }
        let leave = Arc::new(AtomicBool::new(false));
        taken.insert(machine, (chain, Arc::clone(&leave)));
        Ok(Some(Seat { seats: self.clone(), machine, leave }))
    }
}

impl Seat {
    /// Whether a newer session waits for this one to end.
    pub(crate) fn must_leave(&self) -> bool {
        self.leave.load(Ordering::Relaxed)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken().remove(&self.machine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: MachineId = MachineId([1; 16]);

    #[test]
    fn a_newer_session_of_the_same_failback_takes_over_and_another_branch_does_not() {
        let seats = Seats::default();
        let take = |machine, chain| seats.take(machine, ChainId([chain; 16]));
        let first = take(MACHINE, 1).expect("the same failback").expect("free");
        let _elsewhere = take(MachineId([2; 16]), 3).expect("another machine").expect("free");
        let refusal = take(MACHINE, 2).err().expect("another branch");
        assert!(refusal.what.contains(&ChainId([1; 16]).to_string()), "{refusal}");
        assert!(!first.must_leave(), "a refused one disturbs nobody");
        assert!(take(MACHINE, 1).expect("the same failback").is_none(), "not before the first has left");
        assert!(first.must_leave());
        drop(first);
        let second = take(MACHINE, 1).expect("the same failback").expect("the first one left");
        assert!(!second.must_leave());
        drop(second);
        assert!(take(MACHINE, 2).expect("another branch").is_some(), "free again");
    }
}
