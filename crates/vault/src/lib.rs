//! The vault: encrypted, signed, self-describing history of all protected disks on an object store.
//!
//! See `docs/design/0003-vault-objects.md` for the shape and `docs/formats/` for the bytes. From the bottom up:
//!
//! * [`store`]: named immutable objects, created once.
//! * [`keys`]: who can read, write and name what.
//! * [`object`]: one signed envelope around encrypted frames.
//! * [`vault`]: made, opened, unlocked, granted to writers; [`catalog`]: what it protects.
//! * [`table`], [`segment`], [`image`], [`pack`], [`merge`]: changes and disks as layers.
//! * [`manifest`], [`chain`], [`points`]: history, its one writer, and the moments that can be opened; [`revoke`]: how a
//!   writer's grant ends; [`heads`]: the newest of it as this host last saw it.
//! * [`view`]: what a disk holds at a point; [`verify`]: whether everything is still what was written.

pub mod catalog;
pub mod chain;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod heads;
pub mod image;
mod image_map;
pub mod keys;
pub mod layer;
pub mod layout;
pub mod limits;
pub mod manifest;
pub mod merge;
mod moment;
pub mod numbered;
pub mod object;
pub mod pack;
pub mod pack_dedup;
pub mod parallel;
pub mod points;
pub mod revoke;
pub mod segment;
mod segment_absorb;
pub mod store;
pub mod table;
mod table_build;
mod table_page;
mod table_read;
mod table_root;
mod table_sink;
#[cfg(test)]
mod table_tests;
pub mod vault;
pub mod verify;
pub mod view;
mod view_cache;
#[cfg(test)]
mod view_fixture;
#[cfg(test)]
mod view_golden;
#[cfg(test)]
mod view_measure;
mod view_paint;
mod view_resolve;
pub mod view_source;
#[cfg(test)]
mod view_tests;

pub use catalog::{Catalog, CatalogEntry};
pub use chain::{ChainControl, ChainHistory, ChainTail, ChainWriter, CheckpointWish, PreparedManifest};
pub use error::{Damage, VaultError};
pub use heads::{RolledBack, SeenHeads};
pub use keys::{OpenKeys, RecoveryKey, VaultId, WriterId, WriterKeys, WriterSession};
pub use manifest::{Delta, Gap, GapClosed, GapScope, GeometryChange, Manifest, ManifestLink};
pub use moment::MomentError;
pub use object::{
    Compression, FrameClass, FrameRef, FrameSealer, ObjectBuilder, ObjectKind, ObjectReader, Placement, SealedObject,
};
pub use points::{Moment, Point, PointError, Points};
pub use store::{FolderStore, ObjectName, ObjectStoreAdapter, Store, StoreError, probe_create_only};
pub use vault::{Credential, UnlockedVault, Vault};
