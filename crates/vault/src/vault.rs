//! A vault as a whole: made, opened, unlocked, and opened to writers.
//!
//! The header object `vault` is created last. A crash while a vault is being made leaves key objects that belong to no
//! vault; making it again ignores them.

use std::sync::Arc;

use replication::codec::{Decoder, Encoder};
use world::{Clock, Entropy};

use crate::error::{Damage, VaultError};
use crate::keys::{
    Grant, KeySlot, NameEpoch, NameKey, OpenKeys, OwnerSecret, PassphraseCost, ReadPublic, ReadSecret, RecoveryKey,
    SealedKey, SealedNameKey, SealingPublic, SharedKeys, SigningSecret, SlotKind, SlotOf, VaultId, VaultSecrets,
    VerifyingKey, WriterId, WriterKeys, WriterRole, WriterSession, revoked,
};
use crate::layout;
use crate::limits;
use crate::object::{
    Compression, FrameClass, Header, ObjectBuilder, ObjectKind, Placement, SealedObject, read_header, verify_signature,
};
use crate::store::{ObjectName, Store, StoreError};

/// A vault whose header was read. Locked: nothing can be decrypted with it alone.
#[derive(Clone)]
pub struct Vault {
    store: Arc<dyn Store>,
    id: VaultId,
    owner: VerifyingKey,
    read: ReadPublic,
    created_seconds: u64,
}

/// What opens a vault.
#[derive(Debug, Clone, Copy)]
pub enum Credential<'a> {
    /// The passphrase chosen when the vault was made.
    Passphrase(&'a str),
    /// The recovery key from the recovery kit.
    Recovery(&'a RecoveryKey),
}

/// A vault with its read key: can read everything. If what unlocked it opened the owner's key too, it can also grant to
/// writers and revoke.
#[derive(Clone)]
pub struct UnlockedVault {
    vault: Vault,
    secrets: VaultSecrets,
    shared: SharedKeys,
    keys: Arc<OpenKeys>,
}

/// A key slot of a vault, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotInfo {
    /// The number in its name.
    pub id: u64,
    /// What opens it.
    pub kind: SlotKind,
    /// A later slot took its place: it is not tried any more.
    pub superseded: bool,
}

/// A slot with its place.
struct StoredSlot {
    id: u64,
    slot: KeySlot,
}

const SHARED_KEYS_INFO: &[u8] = b"farshore shared keys v1";

