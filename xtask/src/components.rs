//! Programs that tests and benchmarks use beside the Rust toolchain: which are missing, and how this machine's package
//! manager brings them. Nothing that is installed is upgraded, downgraded or removed: only packages whose program is
//! missing are asked for, with the options that refuse the rest.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt;
use crate::process::{self, find_program};

/// A program and the package that has it. Where distributions moved it, several packages are tried in turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Component {
    pub(crate) program: &'static str,
    apt: &'static [&'static str],
    dnf: &'static [&'static str],
    zypper: &'static [&'static str],
    pacman: &'static [&'static str],
}

const fn component(
    program: &'static str,
    apt: &'static [&'static str],
    dnf: &'static [&'static str],
    zypper: &'static [&'static str],
    pacman: &'static [&'static str],
) -> Component {
    Component { program, apt, dnf, zypper, pacman }
}

const fn libnbd(program: &'static str) -> Component {
    component(program, &["libnbd-bin"], &["libnbd"], &["libnbd"], &["libnbd"])
}

const fn qemu(program: &'static str) -> Component {
    component(program, &["qemu-utils"], &["qemu-img"], &["qemu-tools"], &["qemu-img"])
}

const fn e2fsprogs(program: &'static str) -> Component {
    component(program, &["e2fsprogs"], &["e2fsprogs"], &["e2fsprogs"], &["e2fsprogs"])
}

/// What the tests use.
pub(crate) const FOR_TESTS: &[Component] = &[
    libnbd("nbdinfo"),
    libnbd("nbdcopy"),
    component("nbdfuse", &["libnbd-bin", "nbdfuse"], &["nbdfuse"], &["nbdfuse", "libnbd"], &["libnbd"]),
    component("fusermount3", &["fuse3"], &["fuse3"], &["fuse3"], &["fuse3"]),
    qemu("qemu-img"),
    qemu("qemu-io"),
    qemu("qemu-nbd"),
    e2fsprogs("mke2fs"),
    e2fsprogs("e2fsck"),
    e2fsprogs("mkfs.ext4"),
    component("python3", &["python3"], &["python3"], &["python3"], &["python"]),
    component("musl-gcc", &["musl-tools"], &["musl-gcc"], &["musl-devel-static"], &["musl"]),
    component("clang", &["clang"], &["clang"], &["clang"], &["clang"]),
    component("llvm-strip", &["llvm"], &["llvm"], &["llvm"], &["llvm"]),
    component(
        "qemu-system-x86_64",
        &["qemu-system-x86"],
        &["qemu-system-x86-core"],
        &["qemu-x86"],
        &["qemu-system-x86"],
    ),
    component("busybox", &["busybox-static"], &["busybox"], &["busybox-static"], &["busybox"]),
    component("initdb", &["postgresql"], &["postgresql-server"], &["postgresql-server"], &["postgresql"]),
    component("pgbench", &["postgresql"], &["postgresql-contrib"], &["postgresql-contrib"], &["postgresql"]),
    component("mariadbd", &["mariadb-server-core"], &["mariadb-server"], &["mariadb"], &["mariadb"]),
    component("mariadb", &["mariadb-client-core"], &["mariadb"], &["mariadb-client"], &["mariadb-clients"]),
    component("losetup", &["mount"], &["util-linux"], &["util-linux"], &["util-linux"]),
    component("dmsetup", &["dmsetup"], &["device-mapper"], &["device-mapper"], &["device-mapper"]),
    component("mkfs.xfs", &["xfsprogs"], &["xfsprogs"], &["xfsprogs"], &["xfsprogs"]),
    component("mkfs.btrfs", &["btrfs-progs"], &["btrfs-progs"], &["btrfsprogs"], &["btrfs-progs"]),
];

