//! `cargo xtask dist`: the agent as one small static program, to be copied to any x86-64 Linux.
//!
//! Built for musl: its resolver is inside the program, whereas a static glibc loads the name services of the machine it runs
//! on, in the version it was built with or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::{self, find_program};
use crate::workspace::{Workspace, cargo};

const TARGET: &str = "x86_64-unknown-linux-musl";
const PROFILE: &str = "dist";
const AGENT: &str = "farshore-agent";
/// What the agent may be long, in bytes.
const BYTES_MAX: u64 = 8 << 20;

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Built {
    /// The program.
    Program(PathBuf),
    /// It cannot be built here; why, and what to do.
    Unavailable(String),
}

/// Builds and checks the program, and says how long it is.
pub(crate) fn run() -> Result<bool> {
    match build(&Workspace::load()?, cargo(), Fetch::Allowed)? {
        Built::Program(_) => Ok(true),
        Built::Unavailable(why) => bail!(why),
    }
}

/// Whether a missing standard library may be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fetch {
    Allowed,
    Never,
}

/// Builds the program with `cargo` and checks that it is small, static, and runs.
pub(crate) fn build(workspace: &Workspace, mut cargo: Command, fetch: Fetch) -> Result<Built> {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return Ok(Built::Unavailable("the static agent is built on x86-64 Linux".to_owned()));
    }
    if find_program("musl-gcc").is_none() {
        return Ok(Built::Unavailable("musl-gcc is not installed: apt install musl-tools".to_owned()));
    }
    if !has_target()? {
        let fetched = fetch == Fetch::Allowed
            && find_program("rustup").is_some()
            && process::run(Command::new("rustup").args(["target", "add", TARGET])).is_ok();
        if !fetched || !has_target()? {
            return Ok(Built::Unavailable(format!("Rust cannot build for {TARGET} here: rustup target add {TARGET}")));
        }
    }
    cargo.args(["build", "--package", "farshore", "--bin", AGENT, "--locked"]);
    process::run(cargo.args(["--profile", PROFILE, "--target", TARGET]))?;
    let program = workspace.target.join(TARGET).join(PROFILE).join(AGENT);
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let len = bytes.len() as u64;
    println!("{AGENT}: {len} bytes ({:.2} MiB), static, for {TARGET}", len as f64 / (1 << 20) as f64);
    ensure!(len <= BYTES_MAX, "{AGENT} has {len} bytes, more than the {BYTES_MAX} that it may have");
    ensure!(!needs_loader(&bytes)?, "{AGENT} needs a dynamic loader: it does not run everywhere");
    let version = Command::new(&program).arg("--version").output().context("cannot run it")?;
    ensure!(version.status.success(), "{AGENT} --version ends with {}", version.status);
    Ok(Built::Program(program))
}

fn has_target() -> Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
    let said = said.context("cannot run rustc")?;
    Ok(said.status.success() && Path::new(String::from_utf8_lossy(&said.stdout).trim()).is_dir())
}

/// Whether an ELF program of 64 bits names an interpreter.
fn needs_loader(bytes: &[u8]) -> Result<bool> {
    const INTERPRETER: u32 = 3;
    let number = |at: usize, len: usize| -> Result<u64> {
        let field = bytes.get(at..at + len).context("the program is cut off")?;
        Ok(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    ensure!(bytes.starts_with(b"\x7fELF\x02\x01"), "it is no program of 64 bits");
    let (start, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    for index in 0..count {
        if number(start + index * size, 4)? == u64::from(INTERPRETER) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_needs_a_loader_is_told_from_one_that_does_not() {
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(needs_loader(&own).unwrap(), "tests are linked dynamically");
        let mut none = own.clone();
        none[56..58].fill(0);
        assert!(!needs_loader(&none).unwrap());
        assert!(needs_loader(&own[..100]).is_err());
        assert!(needs_loader(b"#!/bin/sh").is_err());
    }
}
