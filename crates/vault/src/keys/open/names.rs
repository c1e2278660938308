//! The name keys at hand: where those of later epochs come from, and which epochs there are.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::OpenKeys;
use crate::error::VaultError;
use crate::keys::{NameEpoch, NameKey, NameSwitch, SealedNameKey, WriterId, revoked};
use crate::layout;
use crate::object::{ObjectKind, ObjectReader};
use crate::store::Store;

impl OpenKeys {
    /// The name keys at hand, by epoch.
    pub(crate) fn name_keys(&self) -> BTreeMap<NameEpoch, NameKey> {
        self.names.lock().expect("nothing panics while holding the name keys").clone()
    }

    /// How the newest name-key epoch began, as far as the catalog was read; `None` in the first.
    pub(crate) fn newest_names(&self) -> Option<NameSwitch> {
        self.with_revocations(|known| known.newest())
    }

    /// Whether the owner made the key that `switch` leads to. If so, it is at hand on return.
    ///
    /// The catalog says so, and if what it says is lost, the copies of the key still do: a manifest must not come to be
    /// foreign, and everything behind it invisible, because one object of the catalog was damaged.
    ///
    /// # Errors
    /// As [`OpenKeys::fetch_name_key`].
    pub(crate) fn accepts(&self, store: &Arc<dyn Store>, switch: NameSwitch) -> Result<bool, VaultError> {
        let begun = || self.with_revocations(|known| known.begun(switch.epoch));
        if begun().is_none() {
            // The manifest may be newer than what was read of the catalog.
            revoked::refresh(store, self)?;
        }
        let made = match begun() {
            Some(known) => known == switch,
            None => self.copies(store, |epoch| epoch == switch.epoch)?.iter().any(|(_, copy)| copy.switch == switch),
        };
        if made {
            self.fetch_name_key(store, switch)?;
        }
        Ok(made)
    }

    /// Makes sure that the name key of an epoch is at hand.
    ///
    /// # Errors
    /// [`VaultError::Revoked`] if these are the keys of a writer whose grant has ended: it is given none;
    /// [`VaultError::NameKeyMissing`] if no copy of it opens.
    pub(crate) fn fetch_name_key(&self, store: &Arc<dyn Store>, switch: NameSwitch) -> Result<(), VaultError> {
        let known = |key: &NameKey| key.switch_to(switch.epoch) == switch;
        if self.name_keys().get(&switch.epoch).is_some_and(known) {
            return Ok(());
        }
        let copies = self.copies(store, |epoch| epoch == switch.epoch)?;
        let mut of_it = copies.iter().filter(|(_, copy)| copy.switch == switch);
        let Some(key) = of_it.find_map(|(to, copy)| self.open_copy(*to, copy)) else {
            return Err(match self.writer {
                Some((writer, _)) if self.with_revocations(|known| known.is_revoked(writer)) => {
                    VaultError::Revoked { writer }
                }
                _ => VaultError::NameKeyMissing { epoch: switch.epoch },
            });
        };
        self.names.lock().expect("nothing panics while holding the name keys").insert(switch.epoch, key);
        Ok(())
    }

    /// Epochs after `after` of which a copy opens here, oldest first, whatever the catalog says of them.
    pub(crate) fn epochs_after(&self, store: &Arc<dyn Store>, after: NameEpoch) -> Result<Vec<NameSwitch>, VaultError> {
        let copies = self.copies(store, |epoch| epoch > after)?;
        let mut epochs: Vec<NameSwitch> = copies
            .iter()
            .filter(|(to, copy)| self.open_copy(*to, copy).is_some())
            .map(|(_, copy)| copy.switch)
            .collect();
        epochs.sort_unstable_by_key(|switch| switch.epoch);
        Ok(epochs)
    }

    /// The newest epoch for which the owner ever made a key, whether it came into use or not.
    pub(crate) fn newest_made(&self, store: &Arc<dyn Store>) -> Result<NameEpoch, VaultError> {
        let copies = self.copies(store, |_| true)?;
        Ok(copies.iter().map(|(_, copy)| copy.switch.epoch).max().unwrap_or_default())
    }

    fn open_copy(&self, to: WriterId, copy: &SealedNameKey) -> Option<NameKey> {
        let secret = match (&self.read, &self.writer) {
            (Some(read), _) if to == WriterId::OWNER => read,
            (_, Some((writer, secret))) if to == *writer => secret,
            _ => return None,
        };
        copy.open(self.vault, to, secret)
    }

    /// The copies of name keys that the owner signed, of some epochs, and to whom each is sealed. Anything else under such
    /// names is a stranger's.
    fn copies(
        &self,
        store: &Arc<dyn Store>,
        of: impl Fn(NameEpoch) -> bool,
    ) -> Result<Vec<(WriterId, SealedNameKey)>, VaultError> {
        let mut copies = Vec::new();
        store.for_each(&layout::keys_of(self.vault), |name| -> Result<bool, VaultError> {
            let Some((epoch, to)) = layout::parse_name_key(self.vault, &name).filter(|(epoch, _)| of(*epoch)) else {
                return Ok(true);
            };
            let object = match ObjectReader::open(store, self, &name) {
                Ok(object) => object,
                Err(VaultError::Store(error)) => return Err(error.into()),
                Err(_) => return Ok(true),
            };
            let header = object.header();
            if header.writer == WriterId::OWNER && header.placement.kind == ObjectKind::NameKey {
                let copy = SealedNameKey::decode(epoch, &header.clear);
                copies.extend(copy.map(|copy| (to, copy)));
            }
            Ok(true)
        })?;
        Ok(copies)
    }
}
