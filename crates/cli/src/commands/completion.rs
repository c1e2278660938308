//! `farshore completion`: what a shell needs to complete this program's words.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::arguments::Arguments;
use crate::failure::Done;

/// Options of `completion`.
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completion {
    pub(crate) fn run(&self) -> Done {
        clap_complete::generate(self.shell, &mut Arguments::command(), "farshore", &mut std::io::stdout());
        Ok(())
    }
}
