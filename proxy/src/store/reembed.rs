//! Making all vectors anew, by another model or for another index, beside those that serve.
//!
//! The new ones grow in a table of their own, by the texts that the old ones keep, and take their place in one transaction
//! when they and their index are there. What is interrupted goes on where it was.

use std::collections::HashMap;

use deadpool_postgres::Object;
use p2p_sync_proto::{Code, Problem};
use tokio_postgres::types::ToSql;

use super::{Hnsw, Store, told};
use crate::embed::{EmbedError, Embedder};

/// Texts asked for at one time.
const BATCH: i64 = 64;
/// How often what was written meanwhile is looked for; what is left then is queued.
const PASSES_MAX: usize = 4;

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Vectors that are there.
    pub done: u64,
    /// Vectors that are to be there.
    pub all: u64,
    /// Texts that the provider does not take: they have no vector any more.
    pub not_taken: u64,
    /// Vectors that tools gave without a text: nothing can be made of them.
    pub without_text: u64,
    /// The vectors are there, and their index is being made.
    pub is_indexing: bool,
}

type Row = (String, i64, String, Vec<u8>);

impl Store {
    /// Makes all vectors anew by a model, and their index as `hnsw` says; old ones serve until then. From then on proxies
    /// that are set to another model embed and find nothing until they are started anew.
    ///
    /// Errors: of the provider; `HUB_UNAVAILABLE` with Postgres' word in the log. It can be run again, and goes on.
    pub async fn reembed(
        &self,
        embedder: &Embedder,
        hnsw: Hnsw,
        mut told: impl FnMut(Progress),
    ) -> Result<Progress, Problem> {
        let space = self.embedding_space().await?;
        let client = self.embedding_client().await?;
        // Of this process alone, which ends with the command. Plans of a table that is replaced are made each time.
        run(&client, "SET statement_timeout = 0; SET maintenance_work_mem = '512MB'").await?;
        let begun = Progress {
            all: space.vectors,
            ..Progress::default()
        };
        prepare(&client, embedder).await?;
        let is_same = space.model.as_deref() == Some(embedder.model())
            && usize::try_from(space.dimensions) == Ok(embedder.dimensions());
        let mut progress = if is_same {
            run(&client, COPY).await?;
            begun
        } else {
            let mut made = embed_all(&client, embedder, begun, &mut told).await?;
            let counted = rows(&client, WITHOUT_TEXT, &[]).await?;
            made.without_text = counted.first().map_or(0, |row| super::unsigned(row.get(0)));
            made
        };
        progress.is_indexing = true;
        told(progress);
        run(&client, &index(hnsw)).await?;
        swap(&client, embedder).await?;
        self.inner.pools.make_durable().await?;
        progress.done = self.embedding_space().await?.vectors;
        Ok(progress)
    }
}

/// Where only the index changes.
const COPY: &str = "INSERT INTO p2p_sync.embeddings_next SELECT * FROM p2p_sync.embeddings ON CONFLICT DO NOTHING";

const WITHOUT_TEXT: &str = "SELECT count(*) FROM p2p_sync.embeddings WHERE content = ''";

/// A table for a model's vectors, unless it is there from an earlier attempt.
async fn prepare(client: &Object, embedder: &Embedder) -> Result<(), Problem> {
    const BEGUN: &str = "SELECT s.next_model, a.atttypmod FROM p2p_sync.embedding_space AS s \
        LEFT JOIN pg_attribute AS a ON a.attrelid = to_regclass('p2p_sync.embeddings_next') AND a.attname = 'embedding'";
    let (model, dimensions) = (embedder.model(), embedder.dimensions());
    let begun = rows(client, BEGUN, &[]).await?;
    let is_begun = begun.first().is_some_and(|row| {
        let found: (Option<String>, Option<i32>) = (row.get(0), row.get(1));
        found.0.as_deref() == Some(model) && found.1.is_some_and(|found| usize::try_from(found) == Ok(dimensions))
    });
    if is_begun {
        return Ok(());
    }
    let table = format!(
        "BEGIN; DROP TABLE IF EXISTS p2p_sync.embeddings_next; \
         CREATE TABLE p2p_sync.embeddings_next (LIKE p2p_sync.embeddings INCLUDING DEFAULTS INCLUDING CONSTRAINTS \
            INCLUDING COMMENTS, CONSTRAINT embeddings_next_pkey PRIMARY KEY (path, entry)); \
         ALTER TABLE p2p_sync.embeddings_next ALTER COLUMN embedding TYPE halfvec({dimensions}); COMMIT"
    );
    run(client, &table).await?;
    let name = "UPDATE p2p_sync.embedding_space SET next_model = $1";
    rows(client, name, &[&model]).await.map(drop)
}

