//! A volunteer's way: one token, pasted, and nothing else.

use std::{io::Write as _, path::Path, time::Duration};

use p2p_sync_tests::{faulty_link::FaultyLink, stack::Agent};

use crate::{
    authority::Claims,
    tls_world::{self, World as TlsWorld, chat},
    world::{PROGRAM, World, until},
};

/// A hub that serves TLS under a CA of its own, whose tokens pin it.
fn pinning() -> TlsWorld {
    let settings = [
        ("tls_cert", "hub.pem".to_owned()),
        ("tls_key", "hub.key".to_owned()),
        ("public_ca", "ca.pem".to_owned()),
        ("leases", "required".to_owned()),
    ];
    let world = TlsWorld::with(&settings);
    world.ca.file(&world.hub_folder());
    world.ca.sign_with_chain_into(&world.hub_folder(), &Claims::default());
    world
}

fn invite(world: &TlsWorld, endpoint: &str) -> String {
    let invite = [
        "hosts",
        "invite",
        "--account",
        "7",
        "--maps",
        "prontera",
        "--endpoint",
        endpoint,
    ];
    world.hub.command(&invite)
}

/// `enrol -`: what it said, and whether all was well.
fn enrol(config: &Path, token: &str) -> (String, bool) {
    let mut child = Agent::enrol_command(Path::new(PROGRAM), config);
    // One that refuses at once reads nothing.
    let _ = writeln!(child.stdin.take().expect("piped"), "{token}");
    let output = child.wait_with_output().expect("the program ends");
    let told = [output.stdout, output.stderr].concat();
    (String::from_utf8(told).expect("text"), output.status.success())
}

#[test]
fn a_machine_enrols_by_a_token_alone_through_tls_of_a_private_ca() {
    let mut world = pinning();
    let endpoint = world.hub.start();
    let token = invite(&world, &endpoint);
    let folder = world.folder.path().join("host");
    let settings = [("retry_delay_max_ms", "300".to_owned())];
    let mut agent = Agent::enrolled(Path::new(PROGRAM), &folder, &token, &settings);
    let file = folder.join("p2p_sync_credential");
    let written = std::fs::read_to_string(&file).expect("written");
    assert!(
        !written.contains("p2pst1_") && written.contains(&format!("endpoint = {endpoint}\n")),
        "{written}"
    );
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::metadata(&file).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
    agent.start();
    tls_world::until_up(&mut agent);
    for number in 0..100 {
        assert!(agent.submit(number, &chat(number)));
    }
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert_eq!(world.stored(), 100, "the map was granted with the enrolment");
    assert_eq!(agent.ledger().count("APPLIED"), 100);

    let (told, well) = tls_world::run("agent", &["check"], agent.config(), &[]);
    assert!(
        well && told.contains("tls: ok (") && told.contains("knows host"),
        "{told}"
    );
    let shown = world.hub.command(&["hosts", "show", &agent.host_id().to_string()]);
    assert!(
        shown.contains(" active account=7 ") && shown.contains(" seen=20"),
        "{shown}"
    );
    let listed = world.hub.command(&["hosts", "invitations"]);
    assert!(
        listed.starts_with("1 used until ") && listed.contains(&agent.host_id().to_string()),
        "{listed}"
    );

    // Once more on this machine, on another, and where there is no configuration at all.
    let (told, well) = enrol(agent.config(), &token);
    assert!(
        !well && told.contains("E103 BAD_VALUE: this machine is enrolled already, as host "),
        "{told}"
    );
    let elsewhere = world.folder.path().join("elsewhere/conf/p2p_data_sync.conf");
    let (told, well) = enrol(&elsewhere, &token);
    assert!(!well && told.contains("E315 TOKEN_USED: "), "{told}");
    let (told, well) = enrol(&elsewhere, &invite(&world, &endpoint));
    assert!(well && told.contains("Another host holds prontera still"), "{told}");
    let (told, well) = tls_world::run("agent", &["get", "prontera/MAP_STATE"], &elsewhere, &[]);
    assert!(!well && told.contains("E221 NOT_FOUND"), "{told}");
}

