// A map server on strings: does what each line on its input says, over the C++ header, and answers each with one line.
// Tests feed it, kill it and start it again.
//
// A line has fields parted by tabs, in whatever bytes the server's code page has; the first says what to do, see
// `COMMANDS`. An answer is a JSON object. Times are measured here, around the call alone.
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <thread>

#include "p2p_data_sync.hpp"

namespace {

using Fields = std::vector<std::string>;
using Clock = std::chrono::steady_clock;

// Written by hand, so that what the library gives is told as it is, whatever it does with texts itself.
class Answer {
public:
	Answer& text(const char* name, const std::string& value) {
		std::string escaped;
		for (const char c : value) {
			const unsigned char byte = static_cast<unsigned char>(c);
			if (c == '"' || c == '\\') {
				escaped += '\\';
				escaped += c;
			} else if (byte < 0x20) {
				char code[7];
				std::snprintf(code, sizeof(code), "\\u%04x", byte);
				escaped += code;
			} else {
				escaped += c;
			}
		}
		return raw(name, '"' + escaped + '"');
	}
	Answer& number(const char* name, std::int64_t value) { return raw(name, std::to_string(value)); }
	Answer& truth(const char* name, bool value) { return raw(name, value ? "true" : "false"); }
	Answer& raw(const char* name, const std::string& json) {
		json_ += json_.empty() ? "{" : ",";
		json_ += '"' + std::string(name) + "\":" + json;
		return *this;
	}
	std::string json() const { return json_.empty() ? "{}" : json_ + "}"; }

private:
	std::string json_;
};

std::string listed(const std::vector<std::string>& jsons) {
	std::string list = "[";
	for (const std::string& json : jsons) {
		list += (list.size() > 1 ? "," : "") + json;
	}
	return list + "]";
}

template <typename Call>
std::int64_t microseconds(Call call) {
	const Clock::time_point begun = Clock::now();
	call();
	return std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - begun).count();
}

class Puppet {
public:
	std::string answer(const Fields& fields);

private:
	struct Command {
		const char* name;
		std::size_t fields_min;
		Answer (Puppet::*run)(const Fields&);
	};
	static const Command COMMANDS[];

	static rathena::SyncDataType type(const std::string& number) {
		return static_cast<rathena::SyncDataType>(std::stoi(number));
	}
	static std::uint32_t u32(const std::string& number) { return static_cast<std::uint32_t>(std::stoul(number)); }
	static std::string optional(const Fields& fields, std::size_t at) {
		return fields.size() > at ? fields[at] : std::string();
	}

	// What a call that gives an id gave.
	static Answer taken(const std::string& id, std::int64_t took_us) {
		Answer told;
		told.text("id", id).number("us", took_us);
		if (id.empty()) {
			const rathena::SyncError error = rathena::P2PDataSync::lastError();
			told.number("code", error.code).text("message", error.message);
		}
		return told;
	}

	static Answer result(const rathena::SyncResult& result) {
		Answer told;
		told.truth("success", result.success).text("message", result.error_message).text("id", result.operation_id);
		told.number("code", result.code).number("state", static_cast<int>(result.state)).text("data", result.data);
		told.number("at_ms", std::chrono::duration_cast<std::chrono::milliseconds>(
			result.timestamp.time_since_epoch()).count());
		return told;
	}

	// Keeps what a callback was told until it is asked for, and on which thread it was.
	rathena::P2PDataSync::ResultCallback noting(const char* kind) {
		return [this, kind](const rathena::SyncResult& settled) {
			note(result(settled).text("kind", kind));
		};
	}
	void note(Answer told) {
		told.truth("on_the_callers_thread", std::this_thread::get_id() == caller_ && is_processing_);
		told_.push_back(told.json());
	}

	Answer init(const Fields& fields) {
		sync_.setLogger([this](int level, const std::string& line) {
			// Logged by `final` and `init` as well: on the caller's thread is all that is asked.
			logged_elsewhere_ |= std::this_thread::get_id() != caller_;
			std::fprintf(stderr, "%d %s\n", level, line.c_str());
		});
		sync_.setEventHandler([this](const rathena::SyncEvent& event) {
			note(Answer().text("kind", "event").number("event", static_cast<int>(event.kind))
				.number("code", event.code).text("map", event.map).text("message", event.message));
		});
		bool ok = false;
		const std::int64_t took = microseconds([&] { ok = sync_.init(fields[1]); });
		Answer told;
		told.truth("ok", ok).number("us", took);
		if (!ok) {
			const rathena::SyncError error = rathena::P2PDataSync::lastError();
			told.number("code", error.code).text("message", error.message);
		}
		return told;
	}

