//! Finding what shows: collects entries of a stack of layers and paints them newest first.

use std::sync::Arc;

use replication::geometry::ByteRange;
use replication::{DiskId, LeafHash, SequenceNumber};

use crate::error::VaultError;
use crate::layer::LayerRef;
use crate::table::{Content, Entry, Place};
use crate::table_read::Table;
use crate::view_paint::{Bare, LeafPaint, Shown, Stretch};
use crate::view_source::FrameSource;

/// What was painted so far.
#[derive(Debug, Default)]
pub(crate) struct Painting {
    stretches: Vec<Stretch>,
    leaves: Option<LeafPaint>,
}

impl Painting {
    /// A painting that tells leaf hashes instead of places.
    pub(crate) fn with_leaves(leaves: LeafPaint) -> Painting {
        Painting { stretches: Vec::new(), leaves: Some(leaves) }
    }

    /// The stretches, in order.
    pub(crate) fn into_stretches(mut self) -> Vec<Stretch> {
        self.stretches.sort_unstable_by_key(|stretch| stretch.range.start);
        self.stretches
    }

    /// The leaf hashes.
    pub(crate) fn into_leaves(self) -> LeafPaint {
        self.leaves.expect("the painting was made with leaves")
    }

    /// `part` reads as zeroes because of `shown`.
    pub(crate) fn zeroes(&mut self, part: ByteRange, shown: Shown) {
        match &mut self.leaves {
            Some(leaves) => leaves.zero(part),
            None => self.stretches.push(Stretch { range: part, shown }),
        }
    }
}

/// An entry that may show.
struct Candidate {
    entry: Entry,
    /// Index of its table among those visited.
    table: u32,
    /// Where its leaf hashes begin among those collected.
    hashes: u32,
}

/// Paints what `layers`, largest last sequence first, say about the bare bytes of `disk` at `cut`.
pub(crate) fn paint(
    source: &FrameSource,
    layers: &[LayerRef],
    cut: SequenceNumber,
    disk: DiskId,
    bare: &mut Bare,
    painting: &mut Painting,
) -> Result<(), VaultError> {
    let mut painter = Painter { source, tables: Vec::new(), waiting: Vec::new(), hashes: Vec::new() };
    for layer in layers.iter().filter(|layer| layer.first <= cut) {
        let Some(window) = bare.span() else { return Ok(()) };
        if !layer.may_cover(disk, window) {
            continue;
        }
        // Nothing in this layer or a later one is newer than `layer.last`: what is can be painted, and perhaps
        // nothing is left to look for.
        painter.settle(layer.last.min(cut), bare, painting)?;
        let Some(window) = bare.span() else { return Ok(()) };
        painter.collect(layer, cut, disk, window, painting.leaves.is_some())?;
    }
    painter.settle_all(bare, painting)
}

struct Painter<'a> {
    source: &'a FrameSource,
    tables: Vec<Arc<Table>>,
    waiting: Vec<Candidate>,
    hashes: Vec<LeafHash>,
}

impl Painter<'_> {
    fn collect(
        &mut self,
        layer: &LayerRef,
        cut: SequenceNumber,
        disk: DiskId,
        window: ByteRange,
        with_hashes: bool,
    ) -> Result<(), VaultError> {
        let table = self.source.table(layer)?;
        let index = self.tables.len() as u32;
        let (waiting, collected) = (&mut self.waiting, &mut self.hashes);
        table.visit(self.source, disk, window, &mut |entry, hashes| {
            if entry.sequence <= cut {
                waiting.push(Candidate { entry: *entry, table: index, hashes: collected.len() as u32 });
                if with_hashes {
                    collected.extend_from_slice(hashes);
                }
            }
        })?;
        self.tables.push(table);
        Ok(())
    }

    /// Paints the entries above `floor`.
    fn settle(&mut self, floor: SequenceNumber, bare: &mut Bare, painting: &mut Painting) -> Result<(), VaultError> {
        if self.waiting.iter().all(|candidate| candidate.entry.sequence <= floor) {
            return Ok(());
        }
        let (mut now, later) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<Vec<_>, _>(|candidate| candidate.entry.sequence > floor);
        self.waiting = later;
        now.sort_by_key(|candidate| std::cmp::Reverse(candidate.entry.sequence));
        now.iter().try_for_each(|candidate| self.paint_one(candidate, bare, painting))
    }

    fn settle_all(mut self, bare: &mut Bare, painting: &mut Painting) -> Result<(), VaultError> {
        let mut rest = std::mem::take(&mut self.waiting);
        rest.sort_by_key(|candidate| std::cmp::Reverse(candidate.entry.sequence));
        rest.iter().try_for_each(|candidate| self.paint_one(candidate, bare, painting))
    }

    fn paint_one(&self, candidate: &Candidate, bare: &mut Bare, painting: &mut Painting) -> Result<(), VaultError> {
        let entry = &candidate.entry;
        match entry.content {
            Content::Data(place) => {
                let Some(leaves) = &mut painting.leaves else {
                    return self.paint_place(candidate, place, bare, painting);
                };
                let from = candidate.hashes as usize;
                let hashes = &self.hashes[from..from + entry.leaf_count()];
                bare.cover(entry.range, |part| leaves.data(part, entry.range, hashes));
            }
            Content::Zero => bare.cover(entry.range, |part| painting.zeroes(part, Shown::Zero)),
            Content::Discarded => bare.cover(entry.range, |part| painting.zeroes(part, Shown::Discarded)),
            Content::Unreadable => bare.cover(entry.range, |range| {
                if painting.leaves.is_none() {
                    painting.stretches.push(Stretch { range, shown: Shown::Unreadable });
                }
            }),
        }
        Ok(())
    }

    fn paint_place(
        &self,
        candidate: &Candidate,
        place: Place,
        bare: &mut Bare,
        painting: &mut Painting,
    ) -> Result<(), VaultError> {
        let range = candidate.entry.range;
        // Most candidates of a busy granule are hidden, and sources may have to be fetched.
        let from = painting.stretches.len();
        let placeholder = Shown::Hole;
        bare.cover(range, |part| painting.stretches.push(Stretch { range: part, shown: placeholder }));
        if painting.stretches.len() == from {
            return Ok(());
        }
        let object = self.tables[candidate.table as usize].source(place.source, self.source)?;
        for stretch in &mut painting.stretches[from..] {
            let at = place.at + (stretch.range.start - range.start) as u32;
            stretch.shown = Shown::Data { object, frame: place.frame, at };
        }
        Ok(())
    }
}
