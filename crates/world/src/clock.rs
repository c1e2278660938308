//! Time, as two different things: a monotonic reading that orders events on one machine since its boot, and a wall
//! time that is only ever an annotation for people.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nanoseconds since an unspecified start on this machine. Never goes backwards within one boot; readings of two
/// machines or two boots are not comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Monotonic(pub u64);

impl Monotonic {
    /// The time passed since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Monotonic) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// This reading advanced by `by`.
    pub fn plus(self, by: Duration) -> Monotonic {
        Monotonic(self.0.saturating_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// Nanoseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WallTime(pub u64);

impl WallTime {
    /// Whole seconds since 1970-01-01 UTC.
    pub fn seconds(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// The first instant of second `seconds`.
    pub fn from_seconds(seconds: u64) -> WallTime {
        WallTime(seconds.saturating_mul(1_000_000_000))
    }
}

impl fmt::Display for WallTime {
    /// `2026-11-22 14:03:07.123 UTC`, the form in which every message of the product gives a moment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = civil_from_days(self.seconds() / 86_400);
        let second_of_day = self.seconds() % 86_400;
        write!(
            f,
            "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{:03} UTC",
            second_of_day / 3600,
            second_of_day / 60 % 60,
            second_of_day % 60,
            self.0 / 1_000_000 % 1000
        )
    }
}

/// Days since 1970-01-01 to `(year, month, day)` of the proleptic Gregorian calendar.
///
/// Counts in 400-year eras that begin on 1 March, where the leap day comes last and needs no special case.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// The passage of time.
pub trait Clock: Send + Sync {
    /// A reading that never goes backwards while this machine is up.
    fn monotonic(&self) -> Monotonic;

    /// What the machine believes the time of day to be. May jump either way at any moment.
    fn wall(&self) -> WallTime;
}

/// The clocks of this machine: `CLOCK_BOOTTIME`-like for [`Clock::monotonic`] and `CLOCK_REALTIME` for
/// [`Clock::wall`].
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn monotonic(&self) -> Monotonic {
        // BOOTTIME keeps counting through suspend; a suspended machine must not look as if no time had passed.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Monotonic((now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64)
    }

    #[allow(clippy::disallowed_methods)]
    fn wall(&self) -> WallTime {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallTime(u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_time_reads_as_people_write_it() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00.000 UTC"),
            (951_782_400, "2000-02-29 00:00:00.000 UTC"),
            (1_795_356_187, "2026-11-22 14:03:07.000 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00.000 UTC"),
        ] {
            assert_eq!(WallTime::from_seconds(seconds).to_string(), text);
        }
    }

    #[test]
    fn monotonic_differences_never_underflow() {
        assert_eq!(Monotonic(5).since(Monotonic(9)), Duration::ZERO);
        assert_eq!(Monotonic(9).since(Monotonic(5)), Duration::from_nanos(4));
    }
}
