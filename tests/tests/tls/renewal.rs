//! A certificate that is replaced while hosts are connected.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use p2p_sync_tests::stack::{Agent, Hub};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    authority::{self, Claims},
    world::{World, chat, run, until, until_up},
};

fn hang_up(hub: &Hub) {
    let pid = i32::try_from(hub.pid())
        .ok()
        .and_then(Pid::from_raw)
        .expect("a process");
    kill_process(pid, Signal::HUP).expect("it runs");
}

/// The certificate that a new connection is shown.
fn shown(agent: &Agent) -> String {
    let (told, _) = run("agent", &["check"], agent.config(), &[]);
    let line = told.lines().find_map(|line| line.strip_prefix("tls: "));
    line.unwrap_or_else(|| panic!("{told}")).to_owned()
}

#[test]
fn a_new_certificate_is_taken_over_and_open_streams_go_on() {
    let mut world = World::new();
    let (endpoint, folder) = (world.hub.start(), world.hub_folder());
    let (mut agent, onlooker) = (world.host("host", &endpoint), world.host("onlooker", &endpoint));
    agent.start();
    until_up(&mut agent);
    let mut number = 0;
    let mut sends = |agent: &mut Agent| {
        for _ in 0..20 {
            number += 1;
            assert!(agent.submit(number, &chat(number)));
        }
        assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    };
    sends(&mut agent);
    assert!(shown(&onlooker).contains("valid until 2090-01-01"));

    // By itself.
    let years = (2020, 2091);
    world.ca.sign_into(
        &folder,
        &Claims {
            years,
            ..Claims::default()
        },
    );
    until("the new certificate is shown", || {
        shown(&onlooker).contains("valid until 2091-01-01")
    });
    sends(&mut agent);

    // At once where that is asked for.
    let years = (2020, 2092);
    world.ca.sign_into(
        &folder,
        &Claims {
            years,
            ..Claims::default()
        },
    );
    hang_up(&world.hub);
    until("the new certificate is logged", || {
        world.hub.log().contains("valid until 2092-01-01")
    });
    assert!(shown(&onlooker).contains("valid until 2092-01-01"));
    sends(&mut agent);

    assert_eq!(world.stored(), 60);
    assert!(!agent.log().contains("the link is down"), "{}", agent.log());
}

#[test]
fn a_bad_new_certificate_is_told_and_the_old_one_is_served_on() {
    let mut world = World::new();
    let (endpoint, folder) = (world.hub.start(), world.hub_folder());
    let onlooker = world.host("onlooker", &endpoint);
    let kept = shown(&onlooker);
    assert!(kept.starts_with("ok ("), "{kept}");
    let (certificate, key) = world.ca.sign(&Claims::default());
    let (_, other_key) = world.ca.sign(&Claims::default());
    let key_file = folder.join("hub.key");
    let cases: [(&dyn Fn(), &str); 4] = [
        (
            &|| authority::write(&folder, &certificate, &other_key),
            "does not go with the certificate",
        ),
        (&|| authority::write(&folder, "nothing", &key), "holds no certificate"),
        (
            &|| authority::write(&folder, &certificate, "nothing"),
            "holds no private key",
        ),
        (
            &|| {
                authority::write(&folder, &certificate, &key);
                fs::set_permissions(&key_file, fs::Permissions::from_mode(0o644)).expect("it is ours");
            },
            "E110 LOOSE_FILE_MODE: tls_key: ",
        ),
    ];
    for (spoil, part) in cases {
        spoil();
        // Unasked, it is told once, when it is there at a second look.
        until(part, || {
            let log = world.hub.log();
            log.lines()
                .any(|line| line.contains("the new certificate is not taken") && line.contains(part))
        });
        assert_eq!(shown(&onlooker), kept);
    }
    let told = world.hub.log().matches("the new certificate is not taken").count();
    assert_eq!(told, 4, "{}", world.hub.log());
    fs::remove_file(&key_file).expect("it is ours");
    hang_up(&world.hub);
    until("an asker is told at once", || {
        world.hub.log().contains("hub.key cannot be read")
    });
    assert_eq!(shown(&onlooker), kept);
}