	Answer final(const Fields&) {
		Answer told;
		told.number("us", microseconds([this] { sync_.final(); })).truth("logged_elsewhere", logged_elsewhere_);
		const rathena::SyncError error = rathena::P2PDataSync::lastError();
		return told.number("code", error.code).text("message", error.message);
	}

	Answer put(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.syncToMainServer(type(fields[1]), u32(fields[2]), fields[3], fields[4], optional(fields, 5) == "1");
		});
		return taken(id, took);
	}

	// The payload's `%` become the number of each: the fields as for `put`, behind how many.
	Answer putMany(const Fields& fields) {
		std::vector<std::string> ids, refused;
		std::vector<std::int64_t> took;
		const unsigned long count = std::stoul(fields[1]);
		for (unsigned long number = 0; number < count; ++number) {
			std::string json;
			for (const char c : fields[5]) {
				json += c == '%' ? std::to_string(number) : std::string(1, c);
			}
			std::string id;
			took.push_back(microseconds([&] {
				id = sync_.syncToMainServer(type(fields[2]), u32(fields[3]), fields[4], json, optional(fields, 6) == "1");
			}));
			if (id.empty()) {
				refused.push_back(std::to_string(rathena::P2PDataSync::lastError().code));
			} else {
				ids.push_back('"' + id + '"');
			}
		}
		std::sort(took.begin(), took.end());
		Answer told;
		told.raw("ids", listed(ids)).raw("refused", listed(refused));
		if (!took.empty()) {
			told.number("median_us", took[took.size() / 2]).number("p999_us", took[took.size() * 999 / 1000]);
			told.number("slowest_us", took.back());
		}
		return told;
	}

	Answer critical(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.syncCriticalData(type(fields[1]), u32(fields[2]), fields[3], fields[4]);
		});
		Answer told = taken(id, took);
		return id.empty() ? told : told.number("state", static_cast<int>(sync_.getSyncResult(id).state));
	}

	// An entity; told of when it is settled.
	Answer putNotified(const Fields& fields) {
		rathena::SyncOperation operation;
		operation.type = type(fields[1]);
		operation.account_id = u32(fields[2]);
		operation.map = fields[3];
		operation.entity = fields[4];
		operation.json = fields[5];
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.syncToMainServer(operation, noting("settled")); });
		return taken(id, took);
	}

	Answer criticalAsync(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.syncCriticalDataAsync(type(fields[1]), u32(fields[2]), fields[3], fields[4], noting("settled"));
		});
		return taken(id, took);
	}

	Answer remove(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.removeFromMainServer(type(fields[1]), u32(fields[2]), fields[3], optional(fields, 4));
		});
		return taken(id, took);
	}

	// Four fields for each member.
	Answer group(const Fields& fields) {
		std::vector<rathena::SyncOperation> members;
		for (std::size_t at = 1; at + 3 < fields.size(); at += 4) {
			rathena::SyncOperation member;
			member.type = type(fields[at]);
			member.account_id = u32(fields[at + 1]);
			member.map = fields[at + 2];
			member.json = fields[at + 3];
			members.push_back(member);
		}
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.syncGroup(members, noting("settled")); });
		return taken(id, took);
	}

	Answer get(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.syncFromMainServer(type(fields[1]), u32(fields[2]), fields[3], optional(fields, 4));
		});
		return taken(id, took);
	}

	Answer getNotified(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] {
			id = sync_.syncFromMainServerAsync(type(fields[1]), u32(fields[2]), fields[3], optional(fields, 4), noting("answer"));
		});
		return taken(id, took);
	}

	Answer resultNow(const Fields& fields) { return result(sync_.getSyncResult(fields[1])); }

	Answer wait(const Fields& fields) {
		rathena::SyncResult settled;
		const std::int64_t took = microseconds([&] { settled = sync_.waitForSyncResult(fields[1], u32(fields[2])); });
		return result(settled).number("us", took);
	}

	// How many of the fields behind the command are in each state, by its number.
	Answer states(const Fields& fields) {
		std::array<unsigned long, 9> counts{};
		for (std::size_t at = 1; at < fields.size(); ++at) {
			++counts[static_cast<std::size_t>(sync_.getSyncResult(fields[at]).state)];
		}
		std::vector<std::string> told;
		for (const unsigned long count : counts) {
			told.push_back(std::to_string(count));
		}
		return Answer().raw("states", listed(told));
	}

	Answer cacheSet(const Fields& fields) {
		bool ok = false;
		const std::int64_t took = microseconds([&] { ok = sync_.cacheData(fields[1], fields[2], u32(fields[3])); });
		return Answer().truth("ok", ok).number("us", took);
	}
	Answer cacheGet(const Fields& fields) {
		std::string value;
		const std::int64_t took = microseconds([&] { value = sync_.getCachedData(fields[1]); });
		return Answer().text("value", value).number("us", took);
	}
	Answer cacheAsk(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.getCachedDataAsync(fields[1], noting("answer")); });
		return taken(id, took);
	}
	Answer cacheDelete(const Fields& fields) { return Answer().truth("ok", sync_.deleteCachedData(fields[1])); }
	Answer cacheExists(const Fields& fields) { return Answer().truth("exists", sync_.exists(fields[1])); }
	Answer existsAsk(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.existsAsync(fields[1], noting("answer")); });
		return taken(id, took);
	}
	Answer embedding(const Fields& fields) {
		std::string told;
		const std::int64_t took = microseconds([&] { told = sync_.createEmbedding(fields[1]); });
		return Answer().text("embedding", told).number("us", took);
	}
	Answer similar(const Fields& fields) {
		std::size_t found = 0;
		const std::int64_t took = microseconds([&] { found = sync_.searchSimilarEmbeddings(fields[1]).size(); });
		return Answer().number("found", static_cast<std::int64_t>(found)).number("us", took);
	}
	Answer similarText(const Fields& fields) {
		const std::vector<std::string> hits = sync_.searchSimilarTexts(fields[1], 5, fields[2]);
		return Answer().number("found", static_cast<std::int64_t>(hits.size()))
			.text("first", hits.empty() ? std::string() : hits.front());
	}
	Answer publish(const Fields& fields) { return Answer().truth("ok", sync_.publish(fields[1], fields[2])); }

	Answer subscribe(const Fields& fields) {
		const std::uint64_t subscription = sync_.subscribe(fields[1], [this](const rathena::SyncUpdate& update) {
			note(Answer().text("kind", "update").number("subscription", static_cast<std::int64_t>(update.subscription))
				.text("path", update.path).text("payload", update.payload).truth("deleted", update.deleted)
				.truth("snapshot", update.snapshot).number("account_id", update.account_id)
				.number("stream_sequence", static_cast<std::int64_t>(update.stream_sequence)));
		});
		return Answer().number("subscription", static_cast<std::int64_t>(subscription));
	}
	Answer unsubscribe(const Fields& fields) { return Answer().truth("ok", sync_.unsubscribe(std::stoull(fields[1]))); }

	Answer process(const Fields& fields) {
		std::size_t ran = 0;
		is_processing_ = true;
		const std::int64_t took = microseconds([&] { ran = sync_.processSyncQueue(std::stoul(fields[1])); });
		is_processing_ = false;
		Answer told;
		told.number("ran", static_cast<std::int64_t>(ran)).raw("told", listed(told_)).number("us", took);
		told_.clear();
		return told;
	}

	Answer jsonString(const Fields& fields) { return Answer().text("json", sync_.jsonString(fields[1])); }
	Answer status(const Fields&) { return Answer().raw("status", sync_.getStatus()); }
	Answer numbers(const Fields&) {
		const p2p_sync_status is = sync_.getStatusNumbers();
		Answer told;
		told.truth("link_up", is.link_up != 0).truth("outbox_full", is.outbox_full != 0);
		told.number("pending_operations", static_cast<std::int64_t>(is.pending_operations));
		told.number("outbox_operations", static_cast<std::int64_t>(is.outbox_operations));
		told.number("taken", static_cast<std::int64_t>(is.taken)).number("refused", static_cast<std::int64_t>(is.refused));
		told.number("applied", static_cast<std::int64_t>(is.applied));
		told.number("timeouts", static_cast<std::int64_t>(is.timeouts));
		told.number("limbo", static_cast<std::int64_t>(is.limbo));
		told.number("texts_escaped", static_cast<std::int64_t>(is.texts_escaped));
		return told;
	}
	Answer flush(const Fields& fields) { return Answer().truth("drained", sync_.flush(u32(fields[1]))); }
	Answer listMaps(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.listMaps(optional(fields, 1)); });
		return taken(id, took);
	}

	Answer assignMap(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.assignMap(fields[1], noting("assigned")); });
		return taken(id, took);
	}

	Answer migrateMap(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.migrateMap(fields[1], fields[2]); });
		return taken(id, took);
	}

	Answer releaseMap(const Fields& fields) {
		std::string id;
		const std::int64_t took = microseconds([&] { id = sync_.releaseMap(fields[1], noting("released")); });
		return taken(id, took);
	}

	Answer mayWrite(const Fields& fields) { return Answer().truth("may", sync_.mayWrite(fields[1])); }
	Answer enter(const Fields& fields) {
		return taken(sync_.enterMap(u32(fields[1]), std::stoull(fields[2]), fields[3]), 0);
	}
	Answer leave(const Fields& fields) {
		return taken(sync_.leaveMap(u32(fields[1]), std::stoull(fields[2]), fields[3]), 0);
	}

	rathena::P2PDataSync& sync_ = rathena::P2PDataSync::getInstance();
	const std::thread::id caller_ = std::this_thread::get_id();
	bool is_processing_ = false;
	bool logged_elsewhere_ = false;
	std::vector<std::string> told_;
};

