//! What a program outside the agent has read of the operator's edits, and the agent does not know: said with the program's
//! next operation, so that the agent knows which of them were made by who had read it.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use lru::LruCache;

use crate::{attach_lines::SEEN_MAX, edits::PATHS_MAX, local_api::LINE_BYTES_MAX};

/// Edits that wait for an operation; what is read beyond conflicts once.
const WAITING_MAX: usize = 1024;

#[derive(Default)]
pub(crate) struct Unsaid {
    /// Mostly there are none: then an operation looks at nothing but this.
    any: AtomicBool,
    read: Mutex<Read>,
}

struct Read {
    waiting: Vec<(String, u64)>,
    /// What was said, so that reading it again says nothing.
    said: LruCache<String, u64>,
}

impl Default for Read {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            // Takes no room before it is needed.
            said: LruCache::unbounded(),
        }
    }
}

impl Unsaid {
    /// Notes what was read: paths, and the last edit of each.
    pub(crate) fn has_read<'s>(&self, states: impl IntoIterator<Item = (&'s str, u64)>) {
        let mut edited = states.into_iter().filter(|(_, edit)| *edit > 0).peekable();
        if edited.peek().is_none() {
            return;
        }
        let mut read = self.lock();
        for (path, edit) in edited {
            let is_known = read.said.peek(path).is_some_and(|said| *said >= edit);
            if !is_known && read.waiting.len() < WAITING_MAX {
                read.said.put(path.to_owned(), edit);
                if read.said.len() > PATHS_MAX {
                    read.said.pop_lru();
                }
                read.waiting.push((path.to_owned(), edit));
            }
        }
        self.any.store(!read.waiting.is_empty(), Ordering::Relaxed);
    }

    /// What is to be said with an operation, whose line has so many bytes yet.
    pub(crate) fn take(&self, line_bytes: usize) -> Vec<(String, u64)> {
        if !self.any.load(Ordering::Relaxed) || line_bytes as u64 > LINE_BYTES_MAX / 2 {
            return Vec::new();
        }
        let mut read = self.lock();
        let taken = read.waiting.len().min(SEEN_MAX);
        let seen = read.waiting.drain(..taken).collect();
        self.any.store(!read.waiting.is_empty(), Ordering::Relaxed);
        seen
    }

    /// The operation was not taken.
    pub(crate) fn put_back(&self, seen: Vec<(String, u64)>) {
        if seen.is_empty() {
            return;
        }
        self.lock().waiting.splice(..0, seen);
        self.any.store(true, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Read> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_said_once_and_with_the_first_operation_that_is_taken() {
        let unsaid = Unsaid::default();
        unsaid.has_read([("a", 0)]);
        assert!(unsaid.take(10).is_empty());
        unsaid.has_read([("a", 3), ("b", 0), ("c", 5)]);
        let seen = unsaid.take(10);
        assert_eq!(seen, [("a".to_owned(), 3), ("c".to_owned(), 5)]);
        assert!(unsaid.take(10).is_empty());
        unsaid.put_back(seen.clone());
        assert_eq!(unsaid.take(10), seen);
        unsaid.has_read([("a", 3), ("a", 4), ("c", 4)]);
        assert_eq!(unsaid.take(10), [("a".to_owned(), 4)]);
    }

    #[test]
    fn invariant_12_what_waits_is_bounded_and_so_is_what_a_line_says() {
        let unsaid = Unsaid::default();
        let paths: Vec<String> = (0..WAITING_MAX + 100).map(|number| number.to_string()).collect();
        unsaid.has_read(paths.iter().map(|path| (path.as_str(), 1)));
        let mut said = 0;
        loop {
            let seen = unsaid.take(10);
            assert!(seen.len() <= SEEN_MAX);
            if seen.is_empty() {
                break;
            }
            said += seen.len();
        }
        assert_eq!(said, WAITING_MAX);
    }
}
