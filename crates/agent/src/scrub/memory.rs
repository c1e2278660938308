//! What is remembered of scrubs: the record `scrub` (`docs/formats/agent-state.md`).

use std::collections::BTreeMap;

use replication::sender::{SUSPICIONS_MAX, Suspicion};
use replication::{ByteRange, ChainId, DiskGeometry, DiskId, Ranges, SequenceNumber};
use serde::{Deserialize, Serialize};
use world::WallTime;

use super::compared::{Compared, Known};

/// A round under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Round {
    /// When it began.
    pub began: WallTime,
    /// It goes through all disks.
    pub whole: bool,
    /// The disks that it still goes through, the current one first.
    pub disks: Vec<DiskId>,
    /// How far it has come in that, in bytes.
    pub at: u64,
    /// Stretches of that which differed.
    pub divergent: u32,
}

impl Round {
    /// The current disk is done.
    pub(super) fn next_disk(&mut self) {
        if !self.disks.is_empty() {
            self.disks.remove(0);
        }
        (self.at, self.divergent) = (0, 0);
    }

    /// Bytes that it has not come to.
    pub(super) fn left_bytes(&self, disks: &[DiskGeometry]) -> u64 {
        let named = disks.iter().filter(|disk| self.disks.contains(&disk.disk));
        named.map(|disk| disk.size_bytes).sum::<u64>().saturating_sub(self.at)
    }
}

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// The chain that positions are of.
    pub chain: Option<ChainId>,
    /// Disk by disk, what was found equal.
    pub disks: BTreeMap<DiskId, Compared>,
    /// The round under way.
    pub round: Option<Round>,
    /// When the latest round of all disks ended, or this memory began.
    pub ended: WallTime,
    /// How many have ended.
    pub rounds: u64,
    /// What was found and is not known to be noted in the vault.
    pub suspicions: Vec<Suspicion>,
}

impl Memory {
    /// Nothing is known yet: the first round comes as long after `wall` as rounds are apart.
    pub fn new(wall: WallTime) -> Memory {
        Memory { chain: None, disks: BTreeMap::new(), round: None, ended: wall, rounds: 0, suspicions: Vec::new() }
    }

    /// What was compared with another chain says nothing of this one.
    pub(super) fn follow(&mut self, chain: ChainId) {
        if self.chain != Some(chain) {
            self.chain = Some(chain);
            self.disks.clear();
        }
    }

    pub(super) fn compared(&mut self, disk: DiskId) -> &mut Compared {
        self.disks.entry(disk).or_default()
    }

    pub(super) fn oldest(&self, disk: DiskId, range: ByteRange) -> Option<Known> {
        self.disks.get(&disk)?.oldest(range)
    }

    /// A number that no suspicion has had, even if this record was lost in between.
    pub(super) fn next_id(&self, wall: WallTime) -> u64 {
        self.suspicions.iter().map(|known| known.id + 1).max().unwrap_or(0).max(wall.0)
    }
}

/// The record's JSON.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StoredMemory {
    chain: Option<String>,
    disks: Vec<StoredDisk>,
    round: Option<StoredRound>,
    ended_ns: u64,
    rounds: u64,
    suspicions: Vec<StoredSuspicion>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredDisk {
    disk: u16,
    /// First byte, number of bytes, position, nanoseconds since 1970.
    equal: Vec<(u64, u64, String, u64)>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredRound {
    began_ns: u64,
    whole: bool,
    disks: Vec<u16>,
    at: u64,
    divergent: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredSuspicion {
    id: u64,
    chain: String,
    after: String,
    until: String,
    /// Disk, first byte, number of bytes.
    ranges: Vec<(u16, u64, u64)>,
    cause: String,
}

fn range(start: u64, len: u64) -> Option<ByteRange> {
    ByteRange::between(start, start.checked_add(len)?)
}

impl StoredMemory {
    pub(crate) fn of(memory: &Memory) -> StoredMemory {
        let equal = |(part, known): &(ByteRange, Known)| (part.start, part.len, known.behind.to_string(), known.wall.0);
        StoredMemory {
            chain: memory.chain.map(|chain| chain.to_string()),
            disks: memory
                .disks
                .iter()
                .map(|(disk, compared)| StoredDisk {
                    disk: disk.0,
                    equal: compared.segments().iter().map(equal).collect(),
                })
                .collect(),
            round: memory.round.as_ref().map(|round| StoredRound {
                began_ns: round.began.0,
                whole: round.whole,
                disks: round.disks.iter().map(|disk| disk.0).collect(),
                at: round.at,
                divergent: round.divergent,
            }),
            ended_ns: memory.ended.0,
            rounds: memory.rounds,
            suspicions: memory
                .suspicions
                .iter()
                .map(|known| StoredSuspicion {
                    id: known.id,
                    chain: known.chain.to_string(),
                    after: known.after.to_string(),
                    until: known.until.to_string(),
                    ranges: known.ranges.iter().map(|(disk, range)| (disk.0, range.start, range.len)).collect(),
                    cause: known.cause.clone(),
                })
                .collect(),
        }
    }

    /// What it says, if it makes sense.
    pub(crate) fn parse(&self) -> Option<Memory> {
        let mut disks = BTreeMap::new();
        for stored in &self.disks {
            let part = |(start, len, behind, wall): &(u64, u64, String, u64)| {
                let known = Known { behind: behind.parse().ok()?, wall: WallTime(*wall) };
                Some((range(*start, *len)?, known))
            };
            let parts = stored.equal.iter().map(part).collect::<Option<Vec<_>>>()?;
            disks.insert(DiskId(stored.disk), Compared::of(parts)?);
        }
        let suspicion = |stored: &StoredSuspicion| {
            let named = stored.ranges.iter().map(|(disk, start, len)| Some((DiskId(*disk), range(*start, *len)?)));
            let ranges = Ranges::of(named.collect::<Option<Vec<_>>>()?);
            let (after, until): (SequenceNumber, SequenceNumber) =
                (stored.after.parse().ok()?, stored.until.parse().ok()?);
            let sensible = after < until
                && !ranges.is_empty()
                && stored.id < u64::MAX
                && stored.cause.len() <= replication::limits::REASON_BYTES_MAX;
            let (id, chain) = (stored.id, stored.chain.parse().ok()?);
            sensible.then(|| Suspicion { id, chain, after, until, ranges, cause: stored.cause.clone() })
        };
        let suspicions = self.suspicions.iter().map(suspicion).collect::<Option<Vec<_>>>()?;
        let round = self.round.as_ref().map(|round| Round {
            began: WallTime(round.began_ns),
            whole: round.whole,
            disks: round.disks.iter().map(|disk| DiskId(*disk)).collect(),
            at: round.at,
            divergent: round.divergent,
        });
        let aligned = round.as_ref().is_none_or(|round| round.at.is_multiple_of(replication::geometry::LEAF_BYTES));
        let chain = self.chain.as_ref().map(|chain| chain.parse().ok());
        if !aligned || suspicions.len() > SUSPICIONS_MAX || chain == Some(None) {
            return None;
        }
        let (ended, rounds) = (WallTime(self.ended_ns), self.rounds);
        Some(Memory { chain: chain.flatten(), disks, round, ended, rounds, suspicions })
    }
}
