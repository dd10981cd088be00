//! One stream, followed: where it is, and what comes of it, as the hub pushes it.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::{Code, Problem, v1};
use tokio::time::sleep;

use crate::{
    events::{AgentEvent, Events},
    link::{self, Updates, Watcher},
    replica::Replicas,
    resend,
    subscriptions::Subscription,
};

/// A subscription, and where it is.
pub(crate) struct Follower {
    id: u64,
    /// Absent where nothing is kept.
    replicas: Option<Arc<Replicas>>,
    watcher: Arc<Watcher>,
    subscription: Subscription,
    place: Place,
    retry_delay: (Duration, Duration),
    listener: Listener,
}

/// Who is told of what comes.
pub(crate) enum Listener {
    /// Each change, unless the subscription has ended. Nothing more is read before there is room for what was.
    Program {
        events: Arc<Events>,
        ended: Arc<AtomicBool>,
    },
    /// How far what is kept is whole, after each message; none where it is not.
    Keeper(Box<dyn Fn(Option<u64>) + Send + Sync>),
}

impl Follower {
    pub(crate) fn new(
        id: u64,
        watcher: Arc<Watcher>,
        subscription: Subscription,
        retry_delay: (Duration, Duration),
        listener: Listener,
    ) -> Self {
        Self {
            id,
            replicas: None,
            watcher,
            subscription,
            place: Place::default(),
            retry_delay,
            listener,
        }
    }

    /// What comes is kept there, where this was begun under its id.
    pub(crate) fn kept_in(self, replicas: Arc<Replicas>) -> Self {
        Self {
            replicas: Some(replicas),
            ..self
        }
    }

    /// Follows until it is dropped.
    pub(crate) async fn follow(mut self) {
        let mut attempts = 0;
        let mut told = None;
        loop {
            let Err(problem) = self.watch(&mut attempts, &mut told).await;
            if told.as_ref() != Some(&problem) {
                tracing::warn!(stream = self.subscription.stream, "a subscription waits: {problem}");
            }
            told = Some(problem);
            attempts += 1;
            sleep(resend::delay(attempts, self.retry_delay, fastrand::f64())).await;
        }
    }

    /// Follows by one watch until that ends, and tells what comes.
    async fn watch(&mut self, attempts: &mut u32, told: &mut Option<Problem>) -> Result<Infallible, Problem> {
        let request = self.subscription.request(self.place.at, self.place.timeline);
        let (_, mut updates): (_, Updates) = self.watcher.open(request).await?;
        loop {
            let update = updates.next().await?;
            link::check(&update)?;
            let stream = &self.subscription.stream;
            if update.code() == Code::Resync {
                tracing::warn!(
                    stream,
                    "what was told is too old to go on from: the stream is read anew"
                );
            }
            let begins = update.snapshot;
            let head = update.covered.first().map_or(update.head, |covered| covered.head);
            let states = self.place.take(stream, update).ok_or_else(missed)?;
            let kept = self.replicas.as_ref();
            let whole_upto = kept.and_then(|kept| kept.take(self.id, &states, begins, self.place.at, head));
            (*attempts, *told) = (0, None);
            match &self.listener {
                Listener::Program { events, ended } if !states.is_empty() => {
                    let room = events.room_for_page().await;
                    let updates = self.place.tell(self.id, states);
                    events.updates(room, updates, || !ended.load(Ordering::SeqCst));
                }
                Listener::Program { .. } => {}
                Listener::Keeper(tell) => tell(whole_upto),
            }
        }
    }
}

/// The hub's messages say what they cover, so that what is missing shows.
fn missed() -> Problem {
    let sentence = "the hub has left something out: it is asked anew from the last that was told";
    Problem::new(Code::HubUnavailable, sentence)
}

/// Where a subscription is in its stream.
#[derive(Debug)]
struct Place {
    /// Everything up to here was told.
    at: u64,
    /// Of the hub; 0 before it has said so.
    timeline: u64,
    /// The next update begins a snapshot.
    snapshot: bool,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            at: 0,
            timeline: 0,
            snapshot: true,
        }
    }
}

impl Place {
    /// Takes a message: gives what is new in it, or none where something before it is missing.
    fn take(&mut self, stream: &str, update: v1::Update) -> Option<Vec<v1::State>> {
        if update.snapshot {
            self.at = 0;
            self.snapshot = true;
        }
        let covered = update.covered.iter().find(|covered| covered.stream == stream);
        let (after, upto) = match covered {
            Some(covered) => (covered.after, covered.upto),
            None if update.stream == stream => (update.after, update.upto),
            None => return Some(Vec::new()),
        };
        if after > self.at {
            return None;
        }
        let before = self.at;
        self.at = self.at.max(upto);
        self.timeline = update.timeline;
        let mut states = update.states;
        states.retain(|state| state.stream_sequence > before);
        Some(states)
    }

    /// As the program is told.
    fn tell(&mut self, subscription: u64, states: Vec<v1::State>) -> Vec<AgentEvent> {
        let updates = states.into_iter().map(|state| AgentEvent::Update {
            subscription,
            state,
            snapshot: std::mem::take(&mut self.snapshot),
        });
        updates.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(after: u64, upto: u64, sequences: &[u64]) -> v1::Update {
        let state = |sequence: &u64| v1::State {
            stream_sequence: *sequence,
            ..Default::default()
        };
        v1::Update {
            stream: "prontera".to_owned(),
            after,
            upto,
            states: sequences.iter().map(state).collect(),
            timeline: 3,
            ..Default::default()
        }
    }

    fn taken(place: &mut Place, update: v1::Update) -> Option<Vec<u64>> {
        let states = place.take("prontera", update)?;
        Some(states.iter().map(|state| state.stream_sequence).collect())
    }

    #[test]
    fn invariant_08_a_message_that_leaves_something_out_is_not_taken() {
        let mut place = Place::default();
        assert_eq!(taken(&mut place, update(0, 5, &[2, 5])), Some(vec![2, 5]));
        assert_eq!(taken(&mut place, update(7, 9, &[8])), None);
        assert_eq!(place.at, 5, "it asks anew from here");
        assert_eq!(
            taken(&mut place, update(3, 6, &[4, 6])),
            Some(vec![6]),
            "what was told comes once"
        );
        let heartbeat = |after, upto| v1::Update {
            stream: String::new(),
            covered: vec![v1::Covered {
                stream: "prontera".to_owned(),
                after,
                upto,
                head: upto,
            }],
            ..update(0, 0, &[])
        };
        assert_eq!(taken(&mut place, heartbeat(6, 9)), Some(vec![]));
        assert_eq!(taken(&mut place, heartbeat(10, 11)), None);
        assert_eq!((place.at, place.timeline), (9, 3));
    }

    #[test]
    fn a_snapshot_begins_anew_and_the_first_that_is_told_of_it_says_so() {
        let mut place = Place::default();
        let told = |place: &mut Place, update| {
            let states = place.take("prontera", update).expect("nothing is missing");
            let events = place.tell(1, states);
            let begins = events
                .iter()
                .map(|event| matches!(event, AgentEvent::Update { snapshot: true, .. }));
            begins.collect::<Vec<_>>()
        };
        assert_eq!(told(&mut place, update(0, 5, &[2, 5])), [true, false]);
        assert_eq!(told(&mut place, update(5, 6, &[6])), [false]);
        let anew = v1::Update {
            snapshot: true,
            ..update(0, 1, &[])
        };
        assert!(told(&mut place, anew).is_empty());
        assert_eq!(told(&mut place, update(1, 3, &[2, 3])), [true, false]);
    }
}
