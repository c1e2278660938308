//! The transmission phase of one connection: threads around the pure protocol.
//!
//! ```text
//! socket ─► reader thread ─┬─ quick and small: executed here, replies gathered, one send when no request is waiting
//!                          └─ slow or large: queue ─► workers (started when needed) ─► one send each
//! ```
//!
//! Whether a small request is quick is measured: a running average of the device's time decides for reads and for
//! writes. A warm device is thus served by one thread without any hand-over, a cold one by several at once.
//!
//! Invariants: a reply is sent after its request took effect; requests in flight and their bytes are bounded,
//! for this connection and for all of a server; when
//! the reader stops, whatever was accepted is still executed and answered before the threads end.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use world::{BlockDevice, BlockError, Extent};

use crate::channel::{Channel, Inbox};
use crate::limits;
use crate::memory::{Held, Memory};
use crate::negotiation::Agreed;
use crate::protocol::{CMD_BLOCK_STATUS, CMD_READ};
use crate::reply::{Outbox, error_code};
use crate::request::{Durability, ErrorCode, Request, RequestHeader};

/// Serves requests until the client leaves, the stream breaks or `stopping` is set and the socket's receiving side
/// was shut down.
pub(crate) fn transmit(
    channel: &Channel,
    inbox: Inbox,
    agreed: &Agreed,
    workers_max: usize,
    memory: &Arc<Memory>,
    stopping: &AtomicBool,
) -> io::Result<()> {
    let connection = Connection {
        channel,
        agreed,
        // A TLS stream has one state for both directions, so one thread does everything.
        workers_max: if channel.is_encrypted() { 0 } else { workers_max },
        memory,
        sending: Mutex::new(()),
        queue: Mutex::new(Queue::default()),
        work: Condvar::new(),
        room: Condvar::new(),
        read_pace: Pace::default(),
        write_pace: Pace::default(),
        broken: AtomicBool::new(false),
    };
    thread::scope(|scope| {
        // Closed even if the device panics under this thread, else the workers would be waited for without end.
        let closing = CloseQueue(&connection);
        let mut reader = Reader { connection: &connection, inbox, outbox: Outbox::new() };
        let result = reader.run(scope, stopping).and_then(|()| connection.send(&mut reader.outbox));
        drop(closing);
        result
    })
}

struct Connection<'a> {
    channel: &'a Channel,
    agreed: &'a Agreed,
    workers_max: usize,
    memory: &'a Arc<Memory>,
    sending: Mutex<()>,
    queue: Mutex<Queue>,
    /// Signalled when a job was queued or the queue closed.
    work: Condvar,
    /// Signalled when a job was finished.
    room: Condvar,
    read_pace: Pace,
    write_pace: Pace,
    /// Replies cannot be sent any more.
    broken: AtomicBool,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    in_flight: usize,
    in_flight_bytes: usize,
    workers: usize,
    idle_workers: usize,
    closed: bool,
}

struct Job {
    cookie: u64,
    request: Request,
    payload: Vec<u8>,
    weight: usize,
    held: Held,
}

struct CloseQueue<'a>(&'a Connection<'a>);

impl Drop for CloseQueue<'_> {
    fn drop(&mut self) {
        self.0.lock_queue().closed = true;
        self.0.work.notify_all();
    }
}

struct Reader<'a> {
    connection: &'a Connection<'a>,
    inbox: Inbox,
    outbox: Outbox,
}

