//! Keys: the hub's master keys, the keys derived from them for each host, and the credential that a host holds.
//!
//! A master key never leaves the hub. A host gets two derived keys, one for each direction, and can derive neither
//! another host's keys nor those of its own next generation from them.

use std::fmt;

use hkdf::Hkdf;
use sha2::Sha512;
use thiserror::Error;
use uuid::Uuid;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::secret_text;

/// Length of every secret: a master key, and a seal key (MAC key and encryption key together), octets.
pub const SECRET_BYTES: usize = 64;
/// Longest name of a master key, characters.
pub const KEY_ID_CHARS_MAX: usize = 32;

/// Names the project and the version of the derivation, so that no other use of a master key yields the same keys.
const DERIVATION_SALT: &[u8] = b"p2p-sync key derivation v1";
const HOST_KEY_LABEL: &[u8] = b"host key";
const WRAPPING_KEY_LABEL: &[u8] = b"outbox wrapping key";
const TOKEN_SECRET_LABEL: &[u8] = b"enrolment token";
const TOKEN_KEY_LABEL: &[u8] = b"enrolment key";

/// What every credential's text begins with; the digit is the version of its layout.
const CREDENTIAL_PREFIX: &str = "p2ps1_";
const CREDENTIAL_BYTES_MAX: usize = 1 + KEY_ID_CHARS_MAX + 16 + 4 + 2 * SECRET_BYTES;

/// 64 secret octets. Boxed, so that moving the owner leaves no copy behind; cleared when dropped; never shown.
#[derive(Clone)]
struct Secret(Box<[u8; SECRET_BYTES]>);

impl Secret {
    /// Clears the caller's array once it is copied.
    fn take(bytes: &mut [u8; SECRET_BYTES]) -> Self {
        let secret = Self(Box::new(*bytes));
        bytes.zeroize();
        secret
    }

    fn generate() -> Self {
        let mut secret = Self(Box::new([0; SECRET_BYTES]));
        fill_random(secret.0.as_mut());
        secret
    }

    /// HKDF-SHA-512 of RFC 5869 under the project's salt; `info` is encoded canonically.
    fn derive(input: &Self, info: &[&[u8]]) -> Self {
        let mut encoded = Vec::new();
        append_fields(&mut encoded, info);
        let (mut pseudorandom_key, hkdf) = Hkdf::<Sha512>::extract(Some(DERIVATION_SALT), input.0.as_ref());
        pseudorandom_key.zeroize();
        let mut output = Self(Box::new([0; SECRET_BYTES]));
        hkdf.expand(&encoded, output.0.as_mut())
            .expect("one SHA-512 output is far below HKDF's 255");
        output
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl ZeroizeOnDrop for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// Fills `bytes` with randomness from the operating system.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("a booted system gives randomness, and without it nothing may be sealed");
}

/// Appends each field behind its length (`u32`, big endian), so that no two lists of fields encode alike.
pub(crate) fn append_fields(out: &mut Vec<u8>, fields: &[&[u8]]) {
    for field in fields {
        let length = u32::try_from(field.len()).expect("a field is a name or a number, far below 4 GiB");
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(field);
    }
}

/// The name of a master key: 1 to 32 of the characters `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(String);

/// A text that does not name a master key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("a key id is 1 to {KEY_ID_CHARS_MAX} characters long and made of a-z, 0-9 and - alone")]
pub struct InvalidKeyId;

impl KeyId {
    /// Reads a name; nothing is trimmed or folded.
    pub fn parse(text: &str) -> Result<Self, InvalidKeyId> {
        let fits = (1..=KEY_ID_CHARS_MAX).contains(&text.len());
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if fits && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidKeyId)
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which way a message goes. Each has a key of its own, so that nothing sent can be turned back at its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Direction {
    /// From a host to the hub.
    ToHub = 1,
    /// From the hub to a host.
    ToHost = 2,
}

/// A key of A256CBC-HS512: 32 octets for HMAC, then 32 for AES, in the order of RFC 7518, section 5.2.2.1.
///
/// Cleared when dropped; `Debug` shows nothing of it.
#[derive(Clone, Debug)]
pub struct SealKey(Secret);

impl ZeroizeOnDrop for SealKey {}

impl SealKey {
    /// Takes the octets of a key, MAC key first.
    pub fn from_bytes(mut bytes: [u8; SECRET_BYTES]) -> Self {
        Self(Secret::take(&mut bytes))
    }

