//! `farshore failback`: brings a branch home while the branch is in use, to disks of this host or of another one.
//!
//! Two steps: home is compared with the branch and follows it, which disturbs nobody; then, once whatever uses the branch
//! has stopped, the cut over proves by hash that home equals the branch. A kill at any moment leaves the branch as it was;
//! the same command again begins with a comparison.

use std::collections::BTreeMap;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use recovery::control::{Answer, Command, ServedDisk};
use recovery::{ControlClient, FailbackStatus, HomeAddress, HomeOrder, Phase};
use serde_json::{Value, json};

use super::branch::state_root;
use crate::failure::{Done, Failure, Verdict, io_failure, usage};
use crate::output::{Output, bytes};
use crate::progress::{Progress, StopRequest};

/// How often the failback is looked at.
const POLL: Duration = Duration::from_millis(100);

/// Options of `failback`.
#[derive(Debug, Args)]
pub(crate) struct Failback {
    /// Name or chain of the branch; it must be served on this host
    branch: String,
    /// Disk or image file that a disk of the branch is written over; once for each, NUMBER= may be left out if there is one
    #[arg(long, value_name = "[NUMBER=]PATH", required = true)]
    to: Vec<String>,
    /// Server whose master target writes; the paths are that host's then. Else the disks are this host's
    #[arg(long, value_name = "HOST:PORT")]
    master_target: Option<String>,
    /// Serial number that a disk at home must have; once for each disk that is to be checked
    #[arg(long, value_name = "[NUMBER=]SERIAL")]
    serial: Vec<String>,
    /// Write to the disks although their serial numbers are others
    #[arg(long)]
    any_disk: bool,
    /// Write to the disks although they are mounted or in use; what is mounted is destroyed under its users
    #[arg(long)]
    in_use: bool,
    /// The branch host's state directory
    #[arg(long, value_name = "DIR", env = "FARSHORE_STATE")]
    state_dir: Option<PathBuf>,
    /// Before the cut over, wait for a line `go` on standard input
    #[arg(long, hide = true)]
    wait_for_go: bool,
}

impl Failback {
    pub(crate) fn run(&self, output: Output) -> Done {
        let root = state_root(self.state_dir.as_deref())?;
        let (directory, chain) = find_directory(&root, &self.branch)?;
        let client = ControlClient::new(&directory);
        let served = client.ask(&Command::Status).map_err(|error| {
            let what = format!("the branch {} is not served on this host", self.branch);
            Failure::because(what, &error, format!("serve it with `farshore branch reopen {chain}`, then repeat"))
        })?;
        let orders = self.orders(&served.disks)?;
        let (home, place) = match &self.master_target {
            None => (HomeAddress::Here, String::new()),
            Some(address) if agent::config::is_address(address) => {
                (HomeAddress::At(address.clone()), format!(" at {address}"))
            }
            Some(other) => {
                return Err(usage(format!("{other:?} is not host:port"), "", "write it as ps1.example:7443"));
            }
        };
        let paths: Vec<String> = orders.iter().map(|order| order.path.display().to_string()).collect();
        confirm(output, &format!("everything on {}{place} will be overwritten", paths.join(" and ")))?;
        let stop = StopRequest::listen()?;
        ask(&client, &Command::Failback { home, disks: orders })?;
        self.follow(&client, output, &stop)?;
        ask(&client, &Command::CutOver)?;
        output.remark("cutting over: the branch is at rest, home is read and compared")?;
        let status = wait(&client, output, &stop, Phase::Done, "proving that home equals the branch")?;
        output.object(&event("done", &status))?;
        output.line(format!(
            "home equals the branch: {} proved equal, {} of data were sent ({} on the wire), the branch was at rest for {} ms",
            bytes(status.proved_bytes),
            bytes(status.sent_bytes),
            bytes(status.wire_bytes),
            status.rest_ms
        ))?;
        let paths = paths.join(" and ");
        output.remark(format!("the machine's history goes on along chain {chain}; start its agent on {paths}{place}"))
    }

