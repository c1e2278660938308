//! Opening a pipeline: where it is judged what of the journal goes on, and a generation is opened.
//!
//! A process server that starts finds a journal and a vault. If the chain's head is still its own session's, the
//! journaled tail is committed under a new generation with its old numbers; if somebody else wrote since, the tail is
//! quarantined and the source heals.

use std::sync::Arc;

use replication::cut::{CutPlanner, PointTime};
use replication::wire::Hello;
use replication::{ChainId, MachineId, SequenceNumber, StreamHash};
use vault::catalog::{Catalog, CatalogEntry};
use vault::chain::{GenerationHistory, Phase};
use vault::keys::ObjectNonce;
use vault::manifest::{Delta, Gap, GapScope, GeometryChange};
use vault::view::{ChainView, ViewBelow};
use vault::{ChainHistory, ChainWriter, RolledBack, VaultError};
use world::{Entropy, Monotonic};

use super::commit::Pending;
use super::gaps::OpenGap;
use super::{Pipeline, PipelineError, Services};
use crate::ingest::ReadBack;
use crate::journal::{ChainState, JournalError, Manifest, ManifestNonce, ManifestNumber, Record, Session};
use crate::notes::{DISKS_NOTE, GAP_NOTE};

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
    /// The machine was failed over: nobody writes to its chain.
    #[error(
        "the history of this machine was closed by a failover to the branch {successor}, and what it writes here is not \
         recorded; {}",
        if *.ended {
            "the failover is committed: bring the branch home with `farshore failback`"
        } else {
            "bring the branch home with `farshore failback`, or, if this machine is to go on as it is, take the failover \
             back with `farshore failover cancel`"
        }
    )]
    Closed {
        /// The branch that goes on instead.
        successor: ChainId,
        /// The failover is committed.
        ended: bool,
    },
    /// The journal does not take the number of the manifest that is to open a generation.
    #[error("the journal does not take what is about to be committed for machine {machine}")]
    Journal {
        /// The machine.
        machine: MachineId,
        /// Why.
        #[source]
        source: Arc<JournalError>,
    },
    /// This server may not write any more.
    #[error(
        "this process server's grant was revoked; join the machine to another one, or grant this server again with \
         `farshore vault grant` after moving its writer.keys aside"
    )]
    Revoked,
}

/// Why a generation was not opened.
pub(super) enum Unopened {
    Vault(VaultError),
    Journal(Arc<JournalError>),
}

impl From<VaultError> for Unopened {
    fn from(error: VaultError) -> Unopened {
        Unopened::Vault(error)
    }
}

impl Unopened {
    fn of_machine(self, machine: MachineId) -> OpenError {
        match self {
            Unopened::Vault(VaultError::ChainClosed { successor, ended, .. }) => OpenError::Closed { successor, ended },
            Unopened::Vault(VaultError::Revoked { .. }) => OpenError::Revoked,
            Unopened::Vault(source) => OpenError::Vault { machine, source },
            Unopened::Journal(source) => OpenError::Journal { machine, source },
        }
    }

    pub(super) fn of_chain(self, chain: ChainId) -> PipelineError {
        match self {
            Unopened::Vault(VaultError::Fenced { .. }) => PipelineError::Fenced { chain },
            Unopened::Vault(source) => PipelineError::Vault { chain, source },
            Unopened::Journal(source) => PipelineError::Intent { chain, source },
        }
    }
}

