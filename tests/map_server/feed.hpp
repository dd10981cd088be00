// The calls into the library: what each costs, and what of it was taken.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <string>

#include "common/p2p_data_sync.hpp"
#include "game_clock.hpp"
#include "histogram.hpp"

namespace sample {

constexpr std::size_t DATA_TYPES = 13;

enum class Call : std::uint8_t { PUT, PUT_AND_HEAR, REMOVE, ENTER_MAP, LEAVE_MAP };

// What the hub should hold of a path in the end: the serial of the last event of it that was taken.
struct LastTaken {
	std::uint32_t serial = 0;
	bool removed = false;
};

// An event as the game has it at hand; all but `call` and `type` may be of no meaning to a call.
struct GameEvent {
	Call call = Call::PUT;
	rathena::SyncDataType type = rathena::SyncDataType::MAP_STATE;
	std::uint32_t account_id = 0;
	const std::string* map = nullptr;
	const std::string* json = nullptr;
	std::uint64_t char_id = 0;
	std::uint64_t entity = 0;
	std::uint32_t serial = 0;
	// Of its path; null where each event counts.
	LastTaken* last = nullptr;
};

class Feed {
public:
	// Null: all is done but the calls.
	Feed(rathena::P2PDataSync* sync, GameClock& clock) : sync_(sync), clock_(clock) {}

	// Never waits. What is refused because the queue is full is kept and told again later, in order.
	void tell(const GameEvent& event);

	// Waits for the hub: the game's clock stands still.
	void tellAndWait(const GameEvent& event);

	// By the drain timer: runs callbacks, then tells again what had no room.
	void drain();

	// A text as a JSON string.
	std::string quoted(const std::string& text) const;

	void restartMeasuring();

	std::uint64_t taken() const;
	std::uint64_t taken(std::size_t type) const { return taken_[type]; }
	std::size_t waitingForRoom() const { return waiting_.size(); }

	// Calls that never wait, by lane, and an empty call of the library beside each.
	Histogram enqueue_cost, bulk_cost, critical_cost, empty_cost;
	// Calls that wait, and processSyncQueue().
	Histogram waiting_call, drain_cost;
	// Since the start; refusals by code.
	std::uint64_t events = 0, queue_full = 0, callbacks = 0;
	std::uint64_t waited_applied = 0, waited_unknown = 0, waited_other = 0;
	std::size_t waiting_for_room_max = 0;
	std::map<p2p_sync_code, std::uint64_t> refused;

private:
	// An event that had no room, with texts of its own.
	struct Waiting {
		GameEvent event;
		std::string json;
	};

	bool call(const GameEvent& event);
	std::string submit(const GameEvent& event);
	void keep(const GameEvent& event);
	void wasTaken(const GameEvent& event);

	rathena::P2PDataSync* sync_;
	GameClock& clock_;
	std::array<std::uint64_t, DATA_TYPES> taken_{};
	std::deque<Waiting> waiting_;
};

} // namespace sample
