//! A store that reads from one place and writes to another: how a branch of a vault on a read-only store keeps its own
//! chain, in the very same form, on the host that serves it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use vault::{ObjectName, Store, StoreError};

/// Shows the objects of `lower` and, beside them, those created since, which go to `upper`.
pub struct LayeredStore {
    upper: Arc<dyn Store>,
    lower: Arc<dyn Store>,
}

impl LayeredStore {
    /// A store that never writes to `lower`.
    pub fn new(upper: Arc<dyn Store>, lower: Arc<dyn Store>) -> LayeredStore {
        LayeredStore { upper, lower }
    }
}

fn or_below<T>(found: Result<T, StoreError>, below: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    match found {
        Err(StoreError::NotFound(_)) => below(),
        other => other,
    }
}

impl Store for LayeredStore {
    fn create(&self, name: &ObjectName, parts: &[Bytes]) -> Result<(), StoreError> {
        match self.lower.size(name) {
            Ok(_) => Err(StoreError::AlreadyExists(name.clone())),
            Err(StoreError::NotFound(_)) => self.upper.create(name, parts),
            Err(error) => Err(error),
        }
    }

    fn read(&self, name: &ObjectName, range: Range<u64>) -> Result<Bytes, StoreError> {
        or_below(self.upper.read(name, range.clone()), || self.lower.read(name, range))
    }

    fn size(&self, name: &ObjectName) -> Result<u64, StoreError> {
        or_below(self.upper.size(name), || self.lower.size(name))
    }

    fn list(&self, prefix: &str, after: Option<&ObjectName>, limit: usize) -> Result<Vec<ObjectName>, StoreError> {
        let mut names = self.upper.list(prefix, after, limit)?;
        names.extend(self.lower.list(prefix, after, limit)?);
        names.sort_unstable();
        names.dedup();
        names.truncate(limit);
        Ok(names)
    }

    fn describe(&self) -> String {
        format!("{} (read-only), with changes kept in {}", self.lower.describe(), self.upper.describe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vault::ObjectStoreAdapter;

    #[test]
    fn both_stores_show_and_only_the_upper_one_grows() {
        let name = |text: &str| ObjectName::new(text).expect("valid");
        let (upper, lower): (Arc<dyn Store>, Arc<dyn Store>) =
            (Arc::new(ObjectStoreAdapter::in_memory()), Arc::new(ObjectStoreAdapter::in_memory()));
        lower.create(&name("a/2"), &[Bytes::from_static(b"two")]).expect("creates");
        let both = LayeredStore::new(Arc::clone(&upper), Arc::clone(&lower));
        both.create(&name("a/1"), &[Bytes::from_static(b"one")]).expect("creates");
        both.create(&name("a/3"), &[Bytes::from_static(b"three")]).expect("creates");
        assert!(matches!(both.create(&name("a/2"), &[]), Err(StoreError::AlreadyExists(_))));
        assert_eq!(both.list("a/", None, 2).expect("lists"), [name("a/1"), name("a/2")]);
        assert_eq!(both.list("a/", Some(&name("a/2")), 9).expect("lists"), [name("a/3")]);
        assert_eq!(both.read_all(&name("a/2")).expect("reads"), "two");
        assert_eq!(both.read_all(&name("a/3")).expect("reads"), "three");
        assert!(matches!(both.size(&name("a/4")), Err(StoreError::NotFound(_))));
        assert_eq!(lower.list("a/", None, 9).expect("lists").len(), 1);
    }
}
