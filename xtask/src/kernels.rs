//! Other kernels than this machine's: the capture's tests inside emulated guests.
//!
//! A guest is nothing but a kernel of the distribution and one archive of files in memory: a shell, the test programs that
//! this machine has built, and the libraries they need. It has no disk, no network and nobody's trust: the kernels are
//! downloaded into the target directory, checked by the package manager against its own keys, and never installed.

mod archive;
mod guest;
mod oracle;
mod package;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::{find_program, search_path};
use crate::skips::AllowList;
use crate::workspace::{Workspace, cargo};
use archive::Archive;
use guest::{Guest, Left};
use oracle::{Log, Stream};
use package::Kernel;

/// The kernels, each the last of its series that the distribution has, and what is special there.
pub(crate) const SERIES: &[Series] = &[
    Series { name: "5.10", suite: "bullseye" }, // arguments and fields of an older kind, no large records
    Series { name: "6.1", suite: "bookworm" },
    Series { name: "6.12", suite: "trixie" },
];

/// A kernel series and the release of the distribution that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Series {
    pub(crate) name: &'static str,
    suite: &'static str,
}

/// What runs in a guest: a test target of the crate `agent`, and which of its tests. The planted mistakes are noticed on
/// this machine's kernel or nowhere.
const PROGRAMS: &[(&str, &str, &str)] = &[("lib", "agent", "capture::ebpf --skip ::planted::")];

/// What the tests call, beside what the shell brings.
const TOOLS: &[&str] = &["losetup", "addpart", "delpart", "mkfs.ext4", "fsfreeze", "dmsetup"];

/// What the tests need of the kernel beside what is built in.
const MODULES: &[&str] =
    &["drivers/block/loop", "drivers/md/dm-mod", "drivers/md/md-mod", "drivers/md/raid0", "drivers/md/raid1"];

/// Emulation is about ten times slower than this machine, and the machine may be busy.
const LIMIT: Duration = Duration::from_secs(900);

/// A guest has two processors, and uses little more than one.
const GUESTS_AT_A_TIME: usize = 2;

/// How the tests of one kernel ended.
#[derive(Debug)]
struct Outcome {
    /// Lines of the guest's tests that begin with `SKIPPED:`, without that word.
    skips: Vec<String>,
    /// Tests that passed.
    passed: usize,
    /// What was captured and logged alike, in words.
    compared: String,
}

/// Why no guest can be started here, if so.
pub(crate) fn unable() -> Option<String> {
    let wanted = ["qemu-system-x86_64", "busybox", "apt-get", "dpkg-deb", "ldd", "strip"];
    let lacking: Vec<&str> = wanted.into_iter().filter(|program| find_program(program).is_none()).collect();
    if !cfg!(target_arch = "x86_64") {
        Some("the capture programs are for x86-64".to_owned())
    } else if lacking.is_empty() {
        None
    } else {
        Some(format!("{} missing; Debian's packages are needed", lacking.join(", ")))
    }
}

/// Where the kernels are, each in a folder of its series' name.
pub(crate) fn folder(target: &Path) -> PathBuf {
    target.join("kernels")
}

/// Fetches a kernel, unless an earlier run did.
///
/// # Errors
/// It is not to be had, and why.
pub(crate) fn fetch(series: &Series, target: &Path) -> Result<Kernel> {
    package::fetch(series.name, series.suite, &folder(target))
}

/// The test programs, built for this machine.
fn test_programs(mut cargo: Command) -> Result<Vec<PathBuf>> {
    cargo.args(["test", "--workspace", "--all-targets", "--locked", "--no-run", "--message-format", "json"]);
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo test --no-run")?;
    ensure!(output.status.success(), "the test programs cannot be built");
    let text = String::from_utf8_lossy(&output.stdout);
    let messages: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let program = |(kind, name, _): &(&str, &str, &str)| {
        let built = messages.iter().find_map(|message| {
            let target = &message["target"];
            let same = target["name"] == *name && target["kind"].as_array().is_some_and(|kinds| kinds[0] == *kind);
            same.then(|| message["executable"].as_str()).flatten()
        });
        built.map(PathBuf::from).with_context(|| format!("cargo built no test program of {kind} `{name}`"))
    };
    PROGRAMS.iter().map(program).collect()
}

