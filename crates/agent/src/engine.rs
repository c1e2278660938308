//! The engine: moves requests from a [`Capture`] to a receiver by doing what the [`Sender`] decides.
//!
//! One thread owns an engine and calls [`Engine::step`]; the simulation calls it directly. A step takes messages, takes
//! requests from the ring, tells the sender what it saw, and carries out what the sender wants, heal reads last: the live
//! stream goes first.
//!
//! The same engine sends a branch home: there the capture is the branch's splitter and the hashes come from the vault's
//! index instead of from reading ([`HashIndex`]).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use replication::geometry::LEAF_BYTES;
use replication::sender::{
    Action, CaptureReport, Event, HealProgress, KeptStream, Request, Sender, SenderConfig, StreamState,
};
use replication::wire::{HealNeed, Message, OfferedLeaf};
use replication::{ByteRange, ChainId, DiskGeometry, DiskId, Epoch, PlainLeafHash, Ranges, SequenceNumber, SourceTime};
use world::{BlockError, Clock, Monotonic};

use crate::capture::{Capture, Continuity, Mode, NewDisk, Phase, RingPosition};
use crate::heal_buffers::HealBuffers;
use crate::heal_pace::HealPace;
use crate::scrub::Scrubber;

mod scrub;

pub use scrub::ScrubRefusal;

/// The way to the receiver, as the engine needs it. Never blocks.
pub trait Wire {
    /// Queues `message` if there is room, else gives it back.
    ///
    /// # Errors
    /// [`WireClosed`] when the link is gone.
    fn try_send(&mut self, message: Message) -> Result<Option<Message>, WireClosed>;

    /// The next message from the receiver, if one has arrived.
    ///
    /// # Errors
    /// [`WireClosed`] when the link is gone and nothing is left to read.
    fn try_receive(&mut self) -> Result<Option<Message>, WireClosed>;
}

/// The link is gone; connect again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the link to the receiver is closed: {0}")]
pub struct WireClosed(pub String);

/// Hashes of the source that need no reading: the index of a branch.
pub trait HashIndex: Send {
    /// One entry for each leaf of `range`, which begins at a multiple of 4 KiB.
    fn offered(&self, disk: DiskId, range: ByteRange) -> Vec<OfferedLeaf>;
}

/// Remembers across restarts on which commit the maps were cleared.
pub trait ClearedMark: Send {
    /// The mark, if one was ever made.
    fn load(&self) -> Option<(ChainId, SequenceNumber)>;

    /// Makes the mark durable. Called before the maps are cleared.
    fn store(&mut self, chain: ChainId, committed: SequenceNumber) -> std::io::Result<()>;
}

/// What a step achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Something moved; call again at once.
    Busy,
    /// Nothing to do until the ring, the link or a timer has something.
    Idle,
    /// The link must be closed and opened again.
    Reconnect(String),
    /// The receiver does not want us; retrying soon is useless.
    Refused(String),
}

/// A snapshot for status pages and metrics.
#[derive(Debug, Clone)]
pub struct EngineStatus {
    /// Newest change numbered, sent, journaled by the receiver, committed to the vault.
    pub captured: SequenceNumber,
    /// Newest change handed to the link.
    pub sent: SequenceNumber,
    /// Newest change durable at the receiver.
    pub journaled: SequenceNumber,
    /// Newest change in the vault.
    pub committed: SequenceNumber,
    /// Whether the stream is whole, and if not, why.
    pub stream: StreamState,
    /// A heal is needed or running.
    pub healing: bool,
    /// Everything but `lacking` is in the stream.
    pub whole: bool,
    /// Ranges that are healed while the stream goes on.
    pub lacking: Ranges,
    /// The heal's progress.
    pub heal: HealProgress,
    /// Ring use in bytes.
    pub ring_bytes_used: u64,
    /// Ring size in bytes.
    pub ring_bytes_max: u64,
}

/// Requests taken from the ring in one step.
const REQUESTS_PER_STEP_MAX: usize = 4096;
/// Messages taken from the link in one step.
const MESSAGES_PER_STEP_MAX: usize = 256;
/// Heal chunks read in one step, so that the stream is looked at again soon.
const HEAL_READS_PER_STEP_MAX: usize = 2;
/// Messages waiting for room on the link before the sender is asked for more.
const OUTBOX_MESSAGES_MAX: usize = 4;

