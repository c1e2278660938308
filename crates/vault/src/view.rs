//! What a chain's disks hold at any cut, read through its layers.
//!
//! The value of a byte at cut `c` is that of the entry with the largest sequence not above `c` that covers it, over
//! all layers; where no entry does, the parent chain's at the position where this chain branched off; below the
//! oldest chain, zero.
//!
//! Everything read is authenticated; damage is an error that names the object and the bytes of the disk it affects.
//! Views are immutable and shared by any number of threads.

use std::sync::Arc;

use bytes::Bytes;
use replication::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use replication::{DiskId, LeafHash, SequenceNumber};
use std::num::NonZeroUsize;
use world::{Extent, ExtentKind};

use crate::error::VaultError;
use crate::layer::LayerRef;
use crate::parallel;
use crate::view_cache::Cache;
use crate::view_paint::{Bare, LeafPaint, Shown, Stretch};
use crate::view_resolve::{Painting, paint};
use crate::view_source::FrameSource;

/// Granules resolved at once where a reader goes through a range: few enough that one that stops early wastes little.
const WINDOW_GRANULES: u64 = 64;

/// Why bytes of a view cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The vault cannot give them: damaged, locked, or the store failed. The source says which.
    #[error("{range} of {disk} cannot be read from the vault")]
    Vault {
        /// The disk.
        disk: DiskId,
        /// The bytes it affects.
        range: ByteRange,
        /// What is wrong.
        #[source]
        source: VaultError,
    },
    /// The source disk itself could not return them when they were replicated: a recorded defect.
    #[error("{range} of {disk} could not be read at the source")]
    Unreadable {
        /// The disk.
        disk: DiskId,
        /// The bytes lost.
        range: ByteRange,
    },
}

/// A chain as far as some set of layers tells it.
#[derive(Debug)]
pub struct ChainView {
    source: Arc<FrameSource>,
    /// Largest `last` sequence first.
    layers: Vec<LayerRef>,
    parent: Option<ViewBelow>,
    resolved: Cache<(u64, DiskId, u64), Arc<[Stretch]>>,
}

/// What shows where a view itself holds nothing.
#[derive(Debug, Clone)]
pub struct ViewBelow {
    /// The parent chain.
    pub view: Arc<ChainView>,
    /// The position at which the child branched off.
    pub at: SequenceNumber,
}

impl ChainView {
    /// A view of `layers`, in any order, each resolved to an object. `parent` must read through the same `source`.
    pub fn new(source: Arc<FrameSource>, mut layers: Vec<LayerRef>, parent: Option<ViewBelow>) -> ChainView {
        assert!(layers.iter().all(|layer| layer.object().is_some()), "layers are resolved before they are read");
        // Frames are cached under ids that only their source understands.
        let one_source = parent.as_ref().is_none_or(|below| Arc::ptr_eq(&below.view.source, &source));
        assert!(one_source, "a view and its parent read through the same source");
        layers.sort_by_key(|layer| std::cmp::Reverse(layer.last));
        let resolved = Cache::new(source.cache_bytes.resolved);
        ChainView { source, layers, parent, resolved }
    }

    /// The layers, newest first.
    pub fn layers(&self) -> &[LayerRef] {
        &self.layers
    }

    /// Where its frames come from.
    pub fn source(&self) -> &Arc<FrameSource> {
        &self.source
    }

    /// The parent chain, if there is one.
    pub fn below(&self) -> Option<&ViewBelow> {
        self.parent.as_ref()
    }

    /// Fills `buffer` with what `disk` holds from byte `offset` on at `cut`.
    ///
    /// # Errors
    /// The first range that cannot be read; `buffer` then holds no promise.
    pub fn read(&self, cut: SequenceNumber, disk: DiskId, offset: u64, buffer: &mut [u8]) -> Result<(), ReadError> {
        let Some(range) = ByteRange::between(offset, offset + buffer.len() as u64) else { return Ok(()) };
        for part in range.split_at_multiples(GRANULE_BYTES) {
            let ahead = ByteRange::new(part.start, range.end() - part.start);
            let stretches = self.granule(cut, disk, part.start / GRANULE_BYTES, ahead)?;
            let first = stretches.partition_point(|stretch| stretch.range.end() <= part.start);
            for stretch in &stretches[first..] {
                let Some(wanted) = stretch.range.intersection(part) else { break };
                self.copy(disk, stretch, wanted, &mut buffer[wanted.within(offset)])?;
            }
        }
        Ok(())
    }

