//! The section `[consistency]` of the configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::service::problem::Problem;

/// Default of `freeze_limit_ms`. Measured freezes of busy file systems took up to 564 ms after a `syncfs`.
pub const FREEZE_LIMIT_MS_DEFAULT: u64 = 10_000;
/// Longest freeze, in milliseconds.
pub const FREEZE_LIMIT_MS_MAX: u64 = 60_000;
/// Default of `flush_limit_ms`.
pub const FLUSH_LIMIT_MS_DEFAULT: u64 = 120_000;
/// Default of `script_limit_ms`.
pub const SCRIPT_LIMIT_MS_DEFAULT: u64 = 60_000;
/// Longest flush or script, in milliseconds.
pub const SCRIPT_LIMIT_MS_MAX: u64 = 3_600_000;
/// Longest time between two points on schedule, in seconds.
pub const EVERY_S_MAX: u64 = 30 * 86_400;
/// Shortest time between two application-consistent points on schedule, in seconds: each stops all writers for a moment.
pub const APPLICATION_EVERY_S_MIN: u64 = 10;
/// Hooks at most.
pub const HOOKS_MAX: usize = 16;
/// Arguments of a hook at most.
const ARGUMENTS_MAX: usize = 64;

/// When points are taken on schedule, and what brings the applications to rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsistencyConfig {
    /// Seconds between crash-consistent markers; 0: none.
    pub crash_every_s: u64,
    /// Seconds between application-consistent points; 0: none.
    pub application_every_s: u64,
    /// Milliseconds after which frozen file systems are thawed, whatever happens.
    pub freeze_limit_ms: u64,
    /// Milliseconds that may be spent on writing out what is dirty, before the freeze.
    pub flush_limit_ms: u64,
    /// Milliseconds that a script or a hook may take.
    pub script_limit_ms: u64,
    /// Run before the freeze; its failure costs the point its promise.
    pub pre_script: Option<PathBuf>,
    /// Run after the thaw, whenever the script before it was run.
    pub post_script: Option<PathBuf>,
    /// Ready-made ways to bring an application to rest.
    #[serde(rename = "hook")]
    pub hooks: Vec<HookConfig>,
}

impl Default for ConsistencyConfig {
    fn default() -> ConsistencyConfig {
        ConsistencyConfig {
            crash_every_s: 0,
            application_every_s: 0,
            freeze_limit_ms: FREEZE_LIMIT_MS_DEFAULT,
            flush_limit_ms: FLUSH_LIMIT_MS_DEFAULT,
            script_limit_ms: SCRIPT_LIMIT_MS_DEFAULT,
            pre_script: None,
            post_script: None,
            hooks: Vec::new(),
        }
    }
}

/// An application with a ready-made hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookConfig {
    /// Which.
    pub kind: HookKind,
    /// Its client program. None: the usual place.
    #[serde(default)]
    pub program: Option<PathBuf>,
    /// The system's user that the client runs as. None: `postgres`, or `root` for MySQL.
    #[serde(default)]
    pub user: Option<String>,
    /// Arguments that come before those of the hook: host, port, a file with credentials.
    #[serde(default)]
    pub arguments: Vec<String>,
}

/// The applications with ready-made hooks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HookKind {
    /// `CHECKPOINT` by `psql`. Recovery from a frozen file system needs nothing more; with it, it is short.
    Postgresql,
    /// `FLUSH TABLES WITH READ LOCK` by `mysql`, held while the file systems are frozen.
    Mysql,
}

impl HookKind {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            HookKind::Postgresql => "PostgreSQL",
            HookKind::Mysql => "MySQL",
        }
    }
}

impl ConsistencyConfig {
    /// Whether anything of the machine's own brings applications to rest.
    pub fn quiesces(&self) -> bool {
        self.pre_script.is_some() || !self.hooks.is_empty()
    }

    /// Checks every value that the types leave open.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn check(&self) -> Result<(), Problem> {
        let wrong = |why: String, advice: &str| Err(Problem::usage("the configuration cannot be used", why, advice));
        for (key, value, least, most) in [
            ("crash_every_s", self.crash_every_s, 1, EVERY_S_MAX),
            ("application_every_s", self.application_every_s, APPLICATION_EVERY_S_MIN, EVERY_S_MAX),
        ] {
            if value != 0 && !(least..=most).contains(&value) {
                return wrong(format!("{key} is {value}"), &format!("choose 0, or a value from {least} to {most}"));
            }
        }
        for (key, value, least, most) in [
            ("freeze_limit_ms", self.freeze_limit_ms, 100, FREEZE_LIMIT_MS_MAX),
            ("flush_limit_ms", self.flush_limit_ms, 100, SCRIPT_LIMIT_MS_MAX),
            ("script_limit_ms", self.script_limit_ms, 100, SCRIPT_LIMIT_MS_MAX),
        ] {
            if !(least..=most).contains(&value) {
                return wrong(format!("{key} is {value}"), &format!("choose a value from {least} to {most}"));
            }
        }
        if self.hooks.len() > HOOKS_MAX || self.hooks.iter().any(|hook| hook.arguments.len() > ARGUMENTS_MAX) {
            return wrong(
                format!("more than {HOOKS_MAX} hooks, or one with more than {ARGUMENTS_MAX} arguments"),
                "name fewer",
            );
        }
        let programs = self.hooks.iter().filter_map(|hook| hook.program.as_ref());
        for path in [&self.pre_script, &self.post_script].into_iter().flatten().chain(programs) {
            if !path.is_absolute() {
                return wrong(format!("{} is not an absolute path", path.display()), "name it from the root on");
            }
        }
        Ok(())
    }
}
