//! `farshore branch open` and `branch reopen`: a machine's disks as they were at a moment, writable, served over NBD for as
//! long as the command runs. What a client flushed outlives a kill of this process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use recovery::export::{export_name, serve, socket_path};
use recovery::{Branch, BranchConfig, BranchHost, BranchRunner, ControlServer, FailbackConfig, Keep, Phase};
use replication::ChainId;
use serde_json::json;
use vault::{Catalog, Moment, UnlockedVault};
use world::{Clock, SystemClock, WallTime};

use super::control::Homes;
use crate::failure::{Done, Failure, Verdict, chain, io_failure, usage};
use crate::moment::{self, MOMENT_HELP};
use crate::output::{Output, bytes, duration_ns};
use crate::progress::StopRequest;
use crate::vault_access::{KeyOptions, VaultPlace, choose, clock, entropy, find, find_or_only, warn_if_rolled_back};

/// How long the control socket still answers after a branch has ended.
const LAST_ANSWER: Duration = Duration::from_millis(500);

/// Options of `branch open`.
#[derive(Debug, Args)]
pub(crate) struct Open {
    /// Machine, branch or chain; may be left out if the vault holds one machine
    machine: Option<String>,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    #[arg(long, value_name = "MOMENT", default_value = "latest", allow_hyphen_values = true, help = MOMENT_HELP)]
    at: String,
    /// Name of the branch, for people
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Open it although the point lacks ranges or disks
    #[arg(long)]
    lacking_is_fine: bool,
    /// Give the branch up when the command ends
    #[arg(long)]
    throw_away: bool,
    /// Keep what is written to the branch on this host, not in the vault
    #[arg(long)]
    local: bool,
    #[command(flatten)]
    serving: Serving,
}

/// Options of `branch reopen`.
#[derive(Debug, Args)]
pub(crate) struct Reopen {
    /// Name or chain of the branch
    branch: String,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    #[command(flatten)]
    serving: Serving,
}

/// How a branch is served.
#[derive(Debug, Args)]
pub(crate) struct Serving {
    /// Directory for the branch's journal and socket
    #[arg(long, value_name = "DIR", env = "FARSHORE_STATE")]
    state_dir: Option<PathBuf>,
    /// Serve on this loopback address, too; port 0 lets the system choose
    #[arg(long, value_name = "ADDRESS")]
    tcp: Option<SocketAddr>,
}

impl Serving {
    pub(crate) fn host(&self, vault: UnlockedVault, keep: Keep) -> Done<BranchHost> {
        let config = BranchConfig { keep, ..BranchConfig::default() };
        Ok(BranchHost::new(vault, state_root(self.state_dir.as_deref())?, clock(), entropy(), config))
    }
}

/// The directory for the states of branches, made if need be.
pub(crate) fn state_root(given: Option<&Path>) -> Done<PathBuf> {
    let directory = match given {
        Some(directory) => directory.to_owned(),
        None => default_state()?.join("branches"),
    };
    std::fs::create_dir_all(&directory)
        .map_err(|error| io_failure(format!("the state directory {} cannot be made", directory.display()), &error))?;
    directory.canonicalize().map_err(|error| io_failure("the state directory cannot be used", &error))
}

/// The directory for the states of branches, if there is one.
pub(crate) fn state_path(given: Option<&Path>) -> Option<PathBuf> {
    let directory = match given {
        Some(directory) => directory.to_owned(),
        None => default_state().ok()?.join("branches"),
    };
    directory.is_dir().then_some(directory)
}

/// Where state is kept if nobody says so.
pub(crate) fn default_state() -> Done<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/farshore"));
    }
    let home = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state")));
    home.map(|home| home.join("farshore")).ok_or_else(|| {
        usage("there is no place for the branch's state", "neither HOME nor XDG_STATE_HOME is set", "give --state-dir")
    })
}

impl Open {
    pub(crate) fn run(&self, output: Output) -> Done {
        let moment = moment::parse(&self.at)?;
        let vault = self.place.unlock(&self.keys)?;
        let began = SystemClock.monotonic();
        let (store, keys) = (Arc::clone(vault.store()), Arc::clone(vault.keys()));
        let catalog = Catalog::load(&store, &keys)?;
        let named = find_or_only(&store, &catalog, self.machine.as_deref())?;
        let (history, point) = choose(&store, &keys, named.chain, &moment)?;
        warn_if_rolled_back(&vault, &history)?;
        for gap in &point.lacking {
            output.remark(format!("lacking: {gap}"))?;
        }
        if !point.lacking.is_empty() && !self.lacking_is_fine {
            return Err(usage(
                "this point lacks parts of the machine",
                "what is listed above was not captured in order there",
                "choose another moment, or open it nevertheless with --lacking-is-fine",
            )
            .with(Verdict::Refused));
        }
        let keep = if self.local { Keep::Local } else { Keep::VaultIfWritable };
        let host = self.serving.host(vault, keep)?;
        let name = self.name.clone().unwrap_or_else(|| format!("{} at {}", named.name, WallTime(point.cut.time.0)));
        let branch = Arc::new(host.open(history.chain, &Moment::Sequence(point.cut.sequence), &name)?);
        let took = u64::try_from(SystemClock.monotonic().since(began).as_nanos()).unwrap_or(u64::MAX);
        serve_branch(&branch, &self.serving, &self.place, output, (&point.reason, took), self.throw_away)
    }
}

