//! A hub on its own Postgres: whom it lets in, and what both programs say with it.

use p2p_sync_proto::keys::{Credential, MasterKey};
use p2p_sync_proxy::keyring::Keyring;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    door::{Folder, Told, run, tells},
    forger::{Forger, embedded},
};

/// What an agent says, run once against a hub.
fn agent(folder: &Folder, endpoint: &str, credential: &str, args: &[&str]) -> Told {
    let outbox = Uuid::new_v4();
    let text = format!("main_server_endpoint = {endpoint}\nencryption_key = {credential}\noutbox_path = {outbox}\n");
    folder.agent(&text, args)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_not_admitted_gets_one_and_the_same_answer() {
    let folder = Folder::new();
    let mut hub = embedded(&folder, &[]);
    let [admitted, revoked, locked] = [1, 2, 3].map(|account| hub.add_host(account));
    let host_of = |text: &str| Credential::parse(text).expect("the hub's").host_id;
    for (credential, command) in [(&revoked, "revoke"), (&locked, "lock")] {
        hub.command(&["hosts", command, &host_of(credential).to_string()]);
    }
    let keyring = Keyring::load(&folder.path("hub/database/keyring")).expect("made with the database");
    let address = hub.start();

    let other_master = MasterKey::generate(keyring.current().id().clone());
    let strangers = [
        ("unknown", keyring.current().credential(Uuid::new_v4(), 1)),
        ("revoked", Credential::parse(&revoked).expect("the hub's")),
        ("locked", Credential::parse(&locked).expect("the hub's")),
        ("wrong key", other_master.credential(host_of(&admitted), 1)),
        ("renewed since", keyring.current().credential(host_of(&admitted), 2)),
    ];
    let mut answers = Vec::new();
    for (who, credential) in strangers {
        let forger = Forger::new(&address, credential).await;
        let status = forger.pull(None).await.expect_err(who);
        answers.push((who, status.code(), status.message().to_owned()));
    }
    assert!(
        answers[0].2.starts_with("E301 NOT_OPENED: ") && answers[0].2.contains("ask the operator"),
        "{answers:?}"
    );
    let first = answers[0].clone();
    assert!(
        answers
            .iter()
            .all(|answer| (answer.1, &answer.2) == (first.1, &first.2)),
        "{answers:?}"
    );

    let get = ["get", "prontera/MAP_STATE"];
    let told = agent(&folder, &address, &revoked, &get);
    told.is_refused(&[(
        "E301 NOT_OPENED: ",
        "or the host is locked or revoked: ask the hub's operator",
    )]);
    let told = agent(&folder, &format!("{address}/elsewhere"), &admitted, &get);
    told.is_refused(&[("E107 BAD_ENDPOINT: ", "check host, port and path")]);
    agent(&folder, &address, &admitted, &get).is_refused(&[("E221 NOT_FOUND: ", "prontera/MAP_STATE")]);
}

#[test]
fn a_schema_violation_comes_back_to_the_command_line_and_stays_as_a_dead_letter() {
    let folder = Folder::new();
    let mut hub = embedded(&folder, &[]);
    let credential = hub.add_host(1);
    let address = hub.start();
    let config = format!("main_server_endpoint = {address}\nencryption_key = {credential}\noutbox_path = outbox\n");
    let bad = r#"{"monster_id":7,"hp":"three"}"#;
    let told = folder.agent(&config, &["put", "MONSTER_DATA", "--map", "prontera", bad]);
    assert_eq!(told.exit_code, Some(1), "{told:?}");
    let settled: Value = serde_json::from_str(&told.out).expect("JSON");
    assert_eq!(
        (&settled["state"], &settled["code"]),
        (&"REJECTED".into(), &209.into()),
        "{settled}"
    );
    assert!(
        settled["error"].as_str().unwrap_or_default().starts_with("/hp: "),
        "{settled}"
    );

    let told = folder.agent(&config, &["dead-letters"]);
    let letters: Value = serde_json::from_str(&told.out).expect("JSON");
    let letter = &letters["dead_letters"][0];
    assert_eq!(
        (&letter["label"], &letter["error"]),
        (&"SCHEMA_VIOLATION".into(), &settled["error"]),
        "{letters}"
    );
    assert_eq!(
        letter["data"],
        serde_json::from_str::<Value>(bad).expect("JSON"),
        "{letters}"
    );
}

#[test]
fn a_data_directory_in_use_is_told_and_redis_out_of_reach_does_not_stop_the_hub() {
    let folder = Folder::new();
    let redis = [("redis_host", "127.0.0.1".to_owned()), ("redis_port", "1".to_owned())];
    let mut hub = embedded(&folder, &redis);
    let credential = hub.add_host(1);
    let address = hub.start();
    let put = agent(
        &folder,
        &address,
        &credential,
        &["put", "MAP_STATE", "--map", "prontera", r#"{"users":1}"#],
    );
    assert!(put.exit_code == Some(0) && put.out.contains("\"APPLIED\""), "{put:?}");

    let second = proxy(&folder, "serve");
    second.is_refused(&[(
        "E108 DATA_DIRECTORY_IN_USE: another proxy uses the data directory ",
        "stop it, or choose another directory",
    )]);
    hub.stop();
    let checked = proxy(&folder, "check");
    assert_eq!(checked.exit_code, Some(1), "{checked:?}");
    tells(&checked.out, ("database: ok", "schema version"));
    let unreachable = "redis: E113 REDIS_UNREACHABLE: Redis at 127.0.0.1:1 cannot be reached (";
    tells(
        &checked.out,
        (
            unreachable,
            "check redis_host, redis_port and redis_password; the proxy serves without it",
        ),
    );
}

/// Runs the program of the hub that [`embedded`] made.
fn proxy(folder: &Folder, command: &str) -> Told {
    run(
        "proxy",
        &[command, "--embedded"],
        &folder.path("hub/p2p_sync_proxy.conf"),
        "",
    )
}
