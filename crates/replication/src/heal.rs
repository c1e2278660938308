//! One heal as the sender runs it: which ranges are still to be read, which offers wait for a verdict, how much data is
//! under way. Pure; the sender turns its steps into actions.
//!
//! A chunk's life: planned → reading → offered (its data kept if it was read) → wanted leaves sent. With keyed hashes its
//! granules are offered first, and then the leaves of those that are wanted. When the receiver holds nothing at all, chunks
//! skip the offer and whatever is not zero is sent.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::change::HealId;
use crate::geometry::{ByteRange, LEAF_BYTES};
use crate::leaf::LeafKey;
use crate::limits;
use crate::offers::{granule_leaves, offered_granule};
use crate::position::{DiskId, SequenceNumber};
use crate::sender::HealProgress;
use crate::wire::{HealContent, Message, OfferedLeaf, is_wanted};

/// What a heal wants done next.
#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "lives for a moment; a box would cost an allocation a message")]
pub(crate) enum HealStep {
    Read {
        disk: DiskId,
        range: ByteRange,
        hash: bool,
    },
    Fetch {
        disk: DiskId,
        range: ByteRange,
    },
    Send(Message),
    /// Everything was read, judged and sent.
    Finished,
}

#[derive(Debug)]
struct Chunk {
    disk: DiskId,
    range: ByteRange,
    leaves: Vec<OfferedLeaf>,
    data: Option<Bytes>,
    verdict: Verdict,
}

/// What the receiver's next word on a chunk is about.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Granules,
    AllLeaves,
    /// The leaves at these places.
    Leaves(Vec<usize>),
}

/// The state of one heal between its `p0` and its last message.
#[derive(Debug)]
pub(crate) struct HealRun {
    heal: HealId,
    p0: SequenceNumber,
    begun: bool,
    base_empty: bool,
    /// What names granules; without it leaves are offered at once.
    names: Option<LeafKey>,
    chunk_bytes: u64,
    /// Most bytes of data sent and not credited.
    window_bytes: u64,
    planned: VecDeque<(DiskId, ByteRange)>,
    /// Where planned ranges begin within the leaf that begins here.
    ragged: BTreeMap<(DiskId, u64), u64>,
    /// Asked of the owner and not answered yet. What an earlier heal asked for may be answered late, and is nothing to this.
    reading: Vec<(DiskId, ByteRange)>,
    fetching: Vec<(DiskId, ByteRange)>,
    /// Wanted ranges of which only the hashes were known, not yet asked for.
    fetches: VecDeque<(DiskId, ByteRange)>,
    offered: BTreeMap<u32, Chunk>,
    next_offer: u32,
    /// Messages ready to go, as soon as the receiver has room.
    ready: VecDeque<Message>,
    sent_bytes: u64,
    credited_bytes: u64,
    progress: HealProgress,
}

/// Chunks being read or waiting for a verdict. Bounds the sender's memory: chunk size × this.
const CHUNKS_IN_FLIGHT_MAX: usize = 16;

impl HealRun {
    pub(crate) fn new(
        heal: HealId,
        p0: SequenceNumber,
        set: Vec<(DiskId, Vec<ByteRange>)>,
        base_empty: bool,
        names: Option<LeafKey>,
        chunk_bytes: u64,
        window_bytes: u64,
    ) -> HealRun {
        let planned: VecDeque<_> =
            set.into_iter().flat_map(|(disk, ranges)| ranges.into_iter().map(move |range| (disk, range))).collect();
        let planned_bytes = planned.iter().map(|(_, range)| range.len).sum();
        HealRun {
            heal,
            p0,
            begun: false,
            base_empty,
            names,
            chunk_bytes,
            window_bytes,
            planned,
            ragged: BTreeMap::new(),
            reading: Vec::new(),
            fetching: Vec::new(),
            fetches: VecDeque::new(),
            offered: BTreeMap::new(),
            next_offer: 0,
            ready: VecDeque::new(),
            sent_bytes: 0,
            credited_bytes: 0,
            progress: HealProgress { planned_bytes, ..HealProgress::default() },
        }
    }

    pub(crate) fn heal(&self) -> HealId {
        self.heal
    }

