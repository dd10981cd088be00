//! The hosts' cache in a Redis: spaces that know nothing of each other, bounded and counted right, the operator's shared one,
//! and what hosts publish.

use std::{collections::HashMap, thread, time::Duration};

use futures::StreamExt as _;
use p2p_sync_agent::Agent;
use p2p_sync_proto::{
    Code,
    envelope::Lane,
    keys::Credential,
    limits::CACHE_VALUE_BYTES_MAX,
    v1::{self, pull_reply, pull_request::What},
};
use p2p_sync_tests::services::{Database, OwnRedis, database};
use redis::AsyncTypedCommands as _;
use tokio::time::timeout;
use tonic::transport::Channel;

use crate::{
    wire::WireHost,
    world::{PATIENCE, World, run, until},
};

/// Of one host; what the hub counts for a value besides key and text.
const SPACE_BYTES: usize = 16 * 1024 * 1024;
const SPACE_ENTRIES: usize = 16_384;
const ENTRY_BYTES: usize = 256;

/// A hub over a Redis of its own.
struct Cached {
    world: World,
    redis: OwnRedis,
    _database: Database,
}

impl Cached {
    fn new() -> Self {
        let (database, redis) = run(async { (database().await, OwnRedis::new().await) });
        let mut world = World::on(database.url(), &redis.url(), &[]);
        world.hub.start();
        Self {
            world,
            redis,
            _database: database,
        }
    }

    fn host(&self) -> Host {
        let host = WireHost::new(&self.world.endpoint(), &self.world.hub.add_host(1));
        let channel = run(host.connect());
        Host { host, channel }
    }

    fn client(&self) -> redis::Client {
        redis::Client::open(self.redis.url()).expect("the URL is well formed")
    }

    fn connection(&self) -> redis::aio::MultiplexedConnection {
        run(self.client().get_multiplexed_async_connection()).expect("Redis serves")
    }

    fn prefix(&self) -> String {
        self.world.setting("redis_prefix").expect("set by this world")
    }

    /// Where a host's values lie, and what is counted for them there.
    fn space(&self, host: &Host) -> (String, usize) {
        let mut connection = self.connection();
        let id = host.host.credential().host_id;
        let keys = run(connection.keys(format!("*{id}*values"))).expect("Redis serves");
        let [values] = keys.as_slice() else {
            panic!("one host has one space: {keys:?}")
        };
        let counted = run(connection.hget(values, ""))
            .expect("Redis serves")
            .unwrap_or_default();
        (values.clone(), counted.parse().unwrap_or_default())
    }
}

/// A host without an agent, and so without a near cache.
struct Host {
    host: WireHost,
    channel: Channel,
}

impl Host {
    fn ask(&self, what: What) -> Result<pull_reply::What, Code> {
        let sealed = self.host.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
        let reply = run(self.host.pull(&self.channel, sealed)).expect("answered");
        match reply.code() {
            Code::None => Ok(reply.what.expect("an answer")),
            code => Err(code),
        }
    }

    fn flag(&self, what: What) -> Result<bool, Code> {
        match self.ask(what)? {
            pull_reply::What::CacheFlag(flag) => Ok(flag),
            other => panic!("no flag: {other:?}"),
        }
    }

    fn set(&self, key: &str, value: &str, expiry_seconds: u32) -> Result<bool, Code> {
        self.flag(What::CacheSet(v1::CacheSet {
            key: key.to_owned(),
            value: value.to_owned(),
            expiry_seconds,
        }))
    }

    fn delete(&self, key: &str) -> Result<bool, Code> {
        self.flag(What::CacheDelete(v1::CacheDelete { key: key.to_owned() }))
    }

    fn exists(&self, key: &str) -> Result<bool, Code> {
        self.flag(What::CacheExists(v1::CacheExists { key: key.to_owned() }))
    }

    fn publish(&self, channel: &str, message: &str) -> Result<bool, Code> {
        self.flag(What::Publish(v1::Publish {
            channel: channel.to_owned(),
            message: message.to_owned(),
        }))
    }

    fn value(&self, key: &str) -> Result<v1::CacheValue, Code> {
        match self.ask(What::CacheGet(v1::CacheGet { key: key.to_owned() }))? {
            pull_reply::What::CacheValue(value) => Ok(value),
            other => panic!("no value: {other:?}"),
        }
    }

    fn get(&self, key: &str) -> Result<String, Code> {
        self.value(key).map(|told| told.value)
    }
}

