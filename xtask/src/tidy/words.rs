//! Words that must not be committed: paths of the machine on which something was written, hosts of package registries
//! (the lock file names the standard index and nothing else), and links in the documentation that lead nowhere.

use super::{Finding, Tree};

/// Forbidden everywhere. Written in two parts so that this file does not contain them.
const FORBIDDEN: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("/ro", "ot/"),
    concat!("../sha", "red"),
    concat!("index.", "crates.io"),
    concat!("static.", "crates.io"),
    concat!("registry.", "npmjs.org"),
    concat!("pypi", ".org"),
    concat!("proxy.", "golang.org"),
    concat!("deb.", "debian.org"),
];

const LOCK_SOURCE: &str = "registry+https://github.com/rust-lang/crates.io-index";

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, text) in &tree.texts {
        if name == "Cargo.lock" {
            findings.extend(check_lock(name, text));
        } else {
            findings.extend(check_text(name, text));
        }
        if name.ends_with(".md") {
            let directory = tree.root.join(name);
            let directory = directory.parent().unwrap_or(&tree.root);
            let dead = links(text).into_iter().filter(|(_, target)| !directory.join(target).exists());
            findings
                .extend(dead.map(|(line, target)| Finding::at_line(name, line, format!("`{target}` does not exist"))));
        }
    }
    findings
}

fn check_text(name: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for word in FORBIDDEN.iter().filter(|word| line.contains(**word)) {
            findings.push(Finding::at_line(name, index + 1, format!("`{word}` must not be committed")));
        }
    }
    findings
}

fn check_lock(name: &str, text: &str) -> Vec<Finding> {
    let foreign = |line: &str| {
        let source = line.strip_prefix("source = \"")?.strip_suffix('"')?;
        (source != LOCK_SOURCE).then(|| format!("`{source}` is not the standard index"))
    };
    let lines = text.lines().enumerate();
    lines.filter_map(|(index, line)| foreign(line).map(|what| Finding::at_line(name, index + 1, what))).collect()
}

/// Relative link targets with their lines; addresses and places within the page are left out.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for rest in line.split("](").skip(1) {
            let target = rest.split([')', '#', ' ']).next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                found.push((index + 1, target.to_owned()));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_a_machine_are_found() {
        let text = format!("fine\nsee {}x\n", FORBIDDEN[0]);
        assert_eq!(check_text("a.md", &text).len(), 1);
        assert_eq!(check_text("a.md", &text)[0].place, "a.md:2");
    }

    #[test]
    fn the_lock_file_names_only_the_standard_index() {
        let good = format!("source = \"{LOCK_SOURCE}\"\n");
        assert!(check_lock("Cargo.lock", &good).is_empty());
        assert_eq!(check_lock("Cargo.lock", "source = \"registry+http://mirror.example/\"\n").len(), 1);
    }

    #[test]
    fn relative_links_are_followed() {
        let text = "[a](docs/a.md#part) [b](https://x.y) [c](#here)\n```\n[d](no)\n```\n";
        assert_eq!(links(text), [(1, "docs/a.md".to_owned())]);
    }
}
