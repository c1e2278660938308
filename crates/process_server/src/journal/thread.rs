//! The journal of a real process: a bounded queue in front of one thread, and group commit.
//!
//! Whatever was queued while a sync ran is written together and made durable by the next one. Room in the journal is
//! granted when a record is queued, not later: a caller that is told [`JournalError::Full`] knows that nothing it
//! queued before will be refused, so a chain never has a hole.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;

use replication::ChainId;

use super::format::FRAME_OVERHEAD;
use super::record::Record;
use super::replay::ChangeReader;
use super::writer::{Journal, JournalCounters, JournalPosition};
use super::{JournalConfig, JournalError};
use crate::machine::chain_of_errors;

/// Called on the journal's thread once the record is durable, or will never be. Must be quick.
pub type Completion = Box<dyn FnOnce(Result<JournalPosition, Arc<JournalError>>) + Send>;

/// How much may wait for the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Most bytes queued; a caller waits while there are more. One record always fits.
    pub queue_bytes_max: u64,
}

impl Default for QueueConfig {
    fn default() -> QueueConfig {
        QueueConfig { queue_bytes_max: 32 << 20 }
    }
}

/// The journal as it was after the last group.
#[derive(Debug, Clone, Default)]
pub struct JournalStatus {
    /// Bytes that changes may still take.
    pub free_bytes: u64,
    /// Bytes on the disk.
    pub used_bytes: u64,
    /// The chains that keep the oldest file.
    pub pinned_by: Vec<ChainId>,
    /// Everything up to here is durable.
    pub durable: JournalPosition,
    /// What was done so far.
    pub counters: JournalCounters,
}

enum Item {
    Append { record: Record, cost: u64, done: Completion },
    Reader { chain: ChainId, reply: mpsc::SyncSender<ChangeReader> },
}

struct State {
    queue: VecDeque<Item>,
    /// Cost of queued records, and of those of them that are changes.
    queued_bytes: u64,
    granted_bytes: u64,
    status: JournalStatus,
    /// Bytes that a new file begins with.
    opening_bytes: u64,
    stopping: bool,
    stopped: bool,
    /// Why the journal takes nothing any more.
    failure: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    /// Something was queued, or the thread should stop.
    filled: Condvar,
    /// Something was taken from the queue.
    drained: Condvar,
    queue: QueueConfig,
    file_bytes_max: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A journal and the thread that writes it.
pub struct JournalThread {
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<Journal>>,
}

impl JournalThread {
    /// Starts the thread. `config` is the one that `journal` was opened with.
    pub fn start(journal: Journal, config: JournalConfig, queue: QueueConfig) -> std::io::Result<JournalThread> {
        let mut state = State {
            queue: VecDeque::new(),
            queued_bytes: 0,
            granted_bytes: 0,
            status: JournalStatus::default(),
            opening_bytes: 0,
            stopping: false,
            stopped: false,
            failure: None,
        };
        publish(&mut state, &journal);
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            filled: Condvar::new(),
            drained: Condvar::new(),
            queue,
            file_bytes_max: config.file_bytes_max,
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name("journal".to_owned()).spawn(move || run(journal, &of_thread))?;
        Ok(JournalThread { shared, thread: Some(thread) })
    }

