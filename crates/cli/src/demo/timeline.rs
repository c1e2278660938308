//! The picture of a run: what was written, how full the ring was, how old the newest point was, and where points exist.

use std::fmt::Write as _;

/// What was seen at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Sample {
    /// Milliseconds since the start.
    pub(crate) at_ms: u64,
    /// Writes acknowledged to the workload so far.
    pub(crate) writes: u64,
    /// How much of the ring is in use, in percent.
    pub(crate) ring_percent: u64,
    /// Changes captured but not yet durable on the process server.
    pub(crate) unjournaled: u64,
    /// Changes captured but not yet in the vault.
    pub(crate) uncommitted: u64,
    /// Age of the newest moment that could be recovered, in milliseconds; `None` before the first point.
    pub(crate) rpo_ms: Option<u64>,
}

/// Something that happened at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) at_ms: u64,
    pub(crate) what: String,
}

/// A stretch without points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hole {
    pub(crate) from_ms: u64,
    pub(crate) to_ms: u64,
    pub(crate) cause: String,
}

/// Everything a picture is drawn from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timeline {
    pub(crate) samples: Vec<Sample>,
    pub(crate) events: Vec<Event>,
    /// Where no point can be opened.
    pub(crate) holes: Vec<Hole>,
    /// The first and the last moment with a point, of each line of history that was followed.
    pub(crate) stretches: Vec<(u64, u64)>,
    /// Length of the run in milliseconds.
    pub(crate) total_ms: u64,
}

const LABEL: usize = 11;
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

impl Timeline {
    /// The picture, at most `columns` wide.
    pub(crate) fn render(&self, columns: usize) -> String {
        // Values and units stand to the right of the rows.
        let width = columns.saturating_sub(LABEL + 26).clamp(20, 160);
        let mut text = String::new();
        self.ruler(width, &mut text);
        let writes = self.buckets(width, |before, sample| {
            let ms = sample.at_ms.saturating_sub(before.at_ms).max(1);
            Some(sample.writes.saturating_sub(before.writes) * 1000 / ms)
        });
        row("writes", &writes, &mut text, |max| format!("max {max}/s"));
        let ring = self.buckets(width, |_, sample| Some(sample.ring_percent));
        row("ring", &ring, &mut text, |max| format!("max {max} % full"));
        let unjournaled = self.buckets(width, |_, sample| Some(sample.unjournaled));
        row("unjournaled", &unjournaled, &mut text, |max| format!("max {max} changes"));
        let uncommitted = self.buckets(width, |_, sample| Some(sample.uncommitted));
        row("uncommitted", &uncommitted, &mut text, |max| format!("max {max} changes"));
        let rpo = self.buckets(width, |_, sample| sample.rpo_ms);
        row("RPO", &rpo, &mut text, |max| format!("max {:.1} s", max as f64 / 1000.0));
        self.points(width, &mut text);
        self.events(width, &mut text);
        text
    }

    fn column(&self, at_ms: u64, width: usize) -> usize {
        let column = at_ms * width as u64 / self.total_ms.max(1);
        (column as usize).min(width - 1)
    }

    fn ruler(&self, width: usize, text: &mut String) {
        let step =
            [1, 2, 5, 10, 20, 30, 60, 120].into_iter().find(|step| self.total_ms / 1000 / step <= 8).unwrap_or(300);
        let mut line = vec![' '; width + 6];
        for second in (0..=self.total_ms / 1000).step_by(step as usize) {
            let column = self.column(second * 1000, width);
            for (place, letter) in line[column..].iter_mut().zip(format!("{second} s").chars()) {
                *place = letter;
            }
        }
        let line: String = line.into_iter().collect();
        writeln!(text, "{:LABEL$} {}", "", line.trim_end()).expect("writing to a string does not fail");
    }

    /// The largest value of `measure` per column; gets the sample before and the sample.
    fn buckets(&self, width: usize, measure: impl Fn(&Sample, &Sample) -> Option<u64>) -> Vec<Option<u64>> {
        let mut buckets: Vec<Option<u64>> = vec![None; width];
        let mut before = Sample::default();
        for sample in &self.samples {
            let value = measure(&before, sample);
            // A sample speaks for the time since the one before it.
            let columns = self.column(before.at_ms, width)..=self.column(sample.at_ms, width);
            for bucket in &mut buckets[columns] {
                *bucket = (*bucket).max(value);
            }
            before = *sample;
        }
        buckets
    }

