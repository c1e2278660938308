//! The machine's disks: found by configuration, recognised by identity, numbered once.
//!
//! The register in the state directory remembers what each disk was when it was last opened. A disk that is missing,
//! smaller, or reports another serial number is refused by name, since replicating it would replace the copy of one disk
//! with the content of another. An image file that was exchanged cannot report anything; its inode and, after an
//! orderly stop, its time of modification give it away, and the whole disk is compared then.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replication::geometry::SECTOR_BYTES;
use replication::{DiskGeometry, DiskId, DiskIdentity};
use serde::{Deserialize, Serialize};
use world::{Access, BlockDevice, FileDevice};

use crate::capture::ProtectedDisk;
use crate::config::DiskConfig;
use crate::service::problem::{Problem, ProblemKind, chain};
use crate::state::{RecordError, StateDir};
use crate::status::DiskStatus;

const REGISTER: &str = "disks";

/// Everything ever protected in this state directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRegister {
    /// By the disk's name.
    disks: BTreeMap<String, Registered>,
}

/// A disk as it was when it was last opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registered {
    /// Assigned once, never reused.
    disk: u16,
    serial: String,
    size_bytes: u64,
    /// Of an image file.
    inode: Option<u64>,
    /// Of an image file, in nanoseconds since 1970, written by an orderly stop and removed by the next start.
    modified_ns: Option<i64>,
}

/// A disk that was found and recognised.
pub struct FoundDisk {
    /// Its name in the configuration.
    pub name: String,
    /// The name of its NBD export.
    pub export: String,
    /// Its description.
    pub geometry: DiskGeometry,
    /// It may not be what the dirty maps are about: the whole disk has to be compared. In words, why.
    pub doubt: Option<String>,
    device: Arc<FileDevice>,
    seen: Seen,
}

/// What has become of a disk since it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Now {
    /// It is as it was.
    Same,
    /// It has so many bytes now.
    Grown(u64),
    /// It is not there any more, or not the same; in words.
    Lost(String),
}

impl FoundDisk {
    /// What has become of the block device at its path. Opens nothing: a device that is held open does not go.
    pub fn look(&self) -> Now {
        let path = self.path();
        let metadata = match fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_block_device() => metadata,
            Ok(_) => return Now::Lost(format!("{} is not a block device any more", path.display())),
            Err(error) => return Now::Lost(format!("{} is not there any more: {error}", path.display())),
        };
        let folder = sys_folder(metadata.rdev());
        let size = fs::read_to_string(folder.join("size")).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let Some(size) = size.map(|sectors| sectors.saturating_mul(SECTOR_BYTES)) else {
            return Now::Lost(format!("the kernel does not know {} any more", path.display()));
        };
        let place = (metadata.rdev(), None);
        if place != self.seen.place || attachment(&folder) != self.seen.attachment {
            return Now::Lost(format!("{} is another device than before", path.display()));
        }
        let before = self.geometry.size_bytes;
        match size {
            0 => Now::Lost(format!("{} holds nothing any more", path.display())),
            size if size < before => Now::Lost(format!("{} shrank from {before} to {size} bytes", path.display())),
            size if size > before => Now::Grown(size),
            _ => Now::Same,
        }
    }

    /// Whether `other` was found at the same device.
    pub fn is_same_device(&self, other: &FoundDisk) -> bool {
        self.seen.place == other.seen.place && self.seen.attachment == other.seen.attachment
    }

    /// What the agent's status says of it.
    pub fn status(&self) -> DiskStatus {
        DiskStatus {
            disk: self.geometry.disk.0,
            name: self.name.clone(),
            path: self.geometry.path.clone(),
            serial: self.geometry.identity.serial.clone(),
            size_bytes: self.geometry.size_bytes,
            export: self.export.clone(),
            problem: String::new(),
        }
    }

    /// The image file or block device.
    pub fn path(&self) -> &Path {
        self.device.path()
    }

    /// The disk for the splitter.
    pub fn protected(&self) -> ProtectedDisk {
        ProtectedDisk { geometry: self.geometry.clone(), device: self.device.clone() }
    }
}

