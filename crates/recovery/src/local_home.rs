//! A master target in the same process: for home disks of this very host, and for tests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use link::{FrameLink, MemoryLink};

use crate::failback::{HomeLine, LineError};
use crate::home_disk::Refusal;
use crate::master_target::MasterTarget;

/// Frames that one direction of the link holds.
const LINK_FRAMES: usize = 256;
/// Bytes that one direction of the link holds.
const LINK_BYTES: usize = 16 << 20;

/// Connects to a [`MasterTarget`] that runs on a thread of this process, one session at a time.
pub struct LocalHome {
    target: Arc<MasterTarget>,
    session: Arc<Mutex<Option<Session>>>,
}

struct Session {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Ends the running session from outside, as a kill of the master target would.
#[derive(Clone)]
pub struct LocalKill(Arc<Mutex<Option<Session>>>);

impl LocalKill {
    /// Ends the session where it is; whether one ran.
    pub fn kill(&self) -> bool {
        let session = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        session.map(end).is_some()
    }
}

fn end(session: Session) {
    session.stop.store(true, Ordering::SeqCst);
    drop(session.thread.join());
}

impl LocalHome {
    /// A line to `target`.
    pub fn new(target: Arc<MasterTarget>) -> LocalHome {
        LocalHome { target, session: Arc::default() }
    }

    /// A handle that ends sessions.
    pub fn killer(&self) -> LocalKill {
        LocalKill(Arc::clone(&self.session))
    }
}

impl HomeLine for LocalHome {
    fn connect(&mut self) -> Result<Arc<dyn FrameLink>, LineError> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        // The one before holds the disks; its link is closed, so it ends by itself.
        if let Some(before) = session.take() {
            end(before);
        }
        let (ours, theirs) = MemoryLink::pair(LINK_FRAMES, LINK_BYTES);
        let stop = Arc::new(AtomicBool::new(false));
        let (target, stopping) = (Arc::clone(&self.target), Arc::clone(&stop));
        let serve = move || {
            if let Err(error) = target.serve(&theirs, &stopping) {
                tracing::info!(%error, "a session of the master target ended");
            }
        };
        let thread = std::thread::Builder::new().name("master-target".into()).spawn(serve);
        let no_thread = |error: std::io::Error| {
            LineError::NotNow(Refusal::new(format!("no thread: {error}"), "nothing can be written", "try again"))
        };
        *session = Some(Session { stop, thread: thread.map_err(no_thread)? });
        Ok(Arc::new(ours))
    }
}

impl Drop for LocalHome {
    fn drop(&mut self) {
        if let Some(session) = self.session.lock().unwrap_or_else(PoisonError::into_inner).take() {
            end(session);
        }
    }
}
