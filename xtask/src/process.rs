//! Child processes: where programs are found, how their output is shown, and what they used.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// How often the memory of a measured process is looked at.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);

/// What `PATH` is for every child: ordinary users often lack the directories in which `mke2fs` and `e2fsck` are, and Debian
/// keeps PostgreSQL's programs in one of their own.
pub(crate) fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin");
    for version in fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten() {
        path.push(":");
        path.push(version.path().join("bin"));
    }
    path
}

/// The file that `name` would run, or `None`.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    std::env::split_paths(&search_path()).map(|directory| directory.join(name)).find(|candidate| {
        fs::metadata(candidate).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// The command as one would type it: the program without its directory.
pub(crate) fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let mut words = vec![program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs with our own output and no input; an error names the command and its exit code.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", describe(command));
    let status = command
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// Runs, shows standard output line by line as it comes, and hands each line to `line` as well.
pub(crate) fn run_watching(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    println!("$ {}", describe(command));
    let mut child = command
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", describe(command)))?;
    let stdout = child.stdout.take().expect("standard output is piped three lines above");
    for text in BufReader::new(stdout).split(b'\n') {
        let text = text.context("cannot read what the command prints")?;
        let text = String::from_utf8_lossy(&text);
        println!("{text}");
        line(&text);
    }
    let status = child.wait().context("cannot wait for the command")?;
    if !status.success() {
        bail!("`{}` failed: {status}", describe(command));
    }
    Ok(())
}

/// What processes have used, each with its descendants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Usage {
    pub(crate) wall: Duration,
    pub(crate) user: Duration,
    pub(crate) system: Duration,
    /// Largest resident set, in bytes, of all of them together.
    pub(crate) resident_bytes_max: u64,
}

/// Runs silently to its end and measures it. What it printed on standard error is shown only if it fails.
pub(crate) fn measure(command: &mut Command) -> Result<Usage> {
    let description = describe(command);
    let started = Instant::now();
    let mut child = command
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {description}"))?;
    let mut errors = child.stderr.take().expect("standard error is piped three lines above");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let outcome = errors.read_to_end(&mut text);
        outcome.map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    // Not reaped yet when it is measured: the processor time of a dead but unreaped process is exact.
    let ((), usage) = measure_processes(&[child.id()], started, || wait_without_reaping(&child))?;
    let status = child.wait().context("cannot wait for the command")?;
    let printed = reader.join().ok().and_then(Result::ok).unwrap_or_default();
    if !status.success() {
        bail!("`{description}` failed: {status}\n{printed}");
    }
    Ok(usage)
}

/// Measures running processes, such as the roles of a product under test, from `started` until `work` is done.
///
/// They may have ended by then, but must not have been reaped. Memory is sampled every 20 ms as the high-water mark of
/// each process, so peaks between samples count and only growth in the last 20 ms of a process may be missed.
pub(crate) fn measure_processes<T>(
    pids: &[u32],
    started: Instant,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Usage)> {
    let time = || -> Result<(Duration, Duration)> {
        pids.iter().try_fold((Duration::ZERO, Duration::ZERO), |(user, system), &pid| {
            let used = processor_time(pid).with_context(|| format!("process {pid} is not listed in /proc"))?;
            Ok((user + used.0, system + used.1))
        })
    };
    let (user_before, system_before) = time()?;
    let peak = AtomicU64::new(0);
    let done = std::thread::scope(|scope| {
        let (ended, wait_for_end) = mpsc::sync_channel::<()>(1);
        let peak = &peak;
        scope.spawn(move || {
            loop {
                peak.fetch_max(pids.iter().map(|&pid| resident_bytes_of_tree(pid)).sum(), Ordering::Relaxed);
                if wait_for_end.recv_timeout(SAMPLE_INTERVAL) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        let done = work();
        drop(ended);
        done
    })?;
    let wall = started.elapsed();
    let (user, system) = time()?;
    let (user, system) = (user.saturating_sub(user_before), system.saturating_sub(system_before));
    Ok((done, Usage { wall, user, system, resident_bytes_max: peak.load(Ordering::Relaxed) }))
}

/// Waits until `child` has ended; its figures stay in `/proc` until it is waited for.
pub(crate) fn wait_without_reaping(child: &Child) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a child without a process id")?;
    loop {
        match waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(_) => return Ok(()),
            Err(error) if error == rustix::io::Errno::INTR => {}
            Err(error) => return Err(error).context("cannot wait for the command"),
        }
    }
}

/// User and system time of a process and of its children that were waited for, so far.
pub(crate) fn processor_time(pid: u32) -> Option<(Duration, Duration)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_processor_time(&stat)
}

/// The fields utime, stime, cutime and cstime of `/proc/PID/stat`, in ticks of 10 ms (`USER_HZ` is 100 on every
/// Linux architecture we run on).
fn parse_processor_time(stat: &str) -> Option<(Duration, Duration)> {
    // The command name may hold spaces and brackets; the last bracket ends it.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let duration = |ticks: u64| Duration::from_millis(ticks * 10);
    Some((duration(ticks(11)? + ticks(13)?), duration(ticks(12)? + ticks(14)?)))
}

