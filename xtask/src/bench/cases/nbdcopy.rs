//! `nbdcopy` from a raw export: what moving the bytes costs when nothing is done with them.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::bench::{Case, Measured, Question, Row, Subject, measure_in, stored_bytes};

pub(super) struct Nbdcopy;

impl Case for Nbdcopy {
    fn name(&self) -> &'static str {
        "nbdcopy"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["nbdcopy", "qemu-nbd"]
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let copy = scratch.join("copy.img");
        let mut command = Command::new("nbdcopy");
        command.args(["--", "[", "qemu-nbd", "-r", "-f", "raw"]).arg(disk.image()).arg("]").arg(&copy);
        let usage = measure_in(scratch, &mut command)?;
        let row = Row::new(Question::FirstCopy, "nbdcopy from qemu-nbd", usage);
        Ok(vec![row.stored(stored_bytes(&copy)?).note("raw, neither compressed nor encrypted")].into())
    }
}
