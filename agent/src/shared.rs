//! What the agent's threads share: the state between lanes, spooler and link, and how operations are settled.

use std::{
    collections::HashMap,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use crossbeam_channel::{Receiver, Sender};
use p2p_sync_proto::{Code, Policies, Position, Problem, v1};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::{
    clients::Clients,
    clock::Clock,
    config::Config,
    copies::Copies,
    counters::{Counters, add},
    duties::Duties,
    events::Events,
    hand_over::HandOvers,
    keys::Keys,
    lanes::{Lanes, Queued, Taken},
    leases::{Leases, heard_of},
    link::{LinkState, Sent, Session},
    metrics::Metrics,
    near_cache::NearCache,
    outbox::{Change, DeadLetter, Outbox, damaged_record, now_ms},
    pending::{Entry, Flight, Pending},
    resend,
    results::{OperationState, Results, Settled},
    spooler::Alarm,
};

/// How soon an operation is sent again whose predecessor was not settled yet, first and longest.
const NOT_YET_DELAY: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Between two lines of the log that say that the hub wants operations more slowly.
const LIMITED_TOLD_EVERY: Duration = Duration::from_mins(1);

/// How soon what would have left too many gaps is looked at again, at least.
const GAPS_DELAY: Duration = Duration::from_millis(20);

/// What all of the agent's threads share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) keys: Arc<Keys>,
    pub(crate) opening_id: Uuid,
    pub(crate) incarnation: u64,
    /// Messages of this incarnation.
    pub(crate) sent: Arc<Sent>,
    pub(crate) oldest_incarnation: u64,
    pub(crate) lanes: Lanes,
    pub(crate) leases: Arc<Leases>,
    pub(crate) duties: Duties,
    pub(crate) hand_overs: HandOvers,
    pub(crate) copies: Copies,
    pub(crate) metrics: Metrics,
    /// This host gives all its maps away, and wants none.
    pub(crate) leaving: AtomicBool,
    pub(crate) leaving_told: Notify,
    /// Whoever runs the agent is to end it.
    pub(crate) end_asked: Notify,
    pub(crate) critical: Receiver<Queued>,
    pub(crate) pending: Mutex<Pending>,
    pub(crate) results: Results,
    pub(crate) counters: Counters,
    pub(crate) events: Arc<Events>,
    /// Programs that hand their operations over to this agent.
    pub(crate) clients: Arc<Clients>,
    /// On their way to the spooler: one for each settled operation that is on disk, and what is rare.
    pub(crate) changes: Mutex<Vec<Change>>,
    pub(crate) alarm: Alarm,
    pub(crate) critical_wake: Notify,
    pub(crate) bulk_wake: Notify,
    pub(crate) link: LinkState,
    /// The critical lane's, while there is one.
    pub(crate) session: ArcSwapOption<Session>,
    pub(crate) clock: Clock,
    pub(crate) near_cache: Mutex<NearCache>,
    pub(crate) cache_wake: Notify,
    /// A call of the cache has waited in vain, and the hub has not answered one since.
    pub(crate) cache_silent: AtomicBool,
    /// The link ends.
    pub(crate) stopping: AtomicBool,
    /// The link has ended: the spooler writes what is left and ends too.
    pub(crate) finishing: AtomicBool,
    pub(crate) stop_wake: Notify,
    /// When it was told last that the hub wants operations more slowly.
    pub(crate) limited_told: Mutex<Option<Instant>>,
    /// Someone waits for the outbox to be empty: nothing lingers.
    pub(crate) flushing: AtomicBool,
    pub(crate) outbox_bytes: AtomicU64,
    pub(crate) outbox_operations: AtomicU64,
    pub(crate) drained: (Mutex<()>, Condvar),
    pub(crate) dead_letter_requests: (Sender<DeadLetterRequest>, Receiver<DeadLetterRequest>),
}

pub(crate) type DeadLetterRequest = (usize, Sender<Result<Vec<DeadLetter>, Problem>>);

impl Shared {
    pub(crate) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn near_cache(&self) -> MutexGuard<'_, NearCache> {
        self.near_cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn is_finishing(&self) -> bool {
        self.finishing.load(Ordering::SeqCst)
    }

    pub(crate) fn is_disk_full(&self) -> bool {
        self.lanes.disk_full.load(Ordering::Relaxed)
    }

