//! The embeddings run: what each provider finds on a small labelled set, and what a text costs.

use std::{
    fmt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use p2p_sync_proxy::embed::{Embedder, LocalSettings, ProviderSettings, RemoteSettings, Service, Settings};
use serde::{Deserialize, Serialize};

use crate::embedding_server::EmbeddingServer;

/// The labelled set.
const SET: &str = include_str!("../data/embeddings.json");
/// Names the folder of a sentence model; `tests/run` sets it.
pub const MODEL_VARIABLE: &str = "P2P_SYNC_TEST_MODEL";
/// Numbers of a lexical vector, as the hub has them unless told otherwise.
const LEXICAL_DIMENSIONS: usize = 1536;
/// How often everything is embedded for the times.
const ROUNDS: usize = 3;

/// Has each provider embed the labelled set, and prints what it finds and what a text costs.
#[derive(Debug, Parser)]
#[command(name = "embeddings", version)]
pub struct Options {
    /// The folder of a sentence model.
    #[arg(long)]
    model: PathBuf,
    /// How many threads it has.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/embeddings.json")]
    json: PathBuf,
}

/// Passages, and questions whose right passages are known.
#[derive(Debug, Deserialize)]
pub struct LabelledSet {
    /// What is searched.
    pub passages: Vec<Passage>,
    /// What is asked.
    pub questions: Vec<Question>,
}

/// A text of the game.
#[derive(Debug, Deserialize)]
pub struct Passage {
    /// Its name in the set.
    pub id: String,
    /// What was said or written.
    pub text: String,
}

/// A question.
#[derive(Debug, Deserialize)]
pub struct Question {
    /// What is asked.
    pub text: String,
    /// Whether it uses the words of the passages.
    #[serde(default)]
    pub same_words: bool,
    /// The passages that answer it.
    pub right: Vec<String>,
}

/// How well the right passages are found.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Found {
    /// Of a question's right passages, those that come first; where there are several, one can.
    pub recall_at_1: f64,
    /// Of a question's right passages, those among the first five.
    pub recall_at_5: f64,
    /// One over the place of the first right passage.
    pub mrr: f64,
}

/// How well a provider does, by how is asked.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Results {
    /// In other words than the passages have.
    pub other_words: Found,
    /// In the passages' own words, inflected or misspelt at most.
    pub same_words: Found,
}

impl LabelledSet {
    /// The set in `tests/data`.
    pub fn load() -> Self {
        serde_json::from_str(SET).expect("tests/data/embeddings.json is of this form")
    }

    fn texts(&self) -> (Vec<String>, Vec<String>) {
        let passages = self.passages.iter().map(|passage| passage.text.clone());
        let questions = self.questions.iter().map(|question| question.text.clone());
        (passages.collect(), questions.collect())
    }

    /// Has everything embedded, and looks where the right passages are by exact search.
    pub async fn search(&self, embedder: &Embedder) -> Results {
        let (passages, questions) = self.texts();
        let passages = embed(embedder, &passages).await;
        let asked = embed(embedder, &questions).await;
        let found: Vec<(&Question, Found)> = self
            .questions
            .iter()
            .zip(asked)
            .map(|(question, vector)| (question, self.find(question, &vector, &passages)))
            .collect();
        let mean = |same_words| {
            let of: Vec<&Found> = found
                .iter()
                .filter(|(q, _)| q.same_words == same_words)
                .map(|(_, f)| f)
                .collect();
            let mean = |value: fn(&Found) -> f64| of.iter().map(|found| value(found)).sum::<f64>() / number(of.len());
            Found {
                recall_at_1: mean(|found| found.recall_at_1),
                recall_at_5: mean(|found| found.recall_at_5),
                mrr: mean(|found| found.mrr),
            }
        };
        Results {
            other_words: mean(false),
            same_words: mean(true),
        }
    }

