//! Vectors for whoever asks: a text's, and what lies nearest to one; within the rights and the budget of who asks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use p2p_sync_proto::{
    Code, Position, Problem,
    limits::{HITS_MAX, PATH_BYTES_MAX},
    path::{check_entity, check_map},
    v1::SyncDataType,
};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    EmbedError, Embedder, checked,
    text::{METADATA_BYTES_MAX, tokens},
    turns::Turns,
};
use crate::{
    operation::Valid,
    store::{EligibleMaps, Entry, Found, NewEntry, Search, Spent, Store},
    validate::types_file::Rules,
};

/// Calls of the provider for hosts and tools at one time, and those of either at most.
const CALLS_MAX: usize = 16;
const CALLS_EACH_MAX: usize = 12;
/// Searches at one time: one connection fewer than there are for vectors, for what waits to be embedded goes on.
const SEARCHES_MAX: usize = 3;
const SEARCHES_EACH_MAX: usize = 2;
/// Who the tools' tokens are counted for.
pub const TOOLS_SPENDER: Uuid = Uuid::max();
/// Later than any time that is asked for, and within what Postgres counts: the end of the year 9999.
const LAST_MS: u64 = 253_402_300_799_999;

/// What is embedded, and for how much.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Maps whose operations are embedded.
    pub eligible: EligibleMaps,
    /// Of what waits in the queue, a day (UTC); absent: without a bound.
    pub queue_tokens: Option<u64>,
    /// Of each host's own calls, a day; 0: hosts may not call.
    pub host_tokens: u64,
    /// Of all tools together, a day; absent: without a bound.
    pub tool_tokens: Option<u64>,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Caller {
    /// The operator: sees everything and has no budget.
    Operator,
    /// A tool, by the admin listener's token: sees everything.
    Tool,
    /// A host, by a message whose seal has proven its position.
    Host {
        /// Who.
        host_id: Uuid,
        /// Of the message: taken once where it costs something.
        position: Position,
    },
}

/// What to look near.
#[derive(Clone, Debug, PartialEq)]
pub enum Near {
    /// A text, which is embedded first.
    Text(String),
    /// A vector of the hub's own model.
    Vector(Vec<f32>),
}

/// What is searched for.
#[derive(Clone, Debug)]
pub struct Query {
    /// What to look near.
    pub near: Near,
    /// How many hits at most; 0, and more than there may be, are as many as there may be.
    pub limit: u32,
    /// On these maps alone; none: on all that the caller sees.
    pub maps: Vec<String>,
    /// Of these types alone; none: of all.
    pub types: Vec<SyncDataType>,
    /// Whose paths begin so; absent: all.
    pub prefix: Option<String>,
    /// Received from then on, milliseconds since 1970; 0: from the beginning.
    pub since_ms: u64,
    /// Received before, milliseconds since 1970; 0: to the end.
    pub until_ms: u64,
    /// Hits that are less similar are left out.
    pub similarity_min: Option<f32>,
}

impl Query {
    /// Everything near to something.
    pub fn near(near: Near) -> Self {
        Self {
            near,
            limit: 0,
            maps: Vec::new(),
            types: Vec::new(),
            prefix: None,
            since_ms: 0,
            until_ms: 0,
            similarity_min: None,
        }
    }
}

/// What a tool wants to keep under an id of its own.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// Embedded, unless there is a vector.
    pub text: Option<String>,
    /// Of the hub's own model.
    pub vector: Option<Vec<f32>>,
    /// On whose map it is found; empty: on none, so that no host finds it where leases govern.
    pub map: String,
    /// A JSON object.
    pub metadata: Option<String>,
}

/// The hub's embeddings.
#[derive(Debug)]
pub struct Embeddings {
    embedder: Option<Embedder>,
    pub(super) limits: Limits,
    pub(super) wake: Notify,
    calls: Turns,
    searches: Turns,
}

impl Embeddings {
    /// By a provider; none: embeddings are off.
    pub fn new(embedder: Option<Embedder>, limits: Limits) -> Self {
        Self {
            embedder,
            limits,
            wake: Notify::new(),
            calls: Turns::new(CALLS_MAX, CALLS_EACH_MAX),
            searches: Turns::new(SEARCHES_MAX, SEARCHES_EACH_MAX),
        }
    }

