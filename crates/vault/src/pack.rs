//! Packs: objects of 16 to 64 MiB full of content-addressed chunks.
//!
//! A chunk is the leaves of one granule that hold data, one after the other, in a frame of its own. Its name is a
//! keyed hash of its leaf hashes, so equal content has equal names wherever it lies. A pack's root frame lists names and
//! places; the index key is enough to read it.
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
use replication::geometry::LEAF_BYTES;

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
/// Frames after which a pack is closed, so that its index stays small however well chunks compress.
const PACK_ORDINALS_MAX: u32 = 1 << 16;
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
    chunks: Vec<(LeafHash, FrameRef)>,
    places: HashMap<LeafHash, FrameRef>,
}

/// A finished pack on its way. It stays until it is durable, so that a failed upload can be repeated.
struct Upload {
    sealed: Arc<SealedObject>,
    chunks: Vec<(LeafHash, FrameRef)>,
    places: HashMap<LeafHash, FrameRef>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
}

/// Seals the chunks of one batch.
pub(crate) struct Batch {
    pub(crate) sealer: FrameSealer,
    /// First of the ordinals reserved, one for each chunk of the batch.
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

    /// Makes room for a batch of up to `chunks` chunks.
    pub(crate) fn begin_batch(&mut self, chunks: u32) -> Result<Batch, VaultError> {
        if self.open.as_ref().is_some_and(|open| open.object.body_len() >= self.pack_bytes_target) {
            self.close_pack()?;
        }
        loop {
            let open = self.open.get_or_insert_with(|| {
                let name = self.session.pack_name();
                let placement = Placement::of_vault(ObjectKind::Pack);
                let object = ObjectBuilder::shared(Arc::clone(&self.session), placement, name);
                OpenPack { object, chunks: Vec::new(), places: HashMap::new() }
            });
            let ordinals = open.object.reserve_ordinals(chunks);
            if ordinals.end <= PACK_ORDINALS_MAX || ordinals.start == 0 {
                return Ok(Batch { sealer: open.object.sealer(), first_ordinal: ordinals.start });
            }
            self.close_pack()?;
        }
    }

    /// Where a chunk is, if it is stored already. May be called from the threads of a batch.
    pub(crate) fn find(&self, name: &LeafHash) -> Option<(ObjectName, FrameRef)> {
        if let Some(open) = &self.open
            && let Some(frame) = open.places.get(name)
        {
            return Some((open.object.name().clone(), *frame));
        }
        if let Some(upload) = &self.uploading
            && let Some(frame) = upload.places.get(name)
        {
            return Some((upload.sealed.name.clone(), *frame));
        }
        let dedup = self.dedup.read().unwrap_or_else(PoisonError::into_inner);
        dedup.find(name).map(|(pack, frame)| (pack.clone(), frame))
    }

    /// Adds a chunk sealed under an ordinal of the current batch. One that the batch brought already is dropped.
    pub(crate) fn append(
        &mut self,
        name: LeafHash,
        ordinal: u32,
        plain_len: usize,
        sealed: Vec<u8>,
    ) -> Result<(ObjectName, FrameRef), VaultError> {
        let open = self.open.as_mut().expect("a batch was begun");
        if let Some(frame) = open.places.get(&name) {
            return Ok((open.object.name().clone(), *frame));
        }
        let frame = open.object.append(FrameClass::Data, ordinal, plain_len, sealed)?;
        open.chunks.push((name, frame));
        open.places.insert(name, frame);
        Ok((open.object.name().clone(), frame))
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

pub(crate) fn encode_index(chunks: &[(LeafHash, FrameRef)]) -> Vec<u8> {
    let mut out = Encoder::with_capacity(16 + chunks.len() * 24);
    out.u8(LAYOUT).varint(chunks.len() as u64);
    let (mut end, mut ordinal) = (0, 0);
    for (name, frame) in chunks {
        // Frames of a pack follow one another, in the order of their ordinals, some of which are unused.
        assert!(frame.offset >= end && frame.ordinal >= ordinal, "a pack's chunks are listed in order");
        out.raw(&name.0)
            .varint(frame.offset - end)
            .varint(frame.sealed_len.into())
            .u8((u64::from(frame.plain_len) / LEAF_BYTES) as u8)
            .varint((frame.ordinal - ordinal).into());
        (end, ordinal) = (frame.body_range().end, frame.ordinal);
    }
    out.finish()
}

/// Decodes the root frame of a pack.
pub(crate) fn decode_index(bytes: Bytes) -> Result<Vec<(LeafHash, FrameRef)>, DecodeError> {
    let mut input = Decoder::new(bytes);
    match input.u8("pack layout")? {
        LAYOUT => {}
        value => return Err(DecodeError::Undefined { field: "pack layout", value: value.into() }),
    }
    let beyond = || DecodeError::Inconsistent("a chunk lies beyond the end of any pack");
    let count = input.count("chunks", PACK_ORDINALS_MAX.into())?;
    let mut chunks = Vec::with_capacity(count);
    let (mut end, mut ordinal) = (0u64, 0u32);
    for _ in 0..count {
        let name = LeafHash(input.array("chunk name")?);
        let offset = end.checked_add(input.varint("chunk gap")?).ok_or_else(beyond)?;
        let sealed_len = input.varint_max("sealed length", DATA_FRAME_BYTES_MAX as u64 + 1024)? as u32;
        let leaves = input.u8("chunk leaves")?;
        let plain_len = u64::from(leaves) * LEAF_BYTES;
        if leaves == 0 || plain_len > DATA_FRAME_BYTES_MAX as u64 {
            return Err(DecodeError::Undefined { field: "chunk leaves", value: leaves.into() });
        }
        let step = input.varint_max("ordinal step", u32::MAX.into())? as u32;
        ordinal = ordinal.checked_add(step).ok_or_else(beyond)?;
        end = offset.checked_add(sealed_len.into()).ok_or_else(beyond)?;
        let plain_len = plain_len as u32;
        chunks.push((name, FrameRef { offset, sealed_len, plain_len, ordinal, class: FrameClass::Data }));
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
) -> Result<Vec<(LeafHash, FrameRef)>, VaultError> {
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
) -> Result<Vec<(LeafHash, FrameRef)>, VaultError> {
    let object = ObjectReader::open(store, keys, name)?;
    // The folder's name proves nothing; the signature does. Another writer's chunks might not be what they claim.
    if object.header().writer != writer || object.header().placement.kind != ObjectKind::Pack {
        return Err(VaultError::Foreign { name: name.clone(), reason: "it is no pack of this writer" });
    }
    decode_index(object.root()?).map_err(VaultError::content(name))
}
