//! What the hub asks of streams for all of their subscribers: how far they are, and what they hold.

use std::collections::HashMap;

use deadpool_postgres::GenericClient;
use p2p_sync_proto::Problem;
use uuid::Uuid;

use super::{
    StateRow, Store, query,
    read::{CHANGES, last_below},
    signed, unsigned,
};

const HEADS: &str = "SELECT h.timeline, s.stream, coalesce(m.head, 0), coalesce(f.floor, 0) FROM p2p_sync.hub AS h \
    CROSS JOIN unnest($1::text[]) AS s(stream) \
    LEFT JOIN LATERAL (SELECT head FROM p2p_sync.map_states WHERE stream = s.stream) AS m ON true \
    LEFT JOIN LATERAL (SELECT floor FROM p2p_sync.stream_floors WHERE stream = s.stream) AS f ON true";

const HEADS_BELOW: &str = "SELECT stream, head FROM p2p_sync.map_states WHERE stream = ANY ($1) \
    UNION ALL (SELECT stream, head FROM p2p_sync.map_states WHERE stream >= $2 AND stream <= $3 AND stream NOT LIKE '@%' \
        ORDER BY stream LIMIT $4)";

const GENERATIONS: &str =
    "SELECT host_id, generation FROM p2p_sync.hosts WHERE host_id = ANY ($1) AND status = 'active'";

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Of the hub, when this was read.
    pub timeline: u64,
    /// The last position that was given out.
    pub head: u64,
    /// Up to here deletions and operations may be forgotten: who was told less has to begin anew.
    pub floor: u64,
}

/// What a stream holds after a position.
#[derive(Debug)]
pub struct Changes {
    /// How far the stream was just before.
    pub head: Head,
    /// In the order of the stream.
    pub rows: Vec<StateRow>,
    /// Nothing but `rows` is left of the positions up to here.
    pub upto: u64,
}

/// Who reads a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// The hub, once for all subscribers.
    Hub,
    /// A host for itself.
    Host,
}

impl Store {
    /// How far streams are; streams that nothing was ever written to are at 0.
    pub async fn heads(&self, streams: &[String]) -> Result<HashMap<String, Head>, Problem> {
        let client = self.reader(Reader::Hub).await?;
        let rows = query(&client, HEADS, &[&streams]).await?;
        Ok(rows.iter().map(|row| (row.get(1), head_of(row))).collect())
    }

    /// How far some streams are, and those of maps whose names begin so, at most `limit`; streams that nothing was ever written
    /// to are left out.
    pub async fn heads_below(
        &self,
        streams: &[&str],
        maps: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, u64)>, Problem> {
        let last = maps.map(last_below);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self.rows(HEADS_BELOW, &[&streams, &maps, &last, &limit]).await?;
        Ok(rows.iter().map(|row| (row.get(0), unsigned(row.get(1)))).collect())
    }

    /// What was committed to a stream after a position, at most `limit` changes; as [`Self::changes_since`].
    pub async fn changes(&self, reader: Reader, stream: &str, after: u64, limit: u32) -> Result<Changes, Problem> {
        let client = self.reader(reader).await?;
        // The head first: what is below it is committed, and so seen by the question that follows.
        let heads = query(&client, HEADS, &[&[stream].as_slice()]).await?;
        let head = heads.first().map(head_of).ok_or_else(super::not_answering)?;
        changes_after(&client, head, stream, after, limit).await
    }

    /// Those of these hosts that are let in, and the generation of their present credential.
    pub async fn generations(&self, hosts: &[Uuid]) -> Result<HashMap<Uuid, u32>, Problem> {
        let client = self.reader(Reader::Hub).await?;
        let rows = query(&client, GENERATIONS, &[&hosts]).await?;
        let generation = |row: &tokio_postgres::Row| u32::try_from(row.get::<_, i64>(1)).unwrap_or(u32::MAX);
        Ok(rows.iter().map(|row| (row.get(0), generation(row))).collect())
    }

    async fn reader(&self, reader: Reader) -> Result<deadpool_postgres::Object, Problem> {
        let pools = &self.inner.pools;
        let taken = match reader {
            Reader::Hub => pools.streams().await,
            Reader::Host => pools.reads().await,
        };
        taken.map_err(|error| super::no_connection(&error))
    }
}

/// What follows a position of a stream that is known to reach to `head`, at most `limit` changes.
pub(super) async fn changes_after(
    client: &impl GenericClient,
    head: Head,
    stream: &str,
    after: u64,
    limit: u32,
) -> Result<Changes, Problem> {
    let rows = query(client, CHANGES, &[&stream, &signed(after), &i64::from(limit)]).await?;
    let rows: Vec<StateRow> = rows.iter().map(StateRow::of).collect();
    let last = rows.last().map_or(after, |row| row.stream_sequence);
    let is_all = rows.len() < limit as usize;
    let upto = if is_all { last.max(head.head) } else { last };
    Ok(Changes { head, rows, upto })
}

fn head_of(row: &tokio_postgres::Row) -> Head {
    Head {
        timeline: unsigned(row.get(0)),
        head: unsigned(row.get(2)),
        floor: unsigned(row.get(3)),
    }
}
