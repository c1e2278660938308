//! `farshore token new`: what an operator copies to a machine that is to join.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use link::{Authority, Role, TokenOrder};
use process_server::server::AUTHORITY;
use replication::MachineId;
use serde_json::json;
use world::{RealFiles, WallTime};

use super::config::load_server;
use crate::failure::{Done, Failure, usage};
use crate::output::Output;
use crate::vault_access::{clock, entropy};

/// Longest validity of a token, in hours.
const HOURS_MAX: u64 = 24 * 90;

/// Commands about tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a one-time token and print it; run on the server, while it runs or not
    New(New),
}

/// Options of `token new`.
#[derive(Debug, Args)]
pub(crate) struct New {
    /// The server's configuration file
    #[arg(long, value_name = "FILE", env = "FARSHORE_SERVER_CONFIG", default_value = "/etc/farshore/server.toml")]
    config: PathBuf,
    /// What will join
    #[arg(long, value_enum, default_value_t = JoiningRole::Agent)]
    role: JoiningRole,
    /// The machine, by its id, if it is protected already and is to move here with its history
    #[arg(long, value_name = "ID")]
    machine: Option<MachineId>,
    /// Hours for which the token can be used
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    valid_hours: u64,
    /// Where the machine reaches this server, host:port; else `advertise` of the configuration
    #[arg(long, value_name = "HOST:PORT")]
    address: Vec<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum JoiningRole {
    Agent,
    RecoveryHost,
}

impl TokenCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        let TokenCommand::New(command) = self;
        command.run(output)
    }
}

impl New {
    fn run(&self, output: Output) -> Done {
        let config = load_server(&self.config)?;
        if !(1..=HOURS_MAX).contains(&self.valid_hours) {
            return Err(usage(
                format!("a token cannot be valid for {} hours", self.valid_hours),
                "whoever finds it could join",
                format!("choose 1 to {HOURS_MAX} hours"),
            ));
        }
        let addresses = [&self.address, &config.advertise].into_iter().find(|list| !list.is_empty());
        let addresses = addresses.cloned().unwrap_or_else(|| {
            // A wildcard is no address that anybody can reach.
            let wildcard = ["0.0.0.0:", "[::]:"].iter().any(|begin| config.listen.starts_with(begin));
            if wildcard || config.listen.ends_with(":0") { Vec::new() } else { vec![config.listen.clone()] }
        });
        let files = Arc::new(RealFiles::new(&config.state_dir));
        let refused = |error: &dyn std::error::Error| {
            Failure::because("no token can be made", error, "check --address, and the server's state directory")
        };
        let authority = Authority::open(files, clock(), entropy(), AUTHORITY).map_err(|error| refused(&error))?;
        let role = match self.role {
            JoiningRole::Agent => Role::Agent,
            JoiningRole::RecoveryHost => Role::RecoveryHost,
        };
        let id = self.machine.map(|machine| machine.0);
        if id.is_some() && role != Role::Agent {
            return Err(usage(
                "only a machine moves",
                "the token is for another role",
                "leave out --machine or --role",
            ));
        }
        let valid_for = Duration::from_secs(self.valid_hours * 3600);
        let order = TokenOrder { role, id, valid_for, addresses: addresses.clone() };
        let token = authority.order_token(&order).map_err(|error| refused(&error))?;
        let text = token.to_text().map_err(|error| refused(&error))?;
        output.object(&json!({
            "token": text.as_str(), "role": role.short_name(), "expires_seconds": token.expires.seconds(),
            "addresses": addresses,
        }))?;
        output.line(text.as_str())?;
        if addresses.is_empty() {
            let join = match self.role {
                JoiningRole::Agent => "farshore-agent join",
                JoiningRole::RecoveryHost => "farshore join",
            };
            output.aside(format!("it names no address: give the machine one with `{join} --server HOST:PORT`"));
        }
        // The token alone goes to standard output, so that it can be redirected to a file.
        output.aside(format!("usable once, until {}", WallTime::from_seconds(token.expires.seconds())));
        Ok(())
    }
}
