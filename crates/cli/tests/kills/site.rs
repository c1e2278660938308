//! The product's own programs as processes: a vault, a process server, an agent with two disks.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::service::control::{Answer, Request, ask};
use agent::status::AgentStatus;
use serde_json::Value;
use vault::keys::RecoveryKey;
use vault::{Credential, FolderStore, UnlockedVault, Vault};
use world::SystemEntropy;

use super::ledger::{DISKS, Ledger};

const FARSHORE: &str = env!("CARGO_BIN_EXE_farshore");
const AGENT: &str = env!("CARGO_BIN_EXE_farshore-agent");
const START_LIMIT: Duration = Duration::from_secs(30);

/// A process that was started; killed when dropped.
pub(crate) struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        assert!(self.child.try_wait().expect("waited for").is_none(), "it ended by itself:\n{}", end_of(&self.log));
        self.child.kill().expect("killed");
        self.child.wait().expect("waited for");
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    fn assert_running(&mut self) {
        assert!(self.child.try_wait().expect("waited for").is_none(), "it ended by itself:\n{}", end_of(&self.log));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn end_of(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

/// The folders of a site, and what starts its processes.
pub(crate) struct Site {
    root: PathBuf,
}

impl Site {
    /// Makes vault, keys, disks and configurations, and joins the agent, for which the server runs a first time.
    pub(crate) fn make(root: &Path, ledger: &Ledger) -> Site {
        let site = Site { root: root.to_owned() };
        fs::write(site.path("passphrase"), "the passphrase of a test\n").unwrap();
        let at = |name: &str| site.path(name).display().to_string();
        let (vault, passphrase) = (at("vault"), at("passphrase"));
        let opening = ["--vault", &vault, "--passphrase-file", &passphrase];
        site.farshore(&["vault", "init"], &[&opening[..], &["--recovery-key-to", &at("key")]].concat());
        site.grant_server("server");
        let mut config = format!(
            "state_dir = {:?}\nmachine_name = \"victim\"\nring_bytes_max = 4194304\nrotate_every_ms = 1000\n\
             proof_every_ms = 100\nnbd_socket = {:?}\n",
            at("agent"),
            at("nbd")
        );
        for disk in 0..DISKS {
            fs::write(site.image(disk), ledger.replay(disk, 0)).unwrap();
            config += &format!("\n[[disk]]\nname = \"disk{disk}\"\npath = {:?}\n", site.image(disk));
        }
        fs::write(site.path("agent.toml"), config).unwrap();
        let server = site.start_server();
        let token = site.farshore(&["token", "new"], &["--role", "agent", "--config", &at("server.toml")]);
        fs::write(site.path("token"), token[0]["token"].as_str().unwrap()).unwrap();
        let join = ["join", "--token-file", &at("token"), "--state-dir", &at("agent"), "--name", "victim"];
        run(Command::new(AGENT).args(join));
        server.kill();
        site
    }

    /// Grants a process server of this name and writes its configuration.
    pub(crate) fn grant_server(&self, name: &str) {
        let at = |name: &str| self.path(name).display().to_string();
        let (vault, passphrase) = (at("vault"), at("passphrase"));
        let opening = ["--vault", &vault, "--passphrase-file", &passphrase];
        let grant = ["--label", name, "--state-dir", &at(name)];
        self.farshore(&["vault", "grant"], &[&opening[..], &grant].concat());
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
        let config = format!(
            "state_dir = {:?}\nvault = {vault:?}\nlisten = \"127.0.0.1:{port}\"\njournal_bytes_max = 268435456\n\
             seal_interval_ms = 400\nidle_interval_s = 1\n",
            at(name)
        );
        fs::write(self.path(&format!("{name}.toml")), config).unwrap();
    }

    /// Has the machine follow the server of this name; whether the one before had committed everything, if an agent runs.
    pub(crate) fn move_to(&self, name: &str, limit_s: u64) -> Option<bool> {
        let machine = self.with_key(&["vault", "machines"], &[])[0]["machine"].as_str().unwrap().to_owned();
        let config = self.path(&format!("{name}.toml")).display().to_string();
        let token = self.farshore(&["token", "new"], &["--machine", &machine, "--config", &config]);
        let file = self.path(&format!("{name}.token"));
        fs::write(&file, token[0]["token"].as_str().unwrap()).unwrap();
        let mut command = Command::new(AGENT);
        command.args(["--json", "join", "--move-limit-s", &limit_s.to_string(), "--token-file"]).arg(file);
        command.arg("--state-dir").arg(self.path("agent"));
        let said: Value = serde_json::from_str(run(&mut command).trim()).expect("JSON");
        assert_eq!(said["machine"].as_str(), Some(&*machine), "it is the same machine");
        said["drained"].as_bool()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The image file of a disk.
    pub(crate) fn image(&self, disk: usize) -> PathBuf {
        self.path(&format!("disk{disk}.raw"))
    }

    /// Runs `farshore --json` to its end and returns what it printed.
    pub(crate) fn farshore(&self, verb: &[&str], options: &[&str]) -> Vec<Value> {
        let mut command = Command::new(FARSHORE);
        command.env("FARSHORE_SEEN_HEADS", self.path("seen")).arg("--json").args(verb).args(options);
        let printed = run(&mut command);
        printed.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect()
    }

    /// As [`Site::farshore`], with what opens the vault.
    pub(crate) fn with_key(&self, verb: &[&str], options: &[&str]) -> Vec<Value> {
        let (vault, key) = (self.path("vault").display().to_string(), self.path("key").display().to_string());
        self.farshore(verb, &[options, &["--vault", &vault, "--recovery-key-file", &key]].concat())
    }

    /// Starts the process server and waits until agents can connect.
    pub(crate) fn start_server(&self) -> Running {
        self.start_server_named("server")
    }

    /// As [`Site::start_server`], for one that was granted beside the first.
    pub(crate) fn start_server_named(&self, name: &str) -> Running {
        let log = self.path(&format!("{name}.log"));
        let before = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let config = self.path(&format!("{name}.toml"));
        let mut command = Command::new(FARSHORE);
        command.args(["--json", "server", "--config"]).arg(config);
        let mut running = start(&mut command, log.clone());
        let began = Instant::now();
        loop {
            let mut said = String::new();
            let mut file = File::open(&log).unwrap();
            file.seek(SeekFrom::Start(before)).unwrap();
            file.read_to_string(&mut said).unwrap();
            if said.contains("\"event\":\"ready\"") {
                return running;
            }
            running.assert_running();
            assert!(began.elapsed() < START_LIMIT, "the server is not ready:\n{}", end_of(&log));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts the agent; it may not serve yet on return.
    pub(crate) fn start_agent(&self) -> Running {
        self.start_agent_named("agent")
    }

    /// As [`Site::start_agent`], with another configuration.
    pub(crate) fn start_agent_named(&self, name: &str) -> Running {
        let config = self.path(&format!("{name}.toml"));
        start(Command::new(AGENT).args(["run", "--config"]).arg(config), self.path(&format!("{name}.log")))
    }

    pub(crate) fn status(&self) -> Option<AgentStatus> {
        self.status_of("agent")
    }

    pub(crate) fn status_of(&self, name: &str) -> Option<AgentStatus> {
        match ask(&self.path(&format!("{name}/control.sock")), &Request::Status) {
            Ok(Answer::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Whether the name is known to be durable on the process server.
    pub(crate) fn mark(&self, name: &str) -> bool {
        let request = Request::Mark { name: name.to_owned(), wait_ms: 400 };
        matches!(ask(&self.path("agent/control.sock"), &request), Ok(Answer::Marked { durable: true, .. }))
    }

    /// Files of the vault that are being written now, or were when their writer was killed.
    pub(crate) fn partial_files(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.path("vault")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                } else if entry.file_name().to_string_lossy().ends_with(".partial") {
                    found.push(entry.path().strip_prefix(self.path("vault")).unwrap().display().to_string());
                }
            }
        }
        found
    }

    /// How many objects of data the vault has.
    pub(crate) fn data_objects(&self) -> usize {
        let folder_len = |folder: &Path| fs::read_dir(folder).map_or(0, Iterator::count);
        let folders = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let packs: usize = folders(self.path("vault/packs")).map(|folder| folder_len(&folder)).sum();
        packs + folders(self.path("vault/chains")).map(|chain| folder_len(&chain.join("s"))).sum::<usize>()
    }

    pub(crate) fn unlock(&self) -> UnlockedVault {
        let store = Arc::new(FolderStore::open(&self.path("vault"), &SystemEntropy).unwrap());
        let text = fs::read_to_string(self.path("key")).unwrap();
        let words: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        let key = RecoveryKey::parse(&words.join("\n")).unwrap();
        Vault::open(store).unwrap().unlock(Credential::Recovery(&key)).unwrap()
    }

    /// The ends of both logs, for a failure.
    pub(crate) fn logs(&self) -> String {
        format!(
            "the agent's log:\n{}\nthe server's log:\n{}",
            end_of(&self.path("agent.log")),
            end_of(&self.path("server.log"))
        )
    }
}

/// Nothing that the caller has set for a vault of their own may reach the test's.
fn without_settings(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FARSHORE_") && name != "FARSHORE_LOG" {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null())
}

fn start(command: &mut Command, log: PathBuf) -> Running {
    let file = || File::options().create(true).append(true).open(&log).unwrap();
    let child = without_settings(command).stdout(file()).stderr(file()).spawn().unwrap();
    Running { child, log }
}

fn run(command: &mut Command) -> String {
    let output = without_settings(command).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}:\n{said}", output.status);
    String::from_utf8(output.stdout).unwrap()
}
