//! A bounded, sharded cache for what reading a vault costs most: fetched, decrypted and decoded frames.
//!
//! Eviction is CLOCK: a hit sets one bit, and the hand gives each entry a second chance. Bounded by *weight* (bytes),
//! not by count. Hashing and placement are fixed functions of the key, so a simulation behaves the same each time.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::{Mutex, MutexGuard};

const SHARDS: usize = 16;

/// A map from `K` to cheaply cloned values (`Arc`, `Bytes`) of bounded total weight.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    shard_weight_max: usize,
}

#[derive(Debug)]
struct Shard<K, V> {
    index: HashMap<K, usize, BuildHasherDefault<MixHasher>>,
    slots: Vec<Slot<K, V>>,
    hand: usize,
    weight: usize,
}

#[derive(Debug)]
struct Slot<K, V> {
    key: K,
    value: V,
    weight: usize,
    recent: bool,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    /// A cache that holds at most `weight_max` bytes, give or take one entry per shard.
    pub(crate) fn new(weight_max: usize) -> Cache<K, V> {
        let shard = || Mutex::new(Shard { index: HashMap::default(), slots: Vec::new(), hand: 0, weight: 0 });
        Cache { shards: (0..SHARDS).map(|_| shard()).collect(), shard_weight_max: weight_max / SHARDS }
    }

    /// The value of `key`, if it is here.
    pub(crate) fn get(&self, key: &K) -> Option<V> {
        let mut shard = self.shard(key);
        let slot = *shard.index.get(key)?;
        let slot = &mut shard.slots[slot];
        slot.recent = true;
        Some(slot.value.clone())
    }

    /// Keeps `value`, and forgets others until the bound holds again.
    pub(crate) fn insert(&self, key: K, value: V, weight: usize) {
        // The bookkeeping counts too: a million tiny values are not free.
        let weight = weight + size_of::<Slot<K, V>>() + 2 * size_of::<K>() + 16;
        let mut shard = self.shard(&key);
        if let Some(&slot) = shard.index.get(&key) {
            let old = std::mem::replace(&mut shard.slots[slot], Slot { key, value, weight, recent: true });
            shard.weight = shard.weight - old.weight + weight;
        } else {
            let slot = shard.slots.len();
            shard.index.insert(key.clone(), slot);
            // Not recent until it is asked for again: what is read once, in passing, leaves first.
            shard.slots.push(Slot { key, value, weight, recent: false });
            shard.weight += weight;
        }
        shard.evict_to(self.shard_weight_max);
    }

    /// Bytes held, bookkeeping included.
    #[cfg(test)]
    pub(crate) fn weight(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).weight).sum()
    }

    fn shard(&self, key: &K) -> MutexGuard<'_, Shard<K, V>> {
        let mut hasher = MixHasher::default();
        key.hash(&mut hasher);
        // The map inside uses the low and the top seven bits; the shard is chosen by others.
        lock(&self.shards[(hasher.finish() >> 40) as usize % SHARDS])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no code panics while it holds a shard")
}

impl<K: Hash + Eq, V> Shard<K, V> {
    fn evict_to(&mut self, weight_max: usize) {
        while self.weight > weight_max && self.slots.len() > 1 {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            let slot = &mut self.slots[self.hand];
            if slot.recent {
                slot.recent = false;
                self.hand += 1;
                continue;
            }
            let removed = self.slots.swap_remove(self.hand);
            self.index.remove(&removed.key);
            self.weight -= removed.weight;
            if let Some(moved) = self.slots.get(self.hand) {
                let position = self.index.get_mut(&moved.key).expect("every slot is indexed");
                *position = self.hand;
            }
        }
    }
}

/// Multiply-and-rotate over the words of a key. Keys are small numbers that our own code assigns, so a hash that
/// resists attackers would only cost time.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct MixHasher(u64);

impl Hasher for MixHasher {
    fn finish(&self) -> u64 {
        // Multiplication carries upwards only; fold the high half back down.
        self.0 ^ (self.0 >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(26) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u16(&mut self, word: u16) {
        self.write_u64(word.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_what_is_used_stays() {
        let cache: Cache<u64, u64> = Cache::new(1 << 20);
        cache.insert(0, 7, 64);
        for key in 1..100_000 {
            cache.insert(key, key, 64);
            assert_eq!(cache.get(&0), Some(7), "hit after every insertion, so it is never the victim");
        }
        assert!(cache.weight() <= 1 << 20);
        assert!((1..100_000).filter(|key| cache.get(key).is_some()).count() > 4000);
    }

    #[test]
    fn replacing_a_value_accounts_for_both_weights() {
        let cache: Cache<u64, u64> = Cache::new(1 << 20);
        cache.insert(1, 1, 1000);
        let before = cache.weight();
        cache.insert(1, 2, 3000);
        assert_eq!(cache.get(&1), Some(2));
        assert_eq!(cache.weight(), before + 2000);
    }
}
