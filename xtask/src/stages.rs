//! `cargo xtask test`: the stages in order, each timed, and at the end one table with every skip the tests reported.
//!
//! A failing stage does not stop the others, except that nothing which needs a build runs after a failed one. All
//! cargo commands name the whole workspace: naming one crate would choose other features and build everything twice.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bpf;
use crate::components::{self, Permission};
use crate::dist::{self, Built, Fetch};
use crate::kernels;
use crate::process::{self, find_program, run_watching};
use crate::skips::{self, AllowList};
use crate::tidy;
use crate::workspace::{Workspace, cargo};

/// Seeds of the simulation in a full and in a quick run.
const SEEDS: u32 = 200;
const SEEDS_QUICK: u32 = 20;

/// What the simulation, the demo and the independent check are called once they are there.
const SIMULATION: &str = "sim";
const INDEPENDENT_CHECK: &str = "tools/verify_second.py";

/// What the command line said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    only: Vec<String>,
    quick: bool,
    no_install: bool,
    list: bool,
    seeds: Option<u32>,
}

impl Options {
    /// # Errors
    /// A sentence about the wrong argument.
    pub(crate) fn parse(arguments: &[String]) -> Result<Options, String> {
        let mut options = Options::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--quick" => options.quick = true,
                "--no-install" => options.no_install = true,
                "--list" => options.list = true,
                "--seeds" => {
                    let seeds = value()?;
                    options.seeds = Some(seeds.parse().map_err(|_| format!("`{seeds}` is not a number of seeds"))?);
                }
                "--only" => {
                    let stage = value()?;
                    if !STAGES.iter().any(|known| known.name == stage) {
                        return Err(format!("there is no stage `{stage}`; see --list"));
                    }
                    options.only.push(stage.clone());
                }
                other => return Err(format!("`test` does not know {other}")),
            }
        }
        Ok(options)
    }

    fn wants(&self, stage: &Stage) -> bool {
        if self.only.is_empty() { !(self.quick && stage.slow) } else { self.only.iter().any(|name| name == stage.name) }
    }
}

/// One stage. To add one, write its function and a line in [`STAGES`].
struct Stage {
    name: &'static str,
    what: &'static str,
    /// Left out by `--quick`.
    slow: bool,
    /// Nothing after it can succeed if it fails.
    gate: bool,
    run: fn(&Session) -> Result<Outcome>,
}

const fn stage(name: &'static str, what: &'static str, run: fn(&Session) -> Result<Outcome>) -> Stage {
    Stage { name, what, slow: false, gate: false, run }
}

const STAGES: &[Stage] = &[
    stage("components", "programs the tests use are installed", components_stage),
    stage("fmt", "the code is formatted", format_stage),
    stage("tidy", "rules about the source tree", tidy_stage),
    stage("bpf", "the committed capture programs are what their source builds to", bpf_stage),
    stage("clippy", "no lint complains", clippy_stage),
    Stage { gate: true, ..stage("build", "everything builds, tests included", build_stage) },
    stage("tests", "unit, property, golden and process tests", tests_stage),
    Stage { slow: true, ..stage("kernels", "the capture on other kernels, in guests", kernels_stage) },
    stage("doctests", "examples in the documentation", doctests_stage),
    Stage { slow: true, gate: true, ..stage("release", "the programs, optimized", release_stage) },
    Stage { slow: true, ..stage("dist", "the agent as one small static program, which plays the demo", dist_stage) },
    Stage { slow: true, ..stage("sim", "seeded simulation of the whole product", simulation_stage) },
    Stage { slow: true, ..stage("demo", "the demo, then the independent check of what it left", demo_stage) },
];

/// How a stage ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    /// What it runs is not there; it has noted that as a skip.
    Skipped,
}

/// What the stages share.
struct Session {
    workspace: Workspace,
    ci: bool,
    no_install: bool,
    seeds: u32,
    skip_log: PathBuf,
    skips: RefCell<Vec<String>>,
}

