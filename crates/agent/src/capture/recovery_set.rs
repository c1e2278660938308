//! The recovery set: which parts of which disks a heal must cover, through any end of the agent.
//!
//! Five byte maps per disk: the *heal set*, and for each of two epoch slots *uncommitted* (every write) and
//! *unstreamed* (not carried by the ring). Epoch `e` uses slot `e mod 2`, so that the next epoch can open only when
//! the one before the current one was folded or cleared.
//!
//! Image layout (`docs/formats/dirty-maps.md`):
//!
//! ```text
//! 0       words (native byte order): (epoch, mode), clean mark, whole flags, slot occupants, fingerprints
//! 4096    head: magic, version, length, checksum, boot, machine, granule, disks
//! aligned heal | 0 uncommitted | 0 unstreamed | 1 uncommitted | 1 unstreamed, each for all disks in order
//! ```
//!
//! Invariants:
//! * A start never edits an image. [`adopt`] computes a new one from the old and the store replaces it atomically:
//!   everything any map of the old image named is in the heal set of the new one.
//! * Marks are set before they are cleared elsewhere, so a kill at any moment names too much, never too little.
//! * Doubt is written down: whoever loses continuity flags whole disks in the image it installs, so that the next
//!   start, which finds a fresh boot id, does not forget it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

use bytes::Bytes;
use replication::codec::{DecodeError, Decoder, Encoder};
use replication::geometry::LEAF_BYTES;
use replication::limits::DISKS_MAX;
use replication::maps::{DirtyMap, MAPS_BYTES_MAX, MapScale};
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MachineId};

use super::mapfile::{MapArea, MapStore, WORDS_BYTES};
use super::{Continuity, LostReason, Unbroken};

const MAGIC: &[u8; 8] = b"FARSMAPS";
const VERSION: u32 = 1;
/// Magic, version, body length and checksum, in bytes.
const PREFIX_BYTES: usize = 8 + 4 + 4 + 16;
/// Longest head in bytes: many more than 64 disks with the longest names take.
const HEAD_BYTES_MAX: usize = 1 << 20;
/// Maps begin at a multiple of this, in bytes.
const ALIGN_BYTES: usize = 4096;
/// Maps of one disk.
const MAPS_PER_DISK: usize = 5;

const WORD: usize = 0;
const CLEAN: usize = 1;
const WHOLE: usize = 2;
const SLOTS: usize = 3;
const FINGERPRINTS: usize = 8;

/// The value of the clean mark: not one that damage produces.
const CLEAN_MARK: u64 = 0x636c_6f73_6564_2121;
/// Low bits of the (epoch, mode) word that are not the epoch.
pub(crate) const EPOCH_SHIFT: u32 = 8;

/// One of the two places that epochs alternate between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot(usize);

impl Slot {
    pub(crate) const ALL: [Slot; 2] = [Slot(0), Slot(1)];

    pub(crate) fn of(epoch: Epoch) -> Slot {
        Slot(epoch.0 as usize % 2)
    }

    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// What a map is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapKind {
    Heal,
    Uncommitted(Slot),
    Unstreamed(Slot),
}

impl MapKind {
    const ALL: [MapKind; MAPS_PER_DISK] = [
        MapKind::Heal,
        MapKind::Uncommitted(Slot(0)),
        MapKind::Unstreamed(Slot(0)),
        MapKind::Uncommitted(Slot(1)),
        MapKind::Unstreamed(Slot(1)),
    ];

    fn index(self) -> usize {
        match self {
            MapKind::Heal => 0,
            MapKind::Uncommitted(slot) => 1 + 2 * slot.0,
            MapKind::Unstreamed(slot) => 2 + 2 * slot.0,
        }
    }
}

/// Who and when is asking.
pub(crate) struct Attach<'a> {
    pub(crate) machine: MachineId,
    /// Identity of this boot, new at each start of the machine.
    pub(crate) boot: [u8; 16],
    pub(crate) disks: &'a [DiskGeometry],
    /// The fingerprint of a disk's first so many bytes as they are now; `None` if they cannot be read.
    pub(crate) fingerprint: &'a dyn Fn(DiskId, u64) -> Option<[u8; 16]>,
}

/// The outcome of [`adopt`].
pub(crate) struct Adopted {
    pub(crate) continuity: Continuity,
    /// Disks that are new, grown, or not the ones they were; their geometry belongs into the stream.
    pub(crate) changed: Vec<DiskId>,
    /// What an orderly end left, on this boot.
    pub(crate) unbroken: Option<Unbroken>,
    pub(crate) image: Vec<u8>,
}

