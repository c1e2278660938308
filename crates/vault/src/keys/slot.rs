//! Key slots: the vault's two secrets, wrapped under a passphrase or under the recovery key.
//!
//! A slot stands in the clear fields of a signed `keys/…` object. The wrapping binds vault id and both public keys, so
//! whoever unlocks a slot also learns that the vault header it was read with is the owner's own.

use argon2::{Algorithm, Argon2, Params, Version};
use replication::codec::{DecodeError, Decoder, Encoder};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use world::Entropy;
use zeroize::Zeroizing;

use super::{OwnerSecret, ReadPublic, ReadSecret, RecoveryKey, SigningSecret, VaultId, VerifyingKey};
use crate::limits;

/// Everything that unlocking a vault gives.
#[derive(Debug, Clone)]
pub struct VaultSecrets {
    /// Opens data keys.
    pub read: ReadSecret,
    /// Signs grants.
    pub owner: OwnerSecret,
}

/// How much work a passphrase costs whoever tries it (argon2id).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassphraseCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl PassphraseCost {
    /// Second recommended set of RFC 9106 (64 MiB, three passes), in one lane: about a fifth of a second.
    pub const STANDARD: PassphraseCost = PassphraseCost { memory_kib: 64 << 10, passes: 3, lanes: 1 };
    /// No protection at all. For tests and the simulation only.
    pub const TRIVIAL: PassphraseCost = PassphraseCost { memory_kib: 8, passes: 1, lanes: 1 };
}

/// What opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// A passphrase, stretched at this cost.
    Passphrase(PassphraseCost),
    /// The recovery key on paper.
    Recovery,
}

/// One wrapped copy of the secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeySlot {
    pub(crate) kind: SlotKind,
    salt: [u8; 16],
    wrapped: Vec<u8>,
}

const WRAPPED_LEN: usize = 64 + 16;
const PASSPHRASE: u8 = 1;
const RECOVERY: u8 = 2;

impl KeySlot {
    pub(crate) fn under_passphrase(
        passphrase: &str,
        cost: PassphraseCost,
        vault: VaultId,
        secrets: &VaultSecrets,
        entropy: &dyn Entropy,
    ) -> KeySlot {
        let salt = entropy.bytes();
        let key = stretch(passphrase, cost, &salt).expect("costs chosen by this program are valid");
        KeySlot { kind: SlotKind::Passphrase(cost), salt, wrapped: wrap(&key, vault, secrets) }
    }

    pub(crate) fn under_recovery_key(
        recovery: &RecoveryKey,
        vault: VaultId,
        secrets: &VaultSecrets,
        entropy: &dyn Entropy,
    ) -> KeySlot {
        let salt = entropy.bytes();
        let key = recovery_wrapping_key(recovery, &salt);
        KeySlot { kind: SlotKind::Recovery, salt, wrapped: wrap(&key, vault, secrets) }
    }

    /// The secrets, if `passphrase` opens this slot.
    pub(crate) fn open_with_passphrase(
        &self,
        passphrase: &str,
        vault: VaultId,
        owner: VerifyingKey,
        read: ReadPublic,
    ) -> Option<VaultSecrets> {
        let SlotKind::Passphrase(cost) = self.kind else { return None };
        let key = stretch(passphrase, cost, &self.salt)?;
        unwrap(&key, vault, owner, read, &self.wrapped)
    }

    /// The secrets, if `recovery` opens this slot.
    pub(crate) fn open_with_recovery_key(
        &self,
        recovery: &RecoveryKey,
        vault: VaultId,
        owner: VerifyingKey,
        read: ReadPublic,
    ) -> Option<VaultSecrets> {
        if self.kind != SlotKind::Recovery {
            return None;
        }
        unwrap(&recovery_wrapping_key(recovery, &self.salt), vault, owner, read, &self.wrapped)
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        match self.kind {
            SlotKind::Passphrase(cost) => {
                out.u8(PASSPHRASE).u32(cost.memory_kib).u32(cost.passes).u32(cost.lanes);
            }
            SlotKind::Recovery => {
                out.u8(RECOVERY);
            }
        }
        out.raw(&self.salt).bytes(&self.wrapped);
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<KeySlot, DecodeError> {
        let kind = match input.u8("slot kind")? {
            PASSPHRASE => {
                let cost = PassphraseCost {
                    memory_kib: input.u32("argon2 memory")?,
                    passes: input.u32("argon2 passes")?,
                    lanes: input.u32("argon2 lanes")?,
                };
                if cost.memory_kib > limits::ARGON2_MEMORY_KIB_MAX || cost.passes > limits::ARGON2_PASSES_MAX {
                    return Err(DecodeError::Inconsistent("a key slot demands more work than is allowed"));
                }
                SlotKind::Passphrase(cost)
            }
            RECOVERY => SlotKind::Recovery,
            value => return Err(DecodeError::Undefined { field: "slot kind", value: value.into() }),
        };
        let salt = input.array("slot salt")?;
        let wrapped = input.bytes("wrapped secrets", WRAPPED_LEN)?.to_vec();
        Ok(KeySlot { kind, salt, wrapped })
    }
}

fn stretch(passphrase: &str, cost: PassphraseCost, salt: &[u8; 16]) -> Option<Zeroizing<[u8; 32]>> {
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).ok()?;
    let mut key = Zeroizing::new([0; 32]);
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into(passphrase.as_bytes(), salt, key.as_mut())
        .ok()?;
    Some(key)
}

fn recovery_wrapping_key(recovery: &RecoveryKey, salt: &[u8; 16]) -> Zeroizing<[u8; 32]> {
    let mut material = Zeroizing::new(recovery.bytes().to_vec());
    material.extend_from_slice(salt);
    Zeroizing::new(blake3::derive_key("farshore recovery slot v1", &material))
}

fn associated(vault: VaultId, owner: VerifyingKey, read: ReadPublic) -> Vec<u8> {
    [b"farshore key slot v1".as_slice(), &vault.0, &owner.0, &read.0].concat()
}

/// The salt is new for every slot, so a wrapping key encrypts one message and the nonce may be zero.
fn wrap(key: &[u8; 32], vault: VaultId, secrets: &VaultSecrets) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"));
    let mut bytes = secrets.read.expose().to_vec();
    bytes.extend_from_slice(secrets.owner.expose());
    let aad = associated(vault, secrets.owner.public(), secrets.read.public());
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key([0; 12]), Aad::from(aad), &mut bytes)
        .expect("64 bytes are below the cipher's limit");
    bytes
}

fn unwrap(
    key: &[u8; 32],
    vault: VaultId,
    owner: VerifyingKey,
    read: ReadPublic,
    wrapped: &[u8],
) -> Option<VaultSecrets> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"));
    let mut bytes = Zeroizing::new(wrapped.to_vec());
    let aad = Aad::from(associated(vault, owner, read));
    let plain = key.open_in_place(Nonce::assume_unique_for_key([0; 12]), aad, &mut bytes).ok()?;
    let (read_secret, owner_secret) = plain.split_at_checked(32)?;
    let secrets = VaultSecrets {
        read: ReadSecret::new(read_secret.try_into().ok()?),
        owner: SigningSecret::new(owner_secret.try_into().ok()?),
    };
    (secrets.owner.public() == owner && secrets.read.public() == read).then_some(secrets)
}