    /// One order for each disk of the branch.
    fn orders(&self, served: &[ServedDisk]) -> Done<Vec<HomeOrder>> {
        let only = match served {
            [only] => Some(only.disk),
            _ => None,
        };
        let known: Vec<String> = served.iter().map(|disk| format!("{} ({})", disk.disk, disk.path)).collect();
        let known = format!("the branch has {}", known.join(", "));
        let mut paths = by_disk("--to", &self.to, only, &known)?;
        let mut serials = by_disk("--serial", &self.serial, only, &known)?;
        let mut orders = Vec::new();
        for disk in served {
            let Some(path) = paths.remove(&disk.disk) else {
                let what = format!("disk {} of the branch has no home", disk.disk);
                return Err(usage(
                    what,
                    "a machine comes home with all of its disks",
                    format!("add --to {}=PATH", disk.disk),
                ));
            };
            let mut path = PathBuf::from(path);
            if self.master_target.is_none() {
                path = path
                    .canonicalize()
                    .map_err(|error| io_failure(format!("there is no disk at {}", path.display()), &error))?;
            } else if !path.is_absolute() {
                let what = format!("{} is not an absolute path", path.display());
                return Err(usage(what, "it is a path of the master target's host", "begin it with /"));
            }
            orders.push(HomeOrder {
                disk: disk.disk,
                path,
                size_bytes: disk.size_bytes,
                serial: serials.remove(&disk.disk),
                any_disk: self.any_disk,
                in_use: self.in_use,
            });
        }
        match paths.keys().chain(serials.keys()).next() {
            Some(unknown) => Err(usage(format!("the branch has no disk {unknown}"), known, "name its disks only")),
            None => Ok(orders),
        }
    }

    /// Waits until home follows and somebody says that the branch is no longer used.
    fn follow(&self, client: &ControlClient, output: Output, stop: &StopRequest) -> Done {
        let status = wait(client, output, stop, Phase::Following, "comparing home with the branch")?;
        output.object(&event("following", &status))?;
        output.line(format!(
            "home follows the branch: {} compared, {} sent",
            bytes(status.compared_bytes),
            bytes(status.sent_bytes)
        ))?;
        if self.wait_for_go {
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            return match read {
                Ok(_) if line.trim() == "go" => Ok(()),
                _ => Err(cancelled(client)),
            };
        }
        confirm(output, "stop whatever uses the branch: with the cut over its disks come to rest").inspect_err(|_| {
            let _ = cancelled(client);
        })
    }
}

/// The values of an option that is given once a disk, as `NUMBER=VALUE`, or as `VALUE` if the branch has one disk.
fn by_disk(option: &str, values: &[String], only: Option<u16>, known: &str) -> Done<BTreeMap<u16, String>> {
    let mut found = BTreeMap::new();
    for text in values {
        let numbered = text.split_once('=').and_then(|(number, value)| Some((number.parse::<u16>().ok()?, value)));
        let (disk, value) = match (numbered, only) {
            (Some(numbered), _) => numbered,
            (None, Some(only)) => (only, text.as_str()),
            (None, None) => {
                let what = format!("{option} {text} does not say which disk it is about");
                return Err(usage(what, known, format!("write {option} NUMBER={text}, once for each disk")));
            }
        };
        if found.insert(disk, value.to_owned()).is_some() {
            return Err(usage(format!("{option} names disk {disk} twice"), known, "name each disk once"));
        }
    }
    Ok(found)
}

/// Stops a failback that nobody wants any more.
fn cancelled(client: &ControlClient) -> Failure {
    // If it cannot be told, the branch's process is gone and the failback with it.
    let _ = client.ask(&Command::Cancel);
    Failure::new(
        "the failback was stopped",
        "home lies between two states and must not be used; the branch goes on",
        "run the same command again: it begins with a comparison",
    )
}

