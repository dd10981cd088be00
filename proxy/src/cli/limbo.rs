//! `limbo list|merge|discard`

use clap::Subcommand;
use p2p_sync_proto::{settings::Problems, terminal::shown};

use super::{Common, log_warnings, one};
use crate::store::Store;

/// What came after the right to write its map had passed on.
#[derive(Debug, Subcommand)]
pub(super) enum Limbo {
    /// Show what waits, the oldest first.
    List {
        /// Of one map alone.
        #[arg(long, value_name = "MAP")]
        map: Option<String>,
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
        Limbo::List { map } => list(&store, map.as_deref()).await,
        Limbo::Merge { id } => store.merge_limbo(*id).await.map(|()| println!("{id} merged")),
        Limbo::Discard { id } => store.discard_limbo(*id).await.map(|()| println!("{id} discarded")),
    };
    store.close().await;
    done.map_err(one)
}

async fn list(store: &Store, map: Option<&str>) -> Result<(), p2p_sync_proto::Problem> {
    for row in store.limbo(map).await? {
        println!(
            "{} host={} tenure={} operation={} {} {}",
            row.limbo_id,
            row.host_id,
            row.tenure,
            row.operation_id,
            row.paths.escape_debug(),
            // The host's own words: nothing of them may steer the terminal.
            shown(row.payload.as_deref().unwrap_or("deleted")),
        );
    }
    Ok(())
}