enum HealWork {
    Read { disk: DiskId, range: ByteRange, hash: bool },
    Fetch { disk: DiskId, range: ByteRange },
}

/// See the module's documentation.
pub struct Engine<C: Capture> {
    capture: C,
    sender: Sender,
    clock: Arc<dyn Clock>,
    hashes: Option<Box<dyn HashIndex>>,
    mark: Box<dyn ClearedMark>,
    outbox: VecDeque<Message>,
    heal_work: VecDeque<HealWork>,
    heal_buffers: HealBuffers,
    heal_pace: HealPace,
    scrub: Option<Scrubber>,
    scrub_reads: VecDeque<(u64, DiskId, ByteRange)>,
    awaiting_settled: Option<Epoch>,
    /// Up to where a predecessor filled a ring that outlived it; none once that is numbered.
    inherited: Option<RingPosition>,
    /// Ring positions: taken out up to here, and released up to here.
    consumed: RingPosition,
    released: RingPosition,
    /// Unstreamed marks that the sender knows of.
    unstreamed_seen: u64,
    connected: bool,
    outcome: Option<Step>,
}

impl<C: Capture> Engine<C> {
    /// An engine for `capture`. `hashes` is given for sources that know their leaf hashes without reading.
    pub fn new(
        capture: C,
        config: SenderConfig,
        clock: Arc<dyn Clock>,
        hashes: Option<Box<dyn HashIndex>>,
        mark: Box<dyn ClearedMark>,
    ) -> Engine<C> {
        let need = match capture.continuity() {
            Continuity::Fresh | Continuity::Lost(_) => HealNeed::Whole,
            Continuity::SameBoot => HealNeed::Maps,
        };
        let sender = match capture.resumption().filter(|_| need == HealNeed::Maps) {
            Some(resumption) => Sender::resumed(config, resumption, mark.load()),
            None => Sender::new(config, need, capture.status().gap_count, mark.load()),
        };
        Engine::around(capture, sender, clock, hashes, mark)
    }

    /// An engine that goes on with the stream that an agent left which ended in order; `joining` is what its stream does
    /// not know. Call it before anybody can write: from here on writes are streamed.
    pub fn resume(
        mut capture: C,
        config: SenderConfig,
        clock: Arc<dyn Clock>,
        mark: Box<dyn ClearedMark>,
        kept: KeptStream,
        joining: Vec<(Ranges, String)>,
    ) -> Engine<C> {
        let opening = capture.status().epoch;
        match capture.rotate(Mode::Stream) {
            Some(_) => capture.clear(opening),
            // Not reached with a capture that was just opened; then everything is healed by maps.
            None => return Engine::new(capture, config, clock, None, mark),
        }
        // What a disk lacked that is not protected any more, or where it ends now, nobody can read.
        let disks = capture.disks();
        let still_there = |(id, range): (DiskId, ByteRange)| {
            let disk = disks.iter().find(|disk| disk.disk == id)?;
            Some((id, ByteRange::between(range.start, range.end().min(disk.size_bytes))?))
        };
        let kept = KeptStream { lacking: Ranges::of(kept.lacking.iter().filter_map(still_there)), ..kept };
        let sender = Sender::resume(config, capture.status().gap_count, mark.load(), kept, joining);
        Engine::around(capture, sender, clock, None, mark)
    }

    fn around(
        capture: C,
        sender: Sender,
        clock: Arc<dyn Clock>,
        hashes: Option<Box<dyn HashIndex>>,
        mark: Box<dyn ClearedMark>,
    ) -> Engine<C> {
        let (passed, producer) = (capture.passed(), capture.status().producer);
        Engine {
            inherited: (passed > RingPosition(0)).then_some(producer),
            consumed: passed,
            released: passed,
            capture,
            sender,
            clock,
            hashes,
            mark,
            outbox: VecDeque::new(),
            heal_work: VecDeque::new(),
            heal_buffers: HealBuffers::default(),
            heal_pace: HealPace::default(),
            scrub: None,
            scrub_reads: VecDeque::new(),
            awaiting_settled: None,
            unstreamed_seen: 0,
            connected: false,
            outcome: None,
        }
    }

    /// Reads for heals at this pace from now on.
    pub fn set_heal_pace(&mut self, pace: HealPace) {
        self.heal_pace = pace;
    }

