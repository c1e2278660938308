//! The port on which a server takes replication connections and joins.
//!
//! Every socket is a stranger until its handshake is done: strangers are limited in number, time and bytes, and none
//! of their mistakes reaches anybody but the log.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use world::Clock;

use crate::connection::Connection;
use crate::connector::{LinkRuntime, TURNED_AWAY_BUSY, TURNED_AWAY_NO_CERTIFICATE};
use crate::driver::{self, KIND_TURNED_AWAY, KIND_WELCOME, Shared};
use crate::error::LinkError;
use crate::frame::Frame;
use crate::identity::{LinkIdentity, PeerIdentity};
use crate::join::{self, Admission, JOIN_FRAME_MAX};
use crate::limits::{ACCEPT_QUEUE_MAX, HANDSHAKE_TIMEOUT, HANDSHAKES_MAX, JOIN_TIMEOUT};
use crate::queue::{Capacity, Popped, Queue};
use crate::renew;
use crate::session::{TlsSocket, within};
use crate::tls::{self, ALPN_JOIN, ALPN_RENEW, ALPN_REPLICATION, Joins};
use crate::trust::{ClockHandle, Trust, identity_of_der};

/// How long to wait after the system refused to accept, which happens when files or memory run out.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Who a server is and whom it lets in.
pub struct Reception {
    /// The server's own identity.
    pub identity: LinkIdentity,
    /// Which peers it trusts.
    pub trust: Trust,
    /// Who decides on joins; `None` takes none.
    pub admission: Option<Arc<dyn Admission>>,
    /// Judges validity.
    pub clock: Arc<dyn Clock>,
    /// Time from accepting a socket to an authenticated peer, normally [`HANDSHAKE_TIMEOUT`].
    pub handshake_timeout: Duration,
}

impl Reception {
    /// A reception with the standard time-out.
    pub fn new(
        identity: LinkIdentity,
        trust: Trust,
        admission: Option<Arc<dyn Admission>>,
        clock: Arc<dyn Clock>,
    ) -> Reception {
        Reception { identity, trust, admission, clock, handshake_timeout: HANDSHAKE_TIMEOUT }
    }
}

/// A listening port. Dropping it closes the port and turns away who waits; accepted connections go on.
pub struct Listener {
    hall: Arc<Hall>,
    address: SocketAddr,
    task: JoinHandle<()>,
    runtime: LinkRuntime,
}

/// Where strangers become peers.
struct Hall {
    config: RwLock<Arc<ServerConfig>>,
    joins: Joins,
    clock: ClockHandle,
    trust: Trust,
    admission: Option<Arc<dyn Admission>>,
    accepted: Queue<Arc<Shared>>,
    strangers: AtomicUsize,
    runtime: tokio::runtime::Handle,
    handshake_timeout: Duration,
}

impl Listener {
    /// Listens on `address` (`host:port`; port 0 lets the system choose).
    ///
    /// # Errors
    /// [`LinkError::CannotListen`].
    pub fn bind(runtime: &LinkRuntime, address: &str, reception: Reception) -> Result<Listener, LinkError> {
        let joins = if reception.admission.is_some() { Joins::Taken } else { Joins::NotTaken };
        let clock = ClockHandle(reception.clock);
        let config = tls::server_config(&reception.identity, &reception.trust, clock.clone(), joins)?;
        let cannot = |source| LinkError::CannotListen { address: address.to_owned(), source: Arc::new(source) };
        let socket = runtime.block_on(TcpListener::bind(address)).map_err(cannot)?;
        let local = socket.local_addr().map_err(cannot)?;
        let _inside = runtime.enter();
        let hall = Arc::new(Hall {
            config: RwLock::new(config),
            joins,
            clock,
            trust: reception.trust,
            admission: reception.admission,
            accepted: Queue::new(Capacity { items: ACCEPT_QUEUE_MAX, weight: usize::MAX }),
            strangers: AtomicUsize::new(0),
            runtime: tokio::runtime::Handle::current(),
            handshake_timeout: reception.handshake_timeout,
        });
        let task = runtime.spawn(hall.clone().receive_strangers(socket));
        Ok(Listener { hall, address: local, task, runtime: runtime.clone() })
    }

