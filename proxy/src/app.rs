//! The proxy as a whole: built from its settings, served, drained.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{Code, Problem, settings::Problems, v1};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot, watch},
    task::JoinSet,
    time::{interval, sleep, timeout},
};
use tonic::{
    service::{Routes, RoutesBuilder},
    transport::Server,
};
use tonic_health::{ServingStatus, server::HealthReporter};
use tonic_reflection::server::Builder;

use crate::{
    admin::{Admin, Ready},
    admission::{
        hosts::Hosts,
        intake::{Intake, Opening},
        peers::Peers,
    },
    cache::{Cache, Marks},
    config::{Admission, Config},
    embed::{Embedder, Embeddings, queue},
    host_cache::HostCache,
    hosts::{assigner, attend::Attends},
    ingress::Ingress,
    keyring::Keyring,
    listener::connections,
    open::Opener,
    pipeline::{Hub, READS_MAX, Writes},
    publish::Publisher,
    redis_client::RedisClient,
    reload,
    store::{Claim, Connection, Store},
    streams::{Streams, wake_ups},
    tls::Tls,
    validate::types_file::{Rules, Sources},
    verdicts::Verdicts,
};

/// Between two questions whether the database answers.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// Between two looks for what hosts report of themselves.
const METRICS_INTERVAL: Duration = Duration::from_secs(10);
/// Between two rounds of maintenance.
const MAINTENANCE_INTERVAL: Duration = Duration::from_hours(1);
/// How long a shutdown waits for calls and streams, and then for writes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Streams that a connection may open and reset without having been served, before it is cut.
const RESET_STREAMS_MAX: usize = 64;
/// What a peer may send ahead of what is read. Over a line of 100 ms a connection brings 1.25 MB a second at most, compressed.
const WINDOW_BYTES: u32 = 128 * 1024;

/// A proxy that holds its port, its database and its keys, and has yet to serve.
#[derive(Debug)]
pub struct App {
    hub: Arc<Hub>,
    listener: TcpListener,
    /// Absent: plaintext.
    tls: Option<Tls>,
    /// Absent: tools are not served.
    admin: Option<Admin>,
    admission: Admission,
    draining: watch::Sender<bool>,
    types_file: Option<PathBuf>,
    /// What the rules were made of.
    sources: Sources,
    keyring_file: PathBuf,
    /// Where other proxies are heard, and under which names.
    redis: Option<(RedisClient, String)>,
    /// The right to be the only proxy on the database, where that is needed.
    claim: Option<Claim>,
}

impl App {
    /// Takes hold of everything that serving needs; what is wrong is told here, before anything is served.
    pub async fn build(config: &Config) -> Result<Self, Problems> {
        let (rules, sources) = Rules::load_with_sources(config.types_file.as_deref());
        Self::build_with(config, rules?, sources)
            .await
            .map_err(|problem| Problems(vec![problem]))
    }

