//! The project's own commands, run as `cargo xtask <command>`.
//!
//! * `test`: everything that must hold before a change is merged, on a machine that has only Rust and a C compiler.
//! * `tidy`: the rules about the source tree that no compiler checks.
//! * `fuzz`: throws bytes at every parser of bytes from outside.
//! * `kernels`: the capture's tests in guests with other kernels.
//! * `dist`: the agent as one small static program.
//! * `bpf`: builds the capture programs, after a change of their source.
//! * `bench`: Farshore beside its peers, on the same disk, in the same run.

mod apt;
mod bench;
mod bpf;
mod components;
mod dist;
mod fuzz;
mod kernels;
mod process;
mod skips;
mod stages;
mod tidy;
mod workspace;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <command> [options]

  test    check everything; exits non-zero if a stage fails, or in CI if a test was skipped without permission
            --only STAGE   run just this stage (repeatable); see the names with --list
            --quick        leave out other kernels and what needs a release build (simulation, demo)
            --no-install   never install a missing component; tests that need it say SKIPPED
            --seeds N      how many seeds the simulation runs (default 25, with --quick 20)
            --list         print the stages and stop
  tidy    check the rules about the source tree
  fuzz    run the fuzzers, all or those named; exits non-zero if one finds something
            --seconds N    how long each runs (default 60)
            --input FILE   run one target on this input and stop
            --list         print the targets and stop
  kernels run the capture's tests in emulated guests with other kernels
  dist    build the agent as one small static program, and print its size
  bpf     build the capture programs' object from their source
  bench   measure beside peers
            --size BYTES   size of the reference disk, e.g. 2GiB (default 1GiB)
            --full         the reference disk of the published table, 16 GiB, and --write
            --write        write the table to docs/benchmarks.md, if every case was measured
            --only CASE    run just this case (repeatable)
            --scratch DIR  where disks and repositories go (default: below the target directory)
            --keep         leave the reference disk there for the next run
            --programs DIR measure the programs in DIR instead of building them
            --no-install   leave out peers that are not installed
            --list         print the cases and stop
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((command, rest)) = arguments.split_first() else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let outcome = match command.as_str() {
        "test" => stages::Options::parse(rest).map(|options| stages::run(&options)),
        "tidy" if rest.is_empty() => Ok(tidy::run()),
        "fuzz" => fuzz::Options::parse(rest).map(|options| fuzz::run(&options)),
        "bpf" if rest.is_empty() => Ok(bpf::write()),
        "dist" if rest.is_empty() => Ok(dist::run()),
        "kernels" if rest.is_empty() => Ok(kernels::run_all()),
        "bench" => bench::Options::parse(rest).map(|options| bench::run(&options)),
        "help" | "--help" | "-h" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => Err(format!("there is no command `{other}` with these arguments")),
    };
    match outcome {
        Err(wrong_usage) => {
            eprintln!("error: {wrong_usage}\n\n{USAGE}");
            ExitCode::from(2)
        }
        Ok(Err(failure)) => {
            eprintln!("error: {failure:#}");
            ExitCode::FAILURE
        }
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
    }
}
