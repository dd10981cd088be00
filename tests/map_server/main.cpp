// A map server in small: one thread that runs timers and then waits for sockets, with the players and monsters of a busy
// server, to see what the library does to its loop.
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sched.h>
#include <sys/resource.h>
#include <thread>

#include "feed.hpp"
#include "game_loop.hpp"
#include "options.hpp"
#include "process_figures.hpp"
#include "report.hpp"
#include "spin.hpp"
#include "timers.hpp"
#include "world.hpp"

namespace {

using namespace sample;
using rathena::P2PDataSync;

// For what had no room, in the end.
constexpr Nanoseconds ROOM_WAIT_MAX = 60 * SECOND;

volatile std::sig_atomic_t asked_to_stop = 0;

// Between two looks at something that comes by itself; not in the game's loop.
void rest() {
	std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// As a map server does: a `select` of more is not possible, and SIGTERM ends the game in order.
void settleAsServer(const Options& options) {
	const rlimit descriptors{1024, 1024};
	setrlimit(RLIMIT_NOFILE, &descriptors);
	struct sigaction action {};
	action.sa_handler = [](int) { asked_to_stop = 1; };
	sigaction(SIGTERM, &action, nullptr);
	std::signal(SIGPIPE, SIG_IGN);
	if (options.core >= 0) {
		cpu_set_t cores;
		CPU_ZERO(&cores);
		CPU_SET(static_cast<std::size_t>(options.core), &cores);
		if (sched_setaffinity(0, sizeof(cores), &cores) != 0) {
			std::fprintf(stderr, "sample_map_server: core %d cannot be had: %s\n", options.core, std::strerror(errno));
			std::exit(1);
		}
	}
}

// The rounds of work for one event that make up the game's share of a core.
std::uint64_t spinOf(const Options& options) {
	if (options.spin != 0) {
		return options.spin;
	}
	return Spin::roundsFor(static_cast<Nanoseconds>(options.share * SECOND / options.events));
}

void init(P2PDataSync& sync, const Options& options) {
	sync.setLogger([](int level, const std::string& message) {
		if (level <= P2P_SYNC_LEVEL_WARNING) {
			std::fprintf(stderr, "[p2p_sync] %s\n", message.c_str());
		}
	});
	if (!sync.init(options.config)) {
		std::fprintf(stderr, "sample_map_server: %s\n", P2PDataSync::lastError().message.c_str());
		std::exit(1);
	}
}

void write(const Options& options, const Report& report) {
	report.print(stdout);
	if (options.json.empty()) {
		return;
	}
	std::FILE* const file = std::fopen(options.json.c_str(), "w");
	if (file == nullptr) {
		std::perror(options.json.c_str());
		std::exit(1);
	}
	report.writeJson(file);
	std::fclose(file);
}

void addStatus(Report& report, const p2p_sync_status& status) {
	report.group("status");
	report.add("link_up", std::uint64_t{status.link_up});
	report.add("pending", status.pending_operations);
	report.add("outbox", status.outbox_operations);
	report.add("incarnation", status.incarnation);
	report.add("taken", status.taken);
	report.add("refused", status.refused);
	report.add("applied", status.applied);
	report.add("superseded", status.superseded);
	report.add("rejected", status.rejected);
	report.add("timeouts", status.timeouts);
	report.add("texts_escaped", status.texts_escaped);
}

// Flushes, tells the figures of the end, and shuts down.
void end(P2PDataSync& sync, const Options& options, Report& report) {
	const Nanoseconds before = monotonic();
	const bool flushed = options.flush_ms > 0 && sync.flush(options.flush_ms);
	const Nanoseconds between = monotonic();
	sync.processSyncQueue();
	const p2p_sync_status status = sync.getStatusNumbers();
	const Nanoseconds final_began = monotonic();
	sync.final();
	const Nanoseconds after = monotonic();
	addStatus(report, status);
	report.group("end");
	report.add("flushed", std::uint64_t{flushed});
	report.add("flush_ms", static_cast<double>((between - before) / MILLISECOND));
	report.add("final_ms", static_cast<double>((after - final_began) / MILLISECOND));
	report.add("descriptors_left", std::uint64_t{processFigures().descriptors});
	report.add("threads_left", std::uint64_t{processFigures().threads});
}

void writeLedger(const Options& options, const World& world, const Feed& feed) {
	if (options.ledger.empty()) {
		return;
	}
	std::FILE* const file = std::fopen(options.ledger.c_str(), "w");
	if (file == nullptr) {
		std::perror(options.ledger.c_str());
		std::exit(1);
	}
	for (std::size_t type = 0; type < DATA_TYPES; ++type) {
		std::fprintf(file, "taken %zu %llu\n", type, static_cast<unsigned long long>(feed.taken(type)));
	}
	world.writePaths(file);
	std::fclose(file);
}

// What the measured part of a run used of the machine.
struct Usage {
	Nanoseconds wall, loop, process;
	rusage thread;

	static Usage now() {
		Usage usage{monotonic(), readClock(CLOCK_THREAD_CPUTIME_ID), readClock(CLOCK_PROCESS_CPUTIME_ID), {}};
		getrusage(RUSAGE_THREAD, &usage.thread);
		return usage;
	}
};

void addFigures(Report& report, const Timers& timers, const GameLoop& loop, const Feed& feed) {
	report.group("lateness");
	report.add("all", timers.latenessOfAll());
	for (std::size_t kind = 0; kind < TIMER_KINDS; ++kind) {
		report.add(timerName(static_cast<TimerKind>(kind)), timers.lateness(static_cast<TimerKind>(kind)));
	}
	report.group("loop");
	report.add("turn", loop.turnTime());
	report.add("oversleep", loop.oversleep());
	report.group("cost");
	report.add("empty_call", feed.empty_cost);
	report.add("enqueue", feed.enqueue_cost);
	report.add("enqueue_bulk", feed.bulk_cost);
	report.add("enqueue_critical", feed.critical_cost);
	report.add("process_queue", feed.drain_cost);
	report.add("waiting_call", feed.waiting_call);
}

void addUsage(Report& report, const Usage& from, const Usage& to, const GameClock& clock) {
	const double wall = static_cast<double>(to.wall - from.wall);
	report.group("usage");
	report.add("seconds", wall / SECOND);
	report.add("loop_core_share", static_cast<double>(to.loop - from.loop) / wall);
	report.add("agent_core_share", static_cast<double>(to.process - from.process - (to.loop - from.loop)) / wall);
	report.add("stood_still_ms", static_cast<double>(clock.stoodStill() / MILLISECOND));
	report.add("switches_given", static_cast<std::uint64_t>(to.thread.ru_nvcsw - from.thread.ru_nvcsw));
	report.add("switches_taken", static_cast<std::uint64_t>(to.thread.ru_nivcsw - from.thread.ru_nivcsw));
}

void addEvents(Report& report, const Feed& feed, std::uint64_t link_changes) {
	report.group("events");
	report.add("made", feed.events);
	report.add("taken", feed.taken());
	std::uint64_t refused = 0;
	for (const auto& [code, times] : feed.refused) {
		refused += times;
		report.add("refused_" + std::to_string(code), times);
	}
	report.add("refused", refused);
	report.add("queue_full", feed.queue_full);
	report.add("waiting_for_room", std::uint64_t{feed.waitingForRoom()});
	report.add("waiting_for_room_max", std::uint64_t{feed.waiting_for_room_max});
	report.add("callbacks", feed.callbacks);
	report.add("waited_applied", feed.waited_applied);
	report.add("waited_unknown", feed.waited_unknown);
	report.add("waited_other", feed.waited_other);
	report.add("link_changes", link_changes);
}

int runGame(const Options& options) {
	GameClock clock;
	Timers timers(clock);
	GameLoop loop(clock, timers, options.packets);
	P2PDataSync& sync = P2PDataSync::getInstance();
	Feed feed(options.without ? nullptr : &sync, clock);
	const Spin spin(spinOf(options));
	World world(options, feed, timers, spin);
	std::uint64_t link_changes = 0;
	sync.setEventHandler([&link_changes](const rathena::SyncEvent&) { ++link_changes; });

	Report report;
	const ProcessFigures before_init = processFigures();
	const Nanoseconds init_began = monotonic();
	if (!options.without) {
		init(sync, options);
	}
	const Nanoseconds init_took = monotonic() - init_began;

	const Nanoseconds began = clock.now();
	world.start(began);
	const auto run_until = [&](double seconds) {
		const Nanoseconds until = began + static_cast<Nanoseconds>(seconds * SECOND);
		while (!asked_to_stop && clock.now() < until) {
			loop.turn([&world](const Timer& timer) { world.run(timer); });
		}
	};
	run_until(options.warmup);
	report.group("start");
	report.add("lateness", timers.latenessOfAll());
	report.add("queue_full", feed.queue_full);
	report.add("init_ms", static_cast<double>(init_took) / MILLISECOND);
	timers.restartMeasuring();
	loop.restartMeasuring();
	feed.restartMeasuring();
	const std::uint64_t events_before = feed.events;
	const Usage from = Usage::now();
	run_until(options.warmup + options.seconds);
	const Usage to = Usage::now();
	const std::uint64_t measured_events = feed.events - events_before;
	const ProcessFigures steady = processFigures();

	addFigures(report, timers, loop, feed);
	addUsage(report, from, to, clock);
	report.add("events_per_second",
		static_cast<double>(measured_events) * SECOND / static_cast<double>(to.wall - from.wall));
	report.group("process");
	report.add("before_init", before_init);
	report.add("steady", steady);
	if (!options.without) {
		const Nanoseconds until = monotonic() + ROOM_WAIT_MAX;
		while (feed.waitingForRoom() > 0 && monotonic() < until) {
			feed.drain();
			rest();
		}
		end(sync, options, report);
	}
	addEvents(report, feed, link_changes);
	write(options, report);
	writeLedger(options, world, feed);
	return 0;
}

// Delivers what earlier runs left in the outbox.
int drainOutbox(const Options& options) {
	P2PDataSync& sync = P2PDataSync::getInstance();
	init(sync, options);
	Report report;
	end(sync, options, report);
	write(options, report);
	return 0;
}

// Memory and descriptors with so many operations that cannot be sent.
int queue(const Options& options) {
	P2PDataSync& sync = P2PDataSync::getInstance();
	const ProcessFigures before = processFigures();
	init(sync, options);
	const ProcessFigures started = processFigures();
	char json[256];
	for (std::uint32_t number = 0; number < options.queued && !asked_to_stop;) {
		std::snprintf(json, sizeof(json),
			R"({"event":"move","char_id":%u,"x":120,"y":67,"dir":5,"hp":20000,"max_hp":20443,"sp":391,"max_sp":391,)"
			R"("base_level":99,"speed":150,"n":%u})",
			150000 + number, number);
		if (!sync.syncToMainServer(rathena::SyncDataType::PLAYER_POSITION, 2000000 + number, "prontera", json).empty()) {
			++number;
		} else if (P2PDataSync::lastError().code == P2P_SYNC_ERR_QUEUE_FULL) {
			rest();
		} else {
			std::fprintf(stderr, "sample_map_server: %s\n", P2PDataSync::lastError().message.c_str());
			return 1;
		}
	}
	while (!asked_to_stop && sync.getStatusNumbers().outbox_operations < options.queued) {
		rest();
	}
	Report report;
	report.group("process");
	report.add("before_init", before);
	report.add("started", started);
	report.add("queued", processFigures());
	addStatus(report, sync.getStatusNumbers());
	sync.final();
	write(options, report);
	return 0;
}

} // namespace

int main(int argc, char** argv) {
	const Options options = parseOptions(argc, argv);
	settleAsServer(options);
	if (options.calibrate) {
		std::printf("%llu\n", static_cast<unsigned long long>(spinOf(options)));
		return 0;
	}
	if (options.drain) {
		return drainOutbox(options);
	}
	return options.queued > 0 ? queue(options) : runGame(options);
}
