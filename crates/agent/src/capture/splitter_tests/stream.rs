//! What is in the ring, in which order, and what a replica built from it holds.

use super::*;

#[test]
fn a_replica_follows_through_overflows_failed_writes_and_freezes() {
    let mut attempts = 0;
    for seed in 0..6u64 {
        let disks = [MemoryDisk::new(40 * GRANULE_BYTES), MemoryDisk::new(3 * GRANULE_BYTES + SECTOR)];
        let failing = Mutex::new(Random(seed));
        disks[0].on_change(move |_| failing.lock().expect("not poisoned").below(400) == 0);
        let (splitter, capture) = open(&disks, &MemoryMapStore::new(), 60_000);
        assert_eq!(capture.continuity(), Continuity::Fresh);
        let mut engine = Engine { capture, replica: Replica::new(&disks), attempts: 0 };
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..4u64 {
                let (splitter, done) = (&splitter, &done);
                scope.spawn(move || {
                    let mut random = Random(seed << 8 | writer);
                    for round in 0..600 {
                        let disk = splitter.disk(DiskId((random.below(4) == 0).into())).expect("known");
                        // A planted failure is the writer's to live with.
                        let _ = scribble(&disk, &mut random);
                        if round % 16 == 0 {
                            std::thread::yield_now();
                        }
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                });
            }
            while done.load(Ordering::SeqCst) < 4 {
                if engine.attempts % 3 == 2 {
                    drop(splitter.freeze(LIMIT).expect("writes end"));
                }
                engine.heal();
                engine.consume(100);
            }
        });
        while !engine.heal() {}
        engine.assert_equal(&disks);
        attempts += engine.attempts;
        let counts = splitter.counts();
        assert_eq!(counts.changes, 4 * 600, "seed {seed}");
        assert!(counts.tracked > 0 && counts.changes > counts.tracked && counts.failed > 0, "{counts:?}");
    }
    assert!(attempts > 12, "heals while writing: {attempts}");
}

#[test]
fn writes_that_overlap_in_flight_are_in_the_ring_as_on_the_disk() {
    let disks = [MemoryDisk::new(8 * SECTOR)];
    // Whoever is first here would often be second on the disk.
    let calls = AtomicU64::new(0);
    disks[0].on_change(move |_| {
        (0..calls.fetch_add(1, Ordering::SeqCst) % 2 * 20).for_each(|_| std::thread::yield_now());
        false
    });
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 64 << 20);
    capture.rotate(Mode::Stream).expect("free");
    let mut replica = Replica::new(&disks);
    replica.disks[0].0.fill(0);
    for round in 0..500u64 {
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let disk = splitter.disk(DiskId(0)).expect("known");
                scope.spawn(move || {
                    let mut random = Random(round << 8 | writer);
                    (0..3).for_each(|_| scribble(&disk, &mut random).expect("written"));
                });
            }
        });
        while let Some(record) = capture.next() {
            replica.apply(&record);
            capture.release(record.end);
        }
        assert!(replica.disks[0].0 == disks[0].contents(), "round {round}");
    }
}

#[test]
fn a_full_ring_breaks_the_stream_until_the_next_rotation() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 3 * cost(1, 4096) + cost(1, 0));
    let disk = splitter.disk(DiskId(0)).expect("known");
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    for granule in 0..3 {
        disk.write_at(granule * GRANULE_BYTES, &[1; 4096]).expect("written");
    }
    assert_eq!((capture.status().gap_count, capture.status().mode), (0, Mode::Stream));
    assert!(!capture.has_unstreamed(epoch));
    disk.write_at(3 * GRANULE_BYTES, &[2; 4096]).expect("a full ring stops no one");
    let status = capture.status();
    assert_eq!((status.gap_count, status.gap_cause, status.mode), (1, Some(GapCause::Overflow), Mode::Track));
    assert_eq!(status.ring_bytes_used, status.ring_bytes_max);
    assert!(capture.has_unstreamed(epoch));
    // Room again, but the one before is missing: nothing may enter, not even a marker.
    let records: Vec<Captured> = std::iter::from_fn(|| capture.next()).collect();
    capture.release(records.last().expect("some").end);
    disk.write_at(4 * GRANULE_BYTES, &[3; 4096]).expect("written");
    assert!(!capture.mark(MarkerKind::Crash, "not here"));
    assert_eq!(capture.next(), None);
    assert_eq!(capture.status().gap_count, 1);
    // Writes before the break are in the ring, in order; those after it are in the heal set.
    let starts: Vec<u64> =
        records.iter().filter_map(|record| record.kinds[0].range()).map(|range| range.start).collect();
    assert_eq!(starts, [0, GRANULE_BYTES, 2 * GRANULE_BYTES]);
    let next = capture.rotate(Mode::Stream).expect("free");
    assert!(capture.mark(MarkerKind::Crash, "here"));
    capture.fold(next);
    assert_eq!(capture.heal_set(DiskId(0)), [ByteRange::new(0, 5 * GRANULE_BYTES)]);
    disk.write_at(5 * GRANULE_BYTES, &[4; 4096]).expect("written");
    let kinds: Vec<ChangeKind> = std::iter::from_fn(|| capture.next()).flat_map(|record| record.kinds).collect();
    assert_eq!(kinds[0], ChangeKind::Marker { kind: MarkerKind::Crash, name: "here".to_owned() });
    assert_eq!(kinds[1].range(), Some(ByteRange::new(5 * GRANULE_BYTES, 4096)));
}