    /// Who makes vectors.
    pub fn embedder(&self) -> Option<&Embedder> {
        self.embedder.as_ref()
    }

    /// Notes which operations of a message are to be embedded: of eligible maps, and of types that say what of them.
    pub fn mark(&self, rules: &Rules, valid: &mut Valid) {
        if self.limits.eligible == EligibleMaps::None || self.embedder.is_none() {
            return;
        }
        for op in &mut valid.ops {
            op.embedded = !rules.of(op.data_type).embedded.is_empty() && self.limits.eligible.has(&op.map);
        }
    }

    /// Says that something was queued, so that it is embedded at once.
    pub fn queued(&self, valid: &Valid) {
        if valid.ops.iter().any(|op| op.embedded) {
            self.wake.notify_one();
        }
    }

    /// The vectors of texts, in their order, each of length 1.
    ///
    /// Errors: `UNSUPPORTED` where embeddings are off; `NOT_ALLOWED`, `REPLAY` and `BUDGET_SPENT` of hosts; `EMPTY_TEXT`,
    /// `TEXT_TOO_LONG`, `TOO_LARGE`, `TEXT_REFUSED`; `RATE_LIMITED` and `EMBEDDINGS_UNAVAILABLE` of the provider.
    pub async fn create(&self, store: &Store, caller: Caller, texts: &[String]) -> Result<Vec<Vec<f32>>, Problem> {
        let embedder = self.allowed(caller)?;
        embedder.bounds().check(texts).map_err(|error| error.for_caller())?;
        self.embed(embedder, store, caller, texts).await
    }