#[test]
fn a_hub_that_is_not_the_pinned_one_is_told_and_gets_nothing() {
    let (mut world, other) = (pinning(), pinning());
    let (endpoint, folder) = (world.hub.start(), world.hub_folder());
    let token = invite(&world, &endpoint);
    let config = world.folder.path().join("host/p2p_data_sync.conf");
    let untrusted =
        format!("E311 UNTRUSTED_CERTIFICATE: the certificate of {endpoint} is untrusted: the CA that this host");
    let shows = |told: &str| {
        assert!(
            told.contains(&untrusted) && told.contains("`p2p-sync-proxy check`"),
            "{told}"
        );
    };
    // Another's hub there; then its own without the CA's certificate.
    world.hub.stop();
    other.ca.sign_with_chain_into(&folder, &Claims::default());
    world.hub.start();
    let (told, well) = enrol(&config, &token);
    assert!(!well);
    shows(&told);
    world.hub.stop();
    world.ca.sign_into(&folder, &Claims::default());
    world.hub.start();
    let (told, well) = enrol(&config, &token);
    assert!(!well);
    shows(&told);
    let lacking = "E119 BAD_CERTIFICATE: tls_cert: ";
    let (told, well) = tls_world::run("proxy", &["check"], world.hub.config(), &[]);
    assert!(
        !well && told.contains(&format!("tls: {lacking}")) && told.contains("append it, `cat "),
        "{told}"
    );
    let told = world
        .hub
        .fails(&["hosts", "invite", "--account", "7", "--endpoint", &endpoint]);
    assert!(told.contains(lacking), "{told}");
    // Mended, the same token still serves.
    world.hub.stop();
    world.ca.sign_with_chain_into(&folder, &Claims::default());
    world.hub.start();
    let (told, well) = enrol(&config, &token);
    assert!(well, "{told}");

    // Enrolled, and the CA is gone from what is shown: told, and all right again with its file.
    world.hub.stop();
    world.ca.sign_into(&folder, &Claims::default());
    world.hub.start();
    let (told, well) = tls_world::run("agent", &["check"], &config, &[]);
    assert!(!well);
    shows(&told);
    let ca = world.ca.file(world.folder.path()).display().to_string();
    std::fs::write(&config, format!("tls_ca = {ca}\n")).expect("it is ours");
    let (told, well) = tls_world::run("agent", &["check"], &config, &[]);
    assert!(well, "{told}");
}

#[test]
fn a_reply_that_is_lost_with_the_machine_comes_again_for_the_same_key() {
    let world = World::new();
    let link = FaultyLink::to(&world.endpoint());
    let invite = ["hosts", "invite", "--account", "7", "--endpoint", &link.endpoint()];
    let hosts = || world.count("SELECT count(*) FROM p2p_sync.hosts");
    for round in 0..5 {
        let token = world.hub.command(&invite);
        let config = world.folder.path().join(format!("host-{round}/p2p_data_sync.conf"));
        link.delay(Duration::from_millis(150));
        let mut child = Agent::enrol_command(Path::new(PROGRAM), &config);
        writeln!(child.stdin.take().expect("piped"), "{token}").expect("it reads");
        until("the hub has made the host", || hosts() == round + 1);
        child.kill().expect("it waits for the answer still");
        child.wait().expect("it is ours");
        link.heal();
        let told = tls_world::run("agent", &["status"], &config, &[]).0;
        assert!(
            told.contains("is not finished: run `p2p-sync-agent enrol` again") || told.contains("cannot read"),
            "{told}"
        );
        let (told, well) = enrol(&config, &token);
        assert!(well && told.contains("enrolled as host "), "{told}");
        assert_eq!(hosts(), round + 1, "it is the same host");
        let (told, well) = tls_world::run("agent", &["check"], &config, &[]);
        assert!(well && told.contains("knows host"), "{told}");
    }
}

#[test]
fn what_is_pasted_wrongly_is_told_as_what_it_is() {
    let world = World::not_started();
    let config = world.folder.path().join("host/p2p_data_sync.conf");
    let credential = world.hub.add_host(1);
    let invite = [
        "hosts",
        "invite",
        "--account",
        "7",
        "--endpoint",
        "http://hub.example.org:1",
    ];
    let off_the_machine = world.hub.command(&invite);
    for (pasted, told) in [
        ("", "E120 BAD_TOKEN: the token is empty"),
        ("token", "E120 BAD_TOKEN: this is not an enrolment token"),
        (&credential, "E120 BAD_TOKEN: this is a credential, not a token"),
        (&off_the_machine[..100], "E120 BAD_TOKEN: this token is damaged or cut"),
        (
            &off_the_machine,
            "E107 BAD_ENDPOINT: main_server_endpoint: http:// is for a hub on this machine",
        ),
    ] {
        let (said, well) = enrol(&config, pasted);
        assert!(!well && said.contains(told), "{said}");
        assert!(!config.with_file_name("p2p_sync_credential").exists());
    }
    for (command, told) in [
        (
            &["hosts", "invite", "--account", "7"][..],
            "E104 MISSING_VALUE: say where hosts reach the hub",
        ),
        (
            &["hosts", "invite", "--account", "7", "--endpoint", "hub"],
            "E107 BAD_ENDPOINT: --endpoint: ",
        ),
        (
            &["hosts", "invite", "--account", "7", "--expires", "1y"],
            "expected a time such as 90s",
        ),
    ] {
        let said = world.hub.fails(command);
        assert!(said.contains(told), "{said}");
    }
    // A hub that is away: told, and everything is there for the next try.
    let nobody = ["hosts", "invite", "--account", "7", "--endpoint", &world.endpoint()];
    let (said, well) = enrol(&config, &world.hub.command(&nobody));
    assert!(!well && said.contains("E405 HUB_UNAVAILABLE: "), "{said}");
    assert!(
        config.with_file_name("p2p_sync_credential").exists(),
        "the key is on disk before it is sent"
    );
}
