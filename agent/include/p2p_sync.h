// p2p-sync for map servers: the C ABI of libp2p_sync.
//
// Written by cbindgen from the library's source: change that, not this file.
//
// What holds for every call:
//   - It gives P2P_SYNC_OK, or a code; then p2p_sync_last_error() has a sentence, for each thread its own.
//   - Outputs are written on success alone. `size` outputs are written whenever the call gets so far.
//   - Pointers are the caller's: read or written during the call, never freed and never kept. The callback for log lines is
//     kept until the agent is shut down.
//   - Structs begin with their size, so that either side may be newer: set everything to zero, then `struct_size`.
//   - Any thread may call, several at a time. Nothing waits for disk or network unless it says so, and then for no longer
//     than it says. Nothing unwinds into C; callbacks must not unwind either.
//   - A handle names one agent for ever: after its shutdown calls answer SHUT_DOWN, also when others were started. What
//     never was a handle answers BAD_HANDLE.
//   - Callbacks run inside p2p_sync_process() alone, on the thread that calls it; the one for log lines inside
//     p2p_sync_next_event(), p2p_sync_start() and p2p_sync_shutdown() as well.
//   - In a child after fork() every call answers FORKED and does nothing, but for p2p_sync_abi_version() and
//     p2p_sync_version(): start agents in the process that uses them.

#ifndef P2P_SYNC_H
#define P2P_SYNC_H

#include <stddef.h>
#include <stdint.h>

// Grows when something that worked stops working, which takes a new SONAME as well.
#define P2P_SYNC_ABI_VERSION 0

// Deletes the path instead of putting `payload`, which is ignored then.
#define P2P_SYNC_DELETE 1

// Sends by the critical lane, whatever the type.
#define P2P_SYNC_CRITICAL 2

// Tells of the settlement by an event: see `p2p_sync_process`.
#define P2P_SYNC_NOTIFY 4

// Of the sentence in a result, its NUL included.
#define P2P_SYNC_MESSAGE_BYTES 512

// The state was deleted at this version.
#define P2P_SYNC_UPDATE_DELETED 1

// First of a snapshot: what was known of the stream before may be out of date.
#define P2P_SYNC_UPDATE_SNAPSHOT 2

// Why a call or an operation was refused. The sentence beside each says what to do: `p2p_sync_last_error`, and the
// `message` of a result.
typedef enum p2p_sync_error {
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
} p2p_sync_error;

// What an operation tells of.
typedef enum p2p_sync_type {
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
} p2p_sync_type;

// How far an operation or a question has come. All but ACCEPTED, SPOOLED and UNKNOWN are final.
typedef enum p2p_sync_state {
    // In memory.
    P2P_SYNC_ACCEPTED = 1,
    // In the outbox on disk: survives this process.
    P2P_SYNC_SPOOLED = 2,
    // Committed by the hub; a question: answered.
    P2P_SYNC_APPLIED = 3,
    // A newer operation of its path took its place before it was sent.
    P2P_SYNC_SUPERSEDED = 4,
    // Will never apply; code and message say why. Kept as a dead letter.
    P2P_SYNC_REJECTED = 5,
    // Came after the right to write it had passed to another host; the hub's operator decides.
    P2P_SYNC_LIMBO = 6,
    // Not settled when the time was over. Not a failure: it stays in the outbox and settles under its id.
    P2P_SYNC_UNKNOWN = 7,
    // No longer kept, or never known. Kept are `result_keep_seconds`, or 262,144 operations further, whichever is less.
    P2P_SYNC_NOT_KEPT = 8,
} p2p_sync_state;

// Whether this host may write a map.
typedef enum p2p_sync_lease {
    // The hub grants no leases: every host may write every map.
    P2P_SYNC_LEASE_NOT_GOVERNED = 0,
    // It may.
    P2P_SYNC_LEASE_HELD = 1,
    // It may still; the lease ends soon and could not be renewed yet.
    P2P_SYNC_LEASE_EXPIRING = 2,
    // It may not any more: what is written now goes to limbo. Or the lease ran out and could not be renewed, as when the
    // hub is away: what is written now applies if nobody else was given the map, and no event tells of it.
    P2P_SYNC_LEASE_LOST = 3,
    // It never might, or the hub was not asked yet.
    P2P_SYNC_LEASE_NONE = 4,
    // It may not any more, though it holds the map still: the map is being handed over. What ends the map well is taken
    // until it has passed on.
    P2P_SYNC_LEASE_HANDING_OVER = 5,
} p2p_sync_lease;