    /// What lies nearest, the nearest first. A host sees what happened on the maps that it holds, where leases govern.
    ///
    /// Errors: as [`Self::create`]; `WRONG_DIMENSIONS` and `NOT_FINITE` of a vector, `BAD_REQUEST` and `BAD_MAP` of filters,
    /// `NOT_ALLOWED` of a map that is not the host's.
    pub async fn search(&self, store: &Store, caller: Caller, query: Query) -> Result<Vec<Found>, Problem> {
        let embedder = self.allowed(caller)?;
        check_filters(&query)?;
        if let Near::Vector(vector) = &query.near {
            check_vector(vector, embedder.dimensions())?;
        }
        let maps = visible(store, caller, query.maps).await?;
        if maps.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Vec::new());
        }
        let vector = match query.near {
            Near::Vector(vector) => vector,
            Near::Text(text) => {
                let texts = [text];
                embedder.bounds().check(&texts).map_err(|error| error.for_caller())?;
                let vectors = self.embed(embedder, store, caller, &texts).await?;
                vectors.into_iter().next().unwrap_or_default()
            }
        };
        let types: Vec<i16> = query.types.iter().map(|data_type| *data_type as i16).collect();
        let search = Search {
            model: embedder.model(),
            vector: &vector,
            limit: if query.limit == 0 {
                HITS_MAX
            } else {
                query.limit.min(HITS_MAX)
            },
            maps: maps.as_deref(),
            types: &types,
            prefix: query.prefix.as_deref(),
            since: time(query.since_ms),
            until: time(query.until_ms),
        };
        let _turn = self.searches.take(caller).await;
        let mut found = store.search_embeddings(&search).await?.ok_or_else(other_model)?;
        if let Some(least) = query.similarity_min {
            found.retain(|hit| hit.similarity >= least);
        }
        Ok(found)
    }

    fn allowed(&self, caller: Caller) -> Result<&Embedder, Problem> {
        let embedder = self.embedder.as_ref().ok_or_else(|| {
            let sentence = "this hub serves no embeddings: do without them, or ask its operator";
            Problem::new(Code::Unsupported, sentence)
        })?;
        if matches!(caller, Caller::Host { .. }) && self.limits.host_tokens == 0 {
            let sentence =
                "hosts may not ask for embeddings here: ask the hub's operator (embedding_host_tokens_per_day)";
            return Err(Problem::new(Code::NotAllowed, sentence));
        }
        Ok(embedder)
    }

    /// Embeds texts that are within the bounds, at the caller's cost.
    async fn embed(
        &self,
        embedder: &Embedder,
        store: &Store,
        caller: Caller,
        texts: &[String],
    ) -> Result<Vec<Vec<f32>>, Problem> {
        let cost: u64 = texts.iter().map(|text| tokens(text)).sum();
        self.pay(store, caller, cost).await?;
        let _turn = self.calls.take(caller).await;
        let vectors = embedder.embed(texts).await;
        if let (Err(_), Some(spender)) = (&vectors, caller.spender()) {
            // Nothing came for it.
            if let Err(problem) = store.give_back_embedding_tokens(spender, cost).await {
                tracing::warn!(%problem, %spender, "tokens stay spent for which nothing came");
            }
        }
        vectors.map_err(|error| told(&error, caller))
    }

    /// Has a caller pay for texts before they are asked for.
    async fn pay(&self, store: &Store, caller: Caller, cost: u64) -> Result<(), Problem> {
        let (limit, message, whose) = match caller {
            Caller::Operator => return Ok(()),
            Caller::Tool => (self.limits.tool_tokens, None, "the tools'"),
            Caller::Host { position, .. } if position.incarnation == 0 => {
                let sentence =
                    "what costs something is numbered by the outbox that it comes from: send it through an agent";
                return Err(Problem::new(Code::BadRequest, sentence));
            }
            Caller::Host { position, .. } => (Some(self.limits.host_tokens), Some(position), "this host's"),
        };
        let spender = caller.spender().unwrap_or_default();
        match store.spend_embedding_tokens(spender, cost, limit, message).await? {
            Spent::Yes => Ok(()),
            Spent::Replay => {
                let sentence = "this request was taken before, or many newer ones were: seal it anew";
                Err(Problem::new(Code::Replay, sentence))
            }
            Spent::TooMany(left) => {
                let limit = limit.unwrap_or_default();
                let sentence = format!(
                    "this takes {cost} tokens, and {left} of {whose} {limit} a day are left: ask for less, or tomorrow (UTC)"
                );
                Err(Problem::new(Code::BudgetSpent, sentence))
            }
        }
    }

    /// Keeps something of a tool's under an id of its own, in the place of what it had there; gives whether it had nothing.
    ///
    /// Errors: as [`Self::search`]; `BAD_PATH` of an id, `BAD_TEXT`, `TOO_LARGE` and what JSON may be of metadata.
    pub async fn put(&self, store: &Store, id: &str, kept: Kept) -> Result<bool, Problem> {
        let embedder = self.allowed(Caller::Tool)?;
        check_entity(id)?;
        if !kept.map.is_empty() {
            check_map(&kept.map)?;
        }
        check_metadata(kept.metadata.as_deref())?;
        let texts: Vec<String> = kept.text.into_iter().collect();
        embedder.bounds().check(&texts).map_err(|error| error.for_caller())?;
        let text = texts.first().map_or("", String::as_str);
        if text.contains('\0') {
            let sentence = "the text has a NUL in it, which the database does not hold: leave it out";
            return Err(Problem::new(Code::BadText, sentence));
        }
        let mut hash = Sha256::new_with_prefix(text.as_bytes());
        let vector = match kept.vector {
            Some(vector) => {
                check_vector(&vector, embedder.dimensions())?;
                for number in &vector {
                    hash.update(number.to_le_bytes());
                }
                let of_length_1 = checked(vec![vector], 1, embedder.dimensions());
                of_length_1.map_err(|error| error.for_caller())?
            }
            None if texts.is_empty() => {
                let sentence = "give a text, which the hub embeds, or an embedding, or both";
                return Err(Problem::new(Code::BadRequest, sentence));
            }
            None => {
                let of_text: [u8; 32] = hash.clone().finalize().into();
                let known = store.known_vectors(&[of_text.as_slice()]).await?;
                match known.into_iter().next() {
                    Some((_, vector)) if vector.len() == embedder.dimensions() => vec![vector],
                    _ => self.embed(embedder, store, Caller::Tool, &texts).await?,
                }
            }
        };
        let hash: [u8; 32] = hash.finalize().into();
        let entry = NewEntry {
            id,
            map: &kept.map,
            text,
            hash: &hash,
            metadata: kept.metadata.as_deref(),
            vector: vector.first().map_or(&[], Vec::as_slice),
        };
        store.put_entry(embedder.model(), &entry).await
    }

    /// What a tool keeps under an id.
    ///
    /// Errors: `NOT_FOUND`, `BAD_PATH`.
    pub async fn get(&self, store: &Store, id: &str) -> Result<Entry, Problem> {
        check_entity(id)?;
        store.entry(id).await?.ok_or_else(nothing_there)
    }

    /// Deletes what a tool keeps under an id.
    ///
    /// Errors: `NOT_FOUND`, `BAD_PATH`.
    pub async fn delete(&self, store: &Store, id: &str) -> Result<(), Problem> {
        check_entity(id)?;
        let was_there = store.delete_entry(id).await?;
        was_there.then_some(()).ok_or_else(nothing_there)
    }
}

