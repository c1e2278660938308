//! A branch without threads: takes writes, answers reads, and seals what it took as the branch's own chain.
//!
//! ```text
//! write ─► number, stamp ─► journal ─► overlay ─┐          read ◄─ overlay ◄─ own layers ◄─ parent at the cut
//!                                               └─ seal_step ─► segment ─► manifest ─► overlay pieces dropped
//! ```
//!
//! Invariants: a change is in the journal, and with the system, before it is in the overlay, and in the overlay or the
//! vault ever after, so that an end of the process loses no answered write; a flush returns only when every change that
//! was answered before is synced; a prepared manifest is put again, byte by byte, until the store answers; nothing is
//! written under a generation that lost its name.
//!
//! Taking writes is here; `read` answers from the overlay and the layers below it, `seal` moves changes into the vault.
//!
//! A crash leaves the journal. [`BranchCore::recover`] opens the next generation, commits the tail of the old one with its
//! old numbers, and goes on.

mod read;
mod seal;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use process_server::journal::{Journal, JournalError, Record};
use replication::cut::{CutPlanner, PointClock};
use replication::geometry::ByteRange;
use replication::limits::{CHANGE_DATA_BYTES_MAX, CHANGE_RANGE_BYTES_MAX};
use replication::{
    ChainId, Change, ChangeKind, Cut, CutKind, DiskGeometry, DiskId, MarkerKind, PointTime, SequenceNumber, SourceTime,
};
use vault::layer::LayerRef;
use vault::view::{ChainView, ViewBelow};
use vault::view_source::FrameSource;
use vault::{ChainWriter, WriterSession};
use world::Clock;

use self::seal::Sealer;
pub use self::seal::{SealConfig, SealWish, Sealed};
use crate::error::BranchError;
use crate::limits;
use crate::overlay::{Overlay, Touched};

/// Figures about a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BranchFigures {
    /// Newest change.
    pub written: SequenceNumber,
    /// Everything up to here is in the vault.
    pub committed: SequenceNumber,
    /// Bytes of changes that are not in the vault yet.
    pub unsealed_bytes: u64,
    /// Bytes the journal takes on the disk.
    pub journal_bytes: u64,
    /// Another writer holds the chain.
    pub fenced: bool,
}

/// The parts a core is made of.
pub(crate) struct CoreParts {
    pub(crate) source: Arc<FrameSource>,
    pub(crate) session: Arc<WriterSession>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: SealConfig,
    pub(crate) disks: Vec<DiskGeometry>,
    pub(crate) below: ViewBelow,
    pub(crate) writer: ChainWriter,
    /// The branch's layers of earlier generations.
    pub(crate) older_layers: Vec<LayerRef>,
    pub(crate) journal: Journal,
    /// Changes of an earlier generation that are journaled but not committed.
    pub(crate) tail: Vec<Change>,
    /// Committed changes that no cut includes; `None` if a cut is at the end.
    pub(crate) uncut: Option<SequenceNumber>,
    /// Newest point time on the chain or below it.
    pub(crate) last_point: PointTime,
}

struct WriteSide {
    journal: Journal,
    sequence: SequenceNumber,
    clock: PointClock,
    planner: CutPlanner,
    /// Changes that are not committed, in order.
    pending: VecDeque<Change>,
    pending_bytes: u64,
    /// Cuts that no manifest names yet.
    cuts: Vec<Cut>,
    /// Position of the newest cut of this session.
    last_cut: SequenceNumber,
    /// No more writes.
    closed: Option<String>,
}

impl WriteSide {
    fn add_cuts(&mut self, cuts: impl IntoIterator<Item = Cut>) {
        for cut in cuts {
            if cut.sequence > self.last_cut {
                self.last_cut = cut.sequence;
                self.cuts.push(cut);
            }
        }
    }
}

struct ReadSide {
    overlays: BTreeMap<DiskId, Overlay>,
    touched: BTreeMap<DiskId, Touched>,
    /// Own layers over the parent.
    view: Arc<ChainView>,
}

