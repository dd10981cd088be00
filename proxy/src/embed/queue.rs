//! What was written is embedded in the background: taken from the queue in Postgres, a provider's batch at a time, beside
//! whatever other proxies take.
//!
//! A provider in trouble delays what waits and loses none of it: then nothing is counted against a text, and the queue rests.
//! A text that the provider does not take is tried a few times and then set apart, for the operator to look at.

use std::{collections::HashMap, sync::Arc, time::Duration};

use p2p_sync_proto::{Code, Problem};
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{
    Bounds, EmbedError, Embedder,
    text::{Said, said, tokens},
};
use crate::{
    pipeline::Hub,
    store::{Content, EligibleMaps, Embedded, EmbeddingClaim as Claim, Release, Spent},
    validate::types_file::Rules,
};

/// Rows taken at one time: a provider's batch.
const CLAIMS_MAX: usize = 64;
/// Between two looks at the queue, where nobody says that there is something: other proxies' leftovers, and retries.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// After something was written, for more of it to come.
const LINGER: Duration = Duration::from_millis(100);
/// Before a provider in trouble is asked again; doubled each time, up to the longest.
const REST: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(30);
/// As long as a provider may say.
const REST_TOLD_MAX: Duration = Duration::from_hours(1);
/// Before the day's budget is looked at again.
const BUDGET_REST: Duration = Duration::from_mins(1);
/// How often a text is tried that the provider does not take, and before the second time; four times as long each time.
const ATTEMPTS_MAX: i32 = 5;
const RETRY: Duration = Duration::from_mins(1);
/// Beyond twice the provider's time, for the database: then a row that was taken counts as left behind.
const LEASE: Duration = Duration::from_mins(1);

/// Who the queue's tokens are counted for.
pub const QUEUE_SPENDER: Uuid = Uuid::nil();

/// What a round came to.
enum Round {
    /// There may be more.
    Full,
    /// Nothing more is due.
    Empty,
    /// Nothing can be embedded for so long.
    Rests(Duration, String),
}

/// Embeds what waits; never ends, but where there is nothing that it could do.
pub async fn run(hub: Arc<Hub>) {
    let embeddings = &hub.embeddings;
    let (Some(embedder), eligible) = (embeddings.embedder(), &embeddings.limits.eligible) else {
        return;
    };
    if *eligible == EligibleMaps::None {
        return;
    }
    let (mut edits, mut troubles) = (0, 0);
    loop {
        let done = async {
            edits = hub
                .store
                .enqueue_edits(edits, eligible, &types(&hub.rules.load()))
                .await?;
            round(&hub, embedder).await
        };
        let rest = match done.await {
            Ok(Round::Full) => {
                troubles = 0;
                continue;
            }
            Ok(Round::Empty) => {
                if troubles > 0 {
                    tracing::info!("what waits to be embedded goes on");
                }
                troubles = 0;
                None
            }
            Ok(Round::Rests(least, why)) => Some((least, why)),
            Err(problem) => Some((Duration::ZERO, problem.to_string())),
        };
        let Some((least, why)) = rest else {
            if timeout(LOOK_INTERVAL, embeddings.wake.notified()).await.is_ok() {
                sleep(LINGER).await;
            }
            continue;
        };
        let rest = REST.saturating_mul(1 << troubles.min(5)).min(REST_MAX).max(least);
        if troubles == 0 {
            tracing::warn!(why, "what waits to be embedded goes on waiting; nothing of it is lost");
        }
        troubles += 1;
        // Proxies that rest for one reason do not come back together.
        sleep(rest.min(REST_TOLD_MAX).mul_f64(1.0 + fastrand::f64() / 4.0)).await;
    }
}

/// The types of which something is embedded.
pub fn types(rules: &Rules) -> Vec<i16> {
    let all = rules.policies.iter().map(|policy| policy.data_type);
    all.filter(|data_type| !rules.of(*data_type).embedded.is_empty())
        .map(|data_type| data_type as i16)
        .collect()
}

/// A claim with what it says.
struct Task {
    claim: Claim,
    said: Said,
    hash: [u8; 32],
}

