//! Capture by eBPF: programs in the kernel see every write of the protected disks, whoever makes it.
//!
//! ```text
//! bio ─► block_bio_queue ─► mark uncommitted, note the flight ─► copy into the ring, or mark unstreamed ─► driver
//!                                                                  │
//! completion ─► end the flight; failed or never seen: mark unstreamed
//!                                                                  ▼
//!                                        EbpfCapture::next ─► Assembler ─► Captured
//! ```
//!
//! * `bpf/capture.bpf.c`: the programs. [`layout`]: what they share with the agent. [`loader`]: installs or adopts them.
//! * [`kernel`]: shared memory, the ring, system calls; all `unsafe` of this capture. [`assemble`]: records to requests.
//! * [`reading`]: what of the ring is handed out. [`epochs`]: the maps of each epoch.
//! * [`ledger`]: what an agent keeps for its successor. [`pins`]: where, and who has it. [`grace`]: when an epoch can be read by nobody any more.
//! * [`opening`]: how it begins, or goes on with what is pinned. [`places`], [`changes`]: which disks it has, and how they come,
//!   grow and go.
//! * [`support`]: what this machine and these disks offer. [`types`]: what the kernel says of its tracepoints.
//!
//! Everything lives in kernel memory pinned in the BPF file system, so a killed agent loses nothing: its successor goes on
//! where the ring was released, and if the ring overflowed meanwhile, the maps say what to heal. A reboot loses all of it,
//! and the disks are compared.
//!
//! Invariants:
//! * A write is marked before it reaches the driver, in every mode.
//! * Nothing is handed out that lies at or after a position where the ring lacks something, until a rotation.
//! * Ring space is freed only as far as no record of an open bio lies there.
//! * What the ledger says about the stream holds for every position that was ever freed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use replication::limits::DISKS_MAX;
use replication::sender::Resumption;
use replication::{ByteRange, DiskGeometry, DiskId, Epoch, MachineId, MarkerKind, SourceTime};
use world::{BlockDevice, BlockError, Clock, FileDevice};

use super::{Capture, CaptureStatus, Captured, Continuity, GapCause, Mode, NewDisk, Phase, RingPosition, WriteCounts};

mod assemble;
mod changes;
#[cfg(test)]
mod changes_tests;
mod epochs;
mod grace;
mod kernel;
#[cfg(test)]
mod layers_tests;
mod layout;
mod ledger;
mod loader;
mod opening;
#[cfg(test)]
mod oracle;
mod overdue;
#[cfg(test)]
mod overdue_tests;
mod pins;
mod places;
#[cfg(test)]
mod planted;
mod reading;
pub mod support;
#[cfg(test)]
mod tests;
mod types;
#[cfg(test)]
mod waking_tests;

use assemble::Assembler;
use epochs::{slot_of, uncommitted, unstreamed};
use grace::Grace;
use layout::{Control, Cpu, GAP_CAUSES, MAPS_PER_DISK, PARTS_MAX, SLOTS, WORD_SHIFT, WORD_TRACK};
use loader::Installed;
use overdue::Patience;
use places::Place;
use reading::cause_of;

pub use pins::{DetachError, detach};

/// Smallest ring in bytes: the largest bio that block devices commonly take, several times.
pub const RING_BYTES_MIN: u64 = 8 << 20;
/// Largest ring in bytes that the kernel makes.
pub const RING_BYTES_MAX: u64 = 1 << 31;

/// How much of the ring is copied out of it at most before it is journaled, in bytes: more than a process server lets be
/// under way, and within the memory that an agent may take besides its ring.
const AHEAD_BYTES_MAX: u64 = 18 << 20;

/// How the programs copy. Chosen by what the kernel accepts, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// One record a bio; Linux 5.19 and newer.
    Dynptr,
    /// Records of 4 KiB; Linux 5.8 and newer.
    Bounded,
}

/// A disk to protect.
#[derive(Debug, Clone)]
pub struct EbpfDisk {
    /// Its description; the size is the device's.
    pub geometry: DiskGeometry,
    /// The block device: a whole disk or a partition.
    pub path: PathBuf,
}

