//! What cargo knows about the workspace: its root, its members and where they are built.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The workspace as `cargo metadata --no-deps` describes it.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) members: Vec<Member>,
}

/// One crate of the workspace.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// Absolute directory of its `Cargo.toml`.
    pub(crate) directory: PathBuf,
    /// Names of the packages it depends on, of every kind (also for tests and build scripts).
    pub(crate) dependencies: Vec<String>,
    /// Names of the programs it builds.
    pub(crate) programs: Vec<String>,
    /// The root file of its library, if it has one.
    pub(crate) library: Option<PathBuf>,
}

/// The cargo that runs us, so that a toolchain override is kept.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

impl Workspace {
    /// Asks cargo. Needs no network and takes no build lock, so tests may call it.
    pub(crate) fn load() -> Result<Workspace> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let output = cargo()
            .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
            .current_dir(here)
            .output()
            .context("cannot run cargo metadata")?;
        ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
        Ok(Workspace {
            root: path(&metadata["workspace_root"])?,
            target: path(&metadata["target_directory"])?,
            members: list(&metadata["packages"]).iter().map(member).collect::<Result<_>>()?,
        })
    }

    /// Whether some member builds a program of this name.
    pub(crate) fn has_program(&self, name: &str) -> bool {
        self.members.iter().any(|member| member.programs.iter().any(|program| program == name))
    }
}

fn member(package: &Value) -> Result<Member> {
    let manifest = path(&package["manifest_path"])?;
    let targets_of = |kind: &str| {
        let kind = kind.to_owned();
        list(&package["targets"])
            .iter()
            .filter(move |target| list(&target["kind"]).iter().any(|k| k.as_str() == Some(kind.as_str())))
    };
    Ok(Member {
        name: text(&package["name"])?,
        directory: manifest.parent().context("a manifest without a directory")?.to_path_buf(),
        dependencies: list(&package["dependencies"]).iter().map(|d| text(&d["name"])).collect::<Result<_>>()?,
        programs: targets_of("bin").map(|target| text(&target["name"])).collect::<Result<_>>()?,
        library: targets_of("lib").next().map(|target| path(&target["src_path"])).transpose()?,
    })
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> Result<String> {
    Ok(value.as_str().context("cargo metadata lacks a string we need")?.to_owned())
}

fn path(value: &Value) -> Result<PathBuf> {
    text(value).map(PathBuf::from)
}