impl<'a> Reader<'a> {
    fn run<'scope>(&mut self, scope: &'scope thread::Scope<'scope, '_>, stopping: &AtomicBool) -> io::Result<()>
    where
        'a: 'scope,
    {
        let connection = self.connection;
        loop {
            self.receive(RequestHeader::BYTES)?;
            if stopping.load(Ordering::Relaxed) {
                return Ok(());
            }
            let Some(bytes) = self.inbox.take::<{ RequestHeader::BYTES }>(connection.channel, None)? else {
                return Ok(());
            };
            let header =
                RequestHeader::decode(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            let payload = header.payload_bytes() as usize;
            let request = match connection.agreed.terms.check(&header) {
                Ok(Request::Disconnect) => return Ok(()),
                Ok(request) => request,
                Err(code) => {
                    tracing::debug!(?header, ?code, "refused a request");
                    connection.send(&mut self.outbox)?;
                    self.inbox.skip(connection.channel, payload as u64)?;
                    self.refuse(&header, code);
                    continue;
                }
            };
            if self.outbox.len() >= limits::OUTBOX_BYTES_GATHERED {
                connection.send(&mut self.outbox)?;
            }
            let weight = weight_of(&request, payload);
            if !connection.runs_inline(&request, payload) {
                self.hand_over(scope, header.cookie, request, payload, weight)?;
            } else if weight > limits::INLINE_BYTES_MAX {
                self.run_counted(header.cookie, &request, payload, weight)?;
            } else {
                self.run_inline(header.cookie, &request, payload)?;
            }
        }
    }

    /// Makes `wanted` bytes available. Replies leave before this thread waits for its client.
    fn receive(&mut self, wanted: usize) -> io::Result<()> {
        if self.inbox.available().len() < wanted {
            self.connection.send(&mut self.outbox)?;
            self.inbox.fill(self.connection.channel, wanted, None)?;
        }
        Ok(())
    }

    fn refuse(&mut self, header: &RequestHeader, code: ErrorCode) {
        if self.connection.agreed.terms.structured && matches!(header.command, CMD_READ | CMD_BLOCK_STATUS) {
            self.outbox.push_error_chunk(header.cookie, code, "the request is not valid for this export");
        } else {
            self.outbox.push_simple(header.cookie, Err(code));
        }
    }

    fn run_inline(&mut self, cookie: u64, request: &Request, payload: usize) -> io::Result<()> {
        if payload <= limits::INLINE_BYTES_MAX {
            self.receive(payload)?;
            let Some(data) = self.inbox.available().get(..payload) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            self.connection.execute(cookie, request, data, &mut self.outbox);
            self.inbox.consume(payload);
        } else {
            let data = self.receive_data(payload)?;
            self.connection.execute(cookie, request, &data, &mut self.outbox);
        }
        Ok(())
    }

    /// As [`Reader::run_inline`], for a request that counts as memory.
    fn run_counted(&mut self, cookie: u64, request: &Request, payload: usize, weight: usize) -> io::Result<()> {
        self.connection.send(&mut self.outbox)?;
        let _held = self.connection.memory.hold(weight);
        self.run_inline(cookie, request, payload)?;
        self.connection.send(&mut self.outbox)
    }

    /// The data of a write. A client that began it must go on with it.
    fn receive_data(&mut self, payload: usize) -> io::Result<Vec<u8>> {
        let channel = self.connection.channel;
        let mut data = vec![0; payload];
        if payload > limits::INLINE_BYTES_MAX {
            channel.set_read_timeout(Some(limits::STALL_MAX))?;
            self.inbox.read_exact(channel, &mut data)?;
            channel.set_read_timeout(None)?;
        } else {
            self.inbox.read_exact(channel, &mut data)?;
        }
        Ok(data)
    }

    fn hand_over<'scope>(
        &mut self,
        scope: &'scope thread::Scope<'scope, '_>,
        cookie: u64,
        request: Request,
        payload: usize,
        weight: usize,
    ) -> io::Result<()>
    where
        'a: 'scope,
    {
        let connection = self.connection;
        connection.send(&mut self.outbox)?;
        connection.wait_for_room(weight);
        let held = connection.memory.hold(weight);
        let data = self.receive_data(payload).inspect_err(|_| connection.finished(weight))?;
        let mut queue = connection.lock_queue();
        queue.jobs.push_back(Job { cookie, request, payload: data, weight, held });
        if queue.idle_workers < queue.jobs.len() && queue.workers < connection.workers_max {
            queue.workers += 1;
            drop(queue);
            thread::Builder::new()
                .name("nbd-worker".to_owned())
                .spawn_scoped(scope, move || connection.work())
                .inspect_err(|_| connection.lock_queue().workers -= 1)?;
        } else {
            drop(queue);
            connection.work.notify_one();
        }
        Ok(())
    }
}