/// What a capture needs to know.
#[derive(Debug, Clone)]
pub struct EbpfConfig {
    /// The protected machine.
    pub machine: MachineId,
    /// Where in the BPF file system the programs and maps are kept. One agent each.
    pub pins: PathBuf,
    /// Size of the ring in bytes; rounded down to a power of two between [`RING_BYTES_MIN`] and [`RING_BYTES_MAX`].
    pub ring_bytes_max: u64,
    /// What to try, in this order.
    pub variants: Vec<Variant>,
}

/// Why a capture did not open. The disks are as they were; nothing is captured.
#[derive(Debug, thiserror::Error)]
pub enum OpenEbpfError {
    /// The machine cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// A disk cannot be captured.
    #[error("{path} cannot be captured: {why}", path = path.display())]
    Disk {
        /// The device.
        path: PathBuf,
        /// In words.
        why: String,
    },
    /// The maps have no room for what a disk has become.
    #[error(
        "the dirty maps have no room left for {0}: start the agent again after `farshore-agent detach`, all disks are compared then"
    )]
    Room(PathBuf),
    /// A disk is known already.
    #[error("{0} is captured already, or was until a moment ago")]
    Known(PathBuf),
    /// Too many disks, or one twice.
    #[error(
        "a machine has at most {DISKS_MAX} disks, at most {PARTS_MAX} of them partitions of one, and none overlaps another"
    )]
    Disks,
    /// The ring is too large for this kernel.
    #[error("the send buffer is larger than {RING_BYTES_MAX} bytes")]
    RingSize,
    /// The kernel does not describe its types.
    #[error("the kernel's type information cannot be used: {0}")]
    Btf(String),
    /// The kernel does not take the programs.
    #[error("the kernel refuses the capture programs: {0}")]
    Refused(String),
    /// The programs cannot find the memory of writes.
    #[error("the capture programs cannot find the kernel's memory: {0}")]
    Calibration(String),
    /// Another agent has the capture.
    #[error("another agent uses the capture at {0}")]
    InUse(PathBuf),
    /// The BPF file system cannot be used.
    #[error("{path} cannot be used", path = path.display())]
    Pins {
        /// The directory of the pins.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The system refused something.
    #[error("the system refused a part of the capture")]
    System(#[source] std::io::Error),
}

/// The counters of a capture. Clones are the same.
#[derive(Clone)]
pub struct EbpfCounters(Arc<Installed>);

impl EbpfCounters {
    /// Counters now.
    pub fn counts(&self) -> WriteCounts {
        let sum = |at| self.0.sum(at);
        WriteCounts {
            changes: sum(Cpu::WRITES) + sum(Cpu::ZEROES) + sum(Cpu::DISCARDS),
            written_bytes: sum(Cpu::WRITTEN_BYTES),
            tracked: sum(Cpu::TRACKED),
            failed: sum(Cpu::FAILED),
            untold: sum(Cpu::UNTOLD),
        }
    }
}

/// What pins were made for. Others do not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shape {
    /// Of the machine.
    digest: [u64; 2],
    ring_bytes: u64,
    /// Bytes of one map, with what is to spare for disks that come and grow: a multiple of eight.
    map_cells: u64,
}

impl Shape {
    fn dirty_bytes(&self) -> usize {
        (MAPS_PER_DISK as u64 * self.map_cells).next_multiple_of(kernel::PAGE_BYTES as u64) as usize
    }
}

/// Records of these epochs from this position on are not handed out: something before them is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refusal {
    from: u64,
    epoch: u32,
}

/// The word before the first rotation.
fn opening_word() -> u64 {
    1 << WORD_SHIFT | WORD_TRACK
}

struct Disk {
    geometry: DiskGeometry,
    /// None once it has left.
    device: Option<FileDevice>,
    place: Place,
    /// It was added or has grown, and the heal of that has not ended.
    joins: bool,
    leaving: Option<Leaving>,
}

/// A disk that is not captured any more.
struct Leaving {
    /// The epoch then: no bio of it was noted in a later one.
    epoch: Epoch,
    /// Nobody asks for it any more.
    forgotten: bool,
}

