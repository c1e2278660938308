//! What can go wrong with a vault, by what the caller should do.

use replication::codec::DecodeError;

use crate::store::{ObjectName, StoreError};

/// Why an operation on a vault failed.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The store failed; see there whether to retry.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object is not what was once written. Its bytes are never returned. Recover it from another copy.
    #[error("the object {name} is damaged: {damage}")]
    Damaged {
        /// Which object.
        name: ObjectName,
        /// What is wrong with it.
        damage: Damage,
    },
    /// The object is well-formed but nobody with a grant for this vault wrote it. It is ignored where it may be.
    #[error("the object {name} does not belong here: {reason}")]
    Foreign {
        /// Which object.
        name: ObjectName,
        /// Why it is not accepted.
        reason: &'static str,
    },
    /// A newer program wrote it. Upgrade this one.
    #[error("the object {name} has a format this program does not know ({what}); use a newer Farshore")]
    NewerFormat {
        /// Which object.
        name: ObjectName,
        /// What is unknown.
        what: String,
    },
    /// The operation needs a key that is not at hand. Unlock the vault.
    #[error("{name} is encrypted and the vault's read key is not at hand; unlock the vault first")]
    Locked {
        /// The object that was to be read.
        name: ObjectName,
    },
    /// There is no vault at this place.
    #[error("there is no vault in {place}: {reason}")]
    NotAVault {
        /// Where it was looked for.
        place: String,
        /// What was found instead.
        reason: String,
    },
    /// The place holds a vault already.
    #[error("{place} already holds the vault {vault}; it was left as it is")]
    AlreadyAVault {
        /// Where.
        place: String,
        /// Which vault.
        vault: crate::keys::VaultId,
    },
    /// The passphrase opens no key slot. Try again, or use the recovery key.
    #[error("the passphrase does not open this vault")]
    WrongPassphrase,
    /// The recovery key is well-formed but is another vault's.
    #[error("the recovery key does not open this vault: it belongs to another one")]
    WrongRecoveryKey,
    /// Another writer won the chain's next manifest. Final for this generation: stop, quarantine what is not
    /// committed, and open a new generation only if one should still be writing.
    #[error("another writer took over the chain at manifest {number}")]
    Fenced {
        /// The number that was lost.
        number: u64,
    },
    /// An object that does not count holds the name of this manifest. Begin, fill and prepare it again: it gets the
    /// next number.
    #[error("number {number} of the chain is taken by an object that does not count")]
    NumberBurnt {
        /// The burnt number.
        number: u64,
    },
    /// The chain was closed by a failover: nobody writes to it until that is cancelled, and never again once it is
    /// committed.
    #[error("chain {chain} was closed by a failover to the branch {successor}{}", if *.ended { ", which is committed" } else { "" })]
    ChainClosed {
        /// Which chain.
        chain: replication::ChainId,
        /// The branch that goes on instead.
        successor: replication::ChainId,
        /// The failover is committed: this chain has ended.
        ended: bool,
    },
    /// The writer's grant was revoked. Have it granted anew.
    #[error("the grant of writer {writer} was revoked")]
    Revoked {
        /// Who.
        writer: crate::keys::WriterId,
    },
    /// Names go on under a key that the holder of these keys was not given, or whose copies are lost. Bring the vault's
    /// `keys/` back from a copy, or have the writer granted anew.
    #[error("the vault's names go on under a later name key (epoch {epoch}), of which no copy opens here")]
    NameKeyMissing {
        /// The epoch of the key.
        epoch: crate::keys::NameEpoch,
    },
    /// The writer's grant does not reach that far.
    #[error("writer {writer} may not do this: {reason}")]
    NotPermitted {
        /// Who.
        writer: crate::keys::WriterId,
        /// What it lacks.
        reason: &'static str,
    },
    /// What the vault was unlocked with opens the read key only.
    #[error("this takes the vault owner's key, and what the vault was unlocked with opens its read key only")]
    OwnerKeyNeeded,
    /// The chain already exists, or does not.
    #[error("chain {chain}: {reason}")]
    WrongChainState {
        /// Which chain.
        chain: replication::ChainId,
        /// What is the case.
        reason: &'static str,
    },
    /// A bound of the format would be exceeded. A mistake of the caller.
    #[error("{what} is {value}, the limit is {limit}")]
    LimitExceeded {
        /// What is too large.
        what: &'static str,
        /// How large it is.
        value: u64,
        /// How large it may be.
        limit: u64,
    },
}

/// What is wrong with a damaged object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It does not begin like one of ours.
    #[error("it is not a Farshore object")]
    NotAnObject,
    /// It ends too early.
    #[error("it ends after {found} of {expected} bytes")]
    Truncated {
        /// Bytes present.
        found: u64,
        /// Bytes expected.
        expected: u64,
    },
    /// Its header cannot be understood.
    #[error("its header is malformed: {0}")]
    Header(DecodeError),
    /// Its header or name was changed after it was signed.
    #[error("its signature does not match")]
    Signature,
    /// Its body does not match the digest in its header.
    #[error("its body does not match its checksum")]
    Body,
    /// A frame does not decrypt.
    #[error("frame {0} does not authenticate")]
    Frame(u32),
    /// A frame decrypts but does not decompress to its stated length.
    #[error("frame {0} does not decompress to its stated length")]
    Compression(u32),
    /// It decrypts, but what it says cannot be understood.
    #[error("its content is malformed: {0}")]
    Content(DecodeError),
    /// It decrypts, but contradicts another object.
    #[error("{0}")]
    Contradiction(&'static str),
}

impl VaultError {
    pub(crate) fn damaged(name: &ObjectName, damage: Damage) -> VaultError {
        VaultError::Damaged { name: name.clone(), damage }
    }

    /// For decoding what a frame of `name` holds.
    pub(crate) fn content(name: &ObjectName) -> impl Fn(DecodeError) -> VaultError + '_ {
        move |error| VaultError::damaged(name, Damage::Content(error))
    }

    /// Whether this is a verdict about one immutable object that every reader reaches alike: it is damaged or
    /// foreign, and will be for ever. Failures of the store and newer formats are no verdicts.
    pub fn condemns_object(&self) -> bool {
        matches!(self, VaultError::Damaged { .. } | VaultError::Foreign { .. })
    }
}
