//! A host without an agent: messages sealed by hand, to be sent in any order and as often as wanted.

use std::sync::atomic::{AtomicU64, Ordering};

use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::{new_id, read_id},
    keys::{Credential, Direction},
    limits::SEALED_BYTES_MAX,
    message::{self, Label},
    v1::{
        self, BatchReply, Operation, OperationBatch, OperationKind, Sealed, bulk_client::BulkClient,
        critical_client::CriticalClient, maps_client::MapsClient, operation::Payload, pull_client::PullClient,
        session_client::SessionClient,
    },
};
use p2p_sync_tests::subscriber::Subscriber;
use prost::{Message, bytes::Bytes};
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use crate::world::PATIENCE;

/// What a host is told of what it holds, opened by hand.
pub(crate) struct Attendant {
    credential: Credential,
    label: Label,
    number: u64,
    /// The hub's answer.
    pub(crate) answer: v1::Notice,
    notices: Streaming<Sealed>,
}

impl Attendant {
    /// The next notice; none after the last.
    pub(crate) async fn next(&mut self) -> Option<v1::Notice> {
        let sealed = self.notices.message().await.expect("the hub serves")?;
        self.number += 1;
        let label = Label {
            sequence: self.number,
            ..self.label.clone()
        };
        let opened = message::open(&self.credential.to_host, Direction::ToHost, &label, &sealed);
        Some(opened.expect("the next one of this stream"))
    }

    /// The next one that tells of a change; panics where none comes in time.
    pub(crate) async fn change(&mut self) -> v1::RenewReply {
        let changed = async {
            loop {
                let notice = self.next().await.expect("it goes on");
                assert_eq!(notice.code(), v1::RejectCode::None, "{}", notice.message);
                if let Some(leases) = notice.leases {
                    return leases;
                }
            }
        };
        tokio::time::timeout(PATIENCE, changed).await.expect("told in time")
    }
}

/// A host by its credential, with the incarnation of an outbox that it does not have.
pub(crate) struct WireHost {
    credential: Credential,
    endpoint: String,
    incarnation: u64,
    sent: AtomicU64,
}

impl WireHost {
    pub(crate) fn new(endpoint: &str, credential: &str) -> Self {
        let credential = Credential::parse(credential).expect("the hub gave it");
        Self {
            credential,
            endpoint: endpoint.to_owned(),
            incarnation: 7,
            sent: AtomicU64::new(0),
        }
    }

    /// The same host with its outbox opened once more.
    pub(crate) fn opened_again(&self) -> Self {
        Self {
            credential: self.credential.clone(),
            endpoint: self.endpoint.clone(),
            incarnation: self.incarnation + 1,
            sent: AtomicU64::new(0),
        }
    }

