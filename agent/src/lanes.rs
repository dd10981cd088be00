//! Where operations are taken: checked, numbered and put into the lanes, without waiting for disk or network.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender};
use p2p_sync_proto::{
    Code, Policies, Policy, Position, Problem, ids, json,
    policy::{Keep, Place},
    v1::{self, Operation, OperationKind, SyncDataType, operation::Payload},
};
use prost::{Message as _, bytes::Bytes};
use uuid::Uuid;

use crate::pending::Entry;

/// Bytes of operations that may wait to be spooled.
const SPOOL_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Counted for an operation beside its payload.
const OPERATION_BYTES: usize = 256;
/// Room in the spool lane that only critical operations may use: a burst of bulk leaves it free.
const CRITICAL_ROOM_OPS: usize = 1024;

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
}

/// The two lanes' entrances.
pub(crate) struct Lanes {
    host_id: Uuid,
    policies: ArcSwap<Policies>,
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
    /// The last unsettled operation of each path kept as `every`.
    tails: HashMap<Arc<str>, Position>,
    spool: Sender<Entry>,
    critical: Sender<Entry>,
    closed: bool,
}

/// Where the lanes come out.
pub(crate) struct Exits {
    /// Every operation, in the order of their positions.
    pub(crate) spool: Receiver<Entry>,
    /// Critical operations besides, to be sent while they are spooled.
    pub(crate) critical: Receiver<Entry>,
}

impl Lanes {
    pub(crate) fn new(
        host_id: Uuid,
        policies: Policies,
        incarnation: u64,
        tails: HashMap<String, Position>,
        queue_ops_max: usize,
    ) -> (Self, Exits) {
        let (spool, spool_exit) = crossbeam_channel::bounded(queue_ops_max + CRITICAL_ROOM_OPS);
        let (critical, critical_exit) = crossbeam_channel::bounded(queue_ops_max + CRITICAL_ROOM_OPS);
        let order = Order {
            next: Position {
                incarnation,
                sequence: 1,
            },
            tails: tails
                .into_iter()
                .map(|(path, position)| (path.into(), position))
                .collect(),
            spool,
            critical,
            closed: false,
        };
        let lanes = Self {
            host_id,
            policies: ArcSwap::from_pointee(policies),
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

    /// The policies in force.
    pub(crate) fn policies(&self) -> Arc<Policies> {
        self.policies.load_full()
    }

    /// Takes over the hub's policies for what is submitted from now on.
    pub(crate) fn set_policies(&self, policies: Policies) {
        self.policies.store(Arc::new(policies));
    }

    /// Whether an operation of this kind travels in the critical lane.
    pub(crate) fn is_critical(&self, submission: &Submission<'_>) -> bool {
        submission.priority == Priority::Critical || self.policies.load().of(submission.data_type).critical
    }

    /// Takes an operation: checks it, gives it its path and position, and queues it. Waits for nothing.
    ///
    /// `announce` is called before any other thread can see the operation. Refuses with the codes of
    /// [`json::check`], `TOO_LARGE`, `BAD_MAP`, `BAD_PATH`, `ENTITY_MISSING`, `QUEUE_FULL` and `SHUT_DOWN`; a refused
    /// operation leaves no trace.
    pub(crate) fn take(&self, submission: &Submission<'_>, announce: impl FnOnce(&Taken)) -> Result<Taken, Problem> {
        let policies = self.policies.load();
        let policy = policies.of(submission.data_type);
        let path = self.path(policy, submission)?;
        let every = policy.keep == Keep::Every;
        let critical = self.is_critical(submission);
        if self.disk_full.load(Ordering::Relaxed) && every {
            return Err(queue_full(
                "the outbox is full or its disk is: free space, or wait until the hub has caught up",
            ));
        }
        let reserved_bytes = OPERATION_BYTES + submission.payload.map_or(0, str::len);
        self.reserve(reserved_bytes)?;
        let queued = self.enqueue(submission, policies.version, path.into(), every, critical, announce);
        if queued.is_err() {
            self.spool_bytes.fetch_sub(reserved_bytes, Ordering::Relaxed);
        }
        queued
    }

    fn path(&self, policy: &Policy, submission: &Submission<'_>) -> Result<String, Problem> {
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
            host_id: self.host_id,
            map: submission.map,
            account_id: submission.account_id,
            char_id: submission.char_id,
            entity: submission.entity,
        };
        Ok(policy.path(&place, facts.as_ref())?.as_str().to_owned())
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

    fn enqueue(
        &self,
        submission: &Submission<'_>,
        policy_version: u32,
        path: Arc<str>,
        every: bool,
        critical: bool,
        announce: impl FnOnce(&Taken),
    ) -> Result<Taken, Problem> {
        let operation_id = ids::new_id();
        let mut order = self.lock();
        if order.closed {
            return Err(Problem::new(
                Code::ShutDown,
                "the agent is shutting down and takes nothing more",
            ));
        }
        let room = self.spool_ops_max + if critical { CRITICAL_ROOM_OPS } else { 0 };
        if order.spool.len() >= room || (critical && order.critical.is_full()) {
            return Err(queue_full(
                "max_queue_size operations wait to be written to disk: raise it, or send fewer",
            ));
        }
        let position = order.next;
        let predecessor = if every { order.tails.get(&path).copied() } else { None };
        let operation = operation(submission, operation_id, position, &path, policy_version, predecessor);
        let entry = Entry {
            position,
            operation_id,
            path: path.clone(),
            every,
            critical,
            predecessor,
            bytes: Bytes::from(operation.encode_to_vec()),
            reserved_bytes: OPERATION_BYTES + submission.payload.map_or(0, str::len),
            spooled: false,
        };
        let taken = Taken { operation_id, position };
        announce(&taken);
        // There is room in both: only this lock's holder sends. A spooler that is gone is told of by `close`.
        if critical {
            let _ = order.critical.try_send(entry.clone());
        }
        let _ = order.spool.try_send(entry);
        order.next.sequence += 1;
        if every {
            order.tails.insert(path, position);
        }
        Ok(taken)
    }

    /// Notes that an operation kept as `every` is settled: later ones of its path need not wait for it.
    pub(crate) fn settled(&self, path: &str, position: Position) {
        let mut order = self.lock();
        if order.tails.get(path) == Some(&position) {
            order.tails.remove(path);
        }
    }

    /// Refuses everything from now on; what was taken is still spooled.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn operation(
    submission: &Submission<'_>,
    operation_id: Uuid,
    position: Position,
    path: &str,
    policy_version: u32,
    predecessor: Option<Position>,
) -> Operation {
    let on_its_map = path.split('/').next() == Some(submission.map);
    Operation {
        operation_id: operation_id.as_bytes().to_vec().into(),
        version: Some(v1::Version {
            tenure: 0,
            incarnation: position.incarnation,
            sequence: position.sequence,
        }),
        path: path.to_owned(),
        kind: if submission.payload.is_some() {
            OperationKind::Put
        } else {
            OperationKind::Delete
        }
        .into(),
        account_id: submission.account_id,
        map: if on_its_map {
            String::new()
        } else {
            submission.map.to_owned()
        },
        policy_version,
        hub_edit_seen: 0,
        predecessor: predecessor.map(Into::into),
        made_at_ms: crate::outbox::now_ms(),
        payload: submission
            .payload
            .map(|json| Payload::Full(Bytes::copy_from_slice(json.as_bytes()))),
    }
}

fn queue_full(sentence: &str) -> Problem {
    Problem::new(Code::QueueFull, sentence)
}

#[cfg(test)]
mod tests;
