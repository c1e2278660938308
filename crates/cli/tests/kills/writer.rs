//! The application: writes one block after the other to both disks, and carries on after the agent was killed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nbd::Client;
use world::BlockDevice;

use super::ledger::{DISKS, Ledger, Mark};
use super::site::Site;

/// Writes between two flushes, and between two marks.
const FLUSH_EVERY: u64 = 20;
const MARK_EVERY: u64 = 120;
/// A pause after each write.
const PACE: Duration = Duration::from_millis(1);
/// How long the disks may be away.
const AWAY_LIMIT: Duration = Duration::from_secs(40);

/// A running writer.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    /// Marks known to be durable.
    durable: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Writer {
    pub(crate) fn start(site: Arc<Site>, ledger: Arc<Ledger>) -> Writer {
        let stop = Arc::new(AtomicBool::new(false));
        let durable = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (stop, durable) = (Arc::clone(&stop), Arc::clone(&durable));
            move || write_on(&site, &ledger, &stop, &durable)
        });
        Writer { stop, durable, thread }
    }

    pub(crate) fn durable_marks(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Ends it; every write of the ledger is acknowledged and flushed then.
    pub(crate) fn finish(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().expect("the writer did not fail");
    }

    pub(crate) fn assert_running(&self) {
        assert!(!self.thread.is_finished(), "the writer has failed");
    }
}

fn connect(socket: &PathBuf) -> Vec<Client> {
    let began = Instant::now();
    loop {
        let clients: Result<Vec<Client>, _> =
            (0..DISKS).map(|disk| Client::connect_unix(socket, &format!("disk{disk}"))).collect();
        match clients {
            Ok(clients) => return clients,
            Err(error) => assert!(began.elapsed() < AWAY_LIMIT, "the disks stay away: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn write_on(site: &Site, ledger: &Ledger, stop: &AtomicBool, durable: &AtomicU64) {
    let socket = site.path("nbd");
    let mut clients = connect(&socket);
    while !stop.load(Ordering::Acquire) {
        let (number, place) = ledger.submit();
        let block = ledger.block(place, number);
        // The fate of a write whose answer was lost is open; writing the same again settles it.
        while clients[place.disk].write_at(place.offset, &block).is_err() {
            clients = connect(&socket);
        }
        ledger.acknowledge(number);
        if number.is_multiple_of(FLUSH_EVERY) && clients.iter().any(|client| client.flush().is_err()) {
            clients = connect(&socket);
        }
        if number.is_multiple_of(MARK_EVERY) {
            let name = format!("after {number}");
            let known = site.mark(&name);
            ledger.mark(Mark { name, k: number, durable: known });
            if known {
                durable.fetch_add(1, Ordering::AcqRel);
            }
        }
        std::thread::sleep(PACE);
    }
    while clients.iter().any(|client| client.flush().is_err()) {
        clients = connect(&socket);
    }
}
