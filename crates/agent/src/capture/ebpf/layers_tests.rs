//! Layers on real loop devices: the disk below a logical volume, the disks of an md mirror, each captured once; what must not be
//! protected is refused with what to do instead. A logical volume is a linear mapping of the device mapper, which is all that LVM makes of it; md arrays are
//! built by the kernel's own calls. Kernels without these layers skip: those of the guest tests (`cargo xtask kernels`) have
//! them.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use replication::ChangeKind;
use world::SystemClock;

use super::layout::{Cpu, Flight};
use super::tests::{
    ANY_VARIANT, Aligned, BLKDISCARD, BLKZEROOUT, Bench, capture_of, described, direct, number, range_ioctl, rotate,
    skip, try_range_ioctl,
};
use super::*;

const MEMBER_BYTES: u64 = 64 << 20;
/// Where a volume begins on its disk.
const OFFSET: u64 = 1 << 20;

/// Notes what cannot be tested here. A guest of the test command that has been given the modules must have them.
fn lacking<T>(test: &str, why: &str) -> Option<T> {
    assert!(std::env::var_os("FARSHORE_LAYERS").is_none(), "{test}: {why}");
    skip(&format!("layers/{test}"), why);
    None
}

/// A linear mapping of a part of a device. Gone when dropped.
struct Volume {
    name: String,
    device: PathBuf,
}