impl Caller {
    /// Whom tokens are counted for; `None`: nobody counts.
    fn spender(&self) -> Option<Uuid> {
        match self {
            Self::Operator => None,
            Self::Tool => Some(TOOLS_SPENDER),
            Self::Host { host_id, .. } => Some(*host_id),
        }
    }
}

fn nothing_there() -> Problem {
    Problem::new(Code::NotFound, "nothing is kept under this id: put it there first")
}

fn told(error: &EmbedError, caller: Caller) -> Problem {
    match caller {
        Caller::Operator => error.for_operator(),
        Caller::Host { .. } | Caller::Tool => {
            tracing::debug!(%error, "a host's or a tool's text was not embedded");
            error.for_caller()
        }
    }
}

/// Which maps a caller searches; `None`: all. Empty: there is nothing for it to see.
async fn visible(store: &Store, caller: Caller, asked: Vec<String>) -> Result<Option<Vec<String>>, Problem> {
    let Caller::Host { host_id, .. } = caller else {
        return Ok(Some(asked).filter(|maps| !maps.is_empty()));
    };
    if !store.leases().required {
        return Ok(Some(asked).filter(|maps| !maps.is_empty()));
    }
    let held = store.maps_of(host_id).await?;
    if let Some(foreign) = asked.iter().find(|map| !held.contains(map)) {
        let sentence =
            format!("a host searches what happened on the maps that it holds, and {foreign} is none of them");
        return Err(Problem::new(Code::NotAllowed, sentence));
    }
    Ok(Some(if asked.is_empty() { held } else { asked }))
}

/// Whether a vector can be compared with those of the hub's model.
fn check_vector(vector: &[f32], dimensions: usize) -> Result<(), Problem> {
    if vector.len() != dimensions {
        let sentence = format!(
            "the embedding has {} numbers, and this hub's have {dimensions}: take one that this hub made",
            vector.len()
        );
        return Err(Problem::new(Code::WrongDimensions, sentence));
    }
    if let Some(place) = vector.iter().position(|x| !x.is_finite()) {
        let what = if vector[place].is_nan() {
            "no number (NaN)"
        } else {
            "infinite"
        };
        let sentence = format!("number {place} of the embedding is {what}: take one that this hub made");
        return Err(Problem::new(Code::NotFinite, sentence));
    }
    if vector.iter().all(|x| *x == 0.0) {
        let sentence = "the embedding is all zeros, so nothing is near to it: take one that this hub made";
        return Err(Problem::new(Code::NotFinite, sentence));
    }
    Ok(())
}

