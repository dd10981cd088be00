//! The call of `p2p_sync.apply_batch`: a part of a message as arrays, and the answer as outcomes.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt::Write,
};

use deadpool_postgres::Object;
use p2p_sync_proto::{Code, Position, Problem, envelope::Lane, limits::SEQUENCE_GAPS_MAX, policy::Keep};
use tokio_postgres::{
    Row,
    types::{FromSql, ToSql},
};
use uuid::Uuid;

use super::{apply::Part, signed, unsigned};
use crate::operation::{Change, Committed, History, Outcome, Span, Valid, ValidOp};

const APPLY: &str = "SELECT * FROM p2p_sync.apply_batch($1, $2, $3, \
    $4::text::int8multirange, $5::text::int8multirange, $6::text::int8multirange, \
    $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, \
    $26::text[]::jsonb[], $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42)";

const CONFLICT: &str = "the hub's operator edited this state, and its writer had not seen that: the operator's stays, and this is kept \
    beside it. What this host writes from now on is taken: read the path, and write what is still meant";
const TOO_OLD: &str = "the operation comes from an outbox that was closed long ago, and newer state may have been deleted since: it is refused";

/// The arguments of `apply_batch`, in its order.
pub(super) struct Arguments<'a> {
    host_id: Uuid,
    incarnation: i64,
    sets: [String; 3],
    streams: Vec<&'a str>,
    stream_counts: Vec<i64>,
    sequences: Vec<i64>,
    stream_of: Vec<i32>,
    stream_back: Vec<i64>,
    followers: Vec<i64>,
    predecessor_incarnations: Vec<i64>,
    predecessors: Vec<i64>,
    operation_ids: Vec<Uuid>,
    tenures: Vec<i64>,
    paths: Vec<&'a str>,
    data_types: Vec<i16>,
    keeps_every: Vec<bool>,
    log_seconds: Vec<Option<i32>>,
    deleted: Vec<bool>,
    account_ids: Vec<i64>,
    maps: Vec<&'a str>,
    hub_edits_seen: Vec<i64>,
    made_at_ms: Vec<i64>,
    payloads: Vec<Option<&'a str>>,
    in_group: Vec<bool>,
    conflict_rules: Vec<i16>,
    embedded: Vec<i64>,
    refused_sequences: Vec<i64>,
    refused_ids: Vec<Uuid>,
    refused_paths: Vec<Cow<'a, str>>,
    refused_types: Vec<i32>,
    refused_codes: Vec<i32>,
    refused_reasons: Vec<Cow<'a, str>>,
    refused_payloads: Vec<&'a [u8]>,
}

impl<'a> Arguments<'a> {
    pub(super) fn of(host_id: Uuid, part: &'a Part<'a>) -> Self {
        let (ops, refused) = (&part.ops, &part.refused);
        let given: Vec<&str> = ops.iter().map(|op| op.path.parts().scope.stream()).collect();
        let (streams, stream_counts, stream_of, stream_back) = number(&given);
        let has_groups = ops.iter().any(|op| op.in_group);
        let of_ops = ops
            .iter()
            .flat_map(|op| op.follows().map(|before| (op.position.sequence, before)));
        let of_refused = refused
            .iter()
            .flat_map(|one| one.follows.iter().map(|before| (one.sequence, *before)));
        let mut following: Vec<(u64, Position)> = of_ops.chain(of_refused).collect();
        following.sort_by_key(|(sequence, _)| *sequence);
        Self {
            host_id,
            incarnation: signed(part.incarnation),
            sets: [
                multirange(ops.iter().map(|op| (op.position.sequence, op.position.sequence))),
                multirange(refused.iter().map(|one| (one.sequence, one.sequence))),
                multirange(part.withdrawn.iter().copied()),
            ],
            streams,
            stream_counts,
            sequences: ops.iter().map(|op| signed(op.position.sequence)).collect(),
            stream_of,
            stream_back,
            followers: following.iter().map(|(sequence, _)| signed(*sequence)).collect(),
            predecessor_incarnations: following.iter().map(|(_, before)| signed(before.incarnation)).collect(),
            predecessors: following.iter().map(|(_, before)| signed(before.sequence)).collect(),
            operation_ids: ops.iter().map(|op| op.operation_id).collect(),
            tenures: ops.iter().map(|op| signed(op.tenure)).collect(),
            paths: ops.iter().map(|op| op.path.as_str()).collect(),
            data_types: ops.iter().map(|op| op.data_type as i16).collect(),
            keeps_every: ops.iter().map(|op| op.keep == Keep::Every).collect(),
            log_seconds: ops.iter().map(|op| log_seconds(op)).collect(),
            deleted: ops.iter().map(|op| op.deleted).collect(),
            account_ids: ops.iter().map(|op| i64::from(op.account_id)).collect(),
            maps: ops.iter().map(|op| op.map.as_str()).collect(),
            hub_edits_seen: ops.iter().map(|op| signed(op.hub_edit_seen)).collect(),
            made_at_ms: ops.iter().map(|op| signed(op.made_at_ms)).collect(),
            payloads: ops.iter().map(|op| op.payload.as_deref()).collect(),
            in_group: ops.iter().filter(|_| has_groups).map(|op| op.in_group).collect(),
            conflict_rules: ops.iter().map(|op| op.conflict_rule as i16).collect(),
            embedded: (1..)
                .zip(ops)
                .filter(|(_, op)| op.embedded)
                .map(|(place, _)| place)
                .collect(),
            refused_sequences: refused.iter().map(|one| signed(one.sequence)).collect(),
            refused_ids: refused.iter().map(|one| one.operation_id).collect(),
            refused_paths: refused.iter().map(|one| without_nul(one.path)).collect(),
            refused_types: refused.iter().map(|one| one.data_type).collect(),
            refused_codes: refused.iter().map(|one| one.problem.code as i32).collect(),
            refused_reasons: refused.iter().map(|one| without_nul(&one.problem.sentence)).collect(),
            refused_payloads: refused.iter().map(|one| one.payload.as_ref()).collect(),
        }
    }

