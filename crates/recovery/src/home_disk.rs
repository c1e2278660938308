//! A disk at home that a failback writes over: found, recognised, and refused where that would destroy something else.

use std::fmt;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replication::DiskId;
use replication::geometry::ByteRange;
use rustix::fs::{Advice, FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use world::{Access, BlockDevice, FileDevice};

/// What a home disk must be, and what the operator explicitly allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HomeOrder {
    /// The disk of the branch.
    pub disk: u16,
    /// Where it is to be written: a block device or an image file on the master target.
    pub path: PathBuf,
    /// Bytes that are written.
    pub size_bytes: u64,
    /// The serial number that the disk at `path` must have; `None` if the operator named the path itself.
    pub serial: Option<String>,
    /// Write to it although it is not the disk with that serial number.
    #[serde(default)]
    pub any_disk: bool,
    /// Write to it although it is mounted or in use. What is mounted will be destroyed under its users.
    #[serde(default)]
    pub in_use: bool,
}

impl HomeOrder {
    /// The disk of the branch.
    pub fn disk_id(&self) -> DiskId {
        DiskId(self.disk)
    }
}

/// A refusal in three parts: what happened, why that matters, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Refusal {
    /// What happened.
    pub what: String,
    /// Why it is a reason not to go on.
    pub why: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}\n{}", self.what, self.why, self.advice)
    }
}

impl Refusal {
    pub(crate) fn new(what: impl Into<String>, why: impl Into<String>, advice: impl Into<String>) -> Refusal {
        Refusal { what: what.into(), why: why.into(), advice: advice.into() }
    }
}

/// What the master target's kernel says about its disks. Injected so that tests can say something else.
#[derive(Debug, Clone)]
pub struct HostView {
    /// `/proc/self/mountinfo`.
    pub mountinfo: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for HostView {
    fn default() -> HostView {
        HostView { mountinfo: "/proc/self/mountinfo".into(), sys: "/sys".into() }
    }
}

/// A device number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceNumber {
    major: u32,
    minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl HostView {
    /// A device number as `/sys` writes it.
    pub(crate) fn number(device: u64) -> String {
        format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device))
    }

    /// The block device `device` and its partitions, as `major:minor`.
    pub(crate) fn numbers_of(&self, device: u64) -> Vec<String> {
        self.with_partitions(DeviceNumber { major: rustix::fs::major(device), minor: rustix::fs::minor(device) })
    }

    /// The devices that the device `number` is built on directly.
    pub(crate) fn built_on(&self, number: &str) -> Vec<String> {
        let below = std::fs::read_dir(self.sys.join("dev/block").join(number).join("slaves"));
        let number = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("dev")).ok();
        below.into_iter().flatten().flatten().filter_map(number).map(|text| text.trim().to_owned()).collect()
    }

    /// Where the devices `numbers` are mounted, first one found.
    fn mount_point(&self, numbers: &[String]) -> std::io::Result<Option<String>> {
        let text = std::fs::read_to_string(&self.mountinfo)?;
        // `36 35 98:0 /root /mount/point options … - type source options`, with octal escapes in names.
        Ok(text.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let number = fields.nth(2)?;
            let mount_point = fields.nth(1)?;
            numbers.iter().any(|known| known == number).then(|| unescape(mount_point))
        }))
    }

    /// The device itself and its partitions, as `major:minor`.
    fn with_partitions(&self, device: DeviceNumber) -> Vec<String> {
        let mut numbers = vec![device.to_string()];
        let directory = self.sys.join("dev/block").join(device.to_string());
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.join("partition").exists()
                && let Ok(number) = std::fs::read_to_string(path.join("dev"))
            {
                numbers.push(number.trim().to_owned());
            }
        }
        numbers
    }

    /// A device built on one of `numbers`: a volume, a RAID, an encrypted mapping.
    fn holder(&self, numbers: &[String]) -> Option<String> {
        numbers.iter().find_map(|number| {
            let holders = self.sys.join("dev/block").join(number).join("holders");
            let entry = std::fs::read_dir(holders).ok()?.flatten().next()?;
            entry.file_name().into_string().ok()
        })
    }

    fn serial(&self, device: DeviceNumber) -> Option<String> {
        let directory = self.sys.join("dev/block").join(device.to_string());
        ["serial", "device/serial", "wwid", "device/wwid"].into_iter().find_map(|name| {
            let text = std::fs::read_to_string(directory.join(name)).ok()?;
            let text = text.trim();
            (!text.is_empty()).then(|| text.to_owned())
        })
    }

    /// The loop device that shows the image file `path`, if one does.
    fn loop_device(&self, path: &Path) -> Option<String> {
        let path = path.canonicalize().ok()?;
        std::fs::read_dir(self.sys.join("block")).ok()?.flatten().find_map(|entry| {
            let backing = std::fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            (Path::new(backing.trim_end()) == path).then(|| entry.file_name().to_string_lossy().into_owned())
        })
    }
}

