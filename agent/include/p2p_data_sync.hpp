// p2p-sync for map servers in C++17: header only, over the C ABI of p2p_sync.h.
//
//     auto& sync = rathena::P2PDataSync::getInstance();
//     sync.init("conf/p2p_data_sync.conf");
//     sync.syncToMainServer(rathena::SyncDataType::MONSTER_DATA, 0, "prontera", json);
//     sync.processSyncQueue();   // by a timer of some 20 ms: runs what waits to be told, on this thread
//     sync.final();
//
// No call throws, but for std::bad_alloc where a string does not fit into memory. A call that is refused gives an empty
// id, false or an empty text; lastError() says why. All calls may be made from any thread; callbacks run inside
// processSyncQueue(), the logger inside init() and final() as well, on the thread that calls these.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "p2p_sync.h"

namespace rathena {

// What an operation tells of.
enum class SyncDataType : std::int32_t {
	MAP_STATE = P2P_SYNC_MAP_STATE,
	MONSTER_DATA = P2P_SYNC_MONSTER_DATA,
	PLAYER_POSITION = P2P_SYNC_PLAYER_POSITION,
	ITEM_DROP = P2P_SYNC_ITEM_DROP,
	NPC_STATE = P2P_SYNC_NPC_STATE,
	QUEST_PROGRESS = P2P_SYNC_QUEST_PROGRESS,
	CRITICAL_GAME_STATE = P2P_SYNC_CRITICAL_GAME_STATE,
	CHAT_MESSAGE = P2P_SYNC_CHAT_MESSAGE,
	VECTOR_EMBEDDING = P2P_SYNC_VECTOR_EMBEDDING,
	HOST_METRICS = P2P_SYNC_HOST_METRICS,
	SECURITY_VALIDATION = P2P_SYNC_SECURITY_VALIDATION,
	PLAYER_DATA = P2P_SYNC_PLAYER_DATA,
	PLAYER_PRESENCE = P2P_SYNC_PLAYER_PRESENCE,
};

// How far an operation or a question has come; see p2p_sync_state.
enum class SyncState : std::int32_t {
	NONE = 0, // no such operation: the call was refused
	ACCEPTED = P2P_SYNC_ACCEPTED,
	SPOOLED = P2P_SYNC_SPOOLED,
	APPLIED = P2P_SYNC_APPLIED,
	SUPERSEDED = P2P_SYNC_SUPERSEDED,
	REJECTED = P2P_SYNC_REJECTED,
	LIMBO = P2P_SYNC_LIMBO,
	UNKNOWN = P2P_SYNC_UNKNOWN,
	NOT_KEPT = P2P_SYNC_NOT_KEPT,
};

// What became of an operation or a question.
struct SyncResult {
	// Applied, or superseded by a newer operation of its path; a question: answered.
	bool success = false;
	// "pending" until it is settled; why it was refused.
	std::string error_message;
	std::string operation_id;
	// When it came to its state.
	std::chrono::system_clock::time_point timestamp;
	// P2P_SYNC_OK, or a number of p2p_sync_error.
	p2p_sync_code code = P2P_SYNC_OK;
	SyncState state = SyncState::NONE;
	// What came back to a question, mostly JSON.
	std::string data;
};

// Why the last call on this thread was refused.
struct SyncError {
	p2p_sync_code code = P2P_SYNC_OK;
	std::string message;
};

// Whether this host may write a map; see p2p_sync_lease.
enum class LeaseState : std::int32_t {
	NOT_GOVERNED = P2P_SYNC_LEASE_NOT_GOVERNED,
	HELD = P2P_SYNC_LEASE_HELD,
	EXPIRING = P2P_SYNC_LEASE_EXPIRING,
	LOST = P2P_SYNC_LEASE_LOST,
	NONE = P2P_SYNC_LEASE_NONE,
	HANDING_OVER = P2P_SYNC_LEASE_HANDING_OVER,
};

enum class SyncEventKind : std::int32_t {
	SETTLED = P2P_SYNC_EVENT_SETTLED,
	UPDATE = P2P_SYNC_EVENT_UPDATE,
	LINK_UP = P2P_SYNC_EVENT_LINK_UP,
	LINK_DOWN = P2P_SYNC_EVENT_LINK_DOWN,
	LEASE_GRANTED = P2P_SYNC_EVENT_LEASE_GRANTED,
	LEASE_EXPIRING = P2P_SYNC_EVENT_LEASE_EXPIRING,
	LEASE_LOST = P2P_SYNC_EVENT_LEASE_LOST,
	LEASE_HANDING_OVER = P2P_SYNC_EVENT_LEASE_HANDING_OVER,
};

// LINK_UP, LINK_DOWN, LEASE_GRANTED, LEASE_EXPIRING, LEASE_HANDING_OVER, LEASE_LOST.
struct SyncEvent {
	SyncEventKind kind;
	// LEASE_*: which map.
	std::string map;
	p2p_sync_code code = P2P_SYNC_OK;
	// LINK_DOWN: why. LEASE_HANDING_OVER: the id of the host that is to have the map; empty for none yet.
	std::string message;
};

// A change of a stream that is followed.
struct SyncUpdate {
	std::uint64_t subscription = 0;
	std::string path;
	// JSON; empty where the state was deleted.
	std::string payload;
	bool deleted = false;
	// First of a snapshot: what was known of the stream before may be out of date.
	bool snapshot = false;
	std::uint32_t account_id = 0;
	std::uint64_t stream_sequence = 0;
	// Tenure, incarnation, sequence, compared in this order.
	std::array<std::uint64_t, 3> version{};
};

// One operation of a group, or one with more to say than syncToMainServer() takes.
struct SyncOperation {
	SyncDataType type = SyncDataType::MAP_STATE;
	std::uint32_t account_id = 0;
	std::string map;
	// JSON; left out with `remove`.
	std::string json;
	// Which one of its owner's; empty: the JSON says.
	std::string entity;
	// The owning character; 0: the JSON says.
	std::uint64_t char_id = 0;
	// Deletes the path.
	bool remove = false;
	// By the critical lane, whatever the type.
	bool is_priority = false;
};

class P2PDataSync {
public:
	using ResultCallback = std::function<void(const SyncResult&)>;
	using UpdateCallback = std::function<void(const SyncUpdate&)>;
	using EventCallback = std::function<void(const SyncEvent&)>;
	// `level` is a number of p2p_sync_level.
	using LogCallback = std::function<void(int level, const std::string& message)>;

