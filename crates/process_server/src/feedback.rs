//! The feedback loop: a machine whose protected disk holds the journal or the vault of its own replication. Each write
//! would cause another, without end.
//!
//! It can arise only where agent and server run on one machine, which the boot id tells. Then the server compares what
//! its folders lie on, down through partitions, mapped and loop devices, with the disks that the agent names.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use replication::wire::Hello;

/// A block device as the system numbers it, `major:minor`.
type Device = String;

/// Where this server keeps what must not be written by its own replication.
#[derive(Debug)]
pub struct Feedback {
    boot: Option<[u8; 16]>,
    sys: PathBuf,
    folders: Vec<(&'static str, PathBuf)>,
}

impl Feedback {
    /// Watches over the folders of a server on this machine.
    pub fn new(state_dir: &Path, vault: &Path) -> Feedback {
        let folders = vec![("journal", state_dir.to_owned()), ("vault", vault.to_owned())];
        Feedback { boot: boot_id(), sys: PathBuf::from("/sys"), folders }
    }

    /// Why the machine cannot be protected here, if one of its disks holds the journal or the vault.
    pub fn objection(&self, hello: &Hello) -> Option<String> {
        if self.boot != Some(hello.boot) {
            return None;
        }
        hello.disks.iter().find_map(|disk| {
            let path = Path::new(&disk.path);
            let (what, folder) = self.folders.iter().find(|(_, folder)| self.holds(path, folder))?;
            Some(format!(
                "the protected disk {} holds this server's {what} {}: replicating it would write to it without end; \
                 leave the disk out, or keep the {what} on another disk",
                disk.path,
                folder.display()
            ))
        })
    }

    /// Whether the folder lies on the disk or image file at `path`.
    fn holds(&self, path: &Path, folder: &Path) -> bool {
        let (Ok(disk), Ok(folder)) = (fs::metadata(path), fs::metadata(folder)) else { return false };
        let below = below(&self.sys, number(folder.dev()));
        if disk.file_type().is_block_device() {
            return below.contains(&number(disk.rdev()));
        }
        let image = path.canonicalize().ok();
        below.iter().any(|device| image.is_some() && backing_file(&self.sys, device) == image)
    }
}

fn boot_id() -> Option<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let digits: String = text.trim().chars().filter(|digit| *digit != '-').collect();
    digits.parse::<replication::MachineId>().ok().map(|id| id.0)
}

/// The parts of a device number as Linux encodes them for programs (`makedev(3)`).
fn number(device: u64) -> Device {
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & !0xff);
    format!("{major}:{minor}")
}

fn backing_file(sys: &Path, device: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(sys.join("dev/block").join(device).join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// The device and everything that it lies on.
fn below(sys: &Path, device: Device) -> BTreeSet<Device> {
    let mut found = BTreeSet::new();
    let mut next = vec![device];
    let number_in = |folder: &Path| fs::read_to_string(folder.join("dev")).ok().map(|text| text.trim().to_owned());
    while let Some(device) = next.pop() {
        let folder = sys.join("dev/block").join(&device);
        if let Ok(folder) = folder.canonicalize() {
            if folder.join("partition").exists() {
                next.extend(folder.parent().and_then(number_in));
            }
            let slaves = fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
            next.extend(slaves.filter_map(|slave| number_in(&slave.path())));
        }
        let carrier = backing_file(sys, &device).and_then(|file| fs::metadata(file).ok());
        next.extend(carrier.map(|file| number(file.dev())));
        found.insert(device);
        next.retain(|device| !found.contains(device));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_folder_is_followed_down_to_the_disk_that_holds_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let sys = folder.path();
        let device = |path: &str, number: &str| {
            let real = sys.join("devices").join(path);
            fs::create_dir_all(&real).expect("created");
            fs::write(real.join("dev"), format!("{number}\n")).expect("written");
            fs::create_dir_all(sys.join("dev/block")).expect("created");
            symlink(&real, sys.join("dev/block").join(number)).expect("linked");
            real
        };
        device("sda", "8:0");
        let partition = device("sda/sda2", "8:2");
        fs::write(partition.join("partition"), "2\n").expect("written");
        let mapped = device("dm-0", "253:0");
        fs::create_dir(mapped.join("slaves")).expect("created");
        symlink(&partition, mapped.join("slaves/sda2")).expect("linked");
        device("sdb", "8:16");
        // A file system in an image file, by a loop device.
        let image = folder.path().join("image");
        fs::write(&image, "").expect("written");
        let looped = device("loop0", "7:0");
        fs::create_dir(looped.join("loop")).expect("created");
        fs::write(looped.join("loop/backing_file"), format!("{}\n", image.display())).expect("written");

        let found = below(sys, "253:0".into());
        assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), ["253:0", "8:0", "8:2"]);
        assert_eq!(below(sys, "8:16".into()).len(), 1);
        assert_eq!(below(sys, "0:35".into()).len(), 1, "what is no block device lies on nothing");
        assert!(below(sys, "7:0".into()).contains(&number(fs::metadata(&image).expect("there").dev())));
        assert_eq!(backing_file(sys, "7:0"), Some(image));
    }
}
