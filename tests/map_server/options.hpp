// What the sample is asked to do.
#pragma once

#include <cstdint>
#include <string>

namespace sample {

struct Options {
	// The library's configuration.
	std::string config;
	// Where the figures go as JSON, and what the hub should hold in the end; empty: nowhere.
	std::string json;
	std::string ledger;
	// Measured time, after `warmup` seconds in which the server starts.
	double seconds = 60;
	double warmup = 6;
	// All rates are those of a server with 10,000 events a second, scaled to this.
	double events = 10000;
	std::uint32_t players = 900;
	std::uint32_t monsters = 9000;
	// NPC states at the start, and over how many seconds they come.
	std::uint32_t burst = 20000;
	double burst_seconds = 3;
	// Map changes a second: each makes a waiting call.
	double map_changes = 5;
	// Packets of clients a second, each of which ends the loop's wait; 0: nobody sends.
	double packets = 0;
	// The share of a core that the game's own work takes, and the work of one event in rounds of the spin; 0: measured.
	double share = 0.33;
	std::uint64_t spin = 0;
	// The core to run on; below 0: any.
	int core = -1;
	// How long the flush in the end may take; 0: none, what is not settled stays in the outbox.
	std::uint32_t flush_ms = 60000;
	// The same events without any call of the library.
	bool without = false;
	// Instead of a run: the spin of one event, the delivery of an outbox, or the memory with so many operations queued.
	bool calibrate = false;
	bool drain = false;
	std::uint32_t queued = 0;
};

// Ends the program with a sentence where the arguments are wrong.
Options parseOptions(int argc, char** argv);

} // namespace sample
