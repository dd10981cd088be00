//! One stream that somebody follows: its ring, and who is woken when it moves.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use tokio::sync::Notify;

use super::{
    filter::Filter,
    ring::{Batch, Read, Ring, Taken},
};
use crate::store::Head;

/// Commits that are told before it is known where the stream is.
const UNPLACED_MAX: usize = 64;

/// Wakes a follower of up to 64 streams, and says which have moved.
#[derive(Debug, Default)]
pub struct Listener {
    moved: AtomicU64,
    urgent: AtomicBool,
    wake: Notify,
}

impl Listener {
    /// The stream of a number, below 64, has something new.
    pub fn moved(&self, number: u32, urgent: bool) {
        self.moved.fetch_or(1 << number, Ordering::SeqCst);
        if urgent {
            self.urgent.store(true, Ordering::SeqCst);
        }
        self.wake.notify_one();
    }

    /// Whether a stream has moved since this was asked last. To be asked before it is read.
    pub fn take(&self, number: u32) -> bool {
        self.moved.fetch_and(!(1 << number), Ordering::SeqCst) & 1 << number != 0
    }

    /// Whether something waits to be told at once; forgets it.
    pub fn take_urgent(&self) -> bool {
        self.urgent.swap(false, Ordering::SeqCst)
    }

    /// Waits until something may have moved.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }
}

/// See the module.
#[derive(Debug)]
pub struct Feed {
    name: String,
    // A std mutex: held for what is in memory, never across an await.
    inner: Mutex<Inner>,
    all_bytes: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Inner {
    /// Absent until it is known where the stream is.
    placed: Option<Placed>,
    /// Told before that.
    unplaced: Vec<Batch>,
    followers: Vec<(Arc<Listener>, u32)>,
    /// It is read from the database now.
    is_read: bool,
    /// Since when nobody follows it.
    idle_since: Option<Instant>,
}

#[derive(Debug)]
struct Placed {
    timeline: u64,
    floor: u64,
    ring: Ring,
}

/// What a follower finds; see [`Read`].
#[derive(Debug)]
pub enum Found {
    /// The hub's database has gone back: what was told is of another timeline.
    OtherTimeline,
    /// Of this timeline, with the last position that is known.
    Read(Read, u64),
}

impl Feed {
    pub(super) fn new(name: &str, all_bytes: Arc<AtomicUsize>) -> Self {
        Self {
            name: name.to_owned(),
            inner: Mutex::new(Inner {
                placed: None,
                unplaced: Vec::new(),
                followers: Vec::new(),
                is_read: false,
                idle_since: Some(Instant::now()),
            }),
            all_bytes,
        }
    }

    /// The stream: a map's name, `@player` or `@host`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Timeline, head and floor, once they are known.
    pub fn head(&self) -> Option<Head> {
        self.lock().placed.as_ref().map(|placed| Head {
            timeline: placed.timeline,
            head: placed.ring.known(),
            floor: placed.floor,
        })
    }

    /// Wakes a listener from now on, by the number that the stream has there.
    pub(super) fn follow(&self, listener: &Arc<Listener>, number: u32) {
        let mut inner = self.lock();
        inner.idle_since = None;
        inner.followers.push((Arc::clone(listener), number));
    }

    pub(super) fn unfollow(&self, listener: &Arc<Listener>) {
        let mut inner = self.lock();
        inner.followers.retain(|(other, _)| !Arc::ptr_eq(other, listener));
        if inner.followers.is_empty() {
            inner.idle_since = Some(Instant::now());
        }
    }

    pub(super) fn idle_since(&self) -> Option<Instant> {
        self.lock().idle_since
    }

    /// Takes what a commit tells; gives whether the stream has to be read.
    pub(super) fn take(&self, timeline: u64, batch: Batch) -> bool {
        let mut inner = self.lock();
        match &mut inner.placed {
            Some(placed) if placed.timeline == timeline => {
                let taken = placed.ring.take(batch);
                inner.told(taken)
            }
            // Whose database went back, and when, is for the database to say.
            Some(_) => false,
            None => {
                if inner.unplaced.len() < UNPLACED_MAX {
                    inner.unplaced.push(batch);
                }
                false
            }
        }
    }

    /// Takes how far the stream is in the database, as it was asked while the ring was at `asked_at`; gives whether the
    /// stream has to be read.
    pub(super) fn hear(&self, head: Head, asked_at: Option<u64>) -> bool {
        let mut inner = self.lock();
        let Inner { placed, unplaced, .. } = &mut *inner;
        let placed = match placed {
            Some(placed) if placed.timeline == head.timeline && asked_at.is_none_or(|at| at <= head.head) => placed,
            // Not known yet, or it went back; without a new timeline too, where somebody forgot to raise it.
            other => {
                let (ring, floor) = (Ring::new(head.head, Arc::clone(&self.all_bytes)), head.floor);
                let is_new = other.is_none();
                let now = other.insert(Placed {
                    timeline: head.timeline,
                    floor,
                    ring,
                });
                let early = std::mem::take(unplaced);
                for batch in early.into_iter().filter(|_| is_new) {
                    now.ring.take(batch);
                }
                inner.wake(true);
                return inner.has_gap();
            }
        };
        placed.floor = placed.floor.max(head.floor);
        placed.ring.reaches(head.head)
    }

