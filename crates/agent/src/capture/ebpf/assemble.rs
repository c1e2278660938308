//! From records to requests: joins the records of a bio, in the order of their last ones.
//!
//! Pure. Records of several bios may lie between each other (each CPU appends for itself). A bio counts where its last
//! record lies; until then its ring space must stay, so freeing stops at the first record of the oldest bio that is still
//! open ([`Assembler::safe`]).

use std::collections::BTreeMap;

use replication::limits::DISK_BYTES_MAX;
use replication::{ByteRange, ChangeKind, MarkerKind};

use super::layout::{Record, RecordKind};
use crate::capture::pieces::{range_pieces, write_pieces};
use crate::capture::slabs::Slabs;

/// A bio of which records are missing yet.
struct Open {
    /// Where its first record lies.
    first: u64,
    data: Vec<u8>,
}

/// What a record completed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing yet.
    Pending,
    /// A whole request: what happened, in pieces.
    Whole(Vec<ChangeKind>),
    /// Its beginning is not there, or makes no sense: something is missing from the ring.
    Broken,
}

/// See the module's documentation.
pub(super) struct Assembler {
    open: BTreeMap<u64, Open>,
    /// Memory for the data of what was completed.
    slabs: Slabs,
}

impl Assembler {
    /// One that keeps memory for `bytes` bytes of completed requests.
    pub(super) fn keeping(bytes: u64) -> Assembler {
        Assembler { open: BTreeMap::new(), slabs: Slabs::keeping(bytes) }
    }

    /// Takes the record at `position` whose data is `data`.
    pub(super) fn take(&mut self, position: u64, record: &Record, data: &[u8]) -> Outcome {
        let broken = |assembler: &mut Assembler| {
            assembler.open.remove(&record.id);
            Outcome::Broken
        };
        let start = record.sector.saturating_mul(512);
        let Some(range) = ByteRange::between(start, start.saturating_add(u64::from(record.total))) else {
            return if record.kind == RecordKind::Marker { marker(record, data) } else { broken(self) };
        };
        if range.end() > DISK_BYTES_MAX || !record.whole {
            return broken(self);
        }
        match record.kind {
            RecordKind::Zero => Outcome::Whole(range_pieces(range, |range| ChangeKind::Zero { range })),
            RecordKind::Discard => Outcome::Whole(range_pieces(range, |range| ChangeKind::Discard { range })),
            RecordKind::Marker => marker(record, data),
            RecordKind::Write if record.offset == 0 && record.last && data.len() as u64 == range.len => {
                Outcome::Whole(write_pieces(range, data, &self.slabs))
            }
            RecordKind::Write => {
                if record.offset == 0 {
                    self.open.insert(record.id, Open { first: position, data: Vec::with_capacity(range.len as usize) });
                }
                let Some(open) = self.open.get_mut(&record.id) else { return broken(self) };
                if open.data.len() != record.offset as usize || (open.data.len() + data.len()) as u64 > range.len {
                    return broken(self);
                }
                open.data.extend_from_slice(data);
                if !record.last {
                    return Outcome::Pending;
                }
                let done = self.open.remove(&record.id).expect("it was just extended");
                if done.data.len() as u64 != range.len {
                    return Outcome::Broken;
                }
                Outcome::Whole(write_pieces(range, &done.data, &self.slabs))
            }
        }
    }

    /// Forgets the bio of `record`: nobody wants it.
    pub(super) fn forget(&mut self, record: &Record) {
        self.open.remove(&record.id);
    }

    /// Up to where the ring may be freed when everything that ends at or before `position` was taken.
    pub(super) fn safe(&self, position: u64) -> u64 {
        self.open.values().map(|open| open.first).min().map_or(position, |first| first.min(position))
    }

    /// Whether bios are open.
    #[cfg(test)]
    pub(super) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.open.clear();
    }
}

fn marker(record: &Record, data: &[u8]) -> Outcome {
    let text = data.get(..record.bytes as usize).map(|text| String::from_utf8_lossy(text).into_owned());
    match text.and_then(|text| marker_of(record.sector, &text)) {
        Some((kind, name)) => Outcome::Whole(vec![ChangeKind::Marker { kind, name }]),
        None => Outcome::Broken,
    }
}

