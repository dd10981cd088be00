//! Events: what the caller's own thread is told when it asks.

use std::ffi::{c_char, c_void};

use p2p_sync_proto::{Code, Problem};

use super::{
    boundary::guarded,
    code::{self, P2P_SYNC_OK, p2p_sync_code, p2p_sync_event_kind, p2p_sync_state},
    handle::{p2p_sync_agent, running},
    log::LINES_AT_ONCE_MAX,
    operation::p2p_sync_id,
    text::{Versioned, bad_argument, null_argument, p2p_sync_text, read_struct, struct_size, write_struct},
};
use crate::{AgentEvent, Subscription};

/// The state was deleted at this version.
pub const P2P_SYNC_UPDATE_DELETED: u32 = 1;
/// First of a snapshot: what was known of the stream before may be out of date.
pub const P2P_SYNC_UPDATE_SNAPSHOT: u32 = 2;

/// Told by one call that gives no number: who makes events by taking them is let go all the same.
const EVENTS_AT_ONCE_MAX: usize = 65_536;

/// Something that happened. Texts are UTF-8.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_event {
    /// `sizeof(p2p_sync_event)`.
    pub struct_size: usize,
    /// Of `p2p_sync_event_kind`.
    pub kind: i32,
    /// SETTLED: of `p2p_sync_state`.
    pub state: i32,
    /// SETTLED, LINK_DOWN: why, otherwise `P2P_SYNC_OK`.
    pub code: p2p_sync_code,
    /// UPDATE: `P2P_SYNC_UPDATE_DELETED`, `P2P_SYNC_UPDATE_SNAPSHOT`.
    pub flags: u32,
    /// SETTLED: what. LEASE_HANDING_OVER: the host that is to have the map; zeroes for none yet.
    pub id: p2p_sync_id,
    /// UPDATE: which subscription.
    pub subscription: u64,
    /// UPDATE: the position in the stream; grows by one or more with each update of a stream.
    pub stream_sequence: u64,
    /// UPDATE: the version's tenure, incarnation and sequence, compared in this order.
    pub version: [u64; 3],
    /// UPDATE: when the hub received it, milliseconds since 1970.
    pub received_at_ms: u64,
    /// UPDATE: whom it is about.
    pub account_id: u32,
    /// UPDATE: the path. LEASE_*: the map.
    pub path: p2p_sync_text,
    /// UPDATE: the JSON payload. SETTLED: the data that came back, or the sentence to `code`. LINK_DOWN: the sentence.
    pub data: p2p_sync_text,
}

// SAFETY: `#[repr(C)]`, size first, null pointers and zeroes are valid.
unsafe impl Versioned for p2p_sync_event {
    const BYTES_MIN: usize = 128;
}

/// Told of one event; the event and its texts are valid during the call. Must not unwind or jump out; may call the
/// library, but not `p2p_sync_shutdown`.
pub type p2p_sync_event_callback = Option<unsafe extern "C" fn(context: *mut c_void, event: *const p2p_sync_event)>;

/// What to follow. Zero-initialise it, then set `struct_size`. Texts and types are read during the call and not kept.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_subscription {
    /// `sizeof(p2p_sync_subscription)`.
    pub struct_size: usize,
    /// A map's name, `@player` or `@host`.
    pub stream: p2p_sync_text,
    /// Only paths that begin so; empty: all.
    pub path_prefix: p2p_sync_text,
    /// Only these types, of `p2p_sync_type`; null with a count of 0: all.
    pub types: *const i32,
    /// How many `types` has, at most 64.
    pub types_count: usize,
}

// SAFETY: `#[repr(C)]`, size first, null pointers and zeroes are valid.
unsafe impl Versioned for p2p_sync_subscription {
    const BYTES_MIN: usize = 56;
}

/// Follows a stream: first a snapshot of what it holds, then each change, in the stream's order, as events of kind
/// UPDATE. Any thread; never waits.
///
/// An update is not lost by a slow caller: what waits is bounded, and the rest is read from the hub when there is room.
/// `subscription` is written on success alone. BAD_MAP, UNKNOWN_TYPE, QUEUE_FULL with too many subscriptions.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_subscribe(
    agent: p2p_sync_agent,
    request: *const p2p_sync_subscription,
    subscription: *mut u64,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let request = unsafe { read_struct(request, "request") }?;
        if subscription.is_null() {
            return Err(null_argument("subscription"));
        }
        // SAFETY: the caller's word.
        let wanted = unsafe { subscription_of(&request) }?;
        let id = running(agent)?.door.subscribe(wanted)?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { subscription.write_unaligned(id) };
        Ok(())
    })
}

