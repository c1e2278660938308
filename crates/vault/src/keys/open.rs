//! What a reader holds.

mod names;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, RwLock};

use replication::codec::Decoder;

use super::revoked::Revocations;
use super::writer::{DATA_KEY_INFO, data_key_associated};
use super::{
    Authority, DataKey, Grant, NameEpoch, NameKey, ReadSecret, Revocation, SealedKey, SealingSecret, SharedKeys,
    VaultId, VerifyingKey, WriterId, WriterKeys,
};
use crate::error::{Damage, VaultError};
use crate::layout;
use crate::limits;
use crate::object::{Header, ObjectKind, ObjectReader, ParsedHeader, verify_signature};
use crate::store::{ObjectName, Store, StoreError};

/// The keys of a reader: shared keys, the owner's public key, grants verified so far, and, if the vault was unlocked
/// here, the read secret. Shared by all threads.
pub struct OpenKeys {
    vault: VaultId,
    owner: VerifyingKey,
    shared: SharedKeys,
    read: Option<ReadSecret>,
    /// The writer whose keys these are, and what opens what is sealed to it.
    writer: Option<(WriterId, SealingSecret)>,
    /// Name keys of the epochs that were met so far.
    names: Mutex<BTreeMap<NameEpoch, NameKey>>,
    grants: RwLock<HashMap<WriterId, Grant>>,
    revocations: Mutex<Revocations>,
    /// Unsealing costs an X25519 operation; a writer uses one sealed key for an hour.
    data_keys: Mutex<HashMap<SealedKey, DataKey>>,
    /// Digests of what was signed, by whom and how, where that was found to be so. Following a chain reads the same
    /// manifests again and again, and a signature costs more than all else about them.
    verified: Mutex<HashSet<[u8; 32]>>,
}

impl fmt::Debug for OpenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenKeys").field("vault", &self.vault).field("unlocked", &self.is_unlocked()).finish()
    }
}

impl OpenKeys {
    pub(crate) fn new(vault: VaultId, owner: VerifyingKey, shared: SharedKeys, read: Option<ReadSecret>) -> OpenKeys {
        let names = Mutex::new(BTreeMap::from([(NameEpoch::FIRST, shared.name.clone())]));
        OpenKeys {
            vault,
            owner,
            shared,
            read,
            writer: None,
            names,
            grants: RwLock::new(HashMap::new()),
            revocations: Mutex::default(),
            data_keys: Mutex::new(HashMap::new()),
            verified: Mutex::new(HashSet::new()),
        }
    }

    /// What a writer can read by itself: everything but disk data.
    pub fn of_writer(keys: &WriterKeys) -> OpenKeys {
        let writer = Some((keys.writer(), keys.signing.sealing()));
        OpenKeys { writer, ..OpenKeys::new(keys.vault, keys.owner_public, keys.shared.clone(), None) }
    }

    /// The vault they open.
    pub fn vault(&self) -> VaultId {
        self.vault
    }

    /// Index, leaf and name key.
    pub fn shared(&self) -> &SharedKeys {
        &self.shared
    }

    /// The owner's public key.
    pub fn owner(&self) -> VerifyingKey {
        self.owner
    }

    /// Whether disk data can be decrypted.
    pub fn is_unlocked(&self) -> bool {
        self.read.is_some()
    }

    /// The key that objects of `writer` are signed with, after verifying its grant.
    pub(crate) fn verifying_key(
        &self,
        store: &Arc<dyn Store>,
        object: &ObjectName,
        writer: WriterId,
    ) -> Result<VerifyingKey, VaultError> {
        if writer == WriterId::OWNER {
            return Ok(self.owner);
        }
        match self.grant(store, writer) {
            Ok(grant) => Ok(grant.key),
            Err(VaultError::Store(StoreError::NotFound(_))) => {
                Err(VaultError::Foreign { name: object.clone(), reason: "its writer has no grant for this vault" })
            }
            Err(error) => Err(error),
        }
    }

    /// Accepts what the holder of `keys` signs, without a grant in the vault. For a writer whose objects never leave
    /// this host, such as a branch on a vault that takes no writes.
    pub fn trust_on_this_host(&self, keys: &WriterKeys) {
        let mut grants = self.grants.write().expect("nothing panics while holding the grants");
        grants.insert(keys.writer(), keys.grant.clone());
    }

