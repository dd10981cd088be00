//! Forged, replayed, stale and foreign messages, a thousand of each kind: no row of state changes, each is answered with its
//! code, and whatever does not open is told one and the same.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures::{StreamExt as _, stream};
use hmac::{Hmac, KeyInit as _, Mac as _};
use p2p_sync_proto::{
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction, KeyId, MasterKey},
    message::{self, Label},
    v1::{
        self, Operation, OutcomeState, RejectCode, Sealed, bulk_client::BulkClient, critical_client::CriticalClient,
        operation::Payload, pull_client::PullClient, session_client::SessionClient,
    },
};
use p2p_sync_proxy::keyring::Keyring;
use prost::Message as _;
use sha2::Sha512;
use tonic::{
    Status,
    metadata::KeyAndValueRef,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch},
    world::{World, run},
};

const EACH: usize = 1000;
/// Calls under way at one time.
const AT_ONCE: usize = 32;
const LANES: [Lane; 5] = [Lane::Critical, Lane::Bulk, Lane::Pull, Lane::Hello, Lane::Renew];

/// Where it is noted that something was refused; all other tables are the hub's state.
const NOTES: [&str; 4] = [
    "rejected_operations",
    "limbo_operations",
    "settled_sequences",
    "security_validations",
];

/// A hub with leases that locks nobody, a host that writes payon and has lost prontera, and the one that took it and has
/// character 7 on geffen.
struct Scene {
    world: World,
    host: WireHost,
    other: WireHost,
    keyring: Keyring,
}

