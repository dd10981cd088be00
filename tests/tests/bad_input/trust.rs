//! Hosts that forge, and what becomes of them: a hub on a Postgres server, its table of verdicts, and its locks.

use std::{path::Path, time::Duration};

use p2p_sync_proto::{
    Code,
    ids::new_id,
    keys::Credential,
    v1::{self, SyncDataType, pull_reply, pull_request::What},
};
use p2p_sync_tests::{
    recording::{Happening, recorded},
    services::{Database, database, wait_until},
    stack::{Agent, Hub, HubDatabase},
};
use prost::{Message, bytes::Bytes};
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    door::{Folder, program},
    forger::{Forger, full, good},
};

/// A lock, and new rules, take hold within it.
const TAKES_HOLD: Duration = Duration::from_secs(5);

struct World {
    hub: Hub,
    sql: Client,
    folder: Folder,
    _database: Database,
}

impl World {
    async fn new(settings: &[(&str, String)]) -> Self {
        let (folder, database) = (Folder::new(), database().await);
        let server = HubDatabase::Server(database.url().to_owned());
        let mut hub = Hub::new(program(), &folder.path("hub"), &server, settings);
        hub.start();
        Self {
            hub,
            sql: database.client().await,
            folder,
            _database: database,
        }
    }

    async fn forger(&self) -> (Forger, Uuid, String) {
        let text = self.hub.add_host(1);
        let credential = Credential::parse(&text).expect("the hub's");
        let host_id = credential.host_id;
        (Forger::new(self.hub.address(), credential).await, host_id, text)
    }

    /// One text by SQL, about a host.
    async fn text(&self, sql: &str, host_id: Uuid) -> String {
        let row = self.sql.query_one(sql, &[&host_id]).await.expect("valid SQL");
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }

    async fn status(&self, host_id: Uuid) -> String {
        self.text("SELECT status FROM p2p_sync.hosts WHERE host_id = $1", host_id)
            .await
    }

    /// The verdicts on a host, by verdict and rule, with what they count.
    async fn verdicts(&self, host_id: Uuid) -> String {
        let sql = "SELECT string_agg(concat_ws(' ', verdict, rule, operations), ', ' ORDER BY verdict, rule) FROM ( \
            SELECT verdict, rule, sum(coalesce((details ->> 'operations')::bigint, 1)) AS operations \
            FROM p2p_sync.security_validations WHERE host_id = $1 GROUP BY verdict, rule) AS v";
        self.text(sql, host_id).await
    }

    async fn until_verdicts(&self, host_id: Uuid, expected: &str) {
        let told = async || self.verdicts(host_id).await == expected;
        wait_until(TAKES_HOLD, expected, told).await;
    }
}

fn encoded(operations: impl IntoIterator<Item = v1::Operation>) -> Vec<Bytes> {
    operations.into_iter().map(|op| op.encode_to_vec().into()).collect()
}

/// A position of a recorded player.
fn position(sequence: u64, happening: &Happening, payload: &str) -> v1::Operation {
    v1::Operation {
        path: happening.path().expect("valid"),
        map: happening.map.clone(),
        account_id: happening.account_id,
        payload: Some(full(payload)),
        ..good(sequence)
    }
}