	// The process' one; others can be made, each with a configuration and an outbox of its own.
	static P2PDataSync& getInstance() {
		static P2PDataSync instance;
		return instance;
	}

	P2PDataSync() = default;
	~P2PDataSync() { final(); }
	P2PDataSync(const P2PDataSync&) = delete;
	P2PDataSync& operator=(const P2PDataSync&) = delete;

	// Where log lines go (ShowInfo and friends). To be set before init().
	void setLogger(LogCallback logger) { logger_ = std::move(logger); }

	// Told of the link and of leases.
	void setEventHandler(EventCallback handler) { on_event_ = std::move(handler); }

	// Starts; false where the configuration has mistakes (all are in lastError()). Waits for the disk, not for the hub.
	// Does nothing where it runs already.
	bool init(const std::string& config_path) {
		const std::lock_guard<std::mutex> starting(starting_mutex_);
		if (agent_ != 0) {
			return true;
		}
		p2p_sync_options options{};
		options.struct_size = sizeof(options);
		options.config_path = config_path.c_str();
		if (logger_) {
			options.log = &P2PDataSync::onLog;
			options.log_context = this;
			options.log_level = P2P_SYNC_LEVEL_INFO;
		}
		p2p_sync_agent started = 0;
		if (p2p_sync_start(&options, &started) != P2P_SYNC_OK) {
			return false;
		}
		agent_ = started;
		return true;
	}

	// Writes what was taken to disk and ends; what is not settled is sent after the next init(). Bounded by some 5 s;
	// may be called twice. Where not all was kept (the disk is full or hangs, the standalone agent is not there),
	// lastError() is P2P_SYNC_ERR_SHUTDOWN_INCOMPLETE, and says how many operations are lost where that is known.
	void final() {
		const std::lock_guard<std::mutex> starting(starting_mutex_);
		const p2p_sync_agent agent = agent_.exchange(0);
		if (agent != 0) {
			p2p_sync_shutdown(agent, 0);
			const std::lock_guard<std::mutex> lock(callbacks_mutex_);
			on_settled_.clear();
			on_update_.clear();
		}
	}

