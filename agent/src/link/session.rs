//! A connection that has said hello: sealing, opening, agreeing.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use p2p_sync_proto::{
    Code, PROTOCOL_VERSION, Policies, Problem,
    envelope::Lane,
    ids,
    keys::Direction,
    limits::SEALED_BYTES_MAX,
    message::{self, Label},
    v1::{self, session_client::SessionClient},
};
use prost::Message;
use tonic::transport::{Channel, Endpoint, Uri};

use super::connect::{Connector, problem_in};
use crate::{config::Config, keys::Keys, shared::Shared};

/// What a silent peer is given before the connection is taken for dead: one interval and this.
const KEEPALIVE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
const KEEPALIVE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(10);

/// Counts the messages of an incarnation, each lane's apart and over all connections, for the hub tells a message that
/// comes again by its number. A slow lane's may be overtaken by thousands of a quick one's. And the bytes that went either
/// way.
#[derive(Default)]
pub(crate) struct Sent {
    messages: [AtomicU64; Lane::COUNT],
    pub(crate) bytes_up: AtomicU64,
    pub(crate) bytes_down: AtomicU64,
}

impl Sent {
    fn next(&self, lane: Lane) -> u64 {
        self.messages[lane as usize - 1].fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// Seals a host's messages and opens the answers to them.
#[derive(Clone)]
pub(crate) struct Sealer {
    keys: Arc<Keys>,
    incarnation: u64,
    sent: Arc<Sent>,
}

impl Sealer {
    pub(crate) fn new(keys: Arc<Keys>, incarnation: u64, sent: Arc<Sent>) -> Self {
        Self {
            keys,
            incarnation,
            sent,
        }
    }

    /// Seals a message under a new id.
    pub(crate) fn seal(&self, lane: Lane, message: &impl Message) -> (Label, v1::Sealed) {
        let sequence = self.sent.next(lane);
        let credential = self.keys.newest();
        let label = Label::from_credential(&credential, self.incarnation, sequence, ids::new_id(), lane);
        let sealed = message::seal(&credential.to_hub, Direction::ToHub, &label, message);
        (label, sealed)
    }

    /// Opens the answer to a message.
    pub(crate) fn open<M: Message + Default>(&self, label: &Label, sealed: &v1::Sealed) -> Result<M, Problem> {
        if Label::read(sealed).as_ref() != Ok(label) {
            return Err(not_opened());
        }
        let credential = self.keys.of(label).ok_or_else(not_opened)?;
        message::open(&credential.to_host, Direction::ToHost, label, sealed).map_err(|_| not_opened())
    }
}

pub(super) fn not_opened() -> Problem {
    Problem::new(
        Code::NotOpened,
        "an answer does not open: something between here and the hub changes messages, or it is not the hub",
    )
}

/// How to speak with the hub over a [`Connector`]'s connections; nothing is connected yet.
pub(crate) fn endpoint(config: &Config) -> Endpoint {
    Endpoint::from(origin(config))
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

/// The hub's address with the path, if any, that goes before each method's.
pub(crate) fn origin(config: &Config) -> Uri {
    config
        .endpoint
        .parse()
        .expect("the configuration accepts addresses alone")
}

/// A connection on which hub and host have agreed.
pub(crate) struct Session {
    connector: Connector,
    pub(crate) channel: Channel,
    pub(crate) origin: Uri,
    pub(crate) sealer: Sealer,
}

impl Session {
    /// Connects and says hello; takes over the hub's policies.
    pub(crate) async fn open(shared: &Shared) -> Result<Self, Problem> {
        let connector = Connector::new(&shared.config, shared.sent.clone());
        let connected = endpoint(&shared.config).connect_with_connector(connector.clone()).await;
        let channel = connected.map_err(|error| {
            problem_in(&error).unwrap_or_else(|| Problem::new(Code::HubUnavailable, error.to_string()))
        })?;
        let sealer = Sealer::new(shared.keys.clone(), shared.incarnation, shared.sent.clone());
        let session = Self {
            connector,
            channel,
            origin: origin(&shared.config),
            sealer,
        };
        session.hello(shared).await?;
        Ok(session)
    }

    /// Says hello, also to find out whether the link still answers.
    pub(crate) async fn hello(&self, shared: &Shared) -> Result<(), Problem> {
        let hello = v1::HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            features: vec![],
            opening_id: shared.opening_id.as_bytes().to_vec().into(),
            incarnation: shared.incarnation,
            oldest_incarnation: shared.oldest_incarnation,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            policy_version: shared.lanes.policies().version,
        };
        let (label, sealed) = self.sealer.seal(Lane::Hello, &hello);
        let mut call = tonic::Request::new(sealed);
        call.set_timeout(shared.config.connect_timeout);
        let mut client = SessionClient::with_origin(self.channel.clone(), self.origin.clone())
            .max_decoding_message_size(SEALED_BYTES_MAX);
        let failed = |status| self.connector.problem_of(&status);
        let (asked_at, began) = (SystemTime::now(), Instant::now());
        let answer = client.hello(call).await.map_err(failed)?;
        shared.metrics.answered(began.elapsed());
        let reply: v1::HelloReply = self.sealer.open(&label, &answer.into_inner())?;
        shared.clock.heard(reply.hub_time_ms, asked_at, began.elapsed());
        shared.keys.heard(&label, reply.renew_credential);
        match Code::try_from(reply.code).unwrap_or(Code::Internal) {
            Code::None => {}
            code => return Err(Problem::new(code, reply.message)),
        }
        if let Some(policies) = reply.policies {
            shared.take_policies(Policies::from_wire(policies));
        }
        Ok(())
    }
}

/// A gRPC status in our words.
pub(crate) fn problem_of(status: &tonic::Status) -> Problem {
    if let Some(problem) = problem_in(status) {
        return problem;
    }
    match status.code() {
        tonic::Code::Unauthenticated => Problem::new(
            Code::NotOpened,
            "the hub does not open this host's messages: its credential (encryption_key, or the credential file) is not for this \
             hub or not its newest, or the host is locked or revoked: ask the hub's operator",
        ),
        tonic::Code::DeadlineExceeded => Problem::new(Code::HubUnavailable, "the hub did not answer in time"),
        tonic::Code::ResourceExhausted => Problem::new(Code::RateLimited, status.message()),
        tonic::Code::Unimplemented => Problem::new(
            Code::BadEndpoint,
            "main_server_endpoint answers but is no p2p-sync hub: check host, port and path",
        ),
        code => Problem::new(
            Code::HubUnavailable,
            format!("the hub did not answer: {code:?}, {}", status.message()),
        ),
    }
}
