//! Key slots: the vault's two secrets, wrapped under a passphrase or under the recovery key. A slot may hold the read
//! secret alone: who opens it can open branches, but neither grant nor revoke.
//!
//! Nothing in a vault is removed, so a slot that shall not be used any more is *superseded* by a later one, which names it.
//! That binds this program; whoever kept a copy of the old object and its passphrase keeps what they had.
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
    /// Signs grants; `None` if what was opened holds the read secret alone.
    pub owner: Option<OwnerSecret>,
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
    /// A passphrase that opens the read secret only.
    ReadPassphrase(PassphraseCost),
    /// The recovery key on paper.
    Recovery,
}

/// One wrapped copy of the secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeySlot {
    pub(crate) kind: SlotKind,
    salt: [u8; 16],
    wrapped: Vec<u8>,
    /// Slots that are not to be used any more, by the number in their names.
    pub(crate) supersedes: Vec<u64>,
}

/// Public halves and vault: what a slot is bound to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotOf {
    pub(crate) vault: VaultId,
    pub(crate) owner: VerifyingKey,
    pub(crate) read: ReadPublic,
}

const SECRET_LEN: usize = 32;
const TAG_LEN: usize = 16;
const WRAPPED_LEN_MAX: usize = 2 * SECRET_LEN + TAG_LEN;
const PASSPHRASE: u8 = 1;
const RECOVERY: u8 = 2;
const READ_PASSPHRASE: u8 = 3;

impl KeySlot {
    /// A slot of `kind` under `passphrase`, or under the recovery key. Needs the owner's secret unless the slot is to
    /// hold the read secret alone.
    pub(crate) fn under_passphrase(
        passphrase: &str,
        kind: SlotKind,
        of: SlotOf,
        secrets: &VaultSecrets,
        entropy: &dyn Entropy,
    ) -> KeySlot {
        let (SlotKind::Passphrase(cost) | SlotKind::ReadPassphrase(cost)) = kind else {
            unreachable!("the recovery key's slot has its own constructor")
        };
        let salt = entropy.bytes();
        let key = stretch(passphrase, cost, &salt).expect("costs chosen by this program are valid");
        let owner = secrets.owner.as_ref().filter(|_| matches!(kind, SlotKind::Passphrase(_)));
        KeySlot { kind, salt, wrapped: wrap(&key, of, &secrets.read, owner), supersedes: Vec::new() }
    }

    pub(crate) fn under_recovery_key(
        recovery: &RecoveryKey,
        of: SlotOf,
        secrets: &VaultSecrets,
        entropy: &dyn Entropy,
    ) -> KeySlot {
        let salt = entropy.bytes();
        let key = recovery_wrapping_key(recovery, &salt);
        let wrapped = wrap(&key, of, &secrets.read, secrets.owner.as_ref());
        KeySlot { kind: SlotKind::Recovery, salt, wrapped, supersedes: Vec::new() }
    }

    /// The secrets, if `passphrase` opens this slot.
    pub(crate) fn open_with_passphrase(&self, passphrase: &str, of: SlotOf) -> Option<VaultSecrets> {
        let (SlotKind::Passphrase(cost) | SlotKind::ReadPassphrase(cost)) = self.kind else { return None };
        let key = stretch(passphrase, cost, &self.salt)?;
        unwrap(&key, of, &self.wrapped)
    }

    /// The secrets, if `recovery` opens this slot.
    pub(crate) fn open_with_recovery_key(&self, recovery: &RecoveryKey, of: SlotOf) -> Option<VaultSecrets> {
        if self.kind != SlotKind::Recovery {
            return None;
        }
        unwrap(&recovery_wrapping_key(recovery, &self.salt), of, &self.wrapped)
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        match self.kind {
            SlotKind::Passphrase(cost) | SlotKind::ReadPassphrase(cost) => {
                let tag = if matches!(self.kind, SlotKind::Passphrase(_)) { PASSPHRASE } else { READ_PASSPHRASE };
                out.u8(tag).u32(cost.memory_kib).u32(cost.passes).u32(cost.lanes);
            }
            SlotKind::Recovery => {
                out.u8(RECOVERY);
            }
        }
        out.raw(&self.salt).bytes(&self.wrapped).varint(self.supersedes.len() as u64);
        self.supersedes.iter().for_each(|slot| {
            out.u64(*slot);
        });
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<KeySlot, DecodeError> {
        let kind = match input.u8("slot kind")? {
            tag @ (PASSPHRASE | READ_PASSPHRASE) => {
                let cost = PassphraseCost {
                    memory_kib: input.u32("argon2 memory")?,
                    passes: input.u32("argon2 passes")?,
                    lanes: input.u32("argon2 lanes")?,
                };
                if cost.memory_kib > limits::ARGON2_MEMORY_KIB_MAX || cost.passes > limits::ARGON2_PASSES_MAX {
                    return Err(DecodeError::Inconsistent("a key slot demands more work than is allowed"));
                }
                if tag == PASSPHRASE { SlotKind::Passphrase(cost) } else { SlotKind::ReadPassphrase(cost) }
            }
            RECOVERY => SlotKind::Recovery,
            value => return Err(DecodeError::Undefined { field: "slot kind", value: value.into() }),
        };
        let salt = input.array("slot salt")?;
        let wrapped = input.bytes("wrapped secrets", WRAPPED_LEN_MAX)?.to_vec();
        let supersedes = (0..input.count("superseded slots", limits::SLOTS_MAX)?)
            .map(|_| input.u64("superseded slot"))
            .collect::<Result<_, DecodeError>>()?;
        Ok(KeySlot { kind, salt, wrapped, supersedes })
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

fn associated(of: SlotOf) -> Vec<u8> {
    [b"farshore key slot v1".as_slice(), &of.vault.0, &of.owner.0, &of.read.0].concat()
}

/// The salt is new for every slot, so a wrapping key encrypts one message and the nonce may be zero.
fn wrap(key: &[u8; 32], of: SlotOf, read: &ReadSecret, owner: Option<&OwnerSecret>) -> Vec<u8> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"));
    let mut bytes = read.expose().to_vec();
    bytes.extend(owner.iter().flat_map(|owner| owner.expose()));
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key([0; 12]), Aad::from(associated(of)), &mut bytes)
        .expect("64 bytes are below the cipher's limit");
    bytes
}

fn unwrap(key: &[u8; 32], of: SlotOf, wrapped: &[u8]) -> Option<VaultSecrets> {
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"));
    let mut bytes = Zeroizing::new(wrapped.to_vec());
    let aad = Aad::from(associated(of));
    let plain = key.open_in_place(Nonce::assume_unique_for_key([0; 12]), aad, &mut bytes).ok()?;
    let (read, owner) = plain.split_at_checked(SECRET_LEN)?;
    let owner = match owner {
        [] => None,
        bytes => Some(SigningSecret::new(bytes.try_into().ok()?)),
    };
    let secrets = VaultSecrets { read: ReadSecret::new(read.try_into().ok()?), owner };
    let ours = secrets.read.public() == of.read && secrets.owner.as_ref().is_none_or(|key| key.public() == of.owner);
    ours.then_some(secrets)
}
