//! Master keys, the keys derived from them, and the credential as a person handles it.

use std::collections::HashSet;

use p2p_sync_proto::{
    envelope::{open_with, seal_with},
    keys::{Credential, CredentialError, Direction, InvalidKeyId, KeyId, MasterKey, SealKey},
};
use uuid::{Uuid, uuid};

const HOST_ID: Uuid = uuid!("0190a0b0-c0d0-7e0f-8a1b-2c3d4e5f6071");
const GENERATION: u32 = 3;

/// Of the master key 00 01 … 3f named `main-2025`, computed apart from this crate with Python's hmac and hashlib.
const CREDENTIAL: &str = "p2ps1_CW1haW4tMjAyNQGQoLDA0H4PihssPU5fYHEAAAADF39IDlRxq-K6eQ23SwKiYKGgO9eeOTFaNsTmlEFQFSU\
    7eo1ZocHYTepHXJNSxVr6b9w7ZxT-c6nu8s08DqRP4nis9HurNjNcMVbrb9ocFae8h6WsWtZ-f-T-akZ2VPBbL-LnlG2pB_4wkkLIrzAwt9k6vjN\
    LMsSmBuz4gORcqzC6jZV1";
/// The wrapping key of that credential, from the same computation.
const WRAPPING_KEY: [u8; 64] = [
    0x0f, 0x05, 0x4e, 0xfe, 0x34, 0x28, 0x59, 0xec, 0x67, 0xaa, 0x7d, 0xa8, 0x2a, 0xa8, 0x89, 0x42, 0x10, 0xd5, 0x0f,
    0xc9, 0x8a, 0xef, 0x77, 0x9b, 0x92, 0x08, 0x7c, 0x5a, 0x35, 0xfd, 0x62, 0x2a, 0x76, 0x2a, 0x21, 0x15, 0x0d, 0xa8,
    0x51, 0x82, 0x07, 0x5f, 0x66, 0xf4, 0x4d, 0x2e, 0xe9, 0x11, 0x8a, 0xcf, 0xac, 0x7b, 0xd7, 0xb3, 0x1a, 0xcb, 0xb7,
    0x5a, 0x4c, 0x57, 0x4b, 0x4c, 0xd7, 0x75,
];

fn master(id: &str, first_octet: u8) -> MasterKey {
    let secret = std::array::from_fn(|at| first_octet.wrapping_add(u8::try_from(at).unwrap()));
    MasterKey::from_bytes(KeyId::parse(id).unwrap(), secret)
}

/// The keys' one observable: what one seals, the other opens.
fn are_the_same(one: &SealKey, other: &SealKey) -> bool {
    open_with(other, b"label", &seal_with(one, b"label", b"text")).is_ok()
}

#[test]
fn a_credential_is_derived_and_written_as_computed_elsewhere() {
    let credential = master("main-2025", 0).credential(HOST_ID, GENERATION);
    assert_eq!(credential.to_text().as_str(), CREDENTIAL);
    assert!(are_the_same(
        &credential.wrapping_key(),
        &SealKey::from_bytes(WRAPPING_KEY)
    ));
}

#[test]
fn every_key_id_host_generation_direction_and_master_has_a_key_of_its_own() {
    let mut keys = Vec::new();
    for master in [master("a", 0), master("b", 0), master("a", 1)] {
        for host_id in [HOST_ID, Uuid::nil()] {
            for generation in [0, 1, 256] {
                for direction in [Direction::ToHub, Direction::ToHost] {
                    let key = master.host_key(host_id, generation, direction);
                    assert!(are_the_same(&key, &master.host_key(host_id, generation, direction)));
                    keys.push(key);
                }
                keys.push(master.credential(host_id, generation).wrapping_key());
            }
        }
    }
    assert_eq!(keys.len(), 54);
    for (at, one) in keys.iter().enumerate() {
        for (other_at, other) in keys.iter().enumerate().skip(at + 1) {
            assert!(!are_the_same(one, other), "keys {at} and {other_at}");
        }
    }
}

#[test]
fn a_credential_comes_back_from_its_text() {
    for key_id in ["k", "main-2025", &"z".repeat(32)] {
        let credential = MasterKey::generate(KeyId::parse(key_id).unwrap()).credential(HOST_ID, u32::MAX);
        let read = Credential::parse(&credential.to_text()).unwrap();
        assert_eq!(
            (read.host_id, read.key_id.as_str(), read.generation),
            (HOST_ID, key_id, u32::MAX)
        );
        assert!(are_the_same(&read.to_hub, &credential.to_hub));
        assert!(are_the_same(&read.to_host, &credential.to_host));
    }
}

