//! The vault: encrypted, signed, self-describing history of all protected disks on an object store.
//!
//! See `docs/design/0003-vault-objects.md` for the shape and `docs/formats/` for the bytes. From the bottom up:
//!
//! * [`store`]: named immutable objects, created once.
//! * [`keys`]: who can read, write and name what.
//! * [`object`]: one signed envelope around encrypted frames.

pub mod error;
pub mod keys;
pub mod layout;
pub mod limits;
pub mod object;
pub mod store;

pub use error::{Damage, VaultError};
pub use keys::{OpenKeys, RecoveryKey, VaultId, WriterId, WriterKeys, WriterSession};
pub use object::{
    Compression, FrameClass, FrameRef, FrameSealer, ObjectBuilder, ObjectKind, ObjectReader, Placement, SealedObject,
};
pub use store::{FolderStore, ObjectName, ObjectStoreAdapter, Store, StoreError, probe_create_only};
