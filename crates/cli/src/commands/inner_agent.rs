//! The mobility agent inside this program, hidden: the demo runs it as a process of its own where `farshore-agent` was not
//! built (`cargo run` builds one program only). Everyone else uses `farshore-agent`.

use std::path::PathBuf;
use std::sync::Arc;

use agent::config::AgentConfig;
use agent::service::problem::Problem;
use agent::service::{Service, ServiceOptions};
use agent::state::StateDir;
use clap::{Args, Subcommand};
use link::{JoinToken, LinkRuntime};
use world::SystemClock;

use super::server::begin_log;
use crate::failure::{Done, Failure, io_failure, usage};
use crate::output::Output;
use crate::progress::StopRequest;

/// As much of the agent's command line as the demo uses.
#[derive(Debug, Subcommand)]
pub(crate) enum InnerAgent {
    Join(Join),
    Run {
        #[arg(long)]
        config: PathBuf,
    },
}

/// Options of `join`.
#[derive(Debug, Args)]
pub(crate) struct Join {
    #[arg(long)]
    token_file: PathBuf,
    #[arg(long)]
    state_dir: PathBuf,
    #[arg(long)]
    name: String,
}

impl InnerAgent {
    pub(crate) fn run(&self, output: Output) -> Done {
        match self {
            InnerAgent::Join(join) => join.run(),
            InnerAgent::Run { config } => {
                let config = AgentConfig::load(config).map_err(failure)?;
                begin_log(output);
                let stop = StopRequest::listen()?;
                let options = ServiceOptions { accept_disks: Vec::new(), clock: Arc::new(SystemClock) };
                let service = Service::start(&config, options).map_err(first)?;
                let stopper = service.stopper();
                std::thread::spawn(move || {
                    stop.wait(|| false);
                    stopper.request("a signal");
                });
                service.wait();
                service.stop().map_err(failure)
            }
        }
    }
}

impl Join {
    fn run(&self) -> Done {
        let text = std::fs::read_to_string(&self.token_file)
            .map_err(|error| io_failure("the token cannot be read", &error))?;
        let token =
            JoinToken::parse(&text).map_err(|error| usage(error.to_string(), "", "copy it again as a whole"))?;
        let runtime = LinkRuntime::new(1).map_err(|error| io_failure("the join cannot begin", &error))?;
        let state = StateDir::open(&self.state_dir).map_err(failure)?;
        state.join(&runtime, Arc::new(SystemClock), &token, &self.name, &[]).map(drop).map_err(failure)
    }
}

fn failure(problem: Problem) -> Failure {
    Failure::new(problem.what, problem.why, problem.advice)
}

fn first(problems: Vec<Problem>) -> Failure {
    let all: Vec<String> = problems.iter().map(|problem| format!("{}: {}", problem.what, problem.why)).collect();
    let advice = problems.into_iter().next().map_or_else(String::new, |problem| problem.advice);
    Failure::new("the agent did not start", all.join("\n"), advice)
}
