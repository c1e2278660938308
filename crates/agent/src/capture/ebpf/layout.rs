//! What the kernel programs and the agent share, as `bpf/capture.h` lays it out.

use std::mem::offset_of;

use super::places::Place;

/// Version of everything below; pins of another version are not adopted.
pub(super) const VERSION: u64 = 5;
/// Epoch `e` marks in slot `e % SLOTS`.
pub(super) const SLOTS: usize = 3;
/// Protected disks at most.
pub(super) const DISKS_MAX: usize = 64;
/// Protected parts of one whole disk at most.
pub(super) const PARTS_MAX: usize = 8;
/// Longest marker name in bytes.
pub(super) const NAME_BYTES_MAX: usize = 1024;
/// Maps of each disk: the heal set, and two for each slot.
pub(super) const MAPS_PER_DISK: usize = 1 + 2 * SLOTS;
/// Low bits of the (epoch, mode) word that are not the epoch.
pub(super) const WORD_SHIFT: u32 = 8;
/// The word's mode: mark only.
pub(super) const WORD_TRACK: u64 = 1;

const RECORD_MAGIC: u32 = 0x4653_4331;
const RECORD_LAST: u32 = 1;

/// Why the ring lacks something, as counted by the programs.
pub(super) const GAP_CAUSES: usize = 6;
pub(super) const GAP_FULL: usize = 0;
pub(super) const GAP_COPY: usize = 1;

/// A protected disk or partition: sectors of a whole disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) first_cell: u64,
    pub(super) disk: u32,
    /// Bytes of disk that one cell stands for.
    pub(super) granule_shift: u16,
    /// [`TARGET_JOINS`], [`TARGET_LEFT`].
    pub(super) flags: u16,
}

/// It was added or has grown a moment ago: what ends without having been seen at its beginning breaks no stream.
pub(super) const TARGET_JOINS: u16 = 1;
/// It is not protected any more, and stays until the flights that were noted have ended.
pub(super) const TARGET_LEFT: u16 = 2;

impl Target {
    /// What the programs have to know of the disk in `slot`.
    pub(super) fn of(slot: usize, place: &Place, flags: u16) -> Target {
        Target {
            start: place.start_sector,
            end: place.end_sector(),
            first_cell: place.first_cell,
            disk: slot as u32,
            granule_shift: place.granule_shift as u16,
            flags,
        }
    }

    /// The bytes that the kernel takes.
    pub(super) fn bytes(&self) -> [u8; size_of::<Target>()] {
        let mut out = [0; size_of::<Target>()];
        let last = u64::from(self.disk) | u64::from(self.granule_shift) << 32 | u64::from(self.flags) << 48;
        for (index, word) in [self.start, self.end, self.first_cell, last].into_iter().enumerate() {
            out[index * 8..index * 8 + 8].copy_from_slice(&word.to_ne_bytes());
        }
        out
    }
}

/// Everything of a whole disk that is protected, as the kernel takes it.
pub(super) fn targets_bytes(parts: &[Target]) -> [u8; 8 + PARTS_MAX * size_of::<Target>()] {
    assert!(parts.len() <= PARTS_MAX, "checked before");
    let mut out = [0; 8 + PARTS_MAX * size_of::<Target>()];
    out[..4].copy_from_slice(&(parts.len() as u32).to_ne_bytes());
    for (place, part) in out[8..].chunks_exact_mut(size_of::<Target>()).zip(parts) {
        place.copy_from_slice(&part.bytes());
    }
    out
}

/// The control page.
#[repr(C)]
pub(super) struct Control {
    word: u64,
    pages: u64,
    direct_map: u64,
    map_cells: u64,
    hands_on: u64,
    sleeps: u32,
    broken: u32,
    calibrate_tgid: u32,
    calibrate_fd: u32,
    calibrate_done: u32,
    calibrate_step: u32,
    calibrate_pfn: u64,
    calibrate_content: [u64; 2],
    marker_kind: u32,
    marker_bytes: u32,
    marker_name: [u8; NAME_BYTES_MAX],
    whole: [[u8; DISKS_MAX]; SLOTS],
}

/// Places in the control page, in bytes.
impl Control {
    pub(super) const WORD: usize = offset_of!(Control, word);
    pub(super) const MAP_CELLS: usize = offset_of!(Control, map_cells);
    pub(super) const HANDS_ON: usize = offset_of!(Control, hands_on);
    pub(super) const SLEEPS: usize = offset_of!(Control, sleeps);
    pub(super) const BROKEN: usize = offset_of!(Control, broken);
    pub(super) const CALIBRATE_TGID: usize = offset_of!(Control, calibrate_tgid);
    pub(super) const CALIBRATE_FD: usize = offset_of!(Control, calibrate_fd);
    pub(super) const CALIBRATE_DONE: usize = offset_of!(Control, calibrate_done);
    pub(super) const CALIBRATE_PFN: usize = offset_of!(Control, calibrate_pfn);
    pub(super) const CALIBRATE_CONTENT: usize = offset_of!(Control, calibrate_content);
    pub(super) const MARKER_KIND: usize = offset_of!(Control, marker_kind);
    pub(super) const MARKER_BYTES: usize = offset_of!(Control, marker_bytes);
    pub(super) const MARKER_NAME: usize = offset_of!(Control, marker_name);
    pub(super) const WHOLE: usize = offset_of!(Control, whole);
}

