//! `zstd -1 -T2`: compression alone, which decides the throughput of everything else.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::ZSTD_ROW;
use crate::bench::{Case, Measured, Question, Row, Subject, measure_in, stored_bytes};

pub(super) struct Zstd;

impl Case for Zstd {
    fn name(&self) -> &'static str {
        "zstd"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["zstd"]
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let packed = scratch.join("disk.zst");
        let mut command = Command::new("zstd");
        command.args(["-1", "-T2", "-q", "-f"]).arg(disk.image()).arg("-o").arg(&packed);
        let usage = measure_in(scratch, &mut command)?;
        let first = Row::new(Question::FirstCopy, ZSTD_ROW, usage).stored(stored_bytes(&packed)?);

        let mut command = Command::new("zstd");
        command.args(["-d", "-q", "-c"]).arg(&packed);
        let back = Row::new(Question::WholeRead, "zstd -d", measure_in(scratch, &mut command)?).note("to a pipe");
        Ok(vec![first, back].into())
    }
}
