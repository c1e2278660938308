//! Rounds and stretches against the obvious way: every leaf is looked at until it is told, or three times.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use replication::DiskIdentity;

use super::*;

const CHAIN: ChainId = ChainId([3; 16]);
const HOUR: u64 = 3_600_000_000_000;

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<Memory>>>);

impl ScrubRecord for Kept {
    fn load(&self) -> Option<Memory> {
        self.0.lock().expect("one thread").clone()
    }

    fn store(&mut self, memory: &Memory) -> io::Result<()> {
        // As it would be read from its file.
        *self.0.lock().expect("one thread") = memory::StoredMemory::of(memory).parse();
        assert!(self.0.lock().expect("one thread").is_some(), "what is kept can be read");
        Ok(())
    }
}

fn disk(id: u16, size_bytes: u64) -> DiskGeometry {
    DiskGeometry {
        disk: DiskId(id),
        path: "/dev/vda".into(),
        identity: DiskIdentity { serial: "s".into(), fingerprint: [0; 16] },
        size_bytes,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

fn scrubber(kept: &Kept, read_mib_per_s: u32, wall: u64) -> Scrubber {
    Scrubber::new(ScrubSettings { every_days: 2, read_mib_per_s }, Box::new(kept.clone()), WallTime(wall))
}

fn outcome(behind: u64, findings: Vec<(DiskId, ByteRange, ScrubFinding)>) -> ScrubOutcome {
    ScrubOutcome { chain: CHAIN, behind: SequenceNumber(behind), findings }
}

/// All of a stretch was found to be this.
fn all(behind: u64, stretch: &[(DiskId, ByteRange)], finding: ScrubFinding) -> ScrubOutcome {
    outcome(behind, stretch.iter().map(|(disk, range)| (*disk, *range, finding)).collect())
}

#[test]
fn a_round_begins_when_it_is_time_and_goes_on_after_a_restart() {
    let kept = Kept::default();
    let disks = [disk(0, 25 << 20), disk(2, 5000)];
    let mut first = scrubber(&kept, 1, 7);
    assert!(!first.wants(Monotonic(0), WallTime(7 + 47 * HOUR)) && first.wants(Monotonic(0), WallTime(7 + 48 * HOUR)));
    let stretch = first.next(CHAIN, &disks, WallTime(7 + 48 * HOUR));
    assert_eq!(stretch, [(DiskId(0), ByteRange::new(0, 10 << 20))]);
    assert!(!first.wants(Monotonic(0), WallTime(7 + 48 * HOUR)), "one at a time");
    first.compared(&all(90, &stretch, ScrubFinding::Same), &disks, WallTime(8));
    assert!(!first.begin(&disks, WallTime(9)), "it is under way");
    // The second stretch is under way when the agent is killed.
    first.next(CHAIN, &disks, WallTime(9));
    first.remember(None);
    drop(first);
    let mut second = scrubber(&kept, 1, 9);
    assert!(second.wants(Monotonic(0), WallTime(9)));
    let stretch = second.next(CHAIN, &disks, WallTime(9));
    assert_eq!(stretch, [(DiskId(0), ByteRange::new(10 << 20, 10 << 20))]);
    second.compared(&all(95, &stretch, ScrubFinding::Same), &disks, WallTime(10));
    let stretch = second.next(CHAIN, &disks, WallTime(10));
    assert_eq!(stretch, [(DiskId(0), ByteRange::new(20 << 20, 5 << 20)), (DiskId(2), ByteRange::new(0, 5000))]);
    second.compared(&all(99, &stretch, ScrubFinding::Same), &disks, WallTime(10));
    assert!(second.next(CHAIN, &disks, WallTime(11)).is_empty());
    let progress = second.progress(&disks);
    assert_eq!((progress.running, progress.rounds, progress.oldest_ns), (false, 1, 8));
    assert!(!second.wants(Monotonic(0), WallTime(12)));
    assert_eq!(second.memory.oldest(DiskId(0), ByteRange::new(0, 25 << 20)).map(|known| known.behind.0), Some(90));
}

#[test]
fn a_stretch_that_was_given_up_is_made_again_after_a_pause_and_is_shorter() {
    let mut scrub = scrubber(&Kept::default(), 1, 7);
    let disks = [disk(0, 25 << 20)];
    let first = scrub.next(CHAIN, &disks, WallTime(7));
    scrub.given_up(Monotonic(5), "the link is gone");
    assert!(!scrub.wants(Monotonic(6), WallTime(7)) && scrub.wants(Monotonic(6).plus(PAUSE), WallTime(7)));
    let again = scrub.next(CHAIN, &disks, WallTime(7));
    assert_eq!((again[0].1.start, again[0].1.len), (first[0].1.start, 5 << 20));
}

#[test]
fn what_differs_is_suspect_since_it_was_last_equal_and_that_outlives_the_agent() {
    let kept = Kept::default();
    let disks = [disk(0, 1 << 20)];
    let mut scrub = scrubber(&kept, 8, 7);
    scrub.healed(CHAIN, &Reach::Machine, SequenceNumber(20), &disks, WallTime(20));
    let equal = ByteRange::new(0, 512 << 10);
    scrub.next(CHAIN, &disks, WallTime(30));
    let findings = vec![(DiskId(0), equal, ScrubFinding::Same)];
    assert_eq!(scrub.compared(&outcome(30, findings), &disks, WallTime(30)), None);
    scrub.next(CHAIN, &disks, WallTime(31));
    let (one, other) = (ByteRange::new(4096, 4096), ByteRange::new(768 << 10, 8192));
    let findings = vec![(DiskId(0), one, ScrubFinding::Differs), (DiskId(0), other, ScrubFinding::Differs)];
    let found = scrub.compared(&outcome(40, findings), &disks, WallTime(40)).expect("something differs");
    assert_eq!(found.ranges, Ranges::of([(DiskId(0), one), (DiskId(0), other)]));
    let suspicion = scrub.suspect(found, CHAIN, SequenceNumber(44), WallTime(41));
    assert_eq!((suspicion.after, suspicion.until), (SequenceNumber(20), SequenceNumber(44)), "the older of the two");
    let mut next = scrubber(&kept, 8, 50);
    assert_eq!(next.suspicions(), std::slice::from_ref(&suspicion));
    next.noted(suspicion.id);
    assert!(scrubber(&kept, 8, 51).suspicions().is_empty());
    // Another chain: its positions are others.
    let known = next.memory.oldest(DiskId(0), equal);
    next.healed(
        ChainId([4; 16]),
        &Reach::Ranges(Ranges::of([(DiskId(0), one)])),
        SequenceNumber(3),
        &disks,
        WallTime(60),
    );
    assert!(known.is_some() && next.memory.oldest(DiskId(0), equal).is_none());
}

#[test]
fn a_disk_that_differs_everywhere_is_another_disk() {
    let mut scrub = scrubber(&Kept::default(), 1, 7);
    let disks = [disk(0, 1 << 30), disk(1, 1 << 20)];
    scrub.begin(&disks, WallTime(7));
    for count in 0..=DIVERGENT_STRETCHES_MAX {
        let stretch = scrub.next(CHAIN, &disks, WallTime(8));
        let first = (DiskId(0), ByteRange::new(stretch[0].1.start, 4096), ScrubFinding::Differs);
        let found = scrub.compared(&outcome(9, vec![first]), &disks, WallTime(9)).expect("it differs");
        let whole = Ranges::of([(DiskId(0), ByteRange::new(0, 1 << 30))]);
        assert_eq!(found.ranges == whole, count == DIVERGENT_STRETCHES_MAX, "{count}");
    }
    assert_eq!(
        scrub.next(CHAIN, &disks, WallTime(9)),
        [(DiskId(1), ByteRange::new(0, 1 << 20))],
        "the rest of it is healed"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is found, every leaf is looked at, busy ones three times, and the round comes to its end.
    #[test]
    fn every_leaf_of_a_round_is_looked_at(
        sizes in prop::collection::vec(0u64..6_000_000, 1..4),
        given_up in prop::collection::vec(any::<bool>(), 40),
        busy in prop::collection::vec((0usize..3, 0u64..1500, 1u64..40), 0..6),
    ) {
        let disks: Vec<DiskGeometry> = (0u16..).zip(&sizes).map(|(id, size)| disk(id, size / 512 * 512)).collect();
        let mut scrub = scrubber(&Kept::default(), 1, 1);
        scrub.begin(&disks, WallTime(1));
        let mut looked: BTreeMap<(DiskId, u64), u32> = BTreeMap::new();
        let is_busy = |disk: DiskId, leaf: u64| {
            busy.iter().any(|(of, first, len)| usize::from(disk.0) == *of && (*first..first + len).contains(&leaf))
        };
        let mut stretches = 0usize;
        loop {
            let stretch = scrub.next(CHAIN, &disks, WallTime(2));
            if stretch.is_empty() {
                break;
            }
            stretches += 1;
            prop_assert!(stretches < 200);
            prop_assert!(stretch.iter().map(|(_, range)| range.len).sum::<u64>() <= 10 << 20);
            if given_up.get(stretches).copied().unwrap_or(false) {
                scrub.given_up(Monotonic(0), "again");
                continue;
            }
            let mut findings = Vec::new();
            for (disk, range) in stretch {
                for leaf in range.split_at_multiples(LEAF_BYTES) {
                    let number = leaf.start / LEAF_BYTES;
                    *looked.entry((disk, number)).or_default() += 1;
                    let finding = if is_busy(disk, number) { ScrubFinding::Busy } else { ScrubFinding::Same };
                    findings.push((disk, leaf, finding));
                }
            }
            prop_assert_eq!(scrub.compared(&outcome(5, findings), &disks, WallTime(3)), None);
        }
        for geometry in &disks {
            for leaf in 0..geometry.size_bytes.div_ceil(LEAF_BYTES) {
                let expected = if is_busy(geometry.disk, leaf) { u32::from(ATTEMPTS_MAX) } else { 1 };
                prop_assert_eq!(looked.get(&(geometry.disk, leaf)).copied(), Some(expected));
                let end = geometry.size_bytes.min((leaf + 1) * LEAF_BYTES);
                let range = ByteRange::new(leaf * LEAF_BYTES, end - leaf * LEAF_BYTES);
                let known = scrub.memory.oldest(geometry.disk, range);
                prop_assert_eq!(known.is_some(), !is_busy(geometry.disk, leaf));
            }
        }
        let left = scrub.progress(&disks);
        prop_assert!(!left.running && left.round_bytes == 0);
    }
}