	// Takes an operation and gives its id; never waits.
	std::string syncToMainServer(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& json, bool is_priority = false) {
		return submit(operation(type, account_id, map, json, is_priority ? P2P_SYNC_CRITICAL : 0u));
	}

	// The same with an entity, a character or a deletion; `on_settled` is run when it is settled.
	std::string syncToMainServer(const SyncOperation& given, ResultCallback on_settled = nullptr) {
		p2p_sync_operation told = operation(given);
		return notifying(std::move(on_settled), [&](std::uint32_t notify, p2p_sync_id* id) {
			told.flags |= notify;
			return p2p_sync_submit(agent_, &told, id);
		});
	}

	// Takes an operation by the critical lane and waits for the hub's answer, at most `critical_timeout_ms`. After one
	// timeout it does not wait until the link answers again. getSyncResult() tells what became of it.
	std::string syncCriticalData(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& json) {
		const p2p_sync_operation told = operation(type, account_id, map, json, P2P_SYNC_CRITICAL);
		p2p_sync_id id;
		p2p_sync_result result = emptyResult();
		return p2p_sync_submit_critical(agent_, &told, &id, &result) == P2P_SYNC_OK ? text(id) : std::string();
	}

	// The same without waiting: `on_settled` is run when it is settled.
	std::string syncCriticalDataAsync(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& json, ResultCallback on_settled) {
		SyncOperation given;
		given.type = type;
		given.account_id = account_id;
		given.map = map;
		given.json = json;
		given.is_priority = true;
		return syncToMainServer(given, std::move(on_settled));
	}

	// Deletes a piece of state; never waits.
	std::string removeFromMainServer(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& entity = std::string(), bool is_priority = false) {
		p2p_sync_operation told = operation(type, account_id, map, std::string_view(),
			P2P_SYNC_DELETE | (is_priority ? P2P_SYNC_CRITICAL : 0u));
		told.entity = text(entity);
		return submit(told);
	}

	// Takes several operations that take effect together or not at all; never waits.
	std::string syncGroup(const std::vector<SyncOperation>& group, ResultCallback on_settled = nullptr) {
		std::vector<p2p_sync_operation> told;
		told.reserve(group.size());
		for (const SyncOperation& given : group) {
			told.push_back(operation(given));
		}
		return notifying(std::move(on_settled), [&](std::uint32_t notify, p2p_sync_id* id) {
			return p2p_sync_submit_group(agent_, told.data(), told.size(), notify, id);
		});
	}

	// Asks the hub for state; never waits. `request_json`: empty or a JSON object, see P2P_SYNC_ASK_STATE and
	// `p2p_sync_request.schema.json`. The answer is in the result's `data`. (`is_priority` is taken for compatibility: questions
	// do not queue behind bulk anyway.)
	std::string syncFromMainServer(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& request_json, bool is_priority = false) {
		static_cast<void>(is_priority);
		return ask(question(type, account_id, map, request_json), nullptr);
	}

	// The same, and `on_answer` is run when it is answered.
	std::string syncFromMainServerAsync(SyncDataType type, std::uint32_t account_id, const std::string& map,
		const std::string& request_json, ResultCallback on_answer) {
		return ask(question(type, account_id, map, request_json), std::move(on_answer));
	}

	// How far an operation or a question has come; never waits.
	SyncResult getSyncResult(const std::string& operation_id) {
		return resultOf(operation_id, [this](const p2p_sync_id& id, p2p_sync_result& result) {
			return p2p_sync_get_result(agent_, &id, &result);
		});
	}

	// Waits until it is settled, at most `timeout_ms`; 0 waits until it is settled or shut down.
	SyncResult waitForSyncResult(const std::string& operation_id, std::uint32_t timeout_ms = 5000) {
		return resultOf(operation_id, [this, timeout_ms](const p2p_sync_id& id, p2p_sync_result& result) {
			return p2p_sync_wait(agent_, &id, timeout_ms, &result);
		});
	}

