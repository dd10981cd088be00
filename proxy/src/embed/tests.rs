use super::*;

fn lexical(dimensions: usize) -> Settings {
    Settings {
        provider: ProviderSettings::Lexical,
        dimensions,
        timeout: Duration::from_secs(10),
    }
}

async fn embedder(settings: &Settings) -> Embedder {
    let opened = Embedder::open(settings).await.expect("usable settings");
    opened.expect("not off")
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

async fn one(embedder: &Embedder, text: &str) -> Vec<f32> {
    let vectors = embedder.embed(&[text.to_owned()]).await.expect("embedded");
    vectors.into_iter().next().expect("one")
}

#[tokio::test]
async fn lexical_vectors_are_near_for_common_words_and_misspelt_ones() {
    let embedder = embedder(&lexical(1536)).await;
    let asked = one(&embedder, "Where is the missing caravan?").await;
    let same = one(&embedder, "The CARAVAN is missing since yesterday.").await;
    let misspelt = one(&embedder, "They never found the caravans").await;
    let other = one(&embedder, "Potions are sold at half price today").await;
    let [same, misspelt, other] = [same, misspelt, other].map(|vector| cosine(&asked, &vector));
    assert!(same > misspelt && misspelt > other + 0.1, "{same} {misspelt} {other}");
}

#[tokio::test]
async fn lexical_vectors_stay_what_they_are() {
    // Vectors are stored and compared with those of later versions: where this changes, so has the model's name to.
    let embedder = embedder(&lexical(8)).await;
    assert_eq!((embedder.model(), embedder.dimensions()), ("lexical-1", 8));
    let expected = [
        -0.385_227_06,
        0.068_180_24,
        -0.047_037_41,
        0.453_407_3,
        0.688_830_3,
        -0.173_555_9,
        -0.100_817_7,
        -0.352_686_5,
    ];
    for (told, expected) in one(&embedder, "Who has seen the caravan?").await.iter().zip(expected) {
        assert!((told - expected).abs() < 1e-6, "{told} {expected}");
    }
}

#[tokio::test]
async fn every_text_that_is_not_empty_has_a_vector_of_length_1() {
    for dimensions in [1, 7, 2000] {
        let embedder = embedder(&lexical(dimensions)).await;
        for text in [
            "a",
            "?!",
            "…",
            "🐉",
            "東京タワー",
            "a b c a b c",
            &"x".repeat(32 * 1024),
        ] {
            let vector = one(&embedder, text).await;
            assert_eq!(vector.len(), dimensions);
            assert!((cosine(&vector, &vector) - 1.0).abs() < 1e-5, "{text}");
        }
    }
}

#[tokio::test]
async fn what_a_call_may_not_be_given_is_told_with_its_code() {
    let embedder = embedder(&lexical(8)).await;
    let text = |text: &str| text.to_owned();
    let refused = async |texts: &[String]| embedder.embed(texts).await.expect_err("refused").for_caller().code;
    assert_eq!(refused(&[text("a"), text(" \n")]).await, Code::EmptyText);
    assert_eq!(refused(&["x".repeat(32 * 1024 + 1)]).await, Code::TextTooLong);
    assert_eq!(refused(&vec![text("a"); 65]).await, Code::TooLarge);
    assert_eq!(refused(&vec!["x".repeat(32 * 1024); 9]).await, Code::TooLarge);
    assert_eq!(embedder.embed(&[]).await, Ok(Vec::new()));
}

#[test]
fn a_provider_is_held_to_its_word() {
    let bad = |vectors: Vec<Vec<f32>>| {
        let error = checked(vectors, 1, 2).expect_err("a bad answer");
        assert!(matches!(error, EmbedError::BadAnswer(_)), "{error}");
        assert_eq!(error.for_caller().code, Code::EmbeddingsUnavailable);
        assert_eq!(error.for_operator().code, Code::BadEmbeddingProvider);
    };
    bad(vec![]);
    bad(vec![vec![1.0, 0.0], vec![1.0, 0.0]]);
    bad(vec![vec![1.0]]);
    bad(vec![vec![1.0, f32::NAN]]);
    bad(vec![vec![1.0, f32::INFINITY]]);
    bad(vec![vec![0.0, 0.0]]);
    assert_eq!(checked(vec![vec![3e38, 0.0]], 1, 2), Ok(vec![vec![1.0, 0.0]]));
    assert_eq!(checked(vec![vec![3.0, 4.0]], 1, 2), Ok(vec![vec![0.6, 0.8]]));
}

#[tokio::test]
async fn a_folder_that_is_no_model_is_told() {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let settings = Settings {
        provider: ProviderSettings::Local(LocalSettings {
            dir: folder.path().to_owned(),
            name: String::new(),
            threads: 1,
        }),
        ..lexical(384)
    };
    let problem = Embedder::open(&settings).await.expect_err("nothing in it");
    assert_eq!(problem.code, Code::BadEmbeddingProvider);
    let expected = if cfg!(feature = "local-embeddings") {
        "model.safetensors"
    } else {
        "local-embeddings"
    };
    assert!(problem.sentence.contains(expected), "{problem}");
}
