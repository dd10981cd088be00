//! Whom a host trusts, and what it says where it does not.

use std::time::Duration;

use p2p_sync_tests::stack::Agent;
use serde_json::json;

use crate::{
    authority::Claims,
    world::{World, chat, link_problem, put_critical, run, until, until_up},
};

#[test]
fn a_host_syncs_over_tls_with_a_private_ca() {
    let mut world = World::new();
    let endpoint = world.hub.start();
    assert_eq!(endpoint, format!("https://127.0.0.1:{}", world.port));
    let mut agent = world.host("host", &endpoint);
    agent.start();
    for number in 0..200 {
        assert!(agent.submit(number, &chat(number)));
    }
    until_up(&mut agent);
    // The critical lane's connection, and the one for reading.
    put_critical(&agent, 3);
    let got = agent.ask(json!({"do": "get", "path": "prontera/MAP_STATE"}));
    assert_eq!(got["data"]["users"], 3, "{got}");
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert!(world.stored() >= 200);

    let (told, well) = run("agent", &["check"], agent.config(), &[]);
    let days = "valid until 2090-01-01, ";
    assert!(
        well && told.contains(&format!("tls: ok (127.0.0.1, localhost, {days}"))
            || told.contains(&format!("tls: ok (localhost, 127.0.0.1, {days}")),
        "{told}"
    );
    assert!(told.contains(" days left)"), "{told}");
    let (told, well) = run("proxy", &["check"], world.hub.config(), &[]);
    assert!(
        well && told.contains("tls: ok (127.0.0.1, localhost, valid until 2090-01-01, "),
        "{told}"
    );

    // Without an agent: the way of one question.
    agent.stop();
    let (told, well) = run("agent", &["get", "prontera/MAP_STATE"], agent.config(), &[]);
    assert!(well && told.contains("\"users\": 3"), "{told}");
}

#[test]
fn without_a_file_the_machines_public_cas_are_trusted() {
    let mut world = World::new();
    let endpoint = world.hub.start();
    let agent = world.host_with("host", &endpoint, &[]);
    let (told, well) = run("agent", &["check"], agent.config(), &[]);
    let untrusted = "E311 UNTRUSTED_CERTIFICATE: the certificate of https://127.0.0.1:";
    assert!(!well && told.contains(&format!("tls: {untrusted}")), "{told}");
    assert!(
        told.contains(&format!("hub: {untrusted}")) && told.contains("set tls_ca"),
        "{told}"
    );

    let ca = world.ca.file(world.folder.path());
    let (told, well) = run("agent", &["check"], agent.config(), &[("SSL_CERT_FILE", &ca)]);
    assert!(
        well && told.contains("tls: ok (") && told.contains("knows host"),
        "{told}"
    );

    let empty = world.folder.path().join("empty");
    std::fs::create_dir(&empty).expect("the folder can be written");
    let none = world.folder.path().join("none.pem");
    std::fs::write(&none, "").expect("the folder can be written");
    let (told, well) = run(
        "agent",
        &["check"],
        agent.config(),
        &[("SSL_CERT_FILE", &none), ("SSL_CERT_DIR", &empty)],
    );
    assert!(!well && told.contains("install its package ca-certificates"), "{told}");
}

/// The agent tells this of its link, in its log too, and `check` as well.
fn tells(agent: &mut Agent, problem: &str) {
    until(problem, || link_problem(agent).contains(problem));
    assert!(
        agent.log().contains(&format!("the link is down: {problem}")),
        "{}",
        agent.log()
    );
    let (told, well) = run("agent", &["check"], agent.config(), &[]);
    assert!(!well && told.contains(&format!("hub: {problem}")), "{told}");
    if !problem.contains("speaks TLS") {
        assert!(told.contains(&format!("tls: {problem}")), "{told}");
    }
}

#[test]
fn each_certificate_that_is_not_to_be_trusted_is_told_as_what_it_is_and_what_waits_is_kept() {
    let mut world = World::new();
    let other = World::new();
    let (folder, ca) = (world.hub_folder(), world.ca.file(world.folder.path()));
    let endpoint = format!("https://127.0.0.1:{}", world.port);
    let at = format!("the certificate of {endpoint}");
    let mut agent = world.host("host", &endpoint);
    let cases: [(&dyn Fn(), String); 5] = [
        (
            &|| other.ca.sign_into(&folder, &Claims::default()),
            format!("{at} is untrusted: no CA in tls_ca ({}) has signed it", ca.display()),
        ),
        (
            &|| {
                let names = &["hub.example.org", "192.0.2.1"];
                world.ca.sign_into(
                    &folder,
                    &Claims {
                        names,
                        ..Claims::default()
                    },
                );
            },
            format!("{at} is not for 127.0.0.1 but for hub.example.org, 192.0.2.1"),
        ),
        (
            &|| {
                let years = (2019, 2021);
                world.ca.sign_into(
                    &folder,
                    &Claims {
                        years,
                        ..Claims::default()
                    },
                );
            },
            format!("{at} expired on 2021-01-01"),
        ),
        (
            &|| {
                let years = (2089, 2090);
                world.ca.sign_into(
                    &folder,
                    &Claims {
                        years,
                        ..Claims::default()
                    },
                );
            },
            format!("{at} is valid only from 2089-01-01 on: set this machine's clock right"),
        ),
        (&|| world.ca.serve_itself(&folder), format!("{at} is a CA's own")),
    ];
    agent.start();
    for (number, (certify, problem)) in (0..).zip(cases) {
        certify();
        world.hub.start();
        assert!(agent.submit(number, &chat(number)));
        tells(&mut agent, &format!("E311 UNTRUSTED_CERTIFICATE: {problem}"));
        assert_eq!(world.stored(), 0);
        world.hub.stop();
    }
    world.ca.sign_into(&folder, &Claims::default());
    world.hub.start();
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert_eq!(world.stored(), 5);
}

#[test]
fn tls_and_plaintext_that_meet_are_told_apart() {
    let mut world = World::with(&[]);
    let plain = world.hub.start();
    let mut agent = world.host("tls-to-plaintext", &plain.replace("http:", "https:"));
    agent.start();
    let problem = format!(
        "E107 BAD_ENDPOINT: https://127.0.0.1:{} answers, but speaks no TLS",
        world.port
    );
    tells(&mut agent, &problem);

    let mut world = World::new();
    let served = world.hub.start();
    let plain = served.replace("https:", "http:");
    let mut agent = world.host("plaintext-to-tls", &plain);
    agent.start();
    let problem = format!("E107 BAD_ENDPOINT: {plain} speaks TLS: begin main_server_endpoint with https://");
    tells(&mut agent, &problem);
    let (told, well) = run(
        "agent",
        &["get", "prontera/MAP_STATE"],
        world.host("get", &plain).config(),
        &[],
    );
    assert!(!well && told.contains(&problem), "{told}");

    // Mended, the same outbox goes on.
    assert!(agent.submit(1, &chat(1)));
    until("the operation is on disk", || {
        agent.ledger().said.values().any(|said| said.spooled)
    });
    agent.stop();
    let config = std::fs::read_to_string(agent.config()).expect("it is there");
    std::fs::write(agent.config(), config.replace(&plain, &served)).expect("it is ours");
    agent.start();
    until_up(&mut agent);
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert_eq!(world.stored(), 1);
}
