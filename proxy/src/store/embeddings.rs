//! Vectors of texts: what lies nearest to one, and whose model they are of.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use deadpool_postgres::Object;
use p2p_sync_proto::{Code, Problem};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{Store, no_connection, not_answering, query, unsigned};

/// Letters of a text that a hit tells.
pub(crate) const TOLD_LETTERS: usize = 1000;

/// How the index of vectors is built and read: pgvector's HNSW.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hnsw {
    /// Neighbours of a vector in a layer, 2 to 100.
    pub m: u32,
    /// Candidates looked at when a vector is added, 4 to 1000; at least twice `m`.
    pub ef_construction: u32,
    /// Candidates looked at in a search, 1 to 1000.
    pub ef_search: u32,
}

impl Default for Hnsw {
    fn default() -> Self {
        Self {
            m: 16,
            ef_construction: 64,
            ef_search: 100,
        }
    }
}

/// What is searched for among the vectors of a model.
#[derive(Clone, Debug, Default)]
pub struct Search<'a> {
    /// Whose vectors.
    pub model: &'a str,
    /// Of the dimensions of the schema.
    pub vector: &'a [f32],
    /// How many at most.
    pub limit: u32,
    /// Of these maps alone; absent: of all.
    pub maps: Option<&'a [String]>,
    /// Of these types alone; none: of all.
    pub types: &'a [i16],
    /// Whose paths begin so; absent: all.
    pub prefix: Option<&'a str>,
    /// Received from then on.
    pub since: Option<SystemTime>,
    /// Received before.
    pub until: Option<SystemTime>,
}

/// A text that lies near.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// What it is of.
    pub path: String,
    /// Which operation, in its stream.
    pub stream_sequence: u64,
    /// By number.
    pub data_type: i16,
    /// Where it happened; may be empty.
    pub map: String,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// When the hub received it, milliseconds since 1970.
    pub received_at_ms: u64,
    /// The text, its first thousand letters.
    pub text: String,
    /// JSON: what the payload has besides, if that is short.
    pub metadata: Option<String>,
    /// Cosine, -1 to 1.
    pub similarity: f32,
}

impl Found {
    fn of(row: &Row) -> Self {
        let received_at: SystemTime = row.get(5);
        let since_1970 = received_at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        #[expect(clippy::cast_possible_truncation, reason = "between -1 and 1")]
        let similarity = (1.0 - row.get::<_, f64>(8)).clamp(-1.0, 1.0) as f32;
        Self {
            path: row.get(0),
            stream_sequence: unsigned(row.get(1)),
            data_type: row.get(2),
            map: row.get(3),
            account_id: u32::try_from(row.get::<_, i64>(4)).unwrap_or_default(),
            received_at_ms: u64::try_from(since_1970.as_millis()).unwrap_or_default(),
            text: row.get(6),
            metadata: row.get(7),
            similarity,
        }
    }
}

/// The vectors that there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    /// Whose they are; absent before the first.
    pub model: Option<String>,
    /// Numbers in each.
    pub dimensions: u32,
    /// How many there are.
    pub vectors: u64,
}

impl Space {
    /// What whoever set other dimensions is told: `EMBEDDINGS_MISMATCH`.
    pub fn other_dimensions(&self, dimensions: usize) -> Problem {
        let sentence = format!(
            "the schema has vectors of {} dimensions, and embedding_dimensions says {dimensions}: set it to {0}, or run \
             `p2p-sync-proxy schema reembed`, which makes them anew",
            self.dimensions
        );
        Problem::new(Code::EmbeddingsMismatch, sentence)
    }
}

