//! `farshore`: servers and everything an operator does. One file per subcommand in `commands/`; the demo in `demo/`.
//!
//! A command returns [`failure::Done`]: what went wrong is told in three parts, and the exit code says what kind it is.

mod arguments;
mod commands;
mod demo;
mod failure;
mod keeper;
mod moment;
mod output;
mod parent;
mod progress;
mod secrets;
mod vault_access;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    parent::end_with_it();
    // Clap prints its own message and ends with 2 on wrong usage, with 0 after help.
    let arguments = arguments::Arguments::parse();
    match arguments.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(arguments.output().json);
            failure.exit_code()
        }
    }
}