    /// Begins to read the stream from the database, unless that is done already or need not be; gives from where.
    pub(super) fn begin_reading(&self) -> bool {
        let mut inner = self.lock();
        let begins = !inner.is_read && inner.has_gap();
        inner.is_read |= begins;
        begins
    }

    /// Where reading goes on; none where it ends: everything known is here, or nobody follows the stream any more.
    pub(super) fn next_to_read(&self) -> Option<u64> {
        let mut inner = self.lock();
        let is_wanted = inner.has_gap() && !inner.followers.is_empty();
        inner.is_read = is_wanted;
        let placed = inner.placed.as_ref().filter(|_| is_wanted);
        placed.map(|placed| placed.ring.head())
    }

    /// What lies beyond a position.
    pub fn read(&self, timeline: u64, after: u64, filter: &Filter) -> Found {
        let inner = self.lock();
        match &inner.placed {
            Some(placed) if placed.timeline == timeline => {
                // A follower beyond what is known has read what this feed has yet to hear of.
                Found::Read(placed.ring.read(after, filter), placed.ring.known().max(after))
            }
            _ => Found::OtherTimeline,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn has_gap(&self) -> bool {
        self.placed.as_ref().is_some_and(|placed| placed.ring.has_gap())
    }

    fn told(&self, taken: Taken) -> bool {
        if let Taken::Moved { urgent } = taken {
            self.wake(urgent);
        }
        self.has_gap()
    }

    fn wake(&self, urgent: bool) {
        for (listener, number) in &self.followers {
            listener.moved(*number, urgent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(timeline: u64, head: u64) -> Head {
        Head {
            timeline,
            head,
            floor: 0,
        }
    }

    fn batch(after: u64, upto: u64) -> Batch {
        Batch {
            after,
            upto,
            entries: Some(Vec::new()),
            urgent: true,
        }
    }

    fn read(feed: &Feed, timeline: u64, after: u64) -> Option<u64> {
        match feed.read(timeline, after, &Filter::of_host(uuid::Uuid::nil())) {
            Found::Read(Read::Some { upto, .. }, _) => Some(upto),
            _ => None,
        }
    }

    #[test]
    fn invariant_08_what_is_committed_while_a_feed_is_opened_is_not_missed() {
        let feed = Feed::new("prontera", Arc::default());
        feed.take(1, batch(3, 5));
        feed.take(1, batch(5, 7));
        assert!(!feed.hear(at(1, 5), None));
        assert_eq!(read(&feed, 1, 5), Some(7));
    }

    #[test]
    fn followers_are_woken_by_what_moves_and_told_whether_it_waits() {
        let feed = Feed::new("prontera", Arc::default());
        feed.hear(at(1, 0), None);
        let listener: Arc<Listener> = Arc::default();
        feed.follow(&listener, 3);
        assert!(!listener.take(3));
        feed.take(1, batch(0, 1));
        assert!(!listener.take(2) && listener.take(3) && !listener.take(3));
        assert!(listener.take_urgent() && !listener.take_urgent());
        feed.unfollow(&listener);
        feed.take(1, batch(1, 2));
        assert!(!listener.take(3));
        assert!(feed.idle_since().is_some());
    }

    #[test]
    fn invariant_08_a_database_that_went_back_begins_the_feed_anew() {
        let feed = Feed::new("prontera", Arc::default());
        feed.hear(at(1, 9), None);
        feed.take(1, batch(9, 10));
        assert!(!feed.hear(at(1, 9), Some(9)), "asked before the last commit");
        assert_eq!(read(&feed, 1, 9), Some(10));
        assert!(!feed.hear(at(2, 4), Some(10)));
        assert!(matches!(
            feed.read(1, 10, &Filter::of_host(uuid::Uuid::nil())),
            Found::OtherTimeline
        ));
        assert!(!feed.take(1, batch(10, 11)), "told by a proxy that does not know yet");
        assert_eq!(feed.head().map(|head| head.head), Some(4));
        assert!(!feed.hear(at(2, 2), Some(4)), "also where nobody raised the timeline");
        assert_eq!(feed.head().map(|head| head.head), Some(2));
    }

    #[test]
    fn a_gap_is_read_once_and_only_while_somebody_follows() {
        let feed = Feed::new("prontera", Arc::default());
        feed.hear(at(1, 0), None);
        assert!(!feed.begin_reading());
        assert!(feed.take(1, batch(3, 4)));
        assert!(feed.begin_reading() && !feed.begin_reading());
        assert_eq!(feed.next_to_read(), None, "nobody follows it");
        let listener: Arc<Listener> = Arc::default();
        feed.follow(&listener, 0);
        assert!(feed.begin_reading());
        assert_eq!(feed.next_to_read(), Some(0));
        assert!(!feed.take(1, batch(0, 3)));
        assert_eq!(feed.next_to_read(), None);
        assert_eq!(read(&feed, 1, 0), Some(4));
    }
}
