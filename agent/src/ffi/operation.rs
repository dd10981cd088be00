//! Operations: taking them, and what became of them.

use std::{borrow::Cow, ffi::c_char, time::Duration};

use p2p_sync_proto::{Code, Problem, limits::REASON_BYTES_MAX};
use uuid::Uuid;

use super::{
    boundary::guarded,
    code::{self, p2p_sync_code, p2p_sync_state},
    handle::{p2p_sync_agent, running},
    lifecycle::Running,
    text::{Versioned, bad_argument, null_argument, p2p_sync_text, put_text, read_struct, struct_size, write_struct},
};
use crate::{
    Priority, Submission,
    outbox::ms_since_1970,
    results::Settled,
    text::{self, Decoded},
};

/// Deletes the path instead of putting `payload`, which is ignored then.
pub const P2P_SYNC_DELETE: u32 = 1;
/// Sends by the critical lane, whatever the type.
pub const P2P_SYNC_CRITICAL: u32 = 2;
/// Tells of the settlement by an event: see `p2p_sync_process`.
pub const P2P_SYNC_NOTIFY: u32 = 4;

/// Of the sentence in a result, its NUL included.
pub const P2P_SYNC_MESSAGE_BYTES: usize = 512;
const _: () = assert!(P2P_SYNC_MESSAGE_BYTES == REASON_BYTES_MAX);

const FLAGS: u32 = P2P_SYNC_DELETE | P2P_SYNC_CRITICAL | P2P_SYNC_NOTIFY;

/// Names an operation or a question: a UUIDv7, in the order of its text form.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_id {
    /// As RFC 9562 has them.
    pub bytes: [u8; 16],
}

/// One thing that happened. Zero-initialise it, then set `struct_size`. Texts are read during the call and not kept.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_operation {
    /// `sizeof(p2p_sync_operation)`.
    pub struct_size: usize,
    /// What it tells of, of `p2p_sync_type`.
    pub data_type: i32,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// The character, where the type's owner is one; 0: the payload says.
    pub char_id: u64,
    /// On which map it happened; may be empty where the type's owner is not a map.
    pub map: p2p_sync_text,
    /// Which one of its owner's, e.g. a monster's runtime id; empty: the payload says.
    pub entity: p2p_sync_text,
    /// JSON, at most 256 KiB.
    pub payload: p2p_sync_text,
    /// `P2P_SYNC_DELETE`, `P2P_SYNC_CRITICAL`, `P2P_SYNC_NOTIFY`.
    pub flags: u32,
}

// SAFETY: `#[repr(C)]`, size first, null pointers and zeroes are valid.
unsafe impl Versioned for p2p_sync_operation {
    const BYTES_MIN: usize = 80;
}

/// What became of an operation or a question. Set `struct_size` before each call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_result {
    /// `sizeof(p2p_sync_result)`.
    pub struct_size: usize,
    /// Of `p2p_sync_state`.
    pub state: i32,
    /// Why, where it was refused or is not known; otherwise `P2P_SYNC_OK`.
    pub code: p2p_sync_code,
    /// When it came to this state, milliseconds since 1970; 0 where it is not known.
    pub at_ms: u64,
    /// Bytes of the data that came back (`p2p_sync_get_data`); 0 without any.
    pub data_size: usize,
    /// The sentence to `code`, UTF-8, NUL-terminated; empty without one.
    pub message: [c_char; P2P_SYNC_MESSAGE_BYTES],
}

// SAFETY: `#[repr(C)]`, size first, zeroes are valid.
unsafe impl Versioned for p2p_sync_result {
    const BYTES_MIN: usize = 32 + P2P_SYNC_MESSAGE_BYTES;
}

/// Takes an operation and gives its id. Any thread; never waits for disk, network or another thread.
///
/// `id` is written on success alone. Refuses with the codes 2xx (what to mend is in `p2p_sync_last_error`), QUEUE_FULL,
/// UNSUPPORTED where `enabled = no`, SHUT_DOWN; nothing of a refused operation is kept.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_submit(
    agent: p2p_sync_agent,
    operation: *const p2p_sync_operation,
    id: *mut p2p_sync_id,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let operation = unsafe { read_struct(operation, "operation") }?;
        if id.is_null() {
            return Err(null_argument("id"));
        }
        let running = running(agent)?;
        // SAFETY: the caller's word.
        let texts = unsafe { Texts::of(&operation, &running) }?;
        let taken = running.door.submit(&texts.submission(&operation)?)?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { put_id(taken, id) };
        Ok(())
    })
}

/// Takes an operation by the critical lane and waits for the hub's answer, at most `critical_timeout_ms`.
///
/// Without an answer by then `result->state` is UNKNOWN and the call succeeds: the operation stays in the outbox and
/// settles under its id. After one such timeout these calls answer UNKNOWN at once, until the link answers again. Any
/// thread. `id` and `result` are written on success alone; refuses as `p2p_sync_submit`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_submit_critical(
    agent: p2p_sync_agent,
    operation: *const p2p_sync_operation,
    id: *mut p2p_sync_id,
    result: *mut p2p_sync_result,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let operation = unsafe { read_struct(operation, "operation") }?;
        if id.is_null() {
            return Err(null_argument("id"));
        }
        // SAFETY: the caller's word.
        unsafe { struct_size(result, "result") }?;
        let running = running(agent)?;
        // SAFETY: the caller's word.
        let texts = unsafe { Texts::of(&operation, &running) }?;
        let (taken, settled) = running.door.submit_critical(&texts.submission(&operation)?)?;
        // SAFETY: neither is null, and both are the caller's to be written.
        unsafe {
            put_id(taken, id);
            write_struct(&result_of(&settled), result, "result")
        }
    })
}

