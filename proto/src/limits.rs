//! Every bound of the wire, in one place, with how they relate.

/// JSON payload of one operation, bytes. A type's policy may lower it.
pub const PAYLOAD_BYTES_MAX: usize = 256 * 1024;
/// Nesting of a JSON payload; the outermost value is at depth 1.
pub const JSON_DEPTH_MAX: usize = 32;
/// Values in a JSON payload, the outermost included.
pub const JSON_NODES_MAX: usize = 16_384;
/// Digits and signs of one JSON number as written, bytes.
pub const JSON_NUMBER_BYTES_MAX: usize = 64;

/// A whole path, bytes.
pub const PATH_BYTES_MAX: usize = 256;
/// A map's name, bytes; rAthena's own names have at most 11, instances add a few.
pub const MAP_BYTES_MAX: usize = 32;
/// An entity within its owner, bytes.
pub const ENTITY_BYTES_MAX: usize = 128;

/// A key of the hosts' cache, bytes.
pub const CACHE_KEY_BYTES_MAX: usize = 256;
/// A value of the hosts' cache, or a message published by a host, bytes.
pub const CACHE_VALUE_BYTES_MAX: usize = 256 * 1024;
/// A channel's name, bytes.
pub const CHANNEL_BYTES_MAX: usize = 128;
/// The longest a hub keeps a value of a host's, seconds: 30 days.
pub const CACHE_EXPIRY_SECONDS_MAX: u32 = 30 * 24 * 60 * 60;

/// Members of one group.
pub const GROUP_MEMBERS_MAX: usize = 64;
/// An encoded group, bytes.
pub const GROUP_BYTES_MAX: usize = 768 * 1024;

/// Operations in one message; of a group each member counts.
pub const BATCH_OPS_MAX: usize = 512;
/// Incarnations that the operations of one message are of, and the same of its withdrawn ranges: the hub decides each in a
/// transaction of its own.
pub const BATCH_INCARNATIONS_MAX: usize = 16;
/// Ranges of withdrawn sequences in one message.
pub const BATCH_WITHDRAWN_MAX: usize = 1024;
/// Encoded operations in one message, bytes, before compression. A sender closes its batch before it grows past this.
pub const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// One encoded message after decompression, bytes.
pub const MESSAGE_BYTES_MAX: usize = 2 * 1024 * 1024;
/// One sealed message as gRPC decodes it, bytes.
pub const SEALED_BYTES_MAX: usize = MESSAGE_BYTES_MAX + 64 * 1024;

/// Batches in flight on one bulk stream.
pub const BULK_WINDOW_BATCHES: usize = 8;
/// Critical messages in flight on one connection.
pub const CRITICAL_IN_FLIGHT_MAX: usize = 8;

/// Hits of one search among embeddings.
pub const HITS_MAX: u32 = 100;

/// States in one page of `Scan` or `ChangesSince`.
pub const PAGE_STATES_MAX: u32 = 1000;

/// Streams that one watch follows, and prefixes that it chooses by.
pub const WATCH_STREAMS_MAX: usize = 64;
/// States in one `Update`.
pub const UPDATE_STATES_MAX: usize = 256;
/// States in one `Update`, encoded, bytes; one that is larger goes alone.
pub const UPDATE_BYTES_MAX: usize = 256 * 1024;

/// Unsettled holes below the newest settled sequence of one incarnation that the hub remembers.
pub const SEQUENCE_GAPS_MAX: usize = 4096;

/// Longest sentence sent with an outcome, bytes.
pub const REASON_BYTES_MAX: usize = 512;

const _: () = assert!(
    2 * (PAYLOAD_BYTES_MAX + PATH_BYTES_MAX + 1024) <= GROUP_BYTES_MAX && GROUP_BYTES_MAX <= BATCH_BYTES_MAX,
    "two of the largest operations fit into a group, and the largest group into a batch"
);
const _: () = assert!(
    PATH_BYTES_MAX + MAP_BYTES_MAX + 256 <= 1024,
    "what an operation has beside its payload is less than is counted for it"
);
const _: () = assert!(GROUP_MEMBERS_MAX <= BATCH_OPS_MAX, "a group fits into a batch");
const _: () = assert!(
    BATCH_BYTES_MAX + GROUP_BYTES_MAX + BATCH_OPS_MAX * 16 + BATCH_WITHDRAWN_MAX * 40 <= MESSAGE_BYTES_MAX,
    "a batch with its last operation and its withdrawn ranges fits into a message"
);
const _: () = assert!(
    BATCH_OPS_MAX * (REASON_BYTES_MAX + 32) <= MESSAGE_BYTES_MAX,
    "a reply that refuses every operation of a batch fits into a message"
);
const _: () = assert!(
    CACHE_VALUE_BYTES_MAX + CACHE_KEY_BYTES_MAX + CHANNEL_BYTES_MAX + 1024 <= MESSAGE_BYTES_MAX,
    "the largest value fits into a message"
);
const _: () = assert!(
    UPDATE_BYTES_MAX + WATCH_STREAMS_MAX * (MAP_BYTES_MAX + 64) + REASON_BYTES_MAX + 1024 <= MESSAGE_BYTES_MAX,
    "an update with all streams of a watch fits into a message"
);
const _: () = assert!(
    MAP_BYTES_MAX + ENTITY_BYTES_MAX + 64 <= PATH_BYTES_MAX,
    "the longest map, type and entity fit into a path"
);
