//! Watches a run: asks the agent how it is and reads the vault, several times a second, on a thread of its own.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use agent::service::control::{Answer, Request, ask};
use agent::status::AgentStatus;
use replication::{PointTime, SequenceNumber};
use vault::points::Which;
use vault::{Catalog, ChainHistory, Points, UnlockedVault};
use world::{Clock, SystemClock, WallTime};

use super::timeline::{Event, Hole, Sample, Timeline};

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(200);

/// Asks the agent; `None` while it does not answer.
pub(crate) fn agent_status(socket: &Path) -> Option<AgentStatus> {
    match ask(socket, &Request::Status) {
        Ok(Answer::Status(status)) => Some(*status),
        _ => None,
    }
}

/// How many changes lie between two positions of one generation.
fn distance(newer: &str, older: &str) -> u64 {
    let parse = |text: &str| text.parse::<SequenceNumber>().unwrap_or_default();
    let (newer, older) = (parse(newer), parse(older));
    // Numbers of different generations are not comparable as amounts.
    if newer.generation() == older.generation() { newer.0.saturating_sub(older.0) } else { 0 }
}

/// A running watch.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    began: WallTime,
    control: PathBuf,
    vault: UnlockedVault,
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    samples: Vec<Sample>,
    events: Vec<Event>,
}

impl Watch {
    /// Watches the agent at `control` and the machine of `vault`.
    pub(crate) fn start(control: PathBuf, vault: UnlockedVault) -> Watch {
        let shared = Arc::new(Shared {
            began: SystemClock.wall(),
            control,
            vault,
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
        });
        let watching = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            while !watching.stop.load(Ordering::Acquire) {
                let sample = watching.look();
                watching.seen().samples.extend(sample);
                std::thread::sleep(EVERY);
            }
        });
        Watch { shared, thread: Some(thread) }
    }

    /// Something happens now.
    pub(crate) fn event(&self, what: impl Into<String>) {
        let at_ms = self.shared.now_ms();
        self.shared.seen().events.push(Event { at_ms, what: what.into() });
    }

    /// The median and the largest age of the newest recoverable moment, in milliseconds.
    pub(crate) fn rpo_percentiles(&self) -> (u64, u64) {
        let mut ages: Vec<u64> = self.shared.seen().samples.iter().filter_map(|sample| sample.rpo_ms).collect();
        ages.sort_unstable();
        let at = |percent: usize| ages.get((ages.len() * percent / 100).min(ages.len().saturating_sub(1))).copied();
        (at(50).unwrap_or_default(), at(100).unwrap_or_default())
    }

    /// Ends the watch and returns the picture's data, with points and gaps of the machine's `lines`: the chains that it
    /// followed one after the other.
    pub(crate) fn finish(mut self, lines: &[&ChainHistory]) -> Timeline {
        let total_ms = self.shared.now_ms();
        self.stop();
        let began = self.shared.began.0;
        let ms = |ns: u64| ns.saturating_sub(began) / 1_000_000;
        let mut holes = Vec::new();
        let mut stretches = Vec::new();
        for history in lines {
            let mut first = None;
            for gap in history.gaps() {
                let end = gap.until.map_or(total_ms, |(_, time)| ms(time.0));
                // Before the first heal ended there was nothing to have a gap in.
                if gap.after.0 == gap.after.generation().base().0 && first.is_none() && history.parent.is_none() {
                    first = Some(end);
                } else {
                    holes.push(Hole { from_ms: ms(gap.time.0), to_ms: end, cause: gap.cause.clone() });
                }
            }
            let last = history.last_cut().map(|_| ms(history.proven_through.0).min(total_ms));
            stretches.extend(first.or_else(|| self.shared.first_point(history).map(ms)).zip(last));
        }
        let mut seen = self.shared.seen();
        Timeline {
            samples: std::mem::take(&mut seen.samples),
            events: std::mem::take(&mut seen.events),
            holes,
            stretches,
            total_ms,
        }
    }

    fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A watch that failed costs a picture, not a proof.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        SystemClock.wall().0.saturating_sub(self.began.0) / 1_000_000
    }

    fn look(&self) -> Option<Sample> {
        let rpo_ms = self.age_of_newest_point();
        let Some(status) = agent_status(&self.control) else {
            let last = self.seen().samples.last().copied()?;
            return Some(Sample { at_ms: self.now_ms(), rpo_ms, ring_percent: 0, ..last });
        };
        let marks = &status.watermarks;
        Some(Sample {
            at_ms: self.now_ms(),
            writes: status.writes.changes,
            ring_percent: status.ring.used_bytes * 100 / status.ring.max_bytes.max(1),
            unjournaled: distance(&marks.captured, &marks.journaled),
            uncommitted: distance(&marks.captured, &marks.committed),
            rpo_ms,
        })
    }

    /// When the oldest point of a chain was, in nanoseconds.
    fn first_point(&self, history: &ChainHistory) -> Option<u64> {
        let points = Points::new(self.vault.store(), self.vault.keys(), history);
        let cuts = points.between(PointTime(0), PointTime(u64::MAX), usize::MAX, Which::All).ok()?;
        cuts.first().map(|cut| cut.time.0)
    }

    /// In milliseconds; `None` if there is no point yet or the vault cannot be read just now.
    fn age_of_newest_point(&self) -> Option<u64> {
        let (store, keys) = (self.vault.store(), self.vault.keys());
        let catalog = Catalog::load(store, keys).ok()?;
        let machine = catalog.machines.values().find(|machine| machine.name == super::site::MACHINE)?;
        let history = ChainHistory::load(store, keys, machine.chain).ok()?;
        let (_, last) = history.last_cut()?;
        let newest = match history.gaps().into_iter().find(|gap| gap.until.is_none()) {
            // Nothing before the first heal ended can be opened.
            Some(gap) if gap.after == gap.after.generation().base() => return None,
            Some(gap) => gap.time.0.min(last.0),
            None => history.proven_through.max(last).0,
        };
        Some(SystemClock.wall().0.saturating_sub(newest) / 1_000_000)
    }
}