impl Reopen {
    pub(crate) fn run(&self, output: Output) -> Done {
        let vault = self.place.unlock(&self.keys)?;
        let began = SystemClock.monotonic();
        let store = Arc::clone(vault.store());
        let catalog = Catalog::load(&store, vault.keys())?;
        let host = self.serving.host(vault, Keep::VaultIfWritable)?;
        // A branch on a read-only vault is known to this host alone.
        let here = host.list()?;
        let chain: ChainId = match here.iter().find(|info| info.ended.is_none() && info.name == self.branch) {
            Some(info) => info.branch,
            None => match self.branch.parse() {
                Ok(chain) => chain,
                Err(_) => find(&store, &catalog, &self.branch)?.chain,
            },
        };
        let branch = Arc::new(host.reopen(chain)?);
        let took = u64::try_from(SystemClock.monotonic().since(began).as_nanos()).unwrap_or(u64::MAX);
        let reason = branch.info().reason.clone();
        serve_branch(&branch, &self.serving, &self.place, output, (&reason, took), false)
    }
}

/// Serves `branch` until somebody asks to stop.
pub(crate) fn serve_branch(
    branch: &Arc<Branch>,
    serving: &Serving,
    place: &VaultPlace,
    output: Output,
    (reason, took): (&str, u64),
    throw_away: bool,
) -> Done {
    let stop = StopRequest::listen()?;
    let runner = BranchRunner::start(Arc::clone(branch))
        .map_err(|error| io_failure("the branch's threads cannot be started", &error))?;
    let server = serve(branch, serving.tcp)
        .map_err(|error| Failure::new("the branch cannot be served", chain(&error), "name another place"))?;
    let homes = Arc::new(Homes {
        notes: branch.directory().join("home"),
        root: state_root(serving.state_dir.as_deref())?,
        vault: place.vault.clone(),
    });
    let control = ControlServer::start(Arc::clone(branch), homes, FailbackConfig::default())
        .map_err(|error| io_failure("the branch cannot be controlled", &error))?;
    let info = branch.info();
    let socket = socket_path(branch);
    let tcp: Vec<String> = server.tcp_addresses().iter().map(ToString::to_string).collect();
    let mut disks = Vec::new();
    for geometry in branch.disks() {
        let name = export_name(geometry.disk);
        let address = format!("nbd+unix:///{name}?socket={}", socket.display());
        disks.push(json!({"disk": geometry.disk.0, "export": name, "uri": address, "size_bytes": geometry.size_bytes,
                          "path": geometry.path}));
    }
    output.object(&json!({
        "event": "open", "branch": info.name, "chain": info.branch.to_string(), "parent_chain": info.parent.chain.to_string(),
        "sequence": info.parent.sequence.to_string(), "time_ns": info.point_time.0,
        "time": WallTime(info.point_time.0).to_string(), "reason": reason, "local": info.local,
        "socket": socket, "tcp": tcp, "disks": disks, "took_ns": took,
    }))?;
    output.line(format!("opened {} in {}: {reason}", info.name, duration_ns(took)))?;
    if info.local {
        output.line("the vault is not written to: source not fenced, point not pinned")?;
    }
    for disk in &disks {
        let (uri, size) = (disk["uri"].as_str().unwrap_or_default(), disk["size_bytes"].as_u64().unwrap_or_default());
        output.line(format!("  {uri}  {}", bytes(size)))?;
    }
    for address in &tcp {
        output.line(format!("  nbd://{address}/"))?;
    }
    output.remark("Ctrl-C stops serving")?;
    stop.wait(|| control.is_over());
    // Whoever asked for the end still wants the answer.
    std::thread::sleep(LAST_ANSWER);
    let home = control.failback().is_some_and(|status| status.phase == Phase::Done);
    let over = control.is_over();
    drop(control);
    server.stop();
    if over {
        drop(runner);
        let how = if home { "brought home" } else { "discarded" };
        output.object(&json!({"event": how, "chain": info.branch.to_string()}))?;
        return output.remark(format!("the branch {} was {how}", info.name));
    }
    if throw_away {
        drop(runner);
        branch.discard()?;
        output.object(&json!({"event": "discarded", "chain": info.branch.to_string()}))?;
        return output.remark(format!("discarded the branch {}", info.name));
    }
    drop(runner);
    branch.core().seal_step(recovery::SealWish::Now)?;
    output.object(&json!({"event": "stopped", "chain": info.branch.to_string()}))?;
    output.remark(format!("stopped; go on with `farshore branch reopen {}`", info.branch))
}
