//! On whose word a branch host writes: a *branch host's* grant, kept in a private file beside its branches' states. The
//! vault owner's key is not needed for it, except to grant once.
//!
//! What stays on this host because the vault takes no writes is signed by a writer that the vault does not know. Its
//! objects are believed here and nowhere else.

use std::sync::{Arc, Mutex, PoisonError};

use vault::keys::WriterRole;
use vault::{Catalog, CatalogEntry, UnlockedVault, VaultId, WriterKeys, WriterSession};
use world::{Clock, Entropy, Files, durable};

use crate::error::BranchError;

/// Name of the file in a branch host's state directory that holds its right to write to this vault.
pub fn branch_host_keys(vault: VaultId) -> String {
    format!("{vault}.branch-host.keys")
}

/// The same for branches whose chains stay on the host.
fn local_keys(vault: VaultId) -> String {
    format!("{vault}.this-host.keys")
}

/// The label of a grant that a host made for itself, when the vault was unlocked with the owner's key.
const OWN_LABEL: &str = "branch host";

/// See the module's documentation.
pub(crate) struct Identity {
    vault: UnlockedVault,
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    granted: Mutex<Option<Arc<WriterSession>>>,
    local: Mutex<Option<Arc<WriterSession>>>,
}

impl Identity {
    pub(crate) fn new(
        vault: UnlockedVault,
        files: Arc<dyn Files>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Identity {
        Identity { vault, files, clock, entropy, granted: Mutex::default(), local: Mutex::default() }
    }

    /// The session that writes to the vault. With the owner's key at hand, a host that has no grant gets one.
    pub(crate) fn of_vault(&self) -> Result<Arc<WriterSession>, BranchError> {
        let mut known = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = known.as_ref() {
            return Ok(Arc::clone(session));
        }
        let keys = match self.stored(&branch_host_keys(self.id()))? {
            Some(keys) => keys,
            None if self.vault.is_owner() => {
                let keys = self.vault.grant_writer(WriterRole::BranchHost, OWN_LABEL, &self.entropy, &self.clock)?;
                self.store(&branch_host_keys(self.id()), &keys)?;
                let session = self.vault.owner_session(&self.entropy, &self.clock)?;
                let entry = CatalogEntry::WriterGranted { writer: keys.writer(), label: OWN_LABEL.into() };
                let (store, open) = (self.vault.store(), self.vault.keys());
                Catalog::load(store, open)?.append(store, open, &session, &entry)?;
                keys
            }
            None => return Err(BranchError::NotGranted),
        };
        let session = self.session(keys)?;
        *known = Some(Arc::clone(&session));
        Ok(session)
    }

    /// The session that writes what stays on this host. From the first call on its objects are believed.
    pub(crate) fn of_host(&self) -> Result<Arc<WriterSession>, BranchError> {
        let mut known = self.local.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = known.as_ref() {
            return Ok(Arc::clone(session));
        }
        let keys = match self.stored(&local_keys(self.id()))? {
            Some(keys) => keys,
            None => {
                let role = WriterRole::BranchHost;
                let keys = self.vault.keys_of_this_host(role, "this host only", &self.entropy, &self.clock);
                self.store(&local_keys(self.id()), &keys)?;
                keys
            }
        };
        self.vault.keys().trust_on_this_host(&keys);
        let session = self.session(keys)?;
        *known = Some(Arc::clone(&session));
        Ok(session)
    }

    fn session(&self, keys: WriterKeys) -> Result<Arc<WriterSession>, BranchError> {
        let session = WriterSession::new(keys, Arc::clone(&self.entropy), Arc::clone(&self.clock));
        session.map(Arc::new).map_err(|source| BranchError::Keys { file: branch_host_keys(self.id()), source })
    }

    fn id(&self) -> VaultId {
        self.vault.vault().id()
    }

    fn stored(&self, file: &str) -> Result<Option<WriterKeys>, BranchError> {
        let bytes = match self.files.read(file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(BranchError::state("read"))?,
        };
        let keys = WriterKeys::from_bytes(&bytes);
        keys.map(Some).map_err(|source| BranchError::Keys { file: file.to_owned(), source })
    }

    fn store(&self, file: &str, keys: &WriterKeys) -> Result<(), BranchError> {
        let unique = replication::ChainId(self.entropy.bytes()).to_string();
        durable::replace_private(&*self.files, file, &keys.to_bytes(), &unique).map_err(BranchError::state("written"))
    }
}
