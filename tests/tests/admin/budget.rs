//! What tools cost, and what they are told of a provider in trouble.

use p2p_sync_tests::embedding_server::Answer;
use serde_json::json;

use crate::world::{KEY, PATIENCE, World};

const SPENT: &str =
    "SELECT tokens FROM p2p_sync.embedding_spend WHERE spender = 'ffffffff-ffff-ffff-ffff-ffffffffffff'";

#[tokio::test(flavor = "multi_thread")]
async fn tools_have_a_budget_of_their_own_and_hosts_keep_theirs() {
    let settings = [
        ("embedding_tool_tokens_per_day", "10".to_owned()),
        ("embedding_host_tokens_per_day", "10".to_owned()),
        ("leases", "required".to_owned()),
    ];
    let (world, server) = World::with_provider(&settings).await;
    assert_eq!(world.embed(&json!("123456789")).await.status, 200);
    assert_eq!(world.search(&json!({"text": "123456789"})).await.status, 200);
    assert_eq!(world.put("a", &json!({"text": "123456789"})).await.status, 201);
    assert_eq!(
        world.put("b", &json!({"text": "123456789"})).await.status,
        201,
        "what is known costs nothing"
    );
    let asked = server.requests().len();
    for told in [
        world.embed(&json!("123456789")).await,
        world.search(&json!({"text": "123456789"})).await,
        world.put("c", &json!({"text": "something else"})).await,
    ] {
        assert_eq!(told.refusal(), (429, "BUDGET_SPENT"));
        assert_eq!(
            told.body["error"]["type"],
            json!("insufficient_quota"),
            "OpenAI's clients give up at once"
        );
        let seconds: u64 = told
            .header("retry-after")
            .and_then(|text| text.parse().ok())
            .expect("until tomorrow");
        assert!((1..=86_400).contains(&seconds) && told.header("x-should-retry") == Some("false"));
        let message = told.body["error"]["message"].as_str().expect("a sentence");
        assert!(message.contains("1 of the tools' 10 a day are left"), "{message}");
    }
    assert_eq!(server.requests().len(), asked, "nobody is asked");
    let vector = vec![0.5; 64];
    assert_eq!(
        world.search(&json!({"embedding": vector})).await.status,
        200,
        "a vector costs nothing"
    );
    let status = world.hub.command(&["embeddings", "status"]);
    assert!(status.contains("spent today: 9 of 10 tokens by tools"), "{status}");
    let mut host = world.host("host", &["prontera"]);
    assert!(host.ask(json!({"do": "embed", "text": "123456789"}))["embedding"].is_array());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_in_trouble_is_told_as_what_it_is_and_costs_nothing() {
    let (world, server) = World::with_provider(&[]).await;
    let refused = r#"{"error":{"message":"your key sk-3d9f0a77c1e84b52 is too odd","code":""}}"#;
    let with = |status, headers, body: &str| Answer::With {
        status,
        headers,
        body: body.to_owned(),
    };
    server.answer_next([with(400, Vec::new(), refused)]);
    let told = world.embed(&json!("x")).await;
    assert_eq!(told.refusal(), (422, "TEXT_REFUSED"));
    assert!(
        !told.body.to_string().contains(KEY) && !told.body.to_string().contains("odd"),
        "{}",
        told.body
    );

    for (answer, expected) in [
        (
            with(429, vec![("retry-after", "3".to_owned())], ""),
            (429, "RATE_LIMITED"),
        ),
        (with(401, Vec::new(), ""), (503, "EMBEDDINGS_UNAVAILABLE")),
        (with(200, Vec::new(), "not json"), (503, "EMBEDDINGS_UNAVAILABLE")),
    ] {
        server.answer_next([answer]);
        let told = world.search(&json!({"text": "x"})).await;
        assert_eq!(told.refusal(), expected, "{}", told.body);
        assert!(told.header("retry-after").is_some());
        // A provider that says when is left alone until then.
        let began = std::time::Instant::now();
        while world.embed(&json!("x")).await.status != 200 {
            assert!(began.elapsed() < PATIENCE);
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }
    server.set_down(true);
    assert_eq!(
        world.put("a", &json!({"text": "x"})).await.refusal(),
        (503, "EMBEDDINGS_UNAVAILABLE")
    );
    assert_eq!(world.count(SPENT).await, 3, "of the three that came");
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_tools_that_wait_for_a_slow_provider_keep_no_host_from_it() {
    let settings = [
        ("leases", "required".to_owned()),
        ("embedding_timeout_ms", "20000".to_owned()),
    ];
    let (world, server) = World::with_provider(&settings).await;
    let mut host = world.host("host", &["prontera"]);
    let slow = std::time::Duration::from_secs(3);
    server.answer_next((0..40).map(|_| Answer::Late(slow)));
    let texts: Vec<_> = (0..16).map(|number| json!(format!("text {number}"))).collect();
    let flood = futures::future::join_all(texts.iter().map(|text| world.embed(text)));
    let host_asks = async {
        while server.requests().len() < 12 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let began = std::time::Instant::now();
        let told = tokio::task::spawn_blocking(move || host.ask(json!({"do": "embed", "text": "a host's"}))).await;
        (told.expect("no panic"), began.elapsed())
    };
    let (flood, (told, took)) = tokio::join!(flood, host_asks);
    assert!(told["embedding"].is_array(), "{told}");
    assert!(took < slow * 3 / 2, "it waited for nobody else's: {took:?}");
    assert!(flood.iter().all(|told| told.status == 200));
}