    /// On whose word `writer` signs.
    ///
    /// # Errors
    /// As [`OpenKeys::grant`].
    pub fn authority(&self, store: &Arc<dyn Store>, writer: WriterId) -> Result<Authority, VaultError> {
        match writer {
            WriterId::OWNER => Ok(Authority::Owner),
            _ => Ok(self.grant(store, writer)?.authority()),
        }
    }

    pub(crate) fn with_revocations<R>(&self, work: impl FnOnce(&mut Revocations) -> R) -> R {
        work(&mut self.revocations.lock().expect("nothing panics while holding the revocations"))
    }

    /// The revocations that were read with the last catalog or chain.
    pub fn revocations(&self) -> BTreeMap<WriterId, Revocation> {
        self.with_revocations(|known| known.all())
    }

    /// The verified grant of `writer`.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if there is none; [`VaultError::Damaged`] if the owner did not sign it.
    pub fn grant(&self, store: &Arc<dyn Store>, writer: WriterId) -> Result<Grant, VaultError> {
        if let Some(grant) = self.grants.read().expect("nothing panics while holding the grants").get(&writer) {
            return Ok(grant.clone());
        }
        let name = layout::grant(writer);
        let object = ObjectReader::open(store, self, &name)?;
        if object.header().writer != WriterId::OWNER || object.header().placement.kind != ObjectKind::Grant {
            return Err(VaultError::Foreign { name, reason: "it is no grant of the vault's owner" });
        }
        let mut input = Decoder::new(object.root()?);
        let grant = Grant::decode(&mut input).map_err(VaultError::content(&name))?;
        input.finish().map_err(VaultError::content(&name))?;
        if grant.writer != writer {
            return Err(VaultError::damaged(&name, Damage::Contradiction("it grants to another writer")));
        }
        self.grants.write().expect("nothing panics while holding the grants").insert(writer, grant.clone());
        Ok(grant)
    }

    /// Verifies the signature of the object `name`, unless these very bytes under this name were verified before.
    pub(crate) fn verify_once(
        &self,
        name: &ObjectName,
        parsed: &ParsedHeader,
        signer: VerifyingKey,
    ) -> Result<(), VaultError> {
        let mut digest = blake3::Hasher::new();
        digest.update(&signer.0).update(&parsed.signature).update(&(name.as_str().len() as u64).to_le_bytes());
        let digest = *digest.update(name.as_str().as_bytes()).update(&parsed.bytes).finalize().as_bytes();
        if self.verified.lock().expect("nothing panics while holding the verified headers").contains(&digest) {
            return Ok(());
        }
        verify_signature(name, parsed, signer)?;
        let mut verified = self.verified.lock().expect("nothing panics while holding the verified headers");
        if verified.len() >= limits::HEADERS_VERIFIED_MAX {
            verified.clear();
        }
        verified.insert(digest);
        Ok(())
    }

    /// The data key of an object, if it has one and this reader can unseal it.
    pub(crate) fn data_key(&self, name: &ObjectName, header: &Header) -> Result<Option<DataKey>, VaultError> {
        let (Some(read), Some((_, sealed))) = (&self.read, header.recipients.iter().find(|(epoch, _)| *epoch == 0))
        else {
            return Ok(None);
        };
        let mut cache = self.data_keys.lock().expect("nothing panics while holding the data keys");
        if let Some(key) = cache.get(sealed) {
            return Ok(Some(key.clone()));
        }
        let associated = data_key_associated(header.vault, header.writer, header.hour);
        let key = read
            .unseal(sealed, DATA_KEY_INFO, &associated)
            .and_then(|bytes| <[u8; 32]>::try_from(bytes.as_slice()).ok())
            .map(DataKey::new)
            .ok_or_else(|| {
                VaultError::damaged(name, Damage::Contradiction("its data key is not sealed to this vault's read key"))
            })?;
        if cache.len() >= limits::DATA_KEYS_CACHED_MAX {
            cache.clear();
        }
        cache.insert(sealed.clone(), key.clone());
        Ok(Some(key))
    }
}
