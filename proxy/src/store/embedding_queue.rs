//! What waits to be embedded: rows that are written with their operations, and taken by one proxy at a time.
//!
//! A row is taken by setting the time at which it is due ahead. Nobody holds a lock on it while the provider is asked, and a
//! proxy that dies leaves it to be taken again.

use std::time::{Duration, SystemTime};

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use super::{Store, call::code_of, not_answering, signed, unsigned};

/// The dead letters that a status shows.
const DEAD_SHOWN_MAX: i64 = 20;
/// Edited paths that are looked at in one go.
const EDITS_MAX: i64 = 1000;

/// Whose operations are embedded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum EligibleMaps {
    /// Nobody's.
    #[default]
    None,
    /// All maps'.
    All,
    /// Of these, in order.
    Some(Vec<String>),
}

impl EligibleMaps {
    /// Whether what happens on a map is embedded; of what happened nowhere the name is empty.
    pub fn has(&self, map: &str) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Some(maps) => maps.binary_search_by(|known| known.as_str().cmp(map)).is_ok(),
        }
    }

    /// As SQL takes it: NULL for all.
    fn list(&self) -> Option<Vec<&str>> {
        match self {
            Self::None => Some(Vec::new()),
            Self::All => None,
            Self::Some(maps) => Some(maps.iter().map(String::as_str).collect()),
        }
    }
}

/// A row of the queue that was taken.
#[derive(Clone, Debug)]
pub struct Claim {
    /// What it is of.
    pub path: String,
    /// As the table has it: 0, or the operation's number where its type is kept as `every`.
    pub entry: i64,
    /// Up to which operation it was taken.
    pub claimed: i64,
    /// How often its text failed.
    pub attempts: i32,
    /// Absent where the state is gone.
    pub of: Option<Source>,
}

/// What a text is taken from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The operation's number in its stream.
    pub stream_sequence: i64,
    /// By number.
    pub data_type: i16,
    /// Where it happened; may be empty.
    pub map: String,
    /// Whom it is about; 0 for nobody.
    pub account_id: i64,
    /// When the hub received it.
    pub received_at: SystemTime,
    /// JSON.
    pub payload: String,
}

/// A claim with its text and vector.
#[derive(Clone, Debug)]
pub struct Embedded<'a> {
    /// What was taken.
    pub claim: &'a Claim,
    /// What was embedded; none where there is nothing to embed.
    pub content: Option<Content<'a>>,
}

/// A text that was embedded.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// The text.
    pub text: &'a str,
    /// SHA-256 of its UTF-8.
    pub hash: &'a [u8],
    /// JSON: what the payload has besides.
    pub metadata: Option<&'a str>,
    /// Of the dimensions of the schema.
    pub vector: &'a [f32],
}

/// A claim that goes back into the queue.
#[derive(Clone, Debug)]
pub struct Release<'a> {
    /// What was taken.
    pub claim: &'a Claim,
    /// When it is tried again.
    pub after: Duration,
    /// It failed for its own text, and why; with a code it is not tried again by itself.
    pub failure: Option<(Option<Code>, String)>,
}

/// How much waits, and what went wrong.
#[derive(Clone, Debug, Default)]
pub struct QueueStatus {
    /// Rows that are to be embedded.
    pub waiting: u64,
    /// Since when the oldest of them waits.
    pub oldest: Option<SystemTime>,
    /// Rows that are not tried any more.
    pub dead: u64,
    /// Some of those: path, code and reason.
    pub dead_letters: Vec<(String, Code, String)>,
    /// What hosts and the queue (the nil UUID) have spent today, in tokens.
    pub spent: Vec<(Uuid, u64)>,
}

/// What became of tokens that somebody wanted to spend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spent {
    /// They are spent.
    Yes,
    /// The message that wants them has been taken before.
    Replay,
    /// So many are left today.
    TooMany(u64),
}

