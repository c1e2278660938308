//! A small vault in memory, for the tests of everything that is a layer.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, RwLock};

use bytes::Bytes;
use replication::geometry::ByteRange;
use replication::{ChainId, Change, ChangeKind, DiskId, Generation, SequenceNumber, SourceTime};
use world::{Clock, Entropy, Monotonic, WallTime};

use crate::image::{ImageBuilder, ImageOptions};
use crate::keys::{
    Grant, OpenKeys, OwnerSecret, ReadSecret, SharedKeys, VaultId, WriterId, WriterKeys, WriterRole, WriterSession,
};
use crate::layer::{Host, LayerRef};
use crate::object::{Compression, ObjectBuilder, ObjectKind, Placement};
use crate::pack::SharedDedup;
use crate::pack_dedup::DedupIndex;
use crate::segment::{SealOptions, SealedSegment, seal_segment};
use crate::store::{ObjectStoreAdapter, Store};
use crate::view_source::{CacheBytes, FrameSource};

/// BLAKE3 as a generator: the same bytes each run.
pub(crate) struct SeededEntropy(pub(crate) Mutex<blake3::OutputReader>);

impl Entropy for SeededEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        self.0.lock().expect("not poisoned").fill(buffer);
    }
}

struct StoppedClock;

impl Clock for StoppedClock {
    fn monotonic(&self) -> Monotonic {
        Monotonic(0)
    }

    fn wall(&self) -> WallTime {
        WallTime::from_seconds(1_800_000_000)
    }
}

pub(crate) struct Fixture {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) session: Arc<WriterSession>,
    pub(crate) reader: Arc<OpenKeys>,
    pub(crate) dedup: SharedDedup,
    pub(crate) chain: ChainId,
}

pub(crate) const GENERATION: Generation = Generation(1);
pub(crate) const ONE: NonZeroUsize = NonZeroUsize::MIN;

impl Fixture {
    pub(crate) fn new() -> Fixture {
        Fixture::on(Arc::new(ObjectStoreAdapter::in_memory()))
    }

    /// A vault on `store`. Its writer signs as the owner, who needs no grant.
    pub(crate) fn on(store: Arc<dyn Store>) -> Fixture {
        let entropy = SeededEntropy(Mutex::new(blake3::Hasher::new().finalize_xof()));
        let (read, signing) = (ReadSecret::generate(&entropy), OwnerSecret::generate(&entropy));
        let shared = SharedKeys::generate(&entropy);
        let vault = VaultId([7; 16]);
        let grant = Grant {
            writer: WriterId::OWNER,
            key: signing.public(),
            sealing: read.public(),
            role: WriterRole::ProcessServer,
            label: "test".into(),
            granted_seconds: 0,
        };
        let owner_public = signing.public();
        let reader = Arc::new(OpenKeys::new(vault, owner_public, shared.clone(), Some(read.clone())));
        let keys = WriterKeys { vault, grant, signing, shared, read_public: read.public(), owner_public };
        let session = WriterSession::new(keys, Arc::new(entropy), Arc::new(StoppedClock)).expect("a session");
        let dedup = Arc::new(RwLock::new(DedupIndex::new(1 << 20)));
        Fixture { store, session: Arc::new(session), reader, dedup, chain: ChainId([3; 16]) }
    }

    pub(crate) fn source(&self) -> Arc<FrameSource> {
        self.source_with(Arc::clone(&self.reader), CacheBytes::default())
    }

    pub(crate) fn source_with(&self, keys: Arc<OpenKeys>, cache_bytes: CacheBytes) -> Arc<FrameSource> {
        Arc::new(FrameSource::new(Arc::clone(&self.store), keys, cache_bytes))
    }

    pub(crate) fn object(&self, kind: ObjectKind) -> ObjectBuilder<'_> {
        let name = self.session.segment_name(self.chain, GENERATION);
        ObjectBuilder::new(&self.session, Placement::on_chain(kind, self.chain, GENERATION), name)
    }

    /// Seals `changes` into an object of their own.
    pub(crate) fn segment(&self, changes: &[Change], barriers: &[SequenceNumber]) -> SealedSegment {
        self.segment_with(changes, barriers, ONE)
    }

    pub(crate) fn segment_with(
        &self,
        changes: &[Change],
        barriers: &[SequenceNumber],
        workers: NonZeroUsize,
    ) -> SealedSegment {
        let mut object = self.object(ObjectKind::Segment);
        let host = Host::Object(object.name().clone());
        let leaf_key = &self.reader.shared().leaf;
        let options = SealOptions { leaf_key, compression: Compression::Fast, workers };
        let sealed = seal_segment(changes, barriers, &mut object, host, &options).expect("seals");
        let root = sealed.layer.as_ref().map(|layer| layer.root);
        object.finish(root).put(self.store.as_ref()).expect("stores");
        sealed
    }

    pub(crate) fn layer(&self, changes: &[Change], barriers: &[SequenceNumber]) -> LayerRef {
        self.segment(changes, barriers).layer.expect("there is something")
    }

    pub(crate) fn image(&self, p0: u64) -> ImageBuilder {
        self.image_with(p0, ONE, Compression::Fast)
    }

    pub(crate) fn image_with(&self, p0: u64, workers: NonZeroUsize, compression: Compression) -> ImageBuilder {
        let options = ImageOptions { compression, workers };
        let (session, store) = (Arc::clone(&self.session), Arc::clone(&self.store));
        let dedup = Arc::clone(&self.dedup);
        ImageBuilder::new(session, store, dedup, self.chain, GENERATION, SequenceNumber(p0), options)
    }
}

/// A write.
pub(crate) fn write(sequence: u64, disk: u16, start: u64, data: impl Into<Bytes>) -> Change {
    let data = data.into();
    let range = ByteRange::new(start, data.len() as u64);
    change(sequence, disk, ChangeKind::Write { range, data })
}

pub(crate) fn change(sequence: u64, disk: u16, kind: ChangeKind) -> Change {
    let sequence = SequenceNumber(sequence);
    Change { sequence, time: SourceTime(0), disk: DiskId(disk), continues: false, kind }
}

/// `len` bytes that do not compress, different for each seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
