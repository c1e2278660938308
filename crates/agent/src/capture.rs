//! Capture: where a machine's writes enter Farshore, and the recovery set that names what the stream did not carry.
//!
//! The engine talks to a [`Capture`] and nothing else, so that the splitter, the eBPF capture and the scan are
//! interchangeable. A capture owns three things:
//!
//! * the *ring*: whole requests with their data, in submission order. It is the send buffer: space is released only
//!   when the process server has the data durably;
//! * the *maps*: which granules were written, per epoch, *uncommitted* (every write) and *unstreamed* (not carried
//!   by the ring). They are marked before a write reaches the disk and survive the agent;
//! * the *(epoch, mode) word*, which every write reads exactly once.
//!
//! ```text
//!             rotate                 rotate (only after fold or clear freed a slot)
//! epoch e ───────────► epoch e+1 ───────────► epoch e+2
//!    │ settled(e+1): nobody can act under e any more
//!    ├─ clear(e): no drops, last record committed      ─► slot free
//!    └─ fold(e+1): marks move to the heal set          ─► slot free;  heal commits ─► clear_heal_set
//! ```
//!
//! A crash of the agent leaves the maps as they are (page cache); a crash of the machine leaves [`Continuity::Lost`].

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use replication::sender::Resumption;
use replication::{ByteRange, ChangeKind, DiskGeometry, DiskId, Epoch, MarkerKind, SourceTime};
use world::{BlockError, Monotonic};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod ebpf;
pub mod fingerprint;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod gate;
pub mod mapfile;
mod overlap;
mod pieces;
mod recovery_set;
pub mod ring;
pub mod scan;
mod slabs;
pub mod splitter;
mod splitter_capture;
#[cfg(test)]
mod splitter_tests;

pub use gate::{FreezeError, Frozen};
pub use mapfile::{FileMapStore, MapArea, MapStore, MapStoreError, MemoryMapStore};
pub use splitter::{OpenSplitterError, ProtectedDisk, Splitter, SplitterConfig, SplitterDisk};
pub use splitter_capture::SplitterCapture;

/// A place in the ring: bytes taken by every record up to and including one, since the capture started. Monotone;
/// zero is the place before the first record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct RingPosition(pub u64);

/// What happens to a write besides being marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Its data goes into the ring.
    Stream,
    /// It is marked *unstreamed*; the ring is not used.
    Track,
}

/// Why the stream broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GapCause {
    /// The ring was full: writes came faster than the process server took them.
    Overflow,
    /// A write's data could not be copied.
    CopyFailed,
    /// A write completed whose submission was not captured.
    MissedSubmission,
    /// The disks are scanned, and were written to since the last scan.
    Scanned,
}

impl fmt::Display for GapCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GapCause::Overflow => "the send buffer was full",
            GapCause::CopyFailed => "a write's data could not be copied",
            GapCause::MissedSubmission => "a write completed that was not captured when it was submitted",
            GapCause::Scanned => "the disks are scanned: between their last rest and the next one there are no points",
        })
    }
}

/// One whole request (a bio, an NBD request, a marker, a geometry change) taken out of the ring. A cut never divides
/// it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// The ring position after this record; what [`Capture::release`] takes.
    pub end: RingPosition,
    /// The epoch under which it was written: its marks are in that epoch's maps.
    pub epoch: Epoch,
    /// When it was submitted.
    pub time: SourceTime,
    /// The disk it applies to; disk 0 for markers.
    pub disk: DiskId,
    /// What happened, in order, in pieces of at most `CHANGE_DATA_BYTES_MAX`. Never empty.
    pub kinds: Vec<ChangeKind>,
}

/// The capture's counters at one moment. `gap_count` is read before `producer`: if it is unchanged in a sample taken
/// after consuming up to `producer`, then nothing up to there is missing from the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureStatus {
    /// How often something happened that the ring does not carry: drops, copy failures, missed submissions.
    /// Monotone. Writes that only mark because the mode is [`Mode::Track`] do not count again; writes that failed
    /// show in [`Capture::has_unstreamed`] only.
    pub gap_count: u64,
    /// The cause of the latest of them.
    pub gap_cause: Option<GapCause>,
    /// The position after the last record reserved so far, complete or not.
    pub producer: RingPosition,
    /// Ring bytes that are not released yet.
    pub ring_bytes_used: u64,
    /// The ring's size in bytes.
    pub ring_bytes_max: u64,
    /// The epoch of the word.
    pub epoch: Epoch,
    /// The mode of the word.
    pub mode: Mode,
    /// How often a range was marked unstreamed, for whatever reason. Monotone.
    pub unstreamed_count: u64,
}

