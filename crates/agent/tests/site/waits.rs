//! Waiting for an agent.
#![allow(dead_code, unreachable_pub)]

use std::thread;
use std::time::{Duration, Instant};

use agent::config::AgentConfig;
use agent::service::control::{Answer, Request, ask};
use agent::status::{AgentStatus, ProtectionState};

pub const SOON: Duration = Duration::from_secs(60);

/// What the agent of `config` says of itself; none while it does not run.
pub fn status_of(config: &AgentConfig) -> Option<AgentStatus> {
    match ask(&config.control_socket(), &Request::Status) {
        Ok(Answer::Status(status)) => Some(*status),
        _ => None,
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < SOON, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn wait_protected(status: impl Fn() -> Option<AgentStatus>) {
    wait_for("the machine is protected", || status().is_some_and(|now| now.state == ProtectionState::Protected));
}

/// Waits until the server has everything, when nobody writes any more.
pub fn settle(status: impl Fn() -> Option<AgentStatus>) {
    let since = Instant::now();
    wait_for("everything is with the server", || {
        since.elapsed() > Duration::from_millis(400)
            && status().is_some_and(|now| {
                now.state == ProtectionState::Protected
                    && now.ring.used_bytes == 0
                    && now.watermarks.captured == now.watermarks.journaled
            })
    });
}
