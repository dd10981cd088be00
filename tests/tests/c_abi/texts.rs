//! Texts of a map server, which passes the raw bytes of its code page.

use p2p_sync_proto::v1::SyncDataType;
use serde_json::Value;

use crate::{
    puppet::{APPLIED, Puppet, number_of},
    world::World,
};

/// 프론테라 in EUC-KR.
const PRONTERA: &[u8] = b"\xc7\xc1\xb7\xd0\xc5\xd7\xb6\xf3";

/// Puts a chat message of raw bytes and gives what Postgres holds of its text.
fn stored_text(world: &World, puppet: &mut Puppet, payload: &[u8]) -> String {
    let data_type = number_of(SyncDataType::ChatMessage);
    let answer = puppet.tell_bytes(&[b"put", data_type.as_bytes(), b"2000001", b"prontera", payload]);
    let id = answer["id"].as_str().expect("a text").to_owned();
    assert!(!id.is_empty(), "no operation is lost by its texts: {answer}");
    let settled = puppet.settled(&id);
    assert_eq!(settled["state"], APPLIED, "{settled}");
    let id: uuid::Uuid = id.parse().expect("an id");
    let rows = world.rows(
        "SELECT payload->>'text' FROM p2p_sync.operations WHERE operation_id = $1",
        &[&id],
    );
    rows[0].get(0)
}

fn chat_of(text: &[u8]) -> Vec<u8> {
    [br#"{"char_id":150001,"text":""#, text, br#""}"#].concat()
}

#[test]
fn bytes_of_the_servers_code_page_arrive_as_utf_8() {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "text_encoding = EUC-KR\n");
    assert_eq!(stored_text(&world, &mut puppet, &chat_of(PRONTERA)), "프론테라");
    // C2 A1 is ¡ in UTF-8 and one syllable in EUC-KR.
    assert_eq!(stored_text(&world, &mut puppet, &chat_of(b"\xc2\xa1")), "징");
    assert_eq!(puppet.tell(&["numbers"])["texts_escaped"], 0);
}

#[test]
fn bytes_that_are_no_text_are_escaped_and_the_operation_is_kept() {
    let world = World::new();
    let mut korean = Puppet::new(&world, "text_encoding = EUC-KR\n");
    assert_eq!(
        stored_text(&world, &mut korean, &chat_of(b"hi \xc7\xc1\xff")),
        r"hi 프\xff"
    );
    assert_eq!(korean.tell(&["numbers"])["texts_escaped"], 1);
    let mut plain = Puppet::new(&world, "");
    // Two of the eight bytes happen to be a character of UTF-8.
    let escaped = concat!(r"\xc7\xc1\xb7\xd0\xc5", "\u{5f6}", r"\xf3");
    assert_eq!(stored_text(&world, &mut plain, &chat_of(PRONTERA)), escaped);
    assert_eq!(plain.tell(&["numbers"])["texts_escaped"], 1);
}

#[test]
fn a_json_string_can_be_made_of_any_bytes_and_stand_in_a_payload() {
    let world = World::new();
    let mut puppet = Puppet::new(&world, "text_encoding = EUC-KR\n");
    let mut json_string = |bytes: &[u8]| {
        let answer = puppet.tell_bytes(&[b"json_string", bytes]);
        answer["json"].as_str().expect("a text").to_owned()
    };
    let name = json_string(PRONTERA);
    assert!(name.is_ascii(), "{name}");
    for (bytes, text) in [
        (PRONTERA, "프론테라"),
        (br#"say "hi" \ there"#, r#"say "hi" \ there"#),
        (b"\x01\x7f\xff", "\u{1}\u{7f}\\xff"),
        (b"", ""),
    ] {
        let json: Value = serde_json::from_str(&json_string(bytes)).expect("JSON");
        assert_eq!(json, text);
    }
    let long = [&b"\xff"[..], &[b'x'; 300]].concat();
    json_string(&long);
    let counted = puppet.tell(&["numbers"])["texts_escaped"].as_u64();
    assert_eq!(
        counted,
        Some(2),
        "each text once, also where the first buffer is too small"
    );
    let payload = format!(r#"{{"char_id":150001,"text":{name}}}"#);
    assert_eq!(stored_text(&world, &mut puppet, payload.as_bytes()), "프론테라");
}
