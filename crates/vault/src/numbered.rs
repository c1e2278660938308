//! Numbered logs: names that only holders of the name key can make, newest first.
//!
//! Number *n* is named `inverted(n)-tag`. The inversion makes a plain listing start with the newest; the tag, a keyed
//! hash of folder and number, keeps everybody without the name key from burning numbers. Each number has one name, so
//! creating it is winning it.

use crate::keys::NameKey;
use crate::layout;
use crate::store::ObjectName;
use replication::ChainId;

/// Names of one chain's manifests, or of the catalog.
#[derive(Clone)]
pub struct NumberedNames {
    folder: String,
    key: [u8; 32],
}

impl NumberedNames {
    /// Names of the manifests of `chain`.
    pub fn of_chain(key: &NameKey, chain: ChainId) -> NumberedNames {
        NumberedNames::new(key, layout::manifests(chain))
    }

    /// Names of catalog entries.
    pub fn of_catalog(key: &NameKey) -> NumberedNames {
        NumberedNames::new(key, layout::CATALOG.to_owned())
    }

    fn new(key: &NameKey, folder: String) -> NumberedNames {
        let key = *blake3::keyed_hash(key.expose(), folder.as_bytes()).as_bytes();
        NumberedNames { folder, key }
    }

    /// The folder to list.
    pub fn folder(&self) -> &str {
        &self.folder
    }

    /// The one name of number `number`.
    pub fn name(&self, number: u64) -> ObjectName {
        let tag = blake3::keyed_hash(&self.key, &number.to_le_bytes());
        let tag = u128::from_be_bytes(*tag.as_bytes().first_chunk().expect("a hash has 32 bytes"));
        ObjectName::new(format!("{}{:016x}-{tag:032x}", self.folder, u64::MAX - number))
            .expect("hexadecimal digits make a name")
    }

    /// The number that `name` stands for; `None` if its tag is not ours.
    pub fn number(&self, name: &ObjectName) -> Option<u64> {
        let inverted = name.as_str().strip_prefix(&self.folder)?.get(..16)?;
        let number = u64::MAX - u64::from_str_radix(inverted, 16).ok()?;
        (self.name(number) == *name).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_sorts_first_and_only_the_key_makes_names() {
        let names = NumberedNames::of_chain(&NameKey::new([1; 32]), ChainId([2; 16]));
        for number in [0, 1, 2, 255, 256, 1 << 40, u64::MAX - 1] {
            assert_eq!(names.number(&names.name(number)), Some(number));
            assert!(names.name(number + 1) < names.name(number));
        }
        for other in [
            NumberedNames::of_chain(&NameKey::new([3; 32]), ChainId([2; 16])),
            NumberedNames::of_chain(&NameKey::new([1; 32]), ChainId([4; 16])),
            NumberedNames::of_catalog(&NameKey::new([1; 32])),
        ] {
            assert_eq!(names.number(&other.name(7)), None);
            let tag = other.name(7).as_str().rsplit_once('-').expect("a tag").1.to_owned();
            let forged = format!("{}{:016x}-{tag}", names.folder(), u64::MAX - 7);
            assert_eq!(names.number(&ObjectName::new(forged).expect("a name")), None);
        }
    }
}
