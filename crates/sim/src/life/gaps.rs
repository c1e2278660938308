//! No gap without a reason: each gap must belong to a misfortune that may have caused it.
//!
//! A gap says why it opened. The judge knows which misfortunes may lead to that, pairs the gap with one that happened a
//! short while before, and uses each misfortune once: the first break stands until a heal ends, so one misfortune opens
//! one gap at most. A gap for which no misfortune is left is a broken promise, however plausible its reason.
//!
//! What can be seen is not guessed: an overflow of the ring is watched as it happens, when it is plain whether the way to
//! the vault was disturbed; a server's failed start is in its own words; what a gap of ranges names must be what
//! something happened to. `docs/design/0005` says what each rule is there for.

use replication::Ranges;
use vault::ChainHistory;
use vault::manifest::{Gap, GapScope};

use super::{Fault, SECOND, World};
use crate::model::WHOLE_DISK;

/// How long after its misfortune a gap may come to light: a server may sleep for 40 s, twice in a row, then has to catch
/// up, and commits every few seconds.
const DELAY_NS_MAX: u64 = 90 * SECOND;
/// How long after a disturbance the ring may still overflow: what piled up meanwhile goes out first.
const CATCH_UP_NS: u64 = 10 * SECOND;

/// Something that may open a gap.
pub(super) struct Misfortune {
    pub(super) at_ns: u64,
    fault: Fault,
    /// The gap that it opened was seen.
    used: bool,
}

/// The agent's memory of the stream is gone. `AgentRestarted` stands for an end in order that came to nothing.
const AGENT: &[Fault] =
    &[Fault::AgentKilled, Fault::SourcePowerCut, Fault::SourceReverted, Fault::SiteLost, Fault::AgentRestarted];
/// The link is gone or given up, and with it a heal that had not been committed.
const LINK: &[Fault] = &[
    Fault::LinkLost,
    Fault::LinkStalled,
    Fault::ServerKilled,
    Fault::ServerPowerCut,
    Fault::ServerLost,
    Fault::ServerSuspended,
    Fault::MovedByForce,
    Fault::FailoverClosed,
    Fault::OpeningFailed,
];
/// Another server continues the chain, or the same one without knowing that it was the last: it did not learn that it won
/// its generation's name, or had not yet noted it durably. A machine that came home is new to whoever takes its branch over.
const TAKEN_OVER: &[Fault] = &[
    Fault::MovedByForce,
    Fault::ServerLost,
    Fault::ServerKilled,
    Fault::ServerPowerCut,
    Fault::OpeningFailed,
    Fault::FailoverCancelled,
    Fault::SiteLost,
];
/// A disk joins.
const JOINED: &[Fault] = &[Fault::DiskAdded, Fault::DiskGrown, Fault::DiskUsedMeanwhile];

/// What may open a gap that says `cause`: any of the first; any of the second if the third happened as well, a while
/// before. `None` if nothing that happens in this world may.
fn misfortunes_for(cause: &str) -> Option<(&'static [Fault], &'static [Fault], &'static [Fault])> {
    Some(match cause {
        "the agent was restarted" | "the agent started" => (AGENT, &[], &[]),
        "the send buffer was full" => (&[Fault::RingBroke], &[], &[]),
        "the heal was interrupted" => (LINK, &[], &[]),
        // After a planned move only the agent can say that nothing is missing, and one that began anew cannot.
        "a process server took over" | "another process server took over" => {
            (TAKEN_OVER, AGENT, &[Fault::MovedDrained])
        }
        // A crash loses nothing that was acknowledged; only the loss of the disk does.
        "the process server's journal was lost" => (&[Fault::ServerLost], &[], &[]),
        "the agent was protecting into another chain" => (&[Fault::SiteLost], &[], &[]),
        "a heal was not finished" => (&[Fault::AgentRestarted], &[], &[]),
        "a write failed, too often for single ranges" => (&[Fault::WriteFailed], &[], &[]),
        // Told again on each new link until its heal is known to be committed; as a gap of its own if the heal was.
        "a write failed" => (&[Fault::WriteFailed], LINK, &[Fault::WriteFailed]),
        "the disk was added" | "the disk has grown" => (JOINED, LINK, JOINED),
        _ if cause.ends_with("was written to while the agent was stopped") => (JOINED, LINK, JOINED),
        _ => return None,
    })
}

