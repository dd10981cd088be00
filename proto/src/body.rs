//! What is inside a seal: one octet naming the compression, then the encoded message.

use prost::Message;
use zeroize::Zeroizing;

use crate::limits::MESSAGE_BYTES_MAX;

const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// Below this many bytes a message does not get smaller by more than it costs.
const COMPRESS_BYTES_MIN: usize = 256;
/// Level 1 halves a batch of game events in a fraction of the time that sealing it takes.
const ZSTD_LEVEL: i32 = 1;

/// Encodes a message, compressed where it pays. Both forms are cleared when dropped: there are messages that carry keys.
pub fn encode(message: &impl Message) -> Zeroizing<Vec<u8>> {
    let mut plain = Zeroizing::new(Vec::with_capacity(message.encoded_len() + 1));
    plain.push(PLAIN);
    message.encode(&mut *plain).expect("a Vec grows as needed");
    if plain.len() < COMPRESS_BYTES_MIN {
        return plain;
    }
    match zstd::bulk::compress(&plain[1..], ZSTD_LEVEL).map(Zeroizing::new) {
        Ok(compressed) if compressed.len() + 1 < plain.len() => {
            let mut body = Zeroizing::new(Vec::with_capacity(compressed.len() + 1));
            body.push(ZSTD);
            body.extend_from_slice(&compressed);
            body
        }
        _ => plain,
    }
}

/// Decodes a message; `None` for anything that is not one, or that would unpack to more than [`MESSAGE_BYTES_MAX`].
pub fn decode<M: Message + Default>(body: &[u8]) -> Option<M> {
    let (&compression, rest) = body.split_first()?;
    match compression {
        PLAIN if rest.len() <= MESSAGE_BYTES_MAX => M::decode(rest).ok(),
        ZSTD => {
            let plain = zstd::bulk::decompress(rest, unpacked_bytes(rest)?)
                .ok()
                .map(Zeroizing::new)?;
            M::decode(plain.as_slice()).ok()
        }
        _ => None,
    }
}

/// The size that the frame announces, when it is one we accept: no memory is taken before that is known.
fn unpacked_bytes(frame: &[u8]) -> Option<usize> {
    let announced = zstd::zstd_safe::get_frame_content_size(frame).ok()??;
    usize::try_from(announced)
        .ok()
        .filter(|&bytes| bytes <= MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::OperationBatch;

    fn batch_of(bytes: usize) -> OperationBatch {
        OperationBatch {
            operations: vec![vec![7; bytes].into()],
            withdrawn: vec![],
        }
    }

    #[test]
    fn small_and_large_messages_come_back_as_they_were() {
        for bytes in [0, 10, 300, 100_000] {
            let batch = batch_of(bytes);
            assert_eq!(decode::<OperationBatch>(&encode(&batch)), Some(batch));
        }
    }

    #[test]
    fn a_repetitive_message_gets_smaller() {
        assert!(encode(&batch_of(100_000)).len() < 1000);
    }

    #[test]
    fn a_bomb_is_refused_by_its_announced_size() {
        let bomb = zstd::bulk::compress(&vec![0; MESSAGE_BYTES_MAX + 1], 1).expect("compresses");
        let body = [&[ZSTD], bomb.as_slice()].concat();
        assert_eq!(decode::<OperationBatch>(&body), None);
    }

    #[test]
    fn garbage_is_refused() {
        for body in [&[][..], &[2, 1, 2], &[ZSTD, 1, 2, 3], &[PLAIN, 0xff, 0xff]] {
            assert_eq!(decode::<OperationBatch>(body), None);
        }
    }
}