/// What the benchmarks compare with and build their disk with.
pub(crate) const FOR_BENCHMARKS: &[Component] = &[
    e2fsprogs("mke2fs"),
    component("zstd", &["zstd"], &["zstd"], &["zstd"], &["zstd"]),
    component("restic", &["restic"], &["restic"], &["restic"], &["restic"]),
    component("borg", &["borgbackup"], &["borgbackup"], &["borgbackup"], &["borg"]),
    qemu("qemu-img"),
    qemu("qemu-nbd"),
    libnbd("nbdcopy"),
    component("fio", &["fio"], &["fio"], &["fio"], &["fio"]),
];

/// Those of `wanted` that this machine lacks.
pub(crate) fn missing(wanted: &[Component]) -> Vec<Component> {
    wanted.iter().filter(|component| find_program(component.program).is_none()).copied().collect()
}

/// How far `provide` may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permission {
    /// Install without a question: CI.
    Install,
    /// Ask a person at a terminal; without a terminal install as root, otherwise stop and print the command.
    Ask,
    /// Only say what is missing.
    Never,
}

/// Says which of `wanted` are missing and installs them as far as permitted. Missing programs are no error here when
/// nothing may be installed: what needs them says `SKIPPED`.
///
/// Package lists that are not the machine's own are kept in `folder`.
pub(crate) fn provide(wanted: &[Component], permission: Permission, folder: &Path) -> Result<()> {
    let lacking = missing(wanted);
    if lacking.is_empty() {
        println!("all {} programs are here", wanted.len());
        return Ok(());
    }
    println!("missing: {}", lacking.iter().map(|c| c.program).collect::<Vec<_>>().join(", "));
    if permission == Permission::Never {
        println!("not installed, as asked; what needs them is skipped");
        return Ok(());
    }
    let Some(manager) = Manager::detect() else {
        bail!("no known package manager (apt-get, dnf, zypper, pacman): install them by hand or pass --no-install");
    };
    let root = rustix::process::geteuid().is_root();
    // The second round asks for the other package of programs that distributions moved.
    for round in 0.. {
        let lacking = missing(wanted);
        let packages = packages_of(&lacking, manager, round);
        if packages.is_empty() {
            break;
        }
        let commands = manager.commands(&packages, root);
        if round == 0 && permission == Permission::Ask && !root && !confirmed(&commands) {
            let lines: Vec<String> = commands.iter().map(|(command, _)| process::describe(command)).collect();
            bail!("install them with\n  {}\nor go on without them: --no-install", lines.join("\n  "));
        }
        for (mut command, required) in commands {
            match process::run(&mut command) {
                Err(error) if required => println!("warning: {error:#}"),
                Err(error) => println!("notice: {error:#}"),
                Ok(()) => {}
            }
        }
        // One package that does not fit beside what is here keeps out the others that are asked for with it.
        if packages.len() > 1 {
            for package in packages_of(&missing(wanted), manager, round) {
                let (mut install, _) = manager.commands(&[package], root).pop().context("a manager has a command")?;
                if let Err(error) = process::run(&mut install) {
                    println!("warning: {error:#}");
                }
            }
        }
    }
    if manager == Manager::Apt && root {
        let packages = packages_of(&missing(wanted), manager, 0);
        if !packages.is_empty()
            && let Err(error) = apt::install_backports(&packages, folder)
        {
            println!("warning: {error:#}");
        }
    }
    let lacking = missing(wanted);
    if !lacking.is_empty() {
        // Not fatal: each test that needs one says SKIPPED, and CI fails on that.
        println!("still missing: {}", lacking.iter().map(|c| c.program).collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

fn packages_of(lacking: &[Component], manager: Manager, round: usize) -> Vec<&'static str> {
    let mut packages: Vec<_> = lacking.iter().filter_map(|c| manager.packages(c).get(round)).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn confirmed(commands: &[(Command, bool)]) -> bool {
    if !std::io::stdin().is_terminal() {
        return false;
    }
    println!("to be run:");
    for (command, _) in commands {
        println!("  {}", process::describe(command));
    }
    print!("install now? [y/N] ");
    let mut answer = String::new();
    std::io::stdout().flush().is_ok()
        && std::io::stdin().read_line(&mut answer).is_ok()
        && matches!(answer.trim(), "y" | "Y" | "yes")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manager {
    Apt,
    Dnf,
    Zypper,
    Pacman,
}

impl Manager {
    fn detect() -> Option<Manager> {
        [("apt-get", Manager::Apt), ("dnf", Manager::Dnf), ("zypper", Manager::Zypper), ("pacman", Manager::Pacman)]
            .into_iter()
            .find(|(program, _)| find_program(program).is_some())
            .map(|(_, manager)| manager)
    }

    fn packages(self, component: &Component) -> &'static [&'static str] {
        match self {
            Manager::Apt => component.apt,
            Manager::Dnf => component.dnf,
            Manager::Zypper => component.zypper,
            Manager::Pacman => component.pacman,
        }
    }

    /// What to run, and whether its failure deserves a warning (an outdated package list often still serves).
    fn commands(self, packages: &[&str], root: bool) -> Vec<(Command, bool)> {
        let start = |words: &[&str]| {
            let mut words = words.iter();
            let mut command = if root {
                Command::new(words.next().expect("every call below names a program"))
            } else {
                let mut sudo = Command::new("sudo");
                // Never wait for a password where nobody can type one.
                if !std::io::stdin().is_terminal() {
                    sudo.arg("-n");
                }
                sudo
            };
            command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
            command
        };
        let install = |words: &[&str]| {
            let mut command = start(words);
            command.args(packages);
            (command, true)
        };
        match self {
            Manager::Apt => vec![
                (start(&["apt-get", "-o", "DPkg::Lock::Timeout=300", "-q", "update"]), false),
                // A package may be newer than the enabled suites (backports): nothing that is here may be replaced.
                install(&[
                    "apt-get",
                    "-o",
                    "DPkg::Lock::Timeout=300",
                    "-q",
                    "install",
                    "-y",
                    "--no-install-recommends",
                    "--no-upgrade",
                    "--no-remove",
                ]),
            ],
            Manager::Dnf => vec![install(&["dnf", "install", "-y", "--setopt=install_weak_deps=False"])],
            Manager::Zypper => vec![install(&["zypper", "--non-interactive", "install", "--no-recommends"])],
            Manager::Pacman => vec![install(&["pacman", "-S", "--needed", "--noconfirm"])],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_asked_for_once_and_alternatives_in_the_second_round() {
        let lacking = [FOR_TESTS[0], FOR_TESTS[1], FOR_TESTS[2]];
        assert_eq!(packages_of(&lacking, Manager::Apt, 0), ["libnbd-bin"]);
        assert_eq!(packages_of(&lacking, Manager::Apt, 1), ["nbdfuse"]);
        assert!(packages_of(&lacking, Manager::Apt, 2).is_empty());
        assert_eq!(packages_of(&lacking, Manager::Dnf, 0), ["libnbd", "nbdfuse"]);
    }

    #[test]
    fn apt_may_replace_nothing() {
        let commands = Manager::Apt.commands(&["qemu-utils"], true);
        let install = process::describe(&commands[1].0);
        assert!(install.ends_with("--no-upgrade --no-remove qemu-utils"), "{install}");
        assert!(!install.contains("allow-downgrades"));
    }

    #[test]
    fn ordinary_users_go_through_sudo_with_the_program_name() {
        let commands = Manager::Dnf.commands(&["libnbd"], false);
        let install = process::describe(&commands[0].0);
        assert!(install.starts_with("sudo"), "{install}");
        assert!(install.contains("dnf install"), "{install}");
    }

    #[test]
    fn every_component_has_a_package_everywhere() {
        for component in FOR_TESTS.iter().chain(FOR_BENCHMARKS) {
            for manager in [Manager::Apt, Manager::Dnf, Manager::Zypper, Manager::Pacman] {
                assert!(!manager.packages(component).is_empty(), "{} {manager:?}", component.program);
            }
        }
    }
}
