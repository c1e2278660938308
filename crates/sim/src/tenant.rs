//! A branch on the simulated host: the product's own branch, and a model that knows what its user wrote and flushed.

use std::collections::BTreeMap;
use std::sync::Arc;

use recovery::{Branch, BranchError, SealWish, view_of};
use replication::cut::{Cut, PointTime};
use replication::{ChainId, DiskId, Position, Ranges, SequenceNumber};
use vault::manifest::GapScope;
use vault::points::Which;
use vault::view::{ChainView, ReadError};
use vault::view_source::FrameSource;
use vault::{ChainHistory, Points, VaultError};
use world::{BlockDevice, BlockError};

use crate::model::{Model, StateDigest, WHOLE_DISK, digest, digest_without};
use crate::rng::Rng;

/// Each disk with its bytes.
pub type DiskContents = Vec<(DiskId, Vec<u8>)>;

/// A point that was announced, and what it held then.
#[derive(Debug, Clone)]
pub struct Announced {
    /// The point.
    pub cut: Cut,
    /// What it lacks, as it says itself.
    pub lacking: Ranges,
    /// The disks at it, without what it lacks.
    pub state: StateDigest,
}

/// What a point lacks.
pub fn lacking_at(points: &Points<'_>, sequence: SequenceNumber) -> Ranges {
    let hiding = points.gaps().iter().filter(|gap| gap.hides(sequence));
    let named = hiding.flat_map(|gap| match &gap.scope {
        GapScope::Machine => Vec::new(),
        GapScope::Disks(disks) => disks.iter().map(|disk| (*disk, WHOLE_DISK)).collect(),
        GapScope::Ranges(ranges) => ranges.clone(),
    });
    Ranges::of(named)
}

/// The disks of a chain and their sizes at a position.
pub fn sizes_at(history: &ChainHistory, sequence: SequenceNumber) -> Vec<(DiskId, u64)> {
    history.geometry_at(sequence).into_iter().map(|geometry| (geometry.disk, geometry.size_bytes)).collect()
}

/// Points of one chain.
pub type AnnouncedPoints = BTreeMap<SequenceNumber, Announced>;

/// Largest write of a branch's user, in sectors.
const WRITE_SECTORS_MAX: u64 = 16;

/// See the module's documentation.
pub struct Tenant {
    /// The branch's id.
    pub id: ChainId,
    /// Where it begins.
    pub parent: Position,
    /// What the parent's point was announced to hold, and to lack, if the judge knew it.
    pub expected: Option<(StateDigest, Ranges)>,
    /// The open branch; none while its host is down.
    pub branch: Option<Arc<Branch>>,
    /// What its user did, from the moment it was first seen.
    pub model: Option<Model>,
    /// It has the disks that its point has.
    disks_judged: bool,
    /// Requests that the product promised to keep.
    flushed: u64,
    /// Its own points.
    pub announced: AnnouncedPoints,
    /// Newest label among them.
    pub newest_label: PointTime,
    /// A machine runs on it: it is not thrown away.
    pub is_failover: bool,
    /// It holds a sector that its source could not read: no machine can run on it.
    pub is_unreadable: bool,
    /// When its user has had enough.
    pub ends_at: u64,
}

/// What became of opening a branch's disks.
pub enum Seen {
    /// It holds what it must.
    Right,
    /// It holds a sector that its source could not read: nothing can be said about it.
    Unreadable,
}

impl Tenant {
    /// A branch that was ordered and is not open yet.
    pub fn new(id: ChainId, parent: Position, expected: Option<(StateDigest, Ranges)>, ends_at: u64) -> Tenant {
        Tenant {
            id,
            parent,
            expected,
            branch: None,
            model: None,
            disks_judged: false,
            flushed: 0,
            announced: AnnouncedPoints::new(),
            newest_label: PointTime(0),
            is_failover: false,
            is_unreadable: false,
            ends_at,
        }
    }

    /// What its disks hold, as its user reads them.
    ///
    /// # Errors
    /// If they cannot be read although nobody lost a sector.
    pub fn contents(&self) -> Result<Option<DiskContents>, String> {
        let Some(branch) = &self.branch else { return Ok(None) };
        let mut disks = Vec::new();
        for geometry in branch.disks() {
            let mut bytes = vec![0; geometry.size_bytes as usize];
            let device = branch.disk(geometry.disk).map_err(|error| format!("{error:?}"))?;
            match device.read_at(0, &mut bytes) {
                Ok(()) => disks.push((geometry.disk, bytes)),
                Err(BlockError::Unreadable { .. }) => return Ok(None),
                Err(error) => return Err(format!("branch {}: {} cannot be read: {error:?}", self.id, geometry.disk)),
            }
        }
        Ok(Some(disks))
    }

