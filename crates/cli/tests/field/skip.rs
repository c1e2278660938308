//! A note of what cannot be tested here.

use std::fs::OpenOptions;
use std::io::Write;

/// Says in a way that the test command collects why a test did not run.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED: {test}: {why}\n");
    print!("{line}");
    if let Ok(path) = std::env::var("FARSHORE_SKIP_LOG") {
        let log = OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes())).expect("the skip is noted");
    }
}
