//! The recording of a real map server, as operations, with a synthetic share of the types it lacks.

use std::collections::BTreeMap;

use p2p_sync_agent::{Priority, Submission};
use p2p_sync_proto::{Policies, policy::Place, v1::SyncDataType};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

const RECORDING: &[u8] = include_bytes!("../data/rathena-150-players.jsonl.zst");
/// The last second of the recording is the server's shutdown.
const SHUTDOWN_MS: u64 = 1000;
/// After every so many recorded events comes one of a type that the recording lacks.
const SYNTHETIC_EVERY: usize = 40;

/// One operation of the recording.
#[derive(Clone, Debug)]
pub struct Happening {
    /// Milliseconds since the recording began.
    pub at_ms: u64,
    /// What it tells of.
    pub data_type: SyncDataType,
    /// Where it happened.
    pub map: String,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Given where nothing else says it: a DELETE has no payload.
    pub entity: Option<String>,
    /// JSON; `None` deletes.
    pub payload: Option<String>,
}

impl Happening {
    /// As an agent takes it.
    pub fn submission(&self) -> Submission<'_> {
        Submission {
            data_type: self.data_type,
            map: &self.map,
            account_id: self.account_id,
            entity: self.entity.as_deref(),
            char_id: None,
            payload: self.payload.as_deref(),
            priority: Priority::ByType,
            notify: false,
        }
    }

    /// The character that comes to a map by it (true), or leaves it.
    pub fn moves(&self) -> Option<(u64, bool)> {
        if self.data_type != SyncDataType::PlayerPresence {
            return None;
        }
        let facts = p2p_sync_proto::json::check(self.payload.as_deref()?).ok()?;
        let char_id = facts.member("char_id")?.parse().ok()?;
        Some((char_id, facts.member("event")? == "enter"))
    }

    /// Its path by the built-in policies. No type of the recording is a host's own.
    pub fn path(&self) -> Option<String> {
        let facts = self
            .payload
            .as_deref()
            .and_then(|payload| p2p_sync_proto::json::check(payload).ok());
        let place = Place {
            host_id: Uuid::nil(),
            map: &self.map,
            account_id: self.account_id,
            char_id: None,
            entity: self.entity.as_deref(),
        };
        let path = Policies::builtin().of(self.data_type).path(&place, facts.as_ref());
        path.ok().map(|path| path.as_str().to_owned())
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    t: u64,
    #[serde(rename = "type")]
    data_type: String,
    map: String,
    #[serde(default)]
    account_id: u32,
    #[serde(borrow)]
    data: &'a RawValue,
}

#[derive(Deserialize)]
struct Fields {
    #[serde(default)]
    event: String,
    monster_id: Option<u64>,
    drop_id: Option<u64>,
}

/// The recorded operations, in the order they happened.
pub fn recorded() -> Vec<Happening> {
    let text = zstd::decode_all(RECORDING).expect("the recording is whole");
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let events: Vec<Event<'_>> = lines
        .map(|line| serde_json::from_slice(line).expect("one event a line"))
        .collect();
    let end_ms = events.last().map_or(0, |event| event.t) - SHUTDOWN_MS;
    events.iter().filter(|event| event.t < end_ms).map(happening).collect()
}

/// Players' coming and going is presence; what leaves a map is deleted.
fn happening(event: &Event<'_>) -> Happening {
    let fields: Fields = serde_json::from_str(event.data.get()).expect("an object");
    let recorded = SyncDataType::from_str_name(&event.data_type).expect("a known type");
    let is_gone = matches!(fields.event.as_str(), "leave" | "gone");
    let (data_type, entity) = match (recorded, is_gone) {
        (SyncDataType::PlayerPosition, _) if matches!(fields.event.as_str(), "enter" | "leave") => {
            (SyncDataType::PlayerPresence, None)
        }
        (SyncDataType::MonsterData, true) => (recorded, fields.monster_id),
        (SyncDataType::ItemDrop, true) => (recorded, fields.drop_id),
        _ => (recorded, None),
    };
    Happening {
        at_ms: event.t,
        data_type,
        map: event.map.clone(),
        account_id: event.account_id,
        entity: entity.map(|id| id.to_string()),
        payload: entity.is_none().then(|| event.data.get().to_owned()),
    }
}

