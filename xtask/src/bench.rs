//! `cargo xtask bench`: Farshore beside its peers, on the same disk, in the same run, with ratios.
//!
//! A case is one tool in one file of `cases/`; it returns rows, and rows of one question from several cases form one
//! table. Absolute figures depend on the machine; the ratio to the baseline of the table is what we promise.

mod cases;
mod disk;
mod promises;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::components::{self, Permission};
use crate::process::{Usage, find_program, measure};
use crate::workspace::{Workspace, cargo};

use disk::Reference;
use promises::{Promise, Promised};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Small enough that a run takes a minute; the published table uses the full size.
const SIZE: u64 = GIB;
const SIZE_FULL: u64 = 16 * GIB;

/// What the command line said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    size: u64,
    only: Vec<String>,
    scratch: Option<PathBuf>,
    programs: Option<PathBuf>,
    keep: bool,
    write: bool,
    no_install: bool,
    list: bool,
}

impl Options {
    /// # Errors
    /// A sentence about the wrong argument.
    pub(crate) fn parse(arguments: &[String]) -> Result<Options, String> {
        let mut options = Options {
            size: SIZE,
            only: Vec::new(),
            scratch: None,
            programs: None,
            keep: false,
            write: false,
            no_install: false,
            list: false,
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--full" => {
                    options.size = SIZE_FULL;
                    options.write = true;
                }
                "--size" => options.size = parse_size(value()?)?,
                "--scratch" => options.scratch = Some(PathBuf::from(value()?)),
                "--programs" => options.programs = Some(PathBuf::from(value()?)),
                "--write" => options.write = true,
                "--keep" => options.keep = true,
                "--no-install" => options.no_install = true,
                "--list" => options.list = true,
                "--only" => {
                    let case = value()?;
                    if !cases::all().iter().any(|known| known.name() == case) {
                        return Err(format!("there is no case `{case}`; see --list"));
                    }
                    options.only.push(case.clone());
                }
                other => return Err(format!("`bench` does not know {other}")),
            }
        }
        Ok(options)
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = match (text.strip_suffix("GiB"), text.strip_suffix("MiB")) {
        (Some(number), _) => (number, GIB),
        (_, Some(number)) => (number, MIB),
        _ => (text, 1),
    };
    let size = number.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    let size = size.ok_or(format!("`{text}` is no size: say 2GiB, 512MiB or bytes"))?;
    if size < 64 * MIB || size % MIB != 0 {
        return Err(format!("`{text}` is no size for the disk: whole MiB, at least 64MiB"));
    }
    Ok(size)
}

/// The question a row answers; rows of one question form one table, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Question {
    /// The whole disk once, into an empty repository. Baseline: `zstd -1 -T2`.
    FirstCopy,
    /// Again, after random 4 KiB writes to 1/64 of the disk.
    AfterRandomWrites,
    /// The whole disk back, to a pipe or to a file.
    WholeRead,
}

impl Question {
    fn title(self) -> &'static str {
        match self {
            Question::FirstCopy => "The whole disk, the first time",
            Question::AfterRandomWrites => "Again after random 4 KiB writes",
            Question::WholeRead => "The whole disk back",
        }
    }

    /// The row whose time the others of the table are compared with.
    fn time_baseline(self) -> &'static str {
        match self {
            Question::FirstCopy => cases::ZSTD_ROW,
            Question::AfterRandomWrites => cases::RESTIC_BACKUP_ROW,
            Question::WholeRead => cases::RESTIC_DUMP_ROW,
        }
    }

    /// The row whose stored bytes the others are compared with.
    fn stored_baseline(self) -> &'static str {
        cases::RESTIC_BACKUP_ROW
    }
}

/// What is promised about a row: ratios to the baselines of its table.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Target {
    time_ratio_max: Option<(Promised, f64)>,
    stored_ratio_max: Option<(Promised, f64)>,
}

/// One line of a table.
#[derive(Debug, Clone)]
struct Row {
    question: Question,
    name: String,
    usage: Usage,
    /// Bytes the tool's repository grew by; `None` where nothing is stored.
    stored_bytes: Option<u64>,
    /// What we promised; peers have none.
    target: Target,
    note: String,
}

impl Row {
    fn new(question: Question, name: impl Into<String>, usage: Usage) -> Row {
        Row { question, name: name.into(), usage, stored_bytes: None, target: Target::default(), note: String::new() }
    }

    fn stored(mut self, bytes: u64) -> Row {
        self.stored_bytes = Some(bytes);
        self
    }

    fn note(mut self, note: impl Into<String>) -> Row {
        self.note = note.into();
        self
    }
}

/// What a case found out.
#[derive(Debug, Default)]
struct Measured {
    rows: Vec<Row>,
    /// What was promised and needs no baseline to be judged.
    promises: Vec<Promise>,
    /// Sentences that explain the figures: where time went, what was special.
    remarks: Vec<String>,
}

impl From<Vec<Row>> for Measured {
    fn from(rows: Vec<Row>) -> Measured {
        Measured { rows, ..Measured::default() }
    }
}

/// What a case measures on.
struct Subject<'a> {
    disk: &'a Reference,
    /// Where our own programs are.
    programs: &'a Path,
}

/// One tool, measured.
trait Case {
    /// What `--only` calls it.
    fn name(&self) -> &'static str;

    /// Programs without which it is left out, and said to be.
    fn needs(&self) -> &'static [&'static str];

    /// Why this machine cannot run it, if programs are not the reason.
    fn hindrance(&self) -> Option<String> {
        None
    }

    /// Whether it measures our own programs.
    fn is_ours(&self) -> bool {
        false
    }

    /// Measures; everything it writes goes below `scratch`, an empty directory that is removed afterwards.
    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured>;
}

