//! `farshore vault machines`

use clap::Args;
use replication::MachineId;
use serde_json::{Value, json};
use vault::{Catalog, ChainHistory};
use world::WallTime;

use crate::failure::Done;
use crate::output::{Output, Table, bytes};
use crate::vault_access::{KeyOptions, VaultPlace};

/// Options of `vault machines`.
#[derive(Debug, Args)]
pub(crate) struct Machines {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
}

/// What its agent said of the machine; `null` if it said nothing.
fn description(catalog: &Catalog, machine: &MachineId) -> Value {
    let document = catalog.descriptions.get(machine);
    document.and_then(|document| serde_json::from_str(document).ok()).unwrap_or(Value::Null)
}

impl Machines {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let (store, keys) = (vault.store(), vault.keys());
        let catalog = Catalog::load(store, keys)?;
        let mut table = Table::new(&["MACHINE", ">DISKS", ">SIZE", "CURRENT TO", ">GAPS", "CHAIN"]);
        for (id, machine) in &catalog.machines {
            // Named in the catalog a moment before its chain begins.
            let Some(history) = ChainHistory::find(store, keys, machine.chain)? else { continue };
            let size: u64 = machine.disks.iter().map(|disk| disk.size_bytes).sum();
            let gaps = history.gaps();
            table.row(vec![
                machine.name.clone(),
                machine.disks.len().to_string(),
                bytes(size),
                history
                    .last_cut()
                    .map_or("no point yet".to_owned(), |_| WallTime(history.proven_through.0).to_string()),
                gaps.len().to_string(),
                machine.chain.to_string()[..8].to_owned(),
            ]);
            let disks: Vec<_> = machine
                .disks
                .iter()
                .map(|disk| {
                    json!({"disk": disk.disk.0, "serial": disk.identity.serial, "path": disk.path,
                           "size_bytes": disk.size_bytes})
                })
                .collect();
            output.object(&json!({
                "machine": id.to_string(), "name": machine.name, "chain": machine.chain.to_string(), "disks": disks,
                "committed": history.through.to_string(), "proven_through_ns": history.proven_through.0,
                "newest_point_ns": history.last_cut().map(|(_, time)| time.0), "gaps": gaps.len(),
                "generation": history.generation().generation.0, "description": description(&catalog, id),
            }))?;
        }
        if catalog.machines.is_empty() {
            return output.remark("this vault protects no machine yet");
        }
        output.table(&table)
    }
}
