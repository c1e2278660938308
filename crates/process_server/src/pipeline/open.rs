//! Opening a pipeline and greeting senders: where continuity is judged and generations are opened.
//!
//! A process server that starts finds a journal and a vault. If the chain's head is still its own session's, the
//! journaled tail is committed under a new generation with its old numbers; if somebody else wrote since, the tail is
//! quarantined and the source heals.

use std::sync::Arc;

use replication::cut::{CutKind, CutPlanner, PointTime};
use replication::receiver::{Greeting, Receiver, Remembered, SessionStart, greet};
use replication::wire::{Hello, Message};
use replication::{ChainId, InstanceId, MachineId, SequenceNumber, StreamHash};
use vault::catalog::{Catalog, CatalogEntry};
use vault::manifest::{Delta, Gap, GapScope, GeometryChange};
use vault::view::{ChainView, ViewBelow};
use vault::{ChainHistory, ChainWriter, VaultError};
use world::{Entropy, Monotonic};

use super::commit::Pending;
use super::{Pipeline, Services};
use crate::ingest::{GAP_NOTE, ReadBack};
use crate::journal::{ChainState, Manifest, ManifestNonce, ManifestNumber, Record, Session};

/// Why a machine's pipeline could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The vault could not be read or written.
    #[error("the chain of machine {machine} could not be opened")]
    Vault {
        /// The machine.
        machine: MachineId,
        /// Why.
        #[source]
        source: VaultError,
    },
}

/// The answer to a sender's first message.
pub enum Greeted {
    /// The session begins; send this first.
    Accepted(Box<Receiver>, Message),
    /// Send this and close.
    Refused(Message),
}

impl Pipeline {
    /// Opens the chain that `machine` follows, creating it if it is new, under a new generation.
    ///
    /// `journal` is what this server's journal knows of that chain.
    pub fn open(
        services: Services,
        entropy: &dyn Entropy,
        machine: MachineId,
        hello: Option<&Hello>,
        journal: impl Fn(ChainId) -> Option<ChainState>,
    ) -> Result<Pipeline, OpenError> {
        let fail = |source| OpenError::Vault { machine, source };
        let chain = chain_of(&services, entropy, machine, hello).map_err(fail)?;
        let history = ChainHistory::find(&services.store, &services.keys, chain).map_err(fail)?;
        match history {
            None => Pipeline::create(services, machine, chain, hello).map_err(fail),
            Some(history) => Pipeline::resume(services, machine, history, journal(chain)).map_err(fail),
        }
    }

    fn create(
        services: Services,
        machine: MachineId,
        chain: ChainId,
        hello: Option<&Hello>,
    ) -> Result<Pipeline, VaultError> {
        let geometries = hello.map(|hello| hello.disks.clone()).unwrap_or_default();
        let time = PointTime(services.clock.wall().0);
        let delta = Delta {
            gaps_opened: vec![Gap {
                after: SequenceNumber(0),
                scope: GapScope::Machine,
                time,
                cause: "initial replication".into(),
                until: None,
            }],
            geometries: geometries
                .iter()
                .map(|geometry| GeometryChange { sequence: SequenceNumber(0), geometry: geometry.clone() })
                .collect(),
            ..Delta::default()
        };
        let Services { store, session, keys, .. } = &services;
        let writer = ChainWriter::create(store, session, keys, chain, (machine, None), delta)?;
        let mut pipeline = Pipeline::around(services, machine, writer, Vec::new(), None);
        pipeline.open_gaps = vec![SequenceNumber(0)];
        pipeline.geometries = geometries;
        pipeline.journal_session();
        Ok(pipeline)
    }

    fn resume(
        services: Services,
        machine: MachineId,
        history: ChainHistory,
        journal: Option<ChainState>,
    ) -> Result<Pipeline, VaultError> {
        let own = journal.filter(|state| continues(state, &history, &services));
        let mut open_gaps: Vec<SequenceNumber> =
            history.gaps().iter().filter(|gap| gap.until.is_none()).map(|gap| gap.after).collect();
        let reason = if own.is_some() { "the process server started" } else { "a process server took over" };
        let mut delta = Delta::default();
        if own.is_none() && open_gaps.is_empty() {
            // Whatever was journaled elsewhere and not committed is missing here.
            let time = PointTime(services.clock.wall().0).max(history.proven_through);
            let gap = Gap { after: history.through, scope: GapScope::Machine, time, cause: reason.into(), until: None };
            open_gaps.push(gap.after);
            delta.gaps_opened.push(gap);
        }
        let below = parent_view(&services, &history)?;
        let Services { store, session, keys, .. } = &services;
        let writer = ChainWriter::open_generation(store, session, keys, &history, reason, delta)?;
        let mut pipeline = Pipeline::around(services, machine, writer, history.layers(), below);
        pipeline.open_gaps = open_gaps;
        pipeline.known_gaps = history.gaps().iter().map(|gap| (gap.after, gap.time)).collect();
        pipeline.geometries = history.geometry_at(SequenceNumber(u64::MAX));
        pipeline.last_point = history.proven_through.max(history.last_cut().map_or(PointTime(0), |(_, time)| time));
        match own {
            Some(state) => {
                pipeline.journaled = state.last.max(history.through);
                pipeline.loaded = history.through;
                pipeline.replay_through = pipeline.journaled;
                pipeline.stream = pipeline.stream_at_end(&state);
                pipeline.touch();
            }
            None => pipeline.quarantine(reason),
        }
        pipeline.journal_session();
        Ok(pipeline)
    }

