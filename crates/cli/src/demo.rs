//! `farshore demo`: the whole product at work on this machine, proven by a ledger that it does not keep itself.

mod acts;
mod check;
mod disk;
mod home;
mod keep;
mod kernel;
mod kernel_machine;
mod ledger;
mod processes;
mod proof;
mod site;
mod timeline;
mod watch;
mod workload;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::Args;
use tempfile::TempDir;
use world::{Clock, SystemClock};

use crate::failure::{Done, Failure, Verdict, io_failure};
use crate::output::Output;

pub(crate) use kernel_machine::KernelMachine;
pub(crate) use workload::Workload;

/// Options of `demo`.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Decides what is written and which second is opened; printed, so that a run can be repeated
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// New folder in which the vault, its key, the ledger and the images are left
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Size of the disk in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1088, value_parser = clap::value_parser!(u64).range(96..=65536))]
    size: u64,
}

impl Demo {
    pub(crate) fn run(&self, output: Output) -> Done {
        let seed = self.seed.unwrap_or_else(|| SystemClock.wall().0 % 1_000_000);
        let state = folder()?;
        let (data, data_folder) = match &self.keep {
            Some(directory) => (new_directory(directory)?, None),
            None => {
                let folder = folder()?;
                (folder.path().to_path_buf(), Some(folder))
            }
        };
        let paths = site::Paths::new(&data, state.path())?;
        let programs = processes::Programs::find(state.path().join("logs"))?;
        let plan = acts::Plan { seed, size: self.size << 20, keep: self.keep.is_some() };
        let outcome = acts::play(&plan, paths, programs, output);
        if let (Err(_), Some(directory)) = (&outcome, &self.keep) {
            // What is kept of a failed run is for whoever looks for the fault.
            let _ = copy_logs(&state.path().join("logs"), &directory.join("logs"));
        }
        drop(data_folder);
        outcome
    }
}

/// A folder of our own that is removed at the end.
fn folder() -> Done<TempDir> {
    tempfile::Builder::new()
        .prefix("farshore-demo-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
        .map_err(|error| io_failure("a temporary folder cannot be made", &error))
}

/// The folder to keep things in, absolute. It must not hold anything.
fn new_directory(directory: &PathBuf) -> Done<PathBuf> {
    let refused = |error: std::io::Error| io_failure(format!("{} cannot be made", directory.display()), &error);
    fs::create_dir_all(directory).map_err(refused)?;
    if fs::read_dir(directory).map_err(refused)?.next().is_some() {
        return Err(Failure::new(
            format!("{} is not empty", directory.display()),
            "the demo writes a vault there and overwrites nothing",
            "name a new folder with --keep",
        )
        .with(Verdict::Refused));
    }
    directory.canonicalize().map_err(refused)
}

fn copy_logs(from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
