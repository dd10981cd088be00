//! The envelope and what is in it, with a tag that is right and one that is not.

use std::sync::LazyLock;

use hmac::{Hmac, Mac as _};
use p2p_sync_proto::{
    body,
    envelope::{self, Lane},
    keys::{Credential, Direction, KeyId, MasterKey, SECRET_BYTES, SealKey},
    message::{self, Label},
    v1::{self, OperationBatch, Sealed},
};
use prost::Message as _;
use sha2::Sha512;
use uuid::Uuid;

use crate::way;

const KEY: [u8; SECRET_BYTES] = [0x5a; SECRET_BYTES];
const ASSOCIATED: &[u8] = b"fuzzed";

static CREDENTIAL: LazyLock<Credential> = LazyLock::new(|| {
    let id = KeyId::parse("k1").expect("a key id");
    MasterKey::from_bytes(id, KEY).credential(Uuid::from_u128(7), 1)
});

/// A label that nothing is wrong with.
pub(crate) fn label(lane: Lane) -> Label {
    Label::from_credential(&CREDENTIAL, 3, 1, Uuid::from_u128(9), lane)
}

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, rest)) = way(input) else { return };
    match way % 5 {
        0 => as_it_comes(rest),
        1 => under_a_right_label(rest),
        2 => under_a_right_tag(rest),
        3 => as_plaintext(rest),
        _ => changed(rest),
    }
}

/// Nothing that was not sealed opens.
fn as_it_comes(rest: &[u8]) {
    let Ok(sealed) = Sealed::decode(rest) else { return };
    let Ok(label) = Label::read(&sealed) else { return };
    let opened = message::open::<OperationBatch>(&CREDENTIAL.to_hub, Direction::ToHub, &label, &sealed);
    assert!(opened.is_err(), "a forgery opened");
}

fn under_a_right_label(rest: &[u8]) {
    let label = label(Lane::Bulk);
    let right = message::seal(&CREDENTIAL.to_hub, Direction::ToHub, &label, &OperationBatch::default());
    let sealed = Sealed {
        body: rest.to_vec().into(),
        ..right
    };
    assert_eq!(Label::read(&sealed).as_ref(), Ok(&label));
    let opened = message::open::<OperationBatch>(&CREDENTIAL.to_hub, Direction::ToHub, &label, &sealed);
    assert!(opened.is_err(), "a forgery opened");
}

/// IV and ciphertext as they come, under the tag that a holder of the key would make.
fn under_a_right_tag(iv_and_ciphertext: &[u8]) {
    let tag = <Hmac<Sha512> as hmac::KeyInit>::new_from_slice(&KEY[..32])
        .expect("HMAC takes a key of any length")
        .chain_update(ASSOCIATED)
        .chain_update(iv_and_ciphertext)
        .chain_update((ASSOCIATED.len() as u64 * 8).to_be_bytes())
        .finalize();
    let sealed = [iv_and_ciphertext, &tag.as_bytes()[..32]].concat();
    if let Ok(plain) = envelope::open_with(&SealKey::from_bytes(KEY), ASSOCIATED, &sealed) {
        let ciphertext = iv_and_ciphertext.len() - 16;
        assert!(ciphertext.is_multiple_of(16) && plain.len() < ciphertext && plain.len() + 16 >= ciphertext);
    }
}

/// What opens is decoded: as a message, or not at all.
fn as_plaintext(plain: &[u8]) {
    if plain.len() > envelope::PLAINTEXT_BYTES_MAX {
        return;
    }
    let sealed = envelope::seal_with(&CREDENTIAL.to_hub, ASSOCIATED, plain);
    let opened = envelope::open_with(&CREDENTIAL.to_hub, ASSOCIATED, &sealed).expect("sealed just now");
    assert_eq!(opened.as_slice(), plain);
    // Lists of numbers and texts of several types: no decoder panics or takes memory for what is not there.
    let _read = (
        body::decode::<OperationBatch>(plain),
        body::decode::<v1::PullRequest>(plain),
        body::decode::<v1::HelloRequest>(plain),
        body::decode::<v1::RenewRequest>(plain),
        body::decode::<v1::BatchReply>(plain),
        body::decode::<v1::PullReply>(plain),
        body::decode::<v1::HelloReply>(plain),
        body::decode::<v1::RenewReply>(plain),
    );
}

/// A message that is right but for one bit does not open.
fn changed(rest: &[u8]) {
    let Some((place, plain)) = rest.split_first_chunk::<2>() else {
        return;
    };
    if plain.len() > envelope::PLAINTEXT_BYTES_MAX {
        return;
    }
    let mut sealed = envelope::seal_with(&CREDENTIAL.to_hub, ASSOCIATED, plain);
    let bit = usize::from(u16::from_be_bytes(*place)) % (sealed.len() * 8);
    sealed[bit / 8] ^= 1 << (bit % 8);
    let opened = envelope::open_with(&CREDENTIAL.to_hub, ASSOCIATED, &sealed);
    assert!(opened.is_err(), "a changed message opened");
}
