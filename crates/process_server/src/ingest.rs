//! Ingest: the front of one machine's replication. Feeds the receiver, has its changes journaled, and passes everything
//! on to the pipeline in order, each change only once it is durable.
//!
//! ```text
//! link ──► Receiver ──► journal (group commit) ──► held back until durable ──► Pipeline (seal, upload)
//!   ▲                                                      │                        │
//!   └────────────── Ack journaled ◄────────────────────────┘      committed ◄───────┘
//! ```
//!
//! Nothing is acknowledged before the journal said that it is durable. When the journal is full, what was received waits
//! in memory (at most one window) and the sender's window closes; its ring then overflows and heals later.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use replication::receiver::{Action, Event, Receiver};
use replication::wire::{HealContent, Message, OfferHashes, OfferedLeaf};
use replication::{
    ByteRange, ChainId, Change, Cut, DiskId, HealId, PointTime, Ranges, Reach, SequenceNumber, StreamHash,
};

use crate::journal::thread::Completion;
use crate::journal::{ChangeReader, JournalError, Manifest, NoteKind, Record, Replayed};
use crate::notes::{DISKS_NOTE, DisksNote, GAP_NOTE, GapNote, NOTED_GAPS_MAX, RANGE_GAPS_NOTE};

/// Where records go to become durable. The real one is the journal's thread.
pub trait ChangeLog: Send + Sync {
    /// Queues `record`; `done` is called once if this returns `Ok`, in the order of the calls.
    fn append(&self, record: Record, done: Completion) -> Result<(), JournalError>;

    /// Bytes that changes may still take.
    fn free_bytes(&self) -> u64;

    /// Waits until `record` is durable.
    fn append_durably(&self, record: Record) -> Result<(), Arc<JournalError>>;

    /// The manifest of `chain` that may have been created without anybody's having heard of it.
    fn intent(&self, chain: ChainId) -> Result<Option<Manifest>, JournalError>;

    /// The newest change of `chain` that was ever queued, or is known to be committed or dropped.
    fn last(&self, chain: ChainId) -> Result<SequenceNumber, JournalError>;

    /// What is durable of `chain` after `after`, in order, about `bytes_max` bytes of data of it.
    fn read_back(&self, chain: ChainId, after: SequenceNumber, bytes_max: u64) -> Result<Vec<ReadBack>, JournalError>;
}

/// A piece of what [`ChangeLog::read_back`] finds.
#[derive(Debug)]
pub enum ReadBack {
    /// Changes, in order.
    Changes(Vec<Change>),
    /// The stream's hash behind the change `sequence`, which came before.
    Hash {
        /// Which change.
        sequence: SequenceNumber,
        /// The hash.
        hash: StreamHash,
    },
    /// A gap opened here, or (`None`) was closed.
    Gap(Option<GapNote>),
    /// From here on these disks are protected, and no others of those that were.
    Disks(DisksNote),
}

