//! The demo's site: one disk, its agent, a process server, a vault, and a workload, each a process of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::status::{AgentStatus, ProtectionState};
use nbd::Client;
use serde_json::Value;
use vault::{Credential, FolderStore, UnlockedVault, Vault};
use world::{Clock, SystemClock};

use super::disk::MadeDisk;
use super::ledger::LedgerWriter;
use super::processes::{Programs, Running, free_port};
use super::watch::agent_status;
use crate::failure::{Done, Failure, io_failure};
use crate::secrets;
use crate::vault_access::entropy;

/// Large enough to bridge a restart of the server, small enough to overflow within seconds.
const RING_BYTES: u64 = 12 << 20;
/// How long anything may take that the demo waits for.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);

/// The machine's name.
pub(crate) const MACHINE: &str = "demo";

/// Where everything is.
pub(crate) struct Paths {
    /// What `--keep` leaves; else a temporary folder.
    pub(crate) data: PathBuf,
    pub(crate) vault: PathBuf,
    pub(crate) recovery_key: PathBuf,
    pub(crate) ledger: PathBuf,
    pub(crate) images: PathBuf,
    /// The protected disk.
    pub(crate) home: PathBuf,
    /// States, sockets, logs: removed at the end, and short, since sockets' names are limited.
    pub(crate) state: PathBuf,
}

impl Paths {
    pub(crate) fn new(data: &Path, state: &Path) -> Done<Paths> {
        let paths = Paths {
            data: data.to_owned(),
            vault: data.join("vault"),
            recovery_key: data.join("recovery-key"),
            ledger: data.join("ledger"),
            images: data.join("images"),
            home: data.join("home.raw"),
            state: state.to_owned(),
        };
        for folder in [&paths.images, &paths.state.join("logs"), &paths.state.join("branches")] {
            fs::create_dir_all(folder).map_err(|error| io_failure("the demo's folders cannot be made", &error))?;
        }
        Ok(paths)
    }

    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.state.join("agent/control.sock")
    }

    pub(crate) fn disk_socket(&self) -> PathBuf {
        self.state.join("disk.sock")
    }

    fn agent_config(&self) -> PathBuf {
        self.state.join("agent.toml")
    }

    fn server_config(&self) -> PathBuf {
        self.state.join("server.toml")
    }
}

/// The running site.
pub(crate) struct Site {
    pub(crate) paths: Paths,
    pub(crate) programs: Programs,
    /// For the watch; nothing is opened with it.
    pub(crate) unlocked: UnlockedVault,
    pub(crate) server: Running,
    pub(crate) agent: Option<Running>,
}

/// A path as text; the demo chose it.
pub(crate) fn text(path: &Path) -> Done<&str> {
    path.to_str().ok_or_else(|| {
        Failure::new("the demo's folder has a name that is no UTF-8", path.display().to_string(), "name another")
    })
}

impl Site {
    /// Makes vault, keys, configuration and ledger, and starts server and agent.
    pub(crate) fn start(paths: Paths, programs: Programs, made: &MadeDisk, seed: u64) -> Done<Site> {
        let refused = |error: std::io::Error| io_failure("the demo's files cannot be written", &error);
        let passphrase = paths.state.join("passphrase");
        fs::write(&passphrase, "the passphrase of a demo\n").map_err(refused)?;
        let (vault, key) = (text(&paths.vault)?, text(&paths.recovery_key)?);
        let passphrase = text(&passphrase)?;
        let init = ["vault", "init", "--vault", vault, "--passphrase-file", passphrase, "--recovery-key-to", key];
        programs.objects(&init, "vault init")?;
        let server_state = paths.state.join("server");
        programs.objects(
            &[
                "vault",
                "grant",
                "--vault",
                vault,
                "--passphrase-file",
                passphrase,
                "--label",
                "demo server",
                "--state-dir",
                text(&server_state)?,
            ],
            "vault grant",
        )?;
        let address = format!("127.0.0.1:{}", free_port()?);
        let config = format!(
            "state_dir = {server_state:?}\nvault = {vault:?}\nlisten = {address:?}\njournal_bytes_max = 268435456\n\
             seal_interval_ms = 1000\nidle_interval_s = 1\n",
        );
        fs::write(paths.server_config(), config).map_err(refused)?;
        LedgerWriter::create(&paths.ledger, seed, &made.slots).map_err(refused)?;
        let unlocked = unlock(&paths.vault, &paths.recovery_key)?;
        let server = start_server(&programs, &paths)?;
        let mut site = Site { paths, programs, unlocked, server, agent: None };
        site.join()?;
        site.start_agent()?;
        Ok(site)
    }

    /// Orders a token and has a machine of that name join with it.
    pub(crate) fn join_machine(&self, name: &str, agent_state: &Path) -> Done {
        let config = self.paths.server_config();
        let token = self.programs.objects(&["token", "new", "--role", "agent", "--config", text(&config)?], "token")?;
        let token = token.first().and_then(|object| object["token"].as_str()).unwrap_or_default();
        let token_file = self.paths.state.join(format!("token-{name}"));
        secrets::write_new_secret(&token_file, token.as_bytes(), "token")?;
        let join = ["join", "--token-file", text(&token_file)?, "--state-dir", text(agent_state)?, "--name", name];
        self.programs.run(self.programs.agent(&join), "the agent's join").map(drop)
    }

