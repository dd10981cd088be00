//! What a host learns of the main server: nothing, whatever it asks and whatever has failed.

use std::{fmt::Debug, time::Duration};

use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::new_id,
    limits::BATCH_OPS_MAX,
    message::{self, Label},
    v1::{
        self, Operation, Sealed, operation::Payload, pull_client::PullClient, pull_request::What,
        session_client::SessionClient,
    },
};
use p2p_sync_tests::{
    edge::{Edge, Place},
    faulty_link::FaultyLink,
    services::{database, shared_redis_url},
};
use prost::Message;
use tonic::{Response, Status, transport::Channel};
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch},
    world::{World, run},
};

/// Longer than the hub works on anything here.
const ANSWERED_WITHIN: Duration = Duration::from_secs(30);

/// Everything that was said to a host, as text.
#[derive(Default)]
struct Heard(Vec<String>);

impl Heard {
    fn reply(&mut self, what: &str, reply: &impl Debug) {
        self.0.push(format!("{what}: {reply:?}"));
    }

    /// What is inside the seal, or all that stands outside of it.
    fn answer<M: Message + Default + Debug>(
        &mut self,
        host: &WireHost,
        what: &str,
        answer: Result<Response<Sealed>, Status>,
    ) {
        match answer {
            Ok(answer) => {
                self.reply(what, answer.metadata());
                let label = Label::read(answer.get_ref()).expect("the hub's label");
                self.reply(what, &label);
                let key = &host.credential().to_host;
                let direction = p2p_sync_proto::keys::Direction::ToHost;
                self.reply(
                    what,
                    &message::open::<M>(key, direction, &label, answer.get_ref()).expect("its seal"),
                );
            }
            Err(status) => self.status(what, &status),
        }
    }

    fn status(&mut self, what: &str, status: &Status) {
        let (code, sentence, metadata) = (status.code(), status.message(), status.metadata());
        self.0.push(format!(
            "{what}: {code:?} {sentence} {metadata:?} {:?}",
            status.details()
        ));
    }
}

/// Asks for everything a host can ask for, rightly and wrongly.
async fn ask_all(host: &WireHost, channel: &Channel, first: u64, heard: &mut Heard) {
    greet(host, channel, first, heard).await;
    ask(host, channel, heard).await;
    for messages in operations(host, first) {
        for lane in [Lane::Critical, Lane::Bulk] {
            let sealed = host.seal(lane, &messages);
            let answered = match lane {
                Lane::Critical => host.critical(channel, sealed).await.map(|reply| vec![reply]),
                _ => host.bulk(channel, vec![sealed.clone(), sealed]).await,
            };
            match answered {
                Ok(replies) => heard.reply("operations", &replies),
                Err(status) => heard.status("operations", &status),
            }
        }
    }
}

/// Says hello and renews leases, rightly and wrongly.
async fn greet(host: &WireHost, channel: &Channel, first: u64, heard: &mut Heard) {
    let hello = |protocol_version, incarnation, opening_id: &[u8]| v1::HelloRequest {
        protocol_version,
        incarnation,
        oldest_incarnation: 1,
        opening_id: opening_id.to_vec().into(),
        ..Default::default()
    };
    let mut session = SessionClient::new(channel.clone());
    for hello in [
        hello(PROTOCOL_VERSION, 7, host.credential().host_id.as_bytes()),
        hello(PROTOCOL_VERSION, 7, new_id().as_bytes()),
        hello(PROTOCOL_VERSION, 1, new_id().as_bytes()),
        hello(PROTOCOL_VERSION, u64::MAX, new_id().as_bytes()),
        hello(PROTOCOL_VERSION, 7, b"short"),
        hello(0, 7, new_id().as_bytes()),
        v1::HelloRequest::default(),
    ] {
        let answer = session.hello(host.seal(Lane::Hello, &hello)).await;
        heard.answer::<v1::HelloReply>(host, "hello", answer);
    }
    for counter in [first, first, u64::MAX] {
        let answer = session
            .renew(host.seal(Lane::Renew, &v1::RenewRequest { counter }))
            .await;
        heard.answer::<v1::RenewReply>(host, "renew", answer);
    }
}

