//! Which disks are protected while the agent runs: the configuration read again, devices looked at every few seconds.
//!
//! Only for captures that take disks while they run. A reload is done as a whole or not at all; what a device does by itself
//! (grow, vanish, come back) is followed disk by disk. The engine's thread does the work ([`Command::Disks`]); here it is
//! decided. What is not protected although it is configured says why, in the status.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use replication::{DiskGeometry, DiskId};
use world::Access;

use super::drive::Command;
use super::problem::{Problem, ProblemKind, chain};
use super::source::{CaptureKind, choose_capture};
use super::{Shared, lock};
use crate::capture::NewDisk;
use crate::config::{AgentConfig, DiskConfig};
use crate::disks::{self, DiskRegister, FoundDisk, Moment, Now};
use crate::state::StateDir;
use crate::status::DiskStatus;

/// How often devices are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long the engine's thread may take: programs in the kernel are waited for, tens of milliseconds a disk.
const ENGINE_LIMIT: Duration = Duration::from_secs(20);

/// What becomes of a disk; each with the reason.
#[derive(Debug)]
pub(crate) enum DiskStep {
    /// It is captured from now on.
    Add(NewDisk, String),
    /// It has grown to this.
    Grow(DiskGeometry, String),
    /// It is captured no more.
    Remove(DiskId, String),
}

/// The disks as they are configured, and as they are.
pub(super) struct DiskSet {
    kind: CaptureKind,
    state: StateDir,
    config: AgentConfig,
    register: DiskRegister,
    found: Vec<FoundDisk>,
    /// By name: why a configured disk is not protected, or not all of it.
    problems: BTreeMap<String, String>,
}

impl DiskSet {
    pub(super) fn new(
        kind: CaptureKind,
        state: StateDir,
        config: AgentConfig,
        register: DiskRegister,
        found: Vec<FoundDisk>,
    ) -> DiskSet {
        DiskSet { kind, state, config, register, found, problems: BTreeMap::new() }
    }

    /// Remembers the disks as they are now that the agent has ended.
    pub(super) fn close(&mut self) -> Result<(), Problem> {
        self.register.store(&self.state, &self.found, Moment::Stopped)
    }

    /// Leaves them to the next agent.
    pub(super) fn unlock(&self) {
        disks::unlock(&self.found);
    }

