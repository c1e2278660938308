//! `farshore vault grant`: keys for a new writer.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use process_server::server::WRITER_KEYS;
use recovery::branch_host_keys;
use serde_json::json;
use vault::keys::WriterRole;
use vault::{Catalog, CatalogEntry};

use crate::failure::{Done, Failure, Verdict, io_failure, usage};
use crate::output::Output;
use crate::secrets;
use crate::vault_access::{KeyOptions, VaultPlace, clock, entropy};

/// Options of `vault grant`.
#[derive(Debug, Args)]
pub(crate) struct Grant {
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    /// What the writer is
    #[arg(long, value_enum, default_value_t = Role::ProcessServer)]
    role: Role,
    /// Its name for people, such as a host name
    #[arg(long, value_name = "NAME")]
    label: String,
    /// The state directory of the process server or branch host that gets the keys; made if need be
    #[arg(long, value_name = "DIR", required_unless_present = "to", conflicts_with = "to")]
    state_dir: Option<PathBuf>,
    /// New file for the keys instead; only its owner may read it. They write to the vault but cannot read disks
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Role {
    ProcessServer,
    BranchHost,
    Operator,
}

impl Grant {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.keys.unlock_fresh(&self.place.open()?)?;
        let role = match self.role {
            Role::ProcessServer => WriterRole::ProcessServer,
            Role::BranchHost => WriterRole::BranchHost,
            Role::Operator => WriterRole::Operator,
        };
        if matches!(self.role, Role::Operator) && self.to.is_none() {
            return Err(usage(
                "an operator has no state directory",
                "an operator is a person, or a program of theirs",
                "name a file for the keys with --to, and keep it private",
            ));
        }
        let to = match (&self.to, &self.state_dir) {
            (Some(file), _) => file.clone(),
            (None, directory) => {
                let directory = directory.as_ref().expect("clap asks for one of the two");
                std::fs::create_dir_all(directory).map_err(|error| {
                    io_failure(format!("the state directory {} cannot be made", directory.display()), &error)
                })?;
                match self.role {
                    Role::BranchHost => directory.join(branch_host_keys(vault.vault().id())),
                    Role::ProcessServer | Role::Operator => directory.join(WRITER_KEYS),
                }
            }
        };
        if to.exists() {
            let what = format!("{} exists already", to.display());
            let why = "a server that has a right to write keeps it";
            return Err(
                Failure::new(what, why, "name another place, or go on with what is there").with(Verdict::Unchanged)
            );
        }
        let keys = vault.grant_writer(role, &self.label, &entropy(), &clock())?;
        secrets::write_new_secret(&to, &keys.to_bytes(), "writer's key file")?;
        let session = vault.owner_session(&entropy(), &clock())?;
        let entry = CatalogEntry::WriterGranted { writer: keys.writer(), label: self.label.clone() };
        Catalog::load(vault.store(), vault.keys())?.append(vault.store(), vault.keys(), &session, &entry)?;
        output.object(&json!({"writer": keys.writer().to_string(), "label": self.label, "keys": to}))?;
        output.line(format!("granted {} as writer {}; its keys are in {}", self.label, keys.writer(), to.display()))
    }
}
