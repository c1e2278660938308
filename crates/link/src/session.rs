//! TLS over one socket, in large strides.
//!
//! The TLS library's unbuffered interface is used, because its buffered one reads 4 KiB at a time and copies once
//! more: here the socket is read and written in strides of 256 KiB and records are decrypted where they arrived.
//! One lock guards the session and both buffers; it is held for one stride of work and never across an await, so
//! every method is cancel safe: bytes not yet written stay in the outbox.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use rustls::CommonState;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use tokio::net::TcpStream;

use crate::error::LinkError;
use crate::frame::{Assembler, Frame, HEADER_BYTES};
use crate::limits::{COALESCE_BYTES, FAREWELL_TIMEOUT, HANDSHAKE_BYTES_MAX, READ_BYTES, STAGE_BYTES, WRITE_BYTES};

/// Room in the outbox besides one stride: record headers and tags (22 bytes in 16 KiB), handshake messages, alerts.
const OUTBOX_SLACK: usize = 16 * 1024;
/// A read is worth a system call only with at least this much room, which also holds any TLS record.
const READ_ROOM_MIN: usize = 32 * 1024;

/// The library's state of one connection.
pub(crate) struct Session(Kind);

enum Kind {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl Session {
    pub(crate) fn client(connection: UnbufferedClientConnection) -> Session {
        Session(Kind::Client(Box::new(connection)))
    }

    pub(crate) fn server(connection: UnbufferedServerConnection) -> Session {
        Session(Kind::Server(Box::new(connection)))
    }

    fn common(&self) -> &CommonState {
        match &self.0 {
            Kind::Client(connection) => connection,
            Kind::Server(connection) => connection,
        }
    }

    /// One step of the library, with what it yields put where it belongs. Returns how many bytes of `incoming` are
    /// used up.
    fn step(&mut self, incoming: &mut [u8], job: Job<'_>, side: &mut Buffers) -> (usize, Result<Step, LinkError>) {
        match &mut self.0 {
            Kind::Client(connection) => settle(connection.process_tls_records(incoming), job, side),
            Kind::Server(connection) => settle(connection.process_tls_records(incoming), job, side),
        }
    }
}

/// What is to be done once the library has nothing more urgent.
#[derive(Clone, Copy)]
enum Job<'a> {
    Read,
    Encrypt(&'a [u8]),
    CloseNotify,
}

/// What a step gave.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Something else came first; step again.
    Again,
    /// The job is done; of `Read`: everything that arrived was used.
    Done,
    /// The handshake waits for bytes.
    Blocked,
    /// Both sides have closed.
    Closed,
}

/// What the library writes into.
struct Buffers {
    outbox: Vec<u8>,
    filled: usize,
    sent: usize,
    assembler: Assembler,
    ready: VecDeque<Frame>,
    peer_closed: bool,
}

impl Buffers {
    /// Lets `write` fill the outbox's free end, enlarging it when told how much is missing.
    fn extend(&mut self, mut write: impl FnMut(&mut [u8]) -> Result<usize, Missing>) -> Result<(), LinkError> {
        loop {
            match write(&mut self.outbox[self.filled..]) {
                Ok(written) => {
                    self.filled += written;
                    return Ok(());
                }
                Err(Missing::Room(bytes)) => self.outbox.resize(self.filled + bytes + OUTBOX_SLACK, 0),
                Err(Missing::Keys) => return Err(LinkError::ProtocolViolation("the keys are used up".to_owned())),
            }
        }
    }
}

enum Missing {
    Room(usize),
    Keys,
}

impl From<EncryptError> for Missing {
    fn from(error: EncryptError) -> Missing {
        match error {
            EncryptError::InsufficientSize(size) => Missing::Room(size.required_size),
            EncryptError::EncryptExhausted => Missing::Keys,
        }
    }
}