    pub(crate) fn set_disk_full(&self, full: bool) {
        if self.lanes.disk_full.swap(full, Ordering::Relaxed) != full && full {
            tracing::warn!("the outbox is full, or its disk is: `every` operations are refused with QUEUE_FULL");
        }
    }

    pub(crate) fn release_spool_bytes(&self, bytes: usize) {
        self.lanes.spool_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// How long bulk operations wait for others now.
    pub(crate) fn linger(&self) -> Duration {
        if self.flushing.load(Ordering::Relaxed) || self.is_stopping() {
            Duration::ZERO
        } else {
            self.config.linger
        }
    }

    /// The delay before the next attempt of something that failed `attempts` times.
    pub(crate) fn delay(&self, attempts: u32) -> Duration {
        resend::delay(attempts, self.config.retry_delay, fastrand::f64())
    }

    /// Takes critical operations out of their lane into what waits to be sent.
    ///
    /// Each in one step, for the sender and the spooler both do: what one of them has taken the other finds there.
    pub(crate) fn absorb_critical(&self) {
        loop {
            let is_disk_full = self.is_disk_full();
            let mut pending = self.pending();
            let Ok(queued) = self.critical.try_recv() else {
                return;
            };
            let replaced = pending.push(queued.into_entry(), is_disk_full);
            drop(pending);
            self.superseded(replaced, is_disk_full);
        }
    }

    /// Queues an operation to be sent; settles the older one that it replaces, if any.
    pub(crate) fn push(&self, entry: Entry) {
        let is_disk_full = self.is_disk_full();
        let replaced = self.pending().push(entry, is_disk_full);
        self.superseded(replaced, is_disk_full);
    }

    /// Notes that an operation is on disk; false when it is settled already.
    pub(crate) fn spooled(&self, position: Position) -> bool {
        let is_disk_full = self.is_disk_full();
        let (is_here, replaced) = self.pending().mark_spooled(position, is_disk_full);
        self.superseded(replaced, is_disk_full);
        is_here
    }

    fn superseded(&self, replaced: Option<Entry>, is_disk_full: bool) {
        if let Some(older) = replaced {
            let settled = Settled::plain(OperationState::Superseded);
            self.counters.settled(settled.state);
            self.results.note(older.operation_id, older.position, settled);
            // What a full disk never held is written as one with all that is withdrawn, when it can be.
            if older.spooled || !is_disk_full {
                self.change(Change::Withdraw(older.position));
            }
        }
    }

    pub(crate) fn take_changes(&self) -> Vec<Change> {
        std::mem::take(&mut *self.changes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn change(&self, change: Change) {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner).push(change);
    }

    /// A record that does not open any more is kept as a dead letter and told to the hub as withdrawn.
    pub(crate) fn set_aside_damaged(&self, position: Position) {
        let problem = damaged_record(position);
        tracing::error!("{problem}");
        self.pending().withdraw(v1::SequenceRange {
            incarnation: position.incarnation,
            first: position.sequence,
            last: position.sequence,
        });
        self.change(Change::Bury(position, prost::bytes::Bytes::new(), problem));
    }

    /// Takes the hub's policies over and keeps them for the next start.
    pub(crate) fn take_policies(&self, policies: Policies) {
        let differs = policies
            .iter()
            .zip(self.lanes.policies().iter())
            .any(|(new, old)| new != old);
        if differs {
            tracing::info!(
                version = policies.version,
                "the hub's policies differ from those in force here: theirs hold"
            );
        }
        self.lanes.set_policies(policies.clone());
        self.change(Change::Policies(policies));
    }

    /// Notes what of the hub's state the program has read, and keeps it for the next start.
    pub(crate) fn has_read<'s>(&self, states: impl IntoIterator<Item = (&'s str, u64)>) {
        for change in self.lanes.edits.read(states) {
            self.change(change);
        }
    }

    /// Takes over what the hub says of this host's leases and duties as of a moment, and keeps the tenures for the next
    /// start. To be called inside a runtime.
    pub(crate) fn take_leases(self: &Arc<Self>, reply: &v1::RenewReply, at: Instant) {
        let stamped = |tenures| self.lanes.set_tenures(tenures);
        if self.leases.heard_by(reply.governed, heard_of(reply), at, stamped) {
            self.change(Change::Leases(self.leases.to_keep()));
        }
        self.duties.heard(&reply.duties);
        self.hand_overs.heard(self, &reply.duties, at);
        self.copies.heard(self, &reply.duties);
    }

