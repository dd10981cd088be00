//! Writing a message: one call of `p2p_sync.apply_batch` for each incarnation in it, each a transaction.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use deadpool_postgres::Object;
use p2p_sync_proto::{Position, Problem, envelope::Lane};
use tokio::time::{Instant, sleep_until};
use tokio_postgres::{error::SqlState, types::ToSql};
use uuid::Uuid;

use super::{
    Store, Unavailable,
    bisect::Failure,
    call::{Answer, Arguments, without_nul},
    not_answering, told, unavailable,
};
use crate::operation::{Committed, Outcome, Refused, Valid, ValidOp};

const KEEP_UNPLACED: &str = "INSERT INTO p2p_sync.rejected_operations \
    (host_id, operation_id, path, data_type, code, reason, payload) \
    SELECT $1, r.* FROM unnest($2::uuid[], $3::text[], $4::int[], $5::int[], $6::text[], $7::bytea[]) AS r \
    ON CONFLICT DO NOTHING";

/// Deadlocks and serialization failures of one call that are tried again at once, and lost connections.
const TRIES_MAX: u32 = 5;
/// Postgres ends a statement by itself; if it says nothing for this much longer, the connection is given up.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// What a message holds of one incarnation.
#[derive(Default)]
pub(super) struct Part<'a> {
    pub(super) incarnation: u64,
    /// In the order of their sequences, each sequence once, or once for each member of a group.
    pub(super) ops: Vec<&'a ValidOp>,
    pub(super) refused: Vec<Refusal<'a>>,
    /// Inclusive.
    pub(super) withdrawn: Vec<(u64, u64)>,
}

/// An operation to refuse: by validation, or because Postgres does not take it.
pub(super) struct Refusal<'a> {
    pub(super) index: u32,
    pub(super) sequence: u64,
    /// What has to be settled before it.
    pub(super) follows: Cow<'a, [Position]>,
    pub(super) operation_id: Uuid,
    pub(super) path: &'a str,
    pub(super) data_type: i32,
    pub(super) payload: Cow<'a, [u8]>,
    pub(super) problem: Cow<'a, Problem>,
}

/// How fast a message is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// As one.
    AtOnce,
    /// In parts, a transaction each.
    Slices {
        /// Of each part, at least 1; more where a group would be parted.
        operations: usize,
        /// From the begin of one to that of the next.
        every: Duration,
    },
}

impl Store {
    /// Writes a message as one, on the connections of its lane.
    ///
    /// What this returns is durable. Operations that were settled before are told what was told then; operations that
    /// Postgres refuses are rejected with `STORE_REFUSED`, and their neighbours are written. The error is
    /// `HUB_UNAVAILABLE` or `TOO_MANY_GAPS`.
    ///
    /// Not to be cancelled: run it on a task of its own, so that what was committed is cached and published too.
    pub async fn apply(&self, valid: &Valid) -> Result<Committed, Unavailable> {
        self.apply_at(valid, Pace::AtOnce).await
    }

    /// As [`Self::apply`], at a pace.
    pub async fn apply_at(&self, valid: &Valid, pace: Pace) -> Result<Committed, Unavailable> {
        let mut committed = Committed {
            timeline: 0,
            outcomes: Vec::new(),
            settled_now: Vec::new(),
            changes: Vec::new(),
            spans: Vec::new(),
            edits: HashMap::new(),
        };
        let (parts, repeated) = split(valid);
        self.keep_unplaced(valid, &mut committed).await?;
        let (mut due, mut written) = (Instant::now(), 0);
        for slice in parts.into_iter().flat_map(|part| part.slices(pace)) {
            if let Pace::Slices { operations, every } = pace {
                written += slice.ops.len();
                // Those of several incarnations that are one slice together follow one another.
                if written > operations || due <= Instant::now() {
                    sleep_until(due).await;
                    (due, written) = (Instant::now() + every, slice.ops.len());
                }
            }
            self.apply_part(valid, slice, &mut committed).await?;
        }
        if committed.timeline == 0 {
            committed.timeline = self.timeline().await?;
        }
        for (index, first) in repeated {
            let told = committed
                .outcomes
                .iter()
                .find(|(told, _)| *told == first)
                .map(|(_, outcome)| outcome.clone());
            committed.outcomes.extend(told.map(|outcome| (index, outcome)));
            if let Some(edits) = committed.edits.get(&first).cloned() {
                committed.edits.insert(index, edits);
            }
        }
        self.inner.pools.make_durable().await?;
        Ok(committed)
    }