#[test]
fn a_reader_goes_back_to_what_is_not_released() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 1 << 20);
    capture.rotate(Mode::Stream).expect("free");
    for sector in 0..200 {
        splitter.disk(DiskId(0)).expect("known").write_at(sector * SECTOR, &[1; 512]).expect("written");
    }
    let all: Vec<Captured> = std::iter::from_fn(|| capture.next()).collect();
    assert_eq!(all.len(), 201, "with the disk's description");
    capture.release(all[49].end);
    capture.rewind(all[49].end);
    assert_eq!(capture.next().as_ref(), Some(&all[50]));
    capture.rewind(all[49].end);
    assert_eq!(capture.next().as_ref(), Some(&all[50]));
    // After a reconnect the other side turns out to have more than was read again.
    capture.release(all[80].end);
    assert_eq!(capture.next().as_ref(), Some(&all[81]));
    capture.release(all[200].end);
    assert_eq!(capture.next(), None);
    assert_eq!(capture.status().ring_bytes_used, 0);
    capture.rewind(all[200].end);
    assert_eq!(capture.status().producer, all[200].end);
}

#[test]
fn a_failed_write_is_named_for_a_heal() {
    let disks = [MemoryDisk::new(8 * GRANULE_BYTES)];
    disks[0].on_change(|range| range.start == 2 * GRANULE_BYTES);
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 100_000);
    let epoch = capture.rotate(Mode::Stream).expect("free");
    capture.fold(epoch);
    capture.clear_heal_set();
    let disk = splitter.disk(DiskId(0)).expect("known");
    disk.write_at(0, &[1; 512]).expect("written");
    assert!(!capture.has_unstreamed(epoch));
    disk.write_at(2 * GRANULE_BYTES, &[1; 512]).expect_err("planted");
    assert!(capture.has_unstreamed(epoch));
    assert_eq!(capture.status().gap_count, 0, "the order of the stream is whole");
    assert_eq!(splitter.counts().failed, 1);
    disk.write_at(8 * GRANULE_BYTES - 512, &[1; 1024]).expect_err("beyond the end");
    assert_eq!(splitter.counts().changes, 2, "what cannot reach the disk is not captured");
}

#[test]
fn a_large_write_is_one_record_in_pieces() {
    let disks = [MemoryDisk::new(64 * GRANULE_BYTES)];
    let (splitter, mut capture) = open(&disks, &MemoryMapStore::new(), 8 << 20);
    capture.rotate(Mode::Stream).expect("free");
    let data: Vec<u8> = (0..(2 << 20) + 512 + 512).map(|index| (index / 512) as u8).collect();
    splitter.disk(DiskId(0)).expect("known").write_at(512, &data).expect("written");
    let record = std::iter::from_fn(|| capture.next()).last().expect("captured");
    let sizes: Vec<usize> = record.kinds.iter().map(ChangeKind::data_len).collect();
    assert_eq!(sizes, [1 << 20, 1 << 20, 1024]);
    let mut replica = Replica::new(&disks);
    replica.apply(&record);
    assert_eq!(replica.disks[0].0[512..512 + data.len()], data);
}
