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
                payload_bytes_max = 0\nschema = 'no.json'\ncritical = 'yes'\nops_per_second = 0\n";
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
        "[ITEM_DROP] ops_per_second: ",
        "version: expected",
    ] {
        assert!(told.contains(expected), "{expected} is missing in:\n{told}");
    }
    assert_eq!(told.lines().count(), 10, "{told}");
}

#[test]
fn a_players_coming_and_going_is_a_characters_and_each_counts() {
    let types = |owner: &str, keep: &str| {
        format!("version = 1\n[PLAYER_PRESENCE]\nowner = '{owner}'\nkeep = '{keep}'\nowner_key = 'char_id'\n")
    };
    overlay(&types("char", "every")).expect("valid");
    let told = overlay(&types("char", "latest")).expect_err("conflated").to_string();
    assert!(told.contains("[PLAYER_PRESENCE] owner, keep: are "), "{told}");
}

#[test]
fn the_operator_is_right_unless_a_type_says_otherwise() {
    let ruled = |line: &str| {
        let text = format!("version = 2\n[ITEM_DROP]\nowner = 'map'\nkeep = 'latest'\n{line}\n");
        overlay(&text).map(|rules| rules.of(SyncDataType::ItemDrop).conflict)
    };
    for (line, expected) in [
        ("", ConflictRule::Hub),
        ("conflict = 'hub'", ConflictRule::Hub),
        ("conflict = 'host'", ConflictRule::Host),
        ("conflict = 'newest'", ConflictRule::Newest),
        ("conflict = 'both'", ConflictRule::Both),
    ] {
        assert_eq!(ruled(line), Ok(expected), "{line}");
    }
    let told = ruled("conflict = 'operator'").expect_err("unknown").to_string();
    assert!(
        told.contains("[ITEM_DROP] conflict: expected one of \"hub\", \"host\""),
        "{told}"
    );
    assert!(
        TYPES
            .iter()
            .all(|data_type| Rules::builtin().of(*data_type).conflict == ConflictRule::Hub)
    );
}

#[test]
fn what_is_kept_whole_cannot_be_sampled() {
    let told =
        overlay("version = 1\n[CHAT_MESSAGE]\nowner = 'map'\nkeep = 'every'\nhistory = 'off'\n").expect_err("off");
    assert!(told.to_string().contains("always logged whole"), "{told}");
}

