//! The hosts' spaces inside the process.

use std::{
    collections::{BTreeSet, HashMap},
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use p2p_sync_proto::{Position, Problem};
use uuid::Uuid;

use super::{Found, HOST_BYTES_MAX, HOST_ENTRIES_MAX, Writer, bytes, overtaken, to_wire};

/// Of all hosts together. Beyond it the host that holds most gives way, so that many cannot be pushed out by one.
const ALL_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Hosts whose last write is known: 6 MiB.
const WRITERS_MAX: NonZeroUsize = NonZeroUsize::new(65_536).expect("not zero");

/// See [`super::HostCache`].
pub(super) struct ProcessSpaces {
    // Std mutexes: held for one look-up or insertion, never across an await.
    spaces: Mutex<Spaces>,
    /// Beside the spaces, for an empty one is given up.
    written: Mutex<LruCache<Uuid, Position>>,
}

impl Default for ProcessSpaces {
    fn default() -> Self {
        Self {
            spaces: Mutex::default(),
            written: Mutex::new(LruCache::new(WRITERS_MAX)),
        }
    }
}

/// Without what hosts keep.
impl std::fmt::Debug for ProcessSpaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessSpaces").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Spaces {
    by_host: HashMap<Uuid, Space>,
    bytes: usize,
}

#[derive(Default)]
struct Space {
    entries: HashMap<Arc<str>, Entry>,
    /// What expires first stands first.
    expiries: BTreeSet<(Instant, Arc<str>)>,
    bytes: usize,
}

struct Entry {
    value: String,
    until: Instant,
}

impl ProcessSpaces {
    /// Notes a write before it takes effect; `REPLAY` where it is not newer than the last.
    pub(super) fn note(&self, writer: Writer) -> Result<(), Problem> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if written
            .get(&writer.host_id)
            .is_some_and(|last| writer.position <= *last)
        {
            return Err(overtaken());
        }
        written.put(writer.host_id, writer.position);
        Ok(())
    }

    pub(super) fn get(&self, host_id: Uuid, key: &str) -> Found {
        let spaces = self.spaces();
        let entry = spaces.by_host.get(&host_id)?.entries.get(key)?;
        let left = entry.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then(|| to_wire(entry.value.clone(), left))
    }

    pub(super) fn set(&self, host_id: Uuid, key: &str, value: String, expiry: Duration) {
        let now = Instant::now();
        let entry = Entry {
            value,
            until: now + expiry,
        };
        let mut spaces = self.spaces();
        let spaces = &mut *spaces;
        let space = spaces.by_host.entry(host_id).or_default();
        let before = space.bytes;
        space.put(key, entry, now);
        spaces.bytes = spaces.bytes - before + space.bytes;
        while spaces.bytes > ALL_BYTES_MAX {
            spaces.shrink_largest();
        }
    }

    pub(super) fn delete(&self, host_id: Uuid, key: &str) -> bool {
        let mut spaces = self.spaces();
        let Some(space) = spaces.by_host.get_mut(&host_id) else {
            return false;
        };
        let before = space.bytes;
        let removed = space.remove(key);
        let (freed, is_empty) = (before - space.bytes, space.entries.is_empty());
        if is_empty {
            spaces.by_host.remove(&host_id);
        }
        spaces.bytes -= freed;
        removed.is_some_and(|entry| entry.until > Instant::now())
    }

    fn spaces(&self) -> MutexGuard<'_, Spaces> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spaces {
    fn shrink_largest(&mut self) {
        let Some((&host_id, space)) = self.by_host.iter_mut().max_by_key(|(_, space)| space.bytes) else {
            self.bytes = 0;
            return;
        };
        let before = space.bytes;
        space.pop_first();
        self.bytes -= before - space.bytes;
        if space.entries.is_empty() {
            self.by_host.remove(&host_id);
        }
    }
}

impl Space {
    fn put(&mut self, key: &str, entry: Entry, now: Instant) {
        self.remove(key);
        while self.expiries.first().is_some_and(|(until, _)| *until <= now) {
            self.pop_first();
        }
        let added = bytes(key, &entry.value);
        while self.entries.len() >= HOST_ENTRIES_MAX || self.bytes + added > HOST_BYTES_MAX {
            self.pop_first();
        }
        let key: Arc<str> = key.into();
        self.bytes += added;
        self.expiries.insert((entry.until, key.clone()));
        self.entries.insert(key, entry);
    }

