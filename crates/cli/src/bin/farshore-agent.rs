//! `farshore-agent`: the mobility agent of a protected machine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agent::config::AgentConfig;
use agent::service::problem::Problem;
use clap::{Args, Parser, Subcommand};

#[path = "../agent/ask.rs"]
mod ask;
#[path = "../agent/check.rs"]
mod check;
#[path = "../agent/join.rs"]
mod join;
#[path = "../agent/look.rs"]
mod look;
#[path = "../agent/metrics.rs"]
mod metrics;
#[path = "../agent/output.rs"]
mod output;
#[path = "../parent.rs"]
mod parent;
#[path = "../agent/run.rs"]
mod run;

use output::Output;

/// The mobility agent: serves protected disks over NBD and replicates what is written to them.
///
/// Exit codes: 0 done, 1 failed, 2 wrong usage, 3 nothing changed because it already was so, 4 unsafe and refused.
#[derive(Parser)]
#[command(name = "farshore-agent", version, max_term_width = 100)]
struct Cli {
    /// Print data as JSON, one object, and problems as JSON on the error output.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Enrol this machine at a process server with a one-time token.
    Join(join::JoinArguments),
    /// Serve and protect the disks until told to stop (SIGTERM, SIGINT, `stop`).
    Run(run::RunArguments),
    /// Look whether `run` would succeed: disks, state, certificate, server. Changes nothing.
    Check {
        /// The configuration file.
        #[arg(long, env = "FARSHORE_AGENT_CONFIG", value_name = "FILE")]
        config: PathBuf,
    },
    /// Say how the running agent is.
    Status(Target),
    /// The same as metrics in the text format of Prometheus.
    Metrics(Target),
    /// Which disks this machine has, what lies on them, and which to protect. Root sees more.
    Disks,
    /// This machine as recovery will need to know it; the agent sends the same to the vault.
    Hardware,
    /// Mark this moment as a recovery point.
    Mark {
        /// The point's name.
        name: String,
        /// Bring applications and file systems to rest for it, as `[consistency]` says. If a part fails, the point is
        /// crash-consistent, says why, and the exit code is 1.
        #[arg(long)]
        consistent: bool,
        /// Wait at most so many seconds until the process server has it durably. Without it, the mark is only noted.
        #[arg(long, default_value_t = 0, value_name = "SECONDS")]
        wait_s: u64,
        #[command(flatten)]
        target: Target,
    },
    /// Bring all disks to rest, without scripts and hooks: writes wait until `thaw`, or until the limit is over.
    Freeze {
        /// Milliseconds after which writes go on in any case.
        #[arg(long, value_name = "MILLISECONDS")]
        limit_ms: u64,
        /// Mark the moment of rest as an application-consistent recovery point.
        #[arg(long, value_name = "NAME")]
        mark: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Let writes go on after `freeze`, or after an agent that was killed while it took a point.
    Thaw(Target),
    /// Have the running agent take the disks of its configuration file: added ones join while the others stream on, others
    /// leave. A file with a mistake is refused as a whole. SIGHUP does the same.
    Reload {
        /// The agent's configuration file.
        #[arg(long, env = "FARSHORE_AGENT_CONFIG", value_name = "FILE")]
        config: PathBuf,
    },
    /// Compare a disk, or all of them, with the vault now, at the pace of `[scrub]`. What differs is healed, and points since it
    /// was last known to be equal say so. `status` tells how it goes.
    Scrub {
        /// The disk's name in the configuration.
        disk: Option<String>,
        #[command(flatten)]
        target: Target,
    },
    /// Stop the running agent in order and wait until it has ended. Capture by eBPF goes on in the kernel; see `detach`.
    Stop(Target),
    /// Take the eBPF programs of a stopped agent out of the kernel.
    ///
    /// They stay when an agent ends, so that the next one need not compare. Without them nothing is remembered of what is
    /// written: the next start compares whole disks, and until that has ended there are no new points.
    Detach {
        /// The agent's configuration file.
        #[arg(long, env = "FARSHORE_AGENT_CONFIG", value_name = "FILE")]
        config: PathBuf,
    },
}

/// Which agent is meant.
#[derive(Args)]
struct Target {
    /// The agent's state directory.
    #[arg(long, env = "FARSHORE_AGENT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// The agent's configuration file.
    #[arg(long, env = "FARSHORE_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Target {
    fn config(&self) -> Result<AgentConfig, Problem> {
        match (&self.state_dir, &self.config) {
            (Some(state_dir), _) => Ok(AgentConfig::new(state_dir)),
            (None, Some(config)) => AgentConfig::load(config),
            (None, None) => Err(Problem::usage(
                "which agent is meant is not said",
                "neither its state directory nor its configuration is named",
                "add --state-dir DIR or --config FILE, or set FARSHORE_AGENT_CONFIG",
            )),
        }
    }
}

fn main() -> ExitCode {
    parent::end_with_it();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for and succeed. Nothing can be done if they cannot be printed.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let output = Output::new(cli.json);
    let outcome = match cli.command {
        Command::Join(arguments) => join::join(&arguments, &output).map_err(|problem| vec![problem]),
        Command::Run(arguments) => run::run(&arguments, &output),
        Command::Check { config } => check::check(&config, &output),
        Command::Metrics(target) => ask::metrics(&target).map_err(|problem| vec![problem]),
        Command::Disks => {
            look::disks(&output);
            Ok(())
        }
        Command::Hardware => {
            look::hardware(&output);
            Ok(())
        }
        Command::Status(target) => ask::status(&target, &output).map_err(|problem| vec![problem]),
        Command::Mark { name, consistent: true, wait_s, target } => {
            ask::point(&target, &name, wait_s, &output).map_err(|problem| vec![problem])
        }
        Command::Mark { name, wait_s, target, .. } => {
            ask::mark(&target, &name, wait_s, &output).map_err(|problem| vec![problem])
        }
        Command::Freeze { limit_ms, mark, target } => {
            ask::freeze(&target, limit_ms, mark, &output).map_err(|problem| vec![problem])
        }
        Command::Scrub { disk, target } => ask::scrub(&target, disk, &output).map_err(|problem| vec![problem]),
        Command::Thaw(target) => ask::thaw(&target, &output).map_err(|problem| vec![problem]),
        Command::Stop(target) => ask::stop(&target, &output).map_err(|problem| vec![problem]),
        Command::Reload { config } => ask::reload(&config, &output).map_err(|problem| vec![problem]),
        Command::Detach { config } => detach(&config, &output).map_err(|problem| vec![problem]),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => output.problems(&problems),
    }
}

fn detach(config: &Path, output: &Output) -> Result<(), Problem> {
    let config = AgentConfig::load(config)?;
    agent::service::detach(&config)?;
    output.data(
        &serde_json::json!({ "detached": true, "pins": config.ebpf_pins() }),
        "detached: the kernel captures nothing any more; the next start compares whole disks",
    );
    Ok(())
}
