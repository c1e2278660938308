//! The branch host: opens branches at a moment of a chain's history, and opens them again after a crash.
//!
//! ```text
//! open ──► serving ◄──reopen── (killed)
//!             ├── discard ────► ended
//!             └── failed back ► ended; the machine follows the branch's chain
//! ```
//!
//! A branch's state on its host is a directory: `branch.json` (what it is), `journal/` (writes that are not in the
//! vault), and, where the vault's store is read-only, `local/` (the branch's own chain). `branch.json` is made before
//! the chain, so that whatever a crash interrupts, reopening finishes it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent::capture::{MemoryMapStore, ProtectedDisk, Splitter, SplitterConfig};
use process_server::journal::{
    HostKey, Journal, JournalConfig, Manifest as JournalManifest, ManifestNonce, ManifestNumber, Record, Replayed,
    Session,
};
use replication::geometry::SECTOR_BYTES;
use replication::{
    ChainId, Change, Cut, CutKind, DiskGeometry, DiskId, Generation, MachineId, MarkerKind, PointTime, Position,
};
use serde::{Deserialize, Serialize};
use vault::layer::LayerRef;
use vault::view::ViewBelow;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{
    Catalog, CatalogEntry, ChainHistory, ChainWriter, Delta, FolderStore, GapScope, GeometryChange, Moment, Point,
    Points, Store, StoreError, UnlockedVault, VaultError, WriterSession,
};
use world::{Clock, Entropy, Files, RealFiles, Subfolder, durable};

use crate::branch::{Branch, BranchInfo, Ending};
use crate::core::{BranchCore, CoreParts, SealConfig};
use crate::device::BranchDisk;
use crate::error::BranchError;
use crate::history_view::view_of;
use crate::identity::Identity;
use crate::layered_store::LayeredStore;
use crate::limits;
use crate::read_ahead::{ReadAheadConfig, SharedReadAhead};

/// Where a branch's own chain is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Keep {
    /// In the vault; on this host if the vault's store takes no writes.
    #[default]
    VaultIfWritable,
    /// On this host, whatever the store would take.
    Local,
}

/// How branches are served.
#[derive(Debug, Clone, Copy)]
pub struct BranchConfig {
    /// How writes are sealed.
    pub seal: SealConfig,
    /// Memory for what was read, shared by all branches of the host.
    pub cache: CacheBytes,
    /// Largest size of one branch's journal, in bytes.
    pub journal_bytes_max: u64,
    /// How far to read ahead.
    pub read_ahead: ReadAheadConfig,
    /// Send buffer of a failback, in bytes; memory is used only as it fills.
    pub ring_bytes_max: u64,
    /// Where the branch's chain is kept.
    pub keep: Keep,
    /// How long a write waits for room before it fails.
    pub room_wait: Duration,
}

impl Default for BranchConfig {
    fn default() -> BranchConfig {
        BranchConfig {
            seal: SealConfig::default(),
            cache: CacheBytes::default(),
            journal_bytes_max: 1 << 30,
            read_ahead: ReadAheadConfig::default(),
            ring_bytes_max: 256 << 20,
            keep: Keep::default(),
            room_wait: limits::ROOM_WAIT,
        }
    }
}

/// The state file. Versioned; unknown fields are errors.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StateFile {
    version: u16,
    branch: String,
    name: String,
    machine: String,
    parent_chain: String,
    parent_sequence: u64,
    point_time_ns: u64,
    reason: String,
    local: bool,
    /// Stands in the reason of every generation that this state opened: tells its own writing from another's.
    token: String,
    pub(crate) ended: Option<String>,
}

const STATE_VERSION: u16 = 1;

impl StateFile {
    pub(crate) fn store(&self, files: &dyn Files, entropy: &dyn Entropy) -> Result<(), BranchError> {
        let bytes = serde_json::to_vec_pretty(self).expect("texts and numbers serialize");
        let unique = ChainId(entropy.bytes()).to_string();
        durable::replace(files, &format!("{}/branch.json", self.branch), &bytes, &unique)
            .map_err(BranchError::state("written"))
    }

