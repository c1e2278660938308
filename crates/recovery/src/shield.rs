//! Which bytes of a disk the stream has written since a heal's `p0`: what the heal read lies below them.

use std::collections::BTreeMap;

use replication::geometry::ByteRange;

/// A set of bytes as ranges that neither overlap nor touch.
#[derive(Debug, Default)]
pub(crate) struct Shield {
    ranges: BTreeMap<u64, u64>,
}

impl Shield {
    pub(crate) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Number of separate ranges.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    pub(crate) fn add(&mut self, range: ByteRange) {
        let (mut start, mut end) = (range.start, range.end());
        if let Some((&before, &before_end)) = self.ranges.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        let inside: Vec<u64> = self.ranges.range(start..=end).map(|(inside, _)| *inside).collect();
        for inside in inside {
            end = end.max(self.ranges.remove(&inside).expect("it was just listed"));
        }
        self.ranges.insert(start, end);
    }

    /// The parts of `range` that are not in the set, in order.
    pub(crate) fn outside(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut parts = Vec::new();
        let mut at = range.start;
        let before = self.ranges.range(..range.start).next_back();
        for (&start, &end) in before.into_iter().chain(self.ranges.range(range.start..range.end())) {
            if end <= at {
                continue;
            }
            parts.extend(ByteRange::between(at, start));
            at = end;
        }
        parts.extend(ByteRange::between(at, range.end()));
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_added_is_inside(
            added in prop::collection::vec((0u64..500, 1u64..60), 0..30), probe in (0u64..500, 1u64..100)
        ) {
            let mut shield = Shield::default();
            let mut oracle = [false; 600];
            for (start, len) in added {
                shield.add(ByteRange::new(start, len));
                oracle[start as usize..(start + len) as usize].fill(true);
            }
            let outside = shield.outside(ByteRange::new(probe.0, probe.1));
            for at in probe.0..probe.0 + probe.1 {
                let is_outside = outside.iter().any(|part| part.start <= at && at < part.end());
                prop_assert_eq!(is_outside, !oracle[at as usize]);
            }
            let runs = oracle.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(oracle[0]);
            prop_assert_eq!(shield.len(), runs);
        }
    }
}