impl Scene {
    fn new() -> Self {
        let world = World::with(&[
            ("leases", "required".to_owned()),
            ("lease_seconds", "600".to_owned()),
            ("forgery_lock_threshold", "0".to_owned()),
            ("trespass_lock_threshold", "0".to_owned()),
        ]);
        let host = WireHost::new(&world.endpoint(), &world.hub.add_host_of(1, &["prontera", "payon"]));
        let other = WireHost::new(&world.endpoint(), &world.hub.add_host_of(2, &["geffen"]));
        let keyring = Keyring::load(&world.hub.config().with_file_name("keyring")).expect("made by the hub");
        let scene = Self {
            world,
            host,
            other,
            keyring,
        };
        scene.write(&scene.host, &["prontera", "payon"]);
        let other = scene.other.credential().host_id.to_string();
        scene.world.hub.command(&["maps", "force", "prontera", &other]);
        scene.write(&scene.other, &["prontera", "geffen"]);
        let player = [
            comes(&scene.other, 3, "geffen"),
            scene.other.operation(4, PLAYER, Some(r#"{"char_id":7,"zeny":5}"#)),
        ];
        apply(&scene.other, &player);
        scene
    }

    /// Something to be overwritten.
    fn write(&self, host: &WireHost, maps: &[&str]) {
        let operations: Vec<Operation> = maps
            .iter()
            .zip(1..)
            .map(|(map, sequence)| {
                let path = format!("{map}/MONSTER_DATA/7");
                let mut operation = host.operation(sequence, &path, Some(r#"{"monster_id":7,"hp":3}"#));
                operation.version.as_mut().expect("set").tenure = self.tenure(map);
                operation
            })
            .collect();
        apply(host, &operations);
    }

    fn tenure(&self, map: &str) -> u64 {
        let sql = "SELECT tenure FROM p2p_sync.host_assignments WHERE map = $1";
        u64::try_from(self.world.rows(sql, &[&map])[0].get::<_, i64>(0)).expect("never negative")
    }

    /// What each table holds but for some, in one line each.
    fn tables(&self, without: &[&str]) -> Vec<(String, String)> {
        let all = "SELECT table_name::text FROM information_schema.tables \
            WHERE table_schema = 'p2p_sync' AND table_type = 'BASE TABLE' ORDER BY 1";
        let names = self.world.rows(all, &[]).into_iter().map(|row| row.get::<_, String>(0));
        let checksum = |name: String| {
            // The note that the hub serves goes on whatever comes, and where it was late leases are longer for it; who renewed
            // one is in a table of its own.
            let row = "to_jsonb(t) - 'alive_at' - 'expires_at'";
            let sql = format!(
                "SELECT md5(coalesce(string_agg(({row})::text, E'\\n' ORDER BY ({row})::text), '')) FROM p2p_sync.{name} AS t"
            );
            let sum = self.world.rows(&sql, &[])[0].get(0);
            (name, sum)
        };
        let tables: Vec<_> = names
            .filter(|name| !without.contains(&name.as_str()))
            .map(checksum)
            .collect();
        assert!(tables.len() > 8, "{tables:?}");
        tables
    }

    fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(self.world.endpoint()).expect("an address");
        run(endpoint.connect()).expect("the hub serves")
    }
}

/// Writes what has to be taken.
fn apply(host: &WireHost, operations: &[Operation]) {
    let sealed = host.seal(Lane::Critical, &batch(operations));
    let reply = run(async { host.critical(&host.connect().await, sealed).await }).expect("answered");
    assert_eq!((reply.code(), reply.outcomes.len()), (RejectCode::None, 0), "{reply:?}");
}

/// All that a caller sees of a refusal.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    code: tonic::Code,
    message: String,
    details: Vec<u8>,
    /// Headers and trailers.
    metadata: Vec<(String, String)>,
}

impl Told {
    fn by(status: &Status) -> Self {
        let mut metadata: Vec<_> = status
            .metadata()
            .iter()
            // The second passes.
            .filter(|pair| !matches!(pair, KeyAndValueRef::Ascii(key, _) if key.as_str() == "date"))
            .map(|pair| match pair {
                KeyAndValueRef::Ascii(key, value) => (key.to_string(), format!("{value:?}")),
                KeyAndValueRef::Binary(key, value) => (key.to_string(), format!("{value:?}")),
            })
            .collect();
        metadata.sort();
        Self {
            code: status.code(),
            message: status.message().to_owned(),
            details: status.details().to_vec(),
            metadata,
        }
    }
}

/// Sends a message the way of a lane.
async fn send(channel: &Channel, lane: Lane, sealed: Sealed) -> Result<Sealed, Status> {
    let channel = channel.clone();
    let answer = match lane {
        Lane::Bulk => {
            let stream = BulkClient::new(channel).stream(stream::iter([sealed])).await?;
            let answer = stream.into_inner().message().await?;
            return Ok(answer.expect("each message is answered"));
        }
        Lane::Critical => CriticalClient::new(channel).apply(sealed).await?,
        Lane::Hello => SessionClient::new(channel).hello(sealed).await?,
        Lane::Renew => SessionClient::new(channel).renew(sealed).await?,
        _ => PullClient::new(channel).call(sealed).await?,
    };
    Ok(answer.into_inner())
}

/// As [`send`], again where the hub is asked for too much at a time.
async fn send_on(channel: &Channel, lane: Lane, sealed: Sealed) -> Result<Sealed, Status> {
    loop {
        match send(channel, lane, sealed.clone()).await {
            Err(status) if status.code() == tonic::Code::ResourceExhausted => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            answer => return answer,
        }
    }
}

/// What a host would send by a lane.
fn seal(credential: &Credential, lane: Lane) -> Sealed {
    static SENT: AtomicU64 = AtomicU64::new(1 << 32);
    let label = Label::from_credential(credential, 7, SENT.fetch_add(1, Ordering::Relaxed), new_id(), lane);
    seal_as(&label, lane, |message| {
        message::seal(&credential.to_hub, Direction::ToHub, &label, message)
    })
}

/// What travels by a lane, and would change something where it can.
fn seal_as(label: &Label, lane: Lane, seal: impl FnOnce(&v1::OperationBatch) -> Sealed) -> Sealed {
    let operation = Operation {
        operation_id: label.id.as_bytes().to_vec().into(),
        version: Some(v1::Version {
            tenure: 0,
            incarnation: label.incarnation,
            sequence: label.sequence,
        }),
        path: "payon/MONSTER_DATA/7".to_owned(),
        kind: v1::OperationKind::Put.into(),
        policy_version: 1,
        payload: Some(Payload::Full((&br#"{"monster_id":7,"hp":1}"#[..]).into())),
        ..Operation::default()
    };
    let operations = match lane {
        Lane::Critical | Lane::Bulk => vec![operation],
        _ => vec![],
    };
    seal(&batch(&operations))
}

/// The key that a host seals with, out of its credential's text.
fn key_to_hub(credential: &Credential) -> Vec<u8> {
    let text = credential.to_text();
    let (_, base64) = text.split_once('_').expect("a prefix");
    let bytes = URL_SAFE_NO_PAD.decode(base64).expect("base64");
    let key_at = 1 + usize::from(bytes[0]) + 16 + 4;
    bytes[key_at..key_at + 64].to_vec()
}

/// The right tag, of all its 64 octets, behind what it is right for.
fn with_whole_tag(credential: &Credential, sealed: Sealed) -> Sealed {
    let label = Label::read(&sealed).expect("a label");
    let associated = label.header(Direction::ToHub).associated_data();
    let authenticated = &sealed.body[..sealed.body.len() - 32];
    let tag = Hmac::<Sha512>::new_from_slice(&key_to_hub(credential)[..32])
        .expect("HMAC takes a key of any length")
        .chain_update(&associated)
        .chain_update(authenticated)
        .chain_update((associated.len() as u64 * 8).to_be_bytes())
        .finalize();
    let body = [authenticated, tag.as_bytes()].concat();
    assert_eq!(&body[..sealed.body.len()], &sealed.body[..], "the tag is the right one");
    Sealed {
        body: body.into(),
        ..sealed
    }
}

/// Each bit of the envelope of a short message, and so many of a long one, turned over.
fn flipped(credential: &Credential) -> Vec<Sealed> {
    let short = seal(credential, Lane::Renew);
    let number = |bits: u32, change: &dyn Fn(&mut Sealed, u32)| -> Vec<Sealed> {
        let turned = |bit| {
            let mut sealed = short.clone();
            change(&mut sealed, bit);
            sealed
        };
        (0..bits).map(turned).collect()
    };
    let turn = |bytes: &[u8], bit: u32| {
        let mut bytes = bytes.to_vec();
        bytes[bit as usize / 8] ^= 1 << (bit % 8);
        bytes
    };
    let bits = |bytes: &[u8]| u32::try_from(bytes.len() * 8).expect("short");
    let mut all = number(bits(&short.body), &|sealed, bit| {
        sealed.body = turn(&sealed.body, bit).into();
    });
    all.extend(number(128, &|sealed, bit| {
        sealed.host_id = turn(&sealed.host_id, bit).into();
    }));
    all.extend(number(128, &|sealed, bit| sealed.id = turn(&sealed.id, bit).into()));
    all.extend(number(64, &|sealed, bit| sealed.incarnation ^= 1 << bit));
    all.extend(number(64, &|sealed, bit| sealed.sequence ^= 1 << bit));
    all.extend(number(32, &|sealed, bit| sealed.generation ^= 1 << bit));
    all.extend(number(32, &|sealed, bit| sealed.version ^= 1 << bit));
    all.extend(number(32, &|sealed, bit| sealed.lane ^= 1 << bit));
    // Texts stay texts: what is no text is no message of the protocol, whatever its seal.
    all.extend(number(bits(short.key_id.as_bytes()), &|sealed, bit| {
        if bit % 8 == 7 {
            sealed.key_id.push('a');
        } else {
            sealed.key_id = String::from_utf8(turn(sealed.key_id.as_bytes(), bit)).expect("ASCII");
        }
    }));
    assert!(all.len() > EACH - 20, "every bit of a short message: {}", all.len());

    let long: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(5000).collect();
    let long = Operation {
        payload: Some(Payload::Full(long.into())),
        ..Operation::default()
    };
    let label = Label::read(&short).expect("a label");
    let long = message::seal(&credential.to_hub, Direction::ToHub, &label, &batch(&[long]));
    all.extend(
        std::iter::repeat_with(|| {
            let bit = fastrand::u32(..bits(&long.body));
            Sealed {
                body: turn(&long.body, bit).into(),
                ..long.clone()
            }
        })
        .take(EACH),
    );
    all
}

/// Everything that does not open: what it is, by which lane it is sent, and a thousand of it.
fn unopened(scene: &Scene, revoked: &Credential) -> Vec<(&'static str, Vec<(Lane, Sealed)>)> {
    let credential = scene.host.credential();
    let master = scene.keyring.current();
    let lane = |number: usize| LANES[number % LANES.len()];
    let of = |credential: &dyn Fn(usize) -> Credential| -> Vec<(Lane, Sealed)> {
        (0..EACH)
            .map(|number| (lane(number), seal(&credential(number), lane(number))))
            .collect()
    };
    let by_its_lane = |sealed: Sealed| {
        let lane = Lane::try_from(sealed.lane).unwrap_or(Lane::Renew);
        let served = if LANES.contains(&lane) { lane } else { Lane::Renew };
        (served, sealed)
    };
    let other_master = MasterKey::generate(master.id().clone());
    let tags = (0..=64usize).filter(|&octets| octets != 32).cycle();
    let of_another_length = |(number, octets): (usize, usize)| {
        let whole = with_whole_tag(credential, seal(credential, lane(number)));
        let body = whole.body.slice(..whole.body.len() - 64 + octets);
        (lane(number), Sealed { body, ..whole })
    };
    let long = {
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..)).take(EACH).collect();
        let label = Label::from_credential(credential, 7, 1 << 40, new_id(), Lane::Critical);
        let batch = v1::OperationBatch {
            operations: vec![noise.into()],
            withdrawn: vec![],
        };
        message::seal(&credential.to_hub, Direction::ToHub, &label, &batch)
    };
    let turned = |number: usize| {
        let lane = lane(number);
        let label = Label::from_credential(credential, 7, number as u64, new_id(), lane);
        let (key, direction) = match number % 3 {
            0 => (&credential.to_host, Direction::ToHost),
            1 => (&credential.to_host, Direction::ToHub),
            _ => (&credential.to_hub, Direction::ToHost),
        };
        let sealed = seal_as(&label, lane, |message| message::seal(key, direction, &label, message));
        (lane, sealed)
    };
    let astray = |number: usize| {
        let (sealed_for, sent_by) = (lane(number), lane(number + 1 + number / LANES.len() % 4));
        let sealed = seal(credential, sealed_for);
        let lane = if number.is_multiple_of(2) {
            sealed.lane
        } else {
            sent_by as u32
        };
        (sent_by, Sealed { lane, ..sealed })
    };
    vec![
        ("an unknown host", of(&|_| master.credential(Uuid::new_v4(), 1))),
        ("an unknown key id", {
            let id = |number| KeyId::parse(&format!("unknown-{number}")).expect("a key id");
            of(&|number| MasterKey::generate(id(number)).credential(credential.host_id, 1))
        }),
        (
            "another master key of that id",
            of(&|_| other_master.credential(credential.host_id, 1)),
        ),
        ("a revoked host", of(&|_| revoked.clone())),
        ("a generation that was not given", {
            let generation = |number: usize| 2 + u32::try_from(number).expect("small");
            of(&|number| master.credential(credential.host_id, generation(number)))
        }),
        (
            "a bit turned over",
            flipped(credential).into_iter().map(by_its_lane).collect(),
        ),
        (
            "a right tag of another length",
            (0..EACH).zip(tags).map(of_another_length).collect(),
        ),
        (
            "cut off",
            (0..long.body.len())
                .map(|octets| {
                    let body = long.body.slice(..octets);
                    (Lane::Critical, Sealed { body, ..long.clone() })
                })
                .collect(),
        ),
        ("another lane's", (0..EACH).map(astray).collect()),
        ("the other direction's", (0..EACH).map(turned).collect()),
    ]
}

#[test]
fn invariant_04_of_a_thousand_envelopes_of_each_forgery_none_opens_and_all_are_told_the_same() {
    let scene = Scene::new();
    let revoked = Credential::parse(&scene.world.hub.add_host(3)).expect("the hub gave it");
    scene
        .world
        .hub
        .command(&["hosts", "revoke", &revoked.host_id.to_string()]);
    let channel = scene.channel();
    let before = scene.tables(&[]);
    let first = run(send(&channel, Lane::Pull, seal(&revoked, Lane::Pull))).expect_err("revoked");
    let first = Told::by(&first);
    assert!(
        first.code == tonic::Code::Unauthenticated && first.message.starts_with("E301 NOT_OPENED: "),
        "{first:?}"
    );
    for (what, forgeries) in unopened(&scene, &revoked) {
        assert!(forgeries.len() >= EACH, "{what}: {}", forgeries.len());
        run(
            stream::iter(forgeries).for_each_concurrent(AT_ONCE, async |(lane, sealed)| {
                let status = send_on(&channel, lane, sealed).await.expect_err(what);
                let mut told = Told::by(&status);
                if lane == Lane::Bulk {
                    // A stream was open before: its head is gone already when the first message is read.
                    told.metadata.clone_from(&first.metadata);
                }
                assert_eq!(told, first, "{what} by {lane:?}");
            }),
        );
    }
    // What was sealed as it should be goes on, so that it was not the door that was shut.
    let answer = run(send_on(&channel, Lane::Pull, seal(scene.host.credential(), Lane::Pull)));
    // The hub's own answer, sent back to it.
    let mut reflected = answer.expect("opens");
    let refused = run(send(&channel, Lane::Pull, reflected.clone())).expect_err("sealed for the host");
    assert_eq!(Told::by(&refused), first);
    reflected.body = vec![0; p2p_sync_proto::limits::SEALED_BYTES_MAX + 1].into();
    run(async {
        for _ in 0..20 {
            let refused = send(&channel, Lane::Pull, reflected.clone())
                .await
                .expect_err("too large");
            assert_eq!(refused.code(), tonic::Code::OutOfRange, "{refused}");
        }
    });
    assert_eq!(scene.tables(&[]), before, "no table has changed");
}

#[test]
fn invariant_02_of_a_thousand_replays_none_takes_effect() {
    const RECORDED: usize = 50;
    let mut scene = Scene::new();
    let (host, tenure) = (&scene.host, scene.tenure("payon"));
    let mut recorded: Vec<(Lane, Sealed)> = (0..RECORDED)
        .map(|number| {
            let path = format!("payon/MONSTER_DATA/{}", number % 9);
            let mut operation = host.operation(100 + number as u64, &path, Some(r#"{"monster_id":7,"hp":2}"#));
            operation.version.as_mut().expect("set").tenure = tenure;
            let lane = if number % 2 == 0 { Lane::Critical } else { Lane::Bulk };
            (lane, host.seal(lane, &batch(&[operation])))
        })
        .collect();
    recorded.push((Lane::Renew, host.seal(Lane::Renew, &v1::RenewRequest { counter: 1 })));
    let channel = scene.channel();
    run(async {
        for (lane, sealed) in &recorded {
            send_on(&channel, *lane, sealed.clone()).await.expect("taken");
        }
    });
    let before = scene.tables(&[]);
    let code = |lane: Lane, answer: Sealed| {
        let label = Label::read(&answer).expect("the hub's label");
        let key = &host.credential().to_host;
        match lane {
            Lane::Renew => {
                message::open::<v1::RenewReply>(key, Direction::ToHost, &label, &answer).map(|told| told.code())
            }
            _ => message::open::<v1::BatchReply>(key, Direction::ToHost, &label, &answer).map(|told| told.code()),
        }
        .expect("sealed for the host")
    };
    let replays = recorded.iter().cycle().take(EACH).cloned();
    run(
        stream::iter(replays).for_each_concurrent(AT_ONCE, async |(lane, sealed)| {
            let answer = send_on(&channel, lane, sealed).await.expect("answered");
            assert_eq!(code(lane, answer), RejectCode::Replay, "{lane:?}");
        }),
    );
    assert_eq!(scene.tables(&[]), before, "no table has changed");

    // What was in memory is gone; what was settled is not.
    scene.world.hub.kill();
    scene.world.hub.start();
    let (channel, before) = (scene.channel(), scene.tables(&[]));
    run(
        stream::iter(recorded).for_each_concurrent(AT_ONCE, async |(lane, sealed)| {
            let answer = send_on(&channel, lane, sealed).await.expect("answered");
            let expected = if lane == Lane::Renew {
                RejectCode::Replay
            } else {
                RejectCode::None
            };
            assert_eq!(code(lane, answer), expected, "{lane:?}");
        }),
    );
    assert_eq!(scene.tables(&[]), before, "no table has changed");
}

type Make = dyn Fn(&WireHost, u64) -> Operation;

/// An operation of a host that it must not write, or that is none, and what is said of it.
struct Forged {
    what: &'static str,
    make: Box<Make>,
    told: (OutcomeState, RejectCode),
}

fn forged(
    what: &'static str,
    told: (OutcomeState, RejectCode),
    make: impl Fn(&WireHost, u64) -> Operation + 'static,
) -> Forged {
    let make = Box::new(make);
    Forged { what, make, told }
}

fn on_map(host: &WireHost, sequence: u64, map: &str, tenure: u64) -> Operation {
    let path = format!("{map}/MONSTER_DATA/{}", sequence % 9);
    let mut operation = host.operation(sequence, &path, Some(r#"{"monster_id":7,"hp":1}"#));
    operation.version.as_mut().expect("set").tenure = tenure;
    operation
}

const PLAYER: &str = "@char/7/PLAYER_DATA";

/// Character 7 comes to a map.
fn comes(host: &WireHost, sequence: u64, map: &str) -> Operation {
    let event = r#"{"event":"enter","char_id":7}"#;
    Operation {
        account_id: 2_000_007,
        map: map.to_owned(),
        ..host.operation(sequence, "@char/7/PLAYER_PRESENCE", Some(event))
    }
}

/// All kinds of operations that must change nothing. The sequence makes each another one.
fn forged_operations(scene: &Scene) -> Vec<Forged> {
    use OutcomeState::{Limbo, Rejected};
    let [prontera, payon, geffen] = ["prontera", "payon", "geffen"].map(|map| scene.tenure(map));
    let other = scene.other.credential().host_id;
    let foreign = (Rejected, RejectCode::NotLeaseHolder);
    let spoilt = move |what, code, payload: fn(u64) -> String| {
        forged(what, (Rejected, code), move |host, sequence| {
            let mut operation = on_map(host, sequence, "payon", payon);
            operation.payload = Some(Payload::Full(payload(sequence).into()));
            operation
        })
    };
    vec![
        forged("another host's metrics", foreign, move |host, sequence| {
            host.operation(sequence, &format!("@host/{other}/HOST_METRICS"), Some(r#"{"cpu":1}"#))
        }),
        forged("another host's map", foreign, |host, sequence| {
            on_map(host, sequence, "geffen", 0)
        }),
        forged("another host's map under its tenure", foreign, move |host, sequence| {
            on_map(host, sequence, "geffen", geffen)
        }),
        forged("nobody's map", foreign, |host, sequence| {
            on_map(host, sequence, "nowhere", sequence % 3)
        }),
        forged(
            "a lost map under the new holder's tenure",
            foreign,
            move |host, sequence| on_map(host, sequence, "prontera", prontera),
        ),
        forged(
            "a passed tenure",
            (Limbo, RejectCode::StaleTenure),
            move |host, sequence| on_map(host, sequence, "prontera", prontera - 1),
        ),
        forged(
            "a player on another host's map",
            (Rejected, RejectCode::PlayerNotHere),
            |host, sequence| host.operation(sequence, PLAYER, Some(r#"{"char_id":7,"zeny":6}"#)),
        ),
        forged(
            "another host's player, under a tenure of its own choice",
            foreign,
            |host, sequence| {
                let mut operation = host.operation(sequence, PLAYER, Some(r#"{"char_id":7,"zeny":7}"#));
                operation.version.as_mut().expect("set").tenure = 1 << 60;
                operation
            },
        ),
        forged(
            "that another host's player has left",
            (Rejected, RejectCode::PlayerNotHere),
            |host, sequence| {
                let left = r#"{"event":"leave","char_id":7}"#;
                host.operation(sequence, "@char/7/PLAYER_PRESENCE", Some(left))
            },
        ),
        forged(
            "that a player who stays there has come here",
            (OutcomeState::NotYet, RejectCode::NotYetSettled),
            |host, sequence| comes(host, sequence, "payon"),
        ),
        spoilt("too deep", RejectCode::TooDeep, |sequence| {
            let depth = 33 + usize::try_from(sequence % 900).expect("small");
            "[".repeat(depth) + &"]".repeat(depth)
        }),
        spoilt("a key that stands twice", RejectCode::DuplicateKey, |sequence| {
            match sequence % 3 {
                0 => format!(r#"{{"hp":{sequence},"hp":1}}"#),
                1 => format!(r#"{{"hp":1,"at":{{"x":1,"y":2,"x":{sequence}}}}}"#),
                _ => format!(r#"{{"hp":1,"h\u0070":{sequence}}}"#),
            }
        }),
        spoilt("a NUL", RejectCode::BadText, |sequence| match sequence % 2 {
            0 => format!(r#"{{"hp":1,"name":"\u0000{sequence}"}}"#),
            _ => format!(r#"{{"hp":1,"n\u0000":{sequence}}}"#),
        }),
        spoilt("half a surrogate pair", RejectCode::BadText, |sequence| {
            match sequence % 4 {
                0 => format!(r#"{{"hp":1,"name":"\ud800{sequence}"}}"#),
                1 => format!(r#"{{"hp":1,"name":"{sequence}\udfff"}}"#),
                2 => format!(r#"{{"hp":{sequence},"name":"\udbff\u0041"}}"#),
                _ => format!(r#"{{"hp":{sequence},"name":"\ud800\ud800"}}"#),
            }
        }),
        spoilt("too large", RejectCode::TooLarge, |_| " ".repeat(262_145)),
    ]
}

#[test]
fn invariant_04_of_a_thousand_operations_of_each_forgery_none_changes_a_row_of_state() {
    const SINGLE: usize = 20;
    let scene = Scene::new();
    let host = &scene.host;
    let before = scene.tables(&NOTES);
    let mut sequence = 100;
    for Forged { what, make, told } in forged_operations(&scene) {
        let mut operations: Vec<Operation> = (0..EACH)
            .map(|_| {
                sequence += 1;
                make(host, sequence)
            })
            .collect();
        // As many as a message takes.
        let bytes = operations[0].encoded_len();
        let together = (1_900_000 / bytes).min(490);
        let alone: Vec<_> = operations
            .split_off(EACH - SINGLE)
            .into_iter()
            .map(|one| vec![one])
            .collect();
        let messages: Vec<(Lane, Vec<Operation>)> = operations
            .chunks(together)
            .map(<[_]>::to_vec)
            .chain(alone)
            .zip([Lane::Critical, Lane::Bulk].into_iter().cycle())
            .map(|(operations, lane)| (lane, operations))
            .collect();
        run(async {
            let channel = host.connect().await;
            for (lane, operations) in messages {
                let reply = loop {
                    let sealed = host.seal(lane, &batch(&operations));
                    let reply = match lane {
                        Lane::Bulk => host
                            .bulk(&channel, vec![sealed])
                            .await
                            .map(|mut replies| replies.remove(0)),
                        _ => host.critical(&channel, sealed).await,
                    };
                    let reply = reply.expect("answered");
                    // Players' comings and goings have a rate of their own: a message's worth takes a second.
                    let mut codes = reply.outcomes.iter().map(v1::Outcome::code);
                    if codes.any(|code| code == RejectCode::RateLimited) {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    } else if reply.code() == RejectCode::RateLimited {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    } else {
                        break reply;
                    }
                };
                assert_eq!(
                    (reply.code(), reply.outcomes.len()),
                    (RejectCode::None, operations.len()),
                    "{what}: {}",
                    reply.message
                );
                for outcome in &reply.outcomes {
                    assert_eq!((outcome.state(), outcome.code()), told, "{what}: {}", outcome.message);
                }
            }
        });
        assert_eq!(scene.tables(&NOTES), before, "{what}: no table of state has changed");
    }
    // What it may write, it still writes.
    scene.write_once_more();
    assert_ne!(scene.tables(&NOTES), before);
}

impl Scene {
    fn write_once_more(&self) {
        let operation = on_map(&self.host, 1 << 40, "payon", self.tenure("payon"));
        apply(&self.host, &[operation]);
    }
}