	// Puts a value into the cache that this host shares with the hub; does not wait. 0: `cache_expiry_seconds`.
	bool cacheData(const std::string& key, const std::string& value, std::uint32_t expiry_seconds = 0) {
		return p2p_sync_cache_set(agent_, text(key), text(value), expiry_seconds) == P2P_SYNC_OK;
	}

	// Reads it: from here, or from the hub, waiting at most `critical_timeout_ms`. Empty where there is none.
	std::string getCachedData(const std::string& key) {
		return read([&](char* buffer, std::size_t capacity, std::size_t* size) {
			return p2p_sync_cache_get(agent_, text(key), 0, buffer, capacity, size);
		});
	}

	// The same without waiting: the answer is in the result's `data`.
	std::string getCachedDataAsync(const std::string& key, ResultCallback on_answer = nullptr) {
		return ask(question(P2P_SYNC_ASK_CACHE, key, 0), std::move(on_answer));
	}

	bool deleteCachedData(const std::string& key) { return p2p_sync_cache_delete(agent_, text(key)) == P2P_SYNC_OK; }

	// Whether the cache holds something under a key; waits as getCachedData().
	bool exists(const std::string& key) {
		std::uint8_t found = 0;
		return p2p_sync_cache_exists(agent_, text(key), 0, &found) == P2P_SYNC_OK && found != 0;
	}

	// The same without waiting: the answer, `true` or `false`, is in the result's `data`.
	std::string existsAsync(const std::string& key, ResultCallback on_answer = nullptr) {
		return ask(question(P2P_SYNC_ASK_CACHE_EXISTS, key, 0), std::move(on_answer));
	}

	// Sends a message to whoever listens to a channel of the hub; does not wait.
	bool publish(const std::string& channel, const std::string& message) {
		return p2p_sync_publish(agent_, text(channel), text(message)) == P2P_SYNC_OK;
	}

	// The embedding of a text, a JSON array of numbers; waits for the hub, at most `critical_timeout_ms`, and not at
	// all while it does not answer. Empty where it cannot be had.
	std::string createEmbedding(const std::string& text) {
		return waitForAnswer(createEmbeddingAsync(text)).data;
	}

	std::string createEmbeddingAsync(const std::string& text, ResultCallback on_answer = nullptr) {
		return ask(question(P2P_SYNC_ASK_EMBEDDING, text, 0), std::move(on_answer));
	}

	// What lies nearest to an embedding, each a JSON object; waits as createEmbedding(). Empty where it cannot be had. In the
	// place of the embedding may be a JSON object that says more: see P2P_SYNC_ASK_SIMILAR.
	std::vector<std::string> searchSimilarEmbeddings(const std::string& embedding, std::size_t limit = 10) {
		return elements(waitForAnswer(searchSimilarEmbeddingsAsync(embedding, limit)).data);
	}

	std::string searchSimilarEmbeddingsAsync(const std::string& embedding, std::size_t limit = 10,
		ResultCallback on_answer = nullptr) {
		const std::size_t most = limit < UINT32_MAX ? limit : UINT32_MAX;
		return ask(question(P2P_SYNC_ASK_SIMILAR, embedding, static_cast<std::uint32_t>(most)), std::move(on_answer));
	}

	// What lies nearest to a text, on a map or, where it is empty, on all that this host sees; as searchSimilarEmbeddings().
	std::vector<std::string> searchSimilarTexts(const std::string& text, std::size_t limit = 10,
		const std::string& map = std::string()) {
		return elements(waitForAnswer(searchSimilarTextsAsync(text, limit, map)).data);
	}

	std::string searchSimilarTextsAsync(const std::string& words, std::size_t limit = 10,
		const std::string& map = std::string(), ResultCallback on_answer = nullptr) {
		const std::size_t most = limit < UINT32_MAX ? limit : UINT32_MAX;
		p2p_sync_question asked = question(P2P_SYNC_ASK_SIMILAR_TEXT, words, static_cast<std::uint32_t>(most));
		asked.map = text(map);
		return ask(asked, std::move(on_answer));
	}

