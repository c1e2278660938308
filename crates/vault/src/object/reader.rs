//! Reads objects: the header is verified first, then single frames with one range read each.

use std::sync::Arc;

use bytes::Bytes;

use super::frame::{FrameKeys, Identity};
use super::header::{Header, Parse, ParsedHeader, signed_message};
use super::{FrameClass, FrameRef};
use crate::error::{Damage, VaultError};
use crate::keys::{OpenKeys, VerifyingKey};
use crate::limits;
use crate::store::{ObjectName, Store};

/// An object whose header was verified.
pub struct ObjectReader {
    store: Arc<dyn Store>,
    name: ObjectName,
    header: Header,
    digest: [u8; 32],
    body_start: u64,
    keys: FrameKeys,
    has_data_key: bool,
    /// What the first read brought, from the object's first byte.
    start: Bytes,
}

impl ObjectReader {
    /// Reads and verifies the header of `name`.
    ///
    /// # Errors
    /// [`VaultError::Damaged`], [`VaultError::Foreign`] and [`VaultError::NewerFormat`] say what is wrong with the
    /// object; [`VaultError::Store`] what kept it from being read.
    pub fn open(store: &Arc<dyn Store>, keys: &OpenKeys, name: &ObjectName) -> Result<ObjectReader, VaultError> {
        ObjectReader::open_reading(store, keys, name, limits::HEADER_READ_BYTES)
    }

    /// As [`ObjectReader::open`], asking for `first_read` bytes at once: frames within them cost no further request.
    ///
    /// # Errors
    /// As [`ObjectReader::open`].
    pub fn open_reading(
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        name: &ObjectName,
        first_read: u64,
    ) -> Result<ObjectReader, VaultError> {
        let (parsed, start) = read_header(store.as_ref(), name, first_read)?;
        if parsed.header.vault != keys.vault() {
            return Err(VaultError::Foreign { name: name.clone(), reason: "it is part of another vault" });
        }
        let signer = keys.verifying_key(store, name, parsed.header.writer)?;
        keys.verify_once(name, &parsed, signer)?;
        let header = parsed.header;
        let identity = Identity {
            name: name.clone(),
            placement: header.placement,
            vault: header.vault,
            writer: header.writer,
            nonce: header.nonce,
        };
        let data_key = keys.data_key(name, &header)?;
        Ok(ObjectReader {
            store: Arc::clone(store),
            name: name.clone(),
            digest: *blake3::hash(&parsed.bytes).as_bytes(),
            body_start: parsed.body_start,
            keys: FrameKeys::new(&identity, data_key.as_ref().map(|key| key.expose()), keys.shared().index.expose()),
            has_data_key: data_key.is_some(),
            header,
            start,
        })
    }

    /// Its name.
    pub fn name(&self) -> &ObjectName {
        &self.name
    }

    /// Its verified header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// BLAKE3 of its header: identifies the object exactly.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Bytes in the store, as the signed header states them.
    pub fn stored_len(&self) -> u64 {
        self.body_start + self.header.body_len
    }

    /// The frame to start reading at.
    ///
    /// # Errors
    /// As [`ObjectReader::frame`]; [`VaultError::Damaged`] if the object has none.
    pub fn root(&self) -> Result<Bytes, VaultError> {
        match &self.header.root {
            Some(root) => self.frame(root),
            None => Err(self.damaged(Damage::Contradiction("it has no root frame"))),
        }
    }

    /// The plaintext of `frame`.
    ///
    /// # Errors
    /// [`VaultError::Locked`] for data frames without the read key; [`VaultError::Damaged`] if it does not
    /// authenticate.
    pub fn frame(&self, frame: &FrameRef) -> Result<Bytes, VaultError> {
        let sealed = self.body(frame.body_range())?;
        self.open_frame(frame, &sealed)
    }

