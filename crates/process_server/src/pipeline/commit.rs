//! Commits: pending content becomes a segment, a manifest, and a won name.
//!
//! ```text
//! pending ──cut off──► content ──seal, merge──► prepared manifest ──intent durable──► put ─┬─► committed
//!    ▲                                                                ▲   store refuses ──┤
//!    └──────────── number burnt: begin again ◄─────────────────────── └─── same bytes ◄──┘
//! ```
//!
//! Order on the store: segment, merged index, manifest. A crash in between leaves objects that nobody refers to. No
//! manifest is put before the journal holds its number and nonce durably; meanwhile the pipeline goes on with other work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use replication::receiver::Event;
use replication::{Change, ChangeKind, Cut, PointTime, SequenceNumber, StreamHash};
use vault::chain::ManifestBuilder;
use vault::layer::{Host, LayerRef};
use vault::manifest::{Defect, Delta, Gap, GapClosed, GeometryChange};
use vault::segment::{SealOptions, seal_segment};
use vault::{CheckpointWish, Compression, ObjectBuilder, ObjectKind, Placement, PreparedManifest, VaultError};
use world::Monotonic;

use super::heal::HealSink;
use super::{Pipeline, PipelineError};
use crate::journal::{Manifest as JournalManifest, ManifestNonce, ManifestNumber, Record};
use crate::notes::GAP_NOTE;

/// What waits for the next manifest.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) changes: Vec<Change>,
    pub(super) bytes: u64,
    /// The stream's hash behind some of the changes: where batches of the sender ended.
    pub(super) marks: Vec<(SequenceNumber, StreamHash)>,
    /// When the oldest of it arrived.
    pub(super) since: Option<Monotonic>,
    pub(super) cuts: Vec<Cut>,
    pub(super) gaps_opened: Vec<Gap>,
    pub(super) gaps_closed: Vec<GapClosed>,
    pub(super) defects: Vec<Defect>,
    pub(super) geometries: Vec<GeometryChange>,
    pub(super) images: Vec<LayerRef>,
    /// Heals that ended, and where.
    pub(super) heals_ended: Vec<(replication::HealId, SequenceNumber)>,
    /// Suspicions whose gaps are among those opened: which, and where their gap begins.
    pub(super) suspicions: Vec<(u64, SequenceNumber)>,
}

/// A manifest on its way, and what its success means.
pub(super) struct Flying {
    pub(super) prepared: PreparedManifest,
    pub(super) through: SequenceNumber,
    /// Kept to begin again if the number turns out to be burnt.
    pub(super) content: Pending,
    /// Whether the journal holds the manifest's nonce.
    intent: Intent,
}

/// What has become of a record that the journal was given. Set from the journal's thread.
struct Intent(Arc<AtomicU8>);

impl Intent {
    const UNDER_WAY: u8 = 0;
    const DURABLE: u8 = 1;
    const FAILED: u8 = 2;

    fn state(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }
}

impl Pipeline {
    /// Seals what is due and prepares its manifest.
    pub(super) fn take_off(&mut self, now: Monotonic) -> Result<(), PipelineError> {
        let mut content = self.cut_off();
        let late = self.hold_back(&mut content);
        match self.prepare(&content, &late) {
            Ok(prepared) => {
                self.pending.cuts.splice(0..0, late);
                let through = prepared_through(&content, self.writer.through());
                let intent = self.announce(&prepared);
                self.flying = Some(Flying { prepared, through, content, intent });
                Ok(())
            }
            Err(error) => {
                content.cuts.extend(late);
                self.put_back(content);
                self.postpone(now, error)
            }
        }
    }

    /// Takes the cuts from `content` that lie behind the end of a heal whose last image is still to be stored. They are no
    /// points before that one is, and along a chain cuts stand in order.
    fn hold_back(&self, content: &mut Pending) -> Vec<Cut> {
        let Some(end) = self.heal.as_ref().and_then(HealSink::end) else { return Vec::new() };
        content.cuts.extract_if(.., |cut| cut.sequence > end).collect()
    }