    /// A new key from the operating system's randomness; panics if there is none.
    pub fn generate() -> Self {
        Self(Secret::generate())
    }

    pub(crate) fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0.0
    }

    pub(crate) fn mac_key(&self) -> &[u8; 32] {
        self.as_bytes().first_chunk().expect("a key has 64 octets")
    }

    pub(crate) fn encryption_key(&self) -> &[u8; 32] {
        self.as_bytes().last_chunk().expect("a key has 64 octets")
    }
}

/// A key of the hub's keyring, from which all keys of hosts are derived.
///
/// Cleared when dropped; `Debug` shows its name alone.
#[derive(Clone, Debug)]
pub struct MasterKey {
    id: KeyId,
    secret: Secret,
}

impl MasterKey {
    /// A new key from the operating system's randomness; panics if there is none.
    pub fn generate(id: KeyId) -> Self {
        Self {
            id,
            secret: Secret::generate(),
        }
    }

    /// A key as the keyring keeps it.
    pub fn from_bytes(id: KeyId, mut secret: [u8; SECRET_BYTES]) -> Self {
        Self {
            id,
            secret: Secret::take(&mut secret),
        }
    }

    /// The key's name.
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// The secret itself, for writing the keyring and for nothing else.
    pub fn expose_secret(&self) -> &[u8; SECRET_BYTES] {
        &self.secret.0
    }

    /// The key of one host, generation and direction.
    pub fn host_key(&self, host_id: Uuid, generation: u32, direction: Direction) -> SealKey {
        let info: [&[u8]; 5] = [
            HOST_KEY_LABEL,
            self.id.as_str().as_bytes(),
            host_id.as_bytes(),
            &generation.to_be_bytes(),
            &[direction as u8],
        ];
        SealKey(Secret::derive(&self.secret, &info))
    }

    /// The secret of an enrolment token, which is kept nowhere: whoever reads the database can make none.
    pub fn token_secret(&self, token_id: Uuid) -> TokenSecret {
        let info: [&[u8]; 3] = [TOKEN_SECRET_LABEL, self.id.as_str().as_bytes(), token_id.as_bytes()];
        TokenSecret(Secret::derive(&self.secret, &info))
    }

    /// What the host is given at enrolment and at each renewal.
    pub fn credential(&self, host_id: Uuid, generation: u32) -> Credential {
        Credential {
            host_id,
            key_id: self.id.clone(),
            generation,
            to_hub: self.host_key(host_id, generation, Direction::ToHub),
            to_host: self.host_key(host_id, generation, Direction::ToHost),
        }
    }
}

/// What a one-time token is worth: the exchange that it pays for is sealed under keys derived from it.
///
/// Cleared when dropped; `Debug` shows nothing of it.
#[derive(Clone, Debug)]
pub struct TokenSecret(Secret);

impl TokenSecret {
    pub(crate) fn from_bytes(mut bytes: [u8; SECRET_BYTES]) -> Self {
        Self(Secret::take(&mut bytes))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0.0
    }

