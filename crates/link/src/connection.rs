//! An open, authenticated connection, used by threads.

use std::sync::Arc;
use std::time::Duration;

use crate::connector::LinkRuntime;
use crate::driver::Shared;
use crate::error::LinkError;
use crate::frame::{Frame, FrameLink, TrySend};
use crate::identity::PeerIdentity;
use crate::queue::{Popped, PushError};

/// A connection to an authenticated peer. Any number of threads may send and receive at the same time.
///
/// Dropping it ends it at once, as a crash would: frames not yet written are lost and the peer sees a lost
/// connection. [`Connection::close`] ends it in order.
pub struct Connection {
    shared: Arc<Shared>,
    /// Keeps the threads alive that move the bytes.
    _runtime: LinkRuntime,
}

impl Connection {
    pub(crate) fn new(shared: Arc<Shared>, runtime: LinkRuntime) -> Connection {
        Connection { shared, _runtime: runtime }
    }

    /// Who the peer is, as its certificate says.
    pub fn peer(&self) -> PeerIdentity {
        self.shared.peer
    }

    /// The peer's network address, for messages.
    pub fn address(&self) -> &str {
        self.shared.socket.address()
    }

    /// Sends every frame given before, says farewell, and returns when the peer's side of the link has taken all of
    /// it (which does not say that the peer's program has). Frames that still arrive are dropped.
    ///
    /// # Errors
    /// Something may not have arrived: [`LinkError::TimedOut`] after `timeout`, or why the connection ended.
    pub fn close(&self, timeout: Duration) -> Result<(), LinkError> {
        self.shared.close(timeout)
    }

    /// Has `bell` called whenever there is something for [`FrameLink::recv`], the end of the connection included; at once if
    /// there is already. It is called by the threads that move bytes: it must not block, nor use the connection.
    pub fn ring_with(&self, bell: Arc<dyn Fn() + Send + Sync>) {
        self.shared.incoming.ring_with(bell);
    }

    /// Why the connection ended, if it did.
    pub fn end(&self) -> Option<LinkError> {
        self.shared.cause()
    }

    /// Whether everything given to `send` has left the queue.
    pub fn is_drained(&self) -> bool {
        self.shared.outgoing.is_empty() && !self.shared.socket.is_within_frame() && !self.shared.socket.wants_flush()
    }

    fn cause(&self) -> LinkError {
        self.shared.cause().unwrap_or(LinkError::Closed)
    }
}

impl FrameLink for Connection {
    fn send(&self, frame: Frame) -> Result<(), LinkError> {
        frame.check()?;
        let weight = frame.len();
        self.shared.outgoing.push_blocking(frame, weight).map_err(|()| self.cause())
    }

    fn try_send(&self, frame: Frame) -> Result<TrySend, LinkError> {
        frame.check()?;
        let weight = frame.len();
        match self.shared.outgoing.try_push(frame, weight) {
            Ok(()) => Ok(TrySend::Sent),
            Err(PushError::Full(frame)) => Ok(TrySend::Full(frame)),
            Err(PushError::Closed) => Err(self.cause()),
        }
    }

    fn recv(&self, timeout: Duration) -> Result<Option<Frame>, LinkError> {
        match self.shared.incoming.pop_blocking(timeout) {
            Popped::Item(frame) => Ok(Some(frame)),
            Popped::Nothing => Ok(None),
            Popped::Closed => Err(self.cause()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.abort();
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("peer", &self.peer())
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}
