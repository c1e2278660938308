use bytes::Bytes;

use super::*;
use crate::change::HealId;
use crate::geometry::{ByteRange, DiskGeometry, DiskIdentity, GRANULE_BYTES, LEAF_BYTES};
use crate::position::{InstanceId, MachineId};
use crate::wire::{OfferHashes, OfferedLeaf, PROTOCOL_VERSION, Welcome};
use crate::{Epoch, PointTime, StreamHash};

const DISK: DiskId = DiskId(0);
const SECOND: u64 = 1_000_000_000;

fn granule(index: u64) -> ByteRange {
    ByteRange::new(index * GRANULE_BYTES, GRANULE_BYTES)
}

/// A machine whose maps are rotated for heals alone, and that proves nothing by itself.
pub(super) fn config() -> SenderConfig {
    SenderConfig {
        machine: MachineId([1; 16]),
        instance: InstanceId([2; 16]),
        boot: [3; 16],
        vm_generation: [0; 16],
        started: PointTime(1),
        name: "a machine".into(),
        hashes: OfferHashes::Plain,
        rotate_every_ns: u64::MAX >> 1,
        proof_every_ns: u64::MAX >> 1,
        heal_chunk_bytes: GRANULE_BYTES,
        heal_window_bytes: 2 * GRANULE_BYTES,
    }
}

/// A sender, its link up, and the owner of a capture into which nobody writes.
struct Owner {
    sender: Sender,
    epoch: u32,
    now: u64,
    /// Reads are answered.
    answers: bool,
    sent: Vec<Message>,
}

impl Owner {
    /// A first replication, up to the point at which only the heal's end is left to be said.
    fn about_to_end() -> Owner {
        let sender = Sender::new(config(), HealNeed::Whole, 0, None);
        let mut owner = Owner { sender, epoch: 1, now: 0, answers: true, sent: Vec::new() };
        let disk = DiskGeometry {
            disk: DISK,
            path: "/dev/vda".into(),
            identity: DiskIdentity { serial: "serial".into(), fingerprint: [0; 16] },
            size_bytes: 32 * GRANULE_BYTES,
            logical_sector_bytes: 512,
            physical_sector_bytes: 4096,
        };
        owner.feed(Event::LinkUp { now: SourceTime(0), disks: vec![disk] });
        owner.feed(Event::Received(Message::Welcome(Welcome {
            version: PROTOCOL_VERSION,
            chain: ChainId([9; 16]),
            generation: Generation(0),
            resume_after: SequenceNumber(0),
            continues: false,
            hash: StreamHash::default(),
            committed: SequenceNumber(0),
            past: None,
            need: HealNeed::Whole,
            base_empty: true,
            window_bytes: 1 << 20,
        })));
        owner.pump_until_ending();
        owner.sent.clear();
        owner
    }

    fn feed(&mut self, event: Event) {
        for action in self.sender.apply(event) {
            self.execute(action);
        }
    }

    fn pump(&mut self) {
        for action in self.sender.pump() {
            self.execute(action);
        }
    }

    fn pump_until_ending(&mut self) {
        (0..8).for_each(|_| self.pump());
        assert!(matches!(self.sender.heal, Heal::Ending { .. }), "{:?}", self.sender.heal);
    }

    fn execute(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.sent.push(message),
            Action::Rotate { .. } => {
                self.epoch += 1;
                self.feed(Event::Rotated(Some(Epoch(self.epoch))));
            }
            Action::AwaitSettled(epoch) => self.feed(Event::Settled { epoch, producer: 0 }),
            Action::CollectHealSet(_) => self.feed(Event::HealSet(vec![(DISK, vec![granule(0)])])),
            Action::ReadForHeal { disk, range, .. } if self.answers => {
                let leaves = vec![OfferedLeaf::Unknown; (range.len / LEAF_BYTES) as usize];
                let data = Some(Bytes::from(vec![7; range.len as usize]));
                self.feed(Event::HealRead { disk, range, leaves, data });
            }
            Action::SampleProducer => self.feed(Event::Producer(0)),
            _ => {}
        }
    }

    /// The capture is looked at, and writes to these ranges have failed.
    fn look(&mut self, failed: &[ByteRange]) {
        let unstreamed = failed.iter().map(|range| (DISK, *range)).collect();
        let (gap_count, gap_cause, producer) = (0, String::new(), 0);
        self.feed(Event::Report(CaptureReport { gap_count, gap_cause, unstreamed, producer }));
    }

    /// The receiver commits what it has.
    fn commit(&mut self, heal: u64) {
        let [assigned, ..] = self.sender.watermarks();
        self.feed(Event::Received(Message::Ack { journaled: assigned, committed: assigned, window_bytes: 1 << 20 }));
        self.feed(Event::Received(Message::HealCommitted { heal: HealId(heal) }));
    }

    fn wait(&mut self, ns: u64) {
        self.now += ns;
        self.feed(Event::Tick { now: SourceTime(self.now), known: None });
    }

    fn said(&mut self) -> Vec<&'static str> {
        let name = |message: Message| match message {
            Message::Break { reach: Reach::Machine, .. } => "machine broke",
            Message::Break { .. } => "ranges broke",
            Message::HealBegin { reach: Reach::Machine, .. } => "heal of the machine",
            Message::HealBegin { .. } => "heal of ranges",
            Message::HealEnd { .. } => "heal ended",
            Message::HealAbort { .. } => "heal aborted",
            Message::Changes(_) => "changes",
            Message::HealData { .. } => "data",
            Message::Offer { .. } => "offer",
            other => panic!("{other:?}"),
        };
        self.sent.drain(..).map(name).collect()
    }
}

