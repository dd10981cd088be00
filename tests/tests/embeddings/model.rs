//! The real all-MiniLM-L6-v2, inside the process and behind a server.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use p2p_sync_proto::Code;
use p2p_sync_proxy::embed::{EmbedError, Embedder, ProviderSettings, Settings};
use p2p_sync_tests::{
    embedding_server::EmbeddingServer,
    embeddings::{LabelledSet, MODEL_VARIABLE, cosine, local, open, remote},
};

use crate::remote::texts;

fn model_dir() -> PathBuf {
    let dir = std::env::var_os(MODEL_VARIABLE).map(PathBuf::from);
    dir.unwrap_or_else(|| panic!("{MODEL_VARIABLE} is not set: tests/run fetches the model and sets it"))
}

async fn model(threads: usize) -> Embedder {
    open(local(&model_dir(), threads), 384).await
}

#[tokio::test(flavor = "multi_thread")]
async fn vectors_agree_with_the_published_ones() {
    let embedder = model(1).await;
    assert_eq!(
        (embedder.model(), embedder.bounds().tokens_max),
        ("all-MiniLM-L6-v2", Some(256))
    );
    // The quickstart of Sentence Transformers (sbert.net) prints the cosines of these, to four digits.
    let vectors = embedder
        .embed(&texts(&[
            "The weather is lovely today.",
            "It's so sunny outside!",
            "He drove to the stadium.",
        ]))
        .await
        .expect("embedded");
    for (a, b, published) in [(0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411)] {
        let told = cosine(&vectors[a], &vectors[b]);
        assert!((told - published).abs() < 1e-4, "{a}, {b}: {told} and not {published}");
    }
    // The first numbers of a vector itself: an article on the program llm (simonwillison.net, "LLM now provides tools for
    // working with embeddings") prints them, from Sentence Transformers too.
    let vector = &embedder.embed(&texts(&["Hello world"])).await.expect("embedded")[0];
    let published = [
        -0.034_477_25_f32,
        0.031_023_25,
        0.006_734_96,
        0.026_108_92,
        -0.039_362_01,
    ];
    for (told, published) in vector.iter().zip(published) {
        assert!((told - published).abs() < 1e-6, "{told} and not {published}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_has_the_same_vector_alone_and_among_others_whatever_their_lengths() {
    let embedder = model(2).await;
    let long = "The caravan left at dawn. ".repeat(200);
    let mut all = texts(&["a", "Who has seen the caravan?", "東京タワー", "🐉"]);
    all.extend((0..12).map(|number| format!("{} wagons {}", number, "went by ".repeat(number))));
    all.push(long.clone());
    let together = embedder.embed(&all).await.expect("embedded");
    for (text, vector) in all.iter().zip(&together) {
        let alone = &embedder.embed(std::slice::from_ref(text)).await.expect("embedded")[0];
        assert!(cosine(alone, vector) > 0.999_99, "{text}");
    }
    // Of a text that is too long, the beginning is read.
    let longer = long + "Now it talks of something else altogether: the price of pearls.";
    let vector = &embedder.embed(&[longer]).await.expect("embedded")[0];
    assert!(cosine(vector, together.last().expect("some")) > 0.999_99);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_passages_are_found_in_the_process_and_behind_a_server_and_better_than_by_letters() {
    let set = LabelledSet::load();
    let lexical = set.search(&open(ProviderSettings::Lexical, 1536).await).await;
    let inside = set.search(&model(2).await).await;
    let server = EmbeddingServer::start(model(2).await, "a-key").await;
    let behind = set.search(&open(remote(&server, "a-key"), 384).await).await;
    let shown = format!("{lexical:?} {inside:?} {behind:?}");
    let (other, same) = (inside.other_words, inside.same_words);
    assert!(other.recall_at_5 >= 0.85 && same.recall_at_5 >= 0.9, "{shown}");
    // The same vectors but for the digits that JSON leaves out.
    let difference = other.mrr - behind.other_words.mrr;
    assert!(difference.abs() < 0.01, "{shown}");
    // Words alone find words.
    assert!(lexical.same_words.recall_at_5 >= 0.8, "{shown}");
    assert!(lexical.other_words.recall_at_5 < other.recall_at_5, "{shown}");
}

#[tokio::test]
async fn dimensions_that_are_not_the_models_are_told() {
    let settings = Settings {
        provider: local(&model_dir(), 1),
        dimensions: 1536,
        timeout: Duration::from_secs(10),
    };
    let problem = Embedder::open(&settings).await.expect_err("384");
    assert_eq!(problem.code, Code::BadEmbeddingProvider);
    assert!(
        problem.sentence.contains("all-MiniLM-L6-v2 has 384 dimensions"),
        "{problem}"
    );
}

/// One runtime thread: whatever blocks it stops the clock of this test.
#[tokio::test]
async fn the_runtime_goes_on_while_the_model_works_and_what_is_too_much_is_turned_away() {
    let embedder = model(1).await;
    let batch = vec!["The caravan left at dawn for Harrowgate, and nobody has seen it since. ".repeat(3); 64];
    let began = Instant::now();
    let ticking = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        let mut worst = Duration::ZERO;
        let mut last = Instant::now();
        while began.elapsed() < Duration::from_secs(2) {
            ticks.tick().await;
            worst = worst.max(last.elapsed());
            last = Instant::now();
        }
        worst
    };
    let flood = futures::future::join_all((0..12).map(|_| embedder.embed(&batch)));
    let flood = async { tokio::time::timeout(Duration::from_secs(2), flood).await };
    let turned_away = async {
        // After the flood has queued.
        tokio::time::sleep(Duration::from_millis(100)).await;
        embedder.embed(&batch).await
    };
    let (worst, _, turned_away) = tokio::join!(ticking, flood, turned_away);
    let error = turned_away.expect_err("the queue is full");
    assert!(
        matches!(error, EmbedError::Unavailable { .. }) && error.passes(),
        "{error}"
    );
    assert!(worst < Duration::from_secs(1), "the runtime stood still for {worst:?}");
    // What nobody waits for any more is passed over: it would take a minute.
    let began = Instant::now();
    while let Err(error) = embedder.embed(&texts(&["a"])).await {
        assert!(error.passes() && began.elapsed() < Duration::from_mins(1), "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
