//! Disks that come, grow and go while a capture runs, and while none does: real bios to loop devices, both variants.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::Command;

use replication::ChangeKind;
use replication::geometry::GRANULE_BYTES;
use world::SystemClock;

use super::tests::{Aligned, Bench, can_test, described, rotate};
use super::*;

const MIB: u64 = 1 << 20;

fn open(one: &Bench, disks: Vec<EbpfDisk>, variant: Variant) -> EbpfCapture {
    let config = EbpfConfig {
        machine: MachineId([1; 16]),
        pins: one.pins().to_owned(),
        ring_bytes_max: RING_BYTES_MIN,
        variants: vec![variant],
    };
    EbpfCapture::open(disks, Arc::new(SystemClock), &config).unwrap_or_else(|error| panic!("{error:?}"))
}

fn new(disk: u16, bench: &Bench) -> NewDisk {
    let EbpfDisk { geometry, path } = described(disk, bench.device());
    NewDisk { geometry, path }
}

fn resize(bench: &Bench, bytes: u64) {
    OpenOptions::new().write(true).open(bench.image()).and_then(|file| file.set_len(bytes)).expect("resized");
    assert!(Command::new("losetup").arg("-c").arg(bench.device()).status().expect("it runs").success());
}

fn write(bench: &Bench, at: u64) {
    bench.file().write_all_at(Aligned::random(8192).bytes(), at).expect("written");
}

/// The next request is a write of 8 KiB at `at` of `disk`.
fn expect(capture: &mut EbpfCapture, disk: u16, at: u64) {
    let captured = capture.next().expect("captured");
    let ChangeKind::Write { range, .. } = &captured.kinds[0] else { panic!("{captured:?}") };
    assert_eq!((captured.disk, *range), (DiskId(disk), ByteRange::new(at, 8192)));
    capture.release(captured.end);
}

/// As if a heal had been committed.
fn heal(capture: &mut EbpfCapture) {
    let epoch = rotate(capture, Mode::Stream);
    capture.fold(epoch);
    capture.clear_heal_set();
    capture.follow(Phase { whole: true, healing: false, ending: false });
}

fn numbers(capture: &EbpfCapture) -> Vec<u16> {
    capture.disks().iter().map(|disk| disk.disk.0).collect()
}

fn disks_come_grow_and_go(test: &str, variant: Variant) {
    if !can_test(test, variant) {
        return;
    }
    let (old, grown) = (8 * MIB + 1536, 12 * MIB);
    let (Some(one), Some(two)) = (Bench::of(test, 16 * MIB), Bench::of(test, old)) else { return };
    let mut capture = open(&one, vec![described(3, one.device())], variant);
    heal(&mut capture);

    // One more.
    write(&two, 0);
    capture.add_disk(new(8, &two)).expect("added");
    assert!(capture.add_disk(new(8, &two)).expect_err("twice").contains("captured already"));
    assert!(capture.add_disk(new(9, &two)).is_err(), "under another number");
    assert_eq!(capture.heal_set(DiskId(8)), [ByteRange::new(0, old)]);
    assert!(capture.heal_set(DiskId(3)).is_empty());
    for round in 0..4 {
        write(&one, round * MIB);
        write(&two, round * MIB);
        expect(&mut capture, 3, round * MIB);
        expect(&mut capture, 8, round * MIB);
    }
    assert_eq!(capture.status().gap_count, 0);
    // Its agent is killed.
    drop(capture);
    write(&two, 4096);
    let mut capture = open(&one, vec![described(8, two.device()), described(3, one.device())], variant);
    assert_eq!((capture.continuity(), numbers(&capture)), (Continuity::SameBoot, vec![3, 8]));
    assert_eq!(capture.heal_set(DiskId(8)), [ByteRange::new(0, old)], "it was not healed yet");
    assert_eq!(capture.installed.ledger.whole(), 1 << 1, "and only it");
    heal(&mut capture);
    assert!(capture.heal_set(DiskId(8)).is_empty());

    // It grows; also across the old end is captured.
    resize(&two, grown);
    capture.grow_disk(DiskId(8), grown).expect("there is room");
    let named = capture.heal_set(DiskId(8));
    assert_eq!(named, [ByteRange::between(old / GRANULE_BYTES * GRANULE_BYTES, grown).expect("more")]);
    for at in [old / 4096 * 4096 - 4096, old / 4096 * 4096, grown - 8192] {
        write(&two, at);
        expect(&mut capture, 8, at);
    }
    assert_eq!(capture.status().gap_count, 0);
    heal(&mut capture);

    // It leaves: what the ring holds of it is nobody's.
    write(&two, MIB);
    capture.retire_disk(DiskId(8));
    write(&two, 0);
    assert!(capture.next().is_none() && capture.heal_set(DiskId(8)).is_empty());
    assert_eq!(numbers(&capture), [3, 8], "it is asked for until it is forgotten");
    capture.forget_disk(DiskId(8));
    assert_eq!(numbers(&capture), [3]);
    heal(&mut capture);
    assert_eq!(capture.disks.len(), 1, "nothing of it is under way");
    write(&one, 0);
    expect(&mut capture, 3, 0);
    assert_eq!(capture.status().gap_count, 0, "nobody missed anything");
    // Its slot and cells are another's then.
    capture.add_disk(new(9, &two)).expect("added");
    assert!(capture.disks[&1].geometry.disk == DiskId(9) && capture.map(1, 1).is_clear());
    write(&two, MIB);
    expect(&mut capture, 9, MIB);
    heal(&mut capture);

    // What changes while no agent runs.
    drop(capture);
    write(&one, MIB);
    resize(&one, 20 * MIB);
    let mut capture = open(&one, vec![described(3, one.device())], variant);
    assert_eq!((capture.continuity(), numbers(&capture)), (Continuity::SameBoot, vec![3]));
    assert_eq!((capture.installed.ledger.whole(), capture.resumption()), (0, None));
    assert_eq!(capture.heal_set(DiskId(3)), [ByteRange::new(16 * MIB, 4 * MIB)]);
    let epoch = rotate(&mut capture, Mode::Stream);
    capture.fold(epoch);
    let granule = ByteRange::new(MIB, GRANULE_BYTES);
    assert!(capture.heal_set(DiskId(3)).contains(&granule), "{:?}", capture.heal_set(DiskId(3)));
    assert_eq!(capture.status().gap_count, 0);
}

#[test]
fn disks_come_grow_and_go_with_large_records() {
    disks_come_grow_and_go("disks_come_grow_and_go_with_large_records", Variant::Dynptr);
}

#[test]
fn disks_come_grow_and_go_with_small_records() {
    disks_come_grow_and_go("disks_come_grow_and_go_with_small_records", Variant::Bounded);
}
