//! A long random run through our own client and server against an array of bytes, and the server's own promises.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nbd::request::Durability;
use nbd::{Client, ConnectError, DeviceExport, ExportTable, Listen, ServeError, Server, ServerHandle, ServerOptions};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use world::{Access, BlockDevice, BlockError, FileDevice};

fn serve(name: &str, device: Arc<dyn BlockDevice>) -> ServerHandle {
    let exports = ExportTable::new();
    exports.insert(name, Arc::new(DeviceExport::new(device)));
    Server::start(Arc::new(exports), ServerOptions::default(), &[]).unwrap()
}

fn connect(server: &ServerHandle, name: &str) -> Client {
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.attach(theirs).unwrap();
    let client = Client::over_unix(ours, name).unwrap();
    client.set_timeout(Some(Duration::from_secs(30))).unwrap();
    client
}

fn below(random: &mut TestRng, end: u64) -> u64 {
    random.next_u64() % end
}

/// A range inside `area`, mostly short, now and then long.
fn pick(random: &mut TestRng, area: &Range<u64>) -> Range<u64> {
    let start = area.start + below(random, area.end - area.start);
    let longest = if below(random, 10) == 0 { area.end - area.start } else { 12_000 };
    start..area.end.min(start + below(random, longest))
}

fn random_operation(client: &Client, random: &mut TestRng, area: &Range<u64>, oracle: &mut [u8]) {
    let range = pick(random, area);
    let place = (range.start - area.start) as usize..(range.end - area.start) as usize;
    let durability = if below(random, 8) == 0 { Durability::BeforeReply } else { Durability::Later };
    match below(random, 20) {
        0..7 => {
            let mut data = vec![0; place.len()];
            random.fill_bytes(&mut data);
            match durability {
                Durability::Later => client.write_at(range.start, &data).unwrap(),
                Durability::BeforeReply => client.write_durable(range.start, &data).unwrap(),
            }
            oracle[place].copy_from_slice(&data);
        }
        7..9 => {
            client.zero(range, durability).unwrap();
            oracle[place].fill(0);
        }
        9..11 => {
            client.trim(range, durability).unwrap();
            oracle[place].fill(0);
        }
        11 => client.flush().unwrap(),
        _ => {
            let mut data = vec![0xEE; place.len()];
            client.read_at(range.start, &mut data).unwrap();
            assert!(data == oracle[place], "bytes {range:?} differ");
        }
    }
}

#[test]
fn several_connections_agree_with_an_array() {
    const CONNECTIONS: u64 = 4;
    const AREA: u64 = 777_777;
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(CONNECTIONS * AREA).unwrap();
    let server = serve("disk", Arc::new(FileDevice::open(image.path(), Access::ReadWrite).unwrap()));
    let oracle: Vec<u8> = thread::scope(|scope| {
        let runs: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                let client = connect(&server, "disk");
                scope.spawn(move || {
                    // The seed is the connection's number, so a failure repeats by itself.
                    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &[number as u8 + 1; 32]);
                    let area = number * AREA..(number + 1) * AREA;
                    let mut oracle = vec![0; AREA as usize];
                    for _ in 0..2500 {
                        random_operation(&client, &mut random, &area, &mut oracle);
                    }
                    client.flush().unwrap();
                    oracle
                })
            })
            .collect();
        runs.into_iter().flat_map(|run| run.join().unwrap()).collect()
    });
    let reader = connect(&server, "");
    let mut all = vec![0; oracle.len()];
    reader.read_at(0, &mut all).unwrap();
    assert!(all == oracle, "another connection sees other bytes");
    drop(reader);
    server.stop();
    assert!(std::fs::read(image.path()).unwrap() == oracle, "the file holds other bytes");
}

/// A device in memory that is slow and counts how many requests it has at once.
struct Slow {
    bytes: Mutex<Vec<u8>>,
    delay: Duration,
    active: AtomicUsize,
    most_active: AtomicUsize,
    writes: AtomicUsize,
    writes_flushed: AtomicUsize,
    panics: AtomicBool,
}

impl Slow {
    fn new(size: usize, delay: Duration) -> Slow {
        Slow {
            bytes: Mutex::new(vec![0; size]),
            delay,
            active: AtomicUsize::new(0),
            most_active: AtomicUsize::new(0),
            writes: AtomicUsize::new(0),
            writes_flushed: AtomicUsize::new(0),
            panics: AtomicBool::new(false),
        }
    }

