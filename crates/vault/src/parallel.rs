//! Ordered parallel work without a thread pool.
//!
//! Compression, ciphers and hashes are the only long computations of the vault. They run in short-lived scoped threads,
//! so that nothing outlives the call, and with one worker they run inline: a seeded simulation stays deterministic.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Applies `work` to every item on up to `workers` threads (the caller's is one of them). Results come back in the
/// order of the items. With one worker, or one item, everything runs in order on the caller's thread.
pub fn map<T: Sync, R: Send>(workers: NonZeroUsize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = workers.get().min(items.len());
    if threads <= 1 {
        return items.iter().map(work).collect();
    }
    // Items differ in cost (incompressible data is fast), so threads take small pieces as they become free.
    let next = AtomicUsize::new(0);
    let piece = (items.len() / (threads * 8)).max(1);
    let run = || {
        let mut done = Vec::with_capacity(items.len() / threads + piece);
        loop {
            let start = next.fetch_add(piece, Ordering::Relaxed);
            if start >= items.len() {
                return done;
            }
            let end = (start + piece).min(items.len());
            done.push((start, items[start..end].iter().map(&work).collect::<Vec<R>>()));
        }
    };
    let mut pieces = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut pieces = run();
        for helper in helpers {
            match helper.join() {
                Ok(more) => pieces.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        pieces
    });
    pieces.sort_unstable_by_key(|(start, _)| *start);
    pieces.into_iter().flat_map(|(_, results)| results).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_the_order_of_the_items() {
        let items: Vec<u64> = (0..10_007).collect();
        let squares: Vec<u64> = items.iter().map(|x| x * x).collect();
        for workers in [1, 2, 3, 16] {
            let workers = NonZeroUsize::new(workers).expect("not zero");
            assert_eq!(map(workers, &items, |x| x * x), squares);
        }
        assert_eq!(map(NonZeroUsize::MIN, &[] as &[u64], |x| x * x), Vec::<u64>::new());
    }

    #[test]
    #[should_panic(expected = "item 77")]
    fn a_panic_in_a_helper_reaches_the_caller() {
        let items: Vec<u64> = (0..100).collect();
        map(NonZeroUsize::new(4).expect("not zero"), &items, |x| assert!(*x != 77, "item {x}"));
    }
}
