//! The byte stream of one connection: a socket, plain or under TLS, and the buffer of what was received ahead.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::limits;

/// A connected stream socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.set_read_timeout(timeout),
            Socket::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    pub(crate) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Socket::Unix(stream) => stream.set_write_timeout(timeout),
            Socket::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Socket> {
        Ok(match self {
            Socket::Unix(stream) => Socket::Unix(stream.try_clone()?),
            Socket::Tcp(stream) => Socket::Tcp(stream.try_clone()?),
        })
    }

    /// Ends one or both directions. An already closed peer is no failure.
    pub(crate) fn shutdown(&self, how: Shutdown) {
        let result = match self {
            Socket::Unix(stream) => stream.shutdown(how),
            Socket::Tcp(stream) => stream.shutdown(how),
        };
        if let Err(error) = result {
            tracing::trace!(%error, "the peer was gone before the socket was shut down");
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).read(buffer),
            Socket::Tcp(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).write(bytes),
            Socket::Tcp(stream) => (&*stream).write(bytes),
        }
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).write_vectored(pieces),
            Socket::Tcp(stream) => (&*stream).write_vectored(pieces),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&mut &*self).read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&mut &*self).write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        (&mut &*self).write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection's stream. A plain one may be received from and sent to at the same time by different threads; one
/// under TLS is for a single thread, because receiving holds its state while it waits.
pub(crate) enum Channel {
    Plain(Socket),
    Tls(Mutex<Box<StreamOwned<ServerConnection, Socket>>>),
}

impl Channel {
    /// Makes a TLS channel of a plain one, as its server.
    pub(crate) fn encrypt(self, config: Arc<ServerConfig>, deadline: Instant) -> io::Result<Channel> {
        let Channel::Plain(mut socket) = self else {
            return Err(io::Error::other("the connection is encrypted already"));
        };
        let mut connection = ServerConnection::new(config).map_err(io::Error::other)?;
        while connection.is_handshaking() {
            if connection.wants_write() {
                connection.write_tls(&mut socket)?;
                continue;
            }
            socket.set_read_timeout(Some(remaining(deadline)?))?;
            if connection.read_tls(&mut socket)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Err(error) = connection.process_new_packets() {
                // The alert tells the client what was wrong; that it may not arrive changes nothing.
                drop(connection.write_tls(&mut socket));
                return Err(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
        while connection.wants_write() {
            connection.write_tls(&mut socket)?;
        }
        Ok(Channel::Tls(Mutex::new(Box::new(StreamOwned::new(connection, socket)))))
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        matches!(self, Channel::Tls(_))
    }

    pub(crate) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.with_socket(|socket| socket.set_read_timeout(timeout))
    }

    pub(crate) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.with_socket(|socket| socket.set_write_timeout(timeout))
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        self.with_socket(|socket| socket.shutdown(how));
    }

    /// Says goodbye so that replies already sent arrive: closing a socket with unread bytes would reset it.
    pub(crate) fn close(&self) {
        if let Channel::Tls(stream) = self {
            let mut stream = stream.lock().expect("a TLS stream is used by one thread");
            stream.conn.send_close_notify();
            drop(stream.flush());
        }
        self.with_socket(|socket| {
            socket.shutdown(Shutdown::Write);
            let mut unread = [0; 4096];
            if socket.set_read_timeout(Some(Duration::from_millis(50))).is_ok() {
                for _ in 0..64 {
                    if !matches!((&mut &*socket).read(&mut unread), Ok(1..)) {
                        break;
                    }
                }
            }
            socket.shutdown(Shutdown::Both);
        });
    }

    /// Receives at least one byte, or none if the peer ended the stream.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Channel::Plain(socket) => (&mut &*socket).read(buffer),
                Channel::Tls(stream) => stream.lock().expect("a TLS stream is used by one thread").read(buffer),
            };
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Sends all `pieces`. Two threads that send at once must exclude each other.
    pub(crate) fn send(&self, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
        while !pieces.is_empty() {
            let batch = &pieces[..pieces.len().min(limits::SEND_PIECES_MAX)];
            let result = match self {
                Channel::Plain(socket) => (&mut &*socket).write_vectored(batch),
                Channel::Tls(stream) => {
                    let mut stream = stream.lock().expect("a TLS stream is used by one thread");
                    stream.write_vectored(batch).and_then(|sent| stream.flush().map(|()| sent))
                }
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut pieces, sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn with_socket<T>(&self, action: impl FnOnce(&Socket) -> T) -> T {
        match self {
            Channel::Plain(socket) => action(socket),
            Channel::Tls(stream) => action(&stream.lock().expect("a TLS stream is used by one thread").sock),
        }
    }
}

fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// Bytes received ahead of their use.
pub(crate) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(crate) fn new() -> Inbox {
        Inbox { bytes: vec![0; limits::INBOX_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What was received and not consumed.
    pub(crate) fn available(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        assert!(bytes <= self.end - self.start, "only what was received can be consumed");
        self.start += bytes;
    }

    /// Receives until `wanted` bytes are available; `false` if the peer ended the stream before the first of them.
    pub(crate) fn fill(&mut self, channel: &Channel, wanted: usize, deadline: Option<Instant>) -> io::Result<bool> {
        assert!(wanted <= self.bytes.len(), "callers ask for headers and small payloads");
        while self.end - self.start < wanted {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.bytes.len() - self.start < wanted {
                self.bytes.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            if let Some(deadline) = deadline {
                channel.set_read_timeout(Some(remaining(deadline)?))?;
            }
            match channel.receive(&mut self.bytes[self.end..])? {
                0 if self.start == self.end => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        Ok(true)
    }

    /// Receives the next `N` bytes; `None` if the peer ended the stream before them.
    pub(crate) fn take<const N: usize>(
        &mut self,
        channel: &Channel,
        deadline: Option<Instant>,
    ) -> io::Result<Option<[u8; N]>> {
        if !self.fill(channel, N, deadline)? {
            return Ok(None);
        }
        let taken = *self.available().first_chunk::<N>().expect("just received");
        self.consume(N);
        Ok(Some(taken))
    }

    /// Receives exactly the bytes that `into` holds.
    pub(crate) fn read_exact(&mut self, channel: &Channel, into: &mut [u8]) -> io::Result<()> {
        let ahead = into.len().min(self.end - self.start);
        into[..ahead].copy_from_slice(&self.available()[..ahead]);
        self.consume(ahead);
        let mut done = ahead;
        while done < into.len() {
            match channel.receive(&mut into[done..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => done += received,
            }
        }
        Ok(())
    }

    /// Receives and forgets `bytes` bytes.
    pub(crate) fn skip(&mut self, channel: &Channel, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            if self.available().is_empty() && !self.fill(channel, 1, None)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let piece = bytes.min(self.available().len() as u64);
            self.consume(piece as usize);
            bytes -= piece;
        }
        Ok(())
    }
}
