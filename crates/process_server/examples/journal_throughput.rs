//! Measures the journal: batches of 1 MiB, encrypted, made durable by group commit.
//!
//! `cargo run --release -p process_server --example journal_throughput -- <folder> [MiB]`

use std::sync::{Arc, mpsc};

use bytes::Bytes;
use process_server::journal::{HostKey, Journal, JournalConfig, JournalThread, ManifestNumber, QueueConfig, Record};
use replication::{ByteRange, ChainId, Change, ChangeKind, DiskId, SequenceNumber, SourceTime};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("name a folder to write to")?;
    let mib: u64 = arguments.next().map_or(Ok(4096), |text| text.parse())?;
    let files: Arc<dyn Files> = Arc::new(RealFiles::new(folder));
    let host = HostKey::load_or_create(&*files, "journal", &SystemEntropy)?;
    let config = JournalConfig::new(2 << 30);
    let (journal, _) = Journal::open(files, Arc::new(SystemEntropy), "journal", config, &host)?;
    let journal = JournalThread::start(journal, config, QueueConfig::default())?;

    for (name, count, bytes) in
        [("1 MiB batches of 16 writes", 16, 64 << 10), ("1 MiB batches of 256 writes", 256, 4096)]
    {
        let chain = ChainId((&SystemEntropy as &dyn Entropy).bytes());
        let data = Bytes::from(vec![0x5a; bytes]);
        let before = journal.status().counters;
        let start = SystemClock.monotonic();
        let (sender, receiver) = mpsc::channel();
        for batch in 0..mib {
            let changes = (0..count).map(|index| Change {
                sequence: SequenceNumber(batch * count + index + 1),
                time: SourceTime(batch),
                disk: DiskId(1),
                continues: false,
                kind: ChangeKind::Write {
                    range: ByteRange::new(index * bytes as u64, bytes as u64),
                    data: data.clone(),
                },
            });
            let through = SequenceNumber((batch + 1) * count);
            let sender = sender.clone();
            let done = move |result: Result<_, _>| drop(sender.send(result.map(drop)));
            journal.append(Record::Changes { chain, changes: changes.collect() }, Box::new(done))?;
            if batch % 64 == 63 {
                let number = ManifestNumber(batch);
                journal.append(Record::Committed { chain, through, number }, Box::new(drop))?;
            }
        }
        drop(sender);
        for result in receiver {
            result?;
        }
        let seconds = SystemClock.monotonic().since(start).as_secs_f64();
        let after = journal.status().counters;
        println!(
            "{name}: {:.2} GB/s, {} syncs, {} files, {mib} MiB in {seconds:.2} s",
            (mib << 20) as f64 / seconds / 1e9,
            after.syncs - before.syncs,
            after.files_created - before.files_created,
        );
    }
    Ok(())
}
