//! A sentence model inside this process, on threads of its own that yield to everything else.
//!
//! The forward pass is written out here, over ndarray: candle's CPU backend, as of 0.11, works in a process-wide pool of
//! pinned, spinning threads whose number an environment variable sets, which is no neighbour for a hub that counts
//! milliseconds.

mod bert;
mod files;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use p2p_sync_proto::Problem;
use tokenizers::Tokenizer;
use tokio::sync::oneshot;

use super::{Bounds, EmbedError, LocalSettings, misconfigured};
use bert::Bert;
use files::Files;

/// Texts that a thread takes at once: enough for its matrices to be wide, few enough to share a batch with other threads.
const JOB_TEXTS: usize = 8;
/// What waits for a thread: 16 MiB of texts.
const JOBS_MAX: usize = 64;
/// Tokens whose numbers are in memory at once, for each thread: some 10 MB of them.
const PASS_TOKENS_MAX: usize = 512;
/// How much nicer the threads are than the one that started them: as much as can be.
const NICER: i32 = 19;

/// A model and its threads, which end with it.
pub(super) struct Local {
    model: Arc<Model>,
    jobs: SyncSender<Job>,
}

struct Model {
    name: String,
    tokenizer: Tokenizer,
    tokens_max: usize,
    bert: Bert,
}

struct Job {
    texts: Vec<String>,
    answer: oneshot::Sender<Result<Vec<Vec<f32>>, EmbedError>>,
}

impl Local {
    /// Reads a model and starts its threads.
    pub(super) fn open(settings: &LocalSettings) -> Result<Self, Problem> {
        let model = Arc::new(Model::read(settings)?);
        let (jobs, waiting) = sync_channel(JOBS_MAX);
        let waiting = Arc::new(Mutex::new(waiting));
        for number in 0..settings.threads {
            let (model, waiting) = (Arc::clone(&model), Arc::clone(&waiting));
            std::thread::Builder::new()
                .name(format!("embed-{number}"))
                .spawn(move || work(&model, &waiting))
                .map_err(|error| {
                    misconfigured(format!("the threads of embedding_threads cannot be started ({error})"))
                })?;
        }
        Ok(Self { model, jobs })
    }

    pub(super) fn name(&self) -> &str {
        &self.model.name
    }

    pub(super) fn dimensions(&self) -> usize {
        self.model.bert.dimensions()
    }

    pub(super) fn bounds(&self) -> Bounds {
        Bounds {
            texts_max: 64,
            text_bytes_max: 32 * 1024,
            batch_bytes_max: 256 * 1024,
            tokens_max: Some(self.model.tokens_max),
        }
    }

    /// The vectors of texts that are within the bounds; not yet of length 1.
    pub(super) async fn embed(&self, texts: &[String]) -> Result<Vec<Vec<f32>>, EmbedError> {
        let mut answers = Vec::new();
        for texts in texts.chunks(JOB_TEXTS) {
            let (answer, answered) = oneshot::channel();
            let texts = texts.to_vec();
            // Full: what is queued already is passed over, for its receivers are dropped here.
            self.jobs
                .try_send(Job { texts, answer })
                .map_err(|_| busy("too much waits for it"))?;
            answers.push(answered);
        }
        let mut vectors = Vec::with_capacity(texts.len());
        for answered in answers {
            vectors.extend(answered.await.map_err(|_| busy("its thread has ended"))??);
        }
        Ok(vectors)
    }
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("model", &self.model.name)
            .finish_non_exhaustive()
    }
}

fn busy(reason: &str) -> EmbedError {
    EmbedError::Unavailable {
        reason: reason.to_owned(),
        retry_after: None,
    }
}

/// What each thread does until the model is dropped.
fn work(model: &Model, waiting: &Mutex<Receiver<Job>>) {
    yield_to_others();
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { texts, answer }) = next else {
            return;
        };
        if answer.is_closed() {
            continue;
        }
        // A text that this model cannot bear is told, and takes no thread with it.
        let vectors = catch_unwind(AssertUnwindSafe(|| model.embed(&texts, || !answer.is_closed())))
            .unwrap_or_else(|_| Err(EmbedError::BadAnswer("it panicked".to_owned())));
        // Nobody may wait any more.
        let _ = answer.send(vectors);
    }
}

/// Only Linux counts this by threads.
fn yield_to_others() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{getpriority_process, setpriority_process};
        let nicer = getpriority_process(None).and_then(|here| setpriority_process(None, here + NICER));
        if let Err(error) = nicer {
            // It works all the same.
            tracing::debug!(%error, "a thread of the sentence model keeps its priority");
        }
    }
}

impl Model {
    fn read(settings: &LocalSettings) -> Result<Self, Problem> {
        let dir = &settings.dir;
        let Files {
            config,
            tokens_max,
            pooling,
            tokenizer,
            weights,
        } = Files::read(dir)?;
        let bert = Bert::read(&config, pooling, &weights).map_err(|reason| files::unusable(dir, &reason))?;
        if tokenizer.get_vocab_size(true) > bert.vocabulary() {
            return Err(files::unusable(
                dir,
                "tokenizer.json knows more tokens than model.safetensors",
            ));
        }
        let folder = || {
            dir.file_name()
                .map_or_else(|| "local".into(), |name| name.to_string_lossy().into_owned())
        };
        Ok(Self {
            name: Some(settings.name.clone())
                .filter(|name| !name.is_empty())
                .unwrap_or_else(folder),
            tokenizer,
            tokens_max,
            bert,
        })
    }

    /// The vectors of texts, as long as they are `wanted`.
    fn embed(&self, texts: &[String], wanted: impl Fn() -> bool) -> Result<Vec<Vec<f32>>, EmbedError> {
        let tokens: Vec<Vec<u32>> = texts.iter().map(|text| self.tokens(text)).collect::<Result<_, _>>()?;
        let mut vectors = Vec::with_capacity(texts.len());
        let mut rest = tokens.as_slice();
        while !rest.is_empty() && wanted() {
            let mut sum = 0;
            let fit = rest.iter().take_while(|text| {
                sum += text.len();
                sum <= PASS_TOKENS_MAX
            });
            let (pass, later) = rest.split_at(fit.count().max(1));
            vectors.extend(self.bert.embed(pass));
            rest = later;
        }
        Ok(vectors)
    }

    /// The text's tokens with the model's own around them; what the model does not read is cut off.
    fn tokens(&self, text: &str) -> Result<Vec<u32>, EmbedError> {
        let encoded = self
            .tokenizer
            .encode(text, true)
            .map_err(|error| EmbedError::NotTaken(format!("the tokenizer fails at it ({error})")))?;
        if encoded.is_empty() {
            return Err(EmbedError::NotTaken("it has nothing that the model knows".to_owned()));
        }
        Ok(encoded.get_ids().to_vec())
    }
}
