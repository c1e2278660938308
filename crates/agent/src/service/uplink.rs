//! The way to a process server: which address is tried when, and what is remembered of failures.
//!
//! ```text
//! Waiting ──pause over──► Connecting ──accepted──► Up ──ended, refused──► Waiting
//!    ▲                        └──────failed──────────────────────────────────┘
//! ```

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::Duration;

use link::{Connection, Connector, Expected, LinkError, LinkIdentity, PeerRefusal, Role};
use replication::MachineId;
use world::{Clock, Entropy, Monotonic, SystemEntropy};

use super::bell::Bell;
use super::problem::chain;
use crate::wire::LinkWire;

/// First and longest pause after a failure that may pass by itself.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pauses after a refusal. The first is short: a server may take a moment to notice that a predecessor is gone.
const REFUSED_PAUSES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];
/// A session that lasted this long ends the count of failures.
const SESSION_GOOD: Duration = Duration::from_secs(5);

enum State {
    Waiting { until: Monotonic },
    Connecting(Receiver<Result<Connection, LinkError>>),
    Up { wire: Box<LinkWire>, since: Monotonic },
}

/// How long to wait before the next attempt. Pure.
#[derive(Debug, Default)]
pub(super) struct Pauses {
    failures: u32,
    refusals: usize,
}

impl Pauses {
    /// After a failure that may pass by itself.
    fn failed(&mut self) -> Duration {
        let pause = (PAUSE_MIN * 2u32.pow(self.failures.min(8))).min(PAUSE_MAX);
        self.failures += 1;
        pause
    }

    /// After a refusal.
    fn refused(&mut self) -> Duration {
        let pause = REFUSED_PAUSES[self.refusals.min(REFUSED_PAUSES.len() - 1)];
        self.refusals += 1;
        pause
    }

    /// After a session that was accepted.
    fn ended(&mut self, lasted: Duration) -> Duration {
        self.refusals = 0;
        if lasted >= SESSION_GOOD {
            self.failures = 0;
        }
        self.failed()
    }
}

/// See the module's documentation.
pub(super) struct Uplink {
    connector: Connector,
    addresses: Vec<String>,
    /// The address of the current or next attempt.
    current: usize,
    clock: Arc<dyn Clock>,
    state: State,
    pauses: Pauses,
    /// Why the server does not want us, while that is so.
    refusal: Option<String>,
    last_error: String,
    sessions: u64,
    attempted: bool,
    /// Rung for what other threads find out: frames that arrive, connections that come about.
    bell: Arc<Bell>,
}

impl Uplink {
    pub(super) fn new(connector: Connector, addresses: Vec<String>, clock: Arc<dyn Clock>, bell: Arc<Bell>) -> Uplink {
        assert!(!addresses.is_empty(), "checked at start");
        let state = State::Waiting { until: clock.monotonic() };
        Uplink {
            connector,
            addresses,
            current: 0,
            clock,
            state,
            pauses: Pauses::default(),
            refusal: None,
            last_error: String::new(),
            sessions: 0,
            attempted: false,
            bell,
        }
    }

    /// Goes on with what is under way. `true` when a connection has just been opened.
    pub(super) fn advance(&mut self) -> bool {
        match &self.state {
            State::Waiting { until } if self.clock.monotonic() >= *until => self.connect(),
            State::Connecting(result) => match result.try_recv() {
                Ok(Ok(connection)) => {
                    tracing::info!(server = connection.address(), peer = %connection.peer(), "connected");
                    let wire = Box::new(LinkWire::new(connection));
                    let bell = self.bell.clone();
                    wire.ring_with(Arc::new(move || bell.ring()));
                    self.state = State::Up { wire, since: self.clock.monotonic() };
                    return true;
                }
                Ok(Err(error)) if error.is_transient() => {
                    let pause = self.pauses.failed();
                    self.pause(chain(&error), pause);
                }
                Ok(Err(error)) => self.turned_away(self.refusal_in_words(&error)),
                Err(TryRecvError::Disconnected) => {
                    let pause = self.pauses.failed();
                    self.pause("connecting ended by a fault of the program".to_owned(), pause);
                }
                Err(TryRecvError::Empty) => {}
            },
            _ => {}
        }
        false
    }

    /// Shows another certificate from the next connection on. One of another installation is for another uplink.
    pub(super) fn set_identity(&mut self, identity: LinkIdentity) {
        let known = self.connector.identity();
        if identity.peer == known.peer && identity.authority == known.authority {
            self.connector = self.connector.with_identity(identity);
        }
    }

    fn connect(&mut self) {
        let (report, result) = mpsc::sync_channel(1);
        let (connector, address, bell) = (self.connector.clone(), self.server().to_owned(), self.bell.clone());
        // A thread of its own: name resolution and a handshake may take many seconds, and the ring must be looked at.
        let attempt = move || {
            let expected = Expected { role: Role::ProcessServer, id: None };
            // The agent may have ended meanwhile.
            let _ = report.send(connector.connect(&address, &expected));
            bell.ring();
        };
        match thread::Builder::new().name("connect".to_owned()).spawn(attempt) {
            Ok(_) => self.state = State::Connecting(result),
            Err(error) => {
                let pause = self.pauses.failed();
                self.pause(format!("no thread for connecting: {error}"), pause);
            }
        }
    }