    /// Fetches and decodes what a read of `range` will need, on up to `workers` threads. Worth it before reading
    /// sequentially; a range should be well below the cache's size.
    ///
    /// # Errors
    /// Only those of indexes: a data frame that cannot be read is reported by the read itself.
    pub fn prefetch(
        &self,
        cut: SequenceNumber,
        disk: DiskId,
        range: ByteRange,
        workers: NonZeroUsize,
    ) -> Result<(), ReadError> {
        let mut frames = Vec::new();
        for part in range.split_at_multiples(GRANULE_BYTES) {
            let ahead = ByteRange::new(part.start, range.end() - part.start);
            for stretch in self.granule(cut, disk, part.start / GRANULE_BYTES, ahead)?.iter() {
                if let Shown::Data { object, frame, .. } = stretch.shown
                    && stretch.range.overlaps(range)
                {
                    frames.push((object, frame));
                }
            }
        }
        frames.sort_unstable();
        frames.dedup();
        frames.retain(|(object, frame)| !self.source.has_data(*object, *frame));
        parallel::map(workers, &frames, |(object, frame)| self.source.data(*object, *frame).is_ok());
        Ok(())
    }

    /// The keyed hash of each leaf of `range`, whose ends are multiples of the leaf size; `None` where indexes do not
    /// tell (partly written leaves, unreadable ones). Needs no read key.
    ///
    /// # Errors
    /// If an index cannot be read.
    pub fn leaf_hashes(
        &self,
        cut: SequenceNumber,
        disk: DiskId,
        range: ByteRange,
    ) -> Result<Vec<Option<LeafHash>>, ReadError> {
        assert_eq!(range, range.widen_to(LEAF_BYTES), "ranges of hashes are made of whole leaves");
        let key = &self.source.keys().shared().leaf;
        let mut hashes = Vec::with_capacity((range.len / LEAF_BYTES) as usize);
        for window in range.split_at_multiples(WINDOW_GRANULES * GRANULE_BYTES) {
            let mut painting = Painting::with_leaves(LeafPaint::new(window));
            self.paint(cut, disk, window, &mut painting)?;
            hashes.extend(painting.into_leaves().finish(key));
        }
        Ok(hashes)
    }

    /// The parts of `range`, whose ends are multiples of the leaf size, that were discarded and not written since: they read
    /// as zeroes here, and as anything on the disk.
    ///
    /// # Errors
    /// If an index cannot be read.
    pub fn discarded(&self, cut: SequenceNumber, disk: DiskId, range: ByteRange) -> Result<Vec<ByteRange>, ReadError> {
        let mut found = Vec::new();
        for window in range.split_at_multiples(WINDOW_GRANULES * GRANULE_BYTES) {
            let mut painting = Painting::default();
            self.paint(cut, disk, window, &mut painting)?;
            let stretches = painting.into_stretches().into_iter();
            found.extend(stretches.filter(|stretch| stretch.shown == Shown::Discarded).map(|stretch| stretch.range));
        }
        Ok(found)
    }

    /// What `range` holds, in order and without gaps, neighbours of one kind joined. Stops after `extents_max`
    /// extents, so the answer may end before `range` does. Effort goes with the entries in `range`, not its length.
    ///
    /// # Errors
    /// If an index cannot be read.
    pub fn extents(
        &self,
        cut: SequenceNumber,
        disk: DiskId,
        range: ByteRange,
        extents_max: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut position = range.start;
        while let Some(rest) = ByteRange::between(position, range.end()) {
            let window = self.next_window(cut, disk, rest)?;
            let mut painting = Painting::default();
            self.paint(cut, disk, window, &mut painting)?;
            for stretch in painting.into_stretches() {
                let kind = match stretch.shown {
                    Shown::Data { .. } | Shown::Unreadable => ExtentKind::Data,
                    Shown::Zero => ExtentKind::Zero,
                    Shown::Discarded | Shown::Hole => ExtentKind::Hole,
                };
                let full = extents.len() == extents_max;
                match extents.last_mut() {
                    Some(last) if last.kind == kind => last.range.end = stretch.range.end(),
                    _ if full => return Ok(extents),
                    _ => extents.push(Extent { range: stretch.range.start..stretch.range.end(), kind }),
                }
            }
            position = window.end();
        }
        Ok(extents)
    }

    /// The beginning of `rest` that is best looked at in one go: a bounded number of granules where there are narrow
    /// entries, everything up to the next one where there are none.
    fn next_window(&self, cut: SequenceNumber, disk: DiskId, rest: ByteRange) -> Result<ByteRange, ReadError> {
        let granule_start = rest.start / GRANULE_BYTES * GRANULE_BYTES;
        let next = self.next_narrow_start(cut, disk, granule_start).map_err(context(disk, rest))?;
        let end = match next {
            Some(next) if next / GRANULE_BYTES * GRANULE_BYTES > granule_start => next / GRANULE_BYTES * GRANULE_BYTES,
            Some(_) => granule_start + WINDOW_GRANULES * GRANULE_BYTES,
            None => rest.end(),
        };
        Ok(ByteRange::between(rest.start, end.min(rest.end())).expect("a window holds at least one granule's rest"))
    }

