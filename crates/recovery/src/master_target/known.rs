//! What a session reads of the disks at home: to compare it with what is offered, and to answer the questions of the proof.

use std::ops::Bound;
use std::sync::Arc;

use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::offers::{differs, granule_differs, granule_leaves};
use replication::wire::OfferedLeaf;
use replication::{DiskId, LeafHash};

use super::{HomeError, HomeSession, Kept, Key, failed};
use crate::home_disk::HomeDisk;
use crate::home_proof::{LeafSum, ProofScope, Settled, leaf_hashes};

impl HomeSession {
    fn key(&self) -> Result<&Key, HomeError> {
        self.key.as_ref().ok_or_else(|| HomeError::Protocol("an offer or a proof came without a key".into()))
    }

    /// The hashes of the leaves that are offered, as the medium has them.
    fn read(&self, disk: DiskId, start: u64, leaves: u64) -> Result<Vec<Option<LeafHash>>, HomeError> {
        let home = self.disk(disk)?;
        let end = (start + leaves * LEAF_BYTES).min(home.order().size_bytes);
        let Some(range) = ByteRange::between(start, end) else {
            return Err(HomeError::Protocol(format!("an offer lies beyond {disk}")));
        };
        leaf_hashes(home.medium(), range, &self.key()?.leaf).map_err(|source| failed(home, source))
    }

    pub(super) fn compare(&mut self, disk: DiskId, start: u64, leaves: &[OfferedLeaf]) -> Result<Vec<bool>, HomeError> {
        let hashes = self.read(disk, start, leaves.len() as u64)?;
        let zero = self.key()?.leaf.zero_leaf();
        let compared = (start / LEAF_BYTES..).zip(leaves.iter().zip(hashes));
        Ok(compared.map(|(leaf, (offered, held))| self.judge_leaf(disk, leaf, (*offered, held), zero)).collect())
    }

    /// Whether the leaf is wanted; if not, what is held counts.
    fn judge_leaf(
        &mut self,
        disk: DiskId,
        leaf: u64,
        (offered, held): (OfferedLeaf, Option<LeafHash>),
        zero: LeafHash,
    ) -> bool {
        let wanted = differs(offered, zero, held);
        if !wanted {
            self.learn(disk, leaf, held);
        }
        wanted
    }

    /// Reads and hashes the range once; what may be asked about by leaf is kept.
    pub(super) fn compare_granules(
        &mut self,
        offer: u32,
        disk: DiskId,
        (start, leaves): (u64, u64),
        granules: &[OfferedLeaf],
    ) -> Result<Vec<bool>, HomeError> {
        let hashes = self.read(disk, start, leaves)?;
        let mut rest = (start / LEAF_BYTES..).zip(hashes);
        let mut kept = Vec::new();
        let mut wanted = Vec::new();
        for (count, granule) in granule_leaves(start, leaves).zip(granules) {
            let held: Vec<(u64, Option<LeafHash>)> = rest.by_ref().take(count).collect();
            let hashes: Vec<Option<LeafHash>> = held.iter().map(|(_, hash)| *hash).collect();
            let key = &self.key()?.leaf;
            let differs = granule_differs(key, key.zero_leaf(), *granule, &hashes);
            wanted.push(differs);
            match differs {
                true => kept.extend(held),
                false => held.into_iter().for_each(|(leaf, hash)| self.learn(disk, leaf, hash)),
            }
        }
        if !kept.is_empty() {
            self.kept.insert(offer, Kept { disk, leaves: kept });
        }
        Ok(wanted)
    }

    pub(super) fn compare_leaves(&mut self, offer: u32, leaves: &[OfferedLeaf]) -> Result<Vec<bool>, HomeError> {
        let Some(Kept { disk, leaves: held }) = self.kept.remove(&offer) else {
            return Err(HomeError::Protocol("leaves were offered before their granules".into()));
        };
        let zero = self.key()?.leaf.zero_leaf();
        let compared = leaves.iter().zip(held);
        Ok(compared.map(|(offered, (leaf, held))| self.judge_leaf(disk, leaf, (*offered, held), zero)).collect())
    }

    /// `range` is about to be written.
    pub(super) fn forget(&mut self, home: &HomeDisk, range: ByteRange) {
        if let (Some(known), Some(key)) = (self.established.get_mut(&home.order().disk_id()), &self.key) {
            known.forget(&key.terms, &key.leaf, home.device(), range);
        }
    }

    /// What was read and is not asked for counts, unless the stream has written to it since.
    fn learn(&mut self, disk: DiskId, leaf: u64, hash: Option<LeafHash>) {
        let range = ByteRange::new(leaf * LEAF_BYTES, LEAF_BYTES);
        let written = self.shields.get(&disk).is_some_and(|shield| shield.outside(range) != [range]);
        if let (Some(hash), Some(known), Some(key), false) = (hash, self.established.get_mut(&disk), &self.key, written)
        {
            known.learn(&key.terms, leaf, hash);
        }
    }

    /// Home's answer to a question of the proof: what it holds, and how much was read for it.
    pub(super) fn prove(
        &mut self,
        disk: DiskId,
        (start, len): (u64, u64),
        scope: ProofScope,
    ) -> Result<(Option<String>, u64), HomeError> {
        self.sync()?;
        let part = self.established.get(&disk).and_then(|known| known.part_at(start, len));
        let Some(part) = part else { return Err(HomeError::Protocol("a proof's range is malformed".into())) };
        if scope == ProofScope::Whole
            && let Some(known) = self.established.get_mut(&disk)
        {
            known.forget_part(part);
        }
        let settled = self.settle(disk, part)?;
        Ok((settled.sum.map(LeafSum::digest), settled.read_bytes))
    }

    fn settle(&mut self, disk: DiskId, part: usize) -> Result<Settled, HomeError> {
        let home = Arc::clone(self.disk(disk)?);
        let Some(Key { leaf, terms }) = &self.key else {
            return Err(HomeError::Protocol("a proof was asked for without a key".into()));
        };
        let known = self.established.get_mut(&disk).expect("every disk that was ordered has what is known of it");
        if known.next_unsettled(part) == Some(part) {
            home.uncache(known.range(part));
        }
        known.settle(terms, leaf, home.medium(), part).map_err(|source| failed(&home, source))
    }

    /// Reads one part once more that the comparison wrote to, so that the branch need not rest for it. Everything must be
    /// synced. Whether there was one.
    pub(super) fn sweep(&mut self) -> Result<bool, HomeError> {
        let Some((disk, from)) = self.sweep.filter(|_| !self.unsynced && self.healing.is_none()) else {
            return Ok(false);
        };
        match self.established.get(&disk).and_then(|known| known.next_unsettled(from)) {
            Some(part) => {
                // What cannot be read is for the proof to name.
                self.settle(disk, part)?;
                self.sweep = Some((disk, part + 1));
                Ok(true)
            }
            None => {
                let after = (Bound::Excluded(disk), Bound::Unbounded);
                self.sweep = self.disks.range(after).next().map(|(next, _)| (*next, 0));
                Ok(self.sweep.is_some())
            }
        }
    }
}
