//! File systems at rest: planned, flushed, frozen together, and thawed whatever happens.
//!
//! ```text
//! plan ─► open ─► syncfs ─► guard ─► FIFREEZE, uppermost first ─► marker ─► FITHAW ─► guard dismissed
//!                              └── the time is over, or the agent ended ──► FITHAW
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use world::{Clock, Monotonic};

use super::page::{self, FILE_SYSTEMS_MAX, FROZEN, Guard, MARKED, MARKING, OVER, RESTING, SharedPage, UNTOUCHED};
use crate::system::{BlockDevices, DeviceNumber, Mount, SystemRoot};

/// A mounted file system to freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where it is mounted; the first place that leads to it counts.
    pub mount_points: Vec<PathBuf>,
    /// Its type.
    pub fs_type: String,
    device: DeviceNumber,
}

impl Target {
    /// Whether files of device number `device` lie on it. The subvolumes of a btrfs have numbers of their own: any might.
    pub(super) fn holds(&self, device: u64) -> bool {
        self.fs_type == "btrfs" || self.device == DeviceNumber::of(device)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.mount_points.first().map(|place| place.display().to_string()).unwrap_or_default();
        write!(f, "{place} ({})", self.fs_type)
    }
}

/// The file systems that lie on some disks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FreezePlan {
    /// Writable file systems in the order of freezing: what lies on another one comes before it.
    pub targets: Vec<Target>,
    /// Devices with a file system that is mounted where this process does not see it.
    pub out_of_sight: Vec<String>,
}

/// Finds the writable file systems that lie on `protected`, wholly or in part.
pub fn plan(root: &SystemRoot, protected: &BTreeSet<DeviceNumber>) -> FreezePlan {
    let devices = BlockDevices::read(root);
    let mounts = root.mounts();
    let mut found: BTreeMap<DeviceNumber, (usize, Target)> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for mount in &mounts {
        let own = devices.of_mount(root, mount);
        seen.extend(own.iter().copied());
        if mount.read_only || own.is_empty() {
            continue;
        }
        let below = devices.foundations(root, &mounts, own);
        if below.is_disjoint(protected) {
            continue;
        }
        let new = || {
            let target = Target { mount_points: Vec::new(), fs_type: mount.fs_type.clone(), device: mount.device };
            (below.len(), target)
        };
        found.entry(mount.device).or_insert_with(new).1.mount_points.push(mount.mount_point.clone());
    }
    let mut targets: Vec<(usize, Target)> = found.into_values().collect();
    // What lies on a file in another file system has all the foundations of that one and more.
    targets.sort_by_key(|(below, _)| std::cmp::Reverse(*below));
    let targets = targets.into_iter().map(|(_, target)| target).collect();
    FreezePlan { targets, out_of_sight: out_of_sight(root, &devices, &mounts, &seen, protected) }
}

/// The kernel lists the superblocks of ext4 and xfs by device, whatever namespace they are mounted in.
fn out_of_sight(
    root: &SystemRoot,
    devices: &BlockDevices,
    mounts: &[Mount],
    seen: &BTreeSet<DeviceNumber>,
    protected: &BTreeSet<DeviceNumber>,
) -> Vec<String> {
    let names = ["ext4", "xfs"].iter().flat_map(|kind| root.names(format!("/sys/fs/{kind}")));
    let hidden = names.filter(|name| {
        devices.named(root, &format!("/dev/{name}")).is_some_and(|node| {
            let below = || devices.foundations(root, mounts, BTreeSet::from([node.number]));
            !seen.contains(&node.number) && !below().is_disjoint(protected)
        })
    });
    hidden.collect()
}