    fn info(&self) -> Result<BranchInfo, BranchError> {
        let broken = |_| BranchError::state("understood")(std::io::ErrorKind::InvalidData.into());
        let chain = self.parent_chain.parse().map_err(broken)?;
        Ok(BranchInfo {
            branch: self.branch.parse().map_err(broken)?,
            name: self.name.clone(),
            machine: self.machine.parse().map_err(broken)?,
            parent: Position { chain, sequence: replication::SequenceNumber(self.parent_sequence) },
            point_time: PointTime(self.point_time_ns),
            reason: self.reason.clone(),
            local: self.local,
            ended: self.ended.clone(),
        })
    }
}

/// What keeps other processes away from a branch for as long as it is held; a kill lets go of it.
pub(crate) type Claim = Option<std::fs::File>;

/// Opens branches of one vault and keeps their state below one directory.
pub struct BranchHost {
    vault: UnlockedVault,
    /// Where `files` are, for locks and sockets; `None` if they are in no file system.
    root: Option<PathBuf>,
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    config: BranchConfig,
    source: Arc<FrameSource>,
    identity: Identity,
    /// Signs that a failover stands when its branch comes home, if that is at hand.
    operator: Option<Arc<WriterSession>>,
}

impl BranchHost {
    /// A host that keeps its state below the directory `root`, which must exist.
    pub fn new(
        vault: UnlockedVault,
        root: impl Into<PathBuf>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        config: BranchConfig,
    ) -> BranchHost {
        let root = root.into();
        let files: Arc<dyn Files> = Arc::new(RealFiles::new(&root));
        BranchHost { root: Some(root), ..BranchHost::on_files(vault, files, clock, entropy, config) }
    }

    /// A host that keeps its state in `files`. The caller makes sure that it is the only one.
    pub fn on_files(
        vault: UnlockedVault,
        files: Arc<dyn Files>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        config: BranchConfig,
    ) -> BranchHost {
        let source = Arc::new(FrameSource::new(Arc::clone(vault.store()), Arc::clone(vault.keys()), config.cache));
        let operator = vault.owner_session(&entropy, &clock).ok().map(Arc::new);
        let identity = Identity::new(vault.clone(), Arc::clone(&files), Arc::clone(&clock), Arc::clone(&entropy));
        BranchHost { vault, root: None, files, clock, entropy, config, source, identity, operator }
    }

    /// The same host with an operator's session: a failover is committed with it when its branch comes home.
    pub fn with_operator(self, operator: Arc<WriterSession>) -> BranchHost {
        BranchHost { operator: Some(operator), ..self }
    }

    /// The session that writes branches to the vault. With the vault owner's key at hand, a host without a grant gets one.
    ///
    /// # Errors
    /// [`BranchError::NotGranted`] if there is neither.
    pub fn writer(&self) -> Result<Arc<WriterSession>, BranchError> {
        self.identity.of_vault()
    }

    /// The session that writes the chain of this branch.
    fn session_of(&self, info: &BranchInfo) -> Result<Arc<WriterSession>, BranchError> {
        if info.local { self.identity.of_host() } else { self.identity.of_vault() }
    }

    /// The vault.
    pub fn vault(&self) -> &UnlockedVault {
        &self.vault
    }

    /// Where a branch's state is.
    pub fn directory(&self, branch: ChainId) -> PathBuf {
        self.root.clone().unwrap_or_default().join(branch.to_string())
    }

    /// The chain that `machine` follows.
    ///
    /// # Errors
    /// [`BranchError::NoMachine`] if the vault does not protect it.
    pub fn chain_of(&self, machine: MachineId) -> Result<ChainId, BranchError> {
        let catalog = Catalog::load(self.vault.store(), self.vault.keys())?;
        catalog.machines.get(&machine).map(|machine| machine.chain).ok_or(BranchError::NoMachine(machine))
    }

