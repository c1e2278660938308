//! The newest manifest of each chain as this host last saw it, kept outside the store. A store that was rolled back, or
//! restored from an older copy, is internally sound: only somebody who remembers can tell. `docs/formats/seen-heads.md`.

use std::fmt;
use std::io;
use std::sync::Arc;

use replication::ChainId;
use replication::codec::{DecodeError, Decoder, Encoder};
use world::{Entropy, Files, durable};

use crate::chain::ChainHistory;
use crate::error::VaultError;
use crate::keys::{ObjectNonce, OpenKeys, VaultId};
use crate::store::Store;

/// Remembers heads in one directory.
pub struct SeenHeads {
    files: Arc<dyn Files>,
    folder: String,
    entropy: Arc<dyn Entropy>,
}

/// A chain lacks what this host has seen of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RolledBack {
    /// Which chain.
    pub chain: ChainId,
    /// The number that was seen.
    pub seen: u64,
    /// The number of its newest manifest now.
    pub found: u64,
}

impl fmt::Display for RolledBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RolledBack { chain, seen, found } = self;
        write!(
            f,
            "chain {chain} lacks manifest {seen}, which this host has seen (its newest is {found}): the store was "
        )?;
        f.write_str("rolled back, or restored from an older copy")
    }
}

const MAGIC: &[u8; 8] = b"FARSHEAD";
const VERSION: u16 = 1;
const CHECKSUM_LEN: usize = 16;

impl SeenHeads {
    /// Heads remembered below `folder` of `files`.
    pub fn new(files: Arc<dyn Files>, folder: impl Into<String>, entropy: Arc<dyn Entropy>) -> SeenHeads {
        SeenHeads { files, folder: folder.into(), entropy }
    }

    fn path(&self, vault: VaultId, chain: ChainId) -> String {
        format!("{}/{vault}/{chain}", self.folder)
    }

    /// The head seen last; `None` if none was, or what was kept of it is damaged.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn seen(&self, vault: VaultId, chain: ChainId) -> io::Result<Option<(u64, ObjectNonce)>> {
        match self.files.read(&self.path(vault, chain)) {
            Ok(bytes) => Ok(decode(&bytes, vault, chain).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether `history` holds what was seen of its chain, and remembers its head if it does. A chain that was rolled
    /// back is reported each time until [`SeenHeads::forget`].
    ///
    /// # Errors
    /// Those of the store. That a head cannot be kept is no error of the vault: it is given back beside the verdict.
    pub fn observe(
        &self,
        store: &Arc<dyn Store>,
        keys: &OpenKeys,
        history: &ChainHistory,
    ) -> Result<(Option<RolledBack>, io::Result<()>), VaultError> {
        let (vault, chain) = (keys.vault(), history.chain);
        let seen = match self.seen(vault, chain) {
            Ok(seen) => seen,
            Err(error) => return Ok((None, Err(error))),
        };
        if let Some((number, nonce)) = seen {
            if !history.contains(store, keys, number, nonce)? {
                return Ok((Some(RolledBack { chain, seen: number, found: history.head.number }), Ok(())));
            }
            if number == history.head.number {
                return Ok((None, Ok(())));
            }
        }
        Ok((None, self.keep(vault, chain, history.head.number, history.head.nonce)))
    }

    fn keep(&self, vault: VaultId, chain: ChainId, number: u64, nonce: ObjectNonce) -> io::Result<()> {
        let path = self.path(vault, chain);
        self.files.create_directory(&format!("{}/{vault}", self.folder))?;
        let unique = ChainId(self.entropy.bytes()).to_string();
        durable::replace(&*self.files, &path, &encode(vault, chain, number, nonce), &unique)
    }

    /// Forgets what was seen of `chain`: the store was restored on purpose.
    ///
    /// # Errors
    /// Those of removing the file.
    pub fn forget(&self, vault: VaultId, chain: ChainId) -> io::Result<()> {
        match self.files.remove(&self.path(vault, chain)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn encode(vault: VaultId, chain: ChainId, number: u64, nonce: ObjectNonce) -> Vec<u8> {
    let mut out = Encoder::new();
    out.raw(MAGIC).u16(VERSION).raw(&vault.0).raw(&chain.0).u64(number).raw(&nonce.0);
    let mut bytes = out.finish();
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(&checksum.as_bytes()[..CHECKSUM_LEN]);
    bytes
}

fn decode(bytes: &[u8], vault: VaultId, chain: ChainId) -> Result<(u64, ObjectNonce), DecodeError> {
    let wrong = DecodeError::Inconsistent("this is no head that was seen of this chain");
    let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_LEN>().ok_or(wrong.clone())?;
    if blake3::hash(content).as_bytes()[..CHECKSUM_LEN] != *checksum {
        return Err(wrong);
    }
    let mut input = Decoder::new(content.to_vec());
    let magic: [u8; 8] = input.array("magic")?;
    let is_ours = magic == *MAGIC
        && input.u16("version")? == VERSION
        && input.array::<16>("vault id")? == vault.0
        && input.array::<16>("chain id")? == chain.0;
    if !is_ours {
        return Err(wrong);
    }
    let head = (input.u64("number")?, ObjectNonce(input.array("nonce")?));
    input.finish()?;
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_reads_back_and_damage_says_nothing() {
        let (vault, chain) = (VaultId([1; 16]), ChainId([2; 16]));
        let bytes = encode(vault, chain, 77, ObjectNonce([3; 16]));
        assert_eq!(decode(&bytes, vault, chain), Ok((77, ObjectNonce([3; 16]))));
        assert!(decode(&bytes, vault, ChainId([4; 16])).is_err());
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert!(decode(&changed, vault, chain).is_err(), "byte {index}");
            assert!(decode(&bytes[..index], vault, chain).is_err(), "cut to {index}");
        }
    }
}
