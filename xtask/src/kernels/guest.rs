//! An emulated machine that runs test programs and ends, and what its console says.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::search_path;

/// Begins the lines of the console that are ours.
const MARK: &str = "farshore-guest:";
/// The last of them.
const END: &str = "farshore-guest: end";

/// The first program of the guest. It runs `lines` and switches the machine off.
pub(super) fn init(lines: &[String]) -> String {
    let (lines, log) = (lines.join("\n"), crate::skips::LOG_VARIABLE);
    format!(
        r#"#!/bin/busybox sh
# The tools before the shell's own.
export PATH=/sbin:/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /etc
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
disk_of() {{
	for folder in /sys/block/nvme*n1; do
		# With multipath the paths are disks as well, which nobody can open.
		[ -b /dev/${{folder##*/}} ] || continue
		case "$(cat $folder/device/serial 2>/dev/null)" in $1*) echo /dev/${{folder##*/}} ;; esac
	done
}}
until [ "$(disk_of {TEMPORARY})" ] && [ "$(disk_of {LOGGED})" ] && [ "$(disk_of {STREAM})" ]; do sleep 0.1; done
mkfs.ext4 -q -F $(disk_of {TEMPORARY})
mount -t ext4 $(disk_of {TEMPORARY}) /tmp
# It has device mapper and md: their tests may not be skipped.
export FARSHORE_LAYERS=yes
export FARSHORE_LOGGED_DISK=$(disk_of {LOGGED}) FARSHORE_STREAM_DISK=$(disk_of {STREAM})
mount -t bpf none /sys/fs/bpf
ln -s /proc/mounts /etc/mtab
ip link set lo up
for module in /modules/*.ko; do insmod $module; done
run() {{
	name=$1
	shift
	echo "{MARK} begin $name"
	/tests/$name --test-threads 1 "$@" 2>&1
	echo "{MARK} $name ended with $?"
}}
cd /tmp
export {log}=/tmp/skipped
touch /tmp/skipped
{lines}
cat /tmp/skipped
echo "{END}"
poweroff -f
"#
    )
}

/// The disks of a guest, by serial number: for temporary files (loop devices on files in memory know less than others),
/// the one whose requests are logged, the one for what was captured of it.
const TEMPORARY: &str = "temporary";
const LOGGED: &str = "logged";
const STREAM: &str = "stream";

/// Sizes in bytes; only what is written takes room.
const DISKS: [(&str, u64); 3] = [(TEMPORARY, 4 << 30), (LOGGED, 128 << 20), (STREAM, 512 << 20)];

/// What is booted.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Path,
    /// Files of the guest are made beside it, with its name.
    pub(super) initramfs: &'a Path,
}

/// What a guest left.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) console: String,
    /// The emulator's log of the requests to one of the disks.
    pub(super) log: Vec<u8>,
    /// What was captured there.
    pub(super) stream: Vec<u8>,
}

impl Guest<'_> {
    /// Runs the machine until it switches itself off.
    pub(super) fn run(&self, limit: Duration) -> Result<Left> {
        let file = |name: &str| self.initramfs.with_extension(name);
        for (name, bytes) in DISKS.into_iter().chain([("log", 0)]) {
            let made = File::create(file(name)).and_then(|file| file.set_len(bytes));
            made.with_context(|| format!("cannot make {}", file(name).display()))?;
        }
        let console = self.boot(limit)?;
        let bytes = |name: &str| fs::read(file(name)).with_context(|| format!("cannot read {}", file(name).display()));
        let left = Left { console, log: bytes("log")?, stream: bytes(STREAM)? };
        for name in DISKS.map(|(name, _)| name).into_iter().chain(["log"]) {
            fs::remove_file(file(name)).with_context(|| format!("cannot remove {}", file(name).display()))?;
        }
        Ok(left)
    }

    /// Its console.
    fn boot(&self, limit: Duration) -> Result<String> {
        let file = |name: &str| self.initramfs.with_extension(name).display().to_string();
        let console = self.initramfs.with_extension("console");
        let raw = |node: &str, name: &str| {
            let file = file(name);
            format!(
                "driver=raw,node-name={node},discard=unmap,file.driver=file,file.discard=unmap,file.filename={file}"
            )
        };
        let nodes = [
            raw("temporary", TEMPORARY),
            raw("behind", LOGGED),
            raw("log", "log"),
            "driver=blklogwrites,node-name=logged,discard=unmap,file=behind,log=log,log-sector-size=512".to_owned(),
            raw("stream", STREAM),
        ];
        let mut command = Command::new("qemu-system-x86_64");
        command
            .env("PATH", search_path())
            // Emulated, because nested virtualisation is seldom there and differs where it is.
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "2", "-m", "1024"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(nodes.iter().flat_map(|node| ["-blockdev", node]))
            .args(
                DISKS.map(|(name, _)| format!("nvme,drive={name},serial={name}")).iter().flat_map(|it| ["-device", it]),
            )
            .args(["-append", "console=ttyS0 panic=-1 quiet"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .stdin(Stdio::null());
        let mut child = command.spawn().context("cannot start qemu-system-x86_64")?;
        let since = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().context("cannot wait for the guest")? {
                break status;
            }
            if since.elapsed() > limit {
                child.kill().context("cannot end the guest")?;
                child.wait().context("cannot wait for the guest")?;
                println!("{}", read(&console)?);
                bail!("the guest did not end within {} s", limit.as_secs());
            }
            std::thread::sleep(Duration::from_millis(200));
        };
        ensure!(status.success(), "the emulator failed: {status}");
        read(&console)
    }
}

fn read(console: &Path) -> Result<String> {
    let bytes = fs::read(console).with_context(|| format!("cannot read {}", console.display()))?;
    Ok(String::from_utf8_lossy(&bytes).replace('\r', ""))
}

/// How many tests passed in a guest that ran `programs` test programs, and the skips, as its console says.
///
/// # Errors
/// It did not get to its end, or a program failed or ran nothing.
pub(super) fn judge(console: &str, programs: usize) -> Result<(usize, Vec<String>)> {
    ensure!(console.lines().any(|line| line.trim() == END), "the guest did not get to its end");
    let ends: Vec<&str> =
        console.lines().filter(|line| line.starts_with(MARK) && line.contains("ended with")).collect();
    ensure!(ends.len() == programs, "{} of {programs} test programs ended", ends.len());
    let failed: Vec<&str> = ends.into_iter().filter(|line| !line.trim_end().ends_with(" 0")).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    let results = console.lines().filter_map(|line| line.trim().strip_prefix("test result: ok. "));
    let passed = results.filter_map(|line| line.split(' ').next()?.parse::<usize>().ok());
    let passed: Vec<usize> = passed.collect();
    ensure!(passed.len() == programs && passed.iter().all(|count| *count > 0), "a test program ran no test");
    Ok((passed.iter().sum(), crate::skips::in_text(console)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "farshore-guest: begin agent\nrunning 2 tests\ntest a ... SKIPPED: a: why\nSKIPPED: b: why\nok\n\
        test result: ok. 2 passed; 0 failed\nfarshore-guest: agent ended with 0\nfarshore-guest: end\n";

    #[test]
    fn only_a_guest_that_ran_everything_passes() {
        let outcome = judge(GOOD, 1).unwrap();
        assert_eq!(outcome, (2, vec!["b: why".to_owned()]));
        for (old, new) in [
            ("ended with 0", "ended with 101"),
            ("farshore-guest: end\n", "Kernel panic\n"),
            ("ok. 2 passed", "ok. 0 passed"),
            ("agent ended", "agent"),
        ] {
            assert!(judge(&GOOD.replace(old, new), 1).is_err(), "{new}");
        }
        assert!(judge(GOOD, 2).is_err());
    }
}
