//! Maps as a host asks for them and gives them away.

use std::{pin::Pin, sync::Arc, time::Duration};

use p2p_sync_proto::{
    Code, Problem,
    ids::read_id,
    path::check_map,
    v1::{AssignMap, ListMaps, MapInfo, MigrateMap, map_request::What},
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{link::call_maps, shared::Shared};

/// For an answer, where somebody waits. A map is released when what was made for it is settled, which takes its time.
const PATIENCE: Duration = Duration::from_secs(10);
const RELEASE_PATIENCE: Duration = Duration::from_mins(2);

/// Something to ask the hub of maps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MapCall {
    /// One map; with an empty name all that this host holds, stands by for, or may be given.
    List { map: String },
    /// Asks for a map that nobody holds.
    Assign { map: String },
    /// Has a map of this host's handed over.
    Migrate { map: String, to: Option<Uuid> },
    /// Gives a map up, when what was made for it before the call is settled.
    Release { map: String },
}

impl MapCall {
    /// `BAD_MAP` where the name is none.
    pub(crate) fn check(&self) -> Result<(), Problem> {
        match self {
            Self::List { map } if map.is_empty() => Ok(()),
            Self::List { map } | Self::Assign { map } | Self::Migrate { map, .. } | Self::Release { map } => {
                check_map(map)
            }
        }
    }
}

impl MapCall {
    /// How long it may take.
    pub(crate) fn patience(&self) -> Duration {
        match self {
            Self::Release { .. } => RELEASE_PATIENCE,
            _ => PATIENCE,
        }
    }
}

/// The answer to a call, when it is there.
pub(crate) type MapsAnswer = Pin<Box<dyn Future<Output = Result<Value, Problem>> + Send>>;

/// Begins a call: what it changes here has changed when this returns. To be called inside a runtime.
pub(crate) fn call(shared: &Arc<Shared>, call: MapCall) -> MapsAnswer {
    let what = match call {
        MapCall::List { map } => What::List(ListMaps {
            maps: Some(map).into_iter().filter(|map| !map.is_empty()).collect(),
        }),
        MapCall::Assign { map } => What::Assign(AssignMap {
            map,
            ..Default::default()
        }),
        MapCall::Migrate { map, to } => What::Migrate(MigrateMap {
            map,
            host_id: to.map(|to| to.as_bytes().to_vec().into()).unwrap_or_default(),
        }),
        MapCall::Release { map } => {
            let before = shared.lanes.next_position();
            let given_up = shared.hand_overs.give_up(shared, &map, before);
            return Box::pin(async move { Ok(maps_json(&given_up?.await?)) });
        }
    };
    let shared = shared.clone();
    Box::pin(async move {
        let changes = !matches!(what, What::List(_));
        let maps = call_maps(&shared, what).await?;
        if changes {
            // What follows from it the hub says by a renewal.
            shared.leases.told.notify_one();
        }
        Ok(maps_json(&maps))
    })
}

/// Maps as JSON, one way for all who ask.
pub(crate) fn maps_json(maps: &[MapInfo]) -> Value {
    let ids = |ids: &[prost::bytes::Bytes]| -> Vec<Uuid> { ids.iter().filter_map(|id| read_id(id)).collect() };
    let maps = maps.iter().map(|map| {
        json!({
            "map": map.map,
            "host_id": read_id(&map.host_id),
            "tenure": map.tenure,
            "expires_in_ms": map.expires_in_ms,
            "backups": ids(&map.backups),
            "assistants": ids(&map.assistants),
            "successor": read_id(&map.successor),
            "stream_head": map.stream_head,
        })
    });
    json!({ "maps": maps.collect::<Vec<_>>() })
}

/// A host's id as it is written; empty: none.
pub(crate) fn read_host(text: &str) -> Result<Option<Uuid>, Problem> {
    if text.is_empty() {
        return Ok(None);
    }
    let not_one = |_| {
        let shown: String = text.chars().take(64).collect();
        let sentence = format!("{shown:?} is not the id of a host: write a UUID, or nothing for whom the hub chooses");
        Problem::new(Code::BadRequest, sentence)
    };
    text.parse().map(Some).map_err(not_one)
}
