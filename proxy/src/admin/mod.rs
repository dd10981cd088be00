//! The admin listener: REST for tools, by a token, on a port of its own.
//!
//! A subject is a file with its `routes`; [`router`] puts them together, and is where more come. `status` says which status a
//! code has, `body` reads what was sent, `token` tells who may ask. What is served is described by `openapi.json`.

mod body;
mod connection;
mod entries;
mod health;
mod openai;
mod search;
mod status;
mod token;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::header,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse as _, Response},
};
use p2p_sync_proto::{Code, Problem};
use serde::Serialize;
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

pub use health::{OPENAPI, Ready};
pub use token::{Source, TOKEN_VARIABLE};

pub(crate) use token::make as make_token;

use crate::{pipeline::Hub, tls::Served};
use connection::Client;
use status::Refusal;
use token::{Guard, Verdict};

/// Requests that are worked on at one time; more wait, unread.
const REQUESTS_MAX: usize = 16;
/// How long they wait.
const TURN_TIMEOUT: Duration = Duration::from_secs(5);
/// Of all that the requests which are worked on hold: their bodies, what is read of them, vectors and the answer.
const _: () = assert!(REQUESTS_MAX * body::BODY_BYTES_MAX <= 16 * 1024 * 1024);

/// Where tools are served.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// Where the token is.
    pub source: Source,
}

/// A listener that holds its port and its token, and has yet to serve.
#[derive(Debug)]
pub struct Admin {
    listener: TcpListener,
    guard: Arc<Guard>,
    source: Source,
}

/// Lets requests in.
struct Door {
    guard: Arc<Guard>,
    turns: Semaphore,
    request_timeout: Duration,
}

impl Admin {
    /// Reads the token and takes the port.
    ///
    /// Errors: `MISSING_VALUE` without a token, `LOOSE_FILE_MODE`, `BAD_VALUE`, `PORT_IN_USE`.
    pub(crate) async fn build(settings: &Settings) -> Result<Self, Problem> {
        let digest = settings.source.read()?;
        let listener = TcpListener::bind(settings.listen).await.map_err(|error| {
            let address = settings.listen;
            match error.kind() {
                io::ErrorKind::AddrInUse => Problem::new(
                    Code::PortInUse,
                    format!("another program listens on {address}: stop it, or set another admin_port"),
                ),
                _ => Problem::new(
                    Code::BadValue,
                    format!("{address} cannot be listened on ({error}): check admin_address and admin_port"),
                ),
            }
        })?;
        Ok(Self {
            listener,
            guard: Arc::new(Guard::new(digest)),
            source: settings.source.clone(),
        })
    }

    /// The address that is listened on.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the hub drains, and then what was begun to its end.
    pub(crate) async fn serve(self, hub: Arc<Hub>, ready: Ready, tls: Option<Served>, request_timeout: Duration) {
        let draining = hub.draining.clone();
        let following = match &self.source {
            // Nobody changes it.
            Source::Given(_) => None,
            Source::File(_) => Some(tokio::spawn(Arc::clone(&self.guard).follow(self.source))),
        };
        let router = router(hub, ready, self.guard, request_timeout);
        connection::serve(self.listener, router, tls, draining).await;
        if let Some(following) = following {
            following.abort();
        }
    }
}

/// For `check`: whether there is a token.
pub(crate) fn check(settings: &Settings) -> Result<(), Problem> {
    settings.source.read().map(drop)
}

/// Everything that is served.
fn router(hub: Arc<Hub>, ready: Ready, guard: Arc<Guard>, request_timeout: Duration) -> Router {
    let door = Arc::new(Door {
        guard,
        turns: Semaphore::new(REQUESTS_MAX),
        request_timeout,
    });
    let for_tools = openai::routes()
        .merge(search::routes())
        .merge(entries::routes())
        .layer(from_fn_with_state(door, let_in))
        .with_state(hub);
    for_tools
        .merge(health::routes(ready))
        .fallback(|| async { Refusal::from(nothing_here()) })
        .method_not_allowed_fallback(|| async { not_so() })
}

/// Lets a request in whose token is right, when it is its turn, and bounds how long it takes.
async fn let_in(
    State(door): State<Arc<Door>>,
    Extension(client): Extension<Arc<Client>>,
    request: Request,
    next: Next,
) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION);
    let shown = shown.and_then(|value| value.to_str().ok()).and_then(bearer);
    match door.guard.check(client.address().ip(), shown) {
        Verdict::Right => {}
        Verdict::Wrong => {
            tracing::debug!(client = %client.address(), "a request to the admin listener had no token or a wrong one");
            let sentence =
                "the token is missing or wrong: send `Authorization: Bearer` and what admin_token_file holds";
            return Refusal::from(Problem::new(Code::BadToken, sentence)).into_response();
        }
        Verdict::TooMany(wait) => {
            let sentence = "too many wrong tokens came from this address: mend it, and try again later";
            return Refusal::for_now(Problem::new(Code::RateLimited, sentence), wait).into_response();
        }
    }
    if !client.enter() {
        let sentence = "too many connections of tools are open: share one, or come again later";
        return Refusal::from(Problem::new(Code::RateLimited, sentence)).into_response();
    }
    let Ok(Ok(_turn)) = timeout(TURN_TIMEOUT, door.turns.acquire()).await else {
        let sentence = "too many requests are worked on: ask for fewer at one time, or again later";
        return Refusal::from(Problem::new(Code::RateLimited, sentence)).into_response();
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = timeout(door.request_timeout, next.run(request))
        .await
        .unwrap_or_else(|_| {
            let sentence = "the hub did not get it done within request_timeout_ms: ask again later";
            Refusal::from(Problem::new(Code::HubUnavailable, sentence)).into_response()
        });
    tracing::debug!(client = %client.address(), %method, path, status = response.status().as_u16(), "a tool asked");
    response
}

/// What stands behind `Bearer`, whose letters may be of either case.
fn bearer(header: &str) -> Option<&str> {
    let (scheme, rest) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim())
}

fn nothing_here() -> Problem {
    Problem::new(Code::NotFound, "nothing is served at this path: see /openapi.json")
}

fn not_so() -> Response {
    let sentence = "this path is not served by this method: see /openapi.json";
    let mut response = Refusal::from(Problem::new(Code::BadRequest, sentence)).into_response();
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// An answer as JSON.
fn written(answer: &impl Serialize) -> Result<String, Problem> {
    serde_json::to_string(answer)
        .map_err(|error| Problem::new(Code::Internal, format!("an answer cannot be written ({error})")))
}

#[cfg(test)]
mod tests;
