//! The running sum of one generation: what its writer keeps, and what a reader rebuilds.

use replication::{Cut, PointTime, SequenceNumber};

use super::{Checkpoint, CheckpointLink, Defect, Delta, Gap, GapClosed, GeometryChange, Manifest, ManifestLink};
use crate::layer::{LayerKind, LayerRef};

/// Everything that the manifests of one generation say, up to some manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GenerationState {
    /// Layers that still count, oldest first.
    pub layers: Vec<LayerRef>,
    /// Gaps that the generation opened.
    pub gaps: Vec<Gap>,
    /// Ends of gaps that an earlier generation opened.
    pub gaps_closed: Vec<GapClosed>,
    /// Unreadable ranges.
    pub defects: Vec<Defect>,
    /// Geometries.
    pub geometries: Vec<GeometryChange>,
    /// Cuts since the last checkpoint.
    pub recent_cuts: Vec<Cut>,
    /// The last checkpoint and, ever farther apart, earlier ones; newest first.
    pub skips: Vec<CheckpointLink>,
    /// Manifests since the last checkpoint.
    pub since_checkpoint: Vec<ManifestLink>,
    /// Newest cut of the generation.
    pub last_cut: Option<(SequenceNumber, PointTime)>,
    /// Number of checkpoints so far.
    pub checkpoints: u64,
}

impl GenerationState {
    /// The state after a manifest that carries `checkpoint`.
    pub(crate) fn from_checkpoint(link: ManifestLink, checkpoint: &Checkpoint) -> GenerationState {
        let before = checkpoint.skips.first();
        let last_cut = checkpoint.cuts.last().map(|cut| (cut.sequence, cut.time));
        let mut state = GenerationState {
            layers: checkpoint.layers.clone(),
            gaps: checkpoint.gaps.clone(),
            gaps_closed: checkpoint.gaps_closed.clone(),
            defects: checkpoint.defects.clone(),
            geometries: checkpoint.geometries.clone(),
            recent_cuts: Vec::new(),
            skips: checkpoint.skips.clone(),
            since_checkpoint: Vec::new(),
            last_cut: last_cut.or(before.map(|link| (link.last_cut, link.last_time))),
            checkpoints: checkpoint.index,
        };
        state.pass_checkpoint(link);
        state
    }

    /// Adds a manifest's delta, and its checkpoint if it carries one. Returns the layers that merged ones replaced.
    pub(crate) fn apply(&mut self, link: ManifestLink, manifest: &Manifest) -> Vec<LayerRef> {
        let replaced = self.add(&manifest.delta);
        if manifest.checkpoint.is_some() {
            self.pass_checkpoint(link);
        } else {
            self.since_checkpoint.push(link);
        }
        replaced
    }

    /// The checkpoint of a manifest whose delta is `delta`.
    pub(crate) fn checkpoint_with(&self, delta: &Delta) -> Checkpoint {
        let mut after = self.clone();
        after.add(delta);
        Checkpoint {
            index: after.checkpoints,
            covered: after.since_checkpoint,
            layers: after.layers,
            gaps: after.gaps,
            gaps_closed: after.gaps_closed,
            defects: after.defects,
            geometries: after.geometries,
            cuts: after.recent_cuts,
            skips: after.skips,
        }
    }

    /// The generation's last checkpoint.
    pub fn last_checkpoint(&self) -> Option<CheckpointLink> {
        self.skips.first().copied()
    }

    fn add(&mut self, delta: &Delta) -> Vec<LayerRef> {
        let mut replaced = Vec::new();
        for layer in &delta.layers {
            if layer.kind == LayerKind::Merged {
                replaced.extend(self.layers.extract_if(.., |older| replaces(layer, older)));
            }
            self.layers.push(layer.clone());
        }
        self.gaps.extend(delta.gaps_opened.iter().cloned());
        for closed in &delta.gaps_closed {
            match self.gaps.iter_mut().find(|gap| gap.is_closed_by(closed)) {
                Some(gap) => gap.until = Some((closed.until, closed.time)),
                None => self.gaps_closed.push(closed.clone()),
            }
        }
        self.defects.extend(delta.defects.iter().cloned());
        self.geometries.extend(delta.geometries.iter().cloned());
        self.recent_cuts.extend(delta.cuts.iter().cloned());
        self.last_cut = delta.cuts.last().map(|cut| (cut.sequence, cut.time)).or(self.last_cut);
        replaced
    }

    fn pass_checkpoint(&mut self, manifest: ManifestLink) {
        let (last_cut, last_time) = self.last_cut.unwrap_or_default();
        let index = self.checkpoints;
        let link = CheckpointLink { manifest, index, last_time, last_cut };
        self.skips.insert(0, link);
        self.skips = thin(std::mem::take(&mut self.skips), index + 1);
        self.checkpoints = index + 1;
        self.since_checkpoint.clear();
        self.recent_cuts.clear();
    }
}

/// Whether merged layer `newer` holds everything that `older` holds.
fn replaces(newer: &LayerRef, older: &LayerRef) -> bool {
    older.kind != LayerKind::Image
        && older.level < newer.level
        && newer.first <= older.first
        && older.last <= newer.last
}

/// Keeps of `links` (newest first) a ladder whose rungs lie ever farther apart: the checkpoint at index i, once it is d
/// behind, stays only if i is a multiple of the largest power of two not above d / 2. So a rung is never missed by
/// later ones, the ladder has O(log n) rungs, and neighbouring distances at most double.
fn thin(links: Vec<CheckpointLink>, next: u64) -> Vec<CheckpointLink> {
    let mut kept: Vec<CheckpointLink> = Vec::new();
    for link in &links {
        let distance = next - link.index;
        let step = (distance / 2).max(1);
        let step = 1u64 << (63 - step.leading_zeros());
        if link.index % step == 0 {
            kept.push(*link);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{NameEpoch, ObjectNonce};

    #[test]
    fn the_ladder_stays_short_and_its_rungs_at_most_double() {
        let mut state = GenerationState::default();
        for number in 0..5000u64 {
            let nonce = ObjectNonce([0; 16]);
            state.pass_checkpoint(ManifestLink { number, epoch: NameEpoch::FIRST, nonce, digest: [0; 32] });
            let indexes: Vec<u64> = state.skips.iter().map(|link| link.index).collect();
            assert_eq!(indexes.first(), Some(&number));
            assert_eq!(indexes.last(), Some(&0));
            assert!(indexes.len() <= 4 * (64 - number.leading_zeros() as usize) + 4, "{} at {number}", indexes.len());
            for pair in indexes.windows(2) {
                let (near, far) = (number + 1 - pair[0], number + 1 - pair[1]);
                assert!(far <= 2 * near + 2, "{indexes:?}");
            }
        }
    }
}
