//! The machine's disks, for whoever has to choose which of them to protect: by what they are recognised, what lies on
//! them, and what speaks for or against.
//!
//! One layer is chosen for each disk, so that no write is counted twice: physical disks as a whole, unless the kernel
//! hands their writes over above them (multipath, md arrays without redundancy). See `docs/operations/disks.md`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use crate::system::{BlockDevices, BlockNode, Mount, SystemRoot};

mod signature;

pub use signature::{Content, HEAD_BYTES, TAIL_BYTES};

/// Disks smaller than this are not worth a place, in bytes.
const TINY_BYTES: u64 = 64 << 20;
/// Places at which nothing is kept.
const TEMPORARY: &[&str] = &["/tmp", "/var/tmp", "/scratch", "/mnt/resource", "/mnt/scratch"];
/// The label of the disk that Azure gives to each machine and takes back.
const TEMPORARY_LABEL: &str = "Temporary Storage";
/// What names below `/dev/disk/by-id` are preferred, best first.
const ID_KINDS: &[&str] = &["nvme-", "ata-", "scsi-", "virtio-", "google-", "dm-uuid-", "md-uuid-", "wwn-", "usb-"];

/// A device that could be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundDevice {
    /// What the kernel calls it now.
    pub name: String,
    /// A path to it that stays the same; the kernel's where there is no other.
    pub path: String,
    /// What tells it from others, as the agent compares it; empty: it does not say.
    pub serial: String,
    /// Its world wide name; empty: none.
    pub wwn: String,
    /// What its maker calls it.
    pub model: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// It can be taken out.
    pub removable: bool,
    /// Nothing can be written to it.
    pub read_only: bool,
    /// What lies on the whole of it.
    pub content: Content,
    /// Where that is mounted.
    pub mounted_at: Vec<String>,
    /// What lies on it, one inside the other.
    pub parts: Vec<Part>,
    /// Whether to protect it.
    pub protect: bool,
    /// Why, or why not.
    pub because: Vec<String>,
}

/// A partition, or a device made of this one and perhaps others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What the kernel calls it now.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What lies on it.
    pub content: Content,
    /// Where that is mounted.
    pub mounted_at: Vec<String>,
    /// What lies on it, in turn.
    pub parts: Vec<Part>,
}

/// How deep parts are followed: partition, array, encryption, logical volume, and some more.
const DEPTH_MAX: u32 = 8;

/// Everything that the system has.
struct System<'a> {
    root: &'a SystemRoot,
    devices: BlockDevices,
    mounts: Vec<Mount>,
    ids: Vec<(String, String)>,
}

/// Finds every whole device of the system below `root`, in the order of their names.
pub fn find(root: &SystemRoot) -> Vec<FoundDevice> {
    let ids = root.names("/dev/disk/by-id").into_iter();
    let ids = ids.filter_map(|id| Some((root.link_name(format!("/dev/disk/by-id/{id}"))?, id))).collect();
    let system = System { root, devices: BlockDevices::read(root), mounts: root.mounts(), ids };
    let whole = system.devices.iter().filter(|node| node.disk.is_none());
    let mut found: Vec<FoundDevice> = whole.map(|node| system.describe(node)).collect();
    found.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
    found
}

