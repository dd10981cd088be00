//! What is carried to the agent in the background, in the order of the calls: writes of the hosts' cache, and its reads
//! behind them, so that a program reads what it wrote.

use std::{
    io,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use p2p_sync_proto::{Code, Problem};
use serde_json::Value;

use super::{inner::Inner, lock};
use crate::local_api::{self, Request};

/// Errands that wait for the agent, and the bytes of what they carry.
const ERRANDS_MAX: usize = 1024;
const ERRAND_BYTES_MAX: usize = 16 * 1024 * 1024;
/// What the agent has not taken by then is given up: nothing of the cache is durable.
const GIVE_UP_AFTER: Duration = Duration::from_secs(10);
/// How often an agent that takes nothing is tried again.
const TRY_EVERY: Duration = Duration::from_millis(100);
/// A connection without errands for so long is closed: the agent has places for a few.
const IDLE: Duration = Duration::from_millis(250);

/// Where they are taken.
pub(super) struct Errands {
    queue: Sender<Errand>,
    bytes: Arc<AtomicUsize>,
}

/// Something to ask the agent for.
pub(super) struct Errand {
    request: Request,
    deadline: Instant,
    /// Someone waits; else it is tried until the deadline.
    answer: Option<Sender<Result<Value, Problem>>>,
    _bytes: Bytes,
}

/// Counted as long as the errand is there.
struct Bytes(Arc<AtomicUsize>, usize);

impl Drop for Bytes {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Errands {
    pub(super) fn new() -> (Self, Receiver<Errand>) {
        let (queue, errands) = crossbeam_channel::bounded(ERRANDS_MAX);
        let bytes = Arc::default();
        (Self { queue, bytes }, errands)
    }

    /// Has a request carried to the agent; waits for nothing.
    pub(super) fn send(&self, request: Request) -> Result<(), Problem> {
        self.queue(request, Instant::now() + GIVE_UP_AFTER, None)
    }

    /// As [`Self::send`], and waits for the answer.
    pub(super) fn ask(&self, request: Request, timeout: Duration) -> Result<Value, Problem> {
        let (answer, answered) = crossbeam_channel::bounded(1);
        self.queue(request, Instant::now() + timeout, Some(answer))?;
        answered.recv_timeout(timeout).unwrap_or_else(|error| {
            Err(match error {
                RecvTimeoutError::Timeout => Problem::new(Code::HubUnavailable, "the agent did not answer in time"),
                RecvTimeoutError::Disconnected => super::shut_down(),
            })
        })
    }

    fn queue(
        &self,
        request: Request,
        deadline: Instant,
        answer: Option<Sender<Result<Value, Problem>>>,
    ) -> Result<(), Problem> {
        let full = || {
            let sentence =
                "too much that is to be cached or published waits for the agent: see that it runs, or send less";
            Problem::new(Code::QueueFull, sentence)
        };
        let length = request.key.len() + request.value.len() + request.message.len();
        let waiting = self.bytes.fetch_add(length, Ordering::Relaxed) + length;
        let errand = Errand {
            request,
            deadline,
            answer,
            _bytes: Bytes(self.bytes.clone(), length),
        };
        if waiting > ERRAND_BYTES_MAX {
            return Err(full());
        }
        self.queue.try_send(errand).map_err(|_| full())
    }
}

/// Carries errands until the program stops.
pub(super) fn run(inner: &Inner, errands: &Receiver<Errand>) {
    let mut connection = None;
    while !inner.is_ending() {
        if let Ok(errand) = errands.recv_timeout(IDLE) {
            carry(inner, &errand, &mut connection);
            continue;
        }
        connection = None;
        if inner.cache_silent.load(Ordering::Relaxed) {
            look_for_answers(inner);
        }
    }
    let lost = errands.try_iter().filter(|errand| errand.answer.is_none()).count();
    if lost > 0 {
        tracing::warn!(
            lost,
            "what was cached or published had not come to the agent and is not kept"
        );
    }
}

/// Finds out whether the agent answers again, for calls that do not wait for it any more.
fn look_for_answers(inner: &Inner) {
    if lock(&inner.known).problem.is_some() {
        return;
    }
    let (status, deadline) = (Request::default(), Instant::now() + IDLE);
    let answered = local_api::connect(&inner.socket).and_then(|stream| local_api::exchange(&stream, &status, deadline));
    if answered.is_ok() {
        inner.cache_silent.store(false, Ordering::Relaxed);
    }
}

fn carry(inner: &Inner, errand: &Errand, connection: &mut Option<UnixStream>) {
    loop {
        // An agent that was started anew has closed a connection of before: a new one is worth another attempt.
        let is_used = connection.is_some();
        let told = exchange(inner, errand, connection);
        if told.is_ok() {
            inner.cache_silent.store(false, Ordering::Relaxed);
        } else {
            *connection = None;
            if is_used {
                continue;
            }
        }
        let answer = told.unwrap_or_else(|error| Err(inner.not_there(&error)));
        if let Some(waiting) = &errand.answer {
            // Who asked may have given up.
            let _ = waiting.send(answer);
            return;
        }
        let Err(problem) = answer else {
            return;
        };
        let may_pass = matches!(
            problem.code,
            Code::HubUnavailable | Code::QueueFull | Code::RateLimited | Code::ShutDown
        );
        if !may_pass || Instant::now() >= errand.deadline || inner.is_ending() {
            tracing::warn!(%problem, "something to cache or publish is given up");
            return;
        }
        *connection = None;
        thread::park_timeout(TRY_EVERY);
    }
}

fn exchange(inner: &Inner, errand: &Errand, connection: &mut Option<UnixStream>) -> io::Result<Result<Value, Problem>> {
    let stream = match connection.take() {
        Some(stream) => stream,
        None => local_api::connect(&inner.socket)?,
    };
    let answer = local_api::exchange(&stream, &errand.request, errand.deadline)?;
    *connection = Some(stream);
    Ok(answer)
}
