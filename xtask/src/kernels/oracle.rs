//! Two records of the same writes: what the capture took inside the guest, and what the emulator logged of the disk's
//! requests outside of it (`blklogwrites`), with no code in common.
//!
//! Requests are divided and joined on their way down, so they are compared by sector: what each sector was given, one
//! after the other, must be the same in both. And the order must agree where it is promised: a write that was logged before
//! a flush is captured before one that was logged behind it. That holds for the first load of
//! `crates/agent/src/capture/ebpf/oracle.rs`, in which nothing is under way during a flush.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};

const SECTOR: usize = 512;
/// The first sector of a log: `struct log_write_super` of Linux' dm-log-writes.
const LOG_MAGIC: u64 = 0x006a_7366_7773_6872;
const LOG_VERSION: u64 = 1;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
const STREAM_MAGIC: &[u8; 8] = b"FSSTREAM";

/// What a sector was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given<'a> {
    Bytes(&'a [u8]),
    Zeroes,
    Discarded,
}

/// A request as one of the two records has it. `data` is empty where there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request<'a> {
    sector: u64,
    sectors: u64,
    given: Given<'a>,
}

impl<'a> Request<'a> {
    fn each(&self) -> impl Iterator<Item = (u64, Given<'a>)> {
        let given = self.given;
        (0..self.sectors).map(move |index| {
            let at = index as usize * SECTOR;
            let own = match given {
                // A device may write zeroes by itself or be sent them.
                Given::Bytes(data) if data[at..at + SECTOR].iter().all(|byte| *byte == 0) => Given::Zeroes,
                Given::Bytes(data) => Given::Bytes(&data[at..at + SECTOR]),
                other => other,
            };
            (self.sector + index, own)
        })
    }
}

/// What the emulator logged.
#[derive(Debug)]
pub(super) struct Log<'a> {
    /// Each with the number of flushes before it.
    requests: Vec<(usize, Request<'a>)>,
    flushes: usize,
}

/// What was captured.
#[derive(Debug, Clone)]
pub(super) struct Stream<'a> {
    requests: Vec<Request<'a>>,
    /// Requests of the first load.
    first: usize,
}

/// What a comparison that found no difference looked at.
#[derive(Debug)]
pub(super) struct Compared {
    requests: usize,
    sectors: usize,
    flushes: usize,
}

impl fmt::Display for Compared {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} requests, {} sectors, {} flushes between", self.requests, self.sectors, self.flushes)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn bytes(&mut self, len: u64) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).and_then(|rest| rest.get(..usize::try_from(len).ok()?));
        let found = rest.with_context(|| format!("it ends at byte {}", self.bytes.len()))?;
        self.at += found.len();
        Ok(found)
    }

    fn word(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(*self.bytes(8)?.first_chunk().context("eight bytes")?))
    }
}

impl<'a> Log<'a> {
    /// # Errors
    /// It is no log, or ends in the middle.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Log<'a>> {
        let mut reader = Reader { bytes, at: 0 };
        let (magic, version, count) = (reader.word()?, reader.word()?, reader.word()?);
        ensure!(magic == LOG_MAGIC && version == LOG_VERSION, "it is no log of writes");
        ensure!(reader.word()? & 0xffff_ffff == SECTOR as u64, "sectors of another size");
        let mut log = Log { requests: Vec::new(), flushes: 0 };
        reader.at = SECTOR;
        for _ in 0..count {
            let (sector, sectors) = (reader.word()?, reader.word()?);
            let (flags, _) = (reader.word()?, reader.word()?);
            reader.at = reader.at.next_multiple_of(SECTOR);
            if flags & FLUSH != 0 {
                log.flushes += 1;
            }
            if flags & MARK != 0 || sectors == 0 {
                continue;
            }
            let given = match flags & DISCARD {
                0 => Given::Bytes(reader.bytes(sectors * SECTOR as u64)?),
                _ => Given::Discarded,
            };
            log.requests.push((log.flushes, Request { sector, sectors, given }));
        }
        Ok(log)
    }
}

impl<'a> Stream<'a> {
    /// # Errors
    /// It is none, or ends in the middle.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Stream<'a>> {
        let mut reader = Reader { bytes, at: 0 };
        ensure!(reader.bytes(8)? == STREAM_MAGIC, "the guest wrote down no stream");
        let (first, count) = (reader.word()?, reader.word()?);
        let mut requests = Vec::new();
        for _ in 0..count {
            let (kind, start, len) = (reader.word()?, reader.word()?, reader.word()?);
            ensure!(start % SECTOR as u64 == 0 && len % SECTOR as u64 == 0 && len > 0, "no sectors");
            let given = match kind {
                1 => Given::Bytes(reader.bytes(len)?),
                2 => Given::Zeroes,
                3 => Given::Discarded,
                _ => bail!("it has a change of kind {kind}"),
            };
            requests.push(Request { sector: start / SECTOR as u64, sectors: len / SECTOR as u64, given });
        }
        Ok(Stream { requests, first: usize::try_from(first)? })
    }

    /// Streams that differ from this one by a mistake each, with what is wrong: a comparison must notice every one.
    pub(super) fn spoiled(&self) -> Vec<(&'static str, Stream<'a>)> {
        let middle = self.first / 2;
        let (mut lost, mut swapped, mut other) = (self.clone(), self.clone(), self.clone());
        lost.requests.remove(middle);
        lost.first -= 1;
        swapped.requests.swap(0, self.first - 1);
        other.requests[self.requests.len() - 1].given = Given::Bytes(&[0xa5; 1 << 16]);
        other.requests[self.requests.len() - 1].sectors = 1;
        vec![("a request is missing", lost), ("two have changed places", swapped), ("one has other bytes", other)]
    }
}

