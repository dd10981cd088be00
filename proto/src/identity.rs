//! A host's own key pair: Ed25519, made on the host, whose private half never leaves it. The hub registers the public half
//! at enrolment.

use std::fmt;

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    keys::{append_fields, fill_random},
    secret_text,
};

/// Length of a public key, octets.
pub const PUBLIC_KEY_BYTES: usize = 32;
const SEED_BYTES: usize = 32;
/// What a private key's text begins with; the digit is the version of its layout.
const PREFIX: &str = "p2psk1_";
const PROOF_LABEL: &[u8] = b"p2p-sync enrolment proof 1";

/// A key pair of a host. The private half is cleared when dropped and never shown.
#[derive(Clone)]
pub struct Identity(Box<Zeroizing<[u8; SEED_BYTES]>>);

impl Identity {
    /// A new one from the operating system's randomness; panics if there is none.
    pub fn generate() -> Self {
        let mut seed = Self(Box::default());
        fill_random(seed.0.as_mut_slice());
        seed
    }

    /// Reads [`Self::to_text`]; `None` where it is damaged.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = secret_text::decode(text.trim().strip_prefix(PREFIX)?, SEED_BYTES)?;
        let mut seed = Self(Box::default());
        (bytes.len() == SEED_BYTES).then(|| seed.0.copy_from_slice(&bytes))?;
        Some(seed)
    }

    /// The private half as text, for the host's own file and for nothing else.
    pub fn to_text(&self) -> Zeroizing<String> {
        secret_text::encode(PREFIX, self.0.as_slice())
    }

    /// The public half.
    pub fn public_key(&self) -> [u8; PUBLIC_KEY_BYTES] {
        self.pair()
            .public_key()
            .as_ref()
            .try_into()
            .expect("a public key has 32 octets")
    }

    /// Proves to the holder of a token's other side that this key's private half is here.
    pub fn prove_enrolment(&self, token_id: Uuid) -> Vec<u8> {
        let pair = self.pair();
        pair.sign(&proven(token_id, pair.public_key().as_ref()))
            .as_ref()
            .to_vec()
    }

    /// Made for the moment, for it does not clear itself.
    fn pair(&self) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(self.0.as_slice()).expect("a seed has 32 octets")
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity([secret])")
    }
}

/// Whether whoever made `proof` holds the private half of `public_key`, and made it for this token.
pub fn is_proven(token_id: Uuid, public_key: &[u8], proof: &[u8]) -> bool {
    public_key.len() == PUBLIC_KEY_BYTES
        && UnparsedPublicKey::new(&ED25519, public_key)
            .verify(&proven(token_id, public_key), proof)
            .is_ok()
}

fn proven(token_id: Uuid, public_key: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    append_fields(&mut message, &[PROOF_LABEL, token_id.as_bytes(), public_key]);
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_key_and_token_alone() {
        let (identity, other) = (Identity::generate(), Identity::generate());
        let (token, key) = (Uuid::new_v4(), identity.public_key());
        let proof = identity.prove_enrolment(token);
        assert!(is_proven(token, &key, &proof));
        assert!(!is_proven(Uuid::new_v4(), &key, &proof));
        assert!(!is_proven(token, &other.public_key(), &proof));
        assert!(!is_proven(token, &key, &other.prove_enrolment(token)));
        assert!(!is_proven(token, &key[1..], &proof) && !is_proven(token, &key, &[]));
    }

    #[test]
    fn a_key_comes_back_from_its_text_and_does_not_show() {
        let identity = Identity::generate();
        let text = identity.to_text();
        let read = Identity::parse(&text).expect("whole");
        assert_eq!(read.public_key(), identity.public_key());
        assert!(Identity::parse(&text[..text.len() - 1]).is_none());
        assert_eq!(format!("{read:?}"), "Identity([secret])");
    }
}