/// `cargo xtask kernels`: builds the tests and runs them in a guest for each kernel. `Ok(false)` if something could not run
/// that has to.
pub(crate) fn run_all() -> Result<bool> {
    if let Some(why) = unable() {
        bail!("no guest can be started: {why}");
    }
    let workspace = Workspace::load()?;
    let skips = run_each(cargo(), &workspace.target)?;
    let allowed = AllowList::load(&workspace.root)?;
    skips.iter().for_each(|skip| println!("SKIPPED: {skip}"));
    Ok(skips.iter().all(|skip| allowed.reason(skip).is_some()))
}

/// Builds the tests by `cargo` and runs them in a guest for each kernel; what could not run.
///
/// # Errors
/// A test failed in one of them, or the two records of its writes differ.
pub(crate) fn run_each(cargo: Command, target: &Path) -> Result<Vec<String>> {
    let programs = test_programs(cargo)?;
    let (mut skips, mut kernels, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for series in SERIES {
        match fetch(series, target) {
            Ok(kernel) => kernels.push((series.name, kernel)),
            Err(error) => skips.push(format!("kernel/{}: {error:#}", series.name)),
        }
    }
    let (waiting, done) = (Mutex::new(kernels.into_iter()), Mutex::new(Vec::new()));
    let work = || {
        let next = || waiting.lock().expect("nobody panics with it").next();
        while let Some((series, kernel)) = next() {
            let since = Instant::now();
            let outcome = run(&kernel, &programs, &folder(target).join(format!("guest-{series}")));
            done.lock().expect("nobody panics with it").push((series, kernel.release, outcome, since.elapsed()));
        }
    };
    thread::scope(|scope| (0..GUESTS_AT_A_TIME).for_each(|_| drop(scope.spawn(work))));
    for (series, release, outcome, took) in done.into_inner().expect("nobody panicked with it") {
        match outcome {
            Ok(outcome) => {
                let (passed, compared) = (outcome.passed, outcome.compared);
                println!("Linux {release}: {passed} tests passed in {} s; {compared}", took.as_secs());
                skips.extend(outcome.skips);
            }
            Err(error) => {
                println!("Linux {release}: {error:#}");
                failed.push(series);
            }
        }
    }
    ensure!(failed.is_empty(), "the capture failed on Linux {}", failed.join(", "));
    Ok(skips)
}

/// Boots `kernel` with `programs` and has it run them; files are made in `folder`.
///
/// # Errors
/// A test failed, or the guest did not get through; its console has been shown.
fn run(kernel: &Kernel, programs: &[PathBuf], folder: &Path) -> Result<Outcome> {
    let files = Archive::new(folder.join("files"))?;
    files.program(&find_program("busybox").context("there is no busybox")?, "bin/busybox")?;
    for name in TOOLS {
        let tool = find_program(name).with_context(|| format!("there is no {name}"))?;
        files.program(&tool, &format!("sbin/{name}"))?;
    }
    for name in MODULES {
        let name = Path::new(name);
        let plain = name.file_name().context("a module has a name")?.to_string_lossy();
        files.bytes(&format!("modules/{plain}.ko"), &kernel.module(name)?)?;
    }
    let mut lines = Vec::new();
    for (program, (_, name, filter)) in programs.iter().zip(PROGRAMS) {
        let stripped = folder.join(format!("{name}.stripped"));
        let status = Command::new("strip").arg("-o").arg(&stripped).arg(program).env("PATH", search_path()).status();
        ensure!(status.context("cannot run strip")?.success(), "cannot strip {}", program.display());
        files.program(&stripped, &format!("tests/{name}"))?;
        lines.push(format!("run {name} {filter}"));
    }
    files.bytes("init", guest::init(&lines).as_bytes())?;
    let initramfs = folder.join("initramfs");
    files.finish(&initramfs)?;
    let left = Guest { kernel: &kernel.image, initramfs: &initramfs }.run(LIMIT)?;
    let judged = guest::judge(&left.console, PROGRAMS.len());
    if judged.is_err() {
        println!("{}", left.console);
    }
    let (passed, skips) = judged?;
    let compared = compare(&left).context("what was captured is not what the emulator logged")?;
    Ok(Outcome { skips, passed, compared })
}

/// Compares what was captured in a guest with what the emulator saw, and makes sure that it would have noticed.
fn compare(left: &Left) -> Result<String> {
    let (log, stream) = (Log::parse(&left.log)?, Stream::parse(&left.stream)?);
    let compared = oracle::compare(&log, &stream)?;
    for (what, spoiled) in stream.spoiled() {
        ensure!(oracle::compare(&log, &spoiled).is_err(), "it was not noticed that {what}");
    }
    Ok(format!("captured and logged alike: {compared}"))
}
