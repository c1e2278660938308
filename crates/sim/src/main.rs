//! `sim`: many simulated lives, one line of sums, and for each broken promise the command that shows it again.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use sim::life::{Fault, Report, Undisturbed, Violation, Width, run};
use sim::planted::{ALL, Bug};

/// Lives within which each planted bug must be caught.
const PLANTED_SEEDS: u64 = 200;

struct Options {
    first: u64,
    count: u64,
    bug: Option<Bug>,
    planted: bool,
    within: u64,
    twice: bool,
    /// How every life is lived, if that is not left to its seed.
    width: Option<Width>,
}

impl Options {
    /// The life with this seed.
    fn life(&self, seed: u64) -> (u64, Width) {
        (seed, self.width.unwrap_or(Width::of(seed)))
    }
}

fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!(
                "error: {problem}\n  usage: sim [--seeds N] [--from N] [--seed N] [--narrow|--wide] [--once] [--plant BUG] \
                 [--planted [--within N]]"
            );
            return ExitCode::from(2);
        }
    };
    let healthy = options.count == 0 || lives(&options);
    let caught = !options.planted || planted(&options);
    if healthy && caught { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let (within, width) = (PLANTED_SEEDS, None);
    let mut options = Options { first: 1, count: 100, bug: None, planted: false, within, twice: true, width };
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
            "--within" => options.within = number()?,
            "--once" => options.twice = false,
            "--narrow" => options.width = Some(Width::Narrow),
            "--wide" => options.width = Some(Width::Wide),
            other => return Err(format!("there is no option {other}")),
        }
    }
    Ok(options)
}

/// Runs every seed on all cores. Every tenth runs twice and must do exactly the same.
fn lives(options: &Options) -> bool {
    let sums: Mutex<Report> = Mutex::default();
    let next = AtomicU64::new(options.first);
    let failures = AtomicU64::new(0);
    on_all_cores(|| {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= options.first + options.count {
                return;
            }
            match live(seed, options) {
                Ok(report) => sums.lock().expect("nothing panics while holding the sums").add(&report),
                Err(violation) => {
                    failures.fetch_add(1, Ordering::Relaxed);
                    eprintln!("{violation}");
                }
            }
        }
    });
    let failures = failures.into_inner();
    let sum = sums.into_inner().expect("nothing panics while holding the sums");
    let count = |fault: &Fault| sum.faults.get(fault).copied().unwrap_or(0);
    let counts: Vec<_> = Fault::ALL.iter().map(|fault| format!("{fault:?} {}", count(fault))).collect();
    println!("faults: {}", counts.join(", "));
    let Report { points, partial_points, gaps, manifests, scrubbed_bytes, .. } = sum;
    println!("{points} points judged, {partial_points} of them lacking ranges; {gaps} gaps, {manifests} manifests");
    let Undisturbed { moves, restarts } = sum.undisturbed;
    println!("with nothing else around them: {moves} drained moves, {restarts} restarts of the agent");
    println!("scrubs found {} MiB equal beside the workload, and nothing else", scrubbed_bytes >> 20);
    println!("{} branches opened, {} returns from one", sum.branches, sum.returns);
    println!("sim: {} passed, {failures} failed", options.count - failures);
    let missing: Vec<_> = Fault::ALL.iter().filter(|fault| count(fault) == 0).collect();
    if options.count >= 20 && options.bug.is_none() {
        if !missing.is_empty() {
            eprintln!("error: these faults never occurred: {missing:?}");
            return false;
        }
        if [moves, restarts, partial_points, scrubbed_bytes].contains(&0) {
            eprintln!("error: nothing was judged of what is planned, or no point that lacks ranges, or no scrub");
            return false;
        }
    }
    failures == 0
}

fn live(seed: u64, options: &Options) -> Result<Report, Violation> {
    let life = options.life(seed);
    let report = caught(life, options.bug)?;
    if options.twice && seed.is_multiple_of(10) && caught(life, options.bug)?.trace != report.trace {
        return Err(Violation::of_run(life, options.bug, "two runs did not do the same".into()));
    }
    Ok(report)
}

/// A panic of the code under test is a violation too.
fn caught(life: (u64, Width), bug: Option<Bug>) -> Result<Report, Violation> {
    std::panic::catch_unwind(|| run(life, bug)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let what = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Violation::of_run(life, bug, format!("panic: {}", what.unwrap_or_default())))
    })
}

/// Every planted bug must be caught within so many lives. Each core takes the next bug, and a bug's lives end with the
/// first that catches it.
fn planted(options: &Options) -> bool {
    let seeds = options.within;
    // Half of the bugs end in a panic of the code they were put into; what it says is in the violation.
    std::panic::set_hook(Box::new(|_| {}));
    let next = AtomicUsize::new(0);
    let missed = AtomicUsize::new(0);
    on_all_cores(|| {
        while let Some(&bug) = ALL.get(next.fetch_add(1, Ordering::Relaxed)) {
            match (1..=seeds).find_map(|seed| caught(options.life(seed), Some(bug)).err()) {
                Some(violation) => println!("planted {bug:?}: caught by {}", shortened(&violation)),
                None => {
                    missed.fetch_add(1, Ordering::Relaxed);
                    let replay = format!("cargo run --release -p sim -- --plant {bug:?} --seeds {seeds} --once");
                    println!("planted {bug:?}: NOT CAUGHT within {seeds} seeds\n  replay: {replay}");
                }
            }
        }
    });
    drop(std::panic::take_hook());
    let missed = missed.into_inner();
    println!("planted: {} caught, {missed} missed", ALL.len() - missed);
    missed == 0
}

fn shortened(violation: &Violation) -> String {
    let what = violation.what.chars().take(160).collect();
    Violation { what, ..violation.clone() }.to_string()
}

fn on_all_cores(work: impl Fn() + Sync) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(&work);
        }
    });
}
