//! A hub, and a host that seals what it likes.

use std::sync::atomic::{AtomicU64, Ordering};

use p2p_sync_proto::{
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction},
    message::{self, Label},
    v1::{
        self, OperationKind, critical_client::CriticalClient, operation::Payload, pull_client::PullClient,
        pull_request::What, session_client::SessionClient,
    },
};
use p2p_sync_tests::stack::{Hub, HubDatabase};
use prost::{Message, bytes::Bytes};
use tonic::transport::Channel;
use uuid::Uuid;
#[cfg(feature = "servers")]
use {
    p2p_sync_proto::v1::bulk_client::BulkClient, tokio::sync::mpsc, tokio_stream::wrappers::ReceiverStream,
    tonic::Streaming,
};

use crate::door::{Folder, program};

/// An embedded hub's folder, with no hub running yet.
pub(crate) fn embedded(folder: &Folder, settings: &[(&str, String)]) -> Hub {
    Hub::new(program(), &folder.path("hub"), &HubDatabase::Embedded, settings)
}

/// A host that seals what it likes.
pub(crate) struct Forger {
    channel: Channel,
    credential: Credential,
    sent: AtomicU64,
}

impl Forger {
    pub(crate) async fn new(address: &str, credential: Credential) -> Self {
        let channel = Channel::from_shared(address.to_owned())
            .expect("an address")
            .connect()
            .await
            .expect("the hub listens");
        Self {
            channel,
            credential,
            sent: AtomicU64::new(0),
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

    pub(crate) async fn hello(&self, protocol_version: u32) -> v1::HelloReply {
        let opening_id = Uuid::from_u128(1).as_bytes().to_vec().into();
        let hello = v1::HelloRequest {
            protocol_version,
            opening_id,
            incarnation: 1,
            oldest_incarnation: 1,
            ..Default::default()
        };
        let answer = SessionClient::new(self.channel.clone())
            .hello(self.seal(Lane::Hello, &hello))
            .await;
        self.open(&answer.expect("answered").into_inner())
    }

    pub(crate) async fn apply(&self, operations: Vec<Bytes>) -> v1::BatchReply {
        let batch = v1::OperationBatch {
            operations,
            withdrawn: Vec::new(),
        };
        let answer = CriticalClient::new(self.channel.clone())
            .apply(self.seal(Lane::Critical, &batch))
            .await;
        self.open(&answer.expect("answered").into_inner())
    }

    /// A batch as it travels by a stream.
    #[cfg(feature = "servers")]
    pub(crate) fn batch(&self, operations: Vec<Bytes>) -> v1::Sealed {
        let withdrawn = Vec::new();
        self.seal(Lane::Bulk, &v1::OperationBatch { operations, withdrawn })
    }

    /// Opens a stream of batches: what is sent there, and what comes back.
    #[cfg(feature = "servers")]
    pub(crate) async fn stream(&self) -> (mpsc::Sender<v1::Sealed>, Streaming<v1::Sealed>) {
        let (batches, waiting) = mpsc::channel(8);
        let answers = BulkClient::new(self.channel.clone())
            .stream(ReceiverStream::new(waiting))
            .await;
        (batches, answers.expect("the hub takes a stream").into_inner())
    }

    pub(crate) async fn pull(&self, what: Option<What>) -> Result<v1::PullReply, tonic::Status> {
        let request = self.seal(Lane::Pull, &v1::PullRequest { what });
        let answer = PullClient::new(self.channel.clone()).call(request).await?;
        Ok(self.open(&answer.into_inner()))
    }
}

/// An operation that nothing is wrong with.
pub(crate) fn good(sequence: u64) -> v1::Operation {
    v1::Operation {
        operation_id: new_id().as_bytes().to_vec().into(),
        version: Some(v1::Version {
            tenure: 0,
            incarnation: 1,
            sequence,
        }),
        path: "prontera/MONSTER_DATA/7".to_owned(),
        kind: OperationKind::Put.into(),
        policy_version: 1,
        payload: Some(full(r#"{"monster_id":7,"hp":3}"#)),
        ..Default::default()
    }
}

pub(crate) fn full(payload: &str) -> Payload {
    Payload::Full(payload.to_owned().into())
}