impl World {
    /// Notes something that may open a gap.
    pub(super) fn may_open_gap(&mut self, fault: Fault) {
        self.misfortunes.push(Misfortune { at_ns: self.time.now(), fault, used: false });
    }

    /// Notes what the store did since the last time. Whoever is refused tries again; only a server's start does not.
    pub(super) fn note_store_faults(&mut self) {
        let tally = self.store.counts();
        for (fault, count) in [(Fault::StoreRefused, tally.refused), (Fault::AnswerLost, tally.answers_lost)] {
            self.faults.insert(fault, count);
        }
        self.faults.insert(Fault::NameTaken, tally.taken);
    }

    /// Watches the way from the machine to the vault: the ring may overflow only where something is in the way.
    pub(super) fn watch_the_ring(&mut self) -> Result<(), String> {
        let now = self.time.now();
        let asleep = self.suspended_until[self.assigned] > now || !self.servers[self.assigned].is_running();
        let healing = self.source.engine().is_none_or(|engine| engine.sender().is_healing());
        let stalled = self.source.link().is_none_or(|link| link.is_stalled() || link.is_broken());
        if asleep || healing || stalled || self.is_moving() || self.closed.is_some() {
            self.disturbed_at = now;
        }
        let (run, breaks) = self.source.breaks();
        let (seen_run, seen) = std::mem::replace(&mut self.breaks_seen, (run, breaks));
        if breaks <= if run == seen_run { seen } else { 0 } {
            return Ok(());
        }
        if now > self.disturbed_at.max(self.burst_at) + CATCH_UP_NS {
            return Err(format!("the ring overflowed, and nothing was in the way: {}", self.describe()));
        }
        self.strike(Fault::RingBroke);
        Ok(())
    }

    /// Judges the gaps that were recorded since the last time.
    pub(super) fn judge_gaps(&mut self, history: &ChainHistory) -> Result<(), String> {
        let mut new = Vec::new();
        for gap in history.gaps() {
            let name = (gap.after, gap.time, gap.scope.clone());
            if !self.gaps_seen.contains(&name) {
                self.gaps_seen.insert(name);
                self.judge_gap(&gap)?;
                new.push(gap.after);
            }
        }
        self.judge_planned(&new)
    }

    fn judge_gap(&mut self, gap: &Gap) -> Result<(), String> {
        if self.gaps_seen.len() == 1 {
            let first = gap.cause == "initial replication";
            return if first { Ok(()) } else { Err(format!("{gap:?} is not the initial replication")) };
        }
        let Some((kinds, others, given)) = misfortunes_for(&gap.cause) else {
            return Err(format!("{gap:?}: nothing that happened may open such a gap"));
        };
        self.judge_scope(gap)?;
        let oldest = self.time.now().saturating_sub(DELAY_NS_MAX);
        let is_given = given.iter().any(|fault| self.last_of.get(fault).is_some_and(|at| *at >= oldest));
        let unused = |one: &Misfortune, kinds: &[Fault]| !one.used && one.at_ns >= oldest && kinds.contains(&one.fault);
        let position = |kinds| self.misfortunes.iter().position(|one| unused(one, kinds));
        let found = position(kinds).or_else(|| position(others).filter(|_| is_given));
        let Some(found) = found else {
            return Err(format!("{gap:?}: nothing that may open it happened, or it opened another gap already"));
        };
        let misfortune = &mut self.misfortunes[found];
        misfortune.used = true;
        if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
            let age = (self.time.now() - misfortune.at_ns) as f64 / 1e9;
            let rule = if kinds.contains(&misfortune.fault) { "" } else { ", by the second rule" };
            eprintln!("gap {:?}: {:?} {age:.1} s before{rule}", gap.cause, misfortune.fault);
        }
        Ok(())
    }

    /// A gap of ranges names nothing but what something happened to.
    fn judge_scope(&self, gap: &Gap) -> Result<(), String> {
        let named = match &gap.scope {
            GapScope::Machine => return Ok(()),
            GapScope::Ranges(ranges) => Ranges::of(ranges.iter().copied()),
            GapScope::Disks(disks) => Ranges::of(disks.iter().map(|disk| {
                let whole = self.source.size_of(*disk).map_or(WHOLE_DISK, |size| replication::ByteRange::new(0, size));
                (*disk, whole)
            })),
        };
        match self.source.has_reason_to_lack(&named) {
            true => Ok(()),
            false => Err(format!("{gap:?} names {named}, and nothing happened to all of that")),
        }
    }
}
