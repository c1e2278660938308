//! A vault and a process server as an administrator sets them up: the product's own programs.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

const FARSHORE: &str = env!("CARGO_BIN_EXE_farshore");
pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_farshore-agent");

/// Runs to the end what must succeed; what it printed.
#[track_caller]
pub(crate) fn done(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} ended with {}:\n{said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A process that is killed when dropped.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `farshore` with these words and waits for its event; the log goes to a file.
pub(crate) fn start(site: &Site, words: &[&str], event: &str) -> (Running, Value) {
    let log = fs::File::options().create(true).append(true).open(site.path("log")).unwrap();
    let mut command = site.farshore();
    command.arg("--json").args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
    let mut running = Running(command.spawn().unwrap());
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let said = lines.find_map(|line| {
        let value: Value = serde_json::from_str(&line).ok()?;
        (value["event"] == event).then_some(value)
    });
    let said = said.unwrap_or_else(|| panic!("no {event}:\n{}", fs::read_to_string(site.path("log")).unwrap()));
    // It goes on talking, and must not find that nobody listens.
    std::thread::spawn(move || lines.for_each(drop));
    (running, said)
}

/// A vault and a server, in one folder.
pub(crate) struct Site {
    pub(crate) folder: PathBuf,
}

impl Site {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn farshore(&self) -> Command {
        let mut command = Command::new(FARSHORE);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FARSHORE_")) {
            command.env_remove(name);
        }
        command.env("FARSHORE_SEEN_HEADS", self.path("seen")).stdin(Stdio::null());
        command
    }

    pub(crate) fn json(&self, words: &[&str]) -> Vec<Value> {
        let said = done(self.farshore().arg("--json").args(words));
        said.lines().map(|line| serde_json::from_str(line).expect("JSON lines")).collect()
    }

    pub(crate) fn with_key(&self, words: &[&str]) -> Vec<Value> {
        let (vault, key) = (self.at("vault"), self.at("key"));
        self.json(&[words, &["--vault", &vault, "--recovery-key-file", &key]].concat())
    }

    /// Makes vault and server, which its agent reaches at `address`; the server, and a token for the agent.
    pub(crate) fn make(&self, address: &str) -> (Running, String) {
        fs::write(self.path("passphrase"), "the passphrase of a test\n").unwrap();
        let (vault, passphrase, state) = (self.at("vault"), self.at("passphrase"), self.at("server"));
        let opening = ["--vault", &vault, "--passphrase-file", &passphrase];
        self.json(&[&["vault", "init"], &opening[..], &["--recovery-key-to", &self.at("key")]].concat());
        self.json(&[&["vault", "grant"], &opening[..], &["--label", "here", "--state-dir", &state]].concat());
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap().port();
        let config = format!(
            "state_dir = {state:?}\nvault = {vault:?}\nlisten = \"127.0.0.1:{port}\"\nadvertise = [\"{address}:{port}\"]\n\
             seal_interval_ms = 400\nidle_interval_s = 1\n"
        );
        fs::write(self.path("server.toml"), config).unwrap();
        let (server, _) = start(self, &["server", "--config", &self.at("server.toml")], "ready");
        let token = self.json(&["token", "new", "--role", "agent", "--config", &self.at("server.toml")]);
        (server, token[0]["token"].as_str().unwrap().to_owned())
    }
}
