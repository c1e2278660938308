//! What this machine and its disks offer to capture by eBPF, in words for people.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::kernel;
use super::loader::kernel_release;

/// The oldest kernel whose ring buffer and BTF suffice.
const OLDEST: (u32, u32) = (5, 8);
/// From here on the larger records are possible.
const DYNPTR: (u32, u32) = (5, 19);
/// `CAP_SYS_ADMIN`.
const SYS_ADMIN: u32 = 21;

/// Something that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: &'static str,
    /// What was found.
    pub detail: String,
    /// What to do, if capture is not possible so.
    pub advice: Option<String>,
}

impl Finding {
    fn good(subject: &'static str, detail: impl Into<String>) -> Finding {
        Finding { subject, detail: detail.into(), advice: None }
    }

    fn bad(subject: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { subject, detail: detail.into(), advice: Some(advice.into()) }
    }
}

/// Looks at everything that the machine has to offer, without changing anything.
pub fn findings() -> Vec<Finding> {
    vec![kernel_found(), types_found(), privileges_found(), lockdown_found(), grace_found(), pins_found()]
}

/// Whether the machine can capture by eBPF.
///
/// # Errors
/// What stands in the way, in words, with what to do.
pub fn check_machine() -> Result<(), String> {
    let lacks: Vec<String> = findings()
        .into_iter()
        .filter_map(|finding| finding.advice.map(|advice| format!("{} ({advice})", finding.detail)))
        .collect();
    if lacks.is_empty() { Ok(()) } else { Err(lacks.join("; ")) }
}

/// Whether this kernel is new enough for one record a bio.
pub(super) fn has_large_records() -> bool {
    kernel_release().is_some_and(|release| release >= DYNPTR)
}

fn kernel_found() -> Finding {
    let named = rustix::system::uname().release().to_string_lossy().into_owned();
    match kernel_release() {
        Some(_) if has_large_records() => Finding::good("kernel", format!("Linux {named}")),
        Some(release) if release >= OLDEST => {
            Finding::good("kernel", format!("Linux {named}: small records, large writes cost more"))
        }
        _ => Finding::bad("kernel", format!("Linux {named} is older than 5.8"), "use the splitter, or a newer kernel"),
    }
}

fn types_found() -> Finding {
    let path = "/sys/kernel/btf/vmlinux";
    match fs::metadata(path) {
        Ok(_) => Finding::good("kernel types", "BTF is there"),
        Err(error) => Finding::bad(
            "kernel types",
            format!("the kernel does not describe its types: {path}: {error}"),
            "use a kernel built with CONFIG_DEBUG_INFO_BTF, or the splitter",
        ),
    }
}

fn privileges_found() -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    if effective >> SYS_ADMIN & 1 == 1 {
        Finding::good("privileges", "may load programs into the kernel")
    } else {
        Finding::bad("privileges", "this process lacks CAP_SYS_ADMIN", "run the agent as root, or use the splitter")
    }
}

fn lockdown_found() -> Finding {
    // Absent where the kernel has no lockdown, or securityfs is not mounted.
    let text = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if text.contains("[confidentiality]") {
        Finding::bad(
            "lockdown",
            "the kernel is locked down for confidentiality: programs may not read what is written",
            "start it with lockdown=integrity, or use the splitter",
        )
    } else {
        Finding::good("lockdown", "none that forbids capture")
    }
}

fn grace_found() -> Finding {
    if kernel::has_grace_periods() {
        Finding::good("grace periods", "the kernel tells when its programs have ended")
    } else {
        Finding::bad(
            "grace periods",
            "the kernel does not offer membarrier's global command",
            "start it without nohz_full, or use the splitter",
        )
    }
}

const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";

fn pins_found() -> Finding {
    match fs::metadata(BPF_FILE_SYSTEM) {
        Ok(_) => Finding::good("BPF file system", BPF_FILE_SYSTEM),
        Err(error) => Finding::bad(
            "BPF file system",
            format!("{BPF_FILE_SYSTEM}: {error}"),
            "mount sysfs, and use a kernel with CONFIG_BPF_SYSCALL",
        ),
    }
}

/// Makes sure that the parent of `pins` is in a BPF file system: mounts the usual one if it is not there yet.
///
/// # Errors
/// It cannot be mounted, or `pins` lies elsewhere.
pub(super) fn provide_pin_directory(pins: &Path) -> io::Result<()> {
    let parent = pins.parent().unwrap_or(Path::new("/"));
    if !is_bpf_file_system(parent)? && pins.starts_with(BPF_FILE_SYSTEM) {
        let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
        rustix::mount::mount("bpf", BPF_FILE_SYSTEM, "bpf", flags, Some(c"mode=0700"))?;
        tracing::info!(at = BPF_FILE_SYSTEM, "BPF file system mounted");
    }
    if is_bpf_file_system(parent)? {
        return Ok(());
    }
    let why = format!("{} is not in a BPF file system", parent.display());
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

pub(super) fn is_bpf_file_system(path: &Path) -> io::Result<bool> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    #[allow(clippy::unnecessary_cast, reason = "the field's type differs between targets")]
    Ok(rustix::fs::statfs(path)?.f_type as i64 == BPF_FS_MAGIC)
}

