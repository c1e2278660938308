//! `farshore failback`: brings a branch home while the branch is in use, to disks of this host or of another one.
//!
//! Two steps: home is compared with the branch and follows it, which disturbs nobody; then, once whatever uses the branch
//! has stopped, the cut over proves by hash that home equals the branch. A kill at any moment leaves the branch as it was;
//! the same command again begins with a comparison.
//!
//! The failback runs in the process that serves the branch. This command begins it and watches; if its terminal dies, the
//! same command again goes on where it is.

use std::collections::BTreeMap;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use recovery::control::{Answer, Command, Destination, ServedDisk};
use recovery::{ControlClient, FailbackStatus, HomeAddress, HomeOrder, Phase, ProofScope, Succession};
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
    #[arg(long, value_name = "[NUMBER=]PATH")]
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
    /// Close the machine's own history in favour of the branch although it has not failed over: what it has written since the
    /// branch began is left behind
    #[arg(long)]
    close_history: bool,
    /// Read all of home again for the proof while the branch is at rest, not only what was written since the comparison
    #[arg(long)]
    prove_whole: bool,
    /// Stop the failback of this branch that runs; home is not usable then
    #[arg(long, conflicts_with_all = ["to", "master_target", "serial", "close_history", "prove_whole"])]
    cancel: bool,
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
        if self.cancel {
            return self.stop_it(&client, served.destination.as_ref(), output);
        }
        let stop = StopRequest::listen()?;
        let destination = match served.destination {
            Some(running) => self.attach(running, served.failback.as_ref(), &served.disks, output)?,
            None => self.begin(&client, &served.disks, output)?,
        };
        let place = match &destination.home {
            HomeAddress::Here => String::new(),
            HomeAddress::At(address) => format!(" at {address}"),
        };
        let phase = ask(&client, &Command::Status)?.failback.map(|status| status.phase);
        // Whoever watched it before may have asked for the cut over.
        if !matches!(phase, Some(Phase::CuttingOver | Phase::Proving | Phase::Done)) {
            self.follow(&client, output, &stop)?;
            ask(&client, &Command::CutOver)?;
        }
        output.remark("cutting over: the branch is at rest, home is compared with its head")?;
        let status = wait(&client, output, &stop, Phase::Done, "proving that home equals the branch")?;
        output.object(&event("done", &status))?;
        output.line(format!(
            "home equals the branch: {} proved equal ({} read again for it), {} of data were sent ({} on the wire), the branch \
             was at rest for {} ms",
            bytes(status.proved_bytes),
            bytes(status.proof_read_bytes),
            bytes(status.sent_bytes),
            bytes(status.wire_bytes),
            status.rest_ms
        ))?;
        let paths = shown(&destination.disks);
        output.remark(format!("the machine's history goes on along chain {chain}; start its agent on {paths}{place}"))
    }

    fn address(&self) -> Done<HomeAddress> {
        match &self.master_target {
            None => Ok(HomeAddress::Here),
            Some(address) if agent::config::is_address(address) => Ok(HomeAddress::At(address.clone())),
            Some(other) => Err(usage(format!("{other:?} is not host:port"), "", "write it as ps1.example:7443")),
        }
    }

    /// Has the branch's process begin.
    fn begin(&self, client: &ControlClient, served: &[ServedDisk], output: Output) -> Done<Destination> {
        let disks = self.orders(served)?;
        let home = self.address()?;
        let place = self.master_target.as_ref().map_or(String::new(), |address| format!(" at {address}"));
        confirm(output, &format!("everything on {}{place} will be overwritten", shown(&disks)))?;
        if self.close_history {
            confirm(
                output,
                "the machine's own history will be closed: what it wrote since the branch began is left behind",
            )?;
        }
        let proof = if self.prove_whole { ProofScope::Whole } else { ProofScope::WrittenSince };
        let succession = if self.close_history { Succession::CloseHistory } else { Succession::AfterFailover };
        ask(client, &Command::Failback { home: home.clone(), disks: disks.clone(), proof, succession })?;
        Ok(Destination { home, disks })
    }

    /// Goes on with a failback that somebody else began, if it is the one that is meant.
    fn attach(
        &self,
        running: Destination,
        status: Option<&FailbackStatus>,
        served: &[ServedDisk],
        output: Output,
    ) -> Done<Destination> {
        let places =
            |disks: &[HomeOrder]| disks.iter().map(|it| (it.disk, it.path.clone())).collect::<BTreeMap<_, _>>();
        let same = self.to.is_empty()
            || self.address()? == running.home && places(&self.orders(served)?) == places(&running.disks);
        if !same {
            let at = match &running.home {
                HomeAddress::Here => String::new(),
                HomeAddress::At(address) => format!(" at {address}"),
            };
            return Err(Failure::new(
                format!("the branch is being brought home already, to {}{at}", shown(&running.disks)),
                "two failbacks of one branch would contradict each other",
                format!(
                    "`farshore failback {0}` goes on with that one, `farshore failback {0} --cancel` stops it",
                    self.branch
                ),
            )
            .with(Verdict::Refused));
        }
        if let Some(status) = status {
            output.object(&event("attached", status))?;
        }
        output
            .remark("a failback of this branch runs already, with the options it was begun with; going on with it")?;
        Ok(running)
    }

    fn stop_it(&self, client: &ControlClient, running: Option<&Destination>, output: Output) -> Done {
        let Some(running) = running else {
            let what = format!("the branch {} is not being brought home", self.branch);
            return Err(Failure::new(what, "", "nothing is left to do").with(Verdict::Unchanged));
        };
        ask(client, &Command::Cancel)?;
        output.object(&json!({"event": "cancelled"}))?;
        output.line(format!(
            "stopped: {} lies between two states and must not be used; the branch goes on",
            shown(&running.disks)
        ))
    }

    /// One order for each disk of the branch.
    fn orders(&self, served: &[ServedDisk]) -> Done<Vec<HomeOrder>> {
        let only = match served {
            [only] => Some(only.disk),
            _ => None,
        };
        let known: Vec<String> = served.iter().map(|disk| format!("{} ({})", disk.disk, disk.path)).collect();
        let known = format!("the branch has {}", known.join(", "));
        if self.to.is_empty() {
            let what = "it was not said where the branch is to be written";
            return Err(usage(
                what,
                known,
                "name a home for each disk with --to; no failback of it runs to go on with",
            ));
        }
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
    let mut said = None;
    loop {
        if stop.is_set() {
            return Err(cancelled(client));
        }
        let status = ask(client, &Command::Status)?
            .failback
            .ok_or_else(|| Failure::new("the branch's process has forgotten the failback", "", "begin it again"))?;
        // Somebody at another terminal may have been quicker.
        let passed =
            until == Phase::Following && matches!(status.phase, Phase::CuttingOver | Phase::Proving | Phase::Done);
        if status.phase == until || passed {
            if let Some(progress) = progress {
                progress.finish();
            }
            return Ok(status);
        }
        left_following |= matches!(status.phase, Phase::CuttingOver | Phase::Proving);
        let problem = left_following || status.problem.is_some();
        let given_up = until == Phase::Done && status.phase == Phase::Following && problem;
        if status.phase == Phase::Failed || given_up {
            output.object(&event("failed", &status))?;
            let verdict = if status.refused { Verdict::Refused } else { Verdict::Failed };
            let failure = match status.problem {
                Some(problem) => Failure::new(problem.what, problem.why, problem.advice),
                None => Failure::new(
                    "the cut over did not come about",
                    "the link to the master target was interrupted; the branch goes on, and home follows it again",
                    "the same command goes on with this failback",
                ),
            };
            return Err(failure.with(verdict));
        }
        // It goes on by itself; whoever waits wants to know why nothing moves.
        if let Some(problem) = status.problem.filter(|problem| said.as_ref() != Some(&problem.what)) {
            output.aside(format!("{}\n  {}", problem.what, problem.why));
            said = Some(problem.what);
        }
        let done = if until == Phase::Done { status.proved_bytes } else { status.compared_bytes };
        let bar = progress.get_or_insert_with(|| Progress::of_bytes(output, what, status.planned_bytes));
        bar.advance(done.saturating_sub(shown));
        shown = shown.max(done);
        std::thread::sleep(POLL);
    }
}

/// The disks at home, for people.
fn shown(disks: &[HomeOrder]) -> String {
    let paths: Vec<String> = disks.iter().map(|order| order.path.display().to_string()).collect();
    paths.join(" and ")
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
        "sent_bytes": status.sent_bytes, "wire_bytes": status.wire_bytes, "proved_bytes": status.proved_bytes,
        "proof_read_bytes": status.proof_read_bytes, "rest_ms": status.rest_ms,
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
