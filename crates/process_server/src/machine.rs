//! One protected machine at a running process server: a session thread per link and a pipeline thread that outlives them,
//! around one ingest.
//!
//! ```text
//! session thread: link ─► ingest ─► inbox          pipeline thread: inbox ─► pipeline ─► events ─► ingest ─► link
//! ```
//!
//! Both threads send on the link only while holding the ingest's lock, so acknowledgements never overtake each other. A
//! sender never blocks on its own queue, so it always drains ours.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use link::{Connection, Frame, FrameLink};
use replication::receiver::Event;
use replication::wire::{Hello, Message, RefusalCode};
use replication::{ChainId, InstanceId, MachineId, PointTime};
use world::Entropy;

use crate::describe::Descriptions;
use crate::feedback::Feedback;
use crate::ingest::{Ingest, Outcome, Work};
use crate::journal::ChainState;
use crate::pipeline::{Greeted, Pipeline, Services};

/// Work waiting for the pipeline thread beyond which a session stops reading its link, in bytes.
const INBOX_BYTES_MAX: u64 = 48 << 20;
/// How long a session waits for its pipeline to be ready.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a busy pipeline looks at its timers.
const BUSY_TICK: Duration = Duration::from_millis(20);
/// How often an idle pipeline looks at its timers.
const IDLE_TICK: Duration = Duration::from_millis(1000);
/// How long a stopping server waits for commits.
const STOPPING_PATIENCE: Duration = Duration::from_secs(10);
/// How often a session looks for durable records while some are not.
const ACK_TICK: Duration = Duration::from_millis(1);
/// How often a session with nothing outstanding looks up from its link.
const QUIET_TICK: Duration = Duration::from_millis(200);
/// How long a session's agent may take to answer when a newer run of it asks for its place.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// How often the answer is looked for.
const SILENCE_TICK: Duration = Duration::from_millis(20);

struct Live {
    connection: Arc<Connection>,
    instance: InstanceId,
    started: PointTime,
    /// Messages that have come since it was greeted.
    heard: u64,
    /// The session reads nothing: its pipeline has more than enough to do.
    congested: bool,
}

struct GreetingWish {
    hello: Hello,
    reply: mpsc::SyncSender<Result<Greeted, String>>,
}

struct State {
    ingest: Ingest,
    inbox: VecDeque<Work>,
    inbox_bytes: u64,
    live: Option<Live>,
    greeting: Option<GreetingWish>,
    /// What the agent said of its machine, to be kept.
    description: Option<String>,
    /// The pipeline has ended for this reason; a new machine entry must be made.
    ended: Option<String>,
    stopping: bool,
    status: MachineStatus,
}

/// What is known of a machine, for status pages.
#[derive(Debug, Clone, Default)]
pub struct MachineStatus {
    /// The chain it follows.
    pub chain: ChainId,
    /// Newest change in the vault.
    pub committed: replication::SequenceNumber,
    /// The moment through which the vault is proven current.
    pub proven_through: PointTime,
    /// Whether its agent has a session.
    pub connected: bool,
}

struct Shared {
    machine: MachineId,
    state: Mutex<State>,
    /// Something for the pipeline thread.
    work: Condvar,
    /// The inbox has room again, or the machine has ended.
    room: Condvar,
    services: Services,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wall(&self) -> PointTime {
        PointTime(self.services.clock.wall().0)
    }
}

impl State {
    /// The session, if it is the one on `connection`.
    fn live_on(&mut self, connection: &Arc<Connection>) -> Option<&mut Live> {
        self.live.as_mut().filter(|live| Arc::ptr_eq(&live.connection, connection))
    }

    /// Carries out what the ingest wants. Returns the reason if the session must end.
    fn carry_out(&mut self, outcome: Outcome) -> Option<String> {
        for work in outcome.work {
            self.inbox_bytes += weight(&work);
            self.inbox.push_back(work);
        }
        let mut disconnect = outcome.disconnect;
        if let Some(live) = &self.live {
            for message in outcome.send {
                if let Err(error) = send(&live.connection, &message) {
                    disconnect.get_or_insert(error);
                    break;
                }
            }
        }
        disconnect
    }
}

