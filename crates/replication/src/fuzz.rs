//! Fuzz targets of this crate: bytes that a peer may send, and scripts of events for the state machines. Compiled for tests
//! and fuzzers only; see `fuzz/README.md`.

mod receiver_events;
mod script;
mod sender_events;

use bytes::Bytes;

use crate::codec::Decoder;
use crate::wire::Message;
use crate::{ByteRange, Change};

pub use receiver_events::receiver_events;
pub use sender_events::sender_events;

/// `kind ‖ body` of a message: what is understood is encoded to something that is understood the same.
pub fn wire_message(data: &[u8]) -> bool {
    let Some((&kind, body)) = data.split_first() else { return false };
    let Ok(message) = Message::decode(kind, Bytes::copy_from_slice(body)) else { return false };
    let frame = message.encode();
    assert_eq!(frame.kind, kind);
    assert_eq!(Message::decode(frame.kind, frame.body()), Ok(message));
    true
}

/// A change as journals store it, without and with its data, and the ranges in it.
pub fn change(data: &[u8]) -> bool {
    let mut input = Decoder::new(data.to_vec());
    let Ok(mut change) = Change::decode_head(&mut input) else { return false };
    if change.attach_data(&mut input).is_err() {
        return false;
    }
    if let Some(range) = change.kind.range() {
        assert!(range.len > 0 && range.start.checked_add(range.len).is_some(), "{range:?}");
        let pieces: Vec<ByteRange> = range.split_at_multiples(1 << 50).collect();
        assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), range.len);
        assert!(range.whole_units(1 << 50).is_none_or(|units| units.start >= range.start && units.len <= range.len));
    }
    let mut out = crate::codec::Encoder::new();
    change.encode_head(&mut out);
    if let crate::ChangeKind::Write { data, .. } = &change.kind {
        out.raw(data);
    }
    let mut again = Decoder::new(out.finish());
    let mut read = Change::decode_head(&mut again).expect("what was encoded is decoded");
    read.attach_data(&mut again).expect("what was encoded is decoded");
    assert_eq!(read, change);
    true
}

