//! A small blocking NBD client: one connection, one request at a time.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use world::{BlockDevice, BlockError};

use crate::channel::Socket;
use crate::limits;
use crate::protocol::{
    CMD_DISC, CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, ErrorCode, FLAG_READ_ONLY,
    FLAG_SEND_FLUSH, FLAG_SEND_FUA, FLAG_SEND_TRIM, FLAG_SEND_WRITE_ZEROES, HANDSHAKE_FIXED_NEWSTYLE,
    HANDSHAKE_NO_ZEROES, INFO_BLOCK_SIZE, INFO_EXPORT, MAGIC_OPTION, MAGIC_OPTION_REPLY, MAGIC_SERVER,
    MAGIC_SIMPLE_REPLY, OPT_GO, REP_ACK, REP_ERR, REP_ERR_UNKNOWN, REP_INFO, split,
};
use crate::request::{Durability, RequestHeader};

/// Largest reply to an option in bytes that the client reads.
const OPTION_REPLY_BYTES_MAX: u32 = 64 << 10;
/// Replies to one option that the client reads.
const OPTION_REPLIES_MAX: usize = 64;

/// Why a client has no disk.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answers there, or the connection broke.
    #[error("the NBD server cannot be reached")]
    Unreachable(#[from] io::Error),
    /// The server does not have the export.
    #[error("the NBD server has no export named {name:?}")]
    NoSuchExport {
        /// The name asked for.
        name: String,
    },
    /// The server has reasons of its own.
    #[error("the NBD server refused: {message}")]
    Refused {
        /// What it said.
        message: String,
    },
    /// Whatever answers is no NBD server this client understands.
    #[error("this is no NBD server of the fixed newstyle: {0}")]
    NotNbd(&'static str),
}

/// A disk behind an NBD server. Threads that share it take turns; open several clients for parallel requests.
///
/// [`BlockDevice::discard`] relies on the server to return zeroes afterwards, as Farshore's does; the protocol itself
/// leaves that open.
pub struct Client {
    wire: Mutex<Wire>,
    size: u64,
    flags: u16,
    request_bytes_max: u64,
}

struct Wire {
    socket: Socket,
    cookie: u64,
    /// After a failure in the middle of a message nobody knows where the next one begins.
    broken: bool,
}

impl Client {
    /// Connects to `export` of the server that listens on the unix socket at `path`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_unix(path: impl AsRef<Path>, export: &str) -> Result<Client, ConnectError> {
        Client::over_unix(UnixStream::connect(path)?, export)
    }

    /// Connects to `export` of the server at `address`.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn connect_tcp(address: SocketAddr, export: &str) -> Result<Client, ConnectError> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Client::handshake(Socket::Tcp(stream), export)
    }

    /// Uses a stream that is connected already.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub fn over_unix(stream: UnixStream, export: &str) -> Result<Client, ConnectError> {
        Client::handshake(Socket::Unix(stream), export)
    }

    /// Lets requests fail that take longer than `timeout`; the connection is of no use after that. Without this,
    /// requests wait for ever.
    ///
    /// # Errors
    /// If the system refuses the time-out, for instance a zero one.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        let wire = self.lock();
        wire.socket.set_read_timeout(timeout)?;
        wire.socket.set_write_timeout(timeout)
    }

    /// Whether the server refuses changes.
    pub fn is_read_only(&self) -> bool {
        self.flags & FLAG_READ_ONLY != 0
    }

    /// Writes `data` at `offset`; durable on return.
    ///
    /// # Errors
    /// As [`BlockDevice::write_at`].
    pub fn write_durable(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        if self.flags & FLAG_SEND_FUA == 0 {
            self.write_at(offset, data)?;
            return self.flush();
        }
        self.write(offset, data, CMD_FLAG_FUA)
    }

    /// Zeroes `range`.
    ///
    /// # Errors
    /// As [`BlockDevice::write_zeroes`].
    pub fn zero(&self, range: Range<u64>, durability: Durability) -> Result<(), BlockError> {
        if self.flags & FLAG_SEND_WRITE_ZEROES != 0 {
            return self.without_data(CMD_WRITE_ZEROES, range, durability);
        }
        self.check_range(&range)?;
        let zeroes = vec![0; 1 << 20];
        for piece in pieces(range, zeroes.len() as u64) {
            self.write_at(piece.start, &zeroes[..(piece.end - piece.start) as usize])?;
        }
        self.settle(durability)
    }

    /// Discards `range`.
    ///
    /// # Errors
    /// As [`BlockDevice::discard`].
    pub fn trim(&self, range: Range<u64>, durability: Durability) -> Result<(), BlockError> {
        if self.flags & FLAG_SEND_TRIM == 0 {
            return self.zero(range, durability);
        }
        self.without_data(CMD_TRIM, range, durability)
    }

    fn handshake(socket: Socket, export: &str) -> Result<Client, ConnectError> {
        socket.set_read_timeout(Some(limits::HANDSHAKE_TIMEOUT))?;
        let mut stream = &socket;
        let greeting: [u8; 18] = receive(&mut stream)?;
        if greeting[..8] != MAGIC_SERVER.to_be_bytes() || greeting[8..16] != MAGIC_OPTION.to_be_bytes() {
            return Err(ConnectError::NotNbd("it greets differently"));
        }
        if u16::from_be_bytes([greeting[16], greeting[17]]) & HANDSHAKE_FIXED_NEWSTYLE == 0 {
            return Err(ConnectError::NotNbd("it speaks an older style"));
        }
        let mut hello = u32::from(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES).to_be_bytes().to_vec();
        hello.extend(MAGIC_OPTION.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        let name_bytes =
            u32::try_from(export.len()).map_err(|_| ConnectError::NoSuchExport { name: export.to_owned() })?;
        hello.extend((name_bytes + 8).to_be_bytes());
        hello.extend(name_bytes.to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(1u16.to_be_bytes());
        hello.extend(INFO_BLOCK_SIZE.to_be_bytes());
        stream.write_all(&hello)?;
        let mut found = None;
        let mut request_bytes_max = u64::from(limits::REQUEST_BYTES_MAX);
        for _ in 0..OPTION_REPLIES_MAX {
            let (kind, body) = option_reply(&mut stream)?;
            match kind {
                REP_INFO => match parse_info(&body) {
                    Some(Info::Export { size, flags }) => found = Some((size, flags)),
                    Some(Info::RequestBytesMax(bytes)) => request_bytes_max = request_bytes_max.min(u64::from(bytes)),
                    None => {}
                },
                REP_ACK => {
                    let (size, flags) = found.ok_or(ConnectError::NotNbd("it does not tell the size"))?;
                    socket.set_read_timeout(None)?;
                    let wire = Mutex::new(Wire { socket, cookie: 0, broken: false });
                    return Ok(Client { wire, size, flags, request_bytes_max: request_bytes_max.max(512) });
                }
                REP_ERR_UNKNOWN => return Err(ConnectError::NoSuchExport { name: export.to_owned() }),
                _ if kind & REP_ERR != 0 => {
                    let message = match body.as_slice() {
                        [] => format!("error {:#x}", kind & !REP_ERR),
                        body => String::from_utf8_lossy(body).into_owned(),
                    };
                    return Err(ConnectError::Refused { message });
                }
                _ => {}
            }
        }
        Err(ConnectError::NotNbd("it answers without end"))
    }

    fn write(&self, offset: u64, data: &[u8], flags: u16) -> Result<(), BlockError> {
        let range = offset..offset.saturating_add(data.len() as u64);
        self.check_range(&range)?;
        for piece in pieces(range, self.request_bytes_max) {
            let bytes = &data[(piece.start - offset) as usize..(piece.end - offset) as usize];
            self.request(CMD_WRITE, flags, piece, bytes, &mut [])?;
        }
        Ok(())
    }

    fn without_data(&self, command: u16, range: Range<u64>, durability: Durability) -> Result<(), BlockError> {
        self.check_range(&range)?;
        let fua = durability == Durability::BeforeReply && self.flags & FLAG_SEND_FUA != 0;
        // One gibibyte at a time: lengths have 32 bits, and a round number keeps every piece aligned.
        for piece in pieces(range, 1 << 30) {
            self.request(command, if fua { CMD_FLAG_FUA } else { 0 }, piece, &[], &mut [])?;
        }
        if fua { Ok(()) } else { self.settle(durability) }
    }

    fn settle(&self, durability: Durability) -> Result<(), BlockError> {
        match durability {
            Durability::Later => Ok(()),
            Durability::BeforeReply => self.flush(),
        }
    }

    fn request(
        &self,
        command: u16,
        flags: u16,
        range: Range<u64>,
        data: &[u8],
        into: &mut [u8],
    ) -> Result<(), BlockError> {
        let mut wire = self.lock();
        match wire.exchange(command, flags, &range, data, into).map_err(BlockError::Failed)? {
            0 => Ok(()),
            code if code == ErrorCode::NotPermitted as u32 => Err(BlockError::ReadOnly),
            code if code == ErrorCode::NoSpace as u32 => Err(BlockError::NoSpace),
            code => {
                let source = io::Error::from_raw_os_error(i32::try_from(code).unwrap_or(i32::MAX));
                Err(match command {
                    CMD_READ => BlockError::Unreadable { start: range.start, end: range.end, source },
                    _ => BlockError::Failed(source),
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().expect("nothing panics while holding the connection")
    }
}

impl BlockDevice for Client {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let range = offset..offset.saturating_add(buffer.len() as u64);
        self.check_range(&range)?;
        for piece in pieces(range, self.request_bytes_max) {
            let into = &mut buffer[(piece.start - offset) as usize..(piece.end - offset) as usize];
            self.request(CMD_READ, 0, piece, &[], into)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.write(offset, data, 0)
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.zero(range, Durability::Later)
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.trim(range, Durability::Later)
    }

    fn flush(&self) -> Result<(), BlockError> {
        // A server that has no flush has nothing to flush.
        if self.flags & FLAG_SEND_FLUSH == 0 {
            return Ok(());
        }
        self.request(CMD_FLUSH, 0, 0..0, &[], &mut [])
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Ok(wire) = self.wire.get_mut() {
            let goodbye = RequestHeader { flags: 0, command: CMD_DISC, cookie: 0, offset: 0, length: 0 };
            if !wire.broken && (&wire.socket).write_all(&goodbye.encode()).is_err() {
                tracing::debug!("the NBD server was gone before the goodbye");
            }
            wire.socket.shutdown(Shutdown::Write);
        }
    }
}

impl Wire {
    /// Sends one request and receives its reply; returns the server's error number.
    fn exchange(
        &mut self,
        command: u16,
        flags: u16,
        range: &Range<u64>,
        data: &[u8],
        into: &mut [u8],
    ) -> io::Result<u32> {
        if self.broken {
            return Err(io::Error::new(io::ErrorKind::NotConnected, "the connection broke earlier"));
        }
        self.cookie += 1;
        let length = u32::try_from(range.end - range.start).expect("requests are split before");
        let header = RequestHeader { flags, command, cookie: self.cookie, offset: range.start, length };
        self.broken = true;
        let result = self.round_trip(&header.encode(), data, into)?;
        self.broken = false;
        Ok(result)
    }

    fn round_trip(&self, header: &[u8], data: &[u8], into: &mut [u8]) -> io::Result<u32> {
        let mut stream = &self.socket;
        let mut pieces = [IoSlice::new(header), IoSlice::new(data)];
        let mut left = &mut pieces[..];
        let mut unsent = header.len() + data.len();
        while unsent > 0 {
            match stream.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => {
                    unsent -= sent;
                    IoSlice::advance_slices(&mut left, sent);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let reply: [u8; 16] = receive(&mut stream)?;
        let [m0, m1, m2, m3, e0, e1, e2, e3, cookie @ ..] = reply;
        if u32::from_be_bytes([m0, m1, m2, m3]) != MAGIC_SIMPLE_REPLY || u64::from_be_bytes(cookie) != self.cookie {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the server sent something that is no reply"));
        }
        let error = u32::from_be_bytes([e0, e1, e2, e3]);
        if error == 0 {
            stream.read_exact(into)?;
        }
        Ok(error)
    }
}

enum Info {
    Export { size: u64, flags: u16 },
    RequestBytesMax(u32),
}

fn parse_info(body: &[u8]) -> Option<Info> {
    let (kind, rest) = split::<2>(body)?;
    match u16::from_be_bytes(kind) {
        INFO_EXPORT => {
            let (size, rest) = split::<8>(rest)?;
            let (flags, _) = split::<2>(rest)?;
            Some(Info::Export { size: u64::from_be_bytes(size), flags: u16::from_be_bytes(flags) })
        }
        INFO_BLOCK_SIZE => {
            let (_, rest) = split::<8>(rest)?;
            let (maximum, _) = split::<4>(rest)?;
            Some(Info::RequestBytesMax(u32::from_be_bytes(maximum)))
        }
        _ => None,
    }
}

fn option_reply(stream: &mut &Socket) -> Result<(u32, Vec<u8>), ConnectError> {
    let header: [u8; 20] = receive(stream)?;
    let [m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, k0, k1, k2, k3, l0, l1, l2, l3] = header;
    if u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]) != MAGIC_OPTION_REPLY
        || u32::from_be_bytes([o0, o1, o2, o3]) != OPT_GO
    {
        return Err(ConnectError::NotNbd("it answers something else than was asked"));
    }
    let length = u32::from_be_bytes([l0, l1, l2, l3]);
    if length > OPTION_REPLY_BYTES_MAX {
        return Err(ConnectError::NotNbd("its answer is too long"));
    }
    let mut body = vec![0; length as usize];
    stream.read_exact(&mut body)?;
    Ok((u32::from_be_bytes([k0, k1, k2, k3]), body))
}

fn receive<const N: usize>(stream: &mut &Socket) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// `range` cut into pieces of at most `bytes_max`.
fn pieces(range: Range<u64>, bytes_max: u64) -> impl Iterator<Item = Range<u64>> {
    let mut position = range.start;
    std::iter::from_fn(move || {
        let piece = position..range.end.min(position.saturating_add(bytes_max));
        position = piece.end;
        (piece.start < piece.end).then_some(piece)
    })
}
