//! The task that moves an open connection's bytes between the socket and the two queues.
//!
//! Reading and writing are two loops of one task: a full incoming queue stops reading but never writing, and a full
//! socket stops writing but never reading, so two peers that press on each other cannot block each other for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use crate::connector::LinkRuntime;
use crate::error::LinkError;
use crate::frame::Frame;
use crate::identity::PeerIdentity;
use crate::limits::{
    CLOSE_TIMEOUT, DENIAL_CHECK, FRAME_BYTES_MAX, IDLE_TIMEOUT, INCOMING_BYTES_MAX, INCOMING_FRAMES_MAX, KEEP_ALIVE,
    OUTGOING_BYTES_MAX, OUTGOING_FRAMES_MAX, RESERVED_KIND_FIRST,
};
use crate::queue::{Capacity, Popped, Queue};
use crate::session::TlsSocket;
use crate::trust::Trust;

/// A sign of life; the receiver drops it.
const KIND_ALIVE: u8 = RESERVED_KIND_FIRST;
/// The server's first frame: the client's certificate was accepted and a place is free.
pub(crate) const KIND_WELCOME: u8 = RESERVED_KIND_FIRST + 1;
/// The server's only frame: one byte that says why not.
pub(crate) const KIND_TURNED_AWAY: u8 = RESERVED_KIND_FIRST + 2;

/// An open connection, shared between its task and its handle.
pub(crate) struct Shared {
    pub(crate) socket: TlsSocket,
    pub(crate) peer: PeerIdentity,
    pub(crate) outgoing: Queue<Frame>,
    pub(crate) incoming: Queue<Frame>,
    trust: Trust,
    aborted: Notify,
    socket_has_more: Notify,
    /// This side said farewell: what arrives is dropped.
    closing: AtomicBool,
    /// Everything sent was written, farewell included.
    farewell_said: AtomicBool,
    end: Mutex<Option<LinkError>>,
    ended: Condvar,
}

/// Starts the task of a connection whose handshake and welcome are done.
pub(crate) fn start(runtime: &LinkRuntime, socket: TlsSocket, peer: PeerIdentity, trust: Trust) -> Arc<Shared> {
    socket.set_frame_max(FRAME_BYTES_MAX);
    let shared = Arc::new(Shared {
        socket,
        peer,
        outgoing: Queue::new(Capacity { items: OUTGOING_FRAMES_MAX, weight: OUTGOING_BYTES_MAX }),
        incoming: Queue::new(Capacity { items: INCOMING_FRAMES_MAX, weight: INCOMING_BYTES_MAX }),
        trust,
        aborted: Notify::new(),
        socket_has_more: Notify::new(),
        closing: AtomicBool::new(false),
        farewell_said: AtomicBool::new(false),
        end: Mutex::new(None),
        ended: Condvar::new(),
    });
    runtime.spawn(drive(Finish(shared.clone())));
    shared
}

/// Ends the connection for its threads whichever way its task ends, also when the runtime drops it.
struct Finish(Arc<Shared>);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish(LinkError::Closed);
        // The handle keeps the socket's memory; the peer must not wait until that is dropped.
        self.0.socket.hang_up();
    }
}

async fn drive(finish: Finish) {
    let shared = &*finish.0;
    let cause = tokio::select! {
        cause = shared.read() => cause,
        cause = shared.write() => cause,
        cause = shared.watch() => cause,
        () = shared.aborted.notified() => LinkError::Closed,
    };
    // Threads learn the cause first; the peer's last words may take a second.
    let polite = !matches!(cause, LinkError::Closed | LinkError::Lost { .. } | LinkError::Idle { .. });
    shared.finish(cause);
    if polite {
        shared.socket.farewell().await;
    }
}

impl Shared {
    /// Why the connection ended, if it did.
    pub(crate) fn cause(&self) -> Option<LinkError> {
        self.end().clone()
    }

    /// Ends the connection at once, without a farewell.
    pub(crate) fn abort(&self) {
        self.aborted.notify_one();
    }

