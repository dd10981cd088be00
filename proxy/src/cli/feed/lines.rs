//! What a consumer is told, as JSON, one object a line.

use p2p_sync_proto::{Code, terminal::shown};
use serde::Serialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::store::{Batch, StateRow, Told, type_of};

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line<'a> {
    Snapshot {
        timeline: u64,
        /// Absent: all streams.
        #[serde(skip_serializing_if = "Option::is_none")]
        stream: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<&'static str>,
    },
    Change {
        timeline: u64,
        stream: &'a str,
        stream_sequence: u64,
        path: &'a str,
        #[serde(rename = "type")]
        data_type: Option<&'static str>,
        keep: &'static str,
        version: Version,
        deleted: bool,
        account_id: u32,
        host_id: Uuid,
        #[serde(skip_serializing_if = "Option::is_none")]
        group_id: Option<Uuid>,
        hub_edit: u64,
        received_at_ms: u64,
        data: Option<&'a RawValue>,
    },
}

#[derive(Serialize)]
struct Version {
    tenure: u64,
    incarnation: u64,
    sequence: u64,
}

/// All lines of a batch. Nothing in them steers a terminal.
pub(super) fn of(batch: &Batch) -> String {
    let mut text = String::new();
    for told in &batch.told {
        let line = match told {
            Told::Snapshot { stream, reason } => Line::Snapshot {
                timeline: batch.timeline,
                stream: stream.as_deref(),
                code: reason.map(|_| Code::Resync.label()),
                reason: *reason,
            },
            Told::Change { stream, row } => change(batch.timeline, stream, row),
        };
        let json = serde_json::to_string(&line).expect("texts, numbers and JSON become JSON");
        text += &shown(&json);
        text.push('\n');
    }
    text
}

fn change<'a>(timeline: u64, stream: &'a str, row: &'a StateRow) -> Line<'a> {
    Line::Change {
        timeline,
        stream,
        stream_sequence: row.stream_sequence,
        path: &row.path,
        data_type: type_of(&row.path).map(|data_type| data_type.as_str_name()),
        keep: if row.keeps_every { "every" } else { "latest" },
        version: Version {
            tenure: row.tenure,
            incarnation: row.position.incarnation,
            sequence: row.position.sequence,
        },
        deleted: row.deleted,
        account_id: row.account_id,
        host_id: row.host_id,
        group_id: row.group_id,
        hub_edit: row.hub_edit,
        received_at_ms: row.received_at_ms,
        // Postgres writes it, and on one line.
        data: row.payload.as_deref().and_then(|json| serde_json::from_str(json).ok()),
    }
}
