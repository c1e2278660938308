//! A small vault with history, for the tests of branches and of the way home.

#![allow(dead_code, clippy::unwrap_used, reason = "not every test uses everything; a panic is how a test fails")]

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use recovery::{BranchConfig, BranchHost, SealConfig};
use replication::geometry::ByteRange;
use replication::{
    ChainId, Change, ChangeKind, Cut, CutKind, DiskGeometry, DiskId, DiskIdentity, Generation, MachineId, PointTime,
    SequenceNumber, SourceTime,
};
use vault::keys::PassphraseCost;
use vault::layer::Host;
use vault::segment::{SealOptions, seal_segment};
use vault::{
    Catalog, CatalogEntry, ChainWriter, CheckpointWish, Compression, Delta, FolderStore, GeometryChange, Store,
    UnlockedVault, Vault,
};
use world::{Clock, Entropy, Monotonic, RealFiles, SystemEntropy, WallTime};

pub(crate) const DISK: DiskId = DiskId(0);
pub(crate) const MACHINE: MachineId = MachineId([5; 16]);
pub(crate) const CHAIN: ChainId = ChainId([6; 16]);
/// Point time at which the history begins, in seconds.
pub(crate) const EPOCH: u64 = 1_795_000_000;

/// A clock that tests move.
pub(crate) struct TestClock(pub(crate) AtomicU64);

impl TestClock {
    pub(crate) fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds * 1_000_000_000, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(self.0.load(Ordering::SeqCst))
    }

    fn wall(&self) -> WallTime {
        WallTime((EPOCH + 1000) * 1_000_000_000 + self.0.load(Ordering::SeqCst))
    }
}

pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) vault: UnlockedVault,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) test_clock: Arc<TestClock>,
    pub(crate) entropy: Arc<dyn Entropy>,
}

pub(crate) fn geometry(disk: DiskId, size: u64) -> DiskGeometry {
    DiskGeometry {
        disk,
        identity: DiskIdentity { serial: format!("serial-{}", disk.0), fingerprint: [0; 16] },
        path: format!("/dev/disk{}", disk.0),
        size_bytes: size,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

/// `len` bytes that do not compress, different for each seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

impl World {
    pub(crate) fn new() -> World {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("vault")).unwrap();
        std::fs::create_dir(folder.path().join("host")).unwrap();
        let test_clock = Arc::new(TestClock(AtomicU64::new(1_000_000_000)));
        let clock: Arc<dyn Clock> = Arc::clone(&test_clock) as Arc<dyn Clock>;
        let entropy: Arc<dyn Entropy> = Arc::new(SystemEntropy);
        let files = Arc::new(RealFiles::new(folder.path().join("vault")));
        let store: Arc<dyn Store> = Arc::new(FolderStore::new(files, &*entropy, "the vault"));
        let cost = PassphraseCost { memory_kib: 8, passes: 1, lanes: 1 };
        let (vault, _) = Vault::create(store, "passphrase", cost, &entropy, &clock).unwrap();
        World { folder, vault, clock, test_clock, entropy }
    }

    pub(crate) fn store(&self) -> &Arc<dyn Store> {
        self.vault.store()
    }

    pub(crate) fn host_directory(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    pub(crate) fn config() -> BranchConfig {
        BranchConfig {
            seal: SealConfig { workers: NonZeroUsize::MIN, ..SealConfig::default() },
            journal_bytes_max: 64 << 20,
            ..BranchConfig::default()
        }
    }

    pub(crate) fn host(&self) -> BranchHost {
        self.host_with(self.vault.clone(), World::config())
    }

    pub(crate) fn host_with(&self, vault: UnlockedVault, config: BranchConfig) -> BranchHost {
        BranchHost::new(vault, self.host_directory(), Arc::clone(&self.clock), Arc::clone(&self.entropy), config)
    }

    /// Begins the machine's chain with these disk sizes.
    pub(crate) fn protect(&self, sizes: &[u64]) -> History<'_> {
        let disks: Vec<DiskGeometry> =
            sizes.iter().enumerate().map(|(index, size)| geometry(DiskId(index as u16), *size)).collect();
        let session = Arc::new(self.vault.owner_session(&self.entropy, &self.clock).unwrap());
        let base = Generation(1).base();
        let delta = Delta {
            through: base,
            proven_through: PointTime(EPOCH * 1_000_000_000),
            geometries: disks.iter().map(|disk| GeometryChange { sequence: base, geometry: disk.clone() }).collect(),
            ..Delta::default()
        };
        let keys = self.vault.keys();
        let writer = ChainWriter::create(self.store(), &session, keys, CHAIN, (MACHINE, None), delta).unwrap();
        let mut catalog = Catalog::load(self.store(), keys).unwrap();
        let entry = CatalogEntry::MachineProtected { machine: MACHINE, name: "m".into(), chain: CHAIN, disks };
        catalog.append(self.store(), keys, &session, &entry).unwrap();
        History { world: self, writer, sequence: base, time: EPOCH, pending: Vec::new() }
    }
}

/// Writes the machine's history, a second at a time.
pub(crate) struct History<'a> {
    world: &'a World,
    pub(crate) writer: ChainWriter,
    sequence: SequenceNumber,
    time: u64,
    pending: Vec<Change>,
}

impl History<'_> {
    pub(crate) fn write(&mut self, disk: DiskId, start: u64, data: Vec<u8>) {
        self.sequence = self.sequence.next();
        let range = ByteRange::new(start, data.len() as u64);
        self.pending.push(Change {
            sequence: self.sequence,
            time: SourceTime(self.time * 1_000_000_000),
            disk,
            continues: false,
            kind: ChangeKind::Write { range, data: data.into() },
        });
    }

    /// Ends the second and commits it; the cut's label.
    pub(crate) fn second(&mut self) -> PointTime {
        self.time += 1;
        let label = PointTime(self.time * 1_000_000_000);
        let leaf_key = &self.world.vault.keys().shared().leaf;
        let options = SealOptions { leaf_key, compression: Compression::Fast, workers: NonZeroUsize::MIN };
        let (pending, through) = (std::mem::take(&mut self.pending), self.sequence);
        self.writer
            .commit(CheckpointWish::WhenDue, |object| {
                let layer = seal_segment(&pending, &[through], object, Host::ThisManifest, &options)?.layer;
                Ok(Delta {
                    through,
                    proven_through: label,
                    layers: layer.into_iter().collect(),
                    cuts: vec![Cut { sequence: through, time: label, kind: CutKind::Second }],
                    ..Delta::default()
                })
            })
            .unwrap();
        label
    }
}
