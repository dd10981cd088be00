//! Reading a consumer, one at a time, and acknowledging.
//!
//! Who reads has a connection of its own, which holds an advisory lock for as long as it lasts, and by
//! which alone anything is acknowledged. So whose connection broke cannot acknowledge past the one that came after it.

use deadpool_postgres::{ClientWrapper, Object, Transaction};
use p2p_sync_proto::{Code, Problem};
use tokio_postgres::Row;

use super::{
    Batch, Store,
    consumers::no_consumer,
    feed_batch::{CONSUMER, read},
    query, signed, unavailable, unsigned,
};

const MOVE: &str = "INSERT INTO p2p_sync.consumer_cursors AS c (consumer, stream, sequence, began_above) \
        SELECT $1, m.* FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS m(stream, sequence, began_above) \
    ON CONFLICT (consumer, stream) DO UPDATE SET \
        sequence = excluded.sequence, began_above = excluded.began_above, moved_at = excluded.moved_at";

/// A consumer that is read by this connection and no other. Ends when it is dropped.
pub struct ConsumerReader {
    store: Store,
    name: String,
    client: ClientWrapper,
}

impl Store {
    /// Begins to read a consumer. `NOT_FOUND` where there is none, `NOT_ALLOWED` where another one reads it, with who does.
    pub async fn read_consumer(&self, name: &str) -> Result<ConsumerReader, Problem> {
        const BEGIN: &str =
            "SELECT pg_try_advisory_lock(p2p_sync.consumer_lock(name)) FROM p2p_sync.consumers WHERE name = $1";
        const NAMED: &str = "SELECT set_config('application_name', $1, false)";
        // Postgres notices within half a minute that this machine is gone, and lets another one read; it does not mind how
        // long a program takes for a batch.
        const KEPT: &str = "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3; \
            SET idle_session_timeout = 0";
        let object = self.reads().await?;
        query(&object, NAMED, &[&program()]).await?;
        if !self.inner.pools.is_embedded() {
            object.batch_execute(KEPT).await.map_err(|error| unavailable(&error))?;
        }
        // Never given to others, so that the lock ends with it.
        let client = Object::take(object);
        let rows = client
            .query(BEGIN, &[&name])
            .await
            .map_err(|error| unavailable(&error))?;
        match rows.first().map(|row| row.get(0)) {
            Some(true) => Ok(ConsumerReader {
                store: self.clone(),
                name: name.to_owned(),
                client,
            }),
            Some(false) => {
                // The embedded engine has but this connection.
                drop(client);
                Err(self.is_read(name).await)
            }
            None => Err(no_consumer(name)),
        }
    }

    /// What a consumer would read next, with at most so many changes; nothing is changed by it.
    pub async fn peek_consumer(&self, name: &str, limit: u32) -> Result<Batch, Problem> {
        let mut client = self.reads().await?;
        read(&mut client, name, limit).await
    }
}

impl ConsumerReader {
    /// What comes next, with at most so many changes, at least 1; the same again until it is acknowledged, or more.
    pub async fn next(&mut self, limit: u32) -> Result<Batch, Problem> {
        read(&mut self.client, &self.name, limit).await
    }

    /// The number of a batch that is handed out now: greater than any before, of whichever reader, also if the hub's database
    /// has gone back since, unless its clock has too.
    pub async fn number(&self) -> Result<u64, Problem> {
        const NUMBER: &str = "UPDATE p2p_sync.consumers \
            SET batch = greatest(batch + 1, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint) \
            WHERE name = $1 RETURNING batch";
        let rows = self.client.query(NUMBER, &[&self.name]).await;
        let rows = rows.map_err(|error| unavailable(&error))?;
        let row = rows.first().ok_or_else(|| no_consumer(&self.name))?;
        Ok(unsigned(row.get(0)))
    }

    /// Notes that a batch took effect, whatever that is: the next one goes on after it.
    pub async fn acknowledge(&mut self, batch: &Batch) -> Result<(), Problem> {
        let Self { store, name, client } = self;
        let streams: Vec<&str> = batch.moved.iter().map(|moved| moved.stream.as_str()).collect();
        let sequences: Vec<i64> = batch.moved.iter().map(|moved| signed(moved.upto)).collect();
        let floors: Vec<i64> = batch.moved.iter().map(|moved| signed(moved.began_above)).collect();
        let transaction = begin(client).await?;
        if batch.begins {
            begin_anew(&transaction, name, Some(batch.timeline)).await?;
        }
        query(&transaction, MOVE, &[name, &streams, &sequences, &floors]).await?;
        store.committed(transaction).await
    }

