//! The host that serves branches: its files, its process, and the branches on it. It can be killed and power-cut.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use recovery::read_ahead::ReadAheadConfig;
use recovery::{BranchConfig, BranchError, BranchHost, Keep, SealConfig};
use replication::{ChainId, Ranges};
use vault::view_source::CacheBytes;
use vault::{Moment, UnlockedVault};
use world::{Clock, Entropy, Files};

use crate::clock::{SimClock, TrueTime};
use crate::files::{FileFaults, PowerCut, SimFiles};
use crate::model::StateDigest;
use crate::planted::Bug;
use crate::rng::{Rng, SimEntropy};
use crate::spoiled_files::SpoiledFiles;
use crate::tenant::{Seen, Tenant, is_transient};

/// See the module's documentation.
pub struct BranchSite {
    vault: UnlockedVault,
    files: SimFiles,
    clock: SimClock,
    rng: Rng,
    host: Option<BranchHost>,
    lost_power: bool,
    bug: Option<Bug>,
    /// The branches, open or waiting to be opened again.
    pub tenants: Vec<Tenant>,
}

/// What became of an order.
pub enum Opening {
    /// It is open.
    Open(usize),
    /// It is open, and holds a sector that its source could not read: nothing can be said about it.
    Unreadable(usize),
    /// The store or the disk failed; the host remembers the order.
    Later(usize),
    /// The store or the disk failed before anything was remembered.
    Never,
}

/// Room for one branch's writes that are not in the vault.
const JOURNAL_BYTES: u64 = 1 << 20;

impl BranchSite {
    /// A host with an empty disk, its process not running.
    pub fn new(vault: UnlockedVault, time: &TrueTime, mut rng: Rng, bug: Option<Bug>) -> BranchSite {
        let files = SimFiles::new(rng.draw());
        let clock = SimClock::booting_now(time);
        BranchSite { vault, files, clock, rng, host: None, lost_power: false, bug, tenants: Vec::new() }
    }

    /// Sets whether syncs fail now and then.
    pub fn set_faults(&self, stormy: bool) {
        let sync_errors_per_thousand = if stormy { 4 } else { 0 };
        self.files.set_faults(FileFaults { sync_errors_per_thousand, ..FileFaults::default() });
    }

    fn host(&mut self) -> &BranchHost {
        let (vault, clock, bug) = (&self.vault, &self.clock, self.bug);
        let (files, rng) = (&self.files, &mut self.rng);
        self.host.get_or_insert_with(|| {
            let entropy: Arc<dyn Entropy> = Arc::new(SimEntropy::new(rng.fork()));
            let clock: Arc<dyn Clock> = Arc::new(clock.clone());
            let files: Arc<dyn Files> = match bug {
                Some(Bug::BranchFlushNotSynced) => Arc::new(SpoiledFiles::without_journal_syncs(files.clone())),
                _ => Arc::new(files.clone()),
            };
            BranchHost::on_files(vault.clone(), files, clock, entropy, config())
        })
    }

    /// Orders a branch of `chain` at `moment`, under the id that a failover gave it if there is one. What is known of the
    /// parent's points is asked of `announced` once the point is chosen. The inner error says why the point cannot be opened.
    ///
    /// # Errors
    /// The broken promise.
    pub fn open(
        &mut self,
        (chain, id): (ChainId, Option<ChainId>),
        moment: &Moment,
        ends_at: u64,
        announced: impl Fn(replication::SequenceNumber) -> Option<(StateDigest, Ranges)>,
        now: u64,
    ) -> Result<Result<Opening, BranchError>, String> {
        let opened = match id {
            Some(id) => self.host().open_as(id, chain, moment, "simulated"),
            None => self.host().open(chain, moment, "simulated"),
        };
        match opened {
            Ok(branch) => {
                let info = branch.info();
                let expected = announced(info.parent.sequence);
                let mut tenant = Tenant::new(info.branch, info.parent, expected, ends_at);
                let seen = tenant.opened(branch, false, now)?;
                self.tenants.push(tenant);
                Ok(Ok(match seen {
                    Seen::Right => Opening::Open(self.tenants.len() - 1),
                    Seen::Unreadable => Opening::Unreadable(self.tenants.len() - 1),
                }))
            }
            Err(error) if is_transient(&error) => {
                let known = self.host().list().map_err(|error| format!("branches cannot be listed: {error:?}"))?;
                let is_it = |branch| id.map_or_else(|| self.index_of(branch).is_none(), |id| id == branch);
                let new = known.into_iter().find(|info| info.ended.is_none() && is_it(info.branch));
                Ok(Ok(match new {
                    Some(info) => {
                        let expected = announced(info.parent.sequence);
                        self.tenants.push(Tenant::new(info.branch, info.parent, expected, ends_at));
                        Opening::Later(self.tenants.len() - 1)
                    }
                    None => Opening::Never,
                }))
            }
            Err(error) => Ok(Err(error)),
        }
    }