    /// What a later agent can go on with, if this one has ended in order: nothing is left that is not journaled.
    pub fn keep(&self) -> Option<(Epoch, KeptStream)> {
        let status = self.capture.status();
        let kept = self.sender.keep().filter(|_| status.ring_bytes_used == 0)?;
        Some((status.epoch, kept))
    }

    /// The sender, to hold it before a move.
    pub fn hold(&mut self, held: bool) {
        self.sender.hold(held);
    }

    /// The capture, for owners that mark, freeze or inspect it.
    pub fn capture(&mut self) -> &mut C {
        &mut self.capture
    }

    /// The sender's state.
    pub fn sender(&self) -> &Sender {
        &self.sender
    }

    /// Whether everything that was captured is journaled and nothing is being healed.
    pub fn is_settled(&self) -> bool {
        self.connected
            && self.sender.is_quiet()
            && !self.sender.is_healing()
            && matches!(self.sender.stream(), StreamState::Whole)
            && self.capture.status().ring_bytes_used == 0
    }

    /// Whether everything that was captured is journaled, whatever is being healed.
    pub fn is_quiet(&self) -> bool {
        self.connected && self.sender.is_quiet() && self.capture.status().ring_bytes_used == 0
    }

    /// A snapshot of the watermarks.
    pub fn status(&self) -> EngineStatus {
        let [captured, sent, journaled, committed] = self.sender.watermarks();
        let capture = self.capture.status();
        EngineStatus {
            captured,
            sent,
            journaled,
            committed,
            stream: self.sender.stream().clone(),
            healing: self.sender.is_healing(),
            whole: self.sender.is_whole(),
            lacking: self.sender.lacking(),
            heal: self.sender.progress(),
            ring_bytes_used: capture.ring_bytes_used,
            ring_bytes_max: capture.ring_bytes_max,
        }
    }

    /// Has one more disk captured; it joins at the end of its own heal. The link has to be renewed then, so that the
    /// receiver is told of the disk before anything of it.
    ///
    /// # Errors
    /// In words, why it cannot be; nothing has changed.
    pub fn add_disk(&mut self, disk: NewDisk, cause: &str) -> Result<(), String> {
        let geometry = disk.geometry.clone();
        self.capture.add_disk(disk)?;
        self.joined(geometry, 0, cause);
        Ok(())
    }

    /// A disk has grown to `geometry`. As [`Engine::add_disk`] for the new area.
    ///
    /// # Errors
    /// In words, why that cannot be captured; nothing has changed.
    pub fn grow_disk(&mut self, geometry: DiskGeometry, cause: &str) -> Result<(), String> {
        let known = self.capture.disks().into_iter().find(|known| known.disk == geometry.disk);
        let before = known.map_or(0, |known| known.size_bytes);
        self.capture.grow_disk(geometry.disk, geometry.size_bytes)?;
        self.joined(geometry, before / LEAF_BYTES * LEAF_BYTES, cause);
        Ok(())
    }

    fn joined(&mut self, geometry: DiskGeometry, lacks_from: u64, cause: &str) {
        let lacks = ByteRange::between(lacks_from, geometry.size_bytes).map(|range| (geometry.disk, range));
        let producer = self.capture.status().producer.0;
        self.feed(Event::Joined { geometry, ranges: Ranges::of(lacks), cause: cause.to_owned(), producer });
    }

    /// Has a disk captured no more, which may be gone. It ends at the receiver as soon as that has everything captured of
    /// it; see [`Engine::forget_left`]. The link has to be renewed: a heal under way must not read it.
    pub fn remove_disk(&mut self, disk: DiskId, cause: &str) {
        let Some(geometry) = self.capture.disks().into_iter().find(|known| known.disk == disk) else { return };
        self.capture.retire_disk(disk);
        self.feed(Event::Leaving { geometry, cause: cause.to_owned() });
    }

    /// Announces disks that left no more once nothing of them is under way. Whether there were any: then the link has to be
    /// renewed, which tells the receiver.
    pub fn forget_left(&mut self) -> bool {
        let left = self.sender.left_disks();
        for disk in &left {
            self.capture.forget_disk(*disk);
            self.feed(Event::Gone(*disk));
        }
        !left.is_empty()
    }

