//! borg: content-defined chunks, deduplicated, compressed (zstd level 1), encrypted.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::bench::{Case, Measured, Question, Row, Subject, measure_in, stored_bytes};

pub(super) struct Borg;

impl Case for Borg {
    fn name(&self) -> &'static str {
        "borg"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["borg"]
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let repository = scratch.join("repository");
        let borg = |words: &[&str]| {
            let mut command = Command::new("borg");
            command.env("BORG_BASE_DIR", scratch.join("base")).env("BORG_REPO", &repository);
            command.env("BORG_PASSPHRASE", "bench").args(words);
            command
        };
        // Relative, so that the archive holds the short name and `extract` finds it.
        let name = "disk.img";
        let source = scratch.join(name);
        measure_in(scratch, &mut borg(&["init", "--encryption", "repokey-blake2"]))?;

        disk.place_at(&source)?;
        let usage = measure_in(scratch, &mut borg(&["create", "--compression", "zstd,1", "::first", name]))?;
        let full = stored_bytes(&repository)?;
        let first = Row::new(Question::FirstCopy, "borg create, zstd,1", usage).stored(full);

        let usage = measure_in(scratch, &mut borg(&["extract", "--stdout", "::first", name]))?;
        let back = Row::new(Question::WholeRead, "borg extract", usage).note("to a pipe");

        disk.change()?;
        let usage = measure_in(scratch, &mut borg(&["create", "--compression", "zstd,1", "::second", name]))?;
        let grown = stored_bytes(&repository)?.saturating_sub(full);
        let again = Row::new(Question::AfterRandomWrites, "borg create, zstd,1", usage).stored(grown);
        Ok(vec![first, back, again].into())
    }
}