    /// Judges a branch that was just opened: at first it is the parent's point; later it is what its user wrote, all of
    /// it up to the last flush and any prefix of the rest (all of the rest if only the process died).
    ///
    /// # Errors
    /// The broken promise.
    pub fn opened(&mut self, branch: Branch, lost_power: bool, now: u64) -> Result<Seen, String> {
        if branch.id() != self.id {
            return Err(format!("branch {} opened as {}", self.id, branch.id()));
        }
        self.branch = Some(Arc::new(branch));
        let Some(disks) = self.contents()? else {
            self.is_unreadable = true;
            return Ok(Seen::Unreadable);
        };
        let found = digest_of(&disks);
        let Some(model) = &mut self.model else {
            if let Some((expected, lacking)) = &self.expected
                && *expected != digest_without(lacking, disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])))
            {
                return Err(format!("branch {} at {} does not begin as its point was announced", self.id, self.parent));
            }
            self.expected = Some((found, Ranges::default()));
            self.model = Some(Model::new(disks));
            return Ok(Seen::Right);
        };
        let needed = if lost_power { self.flushed } else { model.requests() };
        let lives = model.incarnations();
        let legal = model.when(found).iter().any(|known| known.incarnation == lives && known.requests >= needed);
        if !legal {
            let known = model.when(found);
            return Err(format!(
                "branch {} holds neither what was flushed nor more of what was written ({needed} of {} requests \
                 promised, found {known:?})",
                self.id,
                model.requests()
            ));
        }
        model.reset(disks, now);
        self.flushed = model.requests();
        Ok(Seen::Right)
    }

    /// One request of the branch's user. Errors are part of life; then nothing has changed.
    pub fn write_something(&mut self, rng: &mut Rng, now: u64) {
        let (Some(branch), Some(model)) = (&self.branch, &mut self.model) else { return };
        let disks = branch.disks();
        let geometry = &disks[rng.below(disks.len() as u64) as usize];
        let Ok(disk) = branch.disk(geometry.disk) else { return };
        let sectors = geometry.size_bytes / 512;
        let start = if rng.one_in(2) { rng.below(sectors.min(64)) } else { rng.below(sectors) };
        // Some users write whole leaves, whose hashes the vault knows; others write what they like.
        let unit = if self.id.0[0].is_multiple_of(2) && sectors >= 16 { 8 } else { 1 };
        let start = start.min(sectors - unit) / unit * unit;
        let len = (unit + rng.below(WRITE_SECTORS_MAX.min(sectors - start) / unit) * unit) * 512;
        let len = len.min((sectors - start) * 512);
        let start = start * 512;
        let mut data = vec![0; len as usize];
        let done = match rng.below(10) {
            0 => disk.write_zeroes(start..start + len),
            1 => disk.discard(start..start + len),
            _ => {
                rng.fill(&mut data);
                disk.write_at(start, &data)
            }
        };
        if done.is_ok() {
            model.wrote(geometry.disk, start, &data, now);
        }
        if rng.one_in(12) && disk.flush().is_ok() {
            self.flushed = model.requests();
        }
    }

    /// Whether there is room for a burst of writes.
    pub fn has_room(&self) -> bool {
        self.branch.as_ref().is_some_and(|branch| branch.figures().unsealed_bytes < 96 << 10)
    }

    /// Lets the branch seal what is due.
    ///
    /// # Errors
    /// If somebody else is said to have taken the chain, which nobody does.
    pub fn seal(&self) -> Result<(), String> {
        let Some(branch) = &self.branch else { return Ok(()) };
        match branch.core().seal_step(SealWish::WhenDue) {
            Ok(_) => Ok(()),
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(format!("branch {} cannot be sealed: {error:?}", self.id)),
        }
    }

    /// Whether it has the disks that its point has, but for those that the point lacks altogether. Once, when it is open.
    ///
    /// # Errors
    /// The broken promise.
    pub fn judge_disks(&mut self, frames: &Arc<FrameSource>) -> Result<(), String> {
        let Some(branch) = self.branch.as_ref().filter(|_| !self.disks_judged) else { return Ok(()) };
        let history = ChainHistory::load(frames.store(), frames.keys(), self.parent.chain);
        let history = history.map_err(|error| format!("the chain below branch {}: {error:?}", self.id))?;
        let points = Points::new(frames.store(), frames.keys(), &history);
        let hidden =
            points.gaps().iter().filter(|gap| gap.hides(self.parent.sequence)).flat_map(|gap| match &gap.scope {
                GapScope::Disks(disks) => disks.clone(),
                _ => Vec::new(),
            });
        let hidden: Vec<DiskId> = hidden.collect();
        let mut expected = sizes_at(&history, self.parent.sequence);
        expected.retain(|(disk, size)| *size > 0 && !hidden.contains(disk));
        let found: Vec<_> = branch.disks().iter().map(|known| (known.disk, known.size_bytes)).collect();
        if found != expected {
            return Err(format!("branch {} at {} has {found:?}, its point {expected:?}", self.id, self.parent));
        }
        self.disks_judged = true;
        Ok(())
    }

    /// Whether its user sees exactly what was written, and nothing of the parent or of other branches.
    ///
    /// # Errors
    /// The broken promise.
    pub fn judge_head(&self) -> Result<(), String> {
        let (Some(disks), Some(model)) = (self.contents()?, &self.model) else { return Ok(()) };
        if digest_of(&disks) != model.digest() {
            return Err(format!("branch {} does not hold what its user wrote", self.id));
        }
        Ok(())
    }

    /// Judges the branch's own points, new ones and one old one.
    ///
    /// # Errors
    /// The broken promise.
    pub fn judge_points(&mut self, frames: &Arc<FrameSource>, rng: &mut Rng) -> Result<(), String> {
        let Some(model) = &self.model else { return Ok(()) };
        let history = match ChainHistory::load(frames.store(), frames.keys(), self.id) {
            Ok(history) => history,
            Err(VaultError::WrongChainState { .. }) => return Ok(()),
            Err(error) => return Err(format!("the chain of branch {} cannot be read: {error:?}", self.id)),
        };
        let points = Points::new(frames.store(), frames.keys(), &history);
        let from = PointTime(self.newest_label.0.saturating_sub(1_000_000_000));
        let cuts = points
            .between(from, PointTime(u64::MAX), 100_000, Which::All)
            .map_err(|error| format!("points of branch {} cannot be listed: {error:?}", self.id))?;
        let view = view_of(frames, &history).map_err(|error| format!("{error:?}"))?;
        for cut in cuts {
            if self.announced.contains_key(&cut.sequence) {
                continue;
            }
            let lacking = lacking_at(&points, cut.sequence);
            if !lacking.is_empty() {
                return Err(format!("{cut:?} of branch {} lacks {lacking}, and nothing happened to it", self.id));
            }
            let Some(state) = state_of(&view, model.sizes(), cut.sequence, &lacking)? else { continue };
            if model.when(state).is_empty() {
                return Err(format!("{cut:?} of branch {} was never a state of it", self.id));
            }
            self.newest_label = self.newest_label.max(cut.time);
            self.announced.insert(cut.sequence, Announced { cut, lacking, state });
        }
        judge_some(&view, (&points, &history), &self.announced, 1, rng)
    }
}

