//! Copies of maps that this host stands by for: followed beside what its program follows, so that the map can be read warm,
//! without the hub, when it is given to this host.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::v1::{CopyPosition, CopyPositions, Duty, duty::Role, map_request::What};
use serde::{Deserialize, Serialize};
use tokio::{sync::Notify, task::AbortHandle, time::timeout};

use crate::{
    follower::{Follower, Listener},
    link::{Watcher, call_maps},
    replica::Replicas,
    shared::Shared,
    subscriptions::Subscription,
};

/// As many as watches over a connection of their own.
const COPIES_MAX: usize = 64;
/// How often the hub is told how far they are, and how soon again where it was not.
const TELL_EVERY: Duration = Duration::from_secs(5);
const TELL_RETRY: Duration = Duration::from_secs(1);
/// For a program to read a map that was given to this host.
const WARM: Duration = Duration::from_mins(2);

/// How far a copy is, for people and tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyStatus {
    /// The position in the map's stream up to which everything was told.
    pub sequence: u64,
    /// Everything is there: it can be read.
    pub whole: bool,
    /// Pieces of state.
    pub states: usize,
    /// What they take of memory.
    pub bytes: usize,
}

/// The copies of a host.
#[derive(Default)]
pub(crate) struct Copies {
    pub(crate) replicas: Arc<Replicas>,
    /// Connects when the first copy is begun.
    watcher: OnceLock<Arc<Watcher>>,
    table: Mutex<HashMap<String, Copy>>,
    last: AtomicU64,
    /// One has caught up, or is whole no more.
    moved: Arc<Notify>,
}

struct Copy {
    id: u64,
    task: AbortHandle,
    /// How far it is whole.
    upto: Arc<Mutex<Option<u64>>>,
    /// Told to the hub.
    told: Option<u64>,
    /// The map is this host's by now.
    kept_until: Option<Instant>,
}

impl Copies {
    /// Follows what the hub wants followed, and no more what it does not; that of a map that was given to this host a while
    /// longer. To be called inside a runtime.
    pub(crate) fn heard(&self, shared: &Arc<Shared>, duties: &[Duty]) {
        if !shared.config.keep_backups {
            return;
        }
        let is_leaving = shared.leaving.load(Ordering::SeqCst);
        let backups = duties.iter().filter(|duty| duty.role() == Role::Backup && !is_leaving);
        let backups: Vec<&str> = backups.map(|duty| duty.map.as_str()).collect();
        let held = shared.leases.held();
        let (now, mut table) = (Instant::now(), self.lock());
        let mut ended = Vec::new();
        table.retain(|map, copy| {
            let is_held = held.iter().any(|(held, _)| held == map);
            let stays = if backups.contains(&map.as_str()) {
                copy.kept_until = None;
                true
            } else {
                is_held && now < *copy.kept_until.get_or_insert(now + WARM)
            };
            if !stays {
                copy.task.abort();
                self.replicas.end(copy.id);
                ended.push(map.clone());
            }
            stays
        });
        for map in backups {
            if table.len() < COPIES_MAX && !table.contains_key(map) {
                table.insert(map.to_owned(), self.begin(shared, map));
            }
        }
        drop(table);
        for map in ended {
            shared.leases.copied(&map, None);
        }
    }

    fn begin(&self, shared: &Arc<Shared>, map: &str) -> Copy {
        let config = &shared.config;
        let make = || Watcher::new(config, shared.keys.clone(), shared.incarnation, shared.sent.clone());
        let watcher = self.watcher.get_or_init(|| Arc::new(make())).clone();
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let subscription = Subscription::whole(map);
        self.replicas.begin(id, subscription.clone());
        let upto: Arc<Mutex<Option<u64>>> = Arc::default();
        let listener = Listener::Keeper(Box::new({
            let (upto, moved, leases) = (upto.clone(), self.moved.clone(), shared.leases.clone());
            let map = map.to_owned();
            move |now| {
                let before = std::mem::replace(&mut *upto.lock().unwrap_or_else(PoisonError::into_inner), now);
                if now != before {
                    leases.copied(&map, now);
                }
                if now.is_some() != before.is_some() {
                    moved.notify_one();
                }
            }
        }));
        let follower = Follower::new(id, watcher, subscription, config.retry_delay, listener);
        let task = tokio::spawn(follower.kept_in(self.replicas.clone()).follow());
        tracing::info!(map, "a copy of the map is kept, to take it over where its host is lost");
        Copy {
            id,
            task: task.abort_handle(),
            upto,
            told: None,
            kept_until: None,
        }
    }

    /// How far the copy of a map is, if there is one.
    pub(crate) fn status(&self, map: &str) -> Option<CopyStatus> {
        let id = self.lock().get(map)?.id;
        let kept = self.replicas.status(id)?;
        Some(CopyStatus {
            sequence: kept.at,
            whole: kept.whole,
            states: kept.states,
            bytes: kept.bytes,
        })
    }

    /// What the hub was not told: how far each copy is that is whole.
    fn untold(&self) -> Vec<CopyPosition> {
        let table = self.lock();
        let untold = table.iter().filter_map(|(map, copy)| {
            let upto = copy.upto();
            let sequence = upto.filter(|_| upto != copy.told && copy.kept_until.is_none())?;
            Some(CopyPosition {
                map: map.clone(),
                sequence,
            })
        });
        untold.collect()
    }

    fn note_told(&self, positions: &[CopyPosition]) {
        let mut table = self.lock();
        for position in positions {
            if let Some(copy) = table.get_mut(&position.map) {
                copy.told = Some(position.sequence);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Copy>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Copy {
    fn upto(&self) -> Option<u64> {
        *self.upto.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the hub how far the copies are: at once when one has caught up, then now and then. Ends never.
pub(crate) async fn tell(shared: Arc<Shared>) {
    let copies = &shared.copies;
    loop {
        let moved = copies.moved.notified();
        if copies.lock().is_empty() {
            moved.await;
        } else {
            // Either way it is told what changed.
            let _ = timeout(TELL_EVERY, moved).await;
        }
        let positions = copies.untold();
        if positions.is_empty() {
            continue;
        }
        let told = What::Copies(CopyPositions {
            positions: positions.clone(),
        });
        match call_maps(&shared, told).await {
            Ok(_) => copies.note_told(&positions),
            Err(problem) => {
                tracing::debug!("the hub could not be told how far the copies of maps are: {problem}");
                tokio::time::sleep(TELL_RETRY).await;
            }
        }
    }
}
