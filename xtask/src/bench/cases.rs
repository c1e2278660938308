//! The list of cases. To add one: a file beside these, and a line in [`all`].

mod borg;
mod farshore;
mod nbdcopy;
mod qemu_img;
mod restic;
mod zstd;

use super::Case;

/// The row that stands for the cost of compression alone.
pub(super) const ZSTD_ROW: &str = "zstd -1 -T2";

/// The rows that stand for today's good backup tool.
pub(super) const RESTIC_BACKUP_ROW: &str = "restic backup";
pub(super) const RESTIC_DUMP_ROW: &str = "restic dump";

/// The case that takes a program which is no part of the product.
pub(super) const CAPTURE: &str = "farshore-capture";

/// Every case, in the order in which they run.
pub(super) fn all() -> Vec<Box<dyn Case>> {
    vec![
        Box::new(zstd::Zstd),
        Box::new(nbdcopy::Nbdcopy),
        Box::new(qemu_img::QemuImg),
        Box::new(restic::Restic),
        Box::new(borg::Borg),
        Box::new(farshore::Farshore),
        Box::new(farshore::Day),
        Box::new(farshore::Idle),
        Box::new(farshore::Churn),
        Box::new(farshore::Capture),
    ]
}
