//! The process server's configuration: one TOML file, unknown keys refused, every key with its unit.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pipeline::Pace;

/// `server.toml`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Where the server keeps its keys, its certificate authority and its journal.
    pub state_dir: PathBuf,
    /// The folder that holds the vault.
    pub vault: PathBuf,
    /// `host:port` to listen on for agents; port 0 lets the system choose.
    #[serde(default = "listen")]
    pub listen: String,
    /// Addresses that join tokens tell agents, `host:port` each. Default: the one listened on.
    #[serde(default)]
    pub advertise: Vec<String>,
    /// Largest size of the journal in bytes.
    #[serde(default = "journal_bytes_max")]
    pub journal_bytes_max: u64,
    /// Changes are sealed after at most this many milliseconds.
    #[serde(default = "seal_interval_ms")]
    pub seal_interval_ms: u64,
    /// Changes are sealed when this many bytes have collected.
    #[serde(default = "seal_bytes")]
    pub seal_bytes: u64,
    /// An idle machine's proof of being current is committed after this many seconds.
    #[serde(default = "idle_interval_s")]
    pub idle_interval_s: u64,
    /// Stream bytes an agent may have under way beyond what is journaled.
    #[serde(default = "window_bytes")]
    pub window_bytes: u64,
    /// Threads that compress and encrypt one machine's data. Default: one a core.
    #[serde(default)]
    pub workers: Option<NonZeroUsize>,
    /// Chunks that deduplication remembers; each takes about 40 bytes of memory.
    #[serde(default = "dedup_chunks_max")]
    pub dedup_chunks_max: usize,
    /// The master target: failbacks of recovery hosts to disks of this host.
    #[serde(default)]
    pub master_target: MasterTargetConfig,
}

/// `[master_target]` of `server.toml`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MasterTargetConfig {
    /// Take orders of recovery hosts. Without it they are refused.
    pub enabled: bool,
    /// Disks and image files that may be written over, and folders whose contents may. Nothing else is.
    pub disks: Vec<PathBuf>,
}

fn listen() -> String {
    "0.0.0.0:7443".into()
}
fn journal_bytes_max() -> u64 {
    4 << 30
}
fn seal_interval_ms() -> u64 {
    3000
}
fn seal_bytes() -> u64 {
    24 << 20
}
fn idle_interval_s() -> u64 {
    60
}
fn window_bytes() -> u64 {
    16 << 20
}
fn dedup_chunks_max() -> usize {
    16 << 20
}

impl ServerConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The parser's message, which names the line and the key.
    pub fn parse(text: &str) -> Result<ServerConfig, toml::de::Error> {
        toml::from_str(text)
    }

    /// When chains are sealed.
    pub fn pace(&self) -> Pace {
        let cores = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Pace {
            seal_interval: Duration::from_millis(self.seal_interval_ms),
            seal_bytes: self.seal_bytes.clamp(1 << 20, 32 << 20),
            idle_interval: Duration::from_secs(self.idle_interval_s),
            window_bytes: self.window_bytes,
            workers: self.workers.unwrap_or(cores),
            ..Pace::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_and_named() {
        let error = ServerConfig::parse("state_dir = '/a'\nvault = '/b'\nseal_bites = 3\n").expect_err("a typo");
        assert!(error.to_string().contains("seal_bites"), "{error}");
        let config = ServerConfig::parse("state_dir = '/a'\nvault = '/b'\n").expect("the rest has defaults");
        assert_eq!(config.pace().seal_interval, Duration::from_secs(3));
        assert!(!config.master_target.enabled, "nobody's disks are written to unasked");
        let text = "state_dir = '/a'\nvault = '/b'\n[master_target]\nenabled = true\ndisk = '/dev/sdb'\n";
        let error = ServerConfig::parse(text).expect_err("a typo in the table");
        assert!(error.to_string().contains("unknown field `disk`"), "{error}");
    }
}
