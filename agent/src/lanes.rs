//! Where operations are taken: checked, numbered and put into the lanes, without waiting for disk or network.

mod chunks;
mod group;
mod presences;
mod tails;

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender};
use p2p_sync_proto::{
    Code, Policies, Policy, Position, Problem,
    ids::{IdSource, Numbering},
    json,
    operation::OperationParts,
    path::Path,
    policy::{Keep, Place},
    presence,
    v1::{OperationKind, SyncDataType},
};
use prost::bytes::Bytes;
use uuid::Uuid;

use crate::{
    edits::Edits,
    outbox::now_ms,
    pending::{Entry, GroupOrder},
};

use chunks::Chunks;
pub(crate) use group::check_group;
pub(crate) use presences::{Presences, is_presence, owner_of_account, player_of};
use tails::Tails;

/// Bytes of operations that may wait to be spooled.
pub(crate) const SPOOL_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Counted for an operation beside its payload.
pub(crate) const OPERATION_BYTES: usize = 256;
/// Room in the spool lane that only critical operations may use: a burst of bulk leaves it free.
pub(crate) const CRITICAL_ROOM_OPS: usize = 1024;

/// One thing that happened, as a caller tells it.
#[derive(Clone, Debug)]
pub struct Submission<'a> {
    /// What it tells of.
    pub data_type: SyncDataType,
    /// Where it happened; may be empty where the type's owner is not a map.
    pub map: &'a str,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Which one of its owner's; `None`: the payload says.
    pub entity: Option<&'a str>,
    /// The character, where the owner is one; `None`: the payload says.
    pub char_id: Option<u64>,
    /// JSON; `None` deletes the path.
    pub payload: Option<&'a str>,
    /// Which lane.
    pub priority: Priority,
    /// When it is settled, an [`crate::AgentEvent::Settled`] is told.
    pub notify: bool,
}

/// Which lane an operation takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// As the type's policy says.
    #[default]
    ByType,
    /// The critical lane, whatever the type.
    Critical,
}

/// An operation that was taken.
#[derive(Clone, Debug)]
pub(crate) struct Taken {
    pub(crate) operation_id: Uuid,
    pub(crate) position: Position,
    /// The critical lane's sender is parked, and has to be woken for this one.
    pub(crate) wakes_sender: bool,
    /// Milliseconds since 1970.
    pub(crate) made_at_ms: u64,
}

/// What an operation of an attached program brings along: it was made there, not here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MadeElsewhere {
    pub(crate) operation_id: Uuid,
    pub(crate) at_ms: u64,
}

/// The two lanes' entrances.
pub(crate) struct Lanes {
    host_id: Uuid,
    policies: ArcSwap<Policies>,
    /// What operations of each map carry; 0 where there is none.
    tenures: ArcSwap<HashMap<Box<str>, u64>>,
    /// What operations say that they had seen.
    pub(crate) edits: Edits,
    order: Mutex<Order>,
    spool_ops_max: usize,
    /// Reserved by operations waiting to be spooled; 0 when none does.
    pub(crate) spool_bytes: AtomicUsize,
    /// The outbox takes nothing: at its bound, or the disk under it is full or failing.
    pub(crate) disk_full: AtomicBool,
}

/// What has to change together for each operation, so that positions, lanes and predecessors agree.
struct Order {
    next: Position,
    ids: IdSource,
    chunks: Chunks,
    /// The last unsettled operation of each path kept as `every`.
    tails: Tails,
    presences: Presences,
    spool: Sender<Queued>,
    critical: Sender<Queued>,
    /// Who takes the critical lane out waits to be woken. Here, so that it is seen with what is queued.
    sender_parked: bool,
    closed: bool,
}

/// Where the lanes come out.
pub(crate) struct Exits {
    /// Every operation, in the order of their positions.
    pub(crate) spool: Receiver<Queued>,
    /// Critical operations besides, to be sent while they are spooled.
    pub(crate) critical: Receiver<Queued>,
}

