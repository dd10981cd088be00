//! Real servers for tests: databases on the shared Postgres, and Postgres and Redis servers of one's own to kill.
//!
//! `tests/run` provides the binaries and the shared servers, and names them in the environment. Linux only: what a
//! server has forked is found in `/proc`.

mod process;
mod redis;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, fs, io, iter, thread};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

pub use self::redis::{OwnRedis, RedisCluster, WatchedRedis};
use process::{Process, as_server, give_to_server, server_dir};

const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// For a standby to find its primary, on a machine that is busy with other things.
const SERVERS_MEET_WITHIN: Duration = Duration::from_mins(1);

/// Asks `probe` every 10 ms until it answers true, and panics with `what` when `deadline` passes first, be it within
/// a call of `probe`.
pub async fn wait_until(deadline: Duration, what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !probe().await {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    assert!(
        tokio::time::timeout(deadline, holds).await.is_ok(),
        "not so within {deadline:?}: {what}"
    );
}

/// A loopback port that nobody listens on now, for a server that may come back on it later.
///
/// It is below the range that Linux gives to outgoing connections. A client that tries a port of that range again and
/// again while its server is down is at some time given that very port, connects to itself, and keeps the server out.
pub fn free_port() -> u16 {
    iter::repeat_with(|| fastrand::u16(10_000..32_768))
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok())
        .expect("the iterator has no end")
}

/// The `redis://` URL of the Redis that all tests share: keys and channels need names of their own.
pub fn shared_redis_url() -> String {
    variable("P2P_SYNC_TEST_REDIS")
}

/// Creates an empty database on the Postgres that all tests share.
pub async fn database() -> Database {
    database_on(&variable("P2P_SYNC_TEST_PG")).await
}

/// As [`database`], on another Postgres, by the URL of a superuser.
pub async fn database_on(admin_url: &str) -> Database {
    let name = format!("p2p_sync_test_{}", Uuid::new_v4().simple());
    let url = with_database(admin_url, &name);
    // Nobody can be connected to template0, which would make the server refuse.
    let create = format!("create database {name} template template0");
    connect(admin_url)
        .await
        .batch_execute(&create)
        .await
        .expect("a superuser can create a database");
    Database {
        name,
        url,
        admin_url: admin_url.to_owned(),
    }
}

/// An empty database of its own for one test, dropped with this value, whoever is still connected to it.
pub struct Database {
    name: String,
    url: String,
    admin_url: String,
}

impl Database {
    /// The `postgres://` URL of this database, as a superuser.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A new connection to it.
    pub async fn client(&self) -> Client {
        connect(&self.url).await
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let admin_url = self.admin_url.clone();
        let statement = format!("drop database {} with (force)", self.name);
        // A thread, because a drop cannot wait in the test's own runtime.
        let dropped = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                try_connect(&admin_url)
                    .await?
                    .batch_execute(&statement)
                    .await
                    .map_err(io::Error::other)
            })
        })
        .join();
        if !matches!(dropped, Ok(Ok(()))) {
            eprintln!(
                "The test database {} could not be dropped and is left on the server.",
                self.name
            );
        }
    }
}

/// How an [`OwnPostgres`] differs from the default.
#[derive(Clone, Debug, Default)]
pub struct PostgresOptions {
    /// 16 or 18; `None` is what `tests/run` was told to use.
    pub major: Option<u16>,
    /// An existing directory to keep the data in, such as a small tmpfs. The user `nobody` must be able to reach it.
    /// What is put there stays. `None` is a temporary directory.
    pub data_parent: Option<PathBuf>,
    /// Settings of `postgresql.conf`, as name and value.
    pub settings: Vec<(&'static str, &'static str)>,
}

/// A Postgres of one's own with pgvector and `fsync` on, to kill and to start again. It ends with this value.
pub struct OwnPostgres {
    process: Option<Process>,
    bin: PathBuf,
    data: PathBuf,
    port: u16,
    url: String,
    settings: Vec<(&'static str, &'static str)>,
    dir: TempDir,
}

impl OwnPostgres {
    /// Creates a cluster with the default options and starts it.
    pub async fn new() -> Self {
        Self::with(PostgresOptions::default()).await
    }

    /// Creates a cluster and starts it.
    pub async fn with(options: PostgresOptions) -> Self {
        let bin = PathBuf::from(match options.major {
            None => variable("P2P_SYNC_TEST_PG_BIN"),
            Some(major) => variable(&format!("P2P_SYNC_TEST_PG_BIN_{major}")),
        });
        let dir = server_dir();
        let data = options.data_parent.as_deref().unwrap_or(dir.path()).join("data");
        fs::create_dir(&data).expect("no other server has its data there");
        give_to_server(&data);
        let password = Uuid::new_v4().simple().to_string();
        init_cluster(&bin, &data, dir.path(), &password).await;
        let port = free_port();
        let url = format!("postgres://postgres:{password}@127.0.0.1:{port}/postgres");
        let mut postgres = Self {
            process: None,
            bin,
            data,
            port,
            url,
            settings: options.settings,
            dir,
        };
        postgres.start().await;
        postgres
    }