fn weight(work: &Work) -> u64 {
    match work {
        Work::Changes { changes, .. } => changes.iter().map(|change| change.kind.data_len() as u64 + 64).sum(),
        Work::HealData { content: replication::wire::HealContent::Data(data), .. } => data.len() as u64,
        Work::Compare { leaves, .. } | Work::Scrub { leaves, .. } => leaves.len() as u64 * 17,
        _ => 64,
    }
}

/// Sends `message` on `connection`; waits while its queue is full.
pub(crate) fn send(connection: &Connection, message: &Message) -> Result<(), String> {
    let frame = message.encode();
    connection.send(Frame::from_parts(frame.kind, frame.parts)).map_err(|error| error.to_string())
}

/// A protected machine. Dropping the last handle ends its pipeline thread once its work is done.
pub struct Machine {
    shared: Arc<Shared>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl Machine {
    /// Opens the machine's chain on a thread of its own.
    pub fn start(
        machine: MachineId,
        services: Services,
        entropy: Arc<dyn Entropy>,
        journal: impl Fn(ChainId) -> Option<ChainState> + Send + 'static,
    ) -> std::io::Result<Arc<Machine>> {
        let shared = Arc::new_cyclic(|weak: &Weak<Shared>| {
            let wake = waker(weak.clone());
            let ingest = Ingest::new(ChainId::default(), Arc::clone(&services.log), services.pace.window_bytes, wake);
            Shared {
                machine,
                state: Mutex::new(State {
                    ingest,
                    inbox: VecDeque::new(),
                    inbox_bytes: 0,
                    live: None,
                    greeting: None,
                    description: None,
                    ended: None,
                    stopping: false,
                    status: MachineStatus::default(),
                }),
                work: Condvar::new(),
                room: Condvar::new(),
                services,
            }
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new().name(format!("chain {}", &machine.to_string()[..8])).spawn(move || {
            let end = run_pipeline(&of_thread, &*entropy, journal);
            let mut state = of_thread.lock();
            if let Some(reason) = &end {
                tracing::error!(machine = %of_thread.machine, reason, "the machine's pipeline stopped");
            }
            state.ended = Some(end.unwrap_or_else(|| "the server is stopping".into()));
            state.greeting = None;
            state.live = None;
            of_thread.room.notify_all();
        })?;
        Ok(Arc::new(Machine { shared, thread: Mutex::new(Some(thread)) }))
    }

    /// Why the machine's pipeline has ended, if it has. Make a new entry for the next session.
    pub fn ended(&self) -> Option<String> {
        self.shared.lock().ended.clone()
    }

    /// What is known of the machine.
    pub fn status(&self) -> MachineStatus {
        self.shared.lock().status.clone()
    }

    /// Has the machine's journaled tail committed without waiting for its agent.
    pub fn recover(&self, chain: ChainId) {
        self.shared.lock().status.chain = chain;
        self.shared.work.notify_all();
    }

    /// Serves one link until it ends; returns why it did.
    pub fn serve(&self, connection: Connection, feedback: &Feedback) -> String {
        let connection = Arc::new(connection);
        match self.greet(&connection, feedback) {
            Ok(()) => {}
            Err(reason) => return reason,
        }
        let reason = self.converse(&connection);
        let mut state = self.shared.lock();
        // Another link may have taken this one's place meanwhile; its session is not this one's to end.
        if state.live.is_none() || state.live_on(&connection).is_some() {
            let outcome = state.ingest.end();
            state.carry_out(outcome);
            state.live = None;
            state.status.connected = false;
        }
        drop(state);
        self.shared.work.notify_all();
        reason
    }

    fn greet(&self, connection: &Arc<Connection>, feedback: &Feedback) -> Result<(), String> {
        let hello = match receive(connection, GREETING_TIMEOUT)? {
            Some(Message::Hello(hello)) => hello,
            Some(_) => return Err("the peer did not begin with a hello".into()),
            None => return Err("the peer said nothing".into()),
        };
        if let Some(reason) = feedback.objection(&hello) {
            let _ = send(connection, &Message::Refuse { code: RefusalCode::NotAuthorised, reason: reason.clone() });
            let _ = connection.close(Duration::from_secs(1));
            return Err(reason);
        }
        let (reply, answer) = mpsc::sync_channel(1);
        {
            let (mut state, taken) = self.sound_out(&hello);
            if taken {
                drop(state);
                let reason = "another running agent uses this machine's identity; stop one of them, or join the copy \
                              as a new machine";
                let refusal = Message::Refuse { code: RefusalCode::DuplicateIdentity, reason: reason.into() };
                let _ = send(connection, &refusal);
                return Err(reason.into());
            }
            if let Some(old) = state.live.take() {
                // Its agent is on a new link or gone, even if nobody has noticed yet.
                drop(old);
                let outcome = state.ingest.end();
                state.carry_out(outcome);
            }
            if let Some(ended) = &state.ended {
                let reason = ended.clone();
                let _ = send(connection, &Message::Refuse { code: RefusalCode::Busy, reason: reason.clone() });
                return Err(reason);
            }
            state.greeting = Some(GreetingWish { hello: hello.clone(), reply });
        }
        self.shared.work.notify_all();
        let Ok(greeted) = answer.recv_timeout(GREETING_TIMEOUT) else {
            // The pipeline that was to answer has ended: its reason is the answer.
            let ended = self.shared.lock().ended.clone();
            let reason = ended.unwrap_or_else(|| "the machine's chain was not ready in time".into());
            let _ = send(connection, &Message::Refuse { code: RefusalCode::Busy, reason: reason.clone() });
            let _ = connection.close(Duration::from_secs(1));
            return Err(reason);
        };
        match greeted {
            Ok(Greeted::Accepted(receiver, welcome)) => {
                let mut state = self.shared.lock();
                send(connection, &welcome)?;
                state.status.chain = receiver.chain();
                state.status.connected = true;
                state.ingest.begin(*receiver);
                state.live = Some(Live {
                    connection: Arc::clone(connection),
                    instance: hello.instance,
                    started: hello.started,
                    heard: 0,
                    congested: false,
                });
                Ok(())
            }
            Ok(Greeted::Refused(refusal)) => {
                let reason = match &refusal {
                    Message::Refuse { reason, .. } => reason.clone(),
                    _ => "refused".into(),
                };
                let _ = send(connection, &refusal);
                let _ = connection.close(Duration::from_secs(1));
                Err(reason)
            }
            Ok(Greeted::Later) => Err("the machine's chain was not ready in time".into()),
            Err(reason) => {
                let _ = send(connection, &Message::Refuse { code: RefusalCode::Busy, reason: reason.clone() });
                let _ = connection.close(Duration::from_secs(1));
                Err(reason)
            }
        }
    }

    /// Whether another run of the agent holds the machine's place. One that is older than the caller and silent loses it:
    /// after a kill of its machine nobody else would notice for as long as an idle link may live.
    fn sound_out(&self, hello: &Hello) -> (MutexGuard<'_, State>, bool) {
        let clock = &self.shared.services.clock;
        let mut state = self.shared.lock();
        let until = clock.monotonic().plus(SILENCE_MAX);
        let mut asked = None;
        loop {
            let Some(live) = &state.live else { return (state, false) };
            if live.instance == hello.instance || live.connection.end().is_some() {
                return (state, false);
            }
            let heard = *asked.get_or_insert_with(|| {
                let frame = Message::Ping.encode();
                // A queue that is full has not been read for long; then there is nothing to ask.
                let _ = live.connection.try_send(Frame::from_parts(frame.kind, frame.parts));
                live.heard
            });
            if live.started >= hello.started || live.heard != heard {
                return (state, true);
            }
            if clock.monotonic() >= until {
                let taken = live.congested;
                if !taken {
                    tracing::info!(machine = %self.shared.machine, "a silent link gives way to a newer run of its agent");
                }
                return (state, taken);
            }
            state = self.shared.room.wait_timeout(state, SILENCE_TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn converse(&self, connection: &Arc<Connection>) -> String {
        loop {
            let wait = if self.shared.lock().ingest.is_idle() { QUIET_TICK } else { ACK_TICK };
            let message = match receive(connection, wait) {
                Ok(message) => message,
                Err(reason) => return reason,
            };
            let mut state = self.shared.lock();
            if let Some(live) = state.live_on(connection) {
                live.heard += u64::from(message.is_some());
                live.congested = true;
            }
            while state.inbox_bytes > INBOX_BYTES_MAX && state.ended.is_none() {
                state = self.shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if let Some(ended) = &state.ended {
                return ended.clone();
            }
            match state.live_on(connection) {
                Some(live) => live.congested = false,
                None => return "a newer link took this one's place".into(),
            }
            let outcome = match message {
                Some(Message::Describe { document }) => {
                    state.description = Some(document);
                    state.ingest.poll()
                }
                Some(message) => state.ingest.message(message, self.shared.wall()),
                None => state.ingest.poll(),
            };
            let has_work = !outcome.work.is_empty() || state.description.is_some();
            let disconnect = state.carry_out(outcome);
            drop(state);
            if has_work {
                self.shared.work.notify_all();
            }
            if let Some(reason) = disconnect {
                return reason;
            }
        }
    }

    /// Ends the pipeline once its work is committed, or `patience` is over.
    pub fn stop(&self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(machine = %self.shared.machine, "the machine's pipeline panicked");
        }
    }
}

fn receive(connection: &Connection, wait: Duration) -> Result<Option<Message>, String> {
    let Some(frame) = connection.recv(wait).map_err(|error| error.to_string())? else { return Ok(None) };
    let kind = frame.kind();
    Message::decode(kind, frame.into_body()).map(Some).map_err(|error| format!("a message makes no sense: {error}"))
}

/// The pipeline thread. Returns why it ended, or `None` if it was asked to.
fn run_pipeline(
    shared: &Arc<Shared>,
    entropy: &dyn Entropy,
    journal: impl Fn(ChainId) -> Option<ChainState>,
) -> Option<String> {
    // The first hello brings the machine's name and disks; a journaled tail is committed without waiting for one.
    let hello = wait_for_greeting(shared)?;
    let opened = Pipeline::open(shared.services.clone(), entropy, shared.machine, hello.as_ref(), &journal);
    let mut pipeline = match opened {
        Ok(pipeline) => pipeline,
        Err(error) => return Some(chain_of_errors(&error)),
    };
    pipeline.wake_with(waker(Arc::downgrade(shared)));
    let mut patience = None;
    let mut descriptions = Descriptions::default();
    loop {
        let (work, stopping) = next_work(shared, &pipeline);
        let mut events = Vec::new();
        for work in work {
            match pipeline.work(work) {
                Ok(more) => events.extend(more),
                Err(error) => return Some(chain_of_errors(&error)),
            }
            // Heal data is credited as it goes, not a roomful at a time.
            deliver(shared, std::mem::take(&mut events));
        }
        match pipeline.step() {
            Ok(more) => events.extend(more),
            Err(error) => return Some(chain_of_errors(&error)),
        }
        deliver(shared, events);
        let description = shared.lock().description.take();
        if let Some(document) = description
            && let Err(error) = descriptions.keep(&shared.services, shared.machine, document)
        {
            // Said again with the next session; nothing depends on it before a recovery.
            tracing::warn!(machine = %shared.machine, %error, "the machine's description was not kept");
        }
        if let Some(hello) = greeting_due(shared, &pipeline) {
            match pipeline.followed() {
                Ok(chain) if chain == pipeline.chain() => {}
                // The machine came home on another chain. What is pending for the old one goes into the vault first.
                Ok(_) if !pipeline.is_drained() => continue,
                Ok(_) => match Pipeline::open(shared.services.clone(), entropy, shared.machine, Some(&hello), &journal)
                {
                    Ok(other) => {
                        pipeline = other;
                        pipeline.wake_with(waker(Arc::downgrade(shared)));
                    }
                    Err(error) => return Some(chain_of_errors(&error)),
                },
                Err(error) => tracing::warn!(machine = %shared.machine, %error, "the catalog cannot be read now"),
            }
            if let Some(reason) = answer_greeting(shared, &mut pipeline) {
                return Some(reason);
            }
        }
        let mut state = shared.lock();
        state.status.chain = pipeline.chain();
        state.status.committed = pipeline.committed();
        state.status.proven_through = pipeline.writer().proven_through();
        if stopping && state.inbox.is_empty() {
            // What is not committed by then is in the journal.
            let now = shared.services.clock.monotonic();
            let since = *patience.get_or_insert(now);
            if pipeline.is_drained() || now.since(since) >= STOPPING_PATIENCE {
                return None;
            }
        }
    }
}

/// What the journal's thread calls when records have become durable.
fn waker(shared: Weak<Shared>) -> Arc<dyn Fn() + Send + Sync> {
    Arc::new(move || {
        if let Some(shared) = shared.upgrade() {
            shared.work.notify_all();
        }
    })
}

fn wait_for_greeting(shared: &Shared) -> Option<Option<Hello>> {
    let mut state = shared.lock();
    loop {
        if state.stopping {
            return None;
        }
        if let Some(wish) = &state.greeting {
            return Some(Some(wish.hello.clone()));
        }
        if state.status.chain != ChainId::default() {
            return Some(None);
        }
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

fn next_work(shared: &Shared, pipeline: &Pipeline) -> (VecDeque<Work>, bool) {
    let mut state = shared.lock();
    let outcome = state.ingest.poll();
    state.carry_out(outcome);
    if state.inbox.is_empty() && state.greeting.is_none() {
        let tick = if pipeline.is_drained() && !state.stopping { IDLE_TICK } else { BUSY_TICK };
        state = shared.work.wait_timeout(state, tick).unwrap_or_else(PoisonError::into_inner).0;
        let outcome = state.ingest.poll();
        state.carry_out(outcome);
    }
    state.inbox_bytes = 0;
    let work = std::mem::take(&mut state.inbox);
    shared.room.notify_all();
    (work, state.stopping)
}

fn deliver(shared: &Shared, events: Vec<Event>) {
    if events.is_empty() {
        return;
    }
    let mut state = shared.lock();
    for event in events {
        let outcome = state.ingest.event(event);
        if let Some(reason) = state.carry_out(outcome) {
            tracing::info!(machine = %shared.machine, reason, "the link is closed");
            state.live = None;
        }
    }
}

/// The hello that waits for its answer, once everything that came before it is dealt with.
fn greeting_due(shared: &Shared, pipeline: &Pipeline) -> Option<Hello> {
    let state = shared.lock();
    let ready = state.ingest.is_idle() && state.inbox.is_empty() && pipeline.is_ready_to_greet();
    state.greeting.as_ref().filter(|_| ready).map(|wish| wish.hello.clone())
}

fn answer_greeting(shared: &Shared, pipeline: &mut Pipeline) -> Option<String> {
    let mut state = shared.lock();
    let wish = state.greeting.take()?;
    let live = state.live.as_ref().map(|live| live.instance);
    drop(state);
    let answer = pipeline.greet(&wish.hello, shared.machine, live);
    let (answer, fatal) = match answer {
        Ok(Greeted::Later) => {
            shared.lock().greeting.get_or_insert(wish);
            return None;
        }
        Ok(greeted) => (Ok(greeted), None),
        Err(error) => {
            let reason = chain_of_errors(&error);
            (Err(reason.clone()), Some(reason))
        }
    };
    let _ = wish.reply.send(answer);
    fatal
}

/// An error and its sources in one line.
pub(crate) fn chain_of_errors(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
