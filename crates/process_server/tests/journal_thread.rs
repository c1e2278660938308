//! The journal's thread on real files: group commit, order, refusals, failures.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use process_server::journal::{
    HostKey, Journal, JournalConfig, JournalError, JournalThread, ManifestNumber, QueueConfig, Record, Recovered,
    Replayed,
};
use replication::{ByteRange, ChainId, Change, ChangeKind, DiskId, SequenceNumber, SourceTime};
use world::{AppendFile, Files, RealFiles, SystemEntropy};

const CONFIG: JournalConfig = JournalConfig { bytes_max: 8 << 20, file_bytes_max: 1 << 20 };

fn open(files: Arc<dyn Files>) -> (Journal, Recovered) {
    let host = HostKey::load_or_create(&*files, "journal", &SystemEntropy).expect("key");
    Journal::open(files, Arc::new(SystemEntropy), "journal", CONFIG, &host).expect("open")
}

fn write(chain: u8, sequence: u64, len: u64) -> Record {
    let kind = ChangeKind::Write { range: ByteRange::new(0, len), data: vec![sequence as u8; len as usize].into() };
    let change =
        Change { sequence: SequenceNumber(sequence), time: SourceTime(0), disk: DiskId(1), continues: false, kind };
    Record::Changes { chain: ChainId([chain; 16]), changes: vec![change] }
}

fn sequences(journal: &Journal, chain: u8) -> Vec<u64> {
    let mut found = Vec::new();
    let visited = journal.changes_of(ChainId([chain; 16])).visit(|replayed| {
        if let Replayed::Record(Record::Changes { changes, .. }) = replayed {
            found.extend(changes.iter().map(|change| change.sequence.0));
        }
        ControlFlow::<()>::Continue(())
    });
    visited.expect("readable");
    found
}

/// Real files whose next syncs of journal files can be made to fail, on a disk that can be full.
struct Failing {
    files: RealFiles,
    fails: Arc<AtomicU64>,
    armed: Arc<AtomicBool>,
    full: Arc<AtomicBool>,
}

fn room(full: &AtomicBool) -> io::Result<()> {
    if full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
}

struct FailingFile(Box<dyn AppendFile>, Arc<AtomicU64>, Arc<AtomicBool>, Arc<AtomicBool>);

impl AppendFile for FailingFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if room(&self.3).is_err() {
            // As a disk does: what fits is written.
            self.0.append(&bytes[..bytes.len() / 2])?;
        }
        room(&self.3)?;
        self.0.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        let armed = self.2.load(Ordering::SeqCst);
        if armed && self.1.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(io::Error::other("injected"));
        }
        self.0.sync()
    }
}

impl Files for Failing {
    fn create_new(&self, path: &str) -> io::Result<Box<dyn AppendFile>> {
        room(&self.full)?;
        let file = self.files.create_new(path)?;
        Ok(Box::new(FailingFile(file, Arc::clone(&self.fails), Arc::clone(&self.armed), Arc::clone(&self.full))))
    }
    fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        self.files.read(path)
    }
    fn read_at(&self, path: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.files.read_at(path, offset, len)
    }
    fn len(&self, path: &str) -> io::Result<u64> {
        self.files.len(path)
    }
    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.link(from, to)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.files.rename(from, to)
    }
    fn remove(&self, path: &str) -> io::Result<()> {
        self.files.remove(path)
    }
    fn create_directory(&self, path: &str) -> io::Result<()> {
        self.files.create_directory(path)
    }
    fn sync_directory(&self, path: &str) -> io::Result<()> {
        self.files.sync_directory(path)
    }
    fn list_files(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_files(path)
    }
    fn list_directories(&self, path: &str) -> io::Result<Vec<String>> {
        self.files.list_directories(path)
    }
}

#[test]
fn many_writers_share_syncs_and_find_their_changes_in_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(folder.path()));
    let journal = JournalThread::start(open(Arc::clone(&files)).0, CONFIG, QueueConfig::default()).expect("start");
    let acknowledged = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for chain in 1..=8u8 {
            let (journal, acknowledged) = (&journal, &acknowledged);
            scope.spawn(move || {
                let (sender, receiver) = mpsc::channel();
                for sequence in 1..=50 {
                    let sender = sender.clone();
                    let done = move |result: Result<_, _>| sender.send((sequence, result.is_ok())).expect("heard");
                    journal.append(write(chain, sequence, 4096), Box::new(done)).expect("room");
                }
                drop(sender);
                let heard: Vec<_> = receiver.iter().collect();
                assert_eq!(heard, (1..=50).map(|sequence| (sequence, true)).collect::<Vec<_>>());
                acknowledged.lock().expect("no panic").insert(chain, heard.len());
            });
        }
    });
    let status = journal.status();
    assert_eq!(status.counters.records, 400);
    assert!(status.counters.syncs < 300, "{} syncs for 400 records", status.counters.syncs);
    drop(journal);
    let (journal, recovered) = open(files);
    assert_eq!(recovered.torn, None);
    for chain in 1..=8 {
        assert_eq!(sequences(&journal, chain), (1..=50).collect::<Vec<_>>());
    }
}

