//! An operation's canonical bytes, written straight from what the caller has.

use prost::{
    bytes::BufMut,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint},
};
use uuid::Uuid;

use crate::{ids::Position, v1::OperationKind};

/// The parts of a [`v1::Operation`](crate::v1::Operation) with a whole payload or none, borrowed from whoever makes it.
#[derive(Clone, Copy, Debug)]
pub struct OperationParts<'a> {
    /// Its id.
    pub operation_id: Uuid,
    /// Of the version.
    pub tenure: u64,
    /// Of the version.
    pub position: Position,
    /// The address of the state.
    pub path: &'a str,
    /// What is done to it.
    pub kind: OperationKind,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// Where it happened, when the path does not say.
    pub map: &'a str,
    /// The version of the policies that the path was made by.
    pub policy_version: u32,
    /// The number of the last edit by the hub's operator that the writer had seen on the path; 0 for none.
    pub hub_edit_seen: u64,
    /// The operation before this one on its path, where its order counts and that one was not settled.
    pub predecessor: Option<Position>,
    /// The last coming or going of the player that it belongs to, where that was not settled.
    pub presence: Option<Position>,
    /// The host's clock, milliseconds since 1970.
    pub made_at_ms: u64,
    /// JSON; `None` for a DELETE.
    pub payload: Option<&'a [u8]>,
}

impl OperationParts<'_> {
    /// Writes the bytes that [`v1::Operation`](crate::v1::Operation) encodes to.
    pub fn encode(&self, to: &mut impl BufMut) {
        bytes(to, 1, self.operation_id.as_bytes());
        numbers(to, 2, &self.version());
        text(to, 3, self.path);
        number(to, 4, self.kind as u64);
        number(to, 5, self.account_id.into());
        text(to, 6, self.map);
        number(to, 7, self.policy_version.into());
        number(to, 8, self.hub_edit_seen);
        if let Some(predecessor) = reference(self.predecessor) {
            numbers(to, 9, &predecessor);
        }
        number(to, 10, self.made_at_ms);
        if let Some(presence) = reference(self.presence) {
            numbers(to, 11, &presence);
        }
        if let Some(payload) = self.payload {
            bytes(to, 16, payload);
        }
    }

    /// Where [`Self::encode`] writes the path.
    pub fn path_range(&self) -> std::ops::Range<usize> {
        let id = 1 + prefixed_len(self.operation_id.as_bytes().len());
        let version = 1 + prefixed_len(numbers_len(&self.version()));
        let first = id + version + 1 + encoded_len_varint(self.path.len() as u64);
        first..first + self.path.len()
    }

    /// How many bytes [`Self::encode`] writes.
    pub fn encoded_len(&self) -> usize {
        let scalars = [
            self.kind as u64,
            self.account_id.into(),
            self.policy_version.into(),
            self.hub_edit_seen,
            self.made_at_ms,
        ];
        let texts = [self.path, self.map].into_iter().filter(|text| !text.is_empty());
        1 + prefixed_len(self.operation_id.as_bytes().len())
            + 1
            + prefixed_len(numbers_len(&self.version()))
            + texts.map(|text| 1 + prefixed_len(text.len())).sum::<usize>()
            + numbers_len(&scalars)
            + [self.predecessor, self.presence]
                .into_iter()
                .filter_map(reference)
                .map(|numbers| 1 + prefixed_len(numbers_len(&numbers)))
                .sum::<usize>()
            + self.payload.map_or(0, |payload| 2 + prefixed_len(payload.len()))
    }

    fn version(&self) -> [u64; 3] {
        [self.tenure, self.position.incarnation, self.position.sequence]
    }
}

fn reference(before: Option<Position>) -> Option<[u64; 2]> {
    before.map(|before| [before.incarnation, before.sequence])
}

fn prefixed_len(bytes: usize) -> usize {
    encoded_len_varint(bytes as u64) + bytes
}

