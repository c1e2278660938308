//! What a sender is told and what it answers with: the vocabulary between the state machine and its owner.

use super::scrub::{ScrubOutcome, Suspicion};
use crate::change::{ChangeKind, SourceTime, StreamHash};
use crate::cut::PointTime;
use crate::geometry::{ByteRange, DiskGeometry};
use crate::position::{ChainId, DiskId, Epoch, Generation, InstanceId, MachineId, SequenceNumber};
use crate::reach::{Ranges, Reach};
use crate::wire::{Message, OfferHashes, OfferedLeaf};

/// Who sends, and how.
#[derive(Debug, Clone)]
pub struct SenderConfig {
    /// The protected machine.
    pub machine: MachineId,
    /// This run of the agent.
    pub instance: InstanceId,
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// The VM generation id, zero if there is none.
    pub vm_generation: [u8; 16],
    /// When this run of the agent began, by its wall clock.
    pub started: PointTime,
    /// The machine's name, for people.
    pub name: String,
    /// What the hashes of offers are.
    pub hashes: OfferHashes,
    /// Time between rotations of the dirty maps, in nanoseconds.
    pub rotate_every_ns: u64,
    /// Time between proofs that nothing is missing, in nanoseconds.
    pub proof_every_ns: u64,
    /// Bytes of disk read at once by a heal; a multiple of 64 KiB.
    pub heal_chunk_bytes: u64,
    /// Most heal data sent that the receiver has not yet said it stored, in bytes; [`HEAL_WINDOW_BYTES`] unless disks are
    /// tiny. May be exceeded by one message.
    ///
    /// [`HEAL_WINDOW_BYTES`]: crate::limits::HEAL_WINDOW_BYTES
    pub heal_window_bytes: u64,
}

/// A stream as it was left by an agent that ended in order: everything captured was journaled. Only for who knows that no
/// write has happened since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptStream {
    /// The chain it wrote to.
    pub chain: ChainId,
    /// The session's generation.
    pub generation: Generation,
    /// Newest change; the receiver has it durably.
    pub released: SequenceNumber,
    /// The stream's hash there.
    pub hash: StreamHash,
    /// Heals started so far: their numbers are not used again.
    pub heals_started: u64,
    /// Ranges that no heal had completed.
    pub lacking: Ranges,
}

/// How a stream goes on after its sender ended: what the capture keeps beside a ring that outlives the agent.
///
/// Holds only for a whole stream: everything after `ring_end` in the ring gets the numbers after `released`, again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumption {
    /// The chain written to.
    pub chain: ChainId,
    /// The generation that numbers belong to.
    pub generation: Generation,
    /// The newest change that was journaled and whose request ends at `ring_end`.
    pub released: SequenceNumber,
    /// The stream's hash there.
    pub hash: StreamHash,
    /// Ring position of the same place.
    pub ring_end: u64,
    /// The capture's gap count up to which the stream is known to be whole.
    pub gap_count: u64,
    /// Heals started so far: their numbers are not used again.
    pub heals_started: u64,
}

/// One request taken from the capture's ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Ring position after the request.
    pub ring_end: u64,
    /// The epoch it was marked in.
    pub epoch: Epoch,
    /// When it was submitted.
    pub time: SourceTime,
    /// Its disk.
    pub disk: DiskId,
    /// Its pieces, none longer than [`limits::CHANGE_DATA_BYTES_MAX`].
    pub kinds: Vec<ChangeKind>,
}

/// The capture's health, read after the ring was consumed up to `consumed`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureReport {
    /// Drops, copy failures and missed records since the capture began; never decreases.
    pub gap_count: u64,
    /// The newest of them, in words.
    pub gap_cause: String,
    /// What has come to be marked unstreamed, in [`super::Sender::watched_from`] or later epochs, without a gap being
    /// counted: writes that failed. Also what was reported before, if anything is new.
    pub unstreamed: Vec<(DiskId, ByteRange)>,
    /// Ring position after the newest complete request.
    pub producer: u64,
}

