//! The gRPC services: what comes in, and which way it goes.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use futures::{Stream, StreamExt};
use p2p_sync_proto::{
    Code, OLDER_VERSIONS_SERVED, PROTOCOL_VERSION, Problem,
    envelope::Lane,
    identity,
    ids::read_id,
    limits::{BULK_WINDOW_BATCHES, SEALED_BYTES_MAX},
    v1::{
        self, bulk_server::BulkServer, critical_server::CriticalServer, enrol_server::EnrolServer,
        maps_server::MapsServer, pull_server::PullServer, rotate_server::RotateServer, session_server::SessionServer,
        subscribe_server::SubscribeServer,
    },
};
use prost::Message;
use tokio::sync::Notify;
use tonic::{Request, Response, Status, Streaming, server::NamedService, service::RoutesBuilder};
use uuid::Uuid;
use zeroize::Zeroize as _;

use crate::{
    admission::{
        hosts::{Host, StreamPlace},
        intake::Incoming,
    },
    hosts::{
        self,
        attend::{self, Attend},
        calls,
    },
    open::{Authenticated, Replayed, Sender, TokenHolder},
    operation::COUNTER_MAX,
    pipeline::{Hub, LetIn, Turn, Turns, refused, write_to_the_end},
    pull,
    store::Standing,
    streams::watch::{self, Watch},
};

/// Longest message of an exchange that has nothing long to say, bytes.
const SHORT_BYTES_MAX: usize = 16 * 1024;

/// Answers the calls of hosts.
#[derive(Clone, Debug)]
pub struct Ingress {
    hub: Arc<Hub>,
}

impl Ingress {
    /// The names of all services that [`Self::add_to`] adds.
    pub const SERVICES: [&'static str; 8] = [
        SessionServer::<Self>::NAME,
        MapsServer::<Self>::NAME,
        CriticalServer::<Self>::NAME,
        BulkServer::<Self>::NAME,
        PullServer::<Self>::NAME,
        SubscribeServer::<Self>::NAME,
        EnrolServer::<Self>::NAME,
        RotateServer::<Self>::NAME,
    ];

    /// The way into a hub.
    pub fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }

    /// Adds all services, with the bounds of their messages.
    pub fn add_to(&self, routes: &mut RoutesBuilder) {
        let bytes = SEALED_BYTES_MAX;
        let session = SessionServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        let critical = CriticalServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        let bulk = BulkServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        let pull = PullServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        let subscribe = SubscribeServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        let maps = MapsServer::new(self.clone())
            .max_decoding_message_size(bytes)
            .max_encoding_message_size(bytes);
        routes
            .add_service(session)
            .add_service(maps)
            .add_service(critical)
            .add_service(bulk)
            .add_service(pull)
            .add_service(subscribe)
            .add_service(EnrolServer::new(self.clone()).max_decoding_message_size(SHORT_BYTES_MAX))
            .add_service(RotateServer::new(self.clone()).max_decoding_message_size(SHORT_BYTES_MAX));
    }
}

#[tonic::async_trait]
impl v1::critical_server::Critical for Ingress {
    async fn apply(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Critical, incoming.as_deref(), request.into_inner()).await?;
        let (host, message) = match opened {
            Ok(message) => message,
            Err(replayed) => return Ok(Response::new(told(&self.hub, replayed))),
        };
        let answer = let_in(&self.hub, Lane::Critical, &host, message, Turn::default()).await?;
        Ok(answered(&host, answer.await?).await)
    }
}

/// Opens a message; from there on its host answers for it.
async fn open<M: Message + Default>(
    hub: &Hub,
    lane: Lane,
    incoming: Option<&Incoming>,
    sealed: v1::Sealed,
) -> Result<Result<(Arc<Host>, Authenticated<M>), Replayed>, Status> {
    open_by(hub, incoming, sealed.body.len(), hub.opener.open(lane, &sealed)).await
}

