//! The one-time token that a volunteer pastes, and the exchange that it seals: a host's public key against its credential.

use std::fmt;

use sha2::{Digest, Sha256};
use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    certificate::PIN_BYTES,
    envelope::Lane,
    ids,
    keys::{KEY_ID_CHARS_MAX, KeyId, SECRET_BYTES, TokenSecret},
    message::Label,
    secret_text, v1,
};

/// What every token's text begins with; the digit is the version of its layout.
const TOKEN_PREFIX: &str = "p2pst1_";
/// Longest endpoint in a token, bytes.
pub const ENDPOINT_BYTES_MAX: usize = 255;
const TOKEN_BYTES_MAX: usize = 1 + KEY_ID_CHARS_MAX + 16 + SECRET_BYTES + 1 + ENDPOINT_BYTES_MAX + 1 + PIN_BYTES;

/// All that a machine needs to become a host: where the hub is, whom to trust there, and what opens its door once.
///
/// As text it is `p2pst1_` and the unpadded base64url of: length of the key id (1 octet), key id, token id (16), secret
/// (64), length of the endpoint (1), endpoint, length of the pin (1: 0 or 32), pin, and the first 4 octets of the SHA-512
/// of all that. `Debug` shows where the hub is alone.
#[derive(Clone)]
pub struct Token {
    /// The master key that the secret is derived from.
    pub key_id: KeyId,
    /// Drawn for each token; only its hash is stored.
    pub token_id: Uuid,
    /// Derived from the master key and the token's id.
    pub secret: TokenSecret,
    /// Where the hub is.
    pub endpoint: String,
    /// Of the CA that has signed the hub's certificate, or of that itself; absent where a public CA has.
    pub ca_pin: Option<[u8; PIN_BYTES]>,
}

/// Why a text is not a token, for the person who pasted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TokenError {
    /// Nothing but white space.
    #[error("the token is empty: paste the whole text that begins with {TOKEN_PREFIX}")]
    Empty,
    /// Something else was pasted.
    #[error("this is not an enrolment token: one begins with {TOKEN_PREFIX}; copy it again from its first character")]
    WrongPrefix,
    /// Of a layout that this build does not read.
    #[error("this token is of a version that this program does not know: update the program, then try again")]
    UnknownVersion,
    /// What a host holds once it is enrolled.
    #[error("this is a credential, not a token: write it behind `encryption_key =` in the configuration file")]
    Credential,
    /// The check, or what it protects, does not hold.
    #[error("this token is damaged or cut: copy it again whole, from {TOKEN_PREFIX} to its last character")]
    Damaged,
}

impl Token {
    /// Reads the text form; white space is passed over.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let joined = secret_text::joined(text);
        if joined.is_empty() {
            return Err(TokenError::Empty);
        }
        let Some(encoded) = joined.strip_prefix(TOKEN_PREFIX) else {
            return Err(wrong_prefix(&joined));
        };
        secret_text::decode(encoded, TOKEN_BYTES_MAX)
            .and_then(|bytes| Self::from_layout(&bytes))
            .ok_or(TokenError::Damaged)
    }

    /// The text form, which is a secret until it was used.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = Zeroizing::new(Vec::with_capacity(TOKEN_BYTES_MAX));
        push_field(&mut bytes, self.key_id.as_str().as_bytes());
        bytes.extend_from_slice(self.token_id.as_bytes());
        bytes.extend_from_slice(self.secret.as_bytes());
        push_field(&mut bytes, self.endpoint.as_bytes());
        push_field(&mut bytes, self.ca_pin.as_ref().map_or(&[][..], |pin| pin));
        secret_text::encode(TOKEN_PREFIX, &bytes)
    }

    /// The outside of a message of the exchange: the token stands where the host will.
    pub fn label(&self) -> Label {
        Label {
            key_id: self.key_id.clone(),
            host_id: self.token_id,
            generation: 0,
            incarnation: 0,
            sequence: 1,
            id: ids::new_id(),
            lane: Lane::Enrol,
        }
    }

    fn from_layout(bytes: &[u8]) -> Option<Self> {
        let (key_id, rest) = field(bytes)?;
        let (token_id, rest) = rest.split_first_chunk()?;
        let (secret, rest) = rest.split_first_chunk()?;
        let (endpoint, rest) = field(rest)?;
        let (pin, rest) = field(rest)?;
        let ca_pin = match pin.len() {
            0 => None,
            _ => Some(pin.try_into().ok()?),
        };
        let token = Self {
            key_id: KeyId::parse(std::str::from_utf8(key_id).ok()?).ok()?,
            token_id: Uuid::from_bytes(*token_id),
            secret: TokenSecret::from_bytes(*secret),
            endpoint: std::str::from_utf8(endpoint).ok()?.to_owned(),
            ca_pin,
        };
        rest.is_empty().then_some(token)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for v1::EnrolReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolReply")
            .field("code", &self.code())
            .field("message", &self.message)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for v1::RotateReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RotateReply")
            .field("code", &self.code())
            .field("message", &self.message)
            .finish_non_exhaustive()
    }
}

/// What the hub remembers a token by.
pub fn hash(token_id: Uuid) -> [u8; 32] {
    Sha256::digest(token_id.as_bytes()).into()
}

