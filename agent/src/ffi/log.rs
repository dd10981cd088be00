//! Log lines, told on the caller's own thread: a map server's console is no place for other threads.

use std::ffi::{c_char, c_void};

use super::code::p2p_sync_level;
use crate::{AgentEvent, log_queue};

/// Told of one log line; `message` is UTF-8, NUL-terminated, and valid during the call. Must not unwind or jump out.
pub type p2p_sync_log_callback = Option<unsafe extern "C" fn(context: *mut c_void, level: i32, message: *const c_char)>;

/// Told by one call of a game loop: a console is slow, and who makes lines by being told of them is let go all the same.
pub(super) const LINES_AT_ONCE_MAX: usize = 64;

/// Where an agent's log lines go.
#[derive(Clone, Copy)]
pub(super) struct Sink {
    callback: p2p_sync_log_callback,
    context: *mut c_void,
}

// SAFETY: the context is not touched here; it is given back to the callback, on a thread that called into the library.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

impl Sink {
    pub(super) fn new(callback: p2p_sync_log_callback, context: *mut c_void, least: tracing::Level) -> Self {
        if callback.is_some() {
            // Where the program has its own subscriber for tracing, that one gets the lines.
            let _ = log_queue::install(least);
        }
        Self { callback, context }
    }

    /// Tells what waits when an agent begins or ends: all of it, for there may be no later call.
    pub(super) fn deliver_all(&self) {
        self.deliver(&mut { log_queue::LINES_MAX + 1 });
    }

    /// Tells the lines that wait, at most so many as are `left`, and takes them off it; the rest comes with the next call.
    pub(super) fn deliver(&self, left: &mut usize) {
        let Some(callback) = self.callback else { return };
        while *left > 0
            && let Some(AgentEvent::Log { level, message }) = log_queue::next(|_| true)
        {
            *left -= 1;
            let level = match level {
                tracing::Level::ERROR => p2p_sync_level::P2P_SYNC_LEVEL_ERROR,
                tracing::Level::WARN => p2p_sync_level::P2P_SYNC_LEVEL_WARNING,
                tracing::Level::INFO => p2p_sync_level::P2P_SYNC_LEVEL_INFO,
                _ => p2p_sync_level::P2P_SYNC_LEVEL_DEBUG,
            };
            let message = message.replace('\0', "\u{fffd}") + "\0";
            // SAFETY: by the caller's word the callback may be called with its context until the agent is shut down.
            unsafe { callback(self.context, level as i32, message.as_ptr().cast()) };
        }
    }
}
