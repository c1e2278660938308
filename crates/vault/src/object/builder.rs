//! Makes an object in memory: frames, then the header that holds their digest, then the signature.

use std::sync::Arc;

use bytes::Bytes;

use super::frame::{FrameKeys, Identity};
use super::header::{Header, Placement, signed_message};
use super::{Compression, FrameClass, FrameRef, FrameSealer};
use crate::error::VaultError;
use crate::keys::{ObjectNonce, SealedKey, WriterSession};
use crate::limits;
use crate::store::{ObjectName, Store, StoreError};

/// An object being made. Frames are sealed by any number of threads with [`ObjectBuilder::sealer`] and appended in
/// any order.
pub struct ObjectBuilder<'a> {
    session: Session<'a>,
    identity: Identity,
    sealer: FrameSealer,
    hour: u64,
    sealed_data_key: SealedKey,
    has_data: bool,
    frames: Vec<Bytes>,
    next_ordinal: u32,
    /// One bit per ordinal appended so far: a second frame under the same AEAD nonce would give the key away.
    used: Vec<u64>,
    body_len: u64,
    digest: blake3::Hasher,
}

/// A finished object, ready to be created under its name. Retrying means these very bytes under this very name.
#[derive(Debug, Clone)]
pub struct SealedObject {
    /// Its name.
    pub name: ObjectName,
    /// Its nonce, which tells it from any other object that might be found under the name.
    pub nonce: ObjectNonce,
    /// BLAKE3 of its header, which in turn holds the digest of the body: identifies the object exactly.
    pub digest: [u8; 32],
    /// Its bytes.
    pub parts: Vec<Bytes>,
}

impl SealedObject {
    /// Bytes in the store.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|part| part.len() as u64).sum()
    }

    /// Whether it has no bytes; it always has a header.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Creates the object in `store`. A name that this very object already took, because the answer to an earlier
    /// attempt was lost, counts as success.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] if the name holds something else.
    pub fn put(&self, store: &dyn Store) -> Result<(), StoreError> {
        match store.create(&self.name, &self.parts) {
            Err(StoreError::AlreadyExists(name)) => {
                let head_len = self.parts[0].len() as u64;
                let found = store.read(&self.name, 0..head_len)?;
                // The header part holds nonce, digest and signature: equal headers mean equal objects.
                if found == self.parts[0] && store.size(&self.name)? == self.len() {
                    Ok(())
                } else {
                    Err(StoreError::AlreadyExists(name))
                }
            }
            other => other,
        }
    }
}

enum Session<'a> {
    Borrowed(&'a WriterSession),
    Shared(Arc<WriterSession>),
}

impl std::ops::Deref for Session<'_> {
    type Target = WriterSession;

    fn deref(&self) -> &WriterSession {
        match self {
            Session::Borrowed(session) => session,
            Session::Shared(session) => session,
        }
    }
}

impl ObjectBuilder<'static> {
    /// As [`ObjectBuilder::new`], for builders that live in long-lived owners of the session.
    pub fn shared(session: Arc<WriterSession>, placement: Placement, name: ObjectName) -> ObjectBuilder<'static> {
        ObjectBuilder::begin(Session::Shared(session), placement, name)
    }
}

