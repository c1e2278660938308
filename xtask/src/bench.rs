//! `cargo xtask bench`: Farshore beside its peers, on the same disk, in the same run, with ratios.
//!
//! A case is one tool in one file of `cases/`; it returns rows, and rows of one question from several cases form one
//! table. Absolute figures depend on the machine; the ratio to the baseline of the table is what we promise.

mod cases;
mod disk;
mod report;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::components::{self, Permission};
use crate::process::{Usage, find_program, measure};
use crate::workspace::Workspace;

use disk::Reference;

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

/// What is promised about a row, as ratios to the baselines of its table.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Target {
    time_ratio_max: Option<f64>,
    stored_ratio_max: Option<f64>,
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

/// One tool, measured.
trait Case {
    /// What `--only` calls it.
    fn name(&self) -> &'static str;

    /// Programs without which it is left out, and said to be.
    fn needs(&self) -> &'static [&'static str];

    /// Measures on `disk`; everything it writes goes below `scratch`, an empty directory that is removed afterwards.
    fn run(&self, disk: &Reference, scratch: &std::path::Path) -> Result<Vec<Row>>;
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
    components::provide(components::FOR_BENCHMARKS, permission)?;
    // A directory of our own even below the given one: it is removed at the end.
    let base = options.scratch.as_ref().unwrap_or(&workspace.target).join("farshore-bench");
    fs::create_dir_all(&base).with_context(|| format!("cannot create {}", base.display()))?;
    let disk = Reference::provide(&base, options.size)?;
    let mut rows = Vec::new();
    let mut left_out = Vec::new();
    let mut failed = 0;
    for case in cases::all() {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == case.name()) {
            continue;
        }
        let lacking: Vec<_> = case.needs().iter().filter(|program| find_program(program).is_none()).copied().collect();
        if !lacking.is_empty() {
            println!("SKIPPED: bench {}: {} is not installed", case.name(), lacking.join(", "));
            left_out.push(format!("{} ({} is not installed)", case.name(), lacking.join(", ")));
            continue;
        }
        println!("== {}", case.name());
        let scratch = base.join(case.name());
        remove_directory(&scratch)?;
        fs::create_dir(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
        disk.warm()?;
        match case.run(&disk, &scratch) {
            Ok(measured) => {
                for row in &measured {
                    println!("  {}: {:.2} s", row.name, row.usage.wall.as_secs_f64());
                }
                rows.extend(measured);
            }
            Err(failure) => {
                failed += 1;
                println!("FAILED: {}: {failure:#}", case.name());
                left_out.push(format!("{} (failed)", case.name()));
            }
        }
        remove_directory(&scratch)?;
    }
    let text = report::render(&rows, &left_out, &disk, &report::Machine::here()?);
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

fn remove_directory(path: &std::path::Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Bytes of all files below a directory, or of one file, as stored (holes do not count).
fn stored_bytes(path: &std::path::Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let meta = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if !meta.is_dir() {
        return Ok(meta.len().min(meta.blocks() * 512));
    }
    fs::read_dir(path)?.map(|entry| stored_bytes(&entry?.path())).sum()
}

/// Runs a program of a peer in `scratch`, with nothing of the user's own settings, and measures it.
fn measure_in(scratch: &std::path::Path, command: &mut Command) -> Result<Usage> {
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
