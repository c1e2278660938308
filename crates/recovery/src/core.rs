//! A branch without threads: takes writes, answers reads, and seals what it took as the branch's own chain.
//!
//! ```text
//! write ─► number, stamp ─► journal ─► overlay ─┐          read ◄─ overlay ◄─ own layers ◄─ parent at the cut
//!                                               └─ seal_step ─► segment ─► manifest ─► overlay pieces dropped
//! ```
//!
//! Invariants: a change is in the journal before it is in the overlay, and in the overlay or the vault ever after; a
//! flush returns only when every change that was answered before is synced; a prepared manifest is put again, byte by
//! byte, until the store answers; nothing is written under a generation that lost its name.
//!
//! A crash leaves the journal. [`BranchCore::recover`] opens the next generation, commits the tail of the old one with its
//! old numbers, and goes on.

use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use process_server::journal::{Journal, JournalError, ManifestNumber, Record};
use replication::cut::{CutPlanner, PointClock};
use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::limits::{CHANGE_DATA_BYTES_MAX, CHANGE_RANGE_BYTES_MAX};
use replication::wire::OfferedLeaf;
use replication::{
    ChainId, Change, ChangeKind, Cut, CutKind, DiskGeometry, DiskId, LeafHash, MarkerKind, PlainLeafHash, PointTime,
    SequenceNumber, SourceTime,
};
use vault::layer::{Host, LayerRef};
use vault::merge::{merge_layers, plan_merges};
use vault::segment::{SealOptions, seal_segment};
use vault::view::{ChainView, ViewBelow};
use vault::view_source::FrameSource;
use vault::{
    ChainWriter, CheckpointWish, Compression, Delta, ObjectBuilder, ObjectKind, Placement, PreparedManifest,
    VaultError, WriterSession,
};
use world::{Clock, Extent, ExtentKind};

use crate::error::BranchError;
use crate::limits;
use crate::overlay::{Content, Overlay, Touched};

/// How a branch keeps and seals its writes.
#[derive(Debug, Clone, Copy)]
pub struct SealConfig {
    /// Longest time that a write waits to be sealed.
    pub seal_every: Duration,
    /// Bytes of changes after which they are sealed at once.
    pub seal_bytes: u64,
    /// Most bytes of changes that are not in the vault; writes wait beyond.
    pub unsealed_bytes_max: u64,
    /// Threads that compress and encrypt.
    pub workers: NonZeroUsize,
}

impl Default for SealConfig {
    fn default() -> SealConfig {
        SealConfig {
            seal_every: Duration::from_secs(5),
            seal_bytes: 16 << 20,
            unsealed_bytes_max: 256 << 20,
            workers: NonZeroUsize::new(2).expect("two"),
        }
    }
}

/// What a seal step is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealWish {
    /// Seal if it is time.
    WhenDue,
    /// Seal whatever there is.
    Now,
    /// Seal whatever there is, end the second with a cut, and leave a checkpoint: nobody will write for a while.
    Final,
}

/// What a seal step did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealed {
    /// Nothing to do now.
    Nothing,
    /// A manifest was committed; there may be more to seal.
    Committed(SequenceNumber),
}

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

/// A manifest under way.
struct InFlight {
    prepared: PreparedManifest,
    through: SequenceNumber,
}

struct Sealer {
    writer: ChainWriter,
    older_layers: Vec<LayerRef>,
    in_flight: Option<InFlight>,
    last: world::Monotonic,
}

