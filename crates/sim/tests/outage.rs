//! The vault's store is away for long: the journal fills up and stops there, memory stays bounded, nothing that was
//! acknowledged is lost, and what waits for the store waits instead of being decided without it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use recovery::view_of;
use replication::cut::PointTime;
use replication::{DiskId, SequenceNumber};
use sim::clock::{SimClock, TrueTime};
use sim::files::SimFiles;
use sim::link::connect;
use sim::model::digest;
use sim::planted::{Bug, IN_OUTAGES};
use sim::rng::{Rng, SimEntropy};
use sim::server::{JOURNAL_BYTES, MEMORY_BYTES, SEAL_BYTES, SimServer, WINDOW_BYTES};
use sim::source::{Maintenance, Source, SourceShape};
use vault::catalog::Catalog;
use vault::keys::{PassphraseCost, WriterRole};
use vault::points::Which;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, FolderStore, ObjectName, Points, Store, StoreError, UnlockedVault, Vault};
use world::{Clock, Entropy};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// How long anything may take that must come about.
const PATIENCE: u64 = 300 * SECOND;

/// A store that is away, for everything or for reading, as long as somebody says so.
struct Away {
    inner: FolderStore,
    writes: AtomicBool,
    reads: AtomicBool,
}

impl Away {
    fn check(away: &AtomicBool, at: &dyn std::fmt::Display) -> Result<(), StoreError> {
        match away.load(Ordering::SeqCst) {
            true => Err(StoreError::Unavailable { at: at.to_string(), source: "away".into() }),
            false => Ok(()),
        }
    }
}

impl Store for Away {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        Away::check(&self.writes, name)?;
        self.inner.create(name, parts)
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        Away::check(&self.reads, name)?;
        self.inner.read(name, range)
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        Away::check(&self.reads, name)?;
        self.inner.read_all(name)
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        Away::check(&self.reads, name)?;
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        Away::check(&self.reads, &prefix)?;
        self.inner.list(prefix, after, limit)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Place {
    rng: Rng,
    time: TrueTime,
    source: Source,
    server: SimServer,
    store: Arc<Away>,
    unlocked: UnlockedVault,
}

impl Place {
    fn new(seed: u64, shape: SourceShape, bug: Option<Bug>) -> Place {
        let mut rng = Rng::new(seed);
        let time = TrueTime::default();
        let entropy: Arc<dyn Entropy> = Arc::new(SimEntropy::new(rng.fork()));
        let clock: Arc<dyn Clock> = Arc::new(SimClock::booting_now(&time));
        let inner = FolderStore::new(Arc::new(SimFiles::new(rng.draw())), &*entropy, "the simulated vault");
        let store = Arc::new(Away { inner, writes: AtomicBool::new(false), reads: AtomicBool::new(false) });
        let dyn_store: Arc<dyn Store> = store.clone();
        let (unlocked, _) =
            Vault::create(dyn_store.clone(), "simulated", PassphraseCost::TRIVIAL, &entropy, &clock).expect("a vault");
        let keys = unlocked.grant_writer(WriterRole::ProcessServer, "A", &entropy, &clock).expect("a grant");
        let source = Source::new(shape, &time, rng.fork(), bug);
        let server = SimServer::new("A", source.machine, dyn_store, &keys, &time, rng.fork(), bug);
        Place { rng, time, source, server, store, unlocked }
    }

    fn away(&self, writes: bool, reads: bool) {
        self.store.writes.store(writes, Ordering::SeqCst);
        self.store.reads.store(reads, Ordering::SeqCst);
    }

    fn plug(&mut self) {
        let (near, far) = connect(&self.time, MILLISECOND);
        self.server.accept(far);
        self.source.plug(near);
    }

    /// About a fiftieth of a second in which `writes` requests are written.
    fn tick(&mut self, writes: u64) {
        self.time.advance(10 * MILLISECOND + self.rng.below(20 * MILLISECOND));
        if !self.source.is_plugged() && self.rng.one_in(4) {
            self.plug();
        }
        (0..writes).for_each(|_| self.source.write_something());
        for _ in 0..2 {
            self.source.step();
            self.server.step();
            self.time.advance(MILLISECOND);
        }
        assert_eq!(self.server.ends, [""; 0], "its pipeline outlives an outage");
        assert!(self.server.journal_bytes() <= JOURNAL_BYTES, "the journal grew to {}", self.server.journal_bytes());
        // A manifest on its way, what the pipeline collects for the next one, and what the sender had under way.
        let bound = 2 * SEAL_BYTES + MEMORY_BYTES + 2 * WINDOW_BYTES;
        assert!(self.server.memory_bytes() <= bound, "{} bytes are held in memory", self.server.memory_bytes());
    }