fn unescape(name: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(name.to_owned(), |name, (escape, character)| name.replace(escape, character))
}

/// Finds and claims the disks that an order names. Injected, so that the simulation has disks of its own.
pub trait HomeDisks: Send + Sync {
    /// Checks and claims a disk. Nothing is written.
    ///
    /// # Errors
    /// [`Refusal`] says what is in the way.
    fn claim(&self, order: &HomeOrder) -> Result<HomeDisk, Refusal>;
}

impl HomeDisks for HostView {
    fn claim(&self, order: &HomeOrder) -> Result<HomeDisk, Refusal> {
        HomeDisk::open(order, self)
    }
}

/// A disk at home, claimed and open for writing.
pub struct HomeDisk {
    order: HomeOrder,
    device: Box<dyn BlockDevice>,
    /// Reads that see the medium; the same device where there is nothing to choose.
    direct: Option<Box<dyn BlockDevice>>,
    /// Holds the claim: exclusive open of a block device, lock of an image file.
    claim: Option<File>,
}

impl HomeDisk {
    /// A home disk that is nobody else's, as whoever calls this made sure.
    ///
    /// # Errors
    /// [`Refusal`] if it is too small.
    pub fn on(order: &HomeOrder, device: Box<dyn BlockDevice>) -> Result<HomeDisk, Refusal> {
        check_size(order, &*device)?;
        Ok(HomeDisk { order: order.clone(), device, direct: None, claim: None })
    }

    /// Checks and claims the disk. Nothing is written.
    ///
    /// # Errors
    /// [`Refusal`] says what is in the way and which flag overrides it, if one does.
    pub fn open(order: &HomeOrder, host: &HostView) -> Result<HomeDisk, Refusal> {
        let path = &order.path;
        let shown = path.display();
        let advice_other = "unmount or stop what uses it, or name another disk with --to";
        let metadata = std::fs::metadata(path).map_err(|error| {
            Refusal::new(
                format!("{shown} cannot be opened: {error}"),
                "there is no disk to write to",
                "name another disk with --to",
            )
        })?;
        let kind = metadata.file_type();
        let device = kind.is_block_device().then(|| DeviceNumber {
            major: rustix::fs::major(metadata.rdev()),
            minor: rustix::fs::minor(metadata.rdev()),
        });
        if device.is_none() && !kind.is_file() {
            return Err(Refusal::new(
                format!("{shown} is neither a block device nor an image file"),
                "a failback writes a whole disk",
                "name a disk or an image file with --to",
            ));
        }
        if !order.in_use {
            check_unused(order, device, host)?;
        }
        check_identity(order, device, host)?;
        let claim = claim(path, device.is_some() && !order.in_use).map_err(|error| {
            Refusal::new(format!("{shown} is in use: {error}"), "a failback writes over the whole disk", advice_other)
        })?;
        let refused = |error: world::OpenDeviceError| {
            Refusal::new(error.to_string(), "the disk cannot be written", "check the path and its permissions")
        };
        let disk = FileDevice::open(path, Access::ReadWrite).map_err(refused)?;
        check_size(order, &disk)?;
        let direct = if disk.is_block_device() { FileDevice::open_direct(path).ok() } else { None };
        Ok(HomeDisk {
            order: order.clone(),
            device: Box::new(disk),
            direct: direct.map(|direct| Box::new(direct) as Box<dyn BlockDevice>),
            claim: Some(claim),
        })
    }

    /// What was ordered.
    pub fn order(&self) -> &HomeOrder {
        &self.order
    }

    /// The disk for writing.
    pub fn device(&self) -> &dyn BlockDevice {
        &*self.device
    }

