//! The ledger: what was written to the disk, in which order and when, kept by the writer and by nobody else.
//!
//! A write is one 4 KiB block whose every byte follows from the seed and the write's number, so that a reader in any
//! language can tell which write a block holds and what a disk must hold after the first *k* writes. The file is text:
//!
//! ```text
//! farshore-ledger 1 seed=<decimal>
//! slot <index> <byte offset on the disk>          for each place that is written to
//! S <number> <slot index> <ns since 1970>         before the write is submitted; durable before it
//! A <number> <ns since 1970>                      all writes up to this one were acknowledged
//! ```
//! The block, in little-endian words of 64 bits: `LEDGERv1`, seed, number, byte offset on the disk, 507 words of
//! xorshift64 begun at `mix(seed + number)`, and a checksum of the words before. A crash leaves a torn last line, which
//! readers ignore.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::failure::{Done, Failure, io_failure};

/// Size of a write in bytes.
pub(crate) const BLOCK_BYTES: usize = 4096;
const WORDS: usize = BLOCK_BYTES / 8;
const MAGIC: u64 = u64::from_le_bytes(*b"LEDGERv1");
const HEADING: &str = "farshore-ledger 1 seed=";

/// Scrambles a number; the finalizer of splitmix64.
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The block of write `number` at byte `offset` of the disk.
pub(crate) fn block(seed: u64, number: u64, offset: u64) -> Vec<u8> {
    let mut words = Vec::with_capacity(WORDS);
    words.extend([MAGIC, seed, number, offset]);
    let mut state = mix(seed.wrapping_add(number)) | 1;
    while words.len() < WORDS - 1 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words.push(state);
    }
    let checksum = words.iter().fold(0_u64, |sum, word| sum.rotate_left(5) ^ word);
    words.push(checksum);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The number of the write that `bytes` holds; `None` if it is no block of the ledger of `seed` for this place.
pub(crate) fn number_in(bytes: &[u8], seed: u64, offset: u64) -> Option<u64> {
    let word = |index: usize| bytes.get(index * 8..index * 8 + 8)?.try_into().ok().map(u64::from_le_bytes);
    let number = word(2)?;
    (word(0)? == MAGIC && bytes == block(seed, number, offset).as_slice()).then_some(number)
}

/// One write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Index of the slot written to.
    pub(crate) slot: usize,
    /// When it was submitted at the earliest, in nanoseconds since 1970.
    pub(crate) submitted_ns: u64,
}

/// A ledger as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Ledger {
    pub(crate) seed: u64,
    /// Byte offsets on the disk.
    pub(crate) slots: Vec<u64>,
    /// Write *n* at index *n* − 1.
    pub(crate) writes: Vec<Written>,
    /// `(number, ns)`: all writes up to the number were acknowledged at that time. Ascending.
    pub(crate) acknowledged: Vec<(u64, u64)>,
}

impl Ledger {
    /// The text that begins a ledger.
    fn heading(seed: u64, slots: &[u64]) -> String {
        let mut text = format!("{HEADING}{seed}\n");
        for (index, offset) in slots.iter().enumerate() {
            writeln!(text, "slot {index} {offset}").expect("writing to a string does not fail");
        }
        text
    }

    /// Reads a ledger; a torn last line is ignored.
    pub(crate) fn parse(text: &str) -> Result<Ledger, String> {
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = complete.lines().enumerate();
        let heading = lines.next().and_then(|(_, line)| line.strip_prefix(HEADING)).ok_or("it is no ledger")?;
        let seed = heading.parse().map_err(|_| "its seed is no number".to_owned())?;
        let mut ledger = Ledger { seed, ..Ledger::default() };
        for (index, line) in lines {
            ledger.take(line).ok_or_else(|| format!("line {} cannot be understood: {line:?}", index + 1))?;
        }
        Ok(ledger)
    }

    fn take(&mut self, line: &str) -> Option<()> {
        let mut words = line.split(' ');
        let kind = words.next()?;
        let mut number = || words.next()?.parse::<u64>().ok();
        match kind {
            "slot" if number()? == self.slots.len() as u64 => self.slots.push(number()?),
            "S" if number()? == self.writes.len() as u64 + 1 => {
                let slot = usize::try_from(number()?).ok().filter(|slot| *slot < self.slots.len())?;
                self.writes.push(Written { slot, submitted_ns: number()? });
            }
            "A" => {
                let upto = number().filter(|upto| *upto <= self.writes.len() as u64)?;
                self.acknowledged.push((upto, number()?));
            }
            _ => return None,
        }
        words.next().is_none().then_some(())
    }

