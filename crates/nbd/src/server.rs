//! The NBD server: listeners, one thread per connection, an orderly end.
//!
//! A crash leaves behind a unix socket's name; the next start takes it over if nobody listens on it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustls::ServerConfig;

use crate::channel::{Channel, Inbox, Socket};
use crate::export::Exports;
use crate::limits;
use crate::memory::Memory;
use crate::negotiation::{Agreed, Encryption, Negotiation, Next, OPTION_HEADER_BYTES, decode_option, greeting};
use crate::transmission::transmit;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A unix socket at this path, for this user only.
    Unix(PathBuf),
    /// A TCP port; port 0 is one that the system chooses. Without TLS only a loopback address is accepted.
    Tcp(SocketAddr),
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Someone listens there already.
    #[error("another server listens on {}", path.display())]
    InUse {
        /// The socket's path.
        path: PathBuf,
    },
    /// The path names something that is not a socket. It is left alone.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Disks would cross a network in the clear.
    #[error("{address} is not a loopback address, and without TLS nothing else is served")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The system refuses.
    #[error("cannot listen on {place}")]
    Refused {
        /// The path or address.
        place: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How a server behaves.
#[derive(Clone)]
pub struct ServerOptions {
    /// Connections at a time; further ones are closed at once.
    pub connections_max: usize,
    /// Threads that one connection may use besides its own.
    pub workers_per_connection: usize,
    /// Bytes of large requests and replies in flight, over all connections.
    pub in_flight_bytes_max: usize,
    /// If set, TCP clients must begin TLS before anything is told to them. A request of such a connection waits for
    /// the one before it.
    pub tls: Option<Arc<ServerConfig>>,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            connections_max: limits::CONNECTIONS_MAX,
            workers_per_connection: limits::WORKERS_PER_CONNECTION,
            in_flight_bytes_max: limits::SERVER_IN_FLIGHT_BYTES_MAX,
            tls: None,
        }
    }
}

/// Starts servers.
pub struct Server;

impl Server {
    /// Listens on every place in `listen` and serves `exports` until the handle is stopped or dropped.
    ///
    /// # Errors
    /// [`ServeError`] names the place; nothing is served then.
    pub fn start(
        exports: Arc<dyn Exports>,
        options: ServerOptions,
        listen: &[Listen],
    ) -> Result<ServerHandle, ServeError> {
        let shared = Arc::new(Shared {
            exports,
            memory: Memory::new(options.in_flight_bytes_max),
            options,
            stopping: AtomicBool::new(false),
            connections: Mutex::new(Connections::default()),
            ended: Condvar::new(),
        });
        let mut handle = ServerHandle { shared, listeners: Vec::new() };
        for place in listen {
            let listener = match place {
                Listen::Unix(path) => listen_unix(path)?,
                Listen::Tcp(address) => listen_tcp(*address, handle.shared.options.tls.is_some())?,
            };
            handle.accept_on(listener)?;
        }
        Ok(handle)
    }
}

/// A running server. Dropping it stops it.
pub struct ServerHandle {
    shared: Arc<Shared>,
    listeners: Vec<Running>,
}

struct Running {
    listener: Arc<Listener>,
    thread: JoinHandle<()>,
}

enum Listener {
    Unix { listener: UnixListener, path: PathBuf, inode: u64 },
    Tcp { listener: TcpListener, address: SocketAddr },
}

struct Shared {
    exports: Arc<dyn Exports>,
    options: ServerOptions,
    memory: Arc<Memory>,
    /// Set under the lock of `connections`, so that no connection begins after it.
    stopping: AtomicBool,
    connections: Mutex<Connections>,
    ended: Condvar,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: HashMap<u64, Socket>,
}

