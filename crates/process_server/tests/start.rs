//! A server that cannot start says why and what to do, and leaves what it found as it was.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use process_server::ServerConfig;
use process_server::journal::{HostKey, Journal, JournalConfig, Record};
use process_server::server::{JOURNAL, Server, StartError, WRITER_KEYS};
use replication::{ByteRange, ChainId, Change, ChangeKind, DiskId, SequenceNumber, SourceTime};
use vault::keys::{PassphraseCost, WriterRole};
use vault::{FolderStore, Store, Vault};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

const JOURNAL_BYTES: u64 = 64 << 20;

/// A vault, and a server that was granted and has never run.
fn granted(folder: &Path) -> ServerConfig {
    let (vault, state) = (folder.join("vault"), folder.join("state"));
    fs::create_dir(&vault).expect("a folder");
    fs::create_dir(&state).expect("a folder");
    let (entropy, clock): (Arc<dyn Entropy>, Arc<dyn Clock>) = (Arc::new(SystemEntropy), Arc::new(SystemClock));
    let store: Arc<dyn Store> = Arc::new(FolderStore::open(&vault, &SystemEntropy).expect("a store"));
    let (unlocked, _) =
        Vault::create(store, "a passphrase", PassphraseCost::TRIVIAL, &entropy, &clock).expect("a vault");
    let keys = unlocked.grant_writer(WriterRole::ProcessServer, "test", &entropy, &clock).expect("a grant");
    fs::write(state.join(WRITER_KEYS), &*keys.to_bytes()).expect("written");
    let text = format!(
        "state_dir = {state:?}\nvault = {vault:?}\nlisten = \"127.0.0.1:0\"\njournal_bytes_max = {JOURNAL_BYTES}\n"
    );
    ServerConfig::parse(&text).expect("a configuration")
}

fn refusal(config: &ServerConfig) -> StartError {
    match Server::start(config, None) {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

/// A journal of two groups: the second says that the first was whole.
fn write_journal(config: &ServerConfig) {
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(&config.state_dir));
    let host = HostKey::load_or_create(&*files, JOURNAL, &SystemEntropy).expect("a key");
    let (entropy, limits) = (Arc::new(SystemEntropy), JournalConfig::new(JOURNAL_BYTES));
    let (mut journal, _) = Journal::open(files, entropy, JOURNAL, limits, &host).expect("opens");
    for sequence in 1..3 {
        let kind = ChangeKind::Write { range: ByteRange::new(0, 65536), data: vec![7; 65536].into() };
        let (sequence, time, disk) = (SequenceNumber(sequence), SourceTime(0), DiskId(0));
        let change = Change { sequence, time, disk, continues: false, kind };
        journal.append(&Record::Changes { chain: ChainId([1; 16]), changes: vec![change] }).expect("room");
        journal.sync().expect("durable");
    }
}

fn contents(folder: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    let mut found: Vec<_> =
        entries.map(|entry| (entry.file_name(), fs::read(entry.path()).expect("readable"))).collect();
    found.sort();
    found
}

#[test]
fn a_damaged_journal_is_named_left_alone_and_can_be_moved_aside() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = granted(folder.path());
    write_journal(&config);
    let journal = config.state_dir.join(JOURNAL);
    let largest = fs::read_dir(&journal).expect("a folder").map(|entry| entry.expect("an entry").path());
    let largest = largest.max_by_key(|path| fs::metadata(path).expect("there").len()).expect("a file");
    let mut bytes = fs::read(&largest).expect("readable");
    let in_the_first = bytes.len() / 4;
    bytes[in_the_first] ^= 1;
    fs::write(&largest, bytes).expect("written");
    let before = contents(&journal);
    let error = refusal(&config);
    assert_eq!(error.what, "the journal cannot be read");
    assert!(error.why.contains("is damaged at offset"), "{error}");
    assert!(error.what_to_do.contains("move the journal directory aside"), "{error}");
    assert_eq!(contents(&journal), before, "whatever can be saved of it still can");
    // What the message tells the administrator to do.
    assert!(Command::new("mv").arg(&journal).arg(config.state_dir.join("aside")).status().expect("mv runs").success());
    Server::start(&config, None).expect("as it said").stop();
}

#[test]
fn a_lost_key_of_the_journal_is_not_replaced_in_silence() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = granted(folder.path());
    write_journal(&config);
    let journal = config.state_dir.join(JOURNAL);
    fs::remove_file(journal.join("host.key")).expect("removed");
    let error = refusal(&config);
    assert!(error.why.contains("their key") && error.why.contains("is missing"), "{error}");
}

#[test]
fn a_journal_that_cannot_be_written_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = granted(folder.path());
    fs::write(config.state_dir.join(JOURNAL), "a file where the folder should be").expect("written");
    let error = refusal(&config);
    assert!(error.what.contains("the journal"), "{error}");
    assert!(error.why.contains(JOURNAL), "it names the path: {error}");
}
