//! Recognises sequential readers and fetches ahead of them on threads of its own.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use replication::DiskId;
use replication::geometry::ByteRange;

use crate::core::BranchCore;
use crate::limits;

/// How far to read ahead.
#[derive(Debug, Clone, Copy)]
pub struct ReadAheadConfig {
    /// Bytes fetched at once, a multiple of 64 KiB; 0 turns it off. Keep it well below the data cache.
    pub window_bytes: u64,
    /// Reads one behind the other after which a reader counts as sequential.
    pub after_reads: u32,
}

impl Default for ReadAheadConfig {
    fn default() -> ReadAheadConfig {
        ReadAheadConfig { window_bytes: 8 << 20, after_reads: 2 }
    }
}

#[derive(Debug, Clone, Copy)]
struct Reader {
    next: u64,
    reads: u32,
    /// Fetched, or asked for, up to here.
    ahead: u64,
    used: u64,
}

/// The sequential readers of one disk. Pure.
#[derive(Debug)]
pub(crate) struct Readers {
    config: ReadAheadConfig,
    readers: Vec<Reader>,
    time: u64,
}

impl Readers {
    pub(crate) fn new(config: ReadAheadConfig) -> Readers {
        Readers { config, readers: Vec::new(), time: 0 }
    }

    /// Takes note of a read; what to fetch ahead, if anything. Stays up to two windows in front.
    pub(crate) fn read(&mut self, range: ByteRange) -> Option<ByteRange> {
        let window = self.config.window_bytes;
        if window == 0 {
            return None;
        }
        self.time += 1;
        // Requests of one reader may overtake each other a little.
        let near = |reader: &Reader| reader.next.abs_diff(range.start) <= 4 * range.len.max(64 << 10);
        let Some(reader) = self.readers.iter_mut().find(|reader| near(reader)) else {
            let reader = Reader { next: range.end(), reads: 1, ahead: range.end(), used: self.time };
            if self.readers.len() < limits::READERS_MAX {
                self.readers.push(reader);
            } else if let Some(oldest) = self.readers.iter_mut().min_by_key(|reader| reader.used) {
                *oldest = reader;
            }
            return None;
        };
        reader.used = self.time;
        reader.reads = reader.reads.saturating_add(1);
        reader.next = reader.next.max(range.end());
        reader.ahead = reader.ahead.max(reader.next);
        if reader.reads <= self.config.after_reads || reader.ahead >= reader.next + window {
            return None;
        }
        let start = reader.ahead;
        reader.ahead = (start / window + 1) * window;
        ByteRange::between(start, reader.ahead)
    }
}

/// Threads that fetch ahead for the disks of a branch. Dropping it ends them.
pub(crate) struct ReadAhead {
    queue: Option<SyncSender<(DiskId, ByteRange)>>,
    threads: Vec<JoinHandle<()>>,
}

impl ReadAhead {
    pub(crate) fn start(core: &Arc<BranchCore>) -> std::io::Result<ReadAhead> {
        let (queue, requests) = sync_channel(limits::READ_AHEAD_QUEUE_MAX);
        let core = Arc::clone(core);
        let thread = std::thread::Builder::new().name("read-ahead".into()).spawn(move || fetch(&core, &requests))?;
        Ok(ReadAhead { queue: Some(queue), threads: vec![thread] })
    }

    /// Asks for `range`; forgotten if there is too much to do already.
    pub(crate) fn ask(&self, disk: DiskId, range: ByteRange) {
        if let Some(queue) = &self.queue {
            let _ = queue.try_send((disk, range));
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.queue = None;
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

fn fetch(core: &BranchCore, requests: &Receiver<(DiskId, ByteRange)>) {
    while let Ok((disk, range)) = requests.recv() {
        if let Err(error) = core.prefetch(disk, range) {
            // The read itself will say it to whoever needs the data.
            tracing::debug!(%disk, %range, %error, "could not read ahead");
        }
    }
}

/// Where the disks of a branch find their read-ahead once its threads run.
pub(crate) type SharedReadAhead = Arc<Mutex<Option<ReadAhead>>>;

pub(crate) fn ask(shared: &SharedReadAhead, disk: DiskId, range: ByteRange) {
    if let Some(ahead) = &*shared.lock().unwrap_or_else(PoisonError::into_inner) {
        ahead.ask(disk, range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_followed_and_a_random_one_is_not() {
        let config = ReadAheadConfig { window_bytes: 1 << 20, after_reads: 2 };
        let mut readers = Readers::new(config);
        let mut fetched: Vec<ByteRange> = Vec::new();
        for index in 0..64u64 {
            fetched.extend(readers.read(ByteRange::new(index * 65_536, 65_536)));
            // A second reader elsewhere, and noise.
            assert_eq!(readers.read(ByteRange::new((index * 7919 % 1000 + 100) << 24, 4096)), None);
        }
        assert!(fetched.len() >= 4, "{fetched:?}");
        assert!(fetched.windows(2).all(|pair| pair[0].end() == pair[1].start), "{fetched:?}");
        assert!(fetched.iter().all(|range| range.len <= 1 << 20));
    }
}