/// An operation as it lies in the lanes: nothing is allocated for it alone.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    pub(crate) position: Position,
    operation_id: Uuid,
    every: bool,
    critical: bool,
    sent_while_spooled: bool,
    pub(crate) predecessor: Option<Position>,
    presence: Option<Position>,
    group: Option<Arc<GroupOrder>>,
    /// Canonical bytes, in a chunk with those of others.
    pub(crate) bytes: Bytes,
    /// Where the path lies in them; nowhere for a group.
    path: Range<usize>,
    reserved_bytes: usize,
}

impl Queued {
    /// The operation by itself, for whoever keeps it longer: it holds no chunk.
    pub(crate) fn into_entry(self) -> Entry {
        let path = std::str::from_utf8(&self.bytes[self.path]).expect("written from a str");
        Entry {
            position: self.position,
            operation_id: self.operation_id,
            path: path.into(),
            every: self.every,
            critical: self.critical,
            sent_while_spooled: self.sent_while_spooled,
            predecessor: self.predecessor,
            presence: self.presence,
            group: self.group,
            bytes: Bytes::copy_from_slice(&self.bytes),
            reserved_bytes: self.reserved_bytes,
            spooled: false,
        }
    }
}

impl Lanes {
    pub(crate) fn new(
        host_id: Uuid,
        policies: Policies,
        incarnation: u64,
        tails: HashMap<String, Position>,
        presences: Presences,
        queue_ops_max: usize,
    ) -> (Self, Exits) {
        let (spool, spool_exit) = crossbeam_channel::bounded(queue_ops_max + CRITICAL_ROOM_OPS);
        let (critical, critical_exit) = crossbeam_channel::bounded(queue_ops_max + CRITICAL_ROOM_OPS);
        let order = Order {
            next: Position {
                incarnation,
                sequence: 1,
            },
            ids: IdSource::new(),
            chunks: Chunks::default(),
            tails: tails.into_iter().collect(),
            presences,
            spool,
            critical,
            sender_parked: false,
            closed: false,
        };
        let lanes = Self {
            host_id,
            policies: ArcSwap::from_pointee(policies),
            tenures: ArcSwap::default(),
            edits: Edits::default(),
            order: Mutex::new(order),
            spool_ops_max: queue_ops_max,
            spool_bytes: AtomicUsize::new(0),
            disk_full: AtomicBool::new(false),
        };
        (
            lanes,
            Exits {
                spool: spool_exit,
                critical: critical_exit,
            },
        )
    }

    /// Who takes them.
    pub(crate) fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// What tells the ids of the operations that it takes.
    pub(crate) fn numbering(&self) -> Numbering {
        self.lock().ids.numbering()
    }

    /// The policies in force.
    pub(crate) fn policies(&self) -> Arc<Policies> {
        self.policies.load_full()
    }

    /// Takes over the hub's policies for what is submitted from now on.
    pub(crate) fn set_policies(&self, policies: Policies) {
        self.policies.store(Arc::new(policies));
    }

    /// Takes over the tenures under which maps are written from now on.
    pub(crate) fn set_tenures(&self, tenures: HashMap<Box<str>, u64>) {
        self.tenures.store(Arc::new(tenures));
    }

    /// What an operation on a path carries: of the map that the path belongs to.
    fn tenure(&self, path: &str) -> u64 {
        let tenures = self.tenures.load();
        if tenures.is_empty() {
            return 0;
        }
        let map = path.split_once('/').map_or(path, |(map, _)| map);
        tenures.get(map).copied().unwrap_or_default()
    }

    /// Takes an operation: checks it, gives it its path and position, and queues it. Waits for nothing.
    ///
    /// `announce` is called before any other thread can see the operation. Refuses with the codes of
    /// [`json::check`], `TOO_LARGE`, `BAD_MAP`, `BAD_PATH`, `ENTITY_MISSING`, `QUEUE_FULL` and `SHUT_DOWN`; a refused
    /// operation leaves no trace.
    pub(crate) fn take(&self, submission: &Submission<'_>, announce: impl FnOnce(&Taken)) -> Result<Taken, Problem> {
        self.take_made(submission, None, announce)
    }

