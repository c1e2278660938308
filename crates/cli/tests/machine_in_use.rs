//! The demo's machine whose disk is in use takes everything down again, whatever becomes of the demo. Needs root and loop
//! devices; says SKIPPED otherwise.
#![cfg(target_os = "linux")]

#[path = "field/skip.rs"]
mod skip;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use skip::skip;

fn start(folder: &Path) -> (Child, BufReader<ChildStdout>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farshore"));
    command.arg("__kernel-machine").arg("--folder").arg(folder).arg("--agent").arg(folder.join("agent.toml"));
    command.args(["--mib", "64", "--seed", "3"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    let said = BufReader::new(child.stdout.take().expect("it was asked for"));
    (child, said)
}

fn line(said: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    said.read_line(&mut line).expect("it speaks");
    line.trim().to_owned()
}

fn is_in_use(device: &str, mount: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("readable");
    let attached = Command::new("losetup").arg(device).output().is_ok_and(|shown| shown.status.success());
    attached || mounts.contains(&mount.display().to_string())
}

#[test]
fn a_disk_in_use_is_written_verified_and_taken_down_when_nobody_wants_it_any_more() {
    let test = "a_disk_in_use_is_written_verified_and_taken_down_when_nobody_wants_it_any_more";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (mut child, mut said) = start(folder.path());
    let first = line(&mut said);
    let Some(device) = first.strip_prefix("ready ") else {
        assert!(child.wait().expect("it ends").success());
        return skip(test, &first);
    };
    let mount = folder.path().join("mnt");
    assert!(is_in_use(device, &mount));
    let mut stdin = child.stdin.take().expect("it was asked for");
    writeln!(stdin, "load").expect("it listens");
    let number = |said: &mut BufReader<ChildStdout>| -> u64 {
        let line = line(said);
        line.strip_prefix("written ").unwrap_or_else(|| panic!("{line}")).parse().expect("a number")
    };
    let written = loop {
        writeln!(stdin, "count").expect("it listens");
        match number(&mut said) {
            0..5 => std::thread::sleep(std::time::Duration::from_millis(20)),
            written => break written,
        }
    };
    writeln!(stdin, "stop").expect("it listens");
    let stopped = number(&mut said);
    assert!(stopped >= written);
    // The disk as a recovery would have it, and one in which a synced file was damaged: the second is noticed.
    let copy = folder.path().join("copy.raw");
    // Not from the device, whose page cache is not the file system's.
    let take_copy = || std::fs::copy(folder.path().join("disk.raw"), &copy).expect("copied");
    take_copy();
    writeln!(stdin, "verify {}", copy.display()).expect("it listens");
    assert_eq!(line(&mut said), format!("holds {stopped}"));
    std::fs::write(mount.join("files/1"), "something else").expect("written");
    assert!(Command::new("sync").status().expect("it runs").success());
    take_copy();
    writeln!(stdin, "verify {}", copy.display()).expect("it listens");
    assert!(line(&mut said).starts_with("wrong file 1 "));
    // Whoever started it is gone, without a word.
    drop(stdin);
    assert_eq!(line(&mut said), "gone");
    assert!(child.wait().expect("it ends").success());
    assert!(!is_in_use(device, &mount), "{device} is left");
}
