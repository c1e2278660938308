//! What a writer holds, and the data key it uses for an hour.

use std::fmt;
use std::sync::{Arc, Mutex};

use replication::codec::{DecodeError, Decoder, Encoder};
use replication::{ChainId, Generation};
use ring::signature::Ed25519KeyPair;
use world::{Clock, Entropy};
use zeroize::Zeroizing;

use super::{
    Grant, ObjectNonce, ReadPublic, SealedKey, SharedKeys, SigningSecret, VaultId, VerifyingKey, WriterId, secret,
};
use zeroize::{Zeroize, ZeroizeOnDrop};

secret! {
    /// Encrypts the disk data that one writer commits within one hour.
    pub(crate) DataKey
}

/// Everything a process server or branch host needs to write to a vault, and nothing that decrypts disk data.
///
/// Kept in a private file of its holder.
#[derive(Debug, Clone)]
pub struct WriterKeys {
    /// The vault they are for.
    pub vault: VaultId,
    /// The holder's grant, as it stands in the vault.
    pub grant: Grant,
    /// The holder's signing secret.
    pub signing: SigningSecret,
    /// Index, leaf and name key.
    pub shared: SharedKeys,
    /// Data keys are sealed to it.
    pub read_public: ReadPublic,
    /// Grants are verified with it.
    pub owner_public: VerifyingKey,
}

/// A file is not a writer's key file.
#[derive(Debug, thiserror::Error)]
pub enum WriterKeysError {
    /// It does not begin as one, or a newer program wrote it.
    #[error("this is not a writer's key file of a version this program knows")]
    NotAKeyFile,
    /// It was changed since it was written.
    #[error(
        "the key file is damaged: its checksum does not match; take it from a copy, or have the writer granted anew"
    )]
    Damaged,
    /// Its checksum is right and its content is not.
    #[error("the key file holds fields this program does not understand")]
    Malformed(#[from] DecodeError),
}

const MAGIC: &[u8; 8] = b"FSWRITER";
const VERSION: u16 = 1;

impl WriterKeys {
    /// The writer's id.
    pub fn writer(&self) -> WriterId {
        self.grant.writer
    }

    /// The bytes of the private file.
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Encoder::new();
        out.raw(MAGIC).u16(VERSION).raw(&self.vault.0);
        self.grant.encode(&mut out);
        out.raw(self.signing.expose())
            .raw(self.shared.to_bytes().as_slice())
            .raw(&self.read_public.0)
            .raw(&self.owner_public.0);
        let mut bytes = out.finish();
        let checksum = blake3::hash(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        Zeroizing::new(bytes)
    }

    /// Reads a private file.
    ///
    /// # Errors
    /// Says whether it is another file, damaged, or newer.
    pub fn from_bytes(bytes: &[u8]) -> Result<WriterKeys, WriterKeysError> {
        let (content, checksum) = bytes
            .split_last_chunk::<32>()
            .filter(|(content, _)| content.starts_with(MAGIC))
            .ok_or(WriterKeysError::NotAKeyFile)?;
        if blake3::hash(content) != *checksum {
            return Err(WriterKeysError::Damaged);
        }
        let mut input = Decoder::new(content[MAGIC.len()..].to_vec());
        if input.u16("version")? != VERSION {
            return Err(WriterKeysError::NotAKeyFile);
        }
        let keys = WriterKeys {
            vault: VaultId(input.array("vault id")?),
            grant: Grant::decode(&mut input)?,
            signing: SigningSecret::new(input.array("signing secret")?),
            shared: SharedKeys::from_bytes(&input.array("shared keys")?),
            read_public: ReadPublic(input.array("read key")?),
            owner_public: VerifyingKey(input.array("owner key")?),
        };
        input.finish()?;
        Ok(keys)
    }
}

/// A running writer: its keys, the world, and the data key of the current hour. Shared by all its threads.
pub struct WriterSession {
    keys: WriterKeys,
    signing: Ed25519KeyPair,
    entropy: Arc<dyn Entropy>,
    clock: Arc<dyn Clock>,
    hour: Mutex<Option<HourKey>>,
}

/// The data key of one writer and hour with its sealed form, which goes into each header.
#[derive(Clone)]
pub(crate) struct HourKey {
    pub(crate) hour: u64,
    pub(crate) key: DataKey,
    pub(crate) sealed: SealedKey,
}

impl fmt::Debug for WriterSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriterSession").field("writer", &self.keys.writer()).finish_non_exhaustive()
    }
}

/// HPKE `info` of data keys.
pub(crate) const DATA_KEY_INFO: &[u8] = b"farshore data key v1";

/// What a sealed data key is bound to.
pub(crate) fn data_key_associated(vault: VaultId, writer: WriterId, hour: u64) -> Vec<u8> {
    [vault.0.as_slice(), &writer.0, &hour.to_le_bytes()].concat()
}

impl WriterSession {
    /// A session of the holder of `keys`.
    ///
    /// # Errors
    /// [`WriterKeysError::NotAKeyFile`] if the vault's read key in `keys` is unusable.
    pub fn new(
        keys: WriterKeys,
        entropy: Arc<dyn Entropy>,
        clock: Arc<dyn Clock>,
    ) -> Result<WriterSession, WriterKeysError> {
        // Sealing once here is the proof that it cannot fail later, when nobody could handle it.
        keys.read_public.seal(&[0; 32], DATA_KEY_INFO, &[], entropy.as_ref()).ok_or(WriterKeysError::NotAKeyFile)?;
        let signing = keys.signing.pair();
        Ok(WriterSession { keys, signing, entropy, clock, hour: Mutex::new(None) })
    }

    /// The keys it writes with.
    pub fn keys(&self) -> &WriterKeys {
        &self.keys
    }

    /// Where its randomness comes from.
    pub fn entropy(&self) -> &dyn Entropy {
        self.entropy.as_ref()
    }

    /// Its clock.
    pub fn clock(&self) -> &dyn Clock {
        self.clock.as_ref()
    }

    pub(crate) fn new_nonce(&self) -> ObjectNonce {
        ObjectNonce(self.entropy.bytes())
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.signing.sign(message).as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }

    /// The data key of the hour that the wall clock shows.
    pub(crate) fn hour_key(&self) -> HourKey {
        let hour = self.clock.wall().seconds() / 3600;
        let mut current = self.hour.lock().expect("nothing panics while holding the hour's key");
        match current.as_ref() {
            Some(known) if known.hour == hour => known.clone(),
            _ => {
                let key = DataKey::new(self.entropy.bytes());
                let associated = data_key_associated(self.keys.vault, self.keys.writer(), hour);
                let sealed = self
                    .keys
                    .read_public
                    .seal(key.expose(), DATA_KEY_INFO, &associated, self.entropy())
                    .expect("the read key took a seal when the session began");
                current.insert(HourKey { hour, key, sealed }).clone()
            }
        }
    }

    /// A name for a new segment of `generation`, never used before.
    pub fn segment_name(&self, chain: ChainId, generation: Generation) -> crate::ObjectName {
        crate::layout::segment(chain, generation, u128::from_le_bytes(self.entropy.bytes()))
    }

    /// A name for a new pack of this writer, never used before.
    pub fn pack_name(&self) -> crate::ObjectName {
        crate::layout::pack(self.keys.writer(), u128::from_le_bytes(self.entropy.bytes()))
    }
}