/// Where a protected device lies, as the kernel programs see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The whole disk's number: major << 32 | first minor.
    pub(super) device: u64,
    /// The device's first sector on it.
    pub(super) start_sector: u64,
}

/// Finds the whole disk behind a disk or partition.
///
/// # Errors
/// In words, why it cannot be captured.
pub(super) fn place_of(path: &Path) -> Result<Place, String> {
    let folder = sys_folder(path)?;
    let read = |folder: &Path, name: &str| fs::read_to_string(folder.join(name)).map(|text| text.trim().to_owned());
    let text = |error: io::Error| format!("the kernel does not describe it: {error}");
    let is_partition = folder.join("partition").exists();
    let disk = if is_partition { folder.parent().unwrap_or(&folder) } else { &folder };
    if let Some(array) = remapping_holder(disk) {
        return Err(format!("{array} passes writes on in a way that is not seen here: protect {array} itself"));
    }
    let device = read(disk, "dev").map_err(text)?;
    let number = |text: &str| text.parse::<u64>().ok();
    let device = device.split_once(':').and_then(|(major, minor)| Some(number(major)? << 32 | number(minor)?));
    let start = if is_partition { number(&read(&folder, "start").map_err(text)?) } else { Some(0) };
    match (device, start) {
        (Some(device), Some(start_sector)) => Ok(Place { device, start_sector }),
        _ => Err("the kernel describes it in a way that is not understood".to_owned()),
    }
}

/// Whether `disk`, a folder of sysfs, is what the NVMe driver makes of several ways to one namespace, or of one way to a
/// namespace that might have several.
fn is_multipath(disk: &Path) -> bool {
    disk.components().any(|part| part.as_os_str() == "nvme-subsystem")
}

fn sys_folder(path: &Path) -> Result<PathBuf, String> {
    let metadata = fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.file_type().is_block_device() {
        return Err("it is not a block device".to_owned());
    }
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).map_err(|error| error.to_string())
}

/// Whether the whole disk with this number (see [`Place`]) hands the bios of its users on to other disks, as they are.
pub(super) fn hands_bios_on(device: u64) -> bool {
    let folder = fs::canonicalize(format!("/sys/dev/block/{}:{}", device >> 32, device & 0xffff_ffff));
    folder.is_ok_and(|disk| is_multipath(&disk) || is_remapping_array(&disk))
}

fn is_remapping_array(disk: &Path) -> bool {
    fs::read_to_string(disk.join("md/level")).is_ok_and(|level| matches!(level.trim(), "raid0" | "linear"))
}

/// An md array over this disk that sends the bios of its users to it as they are: their submission is not seen again.
fn remapping_holder(disk: &Path) -> Option<String> {
    let holders = fs::read_dir(disk.join("holders")).ok()?;
    let array = holders.flatten().find(|holder| is_remapping_array(&holder.path()))?;
    Some(array.file_name().to_string_lossy().into_owned())
}

/// One layer for each disk: none may lie on another one of them, or its writes would be captured twice.
///
/// # Errors
/// The device, and why.
pub(super) fn check_layers(disks: &[&Path]) -> Result<(), (PathBuf, String)> {
    let folder = |path: &Path| sys_folder(path).map_err(|why| (path.to_owned(), why));
    let whole = |folder: &Path| match folder.join("partition").exists() {
        true => folder.parent().unwrap_or(folder).to_owned(),
        false => folder.to_owned(),
    };
    let folders = disks.iter().map(|disk| folder(disk).map(|it| whole(&it))).collect::<Result<Vec<_>, _>>()?;
    for (disk, own) in disks.iter().zip(&folders) {
        let mut below = BTreeSet::new();
        collect_below(own, &mut below);
        if let Some(twin) = disks.iter().zip(&folders).find(|(_, folder)| below.contains(*folder)) {
            let why = format!("it lies on {}, which is protected too: protect one of them", twin.0.display());
            return Err((disk.to_path_buf(), why));
        }
    }
    Ok(())
}

/// The whole disks below `folder`, however deep.
fn collect_below(folder: &Path, below: &mut BTreeSet<PathBuf>) {
    let Ok(slaves) = fs::read_dir(folder.join("slaves")) else { return };
    for slave in slaves.flatten() {
        let Ok(slave) = fs::canonicalize(slave.path()) else { continue };
        let whole = match slave.join("partition").exists() {
            true => slave.parent().unwrap_or(&slave).to_owned(),
            false => slave,
        };
        if below.insert(whole.clone()) {
            collect_below(&whole, below);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_behind_several_paths_are_known_by_their_place() {
        let several = "/sys/devices/virtual/nvme-subsystem/nvme-subsys1/nvme1n1";
        assert!(is_multipath(Path::new(several)));
        assert!(!is_multipath(Path::new("/sys/devices/pci0000:00/0000:00:04.0/nvme/nvme1/nvme1n1")));
    }
}
