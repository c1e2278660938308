//! A TCP relay that counts: the agent's bytes on the wire, as a network would see them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

/// Large, so that relaying costs little beside TLS.
const BUFFER_BYTES: usize = 256 << 10;

/// A relay; it runs until the program ends.
#[derive(Debug)]
pub(super) struct CountedLink {
    pub(super) address: String,
    sent: Arc<AtomicU64>,
}

impl CountedLink {
    /// Relays connections to `server`.
    pub(super) fn to(server: String) -> Result<CountedLink> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("no free port for the counting relay")?;
        let address = listener.local_addr()?.to_string();
        let sent = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&sent);
        std::thread::spawn(move || {
            for agent in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(&server) else { continue };
                for stream in [&agent, &server] {
                    // Only latency would suffer.
                    let _ = stream.set_nodelay(true);
                }
                let (Ok(from), Ok(to)) = (agent.try_clone(), server.try_clone()) else { continue };
                let counted = Arc::clone(&counted);
                std::thread::spawn(move || relay(from, to, &counted));
                std::thread::spawn(move || relay(server, agent, &AtomicU64::new(0)));
            }
        });
        Ok(CountedLink { address, sent })
    }

    /// Bytes that agents have sent so far.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, counted: &AtomicU64) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..len]).is_err() {
            break;
        }
        counted.fetch_add(len as u64, Ordering::Relaxed);
    }
    // The other side learns of the end; it may be gone already.
    let _ = (to.shutdown(Shutdown::Both), from.shutdown(Shutdown::Both));
}
