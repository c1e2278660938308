//! Load for a comparison with somebody else's record of the same writes. In a guest whose disk is logged by the emulator,
//! `cargo xtask kernels` runs this and then compares the log with what was captured (`xtask/src/kernels/oracle.rs`).
//!
//! What is captured is written to another disk:
//!
//! ```text
//! 8 bytes   "FSSTREAM"
//! u64       changes of the first load      each u64 little endian
//! u64       changes
//! changes   u64 kind (1 write, 2 zeroes, 3 discard), u64 start, u64 bytes, the data of a write
//! ```

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use replication::ChangeKind;
use world::{FileDevice, SystemClock};

use super::tests::{ANY_VARIANT, Aligned, BLKDISCARD, BLKZEROOUT, described, number, range_ioctl, rotate};
use super::*;

/// The disk that is logged. Everything on it is lost.
const LOGGED: &str = "FARSHORE_LOGGED_DISK";
/// The disk for what was captured.
const STREAM: &str = "FARSHORE_STREAM_DISK";

const WRITERS: u64 = 4;
const BATCHES: u64 = 40;
const FILES: u64 = 60;

/// Not a test of its own: see the module's documentation.
#[test]
fn load_for_the_oracle() {
    let (Ok(logged), Ok(stream)) = (std::env::var(LOGGED), std::env::var(STREAM)) else { return };
    let logged = PathBuf::from(logged);
    let pins = PathBuf::from(format!("/sys/fs/bpf/farshore-oracle-{}", std::process::id()));
    let config = EbpfConfig {
        machine: MachineId([1; 16]),
        pins: pins.clone(),
        ring_bytes_max: 64 << 20,
        variants: ANY_VARIANT.to_vec(),
    };
    let mut capture = EbpfCapture::open(vec![described(1, &logged)], Arc::new(SystemClock), &config).expect("opens");
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();

    let mut kinds = Vec::new();
    during(&mut capture, &mut kinds, || batches(&logged));
    let first = kinds.len();
    during(&mut capture, &mut kinds, || files(&logged));
    assert_eq!(capture.status().gap_count, 0);
    assert!(!capture.has_unstreamed(epoch), "everything is in the stream");
    rotate(&mut capture, Mode::Stream);
    drop(capture);
    detach(&pins).expect("taken down");
    write_down(&kinds, first, Path::new(&stream)).expect("written");
}

/// Runs `load` and takes what is captured meanwhile.
fn during(capture: &mut EbpfCapture, kinds: &mut Vec<ChangeKind>, load: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let running = scope.spawn(load);
        loop {
            let over = running.is_finished();
            while let Some(captured) = capture.next() {
                capture.release(captured.end);
                kinds.extend(captured.kinds);
            }
            if over {
                return running.join().expect("the load does not panic");
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
}

/// Batches of requests at a time, each by several threads in parts of their own, with a flush after each. So whatever
/// lies before a flush was ended when anything behind it began.
fn batches(logged: &Path) {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    let file = OpenOptions::new().read(true).write(true).custom_flags(direct).open(logged).expect("opens");
    let part = FileDevice::open_direct(logged).expect("opens").size() / WRITERS;
    for batch in 0..BATCHES {
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let file = &file;
                scope.spawn(move || {
                    for request in 0..3 {
                        let len = match (batch + writer + request) % 6 {
                            0 => 512,
                            1 => 4096,
                            2 => 4096 + 512,
                            3 => 65_536,
                            4 => (1 + number() % 200) * 512,
                            _ => (1 << 20) + 512,
                        };
                        let start = writer * part + number() % ((part - len) / 512) * 512;
                        match number() % 20 {
                            0 => range_ioctl(file, BLKDISCARD, start, len),
                            1 => range_ioctl(file, BLKZEROOUT, start, len),
                            _ => file.write_all_at(Aligned::random(len as usize).bytes(), start).expect("written"),
                        }
                    }
                });
            }
        });
        rustix::fs::fdatasync(&file).expect("flushed");
    }
}

/// A file system made, used and taken out of service. No file is written twice without a sync between, so that no page
/// changes while it is on its way.
fn files(logged: &Path) {
    let folder = tempfile::tempdir().expect("a folder");
    let succeeds = |program: &str, words: &[&str]| {
        let status = Command::new(program).args(words).args([logged, folder.path()]).status();
        assert!(status.is_ok_and(|status| status.success()), "{program} works");
    };
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(logged).status();
    assert!(made.is_ok_and(|status| status.success()), "a file system can be made");
    succeeds("mount", &["-t", "ext4"]);
    let next = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let index = u64::from(next.fetch_add(1, Ordering::SeqCst));
                    if index >= FILES {
                        return;
                    }
                    let path = folder.path().join(format!("file-{index}"));
                    let mut file = File::create(&path).expect("created");
                    let data = Aligned::random(1 + (number() % 100_000) as usize);
                    file.write_all(data.bytes()).expect("written");
                    if index % 3 == 0 {
                        rustix::fs::fsync(&file).expect("synced");
                    }
                    if index % 7 == 6 {
                        let _ = std::fs::remove_file(folder.path().join(format!("file-{}", index - 5)));
                    }
                }
            });
        }
    });
    let status = Command::new("umount").arg(folder.path()).status();
    assert!(status.is_ok_and(|status| status.success()), "unmounted");
}

fn write_down(kinds: &[ChangeKind], first: usize, stream: &Path) -> std::io::Result<()> {
    let device = OpenOptions::new().write(true).open(stream)?;
    let mut out = BufWriter::new(&device);
    out.write_all(b"FSSTREAM")?;
    let words =
        |out: &mut BufWriter<_>, words: &[u64]| words.iter().try_for_each(|word| out.write_all(&word.to_le_bytes()));
    words(&mut out, &[first as u64, kinds.len() as u64])?;
    for kind in kinds {
        match kind {
            ChangeKind::Write { range, data } => {
                words(&mut out, &[1, range.start, range.len])?;
                out.write_all(data)?;
            }
            ChangeKind::Zero { range } => words(&mut out, &[2, range.start, range.len])?,
            ChangeKind::Discard { range } => words(&mut out, &[3, range.start, range.len])?,
            other => panic!("nobody asked for {other:?}"),
        }
    }
    out.flush()?;
    drop(out);
    rustix::fs::fdatasync(&device).map_err(Into::into)
}