/// How a marker travels through the kernel: a number and a text. What failed stands on a line below the name.
pub(super) fn marker_code(kind: &MarkerKind, name: &str) -> (u32, String) {
    match kind {
        MarkerKind::Crash => (0, name.to_owned()),
        MarkerKind::Application => (1, name.to_owned()),
        MarkerKind::Final => (2, name.to_owned()),
        MarkerKind::Attempted { failed } => (3, format!("{name}\n{failed}")),
    }
}

fn marker_of(code: u64, text: &str) -> Option<(MarkerKind, String)> {
    let name = || text.to_owned();
    Some(match code {
        0 => (MarkerKind::Crash, name()),
        1 => (MarkerKind::Application, name()),
        2 => (MarkerKind::Final, name()),
        3 => {
            let (name, failed) = text.split_once('\n')?;
            (MarkerKind::Attempted { failed: failed.to_owned() }, name.to_owned())
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn record(id: u64, sector: u64, total: u32, offset: u32, bytes: u32) -> Record {
        Record {
            kind: RecordKind::Write,
            whole: true,
            last: offset + bytes == total,
            disk: 3,
            epoch: 7,
            sector,
            time: 1,
            id,
            total,
            offset,
            bytes,
        }
    }

    #[test]
    fn heads_come_back_as_they_were_written() {
        let one = record(u64::MAX - 5, 1 << 40, 1 << 20, 4096, 4096);
        assert_eq!(Record::parse(&one.encode()), Some(one));
        let torn = Record { whole: false, kind: RecordKind::Discard, ..one };
        assert_eq!(Record::parse(&torn.encode()), Some(torn));
        assert_eq!(Record::parse(&one.encode()[..55]), None);
        assert_eq!(Record::parse(&[0; 64]), None);
    }

    #[test]
    fn what_lacks_its_beginning_or_its_data_is_broken() {
        let mut assembler = Assembler::keeping(1 << 20);
        assert_eq!(assembler.take(0, &record(1, 0, 8192, 4096, 4096), &[0; 4096]), Outcome::Broken);
        let torn = Record { whole: false, ..record(2, 0, 4096, 0, 4096) };
        assert_eq!(assembler.take(0, &torn, &[0; 4096]), Outcome::Broken);
        assert_eq!(assembler.take(0, &record(3, 0, 8192, 0, 4096), &[0; 4096]), Outcome::Pending);
        assert_eq!(assembler.take(9, &record(3, 0, 8192, 512, 4096), &[0; 4096]), Outcome::Broken);
        assert!(!assembler.is_open());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Records of several bios, shuffled but each bio's own in order, against the bios themselves.
        #[test]
        fn interleaved_records_join_in_the_order_of_the_last(
            sizes in prop::collection::vec(1u32..40, 1..8),
            order in prop::collection::vec(any::<prop::sample::Index>(), 400),
        ) {
            let bios: Vec<Vec<u8>> = sizes.iter().enumerate()
                .map(|(id, sectors)| (0..sectors * 512).map(|byte| (byte / 512 + id as u32 * 50) as u8).collect())
                .collect();
            let mut offsets = vec![0usize; bios.len()];
            let mut firsts: BTreeMap<usize, u64> = BTreeMap::new();
            let mut assembler = Assembler::keeping(1 << 20);
            let (mut position, mut order, mut finished) = (0u64, order.into_iter(), 0);
            while finished < bios.len() {
                let waiting: Vec<usize> = (0..bios.len()).filter(|id| offsets[*id] < bios[*id].len()).collect();
                let id = order.next().map_or(waiting[0], |index| waiting[index.index(waiting.len())]);
                let from = offsets[id];
                let to = (from + 4096).min(bios[id].len());
                let record = record(id as u64, 8 * id as u64, bios[id].len() as u32, from as u32, (to - from) as u32);
                let outcome = assembler.take(position, &record, &bios[id][from..to]);
                firsts.entry(id).or_insert(position);
                offsets[id] = to;
                position += 100;
                if to < bios[id].len() {
                    prop_assert_eq!(outcome, Outcome::Pending);
                } else {
                    let range = ByteRange::new(4096 * id as u64, bios[id].len() as u64);
                    let data = Bytes::from(bios[id].clone());
                    prop_assert_eq!(outcome, Outcome::Whole(vec![ChangeKind::Write { range, data }]));
                    firsts.remove(&id);
                    finished += 1;
                }
                prop_assert_eq!(assembler.safe(position), firsts.values().copied().min().unwrap_or(position));
            }
            prop_assert!(!assembler.is_open());
        }
    }
}