/// Embeds what has no new vector yet, pass by pass until there is nothing.
async fn embed_all(
    client: &Object,
    embedder: &Embedder,
    mut progress: Progress,
    told: &mut impl FnMut(Progress),
) -> Result<Progress, Problem> {
    const MISSING: &str = "SELECT e.path, e.entry, e.content, e.content_hash FROM p2p_sync.embeddings AS e \
        WHERE (e.path, e.entry) > ($1, $2) AND e.content <> '' AND NOT EXISTS (SELECT FROM p2p_sync.embeddings_next AS n \
            WHERE n.path = e.path AND n.entry = e.entry AND n.content_hash = e.content_hash) \
        ORDER BY e.path, e.entry LIMIT $3";
    for pass in 0..PASSES_MAX {
        let (mut path, mut entry, mut found) = (String::new(), i64::MIN, 0_usize);
        progress.not_taken = 0;
        loop {
            let missing = rows(client, MISSING, &[&path, &entry, &BATCH]).await?;
            let batch: Vec<Row> = missing
                .iter()
                .map(|row| (row.get(0), row.get(1), row.get(2), row.get(3)))
                .collect();
            let Some((last_path, last_entry, ..)) = batch.last() else {
                break;
            };
            (path, entry) = (last_path.clone(), *last_entry);
            found += batch.len();
            let vectors = vectors(embedder, &batch).await?;
            progress.not_taken += u64::try_from(batch.len() - vectors.len()).unwrap_or_default();
            write(client, embedder.dimensions(), &vectors).await?;
            let counted = rows(client, "SELECT count(*) FROM p2p_sync.embeddings_next", &[]).await?;
            progress.done = counted.first().map_or(0, |row| super::unsigned(row.get(0)));
            progress.all = progress.all.max(progress.done);
            told(progress);
        }
        let left = found as u64 - progress.not_taken;
        if left == 0 {
            tracing::debug!(pass, "all vectors are there");
            break;
        }
    }
    Ok(progress)
}

/// A text by its row, and its vector.
type Made<'b> = (&'b Row, Vec<f32>);

/// The vectors of a batch; one by one where the provider does not take it whole, and without those that it does not take.
async fn vectors<'b>(embedder: &Embedder, batch: &'b [Row]) -> Result<Vec<Made<'b>>, Problem> {
    let mut by_hash: HashMap<&[u8], Vec<f32>> = HashMap::new();
    let mut texts: Vec<(&[u8], &str)> = batch.iter().map(|row| (row.3.as_slice(), row.2.as_str())).collect();
    texts.sort_unstable();
    texts.dedup();
    let bounds = embedder.bounds();
    let mut rest = texts.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fit = rest.iter().take(bounds.texts_max).take_while(|(_, text)| {
            bytes += text.len();
            bytes <= bounds.batch_bytes_max
        });
        let (now, later) = rest.split_at(fit.count().max(1));
        rest = later;
        let given: Vec<String> = now.iter().map(|(_, text)| (*text).to_owned()).collect();
        match embedder.embed(&given).await {
            Ok(vectors) => by_hash.extend(now.iter().map(|(hash, _)| *hash).zip(vectors)),
            Err(EmbedError::NotTaken(_) | EmbedError::TooLong { .. } | EmbedError::TooMany { .. }) => {
                for ((hash, _), text) in now.iter().zip(&given) {
                    match embedder.embed(std::slice::from_ref(text)).await {
                        Ok(vectors) => by_hash.extend(vectors.into_iter().map(|vector| (*hash, vector))),
                        Err(EmbedError::NotTaken(_) | EmbedError::TooLong { .. }) => {}
                        Err(error) => return Err(error.for_operator()),
                    }
                }
            }
            Err(error) => return Err(error.for_operator()),
        }
    }
    let made = batch
        .iter()
        .filter_map(|row| Some((row, by_hash.get(row.3.as_slice())?.clone())));
    Ok(made.collect())
}

