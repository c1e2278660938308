//! `farshore branch list`

use clap::Args;
use serde_json::json;
use vault::Catalog;

use crate::failure::Done;
use crate::output::{Output, Table};
use crate::vault_access::{KeyOptions, VaultPlace};

/// Options of `branch list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// Show branches that were given up, too
    #[arg(long)]
    all: bool,
}

impl List {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let catalog = Catalog::load(vault.store(), vault.keys())?;
        let mut table = Table::new(&["BRANCH", "OF", "AT", "STATE", "CHAIN"]);
        let mut shown = 0;
        for (chain, branch) in catalog.branches.iter().filter(|(_, branch)| self.all || !branch.discarded) {
            let of_machine = catalog.machines.values().find(|machine| machine.chain == branch.parent.chain);
            let of_branch = catalog.branches.get(&branch.parent.chain).map(|parent| parent.name.clone());
            let of = of_machine.map(|machine| machine.name.clone()).or(of_branch);
            let of = of.unwrap_or_else(|| branch.parent.chain.to_string()[..8].to_owned());
            let follows = catalog.machines.values().find(|machine| machine.chain == *chain);
            let state = match (branch.discarded, follows) {
                (true, _) => "discarded".to_owned(),
                (false, Some(machine)) => format!("followed by {}", machine.name),
                (false, None) => "open".to_owned(),
            };
            table.row(vec![
                branch.name.clone(),
                of.clone(),
                format!("@{}", branch.parent.sequence),
                state.clone(),
                chain.to_string()[..8].to_owned(),
            ]);
            output.object(&json!({
                "name": branch.name, "chain": chain.to_string(), "of": of, "state": state,
                "parent_chain": branch.parent.chain.to_string(), "at": branch.parent.sequence.to_string(),
                "pinned": branch.pinned, "discarded": branch.discarded,
            }))?;
            shown += 1;
        }
        if shown == 0 {
            return output.remark("there is no branch");
        }
        output.table(&table)
    }
}