fn settle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    job: Job<'_>,
    side: &mut Buffers,
) -> (usize, Result<Step, LinkError>) {
    let mut used = status.discard;
    let state = match status.state {
        Ok(state) => state,
        Err(error) => return (used, Err(error.into())),
    };
    let step = match state {
        ConnectionState::ReadTraffic(mut traffic) => loop {
            match traffic.next_record() {
                None => break Ok(Step::Again),
                Some(Err(error)) => break Err(error.into()),
                Some(Ok(record)) => {
                    used += record.discard;
                    if let Err(error) = side.assembler.push(record.payload, &mut side.ready) {
                        break Err(error);
                    }
                }
            }
        },
        ConnectionState::EncodeTlsData(mut data) => side
            .extend(|room| match data.encode(room) {
                Ok(written) => Ok(written),
                Err(EncodeError::InsufficientSize(size)) => Err(Missing::Room(size.required_size)),
                Err(EncodeError::AlreadyEncoded) => Ok(0),
            })
            .map(|()| Step::Again),
        // What stands in the outbox leaves in order, and before anything encrypted later.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Step::Again)
        }
        ConnectionState::PeerClosed => {
            side.peer_closed = true;
            Ok(Step::Again)
        }
        ConnectionState::Closed => Ok(Step::Closed),
        ConnectionState::BlockedHandshake => Ok(Step::Blocked),
        ConnectionState::WriteTraffic(mut traffic) => match job {
            Job::Read => Ok(Step::Done),
            Job::Encrypt(plain) => {
                side.extend(|room| traffic.encrypt(plain, room).map_err(Missing::from)).map(|()| Step::Done)
            }
            Job::CloseNotify => {
                side.extend(|room| traffic.queue_close_notify(room).map_err(Missing::from)).map(|()| Step::Done)
            }
        },
        _ => Err(LinkError::ProtocolViolation("early data, which was not offered".to_owned())),
    };
    (used, step)
}

/// The frame that is being sent, cut to what one stride takes.
struct Sending {
    header: Option<[u8; HEADER_BYTES]>,
    parts: VecDeque<Bytes>,
}

struct Core {
    session: Session,
    inbox: Vec<u8>,
    start: usize,
    end: usize,
    side: Buffers,
    sending: Option<Sending>,
    stage: Vec<u8>,
}

impl Core {
    /// Uses everything that arrived.
    fn advance(&mut self) -> Result<(), LinkError> {
        self.run(Job::Read).map(|_| ())
    }

    fn run(&mut self, job: Job<'_>) -> Result<Step, LinkError> {
        loop {
            let incoming = &mut self.inbox[self.start..self.end];
            let (used, step) = self.session.step(incoming, job, &mut self.side);
            self.start += used;
            match step? {
                Step::Again => {}
                step => return Ok(step),
            }
        }
    }

    fn encrypt(&mut self, plain: &[u8]) -> Result<(), LinkError> {
        match self.run(Job::Encrypt(plain))? {
            Step::Done => Ok(()),
            _ => Err(LinkError::Closed),
        }
    }

    fn encrypt_stage(&mut self) -> Result<(), LinkError> {
        if self.stage.is_empty() {
            return Ok(());
        }
        let mut stage = std::mem::take(&mut self.stage);
        let done = self.encrypt(&stage);
        stage.clear();
        self.stage = stage;
        done
    }

    /// Encrypts up to one stride from the frames that `next` gives.
    fn encrypt_stride(&mut self, mut next: impl FnMut() -> Option<Frame>) -> Result<(), LinkError> {
        let mut budget = WRITE_BYTES;
        while budget > 0 {
            let Some(mut sending) = self
                .sending
                .take()
                .or_else(|| next().map(|frame| Sending { header: Some(frame.header()), parts: frame.into_parts() }))
            else {
                break;
            };
            if let Some(header) = sending.header.take() {
                self.stage.extend_from_slice(&header);
                budget = budget.saturating_sub(HEADER_BYTES);
            }
            while budget > 0
                && let Some(mut part) = sending.parts.pop_front()
            {
                let taken = part.split_to(part.len().min(budget));
                budget -= taken.len();
                if taken.len() < COALESCE_BYTES {
                    self.stage.extend_from_slice(&taken);
                    if self.stage.len() >= STAGE_BYTES {
                        self.encrypt_stage()?;
                    }
                } else {
                    self.encrypt_stage()?;
                    self.encrypt(&taken)?;
                }
                if part.has_remaining() {
                    sending.parts.push_front(part);
                }
            }
            if !sending.parts.is_empty() {
                self.sending = Some(sending);
            }
        }
        self.encrypt_stage()
    }
}

