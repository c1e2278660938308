//! Two machines as their `/proc`, `/sys`, `/etc` and `/boot` show them, described and searched for disks. The trees were
//! put together by hand from what such machines say; `systems/` holds them.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use agent::consistency::frozen::plan;
use agent::discovery::{FoundDevice, find};
use agent::hardware::{ControllerKind, FirmwareKind, MachineDescription};
use agent::system::{DeviceNumber, SystemRoot};
use proptest::prelude::*;
use replication::limits::DESCRIPTION_BYTES_MAX;

fn system(name: &str) -> SystemRoot {
    SystemRoot::at(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/systems").join(name))
}

/// Address, driver, and whether it is there early.
fn controllers(description: &MachineDescription, kind: ControllerKind) -> Vec<(&str, &str, &str, Option<bool>)> {
    let of_kind = description.controllers.iter().filter(|controller| controller.kind == kind);
    of_kind.map(|it| (&*it.address, &*it.id, &*it.driver, it.early)).collect()
}

#[test]
fn a_guest_of_kvm_is_described() {
    let found = MachineDescription::read(&system("debian-kvm"));
    assert_eq!((found.host_name.as_str(), found.processors, found.memory_bytes), ("web1", 2, 3932 << 20));
    assert_eq!((found.system.id.as_str(), found.system.version_id.as_str()), ("debian", "12"));
    assert_eq!(found.system.name, "Debian GNU/Linux 12 (bookworm)");
    assert_eq!((found.firmware.kind, found.firmware.secure_boot), (FirmwareKind::Uefi, Some(true)));
    assert_eq!(found.firmware.vendor, "EDK II");
    assert!(found.product.virtual_machine && found.product.vendor == "QEMU");
    assert_eq!(found.kernel.release, "6.1.0-21-amd64");
    assert!(found.kernel.command_line.ends_with("ro quiet"));
    assert_eq!(found.kernel.installed, ["6.1.0-18-amd64", "6.1.0-21-amd64"]);

    assert_eq!(found.drivers.initramfs.path, "/boot/initrd.img-6.1.0-21-amd64");
    assert_eq!(found.drivers.initramfs.unknown_because, "");
    assert_eq!(found.drivers.initramfs.modules, ["ahci", "ext4", "libahci", "virtio_blk"]);
    assert_eq!(found.drivers.built_in, ["acpiphp", "ext2"]);
    let storage = controllers(&found, ControllerKind::Storage);
    assert_eq!(storage[0], ("0000:00:04.0", "1af4:1042", "virtio-pci", Some(true)), "built in: it has no module");
    assert_eq!(storage[1], ("0000:00:1f.2", "8086:2922", "ahci", Some(true)));
    assert_eq!(storage[2], ("virtio1", "1af4:0002", "virtio_blk", Some(true)));
    let network = controllers(&found, ControllerKind::Network);
    assert_eq!(network[1], ("virtio0", "1af4:0001", "virtio_net", Some(false)), "it is not in the initramfs");

    assert_eq!(found.network.interfaces.len(), 1, "neither lo nor a bridge without an address");
    let interface = &found.network.interfaces[0];
    assert_eq!(
        (interface.name.as_str(), interface.mac.as_str(), interface.mtu_bytes),
        ("ens3", "52:54:00:12:34:56", 1500)
    );
    assert_eq!(interface.driver, "virtio_net");
    assert_eq!(interface.addresses, ["10.0.0.17/24", "fd00::17/64"]);
    let routes: Vec<String> =
        found.network.default_routes.iter().map(|route| format!("{:?} {}", route.gateway, route.metric)).collect();
    assert_eq!(routes, ["Some(10.0.0.1) 100", "Some(fe80::1) 1024"]);
    assert_eq!(found.network.name_servers, ["10.0.0.2", "fd00::2"], "not the resolver on the machine itself");
    assert_eq!(found.network.search_domains, ["example.org", "lab.example.org"]);

    assert_eq!(found.storage.disks.len(), 1);
    let disk = &found.storage.disks[0];
    assert_eq!((disk.name.as_str(), disk.serial.as_str(), disk.size_bytes), ("vda", "web1-root", 10 << 30));
    let starts: Vec<_> = disk.partitions.iter().map(|part| (part.number, part.start_bytes, part.size_bytes)).collect();
    assert_eq!(starts, [(1, 1 << 20, 9 << 30), (2, 18_876_416 * 512, 512 << 20), (15, 19_924_992 * 512, 124 << 20)]);
    assert_eq!(found.storage.mounts_at_start.len(), 3);

    let text = found.document();
    assert_eq!(serde_json::from_str::<MachineDescription>(&text).expect("it is what was written"), found);
    assert_eq!(MachineDescription::read(&system("debian-kvm")), found, "the same machine says the same");
}

#[test]
fn a_guest_of_vmware_is_described() {
    let found = MachineDescription::read(&system("rocky-vmware"));
    assert_eq!((found.firmware.kind, found.firmware.secure_boot), (FirmwareKind::Bios, None));
    assert_eq!((found.system.name.as_str(), found.processors), ("Rocky Linux 9.4 (Blue Onyx)", 4));
    assert!(found.drivers.initramfs.unknown_because.contains("gzip"), "{:?}", found.drivers.initramfs);
    let storage = controllers(&found, ControllerKind::Storage);
    assert_eq!(storage[0], ("0000:00:10.0", "15ad:07c0", "vmw_pvscsi", Some(true)));
    assert_eq!(storage[1], ("0000:00:11.0", "15ad:07e0", "", Some(false)), "nothing serves it");
    let network = controllers(&found, ControllerKind::Network);
    assert!(network.iter().all(|(_, _, driver, early)| *driver == "vmxnet3" && early.is_none()), "{network:?}");
    let interfaces: Vec<_> =
        found.network.interfaces.iter().map(|it| (&*it.name, &*it.master, it.addresses.join(" "))).collect();
    assert_eq!(interfaces[0], ("bond0", "", "192.168.7.21/24 192.168.7.22/24".to_owned()));
    assert_eq!(interfaces[1], ("ens192", "bond0", String::new()));
    assert_eq!(found.network.name_servers, ["192.168.7.1"]);

    let volumes: Vec<_> = found.storage.volumes.iter().map(|it| (&*it.name, &*it.kind, it.members.join(" "))).collect();
    assert_eq!(
        volumes,
        [
            ("luks-1", "crypt", "sda2".to_owned()),
            ("md0", "md raid0", "sdh sdi".to_owned()),
            ("md127", "md raid1", "sdb sdc".to_owned()),
            ("rl-root", "lvm", "dm-0".to_owned()),
            ("rl-swap", "lvm", "dm-0".to_owned()),
        ]
    );
    assert_eq!(found.storage.encrypted_at_start, ["luks-1 UUID=0a1b2c3d-0002-4000-8000-000000000002"]);
    assert_eq!(found.storage.arrays_at_start.len(), 1);
    assert!(!found.document().contains("secret"), "neither keys nor passwords are sent");
}

fn by_name(found: &[FoundDevice]) -> impl Fn(&str) -> FoundDevice {
    |name| found.iter().find(|disk| disk.name == name).unwrap_or_else(|| panic!("no {name}")).clone()
}

#[test]
fn disks_are_found_with_what_lies_on_them() {
    let found = find(&system("debian-kvm"));
    assert_eq!(found.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["sr0", "vda", "loop0"]);
    let disk = by_name(&found);
    let vda = disk("vda");
    assert_eq!(
        (vda.path.as_str(), vda.serial.as_str(), vda.protect),
        ("/dev/disk/by-id/virtio-web1-root", "web1-root", true)
    );
    assert_eq!(vda.content.partition_table, "gpt");
    assert_eq!(vda.content.partition_table_uuid, "04030201-0605-0807-090a-0b0c0d0e0f10");
    assert_eq!(vda.summary(), "gpt: ext4 /, swap, vfat /boot/efi");
    assert_eq!(vda.because, ["in use at /, /boot/efi"]);
    assert!(disk("loop0").because[0].contains("core_1.snap"));
    assert_eq!(disk("sr0").because, ["it has no medium"]);

    let found = find(&system("rocky-vmware"));
    let disk = by_name(&found);
    let sda = disk("sda");
    assert_eq!(sda.path, "/dev/disk/by-id/scsi-36000c290000000000000000000000000");
    assert_eq!((sda.model.as_str(), sda.wwn.as_str()), ("Virtual disk", "naa.6000c290000000000000000000000000"));
    assert_eq!(sda.summary(), "dos: xfs /boot, luks (lvm (xfs /, swap))");
    assert_eq!(sda.because, ["in use at /, /boot"]);
    assert_eq!(disk("sdb").summary(), "md: xfs /srv");
    let protected: Vec<_> = found.iter().filter(|disk| disk.protect).map(|disk| disk.name.as_str()).collect();
    assert_eq!(protected, ["md0", "sda", "sdb", "sdc", "sdf", "sdg"]);
    for (name, why) in [
        ("dm-0", "made of sda2"),
        ("dm-1", "made of dm-0"),
        ("md127", "made of sdb, sdc"),
        ("sdd", "nothing but swap"),
        ("sde", "it is tiny"),
        ("sdh", "seen at md0 only"),
    ] {
        let disk = disk(name);
        assert!(disk.because.iter().any(|found| found.contains(why)), "{name}: {:?}", disk.because);
    }
    assert_eq!(disk("sdf").mounted_at, ["/pool"]);
    assert_eq!(disk("sdg").mounted_at, ["/pool"], "a btrfs lies on all of its devices");
}

#[test]
fn what_lies_on_a_protected_disk_is_found_through_every_layer() {
    let numbers = |list: &[(u32, u32)]| -> BTreeSet<DeviceNumber> {
        list.iter().map(|(major, minor)| DeviceNumber { major: *major, minor: *minor }).collect()
    };
    let planned = |name: &str, protected: &[(u32, u32)]| -> Vec<PathBuf> {
        let plan = plan(&system(name), &numbers(protected));
        plan.targets.iter().map(|target| target.mount_points[0].clone()).collect()
    };
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
    // Through LVM and encryption; what has more below it comes first.
    assert_eq!(planned("rocky-vmware", &[(8, 0)]), paths(&["/", "/boot"]));
    assert_eq!(planned("rocky-vmware", &[(8, 2)]), paths(&["/"]), "a partition alone");
    assert_eq!(planned("rocky-vmware", &[(8, 32)]), paths(&["/srv"]), "one half of a mirror");
    assert_eq!(planned("rocky-vmware", &[(8, 96)]), paths(&["/pool"]), "the other device of a btrfs");
    assert_eq!(planned("rocky-vmware", &[(8, 48), (9, 0)]), paths(&[]), "swap, and what is not mounted");
    assert_eq!(planned("debian-kvm", &[(254, 0)]), paths(&["/", "/boot/efi"]), "never what is read-only");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Any file of a system may hold anything.
    #[test]
    fn any_content_is_answered(seed in any::<prop::sample::Index>(), bytes in prop::collection::vec(any::<u8>(), 0..300), cut: bool) {
        const FILES: [&str; 16] = [
            "etc/os-release", "etc/fstab", "etc/crypttab", "etc/mdadm.conf", "etc/resolv.conf", "proc/net/route",
            "proc/net/fib_trie", "proc/net/if_inet6", "proc/net/ipv6_route", "proc/self/mountinfo", "proc/meminfo",
            "proc/cpuinfo", "sys/devices/system/cpu/online", "sys/devices/virtual/block/dm-0/dm/uuid",
            "boot/initramfs-5.14.0-427.el9.x86_64.img", "dev/sda",
        ];
        let folder = tempfile::tempdir().expect("a temporary folder");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/systems/rocky-vmware");
        let copied = std::process::Command::new("cp").arg("-a").arg(source).arg(folder.path().join("copy")).status();
        prop_assert!(copied.is_ok_and(|status| status.success()));
        let path = folder.path().join("copy").join(FILES[seed.index(FILES.len())]);
        let mut content = std::fs::read(&path).unwrap_or_default();
        if cut {
            content.truncate(bytes.len());
        } else {
            content.extend(&bytes);
        }
        std::fs::write(&path, content).expect("written");
        let root = SystemRoot::at(folder.path().join("copy"));
        prop_assert!(MachineDescription::read(&root).document().len() <= DESCRIPTION_BYTES_MAX);
        find(&root).iter().for_each(|disk| drop(disk.summary()));
        plan(&root, &BTreeSet::from([DeviceNumber { major: 8, minor: 0 }]));
    }
}
