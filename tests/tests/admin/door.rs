//! Who is let in, how fast and how much at one time; and what anybody may know.

use std::time::{Duration, Instant};

use p2p_sync_proxy::admin::OPENAPI;
use p2p_sync_tests::services::OwnPostgres;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::world::{MODEL, PATIENCE, World};

async fn connect(world: &World) -> TcpStream {
    let address = world.hub.admin_url().trim_start_matches("http://");
    TcpStream::connect(address).await.expect("connects")
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // Cut off is an answer too.
    let _ = stream.read_to_end(&mut bytes).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_let_in_without_the_token_and_whoever_guesses_is_held_up() {
    let world = World::lexical(&[]).await;
    let body = json!({"model": MODEL, "input": "x"}).to_string();
    let ask = async |token: Option<&str>| world.ask_as(token, Method::POST, "/v1/embeddings", &body).await;
    let right = world.token();
    let told = ask(None).await;
    assert_eq!(
        (told.refusal(), told.header("www-authenticate")),
        ((401, "BAD_TOKEN"), Some("Bearer"))
    );
    assert_eq!(ask(Some("")).await.refusal(), (401, "BAD_TOKEN"));
    assert_eq!(ask(Some(&right[..right.len() - 1])).await.refusal(), (401, "BAD_TOKEN"));
    let mut guesses = Vec::new();
    for number in 0..40 {
        guesses.push(ask(Some(&format!("guess {number}"))).await);
    }
    let held_up: Vec<_> = guesses.iter().filter(|told| told.status == 429).collect();
    assert!(held_up.len() > 15, "{} of 40", held_up.len());
    assert_eq!(held_up[0].refusal(), (429, "RATE_LIMITED"));
    assert!(held_up[0].header("retry-after").is_some());
    assert_eq!(ask(Some(&right)).await.status, 200, "this machine's other tools go on");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_served_is_what_the_document_says_by_path_and_method_and_needs_a_token() {
    let world = World::lexical(&[]).await;
    let told = world.ask_as(None, Method::GET, "/openapi.json", "").await;
    assert_eq!((told.status, &told.body["openapi"]), (200, &json!("3.1.1")));
    let document: Value = serde_json::from_str(OPENAPI).expect("JSON");
    assert_eq!(told.body, document);
    let right = world.token();
    for (path, item) in document["paths"].as_object().expect("paths") {
        let real = path.replace("{id}", "an-id");
        for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            let described = &item[method.as_str().to_ascii_lowercase()];
            let told = world.ask_as(Some(&right), method.clone(), &real, "").await;
            assert_eq!(
                told.status == 405,
                described.is_null(),
                "{method} {path}: {}",
                told.status
            );
            if told.status == 405 {
                assert_eq!(told.body["error"]["code"], json!("BAD_REQUEST"));
            }
            if !described.is_null() && described["security"].is_null() {
                // Guesses are held up by and by.
                let told = world.ask_as(None, method.clone(), &real, "").await;
                assert!([401, 429].contains(&told.status), "{method} {path}: {}", told.status);
            }
        }
    }
    let told = world.ask_as(Some(&right), Method::GET, "/v2/anything", "").await;
    assert_eq!(told.refusal(), (404, "NOT_FOUND"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_whose_database_is_away_is_alive_and_not_ready() {
    let mut postgres = OwnPostgres::new().await;
    let sql = postgres.client().await;
    let mut world = World::on(postgres.url(), sql, &[], None);
    world.hub.start();
    let ready = async |expected: u16| {
        let began = Instant::now();
        loop {
            let told = world.ask_as(None, Method::GET, "/readyz", "").await;
            if told.status == expected {
                return told;
            }
            assert!(began.elapsed() < PATIENCE, "{}", told.body);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert_eq!(ready(200).await.body, json!({"status": "ready"}));
    postgres.kill();
    let told = ready(503).await;
    assert_eq!(
        (told.refusal(), told.header("retry-after")),
        ((503, "HUB_UNAVAILABLE"), Some("5"))
    );
    assert_eq!(
        world.ask_as(None, Method::GET, "/healthz", "").await.body,
        json!({"status": "ok"})
    );
    let told = world.search(&json!({"embedding": vec![0.5; 64]})).await;
    assert_eq!(told.refusal(), (503, "HUB_UNAVAILABLE"));
    postgres.start().await;
    ready(200).await;
    assert_eq!(world.search(&json!({"embedding": vec![0.5; 64]})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_slow_and_large_requests_and_many_connections_keep_no_tool_out() {
    let world = World::lexical(&[]).await;
    let right = world.token();
    // A body that does not come.
    let mut slow = connect(&world).await;
    let head = format!(
        "PUT /v1/embeddings/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {right}\r\ncontent-length: 100\r\n\r\n{{"
    );
    slow.write_all(head.as_bytes()).await.expect("taken");
    // A head that is too long.
    let mut long = connect(&world).await;
    let head = format!(
        "GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: {}\r\n",
        "y".repeat(128 * 1024)
    );
    let _cut_off_perhaps = long.write_all(head.as_bytes()).await;
    let told = read_all(&mut long).await;
    assert!(told.starts_with("HTTP/1.1 431") || told.is_empty(), "{told}");
    // A body that says how long it is, and is too long.
    let mut large = connect(&world).await;
    let head = format!(
        "PUT /v1/embeddings/a HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {right}\r\ncontent-length: 9000000\r\nconnection: close\r\n\r\n"
    );
    large.write_all(head.as_bytes()).await.expect("taken");
    let told = read_all(&mut large).await;
    assert!(
        told.starts_with("HTTP/1.1 413") && told.contains("TOO_LARGE"),
        "unread: {told}"
    );
    // Strangers who say nothing: a tool's open connection stays, and a new one finds its place.
    let mut strangers = Vec::new();
    for _ in 0..200 {
        strangers.push(connect(&world).await);
    }
    let began = Instant::now();
    assert_eq!(world.embed(&json!("x")).await.status, 200);
    let fresh = crate::world::client(tokio_rustls::rustls::RootCertStore::empty());
    let url = format!("{}/healthz", world.hub.admin_url());
    assert_eq!(fresh.get(url).send().await.expect("an answer").status().as_u16(), 200);
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(read_all(&mut strangers[0]).await.is_empty(), "the oldest gave way");
    // The slow body is told so, in time.
    let told = tokio::time::timeout(Duration::from_secs(30), async {
        let mut bytes = [0; 4096];
        let read = slow.read(&mut bytes).await.expect("an answer");
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    });
    let told = told.await.expect("within its time");
    assert!(told.starts_with("HTTP/1.1 408") && told.contains("TOO_SLOW"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_token_is_taken_without_a_restart_and_the_former_one_no_more() {
    let world = World::lexical(&[]).await;
    let former = world.token();
    world.hub.command(&["keys", "admin-token"]);
    let new = world.token();
    assert_ne!(former, new);
    let began = Instant::now();
    let ask = async |token: &str| {
        world
            .ask_as(Some(token), Method::GET, "/v1/embeddings/a", "")
            .await
            .status
    };
    while ask(&new).await != 404 {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!([401, 429].contains(&ask(&former).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_is_told_to_end_lets_a_tool_have_its_answer() {
    let (mut world, server) = World::with_provider(&[]).await;
    server.answer_next([p2p_sync_tests::embedding_server::Answer::Late(Duration::from_secs(1))]);
    let (url, right, client) = (world.hub.admin_url().to_owned(), world.token(), world.client.clone());
    let asked = tokio::spawn(async move {
        let body = json!({"model": MODEL, "input": "x"}).to_string();
        let request = client
            .post(format!("{url}/v1/embeddings"))
            .header("authorization", format!("Bearer {right}"));
        request
            .body(body)
            .send()
            .await
            .map(|response| response.status().as_u16())
    });
    while server.requests().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::task::block_in_place(|| world.hub.stop());
    assert_eq!(asked.await.expect("no panic").expect("an answer"), 200);
}