/// [`ChangeLog::read_back`] by means of a journal's reader.
pub fn read_back(reader: &ChangeReader, bytes_max: u64) -> Result<Vec<ReadBack>, JournalError> {
    let mut found = Vec::new();
    let mut bytes = 0;
    let mut last = None;
    let mut first = true;
    reader.visit(|item| {
        match item {
            // Not before the next changes: what belongs to the last ones stands behind them.
            Replayed::Record(Record::Changes { .. }) if bytes >= bytes_max => return ControlFlow::Break(()),
            Replayed::Record(Record::StreamHash { sequence, hash, .. }) if last == Some(sequence) => {
                found.push(ReadBack::Hash { sequence, hash });
            }
            Replayed::Record(Record::Changes { changes, .. }) => {
                bytes += changes.iter().map(|change| change.kind.data_len() as u64).sum::<u64>();
                last = changes.last().map(|change| change.sequence);
                found.push(ReadBack::Changes(changes));
            }
            Replayed::Record(Record::Note { kind, bytes, .. }) => found.extend(noted(kind, bytes)),
            // Only the oldest file's opening tells what was true before its changes.
            Replayed::State(state) if first => {
                found.extend(state.notes.iter().flat_map(|(kind, bytes)| noted(*kind, bytes.clone())));
            }
            _ => {}
        }
        first = false;
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

/// What a note says. One that this version does not understand was written by a newer one; the heal that a gap's stood for is
/// still needed.
fn noted(kind: NoteKind, bytes: Bytes) -> Vec<ReadBack> {
    match kind {
        GAP_NOTE => GapNote::decode(bytes).into_iter().map(ReadBack::Gap).collect(),
        RANGE_GAPS_NOTE => {
            let notes = GapNote::decode_list(bytes).unwrap_or_default();
            notes.into_iter().map(|note| ReadBack::Gap(Some(note))).collect()
        }
        DISKS_NOTE => DisksNote::decode(bytes).into_iter().map(ReadBack::Disks).collect(),
        _ => Vec::new(),
    }
}

impl ChangeLog for crate::journal::JournalThread {
    fn append(&self, record: Record, done: Completion) -> Result<(), JournalError> {
        crate::journal::JournalThread::append(self, record, done)
    }

    fn append_durably(&self, record: Record) -> Result<(), Arc<JournalError>> {
        self.append_and_wait(record).map(drop)
    }

    fn intent(&self, chain: ChainId) -> Result<Option<Manifest>, JournalError> {
        Ok(self.changes_of(chain)?.intent())
    }

    fn free_bytes(&self) -> u64 {
        self.status().free_bytes
    }

    fn last(&self, chain: ChainId) -> Result<SequenceNumber, JournalError> {
        Ok(self.changes_of(chain)?.last())
    }

    fn read_back(&self, chain: ChainId, after: SequenceNumber, bytes_max: u64) -> Result<Vec<ReadBack>, JournalError> {
        read_back(&self.changes_of(chain)?.after(after), bytes_max)
    }
}

/// What the pipeline is given, in stream order.
///
/// Not [`Action`] itself, although it looks like it: only what is durable becomes work, messages and disconnections never
/// do, and the end of a session, of which the receiver cannot tell, does.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Work {
    /// Durable changes, and the stream's hash after them.
    Changes {
        changes: Vec<Change>,
        hash: StreamHash,
    },
    Cut(Cut),
    GapOpened {
        at: SequenceNumber,
        reach: Reach,
        time: PointTime,
        cause: String,
    },
    Proven {
        through: SequenceNumber,
        time: PointTime,
        skew_ns: i64,
    },
    HealBegin {
        heal: HealId,
        p0: SequenceNumber,
        reach: Reach,
        hashes: OfferHashes,
        planned_bytes: u64,
    },
    Compare {
        heal: HealId,
        offer: u32,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    HealData {
        heal: HealId,
        disk: DiskId,
        range: ByteRange,
        content: HealContent,
    },
    HealEnd {
        heal: HealId,
        cut: Cut,
    },
    HealAborted {
        heal: HealId,
        cause: String,
    },
    Scrub {
        offer: u64,
        behind: SequenceNumber,
        disk: DiskId,
        start: u64,
        leaves: Vec<OfferedLeaf>,
    },
    Suspected {
        id: u64,
        after: SequenceNumber,
        until: SequenceNumber,
        time: PointTime,
        ranges: Ranges,
        cause: String,
    },
    /// The session is over; the next thing may be a new one.
    SessionEnded,
}

/// What to do after feeding the ingest.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Messages for the sender, in order.
    pub send: Vec<Message>,
    /// Work for the pipeline, in order.
    pub work: Vec<Work>,
    /// The session must end, for this reason.
    pub disconnect: Option<String>,
}

#[derive(Debug, Default)]
struct Completions {
    /// Every record up to this ticket is durable.
    durable: u64,
    failed: Option<String>,
}

enum Held {
    /// A record that found the journal full.
    Record { record: Record, ticket: u64 },
    /// Work that waits until everything up to `ticket` is durable.
    Work { ticket: u64, work: Work },
}

/// See the module's documentation.
pub struct Ingest {
    chain: ChainId,
    log: Arc<dyn ChangeLog>,
    wake: Arc<dyn Fn() + Send + Sync>,
    completions: Arc<Mutex<Completions>>,
    receiver: Option<Receiver>,
    held: VecDeque<Held>,
    next_ticket: u64,
    window_bytes: u64,
    announced_window: u64,
    /// The newest gaps of ranges.
    noted: VecDeque<GapNote>,
}

impl Ingest {
    /// An ingest for `chain`. `wake` is called from the journal's thread when [`Ingest::poll`] has something to do.
    pub fn new(
        chain: ChainId,
        log: Arc<dyn ChangeLog>,
        window_bytes: u64,
        wake: Arc<dyn Fn() + Send + Sync>,
    ) -> Ingest {
        Ingest {
            chain,
            log,
            wake,
            completions: Arc::default(),
            receiver: None,
            held: VecDeque::new(),
            next_ticket: 1,
            window_bytes,
            announced_window: window_bytes,
            noted: VecDeque::new(),
        }
    }

    /// A session begins with `receiver`, which writes to `chain`.
    pub fn begin(&mut self, receiver: Receiver) {
        if self.chain != receiver.chain() {
            self.noted.clear();
        }
        self.chain = receiver.chain();
        self.announced_window = self.window_bytes;
        self.receiver = Some(receiver);
    }

    /// The session is over. What it received still becomes durable and is passed on.
    pub fn end(&mut self) -> Outcome {
        if let Some(receiver) = self.receiver.take() {
            drop(receiver);
            self.hold(Work::SessionEnded);
        }
        self.poll()
    }

    /// Whether a session is under way.
    pub fn is_live(&self) -> bool {
        self.receiver.is_some()
    }

    /// Whether everything received is durable and passed on.
    pub fn is_idle(&self) -> bool {
        self.held.is_empty()
    }

    /// Bytes of changes that wait to become durable.
    pub fn memory_bytes(&self) -> u64 {
        let data = |changes: &[Change]| changes.iter().map(|change| change.kind.data_len() as u64).sum::<u64>();
        let held = self.held.iter().map(|held| match held {
            Held::Work { work: Work::Changes { changes, .. }, .. } => data(changes),
            // The work behind it shares its bytes.
            Held::Work { .. } | Held::Record { .. } => 0,
        });
        held.sum()
    }

    /// A message arrived.
    pub fn message(&mut self, message: Message, wall: PointTime) -> Outcome {
        let mut out = Outcome::default();
        self.feed(Event::Received { message, wall }, &mut out);
        self.advance(&mut out);
        out
    }

    /// The pipeline has something to tell the sender.
    pub fn event(&mut self, event: Event) -> Outcome {
        let mut out = Outcome::default();
        self.feed(event, &mut out);
        self.advance(&mut out);
        out
    }

    /// Looks at what has become durable, and tries again what the journal had no room for.
    pub fn poll(&mut self) -> Outcome {
        let mut out = Outcome::default();
        self.advance(&mut out);
        out
    }

    fn feed(&mut self, event: Event, out: &mut Outcome) {
        let Some(receiver) = &mut self.receiver else { return };
        for action in receiver.apply(event) {
            match action {
                Action::Send(message) => out.send.push(message),
                Action::Append { changes, hash } => {
                    let last = changes.last().expect("an append has changes").sequence;
                    self.append(Record::Changes { chain: self.chain, changes: changes.clone() });
                    self.append(Record::StreamHash { chain: self.chain, sequence: last, hash });
                    self.hold(Work::Changes { changes, hash });
                }
                Action::Cut(cut) => self.hold(Work::Cut(cut)),
                Action::GapOpened { at, reach, time, cause } => {
                    let note = GapNote { at, reach: reach.clone(), time, cause: cause.clone() };
                    self.note(note);
                    self.hold(Work::GapOpened { at, reach, time, cause });
                }
                Action::Proven { through, time, skew_ns } => self.hold(Work::Proven { through, time, skew_ns }),
                Action::HealBegin { heal, p0, reach, hashes, planned_bytes, whole: _ } => {
                    self.hold(Work::HealBegin { heal, p0, reach, hashes, planned_bytes });
                }
                Action::Compare { heal, offer, disk, start, leaves } => {
                    self.hold(Work::Compare { heal, offer, disk, start, leaves });
                }
                Action::CompareGranules { .. } | Action::CompareLeaves { .. } => {
                    out.disconnect = Some("a process server compares leaves, and holds their hashes itself".into());
                }
                Action::HealData { heal, disk, range, content } => {
                    self.hold(Work::HealData { heal, disk, range, content });
                }
                Action::HealEnd { heal, cut } => self.hold(Work::HealEnd { heal, cut }),
                Action::HealAborted { heal, cause } => self.hold(Work::HealAborted { heal, cause }),
                Action::Scrub { offer, behind, disk, start, leaves } => {
                    self.hold(Work::Scrub { offer, behind, disk, start, leaves });
                }
                Action::Suspected { id, after, until, time, ranges, cause } => {
                    self.hold(Work::Suspected { id, after, until, time, ranges, cause });
                }
                Action::Disconnect { reason } => out.disconnect = Some(reason),
            }
        }
    }

    /// Notes a gap in stream order. A file's opening repeats only the newest note of a kind: it has to tell of every gap
    /// that may not be committed.
    fn note(&mut self, note: GapNote) {
        let (kind, bytes) = match note.reach {
            Reach::Machine => (GAP_NOTE, note.encode()),
            Reach::Ranges(_) => {
                if self.noted.len() == NOTED_GAPS_MAX {
                    self.noted.pop_front();
                }
                self.noted.push_back(note);
                (RANGE_GAPS_NOTE, GapNote::encode_list(self.noted.iter()))
            }
        };
        self.append(Record::Note { chain: self.chain, kind, bytes });
    }

    /// Gives `record` the next ticket and queues it, behind whatever already waits for room.
    fn append(&mut self, record: Record) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let waiting = self.held.iter().any(|held| matches!(held, Held::Record { .. }));
        if waiting || !self.submit(&record, ticket) {
            self.held.push_back(Held::Record { record, ticket });
        }
    }

    fn submit(&mut self, record: &Record, ticket: u64) -> bool {
        let (completions, wake) = (Arc::clone(&self.completions), Arc::clone(&self.wake));
        let done: Completion = Box::new(move |result| {
            let mut state = completions.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                // A failure in front of it leaves a hole that nothing later may paper over.
                Ok(_) if state.failed.is_none() => state.durable = ticket,
                Ok(_) => {}
                Err(error) => state.failed = Some(error.to_string()),
            }
            drop(state);
            wake();
        });
        match self.log.append(record.clone(), done) {
            Ok(()) => true,
            Err(JournalError::Full { .. }) => false,
            Err(error) => {
                self.completions.lock().unwrap_or_else(PoisonError::into_inner).failed = Some(error.to_string());
                false
            }
        }
    }

    fn hold(&mut self, work: Work) {
        self.held.push_back(Held::Work { ticket: self.next_ticket - 1, work });
    }

    fn advance(&mut self, out: &mut Outcome) {
        let (durable, failed) = {
            let state = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
            (state.durable, state.failed.clone())
        };
        if let Some(failed) = failed {
            out.disconnect.get_or_insert(format!("the journal failed: {failed}"));
        }
        let mut journaled = None;
        loop {
            match self.held.front() {
                Some(Held::Work { ticket, .. }) if *ticket <= durable => {
                    let Some(Held::Work { work, .. }) = self.held.pop_front() else { unreachable!("just seen") };
                    if let Work::Changes { changes, .. } = &work {
                        journaled = changes.last().map(|change| change.sequence);
                    }
                    out.work.push(work);
                }
                Some(Held::Record { .. }) => {
                    let Some(Held::Record { record, ticket }) = self.held.pop_front() else {
                        unreachable!("just seen")
                    };
                    if !self.submit(&record, ticket) {
                        self.held.push_front(Held::Record { record, ticket });
                        break;
                    }
                }
                _ => break,
            }
        }
        if let Some(through) = journaled {
            self.tell(Event::Journaled(through), out);
        }
        self.adjust_window(out);
    }

    /// Tells the receiver of this side; such events cause only messages.
    fn tell(&mut self, event: Event, out: &mut Outcome) {
        let Some(receiver) = &mut self.receiver else { return };
        for action in receiver.apply(event) {
            if let Action::Send(message) = action {
                out.send.push(message);
            }
        }
    }

    /// A window that the journal could not take would only fill this process's memory.
    fn adjust_window(&mut self, out: &mut Outcome) {
        let room = self.log.free_bytes() / 4;
        let window = if self.held.iter().any(|held| matches!(held, Held::Record { .. })) {
            0
        } else {
            self.window_bytes.min(room)
        };
        let closes = window < self.announced_window / 2;
        let opens = window == self.window_bytes && self.announced_window < self.window_bytes
            || window > self.announced_window.saturating_mul(2);
        if closes || opens {
            self.announced_window = window;
            self.tell(Event::Window(window), out);
        }
    }
}
