//! What tools keep among the embeddings under ids of their own: rows that no operation is behind.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use p2p_sync_proto::{Code, Problem, path::HUB_EMBEDDINGS, v1::SyncDataType};

use super::{Store, not_answering};

/// What is kept under an id.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry<'a> {
    /// By the tool; checked.
    pub id: &'a str,
    /// On whose map it is found; empty: on none.
    pub map: &'a str,
    /// Empty where there is a vector alone.
    pub text: &'a str,
    /// Of the text, or where a tool gave the vector of both: no other text takes over what a tool made.
    pub hash: &'a [u8],
    /// JSON.
    pub metadata: Option<&'a str>,
    /// Of length 1, of the dimensions of the schema.
    pub vector: &'a [f32],
}

/// What was found under an id.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// On whose map it is found; may be empty.
    pub map: String,
    /// The whole text; empty where a tool gave a vector alone.
    pub text: String,
    /// JSON.
    pub metadata: Option<String>,
    /// In half precision.
    pub vector: Vec<f32>,
    /// Whose the vector is.
    pub model: String,
    /// When it was put, milliseconds since 1970.
    pub put_at_ms: u64,
}

impl Store {
    /// Keeps something under an id, in the place of what was there; gives whether nothing was.
    ///
    /// Errors: `EMBEDDINGS_UNAVAILABLE` while the schema's vectors are another model's or being made anew.
    pub async fn put_entry(&self, model: &str, entry: &NewEntry<'_>) -> Result<bool, Problem> {
        const PUT: &str = "SELECT p2p_sync.put_entry($1, $2, $3, $4, $5, $6, $7::text::jsonb, $8)";
        let data_type = SyncDataType::VectorEmbedding as i16;
        let rows = self
            .embedding_change(
                PUT,
                &[
                    &model,
                    &path(entry.id),
                    &data_type,
                    &entry.map,
                    &entry.text,
                    &entry.hash,
                    &entry.metadata,
                    &entry.vector,
                ],
            )
            .await?;
        let row = rows.first().ok_or_else(not_answering)?;
        match row.get::<_, i16>(0) {
            verdict @ (0 | 1) => Ok(verdict == 1),
            2 => Err(Problem::new(
                Code::EmbeddingsUnavailable,
                "the hub's vectors are of a new model, and this proxy is still set to the one before: ask again later",
            )),
            _ => Err(Problem::new(
                Code::EmbeddingsUnavailable,
                "the hub's vectors are being made anew, and nothing is put until that is done: ask again later",
            )),
        }
    }

    /// What is kept under an id.
    pub async fn entry(&self, id: &str) -> Result<Option<Entry>, Problem> {
        const ENTRY: &str = "SELECT map, content, metadata::text, embedding::real[], \
                (SELECT model FROM p2p_sync.embedding_space), received_at \
            FROM p2p_sync.embeddings WHERE path = $1 AND entry = 0";
        let rows = self.embedding_rows(ENTRY, &[&path(id)]).await?;
        Ok(rows.first().map(|row| {
            let put_at: SystemTime = row.get(5);
            let since_1970 = put_at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
            Entry {
                map: row.get(0),
                text: row.get(1),
                metadata: row.get(2),
                vector: row.get(3),
                model: row.get::<_, Option<String>>(4).unwrap_or_default(),
                put_at_ms: u64::try_from(since_1970.as_millis()).unwrap_or_default(),
            }
        }))
    }

    /// Deletes what is kept under an id; gives whether there was anything.
    pub async fn delete_entry(&self, id: &str) -> Result<bool, Problem> {
        const DELETE: &str = "DELETE FROM p2p_sync.embeddings WHERE path = $1 RETURNING path";
        let rows = self.embedding_change(DELETE, &[&path(id)]).await?;
        Ok(!rows.is_empty())
    }
}

fn path(id: &str) -> String {
    format!("{HUB_EMBEDDINGS}{id}")
}