    fn ticks(&mut self, for_ns: u64, writes: u64) {
        let until = self.time.now() + for_ns;
        while self.time.now() < until {
            self.tick(writes);
        }
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&Place) -> bool) {
        let until = self.time.now() + PATIENCE;
        while !done(self) {
            assert!(self.time.now() < until, "waited in vain until {what}: {:?}", self.status());
            self.tick(0);
        }
    }

    fn status(&self) -> agent::engine::EngineStatus {
        self.source.engine().expect("it runs").status()
    }

    fn history(&self) -> Option<ChainHistory> {
        let store: Arc<dyn Store> = self.store.clone();
        let catalog = Catalog::load(&store, self.unlocked.keys()).expect("readable");
        let chain = catalog.machines.get(&self.source.machine)?.chain;
        Some(ChainHistory::load(&store, self.unlocked.keys(), chain).expect("readable"))
    }

    /// Everything is in the vault, and no gap is open.
    fn is_current(&self) -> bool {
        let Some(history) = self.source.is_settled().then(|| self.history()).flatten() else { return false };
        history.gaps().iter().all(|gap| gap.until.is_some())
            && history.last_cut().is_some_and(|(last, _)| last == history.through)
            && self.status().captured == history.through
    }

    /// Every point on offer was a state of the disks, and the newest is their present one. Returns how many there are.
    fn judge(&self) -> usize {
        let store: Arc<dyn Store> = self.store.clone();
        let (keys, history) = (self.unlocked.keys(), self.history().expect("a chain"));
        let frames = FrameSource::new(Arc::clone(&store), Arc::clone(keys), CacheBytes::default());
        let view = view_of(&Arc::new(frames), &history).expect("readable");
        let points = Points::new(&store, keys, &history);
        let cuts = points.between(PointTime(0), PointTime(u64::MAX), 100_000, Which::All).expect("readable");
        let mut newest = None;
        let mut judged = 0;
        for cut in cuts.iter().filter(|cut| points.is_openable(cut)) {
            let read = |(disk, size): (DiskId, u64)| {
                let mut bytes = vec![0; size as usize];
                view.read(cut.sequence, disk, 0, &mut bytes).expect("readable");
                (disk, bytes)
            };
            let disks: Vec<_> = self.source.sizes().map(read).collect();
            let state = digest(disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])));
            assert!(!self.source.model.when(state).is_empty(), "{cut:?} was never a state of the machine");
            (newest, judged) = (Some(state), judged + 1);
        }
        assert_eq!(newest, Some(self.source.model.digest()), "the newest point is the present");
        judged
    }
}

fn small() -> SourceShape {
    let heal_window_bytes = replication::limits::HEAL_WINDOW_BYTES;
    SourceShape {
        disk_bytes: vec![320 << 10, 100 << 10],
        ring_bytes: 96 << 10,
        write_bytes_max: 12 << 10,
        write_unit_bytes: 512,
        heal_window_bytes,
    }
}

/// Runs into an outage until the journal has been full for long. Returns what the sender was told is journaled.
fn fill_the_journal(place: &mut Place) -> SequenceNumber {
    place.server.start();
    place.source.start_agent();
    place.wait_for("it is protected", Place::is_current);
    place.ticks(5 * SECOND, 1);
    place.away(true, true);
    place.ticks(60 * SECOND, 1);
    let full = place.status();
    assert!(!full.whole, "the agent's ring has overflowed: {full:?}");
    assert!(place.server.journal_bytes() > JOURNAL_BYTES / 2, "{} bytes", place.server.journal_bytes());
    place.ticks(120 * SECOND, 1);
    assert_eq!(place.status().journaled, full.journaled, "nothing more is taken that cannot be kept");
    full.journaled
}

fn long_outage(seed: u64, bug: Option<Bug>) {
    let mut place = Place::new(seed, small(), bug);
    let journaled = fill_the_journal(&mut place);
    place.away(false, false);
    let generations = place.history().expect("a chain").generations.len();
    place.ticks(5 * SECOND, 1);
    place.wait_for("the vault is current again", Place::is_current);
    let history = place.history().expect("a chain");
    assert_eq!(history.generations.len(), generations, "nobody had to begin anew");
    let lost = history.gaps().into_iter().filter(|gap| gap.after.0 > 0 && gap.after < journaled).count();
    assert_eq!(lost, 0, "what was journaled lies before the gap");
    let points = place.judge();
    assert!(points > 8, "{points} points");
}

#[test]
fn a_long_outage_fills_the_journal_and_no_more() {
    (0..2).for_each(|seed| long_outage(seed, None));
}