async fn round(hub: &Hub, embedder: &Embedder) -> Result<Round, Problem> {
    let limits = &hub.embeddings.limits;
    let within = embedder.patience() * 2 + LEASE;
    let claims = hub.store.claim_embeddings(&limits.eligible, CLAIMS_MAX, within).await?;
    if claims.is_empty() {
        return Ok(Round::Empty);
    }
    let is_full = claims.len() == CLAIMS_MAX;
    let rules = hub.rules.load_full();
    let bounds = embedder.bounds();
    let (mut silent, mut long, mut tasks) = (Vec::new(), Vec::new(), Vec::new());
    for claim in claims {
        match read(&rules, &claim) {
            None => silent.push(claim),
            Some(said) if said.text.len() > bounds.text_bytes_max => long.push(claim),
            Some(said) => {
                let hash = Sha256::digest(said.text.as_bytes()).into();
                tasks.push(Task { claim, said, hash });
            }
        }
    }
    if !long.is_empty() {
        let too_long = |claim| Release {
            claim,
            after: Duration::ZERO,
            failure: Some((
                Some(Code::TextTooLong),
                format!(
                    "it has more than the {} bytes that a text may have",
                    bounds.text_bytes_max
                ),
            )),
        };
        hub.store
            .release_embeddings(&long.iter().map(too_long).collect::<Vec<_>>())
            .await?;
    }

    let hashes: Vec<&[u8]> = tasks.iter().map(|task| task.hash.as_slice()).collect();
    let known = hub.store.known_vectors(&hashes).await?;
    let mut vectors: HashMap<[u8; 32], Vec<f32>> = known
        .into_iter()
        .filter_map(|(hash, vector)| Some((hash.try_into().ok()?, vector)))
        .collect();
    let mut texts: Vec<([u8; 32], &str)> = tasks
        .iter()
        .filter(|task| !vectors.contains_key(&task.hash))
        .map(|task| (task.hash, task.said.text.as_str()))
        .collect();
    texts.sort_unstable();
    texts.dedup();
    let asked = ask(hub, embedder, &texts).await?;
    vectors.extend(asked.vectors);

    let mut done: Vec<Embedded<'_>> = silent.iter().map(|claim| Embedded { claim, content: None }).collect();
    let mut released = Vec::new();
    for task in &tasks {
        if let Some(vector) = vectors.get(&task.hash) {
            let content = Content {
                text: &task.said.text,
                hash: &task.hash,
                metadata: task.said.metadata.as_deref(),
                vector,
            };
            done.push(Embedded {
                claim: &task.claim,
                content: Some(content),
            });
        } else {
            released.push(release(
                &task.claim,
                asked.not_taken.get(&task.hash),
                asked.rest.as_ref(),
            ));
        }
    }
    let (model, dimensions) = (embedder.model(), embedder.dimensions());
    if !done.is_empty() && !hub.store.store_embeddings(model, dimensions, &done).await? {
        // For a proxy that has the new settings.
        let claims = done.iter().map(|one| one.claim);
        released.extend(claims.map(|claim| release(claim, None, None)));
        hub.store.release_embeddings(&released).await?;
        let why = "the schema's vectors are of another model by now: start this proxy anew with its settings";
        return Ok(Round::Rests(REST_MAX, why.to_owned()));
    }
    if !released.is_empty() {
        hub.store.release_embeddings(&released).await?;
    }
    Ok(match asked.rest {
        Some((least, why)) => Round::Rests(least, why),
        None if is_full => Round::Full,
        None => Round::Empty,
    })
}

fn read(rules: &Rules, claim: &Claim) -> Option<Said> {
    let source = claim.of.as_ref()?;
    let data_type = i32::from(source.data_type).try_into().ok()?;
    said(&source.payload, &rules.of(data_type).embedded)
}

fn release<'a>(claim: &'a Claim, not_taken: Option<&String>, rest: Option<&(Duration, String)>) -> Release<'a> {
    let Some(reason) = not_taken else {
        // Another proxy may have more luck; this one rests.
        let after = rest.map_or(Duration::ZERO, |(least, _)| (*least).max(REST));
        return Release {
            claim,
            after,
            failure: None,
        };
    };
    let is_last = claim.attempts + 1 >= ATTEMPTS_MAX;
    let exponent = u32::try_from(claim.attempts).unwrap_or_default().min(8);
    Release {
        claim,
        after: RETRY * 4_u32.pow(exponent),
        failure: Some((is_last.then_some(Code::TextRefused), reason.clone())),
    }
}

/// What a provider made of texts.
#[derive(Default)]
struct Asked {
    vectors: Vec<([u8; 32], Vec<f32>)>,
    /// What it did not take, with its words.
    not_taken: HashMap<[u8; 32], String>,
    /// The rest was not asked for, or not answered: how long to leave it alone at least, and why.
    rest: Option<(Duration, String)>,
}

/// Has texts embedded as far as the day's budget goes, in batches that the provider takes.
async fn ask(hub: &Hub, embedder: &Embedder, texts: &[([u8; 32], &str)]) -> Result<Asked, Problem> {
    let mut asked = Asked::default();
    let mut rest = texts;
    while !rest.is_empty() {
        let batch = affordable(hub, &rest[..fitting(&embedder.bounds(), rest)]).await?;
        if batch.is_empty() {
            let why = "the budget of today is spent (embedding_tokens_per_day)";
            asked.rest = Some((BUDGET_REST, why.to_owned()));
            break;
        }
        let failed = embed(embedder, batch, &mut asked).await;
        if let Some(error) = failed {
            let spent: u64 = batch.iter().map(|(_, text)| tokens(text)).sum();
            let got = |hash: &[u8; 32]| asked.vectors.iter().any(|(known, _)| known == hash);
            let for_something = batch
                .iter()
                .filter(|(hash, _)| got(hash))
                .map(|(_, text)| tokens(text))
                .sum();
            hub.store
                .give_back_embedding_tokens(QUEUE_SPENDER, spent.saturating_sub(for_something))
                .await?;
            asked.rest = Some((error.retry_after().unwrap_or_default(), error.to_string()));
            break;
        }
        rest = &rest[batch.len()..];
    }
    Ok(asked)
}