    /// Takes the disks of the configuration file at `path`; what was done, a line each. The flag says that the file changes
    /// more than disks, which the next start takes.
    pub(super) fn reload(&mut self, path: &Path, shared: &Shared) -> Result<(Vec<String>, bool), Problem> {
        let what = "the configuration was not taken: everything goes on as before";
        let wrong = |why: String, advice: &str| Problem::usage(what, why, advice);
        let config = AgentConfig::load(path).map_err(|problem| Problem {
            what: what.to_owned(),
            why: problem.to_string(),
            ..problem
        })?;
        if config.state_dir != self.config.state_dir {
            let why =
                format!("{} is that of another agent: its state_dir is {}", path.display(), config.state_dir.display());
            return Err(wrong(why, "name this agent's configuration"));
        }
        let differs = AgentConfig { disks: Vec::new(), ..config.clone() }
            != AgentConfig { disks: Vec::new(), ..self.config.clone() };
        if config.disks == self.config.disks {
            self.look(shared);
            return Ok((Vec::new(), differs));
        }
        if self.kind != CaptureKind::Ebpf {
            let why = format!("disks captured by {} are taken at the start only", self.kind.name());
            return Err(wrong(why, "restart the agent"));
        }
        self.look(shared);
        // What is missing was protected before: that it does not come back is no mistake of the configuration.
        let is_missing = |disk: &DiskConfig| {
            self.problems.contains_key(&disk.name) && !self.has(&disk.name) && self.config.disks.contains(disk)
        };
        let wanted: Vec<DiskConfig> = config.disks.iter().filter(|disk| !is_missing(disk)).cloned().collect();
        let there = AgentConfig { disks: wanted.clone(), ..config.clone() };
        let (kind, instead) =
            choose_capture(&there).map_err(|problem| wrong(problem.to_string(), "correct it, then reload again"))?;
        if kind != self.kind {
            let why = instead.unwrap_or_else(|| format!("its disks want capture by {}", kind.name()));
            return Err(wrong(why, "correct it, or restart the agent"));
        }
        let mut register = self.register.clone();
        let found = disks::find(&wanted, Access::ReadOnly, &mut register, &[]).map_err(|problems| {
            let why: Vec<String> = problems.iter().map(ToString::to_string).collect();
            Problem::new(ProblemKind::WrongUsage, what, why.join("; "), "correct the configuration, then reload again")
        })?;
        let mut steps = Vec::new();
        let mut said = Vec::new();
        for disk in &found {
            match self.found.iter().find(|known| known.name == disk.name) {
                Some(known) if known.is_same_device(disk) => {}
                Some(known) => {
                    let why = format!("disk `{}` was {} and is another device now", disk.name, known.path().display());
                    return Err(wrong(why, "give another disk another name, or restart the agent with --accept-disk"));
                }
                None => {
                    said.push(format!("disk `{}` is protected once it was compared", disk.name));
                    steps.push(addition(disk));
                }
            }
        }
        let is_kept = |name: &str| config.disks.iter().any(|disk| disk.name == name);
        for known in self.found.iter().filter(|known| !is_kept(&known.name)) {
            said.push(format!("disk `{}` is not protected any more", known.name));
            steps.push(DiskStep::Remove(known.geometry.disk, "the disk was taken out of the configuration".to_owned()));
        }
        // A number must never be given twice, whatever happens from here on.
        register.store(&self.state, &[], Moment::Started)?;
        self.register = register;
        do_steps(steps, shared).map_err(|why| {
            Problem::failed(what, why, "look at the log; a restart takes the configuration as a whole")
        })?;
        self.found.retain(|known| is_kept(&known.name));
        let new: Vec<FoundDisk> = found.into_iter().filter(|disk| !self.has(&disk.name)).collect();
        self.found.extend(new);
        self.problems.retain(|name, _| is_kept(name));
        self.config.disks = config.disks;
        self.register.store(&self.state, &self.found, Moment::Started)?;
        self.publish(shared);
        for line in &said {
            tracing::info!("{line}");
        }
        Ok((said, differs))
    }

    fn has(&self, name: &str) -> bool {
        self.found.iter().any(|known| known.name == name)
    }

    /// Follows what the devices did by themselves.
    fn look(&mut self, shared: &Shared) {
        if self.kind != CaptureKind::Ebpf {
            return;
        }
        let mut changed = false;
        for mut disk in std::mem::take(&mut self.found) {
            let before = self.problems.get(&disk.name).cloned();
            match disk.look() {
                Now::Same => {
                    changed |= self.problems.remove(&disk.name).is_some();
                    self.found.push(disk);
                }
                Now::Grown(size_bytes) => {
                    let geometry = DiskGeometry { size_bytes, ..disk.geometry.clone() };
                    let step = DiskStep::Grow(geometry.clone(), "the disk has grown".to_owned());
                    match do_steps(vec![step], shared) {
                        Ok(()) => {
                            tracing::info!(disk = disk.name, size_bytes, "the disk has grown; the new area joins");
                            self.problems.remove(&disk.name);
                            disk.geometry = geometry;
                            self.found.push(disk);
                            changed = true;
                        }
                        Err(why) => {
                            let why = format!(
                                "it has grown to {size_bytes} bytes, of which the new ones are not captured: {why}"
                            );
                            changed |= before.as_ref() != Some(&why);
                            self.problems.insert(disk.name.clone(), why);
                            self.found.push(disk);
                        }
                    }
                }
                Now::Lost(why) => {
                    tracing::error!(
                        disk = disk.name,
                        why,
                        "the disk is not protected any more; everything else goes on"
                    );
                    if let Err(error) = do_steps(vec![DiskStep::Remove(disk.geometry.disk, why.clone())], shared) {
                        tracing::warn!(error, "the engine was not told");
                    }
                    self.problems.insert(disk.name.clone(), why);
                    changed = true;
                }
            }
        }
        changed |= self.welcome_back(shared);
        if changed {
            if let Err(error) = self.register.store(&self.state, &self.found, Moment::Started) {
                tracing::warn!(error = chain(&error), "the register of disks is not up to date");
            }
            self.publish(shared);
        }
    }

