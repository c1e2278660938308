//! Leaf hashes: how two copies of a disk are compared without sending either.
//!
//! The side that reads a disk hashes each 4 KiB leaf with plain BLAKE3. The side that holds a vault index stores
//! *keyed* hashes, derived from the plain ones under the vault's leaf key, so that an index reveals nothing about
//! content to someone who can guess it but lacks the key. Whoever holds the index compares; see
//! `docs/design/0002-one-sender-one-receiver.md`.

use crate::geometry::{LEAF_BYTES, LEAVES_PER_GRANULE};

/// BLAKE3 of one leaf, first 16 bytes. Leaves at the end of a disk that is not a multiple of 4 KiB are hashed as if
/// zeroes followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlainLeafHash(pub [u8; 16]);

/// A plain leaf hash under the vault's leaf key, first 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeafHash(pub [u8; 16]);

/// The vault's secret for leaf hashes.
#[derive(Clone)]
pub struct LeafKey([u8; 32]);

impl std::fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LeafKey(secret)")
    }
}

impl PlainLeafHash {
    /// The hash of `leaf`, at most [`LEAF_BYTES`] long.
    pub fn of(leaf: &[u8]) -> PlainLeafHash {
        assert!(leaf.len() as u64 <= LEAF_BYTES, "a leaf has at most 4 KiB");
        let hash = if leaf.len() as u64 == LEAF_BYTES {
            blake3::hash(leaf)
        } else {
            let mut padded = [0; LEAF_BYTES as usize];
            padded[..leaf.len()].copy_from_slice(leaf);
            blake3::hash(&padded)
        };
        PlainLeafHash(truncate(hash))
    }
}

impl LeafKey {
    /// A key from its 32 bytes.
    pub fn new(bytes: [u8; 32]) -> LeafKey {
        LeafKey(bytes)
    }

    /// The key's bytes, for sealing them.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What an index stores for a leaf whose plain hash is `plain`.
    pub fn leaf(&self, plain: PlainLeafHash) -> LeafHash {
        LeafHash(truncate(blake3::keyed_hash(&self.0, &plain.0)))
    }

    /// The stored hash of a leaf of zeroes.
    pub fn zero_leaf(&self) -> LeafHash {
        self.leaf(PlainLeafHash::of(&[0; LEAF_BYTES as usize]))
    }

    /// The name of a granule: a keyed hash of its leaf hashes, in order.
    pub fn granule(&self, leaves: &[LeafHash]) -> LeafHash {
        assert!(leaves.len() as u64 <= LEAVES_PER_GRANULE, "a granule has sixteen leaves");
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(b"granule");
        for leaf in leaves {
            hasher.update(&leaf.0);
        }
        LeafHash(truncate(hasher.finalize()))
    }
}

fn truncate(hash: blake3::Hash) -> [u8; 16] {
    *hash.as_bytes().first_chunk().expect("a hash has 32 bytes")
}
