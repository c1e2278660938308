//! The machine's site is lost, the machine runs on a branch, and comes home again to disks that have diverged.
//!
//! ```text
//! lost ─► branch at an announced point, in use ─► home follows it ─► cut over ─► the machine is protected again
//! ```
//!
//! Checked on the way: whenever home is between two states, its note says so, whatever lost power; at the end home
//! equals the branch byte for byte; afterwards only what was written since travels.

use std::sync::Arc;
use std::time::Duration;

use recovery::{FailbackConfig, FailbackRun, Phase, ProofScope, Succession, Turn};
use replication::geometry::{ByteRange, LEAF_BYTES};
use replication::{ChainId, SequenceNumber};
use vault::Moment;

use super::{Fault, SECOND, World};
use crate::home::SimHome;
use crate::model::{StateDigest, digest};

/// How long a branch may be at rest for a cut over.
const REST_LIMIT: Duration = Duration::from_secs(40);

/// See the module's documentation.
pub(super) struct Failover {
    /// The branch that the machine runs on, once it is open.
    pub(super) branch: Option<ChainId>,
    home: SimHome,
    /// What home's disks held when they were last in one piece.
    whole: StateDigest,
    home_at: u64,
    cut_over_at: u64,
    run: Option<FailbackRun>,
    at_rest_since: Option<u64>,
}

impl Failover {
    /// Whether writes to the branch would wait now. Once the limit is over the next write ends the rest.
    pub(super) fn is_at_rest(&self, now: u64) -> bool {
        self.at_rest_since.is_some_and(|since| now <= since + REST_LIMIT.as_nanos() as u64)
    }
}

fn digest_of(home: &SimHome) -> StateDigest {
    let disks = home.contents();
    digest(disks.iter().map(|(disk, bytes)| (*disk, &bytes[..])))
}

fn config() -> FailbackConfig {
    FailbackConfig {
        rest_limit: REST_LIMIT,
        reconnect_pause: Duration::from_millis(300),
        chunk_bytes: 64 << 10,
        proof: ProofScope::WrittenSince,
        // Unless somebody failed the machine over before, nobody has closed its chain.
        succession: Succession::CloseHistory,
    }
}

impl World {
    /// The machine's site burns down, and its disks are found later, written over in places.
    pub(super) fn lose_site(&mut self) -> Result<(), String> {
        self.judge()?;
        if self.announced.is_empty() {
            return Ok(());
        }
        self.leave_for(None);
        Ok(())
    }

    /// The machine ends where it is, to go on as this branch or as one that is still to be chosen.
    pub(super) fn leave_for(&mut self, branch: Option<ChainId>) {
        self.count(Fault::SiteLost);
        // One gap when the machine leaves, one when it is back on another chain.
        self.may_open_gap(Fault::SiteLost);
        self.may_open_gap(Fault::SiteLost);
        self.snapshot = None;
        let disks = self.source.leave();
        let rng = self.branches.rng.fork();
        let home = SimHome::new(disks, &self.time, rng, self.bug);
        let home_at = self.time.now() + self.branches.rng.below(25 * SECOND);
        let cut_over_at = home_at + self.branches.rng.below(40 * SECOND);
        let whole = digest_of(&home);
        self.branches.failover =
            Some(Failover { branch, home, whole, home_at, cut_over_at, run: None, at_rest_since: None });
    }

    /// The process that sends home dies.
    pub(super) fn stop_coming_home(&mut self) {
        if let Some(failover) = &mut self.branches.failover {
            failover.run = None;
            failover.at_rest_since = None;
        }
    }