// What an event tells.
typedef enum p2p_sync_event_kind {
    // Nothing waits (`p2p_sync_next_event`).
    P2P_SYNC_EVENT_NONE = 0,
    // An operation or question that asked to be told of (`P2P_SYNC_NOTIFY`) is settled.
    P2P_SYNC_EVENT_SETTLED = 1,
    // A state of a subscribed stream changed.
    P2P_SYNC_EVENT_UPDATE = 2,
    // The hub answers.
    P2P_SYNC_EVENT_LINK_UP = 3,
    // The hub does not answer; operations are kept.
    P2P_SYNC_EVENT_LINK_DOWN = 4,
    // This host may write a map from now on; also when a lease that was expiring was renewed.
    P2P_SYNC_EVENT_LEASE_GRANTED = 5,
    // The right to write a map ends soon, and could not be renewed for two thirds of its time.
    P2P_SYNC_EVENT_LEASE_EXPIRING = 6,
    // The right to write a map has passed on: the hub said so.
    P2P_SYNC_EVENT_LEASE_LOST = 7,
    // A map is to pass on: end it, send what is left to be said of it, then release it (`P2P_SYNC_ASK_RELEASE_MAP`).
    // LEASE_LOST follows, or LEASE_GRANTED where it stays after all.
    P2P_SYNC_EVENT_LEASE_HANDING_OVER = 8,
} p2p_sync_event_kind;

// How much a log line matters.
typedef enum p2p_sync_level {
    P2P_SYNC_LEVEL_ERROR = 1,
    P2P_SYNC_LEVEL_WARNING = 2,
    P2P_SYNC_LEVEL_INFO = 3,
    P2P_SYNC_LEVEL_DEBUG = 4,
} p2p_sync_level;

// What a question asks for.
typedef enum p2p_sync_question_kind {
    // State, by type, map and account, or as `text` says: a JSON object with `path`, with `prefix`, `limit` and `cursor`, or
    // with `entity` and `char_id`, or the members that the type has; and with `kept`, `at_least` and `at_least_sequence` where
    // it says from where the answer comes and how old it may be. `p2p_sync_request.schema.json` beside this header says which.
    P2P_SYNC_ASK_STATE = 1,
    // The value that the hub's cache holds under the key `text`.
    P2P_SYNC_ASK_CACHE = 2,
    // The embedding of `text`: a JSON array of numbers.
    P2P_SYNC_ASK_EMBEDDING = 3,
    // What lies nearest to the embedding `text`, a JSON array of numbers: at most `limit` hits, of `map` alone unless it is
    // empty. Or `text` is a JSON object with `embedding` or `text`, and `maps`, `types`, `since_ms`, `until_ms`,
    // `min_similarity` and `limit` where it is to be narrowed.
    P2P_SYNC_ASK_SIMILAR = 4,
    // Whether the hub's cache holds a value under the key `text`: `true` or `false`.
    P2P_SYNC_ASK_CACHE_EXISTS = 5,
    // What lies nearest to the words `text`: at most `limit` hits, of `map` alone unless it is empty.
    P2P_SYNC_ASK_SIMILAR_TEXT = 6,
    // Who holds `map` and who stands by for it; an empty one: all maps that this host holds, stands by for, or may be given.
    // Here and with the following: `{"maps":[{"map","host_id","tenure","expires_in_ms","backups","assistants","successor",
    // "stream_head"}]}`.
    P2P_SYNC_ASK_MAPS = 7,
    // For `map`, which nobody holds; LEASE_GRANTED says when it is this host's.
    P2P_SYNC_ASK_ASSIGN_MAP = 8,
    // To have `map`, which is this host's, handed over while it goes on: to the host with the id `text`, or, where that is
    // empty, the best there is. LEASE_HANDING_OVER says when to end it.
    P2P_SYNC_ASK_MIGRATE_MAP = 9,
    // To have `map` no more: answered when what was submitted before is settled, as far as there is time (10 s, or the hub's
    // of a map that is handed over), and the hub has the map. It may not be written from this call on.
    P2P_SYNC_ASK_RELEASE_MAP = 10,
} p2p_sync_question_kind;

