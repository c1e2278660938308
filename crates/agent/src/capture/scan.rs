//! Scan: a capture for whoever sees no writes. The disks are read again and again; what differs from what was read before
//! goes into the stream. Needs no privileges but to read the disks.
//!
//! ```text
//! at rest ──written to──► gap ─► heal of what is not committed ─► passes ─► one proven ─► marker, heal's end ─► at rest
//!                                                                  └─ written to meanwhile ─► once more
//! ```
//!
//! A point exists only where a pass ended whose image is one that the disks had: every disk's [`witness`] says that nothing
//! was written from before its first read until after its last. Where a witness is no proof by itself, a second pass must
//! find nothing changed as well. The point's time is the last moment at which that is known. Between such ends the stream is
//! broken, so that nobody takes what lies there for a state of the disks; disks that never rest never have a point.
//!
//! Invariants: what [`ScanCapture::known`] says of a granule is what the receiver has of it, once it has everything handed
//! out; changes are handed out only in a gap, and only while no heal reads; nothing follows the marker of a heal's end
//! before that heal is over.

mod counters;
#[cfg(test)]
mod tests;
pub mod witness;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use replication::geometry::{GRANULE_BYTES, LEAF_BYTES};
use replication::{ByteRange, ChangeKind, DiskGeometry, DiskId, Epoch, MachineId, MarkerKind, SourceTime};
use world::{BlockDevice, BlockError, Clock, Monotonic};

use super::recovery_set::{self, Attach, RecoverySet, Slot};
use super::{Capture, CaptureStatus, Captured, Continuity, GapCause, MemoryMapStore, Mode, Phase, RingPosition};
use crate::heal_pace::{HealLimits, HealPace};
pub use counters::{ScanCounters, ScanStatus};
use witness::{Trace, Witness};

/// Bytes read by one call of [`Capture::next`], so that the engine's thread looks at everything else soon.
const READ_BYTES_MAX: u64 = 4 << 20;
/// Pause between two looks at the witnesses.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long the counters of a disk may lag behind a write that has ended.
const SETTLING: Duration = Duration::from_millis(20);
/// What a record takes in the send buffer besides its data.
const RECORD_BYTES: u64 = 64;
/// The name of a point at the end of a scan.
pub const SCAN_POINT: &str = "scan";

/// A disk to scan.
pub struct ScanDisk {
    /// Its description.
    pub geometry: DiskGeometry,
    /// Reads what is on the disk, past this machine's caches.
    pub device: Arc<dyn BlockDevice>,
    /// Tells whether it was written to.
    pub witness: Box<dyn Witness>,
}

/// What a scan needs to know.
#[derive(Debug, Clone)]
pub struct ScanConfig {
    /// The protected machine.
    pub machine: MachineId,
    /// Bytes that may be handed out and not be journaled yet.
    pub ring_bytes_max: u64,
    /// Disks at rest for so long are read.
    pub quiet: Duration,
    /// Disks that do not rest are read so long after the last time, so that they differ by little when they do.
    pub every: Duration,
    /// How hard a pass may read.
    pub limits: HealLimits,
}

/// A granule's content, or that it is not known what the receiver has of it.
type Known = Option<[u8; 16]>;

struct Disk {
    geometry: DiskGeometry,
    device: Arc<dyn BlockDevice>,
    witness: Box<dyn Witness>,
    known: RefCell<Vec<Known>>,
}

impl Disk {
    fn granules(&self) -> usize {
        self.known.borrow().len()
    }

    fn range(&self, granule: usize) -> ByteRange {
        let start = granule as u64 * GRANULE_BYTES;
        ByteRange::new(start, GRANULE_BYTES.min(self.geometry.size_bytes - start))
    }
}

/// One reading of all disks.
struct Pass {
    /// The witnesses before the first read; none if the disks were not at rest.
    before: Option<Vec<Trace>>,
    /// What is read next.
    disk: usize,
    granule: usize,
    found: u64,
    /// When everything had been read.
    read: Option<Monotonic>,
}

