//! Whose turn it is on a chain: who may write the next manifest, and which.
//!
//! ```text
//! machine's chain   genesis ─► open ◄──────────── cancel ──┐
//!  (process servers)            └────── close ─► closed ───┤
//!                                                          └ commit ─► ended
//! branch's chain    genesis ─► open ── hand over ─► as a machine's chain
//!  (branch hosts)
//! ```
//! The answer follows from the chain alone: from the manifests that opened its generations, and the roles their writers
//! were granted. What is not admitted burns its number, whoever signed it. `docs/design/0006` argues each line.

use replication::ChainId;

use crate::error::VaultError;
use crate::keys::{Authority, WriterId, WriterRole};
use crate::manifest::{ManifestKind, ManifestLink, SignedManifest};

/// Who writes a chain's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// It is a machine's.
    ProcessServers,
    /// It is a branch's that has not come home.
    BranchHosts,
}

/// A close that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// The manifest.
    pub close: ManifestLink,
    /// The branch that goes on instead.
    pub successor: ChainId,
    /// Wall time of the operator, in seconds since 1970.
    pub seconds: u64,
}

/// Whether a chain takes history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It does.
    Open,
    /// Not until the failover is cancelled.
    Closed(Closed),
    /// Never again: the failover is committed.
    Ended(Closed),
}

/// Where a chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Who writes it.
    pub holder: Holder,
    /// Whether it takes history.
    pub phase: Phase,
    /// The failover that was taken back last, unless another has begun since.
    pub cancelled: Option<Closed>,
}

impl Standing {
    /// Where a chain stands after its first manifest; `None` if its writer may not begin such a chain.
    pub(crate) fn begun(kind: &ManifestKind, authority: Authority) -> Option<Standing> {
        let ManifestKind::Genesis { parent, .. } = kind else { return None };
        let holder = if parent.is_some() { Holder::BranchHosts } else { Holder::ProcessServers };
        authority.is(holder.role()).then_some(Standing { holder, phase: Phase::Open, cancelled: None })
    }

    /// Where it stands after one more manifest of this kind; `None` if its writer may not say that now.
    pub(crate) fn then(self, kind: &ManifestKind, authority: Authority, link: ManifestLink) -> Option<Standing> {
        let operator = authority.is(WriterRole::Operator);
        let (admitted, next) = match (self.phase, kind) {
            (Phase::Open, ManifestKind::OpenGeneration { .. } | ManifestKind::Append) => {
                (authority.is(self.holder.role()), self)
            }
            (Phase::Open, ManifestKind::Close { successor, seconds, .. }) => {
                let closed = Closed { close: link, successor: *successor, seconds: *seconds };
                (
                    operator && self.holder == Holder::ProcessServers,
                    Standing { phase: Phase::Closed(closed), cancelled: None, ..self },
                )
            }
            (Phase::Open, ManifestKind::HandOver) => (
                self.holder == Holder::BranchHosts && (operator || authority.is(WriterRole::BranchHost)),
                Standing { holder: Holder::ProcessServers, ..self },
            ),
            (Phase::Closed(closed), ManifestKind::Commit { close }) => {
                (operator && *close == closed.close.nonce, Standing { phase: Phase::Ended(closed), ..self })
            }
            (Phase::Closed(closed), ManifestKind::Cancel { close, .. }) => {
                let open = Standing { phase: Phase::Open, cancelled: Some(closed), ..self };
                (operator && *close == closed.close.nonce, open)
            }
            _ => return None,
        };
        admitted.then_some(next)
    }

    /// As [`Standing::begun`] and [`Standing::then`], for a manifest that was read.
    pub(crate) fn after(before: Option<Standing>, manifest: &SignedManifest) -> Option<Standing> {
        let (kind, authority) = (&manifest.manifest.kind, manifest.authority);
        match before {
            None => Standing::begun(kind, authority),
            Some(standing) => standing.then(kind, authority, manifest.link),
        }
    }

    /// The close that stands, committed or not.
    pub fn closed(&self) -> Option<Closed> {
        match self.phase {
            Phase::Open => None,
            Phase::Closed(closed) | Phase::Ended(closed) => Some(closed),
        }
    }

    /// What to tell a writer whose manifest of this kind would not count.
    pub(crate) fn refusal(self, chain: ChainId, kind: &ManifestKind, writer: WriterId) -> VaultError {
        let history = matches!(kind, ManifestKind::OpenGeneration { .. } | ManifestKind::Append);
        match (self.phase, self.holder) {
            (Phase::Closed(closed), _) if history || matches!(kind, ManifestKind::Close { .. }) => {
                VaultError::ChainClosed { chain, successor: closed.successor, ended: false }
            }
            (Phase::Ended(closed), _) => VaultError::ChainClosed { chain, successor: closed.successor, ended: true },
            (_, Holder::BranchHosts) if matches!(kind, ManifestKind::Close { .. }) => {
                VaultError::WrongChainState { chain, reason: "it is a branch's; only a machine's chain fails over" }
            }
            (_, Holder::BranchHosts) if history => VaultError::NotPermitted {
                writer,
                reason: "this is a branch's chain that was not brought home; branch hosts write it",
            },
            (_, Holder::ProcessServers) if history => {
                VaultError::NotPermitted { writer, reason: "this is a machine's chain; process servers write it" }
            }
            (Phase::Open, _) if matches!(kind, ManifestKind::Commit { .. } | ManifestKind::Cancel { .. }) => {
                VaultError::WrongChainState { chain, reason: "it is not closed: there is no failover to decide on" }
            }
            _ => VaultError::NotPermitted { writer, reason: "failing a machine over takes an operator's grant" },
        }
    }
}

impl Holder {
    fn role(self) -> WriterRole {
        match self {
            Holder::ProcessServers => WriterRole::ProcessServer,
            Holder::BranchHosts => WriterRole::BranchHost,
        }
    }
}