    /// A connection on which the hello is said.
    pub(crate) async fn connect(&self) -> Channel {
        let endpoint = Endpoint::from_shared(self.endpoint.clone()).expect("an address");
        let channel = endpoint.connect().await.expect("the hub serves");
        let hello = v1::HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            opening_id: self.credential.host_id.as_bytes().to_vec().into(),
            incarnation: self.incarnation,
            oldest_incarnation: 1,
            ..Default::default()
        };
        let sealed = self.seal(Lane::Hello, &hello);
        let answer = SessionClient::new(channel.clone())
            .hello(sealed)
            .await
            .expect("the host is admitted");
        let reply: v1::HelloReply = self.open(answer.get_ref());
        assert_eq!(reply.code(), v1::RejectCode::None, "{}", reply.message);
        channel
    }

    pub(crate) fn seal(&self, lane: Lane, message: &impl Message) -> Sealed {
        let label = self.label(lane);
        message::seal(&self.credential.to_hub, Direction::ToHub, &label, message)
    }

    /// A label that was not used yet.
    pub(crate) fn label(&self, lane: Lane) -> Label {
        let sequence = self.sent.fetch_add(1, Ordering::Relaxed) + 1;
        Label::from_credential(&self.credential, self.incarnation, sequence, new_id(), lane)
    }

    pub(crate) fn credential(&self) -> &Credential {
        &self.credential
    }

    pub(crate) fn open<M: Message + Default>(&self, sealed: &Sealed) -> M {
        let label = Label::read(sealed).expect("the hub's label");
        message::open(&self.credential.to_host, Direction::ToHost, &label, sealed).expect("the hub's seal")
    }

    /// Renews the host's leases by a message that was sealed before.
    pub(crate) async fn renew(&self, channel: &Channel, sealed: Sealed) -> Result<v1::RenewReply, Status> {
        let answer = SessionClient::new(channel.clone()).renew(sealed).await?;
        Ok(self.open(answer.get_ref()))
    }

    /// Attends to what the hub tells of maps.
    pub(crate) async fn attend(&self, channel: &Channel) -> Attendant {
        let attendant = self.attend_by(channel, &v1::AttendRequest::default()).await;
        let answer = &attendant.answer;
        assert_eq!(answer.code(), v1::RejectCode::None, "{}", answer.message);
        attendant
    }

    /// As [`Self::attend`]; the hub may refuse it.
    pub(crate) async fn attend_by(&self, channel: &Channel, request: &v1::AttendRequest) -> Attendant {
        let label = self.label(Lane::Attend);
        let sealed = message::seal(&self.credential.to_hub, Direction::ToHub, &label, request);
        let mut client = MapsClient::new(channel.clone());
        let mut notices = client.attend(sealed).await.expect("the hub serves").into_inner();
        let first = notices.message().await.expect("the hub serves").expect("an answer");
        let answer: v1::Notice =
            message::open(&self.credential.to_host, Direction::ToHost, &label, &first).expect("sealed as the answer");
        let id = read_id(&answer.attend_id).unwrap_or_default();
        Attendant {
            credential: self.credential.clone(),
            label: Label { id, ..label },
            number: 0,
            answer,
            notices,
        }
    }

    /// Asks something of maps.
    pub(crate) async fn map_call(&self, channel: &Channel, counter: u64, what: v1::map_request::What) -> v1::MapReply {
        let what = Some(what);
        let sealed = self.seal(Lane::Maps, &v1::MapRequest { counter, what });
        self.map_call_by(channel, sealed).await
    }

    /// As [`Self::map_call`], by a message that was sealed before.
    pub(crate) async fn map_call_by(&self, channel: &Channel, sealed: Sealed) -> v1::MapReply {
        let answer = MapsClient::new(channel.clone()).call(sealed).await;
        self.open(answer.expect("the hub serves").get_ref())
    }

    /// Sends a message by the critical lane.
    pub(crate) async fn critical(&self, channel: &Channel, sealed: Sealed) -> Result<BatchReply, Status> {
        let mut client = CriticalClient::new(channel.clone()).max_encoding_message_size(usize::MAX);
        let answer = client.apply(sealed).await?;
        Ok(self.open(answer.get_ref()))
    }

    /// Asks by a message that was sealed before.
    pub(crate) async fn pull(&self, channel: &Channel, sealed: Sealed) -> Result<v1::PullReply, Status> {
        let answer = PullClient::new(channel.clone()).call(sealed).await?;
        Ok(self.open(answer.get_ref()))
    }

    /// Sends messages by one stream of the bulk lane; gives the answers, which come in the same order.
    pub(crate) async fn bulk(&self, channel: &Channel, messages: Vec<Sealed>) -> Result<Vec<BatchReply>, Status> {
        let mut client = BulkClient::new(channel.clone()).max_decoding_message_size(SEALED_BYTES_MAX);
        let mut answers = client.stream(tokio_stream::iter(messages)).await?.into_inner();
        let mut replies = Vec::new();
        while let Some(answer) = answers.message().await? {
            replies.push(self.open(&answer));
        }
        Ok(replies)
    }

    /// Opens a watch that the hub does not refuse.
    pub(crate) async fn subscribe(&self, channel: &Channel, request: &v1::SubscribeRequest) -> Subscriber {
        let subscriber = self.ask_to_subscribe(channel, request).await;
        assert_eq!(
            subscriber.answer.code(),
            v1::RejectCode::None,
            "{}",
            subscriber.answer.message
        );
        subscriber
    }

    /// Opens a watch; the hub may have refused it.
    pub(crate) async fn ask_to_subscribe(&self, channel: &Channel, request: &v1::SubscribeRequest) -> Subscriber {
        let label = self.label(Lane::Subscribe);
        let opened = Subscriber::open(channel, &self.credential, label, request).await;
        opened.expect("the hub answers")
    }

    /// A PUT, or with no payload a DELETE, at a sequence.
    pub(crate) fn operation(&self, sequence: u64, path: &str, payload: Option<&str>) -> Operation {
        Operation {
            operation_id: new_id().as_bytes().to_vec().into(),
            version: Some(v1::Version {
                tenure: 0,
                incarnation: self.incarnation,
                sequence,
            }),
            path: path.to_owned(),
            kind: if payload.is_some() {
                OperationKind::Put
            } else {
                OperationKind::Delete
            }
            .into(),
            account_id: 2_000_001,
            made_at_ms: 1_700_000_000_000,
            payload: payload.map(|json| Payload::Full(Bytes::copy_from_slice(json.as_bytes()))),
            ..Default::default()
        }
    }

    /// Names the operation before this one on its path.
    pub(crate) fn after(&self, predecessor: Option<u64>, operation: Operation) -> Operation {
        let reference = |sequence| v1::OperationRef {
            incarnation: self.incarnation,
            sequence,
        };
        Operation {
            predecessor: predecessor.map(reference),
            ..operation
        }
    }
}

pub(crate) fn batch(operations: &[Operation]) -> OperationBatch {
    OperationBatch {
        operations: operations.iter().map(|one| one.encode_to_vec().into()).collect(),
        withdrawn: vec![],
    }
}

pub(crate) fn id_of(operation: &Operation) -> Uuid {
    Uuid::from_slice(&operation.operation_id).expect("16 bytes")
}
