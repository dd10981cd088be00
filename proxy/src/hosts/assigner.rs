//! Carries out what [`assignment`](super::assignment) decides, in one proxy of a database at a time; where that one is gone,
//! another one goes on at once.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use p2p_sync_proto::Problem;
use tokio::time::sleep;

use super::assignment::{self, Step, World};
use crate::{
    pipeline::Hub,
    store::{Claim, Store},
};

/// Between two looks at everything, if nothing happens and nothing is due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks, whatever happens.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// Between two attempts to be the one that assigns, and to reach a database that does not answer.
const CLAIM_INTERVAL: Duration = Duration::from_millis(250);
/// A lease that has just run out is looked at so much later, for clocks are read one after the other.
const AFTER_DUE: Duration = Duration::from_millis(5);

/// Assigns maps as long as the proxy serves.
pub async fn run(hub: Arc<Hub>) {
    if !hub.store.leases().required {
        return;
    }
    loop {
        let mut claim = claim(&hub.store).await;
        tracing::info!("this proxy assigns maps");
        tokio::select! {
            () = claim.lost() => {}
            () = assign(&hub) => {}
        }
    }
}

/// Waits until no other proxy assigns.
async fn claim(store: &Store) -> Claim {
    loop {
        if let Ok(claim) = store.open_claim().await {
            // As long as the connection holds.
            while let Ok(taken) = claim.take(ASSIGNING).await {
                if taken {
                    return claim;
                }
                sleep(CLAIM_INTERVAL).await;
            }
        }
        sleep(CLAIM_INTERVAL).await;
    }
}

/// What the proxy that assigns has claimed.
const ASSIGNING: &str = "p2p_sync assigning";

/// Never ends by itself.
async fn assign(hub: &Hub) {
    let mut serving_since = Instant::now();
    let mut told = false;
    loop {
        let settled = serving_since.elapsed() > hub.maps.gone_after();
        let wait = match look(hub, settled).await {
            Ok(wait) => {
                told = false;
                wait
            }
            Err(problem) => {
                // Hosts could not be heard meanwhile.
                serving_since = Instant::now();
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%problem, "maps cannot be assigned; it is tried again");
                }
                CLAIM_INTERVAL
            }
        };
        let begun = Instant::now();
        tokio::select! {
            () = sleep(wait) => {}
            () = hub.attends.changed() => sleep(LOOK_INTERVAL_MIN.saturating_sub(begun.elapsed())).await,
        }
    }
}

/// Looks once, and does what is to be done; gives when to look again.
async fn look(hub: &Hub, settled: bool) -> Result<Duration, Problem> {
    if !hub.store.has_maps_to_assign().await? {
        return Ok(LOOK_INTERVAL);
    }
    let world = hub.store.world().await?;
    let steps = assignment::decide(&world, &hub.maps, settled);
    let mut did_any = false;
    for step in &steps {
        let did = hub.store.carry_out(step, &hub.maps).await?;
        if did {
            did_any = true;
            note(step);
            // Each is told at once: the next one may take its time.
            hub.attends.tell();
        } else {
            tracing::debug!(?step, "it did not come about");
        }
    }
    Ok(wait(&world, did_any))
}

fn wait(world: &World, did_any: bool) -> Duration {
    if did_any {
        return LOOK_INTERVAL_MIN;
    }
    let due = assignment::due(world).map_or(LOOK_INTERVAL, |due| due + AFTER_DUE);
    due.clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL)
}

fn note(step: &Step) {
    match step {
        Step::Grant { map, to } => tracing::info!(map, %to, "a map that nobody held is assigned"),
        Step::Move { map, to } => tracing::info!(map, %to, "a map is being handed over"),
        Step::Ask { map, to } => tracing::debug!(map, %to, "the holder of a map is asked for it"),
        Step::Take { map, to } => tracing::warn!(map, %to, "a map is taken: its holder did not release it in time"),
        Step::CallOff { map, to } => tracing::warn!(map, %to, "a hand-over is called off: the successor is gone"),
        Step::Standby { map, .. } => tracing::debug!(map, "others stand by for a map"),
    }
}
