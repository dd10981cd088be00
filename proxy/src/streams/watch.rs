//! One subscriber: what it is told, in order, sealed message by message as it reads them.
//!
//! Nothing is queued for it: the next message is made when the one before was taken, out of what the feeds hold, or out of
//! Postgres where the subscriber is further back. So a slow one costs a message and its positions, and slows nobody.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem, ids::new_id, v1};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    End,
    feed::{Feed, Found, Listener},
    filter::Filter,
    ring::{Entry, Read},
};
use crate::{
    admission::hosts::{Host, WatchPlace},
    open::Sender,
    pipeline::Hub,
    store::Reader,
};

/// Between two messages that tell how far all streams are, whatever else is told.
pub const HEARTBEAT: Duration = Duration::from_secs(3);
/// Changes that nobody waits for are told together, so long after the first.
const LINGER: Duration = Duration::from_millis(20);
/// Who takes nothing of what waits for it for so long is cut; it resumes when it likes.
const SLOW_MAX: Duration = Duration::from_secs(10);
/// Changes read from the database at once.
const CHANGES_PER_READ: u32 = 128;
/// Between two attempts to read from a database that does not answer.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// See the module.
pub struct Watch {
    hub: Arc<Hub>,
    host: Arc<Host>,
    sender: Sender,
    /// Under which its messages are sealed.
    id: Uuid,
    /// Messages sealed so.
    sealed: u64,
    timeline: u64,
    filter: Filter,
    followed: Vec<Followed>,
    listener: Arc<Listener>,
    /// The stream that is looked at next, so that none is told before all others for ever.
    next: usize,
    heartbeat: Instant,
    /// The message before was given so long ago; its bytes are counted until the next is asked for.
    given: Option<(Instant, OwnedSemaphorePermit)>,
    end: Arc<End>,
    has_ended: bool,
    _place: WatchPlace,
}

/// Where a subscriber is in one stream.
struct Followed {
    feed: Arc<Feed>,
    /// Everything up to here was looked at.
    at: u64,
    /// Everything up to here was told.
    told: u64,
    /// The next message of it begins a snapshot, and says why if it is another.
    snapshot: Option<Code>,
}