/// The capture. One for each set of pins.
pub struct EbpfCapture {
    installed: Arc<Installed>,
    /// Keeps other agents off the pins.
    _lock: File,
    /// By slot: their number in the programs.
    disks: BTreeMap<usize, Disk>,
    shape: Shape,
    clock: Arc<dyn Clock>,
    grace: Grace,
    patience: Patience,
    continuity: Continuity,
    resumption: Option<Resumption>,
    assembler: Assembler,
    /// Read up to here; looked at, at most up to `seen`.
    read: u64,
    seen: u64,
    /// Handed out up to here, and released up to here.
    handed: u64,
    released: u64,
    /// Where requests ended that lie between records of others, and how far the ring can be freed there.
    held_back: Vec<(u64, u64)>,
    /// What ends at or before this position is known to be journaled, or not wanted.
    skip_through: u64,
    refusals: Vec<Refusal>,
    /// No record is older than this: that much was already said of the time before.
    not_before: SourceTime,
    /// Counted here: what only the reader notices.
    incomplete: u64,
    /// Gaps by cause when a break was last taken, and what had changed.
    gaps_seen: [u64; GAP_CAUSES],
    cause: Option<GapCause>,
    /// The epochs up to this one were opened by a predecessor.
    inherited: Epoch,
}

impl EbpfCapture {
    /// A view of its counters for other threads.
    pub fn counters(&self) -> EbpfCounters {
        EbpfCounters(self.installed.clone())
    }

    fn word(&self) -> u64 {
        self.installed.control.word(Control::WORD).load(Ordering::SeqCst)
    }

    fn epoch(&self) -> Epoch {
        Epoch((self.word() >> WORD_SHIFT) as u32)
    }

    /// The slot of a disk that this capture names.
    fn slot(&self, disk: DiskId) -> usize {
        let is_it = |known: &Disk| known.geometry.disk == disk && !known.is_forgotten();
        let found = self.disks.iter().find(|(_, known)| is_it(known)).map(|(slot, _)| *slot);
        found.expect("the engine names only disks that this capture told it of")
    }

    /// A counter over all CPUs.
    fn sum(&self, at: usize) -> u64 {
        self.installed.sum(at)
    }

    fn gaps(&self) -> [u64; GAP_CAUSES] {
        std::array::from_fn(|cause| self.sum(Cpu::GAPS + 8 * cause))
    }
}

