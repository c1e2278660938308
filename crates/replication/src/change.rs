//! One change of a machine's disks, as it travels from capture to vault.

use bytes::Bytes;

use crate::codec::{DecodeError, Decoder, Encoder};
use crate::geometry::{ByteRange, DiskGeometry};
use crate::limits;
use crate::position::{DiskId, SequenceNumber};

/// When a change was submitted, in nanoseconds. On the wire: the source's monotonic clock, comparable only within one
/// boot of one machine. From the receiver on (journal, vault): point time, nanoseconds since 1970 that never decrease
/// along a chain; see [`crate::cut`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct SourceTime(pub u64);

/// Why a marker was put into the stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum MarkerKind {
    /// Named by a person or a schedule; crash-consistent.
    Crash,
    /// Taken while file systems and applications were frozen.
    Application,
    /// The last position of a source that was quiesced, flushed, and had nothing in flight.
    Final,
    /// An application-consistent point was asked for and parts of it failed: crash-consistent.
    Attempted {
        /// Which parts, and why.
        failed: String,
    },
}

impl MarkerKind {
    /// Whether applications and file systems were at rest.
    pub fn is_at_rest(&self) -> bool {
        matches!(self, MarkerKind::Application | MarkerKind::Final)
    }

    /// Appends it: a byte, and the text that belongs to it.
    pub fn encode(&self, out: &mut Encoder) {
        match self {
            MarkerKind::Crash => out.u8(0),
            MarkerKind::Application => out.u8(1),
            MarkerKind::Final => out.u8(2),
            MarkerKind::Attempted { failed } => out.u8(3).text(failed),
        };
    }

    /// Reads what [`MarkerKind::encode`] wrote.
    ///
    /// # Errors
    /// It is none, or its text is too long.
    pub fn decode(input: &mut Decoder) -> Result<MarkerKind, DecodeError> {
        Ok(match input.u8("marker kind")? {
            0 => MarkerKind::Crash,
            1 => MarkerKind::Application,
            2 => MarkerKind::Final,
            3 => MarkerKind::Attempted { failed: input.text("what failed", limits::REASON_BYTES_MAX)? },
            value => return Err(DecodeError::Undefined { field: "marker kind", value: value.into() }),
        })
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    /// `range` now holds `data`, which is exactly as long.
    Write {
        /// Where.
        range: ByteRange,
        /// The bytes.
        data: Bytes,
    },
    /// `range` now holds zeroes.
    Zero {
        /// Where.
        range: ByteRange,
    },
    /// `range` is no longer needed; it reads as zeroes, distinct from data that happens to be zero.
    Discard {
        /// Where.
        range: ByteRange,
    },
    /// A named place in the stream. Its position is a cut.
    Marker {
        /// What the place promises.
        kind: MarkerKind,
        /// What people call it.
        name: String,
    },
    /// A disk appeared or changed its size.
    Geometry(DiskGeometry),
    /// The `p0` of a heal: what the heal reads lies below every later change. Overwrites nothing itself.
    HealStart {
        /// The sender's number for this heal, new for each attempt.
        heal: HealId,
    },
}

/// One attempt at a heal, numbered by the sender; never reused within one sequence of generations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HealId(pub u64);

/// One change with its place in the stream. All changes of one bio or one NBD request share its sequence number's
/// cut: a cut never falls between a change with `continues` and the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Place in the chain.
    pub sequence: SequenceNumber,
    /// When it was submitted, by the source's monotonic clock.
    pub time: SourceTime,
    /// The disk it applies to; for markers, disk 0 and without meaning.
    pub disk: DiskId,
    /// The next change belongs to the same request.
    pub continues: bool,
    /// What happened.
    pub kind: ChangeKind,
}

impl ChangeKind {
    /// The disk range this change overwrites, if it overwrites any.
    pub fn range(&self) -> Option<ByteRange> {
        match self {
            ChangeKind::Write { range, .. } | ChangeKind::Zero { range } | ChangeKind::Discard { range } => {
                Some(*range)
            }
            ChangeKind::Marker { .. } | ChangeKind::Geometry(_) | ChangeKind::HealStart { .. } => None,
        }
    }

    /// Bytes of data carried along.
    pub fn data_len(&self) -> usize {
        match self {
            ChangeKind::Write { data, .. } => data.len(),
            _ => 0,
        }
    }
}

