//! The capture on the running kernel: real bios to a loop device, both variants, without a link.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use replication::{ChangeKind, DiskIdentity};
use world::{Entropy, SystemClock, SystemEntropy};

use super::epochs::uncommitted;
use super::loader::Object;
use super::*;

const DISK_BYTES: u64 = 64 << 20;
const ALIGN: usize = 4096;

/// Says in a way that the test command collects why a test did not run.
pub(super) fn skip(test: &str, why: &str) {
    use std::io::Write;
    let line = format!("SKIPPED: {test}: {why}\n");
    print!("{line}");
    if let Ok(path) = std::env::var("FARSHORE_SKIP_LOG") {
        let log = OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes())).expect("the skip is noted");
    }
}

/// Whether `variant` can be tested here; a note if not.
pub(super) fn can_test(test: &str, variant: Variant) -> bool {
    let can = variant == Variant::Bounded || support::has_large_records();
    if !can {
        skip(&format!("large records/{test}"), "this kernel is older than 5.19");
    }
    can
}

pub(super) const ANY_VARIANT: [Variant; 2] = [Variant::Dynptr, Variant::Bounded];

/// A loop device and a place for pins, both gone when this is dropped.
pub(super) struct Bench {
    folder: tempfile::TempDir,
    device: PathBuf,
    pins: PathBuf,
    bytes: u64,
}

impl Bench {
    fn new(test: &str) -> Option<Bench> {
        Bench::of(test, DISK_BYTES)
    }

    /// One whose disk has `bytes` bytes.
    pub(super) fn of(test: &str, bytes: u64) -> Option<Bench> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        if let Err(why) = support::check_machine() {
            skip(test, &why);
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("disk.img");
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
        let made = Command::new("losetup").args(["-f", "--show"]).arg(&image).output();
        let device = match made {
            Ok(made) if made.status.success() => PathBuf::from(String::from_utf8_lossy(&made.stdout).trim()),
            _ => {
                skip(test, "no loop device can be made");
                return None;
            }
        };
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let pins = PathBuf::from(format!("/sys/fs/bpf/farshore-test-{}-{number}", std::process::id()));
        Some(Bench { folder, device, pins, bytes })
    }

    fn open(&self, variants: &[Variant], ring_bytes_max: u64) -> EbpfCapture {
        self.open_object(variants, ring_bytes_max, &loader::object())
    }

    pub(super) fn open_object(&self, variants: &[Variant], ring_bytes_max: u64, object: &Object<'_>) -> EbpfCapture {
        let geometry = DiskGeometry {
            disk: DiskId(5),
            identity: DiskIdentity { serial: "loop".to_owned(), fingerprint: [0; 16] },
            path: self.device.display().to_string(),
            size_bytes: self.bytes,
            logical_sector_bytes: 512,
            physical_sector_bytes: 512,
        };
        let disk = EbpfDisk { geometry, path: self.device.clone() };
        let config = EbpfConfig {
            machine: MachineId([1; 16]),
            pins: self.pins.clone(),
            ring_bytes_max,
            variants: variants.to_vec(),
        };
        EbpfCapture::open_object(vec![disk], Arc::new(SystemClock), &config, object)
            .unwrap_or_else(|error| panic!("{error:?}"))
    }

    pub(super) fn device(&self) -> &Path {
        &self.device
    }

    pub(super) fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    pub(super) fn pins(&self) -> &Path {
        &self.pins
    }

    pub(super) fn file(&self) -> File {
        direct(&self.device)
    }

    /// Requests to change the device that have ended, as the block layer counts them.
    fn ended_requests(&self) -> u64 {
        let name = self.device.file_name().expect("a name").to_string_lossy().into_owned();
        let counters = std::fs::read_to_string(format!("/sys/block/{name}/stat")).expect("counters");
        // Writes and discards: the fifth and the twelfth.
        let counters: Vec<u64> = counters.split_whitespace().map(|it| it.parse().expect("a number")).collect();
        counters[4] + counters.get(11).expect("Linux 4.18 and newer")
    }

