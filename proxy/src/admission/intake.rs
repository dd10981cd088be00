//! What is on its way in and not opened yet: anybody can send it, so it is bounded in memory and in time.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http_body::{Frame, SizeHint};
use p2p_sync_proto::{Code, Problem};
use prost::bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{Sleep, sleep_until},
};
use tonic::{
    Status,
    body::Body,
    codegen::{BoxFuture, Service, http},
};

use super::{
    peers::Peer,
    places::{Place, Places},
};

/// Requests of which nothing was opened yet, on connections on which a message has; beyond it the one that has taken longest is
/// ended. Each takes some 16 KiB of buffers before a byte of it has come, and as long as its message is short at most 64 KiB
/// more.
const REQUESTS_MAX: usize = 1024;
/// Bytes of long messages that are on their way in there, likewise; apart, so that no flood of these ends a short one. Buffers
/// grow by doubling: in memory it is twice as much at worst.
const LONG_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The same on connections on which none has opened: a host's first message there is a short one, and soon whole.
const STRANGERS_REQUESTS_MAX: usize = 256;
const STRANGERS_LONG_BYTES_MAX: usize = 4 * 1024 * 1024;
/// A message is there within so long of its first byte, and a stream's first message of the stream's beginning; and one of
/// many bytes takes as long as a slow line needs.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
const LINE_BYTES_PER_SECOND: u64 = 16 * 1024;
/// A longer message is opened with at most one other such at a time, so that those of game loops do not wait behind it: what
/// verifies 2 MiB takes a thread for some milliseconds, whoever sent them.
const LONG_BYTES: usize = 64 * 1024;
const LONG_AT_ONCE: usize = 1;

/// Wraps all services of the hub.
#[derive(Clone, Debug)]
pub struct Intake {
    strangers: Rooms,
    /// For connections on which a message has opened: what strangers send ends nothing of theirs.
    hosts: Rooms,
}

#[derive(Clone, Debug)]
struct Rooms {
    requests: Arc<Places>,
    long: Arc<Places>,
}

impl Rooms {
    fn new(requests: usize, long_bytes: usize) -> Self {
        Self {
            requests: Places::new(requests),
            long: Places::new(long_bytes),
        }
    }
}

impl Default for Intake {
    fn default() -> Self {
        Self {
            strangers: Rooms::new(STRANGERS_REQUESTS_MAX, STRANGERS_LONG_BYTES_MAX),
            hosts: Rooms::new(REQUESTS_MAX, LONG_BYTES_MAX),
        }
    }
}

impl<S> tower_layer::Layer<S> for Intake {
    type Service = Watched<S>;

    fn layer(&self, inner: S) -> Watched<S> {
        Watched {
            inner,
            intake: self.clone(),
        }
    }
}

/// Services whose requests are [`Incoming`], and whose answers have to be read.
#[derive(Clone, Debug)]
pub struct Watched<S> {
    inner: S,
    intake: Intake,
}

impl<S> Service<http::Request<Body>> for Watched<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        // Health and reflection are for everybody.
        let is_sealed = !request.uri().path().starts_with("/grpc.");
        let is_known = peer.as_ref().is_some_and(|peer| peer.is_known());
        let rooms = if is_known {
            &self.intake.hosts
        } else {
            &self.intake.strangers
        };
        let incoming = Arc::new(Incoming {
            peer: peer.clone(),
            request: rooms.requests.place(),
            long: rooms.long.place(),
            state: Mutex::new(State {
                waits_since: Some(Instant::now()),
                bytes: 0,
                known: false,
            }),
        });
        incoming.request.grow(1);
        let mut request = request.map(|body| {
            Body::new(Arriving {
                body,
                incoming: Arc::clone(&incoming),
                timeout: None,
            })
        });
        request.extensions_mut().insert(Arc::clone(&incoming));
        let called = self.inner.call(request);
        Box::pin(async move {
            let mut answer = called.await?;
            if !is_sealed {
                incoming.state().known = true;
            }
            let room = answer.extensions_mut().remove::<Arc<OwnedSemaphorePermit>>();
            Ok(answer.map(|body| match peer {
                Some(peer) => Body::new(Answer::new(body, peer, room)),
                None => body,
            }))
        })
    }
}

/// A request as far as it has come: each of its messages is counted until it is opened.
#[derive(Debug)]
pub struct Incoming {
    peer: Option<Arc<Peer>>,
    /// Until its first message opens.
    request: Place,
    /// For what its message has beyond a short one.
    long: Place,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Since when a message is awaited: the first, or one that has begun.
    waits_since: Option<Instant>,
    /// Of the message that is awaited.
    bytes: u64,
    /// A message has opened, or it was counted that none did.
    known: bool,
}

