//! Taking groups: one position, one place in the queue, and a place in the order of each path.

use std::sync::{Arc, atomic::Ordering};

use p2p_sync_proto::{
    Path, Policies, Position, Problem,
    group::{check_bytes, check_distinct, check_members, refused_member},
    v1::{Group, Operation, OperationKind, operation::Payload},
};
use prost::{
    Message as _,
    bytes::{Bytes, BytesMut},
};
use uuid::Uuid;

use super::{
    GroupOrder, Lanes, MadeElsewhere, New, OPERATION_BYTES, Priority, Queued, Submission, Taken, now_ms, queue_full,
};

/// Counted for a group beside its members, and for each of these beside its encoding, bytes.
const FRAME_BYTES: usize = 128;
const MEMBER_FRAME_BYTES: usize = 8;
/// Nothing encodes to more bytes.
const LARGEST: Position = Position {
    incarnation: u64::MAX,
    sequence: u64::MAX,
};

/// Whether a group can be taken; gives whether it goes by the critical lane.
pub(crate) fn check_group(host_id: Uuid, policies: &Policies, members: &[Submission<'_>]) -> Result<bool, Problem> {
    let paths = group_paths(host_id, policies, members)?;
    new_members(policies, members, &paths, None, |_| (0, 0))?;
    Ok(is_critical(policies, members))
}

fn group_paths(host_id: Uuid, policies: &Policies, members: &[Submission<'_>]) -> Result<Vec<Path>, Problem> {
    check_members(members.len())?;
    let paths: Vec<Path> = (0..)
        .zip(members)
        .map(|(at, member)| {
            Lanes::path(host_id, policies.of(member.data_type), member, true)
                .map_err(|problem| refused_member(at, problem))
        })
        .collect::<Result<_, _>>()?;
    check_distinct(paths.iter().map(Path::as_str))?;
    Ok(paths)
}

fn is_critical(policies: &Policies, members: &[Submission<'_>]) -> bool {
    members
        .iter()
        .any(|member| member.priority == Priority::Critical || policies.of(member.data_type).critical)
}

/// The members with all but their positions; refuses more bytes than a group may have.
fn new_members<'a>(
    policies: &Policies,
    members: &'a [Submission<'a>],
    paths: &'a [Path],
    made: Option<MadeElsewhere>,
    tenure_and_edit: impl Fn(&str) -> (u64, u64),
) -> Result<Vec<New<'a>>, Problem> {
    let critical = is_critical(policies, members);
    let made_at_ms = made.map_or_else(now_ms, |made| made.at_ms);
    let new: Vec<New<'_>> = members
        .iter()
        .zip(paths)
        .map(|(submission, path)| {
            let (tenure, hub_edit_seen) = tenure_and_edit(path.as_str());
            New {
                submission,
                policy_version: policies.version,
                path: path.as_str(),
                tenure,
                hub_edit_seen,
                every: true,
                critical,
                sent_while_spooled: critical && made.is_none(),
                reserved_bytes: OPERATION_BYTES + submission.payload.map_or(0, str::len),
                operation_id: made.map(|made| made.operation_id),
                made_at_ms,
            }
        })
        .collect();
    let largest = |member: &New<'_>| {
        let parts = member.parts(Uuid::nil(), LARGEST, Some(LARGEST), Some(LARGEST));
        MEMBER_FRAME_BYTES + parts.encoded_len()
    };
    check_bytes(FRAME_BYTES + new.iter().map(largest).sum::<usize>())?;
    Ok(new)
}

impl Lanes {
    /// Takes operations that take effect together or not at all, as [`Lanes::take`] takes one: all are checked before
    /// anything is taken. By the critical lane where one of them goes there.
    pub(crate) fn take_group(
        &self,
        members: &[Submission<'_>],
        announce: impl FnOnce(&Taken),
    ) -> Result<Taken, Problem> {
        self.take_made_group(members, None, announce)
    }

    /// As [`Self::take_group`], of a group that an attached program made; see [`Lanes::take_made`].
    pub(crate) fn take_made_group(
        &self,
        members: &[Submission<'_>],
        made: Option<MadeElsewhere>,
        announce: impl FnOnce(&Taken),
    ) -> Result<Taken, Problem> {
        let policies = self.policies.load();
        let paths = group_paths(self.host_id, &policies, members)?;
        let critical = is_critical(&policies, members);
        let made_at_ms = made.map(|made| made.at_ms);
        let new = new_members(&policies, members, &paths, made, |path| {
            (self.tenure(path), self.edits.seen(path, made_at_ms))
        })?;
        if self.disk_full.load(Ordering::Relaxed) {
            return Err(queue_full(
                "the outbox is full or its disk is: free space, or wait until the hub has caught up",
            ));
        }
        let reserved_bytes = new.iter().map(|member| member.reserved_bytes).sum();
        self.reserve(reserved_bytes)?;
        let queued = self.enqueue_group(&new, critical, reserved_bytes, announce);
        if queued.is_err() {
            self.spool_bytes.fetch_sub(reserved_bytes, Ordering::Relaxed);
        }
        queued
    }

    fn enqueue_group(
        &self,
        members: &[New<'_>],
        critical: bool,
        reserved_bytes: usize,
        announce: impl FnOnce(&Taken),
    ) -> Result<Taken, Problem> {
        let mut order = self.lock();
        order.admit(self.spool_ops_max, critical)?;
        let position = order.next;
        let made_at_ms = members.first().map_or(0, |member| member.made_at_ms);
        let made_id = members.first().and_then(|member| member.operation_id);
        let operation_id = made_id.unwrap_or_else(|| order.ids.next_id(made_at_ms));
        let sent_while_spooled = critical && made_id.is_none();
        order.next.sequence += 1;
        let taken = Taken {
            operation_id,
            position,
            wakes_sender: sent_while_spooled && std::mem::take(&mut order.sender_parked),
            made_at_ms,
        };
        announce(&taken);
        let mut predecessors = Vec::new();
        let mut encoded = Vec::with_capacity(members.len());
        for member in members {
            let predecessor = order.tails.replace(member.path, position);
            let presence = order.presence(member, position);
            predecessors.extend(predecessor.into_iter().chain(presence));
            let parts = member.parts(operation_id, position, predecessor, presence);
            let mut bytes = BytesMut::with_capacity(parts.encoded_len());
            parts.encode(&mut bytes);
            encoded.push(bytes.freeze());
        }
        let operation = Operation {
            operation_id: operation_id.as_bytes().to_vec().into(),
            version: Some(position.version(0)),
            kind: OperationKind::Group.into(),
            made_at_ms,
            payload: Some(Payload::Group(Group { members: encoded })),
            ..Operation::default()
        };
        let queued = Queued {
            position,
            operation_id,
            every: true,
            critical,
            sent_while_spooled,
            predecessor: None,
            presence: None,
            group: Some(Arc::new(GroupOrder {
                paths: members.iter().map(|member| member.path.to_owned()).collect(),
                predecessors,
            })),
            bytes: Bytes::from(operation.encode_to_vec()),
            path: 0..0,
            reserved_bytes,
        };
        order.queue(queued);
        Ok(taken)
    }
}
