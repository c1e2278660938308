//! `farshore branch discard`

use clap::Args;
use serde_json::json;
use vault::{Catalog, CatalogEntry};

use crate::failure::{Done, Failure, Verdict, usage};
use crate::output::Output;
use crate::vault_access::{KeyOptions, VaultPlace, clock, entropy, find};

/// Options of `branch discard`.
#[derive(Debug, Args)]
pub(crate) struct Discard {
    /// Name or chain of the branch
    branch: String,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
}

impl Discard {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let mut catalog = Catalog::load(vault.store(), vault.keys())?;
        let named = find(vault.store(), &catalog, &self.branch)?;
        let Some(branch) = catalog.branches.get(&named.chain).filter(|_| named.machine.is_none()) else {
            return Err(usage(
                format!("{} is a machine, not a branch", named.name),
                "a machine's own history is not given up this way",
                "name a branch that `farshore branch list` shows",
            )
            .with(Verdict::Refused));
        };
        if branch.discarded {
            let what = format!("the branch {} was discarded already", named.name);
            return Err(Failure::new(what, "", "nothing is left to do").with(Verdict::Unchanged));
        }
        let session = vault.owner_session(&entropy(), &clock());
        let entry = CatalogEntry::BranchDiscarded { chain: named.chain };
        catalog.append(vault.store(), vault.keys(), &session, &entry)?;
        output.object(&json!({"branch": named.name, "chain": named.chain.to_string(), "discarded": true}))?;
        output.line(format!("discarded the branch {}; what was written on it stays in the vault for now", named.name))
    }
}
