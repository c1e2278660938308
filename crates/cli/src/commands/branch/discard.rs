//! `farshore branch discard`

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;

use clap::Args;
use recovery::control::Command;
use recovery::{BranchConfig, BranchHost, ControlClient};
use replication::ChainId;
use rustix::fs::FlockOperation;
use serde_json::json;
use vault::{Catalog, CatalogEntry};

use super::open::{state_path, state_root};
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
    /// State directory of this host's branches: a process that serves the branch ends it
    #[arg(long, value_name = "DIR", env = "FARSHORE_STATE")]
    state_dir: Option<PathBuf>,
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
        if !self.ended_by_its_server(named.chain, &named.name)? {
            let root = state_root(self.state_dir.as_deref())?;
            let host = BranchHost::new(vault.clone(), root, clock(), entropy(), BranchConfig::default());
            let session = host.writer()?;
            let entry = CatalogEntry::BranchDiscarded { chain: named.chain };
            catalog.append(vault.store(), vault.keys(), &session, &entry)?;
        }
        output.object(&json!({"branch": named.name, "chain": named.chain.to_string(), "discarded": true}))?;
        output.line(format!("discarded the branch {}; what was written on it stays in the vault for now", named.name))
    }

    /// Has the process of this host that serves the branch end it, so that nobody writes to what was given up. `false` if
    /// no process does.
    fn ended_by_its_server(&self, chain: ChainId, name: &str) -> Done<bool> {
        let Some(directory) = state_path(self.state_dir.as_deref()).map(|root| root.join(chain.to_string())) else {
            return Ok(false);
        };
        let refused =
            |what: String, why: String, advice: &str| Err(Failure::new(what, why, advice).with(Verdict::Refused));
        match ControlClient::new(&directory).ask(&Command::Discard) {
            Ok(answer) => match answer.problem {
                None => Ok(true),
                Some(refusal) => {
                    let what = format!("process {} serves the branch {name}: {}", answer.process, refusal.what);
                    refused(what, refusal.why, &refusal.advice)
                }
            },
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                // A process that has just been started, or is just ending, has no socket.
                let lock = directory.join("lock");
                let held = File::open(&lock).is_ok_and(|file| {
                    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
                        == Err(rustix::io::Errno::WOULDBLOCK)
                });
                match held {
                    false => Ok(false),
                    true => refused(
                        format!("a process of this host serves the branch {name} and does not answer"),
                        format!("it holds {}", lock.display()),
                        "wait until it answers, or stop it, then repeat",
                    ),
                }
            }
            Err(error) => refused(
                format!("the process of this host that serves the branch {name} does not answer"),
                error.to_string(),
                "stop it (Ctrl-C where it runs), then repeat",
            ),
        }
    }
}