	// Runs at most `max` waiting callbacks on this thread (0: 65536), and the logger; gives how many ran.
	// Never waits for disk or network.
	std::size_t processSyncQueue(std::size_t max = 0) {
		std::size_t events = 0;
		p2p_sync_process(agent_, max, &P2PDataSync::onEvent, this, &events);
		return events;
	}

	// How the agent is, a JSON object; empty when it does not run.
	std::string getStatus() const {
		return read([this](char* buffer, std::size_t capacity, std::size_t* size) {
			return p2p_sync_get_status_json(agent_, buffer, capacity, size);
		});
	}

	// The same as numbers; zeroes when it does not run.
	p2p_sync_status getStatusNumbers() const {
		p2p_sync_status status{};
		status.struct_size = sizeof(status);
		p2p_sync_get_status(agent_, &status);
		return status;
	}

	// Who holds a map and who stands by for it; an empty one: all maps that this host holds, stands by for, or may be given.
	// Never waits, nor do the next three: the answer, JSON, is in the result's `data`. See P2P_SYNC_ASK_MAPS.
	std::string listMaps(const std::string& map = std::string(), ResultCallback on_answer = nullptr) {
		return askOfMap(P2P_SYNC_ASK_MAPS, map, std::string(), std::move(on_answer));
	}

	// Asks for a map that nobody holds; LEASE_GRANTED says when it is this host's.
	std::string assignMap(const std::string& map, ResultCallback on_answer = nullptr) {
		return askOfMap(P2P_SYNC_ASK_ASSIGN_MAP, map, std::string(), std::move(on_answer));
	}

	// Has a map of this host's handed over while it goes on, to a host by its id or to the best there is; LEASE_HANDING_OVER
	// says when to end it.
	std::string migrateMap(const std::string& map, const std::string& to_host = std::string(),
		ResultCallback on_answer = nullptr) {
		return askOfMap(P2P_SYNC_ASK_MIGRATE_MAP, map, to_host, std::move(on_answer));
	}

	// Has a map no more: to be called when all that ends it was sent. It is released when that is settled, as far as there is
	// time, and `on_released` is run. mayWrite() is false from this call on.
	std::string releaseMap(const std::string& map, ResultCallback on_released = nullptr) {
		return askOfMap(P2P_SYNC_ASK_RELEASE_MAP, map, std::string(), std::move(on_released));
	}

	// Whether this host may write a map; never waits.
	bool mayWrite(const std::string& map) const {
		const LeaseState lease = leaseState(map);
		return lease == LeaseState::NOT_GOVERNED || lease == LeaseState::HELD || lease == LeaseState::EXPIRING;
	}

	LeaseState leaseState(const std::string& map) const {
		std::int32_t lease = P2P_SYNC_LEASE_NONE;
		p2p_sync_get_lease(agent_, text(map), &lease);
		return static_cast<LeaseState>(lease);
	}

	// A character came onto a map, or left it; never waits. Each is told, in order, and by the critical lane.
	std::string enterMap(std::uint32_t account_id, std::uint64_t char_id, const std::string& map) {
		return presence("enter", account_id, char_id, map);
	}

	std::string leaveMap(std::uint32_t account_id, std::uint64_t char_id, const std::string& map) {
		return presence("leave", account_id, char_id, map);
	}

	// Follows a map (or "@player", "@host"): a snapshot, then each change, told to `on_update` by processSyncQueue().
	// Gives the subscription, 0 where it was refused.
	std::uint64_t subscribe(const std::string& stream, UpdateCallback on_update,
		const std::vector<SyncDataType>& types = {}, const std::string& path_prefix = std::string()) {
		std::vector<std::int32_t> numbers;
		for (const SyncDataType type : types) {
			numbers.push_back(static_cast<std::int32_t>(type));
		}
		p2p_sync_subscription request{};
		request.struct_size = sizeof(request);
		request.stream = text(stream);
		request.path_prefix = text(path_prefix);
		request.types = numbers.data();
		request.types_count = numbers.size();
		std::uint64_t subscription = 0;
		// Held from before the first update can be told until its callback is known.
		const std::lock_guard<std::mutex> lock(callbacks_mutex_);
		if (p2p_sync_subscribe(agent_, &request, &subscription) != P2P_SYNC_OK) {
			return 0;
		}
		on_update_[subscription] = std::move(on_update);
		return subscription;
	}

