//! Public tools that the conformance tests run.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Set to 1, it turns a missing tool from a failure into a line `SKIPPED: …` on standard error.
const SKIP_MISSING: &str = "FARSHORE_SKIP_MISSING_TOOLS";

/// Finds `tool`, which the Debian package `package` brings, for the test `test`; `None` means the test is skipped.
pub(crate) fn find(test: &str, tool: &str, package: &str) -> Option<PathBuf> {
    let found = std::env::var_os("PATH")
        .and_then(|path| std::env::split_paths(&path).map(|folder| folder.join(tool)).find(|path| path.is_file()));
    if found.is_none() {
        missing(test, &format!("{tool} missing (package {package})"));
    }
    found
}

/// Reports that `test` cannot run because of `what`: fails, or says so and returns if skipping is allowed.
pub(crate) fn missing(test: &str, what: &str) {
    if std::env::var_os(SKIP_MISSING).is_some_and(|value| value == "1") {
        // In one write and past the test harness, which keeps back what a passing test prints.
        let line = format!("SKIPPED: {test}: {what}\n");
        std::io::stderr().write_all(line.as_bytes()).expect("standard error is open");
    } else {
        panic!("{test} needs more than this machine has: {what}; install it, or set {SKIP_MISSING}=1");
    }
}

/// Runs `command`, at most for a minute, and returns its standard output; panics with everything it said if it
/// fails.
pub(crate) fn run(command: &mut Command) -> String {
    let (succeeded, output, errors) = outcome(command);
    assert!(succeeded, "{command:?} failed\n{output}\n{errors}");
    output
}

/// Runs `command`, at most for a minute; whether it succeeded, its standard output and its standard error.
pub(crate) fn outcome(command: &mut Command) -> (bool, String, String) {
    let mut timed = Command::new("timeout");
    timed.arg("60").arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    let output = timed.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
