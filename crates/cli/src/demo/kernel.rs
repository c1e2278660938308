//! One act in which nobody uses the disk through the agent: a mounted ext4 on a loop device, captured by eBPF while files are
//! written, marked under load, recovered from the vault, and held against what was synced before the mark.

use std::fs;
use std::os::unix::process::CommandExt;
use std::time::Duration;

use agent::service::control::{Answer, Request, ask};
use agent::status::ProtectionState;
use serde_json::json;
use world::{Clock, SystemClock};

use super::acts::{Figures, folder_bytes, number_of, spent};
use super::proof::{Opening, copy_device, mismatch};
use super::site::{LIMIT, Site, text};
use super::watch::agent_status;
use crate::failure::{Done, Failure, io_failure};
use crate::output::{Output, bytes};

/// The second machine's name.
const KERNEL_MACHINE: &str = "demo-ebpf";
const MIB: u64 = 128;
/// How long files are written before the mark and behind it.
const RUN: Duration = Duration::from_millis(2500);
const MARK: &str = "while files are written";
const MARK_WAIT_MS: u64 = 30_000;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn obstacle() -> Option<String> {
    agent::capture::ebpf::support::check_machine().err()
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn obstacle() -> Option<String> {
    Some("this program captures by eBPF on x86-64 Linux only".to_owned())
}

/// Plays the act, or says in one line why it cannot be played here.
pub(super) fn play(
    site: &mut Site,
    seed: u64,
    figures: &mut Figures,
    output: Output,
    say: &impl Fn(&str) -> Done,
) -> Done {
    if let Some(why) = obstacle() {
        return say(&format!("capture by eBPF is left out: {why}"));
    }
    let began = SystemClock.monotonic();
    let folder = site.paths.state.join("kernel");
    fs::create_dir_all(&folder).map_err(|error| io_failure("a folder cannot be made", &error))?;
    let config = folder.join("agent.toml");
    let mut command = site.programs.farshore(&["__kernel-machine", "--folder", text(&folder)?]);
    command.args(["--agent", text(&config)?, "--mib", &MIB.to_string(), "--seed", &seed.to_string()]);
    // A signal to the demo's group must not keep it from cleaning up.
    command.process_group(0);
    let mut machine = site.programs.start(command, "kernel-machine")?;
    machine.outlives_its_owner();
    let said = machine.line(LIMIT)?;
    let Some(device) = said.strip_prefix("ready ") else {
        machine.end_by_itself()?;
        return say(&format!("capture by eBPF is left out: {}", said.trim_start_matches("cannot ")));
    };

    let agent_state = folder.join("state");
    site.join_machine(KERNEL_MACHINE, &agent_state)?;
    let pins = format!("/sys/fs/bpf/farshore-demo-{}", std::process::id());
    let text_of = format!(
        "state_dir = {agent_state:?}\nmachine_name = {KERNEL_MACHINE:?}\nring_bytes_max = 33554432\nproof_every_ms = 200\n\
         ebpf_pins = {pins:?}\n\n[[disk]]\nname = \"disk\"\npath = {device:?}\ncapture = \"ebpf\"\n"
    );
    fs::write(&config, text_of).map_err(|error| io_failure("the agent has no file", &error))?;
    machine.tell("load")?;
    let mut agent = site.programs.start(site.programs.agent(&["run", "--config", text(&config)?]), "kernel-agent")?;
    let socket = agent_state.join("control.sock");
    let waited = SystemClock.monotonic();
    let status = loop {
        agent.check()?;
        match agent_status(&socket) {
            Some(status) if status.state == ProtectionState::Protected && !status.heal.active => break status,
            _ if SystemClock.monotonic().since(waited) > LIMIT => {
                return Err(Failure::new("the disk in use is not protected", "", "report this with the seed"));
            }
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    say(&format!(
        "a second machine: {} of mounted ext4 on {device}, captured by eBPF while files are written ({} sent first)",
        bytes(MIB << 20),
        bytes(status.heal.sent_bytes)
    ))?;
    std::thread::sleep(RUN);

    machine.tell("count")?;
    let before = number_of(&machine.line(LIMIT)?)?;
    let marked = ask(&socket, &Request::Mark { name: MARK.to_owned(), wait_ms: MARK_WAIT_MS });
    machine.tell("count")?;
    // One more may be on the disk and not counted yet.
    let after = number_of(&machine.line(LIMIT)?)? + 1;
    if !matches!(marked, Ok(Answer::Marked { durable: true, .. })) {
        return Err(Failure::new("the disk in use was not marked", format!("{marked:?}"), "report this with the seed"));
    }
    std::thread::sleep(RUN);
    machine.tell("stop")?;
    let written = number_of(&machine.line(LIMIT)?)?;
    let writes = agent_status(&socket).map(|status| status.writes).unwrap_or_default();
    agent.end()?;

    let branches = site.paths.state.join("branches");
    let opening =
        Opening { programs: &site.programs, vault: &site.paths.vault, key: &site.paths.recovery_key, state: &branches };
    let mut branch = opening.open(KERNEL_MACHINE, MARK, &["--throw-away", "--name", "ebpf"])?;
    let copy = folder.join("copy.raw");
    copy_device(&branch.connect()?, &copy)?;
    branch.process.end()?;
    machine.tell(&format!("verify {}", text(&copy)?))?;
    let said = machine.line(LIMIT)?;
    if !said.starts_with("holds ") {
        return Err(mismatch(MARK, said.trim_start_matches("wrong ")));
    }
    let held = number_of(&said)?;
    if !(before..=after).contains(&held) {
        return Err(mismatch(MARK, format!("it holds {held} files, its moment allows {before} to {after}")));
    }
    machine.finish(LIMIT)?;
    fs::remove_file(&copy).map_err(|error| io_failure("a copy cannot be removed", &error))?;
    output.object(&json!({
        "type": "ebpf", "files": written, "held": held, "allowed": [before, after], "captured_requests": writes.changes,
        "captured_bytes": writes.written_bytes, "pins_left": folder_bytes(std::path::Path::new(&pins)),
    }))?;
    figures.add(
        "captured by eBPF",
        format!("{} requests, {}; no file lost, clean file system", writes.changes, bytes(writes.written_bytes)),
    );
    say(&format!(
        "the point {MARK:?}: {held} files, all that were synced before it; ext4 clean; taken down again ({})",
        spent(began)
    ))
}
