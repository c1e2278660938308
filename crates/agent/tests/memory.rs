//! What the splitter takes besides its ring while many threads write: alone in its process, whose memory it measures.
#![cfg(target_os = "linux")]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use agent::capture::{Capture, MemoryMapStore, Mode, ProtectedDisk, Splitter, SplitterConfig};
use replication::{DiskGeometry, DiskId, DiskIdentity, MachineId};
use world::{BlockDevice, BlockError, SystemClock};

const DISK_BYTES: u64 = 64 << 20;
const RING_BYTES: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const WRITERS: u64 = 8;

/// Takes everything and keeps nothing.
struct Nowhere;

impl BlockDevice for Nowhere {
    fn size(&self) -> u64 {
        DISK_BYTES
    }

    fn read_at(&self, _offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        buffer.fill(0);
        Ok(())
    }

    fn write_at(&self, _offset: u64, _data: &[u8]) -> Result<(), BlockError> {
        Ok(())
    }

    fn write_zeroes(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Ok(())
    }

    fn discard(&self, _range: Range<u64>) -> Result<(), BlockError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        Ok(())
    }
}

fn resident(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux says so");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("the field is there");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[test]
fn many_writers_take_little_more_than_the_ring() {
    let identity = DiskIdentity { serial: "disk".to_owned(), fingerprint: [0; 16] };
    let geometry = DiskGeometry {
        disk: DiskId(0),
        identity,
        path: "/disk".to_owned(),
        size_bytes: DISK_BYTES,
        logical_sector_bytes: 512,
        physical_sector_bytes: 512,
    };
    let config = SplitterConfig { machine: MachineId([1; 16]), boot: [1; 16], ring_bytes_max: RING_BYTES };
    let disks = vec![ProtectedDisk { geometry, device: Arc::new(Nowhere) }];
    let maps = MemoryMapStore::new();
    let (splitter, mut capture) = Splitter::open(disks, &maps, Arc::new(SystemClock), config).expect("opens");
    capture.rotate(Mode::Stream).expect("free");
    let before = resident("VmRSS:");

    // Captured and not released. Writers wait here, so that the ring never overflows.
    let held = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (disk, held, stop) = (splitter.disk(DiskId(0)).expect("it is there"), &held, &stop);
            scope.spawn(move || {
                // Runs of small writes and of large ones, of different lengths, so that each writer has most of the ring at
                // some time.
                for round in 0u64.. {
                    let large = round / (40 + 13 * writer) % 2 == 0;
                    let bytes = if large { 256 << 10 } else { 4096 };
                    if round % (97 + writer) == 0 {
                        std::thread::sleep(Duration::from_millis(3));
                    }
                    while held.load(Ordering::SeqCst) > RING_BYTES / 20 * 17 {
                        if stop.load(Ordering::SeqCst) {
                            return;
                        }
                        std::thread::yield_now();
                    }
                    held.fetch_add(bytes + 512, Ordering::SeqCst);
                    let at = (round * WRITERS + writer) * 4096 % (DISK_BYTES - bytes);
                    disk.write_at(at, &vec![writer as u8; bytes as usize]).expect("written");
                }
            });
        }
        let (mut pending, mut consumed) = (VecDeque::new(), 0);
        while consumed < 60 * RING_BYTES {
            // Let run nearly full, then released in part: as by a server that is just fast enough.
            match capture.next() {
                Some(captured) => {
                    let bytes = captured.kinds.iter().map(|kind| kind.data_len() as u64 + 512).sum::<u64>();
                    pending.push_back((captured.end, bytes));
                    consumed += bytes;
                }
                None => std::thread::yield_now(),
            }
            if held.load(Ordering::SeqCst) > RING_BYTES / 10 * 8 {
                let (mut end, mut freed) = (None, 0);
                while freed < RING_BYTES / 4
                    && let Some((next, bytes)) = pending.pop_front()
                {
                    (end, freed) = (Some(next), freed + bytes);
                }
                end.into_iter().for_each(|end| capture.release(end));
                held.fetch_sub(freed, Ordering::SeqCst);
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert_eq!(capture.status().gap_count, 0, "the ring never overflowed");
    let besides = resident("VmHWM:").saturating_sub(before + RING_BYTES);
    println!("{} MiB besides a ring of {}", besides / MIB, RING_BYTES / MIB);
    assert!(besides < 16 * MIB, "{} MiB besides a ring of {}", besides / MIB, RING_BYTES / MIB);
}
