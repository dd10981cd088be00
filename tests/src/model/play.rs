//! One run of a schedule: the real store and the model of it, side by side. What one is told the other is told too, and
//! their answers are compared.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{Debug, Write as _},
};

use fastrand::Rng;
use p2p_sync_proto::{
    Path, Position,
    path::{HOST_STREAM, PLAYER_STREAM},
};
use p2p_sync_proxy::{
    operation::{Committed, Outcome, Span, ValidOp},
    store::{StateRow, Store},
};
use uuid::Uuid;

use super::{
    host::{Host, Message},
    hub::{Expected, Hub, Told, Written, number_of},
    world::World,
};

/// Where the store and the model differ, for people.
pub(super) type Difference = String;

/// A schedule while it runs.
pub(super) struct Play {
    pub(super) store: Store,
    pub(super) world: World,
    pub(super) hub: Hub,
    pub(super) hosts: Vec<Host>,
    /// On the network: not delivered yet.
    pub(super) on_the_way: Vec<Message>,
    /// All that were ever sent: any may come again.
    pub(super) sent: Vec<Message>,
    /// Answers that have not reached their hosts yet.
    pub(super) answers: Vec<(Message, Committed)>,
    /// How far the streams are that are this run's alone.
    pub(super) heads: BTreeMap<String, u64>,
    /// What it took of the streams that all runs share.
    pub(super) shared_spans: Vec<Span>,
    pub(super) operation_ids: Vec<Uuid>,
    numbers: i64,
    pub(super) deliveries: u64,
    /// What happened, a line each.
    pub(super) trace: Vec<String>,
}

impl Play {
    /// A world with its hosts enrolled, `run` being the number of this run alone.
    pub(super) async fn new(store: Store, run: u32, random: &mut Rng) -> Self {
        let world = World::new(run, random);
        for host in &world.hosts {
            store
                .add_host(*host, 7, "a writer", "k1")
                .await
                .expect("Postgres serves");
        }
        let hosts = world
            .hosts
            .iter()
            .enumerate()
            .map(|(place, id)| Host::new(*id, place))
            .collect();
        Self {
            store,
            world,
            hub: Hub::default(),
            hosts,
            on_the_way: vec![],
            sent: vec![],
            answers: vec![],
            heads: BTreeMap::new(),
            shared_spans: vec![],
            operation_ids: vec![],
            numbers: 0,
            deliveries: 0,
            trace: vec![],
        }
    }

    /// A number that no other payload has.
    pub(super) fn number(&mut self) -> i64 {
        self.numbers += 1;
        self.numbers
    }

    /// Brings a message to the store and to the model, and compares what they answer.
    pub(super) async fn deliver(&mut self, message: &Message) -> Result<Committed, Difference> {
        let mut line = format!("host {} is heard ({:?}):", message.host, message.valid.lane);
        let applied = self.store.apply(&message.valid).await;
        let expected = self.hub.apply(&message.valid);
        self.deliveries += 1;
        let committed = applied.map_err(|problem| format!("{line} the store does not take it: {problem}"))?;
        for op in &message.valid.ops {
            let told = committed.outcomes.iter().find(|(index, _)| *index == op.index);
            let told = told.map(|(_, outcome)| told_of(outcome));
            write!(line, "\n    {} -> {told:?}", describe(op)).expect("a String takes everything");
        }
        self.trace.push(line);
        compare(message, &expected, &committed)?;
        self.follow(&committed)?;
        Ok(committed)
    }

    /// What readers are told covers each stream without a hole, and in its order.
    fn follow(&mut self, committed: &Committed) -> Result<(), Difference> {
        for span in &committed.spans {
            if span.after >= span.upto {
                return Err(format!("{span:?} is empty"));
            }
            if [PLAYER_STREAM, HOST_STREAM].contains(&span.stream.as_str()) {
                self.shared_spans.push(span.clone());
                continue;
            }
            let head = self.heads.entry(span.stream.clone()).or_default();
            if span.after != *head {
                return Err(format!(
                    "stream {} was at {head}, and a message took {span:?}",
                    span.stream
                ));
            }
            *head = span.upto;
        }
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        for change in &committed.changes {
            let number = change.stream_sequence;
            let mut spans = committed.spans.iter().filter(|span| span.stream == change.stream);
            if !spans.any(|span| span.after < number && number <= span.upto) {
                return Err(format!(
                    "{} of {} lies in none of {:?}",
                    number, change.path, committed.spans
                ));
            }
            if last
                .insert(&change.stream, number)
                .is_some_and(|before| before >= number)
            {
                return Err(format!("{} of {} is not behind the one before", number, change.path));
            }
        }
        Ok(())
    }

