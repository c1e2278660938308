//! Leaf hashes: how two copies of a disk are compared without sending either.
//!
//! The side that reads a disk hashes each 4 KiB leaf with plain BLAKE3. The side that holds a vault index stores
//! *keyed* hashes, derived from the plain ones under the vault's leaf key, so that an index reveals nothing about
//! content to someone who can guess it but lacks the key. Whoever holds the index compares; see
//! `docs/design/0002-one-sender-one-receiver.md`.

use blake3::IncrementCounter;
use blake3::platform::Platform;

use crate::geometry::{LEAF_BYTES, LEAVES_PER_GRANULE};

/// Leaves hashed at once: as many as the widest vectors have lanes.
const LANES: usize = 16;
/// Bytes of a chunk and of a parent node of BLAKE3, and of what either hashes to.
const CHUNK: usize = 1024;
const PARENT: usize = 64;
const VALUE: usize = 32;
/// BLAKE3's initial value and domain flags (the specification's tables 1 and 3).
const IV: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const IS_PARENT: u8 = 4;
const IS_ROOT: u8 = 8;

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

    /// The hashes of `leaves`, each of [`LEAF_BYTES`], in order.
    ///
    /// One leaf is four chunks, which fill a quarter of the widest vectors; here the same chunk of sixteen leaves is
    /// hashed at once, which takes less than half the time. The library does this only for one long input, so its
    /// primitive is used, which it exports for benchmarks; the test below holds it to the library's own result.
    pub fn of_each(leaves: &[&[u8]]) -> Vec<PlainLeafHash> {
        let platform = Platform::detect();
        let mut hashes = Vec::with_capacity(leaves.len());
        for leaves in leaves.chunks(LANES) {
            let count = leaves.len();
            // Whole vectors only, the rest of the lanes filled: blake3 1.8.7 hashes four inputs that are left over with AVX-512
            // by loads of 64 bytes where 16 are meant, which reach up to 48 bytes behind the first of them (seen as a
            // memory fault where a buffer ended with its page).
            let lanes = if count > LANES / 2 { LANES } else { LANES / 2 };
            // Of each leaf its four chunks' values, then its two inner nodes'.
            let mut values = [[0; 4 * VALUE]; LANES];
            let mut nodes = [[0; 2 * VALUE]; LANES];
            let mut out = [0; LANES * VALUE];
            for chunk in 0..4 {
                let inputs: [&[u8; CHUNK]; LANES] = std::array::from_fn(|lane| {
                    let leaf = leaves[lane.min(count - 1)];
                    assert_eq!(leaf.len() as u64, LEAF_BYTES, "whole leaves are hashed together");
                    leaf[chunk * CHUNK..][..CHUNK].try_into().expect("a quarter of a leaf is a chunk")
                });
                let (no, counter) = (IncrementCounter::No, chunk as u64);
                platform.hash_many(&inputs[..lanes], &IV, counter, no, 0, CHUNK_START, CHUNK_END, &mut out);
                scatter(&out, chunk, &mut values);
            }
            for half in 0..2 {
                let inputs: [&[u8; PARENT]; LANES] = std::array::from_fn(|lane| {
                    values[lane][half * PARENT..][..PARENT].try_into().expect("two values are a parent")
                });
                platform.hash_many(&inputs[..lanes], &IV, 0, IncrementCounter::No, IS_PARENT, 0, 0, &mut out);
                scatter(&out, half, &mut nodes);
            }
            let inputs: [&[u8; PARENT]; LANES] = std::array::from_fn(|lane| &nodes[lane]);
            let flags = IS_PARENT | IS_ROOT;
            platform.hash_many(&inputs[..lanes], &IV, 0, IncrementCounter::No, flags, 0, 0, &mut out);
            hashes.extend(
                out.chunks_exact(VALUE)
                    .take(count)
                    .map(|hash| PlainLeafHash(*hash.first_chunk().expect("a hash has 32 bytes"))),
            );
        }
        hashes
    }
}

/// Puts the values of all lanes where their lanes keep value number `index`.
fn scatter<const N: usize>(out: &[u8; LANES * VALUE], index: usize, lanes: &mut [[u8; N]; LANES]) {
    for (lane, value) in lanes.iter_mut().zip(out.chunks_exact(VALUE)) {
        lane[index * VALUE..][..VALUE].copy_from_slice(value);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_hashed_together_hash_as_each_alone() {
        let mut bytes = vec![0; 40 * LEAF_BYTES as usize];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes[LEAF_BYTES as usize..]);
        let leaves: Vec<&[u8]> = bytes.chunks_exact(LEAF_BYTES as usize).collect();
        let each: Vec<PlainLeafHash> = leaves.iter().map(|leaf| PlainLeafHash::of(leaf)).collect();
        for count in [0, 1, 3, 15, 16, 17, 40] {
            assert_eq!(PlainLeafHash::of_each(&leaves[..count]), each[..count], "{count} leaves");
        }
    }
}
