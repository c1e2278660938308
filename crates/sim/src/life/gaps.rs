//! No gap without a reason: each gap must belong to a misfortune that may have caused it.
//!
//! A gap says why it opened. The judge knows which misfortunes may lead to that, pairs the gap with one that happened a
//! short while before, and uses each misfortune once: the first break stands until a heal ends, so one misfortune opens
//! one gap at most. A gap for which no misfortune is left is a broken promise, however plausible its reason.

use vault::ChainHistory;
use vault::manifest::Gap;

use super::{Fault, SECOND, World};

/// How long after its misfortune a gap may come to light: a server may sleep for 40 s, twice in a row, then has to catch
/// up, and commits every few seconds.
const DELAY_NS_MAX: u64 = 90 * SECOND;

/// Something that may open a gap.
pub(super) struct Misfortune {
    pub(super) at_ns: u64,
    fault: Fault,
    /// The gap that it opened was seen.
    used: bool,
}

/// The agent's memory of the stream is gone.
const AGENT: &[Fault] = &[Fault::AgentKilled, Fault::SourcePowerCut, Fault::SourceReverted, Fault::SiteLost];
/// The link is gone for a while, or whoever is at its other end: the ring fills up.
const OUTAGE: &[Fault] = &[
    Fault::RingOverflow,
    Fault::LinkLost,
    Fault::LinkStalled,
    Fault::ServerKilled,
    Fault::ServerPowerCut,
    Fault::ServerLost,
    Fault::ServerSuspended,
    Fault::MovedByForce,
    Fault::StoreRefused,
    Fault::AnswerLost,
];
/// Another server continues the chain, or the same one without knowing that it was the last: it did not learn that it won
/// its generation's name, or had not yet noted it durably. After a planned move only the agent can say that nothing is
/// missing, and one that began anew cannot.
const TAKEN_OVER: &[Fault] = &[
    Fault::AgentKilled,
    Fault::SourcePowerCut,
    Fault::SourceReverted,
    Fault::SiteLost,
    Fault::MovedByForce,
    Fault::ServerLost,
    Fault::ServerKilled,
    Fault::ServerPowerCut,
    Fault::AnswerLost,
    Fault::StoreRefused,
];

/// A failed write is told again on each new link until its heal is committed, as a gap of its own if the first one was
/// closed already.
const WRITE_FAILED: &[Fault] = &[
    Fault::WriteFailed,
    Fault::LinkLost,
    Fault::LinkStalled,
    Fault::AgentKilled,
    Fault::ServerKilled,
    Fault::ServerPowerCut,
    Fault::ServerLost,
    Fault::ServerSuspended,
    Fault::MovedByForce,
    Fault::StoreRefused,
    Fault::AnswerLost,
];

/// What may open a gap that says `cause`; `None` if nothing that happens in this world may.
fn misfortunes_for(cause: &str) -> Option<&'static [Fault]> {
    Some(match cause {
        "the agent was restarted" | "the agent started" => AGENT,
        "the send buffer was full" | "the heal was interrupted" => OUTAGE,
        "a process server took over" | "another process server took over" => TAKEN_OVER,
        // Once more, if nothing is in the vault yet.
        "initial replication" => TAKEN_OVER,
        // A crash loses nothing that was acknowledged; only the loss of the disk does.
        "the process server's journal was lost" => &[Fault::ServerLost, Fault::MovedByForce],
        "the agent was protecting into another chain" => &[Fault::SiteLost],
        // Alone, or "too often for single ranges".
        _ if cause.starts_with("a write failed") => WRITE_FAILED,
        _ => return None,
    })
}

impl World {
    /// Notes something that may open a gap.
    pub(super) fn may_open_gap(&mut self, fault: Fault) {
        self.misfortunes.push(Misfortune { at_ns: self.time.now(), fault, used: false });
    }

    /// Notes what the store did since the last time.
    pub(super) fn note_store_faults(&mut self) {
        let tally = self.store.counts();
        for (fault, count) in [(Fault::StoreRefused, tally.refused), (Fault::AnswerLost, tally.answers_lost)] {
            let known = self.faults.insert(fault, count).unwrap_or(0);
            (known..count).for_each(|_| self.may_open_gap(fault));
        }
        self.faults.insert(Fault::NameTaken, tally.taken);
    }

    /// Judges the gaps that were recorded since the last time.
    pub(super) fn judge_gaps(&mut self, history: &ChainHistory) -> Result<(), String> {
        let known = self.gaps_seen.len();
        for gap in history.gaps() {
            let name = (gap.after, gap.time, gap.scope.clone());
            if !self.gaps_seen.contains(&name) {
                self.gaps_seen.insert(name);
                self.judge_gap(&gap)?;
            }
        }
        self.judge_move(self.gaps_seen.len() - known)
    }

    fn judge_gap(&mut self, gap: &Gap) -> Result<(), String> {
        if self.gaps_seen.len() == 1 {
            let first = gap.cause == "initial replication";
            return if first { Ok(()) } else { Err(format!("{gap:?} is not the initial replication")) };
        }
        let Some(kinds) = misfortunes_for(&gap.cause) else {
            return Err(format!("{gap:?}: nothing that happened may open such a gap"));
        };
        let oldest = self.time.now().saturating_sub(DELAY_NS_MAX);
        let mut candidates = self.misfortunes.iter_mut();
        let found = candidates.find(|one| !one.used && one.at_ns >= oldest && kinds.contains(&one.fault));
        match found {
            Some(misfortune) => {
                misfortune.used = true;
                if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
                    let age = (self.time.now() - misfortune.at_ns) as f64 / 1e9;
                    eprintln!("gap {:?}: {:?} {age:.1} s before", gap.cause, misfortune.fault);
                }
            }
            None => {
                return Err(format!("{gap:?}: nothing that may open it happened, or it opened another gap already"));
            }
        }
        Ok(())
    }
}