    /// Queues a record; waits while the queue is full. `done` is called exactly once if this returns `Ok`, and never
    /// otherwise. Records of one caller become durable in the order in which it queued them.
    ///
    /// # Errors
    /// [`JournalError::Full`]: stop taking changes in, and try again when something was committed.
    /// [`JournalError::Stopped`]: for good. Others: the record is wrong.
    pub fn append(&self, record: Record, done: Completion) -> Result<(), JournalError> {
        // Refused here and not on the thread, where it would have to fail records that others already queued behind it.
        let frame_bytes = (record.encode()?.len() + FRAME_OVERHEAD) as u64;
        let is_changes = matches!(record, Record::Changes { .. });
        let mut state = self.shared.lock();
        while state.queued_bytes > 0
            && state.queued_bytes + frame_bytes > self.shared.queue.queue_bytes_max
            && !state.stopped
            && !state.stopping
        {
            state = self.shared.drained.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped || state.stopping {
            return Err(JournalError::Stopped);
        }
        let cost = frame_bytes + super::format::SYNC_ALIGN;
        if cost + state.opening_bytes > self.shared.file_bytes_max {
            let limit_bytes = self.shared.file_bytes_max.saturating_sub(state.opening_bytes);
            return Err(JournalError::TooLarge { record_bytes: frame_bytes, limit_bytes });
        }
        if is_changes {
            let granted = state.granted_bytes + cost;
            // A file may be left with as much room unused as the largest record takes.
            let files = 1 + 2 * granted / self.shared.file_bytes_max;
            let needed_bytes = granted + files * state.opening_bytes;
            if needed_bytes > state.status.free_bytes {
                return Err(JournalError::Full { needed_bytes, free_bytes: state.status.free_bytes });
            }
            state.granted_bytes = granted;
        }
        state.queued_bytes += cost;
        state.queue.push_back(Item::Append { record, cost, done });
        drop(state);
        self.shared.filled.notify_one();
        Ok(())
    }

    /// Queues a record and waits until it is durable.
    pub fn append_and_wait(&self, record: Record) -> Result<JournalPosition, Arc<JournalError>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.append(record, Box::new(move |result| drop(sender.send(result))))?;
        receiver.recv().unwrap_or_else(|_| Err(Arc::new(JournalError::Stopped)))
    }

    /// A reader of what is durable of `chain` once everything queued so far is.
    pub fn changes_of(&self, chain: ChainId) -> Result<ChangeReader, JournalError> {
        let (reply, receiver) = mpsc::sync_channel(1);
        let mut state = self.shared.lock();
        if state.stopped || state.stopping {
            return Err(JournalError::Stopped);
        }
        state.queue.push_back(Item::Reader { chain, reply });
        drop(state);
        self.shared.filled.notify_one();
        receiver.recv().map_err(|_| JournalError::Stopped)
    }

    /// The journal as it was after the last group.
    pub fn status(&self) -> JournalStatus {
        self.shared.lock().status.clone()
    }

    /// Why the journal takes nothing any more, if it failed.
    pub fn failure(&self) -> Option<String> {
        self.shared.lock().failure.clone()
    }

    /// Makes everything queued durable, ends the thread and returns the journal; `None` if it panicked.
    pub fn stop(mut self) -> Option<Journal> {
        self.join()
    }

