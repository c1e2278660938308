//! Thousands of broken handshakes and requests against a live server: no panic, no hang, and good clients go on.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nbd::request::RequestHeader;
use nbd::{Client, DeviceExport, ExportTable, Server, ServerOptions};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};
use world::{Access, BlockDevice, FileDevice};

const SIZE: u64 = 1 << 20;

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// What a good client sends: every option, then every command.
fn conversation(random: &mut TestRng) -> Vec<u8> {
    let mut sent = (random.next_u32() % 4).to_be_bytes().to_vec();
    let contexts = [string("disk"), 1u32.to_be_bytes().to_vec(), string("base:allocation")].concat();
    let go = [string("disk"), vec![0, 2, 0, 1, 0, 3]].concat();
    for (number, data) in [(3, &[][..]), (8, &[]), (9, &contexts), (10, &contexts), (6, &go), (99, b"new"), (5, &[])] {
        if !random.next_u32().is_multiple_of(3) {
            sent.extend(option(number, data));
        }
    }
    match random.next_u32() % 8 {
        0 => sent.extend(option(1, b"disk")),
        1 => sent.extend(option(2, &[])),
        _ => sent.extend(option(7, &go)),
    }
    for cookie in 0..random.next_u64() % 20 {
        let command = (random.next_u32() % 9) as u16;
        let flags = if random.next_u32().is_multiple_of(2) { 0 } else { (random.next_u32() % 32) as u16 };
        let length = random.next_u32() % 70_000;
        let header = RequestHeader { flags, command, cookie, offset: random.next_u64() % SIZE, length };
        sent.extend(header.encode());
        if command == 1 {
            sent.extend(std::iter::repeat_n(cookie as u8, length as usize));
        }
    }
    sent
}

fn mutate(random: &mut TestRng, sent: &mut Vec<u8>) {
    for _ in 0..random.next_u32() % 4 {
        // Mostly the handshake and the first requests, where a byte means something.
        let reach = if random.next_u32().is_multiple_of(4) { sent.len() } else { sent.len().min(400) };
        if reach == 0 {
            return;
        }
        let place = random.next_u64() as usize % reach;
        match random.next_u32() % 6 {
            0 => sent[place] ^= 1 << (random.next_u32() % 8),
            1 => sent[place] = random.next_u32() as u8,
            2 => sent[place] = 0xFF,
            3 => sent.truncate(place),
            4 => {
                sent.remove(place);
            }
            _ => sent.insert(place, random.next_u32() as u8),
        }
    }
}

#[test]
fn broken_clients_neither_crash_nor_hang_the_server() {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        previous(info);
    }));
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    let device = FileDevice::open(image.path(), Access::ReadWrite).unwrap();
    let exports = ExportTable::new();
    exports.insert("disk", Arc::new(DeviceExport::new(Arc::new(device))));
    let server = Server::start(Arc::new(exports), ServerOptions::default(), &[]).unwrap();
    let mut answered = 0usize;
    for seed in 0..3000u32 {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&seed.to_le_bytes());
        let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut sent = conversation(&mut random);
        mutate(&mut random, &mut sent);
        let (ours, theirs) = UnixStream::pair().unwrap();
        while server.attach(theirs.try_clone().unwrap()).is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        drop(theirs);
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                // The server may close early; that is its right.
                drop((&ours).write_all(&sent));
                drop(ours.shutdown(Shutdown::Write));
            });
            let mut received = Vec::new();
            match (&ours).read_to_end(&mut received) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
                Err(error) => panic!("seed {seed}: the server neither answers nor closes: {error}"),
            }
            answered += usize::from(received.len() > 200);
        });
    }
    assert!(answered > 1000, "only {answered} conversations got anywhere");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "the server panicked");
    let (ours, theirs) = UnixStream::pair().unwrap();
    server.attach(theirs).unwrap();
    let client = Client::over_unix(ours, "disk").unwrap();
    client.write_at(100, b"alive").unwrap();
    let mut buffer = [0; 5];
    client.read_at(100, &mut buffer).unwrap();
    assert_eq!(&buffer, b"alive");
}

#[test]
fn a_broken_server_does_not_crash_the_client() {
    let good: Vec<u8> = {
        let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        let info = [&0u16.to_be_bytes()[..], &SIZE.to_be_bytes(), &0x6du16.to_be_bytes()].concat();
        for (kind, body) in [(3u32, info.as_slice()), (1, &[])] {
            bytes.extend(0x0003_e889_0455_65a9u64.to_be_bytes());
            bytes.extend(7u32.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((body.len() as u32).to_be_bytes());
            bytes.extend(body);
        }
        bytes.extend(0x6744_6698u32.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend([9; 512]);
        bytes
    };
    let mut used = 0;
    for seed in 0..2000u32 {
        let mut bytes = [1; 32];
        bytes[..4].copy_from_slice(&seed.to_le_bytes());
        let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut answer = good.clone();
        if seed > 0 {
            mutate(&mut random, &mut answer);
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        // All of it fits into the socket's buffer.
        (&theirs).write_all(&answer).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        if let Ok(client) = Client::over_unix(ours, "disk") {
            client.set_timeout(Some(Duration::from_secs(20))).unwrap();
            let mut buffer = [0; 512];
            let result = client.read_at(0, &mut buffer);
            assert!(seed > 0 || (result.is_ok() && buffer == [9; 512]), "the unchanged answer is a good one");
            used += usize::from(result.is_ok());
        }
    }
    assert!(used > 100, "only {used} answers were understood");
}