/// Why file systems were not frozen. Nothing is frozen any more.
#[derive(Debug, thiserror::Error)]
pub enum FreezeProblem {
    /// A file system cannot be reached.
    #[error("the file system at {target} cannot be opened")]
    Unreachable {
        /// Which.
        target: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It could not write out what was dirty.
    #[error("the file system at {target} could not be written out")]
    Flush {
        /// Which.
        target: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Somebody else holds it frozen.
    #[error("somebody else has frozen the file system at {0}")]
    FrozenByOthers(String),
    /// It refuses.
    #[error("the file system at {target} could not be frozen")]
    Refused {
        /// Which.
        target: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No guard, no freeze.
    #[error("the guard that thaws in an emergency could not be started")]
    NoGuard(#[source] io::Error),
    /// It took too long.
    #[error("the file systems were not at rest within {limit_ms} ms; the slowest was {slowest}")]
    TimedOut {
        /// The limit.
        limit_ms: u128,
        /// Which took longest.
        slowest: String,
    },
    /// There are too many.
    #[error("{0} file systems are more than can be frozen together")]
    TooMany(usize),
}

/// The file systems of a plan, opened.
pub struct OpenTargets(Vec<(Target, OwnedFd)>);

impl OpenTargets {
    /// Opens every file system of `plan`.
    ///
    /// # Errors
    /// The first that cannot be reached.
    pub fn open(plan: &FreezePlan) -> Result<OpenTargets, FreezeProblem> {
        if plan.targets.len() > FILE_SYSTEMS_MAX {
            return Err(FreezeProblem::TooMany(plan.targets.len()));
        }
        let open = |target: &Target| match reach(target) {
            Ok(fd) => Ok((target.clone(), fd)),
            Err(source) => Err(FreezeProblem::Unreachable { target: target.to_string(), source }),
        };
        plan.targets.iter().map(open).collect::<Result<_, _>>().map(OpenTargets)
    }

    /// Writes out what is dirty while everybody writes on, so that the freeze is short.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn flush(&self) -> Result<(), FreezeProblem> {
        self.0.iter().try_for_each(|(target, fd)| {
            rustix::fs::syncfs(fd)
                .map_err(|error| FreezeProblem::Flush { target: target.to_string(), source: error.into() })
        })
    }

    /// Freezes all of them, under a guard that thaws them after `limit` in any case.
    ///
    /// # Errors
    /// Why not; whatever was frozen is thawed then.
    pub fn freeze(self, clock: &dyn Clock, limit: Duration) -> Result<FrozenFileSystems, FreezeProblem> {
        let page = Arc::new(SharedPage::new().map_err(FreezeProblem::NoGuard)?);
        let fds: Vec<BorrowedFd<'_>> = self.0.iter().map(|(_, fd)| fd.as_fd()).collect();
        let guard = Guard::start(&page, &fds, limit).map_err(FreezeProblem::NoGuard)?;
        let since = clock.monotonic();
        let mut frozen = FrozenFileSystems { targets: self.0, page, guard: Some(guard), since, not_frozen: Vec::new() };
        let mut slowest = (Duration::ZERO, String::new());
        for index in 0..frozen.targets.len() {
            let before = clock.monotonic();
            frozen.freeze_one(index)?;
            let took = clock.monotonic().since(before);
            if took >= slowest.0 {
                slowest = (took, frozen.targets[index].0.to_string());
            }
            if frozen.page.phase().load(Ordering::SeqCst) == OVER || clock.monotonic().since(since) >= limit {
                return Err(FreezeProblem::TimedOut { limit_ms: limit.as_millis(), slowest: slowest.1 });
            }
        }
        Ok(frozen)
    }
}

/// Opens a file system at the first of its mount points that still leads to it: another may be mounted over it.
fn reach(target: &Target) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for place in &target.mount_points {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(place, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(error) => {
                last = error.into();
                continue;
            }
        };
        let file = std::fs::File::from(fd);
        if target.holds(file.metadata()?.dev()) {
            return Ok(file.into());
        }
        last = io::Error::other("another file system is mounted over it");
    }
    Err(last)
}

/// File systems at rest. Dropping it lets their writers go on.
pub struct FrozenFileSystems {
    targets: Vec<(Target, OwnedFd)>,
    page: Arc<SharedPage>,
    guard: Option<Guard>,
    since: Monotonic,
    not_frozen: Vec<String>,
}

impl FrozenFileSystems {
    fn freeze_one(&mut self, index: usize) -> Result<(), FreezeProblem> {
        let (target, fd) = &self.targets[index];
        let state = self.page.file_system(index);
        // Before the call: whoever dies in it leaves a file system that is to be thawed.
        state.store(FROZEN, Ordering::SeqCst);
        let Err(error) = page::freeze(fd.as_fd()) else { return Ok(()) };
        state.store(UNTOUCHED, Ordering::SeqCst);
        match Errno::from_io_error(&error) {
            Some(Errno::BUSY) => Err(FreezeProblem::FrozenByOthers(target.to_string())),
            // FAT and the like: flushed, and nobody promised more of them.
            Some(Errno::OPNOTSUPP) => {
                self.not_frozen.push(target.to_string());
                Ok(())
            }
            _ => Err(FreezeProblem::Refused { target: target.to_string(), source: error }),
        }
    }

    /// Those that were flushed only, because their kind cannot be frozen.
    pub fn not_frozen(&self) -> &[String] {
        &self.not_frozen
    }

    /// How many are frozen.
    pub fn count(&self) -> usize {
        self.targets.len() - self.not_frozen.len()
    }

    /// What a marker that claims this rest has to be written under.
    pub fn at_rest(&self) -> AtRest {
        AtRest(self.page.clone())
    }

    /// Lets their writers go on. For how long they waited, and whether nobody let them go on before.
    pub fn thaw(mut self, clock: &dyn Clock) -> (Duration, bool) {
        let held = self.release();
        (clock.monotonic().since(self.since), held)
    }

    fn release(&mut self) -> bool {
        let Some(guard) = self.guard.take() else { return false };
        let mut held = self.end_claims();
        // Thawing what lies on a file writes to the file system below, which was frozen after it.
        for (index, (target, fd)) in self.targets.iter().enumerate().rev() {
            let state = self.page.file_system(index);
            if state.load(Ordering::SeqCst) == UNTOUCHED {
                continue;
            }
            if let Err(error) = page::thaw(fd.as_fd()) {
                held = false;
                // Thawed before, by the guard or by hand.
                if Errno::from_io_error(&error) != Some(Errno::INVAL) {
                    tracing::error!(%target, %error, "a file system could not be thawed; use `fsfreeze --unfreeze`");
                }
            }
            state.store(UNTOUCHED, Ordering::SeqCst);
        }
        drop(guard);
        held
    }

    /// From here on nobody claims rest. Whether everything was at rest until now.
    fn end_claims(&self) -> bool {
        let phase = self.page.phase();
        // Writing a marker takes microseconds; only a thread that is not run at all takes longer.
        for _ in 0..200 {
            let end = |phase| (phase != MARKING).then_some(OVER);
            match phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, end) {
                Ok(before) => return before != OVER,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        phase.store(OVER, Ordering::SeqCst);
        false
    }
}

impl Drop for FrozenFileSystems {
    fn drop(&mut self) {
        self.release();
    }
}

/// The right to claim, in a marker, that file systems are at rest; void once they may be written to.
#[derive(Clone)]
pub struct AtRest(Arc<SharedPage>);

impl AtRest {
    /// Writes a marker by `mark` while the guard holds still. `None`: the time was over, and nothing was written.
    /// Otherwise what `mark` said, and whether the file systems were at rest until it had ended.
    pub fn claim<T>(&self, mark: impl FnOnce() -> T) -> Option<(T, bool)> {
        let phase = self.0.phase();
        let begun = phase.compare_exchange(RESTING, MARKING, Ordering::SeqCst, Ordering::SeqCst);
        let again = begun.or_else(|_| phase.compare_exchange(MARKED, MARKING, Ordering::SeqCst, Ordering::SeqCst));
        again.ok()?;
        let said = mark();
        let held = phase.compare_exchange(MARKING, MARKED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        Some((said, held))
    }
}

/// Thaws the file systems mounted at `mount_points`, which an agent left frozen that has ended. Those that were.
pub fn thaw_left_over(mount_points: &[PathBuf]) -> Vec<PathBuf> {
    let thawed = mount_points.iter().rev().filter(|place| {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(*place, flags, Mode::empty());
        fd.is_ok_and(|fd| page::thaw(fd.as_fd()).is_ok())
    });
    thawed.cloned().collect()
}
