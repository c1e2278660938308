//! Memory for heal reads: a buffer that went out on the link comes back for the next read.
//!
//! A fresh buffer for each chunk would be zeroed, given back to the system and faulted in again, which costs more than
//! reading the chunk from the page cache.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Buffers kept for the next read. With the default chunk size this is as much as one heal has under way.
const SPARE_BYTES_MAX: usize = 4 << 20;

type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

/// Where buffers come from, and return to when the last reference to their bytes is gone.
#[derive(Default)]
pub(crate) struct HealBuffers {
    spare: Spare,
}

struct Returning {
    buffer: Vec<u8>,
    spare: Spare,
}

impl HealBuffers {
    /// A buffer of `len` bytes, of whatever content.
    pub(crate) fn take(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        // Zeroes only what was never used before.
        buffer.resize(len, 0);
        buffer
    }

    /// The buffer as bytes that give it back when they are dropped.
    pub(crate) fn share(&self, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Returning { buffer, spare: Arc::clone(&self.spare) })
    }

    /// Gives a buffer back that holds nothing of interest.
    pub(crate) fn put(&self, buffer: Vec<u8>) {
        put(&self.spare, buffer);
    }
}

impl AsRef<[u8]> for Returning {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        put(&self.spare, std::mem::take(&mut self.buffer));
    }
}

fn put(spare: &Spare, buffer: Vec<u8>) {
    let mut spare = spare.lock().unwrap_or_else(PoisonError::into_inner);
    if (spare.len() + 1) * buffer.capacity() <= SPARE_BYTES_MAX {
        spare.push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_reader_is_done_and_memory_stays_bounded() {
        let buffers = HealBuffers::default();
        let mut first = buffers.take(8192);
        first.fill(7);
        let place = first.as_ptr();
        let bytes = buffers.share(first);
        let part = bytes.slice(4096..);
        drop(bytes);
        let other = buffers.take(8192);
        assert_ne!(other.as_ptr(), place, "it is still read");
        assert!(part.iter().all(|byte| *byte == 7));
        drop(part);
        let again = buffers.take(4096);
        assert_eq!((again.as_ptr(), again.len()), (place, 4096));
        buffers.put(again);
        for bytes in (0..100).map(|_| buffers.share(vec![0; 1 << 20])).collect::<Vec<_>>() {
            drop(bytes);
        }
        let kept: usize = buffers.spare.lock().unwrap().iter().map(Vec::capacity).sum();
        assert!(kept <= SPARE_BYTES_MAX + 8192, "{kept} bytes are kept");
    }
}
