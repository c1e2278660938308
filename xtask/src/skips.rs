//! Tests that could not run. A test that lacks a component says so in one line, `SKIPPED: name: reason`; it appends the
//! line to the file named in `FARSHORE_SKIP_LOG`, or prints it, or both. Here those lines are collected, and in CI
//! each one must be on the committed list `.ci/skips.allow` with its reason.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The variable that names the file to which tests append their line.
pub(crate) const LOG_VARIABLE: &str = "FARSHORE_SKIP_LOG";

const MARK: &str = "SKIPPED: ";

/// Where the permitted skips are listed, below the workspace root.
pub(crate) const ALLOW_LIST: &str = ".ci/skips.allow";

/// The part of a printed line from `SKIPPED: ` on without that word, if the line is a skip.
///
/// Only at the start of a line (after blanks), so that a message which merely mentions the word is no skip.
pub(crate) fn in_line(line: &str) -> Option<String> {
    line.trim().strip_prefix(MARK).map(|rest| rest.trim().to_owned())
}

/// Every skip among the lines of a text, in order.
pub(crate) fn in_text(text: &str) -> Vec<String> {
    text.lines().filter_map(in_line).collect()
}

/// Every skip in what nextest recorded as printed by the tests (`<system-out>`, `<system-err>`).
pub(crate) fn in_junit(report: &str) -> Vec<String> {
    let mut skips = Vec::new();
    for name in ["system-out", "system-err"] {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        for part in report.split(&open).skip(1) {
            let printed = part.split(&close).next().unwrap_or_default();
            let printed = printed.strip_prefix("<![CDATA[").unwrap_or(printed);
            skips.extend(in_text(&unescape(printed)));
        }
    }
    skips
}

fn unescape(xml: &str) -> String {
    // `&amp;` last: it must not create new entities.
    let xml = xml.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&apos;", "'");
    xml.replace("&#10;", "\n").replace("&amp;", "&")
}

/// Skips that may happen in CI, each with its reason.
#[derive(Debug, Default)]
pub(crate) struct AllowList {
    entries: Vec<(String, String)>,
}

impl AllowList {
    /// Reads the committed list; a missing file permits nothing.
    pub(crate) fn load(root: &Path) -> Result<AllowList> {
        match fs::read_to_string(root.join(ALLOW_LIST)) {
            Ok(text) => AllowList::parse(&text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(AllowList::default()),
            Err(error) => Err(error).context(format!("cannot read {ALLOW_LIST}")),
        }
    }

    fn parse(text: &str) -> Result<AllowList> {
        let mut entries = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (start, reason) = line
                .split_once(" | ")
                .map(|(start, reason)| (start.trim(), reason.trim()))
                .filter(|(start, reason)| !start.is_empty() && !reason.is_empty())
                .with_context(|| format!("{ALLOW_LIST}: `{line}` is not `start of the skip | reason`"))?;
            entries.push((start.to_owned(), reason.to_owned()));
        }
        Ok(AllowList { entries })
    }

    /// Why this skip is permitted, or `None`.
    pub(crate) fn reason(&self, skip: &str) -> Option<&str> {
        self.entries.iter().find(|(start, _)| skip.starts_with(start.as_str())).map(|(_, reason)| reason.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_found_only_at_line_starts() {
        let text = "ok\n  SKIPPED: fuse: no /dev/fuse \nthe word SKIPPED: in a sentence\nSKIPPED: b: c";
        assert_eq!(in_text(text), ["fuse: no /dev/fuse", "b: c"]);
    }

    #[test]
    fn skips_are_found_in_a_nextest_report() {
        let report = "<testcase name=\"a\"><system-out>running\nSKIPPED: a: needs &lt;x&gt; &amp;amp;\n</system-out>\
                      <system-err>SKIPPED: a: twice</system-err></testcase>";
        assert_eq!(in_junit(report), ["a: needs <x> &amp;", "a: twice"]);
        assert!(in_junit("<testcase name=\"SKIPPED: x\"/>").is_empty());
    }

    #[test]
    fn permission_needs_a_reason_and_matches_the_start() {
        let list = AllowList::parse("# comment\n\nfuse: no /dev/fuse | containers have none\n").unwrap();
        assert_eq!(list.reason("fuse: no /dev/fuse here"), Some("containers have none"));
        assert_eq!(list.reason("a fuse: no /dev/fuse"), None);
        assert!(AllowList::parse("fuse: no /dev/fuse").is_err());
        assert!(AllowList::parse("fuse: |  ").is_err());
    }
}
