//! A host that sends so many operations a second, whatever it may, by both lanes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    envelope::Lane,
    limits::BATCH_OPS_MAX,
    v1::{OperationBatch, RejectCode, bulk_client::BulkClient},
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;

use super::host::Host;

/// In flight by the critical lane: four times what an agent has.
const IN_FLIGHT: usize = 32;
const STREAMS: usize = 4;
/// Made once, and sealed anew each time they are sent: what was settled is as dear to tell so as to settle.
const MESSAGES: usize = 16;

/// It, as long as it is loud.
pub(super) struct Loud {
    tasks: JoinSet<()>,
    answered: Arc<AtomicU64>,
}

impl Loud {
    /// Half of the operations by each lane. One that `heeds` the hub comes again when it is told to.
    pub(super) async fn start(host: &Host, per_second: u32, heeds: bool) -> Self {
        let mut tasks = JoinSet::new();
        let answered = Arc::new(AtomicU64::new(0));
        let operations = BATCH_OPS_MAX.min(per_second as usize / 20).max(1);
        let each =
            Duration::from_secs_f64(f64::from(u32::try_from(operations).unwrap_or(1)) * 2.0 / f64::from(per_second));
        let messages = || -> Vec<OperationBatch> { (0..MESSAGES).map(|_| host.message(operations)).collect() };
        tasks.spawn(critical(host.clone(), messages(), each, heeds, Arc::clone(&answered)));
        let streams = if heeds { 1 } else { STREAMS };
        for _ in 0..streams {
            let each = each * u32::try_from(streams).unwrap_or(1);
            tasks.spawn(bulk(host.clone(), messages(), each, Arc::clone(&answered)));
        }
        // Let it come up to speed.
        sleep(Duration::from_millis(500)).await;
        Self { tasks, answered }
    }

    /// Gives how many of its messages were answered.
    pub(super) async fn stop(mut self) -> u64 {
        self.tasks.shutdown().await;
        // What it had in flight comes to its end.
        sleep(Duration::from_millis(500)).await;
        self.answered.load(Ordering::Relaxed)
    }
}

async fn critical(host: Host, messages: Vec<OperationBatch>, each: Duration, heeds: bool, answered: Arc<AtomicU64>) {
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut calls = JoinSet::new();
    let (mut next, told) = (Instant::now(), Arc::new(std::sync::Mutex::new(Instant::now())));
    for message in messages.iter().cycle() {
        next += each;
        let rest = if heeds {
            *told.lock().expect("not poisoned")
        } else {
            next
        };
        tokio::time::sleep_until(next.max(rest).into()).await;
        let permit = Arc::clone(&in_flight).acquire_owned().await.expect("never closed");
        let sealed = host.seal(Lane::Critical, message);
        let (host, told, answered) = (host.clone(), Arc::clone(&told), Arc::clone(&answered));
        calls.spawn(async move {
            if let Ok(reply) = host.apply(sealed).await {
                answered.fetch_add(1, Ordering::Relaxed);
                if reply.code() == RejectCode::RateLimited {
                    let until = Instant::now() + Duration::from_millis(reply.retry_after_ms.into());
                    *told.lock().expect("not poisoned") = until;
                }
            }
            drop(permit);
        });
        while calls.try_join_next().is_some() {}
    }
}

async fn bulk(host: Host, messages: Vec<OperationBatch>, each: Duration, answered: Arc<AtomicU64>) {
    loop {
        let (batches, waiting) = mpsc::channel(1);
        let (sender, sending) = (host.clone(), messages.clone());
        let feeding = async move {
            let mut next = Instant::now();
            for message in sending.iter().cycle() {
                next += each;
                tokio::time::sleep_until(next.into()).await;
                if batches.send(sender.seal(Lane::Bulk, message)).await.is_err() {
                    break;
                }
            }
        };
        let reading = async {
            let stream = BulkClient::new(host.channel.clone())
                .stream(ReceiverStream::new(waiting))
                .await;
            let Ok(stream) = stream else { return };
            let mut answers = stream.into_inner();
            while let Ok(Some(_)) = answers.message().await {
                answered.fetch_add(1, Ordering::Relaxed);
            }
        };
        tokio::select! {
            () = feeding => {}
            () = reading => {}
        }
        sleep(Duration::from_millis(100)).await;
    }
}
