//! `embeddings status|search|fill|retry|forget`

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use p2p_sync_proto::{Code, Problem, path::check_map, policy::parse_type, settings::Problems, terminal::shown};

use super::{Common, log_warnings, maps::ago, one};
use crate::{
    config::Config,
    embed::{Caller, Embedder, Embeddings, Near, Query, TOOLS_SPENDER, queue},
    store::{EligibleMaps, Found, Store},
    validate::types_file::Rules,
};

/// What was embedded, and what waits for it.
#[derive(Debug, Subcommand)]
pub(super) enum Commands {
    /// Show the provider, how many vectors there are, what waits, what failed and what was spent today.
    Status,
    /// Show what lies nearest to a text, the nearest first.
    Search(Search),
    /// Have embedded what is stored already of the eligible maps: after one was added, or after `forget`.
    Fill {
        /// Of this map alone; it has to be eligible.
        #[arg(long)]
        map: Option<String>,
    },
    /// Try again what failed for good.
    Retry,
    /// Delete vectors, and what waits to be embedded; what is written from then on is embedded as before. What tools keep goes
    /// by its path alone.
    Forget(Forget),
}

#[derive(Debug, Args)]
pub(super) struct Search {
    /// What to look near to; the provider embeds it.
    text: String,
    /// Only on these maps; may be given several times.
    #[arg(long = "map", value_name = "MAP")]
    maps: Vec<String>,
    /// Only these, by name or number; may be given several times.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Only what came within so long, e.g. 90s, 30m, 12h, 7d.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    since: Option<Duration>,
    /// At most so many, up to 100.
    #[arg(long, default_value_t = 10)]
    limit: u32,
    /// Only what is so similar at least, -1 to 1.
    #[arg(long, value_name = "SIMILARITY", allow_negative_numbers = true)]
    min_score: Option<f32>,
    /// JSON, one object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Forget {
    /// Of a map.
    #[arg(long)]
    map: Option<String>,
    /// Of a path.
    #[arg(long)]
    path: Option<String>,
    /// All.
    #[arg(long)]
    all: bool,
}

