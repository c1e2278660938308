//! What a server serves: named exports, each a block device and how it wants to be used.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, RwLock};

use world::{BlockDevice, BlockError};

use crate::limits;

/// Sizes in bytes that a client is asked to respect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Every offset and length must be a multiple of this power of two.
    pub minimum: u32,
    /// Multiples of this power of two are fastest.
    pub preferred: u32,
    /// Largest read or write; at most [`limits::REQUEST_BYTES_MAX`].
    pub maximum: u32,
}

impl Default for BlockSizes {
    fn default() -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 4096, maximum: limits::REQUEST_BYTES_MAX }
    }
}

/// A disk as clients see it. All methods may be called from several threads at once.
pub trait Export: Send + Sync {
    /// The disk itself. A flush must cover the completed writes of all connections.
    fn device(&self) -> &dyn BlockDevice;

    /// Whether changes are refused.
    fn is_read_only(&self) -> bool {
        false
    }

    /// One line for people who list the exports; may be empty.
    fn description(&self) -> String {
        String::new()
    }

    /// Sizes that clients are asked to respect.
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    /// Whether zeroing a range never writes it out, which clients may then insist on.
    fn zeroes_fast(&self) -> bool {
        false
    }

    /// Writes `data` at `offset`; durable on return. A device that can do this cheaper than by a flush overrides it.
    ///
    /// # Errors
    /// Those of the write and of the flush.
    fn write_durable(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.device().write_at(offset, data)?;
        self.device().flush()
    }

    /// A client expects to read `range` soon. A hint: the default ignores it.
    ///
    /// # Errors
    /// May report what reading the range would report.
    fn prefetch(&self, range: Range<u64>) -> Result<(), BlockError> {
        let _ = range;
        Ok(())
    }
}

/// An export as it is told to a client that lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name it is opened by.
    pub name: String,
    /// One line for people; may be empty.
    pub description: String,
}

/// Where a server looks exports up.
pub trait Exports: Send + Sync {
    /// The export that `name` stands for; the empty name is the default export, if there is one.
    fn open(&self, name: &str) -> Option<Arc<dyn Export>>;

    /// All exports that clients may know of.
    fn list(&self) -> Vec<Listed>;
}

/// A block device served as it is.
pub struct DeviceExport {
    device: Arc<dyn BlockDevice>,
    read_only: bool,
    description: String,
}

impl DeviceExport {
    /// Serves `device` for reading and writing.
    pub fn new(device: Arc<dyn BlockDevice>) -> DeviceExport {
        DeviceExport { device, read_only: false, description: String::new() }
    }

    /// Serves `device` for reading only.
    pub fn read_only(device: Arc<dyn BlockDevice>) -> DeviceExport {
        DeviceExport { device, read_only: true, description: String::new() }
    }

    /// The same export with a line for people who list it.
    #[must_use]
    pub fn described(self, description: impl Into<String>) -> DeviceExport {
        DeviceExport { description: description.into(), ..self }
    }
}

impl Export for DeviceExport {
    fn device(&self) -> &dyn BlockDevice {
        self.device.as_ref()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn description(&self) -> String {
        self.description.clone()
    }
}

/// Exports by name, changed while the server runs. If it holds exactly one, that one is also the default export.
#[derive(Default)]
pub struct ExportTable {
    exports: RwLock<BTreeMap<String, Arc<dyn Export>>>,
}

impl ExportTable {
    /// A table without exports.
    pub fn new() -> ExportTable {
        ExportTable::default()
    }

    /// Adds `export` under `name` and returns the one it replaces. Open connections keep the old one.
    pub fn insert(&self, name: impl Into<String>, export: Arc<dyn Export>) -> Option<Arc<dyn Export>> {
        self.exports.write().expect("nothing panics while holding the table").insert(name.into(), export)
    }

    /// Takes the export `name` out. Open connections keep it.
    pub fn remove(&self, name: &str) -> Option<Arc<dyn Export>> {
        self.exports.write().expect("nothing panics while holding the table").remove(name)
    }
}

impl Exports for ExportTable {
    fn open(&self, name: &str) -> Option<Arc<dyn Export>> {
        let exports = self.exports.read().expect("nothing panics while holding the table");
        match exports.get(name) {
            Some(export) => Some(Arc::clone(export)),
            None if name.is_empty() && exports.len() == 1 => exports.values().next().cloned(),
            None => None,
        }
    }

    fn list(&self) -> Vec<Listed> {
        let exports = self.exports.read().expect("nothing panics while holding the table");
        exports.iter().map(|(name, export)| Listed { name: name.clone(), description: export.description() }).collect()
    }
}
