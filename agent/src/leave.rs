//! A host that gives all of its maps away, to end for good or for a while.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code,
    v1::{MigrateMap, map_request::What},
};

use crate::{link::call_maps, shared::Shared};

/// Between two looks at what is left.
const LOOK: Duration = Duration::from_millis(500);
/// For another host to take a map; then it is left to the hub.
const PATIENCE: Duration = Duration::from_secs(30);

/// Begins to give all maps away, and those that are given meanwhile; once begun it goes on until the agent ends. To be called
/// inside a runtime.
pub(crate) fn begin(shared: &Arc<Shared>) {
    if !shared.leaving.swap(true, Ordering::SeqCst) {
        tracing::info!("this host leaves: its maps are given away");
        shared.leaving_told.notify_one();
        tokio::spawn(give_all_away(shared.clone()));
    }
}

async fn give_all_away(shared: Arc<Shared>) {
    // Under which tenure, and since when others are asked to take them.
    let mut asked: HashMap<String, (u64, Instant)> = HashMap::new();
    loop {
        let held = shared.leases.held();
        asked.retain(|map, (tenure, _)| held.contains(&(map.clone(), *tenure)));
        for (map, tenure) in &held {
            match asked.get(map) {
                None => {
                    if migrate(&shared, map).await {
                        asked.insert(map.clone(), (*tenure, Instant::now()));
                    }
                }
                Some((_, since)) if since.elapsed() > PATIENCE => give_up(&shared, map),
                Some(_) => {}
            }
        }
        if !held.is_empty() {
            // Whom they are to go to, and when.
            shared.leases.told.notify_one();
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Asks the hub to have another take a map; where there is none it is given up. False where the hub did not answer.
async fn migrate(shared: &Arc<Shared>, map: &str) -> bool {
    let migrate = What::Migrate(MigrateMap {
        map: map.to_owned(),
        ..Default::default()
    });
    match call_maps(shared, migrate).await {
        Ok(_) => true,
        Err(problem) if matches!(problem.code, Code::HubUnavailable | Code::RateLimited) => false,
        Err(problem) => {
            tracing::info!(map, "no other host takes the map, it is given up: {problem}");
            give_up(shared, map);
            true
        }
    }
}

fn give_up(shared: &Arc<Shared>, map: &str) {
    // It goes on by itself; how it ends shows in the leases.
    if let Err(problem) = shared.hand_overs.give_up(shared, map, shared.lanes.next_position()) {
        tracing::debug!(map, "the map is gone already: {problem}");
    }
}