    async fn build_with(config: &Config, rules: Rules, sources: Sources) -> Result<Self, Problem> {
        let tls = config.tls.clone().map(Tls::load).transpose()?;
        let listener = bind(config.listen).await?;
        let admin = match &config.admin {
            Some(settings) => Some(Admin::build(settings).await?),
            None => None,
        };
        let embedder = Embedder::open(&config.embedding).await?;
        let store = Store::connect(&config.store).await?;
        if let Some(embedder) = &embedder {
            store
                .take_embedding_space(embedder.model(), embedder.dimensions())
                .await?;
        }
        // After the database, whose folder it may lie in.
        let keyring = load_keyring(&config.store.connection, &config.keyring_file)?;
        let timeline = store.timeline().await?;
        // Before anybody can be granted a map whose lease ran out while there was no hub to renew it.
        store.note_start().await?;
        let streams = Streams::new(store.clone(), config.redis.is_none());
        let mut heard = None;
        let (cache, publisher, host_cache, attends, claim) = match &config.redis {
            None => (
                Cache::process(config.cache),
                Publisher::process(Arc::clone(&streams)),
                HostCache::process(),
                Attends::process(),
                Some(store.claim_single_proxy().await?),
            ),
            Some(redis) => {
                let client = RedisClient::open(redis).map_err(|error| {
                    let sentence = format!("the settings of Redis cannot be used ({error}): check redis_host");
                    Problem::new(Code::RedisUnreachable, sentence)
                })?;
                let cache = Cache::redis(&client, &redis.prefix, config.cache);
                let publisher = Publisher::redis(Arc::clone(&streams), client.clone(), &redis.prefix);
                let attends = Attends::redis(client.clone(), &redis.prefix);
                heard = Some((client.clone(), redis.prefix.clone()));
                (cache, publisher, HostCache::redis(client, &redis.prefix), attends, None)
            }
        };
        let (draining, drained) = watch::channel(false);
        let hub = Hub {
            opener: Opener::new(keyring, store.clone()),
            opening: Opening::default(),
            hosts: Hosts::new(config.admission.quota, config.store.critical_connections),
            rules: ArcSwap::from_pointee(rules),
            store,
            cache,
            publisher,
            streams,
            host_cache,
            maps: config.maps,
            attends,
            embeddings: Embeddings::new(embedder, config.embedding_limits.clone()),
            timeline: timeline.into(),
            verdicts: Verdicts::new(config.pace, config.locks),
            writes: Writes::default(),
            reads: Semaphore::new(READS_MAX),
            enrolments: Semaphore::new(1),
            draining: drained,
        };
        Ok(Self {
            hub: Arc::new(hub),
            listener,
            tls,
            admin,
            admission: config.admission,
            draining,
            types_file: config.types_file.clone(),
            sources,
            keyring_file: config.keyring_file.clone(),
            redis: heard,
            claim,
        })
    }

