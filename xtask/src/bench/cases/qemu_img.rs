//! `qemu-img convert -c` with zstd: the usual way to keep a compressed disk image.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::bench::{Case, Measured, Question, Row, Subject, measure_in, stored_bytes};

pub(super) struct QemuImg;

impl Case for QemuImg {
    fn name(&self) -> &'static str {
        "qemu-img"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["qemu-img"]
    }

    fn run(&self, subject: &Subject<'_>, scratch: &Path) -> Result<Measured> {
        let disk = subject.disk;
        let packed = scratch.join("disk.qcow2");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"]);
        command.arg(disk.image()).arg(&packed);
        let usage = measure_in(scratch, &mut command)?;
        let first = Row::new(Question::FirstCopy, "qemu-img convert -c, zstd", usage).stored(stored_bytes(&packed)?);

        let raw = scratch.join("back.img");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "qcow2", "-O", "raw"]).arg(&packed).arg(&raw);
        let usage = measure_in(scratch, &mut command)?;
        let back = Row::new(Question::WholeRead, "qemu-img convert to raw", usage).note("to a file");
        Ok(vec![first.note("not encrypted"), back].into())
    }
}
