//! `farshore vault key …`: what opens the vault.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use vault::keys::PassphraseCost;
use vault::vault::list_grants;
use vault::{StoreError, layout};

use crate::failure::Done;
use crate::output::{Output, Table};
use crate::secrets;
use crate::vault_access::{KeyOptions, VaultPlace, clock, entropy};

/// Commands about keys.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// What can open the vault and, with a key, who may write to it
    Show(KeyAccess),
    /// Check that the passphrase or recovery key opens the vault
    Check(KeyAccess),
    /// Add a passphrase; the old ones keep working
    Add(Add),
}

/// A vault and what opens it.
#[derive(Debug, Args)]
pub(crate) struct KeyAccess {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
}

/// Options of `vault key add`.
#[derive(Debug, Args)]
pub(crate) struct Add {
    #[command(flatten)]
    access: KeyAccess,
    /// File whose contents become the further passphrase
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: PathBuf,
}

impl KeyCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        match self {
            KeyCommand::Show(access) => show(access, output),
            KeyCommand::Check(access) => check(access, output),
            KeyCommand::Add(command) => add(command, output),
        }
    }
}

fn show(access: &KeyAccess, output: Output) -> Done {
    let vault = access.place.open()?;
    let folder = layout::keys_of(vault.id());
    let mut slots: Vec<&str> = Vec::new();
    vault.store().for_each(&folder, |name| -> Result<bool, StoreError> {
        match name.as_str()[folder.len()..].split('-').collect::<Vec<_>>()[..] {
            ["slot", "passphrase", _] => slots.push("passphrase"),
            ["slot", "recovery", _] => slots.push("recovery key"),
            _ => {}
        }
        Ok(true)
    })?;
    let unlocked = access.keys.unlock_if_given(&vault)?;
    output.line(format!("fingerprint  {}", vault.fingerprint()))?;
    output.line(format!("opened by    {}", slots.join(", ")))?;
    let mut writers = Vec::new();
    if let Some(unlocked) = &unlocked {
        let mut table = Table::new(&["WRITER", "ROLE", "NAME"]);
        for grant in list_grants(unlocked.store(), unlocked.keys())? {
            let role = format!("{:?}", grant.role);
            table.row(vec![grant.writer.to_string(), role.clone(), grant.label.clone()]);
            writers.push(json!({"writer": grant.writer.to_string(), "role": role, "label": grant.label}));
        }
        if !writers.is_empty() {
            output.table(&table)?;
        }
    }
    output.object(&json!({
        "vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "slots": slots,
        "writers": unlocked.is_some().then_some(writers),
    }))?;
    output.remark("keys themselves are never shown: the recovery key was printed once, when the vault was made")
}

fn check(access: &KeyAccess, output: Output) -> Done {
    let vault = access.place.open()?;
    access.keys.unlock(&vault)?;
    let what = if access.keys.recovery_key_file.is_some() { "recovery key" } else { "passphrase" };
    output.object(&json!({"vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "opens": true}))?;
    output.line(format!("the {what} opens the vault {}", vault.fingerprint()))
}

fn add(command: &Add, output: Output) -> Done {
    let vault = command.access.place.unlock(&command.access.keys)?;
    let passphrase = secrets::new_passphrase(Some(&command.new_passphrase_file))?;
    vault.add_passphrase(&passphrase, PassphraseCost::STANDARD, &entropy(), &clock())?;
    output.object(&json!({"vault": vault.vault().id().to_string(), "added": "passphrase"}))?;
    output.line("added; the passphrases there were keep working")
}
