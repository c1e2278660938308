//! Chains under races, garbage, lost answers and damage, against a slow and obvious oracle; points; the catalog.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use bytes::Bytes;
use proptest::prelude::*;
use replication::{ByteRange, ChainId, CutKind, DiskId, Generation, MarkerKind, SequenceNumber};
use support::World;
use support::fixture::{Fixture, delta, prepare, same};
use support::history::{BRANCH, CHAIN, MACHINE, cut, second, seq};
use vault::chain::{Alarm, ChainControl, Phase, list_chains};
use vault::keys::{NameEpoch, ObjectNonce, WriterRole};
use vault::manifest::{GapClosed, ManifestKind, ManifestLink};
use vault::numbered::NumberedNames;
use vault::points::Which;
use vault::revoke::revoke_writer;
use vault::{
    Catalog, CatalogEntry, ChainHistory, ChainTail, ChainWriter, CheckpointWish, Delta, Gap, GapScope, Moment,
    ObjectName, OpenKeys, PointError, Points, PreparedManifest, Store, StoreError, VaultError,
};

#[derive(Debug, Clone)]
enum Step {
    /// A writer prepares and puts its next manifest.
    Commit { writer: usize, lose_answer: bool },
    /// A writer prepares and falls asleep.
    Prepare { writer: usize },
    /// It wakes up and puts.
    Wake { writer: usize },
    /// A writer takes over.
    Open { writer: usize },
    /// A granted writer signs a successor of an old head under the next number.
    Forge { writer: usize },
    /// Someone with the name key burns the next number: with nonsense, or with a copy of an old manifest.
    Burn { copy: bool },
    /// Someone without it drops a file into the folder.
    Litter { byte: u8 },
    /// An operator fails the machine over, or decides on that, perhaps upon an old look at the chain.
    Operate { operator: usize, decision: Decision, stale: bool },
    /// A writer's grant is revoked, and another writer gets one in its place.
    Revoke { writer: usize },
    /// Whoever was revoked puts what it had prepared before.
    Ghost { ghost: usize },
    /// Whoever was revoked burns a number at the end of the chain or a little behind it, with the newest name key it has.
    BurnRevoked { ghost: usize, ahead: u64 },
}

/// A writer whose grant was revoked, and what it knows.
struct Ghost {
    names: NumberedNames,
    newest: NameEpoch,
    asleep: Option<(ChainWriter, PreparedManifest)>,
}

/// What stands under the chain's names and is no part of it, where the chain has come to, and what follows.
#[derive(Default)]
struct Oracle {
    /// Links in the order in which they were won.
    won: Vec<ManifestLink>,
    junk: BTreeSet<(u64, NameEpoch)>,
    /// The epoch in which the next manifest is named, and the one that the next generation leads to.
    epoch: NameEpoch,
    newest: NameEpoch,
}

impl Oracle {
    /// A generation was opened, or a decision made.
    fn opened(&mut self, link: ManifestLink) {
        self.won.push(link);
        self.epoch = self.newest;
    }

    fn next_number(&self) -> u64 {
        let head = self.won.last().expect("not empty").number;
        (head + 1..).find(|number| !self.junk.contains(&(*number, self.epoch))).expect("numbers do not end")
    }

    /// In which epoch a number is, or will be, named.
    fn epoch_at(&self, number: u64) -> NameEpoch {
        self.won.iter().find(|link| link.number >= number).map_or(self.epoch, |link| link.epoch)
    }

    /// What burns nothing, because it is named in an epoch that is not that number's.
    fn retired(&self) -> BTreeSet<(u64, NameEpoch)> {
        self.junk.iter().copied().filter(|(number, epoch)| self.epoch_at(*number) != *epoch).collect()
    }
}

#[derive(Debug, Clone, Copy)]
enum Decision {
    Close,
    Commit,
    Cancel,
}