/// Whether hosts can be told this address; the error says what is expected.
pub fn check_endpoint(text: &str) -> Result<(), &'static str> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let is_plain = |c: char| c.is_ascii_graphic() && !matches!(c, '@' | '?' | '#' | '"' | '\\');
    match rest {
        Some(rest)
            if text.len() <= ENDPOINT_BYTES_MAX
                && !rest.is_empty()
                && !rest.starts_with(['/', ':'])
                && rest.chars().all(is_plain) =>
        {
            Ok(())
        }
        _ => Err("expected https://host:port, with a path behind it if the edge needs one"),
    }
}

fn push_field(bytes: &mut Vec<u8>, field: &[u8]) {
    bytes.push(u8::try_from(field.len()).expect("an endpoint was checked, and all else is shorter"));
    bytes.extend_from_slice(field);
}

/// A field behind its length, and what follows.
fn field(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    rest.split_at_checked(usize::from(length))
}

fn wrong_prefix(text: &str) -> TokenError {
    match text.strip_prefix("p2ps") {
        Some(rest) if secret_text::is_version(rest) => TokenError::Credential,
        Some(rest) if rest.strip_prefix('t').is_some_and(secret_text::is_version) => TokenError::UnknownVersion,
        _ => TokenError::WrongPrefix,
    }
}

#[cfg(test)]
mod tests {
    use crate::keys::{Direction, MasterKey};

    use super::*;

    fn token(endpoint: &str, ca_pin: Option<[u8; PIN_BYTES]>) -> Token {
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        let token_id = Uuid::new_v4();
        Token {
            key_id: master.id().clone(),
            token_id,
            secret: master.token_secret(token_id),
            endpoint: endpoint.to_owned(),
            ca_pin,
        }
    }

    #[test]
    fn a_token_comes_back_from_its_text_also_wrapped() {
        let longest = format!("https://{}", "h".repeat(ENDPOINT_BYTES_MAX - 8));
        for (endpoint, pin) in [
            ("https://hub.example.org:50051/p2p", Some([7; PIN_BYTES])),
            ("http://127.0.0.1:1", None),
            (longest.as_str(), Some([255; PIN_BYTES])),
        ] {
            let made = token(endpoint, pin);
            let text = made.to_text();
            assert!(text.starts_with(TOKEN_PREFIX) && text.is_ascii());
            let wrapped: String = text.as_bytes().chunks(40).fold(String::new(), |all, line| {
                all + std::str::from_utf8(line).expect("ASCII") + "\r\n  "
            });
            let read = Token::parse(&wrapped).expect("whole");
            assert_eq!((read.token_id, &read.key_id), (made.token_id, &made.key_id));
            assert_eq!((read.endpoint.as_str(), read.ca_pin), (endpoint, pin));
            assert_eq!(read.secret.as_bytes(), made.secret.as_bytes());
        }
    }

    #[test]
    fn what_is_no_token_is_told_as_what_it_is() {
        let text = token("https://hub", None).to_text();
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        let credential = master.credential(Uuid::new_v4(), 1).to_text();
        assert_eq!(
            crate::keys::Credential::parse(&text).expect_err("a token"),
            crate::keys::CredentialError::Token
        );
        let cases = [
            ("  ", TokenError::Empty),
            ("secret", TokenError::WrongPrefix),
            ("p2pst9_AAAA", TokenError::UnknownVersion),
            (credential.as_str(), TokenError::Credential),
            (&text[..text.len() - 1], TokenError::Damaged),
            (&text[..TOKEN_PREFIX.len()], TokenError::Damaged),
        ];
        for (given, expected) in cases {
            assert_eq!(Token::parse(given).expect_err("no token"), expected, "{expected:?}");
        }
        // Each character counts.
        for at in TOKEN_PREFIX.len()..text.len() {
            let other = if text.as_bytes()[at] == b'A' { "B" } else { "A" };
            let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            assert!(Token::parse(&changed).is_err(), "character {at}");
        }
        assert!(Token::parse(&"A".repeat(10_000)).is_err());
        assert!(Token::parse(&format!("{TOKEN_PREFIX}{}", "A".repeat(10_000))).is_err());
    }

    #[test]
    fn each_token_direction_and_master_key_has_a_key_of_its_own() {
        let master = |id: &str| MasterKey::from_bytes(KeyId::parse(id).expect("valid"), [1; SECRET_BYTES]);
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let key = |id: &str, token, direction| *master(id).token_secret(token).seal_key(direction).as_bytes();
        let keys = [
            key("k1", one, Direction::ToHub),
            key("k1", one, Direction::ToHost),
            key("k1", other, Direction::ToHub),
            key("k2", one, Direction::ToHub),
            *master("k1").host_key(one, 0, Direction::ToHub).as_bytes(),
            *master("k1").host_key(one, 1, Direction::ToHub).as_bytes(),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key), "key {index}");
        }
    }

    #[test]
    fn a_token_shows_none_of_its_secret() {
        let made = token("https://hub", None);
        let shown = format!("{made:?} {:?}", made.secret);
        assert_eq!(shown, "Token { endpoint: \"https://hub\", .. } TokenSecret([secret])");
    }

    #[test]
    fn an_address_for_hosts_is_one() {
        for good in [
            "https://hub.example.org",
            "https://[2001:db8::1]:1/path",
            "http://127.0.0.1:50051",
        ] {
            assert_eq!(check_endpoint(good), Ok(()), "{good}");
        }
        let long = format!("https://{}", "h".repeat(ENDPOINT_BYTES_MAX));
        for bad in [
            "",
            "hub:1",
            "https://",
            "https:///p",
            "https://u@hub",
            "https://hub?x",
            "https://h b",
            &long,
        ] {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
    }
}
