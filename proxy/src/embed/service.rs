//! Vectors for whoever asks: a text's, and what lies nearest to one; within the rights and the budget of who asks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use p2p_sync_proto::{Code, Position, Problem, limits::HITS_MAX, path::check_map, v1::SyncDataType};
use tokio::sync::{Notify, Semaphore};
use uuid::Uuid;

use super::{EmbedError, Embedder, text::tokens};
use crate::{
    operation::Valid,
    store::{EligibleMaps, Found, Search, Spent, Store},
    validate::types_file::Rules,
};

/// Calls of the provider for hosts and tools at one time.
const CALLS_MAX: usize = 16;
/// Searches at one time: one connection fewer than there are for vectors, for what waits to be embedded goes on.
const SEARCHES_MAX: usize = 3;
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
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub enum Caller {
    /// The operator, or a tool of the operator's: sees everything and has no budget.
    Operator,
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
            since_ms: 0,
            until_ms: 0,
            similarity_min: None,
        }
    }
}

/// The hub's embeddings.
#[derive(Debug)]
pub struct Embeddings {
    embedder: Option<Embedder>,
    pub(super) limits: Limits,
    pub(super) wake: Notify,
    calls: Semaphore,
    searches: Semaphore,
}

impl Embeddings {
    /// By a provider; none: embeddings are off.
    pub fn new(embedder: Option<Embedder>, limits: Limits) -> Self {
        Self {
            embedder,
            limits,
            wake: Notify::new(),
            calls: Semaphore::new(CALLS_MAX),
            searches: Semaphore::new(SEARCHES_MAX),
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
            since: time(query.since_ms),
            until: time(query.until_ms),
        };
        let _turn = self.searches.acquire().await;
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
        if let Caller::Host { host_id, position } = caller {
            if position.incarnation == 0 {
                let sentence =
                    "what costs something is numbered by the outbox that it comes from: send it through an agent";
                return Err(Problem::new(Code::BadRequest, sentence));
            }
            let limit = self.limits.host_tokens;
            match store
                .spend_embedding_tokens(host_id, cost, Some(limit), Some(position))
                .await?
            {
                Spent::Yes => {}
                Spent::Replay => {
                    let sentence = "this request was taken before, or many newer ones were: seal it anew";
                    return Err(Problem::new(Code::Replay, sentence));
                }
                Spent::TooMany(left) => {
                    let sentence = format!(
                        "this takes {cost} tokens, and {left} of this host's {limit} a day are left: ask for less, or \
                         tomorrow (UTC)"
                    );
                    return Err(Problem::new(Code::BudgetSpent, sentence));
                }
            }
        }
        let _turn = self.calls.acquire().await;
        let vectors = embedder.embed(texts).await;
        if let (Err(_), Caller::Host { host_id, .. }) = (&vectors, caller) {
            // Nothing came for it.
            if let Err(problem) = store.give_back_embedding_tokens(host_id, cost).await {
                tracing::warn!(%problem, %host_id, "tokens stay spent for which a host got nothing");
            }
        }
        vectors.map_err(|error| told(&error, caller))
    }
}

fn told(error: &EmbedError, caller: Caller) -> Problem {
    match caller {
        Caller::Operator => error.for_operator(),
        Caller::Host { .. } => {
            tracing::debug!(%error, "a host's text was not embedded");
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
    if query.similarity_min.is_some_and(|least| !(-1.0..=1.0).contains(&least)) {
        return bad("the least similarity is a number from -1 to 1".to_owned());
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
    }
}
