//! Epochs of the name key. Each revocation begins one, so that a writer whose grant ended can name nothing any more.
//!
//! The key of epoch 0 is one of the shared keys. The key of a later one lies in the vault once for each who may have it,
//! sealed to the read key and to the sealing key of every granted writer. The catalog entry that begins the epoch states
//! the key's *check*, and so which copies are good: a revocation that was interrupted leaves copies of a key that never
//! comes into use, and whoever can create objects cannot get in the way with copies of his own.

use replication::codec::{DecodeError, Decoder, Encoder};
use world::Entropy;

use super::{NameKey, SealedKey, SealingPublic, SealingSecret, VaultId, WriterId};

/// One name key after another. The catalog begins at the first, and so does every chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NameEpoch(pub u32);

impl NameEpoch {
    /// The epoch in which a vault is made.
    pub const FIRST: NameEpoch = NameEpoch(0);

    /// The epoch that the next revocation begins.
    pub fn next(self) -> NameEpoch {
        NameEpoch(self.0.checked_add(1).expect("nobody revokes four billion grants"))
    }

    pub(crate) fn encode(self, out: &mut Encoder) {
        out.varint(self.0.into());
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<NameEpoch, DecodeError> {
        Ok(NameEpoch(input.varint_max("name-key epoch", u32::MAX.into())? as u32))
    }
}

impl std::fmt::Display for NameEpoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// From here on names are made in another epoch. The check keeps apart the epoch's key and any other that was ever made
/// for it, and cannot be stated by anybody before the key exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NameSwitch {
    /// Which epoch.
    pub epoch: NameEpoch,
    /// Hash of its key.
    pub check: [u8; 16],
}

impl NameSwitch {
    /// Whether it leads out of `epoch`. Revocations that knew of all before them always do; not every number was used.
    pub(crate) fn follows(&self, epoch: NameEpoch) -> bool {
        self.epoch > epoch
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        self.epoch.encode(out);
        out.raw(&self.check);
    }

    pub(crate) fn decode(input: &mut Decoder) -> Result<NameSwitch, DecodeError> {
        Ok(NameSwitch { epoch: NameEpoch::decode(input)?, check: input.array("check of a name key")? })
    }
}

/// HPKE `info` of sealed name keys.
const NAME_KEY_INFO: &[u8] = b"farshore name key v1";

impl NameKey {
    pub(crate) fn generate(entropy: &dyn Entropy) -> NameKey {
        NameKey::new(entropy.bytes())
    }

    pub(crate) fn switch_to(&self, epoch: NameEpoch) -> NameSwitch {
        let hash = blake3::derive_key("farshore name key check v1", self.expose());
        NameSwitch { epoch, check: *hash.first_chunk().expect("a hash has 32 bytes") }
    }
}

/// A copy of a later epoch's name key, as the clear fields of its object hold it.
pub(crate) struct SealedNameKey {
    /// Which epoch's, and its check, in the clear: who cannot open the copy still knows that the owner made this key.
    pub(crate) switch: NameSwitch,
    sealed: SealedKey,
}

impl SealedNameKey {
    /// The key of `epoch` for `to`, who holds the secret of `public`. `None` if that is no usable key.
    pub(crate) fn seal(
        key: &NameKey,
        epoch: NameEpoch,
        (vault, to): (VaultId, WriterId),
        public: &SealingPublic,
        entropy: &dyn Entropy,
    ) -> Option<SealedNameKey> {
        let sealed = public.seal(key.expose(), NAME_KEY_INFO, &associated(vault, epoch, to), entropy)?;
        Some(SealedNameKey { switch: key.switch_to(epoch), sealed })
    }

    /// The key, if this copy is for `to`, and holds what it says it holds.
    pub(crate) fn open(&self, vault: VaultId, to: WriterId, secret: &SealingSecret) -> Option<NameKey> {
        let bytes = secret.unseal(&self.sealed, NAME_KEY_INFO, &associated(vault, self.switch.epoch, to))?;
        let key = bytes.as_slice().try_into().ok().map(NameKey::new)?;
        (key.switch_to(self.switch.epoch) == self.switch).then_some(key)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        [self.switch.check.as_slice(), &self.sealed.0].concat()
    }

    pub(crate) fn decode(epoch: NameEpoch, clear: &[u8]) -> Option<SealedNameKey> {
        let (check, sealed) = clear.split_first_chunk()?;
        Some(SealedNameKey { switch: NameSwitch { epoch, check: *check }, sealed: SealedKey(sealed.to_vec()) })
    }
}

/// What a sealed name key is bound to. The holder of the read key is the owner, whose id is zero.
fn associated(vault: VaultId, epoch: NameEpoch, recipient: WriterId) -> Vec<u8> {
    [vault.0.as_slice(), &epoch.0.to_le_bytes(), &recipient.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::SigningSecret;

    struct Fixed(u8);

    impl Entropy for Fixed {
        fn fill(&self, buffer: &mut [u8]) {
            buffer.fill(self.0);
        }
    }

    #[test]
    fn a_name_key_opens_for_its_recipient_in_its_epoch_only() {
        let (writer, other) =
            (SigningSecret::generate(&Fixed(1)).sealing(), SigningSecret::generate(&Fixed(2)).sealing());
        let key = NameKey::generate(&Fixed(3));
        let (vault, epoch, id) = (VaultId([4; 16]), NameEpoch(7), WriterId([5; 16]));
        let sealed = SealedNameKey::seal(&key, epoch, (vault, id), &writer.public(), &Fixed(6)).expect("a usable key");
        let bytes = sealed.encode();
        let copy = |epoch, bytes: &[u8]| SealedNameKey::decode(epoch, bytes).expect("it is long enough");
        let opened = copy(epoch, &bytes).open(vault, id, &writer).expect("it opens");
        assert_eq!(opened.switch_to(epoch), key.switch_to(epoch));
        assert_ne!(opened.switch_to(epoch), NameKey::generate(&Fixed(9)).switch_to(epoch));
        assert!(copy(epoch, &bytes).open(vault, id, &other).is_none());
        assert!(copy(epoch.next(), &bytes).open(vault, id, &writer).is_none());
        assert!(copy(epoch, &bytes).open(vault, WriterId([6; 16]), &writer).is_none());
        assert!(copy(epoch, &bytes).open(VaultId([5; 16]), id, &writer).is_none());
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert!(copy(epoch, &changed).open(vault, id, &writer).is_none(), "byte {index}");
        }
        assert!(SealedNameKey::decode(epoch, &bytes[..15]).is_none());
    }
}