    fn points(&self, width: usize, text: &mut String) {
        let mut line = vec![' '; width];
        for (first, last) in &self.stretches {
            let first = self.column(*first, width);
            line[first..=self.column(*last, width).max(first)].fill('━');
        }
        for hole in &self.holes {
            line[self.column(hole.from_ms, width)..=self.column(hole.to_ms, width)].fill('╌');
        }
        let line: String = line.into_iter().collect();
        let note = "━ any second  ╌ gap";
        writeln!(text, "{:LABEL$} {line}  {note}", "points").expect("writing to a string does not fail");
    }

    fn events(&self, width: usize, text: &mut String) {
        let mut line = vec![' '; width];
        for (index, event) in self.events.iter().enumerate() {
            line[self.column(event.at_ms, width)] = letter(index);
        }
        let line: String = line.into_iter().collect();
        writeln!(text, "{:LABEL$} {}", "events", line.trim_end()).expect("writing to a string does not fail");
        for (index, event) in self.events.iter().enumerate() {
            let seconds = event.at_ms as f64 / 1000.0;
            writeln!(text, "{:LABEL$} {} {seconds:6.1} s  {}", "", letter(index), event.what)
                .expect("writing to a string does not fail");
        }
        for hole in &self.holes {
            let (from, to) = (hole.from_ms as f64 / 1000.0, hole.to_ms as f64 / 1000.0);
            writeln!(text, "{:LABEL$} ╌ {from:6.1} s – {to:.1} s  gap: {}", "", hole.cause)
                .expect("writing to a string does not fail");
        }
    }
}

fn letter(index: usize) -> char {
    char::from(b'a' + (index % 26) as u8)
}

fn row(label: &str, buckets: &[Option<u64>], text: &mut String, note: impl Fn(u64) -> String) {
    let max = buckets.iter().flatten().copied().max().unwrap_or(0);
    let bars: String = buckets
        .iter()
        .map(|bucket| match bucket {
            None => ' ',
            Some(0) => BARS[0],
            Some(value) => BARS[(value * 7).div_ceil(max.max(1)) as usize],
        })
        .collect();
    writeln!(text, "{label:LABEL$} {bars}  {}", note(max)).expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: u64, writes: u64, ring_percent: u64, rpo_ms: Option<u64>) -> Sample {
        Sample { at_ms, writes, ring_percent, rpo_ms, ..Sample::default() }
    }

    #[test]
    fn a_run_is_drawn_to_scale() {
        let timeline = Timeline {
            samples: vec![
                sample(2500, 0, 0, None),
                sample(5000, 1000, 10, Some(1000)),
                sample(7500, 3000, 100, Some(4000)),
                sample(10_000, 3000, 0, Some(500)),
            ],
            events: vec![
                Event { at_ms: 5000, what: "the process server is killed".into() },
                Event { at_ms: 10_000, what: "end".into() },
            ],
            holes: vec![Hole { from_ms: 6000, to_ms: 7000, cause: "the ring was full".into() }],
            stretches: vec![(3000, 8000), (9000, 10_000)],
            total_ms: 10_000,
        };
        let expected = "\
            0 s     2 s     4 s     6 s     8 s     10 s
writes      ▁▁▁▁▁▁▁▁▁▁▅▅▅▅▅▅▅▅▅▅██████████▁▁▁▁▁▁▁▁▁  max 800/s
ring        ▁▁▁▁▁▁▁▁▁▁▂▂▂▂▂▂▂▂▂▂██████████▁▁▁▁▁▁▁▁▁  max 100 % full
unjournaled ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁  max 0 changes
uncommitted ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁  max 0 changes
RPO                   ▃▃▃▃▃▃▃▃▃▃██████████▂▂▂▂▂▂▂▂▂  max 4.0 s
points                  ━━━━━━━━━━━━╌╌╌╌╌━━━━   ━━━━  ━ any second  ╌ gap
events                          a                   b
            a    5.0 s  the process server is killed
            b   10.0 s  end
            ╌    6.0 s – 7.0 s  gap: the ring was full
";
        let got = timeline.render(40 + LABEL + 26);
        println!("{got}");
        let shape = |text: &str| {
            text.lines().map(|line| line.split_whitespace().next().unwrap_or("").to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(shape(&got), shape(expected));
        let points = |text: &str| text.lines().find(|line| line.starts_with("points")).map(str::to_owned);
        assert_eq!(points(&got), points(expected));
    }

    #[test]
    fn an_empty_run_is_drawn_too() {
        assert!(Timeline::default().render(80).lines().all(|line| line.chars().count() <= 80));
    }
}