/// The capture of disks that are scanned. See the module's documentation.
pub struct ScanCapture {
    disks: Vec<Disk>,
    set: RecoverySet,
    epoch: Epoch,
    clock: Arc<dyn Clock>,
    config: ScanConfig,
    pace: HealPace,
    shared: Arc<ScanCounters>,
    phase: Phase,
    gaps: u64,
    pass: Option<Pass>,
    pass_ended: Option<Monotonic>,
    /// The next pass need not wait.
    hurry: bool,
    /// What a pass found: not in the stream yet.
    found: VecDeque<(usize, ByteRange, Bytes)>,
    found_bytes: u64,
    markers: VecDeque<Captured>,
    /// The witnesses with which the disks are what [`Disk::known`] says.
    proven: Option<Vec<Trace>>,
    /// The latest look at the witnesses, when it began, and since when they say the same.
    seen: Option<Vec<Trace>>,
    seen_at: Monotonic,
    same_since: Monotonic,
    /// Where the marker ends that ends the heal under way.
    end: Option<RingPosition>,
    /// What is in the stream ends here.
    produced: u64,
    released: u64,
    time: SourceTime,
}

impl ScanCapture {
    /// Takes the disks under protection. Nothing is known of them: a whole comparison comes first.
    pub fn new(disks: Vec<ScanDisk>, clock: Arc<dyn Clock>, config: ScanConfig) -> std::io::Result<ScanCapture> {
        let geometries: Vec<DiskGeometry> = disks.iter().map(|disk| disk.geometry.clone()).collect();
        let unseen = |_, _| None;
        let attach = Attach { machine: config.machine, boot: [0; 16], disks: &geometries, fingerprint: &unseen };
        // The maps need not outlive the agent: whatever was written without it, no map names.
        let adopted = recovery_set::adopt(None, &attach);
        let set = RecoverySet::install(&MemoryMapStore::new(), &adopted.image)?;
        let epoch = Slot::ALL.into_iter().find_map(|slot| set.occupant(slot)).expect("a new image has an epoch");
        let disks = disks.into_iter().map(|ScanDisk { geometry, device, witness }| {
            let granules = geometry.size_bytes.div_ceil(GRANULE_BYTES) as usize;
            Disk { geometry, device, witness, known: RefCell::new(vec![None; granules]) }
        });
        let now = clock.monotonic();
        Ok(ScanCapture {
            disks: disks.collect(),
            set,
            epoch,
            pace: HealPace::new(config.limits),
            clock,
            config,
            shared: Arc::default(),
            phase: Phase::default(),
            gaps: 0,
            pass: None,
            pass_ended: None,
            hurry: false,
            found: VecDeque::new(),
            found_bytes: 0,
            markers: VecDeque::new(),
            proven: None,
            seen: None,
            seen_at: now,
            same_since: now,
            end: None,
            produced: 0,
            released: 0,
            time: SourceTime(0),
        })
    }

    /// What it says of itself, also while the engine owns it.
    pub fn counters(&self) -> Arc<ScanCounters> {
        self.shared.clone()
    }

    fn index(&self, disk: DiskId) -> usize {
        let found = self.disks.iter().position(|it| it.geometry.disk == disk);
        found.expect("the engine names only disks that this capture told it of")
    }

    /// Asks every witness now.
    fn look(&mut self) {
        let began = self.clock.monotonic();
        let traces = self.disks.iter().map(|disk| disk.witness.trace()).collect::<Result<Vec<_>, _>>();
        let traces = match traces {
            Ok(traces) => Some(traces),
            Err(error) => {
                self.shared.blind(&error);
                None
            }
        };
        if traces.is_none() || self.seen != traces || !rests(&traces) {
            self.same_since = began;
        }
        (self.seen, self.seen_at) = (traces, began);
    }

    /// Whether the disks are what the receiver has, once it has everything handed out. Looks at the witnesses.
    fn is_current(&mut self) -> bool {
        self.look();
        self.found.is_empty() && self.agrees()
    }

