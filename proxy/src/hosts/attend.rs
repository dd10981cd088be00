//! What hosts are told of what they hold and are asked to do, as soon as it changes.
//!
//! A proxy looks at the assignments when it has changed one itself, when another one says by Redis that it did, and a few times a
//! second, for commands are processes of their own and Redis may lose what it is told. It reads them once for all hosts that
//! attend here; each of them waits for what concerns it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem, ids::new_id, v1};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, watch},
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::reply;
use crate::{
    admission::hosts::{AttendPlace, Host},
    open::Sender,
    pipeline::Hub,
    redis_client::RedisClient,
    store::{Standing, Store},
    streams::End,
};

/// Between two notices, whatever happens.
pub const HEARTBEAT: Duration = Duration::from_secs(3);
/// Who takes nothing of what waits for it for so long is cut; it attends anew when it likes.
const SLOW_MAX: Duration = Duration::from_secs(10);
/// Between two looks whether something changed that nobody told of.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Between two notes which hosts attend.
const NOTE_INTERVAL: Duration = Duration::from_secs(2);

/// The channel by which proxies tell each other that assignments have changed.
pub fn channel(prefix: &str) -> String {
    format!("{prefix}:maps")
}

/// The hosts that attend on this proxy.
#[derive(Debug, Default)]
pub struct Attends {
    open: Mutex<HashMap<Uuid, Open>>,
    /// Assignments have changed, maybe.
    look: Notify,
    /// As `look`, for who assigns.
    assign: Notify,
    /// Others are to be told, by whom it reaches.
    tell: Arc<Notify>,
}

#[derive(Debug)]
struct Open {
    host_id: Uuid,
    leaving: bool,
    keeps_no_copies: bool,
    standing: watch::Sender<Arc<Standing>>,
}

impl Attends {
    /// For a hub of one process.
    pub fn process() -> Self {
        Self::default()
    }

    /// For one of several proxies; the task that tells the others ends when this is dropped.
    pub fn redis(client: RedisClient, prefix: &str) -> Self {
        let attends = Self::default();
        let (tell, channel) = (Arc::downgrade(&attends.tell), channel(prefix));
        tokio::spawn(async move {
            let mut client = client;
            while let Some(tell) = tell.upgrade() {
                // Looked at now and then, for nobody tells when it is dropped.
                let Ok(()) = timeout(HEARTBEAT, tell.notified()).await else {
                    continue;
                };
                let told = client.publish(redis::pipe().publish(&channel, "")).await;
                if let Err(error) = told {
                    tracing::debug!(%error, "other proxies are not told that maps changed hands; they look by themselves");
                }
            }
        });
        attends
    }

    /// Notes that this proxy has changed an assignment. Never waits.
    pub fn tell(&self) {
        self.tell.notify_one();
        self.hear();
    }

    /// Notes that somebody has.
    pub fn hear(&self) {
        self.look.notify_one();
        self.assign.notify_one();
    }

    /// Waits until assignments have changed, for the one that assigns.
    pub async fn changed(&self) {
        self.assign.notified().await;
    }

    /// Tells attending hosts what changes, as long as the proxy serves.
    pub async fn run(hub: Arc<Hub>) {
        if !hub.store.leases().required {
            return;
        }
        let attends = &hub.attends;
        let mut seen = None;
        let mut noted = Instant::now();
        loop {
            // Either way it is time.
            let _asked = timeout(LOOK_INTERVAL, attends.look.notified()).await;
            if noted.elapsed() >= NOTE_INTERVAL {
                noted = Instant::now();
                attends.note(&hub.store).await;
            }
            // What cannot be read now is read at the next look.
            if let Ok(changes) = hub.store.assignment_changes().await
                && seen != Some(changes)
                && attends.look(&hub.store).await.is_ok()
            {
                seen = Some(changes);
                attends.assign.notify_one();
            }
        }
    }

    /// Reads what all hosts here hold and are asked to do, and wakes those of whom that has changed.
    async fn look(&self, store: &Store) -> Result<(), Problem> {
        let mut hosts: Vec<Uuid> = lock(&self.open).values().map(|open| open.host_id).collect();
        hosts.sort_unstable();
        hosts.dedup();
        if hosts.is_empty() {
            return Ok(());
        }
        let standings: HashMap<Uuid, Arc<Standing>> = store
            .standings(&hosts)
            .await?
            .into_iter()
            .map(|(host, standing)| (host, Arc::new(standing)))
            .collect();
        let nothing = Arc::new(Standing::default());
        for open in lock(&self.open).values() {
            // One that came since has read for itself.
            if hosts.binary_search(&open.host_id).is_err() {
                continue;
            }
            let now = standings.get(&open.host_id).unwrap_or(&nothing);
            open.standing.send_if_modified(|before| {
                let is_other = !before.is_same(now);
                if is_other {
                    *before = Arc::clone(now);
                }
                is_other
            });
        }
        Ok(())
    }

    /// Notes in the database who attends here.
    async fn note(&self, store: &Store) {
        let attending: Vec<(Uuid, bool, bool)> = lock(&self.open)
            .values()
            .map(|open| (open.host_id, open.leaving, open.keeps_no_copies))
            .collect();
        if !attending.is_empty()
            && let Err(problem) = store.note_attendances(&attending).await
        {
            tracing::debug!(%problem, "it could not be noted which hosts attend");
        }
    }
}

