//! What can go wrong in a life, what a life saw, and how a broken promise is told.

use std::collections::BTreeMap;
use std::fmt;

use crate::planted::Bug;

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What can go wrong, and how often it did.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        #[allow(missing_docs)]
        pub enum Fault { $($(#[$doc])* $name),* }

        impl Fault {
            /// All faults.
            pub const ALL: &[Fault] = &[$(Fault::$name),*];
        }
    };
}

faults! {
    LinkLost, LinkStalled, AgentKilled, SourcePowerCut, SourceReverted, WriteFailed, SectorUnreadable, RingOverflow,
    ServerKilled, ServerPowerCut, ServerLost, ServerSuspended, MovedByForce, VaultPowerCut, StoreRefused, AnswerLost,
    Garbage, SourceClockJump, ServerClockJump, NameTaken, BranchKilled, BranchPowerCut, SiteLost, HomeKilled,
    HomePowerCut, HomeLinkLost, HomeLinkStalled, StaleWriterFenced, MovedDrained, AgentRestarted, DiskAdded, DiskGrown,
    DiskUsedMeanwhile, DiskRemoved, FailoverClosed, FailoverCancelled, FailoverCommitted,
    /// A server could not open a generation, or does not know that it has.
    OpeningFailed,
    /// The ring was seen to overflow.
    RingBroke,
}

/// How much heal data may be under way in a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// More than its disks hold, as on machines whose heals are small.
    Wide,
    /// So little that heals take many turns and end only by what is credited, as on real disks.
    Narrow,
}

impl Width {
    /// Every third life is narrow, unless somebody wishes otherwise.
    pub fn of(seed: u64) -> Width {
        if seed.is_multiple_of(3) { Width::Narrow } else { Width::Wide }
    }

    pub(super) fn heal_window_bytes(self) -> u64 {
        match self {
            Width::Wide => replication::limits::HEAL_WINDOW_BYTES,
            Width::Narrow => 32 << 10,
        }
    }
}

/// What was planned, with nothing else around it that could have opened a gap: none may open.
#[derive(Debug, Clone, Copy, Default)]
pub struct Undisturbed {
    /// Drained moves to the other server.
    pub moves: u64,
    /// Restarts of the agent in order.
    pub restarts: u64,
}

/// What a run saw.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// How often each fault occurred.
    pub faults: BTreeMap<Fault, u64>,
    /// Points announced and judged.
    pub points: u64,
    /// Those among them that lack ranges, and say so.
    pub partial_points: u64,
    /// Bytes of disk that scrubs found equal to the vault.
    pub scrubbed_bytes: u64,
    /// Gaps recorded.
    pub gaps: u64,
    /// Manifests committed.
    pub manifests: u64,
    /// Branches opened.
    pub branches: u64,
    /// How often the machine came home from a branch.
    pub returns: u64,
    /// What was planned and had nothing else around it that could have opened a gap.
    pub undisturbed: Undisturbed,
    /// Digest of everything that happened: equal for equal seeds.
    pub trace: u64,
}

impl Report {
    /// Adds what another run saw. Traces of different runs have no sum.
    pub fn add(&mut self, other: &Report) {
        for (fault, count) in &other.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
        self.points += other.points;
        self.partial_points += other.partial_points;
        self.scrubbed_bytes += other.scrubbed_bytes;
        self.gaps += other.gaps;
        self.manifests += other.manifests;
        self.undisturbed.moves += other.undisturbed.moves;
        self.undisturbed.restarts += other.undisturbed.restarts;
        self.branches += other.branches;
        self.returns += other.returns;
    }
}

/// A broken promise, with the command that shows it again.
#[derive(Debug, Clone)]
pub struct Violation {
    /// The run.
    pub seed: u64,
    /// How it was lived.
    pub width: Width,
    /// Simulated time in nanoseconds.
    pub at_ns: u64,
    /// What was promised and what was found.
    pub what: String,
    /// The planted bug, if any.
    pub bug: Option<Bug>,
}

impl Violation {
    /// Something about a whole run, such as a panic of the code under test.
    pub fn of_run((seed, width): (u64, Width), bug: Option<Bug>, what: String) -> Violation {
        Violation { seed, width, at_ns: 0, what, bug }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.at_ns as f64 / 1e9;
        writeln!(f, "seed {} at {seconds:.3} s: {}", self.seed, self.what)?;
        let planted = self.bug.map(|bug| format!(" --plant {bug:?}")).unwrap_or_default();
        let width = match (self.width, Width::of(self.seed)) {
            (Width::Narrow, _) => " --narrow",
            (Width::Wide, Width::Narrow) => " --wide",
            (Width::Wide, Width::Wide) => "",
        };
        write!(f, "  replay: cargo run --release -p sim -- --seed {}{width}{planted}", self.seed)
    }
}
