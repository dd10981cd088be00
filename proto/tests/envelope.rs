//! The envelope through its public door: what is sealed opens for its addressee, unchanged, or not at all.

use p2p_sync_proto::{
    envelope::{Header, Lane, NotOpened, OVERHEAD_BYTES_MAX, PLAINTEXT_BYTES_MAX, UnknownLane, open, seal, seal_with},
    keys::{Direction, KeyId, MasterKey, SealKey},
};
use uuid::{Uuid, uuid};

const HOST_ID: Uuid = uuid!("0190a0b0-c0d0-7e0f-8a1b-2c3d4e5f6071");
const BATCH_ID: Uuid = uuid!("0190a0b0-0001-7000-8000-000000000001");
const PLAINTEXT: &[u8] = br#"{"char_id":150001,"x":99,"y":81}"#;

fn key_id() -> KeyId {
    KeyId::parse("main-2025").unwrap()
}

fn header(key_id: &KeyId) -> Header<'_> {
    Header {
        key_id,
        generation: 3,
        direction: Direction::ToHub,
        host_id: HOST_ID,
        incarnation: 5,
        sequence: 6,
        id: BATCH_ID,
        lane: Lane::Critical,
    }
}

#[test]
fn a_message_of_any_length_opens_as_it_was_and_grows_within_the_stated_bound() {
    let (key, key_id) = (SealKey::generate(), key_id());
    for length in (0..100).chain([PLAINTEXT_BYTES_MAX]) {
        let plaintext: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
        let sealed = seal(&key, &header(&key_id), &plaintext);
        assert!(
            (OVERHEAD_BYTES_MAX - 15..=OVERHEAD_BYTES_MAX).contains(&(sealed.len() - length)),
            "{length} bytes"
        );
        assert!(
            *open(&key, &header(&key_id), &sealed).unwrap() == plaintext,
            "{length} bytes"
        );
    }
}

#[test]
#[should_panic(expected = "kept within its bound")]
fn a_plaintext_past_its_bound_is_not_sealed() {
    seal_with(&SealKey::generate(), b"label", &vec![0; PLAINTEXT_BYTES_MAX + 1]);
}

#[test]
fn no_bit_can_be_changed() {
    let (key, key_id) = (SealKey::generate(), key_id());
    let sealed = seal(&key, &header(&key_id), PLAINTEXT);
    for bit in 0..sealed.len() * 8 {
        let mut changed = sealed.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&key, &header(&key_id), &changed), Err(NotOpened), "bit {bit}");
    }
}

#[test]
fn nothing_can_be_cut_off_or_put_on_at_either_end() {
    let (key, key_id) = (SealKey::generate(), key_id());
    let sealed = seal(&key, &header(&key_id), PLAINTEXT);
    for cut in 0..sealed.len() {
        assert_eq!(
            open(&key, &header(&key_id), &sealed[..cut]),
            Err(NotOpened),
            "the first {cut} octets"
        );
        assert_eq!(
            open(&key, &header(&key_id), &sealed[cut + 1..]),
            Err(NotOpened),
            "all after octet {cut}"
        );
    }
    for added in 1..=64 {
        let more = vec![0; added];
        assert_eq!(
            open(&key, &header(&key_id), &[&sealed[..], &more].concat()),
            Err(NotOpened),
            "{added} behind"
        );
        assert_eq!(
            open(&key, &header(&key_id), &[&more, &sealed[..]].concat()),
            Err(NotOpened),
            "{added} before"
        );
    }
}

#[test]
fn a_message_opens_under_no_other_header() {
    let (key, key_id) = (SealKey::generate(), key_id());
    let other_key_id = KeyId::parse("main-2026").unwrap();
    let right = header(&key_id);
    let sealed = seal(&key, &right, PLAINTEXT);
    let wrong = [
        Header {
            key_id: &other_key_id,
            ..right
        },
        Header { generation: 4, ..right },
        Header {
            direction: Direction::ToHost,
            ..right
        },
        Header {
            host_id: BATCH_ID,
            ..right
        },
        Header {
            incarnation: 6,
            ..right
        },
        Header { sequence: 7, ..right },
        Header { id: HOST_ID, ..right },
        Header {
            lane: Lane::Bulk,
            ..right
        },
        Header {
            incarnation: right.sequence,
            sequence: right.incarnation,
            ..right
        },
    ];
    for header in wrong {
        assert_eq!(open(&key, &header, &sealed), Err(NotOpened), "{header:?}");
    }
    assert!(open(&key, &right, &sealed).is_ok());
}

#[test]
fn a_message_opens_under_no_other_key() {
    let key_id = key_id();
    let sealed = seal(&SealKey::generate(), &header(&key_id), PLAINTEXT);
    assert_eq!(open(&SealKey::generate(), &header(&key_id), &sealed), Err(NotOpened));
}

#[test]
fn a_message_cannot_be_turned_back_at_its_sender() {
    let master = MasterKey::generate(key_id());
    let credential = master.credential(HOST_ID, 3);
    let to_hub = header(master.id());
    let sealed = seal(&credential.to_hub, &to_hub, PLAINTEXT);
    assert_eq!(open(&credential.to_host, &to_hub, &sealed), Err(NotOpened));
    let to_host = Header {
        direction: Direction::ToHost,
        ..to_hub
    };
    assert_eq!(open(&credential.to_host, &to_host, &sealed), Err(NotOpened));
}

#[test]
fn the_same_message_never_looks_the_same_twice() {
    let (key, key_id) = (SealKey::generate(), key_id());
    let [first, second] = [(); 2].map(|()| seal(&key, &header(&key_id), PLAINTEXT));
    assert_eq!(first.len(), second.len());
    for (at, (ours, theirs)) in first.chunks(16).zip(second.chunks(16)).enumerate() {
        assert_ne!(ours, theirs, "block {at}");
    }
}

#[test]
fn the_associated_data_has_exactly_the_published_octets() {
    let expected = [
        b"\x01\x00\x00\x00\x10p2p-sync message".as_slice(),
        b"\x00\x00\x00\x09main-2025",
        b"\x00\x00\x00\x04\x00\x00\x00\x03",
        b"\x00\x00\x00\x01\x01",
        b"\x00\x00\x00\x10\x01\x90\xa0\xb0\xc0\xd0\x7e\x0f\x8a\x1b\x2c\x3d\x4e\x5f\x60\x71",
        b"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x05",
        b"\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x06",
        b"\x00\x00\x00\x10\x01\x90\xa0\xb0\x00\x01\x70\x00\x80\x00\x00\x00\x00\x00\x00\x01",
        b"\x00\x00\x00\x01\x01",
    ];
    assert_eq!(header(&key_id()).associated_data(), expected.concat());
}

#[test]
fn lanes_keep_their_numbers_and_no_other_number_is_one() {
    let lanes = [
        Lane::Critical,
        Lane::Bulk,
        Lane::Pull,
        Lane::Subscribe,
        Lane::Hello,
        Lane::Enrol,
        Lane::Rotate,
        Lane::Renew,
        Lane::Attend,
        Lane::Maps,
    ];
    for (number, lane) in (1..).zip(lanes) {
        assert_eq!(Lane::try_from(number), Ok(lane));
        assert_eq!(u32::from(lane as u8), number);
    }
    for number in [0, 11, 257, u32::MAX] {
        assert_eq!(Lane::try_from(number), Err(UnknownLane(number)));
    }
}
