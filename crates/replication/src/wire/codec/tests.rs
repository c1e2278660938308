use super::*;
use crate::geometry::DiskIdentity;
use crate::wire::wanted_bitmap;
use crate::{ChangeKind, MarkerKind};
use proptest::prelude::*;

fn any_range(limit: u64) -> impl Strategy<Value = ByteRange> {
    (0u64..1 << 50, 1..=limit).prop_map(|(start, len)| ByteRange::new(start, len))
}

fn any_geometry() -> impl Strategy<Value = DiskGeometry> {
    (any::<u16>(), "[a-z0-9]{1,20}", any::<[u8; 16]>(), 0u64..1 << 40).prop_map(
        |(disk, serial, fingerprint, sectors)| DiskGeometry {
            disk: DiskId(disk),
            path: format!("/dev/{serial}"),
            identity: DiskIdentity { serial, fingerprint },
            size_bytes: sectors * 512,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        },
    )
}

fn any_kind() -> impl Strategy<Value = ChangeKind> {
    prop_oneof![
        (0u64..1 << 50, prop::collection::vec(any::<u8>(), 1..200)).prop_map(|(start, data)| ChangeKind::Write {
            range: ByteRange::new(start, data.len() as u64),
            data: data.into(),
        }),
        any_range(1 << 40).prop_map(|range| ChangeKind::Zero { range }),
        any_range(1 << 40).prop_map(|range| ChangeKind::Discard { range }),
        "[^\u{0}]{0,20}".prop_map(|name| ChangeKind::Marker { kind: MarkerKind::Application, name }),
        "[^\u{0}]{0,20}".prop_map(|text| {
            let kind = MarkerKind::Attempted { failed: text.clone() };
            ChangeKind::Marker { kind, name: text }
        }),
        any_geometry().prop_map(ChangeKind::Geometry),
        any::<u64>().prop_map(|heal| ChangeKind::HealStart { heal: HealId(heal) }),
    ]
}

fn any_change() -> impl Strategy<Value = Change> {
    (any::<u64>(), any::<u64>(), any::<u16>(), any::<bool>(), any_kind()).prop_map(
        |(sequence, time, disk, continues, kind)| Change {
            sequence: SequenceNumber(sequence),
            time: SourceTime(time),
            disk: DiskId(disk),
            continues,
            kind,
        },
    )
}

