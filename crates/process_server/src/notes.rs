//! Notes: what the journal keeps of a chain besides its changes, so that a server that is killed before it has committed
//! it announces nothing false. Each stands in the journal between the changes between which it came true.

use bytes::Bytes;
use replication::codec::{DecodeError, Decoder, Encoder};
use replication::limits::DISKS_MAX;
use replication::{DiskId, PointTime, Reach, SequenceNumber};

use crate::journal::NoteKind;

/// Note kind: a gap of the whole machine is open (the note's bytes say where) or closed (no bytes).
pub const GAP_NOTE: NoteKind = NoteKind(1);
/// Note kind: the newest gaps of ranges, as a list.
pub const RANGE_GAPS_NOTE: NoteKind = NoteKind(2);
/// Note kind: which disks are protected from a position on, as a [`DisksNote`].
pub const DISKS_NOTE: NoteKind = NoteKind(3);
/// Gaps that one note lists at most: what may be open at one position and not committed yet.
pub const NOTED_GAPS_MAX: usize = 4;
/// Longest cause in a note, in bytes.
const NOTED_CAUSE_BYTES_MAX: usize = 200;

/// A gap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GapNote {
    /// The last change before the break.
    pub at: SequenceNumber,
    /// What it concerns.
    pub reach: Reach,
    /// When.
    pub time: PointTime,
    /// Why.
    pub cause: String,
}

impl GapNote {
    /// The note's bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = Encoder::new();
        self.encode_to(&mut out);
        out.finish().into()
    }

    fn encode_to(&self, out: &mut Encoder) {
        let mut end = self.cause.len().min(NOTED_CAUSE_BYTES_MAX);
        while !self.cause.is_char_boundary(end) {
            end -= 1;
        }
        self.reach.encode(out.u64(self.at.0));
        out.u64(self.time.0).text(&self.cause[..end]);
    }

    fn decode_from(input: &mut Decoder) -> Result<GapNote, DecodeError> {
        Ok(GapNote {
            at: SequenceNumber(input.u64("gap position")?),
            reach: Reach::decode(input)?,
            time: PointTime(input.u64("gap time")?),
            cause: input.text("gap cause", NOTED_CAUSE_BYTES_MAX)?,
        })
    }

    /// The bytes of a note that lists several gaps.
    pub fn encode_list<'a>(notes: impl ExactSizeIterator<Item = &'a GapNote>) -> Bytes {
        let mut out = Encoder::new();
        out.varint(notes.len() as u64);
        notes.for_each(|note| note.encode_to(&mut out));
        out.finish().into()
    }

    /// Reads a note that lists gaps.
    ///
    /// # Errors
    /// It is none.
    pub fn decode_list(bytes: Bytes) -> Result<Vec<GapNote>, DecodeError> {
        let mut input = Decoder::new(bytes);
        let count = input.count("gaps", NOTED_GAPS_MAX as u64)?;
        let notes = (0..count).map(|_| GapNote::decode_from(&mut input)).collect::<Result<_, _>>()?;
        input.finish()?;
        Ok(notes)
    }

    /// Reads a note; `None` if it says that no gap is open.
    pub fn decode(bytes: Bytes) -> Result<Option<GapNote>, DecodeError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let mut input = Decoder::new(bytes);
        let note = GapNote::decode_from(&mut input)?;
        input.finish()?;
        Ok(Some(note))
    }
}

/// The disks that a sender named when it went on without some that were protected before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DisksNote {
    /// Up to here the others are part of points.
    pub at: SequenceNumber,
    /// When.
    pub time: PointTime,
    /// The disks that stay.
    pub disks: Vec<DiskId>,
}

impl DisksNote {
    /// The note's bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = Encoder::new();
        out.u64(self.at.0).u64(self.time.0).varint(self.disks.len() as u64);
        for disk in &self.disks {
            out.u16(disk.0);
        }
        out.finish().into()
    }

    /// Reads a note.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: Bytes) -> Result<DisksNote, DecodeError> {
        let mut input = Decoder::new(bytes);
        let (at, time) = (SequenceNumber(input.u64("position")?), PointTime(input.u64("time")?));
        let count = input.count("disks", DISKS_MAX as u64)?;
        let disks = (0..count).map(|_| input.u16("disk").map(DiskId)).collect::<Result<_, _>>()?;
        input.finish()?;
        Ok(DisksNote { at, time, disks })
    }
}