#[test]
fn a_credential_wrapped_or_indented_on_its_way_still_reads() {
    let (start, end) = CREDENTIAL.split_at(80);
    for text in [format!("  {CREDENTIAL}\r\n"), format!("\t{start}\r\n    {end}\n")] {
        assert_eq!(Credential::parse(&text).unwrap().to_text().as_str(), CREDENTIAL);
    }
}

#[test]
fn a_credential_cut_anywhere_is_told_apart() {
    for length in 0..CREDENTIAL.len() {
        let expected = match length {
            0 => CredentialError::Empty,
            1..6 => CredentialError::WrongPrefix,
            _ => CredentialError::Damaged,
        };
        assert_eq!(
            Credential::parse(&CREDENTIAL[..length]).unwrap_err(),
            expected,
            "the first {length} characters"
        );
        if length > 0 {
            let error = Credential::parse(&CREDENTIAL[length..]).unwrap_err();
            assert_eq!(error, CredentialError::WrongPrefix, "all from character {length}");
        }
    }
}

#[test]
fn a_credential_with_any_character_changed_added_or_doubled_is_told_apart() {
    for at in "p2ps1_".len()..CREDENTIAL.len() {
        let (before, rest) = CREDENTIAL.split_at(at);
        let (character, after) = rest.split_at(1);
        let other = if character == "A" { "B" } else { "A" };
        for damaged in [
            format!("{before}{other}{after}"),
            format!("{before}{character}{character}{after}"),
            format!("{before}é{after}"),
            format!("{before}={after}"),
        ] {
            assert_eq!(
                Credential::parse(&damaged).unwrap_err(),
                CredentialError::Damaged,
                "{damaged}"
            );
        }
    }
    assert_eq!(
        Credential::parse(&CREDENTIAL.repeat(2)).unwrap_err(),
        CredentialError::Damaged
    );
    assert_eq!(
        Credential::parse(&format!("p2ps1_{}", "A".repeat(1 << 20))).unwrap_err(),
        CredentialError::Damaged
    );
}

#[test]
fn what_is_no_credential_is_answered_with_what_to_do() {
    for (text, begins) in [
        ("", "the credential is empty: paste"),
        (" \n\t", "the credential is empty: paste"),
        ("hunter2", "this is not a credential: one begins with p2ps1_"),
        ("P2PS1_AAAA", "this is not a credential: one begins with p2ps1_"),
        ("p2ps_AAAA", "this is not a credential: one begins with p2ps1_"),
        ("p2psx_AAAA", "this is not a credential: one begins with p2ps1_"),
        (
            "p2ps2_AAAA",
            "this credential is of a version that this program does not know: update",
        ),
        ("p2ps1_", "this credential is damaged or cut: copy it again whole"),
        ("p2ps1_AAAA", "this credential is damaged or cut: copy it again whole"),
    ] {
        let sentence = Credential::parse(text).unwrap_err().to_string();
        assert!(sentence.starts_with(begins), "{text:?} is answered with: {sentence}");
    }
}

#[test]
fn nothing_secret_is_shown() {
    let master = master("main-2025", 0x41);
    let credential = master.credential(HOST_ID, GENERATION);
    assert_eq!(format!("{:?}", credential.to_hub), "SealKey([secret])");
    assert_eq!(
        format!("{master:?}"),
        r#"MasterKey { id: KeyId("main-2025"), secret: [secret] }"#
    );
    assert_eq!(
        format!("{credential:?}"),
        format!(
            r#"Credential {{ host_id: {HOST_ID}, key_id: KeyId("main-2025"), generation: 3, to_hub: SealKey([secret]), to_host: SealKey([secret]) }}"#
        )
    );
}

#[test]
fn generated_keys_differ_and_a_master_key_survives_the_keyring_file() {
    let generated: HashSet<_> = (0..100)
        .map(|_| *MasterKey::generate(KeyId::parse("k").unwrap()).expose_secret())
        .collect();
    assert_eq!(generated.len(), 100);
    assert!(!are_the_same(&SealKey::generate(), &SealKey::generate()));

    let master = MasterKey::generate(KeyId::parse("k").unwrap());
    let read = MasterKey::from_bytes(master.id().clone(), *master.expose_secret());
    let keys = [&master, &read].map(|master| master.host_key(HOST_ID, GENERATION, Direction::ToHub));
    assert!(are_the_same(&keys[0], &keys[1]));
}

#[test]
fn a_key_id_is_short_and_plain() {
    for text in ["a", "0", "-", "main-2025", &"a".repeat(32)] {
        let key_id = KeyId::parse(text).unwrap();
        assert_eq!((key_id.as_str(), key_id.to_string().as_str()), (text, text));
    }
    for text in ["", "A", "a b", "a_b", "a.b", "ä", " a", "a\n", &"a".repeat(33)] {
        assert_eq!(KeyId::parse(text), Err(InvalidKeyId), "{text:?}");
    }
}
