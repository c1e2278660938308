//! The end of a life: healthy again, and every point ever announced judged once more.

use std::collections::HashSet;
use std::sync::Arc;

use recovery::view_of;
use replication::Ranges;
use vault::view_source::{CacheBytes, FrameSource};
use vault::{ChainHistory, Points, Store};

use crate::tenant::{judge_again, sizes_at, state_of};

use super::{Report, World};

impl World {
    pub(super) fn is_healthy(&mut self) -> Result<bool, String> {
        let waiting = self.branches.site.tenants.iter().any(|tenant| tenant.branch.is_none());
        if waiting || self.is_away() || self.is_deciding() || !self.source.is_settled() {
            return Ok(false);
        }
        let Some(history) = self.history()? else { return Ok(false) };
        if history.gaps().iter().any(|gap| gap.until.is_none()) {
            return Ok(false);
        }
        let Some((last, _)) = history.last_cut() else { return Ok(false) };
        let view = view_of(&self.frames, &history).map_err(|error| format!("{error:?}"))?;
        let state = state_of(&view, sizes_at(&history, last), last, &Ranges::default())?;
        Ok(state == Some(self.source.model.digest()) && last == history.through)
    }

    pub(super) fn final_checks(&mut self) -> Result<Report, String> {
        self.judge()?;
        let history = self.history()?.ok_or("there is no chain")?;
        let store: Arc<dyn Store> = self.store.clone();
        let complete = ChainHistory::load_all(&store, self.unlocked.keys(), history.chain)
            .map_err(|error| format!("the chain cannot be read in full: {error:?}"))?;
        let quick = ChainHistory::load(&store, self.unlocked.keys(), history.chain)
            .map_err(|error| format!("the chain cannot be read by checkpoints: {error:?}"))?;
        for (other, how) in [(&history, "bit by bit"), (&quick, "by checkpoints")] {
            if complete.head != other.head || complete.layers() != other.layers() || complete.gaps() != other.gaps() {
                return Err(format!("reading {how} and reading everything differ"));
            }
        }
        let keys = Arc::clone(self.unlocked.keys());
        let points = Points::new(&store, &keys, &complete);
        // Read from the store anew: what the judge remembers proves nothing about what is there.
        let frames = FrameSource::new(Arc::clone(&store), Arc::clone(&keys), CacheBytes::default());
        let view = view_of(&Arc::new(frames), &complete).map_err(|error| format!("{error:?}"))?;
        for announced in self.announced.values() {
            judge_again(&view, (&points, &complete), announced)?;
        }
        self.judge_branches_finally()?;
        self.nonces_are_unique()?;
        let gaps = complete.gaps().len() as u64;
        self.trace.update(&complete.head.digest).update(&self.time.now().to_le_bytes());
        let trace = self.trace.finalize();
        Ok(Report {
            faults: std::mem::take(&mut self.faults),
            points: self.announced.len() as u64,
            partial_points: self.partial_points,
            scrubbed_bytes: self.scrubbed_bytes,
            gaps,
            manifests: complete.head.number,
            branches: self.branches.opened,
            returns: self.branches.returned,
            undisturbed: self.undisturbed,
            trace: u64::from_le_bytes(*trace.as_bytes().first_chunk().expect("a hash has 32 bytes")),
        })
    }

    /// No two objects of one writer share a nonce.
    fn nonces_are_unique(&self) -> Result<(), String> {
        let store: Arc<dyn Store> = self.store.clone();
        let mut seen = HashSet::new();
        let mut twice = None;
        for folder in ["chains/", "packs/"] {
            store
                .for_each::<vault::StoreError>(folder, |name| {
                    if let Ok(header) = vault::object::verify_body_without_keys(store.as_ref(), &name)
                        && !seen.insert((header.writer, header.nonce))
                    {
                        twice = Some(name);
                    }
                    Ok(true)
                })
                .map_err(|error| format!("the vault cannot be listed: {error:?}"))?;
        }
        twice.map_or(Ok(()), |name| Err(format!("{name} has the nonce of another object")))
    }
}