    /// Throws a branch away; whether that is done. Otherwise try again.
    ///
    /// # Errors
    /// If it cannot be, and nobody's fault was injected.
    pub fn discard(&mut self, index: usize) -> Result<Option<Tenant>, String> {
        let Some(branch) = &self.tenants[index].branch else { return Ok(None) };
        match branch.discard() {
            Ok(()) => Ok(Some(self.tenants.remove(index))),
            Err(error) if is_transient(&error) => Ok(None),
            Err(error) => Err(format!("branch {} cannot be discarded: {error:?}", branch.id())),
        }
    }

    /// Where a branch is in the list.
    pub fn index_of(&self, branch: ChainId) -> Option<usize> {
        self.tenants.iter().position(|tenant| tenant.id == branch)
    }

    /// Opens again what is not open.
    ///
    /// # Errors
    /// The broken promise.
    pub fn reopen(&mut self, now: u64) -> Result<(), String> {
        let mut gone = Vec::new();
        for index in 0..self.tenants.len() {
            if self.tenants[index].branch.is_some() {
                continue;
            }
            let id = self.tenants[index].id;
            let lost_power = self.lost_power;
            match self.host().reopen(id) {
                Ok(branch) => {
                    self.tenants[index].opened(branch, lost_power, now)?;
                }
                Err(error) if is_transient(&error) => return Ok(()),
                // The order itself was lost: nobody was told that the branch exists.
                Err(BranchError::NoBranch(_)) if self.tenants[index].model.is_none() => gone.push(index),
                Err(error) => return Err(format!("branch {id} cannot be opened again: {error:?}")),
            }
        }
        for index in gone.into_iter().rev() {
            self.tenants.remove(index);
        }
        self.lost_power = false;
        Ok(())
    }

    /// Kills the process that serves the branches. What the kernel was given stays.
    pub fn kill(&mut self) {
        self.go_down();
        self.files.restart_process();
    }

    /// Cuts the host's power.
    pub fn power_cut(&mut self) {
        self.go_down();
        self.lost_power = true;
        let cut = match self.rng.below(3) {
            0 => PowerCut::LoseAll,
            1 => PowerCut::Prefix,
            _ => PowerCut::Torn,
        };
        self.files.power_cycle(cut);
        self.clock.reboot();
    }

    fn go_down(&mut self) {
        self.tenants.iter_mut().for_each(|tenant| tenant.branch = None);
        self.host = None;
    }
}

fn config() -> BranchConfig {
    BranchConfig {
        seal: SealConfig {
            seal_every: Duration::from_secs(3),
            seal_bytes: 96 << 10,
            unsealed_bytes_max: 256 << 10,
            workers: NonZeroUsize::MIN,
        },
        cache: CacheBytes { index: 1 << 20, data: 1 << 20, resolved: 1 << 20 },
        journal_bytes_max: JOURNAL_BYTES,
        read_ahead: ReadAheadConfig { window_bytes: 0, after_reads: 2 },
        ring_bytes_max: 64 << 10,
        keep: Keep::VaultIfWritable,
        room_wait: Duration::ZERO,
    }
}
