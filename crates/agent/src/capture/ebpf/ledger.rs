//! What an agent keeps for its successor, in a page of kernel memory that is pinned beside the maps.
//!
//! The page lives as long as the maps do: through any end of the agent, not through a reboot. What is written is ordered
//! so that a kill between any two stores leaves a page that names too much, never too little.

use std::sync::atomic::{Ordering, fence};

use replication::sender::Resumption;
use replication::{ChainId, Epoch, Generation, SequenceNumber, StreamHash};

use super::kernel::{Area, PAGE_BYTES};
use super::layout::{self, SLOTS};
use super::places::{PLACE_WORDS, Place};
use super::{Refusal, Shape};

const MAGIC: u64 = u64::from_le_bytes(*b"FARSEBPF");

// Places, in words.
const MAGIC_AT: usize = 0;
const VERSION_AT: usize = 1;
const READY_AT: usize = 2;
const WHOLE_AT: usize = 3;
const OCCUPANTS_AT: usize = 4;
const REFUSE_FROM_AT: usize = 8;
const REFUSE_EPOCH_AT: usize = 9;
const SHAPE_AT: usize = 10;
const SELECTOR_AT: usize = 16;
const KEPT_AT: [usize; 2] = [20, 40];
const MARKS_AT: usize = 60;
const PLACES_AT: usize = 64;

const _: () = assert!(8 * (PLACES_AT + layout::DISKS_MAX * PLACE_WORDS) <= PAGE_BYTES);

/// The page.
pub(super) struct Ledger(Area);

impl Ledger {
    pub(super) fn new(area: Area) -> Ledger {
        Ledger(area)
    }

    fn get(&self, at: usize) -> u64 {
        self.0.word(8 * at).load(Ordering::SeqCst)
    }

    fn set(&self, at: usize, value: u64) {
        self.0.word(8 * at).store(value, Ordering::SeqCst);
    }

    /// The shape for which this page was made; `None` if the page is not complete, or not of this version.
    pub(super) fn shape(&self) -> Option<Shape> {
        let known = self.get(MAGIC_AT) == MAGIC && self.get(VERSION_AT) == layout::VERSION && self.get(READY_AT) == 1;
        known.then(|| Shape {
            digest: [self.get(SHAPE_AT), self.get(SHAPE_AT + 1)],
            ring_bytes: self.get(SHAPE_AT + 2),
            map_cells: self.get(SHAPE_AT + 3),
        })
    }

    /// Completes the page: from here on a successor adopts what is pinned.
    pub(super) fn found(&self, shape: &Shape) {
        self.set(SHAPE_AT, shape.digest[0]);
        self.set(SHAPE_AT + 1, shape.digest[1]);
        self.set(SHAPE_AT + 2, shape.ring_bytes);
        self.set(SHAPE_AT + 3, shape.map_cells);
        self.set(VERSION_AT, layout::VERSION);
        self.set(MAGIC_AT, MAGIC);
        self.set(READY_AT, 1);
    }

    /// The epoch whose marks are in `slot`.
    pub(super) fn occupant(&self, slot: usize) -> Option<Epoch> {
        match self.get(OCCUPANTS_AT + slot) {
            0 => None,
            epoch => Some(Epoch(epoch as u32)),
        }
    }

    /// Gives `slot` to an epoch, or frees it.
    pub(super) fn occupy(&self, slot: usize, epoch: Option<Epoch>) {
        assert!(slot < SLOTS, "there are {SLOTS} slots");
        self.set(OCCUPANTS_AT + slot, epoch.map_or(0, |epoch| u64::from(epoch.0)));
    }

    /// How often something had been marked unstreamed in `slot` before its occupant came.
    pub(super) fn marks_before(&self, slot: usize) -> u64 {
        self.get(MARKS_AT + slot)
    }

    /// Sets it. Counters only count up: nobody else may write to those of a CPU.
    pub(super) fn set_marks_before(&self, slot: usize, count: u64) {
        self.set(MARKS_AT + slot, count);
    }

