//! Decisions about a chain: a machine's fails over (close), that stands (commit) or is taken back (cancel); a branch's
//! comes home (hand over). Each is one manifest with a generation of its own, so winning its name fences whoever wrote
//! before, by the same rule as every take-over.

use std::sync::Arc;

use replication::ChainId;

use super::standing::{Closed, Holder, Phase, Standing};
use super::writer::cut_text;
use super::{ChainHistory, ChainWriter};
use crate::error::VaultError;
use crate::keys::{OpenKeys, WriterSession};
use crate::limits;
use crate::manifest::ManifestKind;
use crate::store::Store;

/// Decides about one vault's chains, with the grant of an operator or of a branch host.
pub struct ChainControl<'a> {
    store: &'a Arc<dyn Store>,
    session: &'a Arc<WriterSession>,
    keys: &'a Arc<OpenKeys>,
}

impl<'a> ChainControl<'a> {
    /// Decisions signed by `session`.
    pub fn new(
        store: &'a Arc<dyn Store>,
        session: &'a Arc<WriterSession>,
        keys: &'a Arc<OpenKeys>,
    ) -> ChainControl<'a> {
        ChainControl { store, session, keys }
    }

    /// Closes a machine's chain in favour of the branch `successor`. From its return on, nobody adds to the chain; what
    /// was committed before it stays. Returns the chain as it was closed.
    ///
    /// # Errors
    /// [`VaultError::ChainClosed`] if another failover came first.
    pub fn close(&self, chain: ChainId, successor: ChainId, reason: &str) -> Result<ChainHistory, VaultError> {
        let seconds = self.session.clock().wall().seconds();
        self.decide(chain, |history| match history.standing.phase {
            Phase::Closed(closed) if closed.successor == successor => Ok(None),
            _ => Ok(Some(ManifestKind::Close { successor, reason: cut_text(reason), seconds })),
        })
    }

    /// Lets the failover of a closed chain stand. Done already is done.
    ///
    /// # Errors
    /// [`VaultError::WrongChainState`] if the chain is not closed.
    pub fn commit(&self, chain: ChainId) -> Result<ChainHistory, VaultError> {
        self.decide(chain, |history| match history.standing.phase {
            Phase::Ended(_) => Ok(None),
            _ => Ok(Some(ManifestKind::Commit { close: close_of(history)?.close.nonce })),
        })
    }

    /// Takes the failover of a closed chain back: the next process server opens a generation and heals. Done already is
    /// done: whoever did not hear the answer asks again.
    ///
    /// # Errors
    /// [`VaultError::WrongChainState`] if the chain is not closed, [`VaultError::ChainClosed`] if that was committed.
    pub fn cancel(&self, chain: ChainId, reason: &str) -> Result<ChainHistory, VaultError> {
        self.decide(chain, |history| match history.standing {
            Standing { phase: Phase::Open, cancelled: Some(_), .. } => Ok(None),
            _ => Ok(Some(ManifestKind::Cancel { close: close_of(history)?.close.nonce, reason: cut_text(reason) })),
        })
    }

    /// Hands a branch's chain over to process servers, because the branch came home. Done already is done.
    ///
    /// # Errors
    /// [`VaultError::NotPermitted`] if the session is no branch host's.
    pub fn hand_over(&self, chain: ChainId) -> Result<ChainHistory, VaultError> {
        self.decide(chain, |history| {
            Ok((history.standing.holder == Holder::BranchHosts).then_some(ManifestKind::HandOver))
        })
    }

    /// Puts a decision right behind `history`.
    ///
    /// # Errors
    /// [`VaultError::Fenced`] if the chain went on since `history` was loaded: load it again and decide anew.
    pub fn decide_after(&self, history: &ChainHistory, kind: ManifestKind) -> Result<(), VaultError> {
        ChainWriter::decide(self.store, self.session, self.keys, history, kind)
    }

    /// Writes the manifest that `wish` asks for behind whatever head there is.
    fn decide(
        &self,
        chain: ChainId,
        wish: impl Fn(&ChainHistory) -> Result<Option<ManifestKind>, VaultError>,
    ) -> Result<ChainHistory, VaultError> {
        let mut last = VaultError::WrongChainState { chain, reason: "others write to it too quickly; try again" };
        for _ in 0..limits::CONTROL_RACES_MAX {
            let history = ChainHistory::load(self.store, self.keys, chain)?;
            let Some(kind) = wish(&history)? else { return Ok(history) };
            match self.decide_after(&history, kind) {
                Ok(()) => return ChainHistory::load(self.store, self.keys, chain),
                // A commit slipped in between: its history is kept, and the decision follows it.
                Err(error @ VaultError::Fenced { .. }) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }
}

fn close_of(history: &ChainHistory) -> Result<Closed, VaultError> {
    history.standing.closed().ok_or(VaultError::WrongChainState {
        chain: history.chain,
        reason: "it is not closed: there is no failover to decide on",
    })
}
