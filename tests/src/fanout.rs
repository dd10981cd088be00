//! The fan-out run: how long a critical operation at one host takes to a hundred subscribers at others, on two proxies, against
//! how long its own answer takes in the same run.
//!
//! The proxies are processes of their own over one Postgres and one Redis; the subscribers are sealed by hand in this one, each
//! a host with a connection of its own. Half of them are at the proxy that commits, half hear of it by Redis.

use std::{
    fmt,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use hdrhistogram::Histogram;
use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction},
    message::{self, Label},
    v1::{
        self, BatchReply, Operation, OperationBatch, OperationKind, RejectCode, critical_client::CriticalClient,
        operation::Payload, session_client::SessionClient,
    },
};
use prost::Message as _;
use serde::Serialize;
use tonic::transport::Channel;

use crate::{
    load::redis_settings,
    services,
    stack::{Hub, HubDatabase},
    subscriber::{Subscriber, from},
    times::{Times, histogram, microseconds, write_table},
};

/// Measures how long a critical operation takes to subscribers on two proxies.
///
/// Fails when something does not arrive, or the p99 of all deliveries is more than twice that of the operations' answers.
#[derive(Debug, Parser)]
#[command(name = "fanout", version)]
pub struct Options {
    /// Subscribers, half of them at each proxy.
    #[arg(long, default_value_t = 100)]
    subscribers: usize,
    /// Operations a second.
    #[arg(long, default_value_t = 20)]
    rate: u32,
    /// How many.
    #[arg(long, default_value_t = 600)]
    operations: u32,
    /// Where the figures are written as JSON.
    #[arg(long, default_value = "target/fanout.json")]
    json: PathBuf,
}

const RATIO_MAX: f64 = 2.0;
/// The first are not counted: connections, statements and rings are warm then.
const WARM_UP: u32 = 40;
/// For all that was sent to arrive.
const PATIENCE: Duration = Duration::from_secs(30);
const STREAM: &str = "prontera";

#[derive(Debug, Serialize)]
struct Report {
    subscribers: usize,
    operations: u32,
    rate: u32,
    answers: Times,
    here: Times,
    there: Times,
    deliveries: Times,
    ratio_p99: f64,
    missing: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "fanout: {} critical operations, {} a second, to {} subscribers on two proxies",
            self.operations, self.rate, self.subscribers
        )?;
        let rows = [
            ("answers", &self.answers),
            ("deliveries, same proxy", &self.here),
            ("deliveries, other proxy", &self.there),
            ("deliveries", &self.deliveries),
        ];
        write_table(f, &rows)?;
        write!(
            f,
            "p99 of deliveries against answers: {:.2}; missing: {}",
            self.ratio_p99, self.missing
        )
    }
}

