//! Fuzz targets of this crate: whole sessions, as a server and as a client. Compiled for tests and fuzzers only; see
//! `fuzz/README.md`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use world::{BlockDevice, BlockError};

use crate::Client;
use crate::export::{DeviceExport, ExportTable};
use crate::request::Durability;
use crate::server::{Server, ServerHandle, ServerOptions};

const DISK_BYTES: usize = 256 << 10;
/// Input of one session in bytes: fits a socket's buffer, so that writing it never waits for the other side.
const SESSION_BYTES_MAX: usize = 96 << 10;
/// Longer than any honest session takes.
const LIMIT: Duration = Duration::from_secs(20);

/// A disk that insists on its contract: what the protocol lets through lies inside.
struct Strict {
    bytes: Mutex<Vec<u8>>,
    calls: AtomicU64,
}

impl Strict {
    fn with<T>(&self, range: Range<u64>, action: impl FnOnce(&mut [u8]) -> T) -> T {
        assert!(range.start <= range.end && range.end <= DISK_BYTES as u64, "{range:?} reached the device");
        self.calls.fetch_add(1, Ordering::SeqCst);
        action(&mut self.bytes.lock().expect("not poisoned")[range.start as usize..range.end as usize])
    }
}

impl BlockDevice for Strict {
    fn size(&self) -> u64 {
        DISK_BYTES as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.with(offset..offset + buffer.len() as u64, |bytes| buffer.copy_from_slice(bytes));
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.with(offset..offset + data.len() as u64, |bytes| bytes.copy_from_slice(data));
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.with(range, |bytes| bytes.fill(0));
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.write_zeroes(range)
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Panics of the server's threads, which end a connection and nothing else.
static PANICS: AtomicU64 = AtomicU64::new(0);

fn serving() -> &'static (ServerHandle, Arc<Strict>) {
    static SERVING: OnceLock<(ServerHandle, Arc<Strict>)> = OnceLock::new();
    SERVING.get_or_init(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if std::thread::current().name().is_some_and(|name| name.starts_with("nbd")) {
                PANICS.fetch_add(1, Ordering::SeqCst);
            }
            before(panic);
        }));
        let disk = Arc::new(Strict { bytes: Mutex::new(vec![7; DISK_BYTES]), calls: AtomicU64::new(0) });
        let exports = ExportTable::new();
        exports.insert("disk", Arc::new(DeviceExport::new(disk.clone())));
        let server = Server::start(Arc::new(exports), ServerOptions::default(), &[]).expect("it listens nowhere");
        (server, disk)
    })
}

/// Everything that a client sends, from its first byte on: the server survives, ends the session, and asks of the
/// device only what lies inside it.
pub fn nbd_server(data: &[u8]) -> bool {
    let (server, disk) = serving();
    let before = disk.calls.load(Ordering::SeqCst);
    let (mut ours, theirs) = UnixStream::pair().expect("a socket pair");
    server.attach(theirs).expect("the server takes one more client");
    ours.set_read_timeout(Some(LIMIT)).expect("a time-out");
    // The server may have hung up already.
    let _ = ours.write_all(&data[..data.len().min(SESSION_BYTES_MAX)]);
    let _ = ours.shutdown(Shutdown::Write);
    let mut sink = [0; 64 << 10];
    loop {
        match ours.read(&mut sink) {
            Ok(0) => break,
            Ok(_) => {}
            // The fuzzer has a timer of its own.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the server neither answers nor ends the session: {error}"),
        }
    }
    while server.connections() > 0 {
        std::thread::yield_now();
    }
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "a thread of the server panicked");
    disk.calls.load(Ordering::SeqCst) > before
}

