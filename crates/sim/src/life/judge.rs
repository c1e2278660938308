//! The judge of points: every announced point against the model, while the life goes on.

use std::sync::Arc;

use recovery::view_of;
use replication::cut::{Cut, PointTime};
use replication::{Ranges, SequenceNumber};
use vault::points::Which;
use vault::view::ChainView;
use vault::{ChainHistory, Moment, Points, Store};

use crate::clock::START_WALL_NS;
use crate::model::StateDigest;
use crate::tenant::{judge_again, lacking_at, sizes_at, state_of};

use super::{Announced, SECOND, World};

impl World {
    /// Judges every point announced since the last time.
    pub(super) fn judge(&mut self) -> Result<(), String> {
        let Some(history) = self.history()? else { return Ok(()) };
        self.judge_gaps(&history)?;
        self.judge_writers(&history)?;
        self.judge_standing(&history)?;
        let store: Arc<dyn Store> = self.store.clone();
        let keys = Arc::clone(self.unlocked.keys());
        let points = Points::new(&store, &keys, &history);
        let from = PointTime(self.newest_label.0.saturating_sub(SECOND));
        let cuts = points
            .between(from, PointTime(u64::MAX), 100_000, Which::All)
            .map_err(|error| format!("points cannot be listed: {error:?}"))?;
        let backwards = |[one, next]: &&[Cut; 2]| one.sequence > next.sequence || one.time > next.time;
        if let Some([one, next]) = cuts.array_windows().find(backwards) {
            return Err(format!("{next:?} goes back behind {one:?}"));
        }
        let view = view_of(&self.frames, &history).map_err(|error| format!("{error:?}"))?;
        for cut in cuts {
            if self.announced.contains_key(&cut.sequence) || !points.is_openable(&cut) {
                continue;
            }
            let lacking = lacking_at(&points, cut.sequence);
            // A point with an unreadable sector is labelled so; what it holds elsewhere is judged at the next one.
            let state = state_of(&view, sizes_at(&history, cut.sequence), cut.sequence, &lacking)?;
            let Some(state) = state else { continue };
            self.judge_point(&cut, &lacking, state)?;
            if !lacking.is_empty() {
                self.judge_label(&points, &cut, &lacking)?;
                self.partial_points += 1;
            }
            self.newest_label = self.newest_label.max(cut.time);
            self.trace.update(&cut.sequence.0.to_le_bytes()).update(&[u8::from(lacking.is_empty())]);
            self.announced.insert(cut.sequence, Announced { cut, lacking, state });
        }
        self.judge_old_points(&view, &points, &history)
    }

    /// Whoever chooses this point is told what it lacks, and it lacks nothing to which nothing happened.
    fn judge_label(&self, points: &Points<'_>, cut: &Cut, lacking: &Ranges) -> Result<(), String> {
        let chosen = points.resolve(&Moment::Sequence(cut.sequence)).map_err(|error| format!("{cut:?}: {error:?}"))?;
        let told: Vec<_> = chosen.lacking.iter().map(|gap| (gap.after, gap.until)).collect();
        let hiding = points.gaps().iter().filter(|gap| gap.hides(cut.sequence));
        if chosen.cut != *cut || told != hiding.map(|gap| (gap.after, gap.until)).collect::<Vec<_>>() {
            return Err(format!("{cut:?} lacks {lacking}, and who chooses it is told of {:?}", chosen.lacking));
        }
        Ok(())
    }