pub(super) async fn run(commands: &Commands, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let rules = Rules::load(config.types_file.as_deref())?;
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match commands {
        Commands::Status => status(&store, &config).await,
        Commands::Search(search) => self::search(&store, &config, search).await,
        Commands::Fill { map } => fill(&store, &config, &rules, map.as_deref()).await,
        Commands::Retry => retry(&store).await,
        Commands::Forget(forget) => self::forget(&store, forget).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn status(store: &Store, config: &Config) -> Result<(), Problem> {
    let (space, queue) = (store.embedding_space().await?, store.embedding_queue().await?);
    let model = space.model.as_deref().unwrap_or("none yet");
    println!(
        "vectors: {} of {} dimensions, model {model}",
        space.vectors, space.dimensions
    );
    let limits = &config.embedding_limits;
    match &limits.eligible {
        EligibleMaps::None => println!("maps: none (vector_eligible_maps is empty)"),
        EligibleMaps::All => println!("maps: all"),
        EligibleMaps::Some(maps) => println!("maps: {}", maps.join(" ")),
    }
    let oldest = queue.oldest.map(|at| format!(", the oldest from {}", ago(at)));
    println!("waiting: {}{}", queue.waiting, oldest.unwrap_or_default());
    println!("failed: {}", queue.dead);
    for (path, code, reason) in &queue.dead_letters {
        println!("  {} {code} {}", path.escape_debug(), reason.escape_debug());
    }
    for (spender, tokens) in &queue.spent {
        if *spender == queue::QUEUE_SPENDER {
            let of = limits
                .queue_tokens
                .map(|tokens| format!(" of {tokens}"))
                .unwrap_or_default();
            println!("spent today: {tokens}{of} tokens by the queue");
        } else if *spender == TOOLS_SPENDER {
            let of = limits
                .tool_tokens
                .map(|tokens| format!(" of {tokens}"))
                .unwrap_or_default();
            println!("spent today: {tokens}{of} tokens by tools");
        } else {
            println!(
                "spent today: {tokens} of {} tokens by host {spender}",
                limits.host_tokens
            );
        }
    }
    Ok(())
}

async fn search(store: &Store, config: &Config, search: &Search) -> Result<(), Problem> {
    let embedder = Embedder::open(&config.embedding).await?;
    if let Some(embedder) = &embedder {
        store
            .take_embedding_space(embedder.model(), embedder.dimensions())
            .await?;
    }
    let embeddings = Embeddings::new(embedder, config.embedding_limits.clone());
    let since = search.since.map(|time| SystemTime::now() - time);
    let since = since.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let types: Result<_, Problem> = search.types.iter().map(|name| parse_type(name)).collect();
    let query = Query {
        limit: search.limit,
        maps: search.maps.clone(),
        types: types?,
        since_ms: since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
        similarity_min: search.min_score,
        ..Query::near(Near::Text(search.text.clone()))
    };
    for hit in embeddings.search(store, Caller::Operator, query).await? {
        if search.json {
            println!("{}", shown(&json(&hit)));
        } else {
            print(&hit);
        }
    }
    Ok(())
}

/// Players' words: nothing of them may steer the terminal.
fn print(hit: &Found) {
    let at = UNIX_EPOCH + Duration::from_millis(hit.received_at_ms);
    println!(
        "{:.3} {} {} {}",
        hit.similarity,
        hit.path.escape_debug(),
        ago(at),
        hit.text.escape_debug()
    );
}

fn json(hit: &Found) -> String {
    let metadata = hit.metadata.as_deref().and_then(|json| serde_json::from_str(json).ok());
    let metadata: serde_json::Value = metadata.unwrap_or_default();
    serde_json::json!({
        "path": hit.path,
        "map": hit.map,
        "account_id": hit.account_id,
        "similarity": hit.similarity,
        "received_at_ms": hit.received_at_ms,
        "stream_sequence": hit.stream_sequence,
        "text": hit.text,
        "metadata": metadata,
    })
    .to_string()
}

async fn fill(store: &Store, config: &Config, rules: &Rules, map: Option<&str>) -> Result<(), Problem> {
    let eligible = &config.embedding_limits.eligible;
    let maps = match map {
        None => eligible.clone(),
        Some(map) => {
            check_map(map)?;
            if !eligible.has(map) {
                let sentence =
                    format!("{map} is not among vector_eligible_maps: add it there, and start the proxies anew");
                return Err(Problem::new(Code::BadValue, sentence));
            }
            EligibleMaps::Some(vec![map.to_owned()])
        }
    };
    if maps == EligibleMaps::None {
        let sentence = "no map is eligible: name some in vector_eligible_maps, and start the proxies anew";
        return Err(Problem::new(Code::BadValue, sentence));
    }
    let queued = store.fill_embeddings(&maps, &queue::types(rules)).await?;
    println!("{queued} queued; the proxies embed them");
    Ok(())
}

async fn retry(store: &Store) -> Result<(), Problem> {
    let queued = store.retry_embeddings().await?;
    println!("{queued} queued again");
    Ok(())
}

async fn forget(store: &Store, forget: &Forget) -> Result<(), Problem> {
    let gone = store
        .forget_embeddings(forget.map.as_deref(), forget.path.as_deref())
        .await?;
    println!("{gone} vectors deleted");
    Ok(())
}

/// `90s`, `30m`, `12h`, `7d`.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a whole number of s, m, h or d, e.g. 12h".to_owned();
    let unit = text.chars().next_back().ok_or_else(expected)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(expected()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| expected())?;
    let within = number
        .checked_mul(seconds)
        .filter(|seconds| *seconds <= 100 * 365 * 86_400);
    within.map(Duration::from_secs).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_their_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_hours(168)));
        for bad in ["", "7", "d", "-1h", "1.5h", "7é", "99999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