    /// Disks, by index, that only a comparison of the whole will heal.
    pub(super) fn whole(&self) -> u64 {
        self.get(WHOLE_AT)
    }

    /// Sets them.
    pub(super) fn set_whole(&self, disks: u64) {
        self.set(WHOLE_AT, disks);
    }

    /// Whose a slot of the kernel programs is; none if it never was anybody's.
    pub(super) fn place(&self, slot: usize) -> Option<Place> {
        let at = PLACES_AT + slot * PLACE_WORDS;
        Place::decode(std::array::from_fn(|word| self.get(at + word)))
    }

    /// Records it. The word that says whose it is comes last.
    pub(super) fn set_place(&self, slot: usize, place: &Place) {
        assert!(slot < layout::DISKS_MAX, "a slot of the programs");
        let at = PLACES_AT + slot * PLACE_WORDS;
        for (word, value) in place.encode().into_iter().enumerate().rev() {
            self.set(at + word, value);
        }
    }

    /// The break that the predecessor knew of.
    pub(super) fn refusal(&self) -> Option<Refusal> {
        let from = self.get(REFUSE_FROM_AT).checked_sub(1)?;
        Some(Refusal { from, epoch: self.get(REFUSE_EPOCH_AT) as u32 })
    }

    /// Records a break, before it is taken from the counters of its CPU.
    pub(super) fn refuse(&self, refusal: Option<Refusal>) {
        if let Some(refusal) = refusal {
            self.set(REFUSE_EPOCH_AT, u64::from(refusal.epoch));
        }
        self.set(REFUSE_FROM_AT, refusal.map_or(0, |refusal| refusal.from + 1));
    }

    /// How the stream can go on, as of the last [`Ledger::keep`].
    pub(super) fn resumption(&self) -> Option<Resumption> {
        let at = KEPT_AT[usize::try_from(self.get(SELECTOR_AT)).ok()?.checked_sub(1)?.min(1)];
        let bytes = |at: usize| self.get(at).to_ne_bytes();
        let mut chain = [0; 16];
        let mut hash = [0; 32];
        chain.chunks_exact_mut(8).enumerate().for_each(|(index, part)| part.copy_from_slice(&bytes(at + index)));
        hash.chunks_exact_mut(8).enumerate().for_each(|(index, part)| part.copy_from_slice(&bytes(at + 4 + index)));
        Some(Resumption {
            chain: ChainId(chain),
            generation: Generation(self.get(at + 2) as u32),
            released: SequenceNumber(self.get(at + 3)),
            hash: StreamHash(hash),
            ring_end: self.get(at + 8),
            gap_count: self.get(at + 9),
            heals_started: self.get(at + 10),
        })
    }

    /// Records how the stream can go on; `None` if it cannot.
    pub(super) fn keep(&self, resumption: Option<&Resumption>) {
        let Some(resumption) = resumption else {
            self.set(SELECTOR_AT, 0);
            return;
        };
        let next = if self.get(SELECTOR_AT) == 1 { 1 } else { 0 };
        let at = KEPT_AT[next];
        let word = |bytes: &[u8]| u64::from_ne_bytes(*bytes.first_chunk().expect("chunks of eight bytes"));
        for (index, part) in resumption.chain.0.chunks_exact(8).enumerate() {
            self.set(at + index, word(part));
        }
        self.set(at + 2, u64::from(resumption.generation.0));
        self.set(at + 3, resumption.released.0);
        for (index, part) in resumption.hash.0.chunks_exact(8).enumerate() {
            self.set(at + 4 + index, word(part));
        }
        self.set(at + 8, resumption.ring_end);
        self.set(at + 9, resumption.gap_count);
        self.set(at + 10, resumption.heals_started);
        // The other place stays whole until this one is.
        fence(Ordering::SeqCst);
        self.set(SELECTOR_AT, next as u64 + 1);
    }
}
