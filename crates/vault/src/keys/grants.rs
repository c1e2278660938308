//! Grants: the owner's word that a signing key may write to the vault.

use replication::codec::{DecodeError, Decoder, Encoder};

use super::{VerifyingKey, WriterId};
use crate::limits;

/// What a writer is for. Recorded for people and for later restrictions; version 1 treats all roles alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriterRole {
    /// Receives replication and writes machines' chains.
    ProcessServer,
    /// Opens branches and writes their chains.
    BranchHost,
    /// Signs commits and cancels of failovers.
    Operator,
    /// Derives objects from the originals of several generations, and deletes.
    Maintenance,
}

/// Names a writer and its public key. Signed by the owner as an object `grants/<writer>`; encrypted under the index key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Who may write.
    pub writer: WriterId,
    /// The key its objects are signed with.
    pub key: VerifyingKey,
    /// What it is for.
    pub role: WriterRole,
    /// Its name for people, such as a host name.
    pub label: String,
    /// Wall time at which it was granted, in seconds since 1970. An annotation: grants do not expire by time.
    pub granted_seconds: u64,
}

impl Grant {
    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.raw(&self.writer.0)
            .raw(&self.key.0)
            .u8(match self.role {
                WriterRole::ProcessServer => 1,
                WriterRole::BranchHost => 2,
                WriterRole::Operator => 3,
                WriterRole::Maintenance => 4,
            })
            .text(&self.label)
            .u64(self.granted_seconds)
            // Reserved: number of restrictions (chains, kinds). A reader refuses restrictions it does not know.
            .varint(0);
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<Grant, DecodeError> {
        let grant = Grant {
            writer: WriterId(input.array("writer id")?),
            key: VerifyingKey(input.array("writer key")?),
            role: match input.u8("writer role")? {
                1 => WriterRole::ProcessServer,
                2 => WriterRole::BranchHost,
                3 => WriterRole::Operator,
                4 => WriterRole::Maintenance,
                value => return Err(DecodeError::Undefined { field: "writer role", value: value.into() }),
            },
            label: input.text("writer label", limits::LABEL_BYTES_MAX)?,
            granted_seconds: input.u64("time of grant")?,
        };
        input.varint_max("number of restrictions", 0)?;
        Ok(grant)
    }
}