/// Runs it; success only if the bar holds.
pub fn run(options: &Options) -> ExitCode {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let report = runtime.block_on(measure(options));
    println!("{report}");
    let text = serde_json::to_string_pretty(&report).expect("plain data");
    if let Err(error) = std::fs::write(&options.json, text) {
        eprintln!("fanout: {} cannot be written: {error}", options.json.display());
        return ExitCode::FAILURE;
    }
    if report.missing > 0 || report.ratio_p99 > RATIO_MAX {
        println!("fanout: FAILED");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// When each operation was sent, by its number.
type Sent = Arc<Mutex<Vec<Option<Instant>>>>;

async fn measure(options: &Options) -> Report {
    let program = std::env::current_exe().expect("a running program has a path");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let database = services::database().await;
    let server = HubDatabase::Server(database.url().to_owned());
    let settings = redis_settings(&services::shared_redis_url());
    let mut hubs = ["first", "second"].map(|name| Hub::new(&program, &folder.path().join(name), &server, &settings));
    hubs[0].share_keyring(&hubs[1]);
    let writer = hubs[0].add_host(1);
    let credentials: Vec<String> = (0..options.subscribers).map(|_| hubs[0].add_host(2)).collect();
    let endpoints = [hubs[0].start(), hubs[1].start()];

    let all = WARM_UP + options.operations;
    let sent: Sent = Arc::new(Mutex::new(vec![None; all as usize]));
    let mut receiving = Vec::new();
    for (number, credential) in credentials.iter().enumerate() {
        let host = Host::connect(&endpoints[number % 2], credential).await;
        let label = host.label(Lane::Subscribe);
        let opened = Subscriber::open(&host.channel, &host.credential, label, &from(&[(STREAM, 0)])).await;
        let subscriber = opened.expect("the hub answers");
        assert_eq!(
            subscriber.answer.code(),
            RejectCode::None,
            "{}",
            subscriber.answer.message
        );
        receiving.push(tokio::spawn(receive(subscriber, sent.clone(), all)));
    }

    let host = Host::connect(&endpoints[0], &writer).await;
    let mut answers = histogram();
    let began = Instant::now();
    for number in 0..all {
        tokio::time::sleep_until((began + Duration::from_secs(u64::from(number)) / options.rate).into()).await;
        let at = Instant::now();
        sent.lock().unwrap_or_else(PoisonError::into_inner)[number as usize] = Some(at);
        host.write(number).await;
        if number >= WARM_UP {
            record(&mut answers, at.elapsed());
        }
    }
    let (mut both, mut missing) = ([histogram(), histogram()], 0);
    for (number, receiving) in receiving.into_iter().enumerate() {
        let times = receiving.await.expect("nothing was missed, nothing out of order");
        missing += u64::from(options.operations) - times.len();
        both[number % 2].add(times).expect("of the same bounds");
    }
    let mut deliveries = both[0].clone();
    deliveries.add(&both[1]).expect("of the same bounds");
    let (answers, deliveries) = (Times::of(&answers), Times::of(&deliveries));
    Report {
        subscribers: options.subscribers,
        operations: options.operations,
        rate: options.rate,
        answers,
        here: Times::of(&both[0]),
        there: Times::of(&both[1]),
        deliveries,
        ratio_p99: deliveries.p99_ms / answers.p99_ms,
        missing,
    }
}

/// Takes what a subscriber is told, and how long each operation took.
async fn receive(mut subscriber: Subscriber, sent: Sent, all: u32) -> Histogram<u64> {
    let mut times = histogram();
    let receiving = async {
        let mut next = 0;
        while next < all {
            let update = subscriber.next().await.expect("the stream goes on").expect("not over");
            let now = Instant::now();
            for state in update.states {
                let told: serde_json::Value = serde_json::from_slice(&state.payload).expect("JSON");
                let number = u32::try_from(told["amount"].as_u64().expect("a number") - 1).expect("small");
                let at = sent.lock().unwrap_or_else(PoisonError::into_inner)[number as usize].expect("it was sent");
                if number >= WARM_UP {
                    record(&mut times, now.duration_since(at));
                }
                next = number + 1;
            }
        }
    };
    // What is missing then shows in the count.
    let _all = tokio::time::timeout(PATIENCE + Duration::from_secs(u64::from(all)), receiving).await;
    times
}

fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(microseconds(time));
}

/// A host and its connection.
struct Host {
    credential: Credential,
    channel: Channel,
    sent: AtomicU64,
}

impl Host {
    async fn connect(endpoint: &str, credential: &str) -> Self {
        let channel = Channel::from_shared(endpoint.to_owned()).expect("an address");
        let host = Self {
            credential: Credential::parse(credential).expect("the hub gave it"),
            channel: channel.connect().await.expect("the hub serves"),
            sent: AtomicU64::new(0),
        };
        let hello = v1::HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            opening_id: new_id().as_bytes().to_vec().into(),
            incarnation: 1,
            oldest_incarnation: 1,
            ..Default::default()
        };
        let label = host.label(Lane::Hello);
        let sealed = message::seal(&host.credential.to_hub, Direction::ToHub, &label, &hello);
        let answer = SessionClient::new(host.channel.clone()).hello(sealed).await;
        let reply: v1::HelloReply = host.open(&label, answer.expect("the host is admitted").get_ref());
        assert_eq!(reply.code(), RejectCode::None, "{}", reply.message);
        host
    }

    fn label(&self, lane: Lane) -> Label {
        let sequence = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        Label::from_credential(&self.credential, 1, sequence, new_id(), lane)
    }

    fn open<M: prost::Message + Default>(&self, label: &Label, sealed: &v1::Sealed) -> M {
        message::open(&self.credential.to_host, Direction::ToHost, label, sealed).expect("the hub's seal")
    }

    /// Writes an operation with a number and waits for its answer.
    async fn write(&self, number: u32) {
        let operation = Operation {
            operation_id: new_id().as_bytes().to_vec().into(),
            version: Some(v1::Version {
                tenure: 0,
                incarnation: 1,
                sequence: u64::from(number) + 1,
            }),
            path: format!("{STREAM}/ITEM_DROP/{number}"),
            kind: OperationKind::Put.into(),
            payload: Some(Payload::Full(format!(r#"{{"amount":{}}}"#, number + 1).into())),
            ..Default::default()
        };
        let batch = OperationBatch {
            operations: vec![operation.encode_to_vec().into()],
            withdrawn: vec![],
        };
        let label = self.label(Lane::Critical);
        let sealed = message::seal(&self.credential.to_hub, Direction::ToHub, &label, &batch);
        let answer = CriticalClient::new(self.channel.clone()).apply(sealed).await;
        let reply: BatchReply = self.open(&label, answer.expect("answered").get_ref());
        assert!(
            reply.outcomes.is_empty() && reply.code() == RejectCode::None,
            "{reply:?}"
        );
    }
}
