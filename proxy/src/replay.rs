//! Replays: messages that were taken once are told from new ones, before they cost the database anything.
//!
//! A sliding window in memory, that of RFC 6479, over the sequence that a sender gives to each message. It is an
//! optimisation, and no promise rests on it: it is empty when the hub starts, and another proxy has another one. What must
//! not happen twice is refused where it would: operations by their settled positions, renewals by their counter, writes of
//! the hosts' cache by the last one's position. So what the window does not know is let pass, be it older than the window
//! or of an older opening of the outbox: an honest message is never refused, however late it comes.
//!
//! A host counts the messages of each lane apart, over all of its connections, from 1 in each incarnation of its outbox.
//! Each lane has a window of its own, for a message of a slow lane may be overtaken by thousands of a quick one's.

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{Mutex, PoisonError},
};

use lru::LruCache;
use p2p_sync_proto::{Code, Problem, envelope::Lane, message::Label};
use uuid::Uuid;

/// Hosts whose windows are kept; the one heard least recently gives way. A host has some 550 bytes for each lane it uses.
const HOSTS_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
const WORD_BITS: u64 = 64;
const WORDS: usize = 64;
/// How many messages of a lane may overtake one that is still told from a replay. The last word is being filled.
const WINDOW: u64 = (WORDS as u64 - 1) * WORD_BITS;

const TAKEN_BEFORE: &str = "this message was taken before: a new one has to be sealed for what is sent again";

/// The windows of all hosts.
pub struct Replays {
    // A std mutex: held for a look-up, never across an await.
    hosts: Mutex<LruCache<Uuid, HostWindows>>,
}

/// Without what is in it.
impl fmt::Debug for Replays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replays").finish_non_exhaustive()
    }
}

/// Of the newest incarnation that was heard of.
#[derive(Default)]
struct HostWindows {
    incarnation: u64,
    lanes: [Option<Box<Window>>; Lane::COUNT],
}

impl Default for Replays {
    fn default() -> Self {
        Self {
            hosts: Mutex::new(LruCache::new(HOSTS_MAX)),
        }
    }
}

impl Replays {
    /// Notes a message of an admitted host by what its seal proves: `REPLAY` where it was noted before.
    ///
    /// What only reads has no outbox and no incarnation, counts nothing, and may be read to it again.
    pub fn note(&self, label: &Label) -> Result<(), Problem> {
        if label.incarnation == 0 {
            return Ok(());
        }
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let windows = hosts.get_or_insert_mut(label.host_id, HostWindows::default);
        if label.incarnation < windows.incarnation {
            return Ok(());
        }
        if label.incarnation > windows.incarnation {
            *windows = HostWindows {
                incarnation: label.incarnation,
                ..HostWindows::default()
            };
        }
        let window = windows.lanes[label.lane as usize - 1].get_or_insert_default();
        if window.note(label.sequence) {
            return Ok(());
        }
        tracing::debug!(host_id = %label.host_id, lane = ?label.lane, "a message came again");
        Err(Problem::new(Code::Replay, TAKEN_BEFORE))
    }
}

/// Which of the last sequences were noted: a ring of words, of which the newest moves on.
struct Window {
    newest: u64,
    words: [u64; WORDS],
}

impl Default for Window {
    fn default() -> Self {
        Self {
            newest: 0,
            words: [0; WORDS],
        }
    }
}

impl Window {
    /// False where it was noted before. What is too old to be known is taken for new.
    fn note(&mut self, sequence: u64) -> bool {
        if sequence > self.newest {
            let (from, to) = (self.newest / WORD_BITS, sequence / WORD_BITS);
            // Words that come into the window held what has left it.
            for word in (from..to).take(WORDS) {
                self.words[slot(word + 1)] = 0;
            }
            self.newest = sequence;
        } else if self.newest - sequence >= WINDOW {
            return true;
        }
        let (word, bit) = (&mut self.words[slot(sequence / WORD_BITS)], 1 << (sequence % WORD_BITS));
        let is_new = *word & bit == 0;
        *word |= bit;
        is_new
    }
}

