//! Greeting senders: whether what one has goes on where the journal ends, or a new generation begins with a gap.

use replication::cut::{CutKind, CutPlanner, PointTime};
use replication::receiver::{Greeting, Receiver, Remembered, SessionStart, greet};
use replication::wire::{HealNeed, Hello, Message, RefusalCode, Resume};
use replication::{InstanceId, MachineId, Reach, SequenceNumber, StreamHash};
use vault::manifest::Delta;
use vault::{ChainHistory, ChainWriter, VaultError};

use super::open::{Unopened, announce};
use super::{Pipeline, PipelineError, Services};

/// The answer to a sender's first message.
pub enum Greeted {
    /// The session begins; send this first.
    Accepted(Box<Receiver>, Message),
    /// Send this and close.
    Refused(Message),
    /// Not yet: step the pipeline until it is ready to greet, and greet again.
    Later,
}

/// A greeting that waits until everything before it is in the vault.
pub(super) struct Renewal {
    instance: InstanceId,
    need: HealNeed,
    cause: String,
}

impl Pipeline {
    /// Whether everything that came before is in the vault or safely journaled, so that a sender can be greeted. Call
    /// [`Pipeline::step`] until it is.
    pub fn is_ready_to_greet(&self) -> bool {
        self.loaded == self.journaled && self.flying.is_none() && self.heal.is_none()
    }

    /// Judges a sender's first message and begins a session.
    ///
    /// # Errors
    /// As [`Pipeline::step`]: the new generation could not be opened.
    pub fn greet(
        &mut self,
        hello: &Hello,
        machine: MachineId,
        live: Option<InstanceId>,
    ) -> Result<Greeted, PipelineError> {
        self.answer(hello, machine, live).map_err(|error| error.of_chain(self.chain))
    }

    fn answer(&mut self, hello: &Hello, machine: MachineId, live: Option<InstanceId>) -> Result<Greeted, Unopened> {
        if let Some(reason) = self.left_behind(hello)? {
            return Ok(Greeted::Refused(Message::Refuse { code: RefusalCode::NotAuthorised, reason }));
        }
        self.still_holds(hello)?;
        let empty = self.earlier.is_empty() && self.writer.state().layers.is_empty() && self.below.is_none();
        let known = Remembered {
            machine,
            chain: self.chain,
            stream: self.stream.filter(|(sequence, _)| *sequence == self.journaled),
            committed: self.writer.through(),
            past: self.past,
            incomplete: self.is_in_gap(),
            lacking: self.lacking_of(&hello.disks),
            last_boot: self.last_boot,
            live,
            empty,
        };
        // A renewal that waits is not judged again by what was committed meanwhile.
        let waiting = self.renewing.take().filter(|renewal| renewal.instance == hello.instance);
        let (continues, need) = match (greet(hello, &known), waiting) {
            (Greeting::Refuse { code, reason }, _) => {
                return Ok(Greeted::Refused(Message::Refuse { code, reason }));
            }
            (Greeting::Continue { need }, None) => (true, need),
            (Greeting::Renew { need, cause }, None) => {
                if !self.renew(&cause)? {
                    self.renewing = Some(Renewal { instance: hello.instance, need, cause });
                    return Ok(Greeted::Later);
                }
                (false, need)
            }
            (now, Some(mut renewal)) => {
                if matches!(now, Greeting::Renew { need: HealNeed::Whole, .. }) {
                    renewal.need = HealNeed::Whole;
                }
                if !self.renew(&renewal.cause)? {
                    self.renewing = Some(renewal);
                    return Ok(Greeted::Later);
                }
                (false, renewal.need)
            }
        };
        self.last_boot = Some((hello.boot, hello.vm_generation));
        self.announced = hello.disks.clone();
        // What was under way begins anew.
        self.heal_begun = SequenceNumber(0);
        // A stream that goes on tells of its disks in their place; a new one begins behind every earlier point. Where a gap hides
        // everything up to the heal's end, what was said of disks when the stream began can be said again: a server that was
        // killed before its first commit has forgotten it, and points would cut a disk off that had grown.
        let begin = self.writer.generation().base().max(self.journaled);
        let tells = !continues || self.is_hidden(begin);
        for geometry in hello.disks.iter().filter(|_| tells) {
            self.note_geometry(begin, geometry.clone());
        }
        if !self.pending.geometries.is_empty() {
            self.touch();
        }
        // What such a stream holds back behind what is journaled was captured without them: its generation may be an older one
        // than this server's.
        let left = if continues { self.journaled } else { begin };
        self.note_removed(left, self.last_point.max(PointTime(self.services.clock.wall().0)));
        let (_, hash) = self.stream.unwrap_or((self.journaled, StreamHash::default()));
        let start = SessionStart {
            chain: self.chain,
            generation: self.writer.generation(),
            journaled: self.journaled,
            hash,
            committed: self.writer.through(),
            past: self.past,
            last_point: self.last_point,
            planner: self.planner.clone(),
            continues,
            need,
            // A sender that lacks something tells of its break in its place.
            in_gap: self.is_in_gap(),
            base_empty: empty,
            window_bytes: self.services.pace.window_bytes,
            wall: PointTime(self.services.clock.wall().0),
        };
        let (receiver, welcome) = Receiver::start(hello, start);
        Ok(Greeted::Accepted(Box::new(receiver), welcome))
    }

