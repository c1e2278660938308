//! The master target's door: who may order a failback over the network, and what the others are told.
//!
//! Only a recovery host may. An agent that was taken over cannot have disks written, and a recovery host cannot stream as
//! an agent: a server sends each to its own door by the role in its certificate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use link::{Connection, FrameLink, PeerIdentity, Role};

use crate::home_disk::Refusal;
use crate::home_wire::HomeMessage;
use crate::limits;
use crate::master_target::{HomeError, MasterTarget, Served};

/// Takes failbacks of recovery hosts for a [`MasterTarget`], or says that there is none.
pub struct HomeReception {
    target: Option<MasterTarget>,
    stop: AtomicBool,
    sessions: Mutex<usize>,
    ended: Condvar,
}

impl HomeReception {
    /// A door to `target`; without one every order is refused.
    pub fn new(target: Option<MasterTarget>) -> HomeReception {
        HomeReception { target, stop: AtomicBool::new(false), sessions: Mutex::new(0), ended: Condvar::new() }
    }

    /// The master target.
    pub fn target(&self) -> Option<&MasterTarget> {
        self.target.as_ref()
    }

    /// Serves one peer that is no agent, until its session ends.
    pub fn serve(&self, peer: PeerIdentity, connection: &Connection) {
        *self.sessions() += 1;
        self.converse(peer, connection);
        // A refusal is worth waiting for; that the peer has gone already is no matter.
        let _ = connection.close(limits::FAREWELL_WAIT);
        *self.sessions() -= 1;
        self.ended.notify_all();
    }

    /// Ends every session where it is. Their disks are not usable until the failback is ordered again.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let waited = self.ended.wait_timeout_while(self.sessions(), limits::SEAT_WAIT, |sessions| *sessions > 0);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 > 0 {
            tracing::warn!("a failback did not end in time; its disks are not usable");
        }
    }

    fn sessions(&self) -> MutexGuard<'_, usize> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn converse(&self, peer: PeerIdentity, connection: &Connection) {
        let address = connection.address();
        let refuse = |refusal: Refusal| {
            tracing::warn!(%peer, address, refusal = refusal.what, "a peer was turned away");
            // It may have gone already.
            let _ = connection.send(HomeMessage::Refused { refusal }.frame());
        };
        if peer.role != Role::RecoveryHost {
            return refuse(Refusal::new(
                format!("this peer may not order a failback: its certificate is that of another role ({})", peer.role),
                "only a recovery host's certificate allows it",
                "join with a token of `farshore token new --role recovery-host`",
            ));
        }
        let Some(target) = &self.target else {
            return refuse(Refusal::new(
                "this server runs no master target",
                "nothing there would write to a disk",
                "set `enabled` and `disks` in [master_target] of its configuration, and restart it",
            ));
        };
        tracing::info!(%peer, address, "a recovery host connected");
        match target.serve(connection, &self.stop) {
            Ok(Served::Completed) => {}
            Ok(Served::Stopped) => tracing::info!(%peer, "a failback was stopped; its home disks are not usable"),
            Err(HomeError::Replaced) => tracing::info!(%peer, "a newer link of the same failback took over"),
            Err(HomeError::Refused(refusal)) => tracing::warn!(%peer, %refusal, "a failback was refused"),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(%peer, error, "a failback was interrupted; its home disks are not usable");
            }
        }
    }
}
