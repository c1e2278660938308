//! The messages and what they carry. How they become bytes: [`super::codec`].

use bytes::Bytes;

use crate::change::{Change, HealId, SourceTime, StreamHash};
use crate::cut::PointTime;
use crate::geometry::{ByteRange, DiskGeometry};
use crate::leaf::LeafKey;
#[cfg(doc)]
use crate::limits;
use crate::position::{ChainId, DiskId, Generation, InstanceId, MachineId, SequenceNumber};
use crate::reach::{Ranges, Reach};

/// Version of this protocol.
pub const PROTOCOL_VERSION: u16 = 1;

/// What a sender knows of a stream that it wants to go on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    /// The chain it was writing to.
    pub chain: ChainId,
    /// The session's generation.
    pub generation: Generation,
    /// The newest position the receiver acknowledged as journaled; the sender no longer has anything up to it.
    pub released: SequenceNumber,
    /// The newest position the sender assigned.
    pub sent: SequenceNumber,
    /// The stream's hash at `released`.
    pub hash: StreamHash,
}

/// What only a heal can provide, in the sender's judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealNeed {
    /// The stream is whole.
    Nothing,
    /// The dirty maps name everything that the stream did not carry.
    Maps,
    /// Only a comparison of whole disks can tell.
    Whole,
}

/// First message of a sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Highest protocol version the sender speaks.
    pub version: u16,
    /// Who it is; must be the identity of its certificate.
    pub machine: MachineId,
    /// This run of the agent.
    pub instance: InstanceId,
    /// The kernel's boot id.
    pub boot: [u8; 16],
    /// The VM generation id, zero if there is none.
    pub vm_generation: [u8; 16],
    /// The machine's name, for people.
    pub name: String,
    /// Its disks as they are now.
    pub disks: Vec<DiskGeometry>,
    /// The stream it can continue.
    pub resume: Option<Resume>,
    /// What it knows to be missing.
    pub need: HealNeed,
    /// The newest position on whose commit it has cleared a map: below it the maps name nothing any more.
    pub cleared: Option<(ChainId, SequenceNumber)>,
    /// Its monotonic clock now.
    pub now: SourceTime,
    /// When this run of the agent began, by its wall clock: tells a new run from one that was forgotten.
    pub started: PointTime,
    /// Ranges that the sender still lacks although its stream is whole: their own heal is to come.
    pub lacking: Ranges,
    /// The chain that this very run of the sender was last welcomed to; `None` before its first session. A run that was
    /// capturing while its machine's history moved to another chain captures disks that the history did not move to.
    pub followed: Option<ChainId>,
}

/// First message of a receiver that accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// Protocol version of this session.
    pub version: u16,
    /// The chain that this machine follows.
    pub chain: ChainId,
    /// The generation that new changes are numbered in.
    pub generation: Generation,
    /// Everything up to here is journaled; send what comes after.
    pub resume_after: SequenceNumber,
    /// The stream offered in [`Hello::resume`] goes on; otherwise the sender drops what it still holds of it.
    pub continues: bool,
    /// Stream hash at `resume_after`: compared by a sender that continues, adopted by one that does not.
    pub hash: StreamHash,
    /// Everything up to here is in the vault.
    pub committed: SequenceNumber,
    /// A position up to which the vault holds the stream, and the stream's hash there: compared by every sender that knows
    /// the hash at this position.
    pub past: Option<(SequenceNumber, StreamHash)>,
    /// What the stream needs before it is whole.
    pub need: HealNeed,
    /// The receiver holds nothing of these disks: whatever is not zero can be sent without asking.
    pub base_empty: bool,
    /// Stream bytes that may be under way beyond *journaled*.
    pub window_bytes: u64,
}

/// Why a receiver turned a sender away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalCode {
    /// Versions do not overlap.
    Version,
    /// The certificate names another machine, or the machine is not to be protected here.
    NotAuthorised,
    /// Another running agent uses this identity.
    DuplicateIdentity,
    /// Another writer has taken the chain over.
    Fenced,
    /// Try again later.
    Busy,
    /// What was sent makes no sense.
    Protocol,
}

/// One leaf of an offer, or one granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfferedLeaf {
    /// All zeroes.
    Zero,
    /// Plain or keyed hash, as the heal said.
    Hash([u8; 16]),
    /// The offering side cannot tell: always wanted.
    Unknown,
    /// The medium cannot return it: a defect to record.
    Unreadable,
}

/// Which hashes a heal offers.
#[derive(Debug, Clone)]
pub enum OfferHashes {
    /// Plain leaf hashes; the receiver keys them.
    Plain,
    /// Hashes keyed with this key, which the receiver uses for its own disk.
    Keyed(LeafKey),
}

