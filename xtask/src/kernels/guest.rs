//! An emulated machine that runs test programs and ends, and what its console says.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Outcome;
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
mkfs.ext4 -q -F /dev/nvme0n1
mount -t ext4 /dev/nvme0n1 /tmp
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

/// What is booted.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
    /// An image that becomes its folder for temporary files: disks of tests in memory know less than others.
    pub(super) disk: &'a Path,
}

impl Guest<'_> {
    /// Runs the machine until it switches itself off and returns what its console said.
    pub(super) fn run(&self, limit: Duration) -> Result<String> {
        let console = self.initramfs.with_extension("console");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .env("PATH", search_path())
            // Emulated, because nested virtualisation is seldom there and differs where it is.
            .args(["-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "2", "-m", "2048"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-drive")
            .arg(format!("if=none,id=disk,format=raw,cache=unsafe,discard=unmap,file={}", self.disk.display()))
            .args(["-device", "nvme,drive=disk,serial=temporary"])
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

/// What the console of a guest that ran `programs` test programs says.
///
/// # Errors
/// It did not get to its end, or a program failed or ran nothing.
pub(super) fn judge(console: &str, programs: usize) -> Result<Outcome> {
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
    Ok(Outcome { skips: crate::skips::in_text(console), passed: passed.iter().sum() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "farshore-guest: begin agent\nrunning 2 tests\ntest a ... SKIPPED: a: why\nSKIPPED: b: why\nok\n\
        test result: ok. 2 passed; 0 failed\nfarshore-guest: agent ended with 0\nfarshore-guest: end\n";

    #[test]
    fn only_a_guest_that_ran_everything_passes() {
        let outcome = judge(GOOD, 1).unwrap();
        assert_eq!((outcome.passed, outcome.skips), (2, vec!["b: why".to_owned()]));
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
