//! Opening connections, and the runtime that moves bytes for everything in this crate.

use std::fmt;
use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle, Runtime};
use world::Clock;

use crate::connection::Connection;
use crate::driver::{self, KIND_TURNED_AWAY, KIND_WELCOME};
use crate::error::{LinkError, PeerRefusal};
use crate::identity::{LinkIdentity, PeerIdentity, Role};
use crate::limits::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT};
use crate::session::{TlsSocket, within};
use crate::tls::{self, ALPN_REPLICATION};
use crate::token::hex;
use crate::trust::{ClockHandle, Trust, identity_of_der};

/// The threads that move bytes. Clones share them; they end with the last clone, listener and connection.
#[derive(Clone)]
pub struct LinkRuntime {
    handle: Handle,
    _owned: Option<Arc<OwnedRuntime>>,
}

/// Ends without waiting, so that it may be dropped anywhere.
struct OwnedRuntime(Option<Runtime>);

impl Drop for OwnedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl LinkRuntime {
    /// A runtime of its own with `threads` threads.
    ///
    /// # Errors
    /// The system gives no threads.
    pub fn new(threads: usize) -> io::Result<LinkRuntime> {
        let runtime =
            Builder::new_multi_thread().worker_threads(threads.max(1)).thread_name("link").enable_all().build()?;
        Ok(LinkRuntime { handle: runtime.handle().clone(), _owned: Some(Arc::new(OwnedRuntime(Some(runtime)))) })
    }

    /// A runtime that somebody else owns and keeps running. It must have timers and network enabled.
    pub fn from_handle(handle: Handle) -> LinkRuntime {
        LinkRuntime { handle, _owned: None }
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
        self.handle.spawn(task)
    }

    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.handle.block_on(work)
    }

    pub(crate) fn enter(&self) -> tokio::runtime::EnterGuard<'_> {
        self.handle.enter()
    }
}

impl fmt::Debug for LinkRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LinkRuntime")
    }
}

/// Whom a connection is meant to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Its role.
    pub role: Role,
    /// Its id, if only one will do.
    pub id: Option<[u8; 16]>,
}

impl Expected {
    pub(crate) fn is(&self, peer: &PeerIdentity) -> bool {
        self.role == peer.role && self.id.is_none_or(|id| id == peer.id)
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{} {}", self.role, hex(id)),
            None => write!(f, "any {}", self.role),
        }
    }
}

/// Opens connections under one identity.
#[derive(Clone)]
pub struct Connector {
    pub(crate) runtime: LinkRuntime,
    pub(crate) identity: LinkIdentity,
    pub(crate) trust: Trust,
    pub(crate) clock: ClockHandle,
}

impl Connector {
    /// A connector for `identity`, which trusts what `trust` says.
    pub fn new(runtime: LinkRuntime, identity: LinkIdentity, trust: Trust, clock: Arc<dyn Clock>) -> Connector {
        Connector { runtime, identity, trust, clock: ClockHandle(clock) }
    }

    /// Who connects.
    pub fn identity(&self) -> &LinkIdentity {
        &self.identity
    }

    /// The same with another identity of the same authority.
    pub fn with_identity(&self, identity: LinkIdentity) -> Connector {
        Connector { identity, ..self.clone() }
    }

    /// Connects to `address` (`host:port`). Blocks until both sides have accepted each other; not for async callers.
    ///
    /// # Errors
    /// Says which side refused what; see [`LinkError`].
    pub fn connect(&self, address: &str, expected: &Expected) -> Result<Connection, LinkError> {
        let (socket, peer) = self.runtime.block_on(async {
            let stream = within("connecting", CONNECT_TIMEOUT, dial(address)).await?;
            within("the TLS handshake", HANDSHAKE_TIMEOUT, self.greet(stream, expected)).await
        })?;
        let shared = driver::start(&self.runtime, socket, peer, self.trust.clone());
        Ok(Connection::new(shared, self.runtime.clone()))
    }