/// TLS over one socket, used by the runtime's tasks.
pub(crate) struct TlsSocket {
    stream: TcpStream,
    address: String,
    core: Mutex<Core>,
}

impl TlsSocket {
    /// `stream` before its handshake. Frames larger than `frame_max` will be refused.
    pub(crate) fn new(stream: TcpStream, session: Session, frame_max: usize) -> TlsSocket {
        let address = stream.peer_addr().map_or_else(|_| "a closed socket".to_owned(), |a: SocketAddr| a.to_string());
        // Frames are written in strides; waiting for more would only delay the last one. The sizes of the kernel's
        // buffers are left to its own tuning, which goes beyond what a program may ask for.
        let _ = stream.set_nodelay(true);
        let side = Buffers {
            outbox: vec![0; WRITE_BYTES + OUTBOX_SLACK],
            filled: 0,
            sent: 0,
            assembler: Assembler::new(frame_max),
            ready: VecDeque::new(),
            peer_closed: false,
        };
        let core =
            Core { session, inbox: vec![0; READ_BYTES], start: 0, end: 0, side, sending: None, stage: Vec::new() };
        TlsSocket { stream, address, core: Mutex::new(core) }
    }

    /// Where the peer is.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Does the handshake. On return everything of it was written.
    ///
    /// # Errors
    /// Why it failed; the alert that tells the peer was sent.
    pub(crate) async fn handshake(&self) -> Result<(), LinkError> {
        let result = self.shake_hands().await;
        if result.is_err() {
            self.farewell().await;
        }
        result
    }

    async fn shake_hands(&self) -> Result<(), LinkError> {
        let mut heard = 0;
        loop {
            self.core().advance()?;
            self.flush().await?;
            if !self.core().session.common().is_handshaking() {
                return Ok(());
            }
            if self.peer_closed() {
                return Err(LinkError::PeerClosed);
            }
            heard += self.fill().await?;
            if heard > HANDSHAKE_BYTES_MAX {
                return Err(LinkError::ProtocolViolation("the handshake is too long".to_owned()));
            }
        }
    }

    /// The protocol that the handshake chose.
    pub(crate) fn protocol(&self) -> Option<Vec<u8>> {
        self.core().session.common().alpn_protocol().map(<[u8]>::to_vec)
    }

    /// The certificate that the peer showed and the handshake verified, DER.
    pub(crate) fn peer_certificate(&self) -> Option<Vec<u8>> {
        self.core().session.common().peer_certificates()?.first().map(|certificate| certificate.to_vec())
    }

    /// Another limit for frames that have not begun to arrive.
    pub(crate) fn set_frame_max(&self, frame_max: usize) {
        self.core().side.assembler.set_frame_max(frame_max);
    }

    /// Sends one frame; on return it was given to the kernel. For the exchanges before a connection is handed over.
    pub(crate) async fn send(&self, frame: Frame) -> Result<(), LinkError> {
        let mut frame = Some(frame);
        loop {
            self.encrypt_stride(|| frame.take())?;
            self.flush().await?;
            if frame.is_none() && self.core().sending.is_none() {
                return Ok(());
            }
        }
    }

    /// Sends bytes that need not be a frame, as only a broken peer does.
    #[cfg(test)]
    pub(crate) async fn send_raw(&self, plain: &[u8]) -> Result<(), LinkError> {
        self.core().encrypt(plain)?;
        self.flush().await
    }

    /// The next frame. For the exchanges before a connection is handed over.
    pub(crate) async fn receive(&self) -> Result<Frame, LinkError> {
        loop {
            if let Some(frame) = self.next_ready() {
                return Ok(frame);
            }
            if self.peer_closed() {
                return Err(LinkError::PeerClosed);
            }
            self.fill().await?;
            self.advance()?;
        }
    }

    /// A frame that has arrived in full.
    pub(crate) fn next_ready(&self) -> Option<Frame> {
        self.core().side.ready.pop_front()
    }

    /// Whether the peer said that nothing more comes.
    pub(crate) fn peer_closed(&self) -> bool {
        self.core().side.peer_closed
    }

    /// Whether encrypted bytes wait for the socket.
    pub(crate) fn wants_flush(&self) -> bool {
        let core = self.core();
        core.side.sent < core.side.filled
    }