impl<'a> ObjectBuilder<'a> {
    /// Begins the object `name`.
    pub fn new(session: &'a WriterSession, placement: Placement, name: ObjectName) -> ObjectBuilder<'a> {
        ObjectBuilder::begin(Session::Borrowed(session), placement, name)
    }

    fn begin(session: Session<'a>, placement: Placement, name: ObjectName) -> ObjectBuilder<'a> {
        let hour = session.hour_key();
        let keys = session.keys();
        let identity =
            Identity { name, placement, vault: keys.vault, writer: keys.writer(), nonce: session.new_nonce() };
        let frame_keys = FrameKeys::new(&identity, Some(hour.key.expose()), keys.shared.index.expose());
        ObjectBuilder {
            session,
            identity,
            sealer: FrameSealer::new(frame_keys),
            hour: hour.hour,
            sealed_data_key: hour.sealed,
            has_data: false,
            frames: Vec::new(),
            next_ordinal: 0,
            used: Vec::new(),
            body_len: 0,
            digest: blake3::Hasher::new(),
        }
    }

    /// The name it will have.
    pub fn name(&self) -> &ObjectName {
        &self.identity.name
    }

    /// Its nonce.
    pub fn nonce(&self) -> ObjectNonce {
        self.identity.nonce
    }

    /// Bytes of frames so far.
    pub fn body_len(&self) -> u64 {
        self.body_len
    }

    /// Seals frames for this object, on any thread.
    pub fn sealer(&self) -> FrameSealer {
        self.sealer.clone()
    }

    /// The next `count` ordinals, for callers that seal in parallel.
    pub fn reserve_ordinals(&mut self, count: u32) -> std::ops::Range<u32> {
        let first = self.next_ordinal;
        self.next_ordinal = first.checked_add(count).expect("an object has fewer than 2^32 frames");
        first..self.next_ordinal
    }

    /// Appends a frame that [`ObjectBuilder::sealer`] made with a reserved `ordinal`.
    ///
    /// # Errors
    /// [`VaultError::LimitExceeded`] if the object would grow beyond its bounds.
    pub fn append(
        &mut self,
        class: FrameClass,
        ordinal: u32,
        plain_len: usize,
        sealed: Vec<u8>,
    ) -> Result<FrameRef, VaultError> {
        assert!(ordinal < self.next_ordinal, "ordinals are reserved before they are used");
        let (word, bit) = ((ordinal / 64) as usize, 1u64 << (ordinal % 64));
        self.used.resize(self.used.len().max(word + 1), 0);
        assert!(self.used[word] & bit == 0, "an ordinal is a nonce and used once");
        self.used[word] |= bit;
        let end = self.body_len + sealed.len() as u64;
        for (what, value, limit) in [
            ("the length of an object", end, limits::OBJECT_BODY_BYTES_MAX),
            ("the number of frames of an object", u64::from(ordinal) + 1, limits::OBJECT_FRAMES_MAX.into()),
            ("the length of a frame", plain_len as u64, limits::FRAME_PLAIN_BYTES_MAX as u64),
        ] {
            if value > limit {
                return Err(VaultError::LimitExceeded { what, value, limit });
            }
        }
        let frame = FrameRef {
            offset: self.body_len,
            sealed_len: sealed.len() as u32,
            plain_len: plain_len as u32,
            ordinal,
            class,
        };
        self.digest.update(&sealed);
        self.has_data |= class == FrameClass::Data;
        self.body_len = end;
        self.frames.push(sealed.into());
        Ok(frame)
    }

    /// Seals and appends a frame.
    ///
    /// # Errors
    /// As [`ObjectBuilder::append`].
    pub fn add(
        &mut self,
        class: FrameClass,
        plaintext: &[u8],
        compression: Compression,
    ) -> Result<FrameRef, VaultError> {
        if plaintext.len() > limits::FRAME_PLAIN_BYTES_MAX {
            return Err(VaultError::LimitExceeded {
                what: "the length of a frame",
                value: plaintext.len() as u64,
                limit: limits::FRAME_PLAIN_BYTES_MAX as u64,
            });
        }
        let ordinal = self.reserve_ordinals(1).start;
        let sealed = self.sealer.seal(class, ordinal, plaintext, compression);
        self.append(class, ordinal, plaintext.len(), sealed)
    }

    /// Signs and returns the object. `root` is where readers start.
    pub fn finish(self, root: Option<FrameRef>) -> SealedObject {
        self.finish_with_clear(root, Vec::new())
    }

    /// As [`ObjectBuilder::finish`], with clear fields of the kind.
    pub(crate) fn finish_with_clear(self, root: Option<FrameRef>, clear: Vec<u8>) -> SealedObject {
        assert!(clear.len() <= limits::CLEAR_FIELDS_BYTES_MAX, "clear fields are small");
        let header = Header {
            incompatible: 0,
            read_compatible: 0,
            compatible: 0,
            placement: self.identity.placement,
            vault: self.identity.vault,
            writer: self.identity.writer,
            key_epoch: 0,
            nonce: self.identity.nonce,
            hour: self.hour,
            recipients: if self.has_data { vec![(0, self.sealed_data_key)] } else { Vec::new() },
            root,
            body_len: self.body_len,
            body_digest: *self.digest.finalize().as_bytes(),
            clear,
        };
        let mut head = header.encode();
        let digest = *blake3::hash(&head).as_bytes();
        head.extend_from_slice(&self.session.sign(&signed_message(&self.identity.name, &head)));
        let mut parts = Vec::with_capacity(1 + self.frames.len());
        parts.push(head.into());
        parts.extend(self.frames);
        SealedObject { name: self.identity.name, nonce: self.identity.nonce, digest, parts }
    }
}
