//! The cache that a host shares with its hub.

use std::{ffi::c_char, time::Duration};

use p2p_sync_proto::{Code, Problem};

use super::{
    boundary::guarded,
    code::p2p_sync_code,
    handle::{p2p_sync_agent, running},
    text::{null_argument, p2p_sync_text, put_text},
};

/// Puts a value under a key, for `expiry_seconds` (0: `cache_expiry_seconds`). Any thread; never waits.
///
/// It is seen here at once and goes to the hub in the background; a cache is not durable. Keys are UTF-8 of 1 to 256
/// bytes, values UTF-8 of at most 256 KiB; TOO_LARGE, BAD_TEXT, QUEUE_FULL, SHUT_DOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_cache_set(
    agent: p2p_sync_agent,
    key: p2p_sync_text,
    value: p2p_sync_text,
    expiry_seconds: u32,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let (key, value) = unsafe { (key.utf8("key")?, value.utf8("value")?) };
        running(agent)?.door.cache_set(key, value, expiry_seconds)
    })
}

/// Reads the value under a key: from the cache here, otherwise from the hub, waiting at most `timeout_ms` (0:
/// `critical_timeout_ms`). Any thread. To ask without waiting: `P2P_SYNC_ASK_CACHE`.
///
/// The value goes into `buffer`, NUL-terminated; `size`, if not null, is given its length without the NUL, fitting or
/// not. NOT_FOUND, BUFFER_TOO_SMALL (call again: it is kept here for a moment), HUB_UNAVAILABLE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_cache_get(
    agent: p2p_sync_agent,
    key: p2p_sync_text,
    timeout_ms: u32,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let key = unsafe { key.utf8("key") }?;
        let value = running(agent)?.door.cache_get(key, timeout_of(timeout_ms))?;
        let missing = || Problem::new(Code::NotFound, "the cache holds nothing under this key");
        let value = value.ok_or_else(missing)?;
        // SAFETY: the caller's word.
        unsafe { put_text(&value, buffer, capacity, size) }
    })
}

/// Takes a value out of the cache. Any thread; never waits; seen here at once, as `p2p_sync_cache_set`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_cache_delete(agent: p2p_sync_agent, key: p2p_sync_text) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let key = unsafe { key.utf8("key") }?;
        running(agent)?.door.cache_delete(key)
    })
}

/// Whether the cache holds something under a key: 1 or 0 into `exists`. Any thread; waits as `p2p_sync_cache_get`.
/// To ask without waiting: `P2P_SYNC_ASK_CACHE_EXISTS`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_cache_exists(
    agent: p2p_sync_agent,
    key: p2p_sync_text,
    timeout_ms: u32,
    exists: *mut u8,
) -> p2p_sync_code {
    guarded(|| {
        if exists.is_null() {
            return Err(null_argument("exists"));
        }
        // SAFETY: the caller's word.
        let key = unsafe { key.utf8("key") }?;
        let found = running(agent)?.door.cache_exists(key, timeout_of(timeout_ms))?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { exists.write(u8::from(found)) };
        Ok(())
    })
}

/// Sends a message to whoever listens to a channel of the hub's pub/sub. Any thread; never waits; told to nobody later.
///
/// QUEUE_FULL, TOO_LARGE, BAD_TEXT, SHUT_DOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_publish(
    agent: p2p_sync_agent,
    channel: p2p_sync_text,
    message: p2p_sync_text,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let (channel, message) = unsafe { (channel.utf8("channel")?, message.utf8("message")?) };
        running(agent)?.door.publish(channel, message)
    })
}

fn timeout_of(timeout_ms: u32) -> Option<Duration> {
    (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms.into()))
}