    /// What a point does not lack is a state that the machine was in.
    fn judge_point(&mut self, cut: &Cut, lacking: &Ranges, state: StateDigest) -> Result<(), String> {
        let Some(known) = self.source.model.when_without(lacking, state) else {
            if std::env::var_os("FARSHORE_SIM_TRACE").is_some() {
                self.explain(cut.sequence);
            }
            let but = if lacking.is_empty() { String::new() } else { format!(", even without {lacking}") };
            return Err(format!("{cut:?} was never a state of the machine{but}"));
        };
        // With honest clocks a label tells the truth: everything before it is included, nothing from after it.
        if !self.wall_errors {
            let label = cut.time.0.saturating_sub(START_WALL_NS);
            let newest = known.requests;
            // A hello that waited for a sleeping server makes the offset too large until the first proof arrives.
            let slack = 45 * SECOND;
            let oldest_needed = self.source.model.requests_before(label.saturating_sub(slack));
            if self.source.model.incarnations() == 0 && newest < oldest_needed {
                return Err(format!("{cut:?} lacks requests made {slack} ns before its label"));
            }
        }
        Ok(())
    }

    /// A writer that lost its name commits nothing, and knows it: what a server believes to be committed is, and only
    /// whom the agent talked to since the last time has opened a generation.
    fn judge_writers(&mut self, history: &ChainHistory) -> Result<(), String> {
        for generation in &history.generations[self.generations_seen..] {
            let mut servers = self.servers.iter().zip(&self.talked_to);
            if let Some((server, _)) = servers.find(|(server, talked)| server.writer == generation.writer && !**talked)
            {
                let (name, reason) = (server.name, &generation.reason);
                return Err(format!("server {name} opened {:?} ({reason:?}) on its own", generation.generation));
            }
        }
        self.generations_seen = history.generations.len();
        self.talked_to = [false; 2];
        self.talked_to[self.assigned] = true;
        let store: Arc<dyn Store> = self.store.clone();
        for server in &self.servers {
            let Some((chain, head)) = server.committed_head() else { continue };
            let keys = self.unlocked.keys();
            // Nobody has told it yet that the machine came home on another chain.
            let past = if chain == history.chain { None } else { Some(self.chain_history(chain)?) };
            let history = past.as_ref().unwrap_or(history);
            if !history.contains(&store, keys, head.number, head.nonce).map_err(|error| format!("{error:?}"))? {
                return Err(format!("server {} believes that it committed {head:?}, which is not so", server.name));
            }
        }
        Ok(())
    }

    /// Where a point differs from the disks as they are now: usually enough to see what went wrong.
    fn explain(&mut self, sequence: SequenceNumber) {
        let Ok(Some(history)) = self.history() else { return };
        let Ok(view) = view_of(&self.frames, &history) else { return };
        for geometry in history.geometry_at(sequence) {
            eprintln!("{} has {} bytes", geometry.disk, geometry.size_bytes);
        }
        let mut held = Vec::new();
        for ((disk, size), now) in self.source.sizes().zip(self.source.snapshot()) {
            let mut bytes = vec![0; size as usize];
            if view.read(sequence, disk, 0, &mut bytes).is_ok() {
                let differs: Vec<usize> =
                    (0..bytes.len() / 512).filter(|i| bytes[i * 512..][..512] != now[i * 512..][..512]).collect();
                eprintln!("{disk}, {size} bytes now: sectors that differ from now: {differs:?}");
                held.push((disk, bytes));
            }
        }
        if let Some((state, cells)) = self.source.model.nearest(&held) {
            eprintln!("nearest to {state:?}, but for the sectors {cells:?}");
        }
        for gap in history.gaps() {
            eprintln!("gap {} .. {:?} {}", gap.after, gap.until.map(|(at, _)| at.to_string()), gap.cause);
        }
        for layer in history.layers() {
            eprintln!("layer {:?} {} ..= {} entries {}", layer.kind, layer.first, layer.last, layer.entries);
        }
        eprintln!("{}", self.describe());
    }

    /// Announced points are for ever: one of them, at random, each time.
    fn judge_old_points(
        &mut self,
        view: &ChainView,
        points: &Points<'_>,
        history: &ChainHistory,
    ) -> Result<(), String> {
        if self.announced.is_empty() {
            return Ok(());
        }
        let index = self.rng.below(self.announced.len() as u64) as usize;
        let announced = self.announced.values().nth(index).expect("the index is in range");
        judge_again(view, (points, history), announced)
    }
}
