//! What an agent that was killed in the middle of a point left behind: file systems that may still be frozen, and an
//! application that waits for its post-script.
//!
//! The guard thaws when the agent dies. This record is for the case that both were killed at once (a control group that
//! ran out of memory), and for the script. It is written before anything is brought to rest, since afterwards the state
//! directory itself may be frozen; so the next start reads it before it writes anything.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use world::Clock;

use super::frozen::{FreezePlan, thaw_left_over};
use super::script;
use super::settings::ConsistencyConfig;
use crate::state::{self, StateDir};

const RECORD: &str = "point";

/// A point that is being taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnderWay {
    name: String,
    /// The kernel's boot id, in hex: nothing is frozen after a reboot.
    boot: String,
    pid: u32,
    /// When that process began, in the kernel's ticks since boot.
    began: u64,
    mount_points: Vec<PathBuf>,
    post_script: Option<PathBuf>,
}

/// Notes that a point is being taken. Dropping it removes the note: only when everything is thawed, since it is a file.
pub(crate) struct Note(StateDir);

impl Note {
    pub(super) fn write(
        state: &StateDir,
        name: &str,
        plan: &FreezePlan,
        post_script: Option<PathBuf>,
    ) -> Result<Note, String> {
        let mount_points = plan.targets.iter().filter_map(|target| target.mount_points.first().cloned()).collect();
        let pid = std::process::id();
        let boot = state::boot_id().map_err(|problem| problem.to_string())?;
        let began = began(pid).ok_or("the beginning of this process cannot be read")?;
        let record = UnderWay { name: name.to_owned(), boot: hex(&boot), pid, began, mount_points, post_script };
        state.write(RECORD, &record).map_err(|error| format!("the state directory cannot be written to: {error}"))?;
        Ok(Note(state.clone()))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        if let Err(error) = self.0.forget(RECORD) {
            tracing::warn!(%error, "the note of a point that was taken stays; the next start removes it");
        }
    }
}

/// Thaws and releases what an agent left behind that has ended. Changes nothing while that agent runs. What was done, in
/// words.
pub fn clear_up(state_dir: &Path, config: Option<&ConsistencyConfig>, clock: &dyn Clock) -> Vec<String> {
    let state = StateDir::at(state_dir);
    let Ok(Some(left)) = state.read::<UnderWay>(RECORD) else { return Vec::new() };
    let same_boot = state::boot_id().is_ok_and(|boot| hex(&boot) == left.boot);
    if same_boot && began(left.pid) == Some(left.began) {
        return Vec::new();
    }
    let mut done = Vec::new();
    if same_boot {
        let thawed = thaw_left_over(&left.mount_points);
        done.extend(
            thawed.iter().map(|place| format!("the file system at {} was frozen and is thawed", place.display())),
        );
        if let Some(path) = &left.post_script {
            let limit = config.map_or(super::settings::SCRIPT_LIMIT_MS_DEFAULT, |config| config.script_limit_ms);
            let environment = [
                ("FARSHORE_POINT", left.name.as_str()),
                ("FARSHORE_PHASE", "post"),
                ("FARSHORE_OUTCOME", "interrupted"),
            ];
            match script::run("post-script", path, &environment, clock, std::time::Duration::from_millis(limit)) {
                Ok(()) => done.push(format!("{} was run, which was due", path.display())),
                Err(why) => done.push(why),
            }
        }
    }
    if let Err(error) = state.forget(RECORD) {
        tracing::warn!(%error, "the note of an interrupted point cannot be removed");
    }
    done
}

/// When a process began: field 22 of its `stat`, behind a name that may hold anything.
fn began(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text[text.rfind(')')? + 1..].split_ascii_whitespace().nth(19)?.parse().ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
