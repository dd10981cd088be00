//! Another model, other dimensions: the vectors are made anew beside those that serve.

use p2p_sync_tests::stack::Hub;
use serde_json::json;

use crate::world::{World, says, similar, texts_of};

fn set(hub: &Hub, changes: &[(&str, &str)]) {
    let mut text = std::fs::read_to_string(hub.config()).expect("its settings");
    for (key, value) in changes {
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with(&format!("{key} =")))
            .collect();
        text = format!("{}\n{key} = {value}\n", kept.join("\n"));
    }
    std::fs::write(hub.config(), text).expect("the folder can be written");
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_are_made_anew_for_another_model_and_the_old_ones_serve_until_then() {
    let mut world = World::embedding("*", &[]).await;
    let mut host = world.host("host", &[]);
    for number in 0..70 {
        says(&mut host, "prontera", number, &format!("line number {number}"));
    }
    says(&mut host, "prontera", 70, "The caravan is missing.");
    world.embedded(71).await;
    let find = json!({"text": "missing caravan", "limit": 1});

    let changed = [("embedding_provider", "lexical"), ("embedding_dimensions", "96")];
    set(&world.hub, &changed);
    let told = world.hub.fails(&["serve"]);
    assert!(
        told.contains("EMBEDDINGS_MISMATCH") && told.contains("schema reembed"),
        "{told}"
    );
    // Whoever serves goes on with the old vectors.
    assert_eq!(texts_of(&similar(&mut host, &find)), ["The caravan is missing."]);

    let told = world.hub.command(&["schema", "reembed"]);
    assert!(
        told.contains("of 71 vectors\n") && told.contains("71 vectors of 96 dimensions by lexical-1"),
        "{told}"
    );
    let refused = similar(&mut host, &find);
    assert_eq!(
        refused["label"], "EMBEDDINGS_UNAVAILABLE",
        "set to the old model still: {refused}"
    );
    says(&mut host, "prontera", 71, "said in between");
    world.hub.stop();
    world.hub.start();
    // At another port.
    let mut host = world.host("another", &[]);
    assert_eq!(texts_of(&similar(&mut host, &find)), ["The caravan is missing."]);
    world.embedded(72).await;
    let scan = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'p2p_sync' AND tablename = 'embeddings' \
        AND indexname NOT LIKE '%next%'";
    assert_eq!(
        world.count(scan).await,
        5,
        "the key, and four more under their old names"
    );

    // The same model: the index alone is made anew.
    set(&world.hub, &[("hnsw_m", "8")]);
    world.hub.command(&["schema", "reembed"]);
    let index =
        "SELECT count(*) FROM pg_indexes WHERE indexname = 'embeddings_by_cosine' AND indexdef LIKE '%m=''8''%'";
    assert_eq!(world.count(index).await, 1);
    assert_eq!(texts_of(&similar(&mut host, &find)), ["The caravan is missing."]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_interrupted_goes_on_where_it_was() {
    let mut world = World::embedding("*", &[("embedding_provider", "lexical".to_owned())]).await;
    let mut host = world.host("host", &[]);
    for number in 0..100 {
        says(&mut host, "prontera", number, &format!("line number {number}"));
    }
    world.embedded(100).await;
    world.hub.stop();
    set(&world.hub, &[("embedding_provider", "openai")]);
    // The second batch is not answered.
    world
        .server
        .answer_next([p2p_sync_tests::embedding_server::Answer::Changed(|_| ())]);
    world
        .server
        .answer_next((0..8).map(|_| crate::remote::with(503, &[], "")));
    let told = world.hub.fails(&["schema", "reembed"]);
    assert!(told.contains("EMBEDDINGS_UNAVAILABLE"), "{told}");
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.embeddings_next").await, 64);
    assert_eq!(world.vectors().await, 100, "the old ones are there");
    world.server.answer_next(std::iter::empty());
    let before = world.server.requests().len();
    loop {
        // What is left of the troubles is told first.
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.hub.command(&["schema", "reembed"])
        }));
        if failed.is_ok() {
            break;
        }
    }
    let asked: usize = world.server.requests()[before..]
        .iter()
        .filter_map(|request| request.body["input"].as_array().map(Vec::len))
        .max()
        .unwrap_or_default();
    assert_eq!(asked, 36, "what is there is not asked for again");
    assert_eq!(world.vectors().await, 100);
}
