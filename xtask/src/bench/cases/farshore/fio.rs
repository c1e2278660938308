//! A disk in memory, a limit on how fast it may be written to, and `fio` writing to it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{major, minor};
use serde_json::Value;

use super::site::output_of;
use crate::process::search_path;

/// Where a file costs nothing but memory.
const MEMORY: &str = "/dev/shm";
const CGROUPS: &str = "/sys/fs/cgroup";

/// A loop device whose file lies in memory. Detached and removed when dropped.
pub(super) struct MemoryDisk {
    image: PathBuf,
    pub(super) device: PathBuf,
}

impl MemoryDisk {
    pub(super) fn make(name: &str, bytes: u64) -> Result<MemoryDisk> {
        let image = Path::new(MEMORY).join(format!("farshore-bench-{}-{name}", std::process::id()));
        fs::File::create(&image).and_then(|file| file.set_len(bytes)).context("no disk in memory")?;
        let mut attach = Command::new("losetup");
        attach.env("PATH", search_path()).args(["--show", "--find"]).arg(&image);
        let device = output_of(&mut attach).map(|said| PathBuf::from(said.trim()));
        let device = device.inspect_err(|_| drop(fs::remove_file(&image)))?;
        Ok(MemoryDisk { image, device })
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        let mut detach = Command::new("losetup");
        let _ = output_of(detach.env("PATH", search_path()).arg("--detach").arg(&self.device));
        let _ = fs::remove_file(&self.image);
    }
}

/// A control group whose processes write to one device no faster than a limit. Removed when dropped.
pub(super) struct Cap {
    group: PathBuf,
}

impl Cap {
    pub(super) fn new(disk: &MemoryDisk, bytes_per_s: u64) -> Result<Cap> {
        let number = fs::metadata(&disk.device)?.rdev();
        let number = format!("{}:{}", major(number), minor(number));
        let name = format!("farshore-bench-{}-{bytes_per_s}", std::process::id());
        // The older hierarchy has a place for each controller, the newer one has one for all.
        let older = Path::new(CGROUPS).join("blkio");
        let (root, file, words) = if older.join("blkio.throttle.write_bps_device").exists() {
            (older, "blkio.throttle.write_bps_device", format!("{number} {bytes_per_s}"))
        } else {
            let root = PathBuf::from(CGROUPS);
            fs::write(root.join("cgroup.subtree_control"), "+io")
                .context("control groups cannot limit devices here")?;
            (root, "io.max", format!("{number} wbps={bytes_per_s}"))
        };
        let cap = Cap { group: root.join(name) };
        fs::create_dir(&cap.group).context("a control group cannot be made")?;
        fs::write(cap.group.join(file), words).context("the device cannot be limited")?;
        Ok(cap)
    }
}

impl Drop for Cap {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.group);
    }
}

/// How `fio` writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) name: &'static str,
    pub(super) pattern: &'static str,
    pub(super) block_bytes: u64,
    pub(super) queue_depth: u32,
}

/// What a run of `fio` achieved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written {
    pub(super) bytes_per_s: f64,
    pub(super) bytes: f64,
    pub(super) writes: f64,
    /// What `fio` itself used of a processor.
    pub(super) processor: Duration,
}

/// One run: where, how long, and what holds it back.
pub(super) struct Run<'a> {
    pub(super) device: &'a Path,
    pub(super) seconds: u64,
    pub(super) cap: Option<&'a Cap>,
    /// The one processor that it may use.
    pub(super) processor: Option<u32>,
    pub(super) bytes_per_s_max: Option<u64>,
}

impl Run<'_> {
    pub(super) fn write(&self, shape: &Shape) -> Result<Written> {
        let mut words = vec!["fio".to_owned(), "--name=write".to_owned()];
        words.push(format!("--filename={}", self.device.display()));
        words.extend(["--direct=1", "--ioengine=libaio", "--time_based", "--randrepeat=0"].map(str::to_owned));
        words.push(format!("--rw={}", shape.pattern));
        words.push(format!("--bs={}", shape.block_bytes));
        words.push(format!("--iodepth={}", shape.queue_depth));
        words.push(format!("--runtime={}", self.seconds));
        words.extend(self.bytes_per_s_max.map(|rate| format!("--rate={rate}")));
        words.extend(["--output-format=json", "--allow_mounted_write=0"].map(str::to_owned));
        if let Some(processor) = self.processor {
            words.splice(0..0, ["taskset".to_owned(), "-c".to_owned(), processor.to_string()]);
        }
        let mut command = match self.cap {
            // It joins the group before it becomes fio.
            Some(cap) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(cap.group.join("cgroup.procs"));
                shell.args(&words);
                shell
            }
            None => {
                let mut command = Command::new(&words[0]);
                command.args(&words[1..]);
                command
            }
        };
        understand(&output_of(command.env("PATH", search_path()))?)
    }
}

fn understand(said: &str) -> Result<Written> {
    // Remarks may stand before the object.
    let Some(begin) = said.find('{') else { bail!("fio gave no figures: {said}") };
    let said: Value = serde_json::from_str(&said[begin..]).context("fio's figures cannot be read")?;
    let job = &said["jobs"][0];
    let figure = |value: &Value| value.as_f64().context("fio left a figure out");
    let written = &job["write"];
    let seconds = figure(&job["job_runtime"])? / 1000.0;
    let share = (figure(&job["usr_cpu"])? + figure(&job["sys_cpu"])?) / 100.0;
    let written = Written {
        bytes_per_s: figure(&written["bw_bytes"])?,
        bytes: figure(&written["io_bytes"])?,
        writes: figure(&written["total_ios"])?,
        processor: Duration::from_secs_f64(seconds * share),
    };
    ensure!(written.writes > 0.0, "fio wrote nothing");
    Ok(written)
}
