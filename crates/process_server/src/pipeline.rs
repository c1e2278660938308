//! The pipeline of one chain: collects durable changes, seals them into segments, uploads, commits manifests, and
//! answers heals. Owns the chain's writer, so everything that enters the vault for this chain passes through here, in
//! order.
//!
//! ```text
//! Work ──► pending changes, cuts, gaps ──seal interval──► segment ──► manifest prepared ──► put ──► committed
//!                        heal data ──► image builder ──────► image layer ──┘     ▲ retried with the same bytes
//! ```
//!
//! What a crash leaves: objects nobody refers to, or a committed manifest. Everything not committed is in the journal
//! (changes) or still on the source (heal data).

mod heal;
mod open;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use replication::receiver::Event;
use replication::{ChainId, Change, ChangeKind, Cut, MachineId, PointTime, SequenceNumber};
use vault::chain::ManifestBuilder;
use vault::keys::WriterSession;
use vault::layer::{Host, LayerRef};
use vault::manifest::{Defect, Delta, Gap, GapClosed, GapScope, GeometryChange};
use vault::pack::SharedDedup;
use vault::segment::{SealOptions, seal_segment};
use vault::view::ChainView;
use vault::view_source::FrameSource;
use vault::{
    ChainWriter, CheckpointWish, Compression, ObjectBuilder, ObjectKind, OpenKeys, Placement, PreparedManifest, Store,
    VaultError,
};
use world::{Clock, Monotonic};

use crate::ingest::{ChangeLog, GAP_NOTE, GapNote, ReadBack, Work};
use crate::journal::{JournalError, Manifest as JournalManifest, ManifestNonce, ManifestNumber, Record};

use heal::HealSink;
pub use open::{Greeted, OpenError};

/// What all chains of a process server share.
#[derive(Clone)]
pub struct Services {
    /// The vault's store.
    pub store: Arc<dyn Store>,
    /// This writer's session.
    pub session: Arc<WriterSession>,
    /// The keys a writer has: it can read indexes, not data.
    pub keys: Arc<OpenKeys>,
    /// Chunks this server stored before.
    pub dedup: SharedDedup,
    /// Index frames, cached over all chains.
    pub source: Arc<FrameSource>,
    /// The journal.
    pub log: Arc<dyn ChangeLog>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Paces and sizes.
    pub pace: Pace,
}

/// When a chain is sealed, and with how much effort.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Changes wait at most this long before they are sealed.
    pub seal_interval: Duration,
    /// Changes are sealed when they have collected this many bytes of data.
    pub seal_bytes: u64,
    /// An idle machine's proof of being current is committed this often.
    pub idle_interval: Duration,
    /// Segments up to this many bytes of data travel inside their manifest.
    pub inline_bytes_max: u64,
    /// A heal's image is committed each time it has received this many bytes.
    pub image_cut_bytes: u64,
    /// Stream bytes that may be under way beyond *journaled*.
    pub window_bytes: u64,
    /// Uncommitted changes kept in memory, in bytes; what is beyond is read back from the journal.
    pub memory_bytes_max: u64,
    /// Threads for hashing, compressing and encrypting one chain's data.
    pub workers: NonZeroUsize,
    /// Pause after the store refused.
    pub retry_pause: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            seal_interval: Duration::from_secs(3),
            seal_bytes: 24 << 20,
            idle_interval: Duration::from_secs(60),
            inline_bytes_max: 3 << 20,
            image_cut_bytes: 1 << 30,
            window_bytes: 16 << 20,
            memory_bytes_max: 96 << 20,
            workers: NonZeroUsize::new(2).expect("two is not zero"),
            retry_pause: Duration::from_millis(500),
        }
    }
}

/// What waits for the next manifest.
#[derive(Default)]
struct Pending {
    changes: Vec<Change>,
    bytes: u64,
    /// When the oldest of it arrived.
    since: Option<Monotonic>,
    cuts: Vec<Cut>,
    gaps_opened: Vec<Gap>,
    gaps_closed: Vec<GapClosed>,
    defects: Vec<Defect>,
    geometries: Vec<GeometryChange>,
    images: Vec<LayerRef>,
    /// Heals that ended, and where.
    heals_ended: Vec<(replication::HealId, SequenceNumber)>,
}

/// A manifest on its way, and what its success means.
struct Flying {
    prepared: PreparedManifest,
    through: SequenceNumber,
    /// Kept to begin again if the number turns out to be burnt.
    content: Pending,
}