// What a call gives back: `P2P_SYNC_OK`, or a number of `p2p_sync_error`.
//
// 1xx: configuration and environment. 2xx: the operation or request itself. 3xx: trust. 4xx: flow, mostly worth a later
// try. 5xx: a fault of this software. 6xx: a call that was made wrongly. A newer hub may answer with a number that is
// not listed here.
typedef int32_t p2p_sync_code;

// Told of one log line; `message` is UTF-8, NUL-terminated, and valid during the call. Must not unwind or jump out.
typedef void (*p2p_sync_log_callback)(void *context, int32_t level, const char *message);

// How an agent is started. Zero-initialise it, then set `struct_size`.
typedef struct p2p_sync_options {
    // `sizeof(p2p_sync_options)`.
    size_t struct_size;
    // The configuration file, e.g. `conf/p2p_data_sync.conf`. Relative paths in it are meant from its folder.
    const char *config_path;
    // Told of each log line, on the caller's thread, during `p2p_sync_start`, `p2p_sync_process`,
    // `p2p_sync_next_event` and `p2p_sync_shutdown`. Null: nothing is logged.
    p2p_sync_log_callback log;
    // Passed to `log` as it is.
    void *log_context;
    // The least that is told, of `p2p_sync_level`; 0 is INFO. Holds for the process: the first agent's counts.
    int32_t log_level;
} p2p_sync_options;

// Names a running agent; 0 names none. Stays refused after its shutdown, also when other agents are started.
typedef uint64_t p2p_sync_agent;

// Bytes that are read during the call and not kept; not NUL-terminated. The texts of operations and what
// `p2p_sync_json_string` takes are in the server's code page (`text_encoding`); all others are UTF-8, or refused with
// BAD_TEXT.
typedef struct p2p_sync_text {
    // May be null if `size` is 0.
    const char *data;
    // Bytes.
    size_t size;
} p2p_sync_text;

// One thing that happened. Zero-initialise it, then set `struct_size`. Texts are read during the call and not kept.
typedef struct p2p_sync_operation {
    // `sizeof(p2p_sync_operation)`.
    size_t struct_size;
    // What it tells of, of `p2p_sync_type`.
    int32_t data_type;
    // Whom it is about; 0 for nobody.
    uint32_t account_id;
    // The character, where the type's owner is one; 0: the payload says.
    uint64_t char_id;
    // On which map it happened; may be empty where the type's owner is not a map.
    struct p2p_sync_text map;
    // Which one of its owner's, e.g. a monster's runtime id; empty: the payload says.
    struct p2p_sync_text entity;
    // JSON, at most 256 KiB.
    struct p2p_sync_text payload;
    // `P2P_SYNC_DELETE`, `P2P_SYNC_CRITICAL`, `P2P_SYNC_NOTIFY`.
    uint32_t flags;
} p2p_sync_operation;

// Names an operation or a question: a UUIDv7, in the order of its text form.
typedef struct p2p_sync_id {
    // As RFC 9562 has them.
    uint8_t bytes[16];
} p2p_sync_id;

// What became of an operation or a question. Set `struct_size` before each call.
typedef struct p2p_sync_result {
    // `sizeof(p2p_sync_result)`.
    size_t struct_size;
    // Of `p2p_sync_state`.
    int32_t state;
    // Why, where it was refused or is not known; otherwise `P2P_SYNC_OK`.
    p2p_sync_code code;
    // When it came to this state, milliseconds since 1970; 0 where it is not known.
    uint64_t at_ms;
    // Bytes of the data that came back (`p2p_sync_get_data`); 0 without any.
    size_t data_size;
    // The sentence to `code`, UTF-8, NUL-terminated; empty without one.
    char message[P2P_SYNC_MESSAGE_BYTES];
} p2p_sync_result;

// A question. Zero-initialise it, then set `struct_size`. Texts are UTF-8, read during the call and not kept.
typedef struct p2p_sync_question {
    // `sizeof(p2p_sync_question)`.
    size_t struct_size;
    // Of `p2p_sync_question_kind`.
    int32_t kind;
    // Of `p2p_sync_type`; for `P2P_SYNC_ASK_STATE`.
    int32_t data_type;
    // For `P2P_SYNC_ASK_STATE`.
    uint32_t account_id;
    // `P2P_SYNC_NOTIFY` or 0.
    uint32_t flags;
    // For `P2P_SYNC_ASK_STATE`, `P2P_SYNC_ASK_SIMILAR`, `P2P_SYNC_ASK_SIMILAR_TEXT` and what asks of maps.
    struct p2p_sync_text map;
    // As the kind says.
    struct p2p_sync_text text;
    // As the kind says; 0: as many as the hub gives.
    uint32_t limit;
} p2p_sync_question;