impl System<'_> {
    fn value(&self, node: &BlockNode, names: &[&str]) -> String {
        let value = |name: &&str| self.root.value(format!("/sys/class/block/{}/{name}", node.name));
        names.iter().find_map(value).unwrap_or_default()
    }

    fn flag(&self, node: &BlockNode, name: &str) -> bool {
        self.value(node, &[name]) == "1"
    }

    fn describe(&self, node: &BlockNode) -> FoundDevice {
        let mut device = FoundDevice {
            name: node.name.clone(),
            path: self.stable_path(node),
            // In the order in which the agent looks when it opens the disk.
            serial: self.value(node, &["serial", "device/serial", "wwid", "device/wwid", "dm/uuid"]),
            wwn: self.value(node, &["wwid", "device/wwid"]),
            model: self.value(node, &["device/model", "device/name", "dm/name"]),
            size_bytes: node.size_bytes,
            removable: self.flag(node, "removable"),
            read_only: self.flag(node, "ro"),
            content: self.content(node),
            mounted_at: self.mounted_at(node),
            parts: self.parts(node, 0),
            protect: false,
            because: Vec::new(),
        };
        device.because = self.objections(node, &device);
        device.protect = device.because.is_empty();
        if device.protect {
            device.because = self.reasons(node, &device);
        }
        device
    }

    fn stable_path(&self, node: &BlockNode) -> String {
        let own = self.ids.iter().filter(|(name, _)| *name == node.name).map(|(_, id)| id);
        let rank = |id: &&String| ID_KINDS.iter().position(|kind| id.starts_with(kind)).unwrap_or(ID_KINDS.len());
        match own.min_by_key(|id| (rank(id), id.len())) {
            Some(id) => format!("/dev/disk/by-id/{id}"),
            None => match &node.mapper_name {
                Some(name) => format!("/dev/mapper/{name}"),
                None => format!("/dev/{}", node.name.replace('!', "/")),
            },
        }
    }

    /// What its first and last bytes say; nothing without the right to read them.
    fn content(&self, node: &BlockNode) -> Content {
        let place = format!("/dev/{}", node.name.replace('!', "/"));
        let Ok(file) = File::open(self.root.path(place)) else { return Content::default() };
        let read = |offset: u64, len: usize| {
            let mut bytes = vec![0; len];
            let mut done = 0;
            while let Ok(count @ 1..) = file.read_at(&mut bytes[done..], offset + done as u64) {
                done += count;
            }
            bytes.truncate(done);
            bytes
        };
        let head = read(0, HEAD_BYTES.min(usize::try_from(node.size_bytes).unwrap_or(HEAD_BYTES)));
        let tail_bytes = TAIL_BYTES.min(usize::try_from(node.size_bytes).unwrap_or(TAIL_BYTES));
        let tail = read(node.size_bytes - tail_bytes as u64, tail_bytes);
        Content::of(&head, &tail, node.size_bytes)
    }

    fn mounted_at(&self, node: &BlockNode) -> Vec<String> {
        let own = self.mounts.iter().filter(|mount| self.devices.of_mount(self.root, mount).contains(&node.number));
        own.map(|mount| mount.mount_point.display().to_string()).collect()
    }

    fn parts(&self, node: &BlockNode, depth: u32) -> Vec<Part> {
        if depth == DEPTH_MAX {
            return Vec::new();
        }
        let mut parts: Vec<Part> = self
            .devices
            .holders(node.number)
            .map(|part| Part {
                name: part.mapper_name.clone().unwrap_or_else(|| part.name.clone()),
                size_bytes: part.size_bytes,
                content: self.content(part),
                mounted_at: self.mounted_at(part),
                parts: self.parts(part, depth + 1),
            })
            .collect();
        parts.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        parts
    }

    /// What speaks against protecting it.
    fn objections(&self, node: &BlockNode, device: &FoundDevice) -> Vec<String> {
        let kind: String = node.name.chars().take_while(|character| character.is_ascii_alphabetic()).collect();
        let made_of: Vec<&str> =
            node.members.iter().filter_map(|member| Some(self.devices.get(*member)?.name.as_str())).collect();
        let why_kind = match kind.as_str() {
            "loop" => Some(match &node.backing_file {
                Some(file) => format!("it shows the file {file}: protect the disk that this lies on"),
                None => "it shows no file".to_owned(),
            }),
            "ram" | "zram" => Some("it is memory".to_owned()),
            "sr" => Some("it is an optical drive".to_owned()),
            "fd" => Some("it is a floppy drive".to_owned()),
            "nbd" => Some("it is served over the network: protect it where it lies".to_owned()),
            "dm" if is_multipath(&device.serial) => None,
            "md" if self.is_opaque_array(node) => None,
            "dm" | "md" => Some(format!("it is made of {}, which are protected as a whole", made_of.join(", "))),
            _ => None,
        };
        if device.size_bytes == 0 {
            return vec!["it has no medium".to_owned()];
        }
        let above = self.seen_above(node).map(|holder| format!("its writes are seen at {holder} only: protect that"));
        let facts = [
            (device.read_only, "nothing can be written to it"),
            (device.removable, "it can be taken out"),
            (device.size_bytes < TINY_BYTES, "it is tiny"),
            (is_swap(device), "it holds nothing but swap space"),
            (is_temporary(device), "what is kept on it is temporary"),
        ];
        let facts = facts.into_iter().filter(|(is_so, _)| *is_so).map(|(_, why)| why.to_owned());
        why_kind.into_iter().chain(above).chain(facts).collect()
    }

    /// An md array whose members get writes that were not submitted to them.
    fn is_opaque_array(&self, node: &BlockNode) -> bool {
        matches!(self.value(node, &["md/level"]).as_str(), "raid0" | "linear")
    }

    /// The device above, if writes to a member of it are not seen at the member.
    fn seen_above(&self, node: &BlockNode) -> Option<String> {
        let holders = self.devices.holders(node.number);
        let of_parts = self.devices.holders(node.number).flat_map(|part| self.devices.holders(part.number));
        let opaque = |holder: &&BlockNode| {
            is_multipath(&self.value(holder, &["dm/uuid"]))
                || (holder.name.starts_with("md") && self.is_opaque_array(holder))
        };
        let found = holders.chain(of_parts).find(opaque)?;
        Some(found.mapper_name.clone().unwrap_or_else(|| found.name.clone()))
    }

    /// What speaks for it.
    fn reasons(&self, node: &BlockNode, device: &FoundDevice) -> Vec<String> {
        let mut places = device.mounted_at.clone();
        collect_mounts(&device.parts, &mut places);
        places.sort();
        places.dedup();
        let mut because = Vec::new();
        if !places.is_empty() {
            because.push(format!("in use at {}", places.join(", ")));
        } else if device.content == Content::default() && device.parts.is_empty() {
            because.push("nothing known lies on it".to_owned());
        } else {
            because.push("it holds data".to_owned());
        }
        if device.serial.is_empty() {
            because.push(format!("it reports no serial number: set one for {} in its section", node.name));
        }
        because
    }
}