/// The immutable part of an image.
struct Head {
    boot: [u8; 16],
    machine: MachineId,
    scale: MapScale,
    disks: Vec<DiskGeometry>,
}

impl Head {
    fn encode(&self) -> Vec<u8> {
        let mut body = Encoder::new();
        body.raw(&self.boot).raw(&self.machine.0).u64(self.scale.granule_bytes()).varint(self.disks.len() as u64);
        self.disks.iter().for_each(|disk| disk.encode(&mut body));
        let body = body.finish();
        let mut head = Encoder::with_capacity(PREFIX_BYTES + body.len());
        head.raw(MAGIC).u32(VERSION).u32(body.len() as u32).raw(&checksum(&body)).raw(&body);
        head.finish()
    }

    /// The head of an image and its length in bytes.
    fn of_image(image: &[u8]) -> Result<(Head, usize), DecodeError> {
        let tail = image.get(WORDS_BYTES..).ok_or(DecodeError::Truncated { field: "first page" })?;
        Head::decode(Bytes::copy_from_slice(&tail[..tail.len().min(HEAD_BYTES_MAX)]))
    }

    fn decode(bytes: Bytes) -> Result<(Head, usize), DecodeError> {
        let mut input = Decoder::new(bytes);
        if &input.array::<8>("magic")? != MAGIC {
            return Err(DecodeError::Inconsistent("it does not begin as dirty maps do"));
        }
        let version = input.u32("version")?;
        if version != VERSION {
            return Err(DecodeError::Undefined { field: "version", value: version.into() });
        }
        let len = input.u32("head length")? as usize;
        let sum: [u8; 16] = input.array("head checksum")?;
        let body = input.raw(len, "head")?;
        if checksum(&body) != sum {
            return Err(DecodeError::Inconsistent("its head is damaged"));
        }
        let mut body = Decoder::new(body);
        let boot = body.array("boot id")?;
        let machine = MachineId(body.array("machine id")?);
        let scale = MapScale::with_granule(body.u64("granule")?)
            .ok_or(DecodeError::Inconsistent("its granule is not a power of two of at least 64 KiB"))?;
        let count = body.count("number of disks", DISKS_MAX as u64)?;
        let disks = (0..count).map(|_| DiskGeometry::decode(&mut body)).collect::<Result<Vec<_>, _>>()?;
        body.finish()?;
        Ok((Head { boot, machine, scale, disks }, PREFIX_BYTES + len))
    }

    fn layout(&self, head_bytes: usize) -> Layout {
        let mut cells = 0;
        let disks = self.disks.iter().map(|disk| {
            let start = cells;
            cells += self.scale.cells(disk.size_bytes);
            (start, disk.size_bytes)
        });
        let disks = disks.collect();
        Layout { scale: self.scale, disks, cells, start: (WORDS_BYTES + head_bytes).next_multiple_of(ALIGN_BYTES) }
    }
}

fn checksum(bytes: &[u8]) -> [u8; 16] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash has 32 bytes")
}

/// `image` with the checksum of its head made right, so that a fuzzer gets past it.
#[cfg(any(test, fuzzing))]
pub(crate) fn reseal(mut image: Vec<u8>) -> Vec<u8> {
    let (length, body) = (WORDS_BYTES + 12, WORDS_BYTES + PREFIX_BYTES);
    let len = image.get(length..).and_then(<[u8]>::first_chunk).map_or(0, |len| u32::from_le_bytes(*len) as usize);
    if let Some(sum) = image.get(body..).and_then(|rest| rest.get(..len)).map(checksum) {
        image[length + 4..body].copy_from_slice(&sum);
    }
    image
}

/// Where each map lies in an image.
struct Layout {
    scale: MapScale,
    /// First cell within a map, and size in bytes, of each disk.
    disks: Vec<(usize, u64)>,
    /// Cells of one map over all disks.
    cells: usize,
    /// First byte of the first map.
    start: usize,
}

impl Layout {
    fn image_bytes(&self) -> usize {
        self.start + MAPS_PER_DISK * self.cells
    }

    fn cells_of(&self, kind: MapKind, disk: usize) -> std::ops::Range<usize> {
        let (first, size) = self.disks[disk];
        let start = self.start + kind.index() * self.cells + first;
        start..start + self.scale.cells(size)
    }
}

/// An old image, checked as a whole.
struct Old {
    head: Head,
    layout: Layout,
    image: Vec<u8>,
}

