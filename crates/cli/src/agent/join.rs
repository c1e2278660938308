//! `farshore-agent join`.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent::config::is_address;
use agent::service::control::{Answer, Request, ask};
use agent::service::problem::Problem;
use agent::state::{StateDir, host_name};
use clap::Args;
use link::{JoinToken, LinkRuntime};
use serde::Serialize;
use world::SystemClock;

use crate::output::Output;

#[derive(Args)]
pub(crate) struct JoinArguments {
    /// The token that the server printed. Others on this machine may see a command line: prefer --token-file.
    #[arg(long, env = "FARSHORE_TOKEN", hide_env_values = true, required_unless_present = "token_file")]
    token: Option<String>,
    /// A file that holds the token; `-` is the input.
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    token_file: Option<PathBuf>,
    /// Where the agent keeps its identity and state; created if it does not exist.
    #[arg(long, env = "FARSHORE_AGENT_STATE_DIR", value_name = "DIR")]
    state_dir: PathBuf,
    /// The machine's name, for people; default: the host's name.
    #[arg(long)]
    name: Option<String>,
    /// Of a machine that moves to another server while its agent runs: how long the old server may take to commit what it
    /// has. In seconds; after that there is a gap, healed from the maps.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    move_limit_s: u64,
    /// A server address that the token does not name, tried first. May be repeated.
    #[arg(long, value_name = "HOST:PORT")]
    server: Vec<String>,
}

#[derive(Serialize)]
struct Joined {
    machine: String,
    machine_name: String,
    state_dir: String,
    /// Of a running agent that moved: whether the old server had committed everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    drained: Option<bool>,
}

pub(crate) fn join(arguments: &JoinArguments, output: &Output) -> Result<(), Problem> {
    if let Some(bad) = arguments.server.iter().find(|address| !is_address(address)) {
        return Err(Problem::usage(
            "the server's address cannot be used",
            format!("`{bad}` is not host:port"),
            "write it as ps1.example:7443",
        ));
    }
    let token = JoinToken::parse(&token_text(arguments)?)
        .map_err(|error| Problem::usage("the token cannot be used", error.to_string(), "copy it again as a whole"))?;
    let runtime = LinkRuntime::new(1)
        .map_err(|error| Problem::caused("the join cannot begin", &error, "raise the limit of threads"))?;
    let state_dir = std::path::absolute(&arguments.state_dir)
        .map_err(|error| Problem::caused("the state directory cannot be used", &error, "name another"))?;
    let state = StateDir::open(&state_dir)?;
    let known = state.enrolment().machine_name;
    let name = arguments.name.clone().or_else(|| (!known.is_empty()).then_some(known)).unwrap_or_else(host_name);
    let moves = state.identity()?.is_some();
    let identity = state.join(&runtime, Arc::new(SystemClock), &token, &name, &arguments.server)?;
    let moved = if moves { tell_agent(&state_dir, arguments.move_limit_s)? } else { None };
    let joined = Joined {
        machine: replication::MachineId(identity.peer.id).to_string(),
        machine_name: name,
        state_dir: state_dir.display().to_string(),
        drained: moved,
    };
    let next = match (moves, moved) {
        (false, _) => "next: write a configuration, then `farshore-agent check --config FILE`",
        (true, Some(true)) => "the running agent goes on at the new server, without a gap",
        (true, Some(false)) => {
            "the running agent goes on at the new server; what the old one had not committed is healed"
        }
        (true, None) => "the agent goes on at the new server when it is started",
    };
    let text = format!("{} is enrolled as machine {}\n{next}", joined.machine_name, joined.machine);
    output.data(&joined, text);
    Ok(())
}

/// Has the agent that runs on this state directory go on at the new server. `None` if none runs.
fn tell_agent(state_dir: &Path, limit_s: u64) -> Result<Option<bool>, Problem> {
    let socket = state_dir.join("control.sock");
    if !socket.exists() {
        return Ok(None);
    }
    match ask(&socket, &Request::Move { within_ms: limit_s.saturating_mul(1000) }) {
        Ok(Answer::Moved { drained }) => Ok(Some(drained)),
        Ok(other) => Err(Problem::failed(
            "the agent did not move",
            format!("it answered {other:?}"),
            "restart it: it goes on at the new server",
        )),
        // A killed agent leaves its socket behind.
        Err(problem) if problem.what.contains("not running") => Ok(None),
        Err(problem) => Err(problem),
    }
}

fn token_text(arguments: &JoinArguments) -> Result<String, Problem> {
    let limit = link::limits::TOKEN_CHARS_MAX as u64;
    let unread = |error: std::io::Error| Problem::caused("the token cannot be read", &error, "name its file");
    match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => Ok(token.clone()),
        (None, Some(path)) => {
            let mut text = String::new();
            if path.as_os_str() == "-" {
                std::io::stdin().take(limit).read_to_string(&mut text).map_err(unread)?;
            } else {
                let file = std::fs::File::open(path).map_err(unread)?;
                file.take(limit).read_to_string(&mut text).map_err(unread)?;
            }
            Ok(text)
        }
        (None, None) => Err(Problem::usage("no token is given", "", "add --token or --token-file")),
    }
}