/// Runs the wanted cases. `Ok(false)` if one failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for case in cases::all() {
            println!("{:<16} needs {}", case.name(), case.needs().join(", "));
        }
        return Ok(true);
    }
    let workspace = Workspace::load()?;
    let permission = if options.no_install { Permission::Never } else { Permission::Ask };
    components::provide(components::FOR_BENCHMARKS, permission, &workspace.target)?;
    // A directory of our own even below the given one: it is removed at the end.
    let base = options.scratch.as_ref().unwrap_or(&workspace.target).join("farshore-bench");
    fs::create_dir_all(&base).with_context(|| format!("cannot create {}", base.display()))?;
    let wanted: Vec<_> = cases::all()
        .into_iter()
        .filter(|case| options.only.is_empty() || options.only.iter().any(|name| name == case.name()))
        .collect();
    let programs = match &options.programs {
        Some(programs) => programs.canonicalize().with_context(|| format!("no {}", programs.display()))?,
        None => workspace.target.join("release"),
    };
    if options.programs.is_none() && wanted.iter().any(|case| case.is_ours()) {
        crate::process::run(cargo().args(["build", "--release", "--package", "farshore", "--bins"]))?;
        if wanted.iter().any(|case| case.name() == cases::CAPTURE) {
            let example = ["build", "--release", "--package", "agent", "--example", "discarding_server"];
            crate::process::run(cargo().args(example))?;
        }
    }
    let disk = Reference::provide(&base, options.size)?;
    let mut all = Measured::default();
    let mut left_out = Vec::new();
    let mut failed = 0;
    let begun = Instant::now();
    for case in wanted {
        let lacking: Vec<_> = case.needs().iter().filter(|program| find_program(program).is_none()).copied().collect();
        if !lacking.is_empty() {
            println!("SKIPPED: bench {}: {} is not installed", case.name(), lacking.join(", "));
            left_out.push(format!("{} ({} is not installed)", case.name(), lacking.join(", ")));
            continue;
        }
        if let Some(why) = case.hindrance() {
            println!("SKIPPED: bench {}: {why}", case.name());
            left_out.push(format!("{} ({why})", case.name()));
            continue;
        }
        println!("== {} ({} s since the start)", case.name(), begun.elapsed().as_secs());
        let scratch = base.join(case.name());
        remove_directory(&scratch)?;
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        disk.warm()?;
        let outcome = case.run(&Subject { disk: &disk, programs: &programs }, &scratch);
        // A case may have changed the disk to measure again; the next one begins with the disk as it was.
        disk.restore()?;
        remove_directory(&scratch)?;
        match outcome {
            Ok(measured) => {
                for row in &measured.rows {
                    println!("  {}: {:.2} s", row.name, row.usage.wall.as_secs_f64());
                }
                for promise in &measured.promises {
                    println!("  {promise}");
                }
                for remark in &measured.remarks {
                    println!("  {remark}");
                }
                all.rows.extend(measured.rows);
                all.promises.extend(measured.promises);
                all.remarks.extend(measured.remarks);
            }
            Err(failure) => {
                failed += 1;
                println!("FAILED: {}: {failure:#}", case.name());
                left_out.push(format!("{} (failed)", case.name()));
            }
        }
    }
    let text = report::render(&all, &left_out, &disk, &report::Machine::here()?);
    println!("\n{text}");
    if !options.write {
        println!("docs/benchmarks.md is left as it was: it is written with --full or --write");
    } else if options.only.is_empty() && failed == 0 {
        report::write(&workspace.root, &text)?;
    } else {
        println!("docs/benchmarks.md is left as it was: not every case was measured");
    }
    if !options.keep {
        remove_directory(&base)?;
    }
    Ok(failed == 0)
}

fn remove_directory(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Bytes of all files below a directory, or of one file, as stored (holes do not count).
fn stored_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(meta.len().min(meta.blocks() * 512));
    }
    fs::read_dir(path)?.map(|entry| stored_bytes(&entry?.path())).sum()
}

/// Runs a program of a peer in `scratch`, with nothing of the user's own settings, and measures it.
fn measure_in(scratch: &Path, command: &mut Command) -> Result<Usage> {
    ensure!(scratch.is_dir(), "{} is not there", scratch.display());
    // What it prints on standard output is either data (a restore to a pipe) or chatter.
    command.current_dir(scratch).env("HOME", scratch).stdout(std::process::Stdio::null());
    measure(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        Options::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn sizes_are_whole_mebibytes() {
        assert_eq!(parse(&["--size", "2GiB"]).unwrap().size, 2 * GIB);
        assert_eq!(parse(&["--size", "512MiB"]).unwrap().size, 512 * MIB);
        assert_eq!(parse(&["--full"]).unwrap().size, SIZE_FULL);
        for bad in ["1MiB", "2G", "-1GiB", "99999999999999GiB", "67108865"] {
            assert!(parse(&["--size", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn cases_are_known_by_name_and_their_programs_can_be_installed() {
        assert!(parse(&["--only", "restic"]).is_ok());
        assert!(parse(&["--only", "nothing"]).unwrap_err().contains("`nothing`"));
        for case in cases::all() {
            for program in case.needs() {
                let known = components::FOR_BENCHMARKS.iter().any(|component| component.program == *program);
                assert!(known, "{} needs {program}, which no package brings", case.name());
            }
        }
    }
}