    /// Why a run of the agent that was capturing while its machine's chain was closed is not taken up on the chain that came
    /// home instead: a comparison would make its disks, which nobody brought anything home to, the machine's newest state.
    fn left_behind(&self, hello: &Hello) -> Result<Option<String>, VaultError> {
        let Some(before) = hello.followed.filter(|chain| *chain != self.chain) else { return Ok(None) };
        let Some(history) = ChainHistory::find(&self.services.store, &self.services.keys, before)? else {
            return Ok(None);
        };
        Ok(history.standing.closed().map(|_| {
            format!(
                "the history of this machine was closed while this agent ran, and goes on along the branch {} that was brought \
                 home; the disks here are not what came home, and what is written to them is not recorded: stop this agent, \
                 and start the machine's agent anew on the disks that the branch was written to",
                self.chain
            )
        }))
    }

    /// A sender that was under a newer generation tells a server which was asleep that somebody else has opened one. (A
    /// vault that was rolled back knows of no newer one either, and goes on.)
    ///
    /// # Errors
    /// [`VaultError::Fenced`]; those of reading the chain.
    fn still_holds(&self, hello: &Hello) -> Result<(), VaultError> {
        let newer = |resume: &Resume| resume.chain == self.chain && resume.generation > self.writer.generation();
        if !hello.resume.as_ref().is_some_and(newer) {
            return Ok(());
        }
        let history = ChainHistory::load(&self.services.store, &self.services.keys, self.chain)?;
        match history.generation().generation > self.writer.generation() {
            true => Err(VaultError::Fenced { number: history.head.number }),
            false => Ok(()),
        }
    }

    /// Continuity is lost: everything so far is committed, then the next generation begins with a gap. `false` while
    /// something is still to be committed.
    fn renew(&mut self, cause: &str) -> Result<bool, Unopened> {
        if !self.is_in_gap() {
            // Complete requests up to here are a legal prefix: its end can still be opened.
            if let Some(cut) = self.planner.close(CutKind::GenerationEnd) {
                self.pending.cuts.push(cut);
            }
            let time = self.last_point.max(PointTime(self.services.clock.wall().0));
            let at = self.journaled;
            self.note_gap(at, time, cause);
            self.open_gap(at, Reach::Machine, time, cause.to_owned());
        }
        if self.pending.since.is_some() || self.flying.is_some() {
            return Ok(false);
        }
        let Services { store, session, keys, .. } = &self.services;
        let history = ChainHistory::load(store, keys, self.chain)?;
        if history.head != self.writer.head() {
            return Err(VaultError::Fenced { number: history.head.number }.into());
        }
        self.earlier = history.layers();
        let (delta, announce) = (Delta::default(), announce(&self.services, self.chain));
        self.writer = ChainWriter::open_generation_announced(store, session, keys, &history, cause, delta, announce)?;
        self.view = None;
        self.planner = CutPlanner::default();
        self.stream = Some((self.journaled, StreamHash::default()));
        self.journal_session();
        Ok(true)
    }
}