/// Has number and nonce of an opening manifest durable in the journal before it is put. A server that is killed in between,
/// or does not hear that it won, finds its own generation at the chain's end and knows it: its journal's tail goes on.
pub(super) fn announce(
    services: &Services,
    chain: ChainId,
) -> impl FnMut(u64, ObjectNonce) -> Result<(), Unopened> + use<> {
    let log = Arc::clone(&services.log);
    move |number, nonce| {
        let manifest = Manifest { number: ManifestNumber(number), nonce: ManifestNonce(nonce.0) };
        log.append_durably(Record::Intent { chain, manifest }).map_err(Unopened::Journal)
    }
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
        let opened = chain_of(&services, entropy, machine, hello).map_err(Unopened::from).and_then(|chain| {
            match ChainHistory::find(&services.store, &services.keys, chain)? {
                None => Pipeline::create(services, machine, chain, hello),
                Some(history) => Pipeline::resume(services, machine, history, hello, journal(chain)),
            }
        });
        opened.map_err(|error| error.of_machine(machine))
    }

    fn create(
        services: Services,
        machine: MachineId,
        chain: ChainId,
        hello: Option<&Hello>,
    ) -> Result<Pipeline, Unopened> {
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
        let genesis = (machine, None);
        let announce = announce(&services, chain);
        let writer = ChainWriter::create_announced(store, session, keys, chain, genesis, delta, announce)?;
        let mut pipeline = Pipeline::around(services, machine, writer, Vec::new(), None);
        pipeline.open_gaps = vec![OpenGap::of_machine(SequenceNumber(0))];
        pipeline.geometries = geometries;
        pipeline.journal_session();
        Ok(pipeline)
    }

    fn resume(
        services: Services,
        machine: MachineId,
        history: ChainHistory,
        hello: Option<&Hello>,
        journal: Option<ChainState>,
    ) -> Result<Pipeline, Unopened> {
        let rolled_back = match &journal {
            Some(state) => lacks_committed(state, &history, &services)?,
            None => None,
        };
        if let Some(rolled_back) = &rolled_back {
            tracing::error!(%machine, "{rolled_back}; its points since are gone, and the disks are compared by hash");
        }
        let own = journal.filter(|state| rolled_back.is_none() && continues(state, &history, &services));
        let gaps = history.gaps();
        let mut open_gaps: Vec<OpenGap> = gaps.iter().filter(|gap| gap.until.is_none()).map(OpenGap::of).collect();
        let is_in_gap = open_gaps.iter().any(|gap| gap.scope == GapScope::Machine);
        // Nothing is missing if the sender still has all that is not in the vault: a drained move, or a loss without loss.
        let past = history.stream();
        let handed_over = hello.and_then(|hello| handed_over(hello, &history)).filter(|_| own.is_none() && !is_in_gap);
        // A journal that has seen other changes of these numbers would not take them again.
        let seen = services.log.last(history.chain).unwrap_or(SequenceNumber(u64::MAX));
        let handed_over = handed_over.filter(|_| seen <= history.through);
        let reason = match (&own, &handed_over) {
            (Some(_), _) => "the process server started",
            (None, Some(_)) => "another process server goes on",
            (None, None) if rolled_back.is_some() => "the vault was rolled back, or restored from an older copy",
            (None, None) => "a process server took over",
        };
        let mut delta = Delta::default();
        if own.is_none() && handed_over.is_none() && !is_in_gap {
            // Whatever was journaled elsewhere and not committed is missing here.
            let time = PointTime(services.clock.wall().0).max(history.proven_through);
            let gap = Gap { after: history.through, scope: GapScope::Machine, time, cause: reason.into(), until: None };
            open_gaps.push(OpenGap::of(&gap));
            delta.gaps_opened.push(gap);
        }
        let below = parent_view(&services, &history)?;
        let Services { store, session, keys, .. } = &services;
        let announce = announce(&services, history.chain);
        let writer = ChainWriter::open_generation_announced(store, session, keys, &history, reason, delta, announce)?;
        let mut pipeline = Pipeline::around(services, machine, writer, history.layers(), below);
        pipeline.past = past;
        pipeline.open_gaps = open_gaps;
        pipeline.known_gaps = gaps.into_iter().map(|gap| (gap.after, gap.time, gap.scope)).collect();
        pipeline.geometries = history.geometry_at(SequenceNumber(u64::MAX));
        pipeline.last_point = history.proven_through.max(history.last_cut().map_or(PointTime(0), |(_, time)| time));
        match own {
            Some(state) => {
                pipeline.tell_intent(&state, &history);
                pipeline.removal_noted = state.notes.contains_key(&DISKS_NOTE);
                // What was dropped used its numbers up, and is nowhere.
                let tail = if state.has_uncommitted() { state.last } else { history.through };
                pipeline.journaled = tail.max(history.through);
                pipeline.loaded = history.through;
                pipeline.replay_through = pipeline.journaled;
                pipeline.stream = pipeline.stream_at_end(&state);
                pipeline.touch();
            }
            None => {
                pipeline.quarantine(reason);
                pipeline.stream = handed_over;
            }
        }
        pipeline.drop_closed_tail(&history)?;
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
            scrubs: std::collections::VecDeque::new(),
            open_gaps: Vec::new(),
            last_point: writer.proven_through(),
            planner: CutPlanner::default(),
            journaled: through,
            loaded: through,
            replay_through: SequenceNumber(0),
            known_gaps: Vec::new(),
            stream: None,
            past: None,
            proven: writer.proven_through(),
            skew_ns: 0,
            proof_committed_at: Monotonic(0),
            retry_at: Monotonic(0),
            last_boot: None,
            geometries: Vec::new(),
            announced: Vec::new(),
            renewing: None,
            removal_noted: false,
            heal_begun: SequenceNumber(0),
            wake: Arc::new(|| {}),
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

    /// Says what became of the manifest that was on its way when the server ended. Only for people: the next generation
    /// opens behind whatever head there is.
    fn tell_intent(&self, state: &ChainState, history: &ChainHistory) {
        let Some(intent) = state.intent else { return };
        let nonce = vault::keys::ObjectNonce(intent.nonce.0);
        let won = history.contains(&self.services.store, &self.services.keys, intent.number.0, nonce);
        match won {
            Ok(won) => tracing::info!(chain = %self.chain, number = intent.number.0, won, "a manifest was on its way"),
            Err(error) => tracing::warn!(chain = %self.chain, %error, "a manifest that was on its way cannot be read"),
        }
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

    /// What was journaled of the parent chain when a failover closed it, and was not committed, never will be: once that is
    /// decided, its room in the journal is given back.
    fn drop_closed_tail(&self, history: &ChainHistory) -> Result<(), VaultError> {
        let Services { store, keys, log, .. } = &self.services;
        let Some(parent) = history.parent else { return Ok(()) };
        let journaled = log.last(parent.chain).unwrap_or_default();
        if journaled == SequenceNumber::default() {
            return Ok(());
        }
        let Some(before) = ChainHistory::find(store, keys, parent.chain)? else { return Ok(()) };
        if !matches!(before.standing.phase, Phase::Ended(_)) || journaled <= before.through {
            return Ok(());
        }
        let reason = "the machine's history goes on along a branch".to_owned();
        if let Err(error) = log.append(Record::Dropped { chain: parent.chain, reason }, Box::new(|_| {})) {
            tracing::warn!(chain = %parent.chain, %error, "the tail of a closed chain could not be dropped");
        }
        Ok(())
    }

    pub(super) fn journal_session(&self) {
        let head = self.writer.head();
        let head = Manifest { number: ManifestNumber(head.number), nonce: ManifestNonce(head.nonce.0) };
        let session = Session { machine: self.machine, generation: self.writer.generation(), head };
        let record = Record::SessionOpened { chain: self.chain, session };
        if let Err(error) = self.services.log.append(record, Box::new(|_| {})) {
            tracing::warn!(chain = %self.chain, %error, "a session could not be noted in the journal");
        }
    }
}

/// What the sender's stream is at the vault's end, if it still has everything that comes after: it was told that this much
/// is durable, and no more, and both know the same hash of the stream up to there.
fn handed_over(hello: &Hello, history: &ChainHistory) -> Option<(SequenceNumber, StreamHash)> {
    let resume = hello.resume.as_ref()?;
    let goes_on = resume.chain == history.chain
        && resume.generation <= history.generation().generation
        && resume.released == history.through
        && history.stream() == Some((resume.released, resume.hash));
    goes_on.then_some((resume.released, resume.hash))
}

/// Whether the vault lacks manifests that this server knows to be committed: then its journal, which let go of what they
/// held, continues nothing, and only a comparison tells what the vault has.
fn lacks_committed(
    state: &ChainState,
    history: &ChainHistory,
    services: &Services,
) -> Result<Option<RolledBack>, VaultError> {
    let (chain, found) = (history.chain, history.head.number);
    let committed = state.committed.map_or(0, |(_, number)| number.0);
    if found < committed {
        return Ok(Some(RolledBack { chain, seen: committed, found }));
    }
    let Some(Session { head, .. }) = state.session else { return Ok(None) };
    let (seen, nonce) = (head.number.0, ObjectNonce(head.nonce.0));
    let known = history.contains(&services.store, &services.keys, seen, nonce)?;
    Ok((!known).then_some(RolledBack { chain, seen, found }))
}

/// Whether the journal's tail continues the chain's head: the last generation is the journal's own session's, by this
/// writer, and nobody came between.
fn continues(state: &ChainState, history: &ChainHistory, services: &Services) -> bool {
    let ours = services.session.keys().writer();
    let of_session = |last: &GenerationHistory| {
        last.writer == ours && state.session.is_some_and(|session| session.generation == last.generation)
    };
    if state.dropped.is_some() || state.last < history.through {
        return false;
    }
    match &history.generations[..] {
        [.., last] if of_session(last) => true,
        // Opened behind that session to go on with this very tail, by a server that was killed then, or did not hear that it
        // had won. Without a tail nothing tells it from the beginning of another stream.
        [.., session, last] => {
            of_session(session)
                && last.writer == ours
                && last.opened == history.head.number
                && is_intended(state, history, services)
                && state.released <= history.through
                && state.last > history.through
        }
        _ => false,
    }
}

/// Whether the head is the manifest that the journal knows to have been on its way.
fn is_intended(state: &ChainState, history: &ChainHistory, services: &Services) -> bool {
    // The journal knows it even if this process itself put it, after the state was recovered.
    let intent = services.log.intent(history.chain).unwrap_or_default().or(state.intent);
    let head = history.head;
    intent.is_some_and(|intent| intent.number.0 == head.number && intent.nonce.0 == head.nonce.0)
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