    /// Whether the latest look found the disks as they were proven to be.
    fn agrees(&self) -> bool {
        self.proven.is_some() && self.proven == self.seen
    }

    fn used(&self) -> u64 {
        self.produced - self.released + self.found_bytes
    }

    /// Goes on with the pass under way, or begins one if it is time. Bounded.
    fn scan(&mut self) {
        if self.shared.take_hurry() {
            // What was read before the wish proves nothing for it.
            (self.pass, self.hurry) = (None, true);
        }
        if self.pass.is_none() && !self.begin_pass() {
            return;
        }
        let mut read = 0;
        while read < READ_BYTES_MAX
            && self.used() < self.config.ring_bytes_max
            && self.pace.allows(self.clock.monotonic())
            && let Some((disk, granule)) = self.next_granule()
        {
            read += self.compare(disk, granule);
        }
        self.end_pass();
    }

    fn begin_pass(&mut self) -> bool {
        let now = self.clock.monotonic();
        let quiet = rests(&self.seen) && now.since(self.same_since) >= self.config.quiet;
        let due = self.pass_ended.is_none_or(|ended| now.since(ended) >= self.config.every);
        if self.agrees() || !(quiet || due || self.hurry) {
            return false;
        }
        self.hurry = false;
        self.look();
        self.proven = None;
        let before = self.seen.clone().filter(|_| rests(&self.seen));
        self.pass = Some(Pass { before, disk: 0, granule: 0, found: 0, read: None });
        true
    }

    fn next_granule(&mut self) -> Option<(usize, usize)> {
        let pass = self.pass.as_mut()?;
        while pass.disk < self.disks.len() {
            if pass.granule < self.disks[pass.disk].granules() {
                pass.granule += 1;
                return Some((pass.disk, pass.granule - 1));
            }
            (pass.disk, pass.granule) = (pass.disk + 1, 0);
        }
        pass.read.get_or_insert_with(|| self.clock.monotonic());
        None
    }

    /// Reads one granule and keeps it if it is not what the receiver has. Bytes read.
    fn compare(&mut self, index: usize, granule: usize) -> u64 {
        let began = self.clock.monotonic();
        let disk = &self.disks[index];
        let range = disk.range(granule);
        let mut buffer = vec![0; range.len as usize];
        let readable = read_around(&*disk.device, range, &mut buffer);
        let hash = hash_of(&buffer, &readable, range);
        let known = &mut disk.known.borrow_mut()[granule];
        if known.replace(hash) != Some(hash) {
            let data = Bytes::from(buffer);
            for part in readable {
                self.found_bytes += part.len + RECORD_BYTES;
                self.found.push_back((index, part, data.slice(part.within(range.start))));
            }
            self.shared.changed(range.len);
            self.pass.as_mut().expect("a pass reads").found += 1;
        }
        self.pace.spent(began, self.clock.monotonic(), range.len);
        self.shared.read(range.len);
        range.len
    }

    /// Judges the pass once everything was read and a write that ended meanwhile had time to be counted.
    fn end_pass(&mut self) {
        let now = self.clock.monotonic();
        let Some(Pass { read: Some(read), .. }) = &self.pass else { return };
        if now.since(*read) < SETTLING {
            return;
        }
        let pass = self.pass.take().expect("it was there");
        self.look();
        self.pass_ended = Some(now);
        let still = pass.before.is_some() && pass.before == self.seen && rests(&self.seen);
        let alone = self.disks.iter().all(|disk| disk.witness.is_proof());
        if still && (alone || pass.found == 0) {
            self.proven.clone_from(&pass.before);
        }
        self.shared.pass_ended(self.proven.is_some(), still);
        tracing::debug!(found = pass.found, still, proven = self.proven.is_some(), "a pass has ended");
    }

    /// The last moment of which the latest look tells everything.
    fn looked_until(&self) -> Monotonic {
        Monotonic(self.seen_at.0.saturating_sub(SETTLING.as_nanos() as u64))
    }