/// Why a pipeline stopped. Final for this pipeline; the machine's next session opens a new one.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// Another writer has taken the chain over.
    #[error("another writer has taken over chain {chain}")]
    Fenced {
        /// The chain.
        chain: ChainId,
    },
    /// The journal cannot give back what it had taken.
    #[error("the journal does not give back the changes of chain {chain}")]
    Journal {
        /// The chain.
        chain: ChainId,
        /// Why.
        #[source]
        source: JournalError,
    },
    /// The journal lacks changes that were acknowledged.
    #[error("the journal lacks the changes of chain {chain} after {after}")]
    JournalHole {
        /// The chain.
        chain: ChainId,
        /// The last change before the hole.
        after: SequenceNumber,
    },
    /// The vault does not take what is given; retrying will not help.
    #[error("chain {chain} cannot be written")]
    Vault {
        /// The chain.
        chain: ChainId,
        /// Why.
        #[source]
        source: VaultError,
    },
}

/// See the module's documentation.
pub struct Pipeline {
    services: Services,
    machine: MachineId,
    chain: ChainId,
    writer: ChainWriter,
    /// Layers of earlier generations, and the parent chain.
    earlier: Vec<LayerRef>,
    below: Option<vault::view::ViewBelow>,
    view: Option<Arc<ChainView>>,
    pending: Pending,
    flying: Option<Flying>,
    heal: Option<HealSink>,
    /// Last positions before the breaks that no heal has ended yet.
    open_gaps: Vec<SequenceNumber>,
    /// Newest point time and cut planner, for the next session.
    last_point: PointTime,
    planner: replication::cut::CutPlanner,
    journaled: SequenceNumber,
    /// Changes up to here were put into `pending`; later ones up to `journaled` are read back from the journal.
    loaded: SequenceNumber,
    /// Cuts of changes up to here are not known yet: a restart found them in the journal.
    replay_through: SequenceNumber,
    /// After which change, and when, the gaps opened that the vault knew at the start.
    known_gaps: Vec<(SequenceNumber, PointTime)>,
    /// Newest journaled change and the stream's hash there, if it is known.
    stream: Option<(SequenceNumber, replication::StreamHash)>,
    proven: PointTime,
    skew_ns: i64,
    proof_committed_at: Monotonic,
    retry_at: Monotonic,
    last_boot: Option<([u8; 16], [u8; 16])>,
    geometries: Vec<replication::DiskGeometry>,
}

impl Pipeline {
    /// The chain it writes.
    pub fn chain(&self) -> ChainId {
        self.chain
    }

    /// The machine whose chain it is.
    pub fn machine(&self) -> MachineId {
        self.machine
    }

    /// Newest committed change.
    pub fn committed(&self) -> SequenceNumber {
        self.writer.through()
    }

    /// The chain's writer, for status.
    pub fn writer(&self) -> &ChainWriter {
        &self.writer
    }

    /// Whether nothing waits to be committed.
    pub fn is_drained(&self) -> bool {
        self.flying.is_none() && self.pending.since.is_none() && self.heal.is_none()
    }

    /// Takes the next piece of work.
    ///
    /// # Errors
    /// See [`PipelineError`]: final. Passing troubles of the store are retried by [`Pipeline::step`].
    pub fn work(&mut self, work: Work) -> Result<Vec<Event>, PipelineError> {
        let mut events = Vec::new();
        match work {
            Work::Changes { changes, hash } => {
                self.stream = changes.last().map(|change| (change.sequence, hash));
                self.take_changes(changes);
            }
            Work::Cut(cut) => {
                self.pending.cuts.push(cut);
                self.touch();
            }
            Work::GapOpened { at, time, cause } => self.open_gap(at, time, cause),
            Work::Proven { through: _, time, skew_ns } => {
                self.proven = self.proven.max(time);
                self.last_point = self.last_point.max(time);
                self.skew_ns = skew_ns;
                // Keeps the next session's cuts in step with those already announced.
                let _ = self.planner.proven(time);
            }
            Work::HealBegin { heal, p0, hashes, planned_bytes: _ } => {
                if let Some(unfinished) = self.heal.take() {
                    self.open_gaps.extend(unfinished.give_back());
                }
                self.heal = Some(HealSink::new(&self.services, self.chain, self.writer.generation(), heal, p0, hashes));
            }
            Work::Compare { heal, offer, disk, start, leaves } => {
                if let Some(sink) = self.heal.as_mut().filter(|sink| sink.heal() == heal) {
                    sink.offered(offer, disk, start, leaves);
                }
            }
            Work::HealData { heal, disk, range, content } => self.heal_data(heal, disk, range, content, &mut events),
            Work::HealEnd { heal, cut } => self.heal_end(heal, cut),
            Work::HealAborted { .. } | Work::SessionEnded => self.keep_partial_image(),
        }
        Ok(events)
    }