/// Opens a message of so many bytes by one of the opener's ways, and counts for its connection whether it did.
async fn open_by<M>(
    hub: &Hub,
    incoming: Option<&Incoming>,
    bytes: usize,
    opening: impl Future<Output = Result<Result<Authenticated<M>, Replayed>, Status>>,
) -> Result<Result<(Arc<Host>, Authenticated<M>), Replayed>, Status> {
    let turn = hub.opening.turn(bytes).await;
    let opened = opening.await;
    drop(turn);
    match (&opened, incoming) {
        (Ok(Ok(_)), Some(incoming)) => incoming.opened(),
        // What was recorded proves nobody to be there.
        (Ok(Err(_)), Some(incoming)) => incoming.not_opened(),
        (Err(status), Some(incoming)) if status.code() == tonic::Code::Unauthenticated => incoming.not_opened(),
        _ => {}
    }
    Ok(opened?.map(|message| (hub.hosts.of(message.sender.host_id()), message)))
}

/// The answer to a message that was taken before.
fn told(hub: &Hub, Replayed { sender, problem }: Replayed) -> v1::Sealed {
    sender.seal(&refused(hub, problem))
}

/// Lets a message in as soon as its host's share and the hub have room, and begins its way: it goes on whether or not the
/// answer is waited for. What there is no room for is answered at once, and comes again.
async fn let_in(
    hub: &Arc<Hub>,
    lane: Lane,
    host: &Arc<Host>,
    message: Authenticated<v1::OperationBatch>,
    turn: Turn,
) -> Result<Answer, Status> {
    let received = Instant::now();
    match host.admit(lane, &message.body, &hub.writes).await? {
        Ok(admitted) => {
            let let_in = LetIn {
                host: Arc::clone(host),
                message,
                lane,
                received,
                admitted,
                turn,
            };
            Ok(Box::pin(write_to_the_end(Arc::clone(hub), let_in)))
        }
        Err(busy) => {
            let reply = busy.reply(hub.timeline.load(Ordering::Relaxed));
            let sealed = message.sender.seal(&reply);
            Ok(Box::pin(std::future::ready(Ok(sealed))))
        }
    }
}

/// An answer that counts as unread until its host has read it.
async fn answered(host: &Host, sealed: v1::Sealed) -> Response<v1::Sealed> {
    let room = host.answering(sealed.body.len()).await;
    let mut answer = Response::new(sealed);
    answer.extensions_mut().insert(Arc::new(room));
    answer
}

#[tonic::async_trait]
impl v1::bulk_server::Bulk for Ingress {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<v1::Sealed, Status>> + Send>>;

    /// Reads on while earlier batches are stored, at most a window of them; the answers come in the order of the
    /// batches. A batch that does not open ends the stream, and so does the hub's shutdown, after what was read.
    async fn stream(&self, request: Request<Streaming<v1::Sealed>>) -> Result<Response<Self::StreamStream>, Status> {
        let mut draining = self.hub.draining.clone();
        let ends = Arc::new(Notify::new());
        let told = Arc::clone(&ends);
        let shutdown = async move {
            tokio::select! {
                // An error means that nobody is left to drain for.
                _ = draining.wait_for(|draining| *draining) => {}
                () = told.notified() => {}
            }
        };
        let stream = Arc::new(BulkStream {
            hub: Arc::clone(&self.hub),
            incoming: Incoming::of(&request),
            ends,
            place: OnceLock::new(),
        });
        let mut turns = Turns::default();
        let answers = request
            .into_inner()
            .take_until(Box::pin(shutdown))
            .then(move |sealed| Arc::clone(&stream).admit(sealed, turns.next_turn()))
            .map(|begun| async {
                match begun {
                    Ok(answer) => answer.await,
                    Err(status) => Err(status),
                }
            })
            .buffered(BULK_WINDOW_BATCHES);
        Ok(Response::new(Box::pin(answers)))
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<v1::Sealed, Status>> + Send>>;

/// One stream of batches.
struct BulkStream {
    hub: Arc<Hub>,
    incoming: Option<Arc<Incoming>>,
    ends: Arc<Notify>,
    /// Among the streams of the host that its first batch was sealed by.
    place: OnceLock<StreamPlace>,
}

impl BulkStream {
    /// Lets a batch in, in the order of the stream; the next one is not read before.
    async fn admit(self: Arc<Self>, sealed: Result<v1::Sealed, Status>, turn: Turn) -> Result<Answer, Status> {
        let (host, message) = match open(&self.hub, Lane::Bulk, self.incoming.as_deref(), sealed?).await? {
            Ok(message) => message,
            Err(replayed) => return Ok(Box::pin(std::future::ready(Ok(told(&self.hub, replayed))))),
        };
        self.place.get_or_init(|| host.stream(&self.ends));
        let_in(&self.hub, Lane::Bulk, &host, message, turn).await
    }
}

#[tonic::async_trait]
impl v1::pull_server::Pull for Ingress {
    async fn call(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Pull, incoming.as_deref(), request.into_inner()).await?;
        let (host, question) = match opened {
            Ok(question) => question,
            Err(Replayed { sender, problem }) => {
                return Ok(Response::new(sender.seal(&pull::refused(&self.hub, problem))));
            }
        };
        let Authenticated { sender, body } = question;
        let in_turn = if pull::is_slow(&body) {
            host.slow_question().await
        } else {
            host.question().await
        };
        let reply = match in_turn {
            Ok(_turn) => pull::answer(&self.hub, &sender, body).await,
            Err(problem) => pull::refused(&self.hub, problem),
        };
        Ok(answered(&host, sender.seal(&reply)).await)
    }
}

#[tonic::async_trait]
impl v1::subscribe_server::Subscribe for Ingress {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::Sealed, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::Sealed>) -> Result<Response<Self::WatchStream>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Subscribe, incoming.as_deref(), request.into_inner()).await?;
        let (first, watch) = match opened {
            Ok((host, Authenticated { sender, body })) => match host.question().await {
                Ok(_turn) => Watch::begin(&self.hub, &host, sender, body).await,
                Err(problem) => (watch::refused(&self.hub, &sender, problem), None),
            },
            Err(Replayed { sender, problem }) => (watch::refused(&self.hub, &sender, problem), None),
        };
        let told = futures::stream::unfold(watch.map(Box::new), |watch| async {
            let mut watch = watch?;
            let sealed = watch.next().await?;
            Some((Ok(sealed), Some(watch)))
        });
        let first = futures::stream::once(std::future::ready(Ok(first)));
        Ok(Response::new(Box::pin(first.chain(told))))
    }
}

