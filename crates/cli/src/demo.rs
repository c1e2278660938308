//! `farshore demo`: the whole product at work on this machine, proven by a ledger that it does not keep itself.

mod check;
mod disk;
mod ledger;
mod timeline;
mod workload;

use std::path::PathBuf;

use clap::Args;

use crate::failure::Done;
use crate::output::Output;

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
    pub(crate) fn run(&self, _output: Output) -> Done {
        Ok(())
    }
}
