//! What the agent tells a person who has to act: what happened, why, and what to do.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of answer a problem is; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProblemKind {
    /// It was tried and did not succeed.
    Failed,
    /// The command, the configuration or the token is wrong.
    WrongUsage,
    /// Nothing was changed, because it already was so.
    AlreadySo,
    /// It could do harm and was therefore not done; the advice names what overrides it.
    Unsafe,
}

/// A problem in three parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What kind of answer this is.
    pub kind: ProblemKind,
    /// What happened.
    pub what: String,
    /// Why; may be empty.
    pub why: String,
    /// What to do; may be empty.
    pub advice: String,
}

impl Problem {
    /// A problem of `kind`.
    pub fn new(
        kind: ProblemKind,
        what: impl Into<String>,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> Problem {
        Problem { kind, what: what.into(), why: why.into(), advice: advice.into() }
    }

    /// Something that was tried and did not succeed.
    pub fn failed(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::Failed, what, why, advice)
    }

    /// A mistake in the command, the configuration or the token.
    pub fn usage(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::WrongUsage, what, why, advice)
    }

    /// A failure whose reason is `error` with everything behind it.
    pub fn caused(what: impl Into<String>, error: &dyn Error, advice: impl Into<String>) -> Problem {
        Problem::failed(what, chain(error), advice)
    }
}

impl fmt::Display for Problem {
    /// One line; programs that show the parts one below the other use the fields.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        for part in [&self.why, &self.advice] {
            if !part.is_empty() {
                write!(f, "; {part}")?;
            }
        }
        Ok(())
    }
}

impl Error for Problem {}

/// An error and its sources in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
