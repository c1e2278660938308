//! How a capture begins: with new pins, or with those that a predecessor left.
//!
//! A predecessor's pins are taken over whatever disks there are now, if they have room: those that are as they were go on,
//! others are added, grown or left as by a running agent. Then the maps tell what to heal.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use replication::limits::DISKS_MAX;
use replication::{DiskGeometry, DiskIdentity, Epoch, MachineId, SourceTime};
use world::{Clock, FileDevice};

use super::assemble::Assembler;
use super::grace::Grace;
use super::layout::{self, GAP_CAUSES, PARTS_MAX};
use super::loader::{self, Installed, Object};
use super::overdue::Patience;
use super::places::{self, Place, Tenancy};
use super::{
    AHEAD_BYTES_MAX, Disk, EbpfCapture, EbpfConfig, EbpfDisk, Leaving, OpenEbpfError, RING_BYTES_MAX, RING_BYTES_MIN,
    Shape, pins, support,
};
use crate::capture::{Capture, Continuity};

/// A disk that was opened, and where it lies.
pub(super) struct Opened {
    pub(super) geometry: DiskGeometry,
    pub(super) device: FileDevice,
    pub(super) place: support::Place,
}

impl EbpfCapture {
    /// Goes on with the capture that is pinned for this machine, with these disks, or begins one, in track mode.
    ///
    /// # Errors
    /// See [`OpenEbpfError`]. What a predecessor pinned may be gone then.
    pub fn open(
        disks: Vec<EbpfDisk>,
        clock: Arc<dyn Clock>,
        config: &EbpfConfig,
    ) -> Result<EbpfCapture, OpenEbpfError> {
        EbpfCapture::open_object(disks, clock, config, &loader::object())
    }

