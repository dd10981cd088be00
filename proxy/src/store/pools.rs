//! The connections: one pool a lane, one for what hosts ask, one for what the hub asks for itself and one for what it reads of
//! streams for all subscribers, so that none waits for another's.

use std::{str::FromStr, sync::Arc, time::Duration};

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime};
use p2p_sync_proto::{Code, Problem};
use tokio_postgres::config::{SslMode, TargetSessionAttrs};

use super::{
    Connection, Hnsw, StoreConfig,
    primary::{Primary, ToPrimary},
};
use crate::secret::Secret;

/// Reads are short, and critical messages go before them.
const READ_CONNECTIONS: usize = 4;
/// What the hub asks for itself takes no longer than a look at one row.
const OWN_CONNECTIONS: usize = 2;
/// One embeds what waits, the others search.
const EMBEDDING_CONNECTIONS: usize = 4;
/// Each stream is read once for all who follow it.
const STREAM_CONNECTIONS: usize = 2;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The embedded engine starts within it, and recovers after a kill, also on a busy machine.
const CREATE_TIMEOUT: Duration = Duration::from_mins(1);
/// A peer that vanished without a word is noticed after this long.
const SILENCE_MAX: Duration = Duration::from_secs(20);

pub(super) struct Pools {
    critical: Pool,
    bulk: Pool,
    reads: Pool,
    own: Pool,
    embeddings: Pool,
    streams: Pool,
    /// Absent where the database lives in this process.
    pub(super) primary: Option<Arc<Primary>>,
    #[cfg(feature = "embedded")]
    engine: Option<std::sync::Arc<super::embedded::Engine>>,
}

// Without an engine there is nothing to start, to wait for or to stop.
#[cfg_attr(not(feature = "embedded"), allow(clippy::unused_async, clippy::unused_self))]
impl Pools {
    pub(super) async fn open(config: &StoreConfig) -> Result<Self, Problem> {
        match &config.connection {
            Connection::Url(url) => Self::open_server(config, url),
            Connection::Embedded(directory) => Self::open_embedded(config, directory).await,
        }
    }

    fn open_server(config: &StoreConfig, url: &Secret) -> Result<Self, Problem> {
        let mut server = parse_url(url)
            .map_err(|what_to_do| Problem::new(Code::BadValue, format!("pg_connection_string: {what_to_do}")))?;
        server
            .connect_timeout(CONNECT_TIMEOUT)
            .keepalives_idle(SILENCE_MAX / 2)
            .tcp_user_timeout(SILENCE_MAX);
        let primary = Arc::new(Primary::among(&server));
        let manager = |name: &str| {
            let to_primary = ToPrimary {
                primary: Arc::clone(&primary),
                application_name: format!("p2p-sync-proxy {name}"),
            };
            // Asks the connection's own task whether it still runs, without a round trip: Postgres announces its end. What
            // breaks between that and its use fails one message, which is sent again.
            Manager::from_connect(
                server.clone(),
                to_primary,
                ManagerConfig {
                    recycling_method: RecyclingMethod::Fast,
                },
            )
        };
        let of = |name: &str, size: usize, timeout: Duration, plans: &str| {
            pool(manager(name), size, timeout, plans, Some(&primary))
        };
        let (timeout, bulk_timeout) = (config.statement_timeout, config.bulk_statement_timeout);
        let by_filter = format!("{BY_FILTER}; {}", searching(config.hnsw));
        Ok(Self {
            critical: of("critical", config.critical_connections, timeout, BY_INDEX)?,
            bulk: of("bulk", config.bulk_connections, bulk_timeout, BY_INDEX)?,
            reads: of("reads", READ_CONNECTIONS, timeout, BY_INDEX)?,
            own: of("own", OWN_CONNECTIONS, timeout, BY_INDEX)?,
            embeddings: of("embeddings", EMBEDDING_CONNECTIONS, bulk_timeout, &by_filter)?,
            streams: of("streams", STREAM_CONNECTIONS, timeout, BY_INDEX)?,
            primary: Some(primary),
            #[cfg(feature = "embedded")]
            engine: None,
        })
    }

    #[cfg(feature = "embedded")]
    async fn open_embedded(config: &StoreConfig, directory: &std::path::Path) -> Result<Self, Problem> {
        let engine = super::embedded::Engine::start(directory).await?;
        let server = engine.config();
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_connect(server.clone(), engine.connector(), recycling);
        let plans = format!("{BY_INDEX}; {}", searching(config.hnsw));
        let only = pool(manager, 1, config.bulk_statement_timeout, &plans, None)?;
        Ok(Self {
            critical: only.clone(),
            bulk: only.clone(),
            reads: only.clone(),
            own: only.clone(),
            embeddings: only.clone(),
            streams: only,
            primary: None,
            engine: Some(engine),
        })
    }

    #[cfg(not(feature = "embedded"))]
    async fn open_embedded(_: &StoreConfig, _: &std::path::Path) -> Result<Self, Problem> {
        Err(Problem::new(
            Code::MissingValue,
            "this build has no Postgres of its own: set pg_connection_string, or build with the feature `embedded`",
        ))
    }

    pub(super) async fn critical(&self) -> Result<Object, PoolError> {
        self.critical.get().await
    }

    pub(super) async fn bulk(&self) -> Result<Object, PoolError> {
        self.bulk.get().await
    }

    pub(super) async fn reads(&self) -> Result<Object, PoolError> {
        self.reads.get().await
    }

