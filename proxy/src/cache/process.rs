//! The cache inside the process: bounded by states, bytes and age.

use std::{
    num::NonZeroUsize,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use p2p_sync_proto::v1;

use crate::config::CacheBounds;

/// Paths and payloads together; what is least recently used goes first.
const BYTES_MAX: usize = 64 * 1024 * 1024;
/// What one state costs beyond its path and payload, bytes.
const ENTRY_BYTES: usize = 256;

/// See [`super::Cache`].
#[derive(Debug)]
pub struct ProcessCache {
    expiry: Duration,
    // A std mutex: held for one insertion or look-up, never across an await.
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    states: LruCache<String, Entry>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    state: v1::State,
    written: Instant,
}

impl ProcessCache {
    pub(super) fn new(bounds: CacheBounds) -> Self {
        let entries_max = NonZeroUsize::new(bounds.entries_max).expect("the setting is at least 1");
        let kept = Kept {
            states: LruCache::new(entries_max),
            bytes: 0,
        };
        Self {
            expiry: bounds.expiry,
            kept: Mutex::new(kept),
        }
    }

    pub(super) fn put(&self, state: v1::State) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let known = kept.states.peek(&state.path).map(|entry| entry.state.stream_sequence);
        if known.is_some_and(|known| known >= state.stream_sequence) {
            return;
        }
        kept.bytes += bytes(&state);
        let entry = Entry {
            state,
            written: Instant::now(),
        };
        if let Some((_, gone)) = kept.states.push(entry.state.path.clone(), entry) {
            kept.bytes -= bytes(&gone.state);
        }
        while kept.bytes > BYTES_MAX {
            let Some((_, gone)) = kept.states.pop_lru() else { break };
            kept.bytes -= bytes(&gone.state);
        }
    }

    pub(super) fn get(&self, path: &str) -> Option<v1::State> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = kept.states.get(path)?;
        (entry.written.elapsed() < self.expiry).then(|| entry.state.clone())
    }

    pub(super) fn forget(&self, path: &str) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gone) = kept.states.pop(path) {
            kept.bytes -= bytes(&gone.state);
        }
    }

    pub(super) fn clear(&self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.states.clear();
        kept.bytes = 0;
    }
}

fn bytes(state: &v1::State) -> usize {
    2 * state.path.len() + state.payload.len() + ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries_max: usize, expiry: Duration) -> ProcessCache {
        ProcessCache::new(CacheBounds { expiry, entries_max })
    }

    fn state(path: &str, stream_sequence: u64, payload_bytes: usize) -> v1::State {
        let payload = vec![b' '; payload_bytes].into();
        v1::State {
            path: path.to_owned(),
            stream_sequence,
            payload,
            ..Default::default()
        }
    }

    fn sequence(cache: &ProcessCache, path: &str) -> Option<u64> {
        cache.get(path).map(|state| state.stream_sequence)
    }

    #[test]
    fn newer_wins_in_whatever_order_states_come() {
        let cache = cache(10, Duration::from_mins(1));
        for stream_sequence in [5, 6, 4] {
            cache.put(state("a", stream_sequence, 0));
        }
        assert_eq!(sequence(&cache, "a"), Some(6));
    }

    #[test]
    fn states_and_bytes_are_bounded() {
        let cache = cache(100, Duration::from_mins(1));
        for number in 0..300 {
            cache.put(state(&number.to_string(), 1, 1024 * 1024));
        }
        let kept = cache.kept.lock().expect("not poisoned");
        assert!(
            kept.bytes <= BYTES_MAX && kept.states.len() > 50,
            "{} bytes, {} states",
            kept.bytes,
            kept.states.len()
        );
        let counted: usize = kept.states.iter().map(|(_, entry)| bytes(&entry.state)).sum();
        assert_eq!(kept.bytes, counted, "what was pushed out and replaced is counted off");
    }

    #[test]
    fn what_expired_or_was_forgotten_is_not_told() {
        let expired = cache(10, Duration::ZERO);
        expired.put(state("a", 1, 0));
        assert_eq!(sequence(&expired, "a"), None);
        let forgotten = cache(10, Duration::from_mins(1));
        forgotten.put(state("a", 1, 0));
        forgotten.put(state("b", 1, 0));
        forgotten.forget("a");
        assert_eq!((sequence(&forgotten, "a"), sequence(&forgotten, "b")), (None, Some(1)));
        let cleared = cache(10, Duration::from_mins(1));
        cleared.put(state("a", 1, 0));
        cleared.clear();
        assert_eq!(sequence(&cleared, "a"), None);
    }
}
