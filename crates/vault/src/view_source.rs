//! Where views get frames from: opens objects, fetches and verifies frames, and keeps what is likely to be asked for
//! again. One source serves all views of a vault in a process; its memory is bounded by [`CacheBytes`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, RwLock};

use bytes::Bytes;

use crate::error::{Damage, VaultError};
use crate::keys::OpenKeys;
use crate::layer::LayerRef;
use crate::object::{FrameRef, ObjectReader};
use crate::store::{ObjectName, Store};
use crate::table::Tree;
use crate::table_page::Page;
use crate::table_read::{Table, TableSources};
use crate::table_root::{Root, Sources, decode_source_page};
use crate::view_cache::Cache;

/// A short stand-in for an object's name, valid within one [`FrameSource`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectId(u32);

/// A frame's address: objects are immutable, so what is there never changes.
type Address = (ObjectId, u64);

/// How much memory a source may use for what it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheBytes {
    /// Table roots and pages, decoded.
    pub index: usize,
    /// Data frames, decoded.
    pub data: usize,
    /// What was found out about single granules of views.
    pub resolved: usize,
}

impl Default for CacheBytes {
    fn default() -> CacheBytes {
        CacheBytes { index: 48 << 20, data: 64 << 20, resolved: 32 << 20 }
    }
}

/// Opened objects kept; each costs a few hundred bytes and up to its first read.
const READERS_BYTES_MAX: usize = 8 << 20;

/// Fetches, verifies and caches frames of one vault.
pub struct FrameSource {
    store: Arc<dyn Store>,
    keys: Arc<OpenKeys>,
    names: RwLock<Names>,
    readers: Cache<ObjectId, Arc<ObjectReader>>,
    tables: Cache<Address, Arc<Table>>,
    pages: Cache<Address, Arc<Page>>,
    source_pages: Cache<Address, Arc<Vec<ObjectId>>>,
    frames: Cache<Address, Bytes>,
    pub(crate) cache_bytes: CacheBytes,
}

#[derive(Debug, Default)]
struct Names {
    ids: HashMap<ObjectName, ObjectId>,
    names: Vec<ObjectName>,
}

impl fmt::Debug for FrameSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameSource").field("store", &self.store.describe()).finish_non_exhaustive()
    }
}

impl FrameSource {
    /// A source of frames from `store`, as far as `keys` open them.
    pub fn new(store: Arc<dyn Store>, keys: Arc<OpenKeys>, cache_bytes: CacheBytes) -> FrameSource {
        FrameSource {
            store,
            keys,
            names: RwLock::default(),
            readers: Cache::new(READERS_BYTES_MAX),
            tables: Cache::new(cache_bytes.index / 2),
            pages: Cache::new(cache_bytes.index / 2),
            source_pages: Cache::new(cache_bytes.index / 8),
            frames: Cache::new(cache_bytes.data),
            cache_bytes,
        }
    }

    /// The keys it reads with.
    pub fn keys(&self) -> &OpenKeys {
        &self.keys
    }

    /// The store it reads from.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The id of an object.
    pub(crate) fn object(&self, name: &ObjectName) -> ObjectId {
        if let Some(&id) = self.names.read().expect("nothing panics while holding the names").ids.get(name) {
            return id;
        }
        let mut names = self.names.write().expect("nothing panics while holding the names");
        let next = ObjectId(names.names.len() as u32);
        let id = *names.ids.entry(name.clone()).or_insert(next);
        if id == next {
            names.names.push(name.clone());
        }
        id
    }

    /// The name of an object.
    pub(crate) fn name(&self, object: ObjectId) -> ObjectName {
        self.names.read().expect("nothing panics while holding the names").names[object.0 as usize].clone()
    }

    /// The error that `object` contradicts itself or another.
    pub(crate) fn damaged(&self, object: ObjectId, what: &'static str) -> VaultError {
        VaultError::damaged(&self.name(object), Damage::Contradiction(what))
    }

    /// An object with a verified header.
    pub(crate) fn reader(&self, object: ObjectId) -> Result<Arc<ObjectReader>, VaultError> {
        if let Some(reader) = self.readers.get(&object) {
            return Ok(reader);
        }
        let reader = Arc::new(ObjectReader::open(&self.store, &self.keys, &self.name(object))?);
        self.readers.insert(object, Arc::clone(&reader), 2048);
        Ok(reader)
    }

    /// The open table of a layer.
    pub(crate) fn table(&self, layer: &LayerRef) -> Result<Arc<Table>, VaultError> {
        let name = layer.object().expect("layers are resolved before they are read");
        let host = self.object(name);
        if let Some(table) = self.tables.get(&(host, layer.root.offset)) {
            return Ok(table);
        }
        let root = Root::decode(self.reader(host)?.frame(&layer.root)?).map_err(VaultError::content(name))?;
        let sources = match root.sources {
            Sources::Inline(names) => TableSources::Inline(names.iter().map(|name| self.object(name)).collect()),
            Sources::Paged { count, pages } => TableSources::Paged { count, pages },
        };
        let weight = size_of::<Table>()
            + root.narrow.as_ref().map_or(0, Page::weight)
            + root.wide.as_ref().map_or(0, Page::weight)
            + match &sources {
                TableSources::Inline(objects) => size_of_val(&objects[..]),
                TableSources::Paged { pages, .. } => size_of_val(&pages[..]),
            };
        let [narrow, wide] = [root.narrow, root.wide].map(|page| page.map(Arc::new));
        let table = Arc::new(Table { host, entries: root.entries, narrow, wide, sources });
        self.tables.insert((host, layer.root.offset), Arc::clone(&table), weight);
        Ok(table)
    }

    /// A page of a table.
    pub(crate) fn page(&self, object: ObjectId, frame: FrameRef, tree: Tree) -> Result<Arc<Page>, VaultError> {
        let address = (object, frame.offset);
        if let Some(page) = self.pages.get(&address) {
            return Ok(page);
        }
        let reader = self.reader(object)?;
        let page = Page::decode(reader.frame(&frame)?, tree).map_err(VaultError::content(reader.name()))?;
        let page = Arc::new(page);
        self.pages.insert(address, Arc::clone(&page), page.weight());
        Ok(page)
    }

    /// A page of a table's sources.
    pub(crate) fn source_page(
        &self,
        host: ObjectId,
        frame: FrameRef,
        count: u32,
        page: usize,
    ) -> Result<Arc<Vec<ObjectId>>, VaultError> {
        let address = (host, frame.offset);
        if let Some(page) = self.source_pages.get(&address) {
            return Ok(page);
        }
        let reader = self.reader(host)?;
        let names = decode_source_page(reader.frame(&frame)?, count, page);
        let names = names.map_err(VaultError::content(reader.name()))?;
        let objects: Arc<Vec<ObjectId>> = Arc::new(names.iter().map(|name| self.object(name)).collect());
        self.source_pages.insert(address, Arc::clone(&objects), size_of_val(&objects[..]));
        Ok(objects)
    }

    /// The plaintext of a data frame.
    pub(crate) fn data(&self, object: ObjectId, frame: FrameRef) -> Result<Bytes, VaultError> {
        let address = (object, frame.offset);
        if let Some(bytes) = self.frames.get(&address) {
            return Ok(bytes);
        }
        let bytes = self.reader(object)?.frame(&frame)?;
        self.frames.insert(address, bytes.clone(), bytes.len());
        Ok(bytes)
    }

    /// Whether a data frame is in memory.
    pub(crate) fn has_data(&self, object: ObjectId, frame: FrameRef) -> bool {
        self.frames.get(&(object, frame.offset)).is_some()
    }
}