    /// Puts a marker of the moment into the stream of which the latest look tells.
    fn put_marker(&mut self, kind: MarkerKind, name: &str) {
        self.produced += RECORD_BYTES;
        self.time = self.time.max(SourceTime(self.looked_until().0));
        self.markers.push_back(Captured {
            end: RingPosition(self.produced),
            epoch: self.epoch,
            time: self.time,
            disk: DiskId(0),
            kinds: vec![ChangeKind::Marker { kind, name: name.to_owned() }],
        });
        if self.phase.ending {
            self.end = Some(RingPosition(self.produced));
        }
        self.shared.point(self.clock.wall());
    }

    fn hand_out(&mut self) -> Option<Captured> {
        let (disk, range, data) = self.found.pop_front()?;
        self.found_bytes -= range.len + RECORD_BYTES;
        self.produced += range.len + RECORD_BYTES;
        self.set.mark_uncommitted(Slot::of(self.epoch), disk, range);
        // Only the time of the marker behind it tells anything.
        let kind = if data.iter().all(|byte| *byte == 0) {
            ChangeKind::Zero { range }
        } else {
            ChangeKind::Write { range, data }
        };
        Some(Captured {
            end: RingPosition(self.produced),
            epoch: self.epoch,
            time: self.time,
            disk: self.disks[disk].geometry.disk,
            kinds: vec![kind],
        })
    }
}

fn rests(traces: &Option<Vec<Trace>>) -> bool {
    traces.as_ref().is_some_and(|traces| traces.iter().all(Trace::is_rest))
}

/// Reads `range`, around what the medium cannot return. What could be read, whole leaves where not everything could.
fn read_around(device: &dyn BlockDevice, range: ByteRange, buffer: &mut [u8]) -> Vec<ByteRange> {
    if device.read_at(range.start, buffer).is_ok() {
        return vec![range];
    }
    let mut readable = Vec::new();
    for leaf in range.split_at_multiples(LEAF_BYTES) {
        let bytes = &mut buffer[leaf.within(range.start)];
        match device.read_at(leaf.start, bytes) {
            Ok(()) => readable.push(leaf),
            Err(_) => bytes.fill(0),
        }
    }
    readable
}

fn hash_of(content: &[u8], readable: &[ByteRange], range: ByteRange) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(content);
    if readable != [range] {
        for part in readable {
            hasher.update(&part.start.to_le_bytes());
        }
    }
    *hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes")
}

impl Capture for ScanCapture {
    fn disks(&self) -> Vec<DiskGeometry> {
        self.disks.iter().map(|disk| disk.geometry.clone()).collect()
    }

    fn next(&mut self) -> Option<Captured> {
        if let Some(marker) = self.markers.pop_front() {
            return Some(marker);
        }
        if self.seen.is_none() || self.clock.monotonic().since(self.seen_at) >= LOOK_EVERY {
            self.look();
        }
        // Until the heal that a marker ended is over, the receiver's state is that marker's.
        if self.end.is_some() {
            return None;
        }
        if self.phase.whole {
            if !self.agrees() {
                self.gaps += 1;
                // The engine says so itself before it asks again.
                self.phase.whole = false;
            }
            return None;
        }
        if self.phase.ending && self.found.is_empty() {
            self.scan();
        }
        self.hand_out()
    }

    fn rewind(&mut self, _to: RingPosition) {
        // What was handed out is kept by whoever asked, or is in the maps.
    }

    fn release(&mut self, through: RingPosition) {
        self.released = self.released.max(through.0);
    }

    fn status(&self) -> CaptureStatus {
        CaptureStatus {
            gap_count: self.gaps,
            gap_cause: (self.gaps > 0).then_some(GapCause::Scanned),
            producer: RingPosition(self.produced),
            ring_bytes_used: self.produced - self.released,
            ring_bytes_max: self.config.ring_bytes_max,
            epoch: self.epoch,
            mode: Mode::Stream,
            unstreamed_count: 0,
        }
    }