    /// The disk for reads that prove something.
    pub fn medium(&self) -> &dyn BlockDevice {
        &**self.direct.as_ref().unwrap_or(&self.device)
    }

    /// Has the system forget what it holds in memory of `range` of an image file, so that the next read comes from below.
    /// A request that the system may ignore; what is not durable stays.
    pub(crate) fn uncache(&self, range: ByteRange) {
        if let (None, Some(file)) = (&self.direct, &self.claim) {
            let _ = rustix::fs::fadvise(file, range.start, NonZeroU64::new(range.len), Advice::DontNeed);
        }
    }
}

fn check_size(order: &HomeOrder, disk: &dyn BlockDevice) -> Result<(), Refusal> {
    if disk.size() >= order.size_bytes {
        return Ok(());
    }
    let (shown, disk_id) = (order.path.display(), order.disk_id());
    Err(Refusal::new(
        format!("{shown} has {} bytes, {disk_id} of the branch has {}", disk.size(), order.size_bytes),
        "what lies beyond its end would be lost",
        "name a disk of at least that size with --to",
    ))
}

fn check_unused(order: &HomeOrder, device: Option<DeviceNumber>, host: &HostView) -> Result<(), Refusal> {
    let shown = order.path.display();
    let why = "a failback writes over the whole disk";
    let Some(device) = device else {
        return match host.loop_device(&order.path) {
            Some(device) => Err(Refusal::new(
                format!("{shown} is in use as /dev/{device}"),
                why,
                format!("detach it (losetup -d /dev/{device}), or name another disk with --to"),
            )),
            None => Ok(()),
        };
    };
    let numbers = host.with_partitions(device);
    let mounted = host.mount_point(&numbers).map_err(|error| {
        Refusal::new(
            format!("it cannot be told whether {shown} is mounted: {error}"),
            why,
            "make sure that it is not, then say --in-use",
        )
    })?;
    if let Some(mount_point) = mounted {
        return Err(Refusal::new(
            format!("disk {shown} is mounted at {mount_point}"),
            why,
            "unmount it, or name another disk with --to",
        ));
    }
    match host.holder(&numbers) {
        Some(holder) => Err(Refusal::new(
            format!("disk {shown} is part of {holder}"),
            why,
            "take it out of there, or name another disk with --to",
        )),
        None => Ok(()),
    }
}

fn check_identity(order: &HomeOrder, device: Option<DeviceNumber>, host: &HostView) -> Result<(), Refusal> {
    let Some(expected) = &order.serial else { return Ok(()) };
    let found = match device {
        Some(device) => host.serial(device),
        // An image file's serial is what it was called when it was protected.
        None => Some(order.path.file_name().unwrap_or_default().to_string_lossy().into_owned())
            .filter(|name| expected.ends_with(name.as_str())),
    };
    if order.any_disk || found.as_ref() == Some(expected) || device.is_none() && found.is_some() {
        return Ok(());
    }
    let found =
        found.map_or_else(|| "no serial number that could be read".into(), |serial| format!("serial number {serial}"));
    Err(Refusal::new(
        format!("{} has {found}, but {} came from {expected}", order.path.display(), order.disk_id()),
        "it is probably another disk, and all of it would be written over",
        "name the right disk with --to, or say --any-disk if it was replaced on purpose",
    ))
}

/// Keeps others away: whoever mounts a block device or claims it for a volume asks for exclusive use too.
fn claim(path: &Path, exclusive: bool) -> std::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | if exclusive { OFlags::EXCL } else { OFlags::empty() };
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(std::io::Error::other("another program holds its lock")),
        Err(error) => Err(error.into()),
    }
}

