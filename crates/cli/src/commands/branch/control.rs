//! The way home of a branch that is served here: to disks of this host, or to the master target of another.

use std::path::PathBuf;
use std::sync::Arc;

use recovery::home_disk::HostView;
use recovery::{HomeAddress, HomeConnector, HomeRules, LocalHome, MasterTarget, RemoteHome};
use recovery::{Refusal, failback::HomeLine};
use world::RealFiles;

use crate::commands::join;
use crate::failure::Failure;
use crate::vault_access::{clock, entropy};

/// Makes lines to master targets.
pub(super) struct Homes {
    /// Where a master target on this host keeps its notes; made if need be.
    pub(super) notes: PathBuf,
    /// The host's state of branches, with its identity for links.
    pub(super) root: PathBuf,
    /// The folder of the vault.
    pub(super) vault: PathBuf,
}

impl HomeConnector for Homes {
    fn line(&self, address: &HomeAddress) -> Result<Box<dyn HomeLine>, Refusal> {
        match address {
            HomeAddress::Here => {
                std::fs::create_dir_all(&self.notes).map_err(|error| Refusal {
                    what: format!("the folder {} cannot be made", self.notes.display()),
                    why: error.to_string(),
                    advice: "name another state directory with --state-dir".into(),
                })?;
                let rules = HomeRules {
                    allowed: None,
                    own: vec![
                        (self.root.clone(), "the state of this host's branches".into()),
                        (self.vault.clone(), "the vault".into()),
                    ],
                    host: HostView::default(),
                };
                let target = MasterTarget::new(Arc::new(RealFiles::new(&self.notes)), clock(), entropy(), rules);
                Ok(Box::new(LocalHome::new(Arc::new(target))))
            }
            HomeAddress::At(address) => {
                let connector = join::connector(&self.root, address).map_err(refusal)?;
                Ok(Box::new(RemoteHome::new(connector, address)))
            }
        }
    }
}

fn refusal(failure: Failure) -> Refusal {
    Refusal { what: failure.what, why: failure.why, advice: failure.remedy }
}