    async fn greet(&self, stream: TcpStream, expected: &Expected) -> Result<(TlsSocket, PeerIdentity), LinkError> {
        let session = tls::peer_client(&self.identity, &self.trust, self.clock.clone(), ALPN_REPLICATION)?;
        let socket = TlsSocket::new(stream, session, crate::limits::FRAME_BYTES_MAX);
        socket.handshake().await?;
        if socket.protocol().as_deref() != Some(ALPN_REPLICATION) {
            return Err(LinkError::ProtocolViolation("it chose no protocol".to_owned()));
        }
        let peer = socket
            .peer_certificate()
            .and_then(|certificate| identity_of_der(&certificate))
            .ok_or_else(|| LinkError::BadCertificate("it names no identity".to_owned()))?;
        if !expected.is(&peer) {
            socket.farewell().await;
            return Err(LinkError::WrongPeer { expected: expected.to_string(), found: peer });
        }
        // In TLS 1.3 a client is done before the server has judged its certificate; only the welcome, or the
        // alert in its place, says how that went.
        let frame = socket.receive().await?;
        match (frame.kind(), &*frame.into_body()) {
            (KIND_WELCOME, []) => Ok((socket, peer)),
            (KIND_TURNED_AWAY, [TURNED_AWAY_BUSY]) => Err(LinkError::RefusedByPeer(PeerRefusal::Busy)),
            (KIND_TURNED_AWAY, [TURNED_AWAY_NO_CERTIFICATE]) => {
                Err(LinkError::RefusedByPeer(PeerRefusal::NoCertificate))
            }
            _ => Err(LinkError::ProtocolViolation("no welcome after the handshake".to_owned())),
        }
    }
}

pub(crate) const TURNED_AWAY_BUSY: u8 = 1;
pub(crate) const TURNED_AWAY_NO_CERTIFICATE: u8 = 2;

/// A socket to `address`, trying every address its name stands for.
pub(crate) async fn dial(address: &str) -> Result<TcpStream, LinkError> {
    TcpStream::connect(address).await.map_err(|source| LinkError::from_connect(address, source))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use world::{RealFiles, SystemClock, SystemEntropy};

    use super::*;
    use crate::frame::FrameLink;
    use crate::limits::RESERVED_KIND_FIRST;
    use crate::{Authority, Listener, Reception};

    /// What the server makes of `plain`, sent by an authenticated peer after the welcome.
    fn answer_to(plain: &[u8]) -> LinkError {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let files = Arc::new(RealFiles::new(folder.path()));
        let authority = Authority::open(files, clock.clone(), Arc::new(SystemEntropy), "authority").expect("opens");
        let server = authority.own_identity(Role::ProcessServer).expect("an identity");
        let client = authority.own_identity(Role::MasterTarget).expect("an identity");
        let runtime = LinkRuntime::new(1).expect("threads");
        let reception = Reception::new(server, authority.trust(), None, clock.clone());
        let listener = Listener::bind(&runtime, "127.0.0.1:0", reception).expect("listens");
        let connector = Connector::new(runtime.clone(), client, authority.trust(), clock);
        let expected = Expected { role: Role::ProcessServer, id: None };
        let (socket, _) = runtime.block_on(async {
            let stream = dial(&listener.address().to_string()).await.expect("connects");
            connector.greet(stream, &expected).await.expect("welcome")
        });
        runtime.block_on(socket.send_raw(plain)).expect("sends");
        let (_, connection) = listener.accept(Duration::from_secs(10)).expect("listening").expect("accepted");
        let end = connection.recv(Duration::from_secs(10)).expect_err("the link ends");
        assert!(matches!(runtime.block_on(socket.receive()), Err(LinkError::PeerClosed)), "the peer is told");
        end
    }

    #[test]
    fn an_oversized_frame_ends_the_link_before_its_body_is_held() {
        let error = answer_to(&[0xff, 0xff, 0xff, 0xff, 1]);
        assert!(matches!(error, LinkError::FrameTooLarge { len: 0xffff_ffff, .. }), "{error:?}");
        let one_too_many = (crate::limits::FRAME_BYTES_MAX as u32 + 1).to_le_bytes();
        let error = answer_to(&[&one_too_many[..], &[1]].concat());
        assert!(matches!(error, LinkError::FrameTooLarge { len: 8_388_609, .. }), "{error:?}");
    }

    #[test]
    fn a_frame_of_the_links_own_kinds_ends_the_link() {
        let error = answer_to(&[0, 0, 0, 0, RESERVED_KIND_FIRST + 9]);
        assert!(matches!(error, LinkError::ProtocolViolation(_)), "{error:?}");
    }
}