    fn around(
        services: Services,
        machine: MachineId,
        writer: ChainWriter,
        earlier: Vec<vault::layer::LayerRef>,
        below: Option<ViewBelow>,
    ) -> Pipeline {
        let through = writer.through();
        Pipeline {
            chain: writer.chain(),
            services,
            machine,
            earlier,
            below,
            view: None,
            pending: Pending::default(),
            flying: None,
            heal: None,
            open_gaps: Vec::new(),
            last_point: writer.proven_through(),
            planner: CutPlanner::default(),
            journaled: through,
            loaded: through,
            replay_through: SequenceNumber(0),
            known_gaps: Vec::new(),
            stream: None,
            proven: writer.proven_through(),
            skew_ns: 0,
            proof_committed_at: Monotonic(0),
            retry_at: Monotonic(0),
            last_boot: None,
            geometries: Vec::new(),
            writer,
        }
    }

    /// The stream's hash at the journal's end. Changes and their hash are two records: a crash between them leaves a
    /// tail that nobody was told of yet, over which the hash is carried on.
    fn stream_at_end(&self, state: &ChainState) -> Option<(SequenceNumber, StreamHash)> {
        let (mut sequence, mut hash) = state.stream_hash?;
        if sequence < state.last {
            for item in self.services.log.read_back(self.chain, sequence, u64::MAX).ok()? {
                let ReadBack::Changes(changes) = item else { continue };
                for change in changes {
                    if change.sequence.0 != sequence.0 + 1 {
                        return None;
                    }
                    (sequence, hash) = (change.sequence, change.extend_hash(hash));
                }
            }
        }
        (sequence == state.last).then_some((sequence, hash))
    }

    /// The chain that the machine follows, as the catalog says now: after a failback it is another one.
    ///
    /// # Errors
    /// Those of reading the catalog.
    pub fn followed(&self) -> Result<ChainId, VaultError> {
        let catalog = Catalog::load(&self.services.store, &self.services.keys)?;
        Ok(catalog.machines.get(&self.machine).map_or(self.chain, |known| known.chain))
    }

