//! The agent as a process of its own: the test program, started again to be one.
#![allow(dead_code, unreachable_pub)]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use agent::capture::ebpf;
use agent::config::AgentConfig;
use agent::service::{Service, ServiceOptions};
use world::SystemClock;

/// Names the configuration of the agent that the program is to be.
const CHILD: &str = "FARSHORE_TEST_AGENT";

/// Killed when dropped.
pub struct Agent(pub Child);

impl Agent {
    /// Starts it with `config`, by a program that starts others if `starter` names one. The program must have a test
    /// `an_agent_of_its_own` that calls [`be_one`].
    pub fn spawn(config: &AgentConfig, folder: &Path, starter: &[String]) -> Agent {
        let path = folder.join("agent.toml");
        std::fs::write(&path, toml::to_string(config).expect("a configuration")).expect("written");
        let own = std::env::current_exe().expect("this program").display().to_string();
        let words = [starter, &[own]].concat();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(["--exact", "an_agent_of_its_own", "--nocapture"]);
        Agent(command.env(CHILD, &path).stdout(Stdio::null()).spawn().expect("starts"))
    }

    pub fn kill(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Is the agent, if this process was started to be one.
pub fn be_one() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let config = AgentConfig::load(Path::new(&path)).expect("the test wrote it");
    let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
    let service = Service::start(&config, options).unwrap_or_else(|problems| panic!("{problems:?}"));
    service.wait();
}

/// Takes down what a test's agents left in the kernel.
pub fn take_down(config: &AgentConfig) {
    match ebpf::detach(&config.ebpf_pins()) {
        Ok(()) | Err(ebpf::DetachError::Nothing(_)) => {}
        Err(error) => eprintln!("the pins stay: {error}"),
    }
}