const WRITE: u8 = 1;
const ZERO: u8 = 2;
const DISCARD: u8 = 3;
const MARKER: u8 = 4;
const GEOMETRY: u8 = 5;
const HEAL_START: u8 = 6;
const CONTINUES: u8 = 0x80;

impl Change {
    /// Appends everything but the data of a write, which follows elsewhere in the order of the changes.
    pub fn encode_head(&self, out: &mut Encoder) {
        self.encode_head_at(self.time, out);
    }

    fn encode_head_at(&self, time: SourceTime, out: &mut Encoder) {
        let tag = match &self.kind {
            ChangeKind::Write { .. } => WRITE,
            ChangeKind::Zero { .. } => ZERO,
            ChangeKind::Discard { .. } => DISCARD,
            ChangeKind::Marker { .. } => MARKER,
            ChangeKind::Geometry(_) => GEOMETRY,
            ChangeKind::HealStart { .. } => HEAL_START,
        };
        out.u8(if self.continues { tag | CONTINUES } else { tag }).u64(self.sequence.0).u64(time.0).u16(self.disk.0);
        match &self.kind {
            ChangeKind::Write { range, data } => {
                debug_assert_eq!(range.len, data.len() as u64, "a write carries exactly its range");
                range.encode(out);
            }
            ChangeKind::Zero { range } | ChangeKind::Discard { range } => range.encode(out),
            ChangeKind::Marker { kind, name } => {
                kind.encode(out);
                out.text(name);
            }
            ChangeKind::Geometry(geometry) => geometry.encode(out),
            ChangeKind::HealStart { heal } => {
                out.u64(heal.0);
            }
        }
    }

    /// Reads a head. A write's data is empty until [`Change::attach_data`].
    pub fn decode_head(input: &mut Decoder) -> Result<Change, DecodeError> {
        let tag = input.u8("change kind")?;
        let sequence = SequenceNumber(input.u64("sequence")?);
        let time = SourceTime(input.u64("source time")?);
        let disk = DiskId(input.u16("disk id")?);
        let kind = match tag & !CONTINUES {
            WRITE => ChangeKind::Write {
                range: ByteRange::decode(input, limits::CHANGE_DATA_BYTES_MAX as u64)?,
                data: Bytes::new(),
            },
            ZERO => ChangeKind::Zero { range: ByteRange::decode(input, limits::CHANGE_RANGE_BYTES_MAX)? },
            DISCARD => ChangeKind::Discard { range: ByteRange::decode(input, limits::CHANGE_RANGE_BYTES_MAX)? },
            MARKER => ChangeKind::Marker {
                kind: MarkerKind::decode(input)?,
                name: input.text("marker name", limits::NAME_BYTES_MAX)?,
            },
            GEOMETRY => ChangeKind::Geometry(DiskGeometry::decode(input)?),
            HEAL_START => ChangeKind::HealStart { heal: HealId(input.u64("heal id")?) },
            value => return Err(DecodeError::Undefined { field: "change kind", value: value.into() }),
        };
        Ok(Change { sequence, time, disk, continues: tag & CONTINUES != 0, kind })
    }

    /// Takes a write's bytes off the front of `data`; nothing for the other kinds.
    pub fn attach_data(&mut self, data: &mut Decoder) -> Result<(), DecodeError> {
        if let ChangeKind::Write { range, data: bytes } = &mut self.kind {
            *bytes = data.raw(range.len as usize, "write data")?;
        }
        Ok(())
    }
}

impl Change {
    /// The stream's running hash after this change, given the hash before it. Both ends compute it and compare.
    ///
    /// Times are left out: the receiver turns them into point time, and must be able to go on from what it journaled.
    pub fn extend_hash(&self, before: StreamHash) -> StreamHash {
        let mut head = Encoder::with_capacity(64);
        self.encode_head_at(SourceTime(0), &mut head);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before.0).update(&head.finish());
        if let ChangeKind::Write { data, .. } = &self.kind {
            hasher.update(data);
        }
        StreamHash(*hasher.finalize().as_bytes())
    }
}

/// Hash of every change of a session up to a position, chained change by change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StreamHash(pub [u8; 32]);

impl std::fmt::Debug for StreamHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StreamHash({:02x}{:02x}{:02x}{:02x})", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}
