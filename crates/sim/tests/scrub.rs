//! Scrub, from the agent to the vault: what reaches the disk as something else than was captured is found, healed, and the
//! points that hold it say so, and no others. Beside a workload nothing is found that is not so.

use std::collections::BTreeSet;
use std::sync::Arc;

use recovery::view_of;
use replication::cut::{Cut, PointTime};
use replication::geometry::LEAF_BYTES;
use replication::limits::HEAL_WINDOW_BYTES;
use replication::{ByteRange, DiskId, Ranges, SequenceNumber};
use sim::clock::{SimClock, TrueTime};
use sim::files::SimFiles;
use sim::link::connect;
use sim::model::digest_without;
use sim::rng::{Rng, SimEntropy};
use sim::server::SimServer;
use sim::source::{Source, SourceShape};
use vault::catalog::Catalog;
use vault::keys::{PassphraseCost, WriterRole};
use vault::manifest::{Gap, GapScope};
use vault::points::Which;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, FolderStore, Points, Store, UnlockedVault, Vault};
use world::{Clock, Entropy};

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1000 * MILLISECOND;
/// How long anything may take that must come about.
const PATIENCE: u64 = 300 * SECOND;

struct Place {
    rng: Rng,
    time: TrueTime,
    source: Source,
    server: SimServer,
    store: Arc<dyn Store>,
    unlocked: UnlockedVault,
}

impl Place {
    fn new(seed: u64) -> Place {
        let mut rng = Rng::new(seed);
        let time = TrueTime::default();
        let entropy: Arc<dyn Entropy> = Arc::new(SimEntropy::new(rng.fork()));
        let clock: Arc<dyn Clock> = Arc::new(SimClock::booting_now(&time));
        let folder = FolderStore::new(Arc::new(SimFiles::new(rng.draw())), &*entropy, "the simulated vault");
        let store: Arc<dyn Store> = Arc::new(folder);
        let made = Vault::create(store.clone(), "simulated", PassphraseCost::TRIVIAL, &entropy, &clock);
        let (unlocked, _) = made.expect("a vault");
        let keys = unlocked.grant_writer(WriterRole::ProcessServer, "A", &entropy, &clock).expect("a grant");
        let shape = SourceShape {
            disk_bytes: vec![1 << 20, 256 << 10],
            ring_bytes: 512 << 10,
            write_bytes_max: 32 << 10,
            write_unit_bytes: 4096,
            heal_window_bytes: HEAL_WINDOW_BYTES,
        };
        let source = Source::new(shape, &time, rng.fork(), None);
        let server = SimServer::new("A", source.machine, store.clone(), &keys, &time, rng.fork(), None);
        let mut place = Place { rng, time, source, server, store, unlocked };
        place.server.start();
        place.source.start_agent();
        place
    }

    fn tick(&mut self, writes: u64) {
        self.time.advance(10 * MILLISECOND + self.rng.below(20 * MILLISECOND));
        if !self.source.is_running() {
            self.source.start_agent();
        }
        if !self.source.is_plugged() && self.rng.one_in(4) {
            let (near, far) = connect(&self.time, MILLISECOND);
            self.server.accept(far);
            self.source.plug(near);
        }
        (0..writes).for_each(|_| self.source.write_something());
        for _ in 0..2 {
            self.source.step();
            self.server.step();
            self.time.advance(MILLISECOND);
        }
        assert_eq!(self.server.ends, [""; 0], "its pipeline lives");
    }

    fn wait_for(&mut self, what: &str, done: impl Fn(&Place) -> bool) {
        let until = self.time.now() + PATIENCE;
        while !done(self) {
            assert!(self.time.now() < until, "waited in vain until {what}");
            self.tick(0);
        }
    }

    fn history(&self) -> Option<ChainHistory> {
        let catalog = Catalog::load(&self.store, self.unlocked.keys()).expect("readable");
        let chain = catalog.machines.get(&self.source.machine)?.chain;
        Some(ChainHistory::load(&self.store, self.unlocked.keys(), chain).expect("readable"))
    }

    /// Everything is in the vault, no gap is open, and no scrub is under way.
    fn is_at_rest(&self) -> bool {
        let scrubbing = self.source.scrub_progress().is_none_or(|progress| progress.running);
        let Some(history) = (self.source.is_settled() && !scrubbing).then(|| self.history()).flatten() else {
            return false;
        };
        history.gaps().iter().all(|gap| gap.until.is_some())
            && history.last_cut().is_some_and(|(last, _)| last == history.through)
            && self.source.engine().expect("it runs").status().captured == history.through
    }

