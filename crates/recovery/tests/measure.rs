//! Figures about branches: opening after a day of history, and warm random reads.
//!
//! `FARSHORE_MEASURE=FOLDER cargo test --release -p recovery --test measure build_a_day -- --nocapture`, then the same with
//! `open_a_day` (a process of its own, so that its memory is its own) and `serve_warm`.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod history;

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use history::{CHAIN, DISK, History, TestClock, World, noise};
use recovery::{BranchConfig, BranchHost, BranchRunner, export};
use replication::{Generation, PointTime};
use vault::keys::PassphraseCost;
use vault::{CheckpointWish, Credential, Delta, FolderStore, Moment, ObjectName, Store, StoreError, Vault};
use world::{BlockDevice, Clock, Entropy, RealFiles, SystemClock, SystemEntropy};

const TIB: u64 = 1 << 40;
const SEALS: u64 = 17_280;

fn folder(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("FARSHORE_MEASURE").map(PathBuf::from);
    if folder.is_none() {
        println!("SKIPPED: {test}: set FARSHORE_MEASURE to a folder for figures");
    }
    folder
}

/// Counts what is read.
struct Counting {
    inner: Arc<dyn Store>,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Store for Counting {
    fn create(&self, name: &ObjectName, parts: &[bytes::Bytes]) -> Result<(), StoreError> {
        self.inner.create(name, parts)
    }

    fn read(&self, name: &ObjectName, range: std::ops::Range<u64>) -> Result<bytes::Bytes, StoreError> {
        let bytes = self.inner.read(name, range)?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

fn store(folder: &std::path::Path) -> Arc<dyn Store> {
    let files = Arc::new(RealFiles::new(folder.join("vault")));
    Arc::new(FolderStore::new(files, &SystemEntropy, "a folder"))
}

#[test]
fn build_a_day() {
    let Some(folder) = folder("build_a_day") else { return };
    std::fs::create_dir_all(folder.join("vault")).unwrap();
    let test_clock = Arc::new(TestClock(AtomicU64::new(1)));
    let clock: Arc<dyn Clock> = Arc::clone(&test_clock) as Arc<dyn Clock>;
    let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
    let cost = PassphraseCost { memory_kib: 8, passes: 1, lanes: 1 };
    let (vault, _) = Vault::create(store(&folder), "passphrase", cost, &entropy, &clock).unwrap();
    let world = World { folder: tempfile::tempdir().unwrap(), vault, clock, test_clock, entropy };
    let mut history: History<'_> = world.protect(&[TIB]);
    let source = Arc::new(vault::view_source::FrameSource::new(
        Arc::clone(world.store()),
        Arc::clone(world.vault.keys()),
        vault::view_source::CacheBytes::default(),
    ));
    let session = Arc::new(world.vault.owner_session(&world.entropy, &world.clock).unwrap());
    let begun = Instant::now();
    for seal in 0..SEALS {
        for write in 0..16 {
            let place = u64::from_le_bytes(noise(seal * 16 + write, 8).try_into().unwrap()) % (TIB / 4096) * 4096;
            history.write(DISK, place, noise(seal + write, 4096));
        }
        history.second();
        let layers = history.writer.state().layers.clone();
        if let Some(picked) = vault::merge::plan_merges(&layers) {
            let picked: Vec<_> = picked.into_iter().map(|index| layers[index].clone()).collect();
            let merged = vault::merge::merge_layers(&source, &picked, &session, CHAIN, Generation(1)).unwrap();
            let (through, proven_through) = (history.writer.through(), history.writer.proven_through());
            history
                .writer
                .commit(CheckpointWish::WhenDue, |_| {
                    Ok(Delta { through, proven_through, layers: vec![merged.clone()], ..Delta::default() })
                })
                .unwrap();
        }
    }
    println!("{SEALS} seals: {:.1?}, {} live layers", begun.elapsed(), history.writer.state().layers.len());
}

fn host(folder: &std::path::Path, store: Arc<dyn Store>) -> BranchHost {
    std::fs::create_dir_all(folder.join("host")).unwrap();
    let vault = Vault::open(store).unwrap().unlock(Credential::Passphrase("passphrase")).unwrap();
    BranchHost::new(vault, folder.join("host"), Arc::new(SystemClock), Arc::new(SystemEntropy), BranchConfig::default())
}

fn status_kib(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn open_a_day() {
    let Some(folder) = folder("open_a_day") else { return };
    let counting = Arc::new(Counting { inner: store(&folder), reads: AtomicU64::new(0), bytes: AtomicU64::new(0) });
    let host = host(&folder, Arc::clone(&counting) as Arc<dyn Store>);
    let middle = Moment::At(PointTime((history::EPOCH + SEALS / 2) * 1_000_000_000));
    for (name, moment) in [("latest", Moment::Latest), ("the middle of the day", middle)] {
        counting.reads.store(0, Ordering::Relaxed);
        counting.bytes.store(0, Ordering::Relaxed);
        let begun = Instant::now();
        let branch = host.open(CHAIN, &moment, "measured").unwrap();
        let opened = begun.elapsed();
        let (reads, bytes) = (counting.reads.load(Ordering::Relaxed), counting.bytes.load(Ordering::Relaxed));
        let mut block = [0; 4096];
        let begun = Instant::now();
        branch.disk(DISK).unwrap().read_at(TIB / 2, &mut block).unwrap();
        println!(
            "{name}: opened in {opened:.1?} with {reads} requests and {} KiB; first read {:.1?}; RSS {} MiB, peak {} MiB",
            bytes >> 10,
            begun.elapsed(),
            status_kib("VmRSS") >> 10,
            status_kib("VmHWM") >> 10
        );
    }
}

/// Serves a branch and, as a file, what it holds, for `measure.sh`-like comparisons: prints the socket and waits.
#[test]
fn serve_warm() {
    let Some(folder) = folder("serve_warm") else { return };
    let len = 256u64 << 20;
    let world = World { clock: Arc::new(SystemClock), ..World::new() };
    // The disk is written through a branch of an empty history, and that one is branched again.
    let config = BranchConfig {
        cache: vault::view_source::CacheBytes { data: 320 << 20, ..vault::view_source::CacheBytes::default() },
        ..BranchConfig::default()
    };
    let host = world.host_with(world.vault.clone(), config);
    let mut begin = world.protect(&[len]);
    begin.write(DISK, 0, noise(1, 4096));
    begin.second();
    let first = Arc::new(host.open(CHAIN, &Moment::Latest, "first").unwrap());
    let runner = BranchRunner::start(Arc::clone(&first)).unwrap();
    let mut file = std::fs::File::create(folder.join("raw")).unwrap();
    let device = first.disk(DISK).unwrap();
    for start in (0..len).step_by(1 << 20) {
        let data = noise(start, 1 << 20);
        device.write_at(start, &data).unwrap();
        file.write_all(&data).unwrap();
    }
    first.core().seal_all(recovery::SealWish::Final).unwrap();
    drop(runner);
    let branch = Arc::new(host.open(first.id(), &Moment::Latest, "warm").unwrap());
    let _runner = BranchRunner::start(Arc::clone(&branch)).unwrap();
    let device = branch.disk(DISK).unwrap();
    let mut buffer = vec![0; 1 << 20];
    for pass in ["cold", "warm"] {
        let begun = Instant::now();
        for start in (0..len).step_by(1 << 20) {
            device.read_at(start, &mut buffer).unwrap();
        }
        println!("{pass} sequential read: {:.0} MB/s", len as f64 / 1e6 / begun.elapsed().as_secs_f64());
    }
    let mut random = 1u64;
    let mut block = [0; 4096];
    let begun = Instant::now();
    for _ in 0..500_000 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        device.read_at((random >> 20) % (len / 4096) * 4096, &mut block).unwrap();
    }
    println!("warm random 4 KiB reads in the process: {:.0} ns each", begun.elapsed().as_nanos() as f64 / 5e5);
    let server = export::serve(&branch, None).unwrap();
    let ours = export::socket_path(&branch);
    println!("ours, over NBD: {:.0} reads/s", reads_per_second(&ours, "disk0", len));
    let theirs = folder.join("qemu.sock");
    let qemu = std::process::Command::new("qemu-nbd")
        .args(["-f", "raw", "-r", "-t", "-e", "8", "--cache=writeback", "-k"])
        .arg(&theirs)
        .arg(folder.join("raw"))
        .spawn();
    if let Ok(mut qemu) = qemu {
        while !theirs.exists() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        for _ in 0..3 {
            let (a, b) = (reads_per_second(&ours, "disk0", len), reads_per_second(&theirs, "", len));
            println!("ours {a:.0}, qemu-nbd on raw {b:.0} reads/s: {:.2}", a / b);
        }
        qemu.kill().unwrap();
        qemu.wait().unwrap();
    }
    server.stop();
}

/// Warm random 4 KiB reads from two clients at once.
fn reads_per_second(socket: &std::path::Path, name: &str, len: u64) -> f64 {
    const READS: u64 = 40_000;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            scope.spawn(move || {
                let client = nbd::Client::connect_unix(socket, name).unwrap();
                let mut random = thread + 1;
                let mut block = [0; 4096];
                for _ in 0..READS {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    client.read_at((random >> 20) % (len / 4096) * 4096, &mut block).unwrap();
                }
            });
        }
    });
    2.0 * READS as f64 / begun.elapsed().as_secs_f64()
}