fn is_multipath(dm_uuid: &str) -> bool {
    dm_uuid.starts_with("mpath-")
}

fn is_swap(device: &FoundDevice) -> bool {
    let only_swap = |parts: &[Part]| !parts.is_empty() && parts.iter().all(|part| part.content.kind == "swap");
    device.content.kind == "swap" || (device.content.kind.is_empty() && only_swap(&device.parts))
}

fn is_temporary(device: &FoundDevice) -> bool {
    let mut places = device.mounted_at.clone();
    collect_mounts(&device.parts, &mut places);
    let labelled = device.content.label == TEMPORARY_LABEL
        || device.parts.iter().any(|part| part.content.label == TEMPORARY_LABEL);
    labelled || (!places.is_empty() && places.iter().all(|place| TEMPORARY.contains(&place.as_str())))
}

fn collect_mounts(parts: &[Part], places: &mut Vec<String>) {
    for part in parts {
        places.extend(part.mounted_at.iter().cloned());
        collect_mounts(&part.parts, places);
    }
}

impl FoundDevice {
    /// What lies on it in one line: `gpt: ext4 /boot, lvm (vg-root ext4 /, vg-swap swap)`.
    pub fn summary(&self) -> String {
        let own = one(&self.content, &self.mounted_at);
        let parts = parts_of(&self.parts);
        let table = &self.content.partition_table;
        [own, parts].iter().filter(|text| !text.is_empty()).fold(table.clone(), |line, text| match line.is_empty() {
            true => text.clone(),
            false => format!("{line}: {text}"),
        })
    }
}

fn one(content: &Content, mounted_at: &[String]) -> String {
    let words = std::iter::once(&content.kind).chain(mounted_at).filter(|word| !word.is_empty());
    words.cloned().collect::<Vec<_>>().join(" ")
}

fn parts_of(parts: &[Part]) -> String {
    let part = |part: &Part| {
        let inner = parts_of(&part.parts);
        let own = one(&part.content, &part.mounted_at);
        let own = if own.is_empty() { "?".to_owned() } else { own };
        match inner.is_empty() {
            true => own,
            false => format!("{own} ({inner})"),
        }
    };
    parts.iter().map(part).collect::<Vec<_>>().join(", ")
}
