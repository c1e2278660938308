//! The words of the command line.

use std::ffi::OsString;

use clap::{Parser, Subcommand};

use crate::commands::{branch, completion, config, failback, failover, inner_agent, join, server, token, vault};
use crate::demo;
use crate::failure::Done;
use crate::output::Output;

/// Farshore: a continuously updated copy of running machines at a second site, recoverable to any second.
#[derive(Debug, Parser)]
#[command(name = "farshore", version, max_term_width = 100, disable_help_subcommand = true, after_help = AFTER)]
pub(crate) struct Arguments {
    /// Print one JSON object per line instead of text; errors too, on standard error
    #[arg(long, global = true)]
    json: bool,
    /// Print only what was asked for
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Answer yes to every question
    #[arg(long, global = true)]
    yes: bool,
    #[command(subcommand)]
    command: Command,
}

const AFTER: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing changed because it already was so, \
                     4 refused because it is unsafe";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server: receives replication and keeps the vault current
    Server(server::Server),
    /// One-time tokens with which machines join
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Enrol this host at a server, so that branches it serves can be brought home there
    Join(join::Join),
    /// The vault: make it, look at it, check it
    #[command(subcommand)]
    Vault(vault::VaultCommand),
    /// Branches: a machine's disks as they were at any moment
    #[command(subcommand)]
    Branch(branch::BranchCommand),
    /// Go on with a machine as a branch, because it is lost; commit or cancel that
    Failover(failover::Failover),
    /// Bring a branch home, to disks of this host or of another
    Failback(failback::Failback),
    /// Show the whole product at work on this machine, and prove what it recovers
    Demo(demo::Demo),
    /// Configuration files
    #[command(subcommand)]
    Config(config::ConfigCommand),
    #[command(name = "__agent", hide = true, subcommand)]
    InnerAgent(inner_agent::InnerAgent),
    #[command(name = "__keeper", hide = true)]
    Keeper(crate::keeper::Keeper),
    #[command(name = "__kernel-machine", hide = true)]
    KernelMachine(demo::KernelMachine),
    #[command(name = "__workload", hide = true)]
    Workload(demo::Workload),
    /// Run the mobility agent that lies beside this program
    #[command(disable_help_flag = true)]
    Agent {
        /// What the agent is told
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
        arguments: Vec<OsString>,
    },
    /// Print the completion script of a shell
    Completion(completion::Completion),
}

impl Arguments {
    /// How the command talks.
    pub(crate) fn output(&self) -> Output {
        Output { json: self.json, quiet: self.quiet, yes: self.yes }
    }

    /// Does what was asked.
    pub(crate) fn run(&self) -> Done {
        let output = self.output();
        match &self.command {
            Command::Server(command) => command.run(output),
            Command::Token(command) => command.run(output),
            Command::Join(command) => command.run(output),
            Command::Failover(command) => command.run(output),
            Command::Failback(command) => command.run(output),
            Command::Keeper(command) => command.run(),
            Command::Demo(command) => command.run(output),
            Command::Config(command) => command.run(output),
            Command::InnerAgent(command) => command.run(output),
            Command::KernelMachine(command) => command.run(),
            Command::Workload(command) => command.run(),
            Command::Vault(command) => command.run(output),
            Command::Branch(command) => command.run(output),
            Command::Agent { arguments } => crate::commands::agent::run(arguments),
            Command::Completion(command) => command.run(),
        }
    }
}
