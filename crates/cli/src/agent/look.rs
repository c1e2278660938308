//! `farshore-agent disks` and `hardware`: what this machine has. Neither changes anything or needs an agent.

use std::fmt::Write;

use agent::discovery::{FoundDevice, find};
use agent::hardware::MachineDescription;
use agent::system::SystemRoot;

use crate::output::{Output, bytes};

pub(crate) fn disks(output: &Output) {
    let found = find(&SystemRoot::running());
    let text = if found.is_empty() { "there is no disk".to_owned() } else { found.iter().map(describe).collect() };
    output.data(&found, text.trim_end());
}

fn describe(disk: &FoundDevice) -> String {
    let mut text = String::new();
    // Writing to a String never fails.
    let sign = if disk.protect { "protect" } else { "leave  " };
    let _ = writeln!(text, "{sign} {:<10} {:>10}  {}", disk.name, bytes(disk.size_bytes), disk.model);
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(text, "          {name:<8} {value}");
        }
    };
    line("path", &disk.path);
    line("serial", &disk.serial);
    line("holds", &disk.summary());
    line("because", &disk.because.join("; "));
    text
}

pub(crate) fn hardware(output: &Output) {
    let description = MachineDescription::read(&SystemRoot::running());
    let controllers = description.controllers.iter().map(|controller| {
        let early = match controller.early {
            Some(true) => "in the kernel or its initramfs",
            Some(false) => "NOT in the initramfs",
            None => "initramfs unknown",
        };
        let driver = if controller.driver.is_empty() { "no driver" } else { &controller.driver };
        format!("\n  {:?} {} {} {driver}, {early}", controller.kind, controller.address, controller.id)
    });
    let interfaces = description
        .network
        .interfaces
        .iter()
        .map(|interface| format!("\n  {} {} {}", interface.name, interface.mac, interface.addresses.join(" ")));
    let text = format!(
        "{}: {}, Linux {}, {:?}{}{}{}",
        description.host_name,
        description.system.name,
        description.kernel.release,
        description.firmware.kind,
        if description.firmware.secure_boot == Some(true) { " with secure boot" } else { "" },
        controllers.collect::<String>(),
        interfaces.collect::<String>(),
    );
    output.data(&description, text);
}