#[tonic::async_trait]
impl v1::maps_server::Maps for Ingress {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<v1::Sealed, Status>> + Send>>;

    async fn attend(&self, request: Request<v1::Sealed>) -> Result<Response<Self::AttendStream>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Attend, incoming.as_deref(), request.into_inner()).await?;
        let (first, attend) = match opened {
            Ok((host, Authenticated { sender, body })) => match host.session_call().await {
                Ok(_turn) => Attend::begin(&self.hub, &host, sender, &body).await,
                Err(problem) => (attend::refused(&sender, problem), None),
            },
            Err(Replayed { sender, problem }) => (attend::refused(&sender, problem), None),
        };
        let told = futures::stream::unfold(attend.map(Box::new), |attend| async {
            let mut attend = attend?;
            let sealed = attend.next().await?;
            Some((Ok(sealed), Some(attend)))
        });
        let first = futures::stream::once(std::future::ready(Ok(first)));
        Ok(Response::new(Box::pin(first.chain(told))))
    }

    async fn call(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Maps, incoming.as_deref(), request.into_inner()).await?;
        let (host, Authenticated { sender, body }) = match opened {
            Ok(asked) => asked,
            Err(Replayed { sender, problem }) => return Ok(Response::new(sender.seal(&calls::refused(problem)))),
        };
        let reply = match host.session_call().await {
            Ok(_turn) => calls::answer(&self.hub, &sender, body).await,
            Err(problem) => calls::refused(problem),
        };
        Ok(answered(&host, sender.seal(&reply)).await)
    }
}

#[tonic::async_trait]
impl v1::session_server::Session for Ingress {
    async fn hello(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let sealed = request.into_inner();
        let opening = self.hub.opener.open_hello(&sealed);
        let opened = open_by(&self.hub, incoming.as_deref(), sealed.body.len(), opening).await?;
        let (sender, greeted) = match opened {
            Ok((host, Authenticated { sender, body })) => {
                let greeted = match host.session_call().await {
                    Ok(_turn) => greet(&self.hub, sender.host_id(), &body).await,
                    Err(problem) => Err(problem),
                };
                (sender, greeted)
            }
            Err(Replayed { sender, problem }) => (sender, Err(problem)),
        };
        let mut reply = greeted.unwrap_or_else(|problem| v1::HelloReply {
            protocol_version: PROTOCOL_VERSION,
            hub_time_ms: now_ms(),
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        });
        reply.renew_credential = self.hub.opener.is_due_for_renewal(&sender);
        Ok(Response::new(sender.seal(&reply)))
    }

