//! A protected machine: disks, a workload that writes to them through the splitter, the real agent engine, and the model
//! that watches. It can be killed, power-cut, reverted and cloned. Its agent can end in order, and disks be added,
//! removed, grown or used meanwhile: the next agent goes on with the stream, as `farshore-agent` does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::planted::Bug;
use crate::spoiled::{Interference, SharedStrikes, SpoiledCapture};
use agent::capture::mapfile::MemoryMapStore;
use agent::capture::splitter::{ProtectedDisk, Splitter, SplitterConfig};
use agent::capture::{Capture, Unbroken};
use agent::engine::{ClearedMark, Engine, Step, Wire};
use agent::scrub::memory::Memory;
use agent::scrub::{ScrubProgress, ScrubRecord, ScrubSettings, Scrubber};
use replication::geometry::{GRANULE_BYTES, LEAF_BYTES};
use replication::sender::{KeptStream, SenderConfig};
use replication::wire::{Message, OfferHashes};
use replication::{
    ByteRange, ChainId, DiskGeometry, DiskId, DiskIdentity, Epoch, InstanceId, MachineId, MarkerKind, PointTime,
    Ranges, SequenceNumber,
};
use world::{BlockDevice, Clock};

use crate::clock::{SimClock, TrueTime};
use crate::disk::SimDisk;
use crate::link::LinkEnd;
use crate::model::Model;
use crate::rng::Rng;

