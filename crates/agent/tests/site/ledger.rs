//! Load on a mounted file system: writers that store without order, and one that keeps a ledger.
#![allow(dead_code, unreachable_pub)]

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use world::{Entropy, SystemEntropy};

pub fn number() -> u64 {
    u64::from_le_bytes((&SystemEntropy as &dyn Entropy).bytes())
}

/// File-system load: files written, overwritten, truncated, removed, synced, through the page cache and past it.
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn start(folder: &Path) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..2)
            .map(|worker| {
                let (stop, folder) = (stop.clone(), folder.to_owned());
                thread::spawn(move || {
                    while !stop.load(Ordering::SeqCst) {
                        storm(&folder, worker);
                        thread::sleep(Duration::from_millis(2));
                    }
                })
            })
            .collect();
        Load { stop, threads }
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().expect("the load does not panic"));
    }
}

fn storm(folder: &Path, worker: u64) {
    let path = folder.join(format!("file-{worker}-{}", number() % 12));
    match number() % 10 {
        0 => drop(std::fs::remove_file(&path)),
        1 => {
            if let Ok(file) = OpenOptions::new().write(true).open(&path) {
                let _ = file.set_len(number() % 500_000);
            }
        }
        kind => {
            let direct = kind == 2;
            let flags = if direct { rustix::fs::OFlags::DIRECT.bits().cast_signed() } else { 0 };
            let Ok(file) = OpenOptions::new().create(true).truncate(false).write(true).custom_flags(flags).open(&path)
            else {
                return;
            };
            let len = if direct { 8192 } else { 1 + (number() % 200_000) as usize };
            let mut data = vec![0; len + 4096];
            SystemEntropy.fill(&mut data);
            let shift = data.as_ptr().align_offset(4096);
            let at = if direct { number() % 64 * 4096 } else { number() % 300_000 };
            // A full file system is no matter here.
            let _ = file.write_all_at(&data[shift..shift + len], at);
            if kind < 5 {
                let _ = rustix::fs::fsync(&file);
            }
        }
    }
}

/// Writes in an order that a crash must keep: A, synced; then B, synced; then a line to a log, synced.
pub struct Ledger {
    stop: Arc<AtomicBool>,
    synced: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl Ledger {
    pub fn start(folder: &Path) -> Ledger {
        let (stop, synced) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let flags = (rustix::fs::OFlags::DIRECT | rustix::fs::OFlags::DSYNC).bits().cast_signed();
        let open = |name: &str, flags: i32| {
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).read(true).write(true).custom_flags(flags);
            options.open(folder.join(name)).expect("created")
        };
        let (a, b, log) = (open("A", flags), open("B", 0), open("log", 0));
        let mut memory = vec![0u8; 8192];
        let shift = memory.as_ptr().align_offset(4096);
        let block = shift..shift + 4096;
        a.write_all_at(&memory[block.clone()], 0).expect("written");
        b.write_all_at(&[0; 8], 0).expect("written");
        rustix::fs::fsync(&b).expect("synced");
        rustix::fs::fsync(&a).expect("synced");
        rustix::fs::fsync(&log).expect("synced");
        let thread = thread::spawn({
            let (stop, synced) = (stop.clone(), synced.clone());
            move || {
                for round in 1u64.. {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    memory[shift..shift + 8].copy_from_slice(&round.to_le_bytes());
                    memory[shift + 4088..shift + 4096].copy_from_slice(&round.to_le_bytes());
                    a.write_all_at(&memory[block.clone()], 0).expect("written");
                    b.write_all_at(&round.to_le_bytes(), 0).expect("written");
                    rustix::fs::fsync(&b).expect("synced");
                    log.write_all_at(&round.to_le_bytes(), (round - 1) * 8).expect("written");
                    rustix::fs::fsync(&log).expect("synced");
                    synced.store(round, Ordering::SeqCst);
                    // Slow enough that the points differ in what was synced and not only in what was in flight.
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Ledger { stop, synced, thread }
    }

    /// How many rounds are on the disk.
    pub fn synced(&self) -> u64 {
        self.synced.load(Ordering::SeqCst)
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the ledger does not panic");
    }

    /// What is wrong with the ledger in `folder`, in which at least `promised` rounds must be.
    pub fn judge(folder: &Path, promised: u64) -> Result<u64, String> {
        let read = |name: &str| std::fs::read(folder.join(name)).map_err(|error| format!("{name}: {error}"));
        let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let (a, b, log) = (read("A")?, word(&read("B")?), read("log")?);
        let (first, last) = (word(&a), word(&a[4088.min(a.len())..]));
        if first != last {
            return Err(format!("A is torn: {first} and {last}"));
        }
        if first != b && first != b + 1 {
            return Err(format!("A is {first} and B is {b}"));
        }
        let lines: Vec<u64> = log.chunks_exact(8).map(word).collect();
        // The last write may be there before its size is, or the other way round it may be cut off; never a hole.
        let whole = lines.iter().enumerate().take_while(|(index, line)| **line == *index as u64 + 1).count() as u64;
        if whole + 1 < b || whole > b {
            return Err(format!("the log has {whole} lines and B is {b}"));
        }
        if whole < promised {
            return Err(format!("{promised} rounds were synced before the point, the log has {whole}"));
        }
        Ok(whole)
    }
}
