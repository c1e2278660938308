//! Reading the ring: which records are handed out, which are refused, and how far it may be freed.

use std::sync::atomic::Ordering;

use replication::{ChangeKind, DiskId, Epoch, SourceTime};

use super::assemble::Outcome;
use super::kernel::Found;
use super::layout::{Cpu, GAP_CAUSES, GAP_COPY, GAP_FULL, Record, RecordKind};
use super::{EbpfCapture, Refusal};
use crate::capture::{Captured, GapCause, RingPosition};

impl EbpfCapture {
    /// Learns of breaks that the programs recorded. Everything of the epochs until now that lies behind is refused.
    pub(super) fn take_breaks(&mut self) {
        for cpu in 0..self.installed.cpu_count {
            let cell = self.installed.cpus.word(cpu * size_of::<Cpu>() + Cpu::BROKEN_AT);
            let recorded = cell.load(Ordering::SeqCst);
            let Some(from) = recorded.checked_sub(1) else { continue };
            let refusal = Refusal { from, epoch: self.epoch().0 };
            // The ledger has room for one: the earliest position with the latest epoch refuses both.
            let kept = self.installed.ledger.refusal();
            let joined = kept.map_or(refusal, |kept| Refusal {
                from: kept.from.min(refusal.from),
                epoch: kept.epoch.max(refusal.epoch),
            });
            self.installed.ledger.refuse(Some(joined));
            self.refusals.push(refusal);
            // What comes to this cell before it is emptied is of the same epochs, and lies behind.
            cell.store(0, Ordering::SeqCst);
            let gaps = self.gaps();
            self.cause = cause_of(std::array::from_fn(|cause| gaps[cause] - self.gaps_seen[cause])).or(self.cause);
            self.gaps_seen = gaps;
        }
    }

    pub(super) fn is_refused(&self, position: u64, epoch: u32) -> bool {
        self.refusals.iter().any(|refusal| position >= refusal.from && epoch <= refusal.epoch)
    }

    /// Whether the disk of `record` has left: its writes are in no stream any more.
    fn is_of_nobody(&self, record: &Record) -> bool {
        let disk = self.disks.get(&usize::from(record.disk));
        record.kind != RecordKind::Marker && disk.is_none_or(|disk| disk.leaving.is_some())
    }

    /// The next record or `None`; skips what nobody wants.
    pub(super) fn next_request(&mut self) -> Option<Captured> {
        loop {
            if self.read == self.seen {
                self.seen = self.installed.ring.producer();
                // After the position was read: whatever depends on a missing write lies behind its break, which was
                // recorded before that write ended.
                self.take_breaks();
                if self.read == self.seen {
                    return None;
                }
            }
            let position = self.read;
            let (bytes, end) = match self.installed.ring.look(position) {
                Found::Busy => return None,
                Found::Skip(end) => {
                    self.read = end;
                    continue;
                }
                Found::Record { bytes, end } => (bytes, end),
            };
            let content = self.installed.ring.content(position, bytes);
            let parsed = Record::parse(content);
            let outcome = match &parsed {
                Some(record) if self.is_refused(position, record.epoch) => {
                    self.assembler.forget(record);
                    None
                }
                Some(record) if self.is_of_nobody(record) => {
                    self.assembler.forget(record);
                    None
                }
                Some(record) => {
                    let data = content.get(Record::BYTES..Record::BYTES + record.bytes as usize).unwrap_or_default();
                    Some((*record, self.assembler.take(position, record, data)))
                }
                None => Some((Record::nothing(), Outcome::Broken)),
            };
            self.read = end;
            match outcome {
                Some((record, Outcome::Whole(kinds))) if end > self.skip_through => {
                    return Some(self.hand_out(end, &record, kinds));
                }
                // The beginning of a bio that ends in what is skipped is gone already.
                Some((_, Outcome::Broken)) if end > self.skip_through => self.break_at(position),
                _ => {}
            }
            self.free_skipped();
        }
    }

    pub(super) fn hand_out(&mut self, end: u64, record: &Record, kinds: Vec<ChangeKind>) -> Captured {
        let safe = self.assembler.safe(end);
        if safe < end {
            self.held_back.push((end, safe));
        }
        self.handed = end;
        self.not_before = self.not_before.max(SourceTime(record.time));
        let disk = self.disks.get(&usize::from(record.disk)).map_or(DiskId(0), |disk| disk.geometry.disk);
        Captured { end: RingPosition(end), epoch: Epoch(record.epoch), time: self.not_before, disk, kinds }
    }

    /// The ring holds something that cannot be a whole request: nothing after it belongs to the stream.
    pub(super) fn break_at(&mut self, position: u64) {
        let refusal = Refusal { from: position, epoch: self.epoch().0 };
        self.installed.ledger.refuse(Some(refusal));
        self.refusals.push(refusal);
        self.assembler.clear();
        self.incomplete += 1;
        tracing::warn!(position, "a record of the send buffer is incomplete");
    }

    /// Frees what was read and is wanted by nobody, if nothing before it is.
    pub(super) fn free_skipped(&mut self) {
        if self.released >= self.handed {
            let free = self.assembler.safe(self.read);
            if free > self.installed.ring.consumer() {
                self.installed.ring.free(free);
            }
        }
    }
}

pub(super) fn cause_of(gaps: [u64; GAP_CAUSES]) -> Option<GapCause> {
    match gaps {
        gaps if gaps[GAP_FULL] > 0 => Some(GapCause::Overflow),
        gaps if gaps[GAP_COPY] > 0 => Some(GapCause::CopyFailed),
        gaps if gaps.iter().any(|count| *count > 0) => Some(GapCause::MissedSubmission),
        _ => None,
    }
}
