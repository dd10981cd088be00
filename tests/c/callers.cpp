// Code as it was written for these calls, every one of them: it has to compile unchanged, whatever becomes of the
// library. What a signature is, is asserted; how it is called, is called.
//
// It is compiled alone and beside a server's own names (server_types.h), and is run without a configuration: then
// each call is refused, with a code and a sentence.
#ifdef INCLUDED_AS_COMMON
#include "common/p2p_data_sync.hpp"
#else
#include "p2p_data_sync.hpp"
#endif

#include <cstdio>
#include <cstdlib>
#include <type_traits>

#define CHECK(condition)                                                                   \
	do {                                                                               \
		if (!(condition)) {                                                        \
			std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
			std::exit(1);                                                      \
		}                                                                          \
	} while (false)

namespace {

using rathena::P2PDataSync;
using rathena::SyncDataType;
using rathena::SyncResult;

static_assert(static_cast<int>(SyncDataType::MAP_STATE) == 0, "numbers are on the wire and in databases");
static_assert(static_cast<int>(SyncDataType::MONSTER_DATA) == 1, "");
static_assert(static_cast<int>(SyncDataType::PLAYER_POSITION) == 2, "");
static_assert(static_cast<int>(SyncDataType::ITEM_DROP) == 3, "");
static_assert(static_cast<int>(SyncDataType::NPC_STATE) == 4, "");
static_assert(static_cast<int>(SyncDataType::QUEST_PROGRESS) == 5, "");
static_assert(static_cast<int>(SyncDataType::CRITICAL_GAME_STATE) == 6, "");
static_assert(static_cast<int>(SyncDataType::CHAT_MESSAGE) == 7, "");
static_assert(static_cast<int>(SyncDataType::VECTOR_EMBEDDING) == 8, "");
static_assert(static_cast<int>(SyncDataType::HOST_METRICS) == 9, "");
static_assert(static_cast<int>(SyncDataType::SECURITY_VALIDATION) == 10, "");
static_assert(static_cast<int>(SyncDataType::PLAYER_DATA) == 11, "");
static_assert(static_cast<int>(SyncDataType::PLAYER_PRESENCE) == 12, "");

static_assert(std::is_same<decltype(SyncResult::success), bool>::value, "");
static_assert(std::is_same<decltype(SyncResult::error_message), std::string>::value, "");
static_assert(std::is_same<decltype(SyncResult::operation_id), std::string>::value, "");
static_assert(std::is_same<decltype(SyncResult::timestamp), std::chrono::system_clock::time_point>::value, "");
static_assert(std::is_default_constructible<SyncResult>::value && std::is_copy_assignable<SyncResult>::value, "");

static_assert(std::is_same<decltype(&P2PDataSync::getInstance), P2PDataSync& (*)()>::value, "");
static_assert(!std::is_copy_constructible<P2PDataSync>::value && !std::is_copy_assignable<P2PDataSync>::value, "");

// Exact types: code that takes a member's address, or derives from these, depends on them.
using Text = const std::string&;
template <typename Result, typename... Arguments>
using Member = Result (P2PDataSync::*)(Arguments...);

[[maybe_unused]] constexpr Member<bool, Text> init_ = &P2PDataSync::init;
[[maybe_unused]] constexpr Member<void> final_ = &P2PDataSync::final;
[[maybe_unused]] constexpr Member<std::string, SyncDataType, uint32_t, Text, Text, bool> to_ = &P2PDataSync::syncToMainServer;
[[maybe_unused]] constexpr Member<std::string, SyncDataType, uint32_t, Text, Text> critical_ = &P2PDataSync::syncCriticalData;
[[maybe_unused]] constexpr Member<std::string, SyncDataType, uint32_t, Text, Text, bool> from_ = &P2PDataSync::syncFromMainServer;
[[maybe_unused]] constexpr Member<SyncResult, Text> result_ = &P2PDataSync::getSyncResult;
[[maybe_unused]] constexpr Member<SyncResult, Text, uint32_t> wait_ = &P2PDataSync::waitForSyncResult;
[[maybe_unused]] constexpr Member<bool, Text, Text, uint32_t> cache_ = &P2PDataSync::cacheData;
[[maybe_unused]] constexpr Member<std::string, Text> cached_ = &P2PDataSync::getCachedData;
[[maybe_unused]] constexpr Member<bool, Text> uncache_ = &P2PDataSync::deleteCachedData;
[[maybe_unused]] constexpr Member<bool, Text> exists_ = &P2PDataSync::exists;
[[maybe_unused]] constexpr Member<bool, Text, Text> publish_ = &P2PDataSync::publish;
[[maybe_unused]] constexpr Member<std::string, Text> embed_ = &P2PDataSync::createEmbedding;
[[maybe_unused]] constexpr Member<std::vector<std::string>, Text, size_t> similar_ = &P2PDataSync::searchSimilarEmbeddings;
[[maybe_unused]] constexpr Member<size_t, size_t> process_ = &P2PDataSync::processSyncQueue;
[[maybe_unused]] constexpr std::string (P2PDataSync::*status_)() const = &P2PDataSync::getStatus;

// Defaults are no part of a type: each is left out once.
void defaultsAreWhatTheyWere(P2PDataSync& sync) {
	const std::string json = "{\"hp\":10}";
	CHECK(sync.syncToMainServer(SyncDataType::MAP_STATE, 0, "prontera", json).empty());
	CHECK(sync.syncFromMainServer(SyncDataType::MAP_STATE, 0, "prontera", json).empty());
	CHECK(!sync.waitForSyncResult("none").success);
	CHECK(!sync.cacheData("key", "value"));
	CHECK(sync.searchSimilarEmbeddings("[0.5]").empty());
	CHECK(sync.processSyncQueue() == 0);
}

// A server that has not started the library, or could not: nothing is taken, nothing crashes.
void everyCallIsRefusedWithoutAnAgent() {
	P2PDataSync& sync = P2PDataSync::getInstance();
	CHECK(&sync == &rathena::P2PDataSync::getInstance());
	defaultsAreWhatTheyWere(sync);

	const uint32_t account_id = 2000001;
	const std::string map = "prontera";
	const char* literal = "{}";
	CHECK(sync.syncToMainServer(SyncDataType::CHAT_MESSAGE, account_id, map, literal, true).empty());
	const rathena::SyncError error = P2PDataSync::lastError();
	CHECK(error.code == P2P_SYNC_ERR_BAD_HANDLE && !error.message.empty());
	CHECK(sync.syncCriticalData(SyncDataType::CRITICAL_GAME_STATE, account_id, map, literal).empty());
	CHECK(sync.syncFromMainServer(SyncDataType::PLAYER_DATA, account_id, map, literal, true).empty());
	CHECK(sync.syncFromMainServer(SyncDataType::PLAYER_DATA, account_id, map, literal, false).empty());

	const SyncResult refused = sync.getSyncResult(std::string());
	CHECK(!refused.success && !refused.error_message.empty() && refused.operation_id.empty());
	CHECK(refused.code == P2P_SYNC_ERR_BAD_ARGUMENT && refused.state == rathena::SyncState::NONE && refused.data.empty());
	const SyncResult unknown = sync.waitForSyncResult("0190a8b0-0000-7000-8000-000000000000", 1000);
	CHECK(!unknown.success && unknown.code == P2P_SYNC_ERR_BAD_HANDLE);
	CHECK(unknown.operation_id == "0190a8b0-0000-7000-8000-000000000000");
	CHECK(unknown.timestamp == std::chrono::system_clock::time_point());

	CHECK(!sync.cacheData("key", "value", 60));
	CHECK(sync.getCachedData("key").empty() && !sync.exists("key") && !sync.deleteCachedData("key"));
	CHECK(!sync.publish("channel", "message"));
	CHECK(sync.createEmbedding("a text").empty());
	CHECK(sync.searchSimilarEmbeddings("[0.5]", 3).empty());
	CHECK(sync.processSyncQueue(100) == 0);
	const P2PDataSync& looked_at = sync;
	CHECK(looked_at.getStatus().empty());
	sync.final();
	sync.final();
}

// What the original had not.
void everyNewCallIsRefusedWithoutAnAgent() {
	P2PDataSync own;
	std::string logged;
	own.setLogger([&logged](int level, const std::string& message) { logged += std::to_string(level) + message; });
	own.setEventHandler([](const rathena::SyncEvent& event) { CHECK(event.kind != rathena::SyncEventKind::SETTLED); });
	bool is_told = false;
	const auto settled = [&is_told](const SyncResult&) { is_told = true; };

	rathena::SyncOperation operation;
	operation.type = SyncDataType::MONSTER_DATA;
	operation.map = "prontera";
	operation.entity = "110000001";
	operation.json = "{}";
	CHECK(own.syncToMainServer(operation).empty() && own.syncToMainServer(operation, settled).empty());
	CHECK(own.syncCriticalDataAsync(SyncDataType::MAP_STATE, 0, "prontera", "{}", settled).empty());
	CHECK(own.syncFromMainServerAsync(SyncDataType::MAP_STATE, 0, "prontera", "", settled).empty());
	CHECK(own.removeFromMainServer(SyncDataType::MONSTER_DATA, 0, "prontera", "110000001").empty());
	CHECK(own.removeFromMainServer(SyncDataType::MAP_STATE, 0, "prontera").empty());
	CHECK(own.syncGroup({operation, operation}).empty() && own.syncGroup({}, settled).empty());
	CHECK(own.getCachedDataAsync("key").empty() && own.createEmbeddingAsync("text", settled).empty());
	CHECK(own.searchSimilarEmbeddingsAsync("[]").empty() && own.searchSimilarEmbeddingsAsync("[]", 5, settled).empty());
	CHECK(own.enterMap(2000001, 150001, "prontera").empty() && own.leaveMap(2000001, 150001, "prontera").empty());
	CHECK(!own.mayWrite("prontera") && own.leaseState("prontera") == rathena::LeaseState::NONE);
	CHECK(own.subscribe("prontera", [](const rathena::SyncUpdate&) {}) == 0);
	CHECK(own.subscribe("@player", nullptr, {SyncDataType::PLAYER_DATA}, "@char/") == 0);
	CHECK(!own.unsubscribe(1) && !own.flush(10) && own.jsonString("text").empty());
	CHECK(own.getStatusNumbers().taken == 0 && !is_told);

	// Told with each mistake of the file and what to do.
	CHECK(!own.init("/nowhere/p2p_data_sync.conf"));
	CHECK(P2PDataSync::lastError().code == P2P_SYNC_ERR_CONFIG_UNREADABLE);
	CHECK(P2PDataSync::lastError().message.find("/nowhere/p2p_data_sync.conf") != std::string::npos);
}

void theLibraryIsOfThisHeader() {
	CHECK(p2p_sync_abi_version() == P2P_SYNC_ABI_VERSION);
	CHECK(p2p_sync_version() != nullptr && p2p_sync_version()[0] != '\0');
}

#ifdef SERVER_TYPES_H
// The server's names are still its own behind our headers.
uint32 accountOf(const TBL_PC& player) { return player.status_account + ARRAYLENGTH("ab") - 3; }
static_assert(cap_value(7, 1, 5) == 5 && max(1, 2) == 2 && min(1, 2) == 1 && NONE == 0, "");
static_assert(std::is_same<decltype(accountOf), uint32(const map_session_data&)>::value, "");
#endif

} // namespace

int main() {
	everyCallIsRefusedWithoutAnAgent();
	everyNewCallIsRefusedWithoutAnAgent();
	theLibraryIsOfThisHeader();
#ifdef SERVER_TYPES_H
	TBL_PC player{};
	player.status_account = 7;
	CHECK(accountOf(player) == 7);
#endif
	std::puts("every call compiles, and is refused without an agent");
	return 0;
}
