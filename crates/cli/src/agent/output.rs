//! How the agent's commands print: data on the output, problems in three parts on the error output.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use agent::service::problem::{Problem, ProblemKind};
use serde::Serialize;

/// Where and how results go.
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json }
    }

    /// Prints `value` as JSON, or `text` for people.
    pub(crate) fn data<T: Serialize>(&self, value: &T, text: impl Display) {
        let text =
            if self.json { serde_json::to_string(value).expect("results are plain data") } else { text.to_string() };
        // SIGPIPE is ignored, so whoever reads may stop reading early; that is no failure of ours.
        let _ = writeln!(io::stdout(), "{text}");
    }

    /// Prints what went wrong; the exit code that says so.
    pub(crate) fn problems(&self, problems: &[Problem]) -> ExitCode {
        let mut errors = io::stderr().lock();
        for problem in problems {
            let text = if self.json {
                serde_json::to_string(problem).expect("a problem is plain data")
            } else {
                let parts = [&problem.why, &problem.advice].into_iter().filter(|part| !part.is_empty());
                parts.fold(format!("error: {}", problem.what), |text, part| format!("{text}\n  {part}"))
            };
            let _ = writeln!(errors, "{text}");
        }
        ExitCode::from(problems.iter().map(code).max().unwrap_or(1))
    }
}

fn code(problem: &Problem) -> u8 {
    match problem.kind {
        ProblemKind::Failed => 1,
        ProblemKind::WrongUsage => 2,
        ProblemKind::AlreadySo => 3,
        ProblemKind::Unsafe => 4,
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A number of seconds for people.
pub(crate) fn seconds(count: u64) -> String {
    match count {
        0..60 => format!("{count} s"),
        60..3600 => format!("{} min {} s", count / 60, count % 60),
        3600..86_400 => format!("{} h {} min", count / 3600, count / 60 % 60),
        _ => format!("{} d {} h", count / 86_400, count / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!([0, 1023, 1024, 67_108_864].map(bytes), ["0 B", "1023 B", "1.0 KiB", "64.0 MiB"]);
        assert_eq!([59, 61, 3660, 90_000].map(seconds), ["59 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]);
    }
}