impl ServerHandle {
    /// The TCP addresses listened on, with the ports that the system chose.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        self.listeners
            .iter()
            .filter_map(|running| match running.listener.as_ref() {
                Listener::Tcp { address, .. } => Some(*address),
                Listener::Unix { .. } => None,
            })
            .collect()
    }

    /// Connections open now.
    pub fn connections(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// Serves a client that is already connected, for instance over a socket pair.
    ///
    /// # Errors
    /// If the server is stopping, is full, or the system gives no thread.
    pub fn attach(&self, stream: UnixStream) -> io::Result<()> {
        Shared::begin(&self.shared, Socket::Unix(stream))
    }

    /// Takes no more connections and requests, finishes those in flight, sends their replies and closes. Clients
    /// that do not take their replies are cut off after [`limits::STOP_GRACE`]. When it returns, no thread of the
    /// server uses an export any more. A device that never answers keeps it waiting.
    pub fn stop(mut self) {
        self.end();
    }

    fn accept_on(&mut self, listener: Listener) -> Result<(), ServeError> {
        let listener = Arc::new(listener);
        let shared = Arc::clone(&self.shared);
        let accepting = Arc::clone(&listener);
        let thread = thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accept(&shared, &accepting))
            .map_err(|source| ServeError::Refused { place: listener.place(), source })?;
        self.listeners.push(Running { listener, thread });
        Ok(())
    }

    fn end(&mut self) {
        {
            let connections = self.shared.lock();
            self.shared.stopping.store(true, Ordering::SeqCst);
            for socket in connections.open.values() {
                socket.shutdown(Shutdown::Read);
            }
        }
        for running in self.listeners.drain(..) {
            running.listener.close();
            if running.thread.join().is_err() {
                tracing::error!("the thread that accepts NBD connections panicked");
            }
        }
        let deadline = Instant::now() + limits::STOP_GRACE;
        let mut connections = self.shared.lock();
        while !connections.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(clients = connections.open.len(), "NBD clients did not take their replies, cut off");
                for socket in connections.open.values() {
                    socket.shutdown(Shutdown::Both);
                }
                drop(
                    self.shared
                        .ended
                        .wait_while(connections, |connections| !connections.open.is_empty())
                        .expect("nothing panics while holding the connections"),
                );
                return;
            }
            connections = self
                .shared
                .ended
                .wait_timeout(connections, left)
                .expect("nothing panics while holding the connections")
                .0;
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

impl Listener {
    fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix { listener, .. } => Ok(Socket::Unix(listener.accept()?.0)),
            Listener::Tcp { listener, .. } => {
                let stream = listener.accept()?.0;
                stream.set_nodelay(true)?;
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }

    fn place(&self) -> String {
        match self {
            Listener::Unix { path, .. } => path.display().to_string(),
            Listener::Tcp { address, .. } => address.to_string(),
        }
    }

    /// Wakes the accepting thread and takes the name away.
    fn close(&self) {
        let descriptor = match self {
            Listener::Unix { listener, .. } => listener.as_fd(),
            Listener::Tcp { listener, .. } => listener.as_fd(),
        };
        if let Err(error) = rustix::net::shutdown(descriptor, rustix::net::Shutdown::Both) {
            tracing::debug!(%error, "a listener was closed before");
        }
        if let Listener::Unix { path, inode, .. } = self
            && fs::symlink_metadata(path).is_ok_and(|metadata| metadata.ino() == *inode)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(%error, path = %path.display(), "the socket's name could not be removed");
        }
    }
}

fn listen_unix(path: &Path) -> Result<Listener, ServeError> {
    let refused = |source| ServeError::Refused { place: path.display().to_string(), source };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServeError::NotASocket { path: path.to_owned() });
        }
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(ServeError::InUse { path: path.to_owned() }),
        // Left behind by a server that was killed.
        Ok(_) => fs::remove_file(path).map_err(refused)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(refused(error)),
    }
    let listener = UnixListener::bind(path).map_err(refused)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(refused)?;
    let inode = fs::symlink_metadata(path).map_err(refused)?.ino();
    Ok(Listener::Unix { listener, path: path.to_owned(), inode })
}

fn listen_tcp(address: SocketAddr, encrypted: bool) -> Result<Listener, ServeError> {
    if !encrypted && !address.ip().is_loopback() {
        return Err(ServeError::NotLoopback { address });
    }
    let refused = |source| ServeError::Refused { place: address.to_string(), source };
    let listener = TcpListener::bind(address).map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    Ok(Listener::Tcp { listener, address })
}