impl Vault {
    /// Makes a vault in an empty `store`. Probe the store with [`crate::probe_create_only`] first.
    ///
    /// The recovery key is returned this once and stored nowhere: print it.
    ///
    /// # Errors
    /// [`VaultError::AlreadyAVault`] or [`VaultError::NotAVault`] if the store holds something already.
    pub fn create(
        store: Arc<dyn Store>,
        passphrase: &str,
        cost: PassphraseCost,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> Result<(UnlockedVault, RecoveryKey), VaultError> {
        match Vault::open(Arc::clone(&store)) {
            Ok(found) => return Err(VaultError::AlreadyAVault { place: store.describe(), vault: found.id }),
            Err(VaultError::NotAVault { .. }) => {}
            Err(error) => return Err(error),
        }
        store.for_each("", |name| {
            let leftover = [layout::KEYS, "probe/"].iter().any(|folder| name.as_str().starts_with(folder));
            match leftover {
                true => Ok(true),
                false => Err(VaultError::NotAVault {
                    place: store.describe(),
                    reason: format!("it holds other files ({name}); name an empty place for a new vault"),
                }),
            }
        })?;
        let dyn_entropy = entropy.as_ref();
        let secrets =
            VaultSecrets { read: ReadSecret::generate(dyn_entropy), owner: Some(OwnerSecret::generate(dyn_entropy)) };
        let shared = SharedKeys::generate(dyn_entropy);
        let recovery = RecoveryKey::generate(dyn_entropy);
        let vault = Vault {
            store,
            id: VaultId(dyn_entropy.bytes()),
            owner: secrets.owner.as_ref().expect("it was just made").public(),
            read: secrets.read.public(),
            created_seconds: clock.wall().seconds(),
        };
        let unlocked = UnlockedVault::new(vault, secrets, shared);
        let session = unlocked.owner_session(entropy, clock)?;
        unlocked.put_shared_keys(&session)?;
        let vault = &unlocked.vault;
        for slot in [
            KeySlot::under_passphrase(
                passphrase,
                SlotKind::Passphrase(cost),
                vault.slot_of(),
                &unlocked.secrets,
                dyn_entropy,
            ),
            KeySlot::under_recovery_key(&recovery, vault.slot_of(), &unlocked.secrets, dyn_entropy),
        ] {
            unlocked.put_slot(&session, &slot)?;
        }
        let mut clear = Encoder::new();
        clear.raw(&vault.owner.0).raw(&vault.read.0).u64(vault.created_seconds);
        let header = ObjectBuilder::new(&session, Placement::of_vault(ObjectKind::VaultHeader), layout::vault_header())
            .finish_with_clear(None, clear.finish());
        match header.put(vault.store.as_ref()) {
            Err(StoreError::AlreadyExists(_)) => {
                let found = Vault::open(Arc::clone(&vault.store))?;
                Err(VaultError::AlreadyAVault { place: vault.store.describe(), vault: found.id })
            }
            Err(error) => Err(error.into()),
            Ok(()) => Ok((unlocked, recovery)),
        }
    }

    /// Reads the header of the vault in `store`.
    ///
    /// The header is self-signed; that it is the owner's own is proved by unlocking, or by comparing
    /// [`Vault::fingerprint`] with the recovery kit.
    ///
    /// # Errors
    /// [`VaultError::NotAVault`] if the place is empty or holds something else, [`VaultError::NewerFormat`] if a newer
    /// program made it.
    pub fn open(store: Arc<dyn Store>) -> Result<Vault, VaultError> {
        let not_a_vault = |reason: &str| VaultError::NotAVault { place: store.describe(), reason: reason.to_owned() };
        let name = layout::vault_header();
        let (parsed, _) = match read_header(store.as_ref(), &name, limits::HEADER_READ_BYTES) {
            Err(VaultError::Store(StoreError::NotFound(_))) => {
                return Err(match store.list("", None, 1)?.is_empty() {
                    true => not_a_vault("it is empty"),
                    false => not_a_vault("it holds files, but no vault header"),
                });
            }
            Err(VaultError::Damaged { damage: Damage::NotAnObject, .. }) => {
                return Err(not_a_vault("the file named \"vault\" is not a vault header"));
            }
            other => other?,
        };
        let mut input = Decoder::new(parsed.header.clear.clone());
        let content = VaultError::content(&name);
        let owner = VerifyingKey(input.array("owner key").map_err(&content)?);
        let read = ReadPublic(input.array("read key").map_err(&content)?);
        let created_seconds = input.u64("creation time").map_err(&content)?;
        input.finish().map_err(&content)?;
        verify_signature(&name, &parsed, owner)?;
        if parsed.header.placement.kind != ObjectKind::VaultHeader || parsed.header.writer != WriterId::OWNER {
            return Err(not_a_vault("the object named \"vault\" is not a vault header"));
        }
        Ok(Vault { store, id: parsed.header.vault, owner, read, created_seconds })
    }

    /// Where its objects are.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Its id.
    pub fn id(&self) -> VaultId {
        self.id
    }

    /// Wall time at which it was made, in seconds since 1970.
    pub fn created_seconds(&self) -> u64 {
        self.created_seconds
    }

    /// Identifies the vault and its owner: printed in the recovery kit, compared by people. Sixteen hexadecimal
    /// digits in groups of four.
    pub fn fingerprint(&self) -> String {
        let material = [self.id.0.as_slice(), &self.owner.0, &self.read.0].concat();
        let digest = blake3::derive_key("farshore vault fingerprint v1", &material);
        let groups: Vec<String> = digest[..8].chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
        groups.join("-")
    }

    /// Opens the vault's secrets.
    ///
    /// # Errors
    /// [`VaultError::WrongPassphrase`] or [`VaultError::WrongRecoveryKey`] if no key slot opens; a damaged slot is
    /// reported only if none of the others opens.
    pub fn unlock(&self, credential: Credential<'_>) -> Result<UnlockedVault, VaultError> {
        let (secrets, _) = self.open_slot(credential)?;
        self.unlock_with(secrets)
    }

    /// Opens the vault with its read secret, as another process of this host hands it over.
    ///
    /// # Errors
    /// [`VaultError::Foreign`] if it is another vault's.
    pub fn unlock_reading(&self, read: ReadSecret) -> Result<UnlockedVault, VaultError> {
        if read.public() != self.read {
            let name = layout::vault_header();
            return Err(VaultError::Foreign { name, reason: "the read key at hand is another vault's" });
        }
        self.unlock_with(VaultSecrets { read, owner: None })
    }

    fn unlock_with(&self, secrets: VaultSecrets) -> Result<UnlockedVault, VaultError> {
        let shared = self.read_shared_keys(&secrets)?;
        Ok(UnlockedVault::new(self.clone(), secrets, shared))
    }

    fn slot_of(&self) -> SlotOf {
        SlotOf { vault: self.id, owner: self.owner, read: self.read }
    }

    /// Whether `credential` opens the vault, without keeping anything.
    ///
    /// # Errors
    /// As [`Vault::unlock`].
    pub fn check_key(&self, credential: Credential<'_>) -> Result<(), VaultError> {
        self.unlock(credential).map(drop)
    }

    /// The vault's key slots, by name. Damaged ones are left out.
    ///
    /// # Errors
    /// Those of the store.
    pub fn slots(&self) -> Result<Vec<SlotInfo>, VaultError> {
        let (slots, _) = self.read_slots()?;
        let superseded = |id| slots.iter().any(|stored| stored.slot.supersedes.contains(&id));
        Ok(slots
            .iter()
            .map(|stored| SlotInfo { id: stored.id, kind: stored.slot.kind, superseded: superseded(stored.id) })
            .collect())
    }

    fn read_slots(&self) -> Result<(Vec<StoredSlot>, Option<VaultError>), VaultError> {
        let (mut slots, mut damaged) = (Vec::new(), None);
        self.store.for_each(&layout::keys_of(self.id), |name| {
            if !name.as_str().contains("/slot-") {
                return Ok(true);
            }
            let number = name.as_str().rsplit('-').next().and_then(|digits| u64::from_str_radix(digits, 16).ok());
            match (self.read_slot(&name), number) {
                (Ok(slot), Some(id)) => slots.push(StoredSlot { id, slot }),
                (Ok(_), None) => {}
                (Err(error), _) if error.condemns_object() => damaged = Some(error),
                (Err(error), _) => return Err(error),
            }
            Ok(true)
        })?;
        Ok((slots, damaged))
    }

    /// The secrets, and the slot that gave them.
    fn open_slot(&self, credential: Credential<'_>) -> Result<(VaultSecrets, u64), VaultError> {
        let (slots, damaged) = self.read_slots()?;
        let superseded: Vec<u64> = slots.iter().flat_map(|stored| stored.slot.supersedes.iter().copied()).collect();
        let of = self.slot_of();
        let opened = slots.iter().filter(|stored| !superseded.contains(&stored.id)).find_map(|stored| {
            let secrets = match credential {
                Credential::Passphrase(text) => stored.slot.open_with_passphrase(text, of),
                Credential::Recovery(key) => stored.slot.open_with_recovery_key(key, of),
            };
            secrets.map(|secrets| (secrets, stored.id))
        });
        match (opened, damaged, credential) {
            (Some(opened), ..) => Ok(opened),
            (None, Some(error), _) => Err(error),
            (None, None, Credential::Passphrase(_)) => Err(VaultError::WrongPassphrase),
            (None, None, Credential::Recovery(_)) => Err(VaultError::WrongRecoveryKey),
        }
    }

    fn read_slot(&self, name: &ObjectName) -> Result<KeySlot, VaultError> {
        let header = self.read_owner_header(name, ObjectKind::KeySlot)?;
        let mut input = Decoder::new(header.clear);
        let slot = KeySlot::decode(&mut input).map_err(VaultError::content(name))?;
        input.finish().map_err(VaultError::content(name))?;
        Ok(slot)
    }

    fn read_shared_keys(&self, secrets: &VaultSecrets) -> Result<SharedKeys, VaultError> {
        let name = layout::shared_keys(self.id, 0);
        let header = self.read_owner_header(&name, ObjectKind::SharedKeys)?;
        secrets
            .read
            .unseal(&SealedKey(header.clear), SHARED_KEYS_INFO, &self.id.0)
            .and_then(|bytes| bytes.as_slice().try_into().ok().map(|bytes| SharedKeys::from_bytes(&bytes)))
            .ok_or_else(|| {
                VaultError::damaged(&name, Damage::Contradiction("the shared keys are not sealed to the read key"))
            })
    }

    fn read_owner_header(&self, name: &ObjectName, kind: ObjectKind) -> Result<Header, VaultError> {
        let (parsed, _) = read_header(self.store.as_ref(), name, limits::HEADER_READ_BYTES)?;
        verify_signature(name, &parsed, self.owner)?;
        if parsed.header.vault != self.id || parsed.header.placement.kind != kind {
            return Err(VaultError::Foreign { name: name.clone(), reason: "it is of another vault or kind" });
        }
        Ok(parsed.header)
    }
}

impl UnlockedVault {
    fn new(vault: Vault, secrets: VaultSecrets, shared: SharedKeys) -> UnlockedVault {
        let keys = Arc::new(OpenKeys::new(vault.id, vault.owner, shared.clone(), Some(secrets.read.clone())));
        UnlockedVault { vault, secrets, shared, keys }
    }

