//! Identifiers: operation ids and positions.

use std::fmt;

use uuid::Uuid;

use crate::v1;

/// A new operation or batch id: a `UUIDv7` (RFC 9562), so that ids of one host sort by the time they were made.
pub fn new_id() -> Uuid {
    Uuid::now_v7()
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
