//! Postgres inside this process, for trying things out and for a hub of one machine.
//!
//! It serves one connection at a time, so that all lanes share one. What it commits it hands to the operating system,
//! without waiting for the disk: killing the process loses nothing. Against a power failure the store asks the operating
//! system itself to write the data directory's file system back, after each commit and before it is told of. That is
//! done on Linux alone; a hub that has to keep its world runs a Postgres of its own.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use deadpool_postgres::Connect;
use futures::{FutureExt, future::BoxFuture};
use p2p_sync_proto::{Code, Problem};
use pglite_oxide::{PgliteServer, extensions};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_postgres::{Client, Config, NoTls};

pub(super) struct Engine {
    directory: PathBuf,
    /// Short and in a folder of its own, for a socket's path has at most some 100 bytes.
    sockets: tempfile::TempDir,
    /// A std mutex: it is held for as long as the engine starts or stops, always on a blocking thread.
    server: Mutex<Option<PgliteServer>>,
}

impl Engine {
    /// Starts the engine, making its data directory where there is none (`DATA_DIRECTORY_IN_USE`,
    /// `DATABASE_UNREACHABLE`).
    pub(super) async fn start(directory: &Path) -> Result<Arc<Self>, Problem> {
        let sockets = tempfile::Builder::new()
            .prefix("p2p-sync-")
            .tempdir()
            .map_err(|error| not_started(directory, &error.to_string()))?;
        let engine = Arc::new(Self {
            directory: directory.to_owned(),
            sockets,
            server: Mutex::new(None),
        });
        engine.clone().blocking(Self::restart).await?;
        Ok(engine)
    }

    pub(super) fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .user("postgres")
            .dbname("postgres")
            .host_path(self.sockets.path());
        config
    }

    pub(super) fn connector(self: &Arc<Self>) -> Connector {
        Connector(self.clone())
    }

    /// Waits until what was committed is on the disk.
    pub(super) async fn make_durable(self: &Arc<Self>) -> Result<(), Problem> {
        self.clone().blocking(Self::sync).await
    }

    /// Stops the engine; it can take a moment until its last client is gone.
    pub(super) async fn stop(self: &Arc<Self>) {
        let stopped = self.clone().blocking(|engine| {
            drop(engine.server.lock().unwrap_or_else(PoisonError::into_inner).take());
            Ok(())
        });
        if let Err(problem) = stopped.await {
            tracing::warn!(%problem, "the embedded Postgres did not stop");
        }
    }

    async fn blocking(self: Arc<Self>, work: fn(&Self) -> Result<(), Problem>) -> Result<(), Problem> {
        spawn_blocking(move || work(&self)).await.unwrap_or_else(|error| {
            Err(Problem::new(
                Code::Internal,
                format!("the embedded Postgres panicked ({error})"),
            ))
        })
    }

    fn restart(&self) -> Result<(), Problem> {
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        drop(server.take());
        let started = PgliteServer::builder()
            .path(&self.directory)
            .extension(extensions::VECTOR)
            .postgres_config("max_replication_slots", "0")
            .unix(self.sockets.path().join(".s.PGSQL.5432"))
            .start()
            .map_err(|error| not_started(&self.directory, &format!("{error:#}")))?;
        *server = Some(started);
        Ok(())
    }

    #[cfg(target_os = "linux")]
    fn sync(&self) -> Result<(), Problem> {
        let written = std::fs::File::open(&self.directory).and_then(|directory| Ok(rustix::fs::syncfs(directory)?));
        written.map_err(|error| {
            tracing::error!(%error, directory = %self.directory.display(), "cannot write the data directory back");
            super::not_answering()
        })
    }

    /// Other systems have no call that writes a whole file system back.
    #[cfg(not(target_os = "linux"))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn sync(&self) -> Result<(), Problem> {
        Ok(())
    }
}

impl Drop for Engine {
    /// The engine ends when its last client is gone, which this thread may have to see to.
    fn drop(&mut self) {
        if let Some(server) = self.server.lock().unwrap_or_else(PoisonError::into_inner).take() {
            std::thread::spawn(move || drop(server));
        }
    }
}

/// Connects to the engine, and starts it again where it has ended.
pub(super) struct Connector(Arc<Engine>);

impl Connect for Connector {
    fn connect(&self, config: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        let config = config.clone();
        async move {
            if let Ok(connected) = connect(&config).await {
                return Ok(connected);
            }
            tracing::warn!("the embedded Postgres does not answer; it is started again");
            if let Err(problem) = self.0.clone().blocking(Engine::restart).await {
                tracing::error!(%problem, "the embedded Postgres did not start again");
            }
            connect(&config).await
        }
        .boxed()
    }
}

async fn connect(config: &Config) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::warn!(%error, "the connection to the embedded Postgres ended");
        }
    });
    Ok((client, task))
}

fn not_started(directory: &Path, reason: &str) -> Problem {
    let directory = directory.display();
    if reason.contains("already in use") {
        return Problem::new(
            Code::DataDirectoryInUse,
            format!("another proxy uses the data directory {directory}: stop it, or choose another directory"),
        );
    }
    Problem::new(
        Code::DatabaseUnreachable,
        format!(
            "the embedded Postgres in {directory} does not start ({reason}): check that the directory can be written"
        ),
    )
}
