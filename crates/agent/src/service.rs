//! The running agent: serves the protected disks over NBD and keeps replicating what is written to them.
//!
//! Threads: one engine ([`drive`], woken by [`bell`]), one per NBD connection, one for the control socket, one that moves the
//! link's bytes, one that looks at the devices ([`disk_set`]).
//! Disks are served before and whether or not a process server can be reached: protection never stops a machine.
//!
//! Order at start: lock, identity, disks, dirty maps, NBD, engine, control. Order of an orderly end: control, NBD, capture
//! closed (disks flushed, maps say so), what is left in the ring, good-bye. A kill at any moment costs a comparison of
//! what the maps name, after a reboot of everything.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use link::{Connector, DenyList, LinkIdentity, LinkRuntime, Trust};
use nbd::{DeviceExport, ExportTable, Listen, Server, ServerHandle, ServerOptions};
use replication::limits::HEAL_WINDOW_BYTES;
use replication::sender::{KeptStream, SenderConfig};
use replication::wire::OfferHashes;
use replication::{ByteRange, Epoch, InstanceId, MachineId, PointTime, Ranges};
use world::{Access, Clock, Entropy, SystemEntropy};

use crate::capture::{Capture, Frozen, MapStoreError};
use crate::config::AgentConfig;
use crate::consistency::frozen::FrozenFileSystems;
use crate::consistency::{Consistency, ConsistencyStatus, left_over};
use crate::disks::{self, DiskRegister, FoundDisk, Moment};
use crate::engine::Engine;
use crate::hardware::MachineDescription;
use crate::heal_pace::HealPace;
use crate::scrub::Scrubber;
use crate::state::{self, StateDir};
use crate::status::{
    AgentStatus, CertificateStatus, HealStatus, LinkStatus, NbdStatus, ProtectionState, RingStatus, STATUS_FORMAT,
    Watermarks, WriteStatus,
};
use crate::system::SystemRoot;

pub(crate) mod bell;
pub mod control;
mod detach;
mod disk_set;
mod drive;
pub(crate) mod marks;
pub mod problem;
mod renewal;
pub mod source;
mod uplink;

pub use detach::detach;

use bell::Bell;
use control::ControlServer;
use disk_set::{DiskSet, DiskWatch};
use drive::{Command, Drive, Orders};
use marks::Points;
use problem::Problem;
use renewal::Renewal;
use source::{CaptureKind, Source, choose_capture};
use uplink::Uplink;

/// Threads that encrypt and move the link's bytes.
const LINK_THREADS: usize = 1;
/// Commands that wait for the engine at most.
const COMMANDS_MAX: usize = 16;
/// Bytes of large requests and replies in flight over all NBD connections: a part of the memory that an agent may take
/// besides its ring.
const NBD_BYTES_MAX: usize = 8 << 20;
/// How long a start waits for a predecessor that is just ending, and how often it looks.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(2);
const PREDECESSOR_POLL: Duration = Duration::from_millis(20);
/// How long writes in flight may take to end when the agent stops.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// How long a stop waits for the process server to take what is left in the ring.
const DRAIN_LIMIT: Duration = Duration::from_secs(3);

/// What a start needs besides the configuration.
pub struct ServiceOptions {
    /// Names of disks that may have shrunk or been replaced.
    pub accept_disks: Vec<String>,
    /// The machine's clock.
    pub clock: Arc<dyn Clock>,
}

/// A freeze that was asked for and not yet ended.
pub(crate) struct HeldFreeze {
    pub(crate) held: Held,
    /// Writes may go on from here on.
    pub(crate) until: world::Monotonic,
}

/// What is at rest.
pub(crate) enum Held {
    /// The disks that are used through the agent.
    Gate(Frozen),
    /// File systems of this machine, and the note that they are: removed after the thaw.
    FileSystems(FrozenFileSystems, left_over::Note),
}

impl Held {
    /// Ends it; whether it held until now.
    fn end(self, clock: &dyn Clock) -> bool {
        match self {
            Held::Gate(frozen) => frozen.holds(),
            Held::FileSystems(frozen, _note) => frozen.thaw(clock).1,
        }
    }
}