    /// A new link stands.
    pub fn link_up(&mut self) {
        self.connected = true;
        self.outcome = None;
        // What a predecessor left in the ring may have been sent: it has to be numbered before anyone compares.
        if let Some(until) = self.inherited.take() {
            while self.capture.passed() < until && self.consume(u64::MAX).0 > 0 {}
        }
        let disks = self.capture.disks();
        self.feed(Event::LinkUp { now: self.now(), disks });
    }

    /// The link is gone. Requests keep collecting in the ring and in the maps.
    pub fn link_down(&mut self) {
        self.connected = false;
        self.outbox.clear();
        self.heal_work.clear();
        self.outcome = None;
        self.feed(Event::LinkDown);
    }

    /// Does a bounded amount of work. `wire` is `None` while there is no link.
    pub fn step(&mut self, mut wire: Option<&mut dyn Wire>) -> Step {
        let mut busy = false;
        if let Some(wire) = &mut wire {
            match self.receive(*wire) {
                Ok(received) => busy |= received,
                Err(closed) => return Step::Reconnect(closed.to_string()),
            }
        }
        // Read before the ring is emptied: a request submitted before this moment is either in the ring by then or
        // was stamped later.
        let now = self.now();
        let (consumed, drained) = self.consume(self.capture.ahead_bytes_max());
        busy |= consumed > 0;
        self.watch();
        let known = self.capture.known_until(Monotonic(now.0)).filter(|_| drained);
        self.feed(Event::Tick { now, known: known.map(|known| SourceTime(known.0)) });
        if self.outbox.len() < OUTBOX_MESSAGES_MAX {
            let actions = self.sender.pump();
            busy |= !actions.is_empty();
            self.execute(actions);
        }
        busy |= self.heal_reads();
        busy |= self.scrub_step();
        if let Some(wire) = &mut wire {
            match self.send(*wire) {
                Ok(sent) => busy |= sent,
                Err(closed) => return self.outcome.take().unwrap_or(Step::Reconnect(closed.to_string())),
            }
        }
        match self.outcome.take() {
            Some(outcome) => outcome,
            None if busy => Step::Busy,
            None => Step::Idle,
        }
    }

    fn now(&self) -> SourceTime {
        SourceTime(self.clock.monotonic().0)
    }

    fn feed(&mut self, event: Event) {
        let actions = self.sender.apply(event);
        self.execute(actions);
    }