/// What passed through the disks since the capture began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteCounts {
    /// Requests that changed a disk: writes, zeroes, discards.
    pub changes: u64,
    /// Data bytes written.
    pub written_bytes: u64,
    /// Requests that were only marked.
    pub tracked: u64,
    /// Requests that a disk refused.
    pub failed: u64,
    /// Requests whose end was not told in time, and that are not waited for any more.
    pub untold: u64,
}

/// How much of what happened to the disks is known at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Continuity {
    /// These maps are new. Nothing is known: the whole disk is compared.
    Fresh,
    /// The maps lived through the agent's absence, or both sides of it were orderly and the disks are as they were:
    /// the heal set names everything that may differ.
    SameBoot,
    /// Writes may have happened that no map names, or completed writes may have been lost. The disks concerned are
    /// flagged already: [`Capture::heal_set`] names them whole, across restarts, until a heal was committed.
    Lost(LostReason),
}

/// What a start finds after an agent that ended in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unbroken {
    /// The epoch in which that agent ended: tells its last words from those of an earlier end.
    pub ended_in: Epoch,
    /// What its stream does not know or what may have changed since, and why.
    pub lacking: Vec<(DiskId, ByteRange, String)>,
}

/// Why the maps do not suffice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LostReason {
    /// The machine started again since.
    Rebooted,
    /// The map file belongs to another machine.
    OtherMachine,
    /// The map file is damaged, or of a version this program does not know.
    Unreadable(String),
    /// A disk's identity is not the one recorded.
    DiskReplaced(DiskId),
    /// A disk is smaller than it was.
    DiskShrunk(DiskId),
    /// Although the agent was stopped in order, the disk is not as it was then.
    ChangedMeanwhile(DiskId),
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LostReason::Rebooted => f.write_str("the machine was restarted"),
            LostReason::OtherMachine => f.write_str("the dirty maps belong to another machine"),
            LostReason::Unreadable(why) => write!(f, "the dirty maps cannot be used: {why}"),
            LostReason::DiskReplaced(disk) => write!(f, "{disk} is another disk than the one protected"),
            LostReason::DiskShrunk(disk) => write!(f, "{disk} is smaller than it was"),
            LostReason::ChangedMeanwhile(disk) => write!(f, "{disk} was written to while the agent was stopped"),
        }
    }
}

/// A disk that is to be captured from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDisk {
    /// Its description.
    pub geometry: DiskGeometry,
    /// The image file or block device.
    pub path: PathBuf,
}

const FIXED: &str = "this capture takes its disks at its start: restart the agent";

/// What the engine's sender is doing, as far as a capture may care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Phase {
    /// The stream is whole.
    pub whole: bool,
    /// A heal is wanted, under way, or not committed yet.
    pub healing: bool,
    /// Everything that the heal reads was read and sent: it waits for [`Capture::heal_end`].
    pub ending: bool,
}

/// A source of captured requests together with its dirty maps. One engine owns it and calls it from one thread.
pub trait Capture: Send {
    /// The protected disks, as they are now.
    fn disks(&self) -> Vec<DiskGeometry>;

    /// The next complete record in ring order, or `None` if there is none now. Advances the read cursor only.
    fn next(&mut self) -> Option<Captured>;

    /// Moves the read cursor back to `to`, the end of a record that is not released before it (or the release
    /// cursor itself).
    fn rewind(&mut self, to: RingPosition);

    /// Frees the ring up to `through`, the `end` of a record already read: the data is durable elsewhere.
    fn release(&mut self, through: RingPosition);

    /// Counters now.
    fn status(&self) -> CaptureStatus;

    /// How many bytes of the ring may be taken out of it beyond what is released. Less than all of it where
    /// [`Capture::next`] copies.
    fn ahead_bytes_max(&self) -> u64 {
        u64::MAX
    }

    /// Opens the next epoch in `mode`, which also ends a sticky break. `None` while both epoch slots are in use
    /// (fold or clear the older one first) or while someone may still act under the older one.
    fn rotate(&mut self, mode: Mode) -> Option<Epoch>;

    /// Whether nobody can act under an epoch older than `epoch` any more: every such write has completed or failed,
    /// and its marks and records are in place.
    fn settled(&self, epoch: Epoch) -> bool;

    /// Adds the maps of all epochs older than `epoch`, *uncommitted* and *unstreamed* alike, to the heal set and
    /// frees their slots. Requires `settled(epoch)`. A crash in the middle loses no mark.
    fn fold(&mut self, epoch: Epoch);

    /// What a heal must cover on `disk`: sorted, disjoint, not adjacent, within the disk. The whole disk if
    /// [`Capture::require_whole`] was called since the last [`Capture::clear_heal_set`].
    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange>;

