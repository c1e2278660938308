//! Licences and banned crates, as `deny.toml` lists them. `cargo deny` checks more, but takes long to build; these two
//! must hold on every run.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Finding, Tree};
use crate::workspace::cargo;

const RULES: &str = "deny.toml";
/// The platform we build for: what other platforms would bring is neither downloaded nor shipped.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

pub(super) fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let rules = tree.text(RULES).with_context(|| format!("{RULES} is missing"))?;
    let allowed = strings_between(rules, "allow = [", "]");
    let banned = strings_between(rules, "\ndeny = [", "\n]");
    ensure!(!allowed.is_empty() && !banned.is_empty(), "{RULES} lists no licences or no banned crates");
    let output = cargo()
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--filter-platform", PLATFORM])
        .current_dir(&tree.root)
        .output()
        .context("cannot run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let mut findings = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let licence = package["license"].as_str().unwrap_or_default();
        if banned.contains(&name) {
            findings.push(Finding::new("Cargo.lock", format!("`{name}` is banned by {RULES}")));
        }
        if !permits(licence, &allowed) {
            findings.push(Finding::new("Cargo.lock", format!("`{name}` has the licence `{licence}`, see {RULES}")));
        }
    }
    Ok(findings)
}

/// The quoted strings between two marks.
fn strings_between<'a>(text: &'a str, from: &str, to: &str) -> Vec<&'a str> {
    let part = text.split_once(from).and_then(|(_, rest)| rest.split_once(to)).map_or("", |(part, _)| part);
    part.split('"').skip(1).step_by(2).collect()
}

/// Whether an SPDX expression can be satisfied with the allowed licences. Crates.io still holds the old form `A/B`,
/// which means `A OR B`; `AND` binds more tightly than `OR`.
fn permits(expression: &str, allowed: &[&str]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words: Vec<&str> = Vec::new();
    let mut rest = spaced.split_whitespace();
    while let Some(word) = rest.next() {
        words.push(word);
        if word == "WITH" {
            // The exception belongs to the licence before it; we list the pair as one string.
            words.pop();
            let exception = rest.next().unwrap_or_default();
            let licence = words.pop().unwrap_or_default();
            let pair = allowed.iter().find(|known| known.split(" WITH ").eq([licence, exception]));
            words.push(pair.copied().unwrap_or("unlisted"));
        }
    }
    let mut at = 0;
    let satisfied = any_of(&words, &mut at, allowed);
    satisfied && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut satisfied = all_of(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        satisfied |= all_of(words, at, allowed);
    }
    satisfied
}

fn all_of(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let mut satisfied = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        satisfied &= one(words, at, allowed);
    }
    satisfied
}

fn one(words: &[&str], at: &mut usize, allowed: &[&str]) -> bool {
    let word = words.get(*at).copied().unwrap_or_default();
    *at += 1;
    if word != "(" {
        return allowed.contains(&word);
    }
    let satisfied = any_of(words, at, allowed);
    let closed = words.get(*at) == Some(&")");
    *at += 1;
    satisfied && closed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_understood() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Unicode-3.0"];
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0 OR MIT",
            "(MIT OR GPL-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(permits(good, &allowed), "{good}");
        }
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0 WITH other-exception", "(MIT"] {
            assert!(!permits(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn lists_are_read_from_the_rules() {
        let rules = "[licenses]\nallow = [\n  \"A\",\n  \"B\",\n]\n[bans]\ndeny = [\n  { crate = \"c\" },\n]\n";
        assert_eq!(strings_between(rules, "allow = [", "]"), ["A", "B"]);
        assert_eq!(strings_between(rules, "\ndeny = [", "\n]"), ["c"]);
    }
}
