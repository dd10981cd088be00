//! Secrets as text that people paste: a prefix that says what it is, base64url, and a check by which a damaged paste is
//! told.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha512};
use zeroize::Zeroizing;

const CHECK_BYTES: usize = 4;

/// The text without its white space, for a long one gets wrapped on its way to a person.
pub(crate) fn joined(text: &str) -> Zeroizing<String> {
    let mut joined = Zeroizing::new(String::with_capacity(text.len()));
    joined.extend(text.split_whitespace());
    joined
}

/// `prefix` and the unpadded base64url of the bytes and the first 4 octets of their SHA-512.
pub(crate) fn encode(prefix: &str, bytes: &[u8]) -> Zeroizing<String> {
    // Of their size from the beginning: what grows would leave pieces of the secret behind.
    let mut checked = Zeroizing::new(Vec::with_capacity(bytes.len() + CHECK_BYTES));
    checked.extend_from_slice(bytes);
    checked.extend_from_slice(&check_of(bytes));
    let mut base64 = Zeroizing::new(vec![0; chars_of(bytes.len())]);
    let length = URL_SAFE_NO_PAD
        .encode_slice(checked.as_slice(), base64.as_mut_slice())
        .expect("sized for these bytes");
    let mut text = Zeroizing::new(String::with_capacity(prefix.len() + length));
    text.push_str(prefix);
    text.push_str(std::str::from_utf8(&base64[..length]).expect("base64 is ASCII"));
    text
}

/// The bytes, at most so many, of what stood behind the prefix; `None` where the check does not hold.
pub(crate) fn decode(encoded: &str, bytes_max: usize) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; bytes_max + CHECK_BYTES]);
    let length = URL_SAFE_NO_PAD.decode_slice(encoded, bytes.as_mut_slice()).ok()?;
    let (content, check) = bytes.get(..length)?.split_last_chunk::<CHECK_BYTES>()?;
    if *check != check_of(content) {
        return None;
    }
    let content_bytes = content.len();
    bytes.truncate(content_bytes);
    Some(bytes)
}

/// Whether this is digits and `_`, as the layouts of a kind are told apart.
pub(crate) fn is_version(rest: &str) -> bool {
    rest.split_once('_')
        .is_some_and(|(digits, _)| !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit()))
}

fn chars_of(bytes: usize) -> usize {
    ((bytes + CHECK_BYTES) * 4).div_ceil(3)
}

fn check_of(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    *Sha512::digest(bytes).first_chunk().expect("SHA-512 gives 64 octets")
}