fn decision() -> impl Strategy<Value = Decision> {
    prop_oneof![3 => Just(Decision::Close), 1 => Just(Decision::Commit), 2 => Just(Decision::Cancel)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..3usize, any::<bool>()).prop_map(|(writer, lose_answer)| Step::Commit { writer, lose_answer }),
        2 => (0..3usize).prop_map(|writer| Step::Prepare { writer }),
        3 => (0..3usize).prop_map(|writer| Step::Wake { writer }),
        2 => (0..3usize).prop_map(|writer| Step::Open { writer }),
        1 => (0..3usize).prop_map(|writer| Step::Forge { writer }),
        2 => any::<bool>().prop_map(|copy| Step::Burn { copy }),
        1 => any::<u8>().prop_map(|byte| Step::Litter { byte }),
        3 => (0..2usize, decision(), any::<bool>())
            .prop_map(|(operator, decision, stale)| Step::Operate { operator, decision, stale }),
        1 => (0..3usize).prop_map(|writer| Step::Revoke { writer }),
        1 => any::<usize>().prop_map(|ghost| Step::Ghost { ghost }),
        3 => (any::<usize>(), 0..3u64).prop_map(|(ghost, ahead)| Step::BurnRevoked { ghost, ahead }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever happens, what a writer was told is committed is in the chain, in order, and nothing else is; a writer
    /// that lost its generation commits nothing; a closed chain takes nothing but a decision on its own close, whoever
    /// races with whom, and an ended one nothing at all; whoever was revoked burns no number from the next generation on;
    /// all ways of reading agree, the owner's and the writers'.
    #[test]
    fn the_chain_holds_exactly_what_was_won(steps in prop::collection::vec(step(), 1..40)) {
        let fixture = Fixture::new();
        let mut sessions: Vec<_> = (0..3).map(|index| fixture.world.writer(&format!("ps {index}"))).collect();
        let mut writers: Vec<Option<ChainWriter>> = vec![Some(fixture.create(&sessions[0])), None, None];
        let mut asleep: Vec<Option<PreparedManifest>> = vec![None, None, None];
        let mut oracle = Oracle::default();
        oracle.opened(writers[0].as_ref().expect("made").head());
        // Who holds the chain.
        let mut holder = Some(0);
        let mut ghosts: Vec<Ghost> = Vec::new();
        let operators: Vec<_> =
            (0..2).map(|index| fixture.world.writer_as(WriterRole::Operator, &format!("op {index}"))).collect();
        let mut old: Option<ChainHistory> = None;
        let mut tail = ChainTail::new(CHAIN);
        for step in steps {
            match step {
                Step::Commit { writer: index, lose_answer } => {
                    let Some(writer) = &mut writers[index] else { continue };
                    if asleep[index].is_some() { continue }
                    let mut prepared = prepare(writer);
                    *fixture.fragile.lose_next_answer.lock().unwrap() = lose_answer;
                    let result = loop {
                        match writer.put(&prepared) {
                            Err(VaultError::NumberBurnt { .. }) => prepared = prepare(writer),
                            Err(VaultError::Store(error)) => assert!(error.is_retryable()),
                            other => break other,
                        }
                    };
                    *fixture.fragile.lose_next_answer.lock().unwrap() = false;
                    prop_assert_eq!(result.is_ok(), holder == Some(index), "{:?}", result);
                    match result {
                        Ok(()) => oracle.won.push(writer.head()),
                        Err(error) => {
                            let fenced = matches!(error, VaultError::Fenced { .. }) && writer.is_fenced();
                            prop_assert!(fenced, "{}", error);
                        }
                    }
                }
                Step::Prepare { writer: index } => {
                    if let Some(writer) = &writers[index] && !writer.is_fenced() {
                        asleep[index].get_or_insert_with(|| prepare(writer));
                    }
                }
                Step::Wake { writer: index } => {
                    let (Some(writer), Some(prepared)) = (&mut writers[index], asleep[index].take()) else { continue };
                    match writer.put(&prepared) {
                        Ok(()) => {
                            prop_assert_eq!(holder, Some(index));
                            oracle.won.push(writer.head());
                        }
                        Err(VaultError::Fenced { .. }) => prop_assert_ne!(holder, Some(index)),
                        Err(VaultError::NumberBurnt { .. }) => {}
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Forge { writer: index } => {
                    let Some(mut forged) = old.clone() else { continue };
                    forged.next_number = fixture.load().next_number;
                    let (session, keys) = &sessions[index];
                    let delta = Delta::default();
                    match ChainWriter::open_generation(&fixture.store, session, keys, &forged, "forged", delta) {
                        Ok(writer) => drop(oracle.junk.insert((writer.head().number, writer.head().epoch))),
                        // Nobody signs what would not count by its own look at the chain.
                        Err(VaultError::ChainClosed { .. }) => prop_assert!(forged.standing.closed().is_some()),
                        // The same was forged before, under a name that burns nothing.
                        Err(VaultError::Fenced { number }) => {
                            prop_assert!(oracle.retired().contains(&(number, forged.name_epoch)));
                        }
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Open { writer: index } => {
                    old = Some(fixture.load());
                    let closed = fixture.load().standing.closed().is_some();
                    match fixture.open(&sessions[index]) {
                        Ok(writer) => {
                            prop_assert!(!closed);
                            oracle.opened(writer.head());
                            writers[index] = Some(writer);
                            asleep[index] = None;
                            holder = Some(index);
                        }
                        Err(VaultError::ChainClosed { .. }) => prop_assert!(closed),
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Operate { operator, decision, stale } => {
                    let (session, keys) = &operators[operator];
                    let now = fixture.load();
                    let look = old.clone().filter(|_| stale).unwrap_or_else(|| now.clone());
                    let close = look.standing.closed().map_or(ObjectNonce([7; 16]), |closed| closed.close.nonce);
                    let is_closed = matches!(look.standing.phase, Phase::Closed(_));
                    let (kind, fits) = match decision {
                        Decision::Close => {
                            let kind = ManifestKind::Close { successor: BRANCH, reason: "test".into(), seconds: 1 };
                            (kind, look.standing.phase == Phase::Open)
                        }
                        Decision::Commit => (ManifestKind::Commit { close }, is_closed),
                        Decision::Cancel => (ManifestKind::Cancel { close, reason: "test".into() }, is_closed),
                    };
                    match ChainControl::new(&fixture.store, session, keys).decide_after(&look, kind) {
                        Ok(()) => {
                            prop_assert!(fits && look.head == now.head);
                            oracle.opened(fixture.load().head);
                            holder = None;
                            old = Some(now);
                        }
                        Err(VaultError::Fenced { .. }) => prop_assert!(fits && look.head != now.head),
                        Err(VaultError::ChainClosed { .. } | VaultError::WrongChainState { .. }) => prop_assert!(!fits),
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Burn { copy } => {
                    let number = fixture.load().next_number;
                    let bytes = match copy {
                        true => fixture.store.read_all(&fixture.name(1)).expect("genesis"),
                        false => Bytes::from_static(b"nonsense"),
                    };
                    let names = NumberedNames::of_chain(fixture.world.unlocked.keys(), CHAIN);
                    let name = names.name(number, oracle.epoch).expect("the reader has every key");
                    fixture.store.create(&name, &[bytes]).expect("the number is free");
                    oracle.junk.insert((number, oracle.epoch));
                }
                Step::Revoke { writer: index } => {
                    let id = sessions[index].0.keys().writer();
                    ChainHistory::load(&fixture.store, &sessions[index].1, CHAIN).expect("it is up to date");
                    let World { unlocked, entropy, clock, .. } = &fixture.world;
                    let revoked = revoke_writer(unlocked, id, "test", entropy, clock).expect("revoke");
                    let fenced = holder == Some(index);
                    prop_assert_eq!(revoked.fenced.as_slice(), if fenced { &[CHAIN][..] } else { &[] });
                    if fenced {
                        holder = None;
                        oracle.opened(fixture.load().head);
                    }
                    let (names, newest) = (NumberedNames::of_chain(&sessions[index].1, CHAIN), oracle.newest);
                    prop_assert!(names.has(newest), "it was told of every epoch before");
                    let asleep = writers[index].take().zip(asleep[index].take());
                    ghosts.push(Ghost { names, newest, asleep });
                    oracle.newest = newest.next();
                    let late = fixture.open(&sessions[index]);
                    prop_assert!(matches!(late, Err(VaultError::Revoked { .. })), "it is told");
                    sessions[index] = fixture.world.writer("another ps");
                }
                Step::Ghost { ghost } => {
                    if ghosts.is_empty() { continue }
                    let ghost = ghost % ghosts.len();
                    let Some((mut writer, prepared)) = ghosts[ghost].asleep.take() else { continue };
                    prop_assert!(writer.put(&prepared).is_err());
                }
                Step::BurnRevoked { ghost, ahead } => {
                    if ghosts.is_empty() { continue }
                    let ghost = &ghosts[ghost % ghosts.len()];
                    let number = fixture.load().next_number + ahead;
                    let name = ghost.names.name(number, ghost.newest).expect("it had this key");
                    if fixture.store.create(&name, &[Bytes::from_static(b"revenge")]).is_ok() {
                        oracle.junk.insert((number, ghost.newest));
                    }
                }
                Step::Litter { byte } => {
                    let name = format!("{}{byte:02x}-litter", fixture.names.folder());
                    fixture.fragile.set(&ObjectName::new(name).expect("a name"), Bytes::from_static(b"x"));
                }
            }
            let (fast, complete) = (
                fixture.load(),
                ChainHistory::load_all(&fixture.store, fixture.world.unlocked.keys(), CHAIN).expect("load all"),
            );
            same(&fast, &complete);
            let followed = tail.read_on(&fixture.store, fixture.world.unlocked.keys()).expect("read on");
            same(&followed.expect("the chain is there"), &complete);
            let (session, keys) = &sessions[oracle.won.len() % 3];
            same(&ChainHistory::load(&fixture.store, keys, CHAIN).expect("a writer loads"), &complete);
            let fresh = OpenKeys::of_writer(session.keys());
            same(&ChainHistory::load(&fixture.store, &fresh, CHAIN).expect("it starts anew"), &complete);
            prop_assert_eq!(fast.head, *oracle.won.last().expect("not empty"));
            prop_assert_eq!((fast.next_number, fast.name_epoch), (oracle.next_number(), oracle.epoch));
            prop_assert_eq!(fast.standing, complete.standing);
            let retired: BTreeSet<_> = complete
                .alarms
                .iter()
                .filter_map(|alarm| match alarm {
                    Alarm::WrongEpoch { number, epoch } => Some((*number, *epoch)),
                    _ => None,
                })
                .collect();
            prop_assert_eq!(retired, oracle.retired());
            let lost = complete.alarms.iter().any(|alarm| matches!(alarm, Alarm::LostParent { .. }));
            prop_assert!(!lost);
            for link in &oracle.won {
                prop_assert!(fast.contains(&fixture.store, fixture.world.unlocked.keys(), link.number, link.nonce).expect("reads"));
            }
        }
    }
}

/// A chain with several checkpoints in two generations and a cut every second.
fn long_chain(fixture: &Fixture, manifests: usize) -> Vec<ManifestLink> {
    let mut links = Vec::new();
    for (label, count) in [("one", manifests), ("two", manifests / 2)] {
        let session = fixture.world.writer(label);
        let mut writer =
            if links.is_empty() { fixture.create(&session) } else { fixture.open(&session).expect("open") };
        links.push(writer.head());
        for index in 0..count {
            let marker = index % 50 == 25;
            let link = writer.commit(CheckpointWish::WhenDue, |_| second_of(&links, index, label, marker));
            links.push(link.expect("commit"));
        }
    }
    links
}

fn second_of(links: &[ManifestLink], index: usize, label: &str, marker: bool) -> Result<Delta, VaultError> {
    let generation = if label == "one" { 1 } else { 2 };
    let seconds = links.len() as u64;
    let sequence = seq(generation, index as u64 + 1);
    let kind = match marker {
        true => CutKind::Marker { kind: MarkerKind::Crash, name: format!("{label} {index}") },
        false => CutKind::Second,
    };
    Ok(Delta {
        through: sequence,
        proven_through: second(seconds),
        cuts: vec![cut(sequence, seconds, kind)],
        ..Delta::default()
    })
}

#[test]
fn a_long_chain_is_read_without_reading_all_of_it() {
    let fixture = Fixture::new();
    let links = long_chain(&fixture, 1000);
    let before = fixture.fragile.requests.load(std::sync::atomic::Ordering::Relaxed);
    let history = fixture.load();
    let requests = fixture.fragile.requests.load(std::sync::atomic::Ordering::Relaxed) - before;
    assert!(requests < 2 * 64 + 20, "{requests} requests");
    same(&history, &ChainHistory::load_all(&fixture.store, fixture.world.unlocked.keys(), CHAIN).expect("load all"));
    let keys = fixture.world.unlocked.keys();
    let points = Points::new(&fixture.store, keys, &history);
    // Every second is found, with few requests, wherever it is.
    for seconds in (1..=1501u64).step_by(97).chain([1, 1000, 1501]) {
        let before = fixture.fragile.requests.load(std::sync::atomic::Ordering::Relaxed);
        let point = points.resolve(&Moment::At(second(seconds)));
        let requests = fixture.fragile.requests.load(std::sync::atomic::Ordering::Relaxed) - before;
        // The opening of a generation has no cut of its own second.
        let expected = if seconds == 1001 { second(1000) } else { second(seconds) };
        assert_eq!(point.expect("a point").cut.time, expected);
        assert!(requests <= 12, "{requests} requests for second {seconds}");
    }
    let all = points.between(second(0), second(9999), usize::MAX, Which::All).expect("points");
    assert_eq!(all.len(), 1500);
    assert!(all.is_sorted_by(|a, b| a.sequence < b.sequence));
    assert_eq!(points.between(second(100), second(110), 5, Which::All).expect("points").len(), 5);
    let markers = points.between(second(0), second(9999), usize::MAX, Which::Markers).expect("points");
    assert_eq!(markers.len(), 30);
    assert_eq!(points.resolve(&Moment::Marker("one 25".into())).expect("found").cut.sequence, seq(1, 26));
    assert!(history.contains(&fixture.store, keys, 500, links[499].nonce).expect("reads"));
    assert!(!history.contains(&fixture.store, keys, 500, links[498].nonce).expect("reads"));
    assert!(!history.contains(&fixture.store, keys, 99_999, links[498].nonce).expect("reads"));
}

#[test]
fn damage_in_the_middle_is_an_alarm_and_stops_writers() {
    let fixture = Fixture::new();
    let links = long_chain(&fixture, 20);
    for missing in [false, true] {
        let name = fixture.name(10);
        let bytes = fixture.store.read_all(&name).expect("read");
        match missing {
            true => fixture.fragile.remove(&name),
            false => fixture.fragile.set(&name, Bytes::from([&bytes[..60], b"?", &bytes[61..]].concat())),
        }
        let history = fixture.load();
        assert_eq!(history.head, links[8], "history before the damage stays readable");
        assert!(history.alarms.contains(&Alarm::LostParent { number: 11, parent: 10 }), "{:?}", history.alarms);
        let (session, keys) = fixture.world.writer("late");
        let refused = ChainWriter::open_generation(&fixture.store, &session, &keys, &history, "x", Delta::default());
        assert!(matches!(refused, Err(VaultError::WrongChainState { .. })));
        fixture.fragile.set(&name, bytes);
        assert_eq!(fixture.load().head, *links.last().expect("long"));
    }
}

#[test]
fn a_newer_manifest_is_never_skipped() {
    let fixture = Fixture::new();
    let writer = fixture.create(&fixture.world.writer("one"));
    let name = fixture.name(writer.head().number + 1);
    let mut newer = fixture.store.read_all(&fixture.name(1)).expect("genesis").to_vec();
    newer[8] = 9;
    fixture.fragile.set(&name, newer.into());
    let keys = fixture.world.unlocked.keys();
    for result in [ChainHistory::load(&fixture.store, keys, CHAIN), ChainHistory::load_all(&fixture.store, keys, CHAIN)]
    {
        assert!(matches!(result, Err(VaultError::NewerFormat { .. })));
    }
}

#[test]
fn creating_twice_and_opening_late_fail() {
    let fixture = Fixture::new();
    let (one, two) = (fixture.world.writer("one"), fixture.world.writer("two"));
    assert!(matches!(
        ChainHistory::load(&fixture.store, &one.1, CHAIN),
        Err(VaultError::WrongChainState { reason: "there is no such chain in this vault", .. })
    ));
    fixture.create(&one);
    let again = ChainWriter::create(&fixture.store, &two.0, &two.1, CHAIN, (MACHINE, None), Delta::default());
    assert!(matches!(again, Err(VaultError::Fenced { number: 1 })));
    let stale = fixture.load();
    fixture.open(&two).expect("open");
    let late = ChainWriter::open_generation(&fixture.store, &one.0, &one.1, &stale, "late", Delta::default());
    assert!(matches!(late, Err(VaultError::Fenced { number: 2 })));
    assert_eq!(fixture.load().generation().generation, Generation(2));
    assert_eq!(list_chains(fixture.store.as_ref()).expect("list"), [CHAIN]);
    fixture.fragile.set(&ObjectName::new("chains/zzz/zzzz/zzzzz").expect("a name"), Bytes::new());
    let other = ChainId([0xfe; 16]);
    ChainWriter::create(&fixture.store, &two.0, &two.1, other, (MACHINE, None), Delta::default()).expect("create");
    assert_eq!(list_chains(fixture.store.as_ref()).expect("list"), [CHAIN, other]);
}

#[test]
fn a_delta_too_large_to_read_back_is_refused_before_it_is_written() {
    let fixture = Fixture::new();
    let writer = fixture.create(&fixture.world.writer("one"));
    let gap = Gap { after: seq(1, 0), scope: GapScope::Machine, time: second(1), cause: "x".repeat(2000), until: None };
    let delta = Delta { gaps_opened: vec![gap], ..Delta::default() };
    let result = writer.prepare(writer.begin(), delta, CheckpointWish::WhenDue);
    assert!(matches!(result.err().expect("refused"), VaultError::LimitExceeded { what: "gap cause", .. }));
}

/// Cuts at seconds 1..=9, a break after second 5 whose heal ends at second 8, and a disk that lacks until second 3.
fn gapped(fixture: &Fixture) {
    let mut writer = fixture.create(&fixture.world.writer("one"));
    let disk_scope = GapScope::Disks(vec![DiskId(1)]);
    let range_scope = GapScope::Ranges(vec![(DiskId(0), ByteRange::new(0, 4096))]);
    let gap = |after, scope, seconds, cause: &str| Gap {
        after,
        scope,
        time: second(seconds),
        cause: cause.into(),
        until: None,
    };
    for seconds in 1..=9u64 {
        let sequence = seq(1, 10 * seconds);
        let mut delta = Delta {
            through: sequence,
            proven_through: second(seconds),
            cuts: vec![cut(sequence, seconds, CutKind::Second)],
            ..Delta::default()
        };
        match seconds {
            1 => delta.gaps_opened.push(gap(seq(1, 0), disk_scope.clone(), 0, "new disk")),
            3 => delta.gaps_closed.push(GapClosed {
                after: seq(1, 0),
                scope: disk_scope.clone(),
                until: sequence,
                time: second(3),
            }),
            5 => delta.gaps_opened.push(gap(sequence, GapScope::Machine, 5, "the ring was full")),
            8 => {
                delta.cuts[0].kind = CutKind::HealEnd;
                delta.gaps_closed.push(GapClosed {
                    after: seq(1, 50),
                    scope: GapScope::Machine,
                    until: sequence,
                    time: second(8),
                });
            }
            9 => delta.gaps_opened.push(gap(seq(1, 85), range_scope.clone(), 9, "grown")),
            _ => {}
        }
        writer.commit(CheckpointWish::WhenDue, |_| Ok(delta.clone())).expect("commit");
    }
}

#[test]
fn moments_are_resolved_with_a_reason_or_refused_with_the_nearest_points() {
    let fixture = Fixture::new();
    gapped(&fixture);
    let history = fixture.load();
    let points = Points::new(&fixture.store, fixture.world.unlocked.keys(), &history);
    let chosen = |moment: Moment| {
        let point = points.resolve(&moment).expect("a point");
        assert!(!point.reason.is_empty());
        (point.cut.sequence, point.lacking.len())
    };
    assert_eq!(chosen(Moment::Latest), (seq(1, 90), 1));
    assert_eq!(chosen(Moment::At(second(4))), (seq(1, 40), 0));
    assert_eq!(chosen(Moment::At(second(2))), (seq(1, 20), 1), "the new disk is lacking");
    assert_eq!(chosen(Moment::At(second(5))), (seq(1, 50), 0), "the cut at the break");
    assert_eq!(chosen(Moment::At(second(8))), (seq(1, 80), 0));
    assert_eq!(chosen(Moment::Back(1)), (seq(1, 80), 0));
    assert_eq!(chosen(Moment::Sequence(seq(1, 45))), (seq(1, 40), 0));
    let rounded = points.resolve(&Moment::Sequence(seq(1, 45))).expect("a point").reason;
    assert!(rounded.contains("rounded down to 1.40"), "{rounded}");

    for inside in [
        Moment::At(second(6)),
        Moment::At(replication::PointTime(second(5).0 + 1)),
        Moment::At(replication::PointTime(second(8).0 - 1)),
        Moment::Back(2),
        Moment::Sequence(seq(1, 51)),
        Moment::Sequence(seq(1, 75)),
    ] {
        match points.resolve(&inside) {
            Err(PointError::InsideGap { before: Some(before), after: Some(after), gap, .. }) => {
                assert_eq!((before.sequence, after.sequence), (seq(1, 50), seq(1, 80)), "{inside:?}");
                assert!(gap.contains("the ring was full"), "{gap}");
            }
            other => panic!("{inside:?}: {other:?}"),
        }
    }
    for outside in [Moment::At(second(0)), Moment::At(second(60)), Moment::Sequence(seq(1, 91)), Moment::Back(100)] {
        let error = points.resolve(&outside).expect_err("outside");
        assert!(matches!(error, PointError::OutsideHistory { .. }), "{outside:?}: {error}");
        assert!(error.to_string().contains("reaches from"), "{error}");
    }
    assert!(matches!(points.resolve(&Moment::Marker("x".into())), Err(PointError::NoSuchMarker(_))));
    assert!(matches!(points.resolve(&Moment::LatestApplication), Err(PointError::NoApplicationPoint { .. })));
    let listed = points.between(second(0), second(99), 100, Which::All).expect("points");
    let listed: Vec<SequenceNumber> = listed.iter().map(|cut| cut.sequence).collect();
    assert_eq!(listed, [10, 20, 30, 40, 50, 80, 90].map(|counter| seq(1, counter)));
}

#[test]
fn a_gap_may_end_in_a_later_generation() {
    let fixture = Fixture::new();
    let mut writer = fixture.create(&fixture.world.writer("one"));
    let mut last = delta(&writer);
    let after = last.through;
    last.gaps_opened.push(Gap { after, scope: GapScope::Machine, time: second(1), cause: "lost".into(), until: None });
    writer.commit(CheckpointWish::Now, |_| Ok(last.clone())).expect("commit");
    let mut successor = fixture.open(&fixture.world.writer("two")).expect("open");
    assert!(fixture.load().gaps()[0].until.is_none());
    let mut healed = delta(&successor);
    let closed = GapClosed { after, scope: GapScope::Machine, until: healed.through, time: second(2) };
    healed.gaps_closed.push(closed);
    healed.cuts[0].kind = CutKind::HealEnd;
    successor.commit(CheckpointWish::Now, |_| Ok(healed.clone())).expect("commit");
    let history = fixture.load();
    assert_eq!(history.gaps()[0].until, Some((healed.through, second(2))));
    let points = Points::new(&fixture.store, fixture.world.unlocked.keys(), &history);
    assert_eq!(points.resolve(&Moment::Latest).expect("latest").cut.sequence, healed.through);
}

#[test]
fn catalog_writers_race_and_all_entries_stay() {
    let fixture = Fixture::new();
    let sessions: Vec<_> = (0..3).map(|index| fixture.world.writer(&format!("ps {index}"))).collect();
    let mut catalogs: Vec<Catalog> =
        sessions.iter().map(|(_, keys)| Catalog::load(&fixture.store, keys).expect("load")).collect();
    let names = NumberedNames::of_catalog(fixture.world.unlocked.keys());
    for round in 0..5 {
        for (index, (session, keys)) in sessions.iter().enumerate() {
            let entry = CatalogEntry::Note { text: format!("{round} {index}") };
            catalogs[index].append(&fixture.store, keys, session, &entry).expect("append");
        }
        // Someone burns a number.
        let next = Catalog::load(&fixture.store, &sessions[0].1).expect("load").next_number;
        let name = names.name(next, NameEpoch::FIRST).expect("the first key");
        fixture.store.create(&name, &[Bytes::from_static(b"junk")]).expect("free");
    }
    let all = Catalog::load(&fixture.store, &sessions[0].1).expect("load");
    let texts: Vec<String> = all
        .records
        .iter()
        .map(|record| match &record.entry {
            CatalogEntry::Note { text } => text.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected: Vec<String> = (0..5).flat_map(|round| (0..3).map(move |index| format!("{round} {index}"))).collect();
    assert_eq!(texts, expected);
    assert_eq!(all.alarms.len(), 5);
    let long = CatalogEntry::Note { text: "x".repeat(5000) };
    let refused = catalogs[0].append(&fixture.store, &sessions[0].1, &sessions[0].0, &long);
    assert!(matches!(refused, Err(VaultError::LimitExceeded { .. })));
    // A lost answer: the caller is told, and a retry may write it twice, but nothing is lost.
    *fixture.fragile.lose_next_answer.lock().unwrap() = true;
    let entry = CatalogEntry::Note { text: "once more".into() };
    let lost = catalogs[1].append(&fixture.store, &sessions[1].1, &sessions[1].0, &entry);
    assert!(matches!(lost, Err(VaultError::Store(StoreError::Unavailable { .. }))));
    catalogs[1].refresh(&fixture.store, &sessions[1].1).expect("refresh");
    assert_eq!(catalogs[1].records.last().map(|record| &record.entry), Some(&entry));
}
