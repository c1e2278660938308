//! Points: the moments to which a machine can be recovered, and why others cannot be.
//!
//! Cuts since the last checkpoint are at hand in a [`ChainHistory`]; older ones are fetched from the checkpoints that
//! hold them, found by skipping backwards.

use std::fmt;
use std::sync::Arc;

use replication::{Cut, CutKind, PointTime, SequenceNumber};
use world::WallTime;

use crate::chain::{ChainHistory, GenerationHistory};
use crate::error::{Damage, VaultError};
use crate::keys::OpenKeys;
use crate::manifest::{Checkpoint, CheckpointLink, Gap, GapScope, SignedManifest};
use crate::numbered::NumberedNames;
use crate::store::Store;

/// A moment as people ask for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moment {
    /// The newest one.
    Latest,
    /// The newest one taken while applications were frozen.
    LatestApplication,
    /// The state at this time: every write submitted before it.
    At(PointTime),
    /// This many seconds before the moment through which the source is proven.
    Back(u64),
    /// This position, rounded down to a cut.
    Sequence(SequenceNumber),
    /// The newest marker of this name.
    Marker(String),
}

/// A cut that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// The position.
    pub cut: Cut,
    /// Gaps of single disks or ranges that hide part of it: these are lacking.
    pub lacking: Vec<Gap>,
    /// Which point was chosen and why, for people.
    pub reason: String,
}

/// Why a moment cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum PointError {
    /// The history does not reach there.
    #[error("{asked} is outside this history, which {reach}")]
    OutsideHistory {
        /// What was asked for.
        asked: String,
        /// From when to when it reaches, as the end of a sentence.
        reach: String,
    },
    /// The stream was broken at that moment.
    #[error("{asked} lies in a gap: {gap}. {nearest}")]
    InsideGap {
        /// What was asked for.
        asked: String,
        /// The gap, for people.
        gap: String,
        /// The nearest cuts that can be opened, as a sentence.
        nearest: String,
        /// The nearest openable cut before.
        before: Option<Box<Cut>>,
        /// The nearest openable cut after.
        after: Option<Box<Cut>>,
    },
    /// None was ever set.
    #[error("there is no application-consistent point in this history, which {reach}")]
    NoApplicationPoint {
        /// From when to when it reaches, as the end of a sentence.
        reach: String,
    },
    /// No marker has this name.
    #[error("no marker is named {0:?}")]
    NoSuchMarker(String),
    /// The vault could not be read.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

/// The points of one chain.
pub struct Points<'a> {
    store: &'a Arc<dyn Store>,
    keys: &'a OpenKeys,
    history: &'a ChainHistory,
    names: NumberedNames,
    gaps: Vec<Gap>,
}

