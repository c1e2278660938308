//! The master target: a receiver whose journal is a disk.
//!
//! Changes are written in the order in which they arrive and synced before they are acknowledged; then they are
//! journaled and committed at once. Offers are compared with what the disk itself holds. What a heal reads lies below
//! every change after its `p0`: where the stream has written since, heal data is left out.
//!
//! A kill at any moment leaves a disk that is half one state and half another, and a durable note that says so. The next
//! session compares the whole disk again; only what differs travels.

mod visit;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use link::{FrameLink, LinkError};
use replication::cut::{CutPlanner, PointTime};
use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::offers::{differs, granule_differs, granule_leaves};
use replication::receiver::{self, Action, Event, Greeting, Receiver, Remembered, SessionStart};
use replication::wire::{HealContent, HealNeed, Hello, Message, OfferHashes, OfferedLeaf, RefusalCode};
use replication::{
    ChainId, Change, ChangeKind, DiskId, Generation, HealId, LeafHash, LeafKey, MachineId, PlainLeafHash, Ranges,
    SequenceNumber, StreamHash,
};
use serde::{Deserialize, Serialize};
use world::{BlockDevice, BlockError, Clock, Entropy, ExtentKind, Files, durable};

use self::visit::Order;
pub use self::visit::{HomeVisit, Visit};
use crate::home_disk::{HomeDisk, HomeDisks, HomeOrder, Refusal};
use crate::limits;
use crate::seats::Seats;
use crate::shield::Shield;

/// Why a session of a master target ended.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// The disks were refused; nothing was written.
    #[error("{0}")]
    Refused(Refusal),
    /// The link ended. The note stays: the disks are not usable.
    #[error("the link to the branch ended")]
    Link(#[from] LinkError),
    /// A newer session of the same failback took over.
    #[error("the branch host connected anew")]
    Replaced,
    /// The other side does not follow the protocol.
    #[error("the branch's messages make no sense: {0}")]
    Protocol(String),
    /// A home disk failed.
    #[error("the home disk {path} failed")]
    Disk {
        /// Which.
        path: String,
        /// How.
        #[source]
        source: BlockError,
    },
    /// The note about the failback cannot be kept.
    #[error("the state of the master target could not be written")]
    State(#[source] std::io::Error),
}

/// How a session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Equality was proved and the disks are usable.
    Completed,
    /// The owner asked to stop. The disks are not usable.
    Stopped,
}

/// A failback that is not finished, as the note says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeNote {
    version: u16,
    /// For people who find the file.
    pub meaning: String,
    /// The machine.
    pub machine: String,
    /// The chain that comes home.
    pub chain: String,
    /// The disks that are not usable.
    pub disks: Vec<HomeOrder>,
}

/// Serves failbacks on this host.
pub struct MasterTarget {
    files: Arc<dyn Files>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    disks: Arc<dyn HomeDisks>,
    seats: Seats,
}

/// How often a session without traffic looks whether it should stop.
const STOP_LOOK: Duration = Duration::from_millis(100);

impl MasterTarget {
    /// A master target that keeps its notes below `files` and finds its disks through `disks`, usually a
    /// [`HostView`](crate::HostView).
    pub fn new(
        files: Arc<dyn Files>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        disks: impl HomeDisks + 'static,
    ) -> MasterTarget {
        MasterTarget { files, clock, entropy, disks: Arc::new(disks), seats: Seats::default() }
    }

    /// Failbacks that are not finished: their disks are not usable.
    ///
    /// # Errors
    /// If the notes cannot be read.
    pub fn unfinished(&self) -> Result<Vec<HomeNote>, HomeError> {
        let names = self.files.list_files("").map_err(HomeError::State)?;
        let notes = names.iter().filter(|name| name.starts_with("failback-") && name.ends_with(".json"));
        let read = |name: &String| {
            let bytes = self.files.read(name).map_err(HomeError::State)?;
            serde_json::from_slice(&bytes).map_err(|error| HomeError::State(error.into()))
        };
        notes.map(read).collect()
    }

