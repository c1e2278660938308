//! Loop devices with file systems on them, and a note of what cannot be tested here.
#![allow(dead_code, unreachable_pub)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use agent::system::DeviceNumber;

/// Says in a way that the test command collects why a test did not run.
pub fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED: {test}: {why}\n");
    print!("{line}");
    if let Ok(path) = std::env::var("FARSHORE_SKIP_LOG") {
        let log = OpenOptions::new().append(true).create(true).open(path);
        log.and_then(|mut log| log.write_all(line.as_bytes())).expect("the skip is noted");
    }
}

pub fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let run = Command::new(program).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

pub fn output_of(program: &str, arguments: &[&str]) -> String {
    let run = Command::new(program).args(arguments).output().expect("it runs");
    String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr)
}

/// An image on a loop device, mounted or not. Gone when dropped, also by a failing test.
pub struct Loop {
    pub device: PathBuf,
    pub mount: PathBuf,
    fs_type: &'static str,
    mounted: bool,
}

impl Loop {
    /// An image of its own with a new file system, mounted at `mount`; `None` with a note if that cannot be had here.
    pub fn make(test: &str, image: &Path, bytes: u64, fs_type: &'static str, mount: &Path) -> Option<Loop> {
        Loop::make_with(test, image, bytes, fs_type, mount, "defaults")
    }

    /// As [`Loop::make`], with mount options.
    pub fn make_with(
        test: &str,
        image: &Path,
        bytes: u64,
        fs_type: &'static str,
        mount: &Path,
        options: &str,
    ) -> Option<Loop> {
        File::create(image).and_then(|file| file.set_len(bytes)).expect("an image");
        let Some(mut made) = Loop::attach(image, fs_type, mount) else {
            skip(test, "no loop device can be made");
            return None;
        };
        let force = if fs_type == "ext4" { "-F" } else { "-f" };
        let device = made.device.display().to_string();
        if !succeeds(&format!("mkfs.{fs_type}"), &["-q", force, &device]) || !made.mount(options) {
            skip(test, &format!("{fs_type} cannot be made or mounted"));
            return None;
        }
        Some(made)
    }

    /// The image as it is.
    pub fn attach(image: &Path, fs_type: &'static str, mount: &Path) -> Option<Loop> {
        let made = Command::new("losetup").args(["-f", "--show"]).arg(image).output().ok()?;
        let device = PathBuf::from(String::from_utf8_lossy(&made.stdout).trim());
        made.status.success().then(|| Loop { device, mount: mount.to_owned(), fs_type, mounted: false })
    }

    pub fn mount(&mut self, options: &str) -> bool {
        std::fs::create_dir_all(&self.mount).expect("created");
        let (device, mount) = (self.device.display().to_string(), self.mount.display().to_string());
        self.mounted = succeeds("mount", &["-t", self.fs_type, "-o", options, &device, &mount]);
        self.mounted
    }

    pub fn unmount(&mut self) {
        let mount = self.mount.display().to_string();
        let done = (0..100).any(|_| {
            let done = succeeds("umount", &[&mount]);
            if !done {
                thread::sleep(Duration::from_millis(50));
            }
            done
        });
        assert!(done, "{mount} is unmounted");
        self.mounted = false;
    }

    pub fn number(&self) -> DeviceNumber {
        DeviceNumber::of(std::fs::metadata(&self.device).expect("there").rdev())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.mounted {
            // A test that failed may have left it frozen.
            succeeds("fsfreeze", &["--unfreeze", &self.mount.display().to_string()]);
            succeeds("umount", &["-l", &self.mount.display().to_string()]);
        }
        succeeds("losetup", &["-d", &self.device.display().to_string()]);
    }
}
