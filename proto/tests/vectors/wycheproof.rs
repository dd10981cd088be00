//! Project Wycheproof's vectors. Each test counts its cases, so that a file read in part is noticed.

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use p2p_sync_proto::{
    envelope::{NotOpened, open_with},
    keys::SealKey,
};
use serde::Deserialize;
use serde_json::Value;
use sha2::Sha512;

use crate::{ASSOCIATED_DATA, octets, read, seal_key, sealed_around};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Suite {
    number_of_tests: usize,
    test_groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    key_size: u32,
    tests: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Case {
    tc_id: u32,
    comment: String,
    result: Verdict,
    #[serde(flatten)]
    fields: Value,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Valid,
    Invalid,
}

impl Case {
    fn octets(&self, field: &str) -> Vec<u8> {
        octets(
            self.fields[field]
                .as_str()
                .unwrap_or_else(|| panic!("{self} has no {field}")),
        )
    }

    fn is_valid(&self) -> bool {
        self.result == Verdict::Valid
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "case {} ({})", self.tc_id, self.comment)
    }
}

/// Every case of a file with its group's key size in bits.
fn cases(file: &str) -> Vec<(u32, Case)> {
    let suite: Suite = serde_json::from_str(&read(&format!("wycheproof/{file}"))).expect("the schema of Wycheproof");
    let groups = suite.test_groups.into_iter();
    let cases: Vec<_> = groups
        .flat_map(|group| group.tests.into_iter().map(move |case| (group.key_size, case)))
        .collect();
    assert_eq!(cases.len(), suite.number_of_tests, "{file} is not whole");
    cases
}

#[test]
fn a256cbc_hs512_opens_what_is_valid_and_nothing_else() {
    let cases = cases("a256cbc_hs512_test.json");
    assert_eq!(cases.len(), 94);
    for (_, case) in cases {
        let key = SealKey::from_bytes(case.octets("key").try_into().expect("64 octets"));
        let sealed = [case.octets("iv"), case.octets("ct"), case.octets("tag")].concat();
        let expected = if case.is_valid() {
            Ok(case.octets("msg"))
        } else {
            Err(NotOpened)
        };
        let opened = open_with(&key, &case.octets("aad"), &sealed).map(|plaintext| plaintext.to_vec());
        assert_eq!(opened, expected, "{case}");
    }
}

#[test]
fn aes_256_cbc_accepts_the_one_right_padding_even_under_a_right_tag() {
    let cases: Vec<_> = cases("aes_cbc_pkcs5_test.json")
        .into_iter()
        .filter(|(bits, _)| *bits == 256)
        .collect();
    assert_eq!(cases.len(), 72);
    for (_, case) in cases {
        let key = seal_key(&case.octets("key"));
        let sealed = sealed_around(&case.octets("iv"), &case.octets("ct"));
        let expected = if case.is_valid() {
            Ok(case.octets("msg"))
        } else {
            Err(NotOpened)
        };
        let opened = open_with(&key, ASSOCIATED_DATA, &sealed).map(|plaintext| plaintext.to_vec());
        assert_eq!(opened, expected, "{case}");
    }
}

#[test]
fn hkdf_sha512_gives_the_stated_output_and_refuses_more_than_it_can_give() {
    let cases = cases("hkdf_sha512_test.json");
    assert_eq!(cases.len(), 83);
    for (_, case) in cases {
        let size = case.fields["size"]
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .expect("a size");
        let mut output = vec![0; size];
        let hkdf = Hkdf::<Sha512>::new(Some(&case.octets("salt")), &case.octets("ikm"));
        let expanded = hkdf.expand(&case.octets("info"), &mut output);
        assert_eq!(expanded.is_ok(), case.is_valid(), "{case}");
        if case.is_valid() {
            assert_eq!(output, case.octets("okm"), "{case}");
        }
    }
}

#[test]
fn hmac_sha512_verifies_whole_and_truncated_tags_and_no_changed_one() {
    let cases = cases("hmac_sha512_test.json");
    assert_eq!(cases.len(), 174);
    for (_, case) in cases {
        let mac = <Hmac<Sha512> as KeyInit>::new_from_slice(&case.octets("key")).expect("any length serves");
        let verified = mac
            .chain_update(case.octets("msg"))
            .verify_truncated_left(&case.octets("tag"));
        assert_eq!(verified.is_ok(), case.is_valid(), "{case}");
    }
}