/// See the module's documentation.
pub struct BranchCore {
    chain: ChainId,
    source: Arc<FrameSource>,
    session: Arc<WriterSession>,
    clock: Arc<dyn Clock>,
    config: SealConfig,
    disks: Vec<DiskGeometry>,
    below: ViewBelow,
    writing: Mutex<WriteSide>,
    room: Condvar,
    reading: RwLock<ReadSide>,
    sealer: Mutex<Sealer>,
    fenced: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BranchCore {
    pub(crate) fn recover(parts: CoreParts) -> Result<BranchCore, BranchError> {
        let chain = parts.writer.chain();
        let now = parts.clock.monotonic();
        let wall = PointTime(parts.clock.wall().0);
        let mut planner = CutPlanner::default();
        let mut cuts = Vec::new();
        let mut last_point = parts.last_point;
        // Of a request whose end was not journaled nobody was told that it was done.
        let complete = parts.tail.iter().rposition(|change| !change.continues).map_or(0, |index| index + 1);
        let tail: VecDeque<Change> = parts.tail.into_iter().take(complete).collect();
        for change in &tail {
            cuts.extend(planner.change(change));
            last_point = last_point.max(PointTime(change.time.0));
        }
        let end = planner.close(CutKind::GenerationEnd).or(parts.uncut.map(|sequence| Cut {
            sequence,
            time: last_point,
            kind: CutKind::GenerationEnd,
        }));
        if let Some(end) = end
            && cuts.last().is_none_or(|last: &Cut| last.sequence < end.sequence)
        {
            cuts.push(end);
        }
        let mut overlays: BTreeMap<DiskId, Overlay> = BTreeMap::new();
        let mut touched: BTreeMap<DiskId, Touched> = BTreeMap::new();
        for disk in &parts.disks {
            let written_before = !parts.older_layers.is_empty() || !parts.writer.state().layers.is_empty();
            touched.insert(disk.disk, if written_before { Touched::everything() } else { Touched::default() });
            overlays.insert(disk.disk, Overlay::default());
        }
        for change in &tail {
            note(&mut overlays, &mut touched, change);
        }
        let layers = [parts.older_layers.clone(), parts.writer.state().layers.clone()].concat();
        let view = Arc::new(ChainView::new(Arc::clone(&parts.source), layers, Some(parts.below.clone())));
        let pending_bytes = tail.iter().map(weight).sum();
        let writing = WriteSide {
            journal: parts.journal,
            sequence: parts.writer.generation().base(),
            clock: PointClock::new(SourceTime(now.0), wall, last_point),
            planner: CutPlanner::default(),
            pending: tail,
            pending_bytes,
            cuts,
            last_cut: parts.writer.generation().base(),
            closed: None,
        };
        let sealer = Sealer::new(parts.writer, parts.older_layers, now);
        Ok(BranchCore {
            chain,
            source: parts.source,
            session: parts.session,
            clock: parts.clock,
            config: parts.config,
            disks: parts.disks,
            below: parts.below,
            writing: Mutex::new(writing),
            room: Condvar::new(),
            reading: RwLock::new(ReadSide { overlays, touched, view }),
            sealer: Mutex::new(sealer),
            fenced: AtomicBool::new(false),
        })
    }

    /// The branch's chain, which is also its id.
    pub fn chain(&self) -> ChainId {
        self.chain
    }

    /// Its disks.
    pub fn disks(&self) -> &[DiskGeometry] {
        &self.disks
    }

    /// The vault's leaf key.
    pub fn leaf_key(&self) -> &replication::LeafKey {
        &self.source.keys().shared().leaf
    }

    /// Figures now.
    pub fn figures(&self) -> BranchFigures {
        let writing = lock(&self.writing);
        let committed = writing.pending.front().map_or(writing.sequence, |first| SequenceNumber(first.sequence.0 - 1));
        BranchFigures {
            written: writing.pending.back().map_or(writing.sequence, |last| last.sequence.max(writing.sequence)),
            committed,
            unsealed_bytes: writing.pending_bytes,
            journal_bytes: writing.journal.used_bytes(),
            fenced: self.fenced.load(Ordering::Relaxed),
        }
    }

    fn geometry(&self, disk: DiskId) -> Result<&DiskGeometry, BranchError> {
        self.disks.iter().find(|geometry| geometry.disk == disk).ok_or(BranchError::NoDisk(disk))
    }

    fn check(&self, disk: DiskId, start: u64, len: u64) -> Result<Option<ByteRange>, BranchError> {
        let size = self.geometry(disk)?.size_bytes;
        match start.checked_add(len) {
            Some(end) if end <= size => Ok(ByteRange::between(start, end)),
            _ => Err(BranchError::OutOfRange(disk)),
        }
    }

    /// Writes `data` at byte `offset` of `disk`. Durable after the next [`BranchCore::flush`].
    ///
    /// # Errors
    /// [`BranchError::NoRoom`] if too much waits to be sealed: nothing changed.
    pub fn write(&self, disk: DiskId, offset: u64, data: &[u8]) -> Result<(), BranchError> {
        if self.check(disk, offset, data.len() as u64)?.is_none() {
            return Ok(());
        }
        // One copy, shared by the journal's record, the overlay and the seal.
        let bytes = Bytes::copy_from_slice(data);
        let piece = |from: usize| {
            let to = (from + CHANGE_DATA_BYTES_MAX).min(bytes.len());
            let range = ByteRange::new(offset + from as u64, (to - from) as u64);
            ChangeKind::Write { range, data: bytes.slice(from..to) }
        };
        self.change(disk, (0..bytes.len()).step_by(CHANGE_DATA_BYTES_MAX).map(piece).collect())
    }

    /// Makes `range` of `disk` read as zeroes.
    ///
    /// # Errors
    /// As [`BranchCore::write`].
    pub fn write_zeroes(&self, disk: DiskId, range: Range<u64>) -> Result<(), BranchError> {
        self.change_range(disk, range, |range| ChangeKind::Zero { range })
    }

    /// Gives `range` of `disk` back; it reads as zeroes.
    ///
    /// # Errors
    /// As [`BranchCore::write`].
    pub fn discard(&self, disk: DiskId, range: Range<u64>) -> Result<(), BranchError> {
        self.change_range(disk, range, |range| ChangeKind::Discard { range })
    }

    fn change_range(
        &self,
        disk: DiskId,
        range: Range<u64>,
        kind: impl Fn(ByteRange) -> ChangeKind,
    ) -> Result<(), BranchError> {
        let len = range.end.checked_sub(range.start).ok_or(BranchError::OutOfRange(disk))?;
        let Some(range) = self.check(disk, range.start, len)? else { return Ok(()) };
        self.change(disk, range.split_at_multiples(CHANGE_RANGE_BYTES_MAX).map(kind).collect())
    }

    /// Puts a marker into the branch's chain, after everything written so far; its position is a cut.
    ///
    /// # Errors
    /// As [`BranchCore::write`].
    pub fn mark(&self, kind: MarkerKind, name: &str) -> Result<(), BranchError> {
        self.change(DiskId(0), vec![ChangeKind::Marker { kind, name: name.to_owned() }])
    }

    fn change(&self, disk: DiskId, kinds: Vec<ChangeKind>) -> Result<(), BranchError> {
        let mut writing = lock(&self.writing);
        if let Some(reason) = &writing.closed {
            return Err(BranchError::Ended { branch: self.chain, reason: reason.clone() });
        }
        if self.fenced.load(Ordering::Relaxed) {
            return Err(BranchError::TakenOver { branch: self.chain });
        }
        if writing.pending_bytes >= self.config.unsealed_bytes_max {
            return Err(BranchError::NoRoom);
        }
        let time = writing.clock.stamp(SourceTime(self.clock.monotonic().0));
        let count = kinds.len();
        let mut sequence = writing.sequence;
        let changes: Vec<Change> = kinds
            .into_iter()
            .enumerate()
            .map(|(index, kind)| {
                sequence = sequence.next();
                Change { sequence, time: SourceTime(time.0), disk, continues: index + 1 < count, kind }
            })
            .collect();
        for record in records(self.chain, &changes) {
            match writing.journal.append(&record) {
                Ok(_) => {}
                Err(JournalError::Full { .. }) => {
                    // What part of it was appended is a request without an end, which recovery drops; its numbers
                    // are burnt.
                    writing.sequence = sequence;
                    return Err(BranchError::NoRoom);
                }
                Err(error) => return Err(self.append_failed(&mut writing, sequence, error)),
            }
        }
        // Whoever uses the branch may outlive this process, and takes an answered write for done.
        if let Err(error) = writing.journal.write_through() {
            return Err(self.append_failed(&mut writing, sequence, error));
        }
        writing.sequence = sequence;
        let mut reading = self.reading.write().unwrap_or_else(PoisonError::into_inner);
        let ReadSide { overlays, touched, .. } = &mut *reading;
        for change in &changes {
            note(overlays, touched, change);
        }
        drop(reading);
        for change in changes {
            let cuts = writing.planner.change(&change);
            writing.add_cuts(cuts);
            writing.pending_bytes += weight(&change);
            writing.pending.push_back(change);
        }
        Ok(())
    }

    /// Nobody knows what of the request reached the journal: its numbers are burnt, and a new file is begun.
    fn append_failed(&self, writing: &mut WriteSide, sequence: SequenceNumber, error: JournalError) -> BranchError {
        writing.sequence = sequence;
        let _ = self.renew_journal(writing, &error);
        error.into()
    }

    /// Waits up to `limit` until a write may fit.
    pub(crate) fn wait_for_room(&self, limit: Duration) {
        let writing = lock(&self.writing);
        let full = |writing: &mut WriteSide| {
            writing.pending_bytes >= self.config.unsealed_bytes_max && writing.closed.is_none()
        };
        drop(self.room.wait_timeout_while(writing, limit, full).unwrap_or_else(PoisonError::into_inner));
    }

    /// Returns once everything that was written before the call is durable on this host.
    ///
    /// # Errors
    /// [`BranchError::Journal`]: what was written since the last flush may be lost in a crash.
    pub fn flush(&self) -> Result<(), BranchError> {
        let mut writing = lock(&self.writing);
        match writing.journal.sync() {
            Ok(_) => Ok(()),
            // Everything that was answered and is not in the vault is appended again; then the promise holds.
            Err(error) => Ok(self.renew_journal(&mut writing, &error)?),
        }
    }

    /// After a failed write or sync nothing of the file since its last sync can be trusted: begin a new one, append
    /// again what the vault does not have, and sync.
    fn renew_journal(&self, writing: &mut WriteSide, error: &JournalError) -> Result<(), JournalError> {
        tracing::warn!(branch = %self.chain, %error, "a journal file of the branch failed; a new one is begun");
        writing.journal.restart()?;
        let last = writing.journal.chains().get(&self.chain).map_or(SequenceNumber(0), |state| state.last);
        let lost: Vec<Change> = writing.pending.iter().filter(|change| change.sequence > last).cloned().collect();
        for record in records(self.chain, &lost) {
            writing.journal.append(&record)?;
        }
        writing.journal.sync().map(drop)
    }

    /// No write is taken any more; reads go on.
    pub fn close(&self, reason: &str) {
        lock(&self.writing).closed.get_or_insert(reason.to_owned());
        self.room.notify_all();
    }

    /// Takes back a [`BranchCore::close`] that came to nothing.
    pub(crate) fn open_again(&self) {
        lock(&self.writing).closed = None;
    }
}

fn weight(change: &Change) -> u64 {
    change.kind.data_len() as u64 + limits::CHANGE_OVERHEAD_BYTES
}

fn note(overlays: &mut BTreeMap<DiskId, Overlay>, touched: &mut BTreeMap<DiskId, Touched>, change: &Change) {
    if let (Some(range), Some(overlay)) = (change.kind.range(), overlays.get_mut(&change.disk)) {
        overlay.apply(change.sequence, &change.kind);
        touched.entry(change.disk).or_default().mark(range);
    }
}

/// Changes as records that the journal takes.
fn records(chain: ChainId, changes: &[Change]) -> Vec<Record> {
    let mut records = Vec::new();
    let mut current: Vec<Change> = Vec::new();
    let mut bytes = 0;
    for change in changes {
        let len = change.kind.data_len();
        if !current.is_empty() && (bytes + len > limits::RECORD_DATA_BYTES_MAX || current.len() >= 1024) {
            records.push(Record::Changes { chain, changes: std::mem::take(&mut current) });
            bytes = 0;
        }
        bytes += len;
        current.push(change.clone());
    }
    if !current.is_empty() {
        records.push(Record::Changes { chain, changes: current });
    }
    records
}