    fn content(&self) -> Vec<u8> {
        let device = FileDevice::open_direct(&self.device).expect("the device opens");
        let mut content = vec![0; self.bytes as usize];
        device.read_at(0, &mut content).expect("readable");
        content
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        match detach(&self.pins) {
            Ok(()) | Err(DetachError::Nothing(_)) => {}
            Err(error) => eprintln!("{error}"),
        }
        // A partition outlives the image otherwise.
        for part in ["2", "3"] {
            let _ = Command::new("delpart").arg(&self.device).arg(part).stderr(std::process::Stdio::null()).status();
        }
        let _ = Command::new("losetup").arg("-d").arg(&self.device).stderr(std::process::Stdio::null()).status();
    }
}

/// Opens past the page cache.
pub(super) fn direct(device: &Path) -> File {
    let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
    OpenOptions::new().read(true).write(true).custom_flags(direct).open(device).expect("the device opens")
}

/// Memory that O_DIRECT takes.
pub(super) struct Aligned(Vec<u8>, usize, usize);

impl Aligned {
    pub(super) fn random(len: usize) -> Aligned {
        let mut bytes = vec![0; len + ALIGN];
        SystemEntropy.fill(&mut bytes);
        let shift = bytes.as_ptr().align_offset(ALIGN);
        Aligned(bytes, shift, len)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

pub(super) fn number() -> u64 {
    u64::from_le_bytes((&SystemEntropy as &dyn Entropy).bytes())
}

/// `BLKDISCARD` or `BLKZEROOUT` of a range.
pub(super) fn range_ioctl(file: &File, request: u64, start: u64, len: u64) {
    try_range_ioctl(file, request, start, len).expect("the device can");
}

pub(super) fn try_range_ioctl(file: &File, request: u64, start: u64, len: u64) -> std::io::Result<()> {
    let range = [start, len];
    // SAFETY: both requests read two 64-bit integers from the pointer, which is valid for the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, range.as_ptr()) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

pub(super) const BLKDISCARD: u64 = 0x1277;
pub(super) const BLKZEROOUT: u64 = 0x127f;

impl EbpfCapture {
    /// One of the counters that each slot has.
    pub(super) fn sum_of_slots(&self, at: usize) -> u64 {
        (0..SLOTS).map(|slot| self.sum(at + 8 * slot)).fold(0, u64::wrapping_add)
    }
}

pub(super) fn settle(capture: &mut EbpfCapture, epoch: Epoch) {
    let since = std::time::Instant::now();
    while !capture.settled(epoch) {
        assert!(since.elapsed().as_secs() < 20, "{epoch:?} does not settle");
        std::thread::yield_now();
    }
}

pub(super) fn rotate(capture: &mut EbpfCapture, mode: Mode) -> Epoch {
    let since = std::time::Instant::now();
    loop {
        if let Some(epoch) = capture.rotate(mode) {
            settle(capture, epoch);
            return epoch;
        }
        assert!(since.elapsed().as_secs() < 20, "no rotation");
        std::thread::yield_now();
    }
}

fn apply(replica: &mut [u8], captured: &Captured) {
    for kind in &captured.kinds {
        match kind {
            ChangeKind::Write { range, data } => replica[range.within(0)].copy_from_slice(data),
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => replica[range.within(0)].fill(0),
            _ => {}
        }
    }
}

fn drain(capture: &mut EbpfCapture, replica: &mut [u8]) -> usize {
    let mut count = 0;
    while let Some(captured) = capture.next() {
        apply(replica, &captured);
        capture.release(captured.end);
        count += 1;
    }
    count
}

fn streams_what_is_written(test: &str, variant: Variant) {
    if !can_test(test, variant) {
        return;
    }
    let Some(bench) = Bench::new(test) else { return };
    check_streaming(&bench, bench.open(&[variant], 32 << 20), 400);
}

/// Writes to the disk, one request after the other, and compares each with what is captured of it.
pub(super) fn check_streaming(bench: &Bench, mut capture: EbpfCapture, rounds: u64) {
    assert_eq!(capture.continuity(), Continuity::Fresh);
    let file = bench.file();
    file.write_all_at(Aligned::random(8192).bytes(), 0).expect("written");
    assert!(capture.next().is_none(), "nothing streams before the first rotation");
    let first = capture.status().epoch;
    assert!(capture.has_unstreamed(first));
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    let mut replica = bench.content();
    let unseen = |capture: &EbpfCapture| bench.ended_requests().wrapping_sub(capture.sum(Cpu::ENDS));
    let unseen_before = unseen(&capture);
    for round in 0..rounds {
        let len = match round % 8 {
            0 => 512,
            1 => 1536,
            2 => 4096,
            3 => 4096 + 512,
            4 => 65_536 + 2048,
            5 => 1 << 20,
            6 => (number() % 300 + 1) as usize * 512,
            _ => (3 << 20) + 512,
        };
        let start = number() % ((bench.bytes - len as u64) / 512) * 512;
        let range = ByteRange::new(start, len as u64);
        let mut expected = vec![0; len];
        match round % 50 {
            48 => range_ioctl(&file, BLKDISCARD, start, len as u64),
            49 => range_ioctl(&file, BLKZEROOUT, start, len as u64),
            _ => {
                let data = Aligned::random(len);
                file.write_all_at(data.bytes(), start).expect("written");
                expected.copy_from_slice(data.bytes());
            }
        }
        let current = capture.status().epoch;
        assert!(capture.map(uncommitted(slot_of(current)), 0).covers(range), "every write is marked");
        assert!(drain(&mut capture, &mut replica) > 0, "round {round}: every write is in the ring at once");
        assert!(replica[range.within(0)] == expected, "round {round}: every write is in the ring with its bytes");
        let begun = capture.sum_of_slots(Cpu::SUBMITTED);
        let ended = capture.sum_of_slots(Cpu::COMPLETED);
        if begun != ended {
            // Some kernels run no program where an interrupt ends the request on top of process 1. The next rotation gives
            // such bios up. The block layer's own counters, which lag a little, tell them from a mistake of ours.
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(
                unseen(&capture) > unseen_before,
                "what has ended is known to have ended: {ended} of {begun}, round {round}, {range:?}, {causes:?}",
                causes = (capture.gaps(), capture.installed.misses())
            );
            println!("round {round}: the kernel ended a request and ran no program");
        }
        // A mark that is missing shows only where no earlier write left one.
        if round % 25 == 20 {
            let next = rotate(&mut capture, Mode::Stream);
            let (marked, counts) = (capture.unstreamed(Epoch(0)), capture.counters().counts());
            assert!(marked.is_empty(), "round {round}: {marked:?}, {counts:?}, {:?}", capture.gaps());
            capture.clear(Epoch(next.0 - 1));
        }
    }
    assert!(capture.mark(MarkerKind::Crash, "here"));
    let marker = capture.next().expect("the marker");
    assert_eq!(marker.kinds, [ChangeKind::Marker { kind: MarkerKind::Crash, name: "here".to_owned() }]);
    capture.release(marker.end);
    let status = capture.status();
    assert_eq!((status.gap_count, status.ring_bytes_used, status.mode), (0, 0, Mode::Stream));
    assert!(replica == bench.content(), "the replica is the disk");
    let statistics = capture.counters().counts();
    assert!(statistics.changes > rounds && statistics.failed == 0, "{statistics:?}");
}

#[test]
fn one_record_a_bio_carries_every_write() {
    streams_what_is_written("one_record_a_bio_carries_every_write", Variant::Dynptr);
}

#[test]
fn small_records_carry_every_write() {
    streams_what_is_written("small_records_carry_every_write", Variant::Bounded);
}

fn a_full_ring_breaks_and_resumes(test: &str, variant: Variant) {
    if !can_test(test, variant) {
        return;
    }
    let Some(bench) = Bench::new(test) else { return };
    check_full_ring(&bench, bench.open(&[variant], RING_BYTES_MIN), 0);
}

/// Writes more than the ring holds, each write to a granule of its own: `more` beyond what is needed for that.
pub(super) fn check_full_ring(bench: &Bench, mut capture: EbpfCapture, more: u64) {
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    let mut replica = bench.content();
    let file = bench.file();
    let write = |index: u64, len: usize| {
        file.write_all_at(Aligned::random(len).bytes(), index << 16).expect("written");
    };
    // More than the ring holds; then less, which would fit.
    let large = 1..200;
    let small = 300..301 + more;
    large.clone().for_each(|index| write(index, 1 << 16));
    small.clone().for_each(|index| write(index, 512));
    let status = capture.status();
    let mut written = large.chain(small);
    while let Some(captured) = capture.next() {
        let ChangeKind::Write { range, .. } = &captured.kinds[0] else { panic!("{captured:?}") };
        // One was ended before the next began: a stream that lacks one of them shows a disk that never was.
        assert_eq!(Some(range.start >> 16), written.next(), "nothing behind the break is handed out");
        apply(&mut replica, &captured);
        capture.release(captured.end);
    }
    let missing: Vec<u64> = written.collect();
    assert!(missing.first().is_some_and(|first| (2..200).contains(first)), "the ring was full");
    assert!(status.gap_count > 0 && status.gap_cause == Some(GapCause::Overflow) && status.mode == Mode::Track);
    assert!(capture.has_unstreamed(epoch));
    let named = capture.unstreamed(epoch);
    let is_named = |at: u64| named.iter().any(|(_, range)| range.overlaps(ByteRange::new(at, 512)));
    assert!(missing.iter().all(|index| is_named(index << 16)), "what the stream lacks is named");
    // A rotation ends the break; what follows streams again, and the maps name what was lost.
    let next = rotate(&mut capture, Mode::Stream);
    write(0, 4096);
    let captured = capture.next().expect("streams again");
    assert_eq!(captured.epoch, next);
    apply(&mut replica, &captured);
    capture.release(captured.end);
    assert_eq!(capture.status().ring_bytes_used, 0, "what was refused is freed as well");
    capture.fold(next);
    let heal = capture.heal_set(DiskId(5));
    assert!(heal.iter().map(|range| range.len).sum::<u64>() < bench.bytes / 2 + (more << 16), "only what was written");
    for range in heal {
        let mut buffer = vec![0; range.len as usize];
        Capture::read(&capture, DiskId(5), range.start, &mut buffer).expect("readable");
        replica[range.within(0)].copy_from_slice(&buffer);
    }
    assert!(replica == bench.content(), "stream and heal together are the disk");
}

#[test]
fn a_full_ring_of_large_records_breaks_and_resumes() {
    a_full_ring_breaks_and_resumes("a_full_ring_of_large_records_breaks_and_resumes", Variant::Dynptr);
}

#[test]
fn a_full_ring_of_small_records_breaks_and_resumes() {
    a_full_ring_breaks_and_resumes("a_full_ring_of_small_records_breaks_and_resumes", Variant::Bounded);
}

#[test]
fn a_successor_finds_ring_and_maps() {
    let Some(bench) = Bench::new("a_successor_finds_ring_and_maps") else { return };
    let mut capture = bench.open(&ANY_VARIANT, 32 << 20);
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    let file = bench.file();
    let block = |fill: u64| Aligned::random(4096 * fill as usize);
    let (first, second, third) = (block(1), block(2), block(3));
    file.write_all_at(first.bytes(), 0).expect("written");
    let taken = capture.next().expect("streams");
    let kept = Resumption {
        chain: replication::ChainId([3; 16]),
        generation: replication::Generation(2),
        released: replication::SequenceNumber(9),
        hash: replication::StreamHash([7; 32]),
        ring_end: taken.end.0,
        gap_count: capture.status().gap_count,
        heals_started: 4,
    };
    capture.keep(Some(kept.clone()));
    // Read, but not released; then the agent dies before the next.
    file.write_all_at(second.bytes(), 8192).expect("written");
    capture.next().expect("streams");
    drop(capture);
    file.write_all_at(third.bytes(), 65_536).expect("written");

    let mut successor = bench.open(&ANY_VARIANT, 32 << 20);
    assert_eq!((successor.continuity(), successor.resumption()), (Continuity::SameBoot, Some(kept)));
    let data = |captured: &Captured| match &captured.kinds[0] {
        ChangeKind::Write { data, .. } => data.to_vec(),
        other => panic!("{other:?}"),
    };
    assert_eq!(data(&successor.next().expect("kept")), second.bytes(), "what was journaled is not handed out again");
    assert_eq!(data(&successor.next().expect("captured without an agent")), third.bytes());
    assert!(successor.next().is_none());
    assert_eq!(successor.status().gap_count, 0);
    // The stream broke: the next one gets the maps and nothing of the ring.
    successor.keep(None);
    drop(successor);
    let mut heir = bench.open(&ANY_VARIANT, 32 << 20);
    assert_eq!((heir.continuity(), heir.resumption()), (Continuity::SameBoot, None));
    assert!(heir.next().is_none());
    let next = rotate(&mut heir, Mode::Stream);
    heir.fold(next);
    assert_eq!(heir.heal_set(DiskId(5)), [ByteRange::new(0, 131_072)]);
    drop(heir);
    // Another ring is another capture: what is pinned does not fit and is taken down.
    assert_eq!(bench.open(&ANY_VARIANT, 16 << 20).continuity(), Continuity::Fresh);
}

pub(super) fn described(disk: u16, path: &Path) -> EbpfDisk {
    let size_bytes = FileDevice::open_direct(path).expect("the device opens").size();
    let geometry = DiskGeometry {
        disk: DiskId(disk),
        identity: DiskIdentity { serial: format!("serial-{disk}"), fingerprint: [0; 16] },
        path: path.display().to_string(),
        size_bytes,
        logical_sector_bytes: 512,
        physical_sector_bytes: 512,
    };
    EbpfDisk { geometry, path: path.to_owned() }
}

pub(super) fn capture_of(bench: &Bench, disks: Vec<EbpfDisk>) -> EbpfCapture {
    capture_with(bench, disks, ANY_VARIANT.to_vec())
}

fn capture_with(bench: &Bench, disks: Vec<EbpfDisk>, variants: Vec<Variant>) -> EbpfCapture {
    let config =
        EbpfConfig { machine: MachineId([1; 16]), pins: bench.pins.clone(), ring_bytes_max: RING_BYTES_MIN, variants };
    let mut capture =
        EbpfCapture::open(disks, Arc::new(SystemClock), &config).unwrap_or_else(|error| panic!("{error:?}"));
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    capture
}

#[test]
fn several_disks_share_one_ring() {
    let test = "several_disks_share_one_ring";
    let (Some(one), Some(two)) = (Bench::new(test), Bench::new(test)) else { return };
    let mut capture = capture_of(&one, vec![described(3, &one.device), described(8, &two.device)]);
    let (first, second) = (one.file(), two.file());
    for round in 0..20u64 {
        let file = if round % 3 == 0 { &second } else { &first };
        file.write_all_at(Aligned::random(4096).bytes(), round << 17).expect("written");
    }
    for round in 0..20u64 {
        let captured = capture.next().expect("every write");
        assert_eq!(captured.disk, DiskId(if round % 3 == 0 { 8 } else { 3 }), "in the order of submission");
        let ChangeKind::Write { range, .. } = &captured.kinds[0] else { panic!("{captured:?}") };
        assert_eq!(range.start, round << 17);
    }
    let epoch = capture.status().epoch;
    let marked = |disk: usize| capture.map(uncommitted(slot_of(epoch)), disk).ranges().len();
    assert_eq!((marked(0), marked(1)), (13, 7));
}

#[test]
fn a_partition_is_captured_where_it_lies() {
    let test = "a_partition_is_captured_where_it_lies";
    let Some(bench) = Bench::new(test) else { return };
    let Some(partition) = partition(&bench, 2, 34_816, 32_768) else {
        return skip(test, "no partition can be made on a loop device");
    };
    let mut capture = capture_of(&bench, vec![described(1, &partition)]);
    let start = support::place_of(&partition).expect("a partition").start_sector * 512;
    assert_eq!(start, 34_816 * 512);
    let (whole, part) = (bench.file(), OpenOptions::new().write(true).open(&partition).expect("opens"));
    let block = Aligned::random(4096);
    part.write_all_at(block.bytes(), 8192).expect("written");
    rustix::fs::fsync(&part).expect("synced");
    let expected = |range: ByteRange| [ChangeKind::Write { range, data: block.bytes().to_vec().into() }];
    assert_eq!(capture.next().expect("captured").kinds, expected(ByteRange::new(8192, 4096)));
    // The same place through the whole disk; then another place of it.
    whole.write_all_at(block.bytes(), start + 65_536).expect("written");
    assert_eq!(capture.next().expect("captured").kinds, expected(ByteRange::new(65_536, 4096)));
    whole.write_all_at(block.bytes(), 1 << 20).expect("written");
    assert!(capture.next().is_none(), "not of this partition");
    assert_eq!(capture.status().gap_count, 0);
    // Half inside: nobody can stream it, so it is marked and the stream breaks.
    whole.write_all_at(block.bytes(), start - 2048).expect("written");
    assert!(capture.next().is_none());
    assert!(capture.status().gap_count > 0);
    let granule = capture.disks[&0].place.scale().granule_bytes();
    assert_eq!(capture.unstreamed(Epoch(0)), [(DiskId(1), ByteRange::new(0, granule))]);
}

/// A partition of the bench's device, in sectors, and a node for it. The kernel needs no partition table.
fn partition(bench: &Bench, number: u32, start: u64, sectors: u64) -> Option<PathBuf> {
    let name = bench.device.file_name().expect("a device").to_string_lossy().into_owned();
    let words = [bench.device.display().to_string(), number.to_string(), start.to_string(), sectors.to_string()];
    let added = Command::new("addpart").args(words).status().ok()?;
    let device = std::fs::read_to_string(format!("/sys/block/{name}/{name}p{number}/dev")).ok()?;
    // Not every system makes the node by itself.
    let node = bench.folder.path().join(format!("partition{number}"));
    let (major, minor) = device.trim().split_once(':').expect("major:minor");
    let made = Command::new("mknod").arg(&node).args(["b", major, minor]).status().expect("mknod runs");
    (added.success() && made.success()).then_some(node)
}

fn partitions_side_by_side(variant: Variant, test: &str) {
    if !can_test(test, variant) {
        return;
    }
    let Some(bench) = Bench::new(test) else { return };
    let (Some(one), Some(two)) = (partition(&bench, 2, 32_768, 32_768), partition(&bench, 3, 65_536, 32_768)) else {
        return skip(test, "no partition can be made on a loop device");
    };
    let overlaps = EbpfCapture::open(
        vec![described(1, &one), described(2, &bench.device)],
        Arc::new(SystemClock),
        &EbpfConfig {
            machine: MachineId([1; 16]),
            pins: bench.pins.clone(),
            ring_bytes_max: RING_BYTES_MIN,
            variants: vec![variant],
        },
    );
    assert!(matches!(overlaps.err(), Some(OpenEbpfError::Disks)), "a disk and a partition of it");
    let mut capture = capture_with(&bench, vec![described(1, &one), described(2, &two)], vec![variant]);
    let open = |path: &Path| OpenOptions::new().write(true).open(path).expect("opens");
    let (first, second, whole) = (open(&one), open(&two), bench.file());
    let block = Aligned::random(4096);
    for (file, disk, at) in [(&first, 1, 8192u64), (&second, 2, 12_288), (&first, 1, 0)] {
        file.write_all_at(block.bytes(), at).expect("written");
        rustix::fs::fsync(file).expect("synced");
        let captured = capture.next().expect("captured");
        assert_eq!(captured.disk, DiskId(disk));
        let range = ByteRange::new(at, 4096);
        assert_eq!(captured.kinds, [ChangeKind::Write { range, data: block.bytes().to_vec().into() }]);
    }
    whole.write_all_at(block.bytes(), 65_536 * 512 + 4096).expect("written");
    let captured = capture.next().expect("captured");
    assert_eq!((captured.disk, captured.kinds[0].range()), (DiskId(2), Some(ByteRange::new(4096, 4096))));
    assert_eq!(capture.status().gap_count, 0);
    // Across both of them: neither can stream it, both are named.
    whole.write_all_at(block.bytes(), 65_536 * 512 - 2048).expect("written");
    assert!(capture.next().is_none());
    assert!(capture.status().gap_count > 0);
    let named: Vec<DiskId> = capture.unstreamed(Epoch(0)).iter().map(|(disk, _)| *disk).collect();
    assert!(named.contains(&DiskId(1)) && named.contains(&DiskId(2)), "{named:?}");
}

#[test]
fn partitions_of_one_disk_are_told_apart() {
    partitions_side_by_side(Variant::Dynptr, "partitions_of_one_disk_are_told_apart");
}

#[test]
fn partitions_of_one_disk_are_told_apart_in_small_records() {
    partitions_side_by_side(Variant::Bounded, "partitions_of_one_disk_are_told_apart_in_small_records");
}

#[test]
fn a_write_that_fails_is_marked() {
    let test = "a_write_that_fails_is_marked";
    let Some(bench) = Bench::new(test) else { return };
    // A disk whose medium is full: a sparse image in a file system too small for it.
    let small = bench.folder.path().join("small");
    std::fs::create_dir(&small).expect("created");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return skip(test, "no tmpfs can be mounted");
    }
    let image = small.join("image");
    File::create(&image).and_then(|file| file.set_len(8 << 20)).expect("an image");
    let made = Command::new("losetup").args(["-f", "--show"]).arg(&image).output().expect("losetup runs");
    let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
    let outcome = std::panic::catch_unwind(|| {
        let mut capture = capture_of(&bench, vec![described(2, &device)]);
        let direct = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let file = OpenOptions::new().write(true).custom_flags(direct).open(&device).expect("opens");
        file.write_all_at(Aligned::random(65_536).bytes(), 0).expect("there is room for this");
        assert!(!capture.has_unstreamed(Epoch(0)));
        // Fills the medium; the kernel says nothing of the part that did not fit.
        let _ = file.write_all_at(Aligned::random(1 << 20).bytes(), 1 << 20);
        let block = Aligned::random(65_536);
        file.write_all_at(block.bytes(), 4 << 20).expect_err("there is no room for this");
        assert!(capture.has_unstreamed(Epoch(0)));
        let marked = capture.unstreamed(Epoch(0));
        assert!(marked.iter().any(|(disk, range)| *disk == DiskId(2) && range.start >= 4 << 20), "{marked:?}");
        assert!(marked.iter().all(|(_, range)| range.start >= 1 << 20), "only what failed: {marked:?}");
        let causes = (capture.gaps(), capture.installed.misses());
        assert_eq!(capture.status().gap_count, 0, "the stream goes on: {causes:?}");
        assert!(capture.counters().counts().failed > 0);
        assert!(capture.next().is_some());
        let epoch = rotate(&mut capture, Mode::Stream);
        assert!(capture.settled(epoch), "failed writes have ended, too");
    });
    let _ = Command::new("losetup").arg("-d").arg(&device).status();
    let _ = Command::new("umount").arg("-l").arg(&small).status();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn what_cannot_be_captured_is_said() {
    let why = support::place_of(Path::new("/dev/null")).expect_err("a character device");
    assert!(why.contains("not a block device"), "{why}");
    let findings = support::findings();
    assert!(findings.iter().all(|finding| !finding.detail.is_empty()));
}
