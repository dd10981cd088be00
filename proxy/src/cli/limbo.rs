//! `limbo list|merge|discard`

use clap::Subcommand;
use p2p_sync_proto::{Problem, settings::Problems, terminal::shown};
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::store::{LimboFilter, Store};

/// What came after the right to write its map had passed on.
#[derive(Debug, Subcommand)]
pub(super) enum Limbo {
    /// Show what waits, the oldest first.
    List {
        /// Of one map alone.
        #[arg(long, value_name = "MAP")]
        map: Option<String>,
        /// Of one host alone.
        #[arg(long, value_name = "HOST")]
        host: Option<Uuid>,
        /// Go on behind the line of this number.
        #[arg(long, value_name = "ID", default_value = "0")]
        after: i64,
        /// At most so many, 1 to 1000.
        #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// Write it, as an edit of yours: it counts as newer than what its path has, and what hosts write without knowing of it
    /// is a conflict (`ops conflicts`).
    Merge {
        /// The number that `limbo list` begins the line with.
        id: i64,
    },
    /// Give it up; it is kept among the rejected operations.
    Discard {
        /// The number that `limbo list` begins the line with.
        id: i64,
    },
}

pub(super) async fn run(limbo: &Limbo, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match limbo {
        Limbo::List {
            map,
            host,
            after,
            limit,
        } => {
            let wanted = LimboFilter {
                map: map.as_deref(),
                host_id: *host,
                after: *after,
                limit: Some(*limit),
            };
            list(&store, &wanted).await
        }
        Limbo::Merge { id } => store.merge_limbo(*id).await.map(|()| println!("{id} merged")),
        Limbo::Discard { id } => store.discard_limbo(*id).await.map(|()| println!("{id} discarded")),
    };
    store.close().await;
    done.map_err(one)
}

async fn list(store: &Store, wanted: &LimboFilter<'_>) -> Result<(), Problem> {
    let rows = store.limbo(wanted).await?;
    for row in &rows {
        println!(
            "{} {} host={} tenure={} operation={} {} {}",
            row.limbo_id,
            row.received_at,
            row.host_id,
            row.tenure,
            row.operation_id,
            row.paths.escape_debug(),
            // The host's own words: nothing of them may steer the terminal.
            shown(row.payload.as_deref().unwrap_or("deleted")),
        );
    }
    let is_full = wanted.limit.is_some_and(|limit| rows.len() >= limit as usize);
    if let Some(last) = rows.last().filter(|_| is_full) {
        eprintln!("there may be more: --after {}", last.limbo_id);
    }
    Ok(())
}