    /// Opens `chain` at `moment` as a new branch.
    ///
    /// # Errors
    /// [`BranchError::Point`] says what can be opened instead.
    pub fn open(&self, chain: ChainId, moment: &Moment, name: &str) -> Result<Branch, BranchError> {
        self.open_as(ChainId(self.entropy.bytes()), chain, moment, name)
    }

    /// As [`BranchHost::open`], under an id that was chosen before: a failover names its branch before it exists.
    ///
    /// # Errors
    /// As [`BranchHost::open`].
    pub fn open_as(&self, branch: ChainId, chain: ChainId, moment: &Moment, name: &str) -> Result<Branch, BranchError> {
        let history = ChainHistory::load(self.vault.store(), self.vault.keys(), chain)?;
        let point = Points::new(self.vault.store(), self.vault.keys(), &history).resolve(moment)?;
        let state = StateFile {
            version: STATE_VERSION,
            branch: branch.to_string(),
            name: name.to_owned(),
            machine: history.machine.to_string(),
            parent_chain: chain.to_string(),
            parent_sequence: point.cut.sequence.0,
            point_time_ns: point.cut.time.0,
            reason: point.reason.clone(),
            local: self.config.keep == Keep::Local,
            token: ChainId(self.entropy.bytes()).to_string(),
            ended: None,
        };
        let info = state.info()?;
        let lock = self.lock(info.branch)?;
        self.store_state(&state)?;
        let disks = disks_at(&history, &point)?;
        let below = ViewBelow { view: view_of(&self.source, &history)?, at: point.cut.sequence };
        self.begin(state, info, disks, below, lock)
    }

