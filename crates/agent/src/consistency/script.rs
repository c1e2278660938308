//! Programs that an administrator wants run: only such as nobody but root can change, bounded in time and output.
//!
//! A program is the leader of a process group of its own, and the whole group is killed when its time is over. Its output
//! goes to the log.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};
use world::{Clock, Monotonic};

use crate::system::SystemRoot;

/// Bytes of a program's output that are kept: its beginning.
const OUTPUT_BYTES_MAX: usize = 16 << 10;
/// How often a program is looked at that says nothing.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a program that was told to end may take before it is killed, and a killed one before it is left alone.
const END_GRACE: Duration = Duration::from_secs(1);
/// Links that are followed on the way to a program.
const LINKS_MAX: usize = 40;
/// Where programs find others.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether only root can say what is run under this path.
///
/// # Errors
/// Who else can, in words.
pub(super) fn check_trusted(path: &Path) -> Result<(), String> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let folder = path.parent().ok_or_else(|| format!("{} is no program", path.display()))?;
        check_folders(folder)?;
        let found = fs::symlink_metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if !found.is_symlink() {
            return check_program(&path, &found);
        }
        let target = fs::read_link(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        path = folder.join(target);
    }
    Err(format!("{} leads through too many links", path.display()))
}

fn check_program(path: &Path, found: &fs::Metadata) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("{} {why}", path.display()));
    match found.mode() {
        _ if !found.is_file() => wrong("is no file"),
        _ if found.uid() != 0 => wrong("does not belong to root"),
        mode if mode & 0o022 != 0 => wrong("can be written to by others than root"),
        mode if mode & 0o111 == 0 => wrong("is not executable"),
        _ => Ok(()),
    }
}

/// Every directory on the way must be root's. In one with the sticky bit nobody can replace what is another's.
fn check_folders(folder: &Path) -> Result<(), String> {
    let real = fs::canonicalize(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    for folder in real.ancestors() {
        let found = fs::metadata(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        if found.uid() != 0 || (found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0) {
            return Err(format!("the directory {} can be changed by others than root", folder.display()));
        }
    }
    // `..` after a link leads elsewhere than it reads.
    if folder.components().any(|component| component == Component::ParentDir) {
        return Err(format!("{} holds `..`", folder.display()));
    }
    Ok(())
}

/// A user of the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    uid: u32,
    gid: u32,
    name: String,
    home: String,
}

impl User {
    /// The user of that name.
    pub(super) fn named(root: &SystemRoot, name: &str) -> Option<User> {
        let users = root.text("/etc/passwd")?;
        users.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let [known, _, uid, gid, _, home, ..] = fields[..] else { return None };
            let user =
                || Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()?, name: known.into(), home: home.into() });
            (known == name).then(user)?
        })
    }
}

/// A program ready to be started: nothing of this process's environment, its own process group.
pub(super) fn command(program: &Path, user: Option<&User>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", PATH).env("LANG", "C.UTF-8").current_dir("/").process_group(0);
    if let Some(user) = user {
        command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name);
        if user.uid != rustix::process::geteuid().as_raw() {
            command.uid(user.uid).gid(user.gid);
        }
    }
    command
}

/// A program that was started.
pub(super) struct Running {
    what: String,
    child: Option<Child>,
    output: PipeReader,
    said: Vec<u8>,
    cut: bool,
}

impl Running {
    /// Starts `command`, whose output is collected under the name `what`.
    ///
    /// # Errors
    /// In words.
    pub(super) fn start(what: String, mut command: Command, input: Stdio) -> Result<Running, String> {
        let failed = |error: io::Error| format!("{what} cannot be started: {error}");
        let (output, writer) = io::pipe().map_err(failed)?;
        let flags = rustix::fs::fcntl_getfl(&output).map_err(|error| failed(error.into()))?;
        rustix::fs::fcntl_setfl(&output, flags | rustix::fs::OFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        command.stdin(input).stdout(writer.try_clone().map_err(failed)?).stderr(writer);
        let child = Some(command.spawn().map_err(failed)?);
        drop(command);
        Ok(Running { what, child, output, said: Vec::new(), cut: false })
    }

    /// What it reads from.
    pub(super) fn input(&mut self) -> Option<&mut std::process::ChildStdin> {
        self.child.as_mut()?.stdin.as_mut()
    }

    /// Nothing more will be written to it.
    pub(super) fn close_input(&mut self) {
        if let Some(child) = &mut self.child {
            child.stdin.take();
        }
    }

    /// What it has said so far, from its beginning.
    pub(super) fn said(&self) -> String {
        let mut text = String::from_utf8_lossy(&self.said).trim().to_owned();
        if self.cut {
            text.push_str(" […]");
        }
        text
    }

    /// Whether it still runs.
    pub(super) fn is_running(&mut self) -> bool {
        self.listen(Duration::ZERO);
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Takes what it says, for `wait` at most.
    fn listen(&mut self, wait: Duration) {
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let _ = poll(&mut [PollFd::new(&self.output, PollFlags::IN)], Some(&timeout));
        let mut chunk = [0; 4096];
        // Bounded, so that one who never stops talking is still looked at.
        for _ in 0..64 {
            match self.output.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let room = OUTPUT_BYTES_MAX.saturating_sub(self.said.len());
                    self.cut |= count > room;
                    self.said.extend_from_slice(&chunk[..count.min(room)]);
                }
            }
        }
    }