/// # Errors
/// Where the two differ.
pub(super) fn compare(log: &Log<'_>, stream: &Stream<'_>) -> Result<Compared> {
    // What each sector was given, and behind how many flushes.
    let mut histories: HashMap<u64, Vec<(usize, Given<'_>)>> = HashMap::new();
    for (flushes, request) in &log.requests {
        for (sector, given) in request.each() {
            histories.entry(sector).or_default().push((*flushes, given));
        }
    }
    let sectors = histories.values().map(Vec::len).sum();
    let mut reached: HashMap<u64, usize> = HashMap::new();
    let mut behind = 0;
    for (index, request) in stream.requests.iter().enumerate() {
        for (sector, given) in request.each() {
            let turn = reached.entry(sector).or_default();
            let logged = histories.get(&sector).and_then(|history| history.get(*turn));
            let Some((flushes, logged)) = logged else {
                bail!("request {index} of the stream gives sector {sector} something that was never logged");
            };
            ensure!(
                *logged == given,
                "request {index} of the stream gives sector {sector} something else than was logged"
            );
            *turn += 1;
            if index < stream.first {
                ensure!(
                    *flushes >= behind,
                    "request {index} of the stream was logged before a flush that it lies behind"
                );
                behind = *flushes;
            }
        }
    }
    for (sector, history) in &histories {
        let turns = reached.get(sector).copied().unwrap_or(0);
        ensure!(
            turns == history.len(),
            "sector {sector} was written {} times and captured {turns} times",
            history.len()
        );
    }
    Ok(Compared { requests: stream.requests.len(), sectors, flushes: behind })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of a log: sector, sectors, flags, the byte it is full of.
    type Entry = (u64, u64, u64, u8);
    /// A change of a stream: kind, sector, sectors, the byte it is full of.
    type Change = (u64, u64, u64, u8);

    fn logged(entries: &[Entry]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [LOG_MAGIC, LOG_VERSION, entries.len() as u64, 512].map(u64::to_le_bytes).concat();
        for (sector, sectors, flags, fill) in entries {
            bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
            bytes.extend([*sector, *sectors, *flags, 0].map(u64::to_le_bytes).concat());
            bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
            if flags & DISCARD == 0 {
                bytes.extend(vec![*fill; *sectors as usize * SECTOR]);
            }
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        bytes
    }

    fn streamed(first: u64, changes: &[Change]) -> Vec<u8> {
        let mut bytes = [&STREAM_MAGIC[..], &[first, changes.len() as u64].map(u64::to_le_bytes).concat()].concat();
        for (kind, sector, sectors, fill) in changes {
            bytes.extend([*kind, sector * 512, sectors * 512].map(u64::to_le_bytes).concat());
            if *kind == 1 {
                bytes.extend(vec![*fill; *sectors as usize * SECTOR]);
            }
        }
        bytes
    }

    fn differ(log: &[u8], stream: &[u8]) -> Option<String> {
        let (log, stream) = (Log::parse(log).unwrap(), Stream::parse(stream).unwrap());
        compare(&log, &stream).err().map(|error| error.to_string())
    }

    /// Sectors 0 to 3, joined; flush; sector 1 again and a discard; flush; zeroes.
    const LOGGED: &[Entry] =
        &[(0, 4, 0, 7), (0, 0, FLUSH, 0), (8, 2, DISCARD, 0), (1, 1, 0, 9), (0, 0, FLUSH, 0), (2, 2, 0, 0)];

    #[test]
    fn the_same_requests_divided_otherwise_are_the_same() {
        let stream = streamed(5, &[(1, 2, 2, 7), (1, 0, 2, 7), (1, 1, 1, 9), (3, 8, 2, 0), (2, 2, 2, 0)]);
        assert_eq!(differ(&logged(LOGGED), &stream), None);
    }

    #[test]
    fn every_difference_is_noticed() {
        let good = [(1, 0, 4, 7), (1, 1, 1, 9), (3, 8, 2, 0), (2, 2, 2, 0)];
        let with = |change: &dyn Fn(&mut Vec<Change>)| {
            let mut changes = good.to_vec();
            change(&mut changes);
            differ(&logged(LOGGED), &streamed(changes.len() as u64, &changes)).unwrap_or_default()
        };
        assert_eq!(with(&|_| {}), "");
        assert!(with(&|it| it.retain(|change| change.3 != 9)).contains("captured 1 times"));
        assert!(with(&|it| it[1].3 = 8).contains("something else"));
        assert!(with(&|it| it.push((1, 5, 1, 1))).contains("never logged"));
        assert!(with(&|it| it[2] = (2, 8, 2, 0)).contains("something else"));
        assert!(with(&|it| it.swap(2, 3)).contains("before a flush"));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        assert!(Log::parse(&[0; 512]).is_err() && Stream::parse(&[0; 512]).is_err());
        let (log, stream) = (logged(LOGGED), streamed(1, &[(1, 0, 4, 7)]));
        for cut in [8, 40, 600, 1500] {
            assert!(Log::parse(&log[..cut]).is_err(), "{cut}");
        }
        assert!(Stream::parse(&stream[..stream.len() - 1]).is_err());
    }
}