    /// Sealed bytes of the body, for callers that read several neighbouring frames at once and then
    /// [`ObjectReader::open_frame`] each.
    ///
    /// # Errors
    /// [`VaultError::Damaged`] if the body ends before.
    pub fn body(&self, range: std::ops::Range<u64>) -> Result<Bytes, VaultError> {
        if range.end > self.header.body_len {
            return Err(self.damaged(Damage::Contradiction("a frame lies behind its end")));
        }
        let (start, end) = (self.body_start + range.start, self.body_start + range.end);
        if end <= self.start.len() as u64 {
            return Ok(self.start.slice(start as usize..end as usize));
        }
        let bytes = self.store.read(&self.name, start..end)?;
        if bytes.len() as u64 != end - start {
            return Err(self.damaged(Damage::Truncated { found: start + bytes.len() as u64, expected: end }));
        }
        Ok(bytes)
    }

    /// Decrypts a frame whose sealed bytes are at hand.
    ///
    /// # Errors
    /// As [`ObjectReader::frame`].
    pub fn open_frame(&self, frame: &FrameRef, sealed: &[u8]) -> Result<Bytes, VaultError> {
        if frame.class == FrameClass::Data && !self.has_data_key {
            return Err(VaultError::Locked { name: self.name.clone() });
        }
        self.keys.open(frame, sealed).map_err(|damage| self.damaged(damage))
    }

    /// Reads the whole body and compares it with the signed digest.
    ///
    /// # Errors
    /// [`VaultError::Damaged`] if it differs.
    pub fn verify_body(&self) -> Result<(), VaultError> {
        verify_digest(&self.name, &self.store.read_all(&self.name)?, self.body_start, &self.header)
    }

    /// A damage of this object.
    pub fn damaged(&self, damage: Damage) -> VaultError {
        VaultError::damaged(&self.name, damage)
    }
}

/// Checks that the body of `name` matches the digest in its header, without any key and hence without its
/// signature. Finds every accidental change; an attacker could have changed both.
///
/// # Errors
/// [`VaultError::Damaged`] if it does not.
pub fn verify_body_without_keys(store: &dyn Store, name: &ObjectName) -> Result<Header, VaultError> {
    let all = store.read_all(name)?;
    match Header::parse(name, &all)? {
        Parse::Complete(parsed) => {
            verify_digest(name, &all, parsed.body_start, &parsed.header)?;
            Ok(parsed.header)
        }
        Parse::NeedsBytes(expected) => {
            Err(VaultError::damaged(name, Damage::Truncated { found: all.len() as u64, expected }))
        }
    }
}

fn verify_digest(name: &ObjectName, all: &Bytes, body_start: u64, header: &Header) -> Result<(), VaultError> {
    let expected = body_start + header.body_len;
    if all.len() as u64 != expected {
        return Err(VaultError::damaged(name, Damage::Truncated { found: all.len() as u64, expected }));
    }
    if blake3::hash(&all[body_start as usize..]) == header.body_digest {
        Ok(())
    } else {
        Err(VaultError::damaged(name, Damage::Body))
    }
}

/// Reads the beginning of `name` until the header is complete. Nothing is verified yet.
pub(crate) fn read_header(
    store: &dyn Store,
    name: &ObjectName,
    first_read: u64,
) -> Result<(ParsedHeader, Bytes), VaultError> {
    let mut start = store.read(name, 0..first_read)?;
    loop {
        match Header::parse(name, &start)? {
            Parse::Complete(parsed) => return Ok((*parsed, start)),
            Parse::NeedsBytes(needed) => {
                start = store.read(name, 0..needed)?;
                if (start.len() as u64) < needed {
                    return Err(VaultError::damaged(
                        name,
                        Damage::Truncated { found: start.len() as u64, expected: needed },
                    ));
                }
            }
        }
    }
}

pub(crate) fn verify_signature(
    name: &ObjectName,
    parsed: &ParsedHeader,
    signer: VerifyingKey,
) -> Result<(), VaultError> {
    if signer.verifies(&signed_message(name, &parsed.bytes), &parsed.signature) {
        Ok(())
    } else {
        Err(VaultError::damaged(name, Damage::Signature))
    }
}