/// What the system says about a path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    /// The device number, or that of an image file's file system and its inode: one disk under two names has one.
    place: (u64, Option<u64>),
    serial: Option<String>,
    /// Which of the devices that ever had this number.
    attachment: Option<u64>,
    inode: Option<u64>,
    modified_ns: Option<i64>,
}

/// Opens every disk and says what is wrong with each that cannot be protected. `accepted` names disks that may have
/// changed.
///
/// # Errors
/// One entry for each disk that is missing, cannot be used, or is not the one it was.
pub fn find(
    configured: &[DiskConfig],
    access: Access,
    register: &mut DiskRegister,
    accepted: &[String],
) -> Result<Vec<FoundDisk>, Vec<Problem>> {
    if let Some(unknown) = accepted.iter().find(|name| configured.iter().all(|disk| disk.name != **name)) {
        return Err(vec![Problem::usage(
            format!("there is no disk `{unknown}` to accept"),
            "the configuration does not name it",
            "use the name of its [[disk]] section",
        )]);
    }
    let mut found = Vec::new();
    let mut problems = Vec::new();
    for disk in configured {
        match open(disk, access, register, accepted.contains(&disk.name)) {
            Ok(opened) => found.push(opened),
            Err(problem) => problems.push(problem),
        }
    }
    for (index, disk) in found.iter().enumerate() {
        if let Some(twin) = found[..index].iter().find(|other| other.seen.place == disk.seen.place) {
            problems.push(Problem::usage(
                format!("disks `{}` and `{}` are the same", twin.name, disk.name),
                format!("{} and {} lead to one disk", twin.path().display(), disk.path().display()),
                "name each disk once",
            ));
            continue;
        }
        let twin = found[..index].iter().find(|other| other.geometry.identity == disk.geometry.identity);
        if let Some(twin) = twin {
            problems.push(Problem::usage(
                format!("disks `{}` and `{}` are the same", twin.name, disk.name),
                format!("both have the serial number {}", disk.geometry.identity.serial),
                "name each disk once, or give image files different serials",
            ));
        }
    }
    if problems.is_empty() { Ok(found) } else { Err(problems) }
}

