//! `schema print|upgrade|reembed`

use std::{
    io::Write as _,
    time::{Duration, Instant},
};

use clap::Subcommand;
use p2p_sync_proto::{Code, Problem, settings::Problems};

use super::{Common, log_warnings, one};
use crate::{
    config::Config,
    embed::Embedder,
    store::{Progress, Store, schema::SQL},
};

/// What to do with the tables.
#[derive(Debug, Subcommand)]
pub(super) enum Schema {
    /// Print what makes them, for psql.
    Print,
    /// Bring them up to this version, making them in an empty database.
    Upgrade,
    /// Make all vectors anew as the settings say now, after a change of the model, of `embedding_dimensions` or of `hnsw_m`
    /// and `hnsw_ef_construction`. The old ones serve until the new are there; then start the proxies anew. What is
    /// interrupted goes on when it is run again.
    Reembed,
}

/// Between two lines that say how far it is.
const TOLD_EVERY: Duration = Duration::from_secs(5);

pub(super) async fn run(schema: &Schema, common: &Common) -> Result<(), Problems> {
    match schema {
        Schema::Print => print!("{SQL}"),
        Schema::Upgrade => {
            let config = common.load()?;
            log_warnings();
            let version = Store::upgrade(&config.store).await.map_err(one)?;
            println!("the schema is of version {version}");
        }
        Schema::Reembed => {
            let config = common.load()?;
            log_warnings();
            reembed(&config).await.map_err(one)?;
        }
    }
    Ok(())
}

async fn reembed(config: &Config) -> Result<(), Problem> {
    let embedder = Embedder::open(&config.embedding).await?.ok_or_else(|| {
        let sentence = "embedding_provider is off: name the one that is to make the vectors";
        Problem::new(Code::BadValue, sentence)
    })?;
    let store = Store::connect(&config.store).await?;
    let mut told_at: Option<Instant> = None;
    let told = |progress: Progress| {
        let is_due = told_at.is_none_or(|at| at.elapsed() >= TOLD_EVERY);
        if progress.is_indexing {
            println!("{} vectors; making their index", progress.done);
        } else if is_due {
            println!("{} of {} vectors", progress.done, progress.all);
            told_at = Some(Instant::now());
        }
        // Who does not look is told nothing.
        let _ = std::io::stdout().flush();
    };
    let done = store.reembed(&embedder, config.store.hnsw, told).await;
    store.close().await;
    let done = done?;
    let not_taken = match done.not_taken {
        0 => String::new(),
        texts => format!("; {texts} texts, which the provider does not take, wait in the queue"),
    };
    let without_text = match done.without_text {
        0 => String::new(),
        vectors => format!("; {vectors} that tools gave without a text are gone: have them put anew"),
    };
    println!(
        "{} vectors of {} dimensions by {} are in place{not_taken}{without_text}: start the proxies anew with these settings",
        done.done,
        embedder.dimensions(),
        embedder.model()
    );
    Ok(())
}
