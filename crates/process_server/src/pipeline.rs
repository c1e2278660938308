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

mod commit;
mod gaps;
mod greet;
mod heal;
mod open;
mod scrub;

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use replication::receiver::Event;
use replication::{ChainId, Change, ChangeKind, MachineId, PointTime, SequenceNumber};
use vault::keys::WriterSession;
use vault::layer::LayerRef;
use vault::manifest::{GapScope, GeometryChange};
use vault::pack::SharedDedup;
use vault::view::ChainView;
use vault::view_source::FrameSource;
use vault::{ChainWriter, OpenKeys, Store, VaultError};
use world::{Clock, Monotonic};

use crate::ingest::{ChangeLog, ReadBack, Work};
use crate::journal::JournalError;
use crate::notes::GapNote;

use commit::{Flying, Pending};
use gaps::OpenGap;
pub use greet::Greeted;
use greet::Renewal;
use heal::HealSink;
pub use open::OpenError;
use scrub::ScrubOffer;

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
    /// The journal does not take the number of the manifest that is to open a generation.
    #[error("the journal does not take what is about to be committed to chain {chain}")]
    Intent {
        /// The chain.
        chain: ChainId,
        /// Why.
        #[source]
        source: Arc<JournalError>,
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
    /// Offers of scrubs that wait for their verdict.
    scrubs: VecDeque<ScrubOffer>,
    /// Gaps that no heal has ended yet.
    open_gaps: Vec<OpenGap>,
    /// Newest point time and cut planner, for the next session.
    last_point: PointTime,
    planner: replication::cut::CutPlanner,
    journaled: SequenceNumber,
    /// Changes up to here were put into `pending`; later ones up to `journaled` are read back from the journal.
    loaded: SequenceNumber,
    /// Cuts of changes up to here are not known yet: a restart found them in the journal.
    replay_through: SequenceNumber,
    /// After which change, and when, the gaps opened that the vault knew at the start.
    known_gaps: Vec<(SequenceNumber, PointTime, GapScope)>,
    /// Newest journaled change and the stream's hash there, if it is known.
    stream: Option<(SequenceNumber, replication::StreamHash)>,
    /// Newest position in the vault at which the stream's hash is known, and the hash: what a sender can compare.
    past: Option<(SequenceNumber, replication::StreamHash)>,
    proven: PointTime,
    skew_ns: i64,
    proof_committed_at: Monotonic,
    retry_at: Monotonic,
    last_boot: Option<([u8; 16], [u8; 16])>,
    geometries: Vec<replication::DiskGeometry>,
    /// The disks as the sender described them in its hello.
    announced: Vec<replication::DiskGeometry>,
    /// The journal's note of disks that left is one that may still be read.
    removal_noted: bool,
    /// A sender to which continuity is lost: everything is committed before its generation is opened.
    renewing: Option<Renewal>,
    /// Where the newest heal of this session begins: it may end gaps before, and none behind.
    heal_begun: SequenceNumber,
    /// Called from the journal's thread when [`Pipeline::step`] has something to do.
    wake: Arc<dyn Fn() + Send + Sync>,
}

impl Pipeline {
    /// Has `wake` called, from another thread, whenever [`Pipeline::step`] could go on.
    pub fn wake_with(&mut self, wake: Arc<dyn Fn() + Send + Sync>) {
        self.wake = wake;
    }

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