fn check_filters(query: &Query) -> Result<(), Problem> {
    /// A host holds no more.
    const MAPS_MAX: usize = 1024;
    let bad = |sentence: String| Err(Problem::new(Code::BadRequest, sentence));
    if query.maps.len() > MAPS_MAX {
        return bad(format!(
            "a search names at most {MAPS_MAX} maps: leave them out to search all"
        ));
    }
    query.maps.iter().try_for_each(|map| check_map(map))?;
    if query
        .prefix
        .as_ref()
        .is_some_and(|prefix| prefix.len() > PATH_BYTES_MAX || prefix.contains('\0'))
    {
        return bad(format!("a prefix has at most {PATH_BYTES_MAX} bytes, and no NUL"));
    }
    if query.similarity_min.is_some_and(|least| !(-1.0..=1.0).contains(&least)) {
        return bad("the least similarity is a number from -1 to 1".to_owned());
    }
    Ok(())
}

/// As small as what is kept beside an operation's text, and such that the database holds it.
fn check_metadata(metadata: Option<&str>) -> Result<(), Problem> {
    let Some(metadata) = metadata else {
        return Ok(());
    };
    if metadata.len() > METADATA_BYTES_MAX {
        let sentence = format!(
            "the metadata has {} bytes of at most {METADATA_BYTES_MAX}: keep more elsewhere, under the same id",
            metadata.len()
        );
        return Err(Problem::new(Code::TooLarge, sentence));
    }
    p2p_sync_proto::json::check(metadata)?;
    if !metadata.trim_start().starts_with('{') {
        return Err(Problem::new(Code::BadRequest, "metadata is a JSON object"));
    }
    Ok(())
}

/// After a change of the model, until this proxy has the new settings.
fn other_model() -> Problem {
    let sentence =
        "the hub's vectors are of a new model, and this proxy is still set to the one before: ask again later";
    Problem::new(Code::EmbeddingsUnavailable, sentence)
}

fn time(ms: u64) -> Option<SystemTime> {
    (ms > 0).then(|| UNIX_EPOCH + Duration::from_millis(ms.min(LAST_MS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_that_cannot_be_compared_is_told_why() {
        let code = |vector: &[f32]| check_vector(vector, 2).map_or_else(|problem| problem.code, |()| Code::None);
        assert_eq!(code(&[0.5, -3.0]), Code::None);
        assert_eq!(code(&[]), Code::WrongDimensions);
        assert_eq!(code(&[1.0, 2.0, 3.0]), Code::WrongDimensions);
        for bad in [
            [f32::NAN, 1.0],
            [1.0, f32::INFINITY],
            [f32::NEG_INFINITY, 0.0],
            [0.0, -0.0],
        ] {
            assert_eq!(code(&bad), Code::NotFinite, "{bad:?}");
        }
    }

    #[test]
    fn filters_that_mean_nothing_are_refused() {
        let query = |change: fn(&mut Query)| {
            let mut query = Query::near(Near::Text("x".to_owned()));
            change(&mut query);
            check_filters(&query).map_or_else(|problem| problem.code, |()| Code::None)
        };
        assert_eq!(query(|query| query.maps = vec!["prontera".to_owned()]), Code::None);
        assert_eq!(query(|query| query.similarity_min = Some(-1.0)), Code::None);
        assert_eq!(query(|query| query.similarity_min = Some(1.5)), Code::BadRequest);
        assert_eq!(query(|query| query.similarity_min = Some(f32::NAN)), Code::BadRequest);
        assert_eq!(query(|query| query.maps = vec!["a/b".to_owned()]), Code::BadMap);
        assert_eq!(query(|query| query.maps = vec!["a".to_owned(); 2000]), Code::BadRequest);
        assert_eq!(query(|query| query.prefix = Some("@hub/".to_owned())), Code::None);
        assert_eq!(query(|query| query.prefix = Some("p".repeat(257))), Code::BadRequest);
    }

    #[test]
    fn metadata_is_a_small_object_that_the_database_holds() {
        let code = |json: &str| check_metadata(Some(json)).map_or_else(|problem| problem.code, |()| Code::None);
        assert_eq!(check_metadata(None), Ok(()));
        assert_eq!(code(r#"{"by":"lore team"}"#), Code::None);
        assert_eq!(code("[1]"), Code::BadRequest);
        assert_eq!(code(r#"{"a":"\u0000"}"#), Code::BadText);
        assert_eq!(code(&format!(r#"{{"a":"{}"}}"#, "x".repeat(4096))), Code::TooLarge);
    }
}