    /// Reads the ledger at `path`.
    pub(crate) fn load(path: &Path) -> Done<Ledger> {
        let what = || format!("the ledger {} cannot be read", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| io_failure(what(), &error))?;
        Ledger::parse(&text).map_err(|why| Failure::new(what(), why, "name the ledger of a demo"))
    }

    /// For each slot the number of the last of the first `k` writes to it; 0 if there is none.
    pub(crate) fn last_in_slots(&self, k: u64) -> Vec<u64> {
        let mut last = vec![0; self.slots.len()];
        for (index, written) in self.writes.iter().take(k as usize).enumerate() {
            last[written.slot] = index as u64 + 1;
        }
        last
    }

    /// Writes certainly acknowledged before `ns`.
    pub(crate) fn acknowledged_before(&self, ns: u64) -> u64 {
        self.acknowledged.iter().rev().find(|(_, at)| *at < ns).map_or(0, |(number, _)| *number)
    }

    /// Writes that may have been submitted before `ns`.
    pub(crate) fn submitted_before(&self, ns: u64) -> u64 {
        self.writes.partition_point(|written| written.submitted_ns < ns) as u64
    }
}

/// A ledger that is being written.
pub(crate) struct LedgerWriter {
    file: File,
    pending: String,
}

impl LedgerWriter {
    /// Begins a new ledger, durable on return.
    pub(crate) fn create(path: &Path, seed: u64, slots: &[u64]) -> io::Result<LedgerWriter> {
        let file = OpenOptions::new().append(true).create_new(true).open(path)?;
        let mut writer = LedgerWriter { file, pending: Ledger::heading(seed, slots) };
        writer.sync()?;
        Ok(writer)
    }

    /// Goes on with the ledger at `path`.
    pub(crate) fn resume(path: &Path) -> io::Result<LedgerWriter> {
        Ok(LedgerWriter { file: OpenOptions::new().append(true).open(path)?, pending: String::new() })
    }

    /// Write `number` to `slot` is about to be submitted.
    pub(crate) fn submit(&mut self, number: u64, slot: usize, ns: u64) {
        writeln!(self.pending, "S {number} {slot} {ns}").expect("writing to a string does not fail");
    }

    /// All writes up to `number` were acknowledged.
    pub(crate) fn acknowledge(&mut self, number: u64, ns: u64) {
        writeln!(self.pending, "A {number} {ns}").expect("writing to a string does not fail");
    }

    /// Makes everything noted durable.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.write_all(self.pending.as_bytes())?;
        self.pending.clear();
        Ok(rustix::fs::fdatasync(&self.file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_tells_its_write_and_no_changed_byte_passes() {
        let bytes = block(7, 41, 8192);
        assert_eq!(bytes.len(), BLOCK_BYTES);
        assert_eq!(number_in(&bytes, 7, 8192), Some(41));
        assert_eq!(number_in(&bytes, 8, 8192), None, "another seed");
        assert_eq!(number_in(&bytes, 7, 4096), None, "another place");
        assert_eq!(number_in(&[0; BLOCK_BYTES], 7, 0), None);
        for at in (0..BLOCK_BYTES).step_by(97) {
            let mut changed = bytes.clone();
            changed[at] ^= 4;
            assert_eq!(number_in(&changed, 7, 8192), None, "byte {at}");
        }
    }

    #[test]
    fn the_file_reads_back_and_a_torn_line_is_ignored() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("ledger");
        let mut writer = LedgerWriter::create(&path, 9, &[4096, 0, 40_960]).expect("created");
        writer.submit(1, 2, 100);
        writer.submit(2, 0, 110);
        writer.sync().expect("synced");
        writer.acknowledge(2, 150);
        writer.submit(3, 2, 160);
        writer.sync().expect("synced");
        let ledger = Ledger::load(&path).expect("readable");
        assert_eq!((ledger.seed, ledger.slots.as_slice(), ledger.writes.len()), (9, &[4096, 0, 40_960][..], 3));
        assert_eq!(ledger.last_in_slots(2), [2, 0, 1]);
        assert_eq!(ledger.last_in_slots(3), [2, 0, 3]);
        assert_eq!((ledger.acknowledged_before(150), ledger.acknowledged_before(151)), (0, 2));
        assert_eq!((ledger.submitted_before(110), ledger.submitted_before(111)), (1, 2));

        let text = std::fs::read_to_string(&path).expect("readable");
        let torn = Ledger::parse(&text[..text.len() - 3]).expect("only its end is missing");
        assert_eq!(torn.writes.len(), 2);
        assert!(Ledger::parse("S 1 0 5\n").is_err());
        assert!(Ledger::parse(&format!("{text}S 9 0 5\n")).is_err(), "a number was left out");
    }
}