    fn next_narrow_start(&self, cut: SequenceNumber, disk: DiskId, from: u64) -> Result<Option<u64>, VaultError> {
        let mut next: Option<u64> = None;
        let after = ByteRange::new(from, u64::MAX - from);
        for layer in self.layers.iter().filter(|layer| layer.first <= cut && layer.may_cover(disk, after)) {
            let found = self.source.table(layer)?.next_narrow_start(&self.source, disk, from)?;
            next = next.into_iter().chain(found).min();
        }
        if let Some(below) = &self.parent {
            next = next.into_iter().chain(below.view.next_narrow_start(below.at, disk, from)?).min();
        }
        Ok(next)
    }

    /// What one granule shows. A miss resolves the granules of `ahead` with it, up to a window.
    fn granule(
        &self,
        cut: SequenceNumber,
        disk: DiskId,
        granule: u64,
        ahead: ByteRange,
    ) -> Result<Arc<[Stretch]>, ReadError> {
        if let Some(stretches) = self.resolved.get(&(cut.0, disk, granule)) {
            return Ok(stretches);
        }
        let window = ahead.widen_to(GRANULE_BYTES);
        let window = ByteRange::new(window.start, window.len.min(WINDOW_GRANULES * GRANULE_BYTES));
        let mut painting = Painting::default();
        self.paint(cut, disk, window, &mut painting)?;
        let mut result = None;
        let mut stretches = painting.into_stretches().into_iter().flat_map(split_at_granules).peekable();
        for part in window.split_at_multiples(GRANULE_BYTES) {
            let mut of_granule = Vec::new();
            while let Some(stretch) = stretches.next_if(|stretch| stretch.range.start < part.end()) {
                of_granule.push(stretch);
            }
            let of_granule: Arc<[Stretch]> = of_granule.into();
            let weight = size_of_val(&of_granule[..]);
            result.get_or_insert_with(|| Arc::clone(&of_granule));
            self.resolved.insert((cut.0, disk, part.start / GRANULE_BYTES), of_granule, weight);
        }
        Ok(result.expect("a window holds at least one granule"))
    }

    fn paint(
        &self,
        cut: SequenceNumber,
        disk: DiskId,
        window: ByteRange,
        painting: &mut Painting,
    ) -> Result<(), ReadError> {
        let mut bare = Bare::all(window);
        let (mut view, mut cut) = (self, cut);
        loop {
            paint(&view.source, &view.layers, cut, disk, &mut bare, painting).map_err(context(disk, window))?;
            match &view.parent {
                Some(below) if !bare.is_empty() => (view, cut) = (&below.view, below.at),
                _ => break,
            }
        }
        bare.parts().iter().for_each(|part| painting.zeroes(*part, Shown::Hole));
        Ok(())
    }

    fn copy(&self, disk: DiskId, stretch: &Stretch, wanted: ByteRange, out: &mut [u8]) -> Result<(), ReadError> {
        match stretch.shown {
            Shown::Zero | Shown::Discarded | Shown::Hole => out.fill(0),
            Shown::Unreadable => return Err(ReadError::Unreadable { disk, range: wanted }),
            Shown::Data { object, frame, at } => {
                let fail = context(disk, wanted);
                let bytes: Bytes = self.source.data(object, frame).map_err(&fail)?;
                let from = at as usize + (wanted.start - stretch.range.start) as usize;
                match bytes.get(from..from + out.len()) {
                    Some(found) => out.copy_from_slice(found),
                    None => return Err(fail(self.source.damaged(object, "a frame is shorter than its index says"))),
                }
            }
        }
        Ok(())
    }
}

fn context(disk: DiskId, range: ByteRange) -> impl Fn(VaultError) -> ReadError {
    move |source| ReadError::Vault { disk, range, source }
}

fn split_at_granules(stretch: Stretch) -> impl Iterator<Item = Stretch> {
    stretch.range.split_at_multiples(GRANULE_BYTES).map(move |range| {
        let shown = match stretch.shown {
            Shown::Data { object, frame, at } => {
                Shown::Data { object, frame, at: at + (range.start - stretch.range.start) as u32 }
            }
            other => other,
        };
        Stretch { range, shown }
    })
}