    /// Where hosts reach it from this machine: `https://127.0.0.1:50051`.
    pub fn url(&self) -> std::io::Result<String> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(format!("{scheme}://{}", self.address()?))
    }

    /// Where tools reach it from this machine; none where they are not served.
    pub fn admin_url(&self) -> std::io::Result<Option<String>> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let address = self.admin.as_ref().map(Admin::address).transpose()?;
        Ok(address.map(|address| format!("{scheme}://{address}")))
    }

    /// The address that is listened on.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is over, then lets what was begun come to its end, within bounds.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Problem> {
        let Self {
            hub,
            listener,
            tls,
            admin,
            admission,
            draining,
            types_file,
            sources,
            keyring_file,
            redis,
            claim,
        } = self;
        let (health, health_service) = tonic_health::server::health_reporter();
        let mut background = JoinSet::new();
        let ready = Ready::default();
        background.spawn(probe(Arc::clone(&hub), health.clone(), Arc::clone(&ready)));
        background.spawn(maintain(hub.store.clone()));
        background.spawn(note_alive(hub.store.clone()));
        background.spawn(record_metrics(hub.store.clone()));
        background.spawn(Attends::run(Arc::clone(&hub)));
        background.spawn(assigner::run(Arc::clone(&hub)));
        background.spawn(queue::run(Arc::clone(&hub)));
        background.spawn(reload::follow(Arc::clone(&hub), types_file, sources));
        background.spawn(reload::follow_keyring(Arc::clone(&hub), keyring_file));
        background.spawn(Arc::clone(&hub.streams).run());
        background.spawn(Arc::clone(&hub.streams).follow_hosts());
        if let Some((client, prefix)) = redis {
            background.spawn(tell_what_redis_is(client.clone()));
            background.spawn(wake_ups::listen(Arc::clone(&hub), client, prefix));
        }
        // Not among these: it ends after the last write, and then by itself.
        let (writing, all_written) = oneshot::channel();
        let judge = Arc::clone(&hub);
        let judging = tokio::spawn(async move { judge.verdicts.run(&judge.store, &judge.opener, all_written).await });

        let mut routes = Routes::builder();
        routes.add_service(health_service);
        add_reflection(&mut routes)?;
        Ingress::new(Arc::clone(&hub)).add_to(&mut routes);
        let served = tls.as_ref().map(Tls::served);
        // Not among those in the background either: what tools have begun comes to its end.
        let mut for_tools = JoinSet::new();
        if let Some(admin) = admin {
            let (hub, ready) = (Arc::clone(&hub), Arc::clone(&ready));
            for_tools.spawn(admin.serve(hub, ready, served.clone(), admission.request_timeout));
        }
        if let Some(tls) = tls {
            tracing::info!(certificate = %tls.validity(), "hosts are served over TLS");
            background.spawn(tls.follow());
        }
        let peers = Peers::new(admission.connections_per_address_max);
        let incoming = connections(listener, served, admission.connections_max, peers, GREETING_TIMEOUT);
        let mut ended = hub.draining.clone();
        let graceful = async move {
            // An error means that the sender is gone, and with it the reason to serve.
            let _over = ended.wait_for(|draining| *draining).await;
        };
        let serving = server(&admission)
            .layer(Intake::default())
            .add_routes(routes.routes())
            .serve_with_incoming_shutdown(incoming, graceful);
        let mut serving = std::pin::pin!(serving);
        let ended = tokio::select! {
            served = &mut serving => served.map_err(|error| failed(&error)),
            ended = async { tokio::select! { () = shutdown => Ok(()), problem = keep_claim(&hub, claim) => Err(problem) } } => {
                tracing::info!("shutting down: what was begun comes to its end");
                background.shutdown().await;
                report(&health, ServingStatus::NotServing).await;
                ready.store(false, Ordering::Relaxed);
                draining.send_replace(true);
                let served = timeout(DRAIN_TIMEOUT, serving).await.unwrap_or_else(|_| {
                    tracing::warn!("connections that did not end by themselves are cut");
                    Ok(())
                });
                ended.and(served.map_err(|error| failed(&error)))
            }
        };
        // Also where serving hosts failed.
        draining.send_replace(true);
        let tools_gone = async { while for_tools.join_next().await.is_some() {} };
        if timeout(DRAIN_TIMEOUT, tools_gone).await.is_err() {
            tracing::warn!("requests of tools that did not end in time are cut off");
        }
        for_tools.shutdown().await;
        if timeout(DRAIN_TIMEOUT, hub.writes.drained()).await.is_err() {
            tracing::warn!("writes are cut off that did not end in time; their senders send them again");
        }
        drop(writing);
        if timeout(DRAIN_TIMEOUT, judging).await.is_err() {
            tracing::warn!("the last verdicts are not written: the database does not answer");
        }
        hub.cache.flushed().await;
        hub.store.close().await;
        ended
    }
}

/// Serving goes on without Redis; so that a wrong setting is not taken for an outage, what is wrong is told at the start.
async fn tell_what_redis_is(mut client: RedisClient) {
    if let Err(what_is_wrong) = client.check().await {
        let sentence = format!("Redis {what_is_wrong}; the proxy serves without it, reading from Postgres");
        let problem = Problem::new(Code::RedisUnreachable, sentence);
        tracing::warn!(%problem, "Redis is of no use yet");
    }
}

/// Returns when another proxy has taken the database, with what to do about it.
async fn keep_claim(hub: &Hub, mut claim: Option<Claim>) -> Problem {
    loop {
        match &mut claim {
            None => std::future::pending().await,
            Some(claim) => claim.lost().await,
        }
        claim = loop {
            match hub.store.claim_single_proxy().await {
                Ok(claim) => break Some(claim),
                Err(problem) if problem.code == Code::SecondProxy => return problem,
                Err(_) => sleep(PROBE_INTERVAL).await,
            }
        };
        // Another proxy may have written in between.
        hub.cache.distrust();
    }
}

fn failed(error: &tonic::transport::Error) -> Problem {
    Problem::new(Code::Internal, format!("serving failed: {error}"))
}