	bool unsubscribe(std::uint64_t subscription) {
		const std::lock_guard<std::mutex> lock(callbacks_mutex_);
		on_update_.erase(subscription);
		return p2p_sync_unsubscribe(agent_, subscription) == P2P_SYNC_OK;
	}

	// Waits until everything taken is settled; gives whether it is. Without waiting: it is when pending_operations and
	// outbox_operations of getStatusNumbers() are 0 at two looks half a second apart.
	bool flush(std::uint32_t timeout_ms) {
		std::uint8_t drained = 0;
		return p2p_sync_flush(agent_, timeout_ms, &drained) == P2P_SYNC_OK && drained != 0;
	}

	// A text of the server's code page as a JSON string, quotes included. Takes any bytes: what does not decode is
	// escaped.
	std::string jsonString(std::string_view text) const {
		return read([&](char* buffer, std::size_t capacity, std::size_t* size) {
			return p2p_sync_json_string(agent_, {text.data(), text.size()}, buffer, capacity, size);
		});
	}

	// Why the last call on this thread was refused.
	static SyncError lastError() {
		SyncError error;
		std::size_t size = 0;
		error.code = p2p_sync_last_error(nullptr, 0, &size);
		error.message.resize(size + 1);
		p2p_sync_last_error(&error.message[0], error.message.size(), nullptr);
		error.message.resize(size);
		return error;
	}

private:
	static p2p_sync_text text(std::string_view given) { return {given.data(), given.size()}; }

	// The usual form of a UUID.
	static std::string text(const p2p_sync_id& id) {
		static const char digits[] = "0123456789abcdef";
		std::string told(36, '-');
		std::size_t at = 0;
		for (std::size_t i = 0; i < 16; ++i) {
			at += i == 4 || i == 6 || i == 8 || i == 10;
			told[at++] = digits[id.bytes[i] >> 4];
			told[at++] = digits[id.bytes[i] & 15];
		}
		return told;
	}

	static bool parse(const std::string& told, p2p_sync_id& id) {
		const auto value = [](char digit) {
			return digit >= '0' && digit <= '9' ? digit - '0' : digit >= 'a' && digit <= 'f' ? digit - 'a' + 10 : -1;
		};
		if (told.size() != 36) {
			return false;
		}
		std::size_t at = 0;
		for (std::size_t i = 0; i < 16; ++i) {
			at += i == 4 || i == 6 || i == 8 || i == 10;
			const int high = value(told[at++]), low = value(told[at++]);
			if (high < 0 || low < 0) {
				return false;
			}
			id.bytes[i] = static_cast<std::uint8_t>(high << 4 | low);
		}
		return true;
	}

	static p2p_sync_operation operation(SyncDataType type, std::uint32_t account_id, std::string_view map,
		std::string_view json, std::uint32_t flags) {
		p2p_sync_operation told{};
		told.struct_size = sizeof(told);
		told.data_type = static_cast<std::int32_t>(type);
		told.account_id = account_id;
		told.map = text(map);
		told.payload = text(json);
		told.flags = flags;
		return told;
	}

	static p2p_sync_operation operation(const SyncOperation& given) {
		p2p_sync_operation told = operation(given.type, given.account_id, given.map, given.json,
			(given.remove ? P2P_SYNC_DELETE : 0u) | (given.is_priority ? P2P_SYNC_CRITICAL : 0u));
		told.entity = text(given.entity);
		told.char_id = given.char_id;
		return told;
	}

	static p2p_sync_question question(std::int32_t kind, std::string_view told, std::uint32_t limit) {
		p2p_sync_question question{};
		question.struct_size = sizeof(question);
		question.kind = kind;
		question.text = text(told);
		question.limit = limit;
		return question;
	}

	static p2p_sync_question question(SyncDataType type, std::uint32_t account_id, std::string_view map,
		std::string_view request_json) {
		p2p_sync_question asked = question(P2P_SYNC_ASK_STATE, request_json, 0);
		asked.data_type = static_cast<std::int32_t>(type);
		asked.account_id = account_id;
		asked.map = text(map);
		return asked;
	}

