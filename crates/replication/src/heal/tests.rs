//! Offers by granule against the obvious way: look at every leaf.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::change::{Change, ChangeKind, SourceTime, StreamHash};
use crate::cut::{CutPlanner, PointTime};
use crate::geometry::{DiskGeometry, DiskIdentity, GRANULE_BYTES};
use crate::leaf::{LeafHash, PlainLeafHash};
use crate::offers::{differs, granule_differs};
use crate::position::{ChainId, Generation, InstanceId, MachineId};
use crate::receiver::{Action, Event, Receiver, SessionStart};
use crate::wire::{HealNeed, Hello, OfferHashes, PROTOCOL_VERSION};

const DISK: DiskId = DiskId(3);
const HEAL: HealId = HealId(1);

fn key() -> LeafKey {
    LeafKey::new([5; 32])
}

/// A leaf's content is one number; 0 is all zeroes.
fn hash_of(content: u8) -> LeafHash {
    match content {
        0 => key().zero_leaf(),
        other => key().leaf(PlainLeafHash([other; 16])),
    }
}

#[derive(Debug, Clone)]
struct Case {
    ours: Vec<u8>,
    /// What our index cannot tell.
    unknown: BTreeSet<usize>,
    theirs: Vec<u8>,
    /// What they cannot read.
    broken: BTreeSet<usize>,
    ranges: Vec<ByteRange>,
    chunk_bytes: u64,
    /// Bytes that the disk is short of whole leaves.
    short: u64,
}

fn any_case() -> impl Strategy<Value = Case> {
    let places = |most| prop::collection::btree_set(0usize..200, 0..most);
    let disk = prop::collection::vec(prop_oneof![3 => Just(0u8), 5 => 1u8..4], 1..200);
    let changed = (places(12), places(3), places(3));
    let plan = (1usize..4, any::<u64>(), 0u64..8);
    (disk, changed, plan).prop_map(|(ours, (changed, unknown, broken), (chunk, random, short))| {
        let theirs = ours.iter().enumerate().map(|(at, leaf)| leaf ^ (u8::from(changed.contains(&at)) * 2)).collect();
        let short = short * 512;
        let size = ours.len() as u64 * LEAF_BYTES - short;
        let first = random % ours.len() as u64 * LEAF_BYTES;
        // Two ranges with a hole between them, the first from a leaf's start within a granule.
        let middle = first + (random >> 32) % (ours.len() as u64) * LEAF_BYTES;
        let later = middle + (1 + (random >> 48) % 20) * LEAF_BYTES;
        let ranges = [ByteRange::between(first, middle.min(size)), ByteRange::between(later.min(size), size)];
        let (ranges, chunk_bytes) = (ranges.into_iter().flatten().collect(), chunk as u64 * GRANULE_BYTES);
        Case { ours, unknown, theirs, broken, ranges, chunk_bytes, short }
    })
}

/// What a heal did.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// Leaves whose content travelled, with what it was.
    sent: BTreeMap<usize, u8>,
    granule_offers: Vec<usize>,
    leaf_offers: Vec<usize>,
    leaves_offered: usize,
}

fn receiver(size: u64) -> Receiver {
    let disk = DiskGeometry {
        disk: DISK,
        path: "/dev/x".into(),
        identity: DiskIdentity { serial: "x".into(), fingerprint: [0; 16] },
        size_bytes: size,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    };
    let hello = Hello {
        version: PROTOCOL_VERSION,
        machine: MachineId([1; 16]),
        instance: InstanceId([1; 16]),
        boot: [1; 16],
        vm_generation: [0; 16],
        name: "x".into(),
        disks: vec![disk],
        resume: None,
        need: HealNeed::Whole,
        cleared: None,
        now: SourceTime(1),
        started: crate::PointTime(0),
        lacking: crate::Ranges::default(),
        followed: None,
    };
    let start = SessionStart {
        chain: ChainId([1; 16]),
        generation: Generation(1),
        journaled: Generation(1).base(),
        hash: StreamHash::default(),
        committed: SequenceNumber(0),
        past: None,
        last_point: PointTime(0),
        planner: CutPlanner::default(),
        continues: false,
        need: HealNeed::Whole,
        in_gap: true,
        base_empty: false,
        window_bytes: 1 << 20,
        wall: PointTime(1),
    };
    Receiver::start(&hello, start).0
}