    /// Takes everything up to a position for acknowledged, or up to the head; of one stream, or of all, those included that
    /// were not begun.
    ///
    /// `NOT_FOUND` where the consumer does not read the stream, `BAD_VALUE` where the position is not between what is
    /// acknowledged and the head, or where the consumer has yet to begin with all streams.
    pub async fn skip(&mut self, stream: Option<&str>, upto: Option<u64>) -> Result<(), Problem> {
        const SKIP: &str = "INSERT INTO p2p_sync.consumer_cursors AS c (consumer, stream, sequence, began_above) \
                SELECT consumer, stream, coalesce($3, head), floor FROM p2p_sync.consumer_streams \
                    WHERE consumer = $1 AND stream = coalesce($2, stream) \
            ON CONFLICT (consumer, stream) DO UPDATE SET \
                sequence = excluded.sequence, began_above = excluded.began_above, moved_at = excluded.moved_at";
        let (timeline, begins) = self.timeline().await?;
        let upto = upto.map(signed);
        if let Some(stream) = stream {
            let name = &self.name;
            if begins {
                let sentence = format!("{name} has yet to begin: have it followed once, or skip all streams");
                return Err(Problem::new(Code::BadValue, sentence));
            }
            let row = self.stream(stream).await?;
            let (head, sequence): (i64, Option<i64>) = (row.get(0), row.get(1));
            if upto.is_some_and(|upto| upto < sequence.unwrap_or(0) || upto > head) {
                let sentence = format!(
                    "{name} is at {} of {stream}, which reaches to {head}: give a position from there to there, or go back by \
                     `feed rewind`",
                    sequence.unwrap_or(0)
                );
                return Err(Problem::new(Code::BadValue, sentence));
            }
        }
        let Self { store, name, client } = self;
        let transaction = begin(client).await?;
        if begins {
            begin_anew(&transaction, name, Some(timeline)).await?;
        }
        query(&transaction, SKIP, &[name, &stream, &upto]).await?;
        store.committed(transaction).await
    }

    /// Has everything told again, of one stream or of all, in a snapshot; or what came to a stream after a position.
    ///
    /// `NOT_FOUND` where the consumer has not read the stream, `BAD_VALUE` where the position is beyond what is acknowledged.
    pub async fn rewind(&mut self, stream: Option<&str>, to: Option<u64>) -> Result<(), Problem> {
        const REWIND: &str = "UPDATE p2p_sync.consumer_cursors SET sequence = $3 WHERE consumer = $1 AND stream = $2";
        let to = to.map(signed);
        if let Some(stream) = stream {
            let name = &self.name;
            let sequence: Option<i64> = self.stream(stream).await?.get(1);
            if to.is_some() && to > sequence {
                let sentence = format!(
                    "{name} is at {} of {stream}: give a position before it, or go on by `feed skip`",
                    sequence.unwrap_or(0)
                );
                return Err(Problem::new(Code::BadValue, sentence));
            }
        }
        let Self { store, name, client } = self;
        let transaction = begin(client).await?;
        match stream {
            Some(stream) => query(&transaction, REWIND, &[name, &stream, &to]).await.map(drop)?,
            None => begin_anew(&transaction, name, None).await?,
        }
        store.committed(transaction).await
    }

    /// Forgets the consumer.
    pub async fn remove(mut self) -> Result<(), Problem> {
        const REMOVE: &str = "DELETE FROM p2p_sync.consumers WHERE name = $1";
        let Self { store, name, client } = &mut self;
        let transaction = begin(client).await?;
        query(&transaction, REMOVE, &[name]).await?;
        store.committed(transaction).await
    }

    /// The hub's timeline, and whether the consumer has yet to begin in it.
    async fn timeline(&self) -> Result<(u64, bool), Problem> {
        let rows = self.client.query(CONSUMER, &[&self.name]).await;
        let rows = rows.map_err(|error| unavailable(&error))?;
        let row = rows.first().ok_or_else(|| no_consumer(&self.name))?;
        let (hub, own): (i64, Option<i64>) = (row.get(0), row.get(1));
        Ok((unsigned(hub), own != Some(hub)))
    }

    /// Head and position of a stream.
    async fn stream(&self, stream: &str) -> Result<Row, Problem> {
        const STREAM: &str = "SELECT head, sequence FROM p2p_sync.consumer_streams WHERE consumer = $1 AND stream = $2";
        let rows = self.client.query(STREAM, &[&self.name, &stream]).await;
        let row = rows.map_err(|error| unavailable(&error))?.pop();
        row.ok_or_else(|| {
            let name = &self.name;
            let sentence =
                format!("{name} reads no stream {stream:?} that something was written to: see `feed show {name}`");
            Problem::new(Code::NotFound, sentence)
        })
    }
}

impl Store {
    async fn committed(&self, transaction: Transaction<'_>) -> Result<(), Problem> {
        transaction.commit().await.map_err(|error| unavailable(&error))?;
        self.inner.pools.make_durable().await
    }
}

async fn begin(client: &mut ClientWrapper) -> Result<Transaction<'_>, Problem> {
    client.transaction().await.map_err(|error| unavailable(&error))
}

/// Forgets a consumer's cursors, which are of another timeline, or are to be begun anew.
async fn begin_anew(transaction: &Transaction<'_>, name: &str, timeline: Option<u64>) -> Result<(), Problem> {
    const FORGET: &str = "DELETE FROM p2p_sync.consumer_cursors WHERE consumer = $1";
    const BEGIN: &str = "UPDATE p2p_sync.consumers SET timeline = $2 WHERE name = $1";
    query(transaction, FORGET, &[&name]).await?;
    query(transaction, BEGIN, &[&name, &timeline.map(signed)]).await?;
    Ok(())
}

/// This program, as a second reader is told of it: a process, and the machine where there is a name.
fn program() -> String {
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let is_plain = |letter: &char| letter.is_ascii_alphanumeric() || ['-', '.', '_'].contains(letter);
    let machine: String = machine.chars().filter(is_plain).take(24).collect();
    let at = if machine.is_empty() { "" } else { " on " };
    format!("process {}{at}{machine}", std::process::id())
}
