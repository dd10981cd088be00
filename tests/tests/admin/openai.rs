//! What speaks to OpenAI speaks to the hub: async-openai, and by hand what it would not send.

use async_openai::{
    Client,
    config::OpenAIConfig,
    error::OpenAIError,
    types::embeddings::{CreateEmbeddingRequest, EmbeddingInput, EncodingFormat},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use p2p_sync_proxy::embed::ProviderSettings;
use p2p_sync_tests::embeddings::{cosine, open};
use reqwest::Method;
use serde_json::json;

use crate::world::{DIMENSIONS, MODEL, World};

const TEXTS: [&str; 2] = ["The caravan from Morroc is missing.", "Selling red potions."];

fn client(world: &World, token: &str) -> Client<OpenAIConfig> {
    let config = OpenAIConfig::new()
        .with_api_base(format!("{}/v1", world.hub.admin_url()))
        .with_api_key(token)
        .with_org_id("")
        .with_project_id("");
    Client::build(world.client.clone(), config)
}

fn request(model: &str, input: EmbeddingInput) -> CreateEmbeddingRequest {
    CreateEmbeddingRequest {
        model: model.to_owned(),
        input,
        encoding_format: None,
        user: Some("a tool".to_owned()),
        dimensions: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_openai_client_embeds_one_text_and_several_as_numbers_and_as_base64() {
    let world = World::lexical(&[]).await;
    let openai = client(&world, &world.token());
    let own = open(ProviderSettings::Lexical, DIMENSIONS).await;
    let expected = own.embed(&TEXTS.map(str::to_owned)).await.expect("lexical");

    let one = request(MODEL, EmbeddingInput::String(TEXTS[0].to_owned()));
    let told = openai.embeddings().create(one).await.expect("embedded");
    assert_eq!((told.object.as_str(), told.model.as_str()), ("list", MODEL));
    assert_eq!(
        told.data[0].embedding, expected[0],
        "the hub's own vector, digit for digit"
    );
    assert_eq!(
        (told.usage.prompt_tokens, told.usage.total_tokens),
        (12, 12),
        "a token in three bytes"
    );

    let mut several = request(MODEL, EmbeddingInput::StringArray(TEXTS.map(str::to_owned).to_vec()));
    several.dimensions = Some(u32::try_from(DIMENSIONS).expect("few"));
    let told = openai.embeddings().create(several.clone()).await.expect("embedded");
    let indexes: Vec<u32> = told.data.iter().map(|one| one.index).collect();
    assert_eq!(indexes, [0, 1]);
    assert_eq!(told.data[1].embedding, expected[1]);

    several.encoding_format = Some(EncodingFormat::Base64);
    let told = openai.embeddings().create_base64(several).await.expect("embedded");
    let read: Vec<Vec<f32>> = told.data.into_iter().map(|one| one.embedding.into()).collect();
    assert_eq!(read, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_openai_client_is_told_what_is_wrong_in_openais_form() {
    let world = World::lexical(&[]).await;
    let told = async |openai: &Client<OpenAIConfig>, request| match openai.embeddings().create(request).await {
        Err(OpenAIError::ApiError(error)) => {
            let status = error.status_code.as_u16();
            let api_error = error.api_error;
            (
                status,
                api_error.code,
                api_error.r#type,
                api_error.param,
                api_error.message,
            )
        }
        other => panic!("{other:?}"),
    };
    let some = |text: &str| Some(text.to_owned());
    let text = |text: &str| EmbeddingInput::String(text.to_owned());
    let openai = client(&world, &world.token());

    let (status, code, kind, param, message) = told(&openai, request("text-embedding-3-small", text("x"))).await;
    assert_eq!((status, code, param), (404, some("NOT_FOUND"), some("model")));
    assert_eq!(kind, some("invalid_request_error"));
    assert!(message.contains(MODEL), "the hub's own is named: {message}");

    let (status, code, _, param, _) = told(&openai, request(MODEL, text(" "))).await;
    assert_eq!((status, code, param), (400, some("EMPTY_TEXT"), some("input")));
    let (status, code, ..) = told(&openai, request(MODEL, EmbeddingInput::IntegerArray(vec![1, 2]))).await;
    assert_eq!((status, code), (400, some("BAD_REQUEST")));
    let mut other_dimensions = request(MODEL, text("x"));
    other_dimensions.dimensions = Some(8);
    let (status, code, _, param, _) = told(&openai, other_dimensions).await;
    assert_eq!(
        (status, code, param),
        (400, some("WRONG_DIMENSIONS"), some("dimensions"))
    );

    let stranger = client(&world, "sk-not-the-token");
    let (status, code, kind, _, _) = told(&stranger, request(MODEL, text("x"))).await;
    assert_eq!(
        (status, code, kind),
        (401, some("BAD_TOKEN"), some("authentication_error"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_that_can_be_wrong_with_texts_has_its_code_and_status() {
    let world = World::lexical(&[]).await;
    for (input, expected) in [
        (json!(""), (400, "EMPTY_TEXT")),
        (json!(["a", "\n"]), (400, "EMPTY_TEXT")),
        (json!([]), (400, "BAD_REQUEST")),
        (json!("x".repeat(32 * 1024 + 1)), (413, "TEXT_TOO_LONG")),
        (json!(vec!["x"; 65]), (413, "TOO_LARGE")),
        (json!({"text": "x"}), (400, "BAD_REQUEST")),
        (json!("x".repeat(1100 * 1024)), (413, "TOO_LARGE")),
    ] {
        let told = world.embed(&input).await;
        assert_eq!(told.refusal(), expected, "{}", told.body);
    }
    for (body, expected) in [
        ("", (400, "INVALID_JSON")),
        ("{\"input\":", (400, "INVALID_JSON")),
        ("[]", (400, "BAD_REQUEST")),
        (r#"{"input":"x"}"#, (400, "BAD_REQUEST")),
        (
            r#"{"input":"x","model":"lexical-1","encoding":"float"}"#,
            (400, "BAD_REQUEST"),
        ),
        (
            r#"{"input":"x","model":"lexical-1","encoding_format":"hex"}"#,
            (400, "BAD_REQUEST"),
        ),
    ] {
        let told = world
            .ask_as(Some(&world.token()), Method::POST, "/v1/embeddings", body)
            .await;
        assert_eq!(told.refusal(), expected, "{body}: {}", told.body);
    }
    let told = world
        .ask_as(Some(&world.token()), Method::POST, "/v1/embeddings", "{\n\"input\": x")
        .await;
    let message = told.body["error"]["message"].as_str().expect("a sentence");
    assert!(message.contains("line 2 column 10"), "{message}");

    let off = World::lexical(&[("embedding_provider", "off".to_owned())]).await;
    let told = off.embed(&json!("x")).await;
    assert_eq!(
        (told.refusal(), told.header("x-should-retry")),
        ((501, "UNSUPPORTED"), Some("false"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_that_tools_and_hosts_get_are_the_same() {
    let world = World::lexical(&[("leases", "required".to_owned())]).await;
    let mut host = world.host("host", &["prontera"]);
    let told = host.ask(json!({"do": "embed", "text": TEXTS[0]}));
    let of_host: Vec<f32> = serde_json::from_value(told["embedding"].clone()).expect("numbers");
    let told = world.embed(&json!(TEXTS[0])).await;
    let of_tool: Vec<f32> = serde_json::from_value(told.body["data"][0]["embedding"].clone()).expect("numbers");
    assert!(cosine(&of_host, &of_tool) > 0.999_99);
    let base64 = json!({"model": MODEL, "input": TEXTS[0], "encoding_format": "base64"});
    let told = world.ask(Method::POST, "/v1/embeddings", &base64).await;
    let text = told.body["data"][0]["embedding"].as_str().expect("base64");
    let bytes = STANDARD.decode(text).expect("base64");
    assert_eq!(bytes.len(), 4 * DIMENSIONS);
    assert_eq!(bytes[..4], of_tool[0].to_le_bytes());
}
