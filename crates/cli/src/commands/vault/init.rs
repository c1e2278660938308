//! `farshore vault init`: a new vault, and the recovery key that is shown this once.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use vault::keys::PassphraseCost;
use vault::{Vault, VaultError, probe_create_only};

use crate::failure::{Done, Failure, Verdict, io_failure};
use crate::output::Output;
use crate::secrets::{self, NewSecret};
use crate::vault_access::{VaultPlace, clock, entropy};

/// Options of `vault init`.
#[derive(Debug, Args)]
pub(crate) struct Init {
    #[command(flatten)]
    place: VaultPlace,
    /// File whose contents become the passphrase; else FARSHORE_PASSPHRASE, else the terminal is asked
    #[arg(long, value_name = "FILE", env = "FARSHORE_PASSPHRASE_FILE")]
    passphrase_file: Option<PathBuf>,
    /// Write the recovery key to this new file instead of printing it
    #[arg(long, value_name = "FILE")]
    recovery_key_to: Option<PathBuf>,
}

impl Init {
    pub(crate) fn run(&self, output: Output) -> Done {
        let folder = &self.place.vault;
        if let Err(error) = fs::create_dir(folder)
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            return Err(io_failure(format!("the folder {} cannot be made", folder.display()), &error));
        }
        if let Some(path) = self.recovery_key_to.as_ref().filter(|path| path.starts_with(folder)) {
            return Err(Failure::new(
                format!("{} lies in the vault itself", path.display()),
                "whoever holds the vault would hold its key",
                "name a file elsewhere",
            )
            .with(Verdict::Refused));
        }
        let store = self.place.store()?;
        match Vault::open(store.clone()) {
            Ok(found) => {
                let error = VaultError::AlreadyAVault { place: store.describe(), vault: found.id() };
                return Err(error.into());
            }
            Err(VaultError::NotAVault { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Asked for before anything is written: a wrong answer leaves an empty folder.
        let passphrase = secrets::new_passphrase(self.passphrase_file.as_deref())?;
        // A vault whose recovery key could not be written would be one without: its place is taken first.
        let mut kept =
            self.recovery_key_to.as_deref().map(|path| NewSecret::create(path, "recovery key")).transpose()?;
        probe_create_only(store.as_ref(), entropy().as_ref())?;
        let (vault, recovery) = Vault::create(store, &passphrase, PassphraseCost::STANDARD, &entropy(), &clock())?;
        let words = recovery.to_words();
        let vault = vault.vault();
        if let Some(file) = &mut kept {
            let kit = format!("# Farshore recovery key of the vault {}\n{words}\n", vault.fingerprint());
            if let Err(failure) = file.write(kit.as_bytes()) {
                // The vault is made; this is the only moment at which its key exists.
                output.line(format!("{kit}\nis the recovery key, which could not be written to its file"))?;
                return Err(failure);
            }
        }
        let shown = self.recovery_key_to.is_none().then_some(words.as_str());
        output.object(&json!({
            "vault": vault.id().to_string(), "fingerprint": vault.fingerprint(), "place": vault.store().describe(),
            "recovery_key": shown, "recovery_key_file": self.recovery_key_to,
        }))?;
        output.remark(format!("made the vault {} in {}", vault.id(), vault.store().describe()))?;
        output.remark(format!("fingerprint {}", vault.fingerprint()))?;
        match shown {
            Some(words) => {
                output.remark("\nRecovery key. It opens the vault without the passphrase and is shown only now:\n")?;
                for row in words.lines() {
                    output.line(format!("    {row}"))?;
                }
                output.remark("\nPrint it or write it down, with the fingerprint, and keep it away from the vault.")
            }
            None => {
                output.remark("the recovery key is in the file you named; print it and keep it away from the vault")
            }
        }
    }
}