/// Of fields whose tags take one byte each; a zero is left out.
fn numbers_len(values: &[u64]) -> usize {
    let present = values.iter().filter(|&&value| value != 0);
    present.map(|&value| 1 + encoded_len_varint(value)).sum()
}

fn number(to: &mut impl BufMut, tag: u32, value: u64) {
    if value != 0 {
        encode_key(tag, WireType::Varint, to);
        encode_varint(value, to);
    }
}

/// A message of numbers, whose tags are counted from 1.
fn numbers(to: &mut impl BufMut, tag: u32, values: &[u64]) {
    encode_key(tag, WireType::LengthDelimited, to);
    encode_varint(numbers_len(values) as u64, to);
    for (tag, value) in (1..).zip(values) {
        number(to, tag, *value);
    }
}

fn text(to: &mut impl BufMut, tag: u32, value: &str) {
    if !value.is_empty() {
        bytes(to, tag, value.as_bytes());
    }
}

fn bytes(to: &mut impl BufMut, tag: u32, value: &[u8]) {
    encode_key(tag, WireType::LengthDelimited, to);
    encode_varint(value.len() as u64, to);
    to.put_slice(value);
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::v1;

    fn as_generated(parts: &OperationParts<'_>) -> v1::Operation {
        v1::Operation {
            operation_id: parts.operation_id.as_bytes().to_vec().into(),
            version: Some(parts.position.version(parts.tenure)),
            path: parts.path.to_owned(),
            kind: parts.kind.into(),
            account_id: parts.account_id,
            map: parts.map.to_owned(),
            policy_version: parts.policy_version,
            hub_edit_seen: parts.hub_edit_seen,
            predecessor: parts.predecessor.map(Into::into),
            presence: parts.presence.map(Into::into),
            made_at_ms: parts.made_at_ms,
            payload: parts
                .payload
                .map(|json| v1::operation::Payload::Full(json.to_vec().into())),
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_generated_encoding() {
        let seed = fastrand::u64(..);
        let mut random = fastrand::Rng::with_seed(seed);
        // Of every length a number can be encoded in, zero included.
        let any = |random: &mut fastrand::Rng| random.u64(..).checked_shr(random.u32(0..=64)).unwrap_or(0);
        for _ in 0..20_000 {
            let position = |random: &mut fastrand::Rng| Position {
                incarnation: any(random),
                sequence: any(random),
            };
            let letters = "m".repeat(40_000);
            let text = |random: &mut fastrand::Rng, max: usize| &letters[..random.usize(..max)];
            let short = |number: u64| u32::try_from(number >> 32).expect("32 bits");
            let kinds = [OperationKind::Unspecified, OperationKind::Put, OperationKind::Delete];
            let parts = OperationParts {
                operation_id: Uuid::from_u128(random.u128(..)),
                tenure: any(&mut random),
                position: position(&mut random),
                path: text(&mut random, 300),
                kind: kinds[random.usize(..3)],
                account_id: short(any(&mut random)),
                map: text(&mut random, 3),
                policy_version: short(any(&mut random)),
                hub_edit_seen: any(&mut random),
                predecessor: random.bool().then(|| position(&mut random)),
                presence: random.bool().then(|| position(&mut random)),
                made_at_ms: any(&mut random),
                payload: random.bool().then(|| text(&mut random, 40_000).as_bytes()),
            };
            let mut encoded = Vec::new();
            parts.encode(&mut encoded);
            assert_eq!(encoded, as_generated(&parts).encode_to_vec(), "seed {seed}: {parts:?}");
            if !parts.path.is_empty() {
                assert_eq!(
                    &encoded[parts.path_range()],
                    parts.path.as_bytes(),
                    "seed {seed}: {parts:?}"
                );
            }
            assert_eq!(parts.encoded_len(), encoded.len(), "seed {seed}: {parts:?}");
        }
    }
}
