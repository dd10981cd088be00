//! A provider behind HTTP, asked through async-openai: its manners, and its troubles.

use std::time::{Duration, Instant};

use p2p_sync_proto::Code;
use p2p_sync_proxy::embed::{EmbedError, Embedder, ProviderSettings, RemoteSettings, Service, Settings};
use p2p_sync_tests::{
    embedding_server::{Answer, EmbeddingServer},
    embeddings::{cosine, open, remote},
};
use serde_json::json;

pub(crate) const KEY: &str = "sk-3d9f0a77c1e84b52";
const DIMENSIONS: usize = 64;

pub(crate) async fn server() -> EmbeddingServer {
    EmbeddingServer::start(open(ProviderSettings::Lexical, DIMENSIONS).await, KEY).await
}

/// An embedder that asks the server, with less patience than other tests have.
pub(crate) async fn impatient(server: &EmbeddingServer, key: &str, timeout: Duration) -> Embedder {
    let settings = Settings {
        provider: remote(server, key),
        dimensions: DIMENSIONS,
        timeout,
    };
    Embedder::open(&settings).await.expect("usable").expect("not off")
}

pub(crate) fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

pub(crate) fn with(status: u16, headers: &[(&'static str, &str)], body: &str) -> Answer {
    Answer::With {
        status,
        headers: headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect(),
        body: body.to_owned(),
    }
}

fn refusal(code: &str, message: &str) -> String {
    json!({"error": {"message": message, "type": "x", "param": null, "code": code}}).to_string()
}

#[tokio::test]
async fn openai_is_asked_in_its_own_form_and_its_vectors_come_back_in_order() {
    let server = server().await;
    let own = open(ProviderSettings::Lexical, DIMENSIONS).await;
    let asked = texts(&["the missing caravan", "a black pearl", "frostmint"]);
    let expected = own.embed(&asked).await.expect("lexical");
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    server.answer_next([Answer::Changed(|answer| {
        answer["data"].as_array_mut().expect("a list").reverse();
    })]);
    for round in ["reversed", "in order"] {
        let told = embedder.embed(&asked).await.expect(round);
        for (told, expected) in told.iter().zip(&expected) {
            assert!(cosine(told, expected) > 0.999_99, "{round}");
        }
    }
    let request = &server.requests()[0];
    assert_eq!(request.uri, "/v1/embeddings");
    assert_eq!(request.headers["authorization"], format!("Bearer {KEY}"));
    assert!(!request.headers.contains_key("openai-organization"));
    assert_eq!(request.body, json!({"model": "all-MiniLM-L6-v2", "input": asked}));
}

#[tokio::test]
async fn a_model_that_takes_the_number_of_dimensions_is_told_it() {
    let server = server().await;
    let provider = ProviderSettings::Remote(RemoteSettings {
        service: Service::OpenAi,
        base_url: format!("{}/v1", server.url()),
        api_key: KEY.into(),
        model: "text-embedding-3-small".to_owned(),
    });
    let embedder = open(provider, DIMENSIONS).await;
    embedder.embed(&texts(&["a"])).await.expect("served");
    assert_eq!(server.requests()[0].body["dimensions"], DIMENSIONS);
    assert_eq!(embedder.bounds().tokens_max, Some(8192));
}

#[tokio::test]
async fn azure_is_asked_in_its_own_form() {
    let server = server().await;
    let provider = ProviderSettings::Remote(RemoteSettings {
        service: Service::Azure {
            deployment: "game-texts".to_owned(),
            api_version: "2024-10-21".to_owned(),
        },
        base_url: server.url(),
        api_key: KEY.into(),
        model: "text-embedding-3-small".to_owned(),
    });
    let embedder = open(provider, DIMENSIONS).await;
    embedder.embed(&texts(&["a"])).await.expect("served");
    let request = &server.requests()[0];
    assert_eq!(
        request.uri,
        "/openai/deployments/game-texts/embeddings?api-version=2024-10-21"
    );
    assert_eq!(request.headers["api-key"], KEY);
    assert!(!request.headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_server_without_keys_is_sent_none() {
    let server = EmbeddingServer::start(open(ProviderSettings::Lexical, DIMENSIONS).await, "").await;
    let embedder = open(remote(&server, ""), DIMENSIONS).await;
    embedder.embed(&texts(&["a"])).await.expect("served");
    let headers = &server.requests()[0].headers;
    assert!(!headers.contains_key("authorization") && !headers.contains_key("api-key"));
}

#[tokio::test]
async fn a_429_is_waited_out_as_its_header_says_where_there_is_time() {
    let server = server().await;
    let limited = |value| with(429, &[("retry-after", value)], &refusal("rate_limit_exceeded", ""));
    server.answer_next([limited("1"), with(429, &[("retry-after-ms", "300")], "")]);
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    embedder.embed(&texts(&["a"])).await.expect("the third time");
    let at: Vec<Instant> = server.requests().iter().map(|request| request.at).collect();
    let (first, second) = (at[1] - at[0], at[2] - at[1]);
    assert!(first >= Duration::from_secs(1), "{first:?}");
    assert!(
        second >= Duration::from_millis(300) && second < Duration::from_secs(1),
        "{second:?}"
    );
}

#[tokio::test]
async fn a_429_that_outlasts_the_patience_is_told_with_when_and_nobody_asks_before() {
    let server = server().await;
    let date = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(30));
    server.answer_next([with(429, &[("retry-after", &date)], "")]);
    let embedder = impatient(&server, KEY, Duration::from_secs(2)).await;
    for _ in 0..3 {
        let error = embedder.embed(&texts(&["a"])).await.expect_err("limited");
        let wait = error.retry_after().expect("told");
        assert!(
            wait > Duration::from_secs(20) && wait < Duration::from_secs(40),
            "{wait:?}"
        );
        assert_eq!(error.for_caller().code, Code::RateLimited);
    }
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn what_is_asked_again_ends_after_a_few_attempts() {
    let server = server().await;
    server.answer_next(std::iter::repeat_n(with(503, &[], "busy"), 9));
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    let error = embedder.embed(&texts(&["a"])).await.expect_err("in trouble");
    assert!(
        matches!(&error, EmbedError::Unavailable { reason, .. } if reason == "HTTP 503"),
        "{error}"
    );
    assert_eq!(error.for_caller().code, Code::EmbeddingsUnavailable);
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn a_server_that_is_in_trouble_for_a_moment_is_asked_again() {
    let server = server().await;
    server.answer_next([
        with(500, &[], ""),
        Answer::CutOff,
        with(502, &[], "<html>bad gateway</html>"),
    ]);
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    embedder.embed(&texts(&["a"])).await.expect("the fourth time");
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn a_slow_server_and_one_that_is_not_there_are_told_in_time() {
    let server = server().await;
    server.answer_next([Answer::Late(Duration::from_secs(30))]);
    let embedder = impatient(&server, KEY, Duration::from_millis(500)).await;
    let began = Instant::now();
    let error = embedder.embed(&texts(&["a"])).await.expect_err("slow");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(
        matches!(&error, EmbedError::Unavailable { reason, .. } if reason.contains("500 ms")),
        "{error}"
    );

    drop(server);
    let began = Instant::now();
    let error = embedder.embed(&texts(&["a"])).await.expect_err("gone");
    assert!(began.elapsed() < Duration::from_secs(5) && error.passes(), "{error}");
}

#[tokio::test]
async fn answers_that_are_none_are_told_and_nothing_of_them_is_stored() {
    let server = server().await;
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    let garbage: [Answer; 9] = [
        with(200, &[], "<html>hello</html>"),
        with(200, &[], ""),
        with(200, &[], "{}"),
        Answer::Endless,
        Answer::Changed(|answer| answer["data"][0]["embedding"] = json!([1.0, 2.0])),
        Answer::Changed(|answer| answer["data"][0]["embedding"] = json!(vec![0.0; DIMENSIONS])),
        Answer::Changed(|answer| answer["data"][0]["embedding"][0] = json!(null)),
        Answer::Changed(|answer| answer["data"] = json!([])),
        Answer::Changed(|answer| answer["data"][1]["index"] = json!(0)),
    ];
    let count = garbage.len();
    server.answer_next(garbage);
    for number in 0..count {
        let error = embedder.embed(&texts(&["a", "b"])).await.expect_err("garbage");
        assert!(matches!(error, EmbedError::BadAnswer(_)), "{number}: {error}");
    }
    assert_eq!(server.requests().len(), count, "garbage is not asked for again");
    embedder.embed(&texts(&["a"])).await.expect("served again");
}

#[tokio::test]
async fn what_the_operator_has_to_mend_is_told_with_the_setting() {
    let server = server().await;
    let embedder = open(remote(&server, KEY), DIMENSIONS).await;
    for (answer, what_to_do) in [
        (
            with(404, &[], &refusal("model_not_found", "no such model")),
            "embedding_model",
        ),
        (
            with(429, &[], &refusal("insufficient_quota", "You exceeded")),
            "the bill",
        ),
        (
            with(301, &[("location", "http://127.0.0.1:1/")], ""),
            "set embedding_base_url",
        ),
        (with(403, &[], ""), "embedding_api_key"),
        (with(418, &[], ""), "HTTP 418"),
    ] {
        server.answer_next([answer]);
        let error = embedder.embed(&texts(&["a"])).await.expect_err(what_to_do);
        assert!(matches!(error, EmbedError::Refused(_)), "{error}");
        let problem = error.for_operator();
        assert!(
            problem.code == Code::BadEmbeddingProvider && problem.sentence.contains(what_to_do),
            "{problem}"
        );
        assert_eq!(error.for_caller().code, Code::EmbeddingsUnavailable);
    }
    server.answer_next([with(
        400,
        &[],
        &refusal("", "This model's maximum context length is 8192 tokens"),
    )]);
    let error = embedder.embed(&texts(&["a"])).await.expect_err("too long");
    assert!(error.to_string().contains("8192 tokens"), "{error}");
    assert_eq!(error.for_caller().code, Code::TextRefused);
}