/// Keeps other agents off the image files among `disks` for as long as they live: what a second one wrote would be in
/// nobody's stream.
///
/// # Errors
/// One entry for each that another program has locked.
pub fn lock(disks: &[FoundDisk]) -> Result<(), Vec<Problem>> {
    let in_use = |disk: &FoundDisk| {
        let what = format!("disk `{}` is in use", disk.name);
        let why = match disk.device.lock_image().err()? {
            TryLockError::WouldBlock => format!("another agent or program has locked {}", disk.path().display()),
            TryLockError::Error(error) => format!("{} cannot be locked: {error}", disk.path().display()),
        };
        Some(Problem::new(ProblemKind::Unsafe, what, why, "stop the other one first: its writes would not be seen"))
    };
    let problems: Vec<Problem> = disks.iter().filter_map(in_use).collect();
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Ends what [`lock`] began.
pub(crate) fn unlock(disks: &[FoundDisk]) {
    for disk in disks {
        if let Err(error) = disk.device.unlock_image() {
            tracing::warn!(%error, disk = disk.name, "the disk stays locked until this program has ended");
        }
    }
}

fn open(disk: &DiskConfig, access: Access, register: &mut DiskRegister, accepted: bool) -> Result<FoundDisk, Problem> {
    let name = &disk.name;
    let cannot = format!("disk `{name}` cannot be protected");
    let device = FileDevice::open(&disk.path, access)
        .map_err(|error| Problem::caused(&cannot, &error, "correct its path, or make it available again"))?;
    let seen = look_at(&disk.path, device.is_block_device())
        .map_err(|error| Problem::caused(&cannot, &error, "make it available again"))?;
    let size_bytes = device.size();
    if size_bytes == 0 || size_bytes % SECTOR_BYTES != 0 {
        return Err(Problem::failed(
            cannot,
            format!("{} has {size_bytes} bytes, which is not a whole number of sectors", disk.path.display()),
            "name a disk whose size is a multiple of 512 bytes",
        ));
    }
    let serial = match (&disk.serial, &seen.serial) {
        (Some(wanted), Some(reported)) if wanted != reported => {
            return Err(Problem::new(
                ProblemKind::Unsafe,
                format!("disk `{name}` is not the one configured"),
                format!("{} reports the serial number {reported} instead of {wanted}", disk.path.display()),
                "correct its path or its serial in the configuration",
            ));
        }
        (_, Some(reported)) => reported.clone(),
        (Some(wanted), None) => wanted.clone(),
        (None, None) => name.clone(),
    };
    let doubt = register.recognise(name, &serial, size_bytes, &seen, accepted)?;
    let geometry = DiskGeometry {
        disk: register.number(name),
        identity: DiskIdentity { serial, fingerprint: [0; 16] },
        path: disk.path.display().to_string(),
        size_bytes,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    };
    let export = disk.export_name().to_owned();
    Ok(FoundDisk { name: name.clone(), export, geometry, doubt, device: Arc::new(device), seen })
}

impl DiskRegister {
    /// The register of `state`; empty if there is none. The flag says that there was one that is lost.
    ///
    /// # Errors
    /// It is damaged: numbers could be given twice.
    pub fn load(state: &StateDir) -> Result<DiskRegister, Problem> {
        let found = state.read::<DiskRegister>(REGISTER).and_then(|found| match found {
            Some(found) if !found.is_sound() => Err(RecordError::Damaged),
            found => Ok(found),
        });
        let found = found.map_err(|error| {
            Problem::failed(
                "the register of this machine's disks cannot be used",
                format!("{}: {}", state.path().join(REGISTER).display(), chain(&error)),
                "restore the file from a backup, or join again into a new state directory",
            )
        })?;
        Ok(found.unwrap_or_default())
    }

    /// Whether each disk has a number of its own, and there is one for the next.
    fn is_sound(&self) -> bool {
        let numbers: BTreeSet<u16> = self.disks.values().map(|known| known.disk).collect();
        numbers.len() == self.disks.len() && !numbers.contains(&u16::MAX)
    }

    /// Whatever a record says, a sound register gives a new disk a number that no other has.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check_fuzzed(&self) {
        let mut register = self.clone();
        if register.is_sound() && !register.disks.contains_key("new") {
            let number = register.number("new").0;
            assert!(self.disks.values().all(|known| known.disk < number), "{number} is taken");
        }
    }

    /// Remembers `disks` as they are now, durable on return. `Stopped`: nobody will write to them from here on.
    ///
    /// # Errors
    /// It cannot be stored.
    pub fn store(&mut self, state: &StateDir, disks: &[FoundDisk], moment: Moment) -> Result<(), Problem> {
        for disk in disks {
            let number = self.number(&disk.name).0;
            let modified_ns = match moment {
                Moment::Started => None,
                Moment::Stopped => {
                    look_at(disk.device.path(), disk.device.is_block_device()).ok().and_then(|seen| seen.modified_ns)
                }
            };
            let registered = Registered {
                disk: number,
                serial: disk.geometry.identity.serial.clone(),
                size_bytes: disk.geometry.size_bytes,
                inode: disk.seen.inode,
                modified_ns,
            };
            self.disks.insert(disk.name.clone(), registered);
        }
        state
            .write(REGISTER, self)
            .map_err(|error| Problem::caused("the register of disks cannot be stored", &error, "make room for it"))
    }

    /// The number of the disk `name`, assigned now if it has none.
    fn number(&mut self, name: &str) -> DiskId {
        if let Some(known) = self.disks.get(name) {
            return DiskId(known.disk);
        }
        let next = self.disks.values().map(|known| known.disk + 1).max().unwrap_or(0);
        // Kept from now on, so that two new disks of one start differ.
        let placeholder =
            Registered { disk: next, serial: String::new(), size_bytes: 0, inode: None, modified_ns: None };
        self.disks.insert(name.to_owned(), placeholder);
        DiskId(next)
    }

    /// Compares a disk with what it was. The answer is a doubt that a comparison settles.
    fn recognise(
        &self,
        name: &str,
        serial: &str,
        size_bytes: u64,
        seen: &Seen,
        accepted: bool,
    ) -> Result<Option<String>, Problem> {
        let Some(known) = self.disks.get(name).filter(|known| !known.serial.is_empty()) else { return Ok(None) };
        let accept = format!("put the right disk back; if the change is meant, start once with --accept-disk {name}");
        let unsafe_ = |what: String, why: String| Problem::new(ProblemKind::Unsafe, what, why, accept.clone());
        if known.serial != serial {
            if accepted {
                return Ok(Some(format!("it was replaced by {serial}")));
            }
            return Err(unsafe_(
                format!("disk `{name}` is another disk than the one protected"),
                format!("its serial number was {} and is {serial}", known.serial),
            ));
        }
        if size_bytes < known.size_bytes {
            if accepted {
                return Ok(Some("it shrank".to_owned()));
            }
            return Err(unsafe_(
                format!("disk `{name}` shrank"),
                format!("it had {} bytes and has {size_bytes}", known.size_bytes),
            ));
        }
        if known.inode != seen.inode {
            return Ok(Some("the image file is not the same file any more".to_owned()));
        }
        if known.modified_ns.is_some() && known.modified_ns != seen.modified_ns {
            return Ok(Some("the image file was modified while the agent was stopped".to_owned()));
        }
        Ok(None)
    }
}

