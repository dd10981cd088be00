//! A master that Sentinels name: asked for when there is no connection, and anew when it breaks or is no master any more.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::FutureExt as _;
use redis::{
    AsyncConnectionConfig, Client, Cmd, Pipeline, RedisError, RedisFuture, RedisResult, Value,
    aio::{ConnectionLike, MultiplexedConnection, PubSub},
    sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType},
};

use super::{CONNECT_TIMEOUT, RESPONSE_TIMEOUT, failed, info, login, within};
use crate::{config::Redis, secret::Secret};

/// To ask the Sentinels and the master they name, of which some may be silent.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(3);
/// After a search that found nothing: until then commands fail at once.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// See the module. Clones share what was found.
#[derive(Clone)]
pub(super) struct Watched(Arc<Inner>);

struct Inner {
    db: i64,
    // A std mutex: held to read and to replace, never across an await.
    found: Mutex<Option<Found>>,
    // Held while the Sentinels are asked, so that one asks for all who wait.
    search: tokio::sync::Mutex<Search>,
}

#[derive(Clone)]
struct Found {
    /// Tells it from those found before.
    number: u64,
    connection: MultiplexedConnection,
}

struct Search {
    sentinels: SentinelClient,
    searches: u64,
    failed_at: Option<Instant>,
}

impl Watched {
    pub(super) fn open(settings: &Redis, master: &str, password: &Secret) -> RedisResult<Self> {
        let of_sentinels = login(password, 0);
        let sentinels = settings.addresses.iter().map(|address| info(address, &of_sentinels));
        let of_master = login(&settings.password, settings.db);
        let sentinels = SentinelClient::build(
            sentinels.collect::<RedisResult<Vec<_>>>()?,
            master.to_owned(),
            Some(SentinelNodeConnectionInfo::default().set_redis_connection_info(of_master)),
            SentinelServerType::Master,
        )?;
        let search = Search {
            sentinels,
            searches: 0,
            failed_at: None,
        };
        Ok(Self(Arc::new(Inner {
            db: settings.db.into(),
            found: Mutex::default(),
            search: search.into(),
        })))
    }

    /// Hears at the master: its replicas hear what it is told, but one that is cut off hears nothing.
    pub(super) async fn hear(&self) -> RedisResult<PubSub> {
        let master = self.0.search.lock().await.master().await?;
        within(CONNECT_TIMEOUT, master.get_async_pubsub()).await
    }

    pub(super) async fn check(&self) -> RedisResult<Result<String, String>> {
        let master = self.0.search.lock().await.master().await?;
        Ok(Ok(format!(
            "ok (the Sentinels name {})",
            master.get_connection_info().addr()
        )))
    }

    fn found(&self) -> MutexGuard<'_, Option<Found>> {
        self.0.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connection(&self) -> RedisResult<Found> {
        if let Some(found) = self.found().clone() {
            return Ok(found);
        }
        let mut search = self.0.search.lock().await;
        if let Some(found) = self.found().clone() {
            return Ok(found);
        }
        if search.failed_at.is_some_and(|at| at.elapsed() < RETRY_DELAY) {
            return Err(failed("the Sentinels name no master that answers"));
        }
        match search.connect().await {
            Ok(found) => {
                *self.found() = Some(found.clone());
                Ok(found)
            }
            Err(error) => {
                search.failed_at = Some(Instant::now());
                Err(error)
            }
        }
    }

    /// Leaves a connection, unless another one was found since.
    fn leave(&self, number: u64) {
        let mut found = self.found();
        if found.as_ref().is_some_and(|found| found.number == number) {
            *found = None;
        }
    }

    async fn command(&self, command: &Cmd) -> RedisResult<Value> {
        let mut found = self.connection().await?;
        let answer = found.connection.send_packed_command(command).await;
        let is_over = match &answer {
            Err(error) => is_over(error),
            Ok(value) => is_no_master(value),
        };
        if is_over {
            self.leave(found.number);
        }
        answer
    }

    async fn commands(&self, commands: &Pipeline, offset: usize, count: usize) -> RedisResult<Vec<Value>> {
        let mut found = self.connection().await?;
        let answers = found.connection.send_packed_commands(commands, offset, count).await;
        let is_over = match &answers {
            Err(error) => is_over(error),
            Ok(values) => values.iter().any(is_no_master),
        };
        if is_over {
            self.leave(found.number);
        }
        answers
    }
}

impl Search {
    /// The one that calls itself master, and that a Sentinel does.
    async fn master(&mut self) -> RedisResult<Client> {
        within(SEARCH_TIMEOUT, self.sentinels.async_get_client()).await
    }

    async fn connect(&mut self) -> RedisResult<Found> {
        let master = self.master().await?;
        let timeouts = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        let connection = master.get_multiplexed_async_connection_with_config(&timeouts).await?;
        self.searches += 1;
        Ok(Found {
            number: self.searches,
            connection,
        })
    }
}

impl ConnectionLike for Watched {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        self.command(cmd).boxed()
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.commands(commands, offset, count).boxed()
    }

    fn get_db(&self) -> i64 {
        self.0.db
    }
}

/// Whether the connection is of no more use. One that does not answer in time may be to a master that is no more.
fn is_over(error: &RedisError) -> bool {
    error.is_unrecoverable_error() || error.is_io_error() || error.code().is_some_and(says_no_master)
}

fn is_no_master(value: &Value) -> bool {
    matches!(value, Value::ServerError(error) if says_no_master(error.code()))
}

fn says_no_master(code: &str) -> bool {
    matches!(code, "READONLY" | "MASTERDOWN" | "LOADING")
}