impl PartialEq for OfferHashes {
    fn eq(&self, other: &OfferHashes) -> bool {
        match (self, other) {
            (OfferHashes::Plain, OfferHashes::Plain) => true,
            (OfferHashes::Keyed(a), OfferHashes::Keyed(b)) => a.expose() == b.expose(),
            _ => false,
        }
    }
}

impl Eq for OfferHashes {}

/// What a healed range holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HealContent {
    /// These bytes, exactly as long as the range.
    Data(Bytes),
    /// Zeroes.
    Zero,
    /// Nothing that the medium could return.
    Unreadable,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // The fields repeat the words of the sections above.
pub enum Message {
    Hello(Hello),
    Welcome(Welcome),
    Refuse {
        code: RefusalCode,
        reason: String,
    },
    /// Changes in sequence order, without gaps.
    Changes(Vec<Change>),
    /// Every request submitted before `time` has a sequence up to `captured` and was sent before this message.
    Proof {
        captured: SequenceNumber,
        time: SourceTime,
        now: SourceTime,
    },
    /// Nothing after `at` can be opened until a heal ends.
    /// Of ranges: the same for them, while the rest goes on.
    Break {
        at: SequenceNumber,
        reach: Reach,
        cause: String,
    },
    /// `window_bytes`: see [`Welcome`].
    Ack {
        journaled: SequenceNumber,
        committed: SequenceNumber,
        window_bytes: u64,
    },
    /// The heal whose [`crate::ChangeKind::HealStart`] has sequence `p0`. `whole`: named by doubt, not by maps.
    HealBegin {
        heal: HealId,
        p0: SequenceNumber,
        whole: bool,
        reach: Reach,
        hashes: OfferHashes,
        planned_bytes: u64,
    },
    /// Hashes of consecutive leaves from `start`, a multiple of 4 KiB.
    Offer {
        heal: HealId,
        offer: u32,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    /// Names of the consecutive granules that `leaves` leaves from `start` touch; see [`crate::offers`]. Only a heal with
    /// keyed hashes offers them.
    OfferGranules {
        heal: HealId,
        offer: u32,
        disk: DiskId,
        start: u64,
        leaves: u32,
        granules: Vec<OfferedLeaf>,
    },
    /// The leaves of the granules that were wanted of an offer, in order.
    OfferLeaves {
        heal: HealId,
        offer: u32,
        leaves: Vec<OfferedLeaf>,
    },
    /// Bit i of `wanted`: send leaf i of the offer, or offer the leaves of its granule i.
    Wants {
        heal: HealId,
        offer: u32,
        wanted: Bytes,
    },
    /// One range of at most [`limits::HEAL_DATA_BYTES_MAX`].
    HealData {
        heal: HealId,
        disk: DiskId,
        range: ByteRange,
        content: HealContent,
    },
    /// Heal data received and processed so far, in bytes.
    HealCredit {
        heal: HealId,
        received_bytes: u64,
    },
    /// All data was sent; the disks equal the stream from `end` on.
    HealEnd {
        heal: HealId,
        end: SequenceNumber,
    },
    HealAbort {
        heal: HealId,
        cause: String,
    },
    /// The heal's end is in the vault.
    HealCommitted {
        heal: HealId,
    },
    /// The receiver cannot go on with this heal; begin another.
    HealRestart {
        heal: HealId,
        reason: String,
    },
    /// What the source holds of consecutive leaves from `start`, a multiple of 4 KiB, in plain hashes: compared with the vault,
    /// once it holds everything up to `behind`, and with nothing else. No data follows.
    ScrubOffer {
        offer: u64,
        behind: SequenceNumber,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    /// Bit i of `differing`: leaf i of the offer is not what the vault holds. Bit i of `untold`: nobody can tell, since
    /// the vault knows no hash of it, or it was discarded.
    ScrubVerdict {
        offer: u64,
        differing: Bytes,
        untold: Bytes,
    },
    /// A scrub found `ranges` to differ: points behind `after` and before `until` are not known to hold what the disks held.
    Suspect {
        id: u64,
        after: SequenceNumber,
        until: SequenceNumber,
        ranges: Ranges,
        cause: String,
    },
    /// The vault says so of these points.
    SuspectNoted {
        id: u64,
    },
    /// Are you there? Asked of a sender that was not heard of.
    Ping,
    /// I am.
    Pong,
    /// The sender's machine as recovery will need to know it, a JSON document. Said whenever it likes; not part of the stream.
    Describe {
        document: String,
    },
    /// Sender's orderly good-bye.
    Bye {
        reason: String,
    },
}

/// Whether bit `index` of a [`Message::Wants`] is set.
pub fn is_wanted(wanted: &[u8], index: usize) -> bool {
    wanted.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

/// The bitmap of a [`Message::Wants`].
pub fn wanted_bitmap(wanted: &[bool]) -> Bytes {
    let mut bitmap = vec![0u8; wanted.len().div_ceil(8)];
    for (index, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
        bitmap[index / 8] |= 1 << (index % 8);
    }
    bitmap.into()
}