/// When a register is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The disks are being served from now on.
    Started,
    /// The agent has ended in order.
    Stopped,
}

fn look_at(path: &Path, is_block_device: bool) -> std::io::Result<Seen> {
    let metadata = fs::metadata(path)?;
    if is_block_device {
        let folder = sys_folder(metadata.rdev());
        let place = (metadata.rdev(), None);
        let (serial, attachment) = (reported_serial(&folder), attachment(&folder));
        return Ok(Seen { place, serial, attachment, inode: None, modified_ns: None });
    }
    let modified_ns = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    let place = (metadata.dev(), Some(metadata.ino()));
    let inode = Some(metadata.ino());
    Ok(Seen { place, serial: None, attachment: None, inode, modified_ns: Some(modified_ns) })
}

/// Where the kernel describes a block device.
fn sys_folder(number: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    Path::new("/sys/dev/block").join(format!("{major}:{minor}"))
}

/// The number that the kernel gives to each disk that appears (Linux 5.15): a device number may come to be another's.
fn attachment(folder: &Path) -> Option<u64> {
    let folder = fs::canonicalize(folder).ok()?;
    let disk = if folder.join("partition").exists() { folder.parent()? } else { &folder };
    fs::read_to_string(disk.join("diskseq")).ok()?.trim().parse().ok()
}