/// Processor time of a process by the names of its threads; threads that have ended count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct ThreadTimes(BTreeMap<String, Duration>);

/// What the threads of `pid` have used so far; nothing if it is gone.
pub(crate) fn thread_times(pid: u32) -> ThreadTimes {
    let mut times = BTreeMap::<String, Duration>::new();
    let mut listed = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { continue };
        let (Some((user, system)), Some(name)) = (parse_processor_time(&stat), parse_name(&stat)) else { continue };
        *times.entry(name.to_owned()).or_default() += user + system;
        listed += user + system;
    }
    let all = processor_time(pid).map_or(Duration::ZERO, |(user, system)| user + system);
    times.insert("short-lived".to_owned(), all.saturating_sub(listed));
    ThreadTimes(times)
}

impl ThreadTimes {
    /// What was used since `earlier`, of the same process.
    pub(crate) fn since(&self, earlier: &ThreadTimes) -> ThreadTimes {
        let before = |name: &String| earlier.0.get(name).copied().unwrap_or_default();
        ThreadTimes(self.0.iter().map(|(name, time)| (name.clone(), time.saturating_sub(before(name)))).collect())
    }
}

impl fmt::Display for ThreadTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut times: Vec<_> = self.0.iter().filter(|(_, time)| **time >= Duration::from_millis(50)).collect();
        times.sort_by_key(|(_, time)| std::cmp::Reverse(**time));
        let all: Duration = self.0.values().sum();
        write!(f, "{:.2} s (", all.as_secs_f64())?;
        for (index, (name, time)) in times.into_iter().enumerate() {
            write!(f, "{}{name} {:.2}", if index == 0 { "" } else { ", " }, time.as_secs_f64())?;
        }
        f.write_str(")")
    }
}

/// The name within brackets in `/proc/PID/stat`, without the id that follows a role in names such as `chain 1f2e`.
fn parse_name(stat: &str) -> Option<&str> {
    stat.get(stat.find('(')? + 1..stat.rfind(')')?)?.split(' ').next()
}

/// The largest resident set that a process had so far, in bytes; zero if it is gone.
pub(crate) fn resident_bytes_peak(pid: u32) -> u64 {
    resident(pid, "VmHWM:")
}

/// The resident set of a process now, in bytes; zero if it is gone.
pub(crate) fn resident_bytes_now(pid: u32) -> u64 {
    resident(pid, "VmRSS:")
}

/// The part of it that is mapped files: the program itself, and what it maps.
pub(crate) fn resident_file_bytes_now(pid: u32) -> u64 {
    resident(pid, "RssFile:")
}

/// What a process holds in memory of mappings whose name contains `name`, in bytes; zero if it is gone.
pub(crate) fn mapped_bytes_now(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut wanted = false;
    let mut bytes = 0;
    for line in text.lines() {
        match line.strip_prefix("Rss:") {
            Some(kib) if wanted => {
                bytes += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10;
            }
            // The line that begins a mapping ends with its name; no other has an address.
            _ if line.split(' ').next().is_some_and(|word| word.contains('-')) => wanted = line.contains(name),
            _ => {}
        }
    }
    bytes
}

fn resident(pid: u32, field: &str) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/status")).ok().and_then(|s| parse_resident(&s, field)).unwrap_or(0)
}

/// The high-water marks of a process and all its descendants together, so that a peak between two samples counts.
fn resident_bytes_of_tree(pid: u32) -> u64 {
    let own = resident_bytes_peak(pid);
    let children = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<u32>>())
        .map(resident_bytes_of_tree)
        .sum::<u64>();
    own + children
}

/// A field of `/proc/PID/status` in bytes.
fn parse_resident(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_survives_odd_process_names() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 10 20 0 0 150 25 50 5 20 0 1 0 99 1 2";
        assert_eq!(parse_processor_time(stat), Some((Duration::from_secs(2), Duration::from_millis(300))));
        assert_eq!(parse_processor_time("7 (short) S 1"), None);
        assert_eq!(parse_name("7 (chain 1f2e) S 1"), Some("chain"));
    }

    #[test]
    fn measure_sees_time_processor_and_memory() {
        let mut busy = Command::new("sh");
        busy.args(["-c", "i=0; while [ $i -lt 150000 ]; do i=$((i+1)); done"]);
        let usage = measure(&mut busy).unwrap();
        assert!(usage.user + usage.system >= Duration::from_millis(10), "{usage:?}");
        assert!(usage.wall + Duration::from_millis(20) >= usage.user, "{usage:?}");
        assert!(usage.resident_bytes_max > 100 * 1024, "{usage:?}");
    }

    #[test]
    fn measure_reports_what_a_failing_command_printed() {
        let error = measure(Command::new("sh").args(["-c", "echo no such repository >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("no such repository"), "{error}");
    }

    #[test]
    fn programs_are_found_also_outside_an_ordinary_path() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-anywhere").is_none());
    }
}
