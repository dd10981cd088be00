//! `GET /healthz`, `/readyz` and `/openapi.json`: for whoever can reach the port, without a token.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{Router, extract::State, http::StatusCode, response::Response, routing::get};
use p2p_sync_proto::{Code, Problem};

use super::status::{Refusal, answer};

/// Describes what is served, as OpenAPI 3.1. Tests hold it to the truth.
pub const OPENAPI: &str = include_str!("openapi.json");

/// Whether the hub takes operations: the database answered a moment ago, and nobody has asked it to end.
pub type Ready = Arc<AtomicBool>;

pub(super) fn routes(ready: Ready) -> Router {
    Router::new()
        .route("/healthz", get(|| async { ok("ok") }))
        .route("/readyz", get(is_ready))
        .route(
            "/openapi.json",
            get(|| async { answer(StatusCode::OK, OPENAPI.to_owned()) }),
        )
        .with_state(ready)
}

async fn is_ready(State(ready): State<Ready>) -> Result<Response, Refusal> {
    if ready.load(Ordering::Relaxed) {
        return Ok(ok("ready"));
    }
    let sentence = "the hub's database does not answer, or the hub is ending: ask again later";
    Err(Problem::new(Code::HubUnavailable, sentence).into())
}

fn ok(status: &str) -> Response {
    answer(StatusCode::OK, format!(r#"{{"status":"{status}"}}"#))
}
