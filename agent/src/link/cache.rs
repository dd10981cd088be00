//! Carries what was cached and published to the hub, one after the other, so that the order of each key holds.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    v1::{self, pull_request::What},
};

use super::Puller;
use crate::shared::Shared;

/// For the hub to take one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends what comes until the agent stops.
pub(super) async fn run(shared: Arc<Shared>, puller: Arc<Puller>) {
    let mut attempts = 0;
    while !shared.is_stopping() {
        let write = shared.near_cache().take(Instant::now());
        let is_write = write.is_some();
        let request = match write {
            Some(request) => request,
            None if shared.cache_silent.load(Ordering::Relaxed) => probe(),
            None => {
                shared.cache_wake.notified().await;
                continue;
            }
        };
        // The deadline of the call does not run while the connection is made.
        let answer = tokio::time::timeout(WRITE_TIMEOUT * 2, puller.pull(request, WRITE_TIMEOUT)).await;
        let refused = match answer {
            Ok(answered) => answered.err(),
            Err(_) => Some(Problem::new(Code::HubUnavailable, "the hub did not answer in time")),
        };
        let silent = refused
            .as_ref()
            .is_some_and(|problem| problem.code == Code::HubUnavailable);
        shared.cache_silent.fetch_and(silent, Ordering::Relaxed);
        let again = is_write && shared.near_cache().settle(refused, Instant::now());
        if again || silent {
            attempts += 1;
            super::pause(&shared, shared.delay(attempts)).await;
        } else {
            attempts = 0;
        }
    }
}

/// A question of no consequence, for when no write is there to show whether the hub answers again.
fn probe() -> v1::PullRequest {
    let key = "probe".to_owned();
    v1::PullRequest {
        what: Some(What::CacheExists(v1::CacheExists { key })),
    }
}
