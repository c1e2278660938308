//! What the splitter costs a write: 4 KiB and 1 MiB writes to a memory device, bare and through the splitter with a
//! consumer that discards. Prints one line per case: processor time of the writers and, after a plus, of the consumer,
//! so that a busy machine does not change the figures much.
//!
//! `cargo run --release -p agent --example splitter_cost`

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent::capture::{
    Capture, FileMapStore, MapStore, MemoryMapStore, Mode, ProtectedDisk, Splitter, SplitterCapture, SplitterConfig,
};
use replication::{DiskGeometry, DiskId, DiskIdentity, MachineId};
use world::{BlockDevice, BlockError, SystemClock};

const DISK_BYTES: u64 = 1 << 30;
const RING_BYTES: u64 = 256 << 20;

/// A device that only copies: each thread writes into its own buffer, so that no lock is measured.
struct CopyDevice;

thread_local! {
    static TARGET: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; 4 << 20]);
}

impl BlockDevice for CopyDevice {
    fn size(&self) -> u64 {
        DISK_BYTES
    }
    fn read_at(&self, _: u64, _: &mut [u8]) -> Result<(), BlockError> {
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        TARGET.with_borrow_mut(|target| {
            let start = (offset % (2 << 20)) as usize;
            target[start..start + data.len()].copy_from_slice(data);
            std::hint::black_box(&target[start]);
        });
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

/// Processor time of this thread in nanoseconds.
fn processor_time() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// Nanoseconds of processor time that one write takes its writer.
fn measure(device: &(dyn BlockDevice + '_), threads: u64, bytes: usize, writes: u64) -> f64 {
    let data = vec![7; bytes];
    let places = DISK_BYTES / bytes as u64;
    let total: f64 = std::thread::scope(|scope| {
        let writer = |thread: u64| {
            let data = &data;
            scope.spawn(move || {
                let begin = processor_time();
                let mut place = thread;
                for _ in 0..writes / threads {
                    place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    device.write_at((place >> 20) % places * bytes as u64, data).expect("memory takes it");
                }
                processor_time() - begin
            })
        };
        let writers: Vec<_> = (0..threads).map(writer).collect();
        writers.into_iter().map(|writer| writer.join().expect("a writer does not panic")).sum()
    });
    total / writes as f64
}

/// Consumes and releases until told to stop; its processor time, and how many gaps there were.
fn discard(mut capture: SplitterCapture, stop: &AtomicBool) -> (f64, u64) {
    let begin = processor_time();
    while !stop.load(Ordering::Relaxed) {
        let mut last = None;
        for _ in 0..256 {
            let Some(record) = capture.next() else { break };
            last = Some(record.end);
        }
        match last {
            Some(end) => capture.release(end),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    (processor_time() - begin, capture.status().gap_count)
}

fn through_splitter(store: &dyn MapStore, mode: Mode, threads: u64, bytes: usize, writes: u64) -> String {
    let geometry = DiskGeometry {
        disk: DiskId(0),
        identity: DiskIdentity { serial: "cost".to_owned(), fingerprint: [0; 16] },
        path: "memory".to_owned(),
        size_bytes: DISK_BYTES,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    };
    let disks = vec![ProtectedDisk { geometry, device: Arc::new(CopyDevice) }];
    let config = SplitterConfig { machine: MachineId([1; 16]), boot: [1; 16], ring_bytes_max: RING_BYTES };
    let (splitter, mut capture) = Splitter::open(disks, store, Arc::new(SystemClock), config).expect("opens");
    capture.rotate(mode).expect("a slot is free");
    let disk = splitter.disk(DiskId(0)).expect("known");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let consumer = scope.spawn(|| discard(capture, &stop));
        let nanoseconds = measure(&disk, threads, bytes, writes);
        stop.store(true, Ordering::Relaxed);
        let (consumer, gaps) = consumer.join().expect("the consumer does not panic");
        format!("{nanoseconds:.0} + {:.0} ns ({gaps} gaps)", consumer / writes as f64)
    })
}

fn main() {
    let folder = std::env::temp_dir().join(format!("splitter-cost-{}", std::process::id()));
    std::fs::create_dir(&folder).expect("a folder for the map file");
    for (threads, bytes, writes) in [(1, 4096, 500_000), (2, 4096, 500_000), (1, 1 << 20, 4000)] {
        let bare = measure(&CopyDevice, threads, bytes, writes);
        let memory = through_splitter(&MemoryMapStore::new(), Mode::Stream, threads, bytes, writes);
        let track = through_splitter(&MemoryMapStore::new(), Mode::Track, threads, bytes, writes);
        let store = FileMapStore::open(&folder, "maps").expect("the folder is ours");
        let file = through_splitter(&store, Mode::Stream, threads, bytes, writes);
        println!(
            "{threads} writer(s), {bytes} bytes: bare {bare:.0} ns, tracked {track}, streamed {memory}, streamed with a \
             mapped file {file}"
        );
    }
    std::fs::remove_dir_all(&folder).expect("the folder is ours");
}
