//! The whole proxy over the embedded Postgres, called as a host calls it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction},
    message::{self, Label},
    v1::{
        bulk_client::BulkClient, critical_client::CriticalClient, operation::Payload, pull_client::PullClient,
        pull_reply, pull_request::What, session_client::SessionClient,
    },
};
use prost::{Message, bytes::Bytes};
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};
use uuid::Uuid;

use super::*;
use crate::{
    config::Overrides,
    open::Authenticated,
    pipeline::{LetIn, Turn, write_to_the_end},
    store::HostStatus,
};

struct Hub {
    _folder: tempfile::TempDir,
    store: Store,
    inner: Arc<crate::pipeline::Hub>,
    channel: Channel,
    credential: Credential,
    sent: AtomicU64,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), Problem>>,
}

impl Hub {
    async fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let overrides = Overrides {
            embedded: true,
            data_dir: Some(folder.path().to_owned()),
        };
        let config = Config::resolve("port = 0\nleases = off", Path::new(""), &overrides, |_| None).expect("valid");
        let app = App::build(&config).await.expect("built");
        let inner = Arc::clone(&app.hub);
        let store = inner.store.clone();
        let keyring = Keyring::load(&config.keyring_file).expect("made at the first start");
        let host = store
            .add_host(new_id(), 7, "Anna", keyring.current().id().as_str())
            .await
            .expect("admitted");
        let address = format!("http://{}", app.address().expect("bound"));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(app.serve(async move {
            let _stopped = stopped.await;
        }));
        Self {
            _folder: folder,
            store,
            inner,
            channel: Channel::from_shared(address)
                .expect("a URI")
                .connect()
                .await
                .expect("connects"),
            credential: keyring.current().credential(host.host_id, host.generation),
            sent: AtomicU64::new(0),
            stop,
            serving,
        }
    }

    fn seal(&self, lane: Lane, body: &impl Message) -> v1::Sealed {
        let sequence = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        let label = Label::from_credential(&self.credential, 1, sequence, new_id(), lane);
        message::seal(&self.credential.to_hub, Direction::ToHub, &label, body)
    }

    fn open<M: Message + Default>(&self, sealed: &v1::Sealed) -> M {
        let label = Label::read(sealed).expect("a label");
        message::open(&self.credential.to_host, Direction::ToHost, &label, sealed).expect("sealed for this host")
    }

    async fn hello(&self) -> v1::HelloReply {
        let hello = v1::HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            opening_id: Uuid::from_u128(1).as_bytes().to_vec().into(),
            incarnation: 1,
            oldest_incarnation: 1,
            ..Default::default()
        };
        let sealed = self.seal(Lane::Hello, &hello);
        self.open(
            &SessionClient::new(self.channel.clone())
                .hello(sealed)
                .await
                .expect("answered")
                .into_inner(),
        )
    }

    async fn apply(&self, operations: &[v1::Operation]) -> v1::BatchReply {
        let sealed = self.seal(Lane::Critical, &batch(operations));
        self.open(
            &CriticalClient::new(self.channel.clone())
                .apply(sealed)
                .await
                .expect("answered")
                .into_inner(),
        )
    }

    async fn pull(&self, what: What) -> v1::PullReply {
        let sealed = self.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
        self.open(
            &PullClient::new(self.channel.clone())
                .call(sealed)
                .await
                .expect("answered")
                .into_inner(),
        )
    }

    async fn get(&self, path: &str) -> Option<String> {
        let reply = {
            let get = v1::Get {
                path: path.to_owned(),
                ..Default::default()
            };
            self.pull(What::Get(get)).await
        };
        match reply.what {
            Some(pull_reply::What::State(state)) => Some(String::from_utf8_lossy(&state.payload).into_owned()),
            _ => None,
        }
    }

    async fn page(&self, what: What) -> v1::Page {
        match self.pull(what).await.what {
            Some(pull_reply::What::Page(page)) => page,
            other => panic!("a page was expected, not {other:?}"),
        }
    }

    async fn stop(self) {
        drop(self.channel);
        self.stop.send(()).expect("still serving");
        self.serving.await.expect("no panic").expect("drained");
    }
}