    fn work(&self) {
        assert!(!self.panics.load(Ordering::SeqCst), "this device breaks on purpose");
        let active = self.active.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_active.fetch_max(active, Ordering::SeqCst);
        thread::sleep(self.delay);
        self.active.fetch_sub(1, Ordering::SeqCst);
    }
}

impl BlockDevice for Slow {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.work();
        let end = offset + buffer.len() as u64;
        if offset < 8192 && end > 4096 {
            let source = std::io::Error::from_raw_os_error(5);
            return Err(BlockError::Unreadable { start: 4096, end: 8192, source });
        }
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..end as usize]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.work();
        self.bytes.lock().unwrap()[offset as usize..offset as usize + data.len()].copy_from_slice(data);
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn write_zeroes(&self, _: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::NoSpace)
    }

    fn discard(&self, _: Range<u64>) -> Result<(), BlockError> {
        Err(BlockError::Failed(std::io::Error::other("the cable is out")))
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.writes_flushed.store(self.writes.load(Ordering::SeqCst), Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn errors_of_the_device_reach_the_client_and_the_connection_goes_on() {
    let server = serve("disk", Arc::new(Slow::new(1 << 20, Duration::ZERO)));
    let client = connect(&server, "disk");
    let mut buffer = vec![0; 4096];
    assert!(matches!(client.read_at(4096, &mut buffer), Err(BlockError::Unreadable { .. })));
    client.read_at(8192, &mut buffer).unwrap();
    assert!(matches!(client.write_zeroes(0..512), Err(BlockError::NoSpace)));
    assert!(matches!(client.discard(0..512), Err(BlockError::Failed(_))));
    assert!(matches!(client.read_at(1 << 20, &mut buffer), Err(BlockError::OutOfRange { .. })));
    client.write_at(8192, &[5; 4096]).unwrap();
    client.read_at(8192, &mut buffer).unwrap();
    assert_eq!(buffer, [5; 4096]);
}

#[test]
fn flush_and_forced_unit_access_are_durable_before_the_reply() {
    let device = Arc::new(Slow::new(1 << 20, Duration::ZERO));
    let server = serve("disk", device.clone());
    let (client, other) = (connect(&server, "disk"), connect(&server, "disk"));
    let flushed = || device.writes_flushed.load(Ordering::SeqCst);
    client.write_at(0, &[1; 512]).unwrap();
    assert_eq!(flushed(), 0, "a plain write waits for the next flush");
    other.flush().unwrap();
    assert_eq!(flushed(), 1, "a flush covers the writes of other connections");
    client.write_durable(0, &[1; 512]).unwrap();
    assert_eq!(flushed(), 2);
}

#[test]
fn a_read_only_export_refuses_changes_and_an_unknown_one_is_named() {
    let exports = ExportTable::new();
    let device = Arc::new(Slow::new(1 << 20, Duration::ZERO));
    exports.insert("one", Arc::new(DeviceExport::read_only(device.clone())));
    exports.insert("two", Arc::new(DeviceExport::new(device)));
    let server = Server::start(Arc::new(exports), ServerOptions::default(), &[]).unwrap();
    let client = connect(&server, "one");
    assert!(client.is_read_only());
    assert!(matches!(client.write_at(0, b"x"), Err(BlockError::ReadOnly)));
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.attach(theirs).unwrap();
    match Client::over_unix(ours, "three") {
        Err(ConnectError::NoSuchExport { name }) => assert_eq!(name, "three"),
        other => panic!("{:?}", other.map(|client| client.size())),
    }
}

/// Greets as a client that wants plain replies from the export `disk`, and ends up before the first request.
fn raw_handshake(stream: &mut UnixStream) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
}

fn raw_request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    nbd::request::RequestHeader { flags: 0, command, cookie, offset, length }.encode().to_vec()
}