#[test]
fn two_hosts_have_a_value_each_under_one_key() {
    let cached = Cached::new();
    let hosts = [(); 2].map(|()| cached.host());
    for (host, value) in hosts.iter().zip(["mine", "yours"]) {
        assert_eq!(host.get("key"), Err(Code::NotFound));
        assert_eq!(host.exists("key"), Ok(false));
        assert_eq!(host.set("key", value, 60), Ok(true));
    }
    assert_eq!(
        hosts.each_ref().map(|host| host.get("key")),
        [Ok("mine".to_owned()), Ok("yours".to_owned())]
    );
    let left = hosts[0].value("key").expect("there").expires_in_ms;
    assert!((1..=60_000).contains(&left), "{left}");
    assert_eq!((hosts[0].delete("key"), hosts[0].delete("key")), (Ok(true), Ok(false)));
    assert_eq!(hosts.each_ref().map(|host| host.exists("key")), [Ok(false), Ok(true)]);
    assert_eq!(hosts[1].get("key"), Ok("yours".to_owned()));
}

#[test]
fn a_value_is_gone_after_its_second_and_its_bytes_with_it() {
    let cached = Cached::new();
    let host = cached.host();
    host.set("brief", "x", 1).expect("taken");
    host.set("long", "y", 60).expect("taken");
    assert_eq!(host.get("brief"), Ok("x".to_owned()));
    thread::sleep(Duration::from_millis(1_050));
    assert_eq!(
        (host.get("brief"), host.exists("brief")),
        (Err(Code::NotFound), Ok(false))
    );
    assert_eq!(host.delete("brief"), Ok(false), "it was not there any more");
    assert_eq!(host.get("long"), Ok("y".to_owned()));
    host.set("next", "z", 60).expect("taken");
    assert_eq!(cached.space(&host).1, "longy".len() + "nextz".len() + 2 * ENTRY_BYTES);
    // With the last value the whole space goes.
    for key in ["long", "next"] {
        host.set(key, "", 1).expect("taken");
    }
    let mut connection = cached.connection();
    let (values, _) = cached.space(&host);
    until("the space expires", || {
        !run(connection.exists(&values)).expect("Redis serves")
    });
}

#[test]
fn invariant_12_a_space_that_is_full_of_bytes_lets_go_what_would_expire_first_and_counts_right() {
    let cached = Cached::new();
    let host = cached.host();
    let value = "v".repeat(CACHE_VALUE_BYTES_MAX);
    let key = |number: u32| format!("key-{number:02}");
    let bytes = |entries: usize| entries * (value.len() + key(0).len() + ENTRY_BYTES);
    let fit = SPACE_BYTES / bytes(1);
    // The later ones expire later, whatever is written again in between.
    for number in 0..20 {
        host.set(&key(number), &value, 1_000 + 100 * number).expect("taken");
    }
    for _ in 0..50 {
        host.set(&key(7), &value, 1_700).expect("taken");
        assert_eq!(host.delete(&key(8)), Ok(true));
        host.set(&key(8), &value, 1_800).expect("taken");
    }
    assert_eq!(
        cached.space(&host).1,
        bytes(20),
        "overwritten and deleted ones are counted off"
    );
    for number in 20..80 {
        host.set(&key(number), &value, 1_000 + 100 * number).expect("taken");
    }
    assert_eq!(cached.space(&host).1, bytes(fit));
    let gone = 80 - u32::try_from(fit).expect("few");
    for number in 0..80 {
        assert_eq!(
            host.exists(&key(number)),
            Ok(number >= gone),
            "{number}, of which {gone} have given way"
        );
    }
    assert_eq!(host.get(&key(79)).map(|told| told.len()), Ok(value.len()));
    host.set("small", "", 20_000).expect("taken");
    let counted = bytes(fit) + "small".len() + ENTRY_BYTES;
    assert_eq!(
        cached.space(&host).1,
        counted,
        "there was room for it beside the large ones"
    );
}

#[test]
fn invariant_12_a_space_that_is_full_of_values_lets_go_what_would_expire_first() {
    let cached = Cached::new();
    let host = cached.host();
    host.set("0", "", 1_000).expect("taken");
    let (values, _) = cached.space(&host);
    let expiries = values.strip_suffix("values").expect("so it was found").to_owned() + "expiries";
    // As if it had set them one after the other, each with another second to live.
    let rest: Vec<String> = (1..SPACE_ENTRIES).map(|number| number.to_string()).collect();
    let added: usize = rest.iter().map(|key| key.len() + ENTRY_BYTES).sum();
    let mut connection = cached.connection();
    let first = run(connection.zscore(&expiries, "0"))
        .expect("Redis serves")
        .expect("there");
    let numbered: Vec<(u32, &String)> = (1..).zip(&rest).collect();
    for some in numbered.chunks(1_000) {
        let mut filling = redis::pipe();
        for (number, key) in some {
            let at = first + f64::from(number * 1_000);
            filling.hset(&values, *key, "").zadd(&expiries, *key, at);
        }
        run(filling.exec_async(&mut connection)).expect("Redis serves");
    }
    run(connection.hincr(&values, "", added)).expect("Redis serves");
    assert_eq!((host.exists("0"), host.exists("16383")), (Ok(true), Ok(true)));
    for key in ["a", "b", "c"] {
        host.set(key, "", 60_000).expect("taken");
    }
    let there = ["0", "1", "2", "3", "16383", "a", "b", "c"].map(|key| host.exists(key).expect("answered"));
    assert_eq!(there, [false, false, false, true, true, true, true, true]);
    let fields = run(connection.hlen(&values)).expect("Redis serves");
    assert_eq!(fields, SPACE_ENTRIES + 1, "and the count of bytes");
    assert_eq!(run(connection.zcard(&expiries)).expect("Redis serves"), SPACE_ENTRIES);
    let counted = "0".len() + ENTRY_BYTES + added;
    assert_eq!(cached.space(&host).1, counted, "three keys of one letter for three");
}

