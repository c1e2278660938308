//! Bios whose end comes late, or is never told, on the running kernel.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use replication::DiskId;

use super::layout::Cpu;
use super::loader::Object;
use super::tests::{Aligned, Bench, capture_of, described, direct, rotate, skip};
use super::*;

/// Ends that are not told are waited for only so long. `object` forgets them.
pub(super) fn untold_ends_are_given_up(bench: &Bench, object: &Object<'_>) {
    let mut capture = bench.open_object(&[Variant::Dynptr], RING_BYTES_MIN, object);
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    let file = direct(bench.device());
    for block in 0..100 {
        file.write_all_at(Aligned::random(4096).bytes(), block * 4096).expect("written");
    }
    // Not all hundred: the kernel uses the memory of a bio again, which shows that the one before has ended.
    let under_way = || capture.sum_of_slots(Cpu::SUBMITTED) - capture.sum_of_slots(Cpu::COMPLETED);
    let forgotten = under_way();
    assert!(forgotten > 0, "ends are forgotten");
    let epoch = rotate(&mut capture, Mode::Stream);
    assert_eq!(capture.counters().counts().untold, forgotten, "settled without them");
    assert_eq!(capture.sum_of_slots(Cpu::SUBMITTED), capture.sum_of_slots(Cpu::COMPLETED));
    assert_eq!(capture.status().gap_count, 0, "their bytes are in the ring");
    assert!(capture.settled(epoch));
}

fn run(program: &str, arguments: &[&Path]) -> bool {
    Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
}

/// A device whose requests stand still when the file system that holds its image is frozen.
struct Slow {
    folder: PathBuf,
    device: PathBuf,
}

impl Slow {
    fn of(bench: &Bench, folder: PathBuf) -> Option<Slow> {
        std::fs::create_dir(&folder).expect("created");
        if !run("mkfs.ext4", &[Path::new("-q"), bench.device()]) || !run("mount", &[bench.device(), &folder]) {
            return None;
        }
        let image = folder.join("image");
        File::create(&image).and_then(|file| file.set_len(8 << 20)).expect("an image");
        let made = Command::new("losetup").args(["-f", "--show"]).arg(&image).output();
        let device = made.map(|made| PathBuf::from(String::from_utf8_lossy(&made.stdout).trim())).unwrap_or_default();
        let slow = Slow { folder, device };
        slow.device.exists().then_some(slow)
    }

    fn freeze(&self) -> bool {
        run("fsfreeze", &[Path::new("-f"), &self.folder])
    }

    fn thaw(&self) -> bool {
        run("fsfreeze", &[Path::new("-u"), &self.folder])
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Not all of it has happened if a test failed.
        self.thaw();
        run("losetup", &[Path::new("-d"), &self.device]);
        run("umount", &[Path::new("-l"), &self.folder]);
    }
}

#[test]
fn an_end_that_comes_after_it_was_given_up_breaks_the_stream() {
    let test = "an_end_that_comes_after_it_was_given_up_breaks_the_stream";
    let Some(bench) = Bench::of(test, 64 << 20) else { return };
    let folder = bench.image().with_file_name("slow");
    let Some(slow) = Slow::of(&bench, folder) else { return skip(test, "no ext4 can be mounted") };
    let mut capture = capture_of(&bench, vec![described(2, &slow.device)]);
    let file = direct(&slow.device);
    assert!(slow.freeze(), "the file system is frozen");
    let writer = std::thread::spawn(move || file.write_all_at(Aligned::random(65_536).bytes(), 1 << 20));
    let since = std::time::Instant::now();
    while capture.sum_of_slots(Cpu::SUBMITTED) == capture.sum_of_slots(Cpu::COMPLETED) {
        assert!(since.elapsed().as_secs() < 20, "a write begins");
    }
    rotate(&mut capture, Mode::Stream);
    assert_eq!(capture.counters().counts().untold, 1, "settled without it");
    assert_eq!(capture.status().gap_count, 0);
    assert!(!writer.is_finished() && slow.thaw());
    writer.join().expect("no panic").expect("written");
    assert!(capture.status().gap_count > 0, "it is one that nobody saw submitted");
    let marked = capture.unstreamed(Epoch(0));
    let written = replication::ByteRange::new(1 << 20, 65_536);
    assert!(marked.iter().any(|(disk, range)| *disk == DiskId(2) && range.overlaps(written)), "{marked:?}");
    // It is not counted a second time: the next epochs settle at once.
    let epoch = rotate(&mut capture, Mode::Track);
    assert!(capture.settled(epoch));
    assert_eq!(capture.counters().counts().untold, 1);
}