    /// Bytes of uncommitted changes in memory.
    pub fn memory_bytes(&self) -> u64 {
        self.pending.bytes + self.flying.as_ref().map_or(0, |flying| flying.content.bytes)
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
                // What did not fit is marked when it is read back.
                self.pending.marks.extend(self.stream.filter(|_| self.loaded == self.journaled));
            }
            Work::Cut(cut) => {
                self.pending.cuts.push(cut);
                self.touch();
            }
            Work::GapOpened { at, reach, time, cause } => self.open_gap(at, reach, time, cause),
            Work::Proven { through: _, time, skew_ns } => {
                self.proven = self.proven.max(time);
                self.last_point = self.last_point.max(time);
                self.skew_ns = skew_ns;
                // Keeps the next session's cuts in step with those already announced.
                let _ = self.planner.proven(time);
            }
            Work::HealBegin { heal, p0, reach, hashes, planned_bytes: _ } => {
                if let Some(unfinished) = self.heal.take() {
                    self.open_gaps.extend(unfinished.give_back());
                }
                self.heal = Some(HealSink::new(&self.services, &self.writer, heal, p0, (reach, hashes)));
            }
            Work::Compare { heal, offer, disk, start, leaves } => {
                if let Some(sink) = self.heal.as_mut().filter(|sink| sink.heal() == heal) {
                    sink.offered(offer, disk, start, leaves);
                }
            }
            Work::HealData { heal, disk, range, content } => self.heal_data(heal, disk, range, content, &mut events),
            Work::HealEnd { heal, cut } => self.heal_end(heal, cut),
            Work::Scrub { offer, behind, disk, start, leaves } => {
                self.scrubs.push_back(ScrubOffer { offer, behind, disk, start, leaves });
            }
            Work::Suspected { id, after, until, time, ranges, cause } => {
                self.suspect(id, (after, until), time, (ranges, cause), &mut events);
            }
            Work::HealAborted { .. } => self.keep_partial_image(),
            Work::SessionEnded => {
                self.scrubs.clear();
                self.keep_partial_image();
            }
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
        self.finish_images(now, &mut events);
        if self.flying.is_none() && self.is_due(now) {
            self.take_off(now)?;
        }
        self.land(now, &mut events)?;
        self.judge_offers(now, &mut events);
        self.judge_scrubs(now, &mut events);
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
            if let ChangeKind::HealStart { .. } = change.kind {
                self.heal_begun = change.sequence;
            }
        }
        if fits {
            self.load(changes);
        }
    }

    /// Puts changes into the next manifest's content.
    fn load(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.loaded = change.sequence;
            // What a restart found in the journal has its point time already: the next session's must not lie before it.
            self.last_point = self.last_point.max(PointTime(change.time.0));
            self.pending.bytes += change.kind.data_len() as u64;
            // The session's receiver decides on cuts; this planner follows, to know where the next session starts. For
            // changes that a restart found in the journal nobody else has decided.
            let cuts = self.planner.change(&change);
            if change.sequence <= self.replay_through && !self.is_in_gap() {
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
                    ReadBack::Hash { sequence, hash } => {
                        self.pending.marks.extend((sequence == self.loaded).then_some((sequence, hash)));
                    }
                    // A gap whose opening is in the vault is as open as the vault says, and one that lies before what is
                    // committed would have been committed with it: its note belongs to a session that was replaced.
                    ReadBack::Gap(Some(GapNote { at, reach, time, cause }))
                        if self.loaded < self.replay_through
                            && at >= self.writer.through()
                            && !self.knows_gap(at, time, &reach) =>
                    {
                        self.open_gap(at, reach, time, cause);
                    }
                    // Read again with what comes later, and by then one that left may have come back.
                    ReadBack::Disks(note) if self.loaded < self.replay_through && note.at >= self.loaded => {
                        self.remove_disks(&note);
                    }
                    ReadBack::Gap(_) | ReadBack::Disks(_) => {}
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

    fn touch(&mut self) {
        self.pending.since.get_or_insert(self.services.clock.monotonic());
    }

    fn is_due(&self, now: Monotonic) -> bool {
        let Some(since) = self.pending.since else {
            let stale = self.proven > self.writer.proven_through();
            return stale && now.since(self.proof_committed_at) >= self.services.pace.idle_interval;
        };
        let urgent = self.heal.as_ref().is_some_and(|sink| self.writer.through() < sink.p0())
            || !self.pending.heals_ended.is_empty()
            || self.renewing.is_some();
        urgent
            || self.pending.bytes >= self.services.pace.seal_bytes
            || now.since(since) >= self.services.pace.seal_interval
    }
}