    /// Takes over what the hub told of leases between two renewals, as far as it holds in any case, and has them renewed.
    pub(crate) fn notice_leases(&self, reply: &v1::RenewReply) {
        let stamped = |tenures| self.lanes.set_tenures(tenures);
        if self.leases.noticed(heard_of(reply), Instant::now(), stamped) {
            self.change(Change::Leases(self.leases.to_keep()));
        }
        self.leases.told.notify_one();
    }

    /// Whether everything that was made for a map that is handed over, and for players, before a position is settled.
    pub(crate) fn has_settled_of(&self, map: &str, before: Position) -> bool {
        self.absorb_critical();
        // First: what leaves the lanes has come to the others before.
        let is_nothing_in_lanes = self.lanes.spool_bytes.load(Ordering::SeqCst) == 0;
        let pending = self.pending();
        (is_nothing_in_lanes || pending.has_passed(before)) && pending.has_settled_of(map, before)
    }

    /// Has the lanes take something, told of by an event where it is asked for, and wakes whom it needs.
    pub(crate) fn take(
        &self,
        notify: bool,
        into_lanes: impl FnOnce(&dyn Fn(&Taken)) -> Result<Taken, Problem>,
    ) -> Result<Uuid, Problem> {
        let (results, events) = (&self.results, &self.events);
        if notify {
            events.reserve_settled()?;
        }
        let taken = into_lanes(&|taken| {
            results.accept(taken.operation_id, taken.position, taken.made_at_ms, notify);
        });
        if taken.is_err() && notify {
            events.release_settled();
        }
        let taken = taken.inspect_err(|_| add(&self.counters.refused))?;
        add(&self.counters.taken);
        self.alarm.ring_if_asleep();
        if taken.wakes_sender {
            self.critical_wake.notify_one();
        }
        Ok(taken.operation_id)
    }

    /// Settles what a message carried by what the hub answered.
    pub(crate) fn answer(&self, flight: &Flight, reply: v1::BatchReply) {
        let now = Instant::now();
        let code = Code::try_from(reply.code).unwrap_or(Code::Internal);
        if code == Code::TooManyGaps {
            if self.pending().close_gaps() {
                tracing::info!(
                    "the hub has too many gaps between what it settled: the oldest operations go first for a while"
                );
            }
            return self.put_back(flight, GAPS_DELAY);
        }
        let at_least = Duration::from_millis(u64::from(reply.retry_after_ms));
        let is_limited = |outcome: &v1::Outcome| outcome.code() == Code::RateLimited;
        if code == Code::RateLimited || reply.outcomes.iter().any(is_limited) {
            self.tell_limited(&reply.message);
        } else if code != Code::None {
            tracing::warn!(%code, reason = reply.message, "the hub did not decide a batch; it is sent again");
        }
        if code != Code::None {
            return self.put_back(flight, at_least);
        }
        let mut outcomes: HashMap<usize, v1::Outcome> = reply
            .outcomes
            .into_iter()
            .map(|outcome| (outcome.index as usize, outcome))
            .collect();
        for (index, (position, bytes)) in flight.operations.iter().enumerate() {
            let outcome = outcomes.remove(&index);
            let at_least = if outcome.as_ref().is_some_and(is_limited) {
                at_least
            } else {
                Duration::ZERO
            };
            if let Some(outcome) = outcome.as_ref().filter(|outcome| !outcome.hub_edits.is_empty()) {
                // Before it is told: who hears of it and writes on has seen it.
                for change in self.lanes.edits.told(bytes, &outcome.hub_edits, now_ms()) {
                    self.change(change);
                }
            }
            match outcome.map(|outcome| settled_by(outcome.state, outcome.code, outcome.message)) {
                None => self.settle(*position, Settled::plain(OperationState::Applied)),
                Some(Some(settled)) => self.settle(*position, settled),
                Some(None) => self.pending().not_yet(*position, now, |attempts| {
                    resend::delay(attempts, NOT_YET_DELAY, fastrand::f64()).max(at_least)
                }),
            }
        }
        self.pending().decided();
        if !flight.withdrawn.is_empty() {
            self.pending().withdrawn_told(&flight.withdrawn);
            self.change(Change::WithdrawnTold(flight.withdrawn.clone()));
        }
        self.critical_wake.notify_one();
        self.bulk_wake.notify_one();
    }

