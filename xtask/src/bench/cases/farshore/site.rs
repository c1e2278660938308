//! A vault, a server and an agent for the measurements, in a scratch directory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::counted_link::CountedLink;
use super::folder_bytes;
use crate::process::search_path;

const POLL: Duration = Duration::from_millis(50);

/// The way of an agent to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Direct,
    /// Through a relay that counts, which costs some time.
    Counted,
}

/// A process that was started; killed when dropped.
pub(super) struct Running {
    child: Child,
}

impl Running {
    /// Starts `command`, whose output nobody wants.
    pub(super) fn start(command: &mut Command) -> Result<Running> {
        let child =
            command.env("PATH", search_path()).stdout(Stdio::null()).spawn().context("cannot start a program")?;
        Ok(Running { child })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Kills it, as `kill -9` does, and waits until it has ended.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Stops it where it is, or has it go on.
    pub(super) fn suspend(&self, suspended: bool) -> Result<()> {
        let signal = if suspended { Signal::STOP } else { Signal::CONT };
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// Asks it to end in order, and waits until it has.
    pub(super) fn end(&mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        self.wait()
    }

    /// Waits until it has ended by itself.
    pub(super) fn wait(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "a process ended with {status}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended; only this very child is meant.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A branch that is served.
pub(super) struct OpenBranch {
    pub(super) process: Running,
    pub(super) uri: String,
    pub(super) socket: PathBuf,
    pub(super) export: String,
    _said: BufReader<ChildStdout>,
}

/// The running site.
pub(super) struct Site {
    scratch: PathBuf,
    programs: PathBuf,
    address: String,
    link: CountedLink,
    server: Running,
    agents: BTreeMap<String, Running>,
}

impl Site {
    /// Makes an empty vault and starts its server.
    pub(super) fn make(scratch: &Path, programs: &Path) -> Result<Site> {
        let path = |name: &str| scratch.join(name);
        fs::write(path("passphrase"), "the passphrase of a benchmark\n")?;
        let opening = |command: &mut Command| {
            command.arg("--vault").arg(path("vault")).arg("--passphrase-file").arg(path("passphrase"));
        };
        let mut init = bare(&programs.join("farshore"));
        init.args(["vault", "init"]);
        opening(&mut init);
        output_of(init.arg("--recovery-key-to").arg(path("key")))?;
        let mut grant = bare(&programs.join("farshore"));
        grant.args(["vault", "grant", "--label", "bench"]);
        opening(&mut grant);
        output_of(grant.arg("--state-dir").arg(path("server")))?;
        let config =
            format!("state_dir = {:?}\nvault = {:?}\nlisten = \"127.0.0.1:0\"\n", path("server"), path("vault"));
        fs::write(path("server.toml"), config)?;
        let mut command = bare(&programs.join("farshore"));
        command.args(["--json", "server", "--config"]).arg(path("server.toml"));
        let (server, said) = start(&mut command, &path("server.log"))?;
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let ready: Value = serde_json::from_str(&line).with_context(|| log_end(&path("server.log")))?;
        let address = ready["address"].as_str().context("the server is not ready")?.to_owned();
        let link = CountedLink::to(address.clone())?;
        let (scratch, programs) = (scratch.to_owned(), programs.to_owned());
        Ok(Site { scratch, programs, address, link, server, agents: BTreeMap::new() })
    }

    pub(super) fn server_pid(&self) -> u32 {
        self.server.id()
    }

    pub(super) fn agent_pid(&self, machine: &str) -> Result<u32> {
        self.agents.get(machine).map(Running::id).context("the agent does not run")
    }

    /// Where the disk of `machine` is.
    pub(super) fn image(&self, machine: &str) -> PathBuf {
        self.path(machine, "img")
    }

    /// Where the agent of `machine` serves it.
    pub(super) fn disk_socket(&self, machine: &str) -> PathBuf {
        self.path(machine, "sock")
    }

    fn path(&self, machine: &str, kind: &str) -> PathBuf {
        self.scratch.join(format!("{machine}.{kind}"))
    }

    /// A token for one agent.
    pub(super) fn token(&self) -> Result<String> {
        let mut token = bare(&self.programs.join("farshore"));
        token.args(["--json", "token", "new", "--role", "agent", "--address", &self.address, "--config"]);
        let token: Value = serde_json::from_str(&output_of(token.arg(self.scratch.join("server.toml")))?)?;
        token["token"].as_str().map(str::to_owned).context("no token")
    }

    /// Enrols `machine`. Its disk will be where [`Site::image`] says.
    pub(super) fn join(&self, machine: &str) -> Result<()> {
        enrol(&self.programs, machine, &self.token()?, &self.path(machine, "state"))
    }

    pub(super) fn start_agent(&mut self, machine: &str, way: Way) -> Result<()> {
        let config = format!(
            "state_dir = {:?}\nmachine_name = {machine:?}\nserver_addresses = [{:?}]\nnbd_socket = {:?}\n\n[[disk]]\n\
             name = \"disk\"\npath = {:?}\n",
            self.path(machine, "state"),
            if way == Way::Direct { &self.address } else { &self.link.address },
            self.disk_socket(machine),
            self.image(machine)
        );
        fs::write(self.path(machine, "toml"), config)?;
        let mut command = bare(&self.programs.join("farshore-agent"));
        command.args(["run", "--config"]).arg(self.path(machine, "toml"));
        let agent = start(&mut command, &self.path(machine, "log"))?.0;
        self.agents.insert(machine.to_owned(), agent);
        Ok(())
    }

    pub(super) fn stop_agent(&mut self, machine: &str) -> Result<()> {
        self.agents.remove(machine).map_or(Ok(()), |mut agent| agent.end())
    }

    fn ask_agent(&self, machine: &str, words: &[&str]) -> Result<Value> {
        let mut command = bare(&self.programs.join("farshore-agent"));
        command.arg("--json").args(words).arg("--state-dir").arg(self.path(machine, "state"));
        Ok(serde_json::from_str(&output_of(&mut command)?)?)
    }

    pub(super) fn is_protected(&self, machine: &str) -> Result<bool> {
        // It does not answer before it serves.
        Ok(self.ask_agent(machine, &["status"]).is_ok_and(|status| status["state"] == "protected"))
    }

    /// What the vault says of `machine` now; `None` if it does not know it yet.
    pub(super) fn vault_status(&self, machine: &str) -> Result<Option<Value>> {
        let status: Value = serde_json::from_str(&output_of(&mut self.with_key(&["vault", "status"]))?)?;
        let machines = status["machines"].as_array().context("the vault's status names no machines")?;
        Ok(machines.iter().find(|status| status["name"] == machine).cloned())
    }

    /// Writes whose data the agent's ring could not carry, so far: each is a gap's.
    pub(super) fn tracked_writes(&self, machine: &str) -> Result<u64> {
        self.ask_agent(machine, &["status"])?["writes"]["tracked"].as_u64().context("the agent counts no writes")
    }

    /// The size of the agent's ring.
    pub(super) fn ring_bytes(&self, machine: &str) -> Result<u64> {
        self.ask_agent(machine, &["status"])?["ring"]["max_bytes"].as_u64().context("the agent has no ring")
    }

    /// Marks this moment; the server has it durably on return.
    pub(super) fn mark(&self, machine: &str, name: &str) -> Result<()> {
        self.ask_agent(machine, &["mark", name, "--wait-s", "60"]).map(drop)
    }

    /// `farshore` with `words`, and with what opens the vault.
    pub(super) fn with_key(&self, words: &[&str]) -> Command {
        let mut command = bare(&self.programs.join("farshore"));
        command.env("FARSHORE_VAULT", self.scratch.join("vault"));
        command.env("FARSHORE_RECOVERY_KEY_FILE", self.scratch.join("key")).arg("--json").args(words);
        command
    }

    /// Whether the vault can recover `machine` to `moment`.
    pub(super) fn has_point(&self, machine: &str, moment: &str) -> bool {
        output_of(&mut self.with_key(&["vault", "points", machine, "--at", moment])).is_ok()
    }

    /// Bytes in the vault.
    pub(super) fn vault_bytes(&self) -> Result<u64> {
        folder_bytes(&self.scratch.join("vault"))
    }

    /// Bytes that agents have sent.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.link.bytes_sent()
    }

    /// Looks until `good`, or fails after `limit`.
    pub(super) fn wait_until(&self, what: &str, limit: Duration, good: impl Fn() -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        while !good()? {
            if began.elapsed() > limit {
                bail!("waited in vain until {what}\n{}", log_end(&self.scratch.join("server.log")));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Serves the newest point of `machine`.
    pub(super) fn open_branch(&self, machine: &str, words: &[&str]) -> Result<OpenBranch> {
        let mut command = self.with_key(&["branch", "open", machine]);
        command.args(words).arg("--state-dir").arg(self.branches());
        let log = self.scratch.join("branch.log");
        let (process, said) = start(&mut command, &log)?;
        let mut said = BufReader::new(said);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let open: Value = serde_json::from_str(&line).with_context(|| log_end(&log))?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("the branch has no disk");
        let (uri, export) = (text(&open["disks"][0]["uri"])?, text(&open["disks"][0]["export"])?);
        Ok(OpenBranch { process, uri, socket: text(&open["socket"])?.into(), export, _said: said })
    }

    /// Where branches keep their state. Short: it holds sockets.
    pub(super) fn branches(&self) -> PathBuf {
        self.scratch.join("b")
    }
}

/// Makes `state` the state directory of an agent that is enrolled with `token`.
pub(super) fn enrol(programs: &Path, machine: &str, token: &str, state: &Path) -> Result<()> {
    let token_file = state.with_extension("token");
    fs::write(&token_file, token)?;
    let mut join = bare(&programs.join("farshore-agent"));
    join.args(["join", "--name", machine, "--token-file"]).arg(&token_file).arg("--state-dir").arg(state);
    output_of(&mut join).map(drop)
}

/// A command that nothing of the caller's own settings reaches.
pub(super) fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FARSHORE_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

pub(super) fn start(command: &mut Command, log: &Path) -> Result<(Running, ChildStdout)> {
    let errors = File::options().create(true).append(true).open(log)?;
    let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().context("cannot start the product")?;
    let said = child.stdout.take().expect("standard output is piped one line above");
    Ok((Running { child }, said))
}

pub(super) fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run the product")?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn log_end(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
