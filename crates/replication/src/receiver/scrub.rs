//! Scrubs as the receiver sees them: offers that are answered and forgotten, and what is to be said of points.

use bytes::Bytes;

use super::{Action, Receiver};
use crate::geometry::LEAF_BYTES;
use crate::limits;
use crate::position::{DiskId, SequenceNumber};
use crate::reach::Ranges;
use crate::wire::{Message, wanted_bitmap};

/// What the owner holds of a leaf that a scrub offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubbedLeaf {
    /// The same.
    Same,
    /// Something else.
    Differs,
    /// It cannot tell.
    Untold,
}

impl Receiver {
    pub(super) fn check_scrub(
        &mut self,
        offer: u64,
        behind: SequenceNumber,
        (disk, start): (DiskId, u64),
        leaves: usize,
    ) -> Result<(), String> {
        if behind > self.received {
            return Err(format!("a scrub wants to be compared behind {behind}, the stream is at {}", self.received));
        }
        // The last leaf of a disk may be shorter than 4 KiB.
        if start + leaves as u64 * LEAF_BYTES > self.disk_size(disk)?.next_multiple_of(LEAF_BYTES) {
            return Err(format!("a scrub reaches beyond {disk}"));
        }
        if self.scrubbed.len() >= limits::OFFERS_IN_FLIGHT_MAX || self.scrubbed.insert(offer, leaves).is_some() {
            return Err("a scrub offers too much at a time, or the same twice".into());
        }
        Ok(())
    }

    pub(super) fn suspect(
        &mut self,
        id: u64,
        (after, until): (SequenceNumber, SequenceNumber),
        (ranges, cause): (Ranges, String),
        out: &mut Vec<Action>,
    ) {
        // Nothing lies behind what was received; numbers that were lost on the way are nobody's point.
        let until = until.min(SequenceNumber(self.received.0.saturating_add(1)));
        if until <= after {
            out.push(Action::Send(Message::SuspectNoted { id }));
            return;
        }
        let time = self.clock.last();
        out.push(Action::Suspected { id, after, until, time, ranges, cause });
    }
}

pub(super) fn verdict(offer: u64, leaves: &[ScrubbedLeaf]) -> Message {
    let bits = |wanted| -> Bytes { wanted_bitmap(&leaves.iter().map(|leaf| *leaf == wanted).collect::<Vec<bool>>()) };
    Message::ScrubVerdict { offer, differing: bits(ScrubbedLeaf::Differs), untold: bits(ScrubbedLeaf::Untold) }
}
