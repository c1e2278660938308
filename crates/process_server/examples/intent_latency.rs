//! Measures what the awaited intent adds to a commit: a number and a nonce made durable in the journal before the put of
//! the manifest, beside the put itself.
//!
//! `cargo run --release -p process_server --example intent_latency -- <folder>`

use std::sync::Arc;
use std::time::Duration;

use process_server::journal::{
    HostKey, Journal, JournalConfig, JournalThread, Manifest, ManifestNonce, ManifestNumber, QueueConfig, Record,
};
use replication::ChainId;
use vault::{FolderStore, ObjectName, Store};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

/// Bytes of a manifest as an idle machine's are.
const MANIFEST_BYTES: usize = 2 << 10;
const ROUNDS: u64 = 300;

fn middle(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |hundredths: usize| times[times.len() * hundredths / 100].as_secs_f64() * 1e3;
    format!("p50 {:.2} ms, p99 {:.2} ms", at(50), at(99))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::path::PathBuf::from(std::env::args().nth(1).ok_or("name an empty folder to write to")?);
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(&folder));
    let host = HostKey::load_or_create(&*files, "journal", &SystemEntropy)?;
    let config = JournalConfig::new(256 << 20);
    let (journal, _) = Journal::open(files, Arc::new(SystemEntropy), "journal", config, &host)?;
    let journal = JournalThread::start(journal, config, QueueConfig::default())?;
    std::fs::create_dir_all(folder.join("vault"))?;
    let store = FolderStore::open(&folder.join("vault"), &SystemEntropy)?;
    let chain = ChainId((&SystemEntropy as &dyn Entropy).bytes());
    let (mut intents, mut puts) = (Vec::new(), Vec::new());
    for number in 0..ROUNDS {
        let began = SystemClock.monotonic();
        let manifest = Manifest { number: ManifestNumber(number), nonce: ManifestNonce([7; 16]) };
        journal.append_and_wait(Record::Intent { chain, manifest })?;
        let put_began = SystemClock.monotonic();
        let name = ObjectName::new(format!("chains/{chain}/m/{number:020}"))?;
        store.create(&name, &[vec![7; MANIFEST_BYTES].into()])?;
        intents.push(put_began.since(began));
        puts.push(SystemClock.monotonic().since(put_began));
    }
    println!("intent: {}; put: {}", middle(intents), middle(puts));
    Ok(())
}