struct Batch {
    changes: Vec<Change>,
    cuts: Vec<Cut>,
    through: SequenceNumber,
    proven: PointTime,
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

/// Everything committed so far: views of a branch are always read at their end.
const HEAD: SequenceNumber = SequenceNumber(u64::MAX);

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
        let sealer = Sealer { writer: parts.writer, older_layers: parts.older_layers, in_flight: None, last: now };
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
                Err(error) => {
                    writing.sequence = sequence;
                    let _ = self.renew_journal(&mut writing, &error);
                    return Err(error.into());
                }
            }
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

    /// Fills `buffer` with what `disk` holds from byte `offset` on.
    ///
    /// # Errors
    /// [`BranchError::Read`] names what cannot be read.
    pub fn read(&self, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), BranchError> {
        let Some(range) = self.check(disk, offset, buffer.len() as u64)? else { return Ok(()) };
        let (missing, views) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let overlay = &reading.overlays[&disk];
            let missing = if overlay.is_empty() { vec![range] } else { overlay.read(range, buffer) };
            let touched = &reading.touched[&disk];
            let views: Vec<Option<Arc<ChainView>>> =
                missing.iter().map(|part| touched.any(*part).then(|| Arc::clone(&reading.view))).collect();
            (missing, views)
        };
        for (part, view) in missing.into_iter().zip(views) {
            let out = &mut buffer[part.within(offset)];
            match view {
                Some(view) => view.read(HEAD, disk, part.start, out)?,
                None => self.below.view.read(self.below.at, disk, part.start, out)?,
            }
        }
        Ok(())
    }

    /// Fetches what reading `range` will need.
    ///
    /// # Errors
    /// As [`BranchCore::read`], of indexes only.
    pub fn prefetch(&self, disk: DiskId, range: ByteRange) -> Result<(), BranchError> {
        let size = self.geometry(disk)?.size_bytes;
        let Some(range) = ByteRange::between(range.start, range.end().min(size)) else { return Ok(()) };
        let view = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            reading.touched[&disk].any(range).then(|| Arc::clone(&reading.view))
        };
        match view {
            Some(view) => view.prefetch(HEAD, disk, range, self.config.workers)?,
            None => self.below.view.prefetch(self.below.at, disk, range, self.config.workers)?,
        }
        Ok(())
    }

    /// What `range` of `disk` holds, in order and without gaps. After [`limits::EXTENTS_MAX`] pieces the rest counts as
    /// data.
    ///
    /// # Errors
    /// As [`BranchCore::read`], of indexes only.
    pub fn extents(&self, disk: DiskId, range: Range<u64>) -> Result<Vec<Extent>, BranchError> {
        let len = range.end.checked_sub(range.start).ok_or(BranchError::OutOfRange(disk))?;
        let Some(range) = self.check(disk, range.start, len)? else { return Ok(Vec::new()) };
        let (overlaid, view) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let kinds = reading.overlays[&disk].within(range).map(|(part, content)| {
                let kind = match content {
                    Content::Data(_) => ExtentKind::Data,
                    Content::Zero => ExtentKind::Zero,
                    Content::Discarded => ExtentKind::Hole,
                };
                (part, kind)
            });
            let overlaid: Vec<(ByteRange, ExtentKind)> = kinds.take(limits::EXTENTS_MAX).collect();
            (overlaid, Arc::clone(&reading.view))
        };
        let mut map = ExtentMap { extents: Vec::new(), at: range.start };
        for (part, kind) in overlaid {
            map.fill_from(&view, disk, part.start)?;
            map.push(part.end(), kind);
        }
        map.fill_from(&view, disk, range.end())?;
        Ok(map.extents)
    }

    /// What the index says of each leaf of `range`, which begins at a multiple of 4 KiB: keyed hashes, zeroes, and
    /// *unknown* where only reading can tell. Nothing is read from the data of the vault.
    pub fn offered(&self, disk: DiskId, range: ByteRange) -> Vec<OfferedLeaf> {
        let whole = range.widen_to(LEAF_BYTES);
        let (overlaid, view) = {
            let reading = self.reading.read().unwrap_or_else(PoisonError::into_inner);
            let Some(overlay) = reading.overlays.get(&disk) else {
                return vec![OfferedLeaf::Unknown; (whole.len / LEAF_BYTES) as usize];
            };
            let overlaid: Vec<(ByteRange, bool)> =
                overlay.within(whole).map(|(part, content)| (part, matches!(content, Content::Data(_)))).collect();
            let view = reading.touched[&disk].any(whole).then(|| Arc::clone(&reading.view));
            (overlaid, view)
        };
        let hashes = match view {
            Some(view) => view.leaf_hashes(HEAD, disk, whole),
            None => self.below.view.leaf_hashes(self.below.at, disk, whole),
        };
        let zero = self.leaf_key().zero_leaf();
        let mut leaves: Vec<OfferedLeaf> = match hashes {
            Ok(hashes) => hashes
                .into_iter()
                .map(|hash| match hash {
                    Some(hash) if hash == zero => OfferedLeaf::Zero,
                    Some(hash) => OfferedLeaf::Hash(hash.0),
                    None => OfferedLeaf::Unknown,
                })
                .collect(),
            Err(error) => {
                tracing::warn!(%disk, range = %whole, %error, "an index cannot be read; its leaves are sent unseen");
                vec![OfferedLeaf::Unknown; (whole.len / LEAF_BYTES) as usize]
            }
        };
        for (part, is_data) in overlaid {
            let first = (part.start - whole.start) / LEAF_BYTES;
            let last = (part.end() - 1 - whole.start) / LEAF_BYTES;
            for index in first..=last {
                let leaf = ByteRange::new(whole.start + index * LEAF_BYTES, LEAF_BYTES);
                let all_zero = !is_data && part.start <= leaf.start && leaf.end() <= part.end();
                leaves[index as usize] = if all_zero { OfferedLeaf::Zero } else { OfferedLeaf::Unknown };
            }
        }
        leaves
    }

    /// The keyed hash of each leaf of `range`; leaves that the index does not know are read.
    ///
    /// # Errors
    /// As [`BranchCore::read`].
    pub fn leaf_hashes(&self, disk: DiskId, range: ByteRange) -> Result<Vec<LeafHash>, BranchError> {
        let size = self.geometry(disk)?.size_bytes;
        let key = self.leaf_key();
        let zero = key.zero_leaf();
        let mut at = range.start;
        let mut buffer = [0; LEAF_BYTES as usize];
        self.offered(disk, range)
            .into_iter()
            .map(|leaf| {
                let len = LEAF_BYTES.min(size - at) as usize;
                let start = at;
                at += LEAF_BYTES;
                match leaf {
                    OfferedLeaf::Zero => Ok(zero),
                    OfferedLeaf::Hash(hash) => Ok(LeafHash(hash)),
                    OfferedLeaf::Unknown | OfferedLeaf::Unreadable => {
                        self.read(disk, start, &mut buffer[..len])?;
                        Ok(key.leaf(PlainLeafHash::of(&buffer[..len])))
                    }
                }
            })
            .collect()
    }

    /// Does one bounded piece of sealing: at most one segment and one merge.
    ///
    /// # Errors
    /// Retryable errors of the store: call again later, nothing is lost. [`BranchError::TakenOver`]: final.
    pub fn seal_step(&self, wish: SealWish) -> Result<Sealed, BranchError> {
        if self.fenced.load(Ordering::Relaxed) {
            return Err(BranchError::TakenOver { branch: self.chain });
        }
        let mut sealer = lock(&self.sealer);
        if sealer.in_flight.is_none() {
            let Some(batch) = self.take_batch(&sealer, wish) else { return Ok(Sealed::Nothing) };
            let checkpoint = if wish == SealWish::Final { CheckpointWish::Now } else { CheckpointWish::WhenDue };
            let in_flight = self.prepare(&sealer.writer, &batch, checkpoint)?;
            sealer.in_flight = Some(in_flight);
        }
        let through = self.put(&mut sealer)?;
        sealer.last = self.clock.monotonic();
        self.committed(&sealer, through)?;
        self.merge(&mut sealer)?;
        Ok(Sealed::Committed(through))
    }

    /// Seals everything written so far.
    ///
    /// # Errors
    /// As [`BranchCore::seal_step`].
    pub fn seal_all(&self, wish: SealWish) -> Result<(), BranchError> {
        while let Sealed::Committed(_) = self.seal_step(wish)? {}
        Ok(())
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

    fn take_batch(&self, sealer: &Sealer, wish: SealWish) -> Option<Batch> {
        let mut writing = lock(&self.writing);
        let now = self.clock.monotonic();
        let due = wish != SealWish::WhenDue
            || writing.pending_bytes >= self.config.seal_bytes
            || now.since(sealer.last) >= self.config.seal_every;
        if !due {
            return None;
        }
        let now = writing.clock.stamp(SourceTime(now.0));
        let ended = match wish {
            SealWish::Final if writing.sequence > writing.last_cut => writing.planner.close(CutKind::GenerationEnd),
            _ => writing.planner.proven(now),
        };
        writing.add_cuts(ended);
        let mut bytes = 0;
        let mut count = 0;
        let mut end = 0;
        for (index, change) in writing.pending.iter().enumerate() {
            bytes += weight(change);
            count += 1;
            if !change.continues {
                end = index + 1;
                if bytes >= limits::SEGMENT_BYTES_MAX || count >= limits::SEGMENT_CHANGES_MAX {
                    break;
                }
            }
        }
        let changes: Vec<Change> = writing.pending.range(..end).cloned().collect();
        let all = end == writing.pending.len();
        let through = changes.last().map_or(sealer.writer.through(), |last| last.sequence);
        let cuts: Vec<Cut> = writing.cuts.iter().filter(|cut| cut.sequence <= through).cloned().collect();
        if changes.is_empty() && cuts.is_empty() {
            return None;
        }
        let proven = if all { now } else { PointTime(changes.last().map_or(0, |last| last.time.0)) };
        Some(Batch { changes, cuts, through, proven: proven.max(sealer.writer.proven_through()) })
    }

    fn prepare(
        &self,
        writer: &ChainWriter,
        batch: &Batch,
        checkpoint: CheckpointWish,
    ) -> Result<InFlight, BranchError> {
        let barriers: Vec<SequenceNumber> = batch.cuts.iter().map(|cut| cut.sequence).collect();
        let options =
            SealOptions { leaf_key: self.leaf_key(), compression: Compression::Fast, workers: self.config.workers };
        let data_bytes: u64 = batch.changes.iter().map(|change| change.kind.data_len() as u64).sum();
        let mut builder = writer.begin();
        let layer = if data_bytes <= limits::INLINE_SEGMENT_BYTES_MAX {
            seal_segment(&batch.changes, &barriers, &mut builder.object, Host::ThisManifest, &options)?.layer
        } else {
            let name = self.session.segment_name(self.chain, writer.generation());
            let placement = Placement::on_chain(ObjectKind::Segment, self.chain, writer.generation());
            let mut object = ObjectBuilder::new(&self.session, placement, name.clone());
            let sealed = seal_segment(&batch.changes, &barriers, &mut object, Host::Object(name), &options)?;
            let root = sealed.layer.as_ref().map(|layer| layer.root);
            object.finish(root).put(self.source.store().as_ref()).map_err(VaultError::from)?;
            sealed.layer
        };
        let delta = Delta {
            through: batch.through,
            proven_through: batch.proven,
            layers: layer.into_iter().collect(),
            cuts: batch.cuts.clone(),
            ..Delta::default()
        };
        let prepared = writer.prepare(builder, delta, checkpoint)?;
        Ok(InFlight { prepared, through: batch.through })
    }

    /// Puts the manifest under way, the same bytes each time.
    fn put(&self, sealer: &mut Sealer) -> Result<SequenceNumber, BranchError> {
        let in_flight = sealer.in_flight.take().expect("something is under way");
        match sealer.writer.put(&in_flight.prepared) {
            Ok(()) => Ok(in_flight.through),
            Err(VaultError::Fenced { number }) => {
                self.fenced.store(true, Ordering::Relaxed);
                self.room.notify_all();
                tracing::error!(branch = %self.chain, number, "another writer took over the chain of the branch");
                Err(BranchError::TakenOver { branch: self.chain })
            }
            // The batch is taken again under the next number.
            Err(error @ VaultError::NumberBurnt { .. }) => Err(error.into()),
            Err(error) => {
                sealer.in_flight = Some(in_flight);
                Err(error.into())
            }
        }
    }

    /// The vault has everything through `through`: read it from there.
    fn committed(&self, sealer: &Sealer, through: SequenceNumber) -> Result<(), BranchError> {
        self.show_layers(sealer, through);
        let mut writing = lock(&self.writing);
        while writing.pending.front().is_some_and(|change| change.sequence <= through) {
            let change = writing.pending.pop_front().expect("there is a front");
            writing.pending_bytes -= weight(&change);
        }
        writing.cuts.retain(|cut| cut.sequence > through);
        self.room.notify_all();
        let number = ManifestNumber(sealer.writer.head().number);
        let record = Record::Committed { chain: self.chain, through, number };
        let noted = writing.journal.append(&record).and_then(|_| writing.journal.sync());
        match noted {
            Ok(_) => Ok(()),
            // The record only frees room; the next commit says it again.
            Err(error) => Ok(self.renew_journal(&mut writing, &error)?),
        }
    }

    fn show_layers(&self, sealer: &Sealer, through: SequenceNumber) {
        let layers = [sealer.older_layers.clone(), sealer.writer.state().layers.clone()].concat();
        let view = Arc::new(ChainView::new(Arc::clone(&self.source), layers, Some(self.below.clone())));
        let mut reading = self.reading.write().unwrap_or_else(PoisonError::into_inner);
        reading.view = view;
        for overlay in reading.overlays.values_mut() {
            overlay.drop_through(through);
        }
    }

    fn merge(&self, sealer: &mut Sealer) -> Result<(), BranchError> {
        let layers = &sealer.writer.state().layers;
        let Some(picked) = plan_merges(layers) else { return Ok(()) };
        let picked: Vec<LayerRef> = picked.into_iter().map(|index| layers[index].clone()).collect();
        let merged = merge_layers(&self.source, &picked, &self.session, self.chain, sealer.writer.generation())?;
        let delta = Delta {
            through: sealer.writer.through(),
            proven_through: sealer.writer.proven_through(),
            layers: vec![merged],
            ..Delta::default()
        };
        let builder = sealer.writer.begin();
        let prepared = sealer.writer.prepare(builder, delta, CheckpointWish::WhenDue)?;
        let through = sealer.writer.through();
        sealer.in_flight = Some(InFlight { prepared, through });
        self.put(sealer)?;
        self.show_layers(sealer, through);
        Ok(())
    }
}

/// Extents being put together from the overlay and the view below it.
struct ExtentMap {
    extents: Vec<Extent>,
    at: u64,
}

impl ExtentMap {
    fn push(&mut self, end: u64, kind: ExtentKind) {
        let full = self.extents.len() >= limits::EXTENTS_MAX;
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.range.end = end,
            Some(last) if full => {
                last.kind = ExtentKind::Data;
                last.range.end = end;
            }
            _ => self.extents.push(Extent { range: self.at..end, kind }),
        }
        self.at = end;
    }

    fn fill_from(&mut self, view: &ChainView, disk: DiskId, end: u64) -> Result<(), BranchError> {
        while let Some(rest) = ByteRange::between(self.at, end) {
            if self.extents.len() >= limits::EXTENTS_MAX {
                self.push(end, ExtentKind::Data);
                break;
            }
            let room = limits::EXTENTS_MAX - self.extents.len();
            for extent in view.extents(HEAD, disk, rest, room)? {
                self.push(extent.range.end, extent.kind);
            }
        }
        Ok(())
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
