//! How an agent ends: the thread that writes the outbox, and what it had to leave behind.

use std::{
    sync::{Mutex, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem};

/// How often a shutdown looks whether the outbox is written.
const LOOK: Duration = Duration::from_millis(1);

/// The thread that writes the outbox; it gives how many operations no disk took.
pub(super) struct Writing(Mutex<Inner>);

struct Inner {
    thread: Option<JoinHandle<usize>>,
    ended: Result<(), Problem>,
}

impl Writing {
    pub(super) fn by(thread: JoinHandle<usize>) -> Self {
        Self(Mutex::new(Inner {
            thread: Some(thread),
            ended: Ok(()),
        }))
    }

    /// Waits until the thread has ended, at most until `timeout` is over since `began`; the same each time after that.
    pub(super) fn end(&self, began: Instant, timeout: Duration) -> Result<(), Problem> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(thread) = inner.thread.take() {
            if thread.is_finished() {
                inner.ended = thread.join().map_or_else(|_| Err(panicked()), kept_all_but);
                break;
            }
            inner.thread = Some(thread);
            if began.elapsed() >= timeout {
                let sentence = "the outbox's disk does not answer: what was taken last may not be on it";
                return Err(incomplete(sentence));
            }
            std::thread::sleep(LOOK);
        }
        inner.ended.clone()
    }
}

fn kept_all_but(lost: usize) -> Result<(), Problem> {
    if lost == 0 {
        return Ok(());
    }
    Err(incomplete(&format!(
        "the outbox's disk took nothing more: operations that were in memory alone and are lost: {lost}; free space on \
         the disk, or mend it"
    )))
}

fn panicked() -> Problem {
    tracing::error!("the thread that writes the outbox had panicked");
    incomplete("the thread that writes the outbox had panicked: what was taken last may not be on disk")
}

fn incomplete(sentence: &str) -> Problem {
    Problem::new(Code::ShutdownIncomplete, sentence)
}