/// How far an operation or a question has come. Any thread; never waits.
///
/// NOT_KEPT as a state, not as a refusal, for an id that is not known (any more).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_get_result(
    agent: p2p_sync_agent,
    id: *const p2p_sync_id,
    result: *mut p2p_sync_result,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let id = unsafe { get_id(id) }?;
        let settled = running(agent)?.door.result(id);
        // SAFETY: the caller's word.
        unsafe { write_struct(&result_of(&settled), result, "result") }
    })
}

/// Waits until an operation or a question is settled, at most `timeout_ms`; 0 waits until it is settled or the agent is
/// shut down. Any thread. UNKNOWN as a state where it is not settled by then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_wait(
    agent: p2p_sync_agent,
    id: *const p2p_sync_id,
    timeout_ms: u32,
    result: *mut p2p_sync_result,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let id = unsafe { get_id(id) }?;
        // SAFETY: the caller's word.
        unsafe { struct_size(result, "result") }?;
        let timeout = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms.into()));
        let settled = running(agent)?.door.wait(id, timeout);
        // SAFETY: the caller's word.
        unsafe { write_struct(&result_of(&settled), result, "result") }
    })
}

/// Writes `text` as a JSON string, quotes included, in ASCII: bytes of the server's code page (`text_encoding`) become
/// `\uXXXX`, bytes that do not decode `\\xNN`; such a text is counted in the status (`texts_escaped`). Any thread; never
/// waits.
///
/// `size`, if not null, is given the length without the NUL. BUFFER_TOO_SMALL: `6 * text.size + 3` bytes always suffice.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_json_string(
    agent: p2p_sync_agent,
    text: p2p_sync_text,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        let running = running(agent)?;
        // SAFETY: the caller's word.
        let bytes = unsafe { text.bytes("text") }?;
        let json = text::json_string(bytes, running.encoding);
        // SAFETY: the caller's word.
        unsafe { put_text(&json.text, buffer, capacity, size) }?;
        // Not before: a caller whose buffer is too small comes again.
        if json.escaped {
            running.count_escaped();
        }
        Ok(())
    })
}

/// An operation's texts, decoded.
pub(super) struct Texts<'a> {
    map: Cow<'a, str>,
    entity: Cow<'a, str>,
    payload: Cow<'a, str>,
}

impl<'a> Texts<'a> {
    /// # Safety
    /// The operation's texts stay as they are for `'a`.
    pub(super) unsafe fn of(operation: &p2p_sync_operation, running: &Running) -> Result<Self, Problem> {
        let decode = |text: p2p_sync_text, what| -> Result<Decoded<'a>, Problem> {
            // SAFETY: the caller's word.
            Ok(text::decode(unsafe { text.bytes(what) }?, running.encoding))
        };
        let map = decode(operation.map, "operation.map")?;
        let entity = decode(operation.entity, "operation.entity")?;
        let payload = decode(operation.payload, "operation.payload")?;
        if map.escaped || entity.escaped || payload.escaped {
            running.count_escaped();
        }
        Ok(Self {
            map: map.text,
            entity: entity.text,
            payload: payload.text,
        })
    }

    pub(super) fn submission(&self, operation: &p2p_sync_operation) -> Result<Submission<'_>, Problem> {
        if operation.flags & !FLAGS != 0 {
            return Err(bad_argument(
                "operation.flags has a bit that this library does not know",
            ));
        }
        let is_set = |flag| operation.flags & flag != 0;
        Ok(Submission {
            data_type: code::data_type(operation.data_type)?,
            map: &self.map,
            account_id: operation.account_id,
            entity: Some(&*self.entity).filter(|entity| !entity.is_empty()),
            char_id: Some(operation.char_id).filter(|id| *id != 0),
            payload: (!is_set(P2P_SYNC_DELETE)).then_some(&*self.payload),
            priority: if is_set(P2P_SYNC_CRITICAL) {
                Priority::Critical
            } else {
                Priority::ByType
            },
            notify: is_set(P2P_SYNC_NOTIFY),
        })
    }
}

/// # Safety
/// `id` is null or readable.
pub(super) unsafe fn get_id(id: *const p2p_sync_id) -> Result<Uuid, Problem> {
    if id.is_null() {
        return Err(null_argument("id"));
    }
    // SAFETY: not null, of bytes alone, and readable by the caller's word.
    Ok(Uuid::from_bytes(unsafe { id.read() }.bytes))
}

/// # Safety
/// `to` is writable.
pub(super) unsafe fn put_id(id: Uuid, to: *mut p2p_sync_id) {
    // SAFETY: the caller's word.
    unsafe { to.write(p2p_sync_id { bytes: id.into_bytes() }) }
}

pub(super) fn result_of(settled: &Settled) -> p2p_sync_result {
    let mut message = [0; P2P_SYNC_MESSAGE_BYTES];
    let sentence = settled.problem.as_ref().map_or("", |problem| problem.sentence.as_str());
    let fits = sentence.floor_char_boundary(P2P_SYNC_MESSAGE_BYTES - 1);
    for (to, byte) in message.iter_mut().zip(sentence[..fits].bytes()) {
        *to = c_char::from_ne_bytes([byte]);
    }
    p2p_sync_result {
        struct_size: size_of::<p2p_sync_result>(),
        state: p2p_sync_state::from(settled.state) as i32,
        code: settled.problem.as_ref().map_or(Code::None, |problem| problem.code) as i32,
        at_ms: ms_since_1970(settled.at),
        data_size: settled.data.as_ref().map_or(0, |data| data.len()),
        message,
    }
}
