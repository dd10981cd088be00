use p2p_sync_proto::policy::Keep;

use super::*;

fn overlay(text: &str) -> Result<Rules, Problems> {
    Rules::builtin().overlaid(text, |_| Err("there are no files here".to_owned()))
}

#[test]
fn the_shipped_file_agrees_with_the_policies_that_agents_are_built_with() {
    let shipped = Rules::builtin().policies;
    assert_eq!(shipped, Policies::new(shipped.version, []));
    let table: Table = BUILTIN.parse().expect("TOML");
    assert!(
        TYPES
            .iter()
            .all(|data_type| table.contains_key(data_type.as_str_name())),
        "each type has its section"
    );
}

#[test]
fn the_shipped_histories_sample_what_moves_and_leave_metrics_out() {
    let rules = Rules::builtin();
    for data_type in TYPES {
        let expected = match data_type {
            SyncDataType::MonsterData | SyncDataType::PlayerPosition => History::Sampled { seconds: 10 },
            SyncDataType::HostMetrics => History::Off,
            _ => History::All,
        };
        assert_eq!(rules.of(data_type).history, expected, "{data_type:?}");
    }
}

#[test]
fn a_file_changes_what_it_names_and_leaves_the_rest() {
    let rules = overlay("version = 7\n[ITEM_DROP]\nowner = 'map'\nkeep = 'every'\n").expect("valid");
    assert_eq!(rules.policies.version, 7);
    assert_eq!(rules.policies.of(SyncDataType::ItemDrop).keep, Keep::Every);
    assert_eq!(
        rules.policies.of(SyncDataType::MapState),
        Policies::builtin().of(SyncDataType::MapState)
    );
    assert!(rules.of(SyncDataType::MapState).schema.is_some());
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = "[MAP_STAT]\n[ITEM_DROP]\nowner = 'nobody'\nentity_ky = 'x'\nhistory = 'sampled:0s'\n\
                payload_bytes_max = 0\nschema = 'no.json'\ncritical = 'yes'\n";
    let told = overlay(text).expect_err("mistakes").to_string();
    for expected in [
        "did you mean MAP_STATE?",
        "[ITEM_DROP] owner: expected one of \"map\", ",
        "[ITEM_DROP] keep: expected one of",
        "[ITEM_DROP] entity_ky: is unknown; did you mean entity_key?",
        "[ITEM_DROP] history: ",
        "[ITEM_DROP] payload_bytes_max: ",
        "[ITEM_DROP] schema: no.json cannot be read",
        "[ITEM_DROP] critical: ",
        "version: expected",
    ] {
        assert!(told.contains(expected), "{expected} is missing in:\n{told}");
    }
    assert_eq!(told.lines().count(), 9, "{told}");
}

#[test]
fn what_is_kept_whole_cannot_be_sampled() {
    let told =
        overlay("version = 1\n[CHAT_MESSAGE]\nowner = 'map'\nkeep = 'every'\nhistory = 'off'\n").expect_err("off");
    assert!(told.to_string().contains("always logged whole"), "{told}");
}

#[test]
fn one_event_of_each_kind_of_the_recording_fits_its_schema() {
    let rules = Rules::builtin();
    let fits = |data_type, payload: &str| {
        let payload = serde_json::from_str(payload).expect("JSON");
        rules.of(data_type).schema.as_ref().expect("a schema").check(&payload)
    };
    let npc = r#"{"event":"state","npc_id":110007614,"x":90,"y":153,"class":-1}"#;
    let monster = r#"{"event":"spawn","monster_id":110027938,"mob_id":2741,"x":280,"y":65,"hp":49912004,"max_hp":49912004,"speed":300}"#;
    let player = r#"{"event":"move","char_id":150001,"x":149,"y":186,"dir":7,"hp":20123,"max_hp":20443,"sp":391,"max_sp":391,"base_level":99,"speed":150,"new":true}"#;
    let map = r#"{"map_name":"gef_fild07","users":5,"npcs":10,"width":380,"height":380,"is_vps_hosted":false}"#;
    let chat = r#"{"char_id":150021,"name":"bot0021","text":"hello from 198,203"}"#;
    let drop = r#"{"event":"gone","drop_id":55,"x":241,"y":390}"#;
    assert_eq!(fits(SyncDataType::NpcState, npc), Ok(()));
    assert_eq!(fits(SyncDataType::MonsterData, monster), Ok(()));
    assert_eq!(fits(SyncDataType::PlayerPosition, player), Ok(()));
    assert_eq!(fits(SyncDataType::MapState, map), Ok(()));
    assert_eq!(fits(SyncDataType::ChatMessage, chat), Ok(()));
    assert_eq!(fits(SyncDataType::ItemDrop, drop), Ok(()));
    fits(SyncDataType::PlayerPosition, &player.replace("20123", "-1")).expect_err("hp below 0");
    fits(SyncDataType::PlayerPosition, &player.replace("99", "276")).expect_err("above the highest level");
}