/// The disks of one machine at home, all claimed or none.
pub(crate) fn claim_all(orders: &[HomeOrder], disks: &dyn HomeDisks) -> Result<Vec<Arc<HomeDisk>>, Refusal> {
    orders.iter().map(|order| disks.claim(order).map(Arc::new)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(path: &Path, size: u64) -> HomeOrder {
        HomeOrder { disk: 0, path: path.to_owned(), size_bytes: size, serial: None, any_disk: false, in_use: false }
    }

    /// A `/sys` and a mount table of our own.
    fn view(folder: &Path, mountinfo: &str) -> HostView {
        std::fs::write(folder.join("mountinfo"), mountinfo).expect("writes");
        HostView { mountinfo: folder.join("mountinfo"), sys: folder.join("sys") }
    }

    const SDA: DeviceNumber = DeviceNumber { major: 8, minor: 0 };

    #[test]
    fn a_mounted_partition_is_found_under_its_disk() {
        let folder = tempfile::tempdir().expect("a folder");
        let partition = folder.path().join("sys/dev/block/8:0/sda2");
        std::fs::create_dir_all(&partition).expect("creates");
        std::fs::write(partition.join("partition"), "2\n").expect("writes");
        std::fs::write(partition.join("dev"), "8:2\n").expect("writes");
        let other = "25 1 8:16 / /other rw - ext4 /dev/sdb rw\n";
        let mounted = "26 1 8:2 / /srv/my\\040data rw,relatime shared:1 - ext4 /dev/sda2 rw\n";
        let disk = order(Path::new("/dev/sda"), 1);
        let host = view(folder.path(), other);
        check_unused(&disk, Some(SDA), &host).expect("only another disk is mounted");
        let host = view(folder.path(), &format!("{other}{mounted}"));
        let refusal = check_unused(&disk, Some(SDA), &host).expect_err("a partition is mounted");
        assert_eq!(refusal.what, "disk /dev/sda is mounted at /srv/my data");
        let host = view(folder.path(), other);
        std::fs::create_dir_all(folder.path().join("sys/dev/block/8:2/holders/dm-0")).expect("creates");
        let refusal = check_unused(&disk, Some(SDA), &host).expect_err("a volume uses it");
        assert!(refusal.what.contains("dm-0"), "{refusal}");
    }

    #[test]
    fn another_disk_is_refused_unless_that_is_meant() {
        let folder = tempfile::tempdir().expect("a folder");
        let device = folder.path().join("sys/dev/block/8:0/device");
        std::fs::create_dir_all(&device).expect("creates");
        std::fs::write(device.join("serial"), "WD-1234\n").expect("writes");
        let host = view(folder.path(), "");
        let mut disk = HomeOrder { serial: Some("WD-1234".into()), ..order(Path::new("/dev/sda"), 1) };
        check_identity(&disk, Some(SDA), &host).expect("the right one");
        disk.serial = Some("WD-9999".into());
        let refusal = check_identity(&disk, Some(SDA), &host).expect_err("another one");
        assert!(refusal.what.contains("WD-1234") && refusal.advice.contains("--any-disk"), "{refusal}");
        disk.any_disk = true;
        check_identity(&disk, Some(SDA), &host).expect("on purpose");
    }

    #[test]
    fn image_files_are_checked_and_locked() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("home.img");
        std::fs::write(&path, vec![0; 8192]).expect("writes");
        let host = view(folder.path(), "");
        let refusal = HomeDisk::open(&order(&path, 8193), &host).err().expect("too small");
        assert!(refusal.what.contains("8192 bytes"), "{refusal}");
        let disk = HomeDisk::open(&order(&path, 8192), &host).expect("fits");
        let refusal = HomeDisk::open(&order(&path, 8192), &host).err().expect("claimed already");
        assert!(refusal.what.contains("in use"), "{refusal}");
        drop(disk);
        let named = HomeOrder { serial: Some("home.img".into()), ..order(&path, 8192) };
        drop(HomeDisk::open(&named, &host).expect("the one named"));
        let named = HomeOrder { serial: Some("other.img".into()), ..order(&path, 8192) };
        assert!(HomeDisk::open(&named, &host).is_err());
        assert!(HomeDisk::open(&order(folder.path(), 1), &host).is_err(), "a folder is no disk");
        assert!(HomeDisk::open(&order(&folder.path().join("missing"), 1), &host).is_err());
        let image = path.canonicalize().expect("exists");
        std::fs::create_dir_all(folder.path().join("sys/block/loop3/loop")).expect("creates");
        std::fs::write(folder.path().join("sys/block/loop3/loop/backing_file"), format!("{}\n", image.display()))
            .expect("writes");
        let refusal = HomeDisk::open(&order(&path, 1), &host).err().expect("a loop device shows it");
        assert!(refusal.what.contains("loop3"), "{refusal}");
    }
}
