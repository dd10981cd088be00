//! The critical lane's connection: unary calls, several in flight, each with what was there at its moment.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    limits::{CRITICAL_IN_FLIGHT_MAX, SEALED_BYTES_MAX},
    v1::{self, critical_client::CriticalClient},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::timeout,
};

use super::{
    attend, leases, rest_of, rotate,
    session::{Session, problem_of},
};
use crate::{pending::Flight, shared::Shared};

/// So many calls in a row without an answer in time, and the connection is made anew.
const SILENT_CALLS_MAX: u32 = 3;
/// How soon a critical operation is seen that nobody waits for, while they keep coming.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Without a critical operation for so long, a few turns of a game loop, the sender parks until it is woken.
const PARK_AFTER: Duration = Duration::from_millis(100);
/// An idle connection is tried this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Keeps the connection up and the lane empty until the agent stops.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut attempts = 0;
    while !shared.is_stopping() {
        let began = Instant::now();
        let problem = match Session::open(&shared).await {
            Ok(session) => match leases::renew(&shared, &session).await {
                Ok(pause) => up(&shared, session, pause).await,
                Err(problem) => problem,
            },
            Err(problem) => problem,
        };
        attempts = super::attempts_after(&shared, attempts, began);
        if shared.is_stopping() {
            return;
        }
        shared.link.down(problem);
        super::pause(&shared, shared.delay(attempts)).await;
    }
}

/// All that goes over the connection until it fails; gives why.
async fn up(shared: &Arc<Shared>, session: Session, pause: Duration) -> Problem {
    let session = Arc::new(session);
    shared.session.store(Some(session.clone()));
    shared.link.up();
    shared.pending().retry_now();
    // Ends when it is dropped.
    let mut attending = JoinSet::new();
    attending.spawn(attend::keep(shared.clone(), session.clone()));
    let problem = tokio::select! {
        problem = serve(shared, &session) => problem,
        () = leases::keep(shared, &session, pause) => unreachable!("it goes on for ever"),
        () = rotate::keep(shared, &session) => unreachable!("it goes on for ever"),
    };
    shared.session.store(None);
    problem
}

/// Sends what comes until the connection fails; gives why.
async fn serve(shared: &Arc<Shared>, session: &Session) -> Problem {
    let in_flight = Arc::new(Semaphore::new(CRITICAL_IN_FLIGHT_MAX));
    let (failed, mut failure) = mpsc::channel(1);
    let silent = Arc::new(AtomicU32::new(0));
    let rest = Arc::new(Rest(Mutex::new(Instant::now())));
    let client = CriticalClient::with_origin(session.channel.clone(), session.origin.clone())
        .max_decoding_message_size(SEALED_BYTES_MAX);
    let mut worked = Instant::now();
    loop {
        tokio::select! {
            biased;
            Some(problem) = failure.recv() => return problem,
            () = shared.stop_wake.notified() => return stopped(),
            () = tokio::time::sleep(HEARTBEAT) => {
                if let Err(problem) = session.hello(shared).await {
                    return problem;
                }
            }
            (flight, permit) = next(shared, &in_flight, &rest, &mut worked) => {
                let call = Call {
                    shared: shared.clone(),
                    client: client.clone(),
                    failed: failed.clone(),
                    silent: silent.clone(),
                    rest: rest.clone(),
                    _permit: permit,
                };
                tokio::spawn(call.send(session.sealer.clone(), flight));
            }
        }
    }
}

