//! The cache of states that were just written, read before Postgres is.
//!
//! It is filled by writes alone, after their commit, and newer wins by the position in the stream. It never delays or
//! fails a write or a read: what it cannot tell at once, Postgres tells. What it tells is what was committed last, as
//! far as this process knows; with several proxies over one Redis, what another one committed a moment ago may still be
//! on its way there; what Redis lost when a replica took its master's place is missed until the proxy that had written it
//! notices, some two seconds later at most; and what one of them committed right before it was killed is missed until it
//! expires or that proxy starts again. Who must not be told that says so (`at_least`), and asks Postgres where this is not
//! surely new enough.

mod process;
mod redis;

use p2p_sync_proto::{Path, policy::Keep, v1};

use crate::{config::CacheBounds, operation::Change, redis_client::RedisClient};

pub use self::{process::ProcessCache, redis::RedisCache};

/// The cache, in one of its two places.
#[derive(Debug)]
pub enum Cache {
    /// Inside this process, the only one on its database.
    Process(ProcessCache),
    /// In Redis, shared by the proxies of one database.
    Redis(RedisCache),
}

impl Cache {
    /// A cache for a hub of one process.
    pub fn process(bounds: CacheBounds) -> Self {
        Self::Process(ProcessCache::new(bounds))
    }

    /// A cache in Redis; its tasks end when the cache is dropped.
    pub fn redis(client: &RedisClient, prefix: &str, bounds: CacheBounds) -> Self {
        Self::Redis(RedisCache::new(client, prefix, bounds.expiry))
    }

    /// Takes what was committed. Never waits.
    ///
    /// Of types kept as `every` nothing is kept: no single operation is the state of its path.
    pub fn put(&self, changes: &[Change]) {
        for change in changes.iter().filter(|change| change.keep == Keep::Latest) {
            match self {
                Self::Process(cache) => cache.put(change.to_wire()),
                Self::Redis(cache) => cache.put(change.to_wire()),
            }
        }
    }

    /// Forgets paths of which nobody knows whether a commit has changed them; in Redis it takes all others along.
    pub fn forget<'p>(&self, paths: impl IntoIterator<Item = &'p Path>) {
        match self {
            Self::Process(cache) => paths.into_iter().for_each(|path| cache.forget(path.as_str())),
            Self::Redis(cache) => cache.distrust("the outcome of a commit is not known"),
        }
    }

    /// Forgets everything: for when others may have written without this process knowing.
    pub fn distrust(&self) {
        match self {
            Self::Process(cache) => cache.clear(),
            Self::Redis(cache) => cache.distrust("others may have written"),
        }
    }

    /// The state of a path, deleted ones included; `None` says to ask Postgres.
    pub async fn get(&self, path: &Path) -> Option<v1::State> {
        match self {
            Self::Process(cache) => cache.get(path.as_str()),
            Self::Redis(cache) => cache.get(path.as_str()).await,
        }
    }

    /// Waits until what was put has reached where others read it; at a shutdown.
    pub async fn flushed(&self) {
        if let Self::Redis(cache) = self {
            cache.flushed().await;
        }
    }
}

/// What moves in the database where others have written past the cache: its timeline, which is raised when it may have gone
/// back, and the number of the operator's edits.
#[derive(Debug, Default)]
pub struct Marks {
    known: Option<(u64, u64)>,
    moved: bool,
}

impl Marks {
    /// Whether the cache may hold what is not so any more: when either has moved, and once more at the next look, for a write
    /// that was committed before may come to the cache after it.
    pub fn is_cache_behind(&mut self, timeline: u64, edits: u64) -> bool {
        let moved_before = self.moved;
        let now = (timeline, edits);
        self.moved = self.known.replace(now).is_some_and(|known| known != now);
        self.moved || moved_before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_behind_when_an_edit_is_new_and_once_more_after() {
        let mut marks = Marks::default();
        assert!(
            !marks.is_cache_behind(1, 7),
            "what was edited before is not in a new cache"
        );
        let looks = [7, 8, 8, 8, 9, 10, 10, 10].map(|edits| marks.is_cache_behind(1, edits));
        assert_eq!(looks, [false, true, true, false, true, true, true, false]);
    }

    #[test]
    fn the_cache_is_behind_when_the_timeline_is_another_and_once_more_after() {
        let mut marks = Marks::default();
        let looks = [(4, 7), (5, 7), (5, 7), (5, 7), (6, 3), (6, 3), (6, 3)];
        let looks = looks.map(|(timeline, edits)| marks.is_cache_behind(timeline, edits));
        assert_eq!(looks, [false, true, true, false, true, true, false]);
    }
}
