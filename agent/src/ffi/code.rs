//! Numbers that C reads: codes, types, states, kinds of events. They are never reused.

use std::ffi::c_char;

use p2p_sync_proto::{Code, Problem, v1::SyncDataType};

use super::{
    boundary::guarded,
    text::{bad_argument, put_text},
};
use crate::{LeaseState, results::OperationState};

/// What a call gives back: `P2P_SYNC_OK`, or a number of `p2p_sync_error`.
///
/// 1xx: configuration and environment. 2xx: the operation or request itself. 3xx: trust. 4xx: flow, mostly worth a later
/// try. 5xx: a fault of this software. 6xx: a call that was made wrongly. A newer hub may answer with a number that is
/// not listed here.
pub type p2p_sync_code = i32;

/// The call did what it says.
pub const P2P_SYNC_OK: p2p_sync_code = 0;

/// Why a call or an operation was refused. The sentence beside each says what to do: `p2p_sync_last_error`, and the
/// `message` of a result.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Described where they are told.
pub enum p2p_sync_error {
    P2P_SYNC_ERR_CONFIG_UNREADABLE = 101,
    P2P_SYNC_ERR_UNKNOWN_KEY = 102,
    P2P_SYNC_ERR_BAD_VALUE = 103,
    P2P_SYNC_ERR_MISSING_VALUE = 104,
    P2P_SYNC_ERR_HUB_SECRET_IN_HOST_FILE = 105,
    P2P_SYNC_ERR_BAD_CREDENTIAL = 106,
    P2P_SYNC_ERR_BAD_ENDPOINT = 107,
    P2P_SYNC_ERR_DATA_DIRECTORY_IN_USE = 108,
    P2P_SYNC_ERR_PORT_IN_USE = 109,
    P2P_SYNC_ERR_LOOSE_FILE_MODE = 110,
    P2P_SYNC_ERR_DATABASE_UNREACHABLE = 111,
    P2P_SYNC_ERR_SCHEMA_OUTDATED = 112,
    P2P_SYNC_ERR_REDIS_UNREACHABLE = 113,
    P2P_SYNC_ERR_SECOND_PROXY = 114,
    P2P_SYNC_ERR_BAD_TYPES_FILE = 115,
    P2P_SYNC_ERR_BAD_KEYRING = 116,
    P2P_SYNC_ERR_OUTBOX_UNREADABLE = 117,
    P2P_SYNC_ERR_SCHEMA_MISSING = 118,
    P2P_SYNC_ERR_BAD_CERTIFICATE = 119,
    P2P_SYNC_ERR_BAD_TOKEN = 120,
    P2P_SYNC_ERR_BAD_EMBEDDING_PROVIDER = 121,
    P2P_SYNC_ERR_EMBEDDINGS_MISMATCH = 122,

    P2P_SYNC_ERR_UNKNOWN_TYPE = 201,
    P2P_SYNC_ERR_INVALID_JSON = 202,
    P2P_SYNC_ERR_TOO_LARGE = 203,
    P2P_SYNC_ERR_TOO_DEEP = 204,
    P2P_SYNC_ERR_TOO_MANY_NODES = 205,
    P2P_SYNC_ERR_DUPLICATE_KEY = 206,
    P2P_SYNC_ERR_BAD_TEXT = 207,
    P2P_SYNC_ERR_NUMBER_OUT_OF_RANGE = 208,
    P2P_SYNC_ERR_SCHEMA_VIOLATION = 209,
    P2P_SYNC_ERR_BAD_PATH = 210,
    P2P_SYNC_ERR_BAD_MAP = 211,
    P2P_SYNC_ERR_ENTITY_MISSING = 212,
    P2P_SYNC_ERR_BAD_OPERATION = 213,
    P2P_SYNC_ERR_REPOLICY = 214,
    P2P_SYNC_ERR_UNSUPPORTED = 215,
    P2P_SYNC_ERR_STORE_REFUSED = 216,
    P2P_SYNC_ERR_CONFLICT = 217,
    P2P_SYNC_ERR_OUTBOX_TOO_OLD = 218,
    P2P_SYNC_ERR_BAD_CURSOR = 219,
    P2P_SYNC_ERR_DAMAGED_RECORD = 220,
    P2P_SYNC_ERR_NOT_FOUND = 221,
    P2P_SYNC_ERR_BAD_REQUEST = 222,
    P2P_SYNC_ERR_IMPOSSIBLE_VALUE = 223,
    P2P_SYNC_ERR_EMPTY_TEXT = 224,
    P2P_SYNC_ERR_TEXT_TOO_LONG = 225,
    P2P_SYNC_ERR_TEXT_REFUSED = 226,
    P2P_SYNC_ERR_WRONG_DIMENSIONS = 227,
    P2P_SYNC_ERR_NOT_FINITE = 228,
    P2P_SYNC_ERR_RESYNC = 229,