/// What happened.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Event {
    /// A link to the receiver stands; nothing was sent on it yet. `disks` are those of now.
    LinkUp {
        now: SourceTime,
        disks: Vec<DiskGeometry>,
    },
    LinkDown,
    Received(Message),
    Captured(Request),
    /// Everything in the ring up to here was handed out, or never will be: a capture may throw records away that lie
    /// beyond a break. Fed before [`Event::Report`] by captures that do.
    Passed(u64),
    /// Fed after every round of consuming.
    Report(CaptureReport),
    /// Everything submitted before `known`, which is not after `now`, was handed in; none if that is not known.
    Tick {
        now: SourceTime,
        known: Option<SourceTime>,
    },
    /// Answer to [`Action::Rotate`]: the new epoch, or none because no slot is free yet.
    Rotated(Option<Epoch>),
    /// Nobody can act under an epoch older than this one; `producer` was read afterwards.
    Settled {
        epoch: Epoch,
        producer: u64,
    },
    /// Answer to [`Action::CollectHealSet`].
    HealSet(Vec<(DiskId, Vec<ByteRange>)>),
    /// Answer to [`Action::ReadForHeal`]: one entry a leaf. `data` holds the whole range unless only hashes are known.
    HealRead {
        disk: DiskId,
        range: ByteRange,
        leaves: Vec<OfferedLeaf>,
        data: Option<bytes::Bytes>,
    },
    /// Answer to [`Action::FetchForHeal`]; none if the range cannot be read.
    HealFetched {
        disk: DiskId,
        range: ByteRange,
        data: Option<bytes::Bytes>,
    },
    /// Answer to [`Action::SampleProducer`].
    Producer(u64),
    /// Compare these ranges, which begin at multiples of 4 KiB, with the vault. Answered by [`Action::ScrubOver`].
    Scrub(Vec<(DiskId, ByteRange)>),
    /// Answer to [`Action::ReadForScrub`]: one entry a leaf, read since it was asked.
    ScrubRead {
        ask: u64,
        leaves: Vec<OfferedLeaf>,
    },
    /// Answer to [`Action::LookForMarks`], looked at since it was asked.
    Marked {
        ask: u64,
        marked: Vec<ByteRange>,
    },
    /// A scrub has found these ranges to differ; the owner remembers it, and the heal set names them.
    Diverged(Suspicion),
    /// An earlier run found them, and nobody is known to have noted it.
    Suspected(Suspicion),
    /// A disk was added, or has grown to what `geometry` says: from `producer` on, what is written to `ranges` is in the ring.
    /// The owner ends the link: the next greeting announces the disk.
    Joined {
        geometry: DiskGeometry,
        ranges: Ranges,
        cause: String,
        producer: u64,
    },
    /// A disk is not captured any more. It stays announced until [`super::Sender::left_disks`] names it.
    Leaving {
        geometry: DiskGeometry,
        cause: String,
    },
    /// A disk that left is not announced any more. The owner ends the link.
    Gone(DiskId),
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[expect(clippy::large_enum_variant, reason = "lives for a moment; a box would cost an allocation a message")]
pub enum Action {
    Send(Message),
    /// Free ring space: everything before this position is journaled.
    Release(u64),
    /// Open the next epoch in stream mode. `for_heal`: fold older epochs first if no slot is free.
    Rotate {
        for_heal: bool,
    },
    /// Feed [`Event::Settled`] as soon as nobody can act under an epoch older than this.
    AwaitSettled(Epoch),
    /// Mark the whole of every disk as named by doubt, persistently.
    RequireWhole,
    /// Fold the maps of all epochs before this one into the heal set and report the set.
    CollectHealSet(Epoch),
    /// `hash`: the receiver will compare; otherwise only zeroes must be told from data.
    ReadForHeal {
        disk: DiskId,
        range: ByteRange,
        hash: bool,
    },
    FetchForHeal {
        disk: DiskId,
        range: ByteRange,
    },
    /// Read the producer position, now or once everything up to there is a state of the disks.
    SampleProducer,
    /// The heal that covered the heal set is committed: forget it.
    ClearHealSet {
        chain: ChainId,
        committed: SequenceNumber,
    },
    /// Everything this epoch's maps name is committed: forget it, unless it has unstreamed marks.
    ClearEpoch {
        epoch: Epoch,
        chain: ChainId,
        committed: SequenceNumber,
    },
    ReadForScrub {
        ask: u64,
        disk: DiskId,
        range: ByteRange,
    },
    /// Say what is marked within this range, in whatever map, in epochs from `since` on.
    LookForMarks {
        ask: u64,
        since: Epoch,
        disk: DiskId,
        range: ByteRange,
    },
    /// The stretch was compared, or given up for this reason.
    ScrubOver(Result<ScrubOutcome, &'static str>),
    /// The vault says of the points that a suspicion is about what they are, or they are nobody's any more: forget it.
    SuspicionNoted(u64),
    /// A heal has compared these ranges and made them equal: the vault holds at `behind` what the disks held.
    Compared {
        behind: SequenceNumber,
        reach: Reach,
    },
    /// The session cannot go on; close the link, then connect again.
    Disconnect(String),
    /// The receiver turned us away for a reason that reconnecting will not mend soon.
    Refused(String),
}

/// Whether the receiver has everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamState {
    /// Every request since the last heal's end is in the stream.
    Whole,
    /// A request was dropped; what the ring still holds came before it.
    Draining {
        /// Consume up to here.
        until: u64,
        /// Why.
        cause: String,
    },
    /// Nothing after `at` can be opened until a heal is committed.
    Broken {
        /// The last change before the break.
        at: SequenceNumber,
        /// Why.
        cause: String,
    },
}

/// Progress of the heal, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HealProgress {
    /// Bytes of disk that the heal covers.
    pub planned_bytes: u64,
    /// Bytes of disk read or compared so far.
    pub compared_bytes: u64,
    /// Bytes of data that had to travel.
    pub sent_bytes: u64,
}
