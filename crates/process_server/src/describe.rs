//! What agents say of their machines, kept in the catalog: a new entry only if something has changed, and not often.

use std::time::Duration;

use replication::MachineId;
use vault::{Catalog, CatalogEntry, VaultError};
use world::Monotonic;

use crate::pipeline::Services;

/// How soon another description of a machine is kept. One that changes with every look shall not fill the catalog.
const AGAIN_AFTER: Duration = Duration::from_secs(600);

/// The descriptions of one machine.
#[derive(Debug, Default)]
pub(crate) struct Descriptions {
    /// The newest that is known to be in the catalog, and when it was looked for.
    kept: Option<(String, Monotonic)>,
}

impl Descriptions {
    /// Keeps `document` in the catalog if it says anything new. Durable on return.
    pub(crate) fn keep(&mut self, services: &Services, machine: MachineId, document: String) -> Result<(), VaultError> {
        let now = services.clock.monotonic();
        if let Some((kept, at)) = &self.kept
            && (*kept == document || now.since(*at) < AGAIN_AFTER)
        {
            return Ok(());
        }
        let mut catalog = Catalog::load(&services.store, &services.keys)?;
        if catalog.descriptions.get(&machine) != Some(&document) {
            let entry = CatalogEntry::MachineDescribed { machine, document: document.clone() };
            catalog.append(&services.store, &services.keys, &services.session, &entry)?;
            tracing::info!(%machine, "the machine's description is kept in the vault");
        }
        self.kept = Some((document, now));
        Ok(())
    }
}
