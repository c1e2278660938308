//! Grants: the owner's word that a signing key may write to the vault.

use replication::codec::{DecodeError, Decoder, Encoder};

use super::{ReadPublic, SealingPublic, VerifyingKey, WriterId};
use crate::limits;

/// What a writer is for. What each may write is judged in `chain/standing.rs` and in the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriterRole {
    /// Receives replication and writes machines' chains.
    ProcessServer,
    /// Opens branches and writes their chains.
    BranchHost,
    /// Closes machines' chains for a failover, commits and cancels it.
    Operator,
    /// Derives objects from the originals of several generations, and deletes.
    Maintenance,
}

/// On whose word something was signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authority {
    /// The vault's owner, who may do whatever could be granted.
    Owner,
    /// A writer with this role.
    Granted(WriterRole),
}

impl Authority {
    /// Whether it is the owner, or has `role`.
    pub fn is(self, role: WriterRole) -> bool {
        self == Authority::Owner || self == Authority::Granted(role)
    }
}

impl std::fmt::Display for WriterRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WriterRole::ProcessServer => "process server",
            WriterRole::BranchHost => "branch host",
            WriterRole::Operator => "operator",
            WriterRole::Maintenance => "maintenance",
        })
    }
}

/// Names a writer and its public key. Signed by the owner as an object `grants/<writer>`; encrypted under the index key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Who may write.
    pub writer: WriterId,
    /// The key its objects are signed with.
    pub key: VerifyingKey,
    /// Later name keys are sealed to it.
    pub sealing: SealingPublic,
    /// What it is for.
    pub role: WriterRole,
    /// Its name for people, such as a host name.
    pub label: String,
    /// Wall time at which it was granted, in seconds since 1970. An annotation: grants do not expire by time.
    pub granted_seconds: u64,
}

impl Grant {
    /// The authority that it gives.
    pub fn authority(&self) -> Authority {
        match self.writer {
            WriterId::OWNER => Authority::Owner,
            _ => Authority::Granted(self.role),
        }
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.raw(&self.writer.0)
            .raw(&self.key.0)
            .raw(&self.sealing.0)
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
            sealing: ReadPublic(input.array("writer's sealing key")?),
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
