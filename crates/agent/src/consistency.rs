//! Application-consistent points: applications and file systems are brought to rest, the moment is marked, everything
//! goes on.
//!
//! ```text
//! pre-script ─► hooks ─► syncfs ─► freeze ─► marker ─► thaw ─► hooks released ─► post-script
//!      └─────────┴─────────┴─────────┴── failed: thaw, release, post-script, and a crash-consistent marker that says why
//! ```
//!
//! * A file system is never left frozen: a guard process thaws at the deadline, and when this process ends in whatever
//!   way (`page`); the next start looks once more, and runs a post-script that is due (`left_over`).
//! * A marker claims rest only while the guard holds still (`frozen::AtRest`), and only if every part succeeded.
//! * The marker is put behind everything that the capture has seen after the freeze returned (architecture, consistency 4).
//!
//! With the splitter the disks' users are elsewhere: their writes wait at the agent's gate, and only a script or a hook can
//! bring what they run to rest. Without one, the point is crash-consistent and says so.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use replication::MarkerKind;
use replication::limits::REASON_BYTES_MAX;
use serde::{Deserialize, Serialize};
use world::Clock;

use crate::config::AgentConfig;
use crate::service::marks::{self, Claim, Placed, Waits};
use crate::service::problem::{Problem, ProblemKind, chain};
use crate::service::{Shared, lock};
use crate::state::StateDir;
use crate::system::{DeviceNumber, SystemRoot};

pub mod frozen;
mod hooks;
pub mod left_over;
mod page;
pub(crate) mod schedule;
mod script;
pub mod settings;

use frozen::{FrozenFileSystems, OpenTargets};
use settings::ConsistencyConfig;

/// How long a thread that freezes may overstay its limit before it is left alone. Its guard has thawed by then what can be
/// thawed.
const FREEZE_GRACE: Duration = Duration::from_secs(3);

/// What the agent says about its points.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsistencyStatus {
    /// Application-consistent points since the start.
    pub application_points: u64,
    /// Attempts that ended in a crash-consistent marker, or in none.
    pub failures: u64,
    /// Why the latest attempt failed; empty if it did not.
    pub last_failure: String,
    /// Nanoseconds since 1970 of the newest application-consistent point, by this machine's clock; 0: none.
    pub last_application_ns: u64,
    /// For how long writers waited at the latest one.
    pub last_rest_ms: u64,
    /// Crash-consistent markers on schedule since the start.
    pub crash_markers: u64,
}

/// A point that was taken.
pub(crate) struct Taken {
    /// Why it is crash-consistent only.
    pub(crate) failed: Option<String>,
    /// What else a person should know.
    pub(crate) remarks: Vec<String>,
    /// Its marker.
    pub(crate) placed: Placed,
}

/// The part of the agent that takes such points.
pub(crate) struct Consistency {
    pub(crate) config: ConsistencyConfig,
    root: SystemRoot,
    protected: Mutex<BTreeSet<DeviceNumber>>,
    state: StateDir,
    busy: Arc<AtomicBool>,
    status: Mutex<ConsistencyStatus>,
}

/// Whoever holds it is alone.
struct Turn(Arc<AtomicBool>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

/// The configured disks that are block devices.
fn protected(config: &AgentConfig) -> BTreeSet<DeviceNumber> {
    devices(config.disks.iter().map(|disk| disk.path.as_path()))
}

fn devices<'a>(paths: impl Iterator<Item = &'a Path>) -> BTreeSet<DeviceNumber> {
    let number = |path: &Path| {
        let found = std::fs::metadata(path).ok().filter(|found| found.file_type().is_block_device());
        found.map(|found| DeviceNumber::of(found.rdev()))
    };
    paths.filter_map(number).collect()
}

/// What a point at rest would bring to rest, in words. Changes nothing and runs nothing.
///
/// # Errors
/// A script or client program that would not be run.
pub fn preflight(config: &AgentConfig) -> Result<String, Problem> {
    let wanted = &config.consistency;
    let programs = wanted.hooks.iter().filter_map(|hook| hook.program.as_ref());
    for path in [&wanted.pre_script, &wanted.post_script].into_iter().flatten().chain(programs) {
        script::check_trusted(path).map_err(|why| {
            let advice = "have it, and every directory above, belong to root and be writable by nobody else";
            Problem::failed(format!("{} would not be run for a point at rest", path.display()), why, advice)
        })?;
    }
    let plan = frozen::plan(&SystemRoot::running(), &protected(config));
    let places: Vec<String> = plan.targets.iter().map(ToString::to_string).collect();
    let mut text = if places.is_empty() {
        "no file system of this machine lies on the disks".to_owned()
    } else {
        format!("freezes {}", places.join(", "))
    };
    for hook in &wanted.hooks {
        text = format!("{text}; {}", hook.kind.name());
    }
    if !plan.out_of_sight.is_empty() {
        text = format!("{text}; CANNOT: {} is mounted out of sight", plan.out_of_sight.join(", "));
    }
    Ok(text)
}

