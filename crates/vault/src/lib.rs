//! The vault: encrypted, signed, self-describing history of all protected disks on an object store.
//!
//! See `docs/design/0003-vault-objects.md` for the shape and `docs/formats/` for the bytes.