    /// Shows `identity` to whoever connects from now on.
    ///
    /// # Errors
    /// Its certificate cannot be used; nothing has changed.
    pub fn set_identity(&self, identity: &LinkIdentity) -> Result<(), LinkError> {
        let config = tls::server_config(identity, &self.hall.trust, self.hall.clock.clone(), self.hall.joins)?;
        *self.hall.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next authenticated peer; `None` if none came within `timeout`.
    ///
    /// # Errors
    /// [`LinkError::Closed`] if the runtime ended.
    pub fn accept(&self, timeout: Duration) -> Result<Option<(PeerIdentity, Connection)>, LinkError> {
        match self.hall.accepted.pop_blocking(timeout) {
            Popped::Item(shared) => Ok(Some((shared.peer, Connection::new(shared, self.runtime.clone())))),
            Popped::Nothing => Ok(None),
            Popped::Closed => Err(LinkError::Closed),
        }
    }

    /// How many sockets have not proved who they are yet.
    pub fn strangers(&self) -> usize {
        self.hall.strangers.load(Ordering::Acquire)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
        self.hall.accepted.close();
        while let Popped::Item(shared) = self.hall.accepted.try_pop() {
            shared.abort();
        }
    }
}

impl Hall {
    async fn receive_strangers(self: Arc<Hall>, socket: TcpListener) {
        let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
        // Dropping the set with this task ends every handshake under way.
        let mut strangers = JoinSet::new();
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match socket.accept().await {
                Ok((stream, address)) => {
                    let guest = Stranger::enter(self.clone());
                    strangers.spawn(async move {
                        if let Err(error) = guest.0.receive(stream).await {
                            tracing::warn!(%address, %error, "a connection was not accepted");
                        }
                        drop((guest, place));
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the system does not accept connections at the moment");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
            while strangers.try_join_next().is_some() {}
        }
    }

    async fn receive(&self, stream: TcpStream) -> Result<(), LinkError> {
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        let socket = TlsSocket::new(stream, tls::server(config)?, JOIN_FRAME_MAX);
        within("the TLS handshake", self.handshake_timeout, socket.handshake()).await?;
        match (socket.protocol().as_deref(), &self.admission) {
            (Some(ALPN_REPLICATION), _) => self.receive_peer(socket).await,
            (Some(ALPN_JOIN), Some(admission)) => {
                within("the join", JOIN_TIMEOUT, join::serve(&socket, admission.clone())).await
            }
            (Some(ALPN_RENEW), Some(admission)) => {
                within("the renewal", JOIN_TIMEOUT, renew::serve(&socket, admission.clone())).await
            }
            _ => Err(LinkError::ProtocolViolation("it chose no protocol".to_owned())),
        }
    }

    async fn receive_peer(&self, socket: TlsSocket) -> Result<(), LinkError> {
        let Some(certificate) = socket.peer_certificate() else {
            self.turn_away(&socket, TURNED_AWAY_NO_CERTIFICATE).await;
            return Err(LinkError::BadCertificate("it showed none".to_owned()));
        };
        let peer = identity_of_der(&certificate)
            .ok_or_else(|| LinkError::BadCertificate("it names no identity".to_owned()))?;
        if !self.accepted.has_room() {
            self.turn_away(&socket, TURNED_AWAY_BUSY).await;
            tracing::warn!(%peer, "turned away: too many connections wait to be accepted");
            return Ok(());
        }
        let welcome = socket.send(Frame::new(KIND_WELCOME, ""));
        within("the welcome", self.handshake_timeout, welcome).await?;
        let runtime = LinkRuntime::from_handle(self.runtime.clone());
        let shared = driver::start(&runtime, socket, peer, self.trust.clone());
        if self.accepted.try_push(shared.clone(), 0).is_err() {
            shared.abort();
        }
        Ok(())
    }

    async fn turn_away(&self, socket: &TlsSocket, reason: u8) {
        let refusal = socket.send(Frame::new(KIND_TURNED_AWAY, vec![reason]));
        if within("turning away", self.handshake_timeout, refusal).await.is_ok() {
            socket.farewell().await;
        }
    }
}

/// Counts a stranger while it exists, however its task ends.
struct Stranger(Arc<Hall>);

impl Stranger {
    fn enter(hall: Arc<Hall>) -> Stranger {
        hall.strangers.fetch_add(1, Ordering::AcqRel);
        Stranger(hall)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.strangers.fetch_sub(1, Ordering::AcqRel);
    }
}
