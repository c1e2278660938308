//! `farshore branch …`

mod control;
mod discard;
mod export;
mod image;
mod list;
mod open;
mod read_only;

use clap::Subcommand;

pub(crate) use open::{Serving, default_state, serve_branch, state_root};

use crate::failure::Done;
use crate::output::Output;

/// Commands about branches.
#[derive(Debug, Subcommand)]
pub(crate) enum BranchCommand {
    /// Open a machine's disks at a moment, writable, and serve them over NBD until Ctrl-C
    Open(open::Open),
    /// Serve a branch of this host again, after a stop or a crash
    Reopen(open::Reopen),
    /// The branches of the vault
    List(list::List),
    /// Give a branch up; its history stays in the vault
    Discard(discard::Discard),
    /// Write a disk, as it was at a moment, to a file
    Export(export::Export),
}

impl BranchCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        match self {
            BranchCommand::Open(command) => command.run(output),
            BranchCommand::Reopen(command) => command.run(output),
            BranchCommand::List(command) => command.run(output),
            BranchCommand::Discard(command) => command.run(output),
            BranchCommand::Export(command) => command.run(output),
        }
    }
}
