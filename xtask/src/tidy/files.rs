//! Small rooms with honest names: length of files, names of modules, glob imports, crate documentation.

use std::collections::BTreeSet;
use std::path::Path;

use super::code::{blank_words, line_of, test_items, test_modules};
use super::{Finding, Tree};
use crate::workspace::Workspace;

/// Lines of a file outside `#[cfg(test)]`. The aim is 600; at this many it is two things.
const PRODUCTION_LINES_MAX: usize = 800;

/// Words that say nothing about the role in the flow.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "manager", "managers", "misc"];

pub(super) fn check(tree: &Tree, workspace: &Workspace) -> Vec<Finding> {
    let test_files: BTreeSet<String> = tree.rust().flat_map(|(name, text)| declared_test_files(name, text)).collect();
    let mut findings = Vec::new();
    for (name, text) in tree.rust() {
        let is_test = is_test_path(name) || test_files.iter().any(|file| covers(file, name));
        findings.extend(check_name(name));
        findings.extend(ignored_tests(name, text));
        if !is_test {
            findings.extend(check_production(name, text));
        }
    }
    for library in workspace.members.iter().filter_map(|member| member.library.as_deref()) {
        let name = library.strip_prefix(&workspace.root).unwrap_or(library).to_string_lossy().into_owned();
        if !tree.text(&name).is_some_and(|text| text.starts_with("//!")) {
            findings.push(Finding::new(name, "a library begins with `//!`: what it is for, its place in the flow"));
        }
    }
    findings
}

/// Files that hold only tests by where they are or what they are called.
fn is_test_path(name: &str) -> bool {
    let stem = Path::new(name).file_stem().unwrap_or_default().to_string_lossy();
    stem == "tests"
        || stem.ends_with("_tests")
        || name.split('/').any(|part| matches!(part, "tests" | "benches" | "fuzz"))
}

/// The paths (without `.rs`) of modules that `name` declares under `#[cfg(test)]`.
fn declared_test_files(name: &str, text: &str) -> Vec<String> {
    let path = Path::new(name);
    let directory = path.parent().unwrap_or(Path::new(""));
    let stem = path.file_stem().unwrap_or_default();
    let owns_directory = ["lib", "main"].iter().any(|root| stem == *root);
    let directory = if owns_directory { directory.to_path_buf() } else { directory.join(stem) };
    test_modules(&blank_words(text))
        .iter()
        .map(|module| directory.join(module).to_string_lossy().into_owned())
        .collect()
}

/// Whether a module's path covers a file: its own, or one below it.
fn covers(module: &str, file: &str) -> bool {
    file.strip_prefix(module).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

fn check_name(name: &str) -> Option<Finding> {
    let path = Path::new(name);
    // Below `tests/` any other file name would make cargo build the shared module as a test of its own.
    let shared_by_tests = name.split('/').any(|part| part == "tests");
    if path.file_name().is_some_and(|file| file == "mod.rs") && !shared_by_tests {
        return Some(Finding::new(name, "name the file after the module instead of `mod.rs`"));
    }
    let stem = path.with_extension("");
    let parts = stem.to_string_lossy().into_owned();
    let empty = parts.split(['/', '_', '-']).find(|word| EMPTY_NAMES.contains(word))?;
    Some(Finding::new(name, format!("`{empty}` says nothing: name the module after its role in the flow")))
}

fn check_production(name: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let code = blank_words(text);
    let tests = test_items(&code);
    let test_lines: usize = tests.iter().map(|range| line_of(text, range.end) - line_of(text, range.start) + 1).sum();
    let lines = text.lines().count() - test_lines.min(text.lines().count());
    if lines > PRODUCTION_LINES_MAX {
        let what = format!("{lines} lines outside tests, at most {PRODUCTION_LINES_MAX}: split it along the data flow");
        findings.push(Finding::new(name, what));
    }
    for at in glob_imports(&code) {
        if !tests.iter().any(|range| range.contains(&at)) {
            findings.push(Finding::at_line(name, line_of(text, at), "a glob import outside tests"));
        }
    }
    findings
}

/// Tests that never run unless somebody remembers them.
fn ignored_tests(name: &str, text: &str) -> Vec<Finding> {
    let code = blank_words(text);
    let what = "an ignored test is a skip that nobody sees: let it print `SKIPPED: name: reason` instead";
    let found = code.match_indices("#[ignore");
    found.map(|(at, _)| Finding::at_line(name, line_of(text, at), what)).collect()
}

/// Where `use` statements that end in `*` begin.
fn glob_imports(code: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let begins_word =
            at == 0 || !code.as_bytes()[at - 1].is_ascii_alphanumeric() && code.as_bytes()[at - 1] != b'_';
        let statement = code[at..].split(';').next().unwrap_or_default();
        if begins_word && statement.contains("::") && statement.contains('*') {
            found.push(at);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_meaning_are_found() {
        assert!(check_name("crates/vault/src/segment.rs").is_none());
        assert!(check_name("crates/vault/src/commons.rs").is_none());
        assert!(check_name("crates/nbd/tests/tools/mod.rs").is_none());
        for bad in [
            "crates/a/src/utils.rs",
            "crates/a/src/journal_helpers.rs",
            "crates/a/src/b/mod.rs",
            "crates/a/tests/common/x.rs",
        ] {
            assert!(check_name(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn glob_imports_count_outside_tests_only() {
        let text = "use a::b;\nuse c::{\n    d::*,\n};\nfn f() -> u8 { 2 * 3 }\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n";
        let findings = check_production("x.rs", text);
        assert_eq!(findings, [Finding::at_line("x.rs", 2, "a glob import outside tests")]);
    }

    #[test]
    fn ignored_tests_are_found() {
        let text = "#[test]\n#[ignore = \"slow\"]\nfn a() {}\n// #[ignore]\n";
        let places: Vec<_> = ignored_tests("x.rs", text).into_iter().map(|finding| finding.place).collect();
        assert_eq!(places, ["x.rs:2"]);
    }

    #[test]
    fn only_production_lines_are_counted() {
        let production = "fn f() {}\n".repeat(PRODUCTION_LINES_MAX);
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "fn t() {}\n".repeat(500));
        assert!(check_production("x.rs", &format!("{production}{tests}")).is_empty());
        assert_eq!(check_production("x.rs", &format!("fn g() {{}}\n{production}{tests}")).len(), 1);
    }

    #[test]
    fn modules_declared_for_tests_are_test_files() {
        let text = "#[cfg(test)]\nmod oracle;\nmod journal;\n";
        assert_eq!(declared_test_files("crates/a/src/lib.rs", text), ["crates/a/src/oracle"]);
        assert_eq!(declared_test_files("crates/a/src/maps.rs", text), ["crates/a/src/maps/oracle"]);
        assert!(covers("crates/a/src/oracle", "crates/a/src/oracle.rs"));
        assert!(!covers("crates/a/src/oracle", "crates/a/src/oracles.rs"));
    }
}