impl Old {
    fn parse(image: Vec<u8>) -> Result<Old, DecodeError> {
        let (head, head_bytes) = Head::of_image(&image)?;
        // Checked before anything is computed from the sizes, which could overflow.
        let cells: u128 = head.disks.iter().map(|disk| head.scale.cells(disk.size_bytes) as u128).sum();
        if cells * MAPS_PER_DISK as u128 > u128::from(MAPS_BYTES_MAX) {
            return Err(DecodeError::Inconsistent("its maps are larger than maps can be"));
        }
        let layout = head.layout(head_bytes);
        if image.len() != layout.image_bytes() {
            return Err(DecodeError::Inconsistent("its length does not fit its disks"));
        }
        Ok(Old { head, layout, image })
    }

    fn word(&self, index: usize) -> u64 {
        let bytes = self.image[index * 8..].first_chunk().expect("the first page was checked");
        u64::from_ne_bytes(*bytes)
    }

    fn fingerprint(&self, disk: usize) -> [u8; 16] {
        let start = (FINGERPRINTS + 2 * disk) * 8;
        *self.image[start..].first_chunk().expect("the first page has room for every disk")
    }

    /// Everything that any map of the disk names.
    fn dirty(&self, disk: usize) -> Vec<ByteRange> {
        let size = self.layout.disks[disk].1;
        let union: Vec<AtomicU8> = (0..self.layout.scale.cells(size)).map(|_| AtomicU8::new(0)).collect();
        for kind in MapKind::ALL {
            for (cell, &old) in union.iter().zip(&self.image[self.layout.cells_of(kind, disk)]) {
                cell.fetch_or(old, Ordering::Relaxed);
            }
        }
        DirtyMap::new(&union, self.layout.scale, size).ranges()
    }

    /// Why the maps of all disks are worthless, if they are.
    fn lost(&self, now: &Attach<'_>) -> Option<LostReason> {
        if self.head.machine != now.machine {
            return Some(LostReason::OtherMachine);
        }
        if self.word(WORD) >> EPOCH_SHIFT >= u64::from(u32::MAX) {
            return Some(LostReason::Unreadable("its epoch is not one that can be reached".to_owned()));
        }
        (self.head.boot != now.boot && self.word(CLEAN) != CLEAN_MARK).then_some(LostReason::Rebooted)
    }
}

/// What a new start knows from the old image, and the image it begins with. Pure; any bytes are answered.
pub(crate) fn adopt(old: Option<Result<Vec<u8>, io::Error>>, now: &Attach<'_>) -> Adopted {
    let old = match old {
        None => return start_over(Continuity::Fresh, now),
        Some(Err(error)) => Err(error.to_string()),
        Some(Ok(image)) => Old::parse(image).map_err(|error| error.to_string()),
    };
    match old {
        Err(why) => start_over(Continuity::Lost(LostReason::Unreadable(why)), now),
        Ok(old) => match old.lost(now) {
            Some(reason) => start_over(Continuity::Lost(reason), now),
            None => carry_over(&old, now),
        },
    }
}

fn start_over(continuity: Continuity, now: &Attach<'_>) -> Adopted {
    let mut image = NewImage::new(now, Epoch(1));
    (0..now.disks.len()).for_each(|disk| image.set_whole(disk));
    let changed = now.disks.iter().map(|disk| disk.disk).collect();
    Adopted { continuity, changed, unbroken: None, image: image.bytes }
}