impl Session {
    /// A command in the workspace root with the environment every stage gives its programs.
    fn command(&self, mut command: Command) -> Command {
        command.current_dir(&self.workspace.root);
        command.env(skips::LOG_VARIABLE, &self.skip_log).env("FARSHORE_SEEDS", self.seeds.to_string());
        command.env("FARSHORE_KERNELS", kernels::folder(&self.workspace.target));
        command
    }

    fn cargo(&self, words: &[&str]) -> Command {
        let mut command = self.command(cargo());
        command.args(words);
        command
    }

    /// A program of ours from the release build.
    fn release_program(&self, name: &str) -> PathBuf {
        self.workspace.target.join("release").join(name)
    }

    /// Runs a command, shows it, and notes the skips it prints.
    fn run_noting_skips(&self, mut command: Command) -> Result<()> {
        run_watching(&mut command, |line| self.note(skips::in_line(line)))
    }

    /// Notes that a whole stage cannot run.
    fn skip(&self, what: String) -> Outcome {
        println!("SKIPPED: {what}");
        self.note([what]);
        Outcome::Skipped
    }

    fn note(&self, found: impl IntoIterator<Item = String>) {
        let mut skips = self.skips.borrow_mut();
        for skip in found {
            if !skips.contains(&skip) {
                skips.push(skip);
            }
        }
    }
}

struct Report {
    stage: &'static str,
    outcome: Result<Outcome>,
    took: Duration,
}

/// Runs the wanted stages; `Ok(false)` when a stage failed or a skip was not permitted.
fn run_stages(options: &Options) -> Result<bool> {
    let workspace = Workspace::load()?;
    let ci = std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let skip_log = workspace.target.join("skipped-tests.log");
    fs::create_dir_all(&workspace.target).context("cannot create the target directory")?;
    fs::write(&skip_log, "").with_context(|| format!("cannot write {}", skip_log.display()))?;
    let session = Session {
        ci,
        no_install: options.no_install,
        seeds: options.seeds.unwrap_or(if options.quick { SEEDS_QUICK } else { SEEDS }),
        skip_log,
        skips: RefCell::default(),
        workspace,
    };
    let allowed = AllowList::load(&session.workspace.root)?;
    let started = Instant::now();
    let mut reports = Vec::new();
    for stage in STAGES.iter().filter(|stage| options.wants(stage)) {
        println!("\n== {}: {}", stage.name, stage.what);
        let began = Instant::now();
        let outcome = (stage.run)(&session);
        if let Err(failure) = &outcome {
            println!("FAILED: {}: {failure:#}", stage.name);
        }
        let stop = stage.gate && outcome.is_err();
        reports.push(Report { stage: stage.name, outcome, took: began.elapsed() });
        if stop {
            println!("nothing after `{}` can run", stage.name);
            break;
        }
    }
    let logged = fs::read(&session.skip_log).context("cannot read the log of skipped tests")?;
    session.note(skips::in_text(&String::from_utf8_lossy(&logged)));
    let skips = session.skips.into_inner();
    let (table, passed) = summarize(&reports, &skips, &allowed, ci, started.elapsed());
    println!("{table}");
    Ok(passed)
}

/// The table, and whether the run counts as passed.
///
/// Returned, not printed: what a test of this function printed would be read as a skip of that test run.
fn summarize(reports: &[Report], skips: &[String], allowed: &AllowList, ci: bool, took: Duration) -> (String, bool) {
    let mut lines = vec!["\n== summary".to_owned()];
    for report in reports {
        let result = match report.outcome {
            Ok(Outcome::Passed) => "passed",
            Ok(Outcome::Skipped) => "skipped",
            Err(_) => "FAILED",
        };
        lines.push(format!("{:<12} {result:<7}  {:>8.1} s", report.stage, report.took.as_secs_f64()));
    }
    let mut unpermitted = 0;
    for skip in skips {
        match allowed.reason(skip) {
            Some(reason) => lines.push(format!("SKIPPED: {skip}  (permitted: {reason})")),
            None => {
                unpermitted += 1;
                lines.push(format!("SKIPPED: {skip}"));
            }
        }
    }
    if ci && unpermitted > 0 {
        let list = skips::ALLOW_LIST;
        lines.push(format!("in CI a skip is a failure; install what is missing, or list it with its reason in {list}"));
    }
    let failed = reports.iter().filter(|report| report.outcome.is_err()).count();
    let passed = reports.iter().filter(|report| matches!(report.outcome, Ok(Outcome::Passed))).count();
    lines.push(format!(
        "{passed} stages passed, {failed} failed, {} skips ({unpermitted} not permitted in CI), {:.0} s",
        skips.len(),
        took.as_secs_f64()
    ));
    (lines.join("\n"), failed == 0 && !(ci && unpermitted > 0))
}

