//! How fast a heal may read, so that the machine it runs on is not hurt: bytes a second, and a share of the time.
//!
//! Pure. Two buckets that fill with time and are emptied by reading: each holds as much as [`BURST`] is worth, and whoever
//! reads more than there is goes into debt, which time pays off. The live stream is never asked.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use world::Monotonic;

/// How much reading may be saved up.
const BURST: Duration = Duration::from_millis(100);

/// The caps on reading for heals, as configured. The default is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HealLimits {
    /// Megabytes (10^6 bytes) of disk read a second. None: as fast as the disk gives.
    #[serde(default)]
    pub heal_read_mb_per_s_max: Option<u32>,
    /// Percent of one core's time spent on reading and hashing, waiting for the disk included. None: all of it.
    #[serde(default)]
    pub heal_busy_percent_max: Option<u8>,
}

/// See the module's documentation.
#[derive(Debug, Clone, Default)]
pub struct HealPace {
    limits: HealLimits,
    /// When everything read so far is paid for, by bytes and by time.
    bytes_paid: Monotonic,
    time_paid: Monotonic,
}

impl HealPace {
    /// A pace within `limits`, all of which are above zero.
    pub fn new(limits: HealLimits) -> HealPace {
        HealPace { limits, ..HealPace::default() }
    }

    /// Whether the next chunk may be read at `now`.
    pub fn allows(&self, now: Monotonic) -> bool {
        let ahead = now.plus(BURST);
        self.bytes_paid <= ahead && self.time_paid <= ahead
    }

    /// `bytes` of disk were read, from `began` to `ended`.
    pub fn spent(&mut self, began: Monotonic, ended: Monotonic, bytes: u64) {
        if let Some(rate) = self.limits.heal_read_mb_per_s_max {
            // A microsecond is worth as many bytes as a second is megabytes.
            let cost = Duration::from_nanos(bytes.saturating_mul(1000) / u64::from(rate.max(1)));
            self.bytes_paid = self.bytes_paid.max(began).plus(cost);
        }
        if let Some(percent) = self.limits.heal_busy_percent_max {
            let taken = ended.since(began).as_nanos() as u64;
            let cost = Duration::from_nanos(taken.saturating_mul(100) / u64::from(percent.max(1)));
            self.time_paid = self.time_paid.max(began).plus(cost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn limits(rate: Option<u32>, percent: Option<u8>) -> HealLimits {
        HealLimits { heal_read_mb_per_s_max: rate, heal_busy_percent_max: percent }
    }

    /// Reads whenever it may, `chunk` bytes at a time in `takes` nanoseconds each, looking every `poll` nanoseconds. Every
    /// read: when it began, how long it took, how much it was.
    fn read_all(limits: HealLimits, chunk: u64, takes: u64, poll: u64, until: u64) -> Vec<(u64, u64, u64)> {
        let mut pace = HealPace::new(limits);
        let (mut now, mut reads) = (0, Vec::new());
        while now < until {
            if pace.allows(Monotonic(now)) {
                pace.spent(Monotonic(now), Monotonic(now + takes), chunk);
                reads.push((now, takes, chunk));
                now += takes;
            }
            now += poll;
        }
        reads
    }

    #[test]
    fn without_limits_nothing_waits() {
        assert_eq!(read_all(limits(None, None), 1 << 20, 1000, 1, SECOND / 1000).len(), 1000);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Counted over every window, and over the whole: never more than allowed, and almost all that is.
        #[test]
        fn limits_hold_in_every_window_and_are_used(
            rate in 1u32..2000,
            percent in 1u8..=100,
            chunk_kib in 64u64..1024,
            takes in 10_000u64..5_000_000,
            poll in 1_000u64..10_000_000,
        ) {
            let chunk = chunk_kib << 10;
            let until = 20 * SECOND;
            let reads = read_all(limits(Some(rate), Some(percent)), chunk, takes, poll, until);
            let burst = BURST.as_nanos() as u64;
            for (index, first) in reads.iter().enumerate().step_by(1 + reads.len() / 50) {
                for window in [SECOND / 10, SECOND, 5 * SECOND] {
                    let within = reads[index..].iter().take_while(|(at, ..)| *at < first.0 + window);
                    let (bytes, time) = within.fold((0, 0), |sum, read| (sum.0 + read.2, sum.1 + read.1));
                    let allowed = u64::from(rate) * 1000 * (window + burst) / 1_000_000 + 2 * chunk;
                    prop_assert!(bytes <= allowed, "{bytes} bytes in {window} ns, {allowed} allowed");
                    let allowed = u64::from(percent) * (window + burst) / 100 + 2 * takes;
                    prop_assert!(time <= allowed, "{time} ns in {window} ns, {allowed} allowed");
                }
            }
            // As fast as the tighter of the limits, or as looking and reading take.
            let by_rate = chunk * 1000 / u64::from(rate);
            let each = by_rate.max(takes * 100 / u64::from(percent)).max(takes + poll);
            let expected = until / each;
            // Whoever looks seldom loses what does not fit into the burst.
            let slack = if poll + takes > burst / 2 { 3 } else { 1 };
            prop_assert!(reads.len() as u64 * 10 + 20 >= expected * 9 / slack, "{} reads, {expected} expected", reads.len());
        }
    }
}
