//! `farshore branch export`: a disk, as it was at a moment, in a file.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use recovery::view_of;
use replication::DiskId;
use serde_json::json;
use vault::Catalog;
use vault::view_source::{CacheBytes, FrameSource};
use world::WallTime;

use super::image;
use super::read_only::PointDevice;
use crate::failure::{Done, Verdict, usage};
use crate::moment::{self, MOMENT_HELP};
use crate::output::{Output, bytes};
use crate::progress::{Progress, StopRequest};
use crate::vault_access::{KeyOptions, VaultPlace, choose, disks_at, find_or_only};

/// Options of `branch export`.
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Machine or branch; may be left out if the vault holds one machine
    machine: Option<String>,
    #[command(flatten)]
    place: VaultPlace,
    #[command(flatten)]
    keys: KeyOptions,
    #[arg(long, value_name = "MOMENT", default_value = "latest", allow_hyphen_values = true, help = MOMENT_HELP)]
    at: String,
    /// Which disk, by the number that `vault machines --json` shows; may be left out if there is one
    #[arg(long, value_name = "NUMBER")]
    disk: Option<u16>,
    /// File to write; must not exist
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// What to write; raw is written as a sparse file, the others take `qemu-img`
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Export although the point lacks ranges or disks; the lacking parts read as they were before
    #[arg(long)]
    lacking_is_fine: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
    Vpc,
}

impl Export {
    pub(crate) fn run(&self, output: Output) -> Done {
        let moment = moment::parse(&self.at)?;
        if self.to.exists() {
            return Err(usage(
                format!("{} exists already", self.to.display()),
                "an export never overwrites a file",
                "name another file, or remove it first",
            )
            .with(Verdict::Refused));
        }
        let vault = self.place.unlock(&self.keys)?;
        let (store, keys) = (vault.store(), vault.keys());
        let catalog = Catalog::load(store, keys)?;
        let named = find_or_only(store, &catalog, self.machine.as_deref())?;
        let (history, point) = choose(store, keys, named.chain, &moment)?;
        let disks = disks_at(store, keys, &history, point.cut.sequence)?;
        let known: Vec<String> = disks.iter().map(|disk| format!("{} ({})", disk.disk.0, disk.path)).collect();
        let chosen = match self.disk {
            Some(number) => disks.iter().find(|disk| disk.disk == DiskId(number)),
            None if disks.len() == 1 => disks.first(),
            None => None,
        };
        let Some(disk) = chosen else {
            let what = match self.disk {
                Some(number) => format!("{} has no disk {number} at this point", named.name),
                None => format!("{} has {} disks", named.name, disks.len()),
            };
            return Err(usage(what, format!("its disks are: {}", known.join(", ")), "name one with --disk"));
        };
        output.remark(format!("{}: {}", named.name, point.reason))?;
        for gap in &point.lacking {
            output.remark(format!("lacking: {gap}"))?;
        }
        if !point.lacking.is_empty() && !self.lacking_is_fine {
            return Err(usage(
                "this point lacks parts of the machine",
                "what is listed above was not captured in order there",
                "choose another moment, or export it nevertheless with --lacking-is-fine",
            )
            .with(Verdict::Refused));
        }
        let source = Arc::new(FrameSource::new(Arc::clone(store), Arc::clone(keys), CacheBytes::default()));
        let view = view_of(&source, &history)?;
        let size = disk.size_bytes;
        let device = PointDevice { view, cut: point.cut.sequence, disk: disk.disk, size };
        let stop = StopRequest::listen()?;
        let format = self.format.to_possible_value().expect("no format is hidden").get_name().to_owned();
        let took = if self.format == Format::Raw {
            let mut progress = Progress::of_bytes(output, format!("exporting {}", named.name), size);
            image::write_raw(&device, &self.to, &mut progress, &stop)?;
            let took = format!("{}, {}", progress.took(), progress.rate());
            progress.finish();
            took
        } else {
            let progress = Progress::spinner(output, format!("exporting {}", named.name));
            image::write_by_qemu(device, &self.to, &format, &stop)?;
            let took = progress.took();
            progress.finish();
            took
        };
        output.object(&json!({
            "machine": named.name, "disk": disk.disk.0, "sequence": point.cut.sequence.to_string(),
            "time_ns": point.cut.time.0, "time": WallTime(point.cut.time.0).to_string(), "reason": point.reason,
            "file": self.to, "format": format, "size_bytes": size,
        }))?;
        output.line(format!("wrote {} ({}) in {took}", self.to.display(), bytes(size)))
    }
}
