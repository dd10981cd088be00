//! Messages of operations, from the body of an envelope to what may be stored.

use p2p_sync_proto::{
    body,
    limits::MESSAGE_BYTES_MAX,
    v1::{self, Operation, OperationBatch, OperationKind, OperationRef, SequenceRange, Version, operation::Payload},
};
use prost::Message as _;

use crate::way;

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, rest)) = way(input) else { return };
    match way % 4 {
        // The octet that names the compression is the fuzzer's too.
        0 => body::decode(rest).into_iter().for_each(check),
        1 => OperationBatch::decode(rest).into_iter().for_each(check),
        2 => unpacked(rest),
        _ => check(made_up(rest)),
    }
}

/// A frame of zstd that was one, its first bytes changed: what it announces and what it holds may differ.
fn unpacked(rest: &[u8]) {
    let Some((changes, plain)) = rest.split_first_chunk::<4>() else {
        return;
    };
    let repeated = plain.repeat(1 + usize::from(changes[3]) * 16);
    let Ok(mut frame) = zstd::bulk::compress(&repeated, 1) else {
        return;
    };
    for (place, change) in changes[..3].iter().enumerate() {
        if let Some(byte) = frame.get_mut(4 + place) {
            *byte ^= change;
        }
    }
    frame.insert(0, 1);
    if let Some(batch) = body::decode::<OperationBatch>(&frame) {
        assert!(batch.encoded_len() <= MESSAGE_BYTES_MAX);
        check(batch);
    }
}

/// A batch in its canonical encoding, so that more than the first check is reached.
fn made_up(rest: &[u8]) -> OperationBatch {
    const PATHS: [&str; 8] = [
        "prontera/MONSTER_DATA/7",
        "prontera/MAP_STATE",
        "prontera/CHAT_MESSAGE/8",
        "@char/7/PLAYER_DATA",
        "@char/7/PLAYER_PRESENCE",
        "prontera/PLAYER_POSITION/7",
        "prontera/ITEM_DROP/1",
        "@host/00000000-0000-0000-0000-000000000007/HOST_METRICS",
    ];
    let mut batch = OperationBatch::default();
    let mut bytes = Reader(rest);
    while !bytes.0.is_empty() && batch.operations.len() <= 40 {
        let odd = bytes.byte();
        if odd == 0xff {
            batch.withdrawn.push(SequenceRange {
                incarnation: bytes.number(),
                first: bytes.number(),
                last: bytes.number(),
            });
            continue;
        }
        let mut operation = bytes.operation(&PATHS);
        if odd & 0x80 != 0 {
            operation.kind = OperationKind::Group.into();
            let mut members = Vec::new();
            for _ in 0..odd & 7 {
                let mut member = bytes.operation(&PATHS);
                if odd & 8 == 0 {
                    (operation.path, operation.policy_version, operation.account_id) = Default::default();
                    (operation.map, operation.hub_edit_seen) = Default::default();
                    operation.predecessor = None;
                    member.operation_id.clone_from(&operation.operation_id);
                    member.version = operation.version;
                }
                members.push(member.encode_to_vec().into());
            }
            operation.payload = Some(Payload::Group(v1::Group { members }));
        }
        let mut encoded = operation.encode_to_vec();
        if odd & 0x10 != 0 {
            encoded.push(bytes.byte());
        }
        batch.operations.push(encoded.into());
    }
    batch
}

/// Takes numbers and texts from the input; zeros behind its end.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// Small ones mostly, and those at the edges.
    fn number(&mut self) -> u64 {
        match self.byte() {
            0xff => u64::MAX,
            0xfe => i64::MAX.unsigned_abs(),
            0xfd => i64::MAX.unsigned_abs() - 1,
            small => small.into(),
        }
    }

    fn text(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()) * 4;
        let (text, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        text
    }

    fn operation(&mut self, paths: &[&str]) -> Operation {
        let path = self.byte();
        let path = match paths.get(usize::from(path)) {
            Some(path) => (*path).to_owned(),
            None => String::from_utf8_lossy(self.text()).into_owned(),
        };
        let odd = self.byte();
        let incarnation = if odd & 1 == 0 { 3 } else { self.number() };
        let payload = match odd >> 5 {
            0 => None,
            1 => Some(Payload::Delta(v1::Delta::default())),
            2 => Some(Payload::Blob(v1::Blob::default())),
            _ => Some(Payload::Full(self.text().to_vec().into())),
        };
        Operation {
            operation_id: vec![self.byte(); if odd & 2 == 0 { 16 } else { 15 }].into(),
            version: (odd & 4 == 0).then(|| Version {
                tenure: self.number(),
                incarnation,
                sequence: self.number(),
            }),
            path,
            kind: i32::from(self.byte() % 5),
            account_id: self.byte().into(),
            map: if odd & 8 == 0 {
                String::new()
            } else {
                "geffen".to_owned()
            },
            policy_version: u32::from(self.byte() % 4),
            hub_edit_seen: self.number(),
            predecessor: (odd & 16 != 0).then(|| OperationRef {
                incarnation,
                sequence: self.number(),
            }),
            presence: (odd & 32 != 0).then(|| OperationRef {
                incarnation,
                sequence: self.number(),
            }),
            made_at_ms: self.number(),
            payload,
        }
    }
}

/// What is found valid is within its bounds, and nothing is decided twice.
#[cfg(fuzzing)]
fn check(batch: OperationBatch) {
    use std::{
        collections::HashSet,
        pin::pin,
        sync::LazyLock,
        task::{Context, Poll, Waker},
    };

    use p2p_sync_proto::{
        Path,
        envelope::Lane,
        limits::{BATCH_OPS_MAX, PAYLOAD_BYTES_MAX},
    };
    use p2p_sync_proxy::{
        open::Authenticated,
        validate::{types_file::Rules, validate},
    };

    static RULES: LazyLock<Rules> = LazyLock::new(Rules::builtin);
    let operations = batch.operations.len();
    let message = Authenticated::unproven(crate::envelope::label(Lane::Bulk), batch);
    let mut checking = pin!(validate(&RULES, message));
    let (_, valid) = loop {
        // It gives others their turn, and has none to wait for.
        if let Poll::Ready(checked) = checking.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            break checked;
        }
    };
    let Ok(valid) = valid else { return };
    assert!(operations <= BATCH_OPS_MAX && valid.ops.len() <= BATCH_OPS_MAX);
    let mut decided = HashSet::new();
    for op in &valid.ops {
        assert_eq!(Path::parse(op.path.as_str()).as_ref(), Ok(&op.path));
        assert!(
            op.payload
                .as_ref()
                .is_none_or(|payload| payload.len() <= PAYLOAD_BYTES_MAX)
        );
        assert!((op.index as usize) < operations && op.deleted == op.payload.is_none());
        assert!(decided.insert(op.index) || op.in_group);
    }
    for refused in &valid.refused {
        assert!(decided.insert(refused.index), "refused and valid");
        assert!(refused.payload.len() <= MESSAGE_BYTES_MAX);
    }
    assert_eq!(decided.len(), operations);
}

/// Only opening makes what is validated, but for a fuzzer.
#[cfg(not(fuzzing))]
fn check(batch: OperationBatch) {
    drop(batch);
}
