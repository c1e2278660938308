//! Scrubs as the pipeline sees them: a comparison with the chain's head, of which nothing is kept, and what is said of points
//! once something was found to differ.

use replication::geometry::LEAF_BYTES;
use replication::receiver::{Event, ScrubbedLeaf};
use replication::sender::SUSPICIONS_MAX;
use replication::wire::{OfferHashes, OfferedLeaf};
use replication::{ByteRange, DiskId, PointTime, Ranges, Reach, SequenceNumber};
use vault::VaultError;
use vault::manifest::Gap;
use vault::view::{ChainView, ReadError};
use world::Monotonic;

use super::Pipeline;
use super::gaps::scope_of;
use super::heal::is_same;

/// Leaves that a sender has read and wants to have compared.
pub(super) struct ScrubOffer {
    pub(super) offer: u64,
    /// Not before the head holds everything up to here.
    pub(super) behind: SequenceNumber,
    pub(super) disk: DiskId,
    pub(super) start: u64,
    pub(super) leaves: Vec<OfferedLeaf>,
}

impl Pipeline {
    pub(super) fn judge_scrubs(&mut self, now: Monotonic, events: &mut Vec<Event>) {
        while let Some(offer) = self.scrubs.front()
            && offer.behind <= self.writer.through()
        {
            let Some(offer) = self.scrubs.pop_front() else { return };
            let view = self.head_view();
            let leaves = match judge(&view, &offer) {
                Ok(leaves) => leaves,
                Err(ReadError::Vault { source: VaultError::Store(error), .. }) if error.is_retryable() => {
                    tracing::warn!(chain = %self.chain, %error, "the vault's store does not answer; comparing later");
                    self.scrubs.push_front(offer);
                    self.retry_at = now.plus(self.services.pace.retry_pause);
                    return;
                }
                Err(error) => {
                    // Damage of the vault is for whoever verifies it: it tells nothing of the source.
                    tracing::warn!(chain = %self.chain, %error, "an index cannot be read; a scrub cannot compare with it");
                    vec![ScrubbedLeaf::Untold; offer.leaves.len()]
                }
            };
            events.push(Event::Scrubbed { offer: offer.offer, leaves });
        }
    }

    /// Points that are offered already are not what they were taken for: a gap that is recorded with its end.
    pub(super) fn suspect(
        &mut self,
        id: u64,
        (after, until): (SequenceNumber, SequenceNumber),
        time: PointTime,
        (ranges, cause): (Ranges, String),
        events: &mut Vec<Event>,
    ) {
        let scope = scope_of(Reach::Ranges(ranges), self.disks());
        let gap = Gap { after, scope, time, cause, until: Some((until, time)) };
        let is_it = |known: &Gap| {
            let end = known.until.map(|(end, _)| end);
            known.after == after && known.scope == gap.scope && end == Some(until)
        };
        // The sender says it on each new link until it has heard that it is noted.
        if self.writer.state().gaps.iter().any(is_it) {
            events.push(Event::SuspicionNoted { id });
            return;
        }
        let flying = self.flying.iter().flat_map(|flying| &flying.content.gaps_opened);
        if flying.chain(&self.pending.gaps_opened).any(is_it) {
            return;
        }
        // It is told again with the next session.
        if self.pending.suspicions.len() >= SUSPICIONS_MAX {
            return;
        }
        tracing::warn!(chain = %self.chain, gap = %gap, "a scrub has found the source to differ from the vault");
        self.pending.gaps_opened.push(gap);
        self.pending.suspicions.push((id, after));
        self.touch();
    }
}

fn judge(view: &ChainView, offer: &ScrubOffer) -> Result<Vec<ScrubbedLeaf>, ReadError> {
    let head = SequenceNumber(u64::MAX);
    let range = ByteRange::new(offer.start, offer.leaves.len() as u64 * LEAF_BYTES);
    let held = view.leaf_hashes(head, offer.disk, range)?;
    let key = &view.source().keys().shared().leaf;
    let zero = key.zero_leaf();
    let compared = offer.leaves.iter().zip(held).map(|(offered, held)| {
        match is_same(key, &zero, &OfferHashes::Plain, offered, held) {
            Some(true) => ScrubbedLeaf::Same,
            Some(false) => ScrubbedLeaf::Differs,
            None => ScrubbedLeaf::Untold,
        }
    });
    let mut leaves: Vec<ScrubbedLeaf> = compared.collect();
    if leaves.contains(&ScrubbedLeaf::Differs) {
        // What a disk returns of discarded blocks is its own affair.
        for discarded in view.discarded(head, offer.disk, range)? {
            let within = discarded.widen_to(LEAF_BYTES).within(offer.start);
            leaves[within.start / LEAF_BYTES as usize..within.end / LEAF_BYTES as usize].fill(ScrubbedLeaf::Untold);
        }
    }
    Ok(leaves)
}
