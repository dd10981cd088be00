//! Two proxies over a Redis of more than one server, of which some die: what Redis has lost costs nobody a write or an update,
//! and the hub finds what took its place by itself.

use std::time::{Duration, Instant};

use futures::StreamExt as _;
use p2p_sync_proto::{
    envelope::Lane,
    v1::{self, RejectCode, pull_reply, pull_request::What},
};
use p2p_sync_tests::{
    services::{OwnPostgres, OwnRedis, RedisCluster, WatchedRedis, wait_until},
    stack::Hub,
    subscriber::{Told, from},
};
use tokio::time::timeout;

use crate::{
    subscribing::{Load, Writer, assert_all_is_told, at, follow, last_of},
    world::{PATIENCE, World, run},
};

/// At each proxy half of them.
const SUBSCRIPTIONS: usize = 10;
/// Some of each node of a cluster of three.
const HOSTS: usize = 12;
/// A cluster or Sentinels take this long to find that a server is dead, and some more to agree, on a busy machine.
const HEALED_WITHIN: Duration = Duration::from_mins(1);

/// For the slowest subscription, on a machine that is busy with other things.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);

/// Two proxies that serve.
struct Two {
    world: World,
    _other: Hub,
    endpoints: [String; 2],
}

impl Two {
    fn over(postgres: &OwnPostgres, settings: &[(&str, String)]) -> Self {
        let mut world = World::of(postgres.url(), settings);
        world.hub.start();
        let mut other = world.another_proxy();
        let endpoints = [world.endpoint(), other.start()];
        Self {
            world,
            _other: other,
            endpoints,
        }
    }

    async fn hosts(&self, count: usize) -> Vec<Writer> {
        let mut hosts = Vec::new();
        for number in 0..count {
            hosts.push(Writer::connect(&self.endpoints[number % 2], &self.world.hub.add_host(1)).await);
        }
        hosts
    }

    /// Panics unless the second proxy listens, at one of these servers, to what the first one commits, and that is published where
    /// another of them is listened to.
    async fn assert_redis_tells(&self, servers: &[OwnRedis]) {
        let mut writer = Writer::connect(&self.endpoints[0], &self.world.hub.add_host(1)).await;
        let reader = Writer::connect(&self.endpoints[1], &self.world.hub.add_host(1)).await;
        let mut subscriber = reader.host.subscribe(&reader.channel, &from(&[("geffen", 0)])).await;
        let conf = std::fs::read_to_string(self.world.hub.config()).expect("the hub has a configuration");
        let prefix = conf.lines().find_map(|line| line.strip_prefix("redis_prefix = "));
        let channel = format!("{}:updates:geffen", prefix.expect("set by the world"));
        let running: Vec<&OwnRedis> = servers.iter().filter(|server| server.runs()).collect();
        wait_until(PATIENCE, "the other proxy listens", async || {
            let mut listeners = 0;
            for server in &running {
                let mut question = redis::cmd("PUBSUB");
                question.arg("NUMSUB").arg(&channel);
                let answer: (String, i64) = question
                    .query_async(&mut server.client().await)
                    .await
                    .expect("answered");
                listeners += answer.1;
            }
            listeners > 0
        })
        .await;
        let last = running.last().expect("one runs");
        let client = redis::Client::open(last.url()).expect("well formed");
        let mut hearing = client.get_async_pubsub().await.expect("it serves");
        hearing.subscribe(&channel).await.expect("it listens");
        let mut messages = hearing.on_message();
        let begun = Instant::now();
        loop {
            let some = writer.some("geffen", 3);
            writer.critical(&some).await;
            if timeout(Duration::from_secs(2), messages.next()).await.is_ok() {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "nothing is published");
        }
        let (mut told, end) = (Told::default(), last_of(&self.world, "geffen"));
        follow(&mut subscriber, &mut told, |told| at(told, "geffen") >= end).await;
        assert_all_is_told(&self.world, &told, "geffen");
    }
}

async fn ask(host: &Writer, what: What) -> v1::PullReply {
    let sealed = host.host.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
    host.host.pull(&host.channel, sealed).await.expect("answered")
}

/// Writes to the host's cache and reads it again; gives whether it was there.
async fn caches(host: &Writer) -> bool {
    let (key, value) = ("gate".to_owned(), fastrand::u32(..).to_string());
    let set = What::CacheSet(v1::CacheSet {
        key: key.clone(),
        value: value.clone(),
        expiry_seconds: 60,
    });
    let written = ask(host, set).await;
    if written.code() != RejectCode::None {
        assert_eq!(written.code(), RejectCode::HubUnavailable, "{}", written.message);
        return false;
    }
    match ask(host, What::CacheGet(v1::CacheGet { key })).await.what {
        Some(pull_reply::What::CacheValue(found)) => found.value == value,
        _ => false,
    }
}