    async fn renew(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Renew, incoming.as_deref(), request.into_inner()).await?;
        let (sender, renewed) = match opened {
            Ok((host, Authenticated { sender, body })) => {
                let renewed = match host.session_call().await {
                    Ok(_turn) => renew(&self.hub, &sender, &body).await,
                    Err(problem) => Err(problem),
                };
                (sender, renewed)
            }
            Err(Replayed { sender, problem }) => (sender, Err(problem)),
        };
        let reply = renewed.unwrap_or_else(|problem| v1::RenewReply {
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        });
        Ok(Response::new(sender.seal(&reply)))
    }
}

#[tonic::async_trait]
impl v1::enrol_server::Enrol for Ingress {
    async fn exchange(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let not_opened = |status| {
            incoming.as_deref().inspect(|incoming| incoming.not_opened());
            status
        };
        let opened = self.hub.opener.open_token(request.get_ref());
        let (holder, request) = opened.map_err(not_opened)?;
        incoming.as_deref().inspect(|incoming| incoming.arrived());
        let enrolled = enrol(&self.hub, &holder, &request).await;
        // Whoever ever had a token has one that opens: where it enrols nobody, it says no more of its sender than none.
        match (&enrolled, &incoming) {
            (Ok(_), Some(incoming)) => incoming.opened(),
            (Err(_), Some(incoming)) => incoming.not_opened(),
            (_, None) => {}
        }
        let mut reply = enrolled.unwrap_or_else(|problem| v1::EnrolReply {
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        });
        let sealed = holder.seal(&reply);
        reply.credential.zeroize();
        Ok(Response::new(sealed))
    }
}

async fn enrol(hub: &Hub, holder: &TokenHolder, request: &v1::EnrolRequest) -> Result<v1::EnrolReply, Problem> {
    let token_id = holder.token_id();
    if !identity::is_proven(token_id, &request.public_key, &request.proof) {
        let sentence = "the request does not prove that its key is the host's own: update the agent";
        return Err(Problem::new(Code::BadRequest, sentence));
    }
    // One at a time, whoever asks: a token that is used up opens as well as any, and each question takes a connection.
    let shut_down = |_| Problem::new(Code::HubUnavailable, "the hub is shutting down; try again");
    let _turn = hub.enrolments.acquire().await.map_err(shut_down)?;
    let key_id = hub.opener.current_key();
    let enrolled = hub.store.enrol(token_id, &request.public_key, key_id.as_str()).await;
    let enrolled = enrolled.inspect_err(|problem| tracing::warn!(%problem, "a token enrols nobody"))?;
    let host_id = enrolled.host_id;
    let mut credential = hub.opener.credential(&enrolled.key_id, host_id, 1)?;
    tracing::info!(%host_id, maps = ?enrolled.maps, maps_taken = ?enrolled.maps_taken, "a machine is enrolled");
    Ok(v1::EnrolReply {
        credential: std::mem::take(&mut *credential),
        maps: enrolled.maps,
        maps_taken: enrolled.maps_taken,
        ..Default::default()
    })
}

#[tonic::async_trait]
impl v1::rotate_server::Rotate for Ingress {
    async fn renew(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let incoming = Incoming::of(&request);
        let opened = open(&self.hub, Lane::Rotate, incoming.as_deref(), request.into_inner()).await?;
        let (sender, rotated) = match opened {
            Ok((host, Authenticated { sender, body })) => {
                let rotated = match host.session_call().await {
                    Ok(_turn) => {
                        let rotated = rotate(&self.hub, &sender, &body).await;
                        // Whatever the database holds now is what counts, also where it was locked just now.
                        self.hub.opener.forget(sender.host_id());
                        rotated
                    }
                    Err(problem) => Err(problem),
                };
                (sender, rotated)
            }
            Err(Replayed { sender, problem }) => (sender, Err(problem)),
        };
        let mut reply = rotated.unwrap_or_else(|problem| v1::RotateReply {
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        });
        let sealed = sender.seal(&reply);
        reply.credential.zeroize();
        Ok(Response::new(sealed))
    }
}

