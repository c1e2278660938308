//! The way home of a branch that is served here: home disks are this host's own.

use std::path::PathBuf;
use std::sync::Arc;

use recovery::home_disk::HostView;
use recovery::{HomeAddress, HomeConnector, LocalHome, MasterTarget};
use recovery::{Refusal, failback::HomeLine};
use world::RealFiles;

use crate::vault_access::{clock, entropy};

/// Makes lines to master targets.
pub(super) struct Homes {
    /// Where a master target on this host keeps its notes; made if need be.
    pub(super) notes: PathBuf,
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
                let files = Arc::new(RealFiles::new(&self.notes));
                let target = MasterTarget::new(files, clock(), entropy(), HostView::default());
                Ok(Box::new(LocalHome::new(Arc::new(target))))
            }
            HomeAddress::At(address) => Err(Refusal {
                what: format!("there is no way to the master target at {address}"),
                why: "this branch was opened without an identity for links".into(),
                advice: "run the branch on the host that has the home disk".into(),
            }),
        }
    }
}
