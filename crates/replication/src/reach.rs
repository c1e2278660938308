//! What a break or a heal is about: the whole machine, or some ranges while the rest streams on.

use std::fmt;

use crate::codec::{DecodeError, Decoder, Encoder};
use crate::geometry::ByteRange;
use crate::limits;
use crate::position::DiskId;

/// Ranges of several disks: sorted, within one disk neither overlapping nor adjacent, at most
/// [`limits::BREAK_RANGES_MAX`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ranges(Vec<(DiskId, ByteRange)>);

/// What a break or a heal is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Every disk.
    Machine,
    /// These ranges. Points are offered and labelled as lacking them.
    Ranges(Ranges),
}

impl Ranges {
    /// These ranges, put in order. Too many are joined with their neighbours, nearest first: the result always names at
    /// least what was given.
    pub fn of(ranges: impl IntoIterator<Item = (DiskId, ByteRange)>) -> Ranges {
        let mut given: Vec<_> = ranges.into_iter().collect();
        given.sort_unstable();
        let mut ordered: Vec<(DiskId, ByteRange)> = Vec::new();
        for (disk, range) in given {
            match ordered.last_mut() {
                Some((last_disk, last)) if *last_disk == disk && last.end() >= range.start => {
                    *last = ByteRange::new(last.start, last.end().max(range.end()) - last.start);
                }
                _ => ordered.push((disk, range)),
            }
        }
        while ordered.len() > limits::BREAK_RANGES_MAX {
            let holes = ordered.windows(2).enumerate().filter(|(_, pair)| pair[0].0 == pair[1].0);
            // More disks than a machine can have would be needed for a list that is too long without a hole.
            let nearest = holes.min_by_key(|(_, pair)| pair[1].1.start - pair[0].1.end()).map(|(index, _)| index);
            let Some(index) = nearest else { break };
            let (_, next) = ordered.remove(index + 1);
            let (_, range) = &mut ordered[index];
            *range = ByteRange::new(range.start, next.end() - range.start);
        }
        Ranges(ordered)
    }

    /// Each disk and range, in order.
    pub fn iter(&self) -> impl Iterator<Item = (DiskId, ByteRange)> + '_ {
        self.0.iter().copied()
    }

    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether everything that `other` names is named.
    pub fn covers(&self, other: &Ranges) -> bool {
        let within = |(disk, inner): (DiskId, ByteRange)| {
            let mut candidates = self.iter().filter(|(own, _)| *own == disk);
            candidates.any(|(_, outer)| outer.start <= inner.start && inner.end() <= outer.end())
        };
        other.iter().all(within)
    }

    /// What either names.
    pub fn union(&self, other: &Ranges) -> Ranges {
        Ranges::of(self.iter().chain(other.iter()))
    }

    /// The list as the heals take it: every disk with its ranges.
    pub fn by_disk(&self) -> Vec<(DiskId, Vec<ByteRange>)> {
        let mut disks: Vec<(DiskId, Vec<ByteRange>)> = Vec::new();
        for (disk, range) in self.iter() {
            match disks.last_mut() {
                Some((last, ranges)) if *last == disk => ranges.push(range),
                _ => disks.push((disk, vec![range])),
            }
        }
        disks
    }

    /// Appends a varint count, then a disk and a range for each.
    pub fn encode(&self, out: &mut Encoder) {
        out.varint(self.0.len() as u64);
        for (disk, range) in self.iter() {
            out.u16(disk.0);
            range.encode(out);
        }
    }

    /// Reads a list that [`Ranges::encode`] may have written.
    pub fn decode(input: &mut Decoder) -> Result<Ranges, DecodeError> {
        let count = input.count("ranges", limits::BREAK_RANGES_MAX as u64)?;
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let disk = DiskId(input.u16("disk id")?);
            ranges.push((disk, ByteRange::decode(input, limits::DISK_BYTES_MAX)?));
        }
        let ordered = Ranges::of(ranges.iter().copied());
        if ordered.0 != ranges {
            return Err(DecodeError::Inconsistent("ranges overlap, touch or are not in order"));
        }
        Ok(ordered)
    }
}

impl fmt::Display for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (disk, range)) in self.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}bytes {range} of {disk}")?;
        }
        Ok(())
    }
}

impl Reach {
    /// Appends 0 for the machine, or 1 and the ranges.
    pub fn encode(&self, out: &mut Encoder) {
        match self {
            Reach::Machine => {
                out.u8(0);
            }
            Reach::Ranges(ranges) => ranges.encode(out.u8(1)),
        }
    }

    /// Reads one.
    pub fn decode(input: &mut Decoder) -> Result<Reach, DecodeError> {
        match input.u8("reach")? {
            0 => Ok(Reach::Machine),
            1 => {
                let ranges = Ranges::decode(input)?;
                if ranges.is_empty() {
                    return Err(DecodeError::Inconsistent("a break of no range"));
                }
                Ok(Reach::Ranges(ranges))
            }
            value => Err(DecodeError::Undefined { field: "reach", value: value.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ranges() -> impl Strategy<Value = Vec<(DiskId, ByteRange)>> {
        let range =
            (0u16..3, 0u64..4000, 1u64..60).prop_map(|(disk, start, len)| (DiskId(disk), ByteRange::new(start, len)));
        prop::collection::vec(range, 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_byte_given_is_named_and_few_ranges_are(given in ranges()) {
            let made = Ranges::of(given.iter().copied());
            prop_assert!(made.0.len() <= limits::BREAK_RANGES_MAX);
            prop_assert!(made.0.windows(2).all(|pair| pair[0].0 < pair[1].0 || pair[0].1.end() < pair[1].1.start));
            for (disk, range) in &given {
                prop_assert!(made.covers(&Ranges::of([(*disk, *range)])));
            }
            // Nothing but what is given is named unless the list was too long.
            let named = |list: &[(DiskId, ByteRange)]| -> std::collections::BTreeSet<(u16, u64)> {
                list.iter().flat_map(|(disk, range)| (range.start..range.end()).map(move |at| (disk.0, at))).collect()
            };
            if made.0.len() < limits::BREAK_RANGES_MAX {
                prop_assert_eq!(named(&made.0), named(&given));
            }
            let mut out = Encoder::new();
            made.encode(&mut out);
            let mut input = Decoder::new(out.finish());
            prop_assert_eq!(Ranges::decode(&mut input), Ok(made));
        }
    }
}
