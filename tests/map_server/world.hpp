// The game: who is in it, what happens, and the work that takes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "feed.hpp"
#include "options.hpp"
#include "spin.hpp"
#include "timers.hpp"

namespace sample {

class World {
public:
	World(const Options& options, Feed& feed, Timers& timers, const Spin& spin);

	// Puts everything on its map and sets the timers, from now on.
	void start(Nanoseconds now);

	// What a timer does; adds the next one of its kind.
	void run(const Timer& timer);

	// One line for each path that holds the newest of its events: the path, and its serial or "removed".
	void writePaths(std::FILE* file) const;

private:
	struct Player {
		std::uint32_t map, x, y, hp, quest_state;
	};
	struct Monster {
		std::uint32_t x, y, hp;
		bool is_active;
	};

	Nanoseconds every(double per_second) const;
	Nanoseconds nextStep(double per_second);
	std::uint32_t random(std::uint32_t bound);
	template <typename... Values>
	GameEvent event(Call call, rathena::SyncDataType type, const std::string& map, LastTaken* last, const char* format,
		Values... values);
	void happen(const GameEvent& event);

	void playerMoves(std::uint32_t player, const char* how);
	void monsterMoves(std::uint32_t monster, const char* how);
	void monstersThink();
	void playersHeal();
	void savePlayer();
	void startNpcs();
	void npcEvent(std::uint32_t npc, const char* how);
	void chat();
	void drop();
	void pickUp();
	void quest();
	void countUsers();
	void changeMap();

	std::uint32_t monsterMap(std::uint32_t monster) const;
	const std::string& npcMap(std::uint32_t npc) const;

	const Options& options_;
	Feed& feed_;
	Timers& timers_;
	const Spin& spin_;
	const double scale_;
	std::uint64_t random_state_ = 0x9E3779B97F4A7C15;
	std::uint32_t serial_ = 0;

	// The first eight have players; on the others stand NPCs.
	std::vector<std::string> maps_;
	std::vector<Player> players_;
	std::vector<Monster> monsters_;
	std::uint32_t npcs_started_ = 0, next_saved_ = 0, next_counted_ = 0, next_drop_ = 0, next_pick_up_ = 0;
	std::vector<std::uint32_t> users_;

	std::vector<LastTaken> last_position_, last_monster_, last_npc_, last_drop_, last_quest_, last_player_, last_map_;
	char buffer_[512];
	std::string json_;
};

} // namespace sample
