//! A host whose messages are sealed by hand.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction},
    message::{self, Label},
    v1::{
        self, BatchReply, Operation, OperationBatch, OperationKind, RejectCode, Sealed,
        critical_client::CriticalClient, operation::Payload, session_client::SessionClient,
    },
};
use prost::Message;
use tonic::{Status, transport::Channel};

use crate::times::{histogram, microseconds};

const INCARNATION: u64 = 1;

/// One host and its connection.
#[derive(Clone)]
pub(super) struct Host {
    credential: Arc<Credential>,
    pub(super) channel: Channel,
    /// Of its messages, and of its operations.
    numbers: Arc<[AtomicU64; 2]>,
}

impl Host {
    pub(super) async fn connect(endpoint: &str, credential: &str) -> Self {
        let channel = Channel::from_shared(endpoint.to_owned()).expect("an address");
        let host = Self {
            credential: Arc::new(Credential::parse(credential).expect("the hub gave it")),
            channel: channel.connect().await.expect("the hub serves"),
            numbers: Arc::default(),
        };
        let hello = v1::HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            opening_id: new_id().as_bytes().to_vec().into(),
            incarnation: INCARNATION,
            oldest_incarnation: INCARNATION,
            ..Default::default()
        };
        let sealed = host.seal(Lane::Hello, &hello);
        let answer = SessionClient::new(host.channel.clone()).hello(sealed).await;
        let reply: v1::HelloReply = host.open(answer.expect("the host is admitted").get_ref());
        assert_eq!(reply.code(), RejectCode::None, "{}", reply.message);
        host
    }

    pub(super) fn seal(&self, lane: Lane, body: &impl Message) -> Sealed {
        let sequence = self.numbers[0].fetch_add(1, Ordering::Relaxed) + 1;
        let label = Label::from_credential(&self.credential, INCARNATION, sequence, new_id(), lane);
        message::seal(&self.credential.to_hub, Direction::ToHub, &label, body)
    }

    pub(super) fn open<M: Message + Default>(&self, sealed: &Sealed) -> M {
        let label = Label::read(sealed).expect("the hub's label");
        message::open(&self.credential.to_host, Direction::ToHost, &label, sealed).expect("the hub's seal")
    }

    /// A message of so many operations, each on one of some paths of the host's own.
    pub(super) fn message(&self, operations: usize) -> OperationBatch {
        let host_id = self.credential.host_id.simple().to_string();
        let operation = |_| {
            let sequence = self.numbers[1].fetch_add(1, Ordering::Relaxed) + 1;
            let operation = Operation {
                operation_id: new_id().as_bytes().to_vec().into(),
                version: Some(v1::Version {
                    tenure: 0,
                    incarnation: INCARNATION,
                    sequence,
                }),
                path: format!("map_{}/ITEM_DROP/{}", &host_id[20..], sequence % 1000),
                kind: OperationKind::Put.into(),
                payload: Some(Payload::Full(format!(r#"{{"amount":{}}}"#, sequence % 30_000).into())),
                ..Default::default()
            };
            operation.encode_to_vec().into()
        };
        OperationBatch {
            operations: (0..operations).map(operation).collect(),
            withdrawn: vec![],
        }
    }

    pub(super) async fn apply(&self, sealed: Sealed) -> Result<BatchReply, Status> {
        let answer = CriticalClient::new(self.channel.clone()).apply(sealed).await?;
        Ok(self.open(answer.get_ref()))
    }

    /// Sends critical messages of one operation when they are due; gives how long each took from then, in microseconds, and
    /// how many were not applied.
    pub(super) async fn call_on_schedule(&self, per_second: u32, time: Duration) -> (Histogram<u64>, u64) {
        let mut times = histogram();
        let (began, mut failed) = (Instant::now(), 0);
        let mut calls = Vec::new();
        for number in 0.. {
            let due = began + Duration::from_secs(number) / per_second;
            if due > began + time {
                break;
            }
            tokio::time::sleep_until(due.into()).await;
            let host = self.clone();
            calls.push(tokio::spawn(async move {
                let reply = host.apply(host.seal(Lane::Critical, &host.message(1))).await;
                let failure = match reply {
                    Ok(reply) if reply.code() == RejectCode::None && reply.outcomes.is_empty() => None,
                    Ok(reply) => Some(format!("{:?} {}", reply.code(), reply.message)),
                    Err(status) => Some(status.to_string()),
                };
                (due.elapsed(), failure)
            }));
        }
        for call in calls {
            let (took, failure) = call.await.expect("no panic");
            times.saturating_record(microseconds(took));
            if let Some(failure) = failure {
                if failed == 0 {
                    eprintln!("isolation: a quiet message was not applied: {failure}");
                }
                failed += 1;
            }
        }
        (times, failed)
    }
}