    pub(super) fn open_object(
        disks: Vec<EbpfDisk>,
        clock: Arc<dyn Clock>,
        config: &EbpfConfig,
        object: &Object<'_>,
    ) -> Result<EbpfCapture, OpenEbpfError> {
        support::check_machine().map_err(OpenEbpfError::Unsupported)?;
        let mounted = support::provide_pin_directory(&config.pins);
        let pinned = |source| OpenEbpfError::Pins { path: config.pins.clone(), source };
        mounted.map_err(pinned)?;
        let mut lock = pins::lock(&config.pins).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => OpenEbpfError::InUse(config.pins.clone()),
            _ => pinned(error),
        })?;
        if disks.len() > DISKS_MAX {
            return Err(OpenEbpfError::Disks);
        }
        let all: Vec<_> = disks.iter().map(|disk| disk.path.as_path()).collect();
        support::check_layers(&all).map_err(|(path, why)| OpenEbpfError::Disk { path, why })?;
        let opened = open_all(&disks)?;
        let ring = 1 << config.ring_bytes_max.clamp(RING_BYTES_MIN, RING_BYTES_MAX).ilog2();
        let digest = digest(config.machine);
        if let Some((installed, shape)) = loader::adopt(&config.pins, digest, ring)? {
            let mut capture = EbpfCapture::around(installed, lock, BTreeMap::new(), shape, clock.clone(), true)?;
            match capture.take_over(opened) {
                Ok(()) => return Ok(capture),
                Err(error) => tracing::warn!(%error, "what was captured before is taken down: all disks are compared"),
            }
            EbpfCapture { _lock: lock, .. } = capture;
            pins::empty(&config.pins).map_err(pinned)?;
        }
        let (shape, disks) = lay_out(open_all(&disks)?, digest, ring)?;
        let places: Vec<Place> = disks.values().map(|disk| disk.place).collect();
        let installed = loader::install(&config.pins, &shape, &places, &config.variants, object)
            .inspect_err(|_| drop(pins::remove(&config.pins)))?;
        EbpfCapture::around(installed, lock, disks, shape, clock, false)
    }

    fn around(
        installed: Installed,
        lock: File,
        disks: BTreeMap<usize, Disk>,
        shape: Shape,
        clock: Arc<dyn Clock>,
        is_adopted: bool,
    ) -> Result<EbpfCapture, OpenEbpfError> {
        let consumer = installed.ring.consumer();
        let resumption = installed.ledger.resumption().filter(|_| is_adopted);
        let refusals = installed.ledger.refusal().into_iter().collect();
        let mut capture = EbpfCapture {
            grace: Grace::start().map_err(OpenEbpfError::System)?,
            patience: Patience::default(),
            continuity: if is_adopted { Continuity::SameBoot } else { Continuity::Fresh },
            skip_through: resumption.as_ref().map_or_else(|| installed.ring.producer(), |kept| kept.ring_end),
            installed: Arc::new(installed),
            _lock: lock,
            disks,
            shape,
            clock,
            resumption,
            assembler: Assembler::keeping(AHEAD_BYTES_MAX),
            read: consumer,
            seen: consumer,
            handed: consumer,
            released: consumer,
            held_back: Vec::new(),
            refusals,
            not_before: SourceTime(0),
            incomplete: 0,
            gaps_seen: [0; GAP_CAUSES],
            cause: None,
            inherited: Epoch(0),
        };
        let epoch = capture.epoch();
        if is_adopted {
            capture.inherited = epoch;
        } else {
            let slots: Vec<usize> = capture.disks.keys().copied().collect();
            slots.into_iter().for_each(|slot| capture.require_whole_index(slot));
        }
        // A predecessor may have been killed between a rotation and the end of its grace period.
        capture.grace.begin(epoch);
        Ok(capture)
    }

    /// Makes the predecessor's disks these.
    fn take_over(&mut self, opened: Vec<Opened>) -> Result<(), OpenEbpfError> {
        let mut wanted: Vec<Option<Opened>> = opened.into_iter().map(Some).collect();
        let mut grown = Vec::new();
        for slot in 0..layout::DISKS_MAX {
            let known = self.installed.ledger.place(slot).filter(|place| place.tenancy != Tenancy::Gone);
            let Some(mut place) = known else { continue };
            let is_it = |disk: &Option<Opened>| disk.as_ref().is_some_and(|disk| disk.was_at(&place));
            let found = wanted.iter_mut().find(|disk| is_it(disk)).and_then(Option::take);
            let disk = match found {
                Some(Opened { mut geometry, device, .. }) => {
                    if geometry.size_bytes > place.bytes {
                        grown.push((slot, geometry.size_bytes));
                        geometry.size_bytes = place.bytes;
                    }
                    Disk { geometry, device: Some(device), place, joins: false, leaving: None }
                }
                None => {
                    // What the ring still holds of it has numbers, which nobody could give again to the rest.
                    if place.tenancy == Tenancy::Here {
                        self.keep(None);
                    }
                    place.tenancy = Tenancy::Leaving;
                    place.until = self.installed.ring.producer();
                    self.installed.ledger.set_place(slot, &place);
                    let leaving = Some(Leaving { epoch: self.epoch(), forgotten: true });
                    Disk { geometry: nameless(&place), device: None, place, joins: false, leaving }
                }
            };
            self.disks.insert(slot, disk);
        }
        let added: Vec<Opened> = wanted.into_iter().flatten().collect();
        self.aim_all()?;
        for (slot, bytes) in &grown {
            self.grow(*slot, *bytes)?;
        }
        let (added, grown) =
            (added.into_iter().try_fold(0, |count, disk| self.admit(disk).map(|()| count + 1))?, grown.len());
        tracing::info!(epoch = self.epoch().0, continues = self.resumption.is_some(), added, grown, "capture adopted");
        Ok(())
    }
}

impl Opened {
    pub(super) fn open(disk: EbpfDisk) -> Result<Opened, OpenEbpfError> {
        let failed = |why: String| OpenEbpfError::Disk { path: disk.path.clone(), why };
        let place = support::place_of(&disk.path).map_err(failed)?;
        let device = FileDevice::open_direct(&disk.path).map_err(|error| failed(error.to_string()))?;
        Ok(Opened { geometry: disk.geometry, device, place })
    }

    /// Its sectors on the whole disk.
    fn sectors(&self) -> (u64, u64) {
        (self.place.start_sector, self.place.start_sector + self.geometry.size_bytes / 512)
    }

