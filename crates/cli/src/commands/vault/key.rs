//! `farshore vault key …`: what opens the vault.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;
use vault::Catalog;
use vault::keys::{PassphraseCost, SlotKind};
use vault::vault::list_grants;

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
    /// Put a new passphrase in the place of an old one
    Change(Change),
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
    /// It opens disks for reading and branches, and neither grants nor revokes
    #[arg(long)]
    for_reading: bool,
}

/// Options of `vault key change`.
#[derive(Debug, Args)]
pub(crate) struct Change {
    #[command(flatten)]
    access: KeyAccess,
    /// File with the passphrase that shall not open the vault any more; else the one that unlocks it now
    #[arg(long, value_name = "FILE")]
    old_passphrase_file: Option<PathBuf>,
    /// File whose contents become the new passphrase
    #[arg(long, value_name = "FILE")]
    new_passphrase_file: PathBuf,
}

impl KeyCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        match self {
            KeyCommand::Show(access) => show(access, output),
            KeyCommand::Check(access) => check(access, output),
            KeyCommand::Add(command) => add(command, output),
            KeyCommand::Change(command) => change(command, output),
        }
    }
}

fn show(access: &KeyAccess, output: Output) -> Done {
    let vault = access.place.open()?;
    let slots = vault.slots()?;
    let unlocked = access.keys.unlock_if_given(&vault)?;
    output.line(format!("fingerprint  {}", vault.fingerprint()))?;
    let mut listed = Vec::new();
    for slot in &slots {
        let (kind, opens) = match slot.kind {
            SlotKind::Passphrase(_) => ("passphrase", "everything"),
            SlotKind::ReadPassphrase(_) => ("passphrase", "reading"),
            SlotKind::Recovery => ("recovery key", "everything"),
        };
        let replaced = if slot.superseded { ", replaced by a later one: not tried any more" } else { "" };
        output.line(format!("slot         {:016x}  {kind}, opens {opens}{replaced}", slot.id))?;
        let id = format!("{:016x}", slot.id);
        listed.push(json!({"slot": id, "kind": kind, "opens": opens, "superseded": slot.superseded}));
    }
    let mut writers = Vec::new();
    if let Some(unlocked) = &unlocked {
        let catalog = Catalog::load(unlocked.store(), unlocked.keys())?;
        let mut table = Table::new(&["WRITER", "ROLE", "STATE", "NAME"]);
        for grant in list_grants(unlocked.store(), unlocked.keys())? {
            let role = grant.role.to_string();
            let revoked = catalog.revoked.get(&grant.writer);
            let state = revoked.map_or("granted".to_owned(), |reason| format!("revoked ({reason})"));
            table.row(vec![grant.writer.to_string(), role.clone(), state, grant.label.clone()]);
            writers.push(json!({
                "writer": grant.writer.to_string(), "role": role, "label": grant.label,
                "revoked": revoked.is_some(), "reason": revoked,
            }));
        }
        if !writers.is_empty() {
            output.table(&table)?;
        }
    }
    output.object(&json!({
        "vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "slots": listed,
        "writers": unlocked.is_some().then_some(writers),
    }))?;
    output.remark("keys themselves are never shown: the recovery key was printed once, when the vault was made")
}

fn check(access: &KeyAccess, output: Output) -> Done {
    let vault = access.place.open()?;
    access.keys.unlock_fresh(&vault)?;
    let what = if access.keys.recovery_key_file.is_some() { "recovery key" } else { "passphrase" };
    output.object(&json!({"vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "opens": true}))?;
    output.line(format!("the {what} opens the vault {}", vault.fingerprint()))
}

fn add(command: &Add, output: Output) -> Done {
    let vault = command.access.keys.unlock_fresh(&command.access.place.open()?)?;
    let passphrase = secrets::new_passphrase(Some(&command.new_passphrase_file))?;
    let kind = match command.for_reading {
        true => SlotKind::ReadPassphrase(PassphraseCost::STANDARD),
        false => SlotKind::Passphrase(PassphraseCost::STANDARD),
    };
    vault.add_passphrase(&passphrase, kind, &entropy(), &clock())?;
    let opens = if command.for_reading { "reading" } else { "everything" };
    output.object(&json!({"vault": vault.vault().id().to_string(), "added": "passphrase", "opens": opens}))?;
    output.line("added; the passphrases there were keep working")
}

fn change(command: &Change, output: Output) -> Done {
    let vault = command.access.keys.unlock_fresh(&command.access.place.open()?)?;
    let old = match (&command.old_passphrase_file, &command.access.keys.passphrase_file) {
        (Some(file), _) => secrets::passphrase(Some(file))?,
        (None, Some(file)) => secrets::passphrase(Some(file))?,
        (None, None) => secrets::passphrase(None)?,
    };
    let new = secrets::new_passphrase(Some(&command.new_passphrase_file))?;
    vault.change_passphrase(&old, &new, PassphraseCost::STANDARD, &entropy(), &clock())?;
    output.object(&json!({"vault": vault.vault().id().to_string(), "changed": "passphrase"}))?;
    output.line("changed: the new passphrase opens the vault, the old one does not any more")?;
    output.remark("a copy of the vault made before still opens with the old one")
}