impl Watch {
    /// Begins a watch; gives the answer, which is its first message, and what goes on behind it unless it is refused.
    pub async fn begin(
        hub: &Arc<Hub>,
        host: &Arc<Host>,
        sender: Sender,
        request: v1::SubscribeRequest,
    ) -> (v1::Sealed, Option<Self>) {
        let timeline = request.timeline;
        let end: Arc<End> = Arc::default();
        let asked = Filter::read(sender.host_id(), request).and_then(|(filter, positions)| {
            let place = host.watch(positions.len(), &end)?;
            Ok((filter, positions, place))
        });
        let (filter, positions, place) = match asked {
            Ok(asked) => asked,
            Err(problem) => return (refused(hub, &sender, problem), None),
        };
        let mut watch = Self {
            hub: Arc::clone(hub),
            host: Arc::clone(host),
            sender,
            id: new_id(),
            sealed: 0,
            timeline: 0,
            filter,
            followed: Vec::new(),
            listener: Arc::default(),
            next: 0,
            heartbeat: Instant::now() + HEARTBEAT,
            given: None,
            end,
            has_ended: false,
            _place: place,
        };
        if let Err(problem) = watch.follow(positions, timeline).await {
            return (refused(hub, &watch.sender, problem), None);
        }
        let (host_id, generation) = (watch.sender.host_id(), watch.sender.label().generation);
        hub.streams.open(watch.id, host_id, generation, &watch.end);
        let first = v1::Update {
            timeline: watch.timeline,
            watch_id: watch.id.as_bytes().to_vec().into(),
            heartbeat_ms: u32::try_from(HEARTBEAT.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        (watch.sender.seal(&first), Some(watch))
    }

    /// Finds each stream and where the subscriber is in it.
    async fn follow(&mut self, positions: Vec<v1::StreamPosition>, timeline: u64) -> Result<(), Problem> {
        let streams = Arc::clone(&self.hub.streams);
        let mut feeds = Vec::with_capacity(positions.len());
        for (number, position) in (0..).zip(positions) {
            let feed = streams.follow(&position.stream, &self.listener, number)?;
            feeds.push(Arc::clone(&feed));
            self.followed.push(Followed {
                feed,
                at: position.sequence,
                told: position.sequence,
                snapshot: None,
            });
        }
        streams.place(&feeds).await?;
        // By now each is known, and they may differ only while the hub's database goes back.
        self.timeline = feeds
            .iter()
            .filter_map(|feed| feed.head())
            .map(|head| head.timeline)
            .max()
            .unwrap_or(0);
        for (number, followed) in (0..).zip(&mut self.followed) {
            let known = followed.feed.head().filter(|head| head.timeline == self.timeline);
            let is_kept = known.is_some_and(|head| (head.floor..=head.head).contains(&followed.at));
            let is_of_timeline = timeline == self.timeline;
            if followed.at == 0 {
                followed.snapshot = Some(Code::None);
            } else if !is_kept || !is_of_timeline {
                followed.begin_anew();
            }
            self.listener.moved(number, true);
        }
        Ok(())
    }

    /// The next message, when there is something to tell; none after the last.
    pub async fn next(&mut self) -> Option<v1::Sealed> {
        if self.has_ended {
            return None;
        }
        let given = self.given.take();
        let is_slow = given.is_some_and(|(at, _)| at.elapsed() > SLOW_MAX);
        let update = if is_slow { self.cut() } else { self.next_update().await? };
        self.has_ended = !matches!(update.code(), v1::RejectCode::None | v1::RejectCode::Resync);
        self.sealed += 1;
        let sealed = self.sender.seal_numbered(self.id, self.sealed, &update);
        let mut draining = self.hub.draining.clone();
        let room = tokio::select! {
            room = self.host.answering(sealed.body.len()) => room,
            _ = draining.wait_for(|draining| *draining) => return None,
        };
        self.given = Some((Instant::now(), room));
        Some(sealed)
    }

    /// None where the hub shuts down.
    async fn next_update(&mut self) -> Option<v1::Update> {
        let mut draining = self.hub.draining.clone();
        loop {
            if *draining.borrow() {
                return None;
            }
            if let Some(problem) = self.end.reason() {
                return Some(self.said(problem));
            }
            if Instant::now() >= self.heartbeat {
                return Some(self.heartbeat());
            }
            match self.look().await {
                Ok(Some(update)) => return Some(update),
                Ok(None) => {}
                Err(problem) if problem.code == Code::TooLarge => return Some(self.said(problem)),
                Err(_) => sleep(RETRY_DELAY).await,
            }
            let woken = async {
                self.listener.woken().await;
                // Until something comes that cannot wait.
                let urgent = async {
                    while !self.listener.take_urgent() {
                        self.listener.woken().await;
                    }
                };
                let _lingered = timeout(LINGER, urgent).await;
            };
            let end = Arc::clone(&self.end);
            let rest = self.heartbeat.saturating_duration_since(Instant::now());
            tokio::select! {
                () = woken => {}
                () = sleep(rest) => {}
                () = end.told.notified() => {}
                // An error means that nobody is left to drain for.
                _ = draining.wait_for(|draining| *draining) => return None,
            }
        }
    }

    /// Looks once at each stream that has moved, until one has something to tell.
    async fn look(&mut self) -> Result<Option<v1::Update>, Problem> {
        for _ in 0..self.followed.len() {
            let number = self.next;
            self.next = (self.next + 1) % self.followed.len();
            let bit = u32::try_from(number).unwrap_or(u32::MAX);
            if !self.listener.take(bit) {
                continue;
            }
            let advanced = self.advance(number).await;
            // What is not read to its end is looked at again.
            if !matches!(advanced, Ok(Advanced { is_all: true, .. })) {
                self.listener.moved(bit, true);
            }
            if let Some(update) = advanced?.update {
                return Ok(Some(update));
            }
        }
        Ok(None)
    }

    async fn advance(&mut self, number: usize) -> Result<Advanced, Problem> {
        let followed = &self.followed[number];
        let (feed, at) = (Arc::clone(&followed.feed), followed.at);
        let (upto, states, is_all, head) = match feed.read(self.timeline, at, &self.filter) {
            Found::OtherTimeline => {
                self.resync();
                return Ok(Advanced::default());
            }
            Found::Read(Read::Nothing, head) => (at, Vec::new(), true, head),
            Found::Read(Read::Some { upto, states, more }, head) => (upto, states, !more, head),
            Found::Read(Read::Behind, head) => {
                let (upto, states) = self.read_back(&feed, at).await?;
                (upto, states, false, head.max(upto))
            }
        };
        let followed = &mut self.followed[number];
        followed.at = upto;
        if states.is_empty() && (followed.snapshot.is_none() || !is_all) {
            return Ok(Advanced { update: None, is_all });
        }
        let snapshot = followed.snapshot.take();
        let update = v1::Update {
            stream: feed.name().to_owned(),
            after: std::mem::replace(&mut followed.told, upto),
            upto,
            states,
            timeline: self.timeline,
            snapshot: snapshot.is_some(),
            code: snapshot.unwrap_or(Code::None).into(),
            head,
            ..Default::default()
        };
        Ok(Advanced {
            update: Some(update),
            is_all,
        })
    }

    /// Reads what has left memory, as one of the host's own questions.
    async fn read_back(&self, feed: &Feed, at: u64) -> Result<(u64, Vec<v1::State>), Problem> {
        let _share = self.host.reading().await;
        let shut_down = |_| Problem::new(Code::ShutDown, "the hub is shutting down");
        let _permit = self.hub.reads.acquire().await.map_err(shut_down)?;
        let store = &self.hub.store;
        let found = store.changes(Reader::Host, feed.name(), at, CHANGES_PER_READ).await?;
        if found.head.timeline != self.timeline {
            self.hub.streams.look_now();
            return Err(Problem::new(Code::HubUnavailable, "the hub's database went back"));
        }
        let (mut page, mut upto) = (self.filter.page(), found.upto);
        let mut last = at;
        for row in &found.rows {
            let entry = Entry::of_row(row);
            if entry.bytes + 1024 > p2p_sync_proto::limits::MESSAGE_BYTES_MAX {
                let path = &row.path;
                let sentence =
                    format!("the state at {path} is larger than a message: ask the operator to make it smaller");
                return Err(Problem::new(Code::TooLarge, sentence));
            }
            if !page.add(&entry) {
                upto = last;
                break;
            }
            last = row.stream_sequence;
        }
        Ok((upto, page.states))
    }

    /// The hub's database went back: everything begins anew.
    fn resync(&mut self) {
        let timelines = self.followed.iter().filter_map(|followed| followed.feed.head());
        self.timeline = timelines.map(|head| head.timeline).max().unwrap_or(self.timeline);
        for (number, followed) in (0..).zip(&mut self.followed) {
            followed.begin_anew();
            self.listener.moved(number, true);
        }
    }

    fn heartbeat(&mut self) -> v1::Update {
        self.heartbeat = Instant::now() + HEARTBEAT;
        v1::Update {
            timeline: self.timeline,
            covered: self.covered(true),
            ..Default::default()
        }
    }

    /// How far each stream is; where `moves`, this tells it.
    fn covered(&mut self, moves: bool) -> Vec<v1::Covered> {
        let all = self.followed.iter_mut().map(|followed| {
            // A snapshot that was announced and not begun is told by its first message.
            let upto = if moves && followed.snapshot.is_none() {
                followed.at
            } else {
                followed.told
            };
            v1::Covered {
                stream: followed.feed.name().to_owned(),
                after: std::mem::replace(&mut followed.told, upto),
                upto,
                head: followed.feed.head().map_or(upto, |head| head.head.max(upto)),
            }
        });
        all.collect()
    }

    /// What a subscriber is told that was cut.
    fn cut(&mut self) -> v1::Update {
        let host_id = self.sender.host_id();
        tracing::debug!(%host_id, "a subscriber is cut: it took nothing for {SLOW_MAX:?}");
        let sentence = "nothing of this watch was read for too long: resume it from where it is";
        v1::Update {
            covered: self.covered(false),
            ..self.said(Problem::new(Code::TooSlow, sentence))
        }
    }

    fn said(&self, problem: Problem) -> v1::Update {
        said(self.timeline, problem)
    }
}

/// The answer that nothing is followed.
pub fn refused(hub: &Hub, sender: &Sender, problem: Problem) -> v1::Sealed {
    sender.seal(&said(hub.timeline.load(Ordering::Relaxed), problem))
}

fn said(timeline: u64, problem: Problem) -> v1::Update {
    let problem = problem.shortened();
    v1::Update {
        timeline,
        code: problem.code.into(),
        message: problem.sentence,
        ..Default::default()
    }
}

/// What became of a look at a stream.
#[derive(Default)]
struct Advanced {
    update: Option<v1::Update>,
    /// There is nothing more of it now.
    is_all: bool,
}

impl Followed {
    fn begin_anew(&mut self) {
        (self.at, self.told) = (0, 0);
        self.snapshot = Some(Code::Resync);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        for followed in &self.followed {
            followed.feed.unfollow(&self.listener);
        }
        self.hub.streams.closed(self.id);
    }
}
