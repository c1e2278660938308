//! `docs/guarantees.md` names for each promise the tests that would fail if it were broken. Here: they exist.
//!
//! A proof is `crate::path::test_name`, or `file:function` for what is no Rust test, or the words `not proven yet`.

use super::code::blank_words;
use super::{Finding, Tree};
use crate::workspace::Workspace;

const PAGE: &str = "docs/guarantees.md";
const HEADER: &str = "| promise | proof |";
const UNPROVEN: &str = "not proven yet";

pub(super) fn check(tree: &Tree, workspace: &Workspace) -> Vec<Finding> {
    let Some(page) = tree.text(PAGE) else {
        return vec![Finding::new(PAGE, "is missing: every promise is listed there with its tests")];
    };
    let directory_of = |name: &str| {
        let member = workspace.members.iter().find(|member| member.name == name)?;
        Some(member.directory.strip_prefix(&workspace.root).ok()?.to_string_lossy().into_owned())
    };
    check_page(page, tree, &directory_of)
}

fn check_page(page: &str, tree: &Tree, directory_of: &dyn Fn(&str) -> Option<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !page.contains(HEADER) {
        findings.push(Finding::new(PAGE, format!("has no table with the header `{HEADER}`")));
    }
    for (line, proof) in proofs(page) {
        let names = quoted(&proof);
        if names.is_empty() && proof != UNPROVEN {
            findings.push(Finding::at_line(PAGE, line, format!("names no `test` and does not say `{UNPROVEN}`")));
        }
        for name in names {
            if !exists(name, tree, directory_of) {
                findings.push(Finding::at_line(PAGE, line, format!("there is no test `{name}`")));
            }
        }
    }
    findings
}

/// The last cell of each row of each table whose header is ours, with its line.
fn proofs(page: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_table = false;
    for (index, line) in page.lines().enumerate() {
        if line.trim() == HEADER {
            in_table = true;
        } else if !line.starts_with('|') {
            in_table = false;
        } else if in_table && !line.starts_with("|--") && !line.starts_with("| --") {
            let cells: Vec<&str> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
            found.push((index + 1, cells.last().copied().unwrap_or_default().to_owned()));
        }
    }
    found
}

fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

fn exists(name: &str, tree: &Tree, directory_of: &dyn Fn(&str) -> Option<String>) -> bool {
    if let Some((crate_name, path)) = name.split_once("::") {
        let Some(directory) = directory_of(crate_name) else { return false };
        let mut modules: Vec<&str> = path.split("::").collect();
        let test = modules.pop().unwrap_or_default();
        modules.retain(|module| *module != "tests");
        return tree
            .rust()
            .filter(|(file, _)| file.starts_with(&format!("{directory}/")))
            .any(|(file, text)| is_test(text, test) && modules.iter().all(|module| holds_module(file, text, module)));
    }
    match name.split_once(':') {
        Some((file, function)) => tree.text(file).is_some_and(|text| {
            text.contains(&format!("fn {function}(")) || text.contains(&format!("def {function}("))
        }),
        None => false,
    }
}

/// Whether the file defines `fn name` as a test: a `#[test]` among the attributes in front of it.
fn is_test(text: &str, name: &str) -> bool {
    let code = blank_words(text);
    code.match_indices(&format!("fn {name}(")).any(|(at, _)| {
        // Back to the end of the item before; attributes stand in between.
        let start = code[..at].rfind(['}', ';']).map_or(0, |end| end + 1);
        code[start..at].contains("#[test]") || code[start..at].contains("::test]")
    })
}

fn holds_module(file: &str, text: &str, module: &str) -> bool {
    file.trim_end_matches(".rs").split('/').any(|part| part == module) || text.contains(&format!("mod {module} {{"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let code =
            "fn helper() {}\n#[test]\nfn nothing_is_lost() {}\nproptest! { #[test]\n fn maps_hold(a in 0..2) {} }";
        let texts = vec![
            ("crates/cli/tests/kills.rs".to_owned(), code.to_owned()),
            ("tools/check.py".to_owned(), "def equal(a):\n".to_owned()),
        ];
        Tree { root: "/".into(), texts }
    }

    fn known(name: &str) -> bool {
        exists(name, &tree(), &|name| (name == "farshore").then(|| "crates/cli".to_owned()))
    }

    #[test]
    fn tests_are_found_by_name_and_module() {
        assert!(known("farshore::kills::nothing_is_lost"));
        assert!(known("farshore::kills::maps_hold"));
        assert!(known("tools/check.py:equal"));
        assert!(!known("farshore::kills::helper"), "a function without #[test] proves nothing");
        assert!(!known("farshore::other::nothing_is_lost"));
        assert!(!known("elsewhere::kills::nothing_is_lost"));
        assert!(!known("tools/check.py:other"));
        assert!(!known("nothing"));
    }

    #[test]
    fn each_row_needs_a_proof_or_an_admission() {
        let rows = "| a | `farshore::kills::gone` |\n| b | not proven yet |\n| c | surely |\n\n| other | table |\n|--|--|\n| d | e |\n";
        let page = format!("text\n\n{HEADER}\n| --- | --- |\n{rows}");
        let findings = check_page(&page, &tree(), &|_| Some("crates/cli".to_owned()));
        let places: Vec<_> = findings.iter().map(|finding| finding.place.as_str()).collect();
        assert_eq!(places, ["docs/guarantees.md:5", "docs/guarantees.md:7"]);
        assert_eq!(check_page("nothing", &tree(), &|_| None).len(), 1);
    }
}