    /// Tells now and then that the hub wants this host's operations more slowly.
    fn tell_limited(&self, reason: &str) {
        let mut told = self.limited_told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() >= LIMITED_TOLD_EVERY) {
            *told = Some(Instant::now());
            tracing::warn!(
                reason,
                "the hub takes operations more slowly than they are made; they are kept and sent later"
            );
        }
    }

    /// Puts back what was not answered, to be sent again; after `at_least`, if the hub said so.
    pub(crate) fn put_back(&self, flight: &Flight, at_least: Duration) {
        let delay = |attempts| self.delay(attempts).max(at_least);
        self.pending().put_back(flight, Instant::now(), delay);
        // Whoever sleeps has to learn until when.
        self.critical_wake.notify_one();
        self.bulk_wake.notify_one();
    }

    fn settle(&self, position: Position, settled: Settled) {
        // Gone already: another message that carried it was answered first.
        let Some(entry) = self.pending().remove(position) else {
            return;
        };
        for path in entry.ordered_paths() {
            self.lanes.settled(path, position);
        }
        if self.config.debug {
            tracing::info!(operation_id = %entry.operation_id, path = %entry.path, state = ?settled.state, "settled");
        }
        let not_holder = |problem: &Problem| problem.code == Code::NotLeaseHolder;
        if settled.state == OperationState::Limbo || settled.problem.as_ref().is_some_and(not_holder) {
            self.leases.doubt.notify_one();
        }
        let change = match &settled.problem {
            Some(problem) if settled.state == OperationState::Rejected => {
                tracing::warn!(operation_id = %entry.operation_id, path = %entry.path, %problem, "the hub refused an operation");
                Some(Change::Bury(position, entry.bytes, problem.clone()))
            }
            // What is not on disk yet is taken out by the spooler, should it be written after all.
            _ => entry.spooled.then_some(Change::Remove(position)),
        };
        // What was read back from disk as it was settled comes here twice.
        if !self.results.is_settled(entry.operation_id) {
            self.counters.settled(settled.state);
        }
        // Told before the record goes: who is killed in between is told again, never left without an answer.
        self.results.note(entry.operation_id, position, settled);
        if let Some(change) = change {
            self.change(change);
        }
    }

    /// Answers those who ask for dead letters; called by the thread that holds the outbox.
    pub(crate) fn serve_requests(&self, outbox: &Outbox) {
        for (letters_max, reply) in self.dead_letter_requests.1.try_iter() {
            let letters = outbox.dead_letters(letters_max);
            let _ = reply.send(letters.map_err(|error| Problem::new(Code::OutboxUnreadable, error.to_string())));
        }
    }

    /// Notes the outbox's size, and tells those who wait for it to be empty.
    pub(crate) fn report(&self, outbox: &Outbox) {
        self.outbox_bytes.store(outbox.bytes(), Ordering::Relaxed);
        self.outbox_operations.store(outbox.operations(), Ordering::Relaxed);
        if self.is_drained() {
            let _guard = self.drained.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.drained.1.notify_all();
        }
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.lanes.spool_bytes.load(Ordering::Relaxed) == 0
            && self.critical.is_empty()
            && self.pending().is_drained()
            && self.outbox_operations.load(Ordering::Relaxed) == 0
    }
}

/// What an outcome settles; `None`: not decided yet.
pub(crate) fn settled_by(state: i32, code: i32, message: String) -> Option<Settled> {
    let code = Code::try_from(code).unwrap_or(Code::Internal);
    let problem = (code != Code::None).then(|| Problem::new(code, message));
    let state = match v1::OutcomeState::try_from(state) {
        // The hub has the path at this version or a newer one: that is what applied means.
        Ok(v1::OutcomeState::Applied | v1::OutcomeState::Superseded) => OperationState::Applied,
        Ok(v1::OutcomeState::Rejected) => OperationState::Rejected,
        Ok(v1::OutcomeState::Limbo) => OperationState::Limbo,
        Ok(v1::OutcomeState::NotYet) | Err(_) => return None,
    };
    Some(Settled {
        problem,
        ..Settled::plain(state)
    })
}