fn geometry(index: u16, disk: &SimDisk) -> DiskGeometry {
    DiskGeometry {
        disk: DiskId(index),
        identity: DiskIdentity { serial: format!("sim-{index}"), fingerprint: [0; 16] },
        path: format!("/dev/sim{index}"),
        size_bytes: disk.size(),
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

/// Sizes and paces of a machine.
#[derive(Debug, Clone)]
pub struct SourceShape {
    /// Size of each disk in bytes.
    pub disk_bytes: Vec<u64>,
    /// The agent's ring in bytes.
    pub ring_bytes: u64,
    /// Largest write of the workload in bytes.
    pub write_bytes_max: u64,
    /// Writes of the workload begin and end at multiples of this, in bytes; disks are that large.
    pub write_unit_bytes: u64,
    /// How much heal data may be under way, in bytes.
    pub heal_window_bytes: u64,
}

#[derive(Debug, Clone, Default)]
struct SharedMark(Arc<std::sync::Mutex<Option<(ChainId, SequenceNumber)>>>);

impl ClearedMark for SharedMark {
    fn load(&self) -> Option<(ChainId, SequenceNumber)> {
        *self.0.lock().expect("single-threaded")
    }

    fn store(&mut self, chain: ChainId, committed: SequenceNumber) -> std::io::Result<()> {
        *self.0.lock().expect("single-threaded") = Some((chain, committed));
        Ok(())
    }
}

/// What the agent remembers of scrubs. Outlives it, as its state directory does.
#[derive(Debug, Clone, Default)]
struct SharedRecord(Arc<std::sync::Mutex<Option<Memory>>>);

impl ScrubRecord for SharedRecord {
    fn load(&self) -> Option<Memory> {
        self.0.lock().expect("single-threaded").clone()
    }

    fn store(&mut self, memory: &Memory) -> std::io::Result<()> {
        *self.0.lock().expect("single-threaded") = Some(memory.clone());
        Ok(())
    }
}

/// Scrubs begin when the life wants one, and read fast.
const SCRUBS: ScrubSettings = ScrubSettings { every_days: 0, read_mib_per_s: 100 };

struct Running {
    splitter: Splitter,
    engine: Engine<SpoiledCapture>,
}

/// What happens to the disks while no agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maintenance {
    /// Nothing.
    Nothing,
    /// One is added.
    Add,
    /// The second one grows.
    Grow,
    /// One of them is written to.
    Use,
    /// The last one is not protected any more. The next that is added is that one again.
    Remove,
}

/// An agent that ends in order: its disks are out of service, and what is in its ring still goes out.
struct Stopping {
    until: u64,
    then: Maintenance,
}

/// How an agent ended in order.
#[derive(Debug, Clone)]
pub struct Ended {
    /// The next one can go on with the stream, lacking these ranges besides what joins; otherwise there is a gap.
    pub kept: Option<Ranges>,
    /// Where its stream ended.
    pub through: SequenceNumber,
    /// What happened to the disks.
    pub then: Maintenance,
}

/// Disks that a machine may come to have.
const DISKS_MAX: usize = 3;
/// Size of a disk that is added, in bytes.
const ADDED_BYTES: u64 = 40 * 1024 + 512;
/// Beyond this size the second disk grows no more, in bytes.
const GROWN_BYTES_MAX: u64 = 136 * 1024;

/// See the module's documentation.
pub struct Source {
    /// The machine's identity.
    pub machine: MachineId,
    /// What the machine's user did to its disks.
    pub model: Model,
    /// The machine's clock.
    pub clock: SimClock,
    shape: SourceShape,
    disks: Vec<(DiskGeometry, SimDisk)>,
    maps: MemoryMapStore,
    mark: SharedMark,
    scrubs: SharedRecord,
    boot: [u8; 16],
    running: Option<Running>,
    link: Option<LinkEnd>,
    /// Sectors of disk 0 that cannot be read, by their first bytes.
    broken: BTreeSet<u64>,
    /// Leaves written since the machine came home from a branch, and bytes that the vault could not compare then.
    written_since_home: Option<(BTreeSet<(DiskId, u64)>, u64)>,
    /// Writes that happened inside the agent's step.
    interfered: SharedStrikes,
    runs: u64,
    stopping: Option<Stopping>,
    ended: Option<Ended>,
    /// The newest request of the workload: disk, first byte, length in bytes.
    written_last: (DiskId, u64, u64),
    /// What an agent that ended in order left beside its maps.
    kept: Option<(Epoch, KeptStream)>,
    /// Everything that a point may ever have lacked by itself.
    may_lack: Ranges,
    /// A disk of the machine that is not protected any more.
    retired: Option<(DiskGeometry, SimDisk)>,
    time: TrueTime,
    rng: Rng,
    bug: Option<Bug>,
}

impl Source {
    /// A machine with empty disks that boots now, its agent not yet running.
    pub fn new(shape: SourceShape, time: &TrueTime, mut rng: Rng, bug: Option<Bug>) -> Source {
        let mut machine = [0; 16];
        rng.fill(&mut machine);
        let disks: Vec<_> = shape
            .disk_bytes
            .iter()
            .enumerate()
            .map(|(index, &size)| {
                let disk = SimDisk::new(size);
                (geometry(index as u16, &disk), disk)
            })
            .collect();
        let model = Model::new(disks.iter().map(|(geometry, disk)| (geometry.disk, disk.contents())).collect());
        let mut boot = [0; 16];
        rng.fill(&mut boot);
        Source {
            machine: MachineId(machine),
            model,
            clock: SimClock::booting_now(time),
            shape,
            disks,
            maps: MemoryMapStore::new(),
            mark: SharedMark::default(),
            scrubs: SharedRecord::default(),
            boot,
            running: None,
            link: None,
            broken: BTreeSet::new(),
            written_since_home: None,
            interfered: Arc::default(),
            runs: 0,
            stopping: None,
            ended: None,
            written_last: (DiskId(0), 0, 512),
            kept: None,
            may_lack: Ranges::default(),
            retired: None,
            time: time.clone(),
            rng,
            bug,
        }
    }

    /// Starts the agent, and with it the service of the disks.
    pub fn start_agent(&mut self) {
        assert!(self.running.is_none(), "one agent at a time");
        self.runs += 1;
        let disks = self
            .disks
            .iter()
            .map(|(geometry, disk)| ProtectedDisk { geometry: geometry.clone(), device: Arc::new(disk.clone()) })
            .collect();
        let config = SplitterConfig { machine: self.machine, boot: self.boot, ring_bytes_max: self.shape.ring_bytes };
        let (splitter, capture) = Splitter::open(disks, &self.maps, Arc::new(self.clock.clone()), config)
            .expect("the simulated disks fit the splitter");
        let interference = Interference {
            disks: self
                .disks
                .iter()
                .filter_map(|(geometry, _)| Some((geometry.disk, splitter.disk(geometry.disk)?)))
                .collect(),
            rng: std::sync::Mutex::new(self.rng.fork()),
            done: self.interfered.clone(),
        };
        let mut instance = [0; 16];
        self.rng.fill(&mut instance);
        let config = SenderConfig {
            machine: self.machine,
            instance: InstanceId(instance),
            boot: self.boot,
            vm_generation: [0; 16],
            started: PointTime(self.clock.wall().0),
            name: "simulated".into(),
            hashes: OfferHashes::Plain,
            rotate_every_ns: 3_000_000_000,
            proof_every_ns: 500_000_000,
            heal_chunk_bytes: 64 * 1024,
            heal_window_bytes: self.shape.heal_window_bytes,
        };
        let capture = SpoiledCapture::new(capture, self.bug, interference);
        let (clock, mark) = (Arc::new(self.clock.clone()), Box::new(self.mark.clone()));
        let unbroken = capture.unbroken();
        let kept = self.kept.take().zip(unbroken).filter(|((epoch, _), unbroken)| unbroken.ended_in == *epoch);
        let mut engine = match kept {
            None => Engine::new(capture, config, clock, None, mark),
            Some(((_, kept), Unbroken { lacking, .. })) => {
                let joining = lacking.into_iter().map(|(disk, range, cause)| (Ranges::of([(disk, range)]), cause));
                Engine::resume(capture, config, clock, mark, kept, joining.collect())
            }
        };
        engine.set_scrub(Scrubber::new(SCRUBS, Box::new(self.scrubs.clone()), self.clock.wall()));
        self.running = Some(Running { splitter, engine });
    }

    /// Takes the disks out of service and lets the agent end, once what it has is journaled or `limit_ns` is over.
    /// Whether there is an agent that can.
    pub fn stop_in_order(&mut self, limit_ns: u64, then: Maintenance) -> bool {
        let Some(running) = self.running.as_ref().filter(|_| self.broken.is_empty() && self.stopping.is_none()) else {
            return false;
        };
        running.splitter.close(Duration::from_secs(1)).expect("nothing is in flight, and the disks work");
        self.stopping = Some(Stopping { until: self.time.now() + limit_ns, then });
        true
    }

    /// How the agent ended in order, once.
    pub fn take_ended(&mut self) -> Option<Ended> {
        self.ended.take()
    }

    fn end_in_order(&mut self) {
        let (Some(stopping), Some(running)) = (self.stopping.take(), self.running.take()) else { return };
        self.kept = running.engine.keep();
        // Not severed: what was sent arrives, the good-bye last.
        if let Some(mut link) = self.link.take() {
            let _ = link.try_send(Message::Bye { reason: "the agent was stopped".into() });
        }
        self.maintain(stopping.then);
        let kept = self.kept.as_ref().map(|(_, kept)| kept.lacking.clone());
        let through = self.kept.as_ref().map_or(SequenceNumber(0), |(_, kept)| kept.released);
        self.ended = Some(Ended { kept, through, then: stopping.then });
    }

    fn maintain(&mut self, what: Maintenance) {
        match what {
            Maintenance::Nothing => return,
            Maintenance::Remove => self.retired = self.disks.pop(),
            Maintenance::Add if self.retired.is_some() => {
                let (known, disk) = self.retired.take().expect("it was just there");
                // Nobody watched.
                for _ in 0..self.rng.below(3) {
                    self.scribble(&disk);
                }
                disk.flush().expect("the disk is whole");
                self.may_lack(known.disk, ByteRange::new(0, known.size_bytes));
                self.disks.push((known, disk));
            }
            Maintenance::Add => {
                let disk = SimDisk::new(0);
                disk.resize(ADDED_BYTES, &mut self.rng);
                let index = self.disks.last().map_or(0, |(last, _)| last.disk.0 + 1);
                self.may_lack(DiskId(index), ByteRange::new(0, ADDED_BYTES));
                self.disks.push((geometry(index, &disk), disk));
            }
            Maintenance::Grow => {
                let (known, disk) = &self.disks[1];
                let (id, before) = (known.disk, known.size_bytes);
                disk.resize(before + (1 + self.rng.below(40)) * 512, &mut self.rng);
                // The leaf that the old end divides is healed as a whole.
                let start = before / LEAF_BYTES * LEAF_BYTES;
                let grown = ByteRange::new(start, disk.size() - start);
                self.disks[1].0 = geometry(id.0, disk);
                self.may_lack(id, grown);
            }
            Maintenance::Use => {
                let index = self.rng.below(self.disks.len() as u64) as usize;
                let (id, disk) = (self.disks[index].0.disk, self.disks[index].1.clone());
                for _ in 0..1 + self.rng.below(3) {
                    self.scribble(&disk);
                }
                disk.flush().expect("the disk is whole");
                self.may_lack(id, ByteRange::new(0, disk.size()));
            }
        }
        self.model.reshape(self.contents(), self.time.now());
    }

    /// Whether there is room for one more of this kind.
    pub fn can(&self, what: Maintenance) -> bool {
        match what {
            Maintenance::Nothing | Maintenance::Use => true,
            Maintenance::Add => self.disks.len() < DISKS_MAX,
            Maintenance::Remove => self.disks.len() > self.shape.disk_bytes.len(),
            Maintenance::Grow => self.disks.get(1).is_some_and(|(known, _)| known.size_bytes < GROWN_BYTES_MAX),
        }
    }

    fn may_lack(&mut self, disk: DiskId, range: ByteRange) {
        self.may_lack = self.may_lack.union(&Ranges::of([(disk, range)]));
    }

    /// Whether something happened to all of `ranges` for which points may lack them.
    pub fn has_reason_to_lack(&self, ranges: &Ranges) -> bool {
        self.may_lack.covers(ranges)
    }

    /// Cuts the disks down to those that `sizes` names: the machine is what its branch is.
    pub fn fit(&mut self, sizes: &[(DiskId, u64)]) {
        self.disks.retain_mut(|(known, disk)| {
            known.size_bytes = disk.size();
            sizes.iter().any(|(id, _)| *id == known.disk)
        });
    }

    fn contents(&self) -> Vec<(DiskId, Vec<u8>)> {
        self.disks.iter().map(|(geometry, disk)| (geometry.disk, disk.contents())).collect()
    }

    /// Whether the disks can be written to.
    pub fn is_in_service(&self) -> bool {
        self.running.is_some() && self.stopping.is_none()
    }

    /// Which run of the agent this is, and how often the ring was full in it, or something else was missed.
    pub fn breaks(&mut self) -> (u64, u64) {
        (self.runs, self.running.as_mut().map_or(0, |running| running.engine.capture().status().gap_count))
    }

    /// Kills the agent. The ring is lost, the maps are not; the disks cannot be written until it starts again.
    pub fn kill_agent(&mut self) {
        self.unplug();
        self.running = None;
        self.stopping = None;
    }

    /// Whether the agent runs.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Cuts the machine's power: agent and maps are gone, un-flushed writes may be. Returns how many sectors were lost.
    pub fn power_cut(&mut self) -> usize {
        self.kill_agent();
        let lost = self.disks.iter().map(|(_, disk)| disk.power_cut(&mut self.rng)).sum();
        self.new_boot();
        lost
    }

    /// Reverts the machine to `images` taken by [`Source::snapshot`], as a hypervisor does.
    pub fn revert(&mut self, images: &[Vec<u8>]) {
        self.kill_agent();
        for ((_, disk), image) in self.disks.iter().zip(images) {
            disk.revert(image);
        }
        self.new_boot();
    }

    /// The disks' contents now.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|(_, disk)| disk.contents()).collect()
    }

    fn new_boot(&mut self) {
        // The map file lies on a disk that was not synced: after a crash it may be old. Its boot id tells.
        self.clock.reboot();
        if self.bug != Some(Bug::RebootIgnored) {
            self.rng.fill(&mut self.boot);
        }
        self.model.reset(self.contents(), self.time.now());
    }

    /// The site is lost: the machine ends as in a power cut, and whoever finds its disks writes to them. They are
    /// returned, to be written over.
    pub fn leave(&mut self) -> Vec<(DiskId, SimDisk)> {
        self.power_cut();
        self.disks.extend(self.retired.take());
        let disks: Vec<_> = self.disks.iter().map(|(geometry, disk)| (geometry.disk, disk.clone())).collect();
        for _ in 0..self.rng.below(12) {
            let index = self.rng.below(disks.len() as u64) as usize;
            self.scribble(&disks[index].1);
        }
        disks.iter().for_each(|(_, disk)| disk.flush().expect("the disk is whole"));
        self.broken.clear();
        disks
    }

    /// Somebody writes to a disk past the agent.
    fn scribble(&mut self, disk: &SimDisk) {
        let sectors = disk.size() / 512;
        let start = self.rng.below(sectors);
        let len = (1 + self.rng.below(64)).min(sectors - start) * 512;
        let mut data = vec![0; len as usize];
        self.rng.fill(&mut data);
        disk.write_at(start * 512, &data).expect("the disk is whole");
    }

    /// The machine boots from its disks, on which it came home from a branch that `past` knows.
    /// `unknown_bytes` of them the vault cannot compare.
    pub fn come_home(&mut self, past: Model, unknown_bytes: u64) {
        self.clock.reboot();
        self.rng.fill(&mut self.boot);
        self.maps = MemoryMapStore::new();
        self.mark = SharedMark::default();
        self.scrubs = SharedRecord::default();
        self.kept = None;
        self.fit(&past.sizes());
        self.model.follow(past, self.time.now());
        self.written_since_home = Some((BTreeSet::new(), unknown_bytes));
    }

    /// Most bytes in which source and vault can differ since the machine came home, until they agree again.
    pub fn bytes_since_home(&self) -> Option<u64> {
        self.written_since_home.as_ref().map(|(leaves, unknown)| leaves.len() as u64 * LEAF_BYTES + unknown)
    }

    /// Source and vault agree again after the return.
    pub fn is_home_again(&mut self) {
        self.written_since_home = None;
    }

    /// The machine's user submitted a request.
    fn wrote(&mut self, disk: DiskId, start: u64, data: &[u8]) {
        self.model.wrote(disk, start, data, self.time.now());
        if let Some((leaves, _)) = &mut self.written_since_home {
            leaves.extend(
                (start / LEAF_BYTES..(start + data.len() as u64).div_ceil(LEAF_BYTES)).map(|leaf| (disk, leaf)),
            );
        }
    }

    /// Gives the agent a link; a link it already has is severed.
    pub fn plug(&mut self, link: LinkEnd) {
        self.unplug();
        if let Some(running) = &mut self.running {
            self.link = Some(link);
            running.engine.link_up();
        }
    }

    /// Takes the link away.
    pub fn unplug(&mut self) {
        if let Some(link) = self.link.take() {
            link.sever();
            if let Some(running) = &mut self.running {
                running.engine.link_down();
            }
        }
    }

    /// Lets the agent send nothing more before a move, or go on.
    pub fn hold(&mut self, held: bool) {
        if let Some(running) = &mut self.running {
            running.engine.hold(held);
        }
    }

    /// Whether the vault has everything that was sent, so that another server can go on without a gap.
    pub fn is_drained(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.engine.sender().is_drained())
    }

    /// How far the stream is journaled.
    pub fn journaled(&self) -> SequenceNumber {
        self.running.as_ref().map_or(SequenceNumber(0), |running| running.engine.sender().watermarks()[2])
    }

    /// Whether the agent has a link.
    pub fn is_plugged(&self) -> bool {
        self.link.is_some()
    }

    /// The agent's link, for stalling it.
    pub fn link(&self) -> Option<&LinkEnd> {
        self.link.as_ref()
    }

    /// Lets the agent work for a while. A link that must be renewed is dropped.
    pub fn step(&mut self) {
        for _ in 0..16 {
            let Some(running) = &mut self.running else { return };
            let wire = self.link.as_mut().map(|link| link as &mut dyn agent::engine::Wire);
            let step = running.engine.step(wire);
            let interfered = std::mem::take(&mut *self.interfered.lock().expect("single-threaded"));
            for (disk, offset, data) in interfered {
                self.wrote(disk, offset, &data);
            }
            match step {
                Step::Busy => {}
                Step::Idle => break,
                Step::Reconnect(reason) | Step::Refused(reason) => {
                    tracing::debug!(reason, "the agent drops its link");
                    self.unplug();
                    break;
                }
            }
        }
        if let (Some(stopping), Some(running)) = (&self.stopping, &self.running) {
            let is_done = running.engine.is_quiet() || !running.engine.sender().is_whole();
            if is_done || self.link.is_none() || self.time.now() >= stopping.until {
                self.end_in_order();
            }
        }
    }

    /// Whether everything written is journaled, nothing is healing, and nothing is in the ring.
    pub fn is_settled(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.engine.is_settled())
    }

    /// The engine, for assertions.
    pub fn engine(&self) -> Option<&Engine<SpoiledCapture>> {
        self.running.as_ref().map(|running| &running.engine)
    }

    /// One request of the workload. The model learns of it even if the disk fails: the replica may then hold either.
    pub fn write_something(&mut self) {
        let Some(running) = self.running.as_ref().filter(|_| self.stopping.is_none()) else { return };
        let index = self.rng.below(self.disks.len() as u64) as usize;
        let (geometry, _) = &self.disks[index];
        let disk = running.splitter.disk(geometry.disk).expect("a protected disk");
        let unit = self.shape.write_unit_bytes;
        let units = geometry.size_bytes / unit;
        // Hot spots make overwrites within and across cuts common.
        let start = if self.rng.one_in(2) { self.rng.below(units.min(64)) } else { self.rng.below(units) };
        let longest = (self.shape.write_bytes_max / unit).min(units - start);
        let len = (1 + self.rng.below(longest)) * unit;
        let start = start * unit;
        let mut data = vec![0; len as usize];
        match self.rng.below(10) {
            0 => drop(disk.write_zeroes(start..start + len)),
            1 => drop(disk.discard(start..start + len)),
            _ => {
                self.rng.fill(&mut data);
                drop(disk.write_at(start, &data));
            }
        }
        let disk_id = geometry.disk;
        self.written_last = (disk_id, start, len);
        self.wrote(disk_id, start, &data);
        if self.rng.one_in(20) {
            drop(disk.flush());
        }
    }

    /// Puts a marker into the stream. Returns whether there was room.
    pub fn mark(&mut self, name: &str) -> bool {
        self.running.as_mut().is_some_and(|running| running.engine.capture().mark(MarkerKind::Crash, name))
    }

    /// Begins to compare source and vault, unless that is under way.
    pub fn scrub(&mut self) -> bool {
        self.running.as_mut().is_some_and(|running| running.engine.begin_scrub(None).is_ok())
    }

    /// How that goes.
    pub fn scrub_progress(&self) -> Option<ScrubProgress> {
        self.running.as_ref()?.engine.scrub_progress()
    }

    /// One request reaches the disk as something else than was captured.
    pub fn garble_a_write(&mut self) {
        self.disks.iter().for_each(|(_, disk)| disk.garble_writes(1));
        self.write_something();
        self.disks.iter().for_each(|(_, disk)| disk.garble_writes(0));
    }

    /// Sectors in which the disks are not what their user wrote.
    pub fn garbled(&self) -> Vec<(DiskId, u64)> {
        let contents = self.contents();
        let pairs = contents.iter().zip(self.model.contents());
        let sectors = pairs.flat_map(|((disk, now), (_, meant))| {
            let differing = now.chunks(512).zip(meant.chunks(512)).enumerate().filter(|(_, (now, meant))| now != meant);
            differing.map(|(sector, _)| (*disk, sector as u64 * 512))
        });
        sectors.collect()
    }

    /// What the disks hold is what counts from now on, whoever meant what.
    pub fn take_as_it_is(&mut self) {
        self.model.reshape(self.contents(), self.time.now());
    }

    /// One request fails half-way. The model learns what the disks hold now; what the range was meant to hold is no
    /// longer anybody's promise.
    pub fn fail_a_write(&mut self) {
        self.disks.iter().for_each(|(_, disk)| disk.fail_writes(1));
        self.write_something();
        self.disks.iter().for_each(|(_, disk)| disk.fail_writes(0));
        self.model.reset(self.contents(), self.time.now());
        // The maps name whole granules.
        let (disk, start, len) = self.written_last;
        let size = self.sizes().find(|(id, _)| *id == disk).map_or(0, |(_, size)| size);
        let (start, end) = (start / GRANULE_BYTES * GRANULE_BYTES, (start + len).next_multiple_of(GRANULE_BYTES));
        self.may_lack(disk, ByteRange::new(start, end.min(size) - start));
    }

    /// A sector of disk 0 cannot be read until it is written again, which happens at once, as a disk's own remapping
    /// would.
    pub fn break_sector(&mut self) {
        if !self.is_in_service() {
            return;
        }
        let sectors = self.shape.disk_bytes[0] / 512;
        let offset = self.rng.below(sectors) * 512;
        self.disks[0].1.break_sector(offset);
        self.broken.insert(offset);
    }

    /// Writes one of the broken sectors, if there is one, through the splitter.
    pub fn mend_sector(&mut self) {
        let Some(running) = &self.running else { return };
        let Some(offset) = self.broken.pop_first() else { return };
        debug_assert!(self.stopping.is_none(), "nobody stops an agent while a sector is broken");
        let (disk, data) = (self.disks[0].0.disk, [0x5a; 512]);
        let splitter = running.splitter.disk(disk).expect("a protected disk");
        drop(splitter.write_at(offset, &data));
        self.wrote(disk, offset, &data);
    }

    /// The disks and their sizes.
    pub fn sizes(&self) -> impl Iterator<Item = (DiskId, u64)> {
        self.disks.iter().map(|(geometry, _)| (geometry.disk, geometry.size_bytes))
    }

    /// Size of a disk of the machine, protected or not any more.
    pub fn size_of(&self, disk: DiskId) -> Option<u64> {
        let mut known = self.disks.iter().chain(&self.retired);
        known.find(|(known, _)| known.disk == disk).map(|(known, _)| known.size_bytes)
    }

    /// Ends the agent in order, as a clean shutdown does.
    pub fn close(&mut self) {
        if let Some(running) = &self.running {
            let _ = running.splitter.close(Duration::from_secs(1));
        }
        self.kill_agent();
    }
}