/// Ends a subscription; updates of it that wait are dropped with it. Any thread; never waits. NOT_FOUND.
#[unsafe(no_mangle)]
pub extern "C" fn p2p_sync_unsubscribe(agent: p2p_sync_agent, subscription: u64) -> p2p_sync_code {
    guarded(|| {
        let none = || {
            Problem::new(
                Code::NotFound,
                "there is no such subscription: it was never made, or has ended",
            )
        };
        running(agent)?
            .door
            .unsubscribe(subscription)
            .then_some(())
            .ok_or_else(none)
    })
}

/// Runs `callback` on this thread for each event that waits, at most `events_max` (0: 65536), oldest first,
/// and tells the log lines that wait, at most 64 a call. Never waits for disk or network. From one thread at a time, or
/// events of a stream may be told out of order.
///
/// `events`, if not null, is given how many were told. With a null `callback` events are left where they are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_process(
    agent: p2p_sync_agent,
    events_max: usize,
    callback: p2p_sync_event_callback,
    context: *mut c_void,
    events: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        let running = running(agent)?;
        let mut lines_left = LINES_AT_ONCE_MAX;
        running.log.deliver(&mut lines_left);
        let mut told = 0;
        if let Some(callback) = callback {
            let most = if events_max == 0 {
                EVENTS_AT_ONCE_MAX
            } else {
                events_max
            };
            while told < most
                && let Some(event) = running.door.next_own_event(|_| true)
            {
                told += 1;
                // SAFETY: the callback may be called by the caller's word; the event outlives the call.
                unsafe { callback(context, &raw const *Told::new(&event)) };
                running.log.deliver(&mut lines_left);
            }
        }
        if !events.is_null() {
            // SAFETY: not null, and the caller's to be written.
            unsafe { events.write_unaligned(told) };
        }
        Ok(())
    })
}

/// Takes the oldest event; kind NONE when nothing waits. Any thread; never waits.
///
/// Its texts are copied into `buffer`, NUL-terminated, and `event` points into it. `size`, if not null, is given the
/// bytes they need. BUFFER_TOO_SMALL leaves the event where it is. Log lines that wait are told to the agent's logger on
/// the way, at most 64 a call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_next_event(
    agent: p2p_sync_agent,
    event: *mut p2p_sync_event,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        unsafe { struct_size(event, "event") }?;
        if buffer.is_null() && capacity > 0 {
            return Err(null_argument("buffer"));
        }
        let mut needed = 0;
        let running = running(agent)?;
        running.log.deliver(&mut { LINES_AT_ONCE_MAX });
        let taken = running.door.next_own_event(|event| {
            let told = Told::new(event);
            needed = told.path.size + told.data.size + 2;
            needed <= capacity
        });
        if !size.is_null() {
            // SAFETY: not null, and the caller's to be written.
            unsafe { size.write_unaligned(needed) };
        }
        let Some(taken) = taken else {
            if needed > capacity {
                let sentence = format!("{needed} bytes are needed, the buffer has {capacity}");
                return Err(Problem::new(Code::BufferTooSmall, sentence));
            }
            // SAFETY: the caller's word.
            return unsafe { write_struct(&EMPTY, event, "event") };
        };
        let mut told = Told::new(&taken);
        // SAFETY: both texts and a NUL each fit into the buffer's `capacity` bytes.
        unsafe {
            let path_end = copy_text(&mut told.path, buffer);
            copy_text(&mut told.data, path_end);
            write_struct(&*told, event, "event")
        }
    })
}

const EMPTY: p2p_sync_event = p2p_sync_event {
    struct_size: size_of::<p2p_sync_event>(),
    kind: p2p_sync_event_kind::P2P_SYNC_EVENT_NONE as i32,
    state: 0,
    code: P2P_SYNC_OK,
    flags: 0,
    id: p2p_sync_id { bytes: [0; 16] },
    subscription: 0,
    stream_sequence: 0,
    version: [0; 3],
    received_at_ms: 0,
    account_id: 0,
    path: p2p_sync_text::EMPTY,
    data: p2p_sync_text::EMPTY,
};

/// An event as C reads it, while the event it was made of lives.
struct Told<'a> {
    event: p2p_sync_event,
    _of: &'a AgentEvent,
}

