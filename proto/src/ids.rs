//! Identifiers: operation ids and positions.

use std::fmt;

use uuid::{Builder, Uuid};

use crate::v1;

/// A new operation or batch id: a `UUIDv7` (RFC 9562), so that ids of one host sort by the time they were made.
pub fn new_id() -> Uuid {
    Uuid::now_v7()
}

/// Makes the ids of one host's operations: `UUIDv7` as [`new_id`] gives, without a call to the system for each.
///
/// The random part is drawn anew in each millisecond and grows by a random step within it (RFC 9562, method 2), so that
/// the ids sort as they were made, also while the clock goes back. They are unique, not secret.
#[derive(Debug)]
pub struct IdSource {
    random: fastrand::Rng,
    millis: u64,
    tail: u128,
}

impl IdSource {
    /// Bits of the random part.
    const TAIL_BITS: u32 = 74;

    /// A source seeded by the operating system.
    pub fn new() -> Self {
        let (high, low) = Uuid::new_v4().as_u64_pair();
        Self {
            random: fastrand::Rng::with_seed(high ^ low.rotate_left(32)),
            millis: 0,
            tail: 0,
        }
    }

    /// The next id, at a time in milliseconds since 1970.
    pub fn next_id(&mut self, now_ms: u64) -> Uuid {
        if now_ms > self.millis {
            self.millis = now_ms;
            // The highest bit is left for the steps to grow into: no millisecond has as many.
            self.tail = self.random.u128(..) >> (u128::BITS - Self::TAIL_BITS + 1);
        } else {
            self.tail += 1 + u128::from(self.random.u32(..));
        }
        // 12 bits go before the variant, 62 behind it; the version and the variant are put over the rest.
        let random = (self.tail >> 62 << 64) | (self.tail & ((1 << 62) - 1));
        let bytes = random.to_be_bytes();
        let random = bytes.last_chunk::<10>().expect("16 bytes have 10");
        Builder::from_unix_timestamp_millis(self.millis, random).into_uuid()
    }
}

impl Default for IdSource {
    fn default() -> Self {
        Self::new()
    }
}

/// Reads an id off the wire, where it is 16 bytes; `None` for any other length.
pub fn read_id(bytes: &[u8]) -> Option<Uuid> {
    Uuid::from_slice(bytes).ok()
}

/// Where an operation stands in its host's order: the incarnation of the outbox and the sequence within it.
///
/// Unique per host; compared incarnation first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// Grows each time the outbox is opened.
    pub incarnation: u64,
    /// Counts operations within the incarnation, from 1.
    pub sequence: u64,
}

impl Position {
    /// The version of an operation at this position, made under `tenure`.
    pub fn version(self, tenure: u64) -> v1::Version {
        v1::Version {
            tenure,
            incarnation: self.incarnation,
            sequence: self.sequence,
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.incarnation, self.sequence)
    }
}

impl From<v1::OperationRef> for Position {
    fn from(wire: v1::OperationRef) -> Self {
        Self {
            incarnation: wire.incarnation,
            sequence: wire.sequence,
        }
    }
}

impl From<Position> for v1::OperationRef {
    fn from(position: Position) -> Self {
        Self {
            incarnation: position.incarnation,
            sequence: position.sequence,
        }
    }
}

impl From<&v1::Version> for Position {
    fn from(version: &v1::Version) -> Self {
        Self {
            incarnation: version.incarnation,
            sequence: version.sequence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_one_source_are_uuids_of_version_7_that_sort_as_they_were_made() {
        let mut source = IdSource::new();
        // The clock stands, goes on and goes back.
        let times = [
            1_700_000_000_000,
            1_700_000_000_001,
            1_700_000_000_000,
            1_700_000_000_007,
        ];
        let mut last = Uuid::nil();
        for now_ms in times {
            for _ in 0..10_000 {
                let id = source.next_id(now_ms);
                assert!(id > last, "{id} after {last}");
                assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
                last = id;
            }
        }
        assert_eq!(last.get_timestamp().map(|time| time.to_unix().0), Some(1_700_000_000));
    }

    #[test]
    fn two_sources_share_no_id_of_one_millisecond() {
        let (mut one, mut other) = (IdSource::new(), IdSource::new());
        let ids = |source: &mut IdSource| (0..10_000).map(|_| source.next_id(1)).collect::<Vec<_>>();
        let known: std::collections::HashSet<Uuid> = ids(&mut one).into_iter().collect();
        assert_eq!(known.len(), 10_000);
        assert!(ids(&mut other).iter().all(|id| !known.contains(id)));
    }
}
