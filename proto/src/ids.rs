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
/// The random part is drawn once and counts up from there (RFC 9562, 6.2), so that the ids sort as they were made, also
/// while the clock goes back, and whoever has the source's [`Numbering`] knows which one an id is. They are unique, not
/// secret.
#[derive(Debug)]
pub struct IdSource {
    millis: u64,
    made: u64,
    numbering: Numbering,
}

/// Tells the ids of one [`IdSource`] from all others, and which one each is.
#[derive(Clone, Copy, Debug)]
pub struct Numbering {
    /// The random part of the first.
    first: u128,
}

/// Bits of an id's random part: 12 before the variant, 62 behind it.
const TAIL_BITS: u32 = 74;
const LOW_TAIL_BITS: u32 = 62;
/// Ids that a source's numbering knows; so few that hardly ever another's id looks like one of them.
const NUMBERS: u128 = 1 << 40;

impl IdSource {
    /// A source seeded by the operating system.
    pub fn new() -> Self {
        Self {
            millis: 0,
            made: 0,
            numbering: Numbering {
                // The highest bit is left for the count to grow into.
                first: tail(Uuid::new_v4()) >> 1,
            },
        }
    }

    /// The next id, at a time in milliseconds since 1970.
    pub fn next_id(&mut self, now_ms: u64) -> Uuid {
        self.millis = self.millis.max(now_ms);
        let tail = self.numbering.first + u128::from(self.made);
        self.made += 1;
        // The version and the variant are put over the bits between.
        let random = (tail >> LOW_TAIL_BITS << 64) | (tail & ((1 << LOW_TAIL_BITS) - 1));
        let bytes = random.to_be_bytes();
        let random = bytes.last_chunk::<10>().expect("16 bytes have 10");
        Builder::from_unix_timestamp_millis(self.millis, random).into_uuid()
    }

    /// What tells its ids from others.
    pub fn numbering(&self) -> Numbering {
        self.numbering
    }
}

impl Numbering {
    /// How many ids the source had made before this one; `None` for another's id.
    pub fn number(self, id: Uuid) -> Option<u64> {
        let number = tail(id).checked_sub(self.first).filter(|number| *number < NUMBERS)?;
        u64::try_from(number).ok()
    }
}

/// The random part of an id.
fn tail(id: Uuid) -> u128 {
    let bits = id.as_u128();
    let high = (bits >> 64) & ((1 << (TAIL_BITS - LOW_TAIL_BITS)) - 1);
    high << LOW_TAIL_BITS | bits & ((1 << LOW_TAIL_BITS) - 1)
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
    fn a_source_knows_its_ids_by_their_numbers_and_no_others() {
        let (mut source, mut other) = (IdSource::new(), IdSource::new());
        for number in 0..10_000 {
            let id = source.next_id(number / 7);
            assert_eq!(source.numbering().number(id), Some(number));
            assert_eq!(source.numbering().number(other.next_id(number / 7)), None);
            assert_eq!(source.numbering().number(new_id()), None);
        }
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