/// What a block device says it is, from its folder below `/sys`. A partition is named by its disk and its number.
fn reported_serial(folder: &Path) -> Option<String> {
    let read = |folder: &Path, name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    if let Some(number) = read(folder, "partition") {
        let disk = fs::canonicalize(folder).ok()?;
        return Some(format!("{}:part{number}", reported_serial(disk.parent()?)?));
    }
    ["serial", "device/serial", "wwid", "device/wwid", "dm/uuid"].into_iter().find_map(|name| read(folder, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(name: &str, path: &Path) -> DiskConfig {
        DiskConfig::new(name, path)
    }

    fn image(path: &Path, len: u64) {
        fs::File::create(path).expect("created").set_len(len).expect("sized");
    }

    #[test]
    fn a_disk_is_recognised_refused_or_doubted() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let state = StateDir::open(&folder.path().join("state")).expect("opens");
        let (a, b) = (folder.path().join("a.img"), folder.path().join("b.img"));
        image(&a, 8192);
        image(&b, 4096);
        let disks = [configured("a", &a), configured("b", &b)];
        let start = |disks: &[DiskConfig], accepted: &[String]| {
            let mut register = DiskRegister::load(&state).expect("readable");
            let found = find(disks, Access::ReadWrite, &mut register, accepted)?;
            register.store(&state, &found, Moment::Started).expect("stored");
            Ok::<_, Vec<Problem>>((register, found))
        };
        let (_, found) = start(&disks, &[]).expect("new disks");
        assert_eq!(found.iter().map(|disk| disk.geometry.disk.0).collect::<Vec<_>>(), [0, 1]);

        // Order does not matter, numbers stay; a new disk gets a new one even after one was removed.
        let c = [
            configured("b", &b),
            configured("c", &{
                let path = folder.path().join("c.img");
                image(&path, 512);
                path
            }),
        ];
        let (mut register, found) = start(&c, &[]).expect("known and new");
        assert_eq!(found.iter().map(|disk| disk.geometry.disk.0).collect::<Vec<_>>(), [1, 2]);
        assert!(found.iter().all(|disk| disk.doubt.is_none()));

        // After an orderly stop a modification is noticed, also one that keeps the size.
        register.store(&state, &found, Moment::Stopped).expect("stored");
        assert!(start(&c, &[]).expect("unchanged").1.iter().all(|disk| disk.doubt.is_none()));
        register.store(&state, &found, Moment::Stopped).expect("stored");
        fs::write(&b, vec![1; 4096]).expect("written");
        assert!(start(&c, &[]).expect("doubted").1[0].doubt.as_deref().is_some_and(|why| why.contains("modified")));

        // A copy under the old name is another file.
        fs::copy(&a, folder.path().join("copy")).expect("copied");
        #[allow(clippy::disallowed_methods, reason = "the test exchanges a disk as a user would")]
        fs::rename(folder.path().join("copy"), &a).expect("renamed");
        assert!(
            start(&disks, &[]).expect("doubted").1[0].doubt.as_deref().is_some_and(|why| why.contains("same file"))
        );

        image(&a, 4096);
        let problems = start(&disks, &[]).err().expect("refused");
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].kind, ProblemKind::Unsafe);
        assert!(problems[0].why.contains("8192 bytes and has 4096"), "{:?}", problems[0]);
        assert!(start(&disks, &["a".to_owned()]).expect("accepted").1[0].doubt.is_some());
        assert!(start(&disks, &[]).expect("remembered").1[0].doubt.is_none());

        let mut renamed = disks.clone();
        renamed[0].serial = Some("other".to_owned());
        assert!(start(&renamed, &[]).err().expect("refused")[0].why.contains("was a and is other"));
        fs::remove_file(&b).expect("removed");
        let problems = start(&disks, &[]).err().expect("refused");
        assert!(problems[0].why.contains("there is no disk at"), "{:?}", problems[0]);
        assert!(start(&disks, &["x".to_owned()]).err().expect("refused")[0].what.contains("no disk `x`"));
    }

    #[test]
    fn twins_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (a, b) = (folder.path().join("a.img"), folder.path().join("b.img"));
        image(&a, 512);
        image(&b, 1000);
        let mut disks = [configured("a", &a), configured("b", &b)];
        let find = |disks: &[DiskConfig]| {
            super::find(disks, Access::ReadOnly, &mut DiskRegister::default(), &[]).err().expect("refused")
        };
        assert!(find(&disks)[0].why.contains("1000 bytes"));
        image(&b, 1024);
        disks[1].serial = Some("a".to_owned());
        assert!(find(&disks)[0].what.contains("are the same"));
        // One file under two names, the second by a detour or another link.
        disks[1] =
            configured("b", &folder.path().join("../").join(folder.path().file_name().expect("a name")).join("a.img"));
        assert!(find(&disks)[0].why.contains("lead to one disk"));
        fs::remove_file(&b).expect("removed");
        fs::hard_link(&a, &b).expect("linked");
        disks[1] = configured("b", &b);
        assert!(find(&disks)[0].why.contains("lead to one disk"));
    }

    #[test]
    fn an_image_has_one_agent_at_a_time() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.img");
        image(&path, 512);
        let disks = [configured("a", &path)];
        let open = || find(&disks, Access::ReadWrite, &mut DiskRegister::default(), &[]).expect("found");
        let (first, second) = (open(), open());
        lock(&first).expect("nobody else has it");
        let problems = lock(&second).expect_err("it is in use");
        assert_eq!(problems[0].kind, ProblemKind::Unsafe);
        assert!(problems[0].why.contains("has locked"), "{:?}", problems[0]);
        drop(first);
        lock(&second).expect("it is free again");
    }

    #[test]
    fn what_the_kernel_says_of_a_device_is_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let disk = folder.path().join("vda");
        fs::create_dir_all(disk.join("vda1")).expect("created");
        assert_eq!(reported_serial(&disk), None);
        fs::write(disk.join("serial"), "WD-1\n").expect("written");
        fs::write(disk.join("vda1/partition"), "1\n").expect("written");
        assert_eq!(reported_serial(&disk).as_deref(), Some("WD-1"));
        assert_eq!(reported_serial(&disk.join("vda1")).as_deref(), Some("WD-1:part1"));
    }
}
