//! What a consumer is told next.
//!
//! A batch is read in one snapshot of the database, floors and positions with the changes: nothing can be forgotten in
//! between unnoticed.

use deadpool_postgres::{ClientWrapper, Transaction};
use p2p_sync_proto::Problem;
use tokio_postgres::{IsolationLevel, Row};

use super::{
    Anew, ConsumerFilter, StateRow,
    consumers::no_consumer,
    query,
    streams::{Head, changes_after},
    unavailable, unsigned,
};

/// Changes that a batch may be asked to hold.
pub const BATCH_CHANGES_MAX: u32 = 10_000;
/// Paths and payloads of a batch, unless a single one is larger.
const BATCH_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Changes that a batch leaves out, because the consumer is not told of their types.
const LEFT_OUT_MAX: usize = 16_384;
/// Streams of a batch; others that wait longer come first in the next.
const BATCH_STREAMS_MAX: i64 = 256;
/// Changes read at once: the largest payloads take 32 MiB then.
const CHANGES_PER_READ: usize = 128;

pub(super) const CONSUMER: &str = "SELECT h.timeline, k.timeline, k.maps, k.types FROM p2p_sync.consumers AS k \
    CROSS JOIN p2p_sync.hub AS h WHERE k.name = $1";

const WAITING: &str = "SELECT stream, head, floor, sequence, began_above, begins_anew FROM p2p_sync.consumer_streams \
    WHERE consumer = $1 AND behind <> 0 ORDER BY moved_at NULLS FIRST, stream LIMIT $2";

/// What a consumer is told, and how far that takes it.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Of the hub, when this was read. Positions are of this timeline.
    pub timeline: u64,
    /// What is told, each stream in its order.
    pub told: Vec<Told>,
    /// There was more than was asked for.
    pub has_more: bool,
    /// The consumer had no cursors of this timeline.
    pub(super) begins: bool,
    pub(super) moved: Vec<Moved>,
    bytes: usize,
    changes: usize,
    left_out: usize,
}

/// One thing that a consumer is told.
#[derive(Clone, Debug)]
pub enum Told {
    /// What the consumer holds of a stream, or of all of them, is to be forgotten: everything that there is follows.
    Snapshot {
        /// None: of all streams.
        stream: Option<String>,
        /// Why, where it was read before; none at the very beginning.
        reason: Option<&'static str>,
    },
    /// A change.
    Change {
        /// Its stream.
        stream: String,
        /// The state, or the operation of a path whose operations each count.
        row: StateRow,
    },
}

/// Where a batch takes a stream.
#[derive(Clone, Debug)]
pub(super) struct Moved {
    pub(super) stream: String,
    pub(super) upto: u64,
    pub(super) began_above: u64,
}

impl Batch {
    /// Whether there is neither something to tell nor to acknowledge.
    pub fn is_empty(&self) -> bool {
        !self.begins && self.moved.is_empty()
    }

    /// Takes a change if it is told; false where it is for the next batch.
    fn add(&mut self, filter: &ConsumerFilter, stream: &str, row: StateRow, limit: usize) -> bool {
        if !filter.shows(&row.path) {
            self.left_out += 1;
            return self.left_out <= LEFT_OUT_MAX;
        }
        let bytes = row.path.len() + row.payload.as_ref().map_or(0, String::len);
        if self.changes >= limit || self.changes > 0 && self.bytes + bytes > BATCH_BYTES_MAX {
            return false;
        }
        self.bytes += bytes;
        self.changes += 1;
        self.told.push(Told::Change {
            stream: stream.to_owned(),
            row,
        });
        true
    }
}

/// What comes next, with at most so many changes, at least 1.
pub(super) async fn read(client: &mut ClientWrapper, name: &str, limit: u32) -> Result<Batch, Problem> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .map_err(|error| unavailable(&error))?;
    let rows = query(&transaction, CONSUMER, &[&name]).await?;
    let consumer = rows.first().ok_or_else(|| no_consumer(name))?;
    let (hub, own): (i64, Option<i64>) = (consumer.get(0), consumer.get(1));
    let filter = ConsumerFilter {
        maps: consumer.get(2),
        types: consumer.get(3),
    };
    let mut batch = Batch {
        timeline: unsigned(hub),
        begins: own != Some(hub),
        ..Batch::default()
    };
    if batch.begins {
        batch.told.push(Told::Snapshot {
            stream: None,
            reason: own.map(|_| "the hub's database went back"),
        });
    }
    let limit = limit.clamp(1, BATCH_CHANGES_MAX) as usize;
    let waiting = query(&transaction, WAITING, &[&name, &BATCH_STREAMS_MAX]).await?;
    batch.has_more = waiting.len() >= usize::try_from(BATCH_STREAMS_MAX).unwrap_or(usize::MAX);
    for row in waiting {
        if !read_stream(&transaction, &filter, &row, limit, &mut batch).await? {
            batch.has_more = true;
            break;
        }
    }
    transaction.rollback().await.map_err(|error| unavailable(&error))?;
    Ok(batch)
}

/// Reads on in a stream to its end, or to that of the batch: false then.
async fn read_stream(
    transaction: &Transaction<'_>,
    filter: &ConsumerFilter,
    row: &Row,
    limit: usize,
    batch: &mut Batch,
) -> Result<bool, Problem> {
    let stream: String = row.get(0);
    let head = Head {
        timeline: batch.timeline,
        head: unsigned(row.get(1)),
        floor: unsigned(row.get(2)),
    };
    let anew = Anew::of(row.get(5));
    let cursor: Option<i64> = row.get(3);
    let (mut upto, began_above) = match cursor.filter(|_| anew.is_none()) {
        Some(sequence) => (unsigned(sequence), unsigned(row.get(4))),
        None => (0, head.floor),
    };
    if batch.changes >= limit {
        return Ok(false);
    }
    if let Some(anew) = anew {
        batch.told.push(Told::Snapshot {
            stream: Some(stream.clone()),
            reason: Some(anew.sentence()),
        });
    }
    let mut has_room = true;
    while has_room && upto < head.head {
        let room = if filter.types.is_empty() {
            limit - batch.changes
        } else {
            limit
        };
        let at_once = u32::try_from(room.clamp(1, CHANGES_PER_READ)).unwrap_or(u32::MAX);
        let changes = changes_after(transaction, head, &stream, upto, at_once).await?;
        for row in changes.rows {
            let sequence = row.stream_sequence;
            has_room = batch.add(filter, &stream, row, limit);
            if !has_room {
                break;
            }
            upto = sequence;
        }
        if has_room {
            upto = changes.upto;
        }
    }
    batch.moved.push(Moved {
        stream,
        upto,
        began_above,
    });
    Ok(has_room)
}
