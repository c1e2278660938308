//! The unit of a link: a kind and a body, both opaque to the link.
//!
//! On the wire, inside TLS: `length u32 LE (of the body)  kind u8  body`.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};

use crate::error::LinkError;
use crate::limits::{FRAME_BYTES_MAX, RESERVED_KIND_FIRST};

/// Bytes before the body.
pub(crate) const HEADER_BYTES: usize = 5;

/// One message. The kind's meaning and the body's form are the business of whoever uses the link.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    kind: u8,
    /// What follows `first` stands in `more`; almost always empty, and then nothing is allocated for it.
    first: Bytes,
    more: Vec<Bytes>,
}

impl Frame {
    /// A frame with a body in one piece.
    pub fn new(kind: u8, body: impl Into<Bytes>) -> Frame {
        Frame { kind, first: body.into(), more: Vec::new() }
    }

    /// A frame whose body is the concatenation of `parts`, which are not copied.
    pub fn from_parts(kind: u8, parts: impl IntoIterator<Item = Bytes>) -> Frame {
        let mut parts = parts.into_iter();
        Frame { kind, first: parts.next().unwrap_or_default(), more: parts.collect() }
    }

    /// Its kind.
    pub fn kind(&self) -> u8 {
        self.kind
    }

    /// The body's length in bytes.
    pub fn len(&self) -> usize {
        self.parts().map(Bytes::len).sum()
    }

    /// Whether the body has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The body's pieces in order. A received frame has exactly one.
    pub fn parts(&self) -> impl Iterator<Item = &Bytes> {
        std::iter::once(&self.first).chain(&self.more)
    }

    /// The body in one piece; copies only if it has several.
    pub fn into_body(self) -> Bytes {
        if self.more.is_empty() {
            return self.first;
        }
        let mut body = BytesMut::with_capacity(self.len());
        self.parts().for_each(|part| body.extend_from_slice(part));
        body.freeze()
    }

    /// `Ok` if the frame may be given to a link.
    pub(crate) fn check(&self) -> Result<(), LinkError> {
        if self.kind >= RESERVED_KIND_FIRST {
            return Err(LinkError::ReservedKind(self.kind));
        }
        let len = self.len();
        if len > FRAME_BYTES_MAX {
            return Err(LinkError::FrameTooLarge { len: len as u64, max: FRAME_BYTES_MAX as u64 });
        }
        Ok(())
    }

    pub(crate) fn header(&self) -> [u8; HEADER_BYTES] {
        let length = u32::try_from(self.len()).expect("checked against the limit before");
        let mut header = [self.kind; HEADER_BYTES];
        header[..4].copy_from_slice(&length.to_le_bytes());
        header
    }

    pub(crate) fn into_parts(self) -> VecDeque<Bytes> {
        let mut parts = VecDeque::with_capacity(1 + self.more.len());
        parts.push_back(self.first);
        parts.extend(self.more);
        parts
    }
}

impl std::fmt::Debug for Frame {
    /// Bodies hold disk data and join secrets; only their length is shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frame(kind {:#04x}, {} bytes)", self.kind, self.len())
    }
}

/// What became of a frame that was offered without waiting.
#[derive(Debug)]
#[must_use]
pub enum TrySend {
    /// It was taken.
    Sent,
    /// There is no room now; here it is back.
    Full(Frame),
}

/// A bounded, ordered, full-duplex way to one peer. What was sent may be lost when the link ends, but never
/// reordered, and the peer gets a prefix of it. After the first error (except those about a frame itself) every later
/// call fails.
pub trait FrameLink: Send + Sync {
    /// Gives a frame to the link; blocks while it is full. `Ok` says nothing about arrival.
    ///
    /// # Errors
    /// [`LinkError::FrameTooLarge`] and [`LinkError::ReservedKind`] are about the frame; any other says why the link
    /// ended.
    fn send(&self, frame: Frame) -> Result<(), LinkError>;

