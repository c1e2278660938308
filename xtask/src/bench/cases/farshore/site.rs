//! A vault, a server and an agent for the measurements, in a scratch directory.

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
use crate::workspace::Workspace;

const POLL: Duration = Duration::from_millis(50);

/// A process that was started; killed when dropped.
pub(super) struct Running {
    child: Child,
}

impl Running {
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end in order, and waits until it has.
    pub(super) fn end(&mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
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
    _said: BufReader<ChildStdout>,
}

/// The running site.
pub(super) struct Site {
    scratch: PathBuf,
    programs: PathBuf,
    link: CountedLink,
    server: Running,
    agent: Option<Running>,
}

impl Site {
    /// Makes an empty vault and starts its server.
    pub(super) fn make(scratch: &Path) -> Result<Site> {
        let programs = Workspace::load()?.target.join("release");
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
        let link = CountedLink::to(address)?;
        Ok(Site { scratch: scratch.to_owned(), programs, link, server, agent: None })
    }

    pub(super) fn server_pid(&self) -> u32 {
        self.server.id()
    }

    pub(super) fn agent_pid(&self) -> Result<u32> {
        self.agent.as_ref().map(Running::id).context("no agent runs")
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

    /// Enrols `machine`, whose disk is `image`.
    pub(super) fn join(&self, machine: &str, image: &Path) -> Result<()> {
        let mut token = bare(&self.programs.join("farshore"));
        token.args(["--json", "token", "new", "--role", "agent", "--address", &self.link.address, "--config"]);
        let token: Value = serde_json::from_str(&output_of(token.arg(self.scratch.join("server.toml")))?)?;
        let token_file = self.path(machine, "token");
        fs::write(&token_file, token["token"].as_str().context("no token")?)?;
        let state = self.path(machine, "state");
        let mut join = bare(&self.programs.join("farshore-agent"));
        join.args(["join", "--name", machine, "--token-file"]).arg(&token_file).arg("--state-dir").arg(&state);
        output_of(&mut join)?;
        let config = format!(
            "state_dir = {state:?}\nmachine_name = {machine:?}\nnbd_socket = {:?}\n\n[[disk]]\nname = \"disk\"\n\
             path = {image:?}\n",
            self.disk_socket(machine)
        );
        fs::write(self.path(machine, "toml"), config)?;
        Ok(())
    }

    pub(super) fn start_agent(&mut self, machine: &str) -> Result<()> {
        let mut command = bare(&self.programs.join("farshore-agent"));
        command.args(["run", "--config"]).arg(self.path(machine, "toml"));
        self.agent = Some(start(&mut command, &self.path(machine, "log"))?.0);
        Ok(())
    }

    pub(super) fn stop_agent(&mut self) -> Result<()> {
        self.agent.take().map_or(Ok(()), |mut agent| agent.end())
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
    pub(super) fn open_branch(&self, machine: &str) -> Result<OpenBranch> {
        let mut command = self.with_key(&["branch", "open", machine, "--throw-away", "--state-dir"]);
        command.arg(self.scratch.join("b"));
        let log = self.scratch.join("branch.log");
        let (process, said) = start(&mut command, &log)?;
        let mut said = BufReader::new(said);
        let mut line = String::new();
        said.read_line(&mut line)?;
        let open: Value = serde_json::from_str(&line).with_context(|| log_end(&log))?;
        let uri = open["disks"][0]["uri"].as_str().context("the branch has no disk")?.to_owned();
        Ok(OpenBranch { process, uri, _said: said })
    }
}

/// A command that nothing of the caller's own settings reaches.
fn bare(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FARSHORE_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn start(command: &mut Command, log: &Path) -> Result<(Running, ChildStdout)> {
    let errors = File::options().create(true).append(true).open(log)?;
    let mut child = command.stdout(Stdio::piped()).stderr(errors).spawn().context("cannot start the product")?;
    let said = child.stdout.take().expect("standard output is piped one line above");
    Ok((Running { child }, said))
}

fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().context("cannot run the product")?;
    ensure!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn log_end(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
