//! When points are taken on schedule. Pure; a thread of the service waits and asks.

use std::time::Duration;

use world::Monotonic;

use super::settings::ConsistencyConfig;

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// A crash-consistent marker.
    Crash,
    /// An application-consistent point.
    Application,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Schedule {
    /// An application-consistent point stands for a crash-consistent one of the same moment: it comes first.
    lines: Vec<Line>,
}

#[derive(Debug)]
struct Line {
    due: Due,
    every: Duration,
    next: Monotonic,
}

impl Schedule {
    /// A schedule that begins `now`; `None` if nothing is ever due.
    pub(crate) fn new(config: &ConsistencyConfig, now: Monotonic) -> Option<Schedule> {
        let wanted = [(Due::Application, config.application_every_s), (Due::Crash, config.crash_every_s)];
        let lines: Vec<Line> = wanted
            .into_iter()
            .filter(|(_, every_s)| *every_s > 0)
            .map(|(due, every_s)| Line { due, every: Duration::from_secs(every_s), next: now })
            .map(|line| Line { next: now.plus(line.every), ..line })
            .collect();
        (!lines.is_empty()).then_some(Schedule { lines })
    }

    /// How long nothing is due.
    pub(crate) fn wait(&self, now: Monotonic) -> Duration {
        self.lines.iter().map(|line| line.next.since(now)).min().expect("a schedule has a line")
    }

    /// What is due now. What was missed, by sleep or by a point that took long, is not made up for.
    pub(crate) fn due(&mut self, now: Monotonic) -> Option<Due> {
        let mut found = None;
        for line in self.lines.iter_mut().filter(|line| line.next <= now) {
            let missed = now.since(line.next).as_nanos() / line.every.as_nanos();
            line.next = line.next.plus(line.every * u32::try_from(missed + 1).unwrap_or(u32::MAX));
            found.get_or_insert(line.due);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(crash: u64, application: u64) -> ConsistencyConfig {
        ConsistencyConfig { crash_every_s: crash, application_every_s: application, ..ConsistencyConfig::default() }
    }

    fn at(seconds: u64) -> Monotonic {
        Monotonic(seconds * 1_000_000_000)
    }

    #[test]
    fn points_come_when_they_are_due() {
        assert!(Schedule::new(&config(0, 0), at(0)).is_none());
        let mut schedule = Schedule::new(&config(10, 30), at(100)).expect("a schedule");
        assert_eq!((schedule.due(at(100)), schedule.wait(at(100))), (None, Duration::from_secs(10)));
        let seen: Vec<_> = (100..=160).filter_map(|now| Some((now, schedule.due(at(now))?))).collect();
        let expected = [
            (110, Due::Crash),
            (120, Due::Crash),
            (130, Due::Application),
            (140, Due::Crash),
            (150, Due::Crash),
            (160, Due::Application),
        ];
        assert_eq!(seen, expected);
        // A machine that slept for a day has no day to make up for.
        assert_eq!(schedule.due(at(90_001)), Some(Due::Application));
        assert_eq!(schedule.due(at(90_001)), None);
        assert_eq!(schedule.due(at(90_010)), Some(Due::Application), "in step with the beginning");
    }

    proptest! {
        #[test]
        fn no_line_is_forgotten(crash in 1u64..50, application in 10u64..200, looks in prop::collection::vec(1u64..300, 1..60)) {
            let mut schedule = Schedule::new(&config(crash, application), at(0)).expect("a schedule");
            let mut now = 0;
            for step in looks {
                now += step;
                let before = now - step;
                let crossed = |every: u64| now / every > before / every;
                let expected = if crossed(application) {
                    Some(Due::Application)
                } else {
                    crossed(crash).then_some(Due::Crash)
                };
                prop_assert_eq!(schedule.due(at(now)), expected);
                prop_assert_eq!(schedule.due(at(now)), None);
                let next = ((now / crash + 1) * crash).min((now / application + 1) * application);
                prop_assert_eq!(schedule.wait(at(now)), Duration::from_secs(next - now));
            }
        }
    }
}