    /// Calls `apply_batch`; what comes back is committed.
    pub(super) async fn send(&self, client: &Object, leases_required: bool) -> Result<Answer, tokio_postgres::Error> {
        let statement = client.prepare_cached(APPLY).await?;
        let gaps_max = i32::try_from(SEQUENCE_GAPS_MAX).expect("a few thousand");
        let [batch, refused, withdrawn] = &self.sets;
        #[rustfmt::skip]
        let values: [&(dyn ToSql + Sync); 42] = [
            &self.host_id, &self.incarnation, &gaps_max, batch, refused, withdrawn,
            &self.streams, &self.stream_counts,
            &self.sequences, &self.stream_of, &self.stream_back,
            &self.followers, &self.predecessor_incarnations, &self.predecessors,
            &self.operation_ids, &self.tenures, &self.paths, &self.data_types, &self.keeps_every,
            &self.log_seconds, &self.deleted, &self.account_ids, &self.maps, &self.hub_edits_seen,
            &self.made_at_ms, &self.payloads, &self.in_group,
            &self.refused_sequences, &self.refused_ids, &self.refused_paths, &self.refused_types,
            &self.refused_codes, &self.refused_reasons, &self.refused_payloads,
            &(Code::Conflict as i32), &CONFLICT,
            &leases_required, &(Code::NotLeaseHolder as i32), &(Code::StaleTenure as i32), &(Code::PlayerNotHere as i32),
            &self.conflict_rules, &self.embedded,
        ];
        let row = client.query_one(&statement, &values).await?;
        // Absent where nothing was set apart now.
        let before: Option<i32> = row.get("told_before");
        let before = before.map_or(usize::MAX, |before| usize::try_from(before).unwrap_or_default());
        Ok(Answer {
            timeline: unsigned(row.get("timeline")),
            received_at_ms: unsigned(row.get("received_at_ms")),
            closed: row.get("closed"),
            waiting: list(&row, "waiting"),
            told: list(&row, "told_sequences")
                .into_iter()
                .zip(list(&row, "told_codes"))
                .zip(list(&row, "told_reasons").into_iter().zip(list(&row, "told_limbo")))
                .enumerate()
                .map(|(place, ((sequence, code), (reason, limbo)))| {
                    let told = Told {
                        code,
                        reason,
                        limbo,
                        now: place >= before,
                    };
                    (sequence, told)
                })
                .collect(),
            refused_before: list(&row, "refused_before"),
            decided: list(&row, "decided_rows")
                .into_iter()
                .zip(list(&row, "decided_outcomes"))
                .zip(
                    list(&row, "decided_numbers")
                        .into_iter()
                        .zip(list(&row, "decided_tenures")),
                )
                .map(|((place, outcome), (number, tenure))| {
                    let decided = Decided {
                        outcome,
                        number,
                        tenure,
                    };
                    (place, decided)
                })
                .collect(),
            edits: by_sequence(list(&row, "edit_sequences"), list(&row, "edits")),
        })
    }
}

fn by_sequence(sequences: Vec<i64>, edits: Vec<i64>) -> HashMap<i64, Vec<u64>> {
    let mut by_sequence: HashMap<i64, Vec<u64>> = HashMap::new();
    for (sequence, edit) in sequences.into_iter().zip(edits) {
        by_sequence.entry(sequence).or_default().push(unsigned(edit));
    }
    by_sequence
}

