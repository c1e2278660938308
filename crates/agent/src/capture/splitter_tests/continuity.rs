//! What a start makes of the maps that an earlier run left.

use super::*;

/// Opens, heals once and ends, as an earlier run of the agent did. Writes `dirty` at granule 1 afterwards.
fn earlier_run(disks: &[Arc<MemoryDisk>], store: &MemoryMapStore) -> Splitter {
    let (splitter, capture) = open(disks, store, 100_000);
    let mut engine = Engine { capture, replica: Replica::new(disks), attempts: 0 };
    assert!(engine.heal());
    splitter.disk(DiskId(0)).expect("known").write_at(GRANULE_BYTES, &[9; 512]).expect("written");
    splitter
}

#[test]
fn continuity_is_what_was_lived_through() {
    const SIZE: u64 = 8 * GRANULE_BYTES;
    let whole = [ByteRange::new(0, SIZE)];
    let dirty = [ByteRange::new(GRANULE_BYTES, GRANULE_BYTES)];
    let start = |disks: Vec<ProtectedDisk>, store: &MemoryMapStore, machine: u8, boot: u8| {
        let config = SplitterConfig { machine: MachineId([machine; 16]), boot: [boot; 16], ring_bytes_max: 10_000 };
        let (splitter, capture) = Splitter::open(disks, store, Arc::new(SystemClock), config).expect("opens");
        (splitter, capture.continuity(), capture.heal_set(DiskId(0)), capture)
    };
    let lost = |reason| Continuity::Lost(reason);

    // Killed, started again.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let _ = earlier_run(&disks, &store);
    let (_, continuity, heal, mut capture) = start(protect(&disks), &store, 9, 1);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    assert_eq!(capture.next(), None, "nothing about the disk changed");
    let second = capture.rotate(Mode::Stream).expect("free");
    assert!(second > Epoch(3), "epochs go on counting: {second:?}");

    // Killed, machine restarted; and the doubt survives a further kill in the new boot.
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::Rebooted), &whole[..]));
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &whole[..]));

    // Another machine's maps.
    let (_, continuity, heal, _) = start(protect(&disks), &store, 8, 2);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::OtherMachine), &whole[..]));

    // Closed in order: even a restart of the machine costs nothing, unless the disk was used elsewhere in between.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let splitter = earlier_run(&disks, &store);
    splitter.close(LIMIT).expect("closes");
    splitter.disk(DiskId(0)).expect("known").write_at(0, &[1; 512]).expect_err("closed");
    let saved = store.load().expect("readable").expect("installed");
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 2);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    let (_, continuity, heal, _) = start(protect(&disks), &store, 9, 3);
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::Rebooted), &whole[..]), "this run was not closed");
    disks[0].write_at(512, &[1; 512]).expect("someone else writes");
    for boot in [1, 2] {
        let (_, continuity, heal, _) = start(protect(&disks), &MemoryMapStore::holding(&saved), 9, boot);
        assert_eq!((continuity, heal.as_slice()), (lost(LostReason::ChangedMeanwhile(DiskId(0))), &whole[..]));
    }

    // Another disk under the same number; a smaller one; a larger one; one more.
    let (disks, store) = ([MemoryDisk::new(SIZE)], MemoryMapStore::new());
    let _ = earlier_run(&disks, &store);
    let image = store.load().expect("readable").expect("installed");
    let with = |change: &dyn Fn(&mut ProtectedDisk)| {
        let mut disks = protect(&disks);
        change(&mut disks[0]);
        start(disks, &MemoryMapStore::holding(&image), 9, 1)
    };
    let (_, continuity, heal, _) = with(&|disk| disk.geometry.identity.serial = "other".to_owned());
    assert_eq!((continuity, heal.as_slice()), (lost(LostReason::DiskReplaced(DiskId(0))), &whole[..]));
    let resize = |size: u64| {
        move |disk: &mut ProtectedDisk| {
            *disk = ProtectedDisk { geometry: geometry(0, size), device: MemoryDisk::new(size) };
        }
    };
    let (_, continuity, heal, _) = with(&resize(SIZE - SECTOR));
    assert_eq!(continuity, lost(LostReason::DiskShrunk(DiskId(0))));
    assert_eq!(heal, [ByteRange::new(0, SIZE - SECTOR)]);
    let (_, continuity, heal, mut capture) = with(&resize(SIZE + GRANULE_BYTES + SECTOR));
    assert_eq!(continuity, Continuity::SameBoot);
    assert_eq!(heal, [dirty[0], ByteRange::new(SIZE, GRANULE_BYTES + SECTOR)]);
    let announced = capture.next().expect("the growth is announced");
    assert_eq!(announced.kinds, [ChangeKind::Geometry(geometry(0, SIZE + GRANULE_BYTES + SECTOR))]);
    let two = [disks[0].clone(), MemoryDisk::new(SIZE)];
    let (_, continuity, heal, mut capture) = start(protect(&two), &MemoryMapStore::holding(&image), 9, 1);
    assert_eq!((continuity, heal.as_slice()), (Continuity::SameBoot, &dirty[..]));
    assert_eq!(capture.heal_set(DiskId(1)), whole);
    assert_eq!(capture.next().map(|record| record.disk), Some(DiskId(1)));
    capture.clear_heal_set();
    capture.require_whole(DiskId(0));
    assert_eq!((capture.heal_set(DiskId(0)).as_slice(), capture.heal_set(DiskId(1)).len()), (&whole[..], 0));
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let disk = |geometry| ProtectedDisk { geometry, device: MemoryDisk::new(4096) };
    let open = |disks| {
        let clock = Arc::new(SystemClock);
        Splitter::open(disks, &MemoryMapStore::new(), clock, config(1000)).err().map(|error| error.to_string())
    };
    assert_eq!(
        open(vec![disk(geometry(0, 8192))]).as_deref(),
        Some("disk 0 is described with 8192 bytes, but its device has 4096")
    );
    let twice = vec![disk(geometry(3, 4096)), disk(geometry(3, 4096))];
    assert_eq!(open(twice).as_deref(), Some("disk 3 is named twice"));
    let odd = ProtectedDisk { geometry: geometry(0, 1000), device: MemoryDisk::new(1000) };
    assert_eq!(
        open(vec![odd]).as_deref(),
        Some("disk 0 has 1000 bytes, which is not a whole number of 512-byte sectors")
    );
    let many = (0..65).map(|index| disk(geometry(index, 4096))).collect();
    assert_eq!(open(many).as_deref(), Some("65 disks are more than a machine can have (64)"));
}

