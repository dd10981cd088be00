//! The envelope: sealing and opening, side by side.
//!
//! A256CBC-HS512 of RFC 7518, section 5.2: AES-256 in CBC mode with PKCS #7 padding, then HMAC-SHA-512 over the
//! associated data, the IV, the ciphertext and the length of the associated data, cut to 32 octets. What is sealed is
//! IV, ciphertext and tag, in this order. The IV is random for each message. Opening verifies before it decrypts.

use aes::Aes256;
use cbc::cipher::{BlockModeDecrypt, BlockModeEncrypt, KeyIvInit, block_padding::Pkcs7};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha512;
use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    keys::{Direction, KeyId, SealKey, append_fields, fill_random},
    limits::{MESSAGE_BYTES_MAX, SEALED_BYTES_MAX},
};

/// The version of the envelope, and the first octet of its associated data.
pub const ENVELOPE_VERSION: u8 = 1;
/// Longest plaintext, bytes: one encoded message behind the octet that names its compression.
pub const PLAINTEXT_BYTES_MAX: usize = 1 + MESSAGE_BYTES_MAX;
/// Most that sealing adds to a plaintext, bytes: the IV, a block of padding and the tag. The least is 15 less.
pub const OVERHEAD_BYTES_MAX: usize = IV_BYTES + BLOCK_BYTES + TAG_BYTES;

const IV_BYTES: usize = 16;
const BLOCK_BYTES: usize = 16;
const TAG_BYTES: usize = 32;
const MESSAGE_LABEL: &[u8] = b"p2p-sync message";
const KEY_LABEL: &[u8] = b"p2p-sync wrapped key";

const _: () = assert!(
    PLAINTEXT_BYTES_MAX + OVERHEAD_BYTES_MAX <= SEALED_BYTES_MAX,
    "the longest message still fits the wire when it is sealed"
);

/// What a message is for. One sealed for one lane does not open on another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Operations that are waited for.
    Critical = 1,
    /// Operations that travel in batches.
    Bulk = 2,
    /// Questions and their answers.
    Pull = 3,
    /// What is pushed to subscribers.
    Subscribe = 4,
    /// The first exchange on a connection.
    Hello = 5,
    /// The exchange that makes a host known.
    Enrol = 6,
    /// The renewal of a credential.
    Rotate = 7,
    /// The renewal of a host's leases.
    Renew = 8,
    /// What a host is told of its leases and duties.
    Attend = 9,
    /// Questions about maps, and their hand-over.
    Maps = 10,
}

impl Lane {
    /// They are numbered from 1 without a hole.
    pub const COUNT: usize = Self::Maps as usize;
}

/// A number that is no lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{0} is not a lane: lanes are numbered 1 to 10")]
pub struct UnknownLane(pub u32);

impl TryFrom<u32> for Lane {
    type Error = UnknownLane;

    fn try_from(number: u32) -> Result<Self, UnknownLane> {
        Ok(match number {
            1 => Self::Critical,
            2 => Self::Bulk,
            3 => Self::Pull,
            4 => Self::Subscribe,
            5 => Self::Hello,
            6 => Self::Enrol,
            7 => Self::Rotate,
            8 => Self::Renew,
            9 => Self::Attend,
            10 => Self::Maps,
            _ => return Err(UnknownLane(number)),
        })
    }
}

/// What travels beside the ciphertext and is bound to it: changed in any field, the message does not open.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    /// The master key that the host's key was derived from.
    pub key_id: &'a KeyId,
    /// Of the host's credential.
    pub generation: u32,
    /// Which way the message goes.
    pub direction: Direction,
    /// Who sends it, or is sent it.
    pub host_id: Uuid,
    /// Of the host's outbox; 0 where none takes part.
    pub incarnation: u64,
    /// Counts the messages of one lane within the incarnation.
    pub sequence: u64,
    /// Of the operation, batch or request.
    pub id: Uuid,
    /// What the message is for.
    pub lane: Lane,
}

impl Header<'_> {
    /// The canonical octets: the envelope's version, then a label and every field behind its length (`u32`, big
    /// endian); numbers are big endian and of their type's full width.
    pub fn associated_data(&self) -> Vec<u8> {
        let fields: [&[u8]; 9] = [
            MESSAGE_LABEL,
            self.key_id.as_str().as_bytes(),
            &self.generation.to_be_bytes(),
            &[self.direction as u8],
            self.host_id.as_bytes(),
            &self.incarnation.to_be_bytes(),
            &self.sequence.to_be_bytes(),
            self.id.as_bytes(),
            &[self.lane as u8],
        ];
        let mut octets = Vec::with_capacity(160);
        octets.push(ENVELOPE_VERSION);
        append_fields(&mut octets, &fields);
        octets
    }
}

/// What was sealed does not open. One error for every reason, for the difference would help a forger alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the seal does not open: it was made with another key, for another purpose, or was changed since")]
pub struct NotOpened;

/// Seals a message under its header; see [`seal_with`].
pub fn seal(key: &SealKey, header: &Header<'_>, plaintext: &[u8]) -> Vec<u8> {
    seal_with(key, &header.associated_data(), plaintext)
}

