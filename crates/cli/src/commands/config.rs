//! `farshore config check`: is a configuration file right, without starting anything?

use std::path::{Path, PathBuf};

use agent::config::AgentConfig;
use clap::{Args, Subcommand};
use process_server::ServerConfig;
use serde_json::json;

use crate::failure::{Done, Failure, io_failure, usage};
use crate::output::Output;

/// Commands about configuration files.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check a server's or an agent's configuration file without starting anything
    Check(Check),
}

/// Options of `config check`.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The file, TOML
    file: PathBuf,
    /// It is an agent's
    #[arg(long)]
    agent: bool,
}

impl ConfigCommand {
    pub(crate) fn run(&self, output: Output) -> Done {
        let ConfigCommand::Check(check) = self;
        let role = if check.agent {
            AgentConfig::load(&check.file).map_err(|problem| usage(problem.what, problem.why, problem.advice))?;
            "agent"
        } else {
            load_server(&check.file)?;
            "server"
        };
        output.object(&json!({"file": check.file, "role": role, "valid": true}))?;
        output.line(format!("{} is right for a {role}", check.file.display()))
    }
}

/// Reads and checks a server's configuration.
pub(crate) fn load_server(path: &Path) -> Done<ServerConfig> {
    let what = || format!("the configuration {} cannot be used", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| io_failure(what(), &error))?;
    let config = ServerConfig::parse(&text).map_err(|error| {
        usage(what(), error.to_string().trim(), "correct the key; docs/operations/configuration.md lists all of them")
    })?;
    for (key, directory) in [("state_dir", &config.state_dir), ("vault", &config.vault)] {
        if !directory.is_absolute() {
            let why = format!("{key} is not an absolute path");
            return Err(usage(what(), why, "a server does not depend on where it was started: begin the path with /"));
        }
    }
    if !agent::config::is_address(&config.listen) {
        return Err(usage(
            what(),
            format!("listen = {:?} is not host:port", config.listen),
            "write it as 0.0.0.0:7443",
        ));
    }
    if config.advertise.iter().any(|address| !agent::config::is_address(address)) {
        return Err(usage(what(), "an address in advertise is not host:port", "write it as ps1.example:7443"));
    }
    let target = &config.master_target;
    if target.enabled && target.disks.is_empty() {
        return Err(usage(
            what(),
            "[master_target] is enabled and `disks` names nothing",
            "name the disks, image files or folders that a failback may write over",
        ));
    }
    if let Some(relative) = target.disks.iter().find(|path| !path.is_absolute()) {
        let why = format!("{} in `disks` of [master_target] is not an absolute path", relative.display());
        return Err(usage(what(), why, "begin the path with /"));
    }
    if config.journal_bytes_max < 2 * config.seal_bytes {
        return Err(Failure::new(
            what(),
            "journal_bytes_max is less than twice seal_bytes: the journal would be full before anything is sealed",
            "enlarge journal_bytes_max or lower seal_bytes",
        )
        .with(crate::failure::Verdict::Usage));
    }
    Ok(config)
}
