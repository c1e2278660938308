//! The block devices that the kernel knows, and what lies on what: partitions on disks, logical volumes and md arrays on
//! their members, loop devices on the file systems that hold their files.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Mount, SystemRoot};

/// Sectors in `/sys` have 512 bytes, whatever the device says of its own.
const SECTOR_BYTES: u64 = 512;

/// What the kernel calls a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver's number.
    pub major: u32,
    /// The driver's number for the device.
    pub minor: u32,
}

impl DeviceNumber {
    /// The number in a file's metadata.
    pub fn of(number: u64) -> DeviceNumber {
        DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl FromStr for DeviceNumber {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<DeviceNumber, Self::Err> {
        let (major, minor) = text.trim().split_once(':').unwrap_or(("", ""));
        Ok(DeviceNumber { major: major.parse()?, minor: minor.parse()? })
    }
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockNode {
    /// Its name in `/sys/class/block`.
    pub name: String,
    /// Its number.
    pub number: DeviceNumber,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The disk that it is a partition of.
    pub disk: Option<DeviceNumber>,
    /// Its number among that disk's partitions.
    pub partition: Option<u64>,
    /// Devices that it is made of: logical volumes, arrays, multipath.
    pub members: Vec<DeviceNumber>,
    /// Its name in the device mapper.
    pub mapper_name: Option<String>,
    /// The file that a loop device shows.
    pub backing_file: Option<String>,
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct BlockDevices {
    nodes: BTreeMap<DeviceNumber, BlockNode>,
    /// The devices of each btrfs.
    pools: Vec<BTreeSet<DeviceNumber>>,
}

impl BlockDevices {
    /// Looks at the system.
    pub fn read(root: &SystemRoot) -> BlockDevices {
        let names = root.names("/sys/class/block");
        let numbers: BTreeMap<&str, DeviceNumber> = names
            .iter()
            .filter_map(|name| Some((name.as_str(), root.value(format!("/sys/class/block/{name}/dev"))?.parse().ok()?)))
            .collect();
        let node = |(name, number): (&&str, &DeviceNumber)| {
            let folder = format!("/sys/class/block/{name}");
            let partition = root.number(format!("{folder}/partition"));
            let disk = partition.and_then(|_| {
                let place = root.resolve(&folder)?;
                numbers.get(place.parent()?.file_name()?.to_str()?).copied()
            });
            let members = root.names(format!("{folder}/slaves"));
            let node = BlockNode {
                name: (*name).to_owned(),
                number: *number,
                size_bytes: root.number(format!("{folder}/size")).unwrap_or(0).saturating_mul(SECTOR_BYTES),
                disk,
                partition,
                members: members.iter().filter_map(|member| numbers.get(member.as_str()).copied()).collect(),
                mapper_name: root.value(format!("{folder}/dm/name")),
                backing_file: root.value(format!("{folder}/loop/backing_file")),
            };
            (*number, node)
        };
        let nodes = numbers.iter().map(node).collect();
        let pool = |name: &String| {
            let members = root.names(format!("/sys/fs/btrfs/{name}/devices"));
            members.iter().filter_map(|member| numbers.get(member.as_str()).copied()).collect::<BTreeSet<_>>()
        };
        let pools = root.names("/sys/fs/btrfs").iter().map(pool).filter(|pool| !pool.is_empty()).collect();
        BlockDevices { nodes, pools }
    }

    /// All devices, by number.
    pub fn iter(&self) -> impl Iterator<Item = &BlockNode> {
        self.nodes.values()
    }

    /// The device of that number.
    pub fn get(&self, number: DeviceNumber) -> Option<&BlockNode> {
        self.nodes.get(&number)
    }

    /// The device that a path names.
    pub fn named(&self, root: &SystemRoot, path: &str) -> Option<&BlockNode> {
        let path = Path::new(path);
        let by_name = |name: &str| {
            let name = name.replace('/', "!");
            self.nodes.values().find(|node| node.name == name)
        };
        if let Ok(name) = path.strip_prefix("/dev/mapper") {
            let name = name.to_str()?;
            let found = self.nodes.values().find(|node| node.mapper_name.as_deref() == Some(name));
            if found.is_some() {
                return found;
            }
        }
        let direct = path.strip_prefix("/dev").ok().and_then(|name| by_name(name.to_str()?));
        direct.or_else(|| by_name(root.resolve(path)?.file_name()?.to_str()?))
    }

    /// The devices that a mounted file system was made on; none for one in memory or on the network.
    pub fn of_mount(&self, root: &SystemRoot, mount: &Mount) -> BTreeSet<DeviceNumber> {
        let first = match self.get(mount.device) {
            Some(node) => node.number,
            // btrfs shows a number of its own.
            None if mount.fs_type == "btrfs" => match self.named(root, &mount.source) {
                Some(node) => node.number,
                None => return BTreeSet::new(),
            },
            None => return BTreeSet::new(),
        };
        let pool = self.pools.iter().find(|pool| pool.contains(&first));
        pool.cloned().unwrap_or_else(|| BTreeSet::from([first]))
    }

    /// `devices` and everything that they lie on, down to the disks.
    pub fn foundations(
        &self,
        root: &SystemRoot,
        mounts: &[Mount],
        devices: BTreeSet<DeviceNumber>,
    ) -> BTreeSet<DeviceNumber> {
        let mut found = BTreeSet::new();
        let mut open: Vec<DeviceNumber> = devices.into_iter().collect();
        while let Some(number) = open.pop() {
            if !found.insert(number) {
                continue;
            }
            let Some(node) = self.get(number) else { continue };
            open.extend(node.disk);
            open.extend(&node.members);
            if let Some(file) = &node.backing_file {
                let holder = mounts
                    .iter()
                    .filter(|mount| Path::new(file).starts_with(&mount.mount_point))
                    // Of two mounts on one place the later one is seen.
                    .max_by_key(|mount| mount.mount_point.as_os_str().len());
                open.extend(holder.into_iter().flat_map(|mount| self.of_mount(root, mount)));
            }
        }
        found
    }

    /// The devices that lie directly on `number`.
    pub fn holders(&self, number: DeviceNumber) -> impl Iterator<Item = &BlockNode> {
        self.nodes.values().filter(move |node| node.disk == Some(number) || node.members.contains(&number))
    }
}