/// The recording with the types it lacks mixed in, the same each time.
pub fn with_synthetic_share() -> Vec<Happening> {
    let mut all = Vec::new();
    let mut players = BTreeMap::new();
    for (index, recorded) in recorded().into_iter().enumerate() {
        if let Some((char_id, is_there)) = recorded.moves() {
            if is_there {
                players.insert(char_id, (recorded.map.clone(), recorded.account_id));
            } else {
                players.remove(&char_id);
            }
        }
        let synthetic = (index % SYNTHETIC_EVERY == 0).then(|| synthetic(&recorded, index / SYNTHETIC_EVERY, &players));
        all.push(recorded);
        all.extend(synthetic);
    }
    all
}

/// Characters that are in the game, with their map and account.
type Players = BTreeMap<u64, (String, u32)>;

fn synthetic(beside: &Happening, number: usize, players: &Players) -> Happening {
    let put = |data_type, data: Value| Happening {
        data_type,
        entity: None,
        payload: Some(data.to_string()),
        ..beside.clone()
    };
    let player = players.iter().nth(number % players.len().max(1));
    let of_player = |data_type, char_id: u64, map: &str, account_id, mut data: Value| {
        data["char_id"] = char_id.into();
        Happening {
            map: map.to_owned(),
            account_id,
            ..put(data_type, data)
        }
    };
    match (number % 5, player) {
        (0, Some((char_id, (map, account_id)))) => of_player(
            SyncDataType::PlayerData,
            *char_id,
            map,
            *account_id,
            json!({"base_level": 99, "job_level": 50, "zeny": 1_000 + number, "hp": 20_000}),
        ),
        (1, Some((char_id, (map, account_id)))) => of_player(
            SyncDataType::QuestProgress,
            *char_id,
            map,
            *account_id,
            json!({"quest_id": 1000 + number % 7, "state": number % 3, "counts": [number % 10]}),
        ),
        // Also while nobody is in the game.
        (0..=2, _) => put(
            SyncDataType::CriticalGameState,
            json!({"event": "mvp", "mob_id": 1086, "number": number}),
        ),
        (3, _) => put(
            SyncDataType::ItemDrop,
            json!({"drop_id": number / 5, "item_id": 501, "amount": 1, "x": 10, "y": 20}),
        ),
        // The drop of the number before is picked up.
        _ => Happening {
            data_type: SyncDataType::ItemDrop,
            entity: Some((number / 5).to_string()),
            payload: None,
            ..beside.clone()
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recording_is_read_whole_but_for_its_shutdown() {
        let recorded = recorded();
        assert!((40_000..49_227).contains(&recorded.len()), "{}", recorded.len());
        assert!(recorded.is_sorted_by_key(|happening| happening.at_ms));
        assert!(
            recorded
                .iter()
                .any(|happening| happening.data_type == SyncDataType::PlayerPresence)
        );
    }

    #[test]
    fn the_synthetic_share_has_every_type_it_lacks() {
        let all = with_synthetic_share();
        let has = |data_type, deletes: bool| {
            all.iter()
                .any(|happening| happening.data_type == data_type && happening.payload.is_none() == deletes)
        };
        for data_type in [
            SyncDataType::PlayerData,
            SyncDataType::QuestProgress,
            SyncDataType::CriticalGameState,
            SyncDataType::ItemDrop,
        ] {
            assert!(has(data_type, false), "{data_type:?}");
        }
        assert!(has(SyncDataType::ItemDrop, true));
    }
}
