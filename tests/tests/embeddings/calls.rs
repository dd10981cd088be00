//! Hosts and the operator embed and search: what they find, what they may, and what it costs.

use serde_json::{Value, json};

use crate::world::{DIMENSIONS, World, put, says, similar, texts_of};

const CARAVAN: &str = "The caravan from Morroc is missing.";

/// Two hosts, each with a map that it holds, and what was said there.
async fn two_maps() -> (World, p2p_sync_tests::stack::Agent, p2p_sync_tests::stack::Agent) {
    let world = World::embedding("*", &[("leases", "required".to_owned())]).await;
    let (mut one, mut other) = (world.host("one", &["prontera"]), world.host("other", &["geffen"]));
    says(&mut one, "prontera", 150_001, CARAVAN);
    says(&mut one, "prontera", 150_002, "Selling red potions.");
    put(
        &mut one,
        "NPC_STATE",
        "prontera",
        &json!({"npc_id": 7, "name": "Guard", "dialogue": ["No caravan came today."]}),
    );
    says(&mut other, "geffen", 150_003, "Have you seen the caravan?");
    world.embedded(4).await;
    (world, one, other)
}

fn code(told: &Value) -> &str {
    told["label"].as_str().unwrap_or_else(|| panic!("no refusal: {told}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_embeds_a_text_and_finds_what_lies_near_on_its_own_maps() {
    let (_world, mut one, mut other) = two_maps().await;
    let told = one.ask(json!({"do": "embed", "text": "the missing caravan"}));
    let embedding = told["embedding"].as_array().expect("numbers");
    assert_eq!(embedding.len(), DIMENSIONS);
    let length: f64 = embedding.iter().map(|x| x.as_f64().expect("a number").powi(2)).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");

    let by_vector = similar(&mut one, &json!(embedding));
    assert_eq!(texts_of(&by_vector)[0], CARAVAN, "{by_vector}");
    let by_text = similar(&mut one, &json!({"text": "the missing caravan"}));
    assert_eq!(texts_of(&by_text), texts_of(&by_vector), "in one call");
    assert_eq!(texts_of(&by_text).len(), 3, "what happened on its own map: {by_text}");
    let hit = &by_text["hits"][0];
    assert_eq!(hit["path"], "prontera/CHAT_MESSAGE/150001");
    assert_eq!(
        (&hit["id"], &hit["type"], &hit["map"]),
        (&json!("150001"), &json!("CHAT_MESSAGE"), &json!("prontera"))
    );
    assert_eq!(hit["metadata"], json!({"char_id": 150_001, "name": "Anna"}));
    assert!(
        hit["similarity"].as_f64() > Some(0.5) && hit["received_at_ms"].as_u64() > Some(1_600_000_000_000),
        "{hit}"
    );

    let foreign = similar(&mut other, &json!({"text": "caravan"}));
    assert_eq!(texts_of(&foreign), ["Have you seen the caravan?"]);
    let refused = similar(&mut one, &json!({"text": "caravan", "maps": ["geffen"]}));
    assert_eq!(code(&refused), "NOT_ALLOWED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_is_narrowed_by_type_time_likeness_and_number() {
    let (_world, mut one, _other) = two_maps().await;
    let mut found = |narrowed: Value| {
        let mut search = json!({"text": "caravan"});
        for (name, value) in narrowed.as_object().expect("members") {
            search[name] = value.clone();
        }
        let told = similar(&mut one, &search);
        texts_of(&told).iter().map(|&text| text.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(
        found(json!({"types": ["NPC_STATE"]})),
        ["Guard\nNo caravan came today."]
    );
    assert_eq!(found(json!({"limit": 1})).len(), 1);
    assert_eq!(found(json!({"min_similarity": 0.2})).len(), 2);
    assert_eq!(found(json!({"maps": ["prontera"]})).len(), 3);
    assert_eq!(found(json!({"until_ms": 1_600_000_000_000_u64})).len(), 0);
    assert_eq!(found(json!({"since_ms": 1_600_000_000_000_u64})).len(), 3);
    assert_eq!(found(json!({"since_ms": u64::MAX})).len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_embedded_or_searched_has_a_code_each() {
    let (world, mut one, _other) = two_maps().await;
    let embed = |host: &mut p2p_sync_tests::stack::Agent, text: &str| host.ask(json!({"do": "embed", "text": text}));
    assert_eq!(code(&embed(&mut one, "")), "EMPTY_TEXT");
    assert_eq!(code(&embed(&mut one, " \n")), "EMPTY_TEXT");
    assert_eq!(code(&embed(&mut one, &"x".repeat(33 * 1024))), "TEXT_TOO_LONG");
    let numbers = |first: Value| {
        let mut numbers = vec![json!(0.5); DIMENSIONS];
        numbers[0] = first;
        json!(numbers)
    };
    assert_eq!(code(&similar(&mut one, &json!([0.5, 0.5]))), "WRONG_DIMENSIONS");
    assert_eq!(code(&similar(&mut one, &json!([]))), "WRONG_DIMENSIONS");
    assert_eq!(code(&similar(&mut one, &numbers(json!(1e39)))), "NOT_FINITE");
    assert_eq!(code(&similar(&mut one, &json!(vec![0; DIMENSIONS]))), "NOT_FINITE");
    assert_eq!(
        code(&similar(&mut one, &json!({"text": "x", "embedding": [1]}))),
        "BAD_REQUEST"
    );
    assert_eq!(
        code(&similar(&mut one, &json!({"text": "x", "min_similarity": 2}))),
        "BAD_REQUEST"
    );
    assert_eq!(
        code(&similar(&mut one, &json!({"text": "x", "types": ["CHATTER"]}))),
        "UNKNOWN_TYPE"
    );
    assert_eq!(texts_of(&similar(&mut one, &numbers(json!(0.5)))).len(), 3);
    world.server.set_down(true);
    assert_eq!(code(&embed(&mut one, "x")), "EMBEDDINGS_UNAVAILABLE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_spends_no_more_than_its_budget_and_nothing_for_what_failed() {
    let world = World::embedding("*", &[("embedding_host_tokens_per_day", "10".to_owned())]).await;
    let mut host = world.host("host", &[]);
    let mut embed = |text: &str| host.ask(json!({"do": "embed", "text": text}));
    world.server.set_down(true);
    assert_eq!(code(&embed("123456789")), "EMBEDDINGS_UNAVAILABLE");
    world.server.set_down(false);
    // The provider is left alone for a moment after its failure.
    while !embed("123456789")["embedding"].is_array() {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert!(embed("123456789123456789")["embedding"].is_array());
    let before = world.server.requests().len();
    let told = embed("123456789");
    assert_eq!(code(&told), "BUDGET_SPENT");
    assert!(
        told["error"]
            .as_str()
            .expect("a sentence")
            .contains("3 tokens, and 1 of this host's 10"),
        "{told}"
    );
    assert_eq!(world.server.requests().len(), before, "nobody is asked");
    let mut another = world.host("another", &[]);
    assert!(another.ask(json!({"do": "embed", "text": "123456789"}))["embedding"].is_array());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_have_no_embeddings_where_the_operator_allows_none() {
    for (setting, expected) in [
        (("embedding_host_tokens_per_day", "0".to_owned()), "NOT_ALLOWED"),
        (("embedding_provider", "off".to_owned()), "UNSUPPORTED"),
    ] {
        let world = World::embedding("*", &[setting]).await;
        let mut host = world.host("host", &[]);
        assert_eq!(code(&host.ask(json!({"do": "embed", "text": "x"}))), expected);
        assert_eq!(code(&similar(&mut host, &json!({"text": "x"}))), expected);
        assert_eq!(code(&similar(&mut host, &json!([0.5]))), expected);
        assert!(world.server.requests().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_searches_everything_and_forgets_what_should_not_be_there() {
    let (world, mut one, _other) = two_maps().await;
    let found = world
        .hub
        .command(&["embeddings", "search", "the missing caravan", "--json"]);
    let hits: Vec<Value> = found
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(hits.len(), 4, "of all maps: {found}");
    assert_eq!(hits[0]["text"], CARAVAN);
    let found = world.hub.command(&[
        "embeddings",
        "search",
        "caravan",
        "--map",
        "geffen",
        "--type",
        "CHAT_MESSAGE",
        "--since",
        "1h",
        "--min-score",
        "0.1",
        "--limit",
        "5",
    ]);
    assert!(
        found.lines().count() == 1 && found.contains("geffen/CHAT_MESSAGE/150003"),
        "{found}"
    );
    let spent = world.count("SELECT count(*) FROM p2p_sync.embedding_spend").await;
    assert_eq!(spent, 1, "the queue's alone");
    assert_eq!(
        world
            .hub
            .command(&["embeddings", "forget", "--path", "prontera/CHAT_MESSAGE/150001"]),
        "1 vectors deleted"
    );
    assert_eq!(
        world.hub.command(&["embeddings", "fill", "--map", "prontera"]),
        "1 queued; the proxies embed them"
    );
    world.embedded(4).await;
    assert_eq!(
        world.hub.command(&["embeddings", "forget", "--all"]),
        "4 vectors deleted"
    );
    assert!(texts_of(&similar(&mut one, &json!({"text": "caravan"}))).is_empty());
    assert_eq!(world.hub.command(&["embeddings", "retry"]), "0 queued again");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_the_operators_is_found() {
    let (world, mut one, _other) = two_maps().await;
    let edit = r#"{"npc_id":7,"name":"Guard","dialogue":"The bridge is broken."}"#;
    world
        .hub
        .command(&["ops", "put", "prontera/NPC_STATE/7", "--data", edit]);
    let began = std::time::Instant::now();
    loop {
        let told = similar(&mut one, &json!({"text": "a broken bridge", "types": ["NPC_STATE"]}));
        if texts_of(&told) == ["Guard\nThe bridge is broken."] {
            break;
        }
        assert!(began.elapsed() < crate::world::PATIENCE, "{told}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
}