/// Tries until each host's cache is written and read; gives how long that took.
async fn all_cache(hosts: &[Writer]) -> Duration {
    let begun = Instant::now();
    for host in hosts {
        while !caches(host).await {
            assert!(begun.elapsed() < HEALED_WITHIN, "a host's cache does not heal");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    begun.elapsed()
}

/// Where a host's cache is.
async fn node_of(cluster: &RedisCluster, host: &Writer) -> usize {
    cluster.holder_of(&host.host.credential().host_id.to_string()).await
}

/// A master dies, its replica takes its place, and it comes back as a replica; and so on, with all masters.
#[test]
fn invariant_08_masters_of_a_redis_cluster_killed_under_subscription_leave_no_gap_and_nothing_out_of_order() {
    let postgres = run(OwnPostgres::new());
    let mut cluster = run(RedisCluster::new(3, true));
    let two = Two::over(&postgres, &cluster.settings());
    run(async {
        let hosts = two.hosts(HOSTS).await;
        all_cache(&hosts).await;
        two.assert_redis_tells(&cluster.nodes).await;
        let account = Load::run(&two.world, &two.endpoints, SUBSCRIPTIONS, async |load| {
            for host in hosts.iter().take(3) {
                let key = host.host.credential().host_id.to_string();
                let master = cluster.holder_of(&key).await;
                cluster.nodes[master].kill();
                load.reach().await;
                cluster.failed_over(&key, master).await;
                load.reach().await;
                eprintln!(
                    "the hosts' caches healed {:?} after the failover",
                    all_cache(&hosts).await
                );
                cluster.nodes[master].start().await;
                tokio::time::sleep(Duration::from_millis(500)).await;
                load.reach().await;
            }
        })
        .await;
        let p99 = account.p99();
        eprintln!("{} operations, caught up in {p99:?} at p99", account.written);
        assert!(p99 < CAUGHT_UP_WITHIN, "caught up in {p99:?} at p99");
        two.assert_redis_tells(&cluster.nodes).await;
        let told = two.world.hub.check();
        assert!(
            told.0 && told.1.contains("redis: ok (a cluster of 6 nodes)"),
            "{told:?}"
        );
    });
}

/// Nothing takes the dead master's place: what lay on it is away until it is back.
#[test]
fn a_redis_cluster_that_has_lost_slots_costs_the_hosts_on_them_their_cache_and_nothing_else() {
    let postgres = run(OwnPostgres::new());
    let mut cluster = run(RedisCluster::new(3, false));
    let two = Two::over(&postgres, &cluster.settings());
    run(async {
        let hosts = two.hosts(HOSTS).await;
        all_cache(&hosts).await;
        let lost = node_of(&cluster, &hosts[0]).await;
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for host in hosts {
            if node_of(&cluster, &host).await == lost {
                without.push(host);
            } else {
                with.push(host);
            }
        }
        let account = Load::run(&two.world, &two.endpoints, SUBSCRIPTIONS, async |load| {
            cluster.nodes[lost].kill();
            load.reach().await;
            all_cache(&with).await;
            for host in &without {
                assert!(!caches(host).await, "nobody holds it");
            }
            load.reach().await;
        })
        .await;
        assert!(
            account.written > 0 && account.p99() < CAUGHT_UP_WITHIN,
            "{:?}",
            account.p99()
        );
        two.assert_redis_tells(&cluster.nodes).await;
        let told = two.world.hub.check();
        assert!(
            !told.0 && told.1.contains("of 16384 slots on nodes that are up"),
            "{told:?}"
        );
        cluster.nodes[lost].start().await;
        all_cache(&without).await;
        two.assert_redis_tells(&cluster.nodes).await;
    });
}

/// The master dies, the Sentinels name the replica, and the dead one comes back as a replica; and the other way round.
#[test]
fn invariant_08_the_master_that_sentinels_watch_killed_under_subscription_leaves_no_gap_and_nothing_out_of_order() {
    let postgres = run(OwnPostgres::new());
    let mut redis = run(WatchedRedis::new());
    let two = Two::over(&postgres, &redis.settings());
    run(async {
        let hosts = two.hosts(HOSTS).await;
        all_cache(&hosts).await;
        two.assert_redis_tells(&redis.servers).await;
        let account = Load::run(&two.world, &two.endpoints, SUBSCRIPTIONS, async |load| {
            for _ in 0..2 {
                let master = redis.master().await;
                redis.servers[master].kill();
                load.reach().await;
                assert!(!caches(&hosts[0]).await, "there is no master");
                redis.failed_over(master).await;
                load.reach().await;
                eprintln!(
                    "the hosts' caches healed {:?} after the failover",
                    all_cache(&hosts).await
                );
                redis.servers[master].start().await;
                redis.in_step(master).await;
            }
        })
        .await;
        let p99 = account.p99();
        eprintln!("{} operations, caught up in {p99:?} at p99", account.written);
        assert!(p99 < CAUGHT_UP_WITHIN, "caught up in {p99:?} at p99");
        two.assert_redis_tells(&redis.servers).await;
        let told = two.world.hub.check();
        let master = redis.servers[redis.master().await].address();
        let expected = format!("redis: ok (the Sentinels name {master})");
        assert!(told.0 && told.1.contains(&expected), "{told:?}");
    });
}

/// As a replica does that was not told of the last writes when it took its master's place.
#[test]
fn what_redis_has_forgotten_is_not_read_from_an_older_copy() {
    let postgres = run(OwnPostgres::new());
    let mut redis = run(OwnRedis::new());
    let settings = [
        ("redis_host", redis.address()),
        ("cache_expiry_seconds", "600".to_owned()),
    ];
    let two = Two::over(&postgres, &settings);
    run(async {
        let mut hosts = two.hosts(2).await;
        let path = "prontera/ITEM_DROP/1";
        let read = async |host: &Writer| match ask(
            host,
            What::Get(v1::Get {
                path: path.to_owned(),
                ..Default::default()
            }),
        )
        .await
        .what
        {
            Some(pull_reply::What::State(state)) => state.version.expect("it has one").sequence,
            other => panic!("{other:?}"),
        };
        // Both proxies hold the epoch, and the first has its state in Redis.
        for _ in 0..2 {
            let some = [hosts[0].next(path, Some(r#"{"amount":1}"#))];
            hosts[0].critical(&some).await;
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
        let _saved: () = redis::cmd("SAVE")
            .query_async(&mut redis.client().await)
            .await
            .expect("it saves");
        let newest = [hosts[0].next(path, Some(r#"{"amount":2}"#))];
        hosts[0].critical(&newest).await;
        let newest = newest[0].version.expect("set").sequence;
        tokio::time::sleep(Duration::from_millis(500)).await;
        redis.kill();
        redis.start().await;
        // The proxy that had written it finds out; what is in Redis would stay for ten minutes.
        tokio::time::sleep(Duration::from_secs(6)).await;
        for _ in 0..100 {
            assert_eq!(read(&hosts[1]).await, newest, "an older copy is read");
        }
    });
}

#[test]
fn check_says_when_redis_is_not_what_the_settings_say() {
    let (cluster, watched) = run(async { (RedisCluster::new(3, false).await, WatchedRedis::new().await) });
    let postgres = run(OwnPostgres::new());
    let sentinels = &watched.settings()[1].1;
    let sentinel = sentinels.split(", ").next().expect("there are three");
    let standalone = |address: &str| vec![("redis_host", address.to_owned())];
    let as_sentinels = |addresses: &str, master: &str| {
        vec![
            ("redis_mode", "sentinel".to_owned()),
            ("redis_host", addresses.to_owned()),
            ("redis_sentinel_master", master.to_owned()),
        ]
    };
    let [master, replica] = &watched.servers;
    for (settings, told) in [
        (
            standalone(&cluster.nodes[0].address()),
            "is a node of a cluster: set redis_mode = cluster",
        ),
        (standalone(sentinel), "is a Sentinel: set redis_mode = sentinel"),
        (standalone(&replica.address()), "is a replica, which takes no writes"),
        (as_sentinels(sentinels, "another"), "cannot be reached ("),
        (as_sentinels(&master.address(), "hub"), "cannot be reached ("),
        (
            vec![("redis_mode", "cluster".to_owned()), ("redis_host", master.address())],
            "cannot be reached (",
        ),
    ] {
        let world = World::of(postgres.url(), &settings);
        let (is_well, said) = world.hub.check();
        assert!(
            !is_well && said.contains("redis: E113 REDIS_UNREACHABLE: Redis at "),
            "{settings:?}: {said}"
        );
        assert!(said.contains(told), "{settings:?}: {said}");
    }
}
