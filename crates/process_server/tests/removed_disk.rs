//! A disk that is no longer protected stays in the vault as it was, and later points say so.

use std::fs;
use std::num::NonZeroUsize;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use process_server::journal::{HostKey, Journal, JournalConfig, JournalThread, QueueConfig};
use process_server::pipeline::{Greeted, Pace, Pipeline, Services};
use replication::wire::{HealNeed, Hello, PROTOCOL_VERSION};
use replication::{
    ChainId, DiskGeometry, DiskId, DiskIdentity, InstanceId, MachineId, PointTime, Ranges, SequenceNumber, SourceTime,
};
use vault::keys::{PassphraseCost, WriterRole, WriterSession};
use vault::manifest::{Gap, GapScope};
use vault::pack::load_dedup;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, FolderStore, OpenKeys, Store, UnlockedVault, Vault};
use world::{Clock, Entropy, Files, RealFiles, SystemClock, SystemEntropy};

const MACHINE: MachineId = MachineId([7; 16]);

fn hello(instance: u8, disks: &[u16]) -> Hello {
    let disk = |disk: &u16| DiskGeometry {
        disk: DiskId(*disk),
        identity: DiskIdentity { serial: format!("disk-{disk}"), fingerprint: [0; 16] },
        path: format!("/dev/disk{disk}"),
        size_bytes: 1 << 20,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    };
    Hello {
        version: PROTOCOL_VERSION,
        machine: MACHINE,
        instance: InstanceId([instance; 16]),
        boot: [1; 16],
        vm_generation: [0; 16],
        name: "test".into(),
        disks: disks.iter().map(disk).collect(),
        resume: None,
        need: HealNeed::Maps,
        cleared: None,
        now: SourceTime(0),
        started: PointTime(1),
        lacking: Ranges::default(),
    }
}

struct Place {
    _folder: tempfile::TempDir,
    unlocked: UnlockedVault,
    pipeline: Pipeline,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().expect("a folder");
        let (vault, state) = (folder.path().join("vault"), folder.path().join("state"));
        fs::create_dir(&vault).expect("a folder");
        fs::create_dir(&state).expect("a folder");
        let (entropy, clock): (Arc<dyn Entropy>, Arc<dyn Clock>) = (Arc::new(SystemEntropy), Arc::new(SystemClock));
        let store: Arc<dyn Store> = Arc::new(FolderStore::open(&vault, &SystemEntropy).expect("a store"));
        let (unlocked, _) =
            Vault::create(Arc::clone(&store), "passphrase", PassphraseCost::TRIVIAL, &entropy, &clock).expect("made");
        let writer = unlocked.grant_writer(WriterRole::ProcessServer, "test", &entropy, &clock).expect("a grant");
        let files: Arc<dyn Files> = Arc::new(RealFiles::new(&state));
        let host = HostKey::load_or_create(&*files, "journal", &SystemEntropy).expect("a key");
        let config = JournalConfig::new(64 << 20);
        let journal = Journal::open(files, Arc::clone(&entropy), "journal", config, &host).expect("opens").0;
        let log = JournalThread::start(journal, config, QueueConfig::default()).expect("starts");
        let keys = Arc::new(OpenKeys::of_writer(&writer));
        let dedup = load_dedup(&store, &keys, writer.writer(), 1 << 10).expect("an empty vault").index;
        let session = WriterSession::new(writer, Arc::clone(&entropy), Arc::clone(&clock)).expect("sound keys");
        let pace = Pace { seal_interval: Duration::ZERO, workers: NonZeroUsize::MIN, ..Pace::default() };
        let source = FrameSource::new(Arc::clone(&store), Arc::clone(&keys), CacheBytes::default());
        let services = Services {
            store,
            session: Arc::new(session),
            keys,
            dedup: Arc::new(RwLock::new(dedup)),
            source: Arc::new(source),
            log: Arc::new(log),
            clock,
            pace,
        };
        let pipeline =
            Pipeline::open(services, &*entropy, MACHINE, Some(&hello(1, &[0, 1])), |_| None).expect("a new chain");
        Place { _folder: folder, unlocked, pipeline }
    }

    /// Greets a sender, and has everything that follows from it committed.
    fn greet(&mut self, hello: &Hello) -> Vec<Gap> {
        for round in 0.. {
            assert!(round < 5000, "never accepted");
            self.pipeline.step().expect("works");
            if !self.pipeline.is_ready_to_greet() {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            match self.pipeline.greet(hello, MACHINE, None).expect("works") {
                Greeted::Accepted(..) => break,
                Greeted::Later => {}
                Greeted::Refused(refusal) => panic!("{refusal:?}"),
            }
        }
        while !self.pipeline.is_drained() {
            self.pipeline.step().expect("works");
            std::thread::sleep(Duration::from_millis(1));
        }
        let history = ChainHistory::load(self.unlocked.store(), self.unlocked.keys(), self.chain()).expect("readable");
        history.gaps().into_iter().filter(|gap| gap.scope != GapScope::Machine).collect()
    }

    fn chain(&self) -> ChainId {
        self.pipeline.chain()
    }
}

#[test]
fn a_removed_disk_is_labelled_once_until_it_comes_back() {
    let mut place = Place::new();
    assert_eq!(place.greet(&hello(1, &[0, 1])), []);
    let gaps = place.greet(&hello(2, &[0]));
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert_eq!(gaps[0].scope, GapScope::Disks(vec![DiskId(1)]));
    assert!(gaps[0].cause.contains("no longer protected"), "{gaps:?}");
    assert!(gaps[0].hides(SequenceNumber(gaps[0].after.0 + 1)), "points from here on say so");
    assert_eq!(place.greet(&hello(3, &[0])), gaps, "nothing is said twice");
}