    /// For who a host is, that the hub serves, and what was found: hosts that ask a lot hold none of that up.
    pub(super) async fn own(&self) -> Result<Object, PoolError> {
        self.own.get().await
    }

    /// For vectors, whose searches may take long: what is synced waits for none of them.
    pub(super) async fn embeddings(&self) -> Result<Object, PoolError> {
        self.embeddings.get().await
    }

    /// For what is read of streams for all who follow them.
    pub(super) async fn streams(&self) -> Result<Object, PoolError> {
        self.streams.get().await
    }

    /// The server takes no writes any more: all connections are made anew, to one that does.
    pub(super) fn leave_server(&self) {
        if let Some(primary) = &self.primary {
            tracing::warn!("Postgres takes no writes: a server that does is looked for");
            primary.leave();
        }
    }

    /// Whether the database lives in this process, so that no other proxy can use it.
    pub(super) fn is_embedded(&self) -> bool {
        #[cfg(feature = "embedded")]
        return self.engine.is_some();
        #[cfg(not(feature = "embedded"))]
        false
    }

    /// To be called after a commit and before it is told of: a server does that itself, the embedded engine does not.
    pub(super) async fn make_durable(&self) -> Result<(), Problem> {
        #[cfg(feature = "embedded")]
        if let Some(engine) = &self.engine {
            return engine.make_durable().await;
        }
        Ok(())
    }

    pub(super) async fn close(&self) {
        let pools = [
            &self.critical,
            &self.bulk,
            &self.reads,
            &self.own,
            &self.embeddings,
            &self.streams,
        ];
        for pool in pools {
            pool.close();
        }
        #[cfg(feature = "embedded")]
        if let Some(engine) = &self.engine {
            engine.stop().await;
        }
    }
}

/// Reads a connection string; the error says what to do, and never what was written: it may be a password.
pub fn parse_url(url: &Secret) -> Result<tokio_postgres::Config, &'static str> {
    let mut server = tokio_postgres::Config::from_str(url.expose()).map_err(|_| {
        "expected key=value pairs that Postgres knows, e.g. host=/run/postgresql dbname=p2p_sync user=p2p_sync, or a URL; \
         put values with spaces into single quotes, and leave sslmode out"
    })?;
    if server.get_ssl_mode() == SslMode::Require {
        return Err(
            "the proxy reaches Postgres without TLS: leave sslmode out, and use a Unix socket, loopback or a tunnel",
        );
    }
    if server.get_target_session_attrs() == TargetSessionAttrs::ReadOnly {
        return Err(
            "the proxy writes: leave target_session_attrs out, of several servers it finds the one that takes writes",
        );
    }
    server.target_session_attrs(TargetSessionAttrs::ReadWrite);
    Ok(server)
}

/// Plans are made once a connection and by index: the tables may be empty when that happens, and large an hour later.
const BY_INDEX: &str = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off";

/// Whether a filter leaves few vectors, to be compared one by one, or many, to be found by their index, says each search.
const BY_FILTER: &str = "SET plan_cache_mode = force_custom_plan";

/// A search goes on until it has found as many as it should that pass its filter, in the order of their distance.
fn searching(hnsw: Hnsw) -> String {
    format!(
        "SET hnsw.ef_search = {}; SET hnsw.iterative_scan = strict_order; SET hnsw.scan_mem_multiplier = 4",
        hnsw.ef_search
    )
}

/// Notes which server it is before anything is read or written there, once there is a schema to note it in.
const NOTE_SERVER: &str = "DO $$ BEGIN IF to_regprocedure('p2p_sync.note_server()') IS NOT NULL THEN \
    PERFORM p2p_sync.note_server(); END IF; END $$";

fn pool(
    manager: Manager,
    size: usize,
    statement_timeout: Duration,
    plans: &str,
    primary: Option<&Arc<Primary>>,
) -> Result<Pool, Problem> {
    let settings = format!(
        "SET statement_timeout = {}; SET jit = off; SET client_min_messages = warning; {plans}",
        statement_timeout.as_millis()
    );
    let (first, later) = (primary.cloned(), primary.cloned());
    let greet = Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
        let (settings, primary) = (settings.clone(), first.clone());
        Box::pin(async move {
            if let Some(primary) = primary
                && !primary.is(client).await.map_err(HookError::Backend)?
            {
                return Err(HookError::message(
                    "a server that takes writes was overtaken by one that was promoted since: shut it down, or make it a standby",
                ));
            }
            client.batch_execute(&settings).await.map_err(HookError::Backend)?;
            client.batch_execute(NOTE_SERVER).await.map_err(HookError::Backend)
        })
    });
    let still_used = Hook::sync_fn(move |_: &mut deadpool_postgres::ClientWrapper, metrics| {
        if later.as_ref().is_some_and(|primary| primary.has_left(metrics.created)) {
            return Err(HookError::message("its server takes no writes any more"));
        }
        Ok(())
    });
    Pool::builder(manager)
        .max_size(size.max(1))
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(statement_timeout.max(CONNECT_TIMEOUT)))
        .create_timeout(Some(CREATE_TIMEOUT))
        .recycle_timeout(Some(CONNECT_TIMEOUT))
        .post_create(greet)
        .pre_recycle(still_used)
        .build()
        .map_err(|error| Problem::new(Code::Internal, format!("the connection pool cannot be made ({error})")))
}
