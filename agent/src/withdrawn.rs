//! Sequences that will never be sent, as ranges, until the hub has been told.

use std::collections::{BTreeMap, BTreeSet};

use p2p_sync_proto::{
    Position,
    limits::{BATCH_INCARNATIONS_MAX, BATCH_WITHDRAWN_MAX},
    v1::SequenceRange,
};

/// Ranges remembered; beyond it nothing is conflated any more, so that the hub's bound on gaps is not the next to go.
const RANGES_MAX: usize = 16_384;

/// A set of positions; neighbours are kept as one range.
#[derive(Debug, Default)]
pub(crate) struct Withdrawn {
    /// Last sequence by incarnation and first.
    ranges: BTreeMap<(u64, u64), u64>,
}

impl Withdrawn {
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether no more should be withdrawn before the hub has been told of some.
    pub(crate) fn is_full(&self) -> bool {
        self.ranges.len() >= RANGES_MAX
    }

    pub(crate) fn insert(&mut self, Position { incarnation, sequence }: Position) {
        self.insert_range(SequenceRange {
            incarnation,
            first: sequence,
            last: sequence,
        });
    }

    pub(crate) fn insert_range(
        &mut self,
        SequenceRange {
            incarnation,
            mut first,
            mut last,
        }: SequenceRange,
    ) {
        let before = self.ranges.range(..=(incarnation, first)).next_back();
        if let Some((&(of, begin), &end)) = before
            && of == incarnation
            && end.saturating_add(1) >= first
        {
            (first, last) = (begin, last.max(end));
        }
        while let Some((&(of, begin), &end)) = self.ranges.range((incarnation, first)..).next()
            && of == incarnation
            && begin <= last.saturating_add(1)
        {
            self.ranges.remove(&(of, begin));
            last = last.max(end);
        }
        self.ranges.insert((incarnation, first), last);
    }

    /// Takes out what the hub has been told; what joined a range since then stays.
    pub(crate) fn remove(&mut self, told: &SequenceRange) {
        let of = told.incarnation;
        let overlapping: Vec<(u64, u64)> = self
            .ranges
            .range(..=(of, told.last))
            .rev()
            .map(|(&(incarnation, first), &last)| (incarnation, first, last))
            .take_while(|&(incarnation, _, last)| incarnation == of && last >= told.first)
            .map(|(_, first, last)| (first, last))
            .collect();
        for (first, last) in overlapping {
            self.ranges.remove(&(of, first));
            if first < told.first {
                self.ranges.insert((of, first), told.first - 1);
            }
            if last > told.last {
                self.ranges.insert((of, told.last + 1), last);
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = SequenceRange> + '_ {
        self.ranges.iter().map(|(&(incarnation, first), &last)| SequenceRange {
            incarnation,
            first,
            last,
        })
    }

    /// The first ranges, as long as each is `wanted`, as many as go into one message.
    pub(crate) fn fitting(&self, wanted: impl Fn(&SequenceRange) -> bool) -> Vec<SequenceRange> {
        let mut incarnations = BTreeSet::new();
        self.iter()
            .take(BATCH_WITHDRAWN_MAX)
            .take_while(|range| {
                incarnations.insert(range.incarnation);
                wanted(range) && incarnations.len() <= BATCH_INCARNATIONS_MAX
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_become_one_range_and_what_was_told_is_taken_out() {
        let mut withdrawn = Withdrawn::default();
        let range = |first, last| SequenceRange {
            incarnation: 1,
            first,
            last,
        };
        for sequence in [5, 3, 4, 9, 7, 8] {
            withdrawn.insert(Position {
                incarnation: 1,
                sequence,
            });
        }
        assert_eq!(withdrawn.iter().collect::<Vec<_>>(), [range(3, 5), range(7, 9)]);
        withdrawn.insert(Position {
            incarnation: 1,
            sequence: 6,
        });
        withdrawn.remove(&range(3, 5));
        assert_eq!(withdrawn.iter().collect::<Vec<_>>(), [range(6, 9)]);
    }

    #[test]
    fn it_is_the_set_that_it_stands_for() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut withdrawn, mut model) = (Withdrawn::default(), BTreeSet::new());
        for _ in 0..2000 {
            let (incarnation, first) = (random.u64(1..3), random.u64(1..60));
            let range = SequenceRange {
                incarnation,
                first,
                last: first + random.u64(0..5),
            };
            for sequence in range.first..=range.last {
                if random.bool() {
                    withdrawn.insert(Position { incarnation, sequence });
                    model.insert((incarnation, sequence));
                }
            }
            if random.bool() {
                withdrawn.remove(&range);
                model.retain(|&(of, at)| of != incarnation || !(range.first..=range.last).contains(&at));
            }
            let listed: BTreeSet<_> = withdrawn
                .iter()
                .flat_map(|r| (r.first..=r.last).map(move |at| (r.incarnation, at)))
                .collect();
            assert_eq!(listed, model, "seed {seed}");
            let apart = withdrawn.iter().zip(withdrawn.iter().skip(1));
            assert!(
                apart
                    .into_iter()
                    .all(|(a, b)| a.incarnation < b.incarnation || a.last + 1 < b.first),
                "seed {seed}"
            );
        }
    }
}
