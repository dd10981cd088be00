//! The hub's door: what it takes to open it, and who stands in it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use crate::{
    authority::{self, Claims},
    world::{PATIENCE, World, chat, run},
};

#[test]
fn a_certificate_that_cannot_be_served_is_refused_with_what_to_do() {
    let world = World::new();
    let folder = world.hub_folder();
    let (certificate, key) = world.ca.sign(&Claims::default());
    let (_, other_key) = world.ca.sign(&Claims::default());
    let mode = |mode| {
        authority::write(&folder, &certificate, &key);
        fs::set_permissions(folder.join("hub.key"), fs::Permissions::from_mode(mode)).expect("it is ours");
    };
    let cases: [(&dyn Fn(), &str, &str); 6] = [
        (
            &|| mode(0o644),
            "E110 LOOSE_FILE_MODE: tls_key: ",
            "has mode 0644, so others may read or change it: run `chmod 6",
        ),
        (&|| mode(0o660), "E110 LOOSE_FILE_MODE: tls_key: ", "has mode 0660"),
        (
            &|| authority::write(&folder, &certificate, &other_key),
            "E119 BAD_CERTIFICATE: tls_key: ",
            "give the key that it was made for",
        ),
        (
            &|| authority::write(&folder, &key, &key),
            "E119 BAD_CERTIFICATE: tls_cert: ",
            "holds no certificate",
        ),
        (
            &|| authority::write(&folder, &certificate, &certificate),
            "E119 BAD_CERTIFICATE: tls_key: ",
            "holds no private key",
        ),
        (
            &|| fs::remove_file(folder.join("hub.pem")).expect("it is ours"),
            "E119 BAD_CERTIFICATE: tls_cert: ",
            "cannot be read",
        ),
    ];
    for (spoil, begins, part) in cases {
        spoil();
        let (told, well) = run("proxy", &["serve"], world.hub.config(), &[]);
        assert!(!well && told.starts_with(begins) && told.contains(part), "{told}");
        assert!(!told.contains("PRIVATE KEY"), "{told}");
        let (told, well) = run("proxy", &["check"], world.hub.config(), &[]);
        assert!(!well && told.contains(&format!("tls: {begins}")), "{told}");
    }
    let years = (2019, 2021);
    world.ca.sign_into(
        &folder,
        &Claims {
            years,
            ..Claims::default()
        },
    );
    let (told, well) = run("proxy", &["check"], world.hub.config(), &[]);
    assert!(
        !well && told.contains("tls: E119 BAD_CERTIFICATE: ") && told.contains("has expired"),
        "{told}"
    );
}

#[test]
fn off_loopback_a_hub_serves_tls_or_not_at_all() {
    let mut plain = World::with(&[("bind_address", "0.0.0.0".to_owned())]);
    let (told, well) = run("proxy", &["serve"], plain.hub.config(), &[]);
    assert!(
        !well && told.starts_with("E103 BAD_VALUE: ") && told.contains("set tls_cert and tls_key"),
        "{told}"
    );
    let half = World::with(&[("tls_cert", "hub.pem".to_owned())]);
    let (told, well) = run("proxy", &["serve"], half.hub.config(), &[]);
    assert!(!well && told.starts_with("E104 MISSING_VALUE: tls_key: "), "{told}");

    let config = fs::read_to_string(plain.hub.config()).expect("it is there");
    fs::write(plain.hub.config(), config + "tls_cert = hub.pem\ntls_key = hub.key\n").expect("it is ours");
    assert_eq!(plain.hub.start(), format!("https://0.0.0.0:{}", plain.port));
    let mut agent = plain.host("host", &format!("https://localhost:{}", plain.port));
    agent.start();
    assert!(agent.submit(1, &chat(1)) && agent.flush(PATIENCE), "{}", agent.log());
}

#[test]
fn a_handshake_that_hangs_delays_nobody_and_is_cut() {
    // As from many addresses, which this machine has not.
    let mut world = World::with(&[("max_connections_per_address", "0".to_owned())]);
    let endpoint = world.hub.start();
    let begins = Instant::now();
    let hanging: Vec<TcpStream> = (0..200)
        .map(|number| {
            let mut stream = TcpStream::connect(("127.0.0.1", world.port)).expect("the hub listens");
            // Some say nothing, some begin a record of 512 bytes, a ClientHello, and leave it at that.
            if number % 2 == 0 {
                stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0]).expect("it is read");
            }
            stream
        })
        .collect();
    let mut agent = world.host("host", &endpoint);
    agent.start();
    assert!(agent.submit(1, &chat(1)) && agent.flush(PATIENCE), "{}", agent.log());
    assert!(
        begins.elapsed() < Duration::from_secs(9),
        "it waited until the others were cut"
    );
    for mut stream in hanging {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut rest = Vec::new();
        assert!(
            stream.read_to_end(&mut rest).is_ok(),
            "it is still open after {PATIENCE:?}"
        );
    }
    assert!(begins.elapsed() < Duration::from_secs(25), "they were open too long");
}
