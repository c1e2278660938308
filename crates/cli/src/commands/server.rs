//! `farshore server`: the server roles of one site in one process.

use std::path::PathBuf;

use clap::Args;
use process_server::ServerConfig;
use serde_json::json;
use tracing_subscriber::EnvFilter;

use super::config::load_server;
use crate::failure::Done;
use crate::output::Output;
use crate::progress::StopRequest;

/// Options of `server`.
#[derive(Debug, Args)]
pub(crate) struct Server {
    /// Configuration file, TOML
    #[arg(long, value_name = "FILE", env = "FARSHORE_SERVER_CONFIG", default_value = "/etc/farshore/server.toml")]
    config: PathBuf,
}

impl Server {
    pub(crate) fn run(&self, output: Output) -> Done {
        let config: ServerConfig = load_server(&self.config)?;
        begin_log(output);
        let stop = StopRequest::listen()?;
        let mut server = process_server::Server::start(&config, None)?;
        output.object(&json!({"event": "ready", "address": server.address().to_string()}))?;
        output.remark(format!("ready for agents on {}; Ctrl-C stops", server.address()))?;
        stop.wait(|| false);
        output.remark("stopping: committing what is pending")?;
        server.stop();
        output.object(&json!({"event": "stopped"}))?;
        output.remark("stopped; agents keep what they cannot send and go on when the server is back")
    }
}

/// Messages of the running program, on standard error. `FARSHORE_LOG` chooses which.
pub(crate) fn begin_log(output: Output) {
    let filter = EnvFilter::try_from_env("FARSHORE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    // A second one in the same process changes nothing.
    let _ = if output.json { builder.json().try_init() } else { builder.try_init() };
}