/// See [`run_stages`]; with `--list` only the names.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if !options.list {
        return run_stages(options);
    }
    for stage in STAGES {
        println!("{:<12} {}{}", stage.name, stage.what, if stage.slow { " (not with --quick)" } else { "" });
    }
    Ok(true)
}

fn components_stage(session: &Session) -> Result<Outcome> {
    let permission = match (session.no_install, session.ci) {
        (true, _) => Permission::Never,
        (false, true) => Permission::Install,
        (false, false) => Permission::Ask,
    };
    components::provide(components::FOR_TESTS, permission, &session.workspace.target)?;
    if kernels::unable().is_none() {
        for series in kernels::SERIES {
            if let Err(error) = kernels::fetch(series, &session.workspace.target) {
                println!("notice: no kernel {}: {error:#}", series.name);
            }
        }
    }
    if find_program("cargo-nextest").is_some() || has_nextest() {
        println!("cargo-nextest is here");
    } else if permission == Permission::Never {
        println!("cargo-nextest is missing; the tests run under `cargo test`");
    } else {
        println!("cargo-nextest is missing; building it takes some minutes, once");
        let install = process::run(&mut session.cargo(&["install", "--locked", "cargo-nextest"]));
        if let Err(error) = install {
            println!("notice: {error:#}; the tests run under `cargo test`");
        }
    }
    Ok(Outcome::Passed)
}

/// Cargo also finds subcommands in its own directory, which need not be in `PATH`.
fn has_nextest() -> bool {
    cargo().args(["nextest", "--version"]).output().is_ok_and(|output| output.status.success())
}

fn format_stage(session: &Session) -> Result<Outcome> {
    process::run(&mut session.cargo(&["fmt", "--all", "--check"]))?;
    Ok(Outcome::Passed)
}

