//! A failover while the machine still runs, and what becomes of it.
//!
//! ```text
//! open ─► closed ─► branch in use ─┬─ cancelled: the server heals the machine, which goes on where it is
//!                                  ├─ committed: the machine is shut down and comes home as its branch
//!                                  └─ nothing is said: coming home commits it
//! ```
//!
//! Checked: from the close on nobody adds to the chain, whoever sleeps with work in his hands, until that is cancelled;
//! nothing but a commit or a cancel follows a close; what has come to an end stays there.

use std::collections::BTreeMap;

use replication::{ChainId, SequenceNumber};
use vault::chain::{Alarm, Phase};
use vault::{ChainControl, ChainHistory, Moment, VaultError};

use super::{Fault, SECOND, World};

/// A failover that somebody has begun.
pub(super) struct Decision {
    chain: ChainId,
    successor: ChainId,
    outcome: Outcome,
    decide_at: u64,
    /// The branch holds a sector that nobody can read: no machine can run on it.
    unusable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Cancelled,
    Committed,
    LeftToTheReturn,
}

/// A chain that is closed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Closed {
    successor: ChainId,
    /// Everything that was committed before.
    through: SequenceNumber,
}

/// Which chains the machine left behind, for which, and how far they were when somebody closed them before the return.
pub(super) type LeftBehind = BTreeMap<ChainId, (ChainId, Option<Closed>)>;

/// Whether the store was at fault, or somebody else was quicker: to be tried again.
fn is_transient(error: &VaultError) -> bool {
    matches!(error, VaultError::Fenced { .. }) || format!("{error:?}").contains("injected")
}

impl World {
    /// Whether a failover is under way.
    pub(super) fn is_deciding(&self) -> bool {
        self.decision.is_some()
    }

    /// Somebody fails the machine over although it runs.
    pub(super) fn begin_decision(&mut self) -> Result<(), String> {
        self.judge()?;
        let Some(chain) = self.chain() else { return Ok(()) };
        if self.announced.is_empty() || self.is_away() || self.is_quiet() || self.decision.is_some() {
            return Ok(());
        }
        let rng = &mut self.branches.rng;
        let mut successor = [0; 16];
        rng.fill(&mut successor);
        let outcome = match rng.below(4) {
            0 => Outcome::Committed,
            1 => Outcome::LeftToTheReturn,
            _ => Outcome::Cancelled,
        };
        let decide_at = self.time.now() + 2 * SECOND + rng.below(18 * SECOND);
        if rng.one_in(2) {
            // It wakes up with work for a chain that is closed.
            self.strike(Fault::ServerSuspended);
            self.suspended_until[self.assigned] = self.time.now() + self.branches.rng.below(25 * SECOND);
        }
        self.decision = Some(Decision { chain, successor: ChainId(successor), outcome, decide_at, unusable: false });
        Ok(())
    }

    pub(super) fn step_decision(&mut self) -> Result<(), String> {
        let Some(decision) = self.decision.take() else { return Ok(()) };
        self.decision = self.decide(decision)?;
        Ok(())
    }

