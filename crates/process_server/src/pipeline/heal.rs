//! Heals as the pipeline sees them: offers are judged against the chain's head, data becomes an image at `p0`.
//!
//! Offers are judged only once everything up to `p0` is committed: an older head would call a block equal whose
//! journaled change is still on its way (`docs/design/0001-chains-cuts-and-heals.md`).

use std::collections::VecDeque;
use std::sync::Arc;

use replication::geometry::LEAF_BYTES;
use replication::receiver::Event;
use replication::wire::{HealContent, OfferHashes, OfferedLeaf};
use replication::{ByteRange, Cut, DiskId, HealId, LeafHash, LeafKey, PlainLeafHash, Reach, SequenceNumber};
use vault::image::{Absence, ImageBuilder, ImageOptions};
use vault::manifest::{Defect, GapClosed};
use vault::view::{ChainView, ReadError};
use vault::{ChainWriter, Compression, VaultError};
use world::Monotonic;

use super::gaps::OpenGap;
use super::{Pipeline, Services};

struct Offer {
    offer: u32,
    disk: DiskId,
    start: u64,
    leaves: Vec<OfferedLeaf>,
}

/// One heal in progress.
pub(super) struct HealSink {
    heal: HealId,
    p0: SequenceNumber,
    reach: Reach,
    hashes: OfferHashes,
    builder: ImageBuilder,
    offers: VecDeque<Offer>,
    received_bytes: u64,
    /// Bytes since the image was last cut.
    uncut_bytes: u64,
    /// Something could not be stored: the sender is told when it is.
    owes_credit: bool,
    defects: Vec<(DiskId, ByteRange)>,
    state: State,
}

enum State {
    Receiving,
    /// The heal is over without its end: keep what came.
    Abandoned,
    /// Everything came; the cut closes these gaps once the image is durable.
    Ending {
        cut: Cut,
        closes: Vec<OpenGap>,
    },
}

impl HealSink {
    pub(super) fn new(
        services: &Services,
        writer: &ChainWriter,
        heal: HealId,
        p0: SequenceNumber,
        (reach, hashes): (Reach, OfferHashes),
    ) -> HealSink {
        let options = ImageOptions { compression: Compression::Fast, workers: services.pace.workers };
        let builder = ImageBuilder::new(
            Arc::clone(&services.session),
            Arc::clone(&services.store),
            Arc::clone(&services.dedup),
            writer.chain(),
            writer.generation(),
            p0,
            options,
        );
        HealSink {
            heal,
            p0,
            reach,
            hashes,
            builder,
            offers: VecDeque::new(),
            received_bytes: 0,
            uncut_bytes: 0,
            owes_credit: false,
            defects: Vec::new(),
            state: State::Receiving,
        }
    }

    pub(super) fn heal(&self) -> HealId {
        self.heal
    }

    pub(super) fn p0(&self) -> SequenceNumber {
        self.p0
    }

    /// The gaps that this heal would have closed, for when it is given up.
    pub(super) fn give_back(self) -> Vec<OpenGap> {
        match self.state {
            State::Ending { closes, .. } => closes,
            State::Receiving | State::Abandoned => Vec::new(),
        }
    }

    /// Where the heal ended, if it did: a cut that the pending content does not name yet.
    pub(super) fn end(&self) -> Option<SequenceNumber> {
        match (&self.state, &self.reach) {
            (State::Ending { cut, .. }, Reach::Machine) => Some(cut.sequence),
            _ => None,
        }
    }

    pub(super) fn offered(&mut self, offer: u32, disk: DiskId, start: u64, leaves: Vec<OfferedLeaf>) {
        self.offers.push_back(Offer { offer, disk, start, leaves });
    }

    fn take(&mut self, disk: DiskId, range: ByteRange, content: HealContent) -> Result<(), VaultError> {
        self.received_bytes += if let HealContent::Data(data) = &content { data.len() as u64 } else { 0 };
        self.uncut_bytes += range.len.min(1 << 20);
        match content {
            HealContent::Data(data) => self.builder.data(disk, range.start, data),
            HealContent::Zero => {
                self.builder.absent(disk, range, Absence::Zero);
                Ok(())
            }
            HealContent::Unreadable => {
                self.defects.push((disk, range));
                self.builder.absent(disk, range, Absence::Unreadable);
                Ok(())
            }
        }
    }
}

impl Pipeline {
    pub(super) fn heal_data(
        &mut self,
        heal: HealId,
        disk: DiskId,
        range: ByteRange,
        content: HealContent,
        events: &mut Vec<Event>,
    ) {
        let mut known = self.announced.iter().chain(&self.geometries);
        let ends_the_disk = known.any(|known| known.disk == disk && known.size_bytes == range.end());
        let Some(sink) = self.heal.as_mut().filter(|sink| sink.heal == heal) else { return };
        // An image can hold nothing else, but for a leaf that the disk's end divides.
        let is_whole =
            range.start.is_multiple_of(LEAF_BYTES) && (range.end().is_multiple_of(LEAF_BYTES) || ends_the_disk);
        if !is_whole {
            let reason = format!("{range} of {disk} is not made of whole leaves");
            events.push(Event::HealFailed { heal, reason });
            return;
        }
        if let Err(error) = sink.take(disk, range, content) {
            // The builder keeps what it was given and stores it with its cut, which is tried until the store takes it; no
            // credit until then, so the sender waits once it has as much under way as it may.
            tracing::warn!(chain = %self.chain, %error, "healed data could not be stored yet");
            sink.owes_credit = true;
            return;
        }
        events.push(Event::HealProcessed { heal, bytes: sink.received_bytes });
    }