fn moves_of_one_player() -> Vec<Happening> {
    let moves = recorded().into_iter().filter(|happening| {
        let payload = happening.payload.as_deref().unwrap_or_default();
        happening.data_type == SyncDataType::PlayerPosition && payload.contains(r#""char_id":150007,"#)
    });
    moves.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_forges_is_refused_found_and_locked_and_its_outbox_waits_until_it_is_unlocked() {
    let world = World::new(&[("forgery_lock_threshold", "60".to_owned())]).await;
    let (forger, host_id, credential) = world.forger().await;
    let (honest, honest_id, _) = world.forger().await;
    // Opened before the lock, and heard: the hub remembers the host.
    let (batches, mut answers) = forger.stream().await;
    batches.send(forger.batch(encoded([good(1)]))).await.expect("open");
    answers.message().await.expect("no error").expect("an answer");

    let recorded = moves_of_one_player();
    let impossible = |happening: &Happening| {
        let mut data: Value = serde_json::from_str(happening.payload.as_deref().expect("a PUT")).expect("JSON");
        data["hp"] = (data["max_hp"].as_u64().expect("recorded") + 1).into();
        data.to_string()
    };
    let mut sent = 0;
    for (sequence, happening) in (2..).zip(&recorded).take(50) {
        let op = position(sequence, happening, &impossible(happening));
        let reply = forger.apply(encoded([op])).await;
        assert_eq!(reply.outcomes[0].code(), Code::ImpossibleValue, "{reply:?}");
        assert!(
            reply.outcomes[0].message.starts_with("/hp: is more than max_hp"),
            "{reply:?}"
        );
        sent += 1;
    }
    world.until_verdicts(host_id, "refused IMPOSSIBLE_VALUE 50").await;
    assert_eq!(world.status(host_id).await, "active", "not yet");
    let foreign = |n: u64| v1::Operation {
        path: format!("@host/{honest_id}/HOST_METRICS"),
        ..good(100 + n)
    };
    let reply = forger.apply(encoded((0..10).map(foreign))).await;
    assert!(
        reply
            .outcomes
            .iter()
            .all(|outcome| outcome.code() == Code::NotLeaseHolder),
        "{reply:?}"
    );
    sent += 10;
    assert!(sent <= 100);

    let is_locked = async || world.status(host_id).await == "locked";
    wait_until(TAKES_HOLD, "the host is locked", is_locked).await;
    assert_eq!(
        world.verdicts(host_id).await,
        "refused IMPOSSIBLE_VALUE 50, refused NOT_LEASE_HOLDER 10, refused automatic_lock 60"
    );
    let states = "SELECT string_agg(path, ' ') FROM p2p_sync.states WHERE host_id = $1";
    assert_eq!(
        world.text(states, host_id).await,
        "prontera/MONSTER_DATA/7",
        "nothing forged is stored"
    );
    // On the stream that is open, and on a new call.
    let mut sequence = 200;
    let is_out = async || {
        sequence += 1;
        // The stream may have ended.
        let _ = batches.send(forger.batch(encoded([good(sequence)]))).await;
        let answer = answers.message().await;
        answer.is_err_and(|status| status.code() == tonic::Code::Unauthenticated)
    };
    wait_until(TAKES_HOLD, "the stream ends", is_out).await;
    let turned_away = forger.pull(None).await.expect_err("locked");
    assert_eq!(turned_away.code(), tonic::Code::Unauthenticated);
    assert_eq!(
        honest.apply(encoded([good(1)])).await.code(),
        Code::None,
        "others go on"
    );

    let shown = world.hub.command(&["hosts", "show", &host_id.to_string()]);
    assert!(
        shown.contains(&format!("{host_id} locked account=1"))
            && shown.contains("refused NOT_LEASE_HOLDER rows=1 operations=10"),
        "{shown}"
    );
    let listed = world
        .hub
        .command(&["hosts", "verdicts", &host_id.to_string(), "--limit", "2"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert!(
        lines.len() == 2 && lines[0].contains(" refused automatic_lock path= ") && lines[1].contains("@host/"),
        "{listed}"
    );

    // The same host's agent: what it takes waits, and is there once the host is let in.
    let mut agent = Agent::new(
        program(),
        &world.folder.path("agent"),
        world.hub.address(),
        &credential,
        &[],
    );
    agent.start();
    let kept = Happening {
        payload: Some(r#"{"users":3}"#.to_owned()),
        data_type: SyncDataType::MapState,
        ..recorded[0].clone()
    };
    assert!(agent.submit(1, &kept));
    assert!(!agent.flush(Duration::from_secs(2)), "a locked host's operations wait");
    world.hub.command(&["hosts", "unlock", &host_id.to_string()]);
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert_eq!(agent.ledger().count("APPLIED"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_04_what_waited_for_its_turn_is_not_written_for_a_host_that_was_locked_meanwhile() {
    let world = World::new(&[]).await;
    let (forger, host_id, _) = world.forger().await;
    let (batches, _answers) = forger.stream().await;
    // The first message stands in Postgres, the second behind it in the hub.
    let hold = "BEGIN; LOCK TABLE p2p_sync.map_states IN ACCESS EXCLUSIVE MODE";
    world.sql.batch_execute(hold).await.expect("locks");
    for sequence in [1, 2] {
        let batch = forger.batch(encoded([good(sequence)]));
        batches.send(batch).await.expect("open");
    }
    let waits = async || {
        let waiting =
            "SELECT count(*)::text FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND $1::uuid IS NOT NULL";
        world.text(waiting, host_id).await == "1"
    };
    wait_until(TAKES_HOLD, "the first message waits", waits).await;
    world.hub.command(&["hosts", "lock", &host_id.to_string()]);
    tokio::time::sleep(TAKES_HOLD).await;
    world.sql.batch_execute("COMMIT").await.expect("lets go");
    let settled = async || {
        let settled = "SELECT settled::text FROM p2p_sync.settled_sequences WHERE host_id = $1";
        let row = world.sql.query_opt(settled, &[&host_id]).await.expect("valid SQL");
        row.map_or_else(String::new, |row| row.get(0))
    };
    wait_until(TAKES_HOLD, "the first is written", async || !settled().await.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(settled().await, "{[1,2)}", "the second is not");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_and_a_revocation_take_hold_on_open_streams_and_a_revoked_host_is_not_unlocked() {
    let world = World::new(&[]).await;
    for command in ["lock", "revoke"] {
        let (forger, host_id, _) = world.forger().await;
        let host = host_id.to_string();
        let (batches, mut answers) = forger.stream().await;
        batches.send(forger.batch(encoded([good(1)]))).await.expect("open");
        answers.message().await.expect("no error").expect("an answer");
        world.hub.command(&["hosts", command, &host]);
        let mut sequence = 1;
        let is_out = async || {
            sequence += 1;
            // The stream may have ended.
            let _ = batches.send(forger.batch(encoded([good(sequence)]))).await;
            answers.message().await.is_err()
        };
        wait_until(TAKES_HOLD, "the stream ends", is_out).await;
    }
    let (_, host_id, _) = world.forger().await;
    let host = host_id.to_string();
    world.hub.command(&["hosts", "revoke", &host]);
    let config = world.folder.path("hub/p2p_sync_proxy.conf");
    for command in ["unlock", "lock"] {
        let told = crate::door::run("proxy", &["hosts", command, &host], &config, "");
        told.is_refused(&[("E303 REVOKED: ", "admit the machine anew")]);
    }
    let unknown = Uuid::new_v4().to_string();
    let told = crate::door::run("proxy", &["hosts", "verdicts", &unknown], &config, "");
    told.is_refused(&[("E221 NOT_FOUND: ", "hosts list")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn movement_is_stored_and_flagged_with_its_evidence_and_reports_are_the_hosts_word() {
    let world = World::new(&[]).await;
    let (forger, host_id, _) = world.forger().await;
    let recorded = moves_of_one_player();
    let mut sequence = 0;
    // As it was recorded, in batches as a bad line has them.
    for batch in recorded.chunks(5).take(4) {
        let honest = batch.iter().map(|happening| {
            sequence += 1;
            position(sequence, happening, happening.payload.as_deref().expect("a PUT"))
        });
        let reply = forger.apply(encoded(honest.collect::<Vec<_>>())).await;
        assert!(
            reply
                .outcomes
                .iter()
                .all(|outcome| outcome.state() == v1::OutcomeState::Superseded),
            "{reply:?}"
        );
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    let report = v1::Operation {
        path: format!("@host/{host_id}/SECURITY_VALIDATION"),
        payload: Some(full(
            r#"{"account_id":2000021,"check":"move_speed","verdict":"refused"}"#,
        )),
        operation_id: new_id().as_bytes().to_vec().into(),
        ..good(1000)
    };
    forger.apply(encoded([report.clone()])).await;
    world.until_verdicts(host_id, "reported by host report 1").await;
    forger.apply(encoded([report])).await;

    sequence = 1000;
    for (n, happening) in recorded.iter().skip(20).take(100).enumerate() {
        sequence += 1;
        let mut data: Value = serde_json::from_str(happening.payload.as_deref().expect("a PUT")).expect("JSON");
        data["x"] = (n * 97 % 400).into();
        let op = position(sequence, happening, &data.to_string());
        let reply = forger.apply(encoded([op])).await;
        assert!(reply.outcomes.is_empty(), "movement is never refused: {reply:?}");
    }
    world
        .until_verdicts(host_id, "flagged movement_teleport 1, reported by host report 1")
        .await;
    let evidence = "SELECT details::text FROM p2p_sync.security_validations \
        WHERE host_id = $1 AND verdict = 'flagged' AND path LIKE '%/PLAYER_POSITION/150007' AND operation_id IS NOT NULL";
    let details: Value = serde_json::from_str(&world.text(evidence, host_id).await).expect("JSON");
    assert!(
        details["cells"].as_u64() > Some(20) && details["score"].as_u64() > Some(0) && details["ms_per_cell"] == 150,
        "{details}"
    );
    assert_eq!(details["from"]["map"], details["to"]["map"], "{details}");
    let reported =
        "SELECT details::text FROM p2p_sync.security_validations WHERE host_id = $1 AND verdict = 'reported by host'";
    let told: Value = serde_json::from_str(&world.text(reported, host_id).await).expect("JSON");
    assert_eq!(
        told,
        json!({"report": {"account_id": 2_000_021, "check": "move_speed", "verdict": "refused"}})
    );
    assert_eq!(world.status(host_id).await, "active", "neither locks a host");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_types_file_holds_without_a_restart_and_a_bad_one_is_told_and_left() {
    let (types, schema) = ("types.toml", "drop.json");
    let text = |version: u32, rules: &str| {
        format!(
            "version = {version}\n[ITEM_DROP]\nowner = 'map'\nkeep = 'latest'\nentity_key = 'drop_id'\n\
             schema = '{schema}'\n{rules}\n"
        )
    };
    let bounded = |most: u32| {
        json!({"properties": {"amount": {"maximum": most}, "max_amount": {}}, "type": "object"}).to_string()
    };
    let (folder, database) = (Folder::new(), database().await);
    let server = HubDatabase::Server(database.url().to_owned());
    // No host is locked for what is refused again and again below.
    let settings = [
        ("types_file", types.to_owned()),
        ("forgery_lock_threshold", "0".to_owned()),
    ];
    let mut hub = Hub::new(program(), &folder.path("hub"), &server, &settings);
    let write = |name: &str, text: &str| std::fs::write(folder.path("hub").join(name), text).expect("written");
    write(types, &text(2, ""));
    write(schema, &bounded(10));
    let credential = Credential::parse(&hub.add_host(1)).expect("the hub's");
    let forger = Forger::new(&hub.start(), credential).await;
    let mut sequence = 0;
    let mut code = async |payload: &str, policy_version| {
        sequence += 1;
        let op = v1::Operation {
            path: "prontera/ITEM_DROP/7".to_owned(),
            payload: Some(full(payload)),
            policy_version,
            ..good(sequence)
        };
        let reply = forger.apply(encoded([op])).await;
        reply.outcomes.first().map_or(Code::None, v1::Outcome::code)
    };
    assert_eq!(code(r#"{"amount":11}"#, 2).await, Code::ImpossibleValue);

    // By itself: a schema, with nothing said of it.
    write(schema, &bounded(11));
    wait_until(TAKES_HOLD * 2, "the schema is taken", async || {
        code(r#"{"amount":11}"#, 2).await == Code::None
    })
    .await;

    // A bad one: all that is wrong with it is told, and what held holds on.
    write(types, &text(3, "rules = ['amount <= max_amuont']\nkep = 'every'"));
    hangup(hub.pid());
    let is_told = async || {
        let log = hub.log();
        log.contains("did you mean max_amount?") && log.contains("kep: is unknown; did you mean keep?")
    };
    wait_until(TAKES_HOLD, "the mistakes are told", is_told).await;
    assert_eq!(code(r#"{"amount":11,"max_amount":1}"#, 2).await, Code::None);
    assert_eq!(forger.hello(1).await.policies.expect("newer ones").version, 2);

    // At once, and known to the next session.
    write(types, &text(3, "rules = ['amount <= max_amount']"));
    hangup(hub.pid());
    let holds = async || code(r#"{"amount":11,"max_amount":1}"#, 2).await == Code::ImpossibleValue;
    wait_until(TAKES_HOLD, "the rule holds", holds).await;
    assert_eq!(forger.hello(1).await.policies.expect("newer ones").version, 3);
    assert_eq!(code(r#"{"amount":1}"#, 1).await, Code::Repolicy, "two versions ago");
    assert!(
        Path::new(&format!("/proc/{}", hub.pid())).exists(),
        "the hub was not ended by the signal"
    );
}

fn hangup(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    rustix::process::kill_process(pid.expect("a process"), rustix::process::Signal::HUP).expect("it runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_04_a_host_that_goes_on_writing_maps_and_players_of_others_is_locked() {
    let settings = [
        ("leases", "required".to_owned()),
        ("trespass_lock_threshold", "50".to_owned()),
    ];
    let world = World::new(&settings).await;
    let (forger, host_id, _) = world.forger().await;
    let foreign_player = |sequence| v1::Operation {
        path: "@char/7/PLAYER_DATA".to_owned(),
        payload: Some(full(r#"{"char_id":7,"zeny":5}"#)),
        ..good(sequence)
    };
    for (operations, code) in [
        (encoded((1..=30).map(good)), Code::NotLeaseHolder),
        (encoded((31..=49).map(foreign_player)), Code::PlayerNotHere),
    ] {
        for _ in 0..5 {
            // Sealed anew each time: what is told again counts once.
            let reply = forger.apply(operations.clone()).await;
            assert!(reply.outcomes.iter().all(|outcome| outcome.code() == code), "{reply:?}");
        }
    }
    world
        .until_verdicts(host_id, "refused foreign_map 30, refused foreign_player 19")
        .await;
    assert_eq!(world.status(host_id).await, "active", "not yet");
    forger.apply(encoded([good(50)])).await;
    let is_locked = async || world.status(host_id).await == "locked";
    wait_until(TAKES_HOLD, "the host is locked", is_locked).await;
    let states = "SELECT count(*)::text FROM p2p_sync.states WHERE host_id = $1";
    assert_eq!(world.text(states, host_id).await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_host_says_of_itself_and_of_others_no_other_host_reads() {
    let world = World::new(&[]).await;
    let (teller, teller_id, _) = world.forger().await;
    let (reader, _, _) = world.forger().await;
    let path = format!("@host/{teller_id}/HOST_METRICS");
    let metrics = v1::Operation {
        path: path.clone(),
        payload: Some(full(r#"{"cpu":5}"#)),
        ..good(1)
    };
    let reply = teller.apply(encoded([metrics, good(2)])).await;
    assert!(reply.outcomes.is_empty(), "{reply:?}");
    let questions = || {
        [
            What::Get(v1::Get {
                path: path.clone(),
                ..Default::default()
            }),
            What::Scan(v1::Scan::default()),
            What::ChangesSince(v1::ChangesSince {
                stream: "@host".to_owned(),
                ..Default::default()
            }),
        ]
    };
    let read = async |host: &Forger, what| {
        let reply = host.pull(Some(what)).await.expect("answered");
        let paths: Vec<String> = match reply.what {
            Some(pull_reply::What::State(state)) => vec![state.path],
            Some(pull_reply::What::Page(page)) => page.states.into_iter().map(|state| state.path).collect(),
            _ => vec![],
        };
        (v1::RejectCode::try_from(reply.code).expect("known"), paths)
    };
    let world_state = "prontera/MONSTER_DATA/7".to_owned();
    let own = [
        vec![path.clone()],
        vec![path.clone(), world_state.clone()],
        vec![path.clone()],
    ];
    let others = [vec![], vec![world_state], vec![]];
    for ((question, own), others) in questions().into_iter().zip(own).zip(others) {
        assert_eq!(read(&teller, question.clone()).await, (Code::None, own));
        let is_get = matches!(question, What::Get(_));
        let code = if is_get { Code::NotAllowed } else { Code::None };
        assert_eq!(read(&reader, question).await, (code, others));
    }
}
