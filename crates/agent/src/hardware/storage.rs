//! Disks, what is made of them, and what is mounted at start.

use serde::{Deserialize, Serialize};

use super::platform::shortened;
use crate::system::{BlockDevices, BlockNode, SystemRoot};

/// Disks, partitions of one, volumes, lines of `fstab` that are listed.
const ENTRIES_MAX: usize = 256;
/// Kinds of disks that hold nothing of their own: loop, memory, compressed memory, optical, floppy, network.
const PASSING: &[&str] = &["loop", "ram", "zram", "sr", "fd", "nbd"];

/// The machine's storage.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Storage {
    /// Physical and virtual disks.
    pub disks: Vec<Disk>,
    /// What the kernel makes of disks and partitions: logical volumes, md arrays, encrypted and multipath devices.
    pub volumes: Vec<Volume>,
    /// `/etc/fstab`.
    pub mounts_at_start: Vec<MountEntry>,
    /// `/etc/crypttab`, a line each, without what may hold secrets: the volume, and the device below it.
    pub encrypted_at_start: Vec<String>,
    /// The arrays named in `mdadm.conf`.
    pub arrays_at_start: Vec<String>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What the kernel calls it now.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What its maker calls it.
    pub model: String,
    /// What tells it from others; empty: it does not say.
    pub serial: String,
    /// Bytes of a sector that it addresses.
    pub logical_sector_bytes: u64,
    /// It can be taken out.
    pub removable: bool,
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// Its number.
    pub number: u64,
    /// Where it begins, in bytes.
    pub start_bytes: u64,
    /// Size in bytes.
    pub size_bytes: u64,
}

/// Something made of disks, partitions, or other such things.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// What people call it.
    pub name: String,
    /// `lvm`, `crypt`, `mpath`, `md raid1`, …
    pub kind: String,
    /// What tells it from others.
    pub uuid: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What it is made of, by the kernel's names.
    pub members: Vec<String>,
}

/// A line of `fstab`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountEntry {
    /// The device, or what it is recognised by.
    pub source: String,
    /// Where it is mounted.
    pub mount_point: String,
    /// The type of its file system.
    pub fs_type: String,
    /// How.
    pub options: String,
}

pub(super) fn read(root: &SystemRoot) -> Storage {
    let devices = BlockDevices::read(root);
    let is_passing = |name: &str| {
        PASSING
            .iter()
            .any(|kind| name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())))
    };
    let whole = devices.iter().filter(|node| node.disk.is_none() && !is_passing(&node.name) && node.size_bytes > 0);
    let (volumes, disks): (Vec<&BlockNode>, Vec<&BlockNode>) =
        whole.partition(|node| node.name.starts_with("dm-") || node.name.starts_with("md"));
    let mut disks: Vec<Disk> = disks.into_iter().map(|node| disk(root, &devices, node)).collect();
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    disks.truncate(ENTRIES_MAX);
    let mut volumes: Vec<Volume> = volumes.into_iter().map(|node| volume(root, &devices, node)).collect();
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    volumes.truncate(ENTRIES_MAX);
    let lines = |path: &str| fields_of(&root.text(path).unwrap_or_default());
    let arrays = ["/etc/mdadm/mdadm.conf", "/etc/mdadm.conf"].into_iter().flat_map(lines);
    let arrays = arrays.filter(|fields| fields[0] == "ARRAY").map(|fields| shortened(fields.join(" ")));
    Storage {
        disks,
        volumes,
        mounts_at_start: lines("/etc/fstab").iter().filter_map(|fields| mount_entry(fields)).collect(),
        encrypted_at_start: lines("/etc/crypttab")
            .iter()
            .map(|fields| shortened(fields[..2.min(fields.len())].join(" ")))
            .collect(),
        arrays_at_start: arrays.take(ENTRIES_MAX).collect(),
    }
}