fn questions() -> [What; 21] {
    let key = || "key".to_owned();
    let set = |key: String, bytes: usize| {
        What::CacheSet(v1::CacheSet {
            key,
            value: "x".repeat(bytes),
            expiry_seconds: 5,
        })
    };
    [
        What::Get(v1::Get {
            path: "payon/MONSTER_DATA/1".to_owned(),
            ..Default::default()
        }),
        What::Get(v1::Get {
            path: "nowhere/MAP_STATE".to_owned(),
            ..Default::default()
        }),
        What::Get(v1::Get {
            path: "?".to_owned(),
            ..Default::default()
        }),
        What::Scan(v1::Scan {
            prefix: "payon".to_owned(),
            ..Default::default()
        }),
        What::Scan(v1::Scan {
            prefix: "x".repeat(500),
            ..Default::default()
        }),
        What::Scan(v1::Scan {
            cursor: (&b"nonsense"[..]).into(),
            ..Default::default()
        }),
        What::ChangesSince(v1::ChangesSince {
            stream: "payon".to_owned(),
            ..Default::default()
        }),
        What::ChangesSince(v1::ChangesSince {
            stream: "no map".to_owned(),
            ..Default::default()
        }),
        What::OperationStatus(v1::OperationStatus {
            operation_id: new_id().as_bytes().to_vec().into(),
            position: None,
        }),
        What::OperationStatus(v1::OperationStatus {
            operation_id: (&b"?"[..]).into(),
            position: None,
        }),
        set(key(), 10),
        set(key(), 300_000),
        set("shared:key".to_owned(), 1),
        What::CacheGet(v1::CacheGet { key: key() }),
        What::CacheGet(v1::CacheGet {
            key: "shared:none".to_owned(),
        }),
        What::CacheExists(v1::CacheExists {
            key: "shared:none".to_owned(),
        }),
        What::CacheDelete(v1::CacheDelete { key: key() }),
        What::Publish(v1::Publish {
            channel: "c".to_owned(),
            message: "m".to_owned(),
        }),
        What::Publish(v1::Publish {
            channel: String::new(),
            message: "m".to_owned(),
        }),
        What::CreateEmbedding(v1::CreateEmbedding {
            text: "text".to_owned(),
        }),
        What::SearchEmbeddings(v1::SearchEmbeddings::default()),
    ]
}

async fn ask(host: &WireHost, channel: &Channel, heard: &mut Heard) {
    let mut pull = PullClient::new(channel.clone());
    for what in questions().into_iter().map(Some).chain([None]) {
        let answer = pull
            .call(host.seal(Lane::Pull, &v1::PullRequest { what: what.clone() }))
            .await;
        heard.answer::<v1::PullReply>(host, &format!("{what:.80?}"), answer);
    }
    // What does not open, is too long, goes astray.
    let astray = host.seal(Lane::Hello, &v1::PullRequest::default());
    heard.answer::<v1::PullReply>(host, "another lane's", pull.call(astray.clone()).await);
    let too_long = Sealed {
        body: vec![0; 3 << 20].into(),
        ..astray.clone()
    };
    heard.answer::<v1::PullReply>(host, "too long", pull.call(too_long).await);
    let elsewhere = "http://hub/elsewhere".parse().expect("an address");
    let mut elsewhere = PullClient::with_origin(channel.clone(), elsewhere);
    heard.answer::<v1::PullReply>(host, "elsewhere", elsewhere.call(astray).await);
}

