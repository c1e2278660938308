//! A `farshore` that runs for as long as somebody wants it, and is talked to meanwhile.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::site::Site;

pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// A `farshore --json` that talks: what it prints, line by line.
pub(crate) struct Talking {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<Value>,
    errors: PathBuf,
}

impl Talking {
    pub(crate) fn start(site: &Site, words: &[&str]) -> Talking {
        let errors = site.path("talking.log");
        let log = fs::File::options().create(true).append(true).open(&errors).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FARSHORE_")) {
            command.env_remove(name);
        }
        command.env("FARSHORE_SEEN_HEADS", site.path("seen"));
        command.args(["--json", "--yes"]).args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take(), child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line)
                    && sender.send(value).is_err()
                {
                    return;
                }
            }
        });
        Talking { child, input, lines, errors }
    }

    pub(crate) fn event(&self, name: &str) -> Value {
        let begun = Instant::now();
        while let Ok(value) = self.lines.recv_timeout(LIMIT.saturating_sub(begun.elapsed())) {
            if value["event"] == name {
                return value;
            }
        }
        panic!("no {name}:\n{}", fs::read_to_string(&self.errors).unwrap_or_default());
    }

    pub(crate) fn tell(&mut self, word: &str) {
        // It may have been killed, or have given up, just now.
        let _ = writeln!(self.input.as_mut().unwrap(), "{word}");
    }

    pub(crate) fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub(crate) fn end(mut self) -> Option<i32> {
        drop(self.input.take());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
