//! A disk that is no longer protected stays in the vault for the points that had it; later points do not have it.

use std::fs;
use std::num::NonZeroUsize;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use process_server::journal::{HostKey, Journal, JournalConfig, JournalThread, QueueConfig};
use process_server::pipeline::{Greeted, Pace, Pipeline, Services};
use replication::wire::{HealNeed, Hello, PROTOCOL_VERSION};
use replication::{
    ByteRange, DiskGeometry, DiskId, DiskIdentity, InstanceId, MachineId, PointTime, Ranges, SequenceNumber, SourceTime,
};
use vault::keys::{PassphraseCost, WriterRole, WriterSession};
use vault::manifest::GapScope;
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
        followed: None,
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
    fn greet(&mut self, hello: &Hello) -> ChainHistory {
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
        ChainHistory::load(self.unlocked.store(), self.unlocked.keys(), self.pipeline.chain()).expect("readable")
    }
}

/// Numbers of the disks at a position.
fn disks_at(history: &ChainHistory, position: SequenceNumber) -> Vec<u16> {
    history.geometry_at(position).iter().map(|known| known.disk.0).collect()
}

/// The newest removal, and where it is.
fn removal(history: &ChainHistory) -> Option<(u16, SequenceNumber)> {
    let changes = history.geometries();
    let removal = changes.iter().rfind(|change| change.geometry.is_removal())?;
    Some((removal.geometry.disk.0, removal.sequence))
}

const END: SequenceNumber = SequenceNumber(u64::MAX);

#[test]
fn points_behind_a_removal_do_not_have_the_disk_and_those_before_do() {
    let mut place = Place::new();
    let history = place.greet(&hello(1, &[0, 1]));
    assert_eq!((disks_at(&history, END), removal(&history)), (vec![0, 1], None));

    let history = place.greet(&hello(2, &[0]));
    let (disk, position) = removal(&history).expect("it is recorded");
    assert_eq!((disk, disks_at(&history, END)), (1, vec![0]));
    assert_eq!(disks_at(&history, position), [0, 1], "the point at that position was made before");
    assert_eq!(disks_at(&history, position.next()), [0]);
    assert!(
        history.gaps().iter().all(|gap| gap.scope == GapScope::Machine),
        "nothing is lacking: {:?}",
        history.gaps()
    );

    let again = place.greet(&hello(3, &[0]));
    assert_eq!(again.geometries(), history.geometries(), "nothing is said twice");

    // It comes back: from there on points have it again, and what they say of the time between stays true.
    let history = place.greet(&hello(4, &[0, 1]));
    assert_eq!(disks_at(&history, END), [0, 1]);
    assert_eq!((disks_at(&history, position), disks_at(&history, position.next())), (vec![0, 1], vec![0]));
}

#[test]
fn a_sender_that_goes_on_must_know_that_a_new_disk_is_lacking() {
    let mut place = Place::new();
    place.greet(&hello(1, &[0]));
    let unknown = place.pipeline.lacking_of(&hello(2, &[0, 1]).disks);
    assert_eq!(unknown, Ranges::of([(DiskId(1), ByteRange::new(0, 1 << 20))]));
    place.greet(&hello(2, &[0, 1]));
    assert!(place.pipeline.lacking_of(&hello(3, &[0, 1]).disks).is_empty());
}
