//! Which of the servers that the connection string names is the primary.
//!
//! Each new connection looks anew, so that after a failover the pools come to the new primary by themselves. A server that takes
//! no writes is passed over. A former primary that came back as if nothing had happened would take them: it is told by
//! the timeline of Postgres' own log, which a promotion raises: of those that answer the latest is taken, and none that is older
//! than one that this process has seen. Connections to a server that is left are cut.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use deadpool_postgres::Connect;
use futures::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    task::{AbortHandle, JoinHandle},
    time::timeout_at,
};
use tokio_postgres::{Client, Config, Error, NoTls, config::Host};

/// Of the cluster, and of its log: of two servers of one cluster the one with the later timeline was promoted last. Asked of
/// servers that take writes alone.
const SERVER: &str = "SELECT (SELECT system_identifier FROM pg_control_system()), \
    ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint";

/// How long the others are waited for when one has answered: a dead one may say nothing at all.
const LOOK_AROUND: Duration = Duration::from_millis(500);

/// What all pools know of the servers.
#[derive(Debug)]
pub(super) struct Primary {
    servers: Vec<Config>,
    // A std mutex: held to compare and to replace, never across an await.
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    latest: Option<Server>,
    /// Connections made before are of no more use.
    left_at: Option<Instant>,
    /// All that are open, as far as is known, with the server that each was made to.
    open: Vec<(Server, AbortHandle)>,
}

impl Seen {
    /// Ends connections at once, with whatever waits for an answer on them: a commit that waits for a standby would wait for
    /// good where that one was promoted. Whoever waits sees a connection that broke, and asks again elsewhere.
    fn cut(&mut self, is_over: impl Fn(Server) -> bool) {
        self.open.retain(|(server, task)| {
            let is_over = is_over(*server);
            if is_over {
                task.abort();
            }
            !is_over && !task.is_finished()
        });
    }
}

/// A server that takes writes, as it was when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Server {
    cluster: i64,
    timeline: i64,
}

impl Server {
    async fn ask(client: &Client) -> Result<Self, Error> {
        let row = client.query_one(SERVER, &[]).await?;
        Ok(Self {
            cluster: row.get(0),
            timeline: row.get(1),
        })
    }

    /// Whether the other one was promoted after this one. Of another cluster nothing is known.
    fn is_overtaken_by(self, other: Self) -> bool {
        self.cluster == other.cluster && self.timeline < other.timeline
    }
}

impl Primary {
    pub(super) fn among(config: &Config) -> Self {
        Self {
            servers: each_alone(config),
            seen: Mutex::default(),
        }
    }

    /// Connections that were made before now are cut: the server takes no writes any more.
    pub(super) fn leave(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.left_at = Some(Instant::now());
        seen.cut(|_| true);
    }

    pub(super) fn has_left(&self, connected_at: Instant) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.left_at.is_some_and(|left_at| connected_at <= left_at)
    }

    /// Whether the server of a new connection is the primary, as far as this process knows.
    pub(super) async fn is(&self, client: &Client) -> Result<bool, Error> {
        let server = Server::ask(client).await?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.latest.is_some_and(|latest| server.is_overtaken_by(latest)) {
            return Ok(false);
        }
        seen.latest = Some(server);
        seen.cut(|other| other.is_overtaken_by(server));
        Ok(true)
    }

    /// A connection to the server that was promoted last, of those that answer and take writes.
    pub(super) async fn connect(&self, application_name: &str) -> Result<(Client, JoinHandle<()>), Error> {
        let mut asked: FuturesUnordered<_> = self
            .servers
            .iter()
            .enumerate()
            .map(|(number, server)| reach(number, server, application_name))
            .collect();
        let mut best: Option<Reached> = None;
        let mut failed = None;
        let mut until = None;
        loop {
            let next = match until {
                None => asked.next().await,
                Some(until) => timeout_at(until, asked.next()).await.unwrap_or(None),
            };
            match next {
                None => break,
                Some(Err(error)) => failed = Some(error),
                Some(Ok(reached)) => {
                    until = until.or_else(|| Some(tokio::time::Instant::now() + LOOK_AROUND));
                    if best.as_ref().is_none_or(|best| reached.goes_before(best)) {
                        best = Some(reached);
                    }
                }
            }
        }
        match (best, failed) {
            (Some(best), _) => {
                let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.cut(|_| false);
                seen.open.push((best.server, best.task.abort_handle()));
                Ok((best.client, best.task))
            }
            (None, Some(error)) => Err(error),
            // Where no server is named, that is the error.
            (None, None) => {
                let nowhere = Config::new().connect(NoTls).await;
                nowhere.map(|(client, _)| (client, tokio::spawn(async {})))
            }
        }
    }
}

