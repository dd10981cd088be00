// Starts and ends, and what they leave behind: no thread, no descriptor, no memory.
#include "stress.hpp"

#include <dirent.h>
#include <malloc.h>
#include <unistd.h>

#include <thread>

namespace {

// After these nothing is made for the first time any more.
constexpr unsigned long WARM_UP = 50;
// For a first late need of the C library. A leak of a byte a cycle is found by 10,000 of them.
constexpr std::size_t GIVEN_OUT_SLACK_BYTES = 4096;
// Freed memory that the allocator keeps in the arenas of threads that have ended; it grows for some 1000 cycles.
constexpr std::size_t RESIDENT_SLACK_BYTES = 8 * 1024 * 1024;

std::size_t entriesOf(const char* folder) {
	DIR* opened = opendir(folder);
	HOLDS(opened != nullptr, "%s cannot be read", folder);
	std::size_t entries = 0;
	while (const dirent* entry = readdir(opened)) {
		entries += entry->d_name[0] != '.';
	}
	closedir(opened);
	return entries;
}

struct Held {
	std::size_t threads, descriptors, given_out_bytes, resident_bytes;

	static Held now() {
		std::size_t whole = 0, resident = 0;
		std::ifstream("/proc/self/statm") >> whole >> resident;
		// Of large blocks, which are mapped alone, as well.
		const struct mallinfo2 given_out = mallinfo2();
		return {entriesOf("/proc/self/task"), entriesOf("/proc/self/fd"), given_out.uordblks + given_out.hblkhd,
			resident * static_cast<std::size_t>(sysconf(_SC_PAGESIZE))};
	}
};

// A short life, with some of each: operations, events, log lines, refusals.
void live(const std::string& config) {
	rathena::P2PDataSync sync;
	std::size_t lines = 0;
	sync.setLogger([&lines](int, const std::string& message) { lines += !message.empty(); });
	HOLDS(sync.init(config), "%s", rathena::P2PDataSync::lastError().message.c_str());
	// One path kept as `latest`: the outbox does not grow.
	const std::string id = sync.syncToMainServer(rathena::SyncDataType::ITEM_DROP, 0, "prontera",
		"{\"drop_id\":1,\"amount\":3}");
	HOLDS(!id.empty(), "%s", rathena::P2PDataSync::lastError().message.c_str());
	HOLDS(sync.syncToMainServer(rathena::SyncDataType::ITEM_DROP, 0, "prontera", "no JSON").empty(), "it is none");
	HOLDS(sync.getSyncResult(id).state != rathena::SyncState::NOT_KEPT, "it was just taken");
	sync.processSyncQueue();
	HOLDS(!sync.getStatus().empty() && sync.jsonString("x") == "\"x\"", "it runs");
	sync.final();
	HOLDS(sync.getStatus().empty(), "it has ended");
}

// Server code on two threads that both think they are first.
void liveTwice(const std::string& config) {
	rathena::P2PDataSync sync;
	std::atomic<unsigned> ready{0}, started{0};
	const auto start = [&] {
		++ready;
		while (ready < 2) {
		}
		started += sync.init(config);
		sync.final();
	};
	std::thread first(start), second(start);
	first.join();
	second.join();
	HOLDS(started == 2, "one of two threads that started it was refused: %s",
		rathena::P2PDataSync::lastError().message.c_str());
	HOLDS(sync.getStatus().empty(), "it has ended");
}

// A thread that was joined may still be listed for a moment.
Held settledTo(const Held& before) {
	Held after = Held::now();
	for (int look = 0; look < 30'000 && after.threads > before.threads; ++look) {
		std::this_thread::sleep_for(std::chrono::milliseconds(1));
		after = Held::now();
	}
	return after;
}

} // namespace

void startAndEnd(const std::string& config, unsigned long cycles, bool counts_bytes) {
	// One, and what a sanitizer runs beside it from the first start of a thread on.
	std::thread([] {}).join();
	const Held own = Held::now();
	for (unsigned long cycle = 0; cycle < WARM_UP; ++cycle) {
		live(config);
		liveTwice(config);
	}
	const Held before = settledTo(own);
	HOLDS(before.threads <= own.threads, "%zu threads run after an end", before.threads);
	for (unsigned long cycle = 0; cycle < cycles; ++cycle) {
		live(config);
	}
	const Held after = settledTo(before);
	std::printf("%lu starts and ends: %zu threads before, %zu after; descriptors %zu, %zu; bytes given out %zu, %zu; "
				"resident %zu, %zu\n",
		cycles, before.threads, after.threads, before.descriptors, after.descriptors, before.given_out_bytes,
		after.given_out_bytes, before.resident_bytes, after.resident_bytes);
	HOLDS(after.threads == before.threads, "threads are left");
	HOLDS(after.descriptors == before.descriptors, "descriptors are left");
	if (counts_bytes) {
		HOLDS(after.given_out_bytes <= before.given_out_bytes + GIVEN_OUT_SLACK_BYTES, "memory is left");
		HOLDS(after.resident_bytes <= before.resident_bytes + RESIDENT_SLACK_BYTES, "the process grows");
	}
}
