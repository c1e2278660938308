//! The master target: a receiver whose journal is a disk.
//!
//! Changes are written in the order in which they arrive and synced before they are acknowledged; then they are
//! journaled and committed at once. Offers are compared with what the disk itself holds. What a heal reads lies below
//! every change after its `p0`: where the stream has written since, heal data is left out.
//!
//! A kill at any moment leaves a disk that is half one state and half another, and a durable note that says so. The next
//! session compares the whole disk again; only what differs travels.
//!
//! What the comparison read is remembered as a sum of hashes ([`home_proof`](crate::home_proof)). Leaves that were written
//! are read once more in the gaps of the stream, from the medium; the proof reads what is left.

mod known;
mod visit;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use link::{FrameLink, LinkError};
use replication::cut::{CutPlanner, PointTime};
use replication::geometry::ByteRange;
use replication::receiver::{self, Action, Event, Greeting, Receiver, Remembered, SessionStart};
use replication::wire::{HealContent, HealNeed, Hello, Message, OfferHashes, RefusalCode};
use replication::{
    ChainId, Change, ChangeKind, DiskId, Generation, HealId, LeafHash, LeafKey, MachineId, Ranges, SequenceNumber,
    StreamHash,
};
use serde::{Deserialize, Serialize};
use world::{BlockError, Clock, Entropy, Files, durable};

use self::visit::Order;
pub use self::visit::{HomeVisit, Visit};
use crate::home_disk::{HomeDisk, HomeDisks, HomeOrder, Refusal};
use crate::home_proof::{Established, Terms};
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

/// The vault's leaf key, and what it makes of leaves for the proof.
struct Key {
    leaf: LeafKey,
    terms: Terms,
}

/// Leaves that were read for an offer, and will be asked about.
struct Kept {
    disk: DiskId,
    leaves: Vec<(u64, Option<LeafHash>)>,
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
    key: Option<Key>,
    /// What the disk held of the granules that were wanted of an offer, until their leaves are offered.
    kept: BTreeMap<u32, Kept>,
    /// What is known of the disks.
    established: BTreeMap<DiskId, Established>,
    /// Where the next part that a comparison wrote to is looked for, to be read once more.
    sweep: Option<(DiskId, usize)>,
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
        let established = disks.iter().map(|(disk, home)| (*disk, Established::new(home.order().size_bytes))).collect();
        HomeSession {
            machine,
            chain,
            disks,
            established,
            sweep: None,
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
            past: None,
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
            past: None,
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
                OfferHashes::Keyed(leaf) => {
                    self.key = Some(Key { terms: Terms::new(&leaf), leaf });
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
                self.sweep = self.disks.keys().next().map(|disk| (*disk, 0));
            }
            Action::HealAborted { cause, .. } => {
                tracing::info!(cause, "the comparison starts again");
                self.healing = None;
            }
            Action::Scrub { .. } | Action::Suspected { .. } => {
                self.over = Some("a home disk is proved by its failback, not by a scrub".into());
            }
            Action::Disconnect { reason } => self.over = Some(reason),
            // A disk has one state: points and gaps are the chain's.
            Action::Cut(_) | Action::GapOpened { .. } | Action::Proven { .. } => {}
        }
        Ok(())
    }

    fn disk(&self, disk: DiskId) -> Result<&Arc<HomeDisk>, HomeError> {
        self.disks.get(&disk).ok_or_else(|| HomeError::Protocol(format!("{disk} was not ordered")))
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
        let home = &Arc::clone(self.disk(change.disk)?);
        self.forget(home, range);
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
        let home = &Arc::clone(self.disk(disk)?);
        for part in parts {
            if !matches!(content, HealContent::Unreadable) {
                self.forget(home, part);
            }
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

    /// Makes everything written so far durable.
    fn sync(&mut self) -> Result<(), HomeError> {
        if self.unsynced {
            for home in self.disks.values() {
                home.device().flush().map_err(|source| failed(home, source))?;
            }
            self.unsynced = false;
        }
        Ok(())
    }

    /// Says what was done, once what the other side may rely on is durable. What a heal wrote is relied on at its end only:
    /// a session that ends before compares everything again.
    fn acknowledge(&mut self) -> Result<(), HomeError> {
        if self.written > self.synced || self.ended.is_some() {
            self.sync()?;
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
}

fn failed(home: &HomeDisk, source: BlockError) -> HomeError {
    HomeError::Disk { path: home.order().path.display().to_string(), source }
}
