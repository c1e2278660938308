//! Objects: one signed envelope around encrypted frames. `docs/formats/object.md` describes every byte.
//!
//! ```text
//! header ‖ signature ‖ frame 0 ‖ frame 1 ‖ …
//! ```
//! Invariants: a frame's key belongs to one object name and nonce, and its AEAD nonce is its ordinal, so no key and
//! nonce ever meet two plaintexts. The signature covers name and header, the header holds the body's digest: an object
//! can neither be changed nor moved to another name.

mod builder;
mod frame;
mod header;
mod reader;

use replication::codec::{DecodeError, Decoder, Encoder};

use crate::limits;

pub use builder::{ObjectBuilder, SealedObject};
pub(crate) use frame::leaves_look_incompressible;
pub use frame::{Compression, FrameSealer};
pub(crate) use header::ParsedHeader;
pub use header::{Header, Placement};
pub use reader::{ObjectReader, verify_body_without_keys};
pub(crate) use reader::{read_header, verify_signature};
#[cfg(any(test, fuzzing))]
pub(crate) use {frame::frame_survives, header::Parse};

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// The vault's own description: id, public keys.
    VaultHeader,
    /// The vault's secrets under a passphrase or the recovery key.
    KeySlot,
    /// Index, leaf and name keys, sealed to the read key.
    SharedKeys,
    /// The owner's word that a key may write.
    Grant,
    /// One entry of the vault-wide catalog.
    Catalog,
    /// One link of a chain.
    Manifest,
    /// Changes of one seal interval with their table.
    Segment,
    /// Content-addressed chunks.
    Pack,
    /// A table over several segments.
    MergedIndex,
    /// The table of a heal.
    Image,
    /// Reserved: a list of objects that collection will delete.
    Condemned,
    /// Reserved: proofs of currency of idle machines.
    Watermark,
    /// Reserved: maintenance's own checkpoint across generations.
    Checkpoint,
    /// The name key of a later epoch, sealed to one recipient.
    NameKey,
}

const KINDS: [(ObjectKind, u16); 14] = [
    (ObjectKind::VaultHeader, 1),
    (ObjectKind::KeySlot, 2),
    (ObjectKind::SharedKeys, 3),
    (ObjectKind::Grant, 4),
    (ObjectKind::Catalog, 5),
    (ObjectKind::Manifest, 6),
    (ObjectKind::Segment, 7),
    (ObjectKind::Pack, 8),
    (ObjectKind::MergedIndex, 9),
    (ObjectKind::Image, 10),
    (ObjectKind::Condemned, 11),
    (ObjectKind::Watermark, 12),
    (ObjectKind::Checkpoint, 13),
    (ObjectKind::NameKey, 14),
];

impl ObjectKind {
    pub(crate) fn code(self) -> u16 {
        KINDS.iter().find(|(kind, _)| *kind == self).expect("the table holds every kind").1
    }

    pub(crate) fn from_code(code: u16) -> Option<ObjectKind> {
        KINDS.iter().find(|(_, known)| *known == code).map(|(kind, _)| *kind)
    }
}

/// Under which key a frame is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrameClass {
    /// Disk data: only the read-key holder can decrypt it.
    Data,
    /// Indexes and metadata: writers can read them too.
    Index,
}

/// Where a frame is inside its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrameRef {
    /// First byte, counted from the start of the body.
    pub offset: u64,
    /// Bytes in the object.
    pub sealed_len: u32,
    /// Bytes after decryption and decompression.
    pub plain_len: u32,
    /// Number within the object, and the AEAD nonce.
    pub ordinal: u32,
    /// Under which key it is.
    pub class: FrameClass,
}

impl FrameRef {
    /// The frame's bytes within the body.
    pub fn body_range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + u64::from(self.sealed_len)
    }

    /// Appends the reference: class, then four varints.
    pub fn encode(&self, out: &mut Encoder) {
        out.u8(match self.class {
            FrameClass::Data => 1,
            FrameClass::Index => 2,
        })
        .varint(self.offset)
        .varint(self.sealed_len.into())
        .varint(self.plain_len.into())
        .varint(self.ordinal.into());
    }

    /// Reads a reference.
    pub fn decode(input: &mut Decoder) -> Result<FrameRef, DecodeError> {
        let class = match input.u8("frame class")? {
            1 => FrameClass::Data,
            2 => FrameClass::Index,
            value => return Err(DecodeError::Undefined { field: "frame class", value: value.into() }),
        };
        let sealed_max = (limits::FRAME_PLAIN_BYTES_MAX + limits::FRAME_OVERHEAD_BYTES_MAX) as u64;
        Ok(FrameRef {
            class,
            offset: input.varint_max("frame offset", limits::OBJECT_BODY_BYTES_MAX)?,
            sealed_len: input.varint_max("sealed length", sealed_max)? as u32,
            plain_len: input.varint_max("plain length", limits::FRAME_PLAIN_BYTES_MAX as u64)? as u32,
            ordinal: input.varint_max("frame ordinal", u64::from(limits::OBJECT_FRAMES_MAX) - 1)? as u32,
        })
    }
}