fn any_message() -> impl Strategy<Value = Message> {
    let heal = any::<u64>().prop_map(HealId);
    prop_oneof![
        prop::collection::vec(any_change(), 0..20).prop_map(Message::Changes),
        (prop::collection::vec(any_geometry(), 0..4), any::<[u8; 16]>(), any::<bool>()).prop_map(
            |(disks, id, some)| Message::Hello(Hello {
                version: 1,
                machine: MachineId(id),
                instance: InstanceId(id),
                boot: id,
                vm_generation: id,
                name: "söme name".into(),
                disks,
                resume: some.then_some(Resume {
                    chain: ChainId(id),
                    generation: Generation(7),
                    released: SequenceNumber(1),
                    sent: SequenceNumber(2),
                    hash: StreamHash([5; 32]),
                }),
                need: HealNeed::Maps,
                cleared: some.then_some((ChainId(id), SequenceNumber(9))),
                now: SourceTime(3),
                started: PointTime(4),
                lacking: Ranges::of([(DiskId(1), ByteRange::new(512, 1024))]),
                followed: some.then_some(ChainId(id)),
            })
        ),
        any::<[u8; 32]>().prop_map(|hash| Message::Welcome(Welcome {
            version: 1,
            chain: ChainId([1; 16]),
            generation: Generation(3),
            resume_after: SequenceNumber(5),
            continues: true,
            hash: StreamHash(hash),
            committed: SequenceNumber(4),
            need: HealNeed::Whole,
            base_empty: true,
            window_bytes: 1,
            past: (hash[0] & 1 == 0).then_some((SequenceNumber(3), StreamHash(hash))),
        })),
        (heal, any::<[u8; 32]>()).prop_map(|(heal, key)| Message::HealBegin {
            heal,
            p0: SequenceNumber(1),
            whole: true,
            reach: Reach::Machine,
            hashes: OfferHashes::Keyed(LeafKey::new(key)),
            planned_bytes: 9,
        }),
        (any::<u64>(), any_range(1 << 40)).prop_map(|(at, range)| Message::Break {
            at: SequenceNumber(at),
            reach: Reach::Ranges(Ranges::of([(DiskId(3), range)])),
            cause: "a write failed".into(),
        }),
        (any::<u64>(), prop::collection::vec(any::<Option<[u8; 16]>>(), 1..50)).prop_map(|(behind, leaves)| {
            let leaves = leaves.into_iter().map(|hash| hash.map_or(OfferedLeaf::Unreadable, OfferedLeaf::Hash));
            Message::ScrubOffer {
                offer: behind / 3,
                behind: SequenceNumber(behind),
                disk: DiskId(3),
                start: 8192,
                leaves: leaves.collect(),
            }
        }),
        prop::collection::vec(any::<bool>(), 1..50).prop_map(|leaves| Message::ScrubVerdict {
            offer: 7,
            differing: wanted_bitmap(&leaves),
            untold: wanted_bitmap(&leaves[1..]),
        }),
        (0..u64::MAX, any_range(1 << 40)).prop_map(|(after, range)| Message::Suspect {
            id: after / 7,
            after: SequenceNumber(after),
            until: SequenceNumber(after + 1),
            ranges: Ranges::of([(DiskId(3), range)]),
            cause: "differs".into(),
        }),
        any::<u64>().prop_map(|id| Message::SuspectNoted { id }),
        Just(Message::Ping),
        ".{0,50}".prop_map(|document| Message::Describe { document }),
        prop::collection::vec(any::<Option<[u8; 16]>>(), 1..50).prop_map(|leaves| Message::Offer {
            heal: HealId(1),
            offer: 2,
            disk: DiskId(3),
            start: 8192,
            leaves: leaves.into_iter().map(|hash| hash.map_or(OfferedLeaf::Zero, OfferedLeaf::Hash)).collect(),
        }),
        (prop::collection::vec(0u8..3, 1..50), any::<[u8; 16]>(), any::<bool>()).prop_map(|(kinds, hash, first)| {
            let entry = |kind: &u8| match kind {
                0 => OfferedLeaf::Zero,
                1 => OfferedLeaf::Hash(hash),
                _ => OfferedLeaf::Unknown,
            };
            let offered: Vec<OfferedLeaf> = kinds.iter().map(entry).collect();
            match first {
                true => Message::OfferGranules {
                    heal: HealId(1),
                    offer: 2,
                    disk: DiskId(3),
                    start: 4096,
                    leaves: 700,
                    granules: offered,
                },
                false => Message::OfferLeaves { heal: HealId(1), offer: 2, leaves: offered },
            }
        }),
        prop::collection::vec(any::<bool>(), 1..50).prop_map(|wanted| Message::Wants {
            heal: HealId(1),
            offer: 2,
            wanted: wanted_bitmap(&wanted),
        }),
        prop::collection::vec(any::<u8>(), 1..500).prop_map(|data| Message::HealData {
            heal: HealId(1),
            disk: DiskId(2),
            range: ByteRange::new(4096, data.len() as u64),
            content: HealContent::Data(data.into()),
        }),
    ]
}

proptest! {
    #[test]
    fn messages_come_back_as_they_went_in(message in any_message()) {
        let frame = message.encode();
        prop_assert_eq!(Message::decode(frame.kind, frame.body()), Ok(message));
    }

    #[test]
    fn damaged_messages_are_answered_not_feared(
        message in any_message(), at in any::<prop::sample::Index>(), to: u8, keep in any::<prop::sample::Index>()
    ) {
        let frame = message.encode();
        let mut body = frame.body().to_vec();
        if body.is_empty() {
            body.push(to);
        }
        let index = at.index(body.len());
        body[index] = to;
        body.truncate(keep.index(body.len()) + 1);
        let _ = Message::decode(frame.kind, body.clone().into());
        let _ = Message::decode(to, body.into());
    }
}

#[test]
fn golden_offer_frame() {
    let leaves = [OfferedLeaf::Hash([9; 16]), OfferedLeaf::Zero, OfferedLeaf::Unknown, OfferedLeaf::Zero];
    let leaves = [&leaves[..], &[OfferedLeaf::Hash([8; 16])]].concat();
    let frame = Message::OfferLeaves { heal: HealId(3), offer: 7, leaves }.encode();
    assert_eq!(frame.kind, 19);
    let head = [3, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 5, 0b0010_0001, 1];
    assert_eq!(frame.body().to_vec(), [&head[..], &[9; 16], &[8; 16]].concat());
    let mut sloppy = frame.body().to_vec();
    sloppy[14] |= 4;
    assert!(Message::decode(19, sloppy.into()).is_err(), "one message has one form");
}

/// The bytes of version 1 as they were first written; a change here breaks running agents.
#[test]
fn golden_change_frame() {
    let message = Message::Changes(vec![Change {
        sequence: Generation(2).base().next(),
        time: SourceTime(5),
        disk: DiskId(1),
        continues: true,
        kind: ChangeKind::Write { range: ByteRange::new(4096, 3), data: Bytes::from_static(b"abc") },
    }]);
    let frame = message.encode();
    assert_eq!(frame.kind, 4);
    assert_eq!(
        frame.body().to_vec(),
        [&[1, 0x81, 1, 0, 0, 0, 0, 0x20, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x80, 0x20, 3][..], b"abc"].concat()
    );
}