/// An array that is NULL where it would be empty.
fn list<'r, T: FromSql<'r>>(row: &'r Row, column: &str) -> Vec<T> {
    row.get::<_, Option<Vec<T>>>(column).unwrap_or_default()
}

/// What `apply_batch` returns; keyed by sequence where nothing else is said.
pub(super) struct Answer {
    timeline: u64,
    received_at_ms: u64,
    closed: bool,
    waiting: Vec<i64>,
    told: HashMap<i64, Told>,
    /// Of the sequences to be refused, those that were settled before.
    refused_before: Vec<i64>,
    /// By the operation's place in the call, from 1.
    decided: HashMap<i64, Decided>,
    /// The last edit of each path whose writer had seen another.
    edits: HashMap<i64, Vec<u64>>,
}

/// What was written of an operation.
#[derive(Clone, Copy)]
struct Decided {
    outcome: i16,
    /// In its stream.
    number: i64,
    /// Under which it counts, whatever its host said.
    tenure: i64,
}

/// What was rejected or put into limbo, by this call or an earlier one.
struct Told {
    code: i32,
    reason: String,
    limbo: bool,
    /// By this call.
    now: bool,
}

impl Answer {
    /// Adds what became of a part.
    pub(super) fn add_to(&self, committed: &mut Committed, valid: &Valid, part: &Part<'_>) {
        committed.timeline = self.timeline;
        self.add_spans(committed, part);
        let mut member = 0;
        for (row, op) in (1..).zip(&part.ops) {
            let outcome = self.outcome(Some(row), op.position.sequence);
            let sequence = signed(op.position.sequence);
            let is_next = committed.outcomes.last().is_none_or(|(index, _)| *index != op.index);
            member = if is_next { 0 } else { member + 1 };
            let edits = self.edits.get(&sequence);
            if let Some(edits) = edits.filter(|_| is_next) {
                committed.edits.insert(op.index, edits.clone());
            }
            if is_next && self.told.get(&sequence).is_some_and(|told| told.now) {
                committed.settled_now.push(op.index);
            }
            if let Outcome::Applied {
                stream_sequence: stream_sequence @ 1..,
            } = outcome
            {
                let tenure = self.decided.get(&row).map_or(0, |decided| unsigned(decided.tenure));
                let hub_edit = edits.and_then(|edits| edits.get(member).copied());
                let hub_edit = hub_edit.unwrap_or(op.hub_edit_seen);
                let change = self.change(valid, op, stream_sequence, tenure, hub_edit);
                committed.changes.push(change);
            }
            match committed.outcomes.last_mut() {
                // One outcome for all members of a group: it applied if any of them became the newest of its path.
                Some((index, whole)) if op.in_group && *index == op.index => {
                    if *whole == Outcome::Superseded {
                        *whole = outcome;
                    }
                }
                _ => committed.outcomes.push((op.index, outcome)),
            }
        }
        for refused in &part.refused {
            let sequence = signed(refused.sequence);
            let is_new = !self.closed && !self.refused_before.contains(&sequence) && !self.waiting.contains(&sequence);
            let outcome = if is_new {
                committed.settled_now.push(refused.index);
                Outcome::Rejected(refused.problem.clone().into_owned())
            } else {
                self.outcome(None, refused.sequence)
            };
            committed.outcomes.push((refused.index, outcome));
        }
    }

    /// A stream's numbers were taken in one piece, one for each operation of the part there; any that was decided tells where.
    fn add_spans(&self, committed: &mut Committed, part: &Part<'_>) {
        let given: Vec<&str> = part.ops.iter().map(|op| op.path.parts().scope.stream()).collect();
        let (streams, counts, stream_of, stream_back) = number(&given);
        let mut heads: Vec<Option<i64>> = vec![None; streams.len()];
        for (row, (of, back)) in (1..).zip(stream_of.iter().zip(&stream_back)) {
            if let (Some(decided), Ok(of)) = (self.decided.get(&row), usize::try_from(*of)) {
                heads[of - 1] = Some(decided.number + back);
            }
        }
        let taken = streams.iter().zip(counts).zip(heads);
        let spans = taken.filter_map(|((stream, count), head)| {
            head.map(|head| Span {
                stream: (*stream).to_owned(),
                after: unsigned(head - count),
                upto: unsigned(head),
            })
        });
        committed.spans.extend(spans);
    }