    /// As [`Self::take`], of an operation that an attached program made. It goes into the spool lane alone, also if it is
    /// critical: it may be sent only once it is on disk with its number, for until then that program sends it again.
    pub(crate) fn take_made(
        &self,
        submission: &Submission<'_>,
        made: Option<MadeElsewhere>,
        announce: impl FnOnce(&Taken),
    ) -> Result<Taken, Problem> {
        let policies = self.policies.load();
        let policy = policies.of(submission.data_type);
        let path = Self::path(self.host_id, policy, submission, false)?;
        let every = policy.keep == Keep::Every;
        let critical = policy.critical || submission.priority == Priority::Critical;
        if self.disk_full.load(Ordering::Relaxed) && every {
            return Err(queue_full(
                "the outbox is full or its disk is: free space, or wait until the hub has caught up",
            ));
        }
        let reserved_bytes = OPERATION_BYTES + submission.payload.map_or(0, str::len);
        self.reserve(reserved_bytes)?;
        let new = New {
            submission,
            policy_version: policies.version,
            path: path.as_str(),
            tenure: self.tenure(path.as_str()),
            hub_edit_seen: self.edits.seen(path.as_str(), made.map(|made| made.at_ms)),
            every,
            critical,
            // A coming or going takes along what was made of the player before, which comes out of the spool lane alone.
            sent_while_spooled: critical && made.is_none() && submission.data_type != SyncDataType::PlayerPresence,
            reserved_bytes,
            operation_id: made.map(|made| made.operation_id),
            made_at_ms: made.map_or_else(now_ms, |made| made.at_ms),
        };
        let queued = self.enqueue(&new, announce);
        if queued.is_err() {
            self.spool_bytes.fetch_sub(reserved_bytes, Ordering::Relaxed);
        }
        queued
    }

    /// Takes a position out of the order: nothing will ever be sent under it.
    pub(crate) fn pass_over(&self) -> Position {
        let mut order = self.lock();
        let position = order.next;
        order.next.sequence += 1;
        position
    }

    /// The position that the next operation will have.
    pub(crate) fn next_position(&self) -> Position {
        self.lock().next
    }

    /// The path of an operation that can be taken under a policy; what else is wrong with it is refused here.
    pub(crate) fn path(
        host_id: Uuid,
        policy: &Policy,
        submission: &Submission<'_>,
        in_group: bool,
    ) -> Result<Path, Problem> {
        let facts = match submission.payload {
            None => None,
            Some(payload) if payload.len() > policy.payload_bytes_max => {
                let (bytes, most) = (payload.len(), policy.payload_bytes_max);
                let name = policy.data_type.as_str_name();
                let sentence = format!("the payload has {bytes} bytes, a {name} may have {most}: send less of it");
                return Err(Problem::new(Code::TooLarge, sentence));
            }
            Some(payload) => Some(json::check(payload)?),
        };
        let place = Place {
            host_id,
            map: submission.map,
            account_id: submission.account_id,
            char_id: submission.char_id,
            entity: submission.entity,
        };
        let path = policy.path(&place, facts.as_ref())?;
        if policy.data_type == SyncDataType::PlayerPresence {
            presence::check(&path.parts(), submission.map, facts.as_ref(), in_group)?;
        }
        Ok(path)
    }

    fn reserve(&self, bytes: usize) -> Result<(), Problem> {
        if self.spool_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes > SPOOL_BYTES_MAX {
            self.spool_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(queue_full(
                "too many bytes wait to be written to disk: send smaller or fewer operations",
            ));
        }
        Ok(())
    }

