//! File systems on loop devices, frozen and thawed by the running kernel. Needs root; says SKIPPED otherwise.
#![cfg(target_os = "linux")]

#[path = "site/loops.rs"]
mod loops;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use agent::consistency::frozen::{FreezePlan, FreezeProblem, FrozenFileSystems, OpenTargets, plan, thaw_left_over};
use agent::system::SystemRoot;
use loops::{Loop, succeeds};
use world::SystemClock;

const DISK_BYTES: u64 = 64 << 20;
/// What a child of a test is to freeze.
const CHILD: &str = "FARSHORE_TEST_FREEZER";

fn plan_of(disks: &[&Loop]) -> FreezePlan {
    let protected: BTreeSet<_> = disks.iter().map(|disk| disk.number()).collect();
    let plan = plan(&SystemRoot::running(), &protected);
    // This machine's own file systems are none of a test's business.
    assert!(
        plan.targets
            .iter()
            .all(|target| target.mount_points.iter().all(|place| place.starts_with(std::env::temp_dir())))
    );
    plan
}

fn mount_points(plan: &FreezePlan) -> Vec<PathBuf> {
    plan.targets.iter().map(|target| target.mount_points[0].clone()).collect()
}

fn freeze(plan: &FreezePlan, limit: Duration) -> Result<FrozenFileSystems, FreezeProblem> {
    let open = OpenTargets::open(plan)?;
    open.flush()?;
    open.freeze(&SystemClock, limit)
}

/// Writes a file and syncs it; tells when that was done.
fn write(folder: &Path, name: &str) -> Receiver<Instant> {
    let (tell, done) = mpsc::channel();
    let path = folder.join(name);
    thread::spawn(move || {
        let mut file = File::create(&path).expect("created");
        file.write_all(&[7; 100_000]).expect("written");
        rustix::fs::fsync(&file).expect("synced");
        tell.send(Instant::now()).expect("the test waits");
    });
    done
}

fn goes_on(done: &Receiver<Instant>) {
    done.recv_timeout(Duration::from_secs(5)).expect("the write goes through");
}

fn waits(done: &Receiver<Instant>) -> bool {
    done.recv_timeout(Duration::from_millis(300)) == Err(RecvTimeoutError::Timeout)
}

#[test]
fn writers_wait_until_the_thaw_or_the_deadline() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (fs_type, bytes) in [("ext4", DISK_BYTES), ("xfs", 320 << 20), ("btrfs", 256 << 20)] {
        let (image, mount) = (folder.path().join(format!("{fs_type}.img")), folder.path().join(fs_type));
        let test = format!("writers_wait_until_the_thaw_or_the_deadline/{fs_type}");
        let Some(disk) = Loop::make(&test, &image, bytes, fs_type, &mount) else { continue };
        let plan = plan_of(&[&disk]);
        assert_eq!(mount_points(&plan), std::slice::from_ref(&mount));
        assert!(plan.out_of_sight.is_empty(), "{plan:?}");

        let frozen = freeze(&plan, Duration::from_secs(20)).expect("frozen");
        let done = write(&mount, "a");
        assert!(waits(&done), "{fs_type}: nobody writes");
        assert_eq!(frozen.at_rest().claim(|| 5), Some((5, true)));
        let at_rest = frozen.at_rest();
        let (_, held) = frozen.thaw(&SystemClock);
        assert!(held);
        done.recv_timeout(Duration::from_secs(5)).expect("it goes on");
        assert_eq!(at_rest.claim(|| panic!("nobody may claim rest now")), None::<((), bool)>);

        // Nobody thaws: the guard does.
        let since = Instant::now();
        let frozen = freeze(&plan, Duration::from_millis(700)).expect("frozen");
        let done = write(&mount, "b");
        let at = done.recv_timeout(Duration::from_secs(5)).expect("the guard thaws");
        let after = at - since;
        assert!((Duration::from_millis(690)..Duration::from_secs(3)).contains(&after), "{fs_type}: after {after:?}");
        assert_eq!(frozen.at_rest().claim(|| panic!("nobody may claim rest now")), None::<((), bool)>);
        let (_, held) = frozen.thaw(&SystemClock);
        assert!(!held, "somebody wrote");

        // A marker that is just being written is waited for.
        let frozen = freeze(&plan, Duration::from_millis(200)).expect("frozen");
        let done = write(&mount, "c");
        let (waited, held) = frozen
            .at_rest()
            .claim(|| {
                thread::sleep(Duration::from_millis(500));
                done.try_recv().is_err()
            })
            .expect("in time");
        assert!(waited && held, "{fs_type}: nobody wrote while the marker was written");
        done.recv_timeout(Duration::from_secs(5)).expect("then the guard thaws");
        drop(frozen);

        // Somebody else's freeze is neither joined nor ended.
        let place = mount.display().to_string();
        assert!(succeeds("fsfreeze", &["--freeze", &place]));
        let refused = freeze(&plan, Duration::from_secs(20)).err().expect("refused");
        assert!(matches!(refused, FreezeProblem::FrozenByOthers(_)), "{refused:?}");
        let done = write(&mount, "d");
        assert!(waits(&done));
        assert!(succeeds("fsfreeze", &["--unfreeze", &place]));
        done.recv_timeout(Duration::from_secs(5)).expect("it goes on");
    }
}

