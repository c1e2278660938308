//! `farshore server`: the server roles of one site in one process.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use process_server::ServerConfig;
use recovery::home_disk::HostView;
use recovery::{HomeReception, HomeRules, MasterTarget};
use serde_json::json;
use tracing_subscriber::EnvFilter;
use world::RealFiles;

use super::config::load_server;
use crate::failure::{Done, Failure, io_failure};
use crate::output::Output;
use crate::progress::StopRequest;
use crate::vault_access::{clock, entropy};

/// Directory of the master target's notes in the state directory.
const MASTER_TARGET: &str = "master-target";

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
        let reception = Arc::new(HomeReception::new(master_target(&config)?));
        let unfinished = unfinished(&reception)?;
        let door = Arc::clone(&reception);
        let others: process_server::server::OtherPeers =
            Arc::new(move |peer, connection| door.serve(peer, &connection));
        let mut server = process_server::Server::start(&config, Some(others))?;
        let target = reception.target().is_some();
        let notes: Vec<_> = unfinished
            .iter()
            .map(|(machine, chain, disks)| json!({"machine": machine, "chain": chain, "disks": disks}))
            .collect();
        output.object(&json!({"event": "ready", "address": server.address().to_string(), "master_target": target,
                              "unfinished_failbacks": notes}))?;
        let homes = if target { " and recovery hosts" } else { "" };
        output.remark(format!("ready for agents{homes} on {}; Ctrl-C stops", server.address()))?;
        stop.wait(|| server.failure().is_some());
        // A service manager starts it again, on a journal that is read anew.
        if let Some(failure) = server.failure() {
            reception.stop();
            server.stop();
            return Err(failure.into());
        }
        output.remark("stopping: committing what is pending")?;
        reception.stop();
        server.stop();
        output.object(&json!({"event": "stopped"}))?;
        output.remark("stopped; agents keep what they cannot send and go on when the server is back")
    }
}

/// The master target that the configuration asks for.
fn master_target(config: &ServerConfig) -> Done<Option<MasterTarget>> {
    if !config.master_target.enabled {
        return Ok(None);
    }
    let notes = config.state_dir.join(MASTER_TARGET);
    std::fs::create_dir_all(&notes)
        .map_err(|error| io_failure(format!("the folder {} cannot be made", notes.display()), &error))?;
    let rules = HomeRules {
        allowed: Some(config.master_target.disks.clone()),
        own: vec![
            (config.state_dir.clone(), "this server's keys and journal".into()),
            (config.vault.clone(), "the vault".into()),
        ],
        host: HostView::default(),
    };
    Ok(Some(MasterTarget::new(Arc::new(RealFiles::new(&notes)), clock(), entropy(), rules)))
}

/// Says which home disks are between two states, as a kill in the middle of a failback left them.
fn unfinished(reception: &HomeReception) -> Done<Vec<(String, String, Vec<PathBuf>)>> {
    let Some(target) = reception.target() else { return Ok(Vec::new()) };
    let notes = target.unfinished().map_err(|error| {
        Failure::because("the master target's notes cannot be read", &error, "check the state directory")
    })?;
    Ok(notes
        .into_iter()
        .map(|note| {
            let disks: Vec<PathBuf> = note.disks.into_iter().map(|disk| disk.path).collect();
            tracing::warn!(
                machine = note.machine,
                chain = note.chain,
                ?disks,
                "a failback is not finished: these disks are not usable until it is ordered again and ends"
            );
            (note.machine, note.chain, disks)
        })
        .collect())
}

/// Messages of the running program, on standard error. `FARSHORE_LOG` chooses which.
pub(crate) fn begin_log(output: Output) {
    let filter = EnvFilter::try_from_env("FARSHORE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let builder = builder.with_ansi(std::io::stderr().is_terminal());
    // A second one in the same process changes nothing.
    let _ = if output.json { builder.json().try_init() } else { builder.try_init() };
}
