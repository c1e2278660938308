//! Revoking a writer: its generations are fenced first, by the same rule as every take-over, and then the catalog names
//! the numbers from which it fails. In that order nothing that it committed, and was believed, is lost afterwards.
//!
//! The same entry begins another epoch of the name key, of which the revoked writer gets no copy:
//!
//! ```text
//! fence its chains ─► make a name key ─► copies for the read key and every other writer ─► catalog entry ─► later writers
//!                        ▲                                                             taken by another │
//!                        └── another key, without whoever was revoked meanwhile ◄───────────────────────┘
//! ```
//! The next generation of each chain leads into that epoch. Until then, in chains that somebody else is writing, the
//! revoked writer can still burn numbers, which costs readers a request each, and from then on nothing. It can always read
//! indexes, not data.
//!
//! A crash leaves a fenced chain, which the next process server opens, or copies of a key that no catalog entry names.
//! Revoke again: that makes another key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use replication::ChainId;
use world::{Clock, Entropy};

use crate::catalog::{Catalog, CatalogEntry};
use crate::chain::{ChainHistory, ChainWriter, list_chains};
use crate::error::VaultError;
use crate::keys::{Grant, NameKey, NameSwitch, WriterId, WriterSession};
use crate::limits;
use crate::manifest::Delta;
use crate::vault::{UnlockedVault, list_grants};

/// What ended with a grant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Chains that the writer was writing, now without a writer.
    pub fenced: Vec<ChainId>,
    /// The number from which its manifests fail, for each chain it wrote to.
    pub fails_from: BTreeMap<ChainId, u64>,
    /// Writers to whom the next name key was given.
    pub remaining: Vec<WriterId>,
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
    let reason = crate::chain::cut_text(reason);
    let mut catalog = Catalog::load(vault.store(), vault.keys())?;
    let given = loop {
        let before = catalog.revoked.clone();
        let remaining = remaining(vault, &catalog, writer)?;
        let names = Some(make_name_key(vault, &session, &remaining)?);
        let fails_from = revoked.fails_from.clone();
        let entry = CatalogEntry::GrantRevoked { writer, fails_from, reason: reason.clone(), names };
        // Other entries may come first. Another revocation may not: its writer holds a copy of this key.
        let mut won = false;
        while !won && catalog.revoked == before {
            won = catalog.append_next(vault.store(), vault.keys(), &session, &entry)?;
        }
        if won {
            break remaining.into_iter().map(|grant| grant.writer).collect::<BTreeSet<WriterId>>();
        }
    };
    // Whoever was granted while the key was made.
    for grant in self::remaining(vault, &catalog, writer)? {
        if !given.contains(&grant.writer) {
            vault.share_name_keys(&session, &grant)?;
        }
    }
    Ok(Revoked { remaining: given.into_iter().collect(), ..revoked })
}

/// The grants that go on.
fn remaining(vault: &UnlockedVault, catalog: &Catalog, writer: WriterId) -> Result<Vec<Grant>, VaultError> {
    let mut grants = list_grants(vault.store(), vault.keys())?;
    grants.retain(|grant| grant.writer != writer && !catalog.revoked.contains_key(&grant.writer));
    Ok(grants)
}

/// Makes a name key of an epoch that no key was made for before, for the read key and `remaining`.
fn make_name_key(
    vault: &UnlockedVault,
    session: &WriterSession,
    remaining: &[Grant],
) -> Result<NameSwitch, VaultError> {
    let newest = vault.keys().newest_names().map(|switch| switch.epoch).unwrap_or_default();
    let epoch = newest.max(vault.keys().newest_made(vault.store())?).next();
    let key = NameKey::generate(session.entropy());
    // The read key's copy comes first: whatever writers come to hold, readers can find.
    vault.put_name_key(session, &key, epoch, (WriterId::OWNER, vault.read_secret().public()))?;
    for grant in remaining {
        vault.put_name_key(session, &key, epoch, (grant.writer, grant.sealing))?;
    }
    Ok(key.switch_to(epoch))
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