impl Incoming {
    /// That of a request; a new one where no [`Intake`] stands before the services.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Arc<Self>> {
        request.extensions().get::<Arc<Self>>().cloned()
    }

    /// Its message is whole, and who sent it is being looked at; [`Self::opened`] or [`Self::not_opened`] comes later.
    pub fn arrived(&self) {
        {
            let mut state = self.state();
            (state.waits_since, state.bytes, state.known) = (None, 0, true);
        }
        self.request.clear();
        self.long.clear();
    }

    /// Its message opened: from here on its host answers for it.
    pub fn opened(&self) {
        self.arrived();
        if let Some(peer) = &self.peer {
            peer.opened();
        }
    }

    /// Its message did not open.
    pub fn not_opened(&self) {
        self.arrived();
        if let Some(peer) = &self.peer {
            peer.unopened();
        }
    }

    fn came(&self, bytes: usize) {
        let is_long = {
            let mut state = self.state();
            state.waits_since.get_or_insert_with(Instant::now);
            state.bytes += bytes as u64;
            state.bytes > LONG_BYTES as u64
        };
        if is_long {
            self.long.grow(bytes);
        }
    }

    fn has_given_way(&self) -> bool {
        self.request.has_given_way() || self.long.has_given_way()
    }

    /// By when the message that is awaited has to be there, if one is.
    fn due(&self) -> Option<Instant> {
        let state = self.state();
        let line = Duration::from_secs(state.bytes / LINE_BYTES_PER_SECOND);
        state.waits_since.map(|since| since + MESSAGE_TIMEOUT + line)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that is given up before anything of it opened, by a reset or by sending half of it, costs as one that does not open.
impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.state().known
            && let Some(peer) = &self.peer
        {
            peer.unopened();
        }
    }
}

/// A request's body on its way in.
struct Arriving {
    body: Body,
    incoming: Arc<Incoming>,
    timeout: Option<Pin<Box<Sleep>>>,
}

impl Arriving {
    /// Ready with why the body ends before its time.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        let request = self.incoming.request.poll_given_way(cx);
        if request.is_ready() || self.incoming.long.poll_given_way(cx).is_ready() {
            let sentence = "the hub has too much on its way in; it is sent again";
            return Poll::Ready(Status::resource_exhausted(
                Problem::new(Code::RateLimited, sentence).to_string(),
            ));
        }
        let Some(due) = self.incoming.due() else {
            self.timeout = None;
            return Poll::Pending;
        };
        let timeout = self.timeout.get_or_insert_with(|| Box::pin(sleep_until(due.into())));
        timeout.as_mut().reset(due.into());
        ready!(timeout.as_mut().poll(cx));
        let sentence = "a message was begun and did not come whole in time; it is sent again";
        Poll::Ready(Status::deadline_exceeded(
            Problem::new(Code::HubUnavailable, sentence).to_string(),
        ))
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.incoming.came(data.len());
                }
                if self.incoming.has_given_way()
                    && let Poll::Ready(status) = self.poll_ended(cx)
                {
                    return Poll::Ready(Some(Err(status)));
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Pending => self.poll_ended(cx).map(|status| Some(Err(status))),
            ended @ Poll::Ready(_) => ended,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body on its way out. The peer is asked for the next part of it only when it has taken the one before: as long
/// as that lasts, an answer waits to be read.
struct Answer {
    body: Body,
    peer: Arc<Peer>,
    waits: bool,
    /// What its bytes take of what its host may leave unread.
    _room: Option<Arc<OwnedSemaphorePermit>>,
}

impl Answer {
    fn new(body: Body, peer: Arc<Peer>, room: Option<Arc<OwnedSemaphorePermit>>) -> Self {
        peer.answer_waits();
        Self {
            body,
            peer,
            waits: true,
            _room: room,
        }
    }

    fn set_waits(&mut self, waits: bool) {
        if std::mem::replace(&mut self.waits, waits) == waits {
            return;
        }
        if waits {
            self.peer.answer_waits();
        } else {
            self.peer.answer_is_read();
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.set_waits(false);
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        self.set_waits(frame.is_some());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.set_waits(false);
    }
}

/// Who may verify a long message now.
#[derive(Debug)]
pub struct Opening(Semaphore);

impl Default for Opening {
    fn default() -> Self {
        Self(Semaphore::new(LONG_AT_ONCE))
    }
}

impl Opening {
    /// Waits until a message of so many bytes may be verified; a short one may at once.
    pub async fn turn(&self, bytes: usize) -> Option<SemaphorePermit<'_>> {
        if bytes <= LONG_BYTES {
            return None;
        }
        // Never closed.
        self.0.acquire().await.ok()
    }
}