    /// Takes from the pending content what one manifest holds: whole requests up to the seal size, and whatever else
    /// lies at or before the last of them.
    fn cut_off(&mut self) -> Pending {
        let mut pending = std::mem::take(&mut self.pending);
        let limit = self.services.pace.seal_bytes.saturating_mul(2);
        if pending.bytes <= limit && self.loaded == self.journaled {
            return pending;
        }
        let mut bytes = 0;
        let mut taken = 0;
        let mut marks = pending.marks.iter().map(|(sequence, _)| *sequence).peekable();
        for (index, change) in pending.changes.iter().enumerate() {
            bytes += change.kind.data_len() as u64;
            while marks.next_if(|mark| *mark < change.sequence).is_some() {}
            if !change.continues {
                taken = index + 1;
                // The sender, too, knows the stream's hash where one of its batches ended.
                let is_marked = marks.peek() == Some(&change.sequence);
                if bytes >= self.services.pace.seal_bytes && is_marked || bytes >= limit {
                    break;
                }
            }
        }
        let rest = pending.changes.split_off(taken);
        let through = pending.changes.last().map_or(self.writer.through(), |change| change.sequence);
        let rest_bytes = rest.iter().map(|change| change.kind.data_len() as u64).sum();
        let first = Pending {
            bytes: pending.bytes - rest_bytes,
            marks: pending.marks.extract_if(.., |(sequence, _)| *sequence <= through).collect(),
            since: pending.since,
            cuts: pending.cuts.extract_if(.., |cut| cut.sequence <= through).collect(),
            gaps_opened: pending.gaps_opened.extract_if(.., |gap| gap.after <= through).collect(),
            gaps_closed: pending.gaps_closed.extract_if(.., |gap| gap.until <= through).collect(),
            defects: std::mem::take(&mut pending.defects),
            geometries: pending.geometries.extract_if(.., |geometry| geometry.sequence <= through).collect(),
            images: std::mem::take(&mut pending.images),
            heals_ended: pending.heals_ended.extract_if(.., |(_, end)| *end <= through).collect(),
            suspicions: pending.suspicions.extract_if(.., |(_, after)| *after <= through).collect(),
            changes: pending.changes,
        };
        self.pending = Pending {
            changes: rest,
            bytes: rest_bytes,
            marks: pending.marks,
            since: pending.since,
            cuts: pending.cuts,
            gaps_opened: pending.gaps_opened,
            gaps_closed: pending.gaps_closed,
            geometries: pending.geometries,
            heals_ended: pending.heals_ended,
            suspicions: pending.suspicions,
            ..Pending::default()
        };
        first
    }

    fn put_back(&mut self, mut content: Pending) {
        let newer = std::mem::take(&mut self.pending);
        content.bytes += newer.bytes;
        content.changes.extend(newer.changes);
        content.marks.extend(newer.marks);
        content.cuts.extend(newer.cuts);
        content.gaps_opened.extend(newer.gaps_opened);
        content.gaps_closed.extend(newer.gaps_closed);
        content.defects.extend(newer.defects);
        content.geometries.extend(newer.geometries);
        content.images.extend(newer.images);
        content.heals_ended.extend(newer.heals_ended);
        content.suspicions.extend(newer.suspicions);
        content.since = content.since.or(newer.since);
        self.pending = content;
    }

    /// Queues number and nonce for the journal. The put waits until they are durable there: `docs/design/0001`, decision 8.
    fn announce(&self, prepared: &PreparedManifest) -> Intent {
        let manifest =
            JournalManifest { number: ManifestNumber(prepared.number), nonce: ManifestNonce(prepared.nonce.0) };
        let record = Record::Intent { chain: self.chain, manifest };
        let intent = Intent(Arc::new(AtomicU8::new(Intent::UNDER_WAY)));
        let (state, wake) = (Arc::clone(&intent.0), Arc::clone(&self.wake));
        let done = move |result: Result<_, _>| {
            state.store(if result.is_ok() { Intent::DURABLE } else { Intent::FAILED }, Ordering::Release);
            wake();
        };
        if let Err(error) = self.services.log.append(record, Box::new(done)) {
            tracing::warn!(chain = %self.chain, %error, "a manifest's intent could not be journaled yet");
            intent.0.store(Intent::FAILED, Ordering::Release);
        }
        intent
    }

    /// `late` are cuts that a later manifest will name: what is sealed must be exact there.
    fn prepare(&self, content: &Pending, late: &[Cut]) -> Result<PreparedManifest, VaultError> {
        let mut builder: ManifestBuilder = self.writer.begin();
        let mut layers = Vec::new();
        if !content.changes.is_empty() {
            layers.extend(self.seal(content, late, &mut builder.object)?);
        }
        layers.extend(content.images.iter().cloned());
        layers.extend(self.merge()?);
        let through = prepared_through(content, self.writer.through());
        let known = content.marks.iter().chain(self.past.iter()).chain(self.stream.iter());
        let delta = Delta {
            through,
            stream: known.copied().find(|(sequence, _)| *sequence == through).map(|(_, hash)| hash),
            proven_through: self.proven.max(self.writer.proven_through()),
            skew_ns: self.skew_ns,
            layers,
            cuts: content.cuts.clone(),
            gaps_opened: content.gaps_opened.clone(),
            gaps_closed: content.gaps_closed.clone(),
            defects: content.defects.clone(),
            geometries: content.geometries.clone(),
            honoured_condemned: 0,
        };
        self.writer.prepare(builder, delta, CheckpointWish::WhenDue)
    }

