//! Where a group stands: in the order of each path that it writes.

use std::sync::Arc;

use p2p_sync_proto::{
    Position,
    v1::{Operation, operation::Payload},
};
use prost::Message as _;

/// The paths that a group writes, whatever their types are kept as, and the unsettled operations before it on these, the
/// comings and goings of their players among them.
#[derive(Debug)]
pub(crate) struct GroupOrder {
    pub(crate) paths: Vec<String>,
    pub(crate) predecessors: Vec<Position>,
}

impl GroupOrder {
    /// Reads it back from an operation; `None` where that is no group.
    pub(crate) fn of(operation: &Operation) -> Option<Arc<Self>> {
        let Some(Payload::Group(group)) = &operation.payload else {
            return None;
        };
        let members = group
            .members
            .iter()
            .filter_map(|bytes| Operation::decode(bytes.clone()).ok());
        let (paths, predecessors): (Vec<_>, Vec<_>) = members
            .map(|member| (member.path, [member.predecessor, member.presence]))
            .unzip();
        Some(Arc::new(Self {
            paths,
            predecessors: predecessors
                .into_iter()
                .flatten()
                .flatten()
                .map(Position::from)
                .collect(),
        }))
    }
}
