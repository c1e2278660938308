//! `cargo xtask tidy`: rules about the source tree that no compiler checks. Also run as a test of this crate.
//!
//! Each rule is a function from the tree to the findings, in its own file. A finding names the file, the line where
//! there is one, and what to do.

mod code;
mod directions;
mod files;
mod guarantees;
mod licences;
mod words;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// Something that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// Relative to the workspace root, with the line if there is one.
    place: String,
    what: String,
}

impl Finding {
    fn new(place: impl Into<String>, what: impl Into<String>) -> Finding {
        Finding { place: place.into(), what: what.into() }
    }

    fn at_line(file: &str, line: usize, what: impl Into<String>) -> Finding {
        Finding::new(format!("{file}:{line}"), what)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// The text files that are committed or would be, with `/` between components.
struct Tree {
    root: PathBuf,
    texts: Vec<(String, String)>,
}

impl Tree {
    fn load(root: &Path) -> Result<Tree> {
        let output = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root)
            .output()
            .context("cannot run git")?;
        ensure!(output.status.success(), "git ls-files failed: {}", String::from_utf8_lossy(&output.stderr));
        let names: BTreeSet<String> = output
            .stdout
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect();
        let texts = names
            .into_iter()
            // Deleted but still in the index, and fixtures that are no text.
            .filter_map(|name| fs::read_to_string(root.join(&name)).ok().map(|text| (name, text)))
            .collect();
        Ok(Tree { root: root.to_path_buf(), texts })
    }

    fn rust(&self) -> impl Iterator<Item = (&str, &str)> {
        self.texts.iter().filter(|(name, _)| name.ends_with(".rs")).map(|(name, text)| (name.as_str(), text.as_str()))
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.texts.iter().find(|(candidate, _)| candidate == name).map(|(_, text)| text.as_str())
    }
}

fn check() -> Result<Vec<Finding>> {
    let workspace = Workspace::load()?;
    let tree = Tree::load(&workspace.root)?;
    let mut findings = directions::check(&workspace);
    findings.extend(files::check(&tree, &workspace));
    findings.extend(words::check(&tree));
    findings.extend(guarantees::check(&tree, &workspace));
    findings.extend(licences::check(&tree)?);
    findings.sort();
    findings.dedup();
    Ok(findings)
}

/// Prints what breaks a rule; `Ok(true)` when nothing does.
pub(crate) fn run() -> Result<bool> {
    let findings = check()?;
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings", findings.len());
    Ok(findings.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_tree_is_tidy() {
        let findings = check().unwrap();
        let list: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(list.is_empty(), "run `cargo xtask tidy`:\n{}", list.join("\n"));
    }
}
