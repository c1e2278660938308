//! The agent's certificate: renewed when a third of its life is left, over the link's own protocol, for the key it has.
//!
//! A thread of its own, which sleeps for an hour at a time: a renewal connects, waits for an answer and syncs files. The old
//! certificate is good until the new one is durable, and for long after its end (`TRUST_GRACE_DAYS`); a crash at any moment
//! leaves the one or the other. Sessions go on: the next one shows the new certificate. Nobody waits for the thread: an agent
//! that ends need not wait for a server that does not answer.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::Duration;

use link::{Connector, DenyList, Expected, LinkIdentity, LinkRuntime, Role, Trust};
use world::{Clock, WallTime};

use super::drive::Command;
use super::problem::{Problem, chain};
use super::{Shared, choose};
use crate::state::StateDir;
use crate::status::CertificateStatus;

/// Longest and shortest pause between two looks at the certificate. The clock may be set meanwhile.
const LOOK_MAX: Duration = Duration::from_secs(3600);
const LOOK_MIN: Duration = Duration::from_secs(1);

/// Keeps the thread going; it ends soon after this is dropped.
pub(super) struct Renewal {
    _stop: SyncSender<()>,
}

impl Renewal {
    /// Starts it; `configured` are the addresses of the configuration.
    pub(super) fn start(shared: &Arc<Shared>, state: StateDir, configured: Vec<String>) -> std::io::Result<Renewal> {
        let (stop, stopped) = mpsc::sync_channel::<()>(0);
        let shared = shared.clone();
        let work = move || {
            loop {
                let pause = look(&shared, &state, &configured);
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        thread::Builder::new().name("certificate".to_owned()).spawn(work)?;
        Ok(Renewal { _stop: stop })
    }
}

/// Renews the certificate if it is time; how long there is nothing to do.
fn look(shared: &Shared, state: &StateDir, configured: &[String]) -> Duration {
    let identity = match state.joined_identity() {
        Ok(identity) => identity,
        Err(problem) => {
            tracing::warn!(%problem, "the certificate cannot be looked after");
            return LOOK_MAX;
        }
    };
    let now = shared.clock.wall();
    let left = |until: WallTime| Duration::from_nanos(until.0.saturating_sub(now.0));
    if !identity.is_due(now) {
        shared.status().certificate = CertificateStatus { ends: identity.ends().to_string(), problem: String::new() };
        return left(identity.due()).clamp(LOOK_MIN, LOOK_MAX);
    }
    match renew(shared, state, configured, &identity) {
        Ok(Some(ends)) => {
            tracing::info!(ends = %ends, "the certificate was renewed");
            LOOK_MIN
        }
        // Somebody joined meanwhile.
        Ok(None) => LOOK_MIN,
        Err(why) => {
            let problem = in_words(&identity, &why, &*shared.clock);
            tracing::warn!(problem, "the certificate could not be renewed");
            shared.status().certificate = CertificateStatus { ends: identity.ends().to_string(), problem };
            // Often enough to succeed when the server is back, seldom enough not to press it.
            (left(identity.ends()) / 20).clamp(LOOK_MIN, LOOK_MAX)
        }
    }
}

/// What a person should know of a certificate that is due.
fn in_words(identity: &LinkIdentity, why: &str, clock: &dyn Clock) -> String {
    let (now, ends, until) = (clock.wall(), identity.ends(), identity.accepted_until());
    let state = if now > until {
        format!("it ended at {ends} and is not accepted any more")
    } else if now > ends {
        format!("it ended at {ends} and is accepted until {until}")
    } else {
        format!("it ends at {ends}")
    };
    format!("{state}; it could not be renewed: {why}")
}

/// When the new certificate ends; none if the identity was replaced meanwhile.
fn renew(
    shared: &Shared,
    state: &StateDir,
    configured: &[String],
    identity: &LinkIdentity,
) -> Result<Option<WallTime>, String> {
    let mut addresses = choose(configured, &state.enrolment().server_addresses);
    // Where the agent is connected, if it is, there is an answer.
    let current = shared.status().link.server.clone();
    addresses.sort_by_key(|address| *address != current);
    let runtime = LinkRuntime::new(1).map_err(|error| format!("no thread: {error}"))?;
    let trust = Trust::new(identity.authority.clone(), shared.clock.clone(), DenyList::default());
    let connector = Connector::new(runtime, identity.clone(), trust, shared.clock.clone());
    let mut failures = Vec::new();
    for address in addresses {
        match connector.renew(&address, &Expected { role: Role::ProcessServer, id: None }) {
            Ok(renewed) => {
                let kept = state.renew_identity(identity, &renewed).map_err(|problem: Problem| problem.to_string())?;
                let ends = renewed.ends();
                if kept && shared.commands.send(Command::Identity(Box::new(renewed))).is_err() {
                    tracing::debug!("the engine's thread has ended");
                }
                return Ok(kept.then_some(ends));
            }
            Err(error) => failures.push(format!("{address}: {}", chain(&error))),
        }
    }
    Err(failures.join("; "))
}
