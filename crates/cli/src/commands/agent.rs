//! `farshore agent …`: runs the `farshore-agent` that lies beside this program.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::failure::{Done, Failure, io_failure};

/// The agent's program, beside this one.
pub(crate) fn program() -> Done<PathBuf> {
    let own = std::env::current_exe().map_err(|error| io_failure("this program cannot find itself", &error))?;
    let beside = own.with_file_name("farshore-agent");
    if beside.is_file() {
        return Ok(beside);
    }
    Err(Failure::new(
        format!("there is no agent at {}", beside.display()),
        "`farshore agent` only runs the farshore-agent that lies beside it",
        "install both programs into one folder; with cargo: `cargo build --release --bins`",
    ))
}

/// Becomes the agent.
pub(crate) fn run(arguments: &[OsString]) -> Done {
    let program = program()?;
    // Returns only if it did not succeed.
    let error = Command::new(&program).args(arguments).exec();
    Err(io_failure(format!("{} cannot be run", program.display()), &error))
}