    fn join(&mut self) -> Option<Journal> {
        self.shared.lock().stopping = true;
        self.shared.filled.notify_all();
        self.shared.drained.notify_all();
        self.thread.take()?.join().ok()
    }
}

impl Drop for JournalThread {
    fn drop(&mut self) {
        self.join();
    }
}

fn publish(state: &mut State, journal: &Journal) {
    state.opening_bytes = journal.opening_bytes();
    state.status = JournalStatus {
        free_bytes: journal.free_bytes(),
        used_bytes: journal.used_bytes(),
        pinned_by: journal.pinned_by(),
        durable: journal.durable(),
        counters: journal.counters(),
    };
}

/// A record of the group that is being written.
struct Waiting {
    record: Record,
    done: Completion,
    outcome: Outcome,
}

enum Outcome {
    /// Not appended, or lost with the file that it was appended to.
    Open,
    /// Appended.
    At(JournalPosition),
    /// The record itself is wrong.
    Refused(Arc<JournalError>),
}

fn run(mut journal: Journal, shared: &Shared) -> Journal {
    // Chains of which a record was refused. Taking later ones would leave a hole.
    let mut broken = BTreeSet::new();
    loop {
        let mut state = shared.lock();
        while state.queue.is_empty() && !state.stopping {
            state = shared.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.queue.is_empty() {
            state.stopped = true;
            return journal;
        }
        let items = std::mem::take(&mut state.queue);
        state.queued_bytes = 0;
        drop(state);
        shared.drained.notify_all();

        let mut group = Vec::with_capacity(items.len());
        let mut readers = Vec::new();
        let mut granted = 0;
        for item in items {
            match item {
                Item::Append { record, cost, done } => {
                    if matches!(record, Record::Changes { .. }) {
                        granted += cost;
                    }
                    group.push(Waiting { record, done, outcome: Outcome::Open });
                }
                Item::Reader { chain, reply } => readers.push((chain, reply)),
            }
        }
        let result = commit(&mut journal, &mut group, &mut broken);
        let failure = result.as_ref().err().map(|error| chain_of_errors(error));
        {
            let mut state = shared.lock();
            state.granted_bytes -= granted;
            // Whoever is told that it failed can ask why.
            state.failure.clone_from(&failure);
            publish(&mut state, &journal);
        }
        finish(group, &journal, result);
        for (chain, reply) in readers {
            // The caller may have given up.
            let _ = reply.send(journal.changes_of(chain));
        }
        if let Some(failure) = failure {
            tracing::error!(failure, "the journal stops");
            fail_all(shared);
            return journal;
        }
        // Last: a large file's end takes the file system tens of milliseconds, and nobody has to wait for it.
        if journal.remove_released() {
            publish(&mut shared.lock(), &journal);
        }
    }
}

/// Makes a group durable, on a second file if the first one fails.
fn commit(journal: &mut Journal, group: &mut [Waiting], broken: &mut BTreeSet<ChainId>) -> Result<(), JournalError> {
    let first = append_all(journal, group, broken).and_then(|()| journal.make_durable());
    let Err(JournalError::Io { .. }) = first else { return first };
    let durable = journal.durable();
    for item in group.iter_mut() {
        if matches!(item.outcome, Outcome::At(position) if position > durable) {
            item.outcome = Outcome::Open;
        }
    }
    journal.restart()?;
    append_all(journal, group, broken)?;
    journal.make_durable()
}

fn append_all(
    journal: &mut Journal,
    group: &mut [Waiting],
    broken: &mut BTreeSet<ChainId>,
) -> Result<(), JournalError> {
    for item in group.iter_mut().filter(|item| matches!(item.outcome, Outcome::Open)) {
        let chain = item.record.chain();
        match &item.record {
            Record::SessionOpened { .. } | Record::Dropped { .. } => {
                broken.remove(&chain);
            }
            Record::Changes { .. } if broken.contains(&chain) => {
                item.outcome = Outcome::Refused(Arc::new(JournalError::Invalid(
                    "changes before these were refused; the chain needs a new session",
                )));
                continue;
            }
            _ => {}
        }
        match journal.append_granted(&item.record) {
            Ok(position) => item.outcome = Outcome::At(position),
            Err(error @ (JournalError::Io { .. } | JournalError::Poisoned)) => return Err(error),
            Err(error) => {
                tracing::error!(%chain, %error, "the journal refused a record");
                broken.insert(chain);
                item.outcome = Outcome::Refused(Arc::new(error));
            }
        }
    }
    Ok(())
}

/// Calls the completions.
fn finish(group: Vec<Waiting>, journal: &Journal, result: Result<(), JournalError>) {
    let error = Arc::new(result.err().unwrap_or(JournalError::Stopped));
    for item in group {
        (item.done)(match item.outcome {
            Outcome::At(position) if position <= journal.durable() => Ok(position),
            Outcome::Refused(error) => Err(error),
            Outcome::At(_) | Outcome::Open => Err(Arc::clone(&error)),
        });
    }
}

/// After a failure nothing may become durable any more: what comes later would leave a hole.
fn fail_all(shared: &Shared) {
    let mut state = shared.lock();
    state.stopped = true;
    let items = std::mem::take(&mut state.queue);
    state.queued_bytes = 0;
    state.granted_bytes = 0;
    drop(state);
    shared.drained.notify_all();
    for item in items {
        if let Item::Append { done, .. } = item {
            done(Err(Arc::new(JournalError::Stopped)));
        }
    }
}