    fn control<T>(&self, act: impl FnOnce(&ChainControl<'_>) -> Result<T, VaultError>) -> Result<Option<T>, String> {
        match act(&ChainControl::new(self.unlocked.store(), &self.operator, self.unlocked.keys())) {
            Ok(done) => Ok(Some(done)),
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(format!("an operator's decision was refused: {error:?}")),
        }
    }

    /// The next step of a failover; nothing once it is over.
    fn decide(&mut self, mut decision: Decision) -> Result<Option<Decision>, String> {
        let Decision { chain, successor, .. } = decision;
        if self.closed.is_none() {
            let Some(history) = self.control(|control| control.close(chain, successor, "a drill"))? else {
                return Ok(Some(decision));
            };
            self.closed = Some(Closed { successor, through: history.through });
            self.strike(Fault::FailoverClosed);
            self.judge_standing(&history)?;
            self.judge_refusals(&history)?;
            return Ok(Some(decision));
        }
        if decision.unusable {
            return Ok((!self.take_back(chain)?).then_some(decision));
        }
        let site = &self.branches.site;
        let Some(index) = site.index_of(successor) else {
            let announced = self.announced.clone();
            let moment = match self.branches.rng.below(2) {
                0 => Moment::Latest,
                _ => Moment::Sequence(*announced.keys().next_back().expect("there are points")),
            };
            self.open_branch((chain, Some(successor)), &moment, &announced, u64::MAX)?;
            return Ok(Some(decision));
        };
        if site.tenants[index].is_unreadable {
            self.branches.site.tenants[index].ends_at = 0;
            (decision.unusable, decision.outcome) = (true, Outcome::Cancelled);
            return Ok(Some(decision));
        }
        if self.time.now() < decision.decide_at || site.tenants[index].model.is_none() {
            return Ok(Some(decision));
        }
        match decision.outcome {
            Outcome::Cancelled => {
                if !self.take_back(chain)? {
                    return Ok(Some(decision));
                }
                let until = self.time.now() + self.branches.rng.below(20 * SECOND);
                self.branches.site.tenants[index].ends_at = until;
            }
            Outcome::Committed => {
                let Some(history) = self.control(|control| control.commit(chain))? else { return Ok(Some(decision)) };
                self.count(Fault::FailoverCommitted);
                self.judge_standing(&history)?;
                self.judge_refusals(&history)?;
                self.go_on_as(index);
            }
            Outcome::LeftToTheReturn => self.go_on_as(index),
        }
        Ok(None)
    }

    /// Cancels the failover; `false` if the store was at fault.
    fn take_back(&mut self, chain: ChainId) -> Result<bool, String> {
        let done = self.control(|control| control.cancel(chain, "it was a drill"))?.is_some();
        if done {
            self.closed = None;
            self.strike(Fault::FailoverCancelled);
        }
        Ok(done)
    }

    /// The machine is shut down, and goes on as the branch.
    fn go_on_as(&mut self, index: usize) {
        let tenant = &mut self.branches.site.tenants[index];
        tenant.is_failover = true;
        let id = tenant.id;
        self.leave_for(Some(id));
    }

    /// The machine came home along the chain `next`.
    pub(super) fn left_behind(&mut self, chain: ChainId, next: ChainId) {
        let closed = self.closed.take();
        self.branches.left_behind.insert(chain, (next, closed));
    }

    /// What stands between a chain and its next manifest is what was decided, and nobody else got anything in.
    pub(super) fn judge_standing(&self, history: &ChainHistory) -> Result<(), String> {
        if let Some(alarm) = history.alarms.iter().find(|alarm| !matches!(alarm, Alarm::Untagged(_))) {
            return Err(format!(
                "chain {} holds what does not count, and nobody forged anything: {alarm:?}",
                history.chain
            ));
        }
        let returning = self.branches.failover.as_ref().and_then(|failover| failover.branch);
        match (history.standing.phase, &self.closed, &self.decision) {
            (Phase::Open, None, _) => Ok(()),
            // By the return, which is about to end.
            (Phase::Closed(closed) | Phase::Ended(closed), None, None) if Some(closed.successor) == returning => Ok(()),
            // Cancelled, and the answer was lost.
            (Phase::Open, Some(_), Some(decision)) if decision.outcome == Outcome::Cancelled => Ok(()),
            // Closed, and the answer was lost.
            (Phase::Closed(closed), None, Some(decision)) if closed.successor == decision.successor => Ok(()),
            (Phase::Closed(_) | Phase::Ended(_), Some(closed), _) => judge_closed(history, closed),
            (phase, ..) => Err(format!("chain {} is {phase:?}, which nobody decided", history.chain)),
        }
    }

    /// Nothing but a commit or a cancel follows a close, and nothing a commit.
    fn judge_refusals(&self, history: &ChainHistory) -> Result<(), String> {
        let control = ChainControl::new(self.unlocked.store(), &self.operator, self.unlocked.keys());
        let chain = history.chain;
        let mut tried = vec![("another close", control.close(chain, ChainId([0xee; 16]), "too late"))];
        if matches!(history.standing.phase, Phase::Ended(_)) {
            tried.push(("a cancel", control.cancel(chain, "too late")));
        }
        for (what, result) in tried {
            if !matches!(result, Err(VaultError::ChainClosed { .. })) {
                return Err(format!("{what} of chain {chain}, which is closed, came to {result:?}"));
            }
        }
        let after = self.chain_history(chain)?;
        if after.head != history.head {
            return Err(format!("chain {chain} was closed and has gone on"));
        }
        Ok(())
    }

    /// A chain that the machine left has ended in favour of the one that it came home along, and has not grown since.
    pub(super) fn judge_left_behind(&self, history: &ChainHistory) -> Result<(), String> {
        match (self.branches.left_behind.get(&history.chain), history.standing.phase) {
            (Some((next, closed)), Phase::Ended(ended)) if ended.successor == *next => {
                closed.as_ref().map_or(Ok(()), |closed| judge_closed(history, closed))
            }
            (left, phase) => Err(format!("chain {} was left for {left:?} and is {phase:?}", history.chain)),
        }
    }
}

/// A closed chain ends with what was decided about it.
fn judge_closed(history: &ChainHistory, closed: &Closed) -> Result<(), String> {
    let successor = history.standing.closed().map(|closed| closed.successor);
    let is_last = history.generation().opened == history.head.number;
    if successor != Some(closed.successor) || history.through != closed.through || !is_last {
        return Err(format!("chain {} was closed as {closed:?} and has grown to {}", history.chain, history.through));
    }
    Ok(())
}
