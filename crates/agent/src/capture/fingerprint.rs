//! A few reads that tell whether someone wrote to a disk while nobody was watching.

use world::{BlockDevice, BlockError};

/// Bytes read at each end of the disk, where partition tables, superblocks and their backups are.
const EDGE_BYTES: u64 = 256 << 10;
/// Places read in between.
const SAMPLES: u64 = 64;
/// Bytes read at each of them.
const SAMPLE_BYTES: u64 = 4096;

/// A hash over both ends and evenly spread samples of the first `size` bytes of `device`, which may have grown since.
///
/// It can prove that a disk changed, never that it did not: it supports the clean mark of the dirty maps, which
/// carries the proof, and catches a disk that was used elsewhere in between (a mount alone rewrites a superblock).
pub fn fingerprint(device: &dyn BlockDevice, size: u64) -> Result<[u8; 16], BlockError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut buffer = vec![0; EDGE_BYTES as usize];
    let mut add = |start: u64, len: u64| -> Result<(), BlockError> {
        let buffer = &mut buffer[..len as usize];
        device.read_at(start, buffer)?;
        hasher.update(buffer);
        Ok(())
    };
    let edge = EDGE_BYTES.min(size);
    add(0, edge)?;
    add(size - edge, edge)?;
    if size > 2 * EDGE_BYTES {
        let stride = (size / (SAMPLES + 1)).max(SAMPLE_BYTES) / SAMPLE_BYTES * SAMPLE_BYTES;
        for start in (1..=SAMPLES).map(|sample| sample * stride).take_while(|start| start + SAMPLE_BYTES <= size) {
            add(start, SAMPLE_BYTES)?;
        }
    }
    Ok(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}