	std::string submit(const p2p_sync_operation& told) {
		p2p_sync_id id;
		return p2p_sync_submit(agent_, &told, &id) == P2P_SYNC_OK ? text(id) : std::string();
	}

	std::string ask(p2p_sync_question asked, ResultCallback on_answer) {
		return notifying(std::move(on_answer), [&](std::uint32_t notify, p2p_sync_id* id) {
			asked.flags = notify;
			return p2p_sync_ask(agent_, &asked, id);
		});
	}

	std::string askOfMap(std::int32_t kind, const std::string& map, const std::string& told, ResultCallback on_answer) {
		p2p_sync_question asked = question(kind, told, 0);
		asked.map = text(map);
		return ask(asked, std::move(on_answer));
	}

	// Makes a call whose settlement is told to a callback, if there is one.
	template <typename Call>
	std::string notifying(ResultCallback callback, Call call) {
		p2p_sync_id id;
		if (!callback) {
			return call(0u, &id) == P2P_SYNC_OK ? text(id) : std::string();
		}
		// Held from before the event can be told until its callback is known.
		const std::lock_guard<std::mutex> lock(callbacks_mutex_);
		if (call(P2P_SYNC_NOTIFY, &id) != P2P_SYNC_OK) {
			return std::string();
		}
		std::string told = text(id);
		on_settled_[told] = std::move(callback);
		return told;
	}

	std::string presence(const char* event, std::uint32_t account_id, std::uint64_t char_id, const std::string& map) {
		const std::string json =
			"{\"event\":\"" + std::string(event) + "\",\"char_id\":" + std::to_string(char_id) + "}";
		return submit(operation(SyncDataType::PLAYER_PRESENCE, account_id, map, json, P2P_SYNC_CRITICAL));
	}

	SyncResult waitForAnswer(const std::string& question_id) {
		return resultOf(question_id, [this](const p2p_sync_id& id, p2p_sync_result& result) {
			return p2p_sync_wait_for_answer(agent_, &id, &result);
		});
	}

	static p2p_sync_result emptyResult() {
		p2p_sync_result result{};
		result.struct_size = sizeof(result);
		return result;
	}

	template <typename Ask>
	SyncResult resultOf(const std::string& operation_id, Ask ask_result) {
		SyncResult told;
		told.operation_id = operation_id;
		p2p_sync_id id;
		p2p_sync_result result = emptyResult();
		if (!parse(operation_id, id)) {
			told.code = P2P_SYNC_ERR_BAD_ARGUMENT;
			told.error_message = "this is not the id of an operation: the call that gave it was refused";
			return told;
		}
		told.code = ask_result(id, result);
		if (told.code != P2P_SYNC_OK) {
			told.error_message = lastError().message;
			return told;
		}
		told.state = static_cast<SyncState>(result.state);
		told.success = told.state == SyncState::APPLIED || told.state == SyncState::SUPERSEDED;
		told.code = result.code;
		told.error_message = told.state == SyncState::ACCEPTED || told.state == SyncState::SPOOLED ? "pending"
			: told.state == SyncState::NOT_KEPT ? "its result is no longer kept, or it never was"
			: result.message;
		told.timestamp = std::chrono::system_clock::time_point(
			std::chrono::duration_cast<std::chrono::system_clock::duration>(std::chrono::milliseconds(result.at_ms)));
		if (result.data_size > 0) {
			told.data = read([&](char* buffer, std::size_t capacity, std::size_t* size) {
				return p2p_sync_get_data(agent_, &id, buffer, capacity, size);
			}, result.data_size);
		}
		return told;
	}

	// Reads a text of unknown size; empty where the call is refused.
	template <typename Read>
	static std::string read(Read read_into, std::size_t expected = 255) {
		std::string told;
		for (std::size_t size = expected; told.size() <= size;) {
			told.resize(size + 1);
			const p2p_sync_code code = read_into(&told[0], told.size(), &size);
			if (code == P2P_SYNC_OK) {
				told.resize(size);
				return told;
			}
			if (code != P2P_SYNC_ERR_BUFFER_TOO_SMALL) {
				break;
			}
		}
		return std::string();
	}