    /// What an earlier session left in the journal belongs to a history that another writer has replaced.
    fn quarantine(&mut self, reason: &str) {
        let dropped = Record::Dropped { chain: self.chain, reason: reason.to_owned() };
        let no_gap = Record::Note { chain: self.chain, kind: GAP_NOTE, bytes: bytes::Bytes::new() };
        for record in [dropped, no_gap] {
            if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
                tracing::warn!(chain = %self.chain, %error, "a journaled tail could not be dropped");
            }
        }
    }

    fn journal_session(&self) {
        let head = self.writer.head();
        let head = Manifest { number: ManifestNumber(head.number), nonce: ManifestNonce(head.nonce.0) };
        let session = Session { machine: self.machine, generation: self.writer.generation(), head };
        let record = Record::SessionOpened { chain: self.chain, session };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, "a session could not be noted in the journal");
        }
    }

    /// Whether everything that came before is in the vault or safely journaled, so that a sender can be greeted. Call
    /// [`Pipeline::step`] until it is.
    pub fn is_ready_to_greet(&self) -> bool {
        self.loaded == self.journaled && self.flying.is_none() && self.heal.is_none()
    }

    /// Judges a sender's first message and begins a session.
    ///
    /// # Errors
    /// As [`Pipeline::step`]: the new generation could not be opened.
    pub fn greet(
        &mut self,
        hello: &Hello,
        machine: MachineId,
        live: Option<InstanceId>,
    ) -> Result<Greeted, VaultError> {
        let empty = self.earlier.is_empty() && self.writer.state().layers.is_empty() && self.below.is_none();
        let known = Remembered {
            machine,
            chain: self.chain,
            stream: self.stream.filter(|(sequence, _)| *sequence == self.journaled),
            committed: self.writer.through(),
            incomplete: !self.open_gaps.is_empty(),
            last_boot: self.last_boot,
            live,
            empty,
        };
        let (continues, need) = match greet(hello, &known) {
            Greeting::Refuse { code, reason } => return Ok(Greeted::Refused(Message::Refuse { code, reason })),
            Greeting::Continue { need } => (true, need),
            Greeting::Renew { need, cause } => {
                self.renew(&cause)?;
                (false, need)
            }
        };
        self.last_boot = Some((hello.boot, hello.vm_generation));
        for geometry in &hello.disks {
            self.note_geometry(self.journaled, geometry.clone());
        }
        if !self.pending.geometries.is_empty() {
            self.touch();
        }
        let (_, hash) = self.stream.unwrap_or((self.journaled, StreamHash::default()));
        let start = SessionStart {
            chain: self.chain,
            generation: self.writer.generation(),
            journaled: self.journaled,
            hash,
            committed: self.writer.through(),
            last_point: self.last_point,
            planner: self.planner.clone(),
            continues,
            need,
            // A sender that lacks something tells of its break in its place.
            in_gap: !self.open_gaps.is_empty(),
            base_empty: empty,
            window_bytes: self.services.pace.window_bytes,
            wall: PointTime(self.services.clock.wall().0),
        };
        let (receiver, welcome) = Receiver::start(hello, start);
        Ok(Greeted::Accepted(Box::new(receiver), welcome))
    }

    /// Continuity is lost: everything so far is committed, then the next generation begins with a gap.
    fn renew(&mut self, cause: &str) -> Result<(), VaultError> {
        if self.open_gaps.is_empty() {
            // Complete requests up to here are a legal prefix: its end can still be opened.
            if let Some(cut) = self.planner.close(CutKind::GenerationEnd) {
                self.pending.cuts.push(cut);
            }
            let time = self.last_point.max(PointTime(self.services.clock.wall().0));
            let at = self.journaled;
            self.note_gap(at, time, cause);
            self.open_gap(at, time, cause.to_owned());
        }
        self.commit_everything()?;
        let Services { store, session, keys, .. } = &self.services;
        let history = ChainHistory::load(store, keys, self.chain)?;
        if history.head != self.writer.head() {
            return Err(VaultError::Fenced { number: history.head.number });
        }
        self.earlier = history.layers();
        self.writer = ChainWriter::open_generation(store, session, keys, &history, cause, Delta::default())?;
        self.view = None;
        self.planner = CutPlanner::default();
        self.stream = Some((self.journaled, StreamHash::default()));
        self.journal_session();
        Ok(())
    }

    fn commit_everything(&mut self) -> Result<(), VaultError> {
        while self.pending.since.is_some() || self.flying.is_some() {
            if self.flying.is_none() {
                let content = self.cut_off();
                match self.prepare(&content) {
                    Ok(prepared) => {
                        let through = super::commit::prepared_through(&content, self.writer.through());
                        self.flying = Some(super::commit::Flying { prepared, through, content });
                    }
                    Err(error) => {
                        self.put_back(content);
                        return Err(error);
                    }
                }
            }
            let Some(flying) = self.flying.take() else { continue };
            match self.writer.put(&flying.prepared) {
                Ok(()) => self.record_commit(&flying),
                Err(VaultError::NumberBurnt { .. }) => self.put_back(flying.content),
                Err(error) => {
                    self.flying = Some(flying);
                    return Err(error);
                }
            }
        }
        self.view = None;
        Ok(())
    }
}

/// Whether the journal's tail continues the chain's head: the last generation is the journal's own session's, by this
/// writer, and nobody came between.
fn continues(state: &ChainState, history: &ChainHistory, services: &Services) -> bool {
    let last = history.generation();
    let ours = last.writer == services.session.keys().writer();
    state.dropped.is_none()
        && ours
        && state.session.is_some_and(|session| session.generation == last.generation)
        && state.last >= history.through
}

fn chain_of(
    services: &Services,
    entropy: &dyn Entropy,
    machine: MachineId,
    hello: Option<&Hello>,
) -> Result<ChainId, VaultError> {
    let mut catalog = Catalog::load(&services.store, &services.keys)?;
    if let Some(known) = catalog.machines.get(&machine) {
        return Ok(known.chain);
    }
    let chain = ChainId(entropy.bytes());
    let entry = CatalogEntry::MachineProtected {
        machine,
        name: hello.map_or_else(String::new, |hello| hello.name.clone()),
        chain,
        disks: hello.map(|hello| hello.disks.clone()).unwrap_or_default(),
    };
    catalog.append(&services.store, &services.keys, &services.session, &entry)?;
    // Two servers may have named a chain at once: the catalog's order decides.
    Ok(catalog.machines.get(&machine).map_or(chain, |known| known.chain))
}

/// The chain below a branch, as a view through the same caches.
fn parent_view(services: &Services, history: &ChainHistory) -> Result<Option<ViewBelow>, VaultError> {
    let Some(parent) = history.parent else { return Ok(None) };
    let below = ChainHistory::load(&services.store, &services.keys, parent.chain)?;
    let grandparent = parent_view(services, &below)?;
    let view = ChainView::new(Arc::clone(&services.source), below.layers(), grandparent);
    Ok(Some(ViewBelow { view: Arc::new(view), at: parent.sequence }))
}
