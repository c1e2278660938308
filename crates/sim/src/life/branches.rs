//! Branches beside the life of the machine: opened at announced points, written to, killed, opened again, discarded.
//!
//! Nothing that happens to them may be seen by the machine, and nothing that happens to the machine by them.

use replication::cut::{Cut, CutKind};
use replication::{ChainId, Position};
use vault::{ChainHistory, Moment};

use super::decision::LeftBehind;
use super::failover::Failover;
use super::{Fault, SECOND, STORMY_NS, World};
use crate::branch_site::{BranchSite, Opening};
use crate::rng::Rng;
use crate::tenant::{AnnouncedPoints, Tenant, judge_some};

/// Branches at the same time, the one that a lost machine runs on included.
const BRANCHES_MAX: usize = 3;

/// What a life has besides the machine, its servers and its vault.
pub(super) struct Branches {
    pub(super) site: BranchSite,
    /// The machine's site is lost, and it runs on a branch.
    pub(super) failover: Option<Failover>,
    /// Chains that the machine followed before, and their points.
    pub(super) past: Vec<(ChainId, AnnouncedPoints)>,
    pub(super) left_behind: LeftBehind,
    pub(super) rng: Rng,
    pub(super) opened: u64,
    pub(super) returned: u64,
    next_judgement: u64,
}

impl Branches {
    pub(super) fn new(site: BranchSite, rng: Rng) -> Branches {
        Branches {
            site,
            failover: None,
            past: Vec::new(),
            left_behind: LeftBehind::new(),
            rng,
            opened: 0,
            returned: 0,
            next_judgement: 0,
        }
    }
}

impl World {
    fn is_stormy(&self) -> bool {
        self.time.now() < STORMY_NS
    }

    /// Whether the machine's site is lost.
    pub(super) fn is_away(&self) -> bool {
        self.branches.failover.is_some()
    }

    /// Perhaps something happens to the branches or on the way home.
    pub(super) fn branch_misfortune(&mut self) -> Result<(), String> {
        let draw = self.branches.rng.below(12_000);
        match draw {
            0..=7 => self.open_some_branch()?,
            // Late enough for points, early enough for coming home in the storm as well as after it.
            8..=9 if !self.is_away() && !self.is_deciding() && !self.is_quiet() && self.time.now() > 60 * SECOND => {
                self.lose_site()?
            }
            23..=24 if self.branches.site.tenants.len() < BRANCHES_MAX && self.time.now() > 30 * SECOND => {
                self.begin_decision()?
            }
            10..=16 if !self.branches.site.tenants.is_empty() => {
                self.count(Fault::BranchKilled);
                self.stop_coming_home();
                self.branches.site.kill();
            }
            17..=22 if !self.branches.site.tenants.is_empty() => {
                self.count(Fault::BranchPowerCut);
                self.stop_coming_home();
                self.branches.site.power_cut();
            }
            _ => {}
        }
        self.home_misfortune()
    }

    /// Lets the branches live for a while.
    pub(super) fn live_branches(&mut self, working: bool) -> Result<(), String> {
        let now = self.time.now();
        self.branches.site.set_faults(self.is_stormy());
        if self.branches.site.tenants.iter().any(|tenant| tenant.branch.is_none()) && self.branches.rng.one_in(4) {
            self.branches.site.reopen(now)?;
        }
        let resting = self.branches.failover.as_ref().filter(|failover| failover.is_at_rest(now));
        let resting = resting.and_then(|failover| failover.branch);
        let rng = &mut self.branches.rng;
        for tenant in &mut self.branches.site.tenants {
            if working && rng.one_in(8) && tenant.has_room() && resting != Some(tenant.id) {
                (0..1 + rng.below(3)).for_each(|_| tenant.write_something(rng, now));
            }
            tenant.seal()?;
        }
        // Whoever waits for a branch to run a machine on it throws it away himself.
        let over = |tenant: &Tenant| {
            let is_awaited = tenant.ends_at == u64::MAX;
            !tenant.is_failover && (tenant.ends_at <= now || tenant.is_unreadable && !is_awaited)
        };
        if let Some(index) = self.branches.site.tenants.iter().position(over) {
            self.branches.site.tenants[index].judge_points(&self.frames, &mut self.branches.rng)?;
            self.branches.site.discard(index)?;
        }
        if now >= self.branches.next_judgement {
            self.branches.next_judgement = now + 3 * SECOND + self.branches.rng.below(6 * SECOND);
            self.judge_branches()?;
        }
        self.step_failover()
    }

    fn judge_branches(&mut self) -> Result<(), String> {
        for tenant in &mut self.branches.site.tenants {
            tenant.judge_disks(&self.frames)?;
            tenant.judge_head()?;
            tenant.judge_points(&self.frames, &mut self.branches.rng)?;
        }
        Ok(())
    }

    /// The branches at the end of a life, and the chains that the machine left behind.
    pub(super) fn judge_branches_finally(&mut self) -> Result<(), String> {
        self.judge_branches()?;
        for (chain, announced) in &self.branches.past {
            let history = self.chain_history(*chain)?;
            let points = vault::Points::new(self.frames.store(), self.frames.keys(), &history);
            let view = recovery::view_of(&self.frames, &history).map_err(|error| format!("{error:?}"))?;
            judge_some(&view, (&points, &history), announced, 20, &mut self.branches.rng)?;
            self.judge_left_behind(&history)?;
        }
        Ok(())
    }

