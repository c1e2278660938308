//! What wakes the engine's thread while it waits: commands, the link, the kernel's ring, or time.
//!
//! ```text
//! command, frame, connection ─ ring() ─► eventfd ─┐
//! record in the kernel's ring, if the capture      ├─► epoll ─► wait()
//! has said that its reader sleeps ────────────────┘
//! ```
//!
//! Nothing is lost: whoever rings has put its message where the thread looks before; the thread takes the ringing back before
//! it looks. While the thread is awake, ringing costs one atomic operation and no system call.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

/// What epoll says of the eventfd, and of what is watched besides.
const RUNG: u64 = 0;
const WATCHED: u64 = 1;
/// Epoll counts in whole milliseconds on older kernels; shorter waits are for the eventfd alone.
const EPOLL_MIN: Duration = Duration::from_millis(1);

/// See the module's documentation.
pub(crate) struct Bell {
    epoll: OwnedFd,
    event: OwnedFd,
    /// It was rung, and [`Bell::wait`] has not returned since.
    rung: AtomicBool,
}

impl Bell {
    /// A bell that nobody has rung.
    pub(crate) fn new() -> io::Result<Bell> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &event, epoll::EventData::new_u64(RUNG), epoll::EventFlags::IN)?;
        Ok(Bell { epoll, event, rung: AtomicBool::new(false) })
    }

    /// Lets [`Bell::wait`] return when something happens to `source`, not while something is there: the kernel's ring holds
    /// what was read and is not journaled yet.
    pub(crate) fn watch(&self, source: BorrowedFd<'_>) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, source, epoll::EventData::new_u64(WATCHED), flags)?)
    }

    /// Lets the wait under way return, or the next one.
    pub(crate) fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel)
            && let Err(error) = rustix::io::write(&self.event, &1u64.to_ne_bytes())
        {
            // Its counter is never near its end.
            tracing::error!(%error, "the engine's thread could not be woken; it looks again by itself");
        }
    }

    /// Returns when somebody has rung since the last return, when something happened to what is watched, or after `limit`.
    /// Whether there was anything but the limit. A wait below a millisecond does not look at what is watched.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let timeout = Timespec::try_from(limit).expect("waits are short");
        let (rung, watched) = if limit < EPOLL_MIN { self.poll(&timeout) } else { self.epoll(&timeout) };
        if rung {
            // Before the mark is taken back: whoever finds no mark after that writes again.
            let _ = rustix::io::read(&self.event, &mut [0; 8]);
            self.rung.swap(false, Ordering::AcqRel);
        }
        rung || watched
    }

    fn poll(&self, timeout: &Timespec) -> (bool, bool) {
        let mut one = [PollFd::from_borrowed_fd(self.event.as_fd(), PollFlags::IN)];
        // Interrupted by a signal: as if the time were over.
        (poll(&mut one, Some(timeout)).is_ok_and(|count| count > 0), false)
    }

    fn epoll(&self, timeout: &Timespec) -> (bool, bool) {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 2];
        let count = epoll::wait(&self.epoll, &mut events[..], Some(timeout)).unwrap_or(0);
        let is = |what: u64| events[..count].iter().any(|event| { event.data }.u64() == what);
        (is(RUNG), is(WATCHED))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Instant;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn ringing_ends_the_wait_under_way_or_the_next_one() {
        let bell = Bell::new().expect("a bell");
        for short in [Duration::from_micros(300), Duration::from_millis(3)] {
            assert!(!bell.wait(short), "nobody rang");
            bell.ring();
            bell.ring();
            assert!(bell.wait(short), "somebody rang before");
            assert!(!bell.wait(short), "once");
        }
        let since = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                bell.ring();
            });
            assert!(bell.wait(LONG));
        });
        assert!(since.elapsed() < LONG / 2);
    }

    #[test]
    fn what_is_watched_rings_once_for_each_event_and_not_for_what_is_there() {
        let bell = Bell::new().expect("a bell");
        let source = eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd");
        bell.watch(source.as_fd()).expect("watched");
        for _ in 0..3 {
            assert!(!bell.wait(Duration::from_millis(3)));
            rustix::io::write(&source, &1u64.to_ne_bytes()).expect("written");
            assert!(bell.wait(LONG), "something happened");
        }
        assert!(!bell.wait(Duration::from_millis(3)), "it is readable still, and nothing new");
    }

    /// A waiter that looks at a queue after each wait gets everything, whatever the moment of ringing.
    #[test]
    fn no_message_waits_for_the_limit() {
        const MESSAGES: u32 = 20_000;
        let bell = Arc::new(Bell::new().expect("a bell"));
        let (queue, messages) = mpsc::sync_channel(4);
        let ringer = thread::spawn({
            let bell = bell.clone();
            move || {
                for number in 0..MESSAGES {
                    queue.send(number).expect("taken");
                    bell.ring();
                }
            }
        });
        let (mut taken, since) = (0, Instant::now());
        while taken < MESSAGES {
            match messages.try_recv() {
                Ok(number) => {
                    assert_eq!(number, taken);
                    taken += 1;
                }
                Err(_) => assert!(bell.wait(LONG), "message {taken} was not rung for"),
            }
        }
        assert!(since.elapsed() < LONG);
        ringer.join().expect("it does not panic");
    }
}