// What to follow. Zero-initialise it, then set `struct_size`. Texts and types are read during the call and not kept.
typedef struct p2p_sync_subscription {
    // `sizeof(p2p_sync_subscription)`.
    size_t struct_size;
    // A map's name, `@player` or `@host`.
    struct p2p_sync_text stream;
    // Only paths that begin so; empty: all.
    struct p2p_sync_text path_prefix;
    // Only these types, of `p2p_sync_type`; null with a count of 0: all.
    const int32_t *types;
    // How many `types` has, at most 64.
    size_t types_count;
} p2p_sync_subscription;

// Something that happened. Texts are UTF-8.
typedef struct p2p_sync_event {
    // `sizeof(p2p_sync_event)`.
    size_t struct_size;
    // Of `p2p_sync_event_kind`.
    int32_t kind;
    // SETTLED: of `p2p_sync_state`.
    int32_t state;
    // SETTLED, LINK_DOWN: why, otherwise `P2P_SYNC_OK`.
    p2p_sync_code code;
    // UPDATE: `P2P_SYNC_UPDATE_DELETED`, `P2P_SYNC_UPDATE_SNAPSHOT`.
    uint32_t flags;
    // SETTLED: what. LEASE_HANDING_OVER: the host that is to have the map; zeroes for none yet.
    struct p2p_sync_id id;
    // UPDATE: which subscription.
    uint64_t subscription;
    // UPDATE: the position in the stream; grows by one or more with each update of a stream.
    uint64_t stream_sequence;
    // UPDATE: the version's tenure, incarnation and sequence, compared in this order.
    uint64_t version[3];
    // UPDATE: when the hub received it, milliseconds since 1970.
    uint64_t received_at_ms;
    // UPDATE: whom it is about.
    uint32_t account_id;
    // UPDATE: the path. LEASE_*: the map.
    struct p2p_sync_text path;
    // UPDATE: the JSON payload. SETTLED: the data that came back, or the sentence to `code`. LINK_DOWN: the sentence.
    struct p2p_sync_text data;
} p2p_sync_event;

// Told of one event; the event and its texts are valid during the call. Must not unwind or jump out; may call the
// library, but not `p2p_sync_shutdown`.
typedef void (*p2p_sync_event_callback)(void *context, const struct p2p_sync_event *event);

// How an agent is. Set `struct_size` before each call. Counts are since the agent's start.
typedef struct p2p_sync_status {
    // `sizeof(p2p_sync_status)`.
    size_t struct_size;
    // 1 while the hub answers.
    uint8_t link_up;
    // 1 while the outbox or its disk is full.
    uint8_t outbox_full;
    // Of the policies in force; 0 for the built-in ones.
    uint32_t policy_version;
    // Operations in memory, sent and not answered included.
    uint64_t pending_operations;
    // Operations on disk: what would be lost with it.
    uint64_t outbox_operations;
    // Their size on disk.
    uint64_t outbox_bytes;
    // Grows with each start on one outbox.
    uint64_t incarnation;
    // Operations taken.
    uint64_t taken;
    // Refused at the call.
    uint64_t refused;
    // Committed by the hub.
    uint64_t applied;
    // Replaced by a newer one before they were sent.
    uint64_t superseded;
    // Refused by the hub.
    uint64_t rejected;
    // Waiting calls that ended without an answer.
    uint64_t timeouts;
    // Texts and operations with bytes that were no text of the server's code page.
    uint64_t texts_escaped;
    // Came under a tenure that has passed.
    uint64_t limbo;
} p2p_sync_status;

// The call did what it says.
#define P2P_SYNC_OK 0

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Writes the stable name of a code, e.g. `TOO_LARGE`, NUL-terminated. Any thread; never waits.
//
// `size`, if not null, is given its length. BAD_ARGUMENT for a number this library does not know, BUFFER_TOO_SMALL.
p2p_sync_code p2p_sync_code_label(p2p_sync_code code, char *buffer, size_t capacity, size_t *size);

