//! What a tool keeps under ids of its own.

use reqwest::Method;
use serde_json::{Value, json};

use crate::world::{DIMENSIONS, MODEL, World};

const LORE: &str = "Caravans from Morroc bring spices.";

async fn entry(world: &World, id: &str) -> crate::world::Told {
    world
        .ask(Method::GET, &format!("/v1/embeddings/{id}"), &Value::Null)
        .await
}

async fn delete(world: &World, id: &str) -> crate::world::Told {
    world
        .ask(Method::DELETE, &format!("/v1/embeddings/{id}"), &Value::Null)
        .await
}

fn numbers(told: &Value) -> Vec<f32> {
    serde_json::from_value(told.clone()).expect("numbers")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_kept_found_put_anew_and_deleted_by_its_id() {
    let world = World::lexical(&[]).await;
    let metadata = json!({"by": "lore team", "chapter": 3});
    let told = world
        .put("lore:caravan", &json!({"text": LORE, "metadata": metadata}))
        .await;
    let path = "@hub/VECTOR_EMBEDDING/lore:caravan";
    assert_eq!(told.status, 201);
    assert_eq!(told.body, json!({"id": "lore:caravan", "path": path, "created": true}));
    world
        .put("rules:1", &json!({"text": "No caravan may stop here."}))
        .await;

    let told = world.search(&json!({"text": "which spices do caravans bring?"})).await;
    let hit = &told.hits()[0];
    assert_eq!(
        (&hit["id"], &hit["path"], &hit["text"]),
        (&json!("lore:caravan"), &json!(path), &json!(LORE))
    );
    assert_eq!(
        (&hit["metadata"], &hit["type"]),
        (&metadata, &json!("VECTOR_EMBEDDING"))
    );
    let of_rules = json!({"text": "caravan", "prefix": "@hub/VECTOR_EMBEDDING/rules:"});
    assert_eq!(world.search(&of_rules).await.texts(), ["No caravan may stop here."]);

    let kept = entry(&world, "lore:caravan").await;
    assert_eq!(
        (kept.status, &kept.body["text"], &kept.body["metadata"]),
        (200, &json!(LORE), &metadata)
    );
    assert_eq!((&kept.body["model"], &kept.body["map"]), (&json!(MODEL), &json!("")));
    assert_eq!(numbers(&kept.body["embedding"]).len(), DIMENSIONS);

    let told = world
        .put("lore:caravan", &json!({"text": "Caravans bring silk."}))
        .await;
    assert_eq!((told.status, &told.body["created"]), (200, &json!(false)));
    let kept = entry(&world, "lore:caravan").await;
    assert_eq!(
        (&kept.body["text"], &kept.body["metadata"]),
        (&json!("Caravans bring silk."), &Value::Null)
    );
    assert_eq!(
        world.search(&json!({"text": "caravans"})).await.hits().len(),
        2,
        "nothing is left of the former text"
    );

    assert_eq!(delete(&world, "lore:caravan").await.status, 204);
    assert_eq!(delete(&world, "lore:caravan").await.refusal(), (404, "NOT_FOUND"));
    assert_eq!(entry(&world, "lore:caravan").await.refusal(), (404, "NOT_FOUND"));
    assert_eq!(world.search(&json!({"text": "caravans"})).await.hits().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vector_of_the_tools_own_is_kept_as_it_is_and_no_text_of_others_takes_it_over() {
    let world = World::lexical(&[]).await;
    let mut vector = vec![0.0; DIMENSIONS];
    vector[3] = 8.0;
    let told = world.put("alone", &json!({"embedding": vector, "model": MODEL})).await;
    assert_eq!(told.status, 201);
    let kept = entry(&world, "alone").await;
    assert_eq!(
        (&kept.body["text"], numbers(&kept.body["embedding"])[3]),
        (&Value::Null, 1.0),
        "of length 1"
    );
    let hits = world.search(&json!({"embedding": vector})).await;
    assert_eq!(
        (&hits.hits()[0]["id"], &hits.hits()[0]["similarity"]),
        (&json!("alone"), &json!(1.0))
    );

    world
        .put("with text", &json!({"embedding": vector, "text": LORE}))
        .await;
    world.put("by the hub", &json!({"text": LORE})).await;
    let of_hub = numbers(&entry(&world, "by the hub").await.body["embedding"]);
    assert!(
        (of_hub[3] - 1.0).abs() > 0.1,
        "the hub's own, though the same text is there with another vector"
    );
    let of_tool = numbers(&entry(&world, "with text").await.body["embedding"]);
    assert!((of_tool[3] - 1.0).abs() < 1e-6);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_can_be_wrong_with_what_is_kept_has_its_code_and_status() {
    let world = World::lexical(&[]).await;
    let long = "x".repeat(129);
    for (id, entry, expected, param) in [
        ("a", json!({}), (400, "BAD_REQUEST"), None),
        ("a", json!({"text": ""}), (400, "EMPTY_TEXT"), Some("text")),
        (
            "a",
            json!({"text": "x".repeat(32 * 1024 + 1)}),
            (413, "TEXT_TOO_LONG"),
            Some("text"),
        ),
        ("a", json!({"text": "a\0b"}), (400, "BAD_TEXT"), Some("text")),
        (
            "a",
            json!({"embedding": [1, 2, 3]}),
            (400, "WRONG_DIMENSIONS"),
            Some("embedding"),
        ),
        (
            "a",
            json!({"embedding": vec![Value::Null; DIMENSIONS]}),
            (400, "NOT_FINITE"),
            Some("embedding"),
        ),
        (
            "a",
            json!({"text": "x", "model": "other"}),
            (404, "NOT_FOUND"),
            Some("model"),
        ),
        ("a", json!({"text": "x", "map": "a b"}), (400, "BAD_MAP"), Some("map")),
        ("a", json!({"text": "x", "metadata": [1]}), (400, "BAD_REQUEST"), None),
        (
            "a",
            json!({"text": "x", "metadata": {"a": "\0"}}),
            (400, "BAD_TEXT"),
            None,
        ),
        (
            "a",
            json!({"text": "x", "metadata": {"a": "y".repeat(5000)}}),
            (413, "TOO_LARGE"),
            None,
        ),
        ("a%2Fb", json!({"text": "x"}), (400, "BAD_PATH"), Some("id")),
        ("a%00", json!({"text": "x"}), (400, "BAD_PATH"), Some("id")),
        ("a%FF", json!({"text": "x"}), (400, "BAD_PATH"), Some("id")),
        (long.as_str(), json!({"text": "x"}), (400, "BAD_PATH"), Some("id")),
    ] {
        let told = world.put(id, &entry).await;
        assert_eq!(told.refusal().1, expected.1, "{id} {}", told.body);
        assert_eq!(told.status, expected.0, "{}", told.body);
        if expected.1 != "BAD_TEXT" {
            assert_eq!(told.body["error"]["param"].as_str(), param, "{}", told.body);
        }
    }
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.embeddings").await, 0);
    assert_eq!(
        world.put("ü ~", &json!({"text": "x"})).await.status,
        201,
        "an id is any text"
    );
    assert_eq!(entry(&world, "%C3%BC%20~").await.body["id"], json!("ü ~"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_finds_what_tools_keep_for_its_maps_and_nothing_else_of_theirs() {
    let world = World::lexical(&[("leases", "required".to_owned())]).await;
    let mut host = world.host("host", &["prontera"]);
    for (id, map) in [("for prontera", "prontera"), ("for geffen", "geffen"), ("secret", "")] {
        let text = format!("A caravan {id}");
        assert_eq!(world.put(id, &json!({"text": text, "map": map})).await.status, 201);
    }
    let told = host.ask(json!({"do": "similar", "search": {"text": "caravan"}}));
    let hits = told["hits"].as_array().unwrap_or_else(|| panic!("{told}"));
    let ids: Vec<&str> = hits.iter().filter_map(|hit| hit["id"].as_str()).collect();
    assert_eq!(ids, ["for prontera"], "{told}");
    assert_eq!(
        world.search(&json!({"text": "caravan"})).await.hits().len(),
        3,
        "a tool finds all"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_tools_keep_outlives_another_model_and_what_the_operator_forgets() {
    let mut world = World::lexical(&[]).await;
    let mut vector = vec![0.0; DIMENSIONS];
    vector[3] = 1.0;
    world.put("text", &json!({"text": LORE, "metadata": {"a": 1}})).await;
    world
        .put("both", &json!({"text": "A caravan.", "embedding": vector}))
        .await;
    world.put("alone", &json!({"embedding": vector})).await;
    assert_eq!(
        world.hub.command(&["embeddings", "forget", "--all"]),
        "0 vectors deleted"
    );
    assert_eq!(
        world
            .hub
            .command(&["schema", "reembed"])
            .lines()
            .last()
            .map(|line| line.contains("gone")),
        Some(false)
    );
    assert_eq!(
        entry(&world, "alone").await.status,
        200,
        "the same model: the index alone is made anew"
    );

    // While vectors are made anew nothing is put that would be lost with the old ones.
    let remaking = "UPDATE p2p_sync.embedding_space SET next_model = 'another'";
    world.sql.batch_execute(remaking).await.expect("valid SQL");
    assert_eq!(
        world.put("late", &json!({"text": "x"})).await.refusal(),
        (503, "EMBEDDINGS_UNAVAILABLE")
    );
    assert_eq!(delete(&world, "late").await.refusal(), (404, "NOT_FOUND"));

    let text = std::fs::read_to_string(world.hub.config()).expect("its settings");
    let changed = text.replace(
        &format!("embedding_dimensions = {DIMENSIONS}"),
        "embedding_dimensions = 96",
    );
    std::fs::write(world.hub.config(), changed).expect("the folder can be written");
    let told = world.hub.command(&["schema", "reembed"]);
    assert!(
        told.contains("2 vectors of 96 dimensions by lexical-1 are in place; 1 that tools gave"),
        "{told}"
    );
    assert_eq!(
        world.put("late", &json!({"text": "x"})).await.refusal().0,
        503,
        "set to the old dimensions still"
    );
    world.hub.stop();
    world.hub.start();
    let kept = entry(&world, "text").await;
    assert_eq!(
        (&kept.body["text"], numbers(&kept.body["embedding"]).len()),
        (&json!(LORE), 96)
    );
    assert_eq!(kept.body["metadata"], json!({"a": 1}));
    assert_eq!(entry(&world, "alone").await.refusal(), (404, "NOT_FOUND"));
    assert_eq!(world.put("late", &json!({"text": "x"})).await.status, 201);
    let forget = ["embeddings", "forget", "--path", "@hub/VECTOR_EMBEDDING/both"];
    assert_eq!(world.hub.command(&forget), "1 vectors deleted", "by its path it goes");
}