impl Store {
    /// Takes what is due, at most `limit` rows, for so long.
    pub async fn claim_embeddings(
        &self,
        maps: &EligibleMaps,
        limit: usize,
        lease: Duration,
    ) -> Result<Vec<Claim>, Problem> {
        const CLAIM: &str = "SELECT * FROM p2p_sync.claim_embeddings($1, $2, make_interval(secs => $3))";
        let limit = i32::try_from(limit).unwrap_or(i32::MAX);
        let rows = self
            .embedding_change(CLAIM, &[&maps.list(), &limit, &lease.as_secs_f64()])
            .await?;
        let of = |row: &tokio_postgres::Row| Claim {
            path: row.get("path"),
            entry: row.get("entry"),
            claimed: row.get("claimed"),
            attempts: row.get("attempts"),
            of: row.get::<_, Option<i16>>("data_type").map(|data_type| Source {
                stream_sequence: row.get("stream_sequence"),
                data_type,
                map: row.get("map"),
                account_id: row.get("account_id"),
                received_at: row.get("received_at"),
                payload: row.get("payload"),
            }),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// The vectors of texts that were embedded before, by the texts' hashes.
    pub async fn known_vectors(&self, hashes: &[&[u8]]) -> Result<Vec<(Vec<u8>, Vec<f32>)>, Problem> {
        const KNOWN: &str = "SELECT DISTINCT ON (content_hash) content_hash, embedding::real[] FROM p2p_sync.embeddings \
            WHERE content_hash = ANY ($1) ORDER BY content_hash";
        let rows = self.embedding_rows(KNOWN, &[&hashes]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Writes what was embedded by a model and takes it out of the queue. False, and nothing is written, where the
    /// schema's vectors are of another model by now.
    pub async fn store_embeddings(
        &self,
        model: &str,
        dimensions: usize,
        embedded: &[Embedded<'_>],
    ) -> Result<bool, Problem> {
        const STORE: &str = "SELECT p2p_sync.store_embeddings($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, \
            $13::text[]::jsonb[], $14, $15)";
        let mut vectors: Vec<f32> = Vec::new();
        let mut vector_of = Vec::new();
        for one in embedded {
            vector_of.push(one.content.map_or(0, |content| {
                vectors.extend_from_slice(content.vector);
                i32::try_from(vectors.len() / dimensions).unwrap_or_default()
            }));
        }
        let dimensions = i32::try_from(dimensions).unwrap_or_default();
        let claims = || embedded.iter().map(|one| one.claim);
        let sources = || claims().map(|claim| claim.of.as_ref());
        let contents = || embedded.iter().map(|one| one.content);
        let rows = self
            .embedding_change(
                STORE,
                &[
                    &model,
                    &dimensions,
                    &claims().map(|claim| claim.path.as_str()).collect::<Vec<_>>(),
                    &claims().map(|claim| claim.entry).collect::<Vec<_>>(),
                    &claims().map(|claim| claim.claimed).collect::<Vec<_>>(),
                    &sources().map(|of| of.map(|of| of.stream_sequence)).collect::<Vec<_>>(),
                    &sources().map(|of| of.map(|of| of.data_type)).collect::<Vec<_>>(),
                    &sources().map(|of| of.map(|of| of.map.as_str())).collect::<Vec<_>>(),
                    &sources().map(|of| of.map(|of| of.account_id)).collect::<Vec<_>>(),
                    &sources().map(|of| of.map(|of| of.received_at)).collect::<Vec<_>>(),
                    &contents().map(|c| c.map(|c| c.text)).collect::<Vec<_>>(),
                    &contents().map(|c| c.map(|c| c.hash)).collect::<Vec<_>>(),
                    &contents().map(|c| c.and_then(|c| c.metadata)).collect::<Vec<_>>(),
                    &vector_of,
                    &vectors,
                ],
            )
            .await?;
        let row = rows.first().ok_or_else(not_answering)?;
        Ok(row.get::<_, Option<i64>>(0).is_some())
    }

    /// Puts rows back that were taken and not embedded.
    pub async fn release_embeddings(&self, released: &[Release<'_>]) -> Result<(), Problem> {
        const RELEASE: &str = "SELECT p2p_sync.release_embeddings($1, $2, $3, $4, $5, $6, $7)";
        let failures = || released.iter().map(|one| one.failure.as_ref());
        let attempts = released
            .iter()
            .map(|one| one.claim.attempts.saturating_add(i32::from(one.failure.is_some())));
        self.embedding_change(
            RELEASE,
            &[
                &released.iter().map(|one| one.claim.path.as_str()).collect::<Vec<_>>(),
                &released.iter().map(|one| one.claim.entry).collect::<Vec<_>>(),
                &released.iter().map(|one| one.claim.claimed).collect::<Vec<_>>(),
                &released
                    .iter()
                    .map(|one| i64::try_from(one.after.as_millis()).unwrap_or(i64::MAX))
                    .collect::<Vec<_>>(),
                &attempts.collect::<Vec<_>>(),
                &failures()
                    .map(|failure| failure.and_then(|(code, _)| code.map(|code| code as i32)))
                    .collect::<Vec<_>>(),
                &failures()
                    .map(|failure| failure.map(|(_, reason)| reason.as_str()))
                    .collect::<Vec<_>>(),
            ],
        )
        .await
        .map(drop)
    }

    /// Spends tokens of a spender's budget of today; `None` has no bound. A host's message is named by its position, and is
    /// taken once.
    pub async fn spend_embedding_tokens(
        &self,
        spender: Uuid,
        tokens: u64,
        limit: Option<u64>,
        message: Option<p2p_sync_proto::Position>,
    ) -> Result<Spent, Problem> {
        self.spend(spender, signed(tokens), limit, message).await
    }

    /// Gives tokens back for which nothing came.
    pub async fn give_back_embedding_tokens(&self, spender: Uuid, tokens: u64) -> Result<(), Problem> {
        self.spend(spender, -signed(tokens), None, None).await.map(drop)
    }

    async fn spend(
        &self,
        spender: Uuid,
        tokens: i64,
        limit: Option<u64>,
        message: Option<p2p_sync_proto::Position>,
    ) -> Result<Spent, Problem> {
        const SPEND: &str = "SELECT verdict, tokens_left FROM p2p_sync.spend_embedding_tokens($1, $2, $3, $4, $5)";
        let incarnation = message.map(|position| signed(position.incarnation));
        let sequence = message.map(|position| signed(position.sequence));
        let rows = self
            .embedding_change(SPEND, &[&spender, &tokens, &limit.map(signed), &incarnation, &sequence])
            .await?;
        let row = rows.first().ok_or_else(not_answering)?;
        Ok(match row.get::<_, i16>(0) {
            0 => Spent::Yes,
            1 => Spent::Replay,
            _ => Spent::TooMany(unsigned(row.get::<_, Option<i64>>(1).unwrap_or_default())),
        })
    }

    /// Has what the operator edited since an edit embedded, where it is of those maps and types; gives the last edit that
    /// there was.
    pub async fn enqueue_edits(&self, after: u64, maps: &EligibleMaps, types: &[i16]) -> Result<u64, Problem> {
        const EDITED: &str = "SELECT path, hub_edit, ($2::text[] IS NULL OR map = ANY ($2)) AND data_type = ANY ($3) \
            FROM p2p_sync.states WHERE hub_edit > $1 AND hub_edit > 0 ORDER BY hub_edit LIMIT $4";
        let (_, last) = self.pulse().await?;
        let mut seen = signed(after);
        while unsigned(seen) < last {
            let rows = self
                .embedding_rows(EDITED, &[&seen, &maps.list(), &types, &EDITS_MAX])
                .await?;
            for row in &rows {
                if row.get(2) {
                    let path: &str = row.get(0);
                    self.embedding_change("SELECT p2p_sync.enqueue_embedding_of($1)", &[&path])
                        .await?;
                }
                seen = row.get(1);
            }
            if rows.len() < usize::try_from(EDITS_MAX).unwrap_or_default() {
                break;
            }
        }
        Ok(last.max(after))
    }

    /// Has everything embedded that is stored of maps and types and is not yet: the states, and the log of types kept as
    /// `every`. For maps that were not eligible when it came. Gives how many rows were queued.
    pub async fn fill_embeddings(&self, maps: &EligibleMaps, types: &[i16]) -> Result<u64, Problem> {
        const FILL: &str = "WITH missing AS ( \
                SELECT s.path, 0 AS entry, s.stream, s.stream_sequence, s.map FROM p2p_sync.states AS s \
                    WHERE NOT s.deleted AND NOT s.keeps_every AND s.data_type = ANY ($2) AND ($1::text[] IS NULL OR s.map = ANY ($1)) \
                UNION ALL SELECT l.path, l.stream_sequence, l.stream, l.stream_sequence, l.map FROM p2p_sync.operations AS l \
                    JOIN p2p_sync.states AS s ON s.path = l.path AND NOT s.deleted \
                    WHERE NOT l.deleted AND l.keeps_every AND l.data_type = ANY ($2) AND ($1::text[] IS NULL OR l.map = ANY ($1)) \
            ), queued AS (INSERT INTO p2p_sync.embedding_queue (path, entry, stream, stream_sequence, first_sequence, map) \
                SELECT m.path, m.entry, m.stream, m.stream_sequence, m.stream_sequence, m.map FROM missing AS m \
                    WHERE NOT EXISTS (SELECT FROM p2p_sync.embeddings AS e \
                        WHERE e.path = m.path AND e.entry = m.entry AND e.stream_sequence >= m.stream_sequence) \
                    ORDER BY m.path COLLATE \"C\", m.entry \
                ON CONFLICT DO NOTHING RETURNING 1) \
            SELECT count(*) FROM queued";
        let rows = self.embedding_change(FILL, &[&maps.list(), &types]).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// Has dead letters tried again; gives how many.
    pub async fn retry_embeddings(&self) -> Result<u64, Problem> {
        const RETRY: &str = "WITH dead AS (UPDATE p2p_sync.embedding_queue \
                SET dead_code = NULL, reason = NULL, attempts = 0, due_at = now() WHERE dead_code IS NOT NULL RETURNING 1) \
            SELECT count(*) FROM dead";
        let rows = self.embedding_change(RETRY, &[]).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// Forgets the vectors of a map, of a path, or with neither of everything, and what of it waits; gives how many vectors
    /// went. What is written from then on is embedded as before. What tools keep goes by its path alone, for nothing else has it.
    pub async fn forget_embeddings(&self, map: Option<&str>, path: Option<&str>) -> Result<u64, Problem> {
        const FORGET: &str = "WITH queued AS (DELETE FROM p2p_sync.embedding_queue \
                WHERE map = coalesce($1, map) AND path = coalesce($2, path)), \
            gone AS (DELETE FROM p2p_sync.embeddings \
                WHERE map = coalesce($1, map) AND path = coalesce($2, path) \
                    AND ($2 IS NOT NULL OR NOT starts_with(path, '@hub/')) RETURNING 1) \
            SELECT count(*) FROM gone";
        let rows = self.embedding_change(FORGET, &[&map, &path]).await?;
        rows.first().map(|row| unsigned(row.get(0))).ok_or_else(not_answering)
    }

    /// How the queue is.
    pub async fn embedding_queue(&self) -> Result<QueueStatus, Problem> {
        const COUNT: &str = "SELECT count(*) FILTER (WHERE dead_code IS NULL), \
                min(queued_at) FILTER (WHERE dead_code IS NULL), count(*) FILTER (WHERE dead_code IS NOT NULL) \
            FROM p2p_sync.embedding_queue";
        const DEAD: &str = "SELECT path, dead_code, coalesce(reason, '') FROM p2p_sync.embedding_queue \
            WHERE dead_code IS NOT NULL ORDER BY queued_at, path LIMIT $1";
        const SPENT: &str = "SELECT spender, tokens FROM p2p_sync.embedding_spend \
            WHERE day = (now() AT TIME ZONE 'UTC')::date AND tokens > 0 ORDER BY tokens DESC LIMIT 1000";
        let counts = self.embedding_rows(COUNT, &[]).await?;
        let counts = counts.first().ok_or_else(not_answering)?;
        let dead = self.embedding_rows(DEAD, &[&DEAD_SHOWN_MAX]).await?;
        let spent = self.embedding_rows(SPENT, &[]).await?;
        Ok(QueueStatus {
            waiting: unsigned(counts.get(0)),
            oldest: counts.get(1),
            dead: unsigned(counts.get(2)),
            dead_letters: dead
                .iter()
                .map(|row| (row.get(0), code_of(row.get(1)), row.get(2)))
                .collect(),
            spent: spent.iter().map(|row| (row.get(0), unsigned(row.get(1)))).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobodys_operations_are_embedded_unless_the_operator_says_whose() {
        let some = EligibleMaps::Some(vec!["geffen".to_owned(), "prontera".to_owned()]);
        let has = |maps: &EligibleMaps| ["geffen", "payon", "prontera", ""].map(|map| maps.has(map));
        assert_eq!(has(&EligibleMaps::default()), [false; 4]);
        assert_eq!(has(&EligibleMaps::All), [true; 4]);
        assert_eq!(has(&some), [true, false, true, false]);
    }
}