    /// Makes a streaming standby of it and starts it; it follows when this returns. It calls itself `standby`, which this one
    /// may name in `synchronous_standby_names`.
    pub async fn standby(&self) -> Self {
        let dir = server_dir();
        let data = dir.path().join("data");
        let mut command = as_server(self.bin.join("pg_basebackup"));
        command
            .arg("-D")
            .arg(&data)
            .arg("-d")
            .arg(format!("{}?application_name=standby", self.url));
        command.args(["-R", "-X", "stream", "-c", "fast", "--no-sync"]);
        finish(command).await;
        let port = free_port();
        let mut standby = Self {
            process: None,
            bin: self.bin.clone(),
            data,
            port,
            url: self.url.replace(&format!(":{}/", self.port), &format!(":{port}/")),
            settings: self.settings.clone(),
            dir,
        };
        standby.start().await;
        wait_until(SERVERS_MEET_WITHIN, "the standby follows", async || {
            let following = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
            self.client()
                .await
                .query_one(following, &[])
                .await
                .expect("valid SQL")
                .get::<_, i64>(0)
                > 0
        })
        .await;
        standby
    }

    /// Makes a standby a primary; it takes writes when this returns.
    pub async fn promote(&self) {
        let promoted = self.client().await.query_one("SELECT pg_promote()", &[]).await;
        assert!(promoted.expect("a standby").get::<_, bool>(0), "it was not promoted");
    }

    /// Changes a setting while it runs; it holds for what comes after this returns.
    pub async fn set(&self, name: &str, value: &str) {
        let client = self.client().await;
        // Also by who is not let write any more.
        client
            .batch_execute("SET default_transaction_read_only = off")
            .await
            .expect("a setting");
        let change = format!("ALTER SYSTEM SET {name} = '{value}'");
        client
            .batch_execute(&change)
            .await
            .expect("a setting that can be changed");
        client
            .batch_execute("SELECT pg_reload_conf()")
            .await
            .expect("a superuser");
        wait_until(SERVERS_MEET_WITHIN, "the setting holds", async || {
            let shown = format!("SELECT current_setting('{name}')");
            self.client()
                .await
                .query_one(&shown, &[])
                .await
                .expect("valid SQL")
                .get::<_, String>(0)
                == value
        })
        .await;
    }

    /// The URL of a hub over several servers, in the order in which they are tried.
    pub fn url_of(servers: &[&Self]) -> String {
        let ports: Vec<String> = servers
            .iter()
            .map(|server| format!("127.0.0.1:{}", server.port))
            .collect();
        let one = servers.first().expect("at least one");
        let url = one.url.replace(&format!("127.0.0.1:{}", one.port), &ports.join(","));
        format!("{url}?target_session_attrs=read-write")
    }

    /// The `postgres://` URL of a superuser. It stays the same over [`kill`](Self::kill) and [`start`](Self::start).
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A new connection to it.
    pub async fn client(&self) -> Client {
        connect(&self.url).await
    }

    /// Ends it at once, without a checkpoint, and starts it again; its return says that recovery is over.
    pub async fn restart(&mut self) {
        self.stop();
        self.start().await;
    }

    /// Kills the postmaster and all it has forked with SIGKILL, and returns when they are gone.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it on the same port and data after a [`kill`](Self::kill), and returns when it answers.
    pub async fn start(&mut self) {
        assert!(self.process.is_none(), "this Postgres runs already");
        let mut command = as_server(self.bin.join("postgres"));
        command.arg("-D").arg(&self.data).arg("-p").arg(self.port.to_string());
        let defaults = [
            ("listen_addresses", "127.0.0.1"),
            ("unix_socket_directories", ""),
            ("max_connections", "200"),
            ("shared_buffers", "32MB"),
        ];
        for (name, value) in defaults.iter().chain(&self.settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let url = &self.url;
        let answers = |_pid| async move { try_connect(url).await.is_ok() };
        self.process = Some(Process::start(command, &self.dir.path().join("log"), answers).await);
    }

    /// An immediate shutdown. Unlike SIGKILL it leaves no shared memory behind.
    fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end(Signal::QUIT);
        }
    }
}

impl Drop for OwnPostgres {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn init_cluster(bin: &Path, data: &Path, dir: &Path, password: &str) {
    let password_file = dir.join("password");
    fs::write(&password_file, password).expect("the server's directory is writable");
    give_to_server(&password_file);
    let mut command = as_server(bin.join("initdb"));
    command.arg("-D").arg(data).arg("--pwfile").arg(password_file);
    command.args([
        "-U",
        "postgres",
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--auth=scram-sha-256",
        "--no-sync",
    ]);
    finish(command).await;
}

/// Runs a program of Postgres' to its end.
async fn finish(mut command: Command) {
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .expect("nothing panics in it");
    let output = output.expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "a program of Postgres' failed: {said}");
}

async fn connect(url: &str) -> Client {
    try_connect(url)
        .await
        .unwrap_or_else(|error| panic!("Postgres cannot be reached: {error}"))
}

async fn try_connect(url: &str) -> io::Result<Client> {
    let connected = tokio::time::timeout(Duration::from_secs(5), tokio_postgres::connect(url, NoTls)).await?;
    let (client, connection) = connected.map_err(io::Error::other)?;
    // It ends when the client is dropped, and tells the client why when the server goes.
    tokio::spawn(connection);
    Ok(client)
}

/// The URL `url` with the database `name` in place of its own.
fn with_database(url: &str, name: &str) -> String {
    let (address, options) = url
        .split_once('?')
        .map_or((url, String::new()), |(a, o)| (a, format!("?{o}")));
    let (scheme, rest) = address
        .split_once("://")
        .expect("P2P_SYNC_TEST_PG is a postgres:// URL");
    let authority = rest.split('/').next().unwrap_or_default();
    format!("{scheme}://{authority}/{name}{options}")
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("{name} is not set. Run tests/run, which provides the servers for tests."))
}
