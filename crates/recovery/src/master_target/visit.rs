//! One branch host's visit to a master target, without threads: [`HomeVisit::step`] does one bounded piece of it.
//!
//! ```text
//! Waiting ─order─► Claiming ─► disks claimed, note written ─► Serving ─complete─► note removed
//! ```

use std::sync::Arc;
use std::time::Duration;

use link::{Frame, FrameLink};
use replication::{ChainId, DiskId, MachineId};
use world::Monotonic;

use super::{HomeError, HomeSession, MasterTarget};
use crate::home_disk::{HomeOrder, Refusal, claim_all};
use crate::home_wire::{HOME_VERSION, HomeMessage, Said, replication_frame, understand};
use crate::limits;
use crate::seats::Seat;

/// What a branch host ordered.
#[derive(Clone)]
pub(super) struct Order {
    pub(super) machine: MachineId,
    pub(super) chain: ChainId,
    pub(super) disks: Vec<HomeOrder>,
}

impl Order {
    pub(super) fn note_name(&self) -> String {
        format!("failback-{}.json", self.machine)
    }
}

/// What a step of a visit achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visit {
    /// Something arrived and was done.
    Busy,
    /// Nothing came.
    Idle,
    /// Equality was proved and the disks are usable.
    Completed,
}

enum Stage {
    Waiting {
        since: Monotonic,
    },
    /// An earlier session of the same failback has to let go of the disks.
    Claiming {
        order: Order,
        since: Monotonic,
    },
    Serving {
        order: Order,
        session: Box<HomeSession>,
        seat: Seat,
    },
}

/// See the module's documentation. Dropping it ends it where it is: the note stays.
pub struct HomeVisit {
    stage: Stage,
}

/// Frames taken between two syncs.
const FRAMES_PER_ROUND_MAX: usize = 64;

impl HomeVisit {
    pub(super) fn new(now: Monotonic) -> HomeVisit {
        HomeVisit { stage: Stage::Waiting { since: now } }
    }

    /// Takes what arrives on `link` within `patience` and does it.
    ///
    /// # Errors
    /// See [`HomeError`]: the visit is over.
    pub fn step(
        &mut self,
        target: &MasterTarget,
        link: &dyn FrameLink,
        patience: Duration,
    ) -> Result<Visit, HomeError> {
        if let Stage::Serving { seat, .. } = &self.stage
            && seat.must_leave()
        {
            return Err(HomeError::Replaced);
        }
        if let Stage::Claiming { order, since } = &self.stage {
            let waited = target.clock.monotonic().since(*since);
            match target.seats.take(order.machine, order.chain) {
                Ok(Some(seat)) => {
                    let order = order.clone();
                    self.stage = begin(target, link, order, seat)?;
                    return Ok(Visit::Busy);
                }
                Ok(None) if waited > limits::SEAT_WAIT => {
                    let refusal = Refusal::new(
                        "an earlier session of this failback still holds the disks",
                        "it is busy with them and will end by itself",
                        "repeat the command in a minute",
                    );
                    return refuse(link, refusal);
                }
                Ok(None) => {}
                Err(refusal) => return refuse(link, refusal),
            }
        }
        let first = link.recv(patience.min(limits::SEAT_LOOK))?;
        match &mut self.stage {
            Stage::Waiting { since } => {
                let Some(frame) = first else {
                    return match target.clock.monotonic().since(*since) > limits::HOME_SILENCE {
                        true => Err(HomeError::Protocol("no order came".into())),
                        false => Ok(Visit::Idle),
                    };
                };
                let order = understand_order(link, frame)?;
                self.stage = Stage::Claiming { order, since: target.clock.monotonic() };
                Ok(Visit::Busy)
            }
            Stage::Claiming { .. } => match first {
                Some(_) => Err(HomeError::Protocol("something came before the order was accepted".into())),
                None => Ok(Visit::Idle),
            },
            Stage::Serving { order, session, .. } => {
                let Some(first) = first else {
                    return Ok(if session.sweep()? { Visit::Busy } else { Visit::Idle });
                };
                serve(target, link, order, session, first)
            }
        }
    }
}