impl Connection<'_> {
    fn runs_inline(&self, request: &Request, payload: usize) -> bool {
        if self.workers_max == 0 {
            return true;
        }
        match request {
            Request::Read(range, _) => {
                range.end - range.start <= limits::INLINE_BYTES_MAX as u64 && self.read_pace.is_quick()
            }
            Request::Write(_, Durability::Later) => payload <= limits::INLINE_BYTES_MAX && self.write_pace.is_quick(),
            _ => false,
        }
    }

    /// Counts a request of `weight` bytes as in flight as soon as the limits allow it.
    fn wait_for_room(&self, weight: usize) {
        let mut queue = self.lock_queue();
        while queue.in_flight > 0
            && (queue.in_flight >= limits::IN_FLIGHT_REQUESTS_MAX
                || queue.in_flight_bytes + weight > limits::IN_FLIGHT_BYTES_MAX)
        {
            queue = self.room.wait(queue).expect("nothing panics while holding the queue");
        }
        queue.in_flight += 1;
        queue.in_flight_bytes += weight;
    }

    fn finished(&self, weight: usize) {
        let mut queue = self.lock_queue();
        queue.in_flight -= 1;
        queue.in_flight_bytes -= weight;
        drop(queue);
        self.room.notify_one();
    }

    fn work(&self) {
        let mut outbox = Outbox::new();
        while let Some(job) = self.next_job(&mut outbox) {
            let _finish = FinishJob { connection: self, weight: job.weight, _held: job.held };
            if self.broken.load(Ordering::Relaxed) {
                continue;
            }
            self.execute(job.cookie, &job.request, &job.payload, &mut outbox);
            if let Err(error) = self.send(&mut outbox) {
                tracing::debug!(%error, "the client left before its reply");
            }
        }
    }

    fn next_job(&self, outbox: &mut Outbox) -> Option<Job> {
        let mut queue = self.lock_queue();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle_workers += 1;
            let (guard, waited) = self
                .work
                .wait_timeout(queue, limits::WORKER_IDLE_AFTER)
                .expect("nothing panics while holding the queue");
            queue = guard;
            queue.idle_workers -= 1;
            if waited.timed_out() && queue.jobs.is_empty() && !queue.closed {
                outbox.clear(limits::OUTBOX_BYTES_KEPT_IDLE);
                queue.idle_workers += 1;
                queue = self
                    .work
                    .wait_while(queue, |queue| queue.jobs.is_empty() && !queue.closed)
                    .expect("nothing panics while holding the queue");
                queue.idle_workers -= 1;
            }
        }
    }

    /// Does what `request` asks for and appends the reply.
    fn execute(&self, cookie: u64, request: &Request, payload: &[u8], outbox: &mut Outbox) {
        let export = self.agreed.export.as_ref();
        let device = export.device();
        let result = match request {
            Request::Read(range, shape) => {
                let result = outbox.push_read(cookie, range.clone(), *shape, |buffer| {
                    self.read_pace.measure(|| device.read_at(range.start, buffer))
                });
                if let Err(error) = &result {
                    warn(&self.agreed.name, "read", error);
                }
                return;
            }
            Request::Status(range, pieces) => match allocation(device, range, *pieces) {
                Ok(extents) => return outbox.push_status(cookie, &extents),
                Err(error) => {
                    warn(&self.agreed.name, "block status", &error);
                    return outbox.push_error_chunk(cookie, error_code(&error), &error.to_string());
                }
            },
            Request::Write(offset, Durability::Later) => self.write_pace.measure(|| device.write_at(*offset, payload)),
            Request::Write(offset, Durability::BeforeReply) => export.write_durable(*offset, payload),
            Request::Zero(range, durability) => {
                device.write_zeroes(range.clone()).and_then(|()| settle(device, *durability))
            }
            Request::Discard(range, durability) => {
                device.discard(range.clone()).and_then(|()| settle(device, *durability))
            }
            Request::Flush => device.flush(),
            Request::Prefetch(range) => export.prefetch(range.clone()),
            Request::Disconnect => Ok(()),
        };
        if let Err(error) = &result {
            warn(&self.agreed.name, "change", error);
        }
        outbox.push_simple(cookie, result.map_err(|error| error_code(&error)));
    }

    /// Sends what `outbox` holds and empties it.
    fn send(&self, outbox: &mut Outbox) -> io::Result<()> {
        if outbox.is_empty() {
            return Ok(());
        }
        let result = {
            let _sending = self.sending.lock().expect("nothing panics while sending");
            self.channel.send(&mut outbox.pieces())
        };
        outbox.clear(limits::OUTBOX_BYTES_KEPT);
        if result.is_err() {
            // The reader may be waiting for a client that sends and never receives.
            self.broken.store(true, Ordering::Relaxed);
            if !self.channel.is_encrypted() {
                self.channel.shutdown(Shutdown::Both);
            }
        }
        result
    }

    fn lock_queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("nothing panics while holding the queue")
    }
}

