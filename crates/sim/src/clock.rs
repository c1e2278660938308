//! Virtual time: one true time, and clocks that see it with an offset of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use world::{Clock, Monotonic, WallTime};

/// Where every simulation begins: 2026-11-22 00:00:00 UTC.
pub const START_WALL_NS: u64 = 1_795_305_600_000_000_000;

/// The world's true time in nanoseconds since its start. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct TrueTime(Arc<AtomicU64>);

impl TrueTime {
    /// Nanoseconds since the world began.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Lets `by` nanoseconds pass.
    pub fn advance(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }
}

/// The clock of one machine. Its monotonic reading restarts with each boot; its wall reading may be wrong and jump.
#[derive(Debug, Clone)]
pub struct SimClock {
    time: TrueTime,
    booted_at: u64,
    wall_error_ns: Arc<AtomicI64>,
}

impl SimClock {
    /// The clock of a machine that boots now.
    pub fn booting_now(time: &TrueTime) -> SimClock {
        SimClock { time: time.clone(), booted_at: time.now(), wall_error_ns: Arc::default() }
    }

    /// Makes the wall clock wrong by `error_ns` from now on.
    pub fn set_wall_error(&self, error_ns: i64) {
        self.wall_error_ns.store(error_ns, Ordering::Relaxed);
    }

    /// Forgets uptime, as a reboot does.
    pub fn reboot(&mut self) {
        self.booted_at = self.time.now();
    }
}

impl Clock for SimClock {
    fn monotonic(&self) -> Monotonic {
        // A machine is never younger than a second when its agent starts.
        Monotonic(self.time.now() - self.booted_at + 1_000_000_000)
    }

    fn wall(&self) -> WallTime {
        let wall = START_WALL_NS + self.time.now();
        WallTime(wall.saturating_add_signed(self.wall_error_ns.load(Ordering::Relaxed)))
    }
}
