//! Ends that the kernel does not tell of.
//!
//! An epoch is over when every bio that was submitted in it has ended, and a heal waits for that. A bio whose end no program
//! saw would keep it waiting for ever: a driver that ends bios past the tracepoint, or a kernel that runs no program where
//! it ended. So patience has an end, far behind the moment at which a device would have been reset over a request. What is under
//! way even then counts as never seen. If it does end later, that breaks the stream and marks where it wrote, as the end of
//! every bio does that nobody saw submitted: nothing is lost, and the range is healed once more. Only a write that both
//! reaches the disk so late and ends untold would be missed, until the disk is compared.
//!
//! Bios of disks that hand them on to others (NVMe multipath, md stripes) are waited for as long as it takes: their late ends
//! would not be recognised, and NVMe keeps a bio for as long as there is no path.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use replication::Epoch;
use world::Monotonic;

use super::EbpfCapture;
use super::kernel::{self, Walk};
use super::layout::{Control, Cpu, Flight, SLOTS};

/// How long a bio may be under way: as long as the kernel waits for a SCSI or NVMe request before it resets the device.
const LIMIT: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 30 });

/// Since when bios of epochs older than one are known to be under way.
#[derive(Default)]
pub(super) struct Patience {
    since: Cell<Option<(Epoch, Monotonic)>>,
}

impl Patience {
    pub(super) fn restart(&self) {
        self.since.set(None);
    }

    /// Whether it has ended for what keeps `epoch` from settling. It begins when it is asked for the first time.
    fn has_ended(&self, epoch: Epoch, now: Monotonic) -> bool {
        let since = self.since.get().filter(|(of, _)| *of == epoch).map_or(now, |(_, since)| since);
        self.since.set(Some((epoch, since)));
        now.since(since) >= LIMIT
    }
}

impl EbpfCapture {
    /// Called as long as bios of epochs older than `epoch` are under way: takes those for never seen that are overdue.
    pub(super) fn wait_for_bios(&self, epoch: Epoch) {
        if !self.patience.has_ended(epoch, self.clock.monotonic()) {
            return;
        }
        self.patience.restart();
        match self.give_up_before(epoch) {
            Ok(0) => {}
            Ok(count) => tracing::warn!(
                count,
                "writes have ended without the kernel saying so, or are under way for very long: a heal no longer waits \
                 for them; if one ends yet, its range is healed again"
            ),
            Err(error) => tracing::error!(%error, "the kernel does not tell which writes are under way"),
        }
    }

    /// Forgets all bios under way of epochs older than `epoch`: how many. Each of these epochs is in the past: no program
    /// begins a flight in one of them any more.
    pub(super) fn give_up_before(&self, epoch: Epoch) -> io::Result<u64> {
        let slots: Vec<usize> =
            self.occupants().filter(|(slot, of)| *of < epoch && !self.is_still(*slot)).map(|(slot, _)| slot).collect();
        let flights = self.installed.flights.as_fd();
        let Walk { entries, complete } = kernel::walk::<{ Flight::BYTES }>(flights)?;
        let hands_on = self.installed.control.word(Control::HANDS_ON).load(Ordering::SeqCst);
        let mut kept = [0u64; SLOTS];
        for (key, flight) in entries {
            let slot = Flight::slot(&flight);
            let stays = hands_on >> Flight::disk(&flight) & 1 == 1;
            match slots.contains(&slot) {
                true if stays => kept[slot] += 1,
                true => kernel::delete(flights, key)?,
                false => {}
            }
        }
        if !complete {
            return Ok(0);
        }
        // Who took a flight away before us has counted it when this returns; nobody else will. So what the counters lack
        // is what we have taken away, now or before this process was killed in the middle of it.
        kernel::wait_for_programs()?;
        let mut given_up = 0;
        for slot in slots {
            let completed = self.sum(Cpu::COMPLETED + 8 * slot);
            let under_way = self.sum(Cpu::SUBMITTED + 8 * slot).wrapping_sub(completed);
            // Some of those kept may have ended since: what is given up too little is given up the next time.
            let missing = under_way.saturating_sub(kept[slot]);
            // The first CPU's: the programs add atomically, too.
            self.installed.cpus.word(Cpu::COMPLETED + 8 * slot).fetch_add(missing, Ordering::SeqCst);
            given_up += missing;
        }
        self.installed.cpus.word(Cpu::UNTOLD).fetch_add(given_up, Ordering::SeqCst);
        Ok(given_up)
    }
}