    fn receive(&mut self, wire: &mut dyn Wire) -> Result<bool, WireClosed> {
        for count in 0..MESSAGES_PER_STEP_MAX {
            match wire.try_receive()? {
                Some(message) => self.feed(Event::Received(message)),
                None => return Ok(count > 0),
            }
            // Whoever refuses closes at once: what it said must not be lost to the end of the link behind it.
            if self.outcome.is_some() {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Takes requests out of the ring, while no more than `ahead_max` bytes of it are taken and not released. Whether it
    /// was found empty.
    fn consume(&mut self, ahead_max: u64) -> (usize, bool) {
        for count in 0..REQUESTS_PER_STEP_MAX {
            if self.consumed.0.saturating_sub(self.released.0) >= ahead_max {
                return (count, false);
            }
            let Some(captured) = self.capture.next() else { return (count, true) };
            self.consumed = captured.end;
            self.feed(Event::Captured(Request {
                ring_end: captured.end.0,
                epoch: captured.epoch,
                time: captured.time,
                disk: captured.disk,
                kinds: captured.kinds,
            }));
        }
        (REQUESTS_PER_STEP_MAX, false)
    }

    /// Tells the sender what the capture's counters say now, after the ring was consumed.
    fn watch(&mut self) {
        if let Some(epoch) = self.awaiting_settled
            && self.capture.settled(epoch)
        {
            self.awaiting_settled = None;
            let producer = self.capture.status().producer.0;
            self.feed(Event::Settled { epoch, producer });
        }
        self.end_heal();
        self.report();
        let stream_is_whole = matches!(self.sender.stream(), StreamState::Whole);
        let (healing, ending) = (self.sender.is_healing(), self.sender.awaits_producer());
        self.capture.follow(Phase { whole: stream_is_whole, healing, ending });
    }

    /// Tells the sender where the heal ends whose reads are done.
    fn end_heal(&mut self) {
        if self.sender.awaits_producer()
            && let Some(producer) = self.capture.heal_end()
        {
            self.feed(Event::Producer(producer.0));
        }
    }

    fn report(&mut self) {
        let passed = self.capture.passed().0;
        if passed > 0 {
            self.feed(Event::Passed(passed));
        }
        let status = self.capture.status();
        let watched = self.sender.watched_from();
        let new = status.unstreamed_count != self.unstreamed_seen && watched <= status.epoch;
        self.unstreamed_seen = status.unstreamed_count;
        let unstreamed = if new { self.capture.unstreamed(watched) } else { Vec::new() };
        self.feed(Event::Report(CaptureReport {
            gap_count: status.gap_count,
            gap_cause: status.gap_cause.map_or_else(|| "unknown".into(), |cause| cause.to_string()),
            unstreamed,
            producer: status.producer.0,
        }));
        if self.sender.resumption().is_none() {
            self.capture.keep(None);
        }
    }

    fn execute(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(message) => self.outbox.push_back(message),
                Action::Release(through) => {
                    self.capture.keep(self.sender.resumption());
                    self.capture.release(RingPosition(through));
                    self.released = self.released.max(RingPosition(through));
                }
                Action::Rotate { for_heal } => self.rotate(for_heal),
                Action::AwaitSettled(epoch) => self.awaiting_settled = Some(epoch),
                Action::RequireWhole => {
                    for disk in self.capture.disks() {
                        self.capture.require_whole(disk.disk);
                    }
                }
                Action::CollectHealSet(epoch) => {
                    // Folding forgets which marks were of failed writes.
                    self.report();
                    self.capture.fold(epoch);
                    let disks = self.capture.disks();
                    let set = disks.iter().map(|disk| (disk.disk, self.capture.heal_set(disk.disk))).collect();
                    self.feed(Event::HealSet(set));
                }
                Action::ReadForHeal { disk, range, hash } => {
                    self.heal_work.push_back(HealWork::Read { disk, range, hash });
                }
                Action::FetchForHeal { disk, range } => self.heal_work.push_back(HealWork::Fetch { disk, range }),
                Action::SampleProducer => self.end_heal(),
                Action::ClearHealSet { chain, committed } => {
                    if self.remember_cleared(chain, committed) {
                        self.capture.clear_heal_set();
                    }
                }
                Action::ClearEpoch { epoch, chain, committed } => {
                    // Marks of failed writes stay for the heal that they cause.
                    if !self.capture.has_unstreamed(epoch) && self.remember_cleared(chain, committed) {
                        self.capture.clear(epoch);
                    }
                }
                Action::ReadForScrub { ask, disk, range } => self.scrub_reads.push_back((ask, disk, range)),
                Action::LookForMarks { ask, since, disk, range } => self.look_for_marks(ask, since, disk, range),
                Action::ScrubOver(over) => self.scrub_over(over),
                Action::SuspicionNoted(id) => self.suspicion_noted(id),
                Action::Compared { behind, reach } => self.healed(behind, &reach),
                Action::Disconnect(reason) => self.outcome = Some(Step::Reconnect(reason)),
                Action::Refused(reason) => self.outcome = Some(Step::Refused(reason)),
            }
        }
    }

    /// Maps that cannot be cleared only cost reads later; a mark that is missing could cost data.
    fn remember_cleared(&mut self, chain: ChainId, committed: SequenceNumber) -> bool {
        match self.mark.store(chain, committed) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "dirty maps stay as they are: the commit they rest on could not be recorded");
                false
            }
        }
    }

    fn rotate(&mut self, for_heal: bool) {
        let mut epoch = self.capture.rotate(Mode::Stream);
        let current = self.capture.status().epoch;
        if epoch.is_none() && for_heal && self.capture.settled(current) {
            // Both slots are in use: the older one joins the heal set, which the coming heal covers.
            self.report();
            self.capture.fold(current);
            epoch = self.capture.rotate(Mode::Stream);
        }
        self.feed(Event::Rotated(epoch));
    }

    fn heal_reads(&mut self) -> bool {
        let mut done = 0;
        while done < HEAL_READS_PER_STEP_MAX
            && self.outbox.len() < OUTBOX_MESSAGES_MAX
            && self.heal_pace.allows(self.clock.monotonic())
            && let Some(work) = self.heal_work.pop_front()
        {
            done += 1;
            let began = self.clock.monotonic();
            match work {
                HealWork::Read { disk, range, hash } => {
                    let (leaves, data) = match &self.hashes {
                        Some(index) => (index.offered(disk, range), None),
                        None if self.capture.is_hole(disk, range) => (holes(range), None),
                        None => {
                            let read = self.read_leaves(disk, range, hash);
                            self.heal_pace.spent(began, self.clock.monotonic(), range.len);
                            read
                        }
                    };
                    self.feed(Event::HealRead { disk, range, leaves, data });
                }
                HealWork::Fetch { disk, range } => {
                    let mut buffer = self.heal_buffers.take(range.len as usize);
                    let read = self.capture.read(disk, range.start, &mut buffer);
                    let data = read.ok().map(|()| self.heal_buffers.share(buffer));
                    self.heal_pace.spent(began, self.clock.monotonic(), range.len);
                    self.feed(Event::HealFetched { disk, range, data });
                }
            }
        }
        done > 0
    }

    /// Reads a chunk and says of each leaf what it is. A leaf that the medium cannot return costs only itself.
    fn read_leaves(&self, disk: DiskId, range: ByteRange, hash: bool) -> (Vec<OfferedLeaf>, Option<Bytes>) {
        let mut buffer = self.heal_buffers.take(range.len as usize);
        let mut unreadable = Vec::new();
        if self.capture.read(disk, range.start, &mut buffer).is_err() {
            for leaf in range.split_at_multiples(LEAF_BYTES) {
                let bytes = &mut buffer[leaf.within(range.start)];
                if let Err(error) = self.capture.read(disk, leaf.start, bytes) {
                    log_unreadable(disk, leaf, &error);
                    bytes.fill(0);
                    unreadable.push(leaf.start);
                }
            }
        }
        let mut leaves: Vec<OfferedLeaf> = range
            .split_at_multiples(LEAF_BYTES)
            .map(|leaf| match &buffer[leaf.within(range.start)] {
                _ if unreadable.contains(&leaf.start) => OfferedLeaf::Unreadable,
                bytes if is_zero(bytes) => OfferedLeaf::Zero,
                _ => OfferedLeaf::Unknown,
            })
            .collect();
        if leaves.iter().all(|leaf| *leaf == OfferedLeaf::Zero) {
            self.heal_buffers.put(buffer);
            return (leaves, None);
        }
        if hash {
            hash_leaves(&buffer, &mut leaves);
        }
        (leaves, Some(self.heal_buffers.share(buffer)))
    }

    fn send(&mut self, wire: &mut dyn Wire) -> Result<bool, WireClosed> {
        let mut sent = false;
        while let Some(message) = self.outbox.pop_front() {
            if let Some(message) = wire.try_send(message)? {
                self.outbox.push_front(message);
                return Ok(sent);
            }
            sent = true;
        }
        Ok(sent)
    }
}

