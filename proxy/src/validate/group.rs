//! Groups: each member is checked as an operation of its own, and the first that is wrong refuses them all.

use p2p_sync_proto::{
    Position, Problem,
    group::{Glance, check_bytes, check_distinct, check_members, refused_member},
    v1::{self, operation::Payload},
};
use prost::{Message, bytes::Bytes};

use super::{Check, NOT_CANONICAL, bad, is_canonical};
use crate::operation::ValidOp;

impl Check<'_> {
    /// Adds the members of a group to `ops`, or none of them.
    pub(super) fn group(
        &self,
        index: u32,
        op: &v1::Operation,
        position: Position,
        ops: &mut Vec<ValidOp>,
    ) -> Result<(), Problem> {
        let Some(Payload::Group(group)) = &op.payload else {
            return Err(bad("a GROUP carries its members"));
        };
        check_members(group.members.len())?;
        check_bytes(op.encoded_len())?;
        let frame = v1::Operation {
            operation_id: op.operation_id.clone(),
            version: op.version,
            kind: op.kind,
            made_at_ms: op.made_at_ms,
            payload: op.payload.clone(),
            ..v1::Operation::default()
        };
        if *op != frame || op.version.is_some_and(|version| version.tenure > 0) {
            return Err(bad(
                "a GROUP says its id, position and time, and all else is its members'",
            ));
        }
        let members: Vec<ValidOp> = (0..)
            .zip(&group.members)
            .map(|(at, bytes)| {
                self.member(index, op, position, bytes)
                    .map_err(|problem| refused_member(at, problem))
            })
            .collect::<Result<_, _>>()?;
        check_distinct(members.iter().map(|member| member.path.as_str()))?;
        // The right to write a path is each member's own: who may not write one of them writes none.
        ops.extend(members);
        Ok(())
    }

    fn member(&self, index: u32, group: &v1::Operation, position: Position, bytes: &Bytes) -> Result<ValidOp, Problem> {
        if Glance::at(bytes).is_some_and(|glance| glance.members > 0) {
            return Err(bad("a group's members are no groups"));
        }
        let member = v1::Operation::decode(bytes.clone()).map_err(|_| bad(NOT_CANONICAL))?;
        if !is_canonical(&member, bytes) {
            return Err(bad(NOT_CANONICAL));
        }
        // Each under the tenure of its own map.
        if member.operation_id != group.operation_id || member.version.as_ref().map(Position::from) != Some(position) {
            return Err(bad("a member has the id and the position of its group"));
        }
        self.content(index, &member, position, true)
    }
}
