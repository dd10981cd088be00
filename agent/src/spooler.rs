//! The one thread that writes the outbox: groups what was taken and what was settled into commits.
//!
//! It looks every few milliseconds instead of being woken for each operation, because waking a thread costs a caller
//! more than everything else an enqueue does. After a second without work it sleeps, and the next caller wakes it once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Position, Problem, ids, v1::Operation};
use prost::Message as _;

use crate::{
    clients::HandedOver,
    lanes::Queued,
    outbox::{Change, Outbox, Record, is_full},
    pending::{BYTES_MAX, Entry, GroupOrder},
    results::{OperationState, Settled},
    shared::Shared,
};

/// What is taken is on disk within this and one commit.
pub(crate) const COMMIT_WINDOW: Duration = Duration::from_millis(5);
/// Without work for so long, the thread sleeps until it is woken.
pub(crate) const SLEEP_AFTER: Duration = Duration::from_secs(1);
/// How often a full or failing disk is tried again.
const DISK_RETRY: Duration = Duration::from_millis(500);
/// A full outbox takes operations again when it has drained to this part of its bound.
const REFILL_BELOW: f64 = 0.9;
/// Records read back from disk at a time.
const PAGE_RECORDS: usize = 1024;
/// Of their sealed bytes.
const PAGE_BYTES: u64 = BYTES_MAX as u64 / 4;

/// Wakes the spooler, if it sleeps.
#[derive(Default)]
pub(crate) struct Alarm {
    asleep: AtomicBool,
    thread: std::sync::OnceLock<Thread>,
}