/// What a range without anything in it is made of.
fn holes(range: ByteRange) -> Vec<OfferedLeaf> {
    vec![OfferedLeaf::Zero; range.len.div_ceil(LEAF_BYTES) as usize]
}

fn log_unreadable(disk: DiskId, leaf: ByteRange, error: &BlockError) {
    tracing::warn!(%disk, %leaf, %error, "the source cannot be read here; recorded as a defect");
}

/// Puts the hashes of leaves that hold data in their places. The last leaf of a disk may be a short one.
fn hash_leaves(buffer: &[u8], leaves: &mut [OfferedLeaf]) {
    let (whole, short): (Vec<_>, Vec<_>) = buffer
        .chunks(LEAF_BYTES as usize)
        .zip(leaves)
        .filter(|(_, leaf)| **leaf == OfferedLeaf::Unknown)
        .partition(|(bytes, _)| bytes.len() as u64 == LEAF_BYTES);
    let hashes = PlainLeafHash::of_each(&whole.iter().map(|(bytes, _)| *bytes).collect::<Vec<_>>());
    for ((_, leaf), hash) in whole.into_iter().zip(hashes) {
        *leaf = OfferedLeaf::Hash(hash.0);
    }
    for (bytes, leaf) in short {
        *leaf = OfferedLeaf::Hash(PlainLeafHash::of(bytes).0);
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // Sixteen bytes at a time: a heal looks at every byte of a disk once.
    let chunks = bytes.chunks_exact(16);
    let tail = chunks.remainder();
    chunks.into_iter().all(|chunk| u128::from_ne_bytes(chunk.try_into().expect("sixteen bytes")) == 0)
        && tail.iter().all(|byte| *byte == 0)
}
