//! Tools search all that happened on eligible maps.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use p2p_sync_proto::v1::SyncDataType;
use p2p_sync_tests::recording::Happening;
use reqwest::Method;
use serde_json::{Value, json};

use crate::world::{DIMENSIONS, PATIENCE, World};

const QUESTION: &str = "who talks about the missing caravan?";
const CARAVAN: &str = "The caravan from Morroc is missing.";
const POTIONS: &str = "Selling red potions.";
const SEEN: &str = "Have you seen the caravan?";

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the end of time")
}

/// A hub where a host has said something on two maps, and a guard has something to say.
async fn talking() -> World {
    let settings = [
        ("vector_eligible_maps", "*".to_owned()),
        ("leases", "required".to_owned()),
    ];
    let world = World::lexical(&settings).await;
    let mut host = world.host("host", &["prontera", "geffen"]);
    let chat = |map, char_id: u32, text| {
        let payload = json!({"char_id": char_id, "name": "Anna", "text": text});
        (SyncDataType::ChatMessage, map, payload)
    };
    let guard = json!({"npc_id": 7, "name": "Guard", "dialogue": ["No caravan came today."]});
    for (tag, (data_type, map, payload)) in (1..).zip([
        chat("prontera", 150_001, CARAVAN),
        chat("prontera", 150_002, POTIONS),
        chat("geffen", 150_003, SEEN),
        (SyncDataType::NpcState, "prontera", guard),
    ]) {
        let happening = Happening {
            at_ms: 0,
            data_type,
            map: map.to_owned(),
            account_id: 2_000_001,
            entity: None,
            payload: Some(payload.to_string()),
        };
        assert!(host.submit(tag, &happening), "the agent is gone");
    }
    let began = Instant::now();
    while world.count("SELECT count(*) FROM p2p_sync.embeddings").await < 4 {
        assert!(began.elapsed() < PATIENCE, "{}", world.hub.log());
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    world
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_finds_who_talks_about_the_missing_caravan_and_narrows_it() {
    let world = talking().await;
    let told = world.search(&json!({"text": QUESTION})).await;
    assert_eq!((told.status, told.hits().len()), (200, 4), "of all maps: {}", told.body);
    let hit = &told.hits()[0];
    assert_eq!(
        (&hit["text"], &hit["path"], &hit["id"], &hit["type"]),
        (
            &json!(CARAVAN),
            &json!("prontera/CHAT_MESSAGE/150001"),
            &json!("150001"),
            &json!("CHAT_MESSAGE")
        )
    );
    assert_eq!(hit["metadata"], json!({"char_id": 150_001, "name": "Anna"}));
    assert_eq!(
        (&hit["map"], &hit["account_id"]),
        (&json!("prontera"), &json!(2_000_001))
    );

    let vector = world.embed(&json!(QUESTION)).await.body["data"][0]["embedding"].clone();
    let by_vector = world.search(&json!({"embedding": vector})).await;
    assert_eq!(by_vector.texts(), told.texts(), "the same, whoever embeds it");

    let narrowed = async |narrow: Value| {
        let mut search = json!({"text": QUESTION});
        search
            .as_object_mut()
            .expect("an object")
            .extend(narrow.as_object().expect("an object").clone());
        let told = world.search(&search).await;
        let mut texts: Vec<String> = told.texts().into_iter().map(str::to_owned).collect();
        texts.sort_unstable();
        texts
    };
    assert_eq!(narrowed(json!({"maps": ["geffen"]})).await, [SEEN]);
    assert_eq!(
        narrowed(json!({"types": ["NPC_STATE"]})).await,
        ["Guard\nNo caravan came today."]
    );
    assert_eq!(narrowed(json!({"limit": 1})).await, [CARAVAN]);
    assert_eq!(narrowed(json!({"prefix": "geffen/"})).await, [SEEN]);
    let near = narrowed(json!({"min_similarity": 0.3})).await;
    assert!(
        !near.contains(&POTIONS.to_owned()) && near.contains(&CARAVAN.to_owned()),
        "{near:?}"
    );
    let hour = 60 * 60 * 1000;
    assert_eq!(narrowed(json!({"since_ms": now_ms() - hour})).await.len(), 4);
    assert!(narrowed(json!({"since_ms": now_ms() + hour})).await.is_empty());
    assert!(narrowed(json!({"until_ms": now_ms() - hour})).await.is_empty());
    assert_eq!(
        narrowed(json!({"until_ms": now_ms() + hour, "maps": ["prontera"]}))
            .await
            .len(),
        3
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_can_be_wrong_with_a_search_has_its_code_and_status() {
    let world = World::lexical(&[]).await;
    let vector = |first: f64| {
        let mut numbers = vec![json!(0.1); DIMENSIONS];
        numbers[0] = json!(first);
        json!(numbers)
    };
    for (search, expected, param) in [
        (
            json!({"embedding": [0.5]}),
            (400, "WRONG_DIMENSIONS"),
            Some("embedding"),
        ),
        (
            json!({"embedding": vec![0; DIMENSIONS]}),
            (400, "NOT_FINITE"),
            Some("embedding"),
        ),
        (
            json!({"embedding": vector(1e39)}),
            (400, "NOT_FINITE"),
            Some("embedding"),
        ),
        (
            json!({"embedding": vector(f64::NAN)}),
            (400, "NOT_FINITE"),
            Some("embedding"),
        ),
        (json!({"text": " "}), (400, "EMPTY_TEXT"), Some("text")),
        (
            json!({"text": "x".repeat(32 * 1024 + 1)}),
            (413, "TEXT_TOO_LONG"),
            Some("text"),
        ),
        (
            json!({"text": "x", "embedding": vector(0.5)}),
            (400, "BAD_REQUEST"),
            None,
        ),
        (json!({"limit": 3}), (400, "BAD_REQUEST"), None),
        (json!({"text": "x", "limit": 0}), (400, "BAD_REQUEST"), Some("limit")),
        (json!({"text": "x", "maps": ["a/b"]}), (400, "BAD_MAP"), Some("maps")),
        (
            json!({"text": "x", "types": ["CHATTER"]}),
            (400, "UNKNOWN_TYPE"),
            Some("types"),
        ),
        (json!({"text": "x", "min_similarity": 2}), (400, "BAD_REQUEST"), None),
        (json!({"text": "x", "map": "prontera"}), (400, "BAD_REQUEST"), None),
    ] {
        let told = world.search(&search).await;
        assert_eq!(told.refusal(), expected, "{}", told.body);
        assert_eq!(told.body["error"]["param"].as_str(), param, "{}", told.body);
    }
    // As Python writes them.
    for number in ["NaN", "Infinity", "-Infinity", "1e400"] {
        let body = format!(r#"{{"embedding": [0.5, {number}]}}"#);
        let told = world
            .ask_as(Some(&world.token()), Method::POST, "/v1/embeddings/search", &body)
            .await;
        assert_eq!(told.refusal(), (400, "NOT_FINITE"), "{body}");
    }
    let none = world.search(&json!({"text": "x"})).await;
    assert!(none.hits().is_empty(), "where there is nothing, nothing is found");
}