impl Volume {
    fn over(test: &str, below: &Path, bytes: u64) -> Option<Volume> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if !Path::new("/sys/class/misc/device-mapper").exists() {
            return lacking(test, "this kernel has no device mapper");
        }
        let name = format!("farshore-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
        let table = format!("0 {} linear {} {}", bytes / 512, below.display(), OFFSET / 512);
        let made = Command::new("dmsetup").args(["create", &name, "--table", &table]).output();
        let made = match made {
            Ok(made) => made,
            Err(error) => return lacking(test, &format!("dmsetup: {error}")),
        };
        let said = String::from_utf8_lossy(&made.stderr);
        let of_that_name = |entry: &std::fs::DirEntry| {
            std::fs::read_to_string(entry.path().join("dm/name")).is_ok_and(|found| found.trim() == name)
        };
        let blocks = std::fs::read_dir("/sys/block").expect("sysfs is there");
        let found = blocks.flatten().find(of_that_name).map(|entry| entry.file_name());
        let kernel_name = found.unwrap_or_else(|| panic!("the volume is there: {said}"));
        Some(Volume { device: Path::new("/dev").join(kernel_name), name })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Whoever looked at the new device may not have closed it yet.
        for _ in 0..50 {
            let removed = Command::new("dmsetup").args(["remove", &self.name]).output();
            if removed.is_ok_and(|removed| removed.status.success()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        eprintln!("the volume {} stays", self.name);
    }
}

/// An md array without metadata on its members, as `mdadm --build` makes it. Gone when dropped.
struct Array {
    device: PathBuf,
    file: Option<File>,
}

const SET_ARRAY_INFO: u64 = 0x4048_0923;
const ADD_NEW_DISK: u64 = 0x4014_0921;
const RUN_ARRAY: u64 = 0x400c_0930;
const STOP_ARRAY: u64 = 0x932;
const CHUNK_BYTES: i32 = 64 << 10;

fn order<const N: usize>(file: &File, request: u64, words: &[i32; N]) -> std::io::Result<()> {
    // SAFETY: each of these requests reads as many bytes from the pointer as stand in its number, which the callers' arrays have;
    // the last reads none.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, words.as_ptr()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

impl Array {
    fn of(test: &str, level: i32, members: &[&Path]) -> Option<Array> {
        static NEXT: AtomicU32 = AtomicU32::new(40);
        if !std::fs::read_to_string("/proc/mdstat").is_ok_and(|text| text.contains(&format!("[raid{level}]"))) {
            return lacking(test, &format!("this kernel has no md raid{level}"));
        }
        let minor = NEXT.fetch_add(1, Ordering::SeqCst);
        let device = PathBuf::from(format!("/dev/md{minor}"));
        if !device.exists() {
            let made = Command::new("mknod").arg(&device).args(["b", "9", &minor.to_string()]).status();
            assert!(made.expect("mknod runs").success());
        }
        let file =
            OpenOptions::new().read(true).write(true).open(&device).expect("md makes an array when it is opened");
        let (count, kib) = (members.len() as i32, (MEMBER_BYTES / 1024) as i32);
        // Version, time, level, size, disks, minor, without metadata, clean, layout, chunk.
        let mut info = [0; 18];
        (info[1], info[4], info[5], info[6], info[7], info[8]) = (90, level, kib, count, count, minor.cast_signed());
        (info[9], info[11], info[12], info[13]) = (1, 1, count, count);
        info[17] = if level == 0 { CHUNK_BYTES } else { 0 };
        order(&file, SET_ARRAY_INFO, &info).expect("described");
        for (number, member) in members.iter().enumerate() {
            let id = std::fs::metadata(member).expect("there").rdev();
            let (major, minor) = (rustix::fs::major(id).cast_signed(), rustix::fs::minor(id).cast_signed());
            // Active and in sync.
            order(&file, ADD_NEW_DISK, &[number as i32, major, minor, number as i32, 6]).expect("a member");
        }
        order(&file, RUN_ARRAY, &[0; 3]).expect("it runs");
        Some(Array { device, file: Some(file) })
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        for _ in 0..50 {
            if order(&file, STOP_ARRAY, &[0; 1]).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        eprintln!("{} stays", self.device.display());
    }
}

fn refusal(bench: &Bench, disks: Vec<EbpfDisk>) -> String {
    let config = EbpfConfig {
        machine: MachineId([1; 16]),
        pins: bench.pins().to_owned(),
        ring_bytes_max: RING_BYTES_MIN,
        variants: ANY_VARIANT.to_vec(),
    };
    match EbpfCapture::open(disks, Arc::new(SystemClock), &config) {
        Err(OpenEbpfError::Disk { why, .. }) => why,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it is captured"),
    }
}

/// What was captured of each disk, in order.
fn captured(capture: &mut EbpfCapture) -> Vec<(DiskId, ByteRange)> {
    let mut found = Vec::new();
    while let Some(captured) = capture.next() {
        found.extend(captured.kinds.iter().filter_map(ChangeKind::range).map(|range| (captured.disk, range)));
    }
    found
}

#[test]
fn the_disk_below_a_logical_volume_is_captured() {
    let test = "the_disk_below_a_logical_volume_is_captured";
    let Some(disk) = Bench::of(test, MEMBER_BYTES) else { return };
    let bytes = MEMBER_BYTES - 2 * OFFSET;
    let Some(volume) = Volume::over(test, disk.device(), bytes) else { return };
    let both = vec![described(1, &volume.device), described(2, disk.device())];
    let why = refusal(&disk, both);
    assert!(why.contains("lies on") && why.contains("protect one of them"), "{why}");
    let mut capture = capture_of(&disk, vec![described(2, disk.device())]);
    let file = direct(&volume.device);
    for index in 0..20u64 {
        file.write_all_at(Aligned::random(8192).bytes(), index << 17).expect("written");
    }
    let expected: Vec<_> = (0..20).map(|index| (DiskId(2), ByteRange::new((index << 17) + OFFSET, 8192))).collect();
    assert_eq!(captured(&mut capture), expected, "each write once, where it lies on the disk");
    assert_eq!(capture.status().gap_count, 0);
    // Settles only if all of them are known to have ended.
    rotate(&mut capture, Mode::Stream);
    assert!(!capture.has_unstreamed(Epoch(0)));
}

#[test]
fn a_mirror_is_captured_once_on_each_of_its_disks() {
    let test = "a_mirror_is_captured_once_on_each_of_its_disks";
    let (Some(one), Some(two)) = (Bench::of(test, MEMBER_BYTES), Bench::of(test, MEMBER_BYTES)) else { return };
    let Some(array) = Array::of(test, 1, &[one.device(), two.device()]) else { return };
    let why = refusal(&one, vec![described(1, &array.device), described(2, two.device())]);
    assert!(why.contains("lies on"), "{why}");
    let mut capture = capture_of(&one, vec![described(1, one.device()), described(2, two.device())]);
    let file = direct(&array.device);
    for index in 0..20u64 {
        file.write_all_at(Aligned::random(8192).bytes(), index << 17).expect("written");
    }
    let found = captured(&mut capture);
    for disk in [DiskId(1), DiskId(2)] {
        let of_disk: Vec<_> = found.iter().filter(|(id, _)| *id == disk).map(|(_, range)| *range).collect();
        let expected: Vec<_> = (0..20).map(|index| ByteRange::new(index << 17, 8192)).collect();
        assert_eq!(of_disk, expected, "{disk}: each write once");
    }
    assert_eq!(capture.status().gap_count, 0);
    rotate(&mut capture, Mode::Stream);
}

#[test]
fn a_member_of_stripes_is_refused() {
    let test = "a_member_of_stripes_is_refused";
    let (Some(one), Some(two)) = (Bench::of(test, MEMBER_BYTES), Bench::of(test, MEMBER_BYTES)) else { return };
    let Some(array) = Array::of(test, 0, &[one.device(), two.device()]) else { return };
    let name = array.device.file_name().expect("a device").to_string_lossy().into_owned();
    let why = refusal(&one, vec![described(1, one.device())]);
    assert!(why.contains(&format!("protect {name} itself")), "{why}");
}

/// Writes of many sizes, discards and zeroes to a device that is made of others, protected itself: all is in the stream with
/// its bytes, and all ends are known.
fn captured_by_itself(bench: &Bench, device: &Path) {
    let mut capture = capture_of(bench, vec![described(1, device)]);
    let file = direct(device);
    let bytes = described(1, device).geometry.size_bytes;
    // Discards are chains of bios, and old kernels tell of the end of the last one only.
    let (mut discards, mut untold) = (0, 0);
    for round in 0..60u64 {
        let len = [512, 8192, 65_536 + 512, 1 << 20, (3 << 20) + 512, 4096][round as usize % 6];
        let range = ByteRange::new(number() % ((bytes - len) / 512) * 512, len);
        let data = Aligned::random(len as usize);
        let what = match round % 10 {
            8 => {
                // Refused where the disks below have no discards.
                let _ = try_range_ioctl(&file, BLKDISCARD, range.start, len);
                discards += 1;
                "discard"
            }
            9 => {
                range_ioctl(&file, BLKZEROOUT, range.start, len);
                "zeroes"
            }
            _ => {
                file.write_all_at(data.bytes(), range.start).expect("written");
                "write"
            }
        };
        let mut found = 0;
        while let Some(captured) = capture.next() {
            for kind in &captured.kinds {
                let at = kind.range().expect("no markers here");
                assert!(range.start <= at.start && at.end() <= range.end(), "round {round}: {what} {range:?}: {at:?}");
                found += at.len;
                if let ChangeKind::Write { data: bytes, .. } = kind
                    && what == "write"
                {
                    assert!(data.bytes()[at.within(range.start)] == bytes[..], "round {round}: its bytes");
                }
            }
            capture.release(captured.end);
        }
        // Zeroes are written when the layers below turn out not to have a request for them.
        let once_or_again = found == len || what == "zeroes" && found == 2 * len;
        assert!(once_or_again || what == "discard" && found == 0, "round {round}: {what} {range:?}: {found} bytes");
        let begun = capture.sum_of_slots(Cpu::SUBMITTED);
        let ended = capture.sum_of_slots(Cpu::COMPLETED);
        let under_way =
            kernel::walk::<{ Flight::BYTES }>(capture.installed.flights.as_fd()).expect("they can be read").entries;
        let context = (capture.gaps(), begun, ended, under_way);
        if what == "discard" && !support::has_large_records() {
            untold = begun - ended;
        }
        assert!(begun - ended <= untold, "round {round}: {what} {range:?}: {context:?}");
        assert_eq!(capture.status().gap_count, 0, "round {round}: {what} {range:?}: {context:?}");
    }
    rotate(&mut capture, Mode::Stream);
    assert!(capture.counters().counts().untold <= untold.min(2 * discards), "all others are known to have ended");
}

#[test]
fn a_logical_volume_is_captured_by_itself() {
    let test = "a_logical_volume_is_captured_by_itself";
    let Some(disk) = Bench::of(test, MEMBER_BYTES) else { return };
    let Some(volume) = Volume::over(test, disk.device(), MEMBER_BYTES - 2 * OFFSET) else { return };
    captured_by_itself(&disk, &volume.device);
}

#[test]
fn a_mirror_is_captured_by_itself() {
    let test = "a_mirror_is_captured_by_itself";
    let (Some(one), Some(two)) = (Bench::of(test, MEMBER_BYTES), Bench::of(test, MEMBER_BYTES)) else { return };
    let Some(array) = Array::of(test, 1, &[one.device(), two.device()]) else { return };
    captured_by_itself(&one, &array.device);
}

#[test]
fn stripes_are_captured_by_themselves() {
    let test = "stripes_are_captured_by_themselves";
    let (Some(one), Some(two)) = (Bench::of(test, MEMBER_BYTES), Bench::of(test, MEMBER_BYTES)) else { return };
    let Some(array) = Array::of(test, 0, &[one.device(), two.device()]) else { return };
    captured_by_itself(&one, &array.device);
}
