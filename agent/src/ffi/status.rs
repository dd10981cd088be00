//! How an agent is: the link, the outbox, the counters, the right to write.

use std::{ffi::c_char, sync::atomic::Ordering, time::Duration};

use p2p_sync_proto::path::check_map;

use super::{
    boundary::guarded,
    code::{p2p_sync_code, p2p_sync_lease},
    handle::{p2p_sync_agent, running},
    text::{Versioned, null_argument, p2p_sync_text, put_text, write_struct},
};

/// How an agent is. Set `struct_size` before each call. Counts are since the agent's start.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_status {
    /// `sizeof(p2p_sync_status)`.
    pub struct_size: usize,
    /// 1 while the hub answers.
    pub link_up: u8,
    /// 1 while the outbox or its disk is full.
    pub outbox_full: u8,
    /// Of the policies in force; 0 for the built-in ones.
    pub policy_version: u32,
    /// Operations in memory, sent and not answered included.
    pub pending_operations: u64,
    /// Operations on disk: what would be lost with it.
    pub outbox_operations: u64,
    /// Their size on disk.
    pub outbox_bytes: u64,
    /// Grows with each start on one outbox.
    pub incarnation: u64,
    /// Operations taken.
    pub taken: u64,
    /// Refused at the call.
    pub refused: u64,
    /// Committed by the hub.
    pub applied: u64,
    /// Replaced by a newer one before they were sent.
    pub superseded: u64,
    /// Refused by the hub.
    pub rejected: u64,
    /// Waiting calls that ended without an answer.
    pub timeouts: u64,
    /// Texts and operations with bytes that were no text of the server's code page.
    pub texts_escaped: u64,
    /// Came under a tenure that has passed.
    pub limbo: u64,
}

// SAFETY: `#[repr(C)]`, size first, zeroes are valid.
unsafe impl Versioned for p2p_sync_status {
    const BYTES_MIN: usize = 104;
}

/// How the agent is. Any thread; does not wait for disk or network.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_get_status(agent: p2p_sync_agent, status: *mut p2p_sync_status) -> p2p_sync_code {
    guarded(|| {
        let running = running(agent)?;
        let is = running.door.status();
        let counted = is.counters;
        let told = p2p_sync_status {
            struct_size: size_of::<p2p_sync_status>(),
            link_up: is.link_up.into(),
            outbox_full: is.outbox_full.into(),
            policy_version: is.policy_version,
            pending_operations: is.pending_operations as u64,
            outbox_operations: is.outbox_operations,
            outbox_bytes: is.outbox_bytes,
            incarnation: is.incarnation,
            taken: counted.taken,
            refused: counted.refused,
            applied: counted.applied,
            superseded: counted.superseded,
            rejected: counted.rejected,
            timeouts: counted.timeouts,
            texts_escaped: running.texts_escaped.load(Ordering::Relaxed),
            limbo: counted.limbo,
        };
        // SAFETY: the caller's word.
        unsafe { write_struct(&told, status, "status") }
    })
}

/// The same and more (host id, endpoint, why the link is down, where the outbox is) as a JSON object, NUL-terminated.
/// Any thread; does not wait for disk or network. BUFFER_TOO_SMALL; 4096 bytes suffice with ordinary paths, and 256 more
/// for each lease and each duty.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_get_status_json(
    agent: p2p_sync_agent,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        let running = running(agent)?;
        let mut told = serde_json::to_value(running.door.status()).expect("plain data");
        told["texts_escaped"] = running.texts_escaped.load(Ordering::Relaxed).into();
        // SAFETY: the caller's word.
        unsafe { put_text(&told.to_string(), buffer, capacity, size) }
    })
}

/// Waits until everything taken is settled, at most `timeout_ms`; writes 1 into `drained` if it is, otherwise 0. Any
/// thread; not from the game loop, unless it may stand still for so long. Without waiting: all is settled when
/// `pending_operations` and `outbox_operations` of `p2p_sync_get_status` are 0 at two looks half a second apart.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_flush(agent: p2p_sync_agent, timeout_ms: u32, drained: *mut u8) -> p2p_sync_code {
    guarded(|| {
        if drained.is_null() {
            return Err(null_argument("drained"));
        }
        let is_drained = running(agent)?.door.flush(Duration::from_millis(timeout_ms.into()));
        // SAFETY: not null, and the caller's to be written.
        unsafe { drained.write(u8::from(is_drained)) };
        Ok(())
    })
}

/// Whether this host may write a map: one of `p2p_sync_lease` into `lease`. Any thread; never waits.
///
/// As the hub said last: `P2P_SYNC_LEASE_NONE` until it has been asked, so ask again when the link is up. BAD_MAP.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_get_lease(
    agent: p2p_sync_agent,
    map: p2p_sync_text,
    lease: *mut i32,
) -> p2p_sync_code {
    guarded(|| {
        if lease.is_null() {
            return Err(null_argument("lease"));
        }
        let running = running(agent)?;
        // SAFETY: the caller's word.
        let map = unsafe { map.utf8("map") }?;
        check_map(map)?;
        let state = p2p_sync_lease::from(running.door.lease(map));
        // SAFETY: not null, and the caller's to be written.
        unsafe { lease.write(state as i32) };
        Ok(())
    })
}