#[test]
fn slow_requests_of_one_connection_run_side_by_side() {
    let device = Arc::new(Slow::new(1 << 20, Duration::from_millis(20)));
    let server = serve("disk", device.clone());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    server.attach(theirs).unwrap();
    raw_handshake(&mut ours);
    let requests: Vec<u8> = (0..64).flat_map(|number| raw_request(0, number, 8192 + 4096 * number, 4096)).collect();
    ours.write_all(&requests).unwrap();
    let mut seen = [false; 64];
    for _ in 0..64 {
        let mut header = [0; 16];
        ours.read_exact(&mut header).unwrap();
        assert_eq!(header[4..8], [0; 4]);
        ours.read_exact(&mut [0; 4096]).unwrap();
        let cookie = u64::from_be_bytes(header[8..].try_into().unwrap()) as usize;
        assert!(!std::mem::replace(&mut seen[cookie], true), "answered twice");
    }
    let most = device.most_active.load(Ordering::SeqCst);
    assert!((4..=nbd::limits::WORKERS_PER_CONNECTION + 1).contains(&most), "{most} at once");
}

#[test]
fn stopping_answers_what_was_accepted_and_lets_the_device_go() {
    let device = Arc::new(Slow::new(1 << 20, Duration::from_millis(30)));
    let server = serve("disk", device.clone());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    server.attach(theirs).unwrap();
    raw_handshake(&mut ours);
    for number in 0..32u64 {
        let mut request = raw_request(1, number, 512 * number, 512);
        request.extend([7; 512]);
        ours.write_all(&request).unwrap();
    }
    let start = Instant::now();
    while device.active.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "no write arrived");
        thread::yield_now();
    }
    server.stop();
    let written = device.writes.load(Ordering::SeqCst);
    assert_eq!(Arc::strong_count(&device), 1, "the server still holds the device");
    let mut replies = Vec::new();
    ours.read_to_end(&mut replies).unwrap();
    assert_eq!(replies.len(), written * 16, "each executed write is answered, and no other");
    assert!(written > 0);
}

#[test]
fn a_device_that_panics_ends_its_connection_only() {
    let device = Arc::new(Slow::new(1 << 20, Duration::ZERO));
    let server = serve("disk", device.clone());
    for length in [512, 1 << 18] {
        let client = connect(&server, "disk");
        device.panics.store(true, Ordering::SeqCst);
        let mut buffer = vec![0; length];
        assert!(matches!(client.read_at(8192, &mut buffer), Err(BlockError::Failed(_))));
        device.panics.store(false, Ordering::SeqCst);
        connect(&server, "disk").read_at(8192, &mut buffer).unwrap();
    }
}

#[test]
fn listening_takes_over_a_dead_socket_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let start = || {
        let exports = ExportTable::new();
        exports.insert("disk", Arc::new(DeviceExport::new(Arc::new(Slow::new(4096, Duration::ZERO)))));
        Server::start(Arc::new(exports), ServerOptions::default(), &[Listen::Unix(path.clone())])
    };
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let server = start().unwrap();
    assert_eq!(Client::connect_unix(&path, "disk").unwrap().size(), 4096);
    assert!(matches!(start(), Err(ServeError::InUse { .. })));
    assert_eq!(Client::connect_unix(&path, "disk").unwrap().size(), 4096);
    server.stop();
    assert!(!path.exists());
    std::fs::write(&path, "a letter").unwrap();
    assert!(matches!(start(), Err(ServeError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"a letter");
    let everywhere = Listen::Tcp("0.0.0.0:0".parse().unwrap());
    let refused = Server::start(Arc::new(ExportTable::new()), ServerOptions::default(), &[everywhere]);
    assert!(matches!(refused.err(), Some(ServeError::NotLoopback { .. })));
}

#[test]
fn too_many_clients_are_turned_away() {
    let exports = ExportTable::new();
    exports.insert("disk", Arc::new(DeviceExport::new(Arc::new(Slow::new(1 << 20, Duration::ZERO)))));
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let server = Server::start(Arc::new(exports), options, &[]).unwrap();
    let first = connect(&server, "disk");
    let _second = connect(&server, "disk");
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(server.attach(theirs).is_err());
    drop(first);
    let start = Instant::now();
    while server.connections() == 2 {
        assert!(start.elapsed() < Duration::from_secs(20), "the place of a client that left stays taken");
        thread::yield_now();
    }
    connect(&server, "disk").read_at(8192, &mut [0; 512]).unwrap();
}
