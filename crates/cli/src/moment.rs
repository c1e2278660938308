//! Moments as people write them.

use vault::Moment;

use crate::failure::{Failure, usage};

/// What `--at` takes, for help texts.
pub(crate) const MOMENT_HELP: &str =
    "Moment: latest, latest-app, \"2026-11-22 14:03:07\" (UTC), -90s (m, h, d), @<sequence>, or a marker's name";

/// Reads a moment.
pub(crate) fn parse(text: &str) -> Result<Moment, Failure> {
    text.parse()
        .map_err(|error: vault::MomentError| usage(format!("{:?} is no moment", error.text), error.why, MOMENT_HELP))
}
