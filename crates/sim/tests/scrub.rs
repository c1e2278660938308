//! Scrub, from the agent to the vault: what reaches the disk as something else than was captured is found, healed, and the
//! points that hold it say so, and no others. Beside a workload nothing is found that is not so.

use std::collections::BTreeSet;
use std::sync::Arc;

use recovery::view_of;
use replication::cut::{Cut, PointTime};
use replication::geometry::LEAF_BYTES;
use replication::limits::HEAL_WINDOW_BYTES;
use replication::{ByteRange, DiskId, Ranges};
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

    /// Every point on offer with the gaps that it lies in, each of them judged: without what it lacks it was a state of the
    /// disks.
    fn points(&mut self) -> Vec<(Cut, Vec<Gap>)> {
        let (keys, history) = (self.unlocked.keys().clone(), self.history().expect("a chain"));
        let frames = FrameSource::new(Arc::clone(&self.store), Arc::clone(&keys), CacheBytes::default());
        let view = view_of(&Arc::new(frames), &history).expect("readable");
        let points = Points::new(&self.store, &keys, &history);
        let cuts = points.between(PointTime(0), PointTime(u64::MAX), 100_000, Which::All).expect("readable");
        let mut judged = Vec::new();
        for cut in cuts.into_iter().filter(|cut| points.is_openable(cut)) {
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

fn is_suspicion(gap: &Gap) -> bool {
    gap.cause.starts_with("suspect: ")
}

/// Lives through a scrub beside writers, then through writes that reach the disk as something else, and a scrub that finds
/// them. With `killed` the agent is killed when it has found them, before anybody was told.
fn life(seed: u64, killed: bool) -> usize {
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
    let garbled = place.source.garbled();
    let differing: BTreeSet<(DiskId, u64)> = garbled.iter().map(|(disk, at)| (*disk, at / LEAF_BYTES)).collect();
    assert!(!differing.is_empty());
    let found_at = place.history().expect("a chain").through;
    let held = place.points();
    assert!(held.iter().all(|(_, gaps)| gaps.is_empty()), "nobody knows");

    assert!(place.source.scrub());
    if killed {
        place.wait_for("something is found", |place| {
            place.source.engine().is_some_and(|engine| !engine.status().lacking.is_empty())
        });
        place.source.kill_agent();
    }
    place.wait_for("the scrub has ended", Place::is_at_rest);
    // The disks hold what was healed; leaves that were written in part the vault could not compare.
    let healed = place.source.garbled();
    let progress = place.source.scrub_progress().expect("it can be scrubbed");
    let history = place.history().expect("a chain");
    let suspicions: Vec<Gap> = history.gaps().into_iter().filter(is_suspicion).collect();
    let suspect: BTreeSet<(DiskId, u64)> = suspicions
        .iter()
        .flat_map(|gap| named(gap))
        .flat_map(|(disk, range)| range.split_at_multiples(LEAF_BYTES).map(move |leaf| (disk, leaf.start / LEAF_BYTES)))
        .collect();
    assert!(suspect.is_subset(&differing), "{suspect:?} of {differing:?}");
    assert_eq!(healed, garbled, "the disks are as they were");
    if !killed {
        assert!(differing.len() == suspect.len() || progress.untold_bytes > 0, "{suspect:?} of {differing:?}");
    }
    place.source.take_as_it_is();
    let view_now = {
        let frames =
            FrameSource::new(Arc::clone(&place.store), Arc::clone(place.unlocked.keys()), CacheBytes::default());
        view_of(&Arc::new(frames), &history).expect("readable")
    };
    // What was found is healed, and what could not be compared is as it was.
    for ((disk, now), (_, size)) in
        place.source.snapshot().into_iter().zip(place.source.sizes()).map(|(b, s)| ((s.0, b), s))
    {
        let mut replica = vec![0; size as usize];
        view_now.read(history.through, disk, 0, &mut replica).expect("readable");
        for (leaf, (a, b)) in now.chunks(4096).zip(replica.chunks(4096)).enumerate() {
            let known = suspect.contains(&(disk, leaf as u64)) || !differing.contains(&(disk, leaf as u64));
            assert!(!known || a == b, "leaf {leaf} of {disk} is not healed");
        }
    }
    // Each suspicion begins where it was compared last and hides every point since, up to the break.
    for gap in &suspicions {
        let (until, _) = gap.until.expect("it is recorded with its end");
        assert!(gap.after <= clean && gap.after.0 > 0, "{gap:?} is from {clean}");
        assert!(until > found_at, "{gap:?} ends before {found_at}");
        for (cut, _) in &held {
            let hidden = gap.hides(cut.sequence);
            assert!(hidden || cut.sequence <= gap.after, "{cut:?} is not in question by {gap:?}");
        }
        assert!(before.iter().any(|(cut, _)| !gap.hides(cut.sequence)), "what was found equal before stays so");
    }
    if suspect.len() == differing.len() {
        // Every difference was found: the newest point is the present, and lacks nothing.
        for _ in 0..40 {
            place.tick(1);
        }
        place.wait_for("it is at rest", Place::is_at_rest);
        let (_, lacking) = place.points().pop().expect("there are points");
        assert!(lacking.is_empty(), "{lacking:?}");
        place.scrub();
        let again = place.source.scrub_progress().expect("it can be scrubbed");
        assert_eq!(again.differing_bytes, progress.differing_bytes, "what was healed differs no more");
    }
    suspicions.len()
}

#[test]
fn what_differs_is_found_and_healed_and_its_points_say_so() {
    let found: usize = (0..6).map(|seed| life(seed, false)).sum();
    assert!(found >= 3, "{found} suspicions");
}

#[test]
fn what_a_killed_agent_has_found_is_not_forgotten() {
    let found: usize = (10..14).map(|seed| life(seed, true)).sum();
    assert!(found >= 2, "{found} suspicions");
}
