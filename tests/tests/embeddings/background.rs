//! What happens on eligible maps is embedded beside the sync, by however many proxies, whatever becomes of the provider.

use std::{collections::HashMap, time::Duration};

use p2p_sync_proto::v1::SyncDataType;
use p2p_sync_tests::{embedding_server::Request, recording::Happening, stack::Agent};
use serde_json::json;

use crate::{
    remote::with,
    world::{World, delete, put, says},
};

const LINES: usize = 120;
const REPEATED: usize = 10;

fn chat(map: &str, char_id: usize, text: &str) -> Happening {
    Happening {
        at_ms: 0,
        data_type: SyncDataType::ChatMessage,
        map: map.to_owned(),
        account_id: 2_000_001,
        entity: None,
        payload: Some(json!({"char_id": char_id, "name": "Anna", "text": text}).to_string()),
    }
}

/// How often each text was asked for.
fn asked(requests: &[Request]) -> HashMap<String, usize> {
    let mut asked = HashMap::new();
    for request in requests {
        for text in request.body["input"].as_array().expect("texts") {
            *asked.entry(text.as_str().expect("a text").to_owned()).or_default() += 1;
        }
    }
    asked
}

fn submit(host: &mut Agent) {
    let mut tag = 0;
    let mut say = |happening: &Happening| {
        tag += 1;
        assert!(host.submit(tag, happening), "the agent is gone");
    };
    for number in 0..LINES {
        say(&chat("prontera", number % 5, &format!("line number {number}")));
        if number % 4 == 0 {
            say(&chat("geffen", number % 5, &format!("a secret of {number}")));
        }
    }
    for number in 0..REPEATED {
        say(&chat("prontera", number, "hello"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_down_delays_what_is_embedded_and_loses_none_of_it() {
    let world = World::embedding("prontera", &[]).await;
    let _second = world.another_proxy();
    world.server.set_down(true);
    let mut host = world.host("host", &[]);
    submit(&mut host);
    for (number, line) in ["Who?", "The caravan!", "Gone."].iter().enumerate() {
        put(
            &mut host,
            "NPC_STATE",
            "prontera",
            &json!({"npc_id": 7, "name": "Guard", "x": number, "dialogue": [line]}),
        );
    }
    put(&mut host, "NPC_STATE", "prontera", &json!({"npc_id": 8, "x": 1}));
    assert!(host.flush(Duration::from_mins(1)), "{}", host.log());
    assert_eq!(host.ledger().count("REJECTED"), 0);
    // Down for a while longer than its first rests.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let waiting = i64::try_from(LINES + REPEATED + 1).expect("few");
    assert_eq!(world.vectors().await, 0);
    let queued = world
        .count("SELECT count(*) FROM p2p_sync.embedding_queue WHERE dead_code IS NULL")
        .await;
    assert!(
        (waiting..=waiting + 1).contains(&queued),
        "{queued}: the second NPC says nothing"
    );
    assert_eq!(
        world
            .count("SELECT coalesce(max(attempts), 0)::bigint FROM p2p_sync.embedding_queue")
            .await,
        0
    );

    let before = world.server.requests().len();
    world.server.set_down(false);
    world.embedded(waiting).await;
    let counts = "SELECT count(*) FROM (SELECT path, stream_sequence FROM p2p_sync.embeddings GROUP BY 1, 2) AS one";
    assert_eq!(world.count(counts).await, waiting, "each operation once");
    let asked = asked(&world.server.requests()[before..]);
    assert_eq!(asked.len(), LINES + 2, "{asked:?}");
    for (text, times) in asked {
        // Two proxies may meet it at once.
        let most = if text == "hello" { 2 } else { 1 };
        assert!(times <= most && !text.contains("secret"), "{text}: {times}");
    }
    let newest = "SELECT count(*) FROM p2p_sync.embeddings WHERE path = 'prontera/NPC_STATE/7' AND content = E'Guard\\nGone.' \
        AND metadata = '{\"npc_id\": 7, \"x\": 2}'";
    assert_eq!(world.count(newest).await, 1);
    let spent = "SELECT tokens FROM p2p_sync.embedding_spend WHERE spender = '00000000-0000-0000-0000-000000000000'";
    let most: usize = (0..LINES)
        .map(|number| format!("line number {number}").len().div_ceil(3))
        .sum();
    assert!(
        world.count(spent).await <= i64::try_from(most + 20).expect("few"),
        "an outage costs nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_to_the_provider_unless_the_operator_names_the_map() {
    let world = World::embedding("", &[]).await;
    let mut host = world.host("host", &[]);
    says(&mut host, "prontera", 1, "a secret");
    put(
        &mut host,
        "VECTOR_EMBEDDING",
        "prontera",
        &json!({"id": "1", "text": "another"}),
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.embedding_queue").await, 0);
    assert!(world.server.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_put_anew_and_removed_by_its_id() {
    let world = World::embedding("*", &[]).await;
    let mut host = world.host("host", &[]);
    let text = |text: &str| json!({"id": "npc:kafra", "text": text, "metadata": {"by": "designer"}});
    put(
        &mut host,
        "VECTOR_EMBEDDING",
        "prontera",
        &text("The Kafra employee stores items."),
    );
    world.embedded(1).await;
    let before = world.server.requests().len();
    let same = json!({"id": "npc:kafra2", "text": "The Kafra employee stores items."});
    put(&mut host, "VECTOR_EMBEDDING", "geffen", &same);
    world.embedded(2).await;
    assert_eq!(
        world.server.requests().len(),
        before,
        "a text that is known is not asked for again"
    );
    put(
        &mut host,
        "VECTOR_EMBEDDING",
        "prontera",
        &text("The Kafra employee sells tickets."),
    );
    let newest = "SELECT count(*) FROM p2p_sync.embeddings WHERE content LIKE '%tickets.'";
    while world.count(newest).await == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.embedded(2).await;
    delete(&mut host, "VECTOR_EMBEDDING", "prontera", "npc:kafra");
    assert_eq!(world.vectors().await, 1, "with the commit that deletes it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_the_provider_does_not_take_holds_up_no_other() {
    let world = World::embedding("*", &[]).await;
    let mut host = world.host("host", &[]);
    world.server.set_down(true);
    for text in ["one", "two", "three"] {
        says(&mut host, "prontera", 1, text);
    }
    let not_taken = || with(400, &[], r#"{"error":{"message":"too odd","code":""}}"#);
    // The batch, and then the first of its texts.
    world.server.answer_next([not_taken(), not_taken()]);
    world.server.set_down(false);
    let failed = "SELECT count(*) FROM p2p_sync.embedding_queue WHERE attempts = 1 AND reason LIKE '%too odd%'";
    while world.vectors().await < 2 || world.count(failed).await < 1 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let status = world.hub.command(&["embeddings", "status"]);
    assert!(
        status.contains("vectors: 2 of 64 dimensions, model the-model"),
        "{status}"
    );
    assert!(status.contains("waiting: 1"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_beyond_the_days_budget_waits() {
    // A token in three bytes: two of these texts fit.
    let world = World::embedding("*", &[("embedding_tokens_per_day", "10".to_owned())]).await;
    let mut host = world.host("host", &[]);
    world.server.set_down(true);
    for text in ["aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"] {
        says(&mut host, "prontera", 1, text);
    }
    world.server.set_down(false);
    while world.vectors().await < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(world.vectors().await, 2);
    let status = world.hub.command(&["embeddings", "status"]);
    assert!(status.contains("spent today: 8 of 10 tokens by the queue"), "{status}");
    assert!(status.contains("failed: 0"), "{status}");
}
