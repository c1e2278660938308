//! Offers in two steps: granules first, then the leaves of those that differ.
//!
//! A granule's name is the keyed hash of its leaf hashes, so whoever has the key can name it without reading it. Equal
//! names settle sixteen leaves at once; a granule that one side cannot name differs. Both sides agree on which leaves the
//! second step is about by the verdict of the first: those of the wanted granules, in order.

use std::collections::BTreeMap;

use crate::geometry::{ByteRange, GRANULE_BYTES, LEAF_BYTES};
use crate::leaf::{LeafHash, LeafKey};
use crate::limits;
use crate::wire::OfferedLeaf;

/// Leaves in each granule that a range of `leaves` leaves from `start` touches. The first and the last may be touched in
/// part; then they are named by the leaves of the range only.
pub fn granule_leaves(start: u64, leaves: u64) -> impl Iterator<Item = usize> {
    let range = ByteRange::between(start, start + leaves * LEAF_BYTES);
    range
        .into_iter()
        .flat_map(|range| range.split_at_multiples(GRANULE_BYTES))
        .map(|part| usize::try_from(part.len / LEAF_BYTES).expect("a granule has sixteen leaves"))
}

/// What is offered of a granule with these leaves.
pub fn offered_granule(key: &LeafKey, zero: LeafHash, leaves: &[OfferedLeaf]) -> OfferedLeaf {
    if leaves.iter().all(|leaf| *leaf == OfferedLeaf::Zero) {
        return OfferedLeaf::Zero;
    }
    let known = leaves.iter().map(|leaf| match leaf {
        OfferedLeaf::Zero => Some(zero),
        OfferedLeaf::Hash(hash) => Some(LeafHash(*hash)),
        OfferedLeaf::Unknown | OfferedLeaf::Unreadable => None,
    });
    match known.collect::<Option<Vec<LeafHash>>>() {
        Some(hashes) => OfferedLeaf::Hash(key.granule(&hashes).0),
        None => OfferedLeaf::Unknown,
    }
}

/// Whether what is offered of a granule or a leaf is not what the receiver holds, `None` if it cannot tell.
pub fn differs(offered: OfferedLeaf, zero: LeafHash, held: Option<LeafHash>) -> bool {
    match offered {
        OfferedLeaf::Zero => held != Some(zero),
        OfferedLeaf::Hash(offered) => held.is_none_or(|held| held.0 != offered),
        OfferedLeaf::Unknown | OfferedLeaf::Unreadable => true,
    }
}

/// Whether what is offered of a granule is not what the receiver holds of it, leaf by leaf.
pub fn granule_differs(key: &LeafKey, zero: LeafHash, offered: OfferedLeaf, held: &[Option<LeafHash>]) -> bool {
    match offered {
        OfferedLeaf::Zero => held.iter().any(|hash| *hash != Some(zero)),
        offered => {
            let whole = held.iter().copied().collect::<Option<Vec<LeafHash>>>();
            differs(offered, zero, whole.map(|hashes| key.granule(&hashes)))
        }
    }
}

/// A receiver's memory of offers whose granules are being compared or whose leaves are still to come.
#[derive(Debug, Default)]
pub(crate) struct GranuleOffers {
    open: BTreeMap<u32, Open>,
}

#[derive(Debug)]
enum Open {
    /// Leaves in each granule of the offer.
    Judging(Vec<usize>),
    /// Leaves that the sender will offer.
    Awaiting(usize),
}

impl GranuleOffers {
    pub(crate) fn clear(&mut self) {
        self.open.clear();
    }

    pub(crate) fn offered(&mut self, offer: u32, start: u64, leaves: u64, granules: usize) -> Result<(), String> {
        let counts: Vec<usize> = granule_leaves(start, leaves).collect();
        if counts.len() != granules {
            return Err(format!("an offer of {} granules names {granules}", counts.len()));
        }
        if self.open.len() >= limits::OFFERS_IN_FLIGHT_MAX || self.open.contains_key(&offer) {
            return Err("too many offers are under way, or one came twice".into());
        }
        self.open.insert(offer, Open::Judging(counts));
        Ok(())
    }

    /// Takes the verdict on an offer's granules, if this offer is one of granules and its verdict is still out.
    pub(crate) fn judged(&mut self, offer: u32, wanted: &[bool]) {
        let Some(Open::Judging(counts)) = self.open.get(&offer) else { return };
        match counts.iter().zip(wanted).filter(|(_, wanted)| **wanted).map(|(count, _)| count).sum() {
            0 => self.open.remove(&offer),
            leaves => self.open.insert(offer, Open::Awaiting(leaves)),
        };
    }

    pub(crate) fn leaves(&mut self, offer: u32, leaves: usize) -> Result<(), String> {
        match self.open.remove(&offer) {
            Some(Open::Awaiting(expected)) if expected == leaves => Ok(()),
            _ => Err(format!("{leaves} leaves were offered of granules that nobody asked for")),
        }
    }
}