fn carry_over(old: &Old, now: &Attach<'_>) -> Adopted {
    let epoch = Epoch((old.word(WORD) >> EPOCH_SHIFT) as u32).next();
    let mut image = NewImage::new(now, epoch);
    let mut continuity = Continuity::SameBoot;
    let mut changed = Vec::new();
    let mut lacking = Vec::new();
    let mut lack = |disk: DiskId, start, end, cause: String| {
        lacking.extend(ByteRange::between(start, end).map(|range| (disk, range, cause)));
    };
    for (index, disk) in now.disks.iter().enumerate() {
        let Some(before) = old.head.disks.iter().position(|known| known.disk == disk.disk) else {
            image.set_whole(index);
            changed.push(disk.disk);
            lack(disk.disk, 0, disk.size_bytes, "the disk was added".to_owned());
            continue;
        };
        let known = &old.head.disks[before];
        let unwatched = || {
            let now = || (now.fingerprint)(disk.disk, known.size_bytes);
            old.word(CLEAN) == CLEAN_MARK && now() != Some(old.fingerprint(before))
        };
        let doubt = if known.identity.serial != disk.identity.serial {
            Some(LostReason::DiskReplaced(disk.disk))
        } else if disk.size_bytes < known.size_bytes {
            Some(LostReason::DiskShrunk(disk.disk))
        } else if unwatched() {
            Some(LostReason::ChangedMeanwhile(disk.disk))
        } else {
            None
        };
        if doubt.is_some() || old.word(WHOLE) >> before & 1 == 1 {
            image.set_whole(index);
        }
        if known != disk {
            changed.push(disk.disk);
        }
        match doubt {
            Some(reason) => {
                lack(disk.disk, 0, disk.size_bytes, reason.to_string());
                continuity = Continuity::Lost(reason);
            }
            None => {
                // Heals move whole leaves: one that the old end divides is lacking as a whole until its heal has ended.
                let whole_leaves = known.size_bytes / LEAF_BYTES * LEAF_BYTES;
                if disk.size_bytes > known.size_bytes {
                    lack(disk.disk, whole_leaves, disk.size_bytes, "the disk has grown".to_owned());
                }
                old.dirty(before).into_iter().for_each(|range| image.mark(index, range));
                if let Some(grown) = ByteRange::between(known.size_bytes, disk.size_bytes) {
                    image.mark(index, grown);
                }
            }
        }
    }
    let orderly = old.word(CLEAN) == CLEAN_MARK && old.head.boot == now.boot;
    let ended_in = Epoch((old.word(WORD) >> EPOCH_SHIFT) as u32);
    let unbroken = orderly.then_some(Unbroken { ended_in, lacking });
    Adopted { continuity, changed, unbroken, image: image.bytes }
}

/// An image under construction, in which nobody else marks yet.
struct NewImage {
    layout: Layout,
    bytes: Vec<u8>,
}

impl NewImage {
    /// An image whose current epoch is `epoch`, in track mode, with nothing marked.
    fn new(now: &Attach<'_>, epoch: Epoch) -> NewImage {
        let sizes: Vec<u64> = now.disks.iter().map(|disk| disk.size_bytes).collect();
        let scale = MapScale::fitting(&sizes, MAPS_PER_DISK as u64, MAPS_BYTES_MAX);
        let head = Head { boot: now.boot, machine: now.machine, scale, disks: now.disks.to_vec() };
        let encoded = head.encode();
        let layout = head.layout(encoded.len());
        let mut bytes = vec![0; layout.image_bytes()];
        bytes[WORDS_BYTES..WORDS_BYTES + encoded.len()].copy_from_slice(&encoded);
        let mut image = NewImage { layout, bytes };
        image.set_word(WORD, super::gate::Word::opening(epoch).0);
        image.set_word(SLOTS + Slot::of(epoch).0, u64::from(epoch.0));
        image
    }

    fn set_word(&mut self, index: usize, value: u64) {
        self.bytes[index * 8..index * 8 + 8].copy_from_slice(&value.to_ne_bytes());
    }

    fn set_whole(&mut self, disk: usize) {
        let start = WHOLE * 8;
        let flags = u64::from_ne_bytes(*self.bytes[start..].first_chunk().expect("the first page is there"));
        self.set_word(WHOLE, flags | 1 << disk);
    }

    fn mark(&mut self, disk: usize, range: ByteRange) {
        let cells = self.layout.cells_of(MapKind::Heal, disk);
        let granule = self.layout.scale.granule_bytes();
        let touched = (range.start / granule) as usize..((range.end() - 1) / granule) as usize + 1;
        self.bytes[cells][touched].fill(1);
    }
}

/// The installed recovery set. Marked from any thread; rotated, folded and cleared by one.
pub(crate) struct RecoverySet {
    area: MapArea,
    layout: Layout,
    /// Whether a slot holds any *unstreamed* mark. Not kept in the image: a start folds everything anyway.
    any_unstreamed: [AtomicBool; 2],
    /// Unstreamed marks so far.
    unstreamed: AtomicU64,
}

impl RecoverySet {
    /// Installs an adopted image.
    pub(crate) fn install(store: &dyn MapStore, image: &[u8]) -> io::Result<RecoverySet> {
        let (head, head_bytes) =
            Head::of_image(image).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        let layout = head.layout(head_bytes);
        let area = store.install(image)?;
        Ok(RecoverySet { area, layout, any_unstreamed: Default::default(), unstreamed: AtomicU64::new(0) })
    }

    /// The (epoch, mode) word; its meaning is [`super::gate`]'s.
    pub(crate) fn word(&self) -> &AtomicU64 {
        self.area.word(WORD)
    }