/// How many of the first texts go into one call.
fn fitting(bounds: &Bounds, texts: &[([u8; 32], &str)]) -> usize {
    let mut bytes = 0;
    let fit = texts.iter().take(bounds.texts_max).take_while(|(_, text)| {
        bytes += text.len();
        bytes <= bounds.batch_bytes_max
    });
    fit.count().max(1)
}

/// The first texts that the day's budget pays for, paid.
async fn affordable<'t>(hub: &Hub, batch: &'t [([u8; 32], &'t str)]) -> Result<&'t [([u8; 32], &'t str)], Problem> {
    let mut batch = batch;
    while !batch.is_empty() {
        let cost = batch.iter().map(|(_, text)| tokens(text)).sum();
        let limit = hub.embeddings.limits.queue_tokens;
        match hub
            .store
            .spend_embedding_tokens(QUEUE_SPENDER, cost, limit, None)
            .await?
        {
            Spent::TooMany(left) => {
                let mut sum = 0;
                let paid = batch.iter().take_while(|(_, text)| {
                    sum += tokens(text);
                    sum <= left
                });
                // Fewer each time, whatever other proxies spend meanwhile.
                batch = &batch[..paid.count().min(batch.len() - 1)];
            }
            Spent::Yes | Spent::Replay => break,
        }
    }
    Ok(batch)
}

/// Embeds a batch, text by text where the provider does not take it whole; gives what ended it.
async fn embed(embedder: &Embedder, batch: &[([u8; 32], &str)], asked: &mut Asked) -> Option<EmbedError> {
    let texts: Vec<String> = batch.iter().map(|(_, text)| (*text).to_owned()).collect();
    match embedder.embed(&texts).await {
        Ok(vectors) => asked.vectors.extend(batch.iter().map(|(hash, _)| *hash).zip(vectors)),
        Err(error) if !is_for_the_text(&error) => return Some(error),
        Err(error) => {
            if let [(hash, _)] = batch {
                asked.not_taken.insert(*hash, error.to_string());
                return None;
            }
            for (one, text) in batch.iter().zip(&texts) {
                match embedder.embed(std::slice::from_ref(text)).await {
                    Ok(vectors) => asked.vectors.extend(vectors.into_iter().map(|vector| (one.0, vector))),
                    Err(error) if is_for_the_text(&error) => {
                        asked.not_taken.insert(one.0, error.to_string());
                    }
                    Err(error) => return Some(error),
                }
            }
        }
    }
    None
}

/// Whether another text may succeed where this one did not.
fn is_for_the_text(error: &EmbedError) -> bool {
    matches!(
        error,
        EmbedError::NotTaken(_) | EmbedError::Empty { .. } | EmbedError::TooLong { .. } | EmbedError::TooMany { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_where_the_provider_takes_no_more_and_always_has_a_text() {
        let bounds = Bounds {
            texts_max: 3,
            text_bytes_max: 10,
            batch_bytes_max: 10,
            tokens_max: None,
        };
        let of = |texts: &[&'static str]| {
            let texts: Vec<([u8; 32], &str)> = texts.iter().map(|text| ([0; 32], *text)).collect();
            fitting(&bounds, &texts)
        };
        assert_eq!(of(&["a", "b", "c", "d"]), 3);
        assert_eq!(of(&["aaaaaa", "bbbb", "c"]), 2);
        assert_eq!(of(&["aaaaaaaaaaaa", "b"]), 1);
    }

    #[test]
    fn a_text_that_is_not_taken_is_tried_later_and_at_last_set_apart_and_trouble_counts_for_none() {
        let claim = |attempts| Claim {
            path: "prontera/CHAT_MESSAGE/1".to_owned(),
            entry: 5,
            claimed: 5,
            attempts,
            of: None,
        };
        let reason = "too odd".to_owned();
        for (attempts, minutes, code) in [(0, 1, None), (1, 4, None), (4, 256, Some(Code::TextRefused))] {
            let claim = claim(attempts);
            let released = release(&claim, Some(&reason), None);
            assert_eq!(released.after, Duration::from_mins(minutes));
            assert_eq!(released.failure, Some((code, reason.clone())));
        }
        let claim = claim(9);
        let released = release(&claim, None, Some(&(Duration::from_secs(20), String::new())));
        assert_eq!((released.after, released.failure), (Duration::from_secs(20), None));
    }
}