/// Everything that a server answers: the client survives, and is satisfied or says that it is not.
pub fn nbd_client(data: &[u8]) -> bool {
    let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
    theirs.write_all(&data[..data.len().min(SESSION_BYTES_MAX)]).expect("it fits the buffer");
    theirs.shutdown(Shutdown::Write).expect("it is open");
    let Ok(client) = Client::over_unix(ours, "disk") else { return false };
    client.set_timeout(Some(LIMIT)).expect("a time-out");
    let end = client.size().min(4096);
    let mut buffer = vec![0; end as usize];
    let read = client.read_at(0, &mut buffer).is_ok();
    let write = client.write_durable(0, &buffer[..buffer.len().min(512)]).is_ok();
    let zero = client.zero(0..end, Durability::BeforeReply).is_ok();
    let trim = client.trim(client.size() - end..client.size(), Durability::Later).is_ok();
    let _ = client.read_at(client.size() - end, &mut buffer);
    let _ = (client.flush(), write, zero, trim);
    read
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::*;
    use crate::request::RequestHeader;

    fn option(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC_OPTION.to_be_bytes().to_vec();
        bytes.extend(kind.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    }

    fn named(more: &[u8]) -> Vec<u8> {
        [&4u32.to_be_bytes()[..], b"disk", more].concat()
    }

    fn request(command: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
        let header = RequestHeader { flags, command, cookie: 0x11, offset, length };
        [&header.encode()[..], payload].concat()
    }

    fn go() -> Vec<u8> {
        option(OPT_GO, &named(&[0, 1, 0, 3]))
    }

    fn requests() -> Vec<u8> {
        [
            request(CMD_READ, 0, 0, 4096, &[]),
            request(CMD_READ, 0, 65536, 131_072, &[]),
            request(CMD_WRITE, CMD_FLAG_FUA, 512, 512, &[9; 512]),
            request(CMD_WRITE_ZEROES, CMD_FLAG_NO_HOLE, 0, 8192, &[]),
            request(CMD_TRIM, 0, 8192, 8192, &[]),
            request(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, DISK_BYTES as u32, &[]),
            request(CMD_CACHE, 0, 0, 4096, &[]),
            request(CMD_FLUSH, 0, 0, 0, &[]),
            request(CMD_READ, CMD_FLAG_DF, DISK_BYTES as u64 - 512, 512, &[]),
            request(CMD_DISC, 0, 0, 0, &[]),
        ]
        .concat()
    }

    #[test]
    fn servers() {
        let flags = 3u32.to_be_bytes().to_vec();
        let context = [&1u32.to_be_bytes()[..], &15u32.to_be_bytes(), CONTEXT_ALLOCATION.as_bytes()].concat();
        let structured = [
            flags.clone(),
            option(OPT_STRUCTURED_REPLY, &[]),
            option(OPT_LIST, &[]),
            option(OPT_INFO, &named(&[0, 1, 0, 1])),
            option(OPT_LIST_META_CONTEXT, &named(&context)),
            option(OPT_SET_META_CONTEXT, &named(&context)),
            go(),
            requests(),
        ]
        .concat();
        let simple = [flags.clone(), go(), requests()].concat();
        let old = [flags, option(OPT_EXPORT_NAME, b"disk"), requests()].concat();
        let seeds = [("structured", structured), ("simple", simple), ("export-name", old)];
        replay::replay("nbd_server", nbd_server, &seeds);
    }

    #[test]
    fn clients() {
        let reply = |kind: u32, data: &[u8]| {
            let mut bytes = MAGIC_OPTION_REPLY.to_be_bytes().to_vec();
            bytes.extend(OPT_GO.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes
        };
        let done = |cookie: u64, error: u32, data: &[u8]| {
            let mut bytes = MAGIC_SIMPLE_REPLY.to_be_bytes().to_vec();
            bytes.extend(error.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(data);
            bytes
        };
        let info = |size: u64, flags: u16| {
            let bytes = [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
            reply(REP_INFO, &bytes)
        };
        let sizes: Vec<u8> = [512u32, 4096, 1 << 20].iter().flat_map(|bytes| bytes.to_be_bytes()).collect();
        let greeting = [&MAGIC_SERVER.to_be_bytes()[..], &MAGIC_OPTION.to_be_bytes(), &[0, 3]].concat();
        let all = FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES;
        let begin = |flags| {
            let block = reply(REP_INFO, &[&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat());
            [greeting.clone(), info(1 << 20, flags), block, reply(REP_ACK, &[])].concat()
        };
        let rest: Vec<u8> = (2..5).flat_map(|cookie| done(cookie, 0, &[])).collect();
        let able = [begin(all), done(1, 0, &[5; 4096]), rest, done(5, 0, &[5; 4096]), done(6, 0, &[])].concat();
        let failing: Vec<u8> = (2..7).flat_map(|cookie| done(cookie, 28, &[])).collect();
        let poor = [begin(FLAG_HAS_FLAGS), done(1, 0, &[5; 4096]), failing].concat();
        replay::replay("nbd_client", nbd_client, &[("able", able), ("poor", poor)]);
        let absent = [greeting, reply(REP_ERR_UNKNOWN, b"no such export")].concat();
        assert!(!nbd_client(&absent));
    }
}