fn disk(root: &SystemRoot, devices: &BlockDevices, node: &BlockNode) -> Disk {
    let folder = format!("/sys/class/block/{}", node.name);
    let first =
        |names: &[&str]| names.iter().find_map(|name| root.value(format!("{folder}/{name}"))).unwrap_or_default();
    let mut partitions: Vec<Partition> = devices
        .holders(node.number)
        .filter(|part| part.disk == Some(node.number))
        .map(|part| Partition {
            number: part.partition.unwrap_or(0),
            start_bytes: root.number(format!("/sys/class/block/{}/start", part.name)).unwrap_or(0).saturating_mul(512),
            size_bytes: part.size_bytes,
        })
        .collect();
    partitions.sort_by_key(|partition| partition.number);
    partitions.truncate(ENTRIES_MAX);
    Disk {
        name: node.name.clone(),
        size_bytes: node.size_bytes,
        model: shortened(first(&["device/model", "device/name"])),
        serial: shortened(first(&["serial", "device/serial", "wwid", "device/wwid"])),
        logical_sector_bytes: root.number(format!("{folder}/queue/logical_block_size")).unwrap_or(512),
        removable: root.number(format!("{folder}/removable")) == Some(1),
        partitions,
    }
}

fn volume(root: &SystemRoot, devices: &BlockDevices, node: &BlockNode) -> Volume {
    let folder = format!("/sys/class/block/{}", node.name);
    let value = |name: &str| shortened(root.value(format!("{folder}/{name}")).unwrap_or_default());
    let (kind, uuid) = if node.name.starts_with("dm-") {
        // `LVM-…`, `CRYPT-LUKS2-…`, `mpath-…`: whoever made it says what it is.
        let uuid = value("dm/uuid");
        let kind = uuid.split('-').next().unwrap_or_default().to_ascii_lowercase();
        (kind, uuid)
    } else {
        (format!("md {}", value("md/level")), value("md/uuid"))
    };
    let mut members: Vec<String> =
        node.members.iter().filter_map(|member| devices.get(*member)).map(|member| member.name.clone()).collect();
    members.sort_unstable();
    let name = node.mapper_name.clone().unwrap_or_else(|| node.name.clone());
    Volume { name: shortened(name), kind, uuid, size_bytes: node.size_bytes, members }
}

/// The words of each line that is no remark; never an empty list.
fn fields_of(text: &str) -> Vec<Vec<String>> {
    let words = |line: &str| line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#')).map(words);
    lines.filter(|words| !words.is_empty()).take(ENTRIES_MAX).collect()
}

fn mount_entry(fields: &[String]) -> Option<MountEntry> {
    let [source, mount_point, fs_type, options @ ..] = fields else { return None };
    let options = options.first().cloned().unwrap_or_default();
    let network = ["nfs", "nfs4", "cifs", "smb3", "ceph", "davfs"].contains(&fs_type.as_str());
    Some(MountEntry {
        source: shortened(source.clone()),
        mount_point: shortened(mount_point.clone()),
        fs_type: shortened(fs_type.clone()),
        // Passwords of network file systems stand there.
        options: if network || options.contains("pass") { String::new() } else { shortened(options) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_split_and_secrets_left_out() {
        let text = "# remark\n\n  # another\nUUID=1-2 / ext4 errors=remount-ro 0 1\n//nas/x /mnt cifs username=a,password=b\n\
            swap\n/dev/sdb1 /data xfs\n";
        let entries: Vec<MountEntry> = fields_of(text).iter().filter_map(|fields| mount_entry(fields)).collect();
        assert_eq!(entries.len(), 3);
        assert_eq!((entries[0].mount_point.as_str(), entries[0].options.as_str()), ("/", "errors=remount-ro"));
        assert_eq!(entries[1].options, "");
        assert_eq!(entries[2].fs_type, "xfs");
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text: String) {
            for fields in fields_of(&text) {
                prop_assert!(!fields.is_empty());
                mount_entry(&fields);
            }
        }
    }
}
