//! Disk and network controllers, and the drivers that serve them.

use serde::{Deserialize, Serialize};

use super::initramfs::Drivers;
use crate::system::SystemRoot;

/// Controllers that are listed.
const CONTROLLERS_MAX: usize = 256;

/// What a controller is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControllerKind {
    /// Disks.
    Storage,
    /// Networks.
    Network,
}

/// Where a controller sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bus {
    /// PCI and PCI Express.
    Pci,
    /// virtio, itself on PCI, MMIO or CCW.
    Virtio,
    /// Hyper-V's.
    Vmbus,
    /// Xen's.
    Xen,
}

/// A controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    /// What it is for.
    pub kind: ControllerKind,
    /// Where it sits.
    pub bus: Bus,
    /// Its place there, such as `0000:00:1f.2`.
    pub address: String,
    /// Vendor and device, four hexadecimal digits each; the class where the bus knows nothing more.
    pub id: String,
    /// The driver that serves it; empty: none.
    pub driver: String,
    /// The module that the driver comes from; empty: it is built into the kernel, or there is none.
    pub module: String,
    /// Whether the driver is there before the root file system is; none if that is not known.
    pub early: Option<bool>,
}

pub(super) fn read(root: &SystemRoot, drivers: &Drivers) -> Vec<Controller> {
    let buses = [
        (Bus::Pci, "/sys/bus/pci/devices"),
        (Bus::Virtio, "/sys/bus/virtio/devices"),
        (Bus::Vmbus, "/sys/bus/vmbus/devices"),
        (Bus::Xen, "/sys/bus/xen/devices"),
    ];
    let mut found = Vec::new();
    for (bus, folder) in buses {
        for address in root.names(folder) {
            let device = format!("{folder}/{address}");
            let Some((kind, id)) = identify(root, bus, &device) else { continue };
            let driver = root.link_name(format!("{device}/driver")).unwrap_or_default();
            let module = root.link_name(format!("{device}/driver/module")).unwrap_or_default();
            let early = match (driver.as_str(), module.as_str()) {
                ("", _) => Some(false),
                // A driver without a module is a part of the kernel.
                (_, "") => Some(true),
                (_, module) => drivers.early(module),
            };
            found.push(Controller { kind, bus, address, id, driver, module, early });
        }
    }
    found.truncate(CONTROLLERS_MAX);
    found
}

/// What a device is for, if that matters here, and its numbers.
fn identify(root: &SystemRoot, bus: Bus, device: &str) -> Option<(ControllerKind, String)> {
    let number = |name: &str| {
        let text = root.value(format!("{device}/{name}"))?;
        u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    };
    match bus {
        Bus::Pci => {
            let kind = match number("class")? >> 16 {
                0x01 => ControllerKind::Storage,
                0x02 => ControllerKind::Network,
                _ => return None,
            };
            Some((kind, format!("{:04x}:{:04x}", number("vendor")?, number("device")?)))
        }
        Bus::Virtio => {
            let device = number("device")?;
            let kind = match device {
                1 => ControllerKind::Network,
                // Blocks, SCSI, persistent memory, shared file systems.
                2 | 8 | 26 | 27 => ControllerKind::Storage,
                _ => return None,
            };
            Some((kind, format!("1af4:{device:04x}")))
        }
        Bus::Vmbus => match root.value(format!("{device}/class_id"))?.to_ascii_lowercase().as_str() {
            "{f8615163-df3e-46c5-913f-f2d2f965ed0e}" => Some((ControllerKind::Network, "netvsc".to_owned())),
            "{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}" | "{32412632-86cb-44a2-9b5c-50d1417354f5}" => {
                Some((ControllerKind::Storage, "storvsc".to_owned()))
            }
            _ => None,
        },
        Bus::Xen => match root.value(format!("{device}/devtype"))?.as_str() {
            "vif" => Some((ControllerKind::Network, "vif".to_owned())),
            "vbd" => Some((ControllerKind::Storage, "vbd".to_owned())),
            _ => None,
        },
    }
}