const Puppet::Command Puppet::COMMANDS[] = {
	{"init", 1, &Puppet::init},
	{"final", 0, &Puppet::final},
	{"put", 4, &Puppet::put},
	{"put_many", 5, &Puppet::putMany},
	{"put_notified", 5, &Puppet::putNotified},
	{"critical", 4, &Puppet::critical},
	{"critical_async", 4, &Puppet::criticalAsync},
	{"remove", 3, &Puppet::remove},
	{"group", 4, &Puppet::group},
	{"get", 3, &Puppet::get},
	{"get_notified", 3, &Puppet::getNotified},
	{"result", 1, &Puppet::resultNow},
	{"wait", 2, &Puppet::wait},
	{"states", 0, &Puppet::states},
	{"cache_set", 3, &Puppet::cacheSet},
	{"cache_get", 1, &Puppet::cacheGet},
	{"cache_ask", 1, &Puppet::cacheAsk},
	{"cache_delete", 1, &Puppet::cacheDelete},
	{"cache_exists", 1, &Puppet::cacheExists},
	{"exists_ask", 1, &Puppet::existsAsk},
	{"embedding", 1, &Puppet::embedding},
	{"similar", 1, &Puppet::similar},
	{"similar_text", 2, &Puppet::similarText},
	{"publish", 2, &Puppet::publish},
	{"subscribe", 1, &Puppet::subscribe},
	{"unsubscribe", 1, &Puppet::unsubscribe},
	{"process", 1, &Puppet::process},
	{"json_string", 1, &Puppet::jsonString},
	{"status", 0, &Puppet::status},
	{"numbers", 0, &Puppet::numbers},
	{"flush", 1, &Puppet::flush},
	{"may_write", 1, &Puppet::mayWrite},
	{"list_maps", 0, &Puppet::listMaps},
	{"assign_map", 1, &Puppet::assignMap},
	{"migrate_map", 2, &Puppet::migrateMap},
	{"release_map", 1, &Puppet::releaseMap},
	{"enter", 3, &Puppet::enter},
	{"leave", 3, &Puppet::leave},
};

std::string Puppet::answer(const Fields& fields) {
	for (const Command& command : COMMANDS) {
		if (fields[0] == command.name) {
			const bool enough = fields.size() > command.fields_min;
			return enough ? (this->*command.run)(fields).json() : Answer().text("error", "too few fields").json();
		}
	}
	return Answer().text("error", "unknown command").json();
}

Fields fieldsOf(const std::string& line) {
	Fields fields(1);
	for (const char c : line) {
		if (c == '\t') {
			fields.emplace_back();
		} else {
			fields.back() += c;
		}
	}
	return fields;
}

} // namespace

int main() {
	Puppet puppet;
	std::string line;
	while (std::getline(std::cin, line)) {
		std::cout << puppet.answer(fieldsOf(line)) << std::endl;
	}
	return 0;
}