    /// The key of one direction of the exchange.
    pub fn seal_key(&self, direction: Direction) -> SealKey {
        SealKey(Secret::derive(&self.0, &[TOKEN_KEY_LABEL, &[direction as u8]]))
    }
}

/// What a host holds: who it is, and the keys it seals and opens with.
///
/// As text it is `p2ps1_` and the unpadded base64url of: length of the key id (1 octet), key id, host id (16),
/// generation (4, big endian), key to the hub (64), key to the host (64), and the first 4 octets of the SHA-512 of
/// all that, by which a damaged paste is told.
#[derive(Clone, Debug)]
pub struct Credential {
    /// The host's identity.
    pub host_id: Uuid,
    /// The master key that both keys are derived from.
    pub key_id: KeyId,
    /// Raised by each renewal.
    pub generation: u32,
    /// Seals what the host sends.
    pub to_hub: SealKey,
    /// Opens what the host receives.
    pub to_host: SealKey,
}

/// Why a text is not a credential, for the person who pasted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CredentialError {
    /// Nothing but white space.
    #[error("the credential is empty: paste the whole text that begins with {CREDENTIAL_PREFIX}")]
    Empty,
    /// Something else was pasted.
    #[error("this is not a credential: one begins with {CREDENTIAL_PREFIX}; copy it again from its first character")]
    WrongPrefix,
    /// A token, which is not kept but used.
    #[error("this is an enrolment token: run `p2p-sync-agent enrol` with it, and leave encryption_key empty")]
    Token,
    /// Of a layout that this build does not read.
    #[error("this credential is of a version that this program does not know: update the program, then try again")]
    UnknownVersion,
    /// The check, or what it protects, does not hold.
    #[error("this credential is damaged or cut: copy it again whole, from {CREDENTIAL_PREFIX} to its last character")]
    Damaged,
}

impl Credential {
    /// Reads the text form. White space is passed over, for a long text gets wrapped on its way to a person.
    pub fn parse(text: &str) -> Result<Self, CredentialError> {
        let joined = secret_text::joined(text);
        if joined.is_empty() {
            return Err(CredentialError::Empty);
        }
        let Some(encoded) = joined.strip_prefix(CREDENTIAL_PREFIX) else {
            return Err(wrong_prefix(&joined));
        };
        secret_text::decode(encoded, CREDENTIAL_BYTES_MAX)
            .and_then(|bytes| Self::from_layout(&bytes))
            .ok_or(CredentialError::Damaged)
    }

    /// The text form, which is a secret.
    pub fn to_text(&self) -> Zeroizing<String> {
        let key_id = self.key_id.as_str().as_bytes();
        let mut bytes = Zeroizing::new(Vec::with_capacity(CREDENTIAL_BYTES_MAX));
        bytes.push(u8::try_from(key_id.len()).expect("a key id has at most 32 characters"));
        bytes.extend_from_slice(key_id);
        bytes.extend_from_slice(self.host_id.as_bytes());
        bytes.extend_from_slice(&self.generation.to_be_bytes());
        bytes.extend_from_slice(self.to_hub.as_bytes());
        bytes.extend_from_slice(self.to_host.as_bytes());
        secret_text::encode(CREDENTIAL_PREFIX, &bytes)
    }

    /// The key that wraps the outbox's data key; derived from the key to the hub, and used for nothing else.
    pub fn wrapping_key(&self) -> SealKey {
        SealKey(Secret::derive(&self.to_hub.0, &[WRAPPING_KEY_LABEL]))
    }

    fn from_layout(bytes: &[u8]) -> Option<Self> {
        let (&key_id_length, rest) = bytes.split_first()?;
        let (key_id, rest) = rest.split_at_checked(usize::from(key_id_length))?;
        let (host_id, rest) = rest.split_first_chunk()?;
        let (generation, rest) = rest.split_first_chunk()?;
        let (to_hub, rest) = rest.split_first_chunk()?;
        let to_host = rest.try_into().ok()?;
        Some(Self {
            host_id: Uuid::from_bytes(*host_id),
            key_id: KeyId::parse(std::str::from_utf8(key_id).ok()?).ok()?,
            generation: u32::from_be_bytes(*generation),
            to_hub: SealKey::from_bytes(*to_hub),
            to_host: SealKey::from_bytes(to_host),
        })
    }
}

/// Tells another version's credential (`p2ps` digits `_`) and a token from a text that is neither.
fn wrong_prefix(text: &str) -> CredentialError {
    match text.strip_prefix("p2ps") {
        Some(rest) if secret_text::is_version(rest) => CredentialError::UnknownVersion,
        Some(rest) if rest.strip_prefix('t').is_some_and(secret_text::is_version) => CredentialError::Token,
        _ => CredentialError::WrongPrefix,
    }
}
