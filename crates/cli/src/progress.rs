//! Progress of long work: a bar on a terminal, a plain line now and then otherwise; and what Ctrl-C does meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use world::{Clock, Monotonic, SystemClock};

use crate::failure::{Done, Failure, io_failure};
use crate::output::{Output, bytes, duration_ns};

/// How often a plain line is printed.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Work of a known number of bytes.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    output: Output,
    what: String,
    total: u64,
    done: u64,
    began: Monotonic,
    said: Monotonic,
}

impl Progress {
    /// Work on `total` bytes that is called `what`.
    pub(crate) fn of_bytes(output: Output, what: impl Into<String>, total: u64) -> Progress {
        let what = what.into();
        let bar = output.draws_progress().then(|| {
            let template = "{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            let style = ProgressStyle::with_template(template).expect("the template is well-formed");
            ProgressBar::new(total).with_style(style.progress_chars("=> ")).with_message(what.clone())
        });
        let now = SystemClock.monotonic();
        Progress { bar, output, what, total, done: 0, began: now, said: now }
    }

    /// Work of unknown length.
    pub(crate) fn spinner(output: Output, what: impl Into<String>) -> Progress {
        let what = what.into();
        let bar = output.draws_progress().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})").expect("well-formed");
            let bar = ProgressBar::new_spinner().with_style(style).with_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        let now = SystemClock.monotonic();
        Progress { bar, output, what, total: 0, done: 0, began: now, said: now }
    }

    /// `count` further bytes are done.
    pub(crate) fn advance(&mut self, count: u64) {
        self.done += count;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
            return;
        }
        let now = SystemClock.monotonic();
        if !self.output.quiet && !self.output.json && now.since(self.said) >= PLAIN_EVERY {
            self.said = now;
            eprintln!("{}: {} of {}, {}", self.what, bytes(self.done), bytes(self.total), self.rate());
        }
    }

    /// Rate so far: `120 MiB/s`.
    pub(crate) fn rate(&self) -> String {
        let seconds = SystemClock.monotonic().since(self.began).as_secs_f64().max(0.001);
        format!("{}/s", bytes((self.done as f64 / seconds) as u64))
    }

    /// Time since it began.
    pub(crate) fn took(&self) -> String {
        duration_ns(u64::try_from(SystemClock.monotonic().since(self.began).as_nanos()).unwrap_or(u64::MAX))
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Set once somebody pressed Ctrl-C or asked the process to end.
#[derive(Clone)]
pub(crate) struct StopRequest(Arc<AtomicBool>);

impl StopRequest {
    /// Listens for SIGINT and SIGTERM. The first one asks; a second SIGINT ends the process at once.
    pub(crate) fn listen() -> Done<StopRequest> {
        let asked = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&asked);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| io_failure("signals cannot be listened for", &error))?;
        let (mut interrupt, mut terminate) = {
            let _within = runtime.enter();
            use tokio::signal::unix::{SignalKind, signal};
            let listen = |kind| signal(kind).map_err(|error| io_failure("signals cannot be listened for", &error));
            (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?)
        };
        let watch = move || {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                flag.store(true, Ordering::Release);
                interrupt.recv().await;
                // Whoever presses twice does not want to wait for an orderly end.
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            });
        };
        let spawned = std::thread::Builder::new().name("signals".into()).spawn(watch);
        spawned.map_err(|error| io_failure("signals cannot be listened for", &error))?;
        Ok(StopRequest(asked))
    }

    /// Whether to stop now.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Fails if it is time to stop; `left` says in which state things were left.
    pub(crate) fn check(&self, left: &str) -> Done {
        match self.is_set() {
            true => Err(Failure::new("stopped on request", left, "run the same command again to go on")),
            false => Ok(()),
        }
    }

    /// Returns once it is time to stop or `ended` says so.
    pub(crate) fn wait(&self, mut ended: impl FnMut() -> bool) {
        while !self.is_set() && !ended() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