#[test]
fn a_server_killed_in_an_outage_commits_what_its_full_journal_holds() {
    for seed in 2..4 {
        let mut place = Place::new(seed, small(), None);
        let journaled = fill_the_journal(&mut place);
        if seed == 2 {
            place.server.kill()
        } else {
            place.server.power_cut()
        }
        place.source.unplug();
        place.away(false, false);
        place.server.start();
        place.ticks(5 * SECOND, 1);
        place.wait_for("the vault is current again", Place::is_current);
        let history = place.history().expect("a chain");
        let lost = history.gaps().into_iter().filter(|gap| gap.after.0 > 0 && gap.after < journaled).count();
        assert_eq!(lost, 0, "what was acknowledged is not lost");
        let points = place.judge();
        assert!(points > 8, "{points} points");
    }
}

/// More than a sender may have under way, of bytes that nobody has yet.
fn heal_in_an_outage() {
    let disk_bytes = 44 << 20;
    let shape = SourceShape { disk_bytes: vec![disk_bytes], write_bytes_max: 4 << 20, ..small() };
    let mut place = Place::new(4, shape, None);
    place.source.start_agent();
    (0..60).for_each(|_| place.source.write_something());
    place.server.start();
    place.plug();
    place.wait_for("the heal has begun", |place| place.status().heal.sent_bytes > 1 << 20);
    place.away(true, false);
    place.ticks(20 * SECOND, 0);
    let stuck = place.status();
    assert!(!stuck.whole && stuck.heal.sent_bytes < disk_bytes, "it waits: {stuck:?}");
    place.ticks(20 * SECOND, 0);
    assert_eq!(place.status().heal, stuck.heal, "no byte more than may be under way");
    place.away(false, false);
    place.wait_for("the vault is current", Place::is_current);
    assert!(place.status().heal.sent_bytes <= disk_bytes, "nothing travels twice: {:?}", place.status().heal);
    place.judge();
}

#[test]
fn a_heal_waits_out_an_outage_and_gets_its_credit_back() {
    heal_in_an_outage();
}

/// A heal by hashes alone, with the vault unreadable for a while or not; how many bytes had to travel.
fn sent_by_a_comparison(unreadable: bool, bug: Option<Bug>) -> u64 {
    let mut place = Place::new(5, small(), bug);
    place.server.start();
    place.source.start_agent();
    place.wait_for("it is protected", Place::is_current);
    place.ticks(10 * SECOND, 1);
    place.wait_for("the vault is current", Place::is_current);
    // The reboot leaves hashes alone to tell what differs, and the new process has read nothing of the vault yet.
    place.server.kill();
    place.source.close();
    place.source.power_cut();
    place.server.start();
    place.source.start_agent();
    place.wait_for("the heal has begun", |place| place.status().heal.planned_bytes > 0);
    if unreadable {
        place.away(false, true);
        place.ticks(20 * SECOND, 0);
        let waiting = place.status();
        assert_eq!((waiting.whole, waiting.heal.sent_bytes), (false, 0), "nothing is decided: {waiting:?}");
        place.away(false, false);
    }
    place.wait_for("the vault is current again", Place::is_current);
    place.judge();
    place.status().heal.sent_bytes
}

/// What a stream lacked that goes on, of a disk that is not there any more, is not looked for.
#[test]
fn a_disk_that_is_removed_before_its_heal_has_ended_is_not_read() {
    let mut place = Place::new(11, small(), None);
    place.server.start();
    place.source.start_agent();
    place.wait_for("it is protected", Place::is_current);
    let restart = |place: &mut Place, meanwhile| {
        assert!(place.source.stop_in_order(5 * SECOND, meanwhile));
        while place.source.is_running() {
            place.tick(0);
        }
        let ended = place.source.take_ended().expect("it ended");
        place.source.start_agent();
        ended.kept.expect("the stream goes on")
    };
    assert!(restart(&mut place, Maintenance::Add).is_empty());
    // Nothing is committed, so the heal of the new disk does not end.
    place.away(true, false);
    place.ticks(5 * SECOND, 0);
    assert!(!restart(&mut place, Maintenance::Remove).is_empty(), "the disk that is taken away is still lacking");
    place.away(false, false);
    place.ticks(5 * SECOND, 1);
    place.wait_for("the vault is current again", Place::is_current);
    let history = place.history().expect("a chain");
    let disks = history.geometry_at(SequenceNumber(u64::MAX));
    assert_eq!(disks.len(), small().disk_bytes.len(), "{disks:?}");
    place.judge();
}

#[test]
fn offers_wait_while_the_vault_cannot_be_read() {
    let sent = sent_by_a_comparison(false, None);
    assert!(sent < 420 << 10, "hashes tell most of it: {sent}");
    assert_eq!(sent_by_a_comparison(true, None), sent, "what could not be compared is not taken for different");
}

#[test]
fn planted_faults_of_outages_are_noticed() {
    for bug in IN_OUTAGES {
        let live = || match bug {
            Bug::ComparedWithoutVault => drop(sent_by_a_comparison(true, Some(bug))),
            _ => long_outage(0, Some(bug)),
        };
        assert!(std::panic::catch_unwind(live).is_err(), "{bug:?} passes for health");
    }
}
