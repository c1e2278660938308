//! Processes that another one of ours started for its own use end when it does, also by `kill -9`.

use rustix::process::{Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal, test_kill_process};

/// Set by whoever starts such a process: the number of the process to end with.
pub(crate) const ENDS_WITH: &str = "FARSHORE_ENDS_WITH";

/// If that was asked for, has the system end this process in order once its parent has ended. What such a process starts in its
/// turn inherits the wish and has another parent: it goes on, unless the one to end with has gone already.
pub(crate) fn end_with_it() {
    let Some(parent) = std::env::var(ENDS_WITH).ok().and_then(|number| number.parse().ok()).and_then(Pid::from_raw)
    else {
        return;
    };
    if getppid() == Some(parent) {
        let _ = set_parent_process_death_signal(Some(Signal::TERM));
    }
    if getppid() != Some(parent) && test_kill_process(parent).is_err() {
        // It ended before the system was told.
        let _ = kill_process(getpid(), Signal::TERM);
    }
}