    pub(crate) fn map(&self, kind: MapKind, disk: usize) -> DirtyMap<'_> {
        let (_, size) = self.layout.disks[disk];
        DirtyMap::new(self.area.cells(self.layout.cells_of(kind, disk)), self.layout.scale, size)
    }

    /// Marks a write that is about to reach the disk.
    pub(crate) fn mark_uncommitted(&self, slot: Slot, disk: usize, range: ByteRange) {
        self.map(MapKind::Uncommitted(slot), disk).mark(range);
    }

    /// Marks a write that the ring does not carry.
    pub(crate) fn mark_unstreamed(&self, slot: Slot, disk: usize, range: ByteRange) {
        self.any_unstreamed[slot.0].store(true, Ordering::SeqCst);
        self.map(MapKind::Unstreamed(slot), disk).mark(range);
        // Counted last: whoever sees the count sees the mark.
        self.unstreamed.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn unstreamed_count(&self) -> u64 {
        self.unstreamed.load(Ordering::SeqCst)
    }

    pub(crate) fn has_unstreamed(&self, slot: Slot) -> bool {
        self.any_unstreamed[slot.0].load(Ordering::SeqCst)
    }

    /// The epoch whose marks are in `slot`; `None` if it is free.
    pub(crate) fn occupant(&self, slot: Slot) -> Option<Epoch> {
        match self.area.word(SLOTS + slot.0).load(Ordering::SeqCst) {
            0 => None,
            epoch => Some(Epoch(epoch as u32)),
        }
    }

    /// Gives the free slot of `epoch` to it.
    pub(crate) fn occupy(&self, epoch: Epoch) {
        assert_eq!(self.occupant(Slot::of(epoch)), None, "an epoch opens only in a free slot");
        self.area.word(SLOTS + Slot::of(epoch).0).store(u64::from(epoch.0), Ordering::SeqCst);
    }

    /// Moves everything that `slot` names into the heal set and frees the slot. Nobody may mark in it any more.
    /// `between` is called after each step, where a kill may come; production passes nothing to do.
    pub(crate) fn fold(&self, slot: Slot, mut between: impl FnMut()) {
        for disk in 0..self.layout.disks.len() {
            for kind in [MapKind::Uncommitted(slot), MapKind::Unstreamed(slot)] {
                self.map(MapKind::Heal, disk).merge(self.map(kind, disk));
                between();
            }
        }
        // Set before clear: from here on the heal set names it all.
        fence(Ordering::SeqCst);
        self.empty(slot, between);
    }

    /// Forgets everything that `slot` names and frees it. Nobody may mark in it any more.
    pub(crate) fn empty(&self, slot: Slot, mut between: impl FnMut()) {
        for disk in 0..self.layout.disks.len() {
            for kind in [MapKind::Uncommitted(slot), MapKind::Unstreamed(slot)] {
                self.map(kind, disk).clear();
                between();
            }
        }
        self.any_unstreamed[slot.0].store(false, Ordering::SeqCst);
        // Free only when empty: the next occupant must not inherit marks.
        self.area.word(SLOTS + slot.0).store(0, Ordering::SeqCst);
        between();
    }

    pub(crate) fn require_whole(&self, disk: usize) {
        self.area.word(WHOLE).fetch_or(1 << disk, Ordering::SeqCst);
    }

    /// What a heal of the disk at index `disk` must cover.
    pub(crate) fn heal_set(&self, disk: usize) -> Vec<ByteRange> {
        if self.area.word(WHOLE).load(Ordering::SeqCst) >> disk & 1 == 1 {
            return ByteRange::between(0, self.layout.disks[disk].1).into_iter().collect();
        }
        self.map(MapKind::Heal, disk).ranges()
    }

    pub(crate) fn clear_heal_set(&self) {
        for disk in 0..self.layout.disks.len() {
            self.map(MapKind::Heal, disk).clear();
        }
        self.area.word(WHOLE).store(0, Ordering::SeqCst);
    }

    /// Records that nothing was written since the disks had these fingerprints, and makes the image durable with it.
    pub(crate) fn close(&self, fingerprints: &[[u8; 16]]) -> io::Result<()> {
        assert_eq!(fingerprints.len(), self.layout.disks.len(), "one fingerprint for each disk");
        for (disk, fingerprint) in fingerprints.iter().enumerate() {
            for (half, bytes) in fingerprint.chunks_exact(8).enumerate() {
                let value = u64::from_ne_bytes(*bytes.first_chunk().expect("chunks of eight bytes"));
                self.area.word(FINGERPRINTS + 2 * disk + half).store(value, Ordering::SeqCst);
            }
        }
        // The mark must not become durable before what it vouches for.
        self.area.sync()?;
        self.area.word(CLEAN).store(CLEAN_MARK, Ordering::SeqCst);
        self.area.sync()
    }
}