impl Store {
    /// What lies nearest to a vector, the nearest first; `None` where the vectors are of another model.
    pub async fn search_embeddings(&self, search: &Search<'_>) -> Result<Option<Vec<Found>>, Problem> {
        let limit = i64::from(search.limit);
        let mut values: Vec<&(dyn ToSql + Sync)> = vec![&search.vector, &limit, &search.model];
        let mut filters = String::new();
        let mut add = |filter: &str, value| {
            values.push(value);
            filters += &filter.replace('?', &format!("${}", values.len()));
        };
        if let Some(maps) = &search.maps {
            add(" AND map = ANY (?)", maps);
        }
        if !search.types.is_empty() {
            add(" AND data_type = ANY (?)", &search.types);
        }
        if let Some(prefix) = &search.prefix {
            add(" AND starts_with(path, ?)", prefix);
        }
        if let Some(since) = &search.since {
            add(" AND received_at >= ?", since);
        }
        if let Some(until) = &search.until {
            add(" AND received_at < ?", until);
        }
        // The model is asked for once, before the first row.
        let sql = format!(
            "SELECT path, stream_sequence, data_type, map, account_id, received_at, left(content, {TOLD_LETTERS}), \
                metadata::text, embedding <=> $1::real[]::halfvec \
            FROM p2p_sync.embeddings WHERE (SELECT model FROM p2p_sync.embedding_space) = $3{filters} \
            ORDER BY embedding <=> $1::real[]::halfvec LIMIT $2"
        );
        let found = self.embedding_rows(&sql, &values).await?;
        if found.is_empty() && self.embedding_model().await?.is_some_and(|model| model != search.model) {
            return Ok(None);
        }
        Ok(Some(found.iter().map(Found::of).collect()))
    }

    /// The maps whose lease a host has.
    pub async fn maps_of(&self, host_id: Uuid) -> Result<Vec<String>, Problem> {
        const HELD: &str = "SELECT map FROM p2p_sync.host_assignments WHERE host_id = $1 ORDER BY map";
        let rows = self.embedding_rows(HELD, &[&host_id]).await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    async fn embedding_model(&self) -> Result<Option<String>, Problem> {
        let rows = self
            .embedding_rows("SELECT model FROM p2p_sync.embedding_space", &[])
            .await?;
        rows.first().map(|row| row.get(0)).ok_or_else(not_answering)
    }

    /// What vectors there are.
    pub async fn embedding_space(&self) -> Result<Space, Problem> {
        const SPACE: &str = "SELECT model, \
                (SELECT atttypmod FROM pg_attribute WHERE attrelid = 'p2p_sync.embeddings'::regclass AND attname = 'embedding'), \
                (SELECT count(*) FROM p2p_sync.embeddings) \
            FROM p2p_sync.embedding_space";
        let rows = self.embedding_rows(SPACE, &[]).await?;
        let row = rows.first().ok_or_else(not_answering)?;
        Ok(Space {
            model: row.get(0),
            dimensions: u32::try_from(row.get::<_, i32>(1)).unwrap_or_default(),
            vectors: unsigned(row.get(2)),
        })
    }

    /// Has the vectors be a model's from now on, unless they are another's already.
    ///
    /// Errors: `EMBEDDINGS_MISMATCH`, with what to do; `HUB_UNAVAILABLE`.
    pub async fn take_embedding_space(&self, model: &str, dimensions: usize) -> Result<(), Problem> {
        const TAKE: &str = "UPDATE p2p_sync.embedding_space SET model = $1 \
            WHERE model IS DISTINCT FROM $1 AND NOT EXISTS (SELECT FROM p2p_sync.embeddings)";
        let space = self.embedding_space().await?;
        if usize::try_from(space.dimensions) != Ok(dimensions) {
            return Err(space.other_dimensions(dimensions));
        }
        self.embedding_change(TAKE, &[&model]).await?;
        match self.embedding_model().await? {
            Some(found) if found != model => {
                let sentence = format!(
                    "the schema has vectors of the model {found}, and the settings name {model}, whose do not compare with \
                     them: set the former one, or run `p2p-sync-proxy schema reembed`, which makes them anew"
                );
                Err(Problem::new(Code::EmbeddingsMismatch, sentence))
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn embedding_client(&self) -> Result<Object, Problem> {
        let pool = self.inner.pools.embeddings().await;
        pool.map_err(|error| no_connection(&error))
    }

    pub(super) async fn embedding_rows(&self, sql: &str, values: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Problem> {
        query(&self.embedding_client().await?, sql, values).await
    }

    pub(super) async fn embedding_change(
        &self,
        sql: &str,
        values: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Problem> {
        let rows = self.embedding_rows(sql, values).await?;
        self.inner.pools.make_durable().await?;
        Ok(rows)
    }
}
