//! Packs: objects of 16 to 64 MiB full of content-addressed chunks.
//!
//! A chunk is the leaves of one granule that hold data, one after the other. Its name is a keyed hash of its leaf hashes,
//! so equal content has equal names wherever it lies. Chunks that came together share a frame, since larger frames compress
//! better. A pack's root frame lists names and places; the index key is enough to read it.
//!
//! After a crash a pack exists or not; nothing refers to it before it is durable. One that nobody came to refer to is
//! still found by [`load_dedup`] and used.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use bytes::Bytes;
use replication::LeafHash;
use replication::codec::{DecodeError, Decoder, Encoder};
use replication::geometry::{LEAF_BYTES, LEAVES_PER_GRANULE};

use crate::error::VaultError;
use crate::keys::{OpenKeys, WriterId, WriterSession};
use crate::object::{
    Compression, FrameClass, FrameRef, FrameSealer, ObjectBuilder, ObjectKind, ObjectReader, Placement, SealedObject,
};
use crate::pack_dedup::DedupIndex;
use crate::store::{ObjectName, Store, StoreError};
use crate::table::DATA_FRAME_BYTES_MAX;

/// Bytes of frames after which a pack is closed.
pub(crate) const PACK_BYTES_TARGET: u64 = 32 << 20;
/// Chunks, and ordinals, after which a pack is closed, so that its index stays small however well chunks compress.
const PACK_CHUNKS_MAX: u32 = 1 << 16;
/// Leaves in a frame at most.
const FRAME_LEAVES_MAX: u64 = DATA_FRAME_BYTES_MAX as u64 / LEAF_BYTES;
const LAYOUT: u8 = 1;

/// The dedup index of a writer, shared by everything it stores at the same time.
pub type SharedDedup = Arc<RwLock<DedupIndex>>;

/// Stores chunks in packs.
pub(crate) struct PackWriter {
    session: Arc<WriterSession>,
    store: Arc<dyn Store>,
    dedup: SharedDedup,
    /// With one worker, uploads happen inline as well.
    workers: NonZeroUsize,
    open: Option<OpenPack>,
    uploading: Option<Upload>,
    pack_bytes_target: u64,
}

struct OpenPack {
    object: ObjectBuilder<'static>,
    chunks: Vec<(LeafHash, ChunkPlace)>,
    places: HashMap<LeafHash, ChunkPlace>,
}

/// A finished pack on its way. It stays until it is durable, so that a failed upload can be repeated.
struct Upload {
    sealed: Arc<SealedObject>,
    chunks: Vec<(LeafHash, ChunkPlace)>,
    places: HashMap<LeafHash, ChunkPlace>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
}

/// Where a chunk is within its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The frame that holds it.
    pub frame: FrameRef,
    /// Its first byte within the frame's plaintext; a multiple of the leaf size.
    pub at: u32,
}

/// Seals the frames of one batch.
pub(crate) struct Batch {
    pub(crate) sealer: FrameSealer,
    /// First of the ordinals reserved, one for each frame of the batch.
    pub(crate) first_ordinal: u32,
}

impl PackWriter {
    pub(crate) fn new(
        session: Arc<WriterSession>,
        store: Arc<dyn Store>,
        dedup: SharedDedup,
        workers: NonZeroUsize,
    ) -> PackWriter {
        PackWriter { session, store, dedup, workers, open: None, uploading: None, pack_bytes_target: PACK_BYTES_TARGET }
    }

    /// With another size per pack, for tests.
    #[cfg(test)]
    pub(crate) fn set_pack_bytes(&mut self, target: u64) {
        self.pack_bytes_target = target;
    }

    pub(crate) fn session(&self) -> &WriterSession {
        &self.session
    }

