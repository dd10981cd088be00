//! The provider's key is the provider's alone.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use p2p_sync_proxy::{
    config::{Config, Overrides},
    embed::Embedder,
};
use p2p_sync_tests::embedding_server::Answer;
use tracing_subscriber::fmt::MakeWriter;

use crate::remote::{KEY, impatient, server, texts, with};

/// A log that is kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// What would give the key away: any part of it, and what it looks like in a header.
fn assert_shows_no_key(what: &str, text: &str) {
    for part in KEY.as_bytes().windows(8) {
        let part = str::from_utf8(part).expect("ASCII");
        assert!(!text.contains(part), "a part of the key stands in {what}");
    }
}

/// The log's level is the most there is, of every layer below too.
#[test]
fn invariant_11_the_providers_key_stands_in_no_log_no_error_and_no_debug_output() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(log.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("this test has its process alone");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    runtime.block_on(async {
        let server = server().await;
        let text = format!(
            "embedding_provider = openai\nembedding_base_url = {}/v1\nembedding_api_key = {KEY}\nembedding_dimensions = 64\n",
            server.url()
        );
        let overrides = Overrides {
            embedded: true,
            data_dir: None,
        };
        let config = Config::resolve(&text, "/".as_ref(), &overrides, |_| None).expect("valid");
        assert_shows_no_key("the settings", &format!("{config:?} {:?}", config.embedding));
        let embedder = Embedder::open(&config.embedding).await.expect("usable").expect("not off");
        assert_shows_no_key("the embedder", &format!("{embedder:?}"));
        embedder.embed(&texts(&["a"])).await.expect("served");

        let repeated = format!(r#"{{"error":{{"message":"you sent Bearer {KEY}","code":"{KEY}"}}}}"#);
        let masked = format!(r#"{{"error":{{"message":"your key {}*** is wrong"}}}}"#, &KEY[..8]);
        let mut told = Vec::new();
        for answer in [
            with(200, &[], &repeated),
            with(400, &[], &repeated),
            with(400, &[], &masked),
            with(401, &[], &masked),
            with(404, &[], &repeated),
            with(418, &[], &repeated),
            with(429, &[("retry-after", "0")], &repeated),
            with(302, &[("location", &format!("http://127.0.0.1:1/{KEY}"))], ""),
            with(500, &[], &repeated),
            Answer::CutOff,
            Answer::Endless,
        ] {
            // Answered before a first attempt where that is asked again.
            server.answer_next([answer]);
            if let Err(error) = embedder.embed(&texts(&["a"])).await {
                told.push(error);
            }
        }
        // A key that is not the server's, which repeats it.
        let stranger = impatient(&server, &format!("{KEY}-old"), Duration::from_secs(5)).await;
        told.push(stranger.embed(&texts(&["a"])).await.expect_err("a wrong key"));
        told.push(stranger.probe().await.map_or_else(|_| told[0].clone(), |_| panic!("a wrong key")));
        assert!(told.len() >= 8, "{told:?}");
        for error in told {
            let (caller, operator) = (error.for_caller(), error.for_operator());
            assert_shows_no_key("an error", &format!("{error} {error:?} {caller} {operator}"));
        }
        let unusable = text.replace("/v1", "/v1?x") + "embedding_threads = 0\n";
        let problems = Config::resolve(&unusable, "/".as_ref(), &overrides, |_| None).expect_err("unusable");
        assert_shows_no_key("mistakes of the settings", &format!("{problems} {problems:?}"));
    });
    let logged = log.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let logged = String::from_utf8_lossy(&logged);
    assert!(logged.contains("127.0.0.1"), "the layers below log");
    assert_shows_no_key("the log", &logged);
}
