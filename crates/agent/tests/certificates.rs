//! An agent's certificate over the years, in seconds: renewed while it runs, ended because nobody renewed it, joined again.
//! The agent is a process of its own, the server's certificates live for seconds and are refused when they have ended.
#![cfg(target_os = "linux")]

#[path = "site/process.rs"]
mod process;
mod site;
#[path = "site/waits.rs"]
mod waits;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use agent::config::{AgentConfig, CaptureChoice, DiskConfig};
use agent::service::control::{Answer, Request, ask};
use agent::state::StateDir;
use agent::status::ProtectionState;
use link::LinkIdentity;
use process::Agent;
use site::Server;
use waits::{status_of, wait_for, wait_protected};
use world::{Clock, SystemClock};

/// A certificate is due for renewal after two thirds of this.
const LIFETIME: Duration = Duration::from_secs(9);

struct Machine {
    config: AgentConfig,
    folder: PathBuf,
    state: StateDir,
}

impl Machine {
    fn new(server: &Server) -> Machine {
        let folder = server.folder("machine");
        std::fs::create_dir_all(&folder).expect("created");
        let image = folder.join("disk.img");
        File::create(&image).and_then(|file| file.set_len(4 << 20)).expect("an image");
        let mut config = AgentConfig::new(folder.join("state"));
        config.disks.push(DiskConfig { capture: CaptureChoice::Splitter, ..DiskConfig::new("disk", &image) });
        let state = StateDir::open(&config.state_dir).expect("opens");
        state.join(&server.runtime, Arc::new(SystemClock), &server.token(), "machine", &[]).expect("joins");
        Machine { config, folder, state }
    }

    fn spawn(&self) -> Agent {
        Agent::spawn(&self.config, &self.folder, &[])
    }

    fn identity(&self) -> LinkIdentity {
        self.state.joined_identity().expect("it has joined")
    }

    fn wait_renewed(&self, from: &LinkIdentity) -> LinkIdentity {
        wait_for("the certificate is renewed", || self.identity().certificate != from.certificate);
        self.identity()
    }

    fn wait_protected(&self) {
        wait_protected(|| status_of(&self.config));
    }
}

/// Not a test of its own: what [`Machine::spawn`] runs.
#[test]
fn an_agent_of_its_own() {
    process::be_one();
}

#[test]
fn a_running_agent_renews_its_certificate() {
    let server = Server::start_with(false, Some(LIFETIME));
    let machine = Machine::new(&server);
    let first = machine.identity();
    let mut agent = machine.spawn();
    machine.wait_protected();
    let second = machine.wait_renewed(&first);
    assert_eq!((second.peer, second.key.public()), (first.peer, first.key.public()), "the same machine, the same key");
    assert!(second.ends() > first.ends());
    let third = machine.wait_renewed(&second);
    assert!(first.has_ended(SystemClock.wall()), "it has outlived the certificate that it began with");
    wait_for("the status tells", || {
        status_of(&machine.config).is_some_and(|now| now.certificate.ends == machine.identity().ends().to_string())
    });
    let status = status_of(&machine.config).expect("it runs");
    assert_eq!(status.certificate.problem, "");
    assert_eq!(status.link.sessions, 1, "the session went on");

    // What is kept is what is accepted, also by an agent that is started again.
    agent.kill();
    let _agent = machine.spawn();
    machine.wait_protected();
    drop(third);
}

#[test]
fn a_machine_whose_certificate_has_ended_joins_again_and_keeps_its_history() {
    let mut server = Server::start_with(false, Some(LIFETIME));
    let machine = Machine::new(&server);
    server.crash();
    server.admits = false;
    server.open();
    let first = machine.identity();
    let _agent = machine.spawn();
    machine.wait_protected();
    wait_for("the status tells that nobody renews", || {
        status_of(&machine.config).is_some_and(|now| now.certificate.problem.contains("could not be renewed"))
    });
    assert_eq!(status_of(&machine.config).expect("it runs").state, ProtectionState::Protected);
    // Whoever is connected stays so. After the end, nobody connects any more.
    // Certificates count whole seconds.
    wait_for("it has ended", || SystemClock.wall().seconds() > first.ends().seconds());
    server.crash();
    server.open();
    wait_for("the agent is refused", || {
        status_of(&machine.config).is_some_and(|now| now.state == ProtectionState::Refused)
    });
    let status = status_of(&machine.config).expect("it runs");
    let id = replication::MachineId(first.peer.id);
    for word in ["ended at", &format!("farshore token new --machine {id}"), "farshore-agent join", "history"] {
        assert!(status.reason.contains(word), "{word} is missing: {}", status.reason);
    }

    // What it says: order a token for this machine, join with it.
    server.crash();
    server.admits = true;
    server.open();
    let stranger = machine.state.join(&server.runtime, Arc::new(SystemClock), &server.token(), "machine", &[]);
    assert!(stranger.expect_err("it would lose its history").why.contains("new machine"));
    let token = server.token_of(Some(first.peer.id));
    let joined = machine.state.join(&server.runtime, Arc::new(SystemClock), &token, "machine", &[]).expect("joins");
    assert_eq!(joined.peer, first.peer);
    // As `farshore-agent join` does when an agent runs.
    let moved = ask(&machine.config.control_socket(), &Request::Move { within_ms: 1000 });
    assert!(matches!(moved, Ok(Answer::Moved { .. })), "{moved:?}");
    machine.wait_protected();
    assert_eq!(server.store().whole_heals, 1, "nothing is compared as a whole again");
}