/// The master keys; with an embedded database a first one is made where there is none.
pub(crate) fn load_keyring(connection: &Connection, file: &Path) -> Result<Keyring, Problem> {
    match connection {
        Connection::Embedded(_) => Keyring::load_or_create(file),
        Connection::Url(_) => Keyring::load(file),
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Problem> {
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Problem::new(
            Code::PortInUse,
            format!("another program listens on {address}: stop it, or set another port"),
        ),
        _ => Problem::new(
            Code::BadValue,
            format!("{address} cannot be listened on ({error}): check bind_address and port"),
        ),
    })
}

fn server(admission: &Admission) -> Server {
    Server::builder()
        .timeout(admission.request_timeout)
        .max_concurrent_streams(admission.streams_per_connection_max)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
        .http2_max_local_error_reset_streams(Some(RESET_STREAMS_MAX))
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
}

fn add_reflection(routes: &mut RoutesBuilder) -> Result<(), Problem> {
    // The protos also describe what this version does not serve: only what is served is listed.
    let builder = || {
        Ingress::SERVICES
            .into_iter()
            .chain(["grpc.health.v1.Health"])
            .fold(Builder::configure(), Builder::with_service_name)
            .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error| {
        Problem::new(
            Code::Internal,
            format!("the descriptors of this build are broken: {error}"),
        )
    };
    routes.add_service(builder().build_v1().map_err(broken)?);
    // Older tools ask for this one.
    routes.add_service(builder().build_v1alpha().map_err(broken)?);
    Ok(())
}

/// Says SERVING only while the database answers.
async fn probe(hub: Arc<Hub>, health: HealthReporter, ready: Ready) {
    let mut ticks = interval(PROBE_INTERVAL);
    let mut answered = None;
    let mut marks = Marks::default();
    loop {
        ticks.tick().await;
        let asked = timeout(PROBE_INTERVAL, hub.store.pulse()).await;
        let answers = match asked {
            Ok(Ok((timeline, edits))) => {
                hub.hear_timeline(timeline);
                if marks.is_cache_behind(timeline, edits) {
                    hub.cache.distrust();
                }
                true
            }
            Ok(Err(_)) | Err(_) => false,
        };
        ready.store(answers, Ordering::Relaxed);
        if answered.replace(answers) != Some(answers) {
            report(
                &health,
                if answers {
                    ServingStatus::Serving
                } else {
                    ServingStatus::NotServing
                },
            )
            .await;
            tracing::info!(answers, "whether the database answers");
        }
    }
}

async fn report(health: &HealthReporter, status: ServingStatus) {
    // The empty name stands for the whole server.
    for service in [""].into_iter().chain(Ingress::SERVICES) {
        health.set_service_status(service, status).await;
    }
}

/// Keeps the time that the hub is away from counting towards the end of leases.
async fn note_alive(store: Store) {
    let mut ticks = interval(store.leases().alive_interval());
    loop {
        ticks.tick().await;
        match store.note_alive().await {
            Ok(Some(away)) => tracing::warn!(?away, "the hub was away: leases that ran then are longer by that time"),
            Ok(None) => {}
            // Told by the probe.
            Err(problem) => tracing::debug!(%problem, "it could not be noted that the hub serves"),
        }
    }
}

/// Keeps the history of what hosts report.
async fn record_metrics(store: Store) {
    let mut ticks = interval(METRICS_INTERVAL);
    loop {
        ticks.tick().await;
        if let Err(problem) = store.record_metrics().await {
            tracing::debug!(%problem, "what hosts report could not be recorded");
        }
    }
}

async fn maintain(store: Store) {
    let mut ticks = interval(MAINTENANCE_INTERVAL);
    loop {
        ticks.tick().await;
        match store.maintain().await {
            Ok(done) => tracing::debug!(?done, "maintenance done"),
            Err(problem) => tracing::warn!(%problem, "maintenance failed; it is tried again in an hour"),
        }
    }
}

#[cfg(all(test, feature = "embedded"))]
mod tests;