fn batch(operations: &[v1::Operation]) -> v1::OperationBatch {
    let operations = operations.iter().map(|op| op.encode_to_vec().into()).collect();
    v1::OperationBatch {
        operations,
        withdrawn: Vec::new(),
    }
}

fn put(sequence: u64, path: &str, payload: &str) -> v1::Operation {
    v1::Operation {
        operation_id: new_id().as_bytes().to_vec().into(),
        version: Some(v1::Version {
            tenure: 0,
            incarnation: 1,
            sequence,
        }),
        path: path.to_owned(),
        kind: v1::OperationKind::Put.into(),
        policy_version: 1,
        payload: Some(Payload::Full(payload.as_bytes().to_vec().into())),
        ..Default::default()
    }
}

fn states(page: &v1::Page) -> Vec<&str> {
    page.states.iter().map(|state| state.path.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_sends_is_stored_refused_and_read_by_both_lanes() {
    let hub = Hub::start().await;
    let hello = hub.hello().await;
    assert_eq!((hello.code(), hello.protocol_version), (Code::None, PROTOCOL_VERSION));
    assert_eq!(hello.policies.expect("the agent has the built-in ones").version, 1);

    let good = put(1, "prontera/MONSTER_DATA/7", r#"{"monster_id":7,"hp":3}"#);
    let bad = put(2, "prontera/MONSTER_DATA/8", r#"{"monster_id":8,"hp":-3}"#);
    let reply = hub.apply(&[good.clone(), bad]).await;
    assert_eq!((reply.code(), reply.outcomes.len()), (Code::None, 1), "{reply:?}");
    assert_eq!(
        (reply.outcomes[0].index, reply.outcomes[0].code()),
        (1, Code::ImpossibleValue)
    );

    let first = hub.seal(Lane::Bulk, &batch(&[put(3, "prontera/MAP_STATE", r#"{"users":1}"#)]));
    let second = hub.seal(Lane::Bulk, &batch(&[put(4, "prontera/MAP_STATE", r#"{"users":2}"#)]));
    let batches = tokio_stream::iter([first, second]);
    let mut answers = BulkClient::new(hub.channel.clone())
        .stream(batches)
        .await
        .expect("answered")
        .into_inner();
    let mut answered = 0;
    while let Some(answer) = answers.message().await.expect("no error") {
        let reply: v1::BatchReply = hub.open(&answer);
        assert_eq!((reply.code(), reply.outcomes.len()), (Code::None, 0), "{reply:?}");
        answered += 1;
    }
    assert_eq!(answered, 2);

    assert_eq!(
        hub.get("prontera/MONSTER_DATA/7").await.as_deref(),
        Some(r#"{"monster_id":7,"hp":3}"#)
    );
    assert_eq!(hub.get("prontera/MAP_STATE").await.as_deref(), Some(r#"{"users":2}"#));
    assert_eq!(hub.get("prontera/MONSTER_DATA/8").await, None);
    let position = Some(v1::OperationRef {
        incarnation: 1,
        sequence: 1,
    });
    let question = v1::OperationStatus {
        operation_id: good.operation_id,
        position,
    };
    match hub.pull(What::OperationStatus(question)).await.what {
        Some(pull_reply::What::OperationStatus(status)) => assert!(status.settled && status.state == 0),
        other => panic!("a status was expected, not {other:?}"),
    }
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_go_on_by_their_cursor_and_a_cursor_of_another_request_is_refused() {
    let hub = Hub::start().await;
    hub.hello().await;
    let paths = ["a/NPC_STATE/1", "a/NPC_STATE/2", "a/NPC_STATE/3", "b/NPC_STATE/1"];
    let operations: Vec<_> = (1..)
        .zip(paths)
        .map(|(sequence, path)| put(sequence, path, "{}"))
        .collect();
    assert_eq!(hub.apply(&operations).await.outcomes, []);

    let scan = |cursor| {
        What::Scan(v1::Scan {
            prefix: "a/".to_owned(),
            limit: 2,
            cursor,
        })
    };
    let changes = |cursor| {
        What::ChangesSince(v1::ChangesSince {
            stream: "a".to_owned(),
            limit: 2,
            cursor,
        })
    };
    let first = hub.page(scan(Bytes::new())).await;
    assert_eq!((states(&first), first.more), (paths[..2].to_vec(), true));
    let second = hub.page(scan(first.cursor.clone())).await;
    assert_eq!((states(&second), second.more), (paths[2..3].to_vec(), false));
    let first_changes = hub.page(changes(Bytes::new())).await;
    let second_changes = hub.page(changes(first_changes.cursor.clone())).await;
    assert_eq!(
        (states(&first_changes), states(&second_changes)),
        (paths[..2].to_vec(), paths[2..3].to_vec())
    );
    assert_eq!(hub.pull(changes(first.cursor)).await.code(), Code::BadCursor);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_message_that_is_not_from_an_admitted_host_gets_the_same_answer() {
    let hub = Hub::start().await;
    let good = hub.seal(Lane::Pull, &v1::PullRequest::default());
    let mut client = PullClient::new(hub.channel.clone());
    client.call(good.clone()).await.expect("admitted");
    let mut cut = good.clone();
    cut.body.truncate(40);
    let mut told = Vec::new();
    for forged in [
        v1::Sealed {
            version: 2,
            ..good.clone()
        },
        v1::Sealed {
            key_id: "unknown".to_owned(),
            ..good.clone()
        },
        v1::Sealed {
            host_id: new_id().as_bytes().to_vec().into(),
            ..good.clone()
        },
        v1::Sealed {
            generation: 2,
            ..good.clone()
        },
        v1::Sealed {
            sequence: 2,
            ..good.clone()
        },
        v1::Sealed {
            lane: Lane::Critical as u32,
            ..good.clone()
        },
        hub.seal(Lane::Critical, &v1::PullRequest::default()),
        v1::Sealed::default(),
        cut,
    ] {
        let status = client.call(forged).await.expect_err("forged");
        told.push((status.code(), status.message().to_owned()));
    }
    hub.store
        .set_host_status(hub.credential.host_id, HostStatus::Revoked)
        .await
        .expect("revoked");
    let revoked = tokio::time::Instant::now();
    let status = loop {
        if let Err(status) = client.call(good.clone()).await {
            break status;
        }
        assert!(
            revoked.elapsed() < Duration::from_secs(5),
            "a revoked host is out within five seconds"
        );
    };
    told.push((status.code(), status.message().to_owned()));
    assert_eq!(told[0].0, tonic::Code::Unauthenticated);
    assert!(told[0].1.starts_with("E301 NOT_OPENED: "), "{}", told[0].1);
    assert!(told.iter().all(|answer| *answer == told[0]), "{told:?}");
    drop(client);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_serving_and_a_taken_port_is_told() {
    let hub = Hub::start().await;
    let mut health = HealthClient::new(hub.channel.clone());
    let mut watched = health
        .watch(HealthCheckRequest::default())
        .await
        .expect("answered")
        .into_inner();
    while watched.message().await.expect("no error").expect("goes on").status()
        != tonic_health::pb::health_check_response::ServingStatus::Serving
    {}
    drop((health, watched));

    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let problem = bind(taken.local_addr().expect("bound")).await.expect_err("taken");
    assert_eq!(problem.code, Code::PortInUse);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_the_services_that_are_served() {
    let hub = Hub::start().await;
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut client = ServerReflectionClient::new(hub.channel.clone());
    let answers = client
        .server_reflection_info(tokio_stream::iter([question]))
        .await
        .expect("answered");
    let answer = answers
        .into_inner()
        .message()
        .await
        .expect("no error")
        .expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("a list was expected, not {answer:?}");
    };
    let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    let served = [
        "p2p_sync.v1.Session",
        "p2p_sync.v1.Maps",
        "p2p_sync.v1.Critical",
        "p2p_sync.v1.Bulk",
        "p2p_sync.v1.Pull",
        "p2p_sync.v1.Subscribe",
        "p2p_sync.v1.Enrol",
        "p2p_sync.v1.Rotate",
        "grpc.health.v1.Health",
    ];
    assert_eq!(names, served, "and nothing that is not served");
    drop(client);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_comes_to_its_end_when_its_caller_has_gone() {
    let hub = Hub::start().await;
    hub.hello().await;
    let sealed = hub.seal(
        Lane::Critical,
        &batch(&[put(1, "prontera/MAP_STATE", r#"{"users":1}"#)]),
    );
    let opened = hub.inner.opener.open(Lane::Critical, &sealed).await.expect("opens");
    let Ok(message): Result<Authenticated<v1::OperationBatch>, _> = opened else {
        panic!("it was not sent before")
    };
    let host = hub.inner.hosts.of(message.sender.host_id());
    let admitted = host.admit(Lane::Critical, &message.body, &hub.inner.writes).await;
    let let_in = LetIn {
        host,
        message,
        lane: Lane::Critical,
        received: Instant::now(),
        admitted: admitted.expect("not shutting down").expect("room"),
        turn: Turn::default(),
    };
    let unpolled = write_to_the_end(Arc::clone(&hub.inner), let_in);
    let drained = tokio::time::timeout(Duration::from_secs(10), hub.inner.writes.drained());
    drained
        .await
        .expect("the permit comes back though nobody reads the answer");
    drop(unpolled);
    assert_eq!(hub.get("prontera/MAP_STATE").await.as_deref(), Some(r#"{"users":1}"#));
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_03_what_was_committed_of_a_message_that_was_not_decided_is_read_at_once() {
    let hub = Hub::start().await;
    let path = "prontera/MAP_STATE";
    let put_before = |sequence, payload| {
        let mut op = put(sequence, path, payload);
        op.version.as_mut().expect("has one").incarnation = 0;
        op
    };
    assert_eq!(hub.apply(&[put_before(1, r#"{"users":1}"#)]).await.code(), Code::None);
    assert_eq!(hub.get(path).await.as_deref(), Some(r#"{"users":1}"#), "cached");
    // Every other sequence of incarnation 1: as many gaps as are remembered, and then more.
    let withdrawing = |message: u64| v1::OperationBatch {
        operations: Vec::new(),
        withdrawn: (message * 1024..(message + 1) * 1024)
            .map(|n| v1::SequenceRange {
                incarnation: 1,
                first: 2 * n + 2,
                last: 2 * n + 2,
            })
            .collect(),
    };
    let mut client = CriticalClient::new(hub.channel.clone());
    for message in 0..=4 {
        let mut body = withdrawing(message);
        if message == 4 {
            body.operations = batch(&[put_before(2, r#"{"users":2}"#)]).operations;
        }
        let answer = client
            .apply(hub.seal(Lane::Critical, &body))
            .await
            .expect("answered")
            .into_inner();
        let expected = if message == 4 { Code::TooManyGaps } else { Code::None };
        assert_eq!(hub.open::<v1::BatchReply>(&answer).code(), expected);
    }
    assert_eq!(
        hub.get(path).await.as_deref(),
        Some(r#"{"users": 2}"#),
        "as Postgres has it"
    );
    drop(client);
    hub.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_answers_what_was_read_and_ends_open_streams() {
    let hub = Hub::start().await;
    hub.hello().await;
    let (batches, outgoing) = tokio::sync::mpsc::channel(1);
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(outgoing);
    batches
        .send(hub.seal(Lane::Bulk, &batch(&[put(1, "a/MAP_STATE", "{}")])))
        .await
        .expect("open");
    let mut answers = BulkClient::new(hub.channel.clone())
        .stream(outgoing)
        .await
        .expect("answered")
        .into_inner();
    answers.message().await.expect("no error").expect("an answer");
    hub.stop().await;
    assert!(
        answers.message().await.expect("ended well").is_none(),
        "the sender has not closed its side"
    );
    drop(batches);
}