    fn pop_first(&mut self) {
        if let Some((_, key)) = self.expiries.first().cloned() {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &str) -> Option<Entry> {
        let (key, entry) = self.entries.remove_entry(key)?;
        self.bytes -= bytes(&key, &entry.value);
        self.expiries.remove(&(entry.until, key));
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Uuid = Uuid::from_u128(1);
    const MINUTE: Duration = Duration::from_mins(1);

    fn value(spaces: &ProcessSpaces, host_id: Uuid, key: &str) -> Option<String> {
        spaces.get(host_id, key).map(|found| found.value)
    }

    #[test]
    fn what_is_set_is_the_hosts_alone_until_it_is_deleted_or_expires() {
        let spaces = ProcessSpaces::default();
        spaces.set(HOST, "a", "1".to_owned(), MINUTE);
        spaces.set(HOST, "gone", "1".to_owned(), Duration::ZERO);
        assert_eq!(value(&spaces, HOST, "a").as_deref(), Some("1"));
        assert_eq!(value(&spaces, HOST, "gone"), None);
        assert_eq!(value(&spaces, Uuid::from_u128(2), "a"), None);
        assert!(!spaces.delete(Uuid::from_u128(2), "a") && spaces.delete(HOST, "a") && !spaces.delete(HOST, "a"));
        assert_eq!(value(&spaces, HOST, "a"), None);
    }

    #[test]
    fn a_write_takes_effect_once_and_none_after_a_newer_one() {
        let spaces = ProcessSpaces::default();
        let code = |host_id, incarnation, sequence| {
            let position = Position { incarnation, sequence };
            let noted = spaces.note(Writer { host_id, position });
            noted.err().map(|problem| problem.code)
        };
        assert_eq!(code(HOST, 3, 5), None);
        for (incarnation, sequence) in [(3, 5), (3, 4), (2, 9)] {
            assert_eq!(code(HOST, incarnation, sequence), Some(p2p_sync_proto::Code::Replay));
        }
        assert_eq!(code(Uuid::from_u128(2), 3, 5), None, "hosts are apart");
        assert_eq!((code(HOST, 3, 6), code(HOST, 4, 1)), (None, None));
    }

    #[test]
    fn a_full_space_gives_up_what_would_expire_first_and_counts_what_it_holds() {
        let spaces = ProcessSpaces::default();
        let kib = 256;
        for number in 0..100 {
            spaces.set(HOST, &number.to_string(), "x".repeat(kib * 1024), MINUTE * (number + 1));
        }
        assert_eq!(value(&spaces, HOST, "0"), None);
        assert!(value(&spaces, HOST, "99").is_some());
        let held = spaces.spaces();
        let space = &held.by_host[&HOST];
        let counted: usize = space.entries.iter().map(|(key, entry)| bytes(key, &entry.value)).sum();
        assert!(counted <= HOST_BYTES_MAX && space.entries.len() > 50, "{counted} bytes");
        assert_eq!(
            (space.bytes, held.bytes, space.expiries.len()),
            (counted, counted, space.entries.len())
        );
    }

    #[test]
    fn small_values_are_bounded_by_their_number() {
        let spaces = ProcessSpaces::default();
        for number in 0..=HOST_ENTRIES_MAX {
            spaces.set(HOST, &number.to_string(), String::new(), MINUTE);
        }
        assert_eq!(spaces.spaces().by_host[&HOST].entries.len(), HOST_ENTRIES_MAX);
    }

    #[test]
    fn all_hosts_together_are_bounded_and_the_largest_gives_way() {
        let spaces = ProcessSpaces::default();
        let small = Uuid::from_u128(1000);
        spaces.set(small, "kept", "1".to_owned(), Duration::from_secs(10));
        for host in 0..20 {
            for number in 0..63 {
                spaces.set(
                    Uuid::from_u128(host),
                    &number.to_string(),
                    "x".repeat(255 * 1024),
                    MINUTE,
                );
            }
        }
        assert_eq!(value(&spaces, small, "kept").as_deref(), Some("1"));
        let held = spaces.spaces();
        assert!(held.bytes <= ALL_BYTES_MAX);
        assert_eq!(
            held.bytes,
            held.by_host.values().map(|space| space.bytes).sum::<usize>()
        );
    }
}