    /// Gives a frame to the link if it has room.
    ///
    /// # Errors
    /// As [`FrameLink::send`].
    fn try_send(&self, frame: Frame) -> Result<TrySend, LinkError>;

    /// The next frame from the peer; `None` if none came within `timeout`. Frames that arrived before the link ended
    /// are delivered before the error.
    ///
    /// # Errors
    /// Why the link ended.
    fn recv(&self, timeout: Duration) -> Result<Option<Frame>, LinkError>;

    /// The next frame if it is there already.
    ///
    /// # Errors
    /// Why the link ended.
    fn try_recv(&self) -> Result<Option<Frame>, LinkError> {
        self.recv(Duration::ZERO)
    }
}

/// Cuts the plaintext stream into frames.
pub(crate) struct Assembler {
    header: [u8; HEADER_BYTES],
    header_len: usize,
    body: Option<BytesMut>,
    body_len: usize,
    frame_max: usize,
}

impl Assembler {
    pub(crate) fn new(frame_max: usize) -> Assembler {
        Assembler { header: [0; HEADER_BYTES], header_len: 0, body: None, body_len: 0, frame_max }
    }

    /// Another limit for the bodies of frames whose header has not come yet.
    pub(crate) fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
    }

    /// Takes the next bytes of the stream and adds the frames they complete to `ready`.
    pub(crate) fn push(&mut self, mut bytes: &[u8], ready: &mut VecDeque<Frame>) -> Result<(), LinkError> {
        loop {
            if self.body.is_none() {
                let take = (HEADER_BYTES - self.header_len).min(bytes.len());
                self.header[self.header_len..self.header_len + take].copy_from_slice(&bytes[..take]);
                self.header_len += take;
                bytes.advance(take);
                if self.header_len < HEADER_BYTES {
                    return Ok(());
                }
                let (length, _) = self.header.split_first_chunk::<4>().expect("a header has 5 bytes");
                self.body_len = u32::from_le_bytes(*length) as usize;
                if self.body_len > self.frame_max {
                    return Err(LinkError::FrameTooLarge { len: self.body_len as u64, max: self.frame_max as u64 });
                }
                self.body = Some(BytesMut::with_capacity(self.body_len));
            }
            let body = self.body.as_mut().expect("set above");
            let take = (self.body_len - body.len()).min(bytes.len());
            body.extend_from_slice(&bytes[..take]);
            bytes.advance(take);
            if body.len() < self.body_len {
                return Ok(());
            }
            let body = self.body.take().expect("set above");
            ready.push_back(Frame::new(self.header[HEADER_BYTES - 1], body.freeze()));
            self.header_len = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_survive_any_cutting(
            frames in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..8),
            cuts in proptest::collection::vec(1usize..40, 1..8),
        ) {
            let frames: Vec<Frame> = frames.into_iter().map(|(kind, body)| Frame::new(kind, body)).collect();
            let mut stream = Vec::new();
            for frame in &frames {
                stream.extend_from_slice(&frame.header());
                frame.parts().for_each(|part| stream.extend_from_slice(part));
            }
            let mut assembler = Assembler::new(64);
            let mut ready = VecDeque::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                assembler.push(piece, &mut ready).expect("small enough");
                rest = after;
            }
            prop_assert_eq!(Vec::from(ready), frames);
        }

        #[test]
        fn any_bytes_may_arrive(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut ready = VecDeque::new();
            let _ = Assembler::new(32).push(&bytes, &mut ready);
            prop_assert!(ready.iter().all(|frame| frame.len() <= 32));
        }
    }

    #[test]
    fn parts_are_one_body() {
        let frame = Frame::from_parts(3, [Bytes::from_static(b"ab"), Bytes::new(), Bytes::from_static(b"c")]);
        assert_eq!((frame.len(), frame.header()), (3, [3, 0, 0, 0, 3]));
        assert_eq!(frame.into_body(), "abc");
        assert!(Frame::from_parts(3, []).is_empty());
    }
}
