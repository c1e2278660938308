//! The running process server: listens for agents, keeps one [`Machine`] for each, and shares journal, store and keys
//! among them.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::Duration;

use link::{Admission, Authority, Connection, LinkRuntime, Listener, PeerIdentity, Reception, Role};
use replication::{ChainId, MachineId};
use vault::keys::WriterSession;
use vault::pack::load_dedup;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{FolderStore, OpenKeys, Store, Vault, VaultError, WriterKeys, probe_create_only};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

use crate::config::ServerConfig;
use crate::feedback::Feedback;
use crate::journal::{ChainState, HostKey, Journal, JournalConfig, JournalThread, QueueConfig};
use crate::machine::{Machine, MachineStatus, chain_of_errors};
use crate::pipeline::Services;

/// Name of the file in the state directory that holds this server's right to write.
pub const WRITER_KEYS: &str = "writer.keys";
/// Directory of the certificate authority in the state directory.
pub const AUTHORITY: &str = "authority";
/// Held by the running server.
const LOCK: &str = "server.lock";
/// How often a running server looks whether its own certificate nears its end.
const IDENTITY_CHECK: Duration = Duration::from_secs(3600);
/// Directory of the journal in the state directory.
pub const JOURNAL: &str = "journal";

/// Why a server did not start, in three parts: what, why, what to do.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {why}\n  {what_to_do}")]
pub struct StartError {
    /// What could not be done.
    pub what: String,
    /// Why not.
    pub why: String,
    /// What to do about it.
    pub what_to_do: String,
}

fn cannot(what: &str, error: &dyn std::error::Error, what_to_do: &str) -> StartError {
    StartError { what: what.to_owned(), why: chain_of_errors(error), what_to_do: what_to_do.to_owned() }
}

/// Serves a connection whose peer is no agent, such as a branch host that brings a disk home.
pub type OtherPeers = Arc<dyn Fn(PeerIdentity, Connection) + Send + Sync>;

struct Shared {
    services: Services,
    entropy: Arc<dyn Entropy>,
    machines: Mutex<BTreeMap<MachineId, Arc<Machine>>>,
    /// What the journal held when the server started.
    recovered: Mutex<BTreeMap<ChainId, ChainState>>,
    stopping: AtomicBool,
    feedback: Feedback,
    others: Option<OtherPeers>,
}

impl Shared {
    fn machines(&self) -> MutexGuard<'_, BTreeMap<MachineId, Arc<Machine>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(self: &Arc<Self>, id: MachineId) -> std::io::Result<Arc<Machine>> {
        let mut machines = self.machines();
        if let Some(machine) = machines.get(&id).filter(|machine| machine.ended().is_none()) {
            return Ok(Arc::clone(machine));
        }
        let weak = Arc::downgrade(self);
        let journal = move |chain: ChainId| {
            let shared = weak.upgrade()?;
            // Kept: once a generation was opened on it, its session is no longer the chain's newest, which tells.
            let recovered = shared.recovered.lock().unwrap_or_else(PoisonError::into_inner);
            recovered.get(&chain).cloned()
        };
        let machine = Machine::start(id, self.services.clone(), Arc::clone(&self.entropy), journal)?;
        machines.insert(id, Arc::clone(&machine));
        Ok(machine)
    }
}

/// A running process server. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    address: std::net::SocketAddr,
    accepting: Option<thread::JoinHandle<()>>,
    journal: Option<Arc<JournalThread>>,
    /// Held until everything above has ended.
    lock: Option<File>,
}

/// Opens the folder that holds a vault.
///
/// # Errors
/// In three parts, for people.
pub fn open_folder(path: &std::path::Path, entropy: &dyn Entropy) -> Result<Arc<dyn Store>, StartError> {
    let store = FolderStore::open(path, entropy).map_err(|error| {
        let what = format!("the vault at {} cannot be used", path.display());
        cannot(&what, &error, "name the folder made by `farshore vault init`, and check who owns it")
    })?;
    Ok(Arc::new(store))
}

