//! Memory for the data of captured writes: slabs that are filled one after the other, and used again as soon as nobody
//! needs what they held.
//!
//! Many threads capture and one lets go. Taken from the general allocator, such data leaves holes in the arena of every
//! thread that ever wrote, and together they outgrow the ring. Slabs are let go in about the order in which they were
//! filled, so there are never more than the data of the ring needs, and a few: one for each thread that was interrupted
//! between its copy and its turn in the ring.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use replication::limits::CHANGE_DATA_BYTES_MAX;

/// Bytes of a slab: one of the largest pieces.
pub(crate) const SLAB_BYTES: usize = CHANGE_DATA_BYTES_MAX;
/// Pieces up to this size have slabs of their own, in which they waste nothing: the larger ones leave gaps at the end.
const SMALL_BYTES_MAX: usize = 64 << 10;

/// See the module's documentation.
pub(crate) struct Slabs {
    state: Mutex<State>,
    /// Slabs to keep for later, those in use included. Free ones beyond that are given back.
    kept_max: usize,
}

#[derive(Default)]
struct State {
    /// The free ends of the slabs that are being filled, with small pieces and with large ones.
    open: [Option<BytesMut>; 2],
    /// What is left of those before, oldest first: handles that tell when nobody else has one.
    filled: VecDeque<BytesMut>,
}

impl Slabs {
    /// None yet. Enough for `bytes` bytes are kept for use at another time.
    pub(crate) fn keeping(bytes: u64) -> Slabs {
        let kept_max = usize::try_from(bytes / SLAB_BYTES as u64).unwrap_or(usize::MAX).saturating_add(4);
        Slabs { state: Mutex::default(), kept_max }
    }

    /// A copy of `data`, which is no longer than a change may be.
    pub(crate) fn copy(&self, data: &[u8]) -> Bytes {
        assert!(data.len() <= CHANGE_DATA_BYTES_MAX, "longer writes are divided before");
        self.state.lock().unwrap_or_else(PoisonError::into_inner).copy(data, self.kept_max)
    }

    /// Slabs that exist.
    #[cfg(test)]
    fn count(&self) -> usize {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.filled.len() + state.open.iter().flatten().count()
    }
}

impl State {
    fn copy(&mut self, data: &[u8], kept_max: usize) -> Bytes {
        let class = usize::from(data.len() > SMALL_BYTES_MAX);
        if self.open[class].as_ref().is_none_or(|open| open.capacity() < data.len()) {
            let next = self.another(kept_max);
            self.filled.extend(self.open[class].replace(next));
        }
        let open = self.open[class].as_mut().expect("a slab with room was just opened");
        open.extend_from_slice(data);
        open.split().freeze()
    }

    /// An empty slab: the oldest one that nobody needs any more.
    fn another(&mut self, kept_max: usize) -> BytesMut {
        let mut free = None;
        // With those that are open and this one.
        let mut surplus = (self.filled.len() + 2).saturating_sub(kept_max);
        self.filled.retain_mut(|slab| {
            let wanted = free.is_none() || surplus > 0;
            if !wanted || !slab.try_reclaim(SLAB_BYTES) {
                return true;
            }
            match free {
                None => free = Some(std::mem::take(slab)),
                Some(_) => surplus -= 1,
            }
            false
        });
        free.unwrap_or_else(|| BytesMut::with_capacity(SLAB_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Held and let go in order, as a ring does.
        #[test]
        fn what_is_held_does_not_change_and_slabs_are_used_again(
            sizes in prop::collection::vec(prop_oneof![1usize..9000, 1usize..=CHANGE_DATA_BYTES_MAX], 1..120),
            held_max in 1usize..30,
        ) {
            let slabs = Slabs::keeping(64 << 20);
            let mut held: VecDeque<(usize, u8, Bytes)> = VecDeque::new();
            let mut most = 0;
            for (round, size) in sizes.into_iter().enumerate() {
                let byte = round as u8;
                held.push_back((size, byte, slabs.copy(&vec![byte; size])));
                most = most.max(held.iter().map(|(size, ..)| size).sum::<usize>());
                if held.len() > held_max {
                    let (size, byte, bytes) = held.pop_front().expect("more than none");
                    prop_assert!(bytes.len() == size && bytes.iter().all(|it| *it == byte), "it changed");
                }
                // A slab of large pieces may hold but one that is little more than half of it.
                let needed = 2 * most.div_ceil(SLAB_BYTES) + 4;
                prop_assert!(slabs.count() <= needed, "{} slabs for {most} bytes", slabs.count());
            }
        }
    }

    #[test]
    fn one_that_is_held_for_long_keeps_no_other() {
        let slabs = Slabs::keeping(64 << 20);
        let held = slabs.copy(&[1; 100]);
        for _ in 0..100 {
            drop(slabs.copy(&[2; SMALL_BYTES_MAX]));
            drop(slabs.copy(&vec![3; CHANGE_DATA_BYTES_MAX]));
        }
        assert!(held.iter().all(|byte| *byte == 1));
        assert!(slabs.count() <= 5, "{} slabs", slabs.count());
    }

    #[test]
    fn what_is_kept_beyond_use_is_bounded() {
        let slabs = Slabs::keeping(SLAB_BYTES as u64);
        let data = vec![7; CHANGE_DATA_BYTES_MAX];
        let held: Vec<Bytes> = (0..40).map(|_| slabs.copy(&data)).collect();
        assert_eq!(slabs.count(), 40, "all are needed");
        drop(held);
        (0..5).for_each(|_| drop(slabs.copy(&data)));
        assert!(slabs.count() <= 6, "{} are kept", slabs.count());
    }
}
