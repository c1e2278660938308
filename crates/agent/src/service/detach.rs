//! Taking the capture programs out of the kernel, where they stay when an agent ends.

use super::problem::Problem;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use super::problem::ProblemKind;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use crate::capture::ebpf::{self, DetachError};
use crate::config::AgentConfig;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
use crate::state::StateDir;

const WHAT: &str = "the capture was not taken down";

/// Ends the capture by eBPF that an agent with this configuration left in the kernel. What the kernel remembered of writes
/// is gone then: the next start compares whole disks, and until that has ended there are no new points.
///
/// # Errors
/// An agent runs, there is nothing to take down, or the system refuses.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub fn detach(config: &AgentConfig) -> Result<(), Problem> {
    // A directory that is not there is of no agent that runs.
    let _held = match config.state_dir.exists() {
        true => Some(StateDir::open(&config.state_dir)?.lock().map_err(|problem| Problem {
            what: WHAT.to_owned(),
            advice: "stop the agent first: `farshore-agent stop`".to_owned(),
            ..problem
        })?),
        false => None,
    };
    ebpf::detach(&config.ebpf_pins()).map_err(|error| match error {
        DetachError::Nothing(_) => {
            Problem::new(ProblemKind::AlreadySo, "nothing is captured by eBPF", error.to_string(), "")
        }
        DetachError::InUse(_) => Problem::caused(WHAT, &error, "stop that agent first: `farshore-agent stop`"),
        DetachError::Elsewhere(_) => Problem::caused(WHAT, &error, "correct ebpf_pins in the configuration"),
        DetachError::System { .. } => Problem::caused(WHAT, &error, "run as root, or restart the machine"),
    })
}

/// As there is no capture by eBPF here, there is nothing to take down.
///
/// # Errors
/// Always.
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
pub fn detach(_config: &AgentConfig) -> Result<(), Problem> {
    Err(Problem::failed(WHAT, "this program captures by eBPF on x86-64 Linux only", ""))
}