    fn scrub(&mut self) {
        assert!(self.source.scrub(), "none is under way");
        self.wait_for("the scrub has ended", Place::is_at_rest);
    }

    /// Leaves in which the newest state in the vault is not what the disks hold.
    fn wrong_leaves(&self, history: &ChainHistory) -> BTreeSet<(DiskId, u64)> {
        let frames = FrameSource::new(Arc::clone(&self.store), Arc::clone(self.unlocked.keys()), CacheBytes::default());
        let view = view_of(&Arc::new(frames), history).expect("readable");
        let mut wrong = BTreeSet::new();
        for ((disk, size), now) in self.source.sizes().zip(self.source.snapshot()) {
            let mut held = vec![0; size as usize];
            view.read(history.through, disk, 0, &mut held).expect("readable");
            let leaves = now.chunks(4096).zip(held.chunks(4096)).enumerate();
            wrong.extend(leaves.filter(|(_, (now, held))| now != held).map(|(leaf, _)| (disk, leaf as u64)));
        }
        wrong
    }

    /// Every point on offer with the gaps that it lies in, each of them judged: without what it lacks it was a state of the
    /// disks.
    fn points(&mut self) -> Vec<(Cut, Vec<Gap>)> {
        self.points_without(SequenceNumber(0)..SequenceNumber(0))
    }

    /// The same, but for what lies there.
    fn points_without(&mut self, unjudged: std::ops::Range<SequenceNumber>) -> Vec<(Cut, Vec<Gap>)> {
        let (keys, history) = (self.unlocked.keys().clone(), self.history().expect("a chain"));
        let frames = FrameSource::new(Arc::clone(&self.store), Arc::clone(&keys), CacheBytes::default());
        let view = view_of(&Arc::new(frames), &history).expect("readable");
        let points = Points::new(&self.store, &keys, &history);
        let cuts = points.between(PointTime(0), PointTime(u64::MAX), 100_000, Which::All).expect("readable");
        let mut judged = Vec::new();
        for cut in cuts.into_iter().filter(|cut| points.is_openable(cut) && !unjudged.contains(&cut.sequence)) {
            let gaps: Vec<Gap> = points.gaps().iter().filter(|gap| gap.hides(cut.sequence)).cloned().collect();
            let lacking = Ranges::of(gaps.iter().flat_map(|gap| named(gap).into_iter()));
            let read = |(disk, size): (DiskId, u64)| {
                let mut bytes = vec![0; size as usize];
                view.read(cut.sequence, disk, 0, &mut bytes).expect("readable");
                (disk, bytes)
            };
            let disks: Vec<_> = self.source.sizes().map(read).collect();
            let state = digest_without(&lacking, disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])));
            let known = self.source.model.when_without(&lacking, state);
            assert!(known.is_some(), "{cut:?} was never a state of the machine, even without {lacking}");
            judged.push((cut, gaps));
        }
        judged
    }
}

fn named(gap: &Gap) -> Vec<(DiskId, ByteRange)> {
    match &gap.scope {
        GapScope::Ranges(ranges) => ranges.clone(),
        other => panic!("{other:?} is lacking"),
    }
}

fn leaves_of(sectors: &[(DiskId, u64)]) -> BTreeSet<(DiskId, u64)> {
    sectors.iter().map(|(disk, at)| (*disk, at / LEAF_BYTES)).collect()
}

fn is_suspicion(gap: &Gap) -> bool {
    gap.cause.starts_with("suspect: ")
}

