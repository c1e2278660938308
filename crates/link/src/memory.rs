//! A link inside one process, with the bounds and the failures of a real one but no thread, no socket and no clock of
//! its own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::LinkError;
use crate::frame::{Frame, FrameLink, TrySend};
use crate::queue::{Capacity, Popped, PushError, Queue};

/// What a call does when it cannot go on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// Blocks the calling thread, as a real link does.
    Blocks,
    /// Never: `send` fails with [`LinkError::Full`], `recv` returns `None` whatever its time-out.
    Never,
}

/// One end of a link inside this process. Dropping it is a farewell: the other end gets what was sent and then
/// [`LinkError::PeerClosed`].
pub struct MemoryLink {
    out: Arc<Way>,
    back: Arc<Way>,
    waiting: Waiting,
}

/// One direction.
struct Way {
    queue: Queue<Frame>,
    end: Mutex<Option<LinkError>>,
}

impl Way {
    fn new(capacity: Capacity) -> Arc<Way> {
        Arc::new(Way { queue: Queue::new(capacity), end: Mutex::new(None) })
    }

    fn end_with(&self, cause: LinkError) {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(cause);
        self.queue.close();
    }

    fn cause(&self) -> LinkError {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or(LinkError::Closed)
    }
}

impl MemoryLink {
    /// The two ends of a link that holds up to `frames` frames and `bytes` bytes in each direction, for use by
    /// several threads.
    pub fn pair(frames: usize, bytes: usize) -> (MemoryLink, MemoryLink) {
        MemoryLink::connected(frames, bytes, Waiting::Blocks)
    }

    /// The same for a simulation that runs in one thread: nothing ever waits. `send` on a full link fails with
    /// [`LinkError::Full`] and takes nothing; use [`FrameLink::try_send`].
    pub fn simulated_pair(frames: usize, bytes: usize) -> (MemoryLink, MemoryLink) {
        MemoryLink::connected(frames, bytes, Waiting::Never)
    }

    fn connected(frames: usize, bytes: usize, waiting: Waiting) -> (MemoryLink, MemoryLink) {
        let capacity = Capacity { items: frames, weight: bytes };
        let (a, b) = (Way::new(capacity), Way::new(capacity));
        (MemoryLink { out: a.clone(), back: b.clone(), waiting }, MemoryLink { out: b, back: a, waiting })
    }

    /// Breaks the link: both ends lose what is under way and fail with [`LinkError::Lost`].
    pub fn sever(&self) {
        for way in [&self.out, &self.back] {
            way.end_with(LinkError::lost(std::io::Error::from(std::io::ErrorKind::ConnectionReset)));
            way.queue.discard();
        }
    }
}

impl FrameLink for MemoryLink {
    fn send(&self, frame: Frame) -> Result<(), LinkError> {
        if self.waiting == Waiting::Never {
            return match self.try_send(frame)? {
                TrySend::Sent => Ok(()),
                TrySend::Full(_) => Err(LinkError::Full),
            };
        }
        frame.check()?;
        let weight = frame.len();
        self.out.queue.push_blocking(frame, weight).map_err(|()| self.out.cause())
    }

    fn try_send(&self, frame: Frame) -> Result<TrySend, LinkError> {
        frame.check()?;
        let weight = frame.len();
        match self.out.queue.try_push(frame, weight) {
            Ok(()) => Ok(TrySend::Sent),
            Err(PushError::Full(frame)) => Ok(TrySend::Full(frame)),
            Err(PushError::Closed) => Err(self.out.cause()),
        }
    }

    fn recv(&self, timeout: Duration) -> Result<Option<Frame>, LinkError> {
        let popped = match self.waiting {
            Waiting::Blocks => self.back.queue.pop_blocking(timeout),
            Waiting::Never => self.back.queue.try_pop(),
        };
        match popped {
            // As over a socket, a frame arrives in one piece whatever pieces it was sent in.
            Popped::Item(frame) => Ok(Some(Frame::new(frame.kind(), frame.into_body()))),
            Popped::Nothing => Ok(None),
            Popped::Closed => Err(self.back.cause()),
        }
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.out.end_with(LinkError::PeerClosed);
        self.back.end_with(LinkError::PeerClosed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_link_never_waits() {
        let (a, b) = MemoryLink::simulated_pair(2, 100);
        assert!(b.recv(Duration::from_secs(3600)).expect("open").is_none());
        a.send(Frame::new(1, "x")).expect("room");
        a.send(Frame::new(2, "y")).expect("room");
        assert!(matches!(a.try_send(Frame::new(3, "z")), Ok(TrySend::Full(frame)) if frame.kind() == 3));
        assert!(matches!(a.send(Frame::new(3, "z")), Err(LinkError::Full)));
        assert_eq!(b.try_recv().expect("open"), Some(Frame::new(1, "x")));
        drop(a);
        assert_eq!(b.try_recv().expect("sent before the farewell"), Some(Frame::new(2, "y")));
        assert!(matches!(b.try_recv(), Err(LinkError::PeerClosed)));
        assert!(matches!(b.send(Frame::new(1, "x")), Err(LinkError::PeerClosed)));
    }

    #[test]
    fn a_severed_link_loses_what_is_under_way() {
        let (a, b) = MemoryLink::pair(2, 100);
        a.send(Frame::new(1, "x")).expect("room");
        b.sever();
        assert!(matches!(b.recv(Duration::ZERO), Err(LinkError::Lost { .. })));
        assert!(matches!(a.send(Frame::new(1, "x")), Err(LinkError::Lost { .. })));
    }

    #[test]
    fn frames_are_checked_as_on_a_real_link() {
        let (a, _b) = MemoryLink::pair(2, 100);
        assert!(matches!(a.send(Frame::new(0xf0, "x")), Err(LinkError::ReservedKind(0xf0))));
        let large = vec![0; crate::limits::FRAME_BYTES_MAX + 1];
        assert!(matches!(a.send(Frame::new(1, large)), Err(LinkError::FrameTooLarge { .. })));
    }
}
