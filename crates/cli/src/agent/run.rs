//! `farshore-agent run`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use agent::config::AgentConfig;
use agent::service::problem::Problem;
use agent::service::{Reloader, Service, ServiceOptions, Stopper};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use world::SystemClock;

use crate::output::Output;

#[derive(Args)]
pub(crate) struct RunArguments {
    /// The configuration file.
    #[arg(long, env = "FARSHORE_AGENT_CONFIG", value_name = "FILE")]
    config: PathBuf,
    /// A disk that may have shrunk or been replaced; it is compared as a whole. May be repeated.
    #[arg(long, value_name = "NAME")]
    accept_disk: Vec<String>,
    /// Write the log as JSON, one object a line.
    #[arg(long, env = "FARSHORE_LOG_JSON")]
    log_json: bool,
}

pub(crate) fn run(arguments: &RunArguments, _output: &Output) -> Result<(), Vec<Problem>> {
    let config = AgentConfig::load(&arguments.config).map_err(|problem| vec![problem])?;
    begin_log(arguments.log_json);
    // From here on a signal is answered in order, also one that comes during the start.
    let signals = Signals::catch().map_err(|problem| vec![problem])?;
    let options = ServiceOptions { accept_disks: arguments.accept_disk.clone(), clock: Arc::new(SystemClock) };
    let service = Service::start(&config, options)?;
    let config = std::path::absolute(&arguments.config).unwrap_or_else(|_| arguments.config.clone());
    signals.follow(service.stopper(), service.reloader(), config).map_err(|problem| vec![problem])?;
    let why = service.wait();
    tracing::info!(why, "asked to stop");
    service.stop().map_err(|problem| vec![problem])
}

fn begin_log(json: bool) {
    let filter = EnvFilter::try_from_env("FARSHORE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json {
        log.json().init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).with_target(false).init();
    }
}

/// SIGTERM, SIGINT and SIGHUP, caught from the moment this exists. SIGPIPE stays ignored, as at the start of every Rust program:
/// an NBD client that goes away must not end the agent.
struct Signals {
    runtime: tokio::runtime::Runtime,
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn catch() -> Result<Signals, Problem> {
        let problem = |error: std::io::Error| {
            Problem::caused("signals cannot be caught", &error, "raise the limits of files and threads")
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(problem)?;
        let inside = runtime.enter();
        let terminate = signal(SignalKind::terminate()).map_err(problem)?;
        let interrupt = signal(SignalKind::interrupt()).map_err(problem)?;
        let hang_up = signal(SignalKind::hangup()).map_err(problem)?;
        drop(inside);
        Ok(Signals { runtime, terminate, interrupt, hang_up })
    }

    /// Has the agent read `config` again on SIGHUP and stops it on the first other one, on a thread of its own.
    fn follow(self, stopper: Stopper, reloader: Reloader, config: PathBuf) -> Result<(), Problem> {
        let Signals { runtime, mut terminate, mut interrupt, mut hang_up } = self;
        let watch = move || {
            loop {
                let name = runtime.block_on(async {
                    tokio::select! {
                        _ = terminate.recv() => Some("SIGTERM"),
                        _ = interrupt.recv() => Some("SIGINT"),
                        _ = hang_up.recv() => None,
                    }
                });
                match name {
                    Some(name) => return stopper.request(name),
                    None => match reloader.reload(&config) {
                        Ok(changes) => tracing::info!(changes = changes.len(), "the configuration was read again"),
                        Err(problem) => tracing::error!(%problem, "SIGHUP"),
                    },
                }
            }
        };
        let thread = std::thread::Builder::new().name("signals".to_owned()).spawn(watch);
        thread
            .map(drop)
            .map_err(|error| Problem::caused("signals cannot be caught", &error, "raise the limit of threads"))
    }
}