impl Alarm {
    /// Called after each enqueue: one load of a flag that hardly ever changes.
    pub(crate) fn ring_if_asleep(&self) {
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Names the calling thread as the one to wake; the first one stays it.
    pub(crate) fn wakes_this_thread(&self) {
        let _ = self.thread.set(thread::current());
    }

    /// Sleeps until rung, a second at most, unless there is work after all.
    pub(crate) fn sleep_unless(&self, is_work: impl FnOnce() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        // What came before the flag was seen would not have rung.
        if !is_work() {
            thread::park_timeout(SLEEP_AFTER);
        }
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Wakes the spooler now.
    pub(crate) fn ring(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

pub(crate) struct Spooler {
    shared: Arc<Shared>,
    spool: crossbeam_channel::Receiver<Queued>,
    outbox: Outbox,
    /// Changes whose commit failed.
    unwritten: Vec<Change>,
    /// Operations of attached programs that no disk took yet: unlike ours they are not sent before.
    held: Vec<Entry>,
    disk_tried: Instant,
    busy: Instant,
}

impl Spooler {
    pub(crate) fn new(shared: Arc<Shared>, spool: crossbeam_channel::Receiver<Queued>, outbox: Outbox) -> Self {
        let now = Instant::now();
        Self {
            shared,
            spool,
            outbox,
            unwritten: Vec::new(),
            held: Vec::new(),
            disk_tried: now,
            busy: now,
        }
    }

    /// Runs until the agent stops, and then until what was taken is on disk; gives how many operations no disk took.
    pub(crate) fn run(mut self) -> usize {
        self.shared.alarm.wakes_this_thread();
        loop {
            // Not before the link has ended: what it settles last, and what our own bounds kept in memory, is written then.
            let finishing = self.shared.is_finishing();
            let worked = self.round();
            if finishing && self.is_done() {
                self.round();
                if self.is_done() {
                    return self.tell_of_loss();
                }
            }
            if worked {
                self.busy = Instant::now();
            }
            self.rest();
        }
    }

    /// Nothing waits to be written, or nothing can be.
    fn is_done(&self) -> bool {
        self.spool.is_empty() || self.shared.is_disk_full()
    }

    /// What no disk took by the end is lost with this process.
    fn tell_of_loss(&self) -> usize {
        // An attached program keeps its own until they are on disk.
        let elsewhere = self.shared.clients.waiting_ops().saturating_sub(self.held.len());
        let operations = self.spool.len().saturating_sub(elsewhere) + self.shared.pending().unspooled().len();
        if operations > 0 {
            tracing::error!(
                operations,
                "the disk takes nothing: these operations were in memory alone and are lost"
            );
        }
        operations
    }

    fn rest(&self) {
        if self.busy.elapsed() < SLEEP_AFTER || !self.unwritten.is_empty() || self.shared.is_disk_full() {
            return thread::park_timeout(COMMIT_WINDOW);
        }
        self.shared.alarm.sleep_unless(|| !self.spool.is_empty());
    }

    /// One group: what was settled, what was taken, and what memory has room for.
    fn round(&mut self) -> bool {
        // Settlements first: what they settle was taken before, and is in this group or an earlier one.
        let mut changes = std::mem::take(&mut self.unwritten);
        changes.append(&mut self.shared.take_changes());
        if self.shared.is_disk_full() {
            return self.round_on_full_disk(changes);
        }
        let entries: Vec<Entry> = self.spool.try_iter().map(Queued::into_entry).collect();
        let worked = !changes.is_empty() || !entries.is_empty();
        let last = last_position(&entries);
        let handed_over = self.shared.clients.take_up_to(last);
        let unsettled = self.unsettled(entries);
        self.commit(changes, unsettled, handed_over);
        if let Some(last) = last.filter(|_| !self.shared.is_disk_full()) {
            self.shared.pending().note_passed(last);
        }
        self.read_backlog();
        self.shared.serve_requests(&self.outbox);
        self.shared.report(&self.outbox);
        worked
    }

    /// Leaves out critical operations that the hub has answered in the meantime: they need no place on disk.
    fn unsettled(&self, mut entries: Vec<Entry>) -> Vec<Entry> {
        self.shared.absorb_critical();
        let pending = self.shared.pending();
        entries.retain(|entry| {
            let is_settled = entry.sent_while_spooled && !pending.contains(entry.position);
            if is_settled {
                self.shared.release_spool_bytes(entry.reserved_bytes);
            }
            !is_settled
        });
        entries
    }

    fn commit(&mut self, mut changes: Vec<Change>, entries: Vec<Entry>, handed_over: HandedOver) {
        let settlements = changes.len();
        changes.extend(entries.iter().map(insertion));
        changes.extend(handed_over.changes());
        match self.outbox.commit(&changes) {
            Ok(()) => {
                self.spooled(entries);
                self.shared.clients.on_disk(&handed_over);
                if self.outbox.bytes() >= self.shared.config.outbox_bytes_max {
                    self.shared.set_disk_full(true);
                }
            }
            Err(error) => {
                tracing::error!(%error, "the outbox cannot be written: operations are kept in memory alone");
                changes.truncate(settlements);
                self.unwritten = changes;
                self.shared.set_disk_full(true);
                if is_full(&error) {
                    self.outbox.give_up_reserve();
                }
                self.disk_tried = Instant::now();
                let (theirs, ours) = entries
                    .into_iter()
                    .partition(|entry| handed_over.contains(entry.position));
                self.held = theirs;
                self.shared.clients.put_back(handed_over);
                self.keep_in_memory(ours);
            }
        }
    }

    /// Hands what is now on disk to the link.
    fn spooled(&mut self, entries: Vec<Entry>) {
        if entries.is_empty() {
            return;
        }
        let wakes_critical = entries.iter().any(|entry| entry.critical && !entry.sent_while_spooled);
        for mut entry in entries {
            let reserved_bytes = entry.reserved_bytes;
            entry.spooled = true;
            let spooled = Settled::plain(OperationState::Spooled);
            self.shared.results.note(entry.operation_id, entry.position, spooled);
            if entry.sent_while_spooled {
                self.mark_spooled(entry.position);
            } else {
                self.shared.push(entry);
            }
            // Last: whoever sees that nothing waits here has to see it there.
            self.shared.release_spool_bytes(reserved_bytes);
        }
        if wakes_critical {
            self.shared.critical_wake.notify_one();
        }
        self.shared.bulk_wake.notify_one();
    }

    fn mark_spooled(&mut self, position: Position) {
        if !self.shared.spooled(position) {
            // Answered while it was written.
            self.unwritten.push(Change::Remove(position));
        }
    }

    /// What no disk takes is sent from memory; there a `latest` operation takes the place of an older one of its path.
    fn keep_in_memory(&self, entries: Vec<Entry>) {
        self.shared.absorb_critical();
        for entry in entries {
            let reserved_bytes = entry.reserved_bytes;
            if !entry.sent_while_spooled {
                self.shared.push(entry);
            }
            self.shared.release_spool_bytes(reserved_bytes);
        }
        self.shared.critical_wake.notify_one();
        self.shared.bulk_wake.notify_one();
    }

    /// While the disk takes nothing: drains, keeps what memory has room for, and tries the disk now and then.
    fn round_on_full_disk(&mut self, changes: Vec<Change>) -> bool {
        self.unwritten = changes;
        let room = self
            .shared
            .config
            .queue_ops_max
            .saturating_sub(self.shared.pending().len());
        let entries = self.spool.try_iter().take(room).map(Queued::into_entry);
        let (theirs, ours): (Vec<Entry>, _) = entries.partition(|entry| self.shared.clients.is_waiting(entry.position));
        self.held.extend(theirs);
        self.keep_in_memory(ours);
        let due = self.disk_tried.elapsed() >= DISK_RETRY || self.shared.is_finishing();
        if due && let Err(error) = self.try_disk() {
            tracing::debug!(%error, "the outbox still cannot be written");
        }
        if self.outbox.is_open() {
            self.read_backlog();
        }
        self.shared.serve_requests(&self.outbox);
        self.shared.report(&self.outbox);
        true
    }

    fn try_disk(&mut self) -> Result<(), Problem> {
        self.disk_tried = Instant::now();
        self.outbox.reopen().inspect_err(|_| self.outbox.give_up_reserve())?;
        let failed = |error: redb::Error| Problem::new(Code::DiskError, error.to_string());
        let changes = std::mem::take(&mut self.unwritten);
        if let Err(error) = self.outbox.commit(&changes) {
            self.unwritten = changes;
            if is_full(&error) {
                self.outbox.give_up_reserve();
            }
            return Err(failed(error));
        }
        self.read_backlog();
        #[allow(clippy::cast_precision_loss)]
        let is_roomy = (self.outbox.bytes() as f64) < self.shared.config.outbox_bytes_max as f64 * REFILL_BELOW;
        // At the end our own bounds no longer count: what is not written now is lost.
        let is_last_chance = self.shared.is_finishing();
        if !is_roomy && !is_last_chance {
            return Ok(());
        }
        if !is_last_chance && self.outbox.make_reserve().is_err() {
            if self.outbox.operations() > 0 {
                return Ok(());
            }
            // Drained, and the file still holds what the disk lacks.
            self.outbox.compact();
            self.outbox
                .make_reserve()
                .map_err(|error| Problem::new(Code::DiskError, error.to_string()))?;
        }
        let entries = self.shared.pending().unspooled();
        let withdrawn = self.shared.pending().withdrawn().into_iter().map(Change::Withdrawn);
        let handed_over = self.shared.clients.take_up_to(last_position(&self.held));
        let mut changes: Vec<Change> = entries.iter().chain(&self.held).map(insertion).collect();
        changes.extend(withdrawn.chain(handed_over.changes()));
        if let Err(error) = self.outbox.commit(&changes) {
            self.shared.clients.put_back(handed_over);
            return Err(failed(error));
        }
        let held = std::mem::take(&mut self.held);
        self.spooled(held);
        self.shared.clients.on_disk(&handed_over);
        for entry in entries {
            let spooled = Settled::plain(OperationState::Spooled);
            self.shared.results.note(entry.operation_id, entry.position, spooled);
            self.mark_spooled(entry.position);
        }
        self.shared.set_disk_full(false);
        tracing::info!("the outbox can be written again");
        Ok(())
    }

    /// Reads back what was left to the disk, as memory has room: first what is hastened, wherever it lies.
    fn read_backlog(&self) {
        let wanted = self.shared.pending().wants_hastened();
        if let Some((from, to, room)) = wanted
            && let Some((mut entries, next)) = self.read_page(from, to, room)
        {
            entries.retain(|entry| self.shared.pending().hastens(entry));
            self.note_spooled(&entries);
            self.shared.pending().take_hastened(from, entries, next);
            self.shared.bulk_wake.notify_one();
        }
        let wanted = self.shared.pending().wants_backlog();
        if let Some((from, to, room)) = wanted
            && let Some((entries, next)) = self.read_page(from, to, room)
        {
            self.note_spooled(&entries);
            self.shared.pending().take_back(from, entries, next);
            self.shared.bulk_wake.notify_one();
        }
    }

    /// A page of what lies between two positions, and where to read on.
    fn read_page(&self, from: Position, to: Position, room: usize) -> Option<(Vec<Entry>, Option<Position>)> {
        let (page, next) = match self.outbox.read(from, room.min(PAGE_RECORDS), PAGE_BYTES) {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(%error, "the outbox cannot be read");
                return None;
            }
        };
        let mut entries = Vec::with_capacity(page.len());
        for (position, _, record) in page.into_iter().take_while(|(position, ..)| *position <= to) {
            match record.and_then(|record| entry_of(position, record)) {
                // Settled since the last commit: the next one removes it.
                Some(entry) if self.shared.results.is_settled(entry.operation_id) => {}
                Some(entry) => entries.push(entry),
                None => self.shared.set_aside_damaged(position),
            }
        }
        Some((entries, next))
    }

    fn note_spooled(&self, entries: &[Entry]) {
        for entry in entries {
            let spooled = Settled::plain(OperationState::Spooled);
            self.shared.results.note(entry.operation_id, entry.position, spooled);
        }
    }
}

fn last_position(entries: &[Entry]) -> Option<Position> {
    entries.last().map(|entry| entry.position)
}

fn insertion(entry: &Entry) -> Change {
    let record = Record {
        operation: entry.bytes.clone(),
        critical: entry.critical,
        every: entry.every,
    };
    Change::Insert(entry.position, record)
}

fn entry_of(position: Position, record: Record) -> Option<Entry> {
    let operation = Operation::decode(record.operation.clone()).ok()?;
    let group = GroupOrder::of(&operation);
    Some(Entry {
        position,
        operation_id: ids::read_id(&operation.operation_id)?,
        path: operation.path.into(),
        every: record.every,
        // What was left to the disk is late already: it goes by bulk, behind nothing critical.
        critical: false,
        sent_while_spooled: false,
        predecessor: operation.predecessor.map(Into::into),
        presence: operation.presence.map(Into::into),
        group,
        bytes: record.operation,
        reserved_bytes: 0,
        spooled: true,
    })
}
