//! A small server that speaks `OpenAI`'s protocol of embeddings, and Azure's form of it: with real vectors, and with every
//! kind of trouble on demand.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, Response, StatusCode, Uri},
    routing::post,
};
use p2p_sync_proxy::embed::Embedder;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle, time::sleep};

/// How a request is answered.
#[derive(Clone, Debug)]
pub enum Answer {
    /// With this instead of vectors.
    With {
        /// The status.
        status: u16,
        /// Headers besides.
        headers: Vec<(&'static str, String)>,
        /// The body.
        body: String,
    },
    /// With vectors, changed by this.
    Changed(fn(&mut Value)),
    /// With vectors, after a while.
    Late(Duration),
    /// With the half of them, and then the connection ends.
    CutOff,
    /// With no end.
    Endless,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    /// When.
    pub at: Instant,
    /// Path and query.
    pub uri: Uri,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Value,
}

/// The server; it ends with the value.
pub struct EmbeddingServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    serving: JoinHandle<()>,
}

struct Shared {
    embedder: Embedder,
    key: String,
    answers: Mutex<VecDeque<Answer>>,
    requests: Mutex<Vec<Request>>,
    is_down: AtomicBool,
}

impl EmbeddingServer {
    /// Serves the vectors of `embedder` to whoever has the key.
    pub async fn start(embedder: Embedder, key: &str) -> Self {
        let shared = Arc::new(Shared {
            embedder,
            key: key.to_owned(),
            answers: Mutex::default(),
            requests: Mutex::default(),
            is_down: AtomicBool::new(false),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let routes = Router::new()
            .route("/v1/embeddings", post(openai))
            .route("/openai/deployments/{deployment}/embeddings", post(azure))
            .with_state(Arc::clone(&shared));
        let serving = tokio::spawn(async move {
            axum::serve(listener, routes).await.expect("loopback");
        });
        Self {
            address,
            shared,
            serving,
        }
    }

    /// Where it is: without a path.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Has the next requests answered so, one after the other, and those after them with vectors.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Answer>) {
        lock(&self.shared.answers).extend(answers);
    }

    /// From then on answers every request by 503, or again with vectors.
    pub fn set_down(&self, is_down: bool) {
        self.shared.is_down.store(is_down, Ordering::SeqCst);
    }

    /// What was asked so far.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.shared.requests).clone()
    }
}

impl Drop for EmbeddingServer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn openai(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let key = headers.get("authorization").and_then(|value| value.to_str().ok());
    let key = key.and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned);
    shared.answer(uri, headers, &body, key).await
}

async fn azure(State(shared): State<Arc<Shared>>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response<Body> {
    let key = headers
        .get("api-key")
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    if !uri.query().unwrap_or_default().starts_with("api-version=") {
        return refused(StatusCode::NOT_FOUND, "404", "Resource not found");
    }
    shared.answer(uri, headers, &body, key).await
}

impl Shared {
    async fn answer(&self, uri: Uri, headers: HeaderMap, body: &[u8], key: Option<String>) -> Response<Body> {
        let body: Value = serde_json::from_slice(body).expect("the client sends JSON");
        lock(&self.requests).push(Request {
            at: Instant::now(),
            uri,
            headers,
            body: body.clone(),
        });
        if key.as_deref().unwrap_or_default() != self.key {
            let told = format!("Incorrect API key provided: {}.", key.unwrap_or_default());
            return refused(StatusCode::UNAUTHORIZED, "invalid_api_key", &told);
        }
        if self.is_down.load(Ordering::SeqCst) {
            return refused(StatusCode::SERVICE_UNAVAILABLE, "", "down");
        }
        let script = lock(&self.answers).pop_front();
        if let Some(Answer::With { status, headers, body }) = script {
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            return response.body(body.into()).expect("headers as they have to be");
        }
        let mut vectors = match self.vectors(&body).await {
            Ok(vectors) => vectors,
            Err(refusal) => return refusal,
        };
        match script {
            Some(Answer::Changed(change)) => change(&mut vectors),
            Some(Answer::Late(while_)) => sleep(while_).await,
            Some(Answer::CutOff) => {
                let text = vectors.to_string();
                let half = Bytes::copy_from_slice(&text.as_bytes()[..text.len() / 2]);
                let pieces = [Ok(half), Err(std::io::Error::other("cut off"))];
                return Response::new(Body::from_stream(futures::stream::iter(pieces)));
            }
            Some(Answer::Endless) => {
                let piece = || Ok::<_, Infallible>(Bytes::from_static(&[b' '; 8 * 1024]));
                return Response::new(Body::from_stream(futures::stream::repeat_with(piece)));
            }
            Some(Answer::With { .. }) | None => {}
        }
        Response::new(vectors.to_string().into())
    }

    async fn vectors(&self, body: &Value) -> Result<Value, Response<Body>> {
        let texts: Vec<String> = match &body["input"] {
            Value::String(text) => vec![text.clone()],
            Value::Array(texts) => texts
                .iter()
                .map(|text| text.as_str().unwrap_or_default().to_owned())
                .collect(),
            _ => return Err(refused(StatusCode::BAD_REQUEST, "", "input has to be a text or texts")),
        };
        if let Some(asked) = body["dimensions"].as_u64()
            && asked != self.embedder.dimensions() as u64
        {
            return Err(refused(StatusCode::BAD_REQUEST, "", "Invalid value for 'dimensions'"));
        }
        let vectors = self.embedder.embed(&texts).await;
        let vectors = vectors.map_err(|error| refused(StatusCode::BAD_REQUEST, "", &error.to_string()))?;
        let data: Vec<Value> = vectors
            .iter()
            .enumerate()
            .map(|(index, vector)| json!({"object": "embedding", "index": index, "embedding": vector}))
            .collect();
        Ok(json!({
            "object": "list",
            "model": body["model"],
            "data": data,
            "usage": {"prompt_tokens": 1, "total_tokens": 1},
        }))
    }
}

fn refused(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let body = json!({"error": {"message": message, "type": "invalid_request_error", "param": null, "code": code}});
    let response = Response::builder().status(status).body(body.to_string().into());
    response.expect("a status alone")
}
