//! The machine as recovery will need to know it: firmware, controllers and their drivers, what its initramfs brings along,
//! addresses, operating system, and how its storage is put together.
//!
//! Read from `/sys`, `/proc`, `/etc` and `/boot`; whatever cannot be read is left out or said to be unknown. It is sent to
//! the process server as JSON and kept in the vault's catalog, so that an empty site can choose a machine
//! that this one's system will start on. Nothing in it changes while the machine does not: each change is an entry there.

use replication::limits::DESCRIPTION_BYTES_MAX;
use serde::{Deserialize, Serialize};

use crate::system::SystemRoot;

mod controllers;
mod initramfs;
mod network;
mod platform;
mod storage;

pub use controllers::{Bus, Controller, ControllerKind};
pub use initramfs::{Drivers, Initramfs, read_initramfs};
pub use network::{Interface, Network, Route};
pub use platform::{Firmware, FirmwareKind, Kernel, OperatingSystem, Product};
pub use storage::{Disk, MountEntry, Partition, Storage, Volume};

/// Version of this document. Fields are added; a change of meaning gets a new version.
pub const DESCRIPTION_FORMAT: u32 = 1;

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    /// [`DESCRIPTION_FORMAT`].
    pub format: u32,
    /// What it calls itself.
    pub host_name: String,
    /// Its operating system.
    pub system: OperatingSystem,
    /// The kernel that runs.
    pub kernel: Kernel,
    /// What starts it.
    pub firmware: Firmware,
    /// What its maker says.
    pub product: Product,
    /// Processors that are on line.
    pub processors: u32,
    /// Memory in bytes, as far as the kernel manages it, in whole MiB.
    pub memory_bytes: u64,
    /// Disk and network controllers.
    pub controllers: Vec<Controller>,
    /// The drivers that the running kernel has before it finds its root file system.
    pub drivers: Drivers,
    /// Interfaces, addresses, routes, name servers.
    pub network: Network,
    /// Disks, what is made of them, and what is mounted at start.
    pub storage: Storage,
}

impl MachineDescription {
    /// Looks at the system below `root`.
    pub fn read(root: &SystemRoot) -> MachineDescription {
        let kernel = platform::kernel(root);
        let drivers = initramfs::drivers(root, &kernel.release);
        MachineDescription {
            format: DESCRIPTION_FORMAT,
            host_name: platform::host_name(root),
            system: platform::system(root),
            firmware: platform::firmware(root),
            product: platform::product(root),
            processors: platform::processors(root),
            memory_bytes: platform::memory_bytes(root),
            controllers: controllers::read(root, &drivers),
            network: network::read(root),
            storage: storage::read(root),
            drivers,
            kernel,
        }
    }

    /// As it is sent: JSON, no longer than [`DESCRIPTION_BYTES_MAX`].
    pub fn document(&self) -> String {
        let text =
            |description: &MachineDescription| serde_json::to_string(description).expect("a description is plain data");
        let whole = text(self);
        if whole.len() <= DESCRIPTION_BYTES_MAX {
            return whole;
        }
        // Lists of drivers are the only ones that grow with the kernel and not with the machine.
        let mut short = self.clone();
        short.drivers = Drivers { initramfs: short.drivers.initramfs.without_modules(), built_in: Vec::new() };
        let short = text(&short);
        if short.len() <= DESCRIPTION_BYTES_MAX { short } else { format!("{{\"format\":{DESCRIPTION_FORMAT}}}") }
    }
}