// `P2P_SYNC_ABI_VERSION` of the library that is linked, to be compared with the header's. Any thread; never waits.
uint32_t p2p_sync_abi_version(void);

// The library's version, e.g. `0.1.0`. Static: never freed. Any thread; never waits.
const char *p2p_sync_version(void);

// Starts an agent: opens its outbox and begins to send, or attaches to a standalone agent where `agent_socket` is set.
//
// Waits for the disk (some milliseconds, and as long as it takes to read an outbox of earlier starts), not for the hub.
// Its threads block all signals. Not to be called between `fork` and `exec`; a child of a process that has started an
// agent is answered with FORKED by every call that gives a code. `agent` is written on success alone; shut it down with
// `p2p_sync_shutdown`.
//
// Refuses with the codes 1xx (all mistakes of the configuration are in one message) and TOO_MANY_AGENTS.
p2p_sync_code p2p_sync_start(const struct p2p_sync_options *options,
                             p2p_sync_agent *agent);

// Ends an agent: takes nothing more, writes what it has taken to disk, and joins its threads. What is not settled stays
// in the outbox and is sent after the next start; to wait for the hub, call `p2p_sync_flush` before.
//
// Waits at most some `timeout_ms` (0: 5000): some milliseconds on a working disk, 2000 for messages on their way.
// Calls that wait on other threads are let go with UNKNOWN or SHUT_DOWN. May be called twice: the second call does
// nothing. Any thread, also at exit; not from a callback.
//
// SHUTDOWN_INCOMPLETE when not all that was taken was kept: no disk took it, or the standalone agent did not, and it is
// lost; the sentence says how many operations. Also when threads hang on a disk that does not answer: they end with it,
// or with the process. The agent has ended all the same. BAD_HANDLE.
p2p_sync_code p2p_sync_shutdown(p2p_sync_agent agent,
                                uint32_t timeout_ms);

// The code and the sentence of the last call on this thread that was refused. Any thread; never waits.
//
// Gives the code, or `P2P_SYNC_OK` if none was refused yet. The sentence (UTF-8, NUL-terminated, what is wrong and what
// to do) goes into `buffer`, cut to fit in `capacity` bytes; `size`, if not null, is given its whole length without
// the NUL. `buffer` may be null with a `capacity` of 0.
p2p_sync_code p2p_sync_last_error(char *buffer,
                                  size_t capacity,
                                  size_t *size);

// Takes an operation and gives its id. Any thread; never waits for disk, network or another thread.
//
// `id` is written on success alone. Refuses with the codes 2xx (what to mend is in `p2p_sync_last_error`), QUEUE_FULL,
// UNSUPPORTED where `enabled = no`, SHUT_DOWN; nothing of a refused operation is kept.
p2p_sync_code p2p_sync_submit(p2p_sync_agent agent,
                              const struct p2p_sync_operation *operation,
                              struct p2p_sync_id *id);

// Takes an operation by the critical lane and waits for the hub's answer, at most `critical_timeout_ms`.
//
// Without an answer by then `result->state` is UNKNOWN and the call succeeds: the operation stays in the outbox and
// settles under its id. After one such timeout these calls answer UNKNOWN at once, until the link answers again. Any
// thread. `id` and `result` are written on success alone; refuses as `p2p_sync_submit`.
p2p_sync_code p2p_sync_submit_critical(p2p_sync_agent agent,
                                       const struct p2p_sync_operation *operation,
                                       struct p2p_sync_id *id,
                                       struct p2p_sync_result *result);

// How far an operation or a question has come. Any thread; never waits.
//
// NOT_KEPT as a state, not as a refusal, for an id that is not known (any more).
p2p_sync_code p2p_sync_get_result(p2p_sync_agent agent, const struct p2p_sync_id *id, struct p2p_sync_result *result);

// Waits until an operation or a question is settled, at most `timeout_ms`; 0 waits until it is settled or the agent is
// shut down. Any thread. UNKNOWN as a state where it is not settled by then.
p2p_sync_code p2p_sync_wait(p2p_sync_agent agent,
                            const struct p2p_sync_id *id,
                            uint32_t timeout_ms,
                            struct p2p_sync_result *result);

