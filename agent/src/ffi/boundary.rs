//! What stands between C and Rust at every export: no panic crosses it, a forked child gets no further, and the reason
//! of a refusal is kept for the thread that was refused.

use std::{
    cell::RefCell,
    ffi::c_char,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Once,
        atomic::{AtomicBool, Ordering},
    },
};

use p2p_sync_proto::{Code, Problem};

use super::{
    code::{P2P_SYNC_OK, p2p_sync_code, p2p_sync_error},
    text::put_text,
};

thread_local! {
    static LAST_ERROR: RefCell<Option<Problem>> = const { RefCell::new(None) };
}

/// Set in a child of a process that runs agents: their threads and locks did not come along.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Runs an export's body: `P2P_SYNC_OK`, or the code of its refusal, of a panic or of a fork.
pub(super) fn guarded(body: impl FnOnce() -> Result<(), Problem>) -> p2p_sync_code {
    if FORKED.load(Ordering::Relaxed) {
        // A lock may be held by a thread that is not here: not even the reason is kept.
        return p2p_sync_error::P2P_SYNC_ERR_FORKED as i32;
    }
    let ended = catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        injected_panic::strike();
        body()
    }));
    match ended {
        Ok(Ok(())) => P2P_SYNC_OK,
        Ok(Err(problem)) => refuse(problem),
        Err(payload) => {
            // Dropping it could panic again, with nobody left to catch that.
            std::mem::forget(payload);
            refuse(Problem::new(
                Code::Panicked,
                "a fault of the library was caught and this call undone as far as it could be: please report it with the \
                 lines on standard error",
            ))
        }
    }
}

/// Runs an export that gives a value instead of a code; `otherwise` after a panic.
pub(super) fn guarded_value<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        injected_panic::strike();
        body()
    }))
    .unwrap_or_else(|payload| {
        std::mem::forget(payload);
        otherwise
    })
}

fn refuse(problem: Problem) -> p2p_sync_code {
    let code = problem.code as i32;
    // A thread that is ending keeps no reasons any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(Some(problem)));
    code
}

/// From now on, children of this process are refused.
pub(super) fn watch_for_forks() {
    extern "C" fn in_the_child() {
        FORKED.store(true, Ordering::Relaxed);
    }
    static WATCH: Once = Once::new();
    // SAFETY: the handler only stores to an atomic, which is allowed in a forked child of any process.
    WATCH.call_once(|| unsafe {
        // Without memory for it, forks go unnoticed; there is nothing better to do.
        nix::libc::pthread_atfork(None, None, Some(in_the_child));
    });
}

/// The code and the sentence of the last call on this thread that was refused. Any thread; never waits.
///
/// Gives the code, or `P2P_SYNC_OK` if none was refused yet. The sentence (UTF-8, NUL-terminated, what is wrong and what
/// to do) goes into `buffer`, cut to fit in `capacity` bytes; `size`, if not null, is given its whole length without
/// the NUL. `buffer` may be null with a `capacity` of 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_last_error(buffer: *mut c_char, capacity: usize, size: *mut usize) -> p2p_sync_code {
    if FORKED.load(Ordering::Relaxed) {
        return p2p_sync_error::P2P_SYNC_ERR_FORKED as i32;
    }
    guarded_value(p2p_sync_error::P2P_SYNC_ERR_PANICKED as i32, || {
        let last = LAST_ERROR.try_with(|last| last.borrow().clone()).ok().flatten();
        let (code, sentence) = last.map_or((P2P_SYNC_OK, String::new()), |problem| {
            (problem.code as i32, problem.sentence)
        });
        let fits = sentence.floor_char_boundary(capacity.saturating_sub(1));
        if !size.is_null() {
            // SAFETY: not null, and the caller's to be written.
            unsafe { size.write_unaligned(sentence.len()) };
        }
        if !buffer.is_null() && capacity > 0 {
            // SAFETY: `buffer` has `capacity` bytes by the caller's word, and `fits` is below it.
            let put = unsafe { put_text(&sentence[..fits], buffer, capacity, std::ptr::null_mut()) };
            debug_assert!(put.is_ok());
        }
        code
    })
}

#[cfg(test)]
pub(super) mod injected_panic {
    use std::cell::Cell;

    thread_local! {
        static ARMED: Cell<bool> = const { Cell::new(false) };
    }

    /// Makes the next export called on this thread panic.
    pub(in crate::ffi) fn arm() {
        ARMED.set(true);
    }

    pub(super) fn strike() {
        assert!(!ARMED.replace(false), "injected");
    }
}