    /// Waits until it has said `text`.
    ///
    /// # Errors
    /// It ended, or did not say it in time; the whole group is killed then.
    pub(super) fn hear(&mut self, text: &str, clock: &dyn Clock, limit: Duration) -> Result<(), String> {
        let until = clock.monotonic().plus(limit);
        loop {
            let runs = self.is_running();
            if self.said().contains(text) {
                return Ok(());
            }
            if !runs {
                return self.end(clock, Duration::ZERO).and(Err(format!("{} ended too early", self.what)));
            }
            if clock.monotonic() >= until {
                self.kill(clock);
                return Err(format!("{} did not come to rest within {} ms", self.what, limit.as_millis()));
            }
            self.listen(LOOK_EVERY);
        }
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It failed, or did not end in time; the whole group is killed then.
    pub(super) fn end(&mut self, clock: &dyn Clock, limit: Duration) -> Result<(), String> {
        let until = clock.monotonic().plus(limit);
        let Some(status) = self.wait(clock, until) else {
            self.kill(clock);
            let text = format!("{} did not end within {} ms and was killed", self.what, limit.as_millis());
            return Err(self.with_output(text));
        };
        self.child = None;
        if status.success() {
            return Ok(());
        }
        let text = match status.code() {
            Some(code) => format!("{} exited with {code}", self.what),
            None => format!("{} was ended by a signal ({status})", self.what),
        };
        Err(self.with_output(text))
    }

    fn with_output(&self, text: String) -> String {
        // What it said last is why; what it said first may be long.
        match self.said().lines().rev().find(|line| !line.trim().is_empty()) {
            Some(line) => format!("{text}: {}", line.trim().chars().take(200).collect::<String>()),
            None => text,
        }
    }

    fn wait(&mut self, clock: &dyn Clock, until: Monotonic) -> Option<ExitStatus> {
        loop {
            let ended = self.child.as_mut()?.try_wait().ok().flatten();
            if let Some(status) = ended {
                // Whatever it said before, not what others may still say through what it left open.
                self.listen(Duration::ZERO);
                return Some(status);
            }
            if clock.monotonic() >= until {
                return None;
            }
            self.listen(LOOK_EVERY);
        }
    }

    /// Ends the whole process group.
    fn kill(&mut self, clock: &dyn Clock) {
        let Some(group) = self.child.as_ref().and_then(|child| Pid::from_raw(child.id().cast_signed())) else { return };
        for signal in [Signal::TERM, Signal::KILL] {
            // The group may have gone.
            let _ = kill_process_group(group, signal);
            if self.wait(clock, clock.monotonic().plus(END_GRACE)).is_some() {
                // Its children, if it left any.
                let _ = kill_process_group(group, Signal::KILL);
                self.child = None;
                return;
            }
        }
        tracing::error!(program = self.what, "a program could not be killed");
        if let Some(mut child) = self.child.take() {
            let _ = std::thread::Builder::new().name("reap".to_owned()).spawn(move || child.wait());
        }
    }

    /// Ends it at once.
    pub(super) fn abandon(&mut self, clock: &dyn Clock) {
        if self.is_running() {
            self.kill(clock);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.kill(&world::SystemClock);
        }
    }
}

/// Runs an administrator's script to its end; its output is logged.
///
/// # Errors
/// Why it is not run, or how it failed, in words.
pub(super) fn run(
    what: &str,
    path: &Path,
    environment: &[(&str, &str)],
    clock: &dyn Clock,
    limit: Duration,
) -> Result<(), String> {
    let what = format!("{what} {}", path.display());
    check_trusted(path).map_err(|why| format!("{what} is not run: {why}"))?;
    let mut command = command(path, None);
    command.envs(environment.iter().copied());
    let mut running = Running::start(what.clone(), command, Stdio::null())?;
    let ended = running.end(clock, limit);
    let said = running.said();
    match &ended {
        Ok(()) => tracing::info!(script = what, output = said, "a script has ended"),
        Err(why) => tracing::warn!(script = what, output = said, why, "a script has failed"),
    }
    ended
}

/// The program that is run if none is named: the first of `candidates` that there is.
pub(super) fn first_present(candidates: &[&str]) -> Option<PathBuf> {
    candidates.iter().map(PathBuf::from).find(|path| path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    use world::SystemClock;

    fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
        path
    }

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[test]
    fn only_what_root_alone_can_change_is_run() {
        if !is_root() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let good = script(folder.path(), "good", "exit 0");
        check_trusted(&good).expect("root's own");
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
        for (mode, why) in [(0o775, "written to by others"), (0o757, "written to by others"), (0o644, "not executable")]
        {
            set(&good, mode);
            assert!(check_trusted(&good).expect_err("refused").contains(why));
        }
        set(&good, 0o700);
        chown(&good, Some(1), None).expect("given away");
        assert!(check_trusted(&good).expect_err("refused").contains("does not belong to root"));
        let ran = run("pre-script", &good, &[], &SystemClock, Duration::from_secs(5)).expect_err("refused");
        assert!(ran.contains("is not run"), "{ran}");
        chown(&good, Some(0), None).expect("taken back");
        check_trusted(&good).expect("root's own again");

        // A link is as good as what it leads to, and as the directories on the way.
        let link = folder.path().join("link");
        symlink("good", &link).expect("linked");
        check_trusted(&link).expect("root's own");
        let open = folder.path().join("open");
        fs::create_dir(&open).expect("created");
        let inside = script(&open, "inside", "exit 0");
        let to_inside = folder.path().join("to-inside");
        symlink(&inside, &to_inside).expect("linked");
        set(&open, 0o777);
        for path in [&inside, &to_inside] {
            assert!(check_trusted(path).expect_err("refused").contains("the directory"), "{}", path.display());
        }
        set(&open, 0o1777);
        check_trusted(&inside).expect("nobody else can replace it");
        assert!(check_trusted(&folder.path().join("none")).expect_err("refused").contains("none"));
        assert!(check_trusted(&open).expect_err("refused").contains("is no file"));
        symlink("circle", folder.path().join("circle")).expect("linked");
        assert!(check_trusted(&folder.path().join("circle")).expect_err("refused").contains("too many links"));
        assert!(check_trusted(&open.join("../good")).expect_err("refused").contains("`..`"));
    }

    #[test]
    fn a_script_ends_fails_or_is_killed_with_its_children() {
        if !is_root() {
            return;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let run = |body: &str, limit_ms| {
            let path = script(folder.path(), "script", body);
            super::run("pre-script", &path, &[("FARSHORE_POINT", "x")], &SystemClock, Duration::from_millis(limit_ms))
        };
        run("test \"$FARSHORE_POINT\" = x && test -z \"$CARGO_MANIFEST_DIR\"", 5000).expect("its environment");
        let failed = run("echo first; echo 'the reason' >&2; exit 3", 5000).expect_err("it failed");
        assert!(failed.ends_with("exited with 3: the reason"), "{failed}");
        // More than a pipe holds, and more than is kept.
        run("head -c 3000000 /dev/zero | tr '\\0' a", 20_000).expect("nobody waits for its output");

        let mark = folder.path().join("child-lives");
        let body = format!("(trap '' TERM; sleep 3; touch {}) & trap '' TERM; sleep 600", mark.display());
        let since = SystemClock.monotonic();
        let failed = run(&body, 200).expect_err("it hangs");
        assert!(failed.contains("did not end within 200 ms and was killed"), "{failed}");
        assert!(SystemClock.monotonic().since(since) < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(3500));
        assert!(!mark.exists(), "its child was killed too");

        // A grandchild that left the group and keeps the output open holds nobody up.
        let since = SystemClock.monotonic();
        run("setsid sleep 5 & exit 0", 60_000).expect("it ended");
        assert!(SystemClock.monotonic().since(since) < Duration::from_secs(4));
    }

    #[test]
    fn users_are_found() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(folder.path().join("etc")).expect("created");
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken:x\nodd:x:a:b::/:/\npostgres:x:113:121:,,,:/var/lib/postgresql:/bin/bash\n";
        fs::write(folder.path().join("etc/passwd"), text).expect("written");
        let root = SystemRoot::at(folder.path());
        let user = User::named(&root, "postgres").expect("there");
        assert_eq!((user.uid, user.gid, user.home.as_str()), (113, 121, "/var/lib/postgresql"));
        for name in ["nobody", "broken", "odd", ""] {
            assert_eq!(User::named(&root, name), None, "{name}");
        }
    }
}