    fn rotate(&mut self, _mode: Mode) -> Option<Epoch> {
        let epoch = self.epoch.next();
        if self.set.occupant(Slot::of(epoch)).is_some() {
            return None;
        }
        self.set.occupy(epoch);
        self.epoch = epoch;
        Some(epoch)
    }

    fn settled(&self, epoch: Epoch) -> bool {
        epoch <= self.epoch
    }

    fn fold(&mut self, epoch: Epoch) {
        for slot in Slot::ALL {
            if self.set.occupant(slot).is_some_and(|occupant| occupant < epoch) {
                self.set.fold(slot, || ());
            }
        }
    }

    fn heal_set(&self, disk: DiskId) -> Vec<ByteRange> {
        self.set.heal_set(self.index(disk))
    }

    fn require_whole(&mut self, disk: DiskId) {
        self.set.require_whole(self.index(disk));
    }

    fn clear_heal_set(&mut self) {
        self.set.clear_heal_set();
    }

    fn clear(&mut self, epoch: Epoch) {
        let slot = Slot::of(epoch);
        if self.set.occupant(slot) == Some(epoch) && epoch < self.epoch {
            self.set.empty(slot, || ());
        }
    }

    fn has_unstreamed(&self, _epoch: Epoch) -> bool {
        false
    }

    fn unstreamed(&self, _epoch: Epoch) -> Vec<(DiskId, ByteRange)> {
        Vec::new()
    }

    fn mark(&mut self, kind: MarkerKind, name: &str) -> bool {
        let placed = self.takes_markers() == Some(true);
        if placed {
            self.put_marker(kind, name);
        }
        placed
    }

    fn continuity(&self) -> Continuity {
        Continuity::Fresh
    }

    fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let disk = &self.disks[self.index(disk)];
        let done = disk.device.read_at(offset, buffer);
        // Only heals read here, and no pass goes on while one does: the receiver gets exactly this.
        let Some(range) = ByteRange::between(offset, offset + buffer.len() as u64) else { return done };
        let mut known = disk.known.borrow_mut();
        for granule in (range.start / GRANULE_BYTES) as usize..range.end().div_ceil(GRANULE_BYTES) as usize {
            let whole = disk.range(granule);
            let is_within = whole.start >= range.start && whole.end() <= range.end();
            known[granule] =
                (done.is_ok() && is_within).then(|| hash_of(&buffer[whole.within(range.start)], &[whole], whole));
        }
        done
    }

    fn follow(&mut self, phase: Phase) {
        if phase.ending && !self.phase.ending || !phase.healing {
            self.end = None;
        }
        if phase.ending && !self.phase.ending {
            // Heal reads since then were of other moments.
            self.proven = None;
        }
        if !phase.ending {
            self.pass = None;
            // The heal that follows may read what lies here, and what is handed out late would win over it.
            for (disk, range, _) in self.found.drain(..) {
                self.disks[disk].known.borrow_mut()[(range.start / GRANULE_BYTES) as usize] = None;
            }
            self.found_bytes = 0;
        }
        self.phase = phase;
    }

    fn heal_end(&mut self) -> Option<RingPosition> {
        if let Some(end) = self.end {
            return self.markers.is_empty().then_some(end);
        }
        // Markers before it, if any, would not be its last change.
        if self.phase.ending && self.markers.is_empty() && self.proven.is_some() && self.is_current() {
            self.put_marker(MarkerKind::Crash, SCAN_POINT);
        }
        None
    }

    fn known_until(&self, now: Monotonic) -> Option<Monotonic> {
        // In a gap it is no proof, but tells that the agent lives.
        match self.phase.whole {
            true => self.agrees().then(|| self.looked_until().min(now)),
            false => Some(now),
        }
    }

    fn takes_markers(&mut self) -> Option<bool> {
        let taken = !self.markers.is_empty() || self.end.is_some() && !self.phase.whole;
        Some(!taken && (self.phase.whole || self.phase.ending) && self.is_current())
    }

    fn ends_gap_with_marker(&self) -> bool {
        self.phase.ending && self.end.is_some()
    }
}