// Writes `text` as a JSON string, quotes included, in ASCII: bytes of the server's code page (`text_encoding`) become
// `\uXXXX`, bytes that do not decode `\\xNN`; such a text is counted in the status (`texts_escaped`). Any thread; never
// waits.
//
// `size`, if not null, is given the length without the NUL. BUFFER_TOO_SMALL: `6 * text.size + 3` bytes always suffice.
p2p_sync_code p2p_sync_json_string(p2p_sync_agent agent,
                                   struct p2p_sync_text text,
                                   char *buffer,
                                   size_t capacity,
                                   size_t *size);

// Takes `count` operations (1 to 64, each of another path) as one: the hub applies all of them in one transaction, or
// none. Any thread; never waits.
//
// `operations` is an array whose elements lie `operations[0].struct_size` bytes apart, and all have that `struct_size`
// (BAD_STRUCT_SIZE). `flags` is `P2P_SYNC_NOTIFY` or 0; of the operations' own flags NOTIFY has no place here. The group
// travels by the critical lane if one of them does. `id` is written on success alone. Refuses as `p2p_sync_submit`; one
// that is refused refuses the group.
p2p_sync_code p2p_sync_submit_group(p2p_sync_agent agent,
                                    const struct p2p_sync_operation *operations,
                                    size_t count,
                                    uint32_t flags,
                                    struct p2p_sync_id *id);

// Asks the hub something and gives the question's id. Any thread; never waits.
//
// `p2p_sync_get_result` and `p2p_sync_wait` tell how far it is: APPLIED when answered (`p2p_sync_get_data`), REJECTED
// with the hub's code, or with HUB_UNAVAILABLE when it did not answer within 5 s (a release: 2 minutes). `id` is written on success alone.
// QUEUE_FULL while 256 questions are unanswered, and with `P2P_SYNC_NOTIFY` while 16 MiB of answers wait to be taken as
// events; BAD_REQUEST, SHUT_DOWN.
p2p_sync_code p2p_sync_ask(p2p_sync_agent agent,
                           const struct p2p_sync_question *question,
                           struct p2p_sync_id *id);

// Waits for the answer to a question, at most `critical_timeout_ms`. Any thread.
//
// Without an answer by then `result->state` is UNKNOWN and the call succeeds: the question goes on. After one such timeout,
// and while the link does not answer, these calls give what is there at once, until the hub answers a question again.
p2p_sync_code p2p_sync_wait_for_answer(p2p_sync_agent agent,
                                       const struct p2p_sync_id *id,
                                       struct p2p_sync_result *result);

// The data that came back to a question: UTF-8, mostly JSON, NUL-terminated. Any thread; never waits.
//
// `size`, if not null, is given its length without the NUL, fitting or not. NOT_FOUND where no data came back or it is
// no longer kept, BUFFER_TOO_SMALL.
p2p_sync_code p2p_sync_get_data(p2p_sync_agent agent,
                                const struct p2p_sync_id *id,
                                char *buffer,
                                size_t capacity,
                                size_t *size);

// Follows a stream: first a snapshot of what it holds, then each change, in the stream's order, as events of kind
// UPDATE. Any thread; never waits.
//
// An update is not lost by a slow caller: what waits is bounded, and the rest is read from the hub when there is room.
// `subscription` is written on success alone. BAD_MAP, UNKNOWN_TYPE, QUEUE_FULL with too many subscriptions.
p2p_sync_code p2p_sync_subscribe(p2p_sync_agent agent,
                                 const struct p2p_sync_subscription *request,
                                 uint64_t *subscription);

// Ends a subscription; updates of it that wait are dropped with it. Any thread; never waits. NOT_FOUND.
p2p_sync_code p2p_sync_unsubscribe(p2p_sync_agent agent, uint64_t subscription);

// Runs `callback` on this thread for each event that waits, at most `events_max` (0: 65536), oldest first,
// and tells the log lines that wait, at most 64 a call. Never waits for disk or network. From one thread at a time, or
// events of a stream may be told out of order.
//
// `events`, if not null, is given how many were told. With a null `callback` events are left where they are.
p2p_sync_code p2p_sync_process(p2p_sync_agent agent,
                               size_t events_max,
                               p2p_sync_event_callback callback,
                               void *context,
                               size_t *events);