impl<'a> Points<'a> {
    /// The points of the chain whose history is `history`.
    pub fn new(store: &'a Arc<dyn Store>, keys: &'a OpenKeys, history: &'a ChainHistory) -> Points<'a> {
        let names = NumberedNames::of_chain(keys, history.chain);
        Points { store, keys, history, names, gaps: history.gaps() }
    }

    /// The chain's gaps, by position.
    pub fn gaps(&self) -> &[Gap] {
        &self.gaps
    }

    /// Whether `cut` can be opened, at least for some disks.
    pub fn is_openable(&self, cut: &Cut) -> bool {
        self.gap_of_machine(cut.sequence).is_none()
    }

    /// The newest cuts with `from <= time <= to`, at most `limit`, in order; cuts inside gaps of the whole machine are
    /// left out. With `markers_only`, named ones only.
    ///
    /// # Errors
    /// Those of the vault.
    pub fn between(&self, from: PointTime, to: PointTime, limit: usize, which: Which) -> Result<Vec<Cut>, VaultError> {
        let mut found = Vec::new();
        self.newest_first(to, |cut| {
            if cut.time < from {
                return Found::Stop;
            }
            if cut.time <= to && self.is_openable(cut) && which.includes(cut) {
                found.push(cut.clone());
            }
            if found.len() < limit { Found::GoOn } else { Found::Stop }
        })?;
        found.reverse();
        Ok(found)
    }

    /// Chooses the point for `moment` and says why.
    ///
    /// # Errors
    /// [`PointError`] names what can be opened instead.
    pub fn resolve(&self, moment: &Moment) -> Result<Point, PointError> {
        match moment {
            Moment::Latest => self.latest(Which::All, "the newest point"),
            Moment::LatestApplication => self.latest(Which::Application, "the newest application-consistent point"),
            Moment::At(time) => self.at(*time, &format!("the state at {}", wall(*time))),
            Moment::Back(seconds) => {
                let time = self.history.proven_through.0.saturating_sub(seconds.saturating_mul(1_000_000_000));
                let time = PointTime(time);
                self.at(time, &format!("the state {seconds} s before the newest proven moment ({})", wall(time)))
            }
            Moment::Sequence(sequence) => {
                let asked = format!("position {sequence}");
                if *sequence > self.history.through {
                    return Err(self.outside(asked)?);
                }
                if let Some(gap) = self.gap_of_machine(*sequence) {
                    return Err(self.inside(&asked, gap)?);
                }
                self.choose(
                    &asked,
                    PointTime(u64::MAX),
                    |cut| cut.sequence <= *sequence,
                    |cut| match cut.sequence == *sequence {
                        true => format!("position {sequence} is a cut"),
                        false => format!("position {sequence} is no cut; rounded down to {}", cut.sequence),
                    },
                )
            }
            Moment::Marker(name) => {
                let mut found = None;
                self.newest_first(PointTime(u64::MAX), |cut| match &cut.kind {
                    CutKind::Marker { name: marker, .. } if marker == name => {
                        found = Some(cut.clone());
                        Found::Stop
                    }
                    _ => Found::GoOn,
                })?;
                let cut = found.ok_or_else(|| PointError::NoSuchMarker(name.clone()))?;
                let asked = format!("the marker {name:?} of {}", wall(cut.time));
                self.openable(&asked, cut, |_| format!("the newest marker named {name:?}"))
            }
        }
    }

    fn latest(&self, which: Which, what: &str) -> Result<Point, PointError> {
        let cuts = self.between(PointTime(0), PointTime(u64::MAX), 1, which)?;
        match cuts.into_iter().next() {
            Some(cut) => {
                let reason = format!("{what}: {}", describe(&cut));
                Ok(self.point(cut, reason))
            }
            None => Err(match (which, self.outside(what.to_owned())?) {
                (Which::Application, PointError::OutsideHistory { reach, .. }) => {
                    PointError::NoApplicationPoint { reach }
                }
                (_, other) => other,
            }),
        }
    }

    fn at(&self, time: PointTime, asked: &str) -> Result<Point, PointError> {
        // Behind the proof nobody knows what was written; before the first cut there is nothing.
        if time > self.history.proven_through && self.history.last_cut().is_none_or(|(_, last)| time > last) {
            return Err(self.outside(asked.to_owned())?);
        }
        self.choose(
            asked,
            time,
            |cut| cut.time <= time,
            |cut| match cut.time == time {
                true => format!("{asked}: exactly {}", describe(cut)),
                false => format!("{asked}: nothing was written since {}", describe(cut)),
            },
        )
    }

    /// The newest cut that `fits`, if it can be opened.
    fn choose(
        &self,
        asked: &str,
        to: PointTime,
        fits: impl Fn(&Cut) -> bool,
        reason: impl Fn(&Cut) -> String,
    ) -> Result<Point, PointError> {
        let mut found = None;
        self.newest_first(to, |cut| {
            if fits(cut) {
                found = Some(cut.clone());
                Found::Stop
            } else {
                Found::GoOn
            }
        })?;
        let Some(cut) = found else { return Err(self.outside(asked.to_owned())?) };
        // A cut before the break can be opened, but a moment inside the gap must not be passed off as "nothing was
        // written since": nobody knows. Only the break's own second is covered by the cut that it ends with.
        let broken = self.gaps.iter().find(|gap| {
            gap.scope == GapScope::Machine
                && gap.after >= cut.sequence
                && to != PointTime(u64::MAX)
                && to > cut.time.max(gap.time)
                && gap.until.is_none_or(|(_, closed)| to < closed)
        });
        match broken {
            Some(gap) => Err(self.inside(asked, gap)?),
            None => self.openable(asked, cut, reason),
        }
    }

    fn openable(&self, asked: &str, cut: Cut, reason: impl Fn(&Cut) -> String) -> Result<Point, PointError> {
        match self.gap_of_machine(cut.sequence) {
            Some(gap) => Err(self.inside(asked, gap)?),
            None => {
                let reason = reason(&cut);
                Ok(self.point(cut, reason))
            }
        }
    }

    fn point(&self, cut: Cut, reason: String) -> Point {
        let lacking = self.gaps.iter().filter(|gap| gap.hides(cut.sequence)).cloned().collect();
        Point { cut, lacking, reason }
    }

    fn gap_of_machine(&self, sequence: SequenceNumber) -> Option<&Gap> {
        self.gaps.iter().find(|gap| gap.scope == GapScope::Machine && gap.hides(sequence))
    }

    fn inside(&self, asked: &str, gap: &Gap) -> Result<PointError, VaultError> {
        let (mut before, mut after) = (None, None);
        self.newest_first(PointTime(u64::MAX), |cut| {
            if !self.is_openable(cut) {
                return Found::GoOn;
            }
            if cut.sequence > gap.after {
                after = Some(Box::new(cut.clone()));
                return Found::GoOn;
            }
            before = Some(Box::new(cut.clone()));
            Found::Stop
        })?;
        let nearest = match (&before, &after) {
            (Some(before), Some(after)) => {
                format!("The nearest points are {} and {}", describe(before), describe(after))
            }
            (Some(before), None) => format!("The nearest point before is {}; none after it yet", describe(before)),
            (None, Some(after)) => format!("The nearest point is {}", describe(after)),
            (None, None) => "No other point can be opened yet".to_owned(),
        };
        Ok(PointError::InsideGap { asked: asked.to_owned(), gap: gap.to_string(), nearest, before, after })
    }

    fn outside(&self, asked: String) -> Result<PointError, VaultError> {
        let (mut first, mut last) = (None, None);
        self.newest_first(PointTime(u64::MAX), |cut| {
            if self.is_openable(cut) {
                last.get_or_insert(cut.time);
                first = Some(cut.time);
            }
            Found::GoOn
        })?;
        let reach = match (first, last) {
            (Some(first), Some(last)) => {
                let proven = self.history.proven_through.max(last);
                format!("reaches from {} to {}", wall(first), wall(proven))
            }
            _ => "has no point that can be opened yet".to_owned(),
        };
        Ok(PointError::OutsideHistory { asked, reach })
    }

    /// Shows the cuts, newest first, until `visit` has enough. Cuts after `to` may be left out.
    fn newest_first(&self, to: PointTime, mut visit: impl FnMut(&Cut) -> Found) -> Result<(), VaultError> {
        for generation in self.history.generations.iter().rev() {
            for cut in generation.state.recent_cuts.iter().rev() {
                if visit(cut) == Found::Stop {
                    return Ok(());
                }
            }
            let mut next = self.newest_checkpoint_reaching(generation, to)?;
            while let Some(link) = next {
                let checkpoint = self.checkpoint(&link)?;
                for cut in checkpoint.cuts.iter().rev() {
                    if visit(cut) == Found::Stop {
                        return Ok(());
                    }
                }
                next = checkpoint.skips.first().copied();
            }
        }
        Ok(())
    }

    /// The earliest checkpoint of `generation` that holds every cut with time up to `to`.
    fn newest_checkpoint_reaching(
        &self,
        generation: &GenerationHistory,
        to: PointTime,
    ) -> Result<Option<CheckpointLink>, VaultError> {
        let mut best = generation.state.last_checkpoint();
        let mut skips = generation.state.skips.clone();
        // Each step takes the farthest checkpoint that still reaches `to`, so distances halve.
        while let Some(link) = skips.iter().rev().find(|link| link.last_time > to).copied() {
            if best.is_none_or(|best| link.index < best.index) || best.is_some_and(|best| best.index == link.index) {
                best = Some(link);
            }
            skips = self.checkpoint(&link)?.skips;
        }
        Ok(best)
    }

    fn checkpoint(&self, link: &CheckpointLink) -> Result<Checkpoint, VaultError> {
        let place = (link.manifest.number, link.manifest.epoch);
        let manifest = SignedManifest::read(self.store, self.keys, &self.names, self.history.chain, place)?;
        match manifest.manifest.checkpoint {
            Some(checkpoint) if manifest.link == link.manifest && checkpoint.index == link.index => Ok(*checkpoint),
            _ => Err(VaultError::damaged(
                &self.names.name(place.0, place.1)?,
                Damage::Contradiction("it is not the checkpoint that later manifests refer to"),
            )),
        }
    }
}

/// Which cuts to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All.
    All,
    /// Markers.
    Markers,
    /// Markers taken while applications were frozen, or at a planned end.
    Application,
}