impl Server {
    /// Starts everything. Returns once agents can connect.
    ///
    /// # Errors
    /// [`StartError`], for people.
    pub fn start(config: &ServerConfig, others: Option<OtherPeers>) -> Result<Server, StartError> {
        let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        refuse_nested(config)?;
        let lock = lock(config)?;
        let files: Arc<dyn Files> = Arc::new(RealFiles::new(config.state_dir.clone()));
        let keys = writer_keys(config, &*files)?;
        let store = open_folder(&config.vault, &*entropy)?;
        let vault = Vault::open(Arc::clone(&store)).map_err(|error| {
            let what_to_do = match &error {
                VaultError::NotAVault { .. } => {
                    "name the vault's folder with `vault`, or make one with `farshore vault init`"
                }
                VaultError::NewerFormat { .. } => "upgrade this farshore; nothing was changed",
                VaultError::Damaged { .. } => "restore the object from another copy of the vault",
                _ => "check that the vault's store can be read, then start again",
            };
            cannot("the vault cannot be opened", &error, what_to_do)
        })?;
        if vault.id() != keys.vault {
            return Err(StartError {
                what: "the vault is another one than this server was granted".into(),
                why: format!("the folder holds vault {}, the grant is for {}", vault.id(), keys.vault),
                what_to_do: "correct `vault` in the configuration, or grant this server with `farshore vault grant`"
                    .into(),
            });
        }
        probe_create_only(&*store, &*entropy).map_err(|error| {
            cannot("the vault's store is not safe to write to", &error, "use a store that honours create-only writes")
        })?;
        let journal_config = JournalConfig::new(config.journal_bytes_max);
        let host = HostKey::load_or_create(&*files, JOURNAL, &*entropy)
            .map_err(|error| cannot("the journal's key cannot be used", &error, "check the state directory"))?;
        let (journal, recovered) =
            Journal::open(Arc::clone(&files), Arc::clone(&entropy), JOURNAL, journal_config, &host).map_err(
                |error| {
                    cannot(
                        "the journal cannot be read",
                        &error,
                        "move the journal directory aside: no announced point is lost, its machines heal",
                    )
                },
            )?;
        let journal = JournalThread::start(journal, journal_config, QueueConfig::default())
            .map_err(|error| cannot("the journal's thread cannot be started", &error, "check the process limits"))?;
        let journal = Arc::new(journal);
        let open_keys = Arc::new(OpenKeys::of_writer(&keys));
        let writer = keys.writer();
        let session = WriterSession::new(keys, Arc::clone(&entropy), Arc::clone(&clock))
            .map_err(|error| cannot("the writer's keys cannot be used", &error, "grant this server again"))?;
        let dedup = load_dedup(&store, &open_keys, writer, config.dedup_chunks_max)
            .map_err(|error| cannot("the packs' indexes cannot be read", &error, "run `farshore vault verify`"))?;
        for (pack, error) in &dedup.skipped {
            tracing::warn!(%pack, %error, "a pack's index is not used for deduplication");
        }
        let source = Arc::new(FrameSource::new(Arc::clone(&store), Arc::clone(&open_keys), CacheBytes::default()));
        let services = Services {
            store,
            session: Arc::new(session),
            keys: open_keys,
            dedup: Arc::new(RwLock::new(dedup.index)),
            source,
            log: journal.clone(),
            clock: Arc::clone(&clock),
            pace: config.pace(),
        };
        let authority = Authority::open(Arc::clone(&files), Arc::clone(&clock), Arc::clone(&entropy), AUTHORITY)
            .map_err(|error| cannot("the certificate authority cannot be used", &error, "check the state directory"))?;
        let shared = Arc::new(Shared {
            services,
            entropy,
            machines: Mutex::default(),
            recovered: Mutex::new(recovered.chains),
            stopping: AtomicBool::new(false),
            feedback: Feedback::new(&config.state_dir, &config.vault),
            others,
        });
        let authority = Arc::new(authority);
        let listener = listen(config, &authority, Arc::clone(&clock))?;
        let address = listener.address();
        commit_tails(&shared);
        let accepting = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("accept".into())
                .spawn(move || accept(&listener, &shared, &authority, &*clock))
                .map_err(|error| cannot("a thread cannot be started", &error, "check the process limits"))?
        };
        tracing::info!(%address, vault = %config.vault.display(), "the process server is ready");
        Ok(Server { shared, address, accepting: Some(accepting), journal: Some(journal), lock: Some(lock) })
    }

    /// Where agents connect.
    pub fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    /// The machines served since the start.
    pub fn machines(&self) -> Vec<(MachineId, MachineStatus)> {
        self.shared.machines().iter().map(|(id, machine)| (*id, machine.status())).collect()
    }

    /// Why this process can serve nobody any more, if that is so: stop it and start it again.
    pub fn failure(&self) -> Option<StartError> {
        let why = self.journal.as_ref()?.failure()?;
        Some(StartError {
            what: "the journal stopped".into(),
            why,
            what_to_do: "make room in the state directory or mend its disk, then start the server again: agents keep \
                         what it did not acknowledge"
                .into(),
        })
    }

    /// Commits what is pending and stops.
    pub fn stop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let machines: Vec<Arc<Machine>> = self.shared.machines().values().cloned().collect();
        for machine in machines {
            machine.stop();
        }
        self.journal = None;
        self.lock = None;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A vault inside the state directory, or the other way round, would be lost with it.
fn refuse_nested(config: &ServerConfig) -> Result<(), StartError> {
    std::fs::create_dir_all(&config.state_dir).map_err(|error| {
        let what = format!("the state directory {} cannot be made", config.state_dir.display());
        cannot(&what, &error, "name another with `state_dir`, or change who owns its parent")
    })?;
    let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    let (state, vault) = (real(&config.state_dir), real(&config.vault));
    if state.starts_with(&vault) {
        return Err(StartError {
            what: format!("the state directory {} lies in the vault", state.display()),
            why: "keys beside what they protect protect nothing".into(),
            what_to_do: "name another `state_dir`".into(),
        });
    }
    Ok(())
}