    P2P_SYNC_ERR_NOT_OPENED = 301,
    P2P_SYNC_ERR_NOT_ENROLLED = 302,
    P2P_SYNC_ERR_REVOKED = 303,
    P2P_SYNC_ERR_LOCKED = 304,
    P2P_SYNC_ERR_NOT_LEASE_HOLDER = 305,
    P2P_SYNC_ERR_STALE_TENURE = 306,
    P2P_SYNC_ERR_REPLAY = 307,
    P2P_SYNC_ERR_CLOCK_SKEW = 308,
    P2P_SYNC_ERR_UPGRADE_REQUIRED = 309,
    P2P_SYNC_ERR_OUTBOX_CLONED = 310,
    P2P_SYNC_ERR_UNTRUSTED_CERTIFICATE = 311,
    P2P_SYNC_ERR_NOT_ALLOWED = 312,
    P2P_SYNC_ERR_PLAYER_NOT_HERE = 313,
    P2P_SYNC_ERR_TOKEN_EXPIRED = 314,
    P2P_SYNC_ERR_TOKEN_USED = 315,

    P2P_SYNC_ERR_QUEUE_FULL = 401,
    P2P_SYNC_ERR_NOT_YET_SETTLED = 403,
    P2P_SYNC_ERR_UNKNOWN_OUTCOME = 404,
    P2P_SYNC_ERR_HUB_UNAVAILABLE = 405,
    P2P_SYNC_ERR_RATE_LIMITED = 406,
    P2P_SYNC_ERR_SHUT_DOWN = 407,
    P2P_SYNC_ERR_NOT_KEPT = 408,
    P2P_SYNC_ERR_TOO_MANY_GAPS = 409,
    P2P_SYNC_ERR_DISK_ERROR = 410,
    P2P_SYNC_ERR_EMBEDDINGS_UNAVAILABLE = 411,
    P2P_SYNC_ERR_BUDGET_SPENT = 412,
    P2P_SYNC_ERR_TOO_SLOW = 413,

    P2P_SYNC_ERR_INTERNAL = 500,

    P2P_SYNC_ERR_NULL_ARGUMENT = 601,
    P2P_SYNC_ERR_BAD_ARGUMENT = 602,
    P2P_SYNC_ERR_BAD_HANDLE = 603,
    P2P_SYNC_ERR_BAD_STRUCT_SIZE = 604,
    P2P_SYNC_ERR_BUFFER_TOO_SMALL = 605,
    P2P_SYNC_ERR_FORKED = 606,
    P2P_SYNC_ERR_PANICKED = 607,
    P2P_SYNC_ERR_TOO_MANY_AGENTS = 608,
    P2P_SYNC_ERR_SHUTDOWN_INCOMPLETE = 609,
}

/// What an operation tells of.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Described in conf/types.toml, type by type.
pub enum p2p_sync_type {
    P2P_SYNC_MAP_STATE = 0,
    P2P_SYNC_MONSTER_DATA = 1,
    P2P_SYNC_PLAYER_POSITION = 2,
    P2P_SYNC_ITEM_DROP = 3,
    P2P_SYNC_NPC_STATE = 4,
    P2P_SYNC_QUEST_PROGRESS = 5,
    P2P_SYNC_CRITICAL_GAME_STATE = 6,
    P2P_SYNC_CHAT_MESSAGE = 7,
    P2P_SYNC_VECTOR_EMBEDDING = 8,
    P2P_SYNC_HOST_METRICS = 9,
    P2P_SYNC_SECURITY_VALIDATION = 10,
    P2P_SYNC_PLAYER_DATA = 11,
    P2P_SYNC_PLAYER_PRESENCE = 12,
}

/// How far an operation or a question has come. All but ACCEPTED, SPOOLED and UNKNOWN are final.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum p2p_sync_state {
    /// In memory.
    P2P_SYNC_ACCEPTED = 1,
    /// In the outbox on disk: survives this process.
    P2P_SYNC_SPOOLED = 2,
    /// Committed by the hub; a question: answered.
    P2P_SYNC_APPLIED = 3,
    /// A newer operation of its path took its place before it was sent.
    P2P_SYNC_SUPERSEDED = 4,
    /// Will never apply; code and message say why. Kept as a dead letter.
    P2P_SYNC_REJECTED = 5,
    /// Came after the right to write it had passed to another host; the hub's operator decides.
    P2P_SYNC_LIMBO = 6,
    /// Not settled when the time was over. Not a failure: it stays in the outbox and settles under its id.
    P2P_SYNC_UNKNOWN = 7,
    /// No longer kept, or never known. Kept are `result_keep_seconds`, or 262,144 operations further, whichever is less.
    P2P_SYNC_NOT_KEPT = 8,
}

impl From<OperationState> for p2p_sync_state {
    fn from(state: OperationState) -> Self {
        match state {
            OperationState::Accepted => Self::P2P_SYNC_ACCEPTED,
            OperationState::Spooled => Self::P2P_SYNC_SPOOLED,
            OperationState::Applied => Self::P2P_SYNC_APPLIED,
            OperationState::Superseded => Self::P2P_SYNC_SUPERSEDED,
            OperationState::Rejected => Self::P2P_SYNC_REJECTED,
            OperationState::Limbo => Self::P2P_SYNC_LIMBO,
            OperationState::Unknown => Self::P2P_SYNC_UNKNOWN,
            OperationState::NotKept => Self::P2P_SYNC_NOT_KEPT,
        }
    }
}