impl Which {
    fn includes(self, cut: &Cut) -> bool {
        match (self, &cut.kind) {
            (Which::All, _) | (Which::Markers, CutKind::Marker { .. }) => true,
            (Which::Application, CutKind::Marker { kind, .. }) => kind.is_at_rest(),
            _ => false,
        }
    }
}

#[derive(PartialEq, Eq)]
enum Found {
    GoOn,
    Stop,
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A suspicion is recorded with its end, when somebody has looked: its cause says since when.
        if let Some((_, until)) = self.until
            && until == self.time
        {
            return write!(f, "{} until {} ({})", self.scope, wall(until), self.cause);
        }
        write!(f, "{} from {}", self.scope, wall(self.time))?;
        match self.until {
            Some((_, time)) => write!(f, " to {}", wall(time))?,
            None => write!(f, ", still open")?,
        }
        write!(f, " ({})", self.cause)
    }
}

fn describe(cut: &Cut) -> String {
    let what = match &cut.kind {
        CutKind::Second => String::new(),
        CutKind::Marker { name, .. } => format!(", marker {name:?}"),
        CutKind::HealEnd => ", the end of a heal".to_owned(),
        CutKind::GenerationEnd => ", the last before the writer changed or the stream broke".to_owned(),
    };
    format!("{} (@{}{what})", wall(cut.time), cut.sequence)
}

fn wall(time: PointTime) -> WallTime {
    WallTime(time.0)
}
