//! The journal of the process server against a world that loses power, fails syncs and fills its disk, compared with
//! an oracle that keeps every record in a list.
//!
//! A failure prints its seed; `FARSHORE_SIM_SEED=<seed> cargo test -p sim --test journal` replays it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use process_server::journal::{
    HostKey, Journal, JournalConfig, JournalError, Manifest, ManifestNonce, ManifestNumber, NoteKind, Record,
    Recovered, Replayed, Session,
};
use replication::{
    ByteRange, ChainId, Change, ChangeKind, DiskId, Generation, MachineId, MarkerKind, SequenceNumber, SourceTime,
    StreamHash,
};
use sim::files::{FileFaults, SimFiles};
use sim::rng::{Rng, SimEntropy};
use world::Files;

const DIRECTORY: &str = "journal";
const CHAINS: u64 = 4;

fn chain(index: u64) -> ChainId {
    ChainId([index as u8 + 1; 16])
}

/// What the records say, worked out slowly from the whole list.
#[derive(Debug, Default, Clone, PartialEq)]
struct Expected {
    last: u64,
    released: u64,
    /// Where the chain was last dropped.
    dropped: u64,
    session: Option<Session>,
    committed: Option<(SequenceNumber, ManifestNumber)>,
    stream_hash: Option<(SequenceNumber, StreamHash)>,
    intent: Option<Manifest>,
    notes: BTreeMap<NoteKind, Bytes>,
    uncommitted: Vec<Change>,
}

fn oracle(records: &[Record], of: ChainId) -> Expected {
    let mut expected = Expected::default();
    for record in records.iter().filter(|record| record.chain() == of) {
        match record {
            Record::Changes { changes, .. } => {
                expected.last = changes[changes.len() - 1].sequence.0;
                expected.uncommitted.extend(changes.iter().cloned());
            }
            Record::SessionOpened { session, .. } => {
                expected.session = Some(*session);
                if expected.intent.is_some_and(|intent| intent.number <= session.head.number) {
                    expected.intent = None;
                }
            }
            Record::Intent { manifest, .. } => expected.intent = Some(*manifest),
            Record::Committed { through, number, .. } => {
                expected.committed = Some((*through, *number));
                expected.released = expected.released.max(through.0);
                expected.last = expected.last.max(through.0);
                if expected.intent.is_some_and(|intent| intent.number <= *number) {
                    expected.intent = None;
                }
            }
            Record::StreamHash { sequence, hash, .. } => expected.stream_hash = Some((*sequence, *hash)),
            Record::Dropped { .. } => {
                let last = expected.last.max(expected.released);
                expected = Expected { last, released: last, dropped: last, ..Expected::default() };
            }
            Record::Note { kind, bytes, .. } => drop(expected.notes.insert(*kind, bytes.clone())),
        }
        let released = expected.released;
        expected.uncommitted.retain(|change| change.sequence.0 > released);
    }
    expected
}

/// What the journal says.
fn found(journal: &Journal, of: ChainId) -> Result<Expected, JournalError> {
    let state = journal.chains().remove(&of).unwrap_or_default();
    let mut uncommitted = Vec::new();
    journal.changes_of(of).visit(|replayed| {
        if let Replayed::Record(Record::Changes { changes, .. }) = replayed {
            uncommitted.extend(changes);
        }
        ControlFlow::<()>::Continue(())
    })?;
    Ok(Expected {
        last: state.last.0,
        released: state.released.0,
        dropped: 0,
        session: state.session,
        committed: state.committed,
        stream_hash: state.stream_hash,
        intent: state.intent,
        notes: state.notes,
        uncommitted,
    })
}

fn matches_after(records: &[Record], found: &[Expected]) -> bool {
    (0..CHAINS).all(|index| {
        let mut expected = oracle(records, chain(index));
        let found = &found[index as usize];
        // Once nothing is left of a dropped chain, the journal may forget that it ever was.
        let dropped = std::mem::take(&mut expected.dropped);
        if found.released == 0 && expected.released == dropped {
            expected.released = 0;
            if expected.last == dropped {
                expected.last = found.last.min(expected.last);
            }
        }
        expected == *found
    })
}

