//! The bulk lane's connection: a stream of batches, pipelined within a window, acknowledged per operation.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    ids,
    limits::{BULK_WINDOW_BATCHES, SEALED_BYTES_MAX},
    message::Label,
    v1::{self, bulk_client::BulkClient},
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use uuid::Uuid;

use super::{
    rest_of,
    session::{Session, problem_of},
};
use crate::{pending::Flight, shared::Shared};

/// A batch that is not answered for so long ends the connection, and is sent again on the next.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Keeps the connection up and the lane empty until the agent stops.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut attempts = 0;
    while !shared.is_stopping() {
        let began = Instant::now();
        let problem = match Session::open(&shared).await {
            Ok(session) => {
                shared.pending().retry_now();
                Stream::serve(&shared, session).await
            }
            Err(problem) => problem,
        };
        tracing::debug!("the bulk stream ended: {problem}");
        attempts = super::attempts_after(&shared, attempts, began);
        super::pause(&shared, shared.delay(attempts)).await;
    }
}

/// One stream and what is on its way.
struct Stream<'a> {
    shared: &'a Shared,
    session: Session,
    batches: mpsc::Sender<v1::Sealed>,
    flights: HashMap<Uuid, (Label, Flight)>,
    answered: Instant,
    pace: Pace,
}

impl Stream<'_> {
    /// Sends what comes until the stream fails; gives why. What was not answered is put back.
    async fn serve(shared: &Arc<Shared>, session: Session) -> Problem {
        let (batches, outgoing) = mpsc::channel(BULK_WINDOW_BATCHES);
        let mut client = BulkClient::with_origin(session.channel.clone(), session.origin.clone())
            .max_decoding_message_size(SEALED_BYTES_MAX);
        let pace = Pace::new(shared.config.upload_limit_kbps);
        let mut stream = Stream {
            shared,
            session,
            batches,
            flights: HashMap::new(),
            answered: Instant::now(),
            pace,
        };
        let opening = client.stream(ReceiverStream::new(outgoing));
        // Whose stream it is only a sealed message says, and the hub keeps no stream for long of which it does not know that.
        let problem = match stream.send(Flight::empty()).await {
            Ok(()) => stream.exchange(std::pin::pin!(opening)).await,
            Err(problem) => problem,
        };
        for (_, flight) in stream.flights.values() {
            shared.put_back(flight, Duration::ZERO);
        }
        problem
    }

    async fn exchange(&mut self, mut opening: Pin<&mut impl Opening>) -> Problem {
        let mut since = None;
        let mut answers = None;
        loop {
            let silence = ANSWER_TIMEOUT.saturating_sub(self.answered.elapsed());
            let has_room = self.flights.len() < BULK_WINDOW_BATCHES;
            tokio::select! {
                answer = hear(opening.as_mut(), &mut answers) => match answer {
                    Ok(Some(sealed)) => if let Err(problem) = self.answer(&sealed) {
                        return problem;
                    },
                    Ok(None) => return Problem::new(Code::HubUnavailable, "the hub closed the stream"),
                    Err(status) => return problem_of(&status),
                },
                () = self.shared.stop_wake.notified() => return Problem::new(Code::ShutDown, "the agent is shutting down"),
                () = tokio::time::sleep(silence), if !self.flights.is_empty() => {
                    return Problem::new(Code::HubUnavailable, "the hub did not answer a batch in time");
                }
                flight = next(self.shared, &self.pace, &mut since), if has_room => {
                    if let Err(problem) = self.send(flight).await {
                        return problem;
                    }
                }
            }
        }
    }

    async fn send(&mut self, flight: Flight) -> Result<(), Problem> {
        let operations = flight.operations.iter().map(|(_, bytes)| bytes.clone()).collect();
        let batch = v1::OperationBatch {
            operations,
            withdrawn: flight.withdrawn.clone(),
        };
        let (label, sealed) = self.session.sealer.seal(Lane::Bulk, &batch);
        if self.flights.is_empty() {
            self.answered = Instant::now();
        }
        self.pace.sent(sealed.encoded_len());
        self.flights.insert(label.id, (label, flight));
        let closed = |_| Problem::new(Code::HubUnavailable, "the stream is closed");
        self.batches.send(sealed).await.map_err(closed)
    }

    fn answer(&mut self, sealed: &v1::Sealed) -> Result<(), Problem> {
        self.answered = Instant::now();
        let unasked = || Problem::new(Code::BadRequest, "the hub answered what was not asked");
        let (label, flight) = ids::read_id(&sealed.id)
            .and_then(|id| self.flights.remove(&id))
            .ok_or_else(unasked)?;
        match self.session.sealer.open::<v1::BatchReply>(&label, sealed) {
            Ok(reply) => {
                self.pace.rest(rest_of(&reply));
                self.shared.answer(&flight, reply);
                Ok(())
            }
            Err(problem) => {
                self.flights.insert(label.id, (label, flight));
                Err(problem)
            }
        }
    }
}

/// A stream that the hub has yet to answer.
trait Opening: Future<Output = Result<tonic::Response<tonic::Streaming<v1::Sealed>>, tonic::Status>> {}
impl<F: Future<Output = Result<tonic::Response<tonic::Streaming<v1::Sealed>>, tonic::Status>>> Opening for F {}

/// Waits for an answer. Batches are sent meanwhile, the first ones before the stream is open: nginx lets the hub know of a
/// stream only with its first bytes, so that who waited for the one before the other would wait for the next ping.
async fn hear(
    opening: Pin<&mut impl Opening>,
    answers: &mut Option<tonic::Streaming<v1::Sealed>>,
) -> Result<Option<v1::Sealed>, tonic::Status> {
    let answers = match answers {
        Some(answers) => answers,
        None => answers.insert(opening.await?.into_inner()),
    };
    answers.message().await
}

/// Waits for a batch: a full one, or one whose first operation has lingered, when the pace allows it.
///
/// Takes the batch without a further wait, so that dropping this before it is ready loses nothing.
async fn next(shared: &Shared, pace: &Pace, since: &mut Option<Instant>) -> Flight {
    loop {
        let now = Instant::now();
        let mut until = pace.next;
        if now >= pace.next {
            let mut pending = shared.pending();
            let delayed_until = pending.wake(now);
            let ready = pending.bulk_ready();
            until = delayed_until.unwrap_or(now + ANSWER_TIMEOUT);
            if ready > 0 || pending.has_withdrawn() {
                let lingers_until = *since.get_or_insert(now) + shared.linger();
                if (ready >= shared.config.batch_ops || now >= lingers_until)
                    && let Some(flight) = pending.take_bulk(shared.config.batch_ops)
                {
                    *since = None;
                    return flight;
                }
                until = until.min(lingers_until);
            }
        }
        super::wait(&shared.bulk_wake, Some(until)).await;
    }
}

/// Spares a volunteer's line: when the next message may go, after what was sent.
struct Pace {
    bits_per_second: f64,
    next: Instant,
}

impl Pace {
    fn new(limit_kbps: u32) -> Self {
        Self {
            bits_per_second: f64::from(limit_kbps) * 1000.0,
            next: Instant::now(),
        }
    }

    /// The hub wants nothing of this lane for a while.
    fn rest(&mut self, rest: Duration) {
        self.next = self.next.max(Instant::now() + rest);
    }

    fn sent(&mut self, bytes: usize) {
        if self.bits_per_second > 0.0 {
            #[allow(clippy::cast_precision_loss)]
            let takes = Duration::from_secs_f64(bytes as f64 * 8.0 / self.bits_per_second);
            self.next = self.next.max(Instant::now()) + takes;
        }
    }
}