#[test]
fn a_heal_ends_when_nothing_is_in_the_way() {
    let mut owner = Owner::about_to_end();
    owner.look(&[]);
    assert_eq!(owner.said(), ["heal ended"]);
    assert!(
        matches!(owner.sender.stream, StreamState::Whole) && !owner.sender.is_whole(),
        "whole, once that is committed"
    );
    owner.commit(1);
    assert!(owner.sender.is_whole() && !owner.sender.is_healing());
}

/// The heal's end is a point; what it lacks is said before.
#[test]
fn what_failed_while_a_heal_ran_is_told_before_its_end() {
    let mut owner = Owner::about_to_end();
    owner.look(&[granule(3)]);
    owner.look(&[granule(3)]);
    assert_eq!(owner.said(), [""; 0]);
    // Whoever holds the stream back holds the break back, and the heal's end with it.
    owner.sender.hold(true);
    owner.pump();
    owner.look(&[]);
    assert_eq!(owner.said(), [""; 0]);
    owner.sender.hold(false);
    owner.pump();
    owner.look(&[]);
    assert_eq!(owner.said(), ["ranges broke", "heal ended"]);
    // The range is healed by a heal of its own.
    owner.commit(1);
    owner.wait(60 * SECOND);
    owner.pump();
    owner.pump();
    assert_eq!(owner.said()[..2], ["changes", "heal of ranges"]);
}

/// More failures than can be told one by one, behind a heal's start: this heal may have read before them, so it cannot end
/// what they broke.
#[test]
fn too_many_failures_while_a_heal_runs_begin_it_anew() {
    let mut owner = Owner::about_to_end();
    for failure in 0..8 {
        owner.look(&[granule(2 * failure)]);
        owner.pump();
        assert!(!owner.sender.lacking.is_empty());
        assert!(owner.sender.is_healing());
    }
    // The eight of them do not keep it from ending; the ninth does.
    assert_eq!(owner.said(), ["ranges broke"; 8]);
    owner.look(&[granule(20)]);
    assert_eq!(owner.said(), ["heal aborted"]);
    assert!(owner.sender.lacks_machine());
    owner.wait(60 * SECOND);
    (0..3).for_each(|_| owner.pump());
    assert_eq!(owner.said()[..2], ["changes", "heal of the machine"]);
}

/// The same while only ranges are healed, or after a heal's end that is not committed: the machine is broken then.
#[test]
fn too_many_failures_in_a_whole_stream_break_the_machine() {
    for ended in [false, true] {
        let mut owner = Owner::about_to_end();
        owner.look(&[]);
        if !ended {
            owner.commit(1);
            owner.answers = false;
            owner.look(&[granule(30)]);
            owner.wait(60 * SECOND);
            (0..3).for_each(|_| owner.pump());
            assert!(matches!(owner.sender.heal, Heal::Running(_)), "{:?}", owner.sender.heal);
        }
        owner.said();
        let room = if ended { 8 } else { 7 };
        for failure in 0..room {
            owner.look(&[granule(2 * failure)]);
            owner.pump();
        }
        assert!(owner.sender.is_whole() || ended, "the stream is whole but for these ranges");
        owner.said();
        owner.look(&[granule(20)]);
        owner.pump();
        assert_eq!(owner.said(), if ended { vec!["machine broke"] } else { vec!["heal aborted", "machine broke"] });
        owner.wait(60 * SECOND);
        owner.answers = true;
        (0..3).for_each(|_| owner.pump());
        assert_eq!(owner.said()[..2], ["changes", "heal of the machine"]);
    }
}
