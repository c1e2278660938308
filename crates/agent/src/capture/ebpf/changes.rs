//! Disks that come, grow and go while the capture runs.
//!
//! | step | add, grow | leave |
//! | --- | --- | --- |
//! | 1 | no successor may go on with the stream; the heal set names what is new | the same |
//! | 2 | the ledger's table | the ledger's table |
//! | 3 | the programs are told, in mode *joins* | the programs are told: what is submitted is passed over |
//! | 4 | the heal has ended: mode *joins* ends | every flight has ended: cells are cleared, the slot is free |
//!
//! A kill between two steps leaves a table with which a successor does the rest; the maps name what it has to heal.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use replication::ByteRange;
use replication::geometry::LEAF_BYTES;

use super::layout::{self, MAPS_PER_DISK, SLOTS, TARGET_JOINS, TARGET_LEFT, Target};
use super::opening::{Opened, check_parts};
use super::places::{self, Tenancy};
use super::{Disk, EbpfCapture, EbpfDisk, Leaving, OpenEbpfError, support};
use crate::capture::Capture;

impl Disk {
    pub(super) fn is_forgotten(&self) -> bool {
        self.leaving.as_ref().is_some_and(|leaving| leaving.forgotten)
    }
}

impl EbpfCapture {
    pub(super) fn add(&mut self, disk: EbpfDisk) -> Result<(), OpenEbpfError> {
        if self.disks.values().any(|known| known.geometry.disk == disk.geometry.disk) {
            return Err(OpenEbpfError::Known(disk.path));
        }
        let here = self.disks.values().filter_map(|known| known.device.as_ref());
        let mut all: Vec<_> = here.map(|device| device.path().to_owned()).collect();
        all.push(disk.path.clone());
        let all: Vec<_> = all.iter().map(|path| path.as_path()).collect();
        support::check_layers(&all).map_err(|(path, why)| OpenEbpfError::Disk { path, why })?;
        self.admit(Opened::open(disk)?)
    }

    /// Gives a disk its slot and cells and has it captured.
    pub(super) fn admit(&mut self, disk: Opened) -> Result<(), OpenEbpfError> {
        let path = disk.device.path().to_owned();
        let others = self.disks.values().filter(|known| known.leaving.is_none());
        let sectors = others.map(|known| (known.place.device, (known.place.start_sector, known.place.end_sector())));
        check_parts(sectors, &disk)?;
        // Also those of which something is under way.
        if self.disks.values().filter(|known| known.place.device == disk.place.device).count() >= layout::PARTS_MAX {
            return Err(OpenEbpfError::Disks);
        }
        let slot = self.free_slot().ok_or(OpenEbpfError::Disks)?;
        let cells = places::find_place(&self.taken(), self.shape.map_cells, disk.geometry.size_bytes);
        let (shift, first) = cells.ok_or(OpenEbpfError::Room(path))?;
        let place = disk.entry(shift, first);
        self.keep(None);
        self.require_whole_index(slot);
        self.installed.ledger.set_place(slot, &place);
        let Opened { geometry, device, .. } = disk;
        self.disks.insert(slot, Disk { geometry, device: Some(device), place, joins: true, leaving: None });
        self.aim(place.device)
    }

    pub(super) fn grow(&mut self, slot: usize, size_bytes: u64) -> Result<(), OpenEbpfError> {
        let known = &self.disks[&slot];
        let Some(path) = known.device.as_ref().map(|device| device.path().to_owned()) else {
            return Err(OpenEbpfError::Disks);
        };
        let before = known.place;
        let after = places::Place { bytes: size_bytes, ..before };
        assert!(size_bytes > before.bytes, "the caller compares");
        let next = self.taken().into_iter().map(|(start, _)| start).find(|start| *start > before.first_cell);
        if after.end() > next.unwrap_or(self.shape.map_cells) {
            return Err(OpenEbpfError::Room(path));
        }
        // One that knows the new size.
        let geometry = replication::DiskGeometry { size_bytes, ..known.geometry.clone() };
        let Opened { device, .. } = Opened::open(EbpfDisk { geometry: geometry.clone(), path })?;
        self.keep(None);
        let known = self.disks.get_mut(&slot).expect("it was just looked at");
        *known = Disk { geometry, device: Some(device), place: after, joins: true, leaving: None };
        // Heals move whole leaves: one that the old end divides is named as a whole.
        let start = before.bytes / LEAF_BYTES * LEAF_BYTES;
        self.map(0, slot).mark(ByteRange::between(start, size_bytes).expect("it has grown"));
        self.installed.ledger.set_place(slot, &after);
        self.aim(after.device)
    }

