//! Opening a branch of a sparse 1 TiB disk that was sealed every five seconds for a day. The history is made by
//! `crates/recovery/tests/measure.rs`, which writes manifests faster than a day; it also counts requests.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::bench::promises::{Promise, Promised};
use crate::bench::{Case, Measured, Subject};
use crate::workspace::cargo;

pub(in crate::bench::cases) struct Day;

impl Case for Day {
    fn name(&self) -> &'static str {
        "farshore-day"
    }

    fn needs(&self) -> &'static [&'static str] {
        &[]
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn run(&self, _: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        println!("  making a day of history");
        measure_test("build_a_day", scratch)?;
        println!("  opening it");
        let said = measure_test("open_a_day", scratch)?;
        let mut measured = Measured::default();
        for moment in ["latest", "the middle of the day"] {
            let line = said.lines().find(|line| line.starts_with(&format!("{moment}: ")));
            let line = line.with_context(|| format!("the measurement says nothing about {moment}:\n{said}"))?;
            let opened = Opened::parse(line).with_context(|| format!("cannot understand: {line}"))?;
            let text = format!(
                "{moment}: {:.0} ms, {} requests, {} MiB resident",
                opened.seconds * 1000.0,
                opened.requests,
                opened.peak_mib
            );
            let kept = opened.seconds <= 1.0 && opened.peak_mib <= 200;
            measured.promises.push(Promise::new(Promised::OpenBranch, text, kept));
        }
        Ok(measured)
    }
}

/// Runs one of the measurements of branches, in a process of its own; returns what it prints.
fn measure_test(test: &str, folder: &Path) -> Result<String> {
    let mut command: Command = cargo();
    command.args(["test", "--release", "--package", "recovery", "--test", "measure", "--", "--exact", test]);
    let output = command.arg("--nocapture").env("FARSHORE_MEASURE", folder).output().context("cannot run cargo")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{test} failed:\n{said}{}", String::from_utf8_lossy(&output.stderr));
    Ok(said)
}

#[derive(Debug, PartialEq)]
struct Opened {
    seconds: f64,
    requests: u64,
    peak_mib: u64,
}

impl Opened {
    /// Reads `latest: opened in 12.3ms with 43 requests and 9 KiB; …; RSS 15 MiB, peak 17 MiB`.
    fn parse(line: &str) -> Option<Opened> {
        let after = |word: &str| line.split_once(word)?.1.trim_start().split([' ', ',', ';']).next();
        Some(Opened {
            seconds: seconds(after("opened in ")?)?,
            requests: after(" with ")?.parse().ok()?,
            peak_mib: after("peak ")?.parse().ok()?,
        })
    }
}

/// A duration as Rust prints it.
fn seconds(text: &str) -> Option<f64> {
    let (unit, scale) =
        [("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9), ("s", 1.0)].into_iter().find(|(unit, _)| text.ends_with(unit))?;
    Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_measurement_prints_is_understood() {
        let line = "latest: opened in 210.4ms with 43 requests and 977 KiB; first read 3.1ms; RSS 15 MiB, peak 17 MiB";
        assert_eq!(Opened::parse(line), Some(Opened { seconds: 0.2104, requests: 43, peak_mib: 17 }));
        assert_eq!(seconds("1.5s"), Some(1.5));
        assert_eq!(seconds("fast"), None);
    }
}