#[test]
fn a_full_journal_refuses_at_once_and_goes_on_after_a_commit() {
    let folder = tempfile::tempdir().expect("a folder");
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(folder.path()));
    let journal = JournalThread::start(open(Arc::clone(&files)).0, CONFIG, QueueConfig::default()).expect("start");
    let (sender, receiver) = mpsc::channel();
    let mut sequence = 0;
    let refused = loop {
        sequence += 1;
        let sender = sender.clone();
        let done = move |result: Result<_, Arc<JournalError>>| sender.send(result.map(drop)).expect("heard");
        if let Err(error) = journal.append(write(1, sequence, 100_000), Box::new(done)) {
            break error;
        }
    };
    assert!(matches!(refused, JournalError::Full { .. }), "{refused}");
    drop(sender);
    assert_eq!(receiver.iter().filter(Result::is_ok).count() as u64, sequence - 1, "what was queued is not refused");
    assert!(journal.status().used_bytes <= CONFIG.bytes_max);
    assert!(journal.status().used_bytes > CONFIG.bytes_max * 3 / 4, "{:?}", journal.status());
    assert_eq!(journal.status().pinned_by, [ChainId([1; 16])]);
    let commit =
        Record::Committed { chain: ChainId([1; 16]), through: SequenceNumber(sequence - 1), number: ManifestNumber(9) };
    journal.append_and_wait(commit).expect("a full journal takes commits");
    journal.append_and_wait(write(1, sequence, 100_000)).expect("room again");
    let journal = journal.stop().expect("no panic");
    assert_eq!(sequences(&journal, 1), [sequence]);
}

#[test]
fn a_failed_sync_loses_nothing_and_a_second_one_stops_the_journal() {
    let folder = tempfile::tempdir().expect("a folder");
    let (fails, armed) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicBool::new(false)));
    let files: Arc<dyn Files> = Arc::new(Failing {
        files: RealFiles::new(folder.path()),
        fails: Arc::clone(&fails),
        armed: Arc::clone(&armed),
        full: Arc::default(),
    });
    let journal = JournalThread::start(open(Arc::clone(&files)).0, CONFIG, QueueConfig::default()).expect("start");
    journal.append_and_wait(write(1, 1, 512)).expect("durable");
    armed.store(true, Ordering::SeqCst);
    journal.append_and_wait(write(1, 2, 512)).expect("durable in a second file");
    assert_eq!(fails.load(Ordering::SeqCst), 0, "the sync did fail");
    fails.store(u64::MAX, Ordering::SeqCst);
    let error = journal.append_and_wait(write(1, 3, 512)).expect_err("no file can be synced");
    assert!(matches!(*error, JournalError::Io { .. }), "{error}");
    let error = journal.append_and_wait(write(1, 4, 512)).expect_err("stopped");
    assert!(matches!(*error, JournalError::Stopped), "{error}");
    assert!(journal.failure().is_some_and(|why| why.contains("injected")), "{:?}", journal.failure());
    drop(journal);
    armed.store(false, Ordering::SeqCst);
    let (journal, _) = open(files);
    let found = sequences(&journal, 1);
    assert!(found == [1, 2] || found == [1, 2, 3], "{found:?}");
}

#[test]
fn a_full_disk_stops_the_journal_which_loses_nothing_it_acknowledged() {
    let folder = tempfile::tempdir().expect("a folder");
    let full = Arc::new(AtomicBool::new(false));
    let files: Arc<dyn Files> = Arc::new(Failing {
        files: RealFiles::new(folder.path()),
        fails: Arc::default(),
        armed: Arc::default(),
        full: Arc::clone(&full),
    });
    let journal = JournalThread::start(open(Arc::clone(&files)).0, CONFIG, QueueConfig::default()).expect("start");
    journal.append_and_wait(write(1, 1, 4096)).expect("durable");
    assert_eq!(journal.failure(), None);
    full.store(true, Ordering::SeqCst);
    let error = journal.append_and_wait(write(1, 2, 4096)).expect_err("no room");
    assert!(matches!(*error, JournalError::Io { .. }), "{error}");
    let failure = journal.failure().expect("it says why");
    assert!(failure.contains("could not create journal/"), "{failure}");
    drop(journal);
    full.store(false, Ordering::SeqCst);
    let (journal, _) = open(Arc::clone(&files));
    assert_eq!(sequences(&journal, 1), [1], "what was refused is not there, what was acknowledged is");
    let journal = JournalThread::start(journal, CONFIG, QueueConfig::default()).expect("start");
    journal.append_and_wait(write(1, 2, 4096)).expect("its sender sends it again");
    let journal = journal.stop().expect("no panic");
    assert_eq!(sequences(&journal, 1), [1, 2]);
}

#[test]
fn a_refused_record_breaks_its_chain_and_no_other() {
    let folder = tempfile::tempdir().expect("a folder");
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(folder.path()));
    let journal = JournalThread::start(open(Arc::clone(&files)).0, CONFIG, QueueConfig::default()).expect("start");
    journal.append_and_wait(write(1, 5, 512)).expect("durable");
    let error = journal.append_and_wait(write(1, 4, 512)).expect_err("out of order");
    assert!(matches!(*error, JournalError::OutOfOrder { .. }), "{error}");
    journal.append_and_wait(write(1, 6, 512)).expect_err("it would follow a hole");
    journal.append_and_wait(write(2, 1, 512)).expect("another chain");
    let too_large = Record::Changes {
        chain: ChainId([2; 16]),
        changes: (2..4)
            .flat_map(|sequence| match write(2, sequence, 600 << 10) {
                Record::Changes { changes, .. } => changes,
                _ => Vec::new(),
            })
            .collect(),
    };
    let error = journal.append_and_wait(too_large).expect_err("no file of 1 MiB holds it");
    assert!(matches!(*error, JournalError::TooLarge { .. }), "{error}");
    let journal = journal.stop().expect("no panic");
    assert_eq!((sequences(&journal, 1), sequences(&journal, 2)), (vec![5], vec![1]));
}
