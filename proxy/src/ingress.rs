//! The gRPC services: what comes in, and which way it goes.

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
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
        pull_server::PullServer, rotate_server::RotateServer, session_server::SessionServer,
    },
};
use tonic::{Request, Response, Status, Streaming, server::NamedService, service::RoutesBuilder};
use uuid::Uuid;
use zeroize::Zeroize as _;

use crate::{
    open::{Authenticated, Replayed, Sender, TokenHolder},
    operation::COUNTER_MAX,
    pipeline::{Hub, Turn, Turns, write_to_the_end},
    pull,
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
    pub const SERVICES: [&'static str; 6] = [
        SessionServer::<Self>::NAME,
        CriticalServer::<Self>::NAME,
        BulkServer::<Self>::NAME,
        PullServer::<Self>::NAME,
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
        routes
            .add_service(session)
            .add_service(critical)
            .add_service(bulk)
            .add_service(pull)
            .add_service(EnrolServer::new(self.clone()).max_decoding_message_size(SHORT_BYTES_MAX))
            .add_service(RotateServer::new(self.clone()).max_decoding_message_size(SHORT_BYTES_MAX));
    }
}

#[tonic::async_trait]
impl v1::critical_server::Critical for Ingress {
    async fn apply(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let permit = self.hub.writes.critical()?;
        let (hub, turn) = (Arc::clone(&self.hub), Turn::default());
        write_to_the_end(hub, Lane::Critical, request.into_inner(), permit, turn)
            .await
            .map(Response::new)
    }
}

#[tonic::async_trait]
impl v1::bulk_server::Bulk for Ingress {
    type StreamStream = Pin<Box<dyn Stream<Item = Result<v1::Sealed, Status>> + Send>>;

    /// Reads on while earlier batches are stored, at most a window of them; the answers come in the order of the
    /// batches. A batch that does not open ends the stream, and so does the hub's shutdown, after what was read.
    async fn stream(&self, request: Request<Streaming<v1::Sealed>>) -> Result<Response<Self::StreamStream>, Status> {
        let hub = Arc::clone(&self.hub);
        let mut draining = hub.draining.clone();
        let shutdown = async move {
            // An error means that nobody is left to drain for.
            let _ = draining.wait_for(|draining| *draining).await;
        };
        let mut turns = Turns::default();
        let answers = request
            .into_inner()
            .take_until(Box::pin(shutdown))
            .then(move |sealed| admit(Arc::clone(&hub), sealed, turns.next_turn()))
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

/// Lets a batch in, in the order of the stream, and begins its way: it goes on whether or not the answer is waited for.
async fn admit(hub: Arc<Hub>, sealed: Result<v1::Sealed, Status>, turn: Turn) -> Result<Answer, Status> {
    let sealed = sealed?;
    let permit = hub.writes.bulk().await?;
    Ok(Box::pin(write_to_the_end(hub, Lane::Bulk, sealed, permit, turn)))
}

#[tonic::async_trait]
impl v1::pull_server::Pull for Ingress {
    async fn call(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let (sender, reply) = match self.hub.opener.open(Lane::Pull, request.get_ref()).await? {
            Ok(Authenticated { sender, body }) => {
                let reply = pull::answer(&self.hub, &sender, body).await;
                (sender, reply)
            }
            Err(Replayed { sender, problem }) => (sender, pull::refused(&self.hub, problem)),
        };
        Ok(Response::new(sender.seal(&reply)))
    }
}

#[tonic::async_trait]
impl v1::session_server::Session for Ingress {
    async fn hello(&self, request: Request<v1::Sealed>) -> Result<Response<v1::Sealed>, Status> {
        let (sender, greeted) = match self.hub.opener.open_hello(request.get_ref()).await? {
            Ok(Authenticated { sender, body }) => {
                let greeted = greet(&self.hub, sender.host_id(), &body).await;
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
        let (sender, renewed) = match self.hub.opener.open(Lane::Renew, request.get_ref()).await? {
            Ok(Authenticated { sender, body }) => {
                let renewed = renew(&self.hub, &sender, &body).await;
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
        let (holder, request) = self.hub.opener.open_token(request.get_ref())?;
        let mut reply = enrol(&self.hub, &holder, &request)
            .await
            .unwrap_or_else(|problem| v1::EnrolReply {
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
        let (sender, rotated) = match self.hub.opener.open(Lane::Rotate, request.get_ref()).await? {
            Ok(Authenticated { sender, body }) => {
                let rotated = rotate(&self.hub, &sender, &body).await;
                (sender, rotated)
            }
            Err(Replayed { sender, problem }) => (sender, Err(problem)),
        };
        let mut reply = rotated.unwrap_or_else(|problem| v1::RotateReply {
            code: problem.code.into(),
            message: problem.sentence,
            ..Default::default()
        });
        // Whatever the database holds now is what counts, also where it was locked just now.
        self.hub.opener.forget(sender.host_id());
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
    let leases = hub.store.leases();
    let mut reply = v1::RenewReply {
        governed: leases.required,
        lease_ms: u64::try_from(leases.length.as_millis()).unwrap_or(u64::MAX),
        renew_credential: hub.opener.is_due_for_renewal(sender),
        ..Default::default()
    };
    if leases.required {
        let incarnation = sender.label().incarnation;
        if incarnation > COUNTER_MAX || request.counter > COUNTER_MAX {
            return Err(Problem::new(
                Code::BadRequest,
                "the renewal's counter is larger than the hub counts",
            ));
        }
        let renewed = hub
            .store
            .renew_leases(sender.host_id(), incarnation, request.counter)
            .await?;
        reply.leases = renewed
            .into_iter()
            .map(|lease| v1::Lease {
                map: lease.map,
                tenure: lease.tenure,
                expires_in_ms: lease.expires_in_ms,
            })
            .collect();
    }
    Ok(reply)
}

async fn greet(hub: &Hub, host_id: Uuid, hello: &v1::HelloRequest) -> Result<v1::HelloReply, Problem> {
    let protocol_version = agree(hello.protocol_version)?;
    let timeline = check_outbox(hub, host_id, hello).await?;
    hub.timeline.store(timeline, Ordering::Relaxed);
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
