//! Redis servers of one's own: one alone, a cluster, a master with a replica and its Sentinels.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use tempfile::TempDir;

use super::process::{Process, as_server, give_to_server, server_dir};
use super::{free_port, variable, wait_until};

/// For servers to find one another, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_mins(1);
/// For one answer, on such a machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// A server cuts its connections when it changes its role.
const TRIES_MAX: usize = 5;
/// Slots that a cluster has.
const SLOTS: usize = 16_384;
/// A node that is silent for so long is failed over.
const NODE_TIMEOUT_MS: &str = "1500";
/// What [`WatchedRedis`]' Sentinels call its master.
const MASTER: &str = "hub";

/// A Redis of one's own that keeps nothing on disk, to kill and to start again. It ends with this value.
pub struct OwnRedis {
    process: Option<Process>,
    port: u16,
    arguments: Vec<String>,
    is_sentinel: bool,
    dir: TempDir,
}

impl OwnRedis {
    /// Starts one.
    pub async fn new() -> Self {
        Self::with(&[]).await
    }

    /// Starts one with these arguments besides.
    pub async fn with(arguments: &[&str]) -> Self {
        Self::of(arguments, false).await
    }

    async fn of(arguments: &[&str], is_sentinel: bool) -> Self {
        let mut redis = Self {
            process: None,
            port: free_port(),
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            is_sentinel,
            dir: server_dir(),
        };
        redis.start().await;
        redis
    }

    /// The `redis://` URL. It stays the same over [`kill`](Self::kill) and [`start`](Self::start).
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Where it listens, as `redis_host` takes it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// A new connection to it.
    pub async fn client(&self) -> MultiplexedConnection {
        self.try_client().await.expect("it serves")
    }