/// A host that attends: see the module.
pub struct Attend {
    hub: Arc<Hub>,
    host: Arc<Host>,
    sender: Sender,
    /// Under which its notices are sealed.
    id: Uuid,
    /// Notices sealed so.
    sealed: u64,
    told: Arc<Standing>,
    standing: watch::Receiver<Arc<Standing>>,
    heartbeat: Instant,
    /// The notice before was given so long ago; its bytes are counted until the next is asked for.
    given: Option<(Instant, OwnedSemaphorePermit)>,
    end: Arc<End>,
    has_ended: bool,
    _place: AttendPlace,
}

impl Attend {
    /// Begins; gives the answer, which is the first notice and tells what the host holds now, and what goes on behind it unless
    /// it is refused.
    pub async fn begin(
        hub: &Arc<Hub>,
        host: &Arc<Host>,
        sender: Sender,
        request: &v1::AttendRequest,
    ) -> (v1::Sealed, Option<Self>) {
        let (id, end, host_id) = (new_id(), Arc::<End>::default(), sender.host_id());
        // Whoever has recorded that a host leaves could say so again when it is back.
        let incarnation = sender.label().incarnation;
        if let Err(problem) = hub.store.check_incarnation(host_id, incarnation).await {
            return (refused(&sender, problem), None);
        }
        let place = host.attend(&end);
        let (standings, standing) = watch::channel(Arc::<Standing>::default());
        let open = Open {
            host_id,
            leaving: request.leaving,
            keeps_no_copies: request.keeps_no_copies,
            standing: standings,
        };
        // First, so that no change is missed that comes after the reading.
        lock(&hub.attends.open).insert(id, open);
        let mut attend = Self {
            hub: Arc::clone(hub),
            host: Arc::clone(host),
            sender,
            id,
            sealed: 0,
            told: Arc::default(),
            standing,
            heartbeat: Instant::now() + HEARTBEAT,
            given: None,
            end,
            has_ended: false,
            _place: place,
        };
        let read = attend.read((host_id, request.leaving, request.keeps_no_copies)).await;
        if let Err(problem) = read {
            return (refused(&attend.sender, problem), None);
        }
        hub.streams
            .open(id, host_id, attend.sender.label().generation, &attend.end);
        // It may be the one that a map waits for.
        hub.attends.assign.notify_one();
        let first = v1::Notice {
            attend_id: id.as_bytes().to_vec().into(),
            heartbeat_ms: u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX),
            leases: Some(attend.reply()),
            ..Default::default()
        };
        (attend.sender.seal(&first), Some(attend))
    }

    /// Notes that the host attends, and reads what it holds.
    async fn read(&mut self, attendance: (Uuid, bool, bool)) -> Result<(), Problem> {
        let store = &self.hub.store;
        if store.leases().required {
            store.note_attendances(&[attendance]).await?;
            let mut standings = store.standings(&[attendance.0]).await?;
            self.told = Arc::new(standings.remove(&attendance.0).unwrap_or_default());
        }
        Ok(())
    }

    fn reply(&self) -> v1::RenewReply {
        reply(&self.hub, &self.sender, &Standing::clone(&self.told).now())
    }

    /// The next notice, when there is one; none after the last.
    pub async fn next(&mut self) -> Option<v1::Sealed> {
        if self.has_ended {
            return None;
        }
        let given = self.given.take();
        let is_slow = given.is_some_and(|(at, _)| at.elapsed() > SLOW_MAX);
        let notice = if is_slow {
            let sentence = "no notice was read for too long: attend anew";
            said(Problem::new(Code::TooSlow, sentence))
        } else {
            self.next_notice().await?
        };
        self.has_ended = notice.code() != v1::RejectCode::None;
        self.sealed += 1;
        let sealed = self.sender.seal_numbered(self.id, self.sealed, &notice);
        let mut draining = self.hub.draining.clone();
        let room = tokio::select! {
            room = self.host.answering(sealed.body.len()) => room,
            _ = draining.wait_for(|draining| *draining) => return None,
        };
        self.given = Some((Instant::now(), room));
        Some(sealed)
    }

    /// None where the hub shuts down.
    async fn next_notice(&mut self) -> Option<v1::Notice> {
        let mut draining = self.hub.draining.clone();
        loop {
            if *draining.borrow() {
                return None;
            }
            if let Some(problem) = self.end.reason() {
                return Some(said(problem));
            }
            if self.standing.has_changed().unwrap_or(false) {
                let now = Arc::clone(&self.standing.borrow_and_update());
                if !now.is_same(&self.told) {
                    self.told = now;
                    return Some(v1::Notice {
                        leases: Some(self.reply()),
                        ..Default::default()
                    });
                }
            }
            if Instant::now() >= self.heartbeat {
                self.heartbeat = Instant::now() + HEARTBEAT;
                return Some(v1::Notice::default());
            }
            let end = Arc::clone(&self.end);
            let rest = self.heartbeat.saturating_duration_since(Instant::now());
            tokio::select! {
                // An error means that this attend is not listed any more, and that is by its own end.
                _ = self.standing.changed() => self.standing.mark_changed(),
                () = sleep(rest) => {}
                () = end.told.notified() => {}
                // An error means that nobody is left to drain for.
                _ = draining.wait_for(|draining| *draining) => return None,
            }
        }
    }
}

/// The answer that nothing is told.
pub fn refused(sender: &Sender, problem: Problem) -> v1::Sealed {
    sender.seal(&said(problem))
}

fn said(problem: Problem) -> v1::Notice {
    let problem = problem.shortened();
    v1::Notice {
        code: problem.code.into(),
        message: problem.sentence,
        ..Default::default()
    }
}

impl Drop for Attend {
    fn drop(&mut self) {
        lock(&self.hub.attends.open).remove(&self.id);
        self.hub.streams.closed(self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