    fn outcome(&self, row: Option<i64>, sequence: u64) -> Outcome {
        let sequence = signed(sequence);
        if self.closed {
            return Outcome::Rejected(Problem::new(Code::OutboxTooOld, TOO_OLD));
        }
        if let Some(decided) = row.and_then(|row| self.decided.get(&row)) {
            return match decided.outcome {
                0 => Outcome::Applied {
                    stream_sequence: unsigned(decided.number),
                },
                1 => Outcome::Superseded,
                _ => Outcome::Rejected(Problem::new(Code::Conflict, CONFLICT)),
            };
        }
        if self.waiting.contains(&sequence) {
            return Outcome::NotYet;
        }
        match self.told.get(&sequence) {
            Some(told) if told.limbo => Outcome::Limbo(Problem::new(code_of(told.code), &told.reason)),
            Some(told) => Outcome::Rejected(Problem::new(code_of(told.code), &told.reason)),
            None => Outcome::Applied { stream_sequence: 0 },
        }
    }

    fn change(&self, valid: &Valid, op: &ValidOp, stream_sequence: u64, tenure: u64, hub_edit: u64) -> Change {
        Change {
            path: op.path.clone(),
            stream: op.path.parts().scope.stream().to_owned(),
            stream_sequence,
            host_id: valid.host_id,
            tenure,
            position: op.position,
            data_type: op.data_type,
            keep: op.keep,
            deleted: op.deleted,
            account_id: op.account_id,
            payload: op.payload.clone(),
            received_at_ms: self.received_at_ms,
            critical: valid.lane == Lane::Critical,
            group_id: op.in_group.then_some(op.operation_id),
            hub_edit,
        }
    }
}

/// A code as the tables hold it; a newer hub's, which this build does not know, is ours to look into.
pub(super) fn code_of(number: i32) -> Code {
    Code::try_from(number).unwrap_or(Code::Internal)
}

/// Postgres' texts hold everything but NUL.
pub(crate) fn without_nul(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        Cow::Owned(text.replace('\0', "\u{fffd}"))
    } else {
        Cow::Borrowed(text)
    }
}

/// As `p_log_seconds` takes it. A group is logged whole.
fn log_seconds(op: &ValidOp) -> Option<i32> {
    match (op.keep, op.history) {
        _ if op.in_group => Some(0),
        (Keep::Every, _) | (_, History::All) => Some(0),
        (_, History::Sampled { seconds }) => Some(i32::try_from(seconds).unwrap_or(i32::MAX)),
        (_, History::Off) => None,
    }
}

/// The distinct streams, sorted, and how often each occurs; for each element which stream it is, from 1, and how many
/// elements of that stream follow it.
fn number<'a>(given: &[&'a str]) -> (Vec<&'a str>, Vec<i64>, Vec<i32>, Vec<i64>) {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for stream in given {
        *counts.entry(stream).or_default() += 1;
    }
    let (streams, stream_counts): (Vec<&str>, Vec<i64>) = counts.into_iter().unzip();
    let mut left = stream_counts.clone();
    let (mut stream_of, mut stream_back) = (Vec::new(), Vec::new());
    for stream in given {
        let place = streams.binary_search(stream).expect("each was counted");
        left[place] -= 1;
        stream_of.push(i32::try_from(place + 1).expect("at most one a operation"));
        stream_back.push(left[place]);
    }
    (streams, stream_counts, stream_of, stream_back)
}

/// Inclusive ranges as Postgres reads an `int8multirange`; neighbours and repetitions are joined, so that most are one
/// range.
fn multirange(ranges: impl Iterator<Item = (u64, u64)>) -> String {
    let mut joined: Vec<(i64, i64)> = Vec::new();
    for (first, last) in ranges.map(|(first, last)| (signed(first), signed(last))) {
        match joined.last_mut() {
            Some((begin, end)) if first >= *begin && first <= *end + 1 => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    let mut text = String::from("{");
    for (index, (first, last)) in joined.iter().enumerate() {
        let separator = if index == 0 { "" } else { "," };
        write!(text, "{separator}[{first},{last}]").expect("a String takes everything");
    }
    text + "}"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::COUNTER_MAX;

    #[test]
    fn neighbouring_sequences_become_one_range() {
        let single = |sequence| (sequence, sequence);
        assert_eq!(
            multirange([1, 2, 3, 7, 9, 10].into_iter().map(single)),
            "{[1,3],[7,7],[9,10]}"
        );
        assert_eq!(multirange([1, 2, 2, 2, 3].into_iter().map(single)), "{[1,3]}");
        assert_eq!(multirange([].into_iter()), "{}");
        assert_eq!(
            multirange([(5, u64::MAX)].into_iter()),
            format!("{{[5,{COUNTER_MAX}]}}")
        );
    }

    #[test]
    fn operations_of_a_stream_are_numbered_in_their_order() {
        let (streams, counts, stream_of, stream_back) = number(&["prontera", "geffen", "prontera", "prontera"]);
        assert_eq!((streams, counts), (vec!["geffen", "prontera"], vec![1, 3]));
        assert_eq!((stream_of, stream_back), (vec![2, 1, 2, 2], vec![2, 0, 1, 0]));
    }
}
