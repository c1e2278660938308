//! restic with its defaults: content-defined chunks, deduplicated, compressed (zstd), encrypted.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::{RESTIC_BACKUP_ROW, RESTIC_DUMP_ROW};
use crate::bench::{Case, Measured, Question, Row, Subject, measure_in, stored_bytes};

pub(super) struct Restic;

impl Case for Restic {
    fn name(&self) -> &'static str {
        "restic"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["restic"]
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let repository = scratch.join("repository");
        let restic = |words: &[&str]| {
            let mut command = Command::new("restic");
            command.args(["--quiet", "--cache-dir"]).arg(scratch.join("cache")).arg("--repo").arg(&repository);
            command.env("RESTIC_PASSWORD", "bench").args(words);
            command
        };
        // The second copy comes from the same path, as it would on a real machine.
        let source = scratch.join("disk.img");
        let path = source.to_string_lossy().into_owned();
        measure_in(scratch, &mut restic(&["init"]))?;

        disk.place_at(&source)?;
        let usage = measure_in(scratch, &mut restic(&["backup", &path]))?;
        let full = stored_bytes(&repository)?;
        let first = Row::new(Question::FirstCopy, RESTIC_BACKUP_ROW, usage).stored(full);

        let usage = measure_in(scratch, &mut restic(&["dump", "latest", &path]))?;
        let back = Row::new(Question::WholeRead, RESTIC_DUMP_ROW, usage).note("to a pipe");

        disk.change()?;
        let usage = measure_in(scratch, &mut restic(&["backup", &path]))?;
        let grown = stored_bytes(&repository)?.saturating_sub(full);
        let again = Row::new(Question::AfterRandomWrites, RESTIC_BACKUP_ROW, usage).stored(grown);
        Ok(vec![first, back, again].into())
    }
}