/// Waits for a phase. Ctrl-C cancels the failback.
fn wait(client: &ControlClient, output: Output, stop: &StopRequest, until: Phase, what: &str) -> Done<FailbackStatus> {
    let mut progress: Option<Progress> = None;
    let mut shown = 0;
    // A cut over begins a moment after it was asked for; one that was given up leads back to following.
    let mut left_following = false;
    loop {
        if stop.is_set() {
            return Err(cancelled(client));
        }
        let status = ask(client, &Command::Status)?
            .failback
            .ok_or_else(|| Failure::new("the branch's process has forgotten the failback", "", "begin it again"))?;
        if status.phase == until {
            if let Some(progress) = progress {
                progress.finish();
            }
            return Ok(status);
        }
        left_following |= matches!(status.phase, Phase::CuttingOver | Phase::Proving);
        let given_up = until == Phase::Done && status.phase == Phase::Following && left_following;
        if status.phase == Phase::Failed || given_up {
            output.object(&event("failed", &status))?;
            let refusal = status.problem;
            let (what, why, advice) = refusal.map_or_else(Default::default, |it| (it.what, it.why, it.advice));
            let verdict = if status.refused { Verdict::Refused } else { Verdict::Failed };
            return Err(Failure::new(what, why, advice).with(verdict));
        }
        let done = if until == Phase::Done { status.proved_bytes } else { status.compared_bytes };
        let bar = progress.get_or_insert_with(|| Progress::of_bytes(output, what, status.planned_bytes));
        bar.advance(done.saturating_sub(shown));
        shown = shown.max(done);
        std::thread::sleep(POLL);
    }
}

fn ask(client: &ControlClient, command: &Command) -> Done<Answer> {
    let answer = client.ask(command).map_err(|error| {
        let what = "the process that serves the branch does not answer";
        Failure::new(what, error.to_string(), "see whether it runs; `farshore branch reopen` starts it again")
    })?;
    match answer.problem {
        Some(refusal) => Err(Failure::new(refusal.what, refusal.why, refusal.advice).with(Verdict::Refused)),
        None => Ok(answer),
    }
}

fn event(name: &str, status: &FailbackStatus) -> Value {
    json!({
        "event": name, "planned_bytes": status.planned_bytes, "compared_bytes": status.compared_bytes,
        "sent_bytes": status.sent_bytes, "wire_bytes": status.wire_bytes, "proved_bytes": status.proved_bytes, "rest_ms": status.rest_ms,
        "elapsed_ms": status.elapsed_ms, "connections": status.connections,
        "problem": status.problem.as_ref().map(ToString::to_string),
    })
}

/// Asks a person to go on. Without a terminal, `--yes` is needed.
fn confirm(output: Output, what: &str) -> Done {
    if output.yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(usage(what, "there is no terminal to ask on", "add --yes if that is meant").with(Verdict::Refused));
    }
    let mut answer = String::new();
    let refused = |error: io::Error| io_failure("the terminal cannot be read", &error);
    let mut err = io::stderr();
    write!(err, "{what}\ntype yes to go on: ").and_then(|()| err.flush()).map_err(refused)?;
    io::stdin().lock().read_line(&mut answer).map_err(refused)?;
    match answer.trim() {
        "yes" => Ok(()),
        _ => Err(Failure::new("not confirmed", "nothing was done", "type yes, or add --yes").with(Verdict::Refused)),
    }
}

/// The directory of a branch of this host, by its name or chain.
pub(crate) fn find_directory(root: &Path, asked: &str) -> Done<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let Ok(text) = std::fs::read(entry.path().join("branch.json")) else { continue };
        let Ok(state) = serde_json::from_slice::<Value>(&text) else { continue };
        let (chain, name) = (state["branch"].as_str().unwrap_or_default(), state["name"].as_str().unwrap_or_default());
        let meant = chain == asked || name == asked && state["ended"].is_null();
        if meant {
            found.push((entry.path(), chain.to_owned()));
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Failure::new(
            format!("no branch {asked:?} has state in {}", root.display()),
            "a branch is brought home by the host that serves it",
            "name the state directory it was opened with, with --state-dir",
        )),
        count => Err(usage(format!("{count} branches are named {asked:?}"), "", "name it by its chain")),
    }
}