/// Opens a message under its header; see [`open_with`].
pub fn open(key: &SealKey, header: &Header<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, NotOpened> {
    open_with(key, &header.associated_data(), sealed)
}

/// Seals under associated data that the caller has made canonical and told apart, by a label, from all other uses of
/// the key. Adds at most [`OVERHEAD_BYTES_MAX`].
///
/// # Panics
/// When `plaintext` is longer than [`PLAINTEXT_BYTES_MAX`], which would open nowhere, or the operating system gives no
/// randomness.
pub fn seal_with(key: &SealKey, associated_data: &[u8], plaintext: &[u8]) -> Vec<u8> {
    assert!(
        plaintext.len() <= PLAINTEXT_BYTES_MAX,
        "a message is kept within its bound before it is sealed"
    );
    let mut iv = [0; IV_BYTES];
    fill_random(&mut iv);
    seal_with_iv(key, associated_data, iv, plaintext)
}

/// Opens what [`seal_with`] sealed. What it gives back is cleared when dropped.
pub fn open_with(key: &SealKey, associated_data: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, NotOpened> {
    if sealed.len() > PLAINTEXT_BYTES_MAX + OVERHEAD_BYTES_MAX {
        return Err(NotOpened);
    }
    let (authenticated, tag) = sealed.split_last_chunk::<TAG_BYTES>().ok_or(NotOpened)?;
    let (iv, ciphertext) = authenticated.split_first_chunk::<IV_BYTES>().ok_or(NotOpened)?;
    // A shorter tag would be verified by that many octets alone; the array's type lets none but 32 through.
    mac(key, associated_data, authenticated)
        .verify_truncated_left(tag)
        .map_err(|_| NotOpened)?;

    let mut plaintext = Zeroizing::new(ciphertext.to_vec());
    let length = cbc::Decryptor::<Aes256>::new(key.encryption_key().into(), iv.into())
        .decrypt_padded::<Pkcs7>(&mut plaintext)
        .map_err(|_| NotOpened)?
        .len();
    plaintext.truncate(length);
    Ok(plaintext)
}

/// Seals a key under another: the outbox's data key under [`Credential::wrapping_key`], so that a renewed credential
/// wraps the same data key anew.
///
/// [`Credential::wrapping_key`]: crate::keys::Credential::wrapping_key
pub fn wrap_key(wrapping: &SealKey, key: &SealKey) -> Vec<u8> {
    seal_with(wrapping, KEY_LABEL, key.as_bytes())
}

/// Opens what [`wrap_key`] sealed.
pub fn unwrap_key(wrapping: &SealKey, wrapped: &[u8]) -> Result<SealKey, NotOpened> {
    let bytes = open_with(wrapping, KEY_LABEL, wrapped)?;
    bytes
        .as_slice()
        .try_into()
        .map(SealKey::from_bytes)
        .map_err(|_| NotOpened)
}

fn seal_with_iv(key: &SealKey, associated_data: &[u8], iv: [u8; IV_BYTES], plaintext: &[u8]) -> Vec<u8> {
    let padded_bytes = (plaintext.len() / BLOCK_BYTES + 1) * BLOCK_BYTES;
    let mut sealed = Vec::with_capacity(IV_BYTES + padded_bytes + TAG_BYTES);
    sealed.extend_from_slice(&iv);
    sealed.resize(IV_BYTES + padded_bytes, 0);
    cbc::Encryptor::<Aes256>::new(key.encryption_key().into(), (&iv).into())
        .encrypt_padded_b2b::<Pkcs7>(plaintext, &mut sealed[IV_BYTES..])
        .expect("the buffer has room for the padding");
    let tag = mac(key, associated_data, &sealed).finalize();
    sealed.extend_from_slice(&tag.as_bytes()[..TAG_BYTES]);
    sealed
}

/// The MAC over associated data, IV and ciphertext, and the length of the associated data in bits.
fn mac(key: &SealKey, associated_data: &[u8], iv_and_ciphertext: &[u8]) -> Hmac<Sha512> {
    let associated_bits = associated_data.len() as u64 * 8;
    <Hmac<Sha512> as KeyInit>::new_from_slice(key.mac_key())
        .expect("HMAC takes a key of any length")
        .chain_update(associated_data)
        .chain_update(iv_and_ciphertext)
        .chain_update(associated_bits.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn octets(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|c| !c.is_ascii_whitespace()).collect();
        let octet = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(octet).collect()
    }

    fn key_of(bytes: &[u8]) -> SealKey {
        SealKey::from_bytes(bytes.try_into().unwrap())
    }

    /// IV and ciphertext as given, under the right tag: what only a holder of the key could send.
    fn forged(key: &SealKey, associated_data: &[u8], iv_and_ciphertext: &[u8], tag_bytes: usize) -> Vec<u8> {
        let tag = mac(key, associated_data, iv_and_ciphertext).finalize();
        [iv_and_ciphertext, &tag.as_bytes()[..tag_bytes]].concat()
    }

    #[test]
    fn invariant_11_the_states_of_the_ciphers_are_cleared_when_dropped() {
        // These compile where each crate's feature `zeroize` is on, and not otherwise.
        fn is_cleared<T: zeroize::ZeroizeOnDrop>() {}
        is_cleared::<Aes256>();
        is_cleared::<cbc::Encryptor<Aes256>>();
        is_cleared::<cbc::Decryptor<Aes256>>();
        // An HMAC is states of its hash and nothing more.
        is_cleared::<Sha512>();
        is_cleared::<SealKey>();
    }

    #[test]
    fn rfc_7518_appendix_b_3_comes_out_octet_for_octet_both_ways() {
        let key = key_of(&(0..64).collect::<Vec<u8>>());
        let plaintext = b"A cipher system must not be required to be secret, and it must be able to fall into the \
            hands of the enemy without inconvenience";
        let associated_data = b"The second principle of Auguste Kerckhoffs";
        let iv = octets("1af38c2dc2b96ffdd86694092341bc04");
        let ciphertext = octets(
            "4affaaadb78c31c5da4b1b590d10ffbd3dd8d5d302423526912da037ecbcc7bd822c301dd67c373bccb584ad3e9279c2e6d12a13
             74b77f077553df829410446b36ebd97066296ae6427ea75c2e0846a11a09ccf5370dc80bfecbad28c73f09b3a3b75e662a2594410ae496b2
             e2e6609e31e6e02cc837f053d21f37ff4f51950bbe2638d09dd7a4930930806d0703b1f6",
        );
        let tag = octets("4dd3b4c088a7f45c216839645b2012bf2e6269a8c56a816dbc1b267761955bc5");
        let sealed = [iv.clone(), ciphertext, tag].concat();

        assert_eq!(
            seal_with_iv(&key, associated_data, iv.try_into().unwrap(), plaintext),
            sealed
        );
        assert_eq!(open_with(&key, associated_data, &sealed).unwrap().as_slice(), plaintext);
    }

    #[test]
    fn sealing_gives_what_wycheproof_says_for_every_valid_message() {
        let file = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/vectors/wycheproof/a256cbc_hs512_test.json"
        );
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let groups = json["testGroups"].as_array().unwrap().iter();
        let cases = groups.flat_map(|group| group["tests"].as_array().unwrap());
        let mut sealed_count = 0;
        for case in cases.filter(|case| case["result"] == "valid") {
            let field = |name: &str| octets(case[name].as_str().unwrap());
            let iv = field("iv").try_into().unwrap();
            let sealed = seal_with_iv(&key_of(&field("key")), &field("aad"), iv, &field("msg"));
            assert_eq!(
                sealed,
                [field("iv"), field("ct"), field("tag")].concat(),
                "case {}",
                case["tcId"]
            );
            sealed_count += 1;
        }
        assert_eq!(sealed_count, 67);
    }

    #[test]
    fn a_right_tag_of_any_length_but_32_does_not_open() {
        let key = SealKey::generate();
        let sealed = seal_with(&key, b"label", b"a message");
        let iv_and_ciphertext = &sealed[..sealed.len() - TAG_BYTES];
        for tag_bytes in 0..=64 {
            let opened = open_with(&key, b"label", &forged(&key, b"label", iv_and_ciphertext, tag_bytes));
            assert_eq!(opened.is_ok(), tag_bytes == TAG_BYTES, "a tag of {tag_bytes} octets");
        }
    }

    #[test]
    fn a_ciphertext_that_is_no_whole_number_of_blocks_does_not_open_under_its_right_tag() {
        let key = SealKey::generate();
        for ciphertext_bytes in (0..64).filter(|bytes| *bytes == 0 || bytes % BLOCK_BYTES != 0) {
            let sealed = forged(&key, b"label", &vec![7; IV_BYTES + ciphertext_bytes], TAG_BYTES);
            assert_eq!(
                open_with(&key, b"label", &sealed),
                Err(NotOpened),
                "{ciphertext_bytes} octets"
            );
        }
    }

    #[test]
    fn a_sealed_message_past_the_bound_does_not_open_under_its_right_tag() {
        let key = SealKey::generate();
        let sealed = seal_with_iv(
            &key,
            b"label",
            [0; IV_BYTES],
            &vec![0; PLAINTEXT_BYTES_MAX + BLOCK_BYTES],
        );
        assert_eq!(open_with(&key, b"label", &sealed), Err(NotOpened));
    }

    #[test]
    fn what_was_wrapped_is_a_key_or_does_not_unwrap() {
        let (wrapping, key) = (SealKey::generate(), SealKey::generate());
        let unwrapped = unwrap_key(&wrapping, &wrap_key(&wrapping, &key)).unwrap();
        assert_eq!(unwrapped.as_bytes(), key.as_bytes());

        assert_eq!(unwrap_key(&key, &wrap_key(&wrapping, &key)).unwrap_err(), NotOpened);
        let short = seal_with(&wrapping, KEY_LABEL, &key.as_bytes()[1..]);
        assert_eq!(unwrap_key(&wrapping, &short).unwrap_err(), NotOpened);
    }
}