    pub(super) fn chain_history(&self, chain: ChainId) -> Result<ChainHistory, String> {
        ChainHistory::load(self.frames.store(), self.frames.keys(), chain)
            .map_err(|error| format!("chain {chain} cannot be read: {error:?}"))
    }

    /// Opens a branch at a random announced point of the machine or of another branch.
    fn open_some_branch(&mut self) -> Result<(), String> {
        if self.branches.site.tenants.len() >= BRANCHES_MAX {
            return Ok(());
        }
        self.judge()?;
        let machine = self.chain();
        let rng = &mut self.branches.rng;
        let others: Vec<usize> = (0..self.branches.site.tenants.len())
            .filter(|index| !self.branches.site.tenants[*index].announced.is_empty())
            .collect();
        let parent = match others.len() {
            0 => None,
            count if rng.one_in(3) => Some(others[rng.below(count as u64) as usize]),
            _ => None,
        };
        let (chain, announced) = match parent {
            Some(index) => {
                let tenant = &self.branches.site.tenants[index];
                (tenant.id, tenant.announced.clone())
            }
            None => match machine {
                Some(chain) => (chain, self.announced.clone()),
                None => return Ok(()),
            },
        };
        if let Some(moment) = some_moment(&announced, rng) {
            let ends_at = self.time.now() + 5 * SECOND + rng.below(50 * SECOND);
            self.open_branch((chain, None), &moment, &announced, ends_at)?;
        }
        Ok(())
    }

    /// Opens a branch and judges which point was chosen. The branch's index, unless it cannot be used.
    pub(super) fn open_branch(
        &mut self,
        (chain, id): (ChainId, Option<ChainId>),
        moment: &Moment,
        announced: &AnnouncedPoints,
        ends_at: u64,
    ) -> Result<Option<usize>, String> {
        let before = self.chain_history(chain)?;
        let state = |sequence| announced.get(&sequence).map(|point| (point.state, point.lacking.clone()));
        let opening = self.branches.site.open((chain, id), moment, ends_at, state, self.time.now())?;
        let after = self.chain_history(chain)?;
        if before.head != after.head {
            return Err(format!("opening a branch at {moment:?} wrote to its parent {chain}"));
        }
        let index = match opening {
            Ok(Opening::Open(index) | Opening::Later(index)) => index,
            Ok(Opening::Unreadable(index)) => {
                if id.is_none() {
                    self.branches.site.tenants[index].ends_at = 0;
                }
                return Ok(None);
            }
            Ok(Opening::Never) => return Ok(None),
            // Moments in gaps, or before the first point, are nobody's promise; announced points are.
            Err(error) => {
                return match moment {
                    Moment::At(_) | Moment::Marker(_) => Ok(None),
                    _ => Err(format!("{moment:?} of {chain} was announced and cannot be opened: {error:?}")),
                };
            }
        };
        self.branches.opened += 1;
        let parent = self.branches.site.tenants[index].parent;
        if let Some(why) = wrong_choice(moment, parent, announced) {
            return Err(format!("{moment:?} of {chain} opened {parent}, which is not the point asked for: {why}"));
        }
        self.trace.update(&parent.sequence.0.to_le_bytes());
        Ok(Some(index))
    }
}

/// A moment to open: any that names a point.
fn some_moment(announced: &AnnouncedPoints, rng: &mut Rng) -> Option<Moment> {
    if announced.is_empty() {
        return None;
    }
    let index = rng.below(announced.len() as u64) as usize;
    let (sequence, point) = announced.iter().nth(index).expect("the index is in range");
    Some(match (rng.below(5), &point.cut.kind) {
        (0, _) => Moment::Latest,
        (1, _) => Moment::At(point.cut.time),
        (2, _) => Moment::At(replication::PointTime(point.cut.time.0 + rng.below(2 * SECOND))),
        (_, CutKind::Marker { name, .. }) => Moment::Marker(name.clone()),
        _ => Moment::Sequence(*sequence),
    })
}

/// Why the point chosen does not fit the moment, or which announced one fits it better.
fn wrong_choice(moment: &Moment, chosen: Position, announced: &AnnouncedPoints) -> Option<String> {
    // One that the judge has not seen is newer than its last look, or holds an unreadable sector.
    let point = announced.get(&chosen.sequence)?;
    let is_named = |cut: &Cut, wanted: &str| matches!(&cut.kind, CutKind::Marker { name, .. } if name == wanted);
    let fits = |cut: &Cut| match moment {
        Moment::Latest => true,
        Moment::Sequence(asked) => cut.sequence <= *asked,
        Moment::At(time) => cut.time <= *time,
        Moment::Marker(name) => is_named(cut, name),
        Moment::LatestApplication | Moment::Back(_) => cut.sequence == chosen.sequence,
    };
    if !fits(&point.cut) {
        return Some(format!("it is {:?}", point.cut));
    }
    let better = announced.values().find(|other| other.cut.sequence > chosen.sequence && fits(&other.cut))?;
    Some(format!("{:?} is closer", better.cut))
}
