//! Replication messages over a TLS connection: encoded without copying disk data, never blocking the engine.

use std::sync::Arc;
use std::time::Duration;

use link::{Connection, Frame, FrameLink, LinkError, TrySend};
use replication::wire::Message;

use crate::engine::{Wire, WireClosed};
use crate::service::problem::chain;

/// The engine's way over one connection.
pub struct LinkWire {
    connection: Connection,
    /// Encoded, but the connection had no room yet.
    stuck: Option<Frame>,
    welcomed: bool,
}

impl LinkWire {
    /// A wire over `connection`, on which nothing was sent yet.
    pub fn new(connection: Connection) -> LinkWire {
        LinkWire { connection, stuck: None, welcomed: false }
    }

    /// The connection.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Whether the receiver has accepted the session.
    pub fn is_welcomed(&self) -> bool {
        self.welcomed
    }

    /// Whether the connection has no room at the moment: look again soon.
    pub fn is_congested(&self) -> bool {
        self.stuck.is_some()
    }

    /// Has `bell` called, by other threads, whenever [`Wire::try_receive`] has something to say.
    pub fn ring_with(&self, bell: Arc<dyn Fn() + Send + Sync>) {
        self.connection.ring_with(bell);
    }

    /// Says good-bye and waits until the peer's side of the link has it.
    ///
    /// # Errors
    /// It may not have arrived.
    pub fn farewell(mut self, reason: &str, limit: Duration) -> Result<(), LinkError> {
        if let Some(frame) = self.stuck.take() {
            self.connection.send(frame)?;
        }
        self.connection.send(frame_of(&Message::Bye { reason: reason.to_owned() }))?;
        self.connection.close(limit)
    }

    /// Whether there is room for another message.
    fn unstick(&mut self) -> Result<bool, WireClosed> {
        let Some(frame) = self.stuck.take() else { return Ok(true) };
        if let TrySend::Full(frame) = self.connection.try_send(frame).map_err(closed)? {
            self.stuck = Some(frame);
            return Ok(false);
        }
        Ok(true)
    }
}

impl Wire for LinkWire {
    fn try_send(&mut self, message: Message) -> Result<Option<Message>, WireClosed> {
        if !self.unstick()? {
            return Ok(Some(message));
        }
        // Kept encoded if there is no room: encoding an offer again at each try would cost more than the wait.
        self.stuck = Some(frame_of(&message));
        self.unstick()?;
        Ok(None)
    }

    fn try_receive(&mut self) -> Result<Option<Message>, WireClosed> {
        self.unstick()?;
        let Some(frame) = self.connection.try_recv().map_err(closed)? else { return Ok(None) };
        let message = decode(frame).map_err(WireClosed)?;
        self.welcomed |= matches!(message, Message::Welcome(_));
        Ok(Some(message))
    }
}

/// A message as a frame. Disk data is shared, not copied.
pub fn frame_of(message: &Message) -> Frame {
    let encoded = message.encode();
    Frame::from_parts(encoded.kind, encoded.parts)
}

/// The message in `frame`.
///
/// # Errors
/// In words: the peer sent what the protocol does not know.
pub fn decode(frame: Frame) -> Result<Message, String> {
    let kind = frame.kind();
    Message::decode(kind, frame.into_body())
        .map_err(|error| format!("a message of kind {kind} cannot be read: {error}"))
}

fn closed(error: LinkError) -> WireClosed {
    WireClosed(chain(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use replication::wire::HealContent;
    use replication::{ByteRange, DiskId, HealId};

    #[test]
    fn disk_data_is_not_copied_on_its_way_into_a_frame() {
        let data = Bytes::from(vec![7; 4096]);
        let message = Message::HealData {
            heal: HealId(1),
            disk: DiskId(0),
            range: ByteRange::new(0, 4096),
            content: HealContent::Data(data.clone()),
        };
        let frame = frame_of(&message);
        assert!(frame.parts().any(|part| part.as_ptr() == data.as_ptr()), "the same memory");
        assert_eq!(decode(frame), Ok(message));
        assert!(decode(Frame::new(99, "x")).expect_err("no such kind").contains("kind 99"));
    }
}