/// Whether this host may write a map.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum p2p_sync_lease {
    /// The hub grants no leases: every host may write every map.
    P2P_SYNC_LEASE_NOT_GOVERNED = 0,
    /// It may.
    P2P_SYNC_LEASE_HELD = 1,
    /// It may still; the lease ends soon and could not be renewed yet.
    P2P_SYNC_LEASE_EXPIRING = 2,
    /// It may not any more: what is written now goes to limbo. Or the lease ran out and could not be renewed, as when the
    /// hub is away: what is written now applies if nobody else was given the map, and no event tells of it.
    P2P_SYNC_LEASE_LOST = 3,
    /// It never might, or the hub was not asked yet.
    P2P_SYNC_LEASE_NONE = 4,
    /// It may not any more, though it holds the map still: the map is being handed over. What ends the map well is taken
    /// until it has passed on.
    P2P_SYNC_LEASE_HANDING_OVER = 5,
}

impl From<LeaseState> for p2p_sync_lease {
    fn from(state: LeaseState) -> Self {
        match state {
            LeaseState::NotGoverned => Self::P2P_SYNC_LEASE_NOT_GOVERNED,
            LeaseState::Held => Self::P2P_SYNC_LEASE_HELD,
            LeaseState::Expiring => Self::P2P_SYNC_LEASE_EXPIRING,
            LeaseState::Lost => Self::P2P_SYNC_LEASE_LOST,
            LeaseState::None => Self::P2P_SYNC_LEASE_NONE,
            LeaseState::HandingOver => Self::P2P_SYNC_LEASE_HANDING_OVER,
        }
    }
}

/// What an event tells.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum p2p_sync_event_kind {
    /// Nothing waits (`p2p_sync_next_event`).
    P2P_SYNC_EVENT_NONE = 0,
    /// An operation or question that asked to be told of (`P2P_SYNC_NOTIFY`) is settled.
    P2P_SYNC_EVENT_SETTLED = 1,
    /// A state of a subscribed stream changed.
    P2P_SYNC_EVENT_UPDATE = 2,
    /// The hub answers.
    P2P_SYNC_EVENT_LINK_UP = 3,
    /// The hub does not answer; operations are kept.
    P2P_SYNC_EVENT_LINK_DOWN = 4,
    /// This host may write a map from now on; also when a lease that was expiring was renewed.
    P2P_SYNC_EVENT_LEASE_GRANTED = 5,
    /// The right to write a map ends soon, and could not be renewed for two thirds of its time.
    P2P_SYNC_EVENT_LEASE_EXPIRING = 6,
    /// The right to write a map has passed on: the hub said so.
    P2P_SYNC_EVENT_LEASE_LOST = 7,
    /// A map is to pass on: end it, send what is left to be said of it, then release it (`P2P_SYNC_ASK_RELEASE_MAP`).
    /// LEASE_LOST follows, or LEASE_GRANTED where it stays after all.
    P2P_SYNC_EVENT_LEASE_HANDING_OVER = 8,
}

/// How much a log line matters.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The usual ones.
pub enum p2p_sync_level {
    P2P_SYNC_LEVEL_ERROR = 1,
    P2P_SYNC_LEVEL_WARNING = 2,
    P2P_SYNC_LEVEL_INFO = 3,
    P2P_SYNC_LEVEL_DEBUG = 4,
}

pub(super) fn data_type(number: i32) -> Result<SyncDataType, Problem> {
    SyncDataType::try_from(number).map_err(|_| {
        let sentence = format!("{number} is not a type: pass one of p2p_sync_type");
        Problem::new(Code::UnknownType, sentence)
    })
}

pub(super) fn level(number: i32) -> Result<tracing::Level, Problem> {
    const ERROR: i32 = p2p_sync_level::P2P_SYNC_LEVEL_ERROR as i32;
    const WARNING: i32 = p2p_sync_level::P2P_SYNC_LEVEL_WARNING as i32;
    const DEBUG: i32 = p2p_sync_level::P2P_SYNC_LEVEL_DEBUG as i32;
    const INFO: i32 = p2p_sync_level::P2P_SYNC_LEVEL_INFO as i32;
    match number {
        ERROR => Ok(tracing::Level::ERROR),
        WARNING => Ok(tracing::Level::WARN),
        0 | INFO => Ok(tracing::Level::INFO),
        DEBUG => Ok(tracing::Level::DEBUG),
        _ => Err(bad_argument(&format!(
            "{number} is not a level: pass one of p2p_sync_level"
        ))),
    }
}

/// Writes the stable name of a code, e.g. `TOO_LARGE`, NUL-terminated. Any thread; never waits.
///
/// `size`, if not null, is given its length. BAD_ARGUMENT for a number this library does not know, BUFFER_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_code_label(
    code: p2p_sync_code,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        let unknown = |_| bad_argument(&format!("{code} is not a code of this library"));
        let label = Code::try_from(code).map_err(unknown)?.label();
        // SAFETY: the caller's word.
        unsafe { put_text(label, buffer, capacity, size) }
    })
}