    /// Perhaps something goes wrong on the way home.
    pub(super) fn home_misfortune(&mut self) -> Result<(), String> {
        let now = self.time.now();
        let Some(failover) = self.branches.failover.as_mut().filter(|failover| failover.home_at <= now) else {
            return Ok(());
        };
        let fault = match self.branches.rng.below(1200) {
            0..=5 => {
                failover.home.kill();
                Fault::HomeKilled
            }
            6..=11 => {
                failover.home.power_cut();
                Fault::HomePowerCut
            }
            12..=19 => match failover.home.link() {
                Some(link) => {
                    link.sever();
                    Fault::HomeLinkLost
                }
                None => return Ok(()),
            },
            20..=27 => match failover.home.link() {
                Some(link) => {
                    link.stall(self.branches.rng.below(6 * SECOND));
                    Fault::HomeLinkStalled
                }
                None => return Ok(()),
            },
            _ => return Ok(()),
        };
        self.count(fault);
        self.judge_home()
    }

    /// Whenever home is not noted as unfinished, it is in one piece.
    fn judge_home(&mut self) -> Result<(), String> {
        let Some(failover) = &mut self.branches.failover else { return Ok(()) };
        if failover.home.is_noted()? {
            return Ok(());
        }
        let found = digest_of(&failover.home);
        if found == failover.whole {
            return Ok(());
        }
        let site = &self.branches.site;
        let branch = failover.branch.and_then(|branch| site.index_of(branch)).map(|index| &site.tenants[index]);
        let head = branch.and_then(|tenant| tenant.model.as_ref()).map(|model| model.digest());
        if head != Some(found) {
            return Err("home is between two states and nothing says so".into());
        }
        failover.whole = found;
        Ok(())
    }

    pub(super) fn step_failover(&mut self) -> Result<(), String> {
        let now = self.time.now();
        let Some(failover) = &self.branches.failover else { return Ok(()) };
        let Some(branch) = failover.branch else { return self.fail_over() };
        if now < failover.home_at {
            return Ok(());
        }
        let Some(index) = self.branches.site.index_of(branch) else {
            return Err(format!("branch {branch} that the machine runs on is gone"));
        };
        let tenant = &mut self.branches.site.tenants[index];
        if tenant.is_unreadable {
            // Its order was carried out late. Another point is chosen.
            (tenant.is_failover, tenant.ends_at) = (false, 0);
            self.branches.failover.as_mut().expect("it was just there").branch = None;
            return Ok(());
        }
        let Some(open) = self.branches.site.tenants[index].branch.clone() else {
            self.stop_coming_home();
            return Ok(());
        };
        let failover = self.branches.failover.as_mut().expect("it was just there");
        // What the branch does not have was lost with the site.
        if failover.home.fit(open.disks()) {
            failover.whole = digest_of(&failover.home);
        }
        failover.home.step()?;
        let mut run = match failover.run.take() {
            Some(run) => run,
            None => FailbackRun::begin(Arc::clone(&open), failover.home.orders(), failover.home.line(), config())
                .map_err(|refusal| format!("the way home cannot begin: {refusal}"))?,
        };
        for _ in 0..12 {
            if run.step() != Turn::Busy {
                break;
            }
            failover.home.step()?;
        }
        let status = run.status();
        failover.at_rest_since = run.is_at_rest().then(|| failover.at_rest_since.unwrap_or(now));
        if let Some(problem) = &status.problem
            && (problem.what.contains("differs from the branch") || problem.what.contains("cannot be read"))
        {
            return Err(format!("home was written and is not what the branch is: {}", problem.what));
        }
        match status.phase {
            Phase::Done => return self.come_home(index),
            Phase::Failed => return Err(format!("the way home failed: {:?}", status.problem)),
            Phase::Following if now >= failover.cut_over_at => run.cut_over(),
            _ => {}
        }
        failover.run = Some(run);
        if self.branches.rng.one_in(20) { self.judge_home() } else { Ok(()) }
    }

