//! An emulated machine with a kernel of the distribution and a small system on its root disk: a shell, the agent, and a load
//! that keeps a ledger. Its processes are driven through a serial line.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::site::done;

/// Emulation is slow, and the machine may be busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
const UP: &str = "farshore-guest: up";
/// In the order in which they need each other.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// The first program, in memory: finds the disk and hands over to the system on it.
const INITRAMFS: &str = "#!/bin/busybox sh
busybox mkdir -p /proc /dev /new
busybox mount -t proc none /proc
busybox mount -t devtmpfs none /dev
for module in $(busybox cat /modules/order); do busybox insmod /modules/$module.ko; done
until busybox mount -t ext4 /dev/vda /new; do busybox sleep 0.1; done
busybox mount -o move /dev /new/dev
busybox umount /proc
exec busybox switch_root /new /init
";

/// The first program on the disk. A shell that writes to a terminal would be one for people: it would repeat what it reads.
const INIT: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin HOME=/
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /tmp
mount -t tmpfs none /run
mount -t bpf none /sys/fs/bpf
mount -t ext4 /dev/vdb /data
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
# Open from here on: what arrives while nobody has the line open is lost.
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo 'farshore-guest: up'
while true; do sh </dev/ttyS1 2>&1 | cat >/dev/ttyS1; done
";

/// Writes to the root disk: each number is in the ledger before its files are written, and synced before it is told.
/// A size may be durable before the bytes that it counts, so a ledger that lost its power, or was left at any point, may end
/// with zeroes where a line was not synced yet. They are taken away before it goes on, or they would stand between its lines.
const LOAD: &str = "#!/bin/busybox sh
tr -d '\\000' < /ledger > /ledger.mended && sync && mv /ledger.mended /ledger && sync
i=$(tail -n 1 /ledger)
while [ ! -e /tmp/stop ]; do
	i=$((i+1))
	echo $i >> /ledger
	dd if=/dev/urandom of=/data/$((i%40)) bs=16k count=$((1+i%8)) 2>/dev/null
	sync
	echo $i > /tmp/next && mv /tmp/next /tmp/synced
done
";

/// Where the distribution's kernels are, and what else is needed; why not, in words.
pub(crate) fn kernel() -> Result<PathBuf, String> {
    let folder = std::env::var_os("FARSHORE_KERNELS").ok_or("FARSHORE_KERNELS names no folder with kernels")?;
    for program in ["qemu-system-x86_64", "qemu-img", "busybox", "mke2fs", "e2fsck", "debugfs"] {
        find(program).ok_or(format!("{program} is not installed"))?;
    }
    let kernel = PathBuf::from(folder).join("6.1");
    if kernel.exists() { Ok(kernel) } else { Err(format!("{} does not exist", kernel.display())) }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).map(|folder| folder.join(program));
    folders.chain(["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(program))).find(|file| file.is_file())
}

fn put(root: &Path, name: &str, content: &[u8]) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A program of this machine and the libraries that it is linked with.
fn put_program(root: &Path, name: &str, program: &Path) {
    put(root, name, &fs::read(program).unwrap());
    // Fails for a static program, which needs nothing.
    let listed = Command::new("ldd").arg(program).output().unwrap();
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path).split_whitespace().next().unwrap_or_default();
        if path.starts_with('/') {
            put(root, path.trim_start_matches('/'), &fs::read(path).unwrap());
        }
    }
}

/// Writes a root disk of `size` with `agent` on it.
pub(crate) fn make_disk(folder: &Path, disk: &Path, size: &str, agent: &Path, files: &[(&str, &str)]) {
    let root = folder.join("root");
    let stripped = folder.join("agent.stripped");
    done(Command::new("strip").arg("-o").arg(&stripped).arg(agent));
    put_program(&root, "bin/busybox", &find("busybox").unwrap());
    put_program(&root, "bin/farshore-agent", &stripped);
    for name in done(Command::new("busybox").arg("--list")).lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    for name in ["proc", "sys", "dev", "tmp", "run", "data", "var"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    put(&root, "init", INIT.as_bytes());
    put(&root, "bin/load", LOAD.as_bytes());
    put(&root, "ledger", b"0\n");
    for (name, content) in files {
        put(&root, name, content.as_bytes());
    }
    done(Command::new(find("mke2fs").unwrap()).args(["-q", "-F", "-t", "ext4", "-d"]).arg(&root).arg(disk).arg(size));
    fs::remove_dir_all(root).unwrap();
}

/// Writes the disk for `/data`.
pub(crate) fn make_data_disk(disk: &Path, size: &str) {
    done(Command::new(find("mke2fs").unwrap()).args(["-q", "-F", "-t", "ext4"]).arg(disk).arg(size));
}

/// Writes the archive that the kernel begins with, and returns the kernel's own file.
pub(crate) fn make_initramfs(folder: &Path, kernel: &Path, initramfs: &Path) -> PathBuf {
    let files = folder.join("initramfs.d");
    put_program(&files, "bin/busybox", &find("busybox").unwrap());
    let boot = fs::read_dir(kernel.join("boot")).unwrap().map(|entry| entry.unwrap().path());
    let image =
        boot.into_iter().find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-")).unwrap();
    let release = image.file_name().unwrap().to_string_lossy().trim_start_matches("vmlinuz-").to_owned();
    let modules = kernel.join("lib/modules").join(release).join("kernel");
    let mut order = String::new();
    for module in MODULES {
        // One that is not there is built in.
        if let Ok(content) = fs::read(modules.join(format!("{module}.ko"))) {
            let name = Path::new(module).file_name().unwrap().to_string_lossy();
            put(&files, &format!("modules/{name}.ko"), &content);
            order += &format!("{name}\n");
        }
    }
    put(&files, "modules/order", order.as_bytes());
    put(&files, "init", INITRAMFS.as_bytes());
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | busybox cpio -o -H newc"]).current_dir(&files).stderr(Stdio::null());
    assert!(pack.stdout(File::create(initramfs).unwrap()).status().unwrap().success());
    fs::remove_dir_all(files).unwrap();
    image
}

/// What is plugged in.
pub(crate) struct Hardware<'a> {
    pub(crate) folder: &'a Path,
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// As QEMU names a disk: a file, or `nbd+unix:///…`.
    pub(crate) disk: &'a str,
    /// In which format all disks are, in QEMU's words.
    pub(crate) format: &'a str,
    /// More disks.
    pub(crate) more: &'a [PathBuf],
}

