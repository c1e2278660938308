//! Any store of the `object_store` crate as a [`Store`].
//!
//! Calls block the thread on the store's own future, so stores that need a running async runtime must bring one.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::executor::block_on;
use object_store::path::Path;
use object_store::{ObjectStore, PutMode, PutOptions, PutPayload};

use super::{ObjectName, Store, StoreError};

/// A store behind the `object_store` crate.
pub struct ObjectStoreAdapter {
    inner: Arc<dyn ObjectStore>,
    place: String,
}

impl ObjectStoreAdapter {
    /// A store over `inner`. `place` is what people call it.
    pub fn new(inner: Arc<dyn ObjectStore>, place: impl Into<String>) -> ObjectStoreAdapter {
        ObjectStoreAdapter { inner, place: place.into() }
    }

    /// A store that forgets everything when it is dropped: for tests.
    pub fn in_memory() -> ObjectStoreAdapter {
        ObjectStoreAdapter::new(Arc::new(object_store::memory::InMemory::new()), "memory")
    }
}

impl Store for ObjectStoreAdapter {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        let payload: PutPayload = parts.iter().cloned().collect();
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        match block_on(self.inner.put_opts(&path(name), payload, options)) {
            Ok(_) => Ok(()),
            Err(error) => Err(translate(name, error)),
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        block_on(self.inner.get_range(&path(name), range.clone())).or_else(|error| {
            // Stores refuse ranges that start behind the end; a missing object stays an error.
            if self.size(name)? <= range.start { Ok(Bytes::new()) } else { Err(translate(name, error)) }
        })
    }

    fn read_all(&self, name: &ObjectName) -> Result<Bytes, StoreError> {
        let answer = block_on(async { self.inner.get(&path(name)).await?.bytes().await });
        answer.map_err(|error| translate(name, error))
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        Ok(block_on(self.inner.head(&path(name))).map_err(|error| translate(name, error))?.size)
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        assert!(prefix.is_empty() || prefix.ends_with('/'), "a listing names a folder");
        let failed =
            |error: object_store::Error| StoreError::Unavailable { at: prefix.to_owned(), source: error.into() };
        let folder = Path::from(prefix);
        let mut stream = match after {
            Some(after) => self.inner.list_with_offset(Some(&folder), &path(after)),
            None => self.inner.list(Some(&folder)),
        };
        // The crate promises no order, so all names are seen before the first few are chosen.
        let mut names = Vec::new();
        while let Some(meta) = block_on(stream.next()) {
            let location = meta.map_err(failed)?.location;
            if let Ok(name) = ObjectName::new(location.as_ref())
                && after.is_none_or(|after| name > *after)
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        names.truncate(limit);
        Ok(names)
    }

    fn describe(&self) -> String {
        self.place.clone()
    }
}

fn path(name: &ObjectName) -> Path {
    Path::from(name.as_str())
}

fn translate(name: &ObjectName, error: object_store::Error) -> StoreError {
    match error {
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            StoreError::AlreadyExists(name.clone())
        }
        object_store::Error::NotFound { .. } => StoreError::NotFound(name.clone()),
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            StoreError::ReadOnly { name: name.clone(), source: error.into() }
        }
        object_store::Error::NotImplemented | object_store::Error::NotSupported { .. } => {
            StoreError::NotCreateOnly(error.to_string())
        }
        _ => StoreError::Unavailable { at: name.to_string(), source: error.into() },
    }
}