    /// Starts the machine on a branch.
    fn fail_over(&mut self) -> Result<(), String> {
        let Some(chain) = self.chain() else { return Ok(()) };
        let announced = self.announced.clone();
        let moment = match self.branches.rng.below(3) {
            0 => {
                let index = self.branches.rng.below(announced.len() as u64) as usize;
                Moment::Sequence(*announced.keys().nth(index).expect("the index is in range"))
            }
            _ => Moment::Latest,
        };
        let Some(index) = self.open_branch((chain, None), &moment, &announced, u64::MAX)? else { return Ok(()) };
        let tenant = &mut self.branches.site.tenants[index];
        tenant.is_failover = true;
        let failover = self.branches.failover.as_mut().expect("the site is lost");
        failover.branch = Some(tenant.id);
        Ok(())
    }

    /// Home equals the branch: the machine boots there, and its history goes on along the branch's chain.
    fn come_home(&mut self, index: usize) -> Result<(), String> {
        let now = self.time.now();
        let old_chain = self.chain();
        let tenant = &mut self.branches.site.tenants[index];
        tenant.judge_points(&self.frames, &mut self.branches.rng)?;
        let mut tenant = self.branches.site.tenants.remove(index);
        let mut failover = self.branches.failover.take().expect("somebody came home");
        failover.run = None;
        let model = tenant.model.take().ok_or("a branch came home that was never seen")?;
        let mut differs = digest_of(&failover.home) != model.digest() || failover.home.is_noted()?;
        if !differs && self.branches.rng.one_in(2) {
            self.count(Fault::HomePowerCut);
            failover.home.power_cut();
            differs = digest_of(&failover.home) != model.digest() || failover.home.is_noted()?;
        }
        if differs {
            return Err(format!("the machine came home from branch {}, and home is not what it was", tenant.id));
        }
        if old_chain != Some(tenant.id) {
            return Err(format!("the machine came home from branch {} and follows {old_chain:?}", tenant.id));
        }
        self.branches.returned += 1;
        let points = std::mem::replace(&mut self.announced, std::mem::take(&mut tenant.announced));
        self.branches.past.push((tenant.parent.chain, points));
        self.newest_label = tenant.newest_label;
        self.tail = None;
        self.generations_seen = 0;
        self.left_behind(tenant.parent.chain, tenant.id);
        // One gap when the machine leaves, one when it is back on another chain.
        self.may_open_gap(Fault::SiteLost);
        self.may_open_gap(Fault::SiteLost);
        self.source.fit(&model.sizes());
        let unknown = self.unknown_bytes(tenant.id)?;
        self.source.come_home(model, unknown);
        self.trace.update(&tenant.id.0).update(&now.to_le_bytes());
        Ok(())
    }

    /// Bytes of leaves at the head of `chain` whose hash no index knows: those that were written in part. A process
    /// server cannot read what is committed, so it has to ask for them.
    fn unknown_bytes(&self, chain: ChainId) -> Result<u64, String> {
        let (_, view) = recovery::open_chain(&self.frames, chain).map_err(|error| format!("{error:?}"))?;
        let mut unknown = 0;
        for (disk, size) in self.source.sizes() {
            let Some(range) = ByteRange::between(0, size) else { continue };
            let hashes = view.leaf_hashes(SequenceNumber(u64::MAX), disk, range.widen_to(LEAF_BYTES));
            unknown += hashes.map_err(|error| format!("{error:?}"))?.iter().filter(|hash| hash.is_none()).count();
        }
        Ok(unknown as u64 * LEAF_BYTES)
    }

    /// After the return only what was written since may travel, and what no index knows, until source and vault agree.
    pub(super) fn judge_return(&mut self) -> Result<(), String> {
        let Some(allowed) = self.source.bytes_since_home() else { return Ok(()) };
        let Some(engine) = self.source.engine() else { return Ok(()) };
        let status = engine.status();
        if status.heal.sent_bytes > allowed {
            let sent = status.heal.sent_bytes;
            return Err(format!("{sent} bytes were sent after the return, no more than {allowed} can differ"));
        }
        let is_whole = |gaps: Vec<vault::Gap>| gaps.iter().all(|gap| gap.until.is_some());
        if self.source.is_settled() && self.history()?.is_some_and(|history| is_whole(history.gaps())) {
            self.source.is_home_again();
        }
        Ok(())
    }
}
