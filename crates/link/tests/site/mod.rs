//! A server site with a settable clock, for the tests of this crate.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use link::{
    Authority, Connection, Connector, DenyList, Expected, JoinError, JoinPlan, JoinToken, LinkError, LinkIdentity,
    LinkRuntime, Listener, PeerIdentity, Reception, Role, TokenOrder, Trust, join,
};
use world::{Clock, Monotonic, RealFiles, SystemEntropy, WallTime};

pub(crate) const DAY: u64 = 86_400;
pub(crate) const SOON: Duration = Duration::from_secs(10);
pub(crate) const ANY_SERVER: Expected = Expected { role: Role::ProcessServer, id: None };

/// A clock that stands still unless moved.
pub(crate) struct TestClock(AtomicU64);

impl TestClock {
    pub(crate) fn advance_days(&self, days: u64) {
        self.0.fetch_add(days * DAY, Ordering::SeqCst);
    }

    pub(crate) fn go_back_days(&self, days: u64) {
        self.0.fetch_sub(days * DAY, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.wall().0)
    }

    fn wall(&self) -> WallTime {
        WallTime::from_seconds(self.0.load(Ordering::SeqCst))
    }
}

/// A server: authority, listener and clock, and a folder for machines beside it.
pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) authority: Arc<Authority>,
    pub(crate) listener: Listener,
    pub(crate) runtime: LinkRuntime,
}

pub(crate) fn open_authority(folder: &Path, clock: &Arc<TestClock>) -> Authority {
    Authority::open(Arc::new(RealFiles::new(folder)), clock.clone(), Arc::new(SystemEntropy), "authority")
        .expect("the authority opens")
}

impl Site {
    pub(crate) fn new() -> Site {
        Site::with_handshake_timeout(SOON)
    }

    pub(crate) fn with_handshake_timeout(handshake_timeout: Duration) -> Site {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let clock = Arc::new(TestClock(AtomicU64::new(1_800_000_000)));
        let authority = Arc::new(open_authority(folder.path(), &clock));
        let runtime = LinkRuntime::new(2).expect("threads");
        let identity = authority.own_identity(Role::ProcessServer).expect("an identity");
        let mut reception = Reception::new(identity, authority.trust(), Some(authority.clone()), clock.clone());
        reception.handshake_timeout = handshake_timeout;
        let listener = Listener::bind(&runtime, "127.0.0.1:0", reception).expect("listens");
        Site { folder, clock, authority, listener, runtime }
    }

    pub(crate) fn address(&self) -> String {
        self.listener.address().to_string()
    }

    pub(crate) fn token(&self) -> JoinToken {
        self.token_for(Role::Agent, None)
    }

    pub(crate) fn token_for(&self, role: Role, id: Option<[u8; 16]>) -> JoinToken {
        let valid_for = Duration::from_secs(DAY);
        let order = TokenOrder { role, id, valid_for, addresses: vec![self.address()] };
        self.authority.order_token(&order).expect("a token")
    }

    /// Joins a machine that keeps its identity in the file `name`.
    pub(crate) fn join(&self, name: &str, token: &JoinToken) -> Result<LinkIdentity, JoinError> {
        let files = RealFiles::new(self.folder.path());
        let plan = JoinPlan {
            files: &files,
            path: &format!("machines/{name}"),
            clock: self.clock.clone(),
            entropy: &SystemEntropy,
            addresses: &[],
        };
        join(&self.runtime, &plan, token)
    }

    pub(crate) fn agent(&self, name: &str) -> LinkIdentity {
        self.join(name, &self.token()).expect("joins")
    }

    pub(crate) fn connector(&self, identity: &LinkIdentity) -> Connector {
        let trust = Trust::new(identity.authority.clone(), self.clock.clone(), DenyList::default());
        Connector::new(self.runtime.clone(), identity.clone(), trust, self.clock.clone())
    }

    pub(crate) fn connect(&self, identity: &LinkIdentity) -> Result<Connection, LinkError> {
        self.connector(identity).connect(&self.address(), &ANY_SERVER)
    }

    pub(crate) fn accept(&self) -> (PeerIdentity, Connection) {
        self.listener.accept(SOON).expect("listening").expect("somebody came")
    }

    /// A fresh agent's end and the server's end of a connection.
    pub(crate) fn connected(&self) -> (Connection, Connection) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let agent = self.agent(&format!("agent-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let near = self.connect(&agent).expect("connects");
        let (peer, far) = self.accept();
        assert_eq!(peer, agent.peer);
        (near, far)
    }
}