fn begin(target: &MasterTarget, link: &dyn FrameLink, order: Order, seat: Seat) -> Result<Stage, HomeError> {
    let disks = match claim_all(&order.disks, &*target.disks) {
        Ok(disks) => disks,
        Err(refusal) => return refuse(link, refusal),
    };
    target.write_note(&order)?;
    tracing::info!(machine = %order.machine, chain = %order.chain, "failback begins: the home disks are not usable until it ends");
    link.send(HomeMessage::Accepted.frame())?;
    let disks = disks.into_iter().map(|disk| (disk.order().disk_id(), disk)).collect();
    let session = Box::new(HomeSession::new(order.machine, order.chain, disks, Arc::clone(&target.clock)));
    Ok(Stage::Serving { order, session, seat })
}

fn refuse<T>(link: &dyn FrameLink, refusal: Refusal) -> Result<T, HomeError> {
    link.send(HomeMessage::Refused { refusal: refusal.clone() }.frame())?;
    Err(HomeError::Refused(refusal))
}

fn understand_order(link: &dyn FrameLink, frame: Frame) -> Result<Order, HomeError> {
    let (machine, chain, disks) = match understand(frame) {
        Ok(Said::Home(HomeMessage::Order { version: _, machine, chain, disks })) => (machine, chain, disks),
        Ok(Said::OtherVersion(version)) => {
            let refusal = Refusal::new(
                format!("the branch host speaks version {version}, this master target {HOME_VERSION}"),
                "they would misunderstand each other",
                "use the same version of Farshore on both",
            );
            return refuse(link, refusal);
        }
        // Such as a recovery host that would stream as an agent does.
        other => {
            let refusal = Refusal::new(
                "a master target takes orders for failbacks only",
                other.err().unwrap_or_else(|| "the first message was none".into()),
                "use the same version of Farshore on both hosts",
            );
            return refuse(link, refusal);
        }
    };
    let bad = |_| HomeError::Protocol("the order holds a malformed id".into());
    let mut ids: Vec<u16> = disks.iter().map(|disk| disk.disk).collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() != disks.len() || disks.is_empty() || disks.len() > replication::limits::DISKS_MAX {
        return Err(HomeError::Protocol("the order names no disks, too many, or one twice".into()));
    }
    Ok(Order { machine: machine.parse().map_err(bad)?, chain: chain.parse().map_err(bad)?, disks })
}

/// A round: the frames that are here, then one sync, then the answers.
fn serve(
    target: &MasterTarget,
    link: &dyn FrameLink,
    order: &Order,
    session: &mut HomeSession,
    first: Frame,
) -> Result<Visit, HomeError> {
    let mut next = Some(first);
    let mut frames = 0;
    while let Some(frame) = next {
        frames += 1;
        match understand(frame).map_err(HomeError::Protocol)? {
            Said::Replication(message) => session.message(message)?,
            Said::Home(HomeMessage::Prove { id, disk, start, len, scope }) => {
                let (digest, read_bytes) = session.prove(DiskId(disk), (start, len), scope)?;
                link.send(HomeMessage::Digest { id, digest, read_bytes }.frame())?;
            }
            Said::Home(HomeMessage::Complete) => {
                session.sync()?;
                target.remove_note(order)?;
                link.send(HomeMessage::Completed.frame())?;
                tracing::info!(machine = %order.machine, chain = %order.chain, "failback complete: the home disks are usable");
                return Ok(Visit::Completed);
            }
            Said::Home(other) => return Err(HomeError::Protocol(format!("unexpected {other:?}"))),
            Said::OtherVersion(_) => return Err(HomeError::Protocol("a second order came".into())),
        }
        next = if frames < FRAMES_PER_ROUND_MAX { link.try_recv()? } else { None };
    }
    session.acknowledge()?;
    for message in session.out.drain(..) {
        link.send(replication_frame(&message))?;
    }
    if let Some(reason) = session.over.take() {
        return Err(HomeError::Protocol(reason));
    }
    // A stream that never pauses must not put this off until the branch is at rest.
    session.sweep()?;
    Ok(Visit::Busy)
}