    fn enqueue(&self, new: &New<'_>, announce: impl FnOnce(&Taken)) -> Result<Taken, Problem> {
        let mut order = self.lock();
        order.admit(self.spool_ops_max, new.critical)?;
        let position = order.next;
        let operation_id = new.operation_id.unwrap_or_else(|| order.ids.next_id(new.made_at_ms));
        let predecessor = if new.every {
            order.tails.replace(new.path, position)
        } else {
            None
        };
        let presence = order.presence(new, position);
        order.next.sequence += 1;
        let taken = Taken {
            operation_id,
            position,
            wakes_sender: new.sent_while_spooled && std::mem::take(&mut order.sender_parked),
            made_at_ms: new.made_at_ms,
        };
        announce(&taken);
        let parts = new.parts(operation_id, position, predecessor, presence);
        let bytes = order.chunks.write(parts.encoded_len(), |mut to| parts.encode(&mut to));
        let queued = Queued {
            position,
            operation_id,
            every: new.every,
            critical: new.critical,
            sent_while_spooled: new.sent_while_spooled,
            predecessor,
            presence,
            group: None,
            bytes,
            path: parts.path_range(),
            reserved_bytes: new.reserved_bytes,
        };
        order.queue(queued);
        Ok(taken)
    }

    /// Who takes the critical lane out is about to wait: from now on the next critical operation wakes it, once.
    ///
    /// What was queued before has to be looked for after this.
    pub(crate) fn park_sender(&self) {
        self.lock().sender_parked = true;
    }

    /// Notes that an operation kept as `every` is settled: later ones of its path need not wait for it.
    pub(crate) fn settled(&self, path: &str, position: Position) {
        let mut order = self.lock();
        order.tails.settled(path, position);
        order.presences.settled(path, position);
    }

    /// Refuses everything from now on; what was taken is still spooled.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Order {
    /// Whether one more may come: there is room in both lanes, and nobody has closed them.
    fn admit(&self, spool_ops_max: usize, critical: bool) -> Result<(), Problem> {
        if self.closed {
            return Err(Problem::new(
                Code::ShutDown,
                "the agent is shutting down and takes nothing more",
            ));
        }
        let room = spool_ops_max + if critical { CRITICAL_ROOM_OPS } else { 0 };
        if self.spool.len() >= room || (critical && self.critical.is_full()) {
            return Err(queue_full(
                "max_queue_size operations wait to be written to disk: raise it, or send fewer",
            ));
        }
        Ok(())
    }

    /// The coming or going of its player that a new operation follows; it may be one itself.
    fn presence(&mut self, new: &New<'_>, position: Position) -> Option<Position> {
        if new.submission.data_type == SyncDataType::PlayerPresence {
            self.presences.replace(new.path, new.submission.account_id, position)
        } else {
            self.presences.before(new.path)
        }
    }

    /// There is room in both: only the lock's holder sends. A spooler that is gone is told of by `close`.
    fn queue(&mut self, queued: Queued) {
        if queued.sent_while_spooled {
            let _ = self.critical.try_send(queued.clone());
        }
        let _ = self.spool.try_send(queued);
    }
}

/// What was checked and has no position yet.
struct New<'a> {
    submission: &'a Submission<'a>,
    policy_version: u32,
    path: &'a str,
    tenure: u64,
    hub_edit_seen: u64,
    every: bool,
    critical: bool,
    /// It goes into the critical lane too.
    sent_while_spooled: bool,
    reserved_bytes: usize,
    /// It was made elsewhere.
    operation_id: Option<Uuid>,
    made_at_ms: u64,
}

impl New<'_> {
    fn parts(
        &self,
        operation_id: Uuid,
        position: Position,
        predecessor: Option<Position>,
        presence: Option<Position>,
    ) -> OperationParts<'_> {
        let submission = self.submission;
        let on_its_map = self.path.split('/').next() == Some(submission.map);
        OperationParts {
            operation_id,
            tenure: self.tenure,
            position,
            path: self.path,
            kind: if submission.payload.is_some() {
                OperationKind::Put
            } else {
                OperationKind::Delete
            },
            account_id: submission.account_id,
            map: if on_its_map { "" } else { submission.map },
            policy_version: self.policy_version,
            hub_edit_seen: self.hub_edit_seen,
            predecessor,
            presence,
            made_at_ms: self.made_at_ms,
            payload: submission.payload.map(str::as_bytes),
        }
    }
}

fn queue_full(sentence: &str) -> Problem {
    Problem::new(Code::QueueFull, sentence)
}

#[cfg(test)]
mod tests;