/// A running machine; its plug is pulled when dropped.
pub(crate) struct Machine {
    emulator: Child,
    console: PathBuf,
    monitor: PathBuf,
    line: UnixStream,
    answers: BufReader<UnixStream>,
    asked: u32,
}

impl Machine {
    /// Boots and waits until the system on the disk is up.
    pub(crate) fn boot(hardware: &Hardware<'_>) -> Machine {
        let console = hardware.folder.join("console");
        let socket = hardware.folder.join("serial");
        let monitor = hardware.folder.join("monitor");
        // What an earlier start left would be taken for this one's.
        for left in [&console, &socket, &monitor] {
            let _ = fs::remove_file(left);
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "2", "-m", "768"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-kernel")
            .arg(hardware.kernel)
            .arg("-initrd")
            .arg(hardware.initramfs)
            .args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-chardev")
            .arg(format!("socket,id=line,path={},server=on,wait=off", socket.display()))
            .args(["-serial", "chardev:line"])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()));
        let disks = std::iter::once(hardware.disk.to_owned())
            .chain(hardware.more.iter().map(|disk| disk.display().to_string()));
        for (index, disk) in disks.enumerate() {
            let format = hardware.format;
            command.arg("-drive").arg(format!("file={disk},format={format},if=none,id=disk{index},discard=unmap"));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{index},serial=guest-disk-{index}"));
        }
        let mut emulator = command.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 starts");
        let began = Instant::now();
        let said = |console: &Path| String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
        while !said(&console).contains(UP) {
            let ended = emulator.try_wait().unwrap();
            if ended.is_some() || began.elapsed() > PATIENCE {
                let _ = emulator.kill();
                let _ = emulator.wait();
                panic!("the guest does not come up ({ended:?}):\n{}", said(&console));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let line = UnixStream::connect(socket).unwrap();
        line.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(line.try_clone().unwrap());
        Machine { emulator, console, monitor, line, answers, asked: 0 }
    }

    /// Keeps the whole machine as it is, memory and disks, or makes it what was kept. `words`: `savevm NAME` or
    /// `loadvm NAME`.
    pub(crate) fn snapshot(&self, words: &str) {
        let said = self.hardware("human-monitor-command", &json!({ "command-line": words }));
        assert_eq!(said["return"], "", "{words}");
    }

    /// Has the emulator do something to the hardware, in the words of its monitor protocol; its answer.
    pub(crate) fn hardware(&self, command: &str, arguments: &Value) -> Value {
        let mut monitor = UnixStream::connect(&self.monitor).unwrap();
        monitor.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answers = BufReader::new(monitor.try_clone().unwrap()).lines();
        let wanted = json!({ "execute": command, "arguments": arguments });
        let [_, answer] = [json!({ "execute": "qmp_capabilities" }), wanted].map(|request| {
            writeln!(monitor, "{request}").unwrap();
            // Greeting and events come in between.
            let answer = answers.find_map(|line| {
                let said: Value = serde_json::from_str(&line.unwrap()).unwrap();
                (said.get("return").is_some() || said.get("error").is_some()).then_some(said)
            });
            let answer = answer.expect("the monitor answers");
            assert!(answer.get("error").is_none(), "{request}: {answer}");
            answer
        });
        answer
    }

    /// Has the guest's shell run `words`; its exit code and what it printed.
    pub(crate) fn ask(&mut self, words: &str) -> (i32, String) {
        self.asked += 1;
        let mark = format!("answered-{} ", self.asked);
        writeln!(self.line, "{words}\necho \"{mark}$?\"").expect("the guest's serial line takes commands");
        let mut said = String::new();
        loop {
            let mut line = String::new();
            let read = self.answers.read_line(&mut line);
            assert!(
                read.as_ref().is_ok_and(|bytes| *bytes > 0),
                "`{words}` is not answered ({read:?}): {said}\n{}",
                fs::read_to_string(&self.console).unwrap_or_default()
            );
            if let Some((before, code)) = line.split_once(&mark) {
                said += before;
                return (code.trim().parse().expect("an exit code"), said);
            }
            said += &line;
        }
    }

    /// As [`Machine::ask`], of what must succeed.
    #[track_caller]
    pub(crate) fn run(&mut self, words: &str) -> String {
        let (code, said) = self.ask(words);
        assert_eq!(code, 0, "`{words}` in the guest: {said}\n{}", self.ask("tail -n 20 /tmp/agent.log").1);
        said
    }

    /// Pulls the plug.
    pub(crate) fn cut_power(self) {
        drop(self);
    }

    /// Ends as an operating system ends: what is in memory is written, the root disk is left clean.
    pub(crate) fn shut_down(mut self) {
        self.run("touch /tmp/stop; killall load; sync; mount -o remount,ro /");
        writeln!(self.line, "poweroff -f").unwrap();
        let began = Instant::now();
        while self.emulator.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < PATIENCE, "the guest does not switch itself off");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}