async fn rotate(hub: &Hub, sender: &Sender, request: &v1::RotateRequest) -> Result<v1::RotateReply, Problem> {
    let bad = || Problem::new(Code::BadRequest, "a request's id has 16 bytes: update the agent");
    let request_id = read_id(&request.request_id).ok_or_else(bad)?;
    let (host_id, generation) = (sender.host_id(), sender.label().generation);
    let (key_id, due) = (hub.opener.current_key(), hub.opener.is_due_for_renewal(sender));
    let given = hub
        .store
        .renew_credential(host_id, generation, request_id, key_id.as_str(), due)
        .await
        .inspect_err(|problem| tracing::warn!(%host_id, %problem, "a credential is not renewed"))?;
    let not_due = || {
        Problem::new(
            Code::BadRequest,
            "this credential is of the hub's current key: there is nothing to renew",
        )
    };
    let (key_id, generation) = given.ok_or_else(not_due)?;
    let mut credential = hub.opener.credential(&key_id, host_id, generation)?;
    Ok(v1::RotateReply {
        credential: std::mem::take(&mut *credential),
        ..Default::default()
    })
}

async fn renew(hub: &Hub, sender: &Sender, request: &v1::RenewRequest) -> Result<v1::RenewReply, Problem> {
    let mut standing = Standing::default();
    if hub.store.leases().required {
        let incarnation = sender.label().incarnation;
        if incarnation > COUNTER_MAX || request.counter > COUNTER_MAX {
            return Err(Problem::new(
                Code::BadRequest,
                "the renewal's counter is larger than the hub counts",
            ));
        }
        let renewed = hub.store.renew_leases(sender.host_id(), incarnation, request.counter);
        standing = renewed.await?;
    }
    Ok(hosts::reply(hub, sender, &standing))
}

async fn greet(hub: &Hub, host_id: Uuid, hello: &v1::HelloRequest) -> Result<v1::HelloReply, Problem> {
    let protocol_version = agree(hello.protocol_version)?;
    let timeline = check_outbox(hub, host_id, hello).await?;
    hub.hear_timeline(timeline);
    let rules = hub.rules.load_full();
    let policies = &rules.policies;
    Ok(v1::HelloReply {
        protocol_version,
        hub_id: hub.store.hub_id().as_bytes().to_vec().into(),
        timeline,
        policies: (policies.version != hello.policy_version).then(|| policies.to_wire()),
        hub_time_ms: now_ms(),
        ..Default::default()
    })
}

/// The version both sides speak: the older one's, as long as this hub serves it.
fn agree(version: u32) -> Result<u32, Problem> {
    let oldest = PROTOCOL_VERSION.saturating_sub(OLDER_VERSIONS_SERVED).max(1);
    if version < oldest {
        let sentence = format!(
            "the agent speaks version {version} of the protocol, the hub {oldest} to {PROTOCOL_VERSION}: update the agent; \
             its outbox is kept"
        );
        return Err(Problem::new(Code::UpgradeRequired, sentence));
    }
    Ok(version.min(PROTOCOL_VERSION))
}

/// Gives the hub's timeline. Who only reads has no outbox, and says so by an empty id.
async fn check_outbox(hub: &Hub, host_id: Uuid, hello: &v1::HelloRequest) -> Result<u64, Problem> {
    if hello.opening_id.is_empty() && hello.incarnation == 0 {
        return hub.store.timeline().await;
    }
    let bad = |what: &str| Problem::new(Code::BadRequest, format!("{what}: update the agent"));
    let opening_id = read_id(&hello.opening_id).ok_or_else(|| bad("the outbox id has 16 bytes"))?;
    if hello.incarnation > COUNTER_MAX || hello.oldest_incarnation > hello.incarnation {
        return Err(bad("the outbox's incarnations are out of order"));
    }
    hub.store
        .hello(host_id, opening_id, hello.incarnation, hello.oldest_incarnation)
        .await
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_version_is_spoken_and_one_too_old_is_told_to_update() {
        assert_eq!(agree(PROTOCOL_VERSION), Ok(PROTOCOL_VERSION));
        assert_eq!(agree(PROTOCOL_VERSION + 1), Ok(PROTOCOL_VERSION));
        assert_eq!(agree(0).expect_err("too old").code, Code::UpgradeRequired);
    }
}