    pub(super) fn heal_end(&mut self, heal: HealId, cut: Cut) {
        let disks = self.disks().to_vec();
        if let Some(sink) = self.heal.as_mut().filter(|sink| sink.heal == heal) {
            // A break that comes from here on is another gap, even before this one is closed in the vault.
            let ended = |gap: &mut OpenGap| gap.is_ended_by(sink.p0, &sink.reach, &disks);
            let closes = self.open_gaps.extract_if(.., ended).collect();
            sink.state = State::Ending { cut, closes };
        }
    }

    /// The heal will not end in this session. What came is part of the head that the next heal compares with.
    pub(super) fn keep_partial_image(&mut self) {
        if let Some(sink) = &mut self.heal {
            sink.offers.clear();
            if !matches!(sink.state, State::Ending { .. }) {
                sink.state = State::Abandoned;
            }
        }
    }

    /// Cuts images that are due: a large one in between, the last one at a heal's end.
    pub(super) fn finish_images(&mut self, now: Monotonic, events: &mut Vec<Event>) {
        let Some(sink) = &mut self.heal else { return };
        let over = !matches!(sink.state, State::Receiving);
        if !over && !sink.owes_credit && sink.uncut_bytes < self.services.pace.image_cut_bytes {
            return;
        }
        match sink.builder.cut() {
            Ok(layer) => {
                sink.uncut_bytes = 0;
                if std::mem::take(&mut sink.owes_credit) {
                    events.push(Event::HealProcessed { heal: sink.heal, bytes: sink.received_bytes });
                }
                self.pending.images.extend(layer);
            }
            Err(error) => {
                tracing::warn!(chain = %self.chain, %error, "an image could not be stored yet");
                self.retry_at = now.plus(self.services.pace.retry_pause);
                return;
            }
        }
        if over && let Some(sink) = self.heal.take() {
            self.heal_over(sink);
        }
        self.touch();
    }

    fn heal_over(&mut self, sink: HealSink) {
        self.pending.defects.extend(sink.defects.into_iter().map(|(disk, range)| Defect {
            sequence: sink.p0,
            disk,
            range,
            cause: "the source could not read it".into(),
        }));
        let State::Ending { cut, closes } = sink.state else { return };
        let (until, time) = (cut.sequence, cut.time);
        let closed = closes.into_iter().map(|OpenGap { after, scope }| GapClosed { after, scope, until, time });
        self.pending.gaps_closed.extend(closed);
        let end = cut.sequence;
        if sink.reach == Reach::Machine {
            self.planner = replication::cut::CutPlanner::default();
            self.pending.cuts.push(cut);
            // Cuts that came while the image was being stored lie behind the heal's end.
            self.pending.cuts.sort_by_key(|cut| cut.sequence);
        }
        self.pending.heals_ended.push((sink.heal, end));
    }

    /// Answers offers, once the head is complete up to `p0`.
    pub(super) fn judge_offers(&mut self, now: Monotonic, events: &mut Vec<Event>) {
        if self.heal.as_ref().is_none_or(|sink| sink.offers.is_empty() || self.writer.through() < sink.p0) {
            return;
        }
        let view = self.head_view();
        let Some(sink) = &mut self.heal else { return };
        while let Some(offer) = sink.offers.pop_front() {
            let wanted = match judge(&view, &sink.hashes, &offer) {
                Ok(wanted) => wanted,
                Err(ReadError::Vault { source: VaultError::Store(error), .. }) if error.is_retryable() => {
                    tracing::warn!(chain = %self.chain, %error, "the vault's store does not answer; comparing later");
                    sink.offers.push_front(offer);
                    self.retry_at = now.plus(self.services.pace.retry_pause);
                    return;
                }
                Err(error) => {
                    // An index that cannot be read makes nothing equal.
                    tracing::warn!(chain = %self.chain, %error, "an index cannot be read; the range is sent again");
                    vec![true; offer.leaves.len()]
                }
            };
            events.push(Event::Compared { heal: sink.heal, offer: offer.offer, wanted });
        }
    }

    /// The chain's head: everything committed, partial images included.
    pub(super) fn head_view(&mut self) -> Arc<ChainView> {
        if let Some(view) = &self.view {
            return Arc::clone(view);
        }
        let mut layers = self.earlier.clone();
        layers.extend(self.writer.state().layers.iter().cloned());
        let view = Arc::new(ChainView::new(Arc::clone(&self.services.source), layers, self.below.clone()));
        self.view = Some(Arc::clone(&view));
        view
    }
}

fn judge(view: &ChainView, hashes: &OfferHashes, offer: &Offer) -> Result<Vec<bool>, ReadError> {
    let range = ByteRange::new(offer.start, offer.leaves.len() as u64 * LEAF_BYTES);
    let head = view.leaf_hashes(SequenceNumber(u64::MAX), offer.disk, range)?;
    let key = &view.source().keys().shared().leaf;
    let zero = key.zero_leaf();
    Ok(offer
        .leaves
        .iter()
        .zip(head)
        .map(|(offered, stored)| is_same(key, &zero, hashes, offered, stored) != Some(true))
        .collect())
}

/// Whether an offered leaf is what is stored, whose hash is `stored`; `None` if nobody can tell.
pub(super) fn is_same(
    key: &LeafKey,
    zero: &LeafHash,
    hashes: &OfferHashes,
    offered: &OfferedLeaf,
    stored: Option<LeafHash>,
) -> Option<bool> {
    let offered = match (offered, hashes) {
        (OfferedLeaf::Zero, _) => *zero,
        (OfferedLeaf::Hash(hash), OfferHashes::Plain) => key.leaf(PlainLeafHash(*hash)),
        (OfferedLeaf::Hash(hash), OfferHashes::Keyed(_)) => LeafHash(*hash),
        _ => return None,
    };
    Some(offered == stored?)
}
