//! `farshore vault revoke`: ends a writer's grant.

use clap::Args;
use serde_json::json;
use vault::revoke::revoke_writer;
use vault::vault::list_grants;

use crate::failure::{Done, Failure, Verdict, usage};
use crate::output::Output;
use crate::vault_access::{KeyOptions, VaultPlace, clock, entropy};

/// Options of `vault revoke`.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// The writer: its id or its name, as `farshore vault key show` lists them
    writer: String,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// Why, for people
    #[arg(long, value_name = "TEXT", default_value = "revoked by an administrator")]
    reason: String,
}

impl Revoke {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.keys.unlock_fresh(&self.place.open()?)?;
        let grants = list_grants(vault.store(), vault.keys())?;
        let id = |grant: &vault::keys::Grant| grant.writer.to_string();
        let meant = |grant: &&vault::keys::Grant| {
            grant.label == self.writer
                || id(grant) == self.writer
                || self.writer.len() >= 8 && id(grant).starts_with(&self.writer)
        };
        let found: Vec<_> = grants.iter().filter(meant).collect();
        let [grant] = found[..] else {
            let known: Vec<String> = grants.iter().map(|grant| format!("{} ({})", grant.label, grant.writer)).collect();
            let what = match found.len() {
                0 => format!("no writer is named {:?}", self.writer),
                count => format!("{count} writers are named {:?}", self.writer),
            };
            return Err(usage(what, format!("this vault knows {}", known.join(", ")), "name one by its id"));
        };
        vault::Catalog::load(vault.store(), vault.keys())?;
        if vault.keys().revocations().contains_key(&grant.writer) {
            let what = format!("the grant of {} was revoked before", grant.label);
            return Err(Failure::new(what, "", "nothing is left to do").with(Verdict::Unchanged));
        }
        let revoked = revoke_writer(&vault, grant.writer, &self.reason, &entropy(), &clock())?;
        let fails: serde_json::Map<_, _> =
            revoked.fails_from.iter().map(|(chain, number)| (chain.to_string(), json!(number))).collect();
        output.object(&json!({
            "writer": grant.writer.to_string(), "label": grant.label, "revoked": true,
            "stopped_chains": revoked.fenced.iter().map(ToString::to_string).collect::<Vec<_>>(), "fails_from": fails,
        }))?;
        output.line(format!("revoked {} ({}); what it committed stays", grant.label, grant.role))?;
        if !revoked.fenced.is_empty() {
            let count = revoked.fenced.len();
            output.line(format!(
                "{count} chains have no writer now: their machines heal when they reach another server"
            ))?;
        }
        output.remark(
            "it still knows the key of indexes; it cannot read disks, nothing it writes counts, and from the next session of \
             each machine on it cannot even get in the way",
        )
    }
}