    /// Records, across restarts, that only a comparison of the whole disk will do.
    fn require_whole(&mut self, disk: DiskId);

    /// Records, across restarts, that `range` has to be healed, whether or not anybody writes to it.
    fn require(&mut self, disk: DiskId, range: ByteRange) {
        let _ = range;
        self.require_whole(disk);
    }

    /// Whether [`Capture::written_since`] can tell.
    fn knows_writes(&self) -> bool {
        false
    }

    /// What of `range` may have been written to in `epoch` or later ones, as far as it was marked by now: granules of the
    /// maps. Everything, if the maps do not reach back so far.
    fn written_since(&self, epoch: Epoch, disk: DiskId, range: ByteRange) -> Vec<ByteRange> {
        let _ = (epoch, disk);
        vec![range]
    }

    /// Forgets the heal set: a heal that covers all of it was committed. The caller must not call this for a heal
    /// that began before the latest [`Capture::fold`] or [`Capture::require_whole`].
    fn clear_heal_set(&mut self);

    /// Forgets the maps of `epoch`, which is older than the current one: it had no drops and its last record is
    /// committed.
    fn clear(&mut self, epoch: Epoch);

    /// Whether any epoch from `epoch` on holds an *unstreamed* mark: a write that was dropped, only tracked, or that
    /// failed. An epoch with one cannot be cleared; it is folded, and a heal with a later `p0` covers it.
    fn has_unstreamed(&self, epoch: Epoch) -> bool;

    /// What [`Capture::has_unstreamed`] speaks of: sorted within each disk, granules of the maps, within the disks.
    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)>;

    /// What has become of the stream of an agent that ended in order, if everything since is known: its last epoch, and
    /// what is new or in doubt since. None unless the agent before ended in order, on this boot.
    fn unbroken(&self) -> Option<Unbroken> {
        None
    }

    /// Up to where everything was handed out by [`Capture::next`] or never will be. Zero for a capture that hands out
    /// whatever is in its ring.
    fn passed(&self) -> RingPosition {
        RingPosition(0)
    }

    /// Keeps beside the ring how its stream goes on, for an agent that comes after this one; `None`: it cannot. Called
    /// before the ring is released up to there.
    fn keep(&mut self, resumption: Option<Resumption>) {
        let _ = resumption;
    }

    /// How the stream of an agent goes on that ended without leaving word, with what the ring holds. None unless ring
    /// and maps outlived it.
    fn resumption(&self) -> Option<Resumption> {
        None
    }

    /// Puts a marker into the ring, after every record reserved so far. `false` if there is no room or the stream
    /// is broken.
    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool;

    /// What was known when this capture started.
    fn continuity(&self) -> Continuity;

    /// Captures one more disk: from its return on every write to it is in the ring or marked. The heal set names all of it,
    /// across restarts; what was under way is marked as unstreamed when it ends.
    ///
    /// # Errors
    /// In words, why not; nothing has changed.
    fn add_disk(&mut self, disk: NewDisk) -> Result<(), String> {
        let _ = disk;
        Err(FIXED.to_owned())
    }

    /// A disk has this size now, more than before: as [`Capture::add_disk`] for the new area, in whole leaves.
    ///
    /// # Errors
    /// In words, why not; nothing has changed.
    fn grow_disk(&mut self, disk: DiskId, size_bytes: u64) -> Result<(), String> {
        let _ = (disk, size_bytes);
        Err(FIXED.to_owned())
    }

    /// Captures a disk no more, which may be gone. It stays among [`Capture::disks`], without a heal set, until it is
    /// forgotten; [`Capture::next`] hands out nothing of it any more.
    fn retire_disk(&mut self, disk: DiskId) {
        unreachable!("{disk}: only a capture that takes disks while it runs is asked to leave one");
    }

    /// Nobody asks for this disk any more, which was retired.
    fn forget_disk(&mut self, disk: DiskId) {
        unreachable!("{disk}: only a capture that takes disks while it runs is asked to forget one");
    }

    /// Told after each report what the sender makes of it.
    fn follow(&mut self, phase: Phase) {
        let _ = phase;
    }

    /// Where the heal may end whose reads are done: once everything up to there is consumed, the receiver has a state that
    /// the disks had. `None`: not yet; asked again.
    fn heal_end(&mut self) -> Option<RingPosition> {
        Some(self.status().producer)
    }

    /// Now that [`Capture::next`] has returned `None`: the moment before which everything submitted was handed out, if
    /// there is one. `now` was read before.
    fn known_until(&self, now: Monotonic) -> Option<Monotonic> {
        Some(now)
    }

    /// Whether a marker would be taken now, whatever the stream is like; `None`: exactly if the stream is whole.
    fn takes_markers(&mut self) -> Option<bool> {
        None
    }

    /// Whether a marker that was taken is where the gap ends that is open.
    fn ends_gap_with_marker(&self) -> bool {
        false
    }

    /// What becomes readable, to an edge-triggered epoll, when something comes after [`Capture::doze`] was called. `None`: this
    /// capture rings nobody, and has to be asked again and again.
    fn bell(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Now that [`Capture::next`] has returned `None`: the next thing that comes is to ring the bell. Whether it surely will.
    /// If not, look once more, after milliseconds and not microseconds, and ask again before sleeping for long.
    fn doze(&mut self) -> bool {
        false
    }

    /// Reads the source for a heal or a scrub.
    ///
    /// # Errors
    /// [`BlockError::Unreadable`] names the range that is lost; the caller records a defect and reads around it.
    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError>;

    /// Whether all of `range` is known to read as zeroes without reading it.
    fn is_hole(&self, disk: DiskId, range: ByteRange) -> bool {
        let _ = (disk, range);
        false
    }
}