    /// Serves one branch host over `link` until the failback is complete, the link ends, or `stop` is set.
    ///
    /// # Errors
    /// See [`HomeError`]. Except after a refusal, connect again: the comparison starts over.
    pub fn serve(&self, link: &dyn FrameLink, stop: &AtomicBool) -> Result<Served, HomeError> {
        let mut visit = self.visit();
        while !stop.load(Ordering::Relaxed) {
            if visit.step(self, link, STOP_LOOK)? == Visit::Completed {
                return Ok(Served::Completed);
            }
        }
        Ok(Served::Stopped)
    }

    /// Begins to serve one branch host, for owners that step it themselves.
    pub fn visit(&self) -> HomeVisit {
        HomeVisit::new(self.clock.monotonic())
    }

    fn write_note(&self, order: &Order) -> Result<(), HomeError> {
        let note = HomeNote {
            version: 1,
            meaning: format!(
                "failback of chain {} in progress: these disks are not usable until it ends; start it again to go on",
                order.chain
            ),
            machine: order.machine.to_string(),
            chain: order.chain.to_string(),
            disks: order.disks.clone(),
        };
        let bytes = serde_json::to_vec_pretty(&note).map_err(|error| HomeError::State(error.into()))?;
        let unique = ChainId(self.entropy.bytes()).to_string();
        durable::replace(&*self.files, &order.note_name(), &bytes, &unique).map_err(HomeError::State)
    }