/// The counters of one CPU.
#[repr(C)]
pub(super) struct Cpu {
    busy: u64,
    appends_at: u64,
    broken_at: u64,
    gaps: [u64; GAP_CAUSES],
    submitted: [u64; SLOTS],
    completed: [u64; SLOTS],
    unstreamed: [u64; SLOTS],
    next_id: u64,
    writes: u64,
    written_bytes: u64,
    zeroes: u64,
    discards: u64,
    flushes: u64,
    fuas: u64,
    tracked: u64,
    failed: u64,
    records: u64,
    rescued: u64,
    ends: u64,
    untold: u64,
}

/// Places in the counters of a CPU, in bytes.
impl Cpu {
    pub(super) const BROKEN_AT: usize = offset_of!(Cpu, broken_at);
    pub(super) const GAPS: usize = offset_of!(Cpu, gaps);
    pub(super) const SUBMITTED: usize = offset_of!(Cpu, submitted);
    pub(super) const COMPLETED: usize = offset_of!(Cpu, completed);
    pub(super) const UNSTREAMED: usize = offset_of!(Cpu, unstreamed);
    pub(super) const WRITES: usize = offset_of!(Cpu, writes);
    pub(super) const WRITTEN_BYTES: usize = offset_of!(Cpu, written_bytes);
    pub(super) const ZEROES: usize = offset_of!(Cpu, zeroes);
    pub(super) const DISCARDS: usize = offset_of!(Cpu, discards);
    pub(super) const TRACKED: usize = offset_of!(Cpu, tracked);
    pub(super) const FAILED: usize = offset_of!(Cpu, failed);
    pub(super) const RESCUED: usize = offset_of!(Cpu, rescued);
    #[cfg(test)]
    pub(super) const ENDS: usize = offset_of!(Cpu, ends);
    pub(super) const UNTOLD: usize = offset_of!(Cpu, untold);
}

/// A bio under way, as the programs note it.
pub(super) struct Flight;

impl Flight {
    /// Bytes of an entry.
    pub(super) const BYTES: usize = 56;

    /// The slot that it was submitted in.
    pub(super) fn slot(entry: &[u8; Flight::BYTES]) -> usize {
        u32::from_ne_bytes([entry[12], entry[13], entry[14], entry[15]]) as usize
    }

    /// The number of its disk in the programs.
    pub(super) fn disk(entry: &[u8; Flight::BYTES]) -> usize {
        u32::from_ne_bytes([entry[48], entry[49], entry[50], entry[51]]) as usize
    }
}

const _: () = assert!(size_of::<Control>() == 1312 && size_of::<Cpu>() == 248 && size_of::<Target>() == 32);

/// What a record in the ring is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RecordKind {
    Write,
    Zero,
    Discard,
    Marker,
}

/// The head of a record in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: RecordKind,
    /// The data was copied.
    pub(super) whole: bool,
    pub(super) last: bool,
    pub(super) disk: u16,
    pub(super) epoch: u32,
    pub(super) sector: u64,
    pub(super) time: u64,
    pub(super) id: u64,
    pub(super) total: u32,
    pub(super) offset: u32,
    pub(super) bytes: u32,
}

impl Record {
    /// Bytes of a record's head.
    pub(super) const BYTES: usize = 56;

    /// The head at the beginning of `bytes`; `None` if it is none.
    pub(super) fn parse(bytes: &[u8]) -> Option<Record> {
        let bytes: &[u8; Record::BYTES] = bytes.first_chunk()?;
        let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        if half(0) != RECORD_MAGIC {
            return None;
        }
        let kind = match bytes[4] {
            1 => RecordKind::Write,
            2 => RecordKind::Zero,
            3 => RecordKind::Discard,
            4 => RecordKind::Marker,
            _ => return None,
        };
        Some(Record {
            kind,
            whole: bytes[5] == 0,
            last: half(12) & RECORD_LAST != 0,
            disk: u16::from_ne_bytes([bytes[6], bytes[7]]),
            epoch: half(8),
            sector: word(16),
            time: word(24),
            id: word(32),
            total: half(40),
            offset: half(44),
            bytes: half(48),
        })
    }

    /// What stands for bytes that are no record.
    pub(super) fn nothing() -> Record {
        Record {
            kind: RecordKind::Marker,
            whole: false,
            last: true,
            disk: 0,
            epoch: 0,
            sector: 0,
            time: 0,
            id: 0,
            total: 0,
            offset: 0,
            bytes: 0,
        }
    }

    /// The head as the programs write it.
    #[cfg(test)]
    pub(super) fn encode(&self) -> [u8; Record::BYTES] {
        let mut out = [0; Record::BYTES];
        let kind = match self.kind {
            RecordKind::Write => 1,
            RecordKind::Zero => 2,
            RecordKind::Discard => 3,
            RecordKind::Marker => 4,
        };
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &RECORD_MAGIC.to_ne_bytes());
        put(4, &[kind, u8::from(!self.whole)]);
        put(6, &self.disk.to_ne_bytes());
        put(8, &self.epoch.to_ne_bytes());
        put(12, &u32::from(self.last).to_ne_bytes());
        put(16, &self.sector.to_ne_bytes());
        put(24, &self.time.to_ne_bytes());
        put(32, &self.id.to_ne_bytes());
        put(40, &self.total.to_ne_bytes());
        put(44, &self.offset.to_ne_bytes());
        put(48, &self.bytes.to_ne_bytes());
        out
    }
}