/// Waits for something to send and room to send it.
///
/// To be woken costs a caller more than everything else it does. So this looks by itself while operations keep coming,
/// since `worked` at the last, and is woken when it has parked; or at once by a caller who waits.
async fn next(
    shared: &Shared,
    in_flight: &Arc<Semaphore>,
    rest: &Rest,
    worked: &mut Instant,
) -> (Flight, OwnedSemaphorePermit) {
    let permit = in_flight.clone().acquire_owned().await.expect("never closed");
    let mut parked = false;
    loop {
        let now = Instant::now();
        let delayed_until = {
            shared.absorb_critical();
            let resting_until = rest.until();
            if resting_until > now {
                tokio::time::sleep_until(resting_until.into()).await;
                continue;
            }
            let mut pending = shared.pending();
            let delayed_until = pending.wake(now);
            if let Some(flight) = pending.take_critical() {
                *worked = now;
                return (flight, permit);
            }
            delayed_until
        };
        if now.duration_since(*worked) < PARK_AFTER {
            let look = now + LOOK_EVERY;
            super::wait(
                &shared.critical_wake,
                Some(delayed_until.map_or(look, |until| until.min(look))),
            )
            .await;
        } else if parked {
            super::wait(&shared.critical_wake, delayed_until).await;
            parked = false;
        } else {
            // One more look: what came before this would not wake it.
            shared.lanes.park_sender();
            parked = true;
        }
    }
}

/// Until when the hub wants nothing of this lane.
struct Rest(Mutex<Instant>);

impl Rest {
    fn until(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn extend(&self, by: Duration) {
        let mut until = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(Instant::now() + by);
    }
}

struct Call {
    shared: Arc<Shared>,
    client: CriticalClient<tonic::transport::Channel>,
    failed: mpsc::Sender<Problem>,
    /// Calls in a row that were not answered.
    silent: Arc<AtomicU32>,
    rest: Arc<Rest>,
    _permit: OwnedSemaphorePermit,
}

impl Call {
    async fn send(mut self, sealer: super::Sealer, flight: Flight) {
        let operations = flight.operations.iter().map(|(_, bytes)| bytes.clone()).collect();
        let (label, message) = sealer.seal(
            Lane::Critical,
            &v1::OperationBatch {
                operations,
                withdrawn: vec![],
            },
        );
        let limit = self.shared.config.critical_timeout;
        let mut request = tonic::Request::new(message);
        request.set_timeout(limit);
        // The deadline is the hub's to keep; this one is for a hub that does not answer at all.
        let answer = match timeout(limit * 2, self.client.apply(request)).await {
            Ok(Ok(answer)) => sealer
                .open::<v1::BatchReply>(&label, &answer.into_inner())
                .map_err(Failure::Broken),
            Ok(Err(status)) => Err(Failure::of(&status)),
            Err(_) => Err(Failure::of(&tonic::Status::deadline_exceeded(""))),
        };
        match answer {
            Ok(reply) => {
                self.silent.store(0, Ordering::Relaxed);
                self.shared.link.set_answers(true);
                self.rest.extend(rest_of(&reply));
                self.shared.answer(&flight, reply);
            }
            Err(failure) => {
                let shared = &self.shared;
                shared.put_back(&flight, Duration::ZERO);
                shared.link.set_answers(false);
                let silent_calls = self.silent.fetch_add(1, Ordering::Relaxed) + 1;
                match failure {
                    Failure::Busy(_) if silent_calls < SILENT_CALLS_MAX => {}
                    Failure::Busy(problem) | Failure::Broken(problem) => {
                        // One report is enough to end the session.
                        let _ = self.failed.try_send(problem);
                    }
                }
            }
        }
    }
}

/// Why a call was not answered.
enum Failure {
    /// The hub has no time: no reason to connect again.
    Busy(Problem),
    Broken(Problem),
}

impl Failure {
    fn of(status: &tonic::Status) -> Self {
        let problem = problem_of(status);
        match status.code() {
            // Our own deadline is told as a cancelled call.
            tonic::Code::DeadlineExceeded | tonic::Code::Cancelled | tonic::Code::ResourceExhausted => {
                Self::Busy(problem)
            }
            _ => Self::Broken(problem),
        }
    }
}

fn stopped() -> Problem {
    Problem::new(Code::ShutDown, "the agent is shutting down")
}