    /// Whether this is the disk of `place`, which may have grown.
    fn was_at(&self, place: &Place) -> bool {
        let own = self.entry(place.granule_shift, place.first_cell);
        Place { bytes: place.bytes, ..own } == *place && place.bytes <= own.bytes
    }

    /// Its entry, with its cells there.
    pub(super) fn entry(&self, granule_shift: u32, first_cell: u64) -> Place {
        let serial = blake3::hash(self.geometry.identity.serial.as_bytes());
        Place {
            tenancy: Tenancy::Here,
            disk: self.geometry.disk,
            granule_shift,
            first_cell,
            device: self.place.device,
            start_sector: self.place.start_sector,
            bytes: self.geometry.size_bytes,
            serial: u64::from_le_bytes(*serial.as_bytes().first_chunk().expect("a hash has 32 bytes")),
            until: 0,
        }
    }
}

/// Opens every disk.
fn open_all(disks: &[EbpfDisk]) -> Result<Vec<Opened>, OpenEbpfError> {
    let mut opened: Vec<Opened> = Vec::new();
    for disk in disks {
        let disk = Opened::open(disk.clone())?;
        check_parts(opened.iter().map(|other| (other.place.device, other.sectors())), &disk)?;
        opened.push(disk);
    }
    Ok(opened)
}

/// Whether `disk` can be captured beside `others`, each the number of its whole disk and its sectors there.
pub(super) fn check_parts(others: impl Iterator<Item = (u64, (u64, u64))>, disk: &Opened) -> Result<(), OpenEbpfError> {
    let (start, end) = disk.sectors();
    let of_it: Vec<_> = others.filter(|(device, _)| *device == disk.place.device).map(|(_, sectors)| sectors).collect();
    let fits = of_it.iter().all(|other| end <= other.0 || other.1 <= start);
    if fits && of_it.len() < PARTS_MAX { Ok(()) } else { Err(OpenEbpfError::Disks) }
}

/// Gives each disk its slot and cells, the largest first.
fn lay_out(
    opened: Vec<Opened>,
    digest: [u64; 2],
    ring_bytes: u64,
) -> Result<(Shape, BTreeMap<usize, Disk>), OpenEbpfError> {
    let sizes: Vec<u64> = opened.iter().map(|disk| disk.geometry.size_bytes).collect();
    let (scale, map_cells) = places::capacity(&sizes);
    let shift = scale.granule_bytes().trailing_zeros();
    let mut order: Vec<usize> = (0..opened.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(sizes[*index]));
    let mut taken: Vec<(u64, u64)> = Vec::new();
    let mut firsts = vec![0; opened.len()];
    for index in order {
        let cells = scale.cells(sizes[index]) as u64;
        // What was cut into too small pieces has room side by side in any case.
        let Some(first) = places::find_room(&taken, map_cells, cells) else {
            let mut next = 0;
            for (first, size) in firsts.iter_mut().zip(&sizes) {
                (*first, next) = (next, next + scale.cells(*size) as u64);
            }
            break;
        };
        firsts[index] = first;
        taken.push((first, first + cells));
        taken.sort_unstable();
    }
    let disks = opened.into_iter().zip(firsts).enumerate().map(|(slot, (disk, first))| {
        let place = disk.entry(shift, first);
        let Opened { geometry, device, .. } = disk;
        (slot, Disk { geometry, device: Some(device), place, joins: false, leaving: None })
    });
    Ok((Shape { digest, ring_bytes, map_cells }, disks.collect()))
}

/// What is left to say of a disk that is not there any more.
fn nameless(place: &Place) -> DiskGeometry {
    DiskGeometry {
        disk: place.disk,
        identity: DiskIdentity { serial: String::new(), fingerprint: [0; 16] },
        path: String::new(),
        size_bytes: place.bytes,
        logical_sector_bytes: 512,
        physical_sector_bytes: 4096,
    }
}

fn digest(machine: MachineId) -> [u64; 2] {
    let hash = blake3::Hasher::new().update(&machine.0).update(&layout::VERSION.to_le_bytes()).finalize();
    let word = |at: usize| u64::from_le_bytes(*hash.as_bytes()[at..].first_chunk().expect("a hash has 32 bytes"));
    [word(0), word(8)]
}
