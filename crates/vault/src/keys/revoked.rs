//! Revocations: grants end at a number of each chain, named in the catalog. What a writer committed before stays valid.

use std::collections::BTreeMap;
use std::sync::Arc;

use replication::ChainId;

use super::{NameEpoch, NameSwitch, OpenKeys, WriterId};
use crate::catalog::{CatalogEntry, read_entry};
use crate::error::VaultError;
use crate::numbered::NumberedNames;
use crate::store::{Store, StoreError};

/// The end of a grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revocation {
    /// Number of the catalog entry: the writer's entries fail from there.
    pub entry: u64,
    /// The number from which its manifests fail, for each chain it wrote to. In any other chain all fail.
    pub fails_from: BTreeMap<ChainId, u64>,
}

/// What the catalog is known to say about revocations.
#[derive(Debug, Default)]
pub(crate) struct Revocations {
    next_entry: u64,
    of: BTreeMap<WriterId, Revocation>,
    /// Name-key epochs that revocations began, without the first.
    begun: BTreeMap<NameEpoch, NameSwitch>,
}

impl Revocations {
    /// Whether catalog entry `entry` of `writer` comes too late.
    pub(crate) fn fails_entry(&self, writer: WriterId, entry: u64) -> bool {
        self.of.get(&writer).is_some_and(|revocation| entry >= revocation.entry)
    }

    /// The number of `chain` from which manifests of `writer` fail.
    pub(crate) fn fails_from(&self, writer: WriterId, chain: ChainId) -> Option<u64> {
        self.of.get(&writer).map(|revocation| revocation.fails_from.get(&chain).copied().unwrap_or(1))
    }

    /// Whether the grant of `writer` has ended.
    pub(crate) fn is_revoked(&self, writer: WriterId) -> bool {
        self.of.contains_key(&writer)
    }

    /// The epoch that the newest revocation began; `None` in the first.
    pub(crate) fn newest(&self) -> Option<NameSwitch> {
        self.begun.values().next_back().copied()
    }

    /// How `epoch` began, if it has.
    pub(crate) fn begun(&self, epoch: NameEpoch) -> Option<NameSwitch> {
        self.begun.get(&epoch).copied()
    }

    /// Notes what entry `number` says, and the epoch that it begins; entries are noted in order.
    pub(crate) fn note(&mut self, number: u64, entry: Option<&CatalogEntry>, begins: Option<NameSwitch>) {
        if number != self.next_entry.max(1) {
            return;
        }
        self.next_entry = number + 1;
        self.begun.extend(begins.map(|switch| (switch.epoch, switch)));
        if let Some(CatalogEntry::GrantRevoked { writer, fails_from, .. }) = entry {
            let revocation = Revocation { entry: number, fails_from: fails_from.clone() };
            // Said again, the numbers may be corrected; the entry from which the grant fails stays the first.
            let first = self.of.get(writer).map_or(number, |known| known.entry);
            self.of.insert(*writer, Revocation { entry: first, ..revocation });
        }
    }

    pub(crate) fn all(&self) -> BTreeMap<WriterId, Revocation> {
        self.of.clone()
    }
}

/// Reads what the catalog says beyond what `keys` know. One request if there is nothing new. Whoever comes back from here
/// without an error holds the name key of every epoch that has begun.
///
/// # Errors
/// Those of the store; [`VaultError::Revoked`] and [`VaultError::NameKeyMissing`] if the catalog goes on under a name key
/// that these keys do not open.
pub(crate) fn refresh(store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<(), VaultError> {
    loop {
        let number = keys.with_revocations(|known| known.next_entry.max(1));
        let newest = keys.newest_names();
        if let Some(switch) = newest {
            keys.fetch_name_key(store, switch)?;
        }
        let epoch = newest.map_or(NameEpoch::FIRST, |switch| switch.epoch);
        let name = NumberedNames::of_catalog(keys).name(number, epoch)?;
        let entry = match read_entry(store, keys, &name, number) {
            Ok(record) => Some(record.entry),
            Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(()),
            Err(error) if error.condemns_object() => None,
            Err(error) => return Err(error),
        };
        let begins = epoch_behind(store, keys, (number, epoch), entry.as_ref())?;
        keys.with_revocations(|known| known.note(number, entry.as_ref(), begins));
    }
}

/// The epoch that begins behind a catalog entry: the one a revocation names. If the entry is damaged it may have been a
/// revocation: then the next entry tells, which only holders of a later key can have named.
pub(crate) fn epoch_behind(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    (number, epoch): (u64, NameEpoch),
    entry: Option<&CatalogEntry>,
) -> Result<Option<NameSwitch>, VaultError> {
    match entry {
        Some(CatalogEntry::GrantRevoked { names, .. }) => return Ok(names.filter(|switch| switch.follows(epoch))),
        Some(_) => return Ok(None),
        None => {}
    }
    for switch in keys.epochs_after(store, epoch)? {
        keys.fetch_name_key(store, switch)?;
        match store.size(&NumberedNames::of_catalog(keys).name(number + 1, switch.epoch)?) {
            Ok(_) => return Ok(Some(switch)),
            Err(StoreError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