fn slot(word: u64) -> usize {
    usize::try_from(word % WORDS as u64).expect("fewer than there are words")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use p2p_sync_proto::keys::{KeyId, MasterKey};

    use super::*;

    fn label(host: u128, incarnation: u64, sequence: u64, lane: Lane) -> Label {
        let master = MasterKey::generate(KeyId::parse("k1").expect("a key id"));
        let credential = master.credential(Uuid::from_u128(host), 1);
        Label::from_credential(&credential, incarnation, sequence, Uuid::nil(), lane)
    }

    #[test]
    fn a_window_knows_the_last_sequences_in_whatever_order_they_came() {
        let mut random = fastrand::Rng::new();
        let seed = random.get_seed();
        for _ in 0..20 {
            let (mut window, mut noted) = (Window::default(), HashSet::new());
            let mut newest: u64 = 0;
            for _ in 0..20_000 {
                let sequence = match random.u8(..) {
                    0 => newest + random.u64(1..3 * WINDOW),
                    1..60 => newest + random.u64(1..4),
                    _ => newest.saturating_sub(random.u64(0..WINDOW + 200)),
                };
                let is_too_old = newest.saturating_sub(sequence) >= WINDOW;
                newest = newest.max(sequence);
                assert_eq!(
                    window.note(sequence),
                    noted.insert(sequence) || is_too_old,
                    "{sequence}, newest {newest}, seed {seed}"
                );
            }
        }
    }

    #[test]
    fn the_largest_sequence_is_one_like_others() {
        let mut window = Window::default();
        assert!(window.note(0) && !window.note(0) && window.note(5));
        assert!(window.note(u64::MAX) && !window.note(u64::MAX));
        assert!(window.note(u64::MAX - 1) && !window.note(u64::MAX - 1));
        assert!(window.note(5), "too old to be known");
    }

    #[test]
    fn each_lane_and_each_host_counts_apart_and_a_new_incarnation_begins_anew() {
        let replays = Replays::default();
        let code = |host, incarnation, sequence, lane| {
            let noted = replays.note(&label(host, incarnation, sequence, lane));
            noted.err().map(|problem| problem.code)
        };
        assert_eq!(code(1, 3, 1, Lane::Bulk), None);
        assert_eq!(code(1, 3, 1, Lane::Critical), None);
        assert_eq!(code(2, 3, 1, Lane::Bulk), None);
        assert_eq!(code(1, 3, 1, Lane::Bulk), Some(Code::Replay));
        assert_eq!(code(1, 4, 1, Lane::Bulk), None);
        assert_eq!(code(1, 4, 1, Lane::Bulk), Some(Code::Replay));
        // What is late from before is for those to tell who know what was settled.
        assert_eq!(code(1, 3, 1, Lane::Bulk), None);
        assert_eq!(code(1, 0, 1, Lane::Pull), None);
        assert_eq!(code(1, 0, 1, Lane::Pull), None, "who only reads counts nothing");
    }

    #[test]
    fn invariant_12_hosts_are_bounded_and_one_has_room_for_one_incarnation() {
        let replays = Replays::default();
        for host in 0..HOSTS_MAX.get() as u128 + 10 {
            replays.note(&label(host, 1, 1, Lane::Hello)).expect("new");
        }
        for incarnation in 1..100 {
            replays
                .note(&label(7_000_000, incarnation, 1, Lane::Hello))
                .expect("new");
        }
        assert_eq!(replays.hosts.lock().expect("not poisoned").len(), HOSTS_MAX.get());
        replays
            .note(&label(5_000, 1, 1, Lane::Hello))
            .expect("forgotten, and let pass");
        assert!(size_of::<Window>() <= 550 && size_of::<HostWindows>() <= 128);
    }
}