    /// What to announce before anything else, once.
    pub(crate) fn begin(&mut self) -> Option<(HealId, SequenceNumber, u64)> {
        let first = !std::mem::replace(&mut self.begun, true);
        first.then_some((self.heal, self.p0, self.progress.planned_bytes))
    }

    pub(crate) fn progress(&self) -> HealProgress {
        self.progress
    }

    pub(crate) fn pump(&mut self) -> Vec<HealStep> {
        let mut steps = Vec::new();
        while self.sent_bytes - self.credited_bytes < self.window_bytes
            && let Some(message) = self.ready.pop_front()
        {
            if let Message::HealData { content: HealContent::Data(data), .. } = &message {
                self.sent_bytes += data.len() as u64;
                self.progress.sent_bytes += data.len() as u64;
            }
            steps.push(HealStep::Send(message));
        }
        if self.ready.is_empty() {
            while self.fetching.len() < CHUNKS_IN_FLIGHT_MAX
                && let Some((disk, range)) = self.fetches.pop_front()
            {
                self.fetching.push((disk, range));
                steps.push(HealStep::Fetch { disk, range });
            }
            while self.fetches.is_empty()
                && self.reading.len() + self.fetching.len() + self.offered.len() < CHUNKS_IN_FLIGHT_MAX
                && let Some((disk, range)) = self.next_chunk()
            {
                self.reading.push((disk, range));
                steps.push(HealStep::Read { disk, range, hash: !self.base_empty });
            }
        }
        let asked = self.reading.len() + self.fetching.len();
        let waiting = asked + self.fetches.len() + self.offered.len() + self.ready.len();
        if waiting == 0 && self.planned.is_empty() {
            steps.push(HealStep::Finished);
        }
        steps
    }

    /// Takes the next chunk off the plan. Chunks begin and end at multiples of the chunk size, or of a leaf.
    fn next_chunk(&mut self) -> Option<(DiskId, ByteRange)> {
        let (disk, range) = self.planned.pop_front()?;
        let start = range.start / LEAF_BYTES * LEAF_BYTES;
        if start < range.start {
            self.ragged.insert((disk, start), range.start);
        }
        let end = ((start / self.chunk_bytes + 1) * self.chunk_bytes).min(range.end());
        if let Some(rest) = ByteRange::between(end, range.end()) {
            self.planned.push_front((disk, rest));
        }
        Some((disk, ByteRange::new(start, end - start)))
    }

    pub(crate) fn read(&mut self, disk: DiskId, range: ByteRange, leaves: Vec<OfferedLeaf>, data: Option<Bytes>) {
        debug_assert_eq!(leaves.len() as u64, range.len.div_ceil(LEAF_BYTES), "one entry a leaf");
        if !answers(&mut self.reading, (disk, range)) {
            return;
        }
        self.progress.compared_bytes += range.len;
        let verdict = if self.names.is_some() { Verdict::Granules } else { Verdict::AllLeaves };
        let chunk = Chunk { disk, range, leaves, data, verdict };
        if self.base_empty {
            let wanted: Vec<bool> = chunk.leaves.iter().map(|leaf| *leaf != OfferedLeaf::Zero).collect();
            self.send_leaves(&chunk, &wanted);
            return;
        }
        let offer = self.next_offer;
        self.next_offer += 1;
        let (heal, start) = (self.heal, range.start);
        self.ready.push_back(match &self.names {
            None => Message::Offer { heal, offer, disk, start, leaves: chunk.leaves.clone() },
            Some(key) => {
                let zero = key.zero_leaf();
                let mut rest = &chunk.leaves[..];
                let granules = granule_leaves(start, chunk.leaves.len() as u64).map(|count| {
                    let (leaves, after) = rest.split_at(count);
                    rest = after;
                    offered_granule(key, zero, leaves)
                });
                let granules = granules.collect();
                Message::OfferGranules { heal, offer, disk, start, leaves: chunk.leaves.len() as u32, granules }
            }
        });
        self.offered.insert(offer, chunk);
    }