    /// Reads a path, and compares it with the model's.
    pub(super) async fn read(&self, path: &str) -> Result<Option<StateRow>, Difference> {
        let parsed = Path::parse(path).expect("the world's paths are valid");
        let row = self.store.get(&parsed).await.map_err(|problem| problem.to_string())?;
        let (found, expected) = (row.as_ref().map(written_of), self.hub.states.get(path));
        if found.as_ref() == expected {
            Ok(row)
        } else {
            Err(format!("{path} is {found:?}, and has to be {expected:?}"))
        }
    }
}

/// A state as the model has it.
pub(super) fn written_of(row: &StateRow) -> Written {
    Written {
        path: row.path.clone(),
        tenure: row.tenure,
        host: row.host_id,
        at: row.position,
        number: row.payload.as_deref().map(number_of),
        edit: row.hub_edit,
    }
}

fn describe(op: &ValidOp) -> String {
    let at = |position: Position| format!("{}.{}", position.incarnation, position.sequence);
    let follows: Vec<String> = op.follows().map(at).collect();
    format!(
        "{}{} {} tenure {} after {follows:?} seen {} {}",
        at(op.position),
        if op.in_group { " (group)" } else { "" },
        op.path,
        op.tenure,
        op.hub_edit_seen,
        op.payload.as_deref().unwrap_or("deleted")
    )
}

fn told_of(outcome: &Outcome) -> Told {
    match outcome {
        Outcome::Applied { stream_sequence: 0 } => Told::AppliedBefore,
        Outcome::Applied { .. } => Told::Applied,
        Outcome::Superseded => Told::Superseded,
        // No type here has a rate.
        Outcome::NotYet | Outcome::HeldBack => Told::NotYet,
        Outcome::Limbo(_) => Told::Limbo,
        Outcome::Rejected(problem) => Told::Rejected(problem.code),
    }
}

fn compare(message: &Message, expected: &Expected, committed: &Committed) -> Result<(), Difference> {
    let outcomes: BTreeMap<u32, Told> = committed
        .outcomes
        .iter()
        .map(|(index, outcome)| (*index, told_of(outcome)))
        .collect();
    if outcomes.len() != committed.outcomes.len() {
        return Err(format!("an operation is told of twice: {:?}", committed.outcomes));
    }
    if outcomes != expected.outcomes {
        let mut differences = String::from("outcomes:");
        for (index, outcome) in &outcomes {
            let due = expected.outcomes.get(index);
            if due != Some(outcome) {
                let op = message.valid.ops.iter().find(|op| op.index == *index);
                let op = op.map(describe);
                write!(differences, " {op:?} is told {outcome:?}, and has to be told {due:?};")
                    .expect("a String takes everything");
            }
        }
        return Err(differences);
    }
    if committed.edits != expected.edits {
        let (told, due) = (&committed.edits, &expected.edits);
        return Err(format!("edits: {told:?} are told, and have to be {due:?}"));
    }
    let settled_now: BTreeSet<u32> = committed.settled_now.iter().copied().collect();
    if settled_now != expected.settled_now {
        let due = &expected.settled_now;
        return Err(format!("refused now are {settled_now:?}, and have to be {due:?}"));
    }
    let changes = committed.changes.iter().map(|change| Written {
        path: change.path.as_str().to_owned(),
        tenure: change.tenure,
        host: change.host_id,
        at: change.position,
        number: change.payload.as_deref().map(number_of),
        edit: change.hub_edit,
    });
    let changes: Vec<Written> = changes.collect();
    if changes != expected.changes {
        let due = &expected.changes;
        return Err(format!("changes: {changes:?} are told, and have to be {due:?}"));
    }
    Ok(())
}

pub(super) fn same<T: PartialEq + Debug>(what: &str, found: &T, due: &T) -> Result<(), Difference> {
    if found == due {
        return Ok(());
    }
    Err(format!("{what}: there is\n    {found:?}\nand has to be\n    {due:?}"))
}