	// The elements of a JSON array of objects, each as it is written.
	static std::vector<std::string> elements(const std::string& json) {
		std::vector<std::string> found;
		std::size_t depth = 0, begin = 0;
		bool in_string = false;
		for (std::size_t at = 0; at < json.size(); ++at) {
			const char c = json[at];
			if (in_string) {
				at += c == '\\';
				in_string = c != '"';
			} else if (c == '"') {
				in_string = true;
			} else if (c == '{' || c == '[') {
				if (++depth == 2) {
					begin = at;
				}
			} else if ((c == '}' || c == ']') && depth-- == 2) {
				found.push_back(json.substr(begin, at + 1 - begin));
			}
		}
		return found;
	}

	// Nothing may unwind into the library: what a callback throws is logged and goes no further.
	static void onLog(void* context, std::int32_t level, const char* message) noexcept {
		try {
			static_cast<P2PDataSync*>(context)->logger_(level, message);
		} catch (...) {
		}
	}

	static void onEvent(void* context, const p2p_sync_event* event) noexcept {
		P2PDataSync& self = *static_cast<P2PDataSync*>(context);
		try {
			self.tell(*event);
		} catch (...) {
			onLog(context, P2P_SYNC_LEVEL_ERROR, "a callback of p2p_sync threw an exception");
		}
	}

	void tell(const p2p_sync_event& event) {
		const std::string data(event.data.data == nullptr ? "" : event.data.data, event.data.size);
		if (event.kind == P2P_SYNC_EVENT_SETTLED) {
			const std::string id = text(event.id);
			ResultCallback callback;
			{
				const std::lock_guard<std::mutex> lock(callbacks_mutex_);
				const auto found = on_settled_.find(id);
				if (found == on_settled_.end()) {
					return;
				}
				callback = std::move(found->second);
				on_settled_.erase(found);
			}
			SyncResult result;
			result.operation_id = id;
			result.state = static_cast<SyncState>(event.state);
			result.success = result.state == SyncState::APPLIED || result.state == SyncState::SUPERSEDED;
			result.code = event.code;
			result.timestamp = std::chrono::system_clock::now();
			(event.code == P2P_SYNC_OK ? result.data : result.error_message) = data;
			callback(result);
		} else if (event.kind == P2P_SYNC_EVENT_UPDATE) {
			UpdateCallback callback;
			{
				const std::lock_guard<std::mutex> lock(callbacks_mutex_);
				const auto found = on_update_.find(event.subscription);
				if (found == on_update_.end()) {
					return;
				}
				callback = found->second;
			}
			SyncUpdate update;
			update.subscription = event.subscription;
			update.path.assign(event.path.data, event.path.size);
			update.payload = data;
			update.deleted = (event.flags & P2P_SYNC_UPDATE_DELETED) != 0;
			update.snapshot = (event.flags & P2P_SYNC_UPDATE_SNAPSHOT) != 0;
			update.account_id = event.account_id;
			update.stream_sequence = event.stream_sequence;
			update.version = {event.version[0], event.version[1], event.version[2]};
			callback(update);
		} else if (on_event_) {
			SyncEvent told{static_cast<SyncEventKind>(event.kind), std::string(), event.code, data};
			told.map.assign(event.path.data == nullptr ? "" : event.path.data, event.path.size);
			const auto is_set = [](std::uint8_t byte) { return byte != 0; };
			if (told.kind == SyncEventKind::LEASE_HANDING_OVER
				&& std::any_of(std::begin(event.id.bytes), std::end(event.id.bytes), is_set)) {
				told.message = text(event.id);
			}
			on_event_(told);
		}
	}

	// Held by init() and final(): of two threads that call them at once the second finds what the first has done.
	std::mutex starting_mutex_;
	std::atomic<p2p_sync_agent> agent_{0};
	LogCallback logger_;
	EventCallback on_event_;
	// Callers on other threads add callbacks while this one runs them.
	std::mutex callbacks_mutex_;
	std::unordered_map<std::string, ResultCallback> on_settled_;
	std::unordered_map<std::uint64_t, UpdateCallback> on_update_;
};

} // namespace rathena