    fn find(&self, question: &Question, vector: &[f32], passages: &[Vec<f32>]) -> Found {
        let mut ranked: Vec<(f32, &str)> = self
            .passages
            .iter()
            .zip(passages)
            .map(|(passage, of)| (cosine(vector, of), passage.id.as_str()))
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        let places: Vec<usize> = (1..)
            .zip(ranked)
            .filter(|(_, (_, id))| question.right.iter().any(|right| right == id))
            .map(|(place, _)| place)
            .collect();
        let within = |k| number(places.iter().filter(|place| **place <= k).count()) / number(question.right.len());
        Found {
            recall_at_1: within(1),
            recall_at_5: within(5),
            mrr: 1.0 / number(places[0]),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "some dozens")]
fn number(count: usize) -> f64 {
    count as f64
}

/// Of two vectors of length 1.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Texts in batches as the embedder takes them.
async fn embed(embedder: &Embedder, texts: &[String]) -> Vec<Vec<f32>> {
    let mut vectors = Vec::new();
    for batch in texts.chunks(embedder.bounds().texts_max) {
        vectors.extend(embedder.embed(batch).await.expect("the provider serves"));
    }
    vectors
}

/// Opens what the settings name.
pub async fn open(provider: ProviderSettings, dimensions: usize) -> Embedder {
    let settings = Settings {
        provider,
        dimensions,
        timeout: Duration::from_mins(5),
    };
    let opened = Embedder::open(&settings).await;
    opened.unwrap_or_else(|problem| panic!("{problem}")).expect("not off")
}

/// A sentence model as a provider.
pub fn local(model: &Path, threads: usize) -> ProviderSettings {
    ProviderSettings::Local(LocalSettings {
        dir: model.to_owned(),
        name: "all-MiniLM-L6-v2".to_owned(),
        threads,
    })
}

/// A server as a provider.
pub fn remote(server: &EmbeddingServer, key: &str) -> ProviderSettings {
    ProviderSettings::Remote(RemoteSettings {
        service: Service::OpenAi,
        base_url: format!("{}/v1", server.url()),
        api_key: key.into(),
        model: "all-MiniLM-L6-v2".to_owned(),
    })
}

/// What a provider came to.
#[derive(Debug, Serialize)]
struct Row {
    provider: &'static str,
    dimensions: usize,
    found: Results,
    /// Texts one by one, each waited for.
    alone_ms: f64,
    /// In batches.
    batch_ms: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    passages: usize,
    questions: usize,
    threads: usize,
    rows: Vec<Row>,
}

/// Runs every provider and shows what it came to.
pub fn run(options: &Options) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let report = runtime.block_on(measure(options));
    println!("{report}");
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    match std::fs::write(&options.json, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embeddings: {} cannot be written: {error}", options.json.display());
            ExitCode::FAILURE
        }
    }
}

async fn measure(options: &Options) -> Report {
    let set = LabelledSet::load();
    let lexical = open(ProviderSettings::Lexical, LEXICAL_DIMENSIONS).await;
    let model = || open(local(&options.model, options.threads), 384);
    let server = EmbeddingServer::start(model().await, "a-key").await;
    let remote = open(remote(&server, "a-key"), 384).await;
    Report {
        passages: set.passages.len(),
        questions: set.questions.len(),
        threads: options.threads,
        rows: vec![
            row("lexical", &set, &lexical).await,
            row("local, all-MiniLM-L6-v2", &set, &model().await).await,
            row("openai, the same model behind a server", &set, &remote).await,
        ],
    }
}

async fn row(provider: &'static str, set: &LabelledSet, embedder: &Embedder) -> Row {
    let (texts, _) = set.texts();
    let found = set.search(embedder).await;
    let mut times = [Duration::MAX; 2];
    // The best of some rounds: other programs make it longer, never shorter.
    for _ in 0..ROUNDS {
        let began = Instant::now();
        for text in &texts {
            embed(embedder, std::slice::from_ref(text)).await;
        }
        times[0] = times[0].min(began.elapsed());
        let began = Instant::now();
        embed(embedder, &texts).await;
        times[1] = times[1].min(began.elapsed());
    }
    let [alone_ms, batch_ms] = times.map(|time| time.as_secs_f64() * 1000.0 / number(texts.len()));
    Row {
        provider,
        dimensions: embedder.dimensions(),
        found,
        alone_ms,
        batch_ms,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} passages, {} questions; {} thread(s) for the model\n",
            self.passages, self.questions, self.threads
        )?;
        let by_question = "recall@1 | recall@5 | MRR";
        writeln!(f, "| | | other words | | | same words | | | ms a text | |")?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|---|")?;
        write!(
            f,
            "| provider | dimensions | {by_question} | {by_question} | alone | in batches |"
        )?;
        for row in &self.rows {
            write!(f, "\n| {} | {} |", row.provider, row.dimensions)?;
            for found in [row.found.other_words, row.found.same_words] {
                write!(
                    f,
                    " {:.2} | {:.2} | {:.2} |",
                    found.recall_at_1, found.recall_at_5, found.mrr
                )?;
            }
            write!(f, " {:.2} | {:.2} |", row.alone_ms, row.batch_ms)?;
        }
        Ok(())
    }
}