impl Consistency {
    pub(crate) fn new(config: &AgentConfig, state: &StateDir) -> Consistency {
        Consistency {
            config: config.consistency.clone(),
            root: SystemRoot::running(),
            protected: Mutex::new(protected(config)),
            state: state.clone(),
            busy: Arc::default(),
            status: Mutex::default(),
        }
    }

    pub(crate) fn status(&self) -> ConsistencyStatus {
        lock(&self.status).clone()
    }

    /// A crash-consistent marker on schedule was put into the stream.
    pub(crate) fn crash_marked(&self) {
        lock(&self.status).crash_markers += 1;
    }

    fn turn(&self) -> Result<Arc<Turn>, Problem> {
        match self.busy.swap(true, Ordering::SeqCst) {
            false => Ok(Arc::new(Turn(self.busy.clone()))),
            true => Err(Problem::new(
                ProblemKind::AlreadySo,
                "the point was not taken",
                "another one is being taken, or a file system does not answer since an earlier one",
                "wait for it; `farshore-agent status` names the latest failure",
            )),
        }
    }

    /// From now on the file systems of these disks are brought to rest.
    pub(crate) fn protect<'a>(&self, paths: impl Iterator<Item = &'a Path>) {
        *lock(&self.protected) = devices(paths);
    }

    /// Brings the file systems on the protected disks to rest for `limit` at most, without scripts and hooks, and marks
    /// the moment if it is named.
    ///
    /// # Errors
    /// Why they are not, or why it was not marked; then they are thawed.
    pub(crate) fn freeze(
        &self,
        shared: &Shared,
        limit: Duration,
        name: Option<&str>,
    ) -> Result<(FrozenFileSystems, left_over::Note), Problem> {
        let turn = self.turn()?;
        let advice = "look at that file system; try again, with a longer limit if it timed out";
        let plan = frozen::plan(&self.root, &lock(&self.protected).clone());
        if plan.targets.is_empty() {
            return Err(Problem::failed(
                "nothing was frozen",
                "no writable file system on the protected disks is mounted",
                "bring what uses the disks to rest by other means, then `farshore-agent mark NAME`",
            ));
        }
        let cannot = |why: String| Problem::failed("the file systems were not frozen", why, advice);
        let note = left_over::Note::write(&self.state, "freeze", &plan, None).map_err(cannot)?;
        let begin = self.pause(shared, &plan, limit);
        let (frozen, _pause) = self.rest(plan, &shared.clock, limit, turn, begin).map_err(cannot)?;
        if let Some(name) = name {
            let claim = Some(Claim::FileSystems(frozen.at_rest()));
            marks::mark(shared, MarkerKind::Application, name, claim, Waits::No)?;
        }
        Ok((frozen, note))
    }

    /// Flushes and freezes on a thread of its own: a file system that does not answer holds up nobody else. `between` is
    /// done between the two.
    fn rest<T>(
        &self,
        plan: frozen::FreezePlan,
        clock: &Arc<dyn Clock>,
        limit: Duration,
        turn: Arc<Turn>,
        between: impl FnOnce() -> Result<T, String>,
    ) -> Result<(FrozenFileSystems, T), String> {
        if !plan.out_of_sight.is_empty() {
            return Err(format!("the file system on {} is mounted out of sight", plan.out_of_sight.join(", ")));
        }
        let flush_limit = Duration::from_millis(self.config.flush_limit_ms);
        let (report, result) = mpsc::sync_channel(1);
        let (go_on, told) = mpsc::sync_channel(1);
        let thread_clock = clock.clone();
        let work = move || {
            let flushed = OpenTargets::open(&plan).and_then(|open| open.flush().map(|()| open));
            let wanted = report.send(Step::Flushed).is_ok() && told.recv() == Ok(());
            let frozen = flushed.and_then(|open| match wanted {
                true => open.freeze(&*thread_clock, limit).map(Some),
                // Nobody waits any more.
                false => Ok(None),
            });
            // Frozen in vain: dropping it thaws.
            drop(report.send(Step::Frozen(frozen.map_err(|error| chain(&error)))));
            drop(turn);
        };
        thread::Builder::new()
            .name("freeze".to_owned())
            .spawn(work)
            .map_err(|error| format!("no thread for freezing: {error}"))?;
        match result.recv_timeout(flush_limit) {
            Ok(Step::Flushed) => {}
            _ => return Err(format!("dirty data was not written out within {} ms", flush_limit.as_millis())),
        }
        let between = between()?;
        // It waits for nothing else.
        let _ = go_on.send(());
        match result.recv_timeout(limit + FREEZE_GRACE) {
            Ok(Step::Frozen(Ok(Some(frozen)))) => Ok((frozen, between)),
            Ok(Step::Frozen(Err(why))) => Err(why),
            _ => Err(format!("the file systems were not at rest within {} ms", limit.as_millis())),
        }
    }

    /// Takes a point named `name`: application-consistent if everything succeeds, otherwise crash-consistent with the
    /// reason in its marker.
    ///
    /// # Errors
    /// Not even that could be marked, or another point is being taken.
    pub(crate) fn take(&self, shared: &Shared, name: &str, waits: Waits) -> Result<Taken, Problem> {
        let turn = self.turn()?;
        // Scanned disks are read when they are at rest.
        if shared.source.scan().is_none() {
            marks::check_whole(shared, name)?;
        }
        let mut remarks = Vec::new();
        let rested = self.at_rest(shared, Wanted { name, waits }, &turn, &mut remarks);
        let (placed, failed) = match rested {
            Ok((placed, rest)) => {
                tracing::info!(name, rest_ms = rest.as_millis() as u64, "an application-consistent point");
                let mut status = lock(&self.status);
                status.application_points += 1;
                status.last_failure.clear();
                status.last_application_ns = shared.clock.wall().0;
                status.last_rest_ms = rest.as_millis() as u64;
                (placed, None)
            }
            Err(failed) => {
                let failed = shortened(failed);
                tracing::warn!(
                    name,
                    failed,
                    "no application-consistent point: the moment is marked as crash-consistent"
                );
                let mut status = lock(&self.status);
                status.failures += 1;
                status.last_failure.clone_from(&failed);
                drop(status);
                let kind = MarkerKind::Attempted { failed: failed.clone() };
                (marks::mark(shared, kind, name, None, waits)?, Some(failed))
            }
        };
        Ok(Taken { failed, remarks, placed })
    }

    /// Everything between the scripts, both included. The marker, and for how long writers waited.
    fn at_rest(
        &self,
        shared: &Shared,
        wanted: Wanted<'_>,
        turn: &Arc<Turn>,
        remarks: &mut Vec<String>,
    ) -> Result<(Placed, Duration), String> {
        let name = wanted.name;
        let plan = frozen::plan(&self.root, &lock(&self.protected).clone());
        let note = left_over::Note::write(&self.state, name, &plan, self.config.post_script.clone())?;
        let limit = Duration::from_millis(self.config.script_limit_ms);
        let clock = &*shared.clock;
        let run = |what: &str, path: &Option<PathBuf>, phase: &str, outcome: &str| match path {
            Some(path) => {
                let environment = [("FARSHORE_POINT", name), ("FARSHORE_PHASE", phase), ("FARSHORE_OUTCOME", outcome)];
                script::run(what, path, &environment, clock, limit)
            }
            None => Ok(()),
        };
        let outcome = run("pre-script", &self.config.pre_script, "pre", "").and_then(|()| {
            self.with_hooks(shared, limit, |held| self.mark_at_rest(shared, wanted, plan, turn, held, remarks))
        });
        // Whatever the script before has begun has to be ended, also if it failed half-way.
        let word = if outcome.is_ok() { "consistent" } else { "failed" };
        if let Err(why) = run("post-script", &self.config.post_script, "post", word) {
            remarks.push(why);
        }
        drop(note);
        outcome
    }

    /// Does `work` while the applications with hooks are at rest.
    fn with_hooks<T>(
        &self,
        shared: &Shared,
        limit: Duration,
        work: impl FnOnce(&mut Vec<hooks::AtRestBy>) -> Result<T, String>,
    ) -> Result<T, String> {
        let clock = &*shared.clock;
        let mut held = Vec::new();
        for hook in &self.config.hooks {
            // Those before it are released by being dropped.
            held.push(hooks::begin(&self.root, hook, clock, limit)?);
        }
        let done = work(&mut held);
        for hook in held {
            if let Err(why) = hook.release(clock) {
                // The marker stands: it was written while the session still held.
                tracing::warn!(why, "an application was not released in order");
            }
        }
        done
    }

    fn mark_at_rest(
        &self,
        shared: &Shared,
        Wanted { name, waits }: Wanted<'_>,
        plan: frozen::FreezePlan,
        turn: &Arc<Turn>,
        held: &mut [hooks::AtRestBy],
        remarks: &mut Vec<String>,
    ) -> Result<(Placed, Duration), String> {
        let limit = Duration::from_millis(self.config.freeze_limit_ms);
        let still_held = |held: &mut [hooks::AtRestBy]| held.iter_mut().try_for_each(hooks::AtRestBy::check);
        let unmarked = |problem: Problem| format!("{}: {}", problem.what, problem.why);
        if !shared.source.used_past_the_agent() {
            if !self.config.quiesces() {
                return Err("no script or hook brings to rest what uses the disks through the agent".to_owned());
            }
            let before = shared.clock.monotonic();
            let frozen = Arc::new(shared.source.freeze(limit).map_err(unmarked)?);
            still_held(held)?;
            let claim = Some(Claim::Gate(frozen.clone()));
            let placed = marks::mark(shared, MarkerKind::Application, name, claim, waits).map_err(unmarked)?;
            drop(frozen);
            return Ok((placed, shared.clock.monotonic().since(before)));
        }
        if plan.targets.is_empty() && !self.config.quiesces() {
            return Err(
                "no writable file system on the protected disks is mounted, and no script or hook brings to rest \
                        what uses them"
                    .to_owned(),
            );
        }
        let begin = self.pause(shared, &plan, limit);
        let (frozen, _pause) = self.rest(plan, &shared.clock, limit, turn.clone(), begin)?;
        remarks.extend(frozen.not_frozen().iter().map(|place| format!("flushed but not frozen: {place}")));
        still_held(held)?;
        let scanned = match shared.source.scan() {
            Some(_) => marks::settle(shared, name, limit),
            None => Ok(()),
        };
        let claim = Some(Claim::FileSystems(frozen.at_rest()));
        let marked = scanned.and_then(|()| marks::mark(shared, MarkerKind::Application, name, claim, waits));
        let (rest, _) = frozen.thaw(&*shared.clock);
        Ok((marked.map_err(unmarked)?, rest))
    }

    /// What lets the engine's thread rest, if the agent's own state lies on a file system of `plan`: that thread would wait
    /// for the thaw as soon as it had something to keep, and the thaw for the marker.
    fn pause<'a>(
        &self,
        shared: &'a Shared,
        plan: &frozen::FreezePlan,
        limit: Duration,
    ) -> impl FnOnce() -> Result<Option<marks::Pause<'a>>, String> + use<'a> {
        let found = std::fs::metadata(self.state.path());
        let freezes = found.is_ok_and(|found| plan.targets.iter().any(|target| target.holds(found.dev())));
        move || {
            let until = shared.clock.monotonic().plus(limit + FREEZE_GRACE);
            let pause = freezes.then(|| marks::Pause::begin(shared, until)).transpose();
            pause.map_err(|problem| problem.to_string())
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    name: &'a str,
    waits: Waits,
}

enum Step {
    Flushed,
    Frozen(Result<Option<FrozenFileSystems>, String>),
}

/// A reason that fits into a marker beside a name.
fn shortened(reason: String) -> String {
    const BYTES_MAX: usize = REASON_BYTES_MAX / 2 - 16;
    let mut reason = reason.replace(char::is_control, " ");
    if reason.len() > BYTES_MAX {
        let end = (0..=BYTES_MAX).rev().find(|end| reason.is_char_boundary(*end)).unwrap_or(0);
        reason.truncate(end);
        reason.push('…');
    }
    reason
}

/// The names that scheduled points get: what they are and when, by this machine's clock.
pub(crate) fn scheduled_name(due: schedule::Due, clock: &dyn Clock) -> String {
    let what = match due {
        schedule::Due::Crash => "scheduled",
        schedule::Due::Application => "scheduled, consistent",
    };
    format!("{what} {}", clock.wall())
}
