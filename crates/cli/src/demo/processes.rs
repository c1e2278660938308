//! The demo's processes: started, spoken to, killed by their id, and never left behind.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use world::{Clock, SystemClock};

use crate::failure::{Done, Failure, io_failure};
use crate::parent::ENDS_WITH;

/// Lines of a log that a failure shows.
const LOG_LINES: usize = 12;
/// How long a process may take to end in order.
const END_LIMIT: Duration = Duration::from_secs(20);
/// A farshore-agent that is older than this program by more than this was left by an earlier build.
const AGENT_AGE: Duration = Duration::from_secs(600);

/// Programs and where their logs go.
pub(crate) struct Programs {
    farshore: PathBuf,
    agent: Option<PathBuf>,
    logs: PathBuf,
}

impl Programs {
    /// This program, and the agent beside it if there is one of the same build.
    pub(crate) fn find(logs: PathBuf) -> Done<Programs> {
        let farshore =
            std::env::current_exe().map_err(|error| io_failure("this program cannot find itself", &error))?;
        let built = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
        let agent = Some(farshore.with_file_name("farshore-agent")).filter(|agent| {
            let (Some(own), Some(agent)) = (built(&farshore), built(agent)) else { return false };
            agent + AGENT_AGE >= own
        });
        Ok(Programs { farshore, agent, logs })
    }

    /// What plays the agent, for people.
    pub(crate) fn agent_name(&self) -> &'static str {
        if self.agent.is_some() { "farshore-agent" } else { "the agent within farshore" }
    }

    /// A command of this program.
    pub(crate) fn farshore(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.farshore);
        command.args(arguments);
        // What the caller has set for their own vault must not reach the demo's.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FARSHORE_") && name != "FARSHORE_LOG" {
                command.env_remove(name);
            }
        }
        command.env("FARSHORE_SEEN_HEADS", self.logs.with_file_name("seen"));
        command
    }

    /// A command of the agent.
    pub(crate) fn agent(&self, arguments: &[&str]) -> Command {
        let mut command = self.farshore(&["__agent"]);
        if let Some(agent) = &self.agent {
            let cleared: Vec<OsString> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
            command = Command::new(agent);
            cleared.into_iter().for_each(|name| {
                command.env_remove(name);
            });
        }
        command.args(arguments);
        command
    }

    /// Starts `command` and leaves it running, but not beyond this process. Must be called by a thread that stays: the system
    /// takes the thread for the parent. `log` names its log.
    pub(crate) fn start(&self, mut command: Command, log: &str) -> Done<Running> {
        let path = self.logs.join(format!("{log}.log"));
        let refused = |error: std::io::Error| io_failure(format!("{log} cannot be started"), &error);
        let file = File::options().create(true).append(true).open(&path).map_err(refused)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(file);
        command.env(ENDS_WITH, std::process::id().to_string());
        let mut child = command.spawn().map_err(refused)?;
        let stdout = child.stdout.take().expect("it was asked for");
        let (lines, answers) = sync_channel(256);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Ok(Running { name: log.to_owned(), child, stdin, answers, log: path, ended: false, cleans_up: false })
    }

    /// Runs `command` to its end and returns what it printed.
    pub(crate) fn run(&self, mut command: Command, what: &str) -> Done<String> {
        let output = command
            .stdin(Stdio::null())
            .output()
            .map_err(|error| io_failure(format!("{what}: cannot be run"), &error))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(Failure::new(format!("{what} failed ({})", output.status), said, "this is a fault: report it"))
    }

    /// Runs `farshore --json …` and returns the objects it printed.
    pub(crate) fn objects(&self, arguments: &[&str], what: &str) -> Done<Vec<Value>> {
        let mut command = self.farshore(&["--json"]);
        command.args(arguments);
        self.run(command, what)?.lines().map(|line| parse(line, what)).collect()
    }
}

fn parse(line: &str, what: &str) -> Done<Value> {
    serde_json::from_str(line)
        .map_err(|error| Failure::new(format!("{what}: the answer is no JSON"), error.to_string(), "report this"))
}

/// A process that was started. Dropping it kills it.
pub(crate) struct Running {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    answers: Receiver<String>,
    log: PathBuf,
    ended: bool,
    /// It is not killed: it ends when its standard input does.
    cleans_up: bool,
}

impl Running {
    /// The next line it prints.
    pub(crate) fn line(&mut self, limit: Duration) -> Done<String> {
        match self.answers.recv_timeout(limit) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                Err(self.failure(&format!("{} said nothing for {} s", self.name, limit.as_secs())))
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.failure(&format!("{} has ended", self.name))),
        }
    }

    /// The next object it prints.
    pub(crate) fn object(&mut self, limit: Duration) -> Done<Value> {
        let line = self.line(limit)?;
        parse(&line, &self.name)
    }

    /// Tells it something on its standard input.
    pub(crate) fn tell(&mut self, line: &str) -> Done {
        let told = self.stdin.as_mut().map(|stdin| writeln!(stdin, "{line}").and_then(|()| stdin.flush()));
        match told {
            Some(Ok(())) => Ok(()),
            _ => Err(self.failure(&format!("{} does not listen", self.name))),
        }
    }

    /// It is never killed, but waited for once its standard input has ended: it has to clean up.
    pub(crate) fn outlives_its_owner(&mut self) {
        self.cleans_up = true;
    }

    /// Ends its standard input, and waits until it has cleaned up, well.
    pub(crate) fn finish(&mut self, limit: Duration) -> Done {
        drop(self.stdin.take());
        while self.line(limit)? != "gone" {}
        self.end_by_itself()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Done {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal)
            .map_err(|error| io_failure(format!("{} cannot be signalled", self.name), &error.into()))
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) -> Done {
        self.ended = true;
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map(drop).map_err(|error| io_failure(format!("{} cannot be killed", self.name), &error))
    }

    /// Asks it to end in order, and waits until it has.
    pub(crate) fn end(&mut self) -> Done {
        self.signal(Signal::TERM)?;
        self.end_by_itself()
    }

    /// Waits until it has ended, well.
    pub(crate) fn end_by_itself(&mut self) -> Done {
        let began = SystemClock.monotonic();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => {
                    self.ended = true;
                    return Ok(());
                }
                Ok(Some(status)) => {
                    self.ended = true;
                    return Err(self.failure(&format!("{} ended with {status}", self.name)));
                }
                Ok(None) if SystemClock.monotonic().since(began) < END_LIMIT => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(None) => return Err(self.failure(&format!("{} does not end", self.name))),
                Err(error) => return Err(io_failure(format!("{} cannot be waited for", self.name), &error)),
            }
        }
    }

    /// Whether it still runs; a failure with the end of its log if not.
    pub(crate) fn check(&mut self) -> Done {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(self.failure(&format!("{} has ended by itself", self.name))),
        }
    }

    fn failure(&self, what: &str) -> Failure {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        Failure::new(what, format!("the end of its log:\n{end}"), "this is a fault: report it with the seed")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended && self.cleans_up {
            drop(self.stdin.take());
            let _ = self.child.wait();
        } else if !self.ended {
            // Also one that was stopped by a signal; only this very child is meant.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A loopback port that is free now.
pub(crate) fn free_port() -> Done<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0));
    let port = listener.and_then(|listener| listener.local_addr()).map(|address| address.port());
    port.map_err(|error| io_failure("there is no free port on the loopback address", &error))
}