    async fn try_client(&self) -> redis::RedisResult<MultiplexedConnection> {
        let client = redis::Client::open(self.url())?;
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(ANSWER_TIMEOUT))
            .set_response_timeout(Some(ANSWER_TIMEOUT));
        client.get_multiplexed_async_connection_with_config(&patient).await
    }

    /// Kills it with SIGKILL: all it held is lost.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Whether it was started and not killed since.
    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Starts it, empty, on the same port after a [`kill`](Self::kill), and returns when it answers.
    pub async fn start(&mut self) {
        assert!(self.process.is_none(), "this Redis runs already");
        let mut command = as_server(variable("P2P_SYNC_TEST_REDIS_BIN"));
        if self.is_sentinel {
            command.arg(self.file()).arg("--sentinel");
        } else {
            command.args(["--save", "", "--appendonly", "no"]);
        }
        command
            .arg("--port")
            .arg(self.port.to_string())
            .arg("--dir")
            .arg(self.dir.path());
        command
            .args(["--bind", "127.0.0.1", "--daemonize", "no"])
            .args(&self.arguments);
        let client = &redis::Client::open(self.url()).expect("the URL is well formed");
        let answers = |pid: u32| async move {
            let Ok(mut connection) = client.get_multiplexed_async_connection().await else {
                return false;
            };
            let info: Result<String, _> = redis::cmd("INFO").arg("server").query_async(&mut connection).await;
            info.is_ok_and(|info| info.lines().any(|line| line == format!("process_id:{pid}")))
        };
        self.process = Some(Process::start(command, &self.dir.path().join("log"), answers).await);
    }

    /// A Sentinel's file, which it writes what it finds in.
    fn file(&self) -> PathBuf {
        let file = self.dir.path().join("sentinel.conf");
        if !file.exists() {
            fs::write(&file, "").expect("the server's directory is writable");
            give_to_server(&file);
        }
        file
    }

    async fn ask<T: redis::FromRedisValue>(&self, command: &str) -> T {
        let mut words = command.split(' ');
        let mut question = redis::cmd(words.next().expect("a command"));
        question.arg(words.collect::<Vec<_>>());
        for number in 1.. {
            let answer = async { question.query_async(&mut self.try_client().await?).await };
            match answer.await {
                Ok(answer) => return answer,
                Err(error) if number == TRIES_MAX => panic!("{command}: {error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        unreachable!("it answers or panics")
    }

    /// Whether it says all of these in `INFO` or `CLUSTER INFO`.
    async fn says(&self, question: &str, lines: &[&str]) -> bool {
        let info: String = self.ask(question).await;
        lines.iter().all(|line| info.lines().any(|said| said == *line))
    }
}

/// A cluster of masters, each of which holds an equal share of the slots, and may have a replica.
pub struct RedisCluster {
    /// The masters as they were made, then their replicas in the same order.
    pub nodes: Vec<OwnRedis>,
    masters: usize,
}

impl RedisCluster {
    /// Starts one; its return says that all slots are served, and replicated where there are replicas.
    pub async fn new(masters: usize, with_replicas: bool) -> Self {
        let count = if with_replicas { 2 * masters } else { masters };
        let mut nodes = Vec::new();
        let mut bus_ports = Vec::new();
        for _ in 0..count {
            let bus_port = free_port().to_string();
            let arguments = [
                "--cluster-enabled yes --cluster-config-file nodes.conf --cluster-require-full-coverage no",
                "--cluster-replica-validity-factor 0 --repl-diskless-sync-delay 0 --cluster-node-timeout",
                NODE_TIMEOUT_MS,
                "--cluster-port",
                &bus_port,
            ];
            let arguments = arguments.join(" ");
            nodes.push(OwnRedis::with(&arguments.split(' ').collect::<Vec<_>>()).await);
            bus_ports.push(bus_port);
        }
        let cluster = Self { nodes, masters };
        cluster.join(&bus_ports).await;
        cluster
    }

    async fn join(&self, bus_ports: &[String]) {
        let (first, count) = (&self.nodes[0], self.nodes.len());
        for (number, node) in self.nodes.iter().enumerate() {
            let _done: () = node.ask(&format!("CLUSTER SET-CONFIG-EPOCH {}", number + 1)).await;
            if number < self.masters {
                let (from, to) = (SLOTS * number / self.masters, SLOTS * (number + 1) / self.masters - 1);
                let _done: () = node.ask(&format!("CLUSTER ADDSLOTSRANGE {from} {to}")).await;
            }
            let port = node.port;
            let _done: () = first
                .ask(&format!("CLUSTER MEET 127.0.0.1 {port} {}", bus_ports[number]))
                .await;
        }
        let known = format!("cluster_known_nodes:{count}");
        for node in &self.nodes {
            wait_until(PATIENCE, "all nodes know one another", async || {
                node.says("CLUSTER INFO", &["cluster_state:ok", &known, "cluster_slots_ok:16384"])
                    .await
            })
            .await;
        }
        for (number, replica) in self.nodes.iter().enumerate().skip(self.masters) {
            let master: String = self.nodes[number - self.masters].ask("CLUSTER MYID").await;
            let _done: () = replica.ask(&format!("CLUSTER REPLICATE {master}")).await;
            wait_until(PATIENCE, "the replica is in step", async || {
                replica
                    .says("INFO replication", &["role:slave", "master_link_status:up"])
                    .await
            })
            .await;
        }
    }

    /// `redis_mode` and `redis_host` of a hub.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let addresses: Vec<String> = self.nodes.iter().map(OwnRedis::address).collect();
        vec![
            ("redis_mode", "cluster".to_owned()),
            ("redis_host", addresses.join(", ")),
        ]
    }

    /// Which node serves a key now, as the first node that runs says.
    pub async fn holder_of(&self, key: &str) -> usize {
        let one = self.nodes.iter().find(|node| node.runs()).expect("one of them runs");
        let slot: u16 = one.ask(&format!("CLUSTER KEYSLOT {key}")).await;
        let nodes: String = one.ask("CLUSTER NODES").await;
        let holds = |range: &&str| {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            matches!((from.parse::<u16>(), to.parse::<u16>()), (Ok(from), Ok(to)) if (from..=to).contains(&slot))
        };
        let of = |line: &str| -> Option<u16> {
            let mut fields = line.split(' ');
            let address = fields.nth(1)?;
            fields.skip(6).find(|range| holds(range))?;
            address.split('@').next()?.rsplit_once(':')?.1.parse().ok()
        };
        let port = nodes.lines().find_map(of).expect("somebody has the slot");
        let held_by = self.nodes.iter().position(|node| node.port == port);
        held_by.expect("it is of this cluster")
    }

    /// Waits until another node serves the slots of a master that was killed.
    pub async fn failed_over(&self, key: &str, from: usize) {
        wait_until(PATIENCE, "a replica has taken the master's place", async || {
            self.holder_of(key).await != from
        })
        .await;
    }
}

/// A master with a replica, and three Sentinels, of which two have to agree.
pub struct WatchedRedis {
    /// The master, and its replica.
    pub servers: [OwnRedis; 2],
    sentinels: Vec<OwnRedis>,
}

impl WatchedRedis {
    /// Starts them; its return says that the replica is in step and that the Sentinels know it and one another.
    pub async fn new() -> Self {
        let master = OwnRedis::with(&["--repl-diskless-sync-delay", "0"]).await;
        let port = master.port.to_string();
        let replica = OwnRedis::with(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]).await;
        wait_until(PATIENCE, "the replica is in step", async || {
            replica.says("INFO replication", &["master_link_status:up"]).await
        })
        .await;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            let sentinel = OwnRedis::of(&[], true).await;
            for command in [
                format!("SENTINEL MONITOR {MASTER} 127.0.0.1 {port} 2"),
                format!("SENTINEL SET {MASTER} down-after-milliseconds 1500"),
                format!("SENTINEL SET {MASTER} failover-timeout 3000"),
            ] {
                let _done: () = sentinel.ask(&command).await;
            }
            sentinels.push(sentinel);
        }
        let known = format!("slaves=1,sentinels={}", sentinels.len());
        for sentinel in &sentinels {
            wait_until(PATIENCE, "the Sentinels know one another and the replica", async || {
                let info: String = sentinel.ask("INFO sentinel").await;
                info.contains(&known)
            })
            .await;
        }
        Self {
            servers: [master, replica],
            sentinels,
        }
    }

    /// `redis_mode`, `redis_host` and `redis_sentinel_master` of a hub.
    pub fn settings(&self) -> Vec<(&'static str, String)> {
        let addresses: Vec<String> = self.sentinels.iter().map(OwnRedis::address).collect();
        vec![
            ("redis_mode", "sentinel".to_owned()),
            ("redis_host", addresses.join(", ")),
            ("redis_sentinel_master", MASTER.to_owned()),
        ]
    }

    /// Which of the two the Sentinels name.
    pub async fn master(&self) -> usize {
        let question = format!("SENTINEL GET-MASTER-ADDR-BY-NAME {MASTER}");
        let (_host, port): (String, u16) = self.sentinels[0].ask(&question).await;
        let named = self.servers.iter().position(|server| server.port == port);
        named.expect("it is one of the two")
    }

    /// Waits until the Sentinels name another master, and it takes writes.
    pub async fn failed_over(&self, from: usize) {
        wait_until(PATIENCE, "the replica has taken the master's place", async || {
            self.master().await != from && self.servers[1 - from].says("INFO replication", &["role:master"]).await
        })
        .await;
    }

    /// Waits until a server that came back follows the other one.
    pub async fn in_step(&self, server: usize) {
        wait_until(PATIENCE, "the server follows the new master", async || {
            let lines = ["role:slave", "master_link_status:up"];
            self.servers[server].says("INFO replication", &lines).await
        })
        .await;
    }
}
