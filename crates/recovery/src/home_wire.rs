//! What failback and master target say to each other besides the replication protocol, and the wire for both.
//!
//! ```text
//! failback                                master target
//!   Order ───────────────────────────────►  checks and claims the disks
//!         ◄───────────────────────────────  Accepted | Refused
//!   replication: Hello, Changes, Offer … ►  (out: ◄ Welcome, Ack, Wants …)
//!   Prove ───────────────────────────────►
//!         ◄───────────────────────────────  Digest
//!   Complete ────────────────────────────►  the disks are usable again
//!         ◄───────────────────────────────  Completed
//! ```
//!
//! The frames of this file are JSON in frames of kinds that replication does not use.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use agent::engine::{Wire, WireClosed};
use link::{Frame, FrameLink, LinkError, TrySend};
use replication::wire::Message;
use serde::{Deserialize, Serialize};

use crate::home_disk::{HomeOrder, Refusal};
use crate::home_proof::ProofScope;

/// Version of what this file says.
pub const HOME_VERSION: u16 = 1;
/// The frame kind of all of it.
const HOME_FRAME: u8 = 0x60;

/// One message of the home conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case", deny_unknown_fields)]
pub enum HomeMessage {
    /// What is to be written where.
    Order {
        /// [`HOME_VERSION`].
        version: u16,
        /// The machine, 32 hexadecimal digits.
        machine: String,
        /// The chain that comes home, 32 hexadecimal digits.
        chain: String,
        /// Its disks.
        disks: Vec<HomeOrder>,
    },
    /// The disks are claimed; go on with replication.
    Accepted,
    /// The disks are not touched.
    Refused {
        /// Why.
        refusal: Refusal,
    },
    /// What does this range of the home disk hold?
    Prove {
        /// Which question.
        id: u64,
        /// The disk.
        disk: u16,
        /// First byte, a multiple of [`limits::PROOF_RANGE_BYTES`](crate::limits::PROOF_RANGE_BYTES).
        start: u64,
        /// Bytes: as many as that, or up to the end of the disk.
        len: u64,
        /// What must be read for the answer.
        #[serde(default)]
        scope: ProofScope,
    },
    /// The sum over the terms of the range's leaves.
    Digest {
        /// Which question.
        id: u64,
        /// 64 hexadecimal digits; `None` if the disk cannot be read there.
        digest: Option<String>,
        /// Bytes of disk that were read for this answer.
        #[serde(default)]
        read_bytes: u64,
    },
    /// Equality is proved: the disks are usable.
    Complete,
    /// The master target has forgotten that anything was under way.
    Completed,
}

impl HomeMessage {
    pub(crate) fn frame(&self) -> Frame {
        Frame::new(HOME_FRAME, serde_json::to_vec(self).expect("texts and numbers serialize"))
    }
}

/// A frame as either side reads it.
#[expect(clippy::large_enum_variant, reason = "lives for a moment; a box would cost an allocation a message")]
pub(crate) enum Said {
    Home(HomeMessage),
    Replication(Message),
    /// An order in words of another version than [`HOME_VERSION`].
    OtherVersion(u16),
}

/// As much of an order as every version has.
#[derive(Deserialize)]
struct AnyOrder {
    version: u16,
}

pub(crate) fn understand(frame: Frame) -> Result<Said, String> {
    let kind = frame.kind();
    let body = frame.into_body();
    if kind == HOME_FRAME {
        return match serde_json::from_slice(&body) {
            Ok(HomeMessage::Order { version, .. }) if version != HOME_VERSION => Ok(Said::OtherVersion(version)),
            Ok(message) => Ok(Said::Home(message)),
            Err(error) => match serde_json::from_slice::<AnyOrder>(&body) {
                Ok(order) if order.version != HOME_VERSION => Ok(Said::OtherVersion(order.version)),
                _ => Err(format!("a message makes no sense: {error}")),
            },
        };
    }
    Message::decode(kind, body).map(Said::Replication).map_err(|error| format!("a message makes no sense: {error}"))
}

pub(crate) fn replication_frame(message: &Message) -> Frame {
    let encoded = message.encode();
    Frame::from_parts(encoded.kind, encoded.parts)
}

/// The failback's end of a link: replication for the engine, the rest for its owner.
pub(crate) struct HomeWire {
    link: Arc<dyn FrameLink>,
    /// Encoded already when the link turned out to be full.
    held: Option<Frame>,
    replication: VecDeque<Message>,
    home: VecDeque<HomeMessage>,
    bytes: u64,
}

/// Bytes that a frame takes besides its body.
const FRAME_HEADER_BYTES: u64 = 5;

fn frame_bytes(frame: &Frame) -> u64 {
    frame.len() as u64 + FRAME_HEADER_BYTES
}

impl HomeWire {
    pub(crate) fn new(link: Arc<dyn FrameLink>) -> HomeWire {
        HomeWire { link, held: None, replication: VecDeque::new(), home: VecDeque::new(), bytes: 0 }
    }

    /// Bytes of the messages that were sent and received.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn say(&mut self, message: &HomeMessage) -> Result<(), WireClosed> {
        if let Some(frame) = self.held.take() {
            self.link.send(frame).map_err(closed)?;
        }
        let frame = message.frame();
        self.bytes += frame_bytes(&frame);
        self.link.send(frame).map_err(closed)
    }

    /// The next home message, if it is here within `patience`.
    pub(crate) fn hear(&mut self, patience: Duration) -> Result<Option<HomeMessage>, WireClosed> {
        if self.home.is_empty() {
            self.take(patience)?;
        }
        Ok(self.home.pop_front())
    }

    /// Waits until something may have arrived.
    pub(crate) fn wait(&mut self, patience: Duration) -> Result<(), WireClosed> {
        if self.replication.is_empty() && self.home.is_empty() {
            self.take(patience)?;
        }
        Ok(())
    }

    fn take(&mut self, patience: Duration) -> Result<(), WireClosed> {
        if let Some(frame) = self.link.recv(patience).map_err(closed)? {
            self.bytes += frame_bytes(&frame);
            match understand(frame).map_err(WireClosed)? {
                Said::Home(message) => self.home.push_back(message),
                Said::Replication(message) => self.replication.push_back(message),
                Said::OtherVersion(version) => {
                    return Err(WireClosed(format!("the master target speaks version {version}, not {HOME_VERSION}")));
                }
            }
        }
        Ok(())
    }
}

fn closed(error: LinkError) -> WireClosed {
    WireClosed(error.to_string())
}

impl Wire for HomeWire {
    fn try_send(&mut self, message: Message) -> Result<Option<Message>, WireClosed> {
        if let Some(frame) = self.held.take()
            && let TrySend::Full(frame) = self.link.try_send(frame).map_err(closed)?
        {
            self.held = Some(frame);
            return Ok(Some(message));
        }
        let frame = replication_frame(&message);
        self.bytes += frame_bytes(&frame);
        if let TrySend::Full(frame) = self.link.try_send(frame).map_err(closed)? {
            self.held = Some(frame);
        }
        Ok(None)
    }

    fn try_receive(&mut self) -> Result<Option<Message>, WireClosed> {
        if let Some(frame) = self.held.take()
            && let TrySend::Full(frame) = self.link.try_send(frame).map_err(closed)?
        {
            self.held = Some(frame);
        }
        if self.replication.is_empty() {
            self.take(Duration::ZERO)?;
        }
        Ok(self.replication.pop_front())
    }
}
