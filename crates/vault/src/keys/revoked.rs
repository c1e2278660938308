//! Revocations: grants end at a number of each chain, named in the catalog. What a writer committed before stays valid.

use std::collections::BTreeMap;
use std::sync::Arc;

use replication::ChainId;

use super::{OpenKeys, WriterId};
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

    /// Notes what entry `number` says; entries are noted in order.
    pub(crate) fn note(&mut self, number: u64, entry: Option<&CatalogEntry>) {
        if number != self.next_entry.max(1) {
            return;
        }
        self.next_entry = number + 1;
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

/// Reads what the catalog says beyond what `keys` know. One request if there is nothing new.
pub(crate) fn refresh(store: &Arc<dyn Store>, keys: &OpenKeys) -> Result<(), VaultError> {
    let names = NumberedNames::of_catalog(&keys.shared().name);
    loop {
        let number = keys.with_revocations(|known| known.next_entry.max(1));
        let entry = match read_entry(store, keys, &names, number) {
            Ok(record) => Some(record.entry),
            Err(VaultError::Store(StoreError::NotFound(_))) => return Ok(()),
            Err(error) if error.condemns_object() => None,
            Err(error) => return Err(error),
        };
        keys.with_revocations(|known| known.note(number, entry.as_ref()));
    }
}
