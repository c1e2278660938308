//! The kernel's side of a freeze, made safe: the two calls, memory shared with the guard, and the guard's process.
//!
//! The guard is a child that never runs another program: between `fork` and its end it makes system calls only, on memory
//! that exists already, because the process it was split from has other threads.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// File systems frozen together at most.
pub(super) const FILE_SYSTEMS_MAX: usize = 512;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`.
const FIFREEZE: libc::Ioctl = 0xC004_5877_u32 as libc::Ioctl;
const FITHAW: libc::Ioctl = 0xC004_5878_u32 as libc::Ioctl;

/// Stops all writers of the file system that `fd` lies on, and writes out what they left. Returns when it is at rest.
pub(super) fn freeze(fd: BorrowedFd<'_>) -> io::Result<()> {
    order(fd, FIFREEZE)
}

/// Lets writers go on.
pub(super) fn thaw(fd: BorrowedFd<'_>) -> io::Result<()> {
    order(fd, FITHAW)
}

fn order(fd: BorrowedFd<'_>, order: libc::Ioctl) -> io::Result<()> {
    // SAFETY: the descriptor is open as long as it is borrowed; both orders ignore their argument.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), order, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Not frozen by us.
pub(super) const UNTOUCHED: u32 = 0;
/// Frozen by us, or just about to be.
pub(super) const FROZEN: u32 = 1;
/// Frozen by us and thawed by the guard.
const THAWED: u32 = 2;
/// The guard is about to.
const THAWING: u32 = 3;

/// Everything is at rest, or will be.
pub(super) const RESTING: u32 = 0;
/// A marker is being written: the guard waits for it a moment.
pub(super) const MARKING: u32 = 1;
/// The marker is in.
pub(super) const MARKED: u32 = 2;
/// The guard lets writers go on: no marker may claim rest any more.
pub(super) const OVER: u32 = 3;

/// What a freeze and its guard share.
#[repr(C)]
struct Page {
    phase: AtomicU32,
    file_systems: [AtomicU32; FILE_SYSTEMS_MAX],
}

/// Memory shared with the guard.
pub(super) struct SharedPage(NonNull<Page>);

// SAFETY: the page is touched through atomics only.
#[allow(unsafe_code)]
unsafe impl Send for SharedPage {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for SharedPage {}

impl SharedPage {
    pub(super) fn new() -> io::Result<SharedPage> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping of the kernel's choice; nothing that exists is touched.
        #[allow(unsafe_code)]
        let place = unsafe { libc::mmap(std::ptr::null_mut(), size_of::<Page>(), protection, flags, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedPage(NonNull::new(place.cast()).expect("the kernel maps nothing at zero unless asked to")))
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped for as long as `self` lives, aligned to a page, and zero is a valid value of every field.
        #[allow(unsafe_code)]
        unsafe {
            self.0.as_ref()
        }
    }

    pub(super) fn phase(&self) -> &AtomicU32 {
        &self.page().phase
    }

    pub(super) fn file_system(&self, index: usize) -> &AtomicU32 {
        &self.page().file_systems[index]
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nobody borrows it any more.
        #[allow(unsafe_code)]
        unsafe {
            libc::munmap(self.0.as_ptr().cast(), size_of::<Page>());
        }
    }
}

/// How often the guard looks when its time has come.
const PASS_MS: libc::c_int = 20;
/// How many such looks it grants a marker that is just being written. Counted, not measured: when a virtual machine was
/// paused, both sides go on together.
const MARKING_PASSES_MAX: u32 = 50;

/// Looks after the end of whoever froze. What has not answered by then is waited for by children that stay.
const LAST_PASSES_MAX: u32 = 100;

/// The guard's process.
pub(super) struct Guard {
    pid: rustix::process::Pid,
    /// The guard thaws everything when this is closed, and ends without doing anything when it can read from it.
    told: Option<PipeWriter>,
}

impl Guard {
    /// Starts a guard over the file systems of `fds`: it thaws those that `page` names frozen when `limit` is over or when
    /// this process has ended, in whatever way.
    pub(super) fn start(page: &SharedPage, fds: &[BorrowedFd<'_>], limit: Duration) -> io::Result<Guard> {
        assert!(fds.len() <= FILE_SYSTEMS_MAX, "checked by the caller");
        let (reader, writer) = io::pipe()?;
        let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut kept = numbers.clone();
        kept.push(reader.as_raw_fd());
        kept.sort_unstable();
        let limit_ms = i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        // SAFETY: `set` and `before` are written by the calls before they are read. Signals are blocked across the fork so
        // that no handler of this process ever runs in the child; this thread gets its own mask back.
        #[allow(unsafe_code)]
        let child = unsafe {
            let (mut all, mut before) = (std::mem::zeroed::<libc::sigset_t>(), std::mem::zeroed::<libc::sigset_t>());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            let child = libc::fork();
            if child == 0 {
                watch(page, &numbers, &kept, &reader, &writer, limit_ms);
            }
            let failed = (child < 0).then(io::Error::last_os_error);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            failed.map_or(Ok(child), Err)
        }?;
        let pid = rustix::process::Pid::from_raw(child).expect("a child's number is positive");
        Ok(Guard { pid, told: Some(writer) })
    }

    /// Ends it: everything is thawed.
    fn dismiss(&mut self) {
        use rustix::process::{WaitOptions, waitpid};
        use std::io::Write;
        if let Some(mut told) = self.told.take() {
            // A guard that was killed reads nothing.
            let _ = told.write_all(b"d");
        }
        for _ in 0..200 {
            match waitpid(Some(self.pid), WaitOptions::NOHANG) {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        // It waits for a file system that does not answer. Nobody may be kept for that.
        let pid = self.pid;
        let _ = std::thread::Builder::new().name("reap".to_owned()).spawn(move || {
            let _ = waitpid(Some(pid), WaitOptions::empty());
        });
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.dismiss();
    }
}

/// What the guard does. Only system calls and atomics: no memory is allocated, no lock taken, nothing panics.
fn watch(
    page: &SharedPage,
    fds: &[RawFd],
    kept: &[RawFd],
    reader: &PipeReader,
    writer: &PipeWriter,
    limit_ms: i64,
) -> ! {
    let (page, reader) = (page.page(), reader.as_raw_fd());
    // SAFETY: system calls with integers and pointers to locals, in a process of one thread. Descriptors are closed behind
    // the back of their owners, who never run again in this process.
    #[allow(unsafe_code)]
    unsafe {
        libc::close(writer.as_raw_fd());
        leave_the_rest(kept);
        libc::prctl(libc::PR_SET_NAME, c"farshore-thaw".as_ptr());
        // Memory is never to be found for it by writing to a file system that is frozen. Needs 5.6; without, as before.
        libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        let own = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if own >= 0 {
            libc::write(own, c"-1000".as_ptr().cast(), 5);
            libc::close(own);
        }
        let until = now_ms().saturating_add(limit_ms);
        let (mut over, mut grants) = (false, 0);
        loop {
            let left = until.saturating_sub(now_ms()).clamp(0, 1000) as libc::c_int;
            let mut poll = libc::pollfd { fd: reader, events: libc::POLLIN, revents: 0 };
            let ready = libc::poll(&raw mut poll, 1, if left == 0 { PASS_MS } else { left });
            if ready > 0 {
                let mut byte = 0u8;
                if libc::read(reader, (&raw mut byte).cast(), 1) == 1 {
                    libc::_exit(0);
                }
                // Whoever froze has ended, and with it every call that it made.
                page.phase.store(OVER, Ordering::SeqCst);
                for round in 0..LAST_PASSES_MAX {
                    thaw_all(page, fds);
                    libc::poll(std::ptr::null_mut(), 0, PASS_MS);
                    // The first round may have met a child that came too early.
                    if !reap() && round > 0 {
                        break;
                    }
                }
                libc::_exit(0);
            }
            if now_ms() < until {
                continue;
            }
            if !over {
                let rests = |phase| (phase != MARKING || grants >= MARKING_PASSES_MAX).then_some(OVER);
                over = page.phase.fetch_update(Ordering::SeqCst, Ordering::SeqCst, rests).is_ok();
                grants += 1;
            }
            if over {
                thaw_all(page, fds);
                reap();
            }
        }
    }
}

/// Not in `libc` for every target.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Thaws each by a process of its own: what lies on a file in another file system writes to that one when it is thawed, and
/// what does not answer holds up nobody else.
fn thaw_all(page: &Page, fds: &[RawFd]) {
    for (state, fd) in page.file_systems.iter().zip(fds) {
        if state.compare_exchange(FROZEN, THAWING, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            continue;
        }
        // SAFETY: system calls with integers, in a process of one thread, whose child does nothing else. The order ignores
        // its argument.
        #[allow(unsafe_code)]
        unsafe {
            let child = libc::fork();
            if child <= 0 {
                let done = libc::ioctl(*fd, FITHAW, 0) == 0;
                // One that was still being frozen is looked at again.
                state.store(if done { THAWED } else { FROZEN }, Ordering::SeqCst);
                if child == 0 {
                    libc::_exit(0);
                }
            }
        }
    }
}

/// Takes note of children that have ended. Whether any are left.
fn reap() -> bool {
    loop {
        // SAFETY: a system call that writes nothing.
        #[allow(unsafe_code)]
        let ended = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        if ended <= 0 {
            return ended == 0;
        }
    }
}

/// Closes every descriptor but `kept`: whoever waits for the end of the process that was split shall not wait for this
/// one.
fn leave_the_rest(kept: &[RawFd]) {
    let mut first: libc::c_uint = 0;
    for fd in kept.iter().map(|fd| fd.cast_unsigned()) {
        if fd > first {
            close_between(first, fd - 1);
        }
        first = fd + 1;
    }
    close_between(first, libc::c_uint::MAX);
}

fn close_between(first: libc::c_uint, last: libc::c_uint) {
    /// Where a kernel before 5.9 stops closing: the usual limit of a service, and far above what the agent opens.
    const LAST_MAX: libc::c_uint = 4096;
    // SAFETY: see `watch`.
    #[allow(unsafe_code)]
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, last, 0) < 0 {
            for fd in first..=last.min(LAST_MAX) {
                libc::close(fd.cast_signed());
            }
        }
    }
}

fn now_ms() -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for the call.
    #[allow(unsafe_code)]
    unsafe {
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now);
    }
    now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000)
}
