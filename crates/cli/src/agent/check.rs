//! `farshore-agent check`: everything that `run` needs, looked at without changing anything.

use std::path::Path;
use std::sync::Arc;

use agent::capture::scan::witness;
use agent::config::AgentConfig;
use agent::consistency;
use agent::disks::{self, DiskRegister, FoundDisk};
use agent::service::problem::{Problem, chain};
use agent::service::source::{CaptureKind, choose_capture};
use agent::state::StateDir;
use link::{Connector, DenyList, Expected, LinkIdentity, LinkRuntime, Role, Trust};
use serde::Serialize;
use world::{Access, Clock, FileDevice, SystemClock, WallTime};

use crate::output::{Output, bytes};

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    subject: String,
    ok: bool,
    detail: String,
}

pub(crate) fn check(path: &Path, output: &Output) -> Result<(), Vec<Problem>> {
    let config = AgentConfig::load(path).map_err(|problem| vec![problem])?;
    let mut findings = Vec::new();
    let mut problems = Vec::new();
    findings.push(finding("configuration", path.display().to_string()));
    if config.state_dir.is_dir() {
        let state = StateDir::open(&config.state_dir).map_err(|problem| vec![problem])?;
        check_disks(&config, &state, &mut findings, &mut problems);
        check_capture(&config, &mut findings, &mut problems);
        match consistency::preflight(&config) {
            Ok(what) => findings.push(finding("points at rest", what)),
            Err(problem) => problems.push(problem),
        }
        findings.push(finding("snapshots", agent::vm_generation::describe()));
        check_server(&config, &state, &mut findings, &mut problems);
    } else {
        problems.push(Problem::failed(
            "this machine has not joined a process server",
            format!("there is no directory {}", config.state_dir.display()),
            "order a token at the server, then run `farshore-agent join --token TOKEN --state-dir DIR`",
        ));
    }
    for problem in &problems {
        findings.push(Finding { subject: problem.what.clone(), ok: false, detail: problem.why.clone() });
    }
    let lines: Vec<String> = findings
        .iter()
        .filter(|finding| finding.ok)
        .map(|finding| format!("ok  {:<14} {}", finding.subject, finding.detail))
        .collect();
    output.data(&findings, lines.join("\n"));
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

fn finding(subject: impl Into<String>, detail: impl Into<String>) -> Finding {
    Finding { subject: subject.into(), ok: true, detail: detail.into() }
}

fn check_disks(config: &AgentConfig, state: &StateDir, findings: &mut Vec<Finding>, problems: &mut Vec<Problem>) {
    let found = DiskRegister::load(state)
        .map_err(|problem| vec![problem])
        .and_then(|mut register| disks::find(&config.disks, Access::ReadOnly, &mut register, &[]));
    match found {
        Ok(found) => findings.extend(found.iter().map(describe)),
        Err(found) => problems.extend(found),
    }
}

/// Which capture the disks get, and what this machine offers for it.
fn check_capture(config: &AgentConfig, findings: &mut Vec<Finding>, problems: &mut Vec<Problem>) {
    match choose_capture(config) {
        Err(problem) => problems.push(problem),
        Ok((CaptureKind::Splitter, why)) => {
            let why = why.map(|why| format!("; not by eBPF: {why}")).unwrap_or_default();
            findings.push(finding("capture", format!("splitter: writes through the NBD exports are seen{why}")));
        }
        Ok((CaptureKind::Scan, why)) => {
            let why = why.map(|why| format!(" Not by eBPF: {why}.")).unwrap_or_default();
            findings.push(finding(
                "capture",
                format!(
                    "scan: the disks are read again and again, and nothing sees the writes. Lost against eBPF: a point \
                     exists only where the disks rested while they were read, so disks that never rest have none but \
                     application-consistent ones; what is written between two scans is in no point; every start reads \
                     the disks whole.{why}"
                ),
            ));
            check_witnesses(config, findings, problems);
        }
        Ok((CaptureKind::Ebpf, _)) => {
            findings.push(finding("capture", "eBPF: every write to the disks is seen"));
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            for found in agent::capture::ebpf::support::findings() {
                findings.push(finding(found.subject, found.detail));
            }
        }
    }
}

/// Whether each disk tells that it was written to, without which no scan proves anything.
fn check_witnesses(config: &AgentConfig, findings: &mut Vec<Finding>, problems: &mut Vec<Problem>) {
    for disk in &config.disks {
        // Disks that are not there were reported.
        let Ok(device) = FileDevice::open_direct(&disk.path) else { continue };
        match witness::of(&disk.path, &device) {
            Ok(witness) if witness.is_proof() => {
                findings.push(finding(
                    format!("scan of {}", disk.name),
                    "it counts its writes: one undisturbed pass is a point",
                ));
            }
            Ok(_) => {
                findings.push(finding(
                    format!("scan of {}", disk.name),
                    "an image file: two passes that agree are a point; do not write to it through a shared mapping",
                ));
            }
            Err(error) => problems.push(Problem::caused(
                format!("disk `{}` cannot be scanned", disk.name),
                &error,
                "mend that, or choose another capture for all disks",
            )),
        }
    }
}

fn describe(disk: &FoundDisk) -> Finding {
    let doubt = disk.doubt.as_ref().map(|why| format!("; will be compared as a whole: {why}")).unwrap_or_default();
    let geometry = &disk.geometry;
    let detail =
        format!("{}, {}, serial {}{doubt}", geometry.path, bytes(geometry.size_bytes), geometry.identity.serial);
    finding(format!("disk {}", disk.name), detail)
}

fn check_server(config: &AgentConfig, state: &StateDir, findings: &mut Vec<Finding>, problems: &mut Vec<Problem>) {
    let identity = match state.joined_identity() {
        Ok(identity) => identity,
        Err(problem) => return problems.push(problem),
    };
    findings.push(finding("identity", identity.peer.to_string()));
    match certificate(&identity, SystemClock.wall()) {
        Ok(good) => findings.push(good),
        Err(problem) => problems.push(problem),
    }
    let addresses = match config.server_addresses.as_slice() {
        [] => state.enrolment().server_addresses,
        configured => configured.to_vec(),
    };
    let failures = match reach(identity, &addresses) {
        Ok((reached, failures)) => {
            findings.extend(reached);
            failures
        }
        Err(problem) => return problems.push(problem),
    };
    // One reachable server is enough to run; the others are told as well.
    problems.extend(failures);
    if addresses.is_empty() {
        problems.push(Problem::usage(
            "no process server is known",
            "neither the configuration nor the join token named one",
            "set server_addresses in the configuration",
        ));
    }
}

/// How long the certificate is good, and what to do if it is not any more.
fn certificate(identity: &LinkIdentity, now: WallTime) -> Result<Finding, Problem> {
    let (ends, due, until) = (identity.ends(), identity.due(), identity.accepted_until());
    let machine = replication::MachineId(identity.peer.id);
    if now > until {
        return Err(Problem::failed(
            "this machine's certificate is not accepted any more",
            format!("it ended at {ends} and was accepted until {until}; the clock says {now}"),
            format!(
                "if the clock is right, order a token with `farshore token new --machine {machine}` at the server and run \
                 `farshore-agent join` with it: history, disks and maps stay"
            ),
        ));
    }
    let detail = if now > ends {
        format!("ended at {ends}; accepted until {until}, and renewed as soon as the agent runs and reaches its server")
    } else {
        format!("good until {ends}; a running agent renews it from {due} on")
    };
    Ok(finding("certificate", detail))
}

fn reach(identity: LinkIdentity, addresses: &[String]) -> Result<(Vec<Finding>, Vec<Problem>), Problem> {
    let runtime = LinkRuntime::new(1)
        .map_err(|error| Problem::caused("the server cannot be reached", &error, "raise the limit of threads"))?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let trust = Trust::new(identity.authority.clone(), clock.clone(), DenyList::default());
    let connector = Connector::new(runtime, identity, trust, clock);
    let (mut reached, mut failures) = (Vec::new(), Vec::new());
    for address in addresses {
        match connector.connect(address, &Expected { role: Role::ProcessServer, id: None }) {
            Ok(connection) => {
                reached
                    .push(finding("server", format!("{address}, {}, both certificates accepted", connection.peer())));
            }
            Err(error) => {
                let advice = if error.is_transient() {
                    "start the server, or correct its address or the firewall"
                } else {
                    "the address may be another installation's; otherwise join again with a new token"
                };
                failures.push(Problem::failed(
                    format!("the process server {address} does not accept this machine"),
                    chain(&error),
                    advice,
                ));
            }
        }
    }
    Ok((reached, failures))
}