#[cfg(test)]
#[path = "../../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Encoder;
    use crate::leaf::LeafKey;
    use crate::wire::{
        HealContent, HealNeed, Hello, OfferHashes, OfferedLeaf, PROTOCOL_VERSION, RefusalCode, Resume, Welcome,
    };
    use crate::{
        ChainId, ChangeKind, DiskGeometry, DiskId, DiskIdentity, Generation, HealId, InstanceId, MachineId, MarkerKind,
        PointTime, Ranges, Reach, SequenceNumber, SourceTime, StreamHash,
    };

    fn geometry() -> DiskGeometry {
        DiskGeometry {
            disk: DiskId(1),
            path: "/dev/vda".into(),
            identity: DiskIdentity { serial: "serial-1".into(), fingerprint: [3; 16] },
            size_bytes: 1 << 30,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        }
    }

    fn changes() -> Vec<Change> {
        let range = ByteRange::new(8192, 4096);
        let kinds = [
            ChangeKind::Write { range: ByteRange::new(4096, 5), data: Bytes::from_static(b"bytes") },
            ChangeKind::Zero { range },
            ChangeKind::Discard { range },
            ChangeKind::Marker { kind: MarkerKind::Application, name: "before the update".into() },
            ChangeKind::Geometry(geometry()),
            ChangeKind::HealStart { heal: HealId(4) },
            ChangeKind::Zero { range: ByteRange::new(u64::MAX - 4096, 4096) },
        ];
        let change = |(index, kind)| Change {
            sequence: SequenceNumber(Generation(2).base().0 + 1 + index),
            time: SourceTime(1_000_000 * index),
            disk: DiskId(1),
            continues: index == 0,
            kind,
        };
        (0..).zip(kinds).map(change).collect()
    }

    fn messages() -> Vec<(&'static str, Message)> {
        let (chain, heal, sequence) = (ChainId([2; 16]), HealId(1), SequenceNumber(9));
        let (disk, offer, hash) = (DiskId(1), 2, StreamHash([6; 32]));
        let lacking = Ranges::of([(disk, ByteRange::new(0, 4096)), (disk, ByteRange::new(1 << 30, 512))]);
        let hello = Hello {
            version: PROTOCOL_VERSION,
            machine: MachineId([1; 16]),
            instance: InstanceId([4; 16]),
            boot: [5; 16],
            vm_generation: [0; 16],
            name: "söme machine".into(),
            disks: vec![geometry()],
            resume: Some(Resume { chain, generation: Generation(3), released: sequence, sent: sequence, hash }),
            need: HealNeed::Maps,
            cleared: Some((chain, sequence)),
            now: SourceTime(77),
            started: PointTime(5),
            lacking: lacking.clone(),
            followed: Some(chain),
        };
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            chain,
            generation: Generation(3),
            resume_after: sequence,
            continues: true,
            hash,
            committed: sequence,
            need: HealNeed::Whole,
            base_empty: false,
            window_bytes: 16 << 20,
            past: Some((sequence, hash)),
        };
        let suspect = Message::Suspect {
            id: 3,
            after: sequence,
            until: SequenceNumber(12),
            ranges: lacking.clone(),
            cause: "found to differ by a scrub".into(),
        };
        let hashes = OfferHashes::Keyed(LeafKey::new([7; 32]));
        let leaves = vec![OfferedLeaf::Zero, OfferedLeaf::Hash([8; 16]), OfferedLeaf::Unknown, OfferedLeaf::Unreadable];
        let data = |content| Message::HealData { heal, disk, range: ByteRange::new(4096, 4), content };
        let begin =
            Message::HealBegin { heal, p0: sequence, whole: true, reach: Reach::Machine, hashes, planned_bytes: 9 };
        let names = vec![OfferedLeaf::Hash([8; 16]), OfferedLeaf::Zero];
        let (scrubbed, bits) = (leaves.clone(), Bytes::from_static(&[0b0101]));
        let granules = Message::OfferGranules { heal, offer, disk, start: 8192, leaves: 20, granules: names };
        vec![
            ("hello", Message::Hello(hello)),
            ("welcome", Message::Welcome(welcome)),
            ("refuse", Message::Refuse { code: RefusalCode::Fenced, reason: "another writer".into() }),
            ("changes", Message::Changes(changes())),
            ("proof", Message::Proof { captured: sequence, time: SourceTime(1), now: SourceTime(2) }),
            ("break", Message::Break { at: sequence, reach: Reach::Machine, cause: "overflow".into() }),
            ("break-of-ranges", Message::Break { at: sequence, reach: Reach::Ranges(lacking), cause: "grown".into() }),
            ("ack", Message::Ack { journaled: sequence, committed: sequence, window_bytes: 1 << 20 }),
            ("heal-begin", begin),
            ("offer", Message::Offer { heal, offer, disk, start: 8192, leaves: leaves.clone() }),
            ("offer-granules", granules),
            ("offer-leaves", Message::OfferLeaves { heal, offer, leaves }),
            ("scrub-offer", Message::ScrubOffer { offer: 5, behind: sequence, disk, start: 8192, leaves: scrubbed }),
            ("scrub-verdict", Message::ScrubVerdict { offer: 5, differing: bits.clone(), untold: bits }),
            ("suspect", suspect),
            ("suspect-noted", Message::SuspectNoted { id: 3 }),
            ("wants", Message::Wants { heal, offer, wanted: Bytes::from_static(&[0b0101]) }),
            ("heal-data", data(HealContent::Data(Bytes::from_static(b"data")))),
            ("heal-zero", data(HealContent::Zero)),
            ("heal-credit", Message::HealCredit { heal, received_bytes: 4096 }),
            ("heal-end", Message::HealEnd { heal, end: sequence }),
            ("heal-abort", Message::HealAbort { heal, cause: "a break".into() }),
            ("heal-committed", Message::HealCommitted { heal }),
            ("heal-restart", Message::HealRestart { heal, reason: "busy".into() }),
            ("bye", Message::Bye { reason: "stopped".into() }),
        ]
    }

    /// What a first replication makes the sender's owner do, then writes, a new link, an overflow and what follows it.
    #[test]
    fn events_of_senders() {
        let welcome = |flags: u8| vec![0, 2, flags, 0, 0, 0xff, 0xff];
        let heal =
            vec![23, 0, 23, 14, 1, 16, 23, 14, 0, 3, 14, 0, 5, 23, 18, 0, 0xff, 0xff, 18, 0, 0x55, 0x55, 23, 19, 0];
        let stream = vec![6, 0x42, 1, 3, 9, 8, 8, 0x10, 2, 2, 10, 0, 23, 4, 0, 0, 0xff, 0xff, 12, 9, 9, 0, 23];
        let committed = vec![20, 12, 0xff, 0xff, 0, 23, 0, 4, 0, 0, 0xff, 0xff, 14, 1];
        let first = [&[0][..], &welcome(0x40), &heal, &committed, &stream].concat();
        let again = [&first[..], &[1], &welcome(1), &[23], &stream, &[10, 1, 9], &heal, &committed].concat();
        let keyed = [&[0x81][..], &welcome(0x40), &heal, &[10, 6, 9, 23], &heal, &welcome(0x41), &heal].concat();
        let held = [&[2][..], &welcome(0x50), &heal, &[22, 1, 23, 22, 0, 23], &stream, &[1, 0, 21, 0, 23]].concat();
        // A stretch: wanted, an epoch of its own, everything committed, then reads, verdicts and marks.
        let settled = [12, 0xff, 0xff, 0, 0, 23, 14, 1, 4, 0, 0, 0xff, 0xff, 20, 12, 0xff, 0xff, 0, 0, 14, 1];
        let stretch =
            [&[22, 192][..], &settled, &settled, &[23, 14, 0, 9, 23, 22, 193, 0, 0, 3, 0, 0, 14, 0, 0]].concat();
        let found = [22, 194, 23, 22, 195, 22, 198, 23];
        let scrubbed = [&first[..], &stretch, &stretch, &found, &heal, &committed, &stretch].concat();
        let seeds = [("first", first), ("again", again), ("keyed", keyed), ("held", held), ("scrubbed", scrubbed)];
        replay::replay("sender_events", sender_events, &seeds);
    }

    /// Requests and what makes them durable, a break and its heal, a heal of ranges.
    #[test]
    fn events_of_receivers() {
        let begin = [1, 5, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0];
        let renewed = [1, 5, 1, 0, 1, 0, 0, 0, 0, 0];
        let write = [0, 1, 0, 3, 0, 1, 2, 0, 5, 0, 0, 0, 4, 0, 9, 1, 9, 9, 0, 0, 0, 7];
        let durable = [17, 0, 18, 0, 5, 0, 0, 0, 1, 1];
        let start = [0, 0, 0, 1, 0, 7, 0, 0, 0, 1];
        let machine = [7, 0, 1, 0, 0, 8, 0, 0, 0, 1, 0, 0];
        let ranges = [7, 0, 0, 0, 8, 1, 0, 9, 1, 0, 0, 8, 1, 0, 0, 0, 0, 8, 1, 0, 9, 1, 0, 0];
        let data = [10, 0, 1, 0, 0, 3, 0, 9, 0, 0, 13, 0, 0, 0, 9, 4, 0, 0, 0, 20, 14, 0, 0, 0, 0, 21];
        let granules = [11, 0, 1, 0, 0, 0, 0, 32, 0, 0, 0, 19, 1, 1, 12, 0, 0, 0, 0];
        let stream = [&begin[..], &write, &durable, &write].concat();
        let broken = [&begin[..], &write, &start, &machine, &data, &granules, &write, &durable].concat();
        let partial = [&begin[..], &start, &ranges, &data, &write, &durable].concat();
        let fresh = [&renewed[..], &start, &machine, &granules, &data, &write, &durable].concat();
        let scrub = [23, 70, 0, 0, 0, 5, 0, 8, 0, 0, 23, 130, 23, 200, 216, 2, 0, 0, 9, 1, 0, 0, 23, 230];
        let scrubbed = [&begin[..], &write, &durable, &scrub, &write, &scrub].concat();
        let seeds =
            [("stream", stream), ("broken", broken), ("partial", partial), ("fresh", fresh), ("scrubbed", scrubbed)];
        replay::replay("receiver_events", receiver_events, &seeds);
    }

    #[test]
    fn wire_messages() {
        let bytes = |message: &Message| {
            let frame = message.encode();
            [&[frame.kind][..], &frame.body()].concat()
        };
        let seeds: Vec<_> = messages().iter().map(|(name, message)| (*name, bytes(message))).collect();
        replay::replay("wire_message", wire_message, &seeds);
    }

    #[test]
    fn stored_changes() {
        let names = ["write", "zero", "discard", "marker", "geometry", "heal-start", "last-bytes"];
        let bytes = |change: &Change| {
            let mut out = Encoder::new();
            change.encode_head(&mut out);
            if let ChangeKind::Write { data, .. } = &change.kind {
                out.raw(data);
            }
            out.finish()
        };
        let seeds: Vec<_> = names.into_iter().zip(changes().iter().map(bytes)).collect();
        replay::replay("change", change, &seeds);
    }
}