    fn join(&self) -> Done {
        let agent_state = self.paths.state.join("agent");
        self.join_machine(MACHINE, &agent_state)?;
        let config = format!(
            "state_dir = {agent_state:?}\nmachine_name = {MACHINE:?}\nring_bytes_max = {RING_BYTES}\n\
             rotate_every_ms = 3000\nproof_every_ms = 200\nnbd_socket = {:?}\n\n\
             [[disk]]\nname = \"disk\"\npath = {:?}\n",
            self.paths.disk_socket(),
            self.paths.home.canonicalize().map_err(|error| io_failure("the disk is gone", &error))?,
        );
        fs::write(self.paths.agent_config(), config).map_err(|error| io_failure("the agent has no file", &error))
    }

    /// Starts the agent and waits until it serves the disk.
    pub(crate) fn start_agent(&mut self) -> Done {
        let config = self.paths.agent_config();
        let command = self.programs.agent(&["run", "--config", text(&config)?]);
        let agent = self.agent.insert(self.programs.start(command, "agent")?);
        let socket = self.paths.disk_socket();
        let began = SystemClock.monotonic();
        while Client::connect_unix(&socket, "disk").is_err() {
            agent.check()?;
            if SystemClock.monotonic().since(began) > LIMIT {
                return Err(Failure::new("the agent does not serve the disk", "", "see its log with --keep"));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Starts the process server again after a kill.
    pub(crate) fn restart_server(&mut self) -> Done {
        self.server = start_server(&self.programs, &self.paths)?;
        Ok(())
    }

    /// Starts the workload on `export` behind `socket`, at `rate` writes per second.
    pub(crate) fn start_workload(&self, socket: &Path, export: &str, rate: u64) -> Done<Running> {
        let rate = rate.to_string();
        let arguments = [
            "__workload",
            "--socket",
            text(socket)?,
            "--export",
            export,
            "--ledger",
            text(&self.paths.ledger)?,
            "--rate",
            &rate,
        ];
        self.programs.start(self.programs.farshore(&arguments), "workload")
    }

    /// Waits until the agent's status satisfies `good`.
    pub(crate) fn wait_for(&mut self, what: &str, good: impl Fn(&AgentStatus) -> bool) -> Done<AgentStatus> {
        let began = SystemClock.monotonic();
        let mut last = None;
        while SystemClock.monotonic().since(began) < LIMIT {
            if let Some(agent) = &mut self.agent {
                agent.check()?;
            }
            if let Some(status) = agent_status(&self.paths.agent_socket()) {
                if good(&status) {
                    return Ok(status);
                }
                last = Some(status);
            }
            std::thread::sleep(POLL);
        }
        let status =
            last.map_or("it does not answer".to_owned(), |status| serde_json::to_string(&status).unwrap_or_default());
        let server = fs::read_to_string(self.paths.state.join("logs/server.log")).unwrap_or_default();
        let lines: Vec<&str> = server.lines().collect();
        let end = lines[lines.len().saturating_sub(10)..].join("\n");
        Err(Failure::new(
            format!("waited {} s in vain until {what}", LIMIT.as_secs()),
            format!("the agent: {status}\nthe server's log:\n{end}"),
            "this is a fault: report it with the seed",
        ))
    }

    /// Waits until every write is in the stream again, and the vault has what was written until now.
    pub(crate) fn wait_protected(&mut self) -> Done<AgentStatus> {
        self.wait_for("the machine is protected", |status| {
            status.state == ProtectionState::Protected && status.link.connected && !status.heal.active
        })
    }

    /// Ends agent and server in order.
    pub(crate) fn end(&mut self) -> Done {
        if let Some(mut agent) = self.agent.take() {
            agent.end()?;
        }
        self.server.end()
    }

    /// The point that `moment` chooses on the machine's history, as `vault points --at` says.
    pub(crate) fn point(&self, moment: &str) -> Done<Value> {
        let arguments = [
            "vault",
            "points",
            MACHINE,
            "--vault",
            text(&self.paths.vault)?,
            "--recovery-key-file",
            text(&self.paths.recovery_key)?,
            "--at",
            moment,
        ];
        let objects = self.programs.objects(&arguments, "vault points")?;
        objects.into_iter().next().ok_or_else(|| Failure::new("vault points printed nothing", "", "report this"))
    }

    /// All points and gaps of the machine, oldest first.
    pub(crate) fn points(&self) -> Done<Vec<Value>> {
        let arguments = [
            "vault",
            "points",
            MACHINE,
            "--vault",
            text(&self.paths.vault)?,
            "--recovery-key-file",
            text(&self.paths.recovery_key)?,
            "--limit",
            "100000",
        ];
        self.programs.objects(&arguments, "vault points")
    }
}

/// Unlocks the vault in `folder` with the recovery key in `key`.
pub(crate) fn unlock(folder: &Path, key: &Path) -> Done<UnlockedVault> {
    let store = std::sync::Arc::new(FolderStore::open(folder, entropy().as_ref())?);
    let key = secrets::recovery_key(key)?;
    Ok(Vault::open(store)?.unlock(Credential::Recovery(&key))?)
}

fn start_server(programs: &Programs, paths: &Paths) -> Done<Running> {
    let config = paths.server_config();
    let command = programs.farshore(&["--json", "server", "--config", text(&config)?]);
    let mut server = programs.start(command, "server")?;
    let ready = server.object(LIMIT)?;
    if ready["event"] == "ready" {
        return Ok(server);
    }
    Err(Failure::new("the server is not ready", ready.to_string(), "report this"))
}