    /// Decrypts everything that arrived.
    pub(crate) fn advance(&self) -> Result<(), LinkError> {
        self.core().advance()
    }

    /// Encrypts up to one stride of the frame under way and of those that `next` gives.
    pub(crate) fn encrypt_stride(&self, next: impl FnMut() -> Option<Frame>) -> Result<(), LinkError> {
        self.core().encrypt_stride(next)
    }

    /// Whether a frame has begun to be encrypted and has not ended.
    pub(crate) fn is_within_frame(&self) -> bool {
        self.core().sending.is_some()
    }

    /// Reads once from the socket; returns how many bytes came, or `None` if there is nothing now.
    ///
    /// # Errors
    /// [`LinkError::Lost`], also when the peer ended the stream without a farewell.
    pub(crate) fn try_fill(&self) -> Result<Option<usize>, LinkError> {
        let mut core = self.core();
        let core = &mut *core;
        if core.start == core.end {
            (core.start, core.end) = (0, 0);
        } else if core.inbox.len() - core.end < READ_ROOM_MIN {
            core.inbox.copy_within(core.start..core.end, 0);
            (core.start, core.end) = (0, core.end - core.start);
        }
        if core.end == core.inbox.len() {
            return Err(LinkError::ProtocolViolation("a TLS message of more than 256 KiB".to_owned()));
        }
        match self.stream.try_read(&mut core.inbox[core.end..]) {
            Ok(0) => Err(LinkError::lost(io::Error::from(io::ErrorKind::UnexpectedEof))),
            Ok(bytes) => {
                core.end += bytes;
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(LinkError::lost(error)),
        }
    }

    /// Waits until [`TlsSocket::try_fill`] is worth trying.
    pub(crate) async fn readable(&self) -> Result<(), LinkError> {
        self.stream.readable().await.map_err(LinkError::lost)
    }

    async fn fill(&self) -> Result<usize, LinkError> {
        loop {
            if let Some(bytes) = self.try_fill()? {
                return Ok(bytes);
            }
            self.readable().await?;
        }
    }

    /// Gives everything encrypted to the kernel.
    pub(crate) async fn flush(&self) -> Result<(), LinkError> {
        loop {
            {
                let mut core = self.core();
                let side = &mut core.side;
                if side.sent == side.filled {
                    (side.sent, side.filled) = (0, 0);
                    return Ok(());
                }
                match self.stream.try_write(&side.outbox[side.sent..side.filled]) {
                    Ok(bytes) => {
                        side.sent += bytes;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(LinkError::lost(error)),
                }
            }
            self.stream.writable().await.map_err(LinkError::lost)?;
        }
    }

    /// Tells the peer that nothing more comes, after everything encrypted before.
    pub(crate) async fn close_writing(&self) -> Result<(), LinkError> {
        self.core().run(Job::CloseNotify)?;
        self.flush().await?;
        rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write).map_err(|error| LinkError::lost(error.into()))
    }

    /// Best effort at the end of a socket, however it ended: the pending alert or farewell leaves, and what the peer
    /// still sends is read for a moment, since closing a socket with unread bytes would destroy what we sent last.
    pub(crate) async fn farewell(&self) {
        let goodbye = async {
            // After an error the first step yields the alert; nothing can be closed then.
            let _ = self.core().advance();
            let _ = self.flush().await;
            if self.close_writing().await.is_err() {
                let _ = self.flush().await;
                let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write);
            }
            let mut unread = HANDSHAKE_BYTES_MAX;
            let mut scratch = [0; 4096];
            while unread > 0 && self.stream.readable().await.is_ok() {
                match self.stream.try_read(&mut scratch) {
                    Ok(0) => break,
                    Ok(bytes) => unread = unread.saturating_sub(bytes),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => break,
                }
            }
        };
        let _ = tokio::time::timeout(FAREWELL_TIMEOUT, goodbye).await;
    }

    /// Ends the socket. What the kernel holds still leaves.
    pub(crate) fn hang_up(&self) {
        // Fails only if it is no longer connected.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both);
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `work`, or [`LinkError::TimedOut`] with `what` as its subject.
pub(crate) async fn within<T>(
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = Result<T, LinkError>>,
) -> Result<T, LinkError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(LinkError::TimedOut { what, seconds: limit.as_secs() }))
}