fn digest_of(disks: &[(DiskId, Vec<u8>)]) -> StateDigest {
    digest(disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])))
}

/// Judges `count` announced points again, at random.
///
/// # Errors
/// The broken promise.
pub fn judge_some(
    view: &ChainView,
    (points, history): (&Points<'_>, &ChainHistory),
    announced: &AnnouncedPoints,
    count: usize,
    rng: &mut Rng,
) -> Result<(), String> {
    for _ in 0..count.min(announced.len()) {
        let index = rng.below(announced.len() as u64) as usize;
        let point = announced.values().nth(index).expect("the index is in range");
        judge_again(view, (points, history), point)?;
    }
    Ok(())
}

/// Judges an announced point again.
///
/// # Errors
/// The broken promise.
pub fn judge_again(
    view: &ChainView,
    (points, history): (&Points<'_>, &ChainHistory),
    point: &Announced,
) -> Result<(), String> {
    let sequence = point.cut.sequence;
    if !points.is_openable(&point.cut) {
        let hiding: Vec<_> = points.gaps().iter().filter(|gap| gap.hides(sequence)).collect();
        return Err(format!("{:?} was announced and can no longer be opened: {hiding:?}", point.cut));
    }
    let lacking = lacking_at(points, sequence);
    if lacking != point.lacking {
        return Err(format!("{:?} was announced as lacking {}, and lacks {lacking} now", point.cut, point.lacking));
    }
    if state_of(view, sizes_at(history, sequence), sequence, &lacking)? != Some(point.state) {
        return Err(format!("{:?} was announced and has changed", point.cut));
    }
    Ok(())
}

/// What the disks hold at a position, without what is lacking there; none if the source could not read a sector.
///
/// # Errors
/// If stored data cannot be read.
pub fn state_of(
    view: &ChainView,
    sizes: Vec<(DiskId, u64)>,
    sequence: SequenceNumber,
    lacking: &Ranges,
) -> Result<Option<StateDigest>, String> {
    let mut disks = Vec::new();
    for (disk, size) in sizes {
        let mut bytes = vec![0; size as usize];
        match view.read(sequence, disk, 0, &mut bytes) {
            Ok(()) => disks.push((disk, bytes)),
            Err(ReadError::Unreadable { .. }) => return Ok(None),
            Err(error) => return Err(format!("{disk} at {sequence} cannot be read: {error:?}")),
        }
    }
    Ok(Some(digest_without(lacking, disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])))))
}

/// Whether an error is one that the world injected: trying again later is all that is asked for.
pub fn is_transient(error: &BranchError) -> bool {
    format!("{error:?}").contains("injected")
}
