//! `cargo xtask bpf`: builds the capture programs, or checks that the committed objects are what their source builds to.
//!
//! The object is committed because the agent embeds it and users build without clang. Another clang makes other code of
//! the same source, so the comparison needs the version that made the object; it is written beside it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process::find_program;
use crate::workspace::Workspace;

const FOLDER: &str = "crates/agent/bpf";
const SOURCE: &str = "capture.bpf.c";
/// What is built of it, and what the compiler is told besides: the agent's object, and that with mistakes for tests.
const OBJECTS: [(&str, &[&str]); 2] = [("capture.bpf.o", &[]), ("planted.bpf.o", &["-DPLANTED"])];
const BUILT_WITH: &str = "capture.bpf.built-with";

/// How a check ended that found no difference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// The object is what the source builds to.
    Same,
    /// It cannot be told here; why.
    Unknown(String),
}

/// Builds the objects and remembers with what.
pub(crate) fn write() -> Result<bool> {
    let folder = Workspace::load()?.root.join(FOLDER);
    let compiler = compiler()?.context("there is no clang: cargo xtask test --only components installs it")?;
    for (object, words) in OBJECTS {
        build(&folder, &folder.join(object), words)?;
        println!("{FOLDER}/{object} built with {compiler}");
    }
    fs::write(folder.join(BUILT_WITH), format!("{compiler}\n")).context("cannot write down the compiler")?;
    Ok(true)
}

/// Builds the objects beside the committed ones and compares.
pub(crate) fn check(workspace: &Workspace) -> Result<Checked> {
    let folder = workspace.root.join(FOLDER);
    let wanted = fs::read_to_string(folder.join(BUILT_WITH)).context("cannot read with what the object was built")?;
    let wanted = wanted.trim();
    match compiler()? {
        None => return Ok(Checked::Unknown("clang is not installed".to_owned())),
        Some(found) if found != wanted => {
            return Ok(Checked::Unknown(format!("the object was built with {wanted}, here is {found}")));
        }
        Some(_) if find_program("llvm-strip").is_none() => {
            return Ok(Checked::Unknown("llvm-strip is not installed".to_owned()));
        }
        Some(_) => {}
    }
    fs::create_dir_all(&workspace.target).context("cannot create the target directory")?;
    for (object, words) in OBJECTS {
        let built = workspace.target.join(object);
        build(&folder, &built, words)?;
        let same = fs::read(&built).context("cannot read what was built")?
            == fs::read(folder.join(object)).context("cannot read the committed object")?;
        if !same {
            bail!("{FOLDER}/{object} is not what {SOURCE} builds to: run `cargo xtask bpf` and commit the result");
        }
    }
    Ok(Checked::Same)
}

/// The first line of what clang says of itself.
fn compiler() -> Result<Option<String>> {
    if find_program("clang").is_none() {
        return Ok(None);
    }
    let output = Command::new("clang").arg("--version").output().context("cannot run clang")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // The package's suffix differs between machines, the code does not.
    let version =
        text.split_whitespace().skip_while(|word| *word != "version").nth(1).context("clang has no version")?;
    let version = version.split(['-', '+']).next().unwrap_or(version);
    Ok(Some(format!("clang {version}")))
}

/// Compiles in `folder`, so that no path of this machine gets into the object.
fn build(folder: &Path, output: &Path, words: &[&str]) -> Result<()> {
    let machine = rustix::system::uname();
    let include = format!("-I/usr/include/{}-linux-gnu", machine.machine().to_string_lossy());
    let prefix = format!("-ffile-prefix-map={}=.", folder.display());
    let mut compile = Command::new("clang");
    compile
        .args(["-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", "-Wno-unused-function"])
        .args(words)
        .args([&prefix, "-fdebug-compilation-dir=.", &include, "-c", SOURCE, "-o"])
        .arg(output)
        .current_dir(folder);
    let mut strip = Command::new("llvm-strip");
    strip.arg("-g").arg(output);
    for mut command in [compile, strip] {
        let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
        ensure!(status.success(), "{:?} failed", command.get_program());
    }
    Ok(())
}
