//! Version vectors: of each hub the number of its last edit.

use std::{cmp::Ordering, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Which edits a state has seen: of each hub the last one. Hubs that are not in it have edited nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionVector(BTreeMap<Uuid, u64>);

/// How two version vectors stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// The other has seen all edits that this one has, and more.
    Before,
    /// This one has seen all edits that the other has, and more.
    After,
    /// Both have seen the same.
    Equal,
    /// Each has seen an edit that the other has not.
    Concurrent,
}

impl VersionVector {
    /// Of one hub's edits alone.
    pub fn of(hub_id: Uuid, edit: u64) -> Self {
        Self(BTreeMap::from([(hub_id, edit)]))
    }

    /// How this one stands to another.
    pub fn compared_with(&self, other: &Self) -> Compared {
        let hubs = self.0.keys().chain(other.0.keys());
        let orders = hubs.map(|hub| self.edit(hub).cmp(&other.edit(hub)));
        let (mut has_more, mut lacks) = (false, false);
        for order in orders {
            has_more |= order == Ordering::Greater;
            lacks |= order == Ordering::Less;
        }
        match (has_more, lacks) {
            (false, false) => Compared::Equal,
            (false, true) => Compared::Before,
            (true, false) => Compared::After,
            (true, true) => Compared::Concurrent,
        }
    }

    fn edit(&self, hub: &Uuid) -> u64 {
        self.0.get(hub).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUBS: [Uuid; 3] = [Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3)];

    fn vector(edits: [u64; 3]) -> VersionVector {
        let known = HUBS.into_iter().zip(edits).filter(|(_, edit)| *edit > 0);
        VersionVector(known.collect())
    }

    #[test]
    fn each_pair_of_small_vectors_compares_as_its_numbers_do() {
        let all = || {
            (0..3).flat_map(|a| (0..3).flat_map(move |b| (0..3).map(move |c| [a, b, c]))) // 27 of them
        };
        for (left, right) in all().flat_map(|left| all().map(move |right| (left, right))) {
            let at_most = left.iter().zip(right).all(|(left, right)| *left <= right);
            let at_least = left.iter().zip(right).all(|(left, right)| *left >= right);
            let expected = match (at_most, at_least) {
                (true, true) => Compared::Equal,
                (true, false) => Compared::Before,
                (false, true) => Compared::After,
                (false, false) => Compared::Concurrent,
            };
            assert_eq!(
                vector(left).compared_with(&vector(right)),
                expected,
                "{left:?} {right:?}"
            );
        }
    }

    #[test]
    fn a_hub_that_is_not_named_has_edited_nothing() {
        let named: VersionVector =
            serde_json::from_str("{\"00000000-0000-0000-0000-000000000001\": 0}").expect("as the table has it");
        assert_eq!(named.compared_with(&VersionVector::default()), Compared::Equal);
        assert_eq!(
            VersionVector::of(HUBS[0], 1).compared_with(&VersionVector::of(HUBS[1], 1)),
            Compared::Concurrent
        );
    }
}