// Takes the oldest event; kind NONE when nothing waits. Any thread; never waits.
//
// Its texts are copied into `buffer`, NUL-terminated, and `event` points into it. `size`, if not null, is given the
// bytes they need. BUFFER_TOO_SMALL leaves the event where it is. Log lines that wait are told to the agent's logger on
// the way, at most 64 a call.
p2p_sync_code p2p_sync_next_event(p2p_sync_agent agent,
                                  struct p2p_sync_event *event,
                                  char *buffer,
                                  size_t capacity,
                                  size_t *size);

// Puts a value under a key, for `expiry_seconds` (0: `cache_expiry_seconds`). Any thread; never waits.
//
// It is seen here at once and goes to the hub in the background; a cache is not durable. Keys are UTF-8 of 1 to 256
// bytes, values UTF-8 of at most 256 KiB; TOO_LARGE, BAD_TEXT, QUEUE_FULL, SHUT_DOWN.
p2p_sync_code p2p_sync_cache_set(p2p_sync_agent agent,
                                 struct p2p_sync_text key,
                                 struct p2p_sync_text value,
                                 uint32_t expiry_seconds);

// Reads the value under a key: from the cache here, otherwise from the hub, waiting at most `timeout_ms` (0:
// `critical_timeout_ms`). Any thread. To ask without waiting: `P2P_SYNC_ASK_CACHE`.
//
// The value goes into `buffer`, NUL-terminated; `size`, if not null, is given its length without the NUL, fitting or
// not. NOT_FOUND, BUFFER_TOO_SMALL (call again: it is kept here for a moment), HUB_UNAVAILABLE.
p2p_sync_code p2p_sync_cache_get(p2p_sync_agent agent,
                                 struct p2p_sync_text key,
                                 uint32_t timeout_ms,
                                 char *buffer,
                                 size_t capacity,
                                 size_t *size);

// Takes a value out of the cache. Any thread; never waits; seen here at once, as `p2p_sync_cache_set`.
p2p_sync_code p2p_sync_cache_delete(p2p_sync_agent agent, struct p2p_sync_text key);

// Whether the cache holds something under a key: 1 or 0 into `exists`. Any thread; waits as `p2p_sync_cache_get`.
// To ask without waiting: `P2P_SYNC_ASK_CACHE_EXISTS`.
p2p_sync_code p2p_sync_cache_exists(p2p_sync_agent agent,
                                    struct p2p_sync_text key,
                                    uint32_t timeout_ms,
                                    uint8_t *exists);

// Sends a message to whoever listens to a channel of the hub's pub/sub. Any thread; never waits; told to nobody later.
//
// QUEUE_FULL, TOO_LARGE, BAD_TEXT, SHUT_DOWN.
p2p_sync_code p2p_sync_publish(p2p_sync_agent agent,
                               struct p2p_sync_text channel,
                               struct p2p_sync_text message);

// How the agent is. Any thread; does not wait for disk or network.
p2p_sync_code p2p_sync_get_status(p2p_sync_agent agent, struct p2p_sync_status *status);

// The same and more (host id, endpoint, why the link is down, where the outbox is) as a JSON object, NUL-terminated.
// Any thread; does not wait for disk or network. BUFFER_TOO_SMALL; 4096 bytes suffice with ordinary paths, and 256 more
// for each lease and each duty.
p2p_sync_code p2p_sync_get_status_json(p2p_sync_agent agent,
                                       char *buffer,
                                       size_t capacity,
                                       size_t *size);

// Waits until everything taken is settled, at most `timeout_ms`; writes 1 into `drained` if it is, otherwise 0. Any
// thread; not from the game loop, unless it may stand still for so long. Without waiting: all is settled when
// `pending_operations` and `outbox_operations` of `p2p_sync_get_status` are 0 at two looks half a second apart.
p2p_sync_code p2p_sync_flush(p2p_sync_agent agent, uint32_t timeout_ms, uint8_t *drained);

// Whether this host may write a map: one of `p2p_sync_lease` into `lease`. Any thread; never waits.
//
// As the hub said last: `P2P_SYNC_LEASE_NONE` until it has been asked, so ask again when the link is up. BAD_MAP.
p2p_sync_code p2p_sync_get_lease(p2p_sync_agent agent, struct p2p_sync_text map, int32_t *lease);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* P2P_SYNC_H */