/// Lives through a scrub beside writers, then through writes that reach the disk as something else, and a scrub that finds
/// them. With `killed` the agent is killed when it has found them, before anybody was told.
fn life(seed: u64, killed: bool) -> (usize, usize) {
    let mut place = Place::new(seed);
    place.wait_for("it is protected", Place::is_at_rest);
    // Beside writers, several rounds.
    for _ in 0..400 {
        place.tick(1);
        place.source.scrub();
    }
    place.wait_for("it is at rest", Place::is_at_rest);
    place.scrub();
    let progress = place.source.scrub_progress().expect("it can be scrubbed");
    assert!(progress.same_bytes > 2 << 20 && progress.differing_bytes == 0, "{progress:?}");
    let before = place.points();
    assert!(before.iter().all(|(_, gaps)| gaps.is_empty()), "nothing is lacking of any point: {before:?}");
    let clean = place.history().expect("a chain").through;

    for _ in 0..60 {
        place.tick(1);
        if place.rng.one_in(6) {
            place.source.garble_a_write();
        }
    }
    place.wait_for("it is at rest", Place::is_at_rest);
    let differing = leaves_of(&place.source.garbled());
    assert!(!differing.is_empty());
    let found_at = place.history().expect("a chain").through;
    let held = place.points();
    assert!(held.iter().all(|(_, gaps)| gaps.is_empty()), "nobody knows");

    // What reached the disks is what counts from here on; the points before hold what was meant.
    place.source.take_as_it_is();
    assert!(place.source.scrub());
    if killed {
        place.wait_for("something is found", |place| {
            place.source.engine().is_some_and(|engine| !engine.status().lacking.is_empty())
        });
        place.source.kill_agent();
    }
    place.wait_for("the scrub has ended", Place::is_at_rest);
    let progress = place.source.scrub_progress().expect("it can be scrubbed");
    let history = place.history().expect("a chain");
    let suspicions: Vec<Gap> = history.gaps().into_iter().filter(is_suspicion).collect();
    let leaves = suspicions.iter().flat_map(named).flat_map(|(disk, range)| {
        range.split_at_multiples(LEAF_BYTES).map(move |leaf| (disk, leaf.start / LEAF_BYTES))
    });
    let suspect: BTreeSet<(DiskId, u64)> = leaves.collect();
    assert!(suspect.is_subset(&differing), "{suspect:?} of {differing:?}");
    // Everything is healed but what could not be compared: discarded, or written in part.
    let wrong = place.wrong_leaves(&history);
    assert!(wrong.is_subset(&differing) && wrong.is_disjoint(&suspect), "{wrong:?} is wrong of {differing:?}");
    assert!(wrong.is_empty() || killed || progress.untold_bytes > 0, "{wrong:?} was not found: {progress:?}");
    // Each suspicion begins where it was compared last and hides every point since, up to the break.
    let mut spared = 0;
    for gap in &suspicions {
        let (until, _) = gap.until.expect("it is recorded with its end");
        assert!(gap.after <= clean && gap.after.0 > 0, "{gap:?} is from {clean}");
        assert!(until > found_at, "{gap:?} ends before {found_at}");
        for (cut, _) in &held {
            let hidden = gap.hides(cut.sequence);
            assert!(hidden || cut.sequence <= gap.after, "{cut:?} is not in question by {gap:?}");
        }
        spared += before.iter().filter(|(cut, _)| !gap.hides(cut.sequence)).count();
    }
    if wrong.is_empty() {
        // The newest point is the present, and lacks nothing.
        for _ in 0..40 {
            place.tick(1);
        }
        place.wait_for("it is at rest", Place::is_at_rest);
        // What a scrub cannot compare, a heal after a kill may have mended: before it, points hold what was meant there.
        let restarted = history.gaps().into_iter().rfind(|gap| gap.scope == GapScope::Machine && killed);
        let unjudged = restarted.map_or(found_at, |gap| gap.after);
        let (_, lacking) = place.points_without(found_at.next()..unjudged.next()).pop().expect("there are points");
        assert!(lacking.is_empty(), "{lacking:?}");
        place.scrub();
        let again = place.source.scrub_progress().expect("it can be scrubbed");
        assert_eq!(again.differing_bytes, progress.differing_bytes, "what was healed differs no more");
        assert!(place.wrong_leaves(&place.history().expect("a chain")).is_empty());
    }
    (suspicions.len(), spared)
}

fn lives(seeds: std::ops::Range<u64>, killed: bool) {
    let lived = seeds.clone().map(|seed| life(seed, killed));
    let (found, spared) = lived.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    assert!(found as u64 * 2 >= seeds.end - seeds.start, "{found} suspicions in {seeds:?}");
    assert!(spared > 0, "what was found equal before stays so");
}

#[test]
fn what_differs_is_found_and_healed_and_its_points_say_so() {
    lives(0..6, false);
}

#[test]
fn what_a_killed_agent_has_found_is_not_forgotten() {
    lives(10..14, true);
}
