//! `farshore join`: enrols this host as a recovery host, with a token of the server whose master target it will use.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use link::{Connector, DenyList, Expected, JoinError, JoinPlan, JoinToken, LinkIdentity, LinkRuntime, Role, Trust};
use serde_json::json;
use world::{RealFiles, SystemEntropy};

use super::branch::state_root;
use crate::failure::{Done, Failure, Verdict, chain, io_failure, usage};
use crate::output::Output;
use crate::vault_access::clock;

/// The identity's file in the state directory.
const IDENTITY: &str = "link.identity";

/// Options of `join`.
#[derive(Debug, Args)]
pub(crate) struct Join {
    /// File with the token that `farshore token new --role recovery-host` printed; - is the input
    #[arg(long, value_name = "FILE")]
    token_file: PathBuf,
    /// A server address that the token does not name, tried first; may be repeated
    #[arg(long, value_name = "HOST:PORT")]
    server: Vec<String>,
    /// The state directory of the branches that this host serves
    #[arg(long, value_name = "DIR", env = "FARSHORE_STATE")]
    state_dir: Option<PathBuf>,
}

impl Join {
    pub(crate) fn run(&self, output: Output) -> Done {
        if let Some(bad) = self.server.iter().find(|address| !agent::config::is_address(address)) {
            return Err(usage(format!("{bad:?} is not host:port"), "", "write it as ps1.example:7443"));
        }
        let token = JoinToken::parse(&self.token_text()?)
            .map_err(|error| usage("the token cannot be used", error.to_string(), "copy it again as a whole"))?;
        if token.role != Role::RecoveryHost {
            let advice = match token.role {
                Role::Agent => "run `farshore-agent join` on the machine that is to be protected",
                _ => "order a token with `farshore token new --role recovery-host`",
            };
            let why = format!("it is a token for another role: {}", token.role);
            return Err(usage("the token is not for a recovery host", why, advice));
        }
        let root = state_root(self.state_dir.as_deref())?;
        let runtime = LinkRuntime::new(1).map_err(|error| io_failure("the join cannot begin", &error))?;
        let files = RealFiles::new(&root);
        let plan = JoinPlan {
            files: &files,
            path: IDENTITY,
            clock: clock(),
            entropy: &SystemEntropy,
            addresses: &self.server,
        };
        let identity = link::join(&runtime, &plan, &token).map_err(|error| refused(&error))?;
        output.object(&json!({"joined": identity.peer.to_uri(), "state_dir": root}))?;
        output.line(format!("this host is enrolled as {}", identity.peer))?;
        output.remark("next: `farshore failback BRANCH --master-target HOST:PORT --to PATH`")
    }

    fn token_text(&self) -> Done<String> {
        let mut text = String::new();
        let limit = link::limits::TOKEN_CHARS_MAX as u64;
        let read = match self.token_file.as_os_str() == "-" {
            true => io::stdin().take(limit).read_to_string(&mut text),
            false => File::open(&self.token_file).and_then(|file| file.take(limit).read_to_string(&mut text)),
        };
        read.map_err(|error| io_failure("the token cannot be read", &error))?;
        Ok(text)
    }
}

fn refused(error: &JoinError) -> Failure {
    let what = "this host could not be enrolled";
    match error {
        JoinError::AlreadyJoined(identity) => Failure::new(
            "this host is enrolled already",
            format!("it is {}", identity.peer),
            "to enrol it at another server, use another --state-dir",
        )
        .with(Verdict::Unchanged),
        JoinError::NoAddress => usage(what, chain(error), "name the server with --server HOST:PORT"),
        JoinError::Refused(_) => Failure::because(what, error, "order a new token at the server"),
        JoinError::Link(_) => {
            Failure::because(what, error, "check the address and the network, then repeat with the same token")
        }
        JoinError::Identity(_) => Failure::because(what, error, "make the state directory writable, then repeat"),
        JoinError::BadAnswer(_) => Failure::because(what, error, "use the same version of Farshore on both hosts"),
    }
}

/// What opens links of this host to the server at `address`, if it joined one. A certificate that nears its end is renewed
/// there first; if that fails the old one is used, which is accepted for long after its end.
///
/// # Errors
/// In three parts: it did not, or its identity cannot be used.
pub(crate) fn connector(root: &Path, address: &str) -> Done<Connector> {
    let path = root.join(IDENTITY);
    let join = "order a token at the server (`farshore token new --role recovery-host`), then \
                `farshore join --token-file FILE` here, with the --state-dir of the branch";
    let identity = LinkIdentity::load(&RealFiles::new(root), IDENTITY)
        .map_err(|error| Failure::because("this host's identity cannot be used", &error, join))?;
    let Some(identity) = identity else {
        let why = format!("there is no identity at {}", path.display());
        return Err(Failure::new("this host has not joined the master target's server", why, join));
    };
    if identity.peer.role != Role::RecoveryHost {
        let why = format!("it is that of a {}, which may not order failbacks", identity.peer.role);
        return Err(Failure::new(format!("the identity at {} cannot be used", path.display()), why, join));
    }
    let runtime = LinkRuntime::new(1).map_err(|error| io_failure("no link can be opened", &error))?;
    let trust = Trust::new(identity.authority.clone(), clock(), DenyList::default());
    let due = identity.is_due(clock().wall());
    let connector = Connector::new(runtime.clone(), identity, trust.clone(), clock());
    if !due {
        return Ok(connector);
    }
    match connector.renew(address, &Expected { role: Role::ProcessServer, id: None }) {
        Ok(renewed) => {
            match renewed.store(&RealFiles::new(root), IDENTITY) {
                Ok(()) => tracing::info!(peer = %renewed.peer, "the certificate of this host was renewed"),
                Err(error) => {
                    tracing::warn!(%error, "the renewed certificate cannot be kept; it is renewed again next time")
                }
            }
            Ok(Connector::new(runtime, renewed, trust, clock()))
        }
        Err(error) => {
            tracing::warn!(
                error = chain(&error),
                "the certificate of this host nears its end and could not be renewed"
            );
            Ok(connector)
        }
    }
}