impl<'a> Told<'a> {
    fn new(of: &'a AgentEvent) -> Self {
        use p2p_sync_event_kind::{
            P2P_SYNC_EVENT_LEASE_EXPIRING, P2P_SYNC_EVENT_LEASE_GRANTED, P2P_SYNC_EVENT_LEASE_HANDING_OVER,
            P2P_SYNC_EVENT_LEASE_LOST, P2P_SYNC_EVENT_LINK_DOWN, P2P_SYNC_EVENT_LINK_UP, P2P_SYNC_EVENT_SETTLED,
            P2P_SYNC_EVENT_UPDATE,
        };
        let mut event = EMPTY;
        match of {
            AgentEvent::Settled { operation_id, settled } => {
                event.kind = P2P_SYNC_EVENT_SETTLED as i32;
                event.id.bytes = operation_id.into_bytes();
                event.state = p2p_sync_state::from(settled.state) as i32;
                if let Some(data) = &settled.data {
                    event.data = p2p_sync_text::of(data);
                }
                if let Some(problem) = &settled.problem {
                    event.code = problem.code as i32;
                    event.data = p2p_sync_text::of(&problem.sentence);
                }
            }
            AgentEvent::Update {
                subscription,
                state,
                snapshot,
            } => {
                let version = state.version.unwrap_or_default();
                event.kind = P2P_SYNC_EVENT_UPDATE as i32;
                event.subscription = *subscription;
                event.stream_sequence = state.stream_sequence;
                event.version = [version.tenure, version.incarnation, version.sequence];
                event.received_at_ms = state.received_at_ms;
                event.account_id = state.account_id;
                event.path = p2p_sync_text::of(&state.path);
                event.data = p2p_sync_text::of(std::str::from_utf8(&state.payload).unwrap_or_default());
                for (flag, is_set) in [
                    (P2P_SYNC_UPDATE_DELETED, state.deleted),
                    (P2P_SYNC_UPDATE_SNAPSHOT, *snapshot),
                ] {
                    event.flags |= if is_set { flag } else { 0 };
                }
            }
            AgentEvent::LinkUp => event.kind = P2P_SYNC_EVENT_LINK_UP as i32,
            AgentEvent::LinkDown { problem } => {
                event.kind = P2P_SYNC_EVENT_LINK_DOWN as i32;
                event.code = problem.code as i32;
                event.data = p2p_sync_text::of(&problem.sentence);
            }
            AgentEvent::LeaseGranted { map } => {
                event.kind = P2P_SYNC_EVENT_LEASE_GRANTED as i32;
                event.path = p2p_sync_text::of(map);
            }
            AgentEvent::LeaseExpiring { map } => {
                event.kind = P2P_SYNC_EVENT_LEASE_EXPIRING as i32;
                event.path = p2p_sync_text::of(map);
            }
            AgentEvent::LeaseLost { map } => {
                event.kind = P2P_SYNC_EVENT_LEASE_LOST as i32;
                event.path = p2p_sync_text::of(map);
            }
            AgentEvent::LeaseHandingOver { map, successor } => {
                event.kind = P2P_SYNC_EVENT_LEASE_HANDING_OVER as i32;
                event.path = p2p_sync_text::of(map);
                event.id.bytes = successor.into_bytes();
            }
            // Told by the log's own callback.
            AgentEvent::Log { .. } => {}
        }
        Self { event, _of: of }
    }
}

impl std::ops::Deref for Told<'_> {
    type Target = p2p_sync_event;

    fn deref(&self) -> &p2p_sync_event {
        &self.event
    }
}

impl std::ops::DerefMut for Told<'_> {
    fn deref_mut(&mut self) -> &mut p2p_sync_event {
        &mut self.event
    }
}

/// # Safety
/// `to` has room for the text and a NUL.
unsafe fn copy_text(text: &mut p2p_sync_text, to: *mut c_char) -> *mut c_char {
    // SAFETY: the caller's word; a text of a Rust string is readable, an empty one is not read.
    unsafe {
        if text.size > 0 {
            to.copy_from_nonoverlapping(text.data, text.size);
        }
        to.add(text.size).write(0);
        text.data = to;
        to.add(text.size + 1)
    }
}

/// # Safety
/// The request's texts and types are readable.
unsafe fn subscription_of(request: &p2p_sync_subscription) -> Result<Subscription, Problem> {
    const TYPES_MAX: usize = 64;
    if request.types_count > TYPES_MAX {
        return Err(bad_argument(&format!("request.types_count is above {TYPES_MAX}")));
    }
    let types = if request.types_count == 0 {
        &[][..]
    } else if request.types.is_null() || !request.types.is_aligned() {
        return Err(null_argument("request.types"));
    } else {
        // SAFETY: not null, aligned, and by the caller's word so many are readable.
        unsafe { std::slice::from_raw_parts(request.types, request.types_count) }
    };
    // SAFETY: the caller's word.
    let (stream, path_prefix) = unsafe {
        (
            request.stream.utf8("request.stream")?,
            request.path_prefix.utf8("request.path_prefix")?,
        )
    };
    Ok(Subscription {
        stream: stream.to_owned(),
        types: types
            .iter()
            .map(|number| code::data_type(*number))
            .collect::<Result<_, _>>()?,
        path_prefix: path_prefix.to_owned(),
    })
}
