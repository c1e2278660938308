//! Whatever the vault may lack is named by the maps, at every moment.

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Change { disk: u16, sector: u64, sectors: u64, fill: u8, fails: bool },
    Consume(usize),
    Commit,
    Rotate(bool),
    Clear,
    Fold,
    Heal,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0u16..2, 0u64..1024, 1u64..40, any::<u8>(), prop::bool::weighted(0.05)).prop_map(
            |(disk, sector, sectors, fill, fails)| Step::Change { disk, sector, sectors, fill, fails }
        ),
        3 => (1usize..20).prop_map(Step::Consume),
        2 => Just(Step::Commit),
        2 => prop::bool::weighted(0.8).prop_map(Step::Rotate),
        1 => Just(Step::Clear),
        1 => Just(Step::Fold),
        1 => Just(Step::Heal),
        1 => Just(Step::Kill),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// The one promise of the recovery set: whatever the vault does not hold is named, at every moment.
    #[test]
    fn a_kill_at_any_moment_leaves_every_uncommitted_range_named(steps in prop::collection::vec(step(), 1..120)) {
        const SECTORS: u64 = 1024;
        let disks = [MemoryDisk::new(SECTORS * SECTOR), MemoryDisk::new(SECTORS * SECTOR)];
        let fails = Arc::new(AtomicBool::new(false));
        for disk in &disks {
            let fails = fails.clone();
            disk.on_change(move |_| fails.swap(false, Ordering::SeqCst));
        }
        let store = MemoryMapStore::new();
        let (mut splitter, capture) = open(&disks, &store, 60_000);
        let mut engine = Engine { capture, replica: Replica::new(&disks), attempts: 0 };
        prop_assert!(engine.heal());
        // What the vault holds, and through which ring position and epoch.
        let mut committed: Vec<Vec<u8>> = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
        let mut consumed: Vec<Captured> = Vec::new();
        for step in steps {
            match step.clone() {
                Step::Change { disk, sector, sectors, fill, fails: planted } => {
                    fails.store(planted, Ordering::SeqCst);
                    let disk = splitter.disk(DiskId(disk)).expect("known");
                    let range = sector * SECTOR..(sector + sectors).min(SECTORS) * SECTOR;
                    let result = match fill {
                        0..20 => disk.write_zeroes(range),
                        20..40 => disk.discard(range),
                        _ => disk.write_at(range.start, &vec![fill; (range.end - range.start) as usize]),
                    };
                    prop_assert_eq!(result.is_err(), planted);
                }
                Step::Consume(most) => {
                    for _ in 0..most {
                        let Some(record) = engine.capture.next() else { break };
                        engine.replica.apply(&record);
                        engine.capture.release(record.end);
                        consumed.push(record);
                    }
                }
                Step::Commit => {
                    committed = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
                    consumed.clear();
                }
                Step::Rotate(streaming) => {
                    engine.capture.rotate(if streaming { Mode::Stream } else { Mode::Track });
                }
                Step::Clear => {
                    // Legal for the older epoch when all of it was streamed and committed.
                    let status = engine.capture.status();
                    let older = Epoch(status.epoch.0 - 1);
                    let in_ring = {
                        let mut rest = Vec::new();
                        while let Some(record) = engine.capture.next() {
                            engine.replica.apply(&record);
                            engine.capture.release(record.end);
                            rest.push(record);
                        }
                        consumed.extend(rest);
                        consumed.iter().any(|record| record.epoch <= older)
                    };
                    let slot = Slot::of(older);
                    if !in_ring && !splitter.shared.set.has_unstreamed(slot) && engine.capture.settled(status.epoch) {
                        engine.capture.clear(older);
                    }
                }
                Step::Fold => {
                    let epoch = engine.capture.status().epoch;
                    prop_assert!(engine.capture.settled(epoch));
                    engine.capture.fold(epoch);
                }
                Step::Heal => {
                    prop_assert!(engine.heal());
                    committed = engine.replica.disks.iter().map(|disk| disk.0.clone()).collect();
                    consumed.clear();
                    engine.assert_equal(&disks);
                }
                Step::Kill => {
                    // The ring is gone, and with it what was not committed: heals compare with the vault.
                    let (again, capture) = open(&disks, &store, 60_000);
                    prop_assert_eq!(capture.continuity(), Continuity::SameBoot);
                    splitter = again;
                    engine.capture = capture;
                    for (disk, bytes) in engine.replica.disks.iter_mut().zip(&committed) {
                        disk.0.clone_from(bytes);
                    }
                    consumed.clear();
                }
            }
            for (index, ranges) in left_by_a_kill(&disks, &store).iter().enumerate() {
                let here = disks[index].contents();
                for sector in 0..SECTORS {
                    let bytes = sector as usize * 512..(sector as usize + 1) * 512;
                    if here[bytes.clone()] != committed[index][bytes] {
                        prop_assert!(names(ranges, sector), "after {:?}: sector {} of disk {}", step, sector, index);
                    }
                }
            }
        }
        prop_assert!(engine.heal());
        engine.assert_equal(&disks);
    }

    /// Bytes from outside: any image is answered, and what cannot be trusted costs a comparison.
    #[test]
    fn any_image_is_answered(
        at in any::<prop::sample::Index>(), value: u8, cut in any::<prop::sample::Index>(), noise: Vec<u8>
    ) {
        let disks = [MemoryDisk::new(4 * GRANULE_BYTES)];
        let store = MemoryMapStore::new();
        let (_, mut capture) = open(&disks, &store, 1000);
        capture.clear_heal_set();
        let image = store.load().expect("readable").expect("installed");
        let mut head_damaged = image.clone();
        let head = 4096 + 8..4096 + 32 + 60;
        let position = head.start + at.index(head.len());
        head_damaged[position] = head_damaged[position].wrapping_add(value.max(1));
        for damaged in [noise, image[..cut.index(image.len())].to_vec(), head_damaged] {
            let (_, capture) = open(&disks, &MemoryMapStore::holding(&damaged), 1000);
            prop_assert!(matches!(capture.continuity(), Continuity::Lost(LostReason::Unreadable(_))));
            prop_assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, 4 * GRANULE_BYTES)]);
        }
    }
}