struct World {
    seed: u64,
    random: Rng,
    files: SimFiles,
    entropy: Arc<SimEntropy>,
    config: JournalConfig,
    /// Every record that was appended and may exist.
    records: Vec<Record>,
    /// How many of them are certainly durable.
    durable: usize,
    next_sequence: BTreeMap<ChainId, u64>,
    next_number: u64,
    full: usize,
    torn: usize,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = Rng::new(seed);
        let files = SimFiles::new(random.draw());
        let file_bytes_max = (64 << 10) + random.below(64 << 10);
        let bytes_max = file_bytes_max * (4 + random.below(6));
        World {
            seed,
            files,
            entropy: Arc::new(SimEntropy::new(random.fork())),
            config: JournalConfig { bytes_max, file_bytes_max },
            records: Vec::new(),
            durable: 0,
            next_sequence: BTreeMap::new(),
            next_number: 1,
            full: 0,
            torn: 0,
            random,
        }
    }

    fn open(&mut self) -> Result<(Journal, Recovered), JournalError> {
        let files: Arc<dyn Files> = Arc::new(self.files.clone());
        let host = HostKey::load_or_create(&*files, DIRECTORY, &*self.entropy)?;
        Journal::open(files, self.entropy.clone(), DIRECTORY, self.config, &host)
    }

    fn change(&mut self, sequence: u64) -> Change {
        let start = self.random.below(1 << 30) * 512;
        let len = 512 * (1 + self.random.below(24));
        let range = ByteRange::new(start, len);
        let kind = match self.random.below(8) {
            0 => ChangeKind::Zero { range },
            1 => ChangeKind::Discard { range },
            2 => ChangeKind::Marker { kind: MarkerKind::Crash, name: format!("marker {sequence}") },
            _ => {
                let mut data = vec![0; len as usize];
                self.random.fill(&mut data);
                ChangeKind::Write { range, data: data.into() }
            }
        };
        let time = SourceTime(self.random.draw());
        Change { sequence: SequenceNumber(sequence), time, disk: DiskId(1), continues: self.random.one_in(4), kind }
    }

    fn manifest(&mut self) -> Manifest {
        let mut nonce = [0; 16];
        self.random.fill(&mut nonce);
        self.next_number += 1;
        Manifest { number: ManifestNumber(self.next_number), nonce: ManifestNonce(nonce) }
    }

    fn record(&mut self, committing: bool) -> Record {
        let index = if committing { self.random.below(CHAINS) } else { self.random.below(CHAINS).min(CHAINS - 2) };
        let of = chain(index);
        let last = self.next_sequence.get(&of).copied().unwrap_or(0);
        match self.random.below(if committing { 20 } else { 12 }) {
            0 => {
                let session = Session { machine: MachineId([7; 16]), generation: Generation(3), head: self.manifest() };
                Record::SessionOpened { chain: of, session }
            }
            1 => Record::StreamHash { chain: of, sequence: SequenceNumber(last), hash: StreamHash([last as u8; 32]) },
            2 => {
                let kind = NoteKind(self.random.below(3) as u8);
                Record::Note { chain: of, kind, bytes: vec![last as u8; self.random.below(100) as usize].into() }
            }
            3 => Record::Intent { chain: of, manifest: self.manifest() },
            12..18 => {
                let expected = oracle(&self.records, of);
                let open = last.saturating_sub(expected.released);
                let through =
                    expected.released + if self.random.one_in(2) { open } else { self.random.below(open + 1) };
                self.next_number += u64::from(self.random.one_in(2));
                Record::Committed {
                    chain: of,
                    through: SequenceNumber(through),
                    number: ManifestNumber(self.next_number),
                }
            }
            18 if self.random.one_in(4) => Record::Dropped { chain: of, reason: "the head is another's".to_owned() },
            _ => {
                let count = 1 + self.random.below(5);
                let changes = (1..=count).map(|offset| self.change(last + offset)).collect();
                Record::Changes { chain: of, changes }
            }
        }
    }

    fn remember(&mut self, record: Record) {
        if let Record::Changes { chain, changes } = &record {
            self.next_sequence.insert(*chain, changes[changes.len() - 1].sequence.0);
        }
        self.records.push(record);
    }

    /// Records behind `len` never happened.
    fn forget(&mut self, len: usize) {
        self.records.truncate(len);
        self.next_sequence.clear();
        for record in &self.records {
            if let Record::Changes { chain, changes } = record {
                self.next_sequence.insert(*chain, changes[changes.len() - 1].sequence.0);
            }
        }
    }

    fn check_space(&self, journal: &Journal) {
        let used = self.files.bytes_in(DIRECTORY);
        let allowed = self.config.bytes_max + 56;
        assert!(used <= allowed, "seed {}: {used} bytes are used, {allowed} allowed", self.seed);
        assert!(journal.used_bytes() <= self.config.bytes_max, "seed {}", self.seed);
    }

    /// Runs until something breaks the journal; `Ok` if nothing did.
    fn run(&mut self, journal: &mut Journal, steps: u64) -> Result<(), JournalError> {
        // Whether the vault can be reached: without commits the journal fills.
        let mut committing = self.random.one_in(2);
        let mut base = self.durable as u64;
        for _ in 0..steps {
            if self.random.one_in(40) {
                committing = !committing;
            }
            let step = if self.random.one_in(5) {
                journal.sync().map(|position| self.durable = (base + position.0) as usize)
            } else {
                let record = self.record(committing);
                match journal.append(&record) {
                    Ok(_) => {
                        self.remember(record);
                        self.durable = self.durable.max((base + journal.durable().0) as usize);
                        Ok(())
                    }
                    Err(JournalError::Full { .. }) => {
                        assert!(matches!(record, Record::Changes { .. }), "seed {}: {record:?}", self.seed);
                        self.full += 1;
                        committing = true;
                        Ok(())
                    }
                    Err(error) => {
                        // It may have been given to the disk before that failed.
                        self.remember(record);
                        Err(error)
                    }
                }
            };
            match step {
                Ok(()) => self.check_space(journal),
                Err(JournalError::Io { .. }) if self.files.is_powered() => {
                    // The same life goes on in a new file, with what was not durable appended again, or given up.
                    self.durable = self.durable.max((base + journal.durable().0) as usize);
                    self.files.set_faults(FileFaults::default());
                    journal.restart()?;
                    let lost = self.records[self.durable..].to_vec();
                    self.forget(self.durable);
                    base = self.durable as u64 - journal.durable().0;
                    if self.random.one_in(2) {
                        for record in lost {
                            match journal.append(&record) {
                                Ok(_) => self.remember(record),
                                Err(JournalError::Full { .. }) => break,
                                Err(error) => {
                                    self.remember(record);
                                    return Err(error);
                                }
                            }
                        }
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The journal opened again holds exactly the first n records, for an n not below what was durable.
    fn check_recovery(&mut self, journal: &Journal) {
        let found: Vec<Expected> = (0..CHAINS)
            .map(|index| found(journal, chain(index)).unwrap_or_else(|error| panic!("seed {}: {error}", self.seed)))
            .collect();
        let all = self.records.len();
        let len = (self.durable..=all).rev().find(|len| matches_after(&self.records[..*len], &found));
        let Some(len) = len else {
            let summary: Vec<_> =
                found.iter().map(|chain| (chain.released, chain.last, chain.uncommitted.len())).collect();
            panic!("seed {}: no prefix of {}..={all} records explains {summary:?}", self.seed, self.durable);
        };
        self.forget(len);
        self.durable = len;
    }
}

fn live_many_lives(seed: u64) -> (usize, usize) {
    let mut world = World::new(seed);
    for _ in 0..6 {
        if world.random.one_in(3) {
            let operations = world.random.below(12);
            world.files.cut_power_after(operations);
        }
        let opened = world.open();
        // Only room is lost if the last steps of opening fail, so it may succeed as the power goes.
        if !world.files.is_powered() {
            world.files.power_on();
            continue;
        }
        if let Ok((mut journal, recovered)) = opened {
            world.torn += usize::from(recovered.torn.is_some());
            world.check_recovery(&journal);
            world.check_space(&journal);
            let faults = FileFaults {
                sync_errors_per_thousand: world.random.below(3) * 10,
                append_errors_per_thousand: world.random.below(3) * 5,
                capacity_bytes: world.random.one_in(4).then(|| world.random.below(world.config.bytes_max)),
            };
            world.files.set_faults(faults);
            if world.random.one_in(2) {
                let operations = world.random.below(150);
                world.files.cut_power_after(operations);
            }
            let steps = world.random.below(250);
            // Poisoned for good: the process ends, or the power is off.
            let _ = world.run(&mut journal, steps);
        } else {
            panic!("seed {seed}: {:?}", opened.err().expect("it failed"));
        }
        world.files.set_faults(FileFaults::default());
        if world.files.is_powered() && world.random.one_in(3) {
            world.files.restart_process();
        } else {
            world.files.power_on();
        }
    }
    world.files.power_on();
    let (journal, _) = world.open().unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
    world.check_recovery(&journal);
    (world.full, world.torn)
}

#[test]
fn what_was_durable_is_found_and_nothing_else() {
    if let Ok(seed) = std::env::var("FARSHORE_SIM_SEED") {
        live_many_lives(seed.parse().expect("a seed is a number"));
        return;
    }
    let (mut full, mut torn) = (0, 0);
    for seed in 0..300 {
        let counts = live_many_lives(seed);
        full += counts.0;
        torn += counts.1;
    }
    assert!(full > 100 && torn > 50, "the test must meet full journals ({full}) and torn tails ({torn})");
}

/// A journal with several files and a synced end.
fn written(seed: u64) -> World {
    let mut world = World::new(seed);
    world.config = JournalConfig { bytes_max: 1 << 20, file_bytes_max: 64 << 10 };
    let (mut journal, _) = world.open().expect("open");
    for _ in 0..40 {
        let record = world.record(false);
        journal.append(&record).expect("there is room");
        world.remember(record);
        if world.random.one_in(3) {
            journal.sync().expect("sync");
        }
    }
    journal.sync().expect("sync");
    world.durable = world.records.len();
    world
}

#[test]
fn damage_is_named_or_cut_but_never_returned() {
    let mut named = 0;
    for seed in 0..120 {
        let mut world = written(seed);
        let names = world.files.list_files(DIRECTORY).expect("list");
        let names: Vec<_> = names.iter().filter(|name| name.ends_with(".journal")).collect();
        assert!(names.len() > 2, "several files are needed");
        let picked = world.random.below(names.len() as u64) as usize;
        let newest = picked == names.len() - 1;
        let random = &mut world.random;
        world.files.corrupt(&format!("{DIRECTORY}/{}", names[picked]), |bytes| {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(4) {
                0 => bytes.truncate(at),
                1 => bytes[at..].fill(0),
                2 => bytes.insert(at, 0x55),
                _ => bytes[at] ^= 1 << random.below(8),
            }
        });
        world.files.restart_process();
        let outcome = world.open().and_then(|(journal, _)| {
            let found = (0..CHAINS).map(|index| found(&journal, chain(index))).collect::<Result<Vec<_>, _>>()?;
            // Without an error what comes back is a prefix: in the newest file all of it, unless its end was hit.
            let len = (0..=world.records.len()).rev().find(|len| matches_after(&world.records[..*len], &found));
            let len = len.unwrap_or_else(|| panic!("seed {seed}: damage was returned as data"));
            assert!(newest || len == world.records.len(), "seed {seed}: an old file lost records without a word");
            Ok(())
        });
        if let Err(error) = outcome {
            let text = error.to_string();
            assert!(text.contains(names[picked].as_str()), "seed {seed}: {text}");
            named += 1;
        }
    }
    assert!(named > 60, "most damage is named, {named} was");
}

#[test]
fn bit_rot_below_a_witness_is_not_taken_for_a_torn_tail() {
    let mut world = written(1);
    let names = world.files.list_files(DIRECTORY).expect("list");
    let newest = names.iter().rfind(|name| name.ends_with(".journal")).expect("a file");
    let path = format!("{DIRECTORY}/{newest}");
    let host = HostKey::load_or_create(&world.files, DIRECTORY, &*world.entropy).expect("key");
    let other = HostKey::new([1; 32]);
    let wrong = Journal::open(Arc::new(world.files.clone()), world.entropy.clone(), DIRECTORY, world.config, &other);
    assert!(matches!(wrong.map(drop), Err(JournalError::WrongKey { .. })));
    let untouched = world.files.fork(9);
    assert!(Journal::open(Arc::new(untouched), world.entropy.clone(), DIRECTORY, world.config, &host).is_ok());
    world.files.corrupt(&path, |bytes| bytes[4096 + 40] ^= 1);
    let error = world.open().map(drop).expect_err("the first record was synced before the second was written");
    assert!(matches!(error, JournalError::Damaged { offset: 4096, .. }), "{error}");
}

#[test]
fn a_missing_file_or_key_is_an_error() {
    let mut world = written(2);
    let names = world.files.list_files(DIRECTORY).expect("list");
    let oldest = names.iter().find(|name| name.ends_with(".journal")).expect("a file");
    world.files.remove(&format!("{DIRECTORY}/{oldest}")).expect("remove");
    assert!(matches!(world.open().map(drop), Err(JournalError::FileMissing { .. })));
    world.files.remove(&format!("{DIRECTORY}/host.key")).expect("remove");
    assert!(matches!(world.open().map(drop), Err(JournalError::KeyMissing { .. })));
}

#[test]
fn a_full_journal_names_who_fills_it_and_empties_when_that_is_committed() {
    let mut world = World::new(3);
    world.config = JournalConfig { bytes_max: 512 << 10, file_bytes_max: 64 << 10 };
    let (mut journal, _) = world.open().expect("open");
    let slow = chain(0);
    let busy = chain(1);
    let mut sequence = 0;
    let mut write = |world: &mut World, journal: &mut Journal, of| {
        sequence += 1;
        let change = world.change(sequence);
        journal.append(&Record::Changes { chain: of, changes: vec![change] }).map(|_| sequence)
    };
    write(&mut world, &mut journal, slow).expect("room");
    let mut last = 0;
    let free = journal.free_bytes();
    while let Ok(sequence) = write(&mut world, &mut journal, busy) {
        last = sequence;
        journal.sync().expect("sync");
    }
    assert!(journal.free_bytes() < free);
    assert_eq!(journal.pinned_by(), [slow, busy]);
    let commit =
        |chain, through| Record::Committed { chain, through: SequenceNumber(through), number: ManifestNumber(through) };
    // However long the vault takes and however often it is tried: commits always find room.
    for through in 1..=2000 {
        journal.append(&commit(busy, through.min(last))).expect("a commit finds room in a full journal");
        journal.sync().expect("sync");
        world.check_space(&journal);
    }
    assert_eq!(journal.pinned_by(), [slow]);
    write(&mut world, &mut journal, busy).expect("the busy chain's files are gone");
    journal.append(&commit(slow, 1)).expect("room");
    journal.sync().expect("sync");
    assert_eq!(journal.pinned_by(), [busy]);
}
