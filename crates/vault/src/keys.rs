//! The keys of a vault and who holds which.
//!
//! ```text
//! passphrase ─argon2id─┐                       ┌─ OwnerSecret  Ed25519: signs grants, the vault header, key slots
//!                      ├─ key slot ─ unlocks ──┤
//! recovery key ────────┘                       └─ ReadSecret   X25519: opens data keys and the shared keys
//!                                                  │
//!         SharedKeys: index, leaf and name key  ◄──┘   (every granted writer holds them too)
//! ```
//! Each revocation begins another epoch of the name key (`name_keys`), of which the revoked writer gets nothing.
//!
//! A writer ([`WriterKeys`]) can encrypt data but not decrypt it: each hour it makes a data key, seals it to the read
//! key's public half, and forgets it when the hour ends. A reader holds [`OpenKeys`], with or without the read secret.

mod grants;
mod hpke_seal;
mod name_keys;
mod open;
mod recovery_key;
pub(crate) mod revoked;
mod slot;
mod writer;

use std::fmt;

use replication::LeafKey;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use world::Entropy;
use zeroize::{Zeroize, ZeroizeOnDrop};

pub use grants::{Authority, Grant, WriterRole};
pub use hpke_seal::{ReadPublic, ReadSecret, SealedKey, SealingPublic, SealingSecret};
pub(crate) use name_keys::SealedNameKey;
pub use name_keys::{NameEpoch, NameSwitch};
pub use open::OpenKeys;
pub use recovery_key::{RecoveryKey, RecoveryKeyError};
pub use revoked::Revocation;
pub(crate) use slot::{KeySlot, SlotOf};
pub use slot::{PassphraseCost, SlotKind, VaultSecrets};
pub(crate) use writer::DataKey;
pub use writer::{WriterKeys, WriterKeysError, WriterSession};

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

identifier! {
    /// One vault, for ever. A copy of a vault is the same vault.
    VaultId
}
identifier! {
    /// One holder of a signing key: a process server, a branch host, or the owner.
    WriterId
}
identifier! {
    /// Random, in the clear, in every object header: tells one's own object from another's after a lost answer.
    ObjectNonce
}

impl WriterId {
    /// The vault's owner, whose public key stands in the vault header.
    pub const OWNER: WriterId = WriterId([0; 16]);
}

macro_rules! secret {
    ($(#[$doc:meta])* $vis:vis $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Zeroize, ZeroizeOnDrop)]
        $vis struct $name([u8; 32]);

        impl $name {
            /// A secret from its 32 bytes.
            $vis fn new(bytes: [u8; 32]) -> $name {
                $name(bytes)
            }

            /// The secret's bytes, for sealing them.
            $vis fn expose(&self) -> &[u8; 32] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(secret)"))
            }
        }
    };
}
pub(crate) use secret;

secret! {
    /// Encrypts everything that is not disk data: indexes, manifests, the catalog.
    pub IndexKey
}
secret! {
    /// Names of manifests and catalog entries are tagged under it, so that nobody without it can burn numbers.
    pub NameKey
}
secret! {
    /// Seed of an Ed25519 signing key.
    pub SigningSecret
}

/// The vault owner's signing secret.
pub type OwnerSecret = SigningSecret;

/// An Ed25519 public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyingKey(pub [u8; 32]);

impl VerifyingKey {
    /// Whether `signature` was made over `message` by the secret of this key.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(message, signature).is_ok()
    }
}

impl SigningSecret {
    /// A new secret.
    pub fn generate(entropy: &dyn Entropy) -> SigningSecret {
        SigningSecret(entropy.bytes())
    }

    pub(crate) fn pair(&self) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&self.0).expect("every 32 bytes are an Ed25519 seed")
    }

    /// The secret that opens what is sealed to its holder. Derived, so that whoever can sign as a writer can also read what
    /// is meant for that writer, and there is one secret to keep.
    pub(crate) fn sealing(&self) -> SealingSecret {
        SealingSecret::new(blake3::derive_key("farshore writer sealing key v1", &self.0))
    }

    /// The public half.
    pub fn public(&self) -> VerifyingKey {
        VerifyingKey(self.pair().public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes"))
    }
}

/// The keys that the read-key holder and every granted writer share from the beginning.
#[derive(Debug, Clone)]
pub struct SharedKeys {
    /// Under which indexes, manifests and the catalog are encrypted.
    pub index: IndexKey,
    /// Under which leaf hashes are stored.
    pub leaf: LeafKey,
    /// Under which object names are tagged in the first epoch.
    pub name: NameKey,
}

impl SharedKeys {
    /// Encoded length in bytes.
    pub(crate) const LEN: usize = 96;

    /// New keys for a new vault.
    pub(crate) fn generate(entropy: &dyn Entropy) -> SharedKeys {
        SharedKeys {
            index: IndexKey::new(entropy.bytes()),
            leaf: LeafKey::new(entropy.bytes()),
            name: NameKey::new(entropy.bytes()),
        }
    }

    pub(crate) fn to_bytes(&self) -> zeroize::Zeroizing<[u8; SharedKeys::LEN]> {
        let mut bytes = zeroize::Zeroizing::new([0; SharedKeys::LEN]);
        bytes[..32].copy_from_slice(self.index.expose());
        bytes[32..64].copy_from_slice(self.leaf.expose());
        bytes[64..].copy_from_slice(self.name.expose());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; SharedKeys::LEN]) -> SharedKeys {
        let part = |at: usize| bytes[at..at + 32].try_into().expect("a third of 96 bytes");
        SharedKeys { index: IndexKey::new(part(0)), leaf: LeafKey::new(part(32)), name: NameKey::new(part(64)) }
    }
}
