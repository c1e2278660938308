//! The master target's machine: the disks at home, and the product's own master target in front of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use link::{Frame, FrameLink, LinkError, TrySend};
use recovery::{
    HomeDisk, HomeDisks, HomeError, HomeLine, HomeOrder, HomeVisit, LineError, MasterTarget, Refusal, Visit,
};
use replication::wire::{HealContent, Message};
use replication::{ByteRange, DiskGeometry, DiskId};
use world::{BlockDevice, BlockError, Clock, Entropy, Files};

use crate::clock::{SimClock, TrueTime};
use crate::disk::SimDisk;
use crate::files::{PowerCut, SimFiles};
use crate::link::{LinkEnd, connect};
use crate::planted::Bug;
use crate::rng::{Rng, SimEntropy};
use crate::spoiled_files::SpoiledFiles;

/// The link under way, and one that waits at the door.
#[derive(Default)]
struct Door {
    waiting: Option<LinkEnd>,
    current: Option<LinkEnd>,
}

/// See the module's documentation.
pub struct SimHome {
    files: SimFiles,
    disks: Vec<(DiskId, SimDisk)>,
    clock: SimClock,
    time: TrueTime,
    rng: Rng,
    target: Option<MasterTarget>,
    visit: Option<HomeVisit>,
    door: Arc<Mutex<Door>>,
    healed: Arc<Mutex<Vec<Healed>>>,
    bug: Option<Bug>,
}

/// What a heal brought for a range of a disk; nothing stands for zeroes.
type Healed = (DiskId, ByteRange, Option<Bytes>);

impl SimHome {
    /// A master target in front of `disks`.
    pub fn new(disks: Vec<(DiskId, SimDisk)>, time: &TrueTime, mut rng: Rng, bug: Option<Bug>) -> SimHome {
        SimHome {
            files: SimFiles::new(rng.draw()),
            disks,
            clock: SimClock::booting_now(time),
            time: time.clone(),
            rng,
            target: None,
            visit: None,
            door: Arc::default(),
            healed: Arc::default(),
            bug,
        }
    }

    /// Has no other disks than a branch, and none larger. Whether that changed anything.
    pub fn fit(&mut self, branch: &[DiskGeometry]) -> bool {
        let size = |disk: DiskId| branch.iter().find(|known| known.disk == disk).map(|known| known.size_bytes);
        let fits = |disk: DiskId, device: &SimDisk| size(disk).is_some_and(|size| device.size() <= size);
        if self.disks.iter().all(|(disk, device)| fits(*disk, device)) {
            return false;
        }
        self.disks.retain(|(disk, _)| size(*disk).is_some());
        for (disk, device) in &self.disks {
            device.resize(size(*disk).expect("the others are gone").min(device.size()), &mut self.rng);
        }
        self.target = None;
        true
    }

    /// The order that brings a machine home to these disks.
    pub fn orders(&self) -> Vec<HomeOrder> {
        let order = |(disk, device): &(DiskId, SimDisk)| HomeOrder {
            disk: disk.0,
            path: format!("/dev/home{}", disk.0).into(),
            size_bytes: device.size(),
            serial: None,
            any_disk: false,
            in_use: false,
        };
        self.disks.iter().map(order).collect()
    }

    /// The way here.
    pub fn line(&mut self) -> Box<dyn HomeLine> {
        let delay_ns = 1 + self.rng.below(15_000_000);
        Box::new(SimHomeLine { door: Arc::clone(&self.door), time: self.time.clone(), delay_ns })
    }

