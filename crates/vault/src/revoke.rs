//! Revoking a writer: its generations are fenced first, by the same rule as every take-over, and then the catalog names
//! the numbers from which it fails. In that order nothing that it committed, and was believed, is lost afterwards.
//!
//! What a revoked writer still can do: it holds the shared keys, so it can read indexes (not data) and burn numbers of
//! chains with objects that do not count. Rotating the name key ends the latter; its fields are reserved.

use std::collections::BTreeMap;
use std::sync::Arc;

use replication::ChainId;
use world::{Clock, Entropy};

use crate::catalog::{Catalog, CatalogEntry};
use crate::chain::{ChainHistory, ChainWriter, list_chains};
use crate::error::VaultError;
use crate::keys::{WriterId, WriterSession};
use crate::limits;
use crate::manifest::Delta;
use crate::vault::UnlockedVault;

/// What ended with a grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Chains that the writer was writing, now without a writer.
    pub fenced: Vec<ChainId>,
    /// The number from which its manifests fail, for each chain it wrote to.
    pub fails_from: BTreeMap<ChainId, u64>,
}

/// Ends the grant of `writer`. Durable on return; what it committed before stays valid.
///
/// # Errors
/// [`VaultError::OwnerKeyNeeded`]; those of the store: call again.
pub fn revoke_writer(
    vault: &UnlockedVault,
    writer: WriterId,
    reason: &str,
    entropy: &Arc<dyn Entropy>,
    clock: &Arc<dyn Clock>,
) -> Result<Revoked, VaultError> {
    let session = Arc::new(vault.owner_session(entropy, clock)?);
    let mut revoked = Revoked::default();
    for chain in list_chains(vault.store().as_ref())? {
        let Some((history, fenced)) = fence(vault, &session, chain, writer)? else { continue };
        if fenced {
            revoked.fenced.push(chain);
        }
        if history.generations.iter().any(|generation| generation.writer == writer) {
            revoked.fails_from.insert(chain, history.next_number);
        }
    }
    let entry = CatalogEntry::GrantRevoked {
        writer,
        fails_from: revoked.fails_from.clone(),
        reason: crate::chain::cut_text(reason),
        name_epoch: 0,
    };
    Catalog::load(vault.store(), vault.keys())?.append(vault.store(), vault.keys(), &session, &entry)?;
    Ok(revoked)
}

/// Takes the chain from `writer` if it is the one who writes it now. The chain as it is then.
fn fence(
    vault: &UnlockedVault,
    session: &Arc<WriterSession>,
    chain: ChainId,
    writer: WriterId,
) -> Result<Option<(ChainHistory, bool)>, VaultError> {
    let mut fenced = false;
    for _ in 0..limits::CONTROL_RACES_MAX {
        let Some(history) = ChainHistory::find(vault.store(), vault.keys(), chain)? else { return Ok(None) };
        if history.generation().writer != writer || history.standing.closed().is_some() {
            return Ok(Some((history, fenced)));
        }
        let why = "the grant of its writer was revoked";
        match ChainWriter::open_generation(vault.store(), session, vault.keys(), &history, why, Delta::default()) {
            Ok(_) => fenced = true,
            Err(VaultError::Fenced { .. }) => {}
            // A chain with damage at its end takes no writer at all until it is brought back.
            Err(VaultError::WrongChainState { .. }) => return Ok(Some((history, fenced))),
            Err(error) => return Err(error),
        }
    }
    Err(VaultError::WrongChainState { chain, reason: "others write to it too quickly; try again" })
}