    /// Seals, uploads and commits whatever is due, and judges what heals offered.
    ///
    /// # Errors
    /// As [`Pipeline::work`].
    pub fn step(&mut self) -> Result<Vec<Event>, PipelineError> {
        let mut events = Vec::new();
        let now = self.services.clock.monotonic();
        if now < self.retry_at {
            return Ok(events);
        }
        self.read_back()?;
        self.finish_images(now);
        if self.flying.is_none() && self.is_due(now) {
            self.take_off(now)?;
        }
        self.land(now, &mut events)?;
        self.judge_offers(&mut events);
        Ok(events)
    }

    fn take_changes(&mut self, changes: Vec<Change>) {
        self.touch();
        let fits = self.loaded == self.journaled && self.pending.bytes < self.services.pace.memory_bytes_max;
        if let Some(last) = changes.last() {
            self.journaled = last.sequence;
        }
        for change in &changes {
            self.last_point = self.last_point.max(PointTime(change.time.0));
        }
        if fits {
            self.load(changes);
        }
    }

    /// Puts changes into the next manifest's content.
    fn load(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.loaded = change.sequence;
            self.pending.bytes += change.kind.data_len() as u64;
            // The session's receiver decides on cuts; this planner follows, to know where the next session starts. For
            // changes that a restart found in the journal nobody else has decided.
            let cuts = self.planner.change(&change);
            if change.sequence <= self.replay_through && self.open_gaps.is_empty() {
                self.pending.cuts.extend(cuts);
            }
            if let ChangeKind::Geometry(geometry) = &change.kind {
                self.note_geometry(change.sequence, geometry.clone());
            }
            self.pending.changes.push(change);
        }
    }

    /// Refills the content with what did not fit into memory when it came.
    fn read_back(&mut self) -> Result<(), PipelineError> {
        while self.loaded < self.journaled && self.pending.bytes < self.services.pace.seal_bytes {
            let items = self
                .services
                .log
                .read_back(self.chain, self.loaded, self.services.pace.seal_bytes)
                .map_err(|source| PipelineError::Journal { chain: self.chain, source })?;
            let before = self.loaded;
            for item in items {
                match item {
                    ReadBack::Changes(changes) => self.load(changes),
                    // A gap whose opening is in the vault is as open as the vault says, and one that lies before what is
                    // committed would have been committed with it: its note belongs to a session that was replaced.
                    ReadBack::Gap(Some(GapNote { at, time, cause }))
                        if self.loaded < self.replay_through
                            && at >= self.writer.through()
                            && !self.knows_gap(at, time) =>
                    {
                        self.open_gap(at, time, cause);
                    }
                    ReadBack::Gap(_) => {}
                }
            }
            if self.loaded == before {
                return Err(PipelineError::JournalHole { chain: self.chain, after: before });
            }
            self.touch();
        }
        Ok(())
    }

    fn note_geometry(&mut self, sequence: SequenceNumber, geometry: replication::DiskGeometry) {
        match self.geometries.iter_mut().find(|known| known.disk == geometry.disk) {
            Some(known) if *known == geometry => return,
            Some(known) => *known = geometry.clone(),
            None => self.geometries.push(geometry.clone()),
        }
        self.pending.geometries.push(GeometryChange { sequence, geometry });
    }

    fn open_gap(&mut self, at: SequenceNumber, time: PointTime, cause: String) {
        self.planner = replication::cut::CutPlanner::default();
        if !self.open_gaps.is_empty() {
            return;
        }
        let after = at.max(self.pending.cuts.last().map_or(SequenceNumber(0), |cut| cut.sequence));
        self.open_gaps.push(after);
        self.pending.gaps_opened.push(Gap { after, scope: GapScope::Machine, time, cause, until: None });
        self.touch();
    }

    /// Point time may stand still for a while after a clock jumped back, so it alone identifies nothing.
    fn knows_gap(&self, at: SequenceNumber, time: PointTime) -> bool {
        self.known_gaps.iter().any(|(after, opened)| *opened == time && *after >= at)
    }

    fn note_gap(&self, at: SequenceNumber, time: PointTime, cause: &str) {
        let bytes = GapNote { at, time, cause: cause.to_owned() }.encode();
        let record = Record::Note { chain: self.chain, kind: GAP_NOTE, bytes };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, "a gap could not be noted in the journal");
        }
    }

    fn touch(&mut self) {
        self.pending.since.get_or_insert(self.services.clock.monotonic());
    }

    fn is_due(&self, now: Monotonic) -> bool {
        let Some(since) = self.pending.since else {
            let stale = self.proven > self.writer.proven_through();
            return stale && now.since(self.proof_committed_at) >= self.services.pace.idle_interval;
        };
        let urgent = self.heal.as_ref().is_some_and(|sink| self.writer.through() < sink.p0())
            || !self.pending.heals_ended.is_empty();
        urgent
            || self.pending.bytes >= self.services.pace.seal_bytes
            || now.since(since) >= self.services.pace.seal_interval
    }

    /// Seals what is due and prepares its manifest.
    fn take_off(&mut self, now: Monotonic) -> Result<(), PipelineError> {
        let content = self.cut_off();
        match self.prepare(&content) {
            Ok(prepared) => {
                let through = prepared_through(&content, self.writer.through());
                self.announce(&prepared);
                self.flying = Some(Flying { prepared, through, content });
                Ok(())
            }
            Err(error) => {
                self.put_back(content);
                self.postpone(now, error)
            }
        }
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
        for (index, change) in pending.changes.iter().enumerate() {
            bytes += change.kind.data_len() as u64;
            if !change.continues {
                taken = index + 1;
                if bytes >= self.services.pace.seal_bytes {
                    break;
                }
            }
        }
        let rest = pending.changes.split_off(taken);
        let through = pending.changes.last().map_or(self.writer.through(), |change| change.sequence);
        let rest_bytes = rest.iter().map(|change| change.kind.data_len() as u64).sum();
        let first = Pending {
            bytes: pending.bytes - rest_bytes,
            since: pending.since,
            cuts: pending.cuts.extract_if(.., |cut| cut.sequence <= through).collect(),
            gaps_opened: pending.gaps_opened.extract_if(.., |gap| gap.after <= through).collect(),
            gaps_closed: pending.gaps_closed.extract_if(.., |gap| gap.until <= through).collect(),
            defects: std::mem::take(&mut pending.defects),
            geometries: pending.geometries.extract_if(.., |geometry| geometry.sequence <= through).collect(),
            images: std::mem::take(&mut pending.images),
            heals_ended: pending.heals_ended.extract_if(.., |(_, end)| *end <= through).collect(),
            changes: pending.changes,
        };
        self.pending = Pending {
            changes: rest,
            bytes: rest_bytes,
            since: pending.since,
            cuts: pending.cuts,
            gaps_opened: pending.gaps_opened,
            gaps_closed: pending.gaps_closed,
            geometries: pending.geometries,
            heals_ended: pending.heals_ended,
            ..Pending::default()
        };
        first
    }

    fn put_back(&mut self, mut content: Pending) {
        let newer = std::mem::take(&mut self.pending);
        content.bytes += newer.bytes;
        content.changes.extend(newer.changes);
        content.cuts.extend(newer.cuts);
        content.gaps_opened.extend(newer.gaps_opened);
        content.gaps_closed.extend(newer.gaps_closed);
        content.defects.extend(newer.defects);
        content.geometries.extend(newer.geometries);
        content.images.extend(newer.images);
        content.heals_ended.extend(newer.heals_ended);
        content.since = content.since.or(newer.since);
        self.pending = content;
    }

    /// The nonce is journaled before the request goes out, so that a lost answer is recognised after a crash too.
    fn announce(&self, prepared: &PreparedManifest) {
        let manifest =
            JournalManifest { number: ManifestNumber(prepared.number), nonce: ManifestNonce(prepared.nonce.0) };
        let record = Record::Intent { chain: self.chain, manifest };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, "a manifest's intent could not be journaled");
        }
    }

    fn prepare(&self, content: &Pending) -> Result<PreparedManifest, VaultError> {
        let mut builder: ManifestBuilder = self.writer.begin();
        let mut layers = Vec::new();
        if !content.changes.is_empty() {
            layers.extend(self.seal(content, &mut builder.object)?);
        }
        layers.extend(content.images.iter().cloned());
        layers.extend(self.merge()?);
        let delta = Delta {
            through: prepared_through(content, self.writer.through()),
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

    fn seal(&self, content: &Pending, manifest: &mut ObjectBuilder<'static>) -> Result<Option<LayerRef>, VaultError> {
        let mut barriers: Vec<SequenceNumber> = content.cuts.iter().map(|cut| cut.sequence).collect();
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

    fn land(&mut self, now: Monotonic, events: &mut Vec<Event>) -> Result<(), PipelineError> {
        let Some(flying) = self.flying.take() else { return Ok(()) };
        match self.writer.put(&flying.prepared) {
            Ok(()) => {
                self.view = None;
                self.proof_committed_at = now;
                self.record_commit(&flying);
                events.push(Event::Committed(flying.through));
                let ended = &flying.content.heals_ended;
                events.extend(ended.iter().map(|(heal, _)| Event::HealCommitted { heal: *heal }));
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
        if !flying.content.gaps_closed.is_empty() && self.open_gaps.is_empty() {
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