async fn write(client: &Object, dimensions: usize, made: &[Made<'_>]) -> Result<(), Problem> {
    const WRITE: &str = "INSERT INTO p2p_sync.embeddings_next AS n (path, entry, stream_sequence, data_type, map, account_id, \
            received_at, content, content_hash, metadata, embedding, embedded_at) \
        SELECT e.path, e.entry, e.stream_sequence, e.data_type, e.map, e.account_id, e.received_at, e.content, e.content_hash, \
                e.metadata, ($4::real[])[(g.place - 1) * $5 + 1 : g.place * $5]::halfvec, now() \
            FROM unnest($1::text[], $2::bigint[], $3::bytea[]) WITH ORDINALITY AS g(path, entry, hash, place) \
            JOIN p2p_sync.embeddings AS e ON e.path = g.path AND e.entry = g.entry AND e.content_hash = g.hash \
        ON CONFLICT (path, entry) DO UPDATE SET stream_sequence = excluded.stream_sequence, map = excluded.map, \
            account_id = excluded.account_id, received_at = excluded.received_at, content = excluded.content, \
            content_hash = excluded.content_hash, metadata = excluded.metadata, embedding = excluded.embedding";
    let paths: Vec<&str> = made.iter().map(|(row, _)| row.0.as_str()).collect();
    let entries: Vec<i64> = made.iter().map(|(row, _)| row.1).collect();
    let hashes: Vec<&[u8]> = made.iter().map(|(row, _)| row.3.as_slice()).collect();
    let vectors: Vec<f32> = made.iter().flat_map(|(_, vector)| vector.iter().copied()).collect();
    let dimensions = i64::try_from(dimensions).unwrap_or_default();
    rows(client, WRITE, &[&paths, &entries, &hashes, &vectors, &dimensions])
        .await
        .map(drop)
}

fn index(hnsw: Hnsw) -> String {
    format!(
        "DROP INDEX IF EXISTS p2p_sync.embeddings_next_by_cosine; \
         CREATE INDEX embeddings_next_by_cosine ON p2p_sync.embeddings_next USING hnsw (embedding halfvec_cosine_ops) \
            WITH (m = {}, ef_construction = {}); \
         CREATE INDEX IF NOT EXISTS embeddings_next_by_map ON p2p_sync.embeddings_next (map); \
         CREATE INDEX IF NOT EXISTS embeddings_next_by_time ON p2p_sync.embeddings_next (received_at); \
         CREATE INDEX IF NOT EXISTS embeddings_next_by_content ON p2p_sync.embeddings_next (content_hash); \
         ANALYZE p2p_sync.embeddings_next",
        hnsw.m, hnsw.ef_construction
    )
}

/// Puts the new vectors in the place of the old. What was embedded meanwhile is queued, what was deleted goes. What tools
/// keep is not written meanwhile, for the queue has no text of it.
async fn swap(client: &Object, embedder: &Embedder) -> Result<(), Problem> {
    let quoted = embedder.model().replace('\'', "''");
    let swap = format!(
        "BEGIN; SET LOCAL standard_conforming_strings = on; \
         UPDATE p2p_sync.embedding_space SET model = '{quoted}', next_model = NULL; \
         LOCK TABLE p2p_sync.embeddings IN ACCESS EXCLUSIVE MODE; \
         INSERT INTO p2p_sync.embedding_queue (path, entry, stream, stream_sequence, first_sequence, map) \
            SELECT e.path, e.entry, p2p_sync.stream_of(e.path), e.stream_sequence, e.stream_sequence, e.map \
                FROM p2p_sync.embeddings AS e WHERE NOT EXISTS (SELECT FROM p2p_sync.embeddings_next AS n \
                    WHERE n.path = e.path AND n.entry = e.entry AND n.content_hash = e.content_hash) \
                    AND NOT starts_with(e.path, '@hub/') \
                ORDER BY e.path, e.entry ON CONFLICT DO NOTHING; \
         DELETE FROM p2p_sync.embeddings_next AS n WHERE NOT EXISTS (SELECT FROM p2p_sync.embeddings AS e \
            WHERE e.path = n.path AND e.entry = n.entry); \
         DROP TABLE p2p_sync.embeddings; \
         ALTER TABLE p2p_sync.embeddings_next RENAME TO embeddings; \
         ALTER INDEX p2p_sync.embeddings_next_pkey RENAME TO embeddings_pkey; \
         ALTER INDEX p2p_sync.embeddings_next_by_cosine RENAME TO embeddings_by_cosine; \
         ALTER INDEX p2p_sync.embeddings_next_by_map RENAME TO embeddings_by_map; \
         ALTER INDEX p2p_sync.embeddings_next_by_time RENAME TO embeddings_by_time; \
         ALTER INDEX p2p_sync.embeddings_next_by_content RENAME TO embeddings_by_content; \
         COMMENT ON TABLE p2p_sync.embeddings IS 'Texts of operations with their vectors, searched by cosine; and what tools \
            keep under @hub/VECTOR_EMBEDDING/<id>, which is nowhere else'; \
         COMMIT"
    );
    run(client, &swap).await
}

async fn rows(client: &Object, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<tokio_postgres::Row>, Problem> {
    client.query(sql, values).await.map_err(|error| failed(&error))
}

async fn run(client: &Object, sql: &str) -> Result<(), Problem> {
    let done = client.batch_execute(sql).await;
    if done.is_err() && sql.starts_with("BEGIN") {
        // Nothing of it stays.
        client.batch_execute("ROLLBACK").await.map_err(|error| failed(&error))?;
    }
    done.map_err(|error| failed(&error))
}

/// The operator's alone to read.
fn failed(error: &tokio_postgres::Error) -> Problem {
    let sentence = format!(
        "Postgres does not do it ({}): the vectors are as they were; put that right, and run it again, which goes on where \
         it was",
        told(error)
    );
    Problem::new(Code::HubUnavailable, sentence)
}