    /// The link under way, for stalling and severing it.
    pub fn link(&self) -> Option<LinkEnd> {
        self.lock().current.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn target(&mut self) -> &MasterTarget {
        let (files, disks, clock, bug) = (&self.files, &self.disks, &self.clock, self.bug);
        let rng = &mut self.rng;
        self.target.get_or_insert_with(|| {
            let entropy: Arc<dyn Entropy> = Arc::new(SimEntropy::new(rng.fork()));
            let clock: Arc<dyn Clock> = Arc::new(clock.clone());
            let files: Arc<dyn Files> = match bug {
                Some(Bug::HomeNoteNotSynced) => Arc::new(SpoiledFiles::without_name_syncs(files.clone())),
                _ => Arc::new(files.clone()),
            };
            MasterTarget::new(files, clock, entropy, SimDisks { disks: disks.clone(), bug })
        })
    }

    /// Whether a note says that the disks are not usable.
    ///
    /// # Errors
    /// If the notes cannot be read.
    pub fn is_noted(&mut self) -> Result<bool, String> {
        let notes = self.target().unfinished().map_err(|error| format!("the notes cannot be read: {error:?}"))?;
        Ok(!notes.is_empty())
    }

    /// What the disks hold now.
    pub fn contents(&self) -> Vec<(DiskId, Vec<u8>)> {
        self.disks.iter().map(|(disk, device)| (*disk, device.contents())).collect()
    }

    /// Lets the master target work for a while.
    ///
    /// # Errors
    /// If it ends for a reason that nobody injected.
    pub fn step(&mut self) -> Result<(), String> {
        let waiting = self.lock().waiting.take();
        if let Some(link) = waiting {
            let before = self.lock().current.replace(link);
            if let Some(before) = before {
                before.sever();
            }
            // One at a time: the one before lets go of the disks.
            self.visit = None;
            self.visit = Some(self.target().visit());
        }
        let (Some(link), Some(mut visit)) = (self.link(), self.visit.take()) else { return Ok(()) };
        let (disks, healed) = (self.disks.clone(), Arc::clone(&self.healed));
        for _ in 0..16 {
            let spoiled = SpoiledLink { link: &link, disks: &disks, healed: &healed, bug: self.bug };
            match visit.step(self.target(), &spoiled, Duration::ZERO) {
                Ok(Visit::Busy) => {}
                Ok(Visit::Idle) => break,
                // Its last word may still be under way.
                Ok(Visit::Completed) => return Ok(()),
                Err(HomeError::Link(_)) => return Ok(()),
                Err(error) => return Err(format!("the master target ended a session: {error:?}")),
            }
        }
        self.visit = Some(visit);
        Ok(())
    }

    /// Kills the master target. What the kernel was given stays, also on the disks.
    pub fn kill(&mut self) {
        self.hang_up();
        self.target = None;
        self.files.restart_process();
    }

    /// Cuts the power at home: what was not flushed may be gone.
    pub fn power_cut(&mut self) {
        self.hang_up();
        self.target = None;
        for (_, disk) in &self.disks {
            disk.power_cut(&mut self.rng);
        }
        let cut = match self.rng.below(3) {
            0 => PowerCut::LoseAll,
            1 => PowerCut::Prefix,
            _ => PowerCut::Torn,
        };
        self.files.power_cycle(cut);
        self.clock.reboot();
    }

    fn hang_up(&mut self) {
        self.visit = None;
        let mut door = self.lock();
        for link in [door.waiting.take(), door.current.take()].into_iter().flatten() {
            link.sever();
        }
    }
}

struct SimHomeLine {
    door: Arc<Mutex<Door>>,
    time: TrueTime,
    delay_ns: u64,
}

impl HomeLine for SimHomeLine {
    fn connect(&mut self) -> Result<Arc<dyn FrameLink>, LineError> {
        let (near, far) = connect(&self.time, self.delay_ns);
        self.door.lock().unwrap_or_else(PoisonError::into_inner).waiting = Some(far);
        Ok(Arc::new(near))
    }
}

struct SimDisks {
    disks: Vec<(DiskId, SimDisk)>,
    bug: Option<Bug>,
}

impl HomeDisks for SimDisks {
    fn claim(&self, order: &HomeOrder) -> Result<HomeDisk, Refusal> {
        let found = self.disks.iter().find(|(disk, _)| *disk == order.disk_id());
        let device = found.expect("the order was made from these disks").1.clone();
        HomeDisk::on(order, Box::new(SpoiledHome { device, bug: self.bug }))
    }
}

/// The master target's end of a link with a planted bug in front of it, or none.
struct SpoiledLink<'a> {
    link: &'a LinkEnd,
    disks: &'a [(DiskId, SimDisk)],
    /// What the heal brought with the frames that were taken last.
    healed: &'a Mutex<Vec<Healed>>,
    bug: Option<Bug>,
}

impl SpoiledLink<'_> {
    /// Writes what the heal brought over whatever the stream has written there since.
    fn ignore_the_shield(&self) {
        for (disk, range, data) in self.healed.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let Some((_, device)) = self.disks.iter().find(|(id, _)| *id == disk) else { continue };
            let zeroes = || Bytes::from(vec![0; range.len as usize]);
            drop(device.write_at(range.start, &data.unwrap_or_else(zeroes)));
        }
    }

    fn note_healed(&self, frame: &Frame) {
        let Ok(message) = Message::decode(frame.kind(), frame.clone().into_body()) else { return };
        let Message::HealData { disk, range, content, .. } = message else { return };
        let data = match content {
            HealContent::Data(data) => Some(data),
            HealContent::Zero => None,
            HealContent::Unreadable => return,
        };
        self.healed.lock().unwrap_or_else(PoisonError::into_inner).push((disk, range, data));
    }
}

impl FrameLink for SpoiledLink<'_> {
    fn send(&self, frame: Frame) -> Result<(), LinkError> {
        if self.bug != Some(Bug::HomeWantsNothing) {
            return self.link.send(frame);
        }
        let (kind, body) = (frame.kind(), frame.into_body());
        match Message::decode(kind, body.clone()) {
            Ok(Message::Wants { heal, offer, wanted }) => {
                let nothing = Message::Wants { heal, offer, wanted: vec![0; wanted.len()].into() }.encode();
                self.link.send(Frame::from_parts(nothing.kind, nothing.parts))
            }
            _ => self.link.send(Frame::new(kind, body)),
        }
    }

    fn try_send(&self, frame: Frame) -> Result<TrySend, LinkError> {
        self.send(frame).map(|()| TrySend::Sent)
    }

    fn recv(&self, timeout: Duration) -> Result<Option<Frame>, LinkError> {
        if self.bug != Some(Bug::ShieldIgnored) {
            return self.link.recv(timeout);
        }
        // What was taken before is written by now.
        self.ignore_the_shield();
        let frame = self.link.recv(timeout)?;
        frame.iter().for_each(|frame| self.note_healed(frame));
        Ok(frame)
    }
}

/// A home disk with a planted bug in front of it, or none.
struct SpoiledHome {
    device: SimDisk,
    bug: Option<Bug>,
}

impl BlockDevice for SpoiledHome {
    fn size(&self) -> u64 {
        self.device.size()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), BlockError> {
        self.device.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), BlockError> {
        self.device.write_at(offset, data)
    }

    fn write_zeroes(&self, range: std::ops::Range<u64>) -> Result<(), BlockError> {
        self.device.write_zeroes(range)
    }

    fn discard(&self, range: std::ops::Range<u64>) -> Result<(), BlockError> {
        self.device.discard(range)
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.bug == Some(Bug::HomeNotSynced) { Ok(()) } else { self.device.flush() }
    }
}
