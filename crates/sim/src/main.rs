//! `sim`: many simulated lives, one line of sums, and for each broken promise the command that shows it again.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use sim::life::{Fault, Report, Violation, run};
use sim::planted::{ALL, Bug};

struct Options {
    first: u64,
    count: u64,
    bug: Option<Bug>,
    planted: bool,
    twice: bool,
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("error: {problem}\n  usage: sim [--seeds N] [--from N] [--seed N] [--plant BUG] [--planted]");
            return ExitCode::from(2);
        }
    };
    let healthy = lives(&options);
    let caught = !options.planted || planted(200);
    if healthy && caught { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { first: 1, count: 100, bug: None, planted: false, twice: true };
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<u64, String> {
            let value = arguments.next().ok_or(format!("{argument} needs a number"))?;
            value.parse().map_err(|_| format!("{value} is no number"))
        };
        match argument.as_str() {
            "--seeds" => options.count = number()?,
            "--from" => options.first = number()?,
            "--seed" => {
                options.first = number()?;
                options.count = 1;
            }
            "--plant" => options.bug = Some(arguments.next().ok_or("--plant needs a bug's name")?.parse()?),
            "--planted" => options.planted = true,
            "--once" => options.twice = false,
            other => return Err(format!("there is no option {other}")),
        }
    }
    Ok(options)
}

/// Runs every seed on all cores. Every tenth runs twice and must do exactly the same.
fn lives(options: &Options) -> bool {
    let sums: Mutex<(BTreeMap<Fault, u64>, Report)> = Mutex::default();
    let next = AtomicU64::new(options.first);
    let failures = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= options.first + options.count {
                        return;
                    }
                    match live(seed, options) {
                        Ok(report) => add(&sums, &report),
                        Err(violation) => {
                            failures.fetch_add(1, Ordering::Relaxed);
                            eprintln!("{violation}");
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner();
    let (faults, sum) = sums.into_inner().unwrap_or_default();
    println!(
        "faults: {}",
        Fault::ALL
            .iter()
            .map(|fault| { format!("{fault:?} {}", faults.get(fault).copied().unwrap_or(0)) })
            .collect::<Vec<_>>()
            .join(", ")
    );
    println!("{} points judged, {} gaps, {} manifests", sum.points, sum.gaps, sum.manifests);
    println!("sim: {} passed, {failures} failed", options.count - failures);
    let missing: Vec<_> = Fault::ALL.iter().filter(|fault| faults.get(fault).copied().unwrap_or(0) == 0).collect();
    if options.count >= 20 && options.bug.is_none() && !missing.is_empty() {
        eprintln!("error: these faults never occurred: {missing:?}");
        return false;
    }
    failures == 0
}

fn live(seed: u64, options: &Options) -> Result<Report, Violation> {
    let report = caught(seed, options.bug)?;
    if options.twice && seed.is_multiple_of(10) {
        let again = caught(seed, options.bug)?;
        assert_eq!(report.trace, again.trace, "seed {seed} did not do the same twice");
    }
    Ok(report)
}

/// A panic of the code under test is a violation too.
fn caught(seed: u64, bug: Option<Bug>) -> Result<Report, Violation> {
    std::panic::catch_unwind(|| run(seed, bug)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let what = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Violation::panicked(seed, bug, what.unwrap_or_default()))
    })
}

fn add(sums: &Mutex<(BTreeMap<Fault, u64>, Report)>, report: &Report) {
    let mut sums = sums.lock().expect("nothing panics while holding the sums");
    for (fault, count) in &report.faults {
        *sums.0.entry(*fault).or_default() += count;
    }
    sums.1.points += report.points;
    sums.1.gaps += report.gaps;
    sums.1.manifests += report.manifests;
}

/// Every planted bug must be caught within `seeds` lives.
fn planted(seeds: u64) -> bool {
    std::panic::set_hook(Box::new(|_| {}));
    let mut all = true;
    for bug in ALL {
        match (1..=seeds).find_map(|seed| caught(seed, Some(bug)).err()) {
            Some(violation) => {
                println!("planted {bug:?}: caught by seed {}: {}", violation.seed, first_line(&violation))
            }
            None => {
                all = false;
                println!("planted {bug:?}: NOT CAUGHT within {seeds} seeds");
            }
        }
    }
    all
}

fn first_line(violation: &Violation) -> String {
    violation.what.chars().take(120).collect()
}
