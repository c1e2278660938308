//! What a server holds in memory for its clients is bounded over all of them.

use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nbd::{Client, DeviceExport, ExportTable, Server, ServerOptions};
use world::{BlockDevice, BlockError};

const DISK_BYTES: u64 = 64 << 20;
const REQUEST_BYTES: usize = 1 << 20;
const IN_FLIGHT_MAX: usize = 3 << 20;

/// A disk that knows how many bytes of requests are inside it, and waits until it has seen as many as are allowed.
#[derive(Default)]
struct Counting {
    inside: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl Counting {
    fn visit(&self, bytes: usize) {
        let mut inside = self.inside.lock().expect("not poisoned");
        inside.0 += bytes;
        inside.1 = inside.1.max(inside.0);
        self.changed.notify_all();
        let limit = Duration::from_secs(20);
        let waited = self.changed.wait_timeout_while(inside, limit, |inside| inside.1 < IN_FLIGHT_MAX);
        let (mut inside, timeout) = waited.expect("not poisoned");
        assert!(!timeout.timed_out(), "only {} bytes at a time", inside.1);
        inside.0 -= bytes;
    }
}

impl BlockDevice for Counting {
    fn size(&self) -> u64 {
        DISK_BYTES
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.visit(buffer.len());
        buffer.fill(3);
        Ok(())
    }

    fn write_at(&self, _: u64, data: &[u8]) -> Result<(), BlockError> {
        self.visit(data.len());
        Ok(())
    }

    fn write_zeroes(&self, _: Range<u64>) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, _: Range<u64>) -> Result<(), BlockError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
}

#[test]
fn requests_of_all_clients_together_stay_below_the_limit() {
    let disk = Arc::new(Counting::default());
    let exports = ExportTable::new();
    exports.insert("disk", Arc::new(DeviceExport::new(disk.clone())));
    let options = ServerOptions { in_flight_bytes_max: IN_FLIGHT_MAX, ..ServerOptions::default() };
    let server = Server::start(Arc::new(exports), options, &[]).expect("starts");
    std::thread::scope(|scope| {
        for client in 0..8u64 {
            let (ours, theirs) = UnixStream::pair().expect("a socket pair");
            server.attach(theirs).expect("room for one more");
            scope.spawn(move || {
                let remote = Client::over_unix(ours, "disk").expect("connects");
                let mut buffer = vec![0; REQUEST_BYTES];
                for round in 0..6 {
                    let offset = (client * 6 + round) * REQUEST_BYTES as u64;
                    if (client + round) % 2 == 0 {
                        remote.read_at(offset, &mut buffer).expect("read");
                        assert!(buffer.iter().all(|byte| *byte == 3));
                    } else {
                        remote.write_at(offset, &buffer).expect("written");
                    }
                }
            });
        }
    });
    let (inside, most) = *disk.inside.lock().expect("not poisoned");
    assert_eq!((inside, most), (0, IN_FLIGHT_MAX));
    // Larger than the limit: served when nothing else is held.
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    server.attach(theirs).expect("room for one more");
    let remote = Client::over_unix(ours, "disk").expect("connects");
    remote.read_at(0, &mut vec![0; 2 * IN_FLIGHT_MAX]).expect("read");
    server.stop();
}