    pub(crate) fn store(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// Makes room for a batch of up to `chunks` chunks in `frames` frames.
    pub(crate) fn begin_batch(&mut self, chunks: usize, frames: u32) -> Result<Batch, VaultError> {
        let is_full = |open: &OpenPack| {
            open.object.body_len() >= self.pack_bytes_target || open.chunks.len() + chunks > PACK_CHUNKS_MAX as usize
        };
        if self.open.as_ref().is_some_and(is_full) {
            self.close_pack()?;
        }
        let open = self.open.get_or_insert_with(|| {
            let name = self.session.pack_name();
            let placement = Placement::of_vault(ObjectKind::Pack);
            let object = ObjectBuilder::shared(Arc::clone(&self.session), placement, name);
            OpenPack { object, chunks: Vec::new(), places: HashMap::new() }
        });
        let ordinals = open.object.reserve_ordinals(frames);
        Ok(Batch { sealer: open.object.sealer(), first_ordinal: ordinals.start })
    }

    /// Where a chunk is, if it is stored already. May be called from the threads of a batch.
    pub(crate) fn find(&self, name: &LeafHash) -> Option<(ObjectName, ChunkPlace)> {
        if let Some(open) = &self.open
            && let Some(place) = open.places.get(name)
        {
            return Some((open.object.name().clone(), *place));
        }
        if let Some(upload) = &self.uploading
            && let Some(place) = upload.places.get(name)
        {
            return Some((upload.sealed.name.clone(), *place));
        }
        let dedup = self.dedup.read().unwrap_or_else(PoisonError::into_inner);
        dedup.find(name).map(|(pack, place)| (pack.clone(), place))
    }

    /// Adds a frame sealed under an ordinal of the current batch, with the names and leaves of its chunks in order. None of
    /// them may be stored already. Returns the pack and the chunks' places.
    pub(crate) fn append(
        &mut self,
        ordinal: u32,
        sealed: Vec<u8>,
        chunks: impl Iterator<Item = (LeafHash, u8)> + Clone,
    ) -> Result<(ObjectName, Vec<ChunkPlace>), VaultError> {
        let open = self.open.as_mut().expect("a batch was begun");
        let plain_len = chunks.clone().map(|(_, leaves)| usize::from(leaves)).sum::<usize>() * LEAF_BYTES as usize;
        let frame = open.object.append(FrameClass::Data, ordinal, plain_len, sealed)?;
        let mut at = 0;
        let places = chunks.map(|(name, leaves)| {
            let place = ChunkPlace { frame, at };
            at += u32::from(leaves) * LEAF_BYTES as u32;
            open.chunks.push((name, place));
            open.places.insert(name, place);
            place
        });
        let places = places.collect();
        Ok((open.object.name().clone(), places))
    }

    /// Returns once everything appended is durable.
    ///
    /// # Errors
    /// Those of the store. Nothing is lost: call again to retry the same pack under the same name.
    pub(crate) fn flush(&mut self) -> Result<(), VaultError> {
        self.close_pack()?;
        self.finish_upload()
    }

    fn close_pack(&mut self) -> Result<(), VaultError> {
        self.finish_upload()?;
        let Some(mut open) = self.open.take() else { return Ok(()) };
        if open.chunks.is_empty() {
            return Ok(());
        }
        let root = open.object.add(FrameClass::Index, &encode_index(&open.chunks), Compression::None)?;
        let sealed = Arc::new(open.object.finish(Some(root)));
        let thread = (self.workers.get() > 1).then(|| {
            let (sealed, store) = (Arc::clone(&sealed), Arc::clone(&self.store));
            std::thread::spawn(move || sealed.put(store.as_ref()))
        });
        self.uploading = Some(Upload { sealed, chunks: open.chunks, places: open.places, thread });
        if self.workers.get() > 1 { Ok(()) } else { self.finish_upload() }
    }

    fn finish_upload(&mut self) -> Result<(), VaultError> {
        let Some(upload) = &mut self.uploading else { return Ok(()) };
        match upload.thread.take() {
            Some(thread) => match thread.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            },
            None => upload.sealed.put(self.store.as_ref())?,
        }
        let upload = self.uploading.take().expect("it was there");
        let mut dedup = self.dedup.write().unwrap_or_else(PoisonError::into_inner);
        dedup.add_pack(&upload.sealed.name, upload.chunks);
        Ok(())
    }
}

pub(crate) fn encode_index(chunks: &[(LeafHash, ChunkPlace)]) -> Vec<u8> {
    let frames: Vec<&[(LeafHash, ChunkPlace)]> =
        chunks.chunk_by(|one, next| one.1.frame.ordinal == next.1.frame.ordinal).collect();
    let mut out = Encoder::with_capacity(16 + chunks.len() * 17 + frames.len() * 8);
    out.u8(LAYOUT).varint(frames.len() as u64);
    let (mut end, mut ordinal) = (0, 0);
    for chunks in frames {
        let frame = chunks[0].1.frame;
        // Frames of a pack follow one another, in the order of their ordinals, some of which are unused.
        assert!(frame.offset >= end && frame.ordinal >= ordinal, "a pack's frames are listed in order");
        out.varint(frame.offset - end)
            .varint(frame.sealed_len.into())
            .varint((frame.ordinal - ordinal).into())
            .varint(chunks.len() as u64);
        let ends = chunks[1..].iter().map(|(_, next)| next.at).chain([frame.plain_len]);
        for ((name, place), end) in chunks.iter().zip(ends) {
            out.raw(&name.0).u8((u64::from(end - place.at) / LEAF_BYTES) as u8);
        }
        (end, ordinal) = (frame.body_range().end, frame.ordinal);
    }
    out.finish()
}