    /// The vault.
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// Where its objects are.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.vault.store
    }

    /// Whether the owner's key is at hand, too.
    pub fn is_owner(&self) -> bool {
        self.secrets.owner.is_some()
    }

    /// The same vault without the owner's key, for whoever only reads.
    pub fn without_owner(&self) -> UnlockedVault {
        let secrets = VaultSecrets { read: self.secrets.read.clone(), owner: None };
        UnlockedVault { secrets, ..self.clone() }
    }

    /// The read secret, for handing it to another process of this host.
    pub fn read_secret(&self) -> &ReadSecret {
        &self.secrets.read
    }

    /// Everything a reader needs.
    pub fn keys(&self) -> &Arc<OpenKeys> {
        &self.keys
    }

    /// Grants a new writer and returns its keys, for its private file. Durable on return.
    ///
    /// # Errors
    /// [`VaultError::OwnerKeyNeeded`]; those of the store.
    pub fn grant_writer(
        &self,
        role: WriterRole,
        label: &str,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> Result<WriterKeys, VaultError> {
        if label.len() > limits::LABEL_BYTES_MAX {
            let (value, limit) = (label.len() as u64, limits::LABEL_BYTES_MAX as u64);
            return Err(VaultError::LimitExceeded { what: "the label of a writer", value, limit });
        }
        let (grant, signing) = new_grant(role, label, entropy, clock);
        let session = self.owner_session(entropy, clock)?;
        let mut builder =
            ObjectBuilder::new(&session, Placement::of_vault(ObjectKind::Grant), layout::grant(grant.writer));
        let mut content = Encoder::new();
        grant.encode(&mut content);
        let root = builder.add(FrameClass::Index, &content.finish(), Compression::None)?;
        builder.finish(Some(root)).put(self.store().as_ref())?;
        // In this order: a revocation looks at the grants again when its epoch has begun, so one of the two sees the other.
        self.share_name_keys(&session, &grant)?;
        Ok(self.writer_keys(grant, signing))
    }

    /// Seals the name key of every epoch that has begun to the writer of `grant`. Copies that it has already do no harm.
    pub(crate) fn share_name_keys(&self, session: &WriterSession, grant: &Grant) -> Result<(), VaultError> {
        revoked::refresh(self.store(), &self.keys)?;
        for (epoch, key) in self.keys.name_keys() {
            if epoch != NameEpoch::FIRST {
                self.put_name_key(session, &key, epoch, (grant.writer, grant.sealing))?;
            }
        }
        Ok(())
    }

    /// Stores a copy of the name key of `epoch` that opens for `to`; the owner stands for the read key.
    pub(crate) fn put_name_key(
        &self,
        session: &WriterSession,
        key: &NameKey,
        epoch: NameEpoch,
        (to, public): (WriterId, SealingPublic),
    ) -> Result<(), VaultError> {
        let Some(copy) = SealedNameKey::seal(key, epoch, (self.vault.id, to), &public, session.entropy()) else {
            return Err(VaultError::NotPermitted { writer: to, reason: "the key in its grant cannot be sealed to" });
        };
        let name = layout::name_key(self.vault.id, epoch, to, u64::from_le_bytes(session.entropy().bytes()));
        self.put_clear(session, ObjectKind::NameKey, name, copy.encode())
    }

    /// Keys of a writer whose objects never leave this host: no grant of it is in the vault, and whoever is to accept
    /// what it signs is told with [`OpenKeys::trust_on_this_host`].
    pub fn keys_of_this_host(
        &self,
        role: WriterRole,
        label: &str,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> WriterKeys {
        let (grant, signing) = new_grant(role, label, entropy, clock);
        self.writer_keys(grant, signing)
    }

    /// Adds a passphrase, for everything or for reading alone. The old ones keep working.
    ///
    /// # Errors
    /// [`VaultError::OwnerKeyNeeded`]; those of the store.
    pub fn add_passphrase(
        &self,
        passphrase: &str,
        kind: SlotKind,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> Result<(), VaultError> {
        let session = self.owner_session(entropy, clock)?;
        let of = self.vault.slot_of();
        let slot = KeySlot::under_passphrase(passphrase, kind, of, &self.secrets, entropy.as_ref());
        self.put_slot(&session, &slot)
    }

    /// Puts `new` in the place of the passphrase `old`, which opens the vault no more. Nothing is removed: whoever copied
    /// the vault before and knows the old passphrase can still open that copy.
    ///
    /// # Errors
    /// [`VaultError::WrongPassphrase`] if `old` opens nothing; [`VaultError::OwnerKeyNeeded`]; those of the store.
    pub fn change_passphrase(
        &self,
        old: &str,
        new: &str,
        cost: PassphraseCost,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> Result<(), VaultError> {
        let session = self.owner_session(entropy, clock)?;
        let (opened, superseded) = self.vault.open_slot(Credential::Passphrase(old))?;
        // A passphrase for reading stays one.
        let kind = match opened.owner {
            Some(_) => SlotKind::Passphrase(cost),
            None => SlotKind::ReadPassphrase(cost),
        };
        let of = self.vault.slot_of();
        let mut slot = KeySlot::under_passphrase(new, kind, of, &self.secrets, entropy.as_ref());
        slot.supersedes = vec![superseded];
        self.put_slot(&session, &slot)
    }

    /// A session that signs as the owner. For grants, revocations and repairs made by a person who unlocked the vault.
    ///
    /// # Errors
    /// [`VaultError::OwnerKeyNeeded`] if what unlocked the vault opened its read key only.
    pub fn owner_session(
        &self,
        entropy: &Arc<dyn Entropy>,
        clock: &Arc<dyn Clock>,
    ) -> Result<WriterSession, VaultError> {
        let owner = self.secrets.owner.clone().ok_or(VaultError::OwnerKeyNeeded)?;
        let grant = Grant {
            writer: WriterId::OWNER,
            key: self.vault.owner,
            sealing: self.vault.read,
            role: WriterRole::Operator,
            label: "owner".into(),
            granted_seconds: self.vault.created_seconds,
        };
        let keys = self.writer_keys(grant, owner);
        Ok(WriterSession::new(keys, Arc::clone(entropy), Arc::clone(clock)).expect("the vault's read key is its own"))
    }

    fn writer_keys(&self, grant: Grant, signing: SigningSecret) -> WriterKeys {
        WriterKeys {
            vault: self.vault.id,
            grant,
            signing,
            shared: self.shared.clone(),
            read_public: self.vault.read,
            owner_public: self.vault.owner,
        }
    }

    fn put_slot(&self, session: &WriterSession, slot: &KeySlot) -> Result<(), VaultError> {
        let kind = match slot.kind {
            SlotKind::Passphrase(_) | SlotKind::ReadPassphrase(_) => "passphrase",
            SlotKind::Recovery => "recovery",
        };
        let name = layout::key_slot(self.vault.id, kind, u64::from_le_bytes(session.entropy().bytes()));
        let mut clear = Encoder::new();
        slot.encode(&mut clear);
        self.put_clear(session, ObjectKind::KeySlot, name, clear.finish())
    }

    fn put_shared_keys(&self, session: &WriterSession) -> Result<(), VaultError> {
        let name = layout::shared_keys(self.vault.id, 0);
        let bytes = self.shared.to_bytes();
        let sealed = self
            .vault
            .read
            .seal(bytes.as_slice(), SHARED_KEYS_INFO, &self.vault.id.0, session.entropy())
            .expect("the vault's read key is its own");
        self.put_clear(session, ObjectKind::SharedKeys, name, sealed.0)
    }

    fn put_clear(
        &self,
        session: &WriterSession,
        kind: ObjectKind,
        name: ObjectName,
        clear: Vec<u8>,
    ) -> Result<(), VaultError> {
        let object: SealedObject =
            ObjectBuilder::new(session, Placement::of_vault(kind), name).finish_with_clear(None, clear);
        Ok(object.put(self.store().as_ref())?)
    }
}

/// A grant of a new writer, and the key that signs under it.
fn new_grant(
    role: WriterRole,
    label: &str,
    entropy: &Arc<dyn Entropy>,
    clock: &Arc<dyn Clock>,
) -> (Grant, SigningSecret) {
    let signing = SigningSecret::generate(entropy.as_ref());
    let grant = Grant {
        writer: WriterId(entropy.bytes()),
        key: signing.public(),
        sealing: signing.sealing().public(),
        role,
        label: label.to_owned(),
        granted_seconds: clock.wall().seconds(),
    };
    (grant, signing)
}

/// Lists every grant of the vault that verifies.
///
/// # Errors
/// Those of the store; grants that do not verify are left out.
pub fn list_grants(store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<Vec<Grant>, VaultError> {
    let mut grants = Vec::new();
    store.for_each(layout::GRANTS, |name| {
        let writer = name.as_str().strip_prefix(layout::GRANTS).and_then(|id| id.parse::<replication::ChainId>().ok());
        if let Some(id) = writer {
            match keys.grant(store, WriterId(id.0)) {
                Ok(grant) => grants.push(grant),
                Err(error) if error.condemns_object() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    })?;
    Ok(grants)
}