/// Keeps a second server off the state directory: two writers would destroy each other's journal.
fn lock(config: &ServerConfig) -> Result<File, StartError> {
    let path = config.state_dir.join(LOCK);
    let what = format!("the state directory {} cannot be locked", config.state_dir.display());
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| cannot(&what, &error, "run as the user it belongs to"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StartError {
            what: format!("another server runs on the state directory {}", config.state_dir.display()),
            why: "two servers with one journal would destroy it".into(),
            what_to_do: "stop the other one, or give this one a `state_dir` and a grant of its own".into(),
        }),
        Err(TryLockError::Error(error)) => Err(cannot(&what, &error, "keep it on a file system that locks")),
    }
}

fn writer_keys(config: &ServerConfig, files: &dyn Files) -> Result<WriterKeys, StartError> {
    let path = config.state_dir.join(WRITER_KEYS);
    let bytes = files.read(WRITER_KEYS).map_err(|error| {
        let what = format!("this server has no right to write: {} cannot be read", path.display());
        cannot(&what, &error, "grant it with `farshore vault grant --vault VAULT --state-dir DIR --label NAME`")
    })?;
    WriterKeys::from_bytes(&bytes).map_err(|error| {
        let what = format!("{} is damaged", path.display());
        cannot(
            &what,
            &error,
            "grant this server again with `farshore vault grant --vault VAULT --state-dir DIR --label NAME`",
        )
    })
}

fn listen(config: &ServerConfig, authority: &Arc<Authority>, clock: Arc<dyn Clock>) -> Result<Listener, StartError> {
    let what = format!("agents cannot connect at {}", config.listen);
    let runtime = LinkRuntime::new(2).map_err(|error| cannot(&what, &error, "check the process limits"))?;
    let identity = authority
        .own_identity(Role::ProcessServer)
        .map_err(|error| cannot(&what, &error, "check the state directory"))?;
    let trust = authority.trust();
    let reception = Reception::new(identity, trust, Some(Arc::clone(authority) as Arc<dyn Admission>), clock);
    Listener::bind(&runtime, &config.listen, reception)
        .map_err(|error| cannot(&what, &error, "name another address with `listen`, or stop what uses this one"))
}

/// Tails that a crash left in the journal are committed without waiting for their agents.
fn commit_tails(shared: &Arc<Shared>) {
    let tails: Vec<(ChainId, MachineId)> = {
        let recovered = shared.recovered.lock().unwrap_or_else(PoisonError::into_inner);
        recovered
            .iter()
            .filter(|(_, state)| state.has_uncommitted() && state.dropped.is_none())
            .filter_map(|(chain, state)| Some((*chain, state.session?.machine)))
            .collect()
    };
    for (chain, machine) in tails {
        tracing::info!(%machine, %chain, "committing what the journal holds");
        match shared.machine(machine) {
            Ok(machine) => machine.recover(chain),
            Err(error) => tracing::error!(%machine, %error, "a journaled tail cannot be committed"),
        }
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>, authority: &Authority, clock: &dyn Clock) {
    let mut looked = clock.monotonic();
    while !shared.stopping.load(Ordering::Acquire) {
        if clock.monotonic().since(looked) >= IDENTITY_CHECK {
            looked = clock.monotonic();
            // Renewed when it nears its end: a server may run for years.
            let shown = authority.own_identity(Role::ProcessServer).map_err(|error| error.to_string());
            let shown = shown.and_then(|it| listener.set_identity(&it).map_err(|error| error.to_string()));
            if let Err(error) = shown {
                tracing::error!(error, "this server's certificate cannot be renewed; it is tried again in an hour");
            }
        }
        match listener.accept(Duration::from_millis(100)) {
            Ok(Some((peer, connection))) => begin(shared, peer, connection),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "no more links can be accepted");
                return;
            }
        }
    }
}

fn begin(shared: &Arc<Shared>, peer: PeerIdentity, connection: Connection) {
    let shared = Arc::clone(shared);
    let started = thread::Builder::new().name("session".into()).spawn(move || {
        if peer.role != Role::Agent {
            match &shared.others {
                Some(others) => others(peer, connection),
                None => tracing::warn!(?peer, "a peer that is no agent connected; nothing here serves it"),
            }
            return;
        }
        let id = MachineId(peer.id);
        match shared.machine(id) {
            Ok(machine) => {
                tracing::info!(machine = %id, address = connection.address(), "an agent connected");
                let reason = machine.serve(connection, &shared.feedback);
                tracing::info!(machine = %id, reason, "an agent's session ended");
            }
            Err(error) => tracing::error!(machine = %id, %error, "a machine cannot be served"),
        }
    });
    if let Err(error) = started {
        tracing::error!(%error, "a session cannot be started");
    }
}
