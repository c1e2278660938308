//! The way of a branch's changes into the vault: a batch of whole requests becomes a segment, a manifest commits it, and
//! the overlay drops what can now be read from there.
//!
//! At most one manifest is under way. It is put again, byte by byte, until the store answers; a crash before that leaves
//! objects that nothing names and the changes in the journal.

use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use process_server::journal::{ManifestNumber, Record};
use replication::{Change, Cut, CutKind, PointTime, SequenceNumber, SourceTime};
use vault::layer::{Host, LayerRef};
use vault::merge::{merge_layers, plan_merges};
use vault::segment::{SealOptions, seal_segment};
use vault::view::ChainView;
use vault::{
    ChainWriter, CheckpointWish, Compression, Delta, ObjectBuilder, ObjectKind, Placement, PreparedManifest, VaultError,
};

use super::{BranchCore, lock, weight};
use crate::error::BranchError;
use crate::limits;

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

/// A manifest under way.
struct InFlight {
    prepared: PreparedManifest,
    through: SequenceNumber,
}

/// What only the sealing thread touches.
pub(super) struct Sealer {
    writer: ChainWriter,
    older_layers: Vec<LayerRef>,
    in_flight: Option<InFlight>,
    last: world::Monotonic,
}

impl Sealer {
    pub(super) fn new(writer: ChainWriter, older_layers: Vec<LayerRef>, now: world::Monotonic) -> Sealer {
        Sealer { writer, older_layers, in_flight: None, last: now }
    }
}

struct Batch {
    changes: Vec<Change>,
    cuts: Vec<Cut>,
    through: SequenceNumber,
    proven: PointTime,
}

impl BranchCore {
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
