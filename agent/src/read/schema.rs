//! The schema of requests says what is taken: no more, and no less.

use std::collections::BTreeSet;

use jsonschema::{Draft, Validator};
use p2p_sync_proto::{Policies, policy::Place, v1::SyncDataType};
use serde_json::{Value, json};

use super::{PATH, PREFIX, placed_members, requested};

const SCHEMA: &str = include_str!("../../include/p2p_sync_request.schema.json");

use SyncDataType::{ChatMessage, HostMetrics, ItemDrop, MapState, MonsterData, NpcState, PlayerData, PlayerPosition};
use SyncDataType::{PlayerPresence, QuestProgress, VectorEmbedding};

/// What is asked, of which type, and whether it is taken.
const REQUESTS: [(SyncDataType, &str, bool); 49] = [
    (MapState, "{}", true),
    (MapState, r#"{"kept":true}"#, true),
    (MapState, r#"{"kept":"yes"}"#, false),
    (MapState, r#"{"entity":"north","char_id":1}"#, true),
    (MapState, r#"{"monster_id":7}"#, false),
    (MapState, r#"{"entity":true}"#, false),
    (MapState, r#"{"entity":null}"#, false),
    (MapState, r#"{"entity":"a/b"}"#, false),
    (MapState, r#"{"entity":""}"#, false),
    (MapState, "[]", false),
    (MapState, "7", false),
    (HostMetrics, "{}", true),
    (MonsterData, "{}", false),
    (MonsterData, r#"{"monster_id":7}"#, true),
    (MonsterData, r#"{"monster_id":"m7","at_least_sequence":12}"#, true),
    (MonsterData, r#"{"entity":-7}"#, true),
    (MonsterData, r#"{"monster_id":7.5}"#, false),
    (MonsterData, r#"{"monster_id":[7]}"#, false),
    (MonsterData, r#"{"monster_id":7,"at_least_sequence":-1}"#, false),
    (MonsterData, r#"{"monster_id":7,"char_id":-1}"#, false),
    (MonsterData, r#"{"monster_id":7,"limit":5}"#, false),
    (ItemDrop, r#"{"drop_id":7}"#, true),
    (NpcState, r#"{"npc_id":7,"kept":false}"#, true),
    (VectorEmbedding, r#"{"id":"letter"}"#, true),
    (PlayerPosition, r#"{"char_id":150001}"#, true),
    (PlayerPosition, r#"{"char_id":"150001"}"#, true),
    (PlayerPosition, r#"{"char_id":"Poring"}"#, false),
    (ChatMessage, r#"{"entity":"150001"}"#, true),
    (PlayerData, r#"{"char_id":1}"#, true),
    (PlayerData, r#"{"entity":1}"#, false),
    (PlayerPresence, "{}", false),
    (QuestProgress, r#"{"char_id":1,"quest_id":9}"#, true),
    (QuestProgress, r#"{"char_id":1}"#, false),
    (
        PlayerData,
        r#"{"char_id":1,"at_least":{"tenure":3,"incarnation":7,"sequence":5,"host_id":"01890a5d-ac96-774b-bcce-b302099a8057"}}"#,
        true,
    ),
    (
        PlayerData,
        r#"{"char_id":1,"at_least":{"incarnation":7,"sequence":5}}"#,
        true,
    ),
    (PlayerData, r#"{"char_id":1,"at_least":{"incarnation":7}}"#, false),
    (
        PlayerData,
        r#"{"char_id":1,"at_least":{"incarnation":7,"sequence":5,"host":"x"}}"#,
        false,
    ),
    (
        PlayerData,
        r#"{"char_id":1,"at_least":{"incarnation":7,"sequence":5,"host_id":"x"}}"#,
        false,
    ),
    (PlayerData, r#"{"char_id":1,"at_least":"3:7:5"}"#, false),
    (ItemDrop, r#"{"path":"geffen/MAP_STATE"}"#, true),
    (
        ItemDrop,
        r#"{"path":"@char/150001/PLAYER_DATA","kept":true,"at_least_sequence":3,"at_least":{"incarnation":7,"sequence":5}}"#,
        true,
    ),
    (ItemDrop, r#"{"path":"geffen"}"#, false),
    (ItemDrop, r#"{"path":"@char/01/PLAYER_DATA"}"#, false),
    (ItemDrop, r#"{"path":"geffen/MAP_STATE","drop_id":7}"#, false),
    (ItemDrop, r#"{"prefix":"prontera/","limit":5,"cursor":"0aff"}"#, true),
    (ItemDrop, r#"{"prefix":""}"#, true),
    (ItemDrop, r#"{"prefix":"prontera/","kept":true}"#, true),
    (ItemDrop, r#"{"prefix":"prontera/","cursor":"0af"}"#, false),
    (ItemDrop, r#"{"prefix":"prontera/","limit":4294967296}"#, false),
];

fn schema() -> Value {
    serde_json::from_str(SCHEMA).expect("JSON")
}

fn compiled(schema: &Value) -> Validator {
    let options = jsonschema::options().with_draft(Draft::Draft202012).offline();
    options.build(schema).expect("a schema of its draft")
}

/// The schema of requests of one type alone.
fn of_type(data_type: SyncDataType) -> Validator {
    let mut of_type = schema();
    of_type["oneOf"][2] = json!({ "$ref": format!("#/$defs/{}", data_type.as_str_name()) });
    compiled(&of_type)
}

fn is_taken(data_type: SyncDataType, request: &str) -> bool {
    let place = Place {
        host_id: uuid::Uuid::nil(),
        map: "prontera",
        account_id: 2,
        char_id: None,
        entity: None,
    };
    requested(&Policies::builtin(), data_type, &place, request).is_ok()
}

#[test]
fn the_schema_fits_what_is_taken_and_nothing_else() {
    let of_all = compiled(&schema());
    for (data_type, request, taken) in REQUESTS {
        let name = data_type.as_str_name();
        assert_eq!(is_taken(data_type, request), taken, "{name} {request}");
        let instance: Value = serde_json::from_str(request).expect("JSON");
        assert_eq!(
            of_type(data_type).is_valid(&instance),
            taken,
            "{name} {request} by the schema"
        );
        if taken {
            assert!(of_all.is_valid(&instance), "{request} by the whole schema");
        }
    }
    assert!(!of_all.is_valid(&json!({"path": "geffen/MAP_STATE", "prefix": "geffen/"})));
    assert!(!of_all.is_valid(&json!({"pth": "geffen/MAP_STATE"})));
}

#[test]
fn the_schema_has_the_members_that_are_known_and_each_is_asked_with() {
    let schema = schema();
    let members = |name: &str| -> BTreeSet<String> {
        let properties = schema["$defs"][name]["properties"].as_object().expect("an object's");
        properties.keys().cloned().collect()
    };
    let known = |names: &[&str]| -> BTreeSet<String> { names.iter().map(|&name| name.to_owned()).collect() };
    assert_eq!(members("path"), known(&PATH));
    assert_eq!(members("prefix"), known(&PREFIX));
    let mut all = known(&PATH);
    all.extend(known(&PREFIX));
    for policy in Policies::builtin().iter() {
        let placed = known(&placed_members(policy)[2..]);
        assert_eq!(
            members(policy.data_type.as_str_name()),
            placed,
            "{:?}",
            policy.data_type
        );
        all.extend(placed);
    }
    let taken = REQUESTS.iter().filter(|(_, _, taken)| *taken);
    let asked = taken.filter_map(|(_, request, _)| serde_json::from_str::<Value>(request).ok());
    let asked: BTreeSet<String> = asked
        .filter_map(|request| Some(request.as_object()?.keys().cloned().collect::<Vec<_>>()))
        .flatten()
        .collect();
    assert_eq!(asked, all, "each member in a request that is taken");
}