    /// Takes disks back that are missing. Whether any came, or says something else now.
    fn welcome_back(&mut self, shared: &Shared) -> bool {
        let missing: Vec<DiskConfig> = self.config.disks.iter().filter(|disk| !self.has(&disk.name)).cloned().collect();
        let mut changed = false;
        for disk in missing {
            let mut register = self.register.clone();
            let found = disks::find(std::slice::from_ref(&disk), Access::ReadOnly, &mut register, &[]);
            let taken = found.map_err(|problems| problems.first().map(ToString::to_string).unwrap_or_default());
            let taken = taken.and_then(|found| {
                let disk = found.into_iter().next().ok_or("there is no such disk")?;
                if self.found.iter().any(|known| known.is_same_device(&disk)) {
                    return Err(format!("{} is another protected disk now", disk.path().display()));
                }
                do_steps(vec![addition(&disk)], shared).map(|()| disk)
            });
            match taken {
                Ok(found) => {
                    tracing::info!(disk = disk.name, "the disk is there again, and is compared");
                    self.problems.remove(&disk.name);
                    self.found.push(found);
                    changed = true;
                }
                Err(why) => {
                    // What it was lost for says more than that it is not there.
                    let known = self.problems.entry(disk.name.clone()).or_insert_with(|| why.clone());
                    tracing::debug!(disk = disk.name, why, known = known.as_str(), "still missing");
                }
            }
        }
        changed
    }

    fn publish(&self, shared: &Shared) {
        let mut disks: Vec<DiskStatus> = Vec::new();
        for disk in &self.config.disks {
            let problem = self.problems.get(&disk.name).cloned().unwrap_or_default();
            match self.found.iter().find(|known| known.name == disk.name) {
                Some(found) => disks.push(DiskStatus { problem, ..found.status() }),
                None => {
                    let known = shared.status().disks.iter().find(|known| known.name == disk.name).cloned();
                    disks.extend(known.map(|known| DiskStatus { problem, ..known }));
                }
            }
        }
        shared.status().disks = disks;
        shared.consistency.protect(self.found.iter().map(FoundDisk::path));
    }
}

fn addition(disk: &FoundDisk) -> DiskStep {
    let new = NewDisk { geometry: disk.geometry.clone(), path: disk.path().to_owned() };
    DiskStep::Add(new, "the disk was added".to_owned())
}

/// Has the engine's thread do it: all of it, or nothing if one cannot be done.
fn do_steps(steps: Vec<DiskStep>, shared: &Shared) -> Result<(), String> {
    if steps.is_empty() {
        return Ok(());
    }
    let (reply, answer) = mpsc::sync_channel(1);
    let deaf = || "the replication thread does not answer: restart the agent".to_owned();
    shared.commands.try_send(Command::Disks { steps, reply }).map_err(|_| deaf())?;
    answer.recv_timeout(ENGINE_LIMIT).map_err(|_| deaf())?
}

/// The thread that looks at the devices. Ends when dropped.
pub(super) struct DiskWatch {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl DiskWatch {
    pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<DiskWatch> {
        let (stop, stopped) = mpsc::sync_channel::<()>(0);
        let shared = shared.clone();
        let watch = move || {
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                if let Some(disks) = lock(&shared.disks).as_mut() {
                    disks.look(&shared);
                }
            }
        };
        let thread = thread::Builder::new().name("disks".to_owned()).spawn(watch)?;
        Ok(DiskWatch { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for DiskWatch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic was logged when it happened.
            let _ = thread.join();
        }
    }
}