/// Not a test of its own: freezes what it is told to, says so, and stays.
#[test]
fn a_process_that_freezes() {
    let Ok(mount) = std::env::var(CHILD) else { return };
    let target = PathBuf::from(mount);
    let mounts = SystemRoot::running().mounts();
    let device = mounts.iter().find(|known| known.mount_point == target).expect("mounted").device;
    let plan = plan(&SystemRoot::running(), &BTreeSet::from([device]));
    assert_eq!(mount_points(&plan), [target]);
    let frozen = freeze(&plan, Duration::from_secs(100)).expect("frozen");
    println!("\nfrozen");
    thread::sleep(Duration::from_secs(100));
    drop(frozen);
}

struct Freezer(Child);

impl Freezer {
    fn start(mount: &Path) -> Freezer {
        let mut child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "a_process_that_freezes", "--nocapture"])
            .env(CHILD, mount)
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        assert!(lines.any(|line| line.expect("readable") == "frozen"), "it freezes");
        Freezer(child)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_that_is_killed_leaves_nothing_frozen() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (image, mount) = (folder.path().join("disk.img"), folder.path().join("mnt"));
    let test = "a_process_that_is_killed_leaves_nothing_frozen";
    let Some(_disk) = Loop::make(test, &image, DISK_BYTES, "ext4", &mount) else { return };
    for _ in 0..5 {
        let mut freezer = Freezer::start(&mount);
        let done = write(&mount, "a");
        assert!(waits(&done), "nobody writes");
        let killed = Instant::now();
        freezer.0.kill().expect("it runs");
        freezer.0.wait().expect("it ends");
        let at = done.recv_timeout(Duration::from_secs(10)).expect("the guard thaws");
        assert!(at - killed < Duration::from_secs(2), "after {:?}", at - killed);
    }
    // Both are killed at once, as when a control group has no memory left: the next start thaws.
    let mut freezer = Freezer::start(&mount);
    let guard = guard_of(freezer.0.id());
    assert!(succeeds("kill", &["-KILL", &guard, &freezer.0.id().to_string()]));
    freezer.0.wait().expect("it ends");
    let done = write(&mount, "b");
    assert!(waits(&done), "nobody is left to thaw");
    let left = std::slice::from_ref(&mount);
    assert_eq!(thaw_left_over(left), left);
    done.recv_timeout(Duration::from_secs(10)).expect("it goes on");
    assert_eq!(thaw_left_over(&[mount]), Vec::<PathBuf>::new());

    // The guard alone is killed: whoever froze still thaws.
    let (image, mount) = (folder.path().join("other.img"), folder.path().join("other"));
    let Some(disk) = Loop::make(test, &image, DISK_BYTES, "ext4", &mount) else { return };
    let frozen = freeze(&plan_of(&[&disk]), Duration::from_secs(20)).expect("frozen");
    assert!(succeeds("kill", &["-KILL", &guard_of(std::process::id())]));
    let done = write(&mount, "a");
    assert!(waits(&done));
    assert!(frozen.thaw(&SystemClock).1);
    done.recv_timeout(Duration::from_secs(10)).expect("it goes on");
}