    /// Keeps what was refused without a position; nothing is settled by it.
    async fn keep_unplaced(&self, valid: &Valid, committed: &mut Committed) -> Result<(), Unavailable> {
        let unplaced: Vec<&Refused> = valid
            .refused
            .iter()
            .filter(|refused| refused.position.is_none())
            .collect();
        if unplaced.is_empty() {
            return Ok(());
        }
        let client = self.lane(valid.lane).await?;
        let statement = client
            .prepare_cached(KEEP_UNPLACED)
            .await
            .map_err(|error| unavailable(&error))?;
        let (mut ids, mut paths, mut types) = (Vec::new(), Vec::new(), Vec::new());
        let (mut codes, mut reasons, mut payloads) = (Vec::new(), Vec::new(), Vec::new());
        for refused in &unplaced {
            ids.push(refused.operation_id);
            paths.push(without_nul(&refused.path));
            types.push(refused.data_type);
            codes.push(refused.problem.code as i32);
            reasons.push(without_nul(&refused.problem.sentence));
            payloads.push(refused.payload.as_slice());
        }
        let values: [&(dyn ToSql + Sync); 7] = [&valid.host_id, &ids, &paths, &types, &codes, &reasons, &payloads];
        let kept = client
            .execute(&statement, &values)
            .await
            .map_err(|error| unavailable(&error))?;
        if kept > 0 {
            committed.settled_now.extend(unplaced.iter().map(|one| one.index));
        }
        committed.outcomes.extend(
            unplaced
                .iter()
                .map(|one| (one.index, Outcome::Rejected(one.problem.clone()))),
        );
        Ok(())
    }

    /// Applies a part in one transaction, again where it only met others.
    pub(super) async fn call(&self, valid: &Valid, part: &Part<'_>) -> Result<Answer, Failure> {
        let arguments = Arguments::of(valid.host_id, part);
        let mut tries = 1;
        loop {
            let client = self.lane(valid.lane).await?;
            let error = match self.call_once(client, valid.lane, &arguments).await? {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let failure = Failure::of(&error);
            if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) {
                self.inner.pools.leave_server();
            }
            if tries == TRIES_MAX || !matches!(failure, Failure::Again(_)) {
                return Err(failure);
            }
            tracing::debug!(error = %told(&error), tries, "the transaction is run again");
            tokio::time::sleep(Duration::from_millis(u64::from(tries * tries))).await;
            tries += 1;
        }
    }

    /// The outer error is a connection that went silent: it is closed, for nobody knows what it still does.
    async fn call_once(
        &self,
        client: Object,
        lane: Lane,
        arguments: &Arguments<'_>,
    ) -> Result<Result<Answer, tokio_postgres::Error>, Unavailable> {
        let limit = self.inner.statement_timeout(lane) + SILENCE_MAX;
        if let Ok(answer) = tokio::time::timeout(limit, arguments.send(&client, self.inner.leases.required)).await {
            return Ok(answer);
        }
        tracing::warn!(?limit, "Postgres says nothing; the connection is closed");
        drop(Object::take(client));
        Err(Unavailable(not_answering()))
    }
}

/// A message's parts by incarnation, and the indices that repeat an earlier one's position.
fn split(valid: &Valid) -> (Vec<Part<'_>>, Vec<(u32, u32)>) {
    let mut parts: BTreeMap<u64, Part<'_>> = BTreeMap::new();
    let mut first: HashMap<Position, u32> = HashMap::with_capacity(valid.ops.len());
    let mut repeated = Vec::new();
    let mut is_first = |position: Position, index: u32| match first.insert(position, index) {
        None => true,
        // The next member of the same group.
        Some(earlier) if earlier == index => true,
        Some(earlier) => {
            first.insert(position, earlier);
            repeated.push((index, earlier));
            false
        }
    };
    for op in &valid.ops {
        if is_first(op.position, op.index) {
            parts.entry(op.position.incarnation).or_default().ops.push(op);
        }
    }
    for refused in &valid.refused {
        let Some(position) = refused.position.filter(|&position| is_first(position, refused.index)) else {
            continue;
        };
        parts
            .entry(position.incarnation)
            .or_default()
            .refused
            .push(Refusal::of(refused, position.sequence));
    }
    for range in valid.withdrawn.iter().filter(|range| range.first <= range.last) {
        parts
            .entry(range.incarnation)
            .or_default()
            .withdrawn
            .push((range.first, range.last));
    }
    let parts = parts.into_iter().map(|(incarnation, mut part)| {
        part.incarnation = incarnation;
        // Stable: the members of a group stay together, in their order.
        part.ops.sort_by_key(|op| op.position.sequence);
        part
    });
    (parts.collect(), repeated)
}

impl<'a> Part<'a> {
    /// The same in parts of so many operations at most, the first with all that is not an operation.
    fn slices(mut self, pace: Pace) -> Vec<Part<'a>> {
        let Pace::Slices { operations, .. } = pace else {
            return vec![self];
        };
        let mut units: Vec<Vec<&ValidOp>> = Vec::new();
        for unit in self.ops.chunk_by(|one, next| one.position == next.position) {
            match units.last_mut() {
                Some(slice) if slice.len() < operations => slice.extend(unit),
                _ => units.push(unit.to_vec()),
            }
        }
        let mut slices = units.into_iter();
        self.ops = slices.next().unwrap_or_default();
        let incarnation = self.incarnation;
        let of = |ops| Part {
            incarnation,
            ops,
            ..Part::default()
        };
        std::iter::once(self).chain(slices.map(of)).collect()
    }
}

impl<'a> Refusal<'a> {
    fn of(refused: &'a Refused, sequence: u64) -> Self {
        Self {
            index: refused.index,
            sequence,
            follows: Cow::Borrowed(&refused.follows),
            operation_id: refused.operation_id,
            path: &refused.path,
            data_type: refused.data_type,
            payload: Cow::Borrowed(&refused.payload),
            problem: Cow::Borrowed(&refused.problem),
        }
    }
}