    fn remove_note(&self, order: &Order) -> Result<(), HomeError> {
        match self.files.remove(&order.note_name()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(HomeError::State(error)),
            _ => self.files.sync_directory("").map_err(HomeError::State),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Healing {
    heal: HealId,
    processed_bytes: u64,
    /// As much of it as the branch host was told of.
    told_bytes: u64,
}

/// One session: the pure receiver and the disks that it decides about. No threads, no links.
struct HomeSession {
    machine: MachineId,
    chain: ChainId,
    disks: BTreeMap<DiskId, Arc<HomeDisk>>,
    clock: Arc<dyn Clock>,
    receiver: Option<Receiver>,
    out: Vec<Message>,
    over: Option<String>,
    shields: BTreeMap<DiskId, Shield>,
    /// A heal began and has not ended: what the stream writes is remembered.
    shielding: bool,
    healing: Option<Healing>,
    key: Option<LeafKey>,
    /// What the disk held of the granules that were wanted of an offer, until their leaves are offered.
    kept: BTreeMap<u32, Vec<Option<LeafHash>>>,
    /// Newest change written.
    written: SequenceNumber,
    /// Newest change synced.
    synced: SequenceNumber,
    /// A heal whose end waits for the next sync.
    ended: Option<HealId>,
    unsynced: bool,
}

impl HomeSession {
    fn new(
        machine: MachineId,
        chain: ChainId,
        disks: BTreeMap<DiskId, Arc<HomeDisk>>,
        clock: Arc<dyn Clock>,
    ) -> HomeSession {
        HomeSession {
            machine,
            chain,
            disks,
            clock,
            receiver: None,
            out: Vec::new(),
            over: None,
            shields: BTreeMap::new(),
            shielding: false,
            healing: None,
            key: None,
            kept: BTreeMap::new(),
            written: SequenceNumber(0),
            synced: SequenceNumber(0),
            ended: None,
            unsynced: false,
        }
    }

    fn wall(&self) -> PointTime {
        PointTime(self.clock.wall().0)
    }

    fn message(&mut self, message: Message) -> Result<(), HomeError> {
        if let Message::Hello(hello) = &message {
            self.greet(hello);
            return Ok(());
        }
        let wall = self.wall();
        self.feed(Event::Received { message, wall })
    }

    /// Nothing is remembered of earlier sessions: each begins with a comparison of the whole disks.
    fn greet(&mut self, hello: &Hello) {
        let known = Remembered {
            machine: self.machine,
            chain: self.chain,
            stream: None,
            committed: SequenceNumber(0),
            incomplete: true,
            lacking: Ranges::default(),
            last_boot: None,
            live: None,
            empty: false,
        };
        if let Greeting::Refuse { code, reason } = receiver::greet(hello, &known) {
            return self.refuse(code, reason);
        }
        for geometry in &hello.disks {
            let fits = self.disks.get(&geometry.disk).is_some_and(|disk| geometry.size_bytes <= disk.device().size());
            if !fits {
                let reason = format!("{} was not ordered, or its home disk is too small", geometry.disk);
                return self.refuse(RefusalCode::Protocol, reason);
            }
        }
        let generation = hello.resume.as_ref().map_or(Generation(1), |resume| resume.generation.next());
        let start = SessionStart {
            chain: self.chain,
            generation,
            journaled: SequenceNumber(0),
            hash: StreamHash::default(),
            committed: SequenceNumber(0),
            last_point: PointTime(0),
            planner: CutPlanner::default(),
            continues: false,
            need: HealNeed::Whole,
            in_gap: true,
            base_empty: false,
            window_bytes: limits::WINDOW_BYTES,
            wall: self.wall(),
        };
        let (receiver, welcome) = Receiver::start(hello, start);
        self.receiver = Some(receiver);
        self.out.push(welcome);
    }

    fn refuse(&mut self, code: RefusalCode, reason: String) {
        self.out.push(Message::Refuse { code, reason: reason.clone() });
        self.over = Some(reason);
    }

    fn feed(&mut self, event: Event) -> Result<(), HomeError> {
        let Some(receiver) = &mut self.receiver else {
            self.over = Some("a message came before the greeting".into());
            return Ok(());
        };
        for action in receiver.apply(event) {
            self.execute(action)?;
        }
        Ok(())
    }

    fn execute(&mut self, action: Action) -> Result<(), HomeError> {
        match action {
            Action::Send(message) => self.out.push(message),
            Action::Append { changes, .. } => {
                for change in &changes {
                    self.write_change(change)?;
                }
            }
            Action::HealBegin { heal, hashes, .. } => match hashes {
                OfferHashes::Keyed(key) => {
                    self.key = Some(key);
                    self.kept.clear();
                    self.healing = Some(Healing { heal, processed_bytes: 0, told_bytes: 0 });
                }
                OfferHashes::Plain => self.over = Some("a branch comes home with keyed hashes".into()),
            },
            Action::Compare { heal, offer, disk, start, leaves } => {
                let wanted = self.compare(disk, start, &leaves)?;
                self.feed(Event::Compared { heal, offer, wanted })?;
            }
            Action::CompareGranules { heal, offer, disk, start, leaves, granules } => {
                let wanted = self.compare_granules(offer, disk, (start, leaves), &granules)?;
                self.feed(Event::Compared { heal, offer, wanted })?;
            }
            Action::CompareLeaves { heal, offer, leaves } => {
                let wanted = self.compare_leaves(offer, &leaves)?;
                self.feed(Event::Compared { heal, offer, wanted })?;
            }
            Action::HealData { heal, disk, range, content } => self.heal_data(heal, disk, range, content)?,
            Action::HealEnd { heal, .. } => {
                self.healing = None;
                self.shielding = false;
                self.shields.values_mut().for_each(Shield::clear);
                self.ended = Some(heal);
            }
            Action::HealAborted { cause, .. } => {
                tracing::info!(cause, "the comparison starts again");
                self.healing = None;
            }
            Action::Disconnect { reason } => self.over = Some(reason),
            // A disk has one state: points and gaps are the chain's.
            Action::Cut(_) | Action::GapOpened { .. } | Action::Proven { .. } => {}
        }
        Ok(())
    }

    fn disk(&self, disk: DiskId) -> Result<&HomeDisk, HomeError> {
        let found = self.disks.get(&disk).map(|disk| &**disk);
        found.ok_or_else(|| HomeError::Protocol(format!("{disk} was not ordered")))
    }

    fn write_change(&mut self, change: &Change) -> Result<(), HomeError> {
        self.written = change.sequence;
        self.unsynced = true;
        if let ChangeKind::HealStart { .. } = change.kind {
            // Whatever comes after lies above what the heal reads.
            self.shields.values_mut().for_each(Shield::clear);
            self.shielding = true;
            return Ok(());
        }
        let Some(range) = change.kind.range() else { return Ok(()) };
        let home = self.disk(change.disk)?;
        let device = home.device();
        let done = match &change.kind {
            ChangeKind::Write { data, .. } => device.write_at(range.start, data),
            ChangeKind::Zero { .. } => device.write_zeroes(range.start..range.end()),
            ChangeKind::Discard { .. } => device.discard(range.start..range.end()),
            ChangeKind::Marker { .. } | ChangeKind::Geometry(_) | ChangeKind::HealStart { .. } => Ok(()),
        };
        done.map_err(|source| failed(home, source))?;
        if self.shielding {
            self.shields.entry(change.disk).or_default().add(range);
        }
        if let Some(Healing { heal, .. }) = self.healing
            && self.shields.values().map(Shield::len).sum::<usize>() > limits::SHIELD_RANGES_MAX
        {
            self.healing = None;
            self.shields.values_mut().for_each(Shield::clear);
            let reason = "too many separate places were written during the comparison".into();
            self.feed(Event::HealFailed { heal, reason })?;
        }
        Ok(())
    }

    fn compare(&self, disk: DiskId, start: u64, leaves: &[OfferedLeaf]) -> Result<Vec<bool>, HomeError> {
        let home = self.disk(disk)?;
        let Some(key) = &self.key else { return Err(HomeError::Protocol("an offer came without a key".into())) };
        let end = (start + leaves.len() as u64 * LEAF_BYTES).min(home.order().size_bytes);
        let Some(range) = ByteRange::between(start, end) else { return Ok(vec![true; leaves.len()]) };
        let hashes = leaf_hashes(home.device(), range, key).map_err(|source| failed(home, source))?;
        let zero = key.zero_leaf();
        Ok(leaves.iter().zip(hashes).map(|(leaf, hash)| differs(*leaf, zero, hash)).collect())
    }

    /// Reads and hashes the range once; what may be asked about by leaf is kept.
    fn compare_granules(
        &mut self,
        offer: u32,
        disk: DiskId,
        (start, leaves): (u64, u64),
        granules: &[OfferedLeaf],
    ) -> Result<Vec<bool>, HomeError> {
        let home = self.disk(disk)?;
        let Some(key) = &self.key else { return Err(HomeError::Protocol("an offer came without a key".into())) };
        let end = (start + leaves * LEAF_BYTES).min(home.order().size_bytes);
        let Some(range) = ByteRange::between(start, end) else {
            return Err(HomeError::Protocol(format!("an offer lies beyond {disk}")));
        };
        let hashes = leaf_hashes(home.device(), range, key).map_err(|source| failed(home, source))?;
        let zero = key.zero_leaf();
        let mut rest = &hashes[..];
        let mut kept = Vec::new();
        let wanted = granule_leaves(start, leaves).zip(granules).map(|(count, granule)| {
            let (held, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            let differs = granule_differs(key, zero, *granule, held);
            if differs {
                kept.extend_from_slice(held);
            }
            differs
        });
        let wanted = wanted.collect();
        if !kept.is_empty() {
            self.kept.insert(offer, kept);
        }
        Ok(wanted)
    }

    fn compare_leaves(&mut self, offer: u32, leaves: &[OfferedLeaf]) -> Result<Vec<bool>, HomeError> {
        let (Some(held), Some(key)) = (self.kept.remove(&offer), &self.key) else {
            return Err(HomeError::Protocol("leaves were offered before their granules".into()));
        };
        let zero = key.zero_leaf();
        Ok(leaves.iter().zip(held).map(|(leaf, held)| differs(*leaf, zero, held)).collect())
    }

    fn heal_data(
        &mut self,
        heal: HealId,
        disk: DiskId,
        range: ByteRange,
        content: HealContent,
    ) -> Result<(), HomeError> {
        let parts = match self.shields.get(&disk) {
            Some(shield) => shield.outside(range),
            None => vec![range],
        };
        let home = self.disk(disk)?;
        for part in parts {
            let done = match &content {
                HealContent::Data(bytes) => home.device().write_at(part.start, &bytes[part.within(range.start)]),
                HealContent::Zero => home.device().write_zeroes(part.start..part.end()),
                // Left as it is; the proof will name it.
                HealContent::Unreadable => Ok(()),
            };
            done.map_err(|source| failed(home, source))?;
        }
        self.unsynced = true;
        if let Some(healing) = &mut self.healing
            && healing.heal == heal
        {
            // Counted as the sender counts: bytes of data.
            if let HealContent::Data(bytes) = &content {
                healing.processed_bytes += bytes.len() as u64;
            }
        }
        Ok(())
    }

    /// Makes everything written so far durable, then says so.
    fn sync(&mut self) -> Result<(), HomeError> {
        if self.unsynced {
            for home in self.disks.values() {
                home.device().flush().map_err(|source| failed(home, source))?;
            }
            self.unsynced = false;
        }
        if self.written > self.synced {
            self.synced = self.written;
            self.feed(Event::Journaled(self.synced))?;
            self.feed(Event::Committed(self.synced))?;
        }
        // Once a round: a word for each piece would cost half a percent of what it is about.
        if let Some(Healing { heal, processed_bytes: bytes, told_bytes }) = &mut self.healing
            && bytes > told_bytes
        {
            *told_bytes = *bytes;
            let (heal, bytes) = (*heal, *bytes);
            self.feed(Event::HealProcessed { heal, bytes })?;
        }
        if let Some(heal) = self.ended.take() {
            self.feed(Event::HealCommitted { heal })?;
        }
        Ok(())
    }

    fn prove(&mut self, disk: DiskId, start: u64, len: u64) -> Result<Option<String>, HomeError> {
        self.sync()?;
        let home = self.disk(disk)?;
        let Some(key) = &self.key else {
            return Err(HomeError::Protocol("a proof was asked for without a key".into()));
        };
        let end = start.saturating_add(len).min(home.order().size_bytes);
        if len > limits::PROOF_RANGE_BYTES || !start.is_multiple_of(LEAF_BYTES) {
            return Err(HomeError::Protocol("a proof's range is malformed".into()));
        }
        let Some(range) = ByteRange::between(start, end) else { return Ok(None) };
        let hashes = leaf_hashes(home.medium(), range, key).map_err(|source| failed(home, source))?;
        Ok(digest_of(hashes.into_iter()))
    }
}

/// BLAKE3 over leaf hashes, in hexadecimal digits; `None` if one is missing.
pub(crate) fn digest_of(hashes: impl Iterator<Item = Option<LeafHash>>) -> Option<String> {
    let mut hasher = blake3::Hasher::new();
    for hash in hashes {
        hasher.update(&hash?.0);
    }
    Some(hasher.finalize().to_hex().to_string())
}

fn failed(home: &HomeDisk, source: BlockError) -> HomeError {
    HomeError::Disk { path: home.order().path.display().to_string(), source }
}

/// Bytes read from the home disk at once.
const READ_BYTES: u64 = 1 << 20;

/// The keyed hash of each leaf of `range` as the device holds it; `None` where it cannot be read. Holes are not read.
fn leaf_hashes(device: &dyn BlockDevice, range: ByteRange, key: &LeafKey) -> Result<Vec<Option<LeafHash>>, BlockError> {
    let zero = key.zero_leaf();
    let mut hashes = Vec::with_capacity((range.len / LEAF_BYTES) as usize + 1);
    let mut buffer = vec![0; READ_BYTES.min(range.len) as usize];
    for piece in range.split_at_multiples(READ_BYTES) {
        let extents = device.extents(piece.start..piece.end())?;
        if extents.iter().all(|extent| extent.kind != ExtentKind::Data) {
            hashes.extend((0..piece.len.div_ceil(LEAF_BYTES)).map(|_| Some(zero)));
            continue;
        }
        let bytes = &mut buffer[..piece.len as usize];
        match device.read_at(piece.start, bytes) {
            Ok(()) => {
                hashes.extend(bytes.chunks(LEAF_BYTES as usize).map(|leaf| Some(key.leaf(PlainLeafHash::of(leaf)))))
            }
            Err(BlockError::Unreadable { .. }) => {
                for leaf in piece.split_at_multiples(LEAF_BYTES) {
                    let bytes = &mut bytes[leaf.within(piece.start)];
                    let hash = device.read_at(leaf.start, bytes).ok().map(|()| key.leaf(PlainLeafHash::of(bytes)));
                    hashes.push(hash);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(hashes)
}