impl<C: Capture + ?Sized> Capture for Box<C> {
    fn disks(&self) -> Vec<DiskGeometry> {
        (**self).disks()
    }

    fn next(&mut self) -> Option<Captured> {
        (**self).next()
    }

    fn rewind(&mut self, to: RingPosition) {
        (**self).rewind(to);
    }

    fn release(&mut self, through: RingPosition) {
        (**self).release(through);
    }

    fn status(&self) -> CaptureStatus {
        (**self).status()
    }

    fn ahead_bytes_max(&self) -> u64 {
        (**self).ahead_bytes_max()
    }

    fn rotate(&mut self, mode: Mode) -> Option<Epoch> {
        (**self).rotate(mode)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        (**self).settled(epoch)
    }

    fn fold(&mut self, epoch: Epoch) {
        (**self).fold(epoch);
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        (**self).heal_set(disk)
    }

    fn require_whole(&mut self, disk: DiskId) {
        (**self).require_whole(disk);
    }

    fn require(&mut self, disk: DiskId, range: ByteRange) {
        (**self).require(disk, range);
    }

    fn knows_writes(&self) -> bool {
        (**self).knows_writes()
    }

    fn written_since(&self, epoch: Epoch, disk: DiskId, range: ByteRange) -> Vec<ByteRange> {
        (**self).written_since(epoch, disk, range)
    }

    fn clear_heal_set(&mut self) {
        (**self).clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        (**self).clear(epoch);
    }

    fn has_unstreamed(&self, epoch: Epoch) -> bool {
        (**self).has_unstreamed(epoch)
    }

    fn unstreamed(&self, epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        (**self).unstreamed(epoch)
    }

    fn unbroken(&self) -> Option<Unbroken> {
        (**self).unbroken()
    }

    fn passed(&self) -> RingPosition {
        (**self).passed()
    }

    fn keep(&mut self, resumption: Option<Resumption>) {
        (**self).keep(resumption);
    }

    fn resumption(&self) -> Option<Resumption> {
        (**self).resumption()
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        (**self).mark(kind, name)
    }

    fn continuity(&self) -> Continuity {
        (**self).continuity()
    }

    fn add_disk(&mut self, disk: NewDisk) -> Result<(), String> {
        (**self).add_disk(disk)
    }

    fn grow_disk(&mut self, disk: DiskId, size_bytes: u64) -> Result<(), String> {
        (**self).grow_disk(disk, size_bytes)
    }

    fn retire_disk(&mut self, disk: DiskId) {
        (**self).retire_disk(disk);
    }

    fn forget_disk(&mut self, disk: DiskId) {
        (**self).forget_disk(disk);
    }

    fn follow(&mut self, phase: Phase) {
        (**self).follow(phase);
    }

    fn heal_end(&mut self) -> Option<RingPosition> {
        (**self).heal_end()
    }

    fn known_until(&self, now: Monotonic) -> Option<Monotonic> {
        (**self).known_until(now)
    }

    fn takes_markers(&mut self) -> Option<bool> {
        (**self).takes_markers()
    }

    fn ends_gap_with_marker(&self) -> bool {
        (**self).ends_gap_with_marker()
    }

    fn bell(&self) -> Option<BorrowedFd<'_>> {
        (**self).bell()
    }

    fn doze(&mut self) -> bool {
        (**self).doze()
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        (**self).read(disk, offset, buffer)
    }

    fn is_hole(&self, disk: DiskId, range: ByteRange) -> bool {
        (**self).is_hole(disk, range)
    }
}