    pub(crate) fn wants(&mut self, offer: u32, wanted: &[u8]) -> Result<(), &'static str> {
        let mut chunk = self.offered.remove(&offer).ok_or("the receiver answered an offer that was not made")?;
        let count = chunk.leaves.len();
        let wanted: Vec<bool> = match &chunk.verdict {
            Verdict::Granules => {
                let mut at = 0;
                let mut places = Vec::new();
                for (index, leaves) in granule_leaves(chunk.range.start, count as u64).enumerate() {
                    if is_wanted(wanted, index) {
                        places.extend(at..at + leaves);
                    }
                    at += leaves;
                }
                if !places.is_empty() {
                    let leaves = places.iter().map(|place| chunk.leaves[*place]).collect();
                    self.ready.push_back(Message::OfferLeaves { heal: self.heal, offer, leaves });
                    chunk.verdict = Verdict::Leaves(places);
                    self.offered.insert(offer, chunk);
                }
                return Ok(());
            }
            Verdict::AllLeaves => (0..count).map(|index| is_wanted(wanted, index)).collect(),
            Verdict::Leaves(places) => {
                let mut leaves = vec![false; count];
                for (index, place) in places.iter().enumerate() {
                    leaves[*place] = is_wanted(wanted, index);
                }
                leaves
            }
        };
        self.send_leaves(&chunk, &wanted);
        Ok(())
    }

    pub(crate) fn fetched(&mut self, disk: DiskId, range: ByteRange, data: Option<Bytes>) {
        if !answers(&mut self.fetching, (disk, range)) {
            return;
        }
        let content = data.map_or(HealContent::Unreadable, HealContent::Data);
        self.ready.push_back(Message::HealData { heal: self.heal, disk, range, content });
    }

    pub(crate) fn credit(&mut self, received_bytes: u64) {
        self.credited_bytes = received_bytes.clamp(self.credited_bytes, self.sent_bytes);
    }

    /// Turns runs of wanted leaves of the same nature into messages.
    fn send_leaves(&mut self, chunk: &Chunk, wanted: &[bool]) {
        #[derive(PartialEq, Clone, Copy)]
        enum Nature {
            Zero,
            Data,
            Unreadable,
        }
        let nature = |leaf: &OfferedLeaf| match leaf {
            OfferedLeaf::Zero => Nature::Zero,
            OfferedLeaf::Hash(_) | OfferedLeaf::Unknown => Nature::Data,
            OfferedLeaf::Unreadable => Nature::Unreadable,
        };
        let mut index = 0;
        while index < chunk.leaves.len() {
            if !wanted[index] {
                index += 1;
                continue;
            }
            let first = index;
            let kind = nature(&chunk.leaves[first]);
            while index < chunk.leaves.len() && wanted[index] && nature(&chunk.leaves[index]) == kind {
                index += 1;
            }
            // What lies in front of a planned range is compared with its first leaf, never sent.
            let planned = self.ragged.get(&(chunk.disk, chunk.range.start)).copied().unwrap_or(0);
            let start = planned.max(chunk.range.start + first as u64 * LEAF_BYTES);
            let end = (chunk.range.start + index as u64 * LEAF_BYTES).min(chunk.range.end());
            let run = ByteRange::new(start, end - start);
            for range in run.split_at_multiples(limits::HEAL_DATA_BYTES_MAX as u64) {
                let content = match (kind, &chunk.data) {
                    (Nature::Zero, _) => HealContent::Zero,
                    (Nature::Unreadable, _) => HealContent::Unreadable,
                    (Nature::Data, Some(data)) => HealContent::Data(data.slice(range.within(chunk.range.start))),
                    (Nature::Data, None) => {
                        self.fetches.push_back((chunk.disk, range));
                        continue;
                    }
                };
                self.ready.push_back(Message::HealData { heal: self.heal, disk: chunk.disk, range, content });
            }
        }
    }
}

/// Takes a question off the list; whether it was asked.
fn answers(asked: &mut Vec<(DiskId, ByteRange)>, answer: (DiskId, ByteRange)) -> bool {
    let found = asked.iter().position(|question| *question == answer);
    found.map(|index| asked.swap_remove(index)).is_some()
}

#[cfg(test)]
mod tests;
