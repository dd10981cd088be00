//! A map server embeds and searches.

use p2p_sync_proto::v1::SyncDataType;
use serde_json::Value;

use crate::{
    puppet::{Puppet, number_of},
    world::{World, until},
};

#[test]
fn a_map_server_embeds_a_text_and_finds_what_was_said_near_to_it() {
    let world = World::with(&[
        ("vector_eligible_maps", "prontera".to_owned()),
        ("embedding_dimensions", "256".to_owned()),
    ]);
    let mut puppet = Puppet::new(&world, "critical_timeout_ms = 5000\n");
    puppet.wait_for_link();
    let embedding = puppet.tell(&["embedding", "the missing caravan"]);
    let embedding = embedding["embedding"].as_str().expect("a text").to_owned();
    let numbers: Vec<f32> = serde_json::from_str(&embedding).expect("a JSON array of numbers");
    assert_eq!(numbers.len(), 256);

    let chat = r#"{"char_id":150001,"name":"Anna","text":"The caravan is missing."}"#;
    let put = puppet.tell(&["put", &number_of(SyncDataType::ChatMessage), "0", "prontera", chat]);
    assert!(put["id"].as_str().is_some_and(|id| !id.is_empty()), "{put}");
    until("what was said is found", || {
        puppet.tell(&["similar", &embedding])["found"] == 1
    });
    let near = puppet.tell(&["similar_text", "the missing caravan", "prontera"]);
    assert_eq!(near["found"], 1, "{near}");
    let hit: Value = serde_json::from_str(near["first"].as_str().expect("a text")).expect("a JSON object");
    assert_eq!(
        (&hit["id"], &hit["metadata"]["name"]),
        (&"150001".into(), &"Anna".into()),
        "{hit}"
    );
    let narrowed = r#"{"text":"the missing caravan","types":["NPC_STATE"]}"#;
    assert_eq!(puppet.tell(&["similar", narrowed])["found"], 0);
    assert_eq!(
        puppet.tell(&["similar_text", "the missing caravan", "geffen"])["found"],
        0
    );
}