    /// Opens a branch of this host again, after a restart or a crash.
    ///
    /// # Errors
    /// [`BranchError::TakenOver`], [`BranchError::Ended`], [`BranchError::InUse`], [`BranchError::NoBranch`].
    pub fn reopen(&self, branch: ChainId) -> Result<Branch, BranchError> {
        let state = self.load_state(branch)?;
        let info = state.info()?;
        if let Some(reason) = state.ended {
            return Err(BranchError::Ended { branch, reason });
        }
        let lock = self.lock(branch)?;
        // Whoever wrote what was just read may have failed to make it durable.
        self.files.sync_directory(&branch.to_string()).map_err(BranchError::state("written"))?;
        let source = self.source_of(&info)?;
        match ChainHistory::load(source.store(), source.keys(), branch) {
            Ok(history) => self.resume(state, info, source, history, lock),
            // Killed between the state file and the chain's first manifest.
            Err(VaultError::WrongChainState { .. }) => {
                let history = ChainHistory::load(self.vault.store(), self.vault.keys(), info.parent.chain)?;
                // The same disks as before the kill: not those that the point lacks.
                let moment = Moment::Sequence(info.parent.sequence);
                let point = Points::new(self.vault.store(), self.vault.keys(), &history).resolve(&moment)?;
                let disks = disks_at(&history, &point)?;
                let below = ViewBelow { view: view_of(&self.source, &history)?, at: info.parent.sequence };
                self.begin(state, info, disks, below, lock)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The branches that this host has state of, ended ones included.
    ///
    /// # Errors
    /// If the directory cannot be read; state files that cannot be understood are left out and logged.
    pub fn list(&self) -> Result<Vec<BranchInfo>, BranchError> {
        let names = self.files.list_directories("").map_err(BranchError::state("listed"))?;
        let branches = names.iter().filter_map(|name| name.parse::<ChainId>().ok());
        let infos = branches.filter_map(|branch| match self.load_state(branch).and_then(|state| state.info()) {
            Ok(info) => Some(info),
            Err(error) => {
                tracing::warn!(%branch, %error, "the state of a branch cannot be read");
                None
            }
        });
        Ok(infos.collect())
    }

    fn load_state(&self, branch: ChainId) -> Result<StateFile, BranchError> {
        let bytes = match self.files.read(&format!("{branch}/branch.json")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(BranchError::NoBranch(branch)),
            other => other.map_err(BranchError::state("read"))?,
        };
        let state: StateFile =
            serde_json::from_slice(&bytes).map_err(|error| BranchError::state("understood")(error.into()))?;
        if state.version != STATE_VERSION {
            let what = format!("it has version {}, this program knows {STATE_VERSION}", state.version);
            return Err(BranchError::state("understood")(std::io::Error::other(what)));
        }
        Ok(state)
    }

    fn store_state(&self, state: &StateFile) -> Result<(), BranchError> {
        state.store(&*self.files, &*self.entropy)
    }

    /// Keeps other processes away for as long as the returned file is open; a kill lets go of it.
    fn lock(&self, branch: ChainId) -> Result<Claim, BranchError> {
        self.files.create_directory(&branch.to_string()).map_err(BranchError::state("written"))?;
        if self.root.is_none() {
            return Ok(None);
        }
        let path = self.directory(branch).join("lock");
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(BranchError::state("locked"))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(BranchError::InUse(branch)),
            Err(error) => Err(BranchError::state("locked")(error.into())),
        }
    }

    /// Where a branch's chain is read from and written to.
    fn source_of(&self, info: &BranchInfo) -> Result<Arc<FrameSource>, BranchError> {
        if !info.local {
            return Ok(Arc::clone(&self.source));
        }
        // From here on what this host signed by itself is believed.
        self.identity.of_host()?;
        let folder = format!("{}/local", info.branch);
        self.files.create_directory(&folder).map_err(BranchError::state("written"))?;
        let shown = self.directory(info.branch).join("local").display().to_string();
        let files = Arc::new(Subfolder::new(Arc::clone(&self.files), folder));
        let upper: Arc<dyn Store> = Arc::new(FolderStore::new(files, &*self.entropy, shown));
        let store: Arc<dyn Store> = Arc::new(LayeredStore::new(upper, Arc::clone(self.vault.store())));
        Ok(Arc::new(FrameSource::new(store, Arc::clone(self.vault.keys()), self.config.cache)))
    }

    /// Makes the branch's chain. Everything it needs is in the state file already.
    fn begin(
        &self,
        mut state: StateFile,
        mut info: BranchInfo,
        disks: Vec<DiskGeometry>,
        below: ViewBelow,
        lock: Claim,
    ) -> Result<Branch, BranchError> {
        if disks.is_empty() {
            return Err(BranchError::NoDisks(info.parent.chain));
        }
        let mut source = self.source_of(&info)?;
        let mut below = below;
        let base = Generation(1).base();
        let opened = PointTime(self.clock.wall().0).max(info.point_time);
        let delta = Delta {
            through: base,
            proven_through: opened,
            geometries: disks.iter().map(|disk| GeometryChange { sequence: base, geometry: disk.clone() }).collect(),
            // The branch can itself be opened before anything was written to it.
            cuts: vec![Cut {
                sequence: base,
                time: opened,
                kind: CutKind::Marker { kind: MarkerKind::Crash, name: "branch opened".into() },
            }],
            ..Delta::default()
        };
        let keys = self.vault.keys();
        let genesis = (info.machine, Some(info.parent));
        let create = |source: &Arc<FrameSource>, session: &Arc<WriterSession>| {
            ChainWriter::create(source.store(), session, keys, info.branch, genesis, delta.clone())
        };
        // A vault that takes no writes takes no grant either.
        let session = self.session_of(&info);
        let created = session.and_then(|session| Ok(create(&source, &session)?));
        let writer = match created {
            Err(BranchError::Vault(VaultError::Store(StoreError::ReadOnly { .. }))) if !info.local => {
                tracing::warn!(branch = %info.branch, "the store is read-only: source not fenced, point not pinned");
                state.local = true;
                info.local = true;
                self.store_state(&state)?;
                source = self.source_of(&info)?;
                below = self.below_through(&source, &info)?;
                let session = self.identity.of_host()?;
                ChainWriter::create(source.store(), &session, keys, info.branch, genesis, delta.clone())?
            }
            created => created?,
        };
        if info.local && !Arc::ptr_eq(below.view.source(), &source) {
            below = self.below_through(&source, &info)?;
        }
        self.pin(&info)?;
        let journal = self.open_journal(&info)?.0;
        self.serve(
            state,
            info,
            Start { source, disks, below, writer, journal, older: Vec::new(), tail: Vec::new(), uncut: None, opened },
            lock,
        )
    }

    fn below_through(&self, source: &Arc<FrameSource>, info: &BranchInfo) -> Result<ViewBelow, BranchError> {
        let history = ChainHistory::load(source.store(), source.keys(), info.parent.chain)?;
        Ok(ViewBelow { view: view_of(source, &history)?, at: info.parent.sequence })
    }

    /// Says in the catalog that the branch exists and needs its parent's history.
    fn pin(&self, info: &BranchInfo) -> Result<(), BranchError> {
        if info.local {
            return Ok(());
        }
        let mut catalog = Catalog::load(self.vault.store(), self.vault.keys())?;
        if !catalog.branches.contains_key(&info.branch) {
            let entry = CatalogEntry::BranchOpened {
                chain: info.branch,
                parent: info.parent,
                name: info.name.clone(),
                pinned: true,
            };
            let session = self.identity.of_vault()?;
            catalog.append(self.vault.store(), self.vault.keys(), &session, &entry)?;
        }
        Ok(())
    }

    fn open_journal(&self, info: &BranchInfo) -> Result<(Journal, process_server::journal::Recovered), BranchError> {
        let directory = format!("{}/journal", info.branch);
        self.files.create_directory(&directory).map_err(BranchError::state("written"))?;
        let host = HostKey::load_or_create(&*self.files, &directory, &*self.entropy)?;
        let config = JournalConfig::new(self.config.journal_bytes_max);
        Ok(Journal::open(Arc::clone(&self.files), Arc::clone(&self.entropy), &directory, config, &host)?)
    }

    /// Goes on with a chain that exists, under its next generation.
    fn resume(
        &self,
        state: StateFile,
        info: BranchInfo,
        source: Arc<FrameSource>,
        mut history: ChainHistory,
        lock: Claim,
    ) -> Result<Branch, BranchError> {
        let below = self.below_through(&source, &info)?;
        let (journal, _) = self.open_journal(&info)?;
        let reason = format!("the branch was opened again by its host {}", state.token);
        let session = self.session_of(&info)?;
        let writer = loop {
            // Only what nobody else has continued may be followed by what this journal holds.
            let foreign = |reason: &Option<String>| reason.as_ref().is_some_and(|text| !text.ends_with(&state.token));
            if history.generations.iter().any(|generation| foreign(&generation.reason)) {
                return Err(BranchError::TakenOver { branch: info.branch });
            }
            let delta = Delta::default();
            match ChainWriter::open_generation(source.store(), &session, self.vault.keys(), &history, &reason, delta) {
                // A manifest of the killed process arrived late: look again.
                Err(VaultError::Fenced { .. }) => {
                    history = ChainHistory::load(source.store(), source.keys(), info.branch)?;
                }
                other => break other?,
            }
        };
        let mut tail: Vec<Change> = Vec::new();
        journal.changes_of(info.branch).after(history.through).visit(|item| {
            if let Replayed::Record(Record::Changes { changes, .. }) = item {
                tail.extend(changes);
            }
            ControlFlow::<()>::Continue(())
        })?;
        // A file begun after a failure repeats changes whose first copy turned out to be durable after all.
        tail.sort_by_key(|change| change.sequence);
        tail.dedup_by_key(|change| change.sequence);
        let last_cut = history.last_cut();
        let uncut = last_cut.is_none_or(|(sequence, _)| sequence < history.through).then_some(history.through);
        let opened = history.proven_through.max(last_cut.map_or(PointTime(0), |(_, time)| time));
        tracing::info!(branch = %info.branch, generation = writer.generation().0, tail = tail.len(), "branch reopened");
        self.pin(&info)?;
        let disks = history.geometry_at(history.through);
        let older = history.layers();
        let start = Start { source, disks, below, writer, journal, older, tail, uncut, opened };
        self.serve(state, info, start, lock)
    }

    fn serve(&self, state: StateFile, info: BranchInfo, mut start: Start, lock: Claim) -> Result<Branch, BranchError> {
        let head = start.writer.head();
        let session = Session {
            machine: info.machine,
            generation: start.writer.generation(),
            head: JournalManifest { number: ManifestNumber(head.number), nonce: ManifestNonce(head.nonce.0) },
        };
        start.journal.append(&Record::SessionOpened { chain: info.branch, session })?;
        start.journal.sync()?;
        let disks = start.disks.clone();
        let core = Arc::new(BranchCore::recover(CoreParts {
            source: start.source,
            session: self.session_of(&info)?,
            clock: Arc::clone(&self.clock),
            config: self.config.seal,
            disks: start.disks,
            below: start.below,
            writer: start.writer,
            older_layers: start.older,
            journal: start.journal,
            tail: start.tail,
            uncut: start.uncut,
            last_point: start.opened,
        })?);
        let ahead = SharedReadAhead::default();
        let protected = disks
            .iter()
            .map(|geometry| {
                let clock = Arc::clone(&self.clock);
                let config = self.config.read_ahead;
                let device = BranchDisk::new(Arc::clone(&core), clock, geometry, config, Arc::clone(&ahead));
                let device = device.with_room_wait(self.config.room_wait);
                ProtectedDisk { geometry: geometry.clone(), device: Arc::new(device) }
            })
            .collect();
        let config = SplitterConfig {
            machine: info.machine,
            boot: self.entropy.bytes(),
            ring_bytes_max: self.config.ring_bytes_max,
        };
        let (splitter, capture) = Splitter::open(protected, &MemoryMapStore::new(), Arc::clone(&self.clock), config)?;
        let directory = self.directory(info.branch);
        let session = self.session_of(&info)?;
        Ok(Branch {
            info,
            core,
            splitter,
            capture: Mutex::new(Some(capture)),
            ahead,
            ending: Ending {
                files: Arc::clone(&self.files),
                entropy: Arc::clone(&self.entropy),
                vault: self.vault.clone(),
                session,
                operator: self.operator.clone(),
                state: Mutex::new(state),
            },
            clock: Arc::clone(&self.clock),
            entropy: Arc::clone(&self.entropy),
            directory,
            finished: AtomicBool::new(false),
            _claim: lock,
        })
    }
}

/// What a branch starts to serve from.
struct Start {
    source: Arc<FrameSource>,
    disks: Vec<DiskGeometry>,
    below: ViewBelow,
    writer: ChainWriter,
    journal: Journal,
    older: Vec<LayerRef>,
    tail: Vec<Change>,
    uncut: Option<replication::SequenceNumber>,
    opened: PointTime,
}

/// The disks that can be used at `point`: those that a gap hides altogether are left out.
fn disks_at(history: &ChainHistory, point: &Point) -> Result<Vec<DiskGeometry>, BranchError> {
    let hidden = |disk: DiskId| {
        point.lacking.iter().any(|gap| matches!(&gap.scope, GapScope::Disks(disks) if disks.contains(&disk)))
    };
    let mut disks = history.geometry_at(point.cut.sequence);
    disks.retain(|disk| !hidden(disk.disk) && disk.size_bytes > 0 && disk.size_bytes % SECTOR_BYTES == 0);
    if disks.is_empty() { Err(BranchError::NoDisks(history.chain)) } else { Ok(disks) }
}
