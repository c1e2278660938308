//! Numbered logs: names that only holders of the name key can make, newest first.
//!
//! Number *n* is named `inverted(n)-tag`. The inversion makes a plain listing start with the newest; the tag, a keyed
//! hash of folder and number, keeps everybody without the name key from burning numbers. A log says itself in which epoch
//! of the name key each number is named, so each number has one name, and creating it is winning it.

use std::collections::BTreeMap;

use crate::error::VaultError;
use crate::keys::{NameEpoch, NameKey, OpenKeys};
use crate::layout;
use crate::store::ObjectName;
use replication::ChainId;

/// Names of one chain's manifests, or of the catalog, in every epoch whose key was at hand when this was made.
#[derive(Clone)]
pub struct NumberedNames {
    folder: String,
    keys: BTreeMap<NameEpoch, [u8; 32]>,
}

impl NumberedNames {
    /// Names of the manifests of `chain`.
    pub fn of_chain(keys: &OpenKeys, chain: ChainId) -> NumberedNames {
        NumberedNames::new(&keys.name_keys(), layout::manifests(chain))
    }

    /// Names of catalog entries.
    pub fn of_catalog(keys: &OpenKeys) -> NumberedNames {
        NumberedNames::new(&keys.name_keys(), layout::CATALOG.to_owned())
    }

    fn new(keys: &BTreeMap<NameEpoch, NameKey>, folder: String) -> NumberedNames {
        let of_folder = |key: &NameKey| *blake3::keyed_hash(key.expose(), folder.as_bytes()).as_bytes();
        let keys = keys.iter().map(|(epoch, key)| (*epoch, of_folder(key))).collect();
        NumberedNames { folder, keys }
    }

    /// The folder to list.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// Whether names of `epoch` can be made and recognised.
    pub fn has(&self, epoch: NameEpoch) -> bool {
        self.keys.contains_key(&epoch)
    }

    /// The newest epoch whose names can be recognised.
    pub(crate) fn newest(&self) -> NameEpoch {
        self.keys.keys().next_back().copied().unwrap_or_default()
    }

    /// The one name of `number` in `epoch`.
    ///
    /// # Errors
    /// [`VaultError::NameKeyMissing`] if the epoch's key is not at hand.
    pub fn name(&self, number: u64, epoch: NameEpoch) -> Result<ObjectName, VaultError> {
        let key = self.keys.get(&epoch).ok_or(VaultError::NameKeyMissing { epoch })?;
        Ok(self.tagged(number, key))
    }

    fn tagged(&self, number: u64, key: &[u8; 32]) -> ObjectName {
        let tag = blake3::keyed_hash(key, &number.to_le_bytes());
        let tag = u128::from_be_bytes(*tag.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        ObjectName::new(format!("{}{:016x}-{tag:032x}", self.folder, u64::MAX - number))
            .expect("hexadecimal digits make a name")
    }

    /// The number that `name` stands for, and the epoch of its tag; `None` if the tag is under none of these keys.
    pub fn number(&self, name: &ObjectName) -> Option<(u64, NameEpoch)> {
        let inverted = name.as_str().strip_prefix(&self.folder)?.get(..16)?;
        let number = u64::MAX - u64::from_str_radix(inverted, 16).ok()?;
        let (epoch, _) = self.keys.iter().rev().find(|(_, key)| self.tagged(number, key) == *name)?;
        Some((number, *epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_sorts_first_and_only_the_key_makes_names() {
        let of = |keys: &[u8], folder: String| {
            let keys = (0..).map(NameEpoch).zip(keys.iter().map(|key| NameKey::new([*key; 32]))).collect();
            NumberedNames::new(&keys, folder)
        };
        let folder = |chain: u8| layout::manifests(ChainId([chain; 16]));
        let names = of(&[1, 2], folder(2));
        for epoch in [NameEpoch::FIRST, NameEpoch(1)] {
            let name = |number| names.name(number, epoch).expect("the key is at hand");
            for number in [0, 1, 2, 255, 256, 1 << 40, u64::MAX - 1] {
                assert_eq!(names.number(&name(number)), Some((number, epoch)));
                assert!(name(number + 1) < name(number));
            }
        }
        assert!(matches!(names.name(7, NameEpoch(2)), Err(VaultError::NameKeyMissing { epoch: NameEpoch(2) })));
        assert_eq!((names.newest(), names.has(NameEpoch(1)), names.has(NameEpoch(2))), (NameEpoch(1), true, false));
        for other in [of(&[3], folder(2)), of(&[1], folder(4)), of(&[1], layout::CATALOG.to_owned())] {
            let other = other.name(7, NameEpoch::FIRST).expect("the key is at hand");
            assert_eq!(names.number(&other), None);
            let tag = other.as_str().rsplit_once('-').expect("a tag").1.to_owned();
            let forged = format!("{}{:016x}-{tag}", names.folder(), u64::MAX - 7);
            assert_eq!(names.number(&ObjectName::new(forged).expect("a name")), None);
        }
    }
}