/// Bytes that a request and its reply take.
fn weight_of(request: &Request, payload: usize) -> usize {
    match request {
        Request::Read(range, _) => (range.end - range.start) as usize,
        Request::Status(..) => limits::STATUS_EXTENTS_MAX * 8,
        _ => payload,
    }
}

/// Frees a job's place in flight, also when the device panicked: then the connection ends, because one of its
/// requests will never be answered.
struct FinishJob<'a> {
    connection: &'a Connection<'a>,
    weight: usize,
    _held: Held,
}

impl Drop for FinishJob<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.connection.broken.store(true, Ordering::Relaxed);
            self.connection.channel.shutdown(Shutdown::Both);
            self.connection.lock_queue().workers -= 1;
        }
        self.connection.finished(self.weight);
    }
}

/// A running average of how long a class of requests takes.
#[derive(Default)]
struct Pace {
    nanoseconds: AtomicU64,
}

impl Pace {
    fn is_quick(&self) -> bool {
        self.nanoseconds.load(Ordering::Relaxed) <= limits::INLINE_NANOSECONDS_MAX
    }

    /// The machine's clock and not the world's: this decides only which thread runs a request.
    fn measure<T>(&self, action: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = action();
        let taken = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX / 8).min(u64::MAX / 8);
        // Two threads may overwrite each other's sample: it is an estimate.
        let average = self.nanoseconds.load(Ordering::Relaxed);
        self.nanoseconds.store(average - average / 4 + taken / 4, Ordering::Relaxed);
        result
    }
}

fn settle(device: &dyn BlockDevice, durability: Durability) -> Result<(), BlockError> {
    match durability {
        Durability::Later => Ok(()),
        Durability::BeforeReply => device.flush(),
    }
}

/// At most `pieces_max` pieces from the start of `range`, neighbours of one kind merged. The device is asked window
/// by window, so that memory stays bounded whatever the range.
fn allocation(device: &dyn BlockDevice, range: &Range<u64>, pieces_max: usize) -> Result<Vec<Extent>, BlockError> {
    let mut pieces: Vec<Extent> = Vec::new();
    let mut position = range.start;
    while position < range.end {
        let window = position..range.end.min(position + limits::STATUS_WINDOW_BYTES);
        for extent in device.extents(window.clone())? {
            let full = pieces.len() == pieces_max;
            match pieces.last_mut() {
                Some(last) if last.kind == extent.kind => last.range.end = extent.range.end,
                _ if full => return Ok(pieces),
                _ => pieces.push(extent),
            }
        }
        position = window.end;
    }
    Ok(pieces)
}

fn warn(export: &str, what: &str, error: &BlockError) {
    match error {
        BlockError::OutOfRange { .. } | BlockError::ReadOnly => {
            tracing::debug!(export, %error, "the device refused a {what}");
        }
        BlockError::Unreadable { source, .. } | BlockError::Failed(source) => {
            tracing::warn!(export, %error, cause = %source, "a {what} failed; the client was told");
        }
        BlockError::NoSpace | BlockError::Corrupt(_) => {
            tracing::warn!(export, %error, "a {what} failed; the client was told");
        }
    }
}