    fn seal(
        &self,
        content: &Pending,
        late: &[Cut],
        manifest: &mut ObjectBuilder<'static>,
    ) -> Result<Option<LayerRef>, VaultError> {
        let mut barriers: Vec<SequenceNumber> = content.cuts.iter().chain(late).map(|cut| cut.sequence).collect();
        barriers.extend(content.gaps_opened.iter().map(|gap| gap.after));
        barriers.extend(
            content
                .changes
                .iter()
                .filter_map(|change| matches!(change.kind, ChangeKind::HealStart { .. }).then_some(change.sequence)),
        );
        barriers.extend(self.heal.as_ref().and_then(HealSink::end));
        // A cut that is known only later may fall on any second's last request: stay exact there too.
        barriers.extend(second_ends(&content.changes));
        barriers.sort_unstable();
        barriers.dedup();
        let session = &self.services.session;
        let options = SealOptions {
            leaf_key: &session.keys().shared.leaf,
            compression: Compression::Fast,
            workers: self.services.pace.workers,
        };
        if content.bytes <= self.services.pace.inline_bytes_max {
            return Ok(seal_segment(&content.changes, &barriers, manifest, Host::ThisManifest, &options)?.layer);
        }
        let generation = self.writer.generation();
        let name = session.segment_name(self.chain, generation);
        let placement = Placement::on_chain(ObjectKind::Segment, self.chain, generation);
        let mut object = ObjectBuilder::shared(Arc::clone(session), placement, name.clone());
        let sealed = seal_segment(&content.changes, &barriers, &mut object, Host::Object(name), &options)?;
        if let Some(layer) = &sealed.layer {
            object.finish(Some(layer.root)).put(self.services.store.as_ref())?;
        }
        Ok(sealed.layer)
    }

    fn merge(&self) -> Result<Option<LayerRef>, VaultError> {
        let layers = &self.writer.state().layers;
        let Some(plan) = vault::merge::plan_merges(layers) else { return Ok(None) };
        let chosen: Vec<LayerRef> = plan.into_iter().map(|index| layers[index].clone()).collect();
        let (session, generation) = (&self.services.session, self.writer.generation());
        vault::merge::merge_layers(&self.services.source, &chosen, session, self.chain, generation).map(Some)
    }

    pub(super) fn land(&mut self, now: Monotonic, events: &mut Vec<Event>) -> Result<(), PipelineError> {
        let Some(mut flying) = self.flying.take() else { return Ok(()) };
        match flying.intent.state() {
            Intent::DURABLE => {}
            Intent::UNDER_WAY => {
                self.flying = Some(flying);
                return Ok(());
            }
            _ => {
                flying.intent = self.announce(&flying.prepared);
                self.flying = Some(flying);
                self.retry_at = now.plus(self.services.pace.retry_pause);
                return Ok(());
            }
        }
        match self.writer.put(&flying.prepared) {
            Ok(()) => {
                self.view = None;
                self.past = self.writer.stream().map(|hash| (flying.through, hash)).or(self.past);
                self.proof_committed_at = now;
                self.record_commit(&flying);
                events.push(Event::Committed(flying.through));
                let ended = &flying.content.heals_ended;
                events.extend(ended.iter().map(|(heal, _)| Event::HealCommitted { heal: *heal }));
                let noted = &flying.content.suspicions;
                events.extend(noted.iter().map(|(id, _)| Event::SuspicionNoted { id: *id }));
                Ok(())
            }
            Err(VaultError::NumberBurnt { number }) => {
                tracing::warn!(chain = %self.chain, number, "a manifest's number was taken by an object that does not count");
                self.put_back(flying.content);
                Ok(())
            }
            Err(error) => {
                self.flying = Some(flying);
                self.postpone(now, error)
            }
        }
    }

    fn record_commit(&self, flying: &Flying) {
        let number = ManifestNumber(flying.prepared.number);
        let mut records = vec![Record::Committed { chain: self.chain, through: flying.through, number }];
        if !flying.content.gaps_closed.is_empty() && !self.is_in_gap() {
            records.push(Record::Note { chain: self.chain, kind: GAP_NOTE, bytes: bytes::Bytes::new() });
        }
        for record in records {
            // Losing this costs only that a restart replays what is in the vault already.
            if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
                tracing::warn!(chain = %self.chain, %error, "a commit could not be noted in the journal");
            }
        }
    }

    /// A store that may recover is asked again later with the same bytes; anything else is final.
    fn postpone(&mut self, now: Monotonic, error: VaultError) -> Result<(), PipelineError> {
        match error {
            VaultError::Store(store) if store.is_retryable() => {
                tracing::warn!(chain = %self.chain, error = %store, "the vault's store does not answer; trying again");
                self.retry_at = now.plus(self.services.pace.retry_pause);
                Ok(())
            }
            VaultError::Fenced { .. } => Err(PipelineError::Fenced { chain: self.chain }),
            source => Err(PipelineError::Vault { chain: self.chain, source }),
        }
    }
}

fn prepared_through(content: &Pending, before: SequenceNumber) -> SequenceNumber {
    content.changes.last().map_or(before, |change| change.sequence.max(before))
}

/// The last change of each second that ends within `changes`.
fn second_ends(changes: &[Change]) -> impl Iterator<Item = SequenceNumber> {
    changes.windows(2).filter_map(|pair| {
        let second = |change: &Change| PointTime(change.time.0).next_second();
        (second(&pair[0]) != second(&pair[1])).then_some(pair[0].sequence)
    })
}
