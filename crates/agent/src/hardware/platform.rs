//! What the machine is and what runs on it.

use serde::{Deserialize, Serialize};

use crate::system::SystemRoot;

/// How firmware starts an operating system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirmwareKind {
    /// From the first sector of a disk.
    Bios,
    /// From a file in the EFI system partition.
    Uefi,
}

/// What starts the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firmware {
    /// How.
    pub kind: FirmwareKind,
    /// Whether it refuses what is not signed; none if it does not say.
    pub secure_boot: Option<bool>,
    /// Who made it.
    pub vendor: String,
    /// Its version.
    pub version: String,
}

/// What the machine's maker, or its hypervisor, says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// Who.
    pub vendor: String,
    /// What.
    pub name: String,
    /// The kernel sees a hypervisor below it.
    pub virtual_machine: bool,
}

/// `/etc/os-release`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatingSystem {
    /// `debian`, `rhel`, …
    pub id: String,
    /// `12`, `9.4`, …
    pub version_id: String,
    /// For people.
    pub name: String,
}

/// The running kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// `6.1.0-21-amd64`.
    pub release: String,
    /// `x86_64`.
    pub architecture: String,
    /// What it was started with.
    pub command_line: String,
    /// Kernels in `/boot` that could be started.
    pub installed: Vec<String>,
}

/// Bytes of a text field that are kept.
const TEXT_BYTES_MAX: usize = 4096;
/// Kernels in `/boot` that are listed.
const KERNELS_MAX: usize = 32;

pub(super) fn shortened(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

fn value(root: &SystemRoot, path: &str) -> String {
    shortened(root.value(path).unwrap_or_default())
}

pub(super) fn host_name(root: &SystemRoot) -> String {
    value(root, "/proc/sys/kernel/hostname")
}

pub(super) fn firmware(root: &SystemRoot) -> Firmware {
    let kind = if root.exists("/sys/firmware/efi") { FirmwareKind::Uefi } else { FirmwareKind::Bios };
    // Four bytes of attributes, then the value.
    let variable = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
    let secure_boot = root.bytes(variable, 16).and_then(|bytes| bytes.get(4).map(|value| *value == 1));
    Firmware {
        kind,
        secure_boot,
        vendor: value(root, "/sys/class/dmi/id/bios_vendor"),
        version: value(root, "/sys/class/dmi/id/bios_version"),
    }
}

pub(super) fn product(root: &SystemRoot) -> Product {
    let flags = root.text("/proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags"));
    let hypervisor = flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "hypervisor"));
    Product {
        vendor: value(root, "/sys/class/dmi/id/sys_vendor"),
        name: value(root, "/sys/class/dmi/id/product_name"),
        virtual_machine: hypervisor || root.exists("/sys/hypervisor/type"),
    }
}

pub(super) fn system(root: &SystemRoot) -> OperatingSystem {
    let text = root.text("/etc/os-release").or_else(|| root.text("/usr/lib/os-release")).unwrap_or_default();
    let field = |name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        shortened(found.map(unquoted).unwrap_or_default())
    };
    OperatingSystem { id: field("ID"), version_id: field("VERSION_ID"), name: field("PRETTY_NAME") }
}

/// A value as a shell would take it, as far as `os-release` goes.
fn unquoted(text: &str) -> String {
    let text = text.trim();
    let inner = ['"', '\''].iter().find_map(|quote| text.strip_prefix(*quote)?.strip_suffix(*quote));
    let mut plain = String::new();
    let mut rest = inner.unwrap_or(text).chars();
    while let Some(character) = rest.next() {
        plain.extend(if character == '\\' { rest.next() } else { Some(character) });
    }
    plain
}

pub(super) fn kernel(root: &SystemRoot) -> Kernel {
    let release = value(root, "/proc/sys/kernel/osrelease");
    let names = root.names("/boot").into_iter();
    let mut installed: Vec<String> =
        names.filter_map(|name| Some(name.strip_prefix("vmlinuz-")?.to_owned())).take(KERNELS_MAX).collect();
    installed.sort_unstable();
    Kernel {
        release,
        // Absent before Linux 6.1: the program's own, which is the kernel's.
        architecture: root.value("/proc/sys/kernel/arch").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        command_line: value(root, "/proc/cmdline"),
        installed,
    }
}

pub(super) fn processors(root: &SystemRoot) -> u32 {
    let ranges = root.value("/sys/devices/system/cpu/online").unwrap_or_default();
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    ranges.split(',').filter_map(|range| count(range.trim())).fold(0, u32::saturating_add)
}

/// The kernel takes some for itself, more or less with each version: the whole MiB are steady enough.
pub(super) fn memory_bytes(root: &SystemRoot) -> u64 {
    let text = root.text("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0);
    (kib >> 10) << 20
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_are_unquoted() {
        for (text, plain) in [
            ("debian", "debian"),
            ("\"Debian GNU/Linux 12 (bookworm)\"", "Debian GNU/Linux 12 (bookworm)"),
            ("'single'", "single"),
            ("\"a \\\"b\\\" \\$c\"", "a \"b\" $c"),
            ("\"", "\""),
            ("", ""),
            ("\\", ""),
        ] {
            assert_eq!(unquoted(text), plain, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text: String) {
            unquoted(&text);
            prop_assert!(shortened(text.repeat(50)).len() <= TEXT_BYTES_MAX);
        }
    }
}