#[test]
fn rules_compare_members_that_the_schema_describes() {
    let types = |rules: &str| {
        format!(
            "version = 2\n[MONSTER_DATA]\nowner = 'map'\nkeep = 'latest'\nentity_key = 'monster_id'\n\
             schema = 'm.json'\nrules = {rules}\n"
        )
    };
    let with_schema = |rules: &str| {
        let schema = r#"{"properties": {"hp": {}, "max_hp": {}}}"#;
        Rules::builtin().overlaid(&types(rules), |_| Ok(schema.to_owned()))
    };
    let rules = with_schema("['hp <= max_hp']").expect("valid");
    let monster = rules.of(SyncDataType::MonsterData);
    assert_eq!(monster.check(r#"{"hp":3,"max_hp":3}"#), Ok(()));
    assert_eq!(
        monster.check(r#"{"hp":4,"max_hp":3}"#).expect_err("too much").code,
        Code::ImpossibleValue
    );
    for (rules, told) in [
        (
            "['hp <= max_hpp']",
            "max_hpp is no member of the schema; did you mean max_hp?",
        ),
        ("['hp <= zeny']", "zeny is no member of the schema; describe it there"),
        ("['hp < max_hp']", "\"hp < max_hp\": expected `<member> <= <member>`"),
        ("'hp <= max_hp'", "expected a list of texts"),
    ] {
        let problems = with_schema(rules).expect_err(rules).to_string();
        assert!(
            problems.contains("[MONSTER_DATA] rules: ") && problems.contains(told),
            "{problems}"
        );
    }
    let bare = "version = 2\n[CRITICAL_GAME_STATE]\nowner = 'map'\nkeep = 'every'\nrules = ['a <= b']\n";
    let problems = overlay(bare).expect_err("no schema").to_string();
    assert!(problems.contains("give it one"), "{problems}");
}

#[test]
fn what_agents_get_changes_only_with_a_higher_version() {
    let types = |version: u32, keep: &str, bytes: u32| {
        let text = format!(
            "version = {version}\n[ITEM_DROP]\nowner = 'map'\nkeep = '{keep}'\nentity_key = 'drop_id'\n\
             history = 'all'\npayload_bytes_max = {bytes}\n"
        );
        overlay(&text).expect("valid")
    };
    let before = types(3, "latest", 100);
    for (version, keep) in [(3, "latest"), (2, "latest"), (4, "every")] {
        types(version, keep, 100).after(&before).expect("taken");
    }
    for (version, keep, bytes) in [(3, "every", 100), (2, "every", 100), (3, "latest", 101)] {
        let told = types(version, keep, bytes).after(&before).expect_err("no version");
        assert!(told.to_string().contains("raise it"), "{told}");
    }
}

#[test]
fn a_change_of_any_file_that_was_read_is_seen() {
    let folder = tempfile::tempdir().expect("a folder");
    let (file, schema) = (folder.path().join("types.toml"), folder.path().join("drop.json"));
    let text =
        "version = 2\n[ITEM_DROP]\nowner = 'map'\nkeep = 'latest'\nentity_key = 'drop_id'\nschema = 'drop.json'\n";
    std::fs::write(&file, text).expect("written");
    let (rules, sources) = Rules::load_with_sources(Some(&file));
    assert!(
        rules
            .expect_err("no schema")
            .to_string()
            .contains("drop.json cannot be read")
    );
    assert!(!sources.have_changed());
    std::fs::write(&schema, "{}").expect("written");
    assert!(sources.have_changed(), "a file that was missing is there");
    let (rules, sources) = Rules::load_with_sources(Some(&file));
    rules.expect("valid");
    assert!(!sources.have_changed());
    std::fs::write(&schema, "{ }").expect("written");
    assert!(sources.have_changed(), "a schema");
    std::fs::remove_file(&file).expect("removed");
    let (rules, sources) = Rules::load_with_sources(Some(&file));
    rules.expect_err("gone");
    std::fs::write(&file, text).expect("written");
    assert!(sources.have_changed(), "the file itself");
}

/// Payloads as a map server writes them.
const NPC: &str = r#"{"event":"state","npc_id":110007614,"x":90,"y":153,"class":-1}"#;
const MONSTER: &str = r#"{"event":"spawn","monster_id":110027938,"mob_id":2741,"x":280,"y":65,"hp":49912004,"max_hp":49912004,"speed":300}"#;
const PLAYER: &str = r#"{"event":"move","char_id":150001,"x":149,"y":186,"dir":7,"hp":20123,"max_hp":20443,"sp":391,"max_sp":391,"base_level":99,"speed":150,"new":true}"#;
const COMING: &str =
    r#"{"event":"enter","char_id":150001,"x":149,"y":186,"dir":7,"hp":20123,"max_hp":20443,"speed":150,"new":true}"#;
const CHARACTER: &str = r#"{"char_id":150001,"name":"Poring Fan","base_level":99,"job_level":50,"zeny":2147483647,"hp":20123,"max_hp":20443,"sp":391,"max_sp":391}"#;
const DROP: &str = r#"{"event":"drop","drop_id":55,"item_id":909,"amount":30000,"x":241,"y":390}"#;

#[test]
fn one_event_of_each_kind_of_the_recording_fits_its_schema() {
    let rules = Rules::builtin();
    for (data_type, payload) in [
        (SyncDataType::NpcState, NPC),
        (SyncDataType::MonsterData, MONSTER),
        (SyncDataType::PlayerPosition, PLAYER),
        (SyncDataType::PlayerPresence, COMING),
        (SyncDataType::PlayerPresence, r#"{"event":"enter","char_id":150001}"#),
        (SyncDataType::PlayerData, CHARACTER),
        (SyncDataType::ItemDrop, DROP),
        (
            SyncDataType::ItemDrop,
            r#"{"event":"gone","drop_id":55,"x":241,"y":390}"#,
        ),
        (
            SyncDataType::MapState,
            r#"{"map_name":"gef_fild07","users":5,"npcs":10,"width":380,"height":380,"is_vps_hosted":false}"#,
        ),
        (
            SyncDataType::ChatMessage,
            r#"{"char_id":150021,"name":"bot0021","text":"hello from 198,203"}"#,
        ),
    ] {
        assert_eq!(rules.of(data_type).check(payload), Ok(()), "{payload}");
    }
}

#[test]
fn what_the_game_does_not_have_is_impossible() {
    let rules = Rules::builtin();
    let player = (SyncDataType::PlayerPosition, PLAYER);
    let presence = (SyncDataType::PlayerPresence, COMING);
    let character = (SyncDataType::PlayerData, CHARACTER);
    let monster = (SyncDataType::MonsterData, MONSTER);
    let drop = (SyncDataType::ItemDrop, DROP);
    for ((data_type, payload), honest, forged, place) in [
        (player, "20123", "-1", "/hp: "),
        (player, "20123", "20444", "/hp: "),
        (player, "\"sp\":391", "\"sp\":392", "/sp: "),
        (player, "99", "276", "/base_level: "),
        (player, "99", "0", "/base_level: "),
        (player, "149", "1024", "/x: "),
        (player, "186", "-1", "/y: "),
        (player, "150,", "19,", "/speed: "),
        (presence, "20123", "20444", "/hp: "),
        (character, "20123", "20444", "/hp: "),
        (character, "2147483647", "2147483648", "/zeny: "),
        (character, "2147483647", "-1", "/zeny: "),
        (monster, "\"hp\":49912004", "\"hp\":49912005", "/hp: "),
        (monster, "\"max_hp\":49912004", "\"max_hp\":2147483648", "/max_hp: "),
        (drop, "30000", "30001", "/amount: "),
        (drop, "30000", "0", "/amount: "),
    ] {
        assert!(payload.contains(honest), "{honest}");
        let problem = rules
            .of(data_type)
            .check(&payload.replace(honest, forged))
            .expect_err(place);
        assert_eq!(problem.code, Code::ImpossibleValue, "{problem}");
        assert!(problem.sentence.starts_with(place), "{problem}");
    }
}