/// Messages of operations that are good, refused by the hub, and refused by Postgres.
fn operations(host: &WireHost, first: u64) -> Vec<v1::OperationBatch> {
    let mut sequence = first;
    let mut put = |path: &str, payload: &str| {
        sequence += 1;
        let mut operation = host.operation(sequence, path, Some(payload));
        // Of its own map, the first there is.
        operation.version.as_mut().expect("set").tenure = u64::from(path.starts_with("payon/"));
        operation
    };
    let other = format!("@host/{}/HOST_METRICS", Uuid::nil());
    let mut all: Vec<Operation> = [
        ("payon/MONSTER_DATA/1", r#"{"monster_id":1,"hp":1}"#),
        ("payon/MONSTER_DATA/1", r#"{"monster_id":1,"hp":-1}"#),
        ("payon/MONSTER_DATA/1", "[]"),
        ("payon/MONSTER_DATA/1", "{"),
        ("payon/MONSTER_DATA/1", r#"{"a":1,"a":1}"#),
        ("payon/NPC_STATE/poison", r#"{"npc_id":"poison"}"#),
        ("geffen/MONSTER_DATA/1", r#"{"monster_id":1,"hp":1}"#),
        ("payon/NOTHING/1", "{}"),
        ("@char/1/MONSTER_DATA/1", "{}"),
        (other.as_str(), "{}"),
    ]
    .map(|(path, payload)| put(path, payload))
    .into();
    let mut odd = put("payon/MONSTER_DATA/2", "{}");
    odd.policy_version = 99;
    all.push(odd);
    let mut odd = put("payon/MONSTER_DATA/2", "{}");
    odd.payload = Some(Payload::Blob(v1::Blob::default()));
    all.push(odd);
    let mut odd = put("payon/MONSTER_DATA/2", "{}");
    odd.version.as_mut().expect("set").tenure = 1 << 40;
    all.push(odd);
    let before_all = host.after(Some(first + 500), put("payon/CHAT_MESSAGE/1", r#"{"text":"x"}"#));
    all.push(before_all);
    let too_many = vec![all[0].clone(); BATCH_OPS_MAX + 1];
    let gaps = (0..5000).map(|gap| v1::SequenceRange {
        incarnation: 7,
        first: first + 1000 + gap * 2,
        last: first + 1000 + gap * 2,
    });
    let withdrawn = v1::OperationBatch {
        operations: vec![],
        withdrawn: gaps.take(1000).collect(),
    };
    let backwards = v1::OperationBatch {
        operations: vec![],
        withdrawn: vec![v1::SequenceRange {
            incarnation: 7,
            first: 9,
            last: 3,
        }],
    };
    vec![batch(&all), batch(&too_many), withdrawn, backwards, batch(&[])]
}

#[test]
fn invariant_09_nothing_that_the_hub_says_to_a_host_names_the_main_server() {
    let database = run(database());
    let (before, after) = database.url().split_once('@').expect("user, password, host");
    let (address, name) = after.split_once('/').expect("a database's name");
    let postgres = FaultyLink::at("127.66.0.7", address);
    let redis_url = shared_redis_url();
    let redis = FaultyLink::at(
        "127.66.0.8",
        redis_url.trim_start_matches("redis://").trim_end_matches('/'),
    );
    let settings = [
        ("bind_address", "127.66.0.9".to_owned()),
        ("statement_timeout_critical_ms", "500".to_owned()),
        ("statement_timeout_bulk_ms", "500".to_owned()),
        ("forgery_lock_threshold", "0".to_owned()),
        ("leases", "required".to_owned()),
    ];
    let url = format!("{before}@{}/{name}", postgres.address());
    let mut world = World::on(&url, &format!("redis://{}/", redis.address()), &settings);
    let hub = world.hub.start();
    // The database's own words name where they come from, as those of an operator's trigger may.
    let poison = "CREATE FUNCTION p2p_sync.poison() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
            IF NEW.path LIKE '%poison' THEN RAISE EXCEPTION 'refused by 127.66.0.7 in /srv/main-server/base, database %', \
                current_database() USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END $$; \
        CREATE TRIGGER poison BEFORE INSERT ON p2p_sync.states FOR EACH ROW EXECUTE FUNCTION p2p_sync.poison()";
    run(world.client().batch_execute(poison)).expect("a superuser may");

    let edge = FaultyLink::to(&hub);
    edge.record();
    let host = WireHost::new(&edge.endpoint(), &world.hub.add_host_of(1, &["payon"]));
    let revoked = WireHost::new(&edge.endpoint(), &world.hub.add_host(2));
    let revoked_id = revoked.credential().host_id.to_string();
    world.hub.command(&["hosts", "revoke", &revoked_id]);
    let mut heard = Heard::default();
    let mut round = |first: u64| {
        run(async {
            let channel = Channel::from_shared(edge.endpoint())
                .expect("an address")
                .connect()
                .await;
            let channel = channel.expect("the hub serves");
            let asked = ask_all(&host, &channel, first, &mut heard);
            tokio::time::timeout(ANSWERED_WITHIN * 4, asked)
                .await
                .expect("all is answered in the end");
            let answer = PullClient::new(channel)
                .call(revoked.seal(Lane::Pull, &v1::PullRequest::default()))
                .await;
            heard.answer::<v1::PullReply>(&revoked, "revoked", answer);
        });
    };
    round(1000);
    redis.swallow();
    redis.cut();
    round(20_000);
    redis.heal();
    postgres.cut();
    round(40_000);
    drop(postgres);
    round(60_000);
    assert!(
        heard.0.iter().any(|said| said.contains("StoreRefused")),
        "the database has refused something"
    );
    assert!(
        heard
            .0
            .iter()
            .any(|said| said.contains("HUB_UNAVAILABLE") || said.contains("HubUnavailable")),
        "and did not answer"
    );

    let ports = [hub.rsplit(':').next(), address.rsplit(':').next()].map(|port| port.expect("a port").to_owned());
    let mut names = names_of(&[&ports[0], &ports[1], &redis.address().port().to_string()]);
    let password = before.rsplit(':').next().expect("a password");
    let folder = world.folder.path().to_str().expect("text");
    names.extend([name, password, folder].map(str::to_owned));
    for said in &heard.0 {
        for name in &names {
            assert!(
                !said.contains(name.as_str()),
                "{name:?} is in what a host is told: {said}"
            );
        }
    }
    let wire = edge.recorded();
    assert!(wire.len() > 100_000, "{} bytes", wire.len());
    // What is shorter stands in ciphertext by chance.
    for name in names.iter().filter(|name| name.len() > 5) {
        let is_there = wire.windows(name.len()).any(|window| window == name.as_bytes());
        assert!(!is_there, "{name:?} travels between hub and host");
    }
}

/// What puts an edge before a hub.
type Put = fn(&Place<'_>) -> Edge;

/// nginx and Envoy, by the files that operators are given, while the hub is there and when it is not.
#[test]
fn invariant_09_nothing_that_an_edge_says_to_a_host_names_the_main_server() {
    let mut world = World::not_started_with(&[
        ("bind_address", "127.66.0.9".to_owned()),
        ("forgery_lock_threshold", "0".to_owned()),
    ]);
    let proxy = world.hub.start().trim_start_matches("http://").to_owned();
    let port = proxy.rsplit(':').next().expect("a port");
    let mut names = names_of(&[port]);
    names.extend(["x-envoy", "\"via\"", "\"location\""].map(str::to_owned));
    let edges: [(&str, Put, &str); 2] = [
        ("nginx", Edge::nginx, "502"),
        ("Envoy", Edge::envoy, "the edge before the hub does not reach it"),
    ];
    for ((edge, put, says), first) in edges.into_iter().zip([1000, 50_000]) {
        let edge = put(&Place {
            folder: world.folder.path().join(edge),
            proxies: vec![proxy.clone()],
            // What an edge says is the same over TLS, of which nothing is read here.
            certificate: None,
            others: &[],
        });
        let host = WireHost::new(&edge.endpoint(), &world.hub.add_host(1));
        let round = |first| {
            let mut heard = Heard::default();
            run(async {
                let endpoint = Channel::from_shared(edge.endpoint()).expect("an address");
                let channel = endpoint.connect().await.expect("the edge serves");
                ask_all(&host, &channel, first, &mut heard).await;
            });
            heard.0
        };
        let mut heard = round(first);
        world.hub.kill();
        let without = round(first + 20_000);
        world.hub.start();
        let own_words = without.iter().filter(|said| said.contains(says)).count();
        assert!(own_words > 10, "the edge said little of its own: {without:?}");
        heard.extend(without);
        for said in &heard {
            for name in &names {
                assert!(
                    !said.contains(name.as_str()),
                    "{name:?} is in what a host is told: {said}"
                );
            }
        }
    }
}

/// What would tell of the main server, in whatever sentence.
fn names_of(ports: &[&str]) -> Vec<String> {
    let words = [
        "127.66",
        "/srv/",
        "/tmp/",
        "keyring",
        ".conf",
        "postgres://",
        "redis://",
        "pg_",
        "poison()",
    ];
    let mut names = words.map(str::to_owned).to_vec();
    let machine = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    // A machine may be called by a word that stands in any sentence.
    names.extend(Some(machine.trim().to_owned()).filter(|name| name.len() > 5));
    for port in ports {
        names.extend([":", "port ", "port="].map(|before| format!("{before}{port}")));
    }
    names
}
