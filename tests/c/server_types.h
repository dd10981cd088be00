// Names that a map server has defined in every file before any of ours: included in front of `callers.cpp` to show that
// the headers neither use nor define them. Written for this test; only the names are such a server's.
#ifndef SERVER_TYPES_H
#define SERVER_TYPES_H

// No standard header survives such macros behind it, so a server has these first.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

typedef int8_t int8;
typedef int16_t int16;
typedef int32_t int32;
typedef int64_t int64;
typedef uint8_t uint8;
typedef uint16_t uint16;
typedef uint32_t uint32;
typedef uint64_t uint64;
typedef signed char sint8;
typedef intptr_t intptr;
typedef uintptr_t uintptr;
typedef long long ll;
typedef int64 t_tick;
typedef char bool_;
typedef uint32 t_itemid;
typedef uint32 t_exp_status;

enum send_target : uint8 { ALL_CLIENT, AREA, SELF };
enum { NONE = 0, MAP_STATE_NORMAL, ERROR_NONE, UNKNOWN_TARGET };

struct block_list {
	int32 id;
};
struct map_session_data : block_list {
	uint32 status_account;
};

#define NAME_LENGTH (23 + 1)
#define MAP_NAME_LENGTH (11 + 1)
#define ARRAYLENGTH(A) (sizeof(A) / sizeof((A)[0]))
#define CREATE(result, type, number) (result) = (type*)calloc((number), sizeof(type))
#define RECREATE(result, type, number) (result) = (type*)realloc((result), sizeof(type) * (number))
#define aFree(p) free(p)
#define TBL_PC map_session_data
#define safestrncpy(dst, src, n) strncpy((dst), (src), (n))
#define TO_UPPER(x) ((x) & ~0x20)
#define zap(x) ((x) = 0)
#define forceinline inline
#define ra_unused __attribute__((unused))
#define ISDIGIT(c) ((c) >= '0' && (c) <= '9')
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))
#define cap_value(a, lowest, highest) (max(min((a), (highest)), (lowest)))
#define swap(a, b) (((a) == (b)) || (((a) ^= (b)), ((b) ^= (a)), ((a) ^= (b))))
#define i64abs(x) ((x) < 0 ? -(x) : (x))
#define PATHSEP '/'
#define PATHSEP_STR "/"
#define SYNC 1

#endif