/// A connection to a server that takes writes, by its number in the connection string.
struct Reached {
    number: usize,
    server: Server,
    client: Client,
    task: JoinHandle<()>,
}

impl Reached {
    /// Servers of different clusters do not compare: then the one that is named first.
    fn goes_before(&self, other: &Self) -> bool {
        other.server.is_overtaken_by(self.server)
            || self.server.cluster != other.server.cluster && self.number < other.number
    }
}

/// Connects to one server, unless it takes no writes.
async fn reach(number: usize, config: &Config, application_name: &str) -> Result<Reached, Error> {
    let mut config = config.clone();
    config.application_name(application_name);
    let (client, connection) = config.connect(NoTls).await?;
    let task = tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::warn!(%error, "a connection to Postgres broke");
        }
    });
    let server = Server::ask(&client).await?;
    Ok(Reached {
        number,
        server,
        client,
        task,
    })
}

/// A pool's way to connect.
pub(super) struct ToPrimary {
    pub(super) primary: Arc<Primary>,
    pub(super) application_name: String,
}

impl Connect for ToPrimary {
    fn connect(
        &self,
        _: &Config,
    ) -> Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), Error>> + Send + '_>> {
        Box::pin(self.primary.connect(&self.application_name))
    }
}

/// The settings of each server by itself, in the order in which they are named.
fn each_alone(config: &Config) -> Vec<Config> {
    let (hosts, ports) = (config.get_hosts(), config.get_ports());
    let count = hosts.len().max(config.get_hostaddrs().len());
    let one = |number: usize| {
        let mut one = Config::new();
        match hosts.get(number) {
            Some(Host::Tcp(name)) => _ = one.host(name),
            #[cfg(unix)]
            Some(Host::Unix(path)) => _ = one.host_path(path),
            None => {}
        }
        if let Some(address) = config.get_hostaddrs().get(number) {
            one.hostaddr(*address);
        }
        // One port is meant for all.
        if let Some(port) = ports.get(number).or(ports.first().filter(|_| ports.len() == 1)) {
            one.port(*port);
        }
        if let Some(user) = config.get_user() {
            one.user(user);
        }
        if let Some(password) = config.get_password() {
            one.password(password);
        }
        if let Some(name) = config.get_dbname() {
            one.dbname(name);
        }
        if let Some(options) = config.get_options() {
            one.options(options);
        }
        if let Some(timeout) = config.get_connect_timeout() {
            one.connect_timeout(*timeout);
        }
        if let Some(timeout) = config.get_tcp_user_timeout() {
            one.tcp_user_timeout(*timeout);
        }
        one.ssl_mode(config.get_ssl_mode())
            .channel_binding(config.get_channel_binding())
            .target_session_attrs(config.get_target_session_attrs())
            .keepalives(config.get_keepalives())
            .keepalives_idle(config.get_keepalives_idle());
        one
    };
    (0..count).map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::str::FromStr as _;

    use super::*;

    #[test]
    fn each_server_is_asked_by_itself_with_what_is_said_of_all() {
        let config = Config::from_str("postgres://u:p@a:1,b:2/d?target_session_attrs=read-write&connect_timeout=3");
        let alone = each_alone(&config.expect("valid"));
        let said: Vec<_> = alone.iter().map(|one| (one.get_hosts(), one.get_ports())).collect();
        let [a, b] = ["a", "b"].map(|name| [Host::Tcp(name.to_owned())]);
        assert_eq!(said, [(&a[..], &[1][..]), (&b[..], &[2][..])]);
        for one in &alone {
            assert_eq!(
                (one.get_user(), one.get_password(), one.get_dbname()),
                (Some("u"), Some(&b"p"[..]), Some("d"))
            );
            assert_eq!(
                one.get_target_session_attrs(),
                tokio_postgres::config::TargetSessionAttrs::ReadWrite
            );
        }
        let one_port = Config::from_str("host=a,b port=7 user=u").expect("valid");
        assert_eq!(each_alone(&one_port)[1].get_ports(), [7]);
    }

    #[test]
    fn a_server_is_overtaken_by_a_later_timeline_of_its_own_cluster_alone() {
        let server = |cluster, timeline| Server { cluster, timeline };
        assert!(server(1, 1).is_overtaken_by(server(1, 2)));
        assert!(!server(1, 2).is_overtaken_by(server(1, 2)));
        assert!(!server(1, 1).is_overtaken_by(server(2, 2)), "a database that was moved");
    }
}