    /// Sends what is queued, says farewell and waits until the peer has taken it.
    pub(crate) fn close(&self, timeout: Duration) -> Result<(), LinkError> {
        self.closing.store(true, Ordering::Release);
        self.outgoing.close();
        // Wakes the reader if it waits for room: the farewell of the peer comes after what nobody will take.
        self.incoming.discard();
        let (end, _) = self
            .ended
            .wait_timeout_while(self.end(), timeout, |end| end.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match &*end {
            Some(LinkError::PeerClosed) if self.farewell_said.load(Ordering::Acquire) => Ok(()),
            Some(cause) => Err(cause.clone()),
            None => {
                drop(end);
                self.abort();
                Err(LinkError::TimedOut { what: "closing the connection", seconds: timeout.as_secs() })
            }
        }
    }

    fn finish(&self, cause: LinkError) {
        let mut end = self.end();
        if end.is_none() {
            tracing::debug!(peer = %self.peer, address = self.socket.address(), %cause, "link ended");
            *end = Some(cause);
        }
        drop(end);
        self.outgoing.discard();
        self.incoming.close();
        self.ended.notify_all();
    }

    fn end(&self) -> MutexGuard<'_, Option<LinkError>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self) -> LinkError {
        loop {
            match self.read_stride().await {
                Ok(()) => tokio::task::consume_budget().await,
                Err(cause) => return cause,
            }
        }
    }

    async fn read_stride(&self) -> Result<(), LinkError> {
        // The welcome may have brought frames along, so what is ready comes before what is read.
        while let Some(frame) = self.socket.next_ready() {
            match frame.kind() {
                KIND_ALIVE => {}
                kind if kind >= RESERVED_KIND_FIRST => {
                    return Err(LinkError::ProtocolViolation(format!("frame kind {kind:#04x} is reserved")));
                }
                _ if self.closing.load(Ordering::Acquire) => {}
                _ => {
                    let weight = frame.len();
                    // Closed on this side while waiting: the frame is dropped as any other then.
                    let _ = self.incoming.push(frame, weight).await;
                }
            }
        }
        if self.socket.peer_closed() {
            return Err(LinkError::PeerClosed);
        }
        // Only waiting for the socket counts as silence; waiting for our own threads does not.
        while self.socket.try_fill()?.is_none() {
            tokio::time::timeout(IDLE_TIMEOUT, self.socket.readable())
                .await
                .map_err(|_| LinkError::Idle { seconds: IDLE_TIMEOUT.as_secs() })??;
        }
        self.socket.advance()?;
        if self.socket.wants_flush() {
            self.socket_has_more.notify_one();
        }
        Ok(())
    }

    async fn write(&self) -> LinkError {
        loop {
            match self.write_stride().await {
                Ok(Wrote::Something) => tokio::task::consume_budget().await,
                Ok(Wrote::Farewell) => {
                    // The reader ends the connection when the peer has answered.
                    tokio::time::sleep(CLOSE_TIMEOUT).await;
                    return LinkError::TimedOut { what: "the peer's farewell", seconds: CLOSE_TIMEOUT.as_secs() };
                }
                Err(cause) => return cause,
            }
        }
    }

    async fn write_stride(&self) -> Result<Wrote, LinkError> {
        self.socket.flush().await?;
        let mut first = None;
        if !self.socket.is_within_frame() {
            match self.next_outgoing().await {
                Next::Frame(frame) => first = Some(frame),
                Next::Flush => return Ok(Wrote::Something),
                Next::End => {
                    self.socket.close_writing().await?;
                    self.farewell_said.store(true, Ordering::Release);
                    return Ok(Wrote::Farewell);
                }
            }
        }
        self.socket.encrypt_stride(|| {
            first.take().or_else(|| match self.outgoing.try_pop() {
                Popped::Item(frame) => Some(frame),
                Popped::Nothing | Popped::Closed => None,
            })
        })?;
        self.socket.flush().await?;
        Ok(Wrote::Something)
    }

    async fn next_outgoing(&self) -> Next {
        match self.outgoing.try_pop() {
            Popped::Item(frame) => return Next::Frame(frame),
            Popped::Closed => return Next::End,
            Popped::Nothing => {}
        }
        tokio::select! {
            frame = self.outgoing.pop() => frame.map_or(Next::End, Next::Frame),
            () = self.socket_has_more.notified() => Next::Flush,
            () = tokio::time::sleep(KEEP_ALIVE) => Next::Frame(Frame::new(KIND_ALIVE, Bytes::new())),
        }
    }

    /// Ends the connection when its peer is removed.
    async fn watch(&self) -> LinkError {
        while !self.trust.denied().contains(&self.peer) {
            tokio::time::sleep(DENIAL_CHECK).await;
        }
        LinkError::Denied
    }
}

enum Next {
    Frame(Frame),
    /// The session itself wants to write.
    Flush,
    /// This side closes and everything was taken.
    End,
}

enum Wrote {
    Something,
    Farewell,
}
