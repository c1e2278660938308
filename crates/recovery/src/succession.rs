//! Whether a branch may become its machine's history, which is what a failback ends with.
//!
//! ```text
//! the machine's chain   closed for this branch ─► yes: it failed over
//!                       closed for another     ─► no: bring that one home, or cancel
//!                       open                   ─► no, unless asked to close it: then closed for this branch at the cut over
//! ```
//! A chain that is left open while its machine follows another would take writes that nobody ever looks at. So it is closed
//! by the manifests of a failover, which fence whoever writes to it, before the branch's chain is handed over.

use replication::ChainId;
use serde::{Deserialize, Serialize};
use vault::chain::Phase;
use vault::{Catalog, ChainControl, ChainHistory, VaultError};

use crate::branch::Branch;
use crate::home_disk::Refusal;
use crate::limits;

/// What a failback may do with the machine's own chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Succession {
    /// Nothing: the machine must have failed over to the branch.
    #[default]
    AfterFailover,
    /// Close it in favour of the branch, at the cut over. What the machine wrote since the branch began is left behind.
    CloseHistory,
}

/// Why a branch does not become its machine's history.
#[derive(Debug)]
pub(crate) enum NoSuccession {
    /// It must not.
    Refused(Refusal),
    /// The vault cannot be asked, or not be written to.
    Vault(VaultError),
}

impl From<VaultError> for NoSuccession {
    fn from(error: VaultError) -> NoSuccession {
        NoSuccession::Vault(error)
    }
}

impl Branch {
    /// Whether the branch may become the machine's history; if the machine's chain is to be closed for that, which.
    pub(crate) fn judge_succession(&self, wish: Succession) -> Result<Option<ChainId>, NoSuccession> {
        // The vault never hears of a branch that stays on its host.
        if self.info.local {
            return Ok(None);
        }
        let (store, keys) = (self.ending.vault.store(), self.ending.vault.keys());
        let catalog = Catalog::load(store, keys)?;
        let Some(machine) = catalog.machines.get(&self.info.machine) else { return Ok(None) };
        if machine.chain == self.info.branch {
            return Ok(None);
        }
        let Some(history) = ChainHistory::find(store, keys, machine.chain)? else { return Ok(None) };
        let name = &machine.name;
        let refuse =
            |what: String, why: &str, advice: String| Err(NoSuccession::Refused(Refusal::new(what, why, advice)));
        match (history.standing.phase, wish) {
            (Phase::Closed(closed) | Phase::Ended(closed), _) if closed.successor == self.info.branch => Ok(None),
            (Phase::Closed(closed), _) => refuse(
                format!("{name} has failed over to another branch: {}", closed.successor),
                "two branches cannot both become its history",
                "bring that branch home, or take its failover back with `farshore failover cancel`, then repeat".into(),
            ),
            (Phase::Ended(closed), Succession::AfterFailover) => refuse(
                format!("{name} has failed over for good to another branch: {}", closed.successor),
                "the machine goes on there, and two branches cannot both become its history",
                "bring that branch home; if it is given up, repeat with --close-history".into(),
            ),
            (Phase::Ended(_), Succession::CloseHistory) => Ok(None),
            (Phase::Open, Succession::AfterFailover) => {
                let age = self.clock.wall().0.saturating_sub(history.proven_through.0) / 1_000_000_000;
                let heard = match age < limits::HEARD_RECENTLY.as_secs() {
                    true => format!("; it was heard from {age} s ago"),
                    false => String::new(),
                };
                refuse(
                    format!("{name} has not failed over: its own history is open{heard}"),
                    "a failback makes the branch its history, and whatever the machine wrote since the branch began would be \
                     left behind",
                    format!(
                        "if it runs on this branch because it was lost, or is given up, repeat with --close-history; else fail \
                         over with `farshore failover {name}` and bring that branch home"
                    ),
                )
            }
            (Phase::Open, Succession::CloseHistory) if self.ending.operator.is_none() => refuse(
                format!("the history of {name} cannot be closed from here"),
                "that takes the authority of an operator or of the vault's owner, and this branch is served without",
                "stop the branch and serve it again with the passphrase or the recovery key: `farshore branch reopen`"
                    .into(),
            ),
            (Phase::Open, Succession::CloseHistory) => Ok(Some(machine.chain)),
        }
    }

    /// From its return on nobody adds to another chain as the machine's history. Done already is done.
    pub(crate) fn take_succession(&self, wish: Succession) -> Result<(), NoSuccession> {
        if let (Some(chain), Some(operator)) = (self.judge_succession(wish)?, &self.ending.operator) {
            let control = ChainControl::new(self.ending.vault.store(), operator, self.ending.vault.keys());
            control.close(chain, self.info.branch, "failback of a branch instead of the machine")?;
            tracing::warn!(%chain, branch = %self.info.branch, "the machine's own history was closed in favour of the branch");
        }
        Ok(())
    }
}
