//! A link: two bounded queues with a delay, that can stall and break. Messages in flight when it breaks are lost.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::time::Duration;

use agent::engine::{Wire, WireClosed};
use bytes::Bytes;
use link::{Frame, FrameLink, LinkError, TrySend};
use replication::wire::Message;

use crate::clock::TrueTime;

/// Messages that fit into one direction.
const CAPACITY: usize = 64;

#[derive(Debug, Default)]
struct Lane {
    /// `(arrives at, kind, body)`; messages travel encoded, so that the codec is part of every run.
    in_flight: VecDeque<(u64, u8, Bytes)>,
}

#[derive(Debug, Default)]
struct State {
    lanes: [Lane; 2],
    broken: bool,
    stalled_until: u64,
}

/// One connection. Each side holds an end.
#[derive(Debug, Clone)]
pub struct LinkEnd {
    state: Arc<Mutex<State>>,
    time: TrueTime,
    delay_ns: u64,
    side: usize,
}

/// A connection with a one-way delay: the sender's end and the receiver's.
pub fn connect(time: &TrueTime, delay_ns: u64) -> (LinkEnd, LinkEnd) {
    let state = Arc::new(Mutex::new(State::default()));
    let end = |side| LinkEnd { state: state.clone(), time: time.clone(), delay_ns, side };
    (end(0), end(1))
}

impl LinkEnd {
    /// Breaks the connection: what is in flight is lost.
    pub fn sever(&self) {
        let mut state = self.lock();
        state.broken = true;
        state.lanes = Default::default();
    }

    /// Nothing arrives for `ns` nanoseconds.
    pub fn stall(&self, ns: u64) {
        self.lock().stalled_until = self.time.now() + ns;
    }

    /// Whether nothing arrives now.
    pub fn is_stalled(&self) -> bool {
        self.time.now() < self.lock().stalled_until
    }

    /// Whether the connection is broken.
    pub fn is_broken(&self) -> bool {
        self.lock().broken
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wire for LinkEnd {
    fn try_send(&mut self, message: Message) -> Result<Option<Message>, WireClosed> {
        let mut state = self.lock();
        if state.broken {
            return Err(WireClosed("severed".into()));
        }
        let lane = &mut state.lanes[self.side];
        if lane.in_flight.len() >= CAPACITY {
            drop(state);
            return Ok(Some(message));
        }
        let frame = message.encode();
        lane.in_flight.push_back((self.time.now() + self.delay_ns, frame.kind, frame.body()));
        Ok(None)
    }

    fn try_receive(&mut self) -> Result<Option<Message>, WireClosed> {
        let mut state = self.lock();
        if state.broken {
            return Err(WireClosed("severed".into()));
        }
        let now = self.time.now();
        if now < state.stalled_until {
            return Ok(None);
        }
        let lane = &mut state.lanes[1 - self.side];
        if lane.in_flight.front().is_none_or(|(arrives, ..)| *arrives > now) {
            return Ok(None);
        }
        let (_, kind, body) = lane.in_flight.pop_front().expect("the queue has a front");
        Ok(Some(Message::decode(kind, body).expect("what was encoded here decodes")))
    }
}

/// The way home speaks frames. Nobody waits here: an empty link is an answer.
impl FrameLink for LinkEnd {
    fn send(&self, frame: Frame) -> Result<(), LinkError> {
        let mut state = self.lock();
        if state.broken {
            return Err(LinkError::PeerClosed);
        }
        let arrives = self.time.now() + self.delay_ns;
        state.lanes[self.side].in_flight.push_back((arrives, frame.kind(), frame.into_body()));
        Ok(())
    }

    fn try_send(&self, frame: Frame) -> Result<TrySend, LinkError> {
        if self.lock().lanes[self.side].in_flight.len() >= CAPACITY {
            return Ok(TrySend::Full(frame));
        }
        self.send(frame).map(|()| TrySend::Sent)
    }

    fn recv(&self, _: Duration) -> Result<Option<Frame>, LinkError> {
        let mut state = self.lock();
        if state.broken {
            return Err(LinkError::PeerClosed);
        }
        let now = self.time.now();
        let stalled = now < state.stalled_until;
        let lane = &mut state.lanes[1 - self.side];
        if stalled || lane.in_flight.front().is_none_or(|(arrives, ..)| *arrives > now) {
            return Ok(None);
        }
        let (_, kind, body) = lane.in_flight.pop_front().expect("the queue has a front");
        Ok(Some(Frame::new(kind, body)))
    }
}
