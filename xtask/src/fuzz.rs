//! `cargo xtask fuzz`: libFuzzer on the targets below `fuzz/`, one after another.
//!
//! Coverage is compiled in with flags that the stable compiler takes, so nothing has to be installed except a C++
//! compiler for libFuzzer itself. The address sanitizer would need a nightly one; the product has little `unsafe`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{self, find_program, run_watching};
use crate::workspace::{Workspace, cargo};

/// Seconds that each target runs unless told otherwise.
const SECONDS: u32 = 60;

/// What `cargo fuzz` passes as well, without the sanitizer.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// What the command line said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    targets: Vec<String>,
    seconds: Option<u32>,
    input: Option<PathBuf>,
    list: bool,
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
                "--list" => options.list = true,
                "--input" => options.input = Some(value()?.into()),
                "--seconds" => {
                    let seconds = value()?;
                    let number = seconds.parse().ok().filter(|seconds| *seconds > 0);
                    options.seconds = Some(number.ok_or(format!("`{seconds}` is not a number of seconds"))?);
                }
                other if other.starts_with('-') => return Err(format!("`fuzz` does not know {other}")),
                target => options.targets.push(target.to_owned()),
            }
        }
        if options.input.is_some() && options.targets.len() != 1 {
            return Err("--input is for exactly one target".to_owned());
        }
        Ok(options)
    }
}

/// Runs the wanted targets; `Ok(false)` when one failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let workspace = Workspace::load()?;
    let directory = workspace.root.join("fuzz");
    let known = targets(&directory)?;
    if options.list {
        known.iter().for_each(|target| println!("{target}"));
        return Ok(true);
    }
    if let Some(unknown) = options.targets.iter().find(|target| !known.contains(target)) {
        bail!("there is no target `{unknown}`; `cargo xtask fuzz --list` names them");
    }
    let wanted = if options.targets.is_empty() { known } else { options.targets.clone() };
    let built = Built::new(&workspace, &directory)?;
    built.build(&wanted)?;
    if let Some(input) = &options.input {
        process::run(built.command(&wanted[0]).arg("-timeout=20").arg(input))?;
        return Ok(true);
    }
    let mut failed = Vec::new();
    for target in &wanted {
        println!("\n== {target}");
        if !built.fuzz(target, options.seconds.unwrap_or(SECONDS))? {
            failed.push(target.as_str());
        }
    }
    println!("\nfuzz: {} of {} targets failed {}", failed.len(), wanted.len(), failed.join(" "));
    Ok(failed.is_empty())
}

/// The names of all targets: a file each, as `cargo fuzz` wants it.
fn targets(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory.join("fuzz_targets")).context("there are no fuzz targets")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    names.sort();
    Ok(names)
}

/// Where fuzzers are built and what they leave.
struct Built {
    directory: PathBuf,
    target_directory: PathBuf,
    triple: String,
}

impl Built {
    fn new(workspace: &Workspace, directory: &Path) -> Result<Built> {
        let compiler = std::env::var_os("CXX").is_some() || find_program("c++").is_some();
        ensure!(compiler, "libFuzzer is compiled from C++ and there is no C++ compiler; install one (Debian: g++)");
        // The versions of the product, not the newest: what is fuzzed is what is shipped.
        fs::copy(workspace.root.join("Cargo.lock"), directory.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let said = Command::new(rustc).arg("-vV").output().context("cannot run rustc")?.stdout;
        let said = String::from_utf8_lossy(&said).into_owned();
        let triple = said.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
        Ok(Built {
            directory: directory.to_path_buf(),
            target_directory: workspace.target.join("fuzz"),
            triple: triple.to_owned(),
        })
    }

    fn build(&self, targets: &[String]) -> Result<()> {
        let mut command = cargo();
        command.args(["build", "--release", "--target", &self.triple]);
        targets.iter().for_each(|target| {
            command.args(["--bin", target]);
        });
        // A target by name, so that build scripts and procedural macros are compiled without the flags.
        command.env("CARGO_TARGET_DIR", &self.target_directory).env("RUSTFLAGS", FLAGS).current_dir(&self.directory);
        process::run(&mut command)
    }

    fn command(&self, target: &str) -> Command {
        let mut command = Command::new(self.target_directory.join(&self.triple).join("release").join(target));
        command.current_dir(&self.directory);
        command
    }

    /// Fuzzes one target; `Ok(false)` when it failed, after saying on what and how to see it again.
    fn fuzz(&self, target: &str, seconds: u32) -> Result<bool> {
        let found = self.target_directory.join("found").join(target);
        let failures = self.target_directory.join("failures").join(target);
        for directory in [&found, &failures] {
            fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        }
        let mut command = self.command(target);
        command
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-artifact_prefix={}/", failures.display()))
            .args(["-timeout=20", "-rss_limit_mb=2048", "-len_control=20", "-print_final_stats=1"])
            // New inputs go to the first; the committed corpus is only read.
            .arg(&found)
            .arg(self.directory.join("corpus").join(target));
        let before = files(&failures)?;
        if run_watching(&mut command, |_| ()).is_ok() {
            return Ok(true);
        }
        let new: Vec<PathBuf> = files(&failures)?.into_iter().filter(|file| !before.contains(file)).collect();
        if new.is_empty() {
            println!("{target} failed and left no input; look above");
        }
        for input in new {
            println!("{target} failed on {0}\nreplay: cargo xtask fuzz {target} --input {0}", input.display());
        }
        Ok(false)
    }
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        Options::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn wrong_arguments_are_named() {
        assert!(parse(&["--input", "x"]).unwrap_err().contains("exactly one"));
        assert!(parse(&["--seconds", "0"]).unwrap_err().contains("`0`"));
        assert!(parse(&["--fast"]).unwrap_err().contains("--fast"));
        let options = parse(&["manifest", "--seconds", "5"]).unwrap();
        assert_eq!((options.targets, options.seconds), (vec!["manifest".to_owned()], Some(5)));
    }

    #[test]
    fn every_target_is_built_has_a_corpus_and_is_run_by_a_test() {
        let workspace = Workspace::load().unwrap();
        let directory = workspace.root.join("fuzz");
        let manifest = fs::read_to_string(directory.join("Cargo.toml")).unwrap();
        let mut modules = String::new();
        for member in &workspace.members {
            for file in ["src/fuzz.rs", "src/capture/fuzz.rs", "src/journal/fuzz.rs"] {
                let text = fs::read_to_string(member.directory.join(file)).unwrap_or_default();
                modules.extend(text.split_whitespace());
            }
        }
        let targets = targets(&directory).unwrap();
        assert!(targets.len() > 20, "{targets:?}");
        for target in targets {
            assert!(manifest.contains(&format!("name = \"{target}\"")), "{target} is not in fuzz/Cargo.toml");
            assert!(modules.contains(&format!("replay(\"{target}\",{target},")), "no test runs {target}");
            let corpus = fs::read_dir(directory.join("corpus").join(&target));
            assert!(corpus.is_ok_and(|files| files.count() > 0), "{target} has no corpus");
        }
    }
}