impl Capture for EbpfCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.disks.values().filter(|disk| !disk.is_forgotten()).map(|disk| disk.geometry.clone()).collect()
    }

    fn next(&mut self) -> Option<Captured> {
        let found = self.next_request();
        if found.is_none() {
            // The caller may now claim that nothing happened until this moment: a program that took its time from the
            // clock before and appends only now must not contradict it.
            self.not_before = self.not_before.max(SourceTime(self.clock.monotonic().0));
        }
        found
    }

    fn rewind(&mut self, to: RingPosition) {
        let safe = self.held_back.iter().find(|(end, _)| *end == to.0).map_or(to.0, |(_, safe)| *safe);
        self.assembler.clear();
        (self.read, self.seen, self.handed) = (safe, safe, to.0);
        self.skip_through = self.skip_through.max(to.0);
        self.held_back.retain(|(end, _)| *end <= to.0);
    }

    fn release(&mut self, through: RingPosition) {
        if through.0 <= self.released {
            return;
        }
        self.released = through.0;
        if self.released >= self.handed {
            self.held_back.clear();
            self.free_skipped();
            return;
        }
        // What ends later but began before was known to be open when this request was handed out.
        let open = self.held_back.iter().find(|(end, _)| *end == through.0);
        let free = open.map_or(through.0, |(_, safe)| *safe);
        if free > self.installed.ring.consumer() {
            self.installed.ring.free(free);
        }
        self.held_back.retain(|(end, _)| *end > through.0);
    }

    fn status(&self) -> CaptureStatus {
        // Before the producer's position: see the field's promise.
        let gaps = self.gaps();
        let misses = self.installed.misses();
        let gap_count = gaps.iter().fold(misses + self.incomplete, |sum, gap| sum.wrapping_add(*gap));
        // A program that the kernel did not run has left no break to take.
        let gap_cause = self.cause.or(cause_of(gaps)).or((gap_count > 0).then_some(GapCause::MissedSubmission));
        let unstreamed_count = (0..SLOTS).map(|slot| self.unstreamed_in(slot)).fold(0, u64::wrapping_add);
        let producer = self.installed.ring.producer();
        let word = self.word();
        let broken = self.installed.control.half(Control::BROKEN).load(Ordering::SeqCst) != 0;
        CaptureStatus {
            gap_count,
            gap_cause,
            producer: RingPosition(producer),
            ring_bytes_used: producer - self.installed.ring.consumer(),
            ring_bytes_max: self.installed.ring.bytes(),
            epoch: Epoch((word >> WORD_SHIFT) as u32),
            mode: if broken || word & WORD_TRACK != 0 { Mode::Track } else { Mode::Stream },
            unstreamed_count,
        }
    }

    fn ahead_bytes_max(&self) -> u64 {
        AHEAD_BYTES_MAX
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        let current = self.epoch();
        let (epoch, slot) = (current.next(), slot_of(current.next()));
        if !self.grace.has_passed(current) {
            return None;
        }
        if let Some(occupant) = self.installed.ledger.occupant(slot) {
            // Nobody waits for the commits of a predecessor's epochs any more: what they name is kept for the next heal.
            if occupant >= self.inherited || !self.is_still(slot) || self.marked_unstreamed(slot) {
                return None;
            }
            self.fold_slot(slot);
        }
        // A break of the old epochs must not be taken for one of the new.
        self.take_breaks();
        self.installed.ledger.set_marks_before(slot, self.unstreamed_in(slot));
        self.installed.ledger.occupy(slot, Some(epoch));
        let track = if mode == Mode::Track { WORD_TRACK } else { 0 };
        self.installed.control.half(Control::BROKEN).store(0, Ordering::SeqCst);
        self.installed.control.word(Control::WORD).store(u64::from(epoch.0) << WORD_SHIFT | track, Ordering::SeqCst);
        self.grace.begin(epoch);
        // Epochs so old have no records any more.
        self.refusals.retain(|refusal| refusal.epoch + SLOTS as u32 >= epoch.0);
        if self.refusals.is_empty() {
            self.installed.ledger.refuse(None);
        }
        Some(epoch)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        if epoch > self.epoch() || !self.grace.has_passed(epoch) {
            return false;
        }
        let is_over = self.occupants().all(|(slot, occupant)| occupant >= epoch || self.is_still(slot));
        if is_over {
            self.patience.restart()
        } else {
            self.wait_for_bios(epoch)
        }
        is_over
    }

    fn fold(&mut self, epoch: Epoch) {
        assert!(self.settled(epoch), "maps are folded only when nobody can mark in them any more");
        let older: Vec<usize> = self.occupants().filter(|(_, it)| *it < epoch).map(|(slot, _)| slot).collect();
        older.into_iter().for_each(|slot| self.fold_slot(slot));
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        let slot = self.slot(disk);
        if self.disks[&slot].leaving.is_some() {
            return Vec::new();
        }
        if self.installed.ledger.whole() >> slot & 1 == 1 {
            return ByteRange::between(0, self.disks[&slot].geometry.size_bytes).into_iter().collect();
        }
        self.map(0, slot).ranges()
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.require_whole_index(self.slot(disk));
        // A stream that goes on as if nothing were in doubt would never be healed.
        self.keep(None);
    }

    fn require(&mut self, disk: DiskId, range: ByteRange) {
        self.map(0, self.slot(disk)).mark(range);
        // As above.
        self.keep(None);
    }

    fn knows_writes(&self) -> bool {
        true
    }

    fn written_since(&self, epoch: Epoch, disk: DiskId, range: ByteRange) -> Vec<ByteRange> {
        let index = self.slot(disk);
        let newer: Vec<usize> =
            self.occupants().filter(|(_, occupant)| *occupant >= epoch).map(|(slot, _)| slot).collect();
        let reaches_back = self.installed.ledger.occupant(slot_of(epoch)) == Some(epoch);
        let all = |slot: &usize| self.whole_flag(*slot, index).load(Ordering::SeqCst) != 0;
        if !reaches_back || newer.iter().any(all) {
            return vec![range];
        }
        let maps = newer.into_iter().flat_map(|slot| [uncommitted(slot), unstreamed(slot)]);
        maps.flat_map(|map| self.map(map, index).marked_within(range)).collect()
    }

    fn clear_heal_set(&mut self) {
        self.disks.keys().for_each(|disk| self.map(0, *disk).clear());
        self.installed.ledger.set_whole(0);
    }

    fn clear(&mut self, epoch: Epoch) {
        let slot = slot_of(epoch);
        if self.installed.ledger.occupant(slot) != Some(epoch) {
            return;
        }
        assert!(self.settled(epoch.next()), "maps are cleared only when nobody can mark in them any more");
        assert!(!self.marked_unstreamed(slot), "an epoch with unstreamed writes is folded, never cleared");
        self.empty_slot(slot);
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        self.occupants().any(|(slot, occupant)| occupant >= epoch && self.marked_unstreamed(slot))
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        let recent: Vec<usize> = self
            .occupants()
            .filter(|(slot, occupant)| *occupant >= epoch && self.marked_unstreamed(*slot))
            .map(|(slot, _)| slot)
            .collect();
        let mut found = Vec::new();
        for (&index, disk) in self.disks.iter().filter(|(_, disk)| disk.leaving.is_none()) {
            for &slot in &recent {
                let whole = self.whole_flag(slot, index).load(Ordering::SeqCst) != 0;
                let all = ByteRange::between(0, disk.geometry.size_bytes).filter(|_| whole);
                let marked = if whole { Vec::new() } else { self.map(unstreamed(slot), index).ranges() };
                found.extend(all.into_iter().chain(marked).map(|range| (disk.geometry.disk, range)));
            }
        }
        found
    }

    fn passed(&self) -> RingPosition {
        RingPosition(self.read)
    }

    fn keep(&mut self, resumption: Option<Resumption>) {
        self.resumption = None;
        self.installed.ledger.keep(resumption.as_ref());
    }

    fn resumption(&self) -> Option<Resumption> {
        self.resumption.clone()
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        let (code, text) = assemble::marker_code(&kind, name);
        if text.len() > layout::NAME_BYTES_MAX {
            return false;
        }
        let control = &self.installed.control;
        let place = control.cells(Control::MARKER_NAME..Control::MARKER_NAME + text.len());
        place.iter().zip(text.as_bytes()).for_each(|(cell, byte)| cell.store(*byte, Ordering::SeqCst));
        control.half(Control::MARKER_BYTES).store(text.len() as u32, Ordering::SeqCst);
        control.half(Control::MARKER_KIND).store(code, Ordering::SeqCst);
        match self.installed.emit_marker() {
            Ok(taken) => taken,
            Err(error) => {
                tracing::warn!(%error, "a marker could not be put into the send buffer");
                false
            }
        }
    }

    fn continuity(&self) -> Continuity {
        self.continuity.clone()
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let end = offset + buffer.len() as u64;
        match &self.disks[&self.slot(disk)].device {
            Some(device) => device.read_at(offset, buffer),
            None => Err(BlockError::Unreadable {
                start: offset,
                end,
                source: std::io::Error::new(std::io::ErrorKind::NotFound, "the disk has left"),
            }),
        }
    }

    fn add_disk(&mut self, disk: NewDisk) -> Result<(), String> {
        self.add(EbpfDisk { geometry: disk.geometry, path: disk.path }).map_err(|error| error.to_string())
    }

    fn grow_disk(&mut self, disk: DiskId, size_bytes: u64) -> Result<(), String> {
        self.grow(self.slot(disk), size_bytes).map_err(|error| error.to_string())
    }

    fn retire_disk(&mut self, disk: DiskId) {
        self.retire(self.slot(disk));
    }

    fn forget_disk(&mut self, disk: DiskId) {
        let slot = self.slot(disk);
        let leaving = self.disks.get_mut(&slot).and_then(|known| known.leaving.as_mut());
        leaving.expect("only a disk that was retired is forgotten").forgotten = true;
    }

    fn bell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.installed.ring_map.as_fd())
    }

    /// Sets the word that the next record's program clears when it rings; see `wakes` in the programs. If it was set before the
    /// caller's last look, and everything reserved by now was read, nothing can have slipped in between.
    fn doze(&mut self) -> bool {
        let was_set = self.installed.control.half(Control::SLEEPS).swap(1, Ordering::SeqCst) == 1;
        was_set && self.read == self.installed.ring.producer()
    }

    fn follow(&mut self, phase: Phase) {
        if phase.whole && !phase.healing {
            self.end_joining();
        }
        self.clear_forgotten();
    }
}