fn clippy_stage(session: &Session) -> Result<Outcome> {
    process::run(&mut session.cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    Ok(Outcome::Passed)
}

fn tidy_stage(_session: &Session) -> Result<Outcome> {
    ensure!(tidy::run()?, "the source tree breaks rules, see above");
    Ok(Outcome::Passed)
}

fn bpf_stage(session: &Session) -> Result<Outcome> {
    match bpf::check(&session.workspace)? {
        bpf::Checked::Same => Ok(Outcome::Passed),
        bpf::Checked::Unknown(why) => Ok(session.skip(format!("bpf object: {why}"))),
    }
}

fn build_stage(session: &Session) -> Result<Outcome> {
    process::run(&mut session.cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
    Ok(Outcome::Passed)
}

fn tests_stage(session: &Session) -> Result<Outcome> {
    if !has_nextest() {
        println!("notice: without cargo-nextest, tests run under `cargo test`: no time limits, less isolation");
        let words = ["test", "--workspace", "--all-targets", "--locked", "--no-fail-fast", "--", "--show-output"];
        session.run_noting_skips(session.cargo(&words))?;
        return Ok(Outcome::Passed);
    }
    // Nextest keeps its reports here whatever the target directory is.
    let report = session.workspace.root.join("target/nextest/ci/junit.xml");
    // A report of an earlier run must not be taken for this one's.
    if report.exists() {
        fs::remove_file(&report).context("cannot remove the last test report")?;
    }
    let words = ["nextest", "run", "--workspace", "--all-targets", "--locked", "--profile", "ci"];
    let outcome = process::run(&mut session.cargo(&words));
    let printed = fs::read(&report).with_context(|| format!("nextest left no {}", report.display()));
    if let Ok(printed) = &printed {
        session.note(skips::in_junit(&String::from_utf8_lossy(printed)));
    }
    // The tests' failure says more than a missing report.
    outcome.and(printed)?;
    Ok(Outcome::Passed)
}

/// With each kernel, and the emulator's own record of what was written beside what was captured.
fn kernels_stage(session: &Session) -> Result<Outcome> {
    if let Some(why) = kernels::unable() {
        return Ok(session.skip(format!("kernels: {why}")));
    }
    let skips = kernels::run_each(session.cargo(&[]), &session.workspace.target)?;
    skips.iter().for_each(|skip| println!("SKIPPED: {skip}"));
    session.note(skips);
    Ok(Outcome::Passed)
}

fn doctests_stage(session: &Session) -> Result<Outcome> {
    process::run(&mut session.cargo(&["test", "--workspace", "--doc", "--locked", "--quiet"]))?;
    Ok(Outcome::Passed)
}

fn release_stage(session: &Session) -> Result<Outcome> {
    process::run(&mut session.cargo(&["build", "--release", "--workspace", "--bins", "--locked"]))?;
    Ok(Outcome::Passed)
}

/// The static agent joins, protects, is asked and told, captures by eBPF: everything that the demo wants of an agent.
fn dist_stage(session: &Session) -> Result<Outcome> {
    let fetch = if session.no_install { Fetch::Never } else { Fetch::Allowed };
    let program = match dist::build(&session.workspace, session.command(cargo()), fetch)? {
        Built::Program(program) => program,
        Built::Unavailable(why) => return Ok(session.skip(format!("dist: {why}"))),
    };
    let folder = session.workspace.target.join("dist-demo");
    fs::create_dir_all(&folder).context("cannot create a folder")?;
    let farshore = folder.join("farshore");
    fs::copy(session.release_program("farshore"), &farshore).context("cannot copy farshore")?;
    fs::copy(program, folder.join("farshore-agent")).context("cannot copy the agent")?;
    let mut demo = session.command(Command::new(farshore));
    demo.args(["demo", "--seed", "2", "--size", "96"]);
    session.run_noting_skips(demo)?;
    fs::remove_dir_all(&folder).context("cannot remove the copies")?;
    Ok(Outcome::Passed)
}

fn simulation_stage(session: &Session) -> Result<Outcome> {
    if !session.workspace.has_program(SIMULATION) {
        return Ok(session.skip(format!("{SIMULATION}: there is no program of this name yet")));
    }
    let mut command = session.command(Command::new(session.release_program(SIMULATION)));
    // A simulation that cannot find a bug proves nothing: every planted one has to be caught, too.
    command.args(["--seeds", &session.seeds.to_string(), "--planted"]);
    session.run_noting_skips(command)?;
    Ok(Outcome::Passed)
}

/// Runs the demo with a fixed seed, has what it left checked by the program that shares no code with ours, flips one
/// byte of the vault, and has it checked again: that check must fail.
fn demo_stage(session: &Session) -> Result<Outcome> {
    let check = session.workspace.root.join(INDEPENDENT_CHECK);
    if !check.exists() {
        return Ok(session.skip(format!("demo: {INDEPENDENT_CHECK} is not there yet")));
    }
    let kept = session.workspace.target.join("demo");
    if kept.exists() {
        fs::remove_dir_all(&kept).context("cannot remove what the last demo left")?;
    }
    let farshore = session.release_program("farshore");
    let mut demo = session.command(Command::new(&farshore));
    demo.args(["demo", "--seed", "1", "--keep"]).arg(&kept);
    session.run_noting_skips(demo)?;

    let verify = || {
        let mut command = session.command(Command::new("python3"));
        command.arg(&check).arg("--farshore").arg(&farshore).arg(&kept);
        command
    };
    session.run_noting_skips(verify())?;
    let flipped = flip_one_byte(&kept.join("vault"))?;
    println!("flipped one byte of {}; now the check must fail", flipped.display());
    if session.run_noting_skips(verify()).is_ok() {
        bail!("the independent check passed although one byte of {} was flipped", flipped.display());
    }
    println!("it failed, as it must");
    fs::remove_dir_all(&kept).context("cannot remove what the demo left")?;
    Ok(Outcome::Passed)
}

/// Flips the middle byte of the largest file below `directory`: the one most likely to hold disk contents.
fn flip_one_byte(directory: &Path) -> Result<PathBuf> {
    let mut directories = vec![directory.to_path_buf()];
    let mut largest: Option<(u64, PathBuf)> = None;
    while let Some(directory) = directories.pop() {
        let entries = fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                directories.push(entry.path());
            } else if largest.as_ref().is_none_or(|(size, path)| (*size, path) < (meta.len(), &entry.path())) {
                largest = Some((meta.len(), entry.path()));
            }
        }
    }
    let (size, path) = largest.filter(|(size, _)| *size > 0).context("the vault holds no file to damage")?;
    let mut bytes = fs::read(&path)?;
    let middle = usize::try_from(size / 2).context("a vault object of more than the address space")?;
    bytes[middle] ^= 1;
    // Objects are created read-only; the damage is done to a new file of the same name.
    fs::remove_file(&path)?;
    fs::write(&path, bytes)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        Options::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    fn chosen(options: &Options) -> Vec<&'static str> {
        STAGES.iter().filter(|stage| options.wants(stage)).map(|stage| stage.name).collect()
    }

    #[test]
    fn quick_leaves_out_the_release_build_and_only_overrules_it() {
        assert_eq!(chosen(&parse(&[]).unwrap()).len(), STAGES.len());
        let quick = chosen(&parse(&["--quick"]).unwrap());
        assert!(
            quick.contains(&"tests")
                && !quick.contains(&"kernels")
                && !quick.contains(&"release")
                && !quick.contains(&"demo"),
            "{quick:?}"
        );
        assert_eq!(chosen(&parse(&["--quick", "--only", "sim", "--only", "fmt"]).unwrap()), ["fmt", "sim"]);
    }

    #[test]
    fn wrong_arguments_are_named() {
        assert!(parse(&["--only", "nothing"]).unwrap_err().contains("`nothing`"));
        assert!(parse(&["--seeds"]).unwrap_err().contains("needs a value"));
        assert!(parse(&["--seeds", "many"]).unwrap_err().contains("many"));
        assert!(parse(&["--fast"]).unwrap_err().contains("--fast"));
    }

    fn report(passed: bool) -> Report {
        let outcome = if passed { Ok(Outcome::Passed) } else { Err(anyhow::anyhow!("broken")) };
        Report { stage: "tests", outcome, took: Duration::ZERO }
    }

    #[test]
    fn a_skip_fails_only_ci_and_a_failed_stage_always_fails() {
        let nothing = AllowList::default();
        let skips = ["fuse: no /dev/fuse".to_owned()];
        let passes =
            |reports: &[Report], skips: &[String], ci| summarize(reports, skips, &nothing, ci, Duration::ZERO).1;
        assert!(passes(&[report(true)], &skips, false));
        assert!(!passes(&[report(true)], &skips, true));
        assert!(passes(&[report(true)], &[], true));
        assert!(!passes(&[report(true), report(false)], &[], false));
    }

    #[test]
    fn one_byte_of_the_largest_file_is_flipped() {
        let directory = std::env::temp_dir().join(format!("farshore-xtask-flip-{}", std::process::id()));
        fs::create_dir_all(directory.join("packs")).unwrap();
        fs::write(directory.join("small"), [0; 3]).unwrap();
        fs::write(directory.join("packs/large"), [0; 10]).unwrap();
        let path = flip_one_byte(&directory).unwrap();
        assert_eq!(path, directory.join("packs/large"));
        assert_eq!(fs::read(path).unwrap(), [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]);
        assert_eq!(fs::read(directory.join("small")).unwrap(), [0; 3]);
        fs::remove_dir_all(directory).unwrap();
    }
}