/// What the threads of one agent share.
pub(crate) struct Shared {
    pub(crate) source: Source,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) commands: Orders,
    status: Mutex<AgentStatus>,
    started: world::Monotonic,
    pub(crate) consistency: Consistency,
    frozen: Mutex<Option<HeldFreeze>>,
    nbd: Mutex<Option<ServerHandle>>,
    stop: Mutex<Option<String>>,
    /// None until everything runs.
    disks: Mutex<Option<DiskSet>>,
    /// What the engine's thread left when it ended in order.
    pub(crate) kept: Mutex<Option<(Epoch, KeptStream)>>,
    stop_wanted: Condvar,
    aborted: AtomicBool,
}

impl Shared {
    pub(crate) fn status(&self) -> MutexGuard<'_, AgentStatus> {
        lock(&self.status)
    }

    /// The status as of now.
    pub(crate) fn snapshot(&self) -> AgentStatus {
        let mut status = self.status().clone();
        status.uptime_s = self.clock.monotonic().since(self.started).as_secs();
        status.writes = self.source.writes();
        status.scan = self.source.scan();
        status.consistency = self.consistency.status();
        if let Some(nbd) = lock(&self.nbd).as_ref() {
            status.nbd.connections = nbd.connections() as u64;
        }
        status
    }

    pub(crate) fn frozen(&self) -> MutexGuard<'_, Option<HeldFreeze>> {
        lock(&self.frozen)
    }

    pub(crate) fn request_stop(&self, why: &str) {
        lock(&self.stop).get_or_insert_with(|| why.to_owned());
        self.stop_wanted.notify_all();
    }

    /// Takes the disks of the configuration file at `path`. See [`DiskSet::reload`].
    pub(crate) fn reload(&self, path: &Path) -> Result<(Vec<String>, bool), Problem> {
        match lock(&self.disks).as_mut() {
            Some(disks) => disks.reload(path, self),
            None => Err(Problem::failed("the configuration was not read again", "the agent is starting", "try again")),
        }
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::SeqCst)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks a running agent to end, from any thread.
#[derive(Clone)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Lets [`Service::wait`] return.
    pub fn request(&self, why: &str) {
        self.0.request_stop(why);
    }
}

/// Has a running agent read its configuration again, from any thread.
#[derive(Clone)]
pub struct Reloader(Arc<Shared>);

impl Reloader {
    /// Takes the disks of the configuration file at `path`, or says why not: then everything goes on as before.
    ///
    /// # Errors
    /// What is wrong with the file or a disk that it names.
    pub fn reload(&self, path: &Path) -> Result<Vec<String>, Problem> {
        self.0.reload(path).map(|(changes, _)| changes)
    }
}

/// A running agent. Dropping it ends it as a kill would: the ring is lost, the maps are not.
pub struct Service {
    shared: Arc<Shared>,
    points: Option<Points>,
    watch: Option<DiskWatch>,
    renewal: Option<Renewal>,
    control: Option<ControlServer>,
    engine: Option<JoinHandle<()>>,
    state: StateDir,
    nbd_tcp: Vec<std::net::SocketAddr>,
    _lock: File,
}

impl Service {
    /// Starts an agent. On return the disks are served; the process server need not be there.
    ///
    /// # Errors
    /// What is wrong and what to do about it, one entry for each disk if disks are the matter. Nothing runs then.
    pub fn start(config: &AgentConfig, options: ServiceOptions) -> Result<Service, Vec<Problem>> {
        config.check().map_err(|problem| vec![problem])?;
        // First of all: the state directory itself may still be frozen.
        for done in left_over::clear_up(&config.state_dir, Some(&config.consistency), &*options.clock) {
            tracing::warn!(done, "an agent was killed while it took a point");
        }
        let state = StateDir::open(&config.state_dir).map_err(|problem| vec![problem])?;
        let guard = patiently(|| state.lock()).map_err(|problem| vec![problem])?;
        let mut register = DiskRegister::load(&state).map_err(|problem| vec![problem])?;
        let (kind, instead) = choose_capture(config).map_err(|problem| vec![problem])?;
        match (kind, instead) {
            (CaptureKind::Scan, Some(why)) => tracing::warn!(
                why,
                "no eBPF: the disks are scanned, so points exist only where they rest; `farshore-agent check` says more"
            ),
            (_, Some(why)) => {
                tracing::info!(
                    why,
                    "the disks are captured by the splitter: only writes made through the agent are seen"
                );
            }
            (_, None) => {}
        }
        let access = match kind {
            CaptureKind::Splitter => Access::ReadWrite,
            CaptureKind::Ebpf | CaptureKind::Scan => Access::ReadOnly,
        };
        let found = disks::find(&config.disks, access, &mut register, &options.accept_disks)?;
        if kind == CaptureKind::Splitter {
            disks::lock(&found)?;
        }
        assemble(config, options, state, guard, register, found, kind).map_err(|problem| vec![problem])
    }