#[test]
fn marks_are_there_when_the_write_reaches_the_disk() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let shared: Weak<_> = Arc::downgrade(&splitter.shared);
    let checked = Arc::new(AtomicU64::new(0));
    let seen = checked.clone();
    disks[0].on_change(move |range| {
        let shared = shared.upgrade().expect("open");
        let range = ByteRange::new(range.start, range.end - range.start);
        let word = shared.read_word();
        let slot = Slot::of(word.epoch());
        assert!(shared.set.map(MapKind::Uncommitted(slot), 0).covers(range));
        if word.mode() == Mode::Track {
            assert!(shared.set.map(MapKind::Unstreamed(slot), 0).covers(range));
        }
        seen.fetch_add(1, Ordering::SeqCst);
        false
    });
    let disk = splitter.disk(DiskId(0)).expect("known");
    let mut random = Random(5);
    for mode in [Mode::Track, Mode::Stream, Mode::Track, Mode::Stream] {
        capture.fold(capture.status().epoch);
        capture.rotate(mode).expect("the older slot is free");
        capture.fold(capture.status().epoch);
        capture.clear_heal_set();
        for _ in 0..40 {
            scribble(&disk, &mut random).expect("nothing fails");
        }
    }
    assert_eq!(checked.load(Ordering::SeqCst), 160);
}

#[test]
fn a_write_in_flight_keeps_its_epoch_unsettled() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let first = capture.rotate(Mode::Stream).expect("free");
    capture.fold(first);
    capture.clear_heal_set();
    let (entered, wait_entered) = std::sync::mpsc::channel();
    let (go, wait_go) = std::sync::mpsc::channel();
    let wait_go = Mutex::new(wait_go);
    disks[0].on_change(move |range| {
        if range.start == 0 {
            entered.send(()).expect("the test listens");
            wait_go.lock().expect("not poisoned").recv_timeout(LIMIT).expect("the test speaks");
        }
        false
    });
    std::thread::scope(|scope| {
        let disk = splitter.disk(DiskId(0)).expect("known");
        scope.spawn(move || disk.write_at(0, &[7; 512]).expect("written"));
        wait_entered.recv().expect("the write reaches the disk");
        let second = capture.rotate(Mode::Stream).expect("free");
        assert!(!capture.settled(second));
        assert!(capture.settled(first), "nobody is left under what came before the first");
        assert_eq!(capture.rotate(Mode::Stream), None, "the first epoch's slot is in use");
        // A write under the new epoch does not wait for the old one and does not settle it.
        splitter.disk(DiskId(0)).expect("known").write_at(GRANULE_BYTES, &[8; 512]).expect("written");
        assert!(!capture.settled(second));
        go.send(()).expect("the disk listens");
        while !capture.settled(second) {
            std::thread::yield_now();
        }
        capture.fold(second);
        assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, GRANULE_BYTES)]);
        assert!(!capture.has_unstreamed(first));
        assert!(!capture.settled(second.next()), "writes may begin under the current epoch at any time");
    });
    let epochs: Vec<Epoch> = std::iter::from_fn(|| capture.next())
        .filter(|record| record.kinds[0].range().is_some())
        .map(|r| r.epoch)
        .collect();
    assert_eq!(epochs, [first, first.next()]);
}

#[test]
fn a_kill_between_the_steps_of_a_fold_loses_nothing() {
    let disks = [MemoryDisk::new(16 * GRANULE_BYTES), MemoryDisk::new(16 * GRANULE_BYTES)];
    let store = MemoryMapStore::new();
    let (splitter, mut capture) = open(&disks, &store, 20_000);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    let mut random = Random(3);
    for _ in 0..6 {
        for disk in 0..2 {
            scribble(&splitter.disk(DiskId(disk)).expect("known"), &mut random).expect("written");
        }
    }
    let before = left_by_a_kill(&disks, &store);
    assert!(before.iter().all(|ranges| !ranges.is_empty()));
    capture.rotate(Mode::Stream).expect("free");
    let mut steps = 0;
    splitter.shared.set.fold(Slot::of(epoch), || {
        assert_eq!(left_by_a_kill(&disks, &store), before, "step {steps}");
        steps += 1;
    });
    assert_eq!(steps, 9, "two merges and two clears for each disk, then the slot");
    assert_eq!((0..2).map(|disk| capture.heal_set(DiskId(disk))).collect::<Vec<_>>(), before);
}
