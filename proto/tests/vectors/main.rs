//! Other people's test vectors, held against the envelope and the algorithms under it. `README.md` beside this file
//! names their sources.

mod nist;
mod wycheproof;

use std::{fs, path::PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use p2p_sync_proto::keys::SealKey;
use sha2::Sha512;

/// The MAC half of every key under which a bare AES vector is dressed as a sealed message.
const MAC_KEY: [u8; 32] = [0x5a; 32];
const ASSOCIATED_DATA: &[u8] = b"a bare AES-CBC vector";

fn read(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vectors")
        .join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn octets(hex: &str) -> Vec<u8> {
    assert!(hex.len().is_multiple_of(2), "an odd number of digits: {hex}");
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal"))
        .collect()
}

/// The seal key whose encryption half is the given AES-256 key.
fn seal_key(aes_key: &[u8]) -> SealKey {
    let bytes = [MAC_KEY.as_slice(), aes_key].concat();
    SealKey::from_bytes(bytes.try_into().expect("an AES-256 key"))
}

/// A sealed message around a given IV and ciphertext, with the tag it needs to come as far as being decrypted.
fn sealed_around(iv: &[u8], ciphertext: &[u8]) -> Vec<u8> {
    let associated_bits = u64::try_from(ASSOCIATED_DATA.len() * 8).expect("short");
    let tag = <Hmac<Sha512> as KeyInit>::new_from_slice(&MAC_KEY)
        .expect("any length serves")
        .chain_update(ASSOCIATED_DATA)
        .chain_update(iv)
        .chain_update(ciphertext)
        .chain_update(associated_bits.to_be_bytes())
        .finalize();
    [iv, ciphertext, &tag.as_bytes()[..32]].concat()
}