    /// What it says about itself now.
    pub fn status(&self) -> AgentStatus {
        self.shared.snapshot()
    }

    /// TCP addresses on which the disks are served, with the ports that the system chose.
    pub fn nbd_tcp(&self) -> &[std::net::SocketAddr] {
        &self.nbd_tcp
    }

    /// A way to end it from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    /// A way to have it read its configuration again, from another thread.
    pub fn reloader(&self) -> Reloader {
        Reloader(self.shared.clone())
    }

    /// Waits until somebody asks it to stop; who that was.
    pub fn wait(&self) -> String {
        let mut stop = lock(&self.shared.stop);
        loop {
            match stop.as_ref() {
                Some(why) => return why.clone(),
                None => stop = self.shared.stop_wanted.wait(stop).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Ends it in order: disks are flushed and no longer served, the maps record it, what is left in the ring is sent
    /// if the process server takes it soon. The next start compares nothing but what was not committed.
    ///
    /// # Errors
    /// The disks are no longer served, but the next start has to compare.
    pub fn stop(mut self) -> Result<(), Problem> {
        drop(self.points.take());
        drop(self.watch.take());
        drop(self.renewal.take());
        drop(self.shared.frozen().take());
        drop(self.control.take());
        let nbd = lock(&self.shared.nbd).take();
        if let Some(nbd) = nbd {
            nbd.stop();
        }
        let closed = self.shared.source.close(CLOSE_LIMIT);
        let finish = Command::Finish { within: DRAIN_LIMIT };
        if self.shared.commands.send(finish).is_ok()
            && let Some(engine) = self.engine.take()
            && engine.join().is_err()
        {
            tracing::error!("the replication thread ended by a fault of the program");
        }
        closed.map_err(|error| {
            Problem::caused(
                "the disks were not closed in order",
                &error,
                "the next start compares them; look at the disks",
            )
        })?;
        let kept = lock(&self.shared.kept).take().filter(|_| !self.shared.source.used_past_the_agent());
        if let Err(error) = self.state.keep_stream(kept.as_ref()) {
            tracing::warn!(error = problem::chain(&error), "the next start begins with a heal");
        }
        lock(&self.shared.disks).as_mut().map_or(Ok(()), DiskSet::close)?;
        if self.shared.source.scan().is_some() {
            tracing::info!("stopped in order; the next start compares the disks");
        } else if self.shared.source.used_past_the_agent() {
            tracing::info!("stopped in order; the kernel goes on capturing (`farshore-agent detach` ends that)");
        } else {
            tracing::info!("stopped in order; the next start compares only what the dirty maps name");
        }
        Ok(())
    }

    /// Ends it at once, as a kill would.
    pub fn abort(self) {
        drop(self);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.shared.aborted.store(true, Ordering::SeqCst);
        self.shared.commands.wake();
        drop(self.points.take());
        drop(self.watch.take());
        drop(self.renewal.take());
        drop(self.shared.frozen().take());
        drop(self.control.take());
        drop(lock(&self.shared.nbd).take());
        if let Some(engine) = self.engine.take() {
            // A panic was logged when it happened.
            let _ = engine.join();
        }
        if let Some(disks) = lock(&self.shared.disks).as_ref() {
            disks.unlock();
        }
    }
}

/// Everything after the disks were found. What can fail and leaves nothing behind comes first; a start that fails after the
/// disks were opened closes them again, and keeps what the next one goes on with.
fn assemble(
    config: &AgentConfig,
    options: ServiceOptions,
    state: StateDir,
    guard: File,
    mut register: DiskRegister,
    found: Vec<FoundDisk>,
    kind: CaptureKind,
) -> Result<Service, Problem> {
    let identity = state.joined_identity()?;
    let machine = MachineId(identity.peer.id);
    let enrolment = state.enrolment();
    let addresses = choose(&config.server_addresses, &enrolment.server_addresses);
    if addresses.is_empty() {
        return Err(Problem::usage(
            "no process server is known",
            "neither the configuration nor the join token named one",
            "set server_addresses in the configuration",
        ));
    }
    let host = state::host_name();
    let name = [&config.machine_name, &enrolment.machine_name, &host].into_iter().find(|name| !name.is_empty());
    let name = name.cloned().unwrap_or_else(|| machine.to_string());
    let boot = state::boot_id()?;
    let bell = Bell::new()
        .map(Arc::new)
        .map_err(|error| Problem::caused("the agent cannot start", &error, "raise the limit of open files"))?;
    let uplink = uplink(identity, addresses, options.clock.clone(), bell.clone())?;
    let find_server = find_server(config, &state, options.clock.clone(), bell.clone());
    let (engine_thread, drive) = engine_thread()?;

    let (source, capture) = Source::open(kind, config, &state, &found, options.clock.clone(), machine, boot)?;
    let (commands, received) = mpsc::sync_channel(COMMANDS_MAX);
    let shared = Arc::new(Shared {
        status: Mutex::new(first_status(config, kind, machine, &name, &found)),
        started: options.clock.monotonic(),
        source,
        clock: options.clock.clone(),
        commands: Orders::new(commands, bell.clone()),
        consistency: Consistency::new(config, &state),
        frozen: Mutex::new(None),
        nbd: Mutex::new(None),
        stop: Mutex::new(None),
        disks: Mutex::new(None),
        kept: Mutex::new(None),
        stop_wanted: Condvar::new(),
        aborted: AtomicBool::new(false),
    });
    let engine = engine(config, &options, &state, &found, capture, machine, &name, boot).inspect_err(|_| {
        close_unused(&shared);
    })?;
    let begin = |register: &mut DiskRegister| -> Result<_, Problem> {
        // Only now: what made a disk doubtful is forgotten when its new state is recorded.
        register.store(&state, &found, Moment::Started)?;
        let nbd_tcp = serve_disks(config, &found, &shared)?;
        Ok((nbd_tcp, ControlServer::start(&config.control_socket(), shared.clone())?, Points::start(&shared)?))
    };
    let (nbd_tcp, control, points) =
        begin(&mut register).inspect_err(|_| give_up(&shared, &engine, &state, &mut register, &found))?;
    let proof_every = Duration::from_millis(config.proof_every_ms);
    let work = Drive::new(engine, uplink, find_server, (received, bell), proof_every, shared.clone());
    drive.send(work).expect("the engine's thread waits for its work");
    describe_machine(&shared);
    tracing::info!(
        machine = shared.status().machine,
        disks = found.len(),
        nbd = %config.nbd_socket().display(),
        "the agent serves the disks"
    );
    *lock(&shared.disks) = Some(DiskSet::new(kind, state.clone(), config.clone(), register, found));
    let watch = if kind == CaptureKind::Ebpf {
        let started = DiskWatch::start(&shared);
        started
            .inspect_err(|error| tracing::warn!(%error, "disks that grow or vanish are noticed by a reload only"))
            .ok()
    } else {
        None
    };
    let renewal = Renewal::start(&shared, state.clone(), config.server_addresses.clone())
        .inspect_err(|error| tracing::warn!(%error, "the certificate is renewed by the next start only"))
        .ok();
    Ok(Service {
        shared,
        points,
        watch,
        renewal,
        control: Some(control),
        engine: Some(engine_thread),
        state,
        nbd_tcp,
        _lock: guard,
    })
}

/// Has the process server told what this machine is made of, by a thread of its own: an initramfs takes a while to read.
fn describe_machine(shared: &Arc<Shared>) {
    let commands = shared.commands.clone();
    let read = move || {
        let document = MachineDescription::read(&SystemRoot::running()).document();
        // An agent that has ended needs none.
        let _ = commands.send(Command::Describe { document });
    };
    if let Err(error) = thread::Builder::new().name("hardware".to_owned()).spawn(read) {
        tracing::warn!(%error, "the machine is not described to the process server");
    }
}

/// The engine's thread, which waits for its work: if there is none to be had, nothing was touched yet. It ends when the
/// way to tell it is dropped.
fn engine_thread() -> Result<(JoinHandle<()>, SyncSender<Drive>), Problem> {
    let (tell, work) = mpsc::sync_channel::<Drive>(1);
    let run = move || {
        if let Ok(drive) = work.recv() {
            drive.run();
        }
    };
    let thread = thread::Builder::new().name("engine".to_owned()).spawn(run);
    let thread =
        thread.map_err(|error| Problem::caused("the agent cannot start", &error, "raise the limit of threads"))?;
    Ok((thread, tell))
}

/// Closes disks that a start opened in vain. Whether that is in order: then a reboot costs no comparison.
fn close_unused(shared: &Shared) -> bool {
    drop(lock(&shared.nbd).take());
    let closed = shared.source.close(CLOSE_LIMIT);
    if let Err(error) = &closed {
        tracing::warn!(error = problem::chain(error), "the disks were not closed in order");
    }
    closed.is_ok()
}

/// Undoes a start that failed. If nothing was written meanwhile, the next one goes on with the stream.
fn give_up(
    shared: &Shared,
    engine: &Engine<Box<dyn Capture>>,
    state: &StateDir,
    register: &mut DiskRegister,
    found: &[FoundDisk],
) {
    if !close_unused(shared) || shared.source.used_past_the_agent() {
        return;
    }
    let kept = engine.keep().filter(|_| shared.source.writes().changes == 0);
    let kept = state.keep_stream(kept.as_ref()).map_err(|error| problem::chain(&error));
    let stored = register.store(state, found, Moment::Stopped).map_err(|problem| problem.to_string());
    if let Err(error) = kept.and(stored) {
        tracing::warn!(error, "the next start begins with a heal");
    }
}

/// Every address known. One where another installation listens now costs an attempt, nothing else.
fn choose(configured: &[String], enrolled: &[String]) -> Vec<String> {
    let mut addresses = configured.to_vec();
    addresses.extend(enrolled.iter().filter(|address| !configured.contains(address)).cloned());
    addresses
}

/// Makes the way to the server that the state directory names when it is called.
fn find_server(config: &AgentConfig, state: &StateDir, clock: Arc<dyn Clock>, bell: Arc<Bell>) -> drive::FindServer {
    let (configured, state) = (config.server_addresses.clone(), state.clone());
    Box::new(move || {
        let addresses = choose(&configured, &state.enrolment().server_addresses);
        uplink(state.joined_identity()?, addresses, clock.clone(), bell.clone())
    })
}

#[allow(clippy::too_many_arguments, reason = "called once; a struct would only repeat the names")]
fn engine(
    config: &AgentConfig,
    options: &ServiceOptions,
    state: &StateDir,
    found: &[FoundDisk],
    mut capture: Box<dyn Capture>,
    machine: MachineId,
    name: &str,
    boot: [u8; 16],
) -> Result<Engine<Box<dyn Capture>>, Problem> {
    let mark = state.cleared_mark();
    let unbroken = capture.unbroken().filter(|_| !mark.is_damaged());
    let kept = unbroken.and_then(|unbroken| Some((state.kept_stream(unbroken.ended_in)?, unbroken.lacking)));
    // Nobody writes before this: from the first write on, what it says is not so any more.
    state.keep_stream(None).map_err(|error| {
        Problem::caused("the state of the stream cannot be changed", &error, "make the state directory writable")
    })?;
    let mut joining = kept.as_ref().map(|(_, lacking)| lacking.clone()).unwrap_or_default();
    for disk in found {
        if let Some(why) = &disk.doubt {
            tracing::warn!(disk = disk.name, why, "the whole disk is compared");
            joining.push((disk.geometry.disk, ByteRange::new(0, disk.geometry.size_bytes), why.clone()));
        }
        if disk.doubt.is_some() || mark.is_damaged() {
            capture.require_whole(disk.geometry.disk);
        }
    }
    let sender = SenderConfig {
        machine,
        instance: InstanceId((&SystemEntropy as &dyn Entropy).bytes()),
        boot,
        vm_generation: [0; 16],
        started: PointTime(options.clock.wall().0),
        name: name.to_owned(),
        hashes: OfferHashes::Plain,
        rotate_every_ns: config.rotate_every_ms * 1_000_000,
        proof_every_ns: config.proof_every_ms * 1_000_000,
        heal_chunk_bytes: config.heal_chunk_bytes,
        heal_window_bytes: HEAL_WINDOW_BYTES,
    };
    let (clock, mark) = (options.clock.clone(), Box::new(mark));
    let mut engine = match kept {
        None => Engine::new(capture, sender, clock, None, mark),
        Some((kept, _)) => {
            for (disk, range, cause) in &joining {
                tracing::warn!(%disk, %range, cause, "it joins at the end of its own heal; everything else goes on");
            }
            let joining = joining.into_iter().map(|(disk, range, cause)| (Ranges::of([(disk, range)]), cause));
            Engine::resume(capture, sender, clock, mark, kept, joining.collect())
        }
    };
    engine.set_heal_pace(HealPace::new(config.limits));
    engine.set_scrub(Scrubber::new(config.scrub, Box::new(state.scrub_record()), options.clock.wall()));
    Ok(engine)
}

fn uplink(
    identity: LinkIdentity,
    addresses: Vec<String>,
    clock: Arc<dyn Clock>,
    bell: Arc<Bell>,
) -> Result<Uplink, Problem> {
    let runtime = LinkRuntime::new(LINK_THREADS)
        .map_err(|error| Problem::caused("the agent cannot start", &error, "raise the limit of threads"))?;
    let trust = Trust::new(identity.authority.clone(), clock.clone(), DenyList::default());
    let connector = Connector::new(runtime, identity, trust, clock.clone());
    Ok(Uplink::new(connector, addresses, clock, bell))
}

fn serve_disks(
    config: &AgentConfig,
    found: &[FoundDisk],
    shared: &Arc<Shared>,
) -> Result<Vec<std::net::SocketAddr>, Problem> {
    if shared.source.used_past_the_agent() {
        return Ok(Vec::new());
    }
    let exports = ExportTable::new();
    for disk in found {
        let Some(device) = shared.source.served(disk) else { continue };
        let export = DeviceExport::new(Arc::new(device)).described(format!("{} ({})", disk.name, disk.geometry.path));
        exports.insert(&disk.export, Arc::new(export));
    }
    let mut listen = vec![Listen::Unix(config.nbd_socket())];
    listen.extend(config.nbd_tcp.map(Listen::Tcp));
    let options = ServerOptions { in_flight_bytes_max: NBD_BYTES_MAX, ..ServerOptions::default() };
    let handle = Server::start(Arc::new(exports), options, &listen).map_err(|error| {
        Problem::caused("the disks cannot be served", &error, "change nbd_socket or nbd_tcp, or end who listens there")
    })?;
    let tcp = handle.tcp_addresses();
    shared.status().nbd.tcp = tcp.iter().map(ToString::to_string).collect();
    *lock(&shared.nbd) = Some(handle);
    Ok(tcp)
}

fn first_status(
    config: &AgentConfig,
    kind: CaptureKind,
    machine: MachineId,
    name: &str,
    found: &[FoundDisk],
) -> AgentStatus {
    AgentStatus {
        format: STATUS_FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_s: 0,
        machine: machine.to_string(),
        machine_name: name.to_owned(),
        state: ProtectionState::Starting,
        state_for_s: 0,
        reason: String::new(),
        capture: kind.name().to_owned(),
        scan: None,
        scrub: None,
        link: LinkStatus::default(),
        certificate: CertificateStatus::default(),
        watermarks: Watermarks::default(),
        ring: RingStatus { used_bytes: 0, max_bytes: config.ring_bytes_max },
        heal: HealStatus::default(),
        writes: WriteStatus::default(),
        disks: found.iter().map(FoundDisk::status).collect(),
        nbd: NbdStatus { socket: socket_text(config.nbd_socket()), ..NbdStatus::default() },
        consistency: ConsistencyStatus::default(),
    }
}

fn socket_text(path: PathBuf) -> String {
    path.display().to_string()
}

fn maps_problem(error: MapStoreError) -> Problem {
    Problem::caused(
        "the dirty maps cannot be used",
        &error,
        "stop the other agent, or make the state directory writable",
    )
}

/// Tries again for a moment: a predecessor that was just killed may not have let go yet.
fn patiently<T, E>(mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let attempts = PREDECESSOR_WAIT.as_millis() / PREDECESSOR_POLL.as_millis();
    for _ in 0..attempts {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(_) => thread::sleep(PREDECESSOR_POLL),
        }
    }
    attempt()
}
