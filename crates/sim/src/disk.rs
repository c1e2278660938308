//! A disk with a volatile write cache: what was not flushed may be gone, in any combination, after a power cut.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use world::{BlockDevice, BlockError};

use crate::rng::Rng;

/// Unit in which a power cut loses or keeps writes, in bytes.
const SECTOR: usize = 512;

#[derive(Debug)]
struct Platters {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Sectors that differ in durability.
    cached: BTreeSet<usize>,
    unreadable: BTreeSet<usize>,
    fail_writes: u32,
    garble_writes: u32,
}

/// A simulated disk. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct SimDisk {
    platters: Arc<Mutex<Platters>>,
}

impl SimDisk {
    /// A disk of `size` zeroes, a multiple of 512.
    pub fn new(size: u64) -> SimDisk {
        let zeroes = vec![0; size as usize];
        let platters = Platters {
            current: zeroes.clone(),
            durable: zeroes,
            cached: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            fail_writes: 0,
            garble_writes: 0,
        };
        SimDisk { platters: Arc::new(Mutex::new(platters)) }
    }

    /// Makes the disk `size` bytes long, a multiple of 512, as a volume is grown or made anew smaller. What comes to be
    /// there is whatever `rng` says: nobody has zeroed it.
    pub fn resize(&self, size: u64, rng: &mut Rng) {
        let mut platters = self.lock();
        let before = platters.current.len();
        let Platters { current, durable, cached, unreadable, .. } = &mut *platters;
        current.resize(size as usize, 0);
        if current.len() > before {
            rng.fill(&mut current[before..]);
        }
        durable.resize(size as usize, 0);
        let kept = before.min(size as usize);
        durable[kept..].copy_from_slice(&current[kept..]);
        cached.retain(|sector| sector * SECTOR < kept);
        unreadable.retain(|sector| sector * SECTOR < kept);
    }

    /// What a reader sees now.
    pub fn contents(&self) -> Vec<u8> {
        self.lock().current.clone()
    }

    /// Cuts the power: each sector that was not flushed is kept or lost, as `rng` decides. Returns how many were lost.
    pub fn power_cut(&self, rng: &mut Rng) -> usize {
        let mut platters = self.lock();
        let mut lost = 0;
        for sector in std::mem::take(&mut platters.cached) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            let Platters { current, durable, .. } = &mut *platters;
            if rng.one_in(2) {
                lost += usize::from(current[range.clone()] != durable[range.clone()]);
                current[range.clone()].copy_from_slice(&durable[range]);
            } else {
                durable[range.clone()].copy_from_slice(&current[range]);
            }
        }
        lost
    }

    /// Puts the disk back to an earlier image, as reverting a VM to a snapshot does.
    pub fn revert(&self, image: &[u8]) {
        let mut platters = self.lock();
        platters.current.copy_from_slice(image);
        platters.durable.copy_from_slice(image);
        platters.cached.clear();
    }

    /// The next `count` writes fail, each after writing half of its data.
    pub fn fail_writes(&self, count: u32) {
        self.lock().fail_writes = count;
    }

    /// The next `count` writes put other bytes into their last sector than they were given, as if somebody had changed the
    /// buffer on the way.
    pub fn garble_writes(&self, count: u32) {
        self.lock().garble_writes = count;
    }

    /// Makes the sector at `offset` unreadable until it is written.
    pub fn break_sector(&self, offset: u64) {
        self.lock().unreadable.insert(offset as usize / SECTOR);
    }

    fn lock(&self) -> MutexGuard<'_, Platters> {
        self.platters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.check_range(&(offset..offset + data.len() as u64))?;
        let mut platters = self.lock();
        let fails = platters.fail_writes > 0;
        let len = if fails { data.len() / 2 / SECTOR * SECTOR } else { data.len() };
        let start = offset as usize;
        platters.current[start..start + len].copy_from_slice(&data[..len]);
        if platters.garble_writes > 0 && len > 0 {
            platters.garble_writes -= 1;
            platters.current[start + len - SECTOR..start + len].iter_mut().for_each(|byte| *byte ^= 0x5a);
        }
        for sector in start / SECTOR..(start + len).div_ceil(SECTOR) {
            platters.cached.insert(sector);
            platters.unreadable.remove(&sector);
        }
        if fails {
            platters.fail_writes -= 1;
            return Err(BlockError::Failed(io::Error::other("injected write error")));
        }
        Ok(())
    }
}

impl BlockDevice for SimDisk {
    fn size(&self) -> u64 {
        self.lock().current.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        let end = offset + buffer.len() as u64;
        self.check_range(&(offset..end))?;
        let platters = self.lock();
        if let Some(sector) =
            platters.unreadable.range(offset as usize / SECTOR..(end as usize).div_ceil(SECTOR)).next()
        {
            let start = (sector * SECTOR) as u64;
            let source = io::Error::other("injected medium error");
            return Err(BlockError::Unreadable { start, end: start + SECTOR as u64, source });
        }
        buffer.copy_from_slice(&platters.current[offset as usize..end as usize]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.put(offset, data)
    }

    fn write_zeroes(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.put(range.start, &vec![0; (range.end - range.start) as usize])
    }

    fn discard(&self, range: Range<u64>) -> Result<(), BlockError> {
        self.write_zeroes(range)
    }

    fn flush(&self) -> Result<(), BlockError> {
        let mut platters = self.lock();
        let Platters { current, durable, cached, .. } = &mut *platters;
        for sector in std::mem::take(cached) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            durable[range.clone()].copy_from_slice(&current[range]);
        }
        Ok(())
    }
}