/// The guard of a process: its only child of that name.
fn guard_of(parent: u32) -> String {
    let of_parent = |pid: &String| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("Name:\tfarshore-thaw\n") && status.contains(&format!("PPid:\t{parent}\n"))
    };
    let find = || SystemRoot::running().names("/proc").into_iter().find(of_parent);
    (0..500)
        .find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            find()
        })
        .expect("the guard runs")
}

#[test]
fn what_lies_on_a_file_is_frozen_before_the_file_system_of_the_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (image, outer) = (folder.path().join("disk.img"), folder.path().join("outer"));
    let test = "what_lies_on_a_file_is_frozen_before_the_file_system_of_the_file";
    let Some(disk) = Loop::make(test, &image, 256 << 20, "ext4", &outer) else { return };
    let inner = folder.path().join("inner");
    let Some(mut upper) = Loop::make(test, &outer.join("inner.img"), DISK_BYTES, "ext4", &inner) else { return };
    let plan = plan_of(&[&disk]);
    assert_eq!(mount_points(&plan), [inner.clone(), outer.clone()]);
    assert_eq!(mount_points(&plan_of(&[&upper])), std::slice::from_ref(&inner), "what lies below it is not touched");
    let dirty = [write(&inner, "dirty"), write(&outer, "dirty")];
    dirty.iter().for_each(goes_on);

    let frozen = freeze(&plan, Duration::from_secs(20)).expect("both are frozen");
    let waiting = [write(&inner, "a"), write(&outer, "a")];
    assert!(waiting.iter().all(waits));
    assert!(frozen.thaw(&SystemClock).1);
    waiting.iter().for_each(goes_on);

    // A second mount of the same file system, and one that hides the first.
    let again = folder.path().join("again");
    std::fs::create_dir(&again).expect("created");
    let (from, to) = (inner.display().to_string(), again.display().to_string());
    assert!(succeeds("mount", &["--bind", &from, &to]));
    let both = plan_of(&[&upper]);
    assert_eq!(both.targets[0].mount_points, [inner.clone(), again.clone()]);
    assert!(succeeds("mount", &["-t", "tmpfs", "tmpfs", &from]));
    let reached = freeze(&plan_of(&[&upper]), Duration::from_secs(20)).map(|frozen| {
        let done = write(&again, "b");
        assert!(waits(&done), "reached through its other mount");
        drop(frozen);
        done.recv_timeout(Duration::from_secs(5)).expect("goes on");
    });
    assert!(succeeds("umount", &[&from]) && succeeds("umount", &[&to]));
    reached.expect("frozen");

    // Nobody writes to what is mounted read-only.
    assert!(succeeds("mount", &["-o", "remount,ro", &from]));
    assert_eq!(plan_of(&[&upper]).targets, []);
    upper.unmount();
    drop(upper);
}

#[test]
fn a_deadline_that_is_too_short_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (image, mount) = (folder.path().join("disk.img"), folder.path().join("mnt"));
    let Some(disk) = Loop::make("a_deadline_that_is_too_short_is_named", &image, DISK_BYTES, "ext4", &mount) else {
        return;
    };
    let late = freeze(&plan_of(&[&disk]), Duration::ZERO).err().expect("too late");
    assert!(late.to_string().contains(&mount.display().to_string()), "{late}");
    write(&mount, "a").recv_timeout(Duration::from_secs(5)).expect("nothing stays frozen");
}