    /// The wire, while there is a connection.
    pub(super) fn wire(&mut self) -> Option<&mut LinkWire> {
        match &mut self.state {
            State::Up { wire, .. } => Some(wire),
            _ => None,
        }
    }

    /// How long there is nothing to do here, unless the bell rings.
    pub(super) fn patience(&self) -> Duration {
        match &self.state {
            State::Waiting { until } => until.since(self.clock.monotonic()),
            State::Connecting(_) | State::Up { .. } => Duration::MAX,
        }
    }

    /// Takes the wire away for a farewell.
    pub(super) fn take_wire(&mut self) -> Option<LinkWire> {
        match std::mem::replace(&mut self.state, State::Waiting { until: Monotonic(u64::MAX) }) {
            State::Up { wire, .. } => Some(*wire),
            _ => None,
        }
    }

    /// The receiver has accepted the session.
    pub(super) fn is_welcomed(&self) -> bool {
        matches!(&self.state, State::Up { wire, .. } if wire.is_welcomed())
    }

    /// Called once when a session was accepted.
    pub(super) fn welcomed(&mut self) {
        self.refusal = None;
        self.sessions += 1;
    }

    /// The session has ended, or must.
    pub(super) fn ended(&mut self, reason: String) {
        if let State::Up { wire, since } = &self.state {
            let pause = if wire.is_welcomed() {
                self.pauses.ended(self.clock.monotonic().since(*since))
            } else {
                self.pauses.failed()
            };
            self.pause(reason, pause);
        }
    }

    /// Ends the link and opens another one at once; whether there was one.
    pub(super) fn renew(&mut self) -> bool {
        let was_up = matches!(self.state, State::Up { .. });
        if was_up {
            self.state = State::Waiting { until: self.clock.monotonic() };
        }
        was_up
    }

    /// What a person needs who has to act on it.
    fn refusal_in_words(&self, error: &LinkError) -> String {
        let why = chain(error);
        if !matches!(error, LinkError::RefusedByPeer(PeerRefusal::Expired)) {
            return why;
        }
        let identity = self.connector.identity();
        let machine = MachineId(identity.peer.id);
        format!(
            "{why}: it ended at {}. Order a token with `farshore token new --machine {machine}` at the server and run \
             `farshore-agent join` with it here: history, disks and maps stay",
            identity.ends()
        )
    }

    /// The server does not want this machine.
    pub(super) fn turned_away(&mut self, reason: String) {
        let first = self.refusal.as_ref() != Some(&reason);
        let persists = self.pauses.refusals + 1 >= REFUSED_PAUSES.len();
        if first {
            tracing::warn!(server = self.server(), reason, "the process server refuses this machine; trying again");
        } else if persists && self.pauses.refusals + 1 == REFUSED_PAUSES.len() {
            tracing::error!(server = self.server(), reason, "the process server keeps refusing this machine");
        }
        let pause = self.pauses.refused();
        self.pause(reason.clone(), pause);
        self.refusal = Some(reason);
    }

    fn pause(&mut self, reason: String, pause: Duration) {
        if self.last_error != reason {
            tracing::debug!(server = self.server(), reason, "no session");
        }
        self.last_error = reason;
        self.attempted = true;
        self.current = (self.current + 1) % self.addresses.len();
        // A quarter more or less, so that a returning server is not met by all machines at once.
        let [jitter] = (&SystemEntropy as &dyn Entropy).bytes::<1>();
        let pause = pause * (192 + u32::from(jitter) / 2) / 256;
        self.state = State::Waiting { until: self.clock.monotonic().plus(pause) };
    }

    /// The address of the connection, or of the current or next attempt.
    pub(super) fn server(&self) -> &str {
        &self.addresses[self.current]
    }

    /// Why the server does not want us, while that is so.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.as_deref()
    }

    /// Why the latest session or attempt ended.
    pub(super) fn last_error(&self) -> &str {
        &self.last_error
    }

    /// Sessions so far.
    pub(super) fn sessions(&self) -> u64 {
        self.sessions
    }

    /// Whether any attempt or session has ended yet.
    pub(super) fn was_attempted(&self) -> bool {
        self.attempted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_limit_and_shrink_after_a_good_session() {
        let mut pauses = Pauses::default();
        let millis: Vec<u128> = (0..8).map(|_| pauses.failed().as_millis()).collect();
        assert_eq!(millis, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert_eq!(pauses.ended(Duration::from_secs(1)), PAUSE_MAX, "a server that drops us at once is not pressed");
        assert_eq!(pauses.ended(Duration::from_secs(60)), PAUSE_MIN);
        let seconds: Vec<u64> = (0..4).map(|_| pauses.refused().as_secs()).collect();
        assert_eq!(seconds, [1, 5, 30, 30]);
        pauses.ended(Duration::ZERO);
        assert_eq!(pauses.refused().as_secs(), 1);
        (0..100).for_each(|_| assert!(pauses.failed() <= PAUSE_MAX));
    }
}
