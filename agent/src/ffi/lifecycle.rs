//! Starting and ending an agent.

use std::{
    ffi::{CStr, OsStr, c_char, c_void},
    os::unix::ffi::OsStrExt as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use encoding_rs::Encoding;
use p2p_sync_proto::settings::Problems;

use super::{
    boundary::{guarded, guarded_value, watch_for_forks},
    code::{self, p2p_sync_code},
    handle::{self, p2p_sync_agent},
    log::{self, p2p_sync_log_callback},
    text::{Versioned, null_argument, read_struct},
};
use crate::{Config, door::Door};

/// Grows when something that worked stops working, which takes a new SONAME as well.
pub const P2P_SYNC_ABI_VERSION: u32 = 0;

/// How an agent is started. Zero-initialise it, then set `struct_size`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_options {
    /// `sizeof(p2p_sync_options)`.
    pub struct_size: usize,
    /// The configuration file, e.g. `conf/p2p_data_sync.conf`. Relative paths in it are meant from its folder.
    pub config_path: *const c_char,
    /// Told of each log line, on the caller's thread, during `p2p_sync_start`, `p2p_sync_process`,
    /// `p2p_sync_next_event` and `p2p_sync_shutdown`. Null: nothing is logged.
    pub log: p2p_sync_log_callback,
    /// Passed to `log` as it is.
    pub log_context: *mut c_void,
    /// The least that is told, of `p2p_sync_level`; 0 is INFO. Holds for the process: the first agent's counts.
    pub log_level: i32,
}

// SAFETY: `#[repr(C)]`, size first, null pointers and zeroes are valid.
unsafe impl Versioned for p2p_sync_options {
    const BYTES_MIN: usize = 40;
}

/// What a handle names.
pub(super) struct Running {
    pub(super) door: Door,
    pub(super) log: log::Sink,
    /// Of the texts that the server passes.
    pub(super) encoding: &'static Encoding,
    /// Operations with bytes that were no text of it.
    pub(super) texts_escaped: AtomicU64,
}

impl Running {
    /// Flags an operation whose texts were escaped.
    pub(super) fn count_escaped(&self) {
        if self.texts_escaped.fetch_add(1, Ordering::Relaxed) == 0 {
            let encoding = self.encoding.name();
            tracing::warn!(
                encoding,
                "an operation had bytes that are no text of text_encoding: they are kept as \\xNN; is it the server's code page? \
                 (told once; the status counts them)"
            );
        }
    }
}

/// `P2P_SYNC_ABI_VERSION` of the library that is linked, to be compared with the header's. Any thread; never waits.
#[unsafe(no_mangle)]
pub extern "C" fn p2p_sync_abi_version() -> u32 {
    guarded_value(0, || P2P_SYNC_ABI_VERSION)
}

/// The library's version, e.g. `0.1.0`. Static: never freed. Any thread; never waits.
#[unsafe(no_mangle)]
pub extern "C" fn p2p_sync_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version has no NUL inside"),
    };
    guarded_value(std::ptr::null(), || VERSION.as_ptr())
}

/// Starts an agent: opens its outbox and begins to send, or attaches to a standalone agent where `agent_socket` is set.
///
/// Waits for the disk (some milliseconds, and as long as it takes to read an outbox of earlier starts), not for the hub.
/// Its threads block all signals. Not to be called between `fork` and `exec`; a child of a process that has started an
/// agent is answered with FORKED by every call that gives a code. `agent` is written on success alone; shut it down with
/// `p2p_sync_shutdown`.
///
/// Refuses with the codes 1xx (all mistakes of the configuration are in one message) and TOO_MANY_AGENTS.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_start(options: *const p2p_sync_options, agent: *mut p2p_sync_agent) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let options = unsafe { read_struct(options, "options") }?;
        if agent.is_null() {
            return Err(null_argument("agent"));
        }
        if options.config_path.is_null() {
            return Err(null_argument("options.config_path"));
        }
        // SAFETY: not null, and NUL-terminated by the caller's word.
        let config_path = Path::new(OsStr::from_bytes(
            unsafe { CStr::from_ptr(options.config_path) }.to_bytes(),
        ));
        let sink = log::Sink::new(options.log, options.log_context, code::level(options.log_level)?);
        let started = handle::insert(|| {
            watch_for_forks();
            let config = Config::load(config_path).map_err(Problems::into_one)?;
            Ok(Running {
                encoding: config.text_encoding,
                texts_escaped: AtomicU64::new(0),
                door: Door::open(config)?,
                log: sink,
            })
        });
        sink.deliver_all();
        let handle = started?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { agent.write_unaligned(handle) };
        Ok(())
    })
}

/// Ends an agent: takes nothing more, writes what it has taken to disk, and joins its threads. What is not settled stays
/// in the outbox and is sent after the next start; to wait for the hub, call `p2p_sync_flush` before.
///
/// Waits at most some `timeout_ms` (0: 5000): some milliseconds on a working disk, 2000 for messages on their way.
/// Calls that wait on other threads are let go with UNKNOWN or SHUT_DOWN. May be called twice: the second call does
/// nothing. Any thread, also at exit; not from a callback.
///
/// SHUTDOWN_INCOMPLETE when not all that was taken was kept: no disk took it, or the standalone agent did not, and it is
/// lost; the sentence says how many operations. Also when threads hang on a disk that does not answer: they end with it,
/// or with the process. The agent has ended all the same. BAD_HANDLE.
#[unsafe(no_mangle)]
pub extern "C" fn p2p_sync_shutdown(agent: p2p_sync_agent, timeout_ms: u32) -> p2p_sync_code {
    guarded(|| {
        let Some(running) = handle::remove(agent)? else {
            return Ok(());
        };
        let timeout_ms = if timeout_ms == 0 { 5000 } else { timeout_ms };
        let ended = running.door.shutdown(Duration::from_millis(timeout_ms.into()));
        running.log.deliver_all();
        ended
    })
}