/// Decodes the root frame of a pack.
pub(crate) fn decode_index(bytes: Bytes) -> Result<Vec<(LeafHash, ChunkPlace)>, DecodeError> {
    let mut input = Decoder::new(bytes);
    match input.u8("pack layout")? {
        LAYOUT => {}
        value => return Err(DecodeError::Undefined { field: "pack layout", value: value.into() }),
    }
    let beyond = || DecodeError::Inconsistent("a frame lies beyond the end of any pack");
    let frames = input.count("frames", PACK_CHUNKS_MAX.into())?;
    let mut chunks = Vec::with_capacity(frames);
    let (mut end, mut ordinal) = (0u64, 0u32);
    for number in 0..frames {
        let offset = end.checked_add(input.varint("frame gap")?).ok_or_else(beyond)?;
        let sealed_len = input.varint_max("sealed length", DATA_FRAME_BYTES_MAX as u64 + 1024)? as u32;
        let step = input.varint_max("ordinal step", u32::MAX.into())? as u32;
        if step == 0 && number > 0 {
            return Err(DecodeError::Inconsistent("two frames of a pack have one ordinal"));
        }
        ordinal = ordinal.checked_add(step).ok_or_else(beyond)?;
        end = offset.checked_add(sealed_len.into()).ok_or_else(beyond)?;
        let count = input.count("chunks of a frame", FRAME_LEAVES_MAX)?;
        let first = chunks.len();
        let mut frame_leaves = 0;
        for _ in 0..count {
            let name = LeafHash(input.array("chunk name")?);
            let leaves = input.u8("chunk leaves")?;
            if leaves == 0 || u64::from(leaves) > LEAVES_PER_GRANULE {
                return Err(DecodeError::Undefined { field: "chunk leaves", value: leaves.into() });
            }
            let frame = FrameRef { offset, sealed_len, plain_len: 0, ordinal, class: FrameClass::Data };
            chunks.push((name, ChunkPlace { frame, at: frame_leaves * LEAF_BYTES as u32 }));
            frame_leaves += u32::from(leaves);
        }
        if count == 0 || u64::from(frame_leaves) > FRAME_LEAVES_MAX {
            return Err(DecodeError::Inconsistent("a frame of a pack has no chunk, or too many"));
        }
        for (_, place) in &mut chunks[first..] {
            place.frame.plain_len = frame_leaves * LEAF_BYTES as u32;
        }
        if chunks.len() > PACK_CHUNKS_MAX as usize {
            return Err(DecodeError::Inconsistent("a pack has too many chunks"));
        }
    }
    input.finish()?;
    Ok(chunks)
}

/// The chunks of a pack, after verifying its header. Needs the index key only.
///
/// # Errors
/// Those of reading an object; [`VaultError::Damaged`] if its index cannot be understood.
pub fn read_pack_index(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    name: &ObjectName,
) -> Result<Vec<(LeafHash, ChunkPlace)>, VaultError> {
    decode_index(ObjectReader::open(store, keys, name)?.root()?).map_err(VaultError::content(name))
}

/// What [`load_dedup`] found.
#[derive(Debug)]
pub struct LoadedDedup {
    /// The index.
    pub index: DedupIndex,
    /// Packs whose index could not be used, and why. Their chunks will be stored again when they come again.
    pub skipped: Vec<(ObjectName, VaultError)>,
}

/// Loads the chunks that `writer` stored in earlier runs, at most `chunks_max` of them.
///
/// # Errors
/// Those of the store. Damaged packs are skipped and reported.
pub fn load_dedup(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    writer: WriterId,
    chunks_max: usize,
) -> Result<LoadedDedup, VaultError> {
    let mut index = DedupIndex::new(chunks_max);
    let mut skipped = Vec::new();
    store.as_ref().for_each::<VaultError>(&format!("packs/{writer}/"), |name| {
        match read_own_pack(store, keys, &name, writer) {
            Ok(chunks) => index.add_pack(&name, chunks),
            Err(error @ VaultError::Store(_)) => return Err(error),
            Err(error) => skipped.push((name, error)),
        }
        Ok(index.len() < chunks_max)
    })?;
    Ok(LoadedDedup { index, skipped })
}

fn read_own_pack(
    store: &Arc<dyn Store>,
    keys: &OpenKeys,
    name: &ObjectName,
    writer: WriterId,
) -> Result<Vec<(LeafHash, ChunkPlace)>, VaultError> {
    let object = ObjectReader::open(store, keys, name)?;
    // The folder's name proves nothing; the signature does. Another writer's chunks might not be what they claim.
    if object.header().writer != writer || object.header().placement.kind != ObjectKind::Pack {
        return Err(VaultError::Foreign { name: name.clone(), reason: "it is no pack of this writer" });
    }
    decode_index(object.root()?).map_err(VaultError::content(name))
}