fn accept(shared: &Arc<Shared>, listener: &Listener) {
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        match accepted.and_then(|socket| Shared::begin(shared, socket)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, place = listener.place(), "a client could not be served");
                // Out of descriptors or threads, most likely: accepting at once again would only burn time.
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().expect("nothing panics while holding the connections")
    }

    fn begin(shared: &Arc<Shared>, socket: Socket) -> io::Result<()> {
        let remembered = socket.try_clone()?;
        let number = {
            let mut connections = shared.lock();
            if shared.stopping.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "the server is stopping"));
            }
            if connections.open.len() >= shared.options.connections_max {
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "too many connections"));
            }
            connections.next += 1;
            let number = connections.next;
            connections.open.insert(number, remembered);
            number
        };
        // Dropped with the closure if the thread cannot be started.
        let registered = Registered { shared: Arc::clone(shared), number };
        thread::Builder::new().name("nbd".to_owned()).spawn(move || {
            let registered = registered;
            let span = tracing::info_span!("nbd", connection = registered.number);
            let _entered = span.enter();
            if let Err(error) = registered.shared.serve(socket) {
                tracing::debug!(%error, "an NBD connection ended early");
            }
        })?;
        Ok(())
    }

    fn serve(&self, socket: Socket) -> io::Result<()> {
        let encryption = match (&socket, &self.options.tls) {
            // The file system decides who reaches a unix socket.
            (Socket::Unix(_), _) | (_, None) => Encryption::Unavailable,
            (Socket::Tcp(_), Some(_)) => Encryption::Required,
        };
        let deadline = Instant::now() + limits::HANDSHAKE_TIMEOUT;
        socket.set_write_timeout(Some(limits::HANDSHAKE_TIMEOUT))?;
        let Some((channel, inbox, agreed)) = self.negotiate(Channel::Plain(socket), encryption, deadline)? else {
            return Ok(());
        };
        channel.set_read_timeout(None)?;
        channel.set_write_timeout(Some(limits::STALL_MAX))?;
        tracing::debug!(export = agreed.name, terms = ?agreed.terms, "an NBD client uses an export");
        let result =
            transmit(&channel, inbox, &agreed, self.options.workers_per_connection, &self.memory, &self.stopping);
        channel.close();
        result
    }

    /// The handshake; `None` if the client left in good order.
    fn negotiate(
        &self,
        mut channel: Channel,
        encryption: Encryption,
        deadline: Instant,
    ) -> io::Result<Option<(Channel, Inbox, Agreed)>> {
        let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let mut inbox = Inbox::new();
        channel.send(&mut [io::IoSlice::new(&greeting())])?;
        let Some(flags) = inbox.take::<4>(&channel, Some(deadline))? else {
            return Ok(None);
        };
        let mut negotiation =
            Negotiation::new(self.exports.as_ref(), encryption, u32::from_be_bytes(flags)).map_err(malformed)?;
        for _ in 0..limits::OPTIONS_MAX {
            let Some(header) = inbox.take::<OPTION_HEADER_BYTES>(&channel, Some(deadline))? else {
                return Ok(None);
            };
            let (option, length) = decode_option(header).map_err(malformed)?;
            let length = length as usize;
            if length > 0 && !inbox.fill(&channel, length, Some(deadline))? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut reply = Vec::new();
            let next = negotiation.option(option, &inbox.available()[..length], &mut reply);
            inbox.consume(length);
            if !reply.is_empty() {
                channel.send(&mut [io::IoSlice::new(&reply)])?;
            }
            match next {
                Next::Option => {}
                Next::Close => {
                    channel.close();
                    return Ok(None);
                }
                Next::Transmission(agreed) => return Ok(Some((channel, inbox, *agreed))),
                Next::StartTls => {
                    // Bytes sent before the encryption would be taken for encrypted ones afterwards.
                    if !inbox.available().is_empty() {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client sent data ahead of TLS"));
                    }
                    let config = self.options.tls.clone().expect("TLS is offered only with a configuration");
                    channel = channel.encrypt(config, deadline)?;
                    negotiation.encrypted();
                }
            }
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "the client sends options without end"))
    }
}

/// A connection's place in the table of open ones, given back when its thread ends in whatever way.
struct Registered {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let socket = self.shared.lock().open.remove(&self.number);
        // A panic leaves the channel unclosed, and this descriptor would keep the client waiting.
        if let Some(socket) = socket {
            socket.shutdown(Shutdown::Both);
        }
        self.shared.ended.notify_all();
    }
}
