//! When an epoch can be read by nobody any more: a grace period after the word was changed.
//!
//! A program may have read the old word just before the change and still be about to mark or append. The kernel knows when
//! every program has ended that ran at a given moment (`membarrier`, which waits for an RCU grace period). That takes up
//! to some tens of milliseconds, so a thread of its own waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread;

use replication::Epoch;

use super::kernel;

/// Grace periods that wait at most; the engine asks for the next only after the last.
const WAITING_MAX: usize = 4;

/// The thread that waits. It ends when this is dropped.
pub(super) struct Grace {
    wanted: SyncSender<Epoch>,
    passed: Arc<AtomicU32>,
}

impl Grace {
    pub(super) fn start() -> io::Result<Grace> {
        let (wanted, asked) = mpsc::sync_channel::<Epoch>(WAITING_MAX);
        let passed = Arc::new(AtomicU32::new(0));
        let tell = passed.clone();
        let wait = move || {
            for epoch in asked {
                match kernel::wait_for_programs() {
                    Ok(()) => tell.store(epoch.0, Ordering::SeqCst),
                    // The epoch never settles: nothing is cleared or healed on a guess.
                    Err(error) => tracing::error!(%error, "the kernel does not tell when its programs have ended"),
                }
            }
        };
        thread::Builder::new().name("grace".to_owned()).spawn(wait)?;
        Ok(Grace { wanted, passed })
    }

    /// The word says `epoch` now: wait until nobody can act under an older one.
    pub(super) fn begin(&self, epoch: Epoch) {
        if self.wanted.try_send(epoch).is_err() {
            tracing::error!(epoch = epoch.0, "the thread that waits for the kernel's programs has ended");
        }
    }

    /// Whether nobody can act under an epoch older than `epoch`.
    pub(super) fn has_passed(&self, epoch: Epoch) -> bool {
        self.passed.load(Ordering::SeqCst) >= epoch.0
    }
}
