//! The generation id of a virtual machine: what a hypervisor changes when it brings a machine back to an earlier state.
//!
//! Linux reads it for its own random numbers and tells it to nobody, so the agent cannot compare it. What it can do is to
//! say so; a machine that was reverted is noticed when it meets its process server, which has more than the machine
//! remembers to have sent (`replication::receiver::greet`).

use std::fs;
use std::path::Path;

const DEVICES: &str = "/sys/bus/acpi/devices";
/// How firmware names the device that holds the id.
const NAMES: [&str; 2] = ["VMGENCTR", "VM_GEN_COUNTER"];

/// Whether this machine notices that it was brought back to an earlier state, in words.
pub fn describe() -> String {
    described(Path::new(DEVICES))
}

fn described(devices: &Path) -> String {
    let names = fs::read_dir(devices).into_iter().flatten().flatten();
    let mut names = names.filter_map(|device| fs::read_to_string(device.path().join("modalias")).ok());
    let noticed = "a reverted snapshot is noticed when the agent meets its process server";
    match names.any(|name| name.split(':').any(|part| NAMES.contains(&part.trim()))) {
        true => format!("the hypervisor gives this machine a generation id, which Linux keeps to itself: {noticed}"),
        false => format!("no generation id of a virtual machine: {noticed}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_is_found_by_its_names() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(described(&folder.path().join("none")).starts_with("no generation id"));
        let device = |name: &str, modalias: &str| {
            let device = folder.path().join(name);
            fs::create_dir(&device).expect("created");
            fs::write(device.join("modalias"), modalias).expect("written");
        };
        device("PNP0303:00", "acpi:PNP0303:\n");
        assert!(described(folder.path()).starts_with("no generation id"));
        device("QEMU:00", "acpi:QEMUVGID:VM_GEN_COUNTER:\n");
        assert!(described(folder.path()).contains("keeps to itself"));
    }
}