    pub(super) fn retire(&mut self, slot: usize) {
        self.keep(None);
        let known = self.disks.get_mut(&slot).expect("the engine names disks that this capture has");
        known.place.tenancy = Tenancy::Leaving;
        (known.device, known.joins) = (None, false);
        known.leaving = Some(Leaving { epoch: replication::Epoch(u32::MAX), forgotten: false });
        let place = known.place;
        self.installed.ledger.set_place(slot, &place);
        if let Err(error) = self.aim(place.device) {
            // They go on appending records of it, which nobody hands out; its slot and cells stay taken.
            tracing::error!(%error, "the capture programs could not be told that a disk has left");
            return;
        }
        // Now that no program notes a flight of it any more.
        let (epoch, until) = (self.epoch(), self.installed.ring.producer());
        let known = self.disks.get_mut(&slot).expect("it was just there");
        known.place.until = until;
        known.leaving = Some(Leaving { epoch, forgotten: false });
    }

    /// What joined has been healed: from here on a completion that was not seen at its submission is a gap.
    pub(super) fn end_joining(&mut self) {
        let joined = self.disks.values_mut().filter(|disk| disk.joins);
        let devices: BTreeSet<u64> = joined
            .map(|disk| {
                disk.joins = false;
                disk.place.device
            })
            .collect();
        for device in devices {
            if let Err(error) = self.aim(device) {
                tracing::warn!(%error, "a disk goes on as one that joins");
            }
        }
    }

    /// Frees the slots and cells of disks that are forgotten and of which nothing is under way.
    pub(super) fn clear_forgotten(&mut self) {
        let is_over = |disk: &Disk| {
            let ended = |epoch| self.occupants().all(|(slot, occupant)| occupant > epoch || self.is_still(slot));
            disk.leaving.as_ref().is_some_and(|leaving| leaving.forgotten && ended(leaving.epoch))
        };
        let over: Vec<usize> = self.disks.iter().filter(|(_, disk)| is_over(disk)).map(|(slot, _)| *slot).collect();
        for slot in over {
            let device = self.disks[&slot].place.device;
            (0..MAPS_PER_DISK).for_each(|map| self.map(map, slot).clear());
            (0..SLOTS).for_each(|epoch| self.whole_flag(epoch, slot).store(0, Ordering::SeqCst));
            let ledger = &self.installed.ledger;
            ledger.set_whole(ledger.whole() & !(1 << slot));
            let Some(mut disk) = self.disks.remove(&slot) else { continue };
            if let Err(error) = self.aim(device) {
                tracing::warn!(%error, "the capture programs still know a disk that has left");
            }
            disk.place.tenancy = Tenancy::Gone;
            self.installed.ledger.set_place(slot, &disk.place);
            tracing::info!(disk = %disk.geometry.disk, "nothing of the disk is captured any more");
        }
    }

    pub(super) fn aim_all(&mut self) -> Result<(), OpenEbpfError> {
        let devices: BTreeSet<u64> = self.disks.values().map(|disk| disk.place.device).collect();
        devices.into_iter().try_for_each(|device| self.aim(device))
    }

    /// Tells the programs what of the whole disk `device` they capture.
    fn aim(&self, device: u64) -> Result<(), OpenEbpfError> {
        let parts = self.disks.iter().filter(|(_, disk)| disk.place.device == device).map(|(slot, disk)| {
            let joins = if disk.joins { TARGET_JOINS } else { 0 };
            let flags = if disk.leaving.is_some() { TARGET_LEFT } else { joins };
            Target::of(*slot, &disk.place, flags)
        });
        self.installed.aim(device, &parts.collect::<Vec<_>>()).map_err(OpenEbpfError::System)
    }

    /// Cells that are somebody's, in order.
    fn taken(&self) -> Vec<(u64, u64)> {
        let mut taken: Vec<_> = self.disks.values().map(|disk| (disk.place.first_cell, disk.place.end())).collect();
        taken.sort_unstable();
        taken
    }

    /// A slot that is nobody's, and of which the ring holds nothing.
    fn free_slot(&self) -> Option<usize> {
        let is_free = |slot: &usize| match self.installed.ledger.place(*slot) {
            None => true,
            Some(place) => place.tenancy == Tenancy::Gone && place.until <= self.installed.ring.consumer(),
        };
        (0..layout::DISKS_MAX).filter(|slot| !self.disks.contains_key(slot)).find(is_free)
    }
}