/// Runs a heal to its end between the real sender's and the real receiver's halves.
fn run(case: &Case, names: Option<LeafKey>) -> Outcome {
    let size = case.ours.len() as u64 * LEAF_BYTES - case.short;
    let p0 = Generation(1).base().next();
    let mut receiver = receiver(size);
    let start = Change {
        sequence: p0,
        time: SourceTime(1),
        disk: DISK,
        continues: false,
        kind: ChangeKind::HealStart { heal: HEAL },
    };
    let hashes = OfferHashes::Keyed(key());
    let begin =
        Message::HealBegin { heal: HEAL, p0, whole: true, reach: crate::Reach::Machine, hashes, planned_bytes: 0 };
    for message in [Message::Changes(vec![start]), begin] {
        receiver.apply(Event::Received { message, wall: PointTime(2) });
    }
    let mut run = HealRun::new(HEAL, p0, vec![(DISK, case.ranges.clone())], false, names, case.chunk_bytes, u64::MAX);
    let held = |leaf: usize| (!case.broken.contains(&leaf)).then(|| hash_of(case.theirs[leaf]));
    let zero = key().zero_leaf();
    let mut kept: BTreeMap<u32, Vec<Option<LeafHash>>> = BTreeMap::new();
    let mut outcome = Outcome::default();
    loop {
        let mut answers = Vec::new();
        for step in run.pump() {
            let message = match step {
                HealStep::Finished => return outcome,
                HealStep::Read { disk, range, .. } => {
                    let first = (range.start / LEAF_BYTES) as usize;
                    let leaf = |at: usize| match case.ours[at] {
                        _ if case.unknown.contains(&at) => OfferedLeaf::Unknown,
                        0 => OfferedLeaf::Zero,
                        content => OfferedLeaf::Hash(hash_of(content).0),
                    };
                    let leaves = (first..first + range.len.div_ceil(LEAF_BYTES) as usize).map(leaf).collect();
                    run.read(disk, range, leaves, None);
                    continue;
                }
                HealStep::Fetch { disk, range } => {
                    let leaf = |at: u64| case.ours[(at / LEAF_BYTES) as usize];
                    let bytes: Vec<u8> = (range.start..range.end()).map(leaf).collect();
                    run.fetched(disk, range, Some(bytes.into()));
                    continue;
                }
                HealStep::Send(message) => message,
            };
            // As it would travel.
            let frame = message.encode();
            match &message {
                Message::OfferGranules { .. } => outcome.granule_offers.push(frame.body_len()),
                Message::Offer { leaves, .. } | Message::OfferLeaves { leaves, .. } => {
                    outcome.leaf_offers.push(frame.body_len());
                    outcome.leaves_offered += leaves.len();
                }
                _ => {}
            }
            let message = Message::decode(frame.kind, frame.body()).expect("it was encoded");
            for action in receiver.apply(Event::Received { message, wall: PointTime(3) }) {
                match action {
                    Action::CompareGranules { offer, start, leaves, granules, .. } => {
                        let mut at = (start / LEAF_BYTES) as usize;
                        let mut wanted = Vec::new();
                        for (count, granule) in granule_leaves(start, leaves).zip(granules) {
                            let hashes: Vec<_> = (at..at + count).map(held).collect();
                            let differs = granule_differs(&key(), zero, granule, &hashes);
                            if differs {
                                kept.entry(offer).or_default().extend(hashes);
                            }
                            wanted.push(differs);
                            at += count;
                        }
                        answers.push(Event::Compared { heal: HEAL, offer, wanted });
                    }
                    Action::CompareLeaves { offer, leaves, .. } => {
                        let held = kept.remove(&offer).expect("kept when the granules were judged");
                        let wanted = leaves.iter().zip(held).map(|(leaf, held)| differs(*leaf, zero, held)).collect();
                        answers.push(Event::Compared { heal: HEAL, offer, wanted });
                    }
                    Action::Compare { offer, start, leaves, .. } => {
                        let first = (start / LEAF_BYTES) as usize;
                        let judge = |(at, leaf): (usize, &OfferedLeaf)| differs(*leaf, zero, held(first + at));
                        let wanted = leaves.iter().enumerate().map(judge).collect();
                        answers.push(Event::Compared { heal: HEAL, offer, wanted });
                    }
                    Action::HealData { range, content, .. } => {
                        for leaf in range.split_at_multiples(LEAF_BYTES) {
                            let content = match &content {
                                HealContent::Data(data) => data[leaf.within(range.start)][0],
                                HealContent::Zero => 0,
                                HealContent::Unreadable => panic!("everything can be read here"),
                            };
                            let twice = outcome.sent.insert((leaf.start / LEAF_BYTES) as usize, content);
                            assert_eq!(twice, None, "a leaf travels once");
                        }
                        run.credit(u64::MAX);
                    }
                    other => panic!("unexpected {other:?}"),
                }
            }
        }
        for answer in answers {
            for action in receiver.apply(answer) {
                let Action::Send(Message::Wants { offer, wanted, .. }) = action else { panic!("{action:?}") };
                run.wants(offer, &wanted).expect("it was offered");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn exactly_the_leaves_that_differ_travel_whichever_way_they_are_offered(case in any_case()) {
        let leaves: BTreeSet<usize> = case.ranges.iter().flat_map(|range| {
            (range.start / LEAF_BYTES) as usize..range.end().div_ceil(LEAF_BYTES) as usize
        }).collect();
        let differs = |at: &usize| {
            case.ours[*at] != case.theirs[*at] || case.broken.contains(at) || case.unknown.contains(at)
        };
        let expected: BTreeMap<usize, u8> =
            leaves.iter().copied().filter(differs).map(|at| (at, case.ours[at])).collect();
        let by_leaf = run(&case, None);
        let by_granule = run(&case, Some(key()));
        prop_assert_eq!(&by_leaf.sent, &expected);
        prop_assert_eq!(&by_granule.sent, &expected);
        prop_assert_eq!(by_leaf.leaves_offered, leaves.len());

        // What it cost: a name a granule, and the leaves of no granule that is equal on both sides. A chunk's edge cuts none.
        let granule = |at: &usize| at / 16;
        let different: BTreeSet<usize> = expected.keys().map(granule).collect();
        let suspected = leaves.iter().filter(|at| different.contains(&granule(at))).count();
        prop_assert!(by_granule.leaves_offered <= suspected);
        let granules = leaves.iter().map(granule).collect::<BTreeSet<_>>().len() + case.ranges.len();
        let offers: usize = by_granule.granule_offers.iter().sum();
        prop_assert!(offers <= 17 * granules + 29 * by_granule.granule_offers.len());
    }
}

#[test]
fn a_sender_that_offers_what_nobody_asked_for_is_stopped() {
    let offer = |offer, leaves, granules: usize| Message::OfferGranules {
        heal: HEAL,
        offer,
        disk: DISK,
        start: 0,
        leaves,
        granules: vec![OfferedLeaf::Unknown; granules],
    };
    let leaves = |offer, count| Message::OfferLeaves { heal: HEAL, offer, leaves: vec![OfferedLeaf::Zero; count] };
    let begun = |hashes| {
        let mut receiver = receiver(1 << 20);
        let p0 = Generation(1).base().next();
        let kind = ChangeKind::HealStart { heal: HEAL };
        let start = Change { sequence: p0, time: SourceTime(1), disk: DISK, continues: false, kind };
        let begin =
            Message::HealBegin { heal: HEAL, p0, whole: true, reach: crate::Reach::Machine, hashes, planned_bytes: 0 };
        for message in [Message::Changes(vec![start]), begin] {
            receiver.apply(Event::Received { message, wall: PointTime(2) });
        }
        receiver
    };
    let tells = |receiver: &mut Receiver, message| {
        let actions = receiver.apply(Event::Received { message, wall: PointTime(3) });
        matches!(actions[..], [Action::Disconnect { .. }])
    };
    let keyed = || begun(OfferHashes::Keyed(key()));
    assert!(tells(&mut begun(OfferHashes::Plain), offer(1, 16, 1)), "granules are named with a key");
    assert!(tells(&mut keyed(), offer(1, 17, 1)), "seventeen leaves are two granules");
    assert!(tells(&mut keyed(), offer(1, 257, 17)), "beyond the disk");
    assert!(tells(&mut keyed(), leaves(1, 16)), "no granule was offered");
    let mut receiver = keyed();
    assert!(!tells(&mut receiver, offer(1, 32, 2)));
    assert!(tells(&mut receiver, leaves(1, 16)), "there is no verdict yet");
    let mut receiver = keyed();
    assert!(!tells(&mut receiver, offer(1, 32, 2)));
    receiver.apply(Event::Compared { heal: HEAL, offer: 1, wanted: vec![false, true] });
    assert!(!tells(&mut receiver, leaves(1, 16)));
    assert!(tells(&mut receiver, leaves(1, 16)), "answered already");
    let mut receiver = keyed();
    let most = limits::OFFERS_IN_FLIGHT_MAX as u32;
    assert!((0..most).all(|number| !tells(&mut receiver, offer(number, 16, 1))));
    assert!(tells(&mut receiver, offer(most, 16, 1)), "each costs memory until it is judged");
}