/// A real process is killed with SIGKILL while it writes to a real file; the map file it leaves must name everything
/// that differs from what the other side held.
#[test]
fn a_killed_process_leaves_a_map_of_all_it_wrote() {
    const SIZE: u64 = 64 * GRANULE_BYTES;
    const FOLDER: &str = "FARSHORE_TEST_KILLED_WRITER";
    let open = |folder: &std::path::Path| {
        let device = Arc::new(FileDevice::open(folder.join("disk"), Access::ReadWrite).expect("the disk opens"));
        let store = FileMapStore::open(folder, "maps").expect("nobody else has the maps");
        let disks = vec![ProtectedDisk { geometry: geometry(0, SIZE), device }];
        Splitter::open(disks, &store, Arc::new(SystemClock), config(1 << 20)).expect("opens")
    };
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = std::path::PathBuf::from(folder);
        let (splitter, mut capture) = open(&folder);
        let epoch = capture.rotate(Mode::Stream).expect("free");
        capture.fold(epoch);
        capture.clear_heal_set();
        let disk = splitter.disk(DiskId(0)).expect("known");
        let mut random = Random(std::process::id().into());
        loop {
            // One granule in eight, so that most of the disk must stay unnamed.
            let start = random.below(8) * 8 * GRANULE_BYTES + random.below(100) * SECTOR;
            disk.write_at(start, &[1 + random.below(255) as u8; 1024]).expect("written");
        }
    }
    for _ in 0..3 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("disk"), vec![0; SIZE as usize]).expect("a disk");
        let mut child = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "capture::splitter_tests::continuity::a_killed_process_leaves_a_map_of_all_it_wrote"])
            .env(FOLDER, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("the child starts");
        let written = || std::fs::read(folder.path().join("disk")).expect("the disk is there");
        while written().iter().filter(|&&byte| byte != 0).count() < 20_000 {
            assert!(child.try_wait().expect("a child").is_none(), "the child ended by itself");
        }
        child.kill().expect("the child is alive");
        child.wait().expect("the child is gone");
        let (_, capture) = open(folder.path());
        assert_eq!(capture.continuity(), Continuity::SameBoot);
        let (named, bytes) = (capture.heal_set(DiskId(0)), written());
        for sector in 0..SIZE / SECTOR {
            let dirty = bytes[sector as usize * 512..(sector as usize + 1) * 512].iter().any(|&byte| byte != 0);
            assert!(!dirty || names(&named, sector), "sector {sector} was written and is not named");
        }
        assert!(named.iter().map(|range| range.len).sum::<u64>() <= SIZE / 8 + 8 * GRANULE_BYTES, "{named:?}");
    }
}
