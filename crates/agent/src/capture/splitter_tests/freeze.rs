//! Freezes: what they hold back, where they divide the stream, how they end.

use super::*;

#[test]
fn a_freeze_holds_writes_back_and_its_marker_divides_them() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 64 << 20);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    let stop = AtomicBool::new(false);
    let mut at_rest = Vec::new();
    std::thread::scope(|scope| {
        for writer in 0..3u64 {
            let (disk, stop) = (splitter.disk(DiskId(0)).expect("known"), &stop);
            scope.spawn(move || {
                let mut random = Random(writer);
                while !stop.load(Ordering::SeqCst) {
                    scribble(&disk, &mut random).expect("written");
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
        }
        for round in 0..20 {
            let changes = splitter.counts().changes;
            while splitter.counts().changes < changes + 10 {
                std::thread::yield_now();
            }
            let frozen = splitter.freeze(LIMIT).expect("writes end");
            assert!(matches!(splitter.freeze(LIMIT), Err(FreezeError::AlreadyFrozen)));
            let flushed = disks[0].flushes.load(Ordering::SeqCst);
            assert!(flushed > round);
            at_rest.push(disks[0].contents());
            assert!(frozen.mark(MarkerKind::Final, "rest"));
            assert_eq!(disks[0].contents(), *at_rest.last().expect("pushed"), "nothing is written while frozen");
            assert!(frozen.holds());
        }
        stop.store(true, Ordering::SeqCst);
    });
    // The disk was zero at first, so the stream alone must give its contents at each marker.
    let mut replica = Replica::new(&disks);
    replica.disks[0].0.fill(0);
    let mut markers = at_rest.iter();
    while let Some(record) = capture.next() {
        replica.apply(&record);
        if let ChangeKind::Marker { .. } = record.kinds[0] {
            assert!(replica.disks[0].0 == *markers.next().expect("one state for each marker"));
        }
    }
    assert_eq!(markers.len(), 0);
}

#[test]
fn a_freeze_ends_at_its_time_out() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let clock = Arc::new(ManualClock::default());
    let (splitter, mut capture) =
        Splitter::open(protect(&disks), &MemoryMapStore::new(), clock.clone(), config(100_000)).expect("opens");
    capture.rotate(Mode::Stream).expect("free");
    let disk = splitter.disk(DiskId(0)).expect("known");
    let frozen = splitter.freeze(Duration::from_secs(10)).expect("nothing is in flight");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| disk.write_at(0, &[1; 512]));
        clock.0.store(9_999_999_999, Ordering::SeqCst);
        assert!(frozen.holds() && !writer.is_finished());
        assert_eq!(disks[0].contents()[0], 0);
        // The owner of the guard hangs; the writer frees itself.
        clock.0.store(10_000_000_000, Ordering::SeqCst);
        writer.join().expect("no panic").expect("written");
    });
    assert!(!frozen.holds());
    assert!(!frozen.mark(MarkerKind::Final, "too late"));
    let again = splitter.freeze(Duration::from_secs(10)).expect("the first one is over");
    drop(frozen);
    assert!(again.holds(), "an expired guard thaws nobody else's freeze");
    drop(again);
    disk.write_at(0, &[2; 512]).expect("written");
}

#[test]
fn a_freeze_gives_up_on_a_write_that_hangs() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, _capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let (entered, wait_entered) = std::sync::mpsc::channel();
    let (go, wait_go) = std::sync::mpsc::channel::<()>();
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
        scope.spawn(move || disk.write_at(0, &[1; 512]).expect("written"));
        wait_entered.recv().expect("the write reaches the disk");
        assert!(matches!(splitter.freeze(Duration::from_millis(20)), Err(FreezeError::TimedOut(_))));
        splitter.disk(DiskId(0)).expect("known").write_at(4096, &[2; 512]).expect("writes go on");
        go.send(()).expect("the disk listens");
    });
    drop(splitter.freeze(LIMIT).expect("nothing hangs any more"));
}