#[test]
fn the_shared_space_is_the_operators_to_write_in_redis_and_the_hosts_to_read() {
    let cached = Cached::new();
    let hosts = [(); 2].map(|()| cached.host());
    let mut connection = cached.connection();
    let name = |name: &str| format!("{}:shared:{name}", cached.prefix());
    run(connection.set(name("motd"), "welcome")).expect("Redis serves");
    run(connection.set_ex(name("brief"), "soon gone", 100)).expect("Redis serves");
    for host in &hosts {
        let told = host.value("shared:motd").expect("there");
        assert_eq!((told.value.as_str(), told.expires_in_ms), ("welcome", 0));
        let told = host.value("shared:brief").expect("there");
        assert!((1..=100_000).contains(&told.expires_in_ms), "{told:?}");
        assert_eq!(
            (host.exists("shared:motd"), host.exists("shared:none")),
            (Ok(true), Ok(false))
        );
        assert_eq!(host.get("shared:none"), Err(Code::NotFound));
        assert_eq!(host.set("shared:motd", "mine", 60), Err(Code::NotAllowed));
        assert_eq!(host.delete("shared:motd"), Err(Code::NotAllowed));
        assert_eq!(host.get("motd"), Err(Code::NotFound), "a host's own is another");
    }
    assert_eq!(
        run(connection.get(name("motd"))).expect("Redis serves").as_deref(),
        Some("welcome")
    );
}

#[test]
fn who_listens_in_redis_hears_what_each_host_publishes_and_on_which_channel() {
    let cached = Cached::new();
    let hosts = [(); 2].map(|()| cached.host());
    let credential = cached.world.hub.add_host(2);
    let config = cached.world.config_of(&cached.world.endpoint(), &credential, "");
    let agent = Agent::start(config).expect("starts");
    let agent_id = Credential::parse(&credential).expect("the hub gave it").host_id;
    let mut listener = run(cached.client().get_async_pubsub()).expect("Redis serves");
    let channel = |id: uuid::Uuid, name: &str| format!("{}:host:{id}:{name}", cached.prefix());
    let ids = hosts.each_ref().map(|host| host.host.credential().host_id);
    for id in [ids[0], ids[1], agent_id] {
        run(listener.subscribe(channel(id, "news"))).expect("Redis serves");
    }
    assert_eq!(hosts[0].publish("news", "of one"), Ok(true));
    assert_eq!(hosts[0].publish("gossip", "nobody listens"), Ok(true));
    assert_eq!(hosts[1].publish("news", "of two"), Ok(true));
    agent.publish("news", "of an agent").expect("taken");
    let heard = async {
        let messages = listener.on_message().take(3);
        let told = messages.map(|message| {
            let text: String = message.get_payload().expect("text");
            (text, message.get_channel_name().to_owned())
        });
        told.collect::<HashMap<_, _>>().await
    };
    let heard = run(async { timeout(PATIENCE, heard).await }).expect("all is heard");
    let expected = [("of one", ids[0]), ("of two", ids[1]), ("of an agent", agent_id)];
    let expected = expected.map(|(text, id)| (text.to_owned(), channel(id, "news")));
    assert_eq!(heard, HashMap::from(expected));
}

#[test]
fn without_its_redis_each_call_has_a_code_and_with_it_all_go_on() {
    let mut cached = Cached::new();
    let host = cached.host();
    host.set("key", "before", 60).expect("taken");
    cached.redis.kill();
    let codes = [
        host.get("key").map(drop),
        host.get("shared:motd").map(drop),
        host.exists("key").map(drop),
        host.set("key", "during", 60).map(drop),
        host.delete("key").map(drop),
        host.publish("news", "during").map(drop),
    ];
    assert_eq!(codes, [Err(Code::HubUnavailable); 6]);
    run(cached.redis.start());
    until("it is taken again", || host.set("key", "after", 60) == Ok(true));
    assert_eq!(host.get("key"), Ok("after".to_owned()));
    assert_eq!(host.publish("news", "after"), Ok(true));
}
